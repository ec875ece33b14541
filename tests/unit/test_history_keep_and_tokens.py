"""History windows with more fields, and within a budget of tokens."""

from typing import Any

import pytest
from conversations import Message, answer, calls, conversations, result, says, sessions, user, uses, words
from hypothesis import given
from hypothesis import strategies as st
from sessionstore.history import ArgumentError, Entry, history, is_user_turn

# -------------------------------------------------------------------------------------------- more fields


def thought(message: Message, thoughts: object) -> Message:
    return message | {"reasoning": thoughts}


def test_keep_gives_more_fields_where_a_message_has_them() -> None:
    turn = [user() | {"id": 7}, thought(calls("1"), ["hm"]), result("1"), thought(says(), None)]
    assert history(turn, keep=("reasoning",)) == [user(), *turn[1:]]
    assert history(turn, keep=["reasoning", "id", "none"]) == turn
    assert history(turn) == [user(), calls("1"), result("1"), says()]


def test_kept_fields_come_last_and_in_the_order_asked_for() -> None:
    message = {"b": 1, "name": "n", "a": 2, "content": "", "role": "user"}
    for others in ([], [result("1")]):  # as stored, and with something to mend
        (entry,) = history([message, *others], keep=("a", "b", "a"))
        assert list(entry) == ["role", "content", "name", "a", "b"]


def test_what_the_rules_decide_is_not_for_keep_to_bring_back() -> None:
    names = ("role", "content", "tool_calls", "tool_call_id", "name")
    messages = [user() | {"tool_call_id": "1"}, calls("1", content="hm")]
    assert history(messages, keep=names) == [user(), says("hm")]


def test_a_kept_thought_alone_keeps_no_message() -> None:
    assert history([user(), thought(calls("1"), "hm")], keep=("reasoning",)) == [user()]


def test_each_part_of_a_message_has_its_kept_fields() -> None:
    late = user([answer("1"), words()]) | {"at": 3}
    assert history([user(), uses("1"), user("b"), late], keep=("at",)) == [
        user(), uses("1"), user([answer("1")]) | {"at": 3}, user("b"), user([words()]) | {"at": 3},
    ]  # fmt: skip


@given(sessions)
def test_kept_fields_are_copies_too(messages: list[Message]) -> None:
    inner: list[Any] = [{"deep": [1]}]
    for message in messages:
        message["reasoning"] = inner
    for entry in history(messages, max_messages=0, keep=("reasoning",)):
        kept: Any = entry["reasoning"]
        kept[0]["deep"].append(2)
    assert inner == [{"deep": [1]}]


@pytest.mark.parametrize("keep", ["reasoning", ("a", 1), [["a"]], None, 5, ("function_call",)])
def test_what_keep_cannot_be_is_refused(keep: Any) -> None:
    with pytest.raises(ArgumentError, match="keep ") as told:
        history([], keep=keep)
    assert (told.value.field, str(told.value)) == ("keep", f"keep {told.value.detail}")


# ------------------------------------------------------------------------------------------------- tokens


def one_each(_: Entry) -> int:
    return 1


def within(messages: list[Message], max_tokens: int, **arguments: Any) -> list[Entry]:
    return history(messages, max_tokens=max_tokens, count_tokens=one_each, **arguments)


def test_turns_are_left_out_from_the_front_until_the_rest_fits() -> None:
    first, second = [user("a"), calls("1"), result("1"), says("a")], [user("b"), says("b")]
    assert within([*first, *second], 6) == [*first, *second]
    assert within([*first, *second], 5) == second
    assert within([*first, *second], 2) == second
    assert within([*first, *second], 6, max_messages=5) == second


def test_the_last_turn_is_given_whole_whatever_it_counts_for() -> None:
    turn = [user("b"), calls("1"), result("1"), says("b")]
    assert within([user("a"), says("a"), *turn], 1) == turn
    assert within([user("a"), says("a"), *turn[:3]], 2) == turn[:3]
    assert within([], 1) == []


def test_without_a_user_turn_each_answer_begins_one() -> None:
    steps = [says("a"), calls("1", "2"), result("1"), result("2"), uses("3"), user([answer("3")])]
    assert within(steps, 6) == steps
    assert within(steps, 5) == steps[1:]
    assert within(steps, 4) == within(steps, 1) == steps[4:]


def test_a_window_that_begins_at_words_behind_results_begins_at_the_words() -> None:
    messages = [user("a"), uses("1"), user([answer("1"), words()]), says()]
    assert within(messages, 4) == messages
    assert within(messages, 3) == [user([words()]), says()]
    # What is left out does not count.
    costs = {"assistant": 1, "user": 1}

    def blocks(entry: Entry) -> int:
        content: Any = entry["content"]
        return costs[str(entry["role"])] * (len(content) if isinstance(content, list) else 1)

    assert history(messages, max_tokens=2, count_tokens=blocks) == [user([words()]), says()]
    later = [user("b"), says("b")]
    expected = [user([words()]), says(), *later]
    assert history([*messages, *later], max_tokens=4, count_tokens=blocks) == expected
    assert history([*messages, *later], max_tokens=3, count_tokens=blocks) == later


def test_who_counts_gets_the_entries_that_are_given_from_the_last_on() -> None:
    messages = [user(str(n)) | {"id": n, "at": 0} for n in range(9)]
    seen: list[Entry] = []

    def count(entry: Entry) -> float:
        seen.append(entry)
        return 1.5

    window = history(messages, keep=("id",), max_tokens=5, count_tokens=count)
    assert window == [user(str(n)) | {"id": n} for n in (6, 7, 8)]
    assert [entry["id"] for entry in seen] == [8, 7, 6, 5]
    assert all(entry is given for entry, given in zip(seen[2::-1], window, strict=True))


def test_no_more_is_counted_than_needed() -> None:
    counted: list[Entry] = []

    def count(entry: Entry) -> int:
        counted.append(entry)
        return 1

    window = history([user(), *[says()] * 50, user("b"), says()], max_tokens=5, count_tokens=count)
    assert window == [user("b"), says()]
    assert len(counted) == 6


@given(conversations(), st.integers(1, 30))
def test_no_turn_that_fits_is_left_out(messages: list[Message], budget: int) -> None:
    whole = history(messages)
    tails = [history(messages[index:]) for index, m in enumerate(messages) if is_user_turn(m)]
    fitting = [tail for tail in tails if len(tail) <= budget]
    assert within(messages, budget) == (fitting or tails[-1:] or [whole])[0]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_tokens": 0, "count_tokens": one_each}, "max_tokens"),
        ({"max_tokens": -1, "count_tokens": one_each}, "max_tokens"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"count_tokens": one_each}, "max_tokens"),
        ({"max_tokens": 1, "count_tokens": lambda _: -1}, "count_tokens"),
        ({"max_tokens": 1, "count_tokens": lambda _: float("nan")}, "count_tokens"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(arguments: Any, field: str) -> None:
    with pytest.raises(ArgumentError) as told:
        history([user()], **arguments)
    assert told.value.field == field


def test_what_the_counting_function_raises_goes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        history([user()], max_tokens=1, count_tokens=lambda _: 1 / 0)

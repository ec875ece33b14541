"""History: whatever is stored, a model gets a window that it accepts."""

import copy
import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversations import (
    Message,
    answer,
    calls,
    conversations,
    result,
    says,
    seed_window,
    sessions,
    user,
    uses,
    words,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st
from legal import complaint
from sessionstore.history import history, is_user_turn, needs_more, window_start

# -------------------------------------------------------------------------- conversations as they should be


@given(conversations(), st.data())
def test_a_conversation_in_order_loses_only_unknown_fields(
    messages: list[Message], data: st.DataObject
) -> None:
    last_consolidated = data.draw(st.integers(0, len(messages) + 1))
    max_messages = data.draw(st.integers(1, len(messages) + 1))
    expected = seed_window(messages, last_consolidated, max_messages)
    # Without a user's words at its front, it is not legal, and other tests say what is given instead.
    assume(not expected or (is_user_turn(expected[0]) and complaint(expected) is None))
    assert history(messages, last_consolidated=last_consolidated, max_messages=max_messages) == expected


def test_the_order_of_fields_is_fixed() -> None:
    message = {"name": "f", "tool_call_id": "1", "content": "r", "role": "tool", "extra": 1}
    assert list(history([user(), calls("1"), message])[2]) == ["role", "content", "tool_call_id", "name"]


# ------------------------------------------------------------------------------------------ anything at all


@given(sessions, st.integers(0, 14), st.integers(0, 14))
def test_whatever_is_stored_the_window_is_legal(
    messages: list[Message], last_consolidated: int, size: int
) -> None:
    before = copy.deepcopy(messages)
    window = history(messages, last_consolidated=last_consolidated, max_messages=size)
    assert complaint(window) is None
    assert messages == before
    assert window == history(before, last_consolidated=last_consolidated, max_messages=size)
    assert history(window, max_messages=0) == window
    rest = messages[last_consolidated:]
    if any(is_user_turn(message) for message in rest):
        assert is_user_turn(window[0])


@given(sessions, st.integers(1, 14))
def test_words_are_never_left_out_nor_put_in_another_order(messages: list[Message], size: int) -> None:
    def spoken(some: list[Message]) -> list[int]:
        speakers = [m for m in some if m.get("role") in ("user", "assistant")]
        return [m["name"] for m in speakers if m.get("content") == "text"]

    numbered = [message | {"name": index} for index, message in enumerate(messages)]
    start = window_start(numbered, max_messages=size)
    assert spoken(history(numbered, max_messages=size)) == spoken(numbered[start:])


@given(sessions, st.integers(0, 5), st.integers(1, 8))
def test_the_end_of_a_session_suffices_once_a_user_turn_is_in_it(
    messages: list[Message], last_consolidated: int, size: int
) -> None:
    whole = history(messages, last_consolidated=last_consolidated, max_messages=size)
    for start in range(max(last_consolidated, len(messages) - size), last_consolidated - 1, -1):
        tail = messages[start:]
        if not needs_more(tail) or start == last_consolidated:
            assert history(tail, max_messages=size) == whole


@given(sessions)
def test_what_is_given_is_the_callers_own(messages: list[Message]) -> None:
    before = copy.deepcopy(messages)

    def spoil(value: Any) -> None:
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, (dict, list)):
                spoil(inner)
        value.clear()

    for entry in history(messages, max_messages=0):
        spoil(entry)
    assert messages == before


def test_the_insides_of_calls_are_the_callers_own() -> None:
    messages = [user(), calls("1"), result("1"), uses("2"), user([answer("2")])]
    given: list[Any] = window(*messages)
    assert given == messages
    given[1]["tool_calls"][0]["function"]["name"] = "changed"
    given[3]["content"][0]["input"]["changed"] = 1
    given[4]["content"][0]["content"][0]["text"] = "changed"
    assert messages == [user(), calls("1"), result("1"), uses("2"), user([answer("2")])]


def test_depth_is_no_limit() -> None:
    content: list[Any] = []
    for _ in range(50_000):
        content = [content]
    (entry,) = history([user(content)])
    assert entry["content"] is not content
    for nest in (content, entry["content"]):  # take them apart: freeing them nested would recurse
        while nest:
            nest = nest.pop()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------- rule by rule


def window(*messages: Message, **arguments: int) -> list[Message]:
    return history(messages, **arguments)


@pytest.mark.parametrize("name", ["max_messages", "last_consolidated"])
@pytest.mark.parametrize("function", [history, window_start])
def test_negative_numbers_are_refused(name: str, function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0"):
        function([user()], **{name: -1})


def test_zero_is_no_limit_and_the_default_is_500() -> None:
    messages = [user(str(index)) for index in range(600)]
    assert window(*messages, max_messages=0) == messages
    assert window(*messages) == messages[100:]
    assert window(*messages, last_consolidated=590) == messages[590:]
    assert window(*messages, last_consolidated=700) == []
    assert window() == []


def test_a_window_begins_at_a_user_turn() -> None:
    assert window(user(), says("a"), user("b"), says("c"), max_messages=3) == [user("b"), says("c")]


def test_a_user_message_of_results_alone_is_no_user_turn() -> None:
    messages = [user("a"), uses("1"), user([answer("1")]), says(), user("b"), says()]
    assert window(*messages, max_messages=4) == [user("b"), says()]
    assert window(*messages[:4], max_messages=2) == messages[:4]


def test_a_window_is_extended_back_to_a_user_turn() -> None:
    turn = [user(), calls("1"), result("1"), calls("2"), result("2")]
    assert window(says(), *turn, max_messages=2) == turn
    assert window(says(), *turn, max_messages=1) == turn
    # But never over what is consolidated.
    assert window(says(), *turn, last_consolidated=2, max_messages=1) == []
    assert window(says(), *turn, last_consolidated=3, max_messages=3) == turn[3:]


def test_without_any_user_turn_the_window_is_given_without_orphans() -> None:
    assert window(says("a"), says("b"), result("1"), max_messages=2) == [says("b")]


def test_a_result_without_its_call_is_left_out() -> None:
    turn = [user(), calls("1"), result("1")]
    assert window(user(), result("1"), calls("1"), result("1"), result("1")) == turn
    assert window(user([answer("1"), words()])) == [user([words()])]
    assert window(user(), {"role": "tool", "content": "r"}) == [user()]


def test_a_call_without_its_result_is_left_out() -> None:
    assert window(user(), calls("1"), user("b")) == [user(), user("b")]
    assert window(user(), calls("1", content="hm")) == [user(), says("hm")]
    assert window(user(), calls("1", "2"), result("2")) == [user(), calls("2"), result("2")]
    thoughts = {"type": "thinking", "thinking": "...", "signature": "s"}
    assert window(user(), uses("1", before=(thoughts,)), user("b")) == [user(), user("b")]
    assert window(user(), uses("1", before=(words(),))) == [user(), says([words()])]


def test_a_reused_id_is_answered_once_and_by_the_next_result() -> None:
    turn = [user(), calls("1"), result("1"), says()]
    assert window(*turn, *turn) == turn + turn
    assert window(user(), calls("1"), user("b"), calls("1"), result("1")) == [user(), user("b"), *turn[1:3]]
    assert window(user(), calls("1", "1"), result("1"), result("1")) == [user(), calls("1"), result("1")]


def test_a_late_result_moves_up_to_its_call() -> None:
    assert window(user(), calls("1", "2"), result("1"), user("b"), result("2"), says()) == [
        user(), calls("1", "2"), result("1"), result("2"), user("b"), says(),
    ]  # fmt: skip
    assert window(user(), uses("1"), user("b"), user([answer("1"), words()])) == [
        user(), uses("1"), user([answer("1")]), user("b"), user([words()]),
    ]  # fmt: skip


def test_results_stand_before_words_in_one_message() -> None:
    assert window(user(), uses("1"), user([words(), answer("1")]))[2] == user([answer("1"), words()])


def test_a_call_is_answered_in_its_own_dialect() -> None:
    both = uses("1", before=(words(),)) | {"tool_calls": calls("1")["tool_calls"]}
    assert window(user(), both, result("1")) == [user(), calls("1", content=[words()]), result("1")]
    only_blocks = uses("1") | {"tool_calls": calls("1")["tool_calls"]}
    assert window(user(), only_blocks, result("1")) == [user(), calls("1", content=""), result("1")]


def test_tool_parts_out_of_place_are_left_out() -> None:
    assert window(user() | {"tool_calls": [{"id": "1"}], "tool_call_id": "1"}) == [user()]
    assert window(says() | {"tool_calls": None}, says() | {"tool_calls": []}) == [says(), says()]
    assert window(user(), {"role": "system", "content": [answer("1")]}) == [user()]
    assert window(user(), calls("1"), result("1") | {"content": [answer("1")]})[2]["content"] == ""


SYSTEM = {"role": "system", "content": "be kind"}
SAYS, R = words("hm"), result("1")
THOUGHT = {"type": "thinking", "thinking": "hm"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # Something stands between a call and its result.
        ([calls("1"), SYSTEM, result("1")], [calls("1"), result("1"), SYSTEM]),
        ([calls("1"), says(), result("1")], [calls("1"), result("1"), says()]),
        ([calls("1"), user([]), result("1")], [calls("1"), result("1"), user([])]),
        ([uses("1"), user([]), user([answer("1")])], [uses("1"), user([answer("1")]), user([])]),
        ([uses("1"), user([SAYS]), user([answer("1")])], [uses("1"), user([answer("1")]), user([SAYS])]),
        # One id twice.
        ([calls("1", "1"), result("1")], [calls("1"), result("1")]),
        ([uses("1", "1"), user([answer("1")])], [uses("1"), user([answer("1")])]),
        ([uses("1"), user([answer("1"), answer("1")])], [uses("1"), user([answer("1")])]),
        # Ids that are no strings, and that nothing could be looked up by.
        ([result("1") | {"tool_call_id": ["1"]}], []),
        ([{**calls("1"), "tool_calls": [{"id": ["1"]}]}], []),
        ([says([{"type": "tool_use", "id": ["1"]}])], []),
        ([uses("1"), user([{"type": "tool_result", "tool_use_id": ["1"]}])], []),
        ([calls("1") | {"tool_calls": [{"id": 1}]}, result("1") | {"tool_call_id": 1}], []),
        # Calls of who cannot call, and nothing but a thought beside a call.
        ([SYSTEM | {"content": "", "tool_calls": [{"id": "1"}]}], []),
        ([calls("1", content=(THOUGHT,))], []),
        ([says((THOUGHT, {"type": "tool_use", "id": "1"}))], []),
        # In memory, a list may be a tuple.
        ([says(tuple(uses("1")["content"])), user((answer("1"),))], [uses("1"), user([answer("1")])]),
        ([calls() | {"tool_calls": ({"id": "1"},)}, R], [calls() | {"tool_calls": [{"id": "1"}]}, R]),
    ],
)
def test_what_is_unusual_is_mended(messages: list[Message], expected: list[Message]) -> None:
    assert window(user(), *messages) == [user(), *expected]


def test_a_name_of_another_shape_is_a_copy_too() -> None:
    message = user() | {"name": ["a"]}
    (entry,) = window(message)
    assert entry == message
    assert entry["name"] is not message["name"]


def test_odd_messages_do_no_harm() -> None:
    odds: list[Message] = [{}, {"content": 1}, {"role": 5}, user(1), {"role": "user"}, user([])]
    assert window(*odds) == [user(1), user(""), user([])]


def test_the_examples_of_the_documentation_are_true() -> None:
    page = Path(__file__).parents[2] / "docs" / "history.md"
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried > 5
    assert failed == 0

"""The judge of windows: it lets whole conversations pass, and finds each kind of fault put into one."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conversations import Message, answer, anything, calls, conversations, result, says, user, uses, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from legal import FIELDS, complaint

# Each gives every way to put one fault into a copy of the window.
Fault = Callable[[list[Message]], Iterator[list[Message]]]


def at_each(window: list[Message], wanted: Callable[[Message], bool]) -> Iterator[tuple[list[Message], int]]:
    """A copy of the window and an index, for each message that is wanted."""
    for index, message in enumerate(window):
        if wanted(message):
            yield copy.deepcopy(window), index


def kinds(message: Message) -> list[Any]:
    content = message["content"]
    return [block["type"] for block in content] if isinstance(content, list) else []


def is_result(message: Message) -> bool:
    return message["role"] == "tool" or "tool_result" in kinds(message)


def is_call(message: Message) -> bool:
    return "tool_calls" in message or "tool_use" in kinds(message)


def a_result_is_lost(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, is_result):
        del spoilt[index]
        yield spoilt


def a_call_is_lost(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, is_call):
        del spoilt[index]
        yield spoilt


def a_result_is_there_twice(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, is_result):
        spoilt.insert(index, spoilt[index])
        yield spoilt


def words_come_between(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, is_result):
        for intruder in (user(), says(), user([words()]), user([]), {"role": "system", "content": ""}):
            yield [*spoilt[:index], intruder, *spoilt[index:]]


def a_call_is_in_flight_at_the_end(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, is_call):
        yield spoilt[: index + 1]


def a_result_comes_first(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, is_result):
        spoilt[index - 1], spoilt[index] = spoilt[index], spoilt[index - 1]
        if not is_result(spoilt[index]):
            yield spoilt


def words_come_before_results(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, lambda message: "tool_result" in kinds(message)):
        spoilt[index]["content"].insert(0, words())
        yield spoilt


def a_result_has_another_id(window: list[Message]) -> Iterator[list[Message]]:
    for other in ("none", 7, None, ["1"]):
        for spoilt, index in at_each(window, is_result):
            message = spoilt[index]
            holder = message if message["role"] == "tool" else message["content"][0]
            holder["tool_call_id" if message["role"] == "tool" else "tool_use_id"] = other
            yield spoilt


def a_call_has_another_id(window: list[Message]) -> Iterator[list[Message]]:
    for other in ("none", 7, None, ["1"]):
        for spoilt, index in at_each(window, is_call):
            message = spoilt[index]
            holder = message["tool_calls"][0] if "tool_calls" in message else message["content"][-1]
            holder["id"] = other
            yield spoilt


def a_call_is_there_twice(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, is_call):
        holder = spoilt[index].get("tool_calls") or spoilt[index]["content"]
        holder.append(holder[-1])
        yield spoilt


def an_answer_in_the_other_dialect(window: list[Message]) -> Iterator[list[Message]]:
    for spoilt, index in at_each(window, lambda message: message["role"] == "tool"):
        yield [*spoilt[:index], user([answer(spoilt[index]["tool_call_id"])]), *spoilt[index + 1 :]]
    for spoilt, index in at_each(window, lambda message: kinds(message) == ["tool_result"]):
        call_id = spoilt[index]["content"][0]["tool_use_id"]
        yield [*spoilt[:index], result(call_id), *spoilt[index + 1 :]]


def a_role_is_changed(window: list[Message]) -> Iterator[list[Message]]:
    for role in ("system", "assistant", "user", "tool", "", None, 5):
        for spoilt, index in at_each(window, lambda message: is_call(message) or is_result(message)):
            if spoilt[index]["role"] != role:
                spoilt[index]["role"] = role
                yield spoilt


def a_field_is_wrong(window: list[Message]) -> Iterator[list[Message]]:
    for field, value in (("tool_calls", []), ("tool_calls", None), ("tool_call_id", "1"), ("timestamp", "t")):
        for spoilt, index in at_each(window, lambda message: not is_result(message) and not is_call(message)):
            spoilt[index][field] = value
            yield spoilt
    for missing in ("role", "content"):
        for spoilt, index in at_each(window, lambda _: True):
            del spoilt[index][missing]
            yield spoilt


FAULTS: list[Fault] = [
    a_result_is_lost, a_call_is_lost, a_result_is_there_twice, words_come_between,
    a_call_is_in_flight_at_the_end, a_result_comes_first, words_come_before_results, a_result_has_another_id,
    a_call_has_another_id, a_call_is_there_twice, an_answer_in_the_other_dialect, a_role_is_changed,
    a_field_is_wrong,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_it_finds_the_fault_wherever_it_is(fault: Fault) -> None:
    tried: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations())
    def found(messages: list[Message]) -> None:
        window = [{name: m[name] for name in m if name in FIELDS} for m in messages]
        assert complaint(window) is None
        assert complaint(messages, ("timestamp", "reasoning_content")) is None
        for spoilt in fault(window):
            tried["faults"] += 1
            assert complaint(spoilt) is not None, spoilt

    found()
    assert tried["faults"] >= 20


@pytest.mark.parametrize(
    "window",
    [
        [],
        [user(), calls("1", "2"), result("2"), result("1"), says()],
        [user(), uses("1"), user([answer("1"), words()]), says()],
        [user(), uses("1", "2"), user([answer("2")]), user([answer("1"), words()])],
        [user(), uses("1") | {"tool_calls": calls("1")["tool_calls"]}, result("1"), user([answer("1")])],
        [says("nobody asked"), {"role": "system", "content": [None, 5, "x"]}],
    ],
)
def test_it_lets_pass_what_is_legal(window: list[Message]) -> None:
    assert complaint(window) is None


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_it_can_judge_anything(data: st.DataObject) -> None:
    complaint(data.draw(st.lists(anything, max_size=5)))

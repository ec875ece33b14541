"""A conversation to read: both dialects of tools, any shape, and nothing that steers a terminal."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessionstore._types import Head
from sessionstore.cli.conversation import Row, printable, rows

MOMENT = datetime(2026, 2, 23, 9, tzinfo=UTC)


def head(count: int, **changed: object) -> Head:
    fields = {"key": "a:b", "revision": 3, "message_count": count, "last_consolidated": 0, "metadata": {},
              "create_time": MOMENT, "update_time": MOMENT, "damage": ""}
    return Head(**(fields | changed))


def body(*messages: object) -> list[Row]:
    """The rows of the messages, without those of the head and without blank ones."""
    return [row for row in rows(head(len(messages)), 0, messages) if row.text][2:]


def test_a_plain_conversation():
    found = body({"role": "user", "content": "one\ntwo", "timestamp": "2026-02-23T09:00:00.123456"},
                 {"role": "assistant", "content": "three"})
    assert found == [
        Row("user", "#0 user  2026-02-23 09:00:00"), Row("text", "one", 4), Row("text", "two", 4),
        Row("assistant", "#1 assistant"), Row("text", "three", 4),
    ]


def test_tool_calls_and_results_of_the_first_dialect():
    function = {"name": "search", "arguments": '{"q": "東京", "n": 1}'}
    call = {"id": "call_1", "type": "function", "function": function}
    found = body({"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
                 {"role": "tool", "tool_call_id": "call_1", "name": "search", "content": "found"})
    assert found == [
        Row("assistant", "#0 assistant"), Row("note", "hm", 4),
        Row("call", '-> search(q="東京", n=1)  call_1', 4),
        Row("tool", "#1 tool  search  call_1"), Row("result", "found", 4),
    ]


def test_tool_calls_and_results_of_the_second_dialect():
    found = body(
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "search", "input": {"q": "x"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True,
             "content": [{"type": "text", "text": "no"}]},
            {"type": "image", "source": {"data": "A" * 5000}}]})
    assert found == [
        Row("assistant", "#0 assistant"), Row("note", "hm", 4), Row("text", "I look.", 4),
        Row("call", '-> search(q="x")  toolu_1', 4),
        Row("user", "#1 user"), Row("tool", "<- failed toolu_1", 4), Row("result", "no", 4),
        Row("note", "(image, 5,041 characters)", 4),
    ]


@pytest.mark.parametrize("arguments", ["{not json", None, [1], 7])
def test_arguments_in_no_known_shape_are_shown(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    text = body({"role": "assistant", "tool_calls": [call]})[-1].text
    assert text.startswith("-> f(")
    assert str(arguments or "") in text


def test_the_head_says_what_is_known():
    whole = head(2, metadata={"t": 1}, damage="a torn line", last_consolidated=2)
    texts = [row.text for row in rows(whole, 1, [{"role": "user"}]) if row.text]
    assert texts[0] == "a:b"
    assert texts[1].startswith("2 messages, revision 3, created 2026-02-")
    assert texts[2:] == ['metadata {"t": 1}', "damaged: a torn line", "(messages 0 to 0 are not shown)",
                         "#1 user", "(above: consolidated, last_consolidated 2)"]
    inside = [row.text for row in rows(head(2, last_consolidated=1), 0, [{"role": "user"}] * 2) if row.text]
    assert inside[2:] == ["#0 user", "(above: consolidated, last_consolidated 1)", "#1 user"]


def test_what_steers_a_terminal_is_shown_as_an_escape():
    shown = printable("a\x1b[31m\x07\x9b\r\n\tb\u202e\ud800\r")
    assert shown == "a\\x1b[31m\\x07\\x9b\n\tb\\u202e\\ud800\\x0d"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
NAMES = ["role", "content", "tool_calls", "tool_call_id", "name", "timestamp", "reasoning_content", "type",
         "text", "thinking", "id", "input", "function", "arguments", "is_error", "tool_use_id"]
SORTS = st.sampled_from(["user", "tool", "text", "tool_use", "tool_result", "image"])
SHAPED = st.dictionaries(
    st.sampled_from(NAMES),
    JSON | SORTS | st.lists(st.dictionaries(st.sampled_from(NAMES), JSON | SORTS, max_size=5), max_size=3),
    max_size=6,
)


@given(st.lists(SHAPED, max_size=4))
def test_any_message_can_be_shown_on_whole_lines_without_control_characters(messages):
    for row in rows(head(len(messages), key="k\x1b"), 0, messages):
        assert "\n" not in row.text
        assert printable(row.text) == row.text

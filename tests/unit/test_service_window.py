"""The window of GetHistory is the window of the whole session, read from its end."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessionstore import codec, history
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored import window
from sessionstored.engine import Refused, Slice
from sessionstored.requests import Bounds
from sessionstored.rules import Head
from sessionstored.window import Window

MESSAGES = st.lists(
    st.one_of(
        st.builds(lambda text: {"role": "user", "content": text, "time": "t"}, st.text(max_size=30)),
        st.builds(lambda text: {"role": "assistant", "content": text}, st.text(max_size=30)),
        st.sampled_from([
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]},
        ]),
    ),
    max_size=40,
)


class Session:
    """What an engine would give, with a count of the bytes that it gave."""

    def __init__(self, messages: list[dict[str, object]], last_consolidated: int = 0) -> None:
        self.lines = [json.dumps(message).encode() for message in messages]
        self.last_consolidated = last_consolidated
        self.reads: list[int] = []

    def read(self, asked: Window, max_bytes: int) -> Slice:
        head = Head("k", 5, 1, len(self.lines), self.last_consolidated, b"{}", 0, 0)
        start, stop = asked.select(head)
        assert 0 <= start <= stop <= len(self.lines)
        taken: list[bytes] = []
        for line in self.lines[start:stop]:
            if taken and sum(map(len, taken)) + len(taken) + len(line) + 1 > max_bytes:
                break
            taken.append(line)
        self.reads.append(sum(map(len, taken)))
        return Slice(head, start, taken)


def answer(
    session: Session, max_messages: int | None, max_bytes: int = 1 << 20, keep: tuple[str, ...] = ()
) -> v1.GetHistoryResponse:
    asked = Window.of(v1.GetHistoryRequest(key="k", max_messages=max_messages, keep=keep), Bounds())
    for _ in range(100):
        if asked.done:
            return asked.reply()
        asked.take(session.read(asked, max_bytes))
    raise AssertionError("it never ends")


@given(MESSAGES, st.integers(0, 50), st.sampled_from([(), ("time",), ("x", "time", "time")]), st.data())
def test_it_is_the_window_of_the_whole_session(messages, max_messages, keep, data):
    consolidated = data.draw(st.integers(0, len(messages)))
    got = answer(Session(messages, consolidated), max_messages, keep=keep)
    expected = history.history(
        messages, last_consolidated=consolidated, max_messages=max_messages, keep=keep
    )
    assert codec.decode_block(got.messages) == expected
    assert (got.truncated, got.revision) == (False, 5)


@settings(deadline=None)
@given(MESSAGES, st.integers(0, 50), st.integers(50, 400))
def test_where_it_does_not_fit_it_is_a_window_of_the_end_and_says_so(messages, max_messages, max_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "REPLY_BYTES_MAX", max_bytes)
        got = answer(Session(messages), max_messages, max_bytes)
    entries = codec.decode_block(got.messages)
    expected = history.history(messages, max_messages=max_messages)
    tails = [history.history(messages[n:], max_messages=max_messages) for n in range(len(messages) + 1)]
    assert entries in tails
    assert len(got.messages) <= max_bytes or len(messages[-1:]) == 1
    if not got.truncated:
        assert entries == expected


def test_a_long_session_is_not_read_from_its_start():
    session = Session([{"role": "user", "content": "x" * 1000} for _ in range(10_000)])
    got = answer(session, 20)
    assert len(codec.decode_block(got.messages)) == 20
    assert sum(session.reads) < 25_000


def test_without_a_user_turn_it_doubles_back():
    messages = [{"role": "user", "content": "q"}] + [{"role": "assistant", "content": "a"}] * 99
    session = Session(messages)
    assert len(codec.decode_block(answer(session, 10).messages)) == 100
    assert len(session.reads) == 5


def test_the_longest_tail_that_fits_is_found_in_few_reads():
    session = Session([{"role": "user", "content": "x" * 5000} for _ in range(2000)])
    got = answer(session, 0)
    assert got.truncated
    count = len(codec.decode_block(got.messages))
    assert (count + 1) * 5000 > (1 << 20) - 10_000
    assert len(session.reads) <= 13
    assert all(size <= 1 << 20 for size in session.reads)


def test_a_session_that_shrinks_meanwhile_does_not_keep_it_busy():
    session = Session([{"role": "user", "content": "x" * 50_000} for _ in range(100)])
    asked = Window.of(v1.GetHistoryRequest(key="k"), Bounds())
    for _ in range(20):
        if asked.done:
            break
        asked.take(session.read(asked, 1 << 20))
        del session.lines[-len(session.lines) // 2 :]
    assert asked.done
    assert asked.reply().revision == 5


def test_what_files_from_elsewhere_hold_comes_through():
    session = Session([])
    session.lines = [b'{"role": "user", "content": NaN}', b'{"role": "user", "content": "\\ud83d"}']
    lines = answer(session, None).messages.splitlines()
    assert lines == [b'{"role": "user", "content": NaN}', b'{"role": "user", "content": "\\ud83d"}']


def test_a_line_that_cannot_be_read_is_named_as_damage():
    session = Session([])
    session.lines = [b"{torn"]
    with pytest.raises(Refused) as caught:
        answer(session, None)
    refusal = caught.value.refusal
    assert (refusal.reason, set(refusal.metadata)) == ("DATA_LOSS", {"key", "file", "line", "detail"})

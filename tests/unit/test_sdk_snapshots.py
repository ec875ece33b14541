"""How a handle's snapshot moves, and how an edited list becomes one change. No daemon."""

import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessionstore import _editing, codec
from sessionstore._mirror import Bounds, Mirror
from sessionstore._operations import Rpc, Tail, pb
from sessionstore._snapshot import Effect, Lines, Snapshot, absent, difference, joined
from sessionstore._types import Head
from sessionstore.errors import InvalidArgumentError, error_for
from sessionstore.session import BaseHandle
from sessionstore.v1 import session_pb2

SOME = st.lists(st.sampled_from([{"n": n} for n in range(4)]), max_size=7)


class Owner:
    def __init__(self) -> None:
        self._guard = threading.RLock()


def head(revision: int, count: int) -> Head:
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    return Head("k", revision, count, 0, {}, now, now)


def lines(*numbers: int) -> list[bytes]:
    return [b'{"n": %d}' % number for number in numbers]


def handle(revision: int = 0, *numbers: int) -> BaseHandle:
    snapshot = absent("k")
    if revision:
        snapshot = joined(snapshot, Tail(head(revision, len(numbers)), 0, lines(*numbers)))
    return BaseHandle(Owner(), snapshot)


def take(mine: BaseHandle, before: Snapshot, tail: Tail | None) -> None:
    mine._take(before, tail, absent("k") if tail is None else joined(before, tail))


def held(of: BaseHandle) -> tuple[int, list[Any]]:
    return of.revision, [message["n"] for message in of.messages]


def result(previous: int, revision: int, count: int) -> session_pb2.WriteResult:
    return session_pb2.WriteResult(previous_revision=previous, revision=revision, message_count=count)


@given(SOME, SOME)
def test_the_difference_makes_the_new_list_of_the_old(old: list[Any], new: list[Any]) -> None:
    stored = [codec.encode(message) for message in old]
    found = difference(stored, new)
    assert (found is None) == (old == new)
    if found is not None:
        start, delete_count, put = found
        stored[start : start + delete_count] = put
        assert [codec.decode(line) for line in stored] == new
        assert len(put) + delete_count <= len(old) + len(new)


@pytest.mark.parametrize(
    ("old", "new"),
    [({"n": 1}, {"n": True}), ({"n": 1}, {"n": 1.0}), ({"a": 1, "b": 2}, {"b": 2, "a": 1})],
)
def test_an_edit_that_python_takes_for_equal_is_seen(old: Any, new: Any) -> None:
    assert old == new
    assert difference([codec.encode(old)], [new]) == (0, 1, [codec.encode(new)])


def test_what_was_not_touched_keeps_its_bytes() -> None:
    foreign = [b'{"n":1.50,"s":"\\u00e9"}', b'{"bad": NaN}', b'{"half": "\\ud800"}']
    messages = [codec.decode(line) for line in foreign]
    assert difference(foreign, messages) is None
    assert difference(foreign, [*messages, {"x": 1}]) == (3, 0, [b'{"x": 1}'])
    with pytest.raises(InvalidArgumentError) as told:
        difference(foreign, [*messages[:2], {"half": "\ud800", "more": 1}])
    assert told.value.index == 2


def test_a_message_that_is_no_json_is_named_by_its_place_in_the_list() -> None:
    with pytest.raises(InvalidArgumentError) as told:
        difference(lines(1, 2), [{"n": 1}, {"n": 2}, {"n": {3}}])
    assert (told.value.reason, told.value.index) == ("MESSAGE_NOT_JSON", 2)


def test_lines_that_grow_share_and_lines_that_fork_do_not() -> None:
    first = Lines([], 0)
    second = first.splice(0, 0, lines(1, 2))
    third = second.splice(2, 0, lines(3))
    other = second.splice(2, 0, lines(4))
    assert second.begins(third)
    assert second.begins(other)
    assert not third.begins(other)
    assert not third.begins(second)
    assert [each.since(0) for each in (first, second, third, other)] == [
        [], lines(1, 2), lines(1, 2, 3), lines(1, 2, 4)
    ]  # fmt: skip


def test_an_own_write_right_after_the_snapshot_is_applied() -> None:
    mine = handle(1, 1, 2)
    assert mine._applied(result(1, 2, 3), lambda _: Effect(2, 0, lines(3)))
    assert held(mine) == (2, [1, 2, 3])
    assert mine._applied(result(2, 3, 2), lambda before: Effect(before.lines.count - 1, 1))
    assert held(mine) == (3, [1, 2])


def test_an_own_write_after_somebody_elses_needs_a_read() -> None:
    mine = handle(1, 1)
    assert not mine._applied(result(2, 3, 3), lambda _: Effect(2, 0, lines(3)))
    assert held(mine) == (1, [1])


def test_answers_that_come_late_change_nothing() -> None:
    mine = handle(5, 1, 2)
    assert mine._applied(result(2, 3, 9), lambda _: Effect(0, 0, lines(9)))
    take(mine, absent("k"), Tail(head(4, 1), 0, lines(9)))
    take(mine, absent("k"), None)  # not found, asked before the snapshot that is there now
    assert held(mine) == (5, [1, 2])


def test_a_read_joins_what_its_asker_held_not_what_came_meanwhile() -> None:
    mine = handle(5, 1, 2)
    before = mine._snapshot
    mine._applied(result(5, 6, 3), lambda _: Effect(2, 0, lines(3)))
    take(mine, before, Tail(head(8, 4), 2, lines(3, 4)))
    assert held(mine) == (8, [1, 2, 3, 4])


def test_a_read_of_the_same_revision_keeps_the_messages() -> None:
    mine = handle(5, 1, 2)
    kept = mine.messages
    take(mine, mine._snapshot, Tail(head(5, 2), 2, []))
    assert mine.messages is kept


def test_a_removal_that_was_read_while_the_snapshot_moved_is_read_again() -> None:
    mine = handle(3, 1)
    before = mine._snapshot
    take(mine, before, Tail(head(5, 2), 1, lines(2)))  # of another thread
    assert mine._take(before, None, absent("k", 3)) is False  # removed after revision 5, or made anew in 5?
    assert held(mine) == (5, [1, 2])
    assert mine._take(mine._snapshot, None, absent("k", 5)) is True
    assert not mine.exists


def test_a_session_that_was_read_while_another_read_found_it_gone_is_read_again() -> None:
    mine = handle(3, 1)
    before = mine._snapshot
    take(mine, before, None)
    tail = Tail(head(5, 2), 1, lines(2))
    assert mine._take(before, tail, joined(before, tail)) is False
    assert not mine.exists
    assert mine._take(before, tail, joined(before, tail), surely=True) is True
    assert held(mine) == (5, [1, 2])


def test_a_refresh_reads_until_it_is_sure() -> None:
    mine = handle(3, 1)
    mine._owner._mirror = Mirror(Bounds(), lambda: 0.0, mine._owner._guard)  # type: ignore[misc]
    first, second = mine._refresh(), mine._refresh()
    next(first)
    next(second)
    gone = error_for("SESSION_NOT_FOUND", "there is none", {"key": "k"})
    with pytest.raises(StopIteration):
        second.throw(gone)
    assert not mine.exists
    old = pb.GetSessionResponse(session=session_pb2.Session(key="k", revision=5, message_count=1), start=1)
    assert isinstance(first.send(old), Rpc)
    with pytest.raises(StopIteration):
        first.throw(gone)
    assert not mine.exists


def test_to_ask_as_of_when_moves_nothing() -> None:
    mine = handle(3, 1)
    before = mine._snapshot
    mine._snapshot = replace(before, as_of_s=7.0)
    assert mine._take(before, None, absent("k", 3)) is True
    assert not mine.exists


def test_messages_are_read_once_and_kept() -> None:
    mine = handle(1, 1, 2)
    before = mine.messages
    assert mine.messages is before
    mine._applied(result(1, 2, 3), lambda _: Effect(2, 0, lines(3)))
    assert mine.messages[0] is before[0]
    mine._applied(result(2, 3, 3), lambda _: Effect(0, 1, lines(7)))
    assert [message["n"] for message in mine.messages] == [7, 2, 3]
    assert [message["n"] for message in before] == [1, 2]


def test_a_change_to_a_dict_of_the_snapshot_is_never_stored() -> None:
    mine = handle(1, 1, 2)
    mine.messages[0]["n"] = "changed against the rules"
    draft = _editing.begin(mine)
    assert draft.messages[0] == {"n": 1}
    assert difference(draft.base.lines.since(0), draft.messages) is None

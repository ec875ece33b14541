"""The near cache alone: what it serves, for how long, and when it would rather not. On a clock of its own."""

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sessionstore import _operations as ops
from sessionstore._mirror import Bounds, Mirror
from sessionstore._operations import Rpc, pb
from sessionstore._snapshot import Snapshot, joined
from sessionstore._snapshot import absent as no_session
from sessionstore._types import Head
from sessionstore.errors import InvalidArgumentError, error_for
from sessionstore.v1 import session_pb2
from unit.test_sdk_watching import append, block, deleted


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Near:
    """A mirror, its clock, and what a daemon would say to it."""

    def __init__(self, **bounds: Any) -> None:
        self.clock = Clock()
        self.mirror = Mirror(Bounds(**{"bytes_max": 1 << 20, **bounds}), self.clock, threading.RLock())
        self.woken = 0
        self.mirror.wake = self._wake

    def _wake(self) -> None:
        self.woken += 1

    def offer(
        self, key: str, revision: int, *numbers: int, cursor: bytes = b"c", marks: int | None = None
    ) -> None:
        now = ops.moment(pb.Lease().acquire_time)
        head = Head(key, revision, len(numbers), 0, {}, now, now)
        tail = ops.Tail(head, 0, ops.lines_of(block(*numbers)), cursor)
        snapshot = joined(no_session(key), tail, self.clock.now_s)
        self.mirror.offer(snapshot, cursor, self.mirror.marks if marks is None else marks)

    def send_all(self) -> list[pb.WatchRequest]:
        """What there is to send now, without sending a sign of life."""
        sent = []
        while not isinstance(found := self.mirror.take(), float):
            sent.append(found)
        return sent

    def says(self, *events: pb.WatchEvent, in_step: int = 0, cursor: bytes = b"s") -> None:
        self.mirror.received(pb.WatchResponse(events=events, cursor=cursor, in_step=in_step))

    def holds(self, key: str) -> tuple[int, list[int]] | None:
        return numbers(self.mirror.near(key))

    def acknowledge(
        self, method: Any, request: Any, previous: int, revision: int, count: int, **reply: Any
    ) -> None:
        result = session_pb2.WriteResult(previous_revision=previous, revision=revision, message_count=count)
        self.mirror.heard(Rpc(method, request), method.reply(result=result, **reply))


def numbers(snapshot: Snapshot | None) -> tuple[int, list[int]] | None:
    if snapshot is None:
        return None
    return snapshot.revision, [ops.decode(line)["n"] for line in snapshot.lines.since(0)]


def kept(*numbers: int, **bounds: Any) -> Near:
    """One session `a` at revision 5, in step."""
    near = Near(**bounds)
    near.offer("a", 5, *numbers)
    assert near.mirror.open()
    assert [list(request.keys) for request in near.send_all()] == [["a"]]
    near.says(in_step=1)
    return near


def test_what_was_read_is_served_until_the_bound() -> None:
    near = Near(staleness_s=10)
    assert near.holds("a") is None
    near.offer("a", 5, 1, 2)
    assert near.woken == 1
    near.clock.now_s += 9.9
    assert near.holds("a") == (5, [1, 2])
    near.clock.now_s += 0.2
    assert near.holds("a") is None


def test_the_stream_proves_what_is_held_as_of_when_it_was_asked() -> None:
    near = Near(staleness_s=10)
    near.offer("a", 5, 1)
    near.mirror.open()
    near.clock.now_s += 7
    assert [list(request.keys) for request in near.send_all()] == [["a"]]
    near.clock.now_s += 7
    assert near.holds("a") is None
    near.says()  # something came, which does not tell that it is all
    assert near.holds("a") is None
    near.says(in_step=1)
    assert near.holds("a") == (5, [1])
    assert near.mirror.as_of_s("a", 5) == 1007
    near.clock.now_s += 4  # 11 s after the question, however late the answer came
    assert near.holds("a") is None


def test_it_asks_again_when_half_of_the_bound_is_over_and_silence_is_not_taken_for_news() -> None:
    near = kept(1, staleness_s=10)
    assert near.mirror.take() == 5.0
    near.clock.now_s += 5
    assert near.send_all() == [pb.WatchRequest()]
    near.says(in_step=2)
    assert near.mirror.as_of_s("a", 5) == 1005
    for _ in range(100):  # nobody answers: the questions are bounded, too
        near.clock.now_s += 5
        near.send_all()
    assert len(near.mirror._asked) == 16
    assert near.holds("a") is None
    near.says(in_step=18)
    assert near.holds("a") is None  # what was asked long ago proves what was long ago


def test_a_session_that_the_stream_does_not_have_yet_is_not_proven_by_it() -> None:
    near = kept(1, staleness_s=10)
    near.offer("b", 7, 2)
    assert [list(request.keys) for request in near.send_all()] == [["b"]]
    near.clock.now_s += 5
    near.send_all()
    near.says(in_step=1)
    assert near.mirror.as_of_s("b", 7) == 1000
    near.says(in_step=3)
    assert near.mirror.as_of_s("b", 7) == 1005


def test_events_move_it_and_nothing_that_was_given_out() -> None:
    near = kept(1, 2)
    before = near.mirror.near("a")
    near.says(append("a", 5, 6, 2, 3), append("x", 5, 6, 2, 3))
    assert near.holds("a") == (6, [1, 2, 3])
    assert numbers(before) == (5, [1, 2])
    near.says(append("a", 6, 7, 1, 9, delete_count=2))
    assert near.holds("a") == (7, [1, 9])
    near.says(append("a", 6, 7, 1, 9, delete_count=2))  # again: it is not above what is held
    assert near.holds("a") == (7, [1, 9])
    near.says(append("a", 7, 8, 0, 4, whole=True, partial=True), append("a", 7, 8, 1, 5))
    assert near.holds("a") == (8, [4, 5])
    near.says(deleted("a", 8, 9))
    assert near.holds("a") == (0, [])
    near.says(append("a", 0, 10, 0, 1))
    assert near.holds("a") == (10, [1])


def test_parts_that_belong_to_different_changes_are_not_joined() -> None:
    near = kept(1)
    near.says(append("a", 5, 6, 1, 2, partial=True), append("a", 5, 7, 0, 3, whole=True, partial=True),
              append("a", 5, 7, 1, 4))  # fmt: skip
    assert near.holds("a") == (7, [3, 4])


@pytest.mark.parametrize("wrong", [
    append("a", 6, 7, 1, 2),  # a gap
    append("a", 5, 6, 4, 2),  # beyond the end
    append("a", 5, 6, 1, 2, delete_count=9),
], ids=["gap", "start", "count"])  # fmt: skip
def test_what_does_not_follow_drops_the_session_until_it_is_read_again(wrong: pb.WatchEvent) -> None:
    near = kept(1)
    near.says(wrong)
    assert near.holds("a") is None
    assert near.send_all() == [pb.WatchRequest(removed_keys=["a"])]
    near.offer("a", 7, 1, 2, cursor=b"d")
    assert near.send_all() == [pb.WatchRequest(keys=["a"], cursor=b"d")]
    assert near.holds("a") == (7, [1, 2])


def test_own_writes_are_applied_when_they_are_acknowledged() -> None:
    near = kept(1, 2)
    write = near.acknowledge
    write(ops.APPEND, pb.AppendMessagesRequest(key="a", messages=block(3)), 5, 6, 3, first_index=2)
    assert near.holds("a") == (6, [1, 2, 3])
    write(ops.POP, pb.PopMessageRequest(key="a"), 6, 7, 2)
    assert near.holds("a") == (7, [1, 2])
    request = pb.ReplaceMessagesRequest(key="a", start=0, delete_count=1, messages=block(9))
    write(ops.REPLACE, request, 7, 8, 2)
    assert near.holds("a") == (8, [9, 2])
    write(ops.REPLACE, pb.ReplaceMessagesRequest(key="a", start=1), 8, 9, 1)
    assert near.holds("a") == (9, [9])
    near.says(append("a", 5, 6, 2, 3), append("a", 8, 9, 1, delete_count=1))  # its own echo
    assert near.holds("a") == (9, [9])
    write(ops.DELETE, pb.DeleteSessionRequest(key="a"), 9, 10, 0)
    assert near.holds("a") == (0, [])


def test_own_changes_of_the_metadata_are_applied() -> None:
    near = kept(1)

    def update(previous: int, paths: list[str], metadata: bytes) -> Any:
        request = pb.UpdateSessionRequest(key="a", metadata=metadata)
        request.update_mask.paths.extend(paths)
        near.acknowledge(ops.UPDATE, request, previous, previous + 1, 1)
        snapshot = near.mirror.near("a")
        return snapshot.head.metadata if snapshot and snapshot.head else None

    assert update(5, ["metadata"], b'{"x": 1, "a.b": 2}') == {"x": 1, "a.b": 2}
    assert update(6, ["metadata.y", "metadata.a.b", "metadata.z"], b'{"y": 3}') == {"x": 1, "y": 3}
    assert update(7, ["last_consolidated"], b"") == {"x": 1, "y": 3}
    assert update(8, ["something_new"], b"") is None  # what it does is not known here: the stream will tell


def test_an_own_write_behind_others_is_waited_for() -> None:
    near = kept(1)
    request = pb.AppendMessagesRequest(key="a", messages=block(3))
    near.acknowledge(ops.APPEND, request, 6, 7, 3, first_index=2)
    assert near.holds("a") is None
    near.says(append("a", 5, 6, 1, 2), in_step=1)
    assert near.holds("a") is None
    near.says(append("a", 6, 7, 2, 3))
    assert near.holds("a") == (7, [1, 2, 3])


def test_an_own_write_during_a_read_makes_its_answer_wait_for_the_stream() -> None:
    near = Near()
    begun = near.mirror.marks
    request = pb.AppendMessagesRequest(key="a", messages=block(3))
    near.acknowledge(ops.APPEND, request, 5, 6, 2, first_index=1)
    near.offer("a", 5, 1, marks=begun)
    assert near.holds("a") is None
    near.mirror.open()
    near.send_all()
    near.says(append("a", 5, 6, 1, 3), in_step=1)
    assert near.holds("a") == (6, [1, 3])


def test_it_never_goes_back_behind_what_another_read_has_shown() -> None:
    near = kept(1)
    shown = pb.GetSessionResponse(session=session_pb2.Session(key="a", revision=8))
    near.mirror.heard(Rpc(ops.GET, pb.GetSessionRequest(key="a", last=0)), shown)
    assert near.holds("a") is None
    near.offer("a", 6, 1)
    assert near.holds("a") is None
    near.offer("a", 8, 1, 2)
    assert near.holds("a") == (8, [1, 2])
    near.offer("a", 7, 3)  # an answer that was overtaken
    assert near.holds("a") == (8, [1, 2])


def test_it_never_goes_back_behind_a_read_that_found_no_session() -> None:
    near = kept(1)
    begun = near.mirror.marks
    error = error_for("SESSION_NOT_FOUND", "there is none", {"key": "a"})
    near.mirror.missed(Rpc(ops.GET, pb.GetSessionRequest(key="b")), error_for("SHUTTING_DOWN", "later"))
    assert near.holds("a") == (5, [1])
    near.mirror.missed(Rpc(ops.GET, pb.GetSessionRequest(key="a")), error)
    assert near.holds("a") is None
    near.offer("a", 5, 1, marks=begun)  # an answer that was overtaken
    assert near.holds("a") is None


def test_it_never_goes_back_behind_a_listing_or_a_watch() -> None:
    near = kept(1)
    reply = pb.ListSessionsResponse(sessions=[session_pb2.Session(key="a", revision=6)])
    near.mirror.heard(Rpc(ops.LIST, pb.ListSessionsRequest()), reply)
    assert near.holds("a") is None
    near.says(append("a", 5, 6, 1, 2))
    assert near.holds("a") == (6, [1, 2])
    near.mirror.shown("a", 6)
    assert near.holds("a") == (6, [1, 2])
    begun = near.mirror.marks
    near.mirror.shown("b", 7)
    near.offer("b", 6, marks=begun)  # an answer that was overtaken
    assert near.holds("b") is None
    near.mirror.shown("a", 0)
    assert near.holds("a") is None


def test_a_session_whose_time_is_over_is_not_served() -> None:
    near = kept(1)
    snapshot = near.mirror.near("a")
    assert snapshot is not None
    assert snapshot.head is not None
    for minutes, served in ((1, True), (-1, False)):
        end = datetime.now(UTC) + timedelta(minutes=minutes)
        near.mirror._entries["a"].snapshot = replace(snapshot, head=replace(snapshot.head, expire_time=end))
        assert (near.mirror.near("a") is not None) == served
        assert (near.mirror.as_of_s("a", 5) > 0) == served


def test_an_answer_from_before_a_session_was_let_go_of_waits_for_the_stream() -> None:
    near = kept(1, sessions_max=1)
    begun = near.mirror.marks
    near.offer("b", 1)
    near.offer("a", 4, marks=begun)
    assert near.holds("a") is None
    near.send_all()
    near.says(append("a", 4, 5, 0, 1), in_step=3)
    assert near.holds("a") == (5, [1])


def test_a_stream_that_broke_goes_on_where_it_was_for_what_it_had() -> None:
    near = kept(1)
    near.offer("b", 7, 2, cursor=b"d")
    near.send_all()
    near.says(append("a", 5, 6, 1, 2), cursor=b"t")  # before the daemon took the request for b
    assert 0 < near.mirror.broke("GRPC_UNAVAILABLE") <= 5
    assert near.mirror.open()
    requests = near.send_all()
    assert [(list(request.keys), request.cursor) for request in requests] == [(["a"], b"t"), (["b"], b"d")]
    assert near.holds("a") == (6, [1, 2])
    near.says(in_step=2)
    assert near.holds("b") == (7, [2])


@pytest.mark.parametrize("reason", ["CURSOR_EXPIRED", "CURSOR_INVALID"])
def test_a_cursor_of_no_use_drops_everything(reason: str) -> None:
    near = kept(1)
    near.mirror.broke(reason)
    assert near.holds("a") is None
    assert not near.mirror.open()


def test_the_least_recently_used_goes_first() -> None:
    near = Near(sessions_max=2)
    near.offer("a", 1)
    near.offer("b", 1)
    near.mirror.open()
    near.send_all()
    assert near.holds("a") is not None
    near.offer("c", 1)
    assert [near.holds(key) is not None for key in "abc"] == [True, False, True]
    assert near.send_all() == [pb.WatchRequest(removed_keys=["b"]), pb.WatchRequest(keys=["c"], cursor=b"c")]


def test_bytes_are_bounded_also_when_sessions_grow() -> None:
    near = Near(bytes_max=40_000)
    near.offer("a", 5, *range(100))
    near.offer("b", 5, *range(100))
    assert near.holds("a") is not None
    near.mirror.open()
    near.send_all()
    near.says(append("a", 5, 6, 100, *range(300)))
    assert near.mirror._bytes <= 40_000
    assert near.holds("a") is None or near.holds("b") is None
    near.offer("huge", 5, *range(10_000))
    assert near.holds("huge") is None
    assert near.mirror._bytes <= 40_000
    near.offer("c", 5)
    near.send_all()
    near.says(*(append("c", 5, 6, 0, *range(500), whole=not n, partial=True) for n in range(20)))
    assert near.holds("c") is None


def test_what_is_counted_is_what_is_kept() -> None:
    near = kept(1, 2)
    near.says(append("a", 5, 6, 2, *range(50)), append("a", 6, 7, 32, 3, delete_count=20))
    request = pb.ReplaceMessagesRequest(key="a", start=1, delete_count=2, messages=block(*range(9)))
    near.acknowledge(ops.REPLACE, request, 7, 8, 40)
    counted = near.mirror._bytes
    snapshot = near.mirror.near("a")
    assert snapshot is not None
    fresh = Near()
    fresh.mirror.offer(snapshot, b"c", 0)
    assert counted == fresh.mirror._bytes
    near.says(deleted("a", 8, 9))
    assert near.mirror._bytes < counted


def test_without_room_nothing_is_kept_and_without_a_cursor_neither() -> None:
    for near in (Near(bytes_max=0), Near(sessions_max=0)):
        near.offer("a", 5, 1)
        assert (near.holds("a"), near.mirror.open(), near.woken) == (None, False, 0)
    near = Near()
    near.offer("a", 5, 1, cursor=b"")
    assert near.holds("a") is None


def test_a_signal_handler_that_comes_between_gets_nothing_and_what_it_wrote_is_read_anew() -> None:
    near = kept(1)
    with near.mirror._alone() as alone:
        assert alone
        request = pb.AppendMessagesRequest(key="a", messages=block(3))
        near.acknowledge(ops.APPEND, request, 5, 6, 2, first_index=1)
        near.offer("b", 1, 1)
        assert near.holds("a") is None
        assert near.mirror.as_of_s("a", 5) == float("-inf")
        assert not near.mirror.open()
        assert isinstance(near.mirror.take(), float)
    assert (near.holds("a"), near.holds("b")) == (None, None)


@pytest.mark.parametrize("wrong", [
    {"bytes_max": -1}, {"bytes_max": "1"}, {"sessions_max": -1}, {"staleness_s": 0}, {"staleness_s": 4000},
    {"staleness_s": "1"},
])  # fmt: skip
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="near_cache"):
        Bounds(**wrong)

"""What a watch gives, whatever the stream does: the core alone, with responses as a daemon makes them."""

from typing import Any

import pytest
from sessionstore import _watching
from sessionstore._operations import lines_of, pb
from sessionstore._watching import Watching
from sessionstore.errors import CursorExpiredError, InvalidArgumentError, NotFoundError, error_for
from sessionstore.v1 import session_pb2


class Store:
    """What a daemon would answer to reads: key -> (revision, messages)."""

    def __init__(self, **sessions: Any) -> None:
        self.sessions: dict[str, tuple[int, list[int]]] = dict(sessions)
        self.reads: list[str] = []
        self.page = 2

    def run(self, operation: Any) -> Any:
        """Run an operation of the SDK to its value."""
        try:
            rpc = next(operation)
            while True:
                try:
                    reply = self._answer(rpc.request)
                except NotFoundError as error:
                    rpc = operation.throw(error)
                else:
                    rpc = operation.send(reply)
        except StopIteration as end:
            return end.value

    def _answer(self, request: Any) -> Any:
        if isinstance(request, pb.ListSessionsRequest):
            self.reads.append(f"list {request.prefix!r} {request.page_token}".strip())
            keys = sorted(key for key in self.sessions if key.startswith(request.prefix))
            after = [key for key in keys if key > request.page_token]
            page = after[: min(self.page, request.page_size)]
            more = page[-1] if len(page) < len(after) else ""
            return pb.ListSessionsResponse(
                sessions=[self._head(key) for key in page], next_page_token=more, cursor=b"list"
            )
        self.reads.append(request.key)
        if request.key not in self.sessions:
            raise error_for("SESSION_NOT_FOUND", "no such session", {"key": request.key})
        return pb.GetSessionResponse(
            session=self._head(request.key), messages=block(*self.sessions[request.key][1]), cursor=b"read"
        )

    def _head(self, key: str) -> session_pb2.Session:
        revision, numbers = self.sessions[key]
        return session_pb2.Session(key=key, revision=revision, message_count=len(numbers), metadata=b"{}")


def block(*numbers: int) -> bytes:
    return b"".join(b'{"n": %d}\n' % number for number in numbers)


def append(key: str, previous: int, revision: int, start: int, *numbers: int, **fields: Any) -> pb.WatchEvent:
    head = session_pb2.Session(key=key, revision=revision, message_count=start + len(numbers), metadata=b"{}")
    changed = pb.SessionChanged(session=head, start=start, messages=block(*numbers), **fields)
    return pb.WatchEvent(key=key, revision=revision, previous_revision=previous, changed=changed)


def deleted(key: str, previous: int, revision: int, *, expired: bool = False) -> pb.WatchEvent:
    gone = pb.SessionDeleted(expired=expired)
    return pb.WatchEvent(key=key, revision=revision, previous_revision=previous, deleted=gone)


def response(cursor: bytes, *events: pb.WatchEvent) -> pb.WatchResponse:
    return pb.WatchResponse(events=events, cursor=cursor)


def watching(**arguments: Any) -> Watching:
    return Watching(**{"prefix": None, "keys": None, "cursor": None, "known": None, **arguments})


def given(watch: Watching) -> list[tuple[Any, ...]]:
    """What waits for the reader, in short: it takes all of it."""
    found = []
    while watch.events:
        event = watch.pop()
        numbers = [message["n"] for message in getattr(event, "messages", [])]
        kind = type(event).__name__.removeprefix("Session").lower()
        kind = "whole" if getattr(event, "whole", False) else kind
        found.append((event.key, event.revision, kind, numbers))
    return found


def read_all(watch: Watching, store: Store) -> None:
    for _ in range(1000):
        if not watch.reads:
            return
        store.run(watch.read_on())
    pytest.fail("it reads without an end")


def expired(reason: str = "CURSOR_EXPIRED") -> Any:
    return error_for(reason, "as told")


def test_events_come_as_they_are_and_the_cursor_follows_what_was_taken() -> None:
    watch, store = watching(prefix="a"), Store()
    assert watch.request() == pb.WatchRequest(prefix="a")
    store.run(watch.received(response(b"0")))
    assert (watch.cursor, watch.in_force) == (b"0", True)
    store.run(watch.received(response(b"1", append("a", 0, 1, 0, 1), append("a", 1, 2, 1, 2, 3))))
    assert watch.cursor == b"0"
    first = watch.pop()
    assert (first.cursor, watch.cursor) == (b"0", b"0")
    second = watch.pop()
    assert (second.cursor, watch.cursor) == (b"1", b"1")
    assert second.apply(first.apply([])) == [{"n": 1}, {"n": 2}, {"n": 3}]
    store.run(watch.received(response(b"2")))
    assert watch.cursor == b"2"
    assert watch.request() == pb.WatchRequest(prefix="a", cursor=b"2")
    assert store.reads == []


def test_a_change_in_parts_is_joined_also_over_responses() -> None:
    watch, store = watching(prefix=""), Store()
    store.run(watch.received(response(b"1", append("a", 0, 5, 0, 1, partial=True, whole=True))))
    assert not watch.events
    store.run(watch.received(response(b"2", append("a", 0, 5, 1, 2))))
    assert given(watch) == [("a", 5, "whole", [1, 2])]


def test_parts_of_a_stream_that_broke_are_not_joined_to_those_of_the_next() -> None:
    watch, store = watching(prefix=""), Store()
    store.run(watch.received(response(b"1", append("a", 0, 5, 0, 1, partial=True))))
    watch.failed(error_for("SHUTTING_DOWN", "as told"))
    watch.request()
    both = append("a", 0, 5, 0, 1, partial=True), append("a", 0, 5, 1, 2)
    store.run(watch.received(response(b"2", *both)))
    assert given(watch) == [("a", 5, "changed", [1, 2])]


def test_a_whole_session_that_begins_anew_forgets_its_first_parts() -> None:
    watch, store = watching(prefix=""), Store()
    first, anew = (append("a", 0, revision, 0, 7, partial=True, whole=True) for revision in (5, 6))
    store.run(watch.received(response(b"1", first, anew, append("a", 0, 6, 1, 8))))
    assert given(watch) == [("a", 6, "whole", [7, 8])]


def test_what_was_given_is_not_given_again() -> None:
    watch, store = watching(prefix=""), Store()
    store.run(watch.received(response(b"1", append("a", 0, 1, 0, 1), deleted("b", 3, 4))))
    given(watch)
    again = append("a", 0, 1, 0, 1), deleted("b", 3, 4), append("b", 2, 3, 0, 9), append("a", 1, 2, 1, 2)
    store.run(watch.received(response(b"2", *again)))
    assert given(watch) == [("a", 2, "changed", [2])]


def test_a_change_that_does_not_follow_is_read_anew() -> None:
    watch, store = watching(prefix=""), Store(a=(9, [1, 2, 3]))
    store.run(watch.received(response(b"1", append("a", 0, 1, 0, 1))))
    given(watch)
    events = append("a", 6, 7, 2, 3), append("a", 7, 9, 2, 3), append("a", 9, 10, 3, 4)
    store.run(watch.received(response(b"2", *events)))
    assert given(watch) == [("a", 9, "whole", [1, 2, 3]), ("a", 10, "changed", [4])]
    assert store.reads == ["a"]


def test_a_change_that_does_not_follow_of_a_session_that_is_gone_is_its_deletion() -> None:
    watch, store = watching(prefix=""), Store()
    store.run(watch.received(response(b"1", append("a", 0, 1, 0, 1))))
    given(watch)
    store.run(watch.received(response(b"2", append("a", 6, 7, 2, 3), deleted("a", 7, 8))))
    assert given(watch) == [("a", 0, "deleted", [])]


def test_a_step_that_fails_changes_nothing() -> None:
    watch, store = watching(prefix=""), Store(a=(9, [1, 2, 3]))
    store.run(watch.received(response(b"1", append("a", 0, 1, 0, 1))))
    given(watch)
    twice = response(b"2", append("b", 0, 2, 0, 5), append("a", 6, 7, 2, 3))
    step = watch.received(twice)
    next(step)
    step.close()  # as if the task was cancelled during the read
    assert (list(watch.events), watch.cursor) == ([], b"1")
    store.run(watch.received(twice))
    assert given(watch) == [("b", 2, "changed", [5]), ("a", 9, "whole", [1, 2, 3])]


def test_an_expired_cursor_is_made_good_with_what_differs() -> None:
    store = Store(a=(1, [1]), b=(2, [1, 2]), c=(3, [3]))
    watch = watching(prefix="")
    events = append("a", 0, 1, 0, 1), append("b", 0, 1, 0, 1), append("d", 0, 4, 0, 1)
    store.run(watch.received(response(b"1", *events)))
    given(watch)
    assert watch.failed(expired()) == 0
    assert (watch.reads, watch.cursor) == (True, b"1")
    read_all(watch, store)
    assert given(watch) == [("b", 2, "whole", [1, 2]), ("c", 3, "whole", [3]), ("d", 0, "deleted", [])]
    assert store.reads == ["list ''", "b", "list '' b", "c"]
    assert watch.request() == pb.WatchRequest(cursor=b"list")
    # What happened between the cursor and the reads comes again.
    again = deleted("d", 4, 5), append("c", 0, 3, 0, 3), append("d", 0, 6, 0, 2)
    store.run(watch.received(response(b"2", *again)))
    assert given(watch) == [("d", 6, "changed", [2])]


def test_what_was_before_a_deletion_that_was_read_is_not_given() -> None:
    watch, store = watching(prefix=""), Store()
    store.run(watch.received(response(b"1", append("a", 0, 1, 0, 1))))
    watch.failed(expired())
    read_all(watch, store)
    store.run(watch.received(response(b"2", append("a", 1, 2, 1, 2), deleted("a", 2, 3))))
    assert given(watch) == [("a", 1, "changed", [1]), ("a", 0, "deleted", [])]


def test_another_store_means_something_else_by_its_revisions() -> None:
    watch, store = watching(prefix=""), Store(a=(1, [7]))
    store.run(watch.received(response(b"1", append("a", 0, 1, 0, 1))))
    given(watch)
    watch.failed(expired("CURSOR_INVALID"))
    read_all(watch, store)
    assert given(watch) == [("a", 1, "whole", [7])]


def test_one_who_says_what_they_hold_gets_what_differs_first() -> None:
    store = Store(a=(1, [1]), b=(2, [2]))
    watch = watching(prefix="", known={"a": 1, "c": 5})
    assert (watch.reads, watch.cursor) == (True, b"")
    read_all(watch, store)
    assert given(watch) == [("b", 2, "whole", [2]), ("c", 0, "deleted", [])]
    assert watch.cursor == b"list"


def test_named_sessions_are_read_one_by_one() -> None:
    store = Store(a=(1, [1]), ab=(2, [2]))
    watch = watching(keys=["a", "x", "a"], known={})
    read_all(watch, store)
    assert given(watch) == [("a", 1, "whole", [1])]
    assert store.reads == ["list 'a'", "a", "x"]
    assert watch.request() == pb.WatchRequest(keys=["a", "x"], cursor=b"list")
    store.run(watch.received(response(b"1")))
    del store.sessions["a"]
    watch.failed(expired())
    read_all(watch, store)
    assert given(watch) == [("a", 0, "deleted", [])]


def test_a_watch_that_does_not_know_what_its_reader_holds_says_so() -> None:
    watch = watching(prefix="", cursor=b"old")
    with pytest.raises(CursorExpiredError, match="known="):
        watch.failed(expired())
    with pytest.raises(CursorExpiredError):
        watching(prefix="", cursor=b"")
    known = watching(prefix="", cursor=b"old", known={"a": 1})
    assert known.request().cursor == b"old"
    assert known.failed(expired()) == 0
    named = watching(keys=["a"], cursor=b"old")
    named.failed(expired())
    read_all(named, Store())
    assert given(named) == [("a", 0, "deleted", [])]


def test_a_watch_of_more_than_it_remembers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_watching, "REMEMBERED_MAX", 2)
    watch, store = watching(prefix=""), Store()
    store.run(watch.received(response(b"1", *(append(key, 0, 1, 0, 1) for key in "abc"))))
    assert len(given(watch)) == 3
    with pytest.raises(CursorExpiredError):
        watch.failed(expired())


def test_what_passes_is_waited_for_longer_each_time_and_the_rest_is_raised() -> None:
    watch = watching(prefix="")
    delays = [watch.failed(error_for("SHUTTING_DOWN", "as told")) for _ in range(12)]
    assert all(0 < delay <= 2 for delay in delays)
    assert delays[-1] >= 1 > delays[0]
    store = Store()
    store.run(watch.received(response(b"1")))
    assert watch.failed(error_for("WATCHER_TOO_SLOW", "as told")) == 0
    assert watch.failed(error_for("WATCHER_TOO_SLOW", "as told")) > 0
    with pytest.raises(InvalidArgumentError):
        watch.failed(error_for("KEY_INVALID", "as told"))


def test_leases_and_expiry_are_told() -> None:
    watch, store = watching(prefix=""), Store()
    lease = pb.Lease(key="a", holder="me", fencing_token=7, mode=pb.LEASE_MODE_APPENDS_ALLOWED)
    events = [pb.WatchEvent(key="a", revision=0, lease=pb.LeaseChanged(lease=lease, ended=ended))
              for ended in (False, True)]  # fmt: skip
    store.run(watch.received(response(b"1", *events, deleted("a", 3, 4, expired=True))))
    taken, ended, gone = watch.pop(), watch.pop(), watch.pop()
    assert (taken.holder, taken.fencing_token, taken.allows_appends, taken.ended) == ("me", 7, True, False)
    assert (ended.ended, ended.cursor) == (True, b"")
    assert (gone.expired, gone.cursor) == (True, b"1")


@pytest.mark.parametrize("wrong", [
    {"keys": "a"}, {"keys": []}, {"keys": ["a"], "prefix": "a"}, {"cursor": "text"}, {"keys": [1]},
    {"prefix": 3}, {"known": {"a": "1"}}, {"known": {1: 1}},
])  # fmt: skip
def test_what_cannot_be_watched_is_refused_before_anything_is_sent(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        watching(**wrong)


def test_blocks_are_lines() -> None:
    assert lines_of(block(1, 2)) == [b'{"n": 1}', b'{"n": 2}']

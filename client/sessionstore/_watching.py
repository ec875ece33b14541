"""A watch: which events its reader gets, whatever happens to the stream. Sans-IO.

The daemon's stream ends when the daemon restarts, when a connection breaks, when its reader is too slow, and
when the daemon no longer keeps what came right after the cursor. A watch goes on through all that. The rules:

* Whoever applies the events, in their order, ends with the sessions as they are stored.
* An event is given at most once. What is not above the revision that was given last of its key is left out;
  a change in several parts is joined before it is given.
* A change that does not follow what was given last is not given. The session is read, and given whole.
* If the cursor is of no use any more, the watch *resynchronises*: it lists what there is, gives what differs
  from what was given last as a whole, and the deletion of what is gone; then it goes on from the cursor that
  came with the listing, which was taken before it. For that it remembers the revision of every key that it
  told of, or that its reader said to hold.
* It remembers so many keys and no more. With more, or with a reader who did not say what it holds, a watch
  that would have to resynchronise raises CursorExpiredError: it cannot tell what is gone.
* `cursor` is behind what the reader has got, never behind what only waits here.

A step either comes to its end or changes nothing: so a reader may be interrupted or cancelled at any time,
and a step that was is made again. This module knows no clock, no thread, no event loop and no grpc.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import random

from sessionstore import _operations as ops
from sessionstore._events import LeaseChanged, SessionChanged, SessionDeleted, WatchEvent
from sessionstore._operations import Held, Operation, Tail, pb
from sessionstore.errors import SessionStoreError, error_for

REMEMBERED_MAX = 100_000
"""Of so many keys a watch remembers the revision."""
_GONE_MAX = 10_000
_OTHER = -1
"""No session has this revision."""
_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 2.0

# The stream ended, and another one goes on where it ended.
_BROKEN = frozenset({
    "SHUTTING_DOWN", "OVERLOADED", "OUTCOME_UNKNOWN", "NOT_CONNECTED", "GRPC_UNAVAILABLE", "GRPC_CANCELLED",
    "GRPC_UNKNOWN", "GRPC_INTERNAL", "GRPC_RESOURCE_EXHAUSTED", "GRPC_DEADLINE_EXCEEDED", "WATCHER_TOO_SLOW",
    "EXPIRED_IN_QUEUE",
})  # fmt: skip
_CURSOR = frozenset({"CURSOR_EXPIRED", "CURSOR_INVALID"})


class _Resync:
    """Reading anew: where it stands."""

    def __init__(self, prefix: str | None, keys: tuple[str, ...], given: Mapping[str, int]) -> None:
        # One page of one head, for its cursor, if keys are named: a session that is not there has none.
        name, size = (prefix, 1000) if prefix is not None else (keys[0], 1)
        self.listing = ops.Listing.begin(name, "key", size, None)
        self.cursor: bytes | None = None
        self.unread = deque(keys)
        self.unlisted = dict.fromkeys(given) if prefix is not None else {}


class Watching:
    """One watch. ``events`` are those that wait for the reader; drivers take them with `pop`.

    Args:
        prefix: of the keys; None if they are named.
        keys: the named ones.
        cursor: where to begin; None: at what is there when the watch comes into force.
        known: what the reader holds: key -> revision. None: nothing, or nobody knows if there is a cursor.

    """

    def __init__(
        self,
        prefix: str | None,
        keys: Iterable[str] | None,
        cursor: bytes | None,
        known: Mapping[str, int] | None,
    ) -> None:
        if isinstance(keys, str):
            raise ops.invalid("keys", "must be a list of keys, not one key: put it in a list")
        named = tuple(dict.fromkeys(ops.text("keys", key, "KEY_INVALID") for key in keys or ()))
        if keys is not None and (prefix is not None or not named):
            raise ops.invalid("keys", "must be at least one key, without a prefix: give one of the two")
        if cursor is not None and not isinstance(cursor, bytes):
            raise ops.invalid("cursor", f"must be bytes, not {type(cursor).__name__}")
        self._keys = named
        self._prefix = None if named else ops.text("prefix", prefix or "")
        self._cursor = cursor or b""
        self.events: deque[WatchEvent] = deque()
        self.in_force = False
        self._given: OrderedDict[str, int] = OrderedDict()
        self._gone: OrderedDict[str, int] = OrderedDict()
        """Keys of sessions that are known to be gone, and the revision of the removal; 0: not known."""
        self._parts: dict[str, tuple[pb.WatchEvent, ...]] = {}
        self._failures = 0
        self._resync: _Resync | None = None
        self._told = self._cursor
        for key, revision in (known or {}).items():
            self._remember(self._given, ops.text("known", key), ops.integer("known", revision))
        # Whether all is known that the reader can hold.
        self._complete = known is not None or cursor is None
        if (known is not None and not cursor) or cursor == b"":
            self._begin_resync(error_for("CURSOR_EXPIRED", "there is no cursor to go on from"))

    @property
    def cursor(self) -> bytes:
        """Where a watch goes on after what the reader has got; empty if there is no such place yet."""
        return self._told if self.events or self._resync else self._cursor

    def pop(self) -> WatchEvent:
        """The next event."""
        event = self.events.popleft()
        self._told = event.cursor
        return event

    # ------------------------------------------------------------------------------------ the stream

    def request(self) -> pb.WatchRequest:
        """The first and only request of the next stream."""
        self._parts = {}
        return pb.WatchRequest(prefix=self._prefix or "", keys=self._keys, cursor=self._cursor)

    def received(self, response: pb.WatchResponse) -> Operation[None]:
        """Take a response."""
        stage = _Stage(self)
        for event in response.events:
            yield from stage.take(event)
        stage.commit(response.cursor)
        self.in_force, self._failures = True, 0

    def failed(self, error: SessionStoreError) -> float:
        """What follows the end of a stream, or a failed read: seconds to wait before the next step.

        Raises the error if it is none that passes.
        """
        if error.reason in _CURSOR:
            if error.reason == "CURSOR_INVALID":  # another store: its revisions mean something else
                self._given = OrderedDict.fromkeys(self._given, _OTHER)
                self._gone.clear()
            self._begin_resync(error)
        elif error.reason not in _BROKEN:
            raise error
        self._failures += 1
        if self._failures == 1 and error.reason in _CURSOR | {"WATCHER_TOO_SLOW"}:
            return 0.0
        delay_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2.0 ** min(self._failures - 1, 10))
        return delay_s * (0.5 + random() / 2)

    # ------------------------------------------------------------------------------------ reading anew

    @property
    def reads(self) -> bool:
        """Whether the next step is `read_on`; else it is one of a stream."""
        return self._resync is not None

    def read_on(self) -> Operation[None]:
        """Read a page, or a session, of what is read anew."""
        resync = self._resync
        assert resync is not None
        if resync.cursor is None or (self._prefix is not None and resync.listing.more and not resync.unread):
            yield from self._list(resync)
        elif resync.unread:
            key = resync.unread[0]
            tail = yield from ops.read(Held(key))
            resync.unread.popleft()
            if tail is None:
                self._tell_gone(key)
            elif tail.head.revision != self._given.get(key):
                self.events.append(whole(tail, max(0, self._given.get(key, 0)), self._cursor))
                self._exists(key, tail.head.revision)
        else:
            for key in resync.unlisted:
                self._tell_gone(key)
            self._cursor, self._resync = resync.cursor, None
        self._failures = 0

    def _list(self, resync: _Resync) -> Operation[None]:
        heads = yield from resync.listing.page()
        if resync.cursor is None:
            resync.cursor = resync.listing.cursor
        if self._prefix is None:
            return
        for head in heads:
            resync.unlisted.pop(head.key, None)
            if self._given.get(head.key) != head.revision:
                resync.unread.append(head.key)

    def _begin_resync(self, cause: SessionStoreError) -> None:
        if not self._complete and self._prefix is not None:
            text = (
                f"the watch cannot go on from its cursor ({cause}), and it is not known which sessions its "
                "reader holds. List the sessions, and watch with known={key: revision, ...}."
            )
            raise error_for("CURSOR_EXPIRED", text) from cause
        self._parts = {}
        if not self.events:
            self._told = self._cursor
        self._resync = _Resync(self._prefix, self._keys, self._given)

    # ------------------------------------------------------------------------------------ what was given

    def _exists(self, key: str, revision: int) -> None:
        self._gone.pop(key, None)
        self._remember(self._given, key, revision)

    def _tell_gone(self, key: str) -> None:
        """Tell that a session is not there, unless that is known."""
        before = self._given.pop(key, None)
        unsure = self._keys and (self.in_force or not self._complete) and key not in self._gone
        if before is not None or unsure:
            self.events.append(SessionDeleted(key, 0, max(0, before or 0), self._cursor))
        self._is_gone(key, 0)

    def _is_gone(self, key: str, revision: int) -> None:
        self._given.pop(key, None)
        self._gone[key] = revision
        self._gone.move_to_end(key)
        if len(self._gone) > _GONE_MAX:
            self._gone.popitem(last=False)

    def _remember(self, given: OrderedDict[str, int], key: str, revision: int) -> None:
        given[key] = revision
        if len(given) > REMEMBERED_MAX:
            given.popitem(last=False)
            self._complete = False


class _Stage:
    """What a response comes to, until all of it is known."""

    def __init__(self, watching: Watching) -> None:
        self._of = watching
        self._events: list[WatchEvent] = []
        # Key -> (revision, whether the session exists), for what the response says.
        self._now: dict[str, tuple[int, bool]] = {}
        self._parts = dict(watching._parts)

    def take(self, event: pb.WatchEvent) -> Operation[None]:
        """Take one event, or one part."""
        kind = event.WhichOneof("change")
        if kind == "lease":
            self._events.append(lease_changed(event))
        elif kind == "deleted":
            self._delete(event)
        elif kind == "changed":
            yield from self._change(event)

    def _state(self, key: str) -> tuple[int | None, bool]:
        """The revision given last of a key, None if nothing is known, and whether the session exists."""
        if key in self._now:
            return self._now[key]
        if key in self._of._given:
            return self._of._given[key], True
        return self._of._gone.get(key), False

    def _delete(self, event: pb.WatchEvent) -> None:
        known, exists = self._state(event.key)
        self._parts.pop(event.key, None)
        # One that is known to be gone, without a revision, was told of by reading anew.
        if known is not None and (event.revision <= known or not (exists or known)):
            return
        self._now[event.key] = event.revision, False
        expired = event.deleted.expired
        self._events.append(
            SessionDeleted(event.key, event.revision, event.previous_revision, b"", expired)
        )

    def _change(self, event: pb.WatchEvent) -> Operation[None]:
        key = event.key
        known, exists = self._state(key)
        if known is not None and event.revision <= known:
            self._parts.pop(key, None)
            return
        earlier = self._parts.get(key, ())
        anew = event.changed.whole and not event.changed.start
        if earlier and (anew or earlier[0].revision != event.revision):
            earlier = ()
        parts = (*earlier, event)
        if event.changed.partial:
            self._parts[key] = parts
            return
        self._parts.pop(key, None)
        follows = known is None or parts[0].previous_revision == (known if exists else 0)
        if not parts[0].changed.whole and not follows:
            yield from self._read(key)
            return
        self._now[key] = event.revision, True
        self._events.append(changed(parts))

    def _read(self, key: str) -> Operation[None]:
        """Give a session whole, because what came does not follow what was given."""
        tail = yield from ops.read(Held(key))
        known, exists = self._state(key)
        if tail is None:
            if exists:
                self._events.append(SessionDeleted(key, 0, known or 0, b""))
            self._now[key] = 0, False
        elif known is None or tail.head.revision > known:
            self._events.append(whole(tail, known or 0, b""))
            self._now[key] = tail.head.revision, True

    def commit(self, cursor: bytes) -> None:
        """Give it. Only with the last event all of the response is given."""
        of = self._of
        if not of.events:
            of._told = of._cursor
        for number, event in enumerate(self._events, 1):
            of.events.append(replace(event, cursor=cursor if number == len(self._events) else of._cursor))
        for key, (revision, exists) in self._now.items():
            if exists:
                of._exists(key, revision)
            else:
                of._is_gone(key, revision)
        of._cursor, of._parts = cursor, self._parts


# ------------------------------------------------------------------------------------------ values


def whole(tail: Tail, previous_revision: int, cursor: bytes) -> SessionChanged:
    """A session as it was read."""
    head = tail.head
    messages = [ops.decode(line) for line in tail.lines]
    return SessionChanged(head.key, head.revision, previous_revision, head, 0, 0, messages, cursor, True)


def changed(parts: tuple[pb.WatchEvent, ...]) -> SessionChanged:
    """A change of one part or several, joined."""
    first, last = parts[0].changed, parts[-1]
    lines = [line for part in parts for line in ops.lines_of(part.changed.messages)]
    return SessionChanged(
        key=last.key,
        revision=last.revision,
        previous_revision=parts[0].previous_revision,
        head=ops.head_of(last.changed.session),
        start=first.start,
        delete_count=sum(part.changed.delete_count for part in parts),
        messages=[ops.decode(line) for line in lines],
        cursor=b"",
        whole=first.whole,
        source_key=first.source_key,
    )


def lease_changed(event: pb.WatchEvent) -> LeaseChanged:
    """What became of a lease."""
    lease = event.lease.lease
    return LeaseChanged(
        key=event.key,
        revision=event.revision,
        holder=lease.holder,
        fencing_token=lease.fencing_token,
        allows_appends=lease.mode == pb.LEASE_MODE_APPENDS_ALLOWED,
        ttl=lease.ttl.ToTimedelta(),
        remaining=lease.remaining.ToTimedelta(),
        acquire_time=ops.moment(lease.acquire_time),
        ended=event.lease.ended,
        cursor=b"",
    )

"""The near cache: sessions that are read again and again, kept in step by one Watch stream. Sans-IO.

A session that was read is watched from the cursor that came with it. The rules:

* What is kept is a `Snapshot`, of one revision, private and immutable. Who reads gets it as it is then;
  nothing that a reader holds is changed by the stream.
* A snapshot is *in step* as of a moment if everything that was acknowledged to anybody before is in it. The
  stream proves that: each request on it is numbered, and the daemon tells up to which of them it has given
  all that happened. What it tells is true as of when that request was sent; so requests are sent now and then
  also if there is nothing to ask for.
* What is not proven for longer than the staleness bound is not served: the read goes to the daemon.
* What this client wrote is applied as soon as it is acknowledged. Where that is not possible, because others
  wrote in between, the session is not served until the stream has brought the write. So a client always sees
  its own writes, and never goes back behind what one of its reads has shown, also if that was that there is
  no such session.
* The end of a session is no event before the daemon has removed it, some time later. So a session whose time
  is over, by this machine's clock, is not served.
* A change that does not follow what is held, or does not fit it, drops the session: the next read reads all
  of it. So does a cursor that is of no use any more, for all sessions.
* Bounded in bytes and in sessions; the least recently used goes first.

Whoever calls from a signal handler, while the interrupted thread changes something here, gets nothing, and
the sessions that it wrote to are dropped. This module knows a clock as a function, and no thread, event loop
or grpc.
"""

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf
from random import random
from typing import Any

from sessionstore import _operations as ops
from sessionstore._expiry import over
from sessionstore._operations import Operation, Rpc, Tail, pb
from sessionstore._snapshot import Snapshot, absent, advanced, applied, effect_of, joined
from sessionstore._types import Head
from sessionstore.errors import NotFoundError

DEFAULT_SESSIONS = 1024
DEFAULT_STALENESS_S = 10.0
_STALENESS_MIN_S, _STALENESS_MAX_S = 0.1, 3600.0
_LINE_BYTES = 64
"""What a line takes beside its bytes, about."""
_ENTRY_BYTES = 2048
"""What a session takes beside its lines and its metadata, about."""
_KEYS_PER_REQUEST = 1000
_UNANSWERED_MAX = 16
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 5.0
_CURSOR = frozenset({"CURSOR_EXPIRED", "CURSOR_INVALID"})


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept near, and how stale it may be. Raises InvalidArgumentError for what makes no sense."""

    bytes_max: int = 0
    """Of all sessions together; 0: nothing is kept."""
    sessions_max: int = DEFAULT_SESSIONS
    staleness_s: float = DEFAULT_STALENESS_S

    def __post_init__(self) -> None:
        for name, value in (("near_cache_bytes", self.bytes_max), ("near_cache_sessions", self.sessions_max)):
            if ops.integer(name, value) < 0:
                raise ops.invalid(name, f"must be 0 or more, not {value}")
        if not isinstance(self.staleness_s, int | float) or not (
            _STALENESS_MIN_S <= self.staleness_s <= _STALENESS_MAX_S
        ):
            raise ops.invalid(
                "near_cache_staleness",
                f"must be {_STALENESS_MIN_S:g} to {_STALENESS_MAX_S:g} seconds, not {self.staleness_s!r}",
            )


@dataclass(slots=True, eq=False)
class _Entry:
    """A session that is kept."""

    snapshot: Snapshot
    cursor: bytes
    """Where a watch of it goes on."""
    read_s: float
    """As of when its last read proves it; -inf if `Mirror.marks` grew during the read."""
    size: int = 0
    number: int = 0
    """Of the request of this stream that named it; 0: none yet."""
    floor: int = 0
    """What is below this revision is not served."""
    parts: list[pb.WatchEvent] = field(default_factory=list)


class Mirror:
    """The sessions that one client keeps near.

    Args:
        bounds: of memory, and of staleness.
        clock: seconds on a clock that never jumps and also counts while the machine sleeps.
        guard: the lock that is held around every change of a snapshot.

    """

    def __init__(
        self, bounds: Bounds, clock: Callable[[], float], guard: AbstractContextManager[bool]
    ) -> None:
        self.on = bounds.bytes_max > 0 and bounds.sessions_max > 0
        self.wake: Callable[[], None] = lambda: None
        """Called when there is something to send."""
        self.marks = 0
        """Grows with each own write that is acknowledged, and with each session that is let go of: who reads
        meanwhile may get an answer from before."""
        self._bounds = bounds
        self._interval_s = bounds.staleness_s / 2
        self.clock = clock
        self._guard = guard
        self._busy = False
        self._doubtful: deque[str] = deque()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._failures = 0
        self._begin()

    # ------------------------------------------------------------------------------------ readers

    def near(self, key: str) -> Snapshot | None:
        """The session, if it is kept and in step as of no longer ago than the bound; else None: read it."""
        if not self.on:
            return None
        with self._guard:
            if self._busy:
                return None
            if self._doubtful:
                self._drop_doubtful()
            entry = self._entries.get(key)
            if entry is None or entry.snapshot.seen < entry.floor:
                return None
            if self.clock() - self._as_of(entry) > self._bounds.staleness_s or _ended(entry.snapshot):
                return None
            self._entries.move_to_end(key)
            return entry.snapshot

    def as_of_s(self, key: str, revision: int) -> float:
        """As of when this revision is known to be what is stored; -inf if nothing is known of it."""
        with self._guard:
            entry = self._entries.get(key)
            if self._busy or entry is None or entry.snapshot.revision != revision or _ended(entry.snapshot):
                return -inf
            return self._as_of(entry) if entry.snapshot.seen >= entry.floor else -inf

    def _as_of(self, entry: _Entry) -> float:
        proven = 0 < entry.number <= self._answered
        return max(entry.read_s, self._proof_s) if proven else entry.read_s

    def offer(self, snapshot: Snapshot, cursor: bytes, marks: int) -> None:
        """Keep what was read.

        Args:
            snapshot: all of it.
            cursor: came with the read; empty if the daemon gives none, and then nothing is kept.
            marks: what `marks` was before the read.

        """
        if not self.on or not cursor:
            return
        with self._alone() as alone:
            if not alone:
                return
            read_s = snapshot.as_of_s if marks == self.marks else -inf
            entry = self._entries.get(snapshot.key)
            if entry is None:
                entry = self._entries[snapshot.key] = _Entry(snapshot, cursor, read_s)
                self._resize(entry, _size(snapshot))
            elif snapshot.seen < entry.snapshot.seen:
                return
            else:
                entry.read_s = max(entry.read_s, read_s)
                if snapshot.seen > entry.snapshot.seen:
                    self._resize(entry, _size(snapshot) - entry.size)
                    entry.snapshot = snapshot
                if not entry.number:
                    entry.cursor = cursor
            self._entries.move_to_end(snapshot.key)
            self._evict()
            if not entry.number and snapshot.key in self._entries:
                self._unnamed[snapshot.key] = None
                self.wake()

    def heard(self, rpc: Rpc, reply: Any) -> None:
        """Take the answer of an own call into account, before its caller has it."""
        if not self.on or rpc.method is ops.ACQUIRE:  # which changes no session
            return
        if rpc.method is ops.LIST:
            for session in reply.sessions:
                self.shown(session.key, session.revision)
            return
        if rpc.method.mutates:
            self.marks += 1
        elif rpc.method is not ops.GET:
            return
        key: str = rpc.request.key  # type: ignore[attr-defined]
        with self._alone() as alone:
            if not alone:
                self._doubtful.append(key)
                return
            entry = self._entries.get(key)
            if entry is None:
                return
            if rpc.method is ops.GET:
                entry.floor = max(entry.floor, reply.session.revision)
            elif reply.result.revision > entry.snapshot.seen:
                self._wrote(entry, rpc, reply)

    def shown(self, key: str, revision: int) -> None:
        """A listing or a watch has shown a session at this revision; 0: gone, nobody knows when."""
        if not self.on:
            return
        with self._alone() as alone:
            entry = self._entries.get(key)
            if not alone:
                self._doubtful.append(key)
            elif entry is None:
                self.marks += 1
            elif revision:
                entry.floor = max(entry.floor, revision)
            else:
                self._drop(key)

    def missed(self, rpc: Rpc, error: BaseException) -> None:
        """Take into account, before its caller knows it, that an own call found no session."""
        if not self.on or not isinstance(error, NotFoundError) or error.reason != "SESSION_NOT_FOUND":
            return
        self.marks += 1
        key: str = error.metadata.get("key", "")
        with self._alone() as alone:
            if alone:
                self._drop(key)
            else:
                self._doubtful.append(key)

    def _wrote(self, entry: _Entry, rpc: Rpc, reply: Any) -> None:
        before, result = entry.snapshot, reply.result
        effect = None
        if result.previous_revision == before.revision:
            if rpc.method is ops.DELETE:
                self._resize(entry, _ENTRY_BYTES - entry.size)
                entry.snapshot = absent(before.key, result.revision, before.as_of_s)
                return
            effect = effect_of(before, rpc.request, reply)
        if effect is None:
            entry.floor = max(entry.floor, result.revision)
            return
        removed = before.lines.since(effect.start)[: effect.delete_count]
        growth = _lines_size(effect.lines) - _lines_size(removed)
        self._put(entry, advanced(before, result, effect), growth)
        self._evict()

    # ------------------------------------------------------------------------------------ the stream

    def _begin(self) -> None:
        """Number the requests of a new stream from 1 on."""
        self._unnamed: dict[str, None] = dict.fromkeys(self._entries)
        self._removed: list[str] = []
        self._sent = 0
        self._sent_s = -inf
        self._asked: deque[tuple[int, float]] = deque()
        self._answered = 0
        self._proof_s = -inf
        self._cursor = b""

    def open(self) -> bool:
        """Begin a new stream; False if there is nothing to watch."""
        with self._alone() as alone:
            if not alone or not self._entries:
                return False
            for entry in self._entries.values():
                entry.number, entry.parts = 0, []
            self._begin()
            return True

    def take(self) -> pb.WatchRequest | float:
        """The next request to send; or for how many seconds at the most there is none."""
        with self._alone() as alone:
            if not alone:
                return self._interval_s
            request = self._next_request()
            if request is None:
                left_s = self._sent_s + self._interval_s - self.clock()
                if left_s > 0 or not self._sent or len(self._asked) >= _UNANSWERED_MAX:
                    return max(0.01, left_s) if self._sent else self._interval_s
                request = pb.WatchRequest()
            if not self._sent:
                request.progress_interval.FromTimedelta(timedelta(hours=1))
            self._sent += 1
            self._sent_s = self.clock()
            self._asked.append((self._sent, self._sent_s))
            for key in request.keys:
                self._entries[key].number = self._sent
            return request

    def _next_request(self) -> pb.WatchRequest | None:
        """A request that names sessions, or no longer does."""
        if self._removed and self._sent:
            request = pb.WatchRequest(removed_keys=self._removed)
            self._removed = []
            return request
        keys: list[str] = []
        cursor = b""
        for key in self._unnamed:
            entry = self._entries[key]
            if keys and (entry.cursor != cursor or len(keys) == _KEYS_PER_REQUEST):
                break
            keys.append(key)
            cursor = entry.cursor
        for key in keys:
            del self._unnamed[key]
        return pb.WatchRequest(keys=keys, cursor=cursor) if keys else None

    def received(self, response: pb.WatchResponse) -> None:
        """Take a response."""
        with self._alone():  # a thread of its own, or a loop: never interrupted by its own
            for event in response.events:
                entry = self._entries.get(event.key)
                if entry is not None and event.revision > entry.snapshot.seen:
                    self._take(entry, event)
            self._cursor = response.cursor
            while self._asked and self._asked[0][0] <= response.in_step:
                self._answered, self._proof_s = self._asked.popleft()
            self._failures = 0
            self._evict()

    def broke(self, reason: str) -> float:
        """The stream ended, or none could be had; seconds to wait before the next one."""
        with self._alone():
            for key, entry in list(self._entries.items()):
                if reason in _CURSOR:
                    self._drop(key)
                    continue
                entry.read_s = self._as_of(entry)
                if 0 < entry.number <= self._answered:
                    entry.cursor = self._cursor
                entry.number, entry.parts = 0, []
            self._begin()
            self._failures += 1
            delay_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2.0 ** min(self._failures - 1, 10))
            return delay_s * (0.5 + random() / 2)

    def clear(self) -> None:
        """Keep nothing any more."""
        self.on = False
        self._entries.clear()
        self._unnamed.clear()

    def _take(self, entry: _Entry, event: pb.WatchEvent) -> None:
        """Take an event that is above what is held."""
        key, kind = event.key, event.WhichOneof("change")
        if kind == "deleted":
            entry.parts = []
            self._resize(entry, _ENTRY_BYTES - entry.size)
            entry.snapshot = absent(key, event.revision, self._as_of(entry))
        elif kind == "changed":
            anew = event.changed.whole and not event.changed.start
            if entry.parts and (anew or entry.parts[0].revision != event.revision):
                entry.parts = []
            entry.parts.append(event)
            if event.changed.partial:
                if sum(len(part.changed.messages) for part in entry.parts) > self._bounds.bytes_max:
                    self._drop(key)
                return
            parts, entry.parts = entry.parts, []
            snapshot = applied(entry.snapshot, parts)
            if snapshot is None:
                self._drop(key)
            elif parts[0].changed.whole:
                self._resize(entry, _size(snapshot) - entry.size)
                entry.snapshot = snapshot
            else:
                first = parts[0].changed
                removed = entry.snapshot.lines.since(first.start)[: first.delete_count]
                added = snapshot.lines.since(first.start)[: sum(_count(part) for part in parts)]
                self._put(entry, snapshot, _lines_size(added) - _lines_size(removed))

    # ------------------------------------------------------------------------------------ what is kept

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold it against other threads; False if this very thread was interrupted changing it."""
        with self._guard:
            if self._busy:
                yield False
                return
            self._busy = True
            try:
                if self._doubtful:
                    self._drop_doubtful()
                yield True
            finally:
                self._busy = False

    def _drop_doubtful(self) -> None:
        while self._doubtful:
            self._drop(self._doubtful.popleft())

    def _put(self, entry: _Entry, snapshot: Snapshot, growth: int) -> None:
        old, new = entry.snapshot.head, snapshot.head
        if old is not None and new is not None and old.metadata != new.metadata:
            growth += _metadata_size(new) - _metadata_size(old)
        entry.snapshot = snapshot
        self._resize(entry, growth)

    def _resize(self, entry: _Entry, growth: int) -> None:
        entry.size += growth
        self._bytes += growth

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.marks += 1
        self._bytes -= entry.size
        self._unnamed.pop(key, None)
        if entry.number:
            self._removed.append(key)
            self.wake()

    def _evict(self) -> None:
        bounds = self._bounds
        while self._entries and (self._bytes > bounds.bytes_max or len(self._entries) > bounds.sessions_max):
            self._drop(next(iter(self._entries)))


# ------------------------------------------------------------------------------------------ reading


def read(mirror: Mirror, before: Snapshot) -> Operation[tuple[Tail | None, Snapshot]]:
    """Read what is not held of a session, and keep it near: what was read, and the session as it then is."""
    marks, as_of_s = mirror.marks, mirror.clock()
    tail = yield from ops.read(before.held)
    if tail is None:
        return None, absent(before.key, before.seen, as_of_s)
    snapshot = joined(before, tail, as_of_s)
    mirror.offer(snapshot, tail.cursor, marks)
    return tail, snapshot


def all_of(snapshot: Snapshot) -> Tail | None:
    """A snapshot as a read of the whole session gives it."""
    return None if snapshot.head is None else Tail(snapshot.head, 0, snapshot.lines.since(0))


# ------------------------------------------------------------------------------------------ values


def _ended(snapshot: Snapshot) -> bool:
    return snapshot.head is not None and over(snapshot.head.expire_time)


def _count(part: pb.WatchEvent) -> int:
    return len(ops.lines_of(part.changed.messages))


def _lines_size(lines: Sequence[bytes]) -> int:
    return sum(map(len, lines)) + _LINE_BYTES * len(lines)


def _size(snapshot: Snapshot) -> int:
    metadata = _metadata_size(snapshot.head) if snapshot.head else 0
    return _ENTRY_BYTES + metadata + _lines_size(snapshot.lines.since(0))


def _metadata_size(head: Head) -> int:
    return len(json.dumps(head.metadata))

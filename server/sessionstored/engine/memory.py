"""The memory engine: the simplest store that keeps the contract, but for durability.

It is the oracle of the conformance suite and of the history checker, and a store for tests of one's own code.
Nothing survives the process. Everything happens in one step on the event loop, so nothing here waits or
locks.
"""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

from sessionstored.engine import BackupItem, Order, Page, Query, Refused, Reply, Request, Slice
from sessionstored.engine.events import Deleted, Event, changed, lease_told
from sessionstored.engine.feed import DEFAULT_FEED_LIMITS, Feed, FeedLimits, Old, cursor_expired
from sessionstored.engine.leasing import LeaseBook
from sessionstored.engine.settle import expired_in_queue, settle
from sessionstored.engine.watcher import Watcher
from sessionstored.leases import Lease, LeaseEvent
from sessionstored.rules import DEFAULT_LIMITS, Change, Fork, Head, Limits, Refusal, ends, expired, not_found
from sessionstored.trusted import Disbelief, TrustedClock
from sessionstored.windows import CallWindow, Remembered


class MemoryEngine:
    """Sessions in a dict."""

    name = "memory"
    durability = "none"

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        *,
        feed_limits: FeedLimits = DEFAULT_FEED_LIMITS,
        wall_ns: Callable[[], int] = time.time_ns,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty store.

        Args:
            limits: the bounds in force.
            feed_limits: those of the feed.
            wall_ns: the clock that dates sessions, nanoseconds since the epoch; it may jump.
            clock_s: the clock that ages windows, in seconds; it never jumps.

        """
        self.store_id = str(uuid.uuid4())
        self._limits = limits
        self._wall_ns = wall_ns
        self._clock_s = clock_s
        self._trusted = TrustedClock(
            lambda: wall_ns() // 1000,
            lambda: int(clock_s() * 1e6),
            jump_us_max=int(limits.expiry_jump_max_s * 1e6),
            confirm_us=int(limits.expiry_confirm_s * 1e6),
        )
        self.trusted_us = self._trusted.now_us()
        self._next_end_us = 0
        """When the next session ends by itself, if any does; 0 if none."""
        self._heads: dict[str, Head] = {}
        self._lines: dict[str, list[bytes]] = {}
        self._windows: dict[str, CallWindow] = {}
        # Both in the order of last contact, so that what is too old is found at the front.
        self._requests: dict[str, dict[str, tuple[float, Remembered]]] = {}
        self._leases = LeaseBook()
        self._revision = 0
        self._closed = False
        self.feed = Feed(self.store_id, 0, self, feed_limits)
        self._kept: deque[tuple[float, Event, int]] = deque()
        """(time, event, size) of what can be replayed; one position each, the last is the feed's."""
        self._kept_bytes = 0

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        """Decide and apply requests in order."""
        if self._closed:
            raise Refused(Refusal("SHUTTING_DOWN", "the daemon is stopping; nothing was stored"))
        return [self._apply(request) for request in requests]

    def _apply(self, request: Request) -> Reply:
        self.trusted_us = self._trusted.now_us()
        late = request.deadline_s is not None and time.monotonic() > request.deadline_s
        settled = settle(
            request,
            self,
            revision=self._revision + 1,
            now_us=self._wall_ns() // 1000,
            clock_s=self._clock_s(),
            limits=self._limits,
            obstacle=expired_in_queue() if late else None,
        )
        if settled.expired:
            self._revision += 1
            self._drop(request.mutation.key, expired=True)
        if settled.change is not None:
            self._revision += 1
            self._store(request, settled.change)
        self._forget()
        self._sweep()
        return settled.reply

    def _store(self, request: Request, change: Change) -> None:
        key = request.mutation.key
        before = self._heads.get(key)
        previous = before.revision if before else 0
        if change.head is None:
            return self._drop(key)
        self._heads[key] = change.head
        if ends_us := ends(change.head, self._limits):
            self._next_end_us = min(ends_us, self._next_end_us or ends_us)
        lines = self._lines.setdefault(key, [])
        lines[change.start : change.start + change.delete_count] = change.messages
        source_key = ""
        if isinstance(request.mutation, Fork):
            source_key = request.mutation.source_key
            lines[:] = self._lines[source_key][: change.head.message_count]
        self._publish(changed(change.head, previous, change, source_key))

    def _publish(self, event: Event) -> None:
        """Keep an event for those who come later, drop what is too old or too much, and tell watchers."""
        limits, now = self.feed.limits, self._clock_s()
        self._kept.append((now, event, event.size))
        self._kept_bytes += event.size
        while self._kept and (
            self._kept[0][0] < now - limits.age_s_max or self._kept_bytes > limits.bytes_max
        ):
            self._kept_bytes -= self._kept.popleft()[2]
        self.feed.publish(self.feed.position + 1, [event])

    def _drop(self, key: str, *, expired: bool = False) -> None:
        previous = self._heads[key].revision
        del self._heads[key], self._lines[key]
        self._publish(Event(key, self._revision, previous, Deleted(expired)))

    def _sweep(self) -> None:
        """Remove expired sessions. Where a lease makes that wait, they are looked at again a second later."""
        if not 0 < self._next_end_us <= self.trusted_us:
            return
        for key in [key for key, head in self._heads.items() if self.expired(head)]:
            self._revision += 1
            self._drop(key, expired=True)
        left = [ends_us for head in self._heads.values() if (ends_us := ends(head, self._limits))]
        self._next_end_us = max(min(left), self.trusted_us + 1_000_000) if left else 0

    def _forget(self) -> None:
        """Drop what is too old: windows of silent clients, and request_ids, those of deleted sessions too."""
        now = self._clock_s()
        while self._windows:
            client_id = next(iter(self._windows))
            if not self._windows[client_id].expired(now, self._limits):
                break
            del self._windows[client_id]
        while self._requests:
            key = next(iter(self._requests))
            newest, _ = self._requests[key][next(reversed(self._requests[key]))]
            if now - newest < self._limits.window_age_max_s:
                break
            del self._requests[key]

    # The view that `settle` decides against.

    def head(self, key: str, damaged: bool = False) -> Head | None:
        """The session's head."""
        return self._heads.get(key)

    def expired(self, head: Head) -> bool:
        """Whether a session has expired, and no lease makes its end wait."""
        if self._leases.in_force(head.key, self._clock_s()) is not None:
            return False
        return expired(head, self.trusted_us, self._limits)

    def last_message(self, key: str) -> bytes:
        """The session's last message."""
        return self._lines[key][-1]

    def call_window(self, client_id: str) -> CallWindow:
        """The client's window, moved to the end of the order of contact."""
        window = self._windows.pop(client_id, None) or CallWindow(last_contact_s=self._clock_s())
        self._windows[client_id] = window
        return window

    def remembered(self, key: str, request_id: str) -> Remembered | None:
        """What is remembered under a request_id of a session, unless it is too old."""
        found = self._requests.get(key, {}).get(request_id)
        if found is None or self._clock_s() - found[0] >= self._limits.window_age_max_s:
            return None
        return found[1]

    def remember(self, key: str, request_id: str, remembered: Remembered) -> None:
        """Remember an answer, and forget the oldest beyond the limit."""
        known = self._requests.pop(key, {})
        self._requests[key] = known
        known.pop(request_id, None)
        known[request_id] = (self._clock_s(), remembered)
        while len(known) > self._limits.window_request_ids_max:
            del known[next(iter(known))]

    def kept_lease(self, key: str) -> Lease | None:
        """The last lease of a session that did not end."""
        return self._leases.get(key)

    def change_lease(self, lease: Lease, event: LeaseEvent) -> None:
        """Keep what became of a lease."""
        self._leases.update({lease.key: lease if event.in_force else None})
        if event is LeaseEvent.ACQUIRED:
            self._revision = lease.token
        if event is not LeaseEvent.RENEWED:
            self._publish(lease_told(lease, event))

    def lease_count(self) -> int:
        """How many leases are in force."""
        if len(self._leases) >= self._limits.leases_max:
            for key in self._leases.lapsed(self._clock_s()):
                lapsed = self._leases.get(key)
                assert lapsed is not None
                self.change_lease(lapsed, LeaseEvent.LAPSED)
        return len(self._leases)

    # Reads.

    async def read(self, key: str, select: Callable[[Head], tuple[int, int]], max_bytes: int) -> Slice:
        """Read a head and some of its messages."""
        self.trusted_us = self._trusted.now_us()
        head = self._heads.get(key)
        if head is None or self.expired(head):
            raise Refused(not_found(key))
        start, stop = select(head)
        lines: list[bytes] = []
        size = 0
        for line in self._lines[key][start:stop]:
            size += len(line) + 1
            if lines and size > max_bytes:
                break
            lines.append(line)
        return Slice(head, start, lines)

    async def lease(self, key: str) -> Lease | None:
        """The lease of a session that is in force."""
        return self._leases.in_force(key, self._clock_s())

    def clock_s(self) -> float:
        """The clock on which leases end."""
        return self._clock_s()

    async def list(self, query: Query) -> Page:
        """One page of heads."""
        self.trusted_us = self._trusted.now_us()
        by_time = query.order in (Order.UPDATE_TIME, Order.UPDATE_TIME_DESC)
        backwards = query.order in (Order.KEY_DESC, Order.UPDATE_TIME_DESC)

        def position(update_time_us: int, key: str) -> tuple[int, bytes]:
            return (update_time_us if by_time else 0, key.encode())

        heads = [
            head
            for head in self._heads.values()
            if head.key.startswith(query.prefix)
            and not self.expired(head)
            and (query.updated_since_us is None or head.update_time_us >= query.updated_since_us)
        ]
        heads.sort(key=lambda head: position(head.update_time_us, head.key), reverse=backwards)
        if query.after is not None:
            after = position(*query.after)
            heads = [
                head
                for head in heads
                if (position(head.update_time_us, head.key) > after) != backwards
                and position(head.update_time_us, head.key) != after
            ]
        return Page(heads[: query.page_size], len(heads) > query.page_size)

    # Watching.

    def cursor(self) -> bytes:
        """Where a watch goes on."""
        return self.feed.cursor()

    def watch(self, prefix: str | None, keys: Collection[str], cursor: bytes) -> Watcher:
        """Begin to watch."""
        return self.feed.watch(prefix, keys, cursor)

    def end_watches(self, refusal: Refusal) -> None:
        """End every watch."""
        self.feed.close(refusal)

    async def replay(self, after: int, through: int, concerns: Callable[[str], bool], bytes_max: int) -> Old:
        """The kept events of some positions."""
        await asyncio.sleep(0)  # a watcher who is far behind asks again and again
        first = self.feed.position - len(self._kept) + 1
        if after + 1 < first:
            raise Refused(cursor_expired())
        events: list[Event] = []
        size = 0
        for position in range(after + 1, through + 1):
            _, event, event_size = self._kept[position - first]
            if concerns(event.key):
                events.append(event)
                size += event_size
                if size >= bytes_max:
                    return Old(events, position)
        return Old(events, through)

    async def count(self) -> int:
        """How many sessions there are."""
        return len(self._heads)

    def disbelief(self) -> Disbelief | None:
        """What is known of a wall clock that sessions do not expire by."""
        return self._trusted.disbelief()

    def scrubbed(self) -> None:
        """Memory has no checksums."""

    async def backup(self) -> AsyncGenerator[Sequence[BackupItem], None]:
        """Refuse: there is nothing that would outlive the process anyway."""
        detail = "a store in memory has no backup: serve a directory"
        raise Refused(Refusal("UNSUPPORTED", detail, {"detail": detail}))
        yield ()  # makes this an iterator

    def announce(self, addresses: Sequence[str]) -> None:
        """Nobody else can open this store."""

    async def failed(self) -> str:
        """Never returns: memory does not fail without the process."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Refuse what comes later."""
        self._closed = True

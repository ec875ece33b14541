"""One who watches: what waits for it, what it has yet to catch up with, and in which portions it gets that.

A watcher that begins at a cursor is behind: what came since is read from the engine in portions, as fast as
the watcher takes them, without collecting what comes meanwhile. Only for the last few positions it is
registered first, and then catches up with what is before that moment: so nothing is missed.

An event whose messages are not in the feed makes the watcher read the session as it is then, in parts. What
follows of that session up to the revision that was read is left out. If the session is gone by then, or
cannot be served, nothing is given until it is deleted or taken anew.

The cursor of a batch is behind everything that was given, and never behind anything that was not.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sessionstored.engine import Refused
from sessionstored.engine.events import Batch, Deleted, Event, LeaseTold, Loaded, Reload
from sessionstored.rules import Head, Refusal

if TYPE_CHECKING:
    from sessionstored.engine.feed import Feed

BATCH_BYTES_MAX = 256 << 10
"""A batch holds so many bytes of events, or one event."""
_REGISTERED_BEFORE = 64
"""A watcher that is so few positions behind is registered, and then given these."""
_BLOCK_BYTES = 128 << 10
_LOADS_MAX = 20
_LOADED_MAX = 1000
_GONE = ("SESSION_NOT_FOUND", "DATA_LOSS")


class _Rewritten(Exception):
    """A session was rewritten while it was read."""


@dataclass(slots=True, eq=False)
class _Behind:
    """Keys (None: the watcher's prefix) whose changes after `position` are still to be read."""

    keys: set[str] | None
    position: int
    through: int | None = None
    """If they are registered: what comes after this position comes by itself."""


class Watcher:
    """See the module. Made by `Feed.watch`."""

    def __init__(self, feed: "Feed", prefix: str | None) -> None:
        self._feed, self._prefix = feed, prefix
        self._keys: set[str] = set()
        self._pending: deque[tuple[int, Event, int]] = deque()
        """(position, event, size)"""
        self.pending_bytes = 0
        self._given = feed.position
        """Up to this position, all that was published to this watcher is given."""
        self._behind: deque[_Behind] = deque()
        self._loaded: dict[str, tuple[int, int]] = {}
        """Key -> the revision at which it was given whole, and the position from which that is past."""
        self._absent: set[str] = set()
        """Sessions that were to be given whole, and were not there."""
        self._refusal: Refusal | None = None
        self._wake = asyncio.Event()
        self._taken = self._told = 0
        """How many requests of its reader were taken, and of how many it was told that it is in step."""

    # What it watches.

    def begin(self, position: int) -> None:
        """Watch the prefix from a position on."""
        self._behind.append(_Behind(None, position))
        self._wake.set()

    def add(self, keys: Collection[str], cursor: bytes) -> None:
        """Watch more sessions. Raises Refused: CURSOR_INVALID; OVERLOADED, too many are watched."""
        wanted = set(keys)
        position = self._feed.at(cursor)
        if not wanted:
            return
        self.remove(wanted)  # one that is watched already begins anew at this cursor
        self._feed.count_keys(len(wanted))
        self._keys |= wanted
        self._behind.append(_Behind(wanted, position))
        self._wake.set()

    def remove(self, keys: Collection[str]) -> None:
        """Watch these sessions no longer."""
        gone = self._keys & set(keys)
        if not gone:
            return
        self._feed.count_keys(-len(gone))
        self._keys -= gone
        for key in gone:
            self._feed.unregister_key(key, self)
        for behind in self._behind:
            if behind.keys is not None:
                behind.keys -= gone
        self._behind = deque(each for each in self._behind if each.keys is None or each.keys)
        if self._pending:
            kept = [each for each in self._pending if self._watches(each[1].key)]
            dropped = [each for each in self._pending if not self._watches(each[1].key)]
            self._pending = deque(kept)
            for _, event, size in dropped:
                self._let_go(event, size)

    def taken(self) -> None:
        """One more request of its reader was taken."""
        self._taken += 1
        self._wake.set()

    def _watches(self, key: str) -> bool:
        return key in self._keys or (self._prefix is not None and key.startswith(self._prefix))

    def count_with(self, added: Collection[str], removed: Collection[str]) -> int:
        """How many keys it would name after a change."""
        return len((self._keys - set(removed)) | set(added))

    # What the feed does to it.

    def push(self, position: int, event: Event, size: int) -> None:
        """An event that concerns it."""
        if self._refusal is not None:
            return
        self._pending.append((position, event, size))
        self.pending_bytes += size
        self._feed.hold(event, size)
        self._wake.set()
        if self.pending_bytes > self._feed.limits.watcher_bytes_max and len(self._pending) > 1:
            self.end_slow()

    def end_slow(self) -> None:
        """End it, because too much waits for it."""
        limit = self._feed.limits.watcher_bytes_max
        self.end(
            Refusal(
                "WATCHER_TOO_SLOW",
                f"more than {limit} bytes of events wait for this watcher, or more than fits for all of them "
                "together: watch again from the cursor; nothing is lost",
                {"cursor": "", "limit_bytes": str(limit)},
            )
        )

    def end(self, refusal: Refusal) -> None:
        """End it: its reader is told with the next batch."""
        if self._refusal is None:
            self._refusal = refusal
            self.close()
            self._wake.set()

    def close(self) -> None:
        """Let go of everything."""
        self._feed.leave(self)
        if self._prefix is not None:
            self._feed.unregister_prefix(self._prefix, self)
        for key in self._keys:
            self._feed.unregister_key(key, self)
        self._feed.count_keys(-len(self._keys))
        self._keys = set()
        while self._pending:
            _, event, size = self._pending.popleft()
            self._let_go(event, size)

    def _let_go(self, event: Event, size: int) -> None:
        self.pending_bytes -= size
        self._feed.let_go(event)

    # What it is given.

    @property
    def cursor(self) -> bytes:
        """Where to go on behind what was given."""
        return self._feed.cursor(min([self._given, *(behind.position for behind in self._behind)]))

    async def batches(self, idle_s: float) -> AsyncGenerator[Batch, None]:
        """What there is for it, as it comes.

        Args:
            idle_s: after so long without an event comes a batch without events, for its cursor.

        Raises:
            Refused: WATCHER_TOO_SLOW, CURSOR_EXPIRED, SHUTTING_DOWN, and what a read may be refused with.

        """
        waiting_first = False
        while True:
            self._check()
            behind = self._behind[0] if self._behind else None
            if behind is not None and (behind.through is not None or not (waiting_first and self._pending)):
                waiting_first = True
                async for batch in self._catch_up(behind):
                    yield batch
            elif self._pending:
                waiting_first = False
                async for batch in self._give(*self._take()):
                    yield batch
            else:
                self._given = self._feed.position
                self._forget_loaded()
                self._wake.clear()
                if self._told == self._taken:
                    idle = await self._idle(idle_s)
                    if not idle or self._pending or self._behind:
                        continue
                self._given = self._feed.position
                self._told = self._taken
                yield Batch((), self.cursor, self._told)

    def _check(self) -> None:
        if self._refusal is None:
            return
        metadata = self._refusal.metadata
        if "cursor" in metadata:
            metadata = {**metadata, "cursor": self.cursor.hex()}
        raise Refused(Refusal(self._refusal.reason, self._refusal.message, metadata))

    async def _idle(self, idle_s: float) -> bool:
        """Wait for something to do; returns whether nothing came."""
        with suppress(TimeoutError):
            async with asyncio.timeout(idle_s):
                await self._wake.wait()
                return False
        return True

    def _take(self) -> tuple[Sequence[Event], Callable[[], None]]:
        """Events that wait, up to a batch of them, and what is to be done when they are given."""
        events: list[Event] = []
        size = position = 0
        while self._pending:
            if events and size + self._pending[0][2] > BATCH_BYTES_MAX:
                break
            position, event, event_size = self._pending.popleft()
            self._let_go(event, event_size)
            events.append(event)
            size += event_size
        through = position - 1 if self._pending and self._pending[0][0] == position else position

        def given() -> None:
            self._given = max(self._given, through)

        return events, given

    async def _catch_up(self, behind: _Behind) -> AsyncIterator[Batch]:
        """A portion of what is old."""
        feed = self._feed
        if behind.through is None and feed.position - behind.position <= _REGISTERED_BEFORE:
            self._register(behind)
        through = feed.position if behind.through is None else behind.through
        events: Sequence[Event] = ()
        reached = through
        if behind.position < through:
            keys, prefix = behind.keys, self._prefix

            def concerns(key: str) -> bool:
                return key in keys if keys is not None else key.startswith(prefix or "")

            old = await feed.source.replay(behind.position, through, concerns, BATCH_BYTES_MAX)
            events, reached = [event for event in old.events if concerns(event.key)], old.position
        sizes = [event.size for event in events]
        self._hold(events, sizes)

        def given() -> None:
            behind.position = reached
            if behind.through is not None and reached >= behind.through and behind in self._behind:
                self._behind.remove(behind)

        try:
            async for batch in self._give(events, given):
                yield batch
        finally:
            for event in events:
                feed.let_go(event)

    def _hold(self, events: Sequence[Event], sizes: Sequence[int]) -> None:
        """Old events wait as new ones do. Raises Refused: WATCHER_TOO_SLOW, there is no room for them now."""
        for event, size in zip(events, sizes, strict=True):
            self._feed.hold(event, size)
        if self._feed.is_full:
            for event in events:
                self._feed.let_go(event)
            self.end_slow()
            self._check()

    def _register(self, behind: _Behind) -> None:
        """What comes from now on comes by itself."""
        if self._refusal is not None:
            return
        behind.through = self._feed.position
        if not self._pending:
            self._given = self._feed.position
        if behind.keys is None:
            assert self._prefix is not None
            self._feed.register_prefix(self._prefix, self)
            return
        for key in behind.keys:
            self._feed.register_key(key, self)

    async def _give(self, events: Sequence[Event], given: Callable[[], None]) -> AsyncIterator[Batch]:
        """Events as batches; `given` is called when only the last one is left."""
        ready: list[Event] = []
        loaded_bytes = 0
        for event in events:
            if self._known(event):
                continue
            if not isinstance(event.what, Reload):
                ready.append(event)
                continue
            async for part in self._load(event):
                if ready and loaded_bytes + part.size > BATCH_BYTES_MAX:
                    yield Batch(ready, self.cursor)
                    ready, loaded_bytes = [], 0
                ready.append(part)
                loaded_bytes += part.size
        given()
        if ready or events:
            yield Batch(ready, self.cursor)

    def _known(self, event: Event) -> bool:
        """Whether an event is left out: it is in what was given whole, or nothing to build on was there."""
        if isinstance(event.what, LeaseTold):
            return False
        loaded = self._loaded.get(event.key)
        if loaded is not None and event.revision <= loaded[0]:
            return True
        if event.key in self._absent and not isinstance(event.what, Deleted | Reload):
            return True
        self._loaded.pop(event.key, None)
        self._absent.discard(event.key)
        return False

    async def _load(self, event: Event) -> AsyncIterator[Event]:
        """A session as it is now, in parts; from its beginning again if it is rewritten meanwhile."""
        for _ in range(_LOADS_MAX):
            last: Loaded | None = None
            try:
                async for last in self._parts(event):
                    revision = last.head.revision
                    yield Event(event.key, revision, event.previous_revision, last)
            except _Rewritten:
                continue
            except Refused as refused:
                if refused.refusal.reason not in _GONE:
                    raise
            if last is None or last.partial:  # gone, perhaps after its first part
                self._absent.add(event.key)
                return
            await asyncio.sleep(0)  # by then, what was committed before the read is published
            self._loaded[event.key] = last.head.revision, self._feed.position
            if len(self._loaded) > _LOADED_MAX:
                self._forget_loaded()
            return
        limit = {"limit": str(_LOADS_MAX)}
        raise Refused(Refusal("OVERLOADED", f"session {event.key!r} is rewritten too often", limit))

    async def _parts(self, event: Event) -> AsyncIterator[Loaded]:
        assert isinstance(event.what, Reload)
        head: Head | None = None
        start = 0

        def select(found: Head) -> tuple[int, int]:
            if head is None:
                return 0, found.message_count
            if found.rewrite_revision > head.revision:
                raise _Rewritten
            return start, head.message_count

        while head is None or start < head.message_count:
            taken = await self._feed.source.read(event.key, select, _BLOCK_BYTES)
            if head is None:
                head = taken.head
            source = event.what.source_key if head.rewrite_revision == event.revision else ""
            yield Loaded(head, start, taken.lines, source)
            start = taken.next

    def _forget_loaded(self) -> None:
        """Forget what was given whole, and is past."""
        if self._loaded:
            past = min([self._given, *(behind.position for behind in self._behind)])
            self._loaded = {key: kept for key, kept in self._loaded.items() if kept[1] > past}

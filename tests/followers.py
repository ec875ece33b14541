"""One who follows sessions by their events, as a careful client does: applies each, and finds every gap.

It takes what goes on the wire. A part of an event counts for nothing before its last part is there, because
the watch may end in between.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sessionstore.v1 import session_pb2, session_store_pb2
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored.engine import Engine
from sessionstored.rules import DEFAULT_LIMITS
from sessionstored.watching import responses


class Gap(AssertionError):
    """An event does not go on where the one before it ended."""


@dataclass
class Held:
    """A session as its follower has it."""

    head: session_pb2.Session
    lines: list[bytes]


@dataclass
class Follower:
    """What is held of each session, and what it took to get there."""

    sessions: dict[str, Held] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    """Also of sessions that are gone."""
    cursor: bytes = b""
    given: Counter[tuple[str, bytes]] = field(default_factory=Counter)
    """(key, message) -> how often it came in an event that was not whole."""
    wholes: int = 0
    skipped: int = 0
    events: int = 0
    order: list[tuple[str, int, session_store_pb2.Lease | None, bool]] = field(default_factory=list)
    """What came, in its order: (key, revision, None, False), or of a lease: (key, 0, lease, ended)."""
    shown: set[tuple[str, bytes]] = field(default_factory=set)
    """(key, message) of what came in events that were whole."""
    _parts: dict[str, tuple[int, list[bytes], bool]] = field(default_factory=dict)
    """Key -> revision, the messages so far, and whether what was held goes."""
    _parts_given: dict[str, list[bytes]] = field(default_factory=dict)

    def hold(self, head: session_pb2.Session, lines: Iterable[bytes]) -> None:
        """Begin with a session that was read."""
        self.sessions[head.key] = Held(head, list(lines))
        self.revisions[head.key] = head.revision

    def take(self, response: v1.WatchResponse) -> None:
        """Apply a reply."""
        for event in response.events:
            self.apply(event)
        assert response.cursor
        self.cursor = response.cursor

    def begin_again(self) -> None:
        """The watch ended: parts of what was not whole are void."""
        self._parts.clear()
        self._parts_given.clear()

    def apply(self, event: v1.WatchEvent) -> None:
        """Apply an event."""
        self.events += 1
        if event.WhichOneof("change") == "lease":  # it says nothing of what the session holds
            self.order.append((event.key, 0, event.lease.lease, event.lease.ended))
            return
        known = self.revisions.get(event.key, 0)
        if event.revision <= known:
            self.skipped += 1
            return
        match event.WhichOneof("change"):
            case "deleted":
                # It needs nothing before it: what it ended may have been gone before it could be given.
                self.sessions.pop(event.key, None)
                self.revisions[event.key] = event.revision
                self.order.append((event.key, event.revision, None, False))
            case "changed":
                self._change(event, event.changed, known)
            case other:
                raise AssertionError(f"what is {other!r}?")

    def _go_on(self, event: v1.WatchEvent, known: int) -> None:
        """Whether an event begins where the one before it ended; a deleted session has no revision."""
        before = known if event.key in self.sessions else 0
        if event.previous_revision != before:
            raise Gap(f"{event.key}: {known} is held, the event goes on from {event.previous_revision}")

    def _change(self, event: v1.WatchEvent, change: v1.SessionChanged, known: int) -> None:
        key, new = event.key, _lines(change.messages)
        under_way = self._parts.pop(key, None)
        if change.whole:
            assert change.start == 0
            lines: list[bytes] = []
            self.wholes += 1
            whole = True
            self._parts_given.pop(key, None)
        elif under_way is not None and under_way[0] == event.revision:
            lines, whole = under_way[1], under_way[2]
        else:
            self._go_on(event, known)
            lines, whole = list(self.sessions[key].lines) if key in self.sessions else [], False
        if change.start + change.delete_count > len(lines):
            raise Gap(f"{key}: {len(lines)} messages are held, the event begins at {change.start}")
        lines[change.start : change.start + change.delete_count] = new
        if whole:
            self.shown.update((key, line) for line in new)
        else:
            self._parts_given.setdefault(key, []).extend(new)
        if change.partial:
            self._parts[key] = event.revision, lines, whole
            return
        assert change.session.revision == event.revision
        assert change.session.message_count == len(lines), (key, change.session, len(lines))
        self.sessions[key] = Held(change.session, lines)
        self.revisions[key] = event.revision
        self.order.append((key, event.revision, None, False))
        self.given.update((key, line) for line in self._parts_given.pop(key, ()))


def _lines(block: bytes) -> list[bytes]:
    assert not block or block.endswith(b"\n")
    return block.split(b"\n")[:-1]


class Following:
    """A follower of an engine's own watch, without a server in between."""

    def __init__(
        self,
        engine: Engine,
        follower: Follower | None = None,
        *,
        prefix: str | None = "",
        keys: Iterable[str] = (),
    ) -> None:
        """Watch from the follower's cursor on; a new one begins now."""
        self.engine = engine
        self.follower = follower or Follower()
        keys = list(keys)
        self.watch = engine.watch(None if keys else prefix, keys, self.follower.cursor)
        self.follower.cursor = self.watch.cursor
        self._batches = self.watch.batches(0.005)

    async def step(self) -> int:
        """Apply the next batch, which may be empty; returns how many events it had."""
        batch = await anext(self._batches)
        for response in responses(batch, self.follower.cursor, DEFAULT_LIMITS):
            self.follower.take(response)
        return len(batch.events)

    async def catch_up(self) -> Follower:
        """Apply everything that was committed before this."""
        target = position(self.engine.cursor())
        async with asyncio.timeout(60):
            while min(position(self.follower.cursor), position(self.watch.cursor)) < target:
                await self.step()
        return self.follower

    async def close(self) -> Follower:
        """End the watch, wherever it is."""
        await self._batches.aclose()
        self.watch.close()
        self.follower.begin_again()
        return self.follower


def position(cursor: bytes) -> int:
    """The position that a cursor of these engines has."""
    return int.from_bytes(cursor[9:], "big")

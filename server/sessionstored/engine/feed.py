"""The feed of one store in one process: what was committed, handed to those who watch it.

A change has a position in the feed; positions only grow. `publish` hands each event to the watchers of its
key and of its key's prefixes, and to nobody else, so what does not concern a watcher costs it nothing. What
waits for a watcher is bounded in bytes, and so is what waits for all of them together: beyond that the one
for whom most waits is ended, and told where to go on.

For the event loop only. Knows no storage: an engine publishes, and `watcher` reads what is old through a
`Source`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from sessionstored.engine import Refused, Slice
from sessionstored.engine.events import Event
from sessionstored.engine.watcher import Watcher
from sessionstored.rules import Head, Refusal

_VERSION = 1


@dataclass(frozen=True, slots=True)
class FeedLimits:
    """Bounds of a feed; each has a default that suits one machine."""

    age_s_max: float = 600.0
    """How long a change can be read from a cursor, unless `bytes_max` is reached before."""
    bytes_max: int = 64 << 20
    watcher_bytes_max: int = 8 << 20
    """What may wait for one watcher."""
    watching_bytes_max: int = 256 << 20
    """What may wait for all of them; an event that waits for many counts once."""
    watchers_max: int = 4096
    watched_keys_max: int = 1_000_000
    """Keys that all watchers name, together."""


DEFAULT_FEED_LIMITS = FeedLimits()


@dataclass(frozen=True, slots=True)
class Old:
    """Events that a source had kept, and up to which position they are all."""

    events: Sequence[Event]
    position: int


class Source(Protocol):
    """What a watcher reads from its engine."""

    async def replay(self, after: int, through: int, concerns: Callable[[str], bool], bytes_max: int) -> Old:
        """The kept events behind `after` and up to `through` of the keys that concern somebody.

        Gives about `bytes_max` of them at the most, whole positions, one at least. Raises Refused:
        CURSOR_EXPIRED, they are not all kept.
        """
        ...

    async def read(self, key: str, select: Callable[[Head], tuple[int, int]], max_bytes: int) -> Slice:
        """Read a head and messages; see `Engine.read`."""
        ...


class Feed:
    """Who watches, and what was published."""

    def __init__(self, identity: str, position: int, source: Source, limits: FeedLimits) -> None:
        """Begin at a position.

        Args:
            identity: of the feed: another store, or one that lost changes, has another.
            position: of the last change so far.
            source: where older changes are.
            limits: the bounds in force.

        """
        self.position = position
        self.limits = limits
        self.source = source
        self._digest = blake2b(identity.encode(), digest_size=8).digest()
        self._watchers: set[Watcher] = set()
        self._by_key: dict[str, set[Watcher]] = {}
        self._by_prefix: dict[str, set[Watcher]] = {}
        self._prefix_lengths: dict[int, int] = {}
        """Length -> how many prefixes of it are watched."""
        self._keys = 0
        self._waiting: dict[int, list[int]] = {}
        """id of an event that waits -> [for how many watchers, its size]"""
        self._waiting_bytes = 0
        self._closed: Refusal | None = None

    # Cursors.

    def cursor(self, position: int | None = None) -> bytes:
        """A position as its reader keeps it; by default where the feed is now."""
        at = self.position if position is None else position
        return bytes([_VERSION]) + self._digest + at.to_bytes(8, "big")

    def at(self, cursor: bytes) -> int:
        """The position of a cursor; without one, where the feed is now. Raises Refused: CURSOR_INVALID."""
        if not cursor:
            return self.position
        position = int.from_bytes(cursor[9:], "big")
        ours = len(cursor) == 17 and cursor[:9] == bytes([_VERSION]) + self._digest
        if not ours or position > self.position:
            raise Refused(
                Refusal(
                    "CURSOR_INVALID",
                    "this cursor is not of this store as it is now: read the sessions again, and watch from "
                    "the cursor that comes with them",
                )
            )
        return position

    # Publishing.

    def publish(self, position: int, events: Sequence[Event]) -> None:
        """Hand a change to its watchers. Positions come in their order."""
        if self._watchers:
            for event in events:
                concerned = self._concerned(event.key)
                size = event.size if concerned else 0
                for watcher in concerned:
                    watcher.push(position, event, size)
            if self.is_full:
                self._shed()
        self.position = position

    def _concerned(self, key: str) -> set[Watcher]:
        found = self._by_key.get(key)
        concerned = set(found) if found else set()
        for length in self._prefix_lengths:
            if length <= len(key):
                concerned |= self._by_prefix.get(key[:length], set())
        return concerned

    def _shed(self) -> None:
        """End the watchers for whom most waits, until the others have room."""
        for watcher in sorted(self._watchers, key=lambda watcher: -watcher.pending_bytes):
            if not self.is_full:
                break
            watcher.end_slow()

    @property
    def is_full(self) -> bool:
        """Whether more waits for watchers than fits."""
        return self._waiting_bytes > self.limits.watching_bytes_max

    def hold(self, event: Event, size: int) -> None:
        """Count an event that waits for one more watcher."""
        held = self._waiting.setdefault(id(event), [0, size])
        if not held[0]:
            self._waiting_bytes += size
        held[0] += 1

    def let_go(self, event: Event) -> None:
        """It waits for one less."""
        held = self._waiting[id(event)]
        held[0] -= 1
        if not held[0]:
            self._waiting_bytes -= held[1]
            del self._waiting[id(event)]

    # Watching.

    @property
    def watcher_count(self) -> int:
        """How many watch."""
        return len(self._watchers)

    def watch(self, prefix: str | None, keys: Collection[str], cursor: bytes) -> Watcher:
        """Begin to watch.

        Args:
            prefix: what the keys of the sessions begin with; None watches `keys` only.
            keys: sessions, whether they exist or not.
            cursor: where to go on; empty: from now on.

        Raises:
            Refused: CURSOR_INVALID; OVERLOADED, too many watch; SHUTTING_DOWN.

        """
        if self._closed is not None:
            raise Refused(self._closed)
        if len(self._watchers) >= self.limits.watchers_max:
            raise Refused(_too_many(f"{self.limits.watchers_max} watchers", self.limits.watchers_max))
        position = self.at(cursor)
        watcher = Watcher(self, prefix)
        if prefix is not None:
            watcher.begin(position)
        watcher.add(keys, cursor)
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """A watcher is over."""
        self._watchers.discard(watcher)

    def close(self, refusal: Refusal) -> None:
        """End every watcher, and refuse those who come later."""
        self._closed = refusal
        for watcher in list(self._watchers):
            watcher.end(refusal)

    # For watchers: who is told of what.

    def count_keys(self, change: int) -> None:
        """So many more keys are named by watchers. Raises Refused: OVERLOADED."""
        if change > 0 and self._keys + change > self.limits.watched_keys_max:
            limit = self.limits.watched_keys_max
            raise Refused(_too_many(f"{limit} watched keys", limit))
        self._keys += change

    def register_key(self, key: str, watcher: Watcher) -> None:
        """From now on, a watcher is told of this session."""
        self._by_key.setdefault(key, set()).add(watcher)

    def unregister_key(self, key: str, watcher: Watcher) -> None:
        """No longer."""
        watchers = self._by_key.get(key)
        if watchers is not None:
            watchers.discard(watcher)
            if not watchers:
                del self._by_key[key]

    def register_prefix(self, prefix: str, watcher: Watcher) -> None:
        """From now on, a watcher is told of sessions whose keys begin so."""
        watchers = self._by_prefix.setdefault(prefix, set())
        if not watchers:
            self._prefix_lengths[len(prefix)] = self._prefix_lengths.get(len(prefix), 0) + 1
        watchers.add(watcher)

    def unregister_prefix(self, prefix: str, watcher: Watcher) -> None:
        """No longer."""
        watchers = self._by_prefix.get(prefix)
        if watchers is None or watcher not in watchers:
            return
        watchers.discard(watcher)
        if not watchers:
            del self._by_prefix[prefix]
            self._prefix_lengths[len(prefix)] -= 1
            if not self._prefix_lengths[len(prefix)]:
                del self._prefix_lengths[len(prefix)]


def cursor_expired() -> Refusal:
    """The refusal for a cursor behind which something is not kept any more."""
    return Refusal(
        "CURSOR_EXPIRED",
        "what came right after this cursor is not kept any more: read the sessions again, and watch from the "
        "cursor that comes with them",
    )


def _too_many(what: str, limit: int) -> Refusal:
    text = f"there are {what} already; try again later"
    return Refusal("OVERLOADED", text, {"limit": str(limit)})

"""What a watcher is told of: the changes of a store, as its feed holds them. Pure.

An event is one change of one session. Those that a feed holds may lack messages (`Reload`): a fork, a file
that somebody else edited. Whoever gives them to a watcher reads the session then, and gives `Loaded` parts
instead. Events are shared by all watchers: nobody changes one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sessionstored.leases import Lease, LeaseEvent
from sessionstored.rules import Change, Head

_EVENT_BYTES = 512
"""About what an event takes in memory beside its messages, its metadata and its key."""


@dataclass(frozen=True, slots=True)
class Changed:
    """messages[start : start + delete_count] = lines, and the head afterwards."""

    head: Head
    start: int
    delete_count: int
    lines: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Reload:
    """The session is what it says now: what it was is not enough to tell how it came to be so."""

    source_key: str = ""
    """Of a fork: where its messages come from."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A part of a whole session. The first one begins at message 0, and what was known before is void."""

    head: Head
    start: int
    lines: Sequence[bytes]
    source_key: str = ""

    @property
    def partial(self) -> bool:
        """Whether more parts follow."""
        return self.start + len(self.lines) < self.head.message_count


@dataclass(frozen=True, slots=True)
class Deleted:
    """The session is gone."""

    expired: bool = False
    """Its time was over; else somebody deleted it."""


@dataclass(frozen=True, slots=True)
class LeaseTold:
    """A lease was acquired, or ended. It does not move the session's revision."""

    lease: Lease
    ended: bool


What = Changed | Reload | Loaded | Deleted | LeaseTold


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one session."""

    key: str
    revision: int
    """The session's revision after the change."""
    previous_revision: int
    """Its revision before the change; 0 if it did not exist."""
    what: What

    @property
    def size(self) -> int:
        """About how many bytes it takes in memory."""
        size = _EVENT_BYTES + len(self.key)
        if isinstance(self.what, Changed | Loaded):
            size += len(self.what.head.metadata) + sum(map(len, self.what.lines))
            size += 40 * len(self.what.lines)
        return size


def changed(head: Head, previous_revision: int, change: Change, source_key: str = "") -> Event:
    """The event of a change that the rules decided; a fork's messages are not in it."""
    what: What = Reload(source_key)
    if not source_key:
        what = Changed(head, change.start, change.delete_count, change.messages)
    return Event(head.key, head.revision, previous_revision, what)


def lease_told(lease: Lease, event: LeaseEvent) -> Event:
    """The event of what became of a lease; of no session's revision."""
    return Event(lease.key, 0, 0, LeaseTold(lease, not event.in_force))


@dataclass(frozen=True, slots=True)
class Batch:
    """Events for one watcher, those of one session in their order, and the cursor behind them."""

    events: Sequence[Event]
    cursor: bytes
    in_step: int = 0
    """If not 0: with this batch everything is given, and so many requests had been taken by then."""

"""What a watch gives: frozen values, one for each change of a session. No I/O, no grpc, no protobuf."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sessionstore._types import Head, Message


@dataclass(frozen=True, slots=True)
class SessionChanged:
    """Messages or the head changed: messages[start : start + delete_count] = messages.

    A `whole` one gives all of the session, and what was held of it is to be forgotten: so come forks, files
    that somebody edited, changes that were merged, and what changed while the watch was not in step.
    """

    key: str
    revision: int
    """The session's revision after the change."""
    previous_revision: int
    """Its revision before: what the change is to be applied to, unless it is whole. 0: it did not exist."""
    head: Head
    """Everything but the messages, after the change."""
    start: int
    """The index of the first message that was removed, and where the new ones are."""
    delete_count: int
    messages: list[Message]
    """The new messages; yours."""
    cursor: bytes
    """Where a watch goes on after this event; see `SessionStore.watch`."""
    whole: bool = False
    source_key: str = ""
    """Of a fork: where its messages come from."""

    def apply(self, messages: Iterable[Message]) -> list[Message]:
        """The session's messages after the change, of those before it."""
        if self.whole:
            return list(self.messages)
        kept = list(messages)
        kept[self.start : self.start + self.delete_count] = self.messages
        return kept


@dataclass(frozen=True, slots=True)
class SessionDeleted:
    """The session is gone."""

    key: str
    revision: int
    """The revision of the removal; 0 if it is only known that the session is gone by now."""
    previous_revision: int
    """The session's last revision; 0 if that is not known."""
    cursor: bytes
    """Where a watch goes on after this event; see `SessionStore.watch`."""
    expired: bool = False
    """Its time was over; else somebody deleted it, or nobody knows."""


@dataclass(frozen=True, slots=True)
class LeaseChanged:
    """A lease was acquired or released. One that ran out has no event of its own."""

    key: str
    revision: int
    """The session's revision at that time; 0 if it does not exist, or if that is not known."""
    holder: str
    """What the holder calls itself."""
    fencing_token: int
    allows_appends: bool
    """Whether others may append meanwhile."""
    ttl: timedelta
    remaining: timedelta
    """How long it was in force yet, when the event was made."""
    acquire_time: datetime
    """Aware, UTC, by the daemon's clock."""
    ended: bool
    """It was released; else it was acquired."""
    cursor: bytes
    """Where a watch goes on after this event; see `SessionStore.watch`."""


WatchEvent = SessionChanged | SessionDeleted | LeaseChanged

"""The Engine protocol: what a store of sessions must do, whatever it keeps them in.

An engine takes groups of requests, decides each with `rules` inside its own transaction, and answers only
what is durable at its level. It is asynchronous, and nothing here assumes that all writers share one memory.
Engines never import grpc: they raise `Refused`, and the service turns that into a status.

Engines are chosen by name; `engine.open` knows them.
"""

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from sessionstored.engine.events import Batch
from sessionstored.leases import AnyOutcome, Lease, LeaseOperation
from sessionstored.rules import Head, Mutation, Refusal
from sessionstored.trusted import Disbelief
from sessionstored.windows import Call

BACKUP_BYTES_MAX = 1 << 20
"""How many bytes of data one block of a backup holds at most."""


class Refused(Exception):
    """A read or a whole submission was refused; `refusal` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class StartError(Exception):
    """The daemon cannot start. The message is for its operator: what, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Request:
    """A mutation, or an operation on a lease, with what makes it safe to repeat."""

    mutation: Mutation | LeaseOperation
    call: Call | None = None
    request_id: str = ""
    digest: bytes = b""
    """A digest of the content, the call identity left out; needed if there is a call or a request_id."""
    deadline_s: float | None = None
    """On time.monotonic(): a request that is not decided by then is refused, and certainly not applied."""
    fencing_token: int = 0
    """The token of the lease that a write is made under: it must be in force. 0: none."""
    waiting: bool = False
    """It is asked again if a lease keeps it from being done: that refusal is not remembered."""
    behind: str | None = None
    """For Acquire: others wait already, and this is the first one's holder; see `decide_lease`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request got. `replayed` tells that it is the first answer of an earlier copy."""

    outcome: AnyOutcome
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """A head and some of its messages, of one and the same revision."""

    head: Head
    start: int
    lines: Sequence[bytes]
    """One JSON object each, without line end; messages[start : start + len(lines)]."""

    @property
    def next(self) -> int:
        """The index after the last message given."""
        return self.start + len(self.lines)


class Order(Enum):
    """The order of a listing."""

    KEY = "key"
    KEY_DESC = "key desc"
    UPDATE_TIME = "update_time"
    UPDATE_TIME_DESC = "update_time desc"


@dataclass(frozen=True, slots=True)
class Query:
    """One page of a listing.

    Keys order by their UTF-8 bytes; ties of update_time by key, in the same direction.
    """

    prefix: str = ""
    order: Order = Order.KEY
    page_size: int = 100
    after: tuple[int, str] | None = None
    """(update_time_us, key) of the last head of the page before; None begins."""
    updated_since_us: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Heads in the order asked for, at most page_size, and whether there are more."""

    heads: Sequence[Head]
    more: bool


@dataclass(frozen=True, slots=True)
class Scrub:
    """What an engine compared with its checksums in the background, since it was opened."""

    bytes: int
    sessions: int
    """Sessions found whole, counted once a pass."""
    damaged: int
    """Sessions found damaged; they answer DATA_LOSS."""
    passes: int
    last_pass_us: int
    """When the last whole pass ended, microseconds since the epoch; 0 if none did."""


@dataclass(frozen=True, slots=True)
class BackupHeader:
    """What a backup is a copy of, and the moment that it shows. It comes first."""

    store_id: str
    format: int
    """The version of the store's format on disk."""
    take_time_us: int
    revision: int
    """The highest that was given out by then."""
    session_count: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class BackupFile:
    """A file that is copied."""

    size: int
    digest: str
    """SHA-256, in hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class BackupPart:
    """A piece of a file. The pieces of a file come in order, and one after the other."""

    path: str
    """"journal.db", or a name below "sessions/" or "quarantine/"."""
    offset: int
    data: bytes
    end: BackupFile | None = None
    """With the last piece: what the whole file is."""


@dataclass(frozen=True, slots=True)
class BackupDamage:
    """Damage that the store itself has, and the copy, too."""

    key: str
    path: str
    detail: str


BackupItem = BackupHeader | BackupPart | BackupDamage


class Watch(Protocol):
    """One watch. For the event loop; whoever began it closes it."""

    @property
    def cursor(self) -> bytes:
        """Where a watch of the same sessions goes on behind what was given."""
        ...

    def batches(self, idle_s: float) -> AsyncGenerator[Batch, None]:
        """What there is, as it comes; after `idle_s` without an event a batch without one, for its cursor.

        Raises:
            Refused: WATCHER_TOO_SLOW, CURSOR_EXPIRED, SHUTTING_DOWN, and what a read may be refused with.

        """
        ...

    def add(self, keys: Collection[str], cursor: bytes) -> None:
        """Watch more sessions. Raises Refused: CURSOR_INVALID; OVERLOADED, too many are watched."""
        ...

    def remove(self, keys: Collection[str]) -> None:
        """Watch these no longer."""
        ...

    def taken(self) -> None:
        """One more request of its reader was taken: a batch tells when everything is given, soon."""
        ...

    def count_with(self, added: Collection[str], removed: Collection[str]) -> int:
        """How many keys it would name after a change."""
        ...

    def end(self, refusal: Refusal) -> None:
        """End it: whoever reads its batches gets this refusal."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Engine(Protocol):
    """A store of sessions."""

    name: str
    """"jsonl" or "memory"."""
    durability: str
    """What an acknowledgement survives: "fsync", "os" or "none"."""
    store_id: str

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        """Decide requests in their order, and answer each once it is durable.

        A refused one leaves the others alone. Requests of other submissions may be decided in between, but
        never between two mutations of the same group commit.

        Raises:
            Refused: OVERLOADED, STORAGE_FULL or SHUTTING_DOWN (nothing of it was stored), OUTCOME_UNKNOWN
                (storage failed during the commit), DATA_LOSS never: that is a member's own outcome.

        """
        ...

    async def read(self, key: str, select: Callable[[Head], tuple[int, int]], max_bytes: int) -> Slice:
        """Read a head and the messages [start, stop) that `select` picks from the head, all of one revision.

        Args:
            key: the session.
            select: pure and quick; gets the head, returns 0 <= start <= stop <= head.message_count.
                It may raise Refused. It may be called more than once, on another thread.
            max_bytes: stop after so many bytes of messages, line ends included; one message is given at
                the least.

        Raises:
            Refused: SESSION_NOT_FOUND, DATA_LOSS.

        """
        ...

    async def lease(self, key: str) -> Lease | None:
        """The lease of a session that is in force."""
        ...

    def clock_s(self) -> float:
        """The store's own clock, on which leases end: seconds, never jumping."""
        ...

    async def list(self, query: Query) -> Page:
        """One page of heads. A session that does not change during a listing is listed exactly once."""
        ...

    async def count(self) -> int:
        """How many sessions there are."""
        ...

    def cursor(self) -> bytes:
        """Where a watch goes on that misses nothing of what a read from now on does not show. Opaque."""
        ...

    def watch(self, prefix: str | None, keys: Collection[str], cursor: bytes) -> Watch:
        """Begin to watch sessions.

        Per session, events come in order and without a gap, and applying them gives the session at their
        revision; what is given whole may skip revisions. An event whose revision is not above what its
        reader has is one that it has. Nothing is said of the order across sessions.

        Args:
            prefix: what the keys of the sessions begin with; None watches `keys` only.
            keys: sessions, whether they exist or not.
            cursor: where to go on; empty: from now on.

        Raises:
            Refused: CURSOR_INVALID; OVERLOADED, too many watch, or too many keys; SHUTTING_DOWN.

        """
        ...

    def end_watches(self, refusal: Refusal) -> None:
        """End every watch, and refuse those that come later."""
        ...

    def disbelief(self) -> Disbelief | None:
        """What is known of a wall clock that jumped, and that sessions do not expire by; None if they do."""
        ...

    def scrubbed(self) -> Scrub | None:
        """What was compared with checksums in the background; None for an engine that has none."""
        ...

    def backup(self) -> AsyncGenerator[Sequence[BackupItem], None]:
        """Copy the whole store as it is at one moment, after this is first waited for, while it goes on.

        Gives a header, and then parts and damages, at most about BACKUP_BYTES_MAX of data at a time. It shows
        the store between two groups: everything that was acknowledged before, each group whole or not at all.
        What it holds is let go of when it is closed, so its reader closes it.

        Raises:
            Refused: UNSUPPORTED; STORAGE_FULL; OVERLOADED, too many at once, or the reader is too slow;
                DATA_LOSS, what all sessions share is damaged; SHUTTING_DOWN.

        """
        ...

    def announce(self, addresses: Sequence[str]) -> None:
        """Tell whoever tries to open the same store where it is served. Called once, after binding."""
        ...

    async def failed(self) -> str:
        """Wait until storage has failed for good, and say how: the daemon then ends. Else never return."""
        ...

    async def close(self) -> None:
        """Finish what was taken, make everything durable, release the store; refuse what comes later."""
        ...

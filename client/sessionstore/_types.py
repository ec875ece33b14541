"""What calls return: frozen values without any way back to the daemon. No I/O, no grpc, no protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final, Literal

# A message or a session's metadata is one JSON object. What its members are is the caller's own business.
Message = dict[str, Any]
MessageInput = Mapping[str, object]

OrderBy = Literal["key", "key desc", "update_time", "update_time desc"]


class Remove(Enum):
    """The type of `REMOVE`."""

    REMOVE = "REMOVE"

    def __repr__(self) -> str:
        return "sessionstore.REMOVE"


REMOVE: Final = Remove.REMOVE
"""As a value in ``update(patch={...})``: remove this member of the metadata."""


class Keep(Enum):
    """The type of `KEEP`."""

    KEEP = "KEEP"

    def __repr__(self) -> str:
        return "sessionstore.KEEP"


KEEP: Final = Keep.KEEP
"""As ``update(expire_time=...)``: leave it as it is."""

# When a session ends by itself: at an aware time, so long from now, or never.
Expires = datetime | timedelta | None


@dataclass(frozen=True, slots=True)
class Head:
    """A session without its messages, at one revision."""

    key: str
    revision: int
    """Grows with every change; never reused for this key."""
    message_count: int
    last_consolidated: int
    """How many messages from the front are summarised elsewhere."""
    metadata: Message
    create_time: datetime
    """Aware, UTC."""
    update_time: datetime
    """Aware, UTC; never goes back."""
    damage: str = ""
    """What could not be read when the session's file was adopted; empty if it was whole."""
    expire_time: datetime | None = None
    """When it ends by itself, its own or by the daemon's rules for its key; aware, UTC; None: never."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a change came to."""

    revision: int
    """The session's revision after the change. A change that changes nothing keeps the revision."""
    message_count: int
    last_consolidated: int
    update_time: datetime
    """Aware, UTC."""
    replayed: bool = False
    """The change was made by an earlier copy of this call, or under this request_id: its answer."""


@dataclass(frozen=True, slots=True)
class Appended:
    """Where appended messages are."""

    revision: int
    """The session's revision after the append."""
    first_index: int
    """The index of the first appended message."""
    message_count: int
    """How many messages the session had right after the append."""
    replayed: bool = False
    """The append was made by an earlier copy of this call, or under this request_id: its answer."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Who may write to a session, as of the daemon's answer."""

    key: str
    holder: str
    """What the holder calls itself."""
    fencing_token: int
    """Higher than that of every earlier lease of the store."""
    allows_appends: bool
    """Whether others may append meanwhile; they may do nothing else."""
    ttl_s: float
    remaining_s: float
    """How long it is in force, unless it is renewed."""
    acquire_time: datetime
    """Aware, UTC; on the daemon's wall clock."""


@dataclass(frozen=True, slots=True)
class Unseen:
    """What a refused writer has not seen.

    ``messages`` are the session's messages from index ``start`` on, at ``revision``. If what the writer held
    was rewritten, no tail would be right: then ``rewritten`` is set, ``start`` is 0, and ``messages`` is all
    there is. It is all there is for a writer without a handle, too, who held nothing.
    """

    revision: int
    """0 if the session does not exist any more."""
    start: int
    messages: list[Message]
    rewritten: bool = False
    """Whether the session does not begin any more with the messages that the writer held."""

    @property
    def exists(self) -> bool:
        """Whether there is such a session."""
        return self.revision > 0


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """The bounds in force; each is refused with its own error."""

    key_bytes_max: int
    message_bytes_max: int
    message_depth_max: int
    batch_messages_max: int
    batch_bytes_max: int
    metadata_bytes_max: int
    page_size_max: int
    request_id_bytes_max: int
    window_calls_max: int
    window_bytes_max: int
    window_request_ids_max: int
    window_age_max: timedelta
    lease_ttl_min: timedelta
    lease_ttl_max: timedelta


@dataclass(frozen=True, slots=True)
class ScrubStatus:
    """What the daemon compared with checksums in the background, since it began to serve."""

    bytes_verified: int
    sessions_verified: int
    """Sessions found whole, counted once a pass."""
    sessions_damaged: int
    """Sessions found damaged; they raise DataLossError, and are listed with their damage."""
    passes: int
    last_pass_time: datetime | None
    """When the last whole pass ended; aware, UTC; None before the first."""


@dataclass(frozen=True, slots=True)
class ClockDisbelief:
    """The daemon's clock jumped ahead: until it stayed so for a while, sessions expire as if it had not."""

    trusted_time: datetime
    """What sessions expire by now; aware, UTC."""
    ahead: timedelta
    """How far the daemon's clock is ahead of that."""
    confirmed_in: timedelta
    """After how much more service it is believed, if it stays as it is."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What serves."""

    version: str
    store_id: str
    """Identifies the store for its lifetime; a restored copy has another."""
    engine: str
    """``jsonl`` or ``memory``."""
    durability: str
    """What an acknowledgement survives: ``fsync`` (power loss), ``os`` (kill -9 only) or ``none``."""
    start_time: datetime
    """Aware, UTC."""
    session_count: int
    limits: ServerLimits
    scrub: ScrubStatus | None
    """None for an engine without checksums."""
    clock_disbelief: ClockDisbelief | None
    """None: sessions expire by the daemon's clock."""

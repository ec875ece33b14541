"""Operations: what to ask the daemon, and what its replies mean. Sans-IO.

An operation is a generator. It yields an `Rpc`, is sent the reply (or has a SessionStoreError thrown into
it), and returns the value of the call. Operations compose with ``yield from``: a read of a large session
is a GetSession and then a ReadMessages, an edit is a read, a change and perhaps the same again. `client`
and `aio` run them; nothing here waits, sleeps, knows a clock, a thread, an event loop or grpc.

An operation never sees a retry: an Rpc either has an answer or an error that is final for now.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as Proto
from google.protobuf.timestamp_pb2 import Timestamp

from sessionstore import codec
from sessionstore._types import (
    ClockDisbelief,
    Head,
    Lease,
    Message,
    MessageInput,
    OrderBy,
    ScrubStatus,
    ServerInfo,
    ServerLimits,
    Unseen,
    Written,
)
from sessionstore.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    error_for,
)
from sessionstore.v1 import session_pb2, session_store_pb2

if TYPE_CHECKING:
    from sessionstore._calls import Ticket

Request = TypeVar("Request", bound=Proto)
Reply = TypeVar("Reply", bound=Proto)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Reply]):
    """One RPC of the service."""

    name: str
    request: type[Request]
    reply: type[Reply]
    mutates: bool = True
    streams: bool = False
    sends: bool = False
    """Requests are a stream, too."""

    @property
    def path(self) -> str:
        """The method's name on the wire."""
        return f"/sessionstore.v1.SessionStore/{self.name}"


pb = session_store_pb2
INFO = Method("GetServerInfo", pb.GetServerInfoRequest, pb.GetServerInfoResponse, mutates=False)
CREATE = Method("CreateSession", pb.CreateSessionRequest, pb.CreateSessionResponse)
GET = Method("GetSession", pb.GetSessionRequest, pb.GetSessionResponse, mutates=False)
LIST = Method("ListSessions", pb.ListSessionsRequest, pb.ListSessionsResponse, mutates=False)
APPEND = Method("AppendMessages", pb.AppendMessagesRequest, pb.AppendMessagesResponse)
REPLACE = Method("ReplaceMessages", pb.ReplaceMessagesRequest, pb.ReplaceMessagesResponse)
POP = Method("PopMessage", pb.PopMessageRequest, pb.PopMessageResponse)
UPDATE = Method("UpdateSession", pb.UpdateSessionRequest, pb.UpdateSessionResponse)
FORK = Method("ForkSession", pb.ForkSessionRequest, pb.ForkSessionResponse)
DELETE = Method("DeleteSession", pb.DeleteSessionRequest, pb.DeleteSessionResponse)
READ = Method("ReadMessages", pb.ReadMessagesRequest, pb.ReadMessagesResponse, mutates=False, streams=True)
WATCH = Method("Watch", pb.WatchRequest, pb.WatchResponse, mutates=False, streams=True, sends=True)
BACKUP = Method("Backup", pb.BackupRequest, pb.BackupResponse, mutates=False, streams=True)
ACQUIRE = Method("AcquireLease", pb.AcquireLeaseRequest, pb.AcquireLeaseResponse)
RENEW = Method("RenewLease", pb.RenewLeaseRequest, pb.RenewLeaseResponse, mutates=False)
RELEASE = Method("ReleaseLease", pb.ReleaseLeaseRequest, pb.ReleaseLeaseResponse, mutates=False)
LEASE = Method("GetLease", pb.GetLeaseRequest, pb.GetLeaseResponse, mutates=False)
METHODS: tuple[Method[Any, Any], ...] = (
    INFO, CREATE, GET, LIST, APPEND, REPLACE, POP, UPDATE, FORK, DELETE, READ, WATCH, BACKUP,
    ACQUIRE, RENEW, RELEASE, LEASE,
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Rpc:
    """One call to make. A change keeps its identity here, so that the very same call can be sent again."""

    method: Method[Any, Any]
    request: Proto
    ticket: "Ticket | None" = None
    """Its place in the client's window; the driver gets it before the first attempt of a change."""
    maybe_applied: bool = False
    """An attempt was sent whose fate is not known."""
    wait_s: float = 0.0
    """How long the daemon may wait before it answers, beyond the time that a call has."""
    within_s: float = inf
    """How long all attempts may take, if that is less."""

    def timeout_s(self, usual_s: float) -> float:
        """How long all attempts may take, where a call usually has so much time."""
        return min(usual_s + self.wait_s, self.within_s)

    def identity(self) -> session_pb2.CallIdentity:
        """The call identity in the request of a change."""
        return cast("session_pb2.CallIdentity", self.request.call)  # type: ignore[attr-defined]


Operation = Generator[Rpc, Any, Value]


@dataclass(frozen=True, slots=True)
class Held:
    """What a writer holds of a session: the first `count` messages, at `revision`."""

    key: str
    revision: int = 0
    count: int = 0


def ask(method: Method[Request, Reply], request: Request) -> Operation[Reply]:
    """A read with one reply."""
    reply: Reply = yield Rpc(method, request)
    return reply


def change(
    method: Method[Request, Reply],
    request: Request,
    held: Held,
    finish: Callable[[Reply], Operation[Value]],
    wait_s: float = 0.0,
) -> Operation[Value]:
    """A change, and what follows its answer. If its outcome is unknown, `retry` goes on from here."""
    return (yield from _send(Rpc(method, request, wait_s=wait_s), held, finish))


def _send(rpc: Rpc, held: Held, finish: Callable[[Any], Operation[Value]]) -> Operation[Value]:
    try:
        reply = yield rpc
    except OutcomeUnknownError as error:
        error._operation = lambda: _send(rpc, held, finish)
        raise
    except ConflictError as error:
        error._operation = lambda: unseen(held)
        raise
    return (yield from finish(reply))


def done(value: Value) -> Operation[Value]:
    """An operation that has its value already."""
    return value
    yield  # makes this a generator


# ----------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Tail:
    """A head, and its messages from index `start` on, as lines; the caller holds those before."""

    head: Head
    start: int
    lines: list[bytes]
    cursor: bytes = b""
    """Where a watch goes on: it gives every change after the head's revision."""


# A session that is rewritten while it is read is read again; each time somebody else made progress.
_READS_MAX = 20


def read(held: Held) -> Operation[Tail | None]:
    """A head and what is not held of its messages, all of one revision; None if there is no such session."""
    key = text("key", held.key, "KEY_INVALID")
    for attempt in range(1, _READS_MAX + 1):
        request = pb.GetSessionRequest(
            key=key, known_revision=held.revision, known_message_count=held.count
        )
        try:
            reply = yield from ask(GET, request)
        except NotFoundError:
            return None
        head, lines = head_of(reply.session), lines_of(reply.messages)
        tail = Tail(head, reply.start, lines, reply.cursor)
        if not reply.truncated:
            return tail
        rest = pb.ReadMessagesRequest(
            key=key, start=reply.next, limit=head.message_count - reply.next, known_revision=head.revision
        )
        try:
            blocks: list[pb.ReadMessagesResponse] = yield Rpc(READ, rest)
        except (ConflictError, NotFoundError, InvalidArgumentError):
            if attempt == _READS_MAX:
                raise
            continue  # rewritten, deleted or shortened since the first call
        for block in blocks:
            lines.extend(lines_of(block.messages))
        return tail
    raise AssertionError("the loop returns or raises")


def unseen(held: Held) -> Operation[Unseen]:
    """What a refused writer has not seen."""
    tail = yield from read(held)
    if tail is None:
        return Unseen(0, 0, [], rewritten=held.count > 0)
    messages = [decode(line) for line in tail.lines]
    return Unseen(tail.head.revision, tail.start, messages, rewritten=tail.start < held.count)


def head(key: str) -> Operation[Head | None]:
    """A head; None if there is no such session."""
    try:
        reply = yield from ask(GET, pb.GetSessionRequest(key=text("key", key, "KEY_INVALID"), last=0))
    except NotFoundError:
        return None
    return head_of(reply.session)


def info() -> Operation[ServerInfo]:
    """What serves."""
    reply = yield from ask(INFO, pb.GetServerInfoRequest())
    limits = reply.limits
    return ServerInfo(
        version=reply.version,
        store_id=reply.store_id,
        engine=reply.engine,
        durability=reply.durability,
        start_time=moment(reply.start_time),
        session_count=reply.session_count,
        limits=ServerLimits(
            key_bytes_max=limits.key_bytes_max,
            message_bytes_max=limits.message_bytes_max,
            message_depth_max=limits.message_depth_max,
            batch_messages_max=limits.batch_messages_max,
            batch_bytes_max=limits.batch_bytes_max,
            metadata_bytes_max=limits.metadata_bytes_max,
            page_size_max=limits.page_size_max,
            request_id_bytes_max=limits.request_id_bytes_max,
            window_calls_max=limits.window_calls_max,
            window_bytes_max=limits.window_bytes_max,
            window_request_ids_max=limits.window_request_ids_max,
            window_age_max=limits.window_age_max.ToTimedelta(),
            lease_ttl_min=limits.lease_ttl_min.ToTimedelta(),
            lease_ttl_max=limits.lease_ttl_max.ToTimedelta(),
        ),
        scrub=_scrub_of(reply.scrub) if reply.HasField("scrub") else None,
        clock_disbelief=(
            _disbelief_of(reply.clock_disbelief) if reply.HasField("clock_disbelief") else None
        ),
    )


def _disbelief_of(found: pb.ClockDisbelief) -> ClockDisbelief:
    return ClockDisbelief(
        moment(found.trusted_time), found.ahead.ToTimedelta(), found.confirmed_in.ToTimedelta()
    )


def _scrub_of(status: pb.ScrubStatus) -> ScrubStatus:
    ended = moment(status.last_pass_time) if status.HasField("last_pass_time") else None
    return ScrubStatus(
        status.bytes_verified, status.sessions_verified, status.sessions_damaged, status.passes, ended
    )


_ORDERS = {
    "key": pb.SESSION_ORDER_KEY,
    "key desc": pb.SESSION_ORDER_KEY_DESC,
    "update_time": pb.SESSION_ORDER_UPDATE_TIME,
    "update_time desc": pb.SESSION_ORDER_UPDATE_TIME_DESC,
}


@dataclass(slots=True)
class Listing:
    """A listing under way: `page` is the operation that reads its next page, as long as there is `more`."""

    request: pb.ListSessionsRequest
    more: bool = field(default=True)
    cursor: bytes = b""
    """Where a watch of what is listed goes on; from the first page on."""

    @classmethod
    def begin(
        cls, prefix: str, order_by: OrderBy, page_size: int, updated_since: datetime | None
    ) -> "Listing":
        """Check the arguments and begin."""
        if order_by not in _ORDERS:
            raise invalid("order_by", f"must be one of {', '.join(map(repr, _ORDERS))}, not {order_by!r}")
        return cls(
            pb.ListSessionsRequest(
                prefix=text("prefix", prefix),
                order=_ORDERS[order_by],
                page_size=integer("page_size", page_size, bits=32),
                updated_since=timestamp("updated_since", updated_since),
            )
        )

    def page(self) -> Operation[list[Head]]:
        """The next page."""
        reply = yield from ask(LIST, self.request)
        if not self.request.page_token:
            self.cursor = reply.cursor
        self.request.page_token = reply.next_page_token
        self.more = bool(reply.next_page_token)
        return [head_of(session) for session in reply.sessions]


# ------------------------------------------------------------------------------------- changes by key alone


def create(
    key: str,
    messages: Iterable[MessageInput],
    metadata: MessageInput | None,
    last_consolidated: int,
    create_time: datetime | None,
    expire_time: datetime | None,
    request_id: str | None,
    make: Callable[[Tail], Value],
) -> Operation[Value]:
    """Make a session that must not exist; `make` gets what is then held of it."""
    lines = encode(messages)
    stored = metadata_bytes({} if metadata is None else metadata)
    request = pb.CreateSessionRequest(
        key=text("key", key, "KEY_INVALID"),
        request_id=text("request_id", request_id or ""),
        messages=codec.join(lines),
        metadata=stored,
        last_consolidated=integer("last_consolidated", last_consolidated),
        create_time=timestamp("create_time", create_time),
        expire_time=timestamp("expires", expire_time),
    )

    def finish(reply: pb.CreateSessionResponse) -> Operation[Value]:
        result = reply.result
        updated = moment(result.update_time)
        created = request.create_time if request.HasField("create_time") else result.update_time
        made = Head(
            key,
            result.revision,
            result.message_count,
            result.last_consolidated,
            decode(stored),
            moment(created),
            updated,
            expire_time=end_of(result),
        )
        return done(make(Tail(made, 0, lines)))

    return change(CREATE, request, Held(key), finish)


def delete(
    held: Held,
    expected_revision: int | None,
    request_id: str | None,
    finish: Callable[[pb.DeleteSessionResponse], Operation[Written]],
    fencing_token: int = 0,
) -> Operation[Written]:
    """Remove a session."""
    request = pb.DeleteSessionRequest(
        key=text("key", held.key, "KEY_INVALID"),
        request_id=text("request_id", request_id or ""),
        expected_revision=optional("expected_revision", expected_revision),
        fencing_token=fencing_token,
    )
    return change(DELETE, request, held, finish)


def deleted(reply: pb.DeleteSessionResponse) -> Operation[Written]:
    """What the removal came to."""
    return done(written(reply.result))


def lease(key: str) -> Operation[Lease | None]:
    """The lease of a session that is in force."""
    reply = yield from ask(LEASE, pb.GetLeaseRequest(key=text("key", key, "KEY_INVALID")))
    return lease_of(reply.lease) if reply.HasField("lease") else None


# ----------------------------------------------------------------------------------- values, in and out


def encode(messages: Iterable[MessageInput]) -> list[bytes]:
    """Messages as lines. Raises InvalidArgumentError with the index of the first that is wrong."""
    if isinstance(messages, Mapping):
        raise invalid("messages", "must be messages, not one message: put it in a list")
    return [encode_one(message, index) for index, message in enumerate(messages)]


def encode_one(message: MessageInput, index: int) -> bytes:
    """One message as a line, without its end."""
    try:
        return codec.encode(message, index)
    except codec.MessageError as error:
        raise error_for(error.reason, str(error), error.metadata) from None


_WRAP = b'{"m": '


def metadata_bytes(metadata: MessageInput) -> bytes:
    """Metadata as JSON text.

    The codec writes it as a member of a message, since `_type` may say anything here.
    """
    if not isinstance(metadata, Mapping):
        text_ = f"metadata must be a dict, not {type(metadata).__name__}"
        raise error_for("METADATA_INVALID", text_, {"detail": text_})
    try:
        return codec.encode({"m": dict(metadata)}, -1)[len(_WRAP) : -1]
    except codec.MessageError as error:
        detail = error.metadata.get("detail", str(error)[:200])
        raise error_for("METADATA_INVALID", f"metadata: {error}", {"detail": detail}) from None


def decode(line: bytes) -> Message:
    """One object of the daemon's. Files from elsewhere may hold what Python cannot read: that is named."""
    try:
        return codec.decode(line)
    except codec.MessageError as error:
        told = f"the session holds what cannot be read here: {error}"
        raise error_for("DATA_LOSS", told, {"detail": str(error)[:200]}) from None


def lines_of(block: bytes) -> list[bytes]:
    """The lines of a block from the daemon."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def head_of(session: session_pb2.Session) -> Head:
    """A head from the wire."""
    return Head(
        session.key,
        session.revision,
        session.message_count,
        session.last_consolidated,
        decode(session.metadata or b"{}"),
        moment(session.create_time),
        moment(session.update_time),
        session.damage,
        end_of(session),
    )


def lease_of(lease: pb.Lease) -> Lease:
    """A lease from the wire."""
    return Lease(
        lease.key,
        lease.holder,
        lease.fencing_token,
        lease.mode == pb.LEASE_MODE_APPENDS_ALLOWED,
        lease.ttl.ToTimedelta().total_seconds(),
        lease.remaining.ToTimedelta().total_seconds(),
        moment(lease.acquire_time),
    )


def end_of(message: session_pb2.Session | session_pb2.WriteResult) -> datetime | None:
    """When a session ends by itself; None: never."""
    return moment(message.expire_time) if message.HasField("expire_time") else None


def written(result: session_pb2.WriteResult) -> Written:
    """What a change came to, from the wire."""
    return Written(
        result.revision,
        result.message_count,
        result.last_consolidated,
        moment(result.update_time),
        result.replayed,
    )


def moment(stamp: Timestamp) -> datetime:
    """A time from the wire, aware, UTC."""
    return stamp.ToDatetime(tzinfo=UTC)


def timestamp(name: str, value: datetime | None) -> Timestamp | None:
    """A time for the wire; a naive one is refused, because nobody knows which zone it means."""
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise invalid(name, f"must be a datetime with a timezone, not {value!r}")
    stamp = Timestamp()
    try:
        stamp.FromDatetime(value.astimezone(UTC))
    except (OverflowError, ValueError):
        raise invalid(name, f"must be within the years 1 to 9999 of UTC, not {value!r}") from None
    return stamp


def text(name: str, value: str, reason: str = "ARGUMENT_INVALID") -> str:
    """A string for the wire: one that UTF-8 can encode."""
    if not isinstance(value, str):
        raise invalid(name, f"must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        metadata = {"field": name, "index": str(error.start)}
        told = f"{name} holds half of a surrogate pair at character {error.start}, which UTF-8 cannot encode"
        raise error_for(reason, told, metadata) from None
    return value


def integer(name: str, value: int, bits: int = 64) -> int:
    """An integer for the wire: within its width. What it may be is for the daemon to say."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(name, f"must be an integer, not {type(value).__name__}")
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise invalid(name, f"is beyond {bits} bits")
    return value


_SECONDS_MAX = 10**9


def seconds(name: str, value: float) -> Duration:
    """A time span for the wire, given in seconds: 0 or more."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise invalid(name, f"must be a number of seconds, not {type(value).__name__}")
    if not isfinite(value) or not 0 <= value <= _SECONDS_MAX:
        raise invalid(name, f"must be 0 to {_SECONDS_MAX} seconds, not {value!r}")
    span = Duration()
    span.FromNanoseconds(round(value * 10**9))
    return span


def optional(name: str, value: int | None) -> int | None:
    """An integer for the wire, or nothing."""
    return None if value is None else integer(name, value)


def invalid(name: str, detail: str) -> InvalidArgumentError:
    """The refusal of an argument that cannot even be sent."""
    return cast(
        "InvalidArgumentError",
        error_for("ARGUMENT_INVALID", f"{name} {detail}", {"field": name, "detail": detail[:200]}),
    )


def sequence(name: str, value: Sequence[MessageInput] | None) -> Sequence[MessageInput]:
    """The list that an edit gave back."""
    if not isinstance(value, list | tuple):
        raise invalid(name, f"must give a list of messages or None, not {type(value).__name__}")
    return value

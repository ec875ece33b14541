"""From a mutation on the wire to a mutation of the rules, if it is well formed.

Pure: protobuf in, `engine.Request` out, or `Refused` with the reason, the offending value and the limit.
Nothing here knows any session's state, so what passes may still be refused by the rules. It knows no grpc and
does no I/O.

Checked in this order: key, expected_revision, messages, metadata, the other arguments, call identity,
request_id, fencing_token.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NoReturn

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from sessionstore import codec
from sessionstore.v1 import session_pb2, session_store_pb2

from sessionstored import rules
from sessionstored.engine import Refused, Request
from sessionstored.retention import NEVER_US
from sessionstored.windows import Call

MutationRequest = (
    session_store_pb2.CreateSessionRequest
    | session_store_pb2.AppendMessagesRequest
    | session_store_pb2.ReplaceMessagesRequest
    | session_store_pb2.PopMessageRequest
    | session_store_pb2.UpdateSessionRequest
    | session_store_pb2.ForkSessionRequest
    | session_store_pb2.DeleteSessionRequest
)

CLIENT_ID_BYTES_MAX = 64
# The years 1 to 9999, which a google.protobuf.Timestamp holds.
_TIMESTAMP_SECONDS = range(-62_135_596_800, 253_402_300_800)
_NANOS = range(1_000_000_000)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits that a request can be held to without knowing a session."""

    key_bytes_max: int = 512
    metadata_bytes_max: int = 256 * 1024
    page_size_max: int = 1000
    request_id_bytes_max: int = 256
    lease_ttl_s_min: float = 1.0
    lease_ttl_s_max: float = 3600.0
    watch_keys_max: int = 10_000
    messages: codec.Limits = field(default_factory=codec.Limits)


def refuse(reason: str, text: str, **metadata: object) -> NoReturn:
    """Raise `Refused`: an ErrorReason's name without prefix, a sentence, and its metadata."""
    raise Refused(rules.Refusal(reason, text, {name: str(value) for name, value in metadata.items()}))


def to_request(message: MutationRequest, bounds: Bounds, deadline_s: float | None = None) -> Request:
    """Check a mutation and make it a request to the engine.

    Args:
        message: the protobuf request; its call identity is taken out of it.
        bounds: the limits in force.
        deadline_s: when the caller stops waiting, on time.monotonic(); None means never.

    Returns:
        The request, with a digest of all but the call identity if a retry has to be told from a new call.

    Raises:
        Refused: something is malformed or over a limit.

    """
    mutation = _CONVERTERS[type(message)](message, bounds)
    call = check_call(message.call) if message.HasField("call") else None
    size = len(message.request_id.encode())
    if size > bounds.request_id_bytes_max:
        refuse(
            "REQUEST_ID_INVALID",
            f"request_id has {size} bytes; the limit is {bounds.request_id_bytes_max}",
            size_bytes=size,
            limit_bytes=bounds.request_id_bytes_max,
        )
    digest = digest_of(message) if call or message.request_id else b""
    token = check_token(message.fencing_token)
    return Request(mutation, call, message.request_id, digest, deadline_s, fencing_token=token)


# arguments --------------------------------------------------------------------------------------------------


def check_key(key: str, bounds: Bounds, field: str = "key") -> str:
    """Give the key if it may name a session. Raises Refused: KEY_EMPTY, KEY_TOO_LONG, KEY_INVALID."""
    if not key:
        refuse("KEY_EMPTY", f"{field} is empty; a session needs a name", field=field)
    size = len(key.encode())
    if size > bounds.key_bytes_max:
        refuse(
            "KEY_TOO_LONG",
            f"{field} has {size} bytes; the limit is {bounds.key_bytes_max}",
            field=field,
            size_bytes=size,
            limit_bytes=bounds.key_bytes_max,
        )
    control = _CONTROL.search(key)
    if control:
        refuse(
            "KEY_INVALID",
            f"{field} holds the control character U+{ord(control[0]):04X}",
            field=field,
            index=control.start(),
        )
    return key


def check_count(value: int, field: str) -> int:
    """Give a count or size that must be 0 or more. Raises Refused: LIMIT_NEGATIVE."""
    if value < 0:
        refuse("LIMIT_NEGATIVE", f"{field} is {value}; it must be 0 or more", field=field, value=value)
    return value


def check_revision(value: int, field: str) -> int:
    """Give a revision that a caller knows. Raises Refused: ARGUMENT_INVALID."""
    if value < 0:
        refuse(
            "ARGUMENT_INVALID",
            f"{field} is {value}; a revision is 0 or more",
            field=field,
            detail=f"{value} is negative",
        )
    return value


def check_token(token: int) -> int:
    """Give a fencing token, or 0 for none. Raises Refused: ARGUMENT_INVALID."""
    if token < 0:
        refuse(
            "ARGUMENT_INVALID",
            f"fencing_token is {token}; it is that of a lease, or 0",
            field="fencing_token",
            detail=f"{token} is negative",
        )
    return token


def timestamp_us(stamp: Timestamp, field: str) -> int:
    """Microseconds since the epoch, rounded up. Raises Refused: ARGUMENT_INVALID."""
    if stamp.seconds not in _TIMESTAMP_SECONDS or stamp.nanos not in _NANOS:
        refuse(
            "ARGUMENT_INVALID",
            f"{field} is no timestamp of the years 1 to 9999",
            field=field,
            detail=f"seconds {stamp.seconds}, nanos {stamp.nanos}",
        )
    return stamp.seconds * 1_000_000 - (-stamp.nanos // 1000)


def _expected_revision(message: MutationRequest) -> int | None:
    if not message.HasField("expected_revision"):
        return None
    return check_revision(message.expected_revision, "expected_revision")


def _messages(block: bytes, bounds: Bounds) -> Sequence[bytes]:
    try:
        return codec.split_block(block, bounds.messages)
    except codec.MessageError as error:
        raise Refused(rules.Refusal(error.reason, str(error), error.metadata)) from error


def _metadata(text: bytes, bounds: Bounds) -> bytes:
    if not text:
        return rules.EMPTY_METADATA
    if len(text) > bounds.metadata_bytes_max:
        refuse(
            "METADATA_TOO_LARGE",
            f"metadata has {len(text)} bytes; the limit is {bounds.metadata_bytes_max}",
            size_bytes=len(text),
            limit_bytes=bounds.metadata_bytes_max,
        )
    try:
        # Its size is checked; a message's size limit may be the lower one, and is none of its business.
        return codec.check_object(text, _depth_only(bounds))
    except codec.MessageError as error:
        refuse("METADATA_INVALID", f"metadata is refused: {error}", detail=error)


def _depth_only(bounds: Bounds) -> codec.Limits:
    return codec.Limits(
        message_bytes_max=bounds.metadata_bytes_max, message_depth_max=bounds.messages.message_depth_max
    )


# call identity ----------------------------------------------------------------------------------------------


def check_call(call: session_pb2.CallIdentity) -> Call:
    """Give a call identity. Raises Refused: CALL_INVALID."""
    size = len(call.client_id.encode())
    if not 1 <= size <= CLIENT_ID_BYTES_MAX:
        _call_invalid("client_id", f"it has {size} bytes; 1 to {CLIENT_ID_BYTES_MAX} are allowed")
    if call.sequence < 1:
        _call_invalid("sequence", f"it is {call.sequence}; a client's first call has 1")
    if not 0 <= call.answered_through < call.sequence:
        _call_invalid(
            "answered_through",
            f"it is {call.answered_through}; it is 0 or more, and below the sequence ({call.sequence})",
        )
    return Call(call.client_id, call.sequence, call.answered_through, _age_s(call.age))


def _age_s(age: Duration) -> float:
    if age.seconds < 0 or age.nanos not in _NANOS:
        _call_invalid("age", f"it is {age.seconds} s and {age.nanos} ns; it must be 0 or more")
    return age.seconds + age.nanos / 1e9


def _call_invalid(name: str, detail: str) -> NoReturn:
    refuse("CALL_INVALID", f"call.{name} is malformed: {detail}", field=f"call.{name}", detail=detail)


def digest_of(message: MutationRequest | session_store_pb2.AcquireLeaseRequest) -> bytes:
    """Tell a repeated call from another one under the same name: all counts but the call identity."""
    message.ClearField("call")
    digest = blake2b(message.DESCRIPTOR.name.encode() + b"\0", digest_size=8)
    digest.update(message.SerializeToString(deterministic=True))
    return digest.digest()


# mutations --------------------------------------------------------------------------------------------------


def _create(message: session_store_pb2.CreateSessionRequest, bounds: Bounds) -> rules.Create:
    key = check_key(message.key, bounds)
    expected = _expected_revision(message)
    if expected:
        refuse(
            "ARGUMENT_INVALID",
            f"expected_revision is {expected}, but a session to create must not exist: leave it out, or 0",
            field="expected_revision",
            detail=f"{expected} is not 0",
        )
    return rules.Create(
        key,
        _messages(message.messages, bounds),
        _metadata(message.metadata, bounds),
        message.last_consolidated,
        timestamp_us(message.create_time, "create_time") if message.HasField("create_time") else None,
        expected,
        _expire_time_us(message, 0),
    )


def _expire_time_us(
    message: session_store_pb2.CreateSessionRequest | session_store_pb2.UpdateSessionRequest, absent: int
) -> int:
    """The expire_time, or `absent`. One at or before the epoch is a past one like any other."""
    if not message.HasField("expire_time"):
        return absent
    return max(1, timestamp_us(message.expire_time, "expire_time"))


def _append(message: session_store_pb2.AppendMessagesRequest, bounds: Bounds) -> rules.Append:
    key = check_key(message.key, bounds)
    expected = _expected_revision(message)
    lines = _messages(message.messages, bounds)
    if not lines:
        refuse("BATCH_EMPTY", "messages is empty; an append adds at least one")
    return rules.Append(key, lines, expected)


def _replace(message: session_store_pb2.ReplaceMessagesRequest, bounds: Bounds) -> rules.Replace:
    key = check_key(message.key, bounds)
    expected = _expected_revision(message)
    lines = _messages(message.messages, bounds)
    deleted = check_count(message.delete_count, "delete_count") if message.HasField("delete_count") else None
    if message.allow_appends and (expected is None or deleted is None):
        missing = "expected_revision" if expected is None else "delete_count"
        refuse(
            "ARGUMENT_INVALID",
            f"allow_appends needs {missing}: else it would not say what may be removed",
            field="allow_appends",
            detail=f"{missing} is missing",
        )
    return rules.Replace(key, message.start, deleted, lines, expected, message.allow_appends)


def _pop(message: session_store_pb2.PopMessageRequest, bounds: Bounds) -> rules.Pop:
    return rules.Pop(check_key(message.key, bounds), _expected_revision(message))


def _update(message: session_store_pb2.UpdateSessionRequest, bounds: Bounds) -> rules.Update:
    key = check_key(message.key, bounds)
    expected = _expected_revision(message)
    metadata = _metadata(message.metadata, bounds)
    # Each once, in the mask's order, which is the order of members that are new.
    paths = list(dict.fromkeys(message.update_mask.paths))
    names = [path.removeprefix("metadata.") for path in paths if path.startswith("metadata.")]
    unknown = [
        path
        for path in paths
        if path not in ("metadata", "last_consolidated", "expire_time") and not path.startswith("metadata.")
    ]
    if unknown or not paths:
        _mask_invalid(unknown[0] if unknown else "")
    return rules.Update(
        key,
        metadata if "metadata" in paths else None,
        _members(metadata, names) if names else {},
        message.last_consolidated if "last_consolidated" in paths else None,
        expected,
        _expire_time_us(message, NEVER_US) if "expire_time" in paths else None,
    )


def _mask_invalid(path: str) -> NoReturn:
    wrong = f"names the unknown path {path[:200]!r}" if path else "is empty"
    refuse(
        "FIELD_MASK_INVALID",
        f'update_mask {wrong}; it names "metadata", "metadata.NAME", "last_consolidated" or "expire_time"',
        path=path,
    )


def _members(metadata: bytes, names: Sequence[str]) -> dict[str, bytes | None]:
    """Each name's JSON text as it came, or None for a member that is to be removed."""
    given = rules.split_members(metadata)
    return {name: given.get(name) for name in names}


def _fork(message: session_store_pb2.ForkSessionRequest, bounds: Bounds) -> rules.Fork:
    key = check_key(message.key, bounds)
    source = check_key(message.source_key, bounds, "source_key")
    at = check_count(message.at, "at") if message.HasField("at") else None
    return rules.Fork(key, source, at, _expected_revision(message))


def _delete(message: session_store_pb2.DeleteSessionRequest, bounds: Bounds) -> rules.Delete:
    return rules.Delete(check_key(message.key, bounds), _expected_revision(message))


_CONVERTERS: dict[type, Callable[..., rules.Mutation]] = {
    session_store_pb2.CreateSessionRequest: _create,
    session_store_pb2.AppendMessagesRequest: _append,
    session_store_pb2.ReplaceMessagesRequest: _replace,
    session_store_pb2.PopMessageRequest: _pop,
    session_store_pb2.UpdateSessionRequest: _update,
    session_store_pb2.ForkSessionRequest: _fork,
    session_store_pb2.DeleteSessionRequest: _delete,
}

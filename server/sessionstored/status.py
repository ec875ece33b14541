"""The one table from error reasons to gRPC status codes, and how a refusal travels.

A refusal becomes one google.rpc.Status with one google.rpc.ErrorInfo. It travels in HTTP/2 trailers, which
start to fail at 8 KB, so everything in it has a bound: long values are cut, and whoever needs more reads the
session.
"""

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from sessionstored.rules import Refusal

DOMAIN = "sessionstore.v1"
DETAILS_KEY = "grpc-status-details-bin"
INFO_BYTES_MAX = 4096
# A key of 512 bytes fits whole. The message travels twice, once percent-encoded, which makes a Cyrillic text
# three times as long.
_VALUE_BYTES_MAX = 1024
_TEXT_BYTES_MAX = 1024

_Code = grpc.StatusCode
CODES: Mapping[str, grpc.StatusCode] = {
    "KEY_EMPTY": _Code.INVALID_ARGUMENT,
    "KEY_TOO_LONG": _Code.INVALID_ARGUMENT,
    "KEY_INVALID": _Code.INVALID_ARGUMENT,
    "MESSAGE_NOT_JSON": _Code.INVALID_ARGUMENT,
    "MESSAGE_NOT_OBJECT": _Code.INVALID_ARGUMENT,
    "MESSAGE_NOT_FINITE": _Code.INVALID_ARGUMENT,
    "MESSAGE_LONE_SURROGATE": _Code.INVALID_ARGUMENT,
    "MESSAGE_RESERVED_TYPE": _Code.INVALID_ARGUMENT,
    "MESSAGE_TOO_LARGE": _Code.INVALID_ARGUMENT,
    "MESSAGE_TOO_DEEP": _Code.INVALID_ARGUMENT,
    "BATCH_EMPTY": _Code.INVALID_ARGUMENT,
    "BATCH_TOO_MANY": _Code.INVALID_ARGUMENT,
    "BATCH_TOO_LARGE": _Code.INVALID_ARGUMENT,
    "METADATA_INVALID": _Code.INVALID_ARGUMENT,
    "METADATA_TOO_LARGE": _Code.INVALID_ARGUMENT,
    "INDEX_OUT_OF_RANGE": _Code.OUT_OF_RANGE,
    "LAST_CONSOLIDATED_OUT_OF_RANGE": _Code.OUT_OF_RANGE,
    "LIMIT_NEGATIVE": _Code.INVALID_ARGUMENT,
    "PAGE_SIZE_TOO_LARGE": _Code.INVALID_ARGUMENT,
    "PAGE_TOKEN_INVALID": _Code.INVALID_ARGUMENT,
    "FIELD_MASK_INVALID": _Code.INVALID_ARGUMENT,
    "ARGUMENT_INVALID": _Code.INVALID_ARGUMENT,
    "SESSION_NOT_FOUND": _Code.NOT_FOUND,
    "SESSION_EXISTS": _Code.ALREADY_EXISTS,
    "REVISION_CONFLICT": _Code.ABORTED,
    "LEASE_HELD": _Code.FAILED_PRECONDITION,
    "LEASE_LOST": _Code.FAILED_PRECONDITION,
    "LEASE_TTL_OUT_OF_RANGE": _Code.INVALID_ARGUMENT,
    "CURSOR_INVALID": _Code.INVALID_ARGUMENT,
    "CURSOR_EXPIRED": _Code.OUT_OF_RANGE,
    "WATCHER_TOO_SLOW": _Code.RESOURCE_EXHAUSTED,
    "CALL_INVALID": _Code.INVALID_ARGUMENT,
    "CALL_EXPIRED": _Code.FAILED_PRECONDITION,
    "CALL_REUSED": _Code.INVALID_ARGUMENT,
    "REQUEST_ID_INVALID": _Code.INVALID_ARGUMENT,
    "REQUEST_ID_REUSED": _Code.INVALID_ARGUMENT,
    "DATA_LOSS": _Code.DATA_LOSS,
    "STORAGE_FULL": _Code.RESOURCE_EXHAUSTED,
    "OVERLOADED": _Code.RESOURCE_EXHAUSTED,
    "SHUTTING_DOWN": _Code.UNAVAILABLE,
    "EXPIRED_IN_QUEUE": _Code.DEADLINE_EXCEEDED,
    "OUTCOME_UNKNOWN": _Code.UNKNOWN,
    "INTERNAL": _Code.INTERNAL,
    "UNSUPPORTED": _Code.UNIMPLEMENTED,
}


def code(refusal: Refusal) -> grpc.StatusCode:
    """The gRPC code of a refusal."""
    return CODES[refusal.reason]


def to_status(refusal: Refusal) -> status_pb2.Status:
    """The google.rpc.Status of a refusal, its ErrorInfo at most 4 KiB."""
    metadata = {name: cut(value, _VALUE_BYTES_MAX) for name, value in refusal.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=metadata)
    while info.ByteSize() > INFO_BYTES_MAX:
        longest = max(metadata, key=lambda name: len(metadata[name].encode()))
        metadata[longest] = cut(metadata[longest], len(metadata[longest].encode()) // 2)
        info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=metadata)
    details = any_pb2.Any()
    details.Pack(info)
    number: int = code(refusal).value[0]
    return status_pb2.Status(code=number, message=cut(refusal.message, _TEXT_BYTES_MAX), details=[details])


def cut(text: str, bytes_max: int) -> str:
    """The text, or as much of its beginning as fits, with an ellipsis; never half a character."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= bytes_max:
        return encoded.decode()
    return encoded[: max(0, bytes_max - 3)].decode("utf-8", "ignore") + "…"

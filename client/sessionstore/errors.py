"""Errors: one class for each thing that a caller can do about it, one registry from reason to class.

    SessionStoreError                       all of these
    ├── InvalidArgumentError                (ValueError) what was asked for is malformed; nothing was stored
    │   └── TooLargeError                   (and LimitError) a size or a count is over its limit
    ├── LimitError                          a bound of the daemon or of this client is reached; try later
    │   └── TooLargeError
    ├── NotFoundError                       (LookupError) no session has this key
    ├── AlreadyExistsError                  a session with this key exists already
    ├── ConflictError                       somebody else changed the session: read it again, then decide
    ├── LeaseHeldError                      somebody else has the lease: wait, or try again later
    ├── LeaseLostError                      your lease is over: nothing was stored
    ├── CursorExpiredError                  what came after a cursor is not kept any more: read anew
    ├── DataLossError                       the session is damaged on disk; its operator must repair it
    ├── StorageFullError                    the daemon's disk is full; nothing was stored
    ├── CallExpiredError                    sent again too late to tell what became of it; not applied now
    ├── UnavailableError                    (ConnectionError) no daemon answered; nothing was stored
    │   └── DeadlineExceededError           (TimeoutError) not in time; nothing was stored
    ├── OutcomeUnknownError                 (TimeoutError) the change may be applied, or not: use `retry`
    ├── UnsupportedError                    what serves there cannot do this at all
    └── InternalError                       a defect of the daemon; its log has the trace under `incident`

The rules:

* What is raised says whether something was stored. Only OutcomeUnknownError and CallExpiredError leave
  that open; every other error of a change means that it was not applied.
* `reason` is the name of an ErrorReason of the contract without its prefix. Refusals that carry none,
  such as a broken connection, have ``GRPC_`` and the status code's name; refusals of this client have a
  reason of `CLIENT_REASONS`.
* `ERRORS` is total over ErrorReason. A reason of a newer daemon falls back to the class of its status code.

This module imports neither grpc nor protobuf until it has an RPC's error to read. It decides nothing
about retries.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

DOMAIN = "sessionstore.v1"


class SessionStoreError(Exception):
    """What every error of this package is. ``str()`` says what is wrong and what to do.

    ``reason`` is a machine-readable name; ``metadata`` holds strings: the keys that ``errors.proto``
    names for the reason. Errors can be pickled; a copy from another process has no `retry` and no
    `fetch`.
    """

    def __init__(self, text: str, reason: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.reason = reason
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self.reason, self.metadata)

    def _number(self, name: str) -> int:
        """A count or a revision of the metadata; 0 if it is not there."""
        text = self.metadata.get(name, "")
        return int(text) if text.removeprefix("-").isdecimal() else 0


class InvalidArgumentError(SessionStoreError, ValueError):
    """What was asked for is malformed. Nothing was stored; sending the same again does not help.

    For a message, ``index`` is its position in the batch.
    """

    @property
    def index(self) -> int | None:
        """The position of the offending message or argument, if the error has one."""
        return self._number("index") if "index" in self.metadata else None


class LimitError(SessionStoreError):
    """A bound is reached, and nothing was stored.

    The daemon is overloaded, or this client has too many open calls.
    """


class TooLargeError(LimitError, InvalidArgumentError):
    """A size or a count is over its limit; ``metadata`` has both. Nothing was stored.

    Send less, or in parts.
    """


class NotFoundError(SessionStoreError, LookupError):
    """No session has this key."""

    @property
    def key(self) -> str:
        """The key that was asked for."""
        return self.metadata.get("key", "")


class AlreadyExistsError(SessionStoreError):
    """A session with this key exists already. Nothing was stored."""

    @property
    def key(self) -> str:
        """The key that is taken."""
        return self.metadata.get("key", "")

    @property
    def revision(self) -> int:
        """The existing session's revision."""
        return self._number("revision")

    @property
    def message_count(self) -> int:
        """How many messages the existing session has."""
        return self._number("message_count")


class _ContinuableError(SessionStoreError):
    """An error that knows how to go on: an operation, and the client that runs it."""

    _operation: Callable[[], Any] | None = None
    _run: Callable[[Any], Any] | None = None

    def _go_on(self) -> Any:
        if self._operation is None or self._run is None:
            raise RuntimeError("this error has no client to go on with: it was copied, or raised by hand")
        return self._run(self._operation())


class ConflictError(_ContinuableError):
    """The session is not at the expected revision: somebody else changed it. Nothing was stored.

    Read the session again (`fetch`, or the handle's `refresh`), then decide. Sending the same again does
    not help. ``edited`` is what an edit would have stored: for a block, the very list that it gave out, with
    all that was done to it; None for other changes. A pickled copy has it, too.
    """

    edited: list[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), {"edited": self.edited}

    @property
    def key(self) -> str:
        """The session's key."""
        return self.metadata.get("key", "")

    @property
    def expected_revision(self) -> int:
        """The revision that was expected."""
        return self._number("expected_revision")

    @property
    def revision(self) -> int:
        """The revision that the session was at; 0 if it did not exist."""
        return self._number("revision")

    @property
    def message_count(self) -> int:
        """How many messages the session had; 0 if it did not exist."""
        return self._number("message_count")

    def fetch(self) -> Any:
        """Read what the refused writer has not seen: an `Unseen`; on an async client, an awaitable of one.

        Nothing is read before this is called, and each call reads anew. If what the writer held was
        rewritten, it gives everything and says so (`rewritten`); if the session was removed, it gives no
        messages and says so (`exists`). The handle is left as it is. Raises UnavailableError and
        DataLossError.
        """
        return self._go_on()


class LeaseHeldError(SessionStoreError):
    """Somebody else has a lease of the session, and it keeps this from being done. Nothing was stored.

    Wait for it (`wait=`), or try again later.
    """

    @property
    def key(self) -> str:
        """The session's key."""
        return self.metadata.get("key", "")

    @property
    def holder(self) -> str:
        """What the holder calls itself."""
        return self.metadata.get("holder", "")

    @property
    def allows_appends(self) -> bool:
        """Whether others may append meanwhile."""
        return self.metadata.get("mode", "") == "appends_allowed"

    @property
    def age_s(self) -> float:
        """How long ago the lease was acquired, in seconds."""
        return self._number("age_ms") / 1000

    @property
    def expires_in_s(self) -> float:
        """In how many seconds it is over, unless it is renewed."""
        return self._number("expires_in_ms") / 1000


class LeaseLostError(SessionStoreError):
    """The lease is not in force any more: it ran out, was released, or somebody else has one.

    Nothing was stored. What was read under the lease may be out of date: acquire a new one, and read again.
    """

    @property
    def key(self) -> str:
        """The session's key."""
        return self.metadata.get("key", "")

    @property
    def fencing_token(self) -> int:
        """The token of the lease that is over."""
        return self._number("fencing_token")


class CursorExpiredError(SessionStoreError):
    """What came right after a cursor is not kept any more.

    Read the sessions again, and watch from the cursor that comes with them; `store.watch` does so by itself.
    """


class DataLossError(SessionStoreError):
    """The session is damaged on disk, and is not served rather than served wrong.

    Its operator must repair it.
    """

    @property
    def key(self) -> str:
        """The damaged session's key."""
        return self.metadata.get("key", "")

    @property
    def file(self) -> str:
        """The damaged file, on the daemon's machine."""
        return self.metadata.get("file", "")

    @property
    def line(self) -> int:
        """The number of the first damaged line; 0 if it is not known."""
        return self._number("line")


class StorageFullError(SessionStoreError):
    """The daemon's disk is full. Nothing was stored; it serves again as soon as there is space."""


class CallExpiredError(SessionStoreError):
    """A change was sent again too late for the daemon to tell whether it was applied. It was not applied now.

    Whether an earlier copy was is not known: read the session to find out.
    """


class UnavailableError(SessionStoreError, ConnectionError):
    """No daemon answered in time, or it is stopping. Nothing was stored: the call may be made again."""


class DeadlineExceededError(UnavailableError, TimeoutError):
    """The answer did not come in time, and nothing was stored: the call may be made again."""


class OutcomeUnknownError(_ContinuableError, TimeoutError):
    """A change was sent, and no answer came: it may be applied, or not, or still be applied later.

    Making the call anew could apply it twice; `retry` cannot.
    """

    def retry(self) -> Any:
        """Send the very same call again: it is applied once, however often it is sent.

        Returns what the call would have returned; on an async client, an awaitable of it. It works for 24
        hours of the daemon's service, over restarts of the daemon, and until 1,024 later calls of this
        client. Raises OutcomeUnknownError again if it still cannot be known, CallExpiredError when it is
        too late, and what the call itself raises.
        """
        return self._go_on()


class UnsupportedError(SessionStoreError):
    """What serves there cannot do this at all: another engine or a newer daemon is needed."""


class InternalError(SessionStoreError):
    """A defect of the daemon, or something that is no session store; the daemon's log has the trace."""

    @property
    def incident(self) -> str:
        """The name under which the daemon's log has the trace."""
        return self.metadata.get("incident", "")


ERRORS: dict[str, type[SessionStoreError]] = {
    "KEY_EMPTY": InvalidArgumentError,
    "KEY_TOO_LONG": TooLargeError,
    "KEY_INVALID": InvalidArgumentError,
    "MESSAGE_NOT_JSON": InvalidArgumentError,
    "MESSAGE_NOT_OBJECT": InvalidArgumentError,
    "MESSAGE_NOT_FINITE": InvalidArgumentError,
    "MESSAGE_LONE_SURROGATE": InvalidArgumentError,
    "MESSAGE_RESERVED_TYPE": InvalidArgumentError,
    "MESSAGE_TOO_LARGE": TooLargeError,
    "MESSAGE_TOO_DEEP": TooLargeError,
    "BATCH_EMPTY": InvalidArgumentError,
    "BATCH_TOO_MANY": TooLargeError,
    "BATCH_TOO_LARGE": TooLargeError,
    "METADATA_INVALID": InvalidArgumentError,
    "METADATA_TOO_LARGE": TooLargeError,
    "INDEX_OUT_OF_RANGE": InvalidArgumentError,
    "LAST_CONSOLIDATED_OUT_OF_RANGE": InvalidArgumentError,
    "LIMIT_NEGATIVE": InvalidArgumentError,
    "PAGE_SIZE_TOO_LARGE": TooLargeError,
    "PAGE_TOKEN_INVALID": InvalidArgumentError,
    "FIELD_MASK_INVALID": InvalidArgumentError,
    "ARGUMENT_INVALID": InvalidArgumentError,
    "SESSION_NOT_FOUND": NotFoundError,
    "SESSION_EXISTS": AlreadyExistsError,
    "REVISION_CONFLICT": ConflictError,
    "LEASE_HELD": LeaseHeldError,
    "LEASE_LOST": LeaseLostError,
    "LEASE_TTL_OUT_OF_RANGE": InvalidArgumentError,
    "CURSOR_INVALID": InvalidArgumentError,
    "CURSOR_EXPIRED": CursorExpiredError,
    "WATCHER_TOO_SLOW": LimitError,
    "CALL_INVALID": InvalidArgumentError,
    "CALL_EXPIRED": CallExpiredError,
    "CALL_REUSED": InvalidArgumentError,
    "REQUEST_ID_INVALID": TooLargeError,
    "REQUEST_ID_REUSED": InvalidArgumentError,
    "DATA_LOSS": DataLossError,
    "STORAGE_FULL": StorageFullError,
    "OVERLOADED": LimitError,
    "SHUTTING_DOWN": UnavailableError,
    "EXPIRED_IN_QUEUE": DeadlineExceededError,
    "OUTCOME_UNKNOWN": OutcomeUnknownError,
    "INTERNAL": InternalError,
    "UNSUPPORTED": UnsupportedError,
}
"""The class of each ErrorReason, by its name without prefix. Total."""

CLIENT_REASONS: dict[str, type[SessionStoreError]] = {
    "NOT_CONNECTED": UnavailableError,
    "TOO_MANY_CALLS": LimitError,
}
"""The class of each refusal that this client makes itself, before anything is sent."""

_CODES: dict[str, type[SessionStoreError]] = {
    "CANCELLED": UnavailableError,
    "UNKNOWN": UnavailableError,
    "INVALID_ARGUMENT": InvalidArgumentError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": AlreadyExistsError,
    "RESOURCE_EXHAUSTED": LimitError,
    "ABORTED": ConflictError,
    "OUT_OF_RANGE": InvalidArgumentError,
    "UNAVAILABLE": UnavailableError,
    "DATA_LOSS": DataLossError,
    "UNIMPLEMENTED": UnsupportedError,
}
"""The class of a refusal by its status code, for reasons that this client does not know.

Else InternalError.
"""


def error_for(reason: str, text: str, metadata: Mapping[str, str] | None = None) -> SessionStoreError:
    """The error of a reason of `ERRORS` or `CLIENT_REASONS`."""
    cls = ERRORS.get(reason) or CLIENT_REASONS[reason]
    return cls(text, reason, metadata)


def from_rpc_error(error: "grpc.RpcError") -> SessionStoreError:
    """The error that an RPC ended with, by its ErrorInfo if it has one, else by its status code.

    ``error`` is what grpc or grpc.aio raised. The result has it as its cause.
    """
    code = error.code().name
    text = error.details() or ""
    info = _error_info(error)
    if info is None:
        cls = _CODES.get(code, InternalError)
        found = cls(f"{text or 'the call failed'} ({code})", f"GRPC_{code}")
    else:
        reason, metadata = info
        found = (ERRORS.get(reason) or _CODES.get(code, InternalError))(text, reason, metadata)
    found.__cause__ = error
    return found


def _error_info(error: "grpc.RpcError") -> tuple[str, dict[str, str]] | None:
    """Reason and metadata of the contract's ErrorInfo; None if there is none that can be read."""
    from google.protobuf.message import DecodeError
    from google.rpc.error_details_pb2 import ErrorInfo  # type: ignore[import-untyped]
    from grpc_status import rpc_status  # type: ignore[import-untyped]

    try:
        status: Status | None = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            info = ErrorInfo()
            if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                return info.reason, dict(info.metadata)
    except (ValueError, DecodeError):  # details that contradict the status, or are none: a proxy's, not ours
        return None
    return None

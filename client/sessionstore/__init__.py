"""sessionstore: durable conversation sessions for agents.

    from sessionstore import SessionStore

    with SessionStore() as store:
        session = store.session("telegram:42")
        session.append({"role": "user", "content": "hi"})

Names are loaded on first use, so that ``sessionstore.codec`` alone loads neither the client nor grpc.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sessionstore._awatch import AsyncWatch
    from sessionstore._events import LeaseChanged, SessionChanged, SessionDeleted, WatchEvent
    from sessionstore._types import (
        KEEP,
        REMOVE,
        Appended,
        ClockDisbelief,
        Head,
        Lease,
        Message,
        ScrubStatus,
        ServerInfo,
        ServerLimits,
        Unseen,
        Written,
    )
    from sessionstore._watch import Watch
    from sessionstore.aio import AsyncSessionHandle, AsyncSessionStore, AsyncTurn
    from sessionstore.client import SessionHandle, SessionStore, Turn
    from sessionstore.errors import (
        AlreadyExistsError,
        CallExpiredError,
        ConflictError,
        CursorExpiredError,
        DataLossError,
        DeadlineExceededError,
        InternalError,
        InvalidArgumentError,
        LeaseHeldError,
        LeaseLostError,
        LimitError,
        NotFoundError,
        OutcomeUnknownError,
        SessionStoreError,
        StorageFullError,
        TooLargeError,
        UnavailableError,
        UnsupportedError,
    )

_TYPES = (
    "KEEP", "REMOVE", "Appended", "ClockDisbelief", "Head", "Lease", "Message", "ScrubStatus", "ServerInfo",
    "ServerLimits", "Unseen", "Written",
)  # fmt: skip
_EVENTS = ("LeaseChanged", "SessionChanged", "SessionDeleted", "WatchEvent")
_ERRORS = (
    "AlreadyExistsError", "CallExpiredError", "ConflictError", "CursorExpiredError", "DataLossError",
    "DeadlineExceededError", "InternalError", "InvalidArgumentError", "LeaseHeldError", "LeaseLostError",
    "LimitError", "NotFoundError", "OutcomeUnknownError", "SessionStoreError", "StorageFullError",
    "TooLargeError", "UnavailableError", "UnsupportedError",
)  # fmt: skip
_HOMES = {
    **dict.fromkeys(_TYPES, "sessionstore._types"),
    **dict.fromkeys(_EVENTS, "sessionstore._events"),
    **dict.fromkeys(_ERRORS, "sessionstore.errors"),
    "AsyncSessionHandle": "sessionstore.aio",
    "AsyncSessionStore": "sessionstore.aio",
    "AsyncTurn": "sessionstore.aio",
    "SessionHandle": "sessionstore.client",
    "SessionStore": "sessionstore.client",
    "Turn": "sessionstore.client",
    "AsyncWatch": "sessionstore._awatch",
    "Watch": "sessionstore._watch",
}

__all__ = [
    "KEEP", "REMOVE", "AlreadyExistsError", "Appended", "AsyncSessionHandle", "AsyncSessionStore",
    "AsyncTurn", "AsyncWatch", "CallExpiredError", "ClockDisbelief", "ConflictError", "CursorExpiredError",
    "DataLossError", "DeadlineExceededError", "Head", "InternalError", "InvalidArgumentError", "Lease",
    "LeaseChanged", "LeaseHeldError", "LeaseLostError", "LimitError", "Message", "NotFoundError",
    "OutcomeUnknownError", "ScrubStatus", "ServerInfo", "ServerLimits", "SessionChanged", "SessionDeleted",
    "SessionHandle", "SessionStore", "SessionStoreError", "StorageFullError", "TooLargeError", "Turn",
    "UnavailableError", "Unseen", "UnsupportedError", "Watch", "WatchEvent", "Written", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sessionstore")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sessionstore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""One call through all its attempts: its identity, and what each failed attempt means. Pure: it never waits.

The rules:

* A change carries (client_id, sequence, answered_through). It is sent again under the same identity until
  it is answered, so the daemon applies it once. Only its `age` changes between attempts.
* A call is *open* from its first attempt until its answer is known. One whose outcome is unknown stays
  open while its error lives; one that was interrupted stays open with nobody to send it again.
  `answered_through` is the highest n such that no call up to n is open.
* The daemon keeps 1,024 answers per client, so calls reach at most that far beyond the lowest open one. A
  lowest call that is under way is waited for; one that merely lies open is given up, and so is any after
  24 hours.
* Giving up is safe: a late copy of the call is then refused by the daemon as CALL_EXPIRED, never applied
  twice.
* A definite refusal is an answer. It counts as one also after an attempt of unknown fate, if the daemon
  keeps such refusals with the call's identity; else the fate of that attempt is still unknown, and so is
  the call's.

A `Window` belongs to one client in one process, and to one thread at a time: drivers lock it. It must not
know of grpc, sockets or sleep.
"""

import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from random import random
from uuid import uuid4

from sessionstore._operations import Rpc
from sessionstore.codec import DEFAULT_LIMITS
from sessionstore.errors import (
    CallExpiredError,
    DeadlineExceededError,
    OutcomeUnknownError,
    SessionStoreError,
    UnavailableError,
    error_for,
)

CALLS_MAX = 1024
AGE_MAX_S = 24 * 3600.0
BATCH_BYTES_MAX = DEFAULT_LIMITS.batch_bytes_max
"""A batch's limit, until the daemon has told its own."""
_BACKOFF_FIRST_S = 0.05
_BACKOFF_MAX_S = 1.0

# The age of a call must go on while the machine sleeps, because the daemon's may not sleep.
_AGE_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

# Nothing was stored, and it may go better soon.
_REFUSED_FOR_NOW = frozenset({"SHUTTING_DOWN", "OVERLOADED", "GRPC_RESOURCE_EXHAUSTED"})
# The attempt may have been applied, or not; sending it again under the same identity tells.
_LOST = frozenset({
    "OUTCOME_UNKNOWN", "GRPC_UNAVAILABLE", "GRPC_CANCELLED", "GRPC_UNKNOWN", "GRPC_INTERNAL",
})  # fmt: skip
# The attempt may have been applied, or not, and sending it again at once does not help.
_ENDED_UNKNOWN = frozenset({"INTERNAL", "GRPC_DEADLINE_EXCEEDED", "GRPC_DATA_LOSS"})
# Refusals that the daemon makes after it has looked for an earlier copy's answer: they tell its fate too.
_DECIDED = frozenset({
    "SESSION_NOT_FOUND", "SESSION_EXISTS", "REVISION_CONFLICT", "INDEX_OUT_OF_RANGE",
    "LAST_CONSOLIDATED_OUT_OF_RANGE", "METADATA_TOO_LARGE", "ARGUMENT_INVALID", "DATA_LOSS", "CALL_REUSED",
    "REQUEST_ID_REUSED", "LEASE_HELD", "LEASE_LOST",
})  # fmt: skip


def age_clock() -> float:
    """Seconds on a clock that never jumps and also counts while the machine sleeps."""
    return time.clock_gettime(_AGE_CLOCK)


@dataclass(slots=True)
class _Open:
    """A call without a known answer."""

    begun_s: float
    under_way: bool = False


class Ticket:
    """A call's place in its client's window. Dropped while its outcome is unknown, it gives the place up.

    Dropped while it is under way, by an interruption, it leaves a call that merely lies open.
    """

    _droppable = False

    def __init__(self, window: "Window", sequence: int, answered_through: int, begun_s: float) -> None:
        self.client_id = window.client_id
        self.sequence = sequence
        self.answered_through = answered_through
        self.begun_s = begun_s
        self._window = window

    def resume(self) -> None:
        """The call is under way again."""
        self._droppable = False
        self._window.mark(self.sequence, under_way=True)

    def settle(self, error: BaseException | None) -> None:
        """The call has ended: with an answer (None or a definite refusal), unknown, or interrupted."""
        unknown = isinstance(error, OutcomeUnknownError)
        if error is None or (isinstance(error, SessionStoreError) and not unknown):
            self._window.end(self.sequence)
            return
        self._droppable = unknown
        self._window.mark(self.sequence, under_way=False)

    def __del__(self) -> None:
        if not hasattr(self, "_window"):  # interrupted while it was made
            return
        if self._droppable:  # any thread, any time: only what is atomic
            self._window.dropped.append(self.sequence)
        else:
            self._window.mark(self.sequence, under_way=False)


class Window:
    """The open calls of one client."""

    def __init__(self) -> None:
        self.client_id = uuid4().hex
        self.dropped: deque[int] = deque()
        self._last = 0
        self._open: dict[int, _Open] = {}

    def begin(self, now_s: float) -> Ticket | None:
        """A place for a new call; None if it must wait for the lowest open call, which is under way."""
        while self.dropped:
            self._open.pop(self.dropped.popleft(), None)
        while self._open:
            lowest = next(iter(self._open))
            call = self._open[lowest]
            full = self._last - lowest >= CALLS_MAX - 1
            if not full and now_s - call.begun_s < AGE_MAX_S:
                break
            if full and call.under_way:
                return None
            del self._open[lowest]
        call = _Open(now_s)
        # No function is called in between, so no signal handler makes a call of the same number.
        self._last = sequence = self._last + 1
        self._open[sequence] = call
        ticket = Ticket(self, sequence, next(iter(self._open)) - 1, now_s)
        call.under_way = True  # last: interrupted before, it lies open, and is given up when its turn comes
        return ticket

    def mark(self, sequence: int, *, under_way: bool) -> None:
        """Note whether an open call is being sent, or merely lies open."""
        call = self._open.get(sequence)
        if call is not None:
            call.under_way = under_way

    def end(self, sequence: int) -> None:
        """The call's answer is known."""
        self._open.pop(sequence, None)

    def room(self) -> int:
        """How many calls may begin now."""
        lowest = next(iter(self._open), self._last + 1)
        return CALLS_MAX - 1 - self._last + lowest


def too_many_calls(timeout_s: float) -> SessionStoreError:
    """The refusal of a call that found no place in the window in time."""
    text = (
        f"{CALLS_MAX} calls of this client are open, and none ended within {timeout_s:g} s; nothing was "
        "sent. Make fewer at a time, or use more clients."
    )
    return error_for("TOO_MANY_CALLS", text, {"limit": str(CALLS_MAX)})


class Attempts:
    """The attempts of one RPC, until its time is over. Times are seconds of one monotonic clock."""

    def __init__(self, rpc: Rpc, timeout_s: float, now_s: float) -> None:
        self._rpc = rpc
        self._timeout_s = rpc.timeout_s(timeout_s)
        self._deadline_s = now_s + self._timeout_s
        self._failed = 0
        self._last: SessionStoreError | None = None

    def remaining_s(self, now_s: float) -> float:
        """How much time the call has left; not negative."""
        return max(0.0, self._deadline_s - now_s)

    def before(self, age_now_s: float) -> None:
        """Write identity and age into the request, right before it is sent."""
        ticket = self._rpc.ticket
        if ticket is None:
            return
        identity = self._rpc.identity()
        if identity.sequence:
            identity.age.FromTimedelta(timedelta(seconds=age_now_s - ticket.begun_s))
        else:
            identity.client_id = ticket.client_id
            identity.sequence = ticket.sequence
            identity.answered_through = ticket.answered_through

    def stop(self) -> None:
        """The client was closed: no attempt follows."""
        self._deadline_s = -inf

    def failed(
        self, error: SessionStoreError, now_s: float, batch_bytes_max: int = BATCH_BYTES_MAX
    ) -> float:
        """What follows a failed attempt: seconds to wait before the next one.

        What the transport refuses above the daemon's limit of a batch is refused for its size, not for a
        busy moment.

        Raises the error that the call ends with, if it ends.
        """
        rpc, reason = self._rpc, error.reason
        unknown_before = rpc.maybe_applied
        if rpc.method.mutates and reason in _LOST | _ENDED_UNKNOWN:
            rpc.maybe_applied = True
        if reason == "GRPC_RESOURCE_EXHAUSTED" and rpc.request.ByteSize() > batch_bytes_max:
            raise _too_large(error, rpc.request.ByteSize(), batch_bytes_max)
        self._failed += 1
        self._last = error
        delay_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2.0 ** min(self._failed - 1, 10))
        delay_s *= 0.5 + random() / 2
        if reason in _REFUSED_FOR_NOW | _LOST and delay_s < self.remaining_s(now_s):
            return delay_s
        if reason == "CALL_EXPIRED":
            raise _expired(error, sent_before=unknown_before)
        if rpc.maybe_applied and reason not in _DECIDED:
            raise self._unknown(error)
        if not rpc.method.mutates and reason in _LOST:
            raise self._unavailable(error, UnavailableError)
        if not rpc.method.mutates and reason == "GRPC_DEADLINE_EXCEEDED":
            raise self._unavailable(error, DeadlineExceededError)
        raise error

    def unreachable(self, targets: tuple[str, ...], *, closed: bool) -> SessionStoreError:
        """The error of a call whose time, or whose client, ended without a connection."""
        target = ", ".join(targets)
        text = (
            f"no session store answered at {target} within {self._timeout_s:g} s. Start one with "
            "`sessionstored serve`, or set SESSIONSTORE_TARGET to where one listens."
        )
        if closed:
            text = f"the client was closed before {self._rpc.method.name} was answered"
        error = error_for("NOT_CONNECTED", text, {"target": target})
        error.__cause__ = self._last
        return self._unknown(error) if self._rpc.maybe_applied else error

    def _unknown(self, error: SessionStoreError) -> OutcomeUnknownError:
        text = (f"{self._rpc.method.name} was sent, and no answer came: it may be applied, or not. "
                f"retry() sends the very same call again. Last: {error}")
        unknown = OutcomeUnknownError(text, error.reason, error.metadata)
        unknown.__cause__ = error
        return unknown

    def _unavailable(self, error: SessionStoreError, cls: type[UnavailableError]) -> UnavailableError:
        text = f"{self._rpc.method.name} got no answer within {self._timeout_s:g} s. Last: {error}"
        unavailable = cls(text, error.reason, error.metadata)
        unavailable.__cause__ = error
        return unavailable


def _expired(error: SessionStoreError, *, sent_before: bool) -> CallExpiredError:
    fate = ("An earlier copy was sent and may have been applied: read the session to find out." if sent_before
            else "No copy of it was applied.")
    expired = CallExpiredError(f"{error} {fate}", error.reason, error.metadata)
    expired.__cause__ = error
    return expired


def _too_large(error: SessionStoreError, size_bytes: int, limit_bytes: int) -> SessionStoreError:
    text = (
        f"the request has {size_bytes} bytes, more than the daemon takes; its limit of a batch is "
        f"{limit_bytes}. Send it in parts. {error}"
    )
    metadata = {"size_bytes": str(size_bytes), "limit_bytes": str(limit_bytes)}
    found = error_for("BATCH_TOO_LARGE", text, metadata)
    found.__cause__ = error
    return found

"""Turns: what a holder of a lease knows of it, and what it asks the daemon.

It never waits, and must not know of threads, event loops or grpc.

The rules:

* The daemon is the judge: every change through a turn carries its fencing token, and is stored only while
  exactly that lease is in force. What is here only tells the holder early.
* A lease is lost when the daemon says so, or when the last renewal that succeeded was *sent* a whole ttl ago.
  The holder's clock never jumps, and goes on while the machine sleeps or the process is stopped.
* The answer to AcquireLease may have waited in the daemon, or be that of an earlier copy of the call. If it
  came late, or is a copy, a renewal follows at once, whose time of sending is known.
* A forked child does not have its parent's lease: there it is lost, and neither renewed nor released.
"""

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from sessionstore import _operations as ops
from sessionstore._calls import age_clock
from sessionstore._operations import Held, Operation, Rpc, Value, pb
from sessionstore._snapshot import Lines, Snapshot
from sessionstore._types import Lease, Message
from sessionstore.errors import (
    LeaseLostError,
    OutcomeUnknownError,
    SessionStoreError,
    UnavailableError,
    error_for,
)
from sessionstore.session import BaseHandle

RELEASE_S_MAX = 2.0
"""How long the end of a turn waits for the daemon. If that is not enough, the lease runs out by itself."""
_RENEWALS_PER_TTL = 3
_RETRY_S_MAX = 1.0
_RETRIES_PER_TTL = 10
_HOLDER_BYTES_MAX = 256


class Holding:
    """A lease that was acquired, as far as its holder can tell. Any thread may ask at any time."""

    def __init__(self, lease: Lease, sent_s: float, clock: Callable[[], float] = age_clock) -> None:
        self.lease = lease
        self.due_s = 0.0
        """When the next renewal is to be sent, on `clock`."""
        self._clock = clock
        self._pid = os.getpid()
        self._why: LeaseLostError | None = None
        self._ended = False
        self._end_s = 0.0
        self._confirmed(sent_s)

    @property
    def foreign(self) -> bool:
        """Whether it was acquired by the process that this one was forked from."""
        return self._pid != os.getpid()

    @property
    def lost(self) -> bool:
        """Whether it is lost, or was given back."""
        return bool(self._ended or self._why or self.foreign or self._clock() >= self._end_s)

    @property
    def remaining_s(self) -> float:
        """How long it is held for certain."""
        return max(0.0, self._end_s - self._clock())

    def check(self) -> None:
        """Raise LeaseLostError if it is lost."""
        if not self.lost:
            return
        if self._why is not None:
            raise LeaseLostError(str(self._why), self._why.reason, self._why.metadata)
        why = f"it could not be renewed within its ttl of {self.lease.ttl_s:g} s"
        if self.foreign:
            why = "it belongs to the process that this one was forked from"
        elif self._ended:
            why = "its turn has ended"
        key, token = self.lease.key, self.lease.fencing_token
        raise error_for(
            "LEASE_LOST",
            f"the lease with fencing token {token} on session {key!r} is lost: {why}; nothing was stored",
            {"key": key, "fencing_token": str(token)},
        )

    def lose(self, error: LeaseLostError) -> None:
        """The daemon says that it is lost."""
        self._why = self._why or error

    def end(self) -> None:
        """Its turn has ended."""
        self._ended = True

    def renew(self, within_s: float) -> Operation[None]:
        """Renew it. Raises LeaseLostError, and others if nobody knows; then it is due again soon."""
        sent_s = self._clock()
        self.due_s = sent_s + min(_RETRY_S_MAX, self.lease.ttl_s / _RETRIES_PER_TTL)
        request = pb.RenewLeaseRequest(key=self.lease.key, fencing_token=self.lease.fencing_token)
        try:
            yield Rpc(ops.RENEW, request, within_s=within_s)
        except LeaseLostError as error:
            self.lose(error)
            raise
        self._confirmed(sent_s)

    def release(self) -> Operation[None]:
        """Give it back, if the daemon can be told soon; else it runs out by itself."""
        request = pb.ReleaseLeaseRequest(key=self.lease.key, fencing_token=self.lease.fencing_token)
        with suppress(SessionStoreError):
            yield Rpc(ops.RELEASE, request, within_s=RELEASE_S_MAX)

    def _confirmed(self, sent_s: float) -> None:
        self._end_s = max(self._end_s, sent_s + self.lease.ttl_s)
        self.due_s = sent_s + self.lease.ttl_s / _RENEWALS_PER_TTL


def acquire(
    key: str, ttl_s: float, wait_s: float, allow_appends: bool, holder: str
) -> Operation[Holding]:
    """Acquire a lease, of which it is certain that it was in force a moment ago."""
    end_s = age_clock() + wait_s
    left_s = wait_s
    while True:
        sent_s = age_clock()
        try:
            reply = yield from _ask(key, ttl_s, left_s, allow_appends, holder)
        except OutcomeUnknownError as error:
            raise _unknown(key, ttl_s, error) from error
        holding = Holding(ops.lease_of(reply.lease), sent_s)
        if not reply.replayed and age_clock() - sent_s < holding.lease.ttl_s / _RENEWALS_PER_TTL:
            return holding
        holding = Holding(holding.lease, age_clock())
        try:
            yield from holding.renew(holding.lease.ttl_s)
            return holding
        except LeaseLostError:
            left_s = end_s - age_clock()
            if left_s <= 0:
                raise


def _ask(
    key: str, ttl_s: float, wait_s: float, allow_appends: bool, holder: str
) -> Operation[pb.AcquireLeaseResponse]:
    request = pb.AcquireLeaseRequest(
        key=ops.text("key", key, "KEY_INVALID"),
        holder=ops.text("holder", holder),
        ttl=ops.seconds("ttl", ttl_s),
        wait=ops.seconds("wait", wait_s),
        mode=pb.LEASE_MODE_APPENDS_ALLOWED if allow_appends else pb.LEASE_MODE_EXCLUSIVE,
    )
    return ops.change(ops.ACQUIRE, request, Held(key), ops.done, wait_s)


def _unknown(key: str, ttl_s: float, error: OutcomeUnknownError) -> SessionStoreError:
    text = (
        f"no answer came, and nothing was stored; if the lease of session {key!r} was acquired all the same, "
        f"it runs out in {ttl_s:g} s. Last: {error}"
    )
    return UnavailableError(text, error.reason, error.metadata)


class TurnState(BaseHandle):
    """A handle within a turn: it shares the snapshot of the handle that the turn was begun on."""

    _shared: BaseHandle
    _holding: Holding

    def __init__(self, handle: BaseHandle, holding: Holding) -> None:
        self._shared, self._holding = handle, holding
        self._owner = handle._owner
        self._fencing_token = holding.lease.fencing_token

    def __repr__(self) -> str:
        state = "lost" if self.lost else f"held for {self._holding.remaining_s:.1f} s more"
        return f"<{type(self).__name__} {self.key!r} token={self.token} {state}>"

    @property
    def token(self) -> int:
        """The fencing token: higher than that of every earlier lease of the store.

        Give it to other systems that this turn writes to, if they can refuse a lower one than they saw.
        """
        return self._fencing_token

    @property
    def lost(self) -> bool:
        """Whether the lease is lost, as far as is known here; no I/O. What changes something raises then."""
        return self._holding.lost

    def _checked(self, operation: Operation[Value]) -> Operation[Value]:
        """An operation under the lease. Raises LeaseLostError if that is lost here or at the daemon."""
        self._holding.check()
        try:
            return (yield from operation)
        except LeaseLostError as error:
            self._holding.lose(error)
            raise

    # The state of the other handle, which moves with every change that is made here.

    @property
    def _snapshot(self) -> Snapshot:
        return self._shared._snapshot

    @_snapshot.setter
    def _snapshot(self, snapshot: Snapshot) -> None:
        self._shared._snapshot = snapshot

    @property
    def _decoded(self) -> tuple[Lines, tuple[Message, ...]]:
        return self._shared._decoded

    @_decoded.setter
    def _decoded(self, decoded: tuple[Lines, tuple[Message, ...]]) -> None:
        self._shared._decoded = decoded

    @property
    def _mover(self) -> AbstractContextManager[bool] | None:
        return self._shared._mover

    @_mover.setter
    def _mover(self, mover: AbstractContextManager[bool] | None) -> None:
        self._shared._mover = mover


def default_holder(name: str) -> str:
    """What a holder calls itself who was given no name: host, process, and the thread's or task's name."""
    whole = ":".join(filter(None, (socket.gethostname(), str(os.getpid()), name)))
    return whole.encode("utf-8", "replace")[:_HOLDER_BYTES_MAX].decode("utf-8", "ignore")

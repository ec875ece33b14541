"""Leases: who may write to a session, until when, and which writes are refused meanwhile.

Pure like `rules`: no clock, no I/O, no grpc. Time is the store's own clock in seconds, which counts while the
store is served, goes on over restarts and never jumps; the wall clock dates a lease for people, and decides
nothing. A lease is in force before its `expires_s`, and not at it.

Every lease has a fencing token, higher than that of every earlier lease of the store. A write under a lease
names its token, and is stored only while exactly that lease is in force: also if it ran out and nobody has
taken over. So a holder who was stopped, and goes on too late, changes nothing.

This module must not know how leases are kept, or who waits for one: an engine shows the lease of a key, and
keeps what comes back.
"""

from dataclasses import dataclass, replace
from enum import Enum

from sessionstored.rules import Append, Mutation, Outcome, Refusal


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one holder to write to a session."""

    key: str
    holder: str
    """What the holder calls itself; it gives no right."""
    token: int
    appends_allowed: bool
    """Others may append; only the holder does anything else."""
    ttl_s: float
    acquire_time_us: int
    """On the wall clock, microseconds since the epoch; for people."""
    acquired_s: float
    """On the store's own clock."""
    expires_s: float

    @property
    def mode(self) -> str:
        """What others may do, as refusals name it."""
        return "appends_allowed" if self.appends_allowed else "exclusive"

    def in_force(self, clock_s: float) -> bool:
        """Whether it holds at this moment."""
        return clock_s < self.expires_s

    def remaining_s(self, clock_s: float) -> float:
        """How long it holds, unless it is renewed; not negative."""
        return max(0.0, self.expires_s - clock_s)

    def begun_anew(self, clock_s: float) -> "Lease":
        """The same lease, with its full ttl from this moment on."""
        return replace(self, expires_s=clock_s + self.ttl_s)


class LeaseEvent(Enum):
    """What became of a lease. LAPSED: it ran out, and that was noticed by somebody for whom it mattered."""

    ACQUIRED = "acquired"
    RENEWED = "renewed"
    RELEASED = "released"
    LAPSED = "lapsed"

    @property
    def in_force(self) -> bool:
        """Whether the lease is its key's one after this."""
        return self in (LeaseEvent.ACQUIRED, LeaseEvent.RENEWED)


@dataclass(frozen=True, slots=True)
class Acquire:
    """Take the lease of a session, which need not exist, if none is in force."""

    key: str
    holder: str
    ttl_s: float
    appends_allowed: bool = False


@dataclass(frozen=True, slots=True)
class Renew:
    """Begin the ttl of a lease anew."""

    key: str
    token: int


@dataclass(frozen=True, slots=True)
class Release:
    """End a lease; one that is not in force is left alone."""

    key: str
    token: int


LeaseOperation = Acquire | Renew | Release


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer of Acquire and Renew."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Released:
    """The answer of Release: whether the lease was in force until now."""

    released: bool


AnyOutcome = Outcome | Granted | Released
"""What any request can come to, one about a lease included."""


@dataclass(frozen=True, slots=True)
class LeaseDecision:
    """An outcome, and what becomes of a lease: nothing, for refusals and for what changes nothing."""

    outcome: Granted | Released | Refusal
    event: LeaseEvent | None = None
    lease: Lease | None = None


def decide_lease(
    current: Lease | None,
    operation: LeaseOperation,
    *,
    token: int,
    now_us: int,
    clock_s: float,
    behind: str | None = None,
) -> LeaseDecision:
    """Decide an operation on the lease of a session.

    Args:
        current: the lease that is in force, if there is one.
        operation: what is asked for, its arguments already checked for form.
        token: the fencing token that a new lease gets; higher than any that was ever given out.
        now_us: the wall clock, microseconds since the epoch.
        clock_s: the store's own clock.
        behind: others wait already, and this asker does not: the holder's name that the first of them has
            ("" if it only wants to append). A lease that is free just now is theirs.

    """
    match operation:
        case Acquire() if current is not None:
            return LeaseDecision(held(current, clock_s))
        case Acquire() if behind is not None:
            return LeaseDecision(_others_wait(operation.key, behind))
        case Acquire(key, holder, ttl_s, appends_allowed):
            lease = Lease(
                key, holder, token, appends_allowed, ttl_s, now_us, clock_s, expires_s=clock_s + ttl_s
            )
            return LeaseDecision(Granted(lease), LeaseEvent.ACQUIRED, lease)
        case Renew():
            if current is None or current.token != operation.token:
                return LeaseDecision(lost(operation.key, operation.token, current))
            renewed = current.begun_anew(clock_s)
            return LeaseDecision(Granted(renewed), LeaseEvent.RENEWED, renewed)
    if current is None or current.token != operation.token:
        return LeaseDecision(Released(False))
    return LeaseDecision(Released(True), LeaseEvent.RELEASED, current)


def refuse_write(
    current: Lease | None, mutation: Mutation, fencing_token: int, clock_s: float
) -> Refusal | None:
    """Why a write may not be made under the lease that is in force; None if it may.

    Args:
        current: the lease of the session that is written to: of a fork, that of the new one.
        mutation: the write.
        fencing_token: the token of the lease that it is made under; 0 for none.
        clock_s: the store's own clock.

    """
    if fencing_token:
        held_by_writer = current is not None and current.token == fencing_token
        return None if held_by_writer else lost(mutation.key, fencing_token, current)
    if current is None or (current.appends_allowed and isinstance(mutation, Append)):
        return None
    return held(current, clock_s)


def held(lease: Lease, clock_s: float) -> Refusal:
    """The refusal because of a lease of somebody else."""
    age_s, left_s = max(0.0, clock_s - lease.acquired_s), lease.remaining_s(clock_s)
    others = "only appends are taken from others" if lease.appends_allowed else "nobody else may write"
    return Refusal(
        "LEASE_HELD",
        f"session {lease.key!r} is leased to {lease.holder!r} since {age_s:.1f} s, and for {left_s:.1f} s "
        f"more, unless it is renewed or released: {others} meanwhile; nothing was stored; wait, or try "
        "again later",
        {
            "key": lease.key,
            "holder": lease.holder,
            "mode": lease.mode,
            "age_ms": _ms(age_s),
            "expires_in_ms": _ms(left_s),
        },
    )


def lost(key: str, token: int, current: Lease | None) -> Refusal:
    """The refusal for a token whose lease is not in force."""
    now = "none is in force" if current is None else f"{current.holder!r} has one now"
    return Refusal(
        "LEASE_LOST",
        f"the lease with fencing token {token} on session {key!r} is over, and {now}: nothing was stored; "
        "acquire a lease anew, and read the session again",
        {"key": key, "fencing_token": str(token)},
    )


def _others_wait(key: str, holder: str) -> Refusal:
    who = f"{holder!r} is the first of them" if holder else "an append is the first of them"
    return Refusal(
        "LEASE_HELD",
        f"others wait for the lease of session {key!r}, which is free just now, and {who}; "
        "nothing was stored; wait, or try again later",
        {"key": key, "holder": holder, "mode": "exclusive", "age_ms": "0", "expires_in_ms": "0"},
    )


def _ms(seconds: float) -> str:
    """Milliseconds, rounded up: who waits for so long is not too early."""
    return str(-int(-seconds * 1000 // 1))

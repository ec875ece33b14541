"""The leases of a store, and how every engine settles what is asked about them.

`LeaseBook` is the leases in memory, for engines to keep. `settle_lease` and `refused_by_lease` go through a
view, as `settle` does.

That a lease ran out is noticed late: when somebody asks for something that depends on it. It is then recorded
as lapsed, in the same step. Else it could come back: after a restart each lease has its full ttl again, and a
holder who was stopped would go on as if nobody had written meanwhile.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Protocol

from sessionstored.leases import (
    Granted,
    Lease,
    LeaseEvent,
    LeaseOperation,
    Released,
    decide_lease,
    refuse_write,
)
from sessionstored.rules import Limits, Mutation, Refusal


class LeaseView(Protocol):
    """The part of a view that leases need."""

    def kept_lease(self, key: str) -> Lease | None:
        """The last lease of a session that did not end; it may have run out."""
        ...

    def change_lease(self, lease: Lease, event: LeaseEvent) -> None:
        """Keep what became of a lease."""
        ...

    def lease_count(self) -> int:
        """How many leases are kept."""
        ...


class LeaseBook:
    """The leases of a store, by key. One thread changes it; others may look up one lease at a time."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, key: str) -> Lease | None:
        """The lease of a session, perhaps run out."""
        return self._leases.get(key)

    def in_force(self, key: str, clock_s: float) -> Lease | None:
        """The lease of a session that is in force."""
        lease = self._leases.get(key)
        return lease if lease is not None and lease.in_force(clock_s) else None

    def update(self, leases: Mapping[str, Lease | None]) -> None:
        """Take in what became of leases: None for one that has ended."""
        for key, lease in leases.items():
            if lease is None:
                self._leases.pop(key, None)
            else:
                self._leases[key] = lease

    def lapsed(self, clock_s: float) -> list[str]:
        """The keys whose lease has run out."""
        return [key for key, lease in self._leases.items() if not lease.in_force(clock_s)]

    def load(self, leases: Iterable[Lease]) -> None:
        """Begin with these; none runs out before `begin_anew`."""
        self._leases = {lease.key: replace(lease, expires_s=inf) for lease in leases}

    def begin_anew(self, clock_s: float) -> None:
        """Give each lease its full ttl."""
        self._leases = {key: lease.begun_anew(clock_s) for key, lease in self._leases.items()}


def settle_lease(
    operation: LeaseOperation,
    view: LeaseView,
    *,
    token: int,
    now_us: int,
    clock_s: float,
    limits: Limits,
    behind: str | None,
) -> Granted | Released | Refusal:
    """Settle an operation on a lease; see `decide_lease`."""
    current = notice_lapse(view, operation.key, clock_s)
    decision = decide_lease(current, operation, token=token, now_us=now_us, clock_s=clock_s, behind=behind)
    if decision.event is not None and decision.lease is not None:
        if decision.event is LeaseEvent.ACQUIRED and view.lease_count() >= limits.leases_max:
            return _too_many(limits.leases_max)
        view.change_lease(decision.lease, decision.event)
    return decision.outcome


def refused_by_lease(
    mutation: Mutation, fencing_token: int, view: LeaseView, clock_s: float
) -> Refusal | None:
    """Why a write may not be made; see `refuse_write`."""
    return refuse_write(notice_lapse(view, mutation.key, clock_s), mutation, fencing_token, clock_s)


def notice_lapse(view: LeaseView, key: str, clock_s: float) -> Lease | None:
    """The lease that is in force; one that has run out is recorded as lapsed."""
    lease = view.kept_lease(key)
    if lease is None or lease.in_force(clock_s):
        return lease
    view.change_lease(lease, LeaseEvent.LAPSED)
    return None


def _too_many(limit: int) -> Refusal:
    return Refusal(
        "OVERLOADED",
        f"{limit} leases are in force; nothing was stored; try again later",
        {"limit": str(limit)},
    )

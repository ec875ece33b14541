"""How every engine settles one request: windows first, then the rules, then the windows remember.

It knows no storage: an engine shows its state through a `View`, and stores what comes back. It must be called
for one request after the other, each seeing what the one before left in the view.
"""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from sessionstored.engine import Refused, Reply, Request
from sessionstored.engine.leasing import LeaseView, refused_by_lease, settle_lease
from sessionstored.leases import Acquire, AnyOutcome, Release, Renew
from sessionstored.rules import (
    Answer,
    Change,
    Decision,
    Delete,
    Fork,
    Head,
    Limits,
    Mutation,
    Pop,
    Refusal,
    decide,
)
from sessionstored.windows import CallWindow, Remembered, find_request, remembered_by_request_id

Asked = TypeVar("Asked", bound=AnyOutcome)


class View(LeaseView, Protocol):
    """The state that a request is decided against."""

    def head(self, key: str, damaged: bool = False) -> Head | None:
        """The session's head; raises Refused (DATA_LOSS) if it cannot be served, unless `damaged` is set."""
        ...

    def last_message(self, key: str) -> bytes:
        """The session's last message; there is one."""
        ...

    def call_window(self, client_id: str) -> CallWindow:
        """The client's window; a new one if it is unknown."""
        ...

    def remembered(self, key: str, request_id: str) -> Remembered | None:
        """What is remembered under a request_id of a session."""
        ...

    def remember(self, key: str, request_id: str, remembered: Remembered) -> None:
        """Remember it."""
        ...


@dataclass(frozen=True, slots=True)
class Settled:
    """A reply, the change to store (if any), and whether a call window has something new to make durable."""

    reply: Reply
    change: Change | None = None
    recorded: bool = False


def settle(
    request: Request,
    view: View,
    *,
    revision: int,
    now_us: int,
    clock_s: float,
    limits: Limits,
    obstacle: Refusal | None = None,
) -> Settled:
    """Settle one request.

    Args:
        request: what is asked for.
        view: the state, with everything in it that was settled before.
        revision: the revision that a change gets.
        now_us: wall clock, microseconds since the epoch.
        clock_s: the store's own clock, seconds of service.
        limits: the bounds in force.
        obstacle: why nothing new can be decided now (a deadline that passed, a full disk). A copy of a call
            that was answered before gets its answer all the same.

    """
    window = view.call_window(request.call.client_id) if request.call else None
    if request.call is not None and window is not None:
        window.last_contact_s = clock_s
        first = window.find(request.call, request.digest, limits)
        if first is not None:
            return Settled(Reply(first, replayed=not isinstance(first, Refusal)))
    key = request.mutation.key
    change: Change | None = None
    outcome: AnyOutcome | None = None
    replayed = False
    if request.request_id:
        known = view.remembered(key, request.request_id)
        outcome = find_request(known, key, request.request_id, request.digest)
        replayed = isinstance(outcome, Answer)
    if outcome is None and obstacle is not None:
        return Settled(Reply(obstacle))
    if outcome is None:
        try:
            outcome, change = _decide(request, view, revision, now_us, clock_s, limits)
        except Refused as not_now:
            return Settled(Reply(not_now.refusal))
        if request.request_id and remembered_by_request_id(outcome):
            view.remember(key, request.request_id, Remembered(request.digest, outcome))
    if request.call is not None and window is not None:
        window.record(request.call, request.digest, outcome, clock_s, limits)
    return Settled(Reply(outcome, replayed), change, recorded=window is not None)


def expired_in_queue() -> Refusal:
    """The refusal for a request whose deadline passed before it was decided."""
    return Refusal("EXPIRED_IN_QUEUE", "the call's deadline passed before it was decided; nothing was stored")


def _decide(
    request: Request, view: View, revision: int, now_us: int, clock_s: float, limits: Limits
) -> tuple[AnyOutcome, Change | None]:
    """Decide one request. Raises Refused for what is not to be remembered."""
    mutation = request.mutation
    if isinstance(mutation, Acquire | Renew | Release):
        outcome = settle_lease(
            mutation,
            view,
            token=revision,
            now_us=now_us,
            clock_s=clock_s,
            limits=limits,
            behind=request.behind,
        )
        return _asked_again(request, outcome), None
    refusal = refused_by_lease(mutation, request.fencing_token, view, clock_s)
    if refusal is not None:
        return _asked_again(request, refusal), None
    decision = _decide_mutation(mutation, view, revision, now_us, limits)
    return decision.outcome, decision.change


def _asked_again(request: Request, outcome: Asked) -> Asked:
    """An outcome that has to do with a lease. Raises Refused if the same request may get another one."""
    if isinstance(outcome, Refusal) and (
        outcome.reason == "OVERLOADED" or (request.waiting and outcome.reason == "LEASE_HELD")
    ):
        raise Refused(outcome)
    return outcome


def _decide_mutation(
    mutation: Mutation, view: View, revision: int, now_us: int, limits: Limits
) -> Decision:
    source = view.head(mutation.source_key) if isinstance(mutation, Fork) else None
    head = view.head(mutation.key, damaged=isinstance(mutation, Delete))  # damaged sessions can be deleted
    decision = decide(head, mutation, revision=revision, now_us=now_us, source=source, limits=limits)
    if isinstance(mutation, Pop) and isinstance(decision.outcome, Answer):
        popped = replace(decision.outcome, message=view.last_message(mutation.key))
        return Decision(popped, decision.change)
    return decision

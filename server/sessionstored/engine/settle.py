"""How every engine settles one request: windows first, then the rules, then the windows remember.

It knows no storage: an engine shows its state through a `View`, and stores what comes back. It must be called
for one request after the other, each seeing what the one before left in the view.
"""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from sessionstored.engine import Refused, Reply, Request
from sessionstored.engine.leasing import LeaseView, notice_lapse, refused_by_lease, settle_lease
from sessionstored.leases import Acquire, AnyOutcome, Granted, Release, Renew
from sessionstored.rules import (
    Answer,
    Change,
    Decision,
    Delete,
    Expire,
    Fork,
    Head,
    Limits,
    Mutation,
    Pop,
    Refusal,
    decide,
    expire,
)
from sessionstored.windows import CallWindow, Remembered, find_request, remembered_by_request_id

Asked = TypeVar("Asked", bound=AnyOutcome)


class View(LeaseView, Protocol):
    """The state that a request is decided against."""

    def head(self, key: str, damaged: bool = False) -> Head | None:
        """The session's head; raises Refused (DATA_LOSS) if it cannot be served, unless `damaged` is set."""
        ...

    def expired(self, head: Head) -> bool:
        """Whether a session of this view has expired, and neither damage nor a lease makes that wait."""
        ...

    @property
    def trusted_us(self) -> int:
        """The clock that sessions expire by."""
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
    expired: bool = False
    """The session that was there had expired: it ends with the revision given; the change has the next. If a
    lease was acquired, that has the revision given, and the end has the next."""


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
    expired = False
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
            outcome, change, expired = _decide(request, view, revision, now_us, clock_s, limits)
        except Refused as not_now:
            return Settled(Reply(not_now.refusal))
        if request.request_id and remembered_by_request_id(outcome):
            view.remember(key, request.request_id, Remembered(request.digest, outcome))
    if request.call is not None and window is not None:
        window.record(request.call, request.digest, outcome, clock_s, limits)
    return Settled(Reply(outcome, replayed), change, recorded=window is not None, expired=expired)


def expired_in_queue() -> Refusal:
    """The refusal for a request whose deadline passed before it was decided."""
    return Refusal("EXPIRED_IN_QUEUE", "the call's deadline passed before it was decided; nothing was stored")


def _decide(
    request: Request, view: View, revision: int, now_us: int, clock_s: float, limits: Limits
) -> tuple[AnyOutcome, Change | None, bool]:
    """The outcome, its change, and whether a session that had expired ends before: as if it were deleted.

    Raises Refused for what is not to be remembered.
    """
    mutation = request.mutation
    if isinstance(mutation, Acquire | Renew | Release):
        over = isinstance(mutation, Acquire) and _is_over(mutation.key, view, clock_s)
        outcome = settle_lease(
            mutation,
            view,
            token=revision,
            now_us=now_us,
            clock_s=clock_s,
            limits=limits,
            behind=request.behind,
        )
        return _asked_again(request, outcome), None, over and isinstance(outcome, Granted)
    refusal = refused_by_lease(mutation, request.fencing_token, view, clock_s)
    if refusal is not None:
        return _asked_again(request, refusal), None, False
    decision, expired = _decide_mutation(mutation, view, revision, now_us, limits)
    return decision.outcome, decision.change, expired


def _is_over(key: str, view: View, clock_s: float) -> bool:
    """Whether a session has expired for whoever acquires its lease: that lease must not bring it back."""
    notice_lapse(view, key, clock_s)
    try:
        head = view.head(key, damaged=True)
        return head is not None and view.expired(head)
    except Refused:  # nobody knows; a lease can be had all the same
        return False


def _asked_again(request: Request, outcome: Asked) -> Asked:
    """An outcome that has to do with a lease. Raises Refused if the same request may get another one."""
    if isinstance(outcome, Refusal) and (
        outcome.reason == "OVERLOADED" or (request.waiting and outcome.reason == "LEASE_HELD")
    ):
        raise Refused(outcome)
    return outcome


def _decide_mutation(
    mutation: Mutation, view: View, revision: int, now_us: int, limits: Limits
) -> tuple[Decision, bool]:
    """The decision, and whether a session that had expired ends before it."""
    source = view.head(mutation.source_key) if isinstance(mutation, Fork) else None
    if source is not None and view.expired(source):
        source = None
    head = view.head(mutation.key, damaged=isinstance(mutation, Delete))  # damaged sessions can be deleted
    expired = head is not None and view.expired(head)
    if expired:
        assert head is not None
        if isinstance(mutation, Expire):
            return Decision(expire(head, revision, now_us).outcome), True
        head, revision = None, revision + 1
    decision = decide(
        head,
        mutation,
        revision=revision,
        now_us=now_us,
        trusted_us=view.trusted_us,
        source=source,
        limits=limits,
    )
    if isinstance(mutation, Pop) and isinstance(decision.outcome, Answer):
        popped = replace(decision.outcome, message=view.last_message(mutation.key))
        return Decision(popped, decision.change), False
    return decision, expired and decision.change is not None

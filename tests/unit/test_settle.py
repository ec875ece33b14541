"""How one request is settled: which of windows, request ids and rules answers, and what is remembered."""

from dataclasses import dataclass, field, replace

import pytest
from sessionstored.engine import Refused, Request
from sessionstored.engine.settle import Settled, expired_in_queue, settle
from sessionstored.leases import Lease, LeaseEvent
from sessionstored.rules import (
    DEFAULT_LIMITS,
    Answer,
    Append,
    Create,
    Delete,
    Expire,
    Fork,
    Head,
    Mutation,
    Pop,
    Refusal,
    Update,
)
from sessionstored.windows import Call, CallWindow, Remembered

DAMAGE = Refusal("DATA_LOSS", "line 3 cannot be read")


@dataclass
class FakeView:
    """What an engine shows. It changes only as `settle` says."""

    heads: dict[str, Head] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    windows: dict[str, CallWindow] = field(default_factory=dict)
    requests: dict[tuple[str, str], Remembered] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    events: list[LeaseEvent] = field(default_factory=list)
    over: set[str] = field(default_factory=set)
    """Keys whose sessions have expired."""
    trusted_us: int = 9_000

    def head(self, key: str, damaged: bool = False) -> Head | None:
        if key in self.damaged:
            raise Refused(DAMAGE)
        return self.heads.get(key)

    def expired(self, head: Head) -> bool:
        return head.key in self.over

    def last_message(self, key: str) -> bytes:
        return b'{"last": "%s"}' % key.encode()

    def call_window(self, client_id: str) -> CallWindow:
        return self.windows.setdefault(client_id, CallWindow())

    def remembered(self, key: str, request_id: str) -> Remembered | None:
        return self.requests.get((key, request_id))

    def remember(self, key: str, request_id: str, remembered: Remembered) -> None:
        self.requests[key, request_id] = remembered

    def kept_lease(self, key: str) -> Lease | None:
        return self.leases.get(key)

    def change_lease(self, lease: Lease, event: LeaseEvent) -> None:
        self.events.append(event)
        if event.in_force:
            self.leases[lease.key] = lease
        else:
            del self.leases[lease.key]

    def lease_count(self) -> int:
        return len(self.leases)

    def settle(self, request: Request, clock_s: float = 50.0) -> Settled:
        settled = settle(
            request, self, revision=11, now_us=9_000, clock_s=clock_s, limits=DEFAULT_LIMITS
        )
        if settled.expired:
            del self.heads[request.mutation.key]
            self.over.discard(request.mutation.key)
        if settled.change is not None and settled.change.head is not None:
            self.heads[request.mutation.key] = settled.change.head
        elif settled.change is not None:
            del self.heads[request.mutation.key]
        return settled


HEAD = Head("k", 10, 8, 4, 2, b"{}", 1_000, 2_000)
APPEND = Append("k", [b"{}"])


def reason(settled: Settled) -> str:
    outcome = settled.reply.outcome
    assert isinstance(outcome, Refusal)
    return outcome.reason


def test_a_request_without_identity_is_decided_each_time() -> None:
    view = FakeView()
    for count in (1, 2):
        settled = view.settle(Request(APPEND))
        assert isinstance(settled.reply.outcome, Answer)
        assert settled.reply.outcome.message_count == count
        assert not settled.reply.replayed
        assert not settled.recorded
    assert not view.windows
    assert not view.requests


def test_a_copy_gets_the_first_answer_and_changes_nothing() -> None:
    view = FakeView()
    request = Request(APPEND, Call("c", 1), digest=b"x")
    first = view.settle(request)
    assert first.recorded
    copy = view.settle(request)
    assert copy.reply.outcome == first.reply.outcome
    assert copy.reply.replayed
    assert copy.change is None
    assert not copy.recorded
    assert view.heads["k"].message_count == 1


def test_a_refusal_is_a_first_answer_too() -> None:
    view = FakeView()
    request = Request(Delete("k"), Call("c", 1), digest=b"x")
    assert reason(view.settle(request)) == "SESSION_NOT_FOUND"
    view.heads["k"] = HEAD
    copy = view.settle(request)
    assert reason(copy) == "SESSION_NOT_FOUND"
    assert not copy.reply.replayed
    assert "k" in view.heads


def test_a_call_used_again_for_something_else_is_refused() -> None:
    view = FakeView()
    view.settle(Request(APPEND, Call("c", 1), digest=b"x"))
    again = view.settle(Request(APPEND, Call("c", 1), digest=b"y"))
    assert reason(again) == "CALL_REUSED"
    assert again.change is None
    assert not again.recorded
    assert view.settle(Request(APPEND, Call("c", 1), digest=b"x")).reply.replayed


def test_asking_again_counts_as_contact() -> None:
    view = FakeView()
    request = Request(APPEND, Call("c", 1), digest=b"x")
    view.settle(request, clock_s=100)
    view.settle(request, clock_s=90_000)
    assert view.windows["c"].last_contact_s == 90_000


def test_a_request_id_answers_across_calls_and_clients() -> None:
    view = FakeView()
    first = view.settle(Request(APPEND, Call("c", 1), "delivery", b"x"))
    copy = view.settle(Request(APPEND, Call("d", 7), "delivery", b"x"))
    assert copy.reply.outcome == first.reply.outcome
    assert copy.reply.replayed
    assert copy.change is None
    # The second call is itself recorded: its copy gets this answer whatever becomes of the request_id.
    assert copy.recorded
    view.requests.clear()
    assert view.settle(Request(APPEND, Call("d", 7), "delivery", b"x")).reply.outcome == first.reply.outcome


def test_a_request_id_used_for_something_else_is_refused_and_that_is_recorded() -> None:
    view = FakeView()
    view.settle(Request(APPEND, request_id="delivery", digest=b"x"))
    other = Request(APPEND, Call("c", 1), "delivery", b"y")
    settled = view.settle(other)
    assert reason(settled) == "REQUEST_ID_REUSED"
    assert settled.recorded
    view.requests.clear()
    assert reason(view.settle(other)) == "REQUEST_ID_REUSED"


def test_a_refused_request_leaves_its_request_id_free() -> None:
    view = FakeView()
    request = Request(Pop("k"), request_id="delivery", digest=b"x")
    assert reason(view.settle(request)) == "SESSION_NOT_FOUND"
    view.heads["k"] = HEAD
    assert isinstance(view.settle(request).reply.outcome, Answer)


def test_a_request_id_is_of_one_session_and_outlives_it() -> None:
    view = FakeView(heads={"k": HEAD})
    gone = view.settle(Request(Delete("k"), request_id="delivery", digest=b"x"))
    again = view.settle(Request(Delete("k"), request_id="delivery", digest=b"x"))
    assert again.reply.outcome == gone.reply.outcome
    other = view.settle(Request(Append("other", [b"{}"]), request_id="delivery", digest=b"y"))
    assert isinstance(other.reply.outcome, Answer)


def test_a_pop_answers_the_message_that_it_removed() -> None:
    view = FakeView(heads={"k": HEAD})
    settled = view.settle(Request(Pop("k"), Call("c", 1), digest=b"x"))
    assert isinstance(settled.reply.outcome, Answer)
    assert settled.reply.outcome.message == b'{"last": "k"}'
    copy = view.settle(Request(Pop("k"), Call("c", 1), digest=b"x"))
    assert copy.reply.outcome == settled.reply.outcome


def test_damage_is_the_requests_own_outcome_and_is_not_remembered() -> None:
    view = FakeView(heads={"k": HEAD}, damaged={"k"})
    request = Request(APPEND, Call("c", 1), "delivery", b"x")
    settled = view.settle(request)
    assert settled.reply.outcome is DAMAGE
    assert settled.change is None
    assert not settled.recorded
    view.damaged.clear()  # repaired
    assert isinstance(view.settle(request).reply.outcome, Answer)


def test_a_damaged_source_refuses_the_fork() -> None:
    view = FakeView(damaged={"source"})
    assert view.settle(Request(Fork("new", "source"))).reply.outcome is DAMAGE
    assert not view.heads


def test_a_fork_is_decided_against_its_source() -> None:
    view = FakeView(heads={"k": HEAD})
    settled = view.settle(Request(Fork("new", "k", at=3)))
    assert settled.change is not None
    assert settled.change.head == Head("new", 11, 11, 3, 2, b"{}", 9_000, 9_000)


def test_what_waited_too_long_is_said_to_be_unapplied() -> None:
    refusal = expired_in_queue()
    assert refusal.reason == "EXPIRED_IN_QUEUE"
    assert "nothing was stored" in refusal.message


# Sessions that have expired.


def expired_view() -> FakeView:
    return FakeView({"k": HEAD}, over={"k"})


@pytest.mark.parametrize("mutation", [APPEND, Create("k", [b"{}"]), Fork("k", "other")])
def test_what_makes_a_session_ends_the_expired_one_first(mutation: Mutation):
    view = expired_view()
    view.heads["other"] = replace(HEAD, key="other")
    settled = view.settle(Request(mutation))
    assert settled.expired
    assert isinstance(settled.reply.outcome, Answer)
    assert (settled.reply.outcome.previous_revision, settled.reply.outcome.revision) == (0, 12)
    assert settled.change is not None
    assert settled.change.head is not None
    assert (settled.change.head.create_time_us, settled.change.start) == (9_000, 0)


@pytest.mark.parametrize(
    ("mutation", "reason"),
    [
        (Pop("k"), "SESSION_NOT_FOUND"),
        (Delete("k"), "SESSION_NOT_FOUND"),
        (Update("k", last_consolidated=0), "SESSION_NOT_FOUND"),
        (Append("k", [b"{}"], expected_revision=10), "REVISION_CONFLICT"),
        (Fork("new", "k"), "SESSION_NOT_FOUND"),
    ],
)
def test_other_changes_do_not_find_it_and_change_nothing(mutation: Mutation, reason: str):
    view = expired_view()
    settled = view.settle(Request(mutation))
    assert isinstance(settled.reply.outcome, Refusal)
    assert settled.reply.outcome.reason == reason
    assert (settled.expired, settled.change, view.heads) == (False, None, {"k": HEAD})


def test_expiring_ends_it_once():
    view = expired_view()
    first, second = (view.settle(Request(Expire("k"))) for _ in range(2))
    assert (first.expired, first.change) == (True, None)
    assert first.reply.outcome == Answer(11, 10, 0, 0, 9_000)
    assert (second.expired, second.change) == (False, None)
    assert isinstance(second.reply.outcome, Refusal)


def test_expiring_leaves_a_session_whose_time_has_not_come():
    view = FakeView({"k": HEAD})
    settled = view.settle(Request(Expire("k")))
    assert (settled.expired, settled.change, view.heads) == (False, None, {"k": HEAD})

"""The pure rules of leases: who gets one, who loses one, and which writes are refused meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessionstored.leases import (
    Acquire,
    Granted,
    Lease,
    LeaseDecision,
    LeaseEvent,
    Release,
    Released,
    Renew,
    decide_lease,
    refuse_write,
)
from sessionstored.rules import Append, Create, Delete, Fork, Mutation, Pop, Refusal, Replace, Update

LEASE = Lease("k", "host:7", 5, False, 10.0, 1_000_000, acquired_s=100.0, expires_s=110.0)
OPEN = Lease("k", "host:7", 5, True, 10.0, 1_000_000, acquired_s=100.0, expires_s=110.0)
APPEND = Append("k", [b"{}"])
OTHERS = (Create("k"), Replace("k", 0, None, ()), Pop("k"), Update("k"), Fork("k", "source"), Delete("k"))


def decide(current: Lease | None, operation, clock_s: float = 103.0, behind: str | None = None):
    return decide_lease(current, operation, token=9, now_us=2_000_000, clock_s=clock_s, behind=behind)


def reason(decision: LeaseDecision) -> str:
    assert isinstance(decision.outcome, Refusal), decision
    assert decision.event is None
    assert decision.lease is None
    return decision.outcome.reason


@pytest.mark.parametrize("appends_allowed", [False, True])
def test_a_free_lease_is_granted_for_its_whole_ttl(appends_allowed: bool) -> None:
    decision = decide(None, Acquire("k", "me", 30.0, appends_allowed))
    lease = Lease("k", "me", 9, appends_allowed, 30.0, 2_000_000, 103.0, 133.0)
    assert decision == LeaseDecision(Granted(lease), LeaseEvent.ACQUIRED, lease)
    assert lease.mode == ("appends_allowed" if appends_allowed else "exclusive")


def test_it_is_in_force_before_its_end_and_not_at_it() -> None:
    assert LEASE.in_force(109.999)
    assert not LEASE.in_force(110.0)
    assert (LEASE.remaining_s(104.0), LEASE.remaining_s(111.0)) == (6.0, 0.0)


@pytest.mark.parametrize("lease", [LEASE, OPEN])
def test_a_lease_in_force_is_nobody_elses_and_the_refusal_says_whose(lease: Lease) -> None:
    decision = decide(lease, Acquire("k", "host:7", 30.0), clock_s=103.25)
    assert reason(decision) == "LEASE_HELD"
    assert decision.outcome.metadata == {
        "key": "k",
        "holder": "host:7",
        "mode": lease.mode,
        "age_ms": "3250",
        "expires_in_ms": "6750",
    }
    for told in ("'k'", "'host:7'", "3.2 s", "6.8 s"):
        assert told in decision.outcome.message


def test_who_waits_for_as_long_as_the_refusal_says_is_not_too_early() -> None:
    decision = decide(LEASE, Acquire("k", "me", 1.0), clock_s=109.99951)
    assert decision.outcome.metadata["expires_in_ms"] == "1"


def test_an_age_is_not_negative() -> None:
    decision = decide(LEASE, Acquire("k", "me", 1.0), clock_s=99.0)  # after an unclean stop
    assert decision.outcome.metadata["age_ms"] == "0"


@pytest.mark.parametrize("behind", ["first", ""])
def test_a_free_lease_is_theirs_who_wait_for_it(behind: str) -> None:
    decision = decide(None, Acquire("k", "me", 30.0), behind=behind)
    assert reason(decision) == "LEASE_HELD"
    assert decision.outcome.metadata["holder"] == behind
    assert decision.outcome.metadata.keys() == {"key", "holder", "mode", "age_ms", "expires_in_ms"}
    assert (behind or "an append") in decision.outcome.message


def test_a_renewal_begins_the_ttl_anew_and_keeps_the_token() -> None:
    decision = decide(LEASE, Renew("k", 5), clock_s=109.0)
    lease = Lease("k", "host:7", 5, False, 10.0, 1_000_000, 100.0, 119.0)
    assert decision == LeaseDecision(Granted(lease), LeaseEvent.RENEWED, lease)


@pytest.mark.parametrize("current", [None, LEASE])
def test_another_lease_is_not_renewed(current: Lease | None) -> None:
    decision = decide(current, Renew("k", 4))
    assert reason(decision) == "LEASE_LOST"
    assert decision.outcome.metadata == {"key": "k", "fencing_token": "4"}


def test_a_release_ends_the_lease_of_that_token_only() -> None:
    assert decide(LEASE, Release("k", 5)) == LeaseDecision(Released(True), LeaseEvent.RELEASED, LEASE)
    assert decide(LEASE, Release("k", 4)) == LeaseDecision(Released(False))
    assert decide(None, Release("k", 5)) == LeaseDecision(Released(False))


@pytest.mark.parametrize("mutation", [APPEND, *OTHERS])
def test_without_a_lease_everybody_writes(mutation: Mutation) -> None:
    assert refuse_write(None, mutation, 0, 103.0) is None


@pytest.mark.parametrize("mutation", [APPEND, *OTHERS])
def test_a_token_writes_under_its_own_lease_only(mutation: Mutation) -> None:
    for lease in (LEASE, OPEN):
        assert refuse_write(lease, mutation, 5, 103.0) is None
        assert refuse_write(lease, mutation, 4, 103.0).reason == "LEASE_LOST"
    assert refuse_write(None, mutation, 5, 103.0).reason == "LEASE_LOST"


@pytest.mark.parametrize("mutation", OTHERS)
def test_nobody_else_rewrites_under_a_lease(mutation: Mutation) -> None:
    for lease in (LEASE, OPEN):
        assert refuse_write(lease, mutation, 0, 103.0).reason == "LEASE_HELD"


def test_others_append_only_if_the_holder_lets_them() -> None:
    assert refuse_write(OPEN, APPEND, 0, 103.0) is None
    refusal = refuse_write(LEASE, APPEND, 0, 103.0)
    assert refusal.reason == "LEASE_HELD"
    assert refusal.metadata["expires_in_ms"] == "7000"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["acquire", "renew", "release", "pass"]),
            st.integers(0, 3),
            st.floats(0.0, 5.0),
        ),
        max_size=40,
    )
)
def test_there_is_one_holder_at_a_time_and_tokens_grow(steps: list[tuple[str, int, float]]) -> None:
    """Holders who believe themselves in force, by what they were told, never overlap."""
    current: Lease | None = None
    clock_s, token = 0.0, 0
    believed: dict[int, float] = {}  # token -> until when
    for name, back, pause_s in steps:
        clock_s += pause_s
        if current is not None and not current.in_force(clock_s):
            current = None
        operation = {
            "acquire": Acquire("k", "me", 3.0),
            "renew": Renew("k", token - back),
            "release": Release("k", token - back),
        }.get(name)
        if operation is None:
            continue
        decision = decide_lease(current, operation, token=token + 1, now_us=0, clock_s=clock_s)
        if isinstance(decision.outcome, Granted):
            lease = decision.outcome.lease
            if name == "acquire":
                assert all(until_s <= clock_s for until_s in believed.values())
                assert lease.token > token
                token = lease.token
            current = lease
            believed[lease.token] = lease.expires_s
        elif decision.outcome == Released(True):
            believed.pop(current.token)
            current = None
        for each in range(1, token + 1):
            in_force = believed.get(each, clock_s) > clock_s
            assert (refuse_write(current, APPEND, each, clock_s) is None) == in_force


def test_what_makes_a_lease_its_keys_one() -> None:
    assert [event for event in LeaseEvent if event.in_force] == [LeaseEvent.ACQUIRED, LeaseEvent.RENEWED]

"""The exactly-once windows: whatever the order of calls, copies and clocks, nothing is applied twice."""

from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from model import METADATA_KEYS
from sessionstored.rules import DEFAULT_LIMITS, Answer, Limits, Outcome, Refusal
from sessionstored.windows import (
    FORGET_SLACK_S,
    Call,
    CallWindow,
    Remembered,
    find_request,
    remembered_by_request_id,
)

HOUR_S = 3600
DAY_S = 24 * HOUR_S
PAUSES_S = (1, HOUR_S, DAY_S // 2, DAY_S - 1, DAY_S + 1, DAY_S * 2)
SMALL = Limits(window_calls_max=4)


@dataclass
class World:
    """One client, one store, and what truly happened. The store's clock stands still while it is down."""

    client_s: float = 0
    store_s: float = 0
    window: CallWindow | None = None
    sent_s: dict[int, float] = field(default_factory=dict)
    """When the client first sent each sequence number."""
    answered: set[int] = field(default_factory=set)
    answered_through: int = 0
    told_through: int = 0
    """The highest answered_through that came with a call that was recorded."""
    applied: dict[int, tuple[bytes, Outcome]] = field(default_factory=dict)

    def pass_time(self, seconds: float, served: bool) -> None:
        self.client_s += seconds
        if served:
            self.store_s += seconds

    def deliver(self, sequence: int, digest: bytes, delay_s: float) -> Outcome:
        """A copy arrives that was sent `delay_s` ago: its age is as of then."""
        age = max(0.0, self.client_s - delay_s - self.sent_s[sequence])
        call = Call("client", sequence, min(self.answered_through, sequence - 1), age)
        if self.window is not None and self.window.expired(self.store_s, SMALL):
            self.window = None
        self.window = self.window or CallWindow()
        known = self.window.find(call, digest, SMALL)
        if known is None:
            assert sequence not in self.applied, f"call {sequence} is applied twice"
            known = Answer(len(self.applied) + 1, len(self.applied), 0, 0, 0)
            self.window.record(call, digest, known, self.store_s, SMALL)
            self.told_through = max(self.told_through, call.answered_through)
            self.applied[sequence] = (digest, known)
        elif known == Refusal("CALL_EXPIRED", getattr(known, "message", ""), self.where(sequence)):
            event("expired")
            newer = [other for other in self.applied if other > sequence]
            assert sequence <= self.told_through or age >= DAY_S or len(newer) >= SMALL.window_calls_max, (
                f"call {sequence} could still be known"
            )
        else:
            first_digest, first = self.applied[sequence]
            if digest == first_digest:
                event("replayed")
                assert known is first
            else:
                event("reused")
                assert isinstance(known, Refusal)
                assert (known.reason, known.metadata) == ("CALL_REUSED", self.where(sequence))
        assert len(self.window.answers) <= SMALL.window_calls_max
        assert all(kept > self.window.floor for kept in self.window.answers)
        return known

    def where(self, sequence: int) -> dict[str, str]:
        return {"client_id": "client", "sequence": str(sequence)}

    def acknowledge(self) -> None:
        while self.answered_through + 1 in self.answered:
            self.answered_through += 1


_steps = st.one_of(
    st.tuples(st.just("new"), st.just(0)),
    st.tuples(st.just("new"), st.just(0)),
    st.tuples(st.just("lost"), st.just(0)),
    st.tuples(st.sampled_from(("copy", "reuse")), st.integers(0, 30)),
    st.tuples(st.just("late"), st.integers(0, 30)),
    st.tuples(st.just("acknowledge"), st.just(0)),
    st.tuples(st.sampled_from(("serve", "down")), st.sampled_from(PAUSES_S)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_steps, max_size=40))
def test_nothing_is_applied_twice(steps: list[tuple[str, int]]) -> None:
    world = World()
    for what, number in steps:
        if what in ("new", "lost"):
            sequence = len(world.sent_s) + 1
            world.sent_s[sequence] = world.client_s
            if what == "new":
                world.deliver(sequence, b"same", 0)
                world.answered.add(sequence)
        elif what in ("serve", "down"):
            world.pass_time(number, what == "serve")
        elif what == "acknowledge":
            world.acknowledge()
        elif world.sent_s:
            sequence = 1 + number % len(world.sent_s)
            delay = HOUR_S if what == "late" else 0
            world.deliver(sequence, b"other" if what == "reuse" else b"same", delay)
            world.answered.add(sequence)


@given(st.lists(st.integers(1, 3000), unique=True, max_size=30))
def test_any_order_of_arrival_within_the_window_is_remembered(sequences: list[int]) -> None:
    window = CallWindow()
    for sequence in sequences:
        call = Call("client", sequence)
        assert window.find(call, b"x") is None
        window.record(call, b"x", Answer(sequence, 0, 0, 0, 0), 0)
    for sequence in sequences:
        assert window.find(Call("client", sequence), b"x") == Answer(sequence, 0, 0, 0, 0)


def test_the_window_keeps_as_many_calls_as_the_contract_says() -> None:
    window = CallWindow()
    kept = DEFAULT_LIMITS.window_calls_max
    assert kept == 1024
    for sequence in range(1, kept + 2):
        window.record(Call("c", sequence), b"x", Answer(sequence, 0, 0, 0, 0), 0)
    first = window.find(Call("c", 1), b"x")
    assert isinstance(first, Refusal)
    assert first.reason == "CALL_EXPIRED"
    assert window.find(Call("c", 2), b"x") == Answer(2, 0, 0, 0, 0)


def test_what_the_client_has_is_forgotten_and_refused() -> None:
    window = CallWindow()
    for sequence in (1, 2, 3):
        window.record(Call("c", sequence), b"x", Answer(sequence, 0, 0, 0, 0), 0)
    window.record(Call("c", 4, answered_through=2), b"x", Answer(4, 0, 0, 0, 0), 0)
    assert sorted(window.answers) == [3, 4]
    # An older copy with an older answered_through brings nothing back.
    window.record(Call("c", 5, answered_through=0), b"x", Answer(5, 0, 0, 0, 0), 0)
    assert window.floor == 2
    for sequence in (1, 2):
        gone = window.find(Call("c", sequence), b"x")
        assert isinstance(gone, Refusal)
        assert set(gone.metadata) == METADATA_KEYS["CALL_EXPIRED"]


def test_refusals_are_remembered_as_answers_are() -> None:
    window = CallWindow()
    refusal = Refusal("REVISION_CONFLICT", "stale")
    window.record(Call("c", 1), b"x", refusal, 0)
    assert window.find(Call("c", 1), b"x") is refusal


@pytest.mark.parametrize(("age_s", "known"), [(0, True), (DAY_S, True), (DAY_S * 30, True), (DAY_S, False)])
def test_an_old_call_is_answered_if_it_is_known_and_refused_if_not(age_s: float, known: bool) -> None:
    window = CallWindow()
    if known:
        window.record(Call("c", 1), b"x", Answer(1, 0, 0, 0, 0), 0)
    found = window.find(Call("c", 1, age_s=age_s), b"x")
    assert isinstance(found, Answer if known else Refusal)


def test_a_call_just_under_the_age_is_new() -> None:
    assert CallWindow().find(Call("c", 1, age_s=DAY_S - 0.001), b"x") is None


def test_a_window_outlives_every_copy_that_may_still_come() -> None:
    window = CallWindow()
    window.record(Call("c", 1), b"x", Answer(1, 0, 0, 0, 0), 100)
    assert not window.expired(100 + DAY_S + FORGET_SLACK_S)
    assert window.expired(101 + DAY_S + FORGET_SLACK_S)


def test_a_request_id_gives_its_first_answer_or_says_that_it_was_used() -> None:
    answer = Answer(3, 2, 1, 0, 0)
    assert find_request(None, "k", "id", b"x") is None
    assert find_request(Remembered(b"x", answer), "k", "id", b"x") is answer
    reused = find_request(Remembered(b"x", answer), "k", "id", b"y")
    assert isinstance(reused, Refusal)
    assert reused.reason == "REQUEST_ID_REUSED"
    assert reused.metadata == {"key": "k", "request_id": "id"}


def test_only_what_happened_is_kept_under_a_request_id() -> None:
    assert remembered_by_request_id(Answer(1, 0, 0, 0, 0))
    assert not remembered_by_request_id(Refusal("SESSION_NOT_FOUND", "no"))


def test_the_messages_that_answers_hold_are_bounded_and_the_oldest_give_way():
    limits = Limits(window_bytes_max=100)
    window = CallWindow()
    for sequence in range(1, 6):
        window.record(Call("c", sequence), b"d", Answer(sequence, 0, 0, 0, 0, 0, b"x" * 40), 0.0, limits)
    assert sorted(window.answers) == [4, 5]
    forgotten = window.find(Call("c", 3), b"d", limits)
    assert isinstance(forgotten, Refusal)
    assert forgotten.reason == "CALL_EXPIRED"
    window.record(Call("c", 6), b"d", Answer(6, 0, 0, 0, 0, 0, b"x" * 1000), 0.0, limits)
    assert sorted(window.answers) == [6], "the newest answer is always kept"

"""The books of calls: which are open, what the daemon may forget, and when a place is given up. No daemon."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessionstore import _calls
from sessionstore import _operations as ops
from sessionstore._calls import AGE_MAX_S, CALLS_MAX, Attempts, Ticket, Window, age_clock
from sessionstore.errors import LimitError, NotFoundError, OutcomeUnknownError, error_for
from sessionstore.v1 import session_store_pb2


def begun(window: Window, now_s: float = 0.0) -> Ticket:
    ticket = window.begin(now_s)
    assert ticket is not None
    return ticket


def test_each_window_has_an_identity_of_its_own() -> None:
    assert len({Window().client_id for _ in range(100)}) == 100
    assert len(Window().client_id) == 32


def test_answered_through_is_the_highest_without_an_open_call_below() -> None:
    window = Window()
    first, second, third = (begun(window) for _ in range(3))
    assert [ticket.answered_through for ticket in (first, second, third)] == [0, 0, 0]
    second.settle(None)
    assert begun(window).answered_through == 0
    first.settle(NotFoundError("no"))
    assert begun(window).answered_through == 2
    third.settle(None)
    assert begun(window).answered_through == 3


def test_a_call_that_a_signal_handler_makes_meanwhile_has_another_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    window, inner = Window(), []
    made = _calls._Open

    def interrupted(now_s: float) -> object:
        monkeypatch.setattr(_calls, "_Open", made)
        inner.append(begun(window))
        return made(now_s)

    monkeypatch.setattr(_calls, "_Open", interrupted)
    outer = begun(window)
    assert sorted([outer.sequence, inner[0].sequence]) == [1, 2]
    assert [outer.answered_through, inner[0].answered_through] == [0, 0]


def test_an_unknown_call_is_open_while_its_ticket_lives() -> None:
    window = Window()
    unknown = begun(window)
    unknown.settle(OutcomeUnknownError("?"))
    assert begun(window).answered_through == 0
    unknown.resume()
    unknown.settle(OutcomeUnknownError("?"))
    del unknown
    gc.collect()
    assert begun(window).answered_through == 1


def test_an_interrupted_call_stays_open_without_anybody() -> None:
    window = Window()
    interrupted = begun(window)
    interrupted.settle(KeyboardInterrupt())
    del interrupted
    gc.collect()
    assert begun(window).answered_through == 0
    begun(window, AGE_MAX_S)  # everything of before is given up
    assert begun(window, AGE_MAX_S).answered_through == 3 - 1


def test_a_full_window_waits_for_a_call_under_way() -> None:
    window = Window()
    tickets = [begun(window) for _ in range(CALLS_MAX)]
    assert window.room() == 0
    assert window.begin(0.0) is None
    tickets[1].settle(None)  # not the lowest: the answers above it are still all kept
    assert window.begin(0.0) is None
    tickets[0].settle(None)
    assert window.room() == 2
    assert begun(window).sequence == CALLS_MAX + 1
    assert begun(window).answered_through == 2
    assert window.begin(0.0) is None


def test_a_full_window_gives_up_a_call_that_merely_lies_open() -> None:
    window = Window()
    unknown, *others = [begun(window) for _ in range(CALLS_MAX)]
    for ticket in others:
        ticket.settle(None)
    unknown.settle(OutcomeUnknownError("?"))
    late = begun(window)
    assert late.answered_through == CALLS_MAX
    unknown.resume()  # it may still be sent: the daemon then says that it is too late to know
    unknown.settle(None)
    assert begun(window).answered_through == CALLS_MAX


@given(st.lists(st.tuples(st.sampled_from(["begin", "answer", "unknown", "drop"]), st.integers(0, 30))))
def test_no_call_under_way_is_ever_reported_as_answered(steps: list[tuple[str, int]]) -> None:
    window = Window()
    under_way: dict[int, Ticket] = {}
    kept: dict[int, Ticket] = {}
    for name, pick in steps:
        if name == "begin":
            ticket = begun(window)
            under_way[ticket.sequence] = ticket
            lowest_open = min([*under_way, *kept])
            assert ticket.answered_through == lowest_open - 1
            assert ticket.sequence - lowest_open < CALLS_MAX
            continue
        pool = kept if name == "drop" else under_way
        if not pool:
            continue
        ticket = pool.pop(sorted(pool)[pick % len(pool)])
        if name == "answer":
            ticket.settle(None)
        elif name == "unknown":
            ticket.settle(OutcomeUnknownError("?"))
            kept[ticket.sequence] = ticket
        del ticket  # a dropped one is to be gone


def test_the_age_clock_goes_on() -> None:
    assert 0 < age_clock() <= age_clock()


def attempts(timeout_s: float = 10.0) -> Attempts:
    rpc = ops.Rpc(ops.APPEND, session_store_pb2.AppendMessagesRequest())
    return Attempts(rpc, timeout_s, 100.0)


def test_the_backoff_doubles_up_to_a_second_with_jitter() -> None:
    busy = error_for("OVERLOADED", "busy")
    many = attempts(1000.0)
    delays = [many.failed(busy, 100.0) for _ in range(10)]
    for delay, longest in zip(delays, [0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1, 1, 1], strict=True):
        assert longest / 2 <= delay <= longest
    assert len(set(delays)) == 10


def test_nothing_is_tried_when_the_time_would_be_over() -> None:
    short = attempts(10.0)
    with pytest.raises(LimitError):
        short.failed(error_for("OVERLOADED", "busy"), 109.99)
    assert short.remaining_s(109.0) == pytest.approx(1.0)
    assert short.remaining_s(200.0) == 0.0

"""The clock that sessions expire by, under clocks that jump."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessionstored.trusted import Disbelief, TrustedClock

S = 1_000_000
HOUR = 3600 * S
START = 1_700_000_000 * S


class Machine:
    """A wall clock and a steady one, and trusted clocks over them."""

    def __init__(self) -> None:
        self.wall_us, self.steady_us, self.boot = START, 500 * S, "boot 1"
        self.clock = self.start()

    def start(self) -> TrustedClock:
        return TrustedClock(
            lambda: self.wall_us,
            lambda: self.steady_us,
            jump_us_max=60 * S,
            confirm_us=HOUR,
            boot_id=self.boot,
        )

    def restart(self) -> None:
        stored = self.clock.stored()
        self.clock = self.start()
        self.clock.resume(stored)

    def passes(self, us: int) -> int:
        self.wall_us += us
        self.steady_us += us
        return self.clock.now_us()

    def jumps(self, us: int) -> int:
        self.wall_us += us
        return self.clock.now_us()


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_it_is_the_wall_clock(machine: Machine):
    assert machine.clock.now_us() == START
    assert machine.passes(10 * HOUR) == START + 10 * HOUR
    assert machine.clock.disbelief() is None


def test_a_small_step_ahead_is_believed_at_once(machine: Machine):
    assert machine.jumps(60 * S) == START + 60 * S
    assert machine.clock.disbelief() is None


def test_a_jump_ahead_is_believed_after_its_time(machine: Machine, caplog: pytest.LogCaptureFixture):
    assert machine.jumps(24 * HOUR) == START
    assert machine.passes(10 * S) == START + 10 * S
    assert machine.clock.disbelief() == Disbelief(START + 10 * S, 24 * HOUR, HOUR - 10 * S)
    assert machine.passes(HOUR - 10 * S - 1) == START + HOUR - 1
    assert machine.passes(1) == START + 25 * HOUR
    assert machine.clock.disbelief() is None
    assert [("ahead of the time" in text, "believed again" in text) for text in caplog.messages] == [
        (True, False), (False, True),
    ]  # fmt: skip


def test_a_jump_that_goes_away_was_never_believed(machine: Machine):
    machine.jumps(24 * HOUR)
    machine.passes(HOUR - 1)
    assert machine.jumps(-24 * HOUR) == START + HOUR - 1
    assert machine.clock.disbelief() is None
    assert machine.jumps(24 * HOUR) == START + HOUR - 1
    assert machine.passes(1) == START + HOUR  # its time begins anew


def test_a_further_jump_has_its_own_time(machine: Machine):
    machine.jumps(24 * HOUR)
    machine.passes(HOUR // 2)
    machine.jumps(24 * HOUR)
    assert machine.passes(HOUR // 2) == START + HOUR
    assert machine.passes(HOUR // 2) == START + HOUR + HOUR // 2 + 48 * HOUR


def test_a_jump_that_was_partly_taken_back_has_lasted(machine: Machine):
    machine.jumps(48 * HOUR)
    machine.passes(HOUR // 2)
    machine.jumps(-24 * HOUR)
    assert machine.passes(HOUR // 2) == START + HOUR + 24 * HOUR


def test_a_clock_that_goes_back_is_followed_at_once(machine: Machine):
    assert machine.jumps(-24 * HOUR) == START - 24 * HOUR
    assert machine.jumps(24 * HOUR) == START - 24 * HOUR  # and forward again is a jump like any other
    assert machine.passes(HOUR) == START + HOUR


def test_small_steps_do_not_add_up(machine: Machine):
    for _ in range(1000):
        machine.jumps(50 * S)
    assert machine.clock.now_us() <= START + 60 * S


def test_a_restart_keeps_what_was_not_believed(machine: Machine):
    machine.jumps(24 * HOUR)
    machine.passes(HOUR // 2)
    machine.restart()
    assert machine.clock.now_us() == START + HOUR // 2
    assert machine.passes(HOUR // 2) == START + HOUR + 24 * HOUR


def test_a_jump_while_no_daemon_ran_is_a_jump(machine: Machine):
    stored = machine.clock.stored()
    machine.wall_us += 24 * HOUR
    machine.clock = machine.start()
    machine.clock.resume(stored)
    assert machine.clock.now_us() == START
    assert machine.passes(HOUR) == START + 25 * HOUR


def test_time_without_a_daemon_is_time_on_the_same_boot(machine: Machine):
    stored = machine.clock.stored()
    machine.wall_us += 24 * HOUR
    machine.steady_us += 24 * HOUR
    machine.clock = machine.start()
    machine.clock.resume(stored)
    assert machine.clock.now_us() == START + 24 * HOUR


@pytest.mark.parametrize(
    ("boot", "steady_us"),
    [("boot 2", 5 * S), ("boot 2", 900 * HOUR), ("", 600 * S), ("boot 1", 5 * S)],
)
def test_after_another_boot_time_goes_on_from_the_last_moment(machine: Machine, boot: str, steady_us: int):
    machine.wall_us += 24 * HOUR
    machine.steady_us += 24 * HOUR
    machine.clock.now_us()
    machine.wall_us += HOUR * 2  # off
    machine.steady_us += HOUR * 2
    stored = machine.clock.stored()
    machine.boot, machine.steady_us = boot, steady_us
    machine.wall_us += HOUR * 2
    machine.clock = machine.start()
    machine.clock.resume(stored)
    assert machine.clock.now_us() == START + 26 * HOUR
    assert machine.passes(HOUR) == START + 29 * HOUR


def test_it_can_begin_at_a_moment_that_has_passed(machine: Machine):
    machine.clock.begin_at(START - 24 * HOUR)
    assert machine.clock.now_us() == START - 24 * HOUR
    assert machine.passes(HOUR) == START + HOUR
    machine.clock.begin_at(START + 24 * HOUR)  # a session that a wrong clock dated
    assert machine.clock.now_us() == START + HOUR


def test_what_is_no_state_is_refused(machine: Machine):
    with pytest.raises(ValueError, match="no state"):
        machine.clock.resume(["boot", 1])


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["passes", "jumps", "restarts"]),
        st.integers(min_value=-30 * HOUR, max_value=30 * HOUR),
    ),
    max_size=40,
)


@given(MOVES)
def test_it_is_never_ahead_of_the_wall_clock_nor_of_what_was_confirmed(moves: list[tuple[str, int]]):
    """The oracle: the least lead of the wall clock within the last hour, and the bound above that."""
    machine = Machine()
    leads = [(machine.steady_us, machine.wall_us - machine.steady_us)]
    for move, us in moves:
        if move == "passes":
            for _ in range(4):  # it looks now and then
                machine.passes(abs(us) // 4)
                leads.append((machine.steady_us, machine.wall_us - machine.steady_us))
        elif move == "jumps":
            machine.jumps(us)
            leads.append((machine.steady_us, machine.wall_us - machine.steady_us))
        else:
            machine.restart()
        now_us = machine.clock.now_us()
        assert now_us <= machine.wall_us
        since = machine.steady_us - HOUR
        before = [lead for at, lead in leads if at <= since][-1:]  # in force when the last hour began
        recent = before + [lead for at, lead in leads if at > since]
        assert now_us - machine.steady_us <= min(recent) + 60 * S

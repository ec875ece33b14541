"""The judgement of waits: it must count what is the daemon's own, and nothing else."""

import pytest
from crash.one_slow_thing import Probes, Took, report
from crash.tally import Tally


@pytest.mark.parametrize(
    ("waited_ms", "flush_ms", "idle_ms", "wrong"),
    [(40, 1, 1, 0), (60, 1, 1, 1), (60, 20, 1, 0), (60, 1, 20, 0), (200, 80, 60, 1)],
)
def test_a_wait_counts_if_it_is_longer_than_bound_and_floors(waited_ms, flush_ms, idle_ms, wrong):
    for what in ("append", "read"):
        probes = Probes([Took(9.5, 1)], [Took(9.5, 1)], [Took(9.9, flush_ms)], [Took(10.1, idle_ms)])
        getattr(probes, what).append(Took(10.0, waited_ms))
        tally = Tally()
        report(tally, probes, "meanwhile", [(9.0, 11.0)], judged=True)
        assert tally.wrong == wrong, tally.details


def test_floors_of_another_time_excuse_nothing():
    probes = Probes([Took(10.0, 200)], [Took(10.0, 1)], [Took(5.0, 500)], [Took(15.0, 500)])
    tally = Tally()
    report(tally, probes, "meanwhile", [(9.0, 11.0)], judged=True)
    assert tally.wrong == 1
    assert "maximum 200.0 ms" in "".join(tally.notes)


@pytest.mark.parametrize("what", ["append", "read"])
def test_probes_that_ended_show_nothing(what):
    probes = Probes([Took(10.0, 1)], [Took(10.0, 1)], [Took(10.0, 1)], [Took(10.0, 1)])
    setattr(probes, what, [Took(5.0, 1)])
    tally = Tally()
    report(tally, probes, "meanwhile", [(9.0, 11.0)], judged=True)
    assert tally.wrong == 1

"""What `make torture` says of a run: a rung that tried nothing shows nothing."""

from pathlib import Path

from click.testing import CliRunner
from crash.ladder import RUNGS
from crash.tally import Rung, Tally
from crash.torture import main, shortfall, verdict_on


def nothing(root: Path, seed: int, times: int) -> Tally:
    return Tally()


def test_a_name_that_no_fault_has_is_an_error() -> None:
    assert not any("kil -9" in rung.fault for rung in RUNGS)
    asked = CliRunner().invoke(main, ["--only", "kil -9"])
    assert asked.exit_code == 2
    assert "no fault has 'kil -9' in its name" in asked.output


def test_a_run_that_tried_nothing_is_never_ok() -> None:
    for rung in (
        Rung("one", nothing, full=40, sample=4),
        Rung("another", nothing, full=10, sample=1, times_min=1),
        Rung("a third", nothing, full=10, sample=1, times_min=1, must_lose=True),
    ):
        for divide in (1, 1000):
            tally = nothing(Path(), 0, 1)
            short = shortfall(rung, tally, max(1, rung.full // divide), divide)
            assert verdict_on(rung, tally, short).startswith("tried 0 times"), rung

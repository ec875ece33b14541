"""What `make torture` says of a run: a rung that tried nothing shows nothing."""

import random
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from crash.ladder import RUNGS
from crash.phases import AIMED_AT, ANY_MOMENT, HITS_MIN, aims
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


@pytest.mark.parametrize("one_in", [1, 5, 8])
def test_a_phase_that_is_hard_to_hit_is_aimed_at_more_often(one_in: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    aimed_at, hits = Counter[str](), Counter[str]()
    for aim in aims(hits, 200, random.Random(seed)):
        aimed_at[aim] += 1
        if aim != "flush" or aimed_at[aim] % one_in == 0:
            hits[aim] += 1
    assert min(hits[phase] for phase in AIMED_AT) >= HITS_MIN
    assert min(aimed_at[aim] for aim in (*AIMED_AT, ANY_MOMENT)) >= 100 // 6
    assert 200 <= aimed_at.total() <= 300


def test_a_phase_that_cannot_be_hit_is_not_aimed_at_without_end() -> None:
    assert sum(1 for _ in aims({}, 200, random.Random(1))) == 300
    assert sum(1 for _ in aims({}, 4, random.Random(1))) == 4

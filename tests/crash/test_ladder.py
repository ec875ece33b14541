"""A bounded sample of every rung of the fault ladder: nothing is lost, doubled, torn or wrongly served."""

import random
from pathlib import Path

import pytest
from crash.ladder import RUNGS
from crash.tally import Rung


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.fault)
def test_a_fault_loses_nothing_unless_a_safeguard_is_off(tmp_path: Path, rung: Rung) -> None:
    why_not = rung.unavailable()
    if why_not:
        pytest.skip(why_not)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    tally = rung.run(tmp_path, seed, rung.sample)
    print(tally)
    if rung.must_lose:
        assert tally.losses > 0, "a safeguard is switched off, and nothing was lost: the rung cannot fail"
    else:
        assert tally.losses == 0, tally.details
    assert tally.times, "nothing was tried"

"""Sixteen processes hammer twenty sessions while the daemon is killed: the checkers find nothing.

A bounded sample of it runs with the fault ladder.
"""

import random
from pathlib import Path

import pytest
from crash.hammer import run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sixteen_processes_and_many_kills(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    tally = run(tmp_path, seed, 30)
    print(tally)
    assert tally.losses == 0, tally.details
    assert tally.times >= 30
    assert tally.acknowledged >= 30 * 100

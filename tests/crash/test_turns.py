"""Turns under leases never interleave, whoever dies or sleeps in one: others take over, and no late write."""

import random
from pathlib import Path

import pytest
from crash.tally import Tally
from crash.turns import run


def show_and_judge(tally: Tally, turns: int, each_fault_min: int) -> None:
    print(tally)
    assert tally.losses == 0, tally.details
    assert tally.acknowledged >= turns
    assert min(tally.phases["killed"], tally.phases["stopped"]) >= each_fault_min, tally.phases


def test_turns_do_not_interleave(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    show_and_judge(run(tmp_path, seed, 40, faults=0.1), 40, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_turns_do_not_interleave(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    show_and_judge(run(tmp_path, seed, 1000, daemon_kills=4), 1000, 10)

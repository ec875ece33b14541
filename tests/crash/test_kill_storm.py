"""Kill -9 under four writing processes: nothing acknowledged is lost or doubled, no batch torn, in order."""

import random
from pathlib import Path

import pytest
from crash.kills import BUSY, kill_storm
from crash.storms import ACKNOWLEDGED_MIN
from crash.tally import Tally


def show_and_judge(tally: Tally, kills: int) -> None:
    print(tally)
    assert tally.losses == 0, tally.details
    assert tally.times >= kills
    assert tally.acknowledged >= kills * ACKNOWLEDGED_MIN


@pytest.mark.parametrize("variant", ["retry", "leave"])
def test_a_killed_daemon_keeps_its_word(tmp_path: Path, variant: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    show_and_judge(kill_storm(tmp_path, seed, 3, variant=variant, flags=()), 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", ["retry", "leave", "mixed"])
@pytest.mark.parametrize("flags", [(), BUSY], ids=["defaults", "busy"])
def test_a_daemon_that_is_killed_fifty_times_keeps_its_word(
    tmp_path: Path, variant: str, flags: tuple[str, ...]
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    show_and_judge(kill_storm(tmp_path, seed, 50, variant=variant, flags=flags), 50)

"""Kill -9 under four writing processes: nothing acknowledged is lost or doubled, no batch torn, in order."""

import random
from pathlib import Path

import pytest
from crash.storms import ACKNOWLEDGED_PER_KILL, StormReport, kill_storm

BUSY = ("--checkpoint-s-max", "0.1")


def show_and_judge(report: StormReport, kills: int) -> None:
    print(report)
    assert report.faults() == 0, report.details[:10]
    assert report.kills == kills
    assert report.acknowledged >= kills * ACKNOWLEDGED_PER_KILL


@pytest.mark.parametrize(("variant", "flags"), [("retry", ()), ("mixed", BUSY)], ids=["retry", "mixed"])
def test_a_killed_daemon_keeps_its_word(tmp_path: Path, variant: str, flags: tuple[str, ...]) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    show_and_judge(kill_storm(3, seed, tmp_path, variant=variant, flags=flags), 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", ["retry", "leave", "mixed"])
@pytest.mark.parametrize("flags", [(), BUSY], ids=["defaults", "busy"])
def test_a_daemon_that_is_killed_fifty_times_keeps_its_word(
    tmp_path: Path, variant: str, flags: tuple[str, ...]
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    show_and_judge(kill_storm(50, seed, tmp_path, variant=variant, flags=flags), 50)

"""The rung of kill -9: the storm of `storms`, counted as the ladder counts."""

from pathlib import Path

from crash.storms import kill_storm
from crash.tally import Tally

_FLAGS = ("--checkpoint-s-max", "0.1")


def run(root: Path, seed: int, kills: int) -> Tally:
    """Kill the daemon so many times under four writing processes."""
    report = kill_storm(kills, seed, root, variant="mixed", flags=_FLAGS)
    return Tally(
        times=report.kills,
        acknowledged=report.acknowledged,
        unknown=report.unknown,
        lost=report.lost,
        duplicated=report.duplicated,
        torn=report.torn,
        wrong=report.out_of_order + report.misplaced + report.invented,
        details=report.details,
    )

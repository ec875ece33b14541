"""The rung of kill -9: a storm whose daemon is killed, most of the time in the middle of a chosen phase.

The daemon says in shared memory what it is doing (`phases`). The killer waits for enough acknowledgements,
then for the phase that is due, kills, and reads there what it really hit.
"""

import random
import sys
from pathlib import Path

from crash.phases import Phases, aims
from crash.storms import Storm
from crash.tally import Tally
from daemons import Daemon

BUSY = ("--checkpoint-s-max", "0.1")
LAUNCHER = (sys.executable, str(Path(__file__).parent / "traced_daemon.py"))


def kill_storm(
    root: Path, seed: int, kills: int, *, variant: str = "mixed", flags: tuple[str, ...] = BUSY
) -> Tally:
    """Kill a daemon so many times.

    Args:
        root: an empty directory.
        seed: of every choice.
        kills: how often; a few more, where a phase was hit too rarely.
        variant: what the processes do about calls without an answer: see Storm.
        flags: more flags of the daemon.

    """
    rng = random.Random(seed)
    tally = Tally()
    phases = Phases(root / "phases")
    launcher = (*LAUNCHER, "--phases", str(root / "phases"))
    daemon = Daemon(root / "data", store="jsonl", flags=flags, launcher=launcher)
    try:
        daemon.start()
        with Storm(root, daemon, seed, variant) as storm:
            for aim in aims(tally.phases, kills, rng):
                storm.await_acknowledgements()
                phases.await_moment(aim, lambda: daemon.process.poll() is None, rng)
                daemon.kill()
                storm.died()
                tally.times += 1
                tally.phases.update(phases.now() or ["between"])
                phases.clear()
                daemon.start()
            storm.await_acknowledgements()
            storm.finish(tally)
    finally:
        daemon.close()
    return tally


def run(root: Path, seed: int, kills: int) -> Tally:
    """Kill the daemon so many times under four processes, checkpoints and rewrites all the time."""
    return kill_storm(root, seed, kills)


def run_at_os(root: Path, seed: int, kills: int) -> Tally:
    """The same at durability `os`: it survives kill -9, too."""
    return kill_storm(root, seed, kills, flags=(*BUSY, "--durability", "os"))

"""The rung of kill -9: a storm whose daemon is killed, most of the time in the middle of a chosen phase.

The daemon says in shared memory what it is doing (`phases`). The killer waits for enough acknowledgements,
then for the phase that is due, kills, and reads there what it really hit.
"""

import random
import sys
import time
from pathlib import Path

from crash.phases import Phases
from crash.storms import Storm
from crash.tally import Tally
from daemons import Daemon

AIMED_AT = ("commit", "append", "flush", "rename", "catalogue")
BUSY = ("--checkpoint-s-max", "0.1")
_LAUNCHER = (sys.executable, str(Path(__file__).parent / "traced_daemon.py"))
_SPIN_S = 2.0
_ANY_MOMENT_S = 0.1


def kill_storm(
    root: Path, seed: int, kills: int, *, variant: str = "mixed", flags: tuple[str, ...] = BUSY
) -> Tally:
    """Kill a daemon so many times.

    Args:
        root: an empty directory.
        seed: of every choice.
        kills: how often.
        variant: what the processes do about calls without an answer: see Storm.
        flags: more flags of the daemon.

    """
    rng = random.Random(seed)
    tally = Tally()
    phases = Phases(root / "phases")
    launcher = (*_LAUNCHER, "--phases", str(root / "phases"))
    daemon = Daemon(root / "data", store="jsonl", flags=flags, launcher=launcher)
    try:
        daemon.start()
        with Storm(root, daemon, seed, variant) as storm:
            aims = [*AIMED_AT, "any moment"]
            rng.shuffle(aims)
            for n in range(kills):
                storm.await_acknowledgements()
                _kill(daemon, phases, aims[n % len(aims)], rng)
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


def _kill(daemon: Daemon, phases: Phases, aim: str, rng: random.Random) -> None:
    if aim in AIMED_AT:
        phases.wait_for(aim, lambda: daemon.process.poll() is None, _SPIN_S)
    else:
        time.sleep(rng.random() * _ANY_MOMENT_S)
    daemon.kill()


def run(root: Path, seed: int, kills: int) -> Tally:
    """Kill the daemon so many times under four processes, checkpoints and rewrites all the time."""
    return kill_storm(root, seed, kills)


def run_at_os(root: Path, seed: int, kills: int) -> Tally:
    """The same at durability `os`: it survives kill -9, too."""
    return kill_storm(root, seed, kills, flags=(*BUSY, "--durability", "os"))

"""The rungs of power cuts: a storm on a real file system whose power is cut (`ext4`), and mounted again.

A cut comes in the middle of a phase that is aimed at (`phases`), or at any moment; or soon after the daemon
met a device that failed, stopped, and was started again on the same mount, where the page cache still shows
what the device never got. With its flushes switched off the same daemon must lose what it acknowledged: so
these rungs can fail.
"""

import random
import sys
from pathlib import Path

from crash.ext4 import Ext4
from crash.phases import ANY_MOMENT, Phases, aims
from crash.storms import ACKNOWLEDGED_MIN, PATIENCE_S, Storm
from crash.tally import Tally
from daemons import Daemon, DaemonDied

BUSY = ("--checkpoint-s-max", "0.1")
STORAGE_FAILED = 3
_LAUNCHER = (sys.executable, str(Path(__file__).parent / "traced_daemon.py"))


def power_cuts(
    root: Path, seed: int, cuts: int, *, failing_first: bool = False, launcher: tuple[str, ...] = ()
) -> Tally:
    """Cut the power so many times.

    Args:
        root: an empty directory.
        seed: of every choice.
        cuts: how often; a few more, where a phase was hit too rarely.
        failing_first: before each cut the device fails, the daemon stops, and is started again.
        launcher: more arguments of the traced daemon.

    """
    rng = random.Random(seed)
    tally = Tally()
    phases = Phases(root / "phases")
    launch = (*_LAUNCHER, "--phases", str(root / "phases"), *launcher)
    with Ext4(root) as disk:
        daemon = Daemon(disk.path / "data", store="jsonl", flags=BUSY, launcher=launch)
        try:
            daemon.start()
            disk.settle()
            with Storm(root, daemon, seed) as storm:
                for aim in [ANY_MOMENT] * cuts if failing_first else aims(tally.phases, cuts, rng):
                    storm.await_acknowledgements()
                    if failing_first:
                        _fail(disk, daemon, storm)
                        storm.await_acknowledgements(rng.randint(1, ACKNOWLEDGED_MIN))
                    else:
                        phases.await_moment(aim, lambda: daemon.process.poll() is None, rng)
                    before = phases.now()
                    storm.struck(power=True)
                    disk.cut()
                    hit = [phase for phase in phases.now() if phase in before]
                    daemon.kill()
                    tally.phases.update(hit or ["between"])
                    phases.clear()
                    storm.died()
                    disk.unmount()
                    disk.mount()
                    tally.times += 1
                    try:
                        daemon.start()
                    except DaemonDied as error:
                        tally.lose("lost", f"it does not start on what is left: {error}")
                        return tally
                storm.await_acknowledgements()
                storm.finish(tally)
        finally:
            daemon.close()
    return tally


def _fail(disk: Ext4, daemon: Daemon, storm: Storm) -> None:
    """The device fails under the daemon, which stops; then it is started again on what is there."""
    storm.struck()
    disk.break_device()
    code = daemon.wait(PATIENCE_S)
    assert code == STORAGE_FAILED, f"it ended with {code}: {daemon.stderr[-2000:]}"
    storm.died()
    disk.mend_device()
    daemon.start()


def run(root: Path, seed: int, cuts: int) -> Tally:
    """Cut the power, most of the time in the middle of a chosen phase."""
    return power_cuts(root, seed, cuts)


def run_after_failure(root: Path, seed: int, cuts: int) -> Tally:
    """Cut the power right after a failed flush, a stop and a restart."""
    return power_cuts(root, seed, cuts, failing_first=True)


def run_without_flushes(root: Path, seed: int, cuts: int) -> Tally:
    """Cut the power of a daemon that flushes nothing, until something is lost; at most so many times."""
    tally = Tally()
    for n in range(cuts):
        part = root / f"{n}"
        part.mkdir()
        tally.add(power_cuts(part, seed + n, 1, launcher=("--no-flush",)))
        if tally.lost:
            break
    return tally

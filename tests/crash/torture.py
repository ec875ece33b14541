"""The fault ladder as one command: every rung at full size, and a table of what was lost.

python tests/crash/torture.py [--seed N] [--only TEXT] [--divide N]

Exits with 0 if every loss column is 0 and every rung was tried as often as it says; with 1 otherwise. A rung
with a safeguard switched off must lose something, or it could not find a loss. A rung that this machine
cannot run is named, and counts as not shown.
"""

import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import click
from crash.ladder import RUNGS
from crash.phases import HITS_MIN
from crash.tally import LOSSES, Rung, Tally
from rich.console import Console
from rich.table import Table

_COLUMNS = ("times", "acknowledged", "unknown", *LOSSES)


def run(rung: Rung, seed: int, size: int) -> Tally:
    """Run one rung in a directory of its own, which is removed unless something was lost."""
    root = Path(tempfile.mkdtemp(prefix="sessionstore-torture-"))
    try:
        tally = rung.run(root, seed, size)
    except Exception:
        tally = Tally()
        tally.lose("wrong", f"the rung itself failed:\n{traceback.format_exc()}")
    if tally.losses and not rung.must_lose:
        tally.notes.append(f"what is left of it: {root}")
    else:
        shutil.rmtree(root, ignore_errors=True)
    return tally


def shortfall(rung: Rung, tally: Tally, size: int, divide: int) -> str:
    """What a run was not tried at; empty if it was tried enough."""
    wanted = max(1, rung.times_min // divide) if rung.times_min else size
    if tally.times < wanted:
        return f"tried {tally.times} times, not {wanted}"
    missed = {phase: tally.phases[phase] for phase in rung.phases_min}
    few = [f"{phase} {hits}" for phase, hits in missed.items() if hits < HITS_MIN and divide == 1]
    return f"phases hit too rarely: {', '.join(few)}" if few else ""


def verdict_on(rung: Rung, tally: Tally, short: str) -> str:
    """What a run shows: "ok", or what is wrong."""
    if rung.must_lose:
        return short or ("ok" if tally.losses else "CANNOT FAIL")
    return "LOSS" if tally.losses else short or "ok"


@click.command()
@click.option("--seed", type=int, help="Of every random choice.  [default: a new one, printed]")
@click.option("--only", default="", help="Only rungs whose fault has this in its name.")
@click.option("--divide", type=click.IntRange(min=1), default=1, help="So many times smaller runs.")
def main(seed: int | None, only: str, divide: int) -> None:
    """Run the fault ladder and print what was lost."""
    rungs = [rung for rung in RUNGS if only in rung.fault]
    if not rungs:
        raise click.UsageError(f"no fault has {only!r} in its name: nothing would be tried")
    logging.getLogger("sessionstored").addHandler(logging.NullHandler())  # it has a lot to complain about
    seed = random.randrange(1 << 30) if seed is None else seed
    out = Console(width=max(Console().width, 140), highlight=False)
    out.print(f"seed {seed}")
    table = Table("fault", *_COLUMNS, "seconds", "verdict")
    failed = False
    for rung in rungs:
        why_not = rung.unavailable()
        if why_not:
            out.print(f"{rung.fault}: not shown: {why_not}")
            table.add_row(rung.fault, *[""] * len(_COLUMNS), "", "not shown")
            failed = True
            continue
        size = max(1, rung.full // divide)
        begun = time.monotonic()
        tally = run(rung, seed, size)
        took = time.monotonic() - begun
        verdict = verdict_on(rung, tally, shortfall(rung, tally, size, divide))
        failed |= verdict != "ok"
        table.add_row(rung.fault, *(f"{getattr(tally, name):,}" for name in _COLUMNS), f"{took:.0f}", verdict)
        out.print(f"{rung.fault}: {verdict} ({took:.0f} s)")
        if tally.phases:
            out.print("  phases: " + ", ".join(f"{name} {n}" for name, n in tally.phases.most_common()))
        for line in [*tally.notes, *tally.details[: 1 if rung.must_lose else None]]:
            out.print(f"  {line}", markup=False)
    out.print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

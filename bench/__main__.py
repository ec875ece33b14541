"""The command: runs the workloads, writes RESULTS.md and the plots, and ends with one line per bar."""

import argparse
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

from bench import place, report
from bench.alone import alone, lengths, long_sessions, turns
from bench.bars import judge
from bench.crowds import crowds
from bench.generate import generate
from bench.reads import last_messages, near, reads, start_up
from bench.run import Run
from bench.scale import listing, scale
from bench.servers import Ours
from bench.sizes import SIZES
from bench.stores import main_store
from bench.watching import fan_out

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """Run. 0 if everything ran, whatever the bars say."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and data go, too
    sizes = SIZES[options.size]
    out = options.out or (HERE if sizes.name == "full" else HERE.parent / "build" / "bench")
    machine = place.machine(options.dir)
    folder = place.make(options.dir, any_file_system=options.size == "tiny")
    run = Run(folder, sizes, peers=not options.no_peers)
    command = "python -m bench " + shlex.join(arguments)
    try:
        _all(run, options.only)
        verdicts = judge(run.results, sizes)
        report.write(out, run.results, verdicts, sizes, command, machine)
    finally:
        run.say("stopping the servers, removing the data")
        run.close()
        shutil.rmtree(folder)
    print(report.summary(run.results))
    print(f"written: {out / 'RESULTS.md'}\n")
    for verdict in verdicts:
        print(verdict.line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="how much (default: full)")
    parser.add_argument("--no-peers", action="store_true", help="ours and the floors alone")
    parser.add_argument(
        "--only", action="append", choices=list(PARTS), help="only this workload; may be repeated"
    )
    parser.add_argument(
        "--dir", type=Path, default=place.DEFAULT, help="a directory on a disk (default: /var/tmp)"
    )
    parser.add_argument(
        "--out", type=Path, help="where RESULTS.md goes (default: bench/; if not full, build/bench/)"
    )
    return parser


PARTS = {
    "crowds": crowds,
    "alone": alone,
    "turns": turns,
    "long": long_sessions,
    "lengths": lengths,
    "reads": reads,
    "last": last_messages,
    "near": near,
    "watch": fan_out,
    "listing": listing,
    "start": start_up,
    "scale": scale,
}


def _all(run: Run, only: list[str] | None) -> None:
    run.say(f"{run.sizes.name} run in {run.folder}")
    generate(run.folder / "main", main_store(run.sizes))
    run.say("the store is generated; starting the servers")
    run.ours = Ours("ours", run.folder, run.folder / "main")
    run.ours.start()
    run.stack.callback(run.ours.stop)
    run.start_peers()
    for name, part in PARTS.items():
        if only and name not in only:
            run.results.not_run[name] = "left out by --only"
            continue
        with run.part(name):
            part(run)


if __name__ == "__main__":
    os.environ.pop("SESSIONSTORE_TARGET", None)
    sys.exit(main(sys.argv[1:]))

"""A rung shared out to two processes, because one Python process uses one core."""

import logging
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from crash.tally import Tally

PROCESSES = 2
SMALL = 50
"""So few times are not worth the start of processes."""


def shared_out(part: Callable[[Path, int, int], Tally], root: Path, seed: int, times: int) -> Tally:
    """Run a part in each of two processes, each with its own directory, seed and share of the times."""
    if times < SMALL:
        return part(root, seed, times)
    shares = [times // PROCESSES + (n < times % PROCESSES) for n in range(PROCESSES)]
    total = Tally()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, initializer=_find, initargs=(sys.path,)) as pool:
        running = []
        for n, share in enumerate(shares):
            directory = root / f"part{n}"
            directory.mkdir()
            running.append(pool.submit(part, directory, seed + n, share))
        for each in running:
            total.add(each.result())
    return total


def _find(path: list[str]) -> None:
    """Let a new process find what this one found, and say no more than it."""
    sys.path[:] = path
    logging.getLogger("sessionstored").addHandler(logging.NullHandler())

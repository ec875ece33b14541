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


def shared_out(part: Callable[[Path, int, int, int, int], Tally], root: Path, seed: int, times: int) -> Tally:
    """Run the parts of a rung in two processes, each in its own directory.

    Args:
        part: gets a directory, the seed, the times of all parts together, its number, and how many there are.
        root: an empty directory.
        seed: of all parts.
        times: of all parts together.

    """
    if times < SMALL:
        return part(root, seed, times, 0, 1)
    total = Tally()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, initializer=_find, initargs=(sys.path,)) as pool:
        running = []
        for n in range(PROCESSES):
            directory = root / f"part{n}"
            directory.mkdir()
            running.append(pool.submit(part, directory, seed, times, n, PROCESSES))
        for each in running:
            total.add(each.result())
    return total


def _find(path: list[str]) -> None:
    """Let a new process find what this one found, and say no more than it."""
    sys.path[:] = path
    logging.getLogger("sessionstored").addHandler(logging.NullHandler())

"""What a daemon is doing right now, in memory that it shares with its killer and that outlives it.

One byte per thread says which phase it is in, 0 for none; one more says which phase the killer waits for. The
daemon's side is `traced_daemon`. Memory of a mapped file belongs to the system: what a process wrote into it
is there after kill -9, so the killer learns what it really hit.
"""

import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PHASES = ("commit", "append", "flush", "rename", "catalogue", "rewrite", "log")
"""commit: of a group's journal row. append: to a session file. flush: of a file or a directory. rename: of a
file written anew. catalogue: its rows, the windows', and the end of a checkpoint. rewrite: a file is written
anew, under a temporary name. log: SQLite's log is moved into the database."""
AIMED_AT = ("commit", "append", "flush", "rename", "catalogue")
"""Those that a full run has to hit, each at least HITS_MIN times."""
HITS_MIN = 10
_TIMES_PER_HIT = 20
BRIEF = ("append", "rename", "catalogue")
"""Over sooner than a killer comes: while it waits for one, the daemon lingers before and after the work."""
_LINGER_S = 0.005
_SPIN_S = 2.0
ANY_MOMENT = "any moment"
_ANY_MOMENT_S = 0.1
_THREADS = ("committer", "maintenance", "")
_WANTED = len(_THREADS)
_SIZE = _WANTED + 1


class Phases:
    """The shared bytes."""

    def __init__(self, path: Path) -> None:
        """Map the file; it is made if it is missing."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, _SIZE)
            self._bytes = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._rng = random.Random()

    # The daemon's side.

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Say that the calling thread is in a phase."""
        number, place = PHASES.index(phase) + 1, _place()
        outer = self._bytes[place]
        self._bytes[place] = number
        try:
            self._linger(phase, number)
            yield
            self._linger(phase, number)
        finally:
            self._bytes[place] = outer

    def _linger(self, phase: str, number: int) -> None:
        if phase in BRIEF and self._bytes[_WANTED] == number:
            time.sleep(self._rng.random() * _LINGER_S)

    # The killer's side.

    def clear(self) -> None:
        """Nobody is doing anything."""
        self._bytes[:] = bytes(_SIZE)

    def await_moment(self, aim: str, alive: Callable[[], bool], rng: random.Random) -> None:
        """Wait for the moment that is due: a phase, or any; not much longer, if it does not come."""
        if aim == ANY_MOMENT:
            time.sleep(rng.random() * _ANY_MOMENT_S)
        else:
            self._spin(aim, alive)

    def _spin(self, phase: str, alive: Callable[[], bool]) -> None:
        number, shared = PHASES.index(phase) + 1, self._bytes
        shared[_WANTED] = number
        deadline = time.monotonic() + _SPIN_S
        while time.monotonic() < deadline and alive():
            for _ in range(2000):
                if shared[0] == number or shared[1] == number or shared[2] == number:
                    return

    def now(self) -> list[str]:
        """The phases that threads are in, or were in when they were killed."""
        return [PHASES[number - 1] for number in self._bytes[:_WANTED] if number]


def aims(hits: Mapping[str, int], times: int, rng: random.Random) -> Iterator[str]:
    """What to aim at: so many times, and up to half as many more while a phase was hit too rarely.

    Half of the aims go round, to every phase and to any moment; the other half, and those at the end, go to
    the phase that was hit least: some are over before the blow comes, more often on a busy machine.

    Args:
        hits: how often each phase was hit so far; the caller goes on counting.
        times: how often at the least; with 200, every phase is wanted HITS_MIN times.
        rng: chooses between equals.

    """
    turns = [*AIMED_AT, ANY_MOMENT]
    rng.shuffle(turns)
    wanted = min(HITS_MIN, times // _TIMES_PER_HIT)
    for n in range(times + times // 2):
        least = min(rng.sample(AIMED_AT, len(AIMED_AT)), key=lambda phase: hits.get(phase, 0))
        if n >= times and hits.get(least, 0) >= wanted:
            return
        yield turns[n // 2 % len(turns)] if n < times and n % 2 == 0 else least


def _place() -> int:
    name = threading.current_thread().name
    return _THREADS.index(name) if name in _THREADS else len(_THREADS) - 1

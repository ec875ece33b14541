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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PHASES = ("commit", "append", "flush", "rename", "catalogue", "rewrite", "log")
"""commit: of a group's journal row. append: to a session file. flush: of a file or a directory. rename: of a
file written anew. catalogue: its rows, the windows', and the end of a checkpoint. rewrite: a file is written
anew, under a temporary name. log: SQLite's log is moved into the database."""
BRIEF = ("append", "rename")
"""Over in microseconds, which is less than a killer takes: while it waits for one, it is made longer."""
_LINGER_S = 0.002
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

    def wait_for(self, phase: str, alive: Callable[[], bool], timeout_s: float) -> bool:
        """Spin until some thread is in a phase; False if none is in time, or the daemon is gone."""
        number, shared = PHASES.index(phase) + 1, self._bytes
        shared[_WANTED] = number
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and alive():
            for _ in range(2000):
                if shared[0] == number or shared[1] == number or shared[2] == number:
                    return True
        return False

    def now(self) -> list[str]:
        """The phases that threads are in, or were in when they were killed."""
        return [PHASES[number - 1] for number in self._bytes[:_WANTED] if number]


def _place() -> int:
    name = threading.current_thread().name
    return _THREADS.index(name) if name in _THREADS else len(_THREADS) - 1

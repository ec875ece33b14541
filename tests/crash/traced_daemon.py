"""A daemon for fault tests: `sessionstored`, with its disk watched, or with its flushes switched off.

python traced_daemon.py [--phases FILE] [--no-flush] serve ...

`--phases` writes what each thread is doing into a shared file (`phases`). `--no-flush` makes every flush, of
session files and of the journal, do nothing: what an acknowledgement is then worth shows what they are for.
Only tests can reach this: it wraps the daemon from outside, and the daemon knows no such switch.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from crash.disks import QuickDisk
from crash.phases import Phases
from sessionstored.__main__ import main
from sessionstored.engine import jsonl
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.journal import Journal

_JOURNAL = {
    "append": "commit",
    "put_entries": "catalogue",
    "put_windows": "catalogue",
    "finish_checkpoint": "catalogue",
    "prune_feed": "catalogue",
    "wal_checkpoint": "log",
}


class TracedDisk(Disk):
    """The real disk; says what it is doing."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._anew: set[int] = set()
        """Descriptors of files that are being written anew."""

    def open_append(self, path: Path) -> int:
        fd = super().open_append(path)
        self._anew.discard(fd)
        return fd

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._anew.add(fd)
        return fd

    def write(self, fd: int, data: bytes) -> int:
        with self._phases.within("rewrite" if fd in self._anew else "append"):
            return super().write(fd, data)

    def flush(self, fd: int) -> None:
        with self._phases.within("flush"):
            super().flush(fd)

    def flush_directory(self, path: Path) -> None:
        with self._phases.within("flush"):
            super().flush_directory(path)

    def rename(self, old: Path, new: Path) -> None:
        with self._phases.within("rename"):
            super().rename(old, new)


def _traced(method: Callable[..., object], phase: str, phases: Phases) -> Callable[..., object]:
    @wraps(method)
    def within(*arguments: object, **options: object) -> object:
        with phases.within(phase):
            return method(*arguments, **options)

    return within


def trace(path: Path) -> None:
    """Have the daemon of this process say what it is doing."""
    phases = Phases(path)
    for name, phase in _JOURNAL.items():
        setattr(Journal, name, _traced(getattr(Journal, name), phase, phases))
    jsonl.open_jsonl = partial(jsonl.open_jsonl, disk=TracedDisk(phases))


def switch_flushes_off() -> None:
    """Have the daemon of this process flush nothing, and SQLite neither."""
    begin = Journal.__init__

    @wraps(begin)
    def begin_carelessly(journal: Journal, *arguments: object) -> None:
        begin(journal, *arguments)
        journal._db.pragma("synchronous", 0)

    Journal.__init__ = begin_carelessly
    jsonl.open_jsonl = partial(jsonl.open_jsonl, disk=QuickDisk())


if __name__ == "__main__":
    arguments = sys.argv[1 : sys.argv.index("serve")]
    sys.argv = [sys.argv[0], *sys.argv[sys.argv.index("serve") :]]
    if "--phases" in arguments:
        trace(Path(arguments[arguments.index("--phases") + 1]))
    if "--no-flush" in arguments:
        switch_flushes_off()
    main()

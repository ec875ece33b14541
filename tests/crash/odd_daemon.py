"""`sessionstored` under odd circumstances, for tests only: a launcher that a `Daemon` is given.

python odd_daemon.py [OPTION...] -- COMMAND...

--wall-shift-s SECONDS: the wall clock says so many seconds more (or less).
--count FILE: a line in FILE for each write that came short, and each that found the disk full, of session
files and of the journal.
--fail-sync FILE: from the moment that FILE exists, flushes of the journal's log fail.
--note-work FILE: a line in FILE for each checkpoint and each session written anew: what, begin and end on
time.monotonic(), how many sessions. SIGUSR1 then starts a round of both.
--memory-mib COUNT: so much memory for data, and no more (RLIMIT_DATA).

It changes what the daemon meets, nothing of what it does.
"""

import argparse
import errno
import os
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import apsw
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.maintenance import Maintenance
from sessionstored.engine.jsonl.state import State


def odd_daemon(*options: str) -> tuple[str, ...]:
    """The launcher for a `Daemon`."""
    return (sys.executable, __file__, *options, "--")


def counted(events: Path) -> Counter[str]:
    """What --count wrote so far."""
    return Counter(events.read_text().splitlines()) if events.exists() else Counter()


class _Log:
    """Events, written at once: the daemon may be killed at any moment."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, event: str) -> None:
        os.write(self._fd, event.encode() + b"\n")


def _shift_wall_clock(seconds: float) -> None:
    time_ns = time.time_ns
    time.time_ns = lambda: time_ns() + int(seconds * 1e9)


def worked(notes: Path) -> list[tuple[str, float, float, int]]:
    """What --note-work wrote so far."""
    lines = [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []
    return [(what, float(begin), float(end), int(count)) for what, begin, end, count in lines]


def _note_work(log: _Log) -> None:
    checkpoint, rewrite, start = Maintenance.checkpoint, Maintenance.rewrite, Maintenance.start
    begun: list[Maintenance] = []

    def noting_checkpoint(self: Maintenance) -> bool:
        begin, count = time.monotonic(), len(self._vault.dirty)
        done = checkpoint(self)
        log.note(f"checkpoint {begin} {time.monotonic()} {count}")
        return done

    def noting_rewrite(self: Maintenance, state: State) -> bool:
        begin = time.monotonic()
        done = rewrite(self, state)
        log.note(f"rewrite {begin} {time.monotonic()} 1")
        return done

    def noting_start(self: Maintenance) -> None:
        begun.append(self)
        start(self)

    signal.signal(signal.SIGUSR1, lambda *_: [each.nudge() for each in begun])
    Maintenance.start = noting_start  # type: ignore[method-assign]
    Maintenance.checkpoint = noting_checkpoint  # type: ignore[method-assign]
    Maintenance.rewrite = noting_rewrite  # type: ignore[method-assign]


def _count_file_writes(log: _Log) -> None:
    write = Disk.write

    def counting(self: Disk, fd: int, data: bytes) -> int:
        try:
            written = write(self, fd, data)
        except OSError as error:
            log.note(f"session file {errno.errorcode[error.errno]}")
            raise
        if written < len(data):
            log.note("session file short write")
        return written

    Disk.write = counting  # type: ignore[method-assign]


class _File(apsw.VFSFile):
    def __init__(self, name: object, flags: list[int], log: _Log | None, fail_sync: Path | None) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._is_log = path.endswith("-wal")
        self._log = log
        self._fail_sync = fail_sync
        super().__init__("unix", name, flags)  # type: ignore[arg-type]

    def xWrite(self, data: bytes, offset: int) -> None:
        try:
            super().xWrite(data, offset)
        except apsw.FullError:
            if self._log is not None:
                self._log.note(f"journal {'log' if self._is_log else 'database'} ENOSPC")
            raise

    def xSync(self, flags: int) -> None:
        if self._is_log and self._fail_sync is not None and self._fail_sync.exists():
            raise apsw.IOError("injected: sync")
        super().xSync(flags)


class _Vfs(apsw.VFS):
    """SQLite's default VFS, watched."""

    def __init__(self, log: _Log | None, fail_sync: Path | None) -> None:
        self._of_files = log, fail_sync
        super().__init__("odd", "unix", makedefault=True)

    def xOpen(self, name: object, flags: list[int]) -> _File:  # type: ignore[override]
        return _File(name, flags, *self._of_files)


def main() -> None:
    """Arrange what is asked for, then be `sessionstored`."""
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--wall-shift-s", type=float, default=0.0)
    parser.add_argument("--count")
    parser.add_argument("--fail-sync", type=Path)
    parser.add_argument("--note-work")
    parser.add_argument("--memory-mib", type=int)
    options = parser.parse_args(sys.argv[1:split])
    log = _Log(options.count) if options.count else None
    if options.memory_mib:
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory_mib << 20, options.memory_mib << 20))
    if options.wall_shift_s:
        _shift_wall_clock(options.wall_shift_s)
    if log is not None:
        _count_file_writes(log)
    if options.note_work:
        _note_work(_Log(options.note_work))
    vfs = _Vfs(log, options.fail_sync) if log or options.fail_sync else None
    sys.argv[1:] = sys.argv[split + 1 :]
    from sessionstored.__main__ import main as command

    command()
    del vfs


if __name__ == "__main__":
    main()

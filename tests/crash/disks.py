"""Disks that fail, fill, and remember what a crash would leave.

All of them stand at the engine's lowest seam, `Disk`. SQLite's own writes do not pass there; they are as
durable as SQLite makes them, which `faults` tests with a VFS.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
from sessionstored.engine.jsonl import pages, wal
from sessionstored.engine.jsonl.catalogue import WritableCatalogue
from sessionstored.engine.jsonl.disk import Disk

KINDS = ("open_append", "create", "write", "flush", "flush_directory", "truncate", "rename", "unlink")


class WatchedDisk(Disk):
    """Calls `before(step, kind, target)` before every change and flush; counts them and bytes written."""

    def __init__(self, before: Callable[[int, str, Path | int], None] | None = None) -> None:
        self.before = before
        self.steps = 0
        self.bytes_written = 0
        self.kinds: list[str] = []

    def step(self, kind: str, target: Path | int) -> None:
        self.steps += 1
        self.kinds.append(kind)
        if self.before is not None:
            self.before(self.steps, kind, target)

    def open_append(self, path: Path) -> int:
        self.step("open_append", path)
        return super().open_append(path)

    def create(self, path: Path) -> int:
        self.step("create", path)
        return super().create(path)

    def write(self, fd: int, data: bytes) -> int:
        self.step("write", fd)
        self.bytes_written += len(data)
        return super().write(fd, data)

    def flush(self, fd: int) -> None:
        self.step("flush", fd)
        super().flush(fd)

    def flush_directory(self, path: Path) -> None:
        self.step("flush_directory", path)
        super().flush_directory(path)

    def truncate(self, fd: int, length: int) -> None:
        self.step("truncate", fd)
        super().truncate(fd, length)

    def rename(self, old: Path, new: Path) -> None:
        self.step("rename", old)
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        self.step("unlink", path)
        super().unlink(path)


class PowerDisk(WatchedDisk):
    """Remembers what of DATA/sessions is durable, so that a power cut at any step can be laid out.

    Bytes are durable once their file is flushed, names once their directory is: nothing earlier. That is
    harsher than most file systems, and what POSIX allows.
    """

    def __init__(self, sessions: Path, before: Callable[[int, str, Path | int], None] | None = None) -> None:
        super().__init__(before)
        self.sessions = sessions
        self._bytes: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        if sessions.is_dir():
            for path in sessions.iterdir():
                self._bytes[path.stat().st_ino] = path.read_bytes()
            self._names = self._listed()

    def _listed(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self.sessions.iterdir()}

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._forget_reused(fd)
        return fd

    def open_append(self, path: Path) -> int:
        new = not path.exists()
        fd = super().open_append(path)
        if new:
            self._forget_reused(fd)
        return fd

    def _forget_reused(self, fd: int) -> None:
        """A new file may have the inode number of one that is gone."""
        inode = os.fstat(fd).st_ino
        if inode not in self._names.values():
            self._bytes.pop(inode, None)

    def flush(self, fd: int) -> None:
        super().flush(fd)
        stat = os.fstat(fd)
        self._bytes[stat.st_ino] = os.pread(fd, stat.st_size, 0)

    def flush_directory(self, path: Path) -> None:
        super().flush_directory(path)
        if path == self.sessions:
            self._names = self._listed()

    def lay_out(self, sessions: Path) -> dict[str, int]:
        """Make `sessions` what a power cut now would leave; returns each file's own inode number."""
        shutil.rmtree(sessions, ignore_errors=True)
        sessions.mkdir()
        for name, inode in self._names.items():
            (sessions / name).write_bytes(self._bytes.get(inode, b""))
        return self._names


class FullDisk(WatchedDisk):
    """A disk with `room` bytes left for session files: writes come short, then fail; None is endless.

    What is written in the place of bytes that are there needs no room.

    `room` may be set while another thread writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._room: int | None = None
        self.refused = 0

    @property
    def room(self) -> int | None:
        return self._room

    @room.setter
    def room(self, room: int | None) -> None:
        with self._lock:
            self._room = room

    def write(self, fd: int, data: bytes) -> int:
        with self._lock:
            if self._room is None:
                return super().write(fd, data)
            there = max(0, os.fstat(fd).st_size - os.lseek(fd, 0, os.SEEK_CUR))
            if self._room == 0 and not there:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = super().write(fd, data[: there + self._room])
            self._room -= max(0, written - there)
            return written

    def free_bytes(self, path: Path) -> int:
        room = self.room
        return super().free_bytes(path) if room is None else room


class QuickDisk(Disk):
    """Flushes nothing: for opening a copy, where only the result counts."""

    def flush(self, fd: int) -> None:
        os.fstat(fd)

    def flush_directory(self, path: Path) -> None:
        path.stat()


def copy_of(data: Path, to: Path) -> Path:
    """A copy of a data directory as a kill -9 would leave it now, without SQLite's shared memory."""
    shutil.copytree(data, to, ignore=shutil.ignore_patterns("*-shm"))
    inodes = {path.name: path.stat().st_ino for path in (data / "sessions").iterdir()}
    keep_fingerprints(to, inodes)
    return to


def power_cut_copy_of(data: Path, to: Path, disk: PowerDisk) -> Path:
    """A copy of a data directory as a power cut would leave it now."""
    shutil.copytree(data, to, ignore=shutil.ignore_patterns("*-shm"))
    keep_fingerprints(to, disk.lay_out(to / "sessions"))
    return to


def keep_fingerprints(copy: Path, inodes: dict[str, int]) -> None:
    """Let the catalogue of a copy know the copied files where it knew the original ones.

    Args:
        copy: the copied data directory.
        inodes: name -> the inode number of the original file.

    """
    with journal_of(copy) as db:
        known = {(entry.inode, entry.size): entry for entry in WritableCatalogue(db).entries(skip_wrong=True)}
        for name, inode in inodes.items():
            stat = (copy / "sessions" / name).stat()
            entry = known.get((inode, stat.st_size))
            if entry is not None:
                entry.inode, entry.mtime_ns = stat.st_ino, stat.st_mtime_ns
                WritableCatalogue(db).put(entry)


def know_files_by_name(data: Path) -> None:
    """Let the catalogue of a directory that was copied by other means know the files that are there."""
    with journal_of(data) as db:
        catalogue = WritableCatalogue(db)
        for path in (data / "sessions").iterdir():
            stat, entry = path.stat(), catalogue.entry_of_file(path.name)
            if entry is not None:
                entry.inode, entry.mtime_ns = stat.st_ino, stat.st_mtime_ns
                catalogue.put(entry)


PASSED = "(SELECT value FROM meta WHERE name = 'checkpoint_row')"
"""In SQL, the last row of the journal that recovery does not need."""


@contextmanager
def journal_of(data: Path) -> Iterator[apsw.Connection]:
    """The journal of a directory that nobody serves, to look into or to change, with right page checksums.

    What is changed is one transaction, and stays in the write-ahead log.
    """
    pages.register()
    wal.discard_torn(data / "journal.db-wal", data / "journal.db")
    db = apsw.Connection(str(data / "journal.db"), vfs=pages.CHECKSUM_VFS)
    db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    db.pragma("wal_autocheckpoint", 0)
    try:
        with db:
            yield db
    finally:
        db.close()

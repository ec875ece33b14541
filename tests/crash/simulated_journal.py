"""The journal on a simulated disk: an SQLite VFS above the one that keeps the pages' checksums.

What reaches the files is read back from them, below the checksums, and told to the disk with each flush. It
knows SQLite's files; nothing of rows.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
from crash.simulated import SimulatedDisk
from sessionstored.engine.jsonl import pages


@contextmanager
def vfs_on(disk: SimulatedDisk) -> Iterator[str]:
    """The name of a VFS for the journal of a disk's directory."""
    pages.register()
    name = f"simulated{id(disk)}"
    vfs = _Vfs(name, disk)
    try:
        yield name
    finally:
        vfs.unregister()
        for fd in vfs.eyes:  # to close one earlier would drop SQLite's locks
            os.close(fd)


class _Vfs(apsw.VFS):
    def __init__(self, name: str, disk: SimulatedDisk) -> None:
        self._disk = disk
        self.eyes: list[int] = []
        super().__init__(name, pages.CHECKSUM_VFS)

    def xOpen(self, name: object, flags: list[int]) -> apsw.VFSFile:  # type: ignore[override]
        if name is None:
            return apsw.VFSFile(pages.CHECKSUM_VFS, name, flags)  # type: ignore[arg-type]
        return _VfsFile(name, flags, self._disk, self.eyes)

    def xDelete(self, name: str, sync: bool) -> None:
        path, disk = Path(name), self._disk

        def deleting() -> None:
            super(_Vfs, self).xDelete(name, sync)
            disk.named(path)
            if sync:
                disk.flushed_names(path.parent)

        _step(disk, "journal unlink", deleting)


class _VfsFile(apsw.VFSFile):
    def __init__(self, name: object, flags: list[int], disk: SimulatedDisk, eyes: list[int]) -> None:
        self._path = Path(name.filename() if isinstance(name, apsw.URIFilename) else str(name))
        self._kind = "log" if self._path.name.endswith("-wal") else "database"
        self._disk = disk
        new = not self._path.exists()
        super().__init__(pages.CHECKSUM_VFS, name, flags)  # type: ignore[arg-type]
        self._eye = os.open(self._path, os.O_RDONLY)
        eyes.append(self._eye)
        if new or not disk.knows(os.fstat(self._eye)):
            disk.know(self._path)
        disk.cut_unseen(self._eye)
        self._names_wait = new and not flags[0] & apsw.SQLITE_OPEN_MAIN_DB
        """SQLite flushes the directory of a new log with the log's first flush."""

    def xWrite(self, data: bytes, offset: int) -> None:
        def writing(data: bytes = data) -> None:
            super(_VfsFile, self).xWrite(data, offset)
            stat = os.fstat(self._eye)
            self._disk.wrote(
                stat.st_ino, offset, os.pread(self._eye, len(data), offset), stat.st_mtime_ns
            )

        _step(self._disk, f"{self._kind} write", writing, lambda: writing(data[: len(data) // 2]))

    def xSync(self, flags: int) -> None:
        def syncing() -> None:
            self._disk.flushed(os.fstat(self._eye))
            if self._names_wait:
                self._disk.flushed_names(self._path.parent)
                self._names_wait = False

        _step(
            self._disk,
            f"{self._kind} flush",
            syncing,
            lambda: self._disk.gave_up(os.fstat(self._eye)),
        )

    def xTruncate(self, size: int) -> None:
        def cutting() -> None:
            super(_VfsFile, self).xTruncate(size)
            stat = os.fstat(self._eye)
            self._disk.changed(stat.st_ino, size, stat.st_mtime_ns)

        _step(self._disk, f"{self._kind} truncate", cutting)


def _step(
    disk: SimulatedDisk, kind: str, work: Callable[[], None], half: Callable[[], None] | None = None
) -> None:
    """A step of SQLite, whose errors are its own."""
    try:
        disk.do(kind, work, half)
    except OSError as error:
        raise (apsw.FullError if error.errno == errno.ENOSPC else apsw.IOError)(str(error)) from error

"""The lowest seam: every change and every flush of a session file and of STORE goes through a `Disk`.

It exists so that tests can fail, cut or reorder any single step. It knows paths and bytes, nothing of
sessions.
"""

import errno
import os
from pathlib import Path

_PART_BYTES = 16 << 20
"""Of a file that is written again; a multiple of whatever part of a file memory keeps as one."""


class Disk:
    """The real disk."""

    def open_append(self, path: Path) -> int:
        """Open a file for appending and reading, creating it with mode 0600."""
        return os.open(
            path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )

    def create(self, path: Path) -> int:
        """Create or empty a file of mode 0600."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, fd: int, data: bytes) -> int:
        """Write, perhaps less than asked for; returns how many bytes."""
        return os.write(fd, data)

    def flush(self, fd: int) -> None:
        """Make a file's bytes durable.

        Raises:
            OSError: they may be lost, though a second flush may say that they are not. Never ENOSPC or
                EDQUOT, which elsewhere mean that nothing happened.

        """
        _flush(fd)

    def forget(self, fd: int, offset: int = 0, length: int = 0) -> None:
        """Let go of what memory has of a flushed file, to the end if `length` is 0: the device is read next.

        After a flush that failed, what a file says may be in memory only, and no flush writes it any more. It
        does not help to write it again in its place: ext4 then writes blocks that it goes on to take for
        empty, and says that they are flushed.
        """
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def reread(self, path: Path) -> None:
        """Have a file be read from the device from now on."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self.flush(fd)
            self.forget(fd)
        finally:
            os.close(fd)

    def write_again(self, path: Path) -> None:
        """Make what can be read of a file durable, in its place, whatever flush of it failed."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self.flush(fd)
            while data := os.read(fd, _PART_BYTES):
                self.forget(fd, os.lseek(fd, -len(data), os.SEEK_CUR), len(data))
                self.write_all(fd, data)
            self.flush(fd)
        finally:
            os.close(fd)

    def flush_directory(self, path: Path) -> None:
        """Make a directory's names durable; as `flush`."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _flush(fd)
        finally:
            os.close(fd)

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file to `length` bytes."""
        os.ftruncate(fd, length)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, replacing what has it."""
        os.rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name, which must be free."""
        os.link(old, new, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        os.unlink(path)

    def free_bytes(self, path: Path) -> int:
        """How many bytes an unprivileged writer could still use."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize

    def write_all(self, fd: int, data: bytes) -> None:
        """Write everything, or raise OSError with a part of it written."""
        view = memoryview(data)
        while view:
            view = view[self.write(fd, view[: 1 << 20].tobytes() if len(view) > 1 << 20 else bytes(view)) :]


def _flush(fd: int) -> None:
    """Flush; a device below that is full is a device that failed."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(errno.EIO, f"a flush failed: {error.strerror}") from error
        raise

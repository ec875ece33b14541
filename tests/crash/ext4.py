"""A real file system of one's own, whose power can be cut and whose device can be made to fail. As root.

An ext4 image on a small tmpfs, mounted through a loop device. A cut is EXT4_IOC_SHUTDOWN without a flush of
its log: from then on nothing reaches the device, and what did not reach it is gone after the next mount. The
device fails while the tmpfs is filled up: blocks that hold nothing yet cannot be written then. So a flush of
new data reports an error, perhaps only once, and the page cache goes on to show what is not on the device.
The device gets one block at a time: of a larger write of which only the first blocks find room, a loop device
says that all of it was written.

A cut takes a moment, in which a flush may still report success. Measured with nothing but fdatasync in a
loop, over 300 cuts: 42 flushes ended after the cut had begun, and of these 21 were not there after the next
mount; all that had ended before it were. Whoever judges takes a cut's beginning as the end of every answer.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType

IMAGE_BYTES = 96 << 20
_BLOCK_BYTES = 4096
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2
_TRIM = 0xC0185879  # FITRIM
_BUSY_S = 60.0
_FILL_ATTEMPTS = 1000


@cache
def unavailable() -> str:
    """Why this machine has no such thing; empty if it has."""
    if os.geteuid() != 0:
        return "needs root: it mounts a file system"
    for program in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(program) is None:
            return f"needs {program}"
    root = Path(tempfile.mkdtemp(prefix="sessionstore-ext4-"))
    try:
        with Ext4(root) as disk:
            disk.break_device()
            disk.mend_device()
            disk.cut()
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot mount an ext4 image here: {_why(error)}"
    finally:
        shutil.rmtree(root)
    return ""


def _why(error: Exception) -> str:
    output = getattr(error, "stderr", b"") or b""
    return output.decode(errors="replace").strip() or str(error)


class Ext4:
    """The file system; a context: everything is unmounted in the end."""

    def __init__(self, root: Path) -> None:
        """Prepare; `root` is an empty directory."""
        self._memory, self.path = root / "memory", root / "disk"
        self._image, self._ballast = self._memory / "image", self._memory / "ballast"
        self._request_kb, self._request_kb_before = Path(os.devnull), ""

    def __enter__(self) -> "Ext4":
        for folder in (self._memory, self.path):
            folder.mkdir()
        try:
            _run("mount", "-t", "tmpfs", "-o", f"size={IMAGE_BYTES + (1 << 20)}", "tmpfs", self._memory)
            fd = os.open(self._image, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.ftruncate(fd, IMAGE_BYTES)
                _run("mkfs.ext4", "-q", "-F", "-b", _BLOCK_BYTES, self._image)
                os.posix_fallocate(fd, 0, IMAGE_BYTES)  # only now: it makes holes where zeros belong
            finally:
                os.close(fd)
            self.mount()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def mount(self) -> None:
        """Mount the image, as after the power is back."""
        _run("mount", "-o", "loop", self._image, self.path)
        device = os.stat(self.path).st_dev
        request_kb = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/max_sectors_kb")
        before = request_kb.read_text()
        request_kb.write_text(f"{_BLOCK_BYTES >> 10}")
        self._request_kb, self._request_kb_before = request_kb, before

    def unmount(self) -> None:
        """Unmount it; whoever had files open there must be gone."""
        self._request_kb.write_text(self._request_kb_before)  # or whoever gets this device next has ours
        deadline = time.monotonic() + _BUSY_S
        while True:
            try:
                return _run("umount", self.path)
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def cut(self) -> None:
        """Cut the power: nothing reaches the device any more."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def settle(self) -> None:
        """Make everything durable that was written so far."""
        _run("sync", "--file-system", self.path)

    def break_device(self, room_bytes: int = 0) -> None:
        """Have writes of new blocks fail from now on, but for so many bytes."""
        self._trim()
        fd = os.open(self._ballast, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            for _ in range(_FILL_ATTEMPTS):  # somebody may write meanwhile
                stat = os.statvfs(self._memory)
                too_much = stat.f_bavail * stat.f_frsize - room_bytes
                if too_much <= 0:
                    return
                with suppress(OSError):
                    os.posix_fallocate(fd, os.fstat(fd).st_size, too_much)
            raise AssertionError("the device cannot be made to fail")
        finally:
            os.close(fd)

    def mend_device(self) -> None:
        """Have writes succeed again."""
        self._ballast.unlink()

    def _trim(self) -> None:
        """Give the blocks of free space back to the tmpfs; log, tables and files keep theirs."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _TRIM, struct.pack("QQQ", 0, (1 << 64) - 1, 0))
        finally:
            os.close(fd)

    def _end(self) -> None:
        if os.path.ismount(self.path):
            try:
                self.unmount()
            except subprocess.CalledProcessError:
                _run("umount", "--lazy", self.path)
                raise
            finally:
                _run("umount", "--lazy", self._memory)
        elif os.path.ismount(self._memory):
            _run("umount", self._memory)


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=_BUSY_S)

"""File systems for one test: a small tmpfs, and a small ext4 in a file. Both need root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BALLAST_STEP_BYTES = 256 * 1024


def cannot_mount() -> str:
    """Why this machine cannot mount; empty if it can."""
    if os.geteuid() != 0:
        return "mounting a small file system needs root"
    if not shutil.which("mount"):
        return "there is no mount command"
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/tmp"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "" if probe.returncode == 0 else f"mounting is not allowed: {probe.stderr.strip()}"


def fill(ballast: Path, room_kib: int) -> None:
    """Leave so much room, an odd number of bytes; less if others write meanwhile."""
    with ballast.open("wb") as file:
        for size in range(_BALLAST_STEP_BYTES, 1 << 40, _BALLAST_STEP_BYTES):
            stat = os.statvfs(ballast.parent)
            more = stat.f_bavail * stat.f_frsize - room_kib * 1024
            if more <= 0:
                return
            with suppress(OSError):  # full: the next look at what is free says so
                os.posix_fallocate(file.fileno(), size - _BALLAST_STEP_BYTES, min(more, _BALLAST_STEP_BYTES))


@contextmanager
def tmpfs(path: Path, size_kib: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    path.mkdir()
    with _mounted(["-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs"], path):
        yield path


@contextmanager
def ext4(path: Path, size_kib: int) -> Iterator[Path]:
    """An ext4 of that size, in a file beside `path`."""
    path.mkdir()
    image = path.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(size_kib * 1024)
    _run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)])
    with _mounted(["-o", "loop", str(image)], path):
        yield path
    image.unlink()


@contextmanager
def _mounted(what: list[str], path: Path) -> Iterator[None]:
    _run(["mount", *what, str(path)])
    try:
        yield
    finally:
        done = subprocess.run(["umount", str(path)], capture_output=True, text=True, check=False)
        if done.returncode != 0:  # a test that failed may still use it: it goes when that ends
            _run(["umount", "--lazy", str(path)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"

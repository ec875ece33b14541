"""A simulated disk under session files, STORE and SQLite: what was not flushed may be lost in any mixture.

The real files are the page cache: the engine reads and writes them. Beside them the disk remembers what is
durable, and which changes are not. `cut` makes the directory what a power cut would leave. The model, which
is at least as harsh as ext4 and xfs:

* A file's bytes are durable when its own flush returns. Of each write since then, any set of 512-byte sectors
  is there, in whatever order they were written, also of a write that was made before a later one.
* Changes of a file's size happen in order, and may stop anywhere: the size is what it was after some of them,
  or any byte between two of them. What the file should have below its size and does not is zeros. (ext4 and
  xfs keep that order, too, and may show zeros where blocks were allocated and not written.)
* Modification times are any that the file had since its flush.
* Names are durable when their directory is flushed. Of the changes since then each has happened or not, by
  itself: a later one without an earlier one, too. (ext4 and xfs keep their order, and flush a new file's name
  with the file. Here nothing but the directory's own flush does that.) A rename is one change, also between
  two directories.
* What was under way when the power went counts as made and not flushed; a flush under way did nothing.
* A flush that fails leaves a file as it can be read, and gives up what it did not write: no later flush does
  that. Blocks beyond the former end that it gave up stay zeros whatever is written to them, as if they were
  there (ext4), until the file is cut before them or memory lets go of them (`forget`).
* SQLite's shared memory is gone.

Sectors are whole or not there, and a flush that returns tells the truth, unless the disk is asked to lie.
Inodes are kept alive by links in an attic beside the directory, so that a file that comes back is the one
that the catalogue knows. `simulated_journal` brings the journal's changes here. It knows files and names;
nothing of sessions.
"""

import errno
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from sessionstored.engine.jsonl.disk import Disk

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
T = TypeVar("T")


@dataclass
class _File:
    """What is durable of a file, and what was done to it since."""

    durable: bytearray
    mtime_ns: int
    changes: list[tuple[int, bytes] | int] = field(default_factory=list)
    """(offset, bytes) of a write, or the length that it was cut to."""
    mtimes_ns: list[int] = field(default_factory=list)
    given_up: set[int] = field(default_factory=set)
    """Blocks that look as if they had been written, and never are."""

    def change(self, change: tuple[int, bytes] | int, mtime_ns: int) -> None:
        """Remember a change as the disk will take it."""
        if isinstance(change, int):
            self.given_up = {block for block in self.given_up if block * BLOCK_BYTES < change}
        elif self.given_up:
            offset, taken = change[0], bytearray(change[1])
            for block in self.given_up:
                begin = max(0, block * BLOCK_BYTES - offset)
                end = min(len(taken), (block + 1) * BLOCK_BYTES - offset)
                if begin < end:
                    taken[begin:end] = bytes(end - begin)
            change = offset, bytes(taken)
        self.changes.append(change)
        self.mtimes_ns.append(mtime_ns)

    @property
    def size(self) -> int:
        """The size that the engine sees."""
        size = len(self.durable)
        for change in self.changes:
            size = change if isinstance(change, int) else max(size, change[0] + len(change[1]))
        return size

    def settle(self, mtime_ns: int) -> None:
        """Everything so far is durable."""
        for change in self.changes:
            if isinstance(change, int):
                _cut(self.durable, change)
            else:
                _put(self.durable, *change)
        self.changes.clear()
        self.mtimes_ns.clear()
        self.mtime_ns = mtime_ns

    def give_up(self, rng: random.Random) -> None:
        """A flush failed: some of what it should have flushed is durable, the rest never will be."""
        if not self.changes:
            return
        content, mtime_ns = self.survivors(rng, rng.choice(SHARES))
        blocks = -(-len(self.durable) // BLOCK_BYTES)
        self.settle(mtime_ns)
        for begin in range(blocks * BLOCK_BYTES, len(self.durable), BLOCK_BYTES):
            if self.durable[begin : begin + BLOCK_BYTES] != content[begin : begin + BLOCK_BYTES]:
                self.given_up.add(begin // BLOCK_BYTES)
        self.durable = bytearray(content)

    def survivors(self, rng: random.Random, share: float) -> tuple[bytes, int]:
        """(content, mtime) that a power cut leaves."""
        content, size, ever = bytearray(self.durable), len(self.durable), len(self.durable)
        sizes_left = rng.randint(0, len(self.changes)) if 0 < share < 1 else len(self.changes) * int(share)
        for change in self.changes:
            sizes_left -= 1
            if isinstance(change, int):
                ever = change
                if sizes_left >= 0:
                    _cut(content, change)
                    size = change
                continue
            offset, data = change
            for begin, end in _sectors(offset, len(data)):
                if share == 1 or (share and rng.random() < share):
                    _put(content, begin, data[begin - offset : end - offset])
            end = offset + len(data)
            if end > ever:
                if sizes_left >= 0:
                    size = end
                elif sizes_left == -1 and share and end > size:
                    size = rng.randint(size, end)
                ever = end
        content = content[:size].ljust(size, b"\0")
        return bytes(content), rng.choice([self.mtime_ns, *self.mtimes_ns])


def _cut(content: bytearray, length: int) -> None:
    content[:] = content[:length].ljust(length, b"\0")


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _sectors(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a write, one per sector."""
    position = offset
    while position < offset + length:
        end = min(offset + length, (position // SECTOR_BYTES + 1) * SECTOR_BYTES)
        yield position, end
        position = end


@dataclass(frozen=True)
class _Naming:
    """A change of names: `gone` goes, `new` becomes a file's."""

    gone: Path | None = None
    new: Path | None = None
    inode: int = 0

    @property
    def paths(self) -> set[Path]:
        return {path for path in (self.gone, self.new) if path is not None}

    def apply(self, names: dict[Path, int]) -> None:
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.new is not None:
            names[self.new] = self.inode


class Fault(Enum):
    """How a step fails."""

    NONE = "none"
    ERROR = "EIO"
    """With the first half of a write done. A failed flush leaves the page cache clean, as Linux does."""
    FULL = "half, then ENOSPC"
    SHORT = "half"
    """A write takes a half, and says so. (Of SQLite's, this is FULL: its writes are whole, or fail.)"""


class PowerCut(OSError):
    """The power is gone: nothing is written any more."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the power was cut")


class SimulatedDisk(Disk):
    """The disk of one data directory."""

    def __init__(self, data: Path, *, unflushed: tuple[str, ...] = (), honest: bool = True) -> None:
        """Watch a directory.

        Args:
            data: the directory; all in it is durable,
            unflushed: but for these files, which somebody wrote just now.
            honest: whether a flush makes anything durable.

        """
        self.data, self.honest = data, honest
        self.cut_at = 0
        """The step at which the power goes; 0: never."""
        self.fault: Callable[[str], Fault] = lambda _: Fault.NONE
        """Asked before each step."""
        self.rng = random.Random(0)
        """What a failed flush leaves."""
        self.dead = False
        self.steps = 0
        self.kinds: Counter[str] = Counter()
        self.last_kind = ""
        self._attic = data.with_name(f"{data.name}.attic")
        self._lock = threading.RLock()
        self._files: dict[int, _File] = {}
        self._names: dict[Path, int] = {}
        self._namings: list[_Naming] = []
        shutil.rmtree(self._attic, ignore_errors=True)
        self._attic.mkdir(parents=True)
        for folder in (data, data / "sessions", data / "quarantine"):
            folder.mkdir(exist_ok=True, parents=True)
            for path in folder.iterdir():
                if path.is_file() and path.name != "LOCK":
                    self.know(path, durable=path.name not in unflushed)

    # What happens.

    def do(self, kind: str, work: Callable[[], T], half: Callable[[], T] | None = None) -> T:
        """Do one step, unless it fails, or the power is gone, or goes now.

        Args:
            kind: what it is.
            work: does it.
            half: of a write: does half of it; of a flush: does what its failure does.

        """
        with self._lock:
            if self.dead:
                raise PowerCut
            self.steps += 1
            self.last_kind = kind
            self.kinds[kind] += 1
            fault = self.fault(kind)
            if fault is not Fault.NONE:
                done = half() if half is not None else None
                if fault is Fault.SHORT and done is not None:
                    return done
                number = errno.EIO if fault is Fault.ERROR else errno.ENOSPC
                raise OSError(number, f"injected: {kind}")
            now = self.steps == self.cut_at
            if now and "flush" in kind:
                self.dead = True
                raise PowerCut
            result = work()
            if now:
                self.dead = True
                raise PowerCut
            return result

    def knows(self, stat: os.stat_result) -> bool:
        return stat.st_ino in self._files

    def know(self, path: Path, durable: bool = False) -> None:
        """Learn of a file that is there."""
        stat = path.stat()
        if stat.st_ino not in self._files:
            os.link(path, self._attic / str(stat.st_ino))
            self._files[stat.st_ino] = _File(bytearray(), stat.st_mtime_ns)
            if stat.st_size:
                self.wrote(stat.st_ino, 0, path.read_bytes(), stat.st_mtime_ns)
        self._namings.append(_Naming(new=path, inode=stat.st_ino))
        if durable:
            self._files[stat.st_ino].settle(stat.st_mtime_ns)
            self._namings.pop().apply(self._names)

    def cut_unseen(self, fd: int) -> None:
        """Learn that a file was cut, and that flushed, before SQLite opened it."""
        stat = os.fstat(fd)
        if stat.st_size < self._files[stat.st_ino].size:
            self.changed(stat.st_ino, stat.st_size, stat.st_mtime_ns)
            self.flushed(stat)

    def wrote(self, inode: int, offset: int, data: bytes, mtime_ns: int) -> None:
        self.changed(inode, (offset, data), mtime_ns)

    def changed(self, inode: int, change: tuple[int, bytes] | int, mtime_ns: int) -> None:
        self._files[inode].change(change, mtime_ns)

    def gave_up(self, stat: os.stat_result) -> None:
        self._files[stat.st_ino].give_up(self.rng)

    def named(self, gone: Path | None = None, new: Path | None = None, inode: int = 0) -> None:
        """Learn of a change of names."""
        self._namings.append(_Naming(gone, new, inode))

    def flushed(self, stat: os.stat_result) -> None:
        if self.honest:
            self._files[stat.st_ino].settle(stat.st_mtime_ns)

    def flushed_names(self, folder: Path) -> None:
        """The names of a directory are durable, and what happened to the same files' names before that."""
        if not self.honest:
            return
        kept: list[_Naming] = []
        durable: list[_Naming] = []
        paths: set[Path] = set()
        for naming in reversed(self._namings):
            if naming.paths & paths or any(path.parent == folder for path in naming.paths):
                paths |= naming.paths
                durable.append(naming)
            else:
                kept.append(naming)
        for naming in reversed(durable):
            naming.apply(self._names)
        self._namings = kept[::-1]

    # Session files and STORE.

    def open_append(self, path: Path) -> int:
        return self._open("open", path, super().open_append)

    def create(self, path: Path) -> int:
        return self._open("create", path, super().create)

    def _open(self, kind: str, path: Path, work: Callable[[Path], int]) -> int:
        opened: list[int] = []

        def opening() -> int:
            was = path.exists() and path.stat().st_size
            new = not path.exists()
            opened.append(work(path))
            if new:
                self.know(path)
            elif kind == "create" and was:
                stat = os.fstat(opened[0])
                self.changed(stat.st_ino, 0, stat.st_mtime_ns)
            return opened[0]

        if kind == "open" and path.exists():  # nothing changes
            return work(path)
        try:
            return self.do(f"file {kind}", opening)
        except OSError:
            for fd in opened:
                os.close(fd)
            raise

    def write(self, fd: int, data: bytes) -> int:
        def writing(data: bytes = data) -> int:
            written = os.write(fd, data)
            stat = os.fstat(fd)
            end = os.lseek(fd, 0, os.SEEK_CUR)
            self.wrote(stat.st_ino, end - written, data[:written], stat.st_mtime_ns)
            return written

        return self.do("file write", writing, lambda: writing(data[: max(1, len(data) // 2)]))

    def flush(self, fd: int) -> None:
        self.do("file flush", lambda: self.flushed(os.fstat(fd)), lambda: self.gave_up(os.fstat(fd)))

    def forget(self, fd: int, offset: int = 0, length: int = 0) -> None:
        stat = os.fstat(fd)
        file, end = self._files[stat.st_ino], offset + length if length else stat.st_size
        if file.changes:  # only what is flushed is let go of
            return
        with (self._attic / str(stat.st_ino)).open("r+b") as again:
            again.seek(offset)
            again.write(bytes(file.durable[offset:end]).ljust(end - offset, b"\0"))
        os.utime(self._attic / str(stat.st_ino), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        file.given_up -= set(range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)))

    def flush_directory(self, path: Path) -> None:
        self.do("directory flush", lambda: self.flushed_names(path))

    def truncate(self, fd: int, length: int) -> None:
        def cutting() -> None:
            os.ftruncate(fd, length)
            stat = os.fstat(fd)
            self.changed(stat.st_ino, length, stat.st_mtime_ns)

        self.do("file truncate", cutting)

    def rename(self, old: Path, new: Path) -> None:
        def renaming() -> None:
            inode = old.stat().st_ino
            os.rename(old, new)
            self.named(old, new, inode)

        self.do("file rename", renaming)

    def unlink(self, path: Path) -> None:
        def unlinking() -> None:
            os.unlink(path)
            self.named(path)

        self.do("file unlink", unlinking)

    # The power cut.

    def cut(self, rng: random.Random, share: float | None = None) -> None:
        """Make the directory what a power cut leaves, all of it durable, and give it power again.

        Args:
            rng: what chooses.
            share: how much of what was not flushed is there, between 0 and 1; None: that is chosen, too.

        """
        share = rng.choice(SHARES) if share is None else share
        names = dict(self._names)
        for naming in self._namings:
            if share == 1 or (share and rng.random() < share):
                naming.apply(names)
        for folder in (self.data, self.data / "sessions", self.data / "quarantine"):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.is_file() and path.name != "LOCK":
                    path.unlink()
        files = {}
        for path, inode in sorted(names.items()):
            if inode not in files:
                content, mtime_ns = self._files[inode].survivors(rng, share)
                with (self._attic / str(inode)).open("r+b") as file:
                    file.truncate(0)
                    file.write(content)
                os.utime(self._attic / str(inode), ns=(mtime_ns, mtime_ns))
                files[inode] = _File(bytearray(content), mtime_ns)
            os.link(self._attic / str(inode), path)
        for inode in self._files.keys() - files.keys():
            (self._attic / str(inode)).unlink()
        self._files, self._names, self._namings = files, names, []
        self.dead, self.cut_at, self.steps = False, 0, 0

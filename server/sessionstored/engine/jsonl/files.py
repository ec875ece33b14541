"""The session files: appended to in place, written anew, read by block, set aside.

A file is changed in place only by appending. Bytes that nobody here wrote are never cut silently: they go to
quarantine first. A full disk leaves a session behind, to be tried again; any other failure to write is for
the caller to die of.

Knows disks, states and the text of files; nothing of journals, threads or decisions.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from sessionstored.engine import Refused
from sessionstored.engine.jsonl.blocks import BLOCK_BYTES, Blocks
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.keeping import Keeper
from sessionstored.engine.jsonl.names import short_name, temporary_name
from sessionstored.engine.jsonl.state import File, State, data_loss
from sessionstored.engine.jsonl.text import header_line, message_lines
from sessionstored.rules import Head

FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""What somebody did to one file; not a failure of the disk."""
CHANGED = "somebody else changed the file while it was in use"


@dataclass(frozen=True, slots=True)
class Region:
    """Where a cold read finds messages: taken under the engine's lock, used without it."""

    key: str
    file: str
    inode: int
    blocks: Blocks
    owner: File
    """The state's file when the region was taken: while it is that, the region speaks of the present."""


class FileChanged(Exception):
    """The file is not the one that the region speaks of: take a new region."""


class WrongBlock(Refused):
    """A block of a session file is not what was written."""

    def __init__(self, region: Region, block: int, detail: str) -> None:
        super().__init__(data_loss(region.key, region.file, 0, detail))
        self.generation, self.block = region.owner.generation, block


class SessionFiles:
    """The files below DATA/sessions."""

    def __init__(self, sessions: Path, quarantine: Path, disk: Disk, open_files_max: int) -> None:
        self.sessions, self.quarantine, self.disk = sessions, quarantine, disk
        self._open_files_max = open_files_max
        self._fds: OrderedDict[str, int] = OrderedDict()
        self.names_changed = False
        """Names were made, renamed or removed since the directory was last flushed."""
        self._keepers: list[Keeper] = []

    # Appending.

    def catch_up(self, state: State, lock: AbstractContextManager[object]) -> bool:
        """Append what the file lacks. Returns False if the disk is full; the state then stays behind.

        Args:
            state: the session; only the caller's thread changes it.
            lock: held while the state is read and changed, not while the disk works.

        Raises:
            Refused: DATA_LOSS, somebody else changed the file.
            OSError: the disk failed in another way: nothing that was not flushed may be believed any more.

        """
        head, file = state.head, state.file
        if head is None or state.bad or state.wants_rewrite or not state.behind:
            return True
        with lock:
            lines = state.lines[state.filed - state.base :]
        wrote = False
        try:
            fd = self._open(state)
            data, starts, superseded = _missing(state, head, lines, fd)
            wrote = True
            self.disk.write_all(fd, data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            file.torn_write = file.torn_write or wrote
            self.forget(file.name)
            return False
        with lock:
            file.blocks.extend(data, starts)
            file.superseded_bytes += superseded
            file.count = state.filed = state.count
            file.metadata, file.last_consolidated, file.exists = head.metadata, head.last_consolidated, True
            file.expire_time_us = head.expire_time_us
        return True

    def check(self, state: State) -> None:
        """Make sure that a file is what it was; what somebody else appended goes to quarantine, and is cut.

        Raises:
            Refused: DATA_LOSS.

        """
        self._open(state)

    def is_ours(self, file: File) -> bool:
        """Whether a file in use can be what it was: not replaced, and not shorter."""
        try:
            stat = os.lstat(self.sessions / file.name)
        except FileNotFoundError:
            return False
        return stat.st_ino == file.inode and stat.st_size >= file.blocks.length

    def _open(self, state: State) -> int:
        """The descriptor for appending; the file is checked to end where it should."""
        file = state.file
        fd = self._fds.get(file.name)
        if fd is not None:
            stat = os.fstat(fd)
            if stat.st_nlink and stat.st_size == file.blocks.length:
                self._fds.move_to_end(file.name)
                return fd
            self.forget(file.name)
        path = self.sessions / file.name
        if path.is_symlink() or (file.exists and not path.exists()):
            detail = "the file is a link" if path.is_symlink() else "the file is missing"
            raise Refused(data_loss(state.key, file.name, 0, detail))
        try:
            fd = self.disk.open_append(path)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            raise Refused(data_loss(state.key, file.name, 0, f"it cannot be opened: {error}")) from error
        try:
            self._check_tail(fd, state)
        except BaseException:
            os.close(fd)
            raise
        if not file.exists:
            self.names_changed = True
        self._fds[file.name] = fd
        while len(self._fds) > self._open_files_max:
            os.close(self._fds.popitem(last=False)[1])
        return fd

    def _check_tail(self, fd: int, state: State) -> None:
        """Make the file end at blocks.length; what is beyond and not ours goes to quarantine first."""
        file, stat = state.file, os.fstat(fd)
        beyond = stat.st_size - file.blocks.length
        expected = not beyond or file.torn_write or (state.damage_set_aside and stat.st_size == file.size)
        same = stat.st_ino == file.inode and expected
        if beyond < 0 or not (same or self.prefix_is_whole(fd, file.blocks)):
            raise Refused(data_loss(state.key, file.name, 0, CHANGED))
        if beyond:
            if not expected:
                self.set_aside(file.name, os.pread(fd, beyond, file.blocks.length), "foreign")
            self.disk.truncate(fd, file.blocks.length)
            self.disk.flush(fd)  # or a power cut could mix what was there with what is appended now
        file.torn_write, state.damage_set_aside, file.inode = False, False, stat.st_ino

    def prefix_is_whole(self, fd: int, blocks: Blocks) -> bool:
        """Whether the file's first blocks.length bytes are what they were, and can be read."""
        try:
            return next(wrong_blocks(fd, blocks), None) is None
        except OSError:
            return False

    def forget(self, name: str) -> None:
        """Close the descriptor of a file."""
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def keep_for(self, keeper: Keeper) -> None:
        """From now on, keep for a backup what is replaced or removed."""
        self._keepers = [*(other for other in self._keepers if not other.closed), keeper]

    def _lose_name(self, name: str) -> None:
        """A file is about to lose its name."""
        self.forget(name)
        for keeper in self._keepers:
            keeper.keep(name)

    def remove(self, name: str) -> None:
        """Remove a file; it may be gone already."""
        self._lose_name(name)
        try:
            self.disk.unlink(self.sessions / name)
        except FileNotFoundError:
            return
        finally:
            self.names_changed = True  # after the change: a flush in between must not forget it

    def put_away(self, name: str, revision: int) -> None:
        """Move the file of a deleted damaged session to quarantine; it may be there already."""
        self._lose_name(name)
        try:
            self.disk.rename(self.sessions / name, self.quarantine / f"{short_name(name)}.{revision}.deleted")
        except FileNotFoundError:
            return
        finally:
            self.names_changed = True
        self.disk.flush_directory(self.quarantine)

    def close(self) -> None:
        """Close every descriptor."""
        for name in list(self._fds):
            self.forget(name)

    # Flushing.

    def flush(self, name: str) -> os.stat_result:
        """Make a file durable; returns what it is now."""
        fd = os.open(self.sessions / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.disk.flush(fd)
            return os.fstat(fd)
        finally:
            os.close(fd)

    def flush_names(self) -> None:
        """Make names durable, if any changed."""
        if self.names_changed:
            self.names_changed = False  # before the flush: what changes during it waits for the next
            self.disk.flush_directory(self.sessions)

    # Writing anew.

    def write_generation(
        self, head: Head, name: str, generation: int, lines: Iterable[Sequence[bytes]]
    ) -> File:
        """Write a session under its file's temporary name, and flush it and its name.

        Args:
            head: what the header says.
            name: the file's name.
            generation: the new generation.
            lines: the messages, in runs of moderate size.

        """
        path = self.sessions / temporary_name(name, generation)
        header = header_line(head)
        blocks, count = Blocks(), 0
        fd = self.disk.create(path)
        try:
            self.disk.write_all(fd, header)
            blocks.extend(header, ())
            for run in lines:
                data, starts = _join(run)
                self.disk.write_all(fd, data)
                blocks.extend(data, starts)
                count += len(run)
            self.disk.flush(fd)
            stat = os.fstat(fd)
        except BaseException:
            os.close(fd)
            self.disk.unlink(path)
            raise
        os.close(fd)
        self.disk.flush_directory(self.sessions)
        return File(
            name,
            generation,
            True,
            blocks,
            count,
            head.metadata,
            head.last_consolidated,
            size=stat.st_size,
            inode=stat.st_ino,
            mtime_ns=stat.st_mtime_ns,
            durable=blocks.mark,
            expire_time_us=head.expire_time_us,
        )

    def install_generation(self, name: str, generation: int) -> None:
        """Rename a written generation over its file."""
        self._lose_name(name)
        self.disk.rename(self.sessions / temporary_name(name, generation), self.sessions / name)
        self.names_changed = True

    def discard_generation(self, name: str, generation: int) -> None:
        """Remove a written generation that is not needed after all."""
        self.disk.unlink(self.sessions / temporary_name(name, generation))

    # Reading.

    def read(self, region: Region, start: int, stop: int, max_bytes: int) -> Iterator[list[bytes]]:
        """Messages [start, stop) from the file, in runs, at most about `max_bytes` of them (one at least).

        Raises:
            FileChanged: the file was renamed over meanwhile.
            Refused: DATA_LOSS, a block is not what was written.

        """
        if start >= stop:
            return
        try:
            fd = os.open(self.sessions / region.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise FileChanged from error
        except OSError as error:
            raise Refused(data_loss(region.key, region.file, 0, f"it cannot be opened: {error}")) from error
        try:
            if region.inode and os.fstat(fd).st_ino != region.inode:
                raise FileChanged
            yield from self._read_runs(fd, region, start, stop, max_bytes)
        finally:
            os.close(fd)

    def _read_runs(
        self, fd: int, region: Region, start: int, stop: int, max_bytes: int
    ) -> Iterator[list[bytes]]:
        blocks = region.blocks
        block, index = blocks.locate(start)
        offset = block * BLOCK_BYTES
        rest = b""
        aligned = offset == 0 or self._read_block(fd, region, block - 1)[-1:] == b"\n"
        while block < len(blocks.crcs) and index < stop and max_bytes > 0:
            rest += self._read_block(fd, region, block)
            block += 1
            if not aligned:
                newline = rest.find(b"\n") + 1
                if not newline:
                    rest = b""
                    continue
                rest, aligned = rest[newline:], True
            last = block == len(blocks.crcs)
            cut = len(rest) if last else rest.rfind(b"\n") + 1
            lines = message_lines(rest[:cut])
            rest = rest[cut:]
            run = lines[max(0, start - index) : stop - index]
            index += len(lines)
            if run:
                max_bytes -= sum(map(len, run)) + len(run)
                yield run

    def _read_block(self, fd: int, region: Region, block: int) -> bytes:
        try:
            data = os.pread(fd, region.blocks.extent(block), block * BLOCK_BYTES)
        except OSError as error:
            raise WrongBlock(region, block, f"it cannot be read: {error}") from error
        if not region.blocks.check(block, data):
            raise WrongBlock(region, block, _mismatch(block))
        return data

    def wrong_block(self, name: str, blocks: Blocks, block: int) -> str:
        """What is wrong with a block of a file; "" if nothing is."""
        try:
            with (self.sessions / name).open("rb") as file:
                data = os.pread(file.fileno(), blocks.extent(block), block * BLOCK_BYTES)
        except OSError as error:
            return f"it cannot be read: {error}"
        return "" if blocks.check(block, data) else _mismatch(block)

    # Setting aside.

    def set_aside(self, name: str, data: bytes, why: str) -> str:
        """Put bytes into quarantine, durably; returns the file's name there. The same bytes go there once."""
        prefix = f"{short_name(name)}.{blake2b(data, digest_size=8).hexdigest()}."
        known = (aside for aside in os.listdir(self.quarantine) if aside.startswith(prefix))
        aside = next(known, prefix + why)
        fd = self.disk.create(self.quarantine / aside)
        try:
            self.disk.write_all(fd, data)
            self.disk.flush(fd)
        finally:
            os.close(fd)
        self.disk.flush_directory(self.quarantine)
        return aside

    def unchanged(self, entry_file: str, size: int, inode: int, mtime_ns: int) -> bool:
        """Whether a file still has the fingerprint that the catalogue knows. Raises FileNotFoundError."""
        stat = os.lstat(self.sessions / entry_file)
        return (stat.st_size, stat.st_ino, stat.st_mtime_ns) == (size, inode, mtime_ns)


def _mismatch(block: int) -> str:
    start = block * BLOCK_BYTES
    return f"bytes {start} to {start + BLOCK_BYTES} do not match their checksum"


def wrong_blocks(fd: int, blocks: Blocks) -> Iterator[int]:
    """The blocks of a file that are not what was written."""
    for block in range(len(blocks.crcs)):
        if not blocks.check(block, os.pread(fd, blocks.extent(block), block * BLOCK_BYTES)):
            yield block


def _missing(state: State, head: Head, lines: Sequence[bytes], fd: int) -> tuple[bytes, list[int], int]:
    """What to append to a session's file: bytes, offsets of message lines in them, superseded bytes."""
    file = state.file
    front = b""
    if not file.exists:
        front = header_line(head)
    elif file.blocks.length and os.pread(fd, 1, file.blocks.length - 1) != b"\n":
        front = b"\n"  # an adopted file may end without one
    data, starts = _join(lines)
    end = header_line(head) if file.exists and state.header_pending else b""
    return front + data + end, [len(front) + start for start in starts], len(end)


def _join(lines: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """Lines as bytes, and where each starts."""
    starts, position = [], 0
    for line in lines:
        starts.append(position)
        position += len(line) + 1
    return b"".join([line + b"\n" for line in lines]), starts

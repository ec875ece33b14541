"""One session file read through, without changing it: which of its lines can be kept, and which cannot.

A line is lost if it cannot be read. It is suspect if it lies in a block whose checksum is wrong, even if it
can be read: half of all flipped bits leave JSON that parses. What is neither is kept.

Knows bytes, blocks and lines; nothing of journals, decisions or quarantine.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from sessionstored.engine.jsonl.blocks import BLOCK_BYTES, Blocks
from sessionstored.engine.jsonl.files import wrong_blocks
from sessionstored.engine.jsonl.text import BOM, Line, Scan, Scanner

_LINES_NAMED = 10


class Unreadable(Exception):
    """The file cannot be read at all; the message says why."""


@dataclass(slots=True)
class Examined:
    """What a file, or its first bytes, hold."""

    scan: Scan
    size: int
    inode: int
    mtime_ns: int
    wrong: Sequence[tuple[int, int]] = ()
    """Byte ranges whose checksum is wrong."""
    kept: int = 0
    """Messages that can be read and are not suspect."""
    suspect: int = 0
    """Messages that can be read, in blocks whose checksum is wrong."""
    lost: int = 0
    """Lines that cannot be read."""
    lost_lines: list[int] = field(default_factory=list)
    """The numbers of the first of these."""
    kept_before: int = 0
    """How many messages are kept before the first one that is not."""

    @property
    def whole(self) -> bool:
        """Whether everything in it is kept."""
        return not (self.wrong or self.lost)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file, open for reading.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is a link or no regular file, or it cannot be opened or read.

    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            stat = os.fstat(fd)
            if not S_ISREG(stat.st_mode):
                raise Unreadable("it is no regular file")
            yield file, stat
    except FileNotFoundError:
        raise
    except OSError as error:
        detail = "it is a link" if path.is_symlink() else f"it cannot be read: {error.strerror}"
        raise Unreadable(detail) from error


def examine(
    path: Path,
    blocks: Blocks | None = None,
    *,
    length: int | None = None,
    keep_suspect: bool = False,
    keep: Callable[[bytes], object] | None = None,
) -> Examined:
    """Read a file through.

    Args:
        path: the file.
        blocks: what its first bytes were; None if nobody knows.
        length: how many bytes count; all by default.
        keep_suspect: keep what can be read in blocks whose checksum is wrong, too.
        keep: called with each message that is kept, without its line end.

    Raises:
        FileNotFoundError, Unreadable: as `opened`.

    """
    with opened(path) as (file, stat):
        wrong = _ranges(wrong_blocks(file.fileno(), blocks)) if blocks else []
        scanner = Scanner()
        result = Examined(Scan(), stat.st_size, stat.st_ino, stat.st_mtime_ns, wrong)
        position = 0
        for number, line in enumerate(_lines(file, stat.st_size if length is None else length), 1):
            suspect = bool(wrong) and _overlaps(wrong, position, position + len(line))
            kind = scanner.take(line)
            if kind is Line.UNREADABLE:
                result.lost += 1
                if len(result.lost_lines) < _LINES_NAMED:
                    result.lost_lines.append(number)
            elif kind is Line.MESSAGE and suspect and not keep_suspect:
                result.suspect += 1
            elif kind is Line.MESSAGE:
                result.kept += 1
                result.kept_before += not (result.lost or result.suspect)
                if keep is not None:
                    keep((line.removeprefix(BOM) if position == 0 else line).strip())
            position += len(line)
        result.scan = scanner.finish()
    return result


def _lines(file: BinaryIO, length: int) -> Iterator[bytes]:
    """The lines within a file's first `length` bytes."""
    for line in file:
        if len(line) >= length:
            yield line[:length]
            return
        length -= len(line)
        yield line


def _ranges(blocks: Iterator[int]) -> list[tuple[int, int]]:
    """Blocks as byte ranges, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        begin, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = ranges[-1][0], end
        else:
            ranges.append((begin, end))
    return ranges


def _overlaps(ranges: Sequence[tuple[int, int]], begin: int, end: int) -> bool:
    return any(begin < last and first < end for first, last in ranges)

"""The journal's write-ahead log, looked at before it is believed.

SQLite ends a log at the first frame whose checksum is wrong. After a crash that is the commit that was under
way, which nobody was answered. But a bit that flipped in an older frame ends the log there, too, and takes
every later commit with it, silently. The two can be told apart where each commit is flushed before the next
begins (durability "fsync"): behind a torn last commit nothing can stand that was written after it. So a frame
that continues the checksums of an unreadable commit proves that acknowledged changes are lost. A damaged
header hides the whole log; that is no loss only if the database has all of it already, as when a new round of
the log begins.

What cannot be told: damage in the very last commit of the log, where a torn write looks the same. Its
messages are in their session files all the same, unless the power failed, and recovery names what it finds
there.

Format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log. Knows frames; nothing of rows.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
_MAGIC = 0x377F0682
_PAGE_BYTES = 4096
_CHECKSUM_BYTES = 8


def discard_torn(log: Path, database: Path) -> None:
    """Empty a log whose header is torn, if the database has all of it: so a new round of it begins.

    To be called before SQLite opens the database: it takes such a log for empty, and would begin the new
    round with the old one's salts, in front of the old one's frames.
    """
    try:
        with log.open("r+b") as file:
            frames = _Frames(file)
            if frames.count and not frames.header_is_whole and frames.are_in(database):
                file.truncate(0)
                os.fsync(file.fileno())
    except FileNotFoundError:
        return


def lost_commit(log: Path, valid_frames: int) -> str:
    """Say where the log lost a commit; "" if it ends as a crash leaves it.

    Args:
        log: the write-ahead log.
        valid_frames: how many frames SQLite reads of it.

    """
    try:
        with log.open("rb") as file:
            frames = _Frames(file)
            if not frames.count:
                return ""
            return frames.lost_commit(valid_frames) if frames.header_is_whole else "its header is damaged"
    except FileNotFoundError:
        return ""


class _Frames:
    """The frames of a log, by index from 0."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        raw = file.read(_HEADER.size).ljust(_HEADER.size, b"\0")
        magic, _, self._page_size, _, *self._salts, sum1, sum2 = _HEADER.unpack(raw)
        self._order = ">" if magic & 1 else "<"
        right_magic = magic & ~1 == _MAGIC
        self.header_is_whole = right_magic and self._continued((0, 0), raw[:24]) == (sum1, sum2)
        if not self.header_is_whole:
            self._order, self._page_size = "<", _PAGE_BYTES  # as this program's journal has them
        size = file.seek(0, os.SEEK_END) - _HEADER.size
        self.count = max(0, size) // (_FRAME.size + self._page_size)

    def _frame(self, index: int) -> tuple[int, int, list[int], tuple[int, int], bytes]:
        """(page number, not 0 for a commit, salts, checksums, what the checksums cover)."""
        self._file.seek(_HEADER.size + index * (_FRAME.size + self._page_size))
        raw = self._file.read(_FRAME.size + self._page_size)
        page, commit, salt1, salt2, sum1, sum2 = _FRAME.unpack_from(raw)
        return page, commit, [salt1, salt2], (sum1, sum2), raw[:8] + raw[_FRAME.size :]

    def _continued(self, sums: tuple[int, int], data: bytes) -> tuple[int, int]:
        """Checksums continued over more bytes."""
        one, two = sums
        words = struct.unpack(f"{self._order}{len(data) // 4}I", data)
        for first, second in zip(words[::2], words[1::2], strict=True):
            one = (one + first + two) & 0xFFFFFFFF
            two = (two + second + one) & 0xFFFFFFFF
        return one, two

    def lost_commit(self, valid_frames: int) -> str:
        """Where a commit beyond the valid frames is followed by a frame that continues it."""
        lost: int | None = None
        before = (0, 0)
        for index in range(valid_frames, self.count):
            _, commit, salts, sums, data = self._frame(index)
            current = salts == self._salts
            if current and lost == index - 1 and self._continued(before, data) == sums:
                return f"the commit in frame {index} cannot be read, and later ones follow it"
            lost = index if current and commit else None
            before = sums
        return ""

    def are_in(self, database: Path) -> bool:
        """Whether every commit of the log, as far as its frames continue each other, is in the database.

        No, if its first commit cannot be read: nobody knows what it had.
        """
        newest: dict[int, int] = {}
        pending: dict[int, int] = {}
        _, _, salts, before, _ = self._frame(0)
        for index in range(self.count):
            page, commit, own_salts, sums, data = self._frame(index)
            if own_salts != salts or (index and self._continued(before, data) != sums):
                break
            pending[page], before = index, sums
            if commit:
                newest |= pending
                pending.clear()
        size = self._page_size - _CHECKSUM_BYTES  # which a page gets on its way into the database
        with database.open("rb") as file:
            for page, index in newest.items():
                file.seek((page - 1) * self._page_size)
                if file.read(size) != self._frame(index)[-1][8 : 8 + size]:
                    return False
        return bool(newest)

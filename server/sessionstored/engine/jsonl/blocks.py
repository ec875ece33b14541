"""Checksums and an index of one session file, 8 bytes per 64 KiB.

For every block: the CRC-32 of its bytes, and how many message lines start in it. That finds damage on a cold
read (half of all bit flips in JSON still parse), and finds message i without reading the file from its start.
It covers the file's first `length` bytes, and grows as the file does; the last block may be part of one.
"""

import struct
from array import array
from collections.abc import Iterable
from zlib import crc32

BLOCK_BYTES = 64 * 1024

Mark = tuple[int, int]
"""(length, checksum) of what a file begins with."""


class Blocks:
    """The checksums and line counts of a file's first `length` bytes."""

    __slots__ = ("counts", "crcs", "length")

    def __init__(self, length: int = 0, packed: bytes = b"") -> None:
        self.length = length
        half = len(packed) // 2
        self.crcs = array("I", struct.unpack(f"<{half // 4}I", packed[:half]))
        self.counts = array("I", struct.unpack(f"<{half // 4}I", packed[half:]))

    def pack(self) -> bytes:
        """The stored form; `Blocks(length, packed)` reads it."""
        count = len(self.crcs)
        return struct.pack(f"<{count}I", *self.crcs) + struct.pack(f"<{count}I", *self.counts)

    def copy(self) -> "Blocks":
        """An independent copy."""
        other = Blocks()
        other.length, other.crcs, other.counts = self.length, self.crcs[:], self.counts[:]
        return other

    def extend(self, data: bytes, starts: Iterable[int]) -> None:
        """Take in bytes appended at `length`; message lines begin at the offsets `starts` of `data`."""
        origin, position = self.length, 0
        while position < len(data):
            used = (origin + position) % BLOCK_BYTES
            if used == 0:
                self.crcs.append(0)
                self.counts.append(0)
            chunk = data[position : position + BLOCK_BYTES - used]
            self.crcs[-1] = crc32(chunk, self.crcs[-1])
            position += len(chunk)
        for start in starts:
            self.counts[(origin + start) // BLOCK_BYTES] += 1
        self.length = origin + len(data)

    @property
    def mark(self) -> Mark:
        """The length, and a checksum over all that is covered."""
        return self.length, crc32(self.crcs.tobytes(), self.length & 0xFFFFFFFF)

    def locate(self, index: int) -> tuple[int, int]:
        """The block in which message `index` starts, and the index of the first message that starts in it."""
        first = 0
        for block, count in enumerate(self.counts):
            if index < first + count:
                return block, first
            first += count
        raise IndexError(index)

    def check(self, block: int, data: bytes) -> bool:
        """Whether `data` is what block number `block` held."""
        return bool(crc32(data) == self.crcs[block])

    def extent(self, block: int) -> int:
        """How many bytes of block number `block` are covered."""
        return min(BLOCK_BYTES, self.length - block * BLOCK_BYTES)


def begins_with(data: bytes, mark: Mark) -> bool:
    """Whether data begins with what a mark was made of."""
    blocks = Blocks()
    blocks.extend(data[: mark[0]], ())
    return blocks.mark == mark

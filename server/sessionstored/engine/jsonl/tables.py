"""What the tables of journal.db share: a checksum of every row, and how a wrong row is called.

SQLite's page checksums take a page that is all zeros for whole. Where that is the tail of a long row, the row
is read with zeros in it. So each row has a CRC-32 of its own, in a column `crc`, which is verified whenever
the row is read. It covers the other columns, in their order: first 8 bytes for each, little-endian, which are
an integer, a real, or the length of a text or blob; then the bytes of the texts (UTF-8) and blobs.

Texts are read as blobs (`CAST`) and decoded once they are known to be right. What looks rows up goes by an
index, whose entries are short enough to have no tail: see KEY_BYTES_MAX and REQUEST_ID_BYTES_MAX in `config`.
"""

import struct
from collections.abc import Sequence
from zlib import crc32

import apsw

_INTEGER, _REAL = struct.Struct("<q"), struct.Struct("<d")


class WrongRow(Exception):
    """A row is not what was written."""

    def __init__(self, table: str, row: str, key: str = "") -> None:
        """`row` says in words which one; `key` is the session's, if it is one's and can be told."""
        super().__init__(f"{row}, in its table {table}, is not what was written (its checksum is wrong)")
        self.key = key


def row_crc(values: Sequence[object]) -> int:
    """The checksum of a row with these columns."""
    fixed, tail = [], []
    for value in values:
        if isinstance(value, float):
            fixed.append(_REAL.pack(value))
        elif isinstance(value, int):
            fixed.append(_INTEGER.pack(value))
        else:
            data = value.encode() if isinstance(value, str) else value
            assert isinstance(data, bytes)
            fixed.append(_INTEGER.pack(len(data)))
            tail.append(data)
    return crc32(b"".join(fixed + tail))


def is_whole(values: Sequence[object], crc: object) -> bool:
    """Whether a row is what was written."""
    try:
        return row_crc(values) == crc
    except (AssertionError, struct.error):  # not even the types are right
        return False


def one_value(db: apsw.Connection, sql: str, *bindings: str) -> int:
    """The one integer that a query gives."""
    row = db.execute(sql, bindings).fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]

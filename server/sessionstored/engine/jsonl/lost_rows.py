"""Catalogue rows that are not what was written, and what stands in for each until it is repaired.

The indexes of the catalogue still tell whose row it was, and which file is its session's. So only that
session is not served: it is condemned, as one whose file is damaged is (`damage`), and repaired by taking its
file as it is. Nothing that the row says is believed.
"""

from pathlib import Path

from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.catalogue import ROW_LOST, Catalogue, Entry
from sessionstored.rules import EMPTY_METADATA, Head

DAMAGE = "its row in the catalogue is not what was written (its checksum is wrong)"


def stand_in(catalogue: Catalogue, rowid: int, sessions: Path) -> Entry | None:
    """What stands in for a row, under no revision yet; None if nothing tells whose it is."""
    key, file = catalogue.indexed(rowid)
    if not key or not file:
        return None
    try:
        stat = (sessions / file).lstat()
        size, inode, mtime_ns = stat.st_size, stat.st_ino, stat.st_mtime_ns
    except FileNotFoundError:
        size, inode, mtime_ns = 0, 0, 0
    head = Head(key, 0, 0, 0, 0, EMPTY_METADATA, mtime_ns // 1000, mtime_ns // 1000, DAMAGE)
    return Entry(head, file, 0, Blocks(), size, inode, mtime_ns, bad_line=ROW_LOST)


def nobody(rowid: int) -> str:
    """What to say of a row of which nothing tells whose it is."""
    return f"row {rowid} of its table session is not what was written, and nothing tells whose it is"

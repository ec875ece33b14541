"""The journal at one moment: a read transaction on a connection of its own, and a copy made from it.

Beside the writer: commits and checkpoints go on, but the write-ahead log cannot begin anew while the
transaction is open, so it is to be ended as soon as the copy is there. Every page of the copy has a checksum
of its own, as those of the journal have.

Knows SQLite and the catalogue's rows; nothing of files, threads or the wire.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw

from sessionstored.engine.jsonl import pages
from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.catalogue import Catalogue

_PAGES_PER_STEP = 256


@dataclass(frozen=True, slots=True)
class Cataloged:
    """What a catalogue row says of a session's file."""

    key: str
    file: str
    blocks: Blocks
    damage: str
    """Why the session is not served; "" if it is."""


class Snapshot:
    """A database as it was when `begin` was called."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def begin(self) -> None:
        """Take the moment. Short."""
        self._db.execute("BEGIN")
        self._db.execute("SELECT count(*) FROM meta").fetchall()  # only a read begins it

    @property
    def bytes(self) -> int:
        """The size of a copy."""
        size, count = self._db.pragma("page_size"), self._db.pragma("page_count")
        assert isinstance(size, int)
        assert isinstance(count, int)
        return size * count

    def copy(self, path: Path, go_on: Callable[[], None]) -> None:
        """Write the copy, and see that it is sound.

        Args:
            path: a file that does not exist.
            go_on: called every now and then; what it raises ends the copy.

        Raises:
            apsw.Error: a page is not what was written, or the disk is full.

        """
        copy = apsw.Connection(str(path), vfs=pages.CHECKSUM_VFS)
        try:
            pages.reserve(copy)
            copy.pragma("synchronous", "off")  # a copy that a crash cuts short is removed
            copy.pragma("user_version", 1)  # from the first page on, each one gets a checksum
            with copy.backup("main", self._db, "main") as backup:
                while not backup.done:
                    go_on()
                    backup.step(_PAGES_PER_STEP)
        finally:
            copy.close()
        pages.check(path)

    def close(self) -> None:
        """End the transaction."""
        self._db.close()


class JournalCopy:
    """The catalogue of a copy that nobody changes."""

    def __init__(self, path: Path) -> None:
        self._db = apsw.Connection(
            f"{path.absolute().as_uri()}?immutable=1",
            flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
            vfs=pages.CHECKSUM_VFS,
        )

    def defect(self) -> str:
        """What SQLite finds wrong with the copy; "" if it is sound. Reads every page."""
        found = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        return "" if found == ("ok",) else str(found)

    def lengths(self) -> Iterator[tuple[str, int]]:
        """(key, length of the file) of every session."""
        yield from self._db.execute("SELECT key, length FROM session")

    def sessions(self) -> Iterator[Cataloged]:
        """Every session. Raises WrongRow."""
        for entry in Catalogue(self._db).entries():
            damage = (entry.head.damage or "it is damaged") if entry.bad_line else ""
            yield Cataloged(entry.head.key, entry.file, entry.blocks, damage)

    def close(self) -> None:
        """Close."""
        self._db.close()

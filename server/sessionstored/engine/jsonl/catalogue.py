"""The catalogue, a table of journal.db: each session's head as its file has it, and what is known of that.

Knows this table's rows, through whichever connection it is given; nothing of transactions or decisions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import apsw

from sessionstored.engine import Order, Query
from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.tables import one_value
from sessionstored.rules import Head

SCHEMA = """
CREATE TABLE session(key TEXT NOT NULL UNIQUE, file TEXT NOT NULL UNIQUE, generation INTEGER NOT NULL,
    revision INTEGER NOT NULL, rewrite_revision INTEGER NOT NULL, message_count INTEGER NOT NULL,
    last_consolidated INTEGER NOT NULL, create_time_us INTEGER NOT NULL, update_time_us INTEGER NOT NULL,
    damage TEXT NOT NULL, bad_line INTEGER NOT NULL, superseded_bytes INTEGER NOT NULL,
    length INTEGER NOT NULL, size INTEGER NOT NULL, inode INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    metadata BLOB NOT NULL, blocks BLOB NOT NULL);
CREATE INDEX session_by_update_time ON session(update_time_us, key);
"""
_SESSION = (
    "key, file, generation, revision, rewrite_revision, message_count, last_consolidated, create_time_us, "
    "update_time_us, damage, bad_line, superseded_bytes, length, size, inode, mtime_ns, metadata, blocks"
)
_UPSERT = (
    f"INSERT INTO session({_SESSION}) VALUES ({', '.join('?' * 18)}) ON CONFLICT(key) DO UPDATE SET "
    + ", ".join(f"{column} = excluded.{column}" for column in _SESSION.split(", ")[1:])
)
_HEAD = (
    "key, revision, rewrite_revision, message_count, last_consolidated, metadata, create_time_us, "
    "update_time_us, damage"
)


@dataclass(slots=True)
class Entry:
    """A catalogue row: a session's head as its file has it, and what is known of that file."""

    head: Head
    file: str
    generation: int
    blocks: Blocks
    """Of the file's readable first `blocks.length` bytes."""
    size: int
    """The file's size; larger than blocks.length if a torn last line was set aside."""
    inode: int
    mtime_ns: int
    superseded_bytes: int = 0
    bad_line: int = 0
    """Not 0: a line inside cannot be read, and the session is not served."""


class Catalogue:
    """The rows, through one connection."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def entry(self, key: str) -> Entry | None:
        """A session's catalogue row."""
        return self._one("key = ?", key)

    def entry_of_file(self, file: str) -> Entry | None:
        """The catalogue row of the session that has this file."""
        return self._one("file = ?", file)

    def file_taken(self, file: str) -> bool:
        """Whether a session has this file."""
        return bool(self._db.execute("SELECT 1 FROM session WHERE file = ?", (file,)).fetchone())

    def files(self) -> Iterator[tuple[str, str, int]]:
        """(key, file, generation) of every session."""
        yield from self._db.execute("SELECT key, file, generation FROM session")

    def entries(self) -> Iterator[Entry]:
        """Every catalogue row, as it is read: nothing may be written meanwhile."""
        for row in self._db.execute(f"SELECT {_SESSION} FROM session"):
            yield _entry_of(row)

    def key_of_file(self, file: str) -> str | None:
        """Whose file this is."""
        found = self._db.execute("SELECT key FROM session WHERE file = ?", (file,)).fetchone()
        return None if found is None else str(found[0])

    def count(self) -> int:
        """How many sessions the catalogue has."""
        return one_value(self._db, "SELECT count(*) FROM session")

    def entries_after(self, rowid: int, count: int) -> list[tuple[int, str, str, int, int, int]]:
        """(rowid, key, file, size, inode, mtime_ns) of the next rows, for a sweep."""
        rows = self._db.execute(
            "SELECT rowid, key, file, size, inode, mtime_ns FROM session WHERE rowid > ? "
            "ORDER BY rowid LIMIT ?",
            (rowid, count),
        )
        return cast("list[tuple[int, str, str, int, int, int]]", rows.fetchall())

    def heads(self, query: Query) -> Iterator[Head]:
        """The catalogue's heads that a query asks for, in its order, without end."""
        where, values = [], list[object]()
        by_time = query.order in (Order.UPDATE_TIME, Order.UPDATE_TIME_DESC)
        down = query.order in (Order.KEY_DESC, Order.UPDATE_TIME_DESC)
        if query.prefix:
            where.append("key >= ?")
            values.append(query.prefix)
            upper = after_prefix(query.prefix)
            if upper:
                where.append("key < ?")
                values.append(upper)
        if query.updated_since_us is not None:
            where.append("update_time_us >= ?")
            values.append(query.updated_since_us)
        if query.after is not None:
            sign = "<" if down else ">"
            where.append(f"(update_time_us, key) {sign} (?, ?)" if by_time else f"key {sign} ?")
            values += query.after if by_time else query.after[1:]
        order = [
            f"{column} {'DESC' if down else 'ASC'}"
            for column in (["update_time_us"] if by_time else []) + ["key"]
        ]
        condition = "WHERE " + " AND ".join(where) if where else ""
        sql = f"SELECT {_HEAD} FROM session {condition} ORDER BY {', '.join(order)}"
        for row in self._db.execute(sql, values):
            yield Head(*row)

    def _one(self, where: str, value: str) -> Entry | None:
        row = self._db.execute(f"SELECT {_SESSION} FROM session WHERE {where}", (value,)).fetchone()
        return None if row is None else _entry_of(row)


class WritableCatalogue(Catalogue):
    """The same, with what changes rows."""

    def put(self, entry: Entry) -> None:
        """Write a row. Within a transaction."""
        head = entry.head
        self._db.execute(
            _UPSERT,
            (
                head.key,
                entry.file,
                entry.generation,
                head.revision,
                head.rewrite_revision,
                head.message_count,
                head.last_consolidated,
                head.create_time_us,
                head.update_time_us,
                head.damage,
                entry.bad_line,
                entry.superseded_bytes,
                entry.blocks.length,
                entry.size,
                entry.inode,
                entry.mtime_ns,
                head.metadata,
                entry.blocks.pack(),
            ),
        )

    def remove(self, key: str) -> None:
        """Remove a session's row. Within a transaction."""
        self._db.execute("DELETE FROM session WHERE key = ?", (key,))


def after_prefix(prefix: str) -> str:
    """The least string above every string that begins with `prefix`; "" if there is none."""
    while prefix:
        code = ord(prefix[-1]) + 1
        if code <= 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if 0xD800 <= code <= 0xDFFF else code)
        prefix = prefix[:-1]
    return ""


def _entry_of(row: tuple[Any, ...]) -> Entry:
    (
        key,
        file,
        generation,
        revision,
        rewrite_revision,
        count,
        consolidated,
        created,
        updated,
        damage,
        bad_line,
        superseded_bytes,
        length,
        size,
        inode,
        mtime_ns,
        metadata,
        blocks,
    ) = row
    head = Head(key, revision, rewrite_revision, count, consolidated, metadata, created, updated, damage)
    return Entry(
        head, file, generation, Blocks(length, blocks), size, inode, mtime_ns, superseded_bytes, bad_line
    )

"""The catalogue, a table of journal.db: each session's head as its file has it, and what is known of that.

Knows this table's rows, through whichever connection it is given; nothing of transactions or decisions.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from zlib import crc32

import apsw

from sessionstored.engine import Order, Query
from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.tables import WrongRow, one_value
from sessionstored.retention import NO_RULES, TIME_US_MAX, Retention
from sessionstored.rules import Head

SCHEMA = """
CREATE TABLE session(generation INTEGER NOT NULL, revision INTEGER NOT NULL,
    rewrite_revision INTEGER NOT NULL, message_count INTEGER NOT NULL, last_consolidated INTEGER NOT NULL,
    create_time_us INTEGER NOT NULL, update_time_us INTEGER NOT NULL, bad_line INTEGER NOT NULL,
    superseded_bytes INTEGER NOT NULL, length INTEGER NOT NULL, size INTEGER NOT NULL, inode INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, expire_time_us INTEGER NOT NULL, ends_us INTEGER NOT NULL,
    crc INTEGER NOT NULL, key TEXT NOT NULL UNIQUE, file TEXT NOT NULL UNIQUE,
    damage TEXT NOT NULL, metadata BLOB NOT NULL, blocks BLOB NOT NULL);
CREATE INDEX session_by_update_time ON session(update_time_us, key);
CREATE INDEX session_by_end ON session(ends_us, key) WHERE ends_us > 0;
"""
_NUMBERS = (
    "generation, revision, rewrite_revision, message_count, last_consolidated, create_time_us, "
    "update_time_us, bad_line, superseded_bytes, length, size, inode, mtime_ns, expire_time_us"
)
_TEXTS = "CAST(key AS BLOB), CAST(file AS BLOB), CAST(damage AS BLOB)"
_READ = f"rowid, crc, {_NUMBERS}, {_TEXTS}, metadata, blocks"
_COLUMNS = [*_NUMBERS.split(", "), "key", "file", "damage", "metadata", "blocks"]
_UPSERT = (
    f"INSERT INTO session({', '.join(_COLUMNS)}, crc, ends_us) "
    f"VALUES ({', '.join('?' * (len(_COLUMNS) + 2))}) "
    "ON CONFLICT(key) DO UPDATE SET "
    + ", ".join(f"{each} = excluded.{each}" for each in [*_COLUMNS, "crc", "ends_us"] if each != "key")
)
_FIXED = struct.Struct(f"<{len(_COLUMNS)}q")
_BAD_LINE = 9
"""Where `_READ` has it."""
ROW_LOST = -2
"""As an entry's `bad_line`: its row was not what was written, and this one stands in for it."""


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
    """Not 0: a line inside cannot be read, and the session is not served. Below 0: it is condemned."""


class KnownFile(NamedTuple):
    """What a catalogue row says of its session's file."""

    rowid: int
    key: str
    file: str
    generation: int
    size: int
    inode: int
    mtime_ns: int
    whole: bool = True
    """False: the row is not what was written, and nothing of it counts."""


_Row = tuple[Any, ...]
"""A row as `_READ` selects it."""


class Catalogue:
    """The rows, through one connection."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def entry(self, key: str) -> Entry | None:
        """A session's catalogue row. Raises WrongRow."""
        return self._one("key = ?", key)

    def entry_of_file(self, file: str) -> Entry | None:
        """The catalogue row of the session that has this file. Raises WrongRow."""
        return self._one("file = ?", file)

    def file_taken(self, file: str) -> bool:
        """Whether a session has this file."""
        return bool(self._db.execute("SELECT 1 FROM session WHERE file = ?", (file,)).fetchone())

    def files(self) -> Iterator[KnownFile]:
        """Every session, and whether its row is whole."""
        for row in self._rows(""):
            yield _known_file(row)

    def entries(self, *, skip_wrong: bool = False) -> Iterator[Entry]:
        """Every catalogue row, as it is read: nothing may be written meanwhile. Raises WrongRow."""
        for row in self._rows("ORDER BY rowid"):
            if _is_whole(row):
                yield _entry_of(row)
            elif not skip_wrong:
                raise self._wrong(row)

    def indexed(self, rowid: int) -> tuple[str, str]:
        """(key, file) of a row, as their indexes have them; "" for what they have not.

        An index is read through for that: it is where a row that is not what was written can be told from.
        """
        said = []
        for column, index in (("key", 1), ("file", 2)):
            found = self._db.execute(
                f"SELECT {column} FROM session INDEXED BY sqlite_autoindex_session_{index} WHERE rowid = ?",
                (rowid,),
            ).fetchone()
            said.append("" if found is None else str(found[0]))
        return said[0], said[1]

    def raw(self, rowid: int) -> dict[str, object]:
        """A row's columns as they are, right or wrong."""
        row = self._db.execute(f"SELECT {_READ} FROM session WHERE rowid = ?", (rowid,)).fetchone()
        return dict(zip(["rowid", "crc", *_COLUMNS], row or (), strict=bool(row)))

    def key_of_file(self, file: str) -> str | None:
        """Whose file this is."""
        found = self._db.execute("SELECT key FROM session WHERE file = ?", (file,)).fetchone()
        return None if found is None else str(found[0])

    def count(self) -> int:
        """How many sessions the catalogue has."""
        return one_value(self._db, "SELECT count(*) FROM session")

    def files_after(self, rowid: int, count: int) -> list[KnownFile]:
        """The next rows, for a sweep."""
        rows = self._rows("WHERE rowid > ? ORDER BY rowid LIMIT ?", rowid, count)
        return [_known_file(row) for row in rows]

    def expiring(self, until_us: int, after: tuple[int, str], count: int) -> list[tuple[int, str]]:
        """(end, key) of the next sessions whose time has come, as far as the catalogue knows."""
        rows = self._db.execute(
            "SELECT ends_us, key FROM session WHERE ends_us > 0 AND ends_us <= ? AND (ends_us, key) > (?, ?) "
            "ORDER BY ends_us, key LIMIT ?",
            (until_us, *after, count),
        )
        return cast("list[tuple[int, str]]", rows.fetchall())

    def newest_update_us(self) -> int:
        """When the session that changed last did so; 0 if there is none."""
        return one_value(self._db, "SELECT ifnull(max(update_time_us), 0) FROM session")

    def heads(self, query: Query, hidden: Callable[[Head], bool]) -> Iterator[Head]:
        """The catalogue's heads that a query asks for, in its order, without end. Raises WrongRow.

        Not those that are `hidden`, which is not asked about damaged sessions.
        """
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
        for row in self._rows(f"{condition} ORDER BY {', '.join(order)}", *values):
            if not _is_whole(row):
                raise self._wrong(row)
            head = _head_of(row)
            if row[_BAD_LINE] or not hidden(head):
                yield head

    def _rows(self, condition: str, *values: object) -> Iterator[_Row]:
        yield from self._db.execute(f"SELECT {_READ} FROM session {condition}", values)

    def _one(self, where: str, value: str) -> Entry | None:
        row = next(self._rows(f"WHERE {where}", value), None)
        if row is None:
            return None
        if not _is_whole(row):
            raise self._wrong(row)
        return _entry_of(row)

    def _wrong(self, row: _Row) -> WrongRow:
        key, _ = self.indexed(row[0])
        return WrongRow("session", f"the row of session {key!r}" if key else f"row {row[0]}", key)


class WritableCatalogue(Catalogue):
    """The same, with what changes rows.

    When a session ends (`ends_us`) follows from its row and the rules in force; so the row's checksum does
    not cover it. It only proposes: who ends a session looks at its head.
    """

    retention = NO_RULES

    def set_retention(self, retention: Retention) -> None:
        """Say of every row when its session ends by these rules. Within a transaction."""
        self.retention = retention
        self._db.execute("UPDATE session SET ends_us = max(expire_time_us, 0) WHERE bad_line = 0")
        for prefix, age_s in reversed(retention.rules):  # the longest prefix last: it counts
            upper = after_prefix(prefix)
            self._db.execute(
                "UPDATE session SET ends_us = min(update_time_us + ?1 * 1000000, ?2) * (?1 > 0) "
                "WHERE expire_time_us = 0 AND bad_line = 0 AND key >= ?3"
                + (" AND key < ?4" if upper else ""),
                (age_s, TIME_US_MAX, prefix, upper)[: 4 if upper else 3],
            )

    def put(self, entry: Entry) -> None:
        """Write a row. Within a transaction."""
        head = entry.head
        numbers = (
            entry.generation,
            head.revision,
            head.rewrite_revision,
            head.message_count,
            head.last_consolidated,
            head.create_time_us,
            head.update_time_us,
            entry.bad_line,
            entry.superseded_bytes,
            entry.blocks.length,
            entry.size,
            entry.inode,
            entry.mtime_ns,
            head.expire_time_us,
        )
        texts = (head.key, entry.file, head.damage)
        blobs = (head.metadata, entry.blocks.pack())
        crc = _crc(*numbers, *(text.encode() for text in texts), *blobs)
        ends_us = self.retention.ends_us(head.key, head.expire_time_us, head.update_time_us)
        ends_us = 0 if entry.bad_line else ends_us  # a damaged session does not expire
        self._db.execute(_UPSERT, (*numbers, *texts, *blobs, crc, ends_us))

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


def _crc(*row: Any) -> int:
    """`row_crc` of these columns, texts encoded; faster, because a start needs it of every row."""
    *numbers, key, file, damage, metadata, blocks = row
    sizes = len(key), len(file), len(damage), len(metadata), len(blocks)
    return crc32(b"".join((_FIXED.pack(*numbers, *sizes), key, file, damage, metadata, blocks)))


def _is_whole(row: _Row) -> bool:
    try:
        return bool(_crc(*row[2:]) == row[1])
    except (TypeError, struct.error):  # not even the types are right
        return False


def _known_file(row: _Row) -> KnownFile:
    """What a row says of its file; of one that is not whole, nothing."""
    if not _is_whole(row):
        return KnownFile(row[0], "", "", 0, 0, 0, 0, whole=False)
    return KnownFile(row[0], row[16].decode(), row[17].decode(), row[2], row[12], row[13], row[14])


def _head_of(row: _Row) -> Head:
    (
        _,
        _,
        _,
        revision,
        rewrite_revision,
        count,
        consolidated,
        created,
        updated,
        _,
        _,
        _,
        _,
        _,
        _,
        expires,
        key,
        _,
        damage,
        metadata,
        _,
    ) = row
    return Head(
        key.decode(),
        revision,
        rewrite_revision,
        count,
        consolidated,
        metadata,
        created,
        updated,
        damage.decode(),
        expires,
    )


def _entry_of(row: _Row) -> Entry:
    generation, bad_line, superseded_bytes, length, size, inode, mtime_ns = row[2], *row[9:15]
    return Entry(
        _head_of(row),
        row[17].decode(),
        generation,
        Blocks(length, row[20]),
        size,
        inode,
        mtime_ns,
        superseded_bytes,
        bad_line,
    )

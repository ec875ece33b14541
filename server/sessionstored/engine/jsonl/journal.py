"""journal.db: the journal, the catalogue and the windows, in one SQLite database in WAL mode.

The commit of a row decides what is acknowledged. With synchronous=FULL (durability "fsync") a commit is
flushed when `commit` returns. SQLite's own checkpoints are explicit and checked (wal_autocheckpoint=0),
because the automatic one swallows errors. One connection, used by one thread at a time, writes; `reader`
gives another for reads.

Knows rows and SQL; nothing of files, threads or decisions. `pages` keeps what is read here what was written.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import apsw

from sessionstored.engine import Order, Query
from sessionstored.engine.jsonl import pages, wal
from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.records import checksum, outcome_from_json, outcome_to_json
from sessionstored.engine.jsonl.snapshot import Snapshot
from sessionstored.rules import Head
from sessionstored.windows import CallWindow, Remembered

APPLICATION_ID = 0x53455353  # "SESS"
SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE journal(id INTEGER PRIMARY KEY, last_revision INTEGER NOT NULL, clock_s REAL NOT NULL,
    crc INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE session(key TEXT NOT NULL UNIQUE, file TEXT NOT NULL UNIQUE, generation INTEGER NOT NULL,
    revision INTEGER NOT NULL, rewrite_revision INTEGER NOT NULL, message_count INTEGER NOT NULL,
    last_consolidated INTEGER NOT NULL, create_time_us INTEGER NOT NULL, update_time_us INTEGER NOT NULL,
    damage TEXT NOT NULL, bad_line INTEGER NOT NULL, superseded_bytes INTEGER NOT NULL,
    length INTEGER NOT NULL, size INTEGER NOT NULL, inode INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    metadata BLOB NOT NULL, blocks BLOB NOT NULL);
CREATE INDEX session_by_update_time ON session(update_time_us, key);
CREATE TABLE client(client_id TEXT PRIMARY KEY, floor INTEGER NOT NULL, last_contact_s REAL NOT NULL,
    answers TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX client_by_contact ON client(last_contact_s);
CREATE TABLE request(key TEXT NOT NULL, request_id TEXT NOT NULL, n INTEGER NOT NULL, at_s REAL NOT NULL,
    digest BLOB NOT NULL, outcome TEXT NOT NULL, PRIMARY KEY(key, request_id)) WITHOUT ROWID;
CREATE INDEX request_by_age ON request(at_s);
CREATE INDEX request_by_number ON request(key, n);
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


# SQLite indexes its log in memory that a file backs, 32 KiB per 4096 pages. If that cannot grow, a commit
# fails when it is in the log already. So it is kept ahead of the log, by more than a transaction writes.
_INDEX_BYTES = 32 << 10
_INDEXED_BYTES = 4096 * 4096
_INDEXED_AHEAD = 4


class FormatError(Exception):
    """The database is not a journal of this version."""


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


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A request_id's answer as the catalogue keeps it."""

    n: int
    at_s: float
    remembered: Remembered


class Journal:
    """The database of one store."""

    def __init__(self, path: Path, durability: str, vfs: str | None = None) -> None:
        """Open or create.

        Args:
            path: the database.
            durability: "fsync" or "os".
            vfs: a VFS above the one that keeps the pages' checksums; for fault tests.

        Raises:
            FormatError: it is something else, or of a newer version.
            apsw.Error: it cannot be read.

        """
        try:
            pages.register()
        except pages.ChecksumsMissingError as error:
            raise FormatError(str(error)) from error
        self._path = path
        self._vfs = vfs or pages.CHECKSUM_VFS
        wal.discard_torn(self.log, path)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # its other files take its mode
        self._db = self._connect()
        # Kept open: a file that is closed loses every lock that its process has on it, SQLite's own too.
        self._index = os.open(f"{path}-shm", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._db.execute(f"PRAGMA synchronous={'FULL' if durability == 'fsync' else 'NORMAL'}")
        version = self._db.pragma("user_version")
        if version == 0:
            with self.transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.pragma("application_id", APPLICATION_ID)
                self._db.pragma("user_version", SCHEMA_VERSION)
        elif version > SCHEMA_VERSION or self._db.pragma("application_id") != APPLICATION_ID:
            raise FormatError(f"{path} is version {version} of something; this is version {SCHEMA_VERSION}")
        try:
            pages.check(path)
        except pages.ChecksumsMissingError as error:
            raise FormatError(f"{path}: {error}") from error

    def _connect(self) -> apsw.Connection:
        db = apsw.Connection(str(self._path), vfs=self._vfs)
        pages.reserve(db)
        db.set_busy_timeout(5000)
        db.pragma("journal_mode", "wal")
        db.pragma("wal_autocheckpoint", 0)
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        return db

    def reader(self) -> "Reader":
        """Another connection, for reads beside the writer."""
        return Reader(self._connect())

    def snapshot(self) -> Snapshot:
        """Another connection, for a copy of one moment."""
        return Snapshot(self._connect())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One transaction, committed at the end; rolled back if anything raises.

        Raises:
            OSError: the disk is full; as apsw.FullError, it says that nothing was stored.

        """
        self._extend_index()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _extend_index(self) -> None:
        """Give the log's index room for what a transaction may add to the log."""
        try:
            log_bytes = os.stat(f"{self._path}-wal").st_size
        except FileNotFoundError:  # another VFS keeps it elsewhere
            return
        wanted = (log_bytes // _INDEXED_BYTES + _INDEXED_AHEAD) * _INDEX_BYTES
        size = os.fstat(self._index).st_size
        if size < wanted:
            os.posix_fallocate(self._index, size, wanted - size)

    def append(
        self, row_id: int, last_revision: int, clock_s: float, body: bytes, entries: Iterable[Entry]
    ) -> None:
        """Commit one group: its row, and the catalogue rows of files that it brings with it."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO journal VALUES (?, ?, ?, ?, ?)",
                (row_id, last_revision, clock_s, checksum(row_id, last_revision, clock_s, body), body),
            )
            for entry in entries:
                self._put(entry)

    def rows(self) -> Iterator[tuple[int, float, bytes, bool]]:
        """(id, clock, body, whole) of every row, in order; `whole` tells whether its checksum is right."""
        for row_id, revision, clock_s, crc, body in self._db.execute(
            "SELECT id, last_revision, clock_s, crc, body FROM journal ORDER BY id"
        ):
            yield row_id, clock_s, body, checksum(row_id, revision, clock_s, body) == crc

    def put_entries(self, entries: Iterable[Entry], revision: int = 0) -> None:
        """Write catalogue rows, in one transaction.

        Args:
            entries: the rows.
            revision: the highest that was given out, if these rows have revisions that no journal row has.

        """
        with self.transaction():
            for entry in entries:
                self._put(entry)
            if revision:
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('revision', ?)", (revision,))

    def _put(self, entry: Entry) -> None:
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

    def put_windows(
        self, clients: dict[str, CallWindow], requests: dict[tuple[str, str], StoredRequest]
    ) -> None:
        """Write the windows that changed."""
        with self.transaction():
            for client_id, window in clients.items():
                answers = [
                    [sequence, kept.digest.hex(), outcome_to_json(kept.outcome)]
                    for sequence, kept in window.answers.items()
                ]
                self._db.execute(
                    "INSERT OR REPLACE INTO client VALUES (?, ?, ?, ?)",
                    (client_id, window.floor, window.last_contact_s, json.dumps(answers)),
                )
            for (key, request_id), stored in requests.items():
                self._db.execute(
                    "INSERT OR REPLACE INTO request VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        key,
                        request_id,
                        stored.n,
                        stored.at_s,
                        stored.remembered.digest,
                        json.dumps(outcome_to_json(stored.remembered.outcome)),
                    ),
                )

    def finish_checkpoint(
        self,
        row_id: int,
        revision: int,
        gone: dict[str, int],
        meta: dict[str, object],
        touched: Iterable[str],
        request_ids_max: int,
        forget_before_s: float,
    ) -> tuple[int, list[str]]:
        """Drop rows, the catalogue rows of sessions whose deletion goes with them, and windows over limits.

        Args:
            row_id: the last row that may go,
            revision: if it holds no later revision than this.
            gone: deleted sessions -> the revision of their deletion. A catalogue row stays as long as the
                deletion's row: with one of them alone, replay would revive it, or miss its beginning.
            meta: the store's own values.
            touched: the sessions whose request_ids may be too many; none while rows stay that name them.
            request_ids_max: how many of them stay.
            forget_before_s: windows with no contact since then go.

        Returns:
            How many bytes of rows went, and which sessions' catalogue rows.

        """
        with self.transaction():
            dropped = self._db.execute(
                "DELETE FROM journal WHERE id <= ? AND last_revision <= ? "
                "RETURNING length(body), last_revision",
                (row_id, revision),
            ).fetchall()
            last = max((int(str(revision)) for _, revision in dropped), default=0)
            buried = [key for key, deleted in gone.items() if deleted <= last]
            for key in buried:
                self._db.execute("DELETE FROM session WHERE key = ?", (key,))
            for name, value in meta.items():
                self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))
            for key in touched:
                self._db.execute(
                    "DELETE FROM request WHERE key = ?1 "
                    "AND n <= (SELECT max(n) FROM request WHERE key = ?1) - ?2",
                    (key, request_ids_max),
                )
            self._db.execute("DELETE FROM request WHERE at_s < ?", (forget_before_s,))
            self._db.execute("DELETE FROM client WHERE last_contact_s < ?", (forget_before_s,))
        return sum(int(str(size)) for size, _ in dropped), buried

    def meta(self) -> dict[str, object]:
        """The store's own values: store_id, revision, clock_s."""
        return dict(self._db.execute("SELECT name, value FROM meta"))

    def put_meta(self, **values: object) -> None:
        """Write some of them."""
        with self.transaction():
            for name, value in values.items():
                self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def last_revision(self) -> int:
        """The highest revision that a row names; 0 if there are no rows."""
        return int(_value(self._db, "SELECT ifnull(max(last_revision), 0) FROM journal"))

    def put_fingerprints(self, found: Iterable[tuple[str, int, int, int]]) -> None:
        """Make files (name, size, inode, mtime_ns) those that the catalogue knows, in one transaction."""
        with self.transaction():
            for file, size, inode, mtime_ns in found:
                self._db.execute(
                    "UPDATE session SET size = ?, inode = ?, mtime_ns = ? WHERE file = ?",
                    (size, inode, mtime_ns, file),
                )

    def entry(self, key: str) -> Entry | None:
        """A session's catalogue row."""
        return _entry(self._db, "key = ?", key)

    def entry_of_file(self, file: str) -> Entry | None:
        """The catalogue row of the session that has this file."""
        return _entry(self._db, "file = ?", file)

    def file_taken(self, file: str) -> bool:
        """Whether a session has this file."""
        return _file_taken(self._db, file)

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

    def integrity(self) -> list[str]:
        """What SQLite finds wrong in its own structures."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def count(self) -> int:
        """How many sessions the catalogue has."""
        return int(_value(self._db, "SELECT count(*) FROM session"))

    def call_window(self, client_id: str) -> CallWindow | None:
        """A client's window."""
        found = self._db.execute(
            "SELECT floor, last_contact_s, answers FROM client WHERE client_id = ?", (client_id,)
        ).fetchone()
        if found is None:
            return None
        answers = {
            sequence: Remembered(bytes.fromhex(digest), outcome_from_json(outcome))
            for sequence, digest, outcome in json.loads(found[2])
        }
        return CallWindow(found[0], found[1], answers)

    def request(self, key: str, request_id: str) -> StoredRequest | None:
        """What is kept under a request_id."""
        found = self._db.execute(
            "SELECT n, at_s, digest, outcome FROM request WHERE key = ? AND request_id = ?", (key, request_id)
        ).fetchone()
        if found is None:
            return None
        return StoredRequest(
            found[0], found[1], Remembered(found[2], outcome_from_json(json.loads(found[3])))
        )

    def last_request_number(self, key: str) -> int:
        """The number of the newest request_id of a session; 0 if there is none."""
        return int(_value(self._db, "SELECT ifnull(max(n), 0) FROM request WHERE key = ?", key))

    def lost_commit(self) -> str:
        """Where the write-ahead log lost a commit that others follow; "" if it ends as a crash leaves it.

        To be asked before anything is written, and of a log whose every commit was flushed.
        """
        frames, _ = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        return wal.lost_commit(self.log, max(0, frames))

    @property
    def log(self) -> Path:
        """The write-ahead log's file."""
        return self._path.with_name(f"{self._path.name}-wal")

    def wal_checkpoint(self) -> bool:
        """Move the write-ahead log into the database, flush that, empty the log. Raises if any step fails.

        Returns False if another process reads the database and did not let go of it within five seconds.
        """
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            return False
        return True

    def close(self) -> None:
        """Close. After its readers."""
        self._db.close()
        if self._index >= 0:
            os.close(self._index)
            self._index = -1


class Reader:
    """Reads beside the writer. Not for two threads at once."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def entry(self, key: str) -> Entry | None:
        """A session's catalogue row."""
        return _entry(self._db, "key = ?", key)

    def file_taken(self, file: str) -> bool:
        """Whether a session has this file."""
        return _file_taken(self._db, file)

    def entries_after(self, rowid: int, count: int) -> list[tuple[int, str, str, int, int, int]]:
        """(rowid, key, file, size, inode, mtime_ns) of the next rows, for a sweep."""
        rows = self._db.execute(
            "SELECT rowid, key, file, size, inode, mtime_ns FROM session WHERE rowid > ? "
            "ORDER BY rowid LIMIT ?",
            (rowid, count),
        )
        return cast("list[tuple[int, str, str, int, int, int]]", rows.fetchall())

    def wal_checkpoint_passive(self) -> None:
        """Move into the database what can be moved without waiting for anybody."""
        self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

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

    def close(self) -> None:
        """Close."""
        self._db.close()


def after_prefix(prefix: str) -> str:
    """The least string above every string that begins with `prefix`; "" if there is none."""
    while prefix:
        code = ord(prefix[-1]) + 1
        if code <= 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if 0xD800 <= code <= 0xDFFF else code)
        prefix = prefix[:-1]
    return ""


def _value(db: apsw.Connection, sql: str, *bindings: str) -> int:
    """The one integer that a query gives."""
    row = db.execute(sql, bindings).fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]


def _file_taken(db: apsw.Connection, file: str) -> bool:
    return bool(db.execute("SELECT 1 FROM session WHERE file = ?", (file,)).fetchone())


def _entry(db: apsw.Connection, where: str, value: str) -> Entry | None:
    row = db.execute(f"SELECT {_SESSION} FROM session WHERE {where}", (value,)).fetchone()
    return None if row is None else _entry_of(row)


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

"""journal.db: the journal, the catalogue and the windows, in one SQLite database in WAL mode.

This module has the connection, the transactions, the journal's rows and the store's own values; the other
tables are in `catalogue` and `answers`.

The commit of a row decides what is acknowledged. With synchronous=FULL (durability "fsync") a commit is
flushed when `commit` returns. SQLite's own checkpoints are explicit and checked (wal_autocheckpoint=0),
because the automatic one swallows errors. One connection, used by one thread at a time, writes; `reader`
gives another for reads.

Knows rows and SQL; nothing of files, threads or decisions. `pages` keeps what is read here what was written.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import apsw

from sessionstored.engine.jsonl import answers, catalogue, feeding, lease_table, pages, wal
from sessionstored.engine.jsonl.answers import Answers, StoredRequest
from sessionstored.engine.jsonl.catalogue import Catalogue, Entry, WritableCatalogue
from sessionstored.engine.jsonl.records import checksum
from sessionstored.engine.jsonl.snapshot import Snapshot
from sessionstored.engine.jsonl.tables import WrongRow, is_whole, one_value, row_crc
from sessionstored.leases import Lease
from sessionstored.retention import Retention
from sessionstored.windows import CallWindow

APPLICATION_ID = 0x53455353  # "SESS"
SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE journal(id INTEGER PRIMARY KEY, last_revision INTEGER NOT NULL, clock_s REAL NOT NULL,
    crc INTEGER NOT NULL, body BLOB NOT NULL);
"""


# SQLite indexes its log in memory that a file backs, 32 KiB per 4096 pages. If that cannot grow, a commit
# fails when it is in the log already. So it is kept ahead of the log, by more than a transaction writes.
_INDEX_BYTES = 32 << 10
_INDEXED_BYTES = 4096 * 4096
_INDEXED_AHEAD = 4
_BUSY_MS = 5000


class FormatError(Exception):
    """The database is not a journal of this version."""


class Told(NamedTuple):
    """A journal row that recovery does not need."""

    row_id: int
    last_revision: int
    clock_s: float
    body: bytes


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
        self.catalogue, self.answers = WritableCatalogue(self._db), Answers(self._db)
        # Kept open: a file that is closed loses every lock that its process has on it, SQLite's own too.
        self._index = os.open(f"{path}-shm", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._db.execute(f"PRAGMA synchronous={'FULL' if durability == 'fsync' else 'NORMAL'}")
        self._db.pragma("secure_delete", "on")  # what is deleted is overwritten with zeros
        version = self._db.pragma("user_version")
        if version == 0:
            with self.transaction():
                schema = _SCHEMA + catalogue.SCHEMA + answers.SCHEMA + lease_table.SCHEMA
                for statement in schema.split(";\n"):
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
        db.set_busy_timeout(_BUSY_MS)
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
        self,
        row_id: int,
        last_revision: int,
        clock_s: float,
        body: bytes,
        entries: Iterable[Entry],
        leases: Mapping[str, Lease | None],
    ) -> None:
        """Commit one group: its row, the catalogue rows of files that it brings with it, and its leases."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO journal VALUES (?, ?, ?, ?, ?)",
                (row_id, last_revision, clock_s, checksum(row_id, last_revision, clock_s, body), body),
            )
            for entry in entries:
                self.catalogue.put(entry)
            lease_table.write(self._db, leases)

    def leases(self) -> tuple[list[Lease], list[WrongRow]]:
        """The leases that did not end, and the rows of leases that are not what was written."""
        return lease_table.read(self._db)

    def put_leases(self, leases: Mapping[str, Lease | None]) -> None:
        """Write what became of leases beside any group."""
        with self.transaction():
            lease_table.write(self._db, leases)

    def end_leases(self) -> None:
        """End every lease."""
        with self.transaction():
            lease_table.clear(self._db)

    def rows(self, after: int) -> Iterator[tuple[int, float, bytes, bool]]:
        """(id, clock, body, whole) of the later rows, in order; `whole`: whether its checksum is right."""
        for row_id, revision, clock_s, crc, body in self._db.execute(
            "SELECT id, last_revision, clock_s, crc, body FROM journal WHERE id > ? ORDER BY id", (after,)
        ):
            yield row_id, clock_s, body, checksum(row_id, revision, clock_s, body) == crc

    def put_entries(self, entries: Iterable[Entry], revision: int = 0, told: Told | None = None) -> None:
        """Write catalogue rows, in one transaction.

        Args:
            entries: the rows.
            revision: the highest that was given out, if these rows have revisions that no journal row has.
            told: the journal row that tells watchers of it, if anybody is to be told.

        """
        with self.transaction():
            if told is not None:
                self._db.execute(
                    "INSERT INTO journal VALUES (?, ?, ?, ?, ?)",
                    (told.row_id, told.last_revision, told.clock_s, checksum(*told), told.body),
                )
            for entry in entries:
                self.catalogue.put(entry)
            if revision:
                self._put_meta("revision", revision)

    def put_windows(
        self, clients: dict[str, CallWindow], requests: dict[tuple[str, str], StoredRequest]
    ) -> None:
        """Write the windows that changed."""
        with self.transaction():
            for client_id, window in clients.items():
                self.answers.put_window(client_id, window)
            for (key, request_id), stored in requests.items():
                self.answers.put_request(key, request_id, stored)

    def finish_checkpoint(
        self,
        after: int,
        row_id: int,
        revision: int,
        gone: dict[str, int],
        meta: dict[str, object],
    ) -> tuple[int, int, list[str]]:
        """Pass rows, and drop catalogue rows of sessions whose deletion is passed.

        Recovery begins behind the rows that are passed. They stay for watchers: see `feeding`.

        Args:
            after: the last row that was passed before.
            row_id: the last row that may be passed now,
            revision: if neither it nor one before it holds a later revision than this.
            gone: deleted sessions -> the revision of their deletion. A catalogue row stays as long as
                recovery needs the deletion's row: with one of them alone, replay would revive it, or miss its
                beginning.
            meta: the store's own values.

        Returns:
            The last row that is passed now, how many bytes of rows are passed anew, and which sessions'
            catalogue rows went.

        """
        with self.transaction():
            through, size, last = feeding.passed(self._db, after, row_id, revision)
            buried = [key for key, deleted in gone.items() if deleted <= last]
            for key in buried:
                self.catalogue.remove(key)
            for name, value in {**meta, "checkpoint_row": through}.items():
                self._put_meta(name, value)
        return through, size, buried

    def feed_bytes(self, through: int) -> int:
        """How many bytes of rows are kept for watchers only."""
        return feeding.size(self._db, through)

    def prune_feed(
        self, through: int, before_s: float, excess: int, step_bytes: int = feeding.BYTES_PER_STEP
    ) -> tuple[int, int] | None:
        """Drop some rows that only watchers need; see `feeding.prune`."""
        with self.transaction():
            pruned = feeding.prune(self._db, through, before_s, excess, step_bytes)
            if pruned is not None:
                self._put_meta("feed_floor", pruned[0])
            return pruned

    def trim_windows(self, touched: Iterable[str], request_ids_max: int, forget_before_s: float) -> bool:
        """Drop windows over their limits. Returns whether any was too old.

        Args:
            touched: the sessions whose request_ids may be too many; none while rows stay that name them.
            request_ids_max: how many of them stay.
            forget_before_s: windows with no contact since then go.

        """
        with self.transaction():
            return self.answers.forget(touched, request_ids_max, forget_before_s)

    def set_retention(self, retention: Retention) -> None:
        """Have the catalogue say when sessions end by these rules; all of it anew if they changed."""
        told = json.dumps(retention.rules)
        if self.meta().get("retention", "[]") == told:
            self.catalogue.retention = retention
            return
        with self.transaction():
            self.catalogue.set_retention(retention)
            self._put_meta("retention", told)

    def first_row(self) -> int | None:
        """The id of the oldest row; None if there are no rows."""
        found = self._db.execute("SELECT id FROM journal ORDER BY id LIMIT 1").fetchone()
        return None if found is None else int(str(found[0]))

    def meta(self) -> dict[str, object]:
        """The store's own values: store_id, revision, clock_s, checkpoint_row, feed_floor, feed_id.

        Raises WrongRow.
        """
        found = {}
        for name, value, crc in self._db.execute("SELECT name, value, crc FROM meta"):
            if not is_whole((name, value), crc):
                raise WrongRow("meta", f"the value {name!r}")
            found[str(name)] = value
        return found

    def put_meta(self, **values: object) -> None:
        """Write some of them."""
        with self.transaction():
            for name, value in values.items():
                self._put_meta(name, value)

    def _put_meta(self, name: str, value: object) -> None:
        row = name, value
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (*row, row_crc(row)))

    def last_revision(self) -> int:
        """The highest revision that a row names; 0 if there are no rows."""
        return one_value(self._db, "SELECT ifnull(max(last_revision), 0) FROM journal")

    def put_fingerprints(self, found: Iterable[tuple[str, int, int, int]]) -> None:
        """Make files (name, size, inode, mtime_ns) those that the catalogue knows, in one transaction.

        Raises:
            WrongRow: nothing was changed.

        """
        with self.transaction():
            for file, size, inode, mtime_ns in found:
                entry = self.catalogue.entry_of_file(file)
                if entry is not None:
                    entry.size, entry.inode, entry.mtime_ns = size, inode, mtime_ns
                    self.catalogue.put(entry)

    def integrity(self) -> list[str]:
        """What SQLite finds wrong in its own structures."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def lost_commit(self) -> str:
        """Where the write-ahead log lost a commit that others follow; "" if it ends as a crash leaves it.

        To be asked before anything is written, and of a log whose every commit was flushed.
        """
        frames, _ = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        return wal.lost_commit(self.log, max(0, frames))

    @property
    def log(self) -> Path:
        """The write-ahead log's file."""
        return log_of(self._path)

    def wal_checkpoint(self, *, wait: bool = True) -> bool:
        """Move the write-ahead log into the database, flush that, empty the log. Raises if any step fails.

        Returns False if somebody else reads the database and did not let go of it within five seconds, or
        reads it now if `wait` is not set.
        """
        try:
            self._db.set_busy_timeout(_BUSY_MS if wait else 0)
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            return False
        finally:
            self._db.set_busy_timeout(_BUSY_MS)
        return True

    def growth_bytes(self) -> int:
        """How much longer the database becomes when its log is moved into it."""
        bytes_then = int(str(self._db.pragma("page_count"))) * int(str(self._db.pragma("page_size")))
        return max(0, bytes_then - os.stat(self._path).st_size)

    def close(self) -> None:
        """Close. After its readers."""
        self._db.close()
        if self._index >= 0:
            os.close(self._index)
            self._index = -1


class Reader(Catalogue):
    """Reads the catalogue beside the writer. Not for two threads at once."""

    def feed_rows(self, after: int, through: int, bytes_max: int) -> "feeding.Kept | None":
        """Rows for watchers; see `feeding.rows`."""
        return feeding.rows(self._db, after, through, bytes_max)

    def old_windows(self, before_s: float) -> bool:
        """Whether there are windows without a contact since then."""
        return bool(
            self._db.execute(
                "SELECT 1 WHERE EXISTS (SELECT 1 FROM request WHERE at_s < ?1) "
                "OR EXISTS (SELECT 1 FROM client WHERE last_contact_s < ?1)",
                (before_s,),
            ).fetchone()
        )

    def wal_checkpoint_passive(self) -> None:
        """Move into the database what can be moved without waiting for anybody."""
        self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def close(self) -> None:
        """Close."""
        self._db.close()


def log_of(database: Path) -> Path:
    """The file of a database's write-ahead log."""
    return database.with_name(f"{database.name}-wal")

"""A backup: the directory as a crash at one group boundary would leave it, copied while the store goes on.

As a task of the committer, between two groups, a read transaction of the journal is begun, and from then on
what is replaced or removed is kept (`keeping`). The journal is copied from that transaction, which then
ends; the copy's catalogue says which files there are and how long each was. A file is cut to that length:
what came after its catalogue row is in the journal's rows, and opening the copy is the same recovery as after
a crash.

Every block of a file is compared with its checksum on the way. What does not match, or was damaged before, is
copied as it is, and named. A backup gives way: to a full disk, to a stop, and if its reader stands still.

Runs on threads of its own; the committer and the disk of the sessions never wait for its reader.
"""

import asyncio
import hashlib
import os
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import apsw

from sessionstored.engine import (
    BACKUP_BYTES_MAX,
    BackupDamage,
    BackupFile,
    BackupHeader,
    BackupItem,
    BackupPart,
    Refused,
)
from sessionstored.engine.jsonl import pages
from sessionstored.engine.jsonl.blocks import BLOCK_BYTES, Blocks
from sessionstored.engine.jsonl.committer import STOPPING, Committer
from sessionstored.engine.jsonl.files import FULL
from sessionstored.engine.jsonl.keeping import READING, Keeper
from sessionstored.engine.jsonl.names import is_text
from sessionstored.engine.jsonl.snapshot import Cataloged, JournalCopy, Snapshot
from sessionstored.engine.jsonl.store import FORMAT
from sessionstored.engine.jsonl.tables import WrongRow
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import Refusal

BACKUPS_MAX = 2
"""How many run at once."""
STALL_S_MAX = 60.0
"""How long a reader may take nothing."""
_ITEMS_MAX = 1000


@dataclass(frozen=True, slots=True)
class _Cut:
    """What the moment of a backup is, beside what the journal's copy says."""

    take_time_us: int
    revision: int
    session_count: int
    unfiled: frozenset[str]
    """Sessions whose catalogue row speaks of a file that is gone, as the journal's rows say."""
    claimants: Sequence[tuple[str, str, str]]
    """(key, file, why) of files that claim another session's key."""
    quarantine: Sequence[str]


class Backups:
    """The backups of one store."""

    def __init__(self, vault: Vault, committer: Committer) -> None:
        self._vault, self._committer = vault, committer
        self._running: set[_Backup] = set()
        self._executor = ThreadPoolExecutor(BACKUPS_MAX, "backup")
        self._closed = False

    async def stream(self) -> AsyncGenerator[Sequence[BackupItem], None]:
        """One backup. Its reader closes it."""
        loop = asyncio.get_running_loop()
        if len(self._running) >= BACKUPS_MAX:
            raise Refused(_overloaded(f"{BACKUPS_MAX} backups run already", BACKUPS_MAX))
        backup = _Backup(self._vault, self._committer)
        self._running.add(backup)
        too_slow = _overloaded(
            f"the backup was given up: nothing of it was read for {STALL_S_MAX:g} s", int(STALL_S_MAX)
        )
        try:
            while not self._closed:
                block = await loop.run_in_executor(self._executor, backup.next_block)
                if not block:
                    return
                stalled = loop.call_later(STALL_S_MAX, self._end_aside, backup, too_slow)
                try:
                    yield block
                finally:
                    stalled.cancel()
            raise Refused(STOPPING)
        finally:
            await asyncio.shield(loop.run_in_executor(None, self._end, backup, STOPPING))

    def _end_aside(self, backup: "_Backup", why: Refusal) -> None:
        asyncio.get_running_loop().run_in_executor(None, backup.end, why)

    def _end(self, backup: "_Backup", why: Refusal) -> None:
        backup.end(why)
        self._running.discard(backup)

    def close(self) -> None:
        """End every backup, and take no more."""
        self._closed = True
        for backup in list(self._running):
            backup.end(STOPPING)
        self._executor.shutdown()


class _Backup:
    """One backup. `next_block` and `end` may be called on any thread."""

    def __init__(self, vault: Vault, committer: Committer) -> None:
        self._vault, self._committer = vault, committer
        self._lock = threading.Lock()
        self._ended: Refusal | None = None
        self._blocks = self._in_blocks()
        self._keeper: Keeper | None = None

    def next_block(self) -> Sequence[BackupItem]:
        """The next items; none after the last. Raises Refused."""
        with self._lock:
            try:
                self._go_on()
                return next(self._blocks, ())
            except apsw.FullError as error:
                raise Refused(self._committer.full()) from error
            except WrongRow as wrong:
                raise Refused(_journal_damaged(str(wrong), wrong.key)) from wrong
            except pages.DAMAGED as error:
                raise Refused(_journal_damaged(pages.describe(error))) from error
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise Refused(self._committer.full()) from error

    def end(self, why: Refusal) -> None:
        """Let go of everything; whoever asks for more is told why."""
        self._ended = self._ended or why  # seen between two steps, so that the lock comes free soon
        with self._lock:
            self._blocks.close()

    def _go_on(self) -> None:
        """Whether there is a reason to end. Raises Refused, or OSError."""
        if self._ended is not None:
            raise Refused(self._ended)
        if self._keeper is not None and self._keeper.failure is not None:
            raise self._keeper.failure
        if self._committer.is_full(0):
            raise Refused(self._committer.full())

    def _in_blocks(self) -> Generator[Sequence[BackupItem], None, None]:
        """The items, in blocks of moderate size."""
        block: list[BackupItem] = []
        size = 0
        for item in self._items():
            data = len(item.data) if isinstance(item, BackupPart) else 0
            if block and (size + data > BACKUP_BYTES_MAX or len(block) == _ITEMS_MAX):
                yield block
                block, size = [], 0
            block.append(item)
            size += data
        yield block

    def _items(self) -> Iterator[BackupItem]:
        directory = self._vault.directory
        folder = directory.make_backup_folder()
        try:
            kept = folder / "kept"
            kept.mkdir(mode=0o700)
            self._keeper = keeper = Keeper(directory.sessions, kept, self._vault.disk)
            copy = folder / "journal.db"
            try:
                cut = self._copy_journal(copy, keeper)
                catalogue = JournalCopy(copy)
                try:
                    yield from self._everything(cut, catalogue, keeper, os.path.getsize(copy))
                    yield from self._file("journal.db", os.open(copy, os.O_RDONLY | os.O_CLOEXEC))
                finally:
                    catalogue.close()
            finally:
                keeper.close()
        finally:
            shutil.rmtree(folder)

    def _copy_journal(self, copy: Path, keeper: Keeper) -> _Cut:
        """Take the moment, and copy the journal as it is then."""
        snapshot = self._vault.journal.snapshot()
        try:
            cut = self._committer.run(lambda: self._cut(snapshot, keeper)).result()
            if self._committer.is_full(snapshot.bytes):
                raise Refused(self._committer.full())
            snapshot.copy(copy, self._go_on)
        finally:
            snapshot.close()
        return cut

    def _cut(self, snapshot: Snapshot, keeper: Keeper) -> _Cut:
        """Take the moment. On the committer's thread, between two groups."""
        vault = self._vault
        snapshot.begin()
        vault.files.keep_for(keeper)
        refusals = {key: vault.claimed(key) for key in vault.claims}
        return _Cut(
            time.time_ns() // 1000,
            vault.revision,
            vault.session_count,
            frozenset(
                key
                for key, state in vault.dirty.items()
                if state.head is None or not state.file.revision  # deleted, and perhaps begun anew
            ),
            [
                (key, file, refusal.metadata["detail"])
                for key, refusal in refusals.items()
                if refusal is not None
                for file in vault.claims[key][1:]
            ],
            [name for name in os.listdir(vault.files.quarantine) if is_text(name)],
        )

    def _everything(
        self, cut: _Cut, catalogue: JournalCopy, keeper: Keeper, journal_bytes: int
    ) -> Iterator[BackupItem]:
        """The header, every session's file, and what is in quarantine."""
        defect = catalogue.defect()
        if defect:
            raise Refused(_journal_damaged(defect))
        quarantine = self._vault.files.quarantine
        total = journal_bytes + sum(_size(quarantine / name) for name in cut.quarantine)
        total += sum(length for key, length in catalogue.lengths() if key not in cut.unfiled)
        yield BackupHeader(
            self._vault.store.store_id, FORMAT, cut.take_time_us, cut.revision, cut.session_count, total
        )
        claimed = {key: why for key, _, why in cut.claimants}
        for session in catalogue.sessions():
            if session.key not in cut.unfiled:
                yield from self._session(session, keeper, claimed.get(session.key, ""))
        for key, file, why in cut.claimants:
            yield from self._session(Cataloged(key, file, Blocks(), why), keeper, "")
        for name in cut.quarantine:
            try:
                fd = os.open(quarantine / name, READING)
            except OSError:
                continue  # its operator took it away, or put something else there
            yield from self._file(f"quarantine/{name}", fd)

    def _session(self, session: Cataloged, keeper: Keeper, claimed: str) -> Iterator[BackupItem]:
        """A session's file. A damaged one is copied whole, and as it is."""
        path = f"sessions/{session.file}"
        blocks = None if session.damage else session.blocks
        try:
            fd = keeper.take(session.file)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            detail = "the file is missing" if missing else f"it cannot be opened: {error}"
            yield BackupDamage(session.key, path, session.damage or detail)
            return
        found = yield from self._file(path, fd, blocks)
        detail = session.damage or claimed or found
        if detail:
            yield BackupDamage(session.key, path, detail)

    def _file(
        self, path: str, fd: int, blocks: Blocks | None = None
    ) -> Generator[BackupItem, None, str]:
        """A file's parts: all of it, or what its blocks cover. Closes `fd`. Returns what is wrong with it."""
        digest = hashlib.sha256()
        offset, detail = 0, ""
        try:
            stat = os.fstat(fd)
            if not S_ISREG(stat.st_mode):
                return "it is no regular file"
            length = stat.st_size if blocks is None else blocks.length
            while True:
                self._go_on()
                try:
                    data = os.pread(fd, min(BACKUP_BYTES_MAX, length - offset), offset)
                except OSError as error:
                    data, detail = b"", detail or f"it cannot be read from byte {offset} on: {error}"
                if blocks is not None:
                    detail = detail or _mismatch(blocks, offset, data)
                digest.update(data)
                last = offset + len(data) >= length or not data
                end = BackupFile(offset + len(data), digest.hexdigest()) if last else None
                yield BackupPart(path, offset, data, end)
                offset += len(data)
                if last:
                    return detail or ("the file is shorter than it was" if offset < length else "")
        finally:
            os.close(fd)


def _mismatch(blocks: Blocks, offset: int, data: bytes) -> str:
    """Where bytes from a block's beginning on are not what was written; "" if they are."""
    for start in range(0, len(data), BLOCK_BYTES):
        block = (offset + start) // BLOCK_BYTES
        if not blocks.check(block, data[start : start + BLOCK_BYTES]):
            first = offset + start
            return f"bytes {first} to {first + BLOCK_BYTES} do not match their checksum"
    return ""


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


def _journal_damaged(what: str, key: str = "") -> Refusal:
    metadata = {"key": key, "file": "journal.db", "line": "0", "detail": what}
    return Refusal("DATA_LOSS", f"journal.db is damaged: {what}: it cannot be backed up", metadata)


def _overloaded(what: str, limit: int) -> Refusal:
    return Refusal("OVERLOADED", f"{what}; try again later", {"limit": str(limit)})

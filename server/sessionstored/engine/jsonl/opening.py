"""Opening a data directory: STORE and journal together say whether anything is lost; then recovery."""

import json
import logging
import os
import resource
from contextlib import suppress
from dataclasses import replace

import apsw

from sessionstored.engine import StartError
from sessionstored.engine.jsonl import pages
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.files import FULL, SessionFiles
from sessionstored.engine.jsonl.journal import FormatError, Journal, log_of
from sessionstored.engine.jsonl.recovery import Recovery
from sessionstored.engine.jsonl.store import (
    Directory,
    StoreFile,
    full,
    new_store,
    refuse_unfinished,
    with_ceiling,
)
from sessionstored.engine.jsonl.tables import WrongRow
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import Limits

logger = logging.getLogger(__name__)


def open_vault(
    directory: Directory,
    *,
    durability: str,
    limits: Limits,
    cache_bytes_max: int,
    hot_sessions_max: int,
    accept_loss: bool,
    disk: Disk,
    vfs: str | None,
) -> Vault:
    """Open STORE and journal, and recover.

    Raises:
        StartError: something is lost, damaged or in the way.

    """
    refuse_unfinished(directory.path)
    try:
        store = directory.read_store()
        directory.remove_backup_folders()
        if store is None or not store.clean:
            _distrust_memory(directory, disk)
        journal = _open_journal(directory, store, durability, accept_loss, vfs)
        try:
            return _recovered(
                directory,
                store,
                journal,
                limits,
                cache_bytes_max,
                hot_sessions_max,
                accept_loss,
                disk,
                durability,
            )
        except BaseException:
            journal.close()
            raise
    except (apsw.Error, OSError, WrongRow) as error:
        raise start_error(directory, error) from error


def _distrust_memory(directory: Directory, disk: Disk) -> None:
    """Have the journal and its log say what is on the disk, where a flush may have failed.

    Of the database, memory may show what SQLite could not move into it. All of that is still in the log, and
    is moved again. So the log is made durable as it can be read: were the one on the disk shorter, and the
    power went while it is moved, nothing could complete a page or a commit of which a part was moved.
    """
    for path, settle in ((directory.journal, disk.reread), (log_of(directory.journal), disk.write_again)):
        with suppress(FileNotFoundError):
            settle(path)


def start_error(directory: Directory, error: apsw.Error | OSError | WrongRow) -> StartError:
    """What to tell the operator of a failure at the start."""
    if isinstance(error, WrongRow):
        return StartError(
            f"{directory.journal} is damaged: {error}: restore it from a backup, or move it away and start "
            "with --accept-loss"
        )
    if isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno in FULL):
        return full(directory.path)
    # The index of the log did not get its room: SQLite does not say why.
    no_index = getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_SHMSIZE
    if no_index and not os.statvfs(directory.path).f_bavail:
        return full(directory.path)
    if isinstance(error, apsw.Error):
        return StartError(
            f"{directory.journal} cannot be used: {pages.describe(error)}: restore it from a backup, "
            "or move it away and start with --accept-loss"
        )
    return StartError(f"{directory.path} cannot be used: {error}")


def _open_journal(
    directory: Directory, store: StoreFile | None, durability: str, accept_loss: bool, vfs: str | None
) -> Journal:
    """The journal, if it is this store's, and there if it has to be."""
    lost = store is not None and not (directory.journal.exists() and directory.journal.stat().st_size)
    if lost:
        _refuse_loss(directory, store, accept_loss)
    try:
        journal = Journal(directory.journal, durability, vfs)
    except FormatError as error:
        raise StartError(f"{error}: use the sessionstored that wrote it") from error
    try:
        known_id = journal.meta().get("store_id")
        if store is not None and known_id is None and not lost:
            _refuse_loss(directory, store, accept_loss)  # somebody emptied it
        if store is not None and known_id not in (None, store.store_id):
            raise StartError(
                f"{directory.journal} belongs to store {known_id}, but STORE says {store.store_id}: "
                "restore both from one backup"
            )
    except BaseException:
        journal.close()
        raise
    return journal


def _refuse_loss(directory: Directory, store: StoreFile | None, accept_loss: bool) -> None:
    """A lost journal can be rebuilt from the files after a clean stop; else what it had is gone."""
    if store is not None and not store.clean and not accept_loss:
        raise StartError(
            f"{directory.journal} is missing or empty, and the last daemon did not stop cleanly: "
            "acknowledged changes may be lost; restore it, or start with --accept-loss to go on with "
            "the session files"
        )


def _recovered(
    directory: Directory,
    store: StoreFile | None,
    journal: Journal,
    limits: Limits,
    cache_bytes_max: int,
    hot_sessions_max: int,
    accept_loss: bool,
    disk: Disk,
    durability: str,
) -> Vault:
    known_id = journal.meta().get("store_id")
    rebuilt = store is not None and known_id is None
    log_ends_wrong = store is not None and store.durability == "fsync" and journal.lost_commit()
    unflushed = store is not None and not store.clean and store.durability != "fsync"
    if store is None:
        store = new_store() if known_id is None else replace(new_store(), store_id=str(known_id))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = SessionFiles(directory.sessions, directory.quarantine, disk, max(16, min(512, soft // 4)))
    vault = Vault(directory, store, journal, files, disk, limits, cache_bytes_max, hot_sessions_max)
    try:
        if log_ends_wrong:
            _set_log_aside(vault, log_ends_wrong, accept_loss)
        # What was lost, if anything was, had revisions: none of them is given out again.
        vault.revision = 0 if store.clean and not rebuilt else store.revision_ceiling
        _empty_log(directory, journal)  # or a write could be torn among what is left of an older one
        journal.put_meta(store_id=store.store_id, **({"revision": vault.revision} if rebuilt else {}))
        _empty_log(directory, journal)
        vault.write_store(replace(store, clean=False, durability=durability))
        journal.set_retention(limits.retention)
        Recovery(vault, accept_loss).run(changes_lost=rebuilt or bool(log_ends_wrong) or unflushed)
        _go_on_with_clock(vault)
        vault.write_store(with_ceiling(vault.store, vault.revision))
    except BaseException:
        vault.close()
        raise
    return vault


def _go_on_with_clock(vault: Vault) -> None:
    """Let sessions expire by a clock that goes on from where it was, or else from the last change."""
    stored = vault.journal.meta().get("expiry_clock")
    if stored is not None:
        vault.trusted.resume(json.loads(str(stored)))
    elif newest_us := vault.journal.catalogue.newest_update_us():
        vault.trusted.begin_at(newest_us)


def _empty_log(directory: Directory, journal: Journal) -> None:
    """Move the write-ahead log into the database, durably."""
    if not journal.wal_checkpoint():
        raise StartError(f"another process reads {directory.journal}: end it, then start again")


def _set_log_aside(vault: Vault, what: str, accept_loss: bool) -> None:
    """The write-ahead log lost acknowledged commits: refuse to start, or keep it in quarantine and go on."""
    log = vault.journal.log
    if not accept_loss:
        raise StartError(
            f"{log} is damaged: {what}: acknowledged changes are lost; restore a backup, or start with "
            "--accept-loss to go on without them"
        )
    aside = vault.files.set_aside(log.name, log.read_bytes(), "damaged")
    vault.journal.end_leases()  # what a holder wrote may be lost, and the lease of the next one
    logger.error("%s is damaged: %s: it is in quarantine/%s", log, what, aside)

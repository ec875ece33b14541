"""The directory itself: STORE (which format, whose, how it was left) and LOCK (who owns it now).

STORE is replaced as a whole, flushed and renamed. LOCK is held with flock for as long as the daemon lives; it
names the owner's process and addresses, so that a second daemon can say whom it met, and the SDK can find the
daemon of a directory.
"""

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from zlib import crc32

from sessionstored.engine import StartError
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.files import FULL

FORMAT = 1
REVISIONS_RESERVED = 1_000_000
_RESTORING = "RESTORING"
_BACKUP_FOLDER = re.compile(r"\.backup-[0-9a-f]{32}")


class NewerFormatError(StartError):
    """STORE says that this version is too old to read the directory."""


@dataclass(frozen=True, slots=True)
class StoreFile:
    """What STORE says."""

    store_id: str
    clean: bool = False
    """Whether the last daemon stopped with everything in the session files."""
    revision_ceiling: int = 0
    """No revision above this was ever given out."""
    format: int = FORMAT
    oldest_reader: int = FORMAT
    """The oldest format version whose readers understand this directory."""
    durability: str = "fsync"
    """What an acknowledgement of the last daemon survived: "fsync" or "os"."""

    def encoded(self) -> bytes:
        """The file's bytes: one JSON object, with a CRC-32 of its other members."""
        members = asdict(self)
        return json.dumps(members | {"crc": _crc(members)}).encode() + b"\n"


class Directory:
    """An owned data directory."""

    def __init__(self, path: Path, disk: Disk) -> None:
        """Create what is missing, durably, and take the lock.

        Args:
            path: the directory.
            disk: what writes STORE.

        Raises:
            StartError: it cannot be written, another daemon owns it, or its sessions' directory is gone.

        """
        self.path, self._disk = path, disk
        self.sessions = path / "sessions"
        self.quarantine = path / "quarantine"
        self.journal = path / "journal.db"
        self.restoring = path / _RESTORING
        """There while a restore is under way: what is here is no store yet."""
        check_sessions(path)
        try:
            for folder in (path, self.sessions, self.quarantine):
                _make(folder, disk)
            self._lock = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(
                f"cannot use the data directory {path}: {error.strerror}: make it writable for this user, "
                "or name another with --data"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owned = _owned(path, self._lock)
            os.close(self._lock)
            raise owned from error
        try:
            self.announce([])
        except StartError:
            os.close(self._lock)
            raise

    def announce(self, addresses: Sequence[str]) -> None:
        """Write the owner's process id and addresses into LOCK.

        Raises:
            StartError: it cannot be written, as on a full disk.

        """
        text = json.dumps({"pid": os.getpid(), "addresses": list(addresses)}).encode() + b"\n"
        try:
            os.pwrite(self._lock, text, 0)  # over what is there: a full disk may have no other room
            os.ftruncate(self._lock, len(text))
        except OSError as error:
            if error.errno in FULL:
                raise full(self.path) from error
            raise StartError(f"cannot write {self.path / 'LOCK'}: {error.strerror}") from error

    def read_store(self) -> StoreFile | None:
        """What STORE says, as `read_store` reads it."""
        return read_store(self.path)

    def write_store(self, store: StoreFile) -> None:
        """Replace STORE, durably."""
        temporary = self.path / ".STORE.tmp"
        fd = self._disk.create(temporary)
        try:
            self._disk.write_all(fd, store.encoded())
            self._disk.flush(fd)
        finally:
            os.close(fd)
        self._disk.rename(temporary, self.path / "STORE")
        self._disk.flush_directory(self.path)

    def make_backup_folder(self) -> Path:
        """A new folder for what a backup under way needs."""
        folder = self.path / f".backup-{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        return folder

    def remove_backup_folders(self) -> None:
        """Remove what backups needed that ended with their daemon."""
        for name in os.listdir(self.path):
            if _BACKUP_FOLDER.fullmatch(name):
                shutil.rmtree(self.path / name)

    def close(self) -> None:
        """Release the lock. LOCK stays, empty: two daemons could lock two files of that name."""
        os.ftruncate(self._lock, 0)
        os.close(self._lock)


def full(path: Path) -> StartError:
    """What to tell the operator of a disk that has no room for a start."""
    return StartError(f"the disk of {path} is full: make room, then start again")


def _make(folder: Path, disk: Disk) -> None:
    """Make a directory, and those above it, and flush the names of those that are new."""
    if folder.is_dir():
        return
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in reversed(missing):
        disk.flush_directory(each.parent)


def check_sessions(path: Path) -> None:
    """Make sure that a store still has its session files' directory.

    Raises:
        StartError: it has not. Every session would seem to have lost its file.

    """
    if (path / "STORE").exists() and not os.path.lexists(path / "sessions"):
        raise StartError(
            f"{path / 'sessions'} is missing, and {path} is a store: if it is a file system of its own, "
            "mount it; else put it back from a backup, or make an empty one to go on without its files"
        )


@contextmanager
def kept_unowned(path: Path) -> Iterator[None]:
    """Keep every daemon away from a directory, without changing anything in it.

    Raises:
        StartError: a daemon owns it, LOCK cannot be read, or a restore into it did not finish.

    """
    try:
        lock = os.open(path / "LOCK", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # no daemon was ever here
        refuse_unfinished(path)
        yield
        return
    except OSError as error:
        raise StartError(f"cannot read {path / 'LOCK'}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _owned(path, lock) from error
        refuse_unfinished(path)
        yield
    finally:
        os.close(lock)


def refuse_unfinished(path: Path) -> None:
    """What a restore began and did not finish is no store. Raises StartError."""
    if (path / _RESTORING).exists():
        raise StartError(
            f"a restore into {path} did not finish ({_RESTORING} is there): empty the directory and "
            "restore again"
        )


def read_store(path: Path) -> StoreFile | None:
    """What the STORE of a data directory says; None if there is none.

    Raises:
        NewerFormatError: it is of a newer format.
        StartError: it is unreadable.

    """
    file = path / "STORE"
    try:
        found = json.loads(file.read_bytes())
        if found["oldest_reader"] > FORMAT:
            raise NewerFormatError(
                f"{file} says format {found['format']}, for readers of format {found['oldest_reader']} "
                f"or newer, and this version reads format {FORMAT}: use a newer sessionstored"
            )
        if found.pop("crc") != _crc(found):
            raise ValueError("its checksum is wrong")
        return StoreFile(**{each.name: found[each.name] for each in fields(StoreFile)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(
            f"{file} cannot be read ({error!r}): move it away, and the next start makes it anew from "
            "journal.db"
        ) from error


def new_store() -> StoreFile:
    """A new store's STORE."""
    return StoreFile(store_id=str(uuid.uuid4()))


def with_ceiling(store: StoreFile, revision: int) -> StoreFile:
    """The store with revisions reserved beyond `revision`."""
    return replace(store, revision_ceiling=revision + REVISIONS_RESERVED)


def _crc(members: dict[str, object]) -> int:
    return crc32(json.dumps(members, sort_keys=True).encode())


def _owned(path: Path, lock: int) -> StartError:
    owner = os.pread(lock, 65536, 0).decode(errors="replace")
    return StartError(
        f"{path} is owned by another daemon ({_describe(owner)}): use that one, stop it, "
        "or name another directory with --data"
    )


def _describe(owner: str) -> str:
    try:
        found = json.loads(owner)
        addresses = ", ".join(found["addresses"]) or "not listening yet"
        return f"process {found['pid']}, {addresses}"
    except (ValueError, KeyError, TypeError):
        return "which is just starting, or a check"

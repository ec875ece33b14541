"""A backup becomes a store again: in an empty directory, under a new store id.

The backup is compared with its manifest, whole, before anything is written, and again while it is copied. A
directory that is being restored says so (RESTORING), and no daemon opens it; STORE comes last. What is made
is what a crash at the backup's moment would have left, so the daemon that opens it recovers it as it does
then.

Two things differ. The store id is new: the store that was backed up may still live, and what clients keep of
one is nothing to the other. And revisions go on far above the backup's, because those in between were given
out for changes that this store does not have: no old `expected_revision` may fit by chance.

Knows files and the journal; nothing of how a backup is made. The writer of the manifest is
`sessionstore.cli.backing_up`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from sessionstored.engine import StartError
from sessionstored.engine.jsonl import pages
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.journal import FormatError, Journal
from sessionstored.engine.jsonl.snapshot import JournalCopy
from sessionstored.engine.jsonl.store import FORMAT, Directory, new_store, with_ceiling
from sessionstored.engine.jsonl.tables import WrongRow

MANIFEST = "MANIFEST.json"
MANIFEST_FORMAT = 1
REVISIONS_SKIPPED = 1_000_000_000_000
"""More than any store gives out between its backup and its loss."""
_FOLDERS = ("sessions", "quarantine")
_PATH = re.compile(rf"journal\.db|(?:{'|'.join(_FOLDERS)})/(?!\.{{1,2}}$)[^/\0]+", re.DOTALL)
_CHUNK_BYTES = 1 << 20
_FLUSHED_AT_ONCE = 8
_NAMED_MAX = 10


class RestoreError(Exception):
    """Nothing that could be taken for a store was made. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A file of a backup."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says of itself."""

    store_id: str
    taken: str
    revision: int
    session_count: int
    damaged: Sequence[dict[str, str]]
    """key, path and detail of what was damaged in the store already."""
    files: Sequence[ManifestFile]

    @property
    def byte_count(self) -> int:
        """The size of all files."""
        return sum(file.size for file in self.files)


def read_manifest(backup: Path) -> Manifest:
    """What a backup says of itself. Raises RestoreError."""
    path = backup / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        digest = found.pop("digest")
        version, store_format = found["format"], found["store_format"]
        if version > MANIFEST_FORMAT or store_format > FORMAT:
            raise RestoreError(
                f"{path} is of format {version}, of a store of format {store_format}, and this version reads "
                f"{MANIFEST_FORMAT} and {FORMAT}: use a newer sessionstored"
            )
        if digest != _digest_of(found):
            raise RestoreError(f"{path} is damaged: its digest is wrong; use another backup")
        files = [ManifestFile(file["path"], file["size"], file["digest"]) for file in found["files"]]
        strange = next((file.path for file in files if not _PATH.fullmatch(file.path)), None)
        if strange is not None:
            raise RestoreError(f"{path} names a file that no backup has: {strange!r}")
        return Manifest(
            found["store_id"],
            found["taken"],
            found["revision"],
            found["session_count"],
            found["damaged"],
            files,
        )
    except FileNotFoundError as error:
        raise RestoreError(
            f"{path} is missing: {backup} is no backup, or one that was interrupted; use another"
        ) from error
    except OSError as error:
        raise RestoreError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RestoreError(f"{path} is damaged ({error!r}); use another backup") from error


def verify(backup: Path, manifest: Manifest, progress: Callable[[int], object]) -> None:
    """Compare every file with the manifest. Raises RestoreError, naming those that are not as it says."""
    wrong = []
    for file in manifest.files:
        try:
            for data in _checked(backup, file):
                progress(len(data))
        except RestoreError as error:
            wrong.append(str(error))
    if wrong:
        more = f"\nand {len(wrong) - _NAMED_MAX} more" if len(wrong) > _NAMED_MAX else ""
        raise RestoreError(
            "the backup is damaged, nothing was restored; use another:\n"
            + "\n".join(wrong[:_NAMED_MAX])
            + more
        )


def restore(backup: Path, data: Path, manifest: Manifest, progress: Callable[[int], object]) -> str:
    """Make a store of a verified backup.

    Args:
        backup: its directory.
        data: the data directory to be: empty, or not there yet.
        manifest: what the backup says of itself.
        progress: called with each number of bytes that are copied.

    Returns:
        The new store's id.

    Raises:
        RestoreError: it cannot be; what was written so far is not taken for a store.

    """
    _refuse_occupied(data)
    try:
        directory = Directory(data, Disk())
    except StartError as error:
        raise RestoreError(str(error)) from error
    try:
        _write_marker(directory, manifest)
        with suppress(PermissionError):  # what may not be read cannot be flushed
            _flush_directory(directory.path.absolute().parent)
        found = _copy_files(backup, directory, manifest, progress)
        store = new_store()
        revision = _finish_journal(directory, manifest, store.store_id, found)
        directory.write_store(with_ceiling(store, revision))
        directory.restoring.unlink()
        _flush_directory(directory.path)
        return store.store_id
    except (apsw.Error, OSError, RestoreError, WrongRow) as error:
        what = f"journal.db is damaged: {error}" if isinstance(error, WrongRow) else str(error)
        what = pages.describe(error) if isinstance(error, apsw.Error) else what
        raise RestoreError(f"{what}; what is in {data} is no store: empty it before you try again") from error
    finally:
        directory.close()


def _refuse_occupied(data: Path) -> None:
    """Nothing is ever overwritten."""
    try:
        names = sorted(os.listdir(data))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RestoreError(f"{data} cannot be used: {error.strerror}") from error
    if "RESTORING" in names:
        raise RestoreError(f"an earlier restore into {data} did not finish: empty it first")
    if names:
        raise RestoreError(f"{data} is not empty ({names[0]} is there): name a directory that is")


def _write_marker(directory: Directory, manifest: Manifest) -> None:
    """From now on, and until STORE is there, this is no store."""
    fd = os.open(directory.restoring, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"the backup of store {manifest.store_id} of {manifest.taken}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    _flush_directory(directory.path)


def _copy_files(
    backup: Path, directory: Directory, manifest: Manifest, progress: Callable[[int], object]
) -> list[tuple[str, int, int, int]]:
    """Copy every file, durably; returns the fingerprints (name, size, inode, mtime_ns) of session files."""
    found = []

    def copy(file: ManifestFile) -> os.stat_result:
        fd = os.open(
            directory.path / file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        with open(fd, "wb", buffering=0) as target:
            for data in _checked(backup, file):
                view = memoryview(data)
                while view:
                    view = view[target.write(view) or 0 :]
            os.fsync(fd)
            return os.fstat(fd)

    with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:
        for file, stat in zip(manifest.files, pool.map(copy, manifest.files), strict=True):
            progress(file.size)
            folder, _, name = file.path.rpartition("/")
            if folder == "sessions":
                found.append((name, stat.st_size, stat.st_ino, stat.st_mtime_ns))
    for name in (*_FOLDERS, ""):
        _flush_directory(directory.path / name)
    return found


def _finish_journal(
    directory: Directory, manifest: Manifest, store_id: str, found: Sequence[tuple[str, int, int, int]]
) -> int:
    """Make the journal the new store's: its id, its files. Returns the revision that it goes on from."""
    journal = _open_journal(directory.journal)
    try:
        known = journal.meta()
        if known.get("store_id") != manifest.store_id:
            raise RestoreError(f"journal.db belongs to store {known.get('store_id')}, not to this backup")
        revision = max(int(str(known.get("revision", 0))), manifest.revision, journal.last_revision())
        revision += REVISIONS_SKIPPED
        journal.put_fingerprints(found)
        journal.put_meta(store_id=store_id, revision=revision)
        journal.end_leases()  # what holders have read since is not what is here
        if not journal.wal_checkpoint():
            raise RestoreError(f"another process reads {directory.journal}")
    finally:
        journal.close()
    return revision


def _open_journal(path: Path) -> Journal:
    """The journal, found to be sound."""
    try:
        pages.register()
        catalogue = JournalCopy(path)
        try:
            defect = catalogue.defect()
        finally:
            catalogue.close()
        if defect:
            raise RestoreError(f"journal.db is damaged: {defect}")
        return Journal(path, "fsync")
    except (FormatError, pages.ChecksumsMissingError) as error:
        raise RestoreError(str(error)) from error


def _checked(backup: Path, file: ManifestFile) -> Iterator[bytes]:
    """A file's bytes. Raises RestoreError, in the end at the latest, if they are not what they were."""
    digest, size = hashlib.sha256(), 0
    try:
        fd = os.open(backup / file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as source:
            while data := source.read(_CHUNK_BYTES):
                digest.update(data)
                size += len(data)
                yield data
    except OSError as error:
        raise RestoreError(f"{file.path}: {error.strerror}") from error
    if size != file.size:
        raise RestoreError(f"{file.path}: it has {size} bytes, and had {file.size}")
    if digest.hexdigest() != file.digest:
        raise RestoreError(f"{file.path}: it is not what it was (its digest is wrong)")


def _digest_of(members: dict[str, Any]) -> str:
    plain = json.dumps(members, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _flush_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

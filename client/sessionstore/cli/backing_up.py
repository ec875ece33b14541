"""A backup of a whole store, written into a directory as it comes from the daemon, with a manifest at last.

The rules:

* A directory without a manifest is no backup. The manifest is written last, when everything else is compared
  with its digest, and flushed with its name.
* Nothing is written outside the directory, and nothing twice, whatever a daemon sends.
* What is damaged in the store is in the backup as it is, and named in the manifest.

`sessionstored restore` reads what this writes. This module must not know of the terminal.
"""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any

from sessionstore.v1 import session_store_pb2 as pb

MANIFEST = "MANIFEST.json"
FORMAT = 1
"""The version of the manifest."""
JOURNAL = "journal.db"
FOLDERS = ("sessions", "quarantine")
_PATH = re.compile(rf"{re.escape(JOURNAL)}|(?:{'|'.join(FOLDERS)})/(?!\.{{1,2}}$)[^/\0]+", re.DOTALL)
_FLUSHED_AT_ONCE = 8
_FLUSHES_PENDING_MAX = 64


class NotWholeError(Exception):
    """What came is not a whole backup, or not one that may be written."""


@dataclass(slots=True)
class _Open:
    """The file that is being written."""

    path: str
    fd: int
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that is whole."""

    session_count: int
    file_count: int
    byte_count: int
    revision: int
    taken: str
    """ISO 8601, UTC: the moment that it shows."""
    damaged: list[dict[str, str]]
    """key, path and detail of what is damaged in the store itself."""


def prepare(directory: Path) -> None:
    """Make the directory of a backup, which must be new or empty. Raises OSError."""
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(0, "it is not empty: a backup needs a directory of its own", str(directory))
    for name in FOLDERS:
        (directory / name).mkdir(mode=0o700)
    for each in made or [directory]:
        with suppress(PermissionError):  # what may not be read cannot be flushed
            _flush_directory(each.absolute().parent)


def receive(
    replies: Iterable[pb.BackupResponse], directory: Path, progress: Callable[[int, int], None]
) -> Backup:
    """Write a backup into a prepared directory.

    Args:
        replies: the daemon's replies, in order.
        directory: where to.
        progress: called with (bytes so far, bytes in all).

    Raises:
        NotWholeError: the daemon's replies are no whole backup.
        OSError: it cannot be written.

    """
    with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:
        receiver = _Receiver(directory, pool)
        try:
            for reply in replies:
                receiver.take(reply)
                progress(receiver.bytes, receiver.bytes_total)
            return receiver.finish()
        finally:
            receiver.close()


class _Receiver:
    """Takes replies, one after the other."""

    def __init__(self, directory: Path, pool: ThreadPoolExecutor) -> None:
        self._directory, self._pool = directory, pool
        self._header: pb.BackupHeader | None = None
        self._summary: pb.BackupSummary | None = None
        self._open: _Open | None = None
        self._files: dict[str, dict[str, object]] = {}
        self._damaged: list[dict[str, str]] = []
        self._flushes: deque[Future[None]] = deque()
        self.bytes = 0

    @property
    def bytes_total(self) -> int:
        """How many bytes are to come, those that came included."""
        return self._header.bytes_total if self._header else 0

    def take(self, reply: pb.BackupResponse) -> None:
        """Write what a reply brings."""
        if (self._header is None) != reply.HasField("header") or self._summary is not None:
            raise NotWholeError("the daemon's replies are out of order")
        if reply.HasField("header"):
            self._header = reply.header
        for part in reply.parts:
            self._write(part)
        self._damaged += [{"key": d.key, "path": d.path, "detail": d.detail} for d in reply.damages]
        if reply.HasField("summary"):
            self._summary = reply.summary

    def _write(self, part: pb.BackupPart) -> None:
        file = self._open
        if file is None:
            file = self._begin(part.path)
        if (part.path, part.offset) != (file.path, file.size):
            raise NotWholeError(f"the parts of {file.path!r} are out of order")
        view = memoryview(part.data)
        while view:
            view = view[os.write(file.fd, view) :]
        file.digest.update(part.data)
        file.size += len(part.data)
        self.bytes += len(part.data)
        if part.HasField("end"):
            self._end(file, part.end)

    def _begin(self, path: str) -> _Open:
        """Make a file. Its path is one that a backup has, so it lies in the directory."""
        if not _PATH.fullmatch(path) or path in self._files:
            raise NotWholeError(f"the daemon sent a file that no backup has: {path!r}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._open = _Open(path, os.open(self._directory / path, flags, 0o600))
        return self._open

    def _end(self, file: _Open, end: pb.BackupFile) -> None:
        if (file.size, file.digest.hexdigest()) != (end.size, end.digest):
            raise NotWholeError(f"{file.path!r} is not what the daemon sent: its digest is wrong")
        self._files[file.path] = {"path": file.path, "size": end.size, "digest": end.digest}
        self._open = None
        self._flushes.append(self._pool.submit(_flush_and_close, file.fd))
        if len(self._flushes) > _FLUSHES_PENDING_MAX:
            self._flushes.popleft().result()

    def finish(self) -> Backup:
        """See that everything came, make it durable, and write the manifest."""
        header, summary = self._header, self._summary
        if header is None or summary is None or self._open is not None or JOURNAL not in self._files:
            raise NotWholeError("the daemon ended the backup early")
        if (summary.file_count, summary.byte_count) != (len(self._files), self.bytes):
            raise NotWholeError("the daemon counted other files than came")
        for flush in self._flushes:
            flush.result()
        for name in (*FOLDERS, ""):
            _flush_directory(self._directory / name)
        taken = header.take_time.ToDatetime(tzinfo=UTC).isoformat()
        members: dict[str, object] = {
            "format": FORMAT,
            "store_format": header.format,
            "store_id": header.store_id,
            "taken": taken,
            "revision": header.revision,
            "session_count": header.session_count,
            "damaged": self._damaged,
            "files": list(self._files.values()),
        }
        write_manifest(self._directory, members)
        return Backup(
            header.session_count, len(self._files), self.bytes, header.revision, taken, self._damaged
        )

    def close(self) -> None:
        """Let go of a file that is not whole."""
        if self._open is not None:
            os.close(self._open.fd)


def write_manifest(directory: Path, members: dict[str, object]) -> None:
    """Write the manifest: there whole, or not at all, and only once everything else is durable."""
    temporary = directory / f".{MANIFEST}.tmp"
    text = json.dumps(members | {"digest": digest_of(members)}, ensure_ascii=False, indent=1) + "\n"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    temporary.rename(directory / MANIFEST)
    _flush_directory(directory)


def digest_of(members: dict[str, object]) -> str:
    """The digest of a manifest's other members."""
    plain = json.dumps(members, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _flush_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _flush_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""One session against its catalogue row, its file and what the journal has for it: which verdict it gets.

Reads; changes nothing. What recovery and adoption would do with the file decides the verdict.
"""

import os
from dataclasses import replace
from pathlib import Path

from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.catalogue import ROW_LOST, Entry
from sessionstored.engine.jsonl.examining import Examined, Unreadable, examine, opened
from sessionstored.engine.jsonl.findings import Finding, Remedy, Summary, Verdict
from sessionstored.engine.jsonl.names import short_name, temporary_name
from sessionstored.engine.jsonl.text import adopted_head, is_header
from sessionstored.engine.jsonl.waiting import Waiting, WaitingChanges


class Inspector:
    """Gives verdicts on the sessions of one directory."""

    def __init__(
        self,
        data: Path,
        waiting: WaitingChanges,
        temporaries: set[str],
        renamed: set[str],
        summary: Summary,
    ) -> None:
        self._sessions, self._quarantine = data / "sessions", data / "quarantine"
        self._waiting, self._temporaries, self._renamed = waiting, temporaries, renamed
        self._summary = summary

    def session(self, entry: Entry) -> Finding | None:
        """The verdict on a catalogued session; None if there is nothing to say."""
        waiting = self._waiting.touched(entry.head.key)
        if waiting is not None:
            return self.touched(entry.head.key, waiting, entry)
        try:
            return self._untouched(entry)
        except FileNotFoundError:
            if entry.head.key in self._renamed:
                return None
            detail = f"the file is missing{pending_text(self._quarantine, entry.file)}"
            return self._not_served(entry, detail, Remedy.REMOVE)
        except Unreadable as error:
            return self._not_served(entry, str(error), Remedy.HAND)

    def _path(self, name: str, generation: int) -> Path:
        """A file, or what the next start gives its name to."""
        unfinished = temporary_name(name, generation)
        return self._sessions / (unfinished if unfinished in self._temporaries else name)

    def _not_served(
        self, entry: Entry, detail: str, remedy: Remedy, found: Examined | None = None, line: int = 0
    ) -> Finding:
        self._summary.not_served += 1
        return _finding(Verdict.DAMAGED, entry, detail, remedy, found, line)

    # Without changes in the journal.

    def _untouched(self, entry: Entry) -> Finding:
        path = self._path(entry.file, entry.generation)
        stat = os.lstat(path)
        same = (stat.st_size, stat.st_ino, stat.st_mtime_ns) == (entry.size, entry.inode, entry.mtime_ns)
        if not same:
            return self._edited(entry, path, stat.st_size)
        found = examine(path, entry.blocks, length=entry.blocks.length)
        self._summary.bytes_read += found.size
        return self._known(entry, found)

    def _known(self, entry: Entry, found: Examined) -> Finding:
        """The verdict on a file that nobody edited."""
        head = entry.head
        if entry.bad_line < 0:
            path = self._sessions / entry.file
            rotten = rotted(entry, self._sessions, self._quarantine)
            detail = f"{head.damage}{pending_text(self._quarantine, entry.file)}"
            remedy = Remedy.MEND if rotten else Remedy.TAKE
            return self._not_served(entry, detail, remedy, examine(path, entry.blocks if rotten else None))
        if entry.bad_line:
            detail = f"line {entry.bad_line} cannot be read"
            return self._not_served(entry, detail, Remedy.MEND, found, entry.bad_line)
        if found.wrong:
            ranges = ", ".join(f"{begin} to {end}" for begin, end in found.wrong)
            detail = f"bytes {ranges} do not match their checksum"
            return _finding(Verdict.DAMAGED, entry, detail, Remedy.MEND, found)
        contradiction = _contradiction(entry, found)
        if contradiction:
            return _finding(Verdict.DAMAGED, entry, contradiction, Remedy.MEND, found)
        if head.damage:
            return _finding(Verdict.MARKED, entry, head.damage, Remedy.CLEAR, found)
        return _finding(Verdict.OK, entry, "", Remedy.NONE, found)

    def _edited(self, entry: Entry, path: Path, size: int) -> Finding:
        """The verdict on a clean file whose fingerprint is another."""
        if size == entry.size and not entry.bad_line:
            found = examine(path, entry.blocks, length=entry.blocks.length)
            if not found.wrong:
                self._summary.bytes_read += found.size
                known = self._known(entry, found)
                detail = "only its inode or its time is another: its bytes are what they were"
                return replace(known, verdict=Verdict.EDITED, detail=detail) if not known.detail else known
        found = examine(path)
        self._summary.bytes_read += found.size
        head = entry.head
        own = found.scan.header.get("key") if found.scan.header else None
        if isinstance(own, str) and own != head.key:
            detail = f"edited: its header says that it belongs to session {own!r}"
            return self._not_served(entry, detail, Remedy.HAND, found)
        trouble = beyond_adoption(f"sessions/{entry.file}", head.key, found)
        if trouble is not None:
            self._summary.not_served += bool(trouble.line)
            return replace(trouble, detail=f"edited: {trouble.detail}")
        cut = found.size < entry.size and found.mtime_ns == entry.mtime_ns
        if (found.kept < head.message_count or cut) and not entry.bad_line:
            detail = f"edited: it holds {found.kept} messages, and held {head.message_count}"
            if found.kept >= head.message_count:
                detail = f"it lost its last {entry.size - found.size} bytes, and was not edited"
            if found.size == 0:
                return self._not_served(entry, detail, Remedy.TAKE, found)
            return _finding(Verdict.DAMAGED, entry, detail, Remedy.OPEN, found)
        return _finding(Verdict.EDITED, entry, "it is adopted anew", Remedy.NONE, found)

    # With changes in the journal.

    def touched(self, key: str, waiting: Waiting, entry: Entry | None) -> Finding | None:
        """The verdict on a session that the journal changes beyond its catalogue row, if it has one."""
        name = waiting.file or (entry.file if entry is not None else "")
        file = f"sessions/{name}" if name else "journal.db"
        if entry is not None and entry.bad_line == ROW_LOST and not waiting.anew:
            remedy = Remedy.TAKE if (self._sessions / name).exists() else Remedy.REMOVE
            return self._condemned(key, file, entry.head.damage, remedy)
        if waiting.broken:
            detail = f"{waiting.broken}: what the journal has of it goes to quarantine"
            self._summary.not_served += entry is not None
            remedy = Remedy.TAKE if entry is not None else Remedy.OPEN
            return Finding(Verdict.DAMAGED, file, key, detail, remedy)
        if waiting.head is None:
            return Finding(Verdict.WAITING, file, key, "it is deleted") if entry is not None else None
        blocks = Blocks() if waiting.anew or entry is None else entry.blocks
        path = self._path(name, entry.generation if entry is not None else 0)
        try:
            found = self._prefix(path, blocks)
        except FileNotFoundError:
            if not blocks.length:
                return self._waits(key, file, waiting)
            return self._condemned(key, file, "the file is missing", Remedy.REMOVE)
        except Unreadable as error:
            return self._condemned(key, file, str(error), Remedy.HAND)
        if entry is not None and entry.bad_line and not waiting.anew:
            return self._condemned(key, file, entry.head.damage, Remedy.TAKE, examine(path))
        if found.size < blocks.length:
            detail = "the file is shorter than it was when changes began to wait"
            return self._condemned(key, file, detail, Remedy.TAKE, examine(path))
        ours = self._waiting.ours.wrote(key, name, self._beyond(path, blocks.length))
        if found.wrong:
            detail = "changes wait, and the file before them is not what it was: edited, or damaged"
            remedy = Remedy.MEND if ours else Remedy.TAKE
            return self._condemned(key, file, detail, remedy, examine(path, blocks if ours else None))
        if not ours:
            detail = "it ends with bytes that the journal does not have"
            return Finding(Verdict.DAMAGED, file, key, detail, Remedy.OPEN, kept=waiting.head.message_count)
        return self._waits(key, file, waiting)

    def _prefix(self, path: Path, blocks: Blocks) -> Examined:
        found = examine(path, blocks, length=blocks.length)
        self._summary.bytes_read += found.size
        return found

    @staticmethod
    def _beyond(path: Path, offset: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()

    def _waits(self, key: str, file: str, waiting: Waiting) -> Finding:
        assert waiting.head is not None
        detail = f"{waiting.changes} change{'s' if waiting.changes > 1 else ''} in the journal"
        if waiting.head.damage:
            detail = f"{waiting.head.damage}; {detail}"
            return Finding(Verdict.MARKED, file, key, detail, Remedy.CLEAR, kept=waiting.head.message_count)
        return Finding(Verdict.WAITING, file, key, detail, kept=waiting.head.message_count)

    def _condemned(
        self, key: str, file: str, detail: str, remedy: Remedy, found: Examined | None = None
    ) -> Finding:
        """A session whose changes go to quarantine at the next start."""
        self._summary.not_served += 1
        lost = f"{detail}; what waits for it goes to quarantine"
        counts = (found.kept, found.suspect, found.lost) if found is not None else (0, 0, 0)
        return Finding(Verdict.DAMAGED, file, key, lost, remedy, 0, *counts)


def beyond_adoption(file: str, key: str, found: Examined) -> Finding | None:
    """What keeps a file that is read whole from being adopted as it is; None if nothing does."""
    bad, torn = found.scan.bad_line, len(found.scan.torn)
    if not bad and not torn:
        return None
    detail = f"line {bad} cannot be read" if bad else f"the last line is torn: {torn} bytes cannot be read"
    return Finding(
        Verdict.DAMAGED, file, key, detail, Remedy.MEND, bad, found.kept, found.suspect, found.lost
    )


def _finding(
    verdict: Verdict, entry: Entry, detail: str, remedy: Remedy, found: Examined | None, line: int = 0
) -> Finding:
    counts = (found.kept, found.suspect, found.lost) if found is not None else (0, 0, 0)
    return Finding(verdict, f"sessions/{entry.file}", entry.head.key, detail, remedy, line, *counts)


def _contradiction(entry: Entry, found: Examined) -> str:
    """Where a file whose checksums are right does not say what its catalogue row says."""
    head = entry.head
    if found.lost or found.scan.message_count != head.message_count:
        return f"it holds {found.scan.message_count} messages, and the catalogue says {head.message_count}"
    said, _ = adopted_head(found.scan, head.key, head.revision, 0, "", head.expire_time_us)
    own = found.scan.header.get("key") if found.scan.header else head.key
    if isinstance(own, str) and own != head.key:
        return f"its header says that it belongs to session {own!r}"
    if (said.metadata, said.last_consolidated, said.expire_time_us) != (
        head.metadata,
        head.last_consolidated,
        head.expire_time_us,
    ):
        return "its last header does not say what the catalogue says"
    return ""


def rotted(entry: Entry, sessions: Path, quarantine: Path) -> bool:
    """Whether a condemned session's file may still be ours, byte by byte where its checksums are right.

    It is if it has the length that it should have, and ends with what waited for it. Another one was edited:
    its checksums tell nothing.

    Raises:
        FileNotFoundError, Unreadable: as `opened`.

    """
    if entry.bad_line == ROW_LOST:
        return False  # nobody knows what it should be
    with opened(sessions / entry.file) as (file, stat):
        size = stat.st_size
        file.seek(min(size, entry.blocks.length))
        beyond = file.read()
    waited = {line for name in _pending(quarantine, entry.file) for line in _lines(quarantine / name)}
    *lines, rest = beyond.split(b"\n")
    known = all(not line or line in waited or is_header(line) for line in lines)
    return (
        size >= entry.blocks.length and known and (not rest or any(line.startswith(rest) for line in waited))
    )


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")


def _pending(quarantine: Path, name: str) -> list[str]:
    """The files with the changes that waited for a session file when it was condemned."""
    prefix = short_name(name) + "."
    names = os.listdir(quarantine) if quarantine.is_dir() else ()
    return sorted(each for each in names if each.startswith(prefix) and each.endswith(".pending"))


def pending_text(quarantine: Path, name: str) -> str:
    """Where the changes are that waited for a file, to be added to a sentence; empty if there are none."""
    kept = _pending(quarantine, name)
    return "; what waited for it is in " + ", ".join(f"quarantine/{each}" for each in kept) if kept else ""

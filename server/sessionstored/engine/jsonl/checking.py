"""A check of a directory that nobody serves: every session file against catalogue, checksums and journal.

It changes nothing in the directory. SQLite cannot read a database in WAL mode without writing beside it, so
the journal is copied into a temporary directory, and read there. Rows and files are read one after the other;
what is kept in memory is bounded by the journal's rows and by the files that nobody knows.

It says what the daemon would make of everything; the daemon's own rules are in `recovery` and `adoption`. The
caller keeps daemons away.
"""

import os
import shutil
from collections.abc import Generator, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import apsw

from sessionstored.engine import StartError
from sessionstored.engine.jsonl import pages
from sessionstored.engine.jsonl.adoption import Unadoptable, claimed_key
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.examining import Unreadable, examine
from sessionstored.engine.jsonl.files import FULL
from sessionstored.engine.jsonl.findings import Finding, Remedy, Summary, Verdict
from sessionstored.engine.jsonl.inspecting import Inspector, beyond_adoption
from sessionstored.engine.jsonl.journal import FormatError, Journal
from sessionstored.engine.jsonl.lost_rows import nobody, stand_in
from sessionstored.engine.jsonl.names import SUFFIX, is_temporary_name, is_text
from sessionstored.engine.jsonl.ours import known_length
from sessionstored.engine.jsonl.records import DamagedRow, read_row
from sessionstored.engine.jsonl.store import NewerFormatError, StoreFile, check_sessions, read_store
from sessionstored.engine.jsonl.tables import WrongRow
from sessionstored.engine.jsonl.waiting import WaitingChanges


class Check:
    """One check of one directory."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._sessions, self._quarantine = data / "sessions", data / "quarantine"
        self.summary = Summary()
        """Complete once the findings are through."""
        self.sessions_total = 0
        """How many sessions the catalogue has; known once the first session is through."""
        self._names: list[str] = []
        self._temporaries: set[str] = set()
        self._claimed: set[str] = set()
        self._renamed: set[str] = set()
        self._lost: dict[str, Entry] = {}
        """Key -> what stands in for its catalogue row, which is not what was written."""

    def findings(self) -> Iterator[Finding]:
        """Everything, one after the other.

        Raises:
            StartError: the directory is no store, is of a newer format, or cannot be read.

        """
        try:
            with TemporaryDirectory(prefix="sessionstored-check-") as folder:
                for finding in self._all(Path(folder)):
                    self.summary.verdicts[finding.verdict] += 1
                    self.summary.messages += finding.kept + finding.suspect
                    yield finding
        except apsw.Error as error:
            if not pages.no_room(error):
                raise
            raise self._no_room() from error
        except OSError as error:
            if error.errno in FULL:
                raise self._no_room() from error
            raise StartError(f"{self._data} cannot be checked: {error}") from error

    def _no_room(self) -> StartError:
        """Only the copy of the journal is written: this says nothing of the directory."""
        return StartError(
            f"{self._data} cannot be checked: the temporary directory {gettempdir()} has no room for a copy "
            "of the journal: make some, or name another in TMPDIR"
        )

    def _all(self, folder: Path) -> Iterator[Finding]:
        if not any((self._data / name).exists() for name in ("STORE", "journal.db", "sessions")):
            raise StartError(
                f"{self._data} is no store and no workspace: it has no STORE, no journal.db and no sessions"
            )
        check_sessions(self._data)
        self._look_around()
        store = yield from self._store()
        journal = yield from self._journal(folder, store)
        if journal is None:
            yield from self._plain()
            return
        try:
            yield from self._identity(journal, store)
            yield from self._against(journal)
        except apsw.Error as error:
            yield _unreadable(error)
        except WrongRow as wrong:
            yield _journal_damage(str(wrong), Remedy.AWAY)
        finally:
            journal.close()

    def _look_around(self) -> None:
        """Names and sizes: what there is besides sessions."""
        summary = self.summary
        if self._sessions.is_dir():
            for entry in os.scandir(self._sessions):
                if not is_text(entry.name):
                    summary.left_alone += 1
                elif is_temporary_name(entry.name):
                    self._temporaries.add(entry.name)
                elif entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                    self._names.append(entry.name)
                else:
                    summary.left_alone += 1
        self._names.sort()
        summary.temporary_files = len(self._temporaries)
        if self._quarantine.is_dir():
            for entry in os.scandir(self._quarantine):
                summary.quarantine_files += 1
                summary.quarantine_bytes += entry.stat(follow_symlinks=False).st_size

    # The store itself.

    def _store(self) -> Generator[Finding, None, StoreFile | None]:
        try:
            store = read_store(self._data)
        except NewerFormatError:
            raise
        except StartError as error:
            yield Finding(Verdict.DAMAGED, "STORE", "", str(error), Remedy.AWAY)
            return None
        if store is not None:
            self.summary.store_id = store.store_id
        return store

    def _journal(self, folder: Path, store: StoreFile | None) -> Generator[Finding, None, Journal | None]:
        """A copy of the journal, if its catalogue can be believed."""
        path = self._data / "journal.db"
        if not path.exists() or not path.stat().st_size:
            if store is not None:
                lost = (
                    "" if store.clean else ", and the last daemon did not stop cleanly: changes may be lost"
                )
                yield _journal_damage(f"it is missing or empty{lost}")
            return None
        for name in ("journal.db", "journal.db-wal"):
            if (self._data / name).exists():
                shutil.copyfile(self._data / name, folder / name)
        try:
            journal = Journal(folder / "journal.db", "os")
        except FormatError as error:
            raise StartError(f"{str(error).replace(str(folder), str(self._data))}") from error
        except apsw.Error as error:
            yield _unreadable(error)
            return None
        wrong = _integrity(journal, store)
        yield from wrong
        if wrong:
            journal.close()
            return None
        return journal

    def _identity(self, journal: Journal, store: StoreFile | None) -> Iterator[Finding]:
        """Whether STORE and journal belong together."""
        known_id = journal.meta().get("store_id")
        if store is None and not (self._data / "STORE").exists():
            yield Finding(Verdict.DAMAGED, "STORE", "", "it is missing", Remedy.ANEW)
        elif store is not None and known_id is None:
            yield _journal_damage("it was emptied")
        elif store is not None and known_id != store.store_id:
            yield _journal_damage(
                f"it belongs to store {known_id}, and STORE says {store.store_id}", Remedy.AWAY
            )
        self.summary.store_id = self.summary.store_id or str(known_id or "")

    # Sessions.

    def _plain(self) -> Iterator[Finding]:
        """Every file, without a catalogue."""
        keys: dict[str, str] = {}
        for name in self._names:
            finding = self._unknown(name)
            if finding is not None:
                yield finding
                yield from self._claims(finding, keys.setdefault(finding.key, name), name)

    def _against(self, journal: Journal) -> Iterator[Finding]:
        """Every file and every session, against the catalogue and the journal's rows."""
        yield from self._wrong_rows(journal)
        waiting = WaitingChanges(journal, self._lost)
        yield from self._rows(journal, waiting)
        self.sessions_total = journal.catalogue.count()
        inspector = Inspector(self._data, waiting, self._temporaries, self._renamed, self.summary)
        yield from self._unknown_files(journal, waiting)
        for entry in chain(journal.catalogue.entries(skip_wrong=True), self._lost.values()):
            finding = inspector.session(entry)
            if finding is not None and not (finding.verdict is Verdict.OK and finding.key in self._claimed):
                yield finding
        for key, one in waiting.sessions.items():
            if one.changes and not one.known:
                finding = inspector.touched(key, one, None)
                if finding is not None:
                    yield finding

    def _wrong_rows(self, journal: Journal) -> Iterator[Finding]:
        """The rows beside the journal's own that are not what was written."""
        for row in journal.catalogue.files():
            if row.whole:
                continue
            entry = stand_in(journal.catalogue, row.rowid, self._sessions)
            if entry is None:
                yield _journal_damage(nobody(row.rowid), Remedy.AWAY)
            else:
                self._lost[entry.head.key] = entry
        for wrong in journal.answers.wrong_rows():
            yield Finding(Verdict.DAMAGED, "journal.db", "", str(wrong), Remedy.EXPIRE)
        for wrong in journal.leases()[1]:
            yield Finding(Verdict.DAMAGED, "journal.db", "", str(wrong), Remedy.END)

    def _rows(self, journal: Journal, waiting: WaitingChanges) -> Iterator[Finding]:
        """The journal's rows: each one's checksum and records."""
        passed = int(str(journal.meta().get("checkpoint_row", 0)))  # older ones are for watchers only
        for row_id, _, body, whole in journal.rows(passed):
            self.summary.journal_rows += 1
            try:
                if not whole:
                    raise DamagedRow("its checksum is wrong")
                for record in list(read_row(body)):
                    waiting.take(record)
            except ValueError as error:
                yield _journal_damage(f"row {row_id}: {error}")
        for one in waiting.sessions.values():
            self.summary.changes_waiting += one.changes
            self.summary.deletions_waiting += bool(one.changes and one.head is None and one.known)

    def _unknown_files(self, journal: Journal, waiting: WaitingChanges) -> Iterator[Finding]:
        """The files that no session has."""
        new = {one.file for one in waiting.sessions.values() if one.head is not None}
        keys: dict[str, str] = {}
        lost_files = {entry.file: key for key, entry in self._lost.items()}
        for name in self._names:
            owner = lost_files.get(name) or journal.catalogue.key_of_file(name)
            if name in new or (owner is not None and waiting.touched(owner) is None):
                continue
            if self._is_buried(name, waiting):
                continue
            finding = self._unknown(name)
            if finding is None:
                continue
            other = keys.get(finding.key) or self._owner(finding.key, name, journal, waiting)
            if finding.key in self._renamed:
                detail = "renamed by somebody; " + (finding.detail or "it is adopted anew")
                verdict = Verdict.EDITED if finding.verdict is Verdict.NEW else finding.verdict
                finding = Finding(
                    verdict, finding.file, finding.key, detail, finding.remedy, finding.line, finding.kept
                )
            keys.setdefault(finding.key, name)
            yield finding
            yield from self._claims(finding, other, name)

    def _is_buried(self, name: str, waiting: WaitingChanges) -> bool:
        """Whether a file is a deleted session's, and goes at the next start."""
        records = [record for record in waiting.ours.tombstones if record.file == name]
        if any(record.aside for record in records):
            return True
        return bool(records) and any(
            known_length(record, (self._sessions / name).read_bytes()) for record in records
        )

    def _owner(self, key: str, name: str, journal: Journal, waiting: WaitingChanges) -> str:
        """The file of the session that has this key already; notes when that was renamed to this one."""
        one = waiting.touched(key)
        if one is not None:
            return one.file if one.head is not None else ""
        entry = self._lost.get(key) or journal.catalogue.entry(key)
        if entry is None:
            return ""
        if not (self._sessions / entry.file).exists() and entry.bad_line >= 0:
            self._renamed.add(key)
            return ""
        return entry.file

    def _claims(self, finding: Finding, other: str, name: str) -> Iterator[Finding]:
        """What to say of two files that claim one key."""
        if other in ("", name):
            return
        self._claimed.add(finding.key)
        self.summary.not_served += 1
        detail = f"sessions/{other} and sessions/{name} claim this key: move one of them away"
        yield Finding(Verdict.DAMAGED, finding.file, finding.key, detail, Remedy.HAND)

    def _unknown(self, name: str) -> Finding | None:
        """What adoption would make of a file; None if it is left alone."""
        file = f"sessions/{name}"
        try:
            found = examine(self._sessions / name)
            self.summary.bytes_read += found.size
            key = claimed_key(found.scan, name)
        except (Unadoptable, FileNotFoundError):
            self.summary.left_alone += 1
            return None
        except Unreadable as error:
            return Finding(Verdict.DAMAGED, file, "", str(error), Remedy.HAND)
        trouble = beyond_adoption(file, key, found)
        if trouble is not None:
            self.summary.not_served += bool(trouble.line)
            return trouble
        return Finding(Verdict.NEW, file, key, "", kept=found.kept)


def _integrity(journal: Journal, store: StoreFile | None) -> list[Finding]:
    """What makes the database unfit to be believed."""
    try:
        lost = journal.lost_commit() if store is not None and store.durability == "fsync" else ""
        found = [_journal_damage(f"its log: {lost}")] if lost else []
        return found + [_journal_damage(detail, Remedy.AWAY) for detail in journal.integrity()]
    except apsw.Error as error:
        return [_unreadable(error)]


def _unreadable(error: apsw.Error) -> Finding:
    """The finding of an error of SQLite. Raises it again if the copy had no room, and nothing is damaged."""
    if pages.no_room(error):
        raise error
    return _journal_damage(pages.describe(error), Remedy.AWAY)


def _journal_damage(detail: str, remedy: Remedy = Remedy.RESTORE) -> Finding:
    return Finding(Verdict.DAMAGED, "journal.db", "", detail, remedy)

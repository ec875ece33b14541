"""Opening a directory: what was left by the last daemon, by its crash, and by others.

In this order: finish or drop files written under temporary names; replay the journal's rows into states, over
what the catalogue says each file had at its last checkpoint; make each touched file end where the catalogue
says (what was beyond, and is neither ours nor replayed, goes to quarantine); adopt files that nobody knows.
The first maintenance round then writes and flushes everything anew, before anybody is served: after an
unclean stop nothing is believed to be on disk only because it can be read.
"""

import logging
import os
import uuid
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from sessionstored.engine import StartError
from sessionstored.engine.jsonl.adoption import Unadoptable, Unreadable, adopt
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.damage import condemn, succeed
from sessionstored.engine.jsonl.files import FileChanged
from sessionstored.engine.jsonl.lost_rows import DAMAGE, nobody, stand_in
from sessionstored.engine.jsonl.names import SUFFIX, file_name, is_temporary_name, temporary_name
from sessionstored.engine.jsonl.ours import Ours, known_length
from sessionstored.engine.jsonl.records import (
    CallRecord,
    DamagedRow,
    DeleteRecord,
    LeaseRecord,
    Record,
    RequestRecord,
    SessionRecord,
    read_row,
)
from sessionstored.engine.jsonl.state import Draft, File, State, data_loss, state_of_entry
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import Change

log = logging.getLogger(__name__)

_ENTRIES_PER_TRANSACTION = 500
_ATTEMPTS = 20


class Recovery:
    """One opening."""

    def __init__(self, vault: Vault, accept_loss: bool) -> None:
        self._vault, self._accept_loss = vault, accept_loss
        self._states: dict[str, State] = {}
        self._known: dict[str, int] = {}
        """Key -> the revision that its catalogue row has; 0 if it has none."""
        self._touched: dict[str, State] = {}
        """The sessions that the journal changes beyond their catalogue rows; the others are clean."""
        self._ours = Ours()
        self._files: set[str] = set()
        """The files that sessions have."""
        self._orphans: defaultdict[str, list[bytes]] = defaultdict(list)
        """Key -> messages of changes whose session has no beginning."""
        self._rows = 0
        self._catalogued: list[tuple[str, str, int]] = []
        """(key, file, generation) of every session, as the catalogue says at first."""
        self._lost: dict[str, Entry] = {}
        """Key -> what stands in for its catalogue row, which is not what was written."""
        self._rows_lost = False
        """A row was damaged: what watchers were told of it will never have happened."""

    def run(self, *, changes_lost: bool) -> None:
        """Recover. Raises StartError if the journal is damaged.

        Args:
            changes_lost: changes that watchers were told of may be gone: no cursor of then counts.

        """
        vault = self._vault
        meta = vault.journal.meta()
        vault.revision = max(int(str(meta.get("revision", 0))), vault.revision)
        vault.set_clock(float(str(meta.get("clock_s", 0.0))))
        vault.checkpoint_row = vault.row_id = int(str(meta.get("checkpoint_row", 0)))
        vault.feed_bytes = vault.journal.feed_bytes(vault.checkpoint_row)
        self._read_catalogue()
        self._finish_temporaries()
        self._replay()
        self._replace_lost_rows()
        self._files = self._files_in_use()
        vault.session_count = vault.journal.catalogue.count()
        for state in self._touched.values():
            self._reconcile(state)
        for record in self._ours.tombstones:
            self._bury(record)
        self._adopt_unknown()
        if self._rows_lost or changes_lost or not meta.get("feed_id"):
            vault.feed_id = uuid.uuid4().hex
        else:
            vault.feed_id = str(meta["feed_id"])
        vault.journal.put_meta(revision=vault.revision, feed_id=vault.feed_id)
        self._load_leases()
        if self._rows or vault.feed_bytes:
            vault.to_erase(vault.row_id)  # whatever these rows removed, and those that are kept for watchers
        if self._rows:
            vault.files.names_changed = True  # what the last daemon renamed or removed may not be durable
            log.info("recovered %d journal rows, %d sessions", self._rows, len(self._touched))

    def _files_in_use(self) -> set[str]:
        """The files of living sessions, as the replay left them."""
        names = {file for key, file, _ in self._catalogued if key not in self._touched}
        names.update(state.file.name for state in self._touched.values() if state.head is not None)
        return names

    # The catalogue.

    def _read_catalogue(self) -> None:
        """Verify every row. Raises StartError if one is wrong, and nothing tells whose it is."""
        vault, catalogue = self._vault, self._vault.journal.catalogue
        wrong = []
        for row in catalogue.files():
            if row.whole:
                self._catalogued.append((row.key, row.file, row.generation))
            else:
                wrong.append(row.rowid)
        for rowid in wrong:
            entry = stand_in(catalogue, rowid, vault.files.sessions)
            if entry is None:
                raise StartError(
                    f"{vault.directory.journal} is damaged: {nobody(rowid)}: restore it from a backup, or "
                    "move it away and start with --accept-loss"
                )
            raw = f"{catalogue.raw(rowid)!r}\n".encode()
            aside = vault.files.set_aside(entry.file, raw, "row")
            log.error("session %r is damaged: %s: the row is in quarantine/%s", entry.head.key, DAMAGE, aside)
            entry.head = replace(entry.head, damage=f"{DAMAGE}; the row is in quarantine/{aside}")
            self._catalogued.append((entry.head.key, entry.file, entry.generation))
            self._lost[entry.head.key] = entry

    def _replace_lost_rows(self) -> None:
        """Write what stands in for them. A session with changes waiting gets its revision from those."""
        for key, entry in self._lost.items():
            if key not in self._touched:
                revision = self._vault.next_revision()
                entry.head = replace(entry.head, revision=revision, rewrite_revision=revision)
        if self._lost:
            self._vault.journal.put_entries(self._lost.values(), self._vault.revision)

    # Temporary names.

    def _finish_temporaries(self) -> None:
        """Rename what the catalogue names; remove what it does not."""
        files = self._vault.files
        found = {name for name in os.listdir(files.sessions) if is_temporary_name(name)}
        if not found:
            return
        for _, file, generation in self._catalogued:
            name = temporary_name(file, generation)
            if name in found:
                found.remove(name)
                files.install_generation(file, generation)
        for name in sorted(found):
            if self._lost:  # one of them may have named it
                files.set_aside(name, read_from(files.sessions / name, 0), "unnamed")
            files.disk.unlink(files.sessions / name)

    # The journal.

    def _replay(self) -> None:
        vault = self._vault
        for row_id, clock_s, body, whole in vault.journal.rows(vault.checkpoint_row):
            vault.row_id = row_id
            vault.backlog_bytes += len(body)
            self._rows += 1
            if clock_s > vault.clock_s():
                vault.set_clock(clock_s)
            try:
                if not whole:
                    raise DamagedRow("its checksum is wrong")
                records = list(read_row(body))
            except (DamagedRow, ValueError) as error:
                if not self._accept_loss:
                    raise StartError(
                        f"row {row_id} of {vault.directory.journal} is damaged ({error}): "
                        "acknowledged changes are lost; restore a backup, "
                        "or start with --accept-loss to go on without them"
                    ) from error
                self._rows_lost = True
                aside = vault.files.set_aside("journal.db", body, f"row{row_id}")
                vault.journal.end_leases()  # what a holder wrote may be lost, and the lease of the next one
                log.error("row %d of the journal is damaged: set aside in quarantine/%s", row_id, aside)
                continue
            for record in records:
                self._apply(record, clock_s)
        for key, lines in self._orphans.items():
            data = b"".join(line + b"\n" for line in lines)
            aside = vault.files.set_aside(file_name(key), data, "orphaned")
            log.error("session %r lost its beginning: its changes are in quarantine/%s", key, aside)

    def _apply(self, record: Record, clock_s: float) -> None:
        vault = self._vault
        match record:
            case SessionRecord():
                self._change(record)
            case DeleteRecord():
                self._delete(record)
            case CallRecord():
                vault.windows.replay_call(record, clock_s)
            case RequestRecord():
                vault.windows.replay_request(record, clock_s)
            case LeaseRecord():  # the table of leases has it
                vault.revision = max(vault.revision, record.lease.token)

    def _load_leases(self) -> None:
        leases, wrong = self._vault.journal.leases()
        if wrong:
            for each in wrong:
                log.error("a lease ends here: %s", each)
            self._vault.journal.end_leases()
            self._vault.journal.put_leases({lease.key: lease for lease in leases})
        self._vault.leases.load(leases)

    def _state(self, key: str) -> State:
        """The state of a key as the replay has it so far."""
        state = self._states.get(key)
        if state is None:
            entry = self._lost.get(key) or self._vault.journal.catalogue.entry(key)
            self._known[key] = entry.head.revision if entry else 0
            state = State(key, File("")) if entry is None else state_of_entry(entry)
            self._states[key] = state
        return state

    def _change(self, record: SessionRecord) -> None:
        head, vault = record.head, self._vault
        state = self._state(head.key)
        vault.revision = max(vault.revision, head.revision)
        if head.revision > self._known[head.key]:
            self._ours.lines[head.key].update(record.lines)
        if state.head is not None and not record.file:  # what the record leaves as it was
            head = replace(head, metadata=head.metadata or state.head.metadata, damage=state.head.damage)
        self._ours.heads[head.key].append(head)
        if head.revision <= max(self._known[head.key], state.head.revision if state.head else 0):
            return
        if record.file:  # it begins anew, whatever the catalogue still says
            self._orphans.pop(head.key, None)
            state.reset(record.file)
            self._touched[head.key] = state
        self._touch(state)
        if state.head is None and not record.file:
            self._orphans[head.key] += record.lines
            return
        end = record.start + record.delete_count
        if end > state.count or state.count - record.delete_count + len(record.lines) != head.message_count:
            state.bad = state.bad or data_loss(head.key, state.file.name, 0, "changes before are lost")
        if state.bad is not None:
            state.head = head  # what the journal has goes to quarantine
            return
        draft = Draft(state, state.head, state.count)
        suffix = vault.lines(state, end, state.count) if record.start < state.count else ()
        draft.change(Change(head, record.start, record.delete_count, record.lines), suffix)
        state.apply(draft.keep, draft.added, head)

    def _touch(self, state: State) -> None:
        """A session changes beyond its catalogue row: its file must still begin with what that says."""
        if state.key in self._touched:
            return
        self._touched[state.key] = state
        if state.head is None or state.bad is not None:
            return
        files, file = self._vault.files, state.file
        try:
            fd = os.open(files.sessions / file.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            detail = "the file is missing" if missing else f"it cannot be opened: {error}"
            state.bad = data_loss(state.key, file.name, 0, detail)
            return
        try:
            stat = os.fstat(fd)
            file.inode = stat.st_ino
            if stat.st_size < file.blocks.length:
                state.bad = data_loss(state.key, file.name, 0, "the file is shorter than it was")
            elif not files.prefix_is_whole(fd, file.blocks):
                detail = "the file was changed by somebody else, or damaged, while changes waited for it"
                state.bad = data_loss(state.key, file.name, 0, detail)
        finally:
            os.close(fd)

    def _delete(self, record: DeleteRecord) -> None:
        vault = self._vault
        if record.file:
            self._ours.tombstones.append(record)
        vault.revision = max(vault.revision, record.revision)
        # The rows of a session that is gone may go from the front, while others need the later ones.
        self._orphans.pop(record.key, None)
        state = self._state(record.key)
        if record.revision > self._known[record.key] and state.head is not None:
            state.reset(record.file or state.file.name, record.revision)
            self._touched[record.key] = state

    # Files.

    def _reconcile(self, state: State) -> None:
        """Make a touched session's file end where the catalogue says, and hand the state over."""
        vault, files, file = self._vault, self._vault.files, state.file
        had = bool(self._known[state.key]) or state.key in self._lost
        vault.session_count += (state.head is not None) - had
        state.dirty = True
        with vault.lock:
            vault.cached(state, state.cached_bytes)
        if state.head is None:
            file.name = ""  # another session may have it by now
            return
        if state.bad is not None:
            if not condemn(vault, state, state.bad):
                raise StartError(f"the disk of {vault.directory.path} is full: make room")
            return
        beyond = read_from(files.sessions / file.name, file.blocks.length)
        if beyond and not self._ours.wrote(state.key, file.name, beyond):
            aside = files.set_aside(file.name, beyond, "foreign")
            self._mark(state, f"its last {len(beyond)} bytes, not in the journal, are in quarantine/{aside}")
        file.torn_write = True  # whatever is beyond is ours, or in quarantine by now
        if not file.exists:
            files.remove(file.name)
        elif beyond:
            files.check(state)

    def _mark(self, state: State, damage: str) -> None:
        """Name what a session that is served lacks, or may lack: its journal may have lost it."""
        assert state.head is not None
        log.warning("sessions/%s: %s", state.file.name, damage)
        if damage not in state.head.damage:
            both = "; ".join(filter(None, (state.head.damage, damage)))
            state.head = replace(state.head, damage=both)

    def _bury(self, record: DeleteRecord) -> None:
        """Remove the file of a deleted session, unless a session has that name again."""
        files = self._vault.files
        if record.file in self._files or not (files.sessions / record.file).exists():
            return
        if record.aside:
            return files.put_away(record.file, record.revision)
        data = read_from(files.sessions / record.file, 0)
        known = known_length(record, data)
        rest = data[known:]
        if rest and not self._ours.wrote(record.key, record.file, rest):
            if not known:
                log.warning("sessions/%s was changed after its session was deleted: adopted", record.file)
                return None
            files.set_aside(record.file, rest, "foreign")
        return files.remove(record.file)

    # Adoption.

    def _adopt_unknown(self) -> None:
        """Take in the files that neither catalogue nor journal know, reading each once."""
        vault = self._vault
        names = sorted(
            entry.name
            for entry in os.scandir(vault.files.sessions)
            if entry.name.endswith(SUFFIX)
            and entry.name not in self._files
            and entry.is_file(follow_symlinks=False)
        )
        adopted: dict[str, tuple[Entry, int]] = {}
        for name in names:
            entry = self._adopt(name)
            if entry is None or self._claimed(entry, adopted):
                continue
            owner = vault.journal.catalogue.entry(entry.head.key)
            self._make_way(entry)
            adopted[entry.head.key] = entry, owner.head.revision if owner else 0
            if len(adopted) == _ENTRIES_PER_TRANSACTION:
                self._put(adopted)
        self._put(adopted)

    def _adopt(self, name: str) -> Entry | None:
        """Take in one file. Raises StartError if it cannot be read: its session would seem not to exist."""
        vault = self._vault
        try:
            name.encode()
            for _ in range(_ATTEMPTS):
                try:
                    entry, notes = adopt(vault.files, name, vault.next_revision())
                    break
                except FileChanged:
                    continue
            else:
                raise StartError(f"{vault.files.sessions / name}: somebody is writing it: wait for its end")
        except Unreadable as error:
            raise StartError(
                f"{vault.files.sessions / name}: {error}: make it readable, or move it away"
            ) from error
        except (UnicodeEncodeError, Unadoptable, FileNotFoundError) as error:
            log.error("sessions/%r is left alone: %r", name, error)
            return None
        for note in notes:
            log.warning("sessions/%s: %s", name, note)
        log.info(
            "adopted sessions/%s: session %r, %d messages", name, entry.head.key, entry.head.message_count
        )
        return entry

    def _claimed(self, entry: Entry, adopted: dict[str, tuple[Entry, int]]) -> bool:
        """Whether another file claims the same key; both are named, and neither is served."""
        vault, key = self._vault, entry.head.key
        state = self._touched.get(key)
        owner = adopted[key][0] if key in adopted else vault.journal.catalogue.entry(key)
        if key not in adopted and state is not None and state.head is None:
            with vault.lock:  # a deleted session's key begins anew with this file
                vault.clean(state)
                vault.forget(state)
            del self._touched[key]
            return False
        other = state.file.name if state is not None else owner.file if owner is not None else ""
        if not other:
            return False
        missing = not (vault.files.sessions / other).exists()
        if missing and state is None and owner is not None and owner.bad_line >= 0:
            log.warning("sessions/%s was renamed to %s", other, entry.file)
            entry.generation = owner.generation + 1
            succeed(entry, owner)
            vault.session_count -= 1
            return False
        vault.claims.setdefault(key, [other]).append(entry.file)
        refusal = vault.claimed(key)
        assert refusal is not None
        log.error("%s", refusal.message)
        if state is not None:
            with vault.lock:
                state.claimed = refusal
        return True

    def _make_way(self, entry: Entry) -> None:
        """Take its file's name from a deleted session, whose catalogue row stays until the checkpoint."""
        journal = self._vault.journal
        former = journal.catalogue.entry_of_file(entry.file)
        if former is not None and former.head.key != entry.head.key:
            former.file = temporary_name(former.file, former.generation)
            journal.put_entries([former])

    def _put(self, adopted: dict[str, tuple[Entry, int]]) -> None:
        vault = self._vault
        vault.files.flush_names()  # their bytes are flushed: from here on the catalogue counts on both
        vault.take_anew(list(adopted.values()))
        vault.session_count += len(adopted)
        adopted.clear()


def read_from(path: Path, offset: int) -> bytes:
    """A file's bytes from an offset on; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""

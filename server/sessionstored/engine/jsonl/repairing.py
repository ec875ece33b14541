"""Repair of damaged sessions, in a directory that nobody serves, by the protocols that the daemon has.

What a file holds is set aside whole before anything else, durably; only then its readable lines are written
under a temporary name, the catalogue row names them in a transaction, and they are renamed over the file. So
a repair that ends anywhere is begun again, and nothing is ever removed. Sessions whose file is gone are
deleted as any session is.

A session that lost something is marked: its `damage` says what, when, and where that is now. The next repair
of that session takes the mark away.

The caller has asked for consent to what the check found. What is not as the check found it is left alone.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sessionstored.engine import Refused, Request
from sessionstored.engine.jsonl import DEFAULT_TUNING
from sessionstored.engine.jsonl.adoption import Unadoptable, adopt
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.committer import Committer, Job, is_disk_full
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.examining import Examined, Unreadable, examine
from sessionstored.engine.jsonl.files import FileChanged
from sessionstored.engine.jsonl.findings import Finding, Remedy
from sessionstored.engine.jsonl.inspecting import pending_text, rotted
from sessionstored.engine.jsonl.maintenance import Maintenance
from sessionstored.engine.jsonl.opening import open_vault
from sessionstored.engine.jsonl.store import Directory
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import Delete, Head, Limits, Refusal

_LINES_PER_RUN = 1000
_ANOTHER = "it is not as the check found it any more: repair again"


class RepairFailed(Exception):
    """Storage failed: what was done so far is whole, and the next start recovers."""


class _LeftAlone(Exception):
    """A session is not repaired; the message says why."""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one session."""

    key: str
    file: str
    what: str
    mended: bool = True


@contextmanager
def opened(
    directory: Directory, limits: Limits, *, disk: Disk | None = None, vfs: str | None = None
) -> Iterator["Repair"]:
    """Recover an owned directory as a daemon does, repair it, and leave it clean.

    Raises:
        StartError: it cannot be opened.
        RepairFailed: storage failed.

    """
    vault = open_vault(
        directory,
        durability="fsync",
        limits=limits,
        cache_bytes_max=DEFAULT_TUNING.cache_bytes_max,
        hot_sessions_max=DEFAULT_TUNING.hot_sessions_max,
        accept_loss=False,
        disk=disk or Disk(),
        vfs=vfs,
    )
    committer = Committer(
        vault,
        group_requests_max=DEFAULT_TUNING.group_requests_max,
        group_bytes_max=DEFAULT_TUNING.group_bytes_max,
        reserve_bytes=DEFAULT_TUNING.reserve_bytes,
        on_fatal=lambda _: None,
    )
    maintenance = Maintenance(vault, committer, interval_s=DEFAULT_TUNING.checkpoint_interval_s)
    committer.start()
    try:
        yield Repair(vault, committer, maintenance)
    finally:
        maintenance.finish()
        vault.close()
    if committer.failure:
        raise RepairFailed(committer.failure)


class Repair:
    """A directory that is open for repair."""

    def __init__(self, vault: Vault, committer: Committer, maintenance: Maintenance) -> None:
        self._vault, self._committer = vault, committer
        self._round(maintenance)

    def _round(self, maintenance: Maintenance) -> None:
        """Write and flush what was recovered, so that every session is what its catalogue row says."""
        try:
            maintenance.round()
        except Exception as error:
            self._committer.fail(f"{type(error).__name__}: {error}")
            raise RepairFailed(self._committer.failure) from error

    def mend(self, finding: Finding, *, keep_suspect: bool = False) -> Done:
        """Do for one session what was agreed.

        Args:
            finding: what the check found, and with it the remedy.
            keep_suspect: keep what can be read in blocks whose checksum is wrong.

        Raises:
            RepairFailed: storage failed.

        """
        try:
            if finding.remedy is Remedy.REMOVE:
                what = self._remove(finding)
            else:
                what = self._run(lambda: _Mending(self._vault, finding, keep_suspect).run())
        except _LeftAlone as why:
            return Done(finding.key, finding.file, str(why), mended=False)
        return Done(finding.key, finding.file, what)

    def _run(self, task: Callable[[], str]) -> str:
        """Run a task on the committer's thread; what fails there, but for a full disk, ends the repair."""
        future = self._committer.run(task)
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, _LeftAlone):
            raise error
        if is_disk_full(error):
            raise _LeftAlone("the disk is full: make room, and repair again") from error
        self._committer.fail(f"{type(error).__name__}: {error}")
        raise RepairFailed(self._committer.failure) from error

    def _remove(self, finding: Finding) -> str:
        """Delete a session whose file is gone, also one that somebody has a lease of."""
        self._run(lambda: self._must_be_missing(finding.key))
        done = threading.Event()
        lease = self._vault.leases.get(finding.key)
        request = Request(Delete(finding.key), fencing_token=lease.token if lease is not None else 0)
        job = Job([request], 512, lambda _: done.set())
        self._committer.put(job)
        done.wait()
        if job.error is not None and self._committer.failure:
            raise RepairFailed(self._committer.failure) from job.error
        if job.error is not None:
            raise _LeftAlone(str(job.error)) from job.error
        outcome = job.replies[0].outcome
        if isinstance(outcome, Refusal):
            raise _LeftAlone(outcome.message)
        return "the session was removed: its file is gone"

    def _must_be_missing(self, key: str) -> str:
        vault = self._vault
        entry = vault.journal.catalogue.entry(key)
        if entry is None or key in vault.claims or (vault.files.sessions / entry.file).exists():
            raise _LeftAlone(_ANOTHER)
        return ""


class _Mending:
    """The repair of one session, on the committer's thread."""

    def __init__(self, vault: Vault, finding: Finding, keep_suspect: bool) -> None:
        self._vault, self._finding, self._keep_suspect = vault, finding, keep_suspect

    def run(self) -> str:
        """Do it; returns what was done."""
        entry = self._entry()
        remedy = self._finding.remedy
        files = self._vault.files
        condemned = entry.bad_line < 0
        try:
            taken = condemned and not rotted(entry, files.sessions, files.quarantine)
        except (FileNotFoundError, Unreadable) as error:
            raise _LeftAlone(str(error)) from error
        if taken:
            if remedy is not Remedy.TAKE:
                raise _LeftAlone(_ANOTHER)
            entry = self._taken(entry)
        if remedy is Remedy.OPEN:
            return entry.head.damage or "nothing was left to do"
        lines: list[bytes] = []
        found = self._examine(entry, lines)
        lost = not found.whole or found.kept != entry.head.message_count
        if remedy is Remedy.CLEAR:
            if lost and entry.size == entry.blocks.length:
                raise _LeftAlone(_ANOTHER)
            head = replace(entry.head, damage="")
            if lost:  # a torn line that was set aside, and is still in the file
                self._rewrite(entry, head, lines, found)
            else:
                self._put(entry, head)
            return "the mark was removed"
        if not lost and taken:
            self._put(entry, entry.head)
            return f"the file was taken as it is: {found.kept} messages"
        if not lost:
            self._rewrite(entry, entry.head, lines, found)
            return f"the file was written anew: {found.kept} messages"
        aside = self._set_aside(entry)
        note = f"repaired {_now()}: {_loss(found)}; the file as it was is in quarantine/{aside}"
        if condemned and not taken:
            note += pending_text(files.quarantine, entry.file)
        earlier = "" if entry.bad_line and not taken else entry.head.damage
        head = replace(
            entry.head,
            damage="; ".join(filter(None, (earlier, note))),
            last_consolidated=_consolidated(entry.head, found),
            update_time_us=max(entry.head.update_time_us, time.time_ns() // 1000),
        )
        self._rewrite(entry, head, lines, found)
        return f"{len(lines)} messages were kept; {note.partition(': ')[2]}"

    def _entry(self) -> Entry:
        """The session's catalogue row, as its file is now."""
        vault, key = self._vault, self._finding.key
        if key in vault.claims:
            raise _LeftAlone(Remedy.HAND.value)
        try:
            state = vault.state(key)
        except Refused as refused:
            raise _LeftAlone(refused.refusal.metadata["detail"]) from refused
        if state.dirty:
            raise _LeftAlone("changes still wait for its file: make room, and repair again")
        vault.forget(state)
        entry = vault.journal.catalogue.entry(key)
        if entry is None:
            raise _LeftAlone("there is no such session; see what is in quarantine")
        return entry

    def _taken(self, entry: Entry) -> Entry:
        """The row of a file that somebody changed while changes waited for it, as that file is now."""
        vault, before = self._vault, entry.head
        try:
            found, _ = adopt(
                vault.files, entry.file, vault.next_revision(), before.key, before.expire_time_us
            )
        except (Unadoptable, FileChanged, FileNotFoundError) as error:
            raise _LeftAlone(str(error) or "somebody changes the file just now") from error
        found.generation = entry.generation
        note = f"the file was taken as it was {_now()}"
        found.head = replace(
            found.head,
            damage="; ".join(filter(None, (before.damage, note))),
            create_time_us=min(before.create_time_us, found.head.create_time_us),
            update_time_us=max(before.update_time_us, found.head.update_time_us),
        )
        return found

    def _examine(self, entry: Entry, lines: list[bytes]) -> Examined:
        path = self._vault.files.sessions / entry.file
        try:
            return examine(path, entry.blocks, keep_suspect=self._keep_suspect, keep=lines.append)
        except (FileNotFoundError, Unreadable) as error:
            raise _LeftAlone(str(error)) from error

    def _set_aside(self, entry: Entry) -> str:
        """The file as it is, into quarantine, before anything else."""
        files = self._vault.files
        return files.set_aside(entry.file, (files.sessions / entry.file).read_bytes(), "damaged")

    def _rewrite(self, entry: Entry, head: Head, lines: Sequence[bytes], found: Examined) -> None:
        """Write a session's file anew, name it in the catalogue, and rename it."""
        vault = self._vault
        self._set_aside(entry)
        revision = vault.next_revision()
        head = replace(
            head,
            revision=revision,
            rewrite_revision=revision,
            message_count=len(lines),
            last_consolidated=min(head.last_consolidated, len(lines)),
        )
        runs = (lines[at : at + _LINES_PER_RUN] for at in range(0, len(lines), _LINES_PER_RUN))
        file = vault.files.write_generation(head, entry.file, entry.generation + 1, runs)
        if not vault.files.unchanged(entry.file, found.size, found.inode, found.mtime_ns):
            vault.files.discard_generation(file.name, file.generation)
            raise _LeftAlone("somebody changes the file just now")
        anew = Entry(head, file.name, file.generation, file.blocks, file.size, file.inode, file.mtime_ns)
        vault.take_anew([(anew, entry.head.revision)])
        vault.files.install_generation(file.name, file.generation)
        vault.files.flush_names()

    def _put(self, entry: Entry, head: Head) -> None:
        """Write the catalogue row of a file that stays as it is."""
        previous = entry.head.revision
        entry.head = replace(head, revision=self._vault.next_revision())
        self._vault.take_anew([(entry, previous)])


def _loss(found: Examined) -> str:
    """What of a file was not kept."""
    parts = []
    if found.lost:
        numbers = ", ".join(map(str, found.lost_lines))
        more = f" and {found.lost - len(found.lost_lines)} more" if found.lost > len(found.lost_lines) else ""
        parts.append(f"line {numbers}{more} cannot be read")
    if found.wrong:
        ranges = ", ".join(f"{begin} to {end}" for begin, end in found.wrong)
        what = f"{found.suspect} messages left out" if found.suspect else "what could be read of it was kept"
        parts.append(f"bytes {ranges} did not match their checksum, {what}")
    return "; ".join(parts) or "the catalogue said another number of messages"


def _consolidated(head: Head, found: Examined) -> int:
    """How many of the kept messages are summarised elsewhere for certain.

    The messages before the loss are counted from the front, and those behind it from the end, because nobody
    knows how many were lost between them. A message that is summarised twice does no harm.
    """
    known = max(head.message_count, found.kept + found.suspect + found.lost)
    behind = found.kept - found.kept_before
    open_ones = known - head.last_consolidated
    return min(head.last_consolidated, found.kept_before) + max(0, behind - open_ones)


def _now() -> str:
    return datetime.now(UTC).replace(microsecond=0).isoformat()

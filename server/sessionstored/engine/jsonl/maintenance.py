"""The maintenance thread: writes files anew, checkpoints, catches up after a full disk, and sweeps.

A checkpoint makes the session files durable, so that journal rows may go: capture which files are complete,
at a group boundary; flush them, then their directory; write their catalogue rows; only then drop the
journal's rows. Every catalogue row names the revision that its file has, so recovery knows for each session
which changes come on top, and the catalogue may be written in several transactions.

What touches states or the writing connection runs as a task of the committer; flushing and copying happen
here.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sessionstored.engine import Refused
from sessionstored.engine.feed import DEFAULT_FEED_LIMITS, FeedLimits
from sessionstored.engine.jsonl.answers import StoredRequest
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.committer import Committer, is_disk_full
from sessionstored.engine.jsonl.damage import condemn
from sessionstored.engine.jsonl.erasure import erase
from sessionstored.engine.jsonl.expiring import Expiring
from sessionstored.engine.jsonl.feeding import BYTES_PER_STEP
from sessionstored.engine.jsonl.files import FileChanged, Region
from sessionstored.engine.jsonl.state import File, State
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import Head, Refusal
from sessionstored.windows import FORGET_SLACK_S, CallWindow

log = logging.getLogger(__name__)
T = TypeVar("T")

RUN_BYTES = 1 << 20
_ROWS_PER_TRANSACTION = 200
_ANSWERS_PER_TRANSACTION = 2000
_WAL_BYTES_MAX = 64 << 20
_SWEEP_ROWS = 1000
_STEPS_PER_LOG = 4
_SCARCE_STEP_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class _Captured:
    """A session whose file is complete at a checkpoint's revision."""

    state: State
    file: File
    entry: Entry


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What one checkpoint will write."""

    row_id: int
    revision: int
    complete: list[_Captured]
    gone: list[State]
    needed_from: int | None
    """The revision from which on a session that is behind needs the rows; None if none is."""
    clients: dict[str, CallWindow]
    requests: dict[tuple[str, str], StoredRequest]


@dataclass(frozen=True, slots=True)
class _Rewrite:
    """A session to be written anew."""

    state: State
    head: Head
    generation: int
    region: Region
    filed: int
    tail: Sequence[bytes]


class Maintenance:
    """The thread, and what it does."""

    def __init__(
        self,
        vault: Vault,
        committer: Committer,
        *,
        interval_s: float,
        sweep_rows_per_s: int = _SWEEP_ROWS,
        feed_limits: FeedLimits = DEFAULT_FEED_LIMITS,
    ) -> None:
        self._vault, self._committer = vault, committer
        self._interval_s = interval_s
        self._feed_limits = feed_limits
        self._sweep_rows = max(1, int(sweep_rows_per_s * interval_s))
        self._swept = 0
        self._expiring = Expiring(vault, committer)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def nudge(self) -> None:
        """Do a round now."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after the round under way."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def finish(self) -> None:
        """Complete the files, end the committer, and mark the store clean if all is in its files."""
        complete = self._last(lambda: self.round() and self.round())
        self._committer.stop()
        if complete:
            self._last(self._mark_clean)

    def _last(self, step: Callable[[], bool]) -> bool:
        """One of the last steps; a full disk leaves in the journal what is not in the session files."""
        try:
            return not self._committer.failure and step()
        except Exception as error:
            if is_disk_full(error):
                log.warning("the disk is full: the next start has to recover what the session files lack")
            else:
                self._committer.fail(f"{type(error).__name__}: {error}")
            return False

    def _mark_clean(self) -> bool:
        vault = self._vault
        vault.journal.put_meta(
            clock_s=vault.clock_s(), expiry_clock=json.dumps(vault.trusted.stored())
        )  # also what went by since the last checkpoint, if nobody wrote
        self._vault.journal.wal_checkpoint()
        self._vault.write_store(replace(self._vault.store, clean=True))
        return True

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._interval_s)
            self._wake.clear()
            if self._stop.is_set() or self._committer.failure:
                return
            self.guarded_round()

    def guarded_round(self) -> None:
        """One round and one step of the sweep; a full disk puts them off, any other failure is fatal."""
        try:
            if self._expiring.sweep():
                self.nudge()  # there are more
            self.round()
            self._sweep()
        except Exception as error:
            if is_disk_full(error):
                log.warning("the disk is full: the checkpoint is tried again later")
                return
            log.exception("maintenance failed")
            self._committer.fail(f"{type(error).__name__}: {error}")

    def _look_again(self, key: str) -> None:
        """Have the committer look at a file that somebody else changed."""
        try:
            self._committer.look_again(key).result()
        except Refused as refused:
            log.warning("session %r: %s", key, refused.refusal.message)

    def _do(self, task: Callable[[], T]) -> T:
        """Have the committer do something that must not fail."""
        return self._committer.run(task, fatal=True).result()

    def round(self) -> bool:
        """Catch up, write anew, checkpoint. Returns whether every file is complete and durable."""
        self._do(self._catch_up)
        for state in self._do(self._wanting_rewrite):
            self.rewrite(state)
        complete = self.checkpoint()
        self._prune_feed()
        erase(self._vault, self._committer)
        return complete

    def _catch_up(self) -> None:
        """Append what files lack since the disk was full. On the committer's thread."""
        for state in list(self._vault.dirty.values()):
            if state.behind:
                self._vault.catch_up(state)

    def _wanting_rewrite(self) -> list[State]:
        return [state for state in self._vault.dirty.values() if state.wants_rewrite]

    # Writing anew.

    def rewrite(self, state: State) -> bool:
        """Write one session's file anew. Returns False if it has to be tried again."""
        captured = self._do(lambda: self._capture_rewrite(state))
        if captured is None:
            return True
        head, name = captured.head, captured.region.file
        try:
            file = self._vault.files.write_generation(
                head, name, captured.generation + 1, self._runs(captured)
            )
        except Refused as error:
            refusal = error.refusal
            self._do(lambda: self._condemn(captured, refusal))
            return True
        except FileChanged:
            self._look_again(state.key)
            return False
        except OSError as error:
            if not self._vault.is_full(error):
                raise
            return False
        return self._do(lambda: self._install_rewrite(captured, file))

    def _capture_rewrite(self, state: State) -> _Rewrite | None:
        with self._vault.lock:
            if state.head is None or not state.wants_rewrite:
                return None
            tail = state.lines[state.filed - state.base :]
            region = self._vault.region(state)
            return _Rewrite(state, state.head, state.file.generation, region, state.filed, tail)

    def _runs(self, captured: _Rewrite) -> Iterator[Sequence[bytes]]:
        """The session's messages, from its old file and from memory."""
        yield from self._vault.files.read(captured.region, 0, captured.filed, 1 << 62)
        run: list[bytes] = []
        size = 0
        for line in captured.tail:
            run.append(line)
            size += len(line)
            if size >= RUN_BYTES:
                yield run
                run, size = [], 0
        yield run

    def _condemn(self, captured: _Rewrite, refusal: Refusal) -> None:
        if captured.state.file is captured.region.owner and captured.state.head is not None:
            condemn(self._vault, captured.state, refusal)

    def _install_rewrite(self, captured: _Rewrite, file: File) -> bool:
        """Name the new generation in the database, then rename it, unless it is out of date meanwhile."""
        vault, state, head = self._vault, captured.state, captured.head
        stale = (
            state.head is None
            or state.bad is not None
            or state.file is not captured.region.owner
            or state.head.rewrite_revision != head.rewrite_revision
        )
        if stale or not vault.ready_to_replace(state):
            vault.files.discard_generation(file.name, file.generation)
            return False
        vault.journal.put_entries(
            [
                Entry(
                    head,
                    file.name,
                    file.generation,
                    file.blocks,
                    file.size,
                    file.inode,
                    file.mtime_ns,
                    file.superseded_bytes,
                )
            ]
        )
        vault.files.install_generation(file.name, file.generation)
        with vault.lock:
            file.revision = head.revision
            state.file, state.filed, state.damage_set_aside = file, head.message_count, False
        vault.catch_up(state)
        return True

    # Checkpoints.

    def checkpoint(self) -> bool:
        """Make complete files durable and drop the rows that nobody needs. Returns whether all are."""
        vault = self._vault
        captured = self._do(self._capture)
        if captured is None:
            return True
        flushed: list[tuple[_Captured, int | None]] = []
        for one in captured.complete:
            try:
                stat = vault.files.flush(one.entry.file)
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                flushed.append((one, None))  # somebody else made it unusable
                continue
            if stat.st_ino != one.entry.inode or stat.st_size < one.entry.blocks.length:
                flushed.append((one, None))  # somebody else replaced or cut it: nothing of it was flushed
                continue
            # Beyond the blocks lies a torn line that was set aside, or what somebody else appended just now:
            # that must be seen as an edit.
            torn = one.entry.size == stat.st_size > one.entry.blocks.length
            one.entry.size = stat.st_size if torn else one.entry.blocks.length
            one.entry.inode, one.entry.mtime_ns = stat.st_ino, stat.st_mtime_ns
            with vault.lock:  # a deletion from now on has to know: the rows that made these bytes may go
                one.file.durable = one.entry.blocks.mark
            flushed.append((one, stat.st_size))
        vault.files.flush_names()
        safe = True
        for begin in range(0, len(flushed), _ROWS_PER_TRANSACTION):
            part = flushed[begin : begin + _ROWS_PER_TRANSACTION]
            safe &= self._do(lambda part=part: self._write_rows(part))  # type: ignore[misc]
        for clients in _chunks(captured.clients):
            self._do(lambda clients=clients: vault.journal.put_windows(clients, {}))  # type: ignore[misc]
        self._do(lambda: self._finish(captured, safe))
        self._shorten_wal()
        return safe and captured.needed_from is None

    def _capture(self) -> _Checkpoint | None:
        """At a group boundary: which files are complete, and up to which row. On the committer's thread."""
        vault = self._vault
        if not vault.dirty and not vault.backlog_bytes:
            return None
        complete: list[_Captured] = []
        gone: list[State] = []
        needed_from: int | None = None
        for state in vault.dirty.values():
            if state.bad is None and state.behind:
                needed_from = min(
                    state.file.revision, state.file.revision if needed_from is None else needed_from
                )
            elif state.head is None:
                gone.append(state)
            elif state.bad is None:
                complete.append(_Captured(state, state.file, state.entry()))
        return _Checkpoint(
            vault.row_id,
            vault.revision,
            complete,
            gone,
            needed_from,
            dict(vault.windows.dirty_clients),
            dict(vault.windows.dirty_requests),
        )

    def _write_rows(self, part: Sequence[tuple[_Captured, int | None]]) -> bool:
        """Catalogue rows of flushed files; not of sessions that began anew. On the committer's thread.

        Returns False if a session still needs its journal rows.
        """
        vault = self._vault
        entries = []
        safe = True
        for one, size in part:
            if one.state.head is None or one.state.file is not one.file:
                continue
            if size is None:
                try:
                    vault.readopt(one.state.key)
                except Refused as refused:
                    log.warning("%s", refused.refusal.message)
                safe &= one.state.bad is not None
                continue
            entries.append(one)
        vault.journal.put_entries([one.entry for one in entries])
        with vault.lock:
            for one in entries:
                one.file.size, one.file.inode, one.file.mtime_ns = (
                    one.entry.size,
                    one.entry.inode,
                    one.entry.mtime_ns,
                )
                one.file.revision = one.entry.head.revision
                if one.state.head is one.entry.head:
                    vault.clean(one.state)
        return safe

    def _finish(self, captured: _Checkpoint, safe: bool) -> None:
        """Pass the rows that no session needs. On the committer's thread."""
        vault = self._vault
        all_pass = safe and captured.needed_from is None
        gone = {state.key: state for state in captured.gone if state.head is None}
        vault.journal.put_windows({}, captured.requests)
        now = vault.clock_s()
        vault.checkpoint_row, passed_bytes, buried = vault.journal.finish_checkpoint(
            vault.checkpoint_row,
            captured.row_id if safe else 0,
            captured.revision if captured.needed_from is None else captured.needed_from,
            {key: state.deleted for key, state in gone.items()},
            {
                "revision": captured.revision,
                "clock_s": now,
                "expiry_clock": json.dumps(vault.trusted.stored()),
            },
        )
        forgotten = vault.journal.trim_windows(
            {key for key, _ in captured.requests} if all_pass else (),
            vault.limits.window_request_ids_max,
            now - vault.limits.window_age_max_s - FORGET_SLACK_S,
        )
        if forgotten:
            vault.to_erase(0)
        vault.backlog_bytes -= passed_bytes
        vault.feed_bytes += passed_bytes
        vault.windows.written(captured.clients, captured.requests)
        with vault.lock:
            for state in (gone[key] for key in buried):
                vault.release_name(state.file.name)
                vault.clean(state)
                vault.forget(state)
            for one in captured.complete:
                if one.state.head is not None and one.state.file is one.file:  # else it has no row, perhaps
                    vault.release_name(one.entry.file)

    def _shorten_wal(self) -> None:
        """Move the write-ahead log into the database: most of it beside the committer, the rest within."""
        vault = self._vault
        if not self._do(self._committer.log_fits):
            return  # when there is room
        vault.reading(lambda reader: reader.wal_checkpoint_passive())
        if vault.wal_bytes() > _WAL_BYTES_MAX:  # nobody here may read meanwhile, and others may: then later
            vault.reading(lambda _: self._do(vault.journal.wal_checkpoint))

    # The feed.

    def _prune_feed(self) -> None:
        """Drop rows that are kept for watchers only, and are too old or too many.

        On a disk that is nearly full none is kept: what they take is needed for deletions. They go in small
        steps then, because what is overwritten goes through the log first.
        """
        vault, limits = self._vault, self._feed_limits
        scarce = self._committer.is_nearly_full()
        if not self._do(self._committer.log_fits):
            return  # what is overwritten would only make the log longer
        bytes_max = 0 if scarce else limits.bytes_max
        step_bytes = _SCARCE_STEP_BYTES if scarce else BYTES_PER_STEP
        steps_per_log = 1 if scarce else _STEPS_PER_LOG

        def step() -> bool:
            if not vault.feed_bytes:
                return False
            pruned = vault.journal.prune_feed(
                vault.checkpoint_row,
                vault.clock_s() - limits.age_s_max,
                vault.feed_bytes - bytes_max,
                step_bytes,
            )
            vault.feed_bytes -= pruned[1] if pruned else 0
            return pruned is not None

        steps = 0
        while self._do(step) and not self._stop.is_set():
            steps += 1
            if steps % steps_per_log == 0:  # else the log would take as much room as the rows
                vault.reading(lambda reader: reader.wal_checkpoint_passive())

    # Sweeping.

    def _sweep(self) -> None:
        """Look for files that somebody else changed, some rows at a time."""
        vault = self._vault
        rows = vault.reading(lambda reader: reader.files_after(self._swept, self._sweep_rows))
        for row in rows:
            self._swept = row.rowid
            if not row.whole:
                continue  # the scrubber tells
            with vault.lock:
                state = vault.states.get(row.key)
                in_use = state is not None and (state.dirty or state.bad is not None)
            try:
                if in_use or vault.files.unchanged(row.file, row.size, row.inode, row.mtime_ns):
                    continue
            except FileNotFoundError:
                continue  # its session says so when it is opened
            self._look_again(row.key)
            time.sleep(0)
        if not rows:
            self._swept = 0


def _chunks(clients: dict[str, CallWindow]) -> Iterator[dict[str, CallWindow]]:
    """Windows in portions of a moderate number of answers, so that no portion holds up commits for long."""
    chunk: dict[str, CallWindow] = {}
    answers = 0
    for client_id, window in clients.items():
        chunk[client_id] = window
        answers += 1 + len(window.answers)
        if answers >= _ANSWERS_PER_TRANSACTION:
            yield chunk
            chunk, answers = {}, 0
    if chunk:
        yield chunk

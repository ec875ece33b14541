"""What the threads of one store share: hot states, windows, names, clocks.

`lock` guards `states` and everything in a State; it is held for memory work only, never over a flush. The
database's writing connection and every change of a State belong to the committer's thread; the reading
connection has a lock of its own. A state that is not dirty may be forgotten at any time, because its
catalogue row says the same.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sessionstored.engine import Refused
from sessionstored.engine.events import Event, Reload
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.damage import adopt_again, condemn
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.files import CHANGED, FULL, FileChanged, Region, SessionFiles
from sessionstored.engine.jsonl.journal import Journal, Reader, Told
from sessionstored.engine.jsonl.names import file_name
from sessionstored.engine.jsonl.records import AdoptRecord, Row
from sessionstored.engine.jsonl.remembered import Windows
from sessionstored.engine.jsonl.state import File, State, data_loss, reading_journal, state_of_entry
from sessionstored.engine.jsonl.store import Directory, StoreFile, with_ceiling
from sessionstored.engine.leasing import LeaseBook
from sessionstored.leases import Lease
from sessionstored.rules import Head, Limits, Refusal, ends
from sessionstored.trusted import TrustedClock

T = TypeVar("T")


class Vault:
    """The shared heart of one open store."""

    def __init__(
        self,
        directory: Directory,
        store: StoreFile,
        journal: Journal,
        files: SessionFiles,
        disk: Disk,
        limits: Limits,
        cache_bytes_max: int,
        hot_sessions_max: int,
    ) -> None:
        self.directory, self.store, self.journal, self.files, self.disk = (
            directory,
            store,
            journal,
            files,
            disk,
        )
        self.limits = limits
        self.lock = threading.RLock()
        self.states: OrderedDict[str, State] = OrderedDict()
        self.dirty: dict[str, State] = {}
        self.claims: dict[str, list[str]] = {}
        """Keys that more than one file claims, and those files."""
        self.session_count = 0
        self.revision = 0
        self.row_id = 0
        self.checkpoint_row = 0
        """The last row that recovery does not need any more."""
        self.backlog_bytes = 0
        """The size of the journal's rows behind that."""
        self.feed_bytes = 0
        """The size of the rows up to that, which are kept for watchers."""
        self.feed_id = ""
        """Of the feed: a store that lost changes has another one afterwards."""
        self.publish: Callable[[int, Sequence[Event]], None] = lambda _, __: None
        """Called after each commit, in order, with the row's id and what it changed. Hold the lock."""
        self._cache_bytes_max, self._hot_sessions_max = cache_bytes_max, hot_sessions_max
        self._cached_bytes = 0
        self._forgotten = 0
        self._removals: list[tuple[str, int]] = []
        """(file name, 0 or the revision under which it goes to quarantine)"""
        self._reserved: set[str] = set()
        self.windows = Windows(journal, limits, self.clock_s, hot_sessions_max)
        self.leases = LeaseBook()
        self._clock_base_s = -time.clock_gettime(time.CLOCK_BOOTTIME)
        self.trusted = TrustedClock(
            lambda: time.time_ns() // 1000,
            lambda: int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1e6),
            jump_us_max=int(limits.expiry_jump_max_s * 1e6),
            confirm_us=int(limits.expiry_confirm_s * 1e6),
            boot_id=_boot_id(),
        )
        """What sessions expire by."""
        self.erasing: int | None = None
        """The last row whose like holds what is to be erased; None if nothing is. See `erasure`."""
        self._reader: Reader = journal.reader()
        self._reader_lock = threading.Lock()

    # Clocks and counters.

    def clock_s(self) -> float:
        """The store's own clock: seconds of service since its beginning. It never jumps."""
        return self._clock_base_s + time.clock_gettime(time.CLOCK_BOOTTIME)

    def set_clock(self, clock_s: float) -> None:
        """Go on from a clock that was stored."""
        self._clock_base_s = clock_s - time.clock_gettime(time.CLOCK_BOOTTIME)

    def expired(self, head: Head, trusted_us: int | None = None) -> bool:
        """Whether a session that is not damaged has expired, and no lease makes that wait.

        A lease that has run out makes it wait, too, until that is recorded: before, a restart would give the
        lease its ttl again, and bring back what somebody found to be gone.
        """
        return self.leases.get(head.key) is None and self.is_over(head, trusted_us)

    def is_over(self, head: Head, trusted_us: int | None = None) -> bool:
        """Whether the time of a session that is not damaged has come."""
        ends_us = ends(head, self.limits)
        if not ends_us or ends_us > (self.trusted.now_us() if trusted_us is None else trusted_us):
            return False
        return head.key not in self.claims

    def to_erase(self, row_id: int) -> None:
        """Messages were removed that rows up to this one may hold. For the committer's thread."""
        self.erasing = max(row_id, self.erasing or 0)

    def free_bytes(self) -> int:
        """Free bytes on the data directory's disk."""
        return self.disk.free_bytes(self.directory.path)

    def wal_bytes(self) -> int:
        """The size of the database's write-ahead log."""
        try:
            return os.stat(f"{self.directory.journal}-wal").st_size
        except FileNotFoundError:
            return 0

    @staticmethod
    def is_full(error: OSError) -> bool:
        """Whether an error says no more than that the disk is full."""
        return error.errno in FULL

    @staticmethod
    def missing(state: State) -> Refusal:
        """The refusal for a session whose file is gone."""
        return data_loss(state.key, state.file.name, 0, "the file is missing")

    def write_store(self, store: StoreFile) -> None:
        """Replace STORE."""
        self.directory.write_store(store)
        self.store = store

    # States.

    def state(self, key: str) -> State:
        """The state of a key as its file is now, loaded if need be. For the committer's thread."""
        with self.lock:
            state = self.states.get(key)
        if state is not None and self._stale(state):
            self.forget(state)
            state = None
        if state is None:
            with reading_journal():
                entry = self.journal.catalogue.entry(key)
            if entry is not None and key not in self.claims and self._edited(entry):
                entry = adopt_again(self, entry)
            state = self._load(key, entry)
            with self.lock:
                state = self.states.setdefault(key, state)
                state.pins += 1  # this one stays
                self._shrink()  # also if nothing comes of it: whoever asks may name any key
                state.pins -= 1
        return state

    def _stale(self, state: State) -> bool:
        """Whether a state is clean, and somebody else changed its file since."""
        file = state.file
        if state.dirty or state.head is None or state.key in self.claims:
            return False
        try:
            return not file.exists or not self.files.unchanged(
                file.name, file.size, file.inode, file.mtime_ns
            )
        except FileNotFoundError:
            return file.exists and state.bad is None

    def hot(self, key: str) -> State | None:
        """The state of a key if it is in memory, marked as used. Hold the lock."""
        state = self.states.get(key)
        if state is not None:
            self.states.move_to_end(key)
        return state

    def load(self, key: str) -> State | None:
        """Bring a session into memory, for a reader's thread; None if it does not exist.

        Raises:
            FileChanged: its file was edited by somebody else: the committer has to adopt it anew.

        """
        while True:
            with self.lock:
                state = self.hot(key)
                forgotten = self._forgotten
            if state is None:
                entry = self.reading(partial(Reader.entry, key=key))
                if entry is None:
                    with self.lock:
                        if forgotten == self._forgotten and key not in self.states:
                            return None
                    continue
                if key not in self.claims and self._edited(entry):
                    raise FileChanged
                loaded = self._load(key, entry)
                with self.lock:
                    if forgotten != self._forgotten:
                        continue  # this row may be older than a state that came and went meanwhile
                    state = self.states.setdefault(key, loaded)
                    self._shrink()
            return state if state.head is not None else None

    def _edited(self, entry: Entry) -> bool:
        """Whether somebody else changed a clean file; a missing file is not an edit, but damage."""
        try:
            return not self.files.unchanged(entry.file, entry.size, entry.inode, entry.mtime_ns)
        except FileNotFoundError:
            return False

    def _load(self, key: str, entry: Entry | None) -> State:
        if entry is None:
            return State(key, File(""))
        state = state_of_entry(entry)
        state.claimed = self.claimed(key)
        if state.bad is None and not (self.files.sessions / entry.file).exists():
            state.bad, state.file.exists = self.missing(state), False
        return state

    def claimed(self, key: str) -> Refusal | None:
        """The refusal for a key that more than one file claims."""
        names = self.claims.get(key)
        if names is None:
            return None
        first, *others = (f"sessions/{name}" for name in names)
        if (self.files.sessions / names[0]).exists():
            what = f"two files claim this key: {' and '.join([first, *others])}: move one of them away"
        else:
            what = f"{first} is missing, and {' and '.join(others)} claims its key: rename that to {first}"
        return data_loss(key, names[0], 0, f"{what}, then restart the daemon")

    def next_revision(self) -> int:
        """A new revision; STORE's ceiling is above all that were ever given out."""
        self.revision += 1
        if self.revision > self.store.revision_ceiling:
            self.write_store(with_ceiling(self.store, self.revision))
        return self.revision

    def readopt(self, key: str) -> None:
        """Look again at a session whose file is not what a reader expected. For the committer's thread.

        Edited while it was clean: it is adopted anew. While changes waited: it is damaged.
        """
        with self.lock:
            state = self.states.get(key)
        in_use = state is not None and state.dirty and state.head and not state.bad and state.file.exists
        if state is not None and in_use and not self.files.is_ours(state.file):
            condemn(self, state, data_loss(key, state.file.name, 0, CHANGED))
        self.state(key)

    def forget(self, state: State) -> None:
        """Let go of a clean state, so that its catalogue row and file count again."""
        self.files.forget(state.file.name)
        with self.lock:
            if self.states.get(state.key) is state:
                self._cached_bytes -= state.cached_bytes
                del self.states[state.key]
                self._forgotten += 1

    def cached(self, state: State, grown: int) -> None:
        """Account for memory that a state took, and forget what was not used for longest. Hold the lock."""
        self._cached_bytes += grown
        self._place(state)
        self.states.move_to_end(state.key)
        if state.dirty:
            self.dirty[state.key] = state
        self._shrink()

    def pinned_bytes(self) -> int:
        """How many bytes of messages are in memory beyond the cache's bound: they wait for their files."""
        if self._cached_bytes <= self._cache_bytes_max:
            return 0
        with self.lock:
            self._shrink()
            return max(0, self._cached_bytes - self._cache_bytes_max)

    def _place(self, state: State) -> None:
        """Make a state the one of its key."""
        other = self.states.get(state.key)
        if other is not None and other is not state:  # loaded anew while this one was in use
            self._cached_bytes -= other.cached_bytes
        self.states[state.key] = state

    def _shrink(self) -> None:
        if self._cached_bytes <= self._cache_bytes_max and len(self.states) <= self._hot_sessions_max:
            return
        for key in list(islice(self.states, 64)):
            state = self.states[key]
            if state.pins:
                continue
            self._cached_bytes -= state.drop_cache()
            if not state.dirty and not state.lines:
                del self.states[key]
                self._forgotten += 1
            else:
                self.states.move_to_end(key)  # pinned by what is not yet in its file

    def clean(self, state: State) -> None:
        """A state's catalogue row says what it says. Hold the lock."""
        state.dirty = False
        self.dirty.pop(state.key, None)

    # Messages.

    def region(self, state: State) -> Region:
        """Where a cold read finds a state's messages. Hold the lock."""
        file = state.file
        return Region(state.key, file.name, file.inode, file.blocks.copy(), file)

    def lines(self, state: State, start: int, stop: int) -> Sequence[bytes]:
        """Messages [start, stop) of a state, from its file if need be. For the committer's thread."""
        if start >= stop:
            return ()
        with self.lock:
            base, tail = state.base, state.lines
            region = self.region(state) if start < base else None
        if region is None:
            return tail[start - base : stop - base]
        return [*self.read_cold(state, region, start, min(stop, base)), *tail[: max(0, stop - base)]]

    def read_cold(
        self, state: State, region: Region, start: int, stop: int, max_bytes: int = 1 << 62
    ) -> list[bytes]:
        """Messages from a state's file.

        Raises:
            FileChanged: it was written anew meanwhile, or somebody else changed it.
            Refused: DATA_LOSS.

        """
        return [line for run in self.runs_cold(state, region, start, stop, max_bytes) for line in run]

    def runs_cold(
        self, state: State, region: Region, start: int, stop: int, max_bytes: int = 1 << 62
    ) -> Iterator[list[bytes]]:
        """Messages from a state's file, in runs; as `read_cold`."""
        try:
            yield from self.files.read(region, start, stop, max_bytes)
        except Refused:
            with self.lock:
                current = state.file is region.owner and self.states.get(state.key) is state
            if not current:  # another file has its name, and may even have its inode number
                raise FileChanged from None
            raise

    def cache_read(self, state: State, seen: Sequence[bytes], base: int, lines: Sequence[bytes]) -> None:
        """Keep what a reader read in front of `base`, if the state is as it was then."""
        size = sum(map(len, lines))
        with self.lock:
            same = self.states.get(state.key) is state and state.lines is seen and state.base == base
            if not same or size > self._cache_bytes_max // 4:
                return
            state.lines = [*lines, *state.lines]
            state.base = base - len(lines)
            state.cached_bytes += size
            self.cached(state, size)

    # Changes, for the committer's thread.

    def take_anew(self, taken: Sequence[tuple[Entry, int]]) -> None:
        """Make files the sessions' as they are, and tell watchers.

        Args:
            taken: catalogue rows, and the revisions that the sessions had before.

        """
        row = Row()
        events: list[Event] = []
        for entry, previous in taken:
            head = entry.head
            row.adopted(AdoptRecord(head.key, head.revision, previous))
            events.append(Event(head.key, head.revision, previous, Reload()))
        if not events:
            return
        told = Told(self.row_id + 1, row.last_revision, self.clock_s(), row.body())
        self.journal.put_entries([entry for entry, _ in taken], self.revision, told)
        self.row_id += 1
        self.backlog_bytes += len(told.body)
        with self.lock:
            self.publish(self.row_id, events)

    def commit_row(
        self, row: Row, clock_s: float, entries: Iterable[Entry], leases: Mapping[str, Lease | None]
    ) -> None:
        """Commit one group."""
        body = row.body()
        self.journal.append(self.row_id + 1, row.last_revision, clock_s, body, entries, leases)
        self.row_id += 1
        self.backlog_bytes += len(body)

    def file_for(self, state: State) -> str:
        """The file name of a session to be created: the one that it had, or a new one."""
        return state.file.name or self.reserve_name(state.key, self.journal.catalogue.file_taken)

    def reserve_name(self, key: str, taken: Callable[[str], bool]) -> str:
        """A file name that no session and no file has."""
        for attempt in range(1000):
            name = file_name(key, attempt)
            with self.lock:
                if name in self._reserved or taken(name) or os.path.lexists(self.files.sessions / name):
                    continue
                self._reserved.add(name)
                return name
        raise AssertionError(f"no file name is free for {key!r}")

    def reserve_name_as_reader(self, key: str) -> str:
        """`reserve_name`, for a reader's thread."""
        with self._reader_lock:
            return self.reserve_name(key, self._reader.file_taken)

    def release_name(self, name: str) -> None:
        """Give a reserved name back: its file is known to the catalogue, or was never made."""
        with self.lock:
            self._reserved.discard(name)

    def discard_file(self, entry: Entry) -> None:
        """Remove a fork's file that no commit took, and give its name back."""
        self.files.discard_generation(entry.file, entry.generation)
        self.release_name(entry.file)

    def files_of(self, state: State) -> list[str]:
        """The files that go with a session when it is deleted; also one of which only a part was written."""
        file = state.file
        return self.claims.get(state.key) or ([file.name] if file.exists or file.torn_write else [])

    def drop(self, state: State, revision: int) -> None:
        """A session is deleted: forget its messages; `settle_files` removes its file. Hold the lock."""
        self._cached_bytes -= state.cached_bytes
        aside = revision if state.refusal else 0
        self._removals += [(name, aside) for name in self.files_of(state)]
        self.claims.pop(state.key, None)
        state.reset(state.file.name, revision)
        self._place(state)
        self.dirty[state.key] = state

    def adopt_fork(self, state: State, entry: Entry) -> None:
        """A fork is committed: its prepared file becomes the session's. Hold the lock."""
        self.files.install_generation(entry.file, entry.generation)
        fresh = state_of_entry(entry)
        state.file, state.base, state.filed, state.lines = fresh.file, fresh.base, fresh.filed, []

    def ready_to_replace(self, state: State) -> bool:
        """Look at a session's file for the last time: nothing that somebody else wrote may go with it."""
        try:
            self.files.check(state)
        except Refused as damaged:
            condemn(self, state, damaged.refusal)
            return False
        except OSError as error:
            if not self.is_full(error):
                raise
            return False
        return True

    def settle_files(self, states: Iterable[State]) -> None:
        """After a commit: remove the files of deleted sessions, and append to the others what they lack."""
        removals, self._removals = self._removals, []
        for name, aside in removals:
            if aside:
                self.files.put_away(name, aside)
            else:
                self.files.remove(name)
        for state in states:
            self.catch_up(state)

    def catch_up(self, state: State) -> None:
        """Append what a session's file lacks; a file that is not ours any more condemns the session."""
        try:
            self.files.catch_up(state, self.lock)
        except Refused as damaged:
            condemn(self, state, damaged.refusal)

    # The reading connection.

    def reading(self, read: Callable[[Reader], T]) -> T:
        """Read with the reading connection. Raises Refused if that meets damage."""
        with self._reader_lock, reading_journal():
            return read(self._reader)

    def close(self) -> None:
        """Close files and database."""
        self.files.close()
        self._reader.close()
        self.journal.close()


def _boot_id() -> str:
    """Which boot of which machine this is; "" if the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""

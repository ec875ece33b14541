"""The embedded engine: a directory of JSONL session files, with a journal. `docs/format.md` tells it.

This module is the engine's face: it takes submissions from the event loop to the committer's thread and back,
reads warm sessions on the loop and cold ones on a few threads, and owns start and stop. Deciding is
`committer`, files are `files`, checkpoints are `maintenance`, opening is `recovery`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import apsw

from sessionstored.engine import BackupItem, Page, Query, Refused, Reply, Request, Scrub, Slice
from sessionstored.engine.events import Event
from sessionstored.engine.feed import DEFAULT_FEED_LIMITS, Feed, FeedLimits, Old, cursor_expired
from sessionstored.engine.jsonl import feeding, pages
from sessionstored.engine.jsonl.backing_up import Backups
from sessionstored.engine.jsonl.committer import NEEDS_NO_ROOM, STOPPING, UNKNOWN, Committer, Job, StaleFork
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.files import FileChanged, Region, WrongBlock
from sessionstored.engine.jsonl.forks import prepare
from sessionstored.engine.jsonl.group import PreparedFork
from sessionstored.engine.jsonl.listing import page
from sessionstored.engine.jsonl.maintenance import Maintenance
from sessionstored.engine.jsonl.opening import open_vault, start_error
from sessionstored.engine.jsonl.scrubber import Scrubber
from sessionstored.engine.jsonl.state import State, journal_damaged
from sessionstored.engine.jsonl.store import Directory
from sessionstored.engine.watcher import Watcher
from sessionstored.leases import Lease
from sessionstored.rules import (
    DEFAULT_LIMITS,
    Append,
    Create,
    Fork,
    Head,
    Limits,
    Pop,
    Refusal,
    Replace,
    not_found,
)
from sessionstored.trusted import Disbelief

log = logging.getLogger(__name__)

_ATTEMPTS = 20
_REPLAY_BYTES = 1 << 20
"""How many bytes of journal rows are read at a time for a watcher who is behind."""
_FAILED_S_MAX = 2.0
"""How long calls wait for a commit that does not return, once storage failed elsewhere."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tuning:
    """Bounds of the embedded engine; each has a default that suits one machine."""

    cache_bytes_max: int = 256 << 20
    hot_sessions_max: int = 50_000
    queue_bytes_max: int = 64 << 20
    queue_requests_max: int = 65_536
    group_requests_max: int = 4096
    group_bytes_max: int = 8 << 20
    backlog_bytes: int = 32 << 20
    """Journal bytes that start a checkpoint early."""
    backlog_bytes_max: int = 256 << 20
    """Journal bytes at which appends wait, and then are refused."""
    pinned_bytes_max: int = 512 << 20
    """Bytes of messages that wait in memory for their files, beside the cache, at which they do, too."""
    reserve_bytes: int = 16 << 20
    """Free disk space that only deletions may use."""
    checkpoint_interval_s: float = 5.0
    backlog_wait_s: float = 5.0
    scrub_bytes_per_s_max: int = 8 << 20
    """How fast session files are compared with their checksums; 0: never."""
    scrub_interval_s: float = 24 * 3600
    feed: FeedLimits = DEFAULT_FEED_LIMITS


DEFAULT_TUNING = Tuning()


async def open_jsonl(
    data: Path,
    *,
    durability: str = "fsync",
    limits: Limits = DEFAULT_LIMITS,
    tuning: Tuning = DEFAULT_TUNING,
    accept_loss: bool = False,
    disk: Disk | None = None,
    vfs: str | None = None,
) -> "JsonlEngine":
    """Open a data directory, recovering what a crash left and adopting files that are new to it.

    Args:
        data: the directory; made, mode 0700, if it is missing. It may be a workspace that the seed wrote.
        durability: "fsync" or "os".
        limits: the bounds of decisions.
        tuning: the engine's own bounds.
        accept_loss: go on where the journal is lost or damaged.
        disk: what changes and flushes session files; for fault tests.
        vfs: name of the SQLite VFS below the journal; for fault tests.

    Raises:
        StartError: another daemon owns it, it cannot be written, or it is damaged.

    """
    loop = asyncio.get_running_loop()

    def opened() -> JsonlEngine:
        return JsonlEngine(data, loop, durability, limits, tuning, accept_loss, disk or Disk(), vfs)

    return await loop.run_in_executor(None, opened)


class JsonlEngine:
    """An open data directory."""

    name = "jsonl"

    def __init__(
        self,
        data: Path,
        loop: asyncio.AbstractEventLoop,
        durability: str,
        limits: Limits,
        tuning: Tuning,
        accept_loss: bool,
        disk: Disk,
        vfs: str | None,
    ) -> None:
        self.durability = durability
        self._loop, self._tuning = loop, tuning
        self._directory = Directory(data, disk)
        try:
            self._vault = open_vault(
                self._directory,
                durability=durability,
                limits=limits,
                cache_bytes_max=tuning.cache_bytes_max,
                hot_sessions_max=tuning.hot_sessions_max,
                accept_loss=accept_loss,
                disk=disk,
                vfs=vfs,
            )
        except BaseException:
            self._directory.close()
            raise
        self.store_id = self._vault.store.store_id
        vault = self._vault
        self.feed = Feed(f"{self.store_id} {vault.feed_id}", vault.row_id, self, tuning.feed)
        vault.publish = lambda row_id, events: self._publish(row_id, events)
        self._failed: asyncio.Future[str] = loop.create_future()
        self._committer = Committer(
            self._vault,
            group_requests_max=tuning.group_requests_max,
            group_bytes_max=tuning.group_bytes_max,
            reserve_bytes=tuning.reserve_bytes,
            on_fatal=self._on_fatal,
        )
        self._maintenance = Maintenance(
            self._vault,
            self._committer,
            interval_s=tuning.checkpoint_interval_s,
            feed_limits=tuning.feed,
        )
        self._scrubber = Scrubber(
            self._vault,
            self._committer,
            bytes_per_s_max=tuning.scrub_bytes_per_s_max,
            pass_interval_s=tuning.scrub_interval_s,
        )
        self._backups = Backups(self._vault, self._committer)
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="reader")
        self._copiers = ThreadPoolExecutor(2, thread_name_prefix="copier")
        self._queued_requests = self._queued_bytes = 0
        self._waiting: set[asyncio.Future[Sequence[Reply]]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._committer.start()
        try:
            self._maintenance.round()  # what was recovered is flushed anew before anybody is served
        except (apsw.Error, OSError) as error:
            self._committer.stop()
            self._release()
            raise start_error(self._directory, error) from error
        self._vault.leases.begin_anew(self._vault.clock_s())
        self._maintenance.start()
        self._scrubber.start()

    def _on_fatal(self, what: str) -> None:
        self._loop.call_soon_threadsafe(self._fail, what)

    def _fail(self, what: str) -> None:
        if not self._failed.done():
            self._failed.set_result(what)
            self._loop.call_later(_FAILED_S_MAX, self._give_up)

    def _give_up(self) -> None:
        """Tell who still waits: a disk that fails may hold up a commit for minutes."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(Refused(UNKNOWN))

    def announce(self, addresses: Sequence[str]) -> None:
        """Write the addresses into LOCK."""
        self._directory.announce(addresses)

    # Writing.

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        """Decide requests in order, and answer each once it is durable."""
        if not requests:
            return []
        if not any(isinstance(request.mutation, Fork) for request in requests):
            return list(await self._submit(requests))
        replies: list[Reply] = []
        for request in requests:  # a fork waits for what is before it, because it copies that
            if isinstance(request.mutation, Fork):
                replies += await self._fork(request, request.mutation)
            else:
                replies += await self._submit([request])
        return replies

    async def _submit(
        self,
        requests: Sequence[Request],
        fork: PreparedFork | None = None,
        obstacle: Refusal | None = None,
    ) -> Sequence[Reply]:
        pinned: list[State] = []
        queued = False
        try:
            for request in requests:
                await self._warm(request, pinned)
            size = sum(_size(request) for request in requests)
            await self._admit(requests, size)
            queued = True
            return await self._queue(requests, size, fork, obstacle)
        finally:
            if fork is not None and not queued:
                self._committer.run(lambda: self._committer.discard(fork))
            with self._vault.lock:
                for state in pinned:
                    state.pins -= 1

    def _queue(
        self,
        requests: Sequence[Request],
        size: int,
        fork: PreparedFork | None,
        obstacle: Refusal | None,
    ) -> asyncio.Future[Sequence[Reply]]:
        """Hand requests to the committer.

        Who awaits this keeps it nowhere: with an exception, whose traceback has the frame that awaits, that
        is a cycle, and keeps the requests until garbage is collected.
        """
        future: asyncio.Future[Sequence[Reply]] = self._loop.create_future()
        self._queued_requests += len(requests)
        self._queued_bytes += size
        self._idle.clear()
        self._waiting.add(future)

        def done(job: Job) -> None:
            self._loop.call_soon_threadsafe(self._answer, future, job)

        self._committer.put(Job(requests, size, done, fork, obstacle))
        return future

    def _answer(self, future: asyncio.Future[Sequence[Reply]], job: Job) -> None:
        self._queued_requests -= len(job.requests)
        self._queued_bytes -= job.size
        self._waiting.discard(future)
        if not self._queued_requests:
            self._idle.set()
        if self._vault.backlog_bytes > self._tuning.backlog_bytes:
            self._maintenance.nudge()
        if future.done():  # cancelled, or told that nobody knows
            return
        if job.error is not None:
            future.set_exception(job.error)
        else:
            future.set_result(job.replies)

    async def _admit(self, requests: Sequence[Request], size: int) -> None:
        """Let a submission in, or refuse it because a bound is reached."""
        tuning = self._tuning
        over_requests = self._queued_requests + len(requests) > tuning.queue_requests_max
        over_bytes = self._queued_bytes + size > tuning.queue_bytes_max
        if self._queued_requests and (over_requests or over_bytes):
            limit = tuning.queue_requests_max if over_requests else tuning.queue_bytes_max
            raise Refused(
                _overloaded(f"more than {limit} {'requests' if over_requests else 'bytes'} wait", limit)
            )
        deadline = self._loop.time() + tuning.backlog_wait_s
        makes_room = all(isinstance(request.mutation, NEEDS_NO_ROOM) for request in requests)
        while not makes_room and not self._committer.failure and (waiting := self._files_lack()):
            self._maintenance.nudge()
            if self._loop.time() > deadline:
                kind, limit = waiting
                raise Refused(_overloaded(f"more than {limit} {kind} wait for the session files", limit))
            await asyncio.sleep(0.02)
        if self._closing or self._committer.failure:  # the last thing looked at before the job is queued
            raise Refused(STOPPING)

    def _files_lack(self) -> tuple[str, int] | None:
        """What waits for the session files beyond its bound, and that bound."""
        tuning = self._tuning
        if self._vault.backlog_bytes > tuning.backlog_bytes_max:
            return "journal bytes", tuning.backlog_bytes_max
        if self._vault.pinned_bytes() > tuning.pinned_bytes_max:
            return "bytes in memory", tuning.pinned_bytes_max
        return None

    async def _warm(self, request: Request, pinned: list[State]) -> None:
        """Bring into memory, and pin, what a mutation needs, so that the committer need not read."""
        mutation = request.mutation
        if isinstance(mutation, Pop):
            await self._pin(mutation.key, lambda head: head.message_count - 1, pinned)
        elif isinstance(mutation, Replace) and mutation.delete_count is not None:
            end = mutation.start + mutation.delete_count
            await self._pin(mutation.key, lambda head: end, pinned)

    async def _pin(self, key: str, first: Callable[[Head], int], pinned: list[State]) -> None:
        """Pin a session with its messages from `first` on, unless they are larger than the cache."""
        vault = self._vault
        for _ in range(_ATTEMPTS):
            try:
                state = await self._hot(key)
                if state is None:
                    return
                with vault.lock:
                    if state.head is None or state.refusal is not None:
                        return
                    index = max(0, first(state.head))
                    base, seen, region = state.base, state.lines, vault.region(state)
                    if index >= base:
                        state.pins += 1
                        pinned.append(state)
                        return
                lines = await self._cold(state, region, index, base, 1 << 62)
            except FileChanged:
                with suppress(Refused):
                    await self._look_again(key)
                continue
            except Refused:
                return  # the decision says so
            vault.cache_read(state, seen, base, lines)
            if state.base > index:
                return

    async def _fork(self, request: Request, fork: Fork) -> Sequence[Reply]:
        """Write the fork's file first, then commit it; again if the source was rewritten meanwhile."""
        for _ in range(_ATTEMPTS):
            preparing = self._loop.run_in_executor(
                self._copiers, lambda: prepare(self._vault, self._committer, fork)
            )
            try:
                prepared = await asyncio.shield(preparing)
            except asyncio.CancelledError:
                preparing.add_done_callback(self._abandon)
                raise
            except Refused as refused:  # a copy of a call that was answered gets its answer all the same
                return await self._submit([request], obstacle=refused.refusal)
            except pages.DAMAGED as error:
                return await self._submit([request], obstacle=journal_damaged(error))
            except OSError as error:
                self._committer.fail(f"{type(error).__name__}: {error}")
                raise Refused(STOPPING) from error
            try:
                return await self._submit([request], prepared)
            except StaleFork:
                continue
        raise Refused(
            _overloaded(f"session {fork.source_key!r} is rewritten too often to be copied", _ATTEMPTS)
        )

    def _abandon(self, preparing: asyncio.Future[PreparedFork | None]) -> None:
        """Nobody waits for a fork any more: what was prepared for it goes."""
        prepared = None if preparing.cancelled() or preparing.exception() else preparing.result()
        if prepared is not None:
            self._committer.run(lambda: self._committer.discard(prepared))

    # Reading.

    async def read(self, key: str, select: Callable[[Head], tuple[int, int]], max_bytes: int) -> Slice:
        """Read a head and some of its messages, of one revision."""
        vault = self._vault
        for attempt in range(_ATTEMPTS):
            state = await self._hot(key)
            if state is None:
                raise Refused(not_found(key))
            with vault.lock:
                head, refusal, base, seen = state.head, state.refusal, state.base, state.lines
                if head is None or (refusal is None and vault.expired(head)):
                    raise Refused(not_found(key))
                if refusal is None:
                    start, stop = select(head)
                    region = vault.region(state) if start < min(stop, base) else None
            if refusal is not None:
                if attempt:
                    raise Refused(refusal)
                await self._look_again(key)  # somebody may have mended it
                continue
            if region is None:
                return Slice(head, start, _within(seen[start - base : stop - base], max_bytes))
            try:
                lines = await self._cold(state, region, start, min(stop, base), max_bytes)
            except FileChanged:
                await self._look_again(key)
                continue
            if start + len(lines) == base:
                vault.cache_read(state, seen, base, lines)
                lines += seen[: max(0, stop - base)]
            return Slice(head, start, _within(lines, max_bytes))
        raise Refused(_overloaded(f"session {key!r} is rewritten too often to be read", _ATTEMPTS))

    async def _hot(self, key: str) -> State | None:
        """A session's state, loaded if need be; None if it does not exist."""
        vault = self._vault
        with vault.lock:
            state = vault.hot(key)
        if state is not None:
            return state if state.head is not None else None
        for _ in range(_ATTEMPTS):
            try:
                return await self._read(lambda: vault.load(key))
            except FileChanged:
                await self._look_again(key)
        return None

    async def _look_again(self, key: str) -> None:
        """Have the committer look at a file that is not what it was: after a rewrite that is nothing."""
        await asyncio.shield(asyncio.wrap_future(self._committer.look_again(key)))

    async def _cold(self, state: State, region: Region, start: int, stop: int, max_bytes: int) -> list[bytes]:
        """Messages from a file. Raises FileChanged if it was written anew meanwhile."""
        try:
            return await self._read(lambda: self._vault.read_cold(state, region, start, stop, max_bytes))
        except WrongBlock as wrong:
            generation, block = wrong.generation, wrong.block
            task = self._committer.confirm(state.key, generation, block)
            await asyncio.shield(asyncio.wrap_future(task))
            raise

    async def _read(self, work: Callable[[], T]) -> T:
        try:
            return await self._loop.run_in_executor(self._readers, work)
        except pages.DAMAGED as error:
            raise Refused(journal_damaged(error)) from error

    async def lease(self, key: str) -> Lease | None:
        """The lease of a session that is in force."""
        return self._vault.leases.in_force(key, self._vault.clock_s())

    def clock_s(self) -> float:
        """The store's own clock."""
        return self._vault.clock_s()

    async def list(self, query: Query) -> Page:
        """One page of heads."""
        return await self._read(lambda: page(self._vault, query))

    # Watching.

    def _publish(self, row_id: int, events: Sequence[Event]) -> None:
        """Tell watchers what a row changed. From the committer's thread, in the rows' order."""
        self._loop.call_soon_threadsafe(self.feed.publish, row_id, events)

    def cursor(self) -> bytes:
        """Where a watch goes on."""
        return self.feed.cursor()

    def watch(self, prefix: str | None, keys: Collection[str], cursor: bytes) -> Watcher:
        """Begin to watch."""
        return self.feed.watch(prefix, keys, cursor)

    def end_watches(self, refusal: Refusal) -> None:
        """End every watch."""
        self.feed.close(refusal)

    async def replay(self, after: int, through: int, concerns: Callable[[str], bool], bytes_max: int) -> Old:
        """The events of journal rows, read on a reader's thread."""

        def read() -> Old:
            kept = self._vault.reading(lambda reader: reader.feed_rows(after, through, _REPLAY_BYTES))
            if kept is None:
                raise Refused(cursor_expired())
            return Old(*feeding.events(kept, concerns, bytes_max))

        return await self._read(read)

    async def count(self) -> int:
        """How many sessions there are."""
        return self._vault.session_count

    def disbelief(self) -> Disbelief | None:
        """What is known of a wall clock that sessions do not expire by."""
        return self._vault.trusted.disbelief()

    def scrubbed(self) -> Scrub:
        """What the scrubber verified since the start."""
        return self._scrubber.status()

    def backup(self) -> AsyncGenerator[Sequence[BackupItem], None]:
        """Copy the whole store as it is at one moment."""
        return self._backups.stream()

    async def failed(self) -> str:
        """Wait until storage has failed for good."""
        return await asyncio.shield(self._failed)

    # Stopping.

    async def close(self) -> None:
        """Finish what was taken, checkpoint, mark the store clean if all is in its files, release it."""
        if self._closing:
            return
        self._closing = True
        self.feed.close(STOPPING)
        await self._idle.wait()
        await self._loop.run_in_executor(None, self._close)

    def _close(self) -> None:
        self._backups.close()
        self._scrubber.stop()
        self._maintenance.stop()
        self._maintenance.finish()
        self._release()

    def _release(self) -> None:
        self._readers.shutdown()
        self._copiers.shutdown()
        try:
            self._vault.close()
        finally:
            self._directory.close()


def _within(lines: Sequence[bytes], max_bytes: int) -> Sequence[bytes]:
    """The first lines within a size, line ends included; one at least."""
    size = 0
    for n, line in enumerate(lines):
        size += len(line) + 1
        if size > max_bytes and n:
            return lines[:n]
    return lines


def _size(request: Request) -> int:
    """About how many bytes a request takes in memory and in the journal."""
    mutation = request.mutation
    lines = mutation.messages if isinstance(mutation, Create | Append | Replace) else ()
    return 512 + sum(map(len, lines)) + len(lines)


def _overloaded(what: str, limit: int) -> Refusal:
    return Refusal("OVERLOADED", f"{what}; nothing was stored; try again later", {"limit": str(limit)})

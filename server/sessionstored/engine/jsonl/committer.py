"""The committer: one thread takes all waiting requests, decides them, commits one journal row, then answers.

The commit alone decides. A group is settled against drafts, so a refusal that rests on a change of the same
group is published only if that change is. After the commit: states, then answers (both visible to readers in
that order), then the lines go into the session files. A full disk refuses before the commit or leaves files
behind; any other failure is fatal, and what was under way has an unknown outcome.

Other threads run short tasks here, between two groups, so nothing else writes the database or the states.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import apsw

from sessionstored.engine import Refused, Reply, Request
from sessionstored.engine.jsonl.damage import confirm
from sessionstored.engine.jsonl.files import FULL
from sessionstored.engine.jsonl.group import Group, PreparedFork
from sessionstored.engine.jsonl.state import Draft
from sessionstored.engine.jsonl.store import with_ceiling
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.engine.settle import expired_in_queue
from sessionstored.leases import Release, Renew
from sessionstored.rules import Delete, Expire, Refusal

log = logging.getLogger(__name__)
T = TypeVar("T")

UNKNOWN = Refusal(
    "OUTCOME_UNKNOWN",
    "storage failed while the call was being committed: it may or may not be applied; "
    "send the very same call again to find out",
)
STOPPING = Refusal("SHUTTING_DOWN", "the daemon is stopping; nothing was stored")


NEEDS_NO_ROOM = (Delete, Expire, Release, Renew)
"""What is decided also while the disk is full, or too much waits for the session files."""


_SPARE_BYTES_MIN = 4 << 20


class StaleFork(Exception):
    """The source changed since the fork's file was written: write it again."""


@dataclass(slots=True)
class Job:
    """Requests that one caller waits for."""

    requests: Sequence[Request]
    size: int
    done: Callable[["Job"], None]
    fork: PreparedFork | None = None
    obstacle: Refusal | None = None
    """Why nothing new can be decided: what a fork copies cannot be read, or finds no room."""
    replies: Sequence[Reply] = ()
    error: Exception | None = None


class Committer:
    """The thread that commits."""

    def __init__(
        self,
        vault: Vault,
        *,
        group_requests_max: int,
        group_bytes_max: int,
        reserve_bytes: int,
        on_fatal: Callable[[str], None],
    ) -> None:
        self._vault = vault
        self._group_requests_max, self._group_bytes_max = group_requests_max, group_bytes_max
        self._reserve_bytes = reserve_bytes
        self._on_fatal = on_fatal
        self._jobs: deque[Job] = deque()
        self._tasks: deque[tuple[Callable[[], object], Future[object], bool]] = deque()
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self.failure = ""
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """Queue a job; `job.done` is called on this thread once its replies or error are set."""
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()

    def run(self, task: Callable[[], T], *, fatal: bool = False) -> "Future[T]":
        """Run a short task between two groups. Tasks go before jobs.

        Args:
            task: what to do.
            fatal: if it fails, but for a full disk, nothing is committed any more.

        """
        future: Future[T] = Future()
        with self._wake:
            if self._ended:
                future.set_exception(Refused(STOPPING))
            else:
                self._tasks.append((task, future, fatal))  # type: ignore[arg-type]
                self._wake.notify()
        return future

    def look_again(self, key: str) -> "Future[None]":
        """Look between two groups at a session's file, which is not what a reader expected.

        The future fails with Refused, also once storage has failed. A disk that fails at this, and is not
        just full, stops everything: what was adopted there would not be durable.
        """
        return self.run(lambda: self._looking(lambda: self._vault.readopt(key)))

    def confirm(self, key: str, generation: int, block: int) -> "Future[bool]":
        """Look between two groups at a block that a reader found wrong; fails as `look_again` does."""
        return self.run(lambda: self._looking(lambda: confirm(self._vault, key, generation, block)))

    def _looking(self, look: Callable[[], T]) -> T:
        try:
            return look()
        except (apsw.Error, OSError) as error:
            if is_disk_full(error):
                raise Refused(self.full()) from error
            self.fail(f"{type(error).__name__}: {error}")
            raise Refused(STOPPING) from error

    def stop(self) -> None:
        """Commit what is queued, then end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def fail(self, what: str) -> None:
        """Storage failed: nothing is committed any more."""
        if not self.failure:
            self.failure = what
            log.critical("storage failed, the daemon stops: %s", what)
            self._on_fatal(what)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # a defect: without this thread nothing can be written
            log.exception("the committer ended")
            self.fail(f"{type(error).__name__}: {error}")
            raise

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._jobs or self._tasks or self._stopping):
                    self._wake.wait()
                tasks, self._tasks = self._tasks, deque()
                jobs = self._take() if not tasks else []
                if not jobs and not tasks and self._stopping:
                    self._ended = True
                    return
            for task, future, fatal in tasks:
                self._run_task(task, future, fatal)
            if jobs:
                self._run_group(jobs)

    def _take(self) -> list[Job]:
        """The jobs of the next group: within its bounds, one at least."""
        taken: list[Job] = []
        count = size = 0
        while self._jobs:
            job = self._jobs[0]
            count += len(job.requests)
            size += job.size
            if taken and (count > self._group_requests_max or size > self._group_bytes_max):
                break
            taken.append(self._jobs.popleft())
            if job.fork is not None:
                break  # what follows may need the fork's file
        return taken

    def _run_task(self, task: Callable[[], object], future: "Future[object]", fatal: bool) -> None:
        if not future.set_running_or_notify_cancel():
            return  # nobody waits for it any more
        try:
            if self.failure:
                raise OSError(self.failure) if fatal else Refused(STOPPING)
            result = task()
        except BaseException as error:  # what is not fatal is its owner's business: see its future
            if fatal and not is_disk_full(error):
                self.fail(f"{type(error).__name__}: {error}")
            future.set_exception(error)
        else:
            future.set_result(result)

    def _run_group(self, jobs: list[Job]) -> None:
        if self.failure:
            return self._refuse(jobs, STOPPING)
        group = Group(self._vault, time.time_ns() // 1000, self._vault.clock_s())
        try:
            self._decide(group, jobs)
            self._commit(group)
        except (apsw.Error, OSError) as error:
            if not is_disk_full(error):
                return self._fatal(jobs, error)  # it may be committed all the same: what it needs stays
            self._drop(group, jobs)
            return self._refuse_full(jobs)
        except Exception as error:  # a defect: nothing of the group was stored
            log.exception("a group could not be decided")
            self._drop(group, jobs)
            for job in jobs:
                job.error = error
                job.done(job)
            return None
        try:
            self._publish(group)
        except Exception as error:
            return self._fatal(jobs, error)  # it is committed, but cannot be shown
        for job in jobs:
            job.done(job)
        self._discard_forks(jobs, {entry.file for entry in group.entries})
        try:
            self._vault.settle_files([draft.state for draft in group.drafts.values() if draft.state.dirty])
        except Exception as error:
            log.exception("a session file could not be written")
            self.fail(f"{type(error).__name__}: {error}")
        return None

    def _refuse_full(self, jobs: list[Job]) -> None:
        """Nothing of a group was stored, because the disk is full; if that cannot be told, storage failed."""
        try:
            refusal = self.full()
        except OSError as error:
            return self._fatal(jobs, error)
        return self._refuse(jobs, refusal)

    def _fatal(self, jobs: list[Job], error: Exception) -> None:
        """Storage failed while a group was committed: the daemon ends, and the outcome is unknown."""
        log.error("a commit failed", exc_info=error)
        self.fail(f"{type(error).__name__}: {error}")
        return self._refuse(jobs, UNKNOWN)

    def _refuse(self, jobs: list[Job], refusal: Refusal) -> None:
        for job in jobs:
            job.error = Refused(refusal)
            job.done(job)

    def _drop(self, group: Group, jobs: list[Job]) -> None:
        """Nothing of a group was stored: give back the names that it reserved."""
        for draft in group.drafts.values():
            if draft.file and draft.file != draft.state.file.name:
                self._vault.release_name(draft.file)
        self._discard_forks(jobs, set())

    def _discard_forks(self, jobs: list[Job], used: set[str]) -> None:
        """Remove what was prepared for forks that were refused, or answered before."""
        for job in jobs:
            if job.fork is not None and job.fork.entry.file not in used:
                self.discard(job.fork)

    def discard(self, fork: PreparedFork) -> None:
        """Remove what was prepared for a fork. On this thread."""
        try:
            self._vault.discard_file(fork.entry)
        except OSError as error:
            self.fail(f"{type(error).__name__}: {error}")

    def is_full(self, size: int) -> bool:
        """Whether there is no room for so many bytes beside the reserve."""
        return self._vault.free_bytes() < self._reserve_bytes + size

    def is_nearly_full(self) -> bool:
        """Whether there is so little room that nothing is to be kept that somebody can do without."""
        return self.is_full(max(self._reserve_bytes, _SPARE_BYTES_MIN))

    def log_fits(self) -> bool:
        """Whether the log can be moved into the database. On this thread.

        If it does not fit, SQLite takes what room there is before it finds out: that is kept for deletions.
        """
        vault = self._vault
        return vault.free_bytes() >= vault.journal.growth_bytes()

    def full(self) -> Refusal:
        """The refusal for a full disk."""
        free = self._vault.free_bytes()
        return Refusal(
            "STORAGE_FULL",
            f"the disk of the data directory is full ({free} bytes free, "
            f"{self._reserve_bytes} are kept back): nothing was stored; make room, no restart is needed",
            {"free_bytes": str(free), "reserve_bytes": str(self._reserve_bytes)},
        )

    def _decide(self, group: Group, jobs: list[Job]) -> None:
        """Settle every request of a group against its drafts."""
        full = self.is_full(sum(job.size for job in jobs))
        monotonic_s = time.monotonic()
        for job in jobs:
            replies = []
            for request in job.requests:
                obstacle = job.obstacle
                if obstacle is None and full and not isinstance(request.mutation, NEEDS_NO_ROOM):
                    obstacle = self.full()
                if obstacle is None and request.deadline_s is not None and monotonic_s > request.deadline_s:
                    obstacle = expired_in_queue()
                if obstacle is None and not group.fork_is_fresh(request, job.fork):
                    job.error = StaleFork()
                    break
                replies.append(group.settle(request, job.fork, obstacle))
            job.replies = replies

    def _commit(self, group: Group) -> None:
        """Commit a group's row. What fails before the commit itself has stored nothing."""
        vault = self._vault
        if group.row.parts:
            if vault.revision > vault.store.revision_ceiling:
                vault.write_store(with_ceiling(vault.store, vault.revision))
            vault.commit_row(group.row, group.clock_s, group.entries, group.leases)

    def _publish(self, group: Group) -> None:
        """Make a committed group what readers see."""
        with self._vault.lock:
            for draft in group.drafts.values():
                self._publish_draft(draft)
            windows = {client: group.windows[client] for client in group.recorded}
            self._vault.windows.publish(windows, group.requests)
            self._vault.leases.update(group.leases)
            # Within the lock: whoever sees what changed finds that its watchers will be told already.
            if group.row.parts:
                self._vault.publish(self._vault.row_id, group.events)

    def _publish_draft(self, draft: Draft) -> None:
        """Make a draft the state that readers see."""
        vault, state = self._vault, draft.state
        if draft.head is state.head and not draft.fresh:
            return
        was = state.head is not None
        if draft.fresh or draft.keep < state.count:
            vault.to_erase(vault.row_id)
        if draft.fresh and was:
            vault.drop(state, draft.deleted)
        vault.session_count += (draft.head is not None) - was
        if draft.head is None:
            if draft.file and draft.file != state.file.name:
                vault.release_name(draft.file)  # made and deleted within the group
            return
        if draft.forked is not None:
            vault.adopt_fork(state, draft.forked)
        elif not state.file.exists:
            state.file.name = draft.file or state.file.name
        size = state.cached_bytes
        state.apply(draft.keep, draft.added, draft.head)
        vault.cached(state, state.cached_bytes - size)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of SQLite or of a file says no more than that the disk is full."""
    return isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno in FULL)

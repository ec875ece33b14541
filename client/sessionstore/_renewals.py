"""The renewal of leases in the background: one thread for all turns of a sync client, a task per async turn.

The thread is there while there are turns, and delays no exit. A forked child begins without turns and
without a thread: it never renews its parent's leases.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable

from sessionstore._calls import age_clock
from sessionstore._fork import Forkable, watch
from sessionstore._operations import Operation
from sessionstore._turn import Holding
from sessionstore.errors import SessionStoreError

# An attempt to renew one lease takes at most this part of the shortest ttl, so that the others get theirs.
_ATTEMPTS_PER_TTL = 4


class Renewals(Forkable):
    """The turns of one sync client, and the thread that renews their leases."""

    def __init__(self, run: Callable[[Operation[None]], None]) -> None:
        self._run = run
        self._begin()
        watch(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()  # a signal handler must not wait for the thread that it interrupted
        self._changed = threading.Condition(self._lock)
        self._holdings: list[Holding] = []
        self._thread: threading.Thread | None = None

    def _after_fork_in_child(self) -> None:
        """The parent's turns are not the child's."""
        self._begin()

    def add(self, holding: Holding) -> None:
        """Renew a lease from now on. RuntimeError if there can be no thread; `end` is due also then."""
        with self._lock:
            self._holdings.append(holding)
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="sessionstore-turns", daemon=True)
                thread.start()  # which may fail, and then the next turn tries again
                self._thread = thread
            self._changed.notify_all()

    def end(self, holding: Holding) -> None:
        """Renew a lease no more, and give it back if it is still held."""
        with self._lock:
            if holding in self._holdings:  # else it was lost, or is that of the parent
                self._holdings.remove(holding)
            self._changed.notify_all()
        held = not holding.lost
        holding.end()
        if held:
            try:
                self._run(holding.release())
            except RuntimeError:  # the client was closed within the turn
                return

    def _work(self) -> None:
        while True:
            with self._lock:
                self._holdings = [holding for holding in self._holdings if not holding.lost]
                if not self._holdings:
                    self._thread = None
                    return
                holding = min(self._holdings, key=lambda each: each.due_s)
                left_s = holding.due_s - age_clock()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                within_s = min(each.lease.ttl_s for each in self._holdings) / _ATTEMPTS_PER_TTL
            try:
                self._run(holding.renew(within_s))
            except SessionStoreError:
                continue  # it is lost, or due again soon
            except RuntimeError:  # the client was closed: nobody renews it any more
                with self._lock:
                    self._holdings = [each for each in self._holdings if each is not holding]


class AsyncRenewals:
    """The turns of one async client."""

    def __init__(self, run: Callable[[Operation[None]], Awaitable[None]]) -> None:
        self._run = run
        self._tasks: dict[Holding, asyncio.Task[None]] = {}

    def add(self, holding: Holding) -> None:
        """Renew a lease from now on."""
        self._tasks[holding] = asyncio.create_task(self._work(holding))

    async def end(self, holding: Holding) -> None:
        """Renew a lease no more, and give it back if it is still held."""
        self._tasks.pop(holding).cancel()
        held = not holding.lost
        holding.end()
        if held:
            try:
                await self._run(holding.release())
            except RuntimeError:  # the client was closed within the turn
                return

    async def _work(self, holding: Holding) -> None:
        while not holding.lost:
            await asyncio.sleep(max(0.0, holding.due_s - age_clock()))
            try:
                await self._run(holding.renew(holding.lease.ttl_s / _ATTEMPTS_PER_TTL))
            except SessionStoreError:
                continue  # it is lost, or due again soon
            except RuntimeError:  # the client was closed: nobody renews it any more
                return

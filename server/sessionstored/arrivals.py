"""The bound on requests that are on their way in: gRPC holds what has arrived of each, and tells no size.

A call takes a place before its message is read, and gives it back when the message is there; so what is half
there is bounded in memory, by the number of places and the longest message. Others wait for a place, in
their order. A sender who takes too long while others wait, and nobody's message is finished either, is cut
off, and told so: else a few who send a byte now and then would keep everybody out. One on a slow link beside
others who come and go is left alone. Small messages are there at once, and never notice.

Knows tasks of one event loop, and nothing of messages or gRPC.
"""

import asyncio
from collections import OrderedDict

_Task = asyncio.Task[object]
_SECOND_LOOK_S = 0.1
_PATIENCE_S_MIN = 0.2


class Arrivals:
    """The places of one server."""

    def __init__(self, *, places: int, waiting_max: int, patience_s: float) -> None:
        """Bound the messages under way.

        Args:
            places: how many may be under way at a time.
            waiting_max: how many calls may wait; more are let through, for the bound on calls to refuse.
            patience_s: how long a message may take, and no other be finished, while another call waits; less
                if more do, or for long.

        """
        self._places, self._waiting_max, self._patience_s = places, waiting_max, patience_s
        self._under_way: OrderedDict[_Task, float] = OrderedDict()
        """Task -> since when, the oldest first."""
        self._waiting: OrderedDict[_Task, tuple[float, asyncio.Future[None]]] = OrderedDict()
        """Task -> since when, and what is done when it has a place; the first in line first."""
        self._cut_off: set[_Task] = set()
        self._finished_s = 0.0
        """When a message was there the last time."""

    async def begin(self) -> None:
        """Take a place for the message of this task's call, once there is one."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._under_way) < self._places:
            self._take(task)
        elif len(self._waiting) < self._waiting_max:
            await self._wait(task)

    def arrived(self) -> None:
        """The message of this task's call is there."""
        task = asyncio.current_task()
        if task is not None and task in self._under_way:
            self._finished_s = asyncio.get_running_loop().time()
            self._leave(task)

    def was_cut_off(self) -> bool:
        """Whether this task was cancelled here, because its message took too long."""
        return asyncio.current_task() in self._cut_off

    def _take(self, task: _Task) -> None:
        self._under_way[task] = asyncio.get_running_loop().time()
        task.add_done_callback(self._leave)  # the caller may go away before its message is there

    def _leave(self, task: _Task) -> None:
        if self._under_way.pop(task, None) is None:
            return
        if self._waiting:
            following, (_, place) = self._waiting.popitem(last=False)
            self._take(following)
            place.set_result(None)

    async def _wait(self, task: _Task) -> None:
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self._waiting[task] = loop.time(), place
        suspect: _Task | None = None
        try:
            while not place.done():
                oldest, since_s = next(iter(self._under_way.items()))
                left_s = max(since_s, self._finished_s) + self._patience() - loop.time()
                if left_s > 0:
                    await asyncio.wait((place,), timeout=left_s)
                elif suspect is not oldest:  # perhaps it is this loop that was slow: look again
                    suspect = oldest
                    await asyncio.wait((place,), timeout=_SECOND_LOOK_S)
                else:
                    self._cut_off.add(oldest)
                    oldest.add_done_callback(self._cut_off.discard)
                    oldest.cancel()
                    self._leave(oldest)
        finally:
            self._waiting.pop(task, None)

    def _patience(self) -> float:
        """How long a message may take now: the less, the more calls wait, and the longer the first does."""
        (first_s, _) = next(iter(self._waiting.values()))
        left_s = self._patience_s - (asyncio.get_running_loop().time() - first_s)
        return max(min(_PATIENCE_S_MIN, self._patience_s), left_s / (1 + len(self._waiting) / self._places))

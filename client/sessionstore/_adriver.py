"""The async driver: runs operations over grpc.aio, one attempt after the other. For one event loop.

It only waits; `_calls` decides. It is `_driver` with ``await``, and without threads: what a lock guards there
is guarded here by the loop itself.
"""

import asyncio
import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from sessionstore._astreams import AsyncStream
from sessionstore._calls import BATCH_BYTES_MAX, Attempts, Window, age_clock, too_many_calls
from sessionstore._driver import (
    DRAIN_S,
    PROBE_S,
    TARGET_PATIENCE_S,
    ChannelGoneError,
    answered,
    callables,
    nobody,
    pause_s,
)
from sessionstore._fork import enable_fork_support
from sessionstore._mirror import Bounds, Mirror
from sessionstore._near import AsyncKeeper
from sessionstore._operations import INFO, WATCH, Operation, Rpc, Value
from sessionstore._targets import OPTIONS, grpc_target
from sessionstore.errors import ConflictError, OutcomeUnknownError, SessionStoreError, from_rpc_error


class AsyncConnection:
    """The channel to the first target that answers. After close, nothing is ever ready."""

    def __init__(self, targets: tuple[str, ...]) -> None:
        self._targets = targets
        self._turn = 0
        self._lock = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None
        self._calls: dict[str, Any] = {}
        self._ready = False
        self.closed = False
        self.batch_bytes_max = BATCH_BYTES_MAX

    async def ready(self, timeout_s: float) -> bool:
        """Wait until a daemon answers; False if none does in time."""
        if self._ready:
            return True
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                while not self._ready and not self.closed:
                    self._ready = await self._probe(timeout_s)
        except TimeoutError:
            return False
        return self._ready

    async def _probe(self, left_s: float) -> bool:
        """Ask the target whose turn it is; if it does not answer, the next one gets its turn."""
        if self._channel is None:
            enable_fork_support()
            target = grpc_target(self._targets[self._turn])
            self._channel = grpc.aio.insecure_channel(target, OPTIONS)
            self._calls = callables(self._channel)
        alone = len(self._targets) == 1
        patience_s = PROBE_S if alone else TARGET_PATIENCE_S
        begun_s = time.monotonic()
        try:
            info = await self._calls[INFO.name](INFO.request(), timeout=patience_s, wait_for_ready=alone)
            self.batch_bytes_max = info.limits.batch_bytes_max or BATCH_BYTES_MAX
            return True
        except grpc.RpcError as error:
            if answered(error):
                return True
        except (asyncio.CancelledError, grpc.aio.UsageError):
            if _task_is_cancelled() or not self.closed:
                raise
            return False
        if not alone:
            channel, self._channel, self._calls = self._channel, None, {}
            self._turn = (self._turn + 1) % len(self._targets)
            await channel.close()
        if self._turn == 0:
            await asyncio.sleep(pause_s(begun_s, left_s, alone=alone))
        return False

    def lost(self) -> None:
        """An attempt ended without a daemon's own answer: ask before the next one."""
        self._ready = False

    async def send(self, rpc: Rpc, timeout_s: float) -> Any:
        """One attempt. Raises grpc.RpcError; ChannelGoneError if another task gave the target up."""
        calls = self._calls
        if rpc.method.name not in calls:
            raise ChannelGoneError
        try:
            call = calls[rpc.method.name](rpc.request, timeout=timeout_s)
            return [reply async for reply in call] if rpc.method.streams else await call
        except grpc.aio.UsageError:
            if calls is self._calls and not self.closed:
                raise
            raise ChannelGoneError from None
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            # Closing a channel cancels its calls: to the caller a lost connection, and no cancellation.
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, empty, empty, "channel closed") from None

    def open(self) -> AsyncStream:
        """A Watch call. Raises ChannelGoneError as `send` does."""
        calls = self._calls
        if WATCH.name not in calls:
            raise ChannelGoneError
        try:
            return AsyncStream(calls[WATCH.name]())
        except grpc.aio.UsageError:
            if calls is self._calls and not self.closed:
                raise
            raise ChannelGoneError from None

    async def close(self) -> None:
        """Give up what is under way, and the channel."""
        self.closed = True
        self._ready = False
        if self._channel is not None:
            await self._channel.close()


def _task_is_cancelled() -> bool:
    """Whether somebody cancelled the task that runs this."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncDriver:
    """What runs the operations of one async client."""

    def __init__(self, targets: tuple[str, ...], timeout_s: float, near: Bounds | None = None) -> None:
        self.guard = threading.RLock()  # never waited for: handles take it around plain computation
        self._targets = targets
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._window = Window()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._under_way = 0
        self._ended = asyncio.Event()
        self._connection = AsyncConnection(targets)
        self.mirror = Mirror(near or Bounds(), age_clock, self.guard)
        self._keeper = AsyncKeeper(self.mirror, self)

    def check(self) -> None:
        """Raise RuntimeError if this client is closed, or in a process or a loop that it cannot work in."""
        if self._pid != os.getpid():
            raise RuntimeError(
                "this AsyncSessionStore was made before a fork and works in the parent only; "
                "make one in the child"
            )
        if self._connection.closed:
            raise RuntimeError("this AsyncSessionStore is closed")
        self._check_loop()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("this AsyncSessionStore belongs to another event loop; make one for each loop")

    async def run(self, operation: Operation[Value]) -> Value:
        """Run an operation to its value. Raises SessionStoreError, or RuntimeError as `check` does."""
        self.check()
        self._under_way += 1
        try:
            rpc = next(operation)
            while True:
                try:
                    reply = await self._call(rpc)
                except SessionStoreError as error:
                    rpc = operation.throw(error)
                else:
                    rpc = operation.send(reply)
        except StopIteration as end:
            value: Value = end.value
            return value
        except (OutcomeUnknownError, ConflictError) as error:
            error._run = self.run
            raise
        finally:
            self._under_way -= 1
            if self._connection.closed and not self._under_way:
                self._ended.set()

    @property
    def closed(self) -> bool:
        """Whether the client was closed."""
        return self._connection.closed

    @property
    def timeout_s(self) -> float:
        """Seconds per call."""
        return self._timeout_s

    async def open_stream(self, patience_s: float) -> AsyncStream:
        """A Watch call, as soon as somebody answers. Raises UnavailableError if none does in time."""
        self.check()
        connection = self._connection
        connection.lost()  # a stream that ended, or none yet: ask before the next one
        if not await connection.ready(patience_s):
            raise nobody(self._targets)
        try:
            return connection.open()
        except ChannelGoneError:
            raise nobody(self._targets) from None

    async def close(self) -> None:
        """Wait a little for what was begun, then disconnect. Again, or in a forked child: nothing.

        Belongs on the client's loop, as long as that is not closed; else RuntimeError, and nothing is closed.
        What follows an acknowledged write must not deny it: so whole operations are waited for, not calls.
        """
        if self._connection.closed or self._pid != os.getpid():
            return
        if self._loop is None or not self._loop.is_closed():
            self._check_loop()
        elif self._under_way:  # and never ends; grpc cannot even cancel it, so the channel stays as it is
            self._connection.closed = True
            return
        self._connection.closed = True
        try:
            await self._keeper.close()
            if self._under_way:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), DRAIN_S)
        finally:
            await self._connection.close()

    async def _call(self, rpc: Rpc) -> Any:
        """Make one call, in as many attempts as it takes, and keep its identity's books."""
        attempts = Attempts(rpc, self._timeout_s, time.monotonic())
        await self._enter(rpc, attempts)
        try:
            reply = await self._attempt(rpc, attempts)
        except BaseException as error:
            self._leave(rpc, error)
            self.mirror.missed(rpc, error)
            raise
        self._leave(rpc, None)
        self.mirror.heard(rpc, reply)
        return reply

    async def _attempt(self, rpc: Rpc, attempts: Attempts) -> Any:
        connection = self._connection
        while True:
            try:
                if not await connection.ready(attempts.remaining_s(time.monotonic())):
                    raise attempts.unreachable(self._targets, closed=connection.closed)
                attempts.before(age_clock())
                return await connection.send(rpc, attempts.remaining_s(time.monotonic()))
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                if failure.reason.startswith("GRPC_"):
                    connection.lost()
                if connection.closed:
                    attempts.stop()
                delay_s = attempts.failed(failure, time.monotonic(), connection.batch_bytes_max)
            except ChannelGoneError:
                connection.lost()
                continue
            await asyncio.sleep(delay_s)

    async def _enter(self, rpc: Rpc, attempts: Attempts) -> None:
        """Give a change its identity; waits while the window is full."""
        if rpc.ticket is not None:
            rpc.ticket.resume()
        while rpc.method.mutates and rpc.ticket is None:
            rpc.ticket = self._window.begin(age_clock())
            if rpc.ticket is not None:
                return
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                async with asyncio.timeout(attempts.remaining_s(time.monotonic())):
                    await turn
            except TimeoutError:
                raise too_many_calls(self._timeout_s) from None

    def _leave(self, rpc: Rpc, error: BaseException | None) -> None:
        if rpc.ticket is None:
            return
        rpc.ticket.settle(error)
        room = max(1, self._window.room())
        while room and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1

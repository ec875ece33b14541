"""What keeps the near cache in step: a thread of a sync client, a task of an async one, with a Watch stream.

Neither is there before the first session is kept. Neither keeps its client alive, or the process: the thread
is a daemon, and both end with the client. `_mirror` knows what to send and what the answers mean; this waits.
"""

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sessionstore._astreams import AsyncStream
from sessionstore._mirror import Mirror
from sessionstore._streams import Requests, Stream
from sessionstore.errors import SessionStoreError

if TYPE_CHECKING:
    from sessionstore._adriver import AsyncDriver
    from sessionstore._driver import Driver

_PATIENCE_S = 0.5
_ENDED = "ENDED"


class Keeper:
    """The thread of one sync client."""

    def __init__(self, mirror: Mirror, driver: "Driver") -> None:
        self._mirror = mirror
        self._driver = weakref.ref(driver)
        self._over = threading.Event()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self._requests: Requests | None = None
        self._stream: Stream | None = None
        self._end = weakref.finalize(driver, self.stop)
        mirror.wake = self.wake

    def wake(self) -> None:
        """There is something to send; the first time, begin."""
        self._woken.set()
        requests = self._requests
        if requests is not None:
            requests.wake()
        if self._thread is None and not self._over.is_set():
            thread = threading.Thread(target=self._serve, name="sessionstore near cache", daemon=True)
            self._thread = thread
            with suppress(RuntimeError):  # the interpreter is ending: what is read is simply not kept in step
                thread.start()

    def stop(self) -> None:
        """End, and keep nothing any more. From any thread, also more than once."""
        self._mirror.clear()
        self._over.set()
        self._woken.set()
        if self._requests is not None:
            self._requests.end()
        if self._stream is not None:
            self._stream.cancel()

    def leave(self) -> None:
        """In a forked child: the thread and the stream are the parent's, and their locks may be held."""
        self._end.detach()
        if self._stream is not None:
            self._stream.cancel()  # which, in a child, only keeps it

    def _serve(self) -> None:
        while not self._over.is_set():
            self._woken.clear()
            if not self._mirror.open():
                self._woken.wait()
                continue
            delay_s = self._mirror.broke(self._stream_on())
            self._over.wait(delay_s)

    def _stream_on(self) -> str:
        """Have one stream, as long as it lasts; why it ended."""
        self._requests = requests = Requests(self._mirror.take)
        try:
            stream = self._open(requests)
            if stream is None:
                return _ENDED
            while not self._over.is_set():
                self._mirror.received(next(stream))
            return _ENDED
        except StopIteration:
            return _ENDED
        except SessionStoreError as error:
            return error.reason
        finally:
            requests.end()
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.cancel()

    def _open(self, requests: Requests) -> Stream | None:
        driver = self._driver()
        if driver is None or driver.closed:
            return None
        self._stream = driver.open_stream(requests, _PATIENCE_S)
        return self._stream


class AsyncKeeper:
    """The task of one async client, and one beside it that sends."""

    def __init__(self, mirror: Mirror, driver: "AsyncDriver") -> None:
        self._mirror = mirror
        self._driver = weakref.ref(driver)
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        weakref.finalize(driver, self._stop)
        mirror.wake = self.wake

    def wake(self) -> None:
        """There is something to send; the first time, begin."""
        self._woken.set()
        if self._task is None:
            self._task = _task(self._serve())

    async def close(self) -> None:
        """End, and keep nothing any more."""
        self._stop()
        if self._task is not None and self._task.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([self._task])

    def _stop(self) -> None:
        self._mirror.clear()
        if self._task is not None:
            with suppress(RuntimeError):  # the loop is closed already
                self._task.cancel()

    async def _serve(self) -> None:
        while self._mirror.on:
            self._woken.clear()
            if not self._mirror.open():
                await self._woken.wait()
                continue
            delay_s = self._mirror.broke(await self._stream_on())
            await asyncio.sleep(delay_s)

    async def _stream_on(self) -> str:
        """Have one stream, as long as it lasts; why it ended."""
        stream: AsyncStream | None = None
        sender: asyncio.Task[None] | None = None
        try:
            stream = await self._open()
            if stream is None:
                return _ENDED
            sender = _task(self._send(stream))
            while True:
                self._mirror.received(await stream.read())
        except StopAsyncIteration:
            return _ENDED
        except SessionStoreError as error:
            return error.reason
        finally:
            if stream is not None:
                stream.cancel()
            if sender is not None:
                sender.cancel()
                await asyncio.wait([sender])

    async def _open(self) -> AsyncStream | None:
        driver = self._driver()
        if driver is None or driver.closed:
            return None
        return await driver.open_stream(_PATIENCE_S)

    async def _send(self, stream: AsyncStream) -> None:
        while True:
            self._woken.clear()
            found = self._mirror.take()
            if isinstance(found, float):
                with suppress(TimeoutError):
                    async with asyncio.timeout(found):
                        await self._woken.wait()
            elif not await stream.write(found):
                return


def _task(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """A task that a loop which is closed before the client takes along, without a word."""
    task = asyncio.get_running_loop().create_task(work, name="sessionstore near cache")
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task

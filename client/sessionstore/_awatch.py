"""The async watch: `_watch` with ``await``, for one event loop."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sessionstore._astreams import AsyncStream
from sessionstore._events import LeaseChanged, WatchEvent
from sessionstore._watching import Watching
from sessionstore.errors import SessionStoreError

if TYPE_CHECKING:
    from sessionstore._adriver import AsyncDriver

_PATIENCE_S = 0.5


class AsyncWatch(AsyncIterator[WatchEvent]):
    """The events of a watch; contracts as `Watch`'s. Tasks that share one take turns.

    Waiting for the next event may be cancelled: no event is lost.
    """

    def __init__(self, driver: "AsyncDriver", watching: Watching) -> None:
        self._driver = driver
        self._core = watching
        self._closed = asyncio.Event()
        self._lock = asyncio.Lock()
        self._stream: AsyncStream | None = None
        self._deadline_s = time.monotonic() + driver.timeout_s

    async def __aenter__(self) -> Self:
        async with self._lock:
            while not (self._core.in_force or self._core.events or self._closed.is_set()):
                await self._step()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchEvent:
        """As `Watch.__next__`."""
        async with self._lock:
            while not self._core.events:
                if self._closed.is_set():
                    raise StopAsyncIteration
                await self._step()
            event = self._core.pop()
            if not isinstance(event, LeaseChanged):
                self._driver.mirror.shown(event.key, event.revision)
            return event

    @property
    def cursor(self) -> bytes:
        """As `Watch.cursor`."""
        return self._core.cursor

    async def close(self) -> None:
        """As `Watch.close`."""
        self._closed.set()
        if self._stream is not None:
            self._stream.cancel()

    async def _step(self) -> None:
        """One step towards the next event."""
        core, driver = self._core, self._driver
        try:
            if core.reads:
                await driver.run(core.read_on())
                return
            stream = await self._open()
            if stream is None:
                return
            try:
                await driver.run(core.received(await stream.read()))
                return
            except StopAsyncIteration:
                self._let_go()
                delay_s = 0.1
            except BaseException:
                self._let_go()
                raise
        except SessionStoreError as error:
            if driver.closed:
                self._closed.set()
                return
            delay_s = core.failed(error)
            if not core.in_force and time.monotonic() > self._deadline_s:
                self._deadline_s = time.monotonic() + driver.timeout_s
                raise
        except RuntimeError:
            if not driver.closed:
                raise
            self._closed.set()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._closed.wait()

    async def _open(self) -> AsyncStream | None:
        """The stream; None if the watch was closed meanwhile. Raises UnavailableError for now."""
        if self._stream is None:
            request = self._core.request()
            stream = await self._driver.open_stream(_PATIENCE_S)
            try:
                await stream.write(request, last=True)
            except BaseException:
                stream.cancel()
                raise
            self._stream = stream
            if self._closed.is_set():
                self._let_go()
        return self._stream

    def _let_go(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

"""Both clients behind one face, so that a test's body is written once: plain calls, also of the async client.

`Driver("sync")` and `Driver("async")` open stores. Those of the async one run on a loop of their own
thread; each call waits for its result there. Handles, iterators, blocks and the errors' `retry` and
`fetch` are wrapped alike.
"""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sessionstore import AsyncSessionHandle, AsyncSessionStore, SessionStore
from sessionstore.errors import ConflictError, OutcomeUnknownError

KINDS = ("sync", "async")
WAIT_S = 300.0
TIMEOUT_S = 100.0


class Driver:
    """Opens stores of one kind, and closes what it opened."""

    def __init__(self, kind: str) -> None:
        assert kind in KINDS
        self.kind = kind
        self._stores: list[Any] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        if kind == "async":
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()

    def open(self, target: str, **arguments: Any) -> Any:
        """A store; its methods are plain calls. Unless told otherwise it has time enough on any machine."""
        arguments.setdefault("timeout", TIMEOUT_S)
        if self.kind == "sync":
            store: Any = SessionStore(target, **arguments)
        else:
            store = _Plain(self, AsyncSessionStore(target, **arguments))
        self._stores.append(store)
        return store

    def close(self) -> None:
        for store in self._stores:
            store.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WAIT_S)
            self._loop.close()

    def wait(self, awaitable: Any) -> Any:
        """Run an awaitable on the loop, and wrap what it gives."""
        try:
            future = asyncio.run_coroutine_threadsafe(_awaited(awaitable), self._loop)
            return self.wrap(future.result(WAIT_S))
        except (ConflictError, OutcomeUnknownError) as error:
            run = error._run
            if run is not None:
                error._run = lambda operation: self.wait(run(operation))
            raise

    def wrap(self, value: Any) -> Any:
        return _Plain(self, value) if isinstance(value, AsyncSessionHandle) else value


@contextmanager
def impatient(store: Any, timeout_s: float = 0.4) -> Iterator[None]:
    """Give the calls of a store, which had time enough to connect, so little time that they give up."""
    driver = driver_of(store)
    before, driver._timeout_s = driver._timeout_s, timeout_s
    try:
        yield
    finally:
        driver._timeout_s = before


def driver_of(store: Any) -> Any:
    """The SDK's own driver of a store of either kind."""
    return getattr(store, "_inner", store)._driver


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


class _Plain:
    """An async store or handle whose methods are plain calls."""

    def __init__(self, driver: Driver, inner: Any) -> None:
        self._driver = driver
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not inspect.ismethod(value):
            return value
        if inspect.iscoroutinefunction(value):
            return lambda *args, **kwargs: self._driver.wait(value(*args, **kwargs))
        if name == "list":
            return lambda *args, **kwargs: _iterate(self._driver, value(*args, **kwargs))
        if name == "watch":
            return lambda *args, **kwargs: _PlainWatch(self._driver, value(*args, **kwargs))
        if name in ("edit", "turn"):
            return lambda *args, **kwargs: _block(self._driver, value(*args, **kwargs))
        return value

    def __repr__(self) -> str:
        return repr(self._inner)


class _PlainWatch:
    """An async watch whose steps are plain calls."""

    def __init__(self, driver: Driver, inner: Any) -> None:
        self._driver = driver
        self._inner = inner

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        try:
            return self._driver.wait(anext(self._inner))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Any:
        self._driver.wait(self._inner.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._driver.wait(self._inner.__aexit__(*error))

    @property
    def cursor(self) -> bytes:
        return self._inner.cursor

    def close(self) -> None:
        self._driver.wait(self._inner.close())


def _iterate(driver: Driver, iterator: Any) -> Iterator[Any]:
    while True:
        try:
            yield driver.wait(anext(iterator))
        except StopAsyncIteration:
            return


@contextmanager
def _block(driver: Driver, block: Any) -> Iterator[Any]:
    value = driver.wait(block.__aenter__())
    try:
        yield value
    except BaseException as error:
        if not driver.wait(block.__aexit__(type(error), error, error.__traceback__)):
            raise
    else:
        driver.wait(block.__aexit__(None, None, None))

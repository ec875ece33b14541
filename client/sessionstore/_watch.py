"""The sync watch: an iterator over events. `_watching` knows what to give; this waits."""

import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sessionstore._events import LeaseChanged, WatchEvent
from sessionstore._fork import Forkable, watch
from sessionstore._streams import Stream
from sessionstore._watching import Watching
from sessionstore.errors import SessionStoreError

if TYPE_CHECKING:
    from sessionstore._driver import Driver

# How long a step waits for a daemon, before it looks whether the watch was closed.
_PATIENCE_S = 0.5


class Watch(Iterator[WatchEvent], Forkable):
    """The events of a watch; see `SessionStore.watch`, which makes it.

    As a context manager it is in force when the block begins, and closed at its end; else it is in force with
    the first step. Threads that share one take turns. A forked child that goes on with it does so from its
    cursor.
    """

    def __init__(self, driver: "Driver", watching: Watching) -> None:
        self._driver = driver
        self._core = watching
        self._closed = threading.Event()
        self._after_fork_in_child()
        watch(self)

    def _after_fork_in_child(self) -> None:
        inherited = getattr(self, "_stream", None)
        if inherited is not None:
            inherited.cancel()  # which, in a child, only keeps it
        self._stream: Stream | None = None
        self._lock = threading.RLock()
        self._stepping = False
        self._deadline_s = time.monotonic() + self._driver.timeout_s
        if self._closed.is_set():
            return
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        with self._lock:
            while not (self._core.in_force or self._core.events or self._closed.is_set()):
                self._step()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> WatchEvent:
        """Wait for the next event. Ends when the watch or its store is closed.

        Raises UnavailableError if no daemon answers within the timeout before the watch is in force; after
        that, it waits for one as long as it takes. After an error it may be asked again.
        """
        with self._lock:
            if self._stepping:
                raise RuntimeError("a signal handler interrupted the very step of this watch")
            self._stepping = True
            try:
                while not self._core.events:
                    if self._closed.is_set():
                        raise StopIteration
                    self._step()
                event = self._core.pop()
                if not isinstance(event, LeaseChanged):
                    self._driver.mirror.shown(event.key, event.revision)
                return event
            finally:
                self._stepping = False

    @property
    def cursor(self) -> bytes:
        """Where a watch goes on after the events that were given; empty before it is in force.

        It moves on also while nothing happens. Store it to go on elsewhere; see `SessionStore.watch`.
        """
        return self._core.cursor

    def close(self) -> None:
        """End the watch; a thread that waits for it goes on at once. Closing again does nothing."""
        self._closed.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    # ------------------------------------------------------------------------------------ waiting

    def _step(self) -> None:
        """One step towards the next event."""
        core, driver = self._core, self._driver
        try:
            if core.reads:
                driver.run(core.read_on())
                return
            stream = self._open()
            if stream is None:
                return
            try:
                driver.run(core.received(next(stream)))
                return
            except StopIteration:
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
        self._closed.wait(delay_s)

    def _open(self) -> Stream | None:
        """The stream; None if the watch was closed meanwhile. Raises UnavailableError for now."""
        if self._stream is None:
            self._stream = self._driver.open_stream(iter([self._core.request()]), _PATIENCE_S)
            if self._closed.is_set():
                self._let_go()
        return self._stream

    def _let_go(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

"""Forking beside grpc: no call of this package is inside grpc while the process forks.

grpc's core survives a fork only if its own fork support is on, and if no thread is inside it at that
moment; else every call in the child hangs. (Measured with grpcio 1.85: without the setting 20 of 20
children hung; with it, and three threads calling meanwhile, 4 of 4; with it and this gate, 0 of 40.)

So, before the first channel, the setting is made (unless the environment says otherwise), and a gate lets
a fork wait, for five seconds at the most, until calls under way have returned, while no new one enters. A
call that waits for a retry is not inside. A stream that waits for events, and a call that waits for a lease,
is ended before a fork; whoever waits for it makes another one. Only sync clients use the gate: an
`AsyncSessionStore` is of no use after a fork.
"""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakSet

_FORK_WAIT_S = 5.0
_SETTLE_S = 0.03


class _Gate:
    """Counts the calls inside grpc, also if Ctrl-C comes at any moment.

    An interruption comes where a Python function begins or a call returns. So counting and remembering that
    it was counted have no call between them, and the lock is taken as itself: a condition's is a function.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._forking = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hold off forks; wait while there is one."""
        counted = False
        try:
            with self._lock:
                while self._forking:
                    self._changed.wait()
                self._inside += 1
                counted = True
            yield
        finally:
            if counted:
                with self._lock:
                    self._inside -= 1
                    if self._forking:
                        self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in, and wait until all are out, or long enough."""
        deadline_s = time.monotonic() + _FORK_WAIT_S
        with self._lock:
            self._forking = True
        interrupted = _interrupt_streams()
        with self._lock:
            while self._inside and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
                interrupted += _interrupt_streams()  # one may have been made by a call that was inside
        if interrupted:
            time.sleep(_SETTLE_S)  # grpc's own threads tell the daemon, and let go of the calls

    def open(self) -> None:
        """Let calls in again."""
        with self._lock:
            self._forking = False
            self._changed.notify_all()


class Forkable(ABC):
    """A client whose child processes must begin anew."""

    @abstractmethod
    def _after_fork_in_child(self) -> None:
        """Begin anew, in the child."""


class Interruptible(ABC):
    """A call without an end, which would keep a fork waiting."""

    @abstractmethod
    def interrupt(self) -> bool:
        """End it, right before a fork; whoever reads it makes another. False if it had ended already."""


_gate = _Gate()
_streams: WeakSet[Interruptible] = WeakSet()
_streams_lock = threading.Lock()
_clients: WeakSet[Forkable] = WeakSet()
_clients_lock = threading.Lock()


def watch(client: Forkable) -> None:
    """Tell this client about forks, as long as it lives."""
    with _clients_lock:
        _clients.add(client)


def interruptible(stream: Interruptible) -> None:
    """End this stream before a fork. Called inside the gate, so that none escapes."""
    with _streams_lock:
        _streams.add(stream)


def _interrupt_streams() -> int:
    """End all streams; how many there were."""
    with _streams_lock:
        streams = list(_streams)
    return sum(stream.interrupt() for stream in streams)


def inside_grpc() -> AbstractContextManager[None]:
    """Around each call into grpc that may block."""
    return _gate.inside()


def enable_fork_support() -> None:
    """Turn grpc's own fork support on; before the first channel of the process, or it comes too late."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")


def _before() -> None:
    _clients_lock.acquire()  # a set that another thread was changing would be broken in the child
    _gate.close()


def _after_in_parent() -> None:
    _gate.open()
    _clients_lock.release()


def _after_in_child() -> None:
    global _gate, _clients_lock, _streams, _streams_lock
    _gate = _Gate()
    _clients_lock = threading.Lock()
    _streams, _streams_lock = WeakSet(), threading.Lock()
    for client in list(_clients):
        client._after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)

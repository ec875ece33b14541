"""A Watch call of a sync client: requests go out as they are given, responses come as they are read.

grpc has a thread of its own for each such call. A fork beside that thread would break the child, so a stream
is interrupted before a fork: it ends as if the connection had broken, and its reader opens another one. A
child never touches the streams of its parent, not even to let go of them.
"""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from sessionstore._fork import Interruptible, inside_grpc, interruptible
from sessionstore._operations import pb
from sessionstore.errors import from_rpc_error

# Calls of the parent: letting go of one would cancel it, which needs locks that its threads may have held.
_inherited: list[Any] = []


class Stream(Interruptible):
    """One call. ``start`` makes it, of an iterator of requests."""

    def __init__(
        self, start: Callable[[Iterator[pb.WatchRequest]], Any], requests: Iterator[pb.WatchRequest]
    ) -> None:
        self._pid = os.getpid()
        with inside_grpc():
            self._call = start(requests)
            interruptible(self)

    def __next__(self) -> pb.WatchResponse:
        """The next response, waiting for it. Raises StopIteration, and SessionStoreError."""
        try:
            with inside_grpc():
                response: pb.WatchResponse = next(self._call)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return response

    def cancel(self) -> None:
        """End the call. From any thread, also more than once."""
        if self._pid == os.getpid():
            self._call.cancel()
        else:
            _inherited.append(self._call)

    def interrupt(self) -> bool:
        """See `Interruptible`."""
        active: bool = self._call.is_active()
        self._call.cancel()
        return active

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self.cancel()


class Requests(Iterator[pb.WatchRequest]):
    """What a stream sends, one after the other, as ``take`` has it; grpc reads it in a thread of its own.

    ``take`` gives a request, or for how many seconds at the most there is none.
    """

    def __init__(self, take: Callable[[], "pb.WatchRequest | float"]) -> None:
        self._take = take
        self._woken = threading.Event()
        self._over = False

    def __next__(self) -> pb.WatchRequest:
        while not self._over:
            self._woken.clear()
            found = self._take()
            if not isinstance(found, float):
                return found
            self._woken.wait(found)
        raise StopIteration

    def wake(self) -> None:
        """There is something to take."""
        self._woken.set()

    def end(self) -> None:
        """There will be nothing more."""
        self._over = True
        self._woken.set()

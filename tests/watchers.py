"""Watch calls of real clients: each follows what it is told, on a thread or a task of its own."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue

import grpc
from daemons import channel_to, wait_until
from followers import Follower
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc


class WatchingClient:
    """One client with a connection and a follower of its own; resumes from its cursor."""

    def __init__(self, address: str, *, prefix: str = "", keys: Iterable[str] = ()) -> None:
        self.follower = Follower()
        self.error: grpc.RpcError | None = None
        self._address, self._prefix, self._keys = address, prefix, list(keys)
        self._channel = channel_to(address)
        self._requests: SimpleQueue[v1.WatchRequest | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._answered = threading.Event()
        self._pause = threading.Event()
        self._pause.set()

    def begin(self, *, progress_s: int = 1) -> "WatchingClient":
        """Watch from the cursor on, and wait until the watch is in force."""
        self._answered.clear()
        self.error = None
        stub = session_store_pb2_grpc.SessionStoreStub(self._channel)
        self._requests = requests = SimpleQueue()
        first = v1.WatchRequest(prefix=self._prefix, keys=self._keys, cursor=self.follower.cursor)
        first.progress_interval.seconds = progress_s
        requests.put(first)
        call = stub.Watch(iter(requests.get, None))
        self._call = call
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()
        wait_until(lambda: self._answered.is_set() or not self.alive, what="the watch is in force")
        return self

    def ask(self, request: v1.WatchRequest) -> None:
        """Send a later request."""
        self._requests.put(request)

    def half_close(self) -> None:
        """Send no more."""
        self._requests.put(None)

    def pause(self) -> None:
        """Read nothing from now on."""
        self._pause.clear()

    def go_on(self) -> None:
        """Read again."""
        self._pause.set()

    def _run(self, call: Iterator[v1.WatchResponse]) -> None:
        try:
            for response in call:
                self.follower.take(response)
                self._answered.set()
                self._pause.wait()
        except grpc.RpcError as error:
            self.error = error
        except BaseException as failure:
            self._failure = failure

    @property
    def alive(self) -> bool:
        """Whether the stream goes on; fails if its follower found something wrong."""
        if self._failure is not None:
            raise self._failure
        return self._thread is not None and self._thread.is_alive()

    def wait(self, condition: Callable[[Follower], bool], timeout_s: float = 60.0) -> Follower:
        """Wait until the follower is where it should be."""
        wait_until(lambda: condition(self.follower) or not self.alive, timeout_s, "what is watched came")
        assert condition(self.follower), f"the watch ended before: {self.error}"
        return self.follower

    def ended(self) -> grpc.RpcError:
        """Wait for the end of the stream, and give its error."""
        assert self._thread is not None
        self._thread.join(60)
        assert not self.alive
        assert self.error is not None
        return self.error

    def cut(self) -> None:
        """Hang up, and forget what was not whole."""
        self._call.cancel()
        if self._thread is not None:
            self._thread.join(60)
            assert not self.alive
        self.follower.begin_again()

    def reconnect(self) -> None:
        """A new connection."""
        self.cut()
        self._channel.close()
        self._channel = channel_to(self._address)

    def close(self) -> None:
        """Hang up for good."""
        self._pause.set()
        self.cut()
        self._requests.put(None)
        self._channel.close()

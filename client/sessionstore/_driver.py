"""The sync driver: runs operations over grpc's native sync stubs, one attempt after the other. Thread-safe.

It only waits; `_calls` decides. Before the first call, and after each failed attempt, a probe (GetServerInfo,
which changes nothing) waits for a connection: so a change that never met a daemon is known not to have been
sent. (Not grpc's channel_ready_future: its thread dies with a traceback if the channel is closed soon after.)
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from sessionstore._calls import (
    BATCH_BYTES_MAX,
    Attempts,
    Ticket,
    Window,
    age_clock,
    too_many_calls,
)
from sessionstore._fork import (
    Forkable,
    Interruptible,
    enable_fork_support,
    inside_grpc,
    interruptible,
    watch,
)
from sessionstore._mirror import Bounds, Mirror
from sessionstore._near import Keeper
from sessionstore._operations import INFO, METHODS, WATCH, Method, Operation, Rpc, Value
from sessionstore._streams import Stream
from sessionstore._targets import OPTIONS, grpc_target
from sessionstore.errors import (
    ConflictError,
    OutcomeUnknownError,
    SessionStoreError,
    error_for,
    from_rpc_error,
)

DRAIN_S = 5.0
# How long one probe waits for a connection; a fork waits for it.
PROBE_S = 0.5
# How long one target of several is tried before the next; one that refuses is left at once.
TARGET_PATIENCE_S = 2.0
BETWEEN_ROUNDS_S = 0.1


class ChannelGoneError(Exception):
    """The channel was closed before an attempt began: nothing was sent."""


class _Waiting(Interruptible):
    """A call that the daemon may answer late. A fork ends the attempt, which is then made again."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def interrupt(self) -> bool:
        return bool(self._call.cancel())


class Connection:
    """The channel to the first target that answers. After close, nothing is ever ready."""

    def __init__(self, targets: tuple[str, ...]) -> None:
        self._targets = targets
        self._turn = 0
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._calls: dict[str, Any] = {}
        self._ready = False
        self.closed = False
        self.batch_bytes_max = BATCH_BYTES_MAX

    def ready(self, timeout_s: float) -> bool:
        """Wait until a daemon answers; False if none does in time."""
        if self._ready:
            return True
        deadline_s = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=timeout_s):
            return False
        try:
            while not self._ready and not self.closed:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return False
                self._ready = self._probe(left_s)
            return self._ready
        finally:
            self._lock.release()

    def _probe(self, left_s: float) -> bool:
        """Ask the target whose turn it is; if it does not answer, the next one gets its turn."""
        if self._channel is None:
            enable_fork_support()
            self._channel = grpc.insecure_channel(grpc_target(self._targets[self._turn]), OPTIONS)
            self._calls = callables(self._channel)
        alone = len(self._targets) == 1
        patience_s = min(left_s, PROBE_S if alone else TARGET_PATIENCE_S)
        begun_s = time.monotonic()
        try:
            with inside_grpc():
                info = self._calls[INFO.name](INFO.request(), timeout=patience_s, wait_for_ready=alone)
            self.batch_bytes_max = info.limits.batch_bytes_max or BATCH_BYTES_MAX
            return True
        except grpc.RpcError as error:
            if answered(error):
                return True
        except ValueError:  # grpc's word for a channel that is closed
            if not self.closed:
                raise
            return False
        if not alone:
            channel, self._channel, self._calls = self._channel, None, {}
            self._turn = (self._turn + 1) % len(self._targets)
            channel.close()
        if self._turn == 0:
            time.sleep(pause_s(begun_s, left_s, alone=alone))
        return False

    def lost(self) -> None:
        """An attempt ended without a daemon's own answer: ask before the next one."""
        self._ready = False

    def send(self, rpc: Rpc, timeout_s: float) -> Any:
        """One attempt. Raises grpc.RpcError, and ChannelGoneError if another thread gave the target up."""
        calls = self._calls
        if rpc.method.name not in calls:
            raise ChannelGoneError
        if rpc.wait_s:
            return self._send_and_wait(calls, rpc, timeout_s)
        with inside_grpc():
            try:
                reply = calls[rpc.method.name](rpc.request, timeout=timeout_s)
            except ValueError:
                if calls is self._calls and not self.closed:
                    raise
                raise ChannelGoneError from None
            return list(reply) if rpc.method.streams else reply

    def _send_and_wait(self, calls: dict[str, Any], rpc: Rpc, timeout_s: float) -> Any:
        """As `send`, for what the daemon may answer late: it is not waited for inside grpc."""
        with inside_grpc():
            try:
                call = calls[rpc.method.name].future(rpc.request, timeout=timeout_s)
            except ValueError:
                if calls is self._calls and not self.closed:
                    raise
                raise ChannelGoneError from None
            waiting = _Waiting(call)
            interruptible(waiting)  # held here: it is known as long as it waits
        try:
            return call.result()
        except grpc.FutureCancelledError:  # the channel was closed, or the process forks
            raise call from None
        except BaseException:
            call.cancel()  # of a caller who was interrupted: the daemon shall not keep its place
            raise

    def stream(self, rpc: Rpc) -> Iterator[Any]:
        """The replies of one attempt, as they come, for as long as it takes. Raises grpc.RpcError."""
        replies = self._calls[rpc.method.name](rpc.request)
        try:
            yield from replies
        finally:
            replies.cancel()

    def open(self, requests: Iterator[Any]) -> Stream:
        """A Watch call. Raises ChannelGoneError if another thread gave the target up."""
        calls = self._calls
        if WATCH.name not in calls:
            raise ChannelGoneError
        try:
            return Stream(calls[WATCH.name], requests)
        except ValueError:
            if calls is self._calls and not self.closed:
                raise
            raise ChannelGoneError from None

    def close(self) -> None:
        """Give up what is under way, and the channel."""
        self.closed = True
        self._ready = False
        if self._channel is not None:
            self._channel.close()


def callables(channel: grpc.Channel | grpc.aio.Channel) -> dict[str, Any]:
    """A callable of this channel for each method, by name."""
    def kind(method: Method[Any, Any]) -> Any:
        if method.sends:
            return channel.stream_stream
        return channel.unary_stream if method.streams else channel.unary_unary

    return {
        method.name: kind(method)(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.reply.FromString,
        )
        for method in METHODS
    }


# What a call also ends with if it met no daemon: grpc's own words for what it could not connect to or
# understand. A daemon gives its reason with a refusal.
_NOBODY = frozenset({
    "GRPC_UNAVAILABLE", "GRPC_DEADLINE_EXCEEDED", "GRPC_CANCELLED", "GRPC_UNKNOWN", "GRPC_INTERNAL",
})  # fmt: skip


def answered(error: grpc.RpcError) -> bool:
    """Whether a probe that failed was refused by a daemon, and not by the lack of one."""
    return from_rpc_error(error).reason not in _NOBODY


def nobody(targets: tuple[str, ...]) -> SessionStoreError:
    """The error of a stream for which there is no daemon yet."""
    target = ", ".join(targets)
    text = f"no session store answers a watch at {target}"
    return error_for("NOT_CONNECTED", text, {"target": target})


def pause_s(begun_s: float, left_s: float, *, alone: bool) -> float:
    """How long to wait after a round of probes; a single target was waited for already, unless it refused."""
    waited_s = time.monotonic() - begun_s if alone else 0.0
    return max(0.0, min(left_s, BETWEEN_ROUNDS_S - waited_s))


class Driver(Forkable):
    """What runs the operations of one client in one process."""

    def __init__(self, targets: tuple[str, ...], timeout_s: float, near: Bounds | None = None) -> None:
        self._targets = targets
        self._timeout_s = timeout_s
        self._near = near or Bounds()
        self._begin()
        watch(self)

    def _begin(self) -> None:
        self.guard = threading.RLock()  # a signal handler must not wait for the thread that it interrupted
        self._lock = threading.RLock()  # taken as itself, for the reason of `_fork`'s gate
        self._changed = threading.Condition(self._lock)
        self._window = Window()
        self._under_way = 0
        self._mine = threading.local()
        self._connection = Connection(self._targets)
        self.mirror = Mirror(self._near, age_clock, self.guard)
        self._keeper = Keeper(self.mirror, self)

    def _after_fork_in_child(self) -> None:
        """A child has its own connection, identity, locks and near cache; the parent's are left alone."""
        closed = self._connection.closed
        self._keeper.leave()
        self._begin()
        self._connection.closed = closed

    def run(self, operation: Operation[Value]) -> Value:
        """Run an operation to its value. Raises SessionStoreError, or RuntimeError on a closed client."""
        with self.begun():
            try:
                rpc = next(operation)
                while True:
                    try:
                        reply = self._call(rpc)
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

    def stream(self, rpc: Rpc) -> Iterator[Any]:
        """The replies to a read, as they come: one attempt, without a deadline. Do not fork meanwhile.

        That somebody answers has been seen before, with `run`. A daemon that is gone ends it: the channel
        asks for signs of life while a call waits. Raises SessionStoreError.
        """
        try:
            yield from self._connection.stream(rpc)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    @property
    def closed(self) -> bool:
        """Whether the client was closed."""
        return self._connection.closed

    @property
    def timeout_s(self) -> float:
        """Seconds per call."""
        return self._timeout_s

    def open_stream(self, requests: Iterator[Any], patience_s: float) -> Stream:
        """A Watch call, as soon as somebody answers. Raises UnavailableError if none does in time."""
        connection = self._connection
        connection.lost()  # a stream that ended, or none yet: ask before the next one
        if not connection.ready(patience_s):
            raise nobody(self._targets)
        try:
            return connection.open(requests)
        except ChannelGoneError:
            raise nobody(self._targets) from None

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Around operations that belong together: `close` in another thread waits for all of them.

        Whether the client is closed is asked here, and not at each call: what follows an acknowledged write
        must not deny it. Nests within a thread. Raises RuntimeError on a closed client.
        """
        mine = self._mine
        if getattr(mine, "begun", False):
            yield
            return
        counted = False
        try:
            with self._lock:
                if self._connection.closed:
                    raise RuntimeError("this SessionStore is closed")
                self._under_way += 1
                counted = mine.begun = True
            yield
        finally:
            if counted:
                mine.begun = False
                with self._lock:
                    if mine is self._mine:  # else this is a forked child, which counts anew
                        self._under_way -= 1
                        if self._connection.closed:
                            self._changed.notify_all()

    def close(self) -> None:
        """Wait a little for what other threads have begun, then disconnect. Again: nothing."""
        with self._lock:
            if self._connection.closed:
                return
            self._connection.closed = True
            self._keeper.stop()
            own = 1 if getattr(self._mine, "begun", False) else 0  # of a caller that this one interrupted
            deadline_s = time.monotonic() + DRAIN_S
            try:
                while self._under_way > own and (left_s := deadline_s - time.monotonic()) > 0:
                    self._changed.wait(left_s)
            finally:
                self._connection.close()

    def _call(self, rpc: Rpc) -> Any:
        """Make one call, in as many attempts as it takes, and keep its identity's books."""
        attempts = Attempts(rpc, self._timeout_s, time.monotonic())
        try:
            self._enter(rpc, attempts)
            reply = self._attempt(rpc, attempts)
        except BaseException as error:
            self._leave(rpc.ticket, error)
            self.mirror.missed(rpc, error)
            raise
        self._leave(rpc.ticket, None)
        self.mirror.heard(rpc, reply)
        return reply

    def _attempt(self, rpc: Rpc, attempts: Attempts) -> Any:
        connection = self._connection
        while True:
            try:
                if not connection.ready(attempts.remaining_s(time.monotonic())):
                    raise attempts.unreachable(self._targets, closed=connection.closed)
                attempts.before(age_clock())
                return connection.send(rpc, attempts.remaining_s(time.monotonic()))
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
            time.sleep(delay_s)

    def _enter(self, rpc: Rpc, attempts: Attempts) -> None:
        """Give a change its identity; waits while the window is full."""
        if not rpc.method.mutates:
            return
        with self._lock:
            if rpc.ticket is not None:
                rpc.ticket.resume()
            while rpc.ticket is None:
                rpc.ticket = self._window.begin(age_clock())
                left_s = attempts.remaining_s(time.monotonic())
                if rpc.ticket is None and (left_s <= 0 or not self._changed.wait(left_s)):
                    raise too_many_calls(self._timeout_s)

    def _leave(self, ticket: Ticket | None, error: BaseException | None) -> None:
        if ticket is None:
            return
        with self._lock:
            ticket.settle(error)
            # Who waits is the next calls, while the window is full, or close: which of them is woken is open.
            if self._connection.closed:
                self._changed.notify_all()
            else:
                self._changed.notify(self._window.room())

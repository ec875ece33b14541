"""What every call passes through: the bounds, the drain, and the one place where errors become statuses.

A `Refused` that is raised anywhere in a handler becomes its status. Anything else is a defect: the caller
gets INTERNAL with an incident number and no details, and the log gets the trace under the same number.
Cancellation passes.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc
from google.protobuf.message import DecodeError, Message

from sessionstored import status
from sessionstored.arrivals import Arrivals
from sessionstored.engine import Refused
from sessionstored.rules import Refusal

Context = grpc.aio.ServicerContext[Message, Message]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]  # generic in its stubs only
Unary = Callable[[Message, Context], Awaitable[Message]]
Stream = Callable[[Message, Context], AsyncGenerator[Message, None]]
RawUnary = Callable[[object, Context], Awaitable[Message]]
RawStream = Callable[[object, Context], AsyncIterator[Message]]
Duplex = Callable[[AsyncIterator[Message], Context], AsyncGenerator[Message, None]]
RawDuplex = Callable[[object, Context], Awaitable[None]]
Reader = Callable[[bytes], Message]

# gRPC cancels the calls that reach a server while it stops; these wait for their number to go down.
_QUIET_S = 0.05
_QUIET_S_MAX = 0.5
_SMALL_BYTES_MAX = 64 * 1024
STALL_S_MAX = 60.0
"""A stream without an end whose reader takes no reply for so long is cut off."""

_log = logging.getLogger(__name__)


class Calls(grpc.aio.ServerInterceptor):
    """Guards the handlers of one service, and knows how many of its calls are under way."""

    def __init__(
        self,
        service: str,
        *,
        bytes_max: int,
        calls_max: int = 1 << 30,
        large_replies: Collection[str] = (),
        arrivals: Arrivals | None = None,
    ) -> None:
        """Guard the service of that full name.

        Args:
            service: its full name.
            bytes_max: requests, and large replies that are being sent, may hold so many bytes together.
            calls_max: so many calls may be under way; those without an end, such as a Watch, do not count.
            large_replies: the unary methods whose replies may be large. They change nothing: such a reply
                may be refused when it is made.
            arrivals: the bound on requests that are on their way in.

        """
        self._prefix = f"/{service}/"
        self._large_replies = {self._prefix + name for name in large_replies}
        self._arrivals = arrivals
        self._bytes_max, self._calls_max = bytes_max, calls_max
        self._bytes = 0
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._guarded: dict[str, Handler] = {}
        self._refused = 0
        self.draining = False

    async def drain(self, timeout_s: float) -> int:
        """Refuse new calls from now on, and wait for those under way.

        Returns how many are still under way after the timeout.
        """
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return self._count
        await self._quiet()
        return 0

    async def _quiet(self) -> None:
        """Wait until no call came for a moment, so that clients hear why, and not a cancelled stream."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _QUIET_S_MAX
        while loop.time() < end:
            refused = self._refused
            await asyncio.sleep(_QUIET_S)
            if refused == self._refused:
                return

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Give the guarded handler of a method; those of other services pass as they are."""
        method = str(handler_call_details.method)
        if not method.startswith(self._prefix):
            return await continuation(handler_call_details)
        guarded = self._guarded.get(method)
        if guarded is None:
            handler = await continuation(handler_call_details)
            if handler is None:  # an unknown method; grpc answers UNIMPLEMENTED
                return handler
            guarded = self._guarded[method] = self._guard(method, handler)
        if self._arrivals is not None:
            await self._arrivals.begin()
        return guarded

    def _guard(self, method: str, handler: "Handler") -> "Handler":
        """As a handler of a stream of requests, which is the same on the wire.

        Only then is the message read here, and one that takes too long can be refused: what gRPC itself
        reads goes on arriving when its task is cancelled, and the caller hears nothing.
        """
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._duplex(method, cast(Duplex, handler.stream_stream), _reader(handler)),
                response_serializer=handler.response_serializer,
            )
        if handler.unary_unary is not None and method not in self._large_replies:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, cast(Unary, handler.unary_unary), _reader(handler)),
                response_serializer=handler.response_serializer,
            )
        behaviour = cast(Stream, handler.unary_stream)
        if handler.unary_unary is not None:
            # As a stream of one reply, which is the same on the wire: only of a stream is it known when a
            # reply has gone out, and how many wait for callers who do not read.
            behaviour = _one_reply(cast(Unary, handler.unary_unary))
        return grpc.stream_stream_rpc_method_handler(
            self._stream(method, behaviour, _reader(handler)),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, behaviour: Unary, read: Reader) -> RawUnary:
        async def guarded(_: object, context: Context) -> Message:
            request = b""
            try:
                request = await self._arrived(context)
                with self._under_way(len(request)):
                    return await behaviour(read(request), context)
            except Exception as error:
                refusal = _refusal(error, method)
            del request  # see _abort
            if context.done():  # the caller went away, and nobody hears why
                raise asyncio.CancelledError
            await _abort(context, refusal)

        return guarded

    def _stream(self, method: str, behaviour: Stream, read: Reader) -> RawStream:
        async def guarded(_: object, context: Context) -> AsyncGenerator[Message, None]:
            request, reply = b"", cast("Message | None", None)
            try:
                request = await self._arrived(context)
                with self._under_way(len(request)):
                    begun = False
                    async with aclosing(behaviour(read(request), context)) as replies:
                        async for reply in replies:
                            if begun:
                                self._check_draining()
                            with self._held(reply.ByteSize()):
                                yield reply
                            begun = True
                return
            except Exception as error:
                if context.done():  # the caller went away: sending failed, and nobody hears why
                    return
                refusal = _refusal(error, method)
            del request, reply  # see _abort
            await _abort(context, refusal)

        return guarded

    def _duplex(self, method: str, behaviour: Duplex, read: Reader) -> RawDuplex:
        """A call without an end: it is not under way, so the drain does not wait for it.

        Whoever ends such calls at the drain is their behaviour's business.
        """

        async def guarded(_: object, context: Context) -> None:
            reply: Message | None = None
            try:
                self._check_draining()
                first = read(await self._arrived(context))
                self._check_draining()
                async with aclosing(behaviour(_requests(first, read, context), context)) as replies:
                    async for reply in replies:
                        await _written(context, reply)
                return
            except Exception as error:
                if context.done():  # the caller went away
                    return
                refusal = _refusal(error, method)
            del reply  # see _abort
            await _abort(context, refusal)

        return guarded

    async def _arrived(self, context: Context) -> bytes:
        """The message of a call, once it is there."""
        try:
            request: object = await context.read()
        except asyncio.CancelledError:
            if self._arrivals is None or not self._arrivals.was_cut_off():
                raise
            raise Refused(
                Refusal(
                    "OVERLOADED",
                    "the request took too long to arrive while others waited; nothing was stored; "
                    "try again later",
                    {"limit": str(self._bytes_max)},
                )
            ) from None
        if self._arrivals is not None:
            self._arrivals.arrived()
        if not isinstance(request, bytes):  # the caller went away, or sent nothing
            text = "there is no request in this call"
            raise Refused(Refusal("ARGUMENT_INVALID", text, {"field": "request", "detail": text}))
        return request

    @contextmanager
    def _under_way(self, size: int) -> Iterator[None]:
        self._check_draining()
        if self._count >= self._calls_max:
            text = f"{self._calls_max} calls are under way; nothing was stored; try again later"
            raise Refused(Refusal("OVERLOADED", text, {"limit": str(self._calls_max)}))
        with self._held(size):
            self._count += 1
            self._idle.clear()
            try:
                yield
            finally:
                self._count -= 1
                if not self._count:
                    self._idle.set()

    @contextmanager
    def _held(self, size: int) -> Iterator[None]:
        """Bytes of a request being served, or of a block on its way to a reader who may be slow.

        A quarter of the room is for what is small, so that it finds some beside what is large and slow.
        """
        bytes_max = self._bytes_max if size <= _SMALL_BYTES_MAX else self._bytes_max * 3 // 4
        if self._bytes and self._bytes + size > bytes_max:
            raise Refused(
                Refusal(
                    "OVERLOADED",
                    f"calls under way hold more than {self._bytes_max} bytes; try again later",
                    {"limit": str(self._bytes_max)},
                )
            )
        self._bytes += size
        try:
            yield
        finally:
            self._bytes -= size

    def _check_draining(self) -> None:
        if self.draining:
            self._refused += 1
            raise Refused(
                Refusal("SHUTTING_DOWN", "the daemon is stopping; nothing was stored; try again")
            )


def _reader(handler: "Handler") -> Reader:
    """What reads a method's requests; gRPC's own answer to what cannot be read names no reason."""
    parse = cast(Reader, handler.request_deserializer)

    def read(request: bytes) -> Message:
        try:
            return parse(request)
        except DecodeError as error:
            text = f"the request cannot be read: {error}"
            raise Refused(
                Refusal("ARGUMENT_INVALID", text, {"field": "request", "detail": str(error)})
            ) from error

    return read


async def _requests(first: Message, read: Reader, context: Context) -> AsyncIterator[Message]:
    """The requests of a call, until the caller has no more."""
    yield first
    del first
    while isinstance(request := cast(object, await context.read()), bytes):
        yield read(request)


async def _written(context: Context, reply: Message) -> None:
    """Send a reply. A caller who takes nothing for too long is cut off: what waits for it takes room."""
    try:
        async with asyncio.timeout(STALL_S_MAX):
            await context.write(reply)
    except TimeoutError:
        raise asyncio.CancelledError from None


def _one_reply(behaviour: Unary) -> Stream:
    async def stream(request: Message, context: Context) -> AsyncGenerator[Message, None]:
        yield await behaviour(request, context)

    return stream


def _refusal(error: Exception, method: str) -> Refusal:
    """What the caller is told about an exception."""
    if isinstance(error, Refused):
        return error.refusal
    incident = uuid.uuid4().hex[:12]
    _log.error("incident %s in %s", incident, method, exc_info=error)
    return Refusal(
        "INTERNAL",
        f"a defect of the daemon; its log tells more about incident {incident}",
        {"incident": incident},
    )


async def _abort(context: Context, refusal: Refusal) -> NoReturn:
    """End a call with a refusal.

    What gRPC raises here is part of a cycle, and stays until garbage is collected, which goes by the number
    of objects and not by their size. So nothing large may hang on it: no request or reply in the frame that
    calls this, and no exception under way, whose traceback has more such frames.
    """
    details = status.to_status(refusal)
    await context.abort(
        status.code(refusal),
        details.message,
        ((status.DETAILS_KEY, details.SerializeToString()),),
    )
    raise AssertionError("abort raises")

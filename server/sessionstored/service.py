"""The RPC handlers, all of one shape: check the request, ask the engine, make the reply.

What a handler refuses, it refuses by raising `Refused`; `calls.Calls` turns that into a status. Nothing here
decides anything about a session, and nothing here waits for anything but the engine.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from sessionstore import codec
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc

from sessionstored import replies
from sessionstored.engine import Engine, Reply
from sessionstored.engine.feed import DEFAULT_FEED_LIMITS, FeedLimits
from sessionstored.lease_queue import LeaseQueue
from sessionstored.lease_requests import wait_s
from sessionstored.lease_service import LeaseHandlers, deadline_s, patience_s, refuse_if_refused
from sessionstored.paging import Listing
from sessionstored.reads import REPLY_BYTES_MAX, Range, Tail
from sessionstored.requests import Bounds, MutationRequest, to_request
from sessionstored.rules import Answer, Limits
from sessionstored.watching import watch
from sessionstored.window import Window

Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = "sessionstore.v1.SessionStore"
LARGE_REPLIES = ("GetSession", "GetHistory", "ListSessions")
"""The unary methods that give messages or heads, up to 1 MiB."""
# Reading a batch this large as JSON takes longer than handing it to a thread, and other calls shall not wait
# for it.
_CHECKED_ASIDE_BYTES_MIN = 64 * 1024


class SessionStoreServicer(LeaseHandlers, session_store_pb2_grpc.SessionStoreServicer):
    """The service over one engine."""

    def __init__(
        self,
        engine: Engine,
        leases: LeaseQueue,
        bounds: Bounds,
        limits: Limits,
        feed_limits: FeedLimits = DEFAULT_FEED_LIMITS,
        *,
        version: str,
        start_time_us: int,
    ) -> None:
        """Serve an engine, whose leases are waited for in `leases`; `bounds` and `limits` are in force."""
        self._engine = engine
        self._leases = leases
        self._bounds = bounds
        self._limits = limits
        self._feed_limits = feed_limits
        self._version = version
        self._start_time_us = start_time_us

    async def GetServerInfo(
        self, request: v1.GetServerInfoRequest, context: Context
    ) -> v1.GetServerInfoResponse:
        """Tell what serves."""
        return v1.GetServerInfoResponse(
            version=self._version,
            store_id=self._engine.store_id,
            engine=self._engine.name,
            durability=self._engine.durability,
            start_time=replies.timestamp(self._start_time_us),
            session_count=await self._engine.count(),
            limits=self._limits_message(),
            scrub=replies.scrub(self._engine.scrubbed()),
            clock_disbelief=replies.disbelief(self._engine.disbelief()),
        )

    # Mutations.

    async def CreateSession(
        self, request: v1.CreateSessionRequest, context: Context
    ) -> v1.CreateSessionResponse:
        """Make a session."""
        reply, answer = await self._write(request, context)
        return v1.CreateSessionResponse(result=replies.result(answer, reply))

    async def AppendMessages(
        self, request: v1.AppendMessagesRequest, context: Context
    ) -> v1.AppendMessagesResponse:
        """Add messages at the end."""
        wait = wait_s(request.lease_wait, "lease_wait")
        reply, answer = await self._write(request, context, patience_s(wait, context))
        return v1.AppendMessagesResponse(
            result=replies.result(answer, reply), first_index=answer.first_index
        )

    async def ReplaceMessages(
        self, request: v1.ReplaceMessagesRequest, context: Context
    ) -> v1.ReplaceMessagesResponse:
        """Replace a range of messages."""
        reply, answer = await self._write(request, context)
        return v1.ReplaceMessagesResponse(result=replies.result(answer, reply))

    async def PopMessage(
        self, request: v1.PopMessageRequest, context: Context
    ) -> v1.PopMessageResponse:
        """Remove the last message and give it back."""
        reply, answer = await self._write(request, context)
        return v1.PopMessageResponse(
            result=replies.result(answer, reply), message=answer.message or b""
        )

    async def UpdateSession(
        self, request: v1.UpdateSessionRequest, context: Context
    ) -> v1.UpdateSessionResponse:
        """Change a head."""
        reply, answer = await self._write(request, context)
        return v1.UpdateSessionResponse(result=replies.result(answer, reply))

    async def ForkSession(
        self, request: v1.ForkSessionRequest, context: Context
    ) -> v1.ForkSessionResponse:
        """Copy a session's beginning."""
        reply, answer = await self._write(request, context)
        return v1.ForkSessionResponse(result=replies.result(answer, reply))

    async def DeleteSession(
        self, request: v1.DeleteSessionRequest, context: Context
    ) -> v1.DeleteSessionResponse:
        """Remove a session."""
        reply, answer = await self._write(request, context)
        return v1.DeleteSessionResponse(result=replies.result(answer, reply))

    async def _write(
        self, message: MutationRequest, context: Context, lease_wait_s: float = 0.0
    ) -> tuple[Reply, Answer]:
        until_s = deadline_s(context)
        if message.ByteSize() < _CHECKED_ASIDE_BYTES_MIN:
            request = to_request(message, self._bounds, until_s)
        else:
            request = await asyncio.to_thread(to_request, message, self._bounds, until_s)
        if lease_wait_s and not request.fencing_token:
            reply = await self._leases.submit(request, lease_wait_s)
        else:
            (reply,) = await self._engine.submit([request])
        refuse_if_refused(reply)
        assert isinstance(reply.outcome, Answer)
        return reply, reply.outcome

    # Reads.

    async def GetSession(
        self, request: v1.GetSessionRequest, context: Context
    ) -> v1.GetSessionResponse:
        """Read a head and messages."""
        tail = Tail.of(request, self._bounds)
        cursor = self._engine.cursor()  # before the read: a watch from here misses nothing
        taken = await self._engine.read(request.key, tail.select, REPLY_BYTES_MAX)
        return v1.GetSessionResponse(
            cursor=cursor,
            session=replies.session(taken.head, self._limits),
            start=taken.start,
            messages=codec.join(taken.lines),
            truncated=taken.next < taken.head.message_count,
            next=taken.next,
        )

    async def ReadMessages(
        self, request: v1.ReadMessagesRequest, context: Context
    ) -> AsyncIterator[v1.ReadMessagesResponse]:
        """Stream a range of messages."""
        wanted = Range.of(request, self._bounds)
        more = True
        while more:
            taken = await self._engine.read(wanted.key, wanted.select, REPLY_BYTES_MAX)
            more = wanted.advance(taken)
            yield v1.ReadMessagesResponse(
                revision=taken.head.revision,
                start=taken.start,
                messages=codec.join(taken.lines),
                next=taken.next,
            )

    async def GetHistory(
        self, request: v1.GetHistoryRequest, context: Context
    ) -> v1.GetHistoryResponse:
        """Give a window that is legal to send to a model."""
        window = Window.of(request, self._bounds)
        while not window.done:
            window.take(await self._engine.read(window.key, window.select, REPLY_BYTES_MAX))
        return await asyncio.to_thread(window.reply)

    async def ListSessions(
        self, request: v1.ListSessionsRequest, context: Context
    ) -> v1.ListSessionsResponse:
        """Give a page of heads."""
        listing = Listing.of(request, self._engine.store_id, self._bounds)
        cursor = self._engine.cursor()
        page = await self._engine.list(listing.query)
        sessions, token = listing.page(page, self._limits)
        return v1.ListSessionsResponse(sessions=sessions, next_page_token=token, cursor=cursor)

    # Watching.

    async def Watch(
        self, request_iterator: AsyncIterator[v1.WatchRequest], context: Context
    ) -> AsyncIterator[v1.WatchResponse]:
        """Stream what changes."""
        async with aclosing(watch(self._engine, request_iterator, self._bounds, self._limits)) as made:
            async for response in made:
                yield response

    # The whole store.

    async def Backup(
        self, request: v1.BackupRequest, context: Context
    ) -> AsyncIterator[v1.BackupResponse]:
        """Stream a copy of the store."""
        made = replies.BackupReplies()
        async with aclosing(self._engine.backup()) as blocks:
            async for block in blocks:
                yield made.block(block)
        yield made.summary()

    def _limits_message(self) -> v1.Limits:
        bounds, limits, feed = self._bounds, self._limits, self._feed_limits
        return v1.Limits(
            key_bytes_max=bounds.key_bytes_max,
            message_bytes_max=bounds.messages.message_bytes_max,
            batch_messages_max=bounds.messages.batch_messages_max,
            batch_bytes_max=bounds.messages.batch_bytes_max,
            metadata_bytes_max=bounds.metadata_bytes_max,
            page_size_max=bounds.page_size_max,
            message_depth_max=bounds.messages.message_depth_max,
            request_id_bytes_max=bounds.request_id_bytes_max,
            window_calls_max=limits.window_calls_max,
            window_bytes_max=limits.window_bytes_max,
            window_request_ids_max=limits.window_request_ids_max,
            window_age_max=Duration(seconds=limits.window_age_max_s),
            lease_ttl_min=replies.duration(bounds.lease_ttl_s_min),
            lease_ttl_max=replies.duration(bounds.lease_ttl_s_max),
            watchers_max=feed.watchers_max,
            watch_keys_max=bounds.watch_keys_max,
            feed_age_max=replies.duration(feed.age_s_max),
            feed_bytes_max=feed.bytes_max,
        )

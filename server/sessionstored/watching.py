"""One Watch call: what it asks for, and from what the engine gives to what goes on the wire.

A caller's later requests are listened to beside the stream of replies; one that is wrong ends the watch.
Knows protobuf, and no grpc: requests come as an iterator, and refusals are raised.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress

from sessionstore import codec
from sessionstore.v1 import session_store_pb2 as v1

from sessionstored import replies
from sessionstored.engine import Engine, Refused, Watch
from sessionstored.engine.events import Batch, Changed, Deleted, Event, LeaseTold, Loaded
from sessionstored.reads import REPLY_BYTES_MAX
from sessionstored.requests import Bounds, check_key, refuse
from sessionstored.rules import Limits

IDLE_S = 10.0
_IDLE_S_MIN, _IDLE_S_MAX = 1.0, 3600.0


async def watch(
    engine: Engine, requests: AsyncIterator[v1.WatchRequest], bounds: Bounds, limits: Limits
) -> AsyncGenerator[v1.WatchResponse, None]:
    """Serve one call.

    Args:
        engine: what is watched.
        requests: as they arrive; the first one is there.
        bounds: the limits in force, of requests,
        limits: and of sessions.

    Raises:
        Refused: see `Engine.watch` and `Watch.batches`; what is wrong with a request.

    """
    first = await anext(requests)
    watching, idle_s = _begin(engine, first, bounds)
    watching.taken()
    listening = asyncio.ensure_future(_listen(watching, requests, bounds))
    try:
        cursor = watching.cursor
        yield v1.WatchResponse(cursor=cursor)
        async with aclosing(watching.batches(idle_s)) as batches:
            async for batch in batches:
                for response in responses(batch, cursor, limits):
                    yield response
                cursor = batch.cursor
    finally:
        watching.close()
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening


def _begin(engine: Engine, request: v1.WatchRequest, bounds: Bounds) -> tuple[Watch, float]:
    """Begin the watch that the first request asks for."""
    idle_s = IDLE_S
    if request.HasField("progress_interval"):
        idle_s = request.progress_interval.seconds + request.progress_interval.nanos / 1e9
        if not _IDLE_S_MIN <= idle_s <= _IDLE_S_MAX:
            _invalid("progress_interval", f"it is {idle_s:g} s; 1 s to 1 h are allowed")
    if request.prefix and request.keys:
        _invalid("prefix", "it is given together with keys")
    if request.removed_keys:
        _invalid("removed_keys", "nothing is watched yet")
    keys = _keys(request, bounds)
    if len(request.prefix.encode()) > bounds.key_bytes_max:
        _invalid("prefix", f"it is longer than a key, which has {bounds.key_bytes_max} bytes at most")
    _check_count(len(keys), bounds)
    return engine.watch(None if keys else request.prefix, keys, request.cursor), idle_s


async def _listen(watching: Watch, requests: AsyncIterator[v1.WatchRequest], bounds: Bounds) -> None:
    """Do what later requests ask for; the first wrong one ends the watch."""
    try:
        async for request in requests:
            if request.prefix:
                _invalid("prefix", "only the first request of a stream may name one")
            if request.HasField("progress_interval"):
                _invalid("progress_interval", "only the first request of a stream may have one")
            added = _keys(request, bounds)
            _check_count(watching.count_with(added, request.removed_keys), bounds)
            watching.remove(request.removed_keys)
            watching.add(added, request.cursor)
            watching.taken()
    except Refused as refused:
        watching.end(refused.refusal)


def _keys(request: v1.WatchRequest, bounds: Bounds) -> set[str]:
    return {check_key(key, bounds, "keys") for key in request.keys}


def _check_count(count: int, bounds: Bounds) -> None:
    if count > bounds.watch_keys_max:
        _invalid("keys", f"there are {count}; one stream may name {bounds.watch_keys_max}")


def _invalid(field: str, detail: str) -> None:
    refuse("ARGUMENT_INVALID", f"{field}: {detail}", field=field, detail=detail)


# replies ----------------------------------------------------------------------------------------------------


def responses(batch: Batch, before: bytes, limits: Limits) -> Iterator[v1.WatchResponse]:
    """A batch as replies of about 1 MiB at most; only the last one has the cursor behind all of it.

    Args:
        batch: what the engine gave.
        before: the cursor before it.
        limits: those in force; they say when a session ends.

    """
    response = v1.WatchResponse(cursor=before)
    size = 0
    for event in batch.events:
        for message, message_bytes in _messages(event, limits):
            if response.events and size + message_bytes > REPLY_BYTES_MAX:
                yield response
                response, size = v1.WatchResponse(cursor=before), 0
            response.events.append(message)
            size += message_bytes
    response.cursor, response.in_step = batch.cursor, batch.in_step
    yield response


def _messages(event: Event, limits: Limits) -> Iterator[tuple[v1.WatchEvent, int]]:
    """An event as messages, each with about its size: several if it is large."""
    what = event.what
    message = v1.WatchEvent(
        key=event.key, revision=event.revision, previous_revision=event.previous_revision
    )
    match what:
        case Deleted():
            message.deleted.expired = what.expired
            yield message, 0
        case LeaseTold():
            lease = what.lease
            as_of_s = lease.expires_s if what.ended else lease.acquired_s
            message.lease.lease.CopyFrom(replies.lease(lease, as_of_s))
            message.lease.ended = what.ended
            yield message, 0
        case Loaded():
            message.changed.session.CopyFrom(replies.session(what.head, limits))
            message.changed.whole = not what.start
            message.changed.start = what.start
            message.changed.messages = codec.join(what.lines)
            message.changed.partial = what.partial
            message.changed.source_key = what.source_key
            yield message, len(message.changed.messages) + len(what.head.metadata)
        case Changed():
            yield from _changed(message, what, limits)
        case _:
            raise AssertionError(f"an engine gave {what!r}")


def _changed(
    message: v1.WatchEvent, what: Changed, limits: Limits
) -> Iterator[tuple[v1.WatchEvent, int]]:
    message.changed.session.CopyFrom(replies.session(what.head, limits))
    message.changed.delete_count = what.delete_count
    start = what.start
    runs = list(_runs(what.lines))
    for n, run in enumerate(runs):
        message.changed.start = start
        message.changed.messages = codec.join(run)
        message.changed.partial = n + 1 < len(runs)
        yield message, len(message.changed.messages) + len(what.head.metadata)
        message.changed.delete_count = 0
        start += len(run)


def _runs(lines: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Messages in runs that a reply holds; one run at least."""
    begin = size = 0
    for n, line in enumerate(lines):
        if n > begin and size + len(line) + 1 > REPLY_BYTES_MAX:
            yield lines[begin:n]
            begin, size = n, 0
        size += len(line) + 1
    yield lines[begin:]

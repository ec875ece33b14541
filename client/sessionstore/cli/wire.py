"""Operations that carry messages as the bytes that they are, for who moves sessions rather than uses them.

The same kind of generators as `sessionstore._operations`, and run by the same client. `split` cuts what is
too much for one call. This module must not know of files or of the terminal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from sessionstore import codec
from sessionstore._operations import (
    APPEND,
    CREATE,
    GET,
    READ,
    UPDATE,
    Held,
    Operation,
    Rpc,
    Tail,
    ask,
    change,
    done,
    head_of,
    lines_of,
    metadata_bytes,
    pb,
    text,
    timestamp,
)
from sessionstore._types import Message, ServerLimits
from sessionstore.errors import NotFoundError, error_for

# A call of this size is answered well within the default timeout, also over a slow network.
CALL_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Landed:
    """A change that is applied."""

    revision: int
    message_count: int
    first_index: int
    replayed: bool
    """It was applied by an earlier run, under the same request_id."""


def tail(key: str, last: int) -> Operation[Tail | None]:
    """A head and the last so many messages; None if there is no such session.

    Raises ConflictError if the session is rewritten while a tail of more than one reply is read.
    """
    request = pb.GetSessionRequest(key=text("key", key, "KEY_INVALID"), last=last)
    try:
        reply = yield from ask(GET, request)
    except NotFoundError:
        return None
    head, lines = head_of(reply.session), lines_of(reply.messages)
    if reply.truncated:
        left = head.message_count - reply.next
        rest = pb.ReadMessagesRequest(key=key, start=reply.next, limit=left, known_revision=head.revision)
        blocks: list[pb.ReadMessagesResponse] = yield Rpc(READ, rest)
        for block in blocks:
            lines.extend(lines_of(block.messages))
    return Tail(head, reply.start, lines)


def append(
    key: str, lines: Sequence[bytes], *, expected_revision: int | None = None, request_id: str = ""
) -> Operation[Landed]:
    """Add lines at the end: one call, all or nothing."""
    request = pb.AppendMessagesRequest(
        key=text("key", key, "KEY_INVALID"),
        request_id=request_id,
        expected_revision=expected_revision,
        messages=codec.join(lines),
    )

    def finish(reply: pb.AppendMessagesResponse) -> Operation[Landed]:
        result = reply.result
        return done(Landed(result.revision, result.message_count, reply.first_index, result.replayed))

    return change(APPEND, request, Held(key), finish)


def create(
    key: str,
    lines: Sequence[bytes],
    metadata: Message,
    last_consolidated: int,
    create_time: datetime | None,
    *,
    request_id: str = "",
) -> Operation[Landed]:
    """Make a session that must not exist, with its first lines."""
    request = pb.CreateSessionRequest(
        key=text("key", key, "KEY_INVALID"),
        request_id=request_id,
        messages=codec.join(lines),
        metadata=metadata_bytes(metadata),
        last_consolidated=last_consolidated,
        create_time=timestamp("create_time", create_time),
    )

    def finish(reply: pb.CreateSessionResponse) -> Operation[Landed]:
        result = reply.result
        return done(Landed(result.revision, result.message_count, 0, result.replayed))

    return change(CREATE, request, Held(key), finish)


def consolidate(
    key: str, last_consolidated: int, *, expected_revision: int, request_id: str
) -> Operation[Landed]:
    """Set how many messages from the front are summarised elsewhere."""
    request = pb.UpdateSessionRequest(
        key=text("key", key, "KEY_INVALID"),
        request_id=request_id,
        expected_revision=expected_revision,
        last_consolidated=last_consolidated,
    )
    request.update_mask.paths.append("last_consolidated")

    def finish(reply: pb.UpdateSessionResponse) -> Operation[Landed]:
        result = reply.result
        return done(Landed(result.revision, result.message_count, 0, result.replayed))

    return change(UPDATE, request, Held(key), finish)


def split(lines: Sequence[bytes], limits: ServerLimits) -> Iterator[Sequence[bytes]]:
    """Cut lines into batches that the daemon takes, in order; no lines give one empty batch.

    A line that is larger than any batch gets one of its own, and the daemon refuses it by its size.
    """
    bytes_max = min(limits.batch_bytes_max, CALL_BYTES_MAX)
    start = size = 0
    for index, line in enumerate(lines):
        full = size + len(line) + 1 > bytes_max or index - start == limits.batch_messages_max
        if full and index > start:
            yield lines[start:index]
            start, size = index, 0
        size += len(line) + 1
    yield lines[start:]


def check(lines: Sequence[bytes], limits: ServerLimits) -> None:
    """Refuse, before any of them is sent, lines that the daemon would refuse.

    Raises InvalidArgumentError, or TooLargeError, with the index of the first line that is wrong.
    """
    block = codec.join(lines)
    bounds = codec.Limits(limits.message_bytes_max, limits.message_depth_max, len(lines), len(block))
    try:
        codec.split_block(block, bounds)
    except codec.MessageError as error:
        raise error_for(error.reason, str(error), error.metadata) from None

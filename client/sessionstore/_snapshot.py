"""A session at one revision, and how it becomes the next one. Pure values; no I/O, no locks but the caller's.

A snapshot is never a mix of two revisions. Its messages are the lines that the daemon stores, so that no
change to a dict that was read from them can get back to the store.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf.message import Message as Proto

from sessionstore import _operations as ops
from sessionstore import codec
from sessionstore._operations import Held, Tail, pb
from sessionstore._types import Head, Message, MessageInput
from sessionstore.v1 import session_pb2


class Lines:
    """The first `count` lines of a list that only grows: appending to the newest view copies nothing."""

    __slots__ = ("_shared", "count")

    def __init__(self, shared: list[bytes], count: int) -> None:
        self._shared = shared
        self.count = count

    def splice(self, start: int, delete_count: int, lines: Sequence[bytes]) -> "Lines":
        """A view with `delete_count` lines from `start` on replaced. One thread at a time per list."""
        if start == self.count == len(self._shared):
            self._shared.extend(lines)
            if len(self._shared) == start + len(lines):
                return Lines(self._shared, len(self._shared))
            # A signal handler interrupted this, and was quicker: what it added is behind these lines.
        kept = self._shared[: self.count]
        kept[start : start + delete_count] = lines
        return Lines(kept, len(kept))

    def begins(self, other: "Lines") -> bool:
        """Whether `other` begins with these lines."""
        if self.count > other.count:
            return False
        mine, theirs = self._shared, other._shared
        return mine is theirs or mine[: self.count] == theirs[: self.count]

    def since(self, start: int) -> list[bytes]:
        """The lines from `start` on."""
        return self._shared[start : self.count]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session at one revision. `head` is None if it does not exist."""

    key: str
    head: Head | None
    lines: Lines
    seen: int
    """The highest revision known: the head's, or that of the removal."""
    as_of_s: float = field(default=0.0, compare=False)
    """When it was known to be what is stored, on the clock of `_calls.age_clock`: what was acknowledged to
    anybody before is in it."""

    @property
    def revision(self) -> int:
        """The revision, as `expected_revision` means it: 0 if the session does not exist."""
        return self.head.revision if self.head else 0

    @property
    def held(self) -> Held:
        """What a writer tells the daemon that it holds."""
        return Held(self.key, self.revision, self.lines.count)


def absent(key: str, seen: int = 0, as_of_s: float = 0.0) -> Snapshot:
    """The snapshot of a session that does not exist."""
    return Snapshot(key, None, Lines([], 0), seen, as_of_s)


def joined(before: Snapshot, tail: Tail, as_of_s: float = 0.0) -> Snapshot:
    """The snapshot that a read gives to one who held `before`."""
    kept = before.lines.splice(tail.start, before.lines.count - tail.start, tail.lines)
    return Snapshot(before.key, tail.head, kept, tail.head.revision, as_of_s)


@dataclass(frozen=True, slots=True)
class Effect:
    """What a change does: messages[start : start + delete_count] = lines, and perhaps new metadata."""

    start: int
    delete_count: int
    lines: Sequence[bytes] = ()
    metadata: Message | None = None


# What a change does to the snapshot right before it.
EffectOn = Callable[[Snapshot], Effect]


def advanced(before: Snapshot, result: session_pb2.WriteResult, effect: Effect) -> Snapshot:
    """The snapshot after a change that came right after `before`."""
    updated = ops.moment(result.update_time)
    base = before.head or Head(before.key, 0, 0, 0, {}, updated, updated)
    head = replace(
        base,
        revision=result.revision,
        message_count=result.message_count,
        last_consolidated=result.last_consolidated,
        metadata=base.metadata if effect.metadata is None else effect.metadata,
        update_time=updated,
        expire_time=ops.end_of(result),
    )
    lines = before.lines.splice(effect.start, effect.delete_count, effect.lines)
    return Snapshot(before.key, head, lines, result.revision, before.as_of_s)


def applied(before: Snapshot, parts: Sequence[pb.WatchEvent]) -> Snapshot | None:
    """The session after a change of one part or several; None if it does not follow `before` or fit it."""
    first, last = parts[0].changed, parts[-1]
    if not first.whole and parts[0].previous_revision != before.revision:
        return None
    lines = Lines([], 0) if first.whole else before.lines
    new = [line for part in parts for line in ops.lines_of(part.changed.messages)]
    delete_count = sum(part.changed.delete_count for part in parts)
    head = ops.head_of(last.changed.session)
    if first.start + delete_count > lines.count or head.revision != last.revision:
        return None
    lines = lines.splice(first.start, delete_count, new)
    if lines.count != head.message_count:
        return None
    return Snapshot(before.key, head, lines, head.revision, before.as_of_s)


def effect_of(before: Snapshot, request: Proto, reply: Any) -> Effect | None:
    """What an own change did to the session right before it; None if that is not known here."""
    count = before.lines.count
    match request:
        case pb.AppendMessagesRequest():
            return Effect(reply.first_index, 0, ops.lines_of(request.messages))
        case pb.ReplaceMessagesRequest():
            deleted = request.delete_count if request.HasField("delete_count") else count - request.start
            return Effect(request.start, deleted, ops.lines_of(request.messages))
        case pb.PopMessageRequest():
            return Effect(count - 1, 1)
        case pb.UpdateSessionRequest():
            return _update_effect(before, request)
    return None


def _update_effect(before: Snapshot, request: pb.UpdateSessionRequest) -> Effect | None:
    paths = list(request.update_mask.paths)
    names = [path.removeprefix("metadata.") for path in paths if path.startswith("metadata.")]
    if before.head is None or set(paths) - {f"metadata.{name}" for name in names} - {
        "metadata", "last_consolidated",
    }:  # fmt: skip
        return None
    given = ops.decode(request.metadata or b"{}")
    metadata = given if "metadata" in paths else None
    if names:
        whole = {**before.head.metadata, **given}
        metadata = {name: value for name, value in whole.items() if name in given or name not in names}
    return Effect(before.lines.count, 0, (), metadata)


def difference(
    old: Sequence[bytes], new: Iterable[MessageInput]
) -> tuple[int, int, list[bytes]] | None:
    """The smallest single replacement that makes `old` into `new`: start, delete_count, lines. None if equal.

    Messages are compared by what JSON says, so an edit in place is seen, and so are ``True`` for ``1``
    and another order of names; what was not touched is not sent, and keeps its bytes.
    """
    messages = list(new)
    shorter = min(len(old), len(messages))
    start = next((i for i in range(shorter) if not _same(old[i], messages[i])), shorter)
    rest = shorter - start
    same_end = next((i for i in range(rest) if not _same(old[-1 - i], messages[-1 - i])), rest)
    stop = len(messages) - same_end
    delete_count = len(old) - same_end - start
    if not delete_count and start == stop:
        return None
    return start, delete_count, [ops.encode_one(messages[i], i) for i in range(start, stop)]


def _same(line: bytes, message: MessageInput) -> bool:
    """Whether a message says what a stored line says, however that was written."""
    try:
        text = json.dumps(message, ensure_ascii=False)
        # surrogatepass: files from elsewhere may hold half a surrogate pair.
        same = text.encode(errors="surrogatepass") == line
        same = same or text == json.dumps(ops.decode(line), ensure_ascii=False)
        return same and codec.names_are_strings(message)
    except (TypeError, ValueError, RecursionError):
        return False  # no JSON: what is wrong with it is said when it is written

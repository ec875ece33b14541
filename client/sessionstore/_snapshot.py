"""A session at one revision, and how it becomes the next one. Pure values; no I/O, no locks but the caller's.

A snapshot is never a mix of two revisions. Its messages are the lines that the daemon stores, so that no
change to a dict that was read from them can get back to the store.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sessionstore import _operations as ops
from sessionstore import codec
from sessionstore._operations import Held, Tail
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
            return Lines(self._shared, len(self._shared))
        kept = self._shared[: self.count]
        kept[start : start + delete_count] = lines
        return Lines(kept, len(kept))

    def begins(self, other: "Lines") -> bool:
        """Whether `other` is known to begin with these lines."""
        return self._shared is other._shared and self.count <= other.count

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

    @property
    def revision(self) -> int:
        """The revision, as `expected_revision` means it: 0 if the session does not exist."""
        return self.head.revision if self.head else 0

    @property
    def held(self) -> Held:
        """What a writer tells the daemon that it holds."""
        return Held(self.key, self.revision, self.lines.count)


def absent(key: str, seen: int = 0) -> Snapshot:
    """The snapshot of a session that does not exist."""
    return Snapshot(key, None, Lines([], 0), seen)


def joined(before: Snapshot, tail: Tail) -> Snapshot:
    """The snapshot that a read gives to one who held `before`."""
    kept = before.lines.splice(tail.start, before.lines.count - tail.start, tail.lines)
    return Snapshot(before.key, tail.head, kept, tail.head.revision)


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
    return Snapshot(before.key, head, lines, result.revision)


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

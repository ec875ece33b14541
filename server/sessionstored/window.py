"""The window of GetHistory, from the end of a session, without reading it from its start.

Sans-IO: `select` says what to read next, `take` is given what was read, until `done`; then `reply` is the
answer. Reads are of one revision each, and only one of them makes the answer, so the window is of one
revision too.

It first reads the last `max_messages`, and twice as many while no user turn is among them. If these are more
than a reply holds, it looks for the longest tail that fits, by halving: a read costs at most 1 MiB, and there
are at most twenty or so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sessionstore import codec, history
from sessionstore.v1 import session_store_pb2

from sessionstored.engine import Refused, Slice
from sessionstored.reads import REPLY_BYTES_MAX
from sessionstored.requests import Bounds, check_count, check_key, refuse
from sessionstored.rules import Head, Refusal

MESSAGES_DEFAULT = 500
KEEP_NAMES_MAX = 100
_Entry = dict[str, object]


@dataclass(slots=True)
class Window:
    """One GetHistory call."""

    key: str
    max_messages: int
    keep: tuple[str, ...] = ()
    done: bool = False
    _wanted: int = 0
    """How many messages to read next, from the end; 0 for all of them."""
    _fits: int = 0
    """The longest tail that is known to fit."""
    _exceeds: int = 0
    """The shortest tail that is known not to fit; 0 if none is known."""
    _best: Slice | None = None

    @classmethod
    def of(cls, request: session_store_pb2.GetHistoryRequest, bounds: Bounds) -> "Window":
        """Check the arguments. Raises Refused."""
        key = check_key(request.key, bounds)
        given = request.HasField("max_messages")
        count = check_count(request.max_messages, "max_messages") if given else MESSAGES_DEFAULT
        return cls(key, count, _keep(request.keep), _wanted=count)

    def select(self, head: Head) -> tuple[int, int]:
        """The messages to read next."""
        first = head.message_count - self._wanted if self._wanted else 0
        return max(first, head.last_consolidated), head.message_count

    def take(self, taken: Slice) -> None:
        """Go on with what was read."""
        asked = taken.head.message_count - taken.start
        if taken.next < taken.head.message_count:
            self._exceeds = asked
        elif self._exceeds:
            self._best, self._fits = taken, self._wanted
        else:
            self._best, self._fits, self._wanted = taken, asked, 2 * asked
            self.done = not _falls_short(self._tail(), taken, self.max_messages)
            return
        # Strictly between the two, so this ends however the session changes meanwhile.
        self.done = self._exceeds - self._fits <= 1
        self._wanted = (self._fits + self._exceeds) // 2

    def reply(self) -> session_store_pb2.GetHistoryResponse:
        """The answer; computes, and does not wait."""
        assert self._best is not None
        tail = self._tail()
        truncated = _falls_short(tail, self._best, self.max_messages)
        block = self._block(tail)
        while len(block) > REPLY_BYTES_MAX and len(tail) > 1:
            # Written anew, messages can be longer than they were.
            truncated, tail = True, tail[(len(tail) + 1) // 2 :]
            block = self._block(tail)
        return session_store_pb2.GetHistoryResponse(
            revision=self._best.head.revision, messages=block, truncated=truncated
        )

    def _tail(self) -> list[_Entry]:
        assert self._best is not None
        return [_decode(self.key, line) for line in self._best.lines]

    def _block(self, tail: Sequence[_Entry]) -> bytes:
        entries = history.history(tail, max_messages=self.max_messages, keep=self.keep)
        return codec.join(_encode(entry) for entry in entries)


def _keep(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) > KEEP_NAMES_MAX:
        detail = f"holds {len(names)} names; the limit is {KEEP_NAMES_MAX}"
        refuse("ARGUMENT_INVALID", f"keep {detail}", field="keep", detail=detail)
    try:
        return history.kept(names)
    except history.ArgumentError as error:
        refuse("ARGUMENT_INVALID", str(error), field=error.field, detail=error.detail)


def _falls_short(tail: Sequence[_Entry], taken: Slice, max_messages: int) -> bool:
    """Whether more messages before this tail could make the window another one."""
    whole = taken.start <= taken.head.last_consolidated
    enough = bool(max_messages) and len(tail) >= max_messages and not history.needs_more(tail)
    return not whole and not enough


def _decode(key: str, line: bytes) -> _Entry:
    try:
        return codec.decode(line)
    except codec.MessageError as error:
        metadata = {"key": key, "file": "", "line": "0", "detail": str(error)}
        text = f"a message of session {key!r} cannot be read: {error}"
        raise Refused(Refusal("DATA_LOSS", text, metadata)) from error


def _encode(entry: _Entry) -> bytes:
    """Write an entry. What files from elsewhere may hold, NaN or half a surrogate pair, comes through."""
    try:
        return json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(entry).encode()

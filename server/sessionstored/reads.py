"""Which messages a read asks for: pure selections, to be made on the head of the very revision that is read.

Each `select` method gets a head and gives the range [start, stop), or raises `Refused`. An engine may call it
more than once, on another thread; it must not wait.
"""

from dataclasses import dataclass

from sessionstore.v1 import session_store_pb2

from sessionstored.engine import Refused, Slice
from sessionstored.requests import Bounds, check_count, check_key, check_revision
from sessionstored.rules import Head, Refusal, tail_start

# No reply holds more bytes of messages or heads than this, or one larger message: no client ever meets
# another language's default receive limit of 4 MiB.
REPLY_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Tail:
    """What GetSession asks for: what is news to the caller, or the last few messages, up to the end."""

    known_revision: int = 0
    known_message_count: int = 0
    last: int | None = None

    @classmethod
    def of(cls, request: session_store_pb2.GetSessionRequest, bounds: Bounds) -> "Tail":
        """Check the arguments. Raises Refused."""
        check_key(request.key, bounds)
        return cls(
            check_revision(request.known_revision, "known_revision"),
            check_count(request.known_message_count, "known_message_count"),
            check_count(request.last, "last") if request.HasField("last") else None,
        )

    def select(self, head: Head) -> tuple[int, int]:
        """The range."""
        count = head.message_count
        start = tail_start(head, self.known_revision, self.known_message_count)
        return max(start, 0 if self.last is None else count - self.last), count


@dataclass(slots=True)
class Range:
    """What one ReadMessages stream asks for: where it is, and which rewrites would make it wrong.

    The end is fixed by the first block, so that a stream beside a busy writer ends. What the stream has yet
    to send must not have been rewritten since its first block, and what the caller held before not since
    `known_revision`.
    """

    key: str
    start: int
    limit: int
    known_revision: int
    stop: int | None = None

    @classmethod
    def of(cls, request: session_store_pb2.ReadMessagesRequest, bounds: Bounds) -> "Range":
        """Check the arguments. Raises Refused."""
        return cls(
            check_key(request.key, bounds),
            request.start,
            check_count(request.limit, "limit"),
            check_revision(request.known_revision, "known_revision"),
        )

    def select(self, head: Head) -> tuple[int, int]:
        """The range that is still to come. Raises Refused: REVISION_CONFLICT, INDEX_OUT_OF_RANGE."""
        if self.known_revision and not head.rewrite_revision <= self.known_revision <= head.revision:
            raise Refused(self._rewritten(head))
        if self.stop is not None:
            return self.start, self.stop
        if not 0 <= self.start <= head.message_count:
            raise Refused(_out_of_range(self.start, head.message_count))
        return self.start, self._stop(head)

    def advance(self, taken: Slice) -> bool:
        """Go on behind a block that was read. Returns whether there is more to come."""
        if self.stop is None:
            self.stop = self._stop(taken.head)
            self.known_revision = self.known_revision or taken.head.revision
        self.start = taken.next
        return self.start < self.stop

    def _stop(self, head: Head) -> int:
        return min(head.message_count, self.start + self.limit) if self.limit else head.message_count

    def _rewritten(self, head: Head) -> Refusal:
        return Refusal(
            "REVISION_CONFLICT",
            f"messages of session {self.key!r} were rewritten after revision {self.known_revision}: "
            "read it from its start",
            {
                "key": self.key,
                "expected_revision": str(self.known_revision),
                "revision": str(head.revision),
                "message_count": str(head.message_count),
            },
        )


def _out_of_range(start: int, count: int) -> Refusal:
    return Refusal(
        "INDEX_OUT_OF_RANGE",
        f"start {start} is out of range: the session has {count} messages",
        {"field": "start", "index": str(start), "message_count": str(count)},
    )

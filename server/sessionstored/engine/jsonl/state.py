"""A hot session in memory, and what a group in the making does to it.

A session's messages are the first `filed` message lines of its file, and then lines that only memory holds.
Memory holds the lines from index `base` on: those not yet in the file are pinned, the others are cache.
`lines` only grows in place; anything else makes a new list, so a reader who took (head, base, lines) has a
stable snapshot.

Only the committer's thread changes a State, under the engine's lock. Nothing here does I/O.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import apsw

from sessionstored.engine import Refused
from sessionstored.engine.jsonl import pages
from sessionstored.engine.jsonl.blocks import Blocks, Mark
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.tables import WrongRow
from sessionstored.rules import Change, Head, Refusal

HEADERS_BYTES_MIN = 8192
"""A smaller file is not written anew for its superseded headers."""


@dataclass(slots=True)
class File:
    """What is known of a session's file."""

    name: str
    generation: int = 0
    """How often it was written anew."""
    exists: bool = False
    blocks: Blocks = field(default_factory=Blocks)
    count: int = 0
    """How many message lines it holds: more than `filed` after a removal, until it is written anew."""
    metadata: bytes = b""
    last_consolidated: int = 0
    """What its last header says, with `metadata`."""
    superseded_bytes: int = 0
    """The size of the headers that a later one replaces."""
    revision: int = 0
    """The revision that its catalogue row has; 0 if it has none."""
    size: int = 0
    inode: int = 0
    mtime_ns: int = 0
    durable: Mark = (0, 0)
    """What of it the last flush made durable."""
    expire_time_us: int = 0
    """What its last header says, too."""
    torn_write: bool = False
    """Our own last append was cut short: bytes beyond blocks.length are ours, and part of the journal."""


@dataclass(slots=True)
class State:
    """A session in memory."""

    key: str
    file: File
    head: Head | None = None
    """None: deleted, and not yet forgotten by a checkpoint."""
    base: int = 0
    lines: list[bytes] = field(default_factory=list)
    cached_bytes: int = 0
    """The size of `lines`."""
    filed: int = 0
    dirty: bool = False
    """Changed since its catalogue row was written."""
    pins: int = 0
    """How many readers need its lines to stay."""
    deleted: int = 0
    """If it is deleted: the revision of that."""
    bad: Refusal | None = None
    """Its file is damaged: it is neither served nor written."""
    claimed: Refusal | None = None
    """Another file claims its key, too: it is not served."""
    damage_set_aside: bool = False
    """The bytes beyond blocks.length are in quarantine: they may be cut by the first append."""

    @property
    def refusal(self) -> Refusal | None:
        """Why it is not served."""
        return self.claimed or self.bad

    @property
    def count(self) -> int:
        """How many messages there are."""
        return self.head.message_count if self.head else 0

    @property
    def wants_rewrite(self) -> bool:
        """The file holds lines that the session no longer has, or is mostly headers."""
        file = self.file
        if self.head is None or self.bad or not file.exists:
            return False
        return file.count > self.filed or file.superseded_bytes * 2 > max(
            file.blocks.length, HEADERS_BYTES_MIN
        )

    @property
    def header_pending(self) -> bool:
        """The file's last header is not what the head says."""
        return self.head is not None and (
            self.head.metadata != self.file.metadata
            or self.head.last_consolidated != self.file.last_consolidated
            or self.head.expire_time_us != self.file.expire_time_us
        )

    @property
    def behind(self) -> bool:
        """The file lacks something that is committed, or has a part of what it should not have any more."""
        if self.head is None:
            return self.file.exists
        return (
            self.filed < self.count
            or self.file.count > self.filed
            or not self.file.exists
            or self.file.torn_write
            or self.header_pending
        )

    def drop_cache(self) -> int:
        """Forget lines that the file has; returns how many bytes that frees."""
        if self.base >= self.filed:
            return 0
        before = self.cached_bytes
        self.lines = self.lines[self.filed - self.base :]
        self.base = self.filed
        self.cached_bytes = sum(map(len, self.lines))
        return before - self.cached_bytes

    def apply(self, keep: int, added: Sequence[bytes], head: Head) -> None:
        """Become: the first `keep` messages, then `added`, under `head`."""
        if keep == self.base + len(self.lines):
            self.lines.extend(added)
        else:
            self.lines = [*self.lines[: keep - self.base], *added] if keep >= self.base else list(added)
            self.base = min(self.base, keep)
            self.cached_bytes = sum(map(len, self.lines)) - sum(map(len, added))
        self.cached_bytes += sum(map(len, added))
        self.filed = min(self.filed, keep)
        self.head = head
        self.dirty = True

    def reset(self, name: str, revision: int = 0) -> None:
        """Become a deleted session whose file is gone; a session of the same key may begin anew in it."""
        self.deleted = revision
        self.head, self.lines, self.base, self.cached_bytes, self.filed = None, [], 0, 0, 0
        self.file = File(name, self.file.generation)
        self.bad, self.claimed, self.damage_set_aside, self.dirty = None, None, False, True

    def entry(self) -> Entry:
        """Its catalogue row, as the file is now."""
        assert self.head is not None
        file = self.file
        return Entry(
            self.head,
            file.name,
            file.generation,
            file.blocks.copy(),
            file.size,
            file.inode,
            file.mtime_ns,
            file.superseded_bytes,
        )


def state_of_entry(entry: Entry) -> State:
    """The state of a session of which only the catalogue row is known."""
    head = entry.head
    file = File(
        entry.file,
        entry.generation,
        True,
        entry.blocks,
        head.message_count,
        head.metadata,
        head.last_consolidated,
        entry.superseded_bytes,
        revision=head.revision,
        size=entry.size,
        inode=entry.inode,
        mtime_ns=entry.mtime_ns,
        durable=entry.blocks.mark,
        expire_time_us=head.expire_time_us,
    )
    state = State(
        head.key,
        file,
        head,
        base=head.message_count,
        filed=head.message_count,
        damage_set_aside=entry.size > entry.blocks.length,
    )
    if entry.bad_line:
        state.bad = data_loss(head.key, entry.file, max(0, entry.bad_line), head.damage)
    return state


def data_loss(key: str, file: str, line: int, detail: str) -> Refusal:
    """The refusal for a session that is damaged beyond serving."""
    where = f"sessions/{file}" + (f" line {line}" if line else "")
    return Refusal(
        "DATA_LOSS",
        f"session {key!r} is damaged: {where}: {detail}; nothing of it was changed; "
        "its operator stops the daemon: `sessionstored check` tells more, `sessionstored repair` mends it",
        {"key": key, "file": f"sessions/{file}", "line": str(line), "detail": detail},
    )


def journal_damaged(error: WrongRow | apsw.Error) -> Refusal:
    """The refusal for whoever met damage in the journal."""
    key = error.key if isinstance(error, WrongRow) else ""
    what = str(error) if isinstance(error, WrongRow) else pages.describe(error)
    metadata = {"key": key, "file": "journal.db", "line": "0", "detail": what}
    return Refusal("DATA_LOSS", f"journal.db is damaged: {what}; `sessionstored check` tells more", metadata)


@contextmanager
def reading_journal() -> Iterator[None]:
    """Reads of the journal, and nothing else: what meets damage is refused. Other failures stay failures."""
    try:
        yield
    except (WrongRow, *pages.DAMAGED) as error:
        if isinstance(error, apsw.IOError) and not pages.is_wrong_page(error):
            raise
        raise Refused(journal_damaged(error)) from error


@dataclass(slots=True)
class Draft:
    """A session as a group in the making leaves it: the state's first `keep` messages, then `added`."""

    state: State
    head: Head | None
    keep: int
    added: list[bytes] = field(default_factory=list)
    deleted: int = 0
    """The revision of its last deletion in this group."""
    fresh: bool = False
    """Deleted in this group (and perhaps recreated): nothing of the state's messages is left."""
    forked: Entry | None = None
    """The file that a fork begins with."""
    file: str = ""
    """The file name of a session that this group creates."""

    def change(self, change: Change, suffix: Sequence[bytes]) -> None:
        """Apply one change. `suffix` are the state's messages that stay behind the changed range."""
        end = change.start + change.delete_count
        if change.start >= self.keep:
            start = change.start - self.keep
            self.added[start : start + change.delete_count] = change.messages
        else:
            self.added = [*change.messages, *suffix, *self.added[max(0, end - self.keep) :]]
            self.keep = change.start
        self.head = change.head

    def delete(self, revision: int) -> None:
        """Apply a deletion."""
        self.deleted = revision
        self.head, self.keep, self.added, self.fresh, self.forked = None, 0, [], True, None

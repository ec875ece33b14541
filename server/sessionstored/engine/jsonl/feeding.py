"""The feed in the journal: rows that recovery has passed, and that watchers may still read.

Recovery begins behind the row `checkpoint_row`. The rows up to it are kept for watchers, until they are too
old or too many bytes; `feed_floor` is the last one that went. Both are in `meta`, and change with the rows in
one transaction. Of a session whose metadata is not in a record, only that it changed can be told.

Knows rows, records and SQL; nothing of threads, and not who watches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import apsw

from sessionstored.engine.events import Changed, Deleted, Event, Reload, lease_told
from sessionstored.engine.jsonl.records import (
    AdoptRecord,
    DeleteRecord,
    LeaseRecord,
    Record,
    SessionRecord,
    checksum,
    read_row,
)
from sessionstored.engine.jsonl.tables import is_whole

_ROWS_PER_STEP = 2000
BYTES_PER_STEP = 1 << 20
"""So many rows and bytes go in one transaction: they are overwritten, and commits wait meanwhile."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows as they are kept: (id, body)."""

    rows: Sequence[tuple[int, bytes]]
    position: int
    """Up to here these are all."""


def passed(db: apsw.Connection, after: int, row_id: int, revision: int) -> tuple[int, int, int]:
    """Which rows recovery does not need any more.

    Returns:
        The last of them, and of those behind `after` how many bytes they have, and their highest revision.

    """
    needed = db.execute(
        "SELECT id FROM journal WHERE id > ? AND id <= ? AND last_revision > ? ORDER BY id LIMIT 1",
        (after, row_id, revision),
    ).fetchone()
    through = max(after, row_id if needed is None else _int(needed[0]) - 1)
    found = db.execute(
        "SELECT ifnull(sum(length(body)), 0), ifnull(max(last_revision), 0) FROM journal "
        "WHERE id > ? AND id <= ?",
        (after, through),
    ).fetchone()
    assert found is not None
    return through, _int(found[0]), _int(found[1])


def size(db: apsw.Connection, through: int) -> int:
    """How many bytes the rows up to this one have."""
    found = db.execute(
        "SELECT ifnull(sum(length(body)), 0) FROM journal WHERE id <= ?", (through,)
    ).fetchone()
    assert found is not None
    return _int(found[0])


def prune(
    db: apsw.Connection, through: int, before_s: float, excess: int, step_bytes: int
) -> tuple[int, int] | None:
    """Drop the oldest rows up to `through`: those from before a time, and as many as have `excess` bytes.

    About `step_bytes` at once. In a transaction, which also writes the first of what is returned as
    `feed_floor`.

    Returns:
        The last row that went, and how many bytes; None if nothing is left to do.

    """
    floor = freed = 0
    for row_id, clock_s, body_bytes in db.execute(
        "SELECT id, clock_s, length(body) FROM journal WHERE id <= ? ORDER BY id LIMIT ?",
        (through, _ROWS_PER_STEP),
    ):
        if (float(str(clock_s)) >= before_s and freed >= excess) or freed >= step_bytes:
            break
        floor, freed = _int(row_id), freed + _int(body_bytes)
    if not floor:
        return None
    db.execute("DELETE FROM journal WHERE id <= ?", (floor,))
    return floor, freed


def rows(db: apsw.Connection, after: int, through: int, bytes_max: int) -> Kept | None:
    """The rows behind `after` and up to `through`: about so many bytes of them, one at least.

    Returns None if they are not all there any more, or one is not what was written.
    """
    found: list[tuple[int, bytes]] = []
    total = 0
    with db:  # one moment: what is pruned meanwhile is there, or its floor says so
        floor = db.execute("SELECT value, crc FROM meta WHERE name = 'feed_floor'").fetchone()
        if floor is not None and (not is_whole(("feed_floor", floor[0]), floor[1]) or after < _int(floor[0])):
            return None
        for row_id, revision, clock_s, crc, body in db.execute(
            "SELECT id, last_revision, clock_s, crc, body FROM journal WHERE id > ? AND id <= ? ORDER BY id",
            (after, through),
        ):
            assert isinstance(body, bytes)
            if checksum(_int(row_id), _int(revision), float(str(clock_s)), body) != crc:
                return None
            found.append((_int(row_id), body))
            total += len(body)
            if total >= bytes_max:
                through = _int(row_id)
                break
    return Kept(found, through)


def events(kept: Kept, concerns: Callable[[str], bool], bytes_max: int) -> tuple[list[Event], int]:
    """The events of rows that concern somebody, about so many bytes, and the position up to which."""
    found: list[Event] = []
    total = 0
    for row_id, body in kept.rows:
        if found and total >= bytes_max:
            return found, row_id - 1
        for event in _events(read_row(body)):
            if concerns(event.key):
                found.append(event)
                total += event.size
    return found, kept.position


def _events(records: Iterator[Record]) -> Iterator[Event]:
    for record in records:
        match record:
            case SessionRecord():
                head = record.head
                what: Changed | Reload = Reload(record.source_key)
                if not record.source_key and head.metadata:
                    what = Changed(head, record.start, record.delete_count, record.lines)
                yield Event(head.key, head.revision, record.previous_revision, what)
            case DeleteRecord():
                if not record.file:
                    what_else = Deleted(record.expired)
                    yield Event(record.key, record.revision, record.previous_revision, what_else)
            case AdoptRecord():
                yield Event(record.key, record.revision, record.previous_revision, Reload())
            case LeaseRecord():
                yield lease_told(record.lease, record.event)


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value

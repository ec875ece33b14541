"""What the journal has for each session beyond its catalogue row: as much of it as a check needs.

It reads the rows as recovery does, and keeps no messages but those by which `Ours` knows our bytes. Pure.
"""

from dataclasses import dataclass, replace

from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.journal import Journal
from sessionstored.engine.jsonl.ours import Ours
from sessionstored.engine.jsonl.records import DeleteRecord, Record, SessionRecord
from sessionstored.rules import Head


@dataclass(slots=True)
class Waiting:
    """One session that the journal changes."""

    head: Head | None
    """As the journal leaves it; None: it is deleted, or was never made."""
    file: str
    """The file that its changes go into."""
    known: int
    """The revision of its catalogue row; 0 if it has none."""
    changes: int = 0
    anew: bool = False
    """It begins with the journal: nothing in its file counts that the journal lacks."""
    broken: str = ""
    """Why the changes do not add up."""


class WaitingChanges:
    """Every session that the journal changes."""

    def __init__(self, journal: Journal, lost: dict[str, Entry]) -> None:
        """`lost` is what stands in for the catalogue rows that are not what was written."""
        self._journal, self._lost = journal, lost
        self.ours = Ours()
        self.sessions: dict[str, Waiting] = {}

    def take(self, record: Record) -> None:
        """Take in the next record."""
        if isinstance(record, SessionRecord):
            self._change(record)
        elif isinstance(record, DeleteRecord):
            self._delete(record)

    def touched(self, key: str) -> Waiting | None:
        """What the journal changes beyond the catalogue row, if anything."""
        waiting = self.sessions.get(key)
        return waiting if waiting is not None and waiting.changes else None

    def _of(self, key: str) -> Waiting:
        waiting = self.sessions.get(key)
        if waiting is None:
            entry = self._lost.get(key) or self._journal.catalogue.entry(key)
            waiting = (
                Waiting(None, "", 0)
                if entry is None
                else Waiting(entry.head, entry.file, entry.head.revision)
            )
            self.sessions[key] = waiting
        return waiting

    def _change(self, record: SessionRecord) -> None:
        head = record.head
        waiting = self._of(head.key)
        before = waiting.head
        if head.revision > waiting.known:
            self.ours.lines[head.key].update(record.lines)
        if before is not None and not record.file:
            head = replace(head, metadata=head.metadata or before.metadata, damage=before.damage)
        self.ours.heads[head.key].append(head)
        if head.revision <= max(waiting.known, before.revision if before else 0):
            return
        waiting.changes += 1
        if record.file:
            waiting.file, waiting.anew, waiting.broken, count = record.file, True, "", 0
        elif before is None:
            waiting.broken = "the session lost its beginning"
            return
        else:
            count = before.message_count
        end = record.start + record.delete_count
        if end > count or count - record.delete_count + len(record.lines) != head.message_count:
            waiting.broken = waiting.broken or "changes before are lost"
        waiting.head = head

    def _delete(self, record: DeleteRecord) -> None:
        if record.file:
            self.ours.tombstones.append(record)
        waiting = self._of(record.key)
        if record.revision > waiting.known and waiting.head is not None:
            waiting.changes += 1
            waiting.head, waiting.anew, waiting.broken = None, True, ""

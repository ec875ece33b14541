"""What a check finds: values, and what can be done about each. Pure."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, StrEnum


class Verdict(StrEnum):
    """How a session, a file or the store itself is."""

    OK = "ok"
    WAITING = "waiting"
    """Changes wait in the journal; the next start writes them into the file."""
    NEW = "new"
    """Nobody knows the file yet; the next start adopts it."""
    EDITED = "edited"
    """Somebody changed a file for which no change waited; it is adopted anew."""
    MARKED = "marked"
    """Whole, and marked as damaged before."""
    DAMAGED = "damaged"


class Remedy(Enum):
    """What helps; the value says it."""

    NONE = ""
    OPEN = "the next start, or `sessionstored repair`, sets the bytes aside and marks the session"
    ANEW = "the next start, or `sessionstored repair`, makes it anew from journal.db"
    MEND = "`sessionstored repair` keeps what can be read, and the file as it is goes to quarantine"
    TAKE = "look at the file: `sessionstored repair` takes it as it is now"
    REMOVE = "put the file back, or `sessionstored repair` removes the session"
    CLEAR = "`sessionstored repair` removes the mark"
    EXPIRE = "repair does not touch this: calls that need it are refused by name, until it expires"
    END = "the next start, or `sessionstored repair`, ends the lease: its holder is refused from then on"
    HAND = "repair does not decide this: move, rename or restore the file by hand"
    RESTORE = "repair does not touch this: restore a backup, or start with --accept-loss"
    AWAY = "repair does not touch this: restore a backup, or move the file away and start with --accept-loss"


OF_THE_STORE = (Remedy.RESTORE, Remedy.AWAY)
REPAIRABLE = (Remedy.OPEN, Remedy.ANEW, Remedy.MEND, Remedy.TAKE, Remedy.REMOVE, Remedy.CLEAR, Remedy.END)


@dataclass(frozen=True, slots=True)
class Finding:
    """One session, one file that nobody knows, or one part of the store."""

    verdict: Verdict
    file: str
    """Below the data directory."""
    key: str = ""
    """Empty: it is not about a session."""
    detail: str = ""
    remedy: Remedy = Remedy.NONE
    line: int = 0
    """Of the file, from 1; 0: none in particular."""
    kept: int = 0
    """Messages that can be read and that nothing speaks against."""
    suspect: int = 0
    """Messages that can be read, in blocks whose checksum is wrong."""
    lost: int = 0
    """Lines that cannot be read."""


@dataclass(slots=True)
class Summary:
    """The whole check in numbers."""

    store_id: str = ""
    """Empty: the directory is no store, but a workspace of session files."""
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    messages: int = 0
    bytes_read: int = 0
    """Of session files."""
    not_served: int = 0
    """Sessions that answer DATA_LOSS."""
    journal_rows: int = 0
    changes_waiting: int = 0
    """Changes of sessions that are not yet in the catalogue."""
    deletions_waiting: int = 0
    temporary_files: int = 0
    left_alone: int = 0
    """Names in the session directory that are no session files."""
    quarantine_files: int = 0
    quarantine_bytes: int = 0

    @property
    def well(self) -> bool:
        """Whether nothing needs anybody."""
        return not (self.verdicts[Verdict.DAMAGED] or self.verdicts[Verdict.MARKED])

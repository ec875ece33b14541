"""The text of a session file: header lines and message lines, read and written. Pure: bytes in, values out.

The format is the seed's own: one JSON object per line; a line with `_type` "metadata" is a header: key,
times, metadata and last_consolidated, and `expires_at` if the session has an expire_time; every other line is
a message. A header may stand anywhere, and the last one wins. Blank lines, CR LF line ends and a byte order
mark are accepted. Times carry their offset; naive ones are local.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from io import BytesIO

from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.retention import NEVER_US
from sessionstored.rules import EMPTY_METADATA, Head, split_members

BOM = b"\xef\xbb\xbf"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RUN_BYTES = 1 << 20


@dataclass(slots=True)
class Scan:
    """What a whole file says."""

    blocks: Blocks = field(default_factory=Blocks)
    """Of the readable part: its length is where a torn last line begins, or the file's size."""
    message_count: int = 0
    superseded_bytes: int = 0
    """The size of the headers that a later one replaces."""
    header: dict[str, object] | None = None
    header_text: bytes = b""
    bad_line: int = 0
    """Number of the first unreadable line that is not the last one; 0 if there is none."""
    torn: bytes = b""
    """An unreadable last line."""


def header_line(head: Head) -> bytes:
    """The header of a session, with its line end."""
    fields: dict[str, str | None] = {
        "_type": "metadata",
        "key": head.key,
        "created_at": _iso(head.create_time_us),
        "updated_at": _iso(head.update_time_us),
    }
    if head.expire_time_us:
        fields["expires_at"] = None if head.expire_time_us == NEVER_US else _iso(head.expire_time_us)
    text = json.dumps(fields, ensure_ascii=False).encode()
    return text[:-1] + b', "metadata": %b, "last_consolidated": %d}\n' % (
        head.metadata,
        head.last_consolidated,
    )


def parse_line(line: bytes) -> dict[str, object] | None:
    """A line's JSON object; None if it is not one."""
    try:
        value = json.loads(line.decode())  # bytes might be taken for UTF-16
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict) else None


def is_header(line: bytes) -> bool:
    """Whether a readable line is a header."""
    if b"_type" not in line and b"\\u" not in line:
        return False
    value = parse_line(line)
    return value is not None and value.get("_type") == "metadata"


def message_lines(data: bytes) -> list[bytes]:
    """The message lines in a run of whole lines, stripped of white space."""
    lines = (line.strip() for line in data.removeprefix(BOM).split(b"\n"))
    return [line for line in lines if line and not is_header(line)]


class Line(Enum):
    """What a line of a session file is."""

    BLANK = "blank"
    HEADER = "header"
    MESSAGE = "message"
    UNREADABLE = "unreadable"


class Scanner:
    """Reads a whole file, one line after the other, naming what cannot be read.

    It holds no more of the file than a run, and an unreadable line until another one follows it.
    """

    def __init__(self) -> None:
        self._scan = Scan()
        self._run = bytearray()  # not yet in the scan's blocks
        self._starts: list[int] = []  # of message lines in it
        self._header_bytes = self._number = 0
        self._bad: tuple[int, int] | None = None  # number of the first unreadable line, and where in the run

    def take(self, line: bytes) -> Line:
        """Read the next line, which ends with its line end unless it is the last one."""
        self._number += 1
        if len(self._run) >= _RUN_BYTES and self._bad is None:
            self._flush(len(self._run))
        begin = len(self._run)
        self._run += line
        text = (line.removeprefix(BOM) if self._number == 1 else line).strip()
        if not text:
            return Line.BLANK
        scan = self._scan
        if self._bad is not None:
            scan.bad_line = scan.bad_line or self._bad[0]
            self._bad = None
        value = parse_line(text)
        if value is None:
            if not scan.bad_line:
                self._bad = self._number, begin
            return Line.UNREADABLE
        if value.get("_type") == "metadata":
            scan.header, scan.header_text = value, text
            scan.superseded_bytes += self._header_bytes
            self._header_bytes = len(line)
            return Line.HEADER
        self._starts.append(begin)
        scan.message_count += 1
        return Line.MESSAGE

    def _flush(self, size: int) -> None:
        self._scan.blocks.extend(bytes(self._run[:size]), self._starts)
        del self._run[:size]
        self._starts.clear()

    def finish(self) -> Scan:
        """What the lines say; not to be asked twice."""
        self._flush(len(self._run) if self._bad is None else self._bad[1])
        self._scan.torn = bytes(self._run)
        return self._scan


def scan(data: bytes) -> Scan:
    """Read a whole file that is in memory."""
    scanner = Scanner()
    for line in BytesIO(data):
        scanner.take(line)
    return scanner.finish()


def adopted_head(
    scan: Scan, key: str, revision: int, mtime_us: int, damage: str, expire_time_us: int = 0
) -> tuple[Head, Sequence[str]]:
    """The head that a scanned file gives, and what in its header had to fall back (for the log).

    `expire_time_us` is the one that the session had: a header that says nothing of it keeps it, because who
    wrote it perhaps did not know of it. null means never.
    """
    header = scan.header or {}
    notes: list[str] = []
    text = EMPTY_METADATA
    if isinstance(header.get("metadata"), dict):
        text = split_members(scan.header_text)["metadata"]  # as it stands there: numbers keep their form
    elif header.get("metadata") is not None:
        notes.append("metadata is not an object: read as {}")
    consolidated = header.get("last_consolidated", 0)
    if type(consolidated) is not int or not 0 <= consolidated <= scan.message_count:
        notes.append(f"last_consolidated {consolidated!r} is out of range: read as 0")
        consolidated = 0
    created = _time_us(header.get("created_at"))
    updated = _time_us(header.get("updated_at"))
    if scan.header is not None and (created is None or updated is None):
        notes.append("a time in the header cannot be read: the file's own is taken")
    updated = mtime_us if updated is None else updated
    expires = _time_us(header.get("expires_at"))
    if "expires_at" in header and header["expires_at"] is None:
        expires = NEVER_US
    elif expires is None or expires <= 0:
        if "expires_at" in header or expire_time_us:
            notes.append("its header does not say when it expires: as before")
        expires = expire_time_us
    created = min(mtime_us if created is None else created, updated)
    return Head(
        key, revision, revision, scan.message_count, consolidated, text, created, updated, damage, expires
    ), notes


def _iso(time_us: int) -> str:
    seconds, micros = divmod(time_us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros).isoformat()


def _time_us(text: object) -> int | None:
    """Microseconds since the epoch of an ISO time of the years 1 to 9999 in UTC; a naive one is local."""
    if not isinstance(text, str):
        return None
    try:
        return (datetime.fromisoformat(text).astimezone(UTC) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError, OSError):
        return None

"""Session files as the daemon and its predecessor write them: bytes <-> a session. Pure: no I/O, no daemon.

One JSON object per line. A line with ``_type`` "metadata" is a header, with key, times, metadata and
last_consolidated; it may stand anywhere, and the last one wins. Every other line is a message.

The rules:

* Reading is lenient where nothing is lost by it: a byte order mark, CR LF, blank lines, no header, header
  fields that cannot be used. What had to be assumed is named in `notes`.
* An unreadable last line was torn by a crash: the lines before it are kept, and `torn` names it. An
  unreadable line before others is damage, and no part of the file is read.
* A message is carried as the bytes of its line, without white space around it, and never typed anew.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote, unquote

from sessionstore._types import Head, Message

SUFFIX = ".jsonl"
_BOM = b"\xef\xbb\xbf"
_NAME_BYTES_MAX = 255  # of the usual file systems


class DamagedFileError(ValueError):
    """A line that cannot be read, with readable lines behind it. ``line`` is its number, from 1."""

    def __init__(self, line: int) -> None:
        super().__init__(f"line {line} is not a JSON object")
        self.line = line


@dataclass(frozen=True, slots=True)
class SessionFile:
    """What a session file says."""

    key: str
    lines: list[bytes]
    """The messages, one JSON text each."""
    numbers: list[int]
    """For each message, the number of its line in the file, from 1."""
    metadata: Message
    last_consolidated: int
    create_time: datetime | None
    """Aware; None if the file does not say. A time without offset is local."""
    torn: str
    """What is wrong with the last line; empty if it is whole."""
    notes: tuple[str, ...]
    """What in the header could not be used, and what stands for it."""


def parse(data: bytes, stem: str) -> SessionFile:
    """Read a file's bytes. ``stem`` is its name without suffix, for a file that does not say whose it is.

    Raises `DamagedFileError`.
    """
    lines, numbers, header = [], [], None
    bad = 0
    for number, line in _stripped_lines(data):
        if bad:
            raise DamagedFileError(bad)
        value = _json_object(line)
        if value is None:
            bad = number
        elif value.get("_type") == "metadata":
            header = value
        else:
            lines.append(line)
            numbers.append(number)
    torn = f"the last line ({bad}) is not a JSON object and was left out" if bad else ""
    return _session(header, lines, numbers, stem, torn)


def claimed_key(data: bytes, stem: str) -> str:
    """The key of a file, whether its messages can be read or not."""
    key: object = None
    for _, line in _stripped_lines(data):
        if b"_type" in line:
            value = _json_object(line)
            if value is not None and value.get("_type") == "metadata":
                key = value.get("key")
    return key if isinstance(key, str) and key else _key_of_stem(stem)


def _stripped_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    for number, raw in enumerate(data.removeprefix(_BOM).split(b"\n"), 1):
        line = raw.strip()
        if line:
            yield number, line


def _json_object(line: bytes) -> Message | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict) else None


def _session(
    header: Message | None, lines: list[bytes], numbers: list[int], stem: str, torn: str
) -> SessionFile:
    said = header or {}
    notes = [] if header else ["no header: the key is taken from the file's name"]
    key = said.get("key")
    if not isinstance(key, str) or not key:
        if header:
            notes.append("no key in the header: it is taken from the file's name")
        key = _key_of_stem(stem)
    metadata = said.get("metadata", {})
    if not isinstance(metadata, dict):
        notes.append("the metadata is not an object: none is taken")
        metadata = {}
    consolidated = said.get("last_consolidated", 0)
    if type(consolidated) is not int or not 0 <= consolidated <= len(lines):
        notes.append(f"last_consolidated {consolidated!r} is out of range: 0 is taken")
        consolidated = 0
    created = _moment(said.get("created_at"))
    if header and created is None:
        notes.append("created_at cannot be read: the time of the file is taken")
    return SessionFile(key, lines, numbers, metadata, consolidated, created, torn, tuple(notes))


def _key_of_stem(stem: str) -> str:
    """The daemon percent-encodes in its names what a file system might fold or forbid."""
    try:
        return unquote(stem, errors="strict")
    except UnicodeError:  # per cent signs of somebody else's
        return stem


def _moment(text: object) -> datetime | None:
    """An ISO time as an aware one; one without offset is local."""
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError):
        return None


def compose(head: Head, lines: Sequence[bytes]) -> bytes:
    """The bytes of a session file: a header line, and the messages as they are."""
    header = {
        "_type": "metadata",
        "key": head.key,
        "created_at": head.create_time.isoformat(),
        "updated_at": head.update_time.isoformat(),
        "metadata": head.metadata,
        "last_consolidated": head.last_consolidated,
    }
    return b"\n".join([written(header), *lines, b""])


def written(value: object) -> bytes:
    """A value as JSON text in UTF-8. Half a surrogate pair, which an adopted file may hold, is an escape."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def plain_name(key: str) -> str:
    """The name that the predecessor looks for. Several keys can share it: `a:b`, `a/b` and `a_b` do."""
    return key.replace(":", "_").replace("/", "_") + SUFFIX


def unique_name(key: str) -> str:
    """A name that no other key has, on any file system."""
    digest = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    readable = quote(key, safe="")[: _NAME_BYTES_MAX - len(digest) - len(SUFFIX) - 1]
    return f"{readable}~{digest}{SUFFIX}"


def name_for(key: str, taken: set[str]) -> str:
    """A free name for a key; it is added to ``taken``. The plain one if that is free and not too long."""
    name = plain_name(key)
    if name.casefold() in taken or len(name.encode()) > _NAME_BYTES_MAX:
        name = unique_name(key)
    taken.add(name.casefold())
    return name

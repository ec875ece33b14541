"""Adopting: a file that somebody else wrote becomes a session's, its bytes as they are.

What cannot be read is named: a torn last line is set aside and the rest is taken, a bad line inside leaves
the session unserved. A file that cannot be a session's at all is left alone.
"""

import os
from collections.abc import Sequence
from stat import S_ISREG

from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.files import FileChanged, SessionFiles
from sessionstored.engine.jsonl.names import key_of_file_name
from sessionstored.engine.jsonl.state import HEADERS_BYTES_MIN
from sessionstored.engine.jsonl.text import BOM, Scan, adopted_head, scan


class Unadoptable(Exception):
    """A file that cannot be a session's: it is left alone; the message says why."""


class Unreadable(Unadoptable):
    """A file that cannot be opened or read: nobody knows whose it is."""


def adopt(
    files: SessionFiles, name: str, revision: int, key: str = "", expire_time_us: int = 0
) -> tuple[Entry, Sequence[str]]:
    """Read a file that somebody else wrote, as it is; its bytes stay as they are.

    Args:
        files: the session files.
        name: the file.
        revision: the revision that the session gets.
        key: whose it is known to be; "" lets its header, or else its name, say.
        expire_time_us: when the session was to end, for a header that does not say.

    Returns:
        The catalogue row, and what to say in the log.

    Raises:
        Unadoptable: it cannot be read, or neither its header nor its name gives a key.
        FileChanged: somebody writes it just now.
        OSError: what has to be set aside cannot be.

    """
    data, stat = _read_whole(files, name)
    found = scan(data)
    damage = ""
    if found.bad_line:
        damage = f"line {found.bad_line} cannot be read"
    elif found.torn:
        aside = files.set_aside(name, found.torn, "torn")
        damage = f"the last line was torn: its {len(found.torn)} bytes were set aside in quarantine/{aside}"
    own = claimed_key(found, name, key)
    if key and own != key:
        raise Unadoptable(f"its header says that it belongs to session {own!r}")
    key = own
    head, notes = adopted_head(found, key, revision, stat.st_mtime_ns // 1000, damage, expire_time_us)
    superseded = found.superseded_bytes
    if notes or data.startswith(BOM):  # written anew at its first change, so that the seed reads it then
        superseded = max(len(data), HEADERS_BYTES_MIN)
    entry = Entry(
        head,
        name,
        1,
        found.blocks,
        stat.st_size,
        stat.st_ino,
        stat.st_mtime_ns,
        superseded,
        found.bad_line,
    )
    return entry, [*notes, damage] if damage else notes


def _read_whole(files: SessionFiles, name: str) -> tuple[bytes, os.stat_result]:
    """A foreign file's bytes, made durable: from now on acknowledged changes may stand on them."""
    try:
        fd = os.open(files.sessions / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"it cannot be opened: {error}") from error
    try:
        before = os.fstat(fd)
        if not S_ISREG(before.st_mode):
            raise Unadoptable("it is no regular file")
        try:
            with open(fd, "rb", closefd=False) as file:
                data = file.read()
        except OSError as error:
            raise Unreadable(f"it cannot be read: {error}") from error
        files.disk.flush(fd)
        stat = os.fstat(fd)
    finally:
        os.close(fd)
    if (before.st_mtime_ns, before.st_size) != (stat.st_mtime_ns, stat.st_size) or len(data) != stat.st_size:
        raise FileChanged
    files.names_changed = True
    return data, stat


def _usable(key: str) -> bool:
    """Whether a key can be a session's: not longer than any key, and without control characters."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= 512 and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in key)


def claimed_key(found: Scan, name: str, known: str = "") -> str:
    """The key that a file's header says, or else the one that it is known to have, or else its name.

    Raises:
        Unadoptable: neither does.

    """
    own = found.header.get("key") if found.header else None
    if isinstance(own, str) and _usable(own):
        return own
    if known:
        return known
    try:
        key = key_of_file_name(name)
    except UnicodeDecodeError as error:
        raise Unadoptable("neither its header nor its name says whose it is") from error
    if not _usable(key):
        raise Unadoptable("neither its header nor its name says whose it is")
    return key

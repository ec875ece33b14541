"""Key -> file name, for new session files.

One key, one name: the catalogue holds the pairs, so a name need not be readable backwards. The first choice
is the name that the seed would give, so that a user who goes back to it finds every session again. If that is
taken (the seed gives `a:b`, `a/b` and `a_b` one name) or cannot be a file name, it is the key
percent-encoded, with everything encoded that a file system might fold or forbid; and if that is long or
taken, a digest is added. Adopted files keep their names.
"""

import hashlib
import re
from urllib.parse import unquote

SUFFIX = ".jsonl"
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-.")
_AMBIGUOUS = frozenset("%~\\")
_NAME_BYTES_MAX = 180
_FILE_NAME_BYTES_MAX = 255  # the usual limit of file systems
_MARKS_BYTES_MAX = 40  # what is put around a name: generation, checksum, reason
_TEMPORARY = re.compile(r"\.(.+\.jsonl|~[0-9a-f]{32})\.\d+\.tmp")


def file_name(key: str, attempt: int = 0) -> str:
    """A file name for a key. Attempts are tried from 0 on until a name is free; all of them differ."""
    plain = key.replace(":", "_").replace("/", "_")
    usable = plain.isprintable() and not plain.startswith((".", "~")) and not _AMBIGUOUS.intersection(plain)
    if attempt == 0 and usable and len(plain.encode()) <= _NAME_BYTES_MAX:
        return plain + SUFFIX
    encoded = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in key.encode())
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if attempt <= 1 and len(encoded) <= _NAME_BYTES_MAX:
        return encoded + SUFFIX
    digest = hashlib.blake2b(f"{attempt}:{key}".encode(), digest_size=10).hexdigest()
    return f"{encoded[: _NAME_BYTES_MAX - 22].rstrip('%')}~{digest}{SUFFIX}"


def key_of_file_name(name: str) -> str:
    """The key of a file that does not say whose it is: its name without suffix, percent-decoded.

    Raises:
        UnicodeDecodeError: what is percent-encoded is not text.

    """
    return unquote(name.removesuffix(SUFFIX), errors="strict") if "%" in name else name.removesuffix(SUFFIX)


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8; what the store itself makes is."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def short_name(name: str) -> str:
    """The name, or a digest of it if marks around it would make it too long, as adopted names may be."""
    if len(name.encode()) <= _FILE_NAME_BYTES_MAX - _MARKS_BYTES_MAX:
        return name
    return "~" + hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def temporary_name(name: str, generation: int) -> str:
    """The name under which a new generation of a file is written, before it is renamed. Not *.jsonl."""
    return f".{short_name(name)}.{generation}.tmp"


def is_temporary_name(name: str) -> bool:
    """Whether `temporary_name` made a name."""
    return _TEMPORARY.fullmatch(name) is not None

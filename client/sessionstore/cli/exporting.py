"""Export of sessions to plain JSONL files, which need no store to be read: a header line, then the messages.

A file is written under a temporary name and then renamed, so it is there whole or not at all. This module
must not know of the terminal.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sessionstore._operations import Held, read, text
from sessionstore.cli.files import compose, name_for, plain_name
from sessionstore.client import SessionStore
from sessionstore.errors import DataLossError, NotFoundError, error_for


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of one session."""

    key: str
    path: Path | None
    """Where it is; None if it could not be exported."""
    message_count: int = 0
    problem: str = ""
    note: str = ""


def session_bytes(store: SessionStore, key: str) -> tuple[bytes, int, str]:
    """A session as the bytes of a file, its message count, and its damage, all of one revision.

    Raises NotFoundError, DataLossError.
    """
    tail = store._driver.run(read(Held(key)))
    if tail is None:
        raise error_for("SESSION_NOT_FOUND", f"no session has the key {key!r}", {"key": key})
    return compose(tail.head, tail.lines), len(tail.lines), tail.head.damage


def export(store: SessionStore, keys: Iterable[str], directory: Path) -> Iterator[Exported]:
    """Write each session to a file of its own in ``directory``, which is made if it is missing.

    A session that cannot be read, or whose file is there already, gives a problem and does not stop the rest.
    Raises OSError if the directory cannot be written, InvalidArgumentError for a key that is no key.
    """
    directory.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for key in keys:
        path = directory / name_for(text("key", key, "KEY_INVALID"), taken)
        try:
            data, count, damage = session_bytes(store, key)
            _write_new(path, data)
        except (DataLossError, NotFoundError) as error:
            yield Exported(key, None, problem=str(error))
        except FileExistsError:
            yield Exported(key, None, problem=f"{path} is there already, and is not overwritten")
        else:
            yield Exported(key, path, count, damage, _note(key, path))


def _note(key: str, path: Path) -> str:
    plain = plain_name(key)
    return "" if path.name == plain else f"is in {path.name}: {plain} is another session's name, or too long"


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that must not be there, whole or not at all."""
    if path.exists():
        raise FileExistsError(path)
    temporary = path.with_name(f".export-{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

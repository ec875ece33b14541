"""Import of session files into a running daemon: each file becomes a session, or a named reason why not.

The rules:

* Nothing that is in the store is overwritten. A session that is there already is compared: equal is fine,
  anything else is reported and left alone. The files are only read.
* Running the same import again stores nothing twice. Each call has a request_id made of the file's content,
  so an import that was interrupted inside a session goes on behind the last call that was stored. (The store
  knows request_ids for 24 hours; after that, a half imported session is reported as different.)
* Two files that claim one key are both left out, because nobody can tell which one is right.
* A refusal of one file is that file's result. What stops all files (no daemon, a full disk) is raised.

This module must not know of the terminal.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from sessionstore._operations import Held, head, read
from sessionstore._types import Message, ServerLimits
from sessionstore.cli import wire
from sessionstore.cli.files import SUFFIX, DamagedFileError, SessionFile, claimed_key, parse
from sessionstore.client import SessionStore
from sessionstore.errors import (
    AlreadyExistsError,
    ConflictError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
)


class Outcome(Enum):
    """What became of a file."""

    IMPORTED = "imported"
    THERE = "already there"
    DIFFERENT = "different in the store, left alone"
    SHARED = "one key in several files, left out"
    DAMAGED = "damaged, left out"
    REFUSED = "refused by the store"


@dataclass(frozen=True, slots=True)
class Result:
    """One file's result."""

    path: Path
    key: str
    outcome: Outcome
    message_count: int = 0
    """Messages of the file that are in the store now."""
    torn: bool = False
    """The file's last line could not be read, and is not in the store."""
    problem: str = ""
    """What a person should look at; empty if the whole file is in the store."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A file that was read, and how its calls are named."""

    path: Path
    content: SessionFile
    create_time: datetime | None
    digest: str

    @property
    def key(self) -> str:
        return self.content.key

    def request_id(self, *parts: int) -> str:
        return ":".join(["import", self.digest, *map(str, parts)])

    def result(self, outcome: Outcome, problem: str = "") -> Result:
        stored = outcome in (Outcome.IMPORTED, Outcome.THERE)
        count, torn = len(self.content.lines) if stored else 0, self.content.torn
        return Result(
            self.path, self.key, outcome, count, bool(torn), problem or torn, self.content.notes
        )


@dataclass(slots=True)
class Plan:
    """The files of a directory, and which of them claim one key."""

    paths: list[Path]
    shared: dict[Path, list[Path]] = field(default_factory=dict)
    """For a file whose key others claim too: those others."""

    @classmethod
    def of(cls, directory: Path) -> "Plan":
        """Look through a workspace (a directory with `sessions` in it), or a directory of session files.

        Raises OSError if the directory cannot be listed.
        """
        inner = directory / "sessions"
        within = inner if inner.is_dir() else directory
        paths = sorted(path for path in within.iterdir() if path.suffix == SUFFIX and path.is_file())
        claims: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            try:
                claims[claimed_key(path.read_bytes(), path.stem)].append(path)
            except OSError:  # named when its turn comes
                continue
        several = [claimants for claimants in claims.values() if len(claimants) > 1]
        shared = {path: [other for other in each if other != path] for each in several for path in each}
        return cls(paths, shared)


def run(store: SessionStore, plan: Plan) -> Iterator[Result]:
    """Import the files of a plan, one after the other. Raises what stops them all."""
    limits = store.info().limits
    for path in plan.paths:
        yield _import(store, path, plan.shared.get(path, ()), limits)


def _import(store: SessionStore, path: Path, shared_with: Sequence[Path], limits: ServerLimits) -> Result:
    try:
        data, changed = path.read_bytes(), path.stat().st_mtime
        content = parse(data, path.stem)
    except DamagedFileError as error:
        return Result(path, claimed_key(data, path.stem), Outcome.DAMAGED, problem=str(error))
    except OSError as error:
        return Result(path, path.stem, Outcome.DAMAGED, problem=f"cannot be read: {error.strerror}")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    source = _Source(path, content, _create_time(content, changed), digest)
    if shared_with:
        names = ", ".join(other.name for other in shared_with)
        return source.result(Outcome.SHARED, f"also claimed by {names}")
    try:
        wire.check(content.lines, limits)
        return _store(store, source, limits)
    except DataLossError as error:
        return source.result(Outcome.DIFFERENT, f"the session in the store is damaged: {error}")
    except InvalidArgumentError as error:
        # Of a refused key, the index is that of a character.
        of_message = error.reason.startswith("MESSAGE_") and error.index is not None
        known = of_message and 0 <= (error.index or 0) < len(content.numbers)
        where = f"line {content.numbers[error.index or 0]}: " if known else ""
        return source.result(Outcome.REFUSED, f"{where}{error}")


def _create_time(content: SessionFile, changed: float) -> datetime | None:
    """When the session began: as the file says, else as its own time says. The store takes no future."""
    now = datetime.now(UTC)
    times = [content.create_time, datetime.fromtimestamp(changed, UTC)]
    return next((time for time in times if time is not None and time <= now), None)


def _store(store: SessionStore, source: _Source, limits: ServerLimits) -> Result:
    parts = list(wire.split(source.content.lines, limits))
    try:
        begun = _create(store, source, parts[0], whole=len(parts) == 1)
        added = _add(store, source, begun, parts[1:])
    except AlreadyExistsError:
        return _compare(store, source)
    except (ConflictError, NotFoundError):
        return source.result(Outcome.DIFFERENT, "somebody else changed the session while it was imported")
    except InvalidArgumentError as error:
        if error.reason != "REQUEST_ID_REUSED":  # imported before, under other limits or another file time
            raise
        return _compare(store, source)
    if begun.replayed and not added:
        return _compare(store, source)
    return source.result(Outcome.IMPORTED)


def _create(store: SessionStore, source: _Source, lines: Sequence[bytes], *, whole: bool) -> wire.Landed:
    content = source.content
    consolidated = content.last_consolidated if whole else 0

    def operation(request_id: str) -> wire.Landed:
        return store._driver.run(
            wire.create(
                source.key, lines, content.metadata, consolidated, source.create_time, request_id=request_id
            )
        )

    begun = operation(source.request_id())
    if begun.replayed and store._driver.run(head(source.key)) is None:
        return operation("")  # imported before and removed since: it is wanted again
    return begun


def _add(store: SessionStore, source: _Source, begun: wire.Landed, parts: Sequence[Sequence[bytes]]) -> bool:
    """Send what did not fit into the first call; tells whether anything of it was new."""
    landed, added = begun, False
    for part in parts:
        # The revision of the creation tells this session from an earlier one that was removed.
        request_id = source.request_id(begun.revision, landed.message_count)
        landed = store._driver.run(
            wire.append(source.key, part, expected_revision=landed.revision, request_id=request_id)
        )
        added |= not landed.replayed
    if parts and source.content.last_consolidated:
        request_id = source.request_id(begun.revision, landed.message_count)
        change = wire.consolidate(
            source.key,
            source.content.last_consolidated,
            expected_revision=landed.revision,
            request_id=request_id,
        )
        added |= not store._driver.run(change).replayed
    return added


def _compare(store: SessionStore, source: _Source) -> Result:
    stored = store._driver.run(read(Held(source.key)))
    if stored is None:
        return source.result(Outcome.DIFFERENT, "the session was removed meanwhile: run the import again")
    content = source.content
    same = [_same(ours, theirs) for ours, theirs in zip(content.lines, stored.lines, strict=False)]
    if not all(same):
        problem = f"message {same.index(False)} is another one"
    elif len(content.lines) != len(stored.lines):
        problem = f"the store has {len(stored.lines)} messages, the file {len(content.lines)}"
    elif _canonical(content.metadata) != _canonical(stored.head.metadata):
        problem = "the metadata differs"
    elif content.last_consolidated != stored.head.last_consolidated:
        problem = f"last_consolidated is {stored.head.last_consolidated}, not {content.last_consolidated}"
    else:
        return source.result(Outcome.THERE)
    return source.result(Outcome.DIFFERENT, problem)


def _same(ours: bytes, theirs: bytes) -> bool:
    """The same bytes, or the same value as another encoder writes it."""
    return ours == theirs or json.dumps(json.loads(ours)) == json.dumps(json.loads(theirs))


def _canonical(metadata: Message) -> str:
    return json.dumps(metadata, sort_keys=True)

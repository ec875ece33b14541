"""Writes a store of many sessions without a daemon, by the engine's own modules. Also a command.

    python -m bench.generate DATA SESSIONS [MESSAGES]

The engine opens the new directory once and closes it, which leaves a STORE that says "stopped cleanly".
Then come the session files, each with its row in the catalogue as a checkpoint writes it (head, length,
block checksums, inode and time), then the revision counter, and last STORE with the revisions reserved
beyond it. So a daemon that starts finds what it would find after a clean stop, and has nothing to recover.
Nothing is flushed before the end: one sync().
"""

import asyncio
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sessionstored.engine.jsonl import open_jsonl
from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.journal import Journal
from sessionstored.engine.jsonl.names import file_name
from sessionstored.engine.jsonl.store import Directory, with_ceiling
from sessionstored.engine.jsonl.text import header_line
from sessionstored.rules import EMPTY_METADATA, Head

from bench.messages import encoded

_ROWS_PER_TRANSACTION = 5000
_BEGIN_US = 1_700_000_000_000_000


@dataclass(frozen=True)
class Wanted:
    """A session to write."""

    key: str
    messages: int


@dataclass
class Lines:
    """Message lines and where each begins, made once for each length."""

    made: dict[int, tuple[bytes, list[int]]] = field(default_factory=dict)

    def of(self, count: int) -> tuple[bytes, list[int]]:
        """The lines of a session of `count` messages, and their offsets."""
        if count not in self.made:
            lines = [encoded(n).encode() + b"\n" for n in range(count)]
            starts, position = [], 0
            for line in lines:
                starts.append(position)
                position += len(line)
            self.made[count] = b"".join(lines), starts
        return self.made[count]


def generate(data: Path, sessions: Iterable[Wanted]) -> int:
    """Write a store that does not exist yet; returns how many sessions it has."""
    asyncio.run(_empty(data))
    journal, lines, revision = Journal(data / "journal.db", "os"), Lines(), 0
    entries = _entries(data / "sessions", sessions, lines)
    while batch := list(islice(entries, _ROWS_PER_TRANSACTION)):
        journal.put_entries(batch)
        revision = batch[-1].head.revision
        journal.wal_checkpoint()
    journal.put_meta(revision=revision)
    journal.wal_checkpoint()
    journal.close()
    directory = Directory(data, Disk())
    store = directory.read_store()
    assert store is not None
    assert store.clean
    directory.write_store(with_ceiling(store, revision))
    directory.close()
    os.sync()
    return revision


async def _empty(data: Path) -> None:
    await (await open_jsonl(data)).close()


def _entries(folder: Path, sessions: Iterable[Wanted], lines: Lines) -> Iterator[Entry]:
    for n, wanted in enumerate(sessions):
        text, starts = lines.of(wanted.messages)
        time_us = _BEGIN_US + n * 1000
        head = Head(wanted.key, n + 1, n + 1, wanted.messages, 0, EMPTY_METADATA, time_us, time_us)
        header = header_line(head)
        content = header + text
        name = file_name(wanted.key)
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(fd, content) != len(content):
                raise OSError(f"{folder / name}: a short write")
            stat = os.fstat(fd)
        finally:
            os.close(fd)
        blocks = Blocks()
        blocks.extend(content, [len(header) + start for start in starts])
        yield Entry(head, name, 1, blocks, len(content), stat.st_ino, stat.st_mtime_ns)


if __name__ == "__main__":
    path, count, each = Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0])
    generate(path, (Wanted(f"agent:{n}", each) for n in range(count)))
    print(f"{count:,} sessions in {path}")

"""The rung of recovery at scale: a directory of 100,000 sessions, of which 1,000 are dirty.

The files and their catalogue are written with the engine's own parts. A real daemon then takes an append to
each dirty session and is killed with -9. Another process opens the directory, with an audit hook that sees
every file that Python opens: of the session files, only dirty ones may be. Run as a script, this is that
process.

python large_directory.py DATA
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crash.load import PATIENCE_S
from crash.tally import Tally
from daemons import Daemon
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored.engine.jsonl import Tuning, open_jsonl
from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.journal import Journal
from sessionstored.engine.jsonl.names import file_name
from sessionstored.engine.jsonl.text import header_line
from sessionstored.rules import EMPTY_METADATA, Head

SESSIONS_PER_DIRTY = 100
_DIRTY_MIN = 50
_MESSAGES = 3
_ROWS_PER_TRANSACTION = 5000
_SAMPLE = 200
_PAD = "x" * 60


def run(root: Path, seed: int, sessions: int) -> Tally:
    """Build, write, kill, recover."""
    tally = Tally()
    data = root / "data"
    begun = time.monotonic()
    asyncio.run(_empty_store(data))
    _build(data, sessions)
    built_s = time.monotonic() - begun
    rng = random.Random(seed)
    dirty = sorted(rng.sample(range(sessions), max(_DIRTY_MIN, sessions // SESSIONS_PER_DIRTY)))
    _dirty(data, dirty)
    tally.acknowledged, tally.times = len(dirty), sessions
    healthy = rng.sample(sorted(set(range(sessions)) - set(dirty)), min(_SAMPLE, sessions - len(dirty)))
    found = _recover(data, [*dirty, *healthy])
    tally.notes.append(
        f"{found['count']:,} sessions, {len(dirty):,} of them dirty: recovered in {found['seconds']:.2f} s, "
        f"{len(found['opened']):,} session files opened (built in {built_s:.0f} s)"
    )
    _judge(tally, sessions, dirty, found)
    return tally


def _judge(tally: Tally, sessions: int, dirty: list[int], found: dict) -> None:
    if found["count"] != sessions:
        tally.lose("lost", f"{sessions} sessions were there, and now {found['count']}")
    wanted = {file_name(_key(n)) for n in dirty}
    opened = set(found["opened"])
    for name in sorted(opened - wanted)[:20]:
        tally.lose("wrong", f"sessions/{name} is healthy, and was opened")
    for name in sorted(wanted - opened)[:20]:
        tally.lose("wrong", f"sessions/{name} is dirty, and was not flushed")
    changed = set(dirty)
    for n, messages in ((int(n), messages) for n, messages in found["messages"].items()):
        extra = [_message(n, _MESSAGES)] if n in changed else []
        if messages != [_message(n, i) for i in range(_MESSAGES)] + extra:
            tally.lose("lost", f"{_key(n)} holds {messages}")


def _key(n: int) -> str:
    return f"agent:{n}"


def _message(n: int, i: int) -> str:
    return json.dumps({"role": "user", "content": f"{n} {i} {_PAD}"})


# Building ---------------------------------------------------------------------------------------------------


async def _empty_store(data: Path) -> None:
    await (await open_jsonl(data)).close()


def _build(data: Path, sessions: int) -> None:
    """Session files, and their catalogue rows, as a checkpoint leaves them."""
    journal = Journal(data / "journal.db", "os")
    entries: list[Entry] = []
    for n in range(sessions):
        entries.append(_session(data / "sessions", n))
        if len(entries) == _ROWS_PER_TRANSACTION:
            journal.put_entries(entries)
            entries = []
    journal.put_entries(entries)
    journal.put_meta(revision=sessions)
    journal.close()


def _session(folder: Path, n: int) -> Entry:
    now_us = 1_700_000_000_000_000 + n
    head = Head(_key(n), n + 1, n + 1, _MESSAGES, 0, EMPTY_METADATA, now_us, now_us)
    header = header_line(head)
    lines = [_message(n, i).encode() + b"\n" for i in range(_MESSAGES)]
    starts = [len(header) + sum(map(len, lines[:i])) for i in range(_MESSAGES)]
    data = header + b"".join(lines)
    name = file_name(head.key)
    fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    stat = os.fstat(fd)
    os.close(fd)
    blocks = Blocks()
    blocks.extend(data, starts)
    return Entry(head, name, 1, blocks, len(data), stat.st_ino, stat.st_mtime_ns)


def _dirty(data: Path, dirty: list[int]) -> None:
    """An append to each of these sessions, and kill -9 before any checkpoint."""
    daemon = Daemon(data, store="jsonl", flags=("--checkpoint-s-max", "3600"))

    def append(n: int) -> None:
        block = _message(n, _MESSAGES).encode() + b"\n"
        daemon.stub.AppendMessages(
            v1.AppendMessagesRequest(key=_key(n), messages=block), timeout=PATIENCE_S
        )

    try:
        daemon.start()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(append, dirty))
        daemon.kill()
    finally:
        daemon.close()


# Recovering -------------------------------------------------------------------------------------------------


def _recover(data: Path, read: list[int]) -> dict:
    """What another process says of opening the directory, and of these sessions."""
    done = subprocess.run(
        [sys.executable, __file__, str(data)],
        input=json.dumps(read), capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def _opened(data: Path, read: list[int]) -> dict[str, object]:
    """Open the directory and time it; then, when the hook has seen enough, read sessions."""
    sessions = str(data / "sessions") + os.sep
    opened: set[str] = set()

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(sessions):
            opened.add(str(arguments[0]).removeprefix(sessions))

    sys.addaudithook(hook)
    begun = time.monotonic()
    engine = await open_jsonl(data, tuning=Tuning(checkpoint_interval_s=3600, scrub_bytes_per_s_max=0))
    seconds = time.monotonic() - begun
    seen = sorted(opened)
    messages = {}
    for n in read:
        found = await engine.read(_key(n), lambda head: (0, head.message_count), 1 << 30)
        messages[n] = [line.decode() for line in found.lines]
    count = await engine.count()
    await engine.close()
    return {"seconds": seconds, "opened": seen, "count": count, "messages": messages}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_opened(Path(sys.argv[1]), json.load(sys.stdin)))))

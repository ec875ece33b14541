"""An engine whose maintenance runs when the test says so, and copies of its directory as a crash leaves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from crash.disks import QuickDisk, copy_of
from engines import done, lines, read
from sessionstored.engine import Refused
from sessionstored.engine.jsonl import DEFAULT_TUNING, JsonlEngine, open_jsonl
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.rules import Append, Refusal

BY_HAND = replace(DEFAULT_TUNING, checkpoint_interval_s=3600, scrub_bytes_per_s_max=0)
A, B, C, D = (b'{"role": "user", "content": "%s"}' % name for name in (b"a", b"b", b"c", b"d"))


@asynccontextmanager
async def opened(data: Path, disk: Disk | None = None, **arguments: object) -> AsyncIterator[JsonlEngine]:
    """An engine without a timer, closed at the end."""
    tuning = {"tuning": BY_HAND} | arguments
    engine = await open_jsonl(data, disk=disk or QuickDisk(), **tuning)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        await engine.close()


async def quiet(engine: JsonlEngine) -> None:
    """Wait until the session files have what was acknowledged, so that one thread at a time uses the disk."""
    await asyncio.wrap_future(engine._committer.run(lambda: None))


async def round_of(engine: JsonlEngine) -> bool:
    """One round of maintenance, now."""
    return await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.round)


async def crashed(engine: JsonlEngine, to: Path) -> Path:
    """A copy of the engine's directory as kill -9 would leave it now."""
    await quiet(engine)
    return copy_of(engine._directory.path, to)


async def refusal(engine: JsonlEngine, key: str) -> Refusal:
    """Why a session is not served."""
    try:
        await read(engine, key)
    except Refused as refused:
        return refused.refusal
    raise AssertionError(f"{key} is served")


async def says(engine: JsonlEngine, key: str, *expected: bytes) -> None:
    """A session has exactly these messages, or does not exist without any; and it takes another one."""
    if expected:
        assert await lines(engine, key) == list(expected)
    else:
        assert (await refusal(engine, key)).reason == "SESSION_NOT_FOUND"
    answer = await done(engine, Append(key, [D]))
    assert answer.first_index == len(expected)
    assert await lines(engine, key) == [*expected, D]


async def revision(engine: JsonlEngine, key: str) -> int:
    return (await read(engine, key)).head.revision

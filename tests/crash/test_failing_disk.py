"""Single flushes that fail. That every step of a run may fail is a rung of the ladder, `every_failure`."""

import asyncio
import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from crash.by_hand import BY_HAND, A, B, opened, quiet
from crash.disks import WatchedDisk
from engines import done, lines
from sessionstored.engine import Refused, Request, StartError
from sessionstored.engine.jsonl import committer, open_jsonl
from sessionstored.rules import Append, Fork, Mutation, Replace


def fail_to_flush(_: int, kind: str, __: Path | int) -> None:
    if kind == "flush":
        raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_an_edited_file_that_cannot_be_flushed_when_read_stops_the_engine(fast_path: Path) -> None:
    disk = WatchedDisk()
    engine = await open_jsonl(fast_path, tuning=BY_HAND, disk=disk)
    await done(engine, Append("k", [A, B]))
    await engine.close()
    engine = await open_jsonl(fast_path, tuning=BY_HAND, disk=disk)
    (fast_path / "sessions" / "k.jsonl").write_bytes(A + b"\n")
    disk.before = fail_to_flush
    with pytest.raises(Refused):
        await lines(engine, "k")
    assert "Errno 5" in await asyncio.wait_for(engine.failed(), 100)
    await engine.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("change", [Replace("k", 0, 1, [B]), Fork("fork", "k")], ids=["rewrite", "fork"])
async def test_a_flush_that_finds_the_device_full_is_a_failure_and_no_full_disk(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, change: Mutation
) -> None:
    """Its bytes may be lost, and the next flush would not say so: it must not simply be tried again."""
    engine = await open_jsonl(fast_path, tuning=BY_HAND)
    await done(engine, Append("k", [A, B]))
    await quiet(engine)

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with suppress(Refused):
        await engine.submit([Request(change)])
        await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.guarded_round)
    assert "Errno 5" in await asyncio.wait_for(engine.failed(), 60)
    await engine.close()


async def test_a_new_file_that_cannot_be_flushed_stops_the_start(fast_path: Path) -> None:
    (fast_path / "sessions").mkdir()
    (fast_path / "sessions" / "k.jsonl").write_bytes(A + b"\n")
    with pytest.raises(StartError, match="Errno 5"):
        await open_jsonl(fast_path, tuning=BY_HAND, disk=WatchedDisk(fail_to_flush))
    engine = await open_jsonl(fast_path, tuning=BY_HAND)
    assert await lines(engine, "k") == [A]
    await engine.close()


async def test_a_call_whose_commit_does_not_return_is_told_that_nobody_knows(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush failed elsewhere, and the disk keeps the commit under way for longer than anybody waits."""
    engine = await open_jsonl(fast_path, tuning=BY_HAND)
    begun, returns, commit_row = threading.Event(), threading.Event(), engine._vault.commit_row

    def stuck(*arguments: object) -> None:
        begun.set()
        assert returns.wait(100)
        commit_row(*arguments)

    monkeypatch.setattr(engine._vault, "commit_row", stuck)
    waiting = asyncio.create_task(done(engine, Append("k", [A])))
    assert await asyncio.to_thread(begun.wait, 60)
    behind = asyncio.create_task(done(engine, Append("k", [B])))
    await asyncio.sleep(0)
    engine._committer.fail("a session file could not be flushed")
    try:
        for call in (waiting, behind):
            with pytest.raises(Refused) as caught:
                await asyncio.wait_for(call, 60)
            assert caught.value.refusal.reason == "OUTCOME_UNKNOWN"
    finally:
        returns.set()
    await engine.close()


async def test_a_read_that_finds_another_file_once_storage_failed_is_told_so(fast_path: Path) -> None:
    """Nobody looks at that file any more: the next daemon does."""
    async with opened(fast_path) as engine:
        await done(engine, Append("k", [A]))
    async with opened(fast_path) as engine:
        file = fast_path / "sessions" / "k.jsonl"
        file.rename(file.with_suffix(".old"))
        file.write_bytes(A + b"\n")
        engine._committer.fail("a flush failed elsewhere")
        with pytest.raises(Refused) as caught:
            await lines(engine, "k")
        assert caught.value.refusal.reason == "SHUTTING_DOWN"


async def test_a_damaged_session_that_cannot_be_set_aside_stops_the_engine(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its waiting lines go to quarantine first: that this fails is no defect, and no warning."""

    def fail(*_: object) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    engine = await open_jsonl(fast_path, tuning=BY_HAND)
    await done(engine, Append("k", [A]))
    await engine.close()
    engine = await open_jsonl(fast_path, tuning=BY_HAND)
    monkeypatch.setattr(committer, "confirm", fail)
    fd = os.open(fast_path / "sessions" / "k.jsonl", os.O_WRONLY)
    stat = os.fstat(fd)
    os.pwrite(fd, b"X", stat.st_size - 4)
    os.utime(fd, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.close(fd)
    with pytest.raises(Refused) as caught:
        await lines(engine, "k")
    assert caught.value.refusal.reason == "SHUTTING_DOWN"
    assert "Errno 5" in await asyncio.wait_for(engine.failed(), 60)
    await engine.close()

"""The simulated disk itself: what it loses, and what it keeps. And single cases that it found."""

import asyncio
import os
import random
from pathlib import Path

import pytest
from crash.by_hand import BY_HAND, A, B, opened, quiet, says
from crash.simulated import BLOCK_BYTES, SECTOR_BYTES, SHARES, Fault, SimulatedDisk
from crash.simulated_journal import vfs_on
from engines import done, lines
from sessionstored.engine import Refused, StartError
from sessionstored.engine.jsonl import open_jsonl
from sessionstored.rules import Append

SESSIONS = 300
"""So many that the catalogue needs pages that the database did not have."""


class NoneOfIt(random.Random):
    """Of what a failed flush should have made durable, nothing is."""

    def choice(self, seq):
        return seq[0]


def write(disk: SimulatedDisk, path: Path, data: bytes) -> int:
    fd = disk.open_append(path)
    disk.write_all(fd, data)
    return fd


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_was_not_flushed_is_lost_or_there(tmp_path: Path, share: float) -> None:
    disk = SimulatedDisk(tmp_path / "data")
    sessions = tmp_path / "data" / "sessions"
    one, two = write(disk, sessions / "one", b"flushed"), write(disk, sessions / "two", b"flushed")
    for fd in (one, two):
        disk.flush(fd)
    disk.flush_directory(sessions)
    disk.write_all(one, b" and not")
    disk.truncate(two, 3)
    three = write(disk, sessions / "three", b"new")
    disk.flush(three)
    disk.rename(sessions / "three", sessions / "two")
    disk.unlink(sessions / "one")
    for fd in (one, two, three):
        os.close(fd)
    disk.cut(random.Random(1), share)
    found = {path.name: path.read_bytes() for path in sessions.iterdir()}
    assert found == ({"one": b"flushed", "two": b"flushed"} if share == 0 else {"two": b"new"})


def test_what_was_not_flushed_is_torn_into_sectors(tmp_path: Path) -> None:
    path = tmp_path / "data" / "sessions" / "one"
    rng = random.Random(2)
    holes = short = 0
    for _ in range(50):
        disk = SimulatedDisk(tmp_path / "data")
        fd = write(disk, path, b"x" * 100)
        disk.flush(fd)
        disk.flush_directory(path.parent)
        disk.write_all(fd, b"y" * 5000)
        os.close(fd)
        disk.cut(rng, 0.5)
        found = path.read_bytes()
        assert found[:100] == b"x" * 100
        for begin in range(0, len(found), SECTOR_BYTES):
            part = found[max(100, begin) : begin + SECTOR_BYTES]
            assert set(part) in ({0}, {ord("y")}, set())
            holes += part[:1] == b"\0"
        short += len(found) < 5100
        path.unlink()
    assert holes > 20
    assert 20 < short < 50


@pytest.mark.parametrize("edited", [False, True])
async def test_the_name_of_an_adopted_file_is_durable_before_it_is_counted_on(
    tmp_path: Path, edited: bool
) -> None:
    data = tmp_path / "data"
    (data / "sessions").mkdir(parents=True)
    file = data / "sessions" / "k.jsonl"
    if not edited:
        file.write_bytes(A + b"\n")
    disk = SimulatedDisk(data, unflushed=("k.jsonl",))
    with vfs_on(disk) as vfs:
        engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
        if edited:
            await done(engine, Append("k", [B]))
            await engine.close()
            engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
            (data / "sessions" / "new").write_bytes(A + b"\n")
            disk.know(data / "sessions" / "new")
            disk.rename(data / "sessions" / "new", file)
        assert await lines(engine, "k") == [A]
        disk.dead = True
        await engine.close()
        disk.cut(random.Random(1), 0)
    async with opened(data) as engine:
        await says(engine, "k", A)


async def test_a_start_that_fails_behind_a_torn_commit_loses_nothing(fast_path: Path) -> None:
    """Nothing is written into a log that ends in the remains of a commit: torn, it would look like a loss."""
    data = fast_path / "data"
    disk = SimulatedDisk(data)
    failing = [0]

    def fail(kind: str) -> Fault:
        failing[0] -= kind == "log write"
        return Fault.ERROR if failing[0] == -1 else Fault.NONE

    with vfs_on(disk) as vfs:
        engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
        await done(engine, Append("k", [A]))
        await quiet(engine)
        disk.fault, failing[0] = fail, 7  # of a commit of many pages
        with pytest.raises(Refused):
            await done(engine, Append("k", [b'{"x": "%s"}' % (b"x" * 30_000)]))
        await engine.close()
        failing[0] = 0  # half a frame's header at the next start
        with pytest.raises(StartError):
            await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
    async with opened(data) as engine:
        assert await lines(engine, "k") == [A]


async def test_what_a_failed_flush_left_is_readable_and_never_durable(fast_path: Path) -> None:
    """As with a page cache: a second flush succeeds, and does nothing for what the first one gave up."""
    disk = SimulatedDisk(fast_path / "data")
    path = fast_path / "data" / "sessions" / "one"
    fd = write(disk, path, b"flushed")
    disk.flush(fd)
    disk.flush_directory(path.parent)
    disk.write_all(fd, b" and given up")
    disk.rng = NoneOfIt()
    disk.fault = lambda _: Fault.ERROR
    with pytest.raises(OSError, match="injected"):
        disk.flush(fd)
    disk.fault = lambda _: Fault.NONE
    disk.flush(fd)
    os.close(fd)
    assert path.read_bytes() == b"flushed and given up"
    disk.cut(random.Random(1), 1)
    assert path.read_bytes() == b"flushed"


@pytest.mark.parametrize("how", ["in its place", "again"])
def test_a_new_block_that_was_given_up_is_not_written_in_its_place(fast_path: Path, how: str) -> None:
    """As test_ext4 shows of a real one."""
    disk = SimulatedDisk(fast_path / "data")
    path = fast_path / "data" / "sessions" / "one"
    fd = write(disk, path, b"x" * BLOCK_BYTES)
    disk.flush(fd)
    disk.flush_directory(path.parent)
    disk.write_all(fd, b"y" * BLOCK_BYTES)
    disk.rng = NoneOfIt()
    disk.fault = lambda _: Fault.ERROR
    with pytest.raises(OSError, match="injected"):
        disk.flush(fd)
    disk.fault = lambda _: Fault.NONE
    os.close(fd)
    if how == "again":
        disk.write_again(path)
    else:
        fd = os.open(path, os.O_RDWR)
        os.lseek(fd, BLOCK_BYTES, os.SEEK_SET)
        disk.write_all(fd, b"y" * BLOCK_BYTES)
        disk.flush(fd)
        os.close(fd)
    assert path.read_bytes() == b"x" * BLOCK_BYTES + b"y" * BLOCK_BYTES
    disk.cut(random.Random(1), 1)
    assert path.read_bytes() == b"x" * BLOCK_BYTES + (b"y" if how == "again" else b"\0") * BLOCK_BYTES


async def start_that_is_cut(data: Path, cut_at: int, share: float) -> bool:
    """A commit whose flush fails, then a start whose n-th step is its last; whether it had so many."""
    disk = SimulatedDisk(data)
    disk.rng = NoneOfIt()
    with vfs_on(disk) as vfs:
        engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
        await done(engine, Append("k", [A]))
        await quiet(engine)
        disk.fault = lambda kind: Fault.ERROR if kind == "log flush" else Fault.NONE
        with pytest.raises(Refused):
            await done(engine, Append("k", [b'{"x": "%s"}' % (b"x" * 30_000)]))
        await engine.close()
        disk.fault = lambda _: Fault.NONE
        disk.cut_at = disk.steps + cut_at
        try:
            await (await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)).close()
        except StartError:
            assert disk.dead
        was_cut = disk.dead
        disk.cut(random.Random(cut_at), share)
    return was_cut


@pytest.mark.parametrize("share", SHARES)
async def test_a_log_whose_flush_failed_is_durable_before_it_is_moved(fast_path: Path, share: float) -> None:
    """Else the database has parts of a commit, or of a page, that nothing on the disk can complete."""
    for cut_at in range(1, 200):
        data = fast_path / f"{cut_at}"
        was_cut = await start_that_is_cut(data, cut_at, share)
        async with opened(data) as engine:
            assert (await lines(engine, "k"))[0] == A, f"cut at step {cut_at}"
        if not was_cut:
            assert cut_at > 10
            return
    raise AssertionError("a start has no end")


async def test_what_could_not_be_moved_into_the_database_is_moved_again(fast_path: Path) -> None:
    """Its pages can be read there, and are not on the disk; written in their place, they never would be."""
    data = fast_path / "data"
    disk = SimulatedDisk(data)
    disk.rng = NoneOfIt()
    with vfs_on(disk) as vfs:
        engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
        for n in range(SESSIONS):
            await done(engine, Append(f"{n}", [A]))
        await quiet(engine)
        disk.fault = lambda kind: Fault.ERROR if kind == "database flush" else Fault.NONE
        await asyncio.to_thread(engine._maintenance.guarded_round)
        assert engine._committer.failure
        await engine.close()
        disk.fault = lambda _: Fault.NONE
        engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
        disk.dead = True
        await engine.close()
        disk.cut(random.Random(1), 0)
    async with opened(data) as engine:
        for n in range(SESSIONS):
            assert await lines(engine, f"{n}") == [A]

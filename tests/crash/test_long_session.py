"""A long session costs what a short one does: appends do not read it, and a read of its end reads its end."""

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from crash.by_hand import BY_HAND, A, opened, round_of
from crash.disks import WatchedDisk
from engines import done, lines
from sessionstored.engine.jsonl import JsonlEngine, open_jsonl
from sessionstored.engine.jsonl.blocks import BLOCK_BYTES
from sessionstored.rules import Append, Head, Replace

MESSAGES = 10_000
LENGTHS = (10, 1_000, MESSAGES)
SAMPLES = 60


def message(number: int) -> bytes:
    return b'{"role": "user", "content": "%s", "n": %d}' % (b"x" * 250, number)


class Reads:
    """Counts what is read of files, by position."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        data = self._pread(fd, size, offset)
        self.ranges.append((offset, len(data)))
        return data

    _pread = staticmethod(os.pread)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    counted = Reads()
    monkeypatch.setattr(os, "pread", counted.pread)
    return counted


def last(count: int):
    def select(head: Head) -> tuple[int, int]:
        return head.message_count - count, head.message_count

    return select


async def grow(engine: JsonlEngine, count: int) -> None:
    for first in range(0, count, 1_000):
        batch = [message(n) for n in range(first, min(count, first + 1_000))]
        await done(engine, Append("long", batch))


async def test_the_cost_of_an_append_does_not_grow_with_the_session(tmp_path: Path, reads: Reads):
    p50_ms = {}
    for length in LENGTHS:
        engine = await open_jsonl(tmp_path / str(length), tuning=BY_HAND)
        await grow(engine, length)
        await engine.close()
        engine = await open_jsonl(tmp_path / str(length), tuning=BY_HAND)
        reads.ranges.clear()
        taken = []
        for n in range(SAMPLES):
            begun = time.perf_counter()
            await done(engine, Append("long", [message(length + n)]))
            taken.append(time.perf_counter() - begun)
        read = sum(size for _, size in reads.ranges)
        p50_ms[length] = statistics.median(taken) * 1000
        await engine.close()
        assert read < BLOCK_BYTES, f"{SAMPLES} appends to {length} messages read {read} bytes"
    print("append p50: " + ", ".join(f"{each:.2f} ms at {length:,}" for length, each in p50_ms.items()))


async def test_reading_the_end_of_a_cold_session_reads_its_last_blocks(tmp_path: Path, reads: Reads):
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    await grow(engine, MESSAGES)
    await engine.close()
    (file,) = (tmp_path / "sessions").glob("*.jsonl")
    size = file.stat().st_size
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    reads.ranges.clear()
    got = await engine.read("long", last(20), 1 << 20)
    assert list(got.lines) == [message(n) for n in range(MESSAGES - 20, MESSAGES)]
    assert got.start == MESSAGES - 20
    assert min(offset for offset, _ in reads.ranges) > size - 4 * BLOCK_BYTES
    read = sum(size for _, size in reads.ranges)
    print(f"the last 20 of {MESSAGES:,} messages: {read:,} of {size:,} bytes read")
    reads.ranges.clear()
    middle = await engine.read("long", lambda head: (5_000, 5_010), 1 << 20)
    assert list(middle.lines) == [message(n) for n in range(5_000, 5_010)]
    assert sum(size for _, size in reads.ranges) <= 4 * BLOCK_BYTES
    await engine.close()


async def test_changes_at_the_front_of_many_sessions_do_not_hold_all_of_them_in_memory(tmp_path: Path):
    """What stands behind a change waits in memory until its file is written anew."""
    size = 1 << 20
    tuning = replace(BY_HAND, cache_bytes_max=size, pinned_bytes_max=4 * size)
    async with opened(tmp_path, tuning=tuning) as engine:
        for n in range(20):
            await done(engine, Append(f"k{n}", [b'{"p": "%s"}' % (b"x" * 1000)] * 1000))
        held = []
        for n in range(20):
            await done(engine, Replace(f"k{n}", 0, 1, [A]))
            held.append(engine._vault._cached_bytes)
        assert max(held) < 7 * size
        for n in range(20):
            assert len(await lines(engine, f"k{n}")) == 1000


async def test_what_an_append_and_its_checkpoint_write_does_not_grow_with_the_session(tmp_path: Path):
    disk = WatchedDisk()
    async with opened(tmp_path, disk) as engine:
        written = []
        for length in (10, MESSAGES):
            await grow(engine, length)
            await round_of(engine)
            before = disk.bytes_written
            await done(engine, Append("long", [message(0)]))
            await round_of(engine)
            written.append(disk.bytes_written - before)
    assert written == [len(message(0)) + 1] * 2

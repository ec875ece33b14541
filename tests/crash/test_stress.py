"""Everything at once, with nothing kept in memory: writers, readers, listings, forks, checkpoints, reopening.

Each writer owns its keys and holds every answer against the naive model; readers read everybody's keys, and
what they saw must be a state that the key had while they read.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from crash.histories import Histories, Writer, observe
from sessionstored.engine import Engine, Query
from sessionstored.engine.jsonl import DEFAULT_TUNING, Tuning, open_jsonl

TINY = replace(DEFAULT_TUNING, cache_bytes_max=10_000, hot_sessions_max=5, checkpoint_interval_s=0.01)
TUNINGS = {
    "tiny cache, fast checkpoints": TINY,
    "no cache, checkpoints without pause": replace(
        TINY, cache_bytes_max=100, hot_sessions_max=1, checkpoint_interval_s=0.001, group_requests_max=3
    ),
    "defaults": DEFAULT_TUNING,
}


async def storm(data: Path, tuning: Tuning, seed: int, seconds: float, rounds: int) -> tuple[int, int]:
    """Run the storm in rounds, each on a freshly opened engine; returns how many writes and reads it made."""
    histories = Histories()
    writers: list[Writer] = []
    for opening in range(rounds):
        engine = await open_jsonl(data, tuning=tuning)
        if not writers:
            writers = [
                Writer(engine, tuple(f"w{n}:{m}" for m in range(4)), histories, seed * 100 + n, f"client{n}")
                for n in range(4)
            ]
        for writer in writers:
            writer.engine = engine
        await compare(engine, writers)
        await one_round(engine, writers, histories, seed * 100 + opening, seconds / rounds)
        await compare(engine, writers)
        histories.check()
        histories.observations.clear()
        await engine.close()
    return sum(writer.sequence for writer in writers), rounds


async def one_round(
    engine: Engine, writers: list[Writer], histories: Histories, seed: int, seconds: float
) -> None:
    end = time.monotonic() + seconds
    keys = [key for writer in writers for key in writer.keys]

    async def repeat(step: Callable[[random.Random], object], rng: random.Random) -> None:
        while time.monotonic() < end:
            await step(rng)  # type: ignore[misc]
            await asyncio.sleep(0)  # a warm read does not wait by itself

    async def list_all(rng: random.Random) -> None:
        page = await engine.list(Query(page_size=100))
        listed = [head.key for head in page.heads]
        assert listed == sorted(set(listed), key=str.encode)
        await asyncio.sleep(0.005)

    tasks = [repeat(lambda _, w=writer: w.step(), random.Random()) for writer in writers]  # type: ignore[misc]
    tasks += [
        repeat(lambda rng: histories.read(engine, rng.choice(keys), rng), random.Random(seed + n))
        for n in range(4)
    ]
    tasks.append(repeat(list_all, random.Random(seed)))
    await asyncio.gather(*tasks)


async def compare(engine: Engine, writers: list[Writer]) -> None:
    """The engine holds exactly what the models hold."""
    expected = {key: writer.histories.of(key)[-1] for writer in writers for key in writer.keys}
    for key, state in expected.items():
        assert await observe(engine, key) == state, key
    living = {key for key, state in expected.items() if state is not None}
    page = await engine.list(Query(page_size=1000))
    assert {head.key for head in page.heads} == living
    assert await engine.count() == len(living)


@pytest.mark.parametrize("name", TUNINGS)
async def test_a_storm_of_everything(name: str, fast_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    writes, _ = await storm(fast_path / "data", TUNINGS[name], seed, seconds=3, rounds=3)
    print(f"{writes} writes")
    assert writes > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNINGS)
async def test_a_long_storm_of_everything(name: str, fast_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    writes, _ = await storm(fast_path / "data", TUNINGS[name], seed, seconds=40, rounds=8)
    print(f"{writes} writes")

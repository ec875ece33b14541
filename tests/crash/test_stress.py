"""Everything at once, with nothing kept in memory: writers, readers, listings, forks, checkpoints, reopening.

Each writer owns its keys and holds every answer against the naive model; readers read everybody's keys, and
what they saw must be a state that the key had while they read.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
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

# Changes by each of four writers.
STEPS = 300


async def storm(data: Path, tuning: Tuning, seed: int, steps: int, rounds: int) -> int:
    """Run the storm in rounds, each on a freshly opened engine; returns how many reads met it.

    It is measured in steps of each writer and never in time: what a machine does within a second is no
    property of the engine.
    """
    histories = Histories()
    writers: list[Writer] = []
    reads = 0
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
        await one_round(engine, writers, histories, seed * 100 + opening, steps // rounds)
        await compare(engine, writers)
        histories.check()
        assert len(histories.observations) >= 4, "each of the readers began when the writers did"
        reads += len(histories.observations)
        histories.observations.clear()
        await engine.close()
    assert [writer.sequence for writer in writers] == [steps // rounds * rounds] * len(writers)
    return reads


async def one_round(
    engine: Engine, writers: list[Writer], histories: Histories, seed: int, steps: int
) -> None:
    writing = len(writers)
    keys = [key for writer in writers for key in writer.keys]

    async def write(writer: Writer) -> None:
        nonlocal writing
        for _ in range(steps):
            await writer.step()
        writing -= 1

    async def repeat(step: Callable[[random.Random], Awaitable[None]], rng: random.Random) -> None:
        while writing:
            await step(rng)
            # A warm read does not wait by itself, and a loop that never rests leaves the engine's threads
            # nothing but the interpreter's switching.
            await asyncio.sleep(0.0005)

    async def list_all(rng: random.Random) -> None:
        page = await engine.list(Query(page_size=100))
        listed = [head.key for head in page.heads]
        assert listed == sorted(set(listed), key=str.encode)

    # TaskGroup: a writer that fails ends the storm, and so the readers that wait for its end.
    async with asyncio.TaskGroup() as group:
        for writer in writers:
            group.create_task(write(writer))
        for n in range(4):
            rng = random.Random(seed + n)
            group.create_task(repeat(lambda rng: histories.read(engine, rng.choice(keys), rng), rng))
        group.create_task(repeat(list_all, random.Random(seed)))


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
    print(f"{await storm(fast_path / 'data', TUNINGS[name], seed, steps=STEPS, rounds=3)} reads")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TUNINGS)
async def test_a_long_storm_of_everything(name: str, fast_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    print(f"{await storm(fast_path / 'data', TUNINGS[name], seed, steps=48 * STEPS, rounds=8)} reads")

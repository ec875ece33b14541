"""Scenarios in which simpler designs lose or revive data, at each step of a checkpoint, then a crash.

A checkpoint goes back and forth between the maintenance thread and the committer. Before each of those steps
the whole scenario happens; then the daemon is killed, at once or after the checkpoint went on.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import apsw
import pytest
from crash.by_hand import BY_HAND, A, B, C, D, crashed, opened, quiet, round_of, says
from crash.simulated import SimulatedDisk
from crash.simulated_journal import vfs_on
from crash.workspaces import quarantined
from engines import done, lines
from sessionstored.engine.jsonl import JsonlEngine, open_jsonl
from sessionstored.rules import Append, Create, Delete, Fork, Mutation, Pop, Replace, Update

Contents = dict[str, Sequence[bytes]]

# name -> (what was there and checkpointed, what waits for the checkpoint, what happens in it, what must be)
SCENARIOS: dict[str, tuple[list[Mutation], list[Mutation], list[Mutation], Contents]] = {
    "delete, then make again in the checkpoint": (
        [Append("k", [A, B])], [Delete("k")], [Create("k", [C])], {"k": [C]},
    ),
    "delete and make again in the checkpoint": (
        [Append("k", [A, B])], [Append("k", [C])], [Delete("k"), Append("k", [D])], {"k": [D]},
    ),
    "make again, and delete in the checkpoint": (
        [Append("k", [A, B])], [Delete("k"), Append("k", [C])], [Delete("k")], {},
    ),
    "delete, then fork to the same key": (
        [Append("k", [A]), Append("s", [B, C])], [Delete("k")], [Fork("k", "s", 1)], {"k": [B], "s": [B, C]},
    ),
    "fork, then rewrite the source": (
        [Append("s", [A, B])], [Append("s", [C])], [Fork("k", "s"), Replace("s", 0, 2, [D]), Pop("s")],
        {"k": [A, B, C], "s": [D]},
    ),
    "rewrite, and rewrite again": (
        [Append("k", [A, B, C])], [Replace("k", 0, 1, [D])], [Replace("k", 1, 1, []), Append("k", [A])],
        {"k": [D, C, A]},
    ),
    "pop, then append": (
        [Append("k", [A, B])], [Pop("k")], [Pop("k"), Append("k", [C]), Update("k", b'{"a": 1}')], {"k": [C]},
    ),
    "make, then append and delete in the checkpoint": (
        [], [Append("k", [A])], [Append("k", [B]), Delete("k")], {},
    ),
    "append, then append and delete in the checkpoint": (
        [Append("k", [A])], [Append("k", [B])], [Append("k", [C]), Delete("k")], {},
    ),
}  # fmt: skip


class SteppedRound:
    """A round that stops before its n-th step, for something else to happen."""

    def __init__(self, engine: JsonlEngine) -> None:
        self.engine = engine
        self.steps = 0

    async def run(self, at: int, meanwhile: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        put = self.engine._committer.run
        inside = threading.local()

        def run(task: Callable[[], object], **how: bool) -> object:
            if getattr(inside, "round", False):
                self.steps += 1
                if self.steps == at:
                    inside.round = False
                    asyncio.run_coroutine_threadsafe(meanwhile(), loop).result()  # type: ignore[arg-type]
                    inside.round = True
            return put(task, **how)

        def work() -> None:
            inside.round = True
            self.engine._maintenance.round()

        self.engine._committer.run = run  # type: ignore[assignment,method-assign]
        try:
            await loop.run_in_executor(None, work)
        finally:
            self.engine._committer.run = put  # type: ignore[method-assign]


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_scenario_at_every_step_of_a_checkpoint(fast_path: Path, name: str) -> None:
    before, waiting, within, expected = SCENARIOS[name]
    copies: list[Path] = []
    step = 0
    while True:
        step += 1
        async with opened(fast_path / f"{step}") as engine:
            for mutation in before:
                await done(engine, mutation)
            await round_of(engine)
            for mutation in waiting:
                await done(engine, mutation)
            await quiet(engine)

            async def meanwhile(engine: JsonlEngine = engine, step: int = step) -> None:
                for mutation in within:
                    await done(engine, mutation)
                copies.append(await crashed(engine, fast_path / f"within {step}"))

            stepped = SteppedRound(engine)
            await stepped.run(step, meanwhile)
            if stepped.steps < step:
                break
            copies.append(await crashed(engine, fast_path / f"after {step}"))
            for key, messages in expected.items():
                assert await lines(engine, key) == messages
    assert step > 4
    for copy in [*copies, *(fast_path / f"{n}" for n in range(1, step))]:
        async with opened(copy) as engine:
            try:
                assert await engine.count() == len(expected)
                for key in {"k", *expected}:
                    await says(engine, key, *expected.get(key, ()))
            except BaseException as error:
                error.add_note(f"crashed {copy.name}")
                raise


@pytest.mark.parametrize("share", [0.0, None], ids=["nothing unflushed is left", "some is"])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_power_cut_after_a_scenario_in_a_checkpoint(
    fast_path: Path, name: str, share: float | None
) -> None:
    """At once, or after the checkpoint went on: nothing deleted comes back, and nothing is set aside."""
    before, waiting, within, expected = SCENARIOS[name]
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for step in range(1, 20):
        data = fast_path / f"{step}"
        disk = SimulatedDisk(data)
        at_once = share is None and rng.random() < 0.5

        async def meanwhile(engine: JsonlEngine, disk: SimulatedDisk = disk, at_once: bool = at_once) -> None:
            for mutation in within:
                await done(engine, mutation)
            await quiet(engine)
            disk.dead = at_once

        with vfs_on(disk) as vfs:
            engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
            for mutation in before:
                await done(engine, mutation)
            await round_of(engine)
            for mutation in waiting:
                await done(engine, mutation)
            await quiet(engine)
            stepped = SteppedRound(engine)
            with suppress(apsw.Error, OSError):
                await stepped.run(step, partial(meanwhile, engine))
            engine._committer.fail("the power is cut")
            await engine.close()
            if stepped.steps < step:
                assert step > 4
                return
            disk.cut(rng, share)
        async with opened(data) as engine:
            assert await engine.count() == len(expected), f"step {step}"
            for key in {"k", *expected}:
                await says(engine, key, *expected.get(key, ()))
        assert quarantined(data) == []

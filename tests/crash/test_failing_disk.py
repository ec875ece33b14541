"""EIO at the n-th write or flush, of session files and journal: the engine stops, and loses nothing."""

import asyncio
import errno
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from crash.by_hand import BY_HAND, A, B
from crash.disks import WatchedDisk, copy_of, power_cut_copy_of
from crash.faults import FailingDisk, Plan, failing_vfs
from crash.histories import Histories, State, Writer, state_of
from crash.test_every_step import KEYS, Cut, check
from engines import done, lines
from sessionstored.engine import Refused, Request, StartError
from sessionstored.engine.jsonl import JsonlEngine, open_jsonl
from sessionstored.rules import Answer, Append


async def run_until_it_fails(
    data: Path, seed: int, plan: Plan, operations: int = 30
) -> tuple[Cut, FailingDisk]:
    """Run random operations with rounds in between, until storage fails; returns what was known then."""
    (data / "sessions").mkdir(parents=True)
    disk = FailingDisk(data / "sessions", plan)
    with failing_vfs(plan) as vfs:
        engine = await open_jsonl(data, tuning=BY_HAND, disk=disk, vfs=vfs)
        writer = Writer(engine, KEYS, Histories(), seed, "client")
        acknowledged: dict[str, State] = {key: None for key in KEYS}
        under_way: Request | None = None
        last: tuple[Request, Answer] | None = None
        rng = random.Random(seed)
        plan.armed = True
        for _ in range(operations):
            key = rng.choice(KEYS)
            asked = under_way = writer.next(key)
            before = time.time_ns() // 1000
            try:
                (reply,) = await asyncio.wait_for(engine.submit([asked]), 100)
            except Refused as refused:
                if refused.refusal.reason == "SHUTTING_DOWN":  # certainly not applied
                    under_way = None
                elif refused.refusal.reason != "OUTCOME_UNKNOWN":
                    raise
                break
            writer.learn(asked, reply.outcome, before)
            acknowledged[key] = state_of(writer.model, key)
            under_way, last = None, writer.last
            if rng.random() < 0.2:
                await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.guarded_round)
        await stop(engine, plan)
        plan.armed = False
    return Cut(data, plan.at, plan.failed, acknowledged, under_way, last), disk


async def stop(engine: JsonlEngine, plan: Plan) -> None:
    """Close; an engine whose storage failed has said so, takes nothing any more, and still lets go of all."""
    if not plan.failed:
        await engine.close()
    if plan.failed:  # perhaps only while it closed
        assert await asyncio.wait_for(engine.failed(), 100)
        with pytest.raises(Refused):
            await engine.submit([Request(Append("k", [b"{}"]))])
        await asyncio.wait_for(engine.close(), 100)


async def fail_at(root: Path, seed: int, at: int) -> tuple[str, Sequence[str]]:
    """Fail at one step, and open what is left: as it is, and without what was not flushed."""
    data = root / f"{at}"
    plan = Plan(at, once=at % 2 == 1)
    cut, disk = await run_until_it_fails(data, seed, plan)
    outcomes = []
    for power in (False, True):
        copy = root / f"{at} {power}"
        power_cut_copy_of(data, copy, disk) if power else copy_of(data, copy)
        cut.data = copy
        try:
            outcomes.append(await check(cut))
        except BaseException as error:
            error.add_note(f"step {at}, {plan.failed}, power cut: {power}; under way: {cut.under_way}")
            raise
    shutil.rmtree(data)
    return plan.failed, outcomes


async def fail_at_steps(root: Path, seed: int, every: int) -> None:
    whole = Plan()
    await run_until_it_fails(root / "whole", seed, whole)
    assert not whole.failed
    kinds: Counter[str] = Counter()
    # The first of each kind in any case: some seeds write little, and a regular choice may miss the rest.
    first = {kind: at for at, kind in reversed(list(enumerate(whole.steps, start=1)))}
    assert len(first) > 2
    for at in sorted({*range(1 + seed % every, len(whole.steps) + 1, every), *first.values()}):
        kind, outcomes = await fail_at(root, seed, at)
        kinds[kind] += 1
        assert len(outcomes) == 2
    print(f"{len(whole.steps)} steps; failed at {dict(kinds)}")
    assert len(kinds) > 2


async def test_an_error_of_the_disk_stops_the_engine_and_loses_nothing(fast_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    await fail_at_steps(fast_path, seed, every=12)


@pytest.mark.slow
async def test_an_error_of_the_disk_at_every_step(fast_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    await fail_at_steps(fast_path, seed, every=1)


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


async def test_a_new_file_that_cannot_be_flushed_stops_the_start(fast_path: Path) -> None:
    (fast_path / "sessions").mkdir()
    (fast_path / "sessions" / "k.jsonl").write_bytes(A + b"\n")
    with pytest.raises(StartError, match="Errno 5"):
        await open_jsonl(fast_path, tuning=BY_HAND, disk=WatchedDisk(fail_to_flush))
    engine = await open_jsonl(fast_path, tuning=BY_HAND)
    assert await lines(engine, "k") == [A]
    await engine.close()

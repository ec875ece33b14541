"""The rung of every failure: in one run each step of the disk fails once, in each way that it can.

The run is a random history of at least 300 steps, from the first opening to the clean stop: writes, flushes,
renames, truncations and so on of session files, STORE and journal, on the simulated disk. The n-th step fails
with EIO, once or from then on; the n-th write takes a half, or a half and then ENOSPC. An error stops the
engine; a full disk does not. Each is done three times. Once what is left is opened as it is, and as a power
cut leaves it. Once the store is restarted first, and then the power is cut; and once it is cut at a random
step of that restart: what a failed flush left in the page cache is not on the disk.
"""

import asyncio
import copy
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from crash.histories import observe
from crash.lost_writes import History, column_of
from crash.memory import in_memory
from crash.parallel import shared_out
from crash.simulated import Fault
from crash.simulated_journal import vfs_on
from crash.tally import Tally
from crash.test_every_step import changed_keys, check
from sessionstored.engine import Refused, Request, StartError
from sessionstored.engine.jsonl import JsonlEngine
from sessionstored.rules import Append

STEPS_MIN = 300
RESTART_STEPS = 30
LEFT, RESTARTED, RESTARTING = "left as it is", "restarted", "cut in the restart"
PATIENCE_S = 60


@dataclass
class Plan:
    """Which step fails, and how."""

    at: int = 0
    fault: Fault = Fault.NONE
    once: bool = True
    expected: str = ""
    """What the step will be."""
    steps: list[str] = field(default_factory=list)

    def __call__(self, kind: str) -> Fault:
        self.steps.append(kind)
        n = len(self.steps)
        hit = n == self.at or (not self.once and 0 < self.at < n)
        return self.fault if hit else Fault.NONE

    @property
    def happened(self) -> bool:
        return 0 < self.at <= len(self.steps)

    @property
    def kind(self) -> str:
        """What failed first, and how."""
        return f"{self.steps[self.at - 1]}: {self.fault.value}{'' if self.once else ' from then on'}"


class FailingHistory(History):
    """A history whose disk fails as planned."""

    def __init__(self, data: Path, seed: int, plan: Plan) -> None:
        super().__init__(data, random.Random(seed))
        self.plan = plan
        self.disk.fault = plan
        self.disk.rng = random.Random(seed + plan.at)

    async def stopped(self, engine: JsonlEngine) -> None:
        """It has said that it stops, takes nothing any more, and lets go of everything all the same."""
        assert await asyncio.wait_for(engine.failed(), PATIENCE_S)
        with suppress(Refused):
            await engine.submit([Request(Append("k", [b"{}"]))])
            raise AssertionError("it takes changes after it failed")
        await asyncio.wait_for(engine.close(), PATIENCE_S)

    async def go(self, vfs: str, operations: int) -> None:
        """Run to the end, or until storage fails: an error stops the engine, a full disk not."""
        refused = False
        try:
            await self.run(vfs, operations=operations)
        except StartError:
            refused = True
        self.disk.fault = lambda _: Fault.NONE
        if self.plan.happened and self.plan.fault is Fault.ERROR:
            assert self.failure or refused, "it went on after an error"
        else:
            assert not self.failure, f"it stopped: {self.failure}"


async def whole_run(path: Path, seed: int) -> tuple[int, list[str]]:
    """How many operations make a run of enough steps, and what its steps are."""
    for operations in range(10, 100, 4):
        shutil.rmtree(path, ignore_errors=True)
        plan = Plan()
        history = FailingHistory(path / "data", seed, plan)
        with vfs_on(history.disk) as vfs:
            await history.go(vfs, operations)
        if len(plan.steps) >= STEPS_MIN:
            return operations, plan.steps
    raise AssertionError("no run is long enough")


def plans(steps: list[str]) -> Iterator[Plan]:
    """Every failure of every step."""
    for at, kind in enumerate(steps, 1):
        yield Plan(at, Fault.ERROR, expected=kind)
        yield Plan(at, Fault.ERROR, once=False, expected=kind)
        if kind.endswith("write"):
            yield Plan(at, Fault.FULL, expected=kind)
            if kind.startswith("file"):
                yield Plan(at, Fault.SHORT, expected=kind)


async def fail_once(path: Path, seed: int, plan: Plan, operations: int, after: str, tally: Tally) -> None:
    """Fail as planned, then look at what is left: as it is or restarted, and after a power cut."""
    history = FailingHistory(path / "data", seed, plan)
    disk, known = history.disk, history.known
    with vfs_on(disk) as vfs:
        await history.go(vfs, operations)
        if not plan.happened:  # this run took a step less
            return
        tally.times += 1
        tally.acknowledged += history.messages
        tally.unknown += known.under_way is not None
        tally.phases[plan.kind] += 1
        if after == LEFT:
            await check(replace(known, model=copy.deepcopy(known.model)))
        else:
            disk.cut_at = disk.steps + disk.rng.randint(1, RESTART_STEPS) if after == RESTARTING else 0
            await restart(history, vfs)
        disk.cut(disk.rng)
    await check(known)


async def restart(history: FailingHistory, vfs: str) -> None:
    """Open the store, look, and kill it, unless the power goes meanwhile."""
    known = history.known
    try:
        engine = await history.opened(vfs)
    except StartError:
        if history.disk.dead:
            return
        raise
    changed_keys(known, {key: await observe(engine, key) for key in known.acknowledged})
    engine._committer.fail("killed")
    await engine.close()


def _of_every_kind(every: list[tuple[str, Plan]], rng: random.Random) -> list[tuple[str, Plan]]:
    """Failures in random order, but first one of each kind."""
    rng.shuffle(every)
    first = {(plan.expected, plan.fault, plan.once): n for n, (_, plan) in enumerate(every)}
    return [every[n] for n in first.values()] + [
        one for n, one in enumerate(every) if n not in first.values()
    ]


def run(root: Path, seed: int, times: int) -> Tally:
    """Make so many failures of a run, evenly spread; with enough times, every one."""
    return shared_out(fail_often, root, seed, times)


def fail_often(root: Path, seed: int, times: int, part: int = 0, parts: int = 1) -> Tally:
    """One process's share."""
    tally = Tally()
    with in_memory(root) as memory:
        operations, steps = asyncio.run(whole_run(memory / "whole", seed))
        every = [(after, plan) for after in (LEFT, RESTARTED, RESTARTING) for plan in plans(steps)]
        if times < len(every):
            every = _of_every_kind(every, random.Random(seed))[:times]
        elif part == 0:
            tally.notes.append(f"a run of {len(steps)} steps and {operations} operations")
        for n, (after, plan) in enumerate(every):
            if n % parts != part:
                continue
            path = memory / f"{n}"
            try:
                asyncio.run(fail_once(path, seed, plan, operations, after, tally))
            except Exception as error:
                what = f"seed {seed}, step {plan.at}, {plan.kind}, {after}"
                tally.lose(column_of(error), f"{what}: {error!r}")
            shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(path.with_suffix(".attic"), ignore_errors=True)
    return tally

"""The rung of the simulated disk: random histories, a power cut at a random step, and again in the recovery.

Hypothesis chooses everything: what is done, when the power goes, what of the unflushed is there afterwards.
A history appends, replaces, pops, updates, forks, deletes and makes anew: between checkpoints, in the middle
of them, and around clean restarts. After the cut everything acknowledged is there, what was under way
happened or did not, nothing else did, and sending it again settles it; after a clean stop the files alone say
the same.
"""

import asyncio
import random
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from crash.by_hand import BY_HAND, quiet
from crash.histories import Histories, Writer, state_of
from crash.memory import in_memory
from crash.parallel import shared_out
from crash.simulated import SimulatedDisk
from crash.simulated_journal import vfs_on
from crash.tally import Tally
from crash.test_every_step import ADOPTED, KEYS, Cut, Loss, check, learn_adopted
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from sessionstored.engine import Refused, StartError
from sessionstored.engine.jsonl import JsonlEngine, open_jsonl
from sessionstored.rules import Append, Create, Refusal, Replace

OPERATIONS_MAX = 60
STEPS_MAX = 250
RECOVERY_STEPS_MAX = 60
PAUSES_MAX = 8
PATIENCE_S = 60


class History:
    """One directory, from its first opening to the power cut."""

    def __init__(self, data: Path, rng: random.Random, honest: bool = True, adopts: bool = False) -> None:
        self.rng = rng
        if adopts:
            (data / "sessions").mkdir(parents=True)
            for name, content in ADOPTED.items():
                (data / "sessions" / name).write_bytes(content)
        self.disk = SimulatedDisk(data, unflushed=tuple(ADOPTED), honest=honest)
        self.known = Cut(data, 0, "", {key: None for key in KEYS}, None, None)
        self.messages = 0
        self.adopts = adopts
        self.failure = ""
        """What stopped the engine."""

    async def run(self, vfs: str, cut_at: int = 0, operations: int = OPERATIONS_MAX) -> None:
        """Go on until the power goes, or storage fails, or long enough."""
        if not self.adopts:  # what somebody wrote just now is nobody's promise before the first opening ends
            self.disk.cut_at = cut_at
        engine = await self.opened(vfs)
        writer = Writer(engine, KEYS, Histories(), 0, "client")
        writer.rng = self.rng
        await learn_adopted(engine, writer)
        self.known.acknowledged = {key: writer.histories.of(key)[-1] for key in KEYS}
        self.disk.cut_at = self.disk.cut_at or (cut_at and self.disk.steps + cut_at)
        for _ in range(operations):
            what = self.rng.random()
            try:
                if what < 0.75:
                    await self._operate(engine, writer)
                elif what < 0.92:
                    await self.maintained(engine, writer)
                else:
                    await engine.close()
                    if not self._over(engine):
                        writer.engine = engine = await self.opened(vfs)
            finally:
                if self._over(engine):
                    await self.stopped(engine)
            if self._over(engine):
                return
        await engine.close()
        self._over(engine)

    async def maintained(self, engine: JsonlEngine, writer: Writer) -> None:
        """One round of maintenance, as its thread does it, perhaps with operations between its steps."""
        loop, put, inside = asyncio.get_running_loop(), engine._committer.run, threading.local()
        meanwhile = [self.rng.random() < 0.2 for _ in range(PAUSES_MAX)]
        errors: list[BaseException] = []

        def run(task: Callable[[], object], **how: bool) -> object:
            if getattr(inside, "round", False) and meanwhile and meanwhile.pop():
                inside.round = False
                operating = asyncio.run_coroutine_threadsafe(self._operate(engine, writer), loop)
                try:
                    operating.result(PATIENCE_S)
                except BaseException as error:  # the round would take it for a failure of storage
                    errors.append(error)
                inside.round = True
            return put(task, **how)

        def work() -> None:
            inside.round = True
            engine._maintenance.guarded_round()

        engine._committer.run = run  # type: ignore[assignment,method-assign]
        try:
            await loop.run_in_executor(None, work)
        finally:
            engine._committer.run = put  # type: ignore[method-assign]
        for error in errors:
            raise error

    async def stopped(self, engine: JsonlEngine) -> None:
        """Let go of an engine that can go on no more."""
        await engine.close()

    def _over(self, engine: JsonlEngine) -> bool:
        """Whether it can go on no more."""
        self.failure = engine._committer.failure
        return self.disk.dead or bool(self.failure)

    async def opened(self, vfs: str) -> JsonlEngine:
        return await open_jsonl(self.known.data, tuning=BY_HAND, disk=self.disk, vfs=vfs)

    async def _operate(self, engine: JsonlEngine, writer: Writer) -> None:
        known, key = self.known, self.rng.choice(KEYS)
        asked = known.under_way = writer.next(key)
        known.model = writer.model
        before = time.time_ns() // 1000
        try:
            (reply,) = await engine.submit([asked])
        except Refused as refused:
            if refused.refusal.reason in ("SHUTTING_DOWN", "STORAGE_FULL"):  # certainly not applied
                known.under_way = None
            elif refused.refusal.reason != "OUTCOME_UNKNOWN":
                raise
            return
        if isinstance(reply.outcome, Refusal) and reply.outcome.reason == "STORAGE_FULL":
            known.under_way = None
            return
        writer.learn(asked, reply.outcome, before)
        known.acknowledged[key] = state_of(writer.model, key)
        known.under_way, known.last = None, writer.last
        if isinstance(asked.mutation, Append | Create | Replace):
            self.messages += len(asked.mutation.messages)
        with suppress(Refused, OSError):
            await quiet(engine)


async def cut_once(
    root: Path, rng: random.Random, cut_at: int, again_at: int, honest: bool, tally: Tally
) -> None:
    """One history, its power cut, perhaps another in the recovery from it, and what is left."""
    history = History(root / "data", rng, honest, adopts=rng.random() < 0.3)
    disk, known = history.disk, history.known
    with vfs_on(disk) as vfs:
        with suppress(StartError):  # the power went while it was opened, for the first time or again
            await history.run(vfs, cut_at)
        assert disk.dead or disk.steps < disk.cut_at, "it ended by itself"
        known.kind = disk.last_kind if disk.dead else "idle"
        tally.acknowledged += history.messages
        tally.unknown += known.under_way is not None
        tally.phases[known.kind] += 1
        tally.times += 1
        disk.cut(rng)
        if again_at:
            disk.cut_at = again_at
            try:
                await (await history.opened(vfs)).close()
            except StartError:
                if not disk.dead:
                    raise
            tally.phases[f"again in the recovery: {disk.last_kind}" if disk.dead else "again when idle"] += 1
            disk.cut(rng)
    await check(known)


def run(root: Path, seed_: int, times: int) -> Tally:
    """Cut the power so many times."""
    return shared_out(cut_often, root, seed_, times)


def run_on_a_lying_disk(root: Path, seed_: int, times: int) -> Tally:
    """The same on a disk whose flushes make nothing durable: this loses what was acknowledged."""
    return cut_often(root, seed_, times, honest=False)


def cut_often(
    root: Path, seed_: int, times: int, part: int = 0, parts: int = 1, *, honest: bool = True
) -> Tally:
    """Cut the power so many times, or until something is lost, which is then made as small as it can be.

    Args:
        root: an empty directory.
        seed_: of every choice.
        times: how often, in all parts together.
        part: the number of this part.
        parts: how many there are.
        honest: whether the disk's flushes make anything durable; if not, every loss is counted.

    """
    tally = Tally()
    with in_memory(root) as memory:

        @seed(seed_ + part)
        @settings(
            max_examples=-(-times // parts),
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(
            rng=st.randoms(use_true_random=False),
            cut_at=st.integers(1, STEPS_MAX),
            again_at=st.integers(0, 2 * RECOVERY_STEPS_MAX).map(lambda n: max(0, n - RECOVERY_STEPS_MAX)),
        )
        def example(rng: random.Random, cut_at: int, again_at: int) -> None:
            path = memory / "one"
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            try:
                asyncio.run(cut_once(path, rng, cut_at, again_at, honest, tally))
            except Exception as error:
                if honest:
                    raise
                tally.lose(column_of(error), f"{type(error).__name__}: {error}"[:300])

        try:
            example()
        except Exception as error:
            tally.lose(column_of(error), traceback.format_exc())
    return tally


def column_of(error: Exception) -> str:
    """The loss column of what a check raised."""
    if isinstance(error, Loss):
        return error.column
    return "lost" if isinstance(error, StartError | Refused) else "wrong"

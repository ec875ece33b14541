"""A run of mixed operations, stopped at every single disk call: by kill -9, and by a power cut.

At each call the directory is copied as it is (kill -9), or with only what was flushed (power cut). Every copy
is opened again, and must hold what was acknowledged; the one operation under way may have happened or not,
and nothing else may have. Sending it again settles it.
"""

import asyncio
import copy
import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crash.by_hand import BY_HAND
from crash.disks import PowerDisk, QuickDisk, copy_of, power_cut_copy_of
from crash.histories import Histories, State, Writer, observe, state_of
from model import Model, Session
from seed_reader import read_session
from sessionstored.engine import Query, Request
from sessionstored.engine.jsonl import JsonlEngine, open_jsonl
from sessionstored.rules import Answer, Append, Delete

DAMAGED = ("torn",)
"""The session that was adopted with a torn last line."""
KEYS = ("k", "k/fork", "adopted", "torn")
CUTS_MIN = 21
ADOPTED = {
    "adopted.jsonl": b'{"role": "user", "content": "no header, no line end"}',
    "torn.jsonl": b'{"_type": "metadata", "key": "torn"}\r\n\n{"role": "user"}\n{"role": "us',
}


@dataclass
class Cut:
    """A directory as a crash left it, and what was known then."""

    data: Path
    step: int
    kind: str
    acknowledged: dict[str, State]
    under_way: Request | None
    last: tuple[Request, Answer] | None
    model: Model | None = None
    """What was known before the operation under way, to say what must come of it."""


class Loss(AssertionError):
    """Something is not as it was acknowledged; `column` is how the fault ladder counts it."""

    def __init__(self, column: str, detail: str) -> None:
        super().__init__(f"{column}: {detail}")
        self.column = column


@dataclass
class Cutter:
    """Runs operations one at a time, and cuts at every disk call."""

    data: Path
    copies: Path
    seed: int
    power: bool
    every: int = 1
    cuts: list[Cut] = field(default_factory=list)

    def __post_init__(self) -> None:
        sessions = self.data / "sessions"
        sessions.mkdir(parents=True)
        for name, content in ADOPTED.items():
            (sessions / name).write_bytes(content)
        self.disk = PowerDisk(sessions, self._before)
        self.acknowledged: dict[str, State] = {}
        self.under_way: Request | None = None
        self.last: tuple[Request, Answer] | None = None
        self.model: Model | None = None
        self.counting = False

    def _before(self, step: int, kind: str, target: object) -> None:
        if not self.counting or (step + self.seed) % self.every:
            return
        to = self.copies / f"{len(self.cuts)}"
        if self.power:
            power_cut_copy_of(self.data, to, self.disk)
        else:
            copy_of(self.data, to)
        model = copy.deepcopy(self.model)
        self.cuts.append(Cut(to, step, kind, dict(self.acknowledged), self.under_way, self.last, model))

    async def run(self, operations: int) -> Writer:
        """Run random operations, with checkpoints in between."""
        engine = await open_jsonl(self.data, tuning=BY_HAND, disk=self.disk)
        writer = Writer(engine, KEYS, Histories(), self.seed, "client")
        await learn_adopted(engine, writer)
        self.acknowledged = {key: writer.histories.of(key)[-1] for key in KEYS}
        self.counting = True
        rng = random.Random(self.seed + 1)
        for number in range(10 * operations):
            if number >= operations and len(self.cuts) >= CUTS_MIN:  # few seeds change little
                break
            await self._operate(engine, writer, rng.choice(KEYS))
            if rng.random() < 0.2:
                await round_of(engine)
        await round_of(engine)
        await engine.close()
        self.counting = False
        return writer

    async def _operate(self, engine: JsonlEngine, writer: Writer, key: str) -> None:
        asked = self.under_way = writer.next(key)
        self.model = writer.model
        before = time.time_ns() // 1000
        (reply,) = await engine.submit([asked])
        writer.learn(asked, reply.outcome, before)
        self.acknowledged[key] = state_of(writer.model, key)
        self.under_way, self.last = None, writer.last
        await quiet(engine)


async def learn_adopted(engine: JsonlEngine, writer: Writer) -> None:
    """Teach the model the sessions that were adopted."""
    for key in writer.keys:
        seen = await observe(engine, key)
        if seen is not None:
            head, lines = seen
            found = await engine.read(key, lambda _: (0, 0), 1)
            writer.model.sessions[key] = Session(
                list(lines),
                head.metadata,
                head.last_consolidated,
                found.head.create_time_us,
                found.head.update_time_us,
                head.revision,
            )
            writer.model.highest[key] = head.revision
            writer.histories.of(key)[:] = [seen]


async def quiet(engine: JsonlEngine) -> None:
    """Wait until the session files have what was acknowledged, so that one thread at a time uses the disk."""
    await asyncio.wrap_future(engine._committer.run(lambda: None))


async def round_of(engine: JsonlEngine) -> bool:
    """One round of maintenance, now."""
    return await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.round)


def contents(state: State) -> object:
    """A state without its revision."""
    return state and (state[0].last_consolidated, state[0].metadata, state[1])


def changed_keys(cut: Cut, found: dict[str, State]) -> list[str]:
    """The keys that are not as they were acknowledged: none but that of the operation under way may be."""
    changed = [key for key in found if found[key] != cut.acknowledged[key]]
    for key in changed:
        if cut.under_way is None or key != cut.under_way.mutation.key:
            got, want = (Counter(state[1] if state else ()) for state in (found[key], cut.acknowledged[key]))
            column = "lost" if want - got else "duplicated" if got - want else "wrong"
            raise Loss(column, f"{key} is {found[key]}, and was {cut.acknowledged[key]}")
    return changed


async def check(cut: Cut) -> str:
    """Open a copy, and hold it against what was known. Returns what became of the operation under way."""
    engine = await open_jsonl(cut.data, tuning=BY_HAND, disk=QuickDisk(), durability="os")
    try:
        found = {key: await observe(engine, key) for key in cut.acknowledged}
        changed = changed_keys(cut, found)
        assert await engine.count() == sum(state is not None for state in found.values())
        for head in (await engine.list(Query())).heads:
            assert not head.damage or head.key in DAMAGED, f"{head.key}: {head.damage}"
        aside = [path.name for path in (cut.data / "quarantine").iterdir() if path.suffix != ".torn"]
        assert aside == [], "what was taken for somebody else's"
        await settle(engine, cut, found, happened=bool(changed))
        await everything_still_works(engine, cut)
    finally:
        await engine.close()
    assert_files_agree(cut.data, {key: found_after for key, found_after in (await reopened(cut)).items()})
    shutil.rmtree(cut.data)
    return "happened" if changed else "did not happen"


async def settle(engine: JsonlEngine, cut: Cut, found: dict[str, State], happened: bool) -> None:
    """Send the operation under way again, and the last acknowledged one."""
    if cut.last is not None:
        (reply,) = await engine.submit([cut.last[0]])
        assert reply.outcome == cut.last[1]
        assert reply.replayed
    if cut.under_way is None:
        return
    (first,) = await engine.submit([cut.under_way])
    (second,) = await engine.submit([cut.under_way])
    assert first.outcome == second.outcome
    if isinstance(first.outcome, Answer):
        assert second.replayed
        changes = first.outcome.revision != first.outcome.previous_revision
        assert happened == (first.replayed and changes), "what happened was not remembered, or the reverse"
    key = cut.under_way.mutation.key
    now = await observe(engine, key)
    if happened and now != found[key]:
        raise Loss("duplicated", f"{cut.under_way.mutation}: {found[key]}, and sent again {now}")
    if cut.model is not None:
        cut.model.check(cut.under_way.mutation, first.outcome, 0, time.time_ns() // 1000)
        expected = state_of(cut.model, key)
        if now != expected:
            raise Loss("torn", f"{cut.under_way.mutation}: {now}, and expected {expected}")


async def everything_still_works(engine: JsonlEngine, cut: Cut) -> None:
    """Every session takes a message; one is deleted."""
    for key in cut.acknowledged:
        before = await observe(engine, key)
        (reply,) = await engine.submit([Request(Append(key, [b'{"after": "the crash"}']))])
        assert isinstance(reply.outcome, Answer)
        after = await observe(engine, key)
        assert after is not None
        assert after[1] == (
            (*before[1], b'{"after": "the crash"}') if before else (b'{"after": "the crash"}',)
        )
        if before is not None:
            assert after[0].revision > before[0].revision
    (reply,) = await engine.submit([Request(Delete("k"))])
    assert isinstance(reply.outcome, Answer)


async def reopened(cut: Cut) -> dict[str, State]:
    """What the copy holds after a clean stop."""
    engine = await open_jsonl(cut.data, tuning=BY_HAND, disk=QuickDisk(), durability="os")
    try:
        return {key: await observe(engine, key) for key in cut.acknowledged}
    finally:
        await engine.close()


def assert_files_agree(data: Path, states: dict[str, State]) -> None:
    """After a clean stop the session files alone say the same, to one who reads them as the seed does."""
    files = {}
    for path in (data / "sessions").iterdir():
        assert path.suffix == ".jsonl", path
        loaded = read_session(path)
        assert loaded is not None, path
        assert loaded.key not in files, f"{path} and {files[loaded.key]}"
        files[loaded.key or path.stem] = loaded
    assert files.keys() == {key for key, state in states.items() if state is not None}
    for key, state in states.items():
        if state is not None:
            assert files[key].messages == [json.loads(line) for line in state[1]]
            assert files[key].metadata == json.loads(state[0].metadata)
            assert files[key].last_consolidated == state[0].last_consolidated


async def run_and_check(
    root: Path, seed: int, operations: int, power: bool, every: int = 1, kind: type[Cutter] = Cutter
) -> Sequence[str]:
    cutter = kind(root / "data", root / "copies", seed, power, every)
    (root / "copies").mkdir()
    await cutter.run(operations)
    outcomes = []
    for cut in cutter.cuts:
        try:
            outcomes.append(await check(cut))
        except BaseException as error:
            error.add_note(f"cut before step {cut.step}, {cut.kind}; under way: {cut.under_way}")
            raise
    return outcomes


class Interleaver(Cutter):
    """Runs a few operations at every pause of a round of maintenance, and cuts after each of them."""

    async def round(self, engine: JsonlEngine, writer: Writer, rng: random.Random) -> None:
        """A round that pauses before each of its steps."""
        loop = asyncio.get_running_loop()
        inside = threading.local()
        put = engine._committer.run

        def pause() -> None:
            if getattr(inside, "round", False) and rng.random() < 0.5:
                inside.round = False
                asyncio.run_coroutine_threadsafe(self._meanwhile(engine, writer, rng), loop).result()
                inside.round = True

        def run(task: Callable[[], object], **how: bool) -> object:
            pause()
            return put(task, **how)

        def work() -> None:
            inside.round = True
            engine._maintenance.round()

        self.disk.before = lambda *_: pause()
        engine._committer.run = run  # type: ignore[assignment,method-assign]
        try:
            await loop.run_in_executor(None, work)
        finally:
            engine._committer.run = put  # type: ignore[method-assign]
            self.disk.before = None

    async def _meanwhile(self, engine: JsonlEngine, writer: Writer, rng: random.Random) -> None:
        key = rng.choice(KEYS)
        for _ in range(rng.randrange(1, 4)):
            await self._operate(engine, writer, key)
        if rng.random() < 0.5:
            self._before(self.disk.steps, "a pause of the round", None)

    async def run(self, operations: int) -> Writer:
        """Run rounds, with operations before and within each."""
        engine = await open_jsonl(self.data, tuning=BY_HAND, disk=self.disk)
        self.disk.before = None
        writer = Writer(engine, KEYS, Histories(), self.seed, "client")
        await learn_adopted(engine, writer)
        self.acknowledged = {key: writer.histories.of(key)[-1] for key in KEYS}
        self.counting = True
        rng = random.Random(self.seed + 1)
        for number in range(10 * operations):
            if number >= operations and len(self.cuts) >= CUTS_MIN:
                break
            await self._operate(engine, writer, rng.choice(KEYS))
            await self.round(engine, writer, rng)
            self._before(self.disk.steps, "the end of the round", None)
        await engine.close()
        return writer


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
async def test_a_crash_at_every_disk_call_keeps_what_was_acknowledged(fast_path: Path, power: bool) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    outcomes = await run_and_check(fast_path, seed, operations=40, power=power, every=2)
    print(f"{len(outcomes)} cuts: {outcomes.count('happened')} happened")
    assert len(outcomes) >= CUTS_MIN


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
async def test_a_crash_after_changes_in_the_middle_of_a_checkpoint(fast_path: Path, power: bool) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    outcomes = await run_and_check(fast_path, seed, operations=12, power=power, kind=Interleaver)
    print(f"{len(outcomes)} cuts: {outcomes.count('happened')} happened")
    assert len(outcomes) >= CUTS_MIN


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Cutter, Interleaver])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power cut"])
async def test_many_crashes(fast_path: Path, kind: type[Cutter], power: bool) -> None:
    first = random.randrange(1 << 30)
    operations = 60 if kind is Cutter else 20
    for seed in range(first, first + 5):
        print(f"seed {seed}")
        root = fast_path / f"{seed}"
        root.mkdir()
        outcomes = await run_and_check(root, seed, operations, power, kind=kind)
        print(f"{len(outcomes)} cuts: {outcomes.count('happened')} happened")

"""The rung of zeroed pages: each page of journal.db, and each block and frame of its log, set to zeros.

A page of zeros has the right page checksum, and where it is the tail of a long row SQLite reads it as it is:
only the row's own checksum tells. So the rows of these stores are long: metadata of several pages, keys that
fill half a page, clients and request_ids whose remembered answers hold removed messages.

Each store is damaged at one place, with its files' times as they were, and checked, opened, read, listed, and
asked again what it answered before. The start may be refused by name, a session may answer DATA_LOSS by name,
or be served whole, or with its `damage` named. Anything else that is served is a loss; so is a call that is
applied twice, and damage that the check does not find. Then it is repaired, opened and read again.

As in `every_byte`, damage in the last commits of a log looks like the torn write of a commit that nobody was
answered: what these put into session files is set aside, and marks the session.
"""

import asyncio
import random
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from crash.by_hand import BY_HAND, opened, quiet, round_of
from crash.disks import QuickDisk
from crash.every_byte import JOURNAL, LOG, Store
from crash.memory import in_memory
from crash.parallel import shared_out
from crash.tally import Tally
from engines import done, one, read, request
from sessionstored.engine import Query, Refused, Slice, StartError
from sessionstored.engine.jsonl import JsonlEngine, answers, catalogue, journal, open_jsonl
from sessionstored.engine.jsonl.checking import Check
from sessionstored.engine.jsonl.findings import OF_THE_STORE, REPAIRABLE, Finding
from sessionstored.engine.jsonl.repairing import opened as opened_for_repair
from sessionstored.engine.jsonl.store import Directory, kept_unowned
from sessionstored.rules import DEFAULT_LIMITS, Answer, Append, Head, Pop, Refusal, Update

PAGE_BYTES = 4096
_FRAME_AT, _FRAME_BYTES = 32, 24 + PAGE_BYTES


def _message(name: str, size: int = 40) -> bytes:
    return b'{"role": "user", "content": "%s"}' % name.ljust(size, ".").encode()


def _metadata(name: str, size: int) -> bytes:
    return b'{"title": "%s"}' % name.ljust(size, ".").encode()


LONG = "long " * 120
CALLS = [request(Pop("popped"), n, answered_through=0) for n in range(1, 4)]
NAMED = [request(Pop("named"), request_id=f"{n} ".ljust(200, "x")) for n in range(3)]
LATE_CALL = request(Append("called", [_message("late call")]), 4)
LATE_NAMED = request(Append("called", [_message("late name")]), request_id="late")
ASKED_AGAIN = [CALLS[0], CALLS[-1], NAMED[0], NAMED[-1], LATE_CALL, LATE_NAMED]


async def _early(engine: JsonlEngine) -> None:
    await done(engine, Append("small", [_message("small")]))
    await done(engine, Append("k", [_message(f"k {n}") for n in range(5)]))
    await done(engine, Update("k", _metadata("k", 9000), last_consolidated=2))
    await done(engine, Append(LONG, [_message(f"long {n}", 40_000) for n in range(2)]))
    await done(engine, Update(LONG, _metadata("long", 4500)))
    for key, asked in (("popped", CALLS), ("named", NAMED)):
        await done(engine, Append(key, [_message(f"{key} {n}", 6000) for n in range(6)]))
        for each in asked:
            assert isinstance((await one(engine, each)).outcome, Answer)
    await done(engine, Append("called", [_message("first")]))


async def _late(engine: JsonlEngine) -> None:
    for each in (LATE_CALL, LATE_NAMED):
        assert isinstance((await one(engine, each)).outcome, Answer)
    for n in range(3):
        await done(engine, Append("k", [_message(f"late {n}", 5000)]))
        await done(engine, Append("small", [_message(f"late {n}")]))


async def make_clean(path: Path) -> Path:
    """A store that was stopped cleanly: all of it in the catalogue and in the windows."""
    async with opened(path, durability="fsync") as engine:
        await _early(engine)
        await _late(engine)
        await round_of(engine)
    return path


async def make_killed(path: Path) -> Path:
    """A store that was killed: the late changes are in the log, the last of them as messages only."""
    async with opened(path, durability="fsync") as engine:
        await _early(engine)
        await round_of(engine)
        assert engine._committer.run(engine._vault.journal.wal_checkpoint).result()
        await _late(engine)
        await quiet(engine)
        engine._committer.fail("killed")
    return path


MAKERS = {"clean": make_clean, "killed": make_killed}


@dataclass(frozen=True)
class Zeroed:
    """One place of one store, set to zeros."""

    store: str
    file: str
    begin: int
    end: int
    what: str

    @property
    def kind(self) -> str:
        return f"{self.store}, {self.what}"


def places(stores: dict[str, Store]) -> list[Zeroed]:
    """Every page of each database; of the log every page of the file, and the page in every frame."""
    found = []
    for name, store in stores.items():
        for begin in range(0, store.size(JOURNAL), PAGE_BYTES):
            found.append(Zeroed(name, JOURNAL, begin, begin + PAGE_BYTES, "a page of journal.db"))
    size = stores["killed"].size(LOG)
    for begin in range(0, size, PAGE_BYTES):
        found.append(Zeroed("killed", LOG, begin, min(begin + PAGE_BYTES, size), "a block of its log"))
    for begin in range(_FRAME_AT, size, _FRAME_BYTES):
        found.append(Zeroed("killed", LOG, begin + 24, begin + _FRAME_BYTES, "the page of a frame of it"))
    return found


async def _contents(
    engine: JsonlEngine, listed: Sequence[Head], served_only: bool
) -> dict[str, Slice | str]:
    """Every session as it is served, or, in words, why it is not, or that it is marked."""
    found: dict[str, Slice | str] = {}
    for head in listed:
        try:
            said = await read(engine, head.key)
            found[head.key] = f"marked: {said.head.damage}" if said.head.damage else said
        except Refused as refused:
            found[head.key] = _named(refused.refusal, head.key)
        except Exception:
            if not served_only:
                raise
            found[head.key] = "an error"
    return found


def _named(refusal: Refusal, key: str) -> str:
    """A refusal in words, if it is the one of damage, and names it."""
    assert refusal.reason == "DATA_LOSS", refusal
    assert refusal.metadata["key"] in (key, ""), refusal
    assert "journal.db" in refusal.message or "sessions/" in refusal.message, refusal
    return f"refused: {refusal.message}"


@dataclass
class Outcome:
    """What came of one damage."""

    start: str = ""
    """Why it was not started; empty if it was."""
    listed: Sequence[Head] = ()
    sessions: dict[str, Slice | str] = field(default_factory=dict)
    asked: Sequence[str] = ()
    """What came of each of ASKED_AGAIN: its first answer, "applied: " and another, or a refusal in words."""


async def _served(data: Path, served_only: bool = False) -> Outcome:
    """Open, read all, and ask again what was answered before. `served_only`: an error serves nothing."""
    try:
        engine = await open_jsonl(data, tuning=BY_HAND, disk=QuickDisk(), durability="os")
    except StartError as error:
        named = "journal.db" in str(error)
        return Outcome(f"{'' if named else 'wrong: refused without a name: '}{error}")
    try:
        listed: Sequence[Head] = ()
        try:
            listed = (await engine.list(Query())).heads
            found = await _contents(engine, listed, served_only)
        except Refused as refused:  # the listing
            found = {"": _named(refused.refusal, refused.refusal.metadata["key"])}
        asked = []
        for each in ASKED_AGAIN:
            reply = await one(engine, each)
            if isinstance(reply.outcome, Refusal):
                asked.append(_named(reply.outcome, each.mutation.key))
            else:
                asked.append(f"{'' if reply.replayed else 'applied: '}{reply.outcome}")
        return Outcome("", listed, found, asked)
    finally:
        await engine.close()


def _checked(data: Path) -> tuple[list[Finding], bool]:
    """What the check finds, and whether all is well."""
    check = Check(data)
    with kept_unowned(data):
        findings = list(check.findings())
    return findings, check.summary.well


def _repaired(data: Path, findings: list[Finding]) -> str:
    """Repair what can be repaired, as the command does."""
    if any(each.remedy in OF_THE_STORE for each in findings):
        return "left to the operator"
    plan = [each for each in findings if each.remedy in REPAIRABLE]
    if not plan:
        return "nothing to repair"
    directory = Directory(data, QuickDisk())
    try:
        with opened_for_repair(directory, DEFAULT_LIMITS, disk=QuickDisk()) as repairing:
            done = [repairing.mend(each) for each in plan if each.key]
        return "repaired" if all(each.mended for each in done) else f"not mended: {done}"
    finally:
        directory.close()


def judge(zeroed: Zeroed, outcome: Outcome, expected: Outcome, well: bool) -> str:
    """What came of it; begins with "wrong" if it is a loss."""
    if outcome.start.startswith("wrong"):
        return outcome.start
    if outcome.start:
        return "wrong: the check found nothing" if well else "start refused by name"
    named = "" in outcome.sessions  # the listing was refused
    for head in outcome.listed:
        if not head.damage and head not in expected.listed and head.key in expected.sessions:
            return f"wrong: listed as {str(head)[:300]}"
    for key, said in expected.sessions.items() if not named else ():
        served = outcome.sessions.get(key)
        if served is None or (not isinstance(served, str) and served != said):
            return f"wrong: {key[:20]!r} is served as {str(served)[:300]}"
        named |= isinstance(served, str)
    unknown = [key for key in outcome.sessions if key and key not in expected.sessions]
    if unknown:
        return f"wrong: sessions that nobody made: {unknown[:9]}"
    for each, came, first in zip(ASKED_AGAIN, outcome.asked, expected.asked, strict=True):
        lost = isinstance(outcome.sessions.get(each.mutation.key), str) and zeroed.file == LOG
        if came != first and not came.startswith("refused") and not lost:
            return f"wrong: the answer is {came[:300]} to {str(each)[:300]}"
        named |= came != first
    if named and well:
        return f"wrong: the check found nothing: {str(outcome)[:300]}"
    return "named" if named else "whole"


def run(root: Path, seed: int, times: int) -> Tally:
    """Zero so many places, of every kind equally many; with enough times, every one."""
    return shared_out(zero_often, root, seed, times)


def run_unchecked(root: Path, seed: int, times: int) -> Tally:
    """The same with the rows' checksums not looked at: this serves what was not written.

    Only that counts here: not what an error kept from being served.
    """
    with ExitStack() as off:
        for module in (answers, journal):
            off.enter_context(patch.object(module, "is_whole", lambda *_: True))
        off.enter_context(patch.object(catalogue, "_is_whole", lambda *_: True))
        return zero_often(root, seed, times, only=JOURNAL, served_only=True)


def zero_often(
    root: Path,
    seed: int,
    times: int,
    part: int = 0,
    parts: int = 1,
    *,
    only: str = "",
    served_only: bool = False,
) -> Tally:
    """One process's share of all places, or of one kind."""
    tally = Tally()
    rng = random.Random(seed)
    with in_memory(root) as memory:
        stores = {name: Store(asyncio.run(make(memory / name))) for name, make in MAKERS.items()}
        expected = {name: asyncio.run(_served(store.data)) for name, store in stores.items()}
        kinds: dict[str, list[Zeroed]] = {}
        for place in places(stores):
            if only in place.kind:
                kinds.setdefault(place.kind, []).append(place)
        for every in kinds.values():
            chosen = rng.sample(every, min(len(every), -(-times // len(kinds))))
            for n, zeroed in enumerate(chosen):
                if n % parts == part:
                    _one(stores[zeroed.store], zeroed, expected[zeroed.store], tally, served_only)
        for store in stores.values():
            store.close()
    return tally


def _one(store: Store, zeroed: Zeroed, expected: Outcome, tally: Tally, served_only: bool) -> None:
    try:
        came = _tried(store, zeroed, expected, served_only)
    except Exception:
        came = "an error" if served_only else f"wrong: {traceback.format_exc()}"
    tally.times += 1
    tally.acknowledged += sum(head.message_count for head in expected.listed)
    if came.startswith("wrong"):
        tally.lose("wrong", f"{zeroed}: {came}")
        came = "wrong"
    tally.phases[f"{zeroed.kind}: {came}"] += 1


def _tried(store: Store, zeroed: Zeroed, expected: Outcome, served_only: bool) -> str:
    store.restore()
    store.zero(zeroed.file, zeroed.begin, zeroed.end)
    findings, well = ([], False) if served_only else _checked(store.data)
    came = judge(zeroed, asyncio.run(_served(store.data, served_only)), expected, well)
    if came.startswith("wrong") or served_only:
        return came
    store.restore()
    store.zero(zeroed.file, zeroed.begin, zeroed.end)
    done = _repaired(store.data, findings)
    again = judge(zeroed, asyncio.run(_served(store.data)), expected, well)
    return again if again.startswith("wrong") else f"{came}; {done}"

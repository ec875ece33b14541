"""A full disk refuses and heals: nothing acknowledged is lost or doubled, deletions go on, no restart."""

import asyncio
import errno
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import apsw
import pytest
from crash.by_hand import BY_HAND, A, B, C, D, crashed, opened, quiet, round_of, says
from crash.disks import FullDisk
from crash.faults import Plan, failing_vfs
from engines import done, lines, one, read, request, submit
from seed_reader import read_session
from sessionstored.engine import Refused, Reply, Request, StartError
from sessionstored.engine.jsonl import JsonlEngine, open_jsonl
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Fork,
    Limits,
    Mutation,
    Outcome,
    Pop,
    Refusal,
    Replace,
    Update,
)

WITHOUT_RESERVE = replace(BY_HAND, reserve_bytes=0)


class Liar(FullDisk):
    """Its files are full, but it says that there is room: what the check before the commit cannot see."""

    def free_bytes(self, path: Path) -> int:
        return 1 << 40


async def outcome_of(engine: JsonlEngine, mutation: Mutation) -> Outcome:
    try:
        return (await submit(engine, mutation))[0]
    except Refused as refused:
        return refused.refusal


@pytest.mark.parametrize(
    "mutation",
    [
        Append("k", [D]), Create("new", [D]), Replace("k", 0, 1, [D]), Pop("k"), Update("k", b'{"a": 1}'),
        Fork("new", "k"),
    ],
    ids=lambda mutation: type(mutation).__name__,
)  # fmt: skip
async def test_a_full_disk_refuses_every_change_but_deletions(fast_path: Path, mutation: Mutation) -> None:
    disk = FullDisk()
    async with opened(fast_path, disk) as engine:
        await done(engine, Append("k", [A, B]))
        await done(engine, Append("other", [A]))
        await quiet(engine)
        disk.room = 100
        no = await outcome_of(engine, mutation)
        assert isinstance(no, Refusal)
        assert (no.reason, no.metadata["free_bytes"]) == ("STORAGE_FULL", "100")
        assert await lines(engine, "k") == [A, B]
        assert isinstance(await outcome_of(engine, Delete("other")), Answer)
        await quiet(engine)
        assert sorted(path.name for path in (fast_path / "sessions").iterdir()) == ["k.jsonl"]
        disk.room = None
        assert isinstance(await outcome_of(engine, mutation), Answer)


async def test_a_copy_of_an_applied_call_gets_its_answer_on_a_full_disk(fast_path: Path) -> None:
    disk = FullDisk()
    async with opened(fast_path, disk) as engine:
        asked = [request(Append("k", [A]), 1), request(Append("k", [B]), request_id="delivery")]
        first = [(await one(engine, each)).outcome for each in asked]
        disk.room = 0
        assert [await one(engine, each) for each in asked] == [Reply(outcome, True) for outcome in first]


@pytest.mark.parametrize("room", [0, 10, 70, 200])
async def test_files_that_stay_behind_are_served_and_heal(fast_path: Path, room: int) -> None:
    """The journal has room, the session files do not: a write comes short, then fails."""
    disk = Liar()
    async with opened(fast_path / "data", disk, tuning=WITHOUT_RESERVE) as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        disk.room = room
        await done(engine, Append("k", [B]))
        await done(engine, Append("new", [A, B]))
        await done(engine, Update("k", b'{"a": 1}'))
        await done(engine, Append("k", [C]))
        assert not await round_of(engine)
        assert disk.refused
        expected = {"k": [A, B, C], "new": [A, B]}
        copy = await crashed(engine, fast_path / "copy")
        assert {key: await lines(engine, key) for key in expected} == expected
        disk.room = None
        assert await round_of(engine)
        assert {key: await lines(engine, key) for key in expected} == expected
        for key, name in (("k", "k.jsonl"), ("new", "new.jsonl")):
            session = read_session(fast_path / "data" / "sessions" / name)
            assert session is not None
            assert len(session.messages) == len(expected[key])
    for data in (copy, fast_path / "data"):
        async with opened(data) as engine:
            for key, messages in expected.items():
                await says(engine, key, *messages)


@pytest.mark.parametrize("room", [0, 30])
async def test_a_rewrite_that_finds_no_room_is_tried_again(fast_path: Path, room: int) -> None:
    disk = Liar()
    async with opened(fast_path, disk, tuning=WITHOUT_RESERVE) as engine:
        await done(engine, Append("k", [A, B, C]))
        await round_of(engine)
        disk.room = room
        await done(engine, Replace("k", 0, 1, [D]))
        assert not await round_of(engine)
        await done(engine, Append("k", [A]))
        assert await lines(engine, "k") == [D, B, C, A]
        disk.room = None
        assert await round_of(engine)
        await says(engine, "k", D, B, C, A)
        assert [path.name for path in (fast_path / "sessions").iterdir()] == ["k.jsonl"]


async def test_a_session_that_is_behind_is_deleted_and_made_again(fast_path: Path) -> None:
    disk = Liar()
    async with opened(fast_path, disk, tuning=WITHOUT_RESERVE) as engine:
        disk.room = 20
        await done(engine, Append("k", [A]))
        await done(engine, Delete("k"))
        await done(engine, Append("k", [B]))
        disk.room = None
        await round_of(engine)
        await says(engine, "k", B)


@pytest.mark.parametrize("crash", [False, True])
async def test_messages_that_a_full_disk_cut_short_and_that_were_removed_do_not_come_back(
    fast_path: Path, crash: bool
) -> None:
    disk = Liar()
    async with opened(fast_path / "data", disk, tuning=WITHOUT_RESERVE) as engine:
        await done(engine, Append("k", [A]))
        assert await round_of(engine)
        disk.room = len(B) + 10
        await done(engine, Append("k", [B, C]))
        await quiet(engine)
        await done(engine, Replace("k", 1, None, []))
        disk.room = None
        assert await round_of(engine)
        copy = await crashed(engine, fast_path / "copy")
    data = copy if crash else fast_path / "data"
    async with opened(data) as engine:
        assert (await read(engine, "k")).head.damage == ""
        await says(engine, "k", A)
    assert not list((data / "quarantine").iterdir())


@pytest.mark.parametrize("room", [0, 20, 200])
async def test_a_deleted_session_of_which_a_part_was_written_does_not_come_back(
    fast_path: Path, room: int
) -> None:
    disk = Liar()
    async with opened(fast_path / "data", disk, tuning=WITHOUT_RESERVE) as engine:
        disk.room = room
        await done(engine, Append("k", [A, B]))
        await quiet(engine)
        copy_before = await crashed(engine, fast_path / "before")
        await done(engine, Delete("k"))
        copy = await crashed(engine, fast_path / "copy")
        shutil.copy(copy_before / "sessions" / "k.jsonl", copy / "sessions")
        disk.room = None
    for data in (fast_path / "data", copy):
        async with opened(data) as engine:
            assert not list((data / "sessions").iterdir())
            assert not list((data / "quarantine").iterdir())
            await says(engine, "k")


async def test_a_fork_that_is_sent_again_gets_its_answer_though_there_is_no_room_now(fast_path: Path) -> None:
    disk = Liar()
    async with opened(fast_path, disk) as engine:
        await done(engine, Append("k", [A]))
        first = await one(engine, request(Fork("f", "k"), 1))
        disk.room = 0
        again = await one(engine, request(Fork("f", "k"), 1))
        assert (again.outcome, again.replayed) == (first.outcome, True)


@pytest.mark.parametrize("mutation", [None, Append("k", [B]), Replace("k", 0, 1, [B]), Fork("f", "k")])
async def test_a_torn_line_that_finds_no_room_in_quarantine_is_no_failure(
    fast_path: Path, mutation: Mutation | None
) -> None:
    disk = Liar()
    async with opened(fast_path, disk) as engine:
        await done(engine, Append("k", [A]))
    async with opened(fast_path, disk) as engine:
        with (fast_path / "sessions" / "k.jsonl").open("ab") as file:
            file.write(b'{"torn')
        disk.room = 0
        if mutation is None:
            with pytest.raises(Refused) as refused:
                await lines(engine, "k")
            assert refused.value.refusal.reason == "STORAGE_FULL"
        else:
            no = await outcome_of(engine, mutation)
            assert isinstance(no, Refusal)
            assert no.reason == "STORAGE_FULL"
        disk.room = None
        await says(engine, "k", A)


async def test_the_engine_stops_on_a_full_disk_and_loses_nothing(fast_path: Path) -> None:
    disk = Liar()
    async with opened(fast_path, disk, tuning=WITHOUT_RESERVE) as engine:
        await done(engine, Append("k", [A]))
        await quiet(engine)
        disk.room = 5
        await done(engine, Append("k", [B]))
    async with opened(fast_path) as engine:
        await says(engine, "k", A, B)


async def test_the_engine_stops_though_the_journal_finds_no_room_and_loses_nothing(fast_path: Path) -> None:
    plan = Plan(at=1, error=apsw.FullError)
    with failing_vfs(plan) as vfs:
        async with opened(fast_path, vfs=vfs) as engine:
            await done(engine, Append("k", [A]))
            await quiet(engine)
            plan.armed = True
        plan.armed = False
        assert plan.failed
        assert not engine._failed.done(), "that would end the daemon with an error"
    async with opened(fast_path) as engine:
        await says(engine, "k", A)


async def test_what_the_journal_found_no_room_for_takes_no_place_among_the_request_ids(
    fast_path: Path,
) -> None:
    plan = Plan(at=1, error=apsw.FullError)
    limits = Limits(window_request_ids_max=3)
    with failing_vfs(plan) as vfs:
        async with opened(fast_path, vfs=vfs, limits=limits) as engine:
            first = await one(engine, request(Append("k", [A]), request_id="first"))
            plan.armed = True
            for _ in range(5):
                with pytest.raises(Refused) as refused:
                    await one(engine, request(Append("k", [B]), request_id="second"))
                assert refused.value.refusal.reason == "STORAGE_FULL"
            plan.armed = False
            again = await one(engine, request(Append("k", [A]), request_id="first"))
            assert (again.outcome, again.replayed) == (first.outcome, True)


async def test_a_disk_that_fails_while_it_is_full_is_a_failure_and_no_caller_waits_for_ever(
    fast_path: Path,
) -> None:
    class Failing(FullDisk):
        """Says once how much is free, and fails then."""

        asked = 0

        def free_bytes(self, path: Path) -> int:
            self.asked += self.room is not None
            if self.asked > 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return 0 if self.room is not None else super().free_bytes(path)

    disk = Failing()
    engine = await open_jsonl(fast_path, tuning=BY_HAND, disk=disk)
    await done(engine, Append("k", [A]))
    await quiet(engine)
    disk.room = 0
    with pytest.raises(Refused) as refused:
        await asyncio.wait_for(engine.submit([Request(Append("k", [B]))]), 60)
    assert refused.value.refusal.reason in ("OUTCOME_UNKNOWN", "SHUTTING_DOWN")
    assert await asyncio.wait_for(engine.failed(), 60)
    await asyncio.wait_for(engine.close(), 60)


async def test_the_reserve_is_kept(fast_path: Path) -> None:
    class Small(FullDisk):
        def free_bytes(self, path: Path) -> int:
            return 1000

    async with opened(fast_path, Small(), tuning=replace(BY_HAND, reserve_bytes=1000)) as engine:
        no = await outcome_of(engine, Append("k", [A]))
        assert isinstance(no, Refusal)
        assert no.metadata == {"free_bytes": "1000", "reserve_bytes": "1000"}
        assert await engine.count() == 0


async def test_many_refused_creations_leave_nothing_behind(fast_path: Path) -> None:
    disk = FullDisk()
    async with opened(fast_path, disk) as engine:
        disk.room = 0
        for _ in range(20):
            assert isinstance(await outcome_of(engine, Create("k", [A])), Refusal)
            assert isinstance(await outcome_of(engine, Append("l", [A])), Refusal)
        disk.room = None
        await done(engine, Create("k", [A]))
        await quiet(engine)
        assert [path.name for path in (fast_path / "sessions").iterdir()] == ["k.jsonl"]


async def test_storage_that_is_full_at_the_start_is_named(fast_path: Path) -> None:
    (fast_path / "sessions").mkdir()
    (fast_path / "sessions" / "torn.jsonl").write_bytes(A + b'\n{"torn')
    disk = FullDisk()
    disk.room = 0
    # A torn line finds no room in quarantine. Without its file, the session would be taken for a new one.
    with pytest.raises(StartError, match=r"disk of .* is full: make room"):
        await open_jsonl(fast_path, tuning=BY_HAND, disk=disk)
    async with opened(fast_path) as engine:
        assert await lines(engine, "torn") == [A]


async def test_a_storm_of_writers_through_a_disk_that_fills_and_empties(fast_path: Path) -> None:
    """What is acknowledged is stored once, what is refused is not, in one order per writer."""
    disk = FullDisk()
    acknowledged: list[bytes] = []
    refused: list[bytes] = []
    fast = replace(BY_HAND, checkpoint_interval_s=0.01, reserve_bytes=0)

    async def write(engine: JsonlEngine, name: str) -> None:
        for n in range(120):
            line = b'{"w": "%s", "n": %d}' % (name.encode(), n)
            outcome = await outcome_of(engine, Append("k", [line]))
            (acknowledged if isinstance(outcome, Answer) else refused).append(line)
            if isinstance(outcome, Refusal):
                assert outcome.reason == "STORAGE_FULL"
                await asyncio.sleep(0.001)

    async def fill(stop: Callable[[], bool]) -> None:
        for answers, room in itertools.cycle(((refused, 700), (acknowledged, None))):
            disk.room, before = room, len(answers)
            while len(answers) == before and not stop():
                await asyncio.sleep(0.001)
            if stop():
                return

    async with opened(fast_path, disk, tuning=fast) as engine:
        writers = asyncio.gather(*(write(engine, f"w{n}") for n in range(3)))
        await asyncio.gather(fill(writers.done), writers)
        disk.room = None
        stored = await lines(engine, "k")
    assert sorted(stored) == sorted(acknowledged)
    assert refused
    async with opened(fast_path) as engine:
        assert await lines(engine, "k") == stored
        assert (await read(engine, "k")).head.message_count == len(stored)


async def test_a_directory_that_cannot_be_used_is_named(fast_path: Path) -> None:
    (fast_path / "file").write_bytes(b"")
    with pytest.raises(StartError, match=str(fast_path / "file")):
        await open_jsonl(fast_path / "file")
    with pytest.raises(StartError, match=str(fast_path / "file")):
        await open_jsonl(fast_path / "file" / "below")



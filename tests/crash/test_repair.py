"""`sessionstored repair`: what can be read is served again, and no byte is lost, wherever the repair ends."""

import asyncio
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.by_hand import A, B, C, crashed, opened, refusal, revision, round_of, says
from crash.directories import check, everything, rot, verdicts
from crash.disks import FullDisk, PowerDisk, WatchedDisk, copy_of, power_cut_copy_of
from crash.faults import Plan, failing_vfs
from crash.test_edited_files import X, add, edit, file_of
from crash.workspaces import BAD, EXPECTED, TORN, copy_workspace, quarantined, raw_messages
from engines import done, lines, one, read
from seed_reader import read_session
from sessionstored.engine import Request, StartError
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.findings import REPAIRABLE, Finding, Remedy, Verdict
from sessionstored.engine.jsonl.repairing import Done, RepairFailed
from sessionstored.engine.jsonl.repairing import opened as opened_for_repair
from sessionstored.engine.jsonl.store import Directory
from sessionstored.leases import Acquire, Granted
from sessionstored.rules import Answer, Append, Limits, Update

N = 300
LONG = [b'{"n": %d, "text": "%s"}' % (n, b"x" * 900) for n in range(N)]


def mend(
    data: Path,
    plan: list[Finding] | None = None,
    disk: Disk | None = None,
    vfs: str | None = None,
    **how: bool,
) -> list[Done]:
    """Repair everything that a check finds, or what it found before."""
    if plan is None:
        plan = [each for each in check(data)[0] if each.remedy in REPAIRABLE]
    directory = Directory(data, disk or Disk())
    try:
        with opened_for_repair(directory, Limits(), disk=disk, vfs=vfs) as repair:
            return [repair.mend(each, **how) for each in plan if each.key]
    finally:
        directory.close()


async def mended(data: Path, **how: bool) -> list[Done]:
    return await asyncio.to_thread(lambda: mend(data, **how))


@pytest.fixture
async def clean(fast_path: Path) -> Path:
    """A directory after a clean stop: k = A, B, the first of them summarised; other = C."""
    async with opened(fast_path / "data") as engine:
        await done(engine, Append("k", [A, B]))
        await done(engine, Update("k", metadata=b'{"title": "t"}', last_consolidated=1))
        await done(engine, Append("other", [C]))
    return fast_path / "data"


@pytest.fixture
async def killed(fast_path: Path) -> Path:
    """A directory after kill -9: C waits for k."""
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A, B]))
        await round_of(engine)
        await done(engine, Append("k", [C]))
        return await crashed(engine, fast_path / "data")


def seed_reads(data: Path, key: str) -> int:
    """How many messages the seed's loader finds."""
    session = read_session(file_of(data, key))
    assert session is not None
    return len(session.messages)


async def test_a_whole_store_is_left_as_it_is(clean: Path) -> None:
    assert await mended(clean) == []
    assert verdicts(clean) == {}


async def test_the_workspace_of_the_field_is_served_whole(fast_path: Path) -> None:
    data = copy_workspace(fast_path / "data")
    before = {name: (data / "sessions" / name).read_bytes() for name in (BAD, *TORN)}
    assert all(each.mended for each in await mended(data))
    assert set(before.values()) <= set(quarantined(data))
    assert {key: verdict for key, (verdict, _) in verdicts(data).items()} == {
        str(EXPECTED[name]["key"]): Verdict.MARKED for name in before
    }
    async with opened(data) as engine:
        for name, expected in EXPECTED.items():
            key = str(expected["key"])
            slice = await read(engine, key)
            assert slice.head.message_count == expected["messages"], name
            assert ("repaired" in slice.head.damage) == (name in before)
            if name in before:
                assert list(slice.lines) == [line for line in raw_messages(data / "sessions" / name)]
                assert seed_reads(data, key) == expected["messages"]
    assert all(each.mended for each in await mended(data))  # again: the marks go
    assert verdicts(data) == {}
    assert set(before.values()) <= set(quarantined(data))


async def test_only_what_may_have_rotted_goes(fast_path: Path) -> None:
    data = fast_path / "data"
    async with opened(data) as engine:
        await done(engine, Append("k", LONG))
        await done(engine, Update("k", metadata=b'{"title": "t"}', last_consolidated=200))
        before = (await read(engine, "k")).head
    rot(file_of(data), b'"n": 100', b'"n": 900')
    rotten = file_of(data).read_bytes()
    ((finding,), _) = check(data)
    (report,) = await mended(data)
    assert report.mended
    assert "did not match their checksum" in report.what
    assert rotten in quarantined(data)
    async with opened(data) as engine:
        slice = await read(engine, "k")
        head = slice.head
        first = next(n for n in range(N) if slice.lines[n] != LONG[n])
        assert list(slice.lines) == LONG[:first] + LONG[first + finding.suspect :]
        assert first <= 100 < first + finding.suspect
        assert head.last_consolidated == 200 - finding.suspect
        assert (head.metadata, head.create_time_us) == (before.metadata, before.create_time_us)
        assert head.revision == head.rewrite_revision > before.revision
        assert "bytes 65536 to 131072" in head.damage
        assert head.update_time_us >= before.update_time_us
        await done(engine, Append("k", [C]))
    assert seed_reads(data, "k") == N - finding.suspect + 1


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_what_the_daemon_met_first_is_mended_alike(fast_path: Path, killed: bool) -> None:
    """A session that it condemned for a wrong block: what stands there is to be believed no more."""
    data = fast_path / "data"
    async with opened(data) as engine:
        await done(engine, Append("k", LONG))
        await round_of(engine)
        await done(engine, Append("k", [C]))
        if killed:
            data = await crashed(engine, fast_path / "killed")
    rot(data / "sessions" / "k.jsonl", b'"n": 100', b'"n": 900')
    async with opened(data) as engine:
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
    found, _ = check(data)
    assert found[0].remedy is Remedy.MEND
    (report,) = await mended(data)
    assert report.mended
    async with opened(data) as engine:
        slice = await read(engine, "k")
        assert len(slice.lines) == N + 1 - found[0].suspect
        assert not [line for line in slice.lines if line not in [*LONG, C]]
        assert slice.lines[-1] == C
        assert "repaired" in slice.head.damage
        assert ("waited" in slice.head.damage) == killed


@pytest.mark.parametrize("consolidated", [0, 50, 100, 150, N])
async def test_nothing_is_taken_for_summarised_that_may_not_be(fast_path: Path, consolidated: int) -> None:
    data = fast_path / "data"
    async with opened(data) as engine:
        await done(engine, Append("k", LONG))
        await done(engine, Update("k", last_consolidated=consolidated))
    rot(file_of(data), b'}\n{"n": 100', b'} {"n": 100')  # two messages became one line
    await mended(data)
    async with opened(data) as engine:
        slice = await read(engine, "k")
        open_ones = [line for line in LONG[consolidated:] if line in slice.lines]
        assert list(slice.lines)[slice.head.last_consolidated :] == open_ones


async def test_what_can_be_read_may_be_kept_on_demand(clean: Path) -> None:
    rot(file_of(clean), b'"a"', b'"x"')
    await mended(clean, keep_suspect=True)
    async with opened(clean) as engine:
        slice = await read(engine, "k")
        assert list(slice.lines) == [A.replace(b'"a"', b'"x"'), B]
        assert "what could be read of it was kept" in slice.head.damage
        assert slice.head.last_consolidated == 1
    assert seed_reads(clean, "k") == 2


async def test_the_header_comes_from_the_catalogue(clean: Path) -> None:
    rot(file_of(clean), b'"title": "t"', b'"title": "x"')
    await mended(clean, keep_suspect=True)
    async with opened(clean) as engine:
        assert (await read(engine, "k")).head.metadata == b'{"title": "t"}'
    session = read_session(file_of(clean))
    assert session is not None
    assert (session.metadata, session.last_consolidated) == ({"title": "t"}, 1)


async def test_a_missing_file_takes_its_session_with_it_once_that_is_agreed(clean: Path) -> None:
    file_of(clean).unlink()
    (report,) = await mended(clean)
    assert "removed" in report.what
    assert verdicts(clean) == {}
    async with opened(clean) as engine:
        assert await engine.count() == 1
        await says(engine, "k")


async def test_a_missing_file_takes_its_session_with_it_although_somebody_has_its_lease(clean: Path) -> None:
    async with opened(clean) as engine:
        lease = (await one(engine, Request(Acquire("k", "holder", 60.0)))).outcome
        assert isinstance(lease, Granted)
    file_of(clean).unlink()
    (report,) = await mended(clean)
    assert (report.mended, "removed" in report.what) == (True, True), report
    async with opened(clean) as engine:
        assert await engine.count() == 1
        write = Request(Append("k", [C]), fencing_token=lease.lease.token)
        assert isinstance((await one(engine, write)).outcome, Answer), "the lease goes on"


@pytest.mark.parametrize("how", ["edited", "torn", "shorter", "missing", "added"])
async def test_what_somebody_did_while_changes_waited_is_taken(killed: Path, how: str) -> None:
    path = file_of(killed)
    match how:
        case "edited":
            edit(path, A, X)
        case "torn":
            edit(path, A, X[:9])
        case "shorter":
            os.truncate(path, path.stat().st_size - len(B) - len(C) - 2)
        case "missing":
            path.unlink()
        case "added":
            add(path, X)
    expected = {"edited": [X, B, C], "torn": [B, C], "shorter": [A], "missing": [], "added": [A, B, C]}[how]
    left = path.read_bytes() if how == "torn" else b""
    (report,) = await mended(killed)
    assert report.mended
    assert any((X if how == "added" else C) in aside for aside in quarantined(killed))
    assert left in (b"", *quarantined(killed))
    if expected:
        found, _ = check(killed)
        assert next(each.verdict for each in found) is Verdict.MARKED
        assert seed_reads(killed, "k") == len(expected)
    async with opened(killed) as engine:
        await says(engine, "k", *expected)


async def test_an_emptied_file_is_served_empty_only_after_consent(clean: Path) -> None:
    os.truncate(file_of(clean), 0)
    async with opened(clean) as engine:
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
    await mended(clean)
    async with opened(clean) as engine:
        slice = await read(engine, "k")
        assert (list(slice.lines), slice.head.last_consolidated) == ([], 0)
        assert "shortened the file from 2 to 0 messages" in slice.head.damage


async def test_an_edit_that_shortened_a_file_is_marked_and_then_accepted(clean: Path) -> None:
    edit(file_of(clean), A + b"\n", b"")
    for expected in (Verdict.MARKED, Verdict.OK):
        await mended(clean)
        found, _ = check(clean)
        assert next(each.verdict for each in found if each.key == "k") is expected
    async with opened(clean) as engine:
        await says(engine, "k", B)


async def test_two_claims_are_for_a_person(clean: Path) -> None:
    (clean / "sessions" / "zz.jsonl").write_bytes(file_of(clean).read_bytes())
    before = {name: content for name, (content, *_) in everything(clean / "sessions").items()}
    assert await mended(clean) == []
    assert {name: content for name, (content, *_) in everything(clean / "sessions").items()} == before
    assert verdicts(clean)["k"] == (Verdict.DAMAGED, Remedy.HAND)


async def test_what_changed_since_the_check_is_left_alone(clean: Path) -> None:
    path = file_of(clean)
    away = path.rename(clean / "away")
    plan = [each for each in check(clean)[0] if each.remedy is Remedy.REMOVE]
    away.rename(path)
    (report,) = await asyncio.to_thread(lambda: mend(clean, plan))
    assert (report.mended, "repair again" in report.what) == (False, True)
    async with opened(clean) as engine:
        await says(engine, "k", A, B)


async def test_a_full_disk_leaves_everything_as_it_was_until_there_is_room(clean: Path) -> None:
    rot(file_of(clean), b'"a"', b'"x"')
    rotten = file_of(clean).read_bytes()
    plan = [each for each in check(clean)[0] if each.remedy in REPAIRABLE]
    said: set[str] = set()
    for room in range(0, 10_000, 50):
        disk = FullDisk()
        disk.room = room
        try:
            (report,) = await asyncio.to_thread(lambda disk=disk: mend(clean, plan, disk))
        except StartError as full:
            said.add(str(full).partition(": ")[2])
            continue
        if report.mended:
            break
        said.add(report.what)
        assert file_of(clean).read_bytes() == rotten
        assert verdicts(clean)["k"] == (Verdict.DAMAGED, Remedy.MEND)
    assert said == {
        "make room, then start again",
        "the disk is full: make room, and repair again",
    }
    assert quarantined(clean) == [rotten]


async def test_damage_of_the_journal_itself_is_not_touched(killed: Path) -> None:
    content = bytearray((killed / "journal.db").read_bytes())
    content[100:200] = bytes(100)
    (killed / "journal.db").write_bytes(content)
    assert [each.remedy for each in check(killed)[0] if not each.key] == [Remedy.AWAY]
    with pytest.raises(StartError, match="restore it from a backup"):
        mend(killed, [])


# Ended anywhere.


Damage = Callable[[Path], None]


def rot_k(data: Path) -> None:
    rot(data / "sessions" / "k.jsonl", b'"a"', b'"x"')


def break_line(data: Path) -> None:
    edit(data / "sessions" / "k.jsonl", A, A[:-1])


def remove(data: Path) -> None:
    (data / "sessions" / "k.jsonl").unlink()


def tear(data: Path) -> None:
    with (data / "sessions" / "k.jsonl").open("ab") as file:
        file.write(X[:9])


# What the session holds in the end.
REWRITTEN: list[tuple[Damage, list[bytes]]] = [(rot_k, []), (break_line, [B]), (tear, [A, B])]


def failing_disk(plan: Plan) -> Disk:
    """Session files, quarantine and STORE fail as the journal does."""

    def before(_: int, kind: str, __: Path | int) -> None:
        if plan.step(f"file {kind}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return WatchedDisk(before)


async def damaged(clean: Path, damage: Damage) -> bytes:
    """Damage k; returns its bytes then."""
    damage(clean)
    path = clean / "sessions" / "k.jsonl"
    return path.read_bytes() if path.exists() else b""


async def ends_well(data: Path, original: bytes, expected: list[bytes], gone: bool) -> None:
    """A directory in which a repair was cut: every byte is there; repaired again, all is well."""
    path = data / "sessions" / "k.jsonl"
    kept = [*quarantined(data), path.read_bytes() if path.exists() else b""]
    assert original in kept, "the damaged file is whole, in its place or in quarantine"
    for _ in range(2):
        mend(data)
    assert verdicts(data) == {}
    assert gone or original in quarantined(data)
    if not gone:
        assert seed_reads(data, "k") == len(expected)


@pytest.mark.parametrize("power", [False, True], ids=["kill -9", "power cut"])
@pytest.mark.parametrize(("damage", "expected"), REWRITTEN)
async def test_a_repair_that_is_cut_at_any_step_is_begun_again(
    clean: Path, fast_path: Path, damage: Damage, expected: list[bytes], power: bool
) -> None:
    original = await damaged(clean, damage)
    copies: list[Path] = []

    def before(step: int, kind: str, target: object) -> None:
        to = fast_path / f"{step} {kind}"
        copies.append(power_cut_copy_of(clean, to, disk) if power else copy_of(clean, to))

    disk = PowerDisk(clean / "sessions", before)
    plan = [each for each in check(clean)[0] if each.remedy in REPAIRABLE]
    assert all(each.mended for each in mend(clean, plan, disk))
    assert len(copies) >= 10, [copy.name for copy in copies]
    for copy in copies:
        try:
            await ends_well(copy, original, expected, gone=False)
            async with opened(copy) as engine:
                assert await lines(engine, "k") == expected
                await done(engine, Append("k", [C]))
                assert await lines(engine, "k") == [*expected, C]
        except BaseException as error:
            error.add_note(copy.name)
            raise
        shutil.rmtree(copy)


@pytest.mark.parametrize(("damage", "expected"), [*REWRITTEN, (remove, [])])
async def test_a_repair_whose_disk_fails_at_any_step_is_begun_again(
    clean: Path, fast_path: Path, damage: Damage, expected: list[bytes]
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    original = await damaged(clean, damage)
    at = 1
    while True:
        data = copy_of(clean, fast_path / f"at {at}")
        plan = [each for each in check(data)[0] if each.remedy in REPAIRABLE]
        failing = Plan(at, once=(at + seed) % 2 == 0, armed=True)
        reported: list[Done] = []
        try:
            with failing_vfs(failing) as vfs:
                reported = mend(data, plan, failing_disk(failing), vfs)
        except (RepairFailed, StartError, OSError):
            assert failing.failed
        if not failing.failed:
            break
        try:
            await ends_well(data, original, expected, damage is remove)
        except BaseException as error:
            error.add_note(f"step {at}, {failing.failed}")
            raise
        shutil.rmtree(data)
        at += 1
    assert all(each.mended for each in reported)
    print(f"{at - 1} steps")
    assert at > 10


async def test_a_repaired_session_goes_on_with_higher_revisions(clean: Path) -> None:
    async with opened(clean) as engine:
        before = await revision(engine, "k")
    rot_k(clean)
    await mended(clean)
    async with opened(clean) as engine:
        after = await revision(engine, "k")
        assert after > before
        answer = await done(engine, Append("k", [C]))
        assert (answer.previous_revision, answer.first_index) == (after, 0)

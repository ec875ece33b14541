"""`sessionstored check`: what is wrong with a directory is found and named, and nothing is changed."""

import os
import shutil
from pathlib import Path

import pytest
from crash.by_hand import A, B, C, D, crashed, opened, round_of
from crash.directories import check, everything, rot, verdicts
from crash.disks import PASSED, WatchedDisk, copy_of, journal_of
from crash.small_disks import cannot_mount, tmpfs
from crash.test_damaged_journal import LOG, crashed_with_commits, flip, frame
from crash.test_edited_files import X, add, edit, file_of
from crash.workspaces import BAD, EXPECTED, TORN, copy_workspace
from engines import done, lines
from sessionstored.engine import StartError
from sessionstored.engine.jsonl.checking import Check
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.findings import Finding, Remedy, Verdict
from sessionstored.engine.jsonl.store import Directory, kept_unowned
from sessionstored.rules import Append, Delete, Pop, Update

DAMAGED, EDITED, MARKED, NEW, OK, WAITING = (
    Verdict.DAMAGED,
    Verdict.EDITED,
    Verdict.MARKED,
    Verdict.NEW,
    Verdict.OK,
    Verdict.WAITING,
)


@pytest.fixture
async def clean(fast_path: Path) -> Path:
    """A directory after a clean stop: k = A, B; other = C."""
    async with opened(fast_path / "data") as engine:
        await done(engine, Append("k", [A, B]))
        await done(engine, Append("other", [C]))
    return fast_path / "data"


@pytest.fixture
async def killed(fast_path: Path) -> Path:
    """A directory after kill -9: C waits for k, `other` is deleted, `new` has no catalogue row."""
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A, B]))
        await done(engine, Append("other", [C]))
        await round_of(engine)
        await done(engine, Append("k", [C]))
        await done(engine, Delete("other"))
        await done(engine, Append("new", [D]))
        await done(engine, Pop("new"))
        return await crashed(engine, fast_path / "data")


async def test_all_is_well_after_a_clean_stop(clean: Path) -> None:
    found, summary = check(clean)
    assert {each.key: each.verdict for each in found} == {"k": OK, "other": OK}
    assert (summary.well, summary.messages, summary.changes_waiting) == (True, 3, 0)
    assert summary.store_id


async def test_what_waits_in_the_journal_is_well(killed: Path) -> None:
    found, summary = check(killed)
    assert {each.key: (each.verdict, each.kept) for each in found} == {
        "k": (WAITING, 3),
        "other": (WAITING, 0),
        "new": (WAITING, 0),
    }
    assert (summary.well, summary.changes_waiting, summary.deletions_waiting) == (True, 4, 1)


async def test_it_reads_a_running_store_only_if_nobody_owns_it(clean: Path, fast_path: Path) -> None:
    owner = Directory(clean, Disk())
    owner.announce(["unix:/run/x"])
    before = everything(clean)
    with pytest.raises(StartError, match=f"process {os.getpid()}, unix:/run/x"), kept_unowned(clean):
        pass
    assert everything(clean) == before
    owner.close()
    with kept_unowned(clean), kept_unowned(clean), pytest.raises(StartError, match="a check"):
        Directory(clean, Disk())
    with kept_unowned(fast_path):  # no LOCK, nobody
        pass


@pytest.mark.skipif(bool(cannot_mount()), reason=cannot_mount())
async def test_a_temporary_directory_without_room_is_no_damage(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    copied = sum((killed / name).stat().st_size for name in ("journal.db", LOG)) // 1024
    for room_kib in range(copied - 8, copied + 96, 8):
        with tmpfs(tmp_path / f"{room_kib} KiB", room_kib) as small:
            monkeypatch.setattr("tempfile.tempdir", str(small))
            try:
                found, _ = check(killed)
            except StartError as error:
                seen.add(f"the temporary directory {small} has no room for a copy" in str(error))
            else:
                assert not [each for each in found if each.verdict is DAMAGED], room_kib
                seen.add("checked")
    assert seen == {True, "checked"}


async def test_a_directory_that_is_no_store_is_refused(fast_path: Path) -> None:
    with pytest.raises(StartError, match="no store and no workspace"):
        list(Check(fast_path).findings())


async def test_a_store_of_a_newer_format_is_not_judged(clean: Path) -> None:
    text = (clean / "STORE").read_text()
    (clean / "STORE").write_text(text.replace('"oldest_reader": 1', '"oldest_reader": 2'))
    with pytest.raises(StartError, match="use a newer sessionstored"):
        list(Check(clean).findings())


def test_a_workspace_of_plain_files_is_read_through(tmp_path: Path) -> None:
    found, summary = check(copy_workspace(tmp_path))
    by_file = {each.file.removeprefix("sessions/"): each for each in found}
    assert by_file.keys() == EXPECTED.keys()
    for name, each in by_file.items():
        assert each.key == EXPECTED[name]["key"]
        assert each.kept == EXPECTED[name]["messages"], name
        assert each.verdict == (DAMAGED if name in (BAD, *TORN) else NEW), name
    assert by_file[BAD].line == 5
    assert "torn" in by_file[TORN[0]].detail
    assert not summary.well
    assert (summary.store_id, summary.left_alone) == ("", 1)


# Files.


@pytest.mark.parametrize(("old", "new"), [(b'"a"', b'"x"'), (b'"a"', b'"a}'), (A, b"\0" * len(A))])
async def test_bytes_that_rotted_are_named(clean: Path, old: bytes, new: bytes) -> None:
    rot(file_of(clean), old, new)
    found, summary = check(clean)
    (damaged,) = [each for each in found if each.verdict is not OK]
    assert (damaged.key, damaged.verdict, damaged.remedy) == ("k", DAMAGED, Remedy.MEND)
    assert "bytes 0 to 65536 do not match their checksum" in damaged.detail
    assert damaged.suspect + damaged.lost == 2
    assert not summary.well


async def test_only_the_blocks_that_rotted_are_suspect(fast_path: Path) -> None:
    async with opened(fast_path / "data") as engine:
        await done(engine, Append("k", [b'{"n": %d, "text": "%s"}' % (n, b"x" * 900) for n in range(200)]))
    rot(file_of(fast_path / "data"), b'"n": 100', b'"n": 900')
    ((damaged,), _) = check(fast_path / "data")
    assert "bytes 65536 to 131072 do not" in damaged.detail
    assert 65 <= damaged.suspect <= 75
    assert damaged.kept == 200 - damaged.suspect


async def test_what_became_of_a_clean_file(clean: Path) -> None:
    original = file_of(clean).read_bytes()
    path = clean / "sessions" / "k.jsonl"

    def becomes(content: bytes | None, *expected: object) -> None:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert verdicts(clean).get("k", ()) == expected, content

    becomes(original.replace(A, X), EDITED, Remedy.NONE)
    becomes(original, EDITED, Remedy.NONE)  # another inode
    becomes(original + X[:9], DAMAGED, Remedy.MEND)
    becomes(original.replace(A, A[:-1]), DAMAGED, Remedy.MEND)
    becomes(original.replace(A + b"\n", b""), DAMAGED, Remedy.OPEN)
    becomes(b"", DAMAGED, Remedy.TAKE)
    becomes(original.replace(b'"key": "k"', b'"key": "y"'), DAMAGED, Remedy.HAND)
    becomes(None, DAMAGED, Remedy.REMOVE)
    path.symlink_to(clean / "STORE")
    assert verdicts(clean) == {"k": (DAMAGED, Remedy.HAND)}


async def test_files_that_nobody_knows(clean: Path) -> None:
    sessions = clean / "sessions"
    (sessions / "healthy.jsonl").write_bytes(A + b"\n")
    (sessions / "torn.jsonl").write_bytes(A + b"\n" + B[:9])
    (sessions / "bad.jsonl").write_bytes(A[:9] + b"\n" + B)
    (sessions / "%FF.jsonl").write_bytes(A)
    (sessions / os.fsdecode(b"\xff.jsonl")).write_bytes(A)
    (sessions / ".k.jsonl.7.tmp").write_bytes(A)
    (sessions / "notes.txt").write_bytes(A)
    found, summary = check(clean)
    assert {each.key: (each.verdict, each.line) for each in found if each.verdict is not OK} == {
        "healthy": (NEW, 0),
        "torn": (DAMAGED, 0),
        "bad": (DAMAGED, 1),
    }
    assert (summary.temporary_files, summary.left_alone, summary.not_served) == (1, 3, 1)


async def test_two_files_that_claim_one_key_are_both_named(clean: Path) -> None:
    (clean / "sessions" / "zz.jsonl").write_bytes(file_of(clean).read_bytes())
    found, summary = check(clean)
    claim = next(each for each in found if each.verdict is DAMAGED)
    assert claim.key == "k"
    assert claim.remedy is Remedy.HAND
    assert "sessions/k.jsonl and sessions/zz.jsonl claim this key" in claim.detail
    assert summary.not_served == 1


async def test_a_renamed_file_is_no_damage(clean: Path) -> None:
    file_of(clean).rename(clean / "sessions" / "another name.jsonl")
    assert verdicts(clean) == {"k": (EDITED, Remedy.NONE)}


@pytest.mark.parametrize("how", ["edited", "shorter", "missing", "added", "rotted"])
async def test_what_became_of_a_file_while_changes_waited(killed: Path, how: str) -> None:
    path = file_of(killed)
    match how:
        case "edited":
            edit(path, A, X)
        case "shorter":
            os.truncate(path, path.stat().st_size - len(B) - len(C) - 2)
        case "missing":
            path.unlink()
        case "added":
            add(path, X)
        case "rotted":
            rot(path, b'"a"', b'"x"')
    others = {"missing": Remedy.REMOVE, "added": Remedy.OPEN, "rotted": Remedy.MEND}
    remedy = others.get(how, Remedy.TAKE)
    assert verdicts(killed)["k"] == (DAMAGED, remedy)
    async with opened(killed):
        pass
    assert verdicts(killed)["k"] == ((MARKED, Remedy.CLEAR) if how == "added" else (DAMAGED, remedy))
    found, _ = check(killed)
    detail = next(each.detail for each in found if each.key == "k")
    assert "quarantine/k.jsonl." in detail


async def test_every_copy_of_a_run_at_any_step_is_well(fast_path: Path) -> None:
    """Neither unfinished renames nor appends that are under way are taken for damage."""
    data, copies = fast_path / "data", []

    def before(step: int, kind: str, target: object) -> None:
        copies.append(copy_of(data, fast_path / f"{step} {kind}"))

    disk = WatchedDisk()
    async with opened(data, disk) as engine:
        await done(engine, Append("k", [A, B]))
        await round_of(engine)
        disk.before = before
        await done(engine, Append("k", [C]))
        await done(engine, Pop("k"))
        await done(engine, Update("k", b'{"a": 1}'))
        await done(engine, Pop("k"))
        await round_of(engine)
        await done(engine, Append("k", [D]))
        await done(engine, Delete("k"))
        await done(engine, Append("k", [D]))
        await round_of(engine)
        disk.before = None
    assert len(copies) > 12
    for copy in copies:
        found, summary = check(copy)
        assert summary.well, (copy.name, found)
        shutil.rmtree(copy)


# The store itself.


async def follow(found: list[Finding], data: Path) -> None:
    """Do what helps without a backup, and see that the store is served again."""
    for each in found:
        if each.remedy is Remedy.AWAY:
            for path in data.glob(f"{each.file}*"):
                path.rename(data.parent / path.name)
    async with opened(data, accept_loss=True) as engine:
        assert await lines(engine, "k") == [A, B]


async def test_a_damaged_row_is_named(killed: Path) -> None:
    with journal_of(killed) as db:
        (row,) = db.execute(f"SELECT id, body FROM journal WHERE id > {PASSED} LIMIT 1")
        db.execute("UPDATE journal SET body = ? WHERE id = ?", (b"x" + row[1][1:], row[0]))
    found, summary = check(killed)
    (row,) = [each for each in found if each.file == "journal.db"]
    assert row.remedy is Remedy.RESTORE
    assert "checksum is wrong" in row.detail
    assert not summary.well


async def test_a_log_that_lost_a_commit_is_named(fast_path: Path) -> None:
    data = await crashed_with_commits(fast_path, 6)
    flip(data / LOG, frame(data, 1) + 30)
    found, _ = check(data)
    (log,) = [each for each in found if each.file == "journal.db"]
    assert "later ones follow it" in log.detail


async def test_a_damaged_page_is_named_and_the_files_are_read_all_the_same(clean: Path) -> None:
    path = clean / "journal.db"
    for page in range(1, path.stat().st_size // 4096):
        content = path.read_bytes()
        flip(path, page * 4096 + 4000)
        found, summary = check(clean)
        assert any(each.file == "journal.db" and each.remedy is Remedy.AWAY for each in found), page
        assert {each.key for each in found} >= {"k", "other"}
        assert not summary.well
        path.write_bytes(content)
    flip(path, 4000)
    await follow(check(clean)[0], clean)


@pytest.mark.parametrize("name", ["STORE", "journal.db"])
@pytest.mark.parametrize("how", ["missing", "damaged", "another"])
async def test_a_lost_or_foreign_part_of_the_store_is_named(clean: Path, name: str, how: str) -> None:
    path = clean / name
    match how:
        case "missing":
            path.unlink()
        case "damaged":
            path.write_bytes(b"\0" * 4096)
        case "another":
            async with opened(clean.parent / "another"):
                pass
            shutil.copy(clean.parent / "another" / name, path)
    found, summary = check(clean)
    parts = [each.file for each in found if each.verdict is DAMAGED]
    assert parts, found
    assert set(parts) <= {"STORE", "journal.db"}
    assert not summary.well
    await follow(found, clean)


async def test_marked_sessions_and_the_quarantine_are_counted(fast_path: Path) -> None:
    data = copy_workspace(fast_path / "data")
    async with opened(data):
        pass
    found, summary = check(data)
    not_ok = {each.key: each.verdict for each in found if each.verdict is not OK}
    assert not_ok == {"torn:tail": MARKED, "binary:junk": MARKED, "corrupt:middle": DAMAGED}
    assert (summary.quarantine_files, summary.not_served) == (2, 1)
    assert summary.quarantine_bytes == 12 + 381

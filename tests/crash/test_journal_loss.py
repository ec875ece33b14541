"""A journal that is lost or damaged, files for their owner only, and answers that survive a restart."""

import json
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from crash.by_hand import A, B, C, crashed, opened, revision, round_of, says
from crash.disks import PASSED, journal_of
from crash.workspaces import quarantined
from engines import done, lines, one, refused, request
from sessionstored.engine import StartError
from sessionstored.engine.jsonl import open_jsonl
from sessionstored.engine.jsonl.store import REVISIONS_RESERVED
from sessionstored.engine.jsonl.tables import row_crc
from sessionstored.rules import DEFAULT_LIMITS, Append, Delete, Replace


async def refused_start(data: Path, *words: str) -> None:
    """The directory is not opened, for a reason that holds these words, and nothing of it is changed."""
    before = {path: path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}
    with pytest.raises(StartError) as caught:
        await open_jsonl(data)
    for word in words:
        assert word in str(caught.value), caught.value
    with pytest.raises(StartError):
        await open_jsonl(data)
    after = {path: path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}
    for path in before:
        if path.name not in ("LOCK", "journal.db", "journal.db-wal", "journal.db-shm"):
            assert after[path] == before[path], path


def store_of(data: Path) -> dict[str, object]:
    return json.loads((data / "STORE").read_bytes())


def lose_journal(data: Path, how: str) -> None:
    if how == "emptied":
        os.truncate(data / "journal.db", 0)
    if how == "replaced":
        (data / "journal.db").unlink()
        sqlite3.connect(data / "journal.db").close()
    if how == "removed":
        (data / "journal.db").unlink()
    for path in data.glob("journal.db-*"):
        path.unlink()


@pytest.fixture
async def clean(fast_path: Path) -> Path:
    async with opened(fast_path / "data") as engine:
        await done(engine, Append("k", [A]))
        await done(engine, Append("gone", [A]))
        await done(engine, Replace("k", 0, 0, [B]))
        await done(engine, Delete("gone"))
    return fast_path / "data"


@pytest.fixture
async def killed(fast_path: Path) -> Path:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        await done(engine, Append("k", [B]))
        return await crashed(engine, fast_path / "data")


# Losing the journal.


@pytest.mark.parametrize("how", ["removed", "emptied", "replaced"])
async def test_a_lost_journal_is_rebuilt_after_a_clean_stop(clean: Path, how: str) -> None:
    async with opened(clean) as engine:
        before, store_id = await revision(engine, "k"), engine.store_id
    ceiling = store_of(clean)["revision_ceiling"]
    assert isinstance(ceiling, int)
    lose_journal(clean, how)
    async with opened(clean) as engine:
        assert engine.store_id == store_id
        assert await revision(engine, "k") > ceiling >= before
        await says(engine, "k", B, A)
        assert (await done(engine, Append("gone", [A]))).revision > ceiling


async def test_revisions_go_on_after_a_lost_journal_and_a_crash(clean: Path, fast_path: Path) -> None:
    """Also where there is no session left whose catalogue row could tell."""
    async with opened(clean) as engine:
        last = (await done(engine, Delete("k"))).revision
    lose_journal(clean, "removed")
    async with opened(clean) as engine:
        copy = await crashed(engine, fast_path / "copy")
    async with opened(copy) as engine:
        assert (await done(engine, Append("k", [A]))).revision > last


@pytest.mark.parametrize("how", ["removed", "emptied", "replaced"])
async def test_a_lost_journal_stops_the_start_after_a_crash(killed: Path, how: str) -> None:
    lose_journal(killed, how)
    await refused_start(killed, "journal.db", "--accept-loss")
    async with opened(killed, accept_loss=True) as engine:
        await says(engine, "k", A, B)


async def test_a_damaged_row_stops_the_start_and_can_be_left_out(killed: Path) -> None:
    with journal_of(killed) as db:
        ((row_id, body),) = db.execute(f"SELECT id, body FROM journal WHERE id > {PASSED}").fetchall()
        db.execute("UPDATE journal SET body = ? WHERE id = ?", (body.replace(B, C), row_id))
    await refused_start(killed, f"row {row_id}", "journal.db", "--accept-loss")
    async with opened(killed, accept_loss=True) as engine:
        assert await lines(engine, "k") == [A, B]  # its file had the message already
    assert any(C in aside for aside in quarantined(killed))


@pytest.mark.parametrize("how", ["damaged", "not flushed"])
async def test_the_revision_of_a_lost_change_is_not_given_out_again(fast_path: Path, how: str) -> None:
    durability = "fsync" if how == "damaged" else "os"
    async with opened(fast_path / "first", durability=durability) as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        engine._vault.journal.wal_checkpoint()
        before = await crashed(engine, fast_path / "before")
        last = await done(engine, Append("k", [B]))
        data = await crashed(engine, fast_path / "data")
    if how == "damaged":
        with journal_of(data) as db:
            db.execute("UPDATE journal SET crc = crc + 1")
    else:
        data = before  # a power cut may take what was not flushed
    async with opened(data, durability=durability, accept_loss=True) as engine:
        assert (await done(engine, Append("k", [C]))).revision > last.revision + 1


async def test_changes_upon_a_lost_row_make_damage_and_not_another_session(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await done(engine, Append("new", [A]))
        await round_of(engine)
        for key in ("k", "late"):
            for line in (B, C):
                await done(engine, Append(key, [line]))
        data = await crashed(engine, fast_path / "data")
    with journal_of(data) as db:
        rows = db.execute(f"SELECT id, body FROM journal WHERE id > {PASSED} ORDER BY id").fetchall()
        for row_id, body in (rows[0], rows[2]):
            db.execute("UPDATE journal SET body = ? WHERE id = ?", (body.replace(B, C), row_id))
    async with opened(data, accept_loss=True) as engine:
        assert (await refused(engine, Append("k", [A]))).reason == "DATA_LOSS"
        await says(engine, "new", A)
    assert sum(C in aside for aside in quarantined(data)) >= 3


@pytest.mark.parametrize("content", [b"SQLite format 3\0" + b"x" * 5000, b"not a database" * 500])
async def test_a_journal_that_is_none_is_named(clean: Path, content: bytes) -> None:
    (clean / "journal.db").write_bytes(content)
    await refused_start(clean, "journal.db", "--accept-loss")


async def test_a_lost_store_file_is_made_anew_from_the_journal(clean: Path) -> None:
    async with opened(clean) as engine:
        before, store_id = await revision(engine, "k"), engine.store_id
    (clean / "STORE").unlink()
    async with opened(clean) as engine:
        assert engine.store_id == store_id
        assert await revision(engine, "k") == before
        assert (await done(engine, Append("gone", [A]))).revision > before


async def test_the_ceiling_is_above_every_revision(clean: Path) -> None:
    before = store_of(clean)["revision_ceiling"]
    with journal_of(clean) as db:
        row = "revision", before
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (*row, row_crc(row)))
    async with opened(clean) as engine:
        answer = await done(engine, Append("k", [A]))
        ceiling = store_of(clean)["revision_ceiling"]
        assert answer.revision <= ceiling <= answer.revision + REVISIONS_RESERVED  # type: ignore[operator]


async def test_a_newer_journal_is_refused(clean: Path) -> None:
    with journal_of(clean) as db:
        db.execute("PRAGMA user_version = 9")
    await refused_start(clean, "version 9")


async def test_everything_is_for_the_owner_only(fast_path: Path) -> None:
    before = os.umask(0)
    try:
        async with opened(fast_path / "new" / "data") as engine:
            await done(engine, Append("k", [A]))
            await done(engine, Append("l", [A]))
            await round_of(engine)
            await done(engine, Replace("k", 0, 1, [B]))
            await round_of(engine)
            (fast_path / "new" / "data" / "sessions" / "l.jsonl").write_bytes(A + b"\n{")
            await done(engine, Append("l", [B]))
            await crashed(engine, fast_path / "copy")
            found = [fast_path / "new" / "data", *(fast_path / "new" / "data").rglob("*")]
            wide = {path.name for path in found if path.stat().st_mode & 0o077}
            assert wide == set()
            assert {"STORE", "LOCK", "journal.db", "journal.db-wal", "k.jsonl", "quarantine"} <= {
                path.name for path in found
            }
    finally:
        os.umask(before)


# Exactly once, across restarts.


@pytest.mark.parametrize("when", ["clean", "killed before the checkpoint", "killed after it"])
async def test_answers_survive(fast_path: Path, when: str) -> None:
    asked = [
        request(Append("k", [A]), 1),
        request(Replace("k", 5, 0, [B]), 2),
        request(Append("k", [B]), request_id="delivery 1"),
        request(Delete("none"), 3),
        request(Append("k", [C]), 1, client="another"),
    ]
    async with opened(fast_path / "first") as engine:
        first = [(await one(engine, each)).outcome for each in asked]
        if when == "killed after it":
            await round_of(engine)
        copy = await crashed(engine, fast_path / "copy")
    data = fast_path / "first" if when == "clean" else copy
    for _ in range(2):
        async with opened(data) as engine:
            assert [(await one(engine, each)).outcome for each in asked] == first
            assert await lines(engine, "k") == [A, B, C]
            copy = await crashed(engine, fast_path / f"{data.name} again")
        data = copy


async def test_what_was_forgotten_stays_forgotten_after_a_crash(fast_path: Path) -> None:
    """A row that is replayed over a newer window must not lower what that window has forgotten."""
    async with opened(fast_path / "first") as engine:
        for n in range(1, 6):
            await one(engine, request(Append("k", [A]), n, answered_through=n - 1))
        copy = await crashed(engine, fast_path / "copy")
    for data in (copy, fast_path / "first"):
        async with opened(data, limits=replace(DEFAULT_LIMITS, window_calls_max=2)) as engine:
            for n in range(1, 5):
                outcome = (await one(engine, request(Append("k", [A]), n, answered_through=n - 1))).outcome
                assert getattr(outcome, "reason", "") == "CALL_EXPIRED"
            assert (await one(engine, request(Append("k", [A]), 5, answered_through=4))).replayed


async def test_the_first_thousand_request_ids_are_forgotten_in_order(fast_path: Path) -> None:
    limits = replace(DEFAULT_LIMITS, window_request_ids_max=3)
    async with opened(fast_path / "data", limits=limits) as engine:
        for n in range(5):
            await one(engine, request(Append("k", [A]), request_id=f"{n}"))
        copy = await crashed(engine, fast_path / "copy")
        await round_of(engine)
        later = await crashed(engine, fast_path / "later")
    for data in (copy, later, fast_path / "data"):
        async with opened(data, limits=limits) as engine:
            replayed = [
                (await one(engine, request(Append("k", [A]), request_id=f"{n}"))).replayed for n in (4, 3, 2)
            ]
            assert replayed == [True] * 3
            assert not (await one(engine, request(Append("k", [A]), request_id="1"))).replayed

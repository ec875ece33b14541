"""Damage in the journal's own files is named at the start: no page and no commit is believed unchecked."""

import random
import shutil
from collections import Counter
from pathlib import Path

import apsw
import pytest
from crash.by_hand import A, B, C, D, crashed, opened, round_of
from crash.disks import journal_of
from crash.workspaces import quarantined
from engines import done, lines, one, read, request
from sessionstored.engine import Refused, StartError
from sessionstored.engine.jsonl import open_jsonl, pages
from sessionstored.engine.jsonl.checking import Check
from sessionstored.engine.jsonl.journal import FormatError, Journal
from sessionstored.rules import Append, Refusal, Update

LOG = "journal.db-wal"


async def crashed_with_commits(path: Path, commits: int) -> Path:
    """A directory as kill -9 leaves it after so many commits to one session."""
    async with opened(path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        for n in range(commits):
            await done(engine, Append("k", [B if n % 2 else C]))
        return await crashed(engine, path / "data")


def frame(data: Path, index: int) -> int:
    """Where the index-th frame of the write-ahead log begins, from 0."""
    page_size = int.from_bytes((data / LOG).read_bytes()[8:12])
    return 32 + index * (24 + page_size)


def flip(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


async def test_a_bit_that_flipped_in_an_older_commit_stops_the_start(fast_path: Path) -> None:
    """SQLite by itself would end its log there, and later commits would be gone without a word."""
    data = await crashed_with_commits(fast_path, 6)
    whole = (data / LOG).read_bytes()
    rng = random.Random(7)
    last = frame(data, (len(whole) - 32) // (frame(data, 1) - frame(data, 0)) - 4)
    for position in [3, 17, 25, *(rng.randrange(32, last) for _ in range(40))]:
        (data / LOG).write_bytes(whole)
        flip(data / LOG, position)
        with pytest.raises(StartError, match=rf"{LOG} is damaged.*--accept-loss") as refused:
            await open_jsonl(data)
        assert "acknowledged changes are lost" in str(refused.value)
    assert b"".join(quarantined(data)) == b""
    async with opened(data, accept_loss=True) as engine:
        head = (await read(engine, "k")).head
        assert next(iter(await lines(engine, "k"))) == A
        assert head.message_count < 7
        assert "in quarantine" in head.damage, "its lines were in its file, and nothing vouched for them"
    assert any(len(aside) == len(whole) for aside in quarantined(data))


async def test_a_log_that_was_cut_is_what_a_crash_leaves(fast_path: Path) -> None:
    data = await crashed_with_commits(fast_path, 3)
    size = (data / LOG).stat().st_size
    with (data / LOG).open("r+b") as log:
        log.truncate(size - 100)
    async with opened(data) as engine:
        assert (await lines(engine, "k"))[0] == A


async def test_a_header_torn_as_the_log_begins_anew_is_no_loss(fast_path: Path) -> None:
    """SQLite writes it first, and only once the database has all of the old round."""
    async with opened(fast_path / "first") as engine:
        for line in (A, B, C):
            await done(engine, Append("k", [line]))
        await round_of(engine)
        data = fast_path / "data"
        shutil.copytree(fast_path / "first", data, ignore=shutil.ignore_patterns("*-shm"))
        assert (data / LOG).stat().st_size > 32
    with (data / LOG).open("r+b") as log:
        log.seek(16)
        log.write(b"new!")
    async with opened(data) as engine:
        assert await lines(engine, "k") == [A, B, C]


async def test_a_log_whose_beginning_turned_into_zeros_stops_the_start(fast_path: Path) -> None:
    """Its header is gone, and its first frame: nobody knows whether the database has that commit."""
    data = await crashed_with_commits(fast_path, 3)
    with (data / LOG).open("r+b") as log:
        log.write(bytes(4096))
    with pytest.raises(StartError, match=rf"{LOG} is damaged.*--accept-loss"):
        await open_jsonl(data)


async def test_a_first_page_of_zeros_is_damage_even_if_the_log_has_another(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        assert engine._committer.run(engine._vault.journal.wal_checkpoint).result()
        await done(engine, Append("k", [b'{"a": "%s"}' % (b"x" * 50_000)]))  # it grows: page 1 says so
        data = await crashed(engine, fast_path / "data")
    with (data / "journal.db").open("r+b") as file:
        file.write(bytes(4096))
    with pytest.raises(StartError, match=r"journal.db cannot be used: its first page.*--accept-loss"):
        await open_jsonl(data)
    (found,) = [finding for finding in Check(data).findings() if finding.file == "journal.db"]
    assert "first page" in found.detail


async def test_a_remembered_answer_on_a_damaged_page_refuses_the_call(fast_path: Path) -> None:
    """The committer meets it before a commit: nothing is lost by going on."""
    async with opened(fast_path / "data") as engine:
        await done(engine, Append("k", [A]))
        await one(engine, request(Append("k", [B]), 1))
    journal = fast_path / "data" / "journal.db"
    with journal_of(fast_path / "data") as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'client'").fetchone()
        page_size = db.pragma("page_size")
    with journal.open("r+b") as file:
        file.seek((root - 1) * page_size)
        file.write(bytes(page_size))
    async with opened(fast_path / "data") as engine:
        for sequence in (1, 2):
            reply = await one(engine, request(Append("k", [B]), sequence))
            assert isinstance(reply.outcome, Refusal)
            assert (reply.outcome.reason, reply.outcome.metadata["file"]) == ("DATA_LOSS", "journal.db")
        assert await lines(engine, "k") == [A, B]
        await done(engine, Append("k", [C]))


async def test_power_loss_may_break_the_log_of_a_store_that_did_not_flush_it(fast_path: Path) -> None:
    async with opened(fast_path / "first", durability="os") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        for _ in range(6):
            await done(engine, Append("k", [B]))
        data = await crashed(engine, fast_path / "data")
    flip(data / LOG, frame(data, 1) + 100)
    async with opened(data) as engine:
        assert (await lines(engine, "k"))[0] == A


async def test_what_is_set_aside_after_a_crash_is_marked_and_stays_marked(fast_path: Path) -> None:
    """A line that the journal lacks: of a commit that it lost, or somebody else's."""
    data = await crashed_with_commits(fast_path, 2)
    async with opened(data) as engine:
        await done(engine, Append("k", [C]))
        again = await crashed(engine, fast_path / "again")
    with (again / "sessions" / "k.jsonl").open("ab") as file:
        file.write(D + b"\n")
    async with opened(again) as engine:
        assert await lines(engine, "k") == [A, C, B, C]
        damage = (await read(engine, "k")).head.damage
        assert f"{len(C) + len(D) + 2} bytes" in damage
        assert "quarantine/" in damage
        await done(engine, Append("k", [B]))
        await done(engine, Update("k", b'{"a": 1}'))
        third = await crashed(engine, fast_path / "third")
    async with opened(third) as engine:
        head = (await read(engine, "k")).head
        assert (head.damage, head.metadata) == (damage, b'{"a": 1}')


async def test_every_page_of_a_clean_journal_is_checked(fast_path: Path) -> None:
    """What is flipped is met by name: at the start, or when it is read; it never hides a session."""
    async with opened(fast_path / "data") as engine:
        for key in ("k", "l", "m"):
            await done(engine, Append(key, [A, B]))
    journal = fast_path / "data" / "journal.db"
    whole = journal.read_bytes()
    outcomes: Counter[str] = Counter()
    for position in range(100, len(whole), 4099):
        journal.write_bytes(whole)
        flip(journal, position)
        try:
            engine = await open_jsonl(fast_path / "data")
        except StartError:
            outcomes["refused"] += 1
            continue
        try:
            for key in ("k", "l", "m"):
                assert await lines(engine, key) == [A, B]
            outcomes["served whole"] += 1
        except Refused as damaged:
            outcomes[damaged.refusal.metadata["file"]] += 1
        finally:
            await engine.close()
    print(dict(outcomes))
    assert set(outcomes) <= {"refused", "served whole", "journal.db"}
    assert outcomes["refused"]


def test_a_journal_without_page_checksums_is_refused(fast_path: Path) -> None:
    pages.register()
    db = apsw.Connection(str(fast_path / "journal.db"))
    db.execute("CREATE TABLE other(x)")
    db.pragma("application_id", 0x53455353)
    db.pragma("user_version", 1)
    db.close()
    with pytest.raises(FormatError, match="no checksums"):
        Journal(fast_path / "journal.db", "fsync")

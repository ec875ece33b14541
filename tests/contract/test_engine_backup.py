"""A backup of an engine is the store at one moment, whatever happens to it while it is copied."""

import asyncio
import errno
import os
import random
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from backups import State, back_up, restore, state_of
from daemons import wait_until
from engines import DURABLE_KINDS, done, one, open_kind, request, submit
from sessionstored.engine import BackupHeader, Engine, Refused
from sessionstored.engine.jsonl import DEFAULT_TUNING, JsonlEngine, backing_up, open_jsonl
from sessionstored.engine.memory import MemoryEngine
from sessionstored.rules import Answer, Append, Create, Delete, Fork, Mutation, Pop, Replace, Update

KEYS = ("a", "a:b", "a/b", "ключ/✓", "x" * 300, ".hidden")


def line(rng: random.Random) -> bytes:
    return b'{"role":"user","n":%d,"t":"%s"}' % (rng.randrange(1 << 30), b"x" * rng.choice((0, 10, 3000)))


def mutation(rng: random.Random) -> Mutation:
    key = rng.choice(KEYS)
    match rng.randrange(9):
        case 0:
            return Delete(key)
        case 1:
            return Pop(key)
        case 2:
            return Replace(key, 0, rng.choice((None, 1)), [line(rng)])
        case 3:
            return Fork(rng.choice(KEYS), key, rng.choice((None, 0, 1)))
        case 4:
            return Update(key, b'{"v":%d}' % rng.randrange(9))
        case 5:
            return Create(key, [line(rng)], b"{}")
        case _:
            return Append(key, [line(rng) for _ in range(rng.randrange(1, 9))])


def step_by_step(patch: pytest.MonkeyPatch) -> None:
    """Every block holds one item, so that the first one is the header alone."""
    patch.setattr(backing_up, "_ITEMS_MAX", 1)


def no_leftovers(data: Path) -> bool:
    return not [name for name in os.listdir(data) if name.startswith(".backup-")]


async def opened(data: Path, kind: str = "jsonl") -> Engine:
    """An engine, whose checkpoints run all the time or only when `settle` asks for one."""
    if kind == "jsonl-strained":
        return await open_kind(kind, data)
    return await open_jsonl(data, tuning=replace(DEFAULT_TUNING, checkpoint_interval_s=3600))


def settle(engine: Engine) -> None:
    """Have everything written to its file, and a catalogue row for each."""
    assert isinstance(engine, JsonlEngine)
    assert engine._maintenance.round() or engine._maintenance.round()


@pytest.mark.parametrize("kind", DURABLE_KINDS)
async def test_a_backup_shows_one_moment_whatever_follows(kind, tmp_path, monkeypatch):
    step_by_step(monkeypatch)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    sequence = 0

    def perhaps_settle(engine: Engine) -> None:
        if kind == "jsonl" and rng.random() < 0.1:  # the other one does so by itself
            settle(engine)

    for turn in range(6):
        engine = await opened(tmp_path / f"data{turn}", kind)
        answered = []
        for _ in range(rng.randrange(40)):
            sequence += 1
            asked = request(mutation(rng), sequence)
            answered.append((asked, await one(engine, asked)))
            perhaps_settle(engine)
        before = await state_of(engine)

        async def change(engine: Engine = engine) -> None:
            await submit(engine, *(mutation(rng) for _ in range(rng.randrange(12))))
            perhaps_settle(engine)
            await asyncio.sleep(rng.choice((0, 0.01)))  # checkpoints and rewrites come in between

        made = await back_up(engine, tmp_path / f"backup{turn}", change)
        assert made.damaged == []
        assert no_leftovers(tmp_path / f"data{turn}")
        await engine.close()
        store_id = restore(tmp_path / f"backup{turn}", tmp_path / f"restored{turn}")
        assert store_id != engine.store_id
        again = await opened(tmp_path / f"restored{turn}", kind)
        assert again.store_id == store_id
        assert await state_of(again) == before
        for asked, reply in answered:
            repeated = await one(again, asked)
            assert repeated.outcome == reply.outcome
            assert repeated.replayed == isinstance(reply.outcome, Answer)
        applied = await done(again, Append("new", [b"{}"]))
        assert applied.revision > 10**12  # no revision that the other store may have given out meanwhile
        await again.close()


async def filled(data: Path, sessions: int = 30) -> tuple[Engine, State]:
    engine = await opened(data)
    for n in range(sessions):
        await done(engine, Append(f"k{n}", [b'{"n":%d}' % i for i in range(200)]))
    settle(engine)
    return engine, await state_of(engine)


async def test_files_that_are_replaced_and_removed_are_kept_only_until_they_are_copied(
    tmp_path, monkeypatch
):
    step_by_step(monkeypatch)
    engine, before = await filled(tmp_path / "data")
    blocks = 0
    kept = []

    async def change() -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 1:  # the header is there, and no file is
            for n in range(10):
                await done(engine, Delete(f"k{n}"))
                await done(engine, Append(f"k{n}", [b'{"again":true}']))
                await done(engine, Replace(f"k{n + 10}", 0, None, [b"{}"]))
            settle(engine)
        kept.extend(len(os.listdir(path)) for path in (tmp_path / "data").glob(".backup-*/kept"))

    await back_up(engine, tmp_path / "backup", change)
    assert (kept[0], kept[-1]) == (19, 0)  # one is being copied already
    assert len(list((tmp_path / "backup/sessions").iterdir())) == 30
    await engine.close()
    restore(tmp_path / "backup", tmp_path / "restored")
    again = await opened(tmp_path / "restored")
    assert await state_of(again) == before
    await again.close()


async def test_files_of_sessions_that_were_deleted_are_not_missed(tmp_path):
    engine, _ = await filled(tmp_path / "data", 6)
    await done(engine, Delete("k0"))
    await done(engine, Delete("k1"))
    await done(engine, Append("k1", [b'{"again":true}']))
    await done(engine, Delete("k2"))
    await done(engine, Fork("k2", "k3"))
    await done(engine, Replace("k4", 0, None, [b"{}"]))
    before = await state_of(engine)
    made = await back_up(engine, tmp_path / "backup")
    assert made.damaged == []
    files = sorted(path.name[:2] for path in (tmp_path / "backup/sessions").iterdir())
    assert files == ["k2", "k3", "k4", "k5"]
    await engine.close()
    restore(tmp_path / "backup", tmp_path / "restored")
    again = await opened(tmp_path / "restored")
    assert await state_of(again) == before
    await again.close()


async def test_what_is_damaged_is_copied_as_it_is_and_named(tmp_path):
    data = tmp_path / "data"
    (data / "sessions").mkdir(parents=True)
    (data / "sessions/bad.jsonl").write_bytes(b'{"n":1}\nnonsense\n{"n":2}\n')
    (data / "sessions/torn.jsonl").write_bytes(b'{"n":1}\n{"n":')
    for name in ("one", "two"):
        header = b'{"_type":"metadata","key":"claimed"}\n{"n":1}\n'
        (data / f"sessions/{name}.jsonl").write_bytes(header)
    engine, _ = await filled(data, 4)
    flipped = bytearray((data / "sessions/k1.jsonl").read_bytes())
    flipped[500] ^= 1
    stat = os.stat(data / "sessions/k1.jsonl")
    with (data / "sessions/k1.jsonl").open("r+b") as file:
        file.write(flipped)
    os.utime(data / "sessions/k1.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (data / "sessions/k2.jsonl").unlink()
    made = await back_up(engine, tmp_path / "backup")
    await engine.close()
    named = {damage["path"]: damage["detail"] for damage in made.damaged}
    assert set(named) == {f"sessions/{name}.jsonl" for name in ("bad", "one", "two", "k1", "k2")}
    assert "line 2" in named["sessions/bad.jsonl"]
    assert "checksum" in named["sessions/k1.jsonl"]
    assert "missing" in named["sessions/k2.jsonl"]
    assert "two files" in named["sessions/one.jsonl"]
    assert (tmp_path / "backup/sessions/k1.jsonl").read_bytes() == flipped
    restore(tmp_path / "backup", tmp_path / "restored")
    again = await opened(tmp_path / "restored")
    found = await state_of(again)
    assert {key for key, (_, stored) in found.items() if stored == "DATA_LOSS"} == {
        "bad", "claimed", "k1", "k2"
    }
    head, stored = found["torn"]
    assert stored == [b'{"n":1}']
    aside = head.damage.rpartition("quarantine/")[2]
    assert (tmp_path / "restored/quarantine" / aside).read_bytes() == b'{"n":'
    await again.close()


async def test_the_write_ahead_log_is_not_held_while_a_reader_takes_its_time(tmp_path, monkeypatch):
    step_by_step(monkeypatch)
    engine, _ = await filled(tmp_path / "data")
    assert isinstance(engine, JsonlEngine)
    async with aclosing(engine.backup()) as blocks:
        assert isinstance((await anext(blocks))[0], BackupHeader)
        for n in range(20):
            await done(engine, Append("later", [b'{"n":%d}' % n]))
        settle(engine)
        log = (tmp_path / "data/journal.db-wal").stat
        assert engine._committer.run(engine._vault.journal.wal_checkpoint).result()
        assert log().st_size == 0
    await engine.close()


async def test_backups_at_once_have_a_bound(tmp_path, monkeypatch):
    step_by_step(monkeypatch)
    engine, _ = await filled(tmp_path / "data", 3)
    first, second, third = (engine.backup() for _ in range(3))
    await anext(first)
    await anext(second)
    with pytest.raises(Refused) as caught:
        await anext(third)
    assert caught.value.refusal.reason == "OVERLOADED"
    await first.aclose()
    await back_up(engine, tmp_path / "backup")
    await second.aclose()
    assert no_leftovers(tmp_path / "data")
    await engine.close()


async def test_a_reader_that_stands_still_loses_its_backup(tmp_path, monkeypatch):
    step_by_step(monkeypatch)
    monkeypatch.setattr(backing_up, "STALL_S_MAX", 0.05)
    engine, _ = await filled(tmp_path / "data", 3)
    async with aclosing(engine.backup()) as blocks:
        await anext(blocks)
        await asyncio.to_thread(wait_until, lambda: no_leftovers(tmp_path / "data"), 60)
        with pytest.raises(Refused, match="given up"):
            await anext(blocks)
    await engine.close()


async def test_a_backup_gives_way_to_a_full_disk(tmp_path, monkeypatch):
    step_by_step(monkeypatch)
    engine, _ = await filled(tmp_path / "data", 3)
    assert isinstance(engine, JsonlEngine)
    async with aclosing(engine.backup()) as blocks:
        await anext(blocks)
        monkeypatch.setattr(engine._vault.disk, "free_bytes", lambda path: DEFAULT_TUNING.reserve_bytes - 1)
        with pytest.raises(Refused) as caught:
            await anext(blocks)
        assert caught.value.refusal.reason == "STORAGE_FULL"
        assert no_leftovers(tmp_path / "data")
    monkeypatch.undo()
    size = (tmp_path / "data/journal.db").stat().st_size
    free = DEFAULT_TUNING.reserve_bytes + size - 4096  # the reserve, and not quite a copy of the journal
    monkeypatch.setattr(engine._vault.disk, "free_bytes", lambda path: free)
    with pytest.raises(Refused) as caught:
        await back_up(engine, tmp_path / "backup")
    assert caught.value.refusal.reason == "STORAGE_FULL"
    await engine.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPERM])
async def test_a_file_that_cannot_be_kept_ends_the_backup_and_nothing_else(number, tmp_path, monkeypatch):
    step_by_step(monkeypatch)
    engine, _ = await filled(tmp_path / "data", 5)
    assert isinstance(engine, JsonlEngine)

    def link(old: Path, new: Path) -> None:
        raise OSError(number, os.strerror(number))

    async with aclosing(engine.backup()) as blocks:
        await anext(blocks)
        monkeypatch.setattr(engine._vault.disk, "link", link)
        await done(engine, Delete("k4"))
        await done(engine, Append("k4", [b"{}"]))
        with pytest.raises((Refused, PermissionError)) as caught:
            await anext(blocks)
        full = isinstance(caught.value, Refused) and caught.value.refusal.reason == "STORAGE_FULL"
        assert full == (number == errno.ENOSPC)
    monkeypatch.undo()
    assert no_leftovers(tmp_path / "data")
    assert (await back_up(engine, tmp_path / "backup")).session_count == 5
    await engine.close()


async def test_closing_the_store_ends_a_backup(tmp_path, monkeypatch):
    step_by_step(monkeypatch)
    engine, _ = await filled(tmp_path / "data", 3)
    blocks = engine.backup()
    await anext(blocks)
    await engine.close()
    assert no_leftovers(tmp_path / "data")
    with pytest.raises(Refused) as caught:
        await anext(blocks)
    assert caught.value.refusal.reason == "SHUTTING_DOWN"


async def test_a_damaged_journal_is_not_backed_up(tmp_path):
    engine, _ = await filled(tmp_path / "data", 300)
    assert isinstance(engine, JsonlEngine)
    assert engine._committer.run(engine._vault.journal.wal_checkpoint).result()
    with (tmp_path / "data/journal.db").open("r+b") as file:
        file.seek(-2000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-2000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(Refused) as caught:
        await back_up(engine, tmp_path / "backup")
    assert caught.value.refusal.reason == "DATA_LOSS"
    assert caught.value.refusal.metadata["file"] == "journal.db"
    assert no_leftovers(tmp_path / "data")
    await engine.close()


async def test_leftovers_of_a_dead_daemon_are_removed_and_nothing_else(tmp_path):
    ours, theirs = tmp_path / f".backup-{'0' * 32}", tmp_path / "backup-2024"
    for folder in (ours, theirs):
        (folder / "kept").mkdir(parents=True)
        (folder / "kept/a.jsonl").write_bytes(b"{}\n")
    engine = await open_jsonl(tmp_path)
    await engine.close()
    assert (ours.exists(), theirs.exists()) == (False, True)


async def test_a_store_in_memory_has_no_backup():
    with pytest.raises(Refused) as caught:
        await anext(MemoryEngine().backup())
    assert caught.value.refusal.reason == "UNSUPPORTED"

"""The feed in the journal: what stays of it, what goes; cursors after a crash, an edit or a loss."""

import asyncio
import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from contract.test_engine_watch import agrees
from crash.by_hand import BY_HAND, A, B, C, crashed, opened, quiet, round_of, says
from crash.disks import PASSED, FullDisk, journal_of
from crash.test_edited_files import add, file_of
from engines import Clock, done, lines
from followers import Follower, Following
from sessionstored.engine import Refused
from sessionstored.engine.feed import FeedLimits
from sessionstored.engine.jsonl import JsonlEngine
from sessionstored.rules import Append, Create, Delete, Fork, Pop, Update


async def pruned(engine: JsonlEngine) -> None:
    """A checkpoint, and what goes of the feed after it."""
    await round_of(engine)
    await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.guarded_round)


async def looked_at(engine: JsonlEngine) -> None:
    """What the sweep does once it comes upon the session's file."""
    await asyncio.wrap_future(engine._committer.look_again("k"))


def limited(**limits: float) -> dict[str, object]:
    return {"tuning": replace(BY_HAND, feed=FeedLimits(**limits))}  # type: ignore[arg-type]


async def reason(engine: JsonlEngine, cursor: bytes) -> str:
    """What a watch from a cursor is refused with; "" if it is not."""
    following = None
    try:
        following = Following(engine, Follower(cursor=cursor), keys=["nobody"])
        await following.catch_up()
    except Refused as refused:
        return refused.refusal.reason
    finally:
        if following is not None:
            await following.close()
    return ""


async def test_a_checkpoint_keeps_the_feed_and_recovery_does_not_read_it(tmp_path: Path) -> None:
    """A session that was deleted before the checkpoint must not come back from a row that was kept."""
    async with opened(tmp_path / "first") as engine:
        cursor = engine.cursor()
        await done(engine, Append("gone", [A]))
        await done(engine, Append("k", [A]))
        await done(engine, Delete("gone"))
        await round_of(engine)
        await done(engine, Append("k", [B]))
        data = await crashed(engine, tmp_path / "data")
    with journal_of(data) as db:
        ((kept, needed),) = db.execute(f"SELECT sum(id <= {PASSED}), sum(id > {PASSED}) FROM journal")
        assert (kept, needed) == (3, 1)
    async with opened(data) as engine:
        assert engine._vault.backlog_bytes == 0
        following = Following(engine, Follower(cursor=cursor))
        await agrees(engine, await following.catch_up())
        await following.close()
        assert await engine.count() == 1
        await says(engine, "gone")


async def test_old_rows_go_also_while_nothing_happens(tmp_path: Path, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    async with opened(tmp_path, **limited(age_s_max=100.0)) as engine:
        first = engine.cursor()
        await done(engine, Append("k", [A]))
        clock.steady_s += 60
        later = engine.cursor()
        await done(engine, Append("k", [B]))
        await pruned(engine)
        assert await reason(engine, first) == ""
        clock.steady_s += 60
        await pruned(engine)
        assert await reason(engine, first) == "CURSOR_EXPIRED"
        assert await reason(engine, later) == ""
        clock.steady_s += 60
        await pruned(engine)
        assert await reason(engine, later) == "CURSOR_EXPIRED"
        assert await reason(engine, engine.cursor()) == ""
        assert engine._vault.feed_bytes == 0
    async with opened(tmp_path) as engine:  # what went stays gone, and no position is given out twice
        assert await reason(engine, later) == "CURSOR_EXPIRED"
        at = engine.cursor()
        await done(engine, Append("k", [C]))
        assert engine.cursor() > at
        assert await reason(engine, at) == ""


async def test_rows_beyond_the_bytes_go_the_oldest_first(tmp_path: Path) -> None:
    async with opened(tmp_path, **limited(bytes_max=20_000)) as engine:
        cursors = []
        for n in range(30):
            cursors.append(engine.cursor())
            await done(engine, Append("k", [b'{"x": "%s"}' % (b"%d" % n * 1000)]))
        await pruned(engine)
        good = [await reason(engine, cursor) == "" for cursor in cursors]
        assert good == sorted(good)
        assert 5 < sum(good) < 25
        assert engine._vault.feed_bytes <= 20_000
        ((kept,),) = engine._vault.reading(
            lambda reader: list(reader._db.execute("SELECT sum(length(body)) FROM journal"))
        )
        assert kept == engine._vault.feed_bytes


async def test_rows_that_recovery_needs_stay_however_old_they_are(tmp_path: Path, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    async with opened(tmp_path / "first", **limited(age_s_max=0.0, bytes_max=0)) as engine:
        await done(engine, Append("k", [A]))
        clock.steady_s += 1000
        engine._maintenance._prune_feed()
        data = await crashed(engine, tmp_path / "data")
    async with opened(data) as engine:
        assert await lines(engine, "k") == [A]


async def test_an_edit_from_outside_is_told_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A]))
        following = Following(engine)
        await following.catch_up()
        cursor = engine.cursor()
        await round_of(engine)
        add(file_of(tmp_path), B)
        await looked_at(engine)
        assert await lines(engine, "k") == [A, B]
        await done(engine, Append("k", [C]))
        follower = await following.catch_up()
        await agrees(engine, follower)
        assert follower.wholes == 1
        await following.close()
    async with opened(tmp_path) as engine:
        late = Following(engine, Follower(cursor=cursor))
        assert (await late.catch_up()).sessions["k"].lines == [A, B, C]
        await late.close()


async def test_a_file_that_is_new_at_the_start_is_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A]))
        cursor = engine.cursor()
    (tmp_path / "sessions" / "new.jsonl").write_bytes(A + b"\n")
    async with opened(tmp_path) as engine:
        following = Following(engine, Follower(cursor=cursor))
        follower = await following.catch_up()
        assert follower.sessions["new"].lines == [A]
        await following.close()


async def test_a_damaged_session_is_not_told_as_anything_until_it_is_mended(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A, B]))
        following = Following(engine)
        await round_of(engine)
        file = file_of(tmp_path, "k")
        whole = file.read_bytes()
        file.write_bytes(whole.replace(A, b'{"role": "us'))
        await looked_at(engine)
        with pytest.raises(Refused):
            await lines(engine, "k")
        follower = await following.catch_up()
        assert follower.sessions == {}
        file.write_bytes(whole)
        await looked_at(engine)
        assert await lines(engine, "k") == [A, B]
        await following.catch_up()
        await agrees(engine, follower)
        await following.close()


async def test_metadata_that_no_row_repeats_makes_a_late_watcher_read_the_session(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        await done(engine, Create("k", [A], b'{"x": "%s"}' % (b"x" * 5000)))
        cursor = engine.cursor()
        await done(engine, Append("k", [B]))
        await done(engine, Append("k", [C]))
        following = Following(engine, Follower(cursor=cursor))
        follower = await following.catch_up()
        await agrees(engine, follower)
        assert follower.wholes == 1
        await following.close()


@pytest.mark.parametrize("durability", ["fsync", "os"])
async def test_cursors_after_a_kill(tmp_path: Path, durability: str) -> None:
    """What was not flushed may be gone, and its position be given out again: no old cursor counts then."""
    async with opened(tmp_path / "first", durability=durability) as engine:
        follower = Follower(cursor=engine.cursor())
        await done(engine, Append("k", [A]))
        await done(engine, Fork("f", "k"))
        await done(engine, Pop("k"))
        following = Following(engine, follower)
        await following.step()
        await following.close()
        await done(engine, Update("k", members={"x": b"1"}))
        data = await crashed(engine, tmp_path / "data")
    async with opened(data, durability=durability) as engine:
        if durability == "os":
            assert await reason(engine, follower.cursor) == "CURSOR_INVALID"
            return
        following = Following(engine, follower)
        await agrees(engine, await following.catch_up())
        await following.close()


async def test_a_lost_row_makes_older_cursors_void(tmp_path: Path) -> None:
    async with opened(tmp_path / "first") as engine:
        cursor = engine.cursor()
        await done(engine, Append("k", [A]))
        data = await crashed(engine, tmp_path / "data")
    with journal_of(data) as db:
        db.execute("UPDATE journal SET crc = crc + 1")
    async with opened(data, accept_loss=True) as engine:
        assert await reason(engine, cursor) == "CURSOR_INVALID"


async def test_a_damaged_row_of_the_feed_expires_cursors_before_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as engine:
        first = engine.cursor()
        await done(engine, Append("k", [A]))
        second = engine.cursor()
        await done(engine, Append("k", [B]))
    with journal_of(tmp_path) as db:
        db.execute("UPDATE journal SET crc = crc + 1 WHERE id = (SELECT min(id) FROM journal)")
    async with opened(tmp_path) as engine:
        assert await lines(engine, "k") == [A, B]
        assert await reason(engine, first) == "CURSOR_EXPIRED"
        assert await reason(engine, second) == ""
        await quiet(engine)


async def test_a_full_disk_puts_maintenance_off_and_ends_nothing(tmp_path: Path, monkeypatch) -> None:
    """The index of the journal's log had no room: that was taken for a failure of storage."""
    async with opened(tmp_path, **limited(age_s_max=0.0)) as engine:
        first = engine.cursor()
        await done(engine, Append("k", [A]))
        with monkeypatch.context() as full:
            full.setattr(engine._vault.journal, "_extend_index", _no_room)
            await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.guarded_round)
        assert engine._vault.backlog_bytes
        assert not engine._committer.failure
        await pruned(engine)
        assert await reason(engine, first) == "CURSOR_EXPIRED"


def _no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_disk_that_is_nearly_full_keeps_nothing_for_watchers(tmp_path: Path) -> None:
    """Deletions need the room. Who watches goes on; who comes with an old cursor is told."""
    disk = FullDisk()
    async with opened(tmp_path, disk=disk) as engine:
        cursor = engine.cursor()
        following = Following(engine, Follower(cursor=cursor))
        for _ in range(10):
            await done(engine, Append("k", [b'{"m": "%s"}' % (b"x" * 20_000)]))
        await pruned(engine)
        assert engine._vault.feed_bytes > 200_000
        assert not await reason(engine, cursor)
        await following.catch_up()
        disk.room = 2 * engine._tuning.reserve_bytes - 1
        await done(engine, Append("k", [A]))
        await pruned(engine)
        assert engine._vault.feed_bytes == 0
        await agrees(engine, await following.catch_up())
        await following.close()
        assert await reason(engine, cursor) == "CURSOR_EXPIRED"


async def test_a_log_that_does_not_fit_is_not_moved(tmp_path: Path) -> None:
    """SQLite would take what room there is, and then find out: deletions need it."""
    disk, database = FullDisk(), tmp_path / "journal.db"
    async with opened(tmp_path, disk=disk) as engine:
        for _ in range(10):
            await done(engine, Append("k", [b'{"m": "%s"}' % (b"x" * 20_000)]))
        await done(engine, Append("gone", [A]))
        before = database.stat().st_size
        disk.room = 50_000
        await pruned(engine)
        assert database.stat().st_size == before
        await done(engine, Delete("gone"))
        disk.room = None
        await pruned(engine)
        assert database.stat().st_size > before + 200_000

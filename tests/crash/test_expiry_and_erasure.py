"""Sessions that end by themselves, over crashes and restarts; and what is left of removed messages."""

import asyncio
import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from crash.disks import FullDisk
from crash.odd_daemon import odd_daemon
from daemons import Daemon, wait_until
from engines import Clock, done, lines, one, read, request
from seed_reader import read_session
from sessionstore import NotFoundError, SessionStore
from sessionstored.engine import Engine, Query, Refused, Request
from sessionstored.engine.jsonl import DEFAULT_TUNING, JsonlEngine, open_jsonl
from sessionstored.leases import Acquire, Granted
from sessionstored.retention import NEVER_US, Retention
from sessionstored.rules import Append, Create, Delete, Fork, Limits, Pop, Replace, Update

A, B = b'{"n": 1}', b'{"n": 2}'
MARK = b"zebra-in-the-attic-2087"
S = 1_000_000
# Nothing happens by itself: rounds of maintenance are asked for.
BY_HAND = replace(DEFAULT_TUNING, checkpoint_interval_s=3600, scrub_bytes_per_s_max=0)
# And nothing is kept for watchers after a checkpoint.
UNWATCHED = replace(BY_HAND, feed=replace(BY_HAND.feed, bytes_max=0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def in_s(seconds: float) -> int:
    return time.time_ns() // 1000 + int(seconds * S)


def passes(clock: Clock, seconds: float) -> None:
    clock.wall_s += seconds
    clock.steady_s += seconds


async def keys(engine: Engine) -> list[str]:
    return [head.key for head in (await engine.list(Query())).heads]


async def rounds(engine: JsonlEngine) -> None:
    """What maintenance does each time, once."""
    await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.guarded_round)


def files_with(data: Path, what: bytes) -> list[str]:
    files = (path for path in data.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(data)) for path in files if what in path.read_bytes())


async def test_what_has_expired_goes_from_a_full_disk(tmp_path: Path, clock: Clock) -> None:
    disk = FullDisk()
    engine = await open_jsonl(tmp_path, tuning=BY_HAND, disk=disk)
    await done(engine, Create("filed", [A], expire_time_us=in_s(1000)))
    await rounds(engine)
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    passes(clock, 1001)
    disk.room = 100
    await rounds(engine)
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == []
    assert await engine.count() == 0
    disk.room = None
    await engine.close()


# Restarts.


async def test_an_expire_time_is_there_after_every_kind_of_restart(tmp_path: Path, clock: Clock) -> None:
    data = tmp_path / "data"
    engine = await open_jsonl(data, tuning=BY_HAND)
    ends_us = in_s(1000)
    await done(engine, Create("k", [A], expire_time_us=ends_us))
    await done(engine, Append("pinned", [A]))
    await done(engine, Update("pinned", expire_time_us=NEVER_US))
    await rounds(engine)
    await done(engine, Append("k", [B]))
    await done(engine, Append("late", [A]))
    await done(engine, Update("late", expire_time_us=ends_us))
    killed = tmp_path / "killed"
    shutil.copytree(data, killed, ignore=shutil.ignore_patterns("LOCK", "*-shm"))
    await engine.close()
    rebuilt = tmp_path / "rebuilt"
    shutil.copytree(data, rebuilt, ignore=shutil.ignore_patterns("LOCK", "journal.db*"))
    for each in (data, killed, rebuilt):
        engine = await open_jsonl(each, tuning=BY_HAND)
        found = {key: (await read(engine, key)).head.expire_time_us for key in await keys(engine)}
        assert found == {"k": ends_us, "late": ends_us, "pinned": NEVER_US}, each.name
        assert await lines(engine, "k") == [A, B]
        await engine.close()
        seed = {path.stem: read_session(path) for path in (each / "sessions").glob("*.jsonl")}
        assert {key: session and len(session.messages) for key, session in seed.items()} == {
            "k": 2, "late": 1, "pinned": 1,
        }  # fmt: skip


async def test_what_was_gone_when_its_lease_ran_out_does_not_come_back(tmp_path: Path, clock: Clock) -> None:
    data = tmp_path / "data"
    engine = await open_jsonl(data, tuning=BY_HAND)
    await done(engine, Create("filed", [A], expire_time_us=in_s(1000)))
    await rounds(engine)
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    passes(clock, 990)
    for key in ("k", "filed"):
        assert isinstance((await one(engine, Request(Acquire(key, "holder", 60.0)))).outcome, Granted)
    passes(clock, 100)
    for step in range(2):
        seen = await keys(engine)
        killed = tmp_path / f"killed{step}"
        shutil.copytree(data, killed, ignore=shutil.ignore_patterns("LOCK", "*-shm"))
        again = await open_jsonl(killed, tuning=BY_HAND)
        assert set(await keys(again)) <= set(seen)
        await again.close()
        await rounds(engine)
    assert await keys(engine) == []
    await engine.close()


async def test_rows_that_are_kept_over_a_restart_are_erased_in_their_time(
    tmp_path: Path, clock: Clock
) -> None:
    kept_s = replace(BY_HAND, feed=replace(BY_HAND.feed, age_s_max=100))
    engine = await open_jsonl(tmp_path, tuning=kept_s)
    await done(engine, Append("k", [b'{"x": "' + MARK + b'"}']))
    await done(engine, Delete("k"))
    await engine.close()
    assert files_with(tmp_path, MARK) == ["journal.db"]  # for watchers
    engine = await open_jsonl(tmp_path, tuning=kept_s)
    passes(clock, 101)
    for _ in range(2):  # and nobody writes
        await rounds(engine)
    assert files_with(tmp_path, MARK) == []
    await engine.close()


async def test_hours_of_service_without_a_write_count(tmp_path: Path, clock: Clock) -> None:
    engine = await open_jsonl(tmp_path, tuning=UNWATCHED)
    await done(engine, Append("k", [b'{"x": "' + MARK + b'"}']))
    await one(engine, request(Pop("k"), 1))
    await rounds(engine)
    for _ in range(3):
        assert files_with(tmp_path, MARK) == ["journal.db"]  # for a copy of the call
        passes(clock, 10 * 3600)
        await engine.close()
        engine = await open_jsonl(tmp_path, tuning=UNWATCHED)
    await rounds(engine)
    assert files_with(tmp_path, MARK) == []
    await engine.close()


async def test_what_expired_while_no_daemon_ran_is_gone_at_the_start(tmp_path: Path, clock: Clock) -> None:
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    await done(engine, Append("other", [A]))
    await engine.close()
    passes(clock, 2000)
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    assert await keys(engine) == ["other"]
    await rounds(engine)
    assert [path.name for path in (tmp_path / "sessions").glob("*.jsonl")] == ["other.jsonl"]
    assert await engine.count() == 1
    await engine.close()


async def test_a_clock_that_jumped_while_no_daemon_ran_ends_nothing(tmp_path: Path, clock: Clock) -> None:
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    await done(engine, Create("k", [A], expire_time_us=in_s(5000)))
    await engine.close()
    clock.wall_s += 86400
    for _ in range(3):  # half an hour of service each; the time between is none
        engine = await open_jsonl(tmp_path, tuning=BY_HAND)
        assert await lines(engine, "k") == [A]
        assert engine.disbelief() is not None
        await rounds(engine)
        assert await keys(engine) == ["k"]
        passes(clock, 1100)
        await engine.close()
        passes(clock, 100)
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    passes(clock, 600)
    assert await keys(engine) == []
    assert engine.disbelief() is None
    await engine.close()


async def test_a_rebuilt_journal_does_not_trust_a_clock_far_ahead(tmp_path: Path, clock: Clock) -> None:
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    await engine.close()
    for path in tmp_path.glob("journal.db*"):
        path.unlink()
    clock.wall_s += 86400
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    assert await lines(engine, "k") == [A]
    passes(clock, 3700)
    assert await keys(engine) == []
    await engine.close()


async def test_rules_that_change_count_for_what_is_stored(tmp_path: Path, clock: Clock) -> None:
    def limits(**ages_s: int) -> Limits:
        return Limits(retention=Retention.of({f"{name}:": age_s for name, age_s in ages_s.items()}))

    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    for key in ("a:1", "a:x:1", "b:1", "c"):
        await done(engine, Append(key, [A]))
    await done(engine, Create("a:own", [A], expire_time_us=in_s(10**7)))
    await engine.close()
    passes(clock, 5000)
    for ages_s, left in (
        ({"a": 10_000}, ["a:1", "a:own", "a:x:1", "b:1", "c"]),
        ({"a": 1000, "a:x": 0}, ["a:own", "a:x:1", "b:1", "c"]),
        ({}, ["a:own", "a:x:1", "b:1", "c"]),
        ({"a": 1000, "b": 10_000}, ["a:own", "b:1", "c"]),
    ):
        engine = await open_jsonl(tmp_path, tuning=BY_HAND, limits=limits(**ages_s))
        await rounds(engine)
        assert await keys(engine) == left
        on_disk = {path.name for path in (tmp_path / "sessions").glob("*.jsonl")}
        assert len(on_disk) == len(left)
        await engine.close()


async def test_a_damaged_session_does_not_expire(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "sessions").mkdir()
    header = {"_type": "metadata", "key": "k", "expires_at": "2024-06-01T10:00:00+00:00"}
    file = tmp_path / "sessions" / "k.jsonl"
    file.write_bytes(json.dumps(header).encode() + b"\n{broken\n" + A + b"\n")
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    passes(clock, 4000)
    await rounds(engine)
    assert await keys(engine) == ["k"]
    with pytest.raises(Refused) as told:
        await read(engine, "k")
    assert told.value.refusal.reason == "DATA_LOSS"
    await done(engine, Delete("k"))
    await engine.close()
    assert not file.exists()


async def test_an_edit_that_does_not_know_of_the_time_keeps_it(tmp_path: Path, clock: Clock) -> None:
    engine = await open_jsonl(tmp_path, tuning=BY_HAND)
    ends_us = in_s(1000)
    await done(engine, Create("k", [A], expire_time_us=ends_us))
    await rounds(engine)
    file = tmp_path / "sessions" / "k.jsonl"
    header = json.loads(file.read_bytes().splitlines()[0])
    assert header.pop("expires_at")
    file.write_bytes(json.dumps(header).encode() + b"\n" + A + b"\n" + B + b"\n")
    await rounds(engine)
    await rounds(engine)  # the sweep that looks for edits begins anew
    assert await lines(engine, "k") == [A, B]
    assert (await read(engine, "k")).head.expire_time_us == ends_us
    await done(engine, Append("k", [B]))
    await rounds(engine)
    assert b'"expires_at"' in file.read_bytes()
    header["expires_at"] = None  # somebody who knows
    file.write_bytes(json.dumps(header).encode() + b"\n" + A + b"\n" + B + b"\n" + B + b"\n")
    await rounds(engine)
    await rounds(engine)  # the sweep that looks for edits begins anew
    assert await lines(engine, "k") == [A, B, B]
    assert (await read(engine, "k")).head.expire_time_us == NEVER_US
    await engine.close()


# Real daemons.


def test_a_killed_daemon_ends_what_it_should_and_nothing_else(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    daemon = Daemon(tmp_path, store="jsonl", flags=("--expire", "tmp:=2s", "--checkpoint-s-max", "0.1"))
    try:
        kept: dict[str, int] = {}
        for _ in range(4):
            daemon.start()
            with SessionStore(daemon.address) as store:
                for n in range(20):
                    store.session(f"tmp:{rng.randrange(8)}").append({"n": n})
                    key = f"kept:{rng.randrange(8)}"
                    kept[key] = kept.get(key, 0) + 1
                    store.session(key).append({"n": n})
                    time.sleep(rng.random() * 0.02)
            daemon.kill()
        daemon.start()
        with SessionStore(daemon.address) as store:
            wait_until(lambda: not list(store.list("tmp:")), what="the end of the sessions")
            assert {head.key: head.message_count for head in store.list()} == kept
            wait_until(
                lambda: len(list((tmp_path / "sessions").glob("*.jsonl"))) == len(kept), what="the sweep"
            )
    finally:
        daemon.close()


def unshared(steady_s: int) -> tuple[str, ...]:
    return ("unshare", "-T", "--boottime", str(steady_s), "--monotonic", str(steady_s), "--")


@pytest.fixture
def time_namespaces() -> None:
    probe = subprocess.run([*unshared(1), "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"time namespaces are not allowed here: {probe.stderr.decode().strip()}")


def daemons_under(data: Path, *shifts: tuple[int, int]) -> Iterator[Daemon]:
    """Daemons on one directory, one after the other, under shifts of the wall clock and of the steady one."""
    for wall_s, steady_s in shifts:
        launcher = (*unshared(steady_s), *odd_daemon("--wall-shift-s", str(wall_s)))
        daemon = Daemon(data, store="jsonl", launcher=launcher, flags=("--expiry-confirm-s-min", "2"))
        daemon.start()
        try:
            yield daemon
            assert daemon.terminate() == 0
        finally:
            daemon.close()


@pytest.mark.usefixtures("time_namespaces")
def test_daemons_under_shifted_clocks_expire_late_and_never_early(tmp_path: Path) -> None:
    day = 86400
    now = time.time()
    ends = datetime.fromtimestamp(now + 5 * day, UTC)
    daemons = daemons_under(tmp_path, (0, 0), (10 * day, 0), (-10 * day, 0), (0, 0), (10 * day, 10 * day))
    with SessionStore(next(daemons).address) as store:
        store.create("k", [{"n": 1}], expires=ends)
    with SessionStore(next(daemons).address) as store:  # the clock jumped, and is confirmed after two seconds
        told = store.info().clock_disbelief
        assert told is None or told.ahead.days >= 9
        wait_until(lambda: store.info().clock_disbelief is None, what="the confirmation")
        assert store.get("k") is None
        store.create("k", [{"n": 2}], expires=datetime.fromtimestamp(now + 15 * day, UTC))
    with SessionStore(next(daemons).address) as store:  # it went back: believed at once
        assert store.info().clock_disbelief is None
        assert store.get("k") is not None
    with SessionStore(next(daemons).address) as store:
        assert store.get("k") is not None
    with SessionStore(next(daemons).address) as store:  # ten days went by, on both clocks
        assert store.get("k") is not None
    assert next(daemons, None) is None


# Erasure.


async def fill(engine: JsonlEngine) -> None:
    """Sessions with the mark: in small and large messages, metadata, a fork, a popped and a replaced one."""
    await done(engine, Append("other", [A, B]))
    marked, big = b'{"m": "%s"}' % MARK, b'{"m": "%s"}' % (MARK * 5000)
    for key in ("small", "large", "ends"):
        messages = [A, marked, *([big] if key == "large" else [])]
        ends_us = in_s(1000) if key == "ends" else 0
        await done(engine, Create(key, messages, marked, expire_time_us=ends_us))
    await done(engine, Fork("fork", "small"))
    await done(engine, Append("popped", [A, marked]))
    await done(engine, Append("replaced", [marked, A]))


@pytest.mark.parametrize("checkpoints", [0, 1, 2])
async def test_nothing_is_left_one_checkpoint_after_the_removal(
    tmp_path: Path, clock: Clock, checkpoints: int
) -> None:
    """However much of it the session files and the journal had before."""
    engine = await open_jsonl(tmp_path, tuning=UNWATCHED)
    await fill(engine)
    for n in range(checkpoints):
        await rounds(engine)
        await done(engine, Append("large", [b'{"m": "%s %d"}' % (MARK, n)]))
    for key in ("small", "large", "fork"):
        await done(engine, Delete(key))
    popped = request(Pop("popped"), 1)
    assert MARK in str((await one(engine, popped)).outcome).encode()
    await done(engine, Replace("replaced", 0, 1, []))
    passes(clock, 2000)
    assert files_with(tmp_path, MARK)
    await rounds(engine)
    # The answer of the pop is kept for a call that is sent again, and no longer than its window.
    assert files_with(tmp_path, MARK) == ["journal.db"]
    assert MARK in str((await one(engine, popped)).outcome).encode()
    passes(clock, 24 * 3600 + 3601)
    await rounds(engine)
    assert files_with(tmp_path, MARK) == []
    assert await keys(engine) == ["other", "popped", "replaced"]
    assert await lines(engine, "other") == [A, B]
    await engine.close()
    assert files_with(tmp_path, MARK) == []


async def test_what_was_removed_before_a_crash_is_erased_after_it(tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    engine = await open_jsonl(data, tuning=UNWATCHED)
    await fill(engine)
    await rounds(engine)
    for key in ("small", "large", "fork", "popped", "replaced", "ends"):
        await done(engine, Delete(key))
    await done(engine, Append("other", [A]))  # its catalogue row shares a page with those
    shutil.copytree(data, copy, ignore=shutil.ignore_patterns("LOCK", "*-shm"))
    await engine.close()
    assert files_with(copy, MARK)
    engine = await open_jsonl(copy, tuning=UNWATCHED)  # the first round comes before anybody is served
    assert files_with(copy, MARK) == []
    assert await keys(engine) == ["other"]
    await engine.close()


async def test_erasing_waits_for_a_backup_and_holds_nobody_up(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await open_jsonl(tmp_path, tuning=UNWATCHED)
    await fill(engine)
    journal = engine._vault.journal
    snapshot = journal.snapshot()
    snapshot.begin()
    patience: list[bool] = []
    empty_log = journal.wal_checkpoint

    def spied(*, wait: bool = True) -> bool:
        patience.append(wait)
        return empty_log(wait=wait)

    monkeypatch.setattr(journal, "wal_checkpoint", spied)
    for key in ("small", "large", "fork", "popped", "replaced"):
        await done(engine, Delete(key))
    passes(clock, 2000)
    await rounds(engine)
    assert files_with(tmp_path, MARK)  # the copy that is being made needs it
    assert patience
    assert not any(patience)  # the committer does not wait for who reads the log
    await done(engine, Append("other", [A]))
    snapshot.close()
    await rounds(engine)
    assert files_with(tmp_path, MARK) == []
    await engine.close()


def test_nothing_is_left_by_a_daemon_after_the_stated_bound(tmp_path: Path) -> None:
    """Two checkpoints after a removal, with a daemon that nobody calls meanwhile."""
    daemon = Daemon(tmp_path, store="jsonl", flags=("--checkpoint-s-max", "0.2", "--feed-age-s-max", "1"))
    daemon.start()
    try:
        with SessionStore(daemon.address) as store:
            store.session("k").append(*[{"m": MARK.decode() * n} for n in (1, 10, 1000)])
            store.session("other").append({"n": 1})
            wait_until(lambda: files_with(tmp_path, MARK) != [], what="the file")
            store.create("ends", [{"m": MARK.decode()}], expires=timedelta(seconds=1))
            store.delete("k")
            with pytest.raises(NotFoundError):
                store.delete("k")
        wait_until(lambda: files_with(tmp_path, MARK) == [], what="the erasure")
    finally:
        daemon.close()

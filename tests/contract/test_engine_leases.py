"""What every engine must do with leases: one holder at a time, fenced writes, and the same over a restart."""

import asyncio
import random
import shutil
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from engines import DURABLE_KINDS, STRAINED, Clock, done, lines, one, open_kind, read, request
from followers import Following
from sessionstored.engine import Engine, Reply, Request
from sessionstored.engine.events import Changed, LeaseTold
from sessionstored.engine.jsonl import DEFAULT_TUNING, JsonlEngine, open_jsonl
from sessionstored.engine.jsonl.records import LeaseRecord, read_row
from sessionstored.engine.memory import MemoryEngine
from sessionstored.leases import Acquire, Granted, Lease, LeaseEvent, Release, Released, Renew
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Fork,
    Limits,
    Mutation,
    Pop,
    Refusal,
    Replace,
    Update,
)

A, B = b'{"role":"user","content":"a"}', b'{"role":"user","content":"b"}'


async def acquire(engine: Engine, key: str = "k", holder: str = "me", ttl_s: float = 60.0, **named) -> Lease:
    reply = await one(engine, Request(Acquire(key, holder, ttl_s, **named)))
    assert isinstance(reply.outcome, Granted), reply
    return reply.outcome.lease


async def reason(engine: Engine, mutation, token: int = 0, **named) -> str:
    """Why it is refused; "" if it is not."""
    reply = await one(engine, Request(mutation, fencing_token=token, **named))
    return reply.outcome.reason if isinstance(reply.outcome, Refusal) else ""


async def test_a_lease_is_had_by_one_at_a_time(engine: Engine) -> None:
    assert await engine.lease("k") is None
    lease = await acquire(engine)
    assert await engine.lease("k") == lease
    assert await reason(engine, Acquire("k", "me", 60.0)) == "LEASE_HELD", "the name gives no right"
    assert await engine.lease("other") is None
    other = await acquire(engine, "other")
    assert other.token > lease.token
    assert await engine.count() == 0, "a lease makes no session"


async def test_others_do_not_write_meanwhile(engine: Engine) -> None:
    await done(engine, Append("k", [A]))
    lease = await acquire(engine)
    writes: list[Mutation] = [
        Append("k", [B]), Replace("k", 0, None, [B]), Pop("k"), Update("k", metadata=b'{"a":1}'), Delete("k"),
        Create("k"),
    ]  # fmt: skip
    for write in writes:
        assert await reason(engine, write) == "LEASE_HELD", write
        assert await reason(engine, write, lease.token + 1) == "LEASE_LOST", write
    assert await lines(engine, "k") == [A]
    for write in writes[:-2]:
        assert await reason(engine, write, lease.token) == "", write
    assert await reason(engine, Create("k"), lease.token) == "SESSION_EXISTS"
    assert await reason(engine, Delete("k"), lease.token) == ""
    assert await engine.lease("k") == lease, "deleting a session does not end its lease"
    assert await reason(engine, Append("k", [A])) == "LEASE_HELD"
    assert await reason(engine, Append("k", [A]), lease.token) == ""


async def test_others_may_append_if_the_holder_lets_them(engine: Engine) -> None:
    lease = await acquire(engine, appends_allowed=True)
    assert await reason(engine, Append("k", [A])) == ""
    assert await reason(engine, Pop("k")) == "LEASE_HELD"
    assert await reason(engine, Pop("k"), lease.token) == ""


async def test_a_fork_is_a_write_to_the_new_session_only(engine: Engine) -> None:
    await done(engine, Append("k", [A]))
    await acquire(engine)
    assert await reason(engine, Fork("copy", "k")) == ""
    lease = await acquire(engine, "copy 2")
    assert await reason(engine, Fork("copy 2", "k")) == "LEASE_HELD"
    assert await reason(engine, Fork("copy 2", "k"), lease.token) == ""
    assert await lines(engine, "copy 2") == [A]


async def test_leases_do_not_move_the_revision(engine: Engine) -> None:
    answer = await done(engine, Append("k", [A]))
    lease = await acquire(engine)
    await one(engine, Request(Renew("k", lease.token)))
    await one(engine, Request(Release("k", lease.token)))
    assert (await read(engine, "k")).head.revision == answer.revision
    after = await done(engine, Append("k", [B], expected_revision=answer.revision))
    assert after.previous_revision == answer.revision


async def test_a_release_lets_others_in_and_may_be_sent_again(engine: Engine) -> None:
    lease = await acquire(engine)
    assert await one(engine, Request(Release("k", lease.token + 1))) == Reply(Released(False))
    assert await one(engine, Request(Release("k", lease.token))) == Reply(Released(True))
    assert await one(engine, Request(Release("k", lease.token))) == Reply(Released(False))
    assert await engine.lease("k") is None
    assert await reason(engine, Append("k", [A]), lease.token) == "LEASE_LOST"
    assert await reason(engine, Append("k", [A])) == ""
    assert (await acquire(engine)).token > lease.token


async def test_it_runs_out_and_a_late_write_is_refused_although_nobody_took_over(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    lease = await acquire(engine, ttl_s=60.0)
    clock.steady_s = 50
    assert await reason(engine, Append("k", [A]), lease.token) == ""
    clock.steady_s = 61
    assert await engine.lease("k") is None
    assert await reason(engine, Append("k", [A]), lease.token) == "LEASE_LOST"
    assert await reason(engine, Renew("k", lease.token)) == "LEASE_LOST"
    assert await one(engine, Request(Release("k", lease.token))) == Reply(Released(False))
    taken = await acquire(engine, holder="other")
    assert await reason(engine, Append("k", [A]), lease.token) == "LEASE_LOST"
    assert await reason(engine, Append("k", [B]), taken.token) == ""
    assert await lines(engine, "k") == [A, B]


async def test_renewed_it_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lease = await acquire(engine, ttl_s=60.0)
    for steady_s in (50, 100, 150):
        clock.steady_s = steady_s
        reply = await one(engine, Request(Renew("k", lease.token)))
        assert isinstance(reply.outcome, Granted)
        assert reply.outcome.lease.token == lease.token
        assert 59 < reply.outcome.lease.remaining_s(engine.clock_s()) <= 60
    assert await reason(engine, Acquire("k", "other", 60.0)) == "LEASE_HELD"
    assert await reason(engine, Renew("k", lease.token + 1)) == "LEASE_LOST"


async def test_no_wall_clock_ends_a_lease(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lease = await acquire(engine, ttl_s=60.0)
    for years in (-30, 30):
        clock.wall_s = years * 365.25 * 86400
        assert await reason(engine, Append("k", [A])) == "LEASE_HELD"
        assert await reason(engine, Append("k", [A]), lease.token) == ""
    clock.wall_s, clock.steady_s = 0, 61
    assert await reason(engine, Append("k", [A])) == ""


async def test_within_one_group_each_sees_what_the_one_before_left(engine: Engine) -> None:
    first = (await acquire(engine)).token
    replies = await engine.submit(
        [
            Request(Append("k", [A])),
            Request(Release("k", first)),
            Request(Append("k", [A])),
            Request(Acquire("k", "other", 60.0)),
            Request(Acquire("k", "third", 60.0)),
            Request(Append("k", [B])),
            Request(Append("k", [B]), fencing_token=first),
        ]
    )
    outcomes = [
        each.outcome.reason if isinstance(each.outcome, Refusal) else type(each.outcome).__name__
        for each in replies
    ]
    assert outcomes == [
        "LEASE_HELD", "Released", "Answer", "Granted", "LEASE_HELD", "LEASE_HELD", "LEASE_LOST",
    ]  # fmt: skip
    assert (await engine.lease("k")).holder == "other"
    assert await lines(engine, "k") == [A]


async def test_a_call_that_is_sent_again_gets_the_same_lease(engine: Engine) -> None:
    asked = request(Acquire("k", "me", 60.0), 1)
    first = await one(engine, asked)
    assert isinstance(first.outcome, Granted)
    assert await one(engine, asked) == Reply(first.outcome, replayed=True)
    await one(engine, Request(Release("k", first.outcome.lease.token)))
    assert await one(engine, asked) == Reply(first.outcome, replayed=True)
    assert await engine.lease("k") is None, "it is over, and was acquired no second time"
    reused = await one(engine, request(Acquire("k", "you", 60.0), 1))
    assert isinstance(reused.outcome, Refusal)
    assert reused.outcome.reason == "CALL_REUSED"


async def test_of_one_who_waits_only_the_last_refusal_is_remembered(engine: Engine) -> None:
    lease = await acquire(engine)
    waits, last = request(Append("k", [A]), 1, waiting=True), request(Append("k", [A]), 1)
    for asked in (waits, waits, last):
        refused = await one(engine, asked)
        assert isinstance(refused.outcome, Refusal)
        assert refused.outcome.reason == "LEASE_HELD"
    await one(engine, Request(Release("k", lease.token)))
    assert await one(engine, waits) == refused, "its caller was told no"
    again = await one(engine, request(Append("k", [B]), 2, waiting=True))
    assert isinstance(again.outcome, Answer)
    assert await lines(engine, "k") == [B]


async def test_a_free_lease_is_theirs_who_wait(engine: Engine) -> None:
    assert await reason(engine, Acquire("k", "me", 60.0), behind="first") == "LEASE_HELD"
    assert await engine.lease("k") is None


async def test_a_lease_goes_before_existence_and_revision(engine: Engine) -> None:
    await acquire(engine)
    assert await reason(engine, Pop("k")) == "LEASE_HELD"
    assert await reason(engine, Append("k", [A], expected_revision=7)) == "LEASE_HELD"


@pytest.mark.parametrize("kind", ["memory", "jsonl"])
async def test_leases_are_bounded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    limits = Limits(leases_max=3)
    engine: Engine = (
        MemoryEngine(limits, clock_s=lambda: 1000.0 + clock.steady_s)
        if kind == "memory"
        else await open_jsonl(tmp_path, limits=limits, tuning=STRAINED)
    )
    try:
        first = [await acquire(engine, f"k{n}") for n in range(3)]
        asked = request(Acquire("more", "me", 60.0), 1)
        refused = await one(engine, asked)
        assert isinstance(refused.outcome, Refusal)
        assert (refused.outcome.reason, refused.outcome.metadata) == ("OVERLOADED", {"limit": "3"})
        await one(engine, Request(Release("k0", first[0].token)))
        assert isinstance((await one(engine, asked)).outcome, Granted), "it was not remembered"
        clock.steady_s = 61
        await acquire(engine, "k2")
        for n in range(2):
            await acquire(engine, f"later {n}")
        assert await reason(engine, Acquire("more", "me", 60.0)) == "OVERLOADED"
    finally:
        await engine.close()


@pytest.mark.parametrize("write", [False, True])
async def test_watchers_are_told_of_a_lease_that_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: bool
) -> None:
    clock = Clock(monkeypatch)
    engine = await open_jsonl(tmp_path, tuning=replace(DEFAULT_TUNING, checkpoint_interval_s=3600))
    watcher = engine.watch("", (), b"")
    lease = await acquire(engine)
    if write:  # so that there is a checkpoint
        await done(engine, Append("other", [A]))
    clock.steady_s = 61
    await asyncio.get_running_loop().run_in_executor(None, engine._maintenance.guarded_round)
    await done(engine, Append("k", [B]))
    told: list[tuple[int, bool]] = []
    async with asyncio.timeout(60), aclosing(watcher.batches(60.0)) as batches:
        async for batch in batches:
            leases = [event.what for event in batch.events if isinstance(event.what, LeaseTold)]
            told += [(each.lease.token, each.ended) for each in leases]
            if any(event.key == "k" and isinstance(event.what, Changed) for event in batch.events):
                break
    watcher.close()
    await engine.close()
    assert told == [(lease.token, False), (lease.token, True)]


async def test_keys_that_no_session_has_do_not_stay_in_memory(tmp_path: Path) -> None:
    engine = await open_jsonl(tmp_path, tuning=replace(DEFAULT_TUNING, hot_sessions_max=10))
    for n in range(300):
        await acquire(engine, f"leased {n}")
        assert await reason(engine, Delete(f"missing {n}")) == "SESSION_NOT_FOUND"
    assert len(engine._vault.states) <= 11
    await engine.close()


# Over a restart.


async def reopened(engine: Engine, kind: str, data: Path) -> Engine:
    await engine.close()
    return await open_kind(kind, data)


@pytest.mark.parametrize("kind", DURABLE_KINDS)
async def test_after_a_restart_each_has_its_full_ttl_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    engine = await open_kind(kind, tmp_path)
    try:
        lease = await acquire(engine, ttl_s=60.0, appends_allowed=True)
        asked = request(Acquire("called", "me", 60.0), 1)
        called = await one(engine, asked)
        released = await acquire(engine, "released")
        await one(engine, Request(Release("released", released.token)))
        clock.steady_s = 55
        engine = await reopened(engine, kind, tmp_path)
        now = await engine.lease("k")
        assert now is not None
        assert 59 < now.remaining_s(engine.clock_s()) <= 60
        assert now == replace(lease, expires_s=now.expires_s), "all but its end is as it was"
        assert 55 <= engine.clock_s() - now.acquired_s < 59, "its age is not that of the daemon"
        assert await one(engine, asked) == Reply(called.outcome, replayed=True)
        assert await engine.lease("released") is None
        clock.steady_s = 110
        assert await reason(engine, Pop("k")) == "LEASE_HELD"
        assert (await acquire(engine, "new")).token > released.token
        clock.steady_s = 120
        assert await engine.lease("k") is None
    finally:
        await engine.close()


async def test_a_lease_that_ran_out_does_not_come_back_once_it_mattered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash gives each lease its full ttl again: not one after whose end others have written."""
    clock = Clock(monkeypatch)
    engine = await open_jsonl(tmp_path / "data", tuning=replace(DEFAULT_TUNING, checkpoint_interval_s=3600))
    try:
        await acquire(engine, "untouched", ttl_s=60.0)
        leases = {key: await acquire(engine, key, ttl_s=60.0) for key in ("written", "told")}
        clock.steady_s = 61
        await done(engine, Append("written", [A]))
        assert await reason(engine, Append("told", [A]), leases["told"].token) == "LEASE_LOST"
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "data", copy, ignore=shutil.ignore_patterns("LOCK", "*-shm"))
        await engine.close()
        engine = await open_jsonl(copy)
        assert await engine.lease("untouched") is not None
        for key, lease in leases.items():
            assert await engine.lease(key) is None
            assert await reason(engine, Append(key, [B]), lease.token) == "LEASE_LOST"
    finally:
        await engine.close()


async def test_the_feed_has_what_became_of_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    engine = await open_jsonl(tmp_path)
    try:
        lease = await acquire(engine, ttl_s=60.0)
        await one(engine, Request(Renew("k", lease.token)))
        await one(engine, Request(Release("k", lease.token)))
        lapsing = await acquire(engine, ttl_s=60.0)
        clock.steady_s = 61
        taken = await acquire(engine)
        assert isinstance(engine, JsonlEngine)
        records = [
            record
            for _, _, body, whole in engine._vault.journal.rows(0)
            for record in read_row(body)
            if isinstance(record, LeaseRecord) and whole
        ]
        assert [(record.event, record.lease.token) for record in records] == [
            (LeaseEvent.ACQUIRED, lease.token),
            (LeaseEvent.RELEASED, lease.token),
            (LeaseEvent.ACQUIRED, lapsing.token),
            (LeaseEvent.LAPSED, lapsing.token),
            (LeaseEvent.ACQUIRED, taken.token),
        ]
        assert records[0].lease == lease
    finally:
        await engine.close()


async def test_a_watcher_is_told_of_a_lease_that_nobody_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sweep forgets has ended for watchers, too."""
    clock = Clock(monkeypatch)
    engine = await open_jsonl(tmp_path)
    try:
        following = Following(engine)
        lease = await acquire(engine, ttl_s=60.0)
        clock.steady_s = 61
        assert isinstance(engine, JsonlEngine)
        await asyncio.to_thread(engine._maintenance.guarded_round)
        follower = await following.catch_up()
        told = [(each.fencing_token, ended) for _, _, each, ended in follower.order if each is not None]
        assert told == [(lease.token, False), (lease.token, True)]
        await following.close()
    finally:
        await engine.close()


@pytest.mark.parametrize("kind", ["memory", *DURABLE_KINDS])
async def test_random_histories_never_have_two_holders(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a naive model, with clocks that go on and, for engines on disk, restarts."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    clock = Clock(monkeypatch)
    engine = await open_kind(kind, tmp_path)
    holder: tuple[int, float] | None = None  # token, until when by `clock.steady_s`
    tokens = [0]
    try:
        for step in range(300):
            # In steps of ten, so that what little time passes by itself decides nothing.
            clock.steady_s += rng.choice((0, 0, 10, 20))
            in_force = holder is not None and clock.steady_s < holder[1]
            token = rng.choice(tokens[-3:])
            match rng.choice(("acquire", "renew", "release", "write", "plain", "restart")):
                case "acquire":
                    reply = await one(engine, Request(Acquire("k", "me", 25.0)))
                    assert isinstance(reply.outcome, Granted) != in_force, step
                    if isinstance(reply.outcome, Granted):
                        assert reply.outcome.lease.token > max(tokens)
                        tokens.append(reply.outcome.lease.token)
                        holder = (tokens[-1], clock.steady_s + 25)
                case "renew":
                    renewed = not await reason(engine, Renew("k", token))
                    assert renewed == (in_force and holder[0] == token), step
                    if renewed:
                        holder = (token, clock.steady_s + 25)
                case "release":
                    reply = await one(engine, Request(Release("k", token)))
                    assert reply.outcome == Released(in_force and holder[0] == token), step
                    holder = None if reply.outcome == Released(True) else holder
                case "write":
                    written = not await reason(engine, Append("k", [A]), token)
                    mine = in_force and holder[0] == token
                    assert written == (mine if token else not in_force), step
                case "plain":
                    assert await reason(engine, Append("k", [A])) == ("LEASE_HELD" if in_force else ""), step
                case "restart" if kind != "memory" and rng.random() < 0.3 and in_force:
                    engine = await reopened(engine, kind, tmp_path)
                    holder = (holder[0], clock.steady_s + 25)
    finally:
        await engine.close()

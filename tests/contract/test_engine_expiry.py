"""Sessions that end by themselves, on every engine: nobody sees them any more, and nothing else ends."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from engines import KINDS, Clock, done, lines, one, open_kind, read, refused, request, submit
from hypothesis import given, settings
from hypothesis import strategies as st
from sessionstored.engine import Engine, Order, Query, Refused, Request
from sessionstored.engine.events import Event
from sessionstored.leases import Acquire, Granted, Release, Released
from sessionstored.retention import NEVER_US, Retention
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Expire,
    Fork,
    Limits,
    Mutation,
    Pop,
    Refusal,
    Replace,
    Update,
)

A, B = b'{"n": 1}', b'{"n": 2}'
RULES = Limits(retention=Retention.of({"tmp:": 10_000, "tmp:keep:": 0}))
S = 1_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(params=KINDS)
async def engine(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Engine]:
    opened = await open_kind(request.param, tmp_path, RULES)
    yield opened
    await opened.close()


def in_s(seconds: float) -> int:
    return time.time_ns() // 1000 + int(seconds * S)


def passes(clock: Clock, seconds: float) -> None:
    """Time goes by, on both clocks."""
    clock.wall_s += seconds
    clock.steady_s += seconds


async def keys(engine: Engine, order: Order = Order.KEY) -> list[str]:
    return [head.key for head in (await engine.list(Query(order=order))).heads]


async def is_gone(engine: Engine, key: str) -> bool:
    with pytest.raises(Refused) as told:
        await read(engine, key)
    return told.value.refusal.reason == "SESSION_NOT_FOUND"


async def test_an_expired_session_is_gone_for_everybody(engine: Engine, clock: Clock) -> None:
    made = await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    await done(engine, Append("other", [A]))
    passes(clock, 900)
    assert await lines(engine, "k") == [A]
    passes(clock, 200)
    assert await is_gone(engine, "k")
    for order in Order:
        assert await keys(engine, order) == ["other"]
    for mutation in (Pop("k"), Delete("k"), Update("k", last_consolidated=0), Fork("copy", "k"),
                     Replace("k", 0, 1, [B])):  # fmt: skip
        assert (await refused(engine, mutation)).reason == "SESSION_NOT_FOUND"
    stale = await refused(engine, Append("k", [B], expected_revision=made.revision))
    assert (stale.reason, stale.metadata["revision"]) == ("REVISION_CONFLICT", "0")


@pytest.mark.parametrize(
    "mutation",
    [Append("k", [B]), Create("k", [B]), Fork("k", "other"), Append("k", [B], expected_revision=0)],
)
async def test_a_new_session_begins_where_one_expired(
    engine: Engine, clock: Clock, mutation: Mutation
) -> None:
    await done(engine, Append("other", [B]))
    old = await done(engine, Create("k", [A, A], b'{"a": 1}', 1, expire_time_us=in_s(1000)))
    passes(clock, 1001)
    new = await done(engine, mutation)
    assert new.revision > old.revision
    assert (new.previous_revision, new.message_count, new.ends_us) == (0, 1, 0)
    found = await read(engine, "k")
    assert (list(found.lines), found.head.last_consolidated, found.head.expire_time_us) == ([B], 0, 0)
    assert found.head.create_time_us >= in_s(-60)


async def test_an_own_time_is_kept_over_changes_and_can_be_changed(engine: Engine, clock: Clock) -> None:
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    await done(engine, Append("k", [A, B]))
    await done(engine, Pop("k"))
    await done(engine, Update("k", metadata=b'{"a": 1}'))
    found = (await read(engine, "k")).head
    assert found.expire_time_us > in_s(900)
    later = in_s(3000)
    answer = await done(engine, Update("k", expire_time_us=later))
    assert answer.ends_us == later
    passes(clock, 2000)
    assert await lines(engine, "k") == [A, A]
    await done(engine, Update("k", expire_time_us=NEVER_US))
    passes(clock, 2000)
    assert await lines(engine, "k") == [A, A]
    past = await refused(engine, Update("k", expire_time_us=in_s(-1)))
    assert (past.reason, past.metadata["field"]) == ("ARGUMENT_INVALID", "expire_time")
    await done(engine, Fork("copy", "k"))
    assert (await read(engine, "copy")).head.expire_time_us == 0


async def test_a_rule_counts_from_the_last_change(engine: Engine, clock: Clock) -> None:
    first = await done(engine, Append("tmp:a", [A]))
    assert first.ends_us == first.update_time_us + 10_000 * S
    for key in ("tmp:keep:a", "tm"):
        assert (await done(engine, Append(key, [A]))).ends_us == 0
    await done(engine, Create("tmp:own", [A], expire_time_us=in_s(100_000)))
    await done(engine, Create("tmp:never", [A]))
    await done(engine, Update("tmp:never", expire_time_us=NEVER_US))
    passes(clock, 9000)
    await done(engine, Append("tmp:a", [B]))
    passes(clock, 9000)
    assert await lines(engine, "tmp:a") == [A, B]
    passes(clock, 2000)
    assert await keys(engine) == ["tm", "tmp:keep:a", "tmp:never", "tmp:own"]


async def test_a_lease_makes_the_end_wait(engine: Engine, clock: Clock) -> None:
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    passes(clock, 990)
    granted = (await one(engine, Request(Acquire("k", "holder", 60.0)))).outcome
    assert isinstance(granted, Granted)
    passes(clock, 50)
    assert (await refused(engine, Expire("k"))).reason == "LEASE_HELD"
    fenced = Request(Append("k", [B]), fencing_token=granted.lease.token)
    assert isinstance((await one(engine, fenced)).outcome, Answer)
    assert (await lines(engine, "k"), await keys(engine)) == ([A, B], ["k"])
    assert (await one(engine, Request(Release("k", granted.lease.token)))).outcome == Released(True)
    assert await is_gone(engine, "k")


async def test_a_write_after_the_lease_ran_out_begins_a_new_session(engine: Engine, clock: Clock) -> None:
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    await done(engine, Append("other", [B]))
    for mutation in (Append("k", [B]), Fork("k", "other"), Create("k", [B])):
        passes(clock, 1001)
        assert isinstance((await one(engine, Request(Acquire("k", "holder", 60.0)))).outcome, Granted)
        passes(clock, 61)
        new = await done(engine, mutation)
        assert (new.previous_revision, await lines(engine, "k")) == (0, [B])
        await done(engine, Update("k", expire_time_us=in_s(1000)))


async def test_acquiring_the_lease_of_an_expired_session_does_not_bring_it_back(
    engine: Engine, clock: Clock
) -> None:
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    passes(clock, 1001)
    assert await is_gone(engine, "k")
    watcher = engine.watch("", (), b"")
    granted = (await one(engine, Request(Acquire("k", "holder", 60.0)))).outcome
    assert isinstance(granted, Granted)
    assert await is_gone(engine, "k")
    assert await keys(engine) == []
    new = await one(engine, Request(Append("k", [B]), fencing_token=granted.lease.token))
    assert isinstance(new.outcome, Answer)
    assert (new.outcome.previous_revision, await lines(engine, "k")) == (0, [B])
    told: list[Event] = []
    async with asyncio.timeout(60), aclosing(watcher.batches(60.0)) as batches:
        async for batch in batches:
            told += batch.events
            if len(told) >= 3:
                break
    watcher.close()
    kinds = sorted(type(event.what).__name__ for event in told)
    assert kinds == ["Changed", "Deleted", "LeaseTold"]


async def test_calls_that_are_sent_again_get_their_first_answers(engine: Engine, clock: Clock) -> None:
    made = request(Create("k", [A], expire_time_us=in_s(1000)), 1)
    named = request(Append("k", [B]), request_id="delivery 1")
    firsts = [(await one(engine, asked)).outcome for asked in (made, named)]
    passes(clock, 2000)
    for asked, first in zip((made, named), firsts, strict=True):
        again = await one(engine, asked)
        assert (again.outcome, again.replayed) == (first, True)
    assert await is_gone(engine, "k")


async def test_one_group_sees_what_it_ends(engine: Engine, clock: Clock) -> None:
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    passes(clock, 2000)
    outcomes = await submit(
        engine, Append("k", [B]), Append("k", [A]), Expire("k"), Pop("k"), Delete("k"), Append("k", [A])
    )
    assert all(isinstance(outcome, Answer) for outcome in outcomes), outcomes
    assert await lines(engine, "k") == [A]
    revisions = [outcome.revision for outcome in outcomes if isinstance(outcome, Answer)]
    assert revisions == sorted(revisions)


# Clocks.


async def test_a_clock_that_jumps_ahead_ends_nothing_until_confirmed(engine: Engine, clock: Clock) -> None:
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    await done(engine, Append("tmp:a", [A]))
    clock.wall_s += 10 * 365 * 86400
    assert await lines(engine, "k") == [A]
    found = engine.disbelief()
    assert found is not None
    assert found.ahead_us == pytest.approx(10 * 365 * 86400 * S, abs=60 * S)
    passes(clock, 600)
    assert await keys(engine) == ["k", "tmp:a"]
    await done(engine, Expire("k"))
    passes(clock, 600)
    assert await keys(engine) == ["tmp:a"]  # by the time that went by
    passes(clock, 3600)
    assert await keys(engine) == []
    assert engine.disbelief() is None


async def test_what_was_written_under_a_wrong_clock_ends_late(engine: Engine, clock: Clock) -> None:
    clock.wall_s += 365 * 86400
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))  # a year ahead, as its caller is
    await done(engine, Create("soon", [A], expire_time_us=in_s(1000) - 365 * 86400 * S))
    passes(clock, 1100)
    assert await keys(engine) == ["k"]
    clock.wall_s -= 365 * 86400
    passes(clock, 1100)
    assert await keys(engine) == ["k"]


async def test_a_clock_that_goes_back_ends_late(engine: Engine, clock: Clock) -> None:
    await done(engine, Create("k", [A], expire_time_us=in_s(1000)))
    clock.wall_s -= 86400
    passes(clock, 2000)
    assert await lines(engine, "k") == [A]
    passes(clock, 86400)
    assert await is_gone(engine, "k")


# Races.

STEPS = st.lists(
    st.tuples(
        st.sampled_from([100, 4000, 15_000]),  # how much time goes by
        st.integers(min_value=0, max_value=3),  # appends at the same time
        st.integers(min_value=0, max_value=2),  # and what wants to end the session
        st.booleans(),  # and a restart before
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_no_append_is_lost_to_an_end(kind: str, steps: list[tuple[int, int, int, bool]]) -> None:
    """A session ends 10,000 seconds after its last message, whatever comes at the same time as its end."""

    async def run(data: Path, clock: Clock) -> None:
        engine = await open_kind(kind, data, RULES)
        wanted: list[bytes] = []
        idle_s = n = 0
        try:
            for seconds, appends, ends, restarts in steps:
                passes(clock, seconds)
                idle_s += seconds
                if restarts and kind != "memory":
                    await engine.close()
                    engine = await open_kind(kind, data, RULES)
                if idle_s > 10_000:
                    wanted = []
                new = [b'{"n": %d}' % (n + each) for each in range(appends)]
                n += appends
                asked: list[Mutation] = [Append("tmp:k", [line]) for line in new]
                for each in range(ends):
                    asked.insert(each * len(asked), Expire("tmp:k"))
                replies = await asyncio.gather(*(engine.submit([Request(each)]) for each in asked))
                for mutation, (reply,) in zip(asked, replies, strict=True):
                    assert isinstance(reply.outcome, Answer) or isinstance(mutation, Expire)
                wanted += new
                idle_s = 0 if appends else idle_s
                if wanted:
                    assert list((await read(engine, "tmp:k")).lines) == wanted
                else:
                    assert await is_gone(engine, "tmp:k")
                assert await keys(engine) == (["tmp:k"] if wanted else [])
        finally:
            await engine.close()

    with tempfile.TemporaryDirectory() as data, pytest.MonkeyPatch.context() as patch:
        asyncio.run(run(Path(data), Clock(patch)))


async def test_refusals_have_their_reason(engine: Engine, clock: Clock) -> None:
    (absent,) = await submit(engine, Expire("nobody"))
    assert isinstance(absent, Refusal)
    assert absent.reason == "SESSION_NOT_FOUND"

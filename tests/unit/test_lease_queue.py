"""The lines of those who wait for leases: their order, their bounds, and what becomes of who goes away."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import pytest
from engines import request
from sessionstored.engine import Engine, Refused, Reply, Request
from sessionstored.engine.memory import MemoryEngine
from sessionstored.lease_queue import LeaseQueue
from sessionstored.leases import Acquire, Granted, Lease, Release, Renew
from sessionstored.rules import Answer, Append, Pop, Refusal

A = b'{"role":"user","content":"a"}'
LONG_S = 600.0


class Waiting:
    """An engine, its queue, and short words for what callers do. The store's clock goes on by hand."""

    def __init__(self, **bounds: int) -> None:
        self.clock_s = 1000.0
        self.engine: MemoryEngine = Counting(clock_s=lambda: self.clock_s)
        limits = {"waiters_max": 100, "waiters_per_key_max": 100, "bytes_max": 1 << 20} | bounds
        self.queue = LeaseQueue(self.engine, **limits)
        self.order: list[str] = []

    async def acquire(self, holder: str, wait_s: float = LONG_S, *, key: str = "k", ttl_s: float = 60.0,
                      appends_allowed: bool = False) -> Lease:
        asked = Request(Acquire(key, holder, ttl_s, appends_allowed))
        lease = granted(await self.queue.submit(asked, wait_s))
        self.order.append(holder)
        return lease

    async def append(self, name: str, wait_s: float = LONG_S, size: int = 0) -> Answer:
        line = b'{"n":"%s%s"}' % (name.encode(), b"x" * size)
        reply = await self.queue.submit(Request(Append("k", [line])), wait_s)
        assert not isinstance(reply.outcome, Refusal), reply
        self.order.append(name)
        return reply.outcome

    async def release(self, lease: Lease) -> Reply:
        return await self.queue.submit(Request(Release(lease.key, lease.token)), 0)

    async def waits(self, caller, count: int) -> asyncio.Task:
        """Begin a call, and go on when so many wait and the first of them was refused."""
        task = asyncio.create_task(caller)
        await until(lambda: self.queue.waiting == count and next(iter(self.queue._lines["k"])).refused)
        return task


class Counting(MemoryEngine):
    """Counts what it was asked."""

    asked = 0

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        self.asked += 1
        return await super().submit(requests)


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0)


def granted(reply: Reply) -> Lease:
    assert isinstance(reply.outcome, Granted), reply
    return reply.outcome.lease


def refusal(reply: Reply) -> Refusal:
    assert isinstance(reply.outcome, Refusal), reply
    return reply.outcome


async def test_who_does_not_wait_is_told_at_once() -> None:
    all_ = Waiting()
    await all_.acquire("first", 0)
    reply = await all_.queue.submit(Request(Acquire("k", "second", 60.0)), 0)
    assert refusal(reply).reason == "LEASE_HELD"
    assert all_.queue.waiting == 0


async def test_leases_are_had_in_the_order_of_asking_whatever_the_order_is() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    all_ = Waiting()
    lease = await all_.acquire("holder")
    tasks = []
    for n in range(30):
        append = rng.random() < 0.3
        caller = all_.append(f"{n}") if append else all_.acquire(f"{n}")
        tasks.append(await all_.waits(caller, n + 1))
    for task in tasks:
        if isinstance(lease, Lease):
            await all_.release(lease)
        lease = await asyncio.wait_for(task, 60)
    assert all_.order == ["holder", *map(str, range(30))]
    assert all_.queue.waiting == 0


async def test_a_lease_that_runs_out_goes_to_the_first_in_line() -> None:
    all_ = Waiting()
    await all_.acquire("holder", ttl_s=60.0)
    first = await all_.waits(all_.acquire("first"), 1)
    second = await all_.waits(all_.acquire("second"), 2)
    all_.clock_s += 60
    assert (await asyncio.wait_for(first, 60)).holder == "first"
    assert not second.done()
    second.cancel()


async def test_a_renewal_is_waited_for_too() -> None:
    all_ = Waiting()
    lease = await all_.acquire("holder", ttl_s=60.0)
    task = await all_.waits(all_.acquire("first"), 1)
    all_.clock_s += 59.9
    granted(await all_.queue.submit(Request(Renew("k", lease.token)), 0))
    asked = all_.engine.asked
    await until(lambda: all_.engine.asked > asked + 1)  # it asked again, more than once
    assert not task.done()
    await all_.release(lease)
    assert (await asyncio.wait_for(task, 60)).holder == "first"


async def test_who_does_not_wait_takes_no_lease_before_those_who_do() -> None:
    all_ = Waiting()
    lease = await all_.acquire("holder")
    waiting = await all_.waits(all_.acquire("first"), 1)
    # Released behind the queue's back, as by another daemon's process: nobody was woken.
    await all_.engine.submit([Request(Release("k", lease.token))])
    told = refusal(await all_.queue.submit(Request(Acquire("k", "newcomer", 60.0)), 0))
    assert (told.reason, told.metadata["holder"]) == ("LEASE_HELD", "first")
    assert (await asyncio.wait_for(waiting, 60)).holder == "first"


async def test_one_who_waited_long_enough_is_refused_and_that_is_remembered() -> None:
    all_ = Waiting()
    lease = await all_.acquire("holder")
    first = asyncio.create_task(all_.queue.submit(request(Acquire("k", "first", 60.0), 1), 0.05))
    behind = asyncio.create_task(all_.queue.submit(request(Acquire("k", "behind", 60.0), 2), 0.05))
    replies = [await asyncio.wait_for(task, 60) for task in (first, behind)]
    assert [refusal(reply).metadata["holder"] for reply in replies] == ["holder", "holder"]
    await all_.release(lease)
    for n, name in ((1, "first"), (2, "behind")):
        late = await all_.queue.submit(request(Acquire("k", name, 60.0), n), 0.05)
        assert refusal(late).reason == "LEASE_HELD", "a late copy is not applied after its caller was told no"
    assert await all_.engine.lease("k") is None


async def test_behind_others_a_last_try_takes_no_free_lease() -> None:
    all_ = Waiting()
    lease = await all_.acquire("holder")
    first = await all_.waits(all_.acquire("first"), 1)
    behind = await all_.waits(all_.queue.submit(Request(Acquire("k", "behind", 60.0)), 0.05), 2)
    told = refusal(await asyncio.wait_for(behind, 60))
    assert told.reason == "LEASE_HELD"
    await all_.release(lease)
    assert (await asyncio.wait_for(first, 60)).holder == "first"


async def test_who_goes_away_leaves_the_line() -> None:
    all_ = Waiting()
    lease = await all_.acquire("holder")
    tasks = [await all_.waits(all_.acquire(str(n)), n + 1) for n in range(3)]
    for n in (1, 0):
        tasks[n].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[n]
    assert all_.queue.waiting == 1
    await all_.release(lease)
    assert (await asyncio.wait_for(tasks[2], 60)).holder == "2"
    assert all_.queue.waiting == 0


class Slow(Counting):
    """Holds answers back, as a commit that takes long does."""

    def __init__(self, **named) -> None:
        super().__init__(**named)
        self.go = asyncio.Event()

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        replies = await super().submit(requests)
        await self.go.wait()
        return replies


async def test_what_was_acquired_for_one_who_went_away_is_given_back() -> None:
    engine = Slow()
    queue = LeaseQueue(engine, waiters_max=9, waiters_per_key_max=9, bytes_max=9)
    task = asyncio.create_task(queue.submit(Request(Acquire("k", "gone", 60.0)), LONG_S))
    await until(lambda: engine.asked == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await engine.lease("k")).holder == "gone"
    engine.go.set()
    end_s = time.monotonic() + 60
    while await engine.lease("k") is not None:
        assert time.monotonic() < end_s
        await asyncio.sleep(0)


async def test_an_append_waits_and_then_lands() -> None:
    all_ = Waiting()
    lease = await all_.acquire("holder")
    task = await all_.waits(all_.append("a"), 1)
    assert await all_.engine.count() == 0
    await all_.release(lease)
    assert (await asyncio.wait_for(task, 60)).first_index == 0


async def test_an_append_that_is_allowed_stands_in_no_line() -> None:
    all_ = Waiting()
    lease = await all_.acquire("holder", appends_allowed=True)
    waiting = await all_.waits(all_.acquire("first"), 1)
    await asyncio.wait_for(all_.append("a"), 60)
    assert not waiting.done()
    await all_.release(lease)
    await asyncio.wait_for(waiting, 60)


async def test_other_refusals_come_at_once() -> None:
    all_ = Waiting()
    reply = await all_.queue.submit(Request(Append("k", [A], expected_revision=3)), LONG_S)
    assert refusal(reply).reason == "REVISION_CONFLICT"
    reply = await all_.queue.submit(Request(Pop("k")), LONG_S)
    assert refusal(reply).reason == "SESSION_NOT_FOUND"


@pytest.mark.parametrize(
    ("bounds", "limit"),
    [({"waiters_max": 2}, "2"), ({"waiters_per_key_max": 2}, "2"), ({"bytes_max": 500}, "500")],
)
async def test_lines_are_bounded(bounds: dict[str, int], limit: str) -> None:
    all_ = Waiting(**bounds)
    lease = await all_.acquire("holder")
    tasks = [await all_.waits(all_.append(str(n), size=200), n + 1) for n in range(2)]
    with pytest.raises(Refused) as told:
        await all_.append("too many", size=200)
    assert (told.value.refusal.reason, told.value.refusal.metadata) == ("OVERLOADED", {"limit": limit})
    if "waiters_per_key_max" in bounds:
        assert (await all_.acquire("elsewhere", key="other")).holder == "elsewhere"
    await all_.release(lease)
    await asyncio.gather(*tasks)
    await all_.append("now", size=200)


async def test_one_large_append_may_wait_alone() -> None:
    all_ = Waiting(bytes_max=10)
    lease = await all_.acquire("holder")
    task = await all_.waits(all_.append("large", size=1000), 1)
    await all_.release(lease)
    await asyncio.wait_for(task, 60)


async def test_at_the_end_all_are_told() -> None:
    all_ = Waiting()
    await all_.acquire("holder")
    tasks = [await all_.waits(all_.acquire(str(n)), n + 1) for n in range(3)]
    all_.queue.stop()
    for task in tasks:
        with pytest.raises(Refused) as told:
            await asyncio.wait_for(task, 60)
        assert told.value.refusal.reason == "SHUTTING_DOWN"
    with pytest.raises(Refused):
        await all_.acquire("later")
    assert all_.queue.waiting == 0


async def test_lines_of_other_sessions_do_not_matter() -> None:
    all_ = Waiting()
    await all_.acquire("holder")
    waiting = await all_.waits(all_.acquire("first"), 1)
    assert (await all_.acquire("other", key="other")).key == "other"
    waiting.cancel()


def test_the_queue_needs_no_more_of_an_engine_than_the_protocol() -> None:
    engine: Engine = MemoryEngine()
    assert LeaseQueue(engine, waiters_max=1, waiters_per_key_max=1, bytes_max=1).waiting == 0

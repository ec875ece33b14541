"""The feed's bounds, and who is ended when they are reached."""

import asyncio

import grpc
import pytest
from deaf import DeafClient
from engines import done
from followers import Follower, Following
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc
from sessionstored import calls
from sessionstored.calls import Calls
from sessionstored.engine import Refused
from sessionstored.engine.feed import FeedLimits
from sessionstored.engine.memory import MemoryEngine
from sessionstored.lease_queue import LeaseQueue
from sessionstored.requests import Bounds
from sessionstored.rules import DEFAULT_LIMITS, Append
from sessionstored.service import SERVICE, SessionStoreServicer

LINE = b'{"x": "%s"}' % (b"x" * 10_000)


async def refusal_of(following: Following) -> str:
    with pytest.raises(Refused) as caught:
        await following.catch_up()
    return caught.value.refusal.reason


async def test_what_waits_for_all_is_bounded_and_whom_most_waits_for_is_ended() -> None:
    engine = MemoryEngine(feed_limits=FeedLimits(watching_bytes_max=60_000))
    slow = Following(engine)
    await slow.step()
    quick = Following(engine, keys=["b"])
    await quick.step()
    for _ in range(4):
        await done(engine, Append("a", [LINE]))
    await done(engine, Append("b", [LINE]))
    assert engine.feed.watcher_count == 2
    for _ in range(2):
        await done(engine, Append("a", [LINE]))
    assert engine.feed.watcher_count == 1
    assert (await quick.catch_up()).sessions.keys() == {"b"}
    assert await refusal_of(slow) == "WATCHER_TOO_SLOW"
    assert engine.feed._waiting_bytes == 0
    assert not engine.feed._waiting


async def test_an_event_that_waits_for_many_counts_once() -> None:
    engine = MemoryEngine(feed_limits=FeedLimits(watching_bytes_max=60_000))
    followings = [Following(engine) for _ in range(50)]
    for each in followings:
        await each.step()
    for _ in range(4):
        await done(engine, Append("k", [LINE]))
    for each in followings:
        assert len((await each.catch_up()).sessions["k"].lines) == 4
        await each.close()
    assert engine.feed._waiting_bytes == 0


async def test_what_is_read_for_one_who_is_behind_counts_too() -> None:
    engine = MemoryEngine(feed_limits=FeedLimits(watching_bytes_max=30_000))
    cursor = engine.cursor()
    for _ in range(4):
        await done(engine, Append("k", [LINE]))
    following = Following(engine, Follower(cursor=cursor))
    assert await refusal_of(following) == "WATCHER_TOO_SLOW"
    assert engine.feed._waiting_bytes == 0


async def test_the_keys_of_all_watchers_are_bounded() -> None:
    engine = MemoryEngine(feed_limits=FeedLimits(watched_keys_max=5))
    first = Following(engine, keys=["a", "b", "c"])
    with pytest.raises(Refused) as caught:
        Following(engine, keys=["d", "e", "f"])
    assert caught.value.refusal.reason == "OVERLOADED"
    first.watch.remove(["a"])
    second = Following(engine, keys=["a", "d", "e"])
    await first.close()
    await second.close()
    assert engine.feed._keys == 0
    assert not engine.feed._by_key


async def test_old_events_of_the_memory_engine_go() -> None:
    engine = MemoryEngine(feed_limits=FeedLimits(bytes_max=25_000))
    cursor = engine.cursor()
    for _ in range(4):
        await done(engine, Append("k", [LINE]))
    assert await refusal_of(Following(engine, Follower(cursor=cursor))) == "CURSOR_EXPIRED"


async def test_a_watcher_who_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was being given is let go of, although it never read it."""
    monkeypatch.setattr(calls, "STALL_S_MAX", 0.2)
    engine = MemoryEngine()
    server = grpc.aio.server(interceptors=[Calls(SERVICE, bytes_max=1 << 30)])
    leases = LeaseQueue(engine, waiters_max=1, waiters_per_key_max=1, bytes_max=1)
    servicer = SessionStoreServicer(engine, leases, Bounds(), DEFAULT_LIMITS, version="1", start_time_us=0)
    session_store_pb2_grpc.add_SessionStoreServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        deaf = await asyncio.to_thread(DeafClient, f"127.0.0.1:{port}")
        await asyncio.to_thread(deaf.begin, "Watch")
        request = v1.WatchRequest().SerializeToString()
        await asyncio.to_thread(deaf.send, b"\0" + len(request).to_bytes(4, "big") + request)
        async with asyncio.timeout(60):
            while not engine.feed.watcher_count:
                await asyncio.sleep(0.01)
            while engine.feed.watcher_count:
                await done(engine, Append("k", [LINE]))
                await asyncio.sleep(0.005)
        assert engine.feed._waiting_bytes == 0
        deaf.close()
    finally:
        await server.stop(0)

"""The near cache of both clients and of the drop-in, with real daemons. See also test_sdk_mirror."""

import asyncio
import gc
import random
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from clients import driver_of
from counting_daemon import counted, counting_daemon
from daemons import Daemon, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import Proxy
from sessionstore import AsyncSessionStore, SessionStore
from sessionstore.errors import ConflictError, SessionStoreError
from sessionstore.manager import SessionManager
from unit.test_sdk_processes import output, python

NEAR: dict[str, Any] = {"near_cache_bytes": 64 << 20}
# For tests that wait for what others wrote, or for it to be too old: the machine may be slow.
PATIENT = NEAR | {"near_cache_staleness": 600.0}


def mirror_of(store: Any) -> Any:
    return driver_of(store).mirror


def in_step(store: Any, key: str) -> None:
    """Wait until the stream has proven the session."""

    def proven() -> bool:
        entry = mirror_of(store)._entries.get(key)
        return entry is not None and 0 < entry.number <= mirror_of(store)._answered

    wait_until(proven, what="the stream")


def is_near(store: Any, key: str) -> bool:
    return mirror_of(store).near(key) is not None


def messages(count: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"message {n}", "n": n} for n in range(count)]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def counting(make_daemon: Callable[..., Daemon], calls: Path) -> Daemon:
    return make_daemon(launcher=counting_daemon(calls)).start()


def test_reading_a_session_again_costs_no_call(
    counting: Daemon, calls: Path, open_store: Callable[..., Any], key: str
) -> None:
    open_store(counting.address).session(key).append(*messages(500))
    store = open_store(counting.address, **PATIENT)
    handle = store.session(key)
    in_step(store, key)
    before = counted(calls)
    for _ in range(100):
        assert store.session(key).revision == handle.revision
        assert len(handle.catch_up().messages) == 500
    assert counted(calls) == before
    assert (before["GetSession"], before["Watch"]) == (2, 1)


def test_the_drop_in_gives_a_session_again_without_a_call(counting: Daemon, calls: Path, key: str) -> None:
    with SessionStore(counting.address) as others:
        others.session(key).append(*messages(500))
        near_manager = SessionManager(counting.address, **PATIENT)
        with near_manager as manager, SessionManager(counting.address) as plain:
            session = manager.get_or_create(key)
            in_step(manager._store, key)
            before = counted(calls)
            took: dict[str, float] = {}
            for name, each in (("near", manager), ("GetSession", plain)):
                given_ = each.get_or_create(key)
                begun_s = time.perf_counter()
                for _ in range(200):
                    assert each.get_or_create(key) is given_
                took[name] = (time.perf_counter() - begun_s) / 200
            print(f"get_or_create of 500 messages: near {took['near'] * 1e6:.1f} us, with a call "
                  f"{took['GetSession'] * 1e6:.0f} us: {took['GetSession'] / took['near']:.0f} times as long")
            after = counted(calls)
            assert after - before == {"GetSession": 201, "GetServerInfo": 1}  # all of them the plain one's
            assert manager.get_or_create(key) is session
            others.session(key).append({"n": 500})
            wait_until(lambda: manager.get_or_create(key).messages[-1] == {"n": 500}, what="the write")
            assert counted(calls)["GetSession"] == after["GetSession"] + 1  # that of `others.session`


def test_a_store_without_sessions_costs_nothing(counting: Daemon, calls: Path, key: str) -> None:
    threads = threading.active_count()
    with SessionStore(counting.address, **NEAR) as store:
        assert threading.active_count() == threads
        assert counted(calls) == {}
        store.get(key)
        list(store.list())
        assert not store.session(key).exists
        assert threading.active_count() == threads
        assert counted(calls)["Watch"] == 0
    with SessionStore(counting.address) as store:
        store.session(key).append({})
        store.session(key).catch_up()
        assert counted(calls)["Watch"] == 0


def test_own_writes_are_always_seen(counting: Daemon, open_store: Callable[..., Any], key: str) -> None:
    """Also those of other handles of the store, those by key alone, and those behind what others wrote."""
    store, others = open_store(counting.address, **PATIENT), open_store(counting.address)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    handle = store.session(key)
    handle.append({"n": 0})
    for n in range(1, 120):
        match rng.randrange(8):
            case 0 if handle.exists:
                store.delete(key)
                assert not store.session(key).exists
                assert not handle.catch_up().exists
                continue
            case 1 if handle.exists:
                handle.update(patch={"n": n})
                assert store.session(key).metadata["n"] == n
                continue
            case 2 if handle.message_count:
                handle.replace(0, 1, [{"n": -n}])
                assert store.session(key).messages[0] == {"n": -n}
                continue
            case 3:
                others.session(key).append({"others": n})
                store.session(key).append({"n": n})
            case 4 if handle.exists:
                handle.clear()
                assert store.session(key).messages == ()
                continue
            case 5:
                store.edit(key, lambda old, n=n: [*old, {"n": n}])
            case _:
                store.session(key).append({"n": n})
        assert store.session(key).messages[-1] == {"n": n}
        assert handle.catch_up().messages[-1] == {"n": n}


def test_what_others_write_arrives_by_itself(
    store: Any, open_store: Callable[..., Any], shared_daemon: Daemon, key: str
) -> None:
    near = open_store(shared_daemon.address, **PATIENT)
    store.session(key).append({"n": 0})
    handle = near.session(key)
    in_step(near, key)
    store.session(key).append({"n": 1})
    wait_until(lambda: near.session(key).message_count == 2, what="the others' write")
    assert handle.messages == ({"n": 0},)  # a handle moves when it is told to
    assert handle.catch_up().messages == ({"n": 0}, {"n": 1})
    assert handle.revision == near.session(key).revision
    store.delete(key)
    wait_until(lambda: not near.session(key).exists, what="the others' deletion")
    store.session(key).append({"n": 2})
    wait_until(lambda: near.session(key).messages == ({"n": 2},), what="the others' new session")


def test_a_conditional_write_is_safe_however_stale_the_snapshot_is(
    store: Any, open_store: Callable[..., Any], shared_daemon: Daemon, key: str
) -> None:
    near = open_store(shared_daemon.address, **PATIENT)
    store.session(key).append({"n": 0})
    handle = near.session(key)
    in_step(near, key)
    store.session(key).append({"n": 1})
    wait_until(lambda: near.session(key).message_count == 2, what="the others' write")
    with pytest.raises(ConflictError):
        handle.replace(0, None, [{"n": "all"}], expected_revision=handle.revision)
    handle.refresh().replace(0, None, [{"n": "all"}], expected_revision=handle.revision)
    assert near.session(key).messages == ({"n": "all"},)


def test_refresh_always_asks_the_daemon(
    counting: Daemon, calls: Path, open_store: Callable[..., Any], key: str
) -> None:
    store, others = open_store(counting.address, **PATIENT), open_store(counting.address)
    others.session(key).append({"n": 0})
    handle = store.session(key)
    in_step(store, key)
    for n in range(1, 20):
        others.session(key).append({"n": n})
        assert handle.refresh().message_count == n + 1
        assert store.session(key).message_count == n + 1  # and nobody goes back behind it
    assert counted(calls)["GetSession"] >= 20 + 19


def test_a_turn_of_a_session_that_is_near_shows_what_was_stored_before_its_lease(
    shared_daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    store = open_store(shared_daemon.address, **PATIENT)
    handle = store.session(key)
    handle.append(*messages(3))
    store.session(key)
    in_step(store, key)
    others = open_store(shared_daemon.address).session(key)
    for n in range(20):
        with others.turn(wait=60) as turn:
            turn.append({"n": n})
        with handle.turn(wait=60) as turn:
            assert turn.messages[-1] == {"n": n}
            assert store.session(key).messages == turn.messages
            assert turn.catch_up().message_count == n + 4


def test_what_a_watch_or_a_listing_has_shown_is_there(
    shared_daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    store = open_store(shared_daemon.address, **PATIENT)
    others = open_store(shared_daemon.address).session(key)
    others.append({"n": 0})
    with store.watch([key]) as events:
        for n in range(1, 100):
            store.session(key)
            others.append({"n": n})
            if n % 2:
                seen = next(events).revision
                if seen < others.revision:
                    seen = next(events).revision
            else:
                (head,) = store.list(key)
                seen = head.revision
            assert store.session(key).revision >= seen == others.revision


def test_a_session_that_expired_is_not_shown_again(
    shared_daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    store = open_store(shared_daemon.address, **PATIENT)
    handle = store.session(key)
    handle.append(*messages(3))
    handle.update(expire_time=timedelta(seconds=0.5))
    others = open_store(shared_daemon.address)
    manager = SessionManager(shared_daemon.address, **PATIENT)
    mine = manager.get_or_create(key)
    wait_until(lambda: others.get(key) is None, what="the end")
    # Nothing has removed it yet, and no event told of its end.
    for _ in range(20):
        assert not store.session(key).exists
        assert not handle.catch_up().exists
        assert manager.get_or_create(key).messages == mine.messages == []
    manager.close()


def test_what_is_given_is_the_callers_own(
    store: Any, open_store: Callable[..., Any], shared_daemon: Daemon, key: str
) -> None:
    near = open_store(shared_daemon.address, **PATIENT)
    store.create(key, [{"n": [0]}], metadata={"m": [0]})
    handle = near.session(key)
    handle.messages[0]["n"].append("spoilt")
    handle.head.metadata["m"].append("spoilt")
    handle.metadata["m"].append("spoilt")
    assert near.session(key).messages == ({"n": [0]},)
    assert near.session(key).metadata == {"m": [0]}
    with SessionManager(shared_daemon.address, **PATIENT) as manager:
        for _ in range(2):
            session = manager.get_or_create(key)
            session.messages[0]["n"].append("spoilt")
            session.metadata["m"].append("spoilt")
            manager.invalidate(key)
        in_step(manager._store, key)
        session = manager.get_or_create(key)
        assert (session.messages, session.metadata) == ([{"n": [0]}], {"m": [0]})


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_it_goes_on_over_a_restart(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any], key: str, kill: bool
) -> None:
    daemon = make_daemon(store="jsonl").start()
    store, others = open_store(daemon.address, **PATIENT), open_store(daemon.address)
    others.session(key).append({"n": 0})
    store.session(key)
    in_step(store, key)
    for n in range(1, 4):
        others.session(key).append({"n": 2 * n})
        daemon.restart(kill=kill)
        others.session(key).append({"n": 2 * n + 1})
        wait_until(lambda n=n: store.session(key).messages[-1] == {"n": 2 * n + 1}, what="the others' writes")
        in_step(store, key)
    assert store.session(key).messages == others.session(key).messages


def test_another_store_at_the_same_place_is_not_mistaken_for_it(
    daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    store = open_store(daemon.address, **PATIENT)
    store.session(key).append({"before": 1})
    assert store.session(key).message_count == 1
    in_step(store, key)
    daemon.restart(kill=True)
    wait_until(lambda: not is_near(store, key), what="the new store's refusal")
    open_store(daemon.address).session(key).append({"after": 1})
    assert store.session(key).messages == ({"after": 1},)


def test_silence_makes_it_stale_and_reads_go_to_the_daemon(
    counting: Daemon, calls: Path, open_store: Callable[..., Any], key: str
) -> None:
    store = open_store(counting.address, near_cache_bytes=1 << 20, near_cache_staleness=1.0)
    open_store(counting.address).session(key).append({"n": 0})
    handle = store.session(key)
    in_step(store, key)
    counting.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: not is_near(store, key), what="the bound")
        stopped = handle.as_of
        assert datetime.now(UTC) - stopped > timedelta(seconds=0.9)
        assert handle.messages == ({"n": 0},)
    finally:
        counting.send_signal(signal.SIGCONT)
    before = counted(calls)["GetSession"]
    assert store.session(key).messages == ({"n": 0},)
    assert counted(calls)["GetSession"] <= before + 1
    wait_until(lambda: handle.as_of > stopped, what="the stream")


def test_as_of_goes_on_while_nothing_happens_and_stays_when_something_does(
    daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    store = open_store(daemon.address, near_cache_bytes=1 << 20, near_cache_staleness=0.2)
    begun = datetime.now(UTC)
    open_store(daemon.address).session(key).append({"n": 0})
    handle = store.session(key)
    read = handle.as_of
    assert begun - timedelta(seconds=0.1) < read < datetime.now(UTC)
    wait_until(lambda: handle.as_of > read + timedelta(seconds=0.5), what="the stream")
    between = datetime.now(UTC)
    open_store(daemon.address).session(key).append({"n": 1})
    wait_until(lambda: store.session(key).message_count == 2, what="the others' write")
    time.sleep(0.5)
    assert handle.as_of < datetime.now(UTC) - timedelta(seconds=0.4)
    assert handle.catch_up().as_of > between - timedelta(seconds=0.1)


def test_memory_is_bounded_and_handles_live_on(
    counting: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    store = open_store(counting.address, near_cache_bytes=300_000, near_cache_sessions=20,
                       near_cache_staleness=600.0)  # fmt: skip
    others = open_store(counting.address)
    for n in range(40):
        others.session(f"{key}/{n}").append(*messages(50))
    handles = [store.session(f"{key}/{n}") for n in range(40)]
    mirror = mirror_of(store)
    assert len(mirror._entries) <= 20
    assert mirror._bytes <= 300_000
    for n in range(40):
        others.session(f"{key}/{n}").append(*messages(100))
    wait_until(lambda: all(handle.catch_up().message_count == 150 for handle in handles), what="the writes")
    assert len(mirror._entries) <= 20
    assert mirror._bytes <= 300_000
    assert all(handle.append({"n": 0}).message_count == 151 for handle in handles)
    open_store(counting.address, near_cache_bytes=10, near_cache_staleness=600.0).session(key + "/0")


def test_broken_connections_leave_it_in_step(
    daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    proxy = Proxy(daemon.address)
    try:
        store, others = open_store(proxy.address, **PATIENT), open_store(daemon.address)
        others.session(key).append({"n": 0})
        store.session(key)
        for n in range(1, 20):
            others.session(key).append({"n": n})
            proxy.drop()
        wait_until(lambda: store.session(key).message_count == 20, what="the others' writes")
        assert [message["n"] for message in store.session(key).messages] == list(range(20))
    finally:
        proxy.close()


def test_threads_share_it(shared_daemon: Daemon, key: str) -> None:
    failures: list[BaseException] = []
    with SessionStore(shared_daemon.address, timeout=100, **PATIENT) as store:

        def work(number: int) -> None:
            try:
                for n in range(40):
                    store.session(key).append({"by": number, "n": n})
                    mine = [m["n"] for m in store.session(key).messages if m["by"] == number]
                    assert mine == list(range(n + 1))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not failures
        assert store.session(key).messages == store.session(key).refresh().messages


def test_processes_keep_each_other_in_step(make_daemon: Callable[..., Daemon], key: str) -> None:
    """Each waits, near, for the other's message before it writes its own; the daemon is killed meanwhile."""
    daemon = make_daemon(store="jsonl").start()
    code = """
        import sys, time
        from sessionstore import SessionStore
        target, key, me = sys.argv[1:]
        with SessionStore(target, timeout=100, near_cache_bytes=1 << 20, near_cache_staleness=600) as store:
            handle = store.session(key)
            deadline = time.monotonic() + 200
            while handle.message_count < 60:
                if handle.catch_up().message_count % 2 == int(me) and handle.message_count < 60:
                    handle.append({"by": me, "n": handle.message_count})
                assert time.monotonic() < deadline, handle
                time.sleep(0.001)
            print([message["n"] for message in handle.messages] == list(range(60)))
    """
    both = [python(code, daemon.address, key, str(me)) for me in range(2)]
    try:
        with SessionStore(daemon.address, timeout=100) as store:
            for count in (20, 40):
                wait_until(lambda count=count: store.session(key).message_count >= count, 200, "the messages")
                daemon.restart(kill=True)
        assert [output(each) for each in both] == ["True\n"] * 2
    finally:
        for each in both:
            if each.poll() is None:
                each.kill()
                each.wait()


def test_a_forked_child_begins_anew(shared_daemon: Daemon, key: str) -> None:
    code = """
        import os, sys, threading, time
        from sessionstore import SessionStore
        target, key = sys.argv[1:]
        store = SessionStore(target, timeout=100, near_cache_bytes=1 << 20, near_cache_staleness=600)
        handle = store.session(key)
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                store.session(key + "/busy").append({})
        thread = threading.Thread(target=busy)
        thread.start()
        def in_step(key):
            for _ in range(6000):
                entry = store._mirror._entries.get(key)
                if entry is not None and 0 < entry.number <= store._mirror._answered:
                    return
                time.sleep(0.01)
            raise SystemExit("never in step")
        for n in range(6):
            handle.append({"n": n})
            child = os.fork()
            if child == 0:
                assert store._mirror.near(key) is None
                assert handle.catch_up().message_count == n + 1
                in_step(key)
                assert store.session(key).message_count == n + 1
                handle.append({"child": n})
                handle.pop()
                store.close()
                os._exit(0)
            for _ in range(6000):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.01)
            else:
                os.kill(child, 9)
                status = -1
            print(status)
            assert store.session(key).refresh().message_count == n + 1
            in_step(key)
        stop.set()
        thread.join()
        store.close()
    """
    assert output(python(code, shared_daemon.address, key)) == "0\n" * 6


@pytest.mark.parametrize("kind", ["SessionStore", "AsyncSessionStore"])
def test_it_never_delays_exit(shared_daemon: Daemon, key: str, kind: str) -> None:
    code = f"""
        import asyncio, sys, time
        from sessionstore import {kind}, _adriver, _driver
        _driver.DRAIN_S = _adriver.DRAIN_S = 200  # who waited for anything would wait for long
        target, key = sys.argv[1:]
        store = {kind}(target, timeout=200, near_cache_bytes=1 << 20)
        async def use():
            handle = await store.session(key)
            await asyncio.sleep(0.2)
        if "Async" in "{kind}":
            asyncio.run(use())
        else:
            store.session(key)
            time.sleep(0.2)
        print(time.time())
    """
    with SessionStore(shared_daemon.address) as store:
        store.session(key).append({})
    told = float(output(python(code, shared_daemon.address, key)))
    assert time.time() - told < 60


def test_a_store_that_is_dropped_takes_its_thread_along(shared_daemon: Daemon, key: str) -> None:
    def count() -> int:
        return sum(thread.name == "sessionstore near cache" for thread in threading.enumerate())

    before = count()
    store = SessionStore(shared_daemon.address, **NEAR)
    store.session(key).append({})
    store.session(key)
    assert count() == before + 1
    del store
    gc.collect()
    wait_until(lambda: count() <= before, what="the thread's end")
    with SessionStore(shared_daemon.address, **NEAR) as store:
        store.session(key)
        assert count() == before + 1
    wait_until(lambda: count() <= before, what="the thread's end")
    with pytest.raises(RuntimeError, match="closed"):
        store.session(key)


def test_loops_come_and_go(shared_daemon: Daemon, key: str) -> None:
    async def use(n: int) -> None:
        store = AsyncSessionStore(shared_daemon.address, timeout=100, **PATIENT)
        handle = await store.session(key)
        await handle.append({"n": n})
        for _ in range(6000):
            if (await store.session(key)).message_count == n + 1 and store._mirror._answered:
                break
            await asyncio.sleep(0.01)
        assert is_near(store, key)
        if n % 2:
            await store.close()

    with SessionStore(shared_daemon.address) as others:
        others.session(key).append({"n": 0})
    for n in range(1, 5):
        asyncio.run(use(n))
    gc.collect()


def test_without_a_watch_reads_simply_go_to_the_daemon(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any], key: str
) -> None:
    """A daemon that has no room for another watcher."""
    daemon = make_daemon(flags=("--watchers-max", "1")).start()
    taken = open_store(daemon.address).watch([key])
    with taken:
        store = open_store(daemon.address, near_cache_bytes=1 << 20, near_cache_staleness=0.2)
        others = open_store(daemon.address)
        for n in range(5):
            others.session(key).append({"n": n})
            wait_until(lambda n=n: store.session(key).message_count == n + 1, what="the others' write")
    in_step(store, key)


KEYS = ("x", "y")
WHAT = ("append", "append", "pop", "replace", "update", "delete", "fork", "read", "drop")
STEPS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(KEYS), st.sampled_from(WHAT), st.integers(0, 3)),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=25)
def test_after_any_history_of_two_clients_it_is_what_is_stored(
    shared_daemon: Daemon, steps: list[Any]
) -> None:
    base = f"near:{random.randrange(1 << 60)}:"
    proxy = Proxy(shared_daemon.address)
    try:
        with (
            SessionStore(proxy.address, timeout=100, **PATIENT) as a,
            SessionStore(shared_daemon.address, timeout=100, **PATIENT) as b,
            SessionStore(shared_daemon.address, timeout=100) as plain,
        ):
            for step in steps:
                run_step({"a": a, "b": b}, base, proxy, *step)

            def same(store: SessionStore) -> bool:
                for name in KEYS:
                    near, stored = store.session(base + name), plain.session(base + name)
                    if (near.revision, near.messages, near.metadata) != (
                        stored.revision, stored.messages, stored.metadata
                    ):  # fmt: skip
                        return False
                return True

            for store in (a, b):
                wait_until(lambda store=store: same(store), what="the quiet")
    finally:
        proxy.close()


def run_step(stores: Any, base: str, proxy: Proxy, who: str, name: str, what: str, n: int) -> None:
    store = stores[who]
    session = store.session(base + name)
    try:
        match what:
            case "append":
                session.append(*({"n": n, "of": k} for k in range(n + 1)))
            case "pop" if session.message_count:
                session.pop()
            case "replace" if session.message_count > n:
                session.replace(n, 1, [{"put": n}, {"put": n + 1}], expected_revision=session.revision)
            case "update" if session.exists:
                session.update(patch={"n": n})
            case "delete" if session.exists:
                session.delete()
            case "fork" if session.exists:
                other = base + ("y" if name == "x" else "x")
                if store.get(other) is None:
                    session.fork(other)
            case "drop":
                proxy.drop()
    except SessionStoreError as error:
        if error.reason not in ("REVISION_CONFLICT", "SESSION_NOT_FOUND", "INDEX_OUT_OF_RANGE"):
            raise  # else the other one was quicker

"""`store.watch` of both clients, with real daemons that restart, die, forget and lose connections."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import Proxy
from sessionstore import (
    CursorExpiredError,
    SessionChanged,
    SessionDeleted,
    SessionStore,
    UnavailableError,
)
from unit.test_sdk_processes import output, python

FORGETFUL = ("--feed-age-s-max", "0", "--checkpoint-s-max", "0.1")


class Replica:
    """Applies the events of a watch in a thread of its own, and counts what it was told of."""

    def __init__(self, events: Iterator[Any]) -> None:
        self.sessions: dict[str, list[Any]] = {}
        self.revisions: dict[str, int] = {}
        self.appended: list[Any] = []
        self.wholes = self.events = 0
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._follow, args=(events,), daemon=True)
        self.thread.start()

    def _follow(self, events: Iterator[Any]) -> None:
        try:
            for event in events:
                self.apply(event)
        except BaseException as error:
            self.failure = error

    def apply(self, event: Any) -> None:
        self.events += 1
        match event:
            case SessionChanged():
                if event.whole:
                    self.wholes += 1
                else:
                    assert event.previous_revision == self.revisions.get(event.key, 0), event
                    self.appended += event.messages
                self.sessions[event.key] = event.apply(self.sessions.get(event.key, []))
                self.revisions[event.key] = event.revision
                assert len(self.sessions[event.key]) == event.head.message_count, event
            case SessionDeleted():
                self.sessions.pop(event.key, None)
                self.revisions.pop(event.key, None)

    def becomes(self, store: Any, prefix: str = "") -> None:
        """Wait until it is what is stored."""

        def same() -> bool:
            assert self.failure is None, self.failure
            heads = list(store.list(prefix=prefix))
            return {head.key: head.revision for head in heads} == self.revisions

        wait_until(same, what="the replica")
        for key, messages in list(self.sessions.items()):
            assert messages == list(store.session(key).messages)


def some_writes(store: Any, rng: random.Random, prefix: str, count: int) -> None:
    """Random changes of four sessions."""
    for _ in range(count):
        session = store.session(f"{prefix}{rng.randrange(4)}")
        match rng.randrange(9):
            case 0 if session.exists:
                session.delete()
            case 1 if session.message_count:
                session.pop()
            case 2 if session.message_count:
                session.replace(rng.randrange(session.message_count), 1, [{"n": rng.random()}, {"n": 0}])
            case 3 if session.exists:
                session.update(patch={"n": rng.random()})
            case 4 if session.exists:
                to = f"{prefix}{4 + rng.randrange(2)}"
                if store.get(to) is not None:
                    store.delete(to)
                session.fork(to)
            case _:
                session.append(*({"n": rng.random()} for _ in range(rng.randrange(1, 4))))


@pytest.mark.parametrize("daemon", ["memory:", "jsonl"], indirect=True)
def test_applying_the_events_gives_what_is_stored(daemon: Daemon, open_store: Callable[..., Any]) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    store, watching = open_store(daemon.address), open_store(daemon.address)
    store.session("a:0").append({"n": -1})
    store.session("b:0").append({"n": -1})
    with watching.watch(prefix="a:", known={}) as events:
        replica = Replica(events)
        some_writes(store, random.Random(seed), "a:", 60)
        some_writes(store, random.Random(seed), "b:", 10)
        replica.becomes(store, "a:")
    replica.thread.join(60)
    assert not replica.thread.is_alive()
    assert replica.failure is None


def test_a_watch_begins_where_its_block_does(store: Any, open_store: Callable[..., Any], key: str) -> None:
    store.session(key).append({"n": 0})
    with store.watch([key, key + "/other"]) as events:
        assert events.cursor
        store.session(key).append({"n": 1})
        store.session(key + "/not watched").append({"n": 2})
        store.session(key + "/other").append({"n": 3})
        first, second = next(events), next(events)
        assert [(e.key, e.messages, e.start, e.whole) for e in (first, second)] == [
            (key, [{"n": 1}], 1, False), (key + "/other", [{"n": 3}], 0, False)
        ]  # fmt: skip
        store.delete(key)
        gone = next(events)
        assert (type(gone), gone.key, gone.expired) == (SessionDeleted, key, False)
        assert gone.cursor == events.cursor
    with pytest.raises(StopIteration):
        next(events)


def test_a_large_change_is_one_event(store: Any, key: str) -> None:
    with store.watch([key]) as events:
        sent = [{"n": n, "x": "x" * 300_000} for n in range(12)]
        store.session(key).append(*sent)
        store.session(key).fork(key + "/fork")
        assert next(events).messages == sent
    with store.watch(prefix=key + "/", known={}) as events:
        whole = next(events)
    assert (whole.whole, whole.messages) == (True, sent)


def test_a_watch_goes_on_from_a_cursor_in_another_process(daemon: Daemon, key: str) -> None:
    with SessionStore(daemon.address) as store:
        with store.watch([key]) as events:
            store.session(key).append({"n": 0})
            cursor = next(events).cursor
        store.session(key).append({"n": 1})
        code = """
            import sys
            from sessionstore import SessionStore
            target, key, cursor = sys.argv[1:]
            with SessionStore(target) as store:
                for event in store.watch([key], cursor=bytes.fromhex(cursor)):
                    print(event.messages[0]["n"], event.start, flush=True)
                    if event.messages[0]["n"] == 2:
                        break
        """
        process = python(code, daemon.address, key, cursor.hex())
        assert process.stdout is not None
        assert process.stdout.readline() == "1 1\n"
        store.session(key).append({"n": 2})
        assert output(process) == "2 2\n"


def test_nothing_is_lost_or_twice_over_broken_connections(
    daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    proxy = Proxy(daemon.address)
    try:
        store, watching = open_store(daemon.address), open_store(proxy.address)
        with watching.watch(prefix=key) as events:
            replica = Replica(events)
            session = store.session(key)
            for n in range(30):
                session.append({"n": 2 * n}, {"n": 2 * n + 1})
                if n % 3 == 0:
                    proxy.drop()
                elif n % 3 == 1:
                    wait_until(lambda n=n: len(replica.appended) >= 2 * n, what="the events")
            replica.becomes(store, key)
            assert [message["n"] for message in replica.appended] == list(range(60))
            assert replica.wholes == 0
    finally:
        proxy.close()


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("daemon", ["jsonl"], indirect=True)
def test_nothing_is_lost_or_twice_over_a_restart(
    daemon: Daemon, open_store: Callable[..., Any], key: str, kill: bool
) -> None:
    store, watching = open_store(daemon.address), open_store(daemon.address)
    with watching.watch(prefix=key) as events:
        replica = Replica(events)
        session = store.session(key)
        for n in range(40):
            session.append({"n": n})
            if n % 15 == 14:
                daemon.restart(kill=kill)
        replica.becomes(store, key)
        assert [message["n"] for message in replica.appended] == list(range(40))
        assert replica.wholes == 0


def test_another_store_at_the_same_place_is_told_of_as_a_whole(
    daemon: Daemon, open_store: Callable[..., Any], key: str
) -> None:
    """A store in memory begins anew with each start, with the same revisions for something else."""
    store, watching = open_store(daemon.address), open_store(daemon.address)
    with watching.watch(prefix=key, known={}) as events:
        replica = Replica(events)
        for name in "abc":
            store.session(key + name).append({"before": name})
        wait_until(lambda: len(replica.sessions) == 3, what="the events")
        daemon.restart(kill=True)
        for name in "bcd":
            open_store(daemon.address).session(key + name).append({"after": name})
        fresh = open_store(daemon.address)
        wait_until(lambda: {k: m[-1:] for k, m in replica.sessions.items()}
                   == {key + name: [{"after": name}] for name in "bcd"}, what="the replica")  # fmt: skip
        replica.becomes(fresh, key)


def test_what_is_not_kept_any_more_is_made_good(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any], key: str
) -> None:
    daemon = make_daemon(store="jsonl", flags=FORGETFUL).start()
    proxy = Proxy(daemon.address)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    try:
        store, watching = open_store(daemon.address), open_store(proxy.address)
        some_writes(store, random.Random(seed + 1), key, 20)
        with watching.watch(prefix=key, known={}) as events:
            replica = Replica(events)
            replica.becomes(store, key)
            before = replica.wholes
            proxy.refuse()
            some_writes(store, random.Random(seed), key, 40)
            store.session(key + "9").append({"n": 9})
            time.sleep(0.5)  # for the checkpoint; if it comes later, there is less to make good
            proxy.heal()
            replica.becomes(store, key)
            print("whole sessions:", replica.wholes - before)
    finally:
        proxy.close()


def test_one_who_does_not_say_what_they_hold_is_told_that_it_is_too_late(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any], key: str
) -> None:
    daemon = make_daemon(store="jsonl", flags=FORGETFUL).start()
    store = open_store(daemon.address)
    with store.watch(prefix=key) as events:
        cursor = events.cursor

    def late() -> bool:
        store.session(key).append({})
        with suppress(CursorExpiredError), store.watch(prefix=key, cursor=cursor) as events:
            next(events)
            return False
        return True

    wait_until(late, what="the expiry of the cursor")
    with pytest.raises(CursorExpiredError, match="known="):
        next(store.watch(prefix=key, cursor=cursor))
    with store.watch(prefix=key, cursor=cursor, known={key: 1, key + "/gone": 1}) as events:
        told = [next(events), next(events)]
    assert [(type(event), event.key) for event in told] == [
        (SessionChanged, key), (SessionDeleted, key + "/gone")
    ]  # fmt: skip


def test_a_reader_that_is_too_slow_misses_nothing(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any], key: str
) -> None:
    daemon = make_daemon(flags=("--watcher-bytes-max", "65536")).start()
    store, watching = open_store(daemon.address), open_store(daemon.address)
    with watching.watch(prefix=key) as events:
        session = store.session(key)
        for n in range(60):
            session.append({"n": n, "x": "x" * 200_000})
        found = [next(events).messages[0]["n"] for _ in range(60)]
    assert found == list(range(60))


def test_without_a_daemon_it_says_so_and_may_be_asked_again(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any], key: str
) -> None:
    daemon = make_daemon().start()
    daemon.terminate()
    events = open_store(daemon.address, timeout=0.5).watch([key], known={})
    with pytest.raises(UnavailableError):
        next(events)
    daemon.start()
    open_store(daemon.address).session(key).append({"n": 1})
    deadline_s = time.monotonic() + 60
    while True:
        try:
            assert next(events).messages == [{"n": 1}]
            return
        except UnavailableError:
            assert time.monotonic() < deadline_s


def test_close_ends_those_who_wait(driver: Any, shared_daemon: Daemon, key: str) -> None:
    store = driver.open(shared_daemon.address)
    with store.watch([key]) as events:
        waiting = Replica(events)
        time.sleep(0.05)
        events.close()
        waiting.thread.join(60)
        assert (waiting.thread.is_alive(), waiting.failure) == (False, None)
        events.close()
    with store.watch([key]) as events:
        waiting = Replica(events)
        time.sleep(0.05)
        store.close()
        waiting.thread.join(60)
        assert (waiting.thread.is_alive(), waiting.failure) == (False, None)
    assert list(events) == []


@pytest.mark.parametrize("kind", ["SessionStore", "AsyncSessionStore"])
def test_a_watch_never_delays_exit(shared_daemon: Daemon, key: str, kind: str) -> None:
    code = f"""
        import asyncio, sys, threading, time
        from sessionstore import {kind}
        target, key = sys.argv[1:]
        store = {kind}(target, timeout=200)
        seen = threading.Event()
        async def use():
            events = store.watch([key], known={{}})
            async for event in events:
                seen.set()
                return events, asyncio.ensure_future(anext(events))
        if "Async" in "{kind}":
            loop = asyncio.new_event_loop()
            kept = loop.run_until_complete(use())
            kept[1]._log_destroy_pending = False
        else:
            def follow():
                for event in store.watch([key], known={{}}):
                    seen.set()
            threading.Thread(target=follow, daemon=True).start()
        assert seen.wait(60)
        print(time.time())
    """
    with SessionStore(shared_daemon.address) as store:
        store.session(key).append({})
    told = float(output(python(code, shared_daemon.address, key)))
    assert time.time() - told < 60


def test_watches_and_forks_do_not_disturb_each_other(shared_daemon: Daemon, key: str) -> None:
    """The parent's go on; a child has its own, and may go on with one of the parent's from where it was."""
    code = """
        import os, sys, threading, time
        from sessionstore import SessionStore
        target, key = sys.argv[1:]
        store = SessionStore(target, timeout=100)
        handle = store.session(key)
        shared = store.watch([key])
        shared.__enter__()
        seen = []
        def follow():
            for event in store.watch([key], known={}):
                seen.extend(message["n"] for message in event.messages)
        threads = [threading.Thread(target=follow, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for n in range(6):
            handle.append({"n": n})
            child = os.fork()
            if child == 0:
                with store.watch([key]) as own:
                    got = [next(shared).messages[0]["n"] for _ in range(n + 1)]
                    store.session(key + "/child").append({})
                    os._exit(0 if got == list(range(n + 1)) else 1)
            for _ in range(6000):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.01)
            else:
                os.kill(child, 9)
                status = -1
            print(status)
        deadline = time.monotonic() + 60
        while len(seen) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        print(sorted(seen), [next(shared).messages[0]["n"] for _ in range(6)])
        os._exit(0)
    """
    told = output(python(code, shared_daemon.address, key)).splitlines()
    assert told[:-1] == ["0"] * 6
    assert told[-1] == f"{sorted([*range(6)] * 2)} {[*range(6)]}"


def test_a_crowd_of_watchers_sees_the_same(
    make_daemon: Callable[..., Daemon], tmp_path: Path, key: str
) -> None:
    """Watchers in processes of their own, over a kill -9 of the daemon."""
    daemon = make_daemon(store="jsonl").start()
    code = """
        import sys
        from sessionstore import SessionStore
        target, key = sys.argv[1:]
        found = []
        with SessionStore(target, timeout=100) as store:
            with store.watch(prefix=key, known={}) as events:
                print("watching", flush=True)
                for event in events:
                    found += [message["n"] for message in event.messages]
                    if found[-1:] == [-1]:
                        break
        print(sorted(found), flush=True)
    """
    watchers = [python(code, daemon.address, key) for _ in range(3)]
    try:
        for watcher in watchers:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "watching\n"
        with SessionStore(daemon.address, timeout=100) as store:
            for n in range(60):
                store.session(f"{key}{n % 3}").append({"n": n})
                if n % 25 == 20:
                    daemon.restart(kill=True)
            time.sleep(0.2)
            store.session(key + "0").append({"n": -1})
        for watcher in watchers:
            assert output(watcher) == f"{[-1, *range(60)]}\n"
    finally:
        for watcher in watchers:
            if watcher.poll() is None:
                watcher.kill()
                watcher.wait()


CHANGES = ("append", "append", "pop", "replace", "update", "delete", "fork")
DISTURBANCES = ("drop", "wait", "reopen")
STEPS = st.lists(
    st.tuples(st.sampled_from(CHANGES + DISTURBANCES), st.sampled_from("xyz"), st.integers(0, 3)), max_size=25
)


@given(steps=STEPS)
@settings(max_examples=25)
def test_after_any_history_the_events_give_what_is_stored(shared_daemon: Daemon, steps: list[Any]) -> None:
    """Over broken connections, and by watches that each go on from the cursor of the one before."""
    base = f"watch:{random.randrange(1 << 60)}:"
    proxy = Proxy(shared_daemon.address)
    try:
        with (
            SessionStore(shared_daemon.address, timeout=100) as store,
            SessionStore(proxy.address, timeout=100) as watching,
        ):
            replica = Replica(iter(()))
            events = watching.watch(prefix=base, known={})
            for what, name, n in steps:
                if what in CHANGES:
                    change(store, base + name, base, what, n)
                elif what == "drop":
                    proxy.drop()
                elif what == "wait":
                    take_over(events, replica, store, base)
                else:
                    events.close()
                    known = dict(replica.revisions)
                    events = watching.watch(prefix=base, cursor=events.cursor or None, known=known)
            for _ in range(len(replica.revisions) + 10):  # the order across sessions is not promised
                take_over(events, replica, store, base)
                if replica.revisions == {head.key: head.revision for head in store.list(base)}:
                    break
            for head in store.list(base):
                assert replica.revisions.pop(head.key) == head.revision
                assert replica.sessions.pop(head.key) == list(store.session(head.key).messages)
            assert not replica.sessions
    finally:
        proxy.close()


def take_over(events: Any, replica: Replica, store: SessionStore, base: str) -> None:
    """Apply events until one comes that was made just for this."""
    store.session(base + "end").append({})
    last = store.session(base + "end").revision
    deadline_s = time.monotonic() + 60
    while replica.revisions.get(base + "end") != last:
        assert time.monotonic() < deadline_s
        replica.apply(next(events))


def change(store: SessionStore, key: str, base: str, what: str, n: int) -> None:
    """Make a change, if the session is such that it can be made."""
    session = store.session(key)
    match what:
        case "append":
            session.append(*({"n": n, "of": k} for k in range(n + 1)))
        case "pop" if session.message_count:
            session.pop()
        case "replace" if session.message_count > n:
            session.replace(n, 1, [{"put": n}, {"put": n + 1}])
        case "update" if session.exists:
            session.update(patch={"n": n}, last_consolidated=0)
        case "delete" if session.exists:
            session.delete()
        case "fork" if session.exists and store.get(base + "fork") is None:
            session.fork(base + "fork")

"""Clients beside forks, threads, loops, signals and exits; what could disturb the tests is a process."""

import asyncio
import signal
import threading
import time
from typing import Any

import pytest
from daemons import Daemon, wait_until
from processes import output, python
from sessionstore import AsyncSessionStore, SessionStore, session


def test_forked_children_go_on_with_their_own_identity(shared_daemon: Daemon, key: str) -> None:
    """Also while other threads of the parent are in calls, and with handles and errors of before."""
    code = """
        import os, sys, threading
        from sessionstore import SessionStore
        target, key = sys.argv[1:]
        store = SessionStore(target, timeout=100)
        handle = store.session(key)
        handle.append({"by": "parent", "n": -1})
        stop = threading.Event()
        def busy():
            own = store.session(key + "/busy")
            while not stop.is_set():
                own.append({})
        threads = [threading.Thread(target=busy) for _ in range(3)]
        for thread in threads:
            thread.start()
        identities = {store._driver._window.client_id}
        for n in range(8):
            child = os.fork()
            if child == 0:
                handle.append({"by": os.getpid(), "n": n})
                assert store._driver._window.client_id not in identities
                store.close()
                os._exit(0)
            for _ in range(10000):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                stop.wait(0.01)
            else:
                os.kill(child, 9)
                status = -1
            print(status)
            handle.append({"by": "parent", "n": n})
        stop.set()
        for thread in threads:
            thread.join()
        print([message["n"] for message in handle.messages])
        store.close()
    """
    told = output(python(code, shared_daemon.address, key)).splitlines()
    assert told == ["0"] * 8 + [str([-1, *(n for n in range(8) for _ in range(2))])]


def test_a_pre_fork_server_shares_a_store_and_its_handles(shared_daemon: Daemon, key: str) -> None:
    """Four workers at once, while their parent goes on, and after they ended; no identity is used twice."""
    code = """
        import json, os, sys, threading
        from proxies import Proxy
        from sessionstore import ConflictError, OutcomeUnknownError, SessionStore
        target, key, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
        proxy = Proxy(target)
        store = SessionStore(proxy.address, timeout=200)
        shared, log = store.session(key), store.session(key + "/log")
        shared.append({"by": "parent", "n": -1})
        log.append({"by": "parent"})
        try:
            log.append({}, expected_revision=0)
        except ConflictError as error:
            conflict = error
        # A call of the parent that nobody answers before the fork.
        proxy.swallow("from_daemon")
        store._driver._timeout_s = 0.5
        try:
            log.append({"by": "unknown"})
        except OutcomeUnknownError as error:
            unknown = error
        store._driver._timeout_s = 200
        proxy.heal()
        sent = []
        def remember(connection):
            send = connection.send
            def sending(rpc, timeout_s):
                if rpc.method.mutates:
                    call = rpc.identity()
                    sent.append((call.client_id, call.sequence))
                return send(rpc, timeout_s)
            connection.send = sending
        def work(by):
            remember(store._driver._connection)
            own = store.session(key)
            for n in range(count):
                (shared if n % 2 else own).append({"by": by, "n": n})
            store.edit(key + "/edited/" + by, lambda messages: [*messages, {"by": by}])
            assert conflict.fetch().messages[0] == {"by": "unknown"}, conflict.fetch()
            return sorted({tuple(each) for each in sent})
        readers = []
        for number in range(4):
            reader, writer = os.pipe()
            if os.fork() == 0:
                told = work(f"worker{number}")
                assert unknown.retry().first_index == 1
                with open(writer, "w") as pipe:
                    json.dump(told, pipe)
                store.close()
                os._exit(0)
            os.close(writer)
            readers.append(reader)
        identities = [work("parent")]
        for reader in readers:
            with open(reader) as pipe:
                identities.append(json.load(pipe))
        print([os.wait()[1] for _ in readers])
        assert unknown.retry().first_index == 1
        shared.append({"by": "parent", "n": count})
        print(len({client for each in identities for client, _ in each}))
        print(len({tuple(call) for each in identities for call in each}) == sum(map(len, identities)))
        print(log.refresh().message_count)
        store.close()
        proxy.close()
    """
    count = 40
    told = output(python(code, shared_daemon.address, key, str(count))).splitlines()
    assert told == ["[0, 0, 0, 0]", "5", "True", "2"]
    writers = ["parent", *(f"worker{number}" for number in range(4))]
    with SessionStore(shared_daemon.address, timeout=100) as store:
        stored = store.session(key).messages
        edited = [store.session(f"{key}/edited/{by}").messages for by in writers]
    assert edited == [({"by": by},) for by in writers]
    assert len(stored) == 5 * count + 2
    for by in writers:
        numbers = [m["n"] for m in stored if m["by"] == by]
        assert numbers == (list(range(-1, count + 1)) if by == "parent" else list(range(count)))


def test_workers_of_a_forking_pool_share_a_store(shared_daemon: Daemon, key: str) -> None:
    code = """
        import multiprocessing, sys
        from sessionstore import SessionStore
        target, key = sys.argv[1:]
        store = SessionStore(target, timeout=100)
        store.info()
        def work(n):
            return store.session(key).append({"n": n}).first_index
        with multiprocessing.get_context("fork").Pool(3) as pool:
            print(sorted(pool.map(work, range(30))) == list(range(30)))
        print(store.session(key).message_count)
    """
    assert output(python(code, shared_daemon.address, key)) == "True\n30\n"


def test_an_async_store_used_after_a_fork_raises_at_once(shared_daemon: Daemon, key: str) -> None:
    code = """
        import asyncio, os, sys
        from sessionstore import AsyncSessionStore
        target, key = sys.argv[1:]
        store = AsyncSessionStore(target)
        child = os.fork()
        if child == 0:
            async def use():
                try:
                    await store.session(key)
                except RuntimeError as error:
                    print(error, flush=True)
                await store.close()
            asyncio.run(use())
            os._exit(0)
        os.waitpid(child, 0)
    """
    assert "before a fork" in output(python(code, shared_daemon.address, key))


@pytest.mark.parametrize("kind", ["SessionStore", "AsyncSessionStore"])
def test_an_unclosed_client_never_delays_exit(shared_daemon: Daemon, key: str, kind: str) -> None:
    code = f"""
        import asyncio, sys, time, inspect
        from sessionstore import {kind}, _adriver, _driver
        _driver.DRAIN_S = _adriver.DRAIN_S = 200  # who waited for anything would wait for long
        target, key = sys.argv[1:]
        store = {kind}(target, timeout=200)
        async def use():
            handle = await store.session(key)
            await handle.append({{}})
        if "Async" in "{kind}":
            asyncio.run(use())
        else:
            store.session(key).append({{}})
        print(time.time())
    """
    told = float(output(python(code, shared_daemon.address, key)))
    assert time.time() - told < 60


def test_threads_share_a_store_and_a_handle(shared_daemon: Daemon, key: str) -> None:
    with SessionStore(shared_daemon.address) as store:
        shared = store.session(key)
        failures: list[BaseException] = []

        def write(number: int) -> None:
            try:
                own = store.session(key)
                for n in range(50):
                    (shared if n % 2 else own).append({"by": number, "n": n})
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not failures
        stored = store.session(key)
        assert shared.refresh().messages == stored.messages
        assert stored.message_count == 16 * 50
        for number in range(16):
            assert [m["n"] for m in stored.messages if m["by"] == number] == list(range(50))


async def test_tasks_share_a_store_and_a_handle_beyond_the_window(shared_daemon: Daemon, key: str) -> None:
    async with AsyncSessionStore(shared_daemon.address, timeout=300) as store:
        shared = await store.session(key)
        told = await asyncio.gather(*(shared.append({"n": n}) for n in range(1500)))
        assert sorted(each.first_index for each in told) == list(range(1500))
        assert sorted(message["n"] for message in shared.messages) == list(range(1500))
        assert shared.messages == (await store.session(key)).messages


async def test_the_sync_client_works_inside_a_running_loop(shared_daemon: Daemon, key: str) -> None:
    with SessionStore(shared_daemon.address) as store:
        assert store.session(key).append({}).message_count == 1


async def test_an_async_store_belongs_to_its_loop(shared_daemon: Daemon, key: str) -> None:
    async with AsyncSessionStore(shared_daemon.address) as store:
        await store.session(key)

        def elsewhere() -> str:
            with pytest.raises(RuntimeError, match="another event loop") as told:
                asyncio.run(store.get(key))
            return str(told.value)

        await asyncio.to_thread(elsewhere)


async def test_a_cancelled_write_leaves_the_client_usable(shared_daemon: Daemon, key: str) -> None:
    async with AsyncSessionStore(shared_daemon.address, timeout=100) as store:
        handle = await store.session(key)
        for n in range(20):
            task = asyncio.create_task(handle.append({"cancelled": n}))
            await asyncio.sleep(n * 0.0001)
            task.cancel()
            await asyncio.wait([task])
        told = await handle.append({"last": True})
        assert handle.messages[-1] == {"last": True}
        assert told.message_count <= 21
        sent = [message["cancelled"] for message in handle.messages[:-1]]
        assert len(sent) == len(set(sent))


def test_ctrl_c_leaves_a_write_unknown_and_the_client_usable(
    shared_daemon: Daemon, store: Any, key: str
) -> None:
    code = """
        import sys
        from proxies import Proxy
        from sessionstore import SessionStore
        target, key = sys.argv[1:]
        proxy = Proxy(target)
        store = SessionStore(proxy.address, timeout=100)
        handle = store.session(key)
        handle.append({"n": 0})
        proxy.swallow("from_daemon")
        print("writing", flush=True)
        try:
            handle.append({"n": 1})
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        proxy.heal()
        handle.append({"n": 2})
        print([message["n"] for message in handle.messages], flush=True)
        store.close()
        proxy.close()
    """
    process = python(code, shared_daemon.address, key)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    # The write is there, so its caller waits for the answer, which does not come.
    wait_until(lambda: store.get(key).message_count == 2, what="the write")
    process.send_signal(signal.SIGINT)
    assert output(process) == "interrupted\n[0, 1, 2]\n"


def test_a_signal_handler_may_write_whatever_it_interrupts(
    shared_daemon: Daemon, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it interrupts a thread that is just moving a snapshot, through the same handle and another one."""
    with SessionStore(shared_daemon.address, timeout=100) as store:
        handle, other = store.session(key), store.session(key + "/other")
        advanced = session.advanced

        def interrupted(*arguments: Any) -> Any:
            monkeypatch.setattr(session, "advanced", advanced)
            signal.raise_signal(signal.SIGUSR1)
            return advanced(*arguments)

        def handler(*_: object) -> None:
            other.append({"by": "handler"})
            handle.append({"by": "handler"})

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            monkeypatch.setattr(session, "advanced", interrupted)
            handle.append({"by": "main"})
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert other.messages == ({"by": "handler"},)
        assert handle.messages == ({"by": "main"},)
        assert handle.refresh().messages == ({"by": "main"}, {"by": "handler"})
        handle.append({"by": "main again"})
        assert handle.message_count == 3


def test_ctrl_c_at_any_moment_holds_up_nothing_afterwards(shared_daemon: Daemon, key: str) -> None:
    """Python looks for signals where a function begins, so an append is interrupted there, each time."""
    code = """
        import os, sys, time
        import grpc
        from sessionstore import SessionStore, _driver
        _driver.DRAIN_S = 200  # who waited for anything would wait for long
        target, key = sys.argv[1:]
        store = SessionStore(target, timeout=100)
        handle = store.session(key)
        sent = []
        def interrupted_at(place):
            begun = 0
            def trace(frame, event, argument):
                nonlocal begun
                at = frame
                while at is not None:
                    if at.f_code.co_filename.startswith(os.path.dirname(grpc.__file__)):
                        return  # what an interruption inside grpc does to grpc is not asked here
                    at = at.f_back
                begun += 1
                if begun == place:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            sent.append(place)
            sys.settrace(trace)
            try:
                handle.append({"n": place})
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(None)
            return False
        place = 1
        while interrupted_at(place):
            place += 1
        assert place > 50
        for n in range(1100):
            handle.append({"n": -1})
        found = [message["n"] for message in handle.refresh().messages if message["n"] > 0]
        assert len(found) == len(set(found)) and set(found) <= set(sent), found
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        store.close()
        print(time.monotonic() - begun < 60, flush=True)
    """
    assert output(python(code, shared_daemon.address, key)) == "True\n"

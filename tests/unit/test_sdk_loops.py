"""Event loops that come and go: one store per loop, stores left behind, and loops in several threads."""

import asyncio
import threading
from typing import Any

import pytest
from daemons import Daemon
from processes import output, python
from sessionstore import AsyncSessionHandle, AsyncSessionStore, SessionStore
from sessionstore.errors import ConflictError


async def opened(target: str, key: str) -> tuple[AsyncSessionStore, AsyncSessionHandle]:
    store = AsyncSessionStore(target, timeout=100)
    return store, await store.session(key)


def test_each_run_has_a_store_of_its_own(shared_daemon: Daemon, key: str) -> None:
    """Also side by side in several threads, beside a sync store, and without a word on stderr."""
    code = """
        import asyncio, sys, threading
        from sessionstore import AsyncSessionStore, SessionStore
        target, key = sys.argv[1:]
        async def write():
            async with AsyncSessionStore(target, timeout=100) as store:
                handle = await store.session(key)
                await asyncio.gather(*(handle.append({"n": n}) for n in range(20)))
        def runs():
            for _ in range(4):
                asyncio.run(write())
        threads = [threading.Thread(target=runs) for _ in range(3)]
        for thread in threads:
            thread.start()
        with SessionStore(target, timeout=100) as store:
            handle = store.session(key)
            for n in range(100):
                handle.append({"n": n})
            for thread in threads:
                thread.join()
            print(store.session(key).message_count)
    """
    assert output(python(code, shared_daemon.address, key)) == "340\n"


def test_a_store_binds_itself_to_the_loop_of_its_first_call(shared_daemon: Daemon, key: str) -> None:
    async def made() -> AsyncSessionStore:
        return AsyncSessionStore(shared_daemon.address, timeout=100)

    for store in (AsyncSessionStore(shared_daemon.address, timeout=100), asyncio.run(made())):

        async def use(store: AsyncSessionStore = store) -> int:
            async with store:
                return (await (await store.session(key)).append({})).message_count

        assert asyncio.run(use()) >= 1


def test_what_a_loop_left_behind_says_so_and_can_be_closed(shared_daemon: Daemon, key: str) -> None:
    """The store, its handles and its errors; closing it works on any loop once its own is closed."""
    store, handle = asyncio.run(opened(shared_daemon.address, key))
    with asyncio.Runner() as runner:
        second, behind = runner.run(opened(shared_daemon.address, key))
        runner.run(behind.append({"n": 1}))
        with pytest.raises(ConflictError) as told:
            runner.run(behind.append({"n": 2}, expected_revision=0))
    snapshot = behind.messages
    for call in (
        lambda: store.session(key),
        lambda: handle.append({}),
        lambda: handle.refresh(),
        lambda: told.value.fetch(),
        lambda: behind.append({}),
    ):

        async def use(call: Any = call) -> None:
            with pytest.raises(RuntimeError, match="belongs to another event loop; make one for each"):
                await call()

        asyncio.run(use())
    assert behind.messages == snapshot == ({"n": 1},)  # properties need no loop
    for each in (store, second, store):
        asyncio.run(each.close())
    with SessionStore(shared_daemon.address) as sync:
        assert sync.session(key).message_count == 1


def test_a_store_of_a_loop_that_still_lives_is_closed_there(shared_daemon: Daemon, key: str) -> None:
    with asyncio.Runner() as runner:
        store, handle = runner.run(opened(shared_daemon.address, key))

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                asyncio.run(store.close())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
        runner.run(handle.append({"n": 1}))
        runner.run(store.close())
        assert handle.message_count == 1


def test_a_loop_that_ended_in_the_middle_of_a_call_holds_up_no_close(shared_daemon: Daemon, key: str) -> None:
    """Its calls never end, so there is nothing to wait for."""
    code = """
        import asyncio, sys, time
        from sessionstore import AsyncSessionStore, _adriver
        async def opened(target, key):
            store = AsyncSessionStore(target, timeout=100)
            return store, await store.session(key)
        _adriver.DRAIN_S = 200  # who waited for anything would wait for long
        target, key = sys.argv[1:]
        loop = asyncio.new_event_loop()
        store, handle = loop.run_until_complete(opened(target, key))
        task = loop.create_task(handle.append({"n": 1}))
        loop.run_until_complete(asyncio.sleep(0))
        assert store._driver._under_way == 1
        task._log_destroy_pending = False
        loop.close()
        begun = time.monotonic()
        asyncio.run(store.close())
        print(time.monotonic() - begun < 60, flush=True)
        try:
            asyncio.run(store.session(key))
        except RuntimeError as error:
            print(error, flush=True)
    """
    process = python(code, shared_daemon.address, key)
    out, err = process.communicate(timeout=300)  # asyncio itself complains of the tasks that were left
    assert (out, process.returncode) == ("True\nthis AsyncSessionStore is closed\n", 0), err

"""Daemons that restart, by SIGTERM and by kill -9, under writers in several processes."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from daemons import clean_environment, wait_until
from sessionstore import SessionStore

# Two threads on one handle of a sync store, and two tasks on one handle of an async one, append to a session
# that all processes share, until a file tells them to stop. A number is written down as its append returns.
WRITER = """
    import asyncio, os, sys, threading
    from sessionstore import AsyncSessionStore, SessionStore
    target, name, log, stop = sys.argv[1:]
    acknowledged = open(log, "a", buffering=1)
    def note(by, n, told):
        acknowledged.write(f"{by} {n} {told.first_index}\\n")
    def write(handle, by):
        n = 0
        while not os.path.exists(stop):
            note(by, n, handle.append({"by": by, "n": n}))
            n += 1
    async def write_too(handle, by):
        n = 0
        while not os.path.exists(stop):
            note(by, n, await handle.append({"by": by, "n": n}))
            n += 1
    async def tasks():
        async with AsyncSessionStore(target, timeout=250) as store:
            handle = await store.session("shared")
            await asyncio.gather(*(write_too(handle, f"{name}{by}") for by in "cd"))
    with SessionStore(target, timeout=250) as store:
        handle = store.session("shared")
        threads = [threading.Thread(target=write, args=(handle, f"{name}{by}")) for by in "ab"]
        threads.append(threading.Thread(target=lambda: asyncio.run(tasks())))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    acknowledged.close()
"""
PROCESSES, WRITERS_EACH, RESTARTS, BETWEEN = 3, 4, 6, 20


def test_restarts_under_writers_in_several_processes(make_daemon: Any, tmp_path: Path) -> None:
    """Every call is answered: each message is there once, where its answer says, and nothing else is."""
    daemon = make_daemon(store="jsonl").start()
    stop = tmp_path / "stop"
    logs = [tmp_path / f"acknowledged{number}" for number in range(PROCESSES)]
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(WRITER), daemon.address]
    writers = [
        subprocess.Popen(
            [*command, f"p{number}", str(log), str(stop)],
            stderr=subprocess.PIPE, text=True, env=clean_environment(),
        )
        for number, log in enumerate(logs)
    ]  # fmt: skip

    def acknowledged() -> list[tuple[str, int, int]]:
        lines = [line.split() for log in logs if log.exists() for line in log.read_text().splitlines()]
        return [(by, int(n), int(index)) for by, n, index in lines]

    def at_work() -> bool:
        for writer in writers:
            if writer.poll() is not None:
                pytest.fail(f"a writer ended: {writer.communicate()}")
        done = acknowledged()
        return len(done) >= expected and len({by for by, _, _ in done}) == PROCESSES * WRITERS_EACH

    try:
        for number in range(RESTARTS + 1):
            expected = len(acknowledged()) + BETWEEN
            wait_until(at_work, 300, what="acknowledgements")
            if number < RESTARTS:
                daemon.restart(kill=bool(number % 2))
        stop.touch()
        for writer in writers:
            assert (writer.communicate(timeout=300)[1], writer.returncode) == ("", 0)
    finally:
        for writer in writers:
            if writer.poll() is None:
                writer.kill()
                writer.communicate()
    told = acknowledged()
    with SessionStore(daemon.address, timeout=100) as store:
        stored = store.session("shared").messages
    print(f"{len(told)} appends over {RESTARTS} restarts")
    assert len(told) >= (RESTARTS + 1) * BETWEEN
    assert len(stored) == len(told)
    assert {(m["by"], m["n"], index) for index, m in enumerate(stored)} == set(told)
    for by in {by for by, _, _ in told}:
        numbers = [m["n"] for m in stored if m["by"] == by]
        assert numbers == list(range(len(numbers))), by
    assert len({by for by, _, _ in told}) == PROCESSES * WRITERS_EACH

"""Clients whose network is cut and healed: packets dropped in silence, and links that go down, at either end.

A proxy that breaks connections tells both sides; a cut cable tells nobody. Runs as root on Linux only.
"""

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import networks
import pytest
from daemons import Daemon, clean_environment, wait_until
from networks import CUTS, FAR_ADDRESS, Cable

WHY_NOT = networks.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "never")


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    made = Cable()
    yield made
    made.close()


@pytest.fixture
def far_daemon(cable: Cable, make_daemon: Any) -> Daemon:
    """A daemon at the far end, with a store that outlives it."""
    launcher = cable.far(sys.executable, "-m", "sessionstored")
    listen = f"{FAR_ADDRESS}:0"
    return make_daemon(store="jsonl", listen=listen, flags=("--insecure",), launcher=launcher).start()


class Client:
    """A process at the near end, which says one line per step and reads one line per order."""

    def __init__(self, cable: Cable, code: str, *arguments: str) -> None:
        command = cable.near(sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=clean_environment(),
        )  # fmt: skip

    def line(self) -> str:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if not said:
            self._process.kill()
            pytest.fail(f"the client ended: {self._process.communicate()}")
        return said

    def order(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """What it said last; it must end well."""
        try:
            out, err = self._process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            self._process.kill()
            pytest.fail(f"the client hung: {self._process.communicate()}")
        assert (self._process.returncode, err) == (0, ""), out + err
        return out

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


# Three threads of a sync store and three tasks of an async one append numbers, each to a session of its own,
# until told to stop. Each number is counted when its append returned.
WRITERS = """
    import asyncio, sys, threading
    from sessionstore import AsyncSessionStore, SessionStore
    target = sys.argv[1]
    stop = threading.Event()
    done, replayed = [0] * 6, [0] * 6
    store = SessionStore(target, timeout=250)
    def note(number, told):
        assert told.first_index == done[number], (number, told, done)
        replayed[number] += told.replayed
        done[number] += 1
    def write(number):
        handle = store.session(f"k{number}")
        while not stop.is_set():
            note(number, handle.append({"n": done[number]}))
    async def write_too(other, number):
        handle = await other.session(f"k{number}")
        while not stop.is_set():
            note(number, await handle.append({"n": done[number]}))
    async def task():
        async with AsyncSessionStore(target, timeout=250) as other:
            await asyncio.gather(*(write_too(other, number) for number in (3, 4, 5)))
    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    threads.append(threading.Thread(target=asyncio.run, args=(task(),)))
    for thread in threads:
        thread.start()
    for order in sys.stdin:
        if order == "stop\\n":
            break
        print(min(done), flush=True)
    stop.set()
    for thread in threads:
        thread.join()
    for number in range(6):
        found = [message["n"] for message in store.session(f"k{number}").messages]
        assert found == list(range(done[number])), (number, done, found[-3:])
    print(sum(done), sum(replayed), flush=True)
"""


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_under_writers_loses_and_doubles_nothing(cable: Cable, far_daemon: Daemon, cut: str) -> None:
    """What was in flight is answered after the cut is healed, within its timeout, and applied once.

    Also if the daemon was killed and started again meanwhile, of which its clients never hear.
    """
    client = Client(cable, WRITERS, far_daemon.address)

    def least() -> int:
        client.order("how many?")
        return int(client.line())

    try:
        for killed in (False, True):
            before = least()
            wait_until(lambda before=before: least() > before + 5, 120, what="appends")
            cable.cut(cut)
            try:
                if killed:
                    far_daemon.restart(kill=True)
                time.sleep(1.5)
                stuck = least()
                time.sleep(0.3)
                assert least() <= stuck + 1, "the cut does not cut"
            finally:
                cable.heal(cut)
        before = least()
        wait_until(lambda: least() > before + 5, 120, what="appends after the cut")
        client.order("stop")
        count, replayed = map(int, client.end().split())
    finally:
        client.kill()
    print(f"{cut}: {count} appends, {replayed} were applied before the cut lost their answer")
    assert count > 60


# One append per store is sent into the cut with little time; then, as the cut is known, another. Before and
# after, there is time enough on any machine.
IMPATIENT = """
    import asyncio, sys
    from sessionstore import AsyncSessionStore, OutcomeUnknownError, SessionStore, UnavailableError
    target = sys.argv[1]
    store = SessionStore(target, timeout=100)
    handle = store.session("sync")
    handle.append({"n": 0})
    runner = asyncio.Runner()
    async def opened():
        return AsyncSessionStore(target, timeout=100)
    other = runner.run(opened())
    theirs = runner.run(other.session("async"))
    runner.run(theirs.append({"n": 0}))
    async def retried(error):
        return await error.retry()
    def give(timeout_s):
        store._driver._timeout_s = other._driver._timeout_s = timeout_s
    def unknown(append):
        try:
            append({"n": 1})
        except OutcomeUnknownError as error:
            return error
        raise AssertionError("it was answered")
    print("ready", flush=True)
    assert sys.stdin.readline() == "cut\\n"
    give(1)
    mine = unknown(handle.append)
    its = unknown(lambda message: runner.run(theirs.append(message)))
    for append in (handle.append, lambda message: runner.run(theirs.append(message))):
        try:
            append({"n": "never sent"})
        except UnavailableError:
            continue
        raise AssertionError("it was sent")
    print("unknown", flush=True)
    assert sys.stdin.readline() == "healed\\n"
    give(100)
    assert mine.retry().first_index == 1
    assert runner.run(retried(its)).first_index == 1
    assert handle.append({"n": 2}).message_count == 3
    assert runner.run(theirs.append({"n": 2})).message_count == 3
    for key in ("sync", "async"):
        assert [message["n"] for message in store.session(key).messages] == [0, 1, 2]
    runner.run(other.close())
    runner.close()
    store.close()
    print("once", flush=True)
"""


@pytest.mark.parametrize("cut", CUTS)
def test_an_append_without_the_time_to_outlast_a_cut_is_unknown_and_can_be_retried(
    cable: Cable, far_daemon: Daemon, cut: str
) -> None:
    client = Client(cable, IMPATIENT, far_daemon.address)
    try:
        assert client.line() == "ready"
        cable.cut(cut)
        try:
            client.order("cut")
            said = client.line()
        finally:
            cable.heal(cut)
        assert said == "unknown"
        client.order("healed")
        assert client.end() == "once\n"
    finally:
        client.kill()

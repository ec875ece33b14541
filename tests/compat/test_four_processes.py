"""Four processes append to the same ten sessions: everything is stored, once, in each process's own order."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Daemon, clean_environment
from sessionstore import SessionStore

WRITERS = Path(__file__).with_name("writers.py")
NATIVE = ["sync", "async"]
SESSIONS = 10
WAIT_S = 300.0


def write(kind: str, target: str, processes: int, appends: int) -> float:
    """Run the writing processes to their ends; the longest of their times, in seconds."""
    running = [
        subprocess.Popen(
            [sys.executable, str(WRITERS), kind, target, f"writer{number}", str(SESSIONS), str(appends)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        for number in range(processes)
    ]
    took_s = []
    try:
        for process in running:
            out, err = process.communicate(timeout=WAIT_S)
            assert (process.returncode, err) == (0, "")
            took_s.append(float(out))
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return max(took_s)


def check(address: str, processes: int, appends: int) -> None:
    numbers: dict[str, list[int]] = defaultdict(list)
    with SessionStore(address) as store:
        assert len(list(store.list("shared:"))) == SESSIONS
        for session in range(SESSIONS):
            seen: dict[str, list[int]] = defaultdict(list)
            for message in store.session(f"shared:{session}").messages:
                seen[message["writer"]].append(message["number"])
            assert set(seen) == {f"writer{number}" for number in range(processes)}
            for writer, order in seen.items():
                assert order == list(range(session, appends, SESSIONS)), (session, writer)
                numbers[writer] += order
    assert sum(map(len, numbers.values())) == processes * appends
    assert all(sorted(order) == list(range(appends)) for order in numbers.values())


def run(daemon: Daemon, kind: str, appends: int, target: str = "") -> None:
    took_s = write(kind, target or daemon.address, 4, appends)
    check(daemon.address, 4, appends)
    rate = 4 * appends / took_s
    print(f"{kind}: 4 processes x {appends} appends stored, none lost or doubled, in order, at {rate:.0f}/s")
    assert daemon.terminate() == 0
    daemon.start()
    check(daemon.address, 4, appends)


@pytest.fixture
def jsonl(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon(store="jsonl").start()


def test_four_processes_through_managers(jsonl: Daemon) -> None:
    run(jsonl, "manager", 1000)


@pytest.mark.parametrize("kind", NATIVE)
def test_four_processes(jsonl: Daemon, kind: str) -> None:
    run(jsonl, kind, 250)


def test_four_processes_that_find_the_daemon_by_its_directory(jsonl: Daemon) -> None:
    run(jsonl, "workspace", 50, target=str(jsonl.data))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NATIVE)
def test_four_processes_in_full(jsonl: Daemon, kind: str) -> None:
    run(jsonl, kind, 1000)

"""The rung of EIO: system calls of a real daemon on the store's files fail, by strace's fault injection.

The daemon runs and is written to by four threads. Then strace attaches, and the n-th call of one kind that a
thread makes on one kind of file fails, alone or with all after it. From then on nothing is acknowledged:
calls that wait are told that their outcome is unknown, later ones that the daemon stops, health turns to
NOT_SERVING, and the process ends with 3. Started again without faults, the daemon has everything that was
acknowledged, and every unknown call, sent once more, is there once.
"""

import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from crash.load import PATIENCE_S, Load, count_answers, judge, judge_files, settle_unknown, stored_in
from crash.tally import Tally
from daemons import Daemon, channel_to, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored.engine.jsonl.names import file_name, temporary_name
from sessionstored.service import SERVICE

EXIT_STORAGE_FAILED = 3
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_KEYS = ("a", "b", "c")
_GENERATIONS = 60
_FLAGS = ("--checkpoint-s-max", "0.2")
_CALLS = 30
# (system call, of which files); each is made again and again by a daemon that is written to.
FAULTS = (
    ("pwrite64", "log"),
    ("fdatasync", "log"),
    ("write", "sessions"),
    ("fsync", "sessions"),
    ("fsync", "directory"),
    ("pwrite64", "database"),
    ("fdatasync", "database"),
    ("rename", "sessions"),
)
_NTH_MAX = 12


def unavailable() -> str:
    """Why this machine cannot do it; empty if it can."""
    if not shutil.which("strace"):
        return "there is no strace"
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        probe = subprocess.run(
            ["timeout", "-s", "INT", "0.5", "strace", "-p", str(sleeper.pid)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return "" if "attached" in probe.stderr else f"strace cannot attach: {probe.stderr.strip()}"
    finally:
        sleeper.kill()
        sleeper.wait()


def run(root: Path, seed: int, times: int) -> Tally:
    """Make so many calls fail, each kind in its turn."""
    tally = Tally()
    rng = random.Random(seed)
    daemon = Daemon(root / "data", store="jsonl", flags=_FLAGS)
    try:
        for n in range(times):
            call, files = FAULTS[n % len(FAULTS)]
            nth = 1 + rng.randrange(_NTH_MAX) if n >= len(FAULTS) else 1
            when = f"{nth}+" if rng.random() < 0.5 else f"{nth}"
            _fail_once(tally, daemon, f"{n}", rng.randrange(1 << 30), call, files, when)
    finally:
        daemon.close()
    return tally


def _fail_once(
    tally: Tally, daemon: Daemon, name: str, seed: int, call: str, files: str, when: str
) -> None:
    """Start, write, fail one call, see it end, start again, and judge."""
    daemon.start()
    keys = [f"{name}:{key}" for key in _KEYS]
    churn = _Churn(daemon, f"{name}:churn")
    what = f"{call} of {files}, number {when}"
    with watched_health(daemon) as states, Load(daemon.address, keys, seed) as load, churn:
        load.wait_for("ACKNOWLEDGED", _CALLS)
        with _failing(daemon, call, _paths(daemon.data, files, [*keys, churn.key]), when):
            code = _end_of(daemon)
    tally.times += 1
    tally.phases[f"{call} of {files}"] += 1
    for reason in ("OUTCOME_UNKNOWN", "SHUTTING_DOWN"):
        tally.phases[f"answered {reason}"] += load.account.reasons[reason]
    if code != EXIT_STORAGE_FAILED:
        tally.lose("wrong", f"{what}: it ended with {code}:\n{daemon.stderr[-3000:]}")
        if code is None:
            daemon.kill()
    elif states[-1:] != [_NOT_SERVING]:
        tally.lose("wrong", f"{what}: health said {states}, and never NOT_SERVING")
    daemon.start()
    judge(tally, load.account, stored_in(daemon, keys), what)
    count_answers(tally, load.account)
    settle_unknown(load.account, daemon)
    stored = stored_in(daemon, keys)
    judge(tally, load.account, stored, f"{what}, after every unknown call was sent again")
    churn.judge(tally, daemon, what)
    if daemon.terminate() != 0:
        tally.lose("wrong", f"{what}: no clean stop after recovery:\n{daemon.stderr[-2000:]}")
    judge_files(tally, daemon.data, stored, what)


def _end_of(daemon: Daemon) -> int | None:
    """How it ended by itself; None if it did not."""
    try:
        return daemon.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return None


def _paths(data: Path, files: str, keys: list[str]) -> list[Path]:
    """The store's files of one kind, those to come included."""
    names = [file_name(key) for key in keys]
    temporary = [temporary_name(name, n) for name in names for n in range(1, _GENERATIONS)]
    return {
        "log": [data / "journal.db-wal"],
        "database": [data / "journal.db"],
        "directory": [data / "sessions"],
        "sessions": [data / "sessions" / name for name in names + temporary],
    }[files]


@contextmanager
def _failing(daemon: Daemon, call: str, paths: list[Path], when: str) -> Iterator[None]:
    """Let the n-th such call ("N+": and those after it) of a thread fail, on these files only."""
    command = ["strace", "-f", "-o", os.devnull, "-p", str(daemon.pid)]
    command += [argument for path in paths for argument in ("-P", str(path))]
    command += ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={when}"]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert strace.stderr is not None
        for line in strace.stderr:
            if "attached" in line:
                break
        yield
    finally:
        if strace.poll() is None:
            strace.send_signal(signal.SIGINT)
        strace.communicate(timeout=PATIENCE_S)


@contextmanager
def watched_health(daemon: Daemon) -> Iterator[list[int]]:
    """Every health state that a watcher is told, until its stream ends."""
    states: list[int] = []
    with channel_to(daemon.address) as channel:
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))

        def watch() -> None:
            try:
                states.extend(state.status for state in stream)
            except grpc.RpcError:
                return  # the daemon ended

        thread = threading.Thread(target=watch)
        thread.start()
        wait_until(lambda: states, PATIENCE_S, "the first health state")
        try:
            yield states
            thread.join(PATIENCE_S)
        finally:
            stream.cancel()
            thread.join()


@dataclass
class _Churn:
    """A session that is replaced as a whole all the time, so that its file is written anew and renamed."""

    daemon: Daemon
    key: str
    acknowledged: int = 0
    tried: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._replace)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(PATIENCE_S)

    def _replace(self) -> None:
        while not self.stop.is_set():
            self.tried += 1
            line = b'{"role": "user", "n": %d}\n' % self.tried
            try:
                if self.tried == 1:
                    self.daemon.stub.CreateSession(v1.CreateSessionRequest(key=self.key, messages=line))
                else:
                    request = v1.ReplaceMessagesRequest(key=self.key, start=0, messages=line)
                    self.daemon.stub.ReplaceMessages(request, timeout=PATIENCE_S)
            except grpc.RpcError:
                return  # its outcome is unknown, or it is refused: either number may stand
            self.acknowledged = self.tried

    def judge(self, tally: Tally, daemon: Daemon, what: str) -> None:
        """What stands is the last acknowledged, or the one that came after it."""
        tally.acknowledged += self.acknowledged
        numbers = [message["n"] for message in stored_in(daemon, [self.key])[self.key]]
        if numbers not in ([self.acknowledged], [self.tried]):
            tally.lose("lost", f"{what}: {self.key} holds {numbers}, not {self.acknowledged}")

"""Processes that take turns on one session under leases, some killed with -9, some stopped beyond the ttl.

Whoever is stopped is continued as soon as somebody else has taken over, and then tries to write. The daemon
is killed now and then, too. In the end the session and the logs are judged: each turn's messages stand
together and where their writer believed them to be, tokens grow, no turn began before the one before was
over, every late write was refused, and after each fault the next turn began within the ttl and a second. To
that comes how long this machine kept a thread waiting that had nothing to do but to wake up and ask the
daemon.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import grpc
from crash import turn_worker
from crash.tally import Tally
from crash.turn_worker import KEY, now_s
from daemons import Daemon, channel_to
from sessionstore import SessionStore
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc

TTL_S = 1.0
_PROCESSES = 6
_SLACK_S = 1.0
_GIVE_UP_S = 600.0
_PATIENCE_S = 60.0


@dataclass
class _Process:
    """A worker, and what it has logged so far."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]
    read_to: int = 0
    stopped_with: int = 0
    """The token with which it stopped itself; 0: it runs."""


@dataclass
class _Known:
    """What the logs say of one token's turn."""

    events: dict[str, float] = field(default_factory=dict)
    refused: int = 0


class Turns:
    """The processes. A context: begins and ends them."""

    def __init__(self, root: Path, daemon: Daemon, rng: random.Random, faults: float) -> None:
        self._root, self._daemon, self._rng, self._faults = root, daemon, rng, faults
        self._stop = root / "stop"
        self._began = 0
        self._processes: list[_Process] = []
        self.known: defaultdict[int, _Known] = defaultdict(_Known)
        self.waiting: list[float] = []
        self.done = 0
        self.last_token = 0

    def __enter__(self) -> "Turns":
        self._processes = [self._begin() for _ in range(_PROCESSES)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._processes:
            each.process.kill()
            each.process.wait()

    def _begin(self) -> _Process:
        self._began += 1
        name = f"worker {self._began}"
        log = self._root / f"{self._began}.log"
        log.touch()
        arguments = [self._daemon.address, name, str(self._rng.randrange(1 << 30)), str(log), str(self._stop)]
        with (self._root / f"{self._began}.err").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, turn_worker.__file__, *arguments, str(TTL_S), str(self._faults)],
                stderr=errors,
            )
        return _Process(name, log, process)

    def look(self) -> None:
        """Read the logs, continue who was stopped and has a successor, and replace who is dead."""
        for n, each in enumerate(self._processes):
            self._read(each)
            if each.stopped_with and self.last_token > each.stopped_with:
                os.kill(each.process.pid, signal.SIGCONT)
                each.stopped_with = 0
            code = each.process.poll()
            if code is not None and not self._stop.exists():
                errors = Path(str(each.log).replace(".log", ".err")).read_text()
                assert code == -signal.SIGKILL, f"{each.name} ended with {code}:\n{errors}"
                self._read(each)
                self._processes[n] = self._begin()

    def _read(self, each: _Process) -> None:
        with each.log.open("rb") as file:
            file.seek(each.read_to)
            whole = file.read().rpartition(b"\n")[0]
        each.read_to += len(whole) + bool(whole)
        for line in whole.splitlines():
            what, token, at_s = json.loads(line)
            if what == "waits":
                continue
            known = self.known[token]
            known.events[what] = at_s
            known.refused += what == "refused"
            self.done += what == "done"
            if what == "begun":
                self.last_token = max(self.last_token, token)
            elif what == "stopped":
                each.stopped_with = token

    def end(self) -> None:
        """Let each finish its turn, and end."""
        self._stop.touch()
        end_s = time.monotonic() + _PATIENCE_S * 3
        while any(each.process.poll() is None for each in self._processes):
            assert time.monotonic() < end_s, "the processes did not end"
            for each in self._processes:
                self._read(each)
                if each.stopped_with:
                    # Nobody may follow any more: then its lease runs out, and nobody has it.
                    time.sleep(TTL_S + _SLACK_S)
                    os.kill(each.process.pid, signal.SIGCONT)
                    each.stopped_with = 0
            time.sleep(0.02)
        for each in self._processes:
            self._read(each)
            assert each.process.returncode in (0, -signal.SIGKILL)


class Stalls:
    """A thread that wakes up and asks the daemon, and knows the longest that this took. A context."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.worst_s = 0.0

    def __enter__(self) -> "Stalls":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(_PATIENCE_S)

    def _work(self) -> None:
        with channel_to(self._address) as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            while not self._over.is_set():
                begun_s = now_s()
                time.sleep(0.02)
                try:
                    stub.DeleteSession(v1.DeleteSessionRequest(key="nobody's"), timeout=_PATIENCE_S)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        continue  # the daemon is being killed
                self.worst_s = max(self.worst_s, now_s() - begun_s - 0.02)


def run(root: Path, seed: int, turns: int, *, faults: float = 0.04, daemon_kills: int = 0) -> Tally:
    """Take so many turns, and judge them."""
    tally = Tally()
    records = root / "records"
    records.mkdir(parents=True)
    daemon = Daemon(root / "data", store="jsonl")
    down: list[tuple[float, float]] = []
    try:
        daemon.start()
        rng = random.Random(seed)
        with Stalls(daemon.address) as stalls, Turns(records, daemon, rng, faults) as processes:
            end_s = time.monotonic() + _GIVE_UP_S
            while processes.done < turns:
                assert time.monotonic() < end_s, f"{processes.done} of {turns} turns in {_GIVE_UP_S:g} s"
                processes.look()
                kills = len(down)
                if kills < daemon_kills and processes.done >= turns * (kills + 1) / (daemon_kills + 1):
                    begun_s = now_s()
                    daemon.restart(kill=True)
                    down.append((begun_s, now_s()))
                time.sleep(0.01)
            processes.end()
        with SessionStore(daemon.address) as store:
            messages = store.session(KEY).messages
        _judge(tally, processes, messages, down, stalls.worst_s)
    finally:
        daemon.close()
    return tally


def _judge(
    tally: Tally,
    processes: Turns,
    messages: tuple[dict[str, object], ...],
    down: list[tuple[float, float]],
    worst_s: float,
) -> None:
    known = {token: each for token, each in processes.known.items() if token}
    _judge_messages(tally, known, messages)
    takeovers = sorted(_takeovers(tally, known, down))
    for each in takeovers:
        if each > TTL_S + _SLACK_S + worst_s:
            tally.lose("wrong", f"a takeover took {each:.2f} s; the worst stall was {worst_s:.2f} s")
    count = {what: sum(what in each.events for each in known.values()) for what in ("killed", "stopped")}
    tally.times = count["killed"] + count["stopped"]
    tally.phases.update(count)
    tally.acknowledged = processes.done
    lost = sum("lost" in each.events for each in known.values()) - count["stopped"]
    tally.notes.append(
        f"{processes.done} turns, {len(messages)} messages, {count['killed']} killed, {count['stopped']} "
        f"stopped and continued, {lost} lost otherwise, {len(down)} kills of the daemon"
    )
    if takeovers:
        tally.notes.append(
            f"takeover after a fault, with a ttl of {TTL_S:g} s: p50 {takeovers[len(takeovers) // 2]:.2f} s, "
            f"at most {takeovers[-1]:.2f} s; worst stall {worst_s:.2f} s"
        )


def _judge_messages(
    tally: Tally, known: dict[int, _Known], messages: tuple[dict[str, object], ...]
) -> None:
    parts: defaultdict[int, list[str]] = defaultdict(list)
    last = 0
    for index, message in enumerate(messages):
        token, part = int(str(message["token"])), str(message["part"])
        parts[token].append(part)
        if token < last:
            tally.lose("wrong", f"message {index} is of token {token}, and follows one of {last}")
        if message["index"] != index:
            tally.lose("wrong", f"message {index} was written by one who knew {message['index']} messages")
        last = max(last, token)
    for token, each in known.items():
        if parts[token] not in ([], ["begin"], ["begin", "end"]):
            tally.lose("wrong", f"the turn of token {token} wrote {parts[token]}")
        if "done" in each.events and parts[token] != ["begin", "end"]:
            tally.lose("lost", f"the turn of token {token} was done, and wrote {parts[token]}")
        if "written late" in each.events:
            tally.lose("wrong", f"token {token} wrote after it was stopped and somebody else had taken over")
        if "stopped" in each.events and (each.refused != 2 or "lost" not in each.events):
            tally.lose("wrong", f"token {token} was stopped, and then: {each}")
    unheard = parts.keys() - known.keys()
    if any(parts[token] for token in unheard):
        tally.lose("wrong", f"nobody had the tokens {unheard}")


def _takeovers(
    tally: Tally, known: dict[int, _Known], down: list[tuple[float, float]]
) -> list[float]:
    """How long after each fault the next turn began, unless the daemon was away meanwhile."""
    found: list[float] = []
    tokens = sorted(token for token, each in known.items() if "begun" in each.events)
    for token, following in pairwise(tokens):
        events, begun_s = known[token].events, known[following].events["begun"]
        fault_s = events.get("killed", events.get("stopped"))
        if fault_s is None:
            if "done" in events and begun_s < events["done"]:
                tally.lose("wrong", f"token {following} began before {token} was done")
            continue
        if not any(away_s < begun_s and fault_s < back_s + TTL_S for away_s, back_s in down):
            found.append(begun_s - fault_s)
    return found

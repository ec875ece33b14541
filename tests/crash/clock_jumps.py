"""The rung of clocks that jump: an injected clock under random histories, and daemons under shifted ones.

In process, the wall clock jumps by years, both ways, before every third operation, and a restart may find any
other clock, steady ones too. After each jump, calls and request_ids of before are sent again. Real daemons
run one after the other on one directory: the steady clocks in a time namespace (which needs root; without it
they stay), the wall clock shifted by a launcher.
"""

import asyncio
import random
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crash.histories import Histories, Writer, observe
from crash.load import PATIENCE_S
from crash.odd_daemon import odd_daemon
from crash.tally import Tally
from daemons import Daemon
from engines import Clock, request
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored.engine import Engine, Order, Query, Reply, Request
from sessionstored.engine.jsonl import Tuning, open_jsonl
from sessionstored.rules import Answer, Append

YEAR_S = 365.25 * 86400
_JUMP_YEARS_MAX = 30
_OPERATIONS = 25
_REMEMBERED_MAX = 30
_TUNING = Tuning(checkpoint_interval_s=0.01, hot_sessions_max=3, cache_bytes_max=2000)
_KEYS = ("a", "b", "c")


def run(root: Path, seed: int, restarts: int) -> Tally:
    """Jump about all the time over so many restarts of an engine, then of real daemons."""
    tally = Tally()
    with pytest.MonkeyPatch.context() as patch:
        try:
            asyncio.run(_histories(tally, root / "engine", Clock(patch), random.Random(seed), restarts))
        except AssertionError as error:
            tally.lose("wrong", f"a history is not what the model says: {error}")
    _daemons(tally, root / "daemons")
    return tally


# An injected clock ------------------------------------------------------------------------------------------


@dataclass
class _Memory:
    """Answers that must come again, and the last that was seen of each session."""

    answers: list[tuple[Request, Answer]] = field(default_factory=list)
    update_times_us: dict[str, int] = field(default_factory=dict)
    requests: int = 0


async def _histories(tally: Tally, data: Path, clock: Clock, rng: random.Random, restarts: int) -> None:
    memory = _Memory()
    writer: Writer | None = None
    uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    for _ in range(restarts):
        # Another machine, or the same one booted again: any wall clock, and a steady one from any start on.
        clock.wall_s = _jump_s(rng)
        clock.steady_s = rng.choice((0.0, -uptime_s + 1, rng.random() * 10 * YEAR_S))
        engine = await open_jsonl(data, tuning=_TUNING)
        try:
            writer = writer or Writer(engine, _KEYS, Histories(), rng.randrange(1 << 30), "client")
            writer.engine = engine
            await _send_again(tally, engine, memory)
            for _ in range(_OPERATIONS):
                if rng.random() < 0.3:
                    clock.wall_s = _jump_s(rng)
                    tally.times += 1
                    await _send_again(tally, engine, memory)
                await writer.step()
                tally.acknowledged += 1
                await _with_a_request_id(engine, memory)
                await _look(tally, engine, writer, memory)
        finally:
            await engine.close()


def _jump_s(rng: random.Random) -> float:
    return (rng.random() * 2 - 1) * _JUMP_YEARS_MAX * YEAR_S


async def _with_a_request_id(engine: Engine, memory: _Memory) -> None:
    """An append that its caller names; and another that only has a call identity, never said to be known."""
    memory.requests += 1
    n = memory.requests
    for asked in (
        request(Append("named", [b'{"n": %d}' % n]), request_id=f"delivery {n}"),
        request(Append("called", [b'{"n": %d}' % n]), n, client="other"),
    ):
        (reply,) = await engine.submit([asked])
        assert isinstance(reply.outcome, Answer), reply
        memory.answers.append((asked, reply.outcome))
    del memory.answers[:-_REMEMBERED_MAX]


async def _send_again(tally: Tally, engine: Engine, memory: _Memory) -> None:
    """Every call that is remembered gets its first answer."""
    for asked, first in memory.answers:
        (again,) = await engine.submit([asked])
        if again != Reply(first, True):
            tally.lose("duplicated", f"{asked} was answered {first}, and sent again {again}")


async def _look(tally: Tally, engine: Engine, writer: Writer, memory: _Memory) -> None:
    """The sessions are what the model says, times never went back, and listings are in their order."""
    for key in _KEYS:
        if await observe(engine, key) != writer.histories.of(key)[-1]:
            tally.lose("wrong", f"{key} is not what was written")
    for key in ("named", "called"):
        seen = await observe(engine, key)
        wanted = tuple(b'{"n": %d}' % n for n in range(1, memory.requests + 1))
        if seen is None or seen[1] != wanted:
            tally.lose("wrong", f"{key} is not what was appended, in its order")
    for order in Order:
        heads = (await engine.list(Query(order=order))).heads
        places = [
            (head.update_time_us if "update_time" in order.value else 0, head.key.encode()) for head in heads
        ]
        if places != sorted(places, reverse=order.value.endswith("desc")):
            tally.lose("wrong", f"a listing by {order.value} is not in order: {places}")
        times = {head.key: head.update_time_us for head in heads}
        for key, before in memory.update_times_us.items():
            if times.get(key, before) < before:
                tally.lose("wrong", f"the update time of {key} went back from {before} to {times[key]}")
        memory.update_times_us = times  # a session that was deleted begins anew


# Real daemons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clocks:
    wall_s: float
    steady_s: int


_SHIFTS = (
    _Clocks(0, 0),
    _Clocks(20 * YEAR_S, 400 * 86400),
    _Clocks(-20 * YEAR_S, 0),
    _Clocks(3 * YEAR_S, 2000 * 86400),
)


def no_time_namespace() -> str:
    """Why steady clocks cannot be shifted here; empty if they can."""
    with suppress(OSError):
        done = subprocess.run([*_unshared(1), "true"], capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stderr.strip()
    return "there is no unshare command"


def _unshared(steady_s: int) -> tuple[str, ...]:
    return ("unshare", "-T", "--boottime", str(steady_s), "--monotonic", str(steady_s), "--")


def _daemons(tally: Tally, data: Path) -> None:
    """Start daemons under one pair of clocks after the other; every second one is killed."""
    why_not = no_time_namespace()
    tally.notes.append(
        f"steady clocks of daemons stay: {why_not}" if why_not else "steady clocks of daemons are shifted"
    )
    calls: list[tuple[v1.AppendMessagesRequest, session_pb2.WriteResult]] = []
    last_us = 0
    for n, clocks in enumerate(_SHIFTS):
        launcher = odd_daemon("--wall-shift-s", str(clocks.wall_s))
        if not why_not:
            launcher = (*_unshared(clocks.steady_s), *launcher)
        daemon = Daemon(data, store="jsonl", launcher=launcher)
        try:
            daemon.start()
            last_us = _calls_of_one_daemon(tally, daemon, n, calls, last_us)
            if n % 2:
                daemon.kill()
            elif daemon.terminate() != 0:
                tally.lose("wrong", f"under {clocks} it did not stop cleanly: {daemon.stderr[-1000:]}")
        finally:
            daemon.close()
        tally.times += 1


def _calls_of_one_daemon(
    tally: Tally,
    daemon: Daemon,
    n: int,
    calls: list[tuple[v1.AppendMessagesRequest, session_pb2.WriteResult]],
    last_us: int,
) -> int:
    """Send every call of the daemons before again, then make new ones; returns the last update time."""
    for request_, first in calls:
        again = daemon.stub.AppendMessages(request_, timeout=PATIENCE_S).result
        if not again.replayed or again.revision != first.revision or again.update_time != first.update_time:
            tally.lose("duplicated", f"daemon {n}: {request_} was answered {first}, and now {again}")
    for i in range(5):
        by_call = v1.AppendMessagesRequest(key="k", messages=b'{"n": %d}\n' % (len(calls)))
        if i % 2:
            by_call.request_id = f"{n} {i}"
        else:
            by_call.call.CopyFrom(session_pb2.CallIdentity(client_id="client", sequence=n * 10 + i + 1))
        result = daemon.stub.AppendMessages(by_call, timeout=PATIENCE_S).result
        tally.acknowledged += 1
        now_us = result.update_time.ToMicroseconds()
        if now_us < last_us or (calls and result.revision <= calls[-1][1].revision):
            tally.lose("wrong", f"daemon {n}: {result} comes after {calls[-1][1]}")
        last_us = now_us
        calls.append((by_call, result))
    got = daemon.stub.GetSession(v1.GetSessionRequest(key="k"), timeout=PATIENCE_S)
    if got.messages != b"".join(b'{"n": %d}\n' % i for i in range(len(calls))):
        tally.lose("wrong", f"daemon {n}: the session holds {got.messages!r}")
    return last_us

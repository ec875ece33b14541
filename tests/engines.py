"""Engines for tests: each opened by its name, and small helpers that ask them.

The conformance suite runs over every name in KINDS. An engine with durability can be closed and opened
again.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from sessionstored.engine import Engine, Reply, Request, Slice
from sessionstored.engine.jsonl import DEFAULT_TUNING, Tuning, open_jsonl
from sessionstored.engine.memory import MemoryEngine
from sessionstored.rules import DEFAULT_LIMITS, Answer, Head, Limits, Mutation, Outcome, Refusal
from sessionstored.windows import Call

KINDS = ("memory", "jsonl", "jsonl-strained")
DURABLE_KINDS = ("jsonl", "jsonl-strained")

# Nothing stays in memory, checkpoints run all the time, groups are small: what is rare elsewhere is the rule.
STRAINED = Tuning(
    cache_bytes_max=256,
    hot_sessions_max=2,
    group_requests_max=4,
    group_bytes_max=512,
    backlog_bytes=1,
    checkpoint_interval_s=0.005,
)

NO_LIMIT = 1 << 62


async def open_kind(kind: str, data: Path, limits: Limits = DEFAULT_LIMITS) -> Engine:
    """Open an engine by its name. `data` is the directory of those that need one."""
    if kind == "memory":
        # The clocks are looked up at each call, so that a test can set them.
        return MemoryEngine(limits, wall_ns=lambda: time.time_ns(), clock_s=boot_s)
    tuning = STRAINED if kind == "jsonl-strained" else DEFAULT_TUNING
    return await open_jsonl(data, limits=limits, tuning=tuning)


def boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Clock:
    """Shifts the clocks of an engine in this process: the wall clock both ways, the steady one forward."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wall_s = 0.0
        self.steady_s = 0.0
        time_ns, clock_gettime = time.time_ns, time.clock_gettime
        patch.setattr(time, "time_ns", lambda: time_ns() + int(self.wall_s * 1e9))
        patch.setattr(
            time,
            "clock_gettime",
            lambda clock: clock_gettime(clock) + (self.steady_s if clock == time.CLOCK_BOOTTIME else 0),
        )


def request(mutation: Mutation, sequence: int = 0, *, client: str = "client", **named: object) -> Request:
    """A request as the daemon makes it, with a call identity if there is a sequence, and with a digest."""
    call_fields = {name: named.pop(name) for name in ("answered_through", "age_s") if name in named}
    call = Call(client, sequence, **call_fields) if sequence else None  # type: ignore[arg-type]
    digest = repr((mutation, named.get("request_id", ""))).encode() if call or "request_id" in named else b""
    return Request(mutation, call, digest=digest, **named)  # type: ignore[arg-type]


async def submit(engine: Engine, *mutations: Mutation) -> list[Outcome]:
    """Submit mutations as one group."""
    return [reply.outcome for reply in await engine.submit([Request(mutation) for mutation in mutations])]


async def one(engine: Engine, asked: Request) -> Reply:
    """Submit one request."""
    (reply,) = await engine.submit([asked])
    return reply


async def done(engine: Engine, mutation: Mutation) -> Answer:
    """Submit a mutation that must be applied."""
    (outcome,) = await submit(engine, mutation)
    assert isinstance(outcome, Answer), outcome
    return outcome


async def refused(engine: Engine, mutation: Mutation) -> Refusal:
    """Submit a mutation that must be refused."""
    (outcome,) = await submit(engine, mutation)
    assert isinstance(outcome, Refusal), outcome
    return outcome


async def read(engine: Engine, key: str, start: int = 0, stop: int | None = None) -> Slice:
    """Read a range of messages, all of them by default."""

    def select(head: Head) -> tuple[int, int]:
        return start, head.message_count if stop is None else stop

    return await engine.read(key, select, NO_LIMIT)


async def lines(engine: Engine, key: str) -> Sequence[bytes]:
    """A session's messages."""
    return list((await read(engine, key)).lines)

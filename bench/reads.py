"""Workloads that read: 500 warm messages, the last 20 of a long session, what is near, a start. B9 to B11."""

import inspect
import itertools
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
from sessionstore import SessionStore
from sessionstore.manager import SessionManager
from sessionstore.v1 import session_store_pb2 as pb
from sessionstore.v1 import session_store_pb2_grpc

from bench.alone import floors
from bench.messages import encoded
from bench.peers import raw_peers
from bench.run import Run, Subject
from bench.seedlike import window

_LENGTH = 500
_NEAR_CALLS = 200
_NEAR_BYTES = 64 << 20


def reads(run: Run) -> None:
    """Open a session of 500 messages that the daemon has in memory, decoded; the peers' rows likewise."""
    assert run.ours is not None
    with ExitStack() as stack:
        store = stack.enter_context(SessionStore(run.ours.target))
        size = _stub(run, stack).GetSession(pb.GetSessionRequest(key="read:500")).ByteSize()

        def ours() -> None:
            assert len(store.session("read:500").messages) == _LENGTH

        calls: dict[Subject, Callable[[], object]] = {
            ("read 500", "ours"): ours,
            ("read 500", "bare unary"): floors(run, stack).unary(size),
        }
        for raw in raw_peers(run, stack):
            raw.append("read", [encoded(n) for n in range(_LENGTH)])
            calls["read 500", raw.name] = lambda raw=raw: raw.last("read", _LENGTH)
        run.time_calls(calls, run.sizes.alone // 2 or 1)
        run.results.notes.append(f"read 500: GetSession's reply has {size:,} bytes")


def last_messages(run: Run) -> None:
    """The last 20 of 10,000: warm; not in the daemon's memory; and its file not in the system's, either."""
    assert run.ours is not None
    with ExitStack() as stack:
        stub = _stub(run, stack)
        each = run.sizes.cold + 1
        fresh = iter(range(2 * each * run.sizes.rounds))

        def read(key: str) -> None:
            reply = stub.GetSession(pb.GetSessionRequest(key=key, last=20))
            assert len([json.loads(line) for line in reply.messages.splitlines()]) == 20

        for n, order in run.rounds(["warm", "cold, file cached", "cold"]):
            for name in order:
                if name == "warm":
                    run.time_once(("last 20", name), lambda: read("read:20"), n, run.sizes.alone)
                    continue
                numbers = list(itertools.islice(fresh, each))  # each of these sessions is read once
                for number in numbers:
                    _cache(run.ours.data / "sessions" / f"cold_{number}.jsonl", keep=name != "cold")
                keys = iter([f"cold:{number}" for number in numbers])
                run.time_once(("last 20", name), lambda keys=keys: read(next(keys)), n, run.sizes.cold)


def _cache(path: Path, *, keep: bool) -> None:
    """Bring a file into the system's cache, or put it out."""
    if keep:
        path.read_bytes()
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def near(run: Run) -> None:
    """What takes no round trip: a near-cached session, and a window of 500 messages from a snapshot."""
    assert run.ours is not None
    with ExitStack() as stack:
        store = stack.enter_context(SessionStore(run.ours.target))
        handle = store.session("read:500")
        messages = list(handle.messages)
        run.time_calls(
            {
                ("near", "history"): lambda: handle.history(max_messages=_LENGTH),
                ("near", "plain loop"): lambda: window(messages, _LENGTH),
            },
            run.sizes.alone,
        )
        if "near_cache_bytes" not in inspect.signature(SessionManager).parameters:
            run.results.not_run["near"] = "this SDK has no near cache"
            return
        manager = stack.enter_context(SessionManager(run.ours.target, near_cache_bytes=_NEAR_BYTES))
        nearby = stack.enter_context(SessionStore(run.ours.target, near_cache_bytes=_NEAR_BYTES))
        kept = nearby.session("read:500")
        run.time_many(
            ("near", "get_or_create"), lambda: manager.get_or_create("read:500").messages, _NEAR_CALLS
        )
        run.time_many(("near", "catch_up"), lambda: kept.catch_up().messages, _NEAR_CALLS)


def start_up(run: Run) -> None:
    """A start after a clean stop, until the first call is answered."""
    assert run.ours is not None
    for n in range(run.sizes.starts):
        run.ours.stop()
        run.results.add(("start", "ours", "start_s"), n, run.ours.start())


def _stub(run: Run, stack: ExitStack) -> session_store_pb2_grpc.SessionStoreStub:
    assert run.ours is not None
    channel = stack.enter_context(grpc.insecure_channel(run.ours.target))
    return session_store_pb2_grpc.SessionStoreStub(channel)

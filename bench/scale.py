"""Workloads over many sessions: a page of a long list, and a store of a million. Bars B12 and B13."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle, islice

from sessionstore import SessionStore

from bench.alone import floors
from bench.generate import generate
from bench.messages import message
from bench.run import Run, Subject
from bench.servers import Ours
from bench.stores import numbered

_PAGE = 100
_SMALL = 10_000
_HANDLES = 200
_TOUCHED_SHARE = 50


def listing(run: Run) -> None:
    """The newest 100 of many sessions, in a store of their own."""
    data = run.folder / "listed"
    generate(data, numbered("agent:", run.sizes.listed))
    with ExitStack() as stack:
        store = _served(run, stack, "listed")
        run.time_calls(
            {("listing", "ours"): _list(store), ("listing", "bare unary"): floors(run, stack).unary(64)},
            run.sizes.alone,
        )


def scale(run: Run) -> None:
    """A large store beside one of 10,000 sessions: start, list, open, append, memory."""
    if not run.sizes.scale:
        run.results.not_run["scale"] = "the quick run leaves it out"
        return
    sizes = {"small": min(_SMALL, run.sizes.scale), "large": run.sizes.scale}
    for name, sessions in sizes.items():
        run.say(f"generating {sessions:,} sessions")
        generate(run.folder / name, numbered("agent:", sessions))
    with ExitStack() as stack:
        calls: dict[Subject, Callable[[], object]] = {}
        servers = {}
        for name, sessions in sizes.items():
            server = servers[name] = Ours(name, run.folder, run.folder / name)
            stack.callback(server.stop)
            run.say(f"starting with {sessions:,} sessions")
            server.start()
            for n in range(run.sizes.starts):
                server.stop()
                run.results.add(("scale", name, "start_s"), n, server.start())
            store = stack.enter_context(SessionStore(server.target))
            calls |= _calls(name, store, sessions)
        run.time_calls(calls, run.sizes.alone)
        for name, sessions in sizes.items():
            _touch(servers[name].target, sessions)
            run.results.add(("scale", name, "resident_gib"), 0, servers[name].resident_bytes() / (1 << 30))


def _calls(name: str, store: SessionStore, sessions: int) -> dict[Subject, Callable[[], object]]:
    rng = random.Random(1)
    handles = cycle(
        [store.session(f"agent:{rng.randrange(sessions)}") for _ in range(min(_HANDLES, sessions))]
    )
    body = message(0)
    return {
        ("scale list", name): _list(store),
        ("scale open", name): lambda: store.session(f"agent:{rng.randrange(sessions)}").messages,
        ("scale append", name): lambda: next(handles).append(body),
    }


def _touch(target: str, sessions: int) -> None:
    """Read a share of all sessions, so that memory is what it is in use."""
    rng = random.Random(2)
    keys = [f"agent:{n}" for n in rng.sample(range(sessions), max(1, sessions // _TOUCHED_SHARE))]
    with SessionStore(target) as store, ThreadPoolExecutor(16) as pool:
        for _ in pool.map(store.session, keys):
            pass


def _served(run: Run, stack: ExitStack, name: str) -> SessionStore:
    server = Ours(name, run.folder, run.folder / name)
    server.start()
    stack.callback(server.stop)
    return stack.enter_context(SessionStore(server.target))


def _list(store: SessionStore) -> Callable[[], object]:
    def page() -> None:
        assert len(list(islice(store.list(order_by="update_time desc", page_size=_PAGE), _PAGE))) == _PAGE

    return page

"""Workloads of one caller: "alone" (an append, and the floors), "turn", "long", "length". Bars B5 to B8."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count, cycle

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore.manager import SessionManager

from bench.drivers import INSERT_SQLITE, sqlite
from bench.floors import Floors
from bench.messages import encoded, message, turn
from bench.peers import FRAMEWORKS, Raw, raw_peers
from bench.run import Run, Subject
from bench.seedlike import WholeFile
from bench.servers import Bare
from bench.stores import ALONE

TURN_LENGTH = 1000
_WINDOW = 50
Call = Callable[[], object]


def floors(run: Run, stack: ExitStack) -> Floors:
    """The floors, until the stack closes."""
    bare = Bare(run.folder)
    bare.log.unlink(missing_ok=True)
    port = bare.start()
    stack.callback(bare.stop)
    made = Floors(run.folder, bare.target, port)
    stack.callback(made.close)
    return made


def alone(run: Run) -> None:
    """One caller appends one message, by the sync clients."""
    assert run.ours is not None
    with ExitStack() as stack:
        calls: dict[Subject, Call] = {
            ("alone", name): call for name, call in floors(run, stack).calls().items()
        }
        store = stack.enter_context(SessionStore(run.ours.target))
        handles = cycle([store.session(f"alone:{n}") for n in range(ALONE)])
        body = message(0)
        calls["alone", "ours"] = lambda: next(handles).append(body)
        for raw in raw_peers(run, stack):
            calls["alone", raw.name] = _appending(raw)
        run.time_calls(calls, run.sizes.alone)


def _appending(raw: Raw) -> Call:
    keys = cycle([f"alone:{n}" for n in range(ALONE)])
    return lambda: raw.append(next(keys), [encoded(0)])


def turns(run: Run) -> None:
    """Append the four messages of a turn, then read the last 50 of 1,000.

    Ours asks the daemon again between the two (`refresh`), so that what others wrote would be seen, as the
    peers' reads would.
    """
    assert run.ours is not None
    target = run.ours.target
    with ExitStack() as stack:
        calls: dict[Subject, Call] = {}
        store = stack.enter_context(SessionStore(target))
        number, handle = count(), store.session("turn:sync")

        def sync() -> None:
            handle.append(*turn(next(number)))
            handle.refresh().history(max_messages=_WINDOW)

        later = AsyncSessionStore(target)
        stack.callback(lambda: run.loop.run_until_complete(later.close()))
        awaited = run.loop.run_until_complete(later.session("turn:async"))

        async def asynchronous() -> None:
            await awaited.append(*turn(next(number)))
            (await awaited.refresh()).history(max_messages=_WINDOW)

        async def opened() -> None:
            fresh = await later.session("turn:opened")
            await fresh.append(*turn(next(number)))
            fresh.history(max_messages=_WINDOW)

        calls["turn", "ours sync"] = sync
        calls["turn", "ours async"] = asynchronous
        calls["turn", "ours async, opened anew"] = opened
        for raw in raw_peers(run, stack):
            raw.append("turn", [encoded(n) for n in range(TURN_LENGTH)])
            calls["turn", raw.name] = _raw_turn(raw, number)
        for name, make in FRAMEWORKS.items() if run.peers else ():
            with run.optional(name):
                framework = run.loop.run_until_complete(make(run, TURN_LENGTH))
                stack.callback(lambda made=framework: run.loop.run_until_complete(made.close()))
                calls["turn", name] = framework.turn
        run.time_calls(calls, run.sizes.turns)


def _raw_turn(raw: Raw, number: "count[int]") -> Call:
    def call() -> None:
        raw.append("turn", [json.dumps(each) for each in turn(next(number))])
        raw.last("turn", _WINDOW)

    return call


def long_sessions(run: Run) -> None:
    """One more message for a session of 10,000: written as a whole, appended, and saved by the drop-in."""
    assert run.ours is not None
    with ExitStack() as stack:
        store = stack.enter_context(SessionStore(run.ours.target))
        manager = stack.enter_context(SessionManager(run.ours.target))
        handle, session = store.session("long:append"), manager.get_or_create("long:save")
        whole = WholeFile(run.folder / "long.jsonl", "long", [message(n) for n in range(10_000)])

        def save_whole() -> None:
            whole.messages.append(message(0))
            whole.save()

        def save() -> None:
            session.add_message("user", "one more")
            manager.save(session)

        body = message(0)
        slow, many = run.sizes.slow, run.sizes.alone // 5 or 1
        run.time_calls(
            {
                ("long", "whole-file save"): save_whole,
                ("long", "ours append"): lambda: handle.append(body),
                ("long", "ours save"): save,
            },
            {("long", "whole-file save"): slow, ("long", "ours append"): many, ("long", "ours save"): slow},
        )


def lengths(run: Run) -> None:
    """One more message for sessions of several lengths."""
    assert run.ours is not None
    with ExitStack() as stack:
        store = stack.enter_context(SessionStore(run.ours.target))
        db = sqlite(str(run.folder / "lengths.sqlite"))
        stack.callback(db.close)
        calls: dict[Subject, Call] = {}
        counts: dict[Subject, int] = {}
        body = message(0)
        for length in run.sizes.lengths:
            workload = f"length {length}"
            handle = store.session(f"length:{length}")
            calls[workload, "ours"] = lambda handle=handle: handle.append(body)
            db.execute("BEGIN")
            db.executemany(INSERT_SQLITE, [(workload, encoded(n)) for n in range(length)])
            db.execute("COMMIT")
            calls[workload, "sqlite3"] = lambda key=workload: db.execute(INSERT_SQLITE, (key, encoded(0)))
            whole = WholeFile(run.folder / "length.jsonl", workload, [message(n) for n in range(length)])
            calls[workload, "whole-file save"] = whole.save
            counts |= dict.fromkeys([(workload, "ours"), (workload, "sqlite3")], run.sizes.alone)
            counts[workload, "whole-file save"] = run.sizes.slow
        run.time_calls(calls, counts)

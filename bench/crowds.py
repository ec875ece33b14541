"""Workload "crowd": many callers in two processes append to sessions of their own. Bars B1 to B4, B14."""

import os
import threading
import time
from pathlib import Path

from bench.crowd import PROCESSES, Crowd, Seen
from bench.drivers import sqlite
from bench.run import Run

_SQLITE_CALLERS = 8
_PROBE_PAUSE_S = 0.01


def crowds(run: Run) -> None:
    """Every system at every number of callers, in turn; then the steady state."""
    opened = _open(run)
    try:
        subjects = [(name, callers) for name in opened for callers in _callers(name, run.sizes.crowd_callers)]
        subjects.sort(key=lambda subject: subject[1])  # what is compared is measured within the same minute
        for n, order in run.rounds(subjects):
            for name, callers in order:
                os.sync()
                seen = opened[name].load(callers, run.sizes.warm_s, run.sizes.crowd_s)
                _note(run, name, callers, n, seen)
        if run.sizes.steady_s:
            run.say("steady state")
            _steady(run, opened["ours async"])
        else:
            run.results.not_run["steady"] = "the quick run leaves it out"
    finally:
        for crowd in opened.values():
            crowd.close()


def _callers(name: str, wanted: tuple[int, ...]) -> list[int]:
    return (
        [callers for callers in wanted if callers <= 4] + [_SQLITE_CALLERS]
        if name == "sqlite3"
        else list(wanted)
    )


def _open(run: Run) -> dict[str, Crowd]:
    assert run.ours is not None
    peers: list[tuple[str, str, str]] = []
    for level, server in run.redis.items():
        peers += [(f"redis.asyncio {level}", "RedisAsync", server.socket)]
        peers += [(f"redis-py {level}", "RedisThreads", server.socket)]
    if run.postgres is not None:
        peers += [("psycopg async", "PsycopgAsync", run.postgres.dsn)]
        peers += [("psycopg threads", "PsycopgThreads", run.postgres.dsn)]
    sessions = run.sizes.crowd_sessions
    callers = max(run.sizes.crowd_callers)
    opened = {
        "ours async": Crowd("OursAsync", run.ours.target, callers, "async:", sessions, run.folder),
        "ours threads": Crowd("OursThreads", run.ours.target, callers, "threads:", sessions, run.folder),
    }
    for name, driver, where in peers:
        with run.optional(name):
            opened[name] = Crowd(driver, where, callers, f"{driver}:", sessions, run.folder)
    if run.peers:
        path = str(run.folder / "crowd.sqlite")
        sqlite(path).close()
        opened["sqlite3"] = Crowd("Sqlite", path, _SQLITE_CALLERS, "sqlite:", sessions, run.folder)
    return opened


def _note(run: Run, name: str, callers: int, n: int, seen: Seen) -> None:
    workload = f"crowd {callers}"
    run.results.add((workload, name, "throughput_per_s"), n, seen.throughput_per_s)
    for share, measure in ((0.5, "p50_ms"), (0.99, "p99_ms")) if seen.latencies_s else ():
        run.results.add((workload, name, measure), n, seen.quantile_ms(share))


class FlushProbe:
    """Flushes a file of its own again and again: when the disk itself was slow, and for how long."""

    def __init__(self, folder: Path) -> None:
        self.flushes: list[tuple[float, float]] = []
        self._fd = os.open(folder / "probe.log", os.O_WRONLY | os.O_CREAT, 0o600)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "FlushProbe":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._fd)

    def _run(self) -> None:
        while not self._ended.wait(_PROBE_PAUSE_S):
            begun = time.monotonic()
            os.pwrite(self._fd, b"x" * 512, 0)
            os.fdatasync(self._fd)
            self.flushes.append((begun, time.monotonic()))

    def within(self, begun: float, ended: float) -> float:
        """How many seconds between two moments a flush was under way."""
        return sum(max(0.0, min(end, ended) - max(begin, begun)) for begin, end in self.flushes)


def _steady(run: Run, crowd: Crowd) -> None:
    """One long load; a short one before it as what it is compared with."""
    sizes, results = run.sizes, run.results
    callers = max(sizes.crowd_callers)
    short = [crowd.load(callers, sizes.warm_s, sizes.crowd_s).throughput_per_s for _ in range(sizes.rounds)]
    with FlushProbe(run.folder) as probe:
        seen = crowd.load(callers, sizes.warm_s, sizes.steady_s)
    results.add(("steady", "short run", "throughput_per_s"), 0, sorted(short)[len(short) // 2])
    results.add(("steady", "ours", "throughput_per_s"), 0, seen.throughput_per_s)
    stalls = [ended - begun - probe.within(begun, ended) for begun, ended in seen.slow]
    results.add(("steady", "ours", "stall_ms"), 0, max(stalls, default=0.0) * 1000)
    if seen.latencies_s:
        results.add(("steady", "ours", "p99.9_ms"), 0, seen.quantile_ms(0.999))
        results.add(("steady", "ours", "max_ms"), 0, seen.quantile_ms(1.0))
    worst = max((ended - begun for begun, ended in probe.flushes), default=0.0)
    results.add(("steady", "flush probe", "max_ms"), 0, worst * 1000)
    results.notes.append(f"steady: {callers} callers in {PROCESSES} processes, {sizes.steady_s:g} s")

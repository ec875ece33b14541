"""A run: its directory, its servers, and how subjects are measured in turn.

Rules: within a round every subject of a workload is measured once, in an order that is turned by one place
in the next round; before each measure the disk is left alone with what others have written (sync). What
this machine does not have is noted as not run, and the rest goes on.
"""

import asyncio
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TypeVar

from bench.results import Results
from bench.servers import NotHere, Ours, Postgres, Redis, make_table
from bench.sizes import Sizes

T = TypeVar("T")
Subject = tuple[str, str]
"""(workload, system)."""


class Run:
    """What the workloads share."""

    def __init__(self, folder: Path, sizes: Sizes, *, peers: bool) -> None:
        self.folder, self.sizes, self.peers = folder, sizes, peers
        self.results = Results()
        self.stack = ExitStack()
        self.loop = asyncio.new_event_loop()
        self.ours: Ours | None = None
        self.redis: dict[str, Redis] = {}
        self.postgres: Postgres | None = None
        self._begun_s = time.monotonic()

    def say(self, text: str) -> None:
        """Tell whoever waits."""
        print(f"[{time.monotonic() - self._begun_s:5.0f} s] {text}", file=sys.stderr, flush=True)

    @contextmanager
    def optional(self, name: str) -> Iterator[None]:
        """What is in the block may be missing on this machine: then `name` is not run, visibly."""
        try:
            yield
        except (NotHere, ImportError) as error:
            self.results.not_run[name] = str(error)
            self.say(f"{name}: not run: {error}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A workload. If it fails, it is not run, and why is told; the others go on."""
        self.say(name)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.results.not_run[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"

    def start_peers(self) -> None:
        """Start the peers' servers."""
        if not self.peers:
            self.results.not_run["peers"] = "left out by --no-peers"
            return
        for level in ("always", "everysec"):
            with self.optional(f"redis {level}"):
                server = Redis(self.folder, level)
                self.stack.callback(server.stop)
                server.start()
                self.redis[level] = server
        with self.optional("postgres"):
            postgres = Postgres(self.folder)
            self.stack.callback(postgres.stop)
            postgres.start()
            make_table(postgres.dsn)
            self.postgres = postgres

    def rounds(self, subjects: Sequence[T]) -> Iterator[tuple[int, list[T]]]:
        """For each round its number, and the subjects in its order."""
        for n in range(self.sizes.rounds):
            turn = n % len(subjects) if subjects else 0
            yield n, [*subjects[turn:], *subjects[:turn]]

    def time_calls(
        self, subjects: Mapping[Subject, Callable[[], object]], calls: Mapping[Subject, int] | int
    ) -> None:
        """Time single calls of each (workload, system) in each round, and note their median and p99.

        A subject is a function, or a coroutine function; its first call in each round is not counted.
        """
        for n, order in self.rounds(list(subjects)):
            for subject in order:
                count = calls if isinstance(calls, int) else calls[subject]
                self.time_once(subject, subjects[subject], n, count)

    def time_once(self, subject: Subject, call: Callable[[], object], n: int, calls: int) -> None:
        """The same for one subject in one round."""
        os.sync()
        taken = sorted(self._taken(call, calls))
        self.results.add((*subject, "p50_ms"), n, median(taken) * 1000)
        self.results.add((*subject, "p99_ms"), n, taken[int(0.99 * len(taken))] * 1000)

    def time_many(self, subject: Subject, call: Callable[[], object], calls: int) -> None:
        """Time what takes microseconds, many calls at a time, and note the mean of a call in each round."""
        for n in range(self.sizes.rounds):
            call()
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            self.results.add((*subject, "mean_us"), n, (time.perf_counter() - begun) / calls * 1e6)

    def _taken(self, subject: Callable[[], object], calls: int) -> list[float]:
        if inspect.iscoroutinefunction(subject):
            return self.loop.run_until_complete(_awaited(subject, calls))
        subject()
        taken = []
        for _ in range(calls):
            begun = time.perf_counter()
            subject()
            taken.append(time.perf_counter() - begun)
        return taken

    def close(self) -> None:
        """End the servers."""
        self.stack.close()
        self.loop.close()


async def _awaited(subject: Callable[[], object], calls: int) -> list[float]:
    await subject()  # type: ignore[misc]
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        await subject()  # type: ignore[misc]
        taken.append(time.perf_counter() - begun)
    return taken

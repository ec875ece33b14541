"""Many callers in two processes, which stay open between rounds, so that systems can be loaded in turn."""

import json
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.servers import NotHere, environment

PROCESSES = 2
_AHEAD_S = 0.1


@dataclass(frozen=True)
class Seen:
    """What a load gave."""

    throughput_per_s: float
    latencies_s: Sequence[float]
    """Sorted."""
    slow: list[tuple[float, float]]

    def quantile_ms(self, share: float) -> float:
        """The latency that this share of calls did not exceed. There must be calls."""
        return self.latencies_s[min(len(self.latencies_s) - 1, int(share * len(self.latencies_s)))] * 1000


class Crowd:
    """Callers of one system."""

    def __init__(
        self, driver: str, where: str, callers: int, prefix: str, sessions: int, folder: Path
    ) -> None:
        """Start the processes; every caller gets sessions of its own among `prefix``n`.

        Raises:
            NotHere: a package is missing.
            RuntimeError: the driver could not be opened; the text ends with why.

        """
        self._folder = folder
        self._logs = [folder / f"{driver}-{n}.log" for n in range(PROCESSES)]
        each = max(1, callers // PROCESSES)
        self._workers: list[subprocess.Popen[str]] = []
        for n in range(PROCESSES):
            with self._logs[n].open("wb") as log:
                worker = subprocess.Popen(
                    [sys.executable, "-m", "bench.worker"], text=True, env=environment(),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
            keys = [f"{prefix}{i}" for i in range(n, sessions, PROCESSES)]
            self._workers.append(worker)
            self._say(worker, {"driver": driver, "where": where, "callers": each, "keys": keys})
        for n in range(PROCESSES):
            self._line(n)

    def load(self, callers: int, warm_s: float, seconds: float) -> Seen:
        """Append with so many callers for so long. One caller is one of the first process."""
        shares = [callers // PROCESSES + (n < callers % PROCESSES) for n in range(PROCESSES)]
        begin_s = time.monotonic() + _AHEAD_S
        files = [self._folder / f"latencies-{n}" for n in range(PROCESSES)]
        for worker, share, file in zip(self._workers, shares, files, strict=True):
            command = {"callers": share, "begin_s": begin_s, "warm_s": warm_s, "seconds": seconds}
            self._say(worker, command | {"latencies": str(file)})
        slow: list[tuple[float, float]] = []
        latencies = array("f")
        for n, file in enumerate(files):
            slow += [(begun, ended) for begun, ended in json.loads(self._line(n))["slow"]]
            latencies.frombytes(file.read_bytes())
            file.unlink()
        return Seen(len(latencies) / seconds, sorted(latencies), slow)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            if worker.stdin is not None and not worker.stdin.closed:
                worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()

    @staticmethod
    def _say(worker: subprocess.Popen[str], words: dict[str, object]) -> None:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(words) + "\n")
        worker.stdin.flush()

    def _line(self, n: int) -> str:
        stdout = self._workers[n].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            self.close()
            said = self._logs[n].read_text().strip()
            if "ModuleNotFoundError" in said:
                raise NotHere(said.splitlines()[-1])
            raise RuntimeError(f"a worker ended: {said[-1500:]}")
        return line

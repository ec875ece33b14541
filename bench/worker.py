"""A process of callers. Started by `crowd`, it opens its driver once and then loads its system on command.

    python -m bench.worker      # settings: one line {"driver", "where", "callers", "keys"} on its input

It says "ready", and then, for each line {"callers", "begin_s", "warm_s", "seconds", "latencies"} on its
input, appends with so many callers from `begin_s` on (the machine's monotonic clock, so that processes
begin together). What ends after the warm-up and within the seconds is counted; latencies go to the file
named, as 4-byte floats. The answer is one line of JSON. It ends with its input.
"""

import asyncio
import json
import random
import sys
import threading
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

from bench.drivers import DRIVERS

SLOW_S = 0.025
_SLOW_MAX = 10_000


@dataclass
class Load:
    """One load, and what its callers saw."""

    begin_s: float
    count_from_s: float
    end_s: float
    latencies: array = field(default_factory=lambda: array("f"))
    slow: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of what took longer than SLOW_S."""

    def note(self, begun: float, ended: float) -> None:
        """Count a call."""
        if self.count_from_s <= ended <= self.end_s:
            self.latencies.append(ended - begun)
        if ended - begun > SLOW_S and ended >= self.count_from_s and len(self.slow) < _SLOW_MAX:
            self.slow.append((begun, ended))


class Share:
    """The sessions of one caller, again and again, in a random order."""

    def __init__(self, keys: list[str], seed: int) -> None:
        self._keys, self._next = keys[:], 0
        random.Random(seed).shuffle(self._keys)

    def key(self) -> str:
        """The next one."""
        self._next = (self._next + 1) % len(self._keys)
        return self._keys[self._next]


async def _call(append: Any, share: Share, caller: int, load: Load) -> None:
    await asyncio.sleep(max(0.0, load.begin_s - time.monotonic()))
    while (begun := time.monotonic()) < load.end_s:
        await append(caller, share.key())
        load.note(begun, time.monotonic())


def _call_sync(append: Any, share: Share, caller: int, load: Load, errors: list[BaseException]) -> None:
    try:
        time.sleep(max(0.0, load.begin_s - time.monotonic()))
        while (begun := time.monotonic()) < load.end_s:
            append(caller, share.key())
            load.note(begun, time.monotonic())
    except BaseException as error:
        errors.append(error)


def _threads(append: Any, shares: list[Share], load: Load) -> None:
    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=_call_sync, args=(append, share, n, load, errors))
        for n, share in enumerate(shares)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _loads() -> Any:
    """The commands, as they come."""
    for line in sys.stdin:
        command = json.loads(line)
        count_from = command["begin_s"] + command["warm_s"]
        yield command, Load(command["begin_s"], count_from, count_from + command["seconds"])


def _answer(command: dict[str, Any], load: Load) -> None:
    with open(command["latencies"], "wb") as file:
        load.latencies.tofile(file)
    print(json.dumps({"slow": load.slow}), flush=True)


async def _asynchronous(driver: Any, settings: dict[str, Any], shares: list[Share]) -> None:
    append = await driver.open(settings["where"], settings["callers"], settings["keys"])
    print("ready", flush=True)
    loads = iter(_loads())
    while (found := await asyncio.to_thread(next, loads, None)) is not None:
        command, load = found
        some = shares[: command["callers"]]
        await asyncio.gather(*(_call(append, share, n, load) for n, share in enumerate(some)))
        _answer(command, load)
    await driver.close()


def _synchronous(driver: Any, settings: dict[str, Any], shares: list[Share]) -> None:
    append = driver.open(settings["where"], settings["callers"], settings["keys"])
    print("ready", flush=True)
    for command, load in _loads():
        _threads(append, shares[: command["callers"]], load)
        _answer(command, load)
    driver.close()


def main(settings: dict[str, Any]) -> None:
    """Serve the parent until its end of the pipe closes."""
    driver = DRIVERS[settings["driver"]]()
    callers, keys = settings["callers"], settings["keys"]
    shares = [Share(keys[n::callers], n) for n in range(callers)]
    if driver.asynchronous:
        asyncio.run(_asynchronous(driver, settings, shares))
    else:
        _synchronous(driver, settings, shares)


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))

"""One process that takes turns on a session: python turn_worker.py ADDRESS NAME SEED LOG STOP TTL FAULTS.

A turn reads how far the session is, writes that it begins, thinks, and writes that it ends. In some turns it
kills itself with -9 while it thinks, or stops itself, and whoever runs it continues it later; then it tries
to go on writing. What it does is in its log, a JSON array per line, with times of a clock that all processes
of this machine share. It ends when the file STOP is there.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from sessionstore import LeaseHeldError, LeaseLostError, SessionHandle, SessionStore, Turn

KEY = "turns"
_WAIT_S = 60.0


def now_s() -> float:
    """Seconds on a clock that all processes of this machine share, and that never jumps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Worker:
    """One process's turns."""

    def __init__(self, name: str, rng: random.Random, log: TextIO, ttl_s: float, faults: float) -> None:
        self._name, self._rng, self._log = name, rng, log
        self._ttl_s, self._faults = ttl_s, faults

    def say(self, what: str, token: int = 0) -> None:
        """Log an event."""
        self._log.write(json.dumps([what, token, now_s()]) + "\n")
        self._log.flush()

    def turn(self, store: SessionStore, handle: SessionHandle) -> None:
        """Take one turn."""
        token = 0
        self.say("waits")
        try:
            with handle.turn(ttl=self._ttl_s, wait=_WAIT_S, holder=self._name) as turn:
                token = turn.token
                self.say("begun", token)
                turn.append(self._message(turn, "begin"))
                self._think(store, turn)
                turn.append(self._message(turn, "end"))
                self.say("done", token)
        except LeaseLostError:
            self.say("lost", token)
        except LeaseHeldError:
            self.say("waited in vain")

    def _message(self, turn: Turn, part: str) -> dict[str, object]:
        """A message that says where it must be, by what the turn has read."""
        return {"token": turn.token, "part": part, "index": turn.message_count, "by": self._name}

    def _think(self, store: SessionStore, turn: Turn) -> None:
        chance = self._rng.random()
        if chance < self._faults:
            self.say("killed", turn.token)
            os.kill(os.getpid(), signal.SIGKILL)
        elif chance < 2 * self._faults:
            self.say("stopped", turn.token)
            os.kill(os.getpid(), signal.SIGSTOP)
            # The daemon's own refusal, past what this process knows itself; then what a user meets.
            message = self._message(turn, "late")
            line = json.dumps(message).encode()
            self._late(turn, lambda: store._driver.run(turn._append([line], None, None)))
            self._late(turn, lambda: turn.append(message))
        else:
            time.sleep(self._rng.random() * 0.005)

    def _late(self, turn: Turn, write: Callable[[], object]) -> None:
        try:
            write()
        except LeaseLostError:
            self.say("refused", turn.token)
        else:
            self.say("written late", turn.token)


def main() -> None:
    """Take turns until told to stop."""
    address, name, seed, log, stop, ttl_s, faults = sys.argv[1:]
    with SessionStore(address, timeout=_WAIT_S) as store, Path(log).open("a") as file:
        worker = Worker(name, random.Random(seed), file, float(ttl_s), float(faults))
        handle = store.session(KEY)
        while not Path(stop).exists():
            worker.turn(store, handle)


if __name__ == "__main__":
    main()

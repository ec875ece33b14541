"""`sessionstored` that notes each call that it gets, for tests only: a launcher that a `Daemon` is given.

python counting_daemon.py FILE COMMAND...

FILE gets a line for each call, as soon as it arrives: the method's name.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sessionstored.calls import Calls


def counting_daemon(calls: Path) -> tuple[str, ...]:
    """The launcher for a `Daemon`."""
    return (sys.executable, __file__, str(calls))


def counted(calls: Path) -> Counter[str]:
    """How many calls of each method there were so far."""
    return Counter(calls.read_text().split()) if calls.exists() else Counter()


def _count(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    intercept = Calls.intercept_service

    async def counting(self: Calls, continuation: Any, details: Any) -> Any:
        os.write(fd, details.method.rpartition("/")[2].encode() + b"\n")
        return await intercept(self, continuation, details)

    Calls.intercept_service = counting  # type: ignore[method-assign]


def main() -> None:
    """Count, and be `sessionstored`."""
    _count(sys.argv[1])
    del sys.argv[1]
    from sessionstored.__main__ import main as command

    command()


if __name__ == "__main__":
    main()

"""One writing process of test_four_processes: `python writers.py KIND TARGET WRITER SESSIONS APPENDS`.

It appends messages 0, 1, 2 and so on to the sessions in turn, each with its own name and number, and prints
how long that took.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore.manager import SessionManager


def message(writer: str, number: int) -> dict[str, Any]:
    return {"writer": writer, "number": number}


def through_manager(target: str, writer: str, keys: list[str], count: int) -> None:
    with SessionManager(target) as manager:
        for number in range(count):
            session = manager.get_or_create(keys[number % len(keys)])
            session.add_message("user", f"{writer} says {number}", **message(writer, number))
            manager.save(session)


def through_workspace(target: str, writer: str, keys: list[str], count: int) -> None:
    """The same manager, but found by its directory."""
    manager = SessionManager(Path(target))
    for number in range(count):
        session = manager.get_or_create(keys[number % len(keys)])
        session.add_message("user", f"{writer} says {number}", **message(writer, number))
        manager.save(session)


def through_sync(target: str, writer: str, keys: list[str], count: int) -> None:
    with SessionStore(target) as store:
        handles = [store.session(key) for key in keys]
        for number in range(count):
            handles[number % len(keys)].append(message(writer, number))


def through_async(target: str, writer: str, keys: list[str], count: int) -> None:
    async def write() -> None:
        async with AsyncSessionStore(target) as store:
            handles = [await store.session(key) for key in keys]
            for number in range(count):
                await handles[number % len(keys)].append(message(writer, number))

    asyncio.run(write())


KINDS = {
    "manager": through_manager,
    "workspace": through_workspace,
    "sync": through_sync,
    "async": through_async,
}

if __name__ == "__main__":
    kind, target, writer, sessions, appends = sys.argv[1:]
    began_s = time.monotonic()
    KINDS[kind](target, writer, [f"shared:{number}" for number in range(int(sessions))], int(appends))
    print(f"{time.monotonic() - began_s:.2f}")

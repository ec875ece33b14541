"""One append, done by each system as its user would do it, for many callers in one process.

A driver is opened once per process; then each caller appends messages to sessions of its own. Async drivers
are awaited by as many tasks as there are callers, others are called by as many threads. Nothing is batched
by hand: what coalesces, coalesces by itself, and every append is durable when it returns (but for Redis's
"everysec").
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Sequence

from bench.messages import encoded, message

_OPENED_AT_A_TIME = 64

Append = Callable[[int, str], object]
"""(caller, key) -> appended."""


class OursAsync:
    """AsyncSessionStore: one store per process, a handle per session."""

    asynchronous = True

    async def open(
        self, where: str, callers: int, keys: Sequence[str]
    ) -> Callable[[int, str], Awaitable[object]]:
        from sessionstore import AsyncSessionStore

        self.store = AsyncSessionStore(where)
        gate = asyncio.Semaphore(_OPENED_AT_A_TIME)

        async def handle(key: str) -> object:
            async with gate:
                return await self.store.session(key)

        handles = dict(zip(keys, await asyncio.gather(*map(handle, keys)), strict=True))
        body = message(0)
        return lambda _, key: handles[key].append(body)

    async def close(self) -> None:
        await self.store.close()


class OursThreads:
    """SessionStore: one store per process, a handle per session."""

    asynchronous = False

    def open(self, where: str, callers: int, keys: Sequence[str]) -> Append:
        from concurrent.futures import ThreadPoolExecutor

        from sessionstore import SessionStore

        self.store = SessionStore(where)
        with ThreadPoolExecutor(16) as pool:
            handles = dict(zip(keys, pool.map(self.store.session, keys), strict=True))
        body = message(0)
        return lambda _, key: handles[key].append(body)

    def close(self) -> None:
        self.store.close()


class RedisAsync:
    """redis.asyncio: one client per process with its own pool; RPUSH."""

    asynchronous = True

    async def open(
        self, where: str, callers: int, keys: Sequence[str]
    ) -> Callable[[int, str], Awaitable[object]]:
        import redis.asyncio

        self.client = redis.asyncio.Redis(unix_socket_path=where)
        return lambda _, key: self.client.rpush(key, encoded(0))

    async def close(self) -> None:
        await self.client.aclose()


class RedisThreads:
    """redis-py: one client per process with its own pool; RPUSH."""

    asynchronous = False

    def open(self, where: str, callers: int, keys: Sequence[str]) -> Append:
        import redis

        self.client = redis.Redis(unix_socket_path=where)
        return lambda _, key: self.client.rpush(key, encoded(0))

    def close(self) -> None:
        self.client.close()


class PsycopgAsync:
    """psycopg 3: an autocommit connection per caller; INSERT, which it prepares by itself."""

    asynchronous = True

    async def open(
        self, where: str, callers: int, keys: Sequence[str]
    ) -> Callable[[int, str], Awaitable[object]]:
        import psycopg

        connect = psycopg.AsyncConnection.connect
        self.connections = [await connect(where, autocommit=True) for _ in range(callers)]
        return lambda caller, key: self.connections[caller].execute(INSERT_PG, (key, encoded(0)))

    async def close(self) -> None:
        for connection in self.connections:
            await connection.close()


class PsycopgThreads:
    """The same with threads."""

    asynchronous = False

    def open(self, where: str, callers: int, keys: Sequence[str]) -> Append:
        import psycopg

        self.connections = [psycopg.connect(where, autocommit=True) for _ in range(callers)]
        return lambda caller, key: self.connections[caller].execute(INSERT_PG, (key, encoded(0)))

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


class Sqlite:
    """sqlite3 in WAL mode with synchronous=FULL: a connection per caller; INSERT."""

    asynchronous = False

    def open(self, where: str, callers: int, keys: Sequence[str]) -> Append:
        self.connections = [sqlite(where) for _ in range(callers)]
        return lambda caller, key: self.connections[caller].execute(INSERT_SQLITE, (key, encoded(0)))

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


INSERT_PG = "INSERT INTO message(session, body) VALUES (%s, %s)"
INSERT_SQLITE = "INSERT INTO message(session, body) VALUES (?, ?)"
TABLE_SQLITE = """
CREATE TABLE IF NOT EXISTS message(n INTEGER PRIMARY KEY, session TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS message_of ON message(session, n);
"""


def sqlite(path: str) -> sqlite3.Connection:
    """A connection in autocommit mode, for whichever thread uses it."""
    db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.executescript(TABLE_SQLITE)
    return db


DRIVERS = {
    each.__name__: each
    for each in (OursAsync, OursThreads, RedisAsync, RedisThreads, PsycopgAsync, PsycopgThreads, Sqlite)
}

"""The peers of one caller: raw clients, and the session classes that users of agent frameworks would pick.

A framework's package is imported when its peer is made: a missing one is not run, and the others are.
"""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

from bench.drivers import INSERT_PG, INSERT_SQLITE, sqlite
from bench.messages import message, turn
from bench.run import Run
from bench.servers import NotHere

_LAST_PG = (
    "SELECT body FROM (SELECT n, body FROM message WHERE session = %s ORDER BY n DESC LIMIT %s) AS t "
    "ORDER BY n"
)
_LAST_SQLITE = (
    "SELECT body FROM (SELECT n, body FROM message WHERE session = ? ORDER BY n DESC LIMIT ?) ORDER BY n"
)
_WINDOW = 50


class Raw(Protocol):
    """A client without a framework."""

    name: str

    def append(self, key: str, texts: list[str]) -> None:
        """Add messages, all or nothing."""

    def last(self, key: str, count: int) -> list[object]:
        """The last messages, decoded."""


class RawRedis:
    """redis-py: RPUSH, LRANGE."""

    def __init__(self, name: str, socket: str) -> None:
        import redis

        self.name, self.client = name, redis.Redis(unix_socket_path=socket)

    def append(self, key: str, texts: list[str]) -> None:
        self.client.rpush(key, *texts)

    def last(self, key: str, count: int) -> list[object]:
        return [json.loads(body) for body in self.client.lrange(key, -count, -1)]

    def close(self) -> None:
        self.client.close()


class RawPostgres:
    """psycopg 3: INSERT, SELECT; several messages are one transaction, by executemany."""

    name = "psycopg"

    def __init__(self, dsn: str) -> None:
        import psycopg

        self.db = psycopg.connect(dsn, autocommit=True)

    def append(self, key: str, texts: list[str]) -> None:
        if len(texts) == 1:
            self.db.execute(INSERT_PG, (key, texts[0]))
            return
        with self.db.transaction(), self.db.cursor() as cursor:
            cursor.executemany(INSERT_PG, [(key, text) for text in texts])

    def last(self, key: str, count: int) -> list[object]:
        return [json.loads(row[0]) for row in self.db.execute(_LAST_PG, (key, count)).fetchall()]

    def close(self) -> None:
        self.db.close()


class RawSqlite:
    """sqlite3, WAL mode, synchronous=FULL."""

    name = "sqlite3"

    def __init__(self, path: str) -> None:
        self.db = sqlite(path)

    def append(self, key: str, texts: list[str]) -> None:
        if len(texts) == 1:
            self.db.execute(INSERT_SQLITE, (key, texts[0]))
            return
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany(INSERT_SQLITE, [(key, text) for text in texts])
        self.db.execute("COMMIT")

    def last(self, key: str, count: int) -> list[object]:
        return [json.loads(row[0]) for row in self.db.execute(_LAST_SQLITE, (key, count)).fetchall()]

    def close(self) -> None:
        self.db.close()


def raw_peers(run: Run, stack: ExitStack) -> Iterator[Raw]:
    """Those that this machine has, until the stack closes."""
    if not run.peers:
        return
    made: list[Any] = [RawSqlite(str(run.folder / "peers.sqlite"))]
    for level, server in run.redis.items():
        with run.optional(f"redis-py {level}"):
            made.append(RawRedis(f"redis-py {level}", server.socket))
    if run.postgres is not None:
        with run.optional("psycopg"):
            made.append(RawPostgres(run.postgres.dsn))
    for peer in made:
        stack.callback(peer.close)
        yield peer


class Framework:
    """A framework's session: one turn, and its end."""

    def __init__(self, turn: Callable[[], Awaitable[object]], close: Callable[[], Awaitable[object]]) -> None:
        self._turn, self.close = turn, close

    async def turn(self) -> None:
        """Append four messages, read the last 50."""
        await self._turn()


async def _agents_session(session: Any, length: int, close: Callable[[], Awaitable[object]]) -> Framework:
    """Any session of the OpenAI Agents SDK, with so many messages in it."""
    await session.add_items([message(n) for n in range(length)])
    number = iter(range(1 << 30))

    async def one() -> None:
        await session.add_items(turn(next(number)))
        found = await session.get_items(limit=_WINDOW)
        assert len(found) == _WINDOW

    return Framework(one, close)


async def _nothing() -> None:
    pass


async def _sqlite_session(run: Run, length: int) -> Framework:
    from agents import SQLiteSession

    session = SQLiteSession("turn", run.folder / "agents.sqlite")

    async def close() -> None:
        session.close()

    return await _agents_session(session, length, close)


async def _redis_session(run: Run, length: int) -> Framework:
    from agents.extensions.memory import RedisSession

    if "always" not in run.redis:
        raise NotHere("redis-server with appendfsync always")
    session = RedisSession.from_url("turn", url=f"unix://{run.redis['always'].socket}")
    return await _agents_session(session, length, session.close)


async def _sqlalchemy_session(run: Run, length: int) -> Framework:
    from agents.extensions.memory import SQLAlchemySession

    if run.postgres is None:
        raise NotHere("PostgreSQL")
    session = SQLAlchemySession.from_url("turn", url=run.postgres.url("asyncpg"), create_tables=True)
    return await _agents_session(session, length, session.engine.dispose)


async def _database_session_service(run: Run, length: int) -> Framework:
    """Google ADK: each event is one append; the session is then read with the last 50 events."""
    from google.adk.events import Event
    from google.adk.sessions import DatabaseSessionService
    from google.adk.sessions.base_session_service import GetSessionConfig
    from google.genai import types

    if run.postgres is None:
        raise NotHere("PostgreSQL")
    service = DatabaseSessionService(run.postgres.url("asyncpg"))
    who: dict[str, Any] = {"app_name": "bench", "user_id": "bench", "session_id": "turn"}
    session = await service.create_session(**who)
    config = GetSessionConfig(num_recent_events=_WINDOW)

    def event(said: dict[str, object]) -> Any:
        text = str(said["content"]) or json.dumps(said.get("tool_calls"))
        author = "user" if said["role"] == "user" else "agent"
        role = "user" if author == "user" else "model"
        return Event(author=author, content=types.Content(role=role, parts=[types.Part(text=text)]))

    for n in range(length):
        await service.append_event(session, event(message(n)))
    number = iter(range(1 << 30))

    async def one() -> None:
        nonlocal session
        for said in turn(next(number)):
            await service.append_event(session, event(said))
        found = await service.get_session(**who, config=config)
        assert found is not None
        assert len(found.events) == _WINDOW
        session = found

    return Framework(one, service.close)


FRAMEWORKS: dict[str, Callable[[Run, int], Awaitable[Framework]]] = {
    "SQLiteSession": _sqlite_session,
    "RedisSession": _redis_session,
    "SQLAlchemySession": _sqlalchemy_session,
    "DatabaseSessionService": _database_session_service,
}

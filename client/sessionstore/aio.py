"""The async client: `AsyncSessionStore` and `AsyncSessionHandle`. Thin like `client`; its contracts hold.

Names and signatures are those of the sync client, to be awaited; iterators are async iterators, and blocks
are ``async with``. One store belongs to one event loop and to one process: it may be used by many tasks at
once, not from another thread's loop, and not after a fork. Cancelling a task during a change does not tell
whether the change was applied; only `expected_revision` or `request_id` can.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import Self

from sessionstore import _operations as ops
from sessionstore._adriver import AsyncDriver
from sessionstore._awatch import AsyncWatch
from sessionstore._editing import EditFunction, begin, edit, store
from sessionstore._expiry import moment
from sessionstore._mirror import DEFAULT_SESSIONS, DEFAULT_STALENESS_S, Bounds, Mirror
from sessionstore._operations import Operation, Value
from sessionstore._renewals import AsyncRenewals
from sessionstore._snapshot import Snapshot, absent, joined
from sessionstore._targets import resolve_targets, resolve_timeout_s
from sessionstore._turn import Holding, TurnState, acquire, default_holder
from sessionstore._types import (
    KEEP,
    Appended,
    Expires,
    Head,
    Keep,
    Lease,
    Message,
    MessageInput,
    OrderBy,
    ServerInfo,
    Written,
)
from sessionstore._watching import Watching
from sessionstore.session import BaseHandle, load

AsyncHeads = AsyncIterator[Head]
Messages = list[Message]  # `list` means a method below


class AsyncSessionStore:
    """A session store, reached through its daemon, for one event loop. Arguments as for `SessionStore`."""

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = None,
        near_cache_bytes: int = 0,
        near_cache_sessions: int = DEFAULT_SESSIONS,
        near_cache_staleness: float = DEFAULT_STALENESS_S,
    ) -> None:
        self._targets = resolve_targets(target)
        bounds = Bounds(near_cache_bytes, near_cache_sessions, near_cache_staleness)
        self._driver = AsyncDriver(self._targets, resolve_timeout_s(timeout), bounds)
        self._turns = AsyncRenewals(self._driver.run)

    def __repr__(self) -> str:
        return f"<AsyncSessionStore {','.join(self._targets)}>"

    async def __aenter__(self) -> Self:
        self._driver.check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As `SessionStore.close`."""
        await self._driver.close()

    @property
    def _guard(self) -> AbstractContextManager[bool]:
        return self._driver.guard

    @property
    def _mirror(self) -> Mirror:
        return self._driver.mirror

    async def session(self, key: str) -> "AsyncSessionHandle":
        """As `SessionStore.session`."""
        near = self._mirror.near(key)
        if near is None:
            near = await self._driver.run(load(self._mirror, key))
        self._driver.check()
        return AsyncSessionHandle(self, near)

    async def create(
        self,
        key: str,
        messages: Iterable[MessageInput] = (),
        *,
        metadata: MessageInput | None = None,
        last_consolidated: int = 0,
        create_time: datetime | None = None,
        expires: Expires = None,
        request_id: str | None = None,
    ) -> "AsyncSessionHandle":
        """As `SessionStore.create`."""
        return await self._driver.run(
            ops.create(
                key, messages, metadata, last_consolidated, create_time, moment("expires", expires),
                request_id,
                lambda tail: AsyncSessionHandle(self, joined(absent(key), tail)),
            )
        )  # fmt: skip

    async def get(self, key: str) -> Head | None:
        """As `SessionStore.get`."""
        return await self._driver.run(ops.head(key))

    def list(
        self,
        prefix: str = "",
        *,
        order_by: OrderBy = "key",
        page_size: int = 100,
        updated_since: datetime | None = None,
    ) -> AsyncHeads:
        """As `SessionStore.list`: ``async for head in store.list(...)``."""
        return self._heads(ops.Listing.begin(prefix, order_by, page_size, updated_since))

    async def _heads(self, listing: ops.Listing) -> AsyncHeads:
        while listing.more:
            for head in await self._driver.run(listing.page()):
                yield head

    async def delete(
        self, key: str, *, expected_revision: int | None = None, request_id: str | None = None
    ) -> Written:
        """As `SessionStore.delete`."""
        return await self._driver.run(
            ops.delete(ops.Held(key), expected_revision, request_id, ops.deleted)
        )

    async def edit(
        self, key: str, function: EditFunction, *, attempts: int = 100
    ) -> "AsyncSessionHandle":
        """As `SessionStore.edit`; `function` is a plain function."""
        return await self._driver.run(edit(await self.session(key), function, attempts))

    def watch(
        self,
        keys: Iterable[str] | None = None,
        *,
        prefix: str | None = None,
        cursor: bytes | None = None,
        known: Mapping[str, int] | None = None,
    ) -> AsyncWatch:
        """As `SessionStore.watch`: ``async for event in store.watch(...)``."""
        return AsyncWatch(self._driver, Watching(prefix, keys, cursor, known))

    async def info(self) -> ServerInfo:
        """As `SessionStore.info`."""
        return await self._driver.run(ops.info())


class AsyncSessionHandle(BaseHandle):
    """A session: an immutable snapshot of it, and calls that change it. Contracts as `SessionHandle`'s."""

    def __init__(self, owner: AsyncSessionStore, snapshot: Snapshot) -> None:
        super().__init__(owner, snapshot)
        self._check = owner._driver.check
        self._run = owner._driver.run
        self._turns = owner._turns

    async def append(
        self,
        *messages: MessageInput,
        expected_revision: int | None = None,
        request_id: str | None = None,
        wait: float = 0.0,
    ) -> Appended:
        """As `SessionHandle.append`."""
        return await self._run(self._append(ops.encode(messages), expected_revision, request_id, wait))

    async def pop(
        self, *, expected_revision: int | None = None, request_id: str | None = None
    ) -> Message:
        """As `SessionHandle.pop`."""
        return await self._run(self._pop(expected_revision, request_id))

    async def replace(
        self,
        start: int,
        delete_count: int | None,
        messages: Iterable[MessageInput],
        *,
        expected_revision: int | None = None,
        allow_appends: bool = False,
        request_id: str | None = None,
    ) -> Written:
        """As `SessionHandle.replace`."""
        lines = ops.encode(messages)
        return await self._run(
            self._replace(start, delete_count, lines, expected_revision, request_id, allow_appends)
        )

    async def clear(
        self, *, expected_revision: int | None = None, request_id: str | None = None
    ) -> Written:
        """As `SessionHandle.clear`."""
        return await self._run(self._replace(0, None, (), expected_revision, request_id))

    async def update(
        self,
        *,
        metadata: MessageInput | None = None,
        patch: Mapping[str, object] | None = None,
        last_consolidated: int | None = None,
        expire_time: Expires | Keep = KEEP,
        expected_revision: int | None = None,
        request_id: str | None = None,
    ) -> Written:
        """As `SessionHandle.update`."""
        return await self._run(
            self._update(
                metadata, patch, last_consolidated, moment("expire_time", expire_time), expected_revision,
                request_id,
            )
        )  # fmt: skip

    async def fork(
        self, to: str, at: int | None = None, *, request_id: str | None = None
    ) -> "AsyncSessionHandle":
        """As `SessionHandle.fork`."""
        return await self._run(self._fork(to, at, request_id))

    async def delete(
        self, *, expected_revision: int | None = None, request_id: str | None = None
    ) -> Written:
        """As `SessionHandle.delete`."""
        return await self._run(self._delete(expected_revision, request_id))

    async def refresh(self) -> Self:
        """As `SessionHandle.refresh`."""
        await self._run(self._refresh())
        return self

    async def catch_up(self) -> Self:
        """As `SessionHandle.catch_up`."""
        self._check()
        return self if self._catch_up() else await self.refresh()

    async def lease(self) -> Lease | None:
        """As `SessionHandle.lease`."""
        return await self._run(ops.lease(self.key))

    @asynccontextmanager
    async def turn(
        self,
        ttl: float = 60.0,
        wait: float = 10.0,
        *,
        allow_appends: bool = False,
        holder: str | None = None,
    ) -> AsyncIterator["AsyncTurn"]:
        """As `SessionHandle.turn`, for ``async with``; `holder` is host, process and task if it is None."""
        task = asyncio.current_task()
        holder = default_holder(task.get_name() if task else "") if holder is None else holder
        holding = await self._run(acquire(self.key, ttl, wait, allow_appends, holder))
        self._turns.add(holding)
        try:
            await self._run(self._refresh())
            yield AsyncTurn(self, holding)
            holding.check()
        finally:
            await self._turns.end(holding)

    @asynccontextmanager
    async def edit(self) -> AsyncIterator[Messages]:
        """As `SessionHandle.edit`: ``async with session.edit() as messages:``."""
        draft = begin(self)
        yield draft.messages
        await self._run(store(self, draft, draft.messages))


class AsyncTurn(TurnState, AsyncSessionHandle):
    """As `Turn`, to be awaited. Made by `AsyncSessionHandle.turn`."""

    def __init__(self, handle: AsyncSessionHandle, holding: Holding) -> None:
        TurnState.__init__(self, handle, holding)
        self._handle = handle
        self._check = handle._check
        self._turns = handle._turns
        self._run = self._run_checked

    async def _run_checked(self, operation: Operation[Value]) -> Value:
        return await self._handle._run(self._checked(operation))

    async def fork(
        self, to: str, at: int | None = None, *, request_id: str | None = None
    ) -> AsyncSessionHandle:
        """As `SessionHandle.fork`."""
        return await self._handle.fork(to, at, request_id=request_id)

"""Who waits for a lease: for each session one line, served in the order in which its callers came.

Only the first in a line asks the engine; it asks again when the lease is released in this process, when the
refusal said that it ends, and every second, because another process may have released it. Those behind wait
for their turn. So a lease that becomes free goes to the first in line; a caller who does not want to wait is
refused it as long as others do.

What is asked more than once is asked with `waiting` set, so that only the last refusal is remembered under
the call's identity: a copy of the call that comes late is then not applied after its caller was told no.

The lines are bounded in callers and in the bytes that they hold; a caller who goes away leaves its line. At
the daemon's end all of them are told so. Knows an engine and one event loop, and nothing of gRPC.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from sessionstored.engine import Engine, Refused, Reply, Request
from sessionstored.leases import Acquire, Granted, Release, Released
from sessionstored.rules import Append, Refusal

_ASK_AGAIN_S_MAX = 1.0


@dataclass(eq=False, slots=True)
class _Waiter:
    """One caller in a line."""

    holder: str
    """"" for one who wants to append."""
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    """Something happened: it is the first now, the lease was released, or all is over."""
    refused: bool = False
    """A lease kept it from being done at least once: else it may not have to wait at all."""


class LeaseQueue:
    """The lines of one daemon."""

    def __init__(self, engine: Engine, *, waiters_max: int, waiters_per_key_max: int, bytes_max: int) -> None:
        """Make empty lines.

        Args:
            engine: what decides.
            waiters_max: how many callers may wait.
            waiters_per_key_max: how many of them for one session.
            bytes_max: how many bytes of messages they may hold together.

        """
        self._engine = engine
        self._waiters_max, self._waiters_per_key_max = waiters_max, waiters_per_key_max
        self._bytes_max = bytes_max
        self._lines: dict[str, OrderedDict[_Waiter, None]] = {}
        self._count = self._bytes = 0
        self._giving_back: set[asyncio.Task[None]] = set()
        self._stopped = False

    @property
    def waiting(self) -> int:
        """How many callers are in the lines."""
        return self._count

    def stop(self) -> None:
        """Refuse who waits, and who comes later."""
        self._stopped = True
        for line in self._lines.values():
            for waiter in line:
                waiter.turn.set()

    async def submit(self, request: Request, wait_s: float) -> Reply:
        """Have a request decided; wait for the lease that keeps it from being done.

        Args:
            request: an operation on a lease, or an append.
            wait_s: how long to wait; 0: not at all.

        Raises:
            Refused: as the engine does; OVERLOADED if too many wait, SHUTTING_DOWN.

        """
        if wait_s <= 0:
            return await self._ask(self._behind_others(request))
        if await self._appends_allowed(request):
            reply = await self._ask(replace(request, waiting=True))
            if not _is_held(reply):
                return reply
        async with self._in_line(request) as waiter:
            return await self._wait(waiter, request, wait_s)

    async def _appends_allowed(self, request: Request) -> bool:
        """Whether an append need not stand in line, because the lease does not keep it from being done."""
        if not isinstance(request.mutation, Append):
            return False
        lease = await self._engine.lease(request.mutation.key)
        return lease is not None and lease.appends_allowed

    async def _wait(self, waiter: _Waiter, request: Request, wait_s: float) -> Reply:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + wait_s
        key = request.mutation.key
        while True:
            pause_s = end_s - loop.time()
            self._check_stopped()
            if next(iter(self._lines[key])) is waiter:
                waiter.turn.clear()
                last = pause_s <= 0
                reply = await self._ask(replace(request, waiting=not last))
                if last or not _is_held(reply):
                    return reply
                waiter.refused = True
                pause_s = min(end_s - loop.time(), _ASK_AGAIN_S_MAX, _expires_in_s(reply))
            elif pause_s <= 0:
                return await self._ask(self._behind_others(request))
            try:
                async with asyncio.timeout(max(0.0, pause_s)):
                    await waiter.turn.wait()
            except TimeoutError:
                continue

    def _behind_others(self, request: Request) -> Request:
        """The last try of one whose turn did not come: no lease is taken before those who wait."""
        first = next(iter(self._lines.get(request.mutation.key, ())), None)
        return request if first is None or not first.refused else replace(request, behind=first.holder)

    async def _ask(self, request: Request) -> Reply:
        self._check_stopped()
        if not isinstance(request.mutation, Acquire):
            (reply,) = await self._engine.submit([request])
            if isinstance(request.mutation, Release) and reply.outcome == Released(True):
                self._wake(request.mutation.key)
            return reply
        asking = asyncio.ensure_future(self._engine.submit([request]))
        try:
            (reply,) = await asyncio.shield(asking)
        except asyncio.CancelledError:
            giving_back = asyncio.create_task(self._give_back(asking))
            self._giving_back.add(giving_back)
            giving_back.add_done_callback(self._giving_back.discard)
            raise
        return reply

    async def _give_back(self, asking: "asyncio.Future[list[Reply]]") -> None:
        """Release what was acquired for a caller who has gone away meanwhile; else it would last its ttl."""
        with suppress(Refused):  # then nothing was acquired, or the daemon ends
            (reply,) = await asking
            if isinstance(reply.outcome, Granted) and not reply.replayed:
                lease = reply.outcome.lease
                await self._ask(Request(Release(lease.key, lease.token)))

    @asynccontextmanager
    async def _in_line(self, request: Request) -> AsyncIterator[_Waiter]:
        """Stand in line, at its end."""
        key, size = request.mutation.key, _size(request)
        line = self._lines.get(key, OrderedDict())
        for reached, limit in (
            (self._count, self._waiters_max),
            (len(line), self._waiters_per_key_max),
            (self._bytes + size if self._bytes else 0, self._bytes_max),
        ):
            if reached >= limit:
                raise Refused(_too_many(limit))
        waiter = _Waiter(request.mutation.holder if isinstance(request.mutation, Acquire) else "")
        self._lines[key] = line
        line[waiter] = None
        self._count += 1
        self._bytes += size
        try:
            yield waiter
        finally:
            self._count -= 1
            self._bytes -= size
            del line[waiter]
            if line:
                self._wake(key)
            else:
                del self._lines[key]

    def _wake(self, key: str) -> None:
        """Have the first in a line ask now."""
        line = self._lines.get(key)
        if line:
            next(iter(line)).turn.set()

    def _check_stopped(self) -> None:
        if self._stopped:
            raise Refused(Refusal("SHUTTING_DOWN", "the daemon is stopping; nothing was stored; try again"))


def _is_held(reply: Reply) -> bool:
    return isinstance(reply.outcome, Refusal) and reply.outcome.reason == "LEASE_HELD"


def _expires_in_s(reply: Reply) -> float:
    assert isinstance(reply.outcome, Refusal)
    return int(reply.outcome.metadata["expires_in_ms"]) / 1000


def _size(request: Request) -> int:
    return sum(map(len, request.mutation.messages)) if isinstance(request.mutation, Append) else 0


def _too_many(limit: int) -> Refusal:
    return Refusal(
        "OVERLOADED",
        f"too many wait for leases (the limit is {limit}); nothing was stored; try again later",
        {"limit": str(limit)},
    )

"""The RPC handlers for leases, of the same shape as those of `service`: check, ask, make the reply.

Every request about a lease goes through the daemon's `LeaseQueue`, which knows who waits.
"""

import time
from dataclasses import replace
from typing import Any

import grpc
from sessionstore.v1 import session_store_pb2 as v1

from sessionstored import lease_requests, replies
from sessionstored.engine import Engine, Refused, Reply, Request
from sessionstored.lease_queue import LeaseQueue
from sessionstored.leases import Granted, Lease, Released
from sessionstored.requests import Bounds, check_key
from sessionstored.rules import Refusal

Context = grpc.aio.ServicerContext[Any, Any]
# A caller who waits as long as its call may last shall still hear the refusal.
_ANSWER_S = 0.5


class LeaseHandlers:
    """The part of the service that is about leases."""

    _engine: Engine
    _bounds: Bounds
    _leases: LeaseQueue

    async def AcquireLease(
        self, request: v1.AcquireLeaseRequest, context: Context
    ) -> v1.AcquireLeaseResponse:
        """Take a lease."""
        wait_s = patience_s(lease_requests.wait_s(request.wait, "wait"), context)
        asked = lease_requests.acquire(request, self._bounds, deadline_s(context))
        reply = await self._leases.submit(asked, wait_s)
        lease = granted(reply)
        if reply.replayed:  # it may have been renewed, or be over
            now = await self._engine.lease(lease.key)
            lease = now if now is not None and now.token == lease.token else replace(lease, expires_s=0.0)
        return v1.AcquireLeaseResponse(
            lease=replies.lease(lease, self._engine.clock_s()), replayed=reply.replayed
        )

    async def RenewLease(self, request: v1.RenewLeaseRequest, context: Context) -> v1.RenewLeaseResponse:
        """Begin a ttl anew."""
        lease = granted(await self._submit(lease_requests.renew(request, self._bounds, deadline_s(context))))
        return v1.RenewLeaseResponse(lease=replies.lease(lease, self._engine.clock_s()))

    async def ReleaseLease(
        self, request: v1.ReleaseLeaseRequest, context: Context
    ) -> v1.ReleaseLeaseResponse:
        """End a lease."""
        reply = await self._submit(lease_requests.release(request, self._bounds, deadline_s(context)))
        assert isinstance(reply.outcome, Released)
        return v1.ReleaseLeaseResponse(released=reply.outcome.released)

    async def GetLease(self, request: v1.GetLeaseRequest, context: Context) -> v1.GetLeaseResponse:
        """Tell who has the lease."""
        lease = await self._engine.lease(check_key(request.key, self._bounds))
        if lease is None:
            return v1.GetLeaseResponse()
        return v1.GetLeaseResponse(lease=replies.lease(lease, self._engine.clock_s()))

    async def _submit(self, request: Request) -> Reply:
        reply = await self._leases.submit(request, 0)
        refuse_if_refused(reply)
        return reply


def refuse_if_refused(reply: Reply) -> None:
    """Raise Refused if a request was."""
    if isinstance(reply.outcome, Refusal):
        raise Refused(reply.outcome)


def granted(reply: Reply) -> Lease:
    """The lease that was granted. Raises Refused."""
    refuse_if_refused(reply)
    assert isinstance(reply.outcome, Granted)
    return reply.outcome.lease


def deadline_s(context: Context) -> float | None:
    """When the caller stops waiting, on time.monotonic(); None: never."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


def patience_s(wait_s: float, context: Context) -> float:
    """How long a caller waits in a line: as long as it said, and its call's deadline allows."""
    remaining_s = context.time_remaining()
    return wait_s if remaining_s is None else min(wait_s, max(0.0, remaining_s - _ANSWER_S))

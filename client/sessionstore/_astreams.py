"""A Watch call of an async client: requests and responses, as they come."""

import asyncio
from typing import Any

import grpc
import grpc.aio

from sessionstore._operations import pb
from sessionstore.errors import from_rpc_error


class AsyncStream:
    """One call. `read` tells why it ended, also to those who could not write."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, request: pb.WatchRequest, *, last: bool = False) -> bool:
        """Send a request; False if the call has ended."""
        try:
            await self._call.write(request)
            if last:
                await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return False
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return False
        return True

    async def read(self) -> pb.WatchResponse:
        """The next response. Raises StopAsyncIteration if the daemon, or `cancel`, ended the call."""
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise StopAsyncIteration from None
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        return response  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """End the call. More than once, too."""
        self._call.cancel()


def _is_cancelled() -> bool:
    """Whether somebody cancelled the task that runs this, and not only the call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

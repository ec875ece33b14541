"""What tests at the wire share: blocks, and refusals as they arrive."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True)
class Refusal:
    code: str
    reason: str
    domain: str
    metadata: dict[str, str]
    text: str
    size: int
    """Bytes of the status in the trailers."""


def refusal(call: Callable[[], object]) -> Refusal:
    """The refusal that a call gets; fails if it gets none, or one that is not of the contract's form."""
    try:
        call()
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError("the call was not refused")


def refusal_of(error: grpc.RpcError) -> Refusal:
    status = rpc_status.from_call(error)
    assert status is not None, f"no google.rpc.Status came with {error.code()}: {error.details()}"
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return Refusal(
        error.code().name, info.reason, info.domain, dict(info.metadata), status.message, status.ByteSize()
    )


def block(*messages: object) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\n" for message in messages)


def numbered(count: int, *, size: int = 0) -> list[dict[str, object]]:
    return [{"role": "user", "content": f"{n}" + "x" * size} for n in range(count)]

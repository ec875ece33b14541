"""Refusals as statuses, the defects that nobody foresaw, and the bounds on calls under way."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from sessionstore.v1 import errors_pb2
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored import status
from sessionstored.calls import Calls
from sessionstored.engine import Refused
from sessionstored.rules import Refusal
from wire import refusal_of

REASONS = [name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()[1:]]


def info_of(refusal: Refusal) -> error_details_pb2.ErrorInfo:
    (detail,) = status.to_status(refusal).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return info


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_status(reason: str):
    refusal = Refusal(reason, "why", {"a": "1"})
    sent = status.to_status(refusal)
    assert (sent.code, sent.message) == (status.CODES[reason].value[0], "why")
    assert sent.code != 0
    info = info_of(refusal)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, "sessionstore.v1", {"a": "1"})


def test_no_other_reason_has_one():
    assert set(status.CODES) == set(REASONS)


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=3000), max_size=8), st.text(max_size=5000))
def test_a_status_fits_the_trailers_whatever_is_in_it(metadata: dict[str, str], text: str):
    refusal = Refusal("DATA_LOSS", text, metadata)
    assert info_of(refusal).ByteSize() <= 4096
    assert set(info_of(refusal).metadata) == set(metadata)
    assert status.to_status(refusal).ByteSize() <= 4096 + 1024 + 100


@given(st.text(max_size=100), st.integers(3, 100))
def test_a_cut_text_is_a_beginning(text: str, bytes_max: int):
    text = text.encode("utf-8", "replace").decode()
    got = status.cut(text, bytes_max)
    assert len(got.encode()) <= bytes_max
    assert got == text or (got.endswith("…") and text.startswith(got[:-1]))


def test_half_a_surrogate_pair_in_a_detail_does_not_break_the_refusal():
    assert info_of(Refusal("DATA_LOSS", "\ud83d", {"detail": "a\ud83d"})).metadata["detail"] == "a?"


# A real server with handlers that misbehave.

PATH = "/sessionstore.v1.SessionStore/"


class Misbehaving:
    """Handlers under the service's name, each wrong in its way."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()
        self.leave = asyncio.Event()

    async def defect(self, request, context):
        raise ZeroDivisionError("a secret detail")

    async def refused(self, request, context):
        raise Refused(Refusal("SESSION_NOT_FOUND", "ключ ✓ is gone", {"key": "ключ"}))

    async def slow(self, request, context):
        self.entered.set()
        try:
            await self.leave.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return v1.PopMessageResponse(message=b"done")

    async def stream(self, request, context) -> AsyncIterator[v1.ReadMessagesResponse]:
        yield v1.ReadMessagesResponse(next=1)
        raise ZeroDivisionError("a secret detail")

    async def slow_stream(self, request, context) -> AsyncIterator[v1.ReadMessagesResponse]:
        yield v1.ReadMessagesResponse(next=1)
        self.entered.set()
        await self.leave.wait()
        yield v1.ReadMessagesResponse(next=2)

    def handlers(self) -> grpc.GenericRpcHandler:
        codecs = {
            "request_deserializer": v1.PopMessageRequest.FromString,
            "response_serializer": lambda reply: reply.SerializeToString(),
        }
        kinds = {
            grpc.unary_unary_rpc_method_handler: ("defect", "refused", "slow"),
            grpc.unary_stream_rpc_method_handler: ("stream", "slow_stream"),
        }
        table = {
            name: kind(getattr(self, name), **codecs) for kind, names in kinds.items() for name in names
        }
        return grpc.method_handlers_generic_handler("sessionstore.v1.SessionStore", table)


class Served:
    """The handlers, what guards them, and a channel to them."""

    def __init__(self, handlers: Misbehaving, calls: Calls, channel: grpc.aio.Channel) -> None:
        self.handlers = handlers
        self.calls = calls
        self.channel = channel

    def call(self, name: str, request: v1.PopMessageRequest | None = None):
        serialized = (request or v1.PopMessageRequest()).SerializeToString()
        kind = self.channel.unary_stream if "stream" in name else self.channel.unary_unary
        return kind(PATH + name)(serialized, timeout=60)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    handlers = Misbehaving()
    calls = Calls("sessionstore.v1.SessionStore", bytes_max=1000)
    server = grpc.aio.server(interceptors=[calls])
    server.add_generic_rpc_handlers((handlers.handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(handlers, calls, channel)
    await server.stop(0)


async def got(call) -> object:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    # rpc_status reads calls; the error of an awaited one has the same data under other names.
    return refusal_of(_Finished(error))


class _Finished(grpc.RpcError):
    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details, self.trailing_metadata = error.code, error.details, error.trailing_metadata


async def test_a_refusal_that_is_raised_anywhere_becomes_its_status(served: Served):
    refused = await got(served.call("refused"))
    assert (refused.code, refused.reason) == ("NOT_FOUND", "SESSION_NOT_FOUND")
    assert (refused.text, refused.metadata) == ("ключ ✓ is gone", {"key": "ключ"})


async def test_a_defect_tells_an_incident_and_no_details(served: Served, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        refused = await got(served.call("defect"))
    assert (refused.code, refused.reason, set(refused.metadata)) == ("INTERNAL", "INTERNAL", {"incident"})
    assert "secret" not in refused.text
    (record,) = caplog.records
    assert refused.metadata["incident"] in record.getMessage()
    assert PATH + "defect" in record.getMessage()
    assert "ZeroDivisionError: a secret detail" in caplog.text


async def test_a_defect_in_a_stream_comes_after_what_was_sent(
    served: Served, caplog: pytest.LogCaptureFixture
):
    call = served.call("stream")
    assert v1.ReadMessagesResponse.FromString(await call.read()).next == 1
    refused = await got(call.read())
    assert refused.reason == "INTERNAL"
    assert refused.metadata["incident"] in caplog.text


async def test_a_cancelled_call_is_cancelled_in_its_handler_and_is_no_defect(
    served: Served, caplog: pytest.LogCaptureFixture
):
    call = served.call("slow")
    await served.handlers.entered.wait()
    call.cancel()
    await asyncio.wait_for(served.handlers.cancelled.wait(), 60)
    assert await served.calls.drain(60) == 0
    assert [record for record in caplog.records if record.name.startswith("sessionstored")] == []


async def test_requests_beyond_the_bound_on_bytes_are_refused(served: Served):
    first = served.call("slow", v1.PopMessageRequest(key="x" * 900))
    await served.handlers.entered.wait()
    refused = await got(served.call("slow", v1.PopMessageRequest(key="x" * 200)))
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert refused.metadata == {"limit": "1000"}
    small = served.call("slow", v1.PopMessageRequest(key="x" * 50))
    served.handlers.leave.set()
    assert await first
    assert await small
    assert await served.call("slow", v1.PopMessageRequest(key="x" * 2000)), "one alone is always served"


async def test_a_drain_refuses_what_is_new_and_waits_for_what_is_under_way(served: Served):
    first = served.call("slow")
    await served.handlers.entered.wait()
    assert await served.calls.drain(0.05) == 1
    refused = await got(served.call("slow"))
    assert (refused.code, refused.reason, refused.metadata) == ("UNAVAILABLE", "SHUTTING_DOWN", {})
    draining = asyncio.create_task(served.calls.drain(60))
    await asyncio.sleep(0.05)
    assert not draining.done()
    served.handlers.leave.set()
    assert v1.PopMessageResponse.FromString(await first).message == b"done"
    assert await asyncio.wait_for(draining, 60) == 0


async def test_a_drain_ends_streams_at_their_next_block(served: Served):
    call = served.call("slow_stream")
    await call.read()
    await served.handlers.entered.wait()
    assert await served.calls.drain(0) == 1
    served.handlers.leave.set()
    refused = await got(call.read())
    assert refused.reason == "SHUTTING_DOWN"

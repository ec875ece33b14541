"""What clients who do not read, or who do not finish sending, can make the daemon hold; others are served."""

import gc
import struct
import weakref
from collections.abc import AsyncIterator
from contextlib import ExitStack

import grpc
import pytest
from daemons import Daemon, channel_to, wait_until
from deaf import DeafClient
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc
from sessionstored.calls import Calls
from sessionstored.engine import Refused
from sessionstored.rules import Refusal
from sessionstored.server import _ARRIVALS_MIN
from wire import block, refusal

PATIENCE_S = 60
READ = v1.GetSessionRequest(key="large")


@pytest.fixture
def bounded(make_daemon) -> Daemon:
    """A daemon that lets calls hold 4 MiB, and has a session whose reply is 1 MiB."""
    daemon = make_daemon(flags=("--concurrent-bytes-max", str(4 << 20))).start()
    messages = [{"content": "x" * 60_000}] * 18
    daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="large", messages=block(*messages)))
    return daemon


def rss_mib(daemon: Daemon) -> int:
    with open(f"/proc/{daemon.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20


def test_replies_that_nobody_reads_are_bounded_in_bytes_and_small_calls_go_on(bounded: Daemon):
    """A thousand such calls held 1.9 GB: what counted was their requests."""
    before = rss_mib(bounded)
    clients = [DeafClient(bounded.address) for _ in range(10)]
    for client in clients:
        for _ in range(40):
            client.call("GetSession", READ.SerializeToString())

    def full() -> bool:
        try:
            bounded.stub.GetSession(READ, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        return False

    wait_until(full, PATIENCE_S, "a large reply is refused")
    refused = refusal(lambda: bounded.stub.GetSession(READ, timeout=PATIENCE_S))
    assert (refused.reason, refused.metadata) == ("OVERLOADED", {"limit": str(4 << 20)})
    for n in range(20):
        request = v1.AppendMessagesRequest(key="small", messages=block({"n": n}))
        bounded.stub.AppendMessages(request, timeout=PATIENCE_S)
    assert bounded.stub.GetSession(v1.GetSessionRequest(key="small")).session.message_count == 20
    grown = rss_mib(bounded) - before
    print(f"400 replies of 1 MiB that nobody reads: {grown} MiB more")
    assert grown < 200
    for client in clients:
        client.close()
    wait_until(lambda: not full(), PATIENCE_S, "large replies are served again")


def test_who_does_not_finish_sending_does_not_keep_others_out(bounded: Daemon):
    clients = [DeafClient(bounded.address) for _ in range(12)]  # more than may be on their way in
    for client in clients:
        client.begin("AppendMessages")
        client.send(struct.pack(">BI", 0, 8 << 20) + b"x" * 10_000)
    for n in range(5):
        request = v1.AppendMessagesRequest(key="k", messages=block({"n": n}))
        assert bounded.stub.AppendMessages(request, timeout=PATIENCE_S).first_index == n
    for client in clients:
        client.close()
    assert bounded.terminate() == 0, bounded.stderr


def test_large_requests_at_once_are_served_or_refused(bounded: Daemon):
    messages = block(*[{"content": "x" * 1_000_000}] * 3)
    outcomes = []
    with channel_to(bounded.address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        calls = [
            stub.AppendMessages.future(v1.AppendMessagesRequest(key=f"k{n}", messages=messages))
            for n in range(20)
        ]
        outcomes = [call.code() for call in calls]
    assert outcomes.count(grpc.StatusCode.OK) >= 1
    assert set(outcomes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


class _Request:
    """A request; those of protobuf cannot be remembered weakly."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def ByteSize(self) -> int:
        return len(self.data)


class _Reply(_Request):
    """A reply."""

    def SerializeToString(self) -> bytes:
        return self.data


class _Refusing:
    """A handler that refuses, and remembers its request and reply weakly."""

    def __init__(self) -> None:
        self.requests: list[weakref.ref[_Request]] = []
        self.replies: list[weakref.ref[_Reply]] = []

    async def unary(self, request, context):
        self.requests.append(weakref.ref(request))
        raise Refused(Refusal("OVERLOADED", "no", {"limit": "1"}))

    async def stream(self, request, context) -> AsyncIterator[_Reply]:
        self.requests.append(weakref.ref(request))
        reply = _Reply(b"")
        self.replies.append(weakref.ref(reply))
        yield reply
        del reply
        raise Refused(Refusal("OVERLOADED", "no", {"limit": "1"}))


async def test_what_belongs_to_a_refused_call_is_let_go_of_at_once():
    """It was part of a cycle of exceptions and frames: 40 clients made the daemon keep 1 GB of them."""
    refusing, name = _Refusing(), "sessionstore.v1.SessionStore"
    codecs = {
        "request_deserializer": _Request,
        "response_serializer": lambda reply: reply.SerializeToString(),
    }
    handlers = {
        "unary": grpc.unary_unary_rpc_method_handler(refusing.unary, **codecs),
        "stream": grpc.unary_stream_rpc_method_handler(refusing.stream, **codecs),
    }
    server = grpc.aio.server(interceptors=[Calls(name, bytes_max=1 << 20)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.collect()
    gc.disable()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(f"/{name}/unary")(b"", timeout=PATIENCE_S)
                with pytest.raises(grpc.aio.AioRpcError):
                    async for _ in channel.unary_stream(f"/{name}/stream")(b"", timeout=PATIENCE_S):
                        pass
        await server.stop(0)
        assert len(refusing.requests) == 6
        kept = [each for each in [*refusing.requests, *refusing.replies] if each() is not None]
        assert kept == []
    finally:
        gc.enable()


def test_a_request_that_does_not_arrive_is_refused_while_others_wait(make_daemon):
    """And not only let go of: gRPC would go on to take it in, and its caller would wait for ever."""
    daemon = make_daemon(flags=("--concurrent-bytes-max", str(1 << 20))).start()
    with ExitStack() as stack:
        clients = [stack.enter_context(DeafClient(daemon.address)) for _ in range(_ARRIVALS_MIN)]
        for client in clients:
            client.begin("AppendMessages")
            client.send(struct.pack(">BI", 0, 8 << 20) + b"x" * 60_000)
        heard: list[bytes] = []

        def one_is_refused() -> bool:
            info = v1.GetServerInfoRequest()  # waits as long as all places are taken
            daemon.stub.GetServerInfo(info, timeout=60)
            heard[:] = [client.heard() for client in clients]
            return any(b"took too long to arrive" in each for each in heard)

        wait_until(one_is_refused, what="a refusal of a request that does not arrive")
    assert "incident" not in daemon.stderr

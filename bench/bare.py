"""What the transport alone costs: grpc.aio with nothing behind it, and a blocking TCP echo on loopback.

    python -m bench.bare TARGET

The port of the echo is the first line of the output. The grpc server is of the daemon's kind and takes
bytes: `/Unary` answers with as many as the request's first eight say, `/Stream` gives back each message.
"""

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator

import grpc

SERVICE = "bench.Bare"


async def _unary(request: bytes, _: object) -> bytes:
    return bytes(int.from_bytes(request[:8], "big"))


async def _stream(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


def _echo(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_echo_one, args=(connection,), daemon=True).start()


def _echo_one(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)


async def _main(target: str) -> None:
    server = grpc.aio.server()
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.stream_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(target)
    await server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_echo, args=(listener,), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))

"""A client that asks and never reads: HTTP/2 by hand on a plain socket, because gRPC's own clients read.

It sends the preface, its settings and calls. What the daemon sends piles up in the socket, and then in the
daemon.
"""

import socket
import struct

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_FRAME_BYTES_MAX = 16_384


class DeafClient:
    """One connection that calls and does not listen."""

    def __init__(self, address: str) -> None:
        """`address`: host:port."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._stream = -1
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))

    def __enter__(self) -> "DeafClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, request: bytes) -> None:
        """Make one call of the service and do not wait for anything. Only small requests get through."""
        self.begin(method)
        self.send(struct.pack(">BI", 0, len(request)) + request, last=True)

    def begin(self, method: str) -> None:
        """Open a call; its message may follow in parts."""
        self._stream += 2
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/sessionstore.v1.SessionStore/{method}",
            ":authority": "deaf",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, self._stream, block))

    def send(self, part: bytes, *, last: bool = False) -> None:
        """Send a part of the message of the call that was begun last."""
        for begin in range(0, len(part), _FRAME_BYTES_MAX):
            chunk = part[begin : begin + _FRAME_BYTES_MAX]
            end = last and begin + len(chunk) == len(part)
            self._socket.sendall(_frame(_DATA, _END_STREAM * end, self._stream, chunk))

    def heard(self) -> bytes:
        """What the daemon has sent so far and nobody took."""
        return self._socket.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: str) -> bytes:
    """A string of a header, not compressed; shorter than 127 bytes."""
    raw = text.encode()
    return bytes([len(raw)]) + raw

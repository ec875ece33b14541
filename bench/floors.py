"""The floors: what the machine and the transport take for one caller, with nothing of a store in between."""

import os
import queue
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import grpc

from bench.bare import SERVICE
from bench.messages import encoded

Call = Callable[[], object]
_BODY = encoded(0).encode()


class Floors:
    """One call of each, ready to be timed. `close` when done."""

    def __init__(self, folder: Path, bare_target: str, echo_port: int) -> None:
        self._file = os.open(folder / "floor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._db = apsw.Connection(str(folder / "floor.db"))
        self._db.pragma("journal_mode", "wal")
        self._db.pragma("synchronous", "full")
        self._db.execute("CREATE TABLE IF NOT EXISTS row(id INTEGER PRIMARY KEY, body BLOB)")
        self._echo = socket.create_connection(("127.0.0.1", echo_port))
        self._echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._channel = grpc.insecure_channel(bare_target)
        self._unary = self._channel.unary_unary(f"/{SERVICE}/Unary")
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies = self._channel.stream_stream(f"/{SERVICE}/Stream")(self._sent())

    def calls(self) -> dict[str, Call]:
        """All of them, by name."""
        return {
            "append + fdatasync": self.append,
            "sqlite commit": self.commit,
            "loopback echo": self.echo,
            "bare unary": self.unary(len(_BODY)),
            "bare stream exchange": self.exchange,
        }

    def append(self) -> None:
        """Append a message to a file and flush it."""
        os.write(self._file, _BODY)
        os.fdatasync(self._file)

    def commit(self) -> None:
        """Commit a message in SQLite, WAL mode, synchronous=FULL, by the module that the daemon uses."""
        self._db.execute("INSERT INTO row(body) VALUES (?)", (_BODY,))

    def echo(self) -> None:
        """A message to a TCP server on loopback and back."""
        self._echo.sendall(_BODY)
        left = len(_BODY)
        while left:
            left -= len(self._echo.recv(65536))

    def unary(self, reply_bytes: int) -> Call:
        """A bare unary call with a message up and so many bytes down."""
        request = reply_bytes.to_bytes(8, "big") + _BODY
        return lambda: self._unary(request, timeout=60)

    def exchange(self) -> None:
        """A message up and down an open bidirectional stream."""
        self._requests.put(_BODY)
        next(self._replies)

    def close(self) -> None:
        """End the stream and the connections."""
        self._requests.put(None)
        self._channel.close()
        self._echo.close()
        self._db.close()
        os.close(self._file)

    def _sent(self) -> Iterator[bytes]:
        while (request := self._requests.get()) is not None:
            yield request

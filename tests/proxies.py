"""A TCP proxy between a client and a daemon that loses what it is told to lose."""

import contextlib
import socket
import threading
from dataclasses import dataclass


@dataclass
class Cut:
    """Break the connection once so many bytes went one way; counted from when it was armed."""

    from_client: int | None = None
    from_daemon: int | None = None
    done: bool = False


class Proxy:
    """Forwards connections to `address`.

    `cut` breaks the next connection that has forwarded so many bytes, once. `swallow` keeps what one side
    says, `refuse` breaks every connection, new ones too; `heal` drops all connections and forwards again.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._armed: Cut | None = None
        self._swallowed = ""
        self._refusing = False
        self._closed = False
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, from_client: int | None = None, from_daemon: int | None = None) -> Cut:
        """Arm one cut; its `done` tells whether it came to that."""
        self._armed = Cut(from_client, from_daemon)
        return self._armed

    def swallow(self, side: str) -> None:
        """Keep what `from_client` or `from_daemon` comes from now on."""
        self._swallowed = side

    def refuse(self) -> None:
        self._refusing = True
        self.drop()

    def heal(self) -> None:
        self._swallowed = ""
        self._refusing = False
        self.drop()

    def drop(self) -> None:
        """Break every connection."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            try:
                daemon = socket.create_connection(self._to, timeout=60)
            except OSError:
                client.close()
                continue
            daemon.settimeout(None)
            with self._lock:
                self._sockets += [client, daemon]
            self.connections += 1
            for source, sink, side in ((client, daemon, "from_client"), (daemon, client, "from_daemon")):
                threading.Thread(target=self._pump, args=(source, sink, side), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, side: str) -> None:
        seen: dict[int, int] = {}
        try:
            while data := source.recv(65536):
                armed = self._armed
                limit = getattr(armed, side) if armed is not None else None
                if limit is not None and not armed.done:
                    before = seen.get(id(armed), 0)
                    seen[id(armed)] = before + len(data)
                    if before + len(data) > limit:
                        armed.done = True
                        sink.sendall(data[: limit - before])
                        break
                if side == self._swallowed:
                    continue
                sink.sendall(data)
        except OSError:
            pass  # the other side, or drop, broke it
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

"""The addresses that a daemon serves: what they mean, and whether they may be served.

`parse` is pure. `prepare` looks at the machine: it refuses what is taken, and clears away what a dead daemon
left.
"""

import errno
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sessionstored.engine import StartError

# A socket's path has 108 bytes in the kernel's sockaddr_un, the closing NUL included.
_PATH_BYTES_MAX = 107
_TCP = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>[0-9]{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket's path, or a host and a port (0: a free one)."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> Address:
    """Read `host:port`, `[v6]:port` or `unix:PATH`. Raises ValueError, which says what is wrong."""
    if text.startswith("unix:"):
        return _parse_path(text)
    match = _TCP.fullmatch(text)
    if not match:
        raise ValueError(
            f"{text!r} is no address: it is host:port, [v6]:port or unix:PATH, such as 127.0.0.1:7437"
        )
    port = int(match["port"])
    if port > 65535:
        raise ValueError(f"{text!r} is no address: a port is 0 to 65535")
    if match["v6"]:
        try:
            ipaddress.IPv6Address(match["v6"])
        except ValueError:
            raise ValueError(f"{text!r} is no address: {match['v6']!r} is no IPv6 address") from None
    return Address(host=match["v6"] or match["host"], port=port)


def _parse_path(text: str) -> Address:
    path = text.removeprefix("unix:")
    if not path or "\0" in path:
        raise ValueError(f"{text!r} is no address: unix: is followed by a path, such as unix:/run/me/sock")
    if "," in path or path != path.rstrip():
        raise ValueError(
            f"{text!r} is no address: a socket's path has no comma, and no blank at its end: clients take "
            "comma lists of addresses"
        )
    path = os.path.abspath(_one_slash(path))
    size = len(os.fsencode(path))
    if size > _PATH_BYTES_MAX:
        raise ValueError(
            f"{text!r} is no address: a socket's path has at most {_PATH_BYTES_MAX} bytes, not {size}"
        )
    return Address(path=path)


def grpc_name(text: str) -> str:
    """What gRPC calls an address: it reads the path of a socket as that of a URI, unless it is quoted."""
    if not text.startswith("unix:"):
        return text
    return "unix:" + quote(os.fsencode(_one_slash(text.removeprefix("unix:"))))


def _one_slash(path: str) -> str:
    """The path with one slash at its beginning instead of several: to gRPC, two would name a host."""
    return re.sub("^/{2,}", "/", path)


def is_loopback(address: Address) -> bool:
    """Whether only this machine reaches it. Raises StartError if the host is unknown."""
    try:
        found = [ipaddress.ip_address(address.host)]
    except ValueError:
        try:
            resolved = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise StartError(f"--listen {address}: the host {address.host} is unknown: {error}") from error
        found = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in resolved]
    return all(ip.is_loopback for ip in found)


def prepare(address: Address) -> None:
    """Make way for a Unix socket: its directory, and no file in its place. Raises StartError."""
    if not address.path:
        return
    try:
        _prepare_directory(address, Path(address.path).parent)
        if os.path.lexists(address.path):
            _remove_stale(address)
    except OSError as error:
        raise StartError(f"--listen {address}: {error.strerror}: {error.filename}") from error


def _prepare_directory(address: Address, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    owner = directory.stat().st_uid
    if os.getuid() not in (0, owner) and owner != 0:
        raise StartError(
            f"--listen {address}: {directory} belongs to user {owner}, who could put another socket there; "
            "choose a directory of your own"
        )


def _remove_stale(address: Address) -> None:
    if not stat.S_ISSOCK(os.lstat(address.path).st_mode):
        raise StartError(
            f"--listen {address}: the file exists and is no socket; remove it, or choose another path"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        found = probe.connect_ex(address.path)
    if found == errno.ECONNREFUSED:
        os.unlink(address.path)
    elif found != errno.ENOENT:
        raise StartError(
            f"--listen {address}: another daemon serves there; stop it, or choose another path"
        )


def why_not(address: Address) -> str:
    """What the system says when one tries to bind an address that could not be bound."""
    if address.path:
        return f"cannot bind {address.path}"
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address.host, address.port))
    except OSError as error:
        return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return "cannot bind it"

"""Where the daemon is, and how a channel to it is set up. Pure but for reading the environment.

A target is ``host:port``, ``[v6]:port`` or ``unix:PATH``, or a comma list of these, tried in turn. This
module must not know of grpc.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from sessionstore._operations import invalid

TARGET_VARIABLE = "SESSIONSTORE_TARGET"
TIMEOUT_VARIABLE = "SESSIONSTORE_TIMEOUT"
DEFAULT_TIMEOUT_S = 30.0

_HOST_PORT = re.compile(r"(?P<host>[^\s:/\[\]]+|\[[0-9a-fA-F:.%\w]+\]):(?P<port>[0-9]{1,5})")
# What fits into a socket's address (sun_path), without the zero at its end.
_SOCKET_PATH_BYTES_MAX = 107 if sys.platform == "linux" else 103
_MIB = 1 << 20

OPTIONS: list[tuple[str, int]] = [
    # A retry of grpc's own hides attempts, so that nobody could say whether a change was sent.
    ("grpc.enable_retries", 0),
    # A connection of its own: a client that is closed or forked touches no other.
    ("grpc.use_local_subchannel_pool", 1),
    # A daemon that restarts is found again within a second or so.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The longest that one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A reply holds 1 MiB of messages, or one larger message. Limits of a message are configured in the
    # daemon.
    ("grpc.max_receive_message_length", 64 * _MIB),
    ("grpc.max_send_message_length", 64 * _MIB),
    # Only while a call waits; this also makes the kernel drop a connection whose peer no longer acknowledges.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A daemon is not behind a web proxy, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
]


def default_socket() -> str:
    """The target of a daemon that was started without arguments; equal to the daemon's own rule.

    A user without a daemon's place of their own also finds the machine's, which the service makes.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    service = Path("/run/sessionstore/sock")
    if os.path.isabs(runtime):
        return f"unix:{runtime}/sessionstore/sock"
    if os.getuid() == 0 or service.exists():
        return f"unix:{service}"
    return f"unix:{tempfile.gettempdir()}/sessionstore-{os.getuid()}/sock"


def resolve_targets(target: str | None) -> tuple[str, ...]:
    """The targets to try, as given; from the environment or the default socket if None.

    Raises InvalidArgumentError if one is none.
    """
    chosen = target if target is not None else os.environ.get(TARGET_VARIABLE) or default_socket()
    if not isinstance(chosen, str):
        raise invalid("target", f"must be a string, not {type(chosen).__name__}")
    targets = tuple(part.strip() for part in chosen.split(",") if part.strip())
    if not targets:
        raise invalid("target", "is empty: give host:port, [v6]:port or unix:PATH")
    for each in targets:
        grpc_target(each)
    return targets


def grpc_target(target: str) -> str:
    """The name that grpc knows a target by."""
    if target.startswith("unix:"):
        path = target.removeprefix("unix:")
        if not path or "\0" in path:
            raise invalid("target", f"must be unix:PATH, not {target!r}")
        # It is a path to us: several slashes are one, and name no host.
        path = re.sub("^/{2,}", "/", path)
        size_bytes = len(path.encode(errors="surrogateescape"))
        if size_bytes > _SOCKET_PATH_BYTES_MAX:
            told = f"{size_bytes} bytes, and a socket's path has at most {_SOCKET_PATH_BYTES_MAX}: {target!r}"
            raise invalid("target", f"has a path of {told}")
        # To grpc it is that of a URI, which would end at a "?" or "#".
        return "unix:" + quote(path, errors="surrogateescape")
    match = _HOST_PORT.fullmatch(target)
    if match is None or int(match["port"]) > 65535:
        raise invalid("target", f"must be host:port, [v6]:port or unix:PATH, not {target!r}")
    return f"ipv6:{target}" if target.startswith("[") else f"dns:{target}"


def resolve_timeout_s(timeout: float | None) -> float:
    """The seconds per call, from the environment or the default if None. Raises InvalidArgumentError."""
    chosen: object = timeout if timeout is not None else os.environ.get(TIMEOUT_VARIABLE) or DEFAULT_TIMEOUT_S
    try:
        seconds = float(chosen)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise invalid("timeout", f"must be a number of seconds, not {chosen!r}") from None
    if not 0 < seconds < 1e6:
        raise invalid("timeout", f"must be more than 0 and less than a million seconds, not {chosen!r}")
    return seconds

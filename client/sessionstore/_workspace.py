"""The daemon that owns a directory: found through the LOCK file that it writes there.

LOCK holds ``{"pid": ..., "addresses": [...]}`` while a daemon owns the directory, and is empty after a clean
stop. After a kill it still names the daemon that was, so the addresses are tried, once, before anybody relies
on them. This module must not know of grpc or sessions.
"""

import json
import shlex
import socket
from pathlib import Path

from sessionstore.errors import SessionStoreError, error_for

_PROBE_TIMEOUT_S = 2.0


def find_target(workspace: Path) -> str:
    """The target of the daemon that owns a directory; what it listens on, as a comma list.

    Raises UnavailableError, which says what to do, if no daemon owns it or none answers there.
    """
    lock = workspace / "LOCK"
    try:
        text = lock.read_text(encoding="utf-8")
        if not text.strip():
            raise _unavailable(workspace, "its daemon was stopped")
        owner = json.loads(text)
        pid, addresses = owner["pid"], [_reachable(address) for address in owner["addresses"]]
    except FileNotFoundError:
        raise _unavailable(workspace, f"no daemon has ever served it ({lock} does not exist)") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _unavailable(workspace, f"{lock} cannot be read ({error!r})") from error
    if not addresses:
        told = f"its daemon (process {pid}) does not listen yet; try again in a moment"
        raise _unavailable(workspace, told)
    if not any(map(_answers, addresses)):
        told = f"its daemon (process {pid}) does not answer at {', '.join(addresses)}"
        raise _unavailable(workspace, told)
    return ",".join(addresses)


def _reachable(address: str) -> str:
    """An address as a client on this machine reaches it: a daemon may listen on all of the machine's."""
    host, _, port = address.rpartition(":")
    return {"0.0.0.0": f"127.0.0.1:{port}", "[::]": f"[::1]:{port}"}.get(host, address)


def _answers(address: str) -> bool:
    """Whether somebody accepts connections there."""
    try:
        if address.startswith("unix:"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(_PROBE_TIMEOUT_S)
                probe.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _unavailable(workspace: Path, what: str) -> SessionStoreError:
    text = (
        f"no session store serves {workspace}: {what}. Start one with "
        f"`sessionstored serve --data {shlex.quote(str(workspace))}`, or give a target such as 'unix:PATH' "
        "or 'host:port' instead of a path."
    )
    return error_for("NOT_CONNECTED", text, {"target": str(workspace)})

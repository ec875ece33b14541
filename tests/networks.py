"""Two network namespaces of their own with one cable between them, to cut and to heal; needs root and Linux.

Nothing here touches the network of the machine: both ends are in namespaces that live as long as the two
processes that hold them. A `Daemon` runs at the far end with `launcher=cable.far(...)`, its clients at the
near one.
"""

import os
import shutil
import subprocess
import sys
import time

FAR_ADDRESS = "10.77.0.2"
_NEAR_ADDRESS = "10.77.0.1"
# A qdisc that keeps nothing drops whatever its side sends, and tells nobody.
_DROP = "tc qdisc add dev {device} root pfifo limit 0"
_PASS = "tc qdisc del dev {device} root"

# name -> (which end, how to cut, how to heal)
CUTS = {
    "requests dropped": ("near", _DROP, _PASS),
    "answers dropped": ("far", _DROP, _PASS),
    "the client's link down": ("near", "ip link set {device} down", "ip link set {device} up"),
    "the daemon's link down": ("far", "ip link set {device} down", "ip link set {device} up"),
}


def missing() -> str:
    """Why there can be no cable here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    tools = [tool for tool in ("unshare", "nsenter", "ip", "tc") if shutil.which(tool) is None]
    if tools:
        return f"there is no {', no '.join(tools)}"
    try:
        Cable().close()
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        return f"this machine makes no network namespaces: {error}"
    return ""


class Cable:
    """Two namespaces, `near` and `far`, and the cable between them."""

    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for end in ("near", "far"):
                self._holders[end] = subprocess.Popen(["unshare", "-n", "sleep", "3600"])
                self._wait_for(self._holders[end].pid)
            far = self._holders["far"].pid
            self._run("near", f"ip link add name ss-near type veth peer name ss-far netns {far}")
            for end, address in (("near", _NEAR_ADDRESS), ("far", FAR_ADDRESS)):
                self._run(end, f"ip addr add {address}/24 dev ss-{end}")
                self._run(end, f"ip link set ss-{end} up")
                self._run(end, "ip link set lo up")
        except BaseException:
            self.close()
            raise

    def _wait_for(self, pid: int) -> None:
        """Until the process is in a namespace of its own."""
        ours = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 60
        while os.readlink(f"/proc/{pid}/ns/net") == ours:
            assert time.monotonic() < deadline, "no network namespace came"
            time.sleep(0.01)

    def near(self, *command: str) -> tuple[str, ...]:
        """A command, to be run at the near end."""
        return ("nsenter", "-t", str(self._holders["near"].pid), "-n", *command)

    def far(self, *command: str) -> tuple[str, ...]:
        """A command, to be run at the far end."""
        return ("nsenter", "-t", str(self._holders["far"].pid), "-n", *command)

    def cut(self, name: str) -> None:
        """Cut the cable in one of the ways of `CUTS`."""
        end, how, _ = CUTS[name]
        self._run(end, how.format(device=f"ss-{end}"))

    def heal(self, name: str) -> None:
        """Undo that cut."""
        end, _, how = CUTS[name]
        self._run(end, how.format(device=f"ss-{end}"))

    def close(self) -> None:
        """End the namespaces, and so the cable."""
        for holder in self._holders.values():
            holder.kill()
            holder.wait(60)

    def _run(self, end: str, command: str) -> None:
        enter = self.near if end == "near" else self.far
        subprocess.run(enter(*command.split()), check=True, timeout=60, capture_output=True)

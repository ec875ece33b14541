"""Real daemons for tests: each a process of its own, on a port of its own, ended by its own id."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
from sessionstore.v1 import session_store_pb2_grpc

# Bounds of waiting for what must come, on whatever machine: no test is judged by them.
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
# An address that a daemon had may be taken for a moment, by somebody's outgoing connection.
ADDRESS_TIMEOUT_S = 10.0


class DaemonDied(AssertionError):
    """The daemon ended before it was ready; the message holds what it wrote to stderr."""


class Daemon:
    """One `sessionstored serve`.

    `start` may be called again after `kill` or `terminate`; it then takes the address that it had. A
    `launcher` stands in the place of `python -m sessionstored`.
    """

    def __init__(
        self,
        data: Path,
        *,
        store: str = "memory:",
        listen: str = "127.0.0.1:0",
        flags: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        descriptors_max: int | None = None,
        launcher: tuple[str, ...] = (),
    ) -> None:
        self.data = data
        self.store = store
        self.listen = listen
        self.flags = flags
        self.environment = environment or {}
        self.descriptors_max = descriptors_max
        self.launcher = launcher or (sys.executable, "-m", "sessionstored")
        self.address = ""
        self.stdout: list[str] = []
        self._stderr: list[str] = []
        self._pumps: list[threading.Thread] = []
        self._process: subprocess.Popen[str] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "the daemon was not started"
        return self._process

    @property
    def stderr(self) -> str:
        """What all processes of this daemon wrote to stderr so far."""
        return "".join(self._stderr)

    @property
    def stub(self) -> session_store_pb2_grpc.SessionStoreStub:
        """A plain stub on one channel, which lasts until the daemon is closed."""
        if self._channel is None:
            self._channel = channel_to(self.address)
        return session_store_pb2_grpc.SessionStoreStub(self._channel)

    def start(self) -> "Daemon":
        """Start it, and wait until it listens."""
        deadline = time.monotonic() + ADDRESS_TIMEOUT_S
        while True:
            said = len(self._stderr)
            try:
                return self._start()
            except DaemonDied:
                in_use = any("Address already in use" in line for line in self._stderr[said:])
                if not (self.address and in_use) or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _start(self) -> "Daemon":
        listen = self.address or self.listen
        command = [*self.launcher, "serve", "--store", self.store, "--listen", listen]
        if self.descriptors_max is not None:
            command = ["sh", "-c", f'ulimit -n {self.descriptors_max}; exec "$@"', "sh", *command]
        self._process = subprocess.Popen(
            [*command, "--data", str(self.data), *self.flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment() | self.environment,
        )
        self.stdout = []
        ready = threading.Event()
        self._pumps = []
        for pipe, into, line_seen in (
            (self._process.stdout, self.stdout, ready),
            (self._process.stderr, self._stderr, None),
        ):
            self._pumps.append(threading.Thread(target=_pump, args=(pipe, into, line_seen), daemon=True))
            self._pumps[-1].start()
        if not ready.wait(START_TIMEOUT_S) or not self.stdout:
            self.kill()
            raise DaemonDied(f"it ended with {self.process.returncode} before it was ready:\n{self.stderr}")
        self.address = self.stdout[0].removeprefix("listening on ").strip()
        return self

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """SIGKILL; returns the exit code."""
        return self._end(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal and do not wait."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end, and until all that it wrote is here; returns the exit code."""
        code = self.process.wait(timeout_s)
        for pump in self._pumps:
            pump.join(timeout_s)
        return code

    def restart(self, *, kill: bool = False) -> "Daemon":
        """End it, by SIGTERM or by kill -9, and start it again on the same address and directory."""
        if kill:
            self.kill()
        else:
            assert self.terminate() == 0, self.stderr
        return self.start()

    def close(self) -> None:
        """End it however it takes, and let go of everything."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self.kill()

    def _end(self, number: signal.Signals) -> int:
        if self.process.poll() is None:
            os.kill(self.pid, number)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            raise


def channel_to(address: str) -> grpc.Channel:
    """A channel of its own connection, without retries of gRPC's own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    return grpc.insecure_channel(address, options=options)


def clean_environment() -> dict[str, str]:
    """The environment without settings of whoever runs the tests."""
    ours = ("SESSIONSTORE", "XDG_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def wait_until(condition, timeout_s: float = 60.0, what: str = "the condition") -> None:
    """Wait until a condition holds; fails after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.01)


def _pump(pipe, into: list[str], line_seen: threading.Event | None) -> None:
    with pipe:
        for line in pipe:
            into.append(line)
            if line_seen is not None:
                line_seen.set()
    if line_seen is not None:
        line_seen.set()

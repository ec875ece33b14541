"""The servers of a run: ours, Redis, PostgreSQL, and the bare one that the floors need.

Each is a process of its own on Unix sockets (the bare echo on loopback), with its data below the run's
directory, ended by its own id. Everybody keeps the defaults that its users have, except for what is said
here.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TABLE_PG = (
    "CREATE TABLE message(session text, n bigint GENERATED ALWAYS AS IDENTITY, body text NOT NULL, "
    "PRIMARY KEY (session, n))"
)
START_S_MAX = 120.0
_STOP_S_MAX = 120.0


class NotHere(Exception):
    """A server or a package that this machine does not have; the text says which."""


def environment() -> dict[str, str]:
    """The environment of children: they can import this package, and no setting of whoever runs it counts."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SESSIONSTORE", "XDG_", "PG"))
    }
    here = str(Path(__file__).parent.parent)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [here, kept.get("PYTHONPATH")]))}


class Server:
    """A process, and how to know that it serves."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process, which must run."""
        assert self._process is not None
        return self._process.pid

    def launch(self, command: list[str], ready: Callable[[], bool], user: str | None = None) -> None:
        """Start it and wait until it serves."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                user=user, group=user and _group(user),
                extra_groups=[] if user else None, cwd=self.folder, env=environment(),
            )  # fmt: skip
        deadline = time.monotonic() + START_S_MAX
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.002)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it and wait; doing so again does nothing."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
            try:
                self._process.wait(_STOP_S_MAX)
            except subprocess.TimeoutExpired:
                os.kill(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._process = None

    def resident_bytes(self) -> int:
        """The memory that the process has now."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"{self.name} has no VmRSS")


class Ours(Server):
    """`sessionstored serve`, as a user starts it."""

    def __init__(self, name: str, folder: Path, data: Path) -> None:
        super().__init__(name, folder)
        self.data = data
        self.target = f"unix:{folder / name}.sock"

    def start(self) -> float:
        """Start; returns after how many seconds it answered its first call."""
        from sessionstore import SessionStore

        begun, said = time.monotonic(), self.log.stat().st_size if self.log.exists() else 0
        self.launch(
            [
                sys.executable,
                "-m",
                "sessionstored",
                "serve",
                "--data",
                str(self.data),
                "--listen",
                self.target,
            ],
            lambda: b"listening on" in self.log.read_bytes()[said:],
        )
        with SessionStore(self.target) as store:
            store.info()
        return time.monotonic() - begun


class Bare(Server):
    """grpc.aio with nothing behind it, and a TCP echo."""

    def __init__(self, folder: Path) -> None:
        super().__init__("bare", folder)
        self.target = f"unix:{folder}/bare.sock"

    def start(self) -> int:
        """Start; returns the echo's port."""
        self.launch([sys.executable, "-m", "bench.bare", self.target], lambda: b"\n" in self.log.read_bytes())
        return int(self.log.read_text().split()[0])


class Redis(Server):
    """redis-server with an append-only file; `appendfsync` is "always" or "everysec"."""

    def __init__(self, folder: Path, appendfsync: str) -> None:
        super().__init__(f"redis-{appendfsync}", folder)
        self.appendfsync = appendfsync
        self.socket = f"{folder}/{self.name}.sock"

    def start(self) -> None:
        """Start."""
        binary = shutil.which("redis-server")
        if binary is None:
            raise NotHere("redis-server (apt-get install redis-server)")
        data = self.folder / self.name
        data.mkdir()
        settings = {
            "port": "0", "unixsocket": self.socket, "dir": str(data), "appendonly": "yes", "save": "",
            "appendfsync": self.appendfsync,
        }  # fmt: skip
        command = [binary, *(part for name, value in settings.items() for part in (f"--{name}", value))]
        self.launch(command, lambda: os.path.exists(self.socket))


class Postgres(Server):
    """A PostgreSQL cluster of its own, with initdb's settings and 200 connections."""

    def __init__(self, folder: Path) -> None:
        super().__init__("postgres", folder)
        self.socket_folder = folder / "pg"
        self.user = "bench"

    def start(self) -> None:
        """Make the cluster and start it. The server refuses to run as root: root runs it as `postgres`."""
        binaries = _postgres_binaries()
        account = None
        self.socket_folder.mkdir()
        if os.geteuid() == 0:
            account = "postgres"
            shutil.chown(self.socket_folder, account)
        data = self.socket_folder / "data"
        made = subprocess.run(
            [binaries / "initdb", "-D", data, "-U", self.user, "-A", "trust", "-E", "UTF8", "--locale=C"],
            user=account, capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr}")
        self.launch(
            [str(binaries / "postgres"), "-D", str(data), "-k", str(self.socket_folder), "-h", "",
             "-c", "max_connections=200"],
            self._answers, account,
        )  # fmt: skip

    @property
    def dsn(self) -> str:
        """For psycopg."""
        return f"host={self.socket_folder} user={self.user} dbname=postgres"

    def url(self, driver: str) -> str:
        """For SQLAlchemy."""
        return f"postgresql+{driver}://{self.user}@/postgres?host={self.socket_folder}"

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it; SIGINT is its "fast" shutdown, which does not wait for clients."""
        super().stop(number)

    def _answers(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.dsn):
            return True
        return False


def make_table(dsn: str) -> None:
    """The table that psycopg's messages go to."""
    import psycopg

    with psycopg.connect(dsn) as db:
        db.execute(TABLE_PG)


def _postgres_binaries() -> Path:
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    found = shutil.which("initdb")
    if found is None:
        raise NotHere("PostgreSQL (apt-get install postgresql)")
    return Path(found).resolve().parent


def server_versions() -> list[str]:
    """What the servers' binaries say of themselves."""
    commands = [[shutil.which("redis-server") or "", "--version"]]
    with contextlib.suppress(NotHere):
        commands.append([str(_postgres_binaries() / "postgres"), "--version"])
    return [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for command in commands
        if command[0]
    ]


def _group(user: str) -> int:
    return pwd.getpwnam(user).pw_gid

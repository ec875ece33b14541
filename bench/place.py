"""Where a run keeps its data, and what machine it is on.

All data, ours and the peers', lie on one real file system: a flush on tmpfs costs nothing, and would show
nothing.
"""

import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

DEFAULT = Path("/var/tmp")
_UNREAL = ("tmpfs", "ramfs", "overlay")
_PACKAGES = (
    "grpcio", "protobuf", "apsw", "redis", "psycopg", "psycopg-binary", "openai-agents", "google-adk",
    "SQLAlchemy", "asyncpg", "aiosqlite",
)  # fmt: skip


class UnfitPlace(Exception):
    """Nothing measured here would mean anything."""


def file_system(path: Path) -> str:
    """The type of the file system that holds a path, as the kernel names it."""
    path = path.resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, name, *_ = line.split(" ")
        point = point.encode().decode("unicode_escape")
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), name
    return kind


def make(parent: Path, *, any_file_system: bool = False) -> Path:
    """A new directory for a run, which other users may pass through: a server may have to run as one."""
    kind = file_system(parent)
    if kind in _UNREAL and not any_file_system:
        raise UnfitPlace(
            f"{parent} is on {kind}, where a flush is none: name a directory of a disk with --dir"
        )
    made = Path(tempfile.mkdtemp(prefix="sessionstore-bench-", dir=parent))
    made.chmod(0o711)
    return made


def machine(parent: Path) -> list[str]:
    """What it is, in lines for people."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    gib = int(memory.split()[1]) / (1 << 20)
    load = ", ".join(f"{each:.2f}" for each in os.getloadavg())
    return [
        f"{os.cpu_count()} × {model}, {gib:.1f} GiB, Linux {platform.release()}",
        f"data on {file_system(parent)}; load before the run {load}",
    ]


def _commit() -> str:
    """The commit that is checked out, if this is a git repository with git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return f" at {done.stdout.strip()}" if done.returncode == 0 else ""


def versions() -> list[str]:
    """What Python packages take part."""
    found = [
        f"Python {platform.python_version()}",
        f"sessionstore {metadata.version('sessionstore')}{_commit()}",
    ]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return found

"""The workspace of the fixtures: session files as they are found in the field, whole and damaged."""

import json
import shutil
from pathlib import Path

FIXTURE = Path(__file__).parent.parent / "fixtures" / "workspace"
EXPECTED: dict[str, dict[str, object]] = json.loads((FIXTURE / "EXPECTED.json").read_bytes())
BAD = "corrupt_middle.jsonl"
TORN = ("torn_tail.jsonl", "binary_junk.jsonl")
HEALTHY = [name for name in EXPECTED if EXPECTED[name]["health"] == "ok"]


def copy_workspace(to: Path) -> Path:
    """A copy to work on; times stay."""
    shutil.copytree(FIXTURE / "sessions", to / "sessions")
    return to


def prints(data: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of everything in the session directory."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (data / "sessions").iterdir()
    }


def quarantined(data: Path) -> list[bytes]:
    """What was set aside."""
    return sorted(path.read_bytes() for path in (data / "quarantine").iterdir())


def raw_messages(path: Path) -> list[bytes]:
    """The message lines of a file that may be damaged, in the most naive way."""
    found = []
    for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("_type") != "metadata":
            found.append(line.strip())
    return found

"""What the tests of the house share: where the repository is, and how to run a command in it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path = ROOT, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """The finished process, with its output as text; the caller judges the exit code."""
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout_s)


def output_of(*command: str | Path, cwd: Path = ROOT, timeout_s: float = 300) -> str:
    """What the command prints; it must succeed."""
    done = run(*command, cwd=cwd, timeout_s=timeout_s)
    assert done.returncode == 0, f"{done.args} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout

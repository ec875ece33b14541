"""Python in a process of its own: what could disturb the tests, or be disturbed by them, runs there."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from daemons import clean_environment

TESTS = str(Path(__file__).parent)


def python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Run this code, in which every warning is an error."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=clean_environment() | {"PYTHONPATH": TESTS}, **pipes, **options)


def output(process: subprocess.Popen[str], timeout_s: float = 300.0) -> str:
    """What it wrote to stdout; fails if it failed or wrote to stderr."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"it hung; stdout: {out} stderr: {err}")
    assert (process.returncode, err) == (0, ""), out + err
    return out

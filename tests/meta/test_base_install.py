"""`pip install sessionstore` without extras: the SDK alone, light, without the daemon's dependencies."""

import json
import re
import tomllib
import venv
from pathlib import Path

import pytest
from meta.tools import ROOT, output_of, run

PROBE = """
import json, sys, time
began = time.perf_counter()
import sessionstore
bare = time.perf_counter() - began
sessionstore.SessionStore
print(json.dumps({"file": sessionstore.__file__, "bare_ms": bare * 1000,
                  "client_ms": (time.perf_counter() - began) * 1000}))
"""


def extras_only() -> set[str]:
    """The distributions that only an extra asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
        return {match.group().lower() for match in found if match}

    extras = project["optional-dependencies"]
    return names(extras["server"] + extras["cli"]) - names(project["dependencies"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the base distribution in it."""
    home = tmp_path_factory.mktemp("base")
    venv.create(home, with_pip=True)
    output_of(home / "bin/pip", "install", "--quiet", "--disable-pip-version-check",
              "--constraint", ROOT / "constraints.txt", ROOT, cwd=home, timeout_s=500)
    return home


def size_kib(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) // 1024


def test_it_imports_the_sdk_alone(installed: Path, capsys: pytest.CaptureFixture[str]):
    python = installed / "bin/python"
    output_of(python, "-c", PROBE, cwd=installed)  # compiles
    probe = json.loads(output_of(python, "-c", PROBE, cwd=installed))
    assert probe["file"].startswith(str(installed))
    packages = next(installed.glob("lib/python3*/site-packages"))
    own = size_kib(packages / "sessionstore")
    whole = size_kib(packages) - size_kib(packages / "pip") - size_kib(packages / "setuptools")
    with capsys.disabled():
        print(f"\nbase install: import sessionstore {probe['bare_ms']:.1f} ms, with the client "
              f"{probe['client_ms']:.0f} ms; the SDK {own} KiB, all it needs {whole // 1024} MiB")
    assert whole < 100 * 1024


def test_it_pulls_no_dependency_of_the_daemon(installed: Path):
    listed = output_of(installed / "bin/pip", "list", "--format=json", "--disable-pip-version-check")
    names = {entry["name"].lower() for entry in json.loads(listed)}
    assert "sessionstore" in names
    assert names & extras_only() == set()


@pytest.mark.parametrize(("command", "extra"), [("sessionstored", "server"), ("sessionctl", "cli")])
def test_a_command_without_its_extra_says_what_to_install(installed: Path, command: str, extra: str):
    done = run(installed / "bin" / command, "--help", cwd=installed)
    assert done.returncode != 0
    assert f"sessionstore[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr

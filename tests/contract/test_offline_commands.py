"""`sessionstored check` and `repair` as a script runs them: what they print, and how they exit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from crash.directories import everything, rot
from crash.workspaces import EXPECTED, copy_workspace
from daemons import clean_environment
from sessionstore.v1 import session_store_pb2 as pb
from wire import block


def sessionstored(*arguments: object, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command; `typed` is what a pipe says."""
    return subprocess.run(
        [sys.executable, "-m", "sessionstored", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=typed or "",
        timeout=60,
        check=False,
        env=clean_environment(),
    )


def findings(data: Path) -> tuple[dict[str, dict[str, object]], dict[str, object], int]:
    """What `check --all --json` says: by file, the last line, and its exit code."""
    done = sessionstored("check", "--data", data, "--all", "--json")
    *found, last = map(json.loads, done.stdout.splitlines())
    return {str(each["file"]): each for each in found}, last, done.returncode


@pytest.fixture
def store(make_daemon, tmp_path: Path) -> Path:
    """A store with two sessions, after a clean stop."""
    daemon = make_daemon(tmp_path / "store", store="jsonl").start()
    for key in ("a:b", "k"):
        daemon.stub.AppendMessages(
            pb.AppendMessagesRequest(key=key, messages=block({"role": "user", "content": "hello"})),
            timeout=10,
        )
    assert daemon.terminate() == 0
    return daemon.data


# check ------------------------------------------------------------------------------------------------------


def test_a_whole_store_is_well(store: Path):
    before = everything(store)
    done = sessionstored("check", "--data", store)
    assert (done.returncode, done.stderr) == (0, "")
    assert "found       2 ok\n" in done.stdout
    assert "sessions/k.jsonl" not in done.stdout
    assert "sessions/k.jsonl" in sessionstored("check", "--data", store, "--all").stdout
    found, last, code = findings(store)
    assert {file: each["verdict"] for file, each in found.items()} == {
        "sessions/a_b.jsonl": "ok",
        "sessions/k.jsonl": "ok",
    }
    assert (last["well"], code) == (True, 0)
    assert everything(store) == before


def test_damage_is_in_the_table_and_in_the_exit_status(store: Path):
    rot(store / "sessions" / "k.jsonl", b"hello", b"jello")
    done = sessionstored("check", "--data", store)
    assert done.returncode == 4
    (row,) = [line for line in done.stdout.splitlines() if "sessions/k.jsonl" in line]
    assert row.split()[0] == "damaged"
    assert "bytes 0 to 65536 do not match their checksum" in row
    assert "mend        `sessionstored repair` keeps" in done.stdout
    found, last, code = findings(store)
    assert (found["sessions/k.jsonl"]["remedy"], last["well"], code) == ("mend", False, 4)


def test_a_daemon_that_owns_the_directory_is_named(make_daemon, tmp_path: Path):
    daemon = make_daemon(tmp_path / "store", store="jsonl").start()
    for command in (("check",),):
        done = sessionstored(*command, "--data", daemon.data)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"process {daemon.pid}, {daemon.address}" in done.stderr


def test_what_is_no_store_and_what_is_no_usage(tmp_path: Path):
    done = sessionstored("check", "--data", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path} is no store and no workspace" in done.stderr
    assert sessionstored("check", "--data", tmp_path, "--fast").returncode == 2
    assert sessionstored("check", "--config", tmp_path / "missing.toml").returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_is_read_through(tmp_path: Path):
    data = copy_workspace(tmp_path / "workspace")
    before = everything(data)
    found, last, code = findings(data)
    assert {file.removeprefix("sessions/") for file in found} == EXPECTED.keys()
    assert found["sessions/corrupt_middle.jsonl"]["line"] == 5
    assert (last["summary"]["store_id"], code) == ("", 4)
    assert everything(data) == before

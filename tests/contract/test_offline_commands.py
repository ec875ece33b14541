"""`sessionstored check` and `repair` as a script runs them: what they print, and how they exit."""

import json
import os
import pty
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
    for command in (("check",), ("repair", "--yes")):
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


@pytest.mark.parametrize("arguments", [("check",), ("check", "--json"), ("repair", "--yes")])
def test_a_stdout_that_takes_nothing_is_one_line(store: Path, arguments: tuple[str, ...]):
    rot(store / "sessions" / "k.jsonl", b"hello", b"jello")
    before = everything(store)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sessionstored", *arguments, "--data", str(store)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False, env=clean_environment(),
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "sessionstored: stdout: No space left on device\n")
    assert everything(store) == before


def test_a_workspace_is_read_through(tmp_path: Path):
    data = copy_workspace(tmp_path / "workspace")
    before = everything(data)
    found, last, code = findings(data)
    assert {file.removeprefix("sessions/") for file in found} == EXPECTED.keys()
    assert found["sessions/corrupt_middle.jsonl"]["line"] == 5
    assert (last["summary"]["store_id"], code) == ("", 4)
    assert everything(data) == before


# repair -----------------------------------------------------------------------------------------------------


def served(make_daemon, data: Path, key: str) -> tuple[list[bytes], str]:
    """A session's messages and its mark, from a daemon on the directory."""
    daemon = make_daemon(data, store="jsonl").start()
    blocks = daemon.stub.ReadMessages(pb.ReadMessagesRequest(key=key), timeout=10)
    messages = b"".join(each.messages for each in blocks).splitlines()
    head = daemon.stub.GetSession(pb.GetSessionRequest(key=key), timeout=10).session
    assert daemon.terminate() == 0
    return messages, head.damage


def typed_at_a_terminal(text: str, *arguments: object) -> tuple[int, str]:
    """Run a command with a terminal for its stdin; its exit code and what it wrote."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, text.encode())
        done = subprocess.run(
            [sys.executable, "-m", "sessionstored", *map(str, arguments)],
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=clean_environment(),
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout + done.stderr


def test_a_whole_store_needs_no_repair(store: Path):
    before = everything(store)
    done = sessionstored("repair", "--data", store)
    assert (done.returncode, done.stdout) == (0, "nothing needs a repair\n")
    assert everything(store) == before


def test_nothing_is_repaired_without_consent(store: Path):
    rot(store / "sessions" / "k.jsonl", b"hello", b"jello")
    before = everything(store)
    done = sessionstored("repair", "--data", store)
    assert done.returncode == 2
    assert "keep 0 messages; leave out 1 suspect messages; the whole file goes to quarantine" in done.stdout
    assert "give --yes to go on" in done.stderr
    code, said = typed_at_a_terminal("n\n", "repair", "--data", store)
    assert (code, "Repair 1 session so?" in said) == (4, True)
    assert everything(store) == before


def test_consent_repairs_and_says_so(store: Path, make_daemon):
    rotten = store / "sessions" / "k.jsonl"
    rot(rotten, b"hello", b"jello")
    content = rotten.read_bytes()
    code, said = typed_at_a_terminal("y\n", "repair", "--data", store)
    assert code == 0, said
    assert "0 messages were kept; bytes 0 to 65536 did not match their checksum, 1 messages left out" in said
    (aside,) = (store / "quarantine").iterdir()
    assert aside.read_bytes() == content
    assert f"quarantine/{aside.name}" in said
    messages, damage = served(make_daemon, store, "k")
    assert messages == []
    assert "repaired" in damage
    assert aside.name in damage
    assert sessionstored("check", "--data", store).returncode == 4
    assert "the mark was removed" in sessionstored("repair", "--data", store, "--yes").stdout
    assert sessionstored("check", "--data", store).returncode == 0
    assert served(make_daemon, store, "k") == ([], "")


def test_suspect_messages_are_kept_on_demand(store: Path, make_daemon):
    rot(store / "sessions" / "k.jsonl", b"hello", b"jello")
    assert sessionstored("repair", "--data", store, "--yes", "--keep-suspect").returncode == 0
    messages, damage = served(make_daemon, store, "k")
    assert json.loads(messages[0])["content"] == "jello"
    assert "what could be read of it was kept" in damage


def test_only_the_named_sessions_are_repaired(store: Path):
    for name in ("k", "a_b"):
        rot(store / "sessions" / f"{name}.jsonl", b"hello", b"jello")
    assert sessionstored("repair", "--data", store, "--yes", "a:b").returncode == 0
    found, _, _ = findings(store)
    assert {file: each["verdict"] for file, each in found.items()} == {
        "sessions/a_b.jsonl": "marked",
        "sessions/k.jsonl": "damaged",
    }
    done = sessionstored("repair", "--data", store, "--yes", "nobody")
    assert (done.returncode, "there is no session 'nobody'" in done.stderr) == (2, True)


def test_what_a_person_has_to_decide_is_left_and_said(store: Path):
    sessions = store / "sessions"
    (sessions / "zz.jsonl").write_bytes((sessions / "k.jsonl").read_bytes())
    (sessions / "a_b.jsonl").unlink()
    done = sessionstored("repair", "--data", store, "--yes")
    assert done.returncode == 4
    assert "sessions/k.jsonl and sessions/zz.jsonl claim this key: move one of them away" in done.stdout
    assert "the session was removed: its file is gone" in done.stdout
    (sessions / "zz.jsonl").unlink()
    assert sessionstored("check", "--data", store).returncode == 0


def test_a_missing_store_file_is_made_anew_and_that_is_said(store: Path):
    (store / "STORE").unlink()
    done = sessionstored("repair", "--data", store, "--yes")
    assert done.returncode == 0
    plan, _, made = done.stdout.partition("what was done")
    assert "open the store: it makes the file anew from journal.db" in plan
    assert "STORE" in made
    assert "it was made anew from journal.db" in made
    assert sessionstored("check", "--data", store).returncode == 0


def test_damage_of_the_store_itself_is_not_touched(store: Path):
    content = bytearray((store / "STORE").read_bytes())
    content[10] ^= 1
    (store / "STORE").write_bytes(content)
    rot(store / "sessions" / "k.jsonl", b"hello", b"jello")
    before = everything(store)
    done = sessionstored("repair", "--data", store, "--yes")
    assert done.returncode == 4
    assert "repair does not touch this: restore a backup" in done.stdout
    assert everything(store) == before


def test_the_workspace_of_the_field_is_mended(tmp_path: Path, make_daemon):
    data = copy_workspace(tmp_path / "workspace")
    assert sessionstored("repair", "--data", data, "--yes").returncode == 0
    messages, damage = served(make_daemon, data, "corrupt:middle")
    assert len(messages) == EXPECTED["corrupt_middle.jsonl"]["messages"]
    assert "line 5 cannot be read" in damage

"""Directories that earlier versions wrote are read as they were: one golden directory per format version."""

import json
import shutil
from pathlib import Path

import pytest
from engines import one
from golden import FIXTURES, KEPT_CALL, KEPT_REQUEST, contents, leases, open_golden
from seed_reader import read_session
from sessionstored.engine.jsonl.store import FORMAT
from sessionstored.rules import Answer

DIRECTORIES = sorted(path.parent for path in FIXTURES.glob("*/*/STORE"))


def test_this_version_has_a_golden_directory() -> None:
    assert {path.name for path in DIRECTORIES if path.parent.name == f"v{FORMAT}"} == {"clean", "killed"}


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: f"{path.parent.name}-{path.name}")
async def test_a_golden_directory_is_read_as_it_was(tmp_path: Path, directory: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(directory, data)
    expected = json.loads((data / "EXPECTED.json").read_bytes())
    engine = await open_golden(data)
    assert await contents(engine) == expected
    for asked in (KEPT_CALL, KEPT_REQUEST):
        again = await one(engine, asked)
        assert isinstance(again.outcome, Answer)
        assert again.replayed
    kept = await leases(engine)
    late = {"leased late": ("golden", "appends_allowed", 3600.0)} if directory.name == "killed" else {}
    assert kept == {"leased": ("golden", "exclusive", 60.0)} | late
    await engine.close()
    files = [read_session(path) for path in (data / "sessions").glob("*.jsonl")]
    in_files = {session.key: session.messages for session in files if session}
    for key, session in expected.items():
        if not session["damage"]:
            assert in_files[key] == [json.loads(line) for line in session["messages"]]


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: f"{path.parent.name}-{path.name}")
async def test_a_golden_directory_can_be_read_twice(tmp_path: Path, directory: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(directory, data)
    first = await open_golden(data)
    before = await contents(first)
    await first.close()
    second = await open_golden(data)
    assert await contents(second) == before
    await second.close()

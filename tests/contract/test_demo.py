"""`make demo`: it ends by itself with a clean report, and its judge sees what it says it sees."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from daemons import Daemon, clean_environment
from sessionstore import SessionStore

DEMO = Path(__file__).resolve().parents[2] / "demo/demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sessionstore_demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_it_ends_by_itself_with_nothing_lost(demo: ModuleType):
    assert demo.AGENTS_END_S <= 25, "it bounds itself to half a minute"
    done = subprocess.run(
        [sys.executable, str(DEMO), "--patience", "10"], capture_output=True, text=True, check=False,
        timeout=500, env=clean_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"seed \d+\n", done.stdout)
    assert done.stdout.count("kill -9 of the daemon") == 3
    assert "0 lost, 0 duplicated, 0 torn" in done.stdout
    acknowledged, stored = map(int, re.findall(r"│ all +│ +(\d+) │ +(\d+) │", done.stdout)[0])
    assert stored == acknowledged > 100


def batch(name: str, size: int = 1) -> list[dict[str, object]]:
    return [{"role": "user", "batch": {"id": name, "place": place, "size": size}} for place in range(size)]


@pytest.mark.parametrize(("messages", "lost", "duplicated", "torn"), [
    (batch("a") + batch("b", 2), 0, 0, 0),
    (batch("a") + batch("b", 2) + batch("unknown"), 0, 0, 0),
    (batch("b", 2), 1, 0, 0),
    (batch("a"), 2, 0, 0),
    (batch("a") + batch("a") + batch("b", 2), 0, 1, 0),
    (batch("a") + batch("b", 2)[:1], 1, 0, 1),
    (batch("a") + batch("b", 2)[1:], 1, 0, 1),
    (batch("b", 2)[:1] + batch("a") + batch("b", 2)[1:], 0, 0, 1),
    (batch("a") + batch("b", 2)[::-1], 0, 0, 1),
])
def test_its_judge_sees_what_is_wrong(
    demo: ModuleType, daemon: Daemon, messages: list[dict[str, object]], lost: int, duplicated: int, torn: int
):
    key = demo.SESSIONS[0]
    note = demo.Note(batches={"a": (key, 1), "b": (key, 2)})
    with SessionStore(daemon.address, timeout=60) as store:
        store.session(key).append(*messages)
        found = demo.hold_against(store, [note])[key]
    assert (found.acknowledged, found.stored) == (3, len(messages))
    assert (found.lost, found.duplicated, found.torn) == (lost, duplicated, torn)
    report = {key: found}
    good = demo.print_report(demo.Console(quiet=True), report, 1)
    assert good == (lost == duplicated == torn == 0)

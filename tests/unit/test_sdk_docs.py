"""The Python blocks of docs/sdk.md run, in their order, against a real daemon."""

import re
from pathlib import Path

import pytest
from daemons import Daemon
from sessionstore import SessionStore, errors

DOCS = Path(__file__).parents[2] / "docs" / "sdk.md"


def test_the_blocks_run(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIONSTORE_TARGET", daemon.address)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    with SessionStore() as store:
        names = {"llm": lambda history: f"you said {history[-1]['content']}"}
        for number, block in enumerate(blocks):
            if number == 2:  # the first two close what they opened
                names |= {"store": store, "session": store.session("telegram:42")}
            exec(compile(block, f"block {number}", "exec"), names)
        stored = store.session("telegram:42")
    contents = [message["content"] for message in stored.messages]
    assert contents == ["you said Hello!", "you said hi", "hi again", "you said hi again", "news", "once"]


def test_every_error_is_described() -> None:
    text = DOCS.read_text()
    described = set(errors.ERRORS.values()) | set(errors.CLIENT_REASONS.values())
    assert len(described) >= 12
    for cls in described:
        assert f"`{cls.__name__}`" in text

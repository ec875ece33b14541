"""Keys that want the same file name: each session has a file of its own, whatever is deleted when."""

import asyncio
from pathlib import Path

import pytest
from crash.by_hand import A, B, C, crashed, opened, round_of
from engines import done, lines
from sessionstored.rules import Append, Delete


async def test_a_session_deleted_during_a_checkpoint_keeps_its_name(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name was free when it had no catalogue row yet: another key took it, and then it came back."""
    async with opened(fast_path / "data") as engine:
        loop, files = asyncio.get_running_loop(), engine._vault.files
        flush_names = files.flush_names

        def delete_meanwhile() -> None:
            monkeypatch.undo()
            asyncio.run_coroutine_threadsafe(done(engine, Delete("a:b")), loop).result(60)
            flush_names()

        await done(engine, Append("a:b", [A]))
        monkeypatch.setattr(files, "flush_names", delete_meanwhile)
        await round_of(engine)
        await done(engine, Append("a_b", [B]))
        await done(engine, Append("a:b", [C]))
        copy = await crashed(engine, fast_path / "copy")
        await round_of(engine)
        expected = {"a_b": [B], "a:b": [C]}
        assert {key: await lines(engine, key) for key in expected} == expected
    for data in (copy, fast_path / "data"):
        async with opened(data) as engine:
            assert {key: await lines(engine, key) for key in expected} == expected

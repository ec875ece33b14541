"""The revision that an adoption takes is not given out again, however soon the process dies after it."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from crash.by_hand import A, B, C, crashed, opened, revision, round_of
from crash.disks import copy_of
from engines import done, lines
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.journal import Journal
from sessionstored.rules import Append


@pytest.mark.parametrize("known", [False, True], ids=["unknown file", "edited file"])
async def test_a_kill_right_after_an_adoption_gives_no_revision_twice(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, copies = tmp_path / "data", []
    path = data / "sessions" / "k.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(A + b"\n")
    if known:
        async with opened(data) as engine:
            assert await round_of(engine)
        path.write_bytes(A + b"\n" + B + b"\n")
    whole = Journal.put_entries

    def put(journal: Journal, entries: Iterable[Entry], *arguments: int) -> None:
        written = list(entries)
        whole(journal, written, *arguments)
        if written and not copies:
            copies.append(copy_of(data, tmp_path / "killed"))

    monkeypatch.setattr(Journal, "put_entries", put)
    async with opened(data) as engine:
        expected = list(await lines(engine, "k"))
    monkeypatch.undo()
    async with opened(copies[0]) as engine:
        adopted = await revision(engine, "k")
        answer = await done(engine, Append("k", [C]))
        assert answer.revision > adopted
        again = await crashed(engine, tmp_path / "again")
    async with opened(again) as engine:
        assert await lines(engine, "k") == [*expected, C]

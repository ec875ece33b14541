"""A row of the journal that is not what was written is named, and never read as another one, or as none."""

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from crash.by_hand import BY_HAND, A, B, C, crashed, opened, refusal, round_of, says
from crash.disks import journal_of
from crash.workspaces import quarantined
from engines import done, lines, one, read, request
from sessionstored.cli import main
from sessionstored.engine import Query, Refused, Request, StartError
from sessionstored.engine.jsonl import open_jsonl
from sessionstored.engine.jsonl.tables import is_whole, row_crc
from sessionstored.leases import Acquire, Granted
from sessionstored.rules import Append, Create, Delete, Fork, Refusal, Update

CALL = request(Append("k", [B]), 1)
NAMED = request(Append("k", [C]), request_id="delivery-1")


async def stopped(path: Path) -> Path:
    """A directory with two sessions, a client's window and a request_id, all of it checkpointed."""
    async with opened(path) as engine:
        await done(engine, Create("k", [A], b'{"title": "x"}', 1))
        await one(engine, CALL)
        await one(engine, NAMED)
        await done(engine, Append("other", [A]))
        await round_of(engine)
    return path


def change(data: Path, sql: str) -> None:
    """Change rows, and not their checksums."""
    with journal_of(data) as db:
        db.execute(sql)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "column",
    ["metadata = zeroblob(3)", "message_count = 1", "revision = 1", "blocks = zeroblob(8)", "damage = 'x'",
     "mtime_ns = 0", "crc = crc + 1", "last_consolidated = 'text'", "length = 3.5"],
)  # fmt: skip
async def test_a_session_whose_catalogue_row_is_wrong_is_named_and_repaired(
    fast_path: Path, column: str
) -> None:
    data = await stopped(fast_path / "data")
    change(data, f"UPDATE session SET {column} WHERE key = 'k'")
    code, said = run("check", "--data", str(data), "--json")
    assert code == 4
    (found,) = [each for each in map(json.loads, said.splitlines()) if each.get("key") == "k"]
    assert found["verdict"] == "damaged"
    assert "row in the catalogue" in found["detail"]
    async with opened(data) as engine:
        damaged = await refusal(engine, "k")
        assert (damaged.reason, damaged.metadata["key"]) == ("DATA_LOSS", "k")
        assert "row in the catalogue" in damaged.message
        heads = {head.key: head for head in (await engine.list(Query())).heads}
        assert "row in the catalogue" in heads["k"].damage
        assert not heads["other"].damage
        assert await engine.count() == 2
        await says(engine, "other", A)
    assert any(b"'key': b'k'" in aside for aside in quarantined(data))
    code, said = run("repair", "--data", str(data), "--yes")
    assert code == 0, said
    async with opened(data) as engine:
        head = (await read(engine, "k")).head
        assert (head.metadata, head.last_consolidated) == (b'{"title": "x"}', 1)
        await says(engine, "k", A, B, C)


async def test_repair_takes_the_file_of_a_wrong_row_without_a_start_between(fast_path: Path) -> None:
    data = await stopped(fast_path / "data")
    change(data, "UPDATE session SET metadata = zeroblob(3) WHERE key = 'k'")
    assert run("repair", "--data", str(data), "--yes")[0] == 0
    async with opened(data) as engine:
        await says(engine, "k", A, B, C)


async def test_what_waits_for_a_session_whose_row_is_wrong_goes_to_quarantine(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        await done(engine, Append("k", [B]))
        data = await crashed(engine, fast_path / "data")
    change(data, "UPDATE session SET message_count = 7 WHERE key = 'k'")
    code, said = run("check", "--data", str(data), "--json")
    assert code == 4
    assert "row in the catalogue" in said
    async with opened(data) as engine:
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
        assert await engine.count() == 1
    assert any(B in aside for aside in quarantined(data))
    assert run("repair", "--data", str(data), "--yes")[0] == 0
    async with opened(data) as engine:
        assert await lines(engine, "k") == [A, B]  # its file had both


async def test_a_session_that_the_journal_has_whole_needs_no_row(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        await done(engine, Delete("k"))
        await done(engine, Append("k", [B, C]))
        data = await crashed(engine, fast_path / "data")
    change(data, "UPDATE session SET revision = 0 WHERE key = 'k'")
    async with opened(data) as engine:
        assert await engine.count() == 1
        await says(engine, "k", B, C)


async def test_a_row_that_turns_wrong_under_a_daemon_is_named(fast_path: Path) -> None:
    data = await stopped(fast_path / "data")
    async with opened(data, tuning=replace(BY_HAND, scrub_bytes_per_s_max=1 << 40)) as engine:
        engine._scrubber.stop()
        before = engine.scrubbed().damaged
        change(data, "UPDATE session SET message_count = 7 WHERE key = 'k'")
        for read_it in (engine.list(Query()), read(engine, "k")):
            with pytest.raises(Refused) as named:
                await read_it
            assert (named.value.refusal.reason, named.value.refusal.metadata["key"]) == ("DATA_LOSS", "k")
        for mutation in (Append("k", [A]), Fork("fork", "k"), Delete("k"), Update("k", b"{}")):
            reply = await one(engine, request(mutation))
            assert isinstance(reply.outcome, Refusal)
            assert (reply.outcome.reason, reply.outcome.metadata["key"]) == ("DATA_LOSS", "k")
        await says(engine, "other", A)
        with pytest.raises(Refused, match="session 'k'"):
            async for _ in engine.backup():
                pass
        engine._scrubber._stop.clear()
        engine._scrubber.scrub()
        assert engine.scrubbed().damaged == before + 1


@pytest.mark.parametrize(("table", "asked"), [("client", CALL), ("request", NAMED)])
async def test_a_wrong_remembered_answer_is_not_taken_for_none(
    fast_path: Path, table: str, asked: object
) -> None:
    data = await stopped(fast_path / "data")
    column = "answers" if table == "client" else "outcome"
    change(data, f"UPDATE {table} SET {column} = '[]'")
    code, said = run("check", "--data", str(data), "--json")
    assert code == 4
    assert f"in its table {table}" in said
    assert run("repair", "--data", str(data), "--yes")[0] == 4
    async with opened(data) as engine:
        reply = await one(engine, asked)  # type: ignore[arg-type]
        assert isinstance(reply.outcome, Refusal)
        assert (reply.outcome.reason, reply.outcome.metadata["file"]) == ("DATA_LOSS", "journal.db")
        await says(engine, "k", A, B, C)


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("column", ["holder = 'x'", "token = 99", "ttl_s = 'text'", "crc = crc + 1"])
async def test_a_wrong_lease_is_named_and_ends(fast_path: Path, column: str, repaired: bool) -> None:
    data = fast_path / "data"
    async with opened(data) as engine:
        for key in ("k", "other"):
            granted = await one(engine, Request(Acquire(key, "holder", 60.0)))
            assert isinstance(granted.outcome, Granted)
    change(data, f"UPDATE lease SET {column} WHERE key = 'k'")
    code, said = run("check", "--data", str(data))
    assert code == 4
    assert "the lease of session 'k', in its table lease" in said
    if repaired:
        assert run("repair", "--data", str(data), "--yes")[0] == 0
        assert run("check", "--data", str(data))[0] == 0
    async with opened(data) as engine:
        assert [await engine.lease(key) is not None for key in ("k", "other")] == [False, True]
    assert run("check", "--data", str(data))[0] == 0


@pytest.mark.parametrize("name", ["store_id", "revision", "clock_s"])
async def test_a_wrong_value_of_the_store_stops_the_start(fast_path: Path, name: str) -> None:
    data = await stopped(fast_path / "data")
    change(data, f"UPDATE meta SET value = 'x' WHERE name = '{name}'")
    with pytest.raises(StartError, match=rf"value '{name}', in its table meta.*--accept-loss"):
        await open_jsonl(data)
    code, said = run("check", "--data", str(data))
    assert code == 4
    assert f"'{name}'" in said


async def test_a_row_that_nothing_names_stops_the_start(fast_path: Path) -> None:
    data = await stopped(fast_path / "data")
    change(data, "UPDATE session SET key = '', crc = 0 WHERE key = 'k'")
    with pytest.raises(StartError, match=r"row \d+ of its table session.*--accept-loss"):
        await open_jsonl(data)
    assert run("check", "--data", str(data))[0] == 4


@pytest.mark.parametrize("row", [("k", 1), ("", b"", -1, 0.5), ("ключ", b"\0\xff", 2**62)])
def test_a_checksum_covers_every_column_and_its_length(row: Sequence[object]) -> None:
    crc = row_crc(row)
    assert is_whole(row, crc)
    assert not is_whole(row, crc ^ 1)
    assert not is_whole((*row, ""), crc)
    assert not is_whole((None, *row[1:]), crc)
    assert row_crc(("ab", "c")) != row_crc(("a", "bc"))
    with pytest.raises(struct.error):
        row_crc((2**70,))

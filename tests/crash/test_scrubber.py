"""The scrubber finds damage before anybody reads it, names it, and takes no edit or rewrite for damage."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
from crash.by_hand import BY_HAND, A, B, C, opened, quiet, refusal, round_of
from daemons import wait_until
from engines import done, lines, read
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored.engine import Query
from sessionstored.engine.jsonl import JsonlEngine
from sessionstored.engine.jsonl.blocks import BLOCK_BYTES
from sessionstored.rules import Append, Delete, Pop, Replace

FAST = replace(BY_HAND, scrub_bytes_per_s_max=1 << 30, scrub_interval_s=0.01, cache_bytes_max=0)


def rot(path: Path, position: int) -> None:
    """Flip a bit as a failing disk does: nothing tells that the file changed."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


async def passes(engine: JsonlEngine, more: int = 2) -> None:
    """Wait for so many whole passes from now on; the one under way does not count."""
    wanted = engine.scrubbed().passes + more
    await asyncio.to_thread(wait_until, lambda: engine.scrubbed().passes >= wanted, 60, "some passes")


async def test_damage_is_found_without_a_reader_and_stays_named(fast_path: Path) -> None:
    async with opened(fast_path) as engine:
        for key in ("k", "l"):
            await done(engine, Append(key, [A, B]))
    rot(fast_path / "sessions" / "k.jsonl", -5)
    async with opened(fast_path, tuning=FAST) as engine:
        await passes(engine)
        assert engine.scrubbed().damaged == 1
        assert engine.scrubbed().sessions >= 1
        page = await engine.list(Query())
        assert {head.key: bool(head.damage) for head in page.heads} == {"k": True, "l": False}
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
        assert await lines(engine, "l") == [A, B]
        before = engine.scrubbed().damaged
        await passes(engine)
        assert engine.scrubbed().damaged == before, "it is named once"
    async with opened(fast_path) as engine:
        no = await refusal(engine, "k")
        assert (no.reason, no.metadata["file"]) == ("DATA_LOSS", "sessions/k.jsonl")
        assert "checksum" in no.message


@pytest.mark.parametrize("block", [0, 1, 2])
async def test_damage_in_any_block_of_a_long_file_is_found(fast_path: Path, block: int) -> None:
    long = b'{"role": "user", "content": "%s"}' % (b"x" * 30_000)
    async with opened(fast_path) as engine:
        await done(engine, Append("k", [long] * 6))
    rot(fast_path / "sessions" / "k.jsonl", block * BLOCK_BYTES + 10_000)
    async with opened(fast_path, tuning=FAST) as engine:
        await passes(engine)
        assert f"bytes {block * BLOCK_BYTES} to" in (await refusal(engine, "k")).message


async def test_a_cold_read_that_finds_damage_names_it_for_good(fast_path: Path) -> None:
    async with opened(fast_path) as engine:
        await done(engine, Append("k", [A, B]))
    rot(fast_path / "sessions" / "k.jsonl", -5)
    async with opened(fast_path) as engine:
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
        page = await engine.list(Query())
        assert "checksum" in page.heads[0].damage


async def test_changes_while_it_reads_are_no_damage(fast_path: Path) -> None:
    tuning = replace(FAST, checkpoint_interval_s=0.01)
    async with opened(fast_path, tuning=tuning) as engine:
        for n in range(150):
            await done(engine, Append("k", [A, B, C]))
            await done(engine, (Pop("k"), Replace("k", 0, 2, [B]), Append("l", [A]))[n % 3])
            if n % 10 == 9:
                await done(engine, Delete("l"))
        await passes(engine)
        assert engine.scrubbed().damaged == 0
        assert (await read(engine, "k")).head.damage == ""


async def test_an_edit_is_no_damage(fast_path: Path) -> None:
    async with opened(fast_path) as engine:
        await done(engine, Append("k", [A, B]))
    async with opened(fast_path, tuning=FAST) as engine:
        await passes(engine)
        path = fast_path / "sessions" / "k.jsonl"
        path.write_bytes(path.read_bytes().replace(A, C))
        await passes(engine)
        assert engine.scrubbed().damaged == 0
        assert await lines(engine, "k") == [C, B]


async def test_a_damaged_block_before_what_waits_for_its_file_is_found(fast_path: Path) -> None:
    async with opened(fast_path, tuning=FAST) as engine:
        await done(engine, Append("k", [A, B]))
        await round_of(engine)
        await done(engine, Append("k", [C]))
        await quiet(engine)
        rot(fast_path / "sessions" / "k.jsonl", 20)
        await passes(engine)
        assert engine.scrubbed().damaged == 1
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
    assert C + b"\n" in [path.read_bytes() for path in (fast_path / "quarantine").iterdir()]


async def test_it_can_be_switched_off(fast_path: Path) -> None:
    async with opened(fast_path) as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        assert engine.scrubbed().passes == 0


def test_the_daemon_tells_what_it_verified(make_daemon) -> None:
    flags = ("--checkpoint-s-max", "0.1", "--scrub-interval-s-min", "1")
    daemon = make_daemon(store="jsonl", flags=flags).start()
    daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=A + b"\n"))

    def verified() -> bool:
        scrub = daemon.stub.GetServerInfo(v1.GetServerInfoRequest()).scrub
        return scrub.sessions_verified > 0 and scrub.passes > 0 and scrub.HasField("last_pass_time")

    wait_until(verified, 60, "a pass over the session")


def test_an_engine_without_checksums_says_so(daemon) -> None:
    assert not daemon.stub.GetServerInfo(v1.GetServerInfoRequest()).HasField("scrub")

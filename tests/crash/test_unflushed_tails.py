"""What a power cut leaves of what was appended and not flushed: zeros, pieces, or nothing."""

from pathlib import Path

from crash.by_hand import A, B, C, crashed, opened, quiet, round_of, says
from crash.disks import WatchedDisk
from crash.workspaces import quarantined
from engines import done, lines, read
from sessionstored.rules import Append, Delete

LONG = b'{"role": "user", "content": "%s"}' % (b"long " * 400)


async def test_zeros_where_a_power_cut_left_holes_are_nobodys(fast_path: Path) -> None:
    """The journal has what was there; nothing is damaged, and nothing goes to quarantine."""
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        for line in (LONG, B, LONG, C):
            await done(engine, Append("k", [line]))
        await quiet(engine)
        data = await crashed(engine, fast_path / "data")
    file = data / "sessions" / "k.jsonl"
    content = bytearray(file.read_bytes())
    for begin in (512, 1024, 2048, 3584):
        content[begin : begin + 512] = bytes(512)
    file.write_bytes(content)
    async with opened(data) as engine:
        assert await lines(engine, "k") == [A, LONG, B, LONG, C]
        assert (await read(engine, "k")).head.damage == ""
    assert quarantined(data) == []


async def test_what_somebody_wrote_beside_holes_is_set_aside(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        await done(engine, Append("k", [LONG]))
        data = await crashed(engine, fast_path / "data")
    file = data / "sessions" / "k.jsonl"
    content = bytearray(file.read_bytes())
    content[512:1024] = bytes(512)
    content[600:605] = b"other"
    file.write_bytes(content)
    async with opened(data) as engine:
        assert "quarantine/" in (await read(engine, "k")).head.damage
    assert b"other" in b"".join(quarantined(data))


async def test_a_deleted_session_of_which_a_power_cut_left_holes_stays_deleted(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("other", [B]))
        await round_of(engine)
        await done(engine, Append("k", [LONG, LONG]))
        await quiet(engine)
        content = bytearray((fast_path / "first" / "sessions" / "k.jsonl").read_bytes())
        await done(engine, Delete("k"))
        data = await crashed(engine, fast_path / "data")
    content[512:1024] = bytes(512)
    (data / "sessions" / "k.jsonl").write_bytes(content)
    async with opened(data) as engine:
        await says(engine, "k")
    assert quarantined(data) == []


async def test_a_cut_is_durable_before_anything_is_written_in_its_place(fast_path: Path) -> None:
    """Or a power cut could leave sectors of what was there among those of what is there now."""
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        await done(engine, Append("k", [B]))
        data = await crashed(engine, fast_path / "data")
    disk = WatchedDisk()
    async with opened(data, disk=disk):
        cut = disk.kinds.index("truncate")
        assert disk.kinds[cut + 1 :].index("flush") < disk.kinds[cut + 1 :].index("write")

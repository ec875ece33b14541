"""What a full disk does to the journal's own files: it refuses and heals, whatever part finds no room."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from crash import small_disks
from crash.by_hand import BY_HAND, A, B, C, crashed, opened, round_of, says
from crash.test_full_disk import outcome_of
from engines import done, lines
from sessionstored.engine import StartError
from sessionstored.engine.jsonl import open_jsonl
from sessionstored.rules import Answer, Append, Refusal

WITHOUT_RESERVE = replace(BY_HAND, reserve_bytes=0)
# SQLite's index of its log covers so many frames at first; then it has to grow.
FRAMES = 4062
FRAME_BYTES = 4096 + 24


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    why_not = small_disks.cannot_mount()
    if why_not:
        pytest.skip(why_not)
    with small_disks.tmpfs(tmp_path / "disk", 48_000) as disk:
        yield disk


async def test_a_log_whose_index_must_grow_on_a_full_disk_does_not_stop_the_daemon(small_disk: Path):
    """Growing it within a commit failed when the commit was in the log already: the daemon had to end."""
    data, log = small_disk / "data", small_disk / "data" / "journal.db-wal"
    sent: list[bytes] = []
    acknowledged: list[bytes] = []
    async with opened(data, tuning=WITHOUT_RESERVE) as engine:

        async def append(size: int) -> None:
            sent.append(b'{"n": %d, "pad": "%s"}' % (len(sent), b"x" * size))
            outcome = await outcome_of(engine, Append("k", [sent[-1]]))
            if isinstance(outcome, Answer):
                acknowledged.append(sent[-1])
            else:
                assert outcome.reason == "STORAGE_FULL", outcome

        while log.stat().st_size < (FRAMES - 30) * FRAME_BYTES:
            await append(40_000)
        assert acknowledged == sent
        small_disks.fill(small_disk / "ballast", 220)
        for _ in range(4):
            await append(190_000)
        assert acknowledged != sent
        assert await lines(engine, "k") == acknowledged
        (small_disk / "ballast").unlink()
        await append(190_000)
        assert acknowledged[-1] == sent[-1]
        assert await lines(engine, "k") == acknowledged
    async with opened(data) as engine:
        assert await lines(engine, "k") == acknowledged


async def test_the_index_of_the_log_is_kept_ahead_and_no_room_for_it_refuses(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
):
    allocate = os.posix_fallocate

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with opened(fast_path / "data", tuning=WITHOUT_RESERVE) as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        index = fast_path / "data" / "journal.db-shm"
        before = index.stat().st_size
        large = b'{"pad": "%s"}' % (b"x" * 5_000_000)
        monkeypatch.setattr(os, "posix_fallocate", full)
        refused = 0
        for _ in range(6):
            refused += isinstance(await outcome_of(engine, Append("large", [large])), Refusal)
        assert refused
        no = await outcome_of(engine, Append("k", [B]))
        assert isinstance(no, Refusal)
        assert no.reason == "STORAGE_FULL"
        assert await lines(engine, "k") == [A]
        monkeypatch.setattr(os, "posix_fallocate", allocate)
        await done(engine, Append("k", [C]))
        assert index.stat().st_size > before
        copy = await crashed(engine, fast_path / "copy")
    async with opened(copy) as engine:
        await says(engine, "k", A, C)


async def test_a_full_disk_at_the_start_is_named(small_disk: Path):
    """Also when it is the index of the log that finds no room."""
    data = small_disk / "data"
    async with opened(data) as engine:
        await done(engine, Append("k", [A]))
    for left_over in ("-shm", "-wal"):
        (data / f"journal.db{left_over}").unlink()
    small_disks.fill(small_disk / "ballast", 0)
    with pytest.raises(StartError, match="is full: make room, then start again"):
        await open_jsonl(data, tuning=BY_HAND)
    (small_disk / "ballast").unlink()
    async with opened(data) as engine:
        await says(engine, "k", A)


async def test_a_short_write_of_store_is_completed(fast_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[: max(1, len(data) // 2)]))
    async with opened(fast_path) as engine:
        await done(engine, Append("k", [A]))
    monkeypatch.undo()
    assert json.loads((fast_path / "STORE").read_bytes())["clean"] is True
    async with opened(fast_path) as engine:
        await says(engine, "k", A)

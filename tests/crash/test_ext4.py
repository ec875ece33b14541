"""The device whose power is cut and that can be made to fail: what a flush on it says is true."""

import os
from pathlib import Path

import pytest
from crash.ext4 import Ext4, unavailable
from sessionstored.engine.jsonl.disk import Disk

BLOCK_BYTES = 4096
BLOCKS = 20
"""Of a file; so many that ext4 puts new ones right behind them."""
NEW_BLOCKS = 8


def grown(path: Path, blocks: int) -> bool:
    """Append, and flush; returns what the flush says."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, b"x" * blocks * BLOCK_BYTES)
        os.fsync(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def test_what_a_failing_device_says_is_flushed_is_there_after_a_power_cut(tmp_path: Path) -> None:
    """Wherever it begins to fail: a loop device calls a write done of which only the first blocks fit."""
    if unavailable():
        pytest.skip(unavailable())
    with Ext4(tmp_path) as disk:
        paths = [disk.path / f"{room}" for room in range(NEW_BLOCKS + 1)]
        for path in paths:
            assert grown(path, BLOCKS)
        disk.settle()
        said = []
        for room, path in enumerate(paths):
            disk.break_device(room * BLOCK_BYTES)
            said.append(grown(path, NEW_BLOCKS))
            disk.mend_device()
        disk.cut()
        disk.unmount()
        disk.mount()
        found = [path.read_bytes() for path in paths]
        whole = [data == b"x" * (BLOCKS + NEW_BLOCKS) * BLOCK_BYTES for data in found]
        assert [room for room in range(NEW_BLOCKS + 1) if said[room] and not whole[room]] == []
        assert said == [False] * NEW_BLOCKS + [True]
        assert all(data[: BLOCKS * BLOCK_BYTES] == b"x" * BLOCKS * BLOCK_BYTES for data in found)


def test_what_a_failed_flush_gave_up_is_there_when_it_was_written_again(tmp_path: Path) -> None:
    """Written in its place it is not, though the flush succeeds: ext4 takes the blocks for empty."""
    if unavailable():
        pytest.skip(unavailable())
    with Ext4(tmp_path) as disk:
        again, in_place = disk.path / "again", disk.path / "in place"
        for path in (again, in_place):
            assert grown(path, BLOCKS)
        disk.settle()
        disk.break_device()
        assert not any(grown(path, NEW_BLOCKS) for path in (again, in_place))
        disk.mend_device()
        expected = b"x" * (BLOCKS + NEW_BLOCKS) * BLOCK_BYTES
        assert [path.read_bytes() == expected for path in (again, in_place)] == [True, True], "page cache"
        Disk().write_again(again)
        with in_place.open("r+b") as file:
            file.write(expected)
        Disk().reread(in_place)
        print("written in its place, it is there:", in_place.read_bytes() == expected)
        disk.cut()
        disk.unmount()
        disk.mount()
        assert again.read_bytes() == expected

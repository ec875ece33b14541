"""That the rung of every byte can fail, and single cases that it found."""

import os
import random
from pathlib import Path

from crash import every_byte
from crash.by_hand import A, B, opened
from engines import done, lines, read
from sessionstored.rules import Append, Update


def test_without_block_checksums_a_flipped_bit_is_served(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    tally = every_byte.run_unchecked(tmp_path, seed, 40)
    print(tally)
    assert tally.wrong > 0


async def test_a_file_that_lost_its_last_header_is_marked(fast_path: Path) -> None:
    """No message is missing; nobody edited it, or its time would be another."""
    async with opened(fast_path) as engine:
        await done(engine, Append("k", [A, B]))
    async with opened(fast_path) as engine:
        await done(engine, Update("k", b'{"title": "x"}'))
    path = fast_path / "sessions" / "k.jsonl"
    stat = path.stat()
    os.truncate(path, path.read_bytes().rindex(b'{"_type"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    async with opened(fast_path) as engine:
        assert await lines(engine, "k") == [A, B]
        assert "was not edited" in (await read(engine, "k")).head.damage

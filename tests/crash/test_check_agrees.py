"""What a check says, a daemon then does; and what a repair leaves, a daemon serves: over random damage."""

import asyncio
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from crash.by_hand import crashed, opened, round_of
from crash.directories import check
from crash.disks import copy_of
from crash.test_repair import mend
from crash.workspaces import quarantined
from engines import done, read
from seed_reader import read_session
from sessionstored.engine import Refused
from sessionstored.engine.jsonl.findings import REPAIRABLE, Verdict
from sessionstored.rules import Append, Update

LINES = [b'{"role": "user", "n": %d, "text": "%s"}' % (n, b"x" * (37 * n % 1500)) for n in range(150)]
SERVED = (Verdict.OK, Verdict.WAITING, Verdict.EDITED, Verdict.NEW)


async def a_directory(root: Path, killed: bool) -> Path:
    """K has some blocks; after kill -9, an append, a pop and a header wait for it."""
    async with opened(root / "first") as engine:
        await done(engine, Append("k", LINES))
        await done(engine, Update("k", metadata=b'{"title": "t"}', last_consolidated=70))
        await round_of(engine)
        if not killed:
            await round_of(engine)
        else:
            await done(engine, Append("k", LINES[:2]))
            await done(engine, Update("k", last_consolidated=71))
        copy = await crashed(engine, root / "data")
        return copy if killed else root / "first"


def damage(path: Path, rng: random.Random) -> str:
    """Do one thing to a file."""
    content = bytearray(path.read_bytes())
    stat = path.stat()
    at = rng.randrange(len(content))
    kind = rng.choice(
        ["flip", "flip", "rot", "rot", "rot", "cut", "append", "append torn", "zero", "swap", "touch"]
    )
    match kind:
        case "flip" | "rot":
            content[at] ^= 1 << rng.randrange(8)
        case "cut":
            del content[at:]
        case "append":
            content += LINES[rng.randrange(150)] + b"\n"
        case "append torn":
            content += LINES[rng.randrange(150)][:20]
        case "zero":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        case "swap":
            lines = bytes(content).splitlines(keepends=True)
            first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[first], lines[second] = lines[second], lines[first]
            content = bytearray(b"".join(lines))
    if kind == "swap":
        path.unlink()
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(content)
        file.truncate()
    if kind == "rot":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    return f"{kind} at {at}"


async def outcome(data: Path) -> tuple[str, list[bytes]]:
    """What a daemon makes of k."""
    async with opened(data) as engine:
        try:
            found = await read(engine, "k")
        except Refused as refused:
            return refused.refusal.reason, []
        return ("marked" if found.head.damage else "served"), list(found.lines)


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_a_check_says_what_a_daemon_does(fast_path: Path, killed: bool) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    whole = await a_directory(fast_path, killed)
    counts: Counter[tuple[str, str]] = Counter()
    for n in range(60):
        data, other = copy_of(whole, fast_path / f"{n}"), copy_of(whole, fast_path / f"{n} served")
        what = damage(data / "sessions" / "k.jsonl", random.Random(seed + n))
        damage(other / "sessions" / "k.jsonl", random.Random(seed + n))
        try:
            verdict = await agree(data, other, counts)
            assert verdict is Verdict.DAMAGED or not what.startswith("rot")
        except BaseException as error:
            error.add_note(f"{n}: {what}")
            raise
        shutil.rmtree(data)
        shutil.rmtree(other)
    print(dict(counts))
    assert {done for _, done in counts} == {"served", "marked", "DATA_LOSS"}


async def agree(data: Path, other: Path, counts: Counter[tuple[str, str]]) -> Verdict:
    """A check's verdict against a daemon on a copy with the same damage, and then against a repair."""
    path = data / "sessions" / "k.jsonl"
    left = path.read_bytes()
    ((finding,), summary) = check(data)
    did, _ = await outcome(other)
    counts[finding.verdict.value, did] += 1
    if finding.verdict in SERVED:
        assert did == "served", finding
    else:
        assert did in ("marked", "DATA_LOSS"), finding
    assert summary.well == (did == "served")
    if did != "served":
        (report,) = await asyncio.to_thread(lambda: mend(data, [finding]))
        assert finding.remedy in REPAIRABLE, finding
        assert report.mended, report
        did, lines = await outcome(data)
        assert did == "marked", report
        now = path.read_bytes()
        assert any(
            left in (now, aside) or left_behind(left, now, aside) for aside in quarantined(data) or [b""]
        )
        session = read_session(path)
        assert session is not None
        assert len(session.messages) == len(lines)
        await asyncio.to_thread(lambda: mend(data))
        assert (await outcome(data)) == ("served", lines)
    return finding.verdict


def left_behind(left: bytes, now: bytes, aside: bytes) -> bool:
    """Whether what was there is the beginning of what is there now, and what was set aside."""
    return bool(aside) and left.endswith(aside) and now.startswith(left.removesuffix(aside))

"""Makes a golden directory: what this format version writes, kept for every later version to read.

python tests/golden.py DIRECTORY

Run once per format version; what it made is committed under tests/fixtures/golden/vN and never made again.
`clean` is a store that was stopped; `killed` one whose last changes are in the journal only. EXPECTED.json
tells what each holds.
"""

import asyncio
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from engines import done, one, read, request
from sessionstored.engine import Engine, Query, Request
from sessionstored.engine.jsonl import DEFAULT_TUNING, JsonlEngine, open_jsonl
from sessionstored.engine.jsonl.store import FORMAT
from sessionstored.leases import Acquire
from sessionstored.retention import NEVER_US
from sessionstored.rules import Append, Create, Delete, Fork, Pop, Replace, Update

YEAR_2100_US = 4_102_444_800_000_000
FIXTURES = Path(__file__).parent / "fixtures" / "golden"
KEPT_CALL = request(Append("telegram:42", [b'{"role": "user", "content": "kept"}']), 7, answered_through=6)
KEPT_REQUEST = request(Append("email:ana", [b'{"role": "user", "content": "once"}']), request_id="delivery-1")
_TUNING = replace(DEFAULT_TUNING, checkpoint_interval_s=3600, scrub_bytes_per_s_max=0)
_ADOPTED = {
    "cli_direct.jsonl": b'{"_type": "metadata", "key": "cli:direct", "created_at": "2024-05-01T10:00:00", '
    b'"updated_at": "2024-05-01T11:00:00", "metadata": {"by": "hand"}, "last_consolidated": 1}\n'
    b'{"role": "user", "content": "a"}\n{"role": "assistant", "content": "b"}\n',
    "torn.jsonl": b'{"role": "user", "content": "whole"}\n{"role": "us',
}


def user(text: str) -> bytes:
    """A message line."""
    return json.dumps({"role": "user", "content": text, "n": 2**53 + 1}, ensure_ascii=False).encode()


async def first_changes(engine: Engine) -> None:
    """What the session files and the catalogue have at the end."""
    await done(engine, Create("telegram:42", [user("hi"), user("ключ ✓ 🦊")], b'{"name": "Ana"}', 1))
    await done(engine, Append("email:ana", [user(str(n)) for n in range(5)]))
    await done(engine, Pop("email:ana"))
    await done(engine, Append("a/b", [user("x" * 70_000), user("second block")]))
    await done(engine, Fork("a:b", "a/b", 1))
    await done(engine, Create("in:2100", [user("ends by itself")], expire_time_us=YEAR_2100_US))
    await done(engine, Append("gone", [user("deleted later")]))
    await one(engine, KEPT_CALL)
    await one(engine, KEPT_REQUEST)
    await one(engine, Request(Acquire("leased", "golden", 60.0)))


async def last_changes(engine: Engine) -> None:
    """What the killed store has in its journal only."""
    await done(engine, Append("telegram:42", [user("late"), user("later")]))
    await done(engine, Replace("email:ana", 1, 2, [user("replaced")]))
    await done(engine, Update("a/b", members={"tag": b'"late"'}))
    await done(engine, Update("a:b", expire_time_us=YEAR_2100_US))
    await done(engine, Update("in:2100", expire_time_us=NEVER_US))
    await done(engine, Delete("gone"))
    await done(engine, Append("new", [user("born late")]))
    await one(engine, Request(Acquire("leased late", "golden", 3600.0, appends_allowed=True)))


async def make(root: Path) -> None:
    """Make both stores, and what is expected of them."""
    work = root / "work"
    (work / "sessions").mkdir(parents=True)
    for name, content in _ADOPTED.items():
        (work / "sessions" / name).write_bytes(content)
    engine = await open_jsonl(work, tuning=_TUNING)
    await first_changes(engine)
    await engine.close()
    shutil.copytree(work, root / "clean", ignore=shutil.ignore_patterns("LOCK", "*-wal", "*-shm"))
    engine = await open_jsonl(work, tuning=_TUNING)
    await last_changes(engine)
    await asyncio.wrap_future(engine._committer.run(lambda: None))
    shutil.copytree(work, root / "killed", ignore=shutil.ignore_patterns("LOCK", "*-shm"))
    await engine.close()
    for name in ("clean", "killed"):
        copy = root / f"{name}-copy"
        shutil.copytree(root / name, copy)
        engine = await open_golden(copy)
        (root / name / "EXPECTED.json").write_text(json.dumps(await contents(engine), indent=1) + "\n")
        await engine.close()
        shutil.rmtree(copy)
    shutil.rmtree(work)


async def open_golden(copy: Path) -> JsonlEngine:
    """Open a copy of a golden directory, its catalogue told of the files that the copy made."""
    from crash.disks import know_files_by_name

    know_files_by_name(copy)
    return await open_jsonl(copy, tuning=_TUNING)


async def contents(engine: Engine) -> dict[str, object]:
    """Everything that a store says of its sessions; revisions and times included, messages as text."""
    page = await engine.list(Query(page_size=1000))
    said: dict[str, object] = {}
    for head in page.heads:
        found = await read(engine, head.key)
        said[head.key] = {
            "revision": head.revision,
            "last_consolidated": head.last_consolidated,
            "metadata": head.metadata.decode(),
            "create_time_us": head.create_time_us,
            "expire_time_us": head.expire_time_us,
            "damage": head.damage,
            "messages": [line.decode() for line in found.lines],
        }
    return said


async def leases(engine: Engine) -> dict[str, tuple[str, str, float]]:
    """The leases that a store has, renewed by its start."""
    kept = [await engine.lease(key) for key in ("leased", "leased late")]
    return {each.key: (each.holder, each.mode, each.ttl_s) for each in kept if each is not None}


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1]) / f"v{FORMAT}"))

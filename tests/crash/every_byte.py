"""The rung of every byte: a session of 20 messages, each byte of its files cut off, and each flipped.

Two stores are made once: one that was stopped cleanly, and one that was killed with commits in its log. For
every position of the session file, journal.db, its log and STORE the store is damaged there, with the file's
times as they were, opened, and read. The start may be refused by name, the session may answer DATA_LOSS by
name, be served whole, or be served with its `damage` named. A shorter, empty or different session without a
word is a loss.

Damage in the last commit of a log looks like the torn write of a commit that nobody was answered (`wal.py`).
Here the messages of that commit are in the session file, so they are set aside, and the session is marked.

The store is opened without its threads, because it is opened a hundred thousand times; of each kind of damage
some are tried on a whole engine, and after its stop the seed's loader has to read what it served.
"""

import asyncio
import json
import os
import random
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from crash.by_hand import BY_HAND, opened, quiet, round_of
from crash.disks import QuickDisk
from crash.memory import in_memory
from crash.parallel import shared_out
from crash.tally import Tally
from engines import done, read
from seed_reader import read_session
from sessionstored.engine import Query, Refused, StartError
from sessionstored.engine.jsonl import open_jsonl, pages
from sessionstored.engine.jsonl.blocks import Blocks
from sessionstored.engine.jsonl.files import FileChanged
from sessionstored.engine.jsonl.listing import page
from sessionstored.engine.jsonl.opening import open_vault
from sessionstored.engine.jsonl.store import Directory
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import DEFAULT_LIMITS, Append, Update

KEY = "k"
FILE, JOURNAL, LOG, STORE = "sessions/k.jsonl", "journal.db", "journal.db-wal", "STORE"
BATCHES = [[b'{"role": "user", "content": "message %d"}' % (4 * n + i) for i in range(4)] for n in range(5)]
MESSAGES = [message for batch in BATCHES for message in batch]
METADATA = b'{"title": "twenty"}'


async def make_clean(path: Path) -> Path:
    """The session in a store that was stopped cleanly; the last line of its file is a header."""
    async with opened(path, durability="fsync") as engine:
        await done(engine, Append("other", [MESSAGES[0]]))
        for batch in BATCHES:
            await done(engine, Append(KEY, batch))
        await round_of(engine)
        await done(engine, Update(KEY, METADATA))
    return path


async def make_killed(path: Path) -> Path:
    """The session in a store that was killed: 8 messages at the last checkpoint, and four commits since."""
    async with opened(path, durability="fsync") as engine:
        await done(engine, Append("other", [MESSAGES[0]]))
        for batch in BATCHES[:2]:
            await done(engine, Append(KEY, batch))
        await round_of(engine)
        assert engine._committer.run(engine._vault.journal.wal_checkpoint).result()  # the log begins anew
        for batch in BATCHES[2:4]:
            await done(engine, Append(KEY, batch))
        await done(engine, Update(KEY, METADATA))
        await done(engine, Append(KEY, BATCHES[4]))
        await quiet(engine)
        engine._committer.fail("killed")  # it lets go of everything as it is
    return path


MAKERS = {"clean": make_clean, "killed": make_killed}
EVERY_FILE = {
    "clean": (FILE, JOURNAL, STORE),
    "killed": (FILE, JOURNAL, LOG, STORE),
}
CUT_FILES = (FILE, LOG, STORE)
"""A database that was cut is as much of a loss as one that is gone: its pages are counted in its header."""


@dataclass(frozen=True)
class Damage:
    """One damage to one store."""

    store: str
    file: str
    position: int
    bit: int
    """0: the file is cut there."""

    @property
    def kind(self) -> str:
        return f"{self.store}, {self.file} {'flipped' if self.bit else 'cut'}"


@dataclass(frozen=True)
class _Whole:
    """A file as it was; `fd` is it, under whatever name, so that it keeps its inode."""

    fd: int
    link: str
    content: bytes
    stat: os.stat_result


class Store:
    """A directory that is damaged and made whole again, with the inodes and times that its catalogue has."""

    def __init__(self, data: Path) -> None:
        self.data = data
        attic = data.with_name(f"{data.name}.attic")
        attic.mkdir()
        self._whole: dict[str, _Whole] = {}
        self._damaged = ""
        for path in data.rglob("*"):
            name = str(path.relative_to(data))
            if path.is_file() and path.name != "LOCK" and not name.endswith("-shm"):
                link = attic / name.replace("/", "_")
                os.link(path, link)
                fd = os.open(link, os.O_RDWR)
                self._whole[name] = _Whole(fd, str(link), path.read_bytes(), path.stat())

    def size(self, name: str) -> int:
        return len(self._whole[name].content)

    def restore(self) -> None:
        """Make everything as it was. What was written to since has another time now."""
        for folder in ("", "sessions/", "quarantine/"):
            for name in os.listdir(f"{self.data}/{folder}"):
                if folder + name not in {*self._whole, "LOCK", "sessions", "quarantine"}:
                    os.unlink(f"{self.data}/{folder}{name}")
        for name, whole in self._whole.items():
            now, path = os.fstat(whole.fd), f"{self.data}/{name}"
            same = (now.st_size, now.st_mtime_ns) == (whole.stat.st_size, whole.stat.st_mtime_ns)
            if not same or name == self._damaged:
                os.ftruncate(whole.fd, 0)
                os.pwrite(whole.fd, whole.content, 0)
                self._reset_time(whole)
            if not os.path.exists(path) or os.stat(path).st_ino != now.st_ino:
                Path(path).unlink(missing_ok=True)
                os.link(whole.link, path)
        self._damaged = ""

    def damage(self, damage: Damage) -> None:
        """Cut or flip, silently: the file's times stay."""
        whole = self._whole[damage.file]
        if damage.bit:
            os.pwrite(whole.fd, bytes([whole.content[damage.position] ^ damage.bit]), damage.position)
        else:
            os.ftruncate(whole.fd, damage.position)
        self._reset_time(whole)
        self._damaged = damage.file

    def zero(self, name: str, begin: int, end: int) -> None:
        """Set a range of a file to zeros, silently."""
        whole = self._whole[name]
        os.pwrite(whole.fd, bytes(end - begin), begin)
        self._reset_time(whole)
        self._damaged = name

    def _reset_time(self, whole: _Whole) -> None:
        os.utime(whole.fd, ns=(whole.stat.st_atime_ns, whole.stat.st_mtime_ns))

    def close(self) -> None:
        for whole in self._whole.values():
            os.close(whole.fd)


@dataclass
class Served:
    """What came of opening and reading."""

    refused: str = ""
    """In words: why it was not started, or not served."""
    messages: Sequence[bytes] = ()
    metadata: bytes = b""
    damage: str = ""
    listed: bool = False


def served_by_vault(data: Path) -> Served:
    """Open a store without its threads, and read the session as the engine does."""
    try:
        directory = Directory(data, QuickDisk())
        try:
            vault = open_vault(
                directory,
                durability="os",
                limits=DEFAULT_LIMITS,
                cache_bytes_max=1 << 20,
                hot_sessions_max=100,
                accept_loss=False,
                disk=QuickDisk(),
                vfs=None,
            )
            try:
                return _read(vault)
            finally:
                vault.close()
        finally:
            directory.close()
    except StartError as error:
        return Served(f"the start: {error}")
    except Refused as refused:
        return Served(f"{refused.refusal.reason}: {refused.refusal.message}")
    except pages.DAMAGED as error:  # the engine answers DATA_LOSS, or stops
        return Served(f"journal.db: {pages.describe(error)}")


def _read(vault: Vault) -> Served:
    try:
        state = vault.load(KEY)
    except FileChanged:
        vault.readopt(KEY)
        state = vault.load(KEY)
    if state is None or state.head is None:
        return Served()
    if state.refusal is not None:
        raise Refused(state.refusal)
    messages = vault.lines(state, 0, state.head.message_count)
    listed = KEY in [head.key for head in page(vault, Query()).heads]
    return Served("", messages, state.head.metadata, state.head.damage, listed)


async def served_by_engine(data: Path) -> Served:
    """Open, read and stop a whole engine; what is not damaged must then be readable by the seed's loader."""
    try:
        engine = await open_jsonl(data, tuning=BY_HAND, disk=QuickDisk(), durability="os")
    except StartError as error:
        return Served(f"the start: {error}")
    try:
        found = await read(engine, KEY)
        listed = KEY in [head.key for head in (await engine.list(Query())).heads]
        served = Served("", found.lines, found.head.metadata, found.head.damage, listed)
    except Refused as refused:
        served = Served(f"{refused.refusal.reason}: {refused.refusal.message}")
    finally:
        await engine.close()
    if not served.refused and not served.damage and served.messages:
        loaded = read_session(data / FILE)
        if loaded is None or loaded.messages != [json.loads(line) for line in served.messages]:
            raise AssertionError(f"the seed's loader reads {loaded} where the engine served {served}")
    return served


def verdict(damage: Damage, served: Served, data: Path) -> str:
    """What came of it, in a few words; begins with "wrong" if it is a loss."""
    if served.refused:
        what, _, _ = served.refused.partition(":")
        named = damage.file in served.refused or "journal.db" in served.refused
        return f"refused by name: {what}" if named else f"wrong: refused without a name: {served.refused}"
    missing = [message for message in MESSAGES if message not in served.messages]
    if list(served.messages) != [message for message in MESSAGES if message not in missing]:
        return f"wrong: other messages: {served}"
    whole = not missing and served.metadata == METADATA and served.listed
    if not served.damage:
        return "whole" if whole else f"wrong: without a word: {served}"
    aside = b"".join(path.read_bytes() for path in (data / "quarantine").iterdir())
    cut_off = MESSAGES[len(served.messages) :] if damage.file == FILE and not damage.bit else []
    if not all(message in aside or message in cut_off for message in missing):
        return f"wrong: missing, and not in quarantine: {served}"
    return "shorter, with its damage named" if missing else "whole, with a damage named"


def damages(stores: dict[str, Store], rng: random.Random) -> dict[str, list[Damage]]:
    """Every damage of every kind: each byte cut; each byte flipped, of the session file in two bits."""
    found: dict[str, list[Damage]] = defaultdict(list)
    for name, store in stores.items():
        for file in EVERY_FILE[name]:
            for position in range(store.size(file)):
                bits = rng.sample(range(8), 2 if file == FILE else 1)
                for bit in [*(1 << bit for bit in bits), *([0] if file in CUT_FILES else [])]:
                    damage = Damage(name, file, position, bit)
                    found[damage.kind].append(damage)
    return found


def run(root: Path, seed: int, times: int) -> Tally:
    """Damage so many bytes, of every kind equally many; with enough times, every byte."""
    return shared_out(damage_often, root, seed, times)


def run_unchecked(root: Path, seed: int, times: int) -> Tally:
    """Flip bytes of the session file with its blocks' checksums off: this serves what was not written.

    Only that counts here: not what an error kept from being served.
    """
    with patch.object(Blocks, "check", lambda *_: True):
        return damage_often(root, seed, times, only=f"clean, {FILE} flipped", served_only=True)


def damage_often(
    root: Path,
    seed: int,
    times: int,
    part: int = 0,
    parts: int = 1,
    *,
    only: str = "",
    served_only: bool = False,
) -> Tally:
    """One process's share of all damages, or of one kind."""
    tally = Tally()
    rng = random.Random(seed)
    with in_memory(root) as memory:
        stores = {name: Store(asyncio.run(make(memory / name))) for name, make in MAKERS.items()}
        kinds = [every for kind, every in damages(stores, rng).items() if only in kind]
        for every in kinds:
            chosen = rng.sample(every, min(len(every), times // len(kinds)))
            engines = max(len(chosen) // 400, 2)
            for n, damage in enumerate(chosen):
                if n % parts == part:
                    _one(stores[damage.store], damage, n < engines, tally, served_only)
        for store in stores.values():
            store.close()
    return tally


def _one(store: Store, damage: Damage, whole_engine: bool, tally: Tally, served_only: bool) -> None:
    store.restore()
    store.damage(damage)
    try:
        served = (
            asyncio.run(served_by_engine(store.data)) if whole_engine else served_by_vault(store.data)
        )
        came = verdict(damage, served, store.data)
        if served_only and came.startswith("wrong") and set(served.messages) <= set(MESSAGES):
            came = f"nothing served that was not written: {came.partition(': ')[2][:40]}"
    except Exception:
        came = "an error" if served_only else f"wrong: {traceback.format_exc()}"
    tally.times += 1
    tally.acknowledged += len(MESSAGES)
    if came.startswith("wrong"):
        tally.lose("wrong", f"{damage}: {came}")
        came = "wrong"
    tally.phases[f"{damage.kind}: {came}"] += 1

"""Who may open a data directory: other owners, newer formats, a lost or foreign journal are refused."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from zlib import crc32

import pytest
from crash.by_hand import BY_HAND, quiet
from crash.disks import FullDisk
from engines import done, lines
from sessionstored.engine import StartError
from sessionstored.engine.jsonl import JsonlEngine, open_jsonl
from sessionstored.engine.jsonl.checking import Check
from sessionstored.engine.jsonl.disk import Disk
from sessionstored.engine.jsonl.store import Directory, new_store
from sessionstored.rules import Append

A, B = b'{"role": "user", "content": "a"}', b'{"role": "user", "content": "b"}'


def store(data: Path) -> dict[str, object]:
    return json.loads((data / "STORE").read_text())


def remove_journal(data: Path) -> None:
    for name in ("journal.db", "journal.db-wal", "journal.db-shm"):
        (data / name).unlink(missing_ok=True)


async def abandoned_copy(engine: JsonlEngine, data: Path, copy: Path) -> Path:
    """The directory as kill -9 would leave it now, with what was acknowledged in its files."""
    await quiet(engine)
    shutil.copytree(data, copy)
    await engine.close()
    return copy


async def test_a_second_owner_is_refused_by_the_first_ones_process_and_addresses(tmp_path: Path):
    engine = await open_jsonl(tmp_path)
    engine.announce(["127.0.0.1:7400", "unix:/run/x"])
    with pytest.raises(StartError, match=f"process {os.getpid()}, 127.0.0.1:7400, unix:/run/x") as refused:
        await open_jsonl(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "--data" in str(refused.value)
    await engine.close()
    await (await open_jsonl(tmp_path)).close()


async def test_a_store_whose_sessions_are_gone_as_a_whole_is_refused_and_nothing_is_taken_for_removed(
    tmp_path: Path,
):
    engine = await open_jsonl(tmp_path)
    await done(engine, Append("k", [A]))
    await engine.close()
    (tmp_path / "sessions").rename(tmp_path / "elsewhere")
    with pytest.raises(StartError, match=r"sessions is missing.*mount"):
        await open_jsonl(tmp_path)
    with pytest.raises(StartError, match=r"sessions is missing.*mount"):
        list(Check(tmp_path).findings())
    (tmp_path / "elsewhere").rename(tmp_path / "sessions")
    engine = await open_jsonl(tmp_path)
    assert list(await lines(engine, "k")) == [A]
    await engine.close()


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "I/O error")])
async def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path, monkeypatch, error: OSError):
    """Its session would seem not to exist, and the next append would make another file."""
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "k.jsonl").write_bytes(A + b"\n")
    os_open = os.open

    def unreadable(path, *arguments, **named):
        if str(path).endswith("k.jsonl"):
            raise error
        return os_open(path, *arguments, **named)

    monkeypatch.setattr(os, "open", unreadable)
    with pytest.raises(StartError, match=r"k\.jsonl.*make it readable"):
        await open_jsonl(tmp_path)
    monkeypatch.undo()
    engine = await open_jsonl(tmp_path)
    assert list(await lines(engine, "k")) == [A]
    await engine.close()


async def test_a_second_daemon_is_refused_before_it_binds(make_daemon, tmp_path: Path):
    first = make_daemon(tmp_path / "data", store="jsonl").start()
    second = make_daemon(tmp_path / "data", store="jsonl")
    with pytest.raises(AssertionError) as died:
        second.start()
    assert f"process {first.pid}, {first.address}" in str(died.value)
    assert "listening on" not in "".join(second.stdout)


async def test_a_directory_that_cannot_be_made_is_refused_by_its_path(tmp_path: Path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StartError) as refused:
        await open_jsonl(tmp_path / "file" / "data")
    assert str(tmp_path / "file" / "data") in str(refused.value)
    assert "--data" in str(refused.value)


async def test_directories_and_files_are_for_their_owner_only(tmp_path: Path):
    engine = await open_jsonl(tmp_path / "data", tuning=BY_HAND)
    await done(engine, Append("k", [A]))
    await done(engine, Append("k", [B]))  # the first one's line is in its file by now
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").rglob("*")}
    modes["data"] = stat.S_IMODE((tmp_path / "data").stat().st_mode)
    await engine.close()
    assert {modes.pop(folder) for folder in ("data", "sessions", "quarantine")} == {0o700}
    assert set(modes) >= {"LOCK", "STORE", "journal.db", "journal.db-wal", "journal.db-shm", "k.jsonl"}
    assert set(modes.values()) == {0o600}


async def test_a_newer_format_is_refused_by_name_and_left_as_it_is(tmp_path: Path):
    await (await open_jsonl(tmp_path)).close()
    text = json.dumps(store(tmp_path) | {"format": 3, "oldest_reader": 2})
    (tmp_path / "STORE").write_text(text)
    with pytest.raises(StartError, match=r"format 3.*format 1.*newer sessionstored"):
        await open_jsonl(tmp_path)
    assert (tmp_path / "STORE").read_text() == text


async def test_a_newer_format_that_this_reader_understands_is_opened(tmp_path: Path):
    await (await open_jsonl(tmp_path)).close()
    members = store(tmp_path) | {"format": 2, "oldest_reader": 1, "new": "member"}
    del members["crc"]
    members["crc"] = crc32(json.dumps(members, sort_keys=True).encode())
    (tmp_path / "STORE").write_text(json.dumps(members))
    await (await open_jsonl(tmp_path)).close()


async def test_a_store_file_with_another_byte_is_refused(tmp_path: Path):
    await (await open_jsonl(tmp_path)).close()
    content = (tmp_path / "STORE").read_bytes()
    for position in range(len(content) - 1):
        for bit in (1, 4):
            changed = bytearray(content)
            changed[position] ^= bit
            (tmp_path / "STORE").write_bytes(changed)
            with pytest.raises(StartError, match="STORE"):
                await open_jsonl(tmp_path)
    (tmp_path / "STORE").write_bytes(content)
    await (await open_jsonl(tmp_path)).close()


async def test_a_lock_that_finds_no_room_is_named_and_leaves_the_directory_free(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StartError, match="is full: make room"):
            await open_jsonl(tmp_path)
    engine = await open_jsonl(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StartError, match="is full: make room"):
        engine.announce(["127.0.0.1:7400"])
    await engine.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"store_id": "x"}', "null ceiling", "text format"])
async def test_an_unreadable_store_file_is_refused(tmp_path: Path, text: str):
    await (await open_jsonl(tmp_path)).close()
    changes = {"null ceiling": {"revision_ceiling": None}, "text format": {"oldest_reader": "1"}}
    if text in changes:
        text = json.dumps(store(tmp_path) | changes[text])
    (tmp_path / "STORE").write_text(text)
    with pytest.raises(StartError, match="STORE cannot be read"):
        await open_jsonl(tmp_path)


async def test_a_store_file_that_is_cut_short_does_not_replace_the_whole_one(tmp_path: Path):
    await (await open_jsonl(tmp_path)).close()
    text = (tmp_path / "STORE").read_bytes()
    disk = FullDisk()
    directory = Directory(tmp_path, disk)
    disk.room = 10
    with pytest.raises(OSError, match="No space left on device"):
        directory.write_store(new_store())
    directory.close()
    assert (tmp_path / "STORE").read_bytes() == text


async def test_the_names_of_new_directories_are_flushed(tmp_path: Path):
    flushed: list[Path] = []

    class Noting(Disk):
        def flush_directory(self, path: Path) -> None:
            flushed.append(path)

    Directory(tmp_path / "a" / "data", Noting()).close()
    assert flushed == [tmp_path, tmp_path / "a", tmp_path / "a" / "data", tmp_path / "a" / "data"]
    Directory(tmp_path / "a" / "data", Noting()).close()
    assert len(flushed) == 4


async def test_a_journal_lost_after_a_clean_stop_is_rebuilt_and_revisions_go_on(tmp_path: Path):
    engine = await open_jsonl(tmp_path)
    before = await done(engine, Append("k", [A, B]))
    await engine.close()
    identity, ceiling = store(tmp_path)["store_id"], store(tmp_path)["revision_ceiling"]
    remove_journal(tmp_path)
    engine = await open_jsonl(tmp_path)
    assert list(await lines(engine, "k")) == [A, B]
    after = await done(engine, Append("k", [A]))
    assert engine.store_id == identity
    assert after.revision > int(str(ceiling)) > before.revision
    await engine.close()


@pytest.mark.parametrize("how", ["missing", "empty"])
async def test_a_journal_lost_after_a_crash_is_loss_and_is_accepted_only_by_name(tmp_path: Path, how: str):
    engine = await open_jsonl(tmp_path / "data", tuning=BY_HAND)
    await done(engine, Append("k", [A]))
    data = await abandoned_copy(engine, tmp_path / "data", tmp_path / "copy")
    remove_journal(data)
    if how == "empty":
        (data / "journal.db").touch()
    with pytest.raises(StartError, match="--accept-loss"):
        await open_jsonl(data)
    engine = await open_jsonl(data, accept_loss=True)
    assert list(await lines(engine, "k")) == [A], "the session file was written, if not flushed"
    await engine.close()


async def test_a_journal_of_another_store_is_refused(tmp_path: Path):
    for name in ("one", "two"):
        engine = await open_jsonl(tmp_path / name)
        await done(engine, Append(name, [A]))
        await engine.close()
    shutil.copy(tmp_path / "one" / "journal.db", tmp_path / "two" / "journal.db")
    with pytest.raises(StartError, match="belongs to store"):
        await open_jsonl(tmp_path / "two")


async def test_a_journal_that_is_no_database_is_refused(tmp_path: Path):
    await (await open_jsonl(tmp_path)).close()
    (tmp_path / "journal.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StartError, match=r"journal\.db"):
        await open_jsonl(tmp_path)

"""Files that somebody else edited, moved or made: while the daemon was down, was killed, or runs."""

import json
import os
from pathlib import Path

import pytest
from crash.by_hand import A, B, C, crashed, opened, quiet, refusal, revision, round_of, says
from crash.workspaces import quarantined
from engines import done, lines, read, submit
from seed_reader import read_session
from sessionstored.engine import Query
from sessionstored.rules import Answer, Append, Create, Delete, Fork, Pop, Refusal, Replace, Update

X = b'{"role": "user", "content": "written by hand"}'


def file_of(data: Path, key: str = "k") -> Path:
    """The file of a session."""
    for path in (data / "sessions").glob("*.jsonl"):
        session = read_session(path)
        if session is not None and session.key == key:
            return path
    raise AssertionError(f"{key} has no file")


def edit(path: Path, old: bytes, new: bytes) -> None:
    """As most editors do: a new file in the place of the old one."""
    content = path.read_bytes()
    assert old in content
    temporary = path.with_suffix(".edited")
    temporary.write_bytes(content.replace(old, new))
    temporary.rename(path)


def add(path: Path, *new: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in new))


@pytest.fixture
async def clean(fast_path: Path) -> Path:
    """A directory after a clean stop, with k = A, B."""
    async with opened(fast_path / "data") as engine:
        await done(engine, Append("k", [A, B]))
    return fast_path / "data"


@pytest.fixture
async def killed(fast_path: Path) -> Path:
    """A directory after kill -9: k = A, B in the catalogue, C waited in the journal and stood in the file."""
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A, B]))
        await round_of(engine)
        await done(engine, Append("k", [C]))
        return await crashed(engine, fast_path / "data")


# Down after a clean stop.


async def test_a_file_that_was_edited_is_adopted_anew(clean: Path) -> None:
    async with opened(clean) as engine:
        before = await revision(engine, "k")
    edit(file_of(clean), A, X)
    async with opened(clean) as engine:
        assert await revision(engine, "k") > before
        assert (await read(engine, "k")).head.rewrite_revision > before
        await says(engine, "k", X, B)


async def test_a_file_that_was_added_to_is_adopted_anew(clean: Path) -> None:
    add(file_of(clean), X)
    async with opened(clean) as engine:
        await says(engine, "k", A, B, X)


@pytest.mark.parametrize("how", ["edited", "renamed"])
async def test_the_update_time_does_not_go_back_to_an_older_header(clean: Path, how: str) -> None:
    async with opened(clean) as engine:
        last = await done(engine, Append("k", [C]))
    path = file_of(clean)
    if how == "edited":
        add(path, X)
    else:
        path.rename(path.with_name("other name.jsonl"))
    async with opened(clean) as engine:
        assert (await read(engine, "k")).head.update_time_us >= last.update_time_us


async def test_a_file_that_was_torn_by_hand_is_served_without_its_last_line(clean: Path) -> None:
    with file_of(clean).open("ab") as file:
        file.write(X[:9])
    async with opened(clean) as engine:
        assert "torn" in (await read(engine, "k")).head.damage
        await says(engine, "k", A, B)
        assert quarantined(clean) == [X[:9]]


async def test_a_file_that_was_broken_by_hand_heals_when_it_is_mended_by_hand(clean: Path) -> None:
    edit(file_of(clean), A, A[:-1])
    async with opened(clean) as engine:
        no = await refusal(engine, "k")
        assert (no.reason, no.metadata["file"], no.metadata["line"]) == ("DATA_LOSS", "sessions/k.jsonl", "2")
        edit(clean / "sessions" / "k.jsonl", A[:-1], A)
        (outcome,) = await submit(engine, Append("k", [C]))
        assert isinstance(outcome, Answer)
        assert await lines(engine, "k") == [A, B, C]


@pytest.mark.parametrize("key", ["", "two\nlines", "z" * 600, "\x85", 7])
async def test_a_header_whose_key_cannot_be_one_leaves_the_session_to_its_files_name(
    fast_path: Path, key: object
) -> None:
    path = fast_path / "sessions" / "k.jsonl"
    path.parent.mkdir()
    path.write_bytes(json.dumps({"_type": "metadata", "key": key}).encode() + b"\n" + A + b"\n")
    async with opened(fast_path) as engine:
        assert await lines(engine, "k") == [A]
    add(path, B)
    async with opened(fast_path) as engine:
        await says(engine, "k", A, B)


async def test_a_missing_file_is_named_and_its_session_can_be_deleted_or_come_back(clean: Path) -> None:
    path = file_of(clean)
    away = path.rename(clean / "away")
    async with opened(clean) as engine:
        no = await refusal(engine, "k")
        assert (no.reason, no.metadata["file"]) == ("DATA_LOSS", "sessions/k.jsonl")
        assert isinstance((await submit(engine, Append("k", [C])))[0], Refusal)
        assert not path.exists()
        away.rename(path)
        await says(engine, "k", A, B)
        path.rename(away)
        await done(engine, Delete("k"))
        assert (await refusal(engine, "k")).reason == "SESSION_NOT_FOUND"
        await says(engine, "k")


async def test_a_renamed_file_keeps_its_session(clean: Path) -> None:
    async with opened(clean) as engine:
        before = await revision(engine, "k")
    file_of(clean).rename(clean / "sessions" / "other name.jsonl")
    async with opened(clean) as engine:
        assert await revision(engine, "k") > before
        assert await engine.count() == 1
        await says(engine, "k", A, B)
    assert [path.name for path in (clean / "sessions").iterdir()] == ["other name.jsonl"]


async def test_a_file_that_appears_is_adopted(clean: Path) -> None:
    (clean / "sessions" / "new_one.jsonl").write_bytes(b'{"_type": "metadata", "key": "new:one"}\n' + X)
    async with opened(clean) as engine:
        assert await engine.count() == 2
        await says(engine, "new:one", X)
        assert {head.key for head in (await engine.list(Query())).heads} == {"k", "new:one"}


@pytest.mark.parametrize("moved", ["first", "second"])
async def test_two_files_that_claim_one_key_are_both_named_and_neither_is_served(
    clean: Path, moved: str
) -> None:
    first = file_of(clean)
    second = clean / "sessions" / "zz.jsonl"
    second.write_bytes(first.read_bytes().replace(A, X))
    async with opened(clean) as engine:
        no = await refusal(engine, "k")
        assert no.reason == "DATA_LOSS"
        assert "sessions/k.jsonl" in no.message
        assert "sessions/zz.jsonl" in no.message
        assert "move one of them away, then restart" in no.message
        for mutation in (Append("k", [C]), Pop("k"), Create("k"), Fork("f", "k"), Update("k", b"{}")):
            (outcome,) = await submit(engine, mutation)
            assert isinstance(outcome, Refusal)
            assert outcome.reason == "DATA_LOSS"
    (first if moved == "first" else second).rename(clean / "away")
    async with opened(clean) as engine:
        await says(engine, "k", *([X, B] if moved == "first" else [A, B]))


async def test_deleting_a_session_that_two_files_claim_sets_both_aside(clean: Path, fast_path: Path) -> None:
    first, second = file_of(clean), clean / "sessions" / "zz.jsonl"
    second.write_bytes(first.read_bytes().replace(A, X))
    contents = sorted([first.read_bytes(), second.read_bytes()])
    async with opened(clean) as engine:
        await done(engine, Delete("k"))
        copy = await crashed(engine, fast_path / "copy")
    for data in (clean, copy):
        assert quarantined(data) == contents
        async with opened(data) as engine:
            assert await engine.count() == 0
            await says(engine, "k")


@pytest.mark.parametrize(
    "name",
    ["link.jsonl", "%FF.jsonl", ".jsonl", "%00.jsonl", os.fsdecode(b"\xff.jsonl"), "folder.jsonl"],
)
async def test_what_cannot_be_a_session_file_is_left_alone(clean: Path, name: str) -> None:
    path = clean / "sessions" / name
    if name == "link.jsonl":
        (clean / "target").write_bytes(X)
        path.symlink_to(clean / "target")
    elif name == "folder.jsonl":
        path.mkdir()
    else:
        path.write_bytes(X)
    async with opened(clean) as engine:
        assert await engine.count() == 1
        await says(engine, "k", A, B)
    assert os.path.lexists(path)


async def test_a_file_with_the_longest_of_names_is_rewritten_torn_and_deleted_like_any_other(
    clean: Path,
) -> None:
    key = "n" * 249
    (clean / "sessions" / f"{key}.jsonl").write_bytes(A + b"\n" + B + b"\n" + X[:9])
    async with opened(clean) as engine:
        await done(engine, Pop(key))
        await round_of(engine)
        await says(engine, key, A)
    async with opened(clean) as engine:
        await done(engine, Delete(key))
        await round_of(engine)
    assert quarantined(clean) == [X[:9]]


# Down after kill -9.


async def test_changes_that_waited_are_there(killed: Path) -> None:
    async with opened(killed) as engine:
        await says(engine, "k", A, B, C)


async def test_a_file_that_was_edited_while_changes_waited_is_damaged_and_the_changes_are_kept(
    killed: Path,
) -> None:
    path = file_of(killed)
    edit(path, A, X)
    content = path.read_bytes()
    for _ in range(2):
        async with opened(killed) as engine:
            no = await refusal(engine, "k")
            assert (no.reason, no.metadata["file"]) == ("DATA_LOSS", "sessions/k.jsonl")
            assert isinstance((await submit(engine, Append("k", [C])))[0], Refusal)
            assert quarantined(killed) == [C + b"\n"]
            assert path.read_bytes() == content
    add(path, C)  # the person puts together what belongs together
    async with opened(killed) as engine:
        await says(engine, "k", X, B, C, C)


async def test_a_damaged_session_can_be_deleted_and_its_file_is_set_aside(
    killed: Path, fast_path: Path
) -> None:
    path = file_of(killed)
    edit(path, A, X)
    content = path.read_bytes()
    async with opened(killed) as engine:
        await done(engine, Delete("k"))
        copy = await crashed(engine, fast_path / "copy")
    for data in (killed, copy):
        assert quarantined(data) == sorted([content, C + b"\n"])
        async with opened(data) as engine:
            await says(engine, "k")


async def test_bytes_that_somebody_appended_while_changes_waited_are_set_aside(killed: Path) -> None:
    add(file_of(killed), X)
    async with opened(killed) as engine:
        assert any(X in aside for aside in quarantined(killed))
        await says(engine, "k", A, B, C)
    session = read_session(file_of(killed))
    assert session is not None
    assert len(session.messages) == 4


@pytest.mark.parametrize("how", ["shorter", "empty", "missing", "renamed"])
async def test_a_file_that_lost_bytes_while_changes_waited_is_damaged(killed: Path, how: str) -> None:
    path = file_of(killed)
    match how:
        case "shorter":
            os.truncate(path, path.stat().st_size - len(B) - len(C) - 2)
        case "empty":
            os.truncate(path, 0)
        case "missing":
            path.unlink()
        case "renamed":
            path.rename(path.with_name("renamed.jsonl"))
    for _ in range(2):
        async with opened(killed) as engine:
            no = await refusal(engine, "k")
            assert (no.reason, no.metadata["file"]) == ("DATA_LOSS", "sessions/k.jsonl")
            assert quarantined(killed) == [C + b"\n"]


async def test_a_file_that_was_renamed_while_changes_waited_is_named_and_comes_back(killed: Path) -> None:
    path = file_of(killed)
    renamed = path.rename(path.with_name("renamed.jsonl"))
    for _ in range(2):
        async with opened(killed) as engine:
            message = (await refusal(engine, "k")).message
            assert "two files" not in message
            assert "sessions/k.jsonl is missing, and sessions/renamed.jsonl claims its key" in message
            assert "rename that to sessions/k.jsonl, then restart" in message
    renamed.rename(path)
    async with opened(killed) as engine:
        await says(engine, "k", A, B, C)
    assert quarantined(killed) == [C + b"\n"]


async def test_two_files_that_claim_a_key_with_changes_that_waited(killed: Path) -> None:
    second = killed / "sessions" / "zz.jsonl"
    second.write_bytes(b'{"_type": "metadata", "key": "k"}\n' + X)
    async with opened(killed) as engine:
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
    second.unlink()
    async with opened(killed) as engine:
        await says(engine, "k", A, B, C)


async def test_a_popped_message_is_not_in_the_file_after_a_crash(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        await done(engine, Append("k", [B]))
        await quiet(engine)
        await done(engine, Pop("k"))
        copy = await crashed(engine, fast_path / "copy")
    async with opened(copy) as engine:
        session = read_session(file_of(copy))
        assert session is not None
        assert len(session.messages) == 1
        await says(engine, "k", A)


@pytest.mark.parametrize("checkpointed", [False, True])
async def test_a_file_that_comes_back_after_its_session_was_deleted_is_not_adopted(
    fast_path: Path, checkpointed: bool
) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        if checkpointed:
            await round_of(engine)
        await quiet(engine)
        old = file_of(fast_path / "first").read_bytes()
        await done(engine, Append("k", [B]))
        await quiet(engine)
        newer = file_of(fast_path / "first").read_bytes()
        await done(engine, Delete("k"))
        copies = [await crashed(engine, fast_path / f"copy{n}") for n in range(3)]
    for copy, content in zip(copies, [old, newer, newer + X], strict=True):
        (copy / "sessions" / "k.jsonl").write_bytes(content)
        async with opened(copy) as engine:
            assert await engine.count() == 0
            await says(engine, "k")
    assert quarantined(copies[2]) == [X]


async def test_another_file_in_the_place_of_a_deleted_one_is_adopted(fast_path: Path) -> None:
    async with opened(fast_path / "first") as engine:
        await done(engine, Append("k", [A]))
        await round_of(engine)
        await done(engine, Delete("k"))
        copy = await crashed(engine, fast_path / "copy")
    (copy / "sessions" / "k.jsonl").write_bytes(b'{"_type": "metadata", "key": "k"}\n' + X)
    for expected in ([X], [X]):
        async with opened(copy) as engine:
            assert await lines(engine, "k") == expected
            assert await engine.count() == 1


# While the daemon runs.


async def test_an_edit_of_a_clean_session_is_seen_by_the_next_write(clean: Path) -> None:
    async with opened(clean) as engine:
        assert await lines(engine, "k") == [A, B]
        edit(file_of(clean), A, X)
        assert (await done(engine, Append("k", [C]))).message_count == 3
        assert await lines(engine, "k") == [X, B, C]


async def test_an_edit_of_a_clean_session_is_seen_by_a_cold_read(clean: Path) -> None:
    async with opened(clean) as engine:
        assert (await read(engine, "k", 0, 0)).head.message_count == 2
        edit(file_of(clean), A, X)
        assert await lines(engine, "k") == [X, B]


@pytest.mark.parametrize("how", ["replaced", "cut", "removed"])
async def test_a_file_that_is_taken_away_under_waiting_changes_loses_none_of_them(
    clean: Path, how: str
) -> None:
    async with opened(clean) as engine:
        await done(engine, Append("k", [C]))
        await quiet(engine)
        path = file_of(clean)
        match how:
            case "replaced":
                edit(path, A, X)
            case "cut":
                os.truncate(path, 10)
            case "removed":
                path.unlink()
        (outcome,) = await submit(engine, Append("k", [X]))
        await round_of(engine)
        no = await refusal(engine, "k")
        assert (no.reason, no.metadata["file"]) == ("DATA_LOSS", "sessions/k.jsonl")
        kept = b"".join(quarantined(clean))
        assert C in kept
        assert X in kept or isinstance(outcome, Refusal)


async def test_a_checkpoint_finds_a_file_that_was_replaced_after_its_append(clean: Path) -> None:
    async with opened(clean) as engine:
        await done(engine, Append("k", [C]))
        await quiet(engine)
        edit(file_of(clean), A, X)
        await round_of(engine)
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
        assert quarantined(clean) == [C + b"\n"]


async def test_bytes_that_somebody_appends_to_a_session_in_use_are_set_aside(clean: Path) -> None:
    async with opened(clean) as engine:
        await done(engine, Append("k", [C]))
        await quiet(engine)
        add(file_of(clean), X)
        await says(engine, "k", A, B, C)
        await quiet(engine)
        assert quarantined(clean) == [X + b"\n"]


async def test_bytes_that_somebody_appends_are_set_aside_before_a_rewrite(clean: Path) -> None:
    async with opened(clean) as engine:
        await done(engine, Append("k", [C]))
        await quiet(engine)
        add(file_of(clean), X)
        await done(engine, Replace("k", 0, 1, []))
        await round_of(engine)
        assert quarantined(clean) == [X + b"\n"]
        await says(engine, "k", B, C)


async def test_damage_refuses_its_own_request_only(clean: Path) -> None:
    """A block that is not what was written, met while a group is decided: the others go through."""
    async with opened(clean) as engine:
        await done(engine, Append("other", [A]))
    content = file_of(clean).read_bytes()
    stat = file_of(clean).stat()
    with file_of(clean).open("r+b") as file:
        file.seek(content.index(A))
        file.write(A.replace(b'"a"', b'"b"'))
    os.utime(clean / "sessions" / "k.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    async with opened(clean) as engine:
        outcomes = await submit(
            engine, Append("other", [B]), Replace("k", 0, 1, [C]), Pop("k"), Append("other", [C])
        )
        assert [isinstance(outcome, Answer) for outcome in outcomes] == [True, False, False, True]
        assert await lines(engine, "other") == [A, B, C]
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"


async def test_a_file_is_not_opened_by_a_listing(clean: Path) -> None:
    async with opened(clean) as engine:
        file_of(clean).unlink()
        assert [head.key for head in (await engine.list(Query())).heads] == ["k"]



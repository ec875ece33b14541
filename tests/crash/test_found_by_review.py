"""What reviewers of the engine broke, each kept as a test."""

import asyncio
import os
from pathlib import Path

import pytest
from crash.by_hand import A, B, C, D, crashed, opened, quiet, refusal, round_of, says
from engines import done, lines, one, request, submit
from sessionstored.engine import Refused
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Fork,
    Limits,
    Pop,
    Refusal,
    Replace,
    Update,
)

BIG = b'{"content": "%s"}' % (b"x" * 400)


def file_of(data: Path, key: str) -> Path:
    return data / "sessions" / f"{key}.jsonl"


def damage_second_block(file: Path) -> None:
    """One bit, as a disk would flip it: no fingerprint tells."""
    stat = file.stat()
    damaged = bytearray(file.read_bytes())
    damaged[70_000] ^= 1
    file.write_bytes(damaged)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


async def test_a_cancelled_read_of_a_damaged_session_does_not_end_the_committer(tmp_path: Path):
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A] * 3_000))
        assert await round_of(engine)
    damage_second_block(file_of(tmp_path, "k"))
    async with opened(tmp_path) as engine:
        for _ in range(50):
            reading = asyncio.create_task(lines(engine, "k"))
            await asyncio.sleep(0.0005)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            cancelled = asyncio.create_task(engine._look_again("k"))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
        assert (await refusal(engine, "k")).reason == "DATA_LOSS"
        await asyncio.wait_for(done(engine, Append("other", [B])), 100)


@pytest.mark.parametrize("mutation", [Replace("k", 0, None, [D]), Append("k", [D])])
async def test_a_change_right_after_an_edit_has_a_revision_of_its_own_and_survives(
    tmp_path: Path, mutation: Replace | Append
):
    async with opened(tmp_path / "data") as engine:
        await done(engine, Append("k", [A]))
        assert await round_of(engine)
        with file_of(tmp_path / "data", "k").open("ab") as file:
            file.write(B + b"\n")
        answer = await done(engine, mutation)
        assert answer.revision > answer.previous_revision
        copy = await crashed(engine, tmp_path / "copy")
    async with opened(copy) as engine:
        assert await lines(engine, "k") == ([D] if isinstance(mutation, Replace) else [A, B, D])


async def test_a_call_whose_answer_found_no_room_is_not_applied_again_after_a_crash(tmp_path: Path):
    limits = Limits(window_bytes_max=1_000)
    async with opened(tmp_path / "data", limits=limits) as engine:
        await done(engine, Append("k", [BIG] * 6))
        for sequence in (2, 3, 1):
            await one(engine, request(Pop("k"), sequence))
        retried = await one(engine, request(Pop("k"), 1))
        assert isinstance(retried.outcome, Refusal)
        assert retried.outcome.reason == "CALL_EXPIRED"
        copy = await crashed(engine, tmp_path / "copy")
    async with opened(copy, limits=limits) as engine:
        again = await one(engine, request(Pop("k"), 1))
        assert again.outcome == retried.outcome
        assert len(await lines(engine, "k")) == 3


async def test_request_ids_keep_their_order_over_a_checkpoint_that_keeps_its_rows(tmp_path: Path):
    limits = Limits(window_request_ids_max=10)
    async with opened(tmp_path / "data", limits=limits) as engine:
        for n in range(25):
            await one(engine, request(Append("k", [A]), request_id=f"r{n}"))
        await done(engine, Append("behind", [A, B]))
        assert await round_of(engine)
        for n in range(25, 50):
            await one(engine, request(Append("k", [A]), request_id=f"r{n}"))
        await quiet(engine)
        engine._vault.dirty["behind"] = state = engine._vault.state("behind")
        state.file.count += 1  # its file cannot be completed in this round
        engine._maintenance.rewrite = lambda _: False  # type: ignore[method-assign]
        assert not await round_of(engine)
        copy = await crashed(engine, tmp_path / "copy")
        state.file.count -= 1
    async with opened(copy, limits=limits) as engine:
        for n in range(40, 50):
            reply = await one(engine, request(Append("k", [A]), request_id=f"r{n}"))
            assert reply.replayed, n
        assert len(await lines(engine, "k")) == 50


@pytest.mark.parametrize("what", ["directory", "fifo", "link"])
async def test_a_file_that_is_none_any_more_harms_its_own_session_only(tmp_path: Path, what: str):
    async with opened(tmp_path / "data") as engine:
        await done(engine, Append("k", [A]))
        assert await round_of(engine)
        file = file_of(tmp_path / "data", "k")
        file.rename(tmp_path / "k.jsonl")
        match what:
            case "directory":
                file.mkdir()
            case "fifo":
                os.mkfifo(file)
            case "link":
                file.symlink_to(tmp_path / "k.jsonl")
        with pytest.raises(Refused) as refused:
            await asyncio.wait_for(one_or_refusal(engine), 100)
        assert refused.value.refusal.reason == "DATA_LOSS"
        await asyncio.wait_for(done(engine, Append("other", [B])), 100)
        engine._maintenance.guarded_round()
        assert not engine._committer.failure


async def one_or_refusal(engine) -> None:
    reply = await one(engine, request(Append("k", [B])))
    if isinstance(reply.outcome, Refusal):
        raise Refused(reply.outcome)


async def test_a_line_that_somebody_appends_before_a_checkpoint_is_not_cut(tmp_path: Path):
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A]))
        await quiet(engine)
        with file_of(tmp_path, "k").open("ab") as file:
            file.write(B + b"\n")
        await round_of(engine)
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [C]))
        await quiet(engine)
        everything = b"".join(path.read_bytes() for path in tmp_path.glob("[sq]*/*"))
        assert B in everything
        assert (await lines(engine, "k"))[-1] == C


async def test_a_header_that_somebody_added_while_the_daemon_was_killed_goes_to_quarantine(tmp_path: Path):
    async with opened(tmp_path / "data") as engine:
        await done(engine, Append("k", [A]))
        assert await round_of(engine)
        await done(engine, Append("k", [B]))
        copy = await crashed(engine, tmp_path / "copy")
    foreign = b'{"_type": "metadata", "key": "k", "metadata": {"by": "hand"}, "last_consolidated": 1}\n'
    with file_of(copy, "k").open("ab") as file:
        file.write(foreign)
    async with opened(copy) as engine:
        assert await lines(engine, "k") == [A, B]
        assert any(foreign in path.read_bytes() for path in (copy / "quarantine").iterdir())


async def test_metadata_that_an_edit_replaced_does_not_come_back_with_the_journal(tmp_path: Path):
    async with opened(tmp_path / "data") as engine:
        await done(engine, Create("k", [A], b'{"v": "old"}'))
        assert await round_of(engine)
        await done(engine, Update("k", metadata=b'{"v": "mine"}'))
        assert await round_of(engine)
        file = file_of(tmp_path / "data", "k")
        file.write_bytes(file.read_bytes().replace(b'"mine"', b'"hand"'))
        await done(engine, Append("k", [B]))
        copy = await crashed(engine, tmp_path / "copy")
    async with opened(copy) as engine:
        assert (await engine.read("k", lambda head: (0, 0), 1)).head.metadata == b'{"v": "hand"}'


async def test_sessions_that_are_always_rewritten_do_not_keep_the_journal_from_being_cut(tmp_path: Path):
    async with opened(tmp_path) as engine:
        oldest, kept, longest = 0, 0, 0
        for _ in range(150):
            meanwhile = asyncio.create_task(round_of(engine))
            await asyncio.gather(*(done(engine, Append(f"k{n}", [BIG, BIG])) for n in range(8)))
            await asyncio.gather(*(done(engine, Pop(f"k{n}")) for n in range(8)))
            await meanwhile
            before, oldest = oldest, engine._vault.checkpoint_row
            kept = kept + 1 if oldest < engine._vault.row_id and oldest == before else 0
            longest = max(longest, kept)
        print(f"recovery had to begin at the same row for up to {longest} rounds")
        assert longest < 75


async def test_a_clean_file_that_was_emptied_is_not_an_empty_session(tmp_path: Path):
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A, B, C]))
        await done(engine, Append("cut", [A, B, C]))
    file_of(tmp_path, "k").write_bytes(b"")
    cut = file_of(tmp_path, "cut")
    cut.write_bytes(cut.read_bytes().removesuffix(C + b"\n"))
    async with opened(tmp_path) as engine:
        lost = await refusal(engine, "k")
        assert lost.reason == "DATA_LOSS"
        assert "from 3 to 0 messages" in lost.message
        head = (await engine.read("cut", lambda head: (0, 0), 1)).head
        assert head.message_count == 2
        assert head.damage == "somebody else shortened the file from 3 to 2 messages"


async def test_a_file_that_became_another_sessions_is_not_served(tmp_path: Path):
    async with opened(tmp_path) as engine:
        await done(engine, Append("a", [A]))
        await done(engine, Append("b", [B]))
    file_of(tmp_path, "a").write_bytes(file_of(tmp_path, "b").read_bytes())
    async with opened(tmp_path) as engine:
        found = await refusal(engine, "a")
        assert found.reason == "DATA_LOSS"
        assert "belongs to session 'b'" in found.message
        assert await lines(engine, "b") == [B]


async def test_a_fork_is_created_when_it_is_made_also_in_its_file(tmp_path: Path):
    async with opened(tmp_path) as engine:
        await done(engine, Create("k", [A], create_time_us=1_000_000))
        forked = await done(engine, Fork("f", "k"))
        assert isinstance(forked, Answer)
    assert '"created_at": "1970' not in file_of(tmp_path, "f").read_text().splitlines()[0]


@pytest.mark.parametrize("foreign", [True, False])
async def test_a_file_in_the_place_of_a_deleted_one_may_be_another_sessions(tmp_path: Path, foreign: bool):
    async with opened(tmp_path / "data") as engine:
        await done(engine, Append("gone", [A]))
        await done(engine, Append("x", [B]))
        assert await round_of(engine)
        await done(engine, Append("gone", [A]))
        await done(engine, Delete("gone"))
        copy = await crashed(engine, tmp_path / "copy")
    if foreign:
        file_of(copy, "x").unlink()
        file_of(copy, "gone").write_bytes(b'{"_type": "metadata", "key": "y"}\n' + B + b"\n")
    else:
        file_of(copy, "x").rename(file_of(copy, "gone"))
    key = "y" if foreign else "x"
    async with opened(copy) as engine:
        again = await crashed(engine, tmp_path / "again")
        await says(engine, key, B)
        await says(engine, "gone")
        assert await lines(engine, key) == [B, D]
    async with opened(again) as engine:
        await says(engine, key, B)
        await says(engine, "gone")


@pytest.mark.parametrize(
    "time", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00", "9999-12-31T23:59:59.999999+00:00"]
)
async def test_a_header_at_the_end_of_time_harms_nobody(tmp_path: Path, time: str):
    (tmp_path / "sessions").mkdir()
    header = f'{{"_type": "metadata", "key": "k", "created_at": "{time}", "updated_at": "{time}"}}\n'
    file_of(tmp_path, "k").write_bytes(header.encode() + A + b"\n")
    async with opened(tmp_path) as engine:
        await done(engine, Update("k", b'{"v": 1}'))
        await done(engine, Pop("k"))
        await round_of(engine)
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [B]))
        assert await lines(engine, "k") == [B]


async def test_a_fork_that_is_sent_again_gets_its_answer_though_its_source_is_damaged_now(tmp_path: Path):
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A] * 3_000))
        assert await round_of(engine)
        first = await one(engine, request(Fork("f", "k"), 1))
        assert isinstance(first.outcome, Answer)
    damage_second_block(file_of(tmp_path, "k"))
    async with opened(tmp_path) as engine:
        again = await one(engine, request(Fork("f", "k"), 1))
        assert (again.outcome, again.replayed) == (first.outcome, True)


async def test_a_fork_of_a_damaged_session_refuses_its_own_request_only(tmp_path: Path):
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A] * 3_000))
        assert await round_of(engine)
    damage_second_block(file_of(tmp_path, "k"))
    async with opened(tmp_path) as engine:
        outcomes = await submit(engine, Append("other", [A]), Fork("f", "k"), Append("other", [B]))
        assert [getattr(outcome, "reason", "") for outcome in outcomes] == ["", "DATA_LOSS", ""]
        assert await lines(engine, "other") == [A, B]


@pytest.mark.parametrize("mutation", [Replace("k", 0, 1, [B]), Pop("k")])
async def test_a_call_that_is_sent_again_gets_its_answer_though_its_file_is_another_sessions_now(
    tmp_path: Path, mutation: Replace | Pop
):
    async with opened(tmp_path) as engine:
        await done(engine, Append("k", [A, B, C]))
        first = await one(engine, request(mutation, 1))
    async with opened(tmp_path) as engine:
        assert (await engine.read("k", lambda head: (0, 0), 1)).head.message_count
        file_of(tmp_path, "k").unlink()
        file_of(tmp_path, "k").write_bytes(b'{"_type": "metadata", "key": "other"}\n' + A + b"\n")
        again = await one(engine, request(mutation, 1))
        assert (again.outcome, again.replayed) == (first.outcome, True)

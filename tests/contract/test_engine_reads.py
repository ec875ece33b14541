"""What every engine must do with reads, and with many callers at once."""

import asyncio
import random
from collections.abc import Sequence

import pytest
from engines import NO_LIMIT, done, lines, one, read, request, submit
from sessionstored.engine import Engine, Refused, Request
from sessionstored.rules import Answer, Append, Create, Delete, Head, Pop, Refusal, Replace, Update

MESSAGES = [b'{"n": %d, "text": "%s"}' % (n, b"x" * (n % 50)) for n in range(100)]


async def test_select_gets_the_head_and_picks_the_range(engine: Engine) -> None:
    answer = await done(engine, Create("k", MESSAGES, b'{"a": 1}', 7))
    heads: list[Head] = []

    def last_ten(head: Head) -> tuple[int, int]:
        heads.append(head)
        return head.message_count - 10, head.message_count

    found = await engine.read("k", last_ten, NO_LIMIT)
    assert (found.start, found.next, list(found.lines)) == (90, 100, MESSAGES[90:])
    assert found.head == heads[-1]
    assert (found.head.revision, found.head.last_consolidated) == (answer.revision, 7)


async def test_every_range_is_the_one_asked_for(engine: Engine) -> None:
    await submit(engine, *(Append("k", MESSAGES[start : start + 7]) for start in range(0, 100, 7)))
    for start, stop in [(0, 0), (0, 1), (100, 100), (99, 100), (0, 100), (6, 8), (13, 14), (50, 90)]:
        found = await read(engine, "k", start, stop)
        assert (found.start, list(found.lines)) == (start, MESSAGES[start:stop])


async def test_a_read_ends_at_max_bytes_but_gives_one_message_at_least(engine: Engine) -> None:
    await done(engine, Create("k", MESSAGES))
    for max_bytes in (0, 1, 20, 21, 22, 500, 4096, NO_LIMIT):
        for start in (0, 37, 99):
            found = await engine.read("k", lambda head, start=start: (start, head.message_count), max_bytes)
            expected = [MESSAGES[start]]
            for line in MESSAGES[start + 1 :]:
                if sum(len(each) + 1 for each in [*expected, line]) > max_bytes:
                    break
                expected.append(line)
            assert (found.start, list(found.lines)) == (start, expected)
    nothing = await engine.read("k", lambda head: (100, 100), 1)
    assert (nothing.start, nothing.next, list(nothing.lines)) == (100, 100, [])


async def test_select_may_refuse(engine: Engine) -> None:
    await done(engine, Create("k", MESSAGES))
    refusal = Refusal("REVISION_CONFLICT", "rewritten since")

    def refuse(_: Head) -> tuple[int, int]:
        raise Refused(refusal)

    with pytest.raises(Refused) as caught:
        await engine.read("k", refuse, NO_LIMIT)
    assert caught.value.refusal == refusal


async def test_a_session_that_does_not_exist_is_not_found_and_not_created(engine: Engine) -> None:
    with pytest.raises(Refused) as caught:
        await read(engine, "none")
    assert caught.value.refusal.reason == "SESSION_NOT_FOUND"
    assert caught.value.refusal.metadata == {"key": "none"}
    assert await engine.count() == 0


async def test_large_messages_come_back_whole(engine: Engine) -> None:
    sizes = ((b"a", 3 << 20), (b"b", 65_536), (b"c", 8 << 20))
    large = [b'{"x": "%s"}' % (character * size) for character, size in sizes]
    await submit(engine, *(Append("k", [b'{"small": 1}', line]) for line in large))
    assert await lines(engine, "k") == [each for line in large for each in (b'{"small": 1}', line)]
    found = await engine.read("k", lambda head: (1, head.message_count), 1 << 20)
    assert list(found.lines) == large[:1]
    popped = await done(engine, Pop("k"))
    assert popped.message == large[-1]
    await done(engine, Replace("k", 1, 1, [b"{}"]))
    assert (await read(engine, "k", 0, 3)).lines == [b'{"small": 1}', b"{}", b'{"small": 1}']


async def test_a_long_session_is_read_anywhere(engine: Engine) -> None:
    messages = [b'{"n": %d, "pad": "%s"}' % (n, b"y" * (n * 7 % 300)) for n in range(6000)]
    for start in range(0, 6000, 1500):
        await done(engine, Append("k", messages[start : start + 1500]))
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(30):
        start = chance.randrange(6000)
        stop = min(6000, start + chance.randrange(60))
        assert list((await read(engine, "k", start, stop)).lines) == messages[start:stop]


async def test_what_a_read_gave_does_not_change_later(engine: Engine) -> None:
    await done(engine, Create("k", MESSAGES[:3]))
    found = await read(engine, "k")
    await submit(engine, Append("k", MESSAGES[3:5]), Replace("k", 0, 1, [b"{}"]), Delete("k"))
    assert list(found.lines) == MESSAGES[:3]
    assert found.head.message_count == 3


# Many at once.


async def test_concurrent_appends_land_once_in_the_order_of_their_revisions(engine: Engine) -> None:
    writers, each = 40, 15

    async def write(writer: int) -> list[tuple[int, bytes, Answer]]:
        answers = []
        for number in range(each):
            line = b'{"writer": %d, "number": %d}' % (writer, number)
            key = b"shared" if number % 3 else b"own %d" % writer
            reply = await one(engine, request(Append(key.decode(), [line]), number + 1, client=str(writer)))
            assert isinstance(reply.outcome, Answer)
            answers.append((reply.outcome.revision, line, reply.outcome))
        return answers

    gathered: Sequence[list[tuple[int, bytes, Answer]]] = await asyncio.gather(*map(write, range(writers)))
    stored = await lines(engine, "shared")
    shared = sorted(
        (answer.revision, answer.first_index, line)
        for answers in gathered
        for number, (_, line, answer) in enumerate(answers)
        if number % 3
    )
    assert [line for _, _, line in shared] == stored
    assert [index for _, index, _ in shared] == list(range(len(stored)))
    assert len({revision for revision, _, _ in shared}) == len(shared) == writers * 10
    for writer, answers in enumerate(gathered):
        own = [line for number, (_, line, _) in enumerate(answers) if number % 3 == 0]
        assert await lines(engine, f"own {writer}") == own
        mine = [line for number, (_, line, _) in enumerate(answers) if number % 3]
        assert [line for line in stored if line in set(mine)] == mine


async def test_of_concurrent_writers_at_one_revision_one_wins(engine: Engine) -> None:
    revision = (await done(engine, Create("k"))).revision
    for round_ in range(5):
        attempts = [
            Request(Append("k", [b'{"round": %d, "n": %d}' % (round_, n)], expected_revision=revision))
            for n in range(20)
        ]
        replies = await asyncio.gather(*(one(engine, attempt) for attempt in attempts))
        won = [reply.outcome for reply in replies if isinstance(reply.outcome, Answer)]
        assert len(won) == 1
        assert {reply.outcome.reason for reply in replies if isinstance(reply.outcome, Refusal)} == {
            "REVISION_CONFLICT"
        }
        revision = won[0].revision
    assert len(await lines(engine, "k")) == 5


async def test_reads_among_writes_are_of_one_revision(engine: Engine) -> None:
    """Each message tells how many there were before it in its era, so a mixture of two revisions shows."""
    await done(engine, Create("k"))
    writing = True

    async def write() -> None:
        nonlocal writing
        for era in range(6):
            await done(engine, Replace("k", 0, None, [b'{"era": %d, "n": 0}' % era]))
            await done(engine, Update("k", metadata=b'{"era": %d}' % era))
            for number in range(1, 12):
                await done(engine, Append("k", [b'{"era": %d, "n": %d}' % (era, number)]))
                await asyncio.sleep(0.0005)
        writing = False

    async def look() -> int:
        looks = 0
        last = (0, 0)
        while writing:
            found = await read(engine, "k")
            assert found.head.message_count == len(found.lines)
            if found.lines:
                era = int(found.lines[0].split()[1].rstrip(b","))
                expected = [b'{"era": %d, "n": %d}' % (era, n) for n in range(len(found.lines))]
                assert list(found.lines) == expected
            assert (found.head.revision, found.head.update_time_us) >= last
            last = (found.head.revision, found.head.update_time_us)
            looks += 1
            # A loop that never rests would show the interpreter's thread switching, not the engine.
            await asyncio.sleep(0.0005)
        return looks

    _, *looks = await asyncio.gather(write(), look(), look(), look())
    assert min(looks) > 0


async def test_a_write_is_read_by_everyone_once_it_is_answered(engine: Engine) -> None:
    async def write_and_read(key: str) -> None:
        for number in range(10):
            answer = await done(engine, Append(key, [b'{"n": %d}' % number]))
            found = await read(engine, key)
            assert found.head.revision >= answer.revision
            assert list(found.lines)[answer.first_index] == b'{"n": %d}' % number

    await asyncio.gather(*(write_and_read(key) for key in ("a", "b", "a/b", "a")))


async def test_a_cancelled_caller_leaves_the_engine_whole(engine: Engine) -> None:
    """The outcome of a cancelled write is unknown: it happened once or not at all, and a copy finds out."""
    asked = [request(Append("k", [b'{"n": %d}' % n]), n + 1) for n in range(20)]
    tasks = [asyncio.create_task(one(engine, each)) for each in asked]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for each in asked:
        assert isinstance((await one(engine, each)).outcome, Answer)
    assert sorted(await lines(engine, "k")) == sorted(b'{"n": %d}' % n for n in range(20))

"""What every engine must do with copies, request ids and deadlines, and over its start and end."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from engines import DURABLE_KINDS, Clock, done, lines, one, open_kind, read, request, submit
from sessionstored.engine import Engine, Refused, Reply, Request
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Fork,
    Pop,
    Refusal,
)

A, B = (b'{"role": "user", "content": "%s"}' % name for name in (b"a", b"b"))

# Bytes that a careless store would change: spaces, number forms, escapes, order, four-byte characters.
ODD = (
    b'{ "b":1.0,"a" :1E5, "big":9007199254740993 , "e":"\\u00e9\\n\\r" }',
    '{"emoji":"😀", "line":"\u2028", "nul":"\\u0000"}'.encode(),
    b"{}",
)


# Sent again.


async def test_a_copy_gets_the_first_answer(engine: Engine) -> None:
    first = await one(engine, request(Append("k", [A]), 1))
    await done(engine, Append("k", [B]))
    copy = await one(engine, request(Append("k", [A]), 1, age_s=5.0))
    assert (copy.outcome, copy.replayed, first.replayed) == (first.outcome, True, False)
    assert await lines(engine, "k") == [A, B]


async def test_copies_within_one_group_share_one_answer(engine: Engine) -> None:
    asked = request(Append("k", [A]), 1)
    replies = await engine.submit([asked, Request(Append("k", [B])), asked, asked])
    assert replies[0].outcome == replies[2].outcome == replies[3].outcome
    assert [reply.replayed for reply in replies] == [False, False, True, True]
    assert await lines(engine, "k") == [A, B]


async def test_copies_in_flight_share_one_answer(engine: Engine) -> None:
    asked = [request(Append("k", [A]), sequence) for sequence in (1, 2, 1, 1, 2)]
    replies = await asyncio.gather(*(one(engine, each) for each in asked))
    assert len({reply.outcome for reply in replies}) == 2  # type: ignore[type-var]
    assert [reply.replayed for reply in replies].count(False) == 2
    assert await lines(engine, "k") == [A, A]


async def test_a_copy_of_a_pop_gets_the_message_again(engine: Engine) -> None:
    await done(engine, Append("k", [A, B]))
    first = await one(engine, request(Pop("k"), 1))
    copy = await one(engine, request(Pop("k"), 1))
    assert copy.outcome == first.outcome
    assert isinstance(copy.outcome, Answer)
    assert copy.outcome.message == B
    assert await lines(engine, "k") == [A]


async def test_a_copy_of_a_refused_call_is_refused_again(engine: Engine) -> None:
    first = await one(engine, request(Pop("k"), 1))
    await done(engine, Append("k", [A]))
    copy = await one(engine, request(Pop("k"), 1))
    assert isinstance(first.outcome, Refusal)
    assert copy.outcome == first.outcome
    assert await lines(engine, "k") == [A]


async def test_a_call_is_not_used_twice_for_different_things(engine: Engine) -> None:
    await one(engine, request(Append("k", [A]), 1))
    reused = await one(engine, request(Append("k", [B]), 1))
    assert isinstance(reused.outcome, Refusal)
    assert reused.outcome.reason == "CALL_REUSED"
    assert reused.outcome.metadata == {"client_id": "client", "sequence": "1"}
    other_client = await one(engine, request(Append("k", [B]), 1, client="other"))
    assert isinstance(other_client.outcome, Answer)
    assert await lines(engine, "k") == [A, B]


async def test_what_the_client_has_answers_to_is_refused_not_applied(engine: Engine) -> None:
    await engine.submit([request(Append("k", [A]), 1), request(Append("k", [B]), 2, answered_through=1)])
    late = await one(engine, request(Append("k", [A]), 1))
    assert isinstance(late.outcome, Refusal)
    assert late.outcome.reason == "CALL_EXPIRED"
    assert late.outcome.metadata == {"client_id": "client", "sequence": "1"}
    assert await lines(engine, "k") == [A, B]


async def test_a_call_too_old_to_know_is_refused_not_applied(engine: Engine) -> None:
    old = await one(engine, request(Append("k", [A]), 1, age_s=24 * 3600.0))
    assert isinstance(old.outcome, Refusal)
    assert old.outcome.reason == "CALL_EXPIRED"
    assert await engine.count() == 0


async def test_the_window_keeps_1024_calls_of_each_client(engine: Engine) -> None:
    await engine.submit([request(Append("other", [A]), 1, client="other")])
    replies = await engine.submit([request(Append("k", [A]), sequence) for sequence in range(1, 1026)])
    copies = await engine.submit([request(Append("k", [A]), sequence) for sequence in (1, 2, 1025)])
    assert isinstance(copies[0].outcome, Refusal)
    assert copies[0].outcome.reason == "CALL_EXPIRED"
    assert [copy.outcome for copy in copies[1:]] == [replies[1].outcome, replies[1024].outcome]
    assert (await one(engine, request(Append("other", [A]), 1, client="other"))).replayed
    assert len(await lines(engine, "k")) == 1025


async def test_an_old_call_of_a_silent_client_is_never_applied_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    first = await one(engine, request(Append("k", [A]), 1))
    clock.steady_s = 23.9 * 3600
    kept = await one(engine, request(Append("k", [A]), 1, age_s=clock.steady_s))
    assert (kept.outcome, kept.replayed) == (first.outcome, True)
    clock.steady_s = 80 * 3600
    await done(engine, Append("k", [B]))
    # An engine may remember for longer than it must; what it may not is to apply.
    late = await one(engine, request(Append("k", [A]), 1, age_s=clock.steady_s))
    assert late.outcome == first.outcome or getattr(late.outcome, "reason", "") == "CALL_EXPIRED"
    assert await lines(engine, "k") == [A, B]


async def test_a_wall_clock_that_jumps_forgets_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    asked = [request(Append("k", [A]), 1), request(Append("k", [B]), request_id="id")]
    first = await engine.submit(asked)
    for shift in (1_000_000, -1_000_000):
        clock.wall_s = shift
        copies = await engine.submit(asked)
        assert [copy.outcome for copy in copies] == [reply.outcome for reply in first]
    assert await lines(engine, "k") == [A, B]


async def test_a_request_id_is_applied_once_whoever_sends_it(engine: Engine) -> None:
    first = await one(engine, request(Append("k", [A]), 1, request_id="delivery"))
    copy = await one(engine, request(Append("k", [A]), 9, client="other", request_id="delivery"))
    plain = await one(engine, request(Append("k", [A]), request_id="delivery"))
    assert first.outcome == copy.outcome == plain.outcome
    assert [first.replayed, copy.replayed, plain.replayed] == [False, True, True]
    reused = await one(engine, request(Append("k", [B]), request_id="delivery"))
    assert isinstance(reused.outcome, Refusal)
    assert reused.outcome.reason == "REQUEST_ID_REUSED"
    assert reused.outcome.metadata == {"key": "k", "request_id": "delivery"}
    elsewhere = await one(engine, request(Append("other", [B]), request_id="delivery"))
    assert isinstance(elsewhere.outcome, Answer)
    assert await lines(engine, "k") == [A]


async def test_a_request_id_outlives_its_session(engine: Engine) -> None:
    made = await one(engine, request(Append("k", [A]), request_id="made"))
    gone = await one(engine, request(Delete("k"), request_id="gone"))
    again = await engine.submit(
        [request(Delete("k"), request_id="gone"), request(Append("k", [A]), request_id="made")]
    )
    assert [reply.outcome for reply in again] == [gone.outcome, made.outcome]
    assert await engine.count() == 0


async def test_a_refused_request_id_is_free(engine: Engine) -> None:
    asked = request(Pop("k"), request_id="delivery")
    assert isinstance((await one(engine, asked)).outcome, Refusal)
    await done(engine, Append("k", [A]))
    assert isinstance((await one(engine, asked)).outcome, Answer)


async def test_request_ids_within_one_group_and_in_flight_are_applied_once(engine: Engine) -> None:
    asked = request(Append("k", [A]), request_id="delivery")
    replies = await engine.submit([asked, asked])
    replies += await asyncio.gather(*(one(engine, asked) for _ in range(4)))
    assert [reply.replayed for reply in replies] == [False] + [True] * 5
    assert await lines(engine, "k") == [A]


async def test_a_session_keeps_1000_request_ids(engine: Engine) -> None:
    asked = [request(Append("k", [A]), request_id=str(number)) for number in range(1001)]
    await engine.submit(asked)
    await one(engine, request(Append("other", [A]), request_id="0"))
    second, last, first = await engine.submit([asked[1], asked[1000], asked[0]])
    assert (second.replayed, last.replayed, first.replayed) == (True, True, False)


async def test_a_request_id_is_kept_for_24_hours(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    asked = request(Append("k", [A]), request_id="delivery")
    await one(engine, asked)
    clock.steady_s = 23.9 * 3600
    assert (await one(engine, asked)).replayed
    clock.steady_s = 24.1 * 3600
    assert not (await one(engine, asked)).replayed


# Deadlines.


async def test_what_waited_too_long_is_not_applied_and_may_be_sent_again(engine: Engine) -> None:
    late = request(Append("k", [A]), 1, request_id="delivery", deadline_s=0.0)
    in_time = request(Append("k", [B]), deadline_s=asyncio.get_running_loop().time() + 60)
    replies = await engine.submit([late, in_time])
    assert isinstance(replies[0].outcome, Refusal)
    assert replies[0].outcome.reason == "EXPIRED_IN_QUEUE"
    assert isinstance(replies[1].outcome, Answer)
    again = await one(engine, request(Append("k", [A]), 1, request_id="delivery"))
    assert isinstance(again.outcome, Answer)
    assert not again.replayed
    assert await lines(engine, "k") == [B, A]


# Start and end.


async def test_a_closed_engine_refuses(engine: Engine) -> None:
    await done(engine, Append("k", [A]))
    await engine.close()
    with pytest.raises(Refused) as caught:
        await submit(engine, Append("k", [B]))
    assert caught.value.refusal.reason == "SHUTTING_DOWN"


async def test_an_engine_that_works_has_not_failed(engine: Engine) -> None:
    waiting = asyncio.create_task(engine.failed())
    await done(engine, Append("k", [A]))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("kind", DURABLE_KINDS)
async def test_everything_is_there_again_after_a_restart(kind: str, tmp_path: Path) -> None:
    engine = await open_kind(kind, tmp_path)
    store_id = engine.store_id
    answers = await engine.submit(
        [
            request(Create("k", [*ODD, A, B], b'{"a": 1E5}', 2), 1),
            request(Append("gone", [A]), 2, request_id="delivery"),
            request(Pop("k"), 3),
            request(Delete("gone"), 4),
            request(Fork("fork", "k", 2), 5),
            request(Pop("none"), 6),
        ]
    )
    before = [await read(engine, key) for key in ("k", "fork")]
    await engine.close()
    engine = await open_kind(kind, tmp_path)
    try:
        assert engine.store_id == store_id
        assert [await read(engine, key) for key in ("k", "fork")] == before
        assert await engine.count() == 2
        copies = await engine.submit(
            [
                request(Create("k", [*ODD, A, B], b'{"a": 1E5}', 2), 1),
                request(Append("gone", [A]), 2, request_id="delivery"),
                request(Pop("k"), 3),
                request(Append("gone", [A]), request_id="delivery"),
                request(Pop("none"), 6),
            ]
        )
        assert [copy.outcome for copy in copies] == [answers[index].outcome for index in (0, 1, 2, 1, 5)]
        gone = answers[3].outcome
        assert isinstance(gone, Answer)
        again = await done(engine, Append("gone", [B]))
        assert again.revision > gone.revision
    finally:
        await engine.close()


@pytest.mark.parametrize("kind", DURABLE_KINDS)
async def test_a_copy_that_waited_on_its_way_is_not_applied_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its age is as of when it was sent: young enough to be taken, when its window is old enough to go."""
    clock = Clock(monkeypatch)
    engine = await open_kind(kind, tmp_path)
    first = await one(engine, request(Append("k", [A]), 1))
    clock.steady_s = 24.5 * 3600
    await done(engine, Append("other", [B]))
    await engine.close()
    engine = await open_kind(kind, tmp_path)
    try:
        late = await one(engine, request(Append("k", [A]), 1, age_s=23.9 * 3600))
        assert late.outcome == first.outcome or getattr(late.outcome, "reason", "") == "CALL_EXPIRED"
        assert await lines(engine, "k") == [A]
    finally:
        await engine.close()


@pytest.mark.parametrize("kind", DURABLE_KINDS)
async def test_what_is_answered_while_the_engine_closes_is_stored(kind: str, tmp_path: Path) -> None:
    engine = await open_kind(kind, tmp_path)

    async def write(number: int) -> int | None:
        await asyncio.sleep(number * 0.0005)
        try:
            await done(engine, Append("k", [b'{"n": %d}' % number]))
        except Refused as caught:
            reasons.add(caught.refusal.reason)
            return None
        return number

    reasons: set[str] = set()
    await done(engine, Create("k"))
    writers = [asyncio.create_task(write(number)) for number in range(40)]
    await asyncio.sleep(0.01)
    await engine.close()
    answered = [number for number in await asyncio.gather(*writers) if number is not None]
    assert reasons <= {"SHUTTING_DOWN"}
    engine = await open_kind(kind, tmp_path)
    try:
        assert sorted(await lines(engine, "k")) == sorted(b'{"n": %d}' % number for number in answered)
    finally:
        await engine.close()


async def test_a_late_copy_of_an_answered_call_gets_its_answer_and_not_that_nothing_was_stored(
    engine: Engine,
) -> None:
    first = await one(engine, request(Append("k", [A]), 1))
    late = replace(request(Append("k", [A]), 1), deadline_s=0.0)
    assert await one(engine, late) == Reply(first.outcome, replayed=True)
    assert await lines(engine, "k") == [A]

"""What every engine must do with mutations: one suite, run over each of them."""

from dataclasses import replace

import pytest
from engines import Clock, done, lines, read, refused, submit
from model import METADATA_KEYS
from sessionstored.engine import Engine, Refused
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Fork,
    Head,
    Mutation,
    Pop,
    Replace,
    Update,
    tail_start,
)

A, B, C, D = (b'{"role": "user", "content": "%s"}' % name for name in (b"a", b"b", b"c", b"d"))

# Bytes that a careless store would change: spaces, number forms, escapes, order, four-byte characters.
ODD = (
    b'{ "b":1.0,"a" :1E5, "big":9007199254740993 , "e":"\\u00e9\\n\\r" }',
    '{"emoji":"😀", "line":"\u2028", "nul":"\\u0000"}'.encode(),
    b"{}",
)


# One mutation.


async def test_an_append_creates_the_session(engine: Engine) -> None:
    first = await done(engine, Append("k", [A, B]))
    assert (first.previous_revision, first.message_count, first.first_index) == (0, 2, 0)
    second = await done(engine, Append("k", [C]))
    assert (second.previous_revision, second.message_count, second.first_index) == (first.revision, 3, 2)
    assert second.revision > first.revision > 0
    assert await lines(engine, "k") == [A, B, C]


async def test_messages_come_back_as_their_bytes(engine: Engine) -> None:
    await done(engine, Append("k", ODD))
    assert await lines(engine, "k") == list(ODD)


async def test_create_takes_everything(engine: Engine) -> None:
    metadata = '{"title": "ключ", "n": 1E5}'.encode()
    answer = await done(engine, Create("k", [A, B], metadata, 1, create_time_us=1_700_000_000_000_000))
    assert (answer.previous_revision, answer.message_count, answer.last_consolidated) == (0, 2, 1)
    found = await read(engine, "k")
    assert found.head == Head(
        "k",
        answer.revision,
        found.head.rewrite_revision,
        2,
        1,
        metadata,
        1_700_000_000_000_000,
        answer.update_time_us,
    )
    assert found.lines == [A, B]


async def test_an_empty_session_is_a_session(engine: Engine) -> None:
    await done(engine, Create("k"))
    found = await read(engine, "k")
    assert (found.head.message_count, list(found.lines), found.head.metadata) == (0, [], b"{}")
    assert (await refused(engine, Create("k"))).reason == "SESSION_EXISTS"
    assert (await refused(engine, Pop("k"))).reason == "INDEX_OUT_OF_RANGE"


@pytest.mark.parametrize(
    ("start", "delete_count", "new", "left", "consolidated"),
    [
        (2, None, [], [A, B], 2),
        (0, None, [], [], 0),
        (1, 1, [D], [A, D, C], 3),
        (1, 0, [D, D], [A, D, D, B, C], 3),
        (0, 2, [], [C], 1),
        (3, None, [D], [A, B, C, D], 3),
        (0, None, [D], [D], 1),
        (1, 1, [A, B, C, D], [A, A, B, C, D, C], 3),
        (3, 0, [], [A, B, C], 3),
    ],
)
async def test_replace(
    engine: Engine,
    start: int,
    delete_count: int | None,
    new: list[bytes],
    left: list[bytes],
    consolidated: int,
) -> None:
    made = await done(engine, Create("k", [A, B, C], last_consolidated=3))
    answer = await done(engine, Replace("k", start, delete_count, new, expected_revision=made.revision))
    assert (answer.message_count, answer.last_consolidated) == (len(left), consolidated)
    assert (answer.revision > made.revision) == (left != [A, B, C])
    assert await lines(engine, "k") == left
    await done(engine, Append("k", [D]))
    assert await lines(engine, "k") == [*left, D]


async def test_a_replacement_that_allows_appends_keeps_what_was_added_meanwhile(engine: Engine) -> None:
    made = await done(engine, Create("k", [A, B, C]))
    edit = Replace("k", 0, 2, [D], made.revision, allow_appends=True)
    await submit(engine, Append("k", [A]), Update("k", last_consolidated=4), Replace("k", 4, 0, [B]))
    assert (await refused(engine, replace(edit, allow_appends=False))).reason == "REVISION_CONFLICT"
    answer = await done(engine, edit)
    assert (answer.message_count, answer.last_consolidated) == (4, 4)
    assert await lines(engine, "k") == [D, C, A, B]
    assert (await refused(engine, edit)).reason == "REVISION_CONFLICT"  # its own change was no append
    for step in (Pop("k"), Replace("k", 0, 0, [B])):
        seen = (await read(engine, "k")).head.revision
        await done(engine, step)
        stale = Replace("k", 0, 1, [], seen, allow_appends=True)
        assert (await refused(engine, stale)).reason == "REVISION_CONFLICT"
    await submit(engine, Delete("k"), Append("k", [A, B, C]))
    assert (await refused(engine, edit)).reason == "REVISION_CONFLICT"


async def test_pop_gives_the_last_message_until_there_is_none(engine: Engine) -> None:
    await done(engine, Create("k", ODD, last_consolidated=2))
    for count, message in ((2, ODD[2]), (1, ODD[1]), (0, ODD[0])):
        answer = await done(engine, Pop("k"))
        assert (answer.message, answer.message_count) == (message, count)
        assert answer.last_consolidated == min(2, count)
    assert (await refused(engine, Pop("k"))).reason == "INDEX_OUT_OF_RANGE"
    await done(engine, Append("k", [A]))
    assert (await done(engine, Pop("k"))).message == A


async def test_update_changes_the_head_and_no_message(engine: Engine) -> None:
    made = await done(engine, Create("k", [A, B], b'{"a": 1, "b": 2E1}'))
    answer = await done(engine, Update("k", members={"a": None, "c.d": b'"x"'}, last_consolidated=2))
    assert answer.revision > made.revision
    found = await read(engine, "k")
    assert found.head.metadata == b'{"b": 2E1, "c.d": "x"}'
    assert found.head.last_consolidated == 2
    assert found.lines == [A, B]
    again = await done(engine, Update("k", members={"c.d": b'"x"'}, last_consolidated=2))
    assert (again.revision, again.update_time_us) == (answer.revision, answer.update_time_us)
    whole = await done(engine, Update("k", metadata=b'{"z":0}'))
    assert whole.revision > answer.revision
    assert (await read(engine, "k")).head.metadata == b'{"z":0}'


@pytest.mark.parametrize(("at", "copied"), [(None, [A, B, C]), (3, [A, B, C]), (2, [A, B]), (0, [])])
async def test_a_fork_goes_its_own_way(engine: Engine, at: int | None, copied: list[bytes]) -> None:
    source = await done(engine, Create("source", [A, B, C], b'{"a": 1}', 3))
    fork = await done(engine, Fork("fork", "source", at, expected_revision=source.revision))
    assert (fork.previous_revision, fork.message_count) == (0, len(copied))
    assert fork.last_consolidated == len(copied)
    await submit(engine, Replace("source", 0, 1, [D]), Append("fork", [D]))
    found = await read(engine, "fork")
    assert (found.lines, found.head.metadata) == ([*copied, D], b'{"a": 1}')
    assert await lines(engine, "source") == [D, B, C]
    await done(engine, Delete("source"))
    assert await lines(engine, "fork") == [*copied, D]


async def test_a_recreated_session_has_nothing_of_the_old_one(engine: Engine) -> None:
    old = await done(engine, Create("k", [A, B, C], b'{"a": 1}', 3))
    gone = await done(engine, Delete("k"))
    assert gone.revision > old.revision
    assert (gone.message_count, gone.last_consolidated) == (0, 0)
    with pytest.raises(Refused) as caught:
        await read(engine, "k")
    assert caught.value.refusal.reason == "SESSION_NOT_FOUND"
    new = await done(engine, Append("k", [D]))
    assert new.revision > gone.revision
    assert new.previous_revision == 0
    found = await read(engine, "k")
    assert (found.lines, found.head.metadata, found.head.last_consolidated) == ([D], b"{}", 0)
    assert tail_start(found.head, old.revision, 3) == 0


async def test_a_reader_gets_the_tail_only_where_it_is_right(engine: Engine) -> None:
    held = await done(engine, Create("k", [A]))
    await submit(engine, Append("k", [B]), Replace("k", 2, None, [C]), Update("k", last_consolidated=1))
    head = (await read(engine, "k")).head
    assert tail_start(head, held.revision, 1) == 1
    await done(engine, Pop("k"))
    head = (await read(engine, "k")).head
    assert tail_start(head, held.revision, 1) == 0


REFUSED: list[tuple[Mutation, str]] = [
    (Create("k"), "SESSION_EXISTS"),
    (Create("new", [A], last_consolidated=2), "LAST_CONSOLIDATED_OUT_OF_RANGE"),
    (Create("new", create_time_us=1 << 60), "ARGUMENT_INVALID"),
    (Append("k", [D], expected_revision=0), "REVISION_CONFLICT"),
    (Append("new", [D], expected_revision=1), "REVISION_CONFLICT"),
    (Replace("new", 0, None, []), "SESSION_NOT_FOUND"),
    (Replace("k", 0, None, [], expected_revision=1 << 40), "REVISION_CONFLICT"),
    (Replace("k", 3, None, [D]), "INDEX_OUT_OF_RANGE"),
    (Replace("k", 1, 2, [D]), "INDEX_OUT_OF_RANGE"),
    (Pop("new"), "SESSION_NOT_FOUND"),
    (Pop("k", expected_revision=1 << 40), "REVISION_CONFLICT"),
    (Update("new", metadata=b"{}"), "SESSION_NOT_FOUND"),
    (Update("k", metadata=b"{}", expected_revision=1 << 40), "REVISION_CONFLICT"),
    (Update("k", last_consolidated=3), "LAST_CONSOLIDATED_OUT_OF_RANGE"),
    (Update("k", metadata=b'{"a": "%s"}' % (b"x" * 262_144)), "METADATA_TOO_LARGE"),
    (Fork("k", "other"), "SESSION_EXISTS"),
    (Fork("k", "k"), "SESSION_EXISTS"),
    (Fork("new", "new"), "SESSION_NOT_FOUND"),
    (Fork("new", "none"), "SESSION_NOT_FOUND"),
    (Fork("new", "k", 3), "INDEX_OUT_OF_RANGE"),
    (Fork("new", "k", expected_revision=0), "REVISION_CONFLICT"),
    (Delete("new"), "SESSION_NOT_FOUND"),
    (Delete("k", expected_revision=1 << 40), "REVISION_CONFLICT"),
]


async def test_a_refusal_stores_nothing_and_says_why(engine: Engine) -> None:
    await submit(engine, Create("k", [A, B], b'{"a": 1}', 1), Create("other", [C]))
    before = await read(engine, "k")
    for mutation, reason in REFUSED:
        refusal = await refused(engine, mutation)
        assert (mutation, refusal.reason) == (mutation, reason)
        assert set(refusal.metadata) == METADATA_KEYS[reason]
    assert await read(engine, "k") == before
    assert await engine.count() == 2


async def test_a_conflict_tells_where_the_session_is(engine: Engine) -> None:
    made = await done(engine, Append("k", [A, B]))
    refusal = await refused(engine, Append("k", [C], expected_revision=made.revision + 1))
    assert refusal.metadata == {
        "key": "k",
        "expected_revision": str(made.revision + 1),
        "revision": str(made.revision),
        "message_count": "2",
    }


async def test_update_time_does_not_go_back_with_the_clock(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    times, revisions = [], []
    for shift in (0, 3600, -3600, -100_000, 50, 7200):
        clock.wall_s = shift
        answer = await done(engine, Append("k", [A]))
        times.append(answer.update_time_us)
        revisions.append(answer.revision)
        head = (await read(engine, "k")).head
        assert head.update_time_us == answer.update_time_us
    assert times == sorted(times)
    assert times[1] == times[4]
    assert times[5] > times[4]
    assert revisions == sorted(set(revisions))


# Keys.

LONG_KEYS = ["x" * 512, "ключ/✓" * 20, "a" + "/b" * 250]
KEYS = ["a:b", "a/b", "a_b", "A:B", "..", ".", "/", "con", "k.jsonl", "%41", "A", " ", *LONG_KEYS]


async def test_keys_that_look_alike_are_sessions_of_their_own(engine: Engine) -> None:
    for number, key in enumerate(KEYS):
        await done(engine, Append(key, [b'{"n": %d}' % number]))
    assert await engine.count() == len(KEYS)
    for number, key in enumerate(KEYS):
        found = await read(engine, key)
        assert (found.head.key, list(found.lines)) == (key, [b'{"n": %d}' % number])


# Groups.


async def test_a_refused_member_leaves_the_group_alone(engine: Engine) -> None:
    outcomes = await submit(
        engine,
        Append("k", [A]),
        Delete("none"),
        Append("k", [B], expected_revision=1 << 40),
        Append("k", [B]),
        Create("k"),
        Append("other", [C]),
        Pop("other"),
        Pop("other"),
        Append("k", [C]),
    )
    assert [getattr(outcome, "reason", "") for outcome in outcomes] == [
        "",
        "SESSION_NOT_FOUND",
        "REVISION_CONFLICT",
        "",
        "SESSION_EXISTS",
        "",
        "",
        "INDEX_OUT_OF_RANGE",
        "",
    ]
    assert await lines(engine, "k") == [A, B, C]
    assert await lines(engine, "other") == []


async def test_a_group_sees_its_own_changes_in_order(engine: Engine) -> None:
    outcomes = await submit(
        engine,
        Create("k", [A, B, C]),
        Fork("fork", "k", 2),
        Replace("k", 0, 1, [D]),
        Fork("late", "k"),
        Pop("k"),
        Delete("k"),
        Append("k", [A], expected_revision=0),
        Fork("again", "k"),
        Delete("fork"),
        Create("fork", [D]),
    )
    assert all(isinstance(outcome, Answer) for outcome in outcomes), outcomes
    assert isinstance(outcomes[4], Answer)
    assert outcomes[4].message == C
    contents = {key: await lines(engine, key) for key in ("k", "fork", "late", "again")}
    assert contents == {"k": [A], "fork": [D], "late": [D, B, C], "again": [A]}
    revisions = [outcome.revision for outcome in outcomes if isinstance(outcome, Answer)]
    assert revisions == sorted(set(revisions))


async def test_an_empty_group_is_answered(engine: Engine) -> None:
    assert await engine.submit([]) == []


async def test_a_group_of_many_sessions(engine: Engine) -> None:
    outcomes = await submit(engine, *(Append(f"k{number % 300}", [A]) for number in range(1500)))
    assert all(isinstance(outcome, Answer) for outcome in outcomes)
    assert await engine.count() == 300
    assert await lines(engine, "k299") == [A] * 5

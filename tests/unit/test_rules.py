"""The rules against the naive model, over random histories; and the cases that these may not meet."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import METADATA_KEYS, Model, Session, mutations
from sessionstored.retention import NEVER_US, Retention
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Decision,
    Delete,
    Expire,
    Fork,
    Head,
    Limits,
    Mutation,
    Pop,
    Refusal,
    Replace,
    Update,
    decide,
    ends,
    expire,
    expired,
    split_members,
    tail_start,
)

LIMITS = Limits(metadata_bytes_max=100)
HEAD = Head("k", 10, 8, 4, 2, b'{"a": 1}', 1_000, 2_000)


class Store:
    """The least that an engine can be: heads, lines, and a revision that only grows."""

    def __init__(self) -> None:
        self.heads: dict[str, Head] = {}
        self.lines: dict[str, list[bytes]] = {}
        self.revision = 0
        self.held: dict[str, list[tuple[int, list[bytes], bool]]] = {}
        """Per key what readers hold: revision, messages, and whether nothing but additions came since."""

    def submit(self, mutation: Mutation, now_us: int, gap: int) -> Decision:
        self.revision += gap
        source = self.heads.get(mutation.source_key) if isinstance(mutation, Fork) else None
        decision = decide(
            self.heads.get(mutation.key),
            mutation,
            revision=self.revision,
            now_us=now_us,
            source=source,
            limits=LIMITS,
        )
        if decision.change is None:
            return decision
        key, change = mutation.key, decision.change
        if change.head is None:
            del self.heads[key], self.lines[key]
            self._note(key, added_only=False)
            return decision
        lines = self.lines.setdefault(key, [])
        added_only = change.start == len(lines) and bool(change.messages)
        unchanged = not change.delete_count and not change.messages
        lines[change.start : change.start + change.delete_count] = change.messages
        if isinstance(mutation, Fork):
            lines[:] = self.lines[mutation.source_key][: change.head.message_count]
        self.heads[key] = change.head
        self._note(key, added_only=added_only or (unchanged and isinstance(mutation, Update)))
        self.held[key].append((change.head.revision, list(lines), True))
        return decision

    def _note(self, key: str, added_only: bool) -> None:
        self.held[key] = [
            (revision, lines, whole and added_only) for revision, lines, whole in self.held.get(key, [])
        ]


# A clock that jumps both ways.
_times = st.integers(0, 5_000)
_create_times = st.none() | st.none() | _times


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(mutations(_create_times), _times, st.integers(1, 3)), max_size=25))
def test_history_agrees_with_the_model(steps: list[tuple[Mutation, int, int]]) -> None:
    store, model = Store(), Model(LIMITS.metadata_bytes_max)
    for asked, now_us, gap in steps:
        mutation = model.resolve(asked)
        before = dict(store.heads)
        decision = store.submit(mutation, now_us, gap)
        pop = isinstance(mutation, Pop) and isinstance(decision.outcome, Answer)
        outcome = decision.outcome
        if pop:
            assert isinstance(outcome, Answer)
            outcome = replace(outcome, message=model.sessions[mutation.key].messages[-1])
        model.check(mutation, outcome, now_us, now_us)
        if decision.change is None:
            assert store.heads == before
        assert store.heads.keys() == model.sessions.keys()
        for key, session in model.sessions.items():
            head = store.heads[key]
            assert store.lines[key] == session.messages
            assert head == Head(
                key,
                session.revision,
                head.rewrite_revision,
                len(session.messages),
                session.last_consolidated,
                session.metadata,
                session.create_time_us or 0,
                session.update_time_us,
            )
            assert 0 <= head.last_consolidated <= head.message_count
            assert 0 < head.rewrite_revision <= head.revision


@settings(max_examples=100, deadline=None)
@given(st.lists(mutations(), max_size=25))
def test_what_a_reader_holds_and_its_tail_make_the_session(steps: list[Mutation]) -> None:
    store, model = Store(), Model(LIMITS.metadata_bytes_max)
    for asked in steps:
        # The model resolves revisions only: it follows the store's heads.
        for key, head in store.heads.items():
            model.sessions.setdefault(key, Session()).revision = head.revision
        for key in set(model.sessions) - set(store.heads):
            del model.sessions[key]
        store.submit(model.resolve(asked), 1, 1)
        for key, head in store.heads.items():
            lines = store.lines[key]
            assert tail_start(head, 0, 0) == 0
            for revision, held, additions_only in store.held[key]:
                start = tail_start(head, revision, len(held))
                assert held[:start] + lines[start:] == lines
                assert start == (len(held) if additions_only else 0), "the tail is longer than it must be"
                edit = Replace(key, 0, len(held), [b'{"edited": 1}'], revision, allow_appends=True)
                outcome = decide(head, edit, revision=head.revision + 1, now_us=1).outcome
                assert isinstance(outcome, Answer) == additions_only, "an edit beside appends only is taken"


@pytest.mark.parametrize(
    ("known_revision", "known_count", "start"),
    [
        (10, 4, 4),
        (10, 2, 2),
        (9, 3, 3),
        (8, 1, 1),
        (7, 1, 0),  # rewritten since
        (11, 4, 0),  # not a revision of this session, or of its future
        (10, 5, 0),  # more than there is
        (0, 0, 0),
    ],
)
def test_tail_start(known_revision: int, known_count: int, start: int) -> None:
    assert tail_start(HEAD, known_revision, known_count) == start


def test_refusals_carry_the_documented_metadata_and_a_sentence() -> None:
    asked: list[tuple[Head | None, Mutation, str]] = [
        (HEAD, Create("k"), "SESSION_EXISTS"),
        (HEAD, Fork("k", "other"), "SESSION_EXISTS"),
        (None, Fork("k", "other"), "SESSION_NOT_FOUND"),
        (None, Delete("k"), "SESSION_NOT_FOUND"),
        (None, Create("k", expected_revision=3), "REVISION_CONFLICT"),
        (None, Append("k", [b"{}"], expected_revision=3), "REVISION_CONFLICT"),
        (HEAD, Append("k", [b"{}"], expected_revision=0), "REVISION_CONFLICT"),
        (HEAD, Replace("k", 0, 1, [], expected_revision=8), "REVISION_CONFLICT"),
        (HEAD, Replace("k", 0, 1, [], expected_revision=7, allow_appends=True), "REVISION_CONFLICT"),
        (HEAD, Replace("k", 0, 1, [], expected_revision=11, allow_appends=True), "REVISION_CONFLICT"),
        (None, Replace("k", 0, 1, [], expected_revision=8, allow_appends=True), "SESSION_NOT_FOUND"),
        (None, Create("k", last_consolidated=1), "LAST_CONSOLIDATED_OUT_OF_RANGE"),
        (None, Create("k", create_time_us=5_001), "ARGUMENT_INVALID"),
        (HEAD, Replace("k", 5, None, []), "INDEX_OUT_OF_RANGE"),
        (replace(HEAD, message_count=0), Pop("k"), "INDEX_OUT_OF_RANGE"),
        (HEAD, Replace("k", 3, 2, []), "INDEX_OUT_OF_RANGE"),
        (HEAD, Update("k", last_consolidated=5), "LAST_CONSOLIDATED_OUT_OF_RANGE"),
        (HEAD, Update("k", metadata=b'{"a": "%s"}' % (b"x" * 100)), "METADATA_TOO_LARGE"),
    ]
    for head, mutation, reason in asked:
        decision = decide(head, mutation, revision=11, now_us=5_000, limits=LIMITS)
        outcome = decision.outcome
        assert isinstance(outcome, Refusal)
        assert decision.change is None
        assert outcome.reason == reason
        assert set(outcome.metadata) == METADATA_KEYS[reason]
        assert outcome.message
        assert outcome.reason not in outcome.message


def test_the_order_of_checks_is_existence_then_revision_then_range() -> None:
    stale = decide(HEAD, Replace("k", 99, None, [], expected_revision=1), revision=11, now_us=1)
    missing = decide(None, Replace("k", 99, None, [], expected_revision=1), revision=11, now_us=1)
    assert isinstance(stale.outcome, Refusal)
    assert stale.outcome.reason == "REVISION_CONFLICT"
    assert isinstance(missing.outcome, Refusal)
    assert missing.outcome.reason == "SESSION_NOT_FOUND"


def test_a_fork_is_guarded_by_its_source() -> None:
    source = replace(HEAD, key="source")
    fork = Fork("new", "source", at=1, expected_revision=10)
    made = decide(None, fork, revision=11, now_us=5_000, source=source)
    assert made.outcome == Answer(11, 0, 1, 1, 5_000)
    assert made.change is not None
    assert made.change.head == Head("new", 11, 11, 1, 1, b'{"a": 1}', 5_000, 5_000)
    stale = decide(None, replace(fork, expected_revision=9), revision=11, now_us=5_000, source=source)
    assert isinstance(stale.outcome, Refusal)
    assert stale.outcome.metadata["key"] == "source"
    beyond = decide(None, Fork("new", "source", at=5), revision=11, now_us=1, source=source)
    assert isinstance(beyond.outcome, Refusal)
    assert beyond.outcome.metadata == {"field": "at", "index": "5", "message_count": "4"}


def test_a_fork_does_not_inherit_damage() -> None:
    source = replace(HEAD, key="source", damage="the last line was torn")
    made = decide(None, Fork("new", "source"), revision=11, now_us=1, source=source)
    assert made.change is not None
    assert made.change.head is not None
    assert made.change.head.damage == ""


def test_damage_stays_named_through_changes() -> None:
    damaged = replace(HEAD, damage="the last line was torn")
    for mutation in (Append("k", [b"{}"]), Pop("k"), Update("k", metadata=b"{}")):
        change = decide(damaged, mutation, revision=11, now_us=1).change
        assert change is not None
        assert change.head is not None
        assert change.head.damage == damaged.damage


def test_a_removal_leaves_nothing_and_has_a_revision_of_its_own() -> None:
    gone = decide(HEAD, Delete("k", expected_revision=10), revision=12, now_us=1_500)
    assert gone.outcome == Answer(12, 10, 0, 0, 2_000)
    assert gone.change is not None
    assert gone.change.head is None
    assert gone.change.delete_count == 4


def test_replacing_nothing_by_nothing_changes_nothing() -> None:
    for start in range(5):
        decision = decide(HEAD, Replace("k", start, 0, []), revision=11, now_us=9_000)
        assert decision == Decision(Answer(10, 10, 4, 2, 2_000, start))


def test_a_replace_at_the_end_is_an_append_to_readers() -> None:
    change = decide(HEAD, Replace("k", 4, None, [b"{}"]), revision=11, now_us=9_000).change
    assert change is not None
    assert change.head is not None
    assert change.head.rewrite_revision == 8
    change = decide(HEAD, Replace("k", 3, None, [b"{}"]), revision=11, now_us=9_000).change
    assert change is not None
    assert change.head is not None
    assert change.head.rewrite_revision == 11


# Metadata: what is not named keeps its bytes.


@pytest.mark.parametrize(
    "value",
    [
        "1E5",
        "1e999",
        "-0.0",
        "0.1234567890123456789012345",
        "9" * 5000,
        '"\\u00e9 é \\ud83d\\ude00 {,}:\\""',
        '"\\ud800"',
        "[ ]",
        '{ "b" :[1 ,2.50], "b": {} }',
        "null",
        "NaN",
    ],
)
def test_members_that_are_not_named_keep_their_bytes(value: str) -> None:
    head = replace(HEAD, metadata=f'{{"first": {value} ,"a":1}}'.encode())
    update = Update("k", members={"a": b"2.0", "\u043a.\"": b"[1]"})
    change = decide(head, update, revision=11, now_us=1).change
    assert change is not None
    assert change.head is not None
    assert change.head.metadata == f'{{"first": {value}, "a": 2.0, "\u043a.\\"": [1]}}'.encode()


def test_members_are_split_as_they_stand() -> None:
    assert split_members(b"{}") == {}
    assert split_members(b" \t{ } ") == {}
    assert split_members(b'{"a":1,"":{"a":"}"} , "a" : 1.50 }') == {"a": b"1.50", "": b'{"a":"}"}'}


def test_half_a_surrogate_pair_in_an_adopted_name_survives() -> None:
    head = replace(HEAD, metadata=b'{"\\ud800": 1}')
    change = decide(head, Update("k", members={"b": b"2"}), revision=11, now_us=1).change
    assert change is not None
    assert change.head is not None
    assert change.head.metadata == b'{"\\ud800": 1, "b": 2}'


@pytest.mark.parametrize(
    "update",
    [
        Update("k"),
        Update("k", metadata=b'{"a":1, "b": [1.0]}'),
        Update("k", members={"a": b"1"}),
        Update("k", members={"missing": None}),
        Update("k", members={"a": b"1", "missing": None, "b": b"[1.0]"}),
        Update("k", last_consolidated=2),
    ],
)
def test_an_update_to_what_is_there_keeps_the_revision(update: Update) -> None:
    head = replace(HEAD, metadata=b'{"a":1, "b": [1.0]}')
    assert decide(head, update, revision=11, now_us=9_000) == Decision(Answer(10, 10, 4, 2, 2_000))


def test_members_apply_after_the_whole() -> None:
    update = Update("k", metadata=b'{"x": 1, "y": 2}', members={"x": None, "z": b"3"})
    change = decide(HEAD, update, revision=11, now_us=1).change
    assert change is not None
    assert change.head is not None
    assert change.head.metadata == b'{"y": 2, "z": 3}'


def test_metadata_over_the_limit_blocks_no_other_change() -> None:
    head = replace(HEAD, metadata=json.dumps({"a": "x" * 200}).encode())
    moved = decide(head, Update("k", last_consolidated=3), revision=11, now_us=1, limits=LIMITS)
    assert isinstance(moved.outcome, Answer)
    assert moved.outcome.last_consolidated == 3
    grown = decide(head, Update("k", members={"b": b"1"}), revision=11, now_us=1, limits=LIMITS)
    assert isinstance(grown.outcome, Refusal)
    assert grown.outcome.metadata == {"size_bytes": "217", "limit_bytes": "100"}


def test_metadata_at_the_limit_is_taken() -> None:
    exact = b'{"a": "%s"}' % (b"x" * 92)
    assert len(exact) == 101
    too_large = decide(HEAD, Update("k", metadata=exact), revision=11, now_us=1, limits=LIMITS)
    assert isinstance(too_large.outcome, Refusal)
    update = Update("k", metadata=exact.replace(b"xx", b"x", 1))
    fits = decide(HEAD, update, revision=11, now_us=1, limits=LIMITS)
    assert isinstance(fits.outcome, Answer)


# Sessions that end by themselves.

RULED = Limits(metadata_bytes_max=100, retention=Retention.of({"k": 10}))


def decided(mutation: Mutation, head: Head | None = HEAD, limits: Limits = LIMITS, **named: int) -> Decision:
    return decide(head, mutation, revision=11, **{"now_us": 9_000, **named}, limits=limits)


def test_a_session_gets_its_expire_time_and_keeps_it_over_other_changes():
    made = decided(Create("k", expire_time_us=10_000), None)
    assert isinstance(made.outcome, Answer)
    assert (made.outcome.ends_us, made.change and made.change.head and made.change.head.expire_time_us) == (
        10_000, 10_000,
    )  # fmt: skip
    head = replace(HEAD, expire_time_us=10_000)
    for change in (Append("k", [b"{}"]), Pop("k"), Replace("k", 0, 1, []), Update("k", last_consolidated=1)):
        found = decided(change, head)
        assert found.change is not None
        assert found.change.head is not None
        assert found.change.head.expire_time_us == 10_000
        assert isinstance(found.outcome, Answer)
        assert found.outcome.ends_us == 10_000


@pytest.mark.parametrize(("new", "ends_us"), [(12_000, 12_000), (NEVER_US, 0)])
def test_an_update_sets_it(new: int, ends_us: int):
    found = decided(Update("k", expire_time_us=new), replace(HEAD, expire_time_us=10_000))
    assert found.change is not None
    assert found.change.head == replace(
        HEAD, expire_time_us=new, revision=11, update_time_us=9_000
    )
    assert isinstance(found.outcome, Answer)
    assert found.outcome.ends_us == ends_us
    again = decided(Update("k", expire_time_us=new), found.change.head)
    assert again.change is None
    assert isinstance(again.outcome, Answer)
    assert (again.outcome.revision, again.outcome.ends_us) == (11, ends_us)


def test_it_lies_in_the_future_of_the_trusted_clock():
    for mutation in (Create("new", expire_time_us=8_000), Update("k", expire_time_us=8_000)):
        head = HEAD if isinstance(mutation, Update) else None
        past = decided(mutation, head, trusted_us=8_000)
        assert past.change is None
        assert isinstance(past.outcome, Refusal)
        assert (past.outcome.reason, past.outcome.metadata["field"]) == ("ARGUMENT_INVALID", "expire_time")
        assert decided(mutation, head, trusted_us=7_999).change is not None


def test_a_fork_has_none_of_its_own():
    found = decide(
        None, Fork("new", "k"), revision=11, now_us=9_000, limits=LIMITS,
        source=replace(HEAD, expire_time_us=10_000),
    )  # fmt: skip
    assert found.change is not None
    assert found.change.head is not None
    assert found.change.head.expire_time_us == 0
    assert isinstance(found.outcome, Answer)
    assert found.outcome.ends_us == 0


def test_a_rule_goes_by_the_last_change():
    found = decided(Append("k", [b"{}"]), limits=RULED)
    assert isinstance(found.outcome, Answer)
    assert found.outcome.ends_us == 9_000 + 10_000_000
    assert ends(HEAD, RULED) == 2_000 + 10_000_000
    assert ends(replace(HEAD, expire_time_us=5), RULED) == 5
    assert ends(replace(HEAD, expire_time_us=NEVER_US), RULED) == 0


def test_expiry_is_of_those_only_whose_time_has_come():
    assert expired(HEAD, 10_002_000, RULED)
    assert not expired(HEAD, 10_001_999, RULED)
    assert not expired(HEAD, 1 << 60, LIMITS)
    assert decided(Expire("k"), limits=LIMITS) == Decision(Answer(10, 10, 4, 2, 2_000))
    gone = decided(Expire("k"), None)
    assert isinstance(gone.outcome, Refusal)
    assert gone.outcome.reason == "SESSION_NOT_FOUND"
    assert expire(HEAD, 11, 9_000) == decided(Delete("k"))

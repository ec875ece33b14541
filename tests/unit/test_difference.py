"""What a save sends, and what a merge gives: the pure part, against random lists and random edits."""

import copy
import json
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessionstore import codec
from sessionstore._difference import (
    RUN,
    Append,
    Baseline,
    Create,
    Local,
    Replace,
    Update,
    changed_range,
    merge,
    next_step,
)

LEAVES = st.sampled_from(["", "x", "é🚀", "1", 0, 1, True, False, None, 1.0, 0.0, -0.0, 2**53 + 1, 0.1])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.dictionaries(st.sampled_from(["role", "content", "a", "b"]), VALUES, max_size=4)
LISTS = st.lists(MESSAGES, max_size=12)
LINES = st.lists(st.sampled_from([b"{}", b'{"a":1}', b'{"a":2}', b'{"a":3}']), max_size=8)


def known(messages: list[Any], revision: int = 1) -> Baseline:
    """The baseline of an object that has just been read."""
    baseline = Baseline()
    baseline.read(revision, Local([codec.encode(message) for message in messages], {}, 0))
    baseline.watch(messages)
    return baseline


def local(lines: list[bytes], consolidated: int = 0, **members: str) -> Local:
    return Local(lines, members, consolidated)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indexes of the messages that are encoded from now on."""
    encoded: list[int] = []
    encode = codec.encode

    def spy(message: Any, index: int = -1) -> bytes:
        if index >= 0:
            encoded.append(index)
        return encode(message, index)

    monkeypatch.setattr(codec, "encode", spy)
    return encoded


# ---------------------------------------------------------------------------------------- seeing what changed


@given(LISTS, LISTS, st.data())
def test_lines_are_exact_encodings_whatever_was_done_to_the_list(
    messages: list[Any], others: list[Any], data: st.DataObject
) -> None:
    baseline = known(messages)
    pool = [*messages, *copy.deepcopy(messages), *others]
    for message in data.draw(st.lists(st.sampled_from(pool), max_size=4)) if pool else ():
        name = data.draw(st.sampled_from(["role", "content", "new"]))
        message.pop(name, None)
        message[name] = data.draw(VALUES)
    edited = data.draw(st.permutations(pool))[: data.draw(st.integers(0, len(pool)))]
    assert baseline.lines_of(edited) == [codec.encode(message) for message in edited]


@given(MESSAGES, VALUES, VALUES)
def test_an_edit_in_place_is_seen_at_any_depth(
    message: dict[str, Any], before: object, after: object
) -> None:
    message["deep"] = [{"deeper": before}]
    messages = [{"content": "first"}, message]
    baseline = known(messages)
    lines = list(baseline.lines)
    message["deep"][0]["deeper"] = after
    assert (baseline.lines_of(messages) == lines) == (json.dumps(before) == json.dumps(after))


@pytest.mark.parametrize("size", [0, 1, RUN - 1, RUN, RUN + 1, 3 * RUN + 7])
def test_an_unchanged_message_is_not_encoded(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[Any] = [{"role": "user", "content": str(n), "usage": {"n": n}} for n in range(size)]
    baseline = known(messages)
    encoded = spied(monkeypatch)
    assert baseline.lines_of(messages) == baseline.lines
    assert encoded == []
    messages.append({"content": "new"})
    assert len(baseline.lines_of(messages)) == size + 1
    assert encoded == [size]
    encoded.clear()
    messages.insert(0, {"content": "first"})
    assert baseline.lines_of(messages)[1:-1] == baseline.lines
    assert encoded == [0, size + 1]


def test_only_the_run_of_an_edited_message_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[Any] = [{"content": str(n)} for n in range(5 * RUN)]
    baseline = known(messages)
    messages[2 * RUN]["content"] = "edited"
    encoded = spied(monkeypatch)
    lines = baseline.lines_of(messages)
    assert changed_range(baseline.lines, lines) == (2 * RUN, 2 * RUN + 1, 2 * RUN + 1)
    assert encoded == list(range(2 * RUN, 3 * RUN))


@pytest.mark.parametrize(
    "line", [b'{"a":1}', b'{ "a" : 1 }', b'{"a":"\\u00e9"}', b'{"a": 1E0}', b'{"a":1,"a":2}']
)
def test_bytes_of_other_encoders_stay_while_the_message_does(line: bytes) -> None:
    baseline = Baseline()
    baseline.read(1, Local([line, b'{"b":1}'], {}, 0))
    messages = [codec.decode(kept) for kept in baseline.lines]
    baseline.watch(messages)
    assert baseline.lines_of(messages) == baseline.lines
    assert baseline.lines_of(copy.deepcopy(messages)) == baseline.lines
    messages[1]["b"] = 2
    assert baseline.lines_of(messages) == [line, b'{"b": 2}']
    messages[0]["a"] = "other"
    assert baseline.lines_of(messages)[0] == b'{"a": "other"}'


def test_what_is_stored_and_would_not_be_taken_stays_while_it_does() -> None:
    baseline = Baseline()
    baseline.read(1, Local([b'{"a":NaN}', b'{"b":1}'], {}, 0))
    messages = [codec.decode(kept) for kept in baseline.lines]
    baseline.watch(messages)
    messages[1]["b"] = 2
    assert baseline.lines_of(messages) == [b'{"a":NaN}', b'{"b": 2}']
    assert baseline.lines_of([{"a": 1}, messages[1]]) == [b'{"a": 1}', b'{"b": 2}']
    messages[0]["a"] = float("inf")
    with pytest.raises(codec.MessageError) as caught:
        baseline.lines_of(messages)
    assert (caught.value.reason, caught.value.index) == ("MESSAGE_NOT_FINITE", 0)


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ({"a": {"b": 1}}, {"a": OrderedDict(b=1)}),
        ({"a": {"b": 1}}, OrderedDict(a={"b": 1})),
        ({"a": "b"}, {"a": Text("b")}),
        ({"a": {"b": "c"}}, {"a": {"b": Text("c")}}),
        ({"a": 1}, MappingProxyType({"a": 1})),
    ],
)
def test_other_types_of_the_same_json_are_no_change(stored: Any, held: Any) -> None:
    for first, then in ((stored, held), (held, stored), (held, held)):
        baseline = known([first])
        assert baseline.lines_of([then]) == baseline.lines


def test_values_that_cannot_even_be_compared_are_refused_with_their_index() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError("no")

        __hash__ = None  # type: ignore[assignment]

    baseline = known([{"a": "b"}, {"a": "c"}])
    circle: dict[str, Any] = {}
    circle["a"] = circle
    for bad in (Odd(), circle, {1, 2}, b"c"):
        with pytest.raises(codec.MessageError) as caught:
            baseline.lines_of([{"a": "b"}, {"a": bad}])
        assert caught.value.index == 1


def test_a_list_is_still_compared_rightly_when_a_save_ended_half_way() -> None:
    messages: list[Any] = [{"n": n} for n in range(3)]
    baseline = known(messages)
    step = Replace(1, 1, [b'{"n": 10}'])
    baseline.applied(step, revision=2, previous_revision=1, last_consolidated=0)
    assert baseline.lines_of(messages) == [b'{"n": 0}', b'{"n": 1}', b'{"n": 2}']
    messages[1]["n"] = 10
    assert baseline.lines_of(messages) == baseline.lines


# ----------------------------------------------------------------------------------------------- what is sent

TEXTS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("12"))


@given(LINES, LINES, st.integers(0, 3), TEXTS, st.data())
def test_the_steps_make_what_is_stored_what_is_held(
    old: list[bytes], new: list[bytes], batch: int, members: dict[str, str], data: st.DataObject
) -> None:
    """A model of the daemon applies the steps; nothing unchanged at either end is sent, and it ends."""
    exists = data.draw(st.booleans()) or bool(old)
    stored = Local(list(old), {"a": "1", "b": "1"} if exists else {}, 0)
    baseline = Baseline()
    if exists:
        baseline.read(1, stored)
    held = Local(new, members, data.draw(st.integers(0, len(new))))
    limits = codec.Limits(batch_messages_max=batch + 1, batch_bytes_max=20)
    revision = baseline.revision
    for _ in range(40):
        step = next_step(baseline, held, limits)
        if step is None:
            break
        lines, kept, consolidated = list(stored.lines), dict(stored.members), stored.last_consolidated
        match step:
            case Create():
                assert revision == 0
                lines, kept, consolidated = list(step.lines), dict(step.members), step.last_consolidated
            case Append():
                assert step.start == len(lines)
                assert 1 <= len(step.lines) <= batch + 1
                lines += step.lines
            case Replace():
                removed = lines[step.start : step.start + step.delete_count]
                assert removed[:1] != list(step.lines[:1]) or not removed
                assert removed[-1:] != list(step.lines[-1:]) or not removed
                lines[step.start : step.start + step.delete_count] = step.lines
            case Update():
                assert lines == new
                kept |= {name: text for name, text in step.members.items() if text is not None}
                kept = {name: text for name, text in kept.items() if step.members.get(name, text)}
                if step.last_consolidated is not None:
                    consolidated = step.last_consolidated
        stored = Local(lines, kept, min(consolidated, len(lines)))
        before, revision = revision, revision + 1
        baseline.applied(
            step, revision=revision, previous_revision=before, last_consolidated=stored.last_consolidated
        )
        assert not baseline.behind
    assert next_step(baseline, held, limits) is None
    assert stored == held == Local(baseline.lines, baseline.members, baseline.last_consolidated)


def test_a_message_beyond_the_batch_limit_is_sent_alone_for_the_daemon_to_judge() -> None:
    step = next_step(known([]), local([b"x" * 50, b"y"]), codec.Limits(batch_bytes_max=10))
    assert step == Append(0, [b"x" * 50])


@given(LINES, LINES)
def test_a_changed_range_is_the_smallest_from_both_ends(old: list[bytes], new: list[bytes]) -> None:
    start, stop, new_stop = changed_range(old, new)
    assert old[:start] == new[:start]
    assert old[stop:] == new[new_stop:]
    assert old[:start] + new[start:new_stop] + old[stop:] == new
    if start < stop and start < new_stop:
        assert old[start] != new[start]
        assert old[stop - 1] != new[new_stop - 1]
    assert (start == stop == new_stop == len(old)) == (old == new)


# ---------------------------------------------------------------------------------------------------- merging


@settings(max_examples=300)
@given(LINES, LINES, LINES, LINES, st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_a_merge_keeps_what_both_added_and_revives_nothing(
    seen: list[bytes],
    own: list[bytes],
    new: list[bytes],
    theirs: list[bytes],
    consolidated: int,
    stored_consolidated: int,
    baseline_consolidated: int,
) -> None:
    """They are at what was seen and own appends, with others' messages between; or anywhere else."""
    baseline = Baseline()
    baseline.read(1, local(seen, min(baseline_consolidated, len(seen))))
    if own:
        baseline.applied(Append(len(seen), own), revision=3, previous_revision=2, last_consolidated=0)
        assert baseline.behind
    held = local(seen + own + new, min(consolidated, len(seen + own + new)))
    for stored_lines in (seen + theirs + own, seen + own + theirs, theirs, theirs + own, []):
        stored = local(stored_lines, min(stored_consolidated, len(stored_lines)))
        merged = merge(baseline, held, stored)
        assert merged is not None
        assert merged.lines in (stored_lines + new, held.lines)
        if merged.lines == held.lines != stored_lines + new:
            assert stored_lines == held.lines  # others made the very same change
        assert 0 <= merged.last_consolidated <= len(merged.lines)
        if held.last_consolidated == baseline.last_consolidated:
            assert merged.last_consolidated == stored.last_consolidated


@given(LINES, LINES, LINES)
def test_two_rewrites_do_not_merge_unless_they_are_one(
    seen: list[bytes], mine: list[bytes], theirs: list[bytes]
) -> None:
    baseline = Baseline()
    baseline.read(1, local(seen))
    merged = merge(baseline, local(mine), local(theirs))
    if mine[: len(seen)] == seen:
        assert merged is not None
    elif theirs in (seen, mine):
        assert merged == local(mine)
    else:
        assert merged is None


MEMBERS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["1", "true", "1.0"]))


@given(MEMBERS, MEMBERS, MEMBERS)
def test_metadata_merges_by_member(
    seen: dict[str, str], mine: dict[str, str], theirs: dict[str, str]
) -> None:
    baseline = Baseline()
    baseline.read(1, Local([], seen, 0))
    merged = merge(baseline, Local([], mine, 0), Local([], theirs, 0))
    assert merged is not None
    for name in "abcd":
        changed = mine.get(name) != seen.get(name)
        assert merged.members.get(name) == (mine if changed else theirs).get(name)


@pytest.mark.parametrize(
    ("theirs", "mine", "stored", "expected"),
    [
        (b"12x", 2, 0, 2),  # others added behind what is counted
        (b"12x", 3, 0, 2),  # what is new here is counted, and stands behind what others added
        (b"1x2", 2, 1, 1),  # rewritten: the lower of both
        (b"", 2, 0, 0),
        (b"12", 3, 2, 3),  # nobody added anything
    ],
)
def test_what_is_consolidated_never_hides_an_unseen_message(
    theirs: bytes, mine: int, stored: int, expected: int
) -> None:
    def lines(digits: bytes) -> list[bytes]:
        return [bytes([digit]) for digit in digits]

    baseline = Baseline()
    baseline.read(1, local(lines(b"12"), 1))
    merged = merge(baseline, local(lines(b"123"), mine), local(lines(theirs), stored))
    assert merged is not None
    assert merged.last_consolidated == expected

"""Every row of the table of outcomes in docs/drop-in.md: what is unsaved here, against what others stored."""

import re
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from compat.manager_fixtures import here, make_manager, store, texts, there, user
from sessionstore import SessionStore
from sessionstore.errors import ConflictError, InvalidArgumentError
from sessionstore.manager import Session, SessionManager

__all__ = ["here", "make_manager", "store", "there"]
TABLE = Path(__file__).parents[2] / "docs" / "drop-in.md"


# What may be done to the messages 0, 1, 2; each with what they are then.
def add(session: Session, name: str) -> None:
    session.messages.append(user(name))


def edit(session: Session, name: str) -> None:
    session.messages[1]["content"] = name


def insert(session: Session, name: str) -> None:
    session.messages.insert(1, user(name))


def remove(session: Session, name: str) -> None:
    del session.messages[1]


def clear(session: Session, name: str) -> None:
    session.clear()


Change = Callable[[Session, str], None]
REWRITES: dict[Change, Callable[[str], list[str]]] = {
    edit: lambda name: ["0", name, "2"],
    insert: lambda name: ["0", name, "1", "2"],
    remove: lambda name: ["0", "2"],
    clear: lambda name: [],
}
any_rewrite = pytest.mark.parametrize("rewrite", REWRITES, ids=lambda change: change.__name__)
any_other = pytest.mark.parametrize("other", REWRITES, ids=lambda change: change.__name__)


class Two:
    """One session of the messages 0, 1, 2, seen by two managers."""

    def __init__(self, here: SessionManager, there: SessionManager, store: SessionStore, key: str) -> None:
        self.store, self.key = store, key
        self._managers = here, there
        store.create(key, [user(n) for n in range(3)], metadata={"a": 1, "b": 2})
        self.mine, self.theirs = here.get_or_create(key), there.get_or_create(key)
        assert self.mine is not self.theirs
        self.known = self.mine.messages[0]

    def save(self) -> None:
        self._managers[0].save(self.mine)

    def others(self, change: Change | None = None, name: str = "theirs", **fields: Any) -> None:
        """Somebody else changes the session and saves it."""
        if change is not None:
            change(self.theirs, name)
        for field, value in fields.items():
            setattr(self.theirs, field, value)
        self._managers[1].save(self.theirs)

    def others_delete(self) -> None:
        self.store.delete(self.key)

    def agree(self, *contents: str) -> None:
        """What is stored, and what the object holds, are these messages."""
        stored = self.store.session(self.key)
        assert texts(stored.messages) == list(contents)
        assert self.mine.messages == list(stored.messages)
        assert self.mine.metadata == stored.metadata
        assert self.mine.last_consolidated == stored.last_consolidated

    def refused(self) -> ConflictError:
        """Saving raises ConflictError and changes nothing, here or there; so does saving again."""
        before = self.stored()
        messages, contents = self.mine.messages, list(map(dict, self.mine.messages))
        rest = dict(self.mine.metadata), self.mine.last_consolidated
        for _ in range(2):
            with pytest.raises(ConflictError) as caught:
                self.save()
            assert self.stored() == before
            assert self.mine.messages is messages
            assert messages == contents
            assert (self.mine.metadata, self.mine.last_consolidated) == rest
        assert caught.value.key == self.key
        return caught.value

    def stored(self) -> tuple[Any, ...]:
        session = self.store.session(self.key)
        return session.revision, session.messages, session.metadata, session.last_consolidated


@pytest.fixture
def two(here: SessionManager, there: SessionManager, store: SessionStore, key: str) -> Two:
    return Two(here, there, store, key)


def test_every_row_of_the_table_has_a_test_of_its_name() -> None:
    rows = re.findall(r"^\| ([A-Z]\d) \|", TABLE.read_text(), re.MULTILINE)
    tests = set()
    for module in (sys.modules[__name__], pytest.importorskip("compat.test_manager_unknown")):
        tests |= {match[1].upper() for name in dir(module) if (match := re.match(r"test_([a-z]\d)_", name))}
    assert len(rows) == len(set(rows)) > 30
    assert tests == set(rows)


# ---------------------------------------------------------------------------------------------- nothing here


def test_n1_nothing_and_nothing(two: Two) -> None:
    revision = two.store.session(two.key).revision
    two.save()
    two.agree("0", "1", "2")
    assert two.store.session(two.key).revision == revision


def test_n2_nothing_and_added(two: Two) -> None:
    two.others(add)
    two.save()
    two.agree("0", "1", "2", "theirs")
    assert two.mine.messages[0] is two.known


@any_other
def test_n3_nothing_and_rewrote(two: Two, other: Change) -> None:
    two.others(other)
    two.save()
    two.agree(*REWRITES[other]("theirs"))


def test_n4_nothing_and_deleted(two: Two) -> None:
    two.others_delete()
    two.save()
    assert (two.mine.messages, two.mine.metadata, two.mine.last_consolidated) == ([], {}, 0)
    assert two.store.get(two.key) is None


# --------------------------------------------------------------------------------------------------- added


def test_a1_added_and_nothing(two: Two) -> None:
    messages = two.mine.messages
    add(two.mine, "mine")
    two.save()
    two.agree("0", "1", "2", "mine")
    assert two.mine.messages is messages


def test_a2_added_and_added(two: Two) -> None:
    add(two.mine, "mine")
    mine = two.mine.messages[-1]
    two.others(add)
    two.save()
    two.agree("0", "1", "2", "theirs", "mine")
    assert two.mine.messages[0] is two.known
    assert two.mine.messages[-1] is mine
    two.others(add, "once more")
    assert texts(two.theirs.messages) == ["0", "1", "2", "theirs", "mine", "once more"]
    two.save()
    two.agree("0", "1", "2", "theirs", "mine", "once more")


def test_a2_also_if_both_added_the_same(two: Two) -> None:
    add(two.mine, "same")
    two.others(add, "same")
    two.save()
    two.agree("0", "1", "2", "same", "same")


@any_other
def test_a3_added_and_rewrote(two: Two, other: Change) -> None:
    add(two.mine, "mine")
    two.others(other)
    two.save()
    two.agree(*REWRITES[other]("theirs"), "mine")


def test_a4_added_and_cleared(two: Two) -> None:
    add(two.mine, "mine")
    two.others(clear)
    two.save()
    two.agree("mine")


def test_a4_also_if_others_added_after_they_cleared(two: Two) -> None:
    add(two.mine, "mine")
    two.others(clear)
    two.others(add)
    two.save()
    two.agree("theirs", "mine")


def test_a5_added_and_deleted(two: Two) -> None:
    add(two.mine, "mine")
    two.others_delete()
    two.save()
    two.agree("mine")
    assert two.mine.metadata == {}


# -------------------------------------------------------------------------------------------------- rewrote


@any_rewrite
def test_r1_rewrote_and_nothing(two: Two, rewrite: Change) -> None:
    rewrite(two.mine, "mine")
    two.save()
    two.agree(*REWRITES[rewrite]("mine"))
    add(two.mine, "next")
    two.save()
    two.agree(*REWRITES[rewrite]("mine"), "next")


@pytest.mark.parametrize("values", [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), (None, False), ([1], [True])])
def test_r1_also_for_values_that_python_holds_for_equal(two: Two, values: tuple[Any, Any]) -> None:
    two.mine.messages[1]["value"] = {"deep": values[0]}
    two.save()
    for value in values:
        two.mine.messages[1]["value"]["deep"] = value
        two.save()
        assert repr(two.store.session(two.key).messages[1]["value"]) == repr({"deep": value})


def test_r1_also_for_another_order_of_names(two: Two) -> None:
    two.mine.messages[1] = {"content": "1", "role": "user"}
    two.save()
    assert list(two.store.session(two.key).messages[1]) == ["content", "role"]


@any_rewrite
def test_r2_rewrote_and_added(two: Two, rewrite: Change) -> None:
    rewrite(two.mine, "mine")
    two.others(add)
    error = two.refused()
    assert (error.revision, error.message_count) == (two.store.session(two.key).revision, 4)
    assert texts(error.fetch().messages) == ["theirs"]


@any_rewrite
def test_r2_after_which_the_change_is_made_again(here: SessionManager, two: Two, rewrite: Change) -> None:
    rewrite(two.mine, "mine")
    two.others(add)
    two.refused()
    here.invalidate(two.key)
    two.mine = here.get_or_create(two.key)
    rewrite(two.mine, "mine")
    two.save()
    two.agree(*REWRITES[rewrite]("mine"), *([] if rewrite is clear else ["theirs"]))


@any_rewrite
@any_other
def test_r3_rewrote_and_rewrote(two: Two, rewrite: Change, other: Change) -> None:
    rewrite(two.mine, "mine")
    two.others(other)
    if rewrite is other and other in (remove, clear):
        two.save()  # row R6: they did the very same
        two.agree(*REWRITES[other]("theirs"))
    else:
        two.refused()


@pytest.mark.parametrize("rewrite", [edit, insert, remove], ids=lambda change: change.__name__)
def test_r4_rewrote_and_deleted(two: Two, rewrite: Change) -> None:
    rewrite(two.mine, "mine")
    two.others_delete()
    assert two.refused().revision == 0
    assert two.store.get(two.key) is None


@any_rewrite
def test_r5_rewrote_and_changed_the_head(two: Two, rewrite: Change) -> None:
    rewrite(two.mine, "mine")
    two.others(metadata={"a": 1, "b": "theirs"}, last_consolidated=1)
    two.save()
    two.agree(*REWRITES[rewrite]("mine"))
    assert two.mine.metadata == {"a": 1, "b": "theirs"}
    assert two.mine.last_consolidated == (0 if rewrite is clear else 1)


@any_rewrite
def test_r6_rewrote_and_rewrote_alike(two: Two, rewrite: Change) -> None:
    rewrite(two.mine, "same")
    two.others(rewrite, "same")
    revision = two.store.session(two.key).revision
    two.save()
    two.agree(*REWRITES[rewrite]("same"))
    assert two.store.session(two.key).revision == revision


# -------------------------------------------------------------------------------------------------- metadata


def test_m1_metadata_and_nothing(two: Two) -> None:
    two.mine.metadata["a"] = True
    del two.mine.metadata["b"]
    two.mine.metadata["c.d"] = {"e": None}
    two.save()
    two.agree("0", "1", "2")
    assert repr(two.store.session(two.key).metadata) == "{'a': True, 'c.d': {'e': None}}"


def test_m2_metadata_and_other_members(two: Two) -> None:
    two.mine.metadata["a"] = "mine"
    metadata = two.mine.metadata
    two.others(metadata={"a": 1, "c": "theirs"})
    two.save()
    two.agree("0", "1", "2")
    assert two.mine.metadata == {"a": "mine", "c": "theirs"}
    assert two.mine.metadata is metadata


def test_m3_metadata_and_the_same_member(two: Two) -> None:
    two.mine.metadata["a"] = "mine"
    two.others(metadata={"a": "theirs", "b": 2})
    two.save()
    two.agree("0", "1", "2")
    assert two.mine.metadata == {"a": "mine", "b": 2}


@pytest.mark.parametrize("other", [add, *REWRITES], ids=lambda change: change.__name__)
def test_m4_metadata_and_messages(two: Two, other: Change) -> None:
    two.mine.metadata["a"] = "mine"
    two.others(other)
    two.save()
    two.agree(*(REWRITES[other]("theirs") if other in REWRITES else ["0", "1", "2", "theirs"]))
    assert two.mine.metadata == {"a": "mine", "b": 2}


def test_m5_metadata_and_deleted(two: Two) -> None:
    two.mine.metadata["a"] = "mine"
    two.others_delete()
    two.save()
    two.agree()
    assert two.mine.metadata == {"a": "mine"}


# ----------------------------------------------------------------------------------------- last_consolidated


def test_l1_consolidated_and_nothing(two: Two) -> None:
    two.mine.last_consolidated = 2
    two.save()
    two.agree("0", "1", "2")
    assert two.mine.last_consolidated == 2


@pytest.mark.parametrize(("consolidated", "stored"), [(2, 2), (3, 3), (4, 3)])
def test_l2_consolidated_and_added(two: Two, consolidated: int, stored: int) -> None:
    add(two.mine, "mine")
    two.mine.last_consolidated = consolidated
    two.others(add)
    two.save()
    two.agree("0", "1", "2", "theirs", "mine")
    assert two.mine.last_consolidated == stored


def test_l2_counts_what_was_added_here_and_not_behind(two: Two) -> None:
    add(two.mine, "mine")
    two.mine.last_consolidated = 4
    two.save()
    two.others(add)
    two.save()
    two.agree("0", "1", "2", "mine", "theirs")
    assert two.mine.last_consolidated == 4


@pytest.mark.parametrize(("mine", "theirs", "stored"), [(2, 0, 0), (2, 1, 1), (1, 2, 1)])
def test_l3_consolidated_and_rewrote(two: Two, mine: int, theirs: int, stored: int) -> None:
    two.mine.last_consolidated = mine
    two.others(edit, last_consolidated=theirs)
    two.save()
    two.agree("0", "theirs", "2")
    assert two.mine.last_consolidated == stored


def test_l4_consolidated_and_consolidated(two: Two) -> None:
    two.mine.last_consolidated = 1
    two.others(last_consolidated=2)
    two.save()
    two.agree("0", "1", "2")
    assert two.mine.last_consolidated == 1


def test_l5_removed_what_was_consolidated(two: Two) -> None:
    two.mine.last_consolidated = 3
    two.save()
    del two.mine.messages[1:]
    two.save()
    two.agree("0")
    assert two.mine.last_consolidated == 1
    two.mine.messages[:] = [user("new"), user("newer")]
    two.mine.last_consolidated = 2
    two.save()
    two.agree("new", "newer")
    assert two.mine.last_consolidated == 2


# ----------------------------------------------------------------------------------------------- new sessions


def test_c1_new_and_nothing(here: SessionManager, store: SessionStore, key: str) -> None:
    session = here.get_or_create(key)
    assert store.get(key) is None
    add(session, "mine")
    session.metadata, session.last_consolidated = {"a": 1}, 1
    session.created_at = datetime(2026, 2, 23, 9, 0, 0, 123456)
    here.save(session)
    stored = store.session(key)
    assert (texts(stored.messages), stored.metadata, stored.last_consolidated) == (["mine"], {"a": 1}, 1)
    assert stored.create_time.astimezone().replace(tzinfo=None) == datetime(2026, 2, 23, 9, 0, 0, 123456)


def test_c2_new_and_made_by_others(
    here: SessionManager, there: SessionManager, store: SessionStore, key: str
) -> None:
    mine, theirs = here.get_or_create(key), there.get_or_create(key)
    add(theirs, "theirs")
    theirs.metadata["b"] = 1
    there.save(theirs)
    add(mine, "mine")
    mine.metadata["a"] = 1
    here.save(mine)
    assert texts(store.session(key).messages) == texts(mine.messages) == ["theirs", "mine"]
    assert store.session(key).metadata == mine.metadata == {"a": 1, "b": 1}


def test_c3_new_and_empty(here: SessionManager, store: SessionStore, key: str) -> None:
    here.save(here.get_or_create(key))
    assert store.get(key).message_count == 0


def test_c4_new_and_empty_and_made_by_others(
    here: SessionManager, there: SessionManager, store: SessionStore, key: str
) -> None:
    mine, theirs = here.get_or_create(key), there.get_or_create(key)
    add(theirs, "theirs")
    there.save(theirs)
    revision = store.session(key).revision
    here.save(mine)
    assert texts(mine.messages) == ["theirs"]
    assert store.session(key).revision == revision


# ----------------------------------------------------------------------------------------------- made by hand


def test_h1_by_hand_and_nothing(here: SessionManager, store: SessionStore, key: str) -> None:
    past = datetime(2020, 1, 1, 12)
    session = Session(key, [user("mine")], past, past, {"a": 1}, 1)
    here.save(session)
    stored = store.session(key)
    assert (texts(stored.messages), stored.metadata, stored.last_consolidated) == (["mine"], {"a": 1}, 1)
    assert session.created_at == past == stored.create_time.astimezone().replace(tzinfo=None)
    assert session.updated_at > past
    assert here.get_or_create(key) is session


def test_h1_a_time_beyond_the_daemons_clock_is_not_kept(
    here: SessionManager, store: SessionStore, key: str
) -> None:
    session = Session(key, [user("mine")], created_at=datetime.now() + timedelta(hours=1))
    here.save(session)
    assert texts(store.session(key).messages) == ["mine"]
    assert session.created_at <= datetime.now()


def test_h2_by_hand_and_begins_with_what_is_stored(two: Two, here: SessionManager) -> None:
    two.others(last_consolidated=1)
    mine = [user(n) for n in range(3)] + [user("mine")]
    two.mine = Session(two.key, mine, metadata={"b": "mine", "c": 3})
    two.save()
    two.agree("0", "1", "2", "mine")
    assert two.mine.metadata == {"a": 1, "b": "mine", "c": 3}
    assert two.mine.last_consolidated == 1
    assert here.get_or_create(two.key) is two.mine


@pytest.mark.parametrize("contents", [[], ["0"], ["0", "1", "other"], ["mine"]])
def test_h3_by_hand_and_does_not_begin_with_what_is_stored(two: Two, contents: list[str]) -> None:
    two.mine = Session(two.key, [user(content) for content in contents])
    error = two.refused()
    assert error.message_count == 3
    assert texts(error.fetch().messages) == ["0", "1", "2"]


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"content": float("nan")}, "MESSAGE_NOT_FINITE"),
        ({"content": object()}, "MESSAGE_NOT_JSON"),
        ({"content": b"bytes"}, "MESSAGE_NOT_JSON"),
        ({1: "a name that is no string"}, "MESSAGE_NOT_JSON"),
        ({"content": "\ud800"}, "MESSAGE_LONE_SURROGATE"),
        ({"_type": "metadata"}, "MESSAGE_RESERVED_TYPE"),
        (["no", "dict"], "MESSAGE_NOT_OBJECT"),
        ("text", "MESSAGE_NOT_OBJECT"),
        ({"content": "x" * (9 << 20)}, "MESSAGE_TOO_LARGE"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("MESSAGE") else "",
)
@pytest.mark.parametrize("index", [1, 4])
def test_b1_no_json(two: Two, bad: Any, reason: str, index: int) -> None:
    revision = two.store.session(two.key).revision
    two.mine.messages.append(user("mine"))
    if index == 1:
        two.mine.messages[1] = bad
    else:
        two.mine.messages.append(bad)
    with pytest.raises(InvalidArgumentError) as caught:
        two.save()
    assert (caught.value.reason, caught.value.index) == (reason, index)
    assert two.store.session(two.key).revision == revision
    two.mine.messages[index] = user("good")
    two.save()
    two.agree(*(["0", "good", "2", "mine"] if index == 1 else ["0", "1", "2", "mine", "good"]))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("metadata", {"a": float("inf")}, "METADATA_INVALID"),
        ("metadata", {"a": object()}, "METADATA_INVALID"),
        ("metadata", {1: 2}, "METADATA_INVALID"),
        ("metadata", None, "METADATA_INVALID"),
        ("metadata", {"a": "x" * (300 << 10)}, "METADATA_TOO_LARGE"),
        ("last_consolidated", 4, "LAST_CONSOLIDATED_OUT_OF_RANGE"),
        ("last_consolidated", -1, "LAST_CONSOLIDATED_OUT_OF_RANGE"),
        ("last_consolidated", None, "ARGUMENT_INVALID"),
        ("messages", None, "ARGUMENT_INVALID"),
        ("messages", (), "ARGUMENT_INVALID"),
    ],
)
def test_b2_no_head(two: Two, field: str, value: Any, reason: str) -> None:
    revision = two.store.session(two.key).revision
    good = getattr(two.mine, field)
    setattr(two.mine, field, value)
    with pytest.raises(InvalidArgumentError) as caught:
        two.save()
    assert caught.value.reason == reason
    assert two.store.session(two.key).revision == revision
    setattr(two.mine, field, good)
    two.save()
    two.agree("0", "1", "2")

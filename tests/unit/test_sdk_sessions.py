"""Handles and stores on a real daemon, with both clients: values, snapshots, edits, listings, refusals."""

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from daemons import Daemon
from sessionstore import REMOVE, Appended, SessionStore, Unseen, codec
from sessionstore.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    LimitError,
    NotFoundError,
    SessionStoreError,
    TooLargeError,
)

VALUES = {
    "big": 2**53 + 1,
    "huge": 10**40,
    "float": 0.1,
    "whole": 1.0,
    "tiny": 5e-324,
    "text": "ключ ✓ 𝔘🜚 \u0000 \\ \" \n\r\u2028",
    "z": None,
    "a": True,
    "nested": {"z": [1, {"y": [], "x": {}}], "a": ""},
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture
def other(shared_daemon: Daemon) -> Any:
    """Another client, of another process as far as the daemon knows."""
    with SessionStore(shared_daemon.address) as store:
        yield store


# ------------------------------------------------------------------------------------------------- values


def test_values_come_back_equal_and_in_order(store: Any, key: str) -> None:
    store.session(key).append(VALUES)
    (message,) = store.session(key).messages
    assert message == VALUES
    assert list(message) == list(VALUES)
    assert list(message["nested"]) == ["z", "a"]
    assert type(message["whole"]) is float
    assert message["a"] is True


def test_a_snapshot_holds_what_others_will_read(store: Any, key: str) -> None:
    handle = store.session(key)
    handle.append({"pair": (1, 2)}, {"n": 1.0})
    assert handle.messages == store.session(key).messages == ({"pair": [1, 2]}, {"n": 1.0})


# ---------------------------------------------------------------------------------------------- snapshots


def test_reading_creates_nothing(store: Any, key: str) -> None:
    handle = store.session(key)
    assert (handle.exists, handle.revision, handle.messages, handle.metadata) == (False, 0, (), {})
    assert (handle.create_time, handle.update_time, handle.message_count) == (None, None, 0)
    assert (handle.last_consolidated, handle.damage, handle.head) == (0, "", None)
    assert handle.history() == []
    assert store.get(key) is None
    assert "does not exist" in repr(handle)


def test_a_snapshot_advances_by_own_writes(store: Any, key: str) -> None:
    handle = store.session(key)
    first = handle.append(user("one"), user("two"))
    assert first == Appended(handle.revision, 0, 2)
    second = handle.append(user("three"))
    assert (second.first_index, second.message_count) == (2, 3)
    assert second.revision == handle.revision > first.revision
    assert handle.pop() == user("three")
    handle.replace(0, 1, [user("a"), user("b")])
    handle.update(metadata={"x": 1, "y": 2}, last_consolidated=2)
    handle.update(patch={"x": REMOVE, "z": {"deep": []}})
    assert_equal_to_stored(store, handle)
    assert handle.messages == (user("a"), user("b"), user("two"))
    assert (handle.metadata, handle.last_consolidated) == ({"y": 2, "z": {"deep": []}}, 2)
    handle.replace(1, None, [])
    assert (handle.message_count, handle.last_consolidated) == (1, 1)
    handle.clear()
    assert_equal_to_stored(store, handle)
    assert handle.messages == ()
    assert handle.exists


def assert_equal_to_stored(store: Any, handle: Any) -> None:
    stored = store.session(handle.key)
    assert handle.head == stored.head
    assert handle.messages == stored.messages
    assert store.get(handle.key) == stored.head


def test_a_snapshot_contains_the_own_write_and_what_others_wrote_before(
    store: Any, other: Any, key: str
) -> None:
    handle = store.session(key)
    handle.append(user("1"))
    theirs = other.session(key)
    theirs.append(user("2"))
    handle.append(user("3"))
    assert handle.messages == (user("1"), user("2"), user("3"))
    theirs.refresh()
    theirs.replace(0, 1, [user("one")])
    theirs.update(metadata={"by": "them"})
    assert handle.pop() == user("3")
    assert handle.messages == (user("one"), user("2"))
    assert handle.metadata == {"by": "them"}
    theirs.clear()
    handle.update(patch={"mine": True})
    assert (handle.messages, handle.metadata) == ((), {"by": "them", "mine": True})
    assert_equal_to_stored(store, handle)


def test_refresh_brings_news_and_gives_the_handle(store: Any, other: Any, key: str) -> None:
    handle = store.session(key)
    assert not handle.refresh().exists
    theirs = other.session(key)
    theirs.append(user("1"))
    before = handle.messages
    assert handle.messages is before == ()
    assert handle.refresh().messages == (user("1"),)
    theirs.append(user("2"))
    assert handle.refresh().messages == (user("1"), user("2"))
    theirs.delete()
    assert not handle.refresh().exists
    theirs.append(user("new"))
    assert handle.refresh().messages == (user("new"),)


def test_a_deleted_session_can_be_written_again_with_its_handle(store: Any, key: str) -> None:
    handle = store.session(key)
    handle.append(user("1"))
    gone = handle.delete()
    assert (handle.exists, handle.revision, handle.messages) == (False, 0, ())
    with pytest.raises(NotFoundError) as told:
        handle.delete()
    assert told.value.key == key
    again = handle.append(user("2"), expected_revision=0)
    assert again.revision > gone.revision
    assert_equal_to_stored(store, handle)


def test_a_stale_handle_of_a_recreated_session_shows_the_new_one(store: Any, other: Any, key: str) -> None:
    handle = store.session(key)
    handle.append(user("1"), user("2"))
    other.delete(key)
    other.session(key).append(user("a"), user("b"), user("c"))
    handle.append(user("d"))
    assert handle.messages == (user("a"), user("b"), user("c"), user("d"))


def test_metadata_and_history_are_copies(store: Any, key: str) -> None:
    handle = store.create(key, [user("hi")], metadata={"list": [1]})
    handle.metadata["list"].append(2)
    handle.history()[0]["content"] = "changed"
    assert handle.metadata == {"list": [1]}
    assert handle.messages == (user("hi"),)


def test_history_is_the_window_of_the_snapshot(store: Any, key: str) -> None:
    handle = store.session(key)
    handle.append(*(user(str(n)) for n in range(10)))
    handle.update(last_consolidated=4)
    assert [entry["content"] for entry in handle.history(max_messages=3)] == ["7", "8", "9"]
    assert len(handle.history(0)) == 6
    with pytest.raises(InvalidArgumentError) as told:
        handle.history(-1)
    assert told.value.reason == "LIMIT_NEGATIVE"


def test_history_gives_more_fields_and_stays_within_a_budget(store: Any, key: str) -> None:
    handle = store.session(key)
    handle.append(*(user(str(n)) | {"at": n} for n in range(10)))
    assert handle.history(keep=("at",), max_messages=2) == [user("8") | {"at": 8}, user("9") | {"at": 9}]
    assert handle.history(max_tokens=3, count_tokens=lambda _: 1.5) == [user("8"), user("9")]
    assert handle.history(max_tokens=1, count_tokens=lambda _: 1.5) == [user("9")]
    for arguments, field in (
        ({"keep": "at"}, "keep"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_tokens": 0, "count_tokens": len}, "max_tokens"),
        ({"max_tokens": "5", "count_tokens": len}, "max_tokens"),
        ({"max_tokens": 5, "count_tokens": lambda _: -1}, "count_tokens"),
    ):
        with pytest.raises(InvalidArgumentError) as told:
            handle.history(**arguments)
        assert (told.value.reason, told.value.metadata["field"]) == ("ARGUMENT_INVALID", field)
    with pytest.raises(ZeroDivisionError):
        handle.history(max_tokens=1, count_tokens=lambda _: 1 / 0)


def test_a_session_beyond_one_reply_is_read_whole(store: Any, other: Any, key: str) -> None:
    messages = [{"n": n, "text": "x" * 30_000} for n in range(150)]
    handle = store.session(key)
    for start in range(0, 150, 50):
        other.session(key).append(*messages[start : start + 50])
    assert list(handle.refresh().messages) == messages
    assert list(store.session(key).messages) == messages
    other.session(key).append({"large": "y" * 3_000_000}, {"last": True})
    handle.append({"mine": 1})
    assert handle.message_count == 153
    assert handle.messages[-1] == {"mine": 1}
    assert len(handle.messages[150]["large"]) == 3_000_000


# ------------------------------------------------------------------------------------------------- stores


def test_create_makes_a_session_once(store: Any, key: str) -> None:
    made = datetime(2020, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    handle = store.create(
        key, [user("1"), user("2")], metadata={"_type": "metadata"}, last_consolidated=1, create_time=made
    )
    assert (handle.create_time, handle.last_consolidated) == (made, 1)
    assert_equal_to_stored(store, handle)
    with pytest.raises(AlreadyExistsError) as told:
        store.create(key)
    assert (told.value.key, told.value.revision, told.value.message_count) == (key, handle.revision, 2)


def test_create_takes_local_times_and_refuses_naive_ones(store: Any, key: str) -> None:
    from datetime import timezone

    made = datetime(2020, 1, 2, tzinfo=timezone(timedelta(hours=5)))
    assert store.create(key, create_time=made).create_time == made
    with pytest.raises(InvalidArgumentError, match="timezone"):
        store.create(key + "2", create_time=datetime(2020, 1, 2))
    assert store.get(key + "2") is None


def test_listing_pages_as_it_goes(store: Any, key: str) -> None:
    keys = [f"{key}/{n:02}" for n in range(25)]
    for each in keys:
        store.create(each)
    assert [head.key for head in store.list(key, page_size=10)] == keys
    assert [head.key for head in store.list(key, order_by="key desc", page_size=7)] == keys[::-1]
    store.session(keys[3]).append(user("new"))
    newest = next(iter(store.list(key, order_by="update_time desc", page_size=1)))
    assert newest == store.get(keys[3])
    since = newest.update_time
    assert [head.key for head in store.list(key, order_by="update_time", updated_since=since)] == [keys[3]]
    assert list(store.list(key + "/none")) == []


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"order_by": "size"}, InvalidArgumentError, "ARGUMENT_INVALID"),
        ({"page_size": "10"}, InvalidArgumentError, "ARGUMENT_INVALID"),
        ({"page_size": 2**40}, InvalidArgumentError, "ARGUMENT_INVALID"),
        ({"page_size": -1}, InvalidArgumentError, "LIMIT_NEGATIVE"),
        ({"page_size": 1001}, TooLargeError, "PAGE_SIZE_TOO_LARGE"),
        ({"updated_since": datetime(2020, 1, 1)}, InvalidArgumentError, "ARGUMENT_INVALID"),
    ],
)
def test_a_listing_refuses_bad_arguments(
    store: Any, arguments: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error) as told:
        list(store.list("x", **arguments))
    assert told.value.reason == reason


def test_delete_by_key(store: Any, key: str) -> None:
    handle = store.create(key, [user("1")])
    with pytest.raises(ConflictError):
        store.delete(key, expected_revision=handle.revision + 1)
    gone = store.delete(key, expected_revision=handle.revision)
    assert gone.revision > handle.revision
    with pytest.raises(NotFoundError):
        store.delete(key)


def test_info_tells_what_serves(store: Any) -> None:
    info = store.info()
    assert (info.engine, info.durability) == ("memory", "none")
    assert info.limits.message_bytes_max == 8 << 20
    assert info.limits.window_age_max == timedelta(days=1)
    assert info.start_time <= datetime.now(UTC)


def test_fork_copies_the_beginning(store: Any, key: str) -> None:
    source = store.create(key, [user("1"), user("2"), user("3")], metadata={"m": 1}, last_consolidated=2)
    whole = source.fork(key + "/whole")
    assert (whole.messages, whole.metadata, whole.last_consolidated) == (source.messages, {"m": 1}, 2)
    part = source.fork(key + "/part", 1)
    assert (part.messages, part.last_consolidated) == ((user("1"),), 1)
    part.append(user("else"))
    assert source.refresh().messages == (user("1"), user("2"), user("3"))
    with pytest.raises(AlreadyExistsError):
        source.fork(key + "/part")
    with pytest.raises(InvalidArgumentError) as told:
        source.fork(key + "/more", at=4)
    assert told.value.reason == "INDEX_OUT_OF_RANGE"
    assert store.get(key + "/more") is None


# -------------------------------------------------------------------------------------------------- edits


def test_an_edited_list_is_stored_at_the_end_of_the_block(store: Any, key: str) -> None:
    handle = store.create(key, [user(str(n)) for n in range(6)])
    with handle.edit() as messages:
        messages[1]["content"] = "one"
        del messages[3:5]
        messages.insert(0, {"role": "system"})
    expected = [{"role": "system"}, user("0"), user("one"), user("2"), user("5")]
    assert list(handle.messages) == expected
    assert_equal_to_stored(store, handle)


def test_an_edit_that_changes_nothing_or_raises_stores_nothing(store: Any, key: str) -> None:
    handle = store.create(key, [user("1")])
    before = handle.revision
    with handle.edit() as messages:
        messages[0] = dict(messages[0])
    with contextlib.suppress(ZeroDivisionError), handle.edit() as messages:
        messages.clear()
        raise ZeroDivisionError
    assert store.get(key).revision == before
    assert handle.messages == (user("1"),)


def test_an_edit_of_a_changed_session_conflicts(store: Any, other: Any, key: str) -> None:
    handle = store.create(key, [user("1"), user("2")])
    other.session(key).append(user("3"))
    block = handle.edit()
    block.__enter__().pop(0)
    with pytest.raises(ConflictError) as told:
        block.__exit__(None, None, None)
    assert told.value.message_count == 3
    assert told.value.expected_revision == handle.revision
    assert told.value.fetch() == Unseen(told.value.revision, 2, [user("3")])
    assert handle.messages == (user("1"), user("2"))


def test_an_edit_makes_a_session_if_nobody_else_did(store: Any, other: Any, key: str) -> None:
    first, second = store.session(key), store.session(key)
    with first.edit() as messages:
        messages.append(user("1"))
    assert_equal_to_stored(store, first)
    with pytest.raises(ConflictError), second.edit() as messages:
        messages.append(user("2"))


def test_store_edit_tries_again_after_a_conflict(store: Any, other: Any, key: str) -> None:
    theirs = other.create(key, [user("0")])
    seen = []

    def keep_last(messages: list[Any]) -> list[Any]:
        seen.append(len(messages))
        if len(seen) < 4:
            theirs.append(user(str(len(seen))))
        return [*messages[-1:], user("end")]

    assert store.edit(key, keep_last).messages == (user("3"), user("end"))
    assert seen == [1, 2, 3, 4]


def test_store_edit_gives_up_after_so_many_attempts(store: Any, other: Any, key: str) -> None:
    theirs = other.create(key)

    def disturbed(messages: list[Any]) -> None:
        theirs.append(user("x"))
        messages.append(user("mine"))

    with pytest.raises(ConflictError):
        store.edit(key, disturbed, attempts=3)
    assert theirs.refresh().message_count == 3
    with pytest.raises(InvalidArgumentError):
        store.edit(key, disturbed, attempts=0)
    with pytest.raises(InvalidArgumentError):
        store.edit(key, lambda messages: "text")


# ----------------------------------------------------------------------------------------------- refusals


def test_a_stale_revision_conflicts_and_the_tail_can_be_fetched(store: Any, other: Any, key: str) -> None:
    handle = store.create(key, [user("1")])
    stale = handle.revision
    theirs = other.session(key)
    theirs.append(user("2"), user("3"))
    for refused in (
        lambda: handle.append(user("x"), expected_revision=stale),
        lambda: handle.pop(expected_revision=stale),
        lambda: handle.replace(0, 1, [], expected_revision=stale),
        lambda: handle.clear(expected_revision=stale),
        lambda: handle.update(metadata={}, expected_revision=stale),
        lambda: handle.delete(expected_revision=stale),
    ):
        with pytest.raises(ConflictError) as told:
            refused()
        assert (told.value.key, told.value.revision, told.value.message_count) == (key, theirs.revision, 3)
        assert told.value.fetch() == Unseen(theirs.revision, 1, [user("2"), user("3")])
    theirs.replace(0, None, [user("new")])
    with pytest.raises(ConflictError) as told:
        handle.append(user("x"), expected_revision=stale)
    assert told.value.fetch() == Unseen(theirs.revision, 0, [user("new")], rewritten=True)
    theirs.delete()
    with pytest.raises(ConflictError) as told:
        handle.append(user("x"), expected_revision=stale)
    assert (told.value.revision, told.value.fetch()) == (0, Unseen(0, 0, [], rewritten=True))
    assert not told.value.fetch().exists


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (["not an object"], "MESSAGE_NOT_OBJECT"),
        ({"n": float("nan")}, "MESSAGE_NOT_FINITE"),
        ({"n": float("-inf")}, "MESSAGE_NOT_FINITE"),
        ({"s": "\ud800"}, "MESSAGE_LONE_SURROGATE"),
        ({"_type": "metadata"}, "MESSAGE_RESERVED_TYPE"),
        ({"o": object()}, "MESSAGE_NOT_JSON"),
        ({1: "name"}, "MESSAGE_NOT_JSON"),
        ({"s": "x" * (8 << 20)}, "MESSAGE_TOO_LARGE"),
        ({"deep": eval("[" * 190 + "]" * 190), "er": [eval("[" * 100 + "]" * 100)]}, None),
    ],
)
def test_a_bad_message_is_named_and_nothing_is_stored(
    store: Any, key: str, bad: Any, reason: str | None
) -> None:
    handle = store.session(key)
    if reason is None:
        nested: Any = []
        for _ in range(220):
            nested = [nested]
        bad, reason = {"nested": nested}, "MESSAGE_TOO_DEEP"
    with pytest.raises(InvalidArgumentError) as told:
        handle.append(user("good"), bad)
    assert (told.value.reason, told.value.index) == (reason, 1)
    assert isinstance(told.value, LimitError) == reason.startswith("MESSAGE_TOO")
    assert not handle.refresh().exists


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("", "KEY_EMPTY"),
        ("x" * 513, "KEY_TOO_LONG"),
        ("a\0b", "KEY_INVALID"),
        ("a\nb", "KEY_INVALID"),
        ("a\ud800", "KEY_INVALID"),
        (42, "ARGUMENT_INVALID"),
        (b"bytes", "ARGUMENT_INVALID"),
    ],
)
def test_a_bad_key_is_named(store: Any, key: str, bad: Any, reason: str) -> None:
    handle = store.create(key)
    for call in (store.session, store.create, store.get, store.delete, handle.fork):
        with pytest.raises(InvalidArgumentError) as told:
            call(bad)
        assert told.value.reason == reason


def test_a_batch_over_the_limit_is_refused(store: Any, key: str) -> None:
    handle = store.session(key)
    with pytest.raises(InvalidArgumentError) as told:
        handle.append()
    assert told.value.reason == "BATCH_EMPTY"
    with pytest.raises(TooLargeError) as told:
        handle.append(*({} for _ in range(10_001)))
    assert (told.value.reason, told.value.metadata["limit"]) == ("BATCH_TOO_MANY", "10000")
    for megabytes in (16.5, 18):  # over the batch's limit, and over what the transport takes
        with pytest.raises(TooLargeError) as told:
            handle.append(*({"s": "x" * int(megabytes * 2**17)} for _ in range(8)))
        assert told.value.reason == "BATCH_TOO_LARGE"
    assert not handle.refresh().exists


def test_bad_changes_are_refused_with_their_reason(store: Any, key: str) -> None:
    handle = store.create(key, [user("1")])
    before = handle.head
    for call, reason in (
        (lambda: handle.replace(2, 0, []), "INDEX_OUT_OF_RANGE"),
        (lambda: handle.replace(0, 2, []), "INDEX_OUT_OF_RANGE"),
        (lambda: handle.replace(2**70, 0, []), "ARGUMENT_INVALID"),
        (lambda: handle.replace(True, 0, []), "ARGUMENT_INVALID"),
        (lambda: handle.replace(0, 0, user("not in a list")), "ARGUMENT_INVALID"),
        (lambda: handle.update(last_consolidated=2), "LAST_CONSOLIDATED_OUT_OF_RANGE"),
        (lambda: handle.update(last_consolidated=-1), "LAST_CONSOLIDATED_OUT_OF_RANGE"),
        (lambda: handle.update(), "FIELD_MASK_INVALID"),
        (lambda: handle.update(metadata=[]), "METADATA_INVALID"),
        (lambda: handle.update(metadata={"n": float("nan")}), "METADATA_INVALID"),
        (lambda: handle.update(metadata={}, patch={}), "ARGUMENT_INVALID"),
        (lambda: handle.update(patch=["x"]), "ARGUMENT_INVALID"),
        (lambda: handle.update(patch={"\ud800": REMOVE}), "ARGUMENT_INVALID"),
        (lambda: handle.update(metadata={"s": "x" * 300_000}), "METADATA_TOO_LARGE"),
        (lambda: handle.append({}, request_id="x" * 257), "REQUEST_ID_INVALID"),
        (lambda: handle.append({}, expected_revision="1"), "ARGUMENT_INVALID"),
    ):
        with pytest.raises(InvalidArgumentError) as told:
            call()
        assert told.value.reason == reason
    handle.clear()
    with pytest.raises(InvalidArgumentError) as told:
        handle.pop()
    assert told.value.reason == "INDEX_OUT_OF_RANGE"
    assert handle.head.create_time == before.create_time


def test_a_missing_session_is_not_found(store: Any, key: str) -> None:
    handle = store.session(key)
    for call in (handle.pop, handle.clear, handle.delete, lambda: handle.update(metadata={}),
                 lambda: handle.fork(key + "2")):  # fmt: skip
        with pytest.raises(NotFoundError):
            call()


# ------------------------------------------------------------------------------------------- request_ids


def test_a_request_id_applies_once_across_clients(store: Any, other: Any, key: str) -> None:
    handle = store.session(key)
    first = handle.append(user("1"), request_id="delivery-7")
    handle.append(user("2"))
    again = other.session(key).append(user("1"), request_id="delivery-7")
    assert (again.revision, again.first_index, again.replayed) == (first.revision, 0, True)
    assert handle.append(user("1"), request_id="delivery-7").replayed
    assert handle.messages == (user("1"), user("2"))
    with pytest.raises(InvalidArgumentError) as told:
        handle.append(user("else"), request_id="delivery-7")
    assert told.value.reason == "REQUEST_ID_REUSED"


def test_the_same_append_again_is_another_message(store: Any, key: str) -> None:
    handle = store.session(key)
    handle.append(user("1"))
    handle.append(user("1"))
    assert handle.messages == (user("1"), user("1"))


def test_refusals_are_all_of_one_tree(store: Any) -> None:
    with pytest.raises(SessionStoreError):
        store.session("")


def test_a_message_that_python_cannot_read_is_named(daemon: Daemon, open_store: Any) -> None:
    """Files from elsewhere may hold integers of more digits than Python reads."""
    handle = open_store(daemon.address).session("k")
    handle.append(user("1"))
    handle._snapshot.lines._shared[0] = b'{"n": ' + b"9" * 5000 + b"}"
    with pytest.raises(codec.MessageError):
        codec.decode(handle._snapshot.lines._shared[0])
    with pytest.raises(SessionStoreError) as told:
        _ = handle.messages
    assert told.value.reason == "DATA_LOSS"

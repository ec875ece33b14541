"""The whole way, from SDK call to store and back: both clients, every engine, real daemons, one model."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from clients import KINDS, Driver
from daemons import Daemon
from hypothesis import given, settings
from hypothesis import strategies as st
from model import Model, Session, mutations
from sessionstore import (
    REMOVE,
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    SessionStoreError,
)
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Fork,
    Mutation,
    Outcome,
    Pop,
    Refusal,
    Replace,
    Update,
)

ENGINES = ("memory:", "jsonl")


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon of each engine for all tests here: each uses keys of its own."""
    made = Daemon(tmp_path_factory.mktemp("data"), store=request.param)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    made = Driver(request.param)
    yield made
    made.close()


@pytest.fixture
def store(driver: Driver, served: Daemon) -> Any:
    return driver.open(served.address)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key that no other test uses."""
    return f"{request.node.name}:{time.time_ns()}"


A, B, C = ({"role": "user", "content": name} for name in "abc")


# Random histories.


class Asker:
    """Asks the SDK for a mutation of the rules, and tells what came of it in the rules' words."""

    def __init__(self, store: Any, model: Model) -> None:
        self.store = store
        self.model = model
        self.handles: dict[str, Any] = {}

    def ask(self, mutation: Mutation) -> Outcome:
        try:
            return self._ask(mutation)
        except SessionStoreError as error:
            return Refusal(error.reason, str(error), error.metadata)

    def handle(self, key: str) -> Any:
        """The handle that was used before, with whatever snapshot it has."""
        if key not in self.handles:
            self.handles[key] = self.store.session(key)
        return self.handles[key]

    def _ask(self, asked: Mutation) -> Answer:
        before = self.model.sessions.get(asked.key, Session())
        expected = {"expected_revision": asked.expected_revision}
        match asked:
            case Create():
                made = self.store.create(
                    asked.key,
                    dicts(asked.messages),
                    metadata=json.loads(asked.metadata),
                    last_consolidated=asked.last_consolidated,
                )
                self.handles[asked.key] = made
                return self._answer(made, before, 0)
            case Append():
                appended = self.handle(asked.key).append(*dicts(asked.messages), **expected)
                head = self._seen(asked.key, appended.revision)
                assert appended.message_count == head.message_count
                return self._answer(head, before, appended.first_index)
            case Replace():
                new = dicts(asked.messages)
                written = self.handle(asked.key).replace(asked.start, asked.delete_count, new, **expected)
                return self._written(asked.key, written, before, asked.start)
            case Pop():
                message = self.handle(asked.key).pop(**expected)
                assert message == json.loads(before.messages[-1])
                head = self._seen(asked.key)
                return replace(self._answer(head, before, head.message_count), message=before.messages[-1])
            case Update():
                fields: dict[str, Any] = {"last_consolidated": asked.last_consolidated}
                if asked.metadata is not None:
                    fields["metadata"] = json.loads(asked.metadata)
                if asked.members:
                    fields["patch"] = {
                        name: REMOVE if value is None else json.loads(value)
                        for name, value in asked.members.items()
                    }
                written = self.handle(asked.key).update(**fields, **expected)
                return self._written(asked.key, written, before, 0)
            case Fork():
                fork = self.handle(asked.source_key).fork(asked.key, asked.at)
                self.handles[asked.key] = fork
                return self._answer(fork, before, 0)
            case Delete():
                written = self.handle(asked.key).delete(**expected)
                assert not self.handle(asked.key).exists
                return self._answer(written, before, 0)

    def _seen(self, key: str, revision: int = 0) -> Any:
        """The handle, which must contain its own write."""
        handle = self.handle(key)
        assert handle.revision >= revision
        return handle

    def _written(self, key: str, written: Any, before: Session, first_index: int) -> Answer:
        handle = self._seen(key, written.revision)
        assert (handle.revision, handle.message_count) == (written.revision, written.message_count)
        assert handle.last_consolidated == written.last_consolidated
        assert handle.update_time == written.update_time
        return self._answer(handle, before, first_index)

    def _answer(self, head: Any, before: Session, first_index: int) -> Answer:
        updated = micros(head.update_time)
        count, consolidated = head.message_count, head.last_consolidated
        return Answer(head.revision, before.revision, count, consolidated, updated, first_index)


def dicts(lines: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def as_the_sdk_can_ask(mutation: Mutation, prefix: str) -> Mutation:
    """Under keys of this history; what the SDK has no argument for is left out, and no index is negative."""
    mutation = replace(mutation, key=prefix + mutation.key)
    match mutation:
        case Create():
            consolidated = abs(mutation.last_consolidated)
            return replace(mutation, expected_revision=None, last_consolidated=consolidated)
        case Replace():
            count = None if mutation.delete_count is None else abs(mutation.delete_count)
            return replace(mutation, start=abs(mutation.start), delete_count=count)
        case Update():
            consolidated = None if mutation.last_consolidated is None else abs(mutation.last_consolidated)
            if mutation.metadata is not None:
                return replace(mutation, members={}, last_consolidated=consolidated)
            return replace(mutation, last_consolidated=0 if consolidated is None else consolidated)
        case Fork():
            at = None if mutation.at is None else abs(mutation.at)
            return replace(mutation, source_key=prefix + mutation.source_key, at=at, expected_revision=None)
    return mutation


def test_histories_agree_with_the_model(store: Any, key: str) -> None:
    histories = iter(range(1_000_000))

    @settings(max_examples=12, deadline=None)
    @given(st.lists(mutations(), max_size=15))
    def history(steps: list[Mutation]) -> None:
        prefix = f"{key}:{next(histories)}:"
        model = Model()
        asker = Asker(store, model)
        for step in steps:
            mutation = model.resolve(as_the_sdk_can_ask(step, prefix))
            before = time.time_ns() // 1000
            outcome = asker.ask(mutation)
            model.check(mutation, outcome, before, time.time_ns() // 1000)
        assert [head.key for head in store.list(prefix)] == sorted(model.sessions, key=str.encode)
        for name, handle in asker.handles.items():
            session = model.sessions.get(name)
            for seen in (handle, store.session(name), handle.refresh()):
                assert seen.exists == (session is not None)
                assert list(seen.messages) == dicts(session.messages if session else [])
                if session is None:
                    continue
                assert seen.revision == session.revision
                assert seen.last_consolidated == session.last_consolidated
                assert list(seen.metadata.items()) == list(json.loads(session.metadata).items())
                assert micros(seen.update_time) == session.update_time_us
                assert micros(seen.create_time) == session.create_time_us

    history()


# What a history does not reach.

VALUES: list[dict[str, Any]] = [
    {"big": 2**63, "more": -(2**70), "float": 0.1, "tiny": 5e-324, "huge": 1.7976931348623157e308},
    {"z": 1, "a": [None, True, False, {"": []}], "é": "é", "emoji": "😀", "nul": "\x00", "line": "\u2028\n"},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": ""}], "unknown": {"x": {}}},
    {},
]


def test_values_come_back_equal_and_in_order(store: Any, key: str) -> None:
    store.session(key).append(*VALUES)
    got = list(store.session(key).messages)
    assert got == VALUES
    assert [list(message) for message in got] == [list(message) for message in VALUES]
    assert [type(value) for message in got for value in message.values()] == [
        type(value) for message in VALUES for value in message.values()
    ]


def test_reading_creates_nothing(store: Any, key: str) -> None:
    handle = store.session(key)
    assert (handle.exists, handle.revision, list(handle.messages)) == (False, 0, [])
    assert store.get(key) is None
    assert list(store.list(key)) == []
    with pytest.raises(NotFoundError):
        handle.pop()
    assert store.get(key) is None


def test_metadata_survives_as_values(store: Any, key: str) -> None:
    metadata = {"big": 2**60 + 1, "ключ": {"nested": [1.5, None]}, "a.b": "dot"}
    store.create(key, metadata=metadata)
    handle = store.session(key)
    handle.update(patch={"a.b": REMOVE, "c.d": [1], "big": 2**60 + 3}, last_consolidated=0)
    expected = {"big": 2**60 + 3, "ключ": {"nested": [1.5, None]}, "c.d": [1]}
    for seen in (handle.metadata, store.session(key).metadata, store.get(key).metadata):
        assert dict(seen) == expected
        assert list(seen) == list(expected)


def test_a_stale_writer_is_refused_and_can_fetch_what_it_has_not_seen(store: Any, key: str) -> None:
    stale = store.create(key, [A])
    store.session(key).append(B, C)
    with pytest.raises(ConflictError) as caught:
        stale.append(C, expected_revision=stale.revision)
    assert (caught.value.revision, caught.value.message_count) == (store.get(key).revision, 3)
    assert caught.value.fetch().messages == [B, C]
    assert list(store.session(key).messages) == [A, B, C]


def test_a_request_id_is_applied_once(store: Any, key: str) -> None:
    first = store.session(key).append(A, request_id="delivery")
    again = store.session(key).append(A, request_id="delivery")
    assert (again.revision, again.first_index, again.replayed) == (first.revision, first.first_index, True)
    with pytest.raises(InvalidArgumentError) as caught:
        store.session(key).append(B, request_id="delivery")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    assert list(store.session(key).messages) == [A]


def test_a_handle_contains_its_own_write_whatever_others_do(store: Any, key: str) -> None:
    mine, theirs = store.session(key), store.session(key)
    mine.append(A)
    theirs.append(B)
    assert list(theirs.messages) == [A, B]
    mine.append(C)
    assert list(mine.messages) == [A, B, C]
    theirs.replace(0, 1, [C])
    mine.pop()
    assert list(mine.messages) == [C, B]
    theirs.delete()
    mine.append(A)
    assert list(mine.messages) == [A]
    assert list(theirs.refresh().messages) == [A]


def test_edits_are_compared_and_set(store: Any, key: str) -> None:
    handle = store.create(key, [A, B])
    with handle.edit() as messages:
        messages[0]["content"] = "edited"
        messages.append(C)
    edited = [{"role": "user", "content": "edited"}, B, C]
    assert list(store.session(key).messages) == list(handle.messages) == edited
    store.session(key).append(A)
    with pytest.raises(ConflictError), handle.edit() as messages:
        del messages[:]
    with pytest.raises(ZeroDivisionError), handle.refresh().edit() as messages:  # noqa: PT012
        del messages[:]
        raise ZeroDivisionError
    assert list(store.session(key).messages) == [*edited, A]
    assert list(store.edit(key, lambda messages: messages[:1]).messages) == edited[:1]


def test_a_session_of_more_than_one_block_is_read_whole(store: Any, key: str) -> None:
    messages = [{"n": n, "text": "x" * 2000} for n in range(1500)]
    store.session(key).append(*messages[:900])
    store.session(key).append(*messages[900:])
    handle = store.session(key)
    assert list(handle.messages) == messages
    one = {"large": "y" * (3 << 20)}
    handle.append(one)
    assert list(store.session(key).messages) == [*messages, one]
    assert handle.pop() == one


def test_listings_have_four_orders_pages_and_times(store: Any, key: str) -> None:
    names = [f"{key}/{name}" for name in ("", "A", "a", "a/b", "é", "\ue000", "😀")]
    for name in reversed(names):
        store.create(name, [A])
        time.sleep(0.002)
    orders = {"key": names, "key desc": names[::-1], "update_time": names[::-1], "update_time desc": names}
    for order, expected in orders.items():
        for page_size in (1, 3, 1000):
            heads = store.list(f"{key}/", order_by=order, page_size=page_size)
            assert [head.key for head in heads] == expected
    since = store.get(names[2]).update_time
    assert {head.key for head in store.list(f"{key}/", updated_since=since)} == set(names[:3])
    heads = list(store.list(f"{key}/"))
    assert heads == [store.get(name) for name in names]


def test_what_does_not_change_is_listed_once_while_others_do(store: Any, key: str) -> None:
    still = [f"{key}/{n:02}" for n in range(0, 30, 2)]
    for name in still:
        store.create(name)
    for order in ("key", "key desc", "update_time", "update_time desc"):
        seen = []
        for number, head in enumerate(store.list(f"{key}/", order_by=order, page_size=4)):
            seen.append(head.key)
            moving = store.session(f"{key}/{1 + 2 * (number % 15):02}")
            if number % 3:
                moving.append(A)
            elif moving.exists:
                moving.delete()
        assert [name for name in sorted(seen) if name in still] == still


def test_keys_that_look_alike_are_sessions_of_their_own(store: Any, key: str) -> None:
    names = [f"{key}{end}" for end in ("a:b", "a/b", "a_b", "A:B", "..", "/ключ/✓", "x" * (512 - len(key)))]
    for number, name in enumerate(names):
        store.session(name).append({"n": number})
    assert [list(store.session(name).messages) for name in names] == [[{"n": n}] for n in range(len(names))]


def test_a_fork_goes_its_own_way(store: Any, key: str) -> None:
    source = store.create(key, [A, B, C], metadata={"a": 1}, last_consolidated=3)
    fork = source.fork(f"{key}:fork", 2)
    assert (list(fork.messages), dict(fork.metadata), fork.last_consolidated) == ([A, B], {"a": 1}, 2)
    source.replace(0, 1, [C])
    fork.append(C)
    assert list(store.session(f"{key}:fork").messages) == [A, B, C]
    assert list(store.session(key).messages) == [C, B, C]
    with pytest.raises(AlreadyExistsError):
        source.fork(f"{key}:fork")


def test_writers_at_once_lose_nothing(driver: Driver, served: Daemon, key: str) -> None:
    """Several stores, each in a thread: every message is there once, and each writer's in its order."""
    writers, count = 6, 25
    failures: list[BaseException] = []

    def write(writer: int, store: Any) -> None:
        try:
            handle = store.session(key)
            for number in range(count):
                appended = handle.append({"writer": writer, "n": number})
                assert handle.messages[appended.first_index] == {"writer": writer, "n": number}
        except BaseException as error:
            failures.append(error)

    stores = [driver.open(served.address) for _ in range(writers)]
    assert stores[0].get(key) is None
    threads = [threading.Thread(target=write, args=each) for each in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures, failures
    stored = list(driver.open(served.address).session(key).messages)
    assert len(stored) == writers * count
    for writer in range(writers):
        assert [message["n"] for message in stored if message["writer"] == writer] == list(range(count))


@pytest.mark.parametrize("kill", [False, True])
def test_a_client_lives_through_a_restart(
    make_daemon: Callable[..., Daemon], driver: Driver, kill: bool
) -> None:
    """The same store object goes on; what was acknowledged is there, and a request_id is still known."""
    daemon = make_daemon(store="jsonl").start()
    store = driver.open(daemon.address)
    handle = store.create("k", VALUES, metadata={"a": 2**60})
    handle.append(A, request_id="delivery")
    before = store.get("k")
    store_id = store.info().store_id
    daemon.restart(kill=kill)
    assert store.get("k") == before
    assert store.info().store_id == store_id
    assert list(store.session("k").messages) == [*VALUES, A]
    assert store.session("k").append(A, request_id="delivery").replayed
    handle.append(B)
    assert list(handle.messages) == [*VALUES, A, B]
    assert handle.revision > before.revision

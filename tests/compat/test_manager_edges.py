"""The drop-in at its edges: a close that meets a save, arguments of the wrong kind, changes JSON hides."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from compat.manager_fixtures import here, make_manager, store, texts, user
from daemons import wait_until
from scripted import Scripted
from sessionstore import SessionStore, codec
from sessionstore.errors import InvalidArgumentError
from sessionstore.manager import Session, SessionManager
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as pb

__all__ = ["here", "make_manager", "store"]


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    made = Scripted()
    yield made
    made.close()


def head(revision: int, *contents: str) -> pb.GetSessionResponse:
    """What a read gives that held nothing."""
    lines = codec.join([codec.encode(user(content)) for content in contents])
    session = session_pb2.Session(key="k", revision=revision, message_count=len(contents))
    return pb.GetSessionResponse(session=session, messages=lines)


def result(revision: int, previous: int, count: int) -> session_pb2.WriteResult:
    return session_pb2.WriteResult(revision=revision, previous_revision=previous, message_count=count)


def test_a_save_that_close_meets_is_made_to_its_end(
    scripted: Scripted, make_manager: Callable[..., SessionManager]
) -> None:
    """Messages, what others wrote meanwhile, and metadata: four calls, of which close meets the first."""
    manager = make_manager(scripted.address, timeout=300)

    def closing(_: Any, __: Any) -> Any:
        threading.Thread(target=manager.close).start()
        wait_until(lambda: manager._store._driver._connection.closed, what="the close")
        return pb.AppendMessagesResponse(result=result(3, 2, 3), first_index=2)

    scripted.script = [
        head(1, "0"),
        closing,
        head(3, "0", "theirs", "mine"),
        pb.UpdateSessionResponse(result=result(4, 3, 3)),
    ]
    session = manager.get_or_create("k")
    session.messages.append(user("mine"))
    session.metadata["a"] = 1
    manager.save(session)
    assert texts(session.messages) == ["0", "theirs", "mine"]
    assert not scripted.script
    with pytest.raises(RuntimeError, match="closed"):
        manager.save(session)


def test_an_acknowledged_save_is_not_denied_by_a_close_that_gives_up(
    scripted: Scripted, make_manager: Callable[..., SessionManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessionstore._driver.DRAIN_S", 300.0)
    manager = make_manager(scripted.address, timeout=300)
    stop = threading.Event()

    def closing(_: Any, __: Any) -> Any:
        threading.Thread(target=manager.close).start()
        wait_until(lambda: manager._store._driver._connection.closed, what="the close")
        return pb.AppendMessagesResponse(result=result(3, 2, 3), first_index=2)

    def read(_: Any, __: Any) -> None:
        driver = manager._store._driver
        with driver._changed:  # the time of the close is over
            driver._under_way = 0
            driver._changed.notify_all()
        stop.wait(300)

    scripted.script = [head(1, "0"), closing, read]
    session = manager.get_or_create("k")
    session.messages.append(user("mine"))
    manager.save(session)
    stop.set()
    assert texts(session.messages) == ["0", "mine"]


@pytest.mark.parametrize("key", [[], None, 1, {}])
def test_a_key_that_is_no_string_is_refused(here: SessionManager, key: Any) -> None:
    for call in (here.get_or_create, here.invalidate):
        with pytest.raises(InvalidArgumentError, match="key must be a string"):
            call(key)


@pytest.mark.parametrize("session", [None, "k", {"key": "k", "messages": []}])
def test_what_is_no_session_is_not_saved(here: SessionManager, session: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"must be a Session, not {type(session).__name__}"):
        here.save(session)


@pytest.mark.parametrize(
    ("stored", "edited"),
    [({"1": 2}, {1: 2}), ({"null": 2}, {None: 2}), ({"a": [{"1": 2}]}, {"a": [{1: 2}]})],
)
@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_names_that_became_no_strings_are_seen_and_refused(
    here: SessionManager, store: SessionStore, key: str, stored: Any, edited: Any, moved: bool
) -> None:
    """JSON writes 1 as it writes "1": such an edit is not stored, so a save must not say that it is."""
    store.create(key, [user(0), stored, user(2)])
    session = here.get_or_create(key)
    message = session.messages[1]
    message.clear()
    message.update(edited)
    if moved:
        del session.messages[0]
    with pytest.raises(InvalidArgumentError, match="a name must be a string") as told:
        here.save(session)
    assert (told.value.reason, told.value.index) == ("MESSAGE_NOT_JSON", 0 if moved else 1)
    assert here.get_or_create(key) is session  # unsaved, so untouched
    assert session.messages[0 if moved else 1] == edited
    assert store.session(key).messages[1] == stored


def test_names_of_metadata_that_became_no_strings_are_seen_and_refused(
    here: SessionManager, store: SessionStore, key: str
) -> None:
    before = store.create(key, metadata={"a": {"1": 2}}).head
    session = here.get_or_create(key)
    session.metadata["a"] = {1: 2}
    with pytest.raises(InvalidArgumentError, match="a name must be a string") as told:
        here.save(session)
    assert told.value.reason == "METADATA_INVALID"
    session.metadata["a"] = {"1": 2}
    here.save(session)
    assert store.get(key) == before


@pytest.fixture
def zone(request: pytest.FixtureRequest) -> Iterator[None]:
    """The local time zone."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.parametrize("zone", ["XXX-14"], indirect=True)
def test_a_created_at_that_utc_does_not_have_is_refused(here: SessionManager, zone: None, key: str) -> None:
    with pytest.raises(InvalidArgumentError, match="created_at"):
        here.save(Session(key, created_at=datetime(1, 1, 1)))


@pytest.mark.parametrize("zone", ["XXX+12"], indirect=True)
def test_a_session_as_old_as_the_calendar_is_served_everywhere(
    here: SessionManager, store: SessionStore, zone: None, key: str
) -> None:
    first = datetime.fromisoformat("0001-01-01T00:00:00+00:00")
    store.create(key, create_time=first)
    assert here.get_or_create(key).created_at == first.replace(tzinfo=None)
    assert {"0001-01-01T00:00:00"} == {
        session["created_at"] for session in here.list_sessions() if session["key"] == key
    }

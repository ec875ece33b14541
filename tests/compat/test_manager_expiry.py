"""The drop-in on a session that ended by itself: it is as if somebody else had deleted it."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from compat.manager_fixtures import here, make_manager, store, texts, user
from daemons import wait_until
from sessionstore import SessionStore
from sessionstore.errors import ConflictError
from sessionstore.manager import Session, SessionManager

__all__ = ["here", "make_manager", "store"]


@pytest.fixture
def ended(here: SessionManager, store: SessionStore, request: pytest.FixtureRequest) -> Session:
    """A session that the manager holds, and that has expired meanwhile."""
    key = request.node.name
    session = here.get_or_create(key)
    session.messages += [user("old"), user("older")]
    session.metadata["a"] = 1
    here.save(session)
    store.session(key).update(expire_time=timedelta(seconds=1))
    wait_until(lambda: store.get(key) is None, what="the end")
    return session


def test_a_save_without_changes_revives_nothing(
    here: SessionManager, store: SessionStore, ended: Session
) -> None:
    here.save(ended)
    assert (ended.messages, ended.metadata) == ([], {})
    assert store.get(ended.key) is None


def test_an_append_begins_a_new_session_with_what_is_new(
    here: SessionManager, store: SessionStore, ended: Session
) -> None:
    ended.messages.append(user("new"))
    here.save(ended)
    assert texts(ended.messages) == texts(store.session(ended.key).messages) == ["new"]
    assert ended.metadata == {}
    assert store.session(ended.key).expire_time is None


def test_a_rewrite_is_a_conflict(here: SessionManager, store: SessionStore, ended: Session) -> None:
    ended.messages[0]["content"] = "edited"
    with pytest.raises(ConflictError):
        here.save(ended)
    assert texts(ended.messages) == ["edited", "older"]
    assert store.get(ended.key) is None


def test_a_listing_and_another_manager_do_not_see_it(
    here: SessionManager, ended: Session, make_manager: Callable[..., SessionManager]
) -> None:
    other = make_manager(here.workspace)
    assert ended.key not in [each["key"] for each in other.list_sessions()]
    assert other.get_or_create(ended.key).messages == []

"""Rows U1 and U2 of docs/drop-in.md: saves whose outcome was unknown, and that are made again."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from clients import impatient
from compat.manager_fixtures import make_manager, store, texts, there, user
from daemons import Daemon
from proxies import Proxy
from sessionstore import SessionStore
from sessionstore.errors import CallExpiredError, ConflictError, OutcomeUnknownError
from sessionstore.manager import Session, SessionManager

__all__ = ["make_manager", "store", "there"]

# What is saved: a new session, an append, a rewrite, metadata.
SAVES = ["create", "append", "replace", "update"]
LOST = {"from_client": "the call was lost", "from_daemon": "the answer was lost"}


class Shaky:
    """A manager whose connection loses calls or answers until it is healed."""

    def __init__(self, manager: SessionManager, proxy: Proxy, store: SessionStore, key: str) -> None:
        self.manager, self.proxy, self.store, self.key = manager, proxy, store, key
        self.applied = False

    def unsaved(self, what: str) -> tuple[Session, list[str]]:
        """A session with an unsaved change, and what shall be stored after it."""
        if what != "create":
            self.store.create(self.key, [user(n) for n in range(3)])
        session = self.manager.get_or_create(self.key)
        if what == "update":
            session.metadata["a"] = 1
        elif what == "replace":
            session.messages[1]["content"] = "mine"
        else:
            session.messages.append(user("mine"))
        return session, texts(session.messages)

    def fail(self, session: Session, side: str) -> OutcomeUnknownError:
        before = self.store.get(self.key)
        for patience_s in (0.3, 2, 10, 50):  # a busy daemon drops a call whose caller has given up
            self.proxy.swallow(side)
            with pytest.raises(OutcomeUnknownError) as caught, impatient(self.manager._store, patience_s):
                self.manager.save(session)
            self.applied = self.applied or self.store.get(self.key) != before
            self.proxy.heal()
            if side == "from_client" or self.applied:
                return caught.value
        raise AssertionError("the daemon applies nothing")

    def agrees(self, session: Session, contents: list[str]) -> None:
        stored = self.store.session(self.key)
        assert texts(stored.messages) == contents
        assert (session.messages, session.metadata) == (list(stored.messages), stored.metadata)


@pytest.fixture
def proxy(shared_daemon: Daemon) -> Iterator[Proxy]:
    made = Proxy(shared_daemon.address)
    yield made
    made.close()


@pytest.fixture
def shaky(
    proxy: Proxy, make_manager: Callable[..., SessionManager], store: SessionStore, key: str
) -> Shaky:
    return Shaky(make_manager(proxy.address, timeout=100), proxy, store, key)


@pytest.mark.parametrize("side", LOST)
@pytest.mark.parametrize("what", SAVES)
def test_u1_saving_again_stores_once(shaky: Shaky, what: str, side: str) -> None:
    session, contents = shaky.unsaved(what)
    for _ in range(2):
        shaky.fail(session, side)
        assert shaky.manager.get_or_create(shaky.key) is session
        assert texts(session.messages) == contents
    shaky.manager.save(session)
    shaky.agrees(session, contents)
    shaky.manager.save(session)
    shaky.agrees(session, contents)


@pytest.mark.parametrize("side", LOST)
@pytest.mark.parametrize("what", SAVES)
def test_u1_so_does_the_errors_retry(shaky: Shaky, what: str, side: str) -> None:
    session, contents = shaky.unsaved(what)
    error = shaky.fail(session, side)
    error.retry()
    shaky.agrees(session, contents)
    error.retry()
    shaky.manager.save(session)
    shaky.agrees(session, contents)


def test_u1_also_over_a_restart_of_the_daemon(
    make_daemon: Callable[..., Daemon], make_manager: Callable[..., SessionManager], key: str
) -> None:
    daemon = make_daemon(store="jsonl").start()
    proxy = Proxy(daemon.address)
    try:
        with SessionStore(daemon.address) as store:
            shaky = Shaky(make_manager(proxy.address, timeout=100), proxy, store, key)
            session, contents = shaky.unsaved("append")
            shaky.fail(session, "from_daemon")
            daemon.restart(kill=True)
            shaky.manager.save(session)
            shaky.agrees(session, contents)
    finally:
        proxy.close()


@pytest.mark.parametrize("side", LOST)
@pytest.mark.parametrize("what", SAVES)
def test_u2_changed_again_after_it(shaky: Shaky, what: str, side: str) -> None:
    session, contents = shaky.unsaved(what)
    shaky.fail(session, side)
    session.messages.append(user("more"))
    session.metadata["b"] = 2
    shaky.manager.save(session)
    shaky.agrees(session, [*contents, "more"])


@pytest.mark.parametrize("side", LOST)
def test_u2_edited_again_after_it(shaky: Shaky, side: str) -> None:
    session, _ = shaky.unsaved("append")
    shaky.fail(session, side)
    session.messages[-1]["content"] = "edited"
    session.messages[0]["content"] = "edited too"
    shaky.manager.save(session)
    shaky.agrees(session, ["edited too", "1", "2", "edited"])


@pytest.mark.parametrize("side", LOST)
def test_u2_others_added_after_it(shaky: Shaky, there: SessionManager, side: str) -> None:
    session, _ = shaky.unsaved("append")
    shaky.fail(session, side)
    shaky.store.session(shaky.key).append(user("theirs"))
    session.messages.append(user("more"))
    shaky.manager.save(session)
    order = ["theirs", "mine"] if side == "from_client" else ["mine", "theirs"]
    shaky.agrees(session, ["0", "1", "2", *order, "more"])


@pytest.mark.parametrize("side", LOST)
def test_u2_rewritten_here_and_added_by_others_after_it(shaky: Shaky, side: str) -> None:
    session, _ = shaky.unsaved("append")
    shaky.fail(session, side)
    shaky.store.session(shaky.key).append(user("theirs"))
    session.messages[0]["content"] = "edited"
    before = [dict(message) for message in session.messages]
    for _ in range(2):
        with pytest.raises(ConflictError):
            shaky.manager.save(session)
        assert session.messages == before
    order = ["theirs", "mine"] if side == "from_client" else ["mine", "theirs"]
    assert texts(shaky.store.session(shaky.key).messages) == ["0", "1", "2", *order]


def test_u2_a_rewrite_that_was_never_applied_meets_others(shaky: Shaky) -> None:
    session, contents = shaky.unsaved("replace")
    shaky.fail(session, "from_client")
    shaky.store.session(shaky.key).append(user("theirs"))
    with pytest.raises(ConflictError):
        shaky.manager.save(session)
    assert texts(session.messages) == contents
    assert texts(shaky.store.session(shaky.key).messages) == ["0", "1", "2", "theirs"]


def test_u2_a_call_too_old_to_tell_is_never_applied_again(shaky: Shaky) -> None:
    session, _ = shaky.unsaved("append")
    shaky.fail(session, "from_daemon")
    other = shaky.manager.get_or_create(shaky.key + "/other")
    for n in range(1030):
        other.metadata["n"] = n
        shaky.manager.save(other)
    for _ in range(2):
        with pytest.raises(CallExpiredError):
            shaky.manager.save(session)
    shaky.manager.invalidate(shaky.key)
    fresh = shaky.manager.get_or_create(shaky.key)
    shaky.agrees(fresh, ["0", "1", "2", "mine"])


def test_an_interrupted_save_stores_once(shaky: Shaky, monkeypatch: pytest.MonkeyPatch) -> None:
    session, contents = shaky.unsaved("append")
    connection = shaky.manager._store._driver._connection
    send = connection.send

    def interrupted(rpc: Any, timeout_s: float) -> Any:
        send(rpc, timeout_s)
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shaky.manager.save(session)
    monkeypatch.undo()
    shaky.manager.save(session)
    shaky.agrees(session, contents)

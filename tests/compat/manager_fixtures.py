"""Fixtures for tests of the drop-in: managers on one daemon, as two processes have them. Import by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from daemons import Daemon
from sessionstore import SessionStore
from sessionstore.manager import SessionManager


@pytest.fixture
def make_manager() -> Iterator[Callable[..., SessionManager]]:
    made: list[SessionManager] = []

    def make(workspace: Any, **arguments: Any) -> SessionManager:
        made.append(SessionManager(workspace, **arguments))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


@pytest.fixture
def here(shared_daemon: Daemon, make_manager: Callable[..., SessionManager]) -> SessionManager:
    """The manager whose outcomes are looked at."""
    return make_manager(shared_daemon.address)


@pytest.fixture
def there(shared_daemon: Daemon, make_manager: Callable[..., SessionManager]) -> SessionManager:
    """Somebody else's manager."""
    return make_manager(shared_daemon.address)


@pytest.fixture
def store(shared_daemon: Daemon) -> Iterator[SessionStore]:
    """What is stored, seen directly."""
    with SessionStore(shared_daemon.address) as opened:
        yield opened


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": str(text)}


def texts(messages: Any) -> list[str]:
    return [message["content"] for message in messages]

"""Fixtures for tests of the SDK: each runs with the sync and with the async client. Import them by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from clients import KINDS, Driver
from daemons import Daemon


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """What opens stores of one kind; closes them at the end."""
    made = Driver(request.param)
    yield made
    made.close()


@pytest.fixture
def open_store(driver: Driver) -> Callable[..., Any]:
    """Open a store on a target."""
    return driver.open


@pytest.fixture
def store(driver: Driver, shared_daemon: Daemon) -> Any:
    """A store on a daemon that all tests share: use keys of your own, and do not end it."""
    return driver.open(shared_daemon.address)

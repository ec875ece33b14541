"""Fixtures for every test: real daemons.

`daemon` is one running daemon; `@pytest.mark.parametrize("daemon", ["memory:", "jsonl"], indirect=True)`
chooses its store. `make_daemon` makes as many as a test needs. What they wrote to stderr is printed with a
failure.
"""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Daemon
from hypothesis import HealthCheck, settings

# No verdict about how fast an example was made or run: a slow machine is not a defect. What fails is printed
# in a form that repeats it.
settings.register_profile(
    "any machine", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Make daemons, not yet started; arguments as Daemon's. Each has its own directory unless told one."""
    made: list[Daemon] = []

    def make(data: Path | None = None, **arguments: object) -> Daemon:
        made.append(Daemon(data or tmp_path / f"data{len(made)}", **arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()
        print(f"--- stderr of the daemon on {each.address or each.listen}:\n{each.stderr}")


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One running daemon of the memory engine for all tests that use keys of their own and do not end it."""
    shared = Daemon(tmp_path_factory.mktemp("shared")).start()
    yield shared
    shared.close()


@pytest.fixture
def key() -> str:
    """A key of this test's own."""
    return f"test:{uuid.uuid4()}"


@pytest.fixture
def daemon(request: pytest.FixtureRequest, make_daemon: Callable[..., Daemon]) -> Daemon:
    """A running daemon, of the memory engine unless parametrised with another store."""
    return make_daemon(store=getattr(request, "param", "memory:")).start()

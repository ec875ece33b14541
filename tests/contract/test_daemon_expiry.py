"""Expiry as a caller sees it: the SDK, sync and async, sessionctl, and a daemon with rules."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from daemons import Daemon, wait_until
from sdk_fixtures import driver, open_store
from sessionstore import KEEP, InvalidArgumentError, NotFoundError, SessionStore
from sessionstore.cli.app import sessionctl
from sessionstore.v1 import session_store_pb2 as v1

__all__ = ["driver", "open_store"]
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    rules = ("--expire", "tmp:=7d", "--expire", "tmp:keep:=never", "--expire", "brief:=1s")
    flags = (*rules, "--checkpoint-s-max", "0.1")
    daemon = Daemon(tmp_path_factory.mktemp("data"), store="jsonl", flags=flags)
    daemon.start()
    yield daemon
    daemon.close()


@pytest.fixture
def store(open_store: Callable[..., Any], ruled: Daemon) -> Any:
    return open_store(ruled.address)


def fresh(request: pytest.FixtureRequest, prefix: str = "") -> str:
    return prefix + re.sub(r"\W", "-", request.node.name)


def test_an_end_is_set_moved_and_taken_away(store: Any, request: pytest.FixtureRequest) -> None:
    key = fresh(request)
    ends = datetime.now(UTC).replace(microsecond=0) + DAY
    handle = store.create(key, [{"n": 1}], expires=ends)
    assert handle.expire_time == ends == store.get(key).expire_time
    handle.append({"n": 2})
    handle.update(metadata={"a": 1})
    handle.update(metadata={"a": 2}, expire_time=KEEP)
    assert handle.expire_time == ends
    before = datetime.now(UTC)
    handle.update(expire_time=2 * DAY)
    assert before + 2 * DAY <= handle.expire_time <= datetime.now(UTC) + 2 * DAY
    assert handle.refresh().expire_time == store.get(key).expire_time
    handle.update(expire_time=None)
    assert handle.expire_time is None
    assert store.get(key).expire_time is None
    assert handle.fork(key + "-fork").expire_time is None


def test_a_rule_shows_in_every_answer(store: Any, request: pytest.FixtureRequest) -> None:
    key = fresh(request, "tmp:")
    handle = store.session(key)
    assert handle.expire_time is None
    handle.append({"n": 1})
    assert handle.expire_time == handle.update_time + 7 * DAY
    handle.append({"n": 2})
    assert handle.expire_time == handle.update_time + 7 * DAY == store.get(key).expire_time
    (listed,) = store.list(key)
    assert listed.expire_time == handle.expire_time
    handle.update(expire_time=None)
    assert store.get(key).expire_time is None
    kept = store.create(fresh(request, "tmp:keep:"))
    assert kept.expire_time is None
    own = store.create(fresh(request, "tmp:own:"), expires=DAY)
    assert own.expire_time < datetime.now(UTC) + 2 * DAY


@pytest.mark.parametrize("how", ["rule", "own"])
def test_a_session_ends_while_its_handle_is_held(
    store: Any, request: pytest.FixtureRequest, how: str
) -> None:
    key = fresh(request, "brief:" if how == "rule" else "")
    handle = store.create(key, [{"n": 1}], expires=timedelta(seconds=1) if how == "own" else None)
    wait_until(lambda: store.get(key) is None, what="the end")
    assert handle.messages == ({"n": 1},)
    with pytest.raises(NotFoundError):
        handle.pop()
    handle.append({"n": 2})
    assert handle.messages == ({"n": 2},)


@pytest.mark.parametrize(
    "expires",
    [
        datetime(2020, 1, 1, tzinfo=UTC),
        datetime(1960, 1, 1, tzinfo=UTC),
        timedelta(0),
        -DAY,
        datetime(2090, 1, 1),  # nobody knows where
        timedelta.max,
        7,
        "7d",
    ],
)
def test_what_is_no_future_time_is_refused(store: Any, request: pytest.FixtureRequest, expires: Any) -> None:
    key = fresh(request)[:200]
    with pytest.raises(InvalidArgumentError, match="expire"):
        store.create(key, expires=expires)
    assert store.get(key) is None
    handle = store.create(key)
    with pytest.raises(InvalidArgumentError, match="expire"):
        handle.update(expire_time=expires)
    assert handle.refresh().expire_time is None


def test_the_mask_says_whether_it_changes(ruled: Daemon, request: pytest.FixtureRequest) -> None:
    key = fresh(request)
    with SessionStore(ruled.address) as store:
        handle = store.create(key, expires=DAY)
        ends = handle.expire_time
        update = v1.UpdateSessionRequest(key=key, last_consolidated=0)
        update.update_mask.paths.append("last_consolidated")
        result = ruled.stub.UpdateSession(update).result
        assert result.expire_time.ToDatetime(tzinfo=UTC) == ends
        update.update_mask.paths.append("expire_time")
        assert not ruled.stub.UpdateSession(update).result.HasField("expire_time")
        assert store.get(key).expire_time is None


def test_sessionctl_shows_and_sets_it(ruled: Daemon, request: pytest.FixtureRequest) -> None:
    key = fresh(request)

    def run(*arguments: str, exit_code: int = 0) -> str:
        done = CliRunner().invoke(sessionctl, ["--target", ruled.address, *arguments])
        assert done.exit_code == exit_code, done.output
        return done.output

    run("append", key, '{"n": 1}')
    assert "expires" not in run("show", key)
    run("expire", key, "36h")
    assert "expires 20" in run("show", key)
    run("expire", key, "2090-01-01T00:00:00+00:00")
    (head,) = [json.loads(line) for line in run("ls", "--json", "--prefix", key).splitlines()]
    assert head["expire_time"] == "2090-01-01T00:00:00+00:00"
    assert "never expires" in run("expire", key, "never")
    assert "expires" not in run("show", key)
    for wrong in ("soon", "7", "7y", "0d"):
        run("expire", key, wrong, exit_code=1 if wrong == "0d" else 2)
    run("expire", key + "-nobody", "7d", exit_code=1)
    assert "clock" not in run("info")

"""Watch at the wire: what it begins and ends with, who is too slow, and what the drain does to it."""

import time

import grpc
import pytest
from daemons import Daemon, wait_until
from sessionstore.v1 import session_store_pb2 as v1
from watchers import WatchingClient
from wire import block, numbered, refusal, refusal_of

STORES = pytest.mark.parametrize("daemon", ["memory:", "jsonl"], indirect=True)


def append(daemon: Daemon, key: str, *messages: object) -> None:
    daemon.stub.AppendMessages(v1.AppendMessagesRequest(key=key, messages=block(*messages)))


@pytest.fixture
def client(daemon: Daemon):
    made = WatchingClient(daemon.address, prefix="k")
    yield made
    made.close()


@STORES
def test_what_is_appended_comes_and_a_cursor_comes_while_nothing_happens(daemon: Daemon, client):
    client.begin()
    append(daemon, "k1", {"n": 1})
    append(daemon, "other", {"n": 1})
    client.wait(lambda follower: "k1" in follower.sessions)
    before = client.follower.cursor
    append(daemon, "other", {"n": 2})
    client.wait(lambda follower: follower.cursor > before)
    assert list(client.follower.sessions) == ["k1"]


@STORES
def test_list_and_then_watch_misses_nothing(daemon: Daemon):
    append(daemon, "k", {"n": 0})
    listed = daemon.stub.ListSessions(v1.ListSessionsRequest())
    got = daemon.stub.GetSession(v1.GetSessionRequest(key="k"))
    append(daemon, "k", {"n": 1})
    append(daemon, "l", {"n": 2})
    for reply in (listed, got):
        call = daemon.stub.Watch(iter([v1.WatchRequest(cursor=reply.cursor)]))
        events = [event for _, response in zip(range(2), call, strict=False) for event in response.events]
        assert [(event.key, event.changed.start) for event in events] == [("k", 1), ("l", 0)]
        call.cancel()


@STORES
def test_keys_come_and_go_on_one_stream(daemon: Daemon):
    append(daemon, "late", {"n": 0})
    got = daemon.stub.GetSession(v1.GetSessionRequest(key="late"))
    client = WatchingClient(daemon.address, keys=["k"]).begin()
    append(daemon, "late", {"n": 1})
    client.follower.hold(got.session, got.messages.split(b"\n")[:-1])
    client.ask(v1.WatchRequest(keys=["late"], cursor=got.cursor))
    client.wait(lambda follower: len(follower.sessions["late"].lines) == 2)
    client.ask(v1.WatchRequest(removed_keys=["late"]))
    client.half_close()
    wait_until(lambda: not _told(daemon, client, "late"), what="what is removed is not told")
    append(daemon, "k", {"n": 1})
    client.wait(lambda follower: "k" in follower.sessions)
    client.close()


def _told(daemon: Daemon, client: WatchingClient, key: str) -> bool:
    """Whether a change of a session is told: changes of the other one come behind it."""
    before = len(client.follower.sessions[key].lines)
    append(daemon, key, {"n": "?"})
    append(daemon, "k", {"n": "!"})
    count = daemon.stub.GetSession(v1.GetSessionRequest(key="k", last=0)).session.message_count
    client.wait(
        lambda follower: "k" in follower.sessions and len(follower.sessions["k"].lines) >= count
    )
    return len(client.follower.sessions[key].lines) > before


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (v1.WatchRequest(prefix="a", keys=["a"]), "ARGUMENT_INVALID", "prefix"),
        (v1.WatchRequest(removed_keys=["a"]), "ARGUMENT_INVALID", "removed_keys"),
        (v1.WatchRequest(prefix="a" * 513), "ARGUMENT_INVALID", "prefix"),
        (v1.WatchRequest(keys=[""]), "KEY_EMPTY", "keys"),
        (v1.WatchRequest(keys=[str(n) for n in range(10_001)]), "ARGUMENT_INVALID", "keys"),
        (v1.WatchRequest(progress_interval={"nanos": 1}), "ARGUMENT_INVALID", "progress_interval"),
        (v1.WatchRequest(progress_interval={"seconds": 3601}), "ARGUMENT_INVALID", "progress_interval"),
        (v1.WatchRequest(cursor=b"mine"), "CURSOR_INVALID", None),
    ],
)
def test_what_cannot_be_watched_is_refused(shared_daemon, request_, reason, field):
    found = refusal(lambda: list(shared_daemon.stub.Watch(iter([request_]))))
    assert (found.reason, found.metadata.get("field")) == (reason, field)


@pytest.mark.parametrize(
    "later",
    [
        v1.WatchRequest(prefix="a"),
        v1.WatchRequest(progress_interval={"seconds": 2}),
        v1.WatchRequest(keys=["a" * 513]),
        v1.WatchRequest(keys=["a"], cursor=b"mine"),
        v1.WatchRequest(keys=[str(n) for n in range(10_000)]),
    ],
)
def test_a_later_request_that_is_wrong_ends_the_watch(shared_daemon, later):
    client = WatchingClient(shared_daemon.address, keys=["k"]).begin()
    client.ask(later)
    assert client.ended().code() is grpc.StatusCode.INVALID_ARGUMENT
    client.close()


def test_there_are_at_most_so_many_watchers_and_one_that_is_gone_leaves_its_place(make_daemon):
    daemon = make_daemon(flags=("--watchers-max", "2")).start()
    clients = [WatchingClient(daemon.address).begin() for _ in range(2)]
    found = refusal(lambda: list(daemon.stub.Watch(iter([v1.WatchRequest()]))))
    assert (found.reason, found.metadata) == ("OVERLOADED", {"limit": "2"})
    clients[0].close()

    def free() -> bool:
        third = WatchingClient(daemon.address).begin()
        third.close()
        return third.error is None or third.error.code() is grpc.StatusCode.CANCELLED

    wait_until(free, what="the place of a client that went away is free")
    clients[1].close()


@STORES
def test_a_watcher_who_does_not_read_is_ended_and_loses_nothing(make_daemon, daemon):
    daemon = make_daemon(
        store=daemon.store, flags=("--watcher-bytes-max", "300000", "--checkpoint-s-max", "0.1")
    ).start()
    slow, quick = (WatchingClient(daemon.address).begin() for _ in range(2))
    slow.pause()
    count = 0
    for _ in range(200):  # what fits into the connection's own buffers comes before
        append(daemon, "k", *numbered(10, size=10_000))
        count += 10
    quick.wait(lambda follower: len(follower.sessions["k"].lines) == count)
    slow.go_on()
    ended = refusal_of(slow.ended())
    assert ended.reason == "WATCHER_TOO_SLOW"
    assert ended.metadata["limit_bytes"] == "300000"
    assert bytes.fromhex(ended.metadata["cursor"]) >= slow.follower.cursor
    slow.follower.begin_again()
    slow.begin()
    slow.wait(lambda follower: len(follower.sessions["k"].lines) == count)
    assert slow.follower.sessions["k"].lines == quick.follower.sessions["k"].lines
    assert slow.follower.wholes == 0
    slow.close()
    quick.close()


@STORES
def test_the_drain_ends_watches_at_once(daemon: Daemon, client):
    client.begin()
    append(daemon, "k", {"n": 1})
    began = time.monotonic()
    assert daemon.terminate() == 0
    ended = refusal_of(client.ended())
    assert ended.reason == "SHUTTING_DOWN"
    print(f"the daemon ended {time.monotonic() - began:.2f} s after the signal")
    assert "still under way" not in daemon.stderr

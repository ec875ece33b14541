"""What `in_step` tells a watcher: that it has everything that was acknowledged before it asked."""

import queue
import random
from collections.abc import Iterator

import pytest
from daemons import Daemon
from sessionstore.v1 import session_store_pb2 as v1
from wire import block

STORES = pytest.mark.parametrize("daemon", ["memory:", "jsonl"], indirect=True)
WAIT_S = 60.0


class Asking:
    """A Watch stream whose requests are numbered here, too."""

    def __init__(self, daemon: Daemon, first: v1.WatchRequest) -> None:
        self._requests: queue.Queue[v1.WatchRequest | None] = queue.Queue()
        self.asked = 0
        self.in_step = 0
        self.seen: dict[str, int] = {}
        self.ask(first)
        self.call = daemon.stub.Watch(iter(self._requests.get, None), timeout=WAIT_S)

    def ask(self, request: v1.WatchRequest | None = None) -> int:
        self.asked += 1
        self._requests.put(request or v1.WatchRequest())
        return self.asked

    def until(self, number: int) -> Iterator[v1.WatchResponse]:
        """The responses up to the one that tells that so many requests are in step."""
        while self.in_step < number:
            response = next(self.call)
            for event in response.events:
                self.seen[event.key] = event.revision
            assert response.in_step == 0 or self.in_step <= response.in_step <= self.asked
            self.in_step = max(self.in_step, response.in_step)
            yield response

    def close(self) -> None:
        self._requests.put(None)
        self.call.cancel()


def append(daemon: Daemon, key: str, *messages: object) -> int:
    reply = daemon.stub.AppendMessages(v1.AppendMessagesRequest(key=key, messages=block(*messages)))
    return reply.result.revision


@STORES
def test_each_request_is_answered_when_everything_is_given(daemon: Daemon) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    watch = Asking(daemon, v1.WatchRequest(prefix="k"))
    list(watch.until(1))
    for _ in range(60):
        written = {}
        for _ in range(rng.randrange(4)):
            key = f"k{rng.randrange(3)}"
            written[key] = append(daemon, key, {"x": "x" * rng.choice((1, 1000, 300_000))})
        list(watch.until(watch.ask()))
        assert {key: watch.seen[key] for key in written} == written
    watch.close()


@STORES
def test_a_session_that_is_added_is_in_step_with_all_that_is_behind_its_cursor(daemon: Daemon) -> None:
    append(daemon, "a", {"n": 0})
    watch = Asking(daemon, v1.WatchRequest(keys=["a"]))
    list(watch.until(1))
    for n in range(5):
        key = f"k{n}"
        append(daemon, key, {"n": 0})
        got = daemon.stub.GetSession(v1.GetSessionRequest(key=key))
        for _ in range(100):
            revision = append(daemon, key, {"x": "x" * 3000})
            append(daemon, "a", {"n": n})
        list(watch.until(watch.ask(v1.WatchRequest(keys=[key], cursor=got.cursor))))
        assert watch.seen[key] == revision
    watch.close()


@STORES
def test_nothing_is_told_to_be_in_step_that_was_not_taken(daemon: Daemon) -> None:
    """And several requests may share one answer."""
    watch = Asking(daemon, v1.WatchRequest(prefix="k"))
    for _ in range(50):
        watch.ask()
    responses = list(watch.until(51))
    assert watch.in_step == watch.asked == 51
    told = [response.in_step for response in responses if response.in_step]
    assert told == sorted(set(told))
    assert not responses[0].events
    watch.close()

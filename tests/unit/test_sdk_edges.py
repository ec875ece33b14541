"""The SDK at its edges: a close that meets acknowledged writes, probes that nobody answers, odd arguments."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import grpc
import pytest
from clients import driver_of
from daemons import Daemon, clean_environment, wait_until
from scripted import Scripted, refuse
from sessionstore import SessionStore, _adriver, _driver, codec
from sessionstore._operations import INFO
from sessionstore._snapshot import difference
from sessionstore.errors import (
    ConflictError,
    InvalidArgumentError,
    OutcomeUnknownError,
    TooLargeError,
    UnavailableError,
)
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as pb

Code = grpc.StatusCode
NOT_FOUND = refuse(Code.NOT_FOUND, "SESSION_NOT_FOUND")


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    made = Scripted()
    yield made
    made.close()


@pytest.fixture
def long_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits for as long as it takes; `give_up` ends that."""
    for module in (_driver, _adriver):
        monkeypatch.setattr(module, "DRAIN_S", 300.0)


def give_up(store: Any) -> None:
    """Let a close that waits give up now, as it does when its time is over."""
    driver = driver_of(store)
    if isinstance(driver, _adriver.AsyncDriver):
        driver._loop.call_soon_threadsafe(driver._ended.set)
        return
    with driver._changed:
        driver._under_way = 0
        driver._changed.notify_all()


# ----------------------------------------------------------------- an acknowledged write, and what comes next

# What a write gives that others' writes came before, so that the handle reads after its acknowledgement.
RESULT = session_pb2.WriteResult(revision=9, previous_revision=8, message_count=1)
READ = pb.GetSessionResponse(
    session=session_pb2.Session(key="k", revision=9, message_count=1), messages=b'{"n": 1}\n'
)
WRITES: dict[str, tuple[Callable[[Any], Any], Any, Callable[[Any], bool]]] = {
    "append": (
        lambda h: h.append({"n": 1}),
        pb.AppendMessagesResponse(result=RESULT, first_index=4),
        lambda value: (value.revision, value.first_index) == (9, 4),
    ),
    "pop": (
        lambda h: h.pop(),
        pb.PopMessageResponse(result=RESULT, message=b'{"popped": 1}'),
        lambda value: value == {"popped": 1},
    ),
    "replace": (
        lambda h: h.replace(0, 1, [{"n": 1}]),
        pb.ReplaceMessagesResponse(result=RESULT),
        lambda value: value.revision == 9,
    ),
    "update": (
        lambda h: h.update(patch={"n": 1}),
        pb.UpdateSessionResponse(result=RESULT),
        lambda value: value.revision == 9,
    ),
    "fork": (
        lambda h: h.fork("k/fork"),
        pb.ForkSessionResponse(result=RESULT),
        lambda value: value.key == "k/fork",
    ),
}
any_write = pytest.mark.parametrize("name", WRITES)


def closing(store: Any, reply: Any) -> Callable[..., Any]:
    """An answer that is given while another thread closes the store, and waits for what was begun."""

    def answer(_: Any, __: Any) -> Any:
        threading.Thread(target=store.close).start()
        connection = driver_of(store)._connection
        wait_until(lambda: connection.closed, what="the close")
        return reply

    return answer


def opened(scripted: Scripted, open_store: Any) -> tuple[Any, Any]:
    """A store, and a handle on a session that does not exist yet."""
    store = open_store(scripted.address, timeout=300)
    scripted.script = [NOT_FOUND]
    return store, store.session("k")


@any_write
def test_a_write_that_close_meets_is_returned_and_read(
    scripted: Scripted, open_store: Any, long_drain: None, name: str
) -> None:
    write, reply, right = WRITES[name]
    store, handle = opened(scripted, open_store)
    scripted.script = [closing(store, reply), READ]
    value = write(handle)
    assert right(value)
    seen = value if name == "fork" else handle
    assert (seen.revision, seen.messages) == (9, ({"n": 1},))
    with pytest.raises(RuntimeError, match="closed"):
        write(handle)


@any_write
def test_a_write_is_returned_if_close_gives_up_on_the_read_after_it(
    scripted: Scripted, open_store: Any, long_drain: None, name: str
) -> None:
    write, reply, right = WRITES[name]
    store, handle = opened(scripted, open_store)
    stop = threading.Event()

    def read(_: Any, __: Any) -> None:
        give_up(store)
        stop.wait(300)

    scripted.script = [closing(store, reply), read]
    value = write(handle)
    stop.set()
    assert right(value)
    seen = value if name == "fork" else handle
    assert (seen.revision, seen.exists, seen.messages) == (0, False, ())


@pytest.mark.parametrize("failure", [Code.DATA_LOSS, Code.DEADLINE_EXCEEDED, Code.INTERNAL])
def test_a_fork_that_cannot_be_read_is_returned_and_read_later(
    scripted: Scripted, open_store: Any, failure: grpc.StatusCode
) -> None:
    """Raising would say that nothing was stored; the handle is at the revision before the fork instead."""
    _, handle = opened(scripted, open_store)
    reply = pb.ForkSessionResponse(result=RESULT)
    scripted.script = [reply, refuse(failure, "DATA_LOSS" if failure is Code.DATA_LOSS else "")]
    if failure is Code.INTERNAL:
        scripted.script[1:] = [refuse(failure, "INTERNAL")]
    fork = handle.fork("k/fork")
    assert (fork.key, fork.exists, fork.revision, fork.messages) == ("k/fork", False, 0, ())
    scripted.script = [refuse(Code.ABORTED, "REVISION_CONFLICT", revision="9")]
    with pytest.raises(ConflictError), fork.edit() as messages:  # what was not seen is not overwritten
        messages.append({"n": 2})
    assert scripted.requests[-1].expected_revision == 0
    scripted.script = [READ]
    assert fork.refresh().messages == ({"n": 1},)
    assert fork.revision == 9


def test_an_append_brings_an_unread_fork_up_to_date(scripted: Scripted, open_store: Any) -> None:
    _, handle = opened(scripted, open_store)
    scripted.script = [pb.ForkSessionResponse(result=RESULT), refuse(Code.DEADLINE_EXCEEDED)]
    fork = handle.fork("k/fork")
    result = session_pb2.WriteResult(revision=10, previous_revision=9, message_count=2)
    read = pb.GetSessionResponse(
        session=session_pb2.Session(key="k/fork", revision=10, message_count=2),
        messages=b'{"n": 1}\n{"n": 2}\n',
    )
    scripted.script = [pb.AppendMessagesResponse(result=result, first_index=1), read]
    assert fork.append({"n": 2}).first_index == 1
    assert fork.messages == ({"n": 1}, {"n": 2})


def test_close_does_not_wait_for_its_own_caller(shared_daemon: Daemon, long_drain: None, key: str) -> None:
    """As a signal handler that closes does, in the midst of a call of its thread."""
    store = SessionStore(shared_daemon.address)
    store.create(key, [{"n": 1}])
    begun = time.monotonic()
    store.edit(key, lambda _: store.close())
    assert time.monotonic() - begun < _driver.DRAIN_S / 2  # a close that waits takes all of it
    with pytest.raises(RuntimeError, match="closed"):
        store.info()


def test_close_waits_for_edits_of_other_threads(
    shared_daemon: Daemon, open_store: Any, long_drain: None, key: str
) -> None:
    store = open_store(shared_daemon.address)
    store.create(key, [{"n": 1}])
    inside, go_on = threading.Event(), threading.Event()

    def function(messages: list[Any]) -> None:
        messages.append({"n": 2})
        inside.set()
        go_on.wait(100)

    made: list[Any] = []
    editor = threading.Thread(target=lambda: made.append(store.edit(key, function)))
    closer = threading.Thread(target=store.close)
    editor.start()
    assert inside.wait(60)
    closer.start()
    if isinstance(driver_of(store), _driver.Driver):  # of an async store, the edit holds its loop
        wait_until(lambda: driver_of(store)._connection.closed, what="the close")
    time.sleep(0.1)  # a close that does not wait breaks the edit meanwhile
    go_on.set()
    for thread in (editor, closer):
        thread.join(100)
    assert made[0].messages == ({"n": 1}, {"n": 2})
    assert open_store(shared_daemon.address).session(key).messages == made[0].messages


# --------------------------------------------------------------------------------------- daemons and targets


@pytest.mark.parametrize("code", [Code.UNKNOWN, Code.INTERNAL, Code.UNAVAILABLE, Code.CANCELLED])
def test_a_change_is_not_sent_to_what_answers_no_probe(
    scripted: Scripted, open_store: Any, code: grpc.StatusCode
) -> None:
    """What grpc itself says of a connection that it cannot make or understand is no daemon's answer."""
    scripted.probe = refuse(code)
    with pytest.raises(UnavailableError) as told:
        open_store(scripted.address, timeout=0.7).delete("k")
    assert told.value.reason == "NOT_CONNECTED"
    assert scripted.requests == []
    assert scripted.probes <= 20  # asked not without a pause
    probes, sent = scripted.probes, []

    def third(request: Any, context: Any) -> Any:
        sent.append(len(scripted.requests))
        return refuse(code)(request, context) if scripted.probes < probes + 3 else INFO.reply()

    scripted.probe = third
    open_store(scripted.address).delete("k")
    assert (sent, len(scripted.requests)) == ([0] * 3, 1)  # asked again, and only then sent


@pytest.mark.parametrize("code", [Code.UNIMPLEMENTED, Code.PERMISSION_DENIED])
def test_who_refuses_a_probe_is_asked_for_the_call_itself(
    scripted: Scripted, open_store: Any, code: grpc.StatusCode
) -> None:
    scripted.probe = refuse(code)
    open_store(scripted.address, timeout=100).delete("k")
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}", "127.0.0.1:1,unix:{}"])
def test_a_socket_path_that_no_socket_can_have_is_refused(open_store: Any, form: str) -> None:
    longest = "/tmp/" + "x" * 102
    assert repr(open_store(form.format(longest)))
    for path in (longest + "x", longest[:-1] + "é"):
        with pytest.raises(InvalidArgumentError, match="at most 107") as told:
            open_store(form.format(path))
        assert told.value.metadata["field"] == "target"
        assert "108 bytes" in str(told.value)


@pytest.mark.parametrize("slashes", ["/", "//", "///"])
def test_slashes_before_a_socket_path_are_one(
    make_daemon: Any, open_store: Any, tmp_path: Any, slashes: str
) -> None:
    """On both sides; to gRPC itself, what follows two is a host."""
    path = f"{tmp_path}/s"
    if len(path) > 107:
        pytest.skip(f"{tmp_path} leaves a socket no room")
    target = "unix:" + slashes + path.removeprefix("/")
    daemon = make_daemon(listen=target).start()
    assert daemon.address == f"unix:{path}"
    assert open_store(target, timeout=100).session("k").append({"n": 1}).message_count == 1
    asked = [sys.executable, "-m", "sessionstored", "health", "--target", target]
    assert subprocess.run(asked, env=clean_environment(), check=False, timeout=60).returncode == 0


def test_the_longest_socket_path_works(make_daemon: Any, open_store: Any, tmp_path: Any) -> None:
    room = 107 - len(f"{tmp_path}/")
    if room < 1:
        pytest.skip("the temporary directory's own path leaves no room for a socket's")
    target = f"unix:{tmp_path}/{'s' * room}"
    make_daemon(listen=target).start()
    assert open_store(target, timeout=100).session("k").append({"n": 1}).message_count == 1


# --------------------------------------------------------------------------------------------------- refusals


def test_a_request_over_the_transports_limit_tells_the_limit(shared_daemon: Daemon, open_store: Any) -> None:
    messages = [{"text": "x" * (6 << 20)}] * 7
    with pytest.raises(TooLargeError, match="its limit of a batch is 16777216") as told:
        open_store(shared_daemon.address, timeout=100).create("too large", messages)
    assert told.value.reason == "BATCH_TOO_LARGE"
    assert told.value.metadata["limit_bytes"] == str(16 << 20)
    assert int(told.value.metadata["size_bytes"]) > 42 << 20


def test_a_lowered_limit_of_a_batch_is_told_at_once(make_daemon: Any, open_store: Any) -> None:
    """By the daemon or, for much more, by the transport, which gives no reason; not after the timeout."""
    daemon = make_daemon(flags=("--batch-bytes-max", "20000", "--metadata-bytes-max", "1000")).start()
    store = open_store(daemon.address, timeout=1e5)  # who tried again would do so for longer than any test
    handle = store.session("k")
    for size in (21_000, 8 << 20):
        with pytest.raises(TooLargeError) as told:
            handle.append({"text": "x" * size})
        assert (told.value.reason, told.value.metadata["limit_bytes"]) == ("BATCH_TOO_LARGE", "20000")
    assert handle.append({"text": "x" * 10_000}).message_count == 1


@pytest.mark.parametrize(
    ("moment", "hours"), [(datetime(1, 1, 1), 14), (datetime(9999, 12, 31, 23), -12)]
)
def test_a_time_that_utc_does_not_have_is_refused(
    store: Any, key: str, moment: datetime, hours: int
) -> None:
    beyond = moment.replace(tzinfo=timezone(timedelta(hours=hours)))
    with pytest.raises(InvalidArgumentError, match="years 1 to 9999") as told:
        store.create(key, create_time=beyond)
    assert told.value.metadata["field"] == "create_time"
    with pytest.raises(InvalidArgumentError, match="updated_since"):
        store.list(updated_since=beyond)
    assert store.get(key) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("\ud800", "half of a surrogate pair"),
        (float("nan"), "NaN, Infinity or a number beyond"),
        ({1: 2}, "a name must be a string, not int: 1"),
        (object(), "type object is not JSON serializable"),
    ],
)
def test_metadata_that_is_refused_says_why_in_words(store: Any, key: str, value: Any, words: str) -> None:
    handle = store.create(key)
    for call in (lambda: handle.update(metadata={"a": value}), lambda: handle.update(patch={"a": value})):
        with pytest.raises(InvalidArgumentError, match=words) as told:
            call()
        assert told.value.reason == "METADATA_INVALID"
        assert "MESSAGE_" not in str(told.value) + told.value.metadata["detail"]
        assert words in told.value.metadata["detail"]


NAMES: list[tuple[Any, Any]] = [
    ({"1": 2}, {1: 2}),
    ({"true": 2}, {True: 2}),
    ({"null": 2}, {None: 2}),
    ({"a": [{"b": {"1": 2}}]}, {"a": [{"b": {1: 2}}]}),
]


@pytest.mark.parametrize(("stored", "edited"), NAMES)
def test_an_edit_to_names_that_are_no_strings_is_refused(
    store: Any, key: str, stored: Any, edited: Any
) -> None:
    """JSON writes both alike; storing nothing would say that the edit is stored."""
    handle = store.create(key, [{"n": 0}, stored])
    refused = pytest.raises(InvalidArgumentError, match="a name must be a string")
    with refused as told, handle.edit() as messages:
        messages[1] = edited
    assert (told.value.reason, told.value.index) == ("MESSAGE_NOT_JSON", 1)
    with pytest.raises(InvalidArgumentError, match="a name must be a string"):
        store.edit(key, lambda messages: [messages[0], edited])
    foreign = codec.encode(stored).replace(b": ", b":")
    with pytest.raises(InvalidArgumentError, match="a name must be a string"):
        difference([foreign], [edited])
    assert difference([foreign], [stored]) is None
    assert store.session(key).head == handle.head


def test_an_error_that_outlives_its_client_says_that_it_is_closed(
    scripted: Scripted, open_store: Any
) -> None:
    store, handle = opened(scripted, open_store)
    scripted.script = [refuse(Code.DEADLINE_EXCEEDED)]
    with pytest.raises(OutcomeUnknownError) as told:
        handle.append({"n": 1})
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        told.value.retry()

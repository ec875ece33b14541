"""What the SDK makes of lost connections, lost answers, refusals and daemons that are not there."""

import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from clients import driver_of, impatient
from daemons import Daemon, wait_until
from proxies import Proxy
from scripted import Scripted, refuse
from sessionstore import _adriver, _driver
from sessionstore.errors import (
    CallExpiredError,
    ConflictError,
    DeadlineExceededError,
    InternalError,
    LimitError,
    NotFoundError,
    OutcomeUnknownError,
    SessionStoreError,
    StorageFullError,
    UnavailableError,
    UnsupportedError,
)
from sessionstore.v1 import session_pb2, session_store_pb2

Code = grpc.StatusCode


@pytest.fixture
def proxy(shared_daemon: Daemon) -> Iterator[Proxy]:
    made = Proxy(shared_daemon.address)
    yield made
    made.close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    made = Scripted()
    yield made
    made.close()


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": str(text)}


# ------------------------------------------------------------------------------------ connections that break


@pytest.mark.parametrize("side", ["from_client", "from_daemon"])
def test_a_connection_cut_at_any_byte_applies_a_change_once(
    store: Any, open_store: Any, proxy: Proxy, key: str, side: str
) -> None:
    through = open_store(proxy.address, timeout=100).session(key)
    through.append(user("first"))
    cuts = replays = 0
    for step in range(25):
        cut = proxy.cut(**{side: step * 8})
        told = through.append(user(step))
        cuts += cut.done
        replays += told.replayed
        assert told.first_index == step + 1
    print(f"{side}: {cuts} of 25 appends met a cut, {replays} were applied before their answer was lost")
    assert cuts >= 8
    assert replays >= (2 if side == "from_daemon" else 0)
    expected = [user("first"), *(user(step) for step in range(25))]
    assert list(through.messages) == list(store.session(key).messages) == expected


def test_a_connection_cut_while_it_is_made_is_made_again(
    store: Any, open_store: Any, proxy: Proxy, key: str
) -> None:
    for step in range(0, 200, 20):
        for side in ("from_client", "from_daemon"):
            proxy.cut(**{side: step})
            fresh = open_store(proxy.address, timeout=100)
            fresh.session(key).append(user((step, side)))
    assert store.session(key).message_count == 20


def test_a_read_survives_a_cut(store: Any, open_store: Any, proxy: Proxy, key: str) -> None:
    messages = [{"n": n, "text": "x" * 100_000} for n in range(40)]
    store.create(key, messages)
    through = open_store(proxy.address, timeout=100)
    for at in (0, 900_000, 1_200_000, 3_000_000):
        cut = proxy.cut(from_daemon=at)
        assert list(through.session(key).messages) == messages
        assert cut.done


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], bool]]] = {
    "append": (lambda h: h.append(user("x")), lambda h, v: v.first_index == 2),
    "pop": (lambda h: h.pop(), lambda h, v: v == user(2)),
    "replace": (lambda h: h.replace(0, 1, [user("x")]), lambda h, v: v.message_count == 2),
    "clear": (lambda h: h.clear(), lambda h, v: v.message_count == 0),
    "update": (lambda h: h.update(metadata={"x": 1}), lambda h, v: h.metadata == {"x": 1}),
    "fork": (lambda h: h.fork(h.key + "/fork"), lambda h, v: v.messages == h.messages),
    "delete": (lambda h: h.delete(), lambda h, v: not h.exists),
}


@pytest.mark.parametrize("lost", ["from_client", "from_daemon"])
@pytest.mark.parametrize("name", CHANGES)
def test_retry_of_an_unknown_outcome_applies_once(
    store: Any, open_store: Any, proxy: Proxy, key: str, name: str, lost: str
) -> None:
    change, right = CHANGES[name]
    before = store.create(key, [user(1), user(2)])
    through = open_store(proxy.address)
    handle = through.session(key)
    proxy.swallow(lost)
    with pytest.raises(OutcomeUnknownError, match="retry") as told, impatient(through):
        change(handle)
    assert isinstance(told.value, TimeoutError)
    if lost == "from_client":
        assert store.get(key) == before.head
    proxy.heal()
    value = told.value.retry()
    assert right(handle, value)
    revision = handle.revision
    told.value.retry()
    assert (handle.revision, store.session(key).head) == (revision, handle.head)
    assert store.session(key).messages == handle.messages


@pytest.mark.parametrize("lost", ["from_client", "from_daemon"])
def test_an_unknown_edit_and_an_unknown_creation_can_be_retried(
    store: Any, open_store: Any, proxy: Proxy, key: str, lost: str
) -> None:
    through = open_store(proxy.address)
    through.info()
    proxy.swallow(lost)
    with pytest.raises(OutcomeUnknownError) as told, impatient(through):
        through.create(key, [user(1), user(2)], metadata={"m": 1})
    proxy.heal()
    handle = told.value.retry()
    assert handle.head == store.get(key)
    proxy.swallow(lost)
    block = handle.edit()
    block.__enter__().append(user(3))
    with pytest.raises(OutcomeUnknownError) as told, impatient(through):
        block.__exit__(None, None, None)
    proxy.heal()
    told.value.retry()
    assert list(handle.messages) == [user(1), user(2), user(3)]
    assert store.session(key).messages == handle.messages


def test_an_unknown_outcome_can_stay_unknown(open_store: Any, proxy: Proxy, key: str) -> None:
    through = open_store(proxy.address)
    handle = through.session(key)
    proxy.swallow("from_daemon")
    with pytest.raises(OutcomeUnknownError) as first, impatient(through):
        handle.append(user(1))
    with pytest.raises(OutcomeUnknownError) as second, impatient(through):
        first.value.retry()
    proxy.heal()
    assert second.value.retry().message_count == first.value.retry().message_count == 1
    assert handle.messages == (user(1),)


def test_an_unknown_write_may_land_later_unless_its_revision_is_past(
    store: Any, open_store: Any, proxy: Proxy, key: str
) -> None:
    through = open_store(proxy.address)
    handle = through.session(key)
    proxy.swallow("from_client")
    with pytest.raises(OutcomeUnknownError) as told, impatient(through):
        handle.append(user("mine"), expected_revision=0)
    store.session(key).append(user("theirs"))
    proxy.heal()
    with pytest.raises(ConflictError) as refused:
        told.value.retry()
    assert refused.value.fetch().messages == [user("theirs")]
    assert store.session(key).messages == (user("theirs"),)


# ------------------------------------------------------------------------------------------- daemons that die


def test_a_daemon_killed_under_writers_loses_and_doubles_nothing(
    make_daemon: Any, open_store: Any
) -> None:
    daemon = make_daemon(store="jsonl").start()
    store = open_store(daemon.address, timeout=300)
    acknowledged: dict[str, int] = {}
    failures: list[BaseException] = []
    done = threading.Event()

    def write(key: str) -> None:
        try:
            handle = store.session(key)
            while not done.is_set():
                handle.append(user(acknowledged.get(key, 0)))
                acknowledged[key] = acknowledged.get(key, 0) + 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(f"k{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        count = sum(acknowledged.copy().values())
        wait_until(
            lambda count=count: failures or sum(acknowledged.copy().values()) >= count + 20,
            what="20 acknowledgements",
        )
        daemon.restart(kill=True)
    done.set()
    for thread in threads:
        thread.join(300)
    assert not failures
    assert sum(acknowledged.values()) >= 60
    for key, count in acknowledged.items():
        assert list(store.session(key).messages) == [user(n) for n in range(count)]


def test_retry_finds_the_answer_after_a_restart(make_daemon: Any, open_store: Any) -> None:
    daemon = make_daemon(store="jsonl").start()
    proxy = Proxy(daemon.address)
    through, direct = open_store(proxy.address), open_store(daemon.address)
    handle = through.session("k")
    for patience_s in (0.4, 2, 10, 50):  # a busy daemon drops a call whose caller has given up
        proxy.swallow("from_daemon")
        with pytest.raises(OutcomeUnknownError) as told, impatient(through, patience_s):
            handle.append(user(1))
        if direct.get("k") is not None:
            break
        proxy.heal()
    daemon.restart(kill=True)
    proxy.heal()
    assert told.value.retry().replayed
    assert direct.session("k").messages == (user(1),)
    proxy.close()


# --------------------------------------------------------------------------------- daemons that are not there


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address at which nobody listens, and that nobody else is given."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_a_daemon_that_was_never_there_is_named_in_time(
    open_store: Any, tmp_path: Any, dead_address: str
) -> None:
    for target in (dead_address, f"unix:{tmp_path}/sock"):
        store = open_store(target, timeout=0.6)
        begun = time.monotonic()
        with pytest.raises(UnavailableError) as told:
            store.create("k")
        assert 0.5 < time.monotonic() - begun < 30  # the time that it was given, and not another
        assert isinstance(told.value, ConnectionError)
        assert told.value.reason == "NOT_CONNECTED"
        assert told.value.metadata == {"target": target}
        assert target in str(told.value)
        assert "sessionstored serve" in str(told.value)
        assert "SESSIONSTORE_TARGET" in str(told.value)


def test_a_port_that_never_answers_is_no_daemon(open_store: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        store = open_store(f"127.0.0.1:{mute.getsockname()[1]}", timeout=0.5)
        with pytest.raises(UnavailableError):
            store.session("k")
        with pytest.raises(UnavailableError):
            store.create("k")


def test_a_daemon_that_comes_late_is_found(make_daemon: Any, open_store: Any) -> None:
    daemon = make_daemon().start()
    daemon.kill()  # its address is known now
    starter = threading.Timer(0.5, daemon.start)
    store = open_store(daemon.address)
    starter.start()
    assert store.session("k").append(user(1)).message_count == 1
    starter.join()


def test_a_daemon_that_went_away(daemon: Daemon, open_store: Any) -> None:
    store = open_store(daemon.address)
    handle = store.session("k")
    handle.append(user(1))
    daemon.kill()
    with impatient(store):
        with pytest.raises(UnavailableError):
            handle.refresh()
        with pytest.raises(UnavailableError):  # known not to have been sent
            handle.append(user(2))
    assert handle.messages == (user(1),)


def test_the_next_target_is_tried(
    shared_daemon: Daemon, open_store: Any, tmp_path: Any, dead_address: str, key: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        targets = f"unix:{tmp_path}/none, {dead_address}, 127.0.0.1:{mute.getsockname()[1]}"
        store = open_store(f"{targets}, {shared_daemon.address}", timeout=100)
        assert store.session(key).append(user(1)).message_count == 1
        nobody = open_store(targets, timeout=0.7)
        with pytest.raises(UnavailableError) as told:
            nobody.session(key)
        assert told.value.metadata == {"target": targets}


# ------------------------------------------------------------------------------------------------- refusals


def appended(revision: int = 1) -> Any:
    result = session_pb2.WriteResult(
        revision=revision, previous_revision=revision - 1, message_count=revision
    )
    return session_store_pb2.AppendMessagesResponse(result=result, first_index=revision - 1)


@pytest.fixture
def append(scripted: Scripted, open_store: Any) -> Callable[..., Any]:
    """Append to a session that the script says does not exist."""

    def run(*script: Any) -> Any:
        scripted.script = [refuse(Code.NOT_FOUND, "SESSION_NOT_FOUND")]
        handle = open_store(scripted.address).session("k")
        scripted.script = list(script)
        scripted.requests.clear()
        return handle.append(user(1))

    return run


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Make a script's step one at whose answer the time of the call is over."""
    passed_s = 0.0

    class Shifted:
        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + passed_s

    for module in (_driver, _adriver):
        monkeypatch.setattr(module, "time", Shifted)

    def make(step: Any) -> Any:
        def answer(request: Any, context: Any) -> Any:
            nonlocal passed_s
            passed_s = 1e6
            return step(request, context)

        return answer

    return make


OVERLOADED = refuse(Code.RESOURCE_EXHAUSTED, "OVERLOADED", limit="1")
SHUTTING_DOWN = refuse(Code.UNAVAILABLE, "SHUTTING_DOWN")
LOST = refuse(Code.UNAVAILABLE)
EXPIRED = refuse(Code.FAILED_PRECONDITION, "CALL_EXPIRED", client_id="c", sequence="1")


@pytest.mark.parametrize(
    "script",
    [
        (OVERLOADED, SHUTTING_DOWN, LOST, refuse(Code.UNKNOWN)),
        (refuse(Code.INTERNAL), refuse(Code.CANCELLED), refuse(Code.UNKNOWN, "OUTCOME_UNKNOWN"),
         refuse(Code.RESOURCE_EXHAUSTED)),
    ],
    ids=["refused and lost", "broken"],
)  # fmt: skip
def test_the_very_same_call_is_sent_again(scripted: Scripted, append: Any, script: Any) -> None:
    append(*script, appended())
    first, *later = scripted.requests
    assert len(later) == len(script)
    assert first.call.sequence == 1
    assert len(first.call.client_id) == 32
    assert not first.call.age.ToNanoseconds()
    ages = [request.call.age.ToNanoseconds() for request in later]
    assert ages == sorted(ages)
    assert ages[0] >= 25_000_000
    for request in later:
        request.call.ClearField("age")
        assert request.SerializeToString() == first.SerializeToString()


def test_answered_through_follows_the_answers(scripted: Scripted, open_store: Any) -> None:
    scripted.script = [refuse(Code.NOT_FOUND, "SESSION_NOT_FOUND")]
    store = open_store(scripted.address)
    handle = store.session("k")
    scripted.requests.clear()

    def dropped() -> bool:
        gc.collect()  # does nothing while another thread is at it
        return bool(driver_of(store)._window.dropped)

    def sent(step: Any, error: type[Exception] | None = None) -> Any:
        scripted.script = [step]
        raised = None
        try:
            handle.append(user(1))
        except SessionStoreError as caught:
            raised = caught
        assert (type(raised) if raised else None) is error
        return raised

    def through() -> tuple[int, int]:
        call = scripted.requests[-1].call
        return call.sequence, call.answered_through

    sent(appended(1))
    assert through() == (1, 0)
    sent(refuse(Code.NOT_FOUND, "SESSION_NOT_FOUND"), NotFoundError)
    assert through() == (2, 1)
    unknown = sent(refuse(Code.INTERNAL, "INTERNAL", incident="i"), OutcomeUnknownError)
    assert unknown.metadata == {"incident": "i"}
    sent(appended(2))
    assert through() == (4, 2)
    scripted.script = [appended(1)]
    unknown.retry()
    assert through() == (3, 2)
    sent(appended(3))
    assert through() == (5, 4)
    unknown = sent(refuse(Code.INTERNAL, "INTERNAL"), OutcomeUnknownError)
    sent(appended(4))
    assert through() == (7, 5)
    del unknown
    wait_until(dropped, what="the end of the error's life")
    sent(appended(5))
    assert through() == (8, 7)


@pytest.mark.parametrize(
    ("script", "error", "reason", "sent"),
    [
        ([OVERLOADED] * 3, LimitError, "OVERLOADED", 2),
        ([SHUTTING_DOWN] * 3, UnavailableError, "SHUTTING_DOWN", 2),
        ([LOST] * 3, OutcomeUnknownError, "GRPC_UNAVAILABLE", 2),
        ([LOST, OVERLOADED, OVERLOADED], OutcomeUnknownError, "OVERLOADED", 2),
        ([refuse(Code.DEADLINE_EXCEEDED)], OutcomeUnknownError, "GRPC_DEADLINE_EXCEEDED", 1),
        ([refuse(Code.DEADLINE_EXCEEDED, "EXPIRED_IN_QUEUE")], DeadlineExceededError, "EXPIRED_IN_QUEUE", 1),
        ([LOST, refuse(Code.DEADLINE_EXCEEDED, "EXPIRED_IN_QUEUE")], OutcomeUnknownError,
         "EXPIRED_IN_QUEUE", 2),
        ([refuse(Code.INTERNAL, "INTERNAL", incident="i")], OutcomeUnknownError, "INTERNAL", 1),
        ([refuse(Code.RESOURCE_EXHAUSTED, "STORAGE_FULL")], StorageFullError, "STORAGE_FULL", 1),
        ([LOST, refuse(Code.RESOURCE_EXHAUSTED, "STORAGE_FULL")], OutcomeUnknownError, "STORAGE_FULL", 2),
        ([LOST, refuse(Code.ABORTED, "REVISION_CONFLICT")], ConflictError, "REVISION_CONFLICT", 2),
        ([refuse(Code.UNIMPLEMENTED)], UnsupportedError, "GRPC_UNIMPLEMENTED", 1),
        ([EXPIRED], CallExpiredError, "CALL_EXPIRED", 1),
    ],
)  # fmt: skip
def test_an_error_says_whether_something_was_stored(
    scripted: Scripted, append: Any, over: Any, script: list[Any], error: type[Exception], reason: str,
    sent: int,
) -> None:  # fmt: skip
    """What is told when the time is over after so many answers, or at once where no other try can help."""
    with pytest.raises(error) as told:
        append(*script[: sent - 1], over(script[sent - 1]), *script[sent:])
    assert type(told.value) is error
    assert told.value.reason == reason
    assert len(scripted.requests) == sent


def test_an_expired_call_says_whether_a_copy_was_sent(append: Any) -> None:
    with pytest.raises(CallExpiredError, match="No copy of it was applied"):
        append(EXPIRED)
    with pytest.raises(CallExpiredError, match="may have been applied"):
        append(LOST, EXPIRED)


@pytest.mark.parametrize(
    ("step", "error", "reason"),
    [
        (LOST, UnavailableError, "GRPC_UNAVAILABLE"),
        (OVERLOADED, LimitError, "OVERLOADED"),
        (refuse(Code.INTERNAL, "INTERNAL", incident="i"), InternalError, "INTERNAL"),
        (refuse(Code.DEADLINE_EXCEEDED), DeadlineExceededError, "GRPC_DEADLINE_EXCEEDED"),
    ],
)
def test_a_read_never_has_an_unknown_outcome(
    scripted: Scripted, open_store: Any, over: Any, step: Any, error: type[Exception], reason: str
) -> None:
    scripted.script = [over(step), step]
    with pytest.raises(error) as told:
        open_store(scripted.address).session("k")
    assert (type(told.value), told.value.reason) == (error, reason)


def test_a_session_rewritten_while_it_is_read_is_read_again(scripted: Scripted, open_store: Any) -> None:
    def head(revision: int, *, truncated: bool) -> Any:
        session = session_pb2.Session(key="k", revision=revision, message_count=2)
        return session_store_pb2.GetSessionResponse(
            session=session, messages=b'{"n": 1}\n', next=1, truncated=truncated
        )

    rest = session_store_pb2.ReadMessagesResponse(messages=b'{"n": 2}\n', start=1, next=2)
    scripted.script = [
        head(1, truncated=True),
        refuse(Code.ABORTED, "REVISION_CONFLICT"),
        head(2, truncated=True),
        refuse(Code.OUT_OF_RANGE, "INDEX_OUT_OF_RANGE"),
        head(3, truncated=True),
        refuse(Code.NOT_FOUND, "SESSION_NOT_FOUND"),
        head(4, truncated=True),
        rest,
    ]
    handle = open_store(scripted.address).session("k")
    assert (handle.revision, handle.messages) == (4, ({"n": 1}, {"n": 2}))
    scripted.script = [head(5, truncated=True), refuse(Code.ABORTED, "REVISION_CONFLICT")] * 20
    with pytest.raises(ConflictError):
        handle.refresh()
    assert handle.revision == 4


def test_an_acknowledged_write_is_never_denied_by_a_failed_read(scripted: Scripted, open_store: Any) -> None:
    """Others wrote in between, so the handle reads; that the read fails says nothing about the write."""
    scripted.script = [refuse(Code.NOT_FOUND, "SESSION_NOT_FOUND")]
    handle = open_store(scripted.address).session("k")
    result = session_pb2.WriteResult(revision=9, previous_revision=8, message_count=5)
    reply = session_store_pb2.AppendMessagesResponse(result=result, first_index=4)
    scripted.script = [reply, refuse(Code.DATA_LOSS, "DATA_LOSS")]
    assert handle.append(user(1)).revision == 9
    assert (handle.revision, handle.messages) == (0, ())


# --------------------------------------------------------------------------------------------------- closing


def test_a_closed_client_says_so_and_closes_again(store: Any, key: str) -> None:
    handle = store.session(key)
    store.close()
    store.close()
    for call in (lambda: store.session(key), lambda: handle.append(user(1)), handle.refresh, store.info):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_closing_waits_for_calls_under_way(scripted: Scripted, open_store: Any) -> None:
    store = open_store(scripted.address, timeout=100)
    store.info()
    begun = threading.Event()

    def slow(_: Any, __: Any) -> Any:
        begun.set()
        wait_until(lambda: driver_of(store)._connection.closed, what="the close")
        time.sleep(0.2)  # a close that does not wait breaks the call meanwhile
        return session_store_pb2.CreateSessionResponse()

    scripted.script = [slow]
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(store.create("k")))
    thread.start()
    assert begun.wait(60)
    store.close()
    thread.join(60)
    assert made[0].key == "k"


def test_closing_gives_up_a_call_that_meets_no_daemon(open_store: Any) -> None:
    assert _driver.DRAIN_S == _adriver.DRAIN_S == 5
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(60)
        store = open_store(f"127.0.0.1:{mute.getsockname()[1]}", timeout=300)
        failed: list[BaseException] = []

        def call() -> None:
            try:
                store.create("k")
            except UnavailableError as error:
                failed.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        with mute.accept()[0]:  # the call is under way
            store.close()
            thread.join(60)  # and not the time that the call has
        assert "closed" in str(failed[0])


def test_closing_gives_up_a_call_that_is_not_answered(
    scripted: Scripted, open_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_driver, _adriver):
        monkeypatch.setattr(module, "DRAIN_S", 0.5)
    store = open_store(scripted.address, timeout=300)
    store.info()
    stop = threading.Event()
    scripted.script = [lambda _, __: stop.wait(300)] * 2
    failed: list[BaseException] = []

    def call(what: Callable[..., Any]) -> None:
        try:
            what("k")
        except SessionStoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(what,)) for what in (store.create, store.session)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(scripted.requests) == 2, what="both calls")
    store.close()
    for thread in threads:
        thread.join(60)
    stop.set()
    assert {type(error) for error in failed} == {OutcomeUnknownError, UnavailableError}


def test_many_callers_move_to_the_next_target_together(
    make_daemon: Any, open_store: Any, tmp_path: Any
) -> None:
    """One store on two addresses: the first goes away under its callers, and comes back."""
    daemon = make_daemon(store="memory:").start()
    first, second = Proxy(daemon.address), Proxy(daemon.address)
    store = open_store(f"{first.address},{second.address}", timeout=300)
    failures: list[BaseException] = []
    acknowledged = [0] * 8
    done = threading.Event()

    def write(number: int) -> None:
        try:
            handle = store.session(f"k{number}")
            while not done.is_set():
                handle.append(user(handle.message_count))
                acknowledged[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for gone in (first, second, first):
        gone.refuse()
        before = sum(acknowledged)
        wait_until(lambda before=before: sum(acknowledged) > before + 50, what="the move")
        gone.heal()
    done.set()
    for thread in threads:
        thread.join(300)
    assert not failures
    for number in range(8):
        stored = store.session(f"k{number}").messages
        assert list(stored) == [user(n) for n in range(acknowledged[number])]
    first.close()
    second.close()

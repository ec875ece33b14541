"""Turns with both clients on a real daemon: the lease around a block, its renewal, its loss, and its end."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from clients import driver_of, impatient
from daemons import Daemon, wait_until
from proxies import Proxy
from sessionstore import (
    AsyncSessionStore,
    LeaseHeldError,
    LeaseLostError,
    NotFoundError,
    SessionStore,
    Turn,
    UnavailableError,
    _turn,
)
from sessionstore._calls import age_clock
from sessionstore._turn import Holding, default_holder
from sessionstore._types import Lease
from sessionstore.errors import InvalidArgumentError, error_for

HI = {"role": "user", "content": "hi"}
ANY_S = 60.0


@pytest.fixture
def other(shared_daemon: Daemon) -> Any:
    """Another client, of another process as far as the daemon knows."""
    with SessionStore(shared_daemon.address, timeout=ANY_S) as store:
        yield store


def seize(store: Any, key: str) -> None:
    """End the lease of a session behind its holder's back, as a daemon that lost it would."""
    driver_of(store).run(Holding(store.session(key).lease(), age_clock()).release())


# ------------------------------------------------------------------------------------------ within a turn


def test_a_turn_writes_while_nobody_else_does(store: Any, other: Any, key: str) -> None:
    handle = store.session(key)
    theirs = other.session(key)
    with handle.turn(holder="agent:7") as turn:
        assert turn.append(HI).first_index == 0
        with pytest.raises(LeaseHeldError) as told:
            theirs.append(HI)
        assert (told.value.key, told.value.holder, told.value.allows_appends) == (key, "agent:7", False)
        assert 0 <= told.value.age_s < ANY_S
        assert 0 < told.value.expires_in_s <= 60
        with pytest.raises(LeaseHeldError):
            handle.append(HI)  # the turn's own process, without the token
        lease = theirs.lease()
        assert (lease.holder, lease.fencing_token, lease.ttl_s) == ("agent:7", turn.token, 60.0)
        assert 0 < lease.remaining_s <= 60
        assert not turn.lost
    assert theirs.lease() is None
    assert turn.lost
    theirs.append(HI)
    with pytest.raises(LeaseLostError, match="has ended"):
        turn.append(HI)
    assert len(store.session(key).messages) == 2


def test_every_change_of_a_turn_is_under_its_lease(store: Any, key: str) -> None:
    with store.session(key).turn() as turn:
        turn.append(HI, HI, HI)
        turn.replace(0, 1, [{"n": 0}], expected_revision=turn.revision)
        assert turn.pop() == HI
        turn.update(patch={"a": 1})
        with turn.edit() as messages:
            messages.append({"n": 2})
        assert turn.messages == ({"n": 0}, HI, {"n": 2})
        assert turn.metadata == {"a": 1}
        fork = turn.fork(f"{key}/fork", 1)
        fork.append(HI)
        assert not hasattr(fork, "token")
        turn.clear()
        turn.delete()
        with pytest.raises(NotFoundError):
            turn.pop()
    assert not store.session(key).exists


def test_the_handle_sees_what_its_turn_writes(store: Any, other: Any, key: str) -> None:
    handle = store.session(key)
    other.session(key).append(HI)
    with handle.turn() as turn:
        assert turn.message_count == handle.message_count == 1, "the turn begins with what others wrote"
        turn.append({"n": 1})
        assert handle.messages == turn.messages == (HI, {"n": 1})
        assert handle.revision == turn.revision
        assert turn.history() == handle.history()
    assert handle.append({"n": 2}).first_index == 2


def test_others_may_append_if_the_turn_lets_them(store: Any, other: Any, key: str) -> None:
    theirs = other.session(key)
    with store.session(key).turn(allow_appends=True) as turn:
        theirs.append(HI)
        with pytest.raises(LeaseHeldError) as told:
            theirs.pop()
        assert told.value.allows_appends
        assert theirs.lease().allows_appends
        assert turn.refresh().messages == (HI,)
        turn.clear()


def test_turns_come_one_after_the_other(store: Any, other: Any, key: str) -> None:
    with (
        store.session(key).turn(ttl=30),
        pytest.raises(LeaseHeldError),
        other.session(key).turn(wait=0),
    ):
        raise AssertionError("two turns at a time")
    first = store.session(key).turn(ttl=30)
    first.__enter__()
    waiting = threading.Thread(target=lambda: other.session(key).append({"n": 2}, wait=ANY_S))
    waiting.start()
    first.__exit__(None, None, None)
    waiting.join(ANY_S)
    assert store.session(key).messages == ({"n": 2},)


def test_an_append_waits_only_as_long_as_it_says(store: Any, other: Any, key: str) -> None:
    with store.session(key).turn() as turn:
        with pytest.raises(LeaseHeldError):
            other.session(key).append(HI, wait=0.2)
        turn.append({"n": 1}, wait=5)
    assert store.session(key).messages == ({"n": 1},)


def test_an_error_ends_the_turn_and_stays_the_error(store: Any, key: str) -> None:
    with pytest.raises(ZeroDivisionError), store.session(key).turn() as turn:  # noqa: PT012
        turn.append(HI)
        _ = 1 / 0
    assert store.session(key).lease() is None


def test_what_cannot_be_meant_is_refused(store: Any, key: str) -> None:
    handle = store.session(key)
    for wrong in ({"ttl": 0}, {"ttl": 3601}, {"ttl": "long"}, {"ttl": float("nan")}, {"wait": -1},
                  {"wait": True}, {"holder": ""}, {"holder": "x" * 257}, {"holder": 7}):  # fmt: skip
        with pytest.raises(InvalidArgumentError), handle.turn(**wrong):
            raise AssertionError(wrong)
    with pytest.raises(InvalidArgumentError):
        handle.append(HI, wait=-1)
    assert handle.lease() is None
    assert not handle.exists


def test_who_has_it_unless_told(store: Any, key: str) -> None:
    with store.session(key).turn() as turn:
        assert store.session(key).lease().holder.split(":")[1] == str(os.getpid())
        assert str(turn.token) in repr(turn)
    assert "lost" in repr(turn)
    assert len(default_holder("ключ" * 100).encode()) <= 256


# ------------------------------------------------------------------------------------- renewed, and lost


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew 200 times in a ttl: a machine may be slow for the whole of it."""
    monkeypatch.setattr(_turn, "_RENEWALS_PER_TTL", 200)


def renewals(store: Any, *keys: str, count: int = 3) -> None:
    """Wait until each of these leases was renewed so often."""
    for key in keys:
        handle, seen = store.session(key), [0.0]

        def often_enough(handle: Any = handle, seen: list[float] = seen) -> bool:
            remaining_s = handle.lease().remaining_s
            seen[-1:] = [remaining_s] if remaining_s <= seen[-1] else [seen[-1], remaining_s]
            return len(seen) > count + 1

        wait_until(often_enough, what=f"{count} renewals")


@pytest.mark.usefixtures("often")
def test_it_is_renewed_in_the_background(store: Any, other: Any, key: str) -> None:
    with store.session(key).turn(ttl=60) as turn:
        token = turn.token
        renewals(other, key)
        assert other.session(key).lease().fencing_token == token
        turn.append(HI)
    assert not other.session(key).lease()


@pytest.mark.usefixtures("often")
def test_several_turns_of_one_client_are_renewed(store: Any, other: Any, key: str) -> None:
    a, b = f"{key}/a", f"{key}/b"
    with store.session(a).turn(ttl=60), store.session(b).turn(ttl=90):
        renewals(other, a, b)
    with store.session(a).turn(ttl=60):  # the thread had ended
        renewals(other, a)


@pytest.mark.usefixtures("often")
def test_a_lost_lease_is_noticed_by_the_renewal(store: Any, other: Any, key: str) -> None:
    with pytest.raises(LeaseLostError) as told, store.session(key).turn(ttl=60) as turn:  # noqa: PT012
        turn.append(HI)
        seize(other, key)
        other.session(key).append({"n": 1})
        wait_until(lambda: turn.lost)
        with pytest.raises(LeaseLostError):
            turn.append(HI)
        with pytest.raises(LeaseLostError):
            turn.refresh()
    assert (told.value.key, told.value.fencing_token) == (key, turn.token)
    assert store.session(key).messages == (HI, {"n": 1})


def test_a_lost_lease_is_noticed_by_the_next_change(store: Any, other: Any, key: str) -> None:
    with pytest.raises(LeaseLostError), store.session(key).turn(ttl=600) as turn:  # noqa: PT012
        seize(other, key)
        assert not turn.lost
        with pytest.raises(LeaseLostError):
            turn.append(HI)
        assert turn.lost


def test_another_error_is_not_covered_up_by_the_loss(store: Any, other: Any, key: str) -> None:
    with pytest.raises(ZeroDivisionError), store.session(key).turn(ttl=600) as turn:  # noqa: PT012
        seize(other, key)
        with pytest.raises(LeaseLostError):
            turn.clear()
        _ = 1 / 0


def test_who_is_cut_off_for_a_ttl_has_lost_it(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any]
) -> None:
    """By its own clock: the daemon cannot tell it."""
    daemon = make_daemon().start()
    proxy = Proxy(daemon.address)
    try:
        store = open_store(proxy.address)
        begun_s = time.monotonic()
        handle = store.session("k")
        with pytest.raises(LeaseLostError, match="within"), handle.turn(ttl=2) as turn:  # noqa: PT012
            proxy.refuse()
            wait_until(lambda: turn.lost)
            assert time.monotonic() - begun_s >= 2
            with pytest.raises(LeaseLostError, match="within its ttl"):
                turn.append(HI)
    finally:
        proxy.close()


def test_a_restart_of_the_daemon_is_survived(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any]
) -> None:
    daemon = make_daemon(store="jsonl").start()
    store = open_store(daemon.address)
    with store.session("k").turn(ttl=ANY_S) as turn:
        turn.append(HI)
        daemon.restart(kill=True)
        turn.append({"n": 1})
        with SessionStore(daemon.address) as other, pytest.raises(LeaseHeldError):
            other.session("k").append(HI)
    assert store.session("k").messages == (HI, {"n": 1})
    assert store.session("k").lease() is None


def test_the_end_of_a_turn_waits_for_no_daemon_that_is_gone(
    make_daemon: Callable[..., Daemon], open_store: Callable[..., Any]
) -> None:
    daemon = make_daemon().start()
    store = open_store(daemon.address, timeout=3600)
    with store.session("k").turn(ttl=600):
        daemon.kill()
    with impatient(store), pytest.raises(UnavailableError), store.session("k").turn(wait=0):
        raise AssertionError("there is no daemon")


def test_a_client_that_is_closed_within_a_turn(make_daemon, open_store) -> None:
    store = open_store(make_daemon().start().address)
    handle = store.session("k")
    with handle.turn() as turn:
        turn.append(HI)
        store.close()
        with pytest.raises(RuntimeError):
            turn.append(HI)


# ----------------------------------------------------------------------------------------- what it knows


def held(ttl_s: float = 10.0) -> Lease:
    return Lease("k", "me", 7, False, ttl_s, ttl_s, None)


def test_a_holding_ends_a_ttl_after_its_last_renewal_was_sent() -> None:
    now_s = [100.0]
    holding = Holding(held(), 100.0, lambda: now_s[0])
    assert holding.due_s == pytest.approx(103.333, abs=0.01)
    now_s[0] = 105.0
    renewal = holding.renew(1.0)
    next(renewal)
    now_s[0] = 109.0  # the answer took its time
    with pytest.raises(StopIteration):
        renewal.send(None)
    assert holding.remaining_s == 6.0, "from when it was sent"
    now_s[0] = 115.0
    assert holding.lost
    with pytest.raises(LeaseLostError, match="could not be renewed"):
        holding.check()


def test_a_turn_without_a_thread_does_not_begin_and_leaves_nothing_behind(
    shared_daemon: Daemon, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "sessionstore-turns":
            raise RuntimeError("can't start new thread")
        start(thread)

    with SessionStore(shared_daemon.address, timeout=ANY_S) as store:
        handle = store.session(key)
        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="new thread"), handle.turn(ttl=60):
                pass
        assert handle.lease() is None
        with handle.turn(ttl=1) as turn:
            end_s = turn._holding._end_s
            wait_until(lambda: turn._holding._end_s > end_s, what="a renewal")


def test_a_failed_renewal_is_due_again_soon() -> None:
    now_s = [100.0]
    holding = Holding(held(), 100.0, lambda: now_s[0])
    now_s[0] = 104.0
    renewal = holding.renew(1.0)
    next(renewal)
    with pytest.raises(UnavailableError):
        renewal.throw(error_for("NOT_CONNECTED", "gone", {}))
    assert holding.due_s == 105.0
    assert not holding.lost
    assert holding.remaining_s == 6.0


# ------------------------------------------------------------------------------------- only one client


@pytest.mark.usefixtures("often")
def test_a_forked_child_has_no_turn_and_ends_none(shared_daemon: Daemon, key: str) -> None:
    with SessionStore(shared_daemon.address, timeout=ANY_S) as store:
        handle = store.session(key)
        with handle.turn(ttl=60) as turn:
            turn.append(HI)
            pid = os.fork()
            if pid == 0:
                _child(turn, handle)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            renewals(store, key)  # it is still renewed here
            turn.append({"n": 1})
        assert handle.messages == (HI, {"n": 1})


def _child(turn: Turn, handle: Any) -> None:
    """The forked child's part: it ends the process."""
    code = 1
    try:
        assert turn.lost
        with pytest.raises(LeaseLostError, match="forked"):
            turn.append(HI)
        with pytest.raises(LeaseHeldError):
            handle.append(HI)
        handle._turns.end(turn._holding)  # as leaving the block would
        assert handle.lease().fencing_token == turn.token
        with handle._owner.session(f"{handle.key}/child").turn(ttl=60) as own:
            renewals(handle._owner, own.key)
            own.append(HI)
        code = 0
    finally:
        os._exit(code)


def test_a_fork_while_another_thread_waits_for_a_lease(shared_daemon: Daemon, key: str) -> None:
    """Who waits is not inside grpc: the fork waits for nobody, and the child's calls do not hang."""
    with (
        SessionStore(shared_daemon.address, timeout=ANY_S) as store,
        SessionStore(shared_daemon.address, timeout=ANY_S) as holder,
    ):
        handle = store.session(key)
        with holder.session(key).turn():
            waiting = threading.Thread(target=lambda: handle.append(HI, wait=ANY_S))
            waiting.start()
            time.sleep(0.5)
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    store.session(f"{key}/child").append(HI)
                    code = 0
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
        waiting.join(ANY_S)
        assert not waiting.is_alive()
        assert store.session(key).messages == (HI,)
        assert store.session(f"{key}/child").messages == (HI,)


async def test_tasks_take_turns(shared_daemon: Daemon, key: str) -> None:
    async with AsyncSessionStore(shared_daemon.address, timeout=ANY_S) as store:

        async def turn(n: int) -> None:
            handle = await store.session(key)
            async with handle.turn(wait=ANY_S) as turn:
                count = turn.message_count
                await asyncio.sleep(0)
                await turn.append({"n": n, "seen": count})

        await asyncio.gather(*(turn(n) for n in range(10)))
        messages = (await store.session(key)).messages
        assert [message["seen"] for message in messages] == list(range(10))


async def test_a_cancelled_turn_gives_its_lease_back(shared_daemon: Daemon, key: str) -> None:
    async with AsyncSessionStore(shared_daemon.address, timeout=ANY_S) as store:
        handle = await store.session(key)
        begun = asyncio.Event()

        async def turn() -> None:
            async with handle.turn():
                begun.set()
                await asyncio.sleep(3600)

        task = asyncio.create_task(turn())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await handle.lease() is None

"""Leases at the wire: what is asked and answered, who waits, and what a restart and a shutdown do."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from crash.clock_jumps import YEAR_S, _unshared, no_time_namespace
from crash.odd_daemon import odd_daemon
from daemons import Daemon, channel_to, wait_until
from google.protobuf.duration_pb2 import Duration
from sessionstore.v1 import session_pb2, session_store_pb2_grpc
from sessionstore.v1 import session_store_pb2 as v1
from wire import Refusal, block, refusal

ANY_S = 60.0
MESSAGE = block({"role": "user", "content": "hi"})


def seconds(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=round(value % 1 * 1e9))


def acquire(stub, key: str, holder: str = "me", *, ttl: float = 60, wait: float | None = None, **more):
    asked = v1.AcquireLeaseRequest(key=key, holder=holder, ttl=seconds(ttl), **more)
    if wait is not None:
        asked.wait.CopyFrom(seconds(wait))
    return stub.AcquireLease(asked, timeout=ANY_S + (wait or 0)).lease


def append(stub, key: str, token: int = 0, wait: float | None = None):
    asked = v1.AppendMessagesRequest(key=key, messages=MESSAGE, fencing_token=token)
    if wait is not None:
        asked.lease_wait.CopyFrom(seconds(wait))
    return stub.AppendMessages(asked, timeout=ANY_S + (wait or 0))


def release(stub, lease: v1.Lease) -> bool:
    asked = v1.ReleaseLeaseRequest(key=lease.key, fencing_token=lease.fencing_token)
    return stub.ReleaseLease(asked, timeout=ANY_S).released


def lease_of(stub, key: str) -> v1.Lease | None:
    reply = stub.GetLease(v1.GetLeaseRequest(key=key), timeout=ANY_S)
    return reply.lease if reply.HasField("lease") else None


@pytest.mark.parametrize("mode", [v1.LEASE_MODE_EXCLUSIVE, v1.LEASE_MODE_APPENDS_ALLOWED])
def test_a_lease_and_what_it_refuses(shared_daemon: Daemon, key: str, mode: int) -> None:
    stub = shared_daemon.stub
    assert lease_of(stub, key) is None
    lease = acquire(stub, key, "agent:7", mode=mode)
    assert (lease.key, lease.holder, lease.mode, lease.ttl) == (key, "agent:7", mode, seconds(60))
    assert lease.fencing_token > 0
    assert 0 < lease.remaining.ToTimedelta().total_seconds() <= 60
    assert abs(lease.acquire_time.ToMicroseconds() / 1e6 - time.time()) < 3600
    held = lease_of(stub, key)
    assert held.fencing_token == lease.fencing_token
    told = refusal(lambda: acquire(stub, key))
    assert (told.code, told.reason) == ("FAILED_PRECONDITION", "LEASE_HELD")
    named = "appends_allowed" if mode == v1.LEASE_MODE_APPENDS_ALLOWED else "exclusive"
    assert {"key": key, "holder": "agent:7", "mode": named}.items() <= told.metadata.items()
    assert 0 <= int(told.metadata["age_ms"]) < 60_000
    assert 0 < int(told.metadata["expires_in_ms"]) <= 60_000
    assert "'agent:7'" in told.text
    if mode == v1.LEASE_MODE_APPENDS_ALLOWED:
        append(stub, key)
    else:
        assert refusal(lambda: append(stub, key)).reason == "LEASE_HELD"
    for token, reason in ((0, "LEASE_HELD"), (lease.fencing_token + 1000, "LEASE_LOST")):
        pop = v1.PopMessageRequest(key=key, fencing_token=token)
        told = refusal(lambda pop=pop: stub.PopMessage(pop))
        assert (told.code, told.reason) == ("FAILED_PRECONDITION", reason)
    assert told.metadata == {"key": key, "fencing_token": str(lease.fencing_token + 1000)}
    append(stub, key, lease.fencing_token)
    stub.PopMessage(v1.PopMessageRequest(key=key, fencing_token=lease.fencing_token))
    renewal = v1.RenewLeaseRequest(key=key, fencing_token=lease.fencing_token)
    assert stub.RenewLease(renewal).lease.fencing_token == lease.fencing_token
    assert release(stub, lease)
    assert not release(stub, lease)
    assert refusal(lambda: stub.RenewLease(renewal)).reason == "LEASE_LOST"
    assert lease_of(stub, key) is None


def test_every_write_is_fenced(shared_daemon: Daemon, key: str) -> None:
    stub = shared_daemon.stub
    append(stub, key)
    append(stub, f"{key}/source")
    acquire(stub, key)
    writes = {
        "CreateSession": v1.CreateSessionRequest(key=key),
        "AppendMessages": v1.AppendMessagesRequest(key=key, messages=MESSAGE),
        "ReplaceMessages": v1.ReplaceMessagesRequest(key=key),
        "PopMessage": v1.PopMessageRequest(key=key),
        "UpdateSession": v1.UpdateSessionRequest(key=key, update_mask={"paths": ["metadata"]}),
        "ForkSession": v1.ForkSessionRequest(key=key, source_key=f"{key}/source"),
        "DeleteSession": v1.DeleteSessionRequest(key=key),
    }
    for name, write in writes.items():
        assert refusal(lambda name=name, write=write: getattr(stub, name)(write)).reason == "LEASE_HELD", name
        write.fencing_token = 1 << 60
        assert refusal(lambda name=name, write=write: getattr(stub, name)(write)).reason == "LEASE_LOST", name
        write.fencing_token = -1
        told = refusal(lambda name=name, write=write: getattr(stub, name)(write))
        assert (told.reason, told.metadata["field"]) == ("ARGUMENT_INVALID", "fencing_token"), name


MALFORMED: dict[str, tuple[dict, str, dict]] = {
    "no key": ({"key": ""}, "KEY_EMPTY", {"field": "key"}),
    "no holder": ({"holder": ""}, "ARGUMENT_INVALID", {"field": "holder", "detail": ...}),
    "long holder": ({"holder": "x" * 257}, "ARGUMENT_INVALID", {"field": "holder", "detail": ...}),
    "no ttl": ({"ttl": Duration()}, "LEASE_TTL_OUT_OF_RANGE",
               {"ttl_ms": "0", "min_ms": "1000", "max_ms": "3600000"}),
    "short ttl": ({"ttl": seconds(0.999)}, "LEASE_TTL_OUT_OF_RANGE",
                  {"ttl_ms": "999", "min_ms": ..., "max_ms": ...}),
    "long ttl": ({"ttl": seconds(3601)}, "LEASE_TTL_OUT_OF_RANGE",
                 {"ttl_ms": "3601000", "min_ms": ..., "max_ms": ...}),
    "negative wait": ({"wait": Duration(seconds=-1)}, "ARGUMENT_INVALID", {"field": "wait", "detail": ...}),
    "odd wait": ({"wait": Duration(nanos=-1)}, "ARGUMENT_INVALID", {"field": "wait", "detail": ...}),
    "odd mode": ({"mode": 7}, "ARGUMENT_INVALID", {"field": "mode", "detail": ...}),
    "bad call": ({"call": session_pb2.CallIdentity(client_id="", sequence=1)}, "CALL_INVALID",
                 {"field": "call.client_id", "detail": ...}),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_named(shared_daemon: Daemon, key: str, name: str) -> None:
    given, reason, metadata = MALFORMED[name]
    asked = v1.AcquireLeaseRequest(**({"key": key, "holder": "me", "ttl": seconds(60)} | given))
    told: Refusal = refusal(lambda: shared_daemon.stub.AcquireLease(asked))
    assert (told.code, told.reason) == ("INVALID_ARGUMENT", reason)
    assert told.metadata.keys() == metadata.keys()
    for field, value in metadata.items():
        assert value in (..., told.metadata[field]), field
    assert lease_of(shared_daemon.stub, key) is None


def test_other_requests_about_leases_are_checked_too(shared_daemon: Daemon, key: str) -> None:
    stub = shared_daemon.stub
    assert refusal(lambda: stub.RenewLease(v1.RenewLeaseRequest())).reason == "KEY_EMPTY"
    assert refusal(lambda: stub.ReleaseLease(v1.ReleaseLeaseRequest())).reason == "KEY_EMPTY"
    assert refusal(lambda: stub.GetLease(v1.GetLeaseRequest())).reason == "KEY_EMPTY"
    told = refusal(lambda: stub.RenewLease(v1.RenewLeaseRequest(key=key, fencing_token=-1)))
    assert (told.reason, told.metadata["field"]) == ("ARGUMENT_INVALID", "fencing_token")
    assert refusal(lambda: stub.RenewLease(v1.RenewLeaseRequest(key=key))).reason == "LEASE_LOST"
    assert refusal(lambda: append(stub, key, wait=-2)).metadata["field"] == "lease_wait"


def test_the_limits_are_told(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(flags=("--lease-ttl-s-min", "0.5", "--lease-ttl-s-max", "90")).start()
    limits = daemon.stub.GetServerInfo(v1.GetServerInfoRequest()).limits
    assert (limits.lease_ttl_min, limits.lease_ttl_max) == (seconds(0.5), seconds(90))
    assert acquire(daemon.stub, "k", ttl=0.5).ttl == seconds(0.5)
    assert refusal(lambda: acquire(daemon.stub, "k", ttl=91)).reason == "LEASE_TTL_OUT_OF_RANGE"


def test_a_call_that_is_sent_again_gets_the_same_lease(shared_daemon: Daemon, key: str) -> None:
    stub = shared_daemon.stub
    call = session_pb2.CallIdentity(client_id=key[:60], sequence=1)
    asked = v1.AcquireLeaseRequest(key=key, call=call, holder="me", ttl=seconds(60))
    first = stub.AcquireLease(asked)
    again = stub.AcquireLease(asked)
    assert (first.replayed, again.replayed) == (False, True)
    assert again.lease.fencing_token == first.lease.fencing_token
    assert again.lease.remaining.ToSeconds() > 0
    release(stub, first.lease)
    over = stub.AcquireLease(asked)
    assert (over.replayed, over.lease.fencing_token) == (True, first.lease.fencing_token)
    assert over.lease.remaining == Duration()


def test_who_waits_is_served_one_after_the_other(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(store="jsonl").start()
    stub = daemon.stub
    lease = acquire(stub, "k", "holder")
    turns: list[tuple[int, int]] = []

    def turn(name: str) -> None:
        mine = acquire(stub, "k", name, wait=ANY_S)
        turns.append((append(stub, "k", mine.fencing_token).first_index, mine.fencing_token))
        release(stub, mine)

    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(turn, f"w{n}") for n in range(8)]
        assert refusal(lambda: acquire(stub, "k")).metadata["holder"] == "holder"
        release(stub, lease)
        for task in tasks:
            task.result(ANY_S)
    assert [index for index, _ in turns] == list(range(8))
    assert turns == sorted(turns, key=lambda each: each[1]), "tokens grow from turn to turn"


def test_an_append_may_wait(shared_daemon: Daemon, key: str) -> None:
    stub = shared_daemon.stub
    lease = acquire(stub, key)
    assert refusal(lambda: append(stub, key, wait=0.2)).reason == "LEASE_HELD"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(append, stub, key, wait=ANY_S)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        release(stub, lease)
        assert waiting.result(ANY_S).first_index == 0
    assert append(stub, key, wait=5).first_index == 1


def test_nobody_waits_longer_than_the_call_may_last(shared_daemon: Daemon, key: str) -> None:
    stub = shared_daemon.stub
    acquire(stub, key)
    asked = v1.AcquireLeaseRequest(key=key, holder="me", ttl=seconds(60), wait=seconds(3000))
    with pytest.raises(grpc.RpcError) as told:
        stub.AcquireLease(asked, timeout=3)
    assert told.value.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_caller_who_is_gone_gets_no_lease(shared_daemon: Daemon, key: str) -> None:
    stub = shared_daemon.stub
    lease = acquire(stub, key, ttl=60)
    with channel_to(shared_daemon.address) as channel:
        gone = session_store_pb2_grpc.SessionStoreStub(channel)
        asked = v1.AcquireLeaseRequest(key=key, holder="gone", ttl=seconds(3600), wait=seconds(3000))
        call = gone.AcquireLease.future(asked)
        time.sleep(0.3)
        assert not call.done()
    release(stub, lease)
    wait_until(lambda: lease_of(stub, key) is None or lease_of(stub, key).holder != "gone")
    assert acquire(stub, key, "next", wait=ANY_S).holder == "next"


def test_a_takeover_comes_when_the_lease_runs_out(shared_daemon: Daemon, key: str) -> None:
    stub = shared_daemon.stub
    lease = acquire(stub, key, ttl=1)
    taken = acquire(stub, key, "next", wait=ANY_S)
    assert taken.fencing_token > lease.fencing_token
    assert refusal(lambda: append(stub, key, lease.fencing_token)).reason == "LEASE_LOST"
    append(stub, key, taken.fencing_token)


@pytest.mark.parametrize("kill", [False, True])
def test_a_lease_survives_a_restart(make_daemon: Callable[..., Daemon], kill: bool) -> None:
    daemon = make_daemon(store="jsonl").start()
    lease = acquire(daemon.stub, "k", "holder", ttl=600)
    over = acquire(daemon.stub, "over")
    release(daemon.stub, over)
    daemon.restart(kill=kill)
    now = lease_of(daemon.stub, "k")
    assert (now.holder, now.fencing_token) == ("holder", lease.fencing_token)
    assert now.acquire_time == lease.acquire_time
    assert lease_of(daemon.stub, "over") is None
    assert refusal(lambda: append(daemon.stub, "k")).reason == "LEASE_HELD"
    append(daemon.stub, "k", lease.fencing_token)
    assert acquire(daemon.stub, "new").fencing_token > over.fencing_token


def test_waiters_are_told_at_the_end(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(flags=("--drain-s-max", "300")).start()
    acquire(daemon.stub, "k", ttl=3600)
    asked = v1.AcquireLeaseRequest(key="k", holder="me", ttl=seconds(60), wait=seconds(3000))
    calls = [daemon.stub.AcquireLease.future(asked) for _ in range(5)]
    appending = v1.AppendMessagesRequest(key="k", messages=MESSAGE, lease_wait=seconds(3000))
    calls.append(daemon.stub.AppendMessages.future(appending))
    time.sleep(0.5)
    daemon.send_signal(signal.SIGTERM)
    for call in calls:
        told = refusal(lambda call=call: call.result(ANY_S))
        assert (told.code, told.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
    assert daemon.wait() == 0  # long before the drain would end by itself
    assert "still under way" not in daemon.stderr


def test_too_many_waiters_are_refused(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(flags=("--lease-waiters-max", "3")).start()
    acquire(daemon.stub, "k", ttl=3600)
    asked = v1.AcquireLeaseRequest(key="k", holder="me", ttl=seconds(60), wait=seconds(3000))
    calls = [daemon.stub.AcquireLease.future(asked) for _ in range(4)]
    wait_until(lambda: any(call.done() for call in calls))
    (refused,) = [call for call in calls if call.done()]
    told = refusal(lambda: refused.result(0))
    assert (told.code, told.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert told.metadata == {"limit": "3"}
    for call in calls:
        call.cancel()
    append(daemon.stub, "other")


@pytest.mark.skipif(bool(no_time_namespace()), reason=f"no time namespace: {no_time_namespace()}")
def test_a_lease_of_a_machine_with_other_clocks_is_kept_too(make_daemon: Callable[..., Daemon]) -> None:
    """The wall clock 20 years off, and a steady clock that began anew: as after a reboot, or elsewhere."""
    first = make_daemon(store="jsonl").start()
    lease = acquire(first.stub, "k", "holder", ttl=600)
    first.kill()
    for wall_s, steady_s in ((20 * YEAR_S, 400 * 86400), (-20 * YEAR_S, 0)):
        launcher = (*_unshared(steady_s), *odd_daemon("--wall-shift-s", str(wall_s)))
        daemon = make_daemon(first.data, store="jsonl", launcher=launcher).start()
        now = lease_of(daemon.stub, "k")
        assert now.fencing_token == lease.fencing_token
        assert 0 < now.remaining.ToTimedelta().total_seconds() <= 600
        assert refusal(lambda stub=daemon.stub: append(stub, "k")).reason == "LEASE_HELD"
        append(daemon.stub, "k", lease.fencing_token)
        daemon.kill()


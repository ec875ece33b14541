"""One process under the hammer: a bounded number of calls of every kind on sessions that all share.

python hammer_worker.py ADDRESS NAME LOG SEED sync|async|raw CALLS

`sync` and `async` are the SDK's clients, with handles, turns and edits; `raw` sends what no honest client
does: several requests for one session at once, late writes under old tokens, renewals of what was released,
leases that are left to run out, waiting callers who go away. Every call becomes a record in LOG.
"""

import json
import random
import sys
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpc
from clients import Driver, driver_of
from crash.hammer_records import REFUSALS, Records
from sessionstore.errors import OutcomeUnknownError, SessionStoreError, error_for, from_rpc_error
from sessionstore.v1 import session_pb2, session_store_pb2_grpc
from sessionstore.v1 import session_store_pb2 as pb

BASES = tuple(f"hammer:{n}" for n in range(14))
FORKS = tuple(f"hammer/{n}" for n in range(6))
SOURCES = dict(zip(FORKS, BASES, strict=False))
KEYS = BASES + FORKS
TTL_S = 1
MESSAGES_MAX = 30
_TIMEOUT_S = 60.0
_SHORT_S = 0.3
_RETRIED = 0.85
"""Of the calls without an answer: the checker tries every order of those that stay unknown."""
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Worker:
    """What every kind of process has."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name, self.rng = name, rng
        self._messages = 0

    def batch(self, count_max: int = 4) -> list[dict[str, object]]:
        """New messages."""
        found = []
        for _ in range(self.rng.randint(1, count_max)):
            self._messages += 1
            name, pad = f"{self.name}.{self._messages}", "x" * self.rng.randrange(99)
            found.append({"role": "user", "id": name, "x": pad})
        return found

    def key(self) -> str:
        """A session; some are more sought after than others."""
        return self.rng.choice(KEYS[:4] if self.rng.random() < 0.3 else KEYS)


class Client(Worker):
    """A process with an SDK client."""

    def __init__(self, name: str, rng: random.Random, kind: str, address: str, records: Records) -> None:
        super().__init__(name, rng)
        self._driver = Driver(kind)
        self._store = self._driver.open(address, timeout=_TIMEOUT_S)
        self._handles: dict[str, Any] = {}
        sdk = driver_of(self._store)
        tapped = sdk._call

        def call(rpc: Any) -> Any:
            begin_ns = time.monotonic_ns()
            try:
                answer = tapped(rpc)
            except SessionStoreError as error:
                records.note(rpc.method.name, rpc.request, begin_ns, error)
                raise
            records.note(rpc.method.name, rpc.request, begin_ns, answer)
            return answer

        async def acall(rpc: Any) -> Any:
            begin_ns = time.monotonic_ns()
            try:
                answer = await tapped(rpc)
            except SessionStoreError as error:
                records.note(rpc.method.name, rpc.request, begin_ns, error)
                raise
            records.note(rpc.method.name, rpc.request, begin_ns, answer)
            return answer

        sdk._call = call if kind == "sync" else acall

    def close(self) -> None:
        self._driver.close()

    def step(self) -> None:
        """One call, or one turn."""
        rng, key = self.rng, self.key()
        handle = self._handles.get(key)
        try:
            if handle is None or rng.random() < 0.1:
                handle = self._handles[key] = self._store.session(key)
            if rng.random() < 0.05:  # gives up early: what it sent may be applied or not
                sdk = driver_of(self._store)
                sdk._timeout_s = _SHORT_S
                try:
                    self._call(handle)
                finally:
                    sdk._timeout_s = _TIMEOUT_S
            else:
                self._call(handle)
        except OutcomeUnknownError as error:
            if rng.random() < _RETRIED:
                with suppress(OutcomeUnknownError, *REFUSALS):
                    error.retry()
        except REFUSALS:
            if rng.random() < 0.3:
                self._handles.pop(key, None)

    def _call(self, handle: Any) -> None:
        rng = self.rng
        match rng.choices(
            ("write", "turn", "fork", "delete", "edit", "lease", "refresh"), (60, 16, 6, 3, 6, 4, 5)
        )[0]:
            case "write":
                self._write(handle)
            case "turn":
                self._turn(handle)
            case "fork":
                target = rng.choice(FORKS)
                source = self._store.session(SOURCES[target])
                with suppress(*_NOT_NOW):
                    if rng.random() < 0.6:  # it may exist
                        self._store.delete(target)
                source.fork(target, rng.choice((None, None, 0, 3)))
            case "delete":
                handle.delete()
                self._handles.pop(handle.key)
            case "edit":
                self._store.edit(handle.key, lambda messages: messages[len(messages) // 2 :])
            case "lease":
                handle.lease()
            case "refresh":
                handle.refresh()

    def _turn(self, handle: Any) -> None:
        rng = self.rng
        wait = rng.choice((0.0, 0.0, 1.5))
        with handle.turn(ttl=TTL_S, wait=wait, allow_appends=rng.random() < 0.4, holder=self.name) as turn:
            for _ in range(rng.randint(1, 5)):
                with suppress(*_NOT_NOW):
                    self._write(turn, fenced=True)
                if rng.random() < 0.02:
                    time.sleep(TTL_S * 0.7)

    def _write(self, handle: Any, *, fenced: bool = False) -> None:
        rng, count = self.rng, handle.message_count
        expected = handle.revision if rng.random() < 0.3 else None
        if count > MESSAGES_MAX:
            handle.clear()
            return
        start = rng.randint(0, count)
        kinds = ("append", "replace", "beside", "pop", "clear", "update")
        match rng.choices(kinds, (48, 16, 8, 14, 4, 10))[0]:
            case "append" if fenced:
                handle.append(*self.batch(), expected_revision=expected)
            case "append":
                wait = rng.choice((0.0, 0.0, 0.5))
                handle.append(*self.batch(), expected_revision=expected, wait=wait)
            case "replace":
                deleted = rng.choice((None, 0, rng.randint(0, count - start)))
                handle.replace(start, deleted, self.batch(), expected_revision=handle.revision)
            case "beside":
                deleted = rng.randint(0, count - start)
                handle.replace(
                    start, deleted, self.batch(), expected_revision=handle.revision, allow_appends=True
                )
            case "pop":
                handle.pop(expected_revision=expected)
            case "clear":
                handle.clear(expected_revision=expected)
            case "update" if rng.random() < 0.5:
                self._messages += 1
                handle.update(metadata={"note": f"{self.name}.{self._messages}"}, expected_revision=expected)
            case "update":
                handle.update(last_consolidated=rng.randint(0, count), expected_revision=expected)


_NOT_NOW = tuple(each for each in REFUSALS if not issubclass(each, ConnectionError))
"""What does not keep a turn from going on; a lost lease raises again at once."""


class Raw(Worker):
    """A process that speaks to the daemon without the SDK, and does what the SDK never would."""

    def __init__(self, name: str, rng: random.Random, kind: str, address: str, records: Records) -> None:
        super().__init__(name, rng)
        self._address, self._records = address, records
        self._client_id = str(uuid.uuid4())
        self._sequence = 0
        self._tokens: defaultdict[str, list[int]] = defaultdict(list)
        """By key, those that it was ever given, or saw."""
        self._counts: dict[str, tuple[int, int]] = {}
        self._connect()

    def _connect(self) -> None:
        self._channel = grpc.insecure_channel(self._address, options=_OPTIONS)
        self._stub = session_store_pb2_grpc.SessionStoreStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def step(self) -> None:
        """One call, or several at once for one session."""
        rng, key = self.rng, self.key()
        if rng.random() < 0.1:
            self._send([("GetSession", pb.GetSessionRequest(key=key))])
        count = rng.randint(2, 6) if rng.random() < 0.3 else 1
        calls = [self._next(key) for _ in range(count)]
        if rng.random() < 0.05:
            calls.append(calls[-1])  # a copy, at the same time
        self._send(calls)

    def _next(self, key: str) -> tuple[str, Any]:
        rng = self.rng
        tokens = self._tokens[key]
        kind = rng.choices(
            ("acquire", "renew", "release", "lease", "fork", "delete", "write"), (14, 5, 6, 3, 6, 2, 64)
        )[0]
        token = 0
        if tokens and rng.random() < 0.6:
            token = tokens[-1] if rng.random() < 0.8 else rng.choice(tokens)
        match kind:
            case "acquire":
                request = pb.AcquireLeaseRequest(key=key, call=self._identity(), holder=self.name)
                request.ttl.seconds = TTL_S
                request.mode = rng.choice((pb.LEASE_MODE_EXCLUSIVE, pb.LEASE_MODE_APPENDS_ALLOWED))
                if rng.random() < 0.4:
                    request.wait.FromMilliseconds(rng.randrange(1, 1500))
                return "AcquireLease", request
            case "renew" if tokens:
                return "RenewLease", pb.RenewLeaseRequest(key=key, fencing_token=token or tokens[-1])
            case "release" if tokens:
                return "ReleaseLease", pb.ReleaseLeaseRequest(key=key, fencing_token=token or tokens[-1])
            case "lease":
                return "GetLease", pb.GetLeaseRequest(key=key)
        common: dict[str, Any] = {"call": self._identity(), "fencing_token": token}
        if kind == "fork":
            target = rng.choice(FORKS)
            tokens = self._tokens[target]
            common["fencing_token"] = tokens[-1] if tokens and rng.random() < 0.5 else 0
            common |= {"key": target, "source_key": SOURCES[target], "at": rng.choice((None, None, 0, 3))}
            return "ForkSession", pb.ForkSessionRequest(**common)
        common["key"] = key
        if kind == "delete":
            return "DeleteSession", pb.DeleteSessionRequest(**common)
        return self._write(common)

    def _write(self, common: dict[str, Any]) -> tuple[str, Any]:
        rng = self.rng
        revision, count = self._counts.get(common["key"], (0, 0))
        kind = rng.choices(("append", "replace", "pop", "create"), (50, 24, 22, 4))[0]
        if kind in ("append", "pop") and rng.random() < 0.2:
            common["expected_revision"] = revision
        match kind:
            case "append":
                request = pb.AppendMessagesRequest(messages=_block(self.batch()), **common)
                if rng.random() < 0.15 and not common["fencing_token"]:
                    request.lease_wait.FromMilliseconds(rng.randrange(1, 1500))
                return "AppendMessages", request
            case "create":
                common |= {"messages": _block(self.batch()), "metadata": b"{}"}
                return "CreateSession", pb.CreateSessionRequest(**common)
            case "replace" if count > MESSAGES_MAX:
                return "ReplaceMessages", pb.ReplaceMessagesRequest(**common)
            case "replace":
                start = rng.randint(0, count)
                if rng.random() < 0.7:
                    common["expected_revision"] = revision
                request = pb.ReplaceMessagesRequest(
                    start=start,
                    delete_count=rng.randint(0, count - start),
                    messages=_block(self.batch()),
                    allow_appends="expected_revision" in common and rng.random() < 0.5,
                    **common,
                )
                return "ReplaceMessages", request
        return "PopMessage", pb.PopMessageRequest(**common)

    def _identity(self) -> session_pb2.CallIdentity:
        self._sequence += 1
        return session_pb2.CallIdentity(
            client_id=self._client_id,
            sequence=self._sequence,
            answered_through=max(0, self._sequence - 50),
        )

    def _send(self, calls: list[tuple[str, Any]]) -> None:
        """Send calls at once; who waits may go away."""
        rng, begin_ns = self.rng, time.monotonic_ns()
        futures = [
            getattr(self._stub, method).future(request, timeout=5.0, wait_for_ready=rng.random() < 0.5)
            for method, request in calls
        ]
        gone = rng.random() < 0.1
        if gone:
            time.sleep(rng.random() * 0.1)
            for future in futures:
                future.cancel()
        unknown = []
        for (method, request), future in zip(calls, futures, strict=True):
            answer = self._answer(future)
            self._records.note(method, request, begin_ns, answer)
            self._learn(method, request, answer)
            if isinstance(answer, OutcomeUnknownError):
                unknown.append((method, request))
        if not unknown:
            return
        self._channel.close()  # so that nothing is still under way
        self._connect()
        if rng.random() < _RETRIED:
            time.sleep(rng.random() * 0.2)
            self._send(unknown)

    def _answer(self, future: Any) -> Any:
        """The answer, or what the SDK would call the error."""
        try:
            return future.result()
        except grpc.FutureCancelledError:
            return error_for("OUTCOME_UNKNOWN", "the caller went away", {})
        except grpc.RpcError as error:
            found = from_rpc_error(error)
            if found.reason.startswith("GRPC_"):
                return error_for("OUTCOME_UNKNOWN", str(found), {})
            return found

    def _learn(self, method: str, request: Any, answer: Any) -> None:
        if isinstance(answer, SessionStoreError):
            return
        if method in ("AcquireLease", "GetLease") and answer.lease.fencing_token:
            self._tokens[request.key] = [*self._tokens[request.key], answer.lease.fencing_token][-6:]
        elif method == "GetSession":
            self._counts[request.key] = answer.session.revision, answer.session.message_count
        elif hasattr(answer, "result"):
            self._counts[request.key] = answer.result.revision, answer.result.message_count


def _block(messages: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in messages)


def main(address: str, name: str, log: str, seed: str, kind: str, calls: str) -> None:
    make = Raw if kind == "raw" else Client
    worker = make(name, random.Random(int(seed)), kind, address, Records(name, Path(log)))
    for _ in range(int(calls)):
        worker.step()
    worker.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

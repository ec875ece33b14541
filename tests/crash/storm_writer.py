"""One process of a storm: calls of every kind on shared sessions, until it is told to stop.

python storm_writer.py ADDRESS NAME LOG STOP SEED retry|leave

Every call becomes one record of `operations` in LOG, which lies outside the store. Most are batch appends;
the others read, replace, pop, update, delete, create and fork, some only at an expected revision. With
`retry`, a call without an answer is sent again, the very same, until it has one; with `leave`, it stays
unknown.
"""

import json
import os
import random
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpc
from crash.operations import ACKNOWLEDGED, DAMAGED, READ, REFUSED, UNKNOWN, Operation, State
from sessionstore.v1 import session_pb2, session_store_pb2_grpc
from sessionstore.v1 import session_store_pb2 as pb

KEYS = ("storm:a", "storm:b", "storm/c", "storm_a", "ключ")
FORKS = {"fork:a": "storm:a", "fork:b": "storm:b", "fork/c": "storm/c"}
CALL_TIMEOUT_S = 5.0
GIVE_UP_S = 120.0
PAUSE_S = 0.004
MESSAGES_MAX = 40
_KINDS = {"append": 52, READ: 14, "replace": 7, "pop": 7, "update": 6, "delete": 3, "create": 3, "fork": 5}
_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_REFUSED = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,
)
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Writer:
    def __init__(self, address: str, name: str, log: Path, rng: random.Random, retry: bool) -> None:
        self.address, self.name, self.rng, self.retry = address, name, rng, retry
        self._client_id = str(uuid.uuid4())
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._known: dict[str, tuple[int, int]] = {}
        """Key -> revision and message count, as last heard."""
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)

    def run(self, stop: Path) -> None:
        sequence = 0
        while not stop.exists():
            sequence += 1
            time.sleep(self.rng.random() * PAUSE_S)
            call = self._next(sequence)
            answer = self._read(call) if call.kind == READ else self._change(call)
            if answer is None:
                continue
            os.write(self._log, answer.line())
            if answer.outcome == ACKNOWLEDGED:
                count = len(answer.seen.messages) if answer.seen else answer.message_count
                self._known[call.key] = (answer.revision if count else 0, count)
            elif answer.outcome == UNKNOWN:
                self._connect_anew()

    def _connect_anew(self) -> None:
        """Let go of the connection, so that nothing of the call is still under way, and wait for a daemon."""
        self._channel.close()
        self._channel = grpc.insecure_channel(self.address, options=_OPTIONS)
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            stub = session_store_pb2_grpc.SessionStoreStub(self._channel)
            try:
                stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_TIMEOUT_S, wait_for_ready=True)
                return
            except grpc.RpcError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    # What to ask for.

    def _next(self, sequence: int) -> Operation:
        rng = self.rng
        kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        key = rng.choice(list(FORKS) if kind == "fork" else [*KEYS, *KEYS, *FORKS])
        revision, count = self._known.get(key, (0, 0))
        if count > MESSAGES_MAX and kind == "append":
            kind = rng.choice(("replace", "replace", "delete"))
        batch = tuple(f"{self.name}.{sequence}.{n}" for n in range(rng.randint(1, 5)))
        call = Operation(
            process=self.name,
            kind=kind,
            key=key,
            sequence=sequence,
            begin_ns=time.monotonic_ns(),
            end_ns=0,
            expected_revision=revision
            if rng.random() < 0.15 and kind not in (READ, "create", "fork")
            else None,
        )
        match kind:
            case "append":
                return replace(call, messages=batch)
            case "create":
                return replace(call, messages=batch, metadata=rng.choice(("", f"{self.name}.{sequence}")))
            case "replace" if count > MESSAGES_MAX:
                return replace(call, start=rng.choice((0, 5)), messages=batch)
            case "replace":
                start = rng.randint(0, count)
                deleted = rng.choice((None, 0, rng.randint(0, count - start)))
                return replace(call, start=start, delete_count=deleted, messages=batch[: rng.randrange(4)])
            case "update" if rng.random() < 0.6:
                return replace(call, metadata=f"{self.name}.{sequence}")
            case "update":
                return replace(call, last_consolidated=rng.randint(0, count))
            case "fork":
                return replace(call, source_key=FORKS[key], at=rng.choice((None, None, 0, 3)))
        return call

    # Asking.

    def _read(self, call: Operation) -> Operation | None:
        """A read: of the whole session, or a stream of its messages. None without an answer."""
        stub = session_store_pb2_grpc.SessionStoreStub(self._channel)
        request, seen = pb.GetSessionRequest(key=call.key), None
        try:
            if self.rng.random() < 0.5:
                answer = stub.GetSession(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
                assert not answer.truncated
                head = answer.session
                note = json.loads(head.metadata).get("note", "")
                seen = State(_ids(answer.messages), head.last_consolidated, note)
                revision = head.revision
            else:
                asked = pb.ReadMessagesRequest(key=call.key)
                (block,) = stub.ReadMessages(asked, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
                seen, revision = State(_ids(block.messages), None, None), block.revision
        except grpc.RpcError as error:
            if error.code() in _TRANSIENT:
                return None
            if error.code() == grpc.StatusCode.DATA_LOSS:
                return replace(call, outcome=DAMAGED, end_ns=time.monotonic_ns())
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            revision = 0
        return replace(call, end_ns=time.monotonic_ns(), revision=revision, seen=seen)

    def _change(self, call: Operation) -> Operation:
        """A change, sent until it is answered, or once."""
        method, request = self._request(call)
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            stub = session_store_pb2_grpc.SessionStoreStub(self._channel)
            try:
                answer = getattr(stub, method)(request, timeout=CALL_TIMEOUT_S, wait_for_ready=self.retry)
            except grpc.RpcError as error:
                now = time.monotonic_ns()
                if error.code() in _REFUSED:
                    return replace(call, outcome=REFUSED, end_ns=now)
                if error.code() == grpc.StatusCode.DATA_LOSS:
                    return replace(call, outcome=DAMAGED, end_ns=now)
                if error.code() not in _TRANSIENT or time.monotonic() > deadline:
                    raise
                if not self.retry:
                    return replace(call, outcome=UNKNOWN, end_ns=now)
                time.sleep(0.01)
                continue
            return replace(
                call,
                end_ns=time.monotonic_ns(),
                revision=answer.result.revision,
                previous_revision=answer.result.previous_revision,
                message_count=answer.result.message_count,
                first_index=answer.first_index if call.kind == "append" else None,
                popped=_ids(answer.message)[0] if call.kind == "pop" else None,
            )

    def _request(self, call: Operation) -> tuple[str, object]:
        """The method and the request of a call."""
        common = {
            "key": call.key,
            "expected_revision": call.expected_revision,
            "call": session_pb2.CallIdentity(
                client_id=self._client_id,
                sequence=call.sequence,
                answered_through=call.sequence - 1 if self.retry else 0,
            ),
        }
        lines = [
            {"role": "user", "content": "x" * self.rng.randrange(200), "id": each} for each in call.messages
        ]
        block = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        metadata = json.dumps({"note": call.metadata} if call.metadata else {}).encode()
        match call.kind:
            case "append":
                return "AppendMessages", pb.AppendMessagesRequest(**common, messages=block)
            case "create":
                return "CreateSession", pb.CreateSessionRequest(**common, messages=block, metadata=metadata)
            case "replace":
                return "ReplaceMessages", pb.ReplaceMessagesRequest(
                    **common, start=call.start, delete_count=call.delete_count, messages=block
                )
            case "pop":
                return "PopMessage", pb.PopMessageRequest(**common)
            case "update" if call.metadata:
                mask = {"paths": ["metadata"]}
                return "UpdateSession", pb.UpdateSessionRequest(**common, metadata=metadata, update_mask=mask)
            case "update":
                return "UpdateSession", pb.UpdateSessionRequest(
                    **common,
                    last_consolidated=call.last_consolidated,
                    update_mask={"paths": ["last_consolidated"]},
                )
            case "delete":
                return "DeleteSession", pb.DeleteSessionRequest(**common)
        return "ForkSession", pb.ForkSessionRequest(**common, source_key=call.source_key, at=call.at)


def _ids(block: bytes) -> tuple[str, ...]:
    return tuple(json.loads(line)["id"] for line in block.splitlines())


def main(address: str, name: str, log: str, stop: str, seed: str, variant: str) -> None:
    Writer(address, name, Path(log), random.Random(int(seed)), variant == "retry").run(Path(stop))


if __name__ == "__main__":
    main(*sys.argv[1:])

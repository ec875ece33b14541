"""A load of several writing threads on one daemon, and what each message was answered.

Every message carries its writer, its number and its batch. A message is acknowledged, refused (certainly not
stored) or unknown; `judge` holds all three against what is stored. Writers go on whatever they are answered,
until they are stopped.
"""

import json
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from crash.tally import Tally
from daemons import Daemon, channel_to, wait_until
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from seed_reader import read_session
from sessionstore.v1 import session_pb2, session_store_pb2_grpc
from sessionstore.v1 import session_store_pb2 as v1

PATIENCE_S = 60.0
# After an acknowledgement, a refusal, and no answer at all, when the daemon may be gone for a while.
_PAUSE_S = {"ACKNOWLEDGED": 0.0, "refused": 0.005, "": 0.1}
_NOT_STORED = ("STORAGE_FULL", "OVERLOADED", "SHUTTING_DOWN", "EXPIRED_IN_QUEUE", "RESOURCE_EXHAUSTED")
_NO_ANSWER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)

Id = tuple[str, int]
"""A message: its writer and its number."""
Stored = Mapping[str, Sequence[dict[str, object]]]


def reason_of(error: grpc.RpcError) -> str:
    """Why a call failed: the reason that the daemon gave, else the code; "" if there was no answer."""
    status = rpc_status.from_call(error)
    if status is not None and status.details:
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        return str(info.reason)
    return "" if error.code() in _NO_ANSWER else str(error.code().name)


@dataclass
class Unknown:
    """A call whose outcome is not known."""

    request: v1.AppendMessagesRequest
    ids: list[Id]


@dataclass
class Account:
    """What was answered, of all writers together."""

    acknowledged: dict[Id, tuple[str, int]] = field(default_factory=dict)
    """Where each message was said to be: key and index."""
    unknown: list[Unknown] = field(default_factory=list)
    refused: set[Id] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    """How many calls got which answer; "" is none at all."""
    surprises: list[str] = field(default_factory=list)
    """Answers that no writer may get here."""


class Load:
    """Writing threads; a context manager that starts and stops them."""

    def __init__(
        self,
        address: str,
        keys: Sequence[str],
        seed: int,
        *,
        writers: int = 4,
        bytes_max: int = 200,
        timeout_s: float = 10.0,
        name: str = "w",
    ) -> None:
        """`bytes_max`: of one message's padding. `name`: unlike that of any other load on the same keys."""
        self._address, self._keys, self._bytes_max, self._timeout_s = address, keys, bytes_max, timeout_s
        self.account = Account()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(f"{name}{n}", random.Random(f"{seed} {name} {n}")))
            for n in range(writers)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def wait_for(self, reason: str, count: int) -> None:
        """Wait until so many more calls got this answer; "ACKNOWLEDGED" is one, too."""
        before = self.account.reasons[reason]
        wait_until(
            lambda: self.account.reasons[reason] - before >= count or self.account.surprises,
            PATIENCE_S,
            f"{count} calls {reason or 'without an answer'}; so far {dict(self.account.reasons)}",
        )

    def _write(self, writer: str, rng: random.Random) -> None:
        client_id, sequence, number = str(uuid.uuid4()), 0, 0
        with channel_to(self._address) as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            while not self._stop.is_set():
                sequence += 1
                count = rng.randint(1, 5)
                ids = [(writer, number + i) for i in range(count)]
                number += count
                call = session_pb2.CallIdentity(client_id=client_id, sequence=sequence)
                request = v1.AppendMessagesRequest(
                    key=rng.choice(self._keys), call=call, messages=self._block(ids, sequence, rng)
                )
                time.sleep(_PAUSE_S[self._send(stub, request, ids)])

    def _block(self, ids: Sequence[Id], batch: int, rng: random.Random) -> bytes:
        lines = [
            json.dumps(
                {"role": "user", "w": writer, "n": n, "batch": batch, "i": i, "of": len(ids),
                 "pad": "x" * rng.randrange(self._bytes_max)}
            )
            for i, (writer, n) in enumerate(ids)
        ]  # fmt: skip
        return "".join(line + "\n" for line in lines).encode()

    def _send(
        self,
        stub: session_store_pb2_grpc.SessionStoreStub,
        request: v1.AppendMessagesRequest,
        ids: list[Id],
    ) -> str:
        """Make one call and note its answer; returns "ACKNOWLEDGED", "refused", or "" for none."""
        account = self.account
        try:
            answer = stub.AppendMessages(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            reason = reason_of(error)
            with self._lock:
                account.reasons[reason] += 1
                if reason in ("", "OUTCOME_UNKNOWN"):
                    account.unknown.append(Unknown(request, ids))
                else:
                    account.refused.update(ids)
                if reason not in ("", "OUTCOME_UNKNOWN", *_NOT_STORED):
                    account.surprises.append(f"{ids}: {error.code()}: {error.details()}")
            return "refused" if reason else ""
        with self._lock:
            account.reasons["ACKNOWLEDGED"] += 1
            for i, each in enumerate(ids):
                account.acknowledged[each] = (request.key, answer.first_index + i)
        return "ACKNOWLEDGED"


def settle_unknown(account: Account, daemon: Daemon) -> None:
    """Send every call with an unknown outcome once more, the very same: it must be applied once by then."""
    for one in account.unknown:
        answer = daemon.stub.AppendMessages(one.request, timeout=PATIENCE_S, wait_for_ready=True)
        for i, each in enumerate(one.ids):
            account.acknowledged[each] = (one.request.key, answer.first_index + i)
    account.unknown.clear()


def stored_in(daemon: Daemon, keys: Iterable[str]) -> dict[str, list[dict[str, object]]]:
    """The messages of these sessions as the daemon serves them; none of a session that does not exist."""
    return {key: list(_messages(daemon, key)) for key in keys}


def _messages(daemon: Daemon, key: str) -> Iterator[dict[str, object]]:
    request = v1.ReadMessagesRequest(key=key)
    try:
        for block in daemon.stub.ReadMessages(request, timeout=PATIENCE_S, wait_for_ready=True):
            yield from map(json.loads, block.messages.splitlines())
    except grpc.RpcError as error:
        if reason_of(error) != "SESSION_NOT_FOUND":
            raise


def judge(tally: Tally, account: Account, stored: Stored, when: str) -> None:
    """Count what was lost, doubled, torn or wrongly served, without counting anything as tried."""
    places: defaultdict[Id, list[tuple[str, int]]] = defaultdict(list)
    for key, messages in stored.items():
        _judge_order(tally, key, messages, when)
        for index, message in enumerate(messages):
            places[str(message["w"]), int(str(message["n"]))].append((key, index))
    unknown = {each for one in account.unknown for each in one.ids}
    for each, where in account.acknowledged.items():
        found = places.pop(each, [])
        if not found:
            tally.lose("lost", f"{when}: {each} was acknowledged at {where}, and is not there")
        elif found != [where]:
            column = "duplicated" if len(found) > 1 else "wrong"
            tally.lose(column, f"{when}: {each} was acknowledged at {where}, and is at {found}")
    for each, found in places.items():
        if each not in unknown:
            what = "refused" if each in account.refused else "never sent"
            tally.lose("wrong", f"{when}: {each} was {what}, and is at {found}")
        elif len(found) > 1:
            tally.lose("duplicated", f"{when}: {each} of an unknown call is at {found}")
    for surprise in account.surprises:
        tally.lose("wrong", f"{when}: {surprise}")


def _judge_order(tally: Tally, key: str, messages: Sequence[dict[str, object]], when: str) -> None:
    """Batches are whole and in one piece, and each writer's messages are in its order."""
    last: dict[object, int] = {}
    position = 0
    while position < len(messages):
        first = messages[position]
        size, number = int(str(first["of"])), int(str(first["n"]))
        batch = [(each["w"], each["batch"], each["i"]) for each in messages[position : position + size]]
        if batch != [(first["w"], first["batch"], i) for i in range(size)]:
            tally.lose("torn", f"{when}: {key}: at {position} there is {batch}")
            size = 1
        if number < last.get(first["w"], -1):
            tally.lose("wrong", f"{when}: {key}: {first['w']} {number} is behind {last[first['w']]}")
        last[first["w"]] = number
        position += size


def count_answers(tally: Tally, account: Account) -> None:
    """Count single messages that were acknowledged, and that are unknown."""
    tally.acknowledged += len(account.acknowledged)
    tally.unknown += sum(len(one.ids) for one in account.unknown)


def judge_files(tally: Tally, data: Path, stored: Stored, when: str) -> None:
    """After a clean stop the session files alone say what the daemon said."""
    files = [read_session(path) for path in (data / "sessions").glob("*.jsonl")]
    in_files = {session.key: session.messages for session in files if session is not None}
    for key, messages in stored.items():
        if in_files.get(key, []) != list(messages):
            tally.lose("lost", f"{when}: the file of {key} does not say what the daemon said")
    if None in files:
        tally.lose("wrong", f"{when}: a session file cannot be read")

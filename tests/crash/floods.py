"""The rung of floods: a daemon in a process of limited memory, and clients who want too much of it.

One flood after the other: large batches, small calls, replies and streams that nobody reads, requests that
are not sent to their end, connections, call identities and request_ids. What is too much is refused, and the
process stays within its memory, or it would die. A calm client makes a small append now and then, sends it
again when it is refused, and is served during every flood. In the end everything acknowledged is there.
"""

import json
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from crash.load import PATIENCE_S, reason_of, stored_in
from crash.odd_daemon import odd_daemon
from crash.tally import Tally
from daemons import Daemon, channel_to, wait_until
from deaf import DeafClient
from sessionstore.v1 import session_pb2, session_store_pb2_grpc
from sessionstore.v1 import session_store_pb2 as v1

MEMORY_MIB = 1024
_FLAGS = (
    ("--cache-bytes-max", 16 << 20),
    ("--queue-bytes-max", 8 << 20),
    ("--concurrent-bytes-max", 16 << 20),
    ("--backlog-bytes-max", 32 << 20),
    ("--concurrent-calls-max", 512),
    ("--checkpoint-s-max", 1),
)
_LARGE_BATCH = 4
_LARGE = (b'{"role": "user", "content": "%s"}\n' % (b"x" * 3_900_000)) * _LARGE_BATCH
_SMALL = b'{"role": "user"}\n'
_REFUSED = ("OVERLOADED", "RESOURCE_EXHAUSTED", "EXPIRED_IN_QUEUE")


@dataclass
class _Flooding:
    """One daemon, and what floods got of it."""

    daemon: Daemon
    tally: Tally
    large_clients: int
    over: threading.Event = field(default_factory=threading.Event)
    answers: Counter[str] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)
    """Messages, by key."""
    unknown: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, call: grpc.Future, key: str, messages: int) -> None:
        """Count the answer of an append."""
        error = call.exception(timeout=PATIENCE_S)
        reason = "ACKNOWLEDGED" if error is None else reason_of(error)
        with self.lock:
            self.tally.times += 1
            self.answers[reason or "no answer"] += 1
            if error is None:
                self.acknowledged[key] += messages
            elif not reason:
                self.unknown[key] += messages
            elif reason not in _REFUSED:
                self.tally.lose("wrong", f"a flood was answered {error.code()}: {error.details()}")

    @contextmanager
    def stub(self) -> Iterator[session_store_pb2_grpc.SessionStoreStub]:
        """A stub on a connection of its own."""
        with channel_to(self.daemon.address) as channel:
            yield session_store_pb2_grpc.SessionStoreStub(channel)


def run(root: Path, seed: int, tenths: int) -> Tally:
    """Flood a daemon in every way, each for so many tenths of a second."""
    tally = Tally()
    daemon = Daemon(
        root / "data",
        store="jsonl",
        flags=tuple(str(part) for flag in _FLAGS for part in flag),
        launcher=odd_daemon("--memory-mib", str(MEMORY_MIB)),
    )
    try:
        daemon.start()
        tally.notes.append(f"limit {MEMORY_MIB} MiB of data; at rest {_memory(daemon)}")
        for _ in range(4):
            line = b'{"role": "user", "content": "%s"}\n' % (b"x" * 50_000)
            daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="read", messages=line * 20))
        flooding = _Flooding(daemon, tally, large_clients=min(24, 4 + tenths))
        with _Calm(daemon) as calm:
            for flood in _FLOODS:
                _one_flood(flooding, calm, flood, tenths / 10)
        _judge(flooding, calm)
    finally:
        daemon.close()
    return tally


def _one_flood(
    flooding: _Flooding, calm: "_Calm", flood: Callable[[_Flooding], None], seconds: float
) -> None:
    """Flood, and look whether the calm client is served meanwhile."""
    name = flood.__name__.removeprefix("_").replace("_", " ")
    served = calm.acknowledged
    flooding.answers.clear()
    flooding.over.clear()
    least_s = time.monotonic() + seconds
    thread = threading.Thread(target=flood, args=(flooding,))
    thread.start()
    # A flood goes on until the calm client was served, and for its time.
    wait_until(lambda: calm.acknowledged > served + 1 or calm.failure, PATIENCE_S, f"a calm client: {name}")
    wait_until(lambda: time.monotonic() >= least_s or calm.failure, PATIENCE_S, "the end of a flood")
    during = calm.acknowledged - served
    flooding.over.set()
    thread.join(2 * PATIENCE_S)
    flooding.tally.phases[name] += 1
    answers = ", ".join(f"{reason} {count:,}" for reason, count in flooding.answers.most_common())
    memory = "dead" if flooding.daemon.process.poll() is not None else _memory(flooding.daemon)
    flooding.tally.notes.append(
        f"{name}: {answers or 'no answers wanted'}; the calm client was served {during} times; {memory}"
    )


def _memory(daemon: Daemon) -> str:
    """The peak of resident memory, and the data segment now."""
    text = Path(f"/proc/{daemon.pid}/status").read_text()
    kib = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith("Vm")}
    return f"peak RSS {int(kib['VmHWM']) >> 10} MiB, data {int(kib['VmData']) >> 10} MiB"


class _Calm:
    """A client that makes one small append after the other, each until it is acknowledged."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.acknowledged = 0
        self.failure = ""

    def __enter__(self) -> "_Calm":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        with channel_to(self._daemon.address) as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            while not self._stop.wait(0.02):
                n = self.acknowledged + 1
                call = session_pb2.CallIdentity(client_id="calm", sequence=n, answered_through=n - 1)
                request = v1.AppendMessagesRequest(key="calm", call=call, messages=b'{"n": %d}\n' % n)
                self._until_acknowledged(stub, request)
                if self.failure:
                    return
                self.acknowledged = n

    def _until_acknowledged(
        self, stub: session_store_pb2_grpc.SessionStoreStub, request: v1.AppendMessagesRequest
    ) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                stub.AppendMessages(request, timeout=10)
                return
            except grpc.RpcError as error:
                if time.monotonic() > deadline_s or self._daemon.process.poll() is not None:
                    self.failure = f"{error.code()}: {error.details()}"
                    return
                time.sleep(0.05)


# Floods -----------------------------------------------------------------------------------------------------


def _large_batches(flooding: _Flooding) -> None:
    """Batches of nearly the largest size, from many connections at once."""

    def send(n: int) -> None:
        request = v1.AppendMessagesRequest(key=f"large:{n}", messages=_LARGE)
        with flooding.stub() as stub:
            while not flooding.over.is_set():
                call = stub.AppendMessages.future(request, timeout=PATIENCE_S)
                flooding.note(call, request.key, _LARGE_BATCH)

    _together(send, flooding.large_clients)


def _small_calls(flooding: _Flooding) -> None:
    """Thousands of small appends that nobody waits for one by one."""
    _outstanding(flooding, lambda n: v1.AppendMessagesRequest(key=f"small:{n % 7}", messages=_SMALL))


def _identities(flooding: _Flooding) -> None:
    """Every call from another client, or with a request_id of the greatest length."""

    def request(n: int) -> v1.AppendMessagesRequest:
        asked = v1.AppendMessagesRequest(key=f"named:{n % 7}", messages=_SMALL)
        if n % 2:
            asked.request_id = f"{n:0256}"
        else:
            asked.call.CopyFrom(session_pb2.CallIdentity(client_id=f"{n:064}", sequence=1))
        return asked

    _outstanding(flooding, request)


def _unread_replies(flooding: _Flooding) -> None:
    """Calls with replies of 1 MiB, of clients who do not read."""
    with ExitStack() as stack:
        clients = [stack.enter_context(DeafClient(flooding.daemon.address)) for _ in range(20)]
        while not flooding.over.is_set():
            for client in clients:
                client.call("GetSession", v1.GetSessionRequest(key="read").SerializeToString())
                flooding.tally.times += 1
            time.sleep(0.01)


def _unread_streams(flooding: _Flooding) -> None:
    """Streams of 4 MB that are opened and not read."""
    with flooding.stub() as stub:
        streams = []
        while not flooding.over.is_set() and len(streams) < 2000:
            streams.append(stub.ReadMessages(v1.ReadMessagesRequest(key="read"), timeout=PATIENCE_S))
            flooding.tally.times += 1
            time.sleep(0.005)
        flooding.over.wait(2 * PATIENCE_S)
        for stream in streams:
            stream.cancel()


def _unfinished_requests(flooding: _Flooding) -> None:
    """Large requests of which a part comes, and then nothing."""
    with ExitStack() as stack:
        for _ in range(40):
            client = stack.enter_context(DeafClient(flooding.daemon.address))
            client.begin("AppendMessages")
            client.send(struct.pack(">BI", 0, 16 << 20) + b"x" * 60_000)
            flooding.tally.times += 1
        flooding.over.wait(2 * PATIENCE_S)


def _connections(flooding: _Flooding) -> None:
    """Hundreds of connections that call once and stay."""
    with ExitStack() as stack:
        while not flooding.over.is_set():
            for _ in range(20):
                client = stack.enter_context(DeafClient(flooding.daemon.address))
                client.call("GetServerInfo", b"")
                flooding.tally.times += 1
            if flooding.daemon.process.poll() is not None:
                return
            time.sleep(0.1)


_FLOODS = (
    _large_batches,
    _small_calls,
    _identities,
    _unread_replies,
    _unread_streams,
    _unfinished_requests,
    _connections,
)


def _together(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)


def _outstanding(flooding: _Flooding, request: Callable[[int], v1.AppendMessagesRequest]) -> None:
    """Keep a thousand calls under way."""
    room = threading.Semaphore(1000)

    def done(call: grpc.Future, key: str) -> None:
        flooding.note(call, key, 1)
        room.release()

    with flooding.stub() as stub:
        n = 0
        while not flooding.over.is_set():
            room.acquire()
            n += 1
            asked = request(n)
            call = stub.AppendMessages.future(asked, timeout=PATIENCE_S)
            call.add_done_callback(lambda call, key=asked.key: done(call, key))
        for _ in range(1000):
            room.acquire(timeout=PATIENCE_S)


# Judging ----------------------------------------------------------------------------------------------------


def _judge(flooding: _Flooding, calm: _Calm) -> None:
    """The daemon lives; killed and started again, it has what was acknowledged."""
    daemon, tally = flooding.daemon, flooding.tally
    if daemon.process.poll() is not None or calm.failure:
        code = daemon.process.poll()
        tally.lose("wrong", f"it ended with {code}; calm client: {calm.failure}:\n{daemon.stderr[-3000:]}")
        return
    daemon.restart(kill=True)
    for key, acknowledged in flooding.acknowledged.items():
        reply = daemon.stub.GetSession(
            v1.GetSessionRequest(key=key, last=0), timeout=PATIENCE_S, wait_for_ready=True
        )
        count = reply.session.message_count
        if count < acknowledged:
            tally.lose("lost", f"{key} holds {count} messages, {acknowledged} were acknowledged")
        elif count > acknowledged + flooding.unknown[key]:
            tally.lose("wrong", f"{key} holds {count} messages, {acknowledged} were acknowledged")
    numbers = [message["n"] for message in stored_in(daemon, ["calm"])["calm"]]
    if numbers not in (list(range(1, calm.acknowledged + 1)), list(range(1, calm.acknowledged + 2))):
        tally.lose("lost", f"the calm client's session holds {json.dumps(numbers)[:500]}")
    tally.acknowledged = sum(flooding.acknowledged.values()) + calm.acknowledged
    tally.unknown = sum(flooding.unknown.values())

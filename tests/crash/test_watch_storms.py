"""Many watchers: beside writers, reconnects and a restart; and a thousand clients on one daemon."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest
from daemons import Daemon, wait_until
from followers import Follower
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc
from wire import block

_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_LOCAL = "Internal error from Core"  # what grpc.aio says of a call whose connection ends while it begins
_TIME_S_MAX = 500.0


@dataclass
class Storm:
    """Writers who append and rewrite, and watchers who follow them, on one loop."""

    daemon: Daemon
    watchers: int
    writers: int
    appends: int
    """By all writers together."""
    seed: int
    appended: set[tuple[str, bytes]] = field(default_factory=set)
    done: bool = False
    cuts: int = 0

    async def run(self) -> list[Follower]:
        """Let them; returns the followers, each of whom has caught up."""
        async with asyncio.timeout(_TIME_S_MAX):
            first = await self._cursor()
            followers = [Follower(cursor=first) for _ in range(self.watchers)]
            watching = [asyncio.create_task(self._watch(n, each)) for n, each in enumerate(followers)]
            await asyncio.gather(*(self._write(n) for n in range(self.writers)), self._restart())
            self.end = await self._cursor()
            self.done = True
            await asyncio.gather(*watching)
        return followers

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.daemon.address, [("grpc.use_local_subchannel_pool", 1)])

    async def _cursor(self) -> bytes:
        async with self._channel() as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            return (await stub.ListSessions(v1.ListSessionsRequest(page_size=1))).cursor

    async def _write(self, writer: int) -> None:
        """Append to two sessions of its own and to one that all share; rewrite now and then."""
        random_ = random.Random(self.seed * 1000 + writer)
        async with self._channel() as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            for n in range(self.appends // self.writers):
                key = random_.choice([f"w:{writer}", f"w:{writer}:b", "w:all"])
                line = b'{"by":%d,"n":%d}' % (writer, n)
                call = {"client_id": f"writer {writer}", "sequence": 2 * n + 1, "answered_through": 2 * n}
                append = v1.AppendMessagesRequest(key=key, messages=line + b"\n", call=call)
                await self._sent(stub.AppendMessages, append)
                self.appended.add((key, line))
                call = {"client_id": f"writer {writer}", "sequence": 2 * n + 2, "answered_through": 2 * n + 1}
                rewrite = {
                    0: (stub.PopMessage, v1.PopMessageRequest(key=key, call=call)),
                    1: (stub.ReplaceMessages, v1.ReplaceMessagesRequest(key=key, call=call, delete_count=1)),
                    2: (stub.DeleteSession, v1.DeleteSessionRequest(key=key, call=call)),
                    3: (
                        stub.ForkSession,
                        v1.ForkSessionRequest(key=f"w:f{writer}.{n}", source_key=key, call=call),
                    ),
                }.get(random_.randrange(100))
                if rewrite is not None:
                    await self._sent(*rewrite)

    async def _sent(self, method, request) -> None:
        """Send a call until it is answered; what is refused because of others is left."""
        while True:
            try:
                await method(request, timeout=60)
                return
            except grpc.aio.AioRpcError as error:
                if error.code() not in _RETRIED:
                    if error.code().name not in ("NOT_FOUND", "OUT_OF_RANGE"):
                        raise
                    return
                await asyncio.sleep(0.05)

    async def _watch(self, n: int, follower: Follower) -> None:
        """Follow until everything is there, with three reconnects of its own."""
        random_ = random.Random(self.seed * 7777 + n)
        cut_at = sorted(random_.sample(range(1, self.appends * 3 // 4), 3))
        channel = self._channel()
        while not (self.done and follower.cursor >= self.end):
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            request = v1.WatchRequest(prefix="w:", cursor=follower.cursor, progress_interval={"seconds": 1})
            try:
                async for response in (call := stub.Watch(iter([request]))):
                    follower.take(response)
                    if cut_at and follower.events >= cut_at[0]:
                        cut_at.pop(0)
                        self.cuts += 1
                        call.cancel()
                        await channel.close()
                        channel = self._channel()
                        break
                    if self.done and follower.cursor >= self.end:
                        call.cancel()
                        break
            except grpc.aio.AioRpcError as error:
                if error.details() != _LOCAL and error.code() not in _RETRIED:
                    raise
                await asyncio.sleep(0.05)
            follower.begin_again()
        await channel.close()

    async def _restart(self) -> None:
        """One restart, in the middle."""
        while len(self.appended) < self.appends // 2:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.daemon.restart)


def stored(daemon: Daemon) -> Iterator[tuple[v1.GetSessionResponse, bytes]]:
    """Every session with all of its messages."""
    token = ""
    while True:
        page = daemon.stub.ListSessions(v1.ListSessionsRequest(page_token=token, page_size=1000))
        for head in page.sessions:
            parts = daemon.stub.ReadMessages(v1.ReadMessagesRequest(key=head.key))
            yield head, b"".join(part.messages for part in parts)
        token = page.next_page_token
        if not token:
            return


@pytest.mark.parametrize(
    ("watchers", "writers", "appends"),
    [(8, 4, 400), pytest.param(100, 10, 10_000, marks=pytest.mark.slow)],
)
def test_watchers_beside_writers_reconnects_and_a_restart(make_daemon, watchers, writers, appends):
    seed = int(os.environ.get("SEED", time.time_ns() % 10**6))
    print(f"SEED={seed}")
    daemon = make_daemon(store="jsonl", flags=("--checkpoint-s-max", "0.5")).start()
    storm = Storm(daemon, watchers, writers, appends, seed)
    began = time.monotonic()
    followers = asyncio.run(storm.run())
    expected = {head.key: (head, messages) for head, messages in stored(daemon)}
    times: Counter[int] = Counter()
    for follower in followers:
        assert follower.sessions.keys() == expected.keys()
        for key, (head, messages) in expected.items():
            held = follower.sessions[key]
            assert held.head == head
            assert b"".join(line + b"\n" for line in held.lines) == messages
        assert all(count == 1 for count in follower.given.values())
        assert {each for each in follower.given if not each[0].startswith("w:f")} == storm.appended
        times.update({"events": follower.events, "skipped": follower.skipped, "whole": follower.wholes})
    assert storm.cuts == 3 * watchers
    print(
        f"{watchers} watchers, {writers} writers: {len(storm.appended)} messages, each came once to each; "
        f"{storm.cuts} reconnects, 1 restart, {times['events']} events, {times['skipped']} skipped by their "
        f"revision, {times['whole']} whole; {time.monotonic() - began:.1f} s"
    )


# A thousand clients.


def rss_bytes(daemon: Daemon) -> int:
    with open(f"/proc/{daemon.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _see_appends(daemon: Daemon, clients: int, appends: int) -> tuple[list[float], int, int]:
    """How long each client waits for each append; what the daemon held before they came, and with them."""
    before = rss_bytes(daemon)
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(daemon.address, options) for _ in range(clients)]
    calls = []
    for begin in range(0, clients, 50):
        part = [session_store_pb2_grpc.SessionStoreStub(each) for each in channels[begin : begin + 50]]
        opened = [stub.Watch(iter([v1.WatchRequest(keys=["k"])])) for stub in part]
        await asyncio.gather(*(call.read() for call in opened))  # each is in force
        calls += opened
    held = rss_bytes(daemon)
    waits: list[float] = []

    async def see(call, sent_s: float) -> None:
        while not (await call.read()).events:
            pass
        waits.append(time.monotonic() - sent_s)

    async with grpc.aio.insecure_channel(daemon.address, options) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        for n in range(appends):
            sent_s = time.monotonic()
            seeing = [asyncio.create_task(see(call, sent_s)) for call in calls]
            await stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=block({"n": n})))
            await asyncio.gather(*seeing)
    for call in calls:
        call.cancel()
    await asyncio.gather(*(channel.close() for channel in channels))
    return waits, before, held


WATCHER_BYTES_MAX = 256 << 10
"""What one client with an open watch costs the daemon at the most, its connection included."""


@pytest.mark.parametrize("clients", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_append_is_seen_by_all_of_its_watchers(make_daemon, clients):
    daemon = make_daemon(store="jsonl").start()
    waits, before, held = asyncio.run(
        asyncio.wait_for(_see_appends(daemon, clients, 5), _TIME_S_MAX)
    )
    assert len(waits) == clients * 5
    each = (held - before) / clients
    waits.sort()
    print(
        f"{clients} clients with an open watch: {each / 1024:.0f} KiB each, {held >> 20} MiB in all; an "
        f"append is seen after {waits[len(waits) // 2] * 1000:.0f} ms (p50), "
        f"{waits[len(waits) * 99 // 100] * 1000:.0f} ms (p99)"
    )
    assert each < WATCHER_BYTES_MAX
    free = daemon.stub.GetServerInfo(v1.GetServerInfoRequest())
    assert free.session_count == 1
    wait_until(lambda: rss_bytes(daemon) < held + (64 << 20), what="memory stays bounded")

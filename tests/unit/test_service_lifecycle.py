"""How a daemon ends when its store does, and what it lets go of when it cannot start."""

import asyncio
import logging
from collections.abc import Sequence

import grpc
import pytest
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc
from sessionstored import server
from sessionstored.config import Config
from sessionstored.engine import Refused, Reply, Request, StartError
from sessionstored.engine.memory import MemoryEngine
from sessionstored.rules import Refusal

CONFIG = Config(data="unused", listen=("127.0.0.1:0",), store="memory")


class FailingEngine(MemoryEngine):
    """A store whose first write fails for good, as a failed flush does, or whose close does."""

    def __init__(self, *, on_close: bool = False) -> None:
        super().__init__()
        self.broken = asyncio.Event()
        self.closed = 0
        self.on_close = on_close
        self.announced: Sequence[str] = ()

    async def submit(self, requests: Sequence[Request]) -> list[Reply]:
        self.broken.set()
        raise Refused(Refusal("OUTCOME_UNKNOWN", "storage failed during the commit"))

    def announce(self, addresses: Sequence[str]) -> None:
        self.announced = addresses

    async def failed(self) -> str:
        await self.broken.wait()
        return "fdatasync: Input/output error"

    async def close(self) -> None:
        self.closed += 1
        if self.on_close:
            self.broken.set()


@pytest.fixture
async def engine(monkeypatch: pytest.MonkeyPatch) -> FailingEngine:
    made = FailingEngine()

    async def open_engine(config: Config, *, accept_loss: bool) -> FailingEngine:
        return made

    monkeypatch.setattr(server, "open_engine", open_engine)
    return made


async def served(config: Config = CONFIG) -> tuple[asyncio.Task[int], str]:
    """A daemon in this process, and its address."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(server.serve(config, lambda addresses: ready.set_result(addresses[0])))
    await asyncio.wait((task, ready), timeout=60, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return task, ready.result()


async def test_a_storage_failure_ends_the_daemon_at_once_and_says_so(engine, caplog):
    task, address = await served()
    assert engine.announced == [address]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=b"{}\n"), timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    assert await asyncio.wait_for(task, 60) == server.EXIT_STORAGE_FAILED == 3
    assert engine.closed == 0, "what memory says about the disk is not to be believed"
    (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "fdatasync: Input/output error" in record.getMessage()


async def test_calls_hear_what_became_of_them_before_a_failed_daemon_ends(engine, monkeypatch):
    """However long the commit under way takes to fail, and whatever comes meanwhile."""
    answer = asyncio.Event()

    async def submit(requests: Sequence[Request]) -> list[Reply]:
        engine.broken.set()
        await answer.wait()
        raise Refused(Refusal("OUTCOME_UNKNOWN", "storage failed during the commit"))

    monkeypatch.setattr(engine, "submit", submit)
    monkeypatch.setattr(server, "_FAILURE_ANSWERED_S_MAX", 60.0)
    task, address = await served()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        waiting = stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=b"{}\n"), timeout=60)
        await asyncio.wait_for(engine.broken.wait(), 60)
        await asyncio.sleep(4 * server._STREAMS_GRACE_S)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=b"{}\n"), timeout=60)
        answer.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
    assert "SHUTTING_DOWN" in str(late.value.trailing_metadata())
    assert "OUTCOME_UNKNOWN" in str(caught.value.trailing_metadata())
    assert await asyncio.wait_for(task, 60) == server.EXIT_STORAGE_FAILED


async def test_a_storage_failure_during_the_last_flush_is_no_clean_stop(engine, monkeypatch):
    engine.on_close = True
    stop = asyncio.Event()
    monkeypatch.setattr(server, "_stop_on_signals", lambda: stop)
    task, _ = await served()
    stop.set()
    assert await asyncio.wait_for(task, 60) == server.EXIT_STORAGE_FAILED


async def test_a_stop_closes_the_store(engine, monkeypatch):
    stop = asyncio.Event()
    monkeypatch.setattr(server, "_stop_on_signals", lambda: stop)
    task, _ = await served()
    stop.set()
    assert await asyncio.wait_for(task, 60) == server.EXIT_OK == 0
    assert engine.closed == 1


async def test_a_daemon_that_cannot_bind_closes_its_store(engine):
    first, address = await served()
    with pytest.raises(StartError, match="Address already in use"):
        await server.serve(Config(data="unused", listen=(address,), store="memory"), lambda _: None)
    assert engine.closed == 1
    engine.broken.set()
    assert await asyncio.wait_for(first, 60) == server.EXIT_STORAGE_FAILED


async def test_a_daemon_that_cannot_say_that_it_is_ready_closes_its_store(engine):
    def nobody_listens(addresses: Sequence[str]) -> None:
        raise BrokenPipeError("stdout is closed")

    with pytest.raises(BrokenPipeError):
        await server.serve(CONFIG, nobody_listens)
    assert engine.closed == 1

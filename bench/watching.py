"""Workload "watch": one writer, many watchers of everything. No bar. The raw stub, on one connection each."""

import asyncio
import time
from statistics import median

import grpc
from sessionstore import AsyncSessionStore
from sessionstore.v1 import session_store_pb2 as pb
from sessionstore.v1 import session_store_pb2_grpc

from bench.messages import message
from bench.run import Run

_PER_CHANNEL = 50
_PATIENCE_S = 60.0


def fan_out(run: Run) -> None:
    """From an append's begin to its arrival at the last watcher; and events per second of all together."""
    for n in range(run.sizes.rounds):
        taken, events, seconds = run.loop.run_until_complete(_round(run, max(2, run.sizes.alone // 10)))
        run.results.add(("watch", "ours", "p50_ms"), n, median(taken) * 1000)
        run.results.add(("watch", "ours", "throughput_per_s"), n, events / seconds)
    run.results.notes.append(f"watch: {run.sizes.watchers} watchers; throughput is events delivered")


async def _round(run: Run, appends: int) -> tuple[list[float], int, float]:
    assert run.ours is not None
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(run.ours.target, options=options)
        for _ in range(-(-run.sizes.watchers // _PER_CHANNEL))
    ]
    async with AsyncSessionStore(run.ours.target) as store:
        handle = await store.session("watched")
        revision, arrived, seen = 0, asyncio.Event(), 0

        async def follow(n: int, ready: asyncio.Event) -> None:
            nonlocal seen
            stub = session_store_pb2_grpc.SessionStoreStub(channels[n // _PER_CHANNEL])
            request = pb.WatchRequest(keys=["watched"])

            async def requests():
                yield request
                await asyncio.Event().wait()

            async for response in stub.Watch(requests()):
                ready.set()
                for event in response.events:
                    seen += 1
                    counts[event.revision] = counts.get(event.revision, 0) + 1
                    if counts[event.revision] == run.sizes.watchers:
                        arrived.set()

        counts: dict[int, int] = {}
        readies = [asyncio.Event() for _ in range(run.sizes.watchers)]
        tasks = [asyncio.create_task(follow(n, ready)) for n, ready in enumerate(readies)]
        try:
            async with asyncio.timeout(_PATIENCE_S):
                for ready in readies:
                    await ready.wait()
                taken = []
                begun_all = time.perf_counter()
                for _ in range(appends):
                    arrived.clear()
                    begun = time.perf_counter()
                    revision = (await handle.append(message(0))).revision
                    if counts.get(revision, 0) < run.sizes.watchers:
                        await arrived.wait()
                    taken.append(time.perf_counter() - begun)
                return taken, seen, time.perf_counter() - begun_all
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for channel in channels:
                await channel.close()

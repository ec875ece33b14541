"""The bound on requests that are on their way in."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from sessionstored.arrivals import Arrivals

NEVER_S = 3600.0


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Calls:
    """Calls that begin at once, and whose messages are there when a test says so."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals
        self.begun: list[str] = []
        self.there: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, *names: str) -> None:
        for name in names:
            self.there[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._run(name))

    async def _run(self, name: str) -> None:
        await self.arrivals.begin()
        self.begun.append(name)
        await self.there[name].wait()
        self.arrivals.arrived()
        await asyncio.sleep(0)

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def calls(*, places: int = 2, waiting_max: int = 10, patience_s: float = NEVER_S) -> Calls:
    return Calls(Arrivals(places=places, waiting_max=waiting_max, patience_s=patience_s))


async def test_so_many_are_under_way_and_the_others_wait_in_their_order():
    some = calls()
    some.start("a", "b", "c", "d", "e")
    await settle()
    assert some.begun == ["a", "b"]
    some.there["b"].set()
    await settle()
    assert some.begun == ["a", "b", "c"]
    some.there["a"].set()
    some.there["c"].set()
    await settle()
    assert some.begun == ["a", "b", "c", "d", "e"]
    await some.end()


async def test_a_caller_who_goes_away_gives_back_its_place_and_its_wait():
    some = calls(places=1)
    some.start("a", "b", "c")
    await settle()
    some.tasks["b"].cancel()
    some.tasks["a"].cancel()
    await settle()
    assert some.begun == ["a", "c"]
    some.start("d")
    await settle()
    assert "d" not in some.begun
    some.there["c"].set()
    await settle()
    assert some.begun == ["a", "c", "d"]
    await some.end()


async def test_one_that_goes_away_when_it_is_its_turn_gives_the_place_on():
    some = calls(places=1)
    some.start("a", "b", "c")
    await settle()
    some.there["a"].set()
    await asyncio.sleep(0)  # "a" is there, and "b" has not run since
    some.tasks["b"].cancel()
    await settle()
    assert "c" in some.begun
    await some.end()


async def test_the_slowest_is_cut_off_only_while_others_wait():
    some = calls(places=2, patience_s=0.01)
    some.start("slow", "slower")
    await asyncio.sleep(0.05)
    assert not some.tasks["slow"].done()
    some.start("c")
    await asyncio.wait((some.tasks["slow"],), timeout=60)
    assert some.tasks["slow"].cancelled()
    await settle()
    assert not some.tasks["slower"].done()
    assert some.begun == ["slow", "slower", "c"]
    await some.end()


async def test_a_slow_one_is_left_alone_while_others_come_and_go():
    some = calls(places=2, patience_s=60)
    some.start("slow", "a", "b", "c")
    await settle()
    some.arrivals._under_way[some.tasks["slow"]] -= 1000  # it has been sending for long
    some.there["a"].set()
    await asyncio.wait((some.tasks["slow"],), timeout=1)
    assert not some.tasks["slow"].done()
    assert some.begun == ["slow", "a", "b"]
    some.arrivals._finished_s -= 1000  # and the others stay, too
    some.start("d")
    await asyncio.wait((some.tasks["slow"],), timeout=100)
    assert some.tasks["slow"].cancelled()
    await some.end()


async def test_who_waits_cuts_off_one_that_becomes_too_slow():
    some = calls(places=1, patience_s=0.01)
    some.start("slow", "b")
    await asyncio.wait((some.tasks["slow"],), timeout=60)
    assert some.tasks["slow"].cancelled()
    await settle()
    assert some.begun == ["slow", "b"]
    await some.end()


async def test_after_a_loop_that_stood_still_a_message_that_came_meanwhile_is_not_cut_off():
    some = calls(places=1, patience_s=0.05)
    some.start("a", "b")
    await settle()
    asyncio.get_running_loop().call_later(0.1, some.there["a"].set)
    time.sleep(0.2)
    await asyncio.wait((some.tasks["a"],), timeout=60)
    assert not some.tasks["a"].cancelled()
    await settle()
    assert some.begun == ["a", "b"]
    await some.end()


async def test_the_more_wait_the_less_patience_there_is():
    some = calls(places=1, waiting_max=10_000, patience_s=100)
    some.start("slow", *(f"w{n}" for n in range(9_999)))
    await asyncio.wait((some.tasks["slow"],), timeout=60)
    assert some.tasks["slow"].cancelled()
    await some.end()


async def test_more_than_may_wait_are_let_through():
    some = calls(places=1, waiting_max=1)
    some.start("a", "waits", "c", "d")
    await settle()
    assert some.begun == ["a", "c", "d"]
    some.there["c"].set()
    await settle()
    assert "waits" not in some.begun
    await some.end()


async def test_a_message_that_is_there_gives_its_place_back_once():
    arrivals = Arrivals(places=1, waiting_max=10, patience_s=NEVER_S)

    async def call(between: Callable[[], Awaitable[None]]) -> None:
        await arrivals.begin()
        arrivals.arrived()
        arrivals.arrived()
        await between()

    async def another() -> None:
        await asyncio.wait_for(call(lambda: asyncio.sleep(0)), 60)

    await asyncio.wait_for(call(another), 60)

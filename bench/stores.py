"""Which sessions the main store of a run has, before anybody writes to it."""

from collections.abc import Iterator

from bench.generate import Wanted
from bench.sizes import Sizes

CROWD_MESSAGES = 10
ALONE = 100
"""Sessions among which one caller turns."""


def main_store(sizes: Sizes) -> Iterator[Wanted]:
    """The crowds' sessions, and one or more of each length that a workload asks for."""
    for prefix, count in (
        ("async:", sizes.crowd_sessions),
        ("threads:", sizes.crowd_sessions),
        ("alone:", ALONE),
    ):
        for n in range(count):
            yield Wanted(f"{prefix}{n}", CROWD_MESSAGES)
    for length in sizes.lengths:
        yield Wanted(f"length:{length}", length)
    yield Wanted("turn:sync", 1000)
    yield Wanted("turn:async", 1000)
    yield Wanted("turn:opened", 1000)
    yield Wanted("long:append", 10_000)
    yield Wanted("long:save", 10_000)
    yield Wanted("read:500", 500)
    yield Wanted("read:20", 10_000)
    for n in range(2 * (sizes.cold + 1) * sizes.rounds):
        yield Wanted(f"cold:{n}", 10_000)


def numbered(prefix: str, count: int) -> Iterator[Wanted]:
    """So many sessions of one message."""
    return (Wanted(f"{prefix}{n}", 1) for n in range(count))

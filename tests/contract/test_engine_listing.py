"""What every engine must do with listings: four orders, prefixes, times, pages, and changes between pages."""

import asyncio
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from engines import KINDS, Clock, done, open_kind, read, submit
from hypothesis import given, settings
from hypothesis import strategies as st
from sessionstored.engine import Engine, Order, Query
from sessionstored.rules import Append, Create, Delete, Head, Mutation, Replace, Update

# In UTF-8 byte order, which is not UTF-16's: a private character comes before an astral one.
KEYS = [
    "!",
    "A",
    "B",
    "a",
    "a%",
    "a-b",
    "a/",
    "a/b",
    "a/b/c/d/e/f/g",
    "a:b",
    "a:b:c",
    "a_b",
    "aa",
    "b",
    "~",
    "é",
    "ключ",
    "ключ/✓",
    "\ue000",
    "\uffff",
    "\U00010000",
    "😀",
    "\U0010ffff",
]


async def everything(engine: Engine, query: Query) -> list[Head]:
    """All pages of a listing."""
    heads: list[Head] = []
    for _ in range(1000):
        page = await engine.list(query)
        assert len(page.heads) <= query.page_size
        heads += page.heads
        if not page.more:
            return heads
        assert page.heads, "an empty page has no successor"
        last = page.heads[-1]
        query = replace(query, after=(last.update_time_us, last.key))
    raise AssertionError("the listing does not end")


@pytest.mark.parametrize("page_size", [1, 2, 7, len(KEYS), 1000])
async def test_keys_order_by_their_utf8_bytes(engine: Engine, page_size: int) -> None:
    assert sorted(KEYS, key=str.encode) == KEYS
    await submit(engine, *(Create(key) for key in reversed(KEYS)))
    heads = await everything(engine, Query(page_size=page_size))
    assert [head.key for head in heads] == KEYS
    heads = await everything(engine, Query(order=Order.KEY_DESC, page_size=page_size))
    assert [head.key for head in heads] == KEYS[::-1]


PREFIXES = ["", "a", "a/", "a/b/c/d/e/f/g", "a/b/c/d/e/f/g/", "кл", "ключ", "\ue000", "\uffff", "\U0010ffff"]


@pytest.mark.parametrize("order", Order)
async def test_a_prefix_keeps_what_begins_with_it(engine: Engine, order: Order) -> None:
    await submit(engine, *(Create(key) for key in KEYS))
    for prefix in [*PREFIXES, "a%", "a_", "none"]:
        heads = await everything(engine, Query(prefix, order, page_size=3))
        assert sorted(head.key for head in heads) == sorted(key for key in KEYS if key.startswith(prefix))


async def test_heads_are_complete(engine: Engine) -> None:
    await submit(
        engine,
        Create("k", [b"{}", b"{}"], b'{"a": 1E5}', 2, create_time_us=1_000_000),
        Append("other", [b"{}"]),
        Replace("k", 1, 1, []),
    )
    listed = await everything(engine, Query())
    assert listed == [(await read(engine, key)).head for key in ("k", "other")]
    assert (listed[0].message_count, listed[0].last_consolidated) == (1, 1)
    assert listed[0].create_time_us == 1_000_000


async def test_time_orders_break_ties_by_key(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Within a group all times may be equal, and between groups they differ: both must order.
    await submit(engine, *(Create(key) for key in KEYS))
    await asyncio.sleep(0.002)
    await submit(engine, *(Append(key, [b"{}"]) for key in KEYS[::-2]))
    clock = Clock(monkeypatch)
    clock.wall_s = -1000
    await submit(engine, *(Append(key, [b"{}"]) for key in KEYS[::3]))
    by_key = await everything(engine, Query())
    expected = sorted(by_key, key=lambda head: (head.update_time_us, head.key.encode()))
    for page_size in (1, 4, 1000):
        ordered = await everything(engine, Query(order=Order.UPDATE_TIME, page_size=page_size))
        assert ordered == expected
        ordered = await everything(engine, Query(order=Order.UPDATE_TIME_DESC, page_size=page_size))
        assert ordered == expected[::-1]


@pytest.mark.parametrize("order", Order)
async def test_updated_since_is_inclusive(engine: Engine, order: Order) -> None:
    times = {}
    for key in ("c", "a", "b"):
        times[key] = (await done(engine, Append(key, [b"{}"]))).update_time_us
        await asyncio.sleep(0.001)
    found = {}
    for since in (0, times["c"], times["c"] + 1, times["a"], times["b"], times["b"] + 1):
        heads = await everything(engine, Query(order=order, page_size=2, updated_since_us=since))
        assert {head.key for head in heads} == {key for key, at in times.items() if at >= since}
        found[since] = len(heads)
    assert sorted(found.values()) == [0, 1, 2, 2, 3, 3]


async def test_more_is_said_exactly_when_there_is_more(engine: Engine) -> None:
    assert await engine.list(Query()) == await engine.list(Query(prefix="x"))
    assert not (await engine.list(Query())).more
    await submit(engine, *(Create(str(number)) for number in range(4)))
    assert [(await engine.list(Query(page_size=size))).more for size in (3, 4, 5)] == [True, False, False]


async def test_a_deleted_position_still_continues(engine: Engine) -> None:
    await submit(engine, *(Create(key) for key in "abcde"))
    page = await engine.list(Query(page_size=2))
    await done(engine, Delete("b"))
    last = page.heads[-1]
    rest = await engine.list(Query(after=(last.update_time_us, last.key)))
    assert [head.key for head in rest.heads] == ["c", "d", "e"]


async def test_count_follows(engine: Engine) -> None:
    assert await engine.count() == 0
    await submit(engine, Create("a"), Append("b", [b"{}"]), Create("a"), Delete("none"))
    assert await engine.count() == 2
    await submit(engine, Delete("a"), Create("c"), Delete("c"))
    assert await engine.count() == 1


# Changes between pages.

_small_keys = st.sampled_from(["a", "a/b", "a:b", "b", "é", "\ue000", "😀"])
_changes = st.lists(
    st.one_of(
        st.builds(Append, _small_keys, st.just([b"{}"])),
        st.builds(Update, _small_keys, st.just(b'{"a": 1}')),
        st.builds(Delete, _small_keys),
        st.builds(Create, _small_keys),
    ),
    max_size=3,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_that_does_not_change_is_listed_exactly_once(kind: str) -> None:
    @settings(max_examples=60 if kind == "memory" else 12, deadline=None)
    @given(
        st.lists(_changes, min_size=1, max_size=3),
        st.lists(_changes, max_size=6),
        st.builds(Query, st.sampled_from(["", "a", "a/"]), st.sampled_from(Order), st.integers(1, 3)),
    )
    def listing(before: list[list[Mutation]], between: list[list[Mutation]], query: Query) -> None:
        with tempfile.TemporaryDirectory() as data:
            asyncio.run(changes_between_pages(kind, Path(data), before, between, query))

    listing()


async def changes_between_pages(
    kind: str, data: Path, before: list[list[Mutation]], between: list[list[Mutation]], query: Query
) -> None:
    engine = await open_kind(kind, data)
    try:
        for group in filter(None, before):
            await submit(engine, *group)
        at_start = {head.key: head for head in await everything(engine, Query(query.prefix))}
        listed: list[Head] = []
        touched: set[str] = set()
        for group in itertools.chain(between, itertools.repeat([])):
            page = await engine.list(query)
            listed += page.heads
            if not page.more:
                break
            query = replace(query, after=(page.heads[-1].update_time_us, page.heads[-1].key))
            if group:
                await submit(engine, *group)
            touched |= {mutation.key for mutation in group}
        keys = [head.key for head in listed]
        for key, head in at_start.items():
            if key not in touched:
                assert keys.count(key) == 1
                assert head in listed
        assert set(keys) <= set(at_start) | touched
        if query.order in (Order.KEY, Order.KEY_DESC):
            assert len(set(keys)) == len(keys)
        positions = [
            (head.update_time_us if "time" in query.order.value else 0, head.key.encode()) for head in listed
        ]
        assert positions == sorted(positions, reverse="desc" in query.order.value)
    finally:
        await engine.close()

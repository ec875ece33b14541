"""What every engine's watch gives: each change once, in order, without a gap, from any cursor on."""

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

import pytest
from engines import DURABLE_KINDS, KINDS, done, lines, open_kind, read, submit
from followers import Follower, Following, position
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import KEYS, mutations
from sessionstored import replies
from sessionstored.engine import Engine, Query, Refused, watcher
from sessionstored.rules import (
    DEFAULT_LIMITS,
    Append,
    Create,
    Delete,
    Fork,
    Mutation,
    Pop,
    Refusal,
    Replace,
    Update,
)

A, B, C, D = (b'{"role": "user", "content": "%s"}' % name for name in (b"a", b"b", b"c", b"d"))
LARGE_METADATA = b'{"notes": "%s"}' % (b"n" * 3000)
T = TypeVar("T")


async def agrees(engine: Engine, follower: Follower, *, prefix: str = "") -> None:
    """What a follower holds is what is stored."""
    page = await engine.list(Query(prefix, page_size=1000))
    assert sorted(follower.sessions) == sorted(head.key for head in page.heads)
    for head in page.heads:
        held = follower.sessions[head.key]
        assert held.lines == list(await lines(engine, head.key))
        assert held.head.revision == head.revision
        assert held.head.metadata == head.metadata
        assert held.head.last_consolidated == head.last_consolidated
        assert held.head.damage == head.damage
        assert held.head.update_time.ToMicroseconds() == head.update_time_us


async def test_every_kind_of_change_is_told(engine: Engine) -> None:
    following = Following(engine)
    await done(engine, Append("a", [A, B, C]))
    await done(engine, Create("b", [A], LARGE_METADATA, 1))
    await done(engine, Pop("a"))
    await done(engine, Replace("a", 0, 1, [D, D]))
    await done(engine, Update("a", members={"x": b"1"}, last_consolidated=1))
    await done(engine, Fork("c", "a"))
    await done(engine, Append("b", [C]))
    await done(engine, Delete("b"))
    await done(engine, Append("b", [B]))
    follower = await following.catch_up()
    await agrees(engine, follower)
    assert follower.skipped == 0
    assert follower.given["a", D] == 2
    await following.close()


async def test_a_refused_change_is_not_told(engine: Engine) -> None:
    following = Following(engine)
    await done(engine, Append("k", [A]))
    await submit(engine, Create("k", [B]), Append("k", [C]), Pop("none"), Append("k", [D], 1 << 60))
    follower = await following.catch_up()
    await agrees(engine, follower)
    assert follower.events == 2
    await following.close()


async def test_what_is_read_with_its_cursor_and_then_followed_is_what_is_stored(engine: Engine) -> None:
    await done(engine, Append("k", [A]))
    cursor = engine.cursor()
    await done(engine, Append("k", [B]))  # the read shows this, and the watch gives it again
    found = await read(engine, "k")
    await done(engine, Append("k", [C]))
    follower = Follower(cursor=cursor)
    follower.hold(replies.session(found.head, DEFAULT_LIMITS), found.lines)
    following = Following(engine, follower, keys=["k"])
    await following.catch_up()
    await agrees(engine, follower)
    assert (follower.skipped, follower.wholes) == (1, 0)
    await following.close()


async def test_each_event_is_a_place_to_go_on_from(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch ends after every single event, and goes on from its cursor."""
    monkeypatch.setattr(watcher, "BATCH_BYTES_MAX", 1)
    follower = Follower(cursor=engine.cursor())
    for n in range(6):
        await done(engine, Append("k", [b'{"n": %d}' % n]))
        await submit(engine, Append("l", [A]), Pop("l"), Append("m", [b'{"m": %d}' % n]))
        await done(engine, Fork(f"f{n}", "k"))
    target = position(engine.cursor())
    ended = 0
    while position(follower.cursor) < target:
        following = Following(engine, follower)
        await following.step()
        await following.close()
        ended += 1
    await agrees(engine, follower)
    assert all(follower.given["k", b'{"n": %d}' % n] == 1 for n in range(6))
    assert ended >= 6 * 3


async def test_a_follower_from_the_beginning_is_told_everything(engine: Engine) -> None:
    cursor = engine.cursor()
    for n in range(300):
        await done(engine, Append(f"k{n % 7}", [b'{"n": %d}' % n]))
    following = Following(engine, Follower(cursor=cursor), prefix="k")
    follower = await following.catch_up()
    await agrees(engine, follower, prefix="k")
    assert sum(follower.given.values()) == 300
    assert max(follower.given.values()) == 1
    await following.close()


async def test_only_what_is_watched_is_told(engine: Engine) -> None:
    by_prefix, by_keys = Following(engine, prefix="a:"), Following(engine, keys=["a:1", "b:1", "none"])
    for key in ("a:1", "a:2", "b:1", "b:2", "a"):
        await done(engine, Append(key, [A]))
    assert sorted((await by_prefix.catch_up()).sessions) == ["a:1", "a:2"]
    assert sorted((await by_keys.catch_up()).sessions) == ["a:1", "b:1"]
    await by_prefix.close()
    await by_keys.close()


async def test_keys_come_and_go(engine: Engine) -> None:
    cursor = engine.cursor()
    await done(engine, Append("late", [A]))
    following = Following(engine, keys=["k"])
    await done(engine, Append("k", [A]))
    following.watch.add(["late"], cursor)  # from before, beside what is live
    await done(engine, Append("late", [B]))
    await done(engine, Append("k", [B]))
    follower = await following.catch_up()
    assert follower.sessions["late"].lines == [A, B]
    assert follower.sessions["k"].lines == [A, B]
    following.watch.remove(["k"])
    await done(engine, Append("k", [C]))
    await done(engine, Append("late", [C]))
    await following.catch_up()
    assert follower.sessions["k"].lines == [A, B]
    assert follower.sessions["late"].lines == [A, B, C]
    following.watch.add(["k"], cursor)  # again, with what was missed
    await following.catch_up()
    await agrees(engine, follower)
    assert follower.wholes == 0
    await following.close()


async def test_keys_that_are_added_beside_a_busy_writer_miss_nothing(engine: Engine) -> None:
    follower = Follower(cursor=engine.cursor())
    cursors = [engine.cursor()]
    following = Following(engine, follower, keys=["k0"])

    async def write() -> None:
        for n in range(400):
            await done(engine, Append(f"k{n % 8}", [b'{"n": %d}' % n]))
            if n % 40 == 0:
                cursors.append(engine.cursor())

    writing = asyncio.create_task(write())
    for n in range(1, 8):
        while len(cursors) <= n:
            await following.step()
        following.watch.add([f"k{n}"], cursors[0])
    await writing
    await following.catch_up()
    await agrees(engine, follower)
    assert sum(follower.given.values()) == 400
    await following.close()


async def test_a_fork_of_a_long_session_comes_whole_and_in_parts(engine: Engine) -> None:
    await done(engine, Append("long", [b'{"n": %d, "x": "%s"}' % (n, b"x" * 20_000) for n in range(60)]))
    following = Following(engine, prefix="f")
    await done(engine, Fork("fork", "long"))
    await done(engine, Append("fork", [A]))
    follower = await following.catch_up()
    await agrees(engine, follower, prefix="f")
    assert follower.sessions["fork"].lines[-1] == A
    assert follower.wholes == 1
    await following.close()


async def test_a_large_batch_comes_in_parts_that_count_together(engine: Engine) -> None:
    following = Following(engine)
    await done(engine, Append("k", [A, B]))
    await done(engine, Replace("k", 1, 1, [b'{"x": "%s"}' % (b"y" * 300_000)] * 9))
    follower = await following.catch_up()
    await agrees(engine, follower)
    assert follower.events == 4  # the append, and three parts of at most 1 MiB
    await following.close()


async def test_a_session_that_is_gone_before_it_is_given_is_not_given(engine: Engine) -> None:
    cursor = engine.cursor()
    await done(engine, Append("k", [A]))
    await done(engine, Fork("f", "k"))
    await done(engine, Append("f", [B]))
    await done(engine, Delete("f"))
    following = Following(engine, Follower(cursor=cursor))
    follower = await following.catch_up()
    await agrees(engine, follower)
    assert follower.wholes == 0
    await done(engine, Create("f", [C]))
    await following.catch_up()
    await agrees(engine, follower)
    await following.close()


async def test_what_is_no_cursor_of_this_store_is_refused(engine: Engine, tmp_path: Path) -> None:
    await done(engine, Append("k", [A]))
    other = await open_kind("memory", tmp_path)
    ahead = engine.cursor()[:-8] + (position(engine.cursor()) + 1).to_bytes(8, "big")
    for cursor in (other.cursor(), b"x", engine.cursor() + b"x", b"\x02" + engine.cursor()[1:], ahead):
        with pytest.raises(Refused) as caught:
            engine.watch("", (), cursor)
        assert caught.value.refusal.reason == "CURSOR_INVALID"
    await other.close()


async def test_the_end_of_all_watches_is_told(engine: Engine) -> None:
    following = Following(engine)
    engine.end_watches(Refusal("SHUTTING_DOWN", "the end"))
    with pytest.raises(Refused) as caught:
        await following.step()
    assert caught.value.refusal.reason == "SHUTTING_DOWN"
    with pytest.raises(Refused) as caught:
        engine.watch("", (), b"")
    assert caught.value.refusal.reason == "SHUTTING_DOWN"


@pytest.mark.parametrize("kind", DURABLE_KINDS)
async def test_a_cursor_is_good_after_a_restart(kind: str, tmp_path: Path) -> None:
    engine = await open_kind(kind, tmp_path)
    follower = Follower(cursor=engine.cursor())
    for round_ in range(4):
        for n in range(5):
            await done(engine, Append("k", [b'{"n": "%d %d"}' % (round_, n)]))
            await done(engine, Update("k", members={"n": b"%d" % n}))
        await done(engine, Fork(f"f{round_}", "k"))
        await engine.close()
        engine = await open_kind(kind, tmp_path)
        following = Following(engine, follower)
        await following.catch_up()
        await agrees(engine, follower)
        await following.close()
    assert max(follower.given.values()) == 1
    await engine.close()


# Random histories.


class WatchMachine(RuleBasedStateMachine):
    """One engine, and followers who come, go, and resume; each holds what is stored whenever it caught up."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.engine = self.run(open_kind(self.kind, Path(self.directory.name)))
        self.begin = self.engine.cursor()
        self.following = self.run(self._follow(Follower(cursor=self.begin)))

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        return self.runner.run(coroutine)

    async def _follow(self, follower: Follower) -> Following:
        return Following(self.engine, follower)

    def teardown(self) -> None:
        self.run(self.following.close())
        self.run(self.engine.close())
        self.runner.close()
        self.directory.cleanup()

    @rule(group=st.lists(mutations(), min_size=1, max_size=6))
    def submit(self, group: list[Mutation]) -> None:
        """Some of them are refused: that is told nobody."""
        self.run(submit(self.engine, *group))

    @rule(key=st.sampled_from(KEYS), size=st.sampled_from([2, 900, 3000]))
    def much_metadata(self, key: str, size: int) -> None:
        self.run(submit(self.engine, Update(key, metadata=b'{"m": "%s"}' % (b"m" * size)), Append(key, [A])))

    @rule(steps=st.integers(0, 2))
    def resume(self, steps: int) -> None:
        """The watch ends, perhaps in the middle, and goes on from the cursor."""
        for _ in range(steps):
            self.run(self.following.step())
        follower = self.run(self.following.close())
        self.following = self.run(self._follow(follower))

    @precondition(lambda self: self.kind in DURABLE_KINDS)
    @rule()
    def restart(self) -> None:
        follower = self.run(self.following.close())
        self.run(self.engine.close())
        self.engine = self.run(open_kind(self.kind, Path(self.directory.name)))
        self.following = self.run(self._follow(follower))

    @rule()
    def newcomer(self) -> None:
        """Who comes late, and begins at the beginning, gets to the same."""
        late = self.run(self._follow(Follower(cursor=self.begin)))
        self.run(agrees(self.engine, self.run(late.catch_up())))
        self.run(late.close())

    @rule()
    def caught_up(self) -> None:
        self.run(agrees(self.engine, self.run(self.following.catch_up())))

    @invariant()
    def nothing_is_held_back(self) -> None:
        assert self.engine.feed.watcher_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_following_gives_what_is_stored(kind: str) -> None:
    examples = 60 if kind == "memory" else 25
    run_state_machine_as_test(
        type(f"{kind}_machine", (WatchMachine,), {"kind": kind}),
        settings=settings(max_examples=examples, stateful_step_count=25, deadline=None),
    )

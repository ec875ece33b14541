"""Random histories on every engine against the naive model: groups, copies, and closing and opening again.

Whatever the engine does behind its answers (checkpoints, rewrites, caches), the model says what must be
read.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import pytest
from engines import DURABLE_KINDS, KINDS, NO_LIMIT, open_kind, read, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import CURRENT, KEYS, STALE, Model, mutations
from sessionstored.engine import Order, Query, Refused, Request
from sessionstored.rules import Answer, Mutation, tail_start

T = TypeVar("T")


def now_us() -> int:
    return time.time_ns() // 1000


class EngineMachine(RuleBasedStateMachine):
    """One engine, one model, and every answered call, so that it can be sent again."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.engine = self.run(open_kind(self.kind, Path(self.directory.name)))
        self.model = Model()
        self.calls: list[tuple[Request, object]] = []
        self.sequence = 0
        self.held: list[tuple[str, int, list[bytes]]] = []

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.run(self.engine.close())
        self.runner.close()
        self.directory.cleanup()

    @rule(group=st.lists(mutations(), min_size=1, max_size=5), called=st.booleans())
    def submit(self, group: list[Mutation], called: bool) -> None:
        """A group, each member of which the model decides after the one before it."""
        # Revisions within a group are not known beforehand: only its first member may name one.
        resolved = [self.model.resolve(group[0])]
        resolved += [mutation for mutation in group[1:] if mutation.expected_revision not in (CURRENT, STALE)]
        asked = []
        for mutation in resolved:
            self.sequence += 1
            asked.append(request(mutation, self.sequence if called else 0))
        before = now_us()
        replies = self.run(self.engine.submit(asked))
        after = now_us()
        for each, reply in zip(asked, replies, strict=True):
            assert not reply.replayed
            self.model.check(each.mutation, reply.outcome, before, after)
            if called:
                self.calls.append((each, reply.outcome))

    @precondition(lambda self: self.calls)
    @rule(picks=st.lists(st.integers(0, 200), min_size=1, max_size=3))
    def send_again(self, picks: list[int]) -> None:
        """Copies get their first answers and change nothing."""
        chosen = [self.calls[pick % len(self.calls)] for pick in picks]
        replies = self.run(self.engine.submit([each for each, _ in chosen]))
        for (_, first), reply in zip(chosen, replies, strict=True):
            assert reply.outcome == first
            assert reply.replayed == isinstance(first, Answer)

    @precondition(lambda self: self.kind in DURABLE_KINDS)
    @rule()
    def reopen(self) -> None:
        """After a clean stop everything is there again."""
        self.run(self.engine.close())
        self.engine = self.run(open_kind(self.kind, Path(self.directory.name)))

    @rule(key=st.sampled_from(KEYS), start=st.integers(0, 5), length=st.integers(0, 3))
    def read_range(self, key: str, start: int, length: int) -> None:
        session = self.model.sessions.get(key)
        if session is None:
            with pytest.raises(Refused) as caught:
                self.run(read(self.engine, key))
            assert caught.value.refusal.reason == "SESSION_NOT_FOUND"
            return
        start = min(start, len(session.messages))
        stop = min(start + length, len(session.messages))
        found = self.run(self.engine.read(key, lambda _: (start, stop), NO_LIMIT))
        assert list(found.lines) == session.messages[start:stop]
        whole = self.run(read(self.engine, key))
        self.held.append((key, whole.head.revision, list(whole.lines)))

    @rule(order=st.sampled_from(Order), prefix=st.sampled_from(["", "a", "к"]))
    def list_all(self, order: Order, prefix: str) -> None:
        page = self.run(self.engine.list(Query(prefix, order, page_size=100)))
        expected = [key for key in self.model.sessions if key.startswith(prefix)]
        by_time = order in (Order.UPDATE_TIME, Order.UPDATE_TIME_DESC)
        expected.sort(
            key=lambda key: (self.model.sessions[key].update_time_us if by_time else 0, key.encode()),
            reverse=order in (Order.KEY_DESC, Order.UPDATE_TIME_DESC),
        )
        assert [head.key for head in page.heads] == expected
        assert not page.more
        assert list(page.heads) == [self.run(read(self.engine, key)).head for key in expected]

    @invariant()
    def the_engine_holds_what_the_model_holds(self) -> None:
        assert self.run(self.engine.count()) == len(self.model.sessions)
        for key, session in self.model.sessions.items():
            found = self.run(read(self.engine, key))
            assert list(found.lines) == session.messages
            head = found.head
            assert (head.key, head.revision, head.message_count, head.last_consolidated, head.metadata) == (
                key,
                session.revision,
                len(session.messages),
                session.last_consolidated,
                session.metadata,
            )
            assert head.update_time_us == session.update_time_us
            assert head.create_time_us == session.create_time_us
            assert head.damage == ""
            for held_key, revision, held in self.held:
                if held_key == key:
                    start = tail_start(head, revision, len(held))
                    assert held[:start] + session.messages[start:] == session.messages


def machine(kind: str) -> Callable[[], EngineMachine]:
    return type(f"{kind}_machine", (EngineMachine,), {"kind": kind})


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_agrees_with_the_model(kind: str) -> None:
    examples = 40 if kind == "memory" else 20
    run_state_machine_as_test(
        machine(kind), settings=settings(max_examples=examples, stateful_step_count=25, deadline=None)
    )

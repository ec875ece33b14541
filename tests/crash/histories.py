"""Random histories of one key, held against the naive model, and what a reader may have seen of them.

Everything random comes from a `random.Random` whose seed the test prints.
"""

import random
import time
from dataclasses import dataclass, field

from engines import NO_LIMIT, request
from model import Model
from sessionstored.engine import Engine, Refused, Request
from sessionstored.rules import Answer, Append, Create, Delete, Fork, Mutation, Pop, Replace, Update


@dataclass(frozen=True)
class Seen:
    """A session at one revision; None in the place of one means that it does not exist."""

    revision: int
    message_count: int
    last_consolidated: int
    metadata: bytes


State = tuple[Seen, tuple[bytes, ...]] | None


def random_message(rng: random.Random, size: int = 60) -> bytes:
    """A message line; now and then a large one."""
    length = rng.randrange(size) if rng.random() < 0.95 else rng.randrange(60 * size)
    return b'{"role": "user", "content": "%d %s"}' % (rng.randrange(1 << 30), b"x" * length)


def random_mutation(rng: random.Random, model: Model, key: str, others: tuple[str, ...] = ()) -> Mutation:
    """A mutation of a key, most of them in range. Forks are made from and to the others."""
    session = model.sessions.get(key)
    count = len(session.messages) if session else 0
    batch = [random_message(rng) for _ in range(rng.randrange(1, 5))]
    metadata = b'{"n": %d, "pad": "%s"}' % (rng.randrange(100), b"p" * rng.randrange(40))
    kind = rng.choices(
        ("append", "pop", "replace", "tail", "update", "fork", "delete", "create"),
        (40, 12, 10, 8, 8, 6 if others else 0, 5, 5),
    )[0]
    match kind:
        case "pop":
            return Pop(key)
        case "replace":
            start = rng.randint(0, count)
            return Replace(key, start, rng.randint(0, count - start), batch[: rng.randrange(4)])
        case "tail":
            return Replace(key, max(0, count - rng.randrange(4)), None, batch[: rng.randrange(3)])
        case "update" if rng.random() < 0.5:
            return Update(key, last_consolidated=rng.randint(0, count))
        case "update":
            return Update(key, metadata, {"member": b"%d" % rng.randrange(9)})
        case "fork":
            other = rng.choice(others)
            return Fork(key, other, None) if rng.random() < 0.5 else Fork(key, other, rng.randint(0, 5))
        case "delete":
            return Delete(key)
        case "create":
            return Create(key, batch, metadata, rng.randint(0, len(batch)))
    return Append(key, batch)


def state_of(model: Model, key: str) -> State:
    """What the model says of a key."""
    session = model.sessions.get(key)
    if session is None:
        return None
    seen = Seen(session.revision, len(session.messages), session.last_consolidated, session.metadata)
    return seen, tuple(session.messages)


async def observe(engine: Engine, key: str, start: int = 0, stop: int | None = None) -> State:
    """What the engine says of a key, with some of its messages."""
    try:
        found = await engine.read(
            key,
            lambda head: (min(start, head.message_count), _stop(head.message_count, start, stop)),
            NO_LIMIT,
        )
    except Refused as refused:
        if refused.refusal.reason != "SESSION_NOT_FOUND":
            raise
        return None
    head = found.head
    return Seen(head.revision, head.message_count, head.last_consolidated, head.metadata), tuple(found.lines)


def _stop(count: int, start: int, stop: int | None) -> int:
    return count if stop is None else max(min(start, count), min(stop, count))


@dataclass
class Observation:
    key: str
    known_before: int
    known_after: int
    start: int
    stop: int | None
    seen: State


@dataclass
class Histories:
    """What every key was, state by state, and what readers saw meanwhile."""

    states: dict[str, list[State]] = field(default_factory=dict)
    observations: list[Observation] = field(default_factory=list)

    def of(self, key: str) -> list[State]:
        return self.states.setdefault(key, [None])

    async def read(self, engine: Engine, key: str, rng: random.Random) -> None:
        """Read a key, all of it or a range, and note what was seen."""
        start, stop = (0, None) if rng.random() < 0.5 else (rng.randrange(20), rng.randrange(30))
        known = len(self.of(key))
        seen = await observe(engine, key, start, stop)
        self.observations.append(Observation(key, known, len(self.of(key)), start, stop, seen))

    def check(self) -> None:
        """Every observation is a state that the key had during the read. Call it after all writers ended."""
        for one in self.observations:
            possible = self.of(one.key)[one.known_before - 1 : one.known_after + 1]
            cut = [_cut(state, one.start, one.stop) for state in possible]
            assert one.seen in cut, f"{one} is none of {len(cut)} states: {cut}"


def _cut(state: State, start: int, stop: int | None) -> State:
    if state is None:
        return None
    seen, lines = state
    return seen, lines[min(start, len(lines)) : _stop(len(lines), start, stop)]


class Writer:
    """One writer of a few keys that nobody else writes: it makes random changes and checks each answer."""

    def __init__(
        self, engine: Engine, keys: tuple[str, ...], histories: Histories, seed: int, client: str
    ) -> None:
        self.engine = engine
        self.keys = keys
        self.histories = histories
        self.model = Model()
        self.client = client
        self.rng = random.Random(seed)
        self.sequence = 0
        self.last: tuple[Request, Answer] | None = None

    def next(self, key: str) -> Request:
        """The next change, with a call identity."""
        mutation = random_mutation(self.rng, self.model, key, tuple(k for k in self.keys if k != key))
        self.sequence += 1
        return request(
            mutation, self.sequence, client=self.client, answered_through=max(0, self.sequence - 3)
        )

    async def step(self) -> None:
        """Make one change; now and then send the one before again."""
        key = self.rng.choice(self.keys)
        if self.last is not None and self.rng.random() < 0.05:
            (again,) = await self.engine.submit([self.last[0]])
            assert again.outcome == self.last[1], (again, self.last)
        asked = self.next(key)
        before = time.time_ns() // 1000
        (reply,) = await self.engine.submit([asked])
        self.learn(asked, reply.outcome, before)

    def learn(self, asked: Request, outcome: object, before: int) -> None:
        """Check an answer, and note the state after it."""
        self.model.check(asked.mutation, outcome, before, time.time_ns() // 1000)  # type: ignore[arg-type]
        key = asked.mutation.key
        self.histories.of(key).append(state_of(self.model, key))
        self.last = (asked, outcome) if isinstance(outcome, Answer) else None

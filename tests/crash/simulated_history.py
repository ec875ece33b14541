"""Random histories of an honest store, and of stores with one fault: what the checker is tested with.

A pretended store and pretended processes on a pretended clock. Each call begins, takes effect at some moment,
and is answered later; some answers never arrive, and then the call is sent again, or left alone, whether it
takes effect or not. It shares the records with the checker, and nothing of its logic.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from crash.operations import ACKNOWLEDGED, REFUSED, UNKNOWN, Operation, State

KEYS = ("a", "b", "c")
FORKS = ("fork of a", "fork of b")
CRASH = "lost: a crash takes the last changes, and their revisions are given again"
COPY = "duplicate: applied again by its copy"
EXCHANGED = "reordering: a revision before that of an earlier call"
OWN = "stale read: an older state with its own revision"
NEWEST = "stale read: an older state under the newest revision"
PAST = "wrong: a replacement of what was rewritten since"
# What is injected, and as what it may be seen: a read right after a loss may look stale.
FAULTS = {
    "lost: acknowledged and never applied": ("lost", "stale read"),
    "lost: acknowledged, and only its revision stays": ("lost", "stale read"),
    CRASH: ("lost", "stale read"),
    OWN: ("stale read",),
    NEWEST: ("stale read",),
    "duplicate: applied twice": ("duplicate",),
    COPY: ("duplicate",),
    "torn: the end of a batch is missing": ("torn",),
    "torn: another message inside a batch": ("torn",),
    "reordering: two batches changed places": ("reordering",),
    EXCHANGED: ("reordering",),
    "invented: a message that nobody wrote": ("invented",),
    "wrong: a removed message is back": ("wrong", "torn"),
    PAST: ("wrong",),
}


@dataclass
class Session:
    revision: int
    messages: list[str] = field(default_factory=list)
    last_consolidated: int = 0
    metadata: str = ""
    rewritten: int = 0
    """The revision of the last change that was not only an addition at the end."""

    def copy(self) -> "Session":
        return replace(self, messages=list(self.messages))


class Refuse(Exception):
    pass


class PretendedStore:
    """Sessions in a dict. `fault` is injected once, as soon as something fits; `hit` is the key then."""

    def __init__(self, rng: random.Random, fault: str) -> None:
        self.rng, self.fault, self.hit = rng, fault, ""
        self.sessions: dict[str, Session] = {}
        self.older: defaultdict[str, list[Session]] = defaultdict(list)
        self.revision = 0
        self.told: dict[str, tuple[int, int]] = {}
        """Key -> the highest revision that somebody was told of, and when."""
        self.told_messages: set[str] = set()
        self._answers: dict[tuple[str, int], Operation] = {}
        self._before: dict[tuple[str, int], dict[str, Session]] = {}

    def do(self, call: Operation) -> Operation:
        """Answer a call; a copy of an earlier one gets the first answer."""
        first = self._answers.get((call.process, call.sequence))
        if first is not None and call.kind != "read":
            if self.fault == COPY and first.kind == "append" and first.changed and not self.hit:
                session = self.sessions.get(first.key, Session(0))
                if first.expected_revision is None and set(first.messages) <= set(session.messages):
                    self.hit = call.key
                    self._change(call)
            return first
        try:
            answer = self._read(call) if call.kind == "read" else self._changed(call)
        except Refuse:
            answer = replace(call, outcome=REFUSED)
        self._answers[call.process, call.sequence] = answer
        return answer

    def crash_before(self, call: Operation) -> None:
        """Go back to where a call found the store."""
        self.sessions = self._before[call.process, call.sequence]
        self.revision = max((session.revision for session in self.sessions.values()), default=0)
        self.hit = call.key

    def _read(self, call: Operation) -> Operation:
        session = self.sessions.get(call.key)
        if session and self.fault in (OWN, NEWEST) and not self.hit:
            old = next((old for old in self.older[call.key] if old.messages != session.messages), None)
            revision, at = self.told.get(call.key, (0, 0))
            if old and revision == session.revision and at < call.begin_ns:
                self.hit = call.key
                session = old if self.fault == OWN else replace(old, revision=session.revision)
        return replace(call, revision=session.revision, seen=_state(session)) if session else call

    def _changed(self, call: Operation) -> Operation:
        """Make a change, perhaps with the fault."""
        before = self.sessions.get(call.key)
        self._before[call.process, call.sequence] = dict(self.sessions)
        answer = self._change(call)
        if self.fault and not self.hit and call.kind == "append" and len(call.messages) > 1 and before:
            self._spoil(call, before)
        if call.key in self.sessions:
            self.older[call.key].append(self.sessions[call.key].copy())
        return answer

    def _change(self, call: Operation) -> Operation:
        session = self.sessions.get(call.key)
        subject = self.sessions.get(call.source_key) if call.kind == "fork" else session
        if call.expected_revision not in (None, subject.revision if subject else 0):
            if not (call.allow_appends and subject and call.expected_revision < subject.revision):
                raise Refuse
            if subject.rewritten > call.expected_revision:
                in_range = call.start + (call.delete_count or 0) <= len(subject.messages)
                if self.fault != PAST or self.hit or not in_range:
                    raise Refuse
                self.hit = call.key
        before = session
        previous, count, popped = session.revision if session else 0, len(call.messages), None
        first = None
        if call.kind == "append":
            session = session.copy() if session else Session(0)
            first = len(session.messages)
            session.messages += call.messages
        elif call.kind == "create":
            if session:
                raise Refuse
            session = Session(0, list(call.messages), 0, call.metadata or "")
        elif call.kind == "fork":
            if session or subject is None or (call.at or 0) > len(subject.messages):
                raise Refuse
            session = subject.copy()
            if call.at is not None:
                del session.messages[call.at :]
            session.last_consolidated = min(session.last_consolidated, len(session.messages))
        elif session is None:
            raise Refuse
        elif call.kind == "delete":
            self.revision += 1
            del self.sessions[call.key]
            return replace(call, revision=self.revision, previous_revision=previous)
        else:
            session, popped = self._rewrite(call, session.copy())
            if session == self.sessions[call.key]:
                same = replace(call, revision=previous, previous_revision=previous)
                return replace(same, message_count=len(session.messages))
        self.revision += self.rng.randint(1, 3)
        session.revision = self.revision
        added = call.kind == "replace" and before is not None and call.start == len(before.messages)
        if before is None or not (added or call.kind in ("append", "update")):
            session.rewritten = self.revision
        self.sessions[call.key] = session
        assert first is None or len(session.messages) == first + count
        return replace(
            call,
            revision=session.revision,
            previous_revision=previous,
            message_count=len(session.messages),
            first_index=first,
            popped=popped,
        )

    def _rewrite(self, call: Operation, session: Session) -> tuple[Session, str | None]:
        popped = None
        if call.kind == "pop":
            if not session.messages:
                raise Refuse
            popped = session.messages.pop()
        elif call.kind == "replace":
            count = len(session.messages) - call.start if call.delete_count is None else call.delete_count
            if call.start > len(session.messages) or call.start + count > len(session.messages):
                raise Refuse
            session.messages[call.start : call.start + count] = call.messages
        else:
            if (call.last_consolidated or 0) > len(session.messages):
                raise Refuse
            if call.last_consolidated is not None:
                session.last_consolidated = call.last_consolidated
            session.metadata = call.metadata or session.metadata
        session.last_consolidated = min(session.last_consolidated, len(session.messages))
        return session, popped

    def _spoil(self, call: Operation, before: Session) -> None:
        """Inject the fault beside an append of at least two messages."""
        session = self.sessions[call.key]
        messages, count = session.messages, len(call.messages)
        last = before.messages[-1:]
        while last and _batch(before.messages[-1 - len(last) : -len(last)][:1]) == _batch(last):
            last = before.messages[-1 - len(last) :]
        self.hit = call.key
        match self.fault:
            case "lost: acknowledged and never applied":
                self.sessions[call.key] = before
            case "lost: acknowledged, and only its revision stays":
                self.sessions[call.key] = replace(before, revision=session.revision)
            case "duplicate: applied twice":
                messages += call.messages
            case "torn: the end of a batch is missing":
                messages.pop()
            case "torn: another message inside a batch" if last:
                messages.insert(-1, messages.pop(-1 - count))
            case "reordering: two batches changed places" if last:
                session.messages = [*before.messages[: -len(last)], *call.messages, *last]
            case "invented: a message that nobody wrote":
                messages.append("nobody.1.1")
            case "wrong: a removed message is back":
                there = {_batch([one]) for one in messages}
                older = {message for old in self.older[call.key] for message in old.messages}
                removed = {one for one in older & self.told_messages if _batch([one]) not in there}
                messages += sorted(removed)[:1]
                self.hit = call.key if removed else ""
            case _:
                self.hit = ""


def _batch(messages: list[str]) -> str:
    """Of which batch the first of these messages is."""
    return messages[0].rpartition(".")[0] if messages else ""


@dataclass
class History:
    operations: list[Operation]
    final: dict[str, tuple[int, State] | None]
    hit: str
    """The key in whose history the fault is; empty if there was no chance for it."""


class World:
    """The clock, the store, and what was recorded."""

    def __init__(self, seed: int, fault: str) -> None:
        self.rng = random.Random(seed)
        self.store = PretendedStore(self.rng, fault)
        self.now = 0
        self.operations: list[Operation] = []
        self.watched = False
        self._waiting: list[tuple[int, int, Iterator[int]]] = []
        self._begun = 0

    def begin(self, process: Iterator[int]) -> None:
        """Start something that yields how long it waits until it goes on."""
        self._begun += 1
        heapq.heappush(self._waiting, (self.now + next(process), self._begun, process))

    def watch(self) -> None:
        """Read where the fault is as soon as it is there: later nobody may be able to see it."""
        if self.store.hit and not self.watched:
            self.watched = True
            self.now += 1
            read = Operation(
                process="watcher", kind="read", key=self.store.hit, begin_ns=self.now, end_ns=self.now
            )  # fmt: skip
            self.operations.append(self.store.do(read))

    def run(self) -> None:
        while self._waiting:
            at, number, process = heapq.heappop(self._waiting)
            self.now = max(self.now, at)
            delay = next(process, None)
            if delay is not None:
                heapq.heappush(self._waiting, (self.now + delay, number, process))


def _live(world: World, name: str, retries: bool, calls: int) -> Iterator[int]:
    """One process. An answer may get lost, before or after its call took effect."""
    rng, store = world.rng, world.store
    known: dict[str, tuple[int, int]] = {}
    for sequence in range(1, calls + 1):
        yield rng.randrange(30)
        call = _next_call(world, name, sequence, known)
        while True:
            yield rng.randrange(1, 20)
            was_hit = bool(store.hit)
            fate = rng.choices(("answered", "lost before", "lost after"), (90, 4, 6))[0]
            answer = store.do(call) if fate != "lost before" else call
            if store.hit and not was_hit:
                fate = "answered"  # at once, so that nothing else can hide the fault
                break
            yield rng.randrange(1, 20)
            if fate == "answered" or (not retries and rng.random() < 0.8):
                break
        if fate == "answered":
            world.operations.append(replace(answer, end_ns=world.now))
            if store.fault == CRASH and not store.hit and sequence > 20 and answer.changed and call.messages:
                store.crash_before(call)
            if answer.changed:
                store.told[call.key] = max((answer.revision, world.now), store.told.get(call.key, (0, 0)))
                store.told_messages.update(call.messages)
            world.watch()
            if answer.outcome == ACKNOWLEDGED and (answer.seen or answer.message_count):
                count = len(answer.seen.messages) if answer.seen else answer.message_count
                known[call.key] = (answer.revision, count)
        elif call.kind != "read":
            late = rng.randrange(200)
            world.operations.append(replace(call, outcome=UNKNOWN, end_ns=world.now + late))
            if fate == "lost before" and rng.random() < 0.5:
                world.begin(_land_late(store, call, late))


def _land_late(store: PretendedStore, call: Operation, late: int) -> Iterator[int]:
    yield late
    fault, store.fault = store.fault, ""  # nobody would be told
    store.do(call)
    store.fault = fault


def _next_call(world: World, name: str, sequence: int, known: dict[str, tuple[int, int]]) -> Operation:
    """What a process asks for next."""
    rng = world.rng
    kinds = ("append", "read", "replace", "pop", "update", "delete", "create", "fork")
    kind = rng.choices(kinds, (40, 20, 8, 8, 6, 4, 4, 6))[0]
    key = rng.choice(FORKS if kind == "fork" else (*KEYS, *KEYS, *FORKS))
    revision, count = known.get(key, (0, 0))
    batch = tuple(f"{name}.{sequence}.{n}" for n in range(rng.randint(1, 4)))
    call = Operation(process=name, kind=kind, key=key, sequence=sequence, begin_ns=world.now, end_ns=0)
    if rng.random() < 0.2 and kind not in ("read", "fork", "create"):
        call = replace(call, expected_revision=revision)
    if kind in ("append", "create"):
        return replace(call, messages=batch)
    if kind == "replace":
        start = rng.randint(0, count)
        deleted = rng.choice((None, 0, rng.randint(0, count - start)))
        call = replace(call, start=start, delete_count=deleted, messages=batch[: rng.randrange(3)])
        if deleted is not None and call.messages and rng.random() < 0.5:
            return replace(call, expected_revision=revision, allow_appends=True)
        return call
    if kind == "update" and rng.random() < 0.5:
        return replace(call, metadata=f"{name}.{sequence}")
    if kind == "update":
        return replace(call, last_consolidated=rng.randint(0, count))
    if kind == "fork":
        return replace(call, source_key=key.removeprefix("fork of "), at=rng.choice((None, 0, 2)))
    return call


def random_history(seed: int, fault: str = "", processes: int = 4, calls: int = 100) -> History:
    """A history.

    Args:
        seed: of every choice.
        fault: one of FAULTS, injected once; empty for an honest store.
        processes: how many take part; every other one leaves unknown what stays without an answer.
        calls: how many calls each makes.

    """
    world = World(seed, fault)
    for n in range(processes):
        world.begin(_live(world, f"p{n}", n % 2 == 0, calls))
    world.run()
    hit = world.store.hit
    if fault == EXCHANGED:
        hit = _exchange_times(world)
    final: dict[str, tuple[int, State] | None] = {}
    for key in (*KEYS, *FORKS):
        session = world.store.sessions.get(key)
        final[key] = session and (session.revision, _state(session))
    return History(world.operations, final, hit)


def _state(session: Session) -> State:
    return State(tuple(session.messages), session.last_consolidated, session.metadata)


def _exchange_times(world: World) -> str:
    """Let two changes of one session, one after the other, seem to have come the other way round."""
    changes = [each for each in world.operations if each.changed]
    for first in changes:
        for then in changes:
            if then.key == first.key and then.revision > first.revision and then.begin_ns > first.end_ns:
                place, other = world.operations.index(first), world.operations.index(then)
                world.operations[place] = replace(first, begin_ns=then.begin_ns, end_ns=then.end_ns)
                world.operations[other] = replace(then, begin_ns=first.begin_ns, end_ns=first.end_ns)
                return first.key
    return ""

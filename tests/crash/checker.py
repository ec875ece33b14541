"""The checker: whether what several processes were answered can be what one honest store did.

Every acknowledgement names the revision that its call made and the one before it, so there is nothing to
search but the few places where calls of unknown outcome may stand. Per key: acknowledged changes form one
chain of revisions, which agrees with real time; each answer fits the state that the chain makes; every read
shows the state of its revision, and no older one than what was answered before it began; a call of unknown
outcome happened once, within its time, or never; and the last state is the chain's. Batches are whole, in one
piece and there once because states are compared message by message.

`check` returns what is wrong, and nothing if nothing is. Pure: no I/O, no clock. Knows no store and no wire.
A fork may copy only from a key whose own history does not depend on the fork's. What leases allow is for
`lease_checker`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter

from crash.diagnosis import Found, Written, diagnose, fits
from crash.operations import (
    ACKNOWLEDGED,
    FOREVER,
    LEASES,
    READ,
    UNKNOWN,
    Inapplicable,
    Operation,
    State,
    applied,
)

FINAL = "the end"
"""The process that every last state is read by."""
_WORLDS_MAX = 40_000


class Undecidable(Exception):
    """So many calls of unknown outcome overlap that this checker does not try every order of them."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that no honest store does. `kind` is one of diagnosis.KINDS; `count` is of messages."""

    kind: str
    key: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind}: {self.key}: {self.detail}"


@dataclass(frozen=True, slots=True)
class _World:
    """What a session may be: its state, its revision (None: an unknown call's), the unknown calls used."""

    state: State | None
    revision: int | None
    used: frozenset[tuple[str, int]] = frozenset()
    rewritten: int = 0
    """The revision of the last change that was not only an addition at the end; FOREVER: not known yet."""

    def holds(self, revision: int) -> bool:
        """Whether the session still begins with the messages of that revision."""
        return self.state is not None and self.rewritten <= revision


@dataclass(frozen=True, slots=True)
class _Span:
    """What a session may have been between two events: possible states, from and until when."""

    revision: int | None
    states: frozenset[State | None]
    from_ns: int
    until_ns: int

    def overlaps(self, call: Operation) -> bool:
        return self.from_ns <= call.end_ns and call.begin_ns <= self.until_ns


def check(operations: Iterable[Operation], final: Mapping[str, tuple[int, State] | None]) -> list[Violation]:
    """Judge a history.

    Args:
        operations: every call of every process. Copies of one call may be one record, or one each.
        final: key -> its revision and state after the last call, or None if there is no such session; of
            every key that a call names.

    Raises:
        Undecidable: the history has too much that is unknown at once.

    """
    violations: list[Violation] = []
    calls = merged((each for each in operations if each.kind not in LEASES), violations)
    by_key: defaultdict[str, list[Operation]] = defaultdict(list)
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for call in calls:
        by_key[call.key].append(call)
        if call.kind == "fork":
            sources[call.key].add(call.source_key)
    written = Written(calls)
    spans: dict[str, Sequence[_Span]] = {}
    for key in TopologicalSorter({key: sources[key] for key in {*by_key, *final}}).static_order():
        chain = _Chain(key, by_key[key], spans, written)
        chain.run(final[key])
        violations += chain.violations
        spans[key] = chain.spans
    return violations


def merged(operations: Iterable[Operation], violations: list[Violation]) -> list[Operation]:
    """One record per call. Its copies must agree on the answer."""
    calls: dict[object, Operation] = {}
    for n, each in enumerate(operations):
        identity = (each.process, each.sequence) if each.sequence else n
        first = calls.get(identity)
        if first is None:
            calls[identity] = each
            continue
        begin = min(first.begin_ns, each.begin_ns)
        known = [one for one in (first, each) if one.outcome != UNKNOWN]
        if not known:
            calls[identity] = replace(first, begin_ns=begin, end_ns=max(first.end_ns, each.end_ns))
            continue
        answers = {(one.outcome, one.revision, one.token) for one in known}
        if len(answers) > 1:
            detail = f"{each.process} {each.sequence} was answered in two ways: {known}"
            violations.append(Violation("duplicate", each.key, detail, max(1, len(each.messages))))
        calls[identity] = replace(known[0], begin_ns=begin, end_ns=min(one.end_ns for one in known))
    return list(calls.values())


class _Chain:
    """The history of one key."""

    def __init__(
        self, key: str, calls: Sequence[Operation], sources: Mapping[str, Sequence[_Span]], written: Written
    ) -> None:
        self._key, self._sources, self._written = key, sources, written
        self._unknown = [call for call in calls if call.outcome == UNKNOWN and call.kind != READ]
        answered = [call for call in calls if call.outcome == ACKNOWLEDGED]
        self._absent = [call for call in answered if call.kind == READ and call.seen is None]
        self._events = sorted(
            (call for call in answered if call.kind != READ or call.seen is not None),
            key=lambda call: (call.revision, not call.changed, call.begin_ns),
        )
        self._worlds = {_World(None, 0)}
        self._revision = 0
        self._latest_begin_ns = -1
        self._pending: list[Found] = []
        """What did not fit, until a whole state shows what it was."""
        self.spans = [_Span(0, frozenset({None}), -1, FOREVER)]
        self._current = 0
        self.violations: list[Violation] = []

    def run(self, final: tuple[int, State] | None) -> None:
        self._check_order()
        for event in self._events:
            self._take(event)
        end = Operation(process=FINAL, kind=READ, key=self._key, begin_ns=FOREVER, end_ns=FOREVER)
        if final is None:
            self._end_absent(end)
        else:
            self._take(replace(end, revision=final[0], seen=final[1]))
        self._flush()
        for read in self._absent:
            if not any(None in span.states and span.overlaps(read) for span in self.spans):
                self._report(Found("lost", f"{read} found no session, and there was one all the time"))

    # Order.

    def _check_order(self) -> None:
        """The order of revisions is the order of real time."""
        late: dict[str, Operation] = {}  # of changes and of reads with a lower revision, the last to begin
        blamed: set[int] = set()
        waiting: list[Operation] = []
        change: Operation | None = None
        for event in self._events:
            if waiting and waiting[0].revision < event.revision:
                for one in waiting:
                    kind = "reordering" if one.changed else "stale read"
                    late[kind] = max(late.get(kind, one), one, key=lambda call: call.begin_ns)
                waiting = []
            waiting.append(event)
            change = event if event.changed else change
            for kind, one in late.items():
                if event.end_ns < one.begin_ns and id(one) not in blamed:
                    blamed.add(id(one))
                    self._report(Found(kind, f"{one} began after {event} was answered, and is before it"))
            if change and change.revision == event.revision and event.end_ns < change.begin_ns:
                self._report(Found("wrong", f"{event} was answered before {change} was asked for"))

    # The chain.

    def _take(self, event: Operation) -> None:
        """Go on with the next event in the order of revisions."""
        fitting, between = self._fitting(event, self._worlds), set[_World]()
        if not fitting or any(world.state is None for world in self._worlds):
            between = set(self._expanded(event))
            fitting = fitting or self._fitting(event, between)
            self._span(between, event.end_ns)
        if fitting and event.seen is not None:
            self._flush()
        worlds = fitting or self._misfit(event, between)
        if event.changed:
            self._latest_begin_ns = max(self._latest_begin_ns, event.begin_ns)
        if event.changed or worlds != self._worlds:
            current = self.spans[self._current]
            self.spans[self._current] = replace(current, until_ns=min(current.until_ns, event.end_ns))
            self._current = len(self.spans)
            self._span(worlds, FOREVER, event.revision)
        self._worlds = worlds
        self._revision = max(self._revision, event.revision)

    def _fitting(self, event: Operation, worlds: Iterable[_World]) -> set[_World]:
        """The worlds after an event that can have been as it says."""
        found = set()
        for world in worlds:
            state = world.state
            if not event.changed:
                seen = state is not None and world.revision in (None, event.revision)
                if seen and event.revision >= self._revision and self._looks_right(event, state):
                    rewritten = min(world.rewritten, event.revision)
                    found.add(_World(state, event.revision, world.used, rewritten))
                continue
            if event.revision <= self._revision or not _comes_upon(event, world, self._revision):
                continue
            for after in self._outcomes(event, state):
                if _answer_fits(event, state, after):
                    rewritten = min(world.rewritten, event.previous_revision)
                    if not _only_adds(event, state):
                        rewritten = event.revision
                    found.add(_World(after, event.revision, world.used, rewritten))
        return found

    def _looks_right(self, event: Operation, state: State | None) -> bool:
        """Whether a read, or a call that changed nothing, can have found this state."""
        assert state is not None
        if event.seen is not None:
            return fits(event.seen, state)
        return event.message_count == len(state.messages)

    def _outcomes(self, call: Operation, state: State | None) -> list[State | None]:
        """What a call can make of a state: one thing, or of a fork one per state of its source."""
        sources: set[State | None] = {None}
        if call.kind == "fork":
            expected = call.expected_revision
            sources = {
                source
                for span in self._sources[call.source_key]
                if span.overlaps(call) and (expected is None or span.revision in (None, expected))
                for source in span.states
            }
        found = []
        for source in sources:
            try:
                found.append(applied(call, state, source))
            except Inapplicable:
                continue
        return found

    def _expanded(self, event: Operation) -> Iterator[_World]:
        """The worlds that calls of unknown outcome can have made before an event."""
        candidates = [
            call
            for call in self._unknown
            if call.begin_ns <= event.end_ns and call.end_ns >= self._latest_begin_ns
        ]
        seen, edge = set(self._worlds), list(self._worlds)
        while edge:
            world = edge.pop()
            for call in candidates:
                if (call.process, call.sequence) in world.used or not _may_come_upon(call, world):
                    continue
                for state in self._outcomes(call, world.state):
                    rewritten = world.rewritten if _only_adds(call, world.state) else FOREVER
                    used = world.used | {(call.process, call.sequence)}
                    after = _World(state, None, used, rewritten)
                    if state != world.state and after not in seen:
                        seen.add(after)
                        edge.append(after)
                        yield after
            if len(seen) > _WORLDS_MAX:
                raise Undecidable(f"{self._key}: {len(candidates)} calls of unknown outcome before {event}")

    def _end_absent(self, end: Operation) -> None:
        """In the end there is no session."""
        if any(world.state is None for world in self._worlds):
            return
        between = set(self._expanded(end))
        self._span(between, FOREVER)
        if not any(world.state is None for world in between):
            count = max(len(world.state.messages) for world in self._worlds if world.state is not None)
            self._report(Found("lost", "there is no session in the end", max(1, count)))
            self._pending.clear()

    # What did not fit.

    def _misfit(self, event: Operation, between: set[_World]) -> set[_World]:
        """Note that nothing explains an event, and go on as if it were right."""
        before = [world.state for world in (*self._worlds, *between)]
        if event.seen is not None:
            past = [state for span in self.spans[: self._current] for state in span.states if state]
            is_last = event.process == FINAL
            found = diagnose(event.seen, before, () if is_last else past, self._written, event)
            if is_last and event.revision < self._revision and all(one.kind != "lost" for one in found):
                detail = f"revision {self._revision} was answered, {event.revision} is there in the end"
                found.append(Found("lost", detail))
            for one in found:
                self._report(one)
            self._pending = [one for one in self._pending if one.kind == "lost"]
            self._flush()
            if found[0].kind == "stale read":
                return self._worlds
            return {_World(event.seen, event.revision, world.used) for world in self._worlds}
        previous = event.previous_revision
        lost = event.changed and (event.revision <= self._revision or previous < self._revision)
        lost = lost and not (previous == 0 and None in before)
        kind = "lost" if lost else "wrong"
        detail = f"{event} does not come upon revision {self._revision} of {before[:3]}"
        self._pending.append(Found(kind, detail))
        if not event.changed:
            return self._worlds
        return {
            _World(state, event.revision, world.used)
            for world in self._worlds
            for state in self._outcomes(event, world.state) or [world.state or State(event.messages)]
        }

    def _flush(self) -> None:
        """What did not fit left no trace in the state: say it as it is."""
        for found in self._pending:
            self._report(found)
        self._pending.clear()

    def _report(self, found: Found) -> None:
        self.violations.append(Violation(found.kind, self._key, found.detail, found.count))

    def _span(self, worlds: Iterable[_World], until_ns: int, revision: int | None = None) -> None:
        """Remember what the session may have been: forks, and reads that found nothing, look there."""
        states = frozenset(world.state for world in worlds)
        if states:
            self.spans.append(_Span(revision, states, self._latest_begin_ns, until_ns))


def _comes_upon(event: Operation, world: _World, revision: int) -> bool:
    """Whether the revision that a change came upon can be a world's."""
    previous, expected = event.previous_revision, event.expected_revision
    if expected is not None and event.kind != "fork" and expected != previous:
        unseen = world.revision is None and expected > revision
        if not (event.allow_appends and expected < previous and (unseen or world.holds(expected))):
            return False
    if world.state is None:
        return previous == 0
    if world.revision is None:
        return revision < previous < event.revision
    return previous == world.revision


def _may_come_upon(call: Operation, world: _World) -> bool:
    """Whether a call of unknown outcome can have been applied to a world."""
    expected = call.expected_revision
    if expected is None or call.kind == "fork":
        return True
    if world.state is None:
        return expected == 0
    if call.allow_appends and world.holds(expected):
        return True
    return world.revision in (None, expected)


def _only_adds(call: Operation, state: State | None) -> bool:
    """Whether who holds earlier messages of the session still holds right ones after this call."""
    if state is None:
        return False
    if call.kind == "replace":
        return call.start == len(state.messages)
    return call.kind in ("append", "update")


def _answer_fits(event: Operation, before: State | None, after: State | None) -> bool:
    """Whether what a change was answered fits what it did."""
    count = len(after.messages) if after is not None else 0
    if event.message_count != count:
        return False
    if event.first_index is not None and event.first_index != count - len(event.messages):
        return False
    return event.popped is None or (before is not None and before.messages[-1:] == (event.popped,))

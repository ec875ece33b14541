"""What is wrong with a state that is not the one that it should be: lost, torn, doubled and so on.

Pure. Knows records and states; nothing of chains.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from crash.operations import DAMAGED, READ, REFUSED, UNKNOWN, Operation, State

KINDS = (
    "lost", "stale read", "duplicate", "torn", "reordering", "invented", "wrong",
    "two holders", "late write", "foreign write", "token", "unjustified",
)  # fmt: skip
"""The last five are of leases."""


@dataclass(frozen=True, slots=True)
class Found:
    """One finding; `count` is of messages."""

    kind: str
    detail: str
    count: int = 1


class Written:
    """Who wrote each message, and what was given to each key."""

    def __init__(self, calls: Iterable[Operation]) -> None:
        self.by: dict[str, Operation] = {}
        self._copied: dict[str, set[str]] = {}
        for call in calls:
            if call.kind == READ:
                continue
            if call.kind == "fork":
                self._copied.setdefault(call.key, set()).add(call.source_key)
            for message in call.messages:
                self.by[message] = call

    def can_have(self, key: str, message: str, end_ns: int) -> bool:
        """Whether somebody may have put a message under a key before a moment."""
        call = self.by.get(message)
        if call is None or call.outcome in (REFUSED, DAMAGED) or call.begin_ns > end_ns:
            return False
        return call.key == key or call.key in self._copied.get(key, ())


def fits(seen: State, state: State) -> bool:
    """Whether what was seen is this state, as far as it was shown."""
    return (
        seen.messages == state.messages
        and seen.last_consolidated in (None, state.last_consolidated)
        and seen.metadata in (None, state.metadata)
    )


def diagnose(
    seen: State, expected: Sequence[State | None], past: Sequence[State], written: Written, read: Operation
) -> list[Found]:
    """Say what is wrong with what was seen.

    Args:
        seen: the state that was shown.
        expected: the states of which it should be one, None for no session.
        past: the states that the session had before.
        written: who wrote what.
        read: the read.

    """
    states = [state for state in expected if state is not None] or [State()]
    want = min(states, key=lambda state: _distance(seen.messages, state.messages))
    where = f"{read.process} at revision {read.revision}"
    if seen.messages == want.messages:
        return [Found("wrong", f"{where}: the head is {seen}, not {want}")]
    if any(seen.messages == state.messages for state in past):
        text = f"{where} shows what was there before: {_short(seen)}, not {_short(want)}"
        return [Found("stale read", text)]
    got, wanted = Counter(seen.messages), Counter(want.messages)
    found: list[Found] = []
    invented = [message for message in got if not written.can_have(read.key, message, read.end_ns)]
    if invented:
        found.append(Found("invented", f"{where}: nobody wrote {invented}", len(invented)))
    doubled = [message for message, count in got.items() if count > 1]
    if doubled:
        found.append(Found("duplicate", f"{where}: there twice: {doubled}", len(doubled)))
    known = [message for message in got if message not in invented]
    for batch in _batches((got.keys() ^ wanted.keys()) - set(invented), written):
        found.append(_judge_batch(batch, set(known), wanted, where))
    if not found:
        found.append(_judge_order(seen.messages, want.messages, written, where))
    return found


def _batches(messages: Iterable[str], written: Written) -> list[Operation]:
    """The calls that wrote these messages, each once."""
    calls = {id(written.by[message]): written.by[message] for message in messages}
    return list(calls.values())


def _judge_batch(batch: Operation, got: set[str], wanted: Counter[str], where: str) -> Found:
    """What is wrong with a batch of which not the same is there as should be."""
    here = [message for message in batch.messages if message in got]
    due = [message for message in batch.messages if message in wanted]
    name = f"{where}: the batch {list(batch.messages)} of {batch.process}"
    if due and not here:
        return Found("lost", f"{name} is not there", len(due))
    if due or (batch.outcome == UNKNOWN and len(here) < len(batch.messages)):
        return Found("torn", f"{name}: there is {here}, due is {due}", abs(len(due) - len(here)) or 1)
    return Found("wrong", f"{name}, {batch.outcome}, is there, and should not be: {here}", len(here))


def _judge_order(seen: Sequence[str], want: Sequence[str], written: Written, where: str) -> Found:
    """The right messages in the wrong order: a batch in pieces, or whole batches that changed places."""
    place = {message: n for n, message in enumerate(seen)}
    for left, right in pairwise(want):
        same = written.by.get(left) is written.by.get(right)
        if same and abs(place[right] - place[left]) != 1:
            return Found("torn", f"{where}: {left} and {right} are one batch, and not in one piece")
    first = next(n for n, (a, b) in enumerate(zip(seen, want, strict=False)) if a != b)
    part = slice(first, first + 6)
    return Found("reordering", f"{where}: from {first} on {seen[part]}, not {want[part]}")


def _distance(seen: Sequence[str], want: Sequence[str]) -> int:
    return len(set(seen) ^ set(want))


def _short(state: State) -> str:
    return f"{len(state.messages)} messages up to {state.messages[-1:]}"

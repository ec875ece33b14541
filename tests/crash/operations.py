"""What processes asked of a store and what they were answered, one record per call; and what each call does.

A record is all that a checker of histories gets: no wire, no store. Times are CLOCK_MONOTONIC, which the
processes of a machine share. Messages are known by their ids, so every written message needs one of its own.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

ACKNOWLEDGED, UNKNOWN, REFUSED = "acknowledged", "unknown", "refused"
DAMAGED = "damaged"
"""Refused, because the session is damaged. The checker takes it as any refusal."""
READ = "read"
LEASES = ("acquire", "renew", "release", "lease")
"""Kinds of calls about leases; `lease` asks who has it. They change no session."""
FOREVER = 1 << 62


@dataclass(frozen=True, slots=True)
class State:
    """A session's messages and the rest of it that calls change. None in the place of one: no session."""

    messages: tuple[str, ...] = ()
    last_consolidated: int | None = 0
    """None: a read that does not show it."""
    metadata: str | None = ""
    """None: a read that does not show it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call, with all its copies: what was asked for, when, and what came of it."""

    process: str
    kind: str
    """append, create, replace, pop, update, fork, delete, read, or one of LEASES."""
    key: str
    begin_ns: int
    """When its first copy was sent."""
    end_ns: int
    """When its answer was there; of a call whose outcome is unknown: when it can last have been applied."""
    outcome: str = ACKNOWLEDGED
    sequence: int = 0
    """With the process, the call's identity; 0 if it has none."""

    messages: tuple[str, ...] = ()
    start: int = 0
    delete_count: int | None = None
    last_consolidated: int | None = None
    metadata: str | None = None
    source_key: str = ""
    at: int | None = None
    expected_revision: int | None = None
    allow_appends: bool = False
    """Of a replace: a later revision will do if messages were only added since. Of an acquire: the mode."""
    fencing_token: int = 0
    """The lease that it is made under, or speaks of; 0: none."""
    ttl_ns: int = 0
    waits: bool = False
    """It waits for a lease of somebody else."""

    revision: int = 0
    previous_revision: int = 0
    message_count: int = 0
    first_index: int | None = None
    popped: str | None = None
    seen: State | None = None
    """What a read saw; None: that there is no such session."""
    token: int = 0
    """The lease that was granted, or seen; of a release: that it was in force until then."""
    holder: str = ""
    """Of an acquire: who asks."""
    held_by: str = ""
    """Who has the lease, as a refusal or `lease` names it."""
    replayed: bool = False
    """An acquire was answered by an earlier copy of it: the lease may be over since."""
    reason: str = ""
    """Why it was refused, as the daemon names it; empty if nobody noted it."""

    def __str__(self) -> str:
        asked = {
            name: getattr(self, name)
            for name in (
                "start", "delete_count", "at", "expected_revision", "allow_appends", "last_consolidated",
                "metadata", "fencing_token", "token", "holder", "held_by", "reason",
            )
            if getattr(self, name)
        }  # fmt: skip
        return (
            f"{self.process}'s {self.kind} {self.sequence} {list(self.messages) or ''} {asked or ''} "
            f"[{self.begin_ns}, {self.end_ns}] {self.outcome}: {self.previous_revision} -> {self.revision}, "
            f"{self.message_count} messages, first {self.first_index}, popped {self.popped}"
        )

    @property
    def changed(self) -> bool:
        """Whether it is acknowledged and gave its session a new revision."""
        writes = self.kind not in (READ, *LEASES) and self.outcome == ACKNOWLEDGED
        return writes and self.revision != self.previous_revision

    def line(self) -> bytes:
        """One line of a log."""
        return json.dumps(asdict(self)).encode() + b"\n"


def operation_of(line: bytes) -> Operation:
    """The record of a log's line."""
    fields = json.loads(line)
    seen = fields.pop("seen")
    if seen is not None:
        seen = State(**(seen | {"messages": tuple(seen["messages"])}))
    return Operation(**(fields | {"messages": tuple(fields["messages"]), "seen": seen}))


class Inapplicable(Exception):
    """A store has to refuse this call on this state."""


def applied(call: Operation, state: State | None, source: State | None = None) -> State | None:
    """What a call makes of a session; `source` is what a fork copies. Raises Inapplicable."""
    match call.kind:
        case "append":
            old = state or State()
            return replace(old, messages=old.messages + call.messages)
        case "create" if state is None:
            return State(call.messages, call.last_consolidated or 0, call.metadata or "")
        case "fork" if state is None and source is not None:
            at = len(source.messages) if call.at is None else call.at
            if at > len(source.messages):
                raise Inapplicable
            return State(source.messages[:at], min(source.last_consolidated or 0, at), source.metadata)
        case "delete" if state is not None:
            return None
        case "pop" if state is not None and state.messages:
            return _rewritten(state, len(state.messages) - 1, 1, ())
        case "replace" if state is not None and call.start <= len(state.messages):
            rest = len(state.messages) - call.start
            count = rest if call.delete_count is None else call.delete_count
            if count <= rest:
                return _rewritten(state, call.start, count, call.messages)
        case "update" if state is not None and (call.last_consolidated or 0) <= len(state.messages):
            given = call.last_consolidated
            consolidated = state.last_consolidated if given is None else given
            return State(state.messages, consolidated, call.metadata or state.metadata)
    raise Inapplicable


def _rewritten(state: State, start: int, count: int, messages: tuple[str, ...]) -> State:
    now = state.messages[:start] + messages + state.messages[start + count :]
    return State(now, min(state.last_consolidated or 0, len(now)), state.metadata)


def bounded(operations: Iterable[Operation], deaths_ns: Sequence[int]) -> list[Operation]:
    """Say of each call of unknown outcome when it can last have been applied.

    Args:
        operations: their `end_ns` is when the caller gave up, and let go of its connection.
        deaths_ns: when daemons were dead, ascending: what a daemon had not applied then, it never will.

    """
    found = []
    for each in operations:
        if each.outcome == UNKNOWN:
            place = bisect_left(deaths_ns, each.end_ns)
            last = deaths_ns[place] if place < len(deaths_ns) else FOREVER
            found.append(replace(each, end_ns=last))
        else:
            found.append(each)
    return found

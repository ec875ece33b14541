"""Random histories of leases, of an honest store and of stores with one fault: for the checker's own test.

A pretended store and pretended processes on the pretended clock of `simulated_history`. It shares the records
with the checker, and nothing of its logic. Revisions and tokens come from one counter.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from crash.operations import ACKNOWLEDGED, REFUSED, UNKNOWN, Operation
from crash.simulated_history import History, World

KEYS = ("a", "b")
TTL = 400
_PROCESSES, _CALLS = 5, 80

OVERLAP = "two holders: given while it is in force"
RENEWED_LATE = "two holders: renewed after somebody else got it"
OLD_TOKEN = "late write: taken under an older token"
RELEASED = "late write: taken after the release"
RUN_OUT = "late write: taken long after it ran out"
OTHERS = "foreign write: taken from somebody without the token"
REWRITTEN = "foreign write: a rewrite where others may only append"
BETWEEN = "foreign write: between two writes of the holder, seen by its revision only"
TWICE = "token: given twice"
LOWER = "token: lower than the one before"
NOBODY = "unjustified: refused for a lease that nobody has"
FORGOTTEN = "unjustified: called lost while it is in force"
UNSEEN = "unjustified: not seen while it is in force"
FAULTS = {
    OVERLAP: ("two holders",),
    RENEWED_LATE: ("two holders",),
    OLD_TOKEN: ("late write",),
    RELEASED: ("late write",),
    RUN_OUT: ("late write",),
    OTHERS: ("foreign write",),
    REWRITTEN: ("foreign write",),
    BETWEEN: ("foreign write",),
    TWICE: ("token",),
    LOWER: ("token",),
    NOBODY: ("unjustified",),
    FORGOTTEN: ("unjustified",),
    UNSEEN: ("unjustified",),
}


@dataclass
class Held:
    """A lease of the pretended store."""

    token: int
    holder: str
    allows: bool
    granted_at: int
    expires_at: int
    told: bool = False
    """Its holder has heard of it."""
    released_by: bool = False
    """Somebody has asked to release it."""


class LeaseStore:
    """Leases, and of sessions the revisions. `fault` is injected once; `hit` is the key then."""

    def __init__(self, world: World, fault: str) -> None:
        self._world, self.fault, self.hit = world, fault, ""
        self._counter = 0
        self._revisions: dict[str, int] = {}
        self.leases: dict[str, Held] = {}
        self.over: dict[str, list[Held]] = {key: [] for key in KEYS}
        self._proof: Operation | None = None

    def do(self, call: Operation) -> Operation:
        """Answer a call at this moment."""
        held = self.leases.get(call.key)
        if held is not None and self._world.now >= held.expires_at:
            self.over[call.key].append(self.leases.pop(call.key))
            held = None
        match call.kind:
            case "acquire":
                return self._acquire(call, held)
            case "lease":
                if held is not None and self._spoils(UNSEEN, call, held):
                    held = None
                return replace(call, token=held.token, held_by=held.holder) if held else call
        if call.fencing_token:
            return self._under(call, held)
        return self._write(call, held)

    def _spoils(self, fault: str, call: Operation, held: Held | None = None) -> bool:
        """Whether the fault happens here: where somebody's word proves it."""
        if self.fault != fault or self.hit:
            return False
        if held is not None and not (
            held.told and not held.released_by and held.granted_at < call.begin_ns - 40
            and held.expires_at > self._world.now + 60
        ):  # fmt: skip
            return False
        self.hit = call.key
        return True

    def _acquire(self, call: Operation, held: Held | None) -> Operation:
        if held is not None and self._spoils(OVERLAP, call, held):
            held = None
        if held is not None:
            return _refused(call, "LEASE_HELD", held.holder)
        if call.key in self._revisions and self._spoils(NOBODY, call):
            return _refused(call, "LEASE_HELD", "nobody")
        older = [each for each in self.over[call.key] if each.told and each.granted_at < call.begin_ns - 40]
        self._counter += 1
        token = self._counter
        if older and self._spoils(TWICE, call):
            token = older[-1].token
        elif older and self._spoils(LOWER, call):
            token = older[-1].token - 1
        now = self._world.now
        self.leases[call.key] = Held(token, call.holder, call.allow_appends, now, now + call.ttl_ns)
        return replace(call, token=token)

    def _under(self, call: Operation, held: Held | None) -> Operation:
        """What names a token."""
        mine = held is not None and held.token == call.fencing_token
        if not mine and not self._wrongly(call, held):
            if call.kind == "release":
                return call
            return _refused(call, "LEASE_LOST", held.holder if held else "")
        if mine and call.kind != "release" and self._spoils(FORGOTTEN, call, held):
            return _refused(call, "LEASE_LOST", "")
        if call.kind == "renew":
            if held is not None and mine:
                held.expires_at = self._world.now + TTL
            return replace(call, token=call.fencing_token)
        if call.kind == "release":
            self.over[call.key].append(self.leases.pop(call.key))
            return replace(call, token=call.fencing_token)
        return self._written(call)

    def _wrongly(self, call: Operation, held: Held | None) -> bool:
        """Whether a call under a token that is not in force is taken all the same."""
        old = [each for each in self.over[call.key] if each.token == call.fencing_token]
        if not old or call.kind == "release":
            return False
        followed = held is not None and held.told and held.granted_at < call.begin_ns - 40
        if call.kind == "renew":
            return followed and self._spoils(RENEWED_LATE, call)
        if followed:
            return self._spoils(OLD_TOKEN, call)
        if old[0].released_by:
            # The release was answered before this was asked for.
            return held is None and old[0].expires_at == -1 and self._spoils(RELEASED, call)
        return held is None and old[0].expires_at < call.begin_ns - TTL and self._spoils(RUN_OUT, call)

    def _write(self, call: Operation, held: Held | None) -> Operation:
        """A write without a token."""
        allowed = held is None or (held.allows and call.kind == "append")
        if held is not None and not allowed:
            wrongly = self._spoils(REWRITTEN if held.allows else OTHERS, call, held)
            if not wrongly and not held.allows and self.fault == BETWEEN and not self.hit:
                # Nothing but the holder's next write shows it.
                wrongly = held.told and self._revisions.get(call.key, 0) > held.token
                if wrongly:
                    self.hit = call.key
                    self._proof = Operation(
                        process="holder", kind="append", key=call.key, fencing_token=held.token,
                        begin_ns=call.begin_ns, end_ns=self._world.now,
                    )  # fmt: skip
            if not wrongly:
                return _refused(call, "LEASE_HELD", held.holder)
        answer = self._written(call)
        if self._proof is not None:
            self._world.operations.append(self._written(self._proof))
            self._proof = None
        return answer

    def _written(self, call: Operation) -> Operation:
        self._counter += 1
        previous, self._revisions[call.key] = self._revisions.get(call.key, 0), self._counter
        return replace(call, revision=self._counter, previous_revision=previous)


def _refused(call: Operation, reason: str, by: str) -> Operation:
    return replace(call, outcome=REFUSED, reason=reason, held_by=by)


def _live(world: World, store: LeaseStore, name: str) -> Iterator[int]:
    """One process: acquires, writes, renews, releases, or forgets to; and writes without a lease."""
    rng = world.rng
    tokens: dict[str, int] = {}
    for sequence in range(1, _CALLS + 1):
        yield rng.randrange(60)
        key = rng.choice(KEYS)
        token = tokens.get(key, 0)
        call = _next_call(rng, Operation(
            process=name, kind="", key=key, sequence=sequence, begin_ns=world.now, end_ns=0
        ), token)  # fmt: skip
        held = store.leases.get(key)
        if call.kind == "release" and held is not None and held.token == token:
            held.released_by = True
        yield rng.randrange(1, 15)
        lost = rng.random() < 0.04 and call.kind != "lease"
        answer = store.do(call) if not lost or rng.random() < 0.5 else call
        yield rng.randrange(1, 15)
        if lost and not store.hit:
            world.operations.append(replace(call, outcome=UNKNOWN, end_ns=world.now))
            continue
        world.operations.append(replace(answer, end_ns=world.now))
        if answer.outcome != ACKNOWLEDGED:
            continue
        if call.kind == "acquire":
            tokens[key] = answer.token
        for each in (*store.over[key], *filter(None, [store.leases.get(key)])):
            each.told |= each.token == answer.token and call.kind == "acquire"
            if call.kind == "release" and each.token == token and store.leases.get(key) is not each:
                each.expires_at = -1


def _next_call(rng: random.Random, call: Operation, token: int) -> Operation:
    """What a process asks for next."""
    write = replace(call, kind=rng.choice(("append", "append", "pop", "replace")))
    if token and rng.random() < 0.6:
        kind = rng.choices(("write", "renew", "release"), (70, 15, 15))[0]
        return replace(write if kind == "write" else replace(call, kind=kind), fencing_token=token)
    match rng.choices(("acquire", "lease", "write"), (35, 15, 50))[0]:
        case "acquire":
            return replace(
                call, kind="acquire", holder=call.process, ttl_ns=TTL, allow_appends=rng.random() < 0.4
            )
        case "lease":
            return replace(call, kind="lease")
    return write


def random_leases(seed: int, fault: str = "") -> History:
    """A history of leases; `fault` is one of FAULTS, injected once, or empty for an honest store."""
    world = World(seed, "")
    store = LeaseStore(world, fault)
    for n in range(_PROCESSES):
        world.begin(_live(world, store, f"p{n}"))
    world.run()
    return History(world.operations, {}, store.hit)

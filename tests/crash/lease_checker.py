"""The checker of leases: whether what several processes were told of them can be what one honest store did.

A call that shows a lease in force does so for a moment between its begin and its end; between two such
moments the lease was in force all the time. It lasts its ttl at the least, unless somebody releases it, and
its ttl after the last renewal or start of the daemon at the most. What follows from that is checked: one
holder at a time; what is written under a token lies within its lease; nobody else's write does, by time or by
revision; tokens grow; a refusal because of a lease has its reason in one.

`check_leases` returns what is wrong, and nothing if nothing is. Pure: no I/O, no clock. Knows no store and no
wire. What the writes did is judged by `checker`. That `lease` finds none ends nothing: only what depends on a
lease makes the store note that it ran out, and one of which nobody noted it has its ttl again after a start.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from crash.checker import Violation, merged
from crash.operations import ACKNOWLEDGED, FOREVER, LEASES, READ, REFUSED, UNKNOWN, Operation

LEASE_HELD, LEASE_LOST = "LEASE_HELD", "LEASE_LOST"
Outage = tuple[int, int]
"""When the daemon was about to die, and when the next one was ready, ns."""


@dataclass(slots=True)
class _Lease:
    """What is known of one lease."""

    grant: Operation
    shown: list[Operation] = field(default_factory=list)
    """Calls that show it in force; the one that acquired it is not among them."""
    released_ns: int = FOREVER
    """Nobody tried to release it before."""
    over_ns: int = FOREVER
    """From then on it is over, by what somebody was told."""
    why: Operation | None = None
    """Who was told."""
    lasts_ns: int = 0
    """So long it lasts at the least, if nobody releases it."""
    ends_ns: int = FOREVER
    """It has run out by then, unless somebody shows that it was renewed."""

    @property
    def token(self) -> int:
        return self.grant.token

    def is_over(self, by: Operation) -> None:
        """Note a call that shows it to be over when it is answered."""
        if by.end_ns < self.over_ns:
            self.over_ns, self.why = by.end_ns, by

    def work_out(self, renewals: Sequence[Operation], outages: Sequence[Outage]) -> None:
        """Find out how long it lasts at the least and at the most."""
        ttl = self.grant.ttl_ns
        self.lasts_ns = 0 if self.grant.replayed else self.grant.begin_ns + ttl
        self.ends_ns = self.grant.end_ns + ttl
        # One that ran out comes back with a start, if nobody had found that yet: then nobody wrote meanwhile.
        steps = [(ready, -1, False) for struck, ready in outages if struck >= self.grant.begin_ns]
        steps += [(each.end_ns, each.begin_ns, each.outcome == ACKNOWLEDGED) for each in renewals]
        for end, begin, told in sorted(steps):
            if begin <= self.ends_ns:
                self.ends_ns = max(self.ends_ns, min(FOREVER, end + ttl))
            if told:
                self.lasts_ns = max(self.lasts_ns, begin + ttl)

    def certain(self, call: Operation) -> bool:
        """Whether it was in force all the time that a call took."""
        if self.grant.end_ns > call.begin_ns:
            return False
        shown = max((each.begin_ns for each in self.shown if each is not call), default=-1)
        return call.end_ns <= max(shown, min(self.lasts_ns, self.released_ns))

    def possible(self, call: Operation) -> bool:
        """Whether it may have been in force at some time that a call took."""
        return self.grant.begin_ns <= call.end_ns and call.begin_ns <= min(self.over_ns, self.ends_ns)


def check_leases(
    operations: Iterable[Operation], outages: Sequence[Outage] = (), *, one_counter: bool = False
) -> list[Violation]:
    """Judge what a history says of leases.

    Args:
        operations: every call of every process, those that `checker.check` gets included. Of calls without
            an answer, `end_ns` is when they can last have been applied.
        outages: when the daemon was away: each start gives every lease its full ttl again.
        one_counter: revisions and tokens come from one counter, so that each tells which was first.

    """
    violations: list[Violation] = []
    calls = merged(operations, violations)
    by_key: defaultdict[str, list[Operation]] = defaultdict(list)
    for call in calls:
        by_key[call.key].append(call)
    _check_tokens(calls, violations)
    for key, of_key in by_key.items():
        _Leases(key, of_key, outages, one_counter, violations).run()
    return [each for each in violations if each.kind != "duplicate"]  # `check` says so, too


def _granted(call: Operation) -> bool:
    return call.kind == "acquire" and call.outcome == ACKNOWLEDGED


def _check_tokens(calls: Iterable[Operation], violations: list[Violation]) -> None:
    """Each token is given once, and is higher than those that were given before."""
    grants = [call for call in calls if _granted(call)]
    ended = sorted(grants, key=lambda call: call.end_ns)
    given: dict[int, Operation] = {}
    highest: Operation | None = None
    place = 0
    for grant in sorted(grants, key=lambda call: call.begin_ns):
        first = given.setdefault(grant.token, grant)
        if first is not grant:
            violations.append(Violation("token", grant.key, f"given twice: {first} and {grant}"))
        while ended[place].end_ns < grant.begin_ns:
            if highest is None or ended[place].token > highest.token:
                highest = ended[place]
            place += 1
        if highest is not None and highest.token > grant.token:
            violations.append(Violation("token", grant.key, f"{grant} came after {highest}"))


class _Leases:
    """The leases of one key."""

    def __init__(
        self,
        key: str,
        calls: Sequence[Operation],
        outages: Sequence[Outage],
        one_counter: bool,
        violations: list[Violation],
    ) -> None:
        self._key, self._calls, self._one_counter = key, calls, one_counter
        self._violations = violations
        self._leases = {call.token: _Lease(call) for call in calls if _granted(call)}
        self._unknown = [call for call in calls if call.kind == "acquire" and call.outcome == UNKNOWN]
        """Each may have been granted: a lease whose token its holder does not know."""
        self._look(outages)

    def _look(self, outages: Sequence[Outage]) -> None:
        """Collect what each call shows."""
        renewals: defaultdict[int, list[Operation]] = defaultdict(list)
        for call in self._calls:
            lease = self._leases.get(call.fencing_token or call.token)
            if call.kind == "renew" and call.outcome in (ACKNOWLEDGED, UNKNOWN):
                renewals[call.fencing_token].append(call)
            if call.outcome == ACKNOWLEDGED:
                self._look_at_answer(call, lease)
            if lease is None:
                continue
            if call.kind == "release":
                lease.released_ns = min(lease.released_ns, call.begin_ns)
                if call.outcome == ACKNOWLEDGED:
                    lease.is_over(call)
            elif call.outcome == REFUSED and call.reason == LEASE_LOST:
                lease.is_over(call)
        for token, lease in self._leases.items():
            lease.work_out(renewals[token], outages)

    def _look_at_answer(self, call: Operation, lease: _Lease | None) -> None:
        shows = call.fencing_token if call.kind not in LEASES else call.token
        if shows and call.kind != READ:
            if lease is None:
                if not self._unknown:
                    self._report("token", f"{call} shows a lease that nobody was given")
            elif call is not lease.grant:
                lease.shown.append(call)
            for token, other in self._leases.items():
                if token < shows:
                    other.is_over(call)
        elif call.kind not in (READ, *LEASES):  # somebody wrote whom it would have kept out
            for other in self._leases.values():
                if other.grant.end_ns < call.begin_ns and not _allowed(call, other):
                    other.is_over(call)

    def run(self) -> None:
        self._check_late()
        self._check_holders()
        for call in self._calls:
            if call.outcome == ACKNOWLEDGED and call.kind not in (READ, *LEASES):
                self._check_write(call)
            elif call.outcome == ACKNOWLEDGED and call.kind in ("release", "lease") and not call.token:
                self._check_absence(call)
            elif call.outcome == REFUSED and call.reason in (LEASE_HELD, LEASE_LOST):
                self._check_refusal(call)
        self._check_revisions()

    def _check_late(self) -> None:
        """Nothing shows a lease in force after it was over."""
        for lease in self._leases.values():
            for call in lease.shown:
                kind = "late write" if call.kind not in LEASES else "two holders"
                if call.begin_ns > lease.over_ns:
                    self._report(kind, f"{call} shows a lease that {lease.why} had ended")
                elif call.begin_ns > lease.ends_ns:
                    self._report(kind, f"{call} shows a lease that had run out: {lease.grant}")

    def _check_holders(self) -> None:
        """Nobody was given a lease while somebody else had one all the time."""
        for lease in self._leases.values():
            for other in self._leases.values():
                if other is not lease and lease.certain(other.grant):
                    self._report("two holders", f"{other.grant} while {lease.grant} was in force")

    def _check_write(self, call: Operation) -> None:
        """Nobody else writes while a lease is in force."""
        for token, lease in self._leases.items():
            if token != call.fencing_token and not _allowed(call, lease) and lease.certain(call):
                self._report("foreign write", f"{call} while {lease.grant} was in force")

    def _check_absence(self, call: Operation) -> None:
        """A lease that is in force is seen."""
        for token, lease in self._leases.items():
            if call.fencing_token in (0, token) and lease.certain(call):
                self._report("unjustified", f"{call} found no lease, and {lease.grant} was in force")

    def _check_refusal(self, call: Operation) -> None:
        """Who is refused because of a lease is so with reason."""
        if call.reason == LEASE_LOST:
            lease = self._leases.get(call.fencing_token)
            if lease is not None and lease.certain(call):
                self._report("unjustified", f"{call}, and {lease.grant} was in force")
            return
        reasons = [
            lease.grant
            for lease in self._leases.values()
            if lease.possible(call) and not (call.kind == "append" and _allowed(call, lease))
        ]
        reasons += [each for each in self._unknown if each.begin_ns <= call.end_ns]
        if call.kind == "acquire":  # or somebody waits for one
            reasons += [
                each
                for each in self._calls
                if each.waits
                and each is not call
                and each.begin_ns <= call.end_ns
                and call.begin_ns <= each.end_ns
            ]
        if call.held_by not in {each.holder for each in reasons}:
            self._report("unjustified", f"{call}, and nobody of that name had a lease")

    def _check_revisions(self) -> None:
        """The writes under a lease stand together, but for what it allows."""
        changes = sorted((call for call in self._calls if call.changed), key=lambda call: call.revision)
        for token, lease in self._leases.items():
            own = [call.revision for call in changes if call.fencing_token == token]
            if not own:
                continue
            first, last = (token if self._one_counter else own[0]), own[-1]
            if own[0] < first:
                self._report("token", f"revision {own[0]} was written before its lease: {lease.grant}")
            for call in changes:
                if first < call.revision < last and call.fencing_token != token and not _allowed(call, lease):
                    self._report("foreign write", f"{call} is between {first} and {last} of {lease.grant}")
            later = [other for other in self._leases if token < other < last]
            if self._one_counter and later:
                self._report("late write", f"revision {last} under {lease.grant}, after token {later[0]}")

    def _report(self, kind: str, detail: str) -> None:
        self._violations.append(Violation(kind, self._key, detail))


def _allowed(call: Operation, lease: _Lease) -> bool:
    """Whether others may do this under a lease."""
    return call.kind == "append" and lease.grant.allow_appends

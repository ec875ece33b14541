"""The hammer: sixteen processes on twenty sessions, a daemon that is killed now and then, and a judge.

Clients of both kinds and raw stubs append, replace at a revision, pop, clear, fork, delete, and take leases,
each a bounded number of times (`hammer_worker`). Two watchers follow everything over the kills, from their
cursors. In the end `checker` and `lease_checker` get every record, the watchers must hold what is stored, and
in the order in which they were told no write stands within a lease of somebody else.
"""

import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from crash import hammer_worker
from crash.checker import check
from crash.hammer_worker import KEYS
from crash.kills import BUSY, LAUNCHER
from crash.lease_checker import Outage, check_leases
from crash.operations import (
    ACKNOWLEDGED,
    DAMAGED,
    LEASES,
    READ,
    REFUSED,
    UNKNOWN,
    Operation,
    State,
    bounded,
    operation_of,
)  # fmt: skip
from crash.phases import Phases, aims
from crash.storms import ACKNOWLEDGED_MIN, COLUMNS, final_state, judge_files
from crash.tally import Tally
from daemons import Daemon, wait_until
from followers import Follower, position
from sessionstore.v1 import session_store_pb2 as v1
from watchers import WatchingClient

KINDS = ("sync", "async", "raw", "sync", "async", "raw", "sync", "raw") * 2
"""Of the sixteen processes."""
CALLS_PER_KILL = 15
"""So many steps each process takes for each kill that is due."""
_ACKNOWLEDGED_PER_KILL = 10 * ACKNOWLEDGED_MIN
_PATIENCE_S = 300.0


class Hammer:
    """The processes and what they have logged. A context: begins and ends them."""

    def __init__(self, root: Path, daemon: Daemon, seed: int, steps: int) -> None:
        self._root, self._address, self._seed, self._steps = root, daemon.address, seed, steps
        self._logs = [root / f"{n}.log" for n in range(len(KINDS))]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._marked = 0

    def __enter__(self) -> "Hammer":
        for n, (kind, log) in enumerate(zip(KINDS, self._logs, strict=True)):
            log.touch()
            arguments = [self._address, f"p{n}", str(log), str(self._seed * 100 + n), kind, str(self._steps)]
            with log.with_suffix(".err").open("wb") as errors:
                command = [sys.executable, hammer_worker.__file__, *arguments]
                self._processes.append(subprocess.Popen(command, stderr=errors))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(_PATIENCE_S)

    @property
    def working(self) -> bool:
        """Whether any process has something to do yet. Fails if one failed."""
        for process, log in zip(self._processes, self._logs, strict=True):
            if process.poll() not in (None, 0):
                raise AssertionError(f"{log.stem}: {log.with_suffix('.err').read_text()[-3000:]}")
        return any(process.poll() is None for process in self._processes)

    def went_on(self) -> bool:
        """Whether enough was acknowledged since the last mark, or everybody has ended."""
        return self._acknowledged() >= self._marked + _ACKNOWLEDGED_PER_KILL or not self.working

    def mark(self) -> None:
        """Acknowledgements count anew."""
        self._marked = self._acknowledged()

    def _acknowledged(self) -> int:
        return sum(log.read_bytes().count(b'"outcome": "acknowledged"') for log in self._logs)

    def records(self) -> list[Operation]:
        """Every call."""
        return [operation_of(line) for log in self._logs for line in log.read_bytes().splitlines()]


def run(root: Path, seed: int, kills: int) -> Tally:
    """Let them work through so many kills of the daemon, and judge."""
    tally = Tally()
    rng = random.Random(seed)
    records = root / "records"
    records.mkdir(parents=True)
    phases = Phases(root / "phases")
    launcher = (*LAUNCHER, "--phases", str(root / "phases"))
    daemon = Daemon(root / "data", store="jsonl", flags=BUSY, launcher=launcher)
    outages: list[Outage] = []
    deaths: list[int] = []
    watching: list[WatchingClient] = []
    try:
        daemon.start()
        begun_s = time.monotonic()
        watching += [WatchingClient(daemon.address), WatchingClient(daemon.address, keys=KEYS)]
        for each in watching:
            each.begin()
        steps = CALLS_PER_KILL * (kills + 1)
        with Hammer(records, daemon, seed, steps) as hammer:
            for aim in aims(tally.phases, kills, rng):
                wait_until(hammer.went_on, _PATIENCE_S, "more acknowledgements")
                if not hammer.working:
                    break
                phases.await_moment(aim, lambda: daemon.process.poll() is None, rng)
                struck = time.monotonic_ns()
                daemon.kill()
                deaths.append(time.monotonic_ns())
                hammer.mark()
                tally.times += 1
                tally.phases.update(phases.now() or ["between"])
                phases.clear()
                daemon.start()
                outages.append((struck, time.monotonic_ns()))
                for each in watching:
                    each.reconnect()
                    each.begin()
            wait_until(lambda: not hammer.working, _PATIENCE_S * 2, "the processes end")
        took_s = time.monotonic() - begun_s
        heard = bounded(hammer.records(), deaths)
        _judge_watchers(daemon, watching, heard, tally)
        _judge(daemon, heard, outages, tally)
        _count(heard, tally, took_s)
    finally:
        for each in watching:
            each.close()
        daemon.close()
        (root / "daemon.log").write_text(daemon.stderr)
    return tally


def _judge(daemon: Daemon, records: Sequence[Operation], outages: Sequence[Outage], tally: Tally) -> None:
    """What the processes were told, and what is there in the end."""
    final: dict[str, tuple[int, State] | None] = {}
    for key in KEYS:
        state = final_state(daemon, key)
        if isinstance(state, str):
            tally.lose("lost", f"{key} is damaged in the end")
        else:
            final[key] = state
    damaged = {record.key for record in records if record.outcome == DAMAGED}
    for key in damaged:
        tally.lose("lost", f"{key} was served as damaged")
    assert daemon.terminate() == 0, daemon.stderr
    damaged |= set(KEYS) - final.keys()
    if not damaged:
        for violation in check(records, final):
            tally.lose(COLUMNS.get(violation.kind, "wrong"), str(violation), violation.count)
    for violation in check_leases(records, outages, one_counter=True):
        tally.lose("wrong", str(violation))
    judge_files(daemon.data, final, damaged, tally)


def _judge_watchers(
    daemon: Daemon, watching: Sequence[WatchingClient], records: Sequence[Operation], tally: Tally
) -> None:
    """Each watcher holds what is stored, got every appended message once, and saw no foreign write."""
    end = position(daemon.stub.ListSessions(v1.ListSessionsRequest(page_size=1)).cursor)
    stored = {}
    for key in KEYS:
        state = final_state(daemon, key)
        if isinstance(state, tuple):
            stored[key] = state[0], state[1].messages
    appended = {
        (record.key, message)
        for record in records
        if record.kind == "append" and record.outcome == ACKNOWLEDGED
        for message in record.messages
    }
    for n, each in enumerate(watching):
        follower = each.wait(lambda follower: position(follower.cursor) >= end)
        held = {
            key: (follower.revisions[key], tuple(json.loads(line)["id"] for line in session.lines))
            for key, session in follower.sessions.items()
        }
        for key in KEYS:
            if held.get(key) != stored.get(key):
                text = f"watcher {n} has {held.get(key)} of {key}, stored is {stored.get(key)}"
                tally.lose("wrong", text)
        for (key, line), count in follower.given.items():
            if count != 1:
                tally.lose("duplicated", f"watcher {n} got {line!r} of {key} {count} times")
        told = {(key, json.loads(line)["id"]) for key, line in follower.given.keys() | follower.shown}
        for key, message in sorted(appended - told):
            tally.lose("lost", f"watcher {n} never got {message} of {key}")
        _judge_order(follower, records, tally)
    follower = watching[0].follower
    leases = sum(lease is not None for _, _, lease, _ in follower.order)
    tally.notes.append(
        f"watchers: {follower.events} events, {leases} of leases, {follower.wholes} whole, "
        f"{follower.skipped} skipped"
    )


def _judge_order(follower: Follower, records: Sequence[Operation], tally: Tally) -> None:
    """In the order of the feed one lease follows another, and no write stands within somebody else's."""
    by_revision = {(call.key, call.revision): call for call in records if call.changed}
    current: dict[str, v1.Lease] = {}
    last: defaultdict[str, int] = defaultdict(int)
    for key, revision, lease, ended in follower.order:
        held = current.get(key)
        if lease is None:
            call = by_revision.get((key, revision))
            mine = held is None or call is None or call.fencing_token == held.fencing_token
            shared = held is not None and held.mode == v1.LEASE_MODE_APPENDS_ALLOWED
            if not mine and not (call.kind == "append" and shared):
                tally.lose("wrong", f"in the feed {call} stands within {_short(held)}")
            if held is None and call is not None and call.fencing_token:
                tally.lose("wrong", f"in the feed {call} stands without a lease")
        elif ended:
            if held is None or held.fencing_token != lease.fencing_token:
                tally.lose("wrong", f"in the feed {_short(lease)} ends, and {_short(held)} was in force")
            current.pop(key, None)
        else:
            if held is not None or lease.fencing_token <= last[key]:
                tally.lose("wrong", f"in the feed {_short(lease)} begins, and {_short(held)} was in force")
            current[key] = lease
            last[key] = lease.fencing_token


def _short(lease: v1.Lease | None) -> str:
    return f"lease {lease.fencing_token} of {lease.holder} on {lease.key}" if lease is not None else "none"


def _count(records: Sequence[Operation], tally: Tally, took_s: float) -> None:
    """Say what was done."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record.kind][record.outcome] += 1
        counts["all"][record.outcome] += 1
        if record.reason.startswith("LEASE_"):
            counts["all"][record.reason] += 1
        if record.kind not in (READ, *LEASES) and record.outcome in (ACKNOWLEDGED, UNKNOWN):
            number = getattr(tally, record.outcome) + max(1, len(record.messages))
            setattr(tally, record.outcome, number)
    for kind in sorted(counts, key=lambda kind: -counts[kind].total()):
        each = counts[kind]
        parts = [f"{each[name]} {name}" for name in (ACKNOWLEDGED, REFUSED, UNKNOWN)]
        parts += [f"{number} {name}" for name, number in each.items() if name.startswith("LEASE_")]
        tally.notes.append(f"{kind}: {', '.join(parts)}")
    fenced = sum(record.changed and record.fencing_token > 0 for record in records)
    tally.notes.append(
        f"{len(KINDS)} processes, {len(KEYS)} sessions, {len(records):,} calls, "
        f"{fenced:,} writes under leases, {tally.times} kills, {took_s:.0f} s"
    )

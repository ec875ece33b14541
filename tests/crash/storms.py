"""A storm: four processes that read and write, a daemon that somebody ends again and again, and a judge.

The one who ends the daemon is `kills` (kill -9) or `power_cuts`. The processes' records lie beside the
store's directory, not in it. In the end the checker gets every record and the last state of every session,
and the session files must say the same to a plain reader once the daemon has stopped.
"""

import json
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import grpc
from crash.checker import check
from crash.operations import (
    ACKNOWLEDGED,
    DAMAGED,
    READ,
    UNKNOWN,
    Operation,
    State,
    bounded,
    operation_of,
)
from crash.storm_writer import FORKS, KEYS
from crash.tally import Tally
from daemons import Daemon, wait_until
from seed_reader import read_session
from sessionstore.v1 import session_store_pb2

WRITERS = 4
ACKNOWLEDGED_MIN = 20
"""So many calls must be acknowledged after one fault before the next one counts."""
PATIENCE_S = 120.0
COLUMNS = {"lost": "lost", "duplicate": "duplicated", "torn": "torn"}


class Storm:
    """The processes, and what they were answered so far. A context: begins and ends the processes."""

    def __init__(self, root: Path, daemon: Daemon, seed: int, variant: str = "mixed") -> None:
        """Prepare a storm.

        Args:
            root: an empty directory for the records.
            daemon: running.
            seed: of the processes' choices.
            variant: "retry" (every call is sent again until it is answered), "leave", or "mixed".

        """
        self._root, self._daemon, self._seed, self._variant = root, daemon, seed, variant
        self._logs = [root / f"writer{n}.log" for n in range(WRITERS)]
        self._errors = [root / f"writer{n}.err" for n in range(WRITERS)]
        self._stop = root / "stop"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._read_to = [0] * WRITERS
        self._acknowledged = 0
        self._acknowledged_at_fault = 0
        self._struck_ns: list[tuple[int, bool]] = []
        self._deaths_ns: list[int] = []

    def __enter__(self) -> "Storm":
        program = Path(__file__).parent / "storm_writer.py"
        for n, log in enumerate(self._logs):
            log.touch()
            how = ("retry", "leave")[n % 2] if self._variant == "mixed" else self._variant
            command = [sys.executable, program, self._daemon.address, f"w{n}", log, self._stop]
            with self._errors[n].open("wb") as errors:
                started = subprocess.Popen([*command, str(self._seed * 10 + n), how], stderr=errors)
            self._processes.append(started)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE_S)
        (self._root / "daemon.log").write_text(self._daemon.stderr)

    def await_acknowledgements(self, count: int = ACKNOWLEDGED_MIN) -> None:
        """Wait until so many calls were acknowledged since the last fault."""

        def enough() -> bool:
            self._look_after_writers()
            return self._count() - self._acknowledged_at_fault >= count

        wait_until(enough, PATIENCE_S, f"{count} acknowledgements")

    def _look_after_writers(self) -> None:
        for process, errors in zip(self._processes, self._errors, strict=True):
            if process.poll() not in (None, 0):
                raise AssertionError(f"a writer failed: {errors.read_text()[-2000:]}")

    def _count(self) -> int:
        """How many calls were acknowledged so far."""
        for n, log in enumerate(self._logs):
            with log.open("rb") as file:
                file.seek(self._read_to[n])
                whole = file.read().rpartition(b"\n")[0]
            self._read_to[n] += len(whole)
            self._acknowledged += whole.count(b'"outcome": "acknowledged"')
        return self._acknowledged

    def struck(self, power: bool = False) -> None:
        """Say that the disk fails from now on, until the daemon is dead: that it cannot be read is no loss.

        `power`: the power is off. What is answered now, nobody could have heard.
        """
        self._struck_ns.append((time.monotonic_ns(), power))

    def died(self) -> None:
        """The daemon is dead: what it has not applied, it never will. Acknowledgements count anew."""
        self._deaths_ns.append(time.monotonic_ns())
        self._acknowledged_at_fault = self._count()

    def finish(self, tally: Tally) -> None:
        """Stop the processes, then the daemon, and judge."""
        self._stop.touch()
        for process in self._processes:
            process.wait(PATIENCE_S)
        self._look_after_writers()
        records = self._records(tally)
        final = {key: final_state(self._daemon, key) for key in (*KEYS, *FORKS)}
        assert self._daemon.terminate() == 0, self._daemon.stderr
        damaged = {record.key for record in records if record.outcome == DAMAGED}
        damaged |= {key for key, state in final.items() if state == DAMAGED}
        healthy = {key: state for key, state in final.items() if key not in damaged and state != DAMAGED}
        begun = time.monotonic()
        judged = [record for record in records if record.key in healthy and record.source_key not in damaged]
        for violation in check(judged, healthy):
            tally.lose(COLUMNS.get(violation.kind, "wrong"), str(violation), violation.count)
        for key in damaged:
            tally.lose("lost", f"{key} was served as damaged")
        judge_files(self._daemon.data, healthy, damaged, tally)
        for record in records:
            if record.kind != READ and record.outcome in (ACKNOWLEDGED, UNKNOWN):
                count = getattr(tally, record.outcome) + max(1, len(record.messages))
                setattr(tally, record.outcome, count)
        reads = sum(record.kind == READ for record in records)
        took = time.monotonic() - begun
        tally.notes.append(f"{len(records):,} calls, {reads:,} of them reads, checked in {took:.1f} s")

    def _records(self, tally: Tally) -> list[Operation]:
        """What every process was answered while there was power."""
        records = [operation_of(line) for log in self._logs for line in log.read_bytes().splitlines()]
        found, late = [], 0
        for record in records:
            power_off = self._power_off(record)
            no_loss = record.outcome == DAMAGED or (power_off and record.kind == READ)
            if power_off is not None and no_loss:
                continue
            heard = not (power_off and record.outcome == ACKNOWLEDGED)
            found.append(record if heard else replace(record, outcome=UNKNOWN))
            late += not heard
        if late:
            tally.notes.append(
                f"{late} changes were acknowledged after the power was off: held to be unknown"
            )
        return bounded(found, self._deaths_ns)

    def _power_off(self, record: Operation) -> bool | None:
        """Whether the power was off when a call was answered; None if nothing was wrong with the disk."""
        for begin, power in self._struck_ns:
            end = next(death for death in self._deaths_ns if death > begin)
            if begin <= record.end_ns <= end:
                return power
        return None


def final_state(daemon: Daemon, key: str) -> tuple[int, State] | str | None:
    """A session as it is served in the end; DAMAGED if it is not."""
    request = session_store_pb2.GetSessionRequest(key=key)
    try:
        answer = daemon.stub.GetSession(request, timeout=100, wait_for_ready=True)
    except grpc.RpcError as error:
        if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS):
            raise
        return DAMAGED if error.code() == grpc.StatusCode.DATA_LOSS else None
    assert not answer.truncated
    if answer.session.damage:
        return DAMAGED
    head = answer.session
    messages = tuple(json.loads(line)["id"] for line in answer.messages.splitlines())
    note = json.loads(head.metadata).get("note", "")
    return head.revision, State(messages, head.last_consolidated, note)


def judge_files(
    data: Path, final: Mapping[str, tuple[int, State] | None], damaged: Collection[str], tally: Tally
) -> None:
    """After a clean stop, a plain reader finds in the files of whole sessions what the daemon said."""
    found = {}
    for path in (data / "sessions").glob("*.jsonl"):
        session = read_session(path)
        if session is None and not damaged:
            tally.lose("wrong", f"a plain reader cannot read {path.name}")
        elif session is not None:
            messages = tuple(str(message["id"]) for message in session.messages)
            note = str(session.metadata.get("note", ""))
            found[session.key] = State(messages, session.last_consolidated, note)
    expected = {key: state[1] for key, state in final.items() if state is not None}
    for key in (found.keys() | expected.keys()) - set(damaged):
        if found.get(key) != expected.get(key):
            text = f"{key}: the file says {found.get(key)}, the daemon said {expected.get(key)}"
            tally.lose("wrong", text)

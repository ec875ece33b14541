"""The kill storm: four writing processes, and a daemon that is killed with -9 again and again.

`kill_storm(kills, seed, root)` runs it and says what was lost, doubled, torn or out of order. Each kill comes
only after at least 20 acknowledgements since the one before. The writers' logs lie beside the store's
directory, not in it.
"""

import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from crash.storm_writer import KEYS
from daemons import Daemon, wait_until
from seed_reader import read_session
from sessionstore.v1 import session_store_pb2

WRITERS = 4
ACKNOWLEDGED_PER_KILL = 20
PATIENCE_S = 120.0

Messages = dict[str, list[dict[str, object]]]


@dataclass
class StormReport:
    """What came of a storm. Everything from `lost` on must be 0."""

    kills: int = 0
    acknowledged: int = 0
    unknown: int = 0
    unknown_but_stored: int = 0
    lost: int = 0
    duplicated: int = 0
    torn: int = 0
    out_of_order: int = 0
    misplaced: int = 0
    """Acknowledged with an index at which something else stands."""
    invented: int = 0
    """Stored, and neither acknowledged nor unknown."""
    details: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = [
            f"{each.name} {getattr(self, each.name)}" for each in fields(self) if each.name != "details"
        ]
        return ", ".join(counts)

    def faults(self) -> int:
        return self.lost + self.duplicated + self.torn + self.out_of_order + self.misplaced + self.invented


def kill_storm(
    kills: int, seed: int, root: Path, *, variant: str = "retry", flags: tuple[str, ...] = ()
) -> StormReport:
    """Run a storm of so many kills.

    Args:
        kills: how often the daemon is killed.
        seed: of the writers' and the killer's choices.
        root: an empty directory for the store and, beside it, the logs.
        variant: "retry" (every call is sent again until it is answered), "leave", or "mixed".
        flags: more flags of the daemon.

    """
    rng = random.Random(seed)
    logs = [root / f"writer{n}.log" for n in range(WRITERS)]
    stop = root / "stop"
    daemon = Daemon(root / "data", store="jsonl", flags=flags)
    report = StormReport()
    try:
        daemon.start()
        with _writers(daemon.address, logs, stop, seed, variant) as processes:
            for _ in range(kills):
                _wait_for_acknowledgements(logs, processes, rng)
                daemon.kill()
                daemon.start()
                report.kills += 1
            _wait_for_acknowledgements(logs, processes, rng)
            stop.touch()
            for process in processes:
                assert process.wait(PATIENCE_S) == 0, "a writer failed"
        stored = {key: list(_stored(daemon, key)) for key in KEYS}
        assert daemon.terminate() == 0, daemon.stderr
    finally:
        daemon.close()
    _judge(report, [_log(path) for path in logs], stored)
    files = [read_session(path) for path in (root / "data" / "sessions").glob("*.jsonl")]
    in_files = {session.key: session.messages for session in files if session is not None}
    if in_files != {key: messages for key, messages in stored.items() if messages}:
        report.lost += 1
        report.details.append("after the stop, the session files do not say what the daemon said")
    return report


@contextmanager
def _writers(
    address: str, logs: list[Path], stop: Path, seed: int, variant: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = []
    try:
        for n, log in enumerate(logs):
            log.touch()
            how = ("retry", "leave")[n % 2] if variant == "mixed" else variant
            command = [sys.executable, Path(__file__).parent / "storm_writer.py", address, f"w{n}", log]
            processes.append(subprocess.Popen([*command, stop, str(seed * 10 + n), how]))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE_S)


def _wait_for_acknowledgements(
    logs: list[Path], processes: list[subprocess.Popen[bytes]], rng: random.Random
) -> None:
    """Wait for enough of them, then a random moment."""
    before = _acknowledged(logs)

    def enough() -> bool:
        assert all(process.poll() is None for process in processes), "a writer ended early"
        return _acknowledged(logs) - before >= ACKNOWLEDGED_PER_KILL

    wait_until(enough, PATIENCE_S, "20 acknowledgements")
    time.sleep(rng.random() * 0.1)


def _acknowledged(logs: list[Path]) -> int:
    return sum(path.read_bytes().count(b'"acknowledged"') for path in logs)


def _log(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _stored(daemon: Daemon, key: str) -> Iterator[dict[str, object]]:
    """A session's messages, by a stream of blocks."""
    for block in daemon.stub.ReadMessages(session_store_pb2.ReadMessagesRequest(key=key), timeout=100):
        yield from map(json.loads, block.messages.splitlines())


def _judge(report: StormReport, logs: Iterable[list[dict[str, object]]], stored: Messages) -> None:
    """Compare what was answered with what is stored."""
    places: defaultdict[tuple[object, object], list[tuple[str, int]]] = defaultdict(list)
    for key, messages in stored.items():
        _judge_batches(report, key, messages)
        for index, message in enumerate(messages):
            places[message["w"], message["n"]].append((key, index))
    known: Counter[str] = Counter()
    for writer, entries in enumerate(logs):
        for entry in entries:
            numbers = range(entry["n"], entry["n"] + entry["count"])  # type: ignore[call-overload,operator]
            found = [places.pop((f"w{writer}", number), []) for number in numbers]
            known[str(entry["what"])] += len(found)
            report.duplicated += sum(len(each) > 1 for each in found)
            if entry["what"] == "unknown":
                report.unknown_but_stored += sum(bool(each) for each in found)
                continue
            report.lost += sum(not each for each in found)
            for i, each in enumerate(found):
                wanted = (entry["key"], entry["first_index"] + i)  # type: ignore[operator]
                if each and wanted not in each:
                    report.misplaced += 1
                    report.details.append(f"{entry}: message {i} is at {each}")
    report.acknowledged, report.unknown = known["acknowledged"], known["unknown"]
    report.invented = len(places)


def _judge_batches(report: StormReport, key: str, messages: list[dict[str, object]]) -> None:
    """Batches are whole and in one piece, and each writer's messages are in its order."""
    last: dict[object, int] = {}
    position = 0
    while position < len(messages):
        first = messages[position]
        size = int(str(first["of"]))
        batch = messages[position : position + size]
        if [(m["w"], m["batch"], m["i"]) for m in batch] != [
            (first["w"], first["batch"], i) for i in range(size)
        ]:
            report.torn += 1
            report.details.append(f"{key}: a torn batch at {position}: {batch}")
            size = 1
        number = int(str(first["n"]))
        if number < last.get(first["w"], -1):
            report.out_of_order += 1
            report.details.append(f"{key}: {first['w']} {number} stands behind {last[first['w']]}")
        last[first["w"]] = number
        position += size

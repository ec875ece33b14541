"""The rung of one slow thing: what other calls wait while many files are flushed, or one is written anew.

A probe makes one small call after the other, an append to its own session and a read of it, each alone.
Beside it two floors are taken: a write and fdatasync of a file on the same disk, and a read from another
daemon, which has nothing else to do. Figures are printed for a time of rest, for checkpoints of 1,000 dirty
files, and for a session of 100 MB that is written anew.

Only a full run judges, and it counts a probe as wrong if it waited for more than 50 ms plus the longest of
each floor within a second of it. An append is a flush, so it cannot be faster than the disk is just then; and
on a busy machine every call waits for a processor, that to an idle daemon too. What is longer than all that
is the daemon's own doing.
"""

import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from crash.load import PATIENCE_S
from crash.odd_daemon import odd_daemon, worked
from crash.tally import Tally
from daemons import Daemon, channel_to, wait_until
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc

FILES_FULL = 1000
WAIT_MS_MAX = 50.0
_REST_S = 2.0
_REPETITIONS = 4
_BYTES_PER_FILE = 100_000
"""Of the large session, for each dirty file of the other part: 100 MB in a full run."""
_LINE = b'{"role": "user", "content": "%s"}\n' % (b"x" * 966)
_BATCH_LINES = 4000
_FLOOR_WINDOW_S = 1.0
_PAUSE_S = 0.002


@dataclass(frozen=True)
class Took:
    """One call or one flush."""

    begun_s: float
    ms: float


@dataclass
class Probes:
    """What was measured, in the order of time."""

    append: list[Took] = field(default_factory=list)
    read: list[Took] = field(default_factory=list)
    flush: list[Took] = field(default_factory=list)
    idle: list[Took] = field(default_factory=list)
    """Of reads from another daemon."""


def run(root: Path, seed: int, files: int) -> Tally:
    """Measure, with so many dirty files and a session in proportion."""
    tally = Tally(times=files)
    notes = root / "work"
    flags = ("--checkpoint-s-max", "3600")
    daemon = Daemon(root / "data", store="jsonl", flags=flags, launcher=odd_daemon("--note-work", str(notes)))
    idle = Daemon(root / "idle")
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        daemon.start()
        idle.start()
        lines = _large_session(daemon, files * _BYTES_PER_FILE)
        _round(daemon, notes, "checkpoint", 1)
        with _probing(daemon, idle, root / "floor") as probes:
            begun = time.monotonic()
            time.sleep(_REST_S)
            report(tally, probes, "at rest", [(begun, time.monotonic())], judged=False)
            judged = files >= FILES_FULL
            spans = []
            for _ in range(_REPETITIONS):
                _make_dirty(daemon, files)
                spans.append(_round(daemon, notes, "checkpoint", files))
            report(tally, probes, f"during checkpoints of {files} files", spans, judged=judged)
            spans = []
            for n in range(_REPETITIONS):
                begun = time.monotonic()
                (_pop if n % 2 else _replace_in_the_middle)(daemon, lines)
                spans.append((begun, _round(daemon, notes, "rewrite", 1)[1]))
            size = f"{lines * len(_LINE) / 1e6:.0f} MB"
            report(tally, probes, f"during rewrites of {size}", spans, judged=judged)
        if daemon.terminate() != 0:
            tally.lose("wrong", f"no clean stop:\n{daemon.stderr[-2000:]}")
    finally:
        sys.setswitchinterval(interval_s)
        daemon.close()
        idle.close()
    return tally


def _round(daemon: Daemon, notes: Path, what: str, count: int) -> tuple[float, float]:
    """Start a round; returns when its piece of work on at least so many sessions began and ended."""
    known = len(worked(notes))
    found: list[tuple[str, float, float, int]] = []

    def there() -> bool:
        found[:] = [each for each in worked(notes)[known:] if each[0] == what and each[3] >= count]
        return bool(found)

    daemon.send_signal(signal.SIGUSR1)
    wait_until(there, PATIENCE_S, f"a {what} of {count}")
    return found[0][1:3]


# What is slow -----------------------------------------------------------------------------------------------


def _large_session(daemon: Daemon, size: int) -> int:
    """Append so many bytes to one session; returns how many messages that are."""
    lines = 0
    while lines * len(_LINE) < size:
        request = v1.AppendMessagesRequest(key="large", messages=_LINE * _BATCH_LINES)
        lines = daemon.stub.AppendMessages(request, timeout=PATIENCE_S).result.message_count
    return lines


def _make_dirty(daemon: Daemon, files: int) -> None:
    """A small change of so many sessions."""

    def append(n: int) -> None:
        request = v1.AppendMessagesRequest(key=f"dirty:{n}", messages=b'{"role": "user"}\n')
        daemon.stub.AppendMessages(request, timeout=PATIENCE_S)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(append, range(files)))


def _replace_in_the_middle(daemon: Daemon, lines: int) -> None:
    request = v1.ReplaceMessagesRequest(key="large", start=lines // 2, delete_count=1, messages=_LINE)
    daemon.stub.ReplaceMessages(request, timeout=PATIENCE_S)


def _pop(daemon: Daemon, lines: int) -> None:
    daemon.stub.PopMessage(v1.PopMessageRequest(key="large"), timeout=PATIENCE_S)


# Probes -----------------------------------------------------------------------------------------------------


@contextmanager
def _probing(daemon: Daemon, idle: Daemon, floor: Path) -> Iterator[Probes]:
    """Probe and take the floors all the time, each in a thread of its own."""
    probes, stop = Probes(), threading.Event()
    threads = [
        threading.Thread(target=_call, args=(daemon.address, probes, stop)),
        threading.Thread(target=_flush, args=(floor, probes, stop)),
        threading.Thread(target=_call_idle, args=(idle.address, probes, stop)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield probes
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)


def _timed(into: list[Took], work: Callable[[], object]) -> None:
    begun = time.monotonic()
    work()
    into.append(Took(begun, (time.monotonic() - begun) * 1000))


def _call(address: str, probes: Probes, stop: threading.Event) -> None:
    append = v1.AppendMessagesRequest(key="probe", messages=b'{"role": "user"}\n')
    read = v1.GetSessionRequest(key="probe", last=1)
    with channel_to(address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        while not stop.is_set():
            _timed(probes.append, lambda: stub.AppendMessages(append, timeout=PATIENCE_S))
            _timed(probes.read, lambda: stub.GetSession(read, timeout=PATIENCE_S))
            time.sleep(_PAUSE_S)


def _call_idle(address: str, probes: Probes, stop: threading.Event) -> None:
    with channel_to(address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        while not stop.is_set():
            _timed(probes.idle, lambda: stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=PATIENCE_S))
            time.sleep(_PAUSE_S)


def _flush(path: Path, probes: Probes, stop: threading.Event) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def once() -> None:
        os.write(fd, b"x" * 4096)
        os.fdatasync(fd)

    try:
        while not stop.is_set():
            _timed(probes.flush, once)
            time.sleep(_PAUSE_S)
    finally:
        os.close(fd)


def report(
    tally: Tally, probes: Probes, name: str, spans: Sequence[tuple[float, float]], *, judged: bool
) -> None:
    """Print the figures of some spans of time, and count the probes that waited for the daemon itself."""
    total_s = sum(to_s - from_s for from_s, to_s in spans)
    tally.notes.append(f"{name} ({total_s:.1f} s):")
    measured = {
        "append": probes.append,
        "read": probes.read,
        "the disk's flush": probes.flush,
        "an idle daemon": probes.idle,
    }
    for what, took in measured.items():
        there = [each for span in spans for each in _within(took, *span)]
        tally.notes.append(f"  {what:16} {_figures([each.ms for each in there])}")
        if not judged or what not in ("append", "read"):
            continue
        if not there:
            tally.lose("wrong", f"{name}: no {what} was made, so there is nothing to judge")
        for each in there:
            end_s = each.begun_s + each.ms / 1000
            near = each.begun_s - _FLOOR_WINDOW_S, end_s + _FLOOR_WINDOW_S
            floors_ms = [
                max((one.ms for one in _within(floor, *near)), default=0.0)
                for floor in (probes.flush, probes.idle)
            ]
            if each.ms > WAIT_MS_MAX + sum(floors_ms):
                detail = f"{what} waited {each.ms:.0f} ms; flush and idle daemon {floors_ms}"
                tally.lose("wrong", f"{name}: {detail}")


def _within(took: Sequence[Took], from_s: float, to_s: float) -> list[Took]:
    """What was under way at any moment of a time."""
    return [each for each in took if each.begun_s <= to_s and each.begun_s + each.ms / 1000 >= from_s]


def _figures(values_ms: Sequence[float]) -> str:
    if not values_ms:
        return "none"
    ordered = sorted(values_ms)
    p999 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.999))]
    return (
        f"p50 {statistics.median(ordered):.1f} ms, p99.9 {p999:.1f} ms, maximum {ordered[-1]:.1f} ms "
        f"({len(ordered)} calls)"
    )

"""The rung of a disk that fills during a load test, on a small tmpfs and on a small ext4.

In each cycle a ballast file leaves a little room, four writers use that up, and the ballast goes again. On
the way writes come short, then fail, of session files and of the journal. Everything that is acknowledged is
there, nothing that was refused is, reads and deletions go on meanwhile, and the same process serves on when
space returns. Every third cycle kills the daemon on the full disk instead.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from crash import small_disks
from crash.load import Load, count_answers, judge, judge_files, reason_of, stored_in
from crash.odd_daemon import counted, odd_daemon
from crash.tally import Tally
from daemons import Daemon, channel_to
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc

# No multiple of a page: the last page is a part of one, and writes end within it.
_ROOM_KIB = (21, 33, 57, 101, 203)
_KEYS_PER_CYCLE = 3
_DELETED_PER_CYCLE = 4
_CALLS = 20
_MORE_DISKS_MAX = 10


@dataclass(frozen=True)
class _Kind:
    """A file system, its size, and what the daemon keeps free of it."""

    mounted: object
    size_kib: int
    reserve_kib: int
    name: str


_KINDS = (
    _Kind(small_disks.tmpfs, 12_001, 0, "tmpfs without reserve"),
    _Kind(small_disks.tmpfs, 12_001, 512, "tmpfs with 512 KiB of reserve"),
    _Kind(small_disks.ext4, 24_000, 0, "ext4 without reserve"),
    _Kind(small_disks.tmpfs, 30_000, 16 * 1024, "tmpfs with the default reserve"),
)
unavailable = small_disks.cannot_mount


def _was_met(tally: Tally) -> bool:
    """Whether a session file's write came short, and one found no room at all."""
    full = any(count and event.endswith("ENOSPC") for event, count in tally.phases.items())
    return full and tally.phases["session file short write"] > 0


def run(root: Path, seed: int, cycles: int) -> Tally:
    """Fill a disk so many times, each kind of disk in its turn."""
    tally = Tally()
    for n, kind in enumerate(_KINDS):
        share = cycles // len(_KINDS) + (n < cycles % len(_KINDS))
        if share:
            _on_one_disk(tally, kind, root / f"disk{n}", random.Random(seed + n), share)
    for more in range(_MORE_DISKS_MAX):
        if _was_met(tally):
            break
        _on_one_disk(tally, _KINDS[0], root / f"more{more}", random.Random(seed + 100 + more), 2)
    if not _was_met(tally):
        tally.lose("wrong", f"the disk was not full in the way that is meant: {dict(tally.phases)}")
    return tally


def _on_one_disk(tally: Tally, kind: _Kind, path: Path, rng: random.Random, cycles: int) -> None:
    events = path.with_suffix(".events")
    with kind.mounted(path, kind.size_kib) as disk:  # type: ignore[operator]
        daemon = Daemon(
            disk / "data",
            store="jsonl",
            flags=("--reserve-bytes-min", str(kind.reserve_kib << 10), "--checkpoint-s-max", "0.2"),
            launcher=odd_daemon("--count", str(events)),
        )
        try:
            daemon.start()
            keys: list[str] = []
            for cycle in range(cycles):
                _delete(daemon, keys)
                keys = [f"cycle{cycle}:{n}" for n in range(_KEYS_PER_CYCLE)]
                _cycle(tally, kind, daemon, disk, keys, rng, kill=cycle % 3 == 2)
            stored = stored_in(daemon, keys)
            if daemon.terminate() != 0:
                tally.lose("wrong", f"{kind.name}: no clean stop:\n{daemon.stderr[-2000:]}")
            judge_files(tally, daemon.data, stored, kind.name)
        finally:
            daemon.close()
            tally.phases += counted(events)


def _cycle(
    tally: Tally, kind: _Kind, daemon: Daemon, disk: Path, keys: list[str], rng: random.Random, *, kill: bool
) -> None:
    """Fill the disk under load, look what still works, empty it, and judge."""
    doomed = [f"{keys[0]}:doomed{n}" for n in range(_DELETED_PER_CYCLE)]
    for key in [*keys, *doomed]:
        daemon.stub.CreateSession(v1.CreateSessionRequest(key=key))
    pid = daemon.pid
    ballast = disk / "ballast"
    with Load(daemon.address, keys, rng.randrange(1 << 30), bytes_max=6000) as load:
        load.wait_for("ACKNOWLEDGED", _CALLS)
        with _reading(tally, daemon, keys):
            small_disks.fill(ballast, kind.reserve_kib + rng.choice(_ROOM_KIB))
            load.wait_for("STORAGE_FULL", _CALLS)
            _delete_while_full(tally, kind, daemon, doomed)
            load.wait_for("STORAGE_FULL", _CALLS)
        if kill:
            daemon.kill()
            ballast.unlink()
            daemon.start()
        else:
            ballast.unlink()
        load.wait_for("ACKNOWLEDGED", _CALLS)
    tally.times += 1
    if not kill and (daemon.pid != pid or daemon.process.poll() is not None):
        tally.lose("wrong", f"{kind.name}: it needed a restart:\n{daemon.stderr[-2000:]}")
    count_answers(tally, load.account)
    judge(tally, load.account, stored_in(daemon, keys), kind.name)
    if rng.random() < 0.5:
        daemon.restart(kill=True)
        judge(tally, load.account, stored_in(daemon, keys), f"{kind.name}, after kill -9")


def _delete(daemon: Daemon, keys: list[str]) -> None:
    for key in keys:
        daemon.stub.DeleteSession(v1.DeleteSessionRequest(key=key))


def _delete_while_full(tally: Tally, kind: _Kind, daemon: Daemon, keys: list[str]) -> None:
    """Deletions need the reserve: with it they go on; without it they may be refused, and only that way."""
    for key in keys:
        try:
            _delete(daemon, [key])
        except grpc.RpcError as error:
            if kind.reserve_kib or reason_of(error) != "STORAGE_FULL":
                tally.lose("wrong", f"{kind.name}: a deletion was refused: {error.details()}")
            continue
        tally.phases["deletion on a full disk"] += 1
        if stored_in(daemon, [key])[key]:
            tally.lose("wrong", f"{kind.name}: {key} is deleted, and is there")


@contextmanager
def _reading(tally: Tally, daemon: Daemon, keys: list[str]) -> Iterator[None]:
    """Read all the time beside what is done, on a connection of its own."""
    stop = threading.Event()

    def read() -> None:
        with channel_to(daemon.address) as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            while not stop.is_set():
                for key in keys:
                    try:
                        stub.GetSession(v1.GetSessionRequest(key=key, last=3), timeout=30)
                    except grpc.RpcError as error:
                        tally.lose("wrong", f"a read failed beside a full disk: {error.details()}")
                stop.wait(0.01)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

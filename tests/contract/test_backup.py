"""`sessionctl backup` and `sessionstored restore` with real daemons: under writers, cut short, damaged."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import grpc
import pytest
from daemons import Daemon, DaemonDied, channel_to, clean_environment, wait_until
from sessionstore.cli import backing_up
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc as v1_grpc
from sessionstored.engine.jsonl import restoring
from wire import refusal

BIN = Path(sys.executable).parent
PATIENCE_S = 60.0
KEYS = ("churn:a", "churn:b", "churn:c")
Sessions = dict[str, tuple[int, list[bytes]]]
"""Key -> revision and messages."""


def run(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / command, *map(str, arguments)],
        env=clean_environment(), capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )


def back_up(daemon: Daemon, directory: Path) -> str:
    made = run("sessionctl", "--target", daemon.address, "backup", directory)
    assert made.returncode == 0, made.stderr
    return made.stdout


def restore(backup: Path, data: Path) -> str:
    made = run("sessionstored", "restore", backup, "--data", data)
    assert made.returncode == 0, made.stderr
    return made.stdout


def refused(backup: Path, data: Path) -> str:
    """Restore, which must be refused; returns why."""
    made = run("sessionstored", "restore", backup, "--data", data)
    assert made.returncode == 1, made.stdout
    assert "Traceback" not in made.stderr
    return made.stderr


def put(daemon: Daemon, key: str, *lines: bytes) -> v1.AppendMessagesResponse:
    return daemon.stub.AppendMessages(v1.AppendMessagesRequest(key=key, messages=b"\n".join(lines)))


def stored(daemon: Daemon) -> Sessions:
    found = {}
    for session in daemon.stub.ListSessions(v1.ListSessionsRequest(page_size=1000)).sessions:
        blocks = daemon.stub.ReadMessages(v1.ReadMessagesRequest(key=session.key))
        found[session.key] = session.revision, b"".join(block.messages for block in blocks).splitlines()
    return found


def leftovers(daemon: Daemon) -> list[str]:
    return [name for name in os.listdir(daemon.data) if name.startswith(".backup-")]


# ----------------------------------------------------------------------------------- under writers


class Writer(threading.Thread):
    """Writes until told to stop, and knows what was acknowledged."""

    def __init__(self, address: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._channel = channel_to(address)
        self.stub = v1_grpc.SessionStoreStub(self._channel)
        self._stopping = stop
        self.acknowledged = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self.step()
                self.acknowledged += 1
        except Exception as error:
            self.failure = error
        finally:
            self._channel.close()

    def step(self) -> None:
        raise NotImplementedError


class Pair(Writer):
    """Writes the same number first into one session, then into another."""

    def __init__(self, address: str, stop: threading.Event, name: str) -> None:
        super().__init__(address, stop)
        self.keys = f"{name}:first", f"{name}:second"

    def step(self) -> None:
        for key in self.keys:
            self.stub.AppendMessages(
                v1.AppendMessagesRequest(key=key, messages=b'{"n":%d}' % self.acknowledged)
            )


class Churn(Writer):
    """Appends, rewrites, pops, deletes and forks on a few sessions; remembers what each step left."""

    def __init__(self, address: str, stop: threading.Event, seed: int) -> None:
        super().__init__(address, stop)
        self._rng = random.Random(seed)
        self.history: list[Sessions] = [{}]

    def step(self) -> None:
        now = dict(self.history[-1])
        key, other = self._rng.sample(KEYS, 2)
        line = b'{"n":%d,"pad":"%s"}' % (self.acknowledged, b"x" * self._rng.choice((1, 5000)))
        _, lines = now.get(key, (0, []))
        match self._rng.randrange(6) if lines else 5:
            case 0:
                self.stub.DeleteSession(v1.DeleteSessionRequest(key=key))
                del now[key]
            case 1:
                request = v1.ReplaceMessagesRequest(key=key, start=0, delete_count=1, messages=line)
                result = self.stub.ReplaceMessages(request).result
                now[key] = result.revision, [line, *lines[1:]]
            case 2:
                result = self.stub.PopMessage(v1.PopMessageRequest(key=key)).result
                now[key] = result.revision, lines[:-1]
            case 3 if other not in now:
                result = self.stub.ForkSession(v1.ForkSessionRequest(key=other, source_key=key)).result
                now[other] = result.revision, lines
            case _:
                request = v1.AppendMessagesRequest(key=key, messages=line)
                result = self.stub.AppendMessages(request).result
                now[key] = result.revision, [*lines, line]
        self.history.append(now)


@contextmanager
def writing(daemon: Daemon, seed: int) -> Iterator[tuple[list[Pair], Churn]]:
    stop = threading.Event()
    pairs = [Pair(daemon.address, stop, f"pair{n}") for n in range(3)]
    churn = Churn(daemon.address, stop, seed)
    writers: list[Writer] = [*pairs, churn]
    for writer in writers:
        writer.start()
    try:
        yield pairs, churn
    finally:
        stop.set()
        for writer in writers:
            writer.join(PATIENCE_S)
    assert [writer.failure for writer in writers] == [None] * 4


def test_a_backup_beside_writers_is_the_store_at_one_moment(make_daemon, tmp_path):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    daemon = make_daemon(store="jsonl", flags=("--checkpoint-s-max", "0.1")).start()
    for n in range(60):  # so that a backup takes a while
        put(daemon, f"filler:{n}", *[b'{"n":%d,"pad":"%s"}' % (i, b"x" * 1000) for i in range(100)])
    filler = {key: found for key, found in stored(daemon).items() if key.startswith("filler")}
    backups = []
    with writing(daemon, seed) as (pairs, churn):
        for n in range(2):
            wait_until(lambda least=40 * (n + 1): all(w.acknowledged >= least for w in (*pairs, churn)),
                       PATIENCE_S, "writing")
            before = [writer.acknowledged for writer in pairs], churn.acknowledged
            told = back_up(daemon, tmp_path / f"backup{n}")
            assert " sessions in " in told
            backups.append((tmp_path / f"backup{n}", *before))
    assert daemon.terminate() == 0
    for backup, in_pairs, in_churn in backups:
        restore(backup, tmp_path / f"of-{backup.name}")
        restored = make_daemon(tmp_path / f"of-{backup.name}", store="jsonl").start()
        found = stored(restored)
        assert restored.terminate() == 0
        assert {key: value for key, value in found.items() if key in filler} == filler
        for pair, acknowledged in zip(pairs, in_pairs, strict=True):
            first, second = ([json.loads(line)["n"] for line in found[key][1]] for key in pair.keys)
            assert first == list(range(len(first)))
            assert second == first[: len(second)]
            assert acknowledged <= len(second) <= len(first) <= len(second) + 1
        of_churn = {key: value for key, value in found.items() if key in KEYS}
        assert of_churn in churn.history[in_churn:]


def test_the_restored_store_is_another_store_that_remembers(make_daemon, tmp_path):
    daemon = make_daemon(store="jsonl").start()
    for n in range(5):
        put(daemon, f"k{n}", b"{}")
    call = session_pb2.CallIdentity(client_id="c" * 36, sequence=1)
    request = v1.AppendMessagesRequest(key="k0", messages=b'{"once":1}', call=call)
    first = daemon.stub.AppendMessages(request)
    page = daemon.stub.ListSessions(v1.ListSessionsRequest(page_size=2))
    back_up(daemon, tmp_path / "backup")
    told = restore(tmp_path / "backup", tmp_path / "restored")
    restored = make_daemon(tmp_path / "restored", store="jsonl").start()
    old, new = (each.stub.GetServerInfo(v1.GetServerInfoRequest()).store_id for each in (daemon, restored))
    assert old != new
    assert f"its store id is {new}; the backup is of store {old}" in told
    assert stored(restored) == stored(daemon)
    again = restored.stub.AppendMessages(request)
    assert again.result.replayed
    assert (again.first_index, again.result.revision) == (first.first_index, first.result.revision)
    listing = v1.ListSessionsRequest(page_size=2, page_token=page.next_page_token)
    assert daemon.stub.ListSessions(listing).sessions
    assert refusal(lambda: restored.stub.ListSessions(listing)).reason == "PAGE_TOKEN_INVALID"
    late = put(daemon, "k1", b"{}").result.revision
    put(restored, "k1", b"{}")
    stale = v1.AppendMessagesRequest(key="k1", messages=b"{}", expected_revision=late)
    assert refusal(lambda: restored.stub.AppendMessages(stale)).reason == "REVISION_CONFLICT"
    modes = {oct(path.stat().st_mode & 0o777) for root in ("backup", "restored")
             for path in (tmp_path / root).rglob("*") if path.is_file()}
    assert modes == {"0o600"}
    assert {oct((tmp_path / name).stat().st_mode & 0o777)
            for name in ("backup", "backup/sessions", "restored", "restored/sessions")} == {"0o700"}


# ----------------------------------------------------------------------------------- cut short


def big(daemon: Daemon) -> None:
    """More than gRPC buffers on the way, so that the daemon is not done when the first block is there."""
    for n in range(30):
        put(daemon, f"big:{n}", b'{"pad":"%s"}' % (b"x" * (1 << 20)))


def test_a_daemon_that_is_killed_leaves_nothing_and_no_backup(make_daemon, tmp_path):
    daemon = make_daemon(store="jsonl").start()
    big(daemon)
    before = stored(daemon)
    blocks = daemon.stub.Backup(v1.BackupRequest())
    next(blocks)
    assert len(leftovers(daemon)) == 1
    daemon.kill()
    assert len(leftovers(daemon)) == 1
    backing_up.prepare(tmp_path / "backup")
    with pytest.raises(grpc.RpcError):
        backing_up.receive(blocks, tmp_path / "backup", lambda done, total: None)
    assert not (tmp_path / "backup/MANIFEST.json").exists()
    daemon.start()
    assert leftovers(daemon) == []
    assert stored(daemon) == before


def test_a_client_that_is_gone_ends_its_backup(make_daemon):
    daemon = make_daemon(store="jsonl").start()
    big(daemon)
    with channel_to(daemon.address) as channel:
        next(v1_grpc.SessionStoreStub(channel).Backup(v1.BackupRequest()))
        assert len(leftovers(daemon)) == 1
    wait_until(lambda: not leftovers(daemon), PATIENCE_S, "the end of the backup")


def test_a_stop_ends_a_backup(make_daemon):
    daemon = make_daemon(store="jsonl", flags=("--drain-s-max", "0.5")).start()
    big(daemon)
    blocks = daemon.stub.Backup(v1.BackupRequest())
    next(blocks)
    assert daemon.terminate() == 0
    assert leftovers(daemon) == []
    with pytest.raises(grpc.RpcError):
        list(blocks)


class Fake(v1_grpc.SessionStoreServicer):
    """A daemon that sends what it is told to, and then ends well, ends badly, or waits."""

    def __init__(self, replies: list[v1.BackupResponse], end: str) -> None:
        self._replies, self._end = replies, end
        self.go_on = threading.Event()

    def GetServerInfo(self, request, context):
        return v1.GetServerInfoResponse()

    def Backup(self, request, context):
        yield from self._replies
        if self._end == "wait":
            self.go_on.wait(PATIENCE_S)
        if self._end != "well":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the machine fell over")


@contextmanager
def fake(replies: list[v1.BackupResponse], end: str = "well") -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    servicer = Fake(replies, end)
    v1_grpc.add_SessionStoreServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        servicer.go_on.set()
        server.stop(None).wait(PATIENCE_S)


def header() -> v1.BackupResponse:
    return v1.BackupResponse(header=v1.BackupHeader(store_id="s", format=1, session_count=1, bytes_total=9))


def file(path: str, data: bytes = b"{}\n", *, offset: int = 0, digest: str = "") -> v1.BackupResponse:
    end = v1.BackupFile(size=offset + len(data), digest=digest or sha256(data).hexdigest())
    return v1.BackupResponse(parts=[v1.BackupPart(path=path, offset=offset, data=data, end=end)])


def summary(files: int = 2) -> v1.BackupResponse:
    return v1.BackupResponse(summary=v1.BackupSummary(file_count=files, byte_count=3 * files))


JOURNAL = file("journal.db")
WHOLE = [header(), file("sessions/a.jsonl"), JOURNAL, summary()]


def test_what_a_daemon_sends_whole_is_a_backup(tmp_path):
    with fake(WHOLE) as address:
        made = run("sessionctl", "--target", address, "backup", tmp_path / "b")
    assert made.returncode == 0, made.stderr
    assert restoring.read_manifest(tmp_path / "b").session_count == 1


@pytest.mark.parametrize("replies", [
    [], WHOLE[:1], WHOLE[:3], WHOLE[1:], [header(), *WHOLE], [*WHOLE, JOURNAL],
    [header(), file("sessions/a.jsonl"), summary(1)],
    [header(), file("sessions/a.jsonl"), JOURNAL, summary(3)],
    [header(), file("sessions/a.jsonl"), file("sessions/a.jsonl"), JOURNAL, summary(3)],
    [header(), file("sessions/a.jsonl", digest="0" * 64), JOURNAL, summary()],
    [header(), file("sessions/a.jsonl", offset=1), JOURNAL, summary()],
    *([header(), file(path), JOURNAL, summary()] for path in (
        "../out", "sessions/../../out", "/out", "sessions/", "sessions/.", "sessions/..", "sessions/a/b",
        "out", "", "sessions", "MANIFEST.json", ".MANIFEST.json.tmp", "sessions/a\0b", "quarantine/../out",
        "./journal.db", "journal.db\n",
    )),
])  # fmt: skip
def test_what_is_no_whole_backup_is_none_and_nothing_lands_elsewhere(replies, tmp_path):
    directory = tmp_path / "in/b"
    backing_up.prepare(directory)
    with pytest.raises((backing_up.NotWholeError, OSError)):
        backing_up.receive(replies, directory, lambda done, total: None)
    assert not (directory / "MANIFEST.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["b"]
    with pytest.raises(restoring.RestoreError, match="no backup"):
        restoring.read_manifest(directory)


def test_a_hostile_daemon_is_one_line(tmp_path):
    with fake([header(), file("../out"), JOURNAL, summary()]) as address:
        made = run("sessionctl", "--target", address, "backup", tmp_path / "b")
    assert made.returncode == 1
    (line,) = made.stderr.splitlines()
    assert line.startswith("sessionctl: the daemon sent a file that no backup has: '../out'; ")
    assert f"{tmp_path / 'b'} is no backup" in line
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_connection_that_breaks_is_one_line_and_no_backup(tmp_path):
    with fake(WHOLE[:2], "badly") as address:
        made = run("sessionctl", "--target", address, "backup", tmp_path / "b")
    assert made.returncode == 1
    (line,) = made.stderr.splitlines()
    assert "the machine fell over" in line
    assert "is no backup" in line
    assert not (tmp_path / "b/MANIFEST.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_is_ended_leaves_no_backup(number, tmp_path):
    with fake(WHOLE[:3], "wait") as address:
        command = [BIN / "sessionctl", "--target", address, "backup", tmp_path / "b"]
        environment = clean_environment()
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as client:
            wait_until((tmp_path / "b/journal.db").exists, PATIENCE_S, "the journal's copy")
            client.send_signal(number)
            told = client.communicate(timeout=PATIENCE_S)[1]
    assert client.returncode == (1 if number == signal.SIGINT else -number)
    assert (f"interrupted; what is in {tmp_path / 'b'} is no backup" in told) == (number == signal.SIGINT)
    assert "MANIFEST.json is missing" in refused(tmp_path / "b", tmp_path / "data")


def test_a_directory_that_is_not_empty_is_left_alone(daemon, tmp_path):
    (tmp_path / "mine").write_text("mine")
    made = run("sessionctl", "--target", daemon.address, "backup", tmp_path)
    assert made.returncode == 1
    assert "not empty" in made.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_store_in_memory_says_that_it_has_none(daemon, tmp_path):
    made = run("sessionctl", "--target", daemon.address, "backup", tmp_path / "b")
    assert made.returncode == 1
    assert "a store in memory has no backup" in made.stderr
    assert refusal(lambda: list(daemon.stub.Backup(v1.BackupRequest()))).reason == "UNSUPPORTED"


# ----------------------------------------------------------------------------------- damaged


@pytest.fixture
def backup(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Path:
    """A small backup, with a file of each kind."""
    (tmp_path / "data0/sessions").mkdir(parents=True)
    (tmp_path / "data0/sessions/torn.jsonl").write_bytes(b'{"n":1}\n{"n":')
    daemon = make_daemon(tmp_path / "data0", store="jsonl").start()
    put(daemon, "a", b'{"n":1}')
    assert daemon.restart().process.poll() is None  # its file and catalogue row are there
    back_up(daemon, tmp_path / "backup")
    daemon.kill()
    return tmp_path / "backup"


def flip(path: Path, offset: int) -> Callable[[], None]:
    """Flip a bit of a byte; returns what flips it back."""
    def turn() -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1 << offset % 8]))

    turn()
    return turn


def test_a_flipped_bit_in_any_file_is_refused_by_name(backup, tmp_path):
    paths = sorted(path for path in backup.rglob("*") if path.is_file())
    assert {path.parent.name for path in paths} == {"backup", "sessions", "quarantine"}
    data = tmp_path / "data"
    for path in paths:
        size = path.stat().st_size
        every = range(size) if path.name == "MANIFEST.json" else {0, size // 2, size - 1}
        for offset in every:
            back = flip(path, offset)
            with pytest.raises(restoring.RestoreError, match=path.name):
                restoring.verify(backup, restoring.read_manifest(backup), lambda size: None)
            back()
        back = flip(path, size // 2)
        assert path.name in refused(backup, data)
        assert not data.exists()
        back()
    restore(backup, data)


def test_a_missing_or_shorter_file_is_refused_by_name(backup, tmp_path):
    path = backup / "sessions/a.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "sessions/a.jsonl: it has" in refused(backup, tmp_path / "data")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert "sessions/a.jsonl" in refused(backup, tmp_path / "data")
    path.unlink()
    assert "sessions/a.jsonl: No such file" in refused(backup, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_newer_backup_is_refused_by_name(backup, tmp_path):
    members = json.loads((backup / "MANIFEST.json").read_text())
    for name in ("format", "store_format"):
        (backup / "MANIFEST.json").write_text(json.dumps(members | {name: 99}))
        assert "use a newer sessionstored" in refused(backup, tmp_path / "data")


def test_a_relative_directory_is_as_good_as_any(backup, make_daemon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    restore(Path("backup"), Path("restored"))
    assert set(stored(make_daemon(tmp_path / "restored", store="jsonl").start())) == {"a", "torn"}


def test_directories_may_lie_where_their_owner_may_not_list(backup, tmp_path, monkeypatch):
    for name in ("b", "data"):
        (tmp_path / "above" / name).mkdir(parents=True)
    opened = os.open

    def open_(path: str | Path, flags: int, *arguments: object, **named: object) -> int:
        if Path(path) == tmp_path / "above":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", open_)
    backing_up.prepare(tmp_path / "above/b")
    assert backing_up.receive(WHOLE, tmp_path / "above/b", lambda done, total: None).file_count == 2
    assert restoring.restore(
        backup, tmp_path / "above/data", restoring.read_manifest(backup), lambda size: None
    )


def test_the_name_of_every_new_directory_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(backing_up, "_flush_directory", flushed.append)
    backing_up.prepare(tmp_path / "a/b")
    assert set(flushed) == {tmp_path, tmp_path / "a"}


def test_nothing_is_restored_over_anything(backup, make_daemon, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    assert "is not empty" in refused(backup, tmp_path / "mine")
    assert (tmp_path / "mine/file").read_text() == "mine"
    daemon = make_daemon(tmp_path / "served", store="jsonl").start()
    put(daemon, "mine", b"{}")
    assert "is not empty" in refused(backup, tmp_path / "served")
    assert list(stored(daemon)) == ["mine"]


def test_a_restore_that_did_not_finish_is_no_store(backup, make_daemon, tmp_path, monkeypatch):
    data = tmp_path / "data"

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(restoring, "_finish_journal", full)
    manifest = restoring.read_manifest(backup)
    with pytest.raises(restoring.RestoreError, match="No space left"):
        restoring.restore(backup, data, manifest, lambda size: None)
    with pytest.raises(DaemonDied, match="did not finish"):
        make_daemon(data, store="jsonl").start()
    assert "did not finish" in refused(backup, data)
    for command in ("check", "repair"):
        done = run("sessionstored", command, "--data", data)
        assert (done.returncode, done.stdout) == (1, "")
        assert "did not finish" in done.stderr


def test_a_damaged_session_is_named_by_both_and_the_rest_is_served(make_daemon, tmp_path):
    data = tmp_path / "data0"
    (data / "sessions").mkdir(parents=True)
    (data / "sessions/bad.jsonl").write_bytes(b'{"n":1}\nnonsense\n{"n":2}\n')
    daemon = make_daemon(data, store="jsonl").start()
    put(daemon, "good", b"{}")
    made = run("sessionctl", "--target", daemon.address, "backup", tmp_path / "b")
    assert made.returncode == 1
    assert "bad: damaged: sessions/bad.jsonl: line 2" in made.stderr
    assert "2 sessions" in made.stdout
    (damaged,) = restoring.read_manifest(tmp_path / "b").damaged
    assert damaged["path"] == "sessions/bad.jsonl"
    told = run("sessionstored", "restore", tmp_path / "b", "--data", tmp_path / "restored")
    assert told.returncode == 0
    assert "damaged already when it was backed up: sessions/bad.jsonl" in told.stderr
    restored = make_daemon(tmp_path / "restored", store="jsonl").start()
    assert refusal(lambda: restored.stub.GetSession(v1.GetSessionRequest(key="bad"))).reason == "DATA_LOSS"
    assert restored.stub.GetSession(v1.GetSessionRequest(key="good")).messages == b"{}\n"
    assert (tmp_path / "restored/sessions/bad.jsonl").read_bytes() == b'{"n":1}\nnonsense\n{"n":2}\n'

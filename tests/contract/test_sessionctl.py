"""sessionctl against a real daemon: the command as a shell runs it, and interrupted imports from within."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Daemon, clean_environment
from seed_reader import read_session
from sessionstore import SessionStore
from sessionstore.cli import importing
from sessionstore.cli.importing import Outcome
from sessionstore.v1 import session_store_pb2 as v1

COMMAND = Path(sys.executable).parent / "sessionctl"
CREATED = "2026-02-23T09:00:00.123456+00:00"
LINES = [
    b'{"role": "user", "content": "hi", "n": 9007199254740993}', b'{"f": 1.10,"e": 1E5}', b'{"role":"tool"}',
]


class Ctl:
    """Runs the command on one daemon."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self, *arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = clean_environment() | {"SESSIONSTORE_TARGET": self.target}
        command = [str(COMMAND), *map(str, arguments)]
        return subprocess.run(
            command, input=stdin, env=environment, capture_output=True, check=False, timeout=120
        )

    def out(self, *arguments: str | Path, stdin: bytes = b"") -> str:
        """What it prints; it must succeed."""
        done = self(*arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def error(self, code: int, *arguments: str | Path, stdin: bytes = b"") -> str:
        """What it complains about; it must end with this code."""
        done = self(*arguments, stdin=stdin)
        assert done.returncode == code, (done.stdout.decode(), done.stderr.decode())
        assert b"Traceback" not in done.stderr
        return done.stderr.decode()


@pytest.fixture
def ctl(daemon: Daemon) -> Ctl:
    return Ctl(daemon.address)


def put(daemon: Daemon, key: str, *lines: bytes) -> None:
    daemon.stub.AppendMessages(v1.AppendMessagesRequest(key=key, messages=b"\n".join(lines or LINES)))


def stored(daemon: Daemon, key: str) -> list[bytes]:
    return daemon.stub.GetSession(v1.GetSessionRequest(key=key)).messages.splitlines()


# ------------------------------------------------------------------------------------------- look


def test_ls_lists_in_the_order_that_is_asked_for(daemon, ctl):
    for key in ("b:1", "a:2", "a:1", "ключ/✓"):
        put(daemon, key, b"{}")
    listed = [line.split()[-1] for line in ctl.out("ls").splitlines()]
    assert listed == ["a:1", "a:2", "b:1", "ключ/✓"]
    assert ctl.out("ls", "--prefix", "a:", "--order", "key-desc").split()[-1] == "a:1"
    newest = ctl.out("ls", "--order", "update-time-desc", "--limit", "1", "--json").splitlines()
    assert [json.loads(line)["key"] for line in newest] == ["ключ/✓"]
    assert set(json.loads(newest[0])) == {"key", "revision", "message_count", "last_consolidated", "metadata",
                                          "create_time", "update_time", "expire_time", "damage"}


def test_show_is_plain_in_a_pipe_and_json_gives_the_bytes(daemon, ctl):
    put(daemon, "a:b")
    shown = ctl.out("show", "a:b")
    assert "\x1b" not in shown
    assert re.search(r"^#0 user$\n^    hi$", shown, re.MULTILINE)
    assert ctl("show", "a:b", "--json").stdout == b"\n".join([*LINES, b""])
    assert ctl("show", "a:b", "--json", "--last", "2").stdout == b"\n".join([*LINES[1:], b""])
    assert ctl("show", "a:b", "--json", "--last", "0").stdout == b""
    assert "(messages 0 to 1 are not shown)" in ctl.out("show", "a:b", "--last", "1")


def test_show_reads_more_than_one_reply_holds(daemon, ctl):
    lines = [b'{"n": %d, "pad": "%s"}' % (n, b"x" * 100_000) for n in range(30)]
    for start in range(0, 30, 10):
        put(daemon, "large", *lines[start:start + 10])
    assert ctl("show", "large", "--json").stdout.splitlines() == lines
    assert ctl("show", "large", "--json", "--last", "20").stdout.splitlines() == lines[10:]


def test_show_has_colours_on_a_terminal(daemon):
    put(daemon, "a:b", b'{"role":"user","content":"\\u001b[2Jhi"}')
    environment = clean_environment() | {"SESSIONSTORE_TARGET": daemon.address, "TERM": "xterm-256color"}
    reader, writer = os.openpty()
    done = subprocess.run([COMMAND, "show", "a:b"], stdout=writer, env=environment, check=True, timeout=120)
    os.close(writer)
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert done.returncode == 0
    assert "\x1b[1;32m#0 user" in shown
    assert "\x1b[2J" not in shown
    assert "\\x1b[2Jhi" in shown


def test_info_tells_what_serves(daemon, ctl):
    told = ctl.out("info")
    info = daemon.stub.GetServerInfo(v1.GetServerInfoRequest())
    assert info.store_id in told
    assert f"durability         {info.durability}" in told


# ------------------------------------------------------------------------------------------- write


def test_append_takes_json_text_and_lines(daemon, ctl):
    told = ctl.out("append", "a:b", "--role", "user", "--content", "hi\n✓")
    assert "1 message appended from index 0" in told
    ctl.out("append", "a:b", '{"n": 1E5}', '{\n "two": [1,\n2]}')
    told = ctl.out("append", "a:b", stdin=b'{"three":3}\r\n\n{"four":4}')
    assert "2 messages appended from index 3, revision" in told
    assert stored(daemon, "a:b") == ['{"role": "user", "content": "hi\\n✓"}'.encode(), b'{"n": 1E5}',
                                     b'{"two": [1, 2]}', b'{"three":3}', b'{"four":4}']


def test_append_sends_what_is_too_much_for_one_call_in_several(make_daemon):
    daemon = make_daemon(flags=("--batch-messages-max", "4")).start()
    lines = [b'{"n":%d}' % n for n in range(10)]
    told = Ctl(daemon.address).out("append", "a:b", stdin=b"\n".join(lines))
    assert stored(daemon, "a:b") == lines
    assert [int(line.split()[1]) for line in told.splitlines()] == [4, 4, 2]


@pytest.mark.parametrize(("arguments", "stdin", "code", "says"), [
    (["[1]"], b"", 1, "message 0 must be a JSON object"),
    (['{"a":1}', '{"a":NaN}'], b"", 1, "message 1 holds NaN"),
    (['{"_type":"metadata"}'], b"", 1, "_type"),
    ([], b'{"a":1}\n{"a"', 1, "message 1"),
    ([], b"\n", 2, "no message"),
    (["--role", "user"], b"", 2, "belong together"),
    (["--role", "user", "--content", "x", "{}"], b"", 2, "either"),
])
def test_append_of_something_else_stores_nothing(daemon, ctl, arguments, stdin, code, says):
    assert says in ctl.error(code, "append", "a:b", *arguments, stdin=stdin)
    assert list(daemon.stub.ListSessions(v1.ListSessionsRequest()).sessions) == []


def test_rm_removes_only_when_told_so(daemon, ctl):
    for key in ("a", "b"):
        put(daemon, key)
    assert "--yes" in ctl.error(2, "rm", "a", stdin=b"y\n")
    error = ctl.error(1, "rm", "--yes", "a", "missing", "b")
    assert "missing" in error
    assert list(daemon.stub.ListSessions(v1.ListSessionsRequest()).sessions) == []


@pytest.mark.parametrize("arguments", [["append", "a"], ["rm", "a"]])
def test_without_a_stdin_there_is_nobody_to_ask(daemon, ctl, arguments):
    put(daemon, "a")
    shell = ["sh", "-c", 'exec "$0" "$@" <&-', str(COMMAND), "--target", ctl.target, *arguments]
    done = subprocess.run(shell, env=clean_environment(), capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"there is no" in done.stderr
    assert b"Traceback" not in done.stderr
    assert stored(daemon, "a") == LINES


def test_errors_are_one_line(ctl):
    nobody = ctl.error(1, "ls", "--target", "127.0.0.1:1", "--timeout", "0.3")
    assert nobody.count("\n") == 1
    assert "127.0.0.1:1 within 0.3 s" in nobody
    assert ctl.error(1, "--target", "127.0.0.1:1", "--timeout", "0.3", "ls") == nobody
    assert ctl.error(1, "show", "a\nb").count("\n") == 1
    assert ctl.error(1, "ls", "--target", "nonsense").count("\n") == 1
    assert "no session has the key 'x'" in ctl.error(1, "show", "x")
    assert ctl.error(2, "ls", "--order", "size")


@pytest.mark.parametrize(
    "arguments", [["show"], ["append", "{}"], ["export"], ["export", "--out", "x"], ["rm", "--yes"]]
)
def test_a_key_that_is_no_utf8_is_one_line(ctl, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    command, *others = arguments
    said = ctl.error(1, command, "\udcff", *others)
    assert said.startswith("sessionctl: key holds half of a surrogate pair")
    assert said.count("\n") == 1


# ------------------------------------------------------------------------------------------- export


def test_export_gives_files_that_a_plain_reader_reads(daemon, ctl, tmp_path):
    keys = ["a:b", "a/b", "a_b", "A:B", "..", "ключ/✓", "k" * 512]
    for number, key in enumerate(keys):
        put(daemon, key, *LINES, b'{"n":%d}' % number)
    out = tmp_path / "out"
    done = ctl("export", "--all", "--out", out)
    assert (done.returncode, f"7 sessions with 28 messages exported to {out}\n") == (0, done.stdout.decode())
    # Three of those that share a name, and the one that is too long for one.
    assert done.stderr.decode().count("sessionctl: ") == 4
    read = {session.key: session for path in out.iterdir() if (session := read_session(path))}
    assert set(read) == set(keys)
    for number, key in enumerate(keys):
        assert read[key].messages == [*map(json.loads, LINES), {"n": number}]
    assert [path.name for path in sorted(tmp_path.glob("out/ключ*"))] == ["ключ_✓.jsonl"]


def test_export_of_one_session_to_stdout_and_to_a_directory_is_the_same(daemon, ctl, tmp_path):
    put(daemon, "a:b")
    text = ctl("export", "a:b").stdout
    assert text.splitlines()[1:] == LINES
    ctl.out("export", "a:b", "--out", tmp_path)
    assert (tmp_path / "a_b.jsonl").read_bytes() == text
    assert "is there already" in ctl.error(1, "export", "a:b", "missing", "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["a_b.jsonl"]


def test_metadata_of_an_adopted_file_that_utf8_cannot_write_is_told_as_an_escape(make_daemon, tmp_path):
    sessions = tmp_path / "data" / "sessions"
    sessions.mkdir(parents=True)
    write(sessions / "half.jsonl", "half", *LINES, metadata={"cut": "\ud83d", "title": "東"})
    write(sessions / "whole.jsonl", "whole", *LINES)
    ctl = Ctl(make_daemon(tmp_path / "data", store="jsonl").start().address)
    listed = [json.loads(line) for line in ctl.out("ls", "--json").splitlines()]
    assert listed[0]["metadata"] == {"cut": "\ud83d", "title": "東"}
    ctl.out("export", "--all", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["half.jsonl", "whole.jsonl"]
    back = read_session(tmp_path / "out" / "half.jsonl")
    assert back.metadata == {"cut": "\ud83d", "title": "東"}


@pytest.mark.parametrize("arguments", [[], ["--all", "a:b", "--out", "x"], ["a", "b"], ["--all"]])
def test_export_that_is_not_clear_is_refused(ctl, arguments):
    ctl.error(2, "export", *arguments)


# ------------------------------------------------------------------------------------------- import


def write(path: Path, key: str, *lines: bytes, **changed: object) -> Path:
    header = {"_type": "metadata", "key": key, "created_at": CREATED, "updated_at": CREATED,
              "metadata": {"title": "東京"}, "last_consolidated": 1} | changed
    path.write_bytes(b"\n".join([json.dumps(header).encode(), *lines, b""]))
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with healthy and damaged files."""
    sessions = tmp_path / "workspace" / "sessions"
    sessions.mkdir(parents=True)
    write(sessions / "a_b.jsonl", "a:b", *LINES)
    torn = write(sessions / "torn.jsonl", "torn:tail", *LINES)
    torn.write_bytes(torn.read_bytes() + b'{"role": "as')
    write(sessions / "bad.jsonl", "bad:middle", LINES[0], b'{"cut', LINES[1])
    write(sessions / "nan.jsonl", "nan:line", LINES[0], b'{"x": NaN}')
    write(sessions / "one.jsonl", "shared:key", LINES[0])
    write(sessions / "two.jsonl", "shared:key", LINES[1])
    write(sessions / "cursor.jsonl", "cursor:beyond", *LINES, last_consolidated=99)
    (sessions / "headerless.jsonl").write_bytes(b"\r\n".join([*LINES, b""]))
    (sessions / "zero.jsonl").write_bytes(b"")
    (sessions / "notes.txt").write_text("not a session\n")
    return sessions.parent


def counts(report: str) -> dict[str, int]:
    """The rows of the report's first table."""
    found = re.findall(r"^ (?:  )?(\w[\w, ]*?)  +([\d,]+)(?:  +[\d,]+)? *$", report, re.MULTILINE)
    return {name.strip(): int(count.replace(",", "")) for name, count in found}


def test_import_keeps_what_can_be_kept_and_reports_the_rest(daemon, ctl, workspace):
    before = {path: path.read_bytes() for path in (workspace / "sessions").iterdir()}
    done = ctl("import", workspace)
    report = done.stdout.decode()
    assert done.returncode == 1
    assert counts(report) == {"imported": 5, "one key in several files, left out": 2, "damaged, left out": 1,
                              "refused by the store": 1, "of these, cut at the end": 1}
    for words in ("line 3 is not a JSON object", "line 3: message 1 holds NaN", "also claimed by two.jsonl",
                  "the last line (5) is not a JSON object and was left out", "last_consolidated 99"):
        assert words in report, words

    heads = {head.key: head for head in daemon.stub.ListSessions(v1.ListSessionsRequest()).sessions}
    assert set(heads) == {"a:b", "torn:tail", "cursor:beyond", "headerless", "zero"}
    assert json.loads(heads["a:b"].metadata) == {"title": "東京"}
    assert heads["a:b"].create_time.ToJsonString() == "2026-02-23T09:00:00.123456Z"
    assert (heads["a:b"].last_consolidated, heads["cursor:beyond"].last_consolidated) == (1, 0)
    for key in ("a:b", "torn:tail", "cursor:beyond", "headerless"):
        assert stored(daemon, key) == LINES
    assert {path: path.read_bytes() for path in before} == before


def test_a_second_import_stores_nothing_twice_and_overwrites_nothing(daemon, ctl, workspace):
    ctl("import", workspace)
    put(daemon, "a:b", b'{"later": 1}')
    before = list(daemon.stub.ListSessions(v1.ListSessionsRequest()).sessions)
    done = ctl("import", workspace / "sessions")
    assert done.returncode == 1
    found = counts(done.stdout.decode())
    assert (found["already there"], found["different in the store, left alone"]) == (4, 1)
    assert "the store has 4 messages, the file 3" in done.stdout.decode()
    assert list(daemon.stub.ListSessions(v1.ListSessionsRequest()).sessions) == before


def test_a_refused_key_is_not_blamed_on_a_message(ctl, tmp_path):
    write(tmp_path / "nul.jsonl", "a\0b", *LINES)
    report = ctl("import", tmp_path).stdout.decode()
    assert "refused by the store" in report
    assert re.search(r"  key holds the control character U\+0000", report)


def test_an_import_of_healthy_files_ends_well_and_of_none_does_not(ctl, workspace, tmp_path):
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    shutil.copy(workspace / "sessions/a_b.jsonl", healthy)
    assert counts(ctl.out("import", healthy)) == {"imported": 1}
    assert counts(ctl.out("import", healthy)) == {"already there": 1}
    ctl.out("rm", "--yes", "a:b")
    assert counts(ctl.out("import", healthy)) == {"imported": 1}
    (healthy / "a_b.jsonl").unlink()
    assert "no session file" in ctl.error(1, "import", healthy)
    ctl.error(2, "import", tmp_path / "missing")


def test_what_was_exported_is_imported_again_byte_for_byte(daemon, ctl, make_daemon, workspace, tmp_path):
    ctl("import", workspace)
    ctl.out("export", "--all", "--out", tmp_path / "out")
    other = make_daemon().start()
    Ctl(other.address).out("import", tmp_path / "out")
    ours, theirs = (each.stub.ListSessions(v1.ListSessionsRequest()).sessions for each in (daemon, other))
    assert len(ours) == 5
    for mine, its in zip(ours, theirs, strict=True):
        same = ("key", "message_count", "last_consolidated", "metadata", "create_time")
        assert [getattr(mine, name) for name in same] == [getattr(its, name) for name in same]
        assert stored(daemon, mine.key) == stored(other, mine.key)


@pytest.fixture
def small_store(make_daemon: Callable[..., Daemon]) -> Iterator[SessionStore]:
    """A client of a daemon that takes four messages at a time."""
    daemon = make_daemon(flags=("--batch-messages-max", "4")).start()
    with SessionStore(daemon.address, timeout=60) as store:
        yield store


class StoppedError(Exception):
    """The import was interrupted."""


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("stop_at", range(1, 5))
def test_an_import_that_was_interrupted_within_a_session_goes_on(
    small_store, tmp_path, monkeypatch, stop_at, answered
):
    lines = [b'{"n":%d}' % n for n in range(10)]
    write(tmp_path / "a_b.jsonl", "a:b", *lines, last_consolidated=9)
    plan = importing.Plan.of(tmp_path)
    run, changes = small_store._driver.run, []

    def interrupted(operation):
        if operation.gi_code.co_name != "change":
            return run(operation)
        changes.append(operation)
        if len(changes) == stop_at and not answered:
            raise StoppedError
        answer = run(operation)
        if len(changes) == stop_at:
            raise StoppedError
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(small_store._driver, "run", interrupted)
        with pytest.raises(StoppedError):
            list(importing.run(small_store, plan))
    assert len(changes) == stop_at

    outcomes = [result.outcome for _ in range(2) for result in importing.run(small_store, plan)]
    whole = stop_at == 4 and answered
    assert outcomes == [Outcome.THERE if whole else Outcome.IMPORTED, Outcome.THERE]
    handle = small_store.session("a:b")
    assert [message["n"] for message in handle.messages] == list(range(10))
    assert (handle.last_consolidated, handle.metadata) == (9, {"title": "東京"})


def test_what_somebody_else_wrote_into_a_half_imported_session_is_left_alone(
    small_store, tmp_path, monkeypatch
):
    write(tmp_path / "a_b.jsonl", "a:b", *(b'{"n":%d}' % n for n in range(10)))
    plan = importing.Plan.of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(importing, "_add", lambda *_: True)
        assert [result.outcome for result in importing.run(small_store, plan)] == [Outcome.IMPORTED]
    small_store.session("a:b").append({"mine": True})
    for _ in range(2):
        assert [result.outcome for result in importing.run(small_store, plan)] == [Outcome.DIFFERENT]
    assert small_store.session("a:b").messages[4:] == ({"mine": True},)


def test_lease_tells_who_has_it(ctl: Ctl, daemon: Daemon) -> None:
    assert ctl.out("lease", "k") == "k: nobody has its lease\n"
    with SessionStore(daemon.address) as store:
        session = store.session("k")
        with session.turn(allow_appends=True, holder="agent\x1b") as turn:
            told = ctl.out("lease", "k")
        for wanted in ("agent", "s more", "of 60 s", "may append", str(turn.token)):
            assert wanted in told
        assert "\x1b" not in told
    assert ctl.error(1, "lease", "")


def test_watch_tells_what_changes_and_goes_on_from_a_cursor(daemon: Daemon, ctl: Ctl) -> None:
    put(daemon, "w:1")
    put(daemon, "x:1")
    command = [str(COMMAND), "watch", "--prefix", "w:", "--existing", "--limit", "3", "--json"]
    environment = clean_environment() | {"SESSIONSTORE_TARGET": daemon.address}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert (first["event"], first["key"], first["whole"]) == ("changed", "w:1", True)
        assert first["message_count"] == 3
        put(daemon, "w:1", b'{"n": 1}')
        put(daemon, "x:1")
        ctl.out("rm", "w:1", "--yes")
        second, third = map(json.loads, watching.stdout.readlines())
        assert watching.wait(60) == 0
    assert (second["messages"], second["start"], second["delete_count"]) == ([{"n": 1}], 3, 0)
    assert (third["event"], third["key"], third["expired"]) == ("deleted", "w:1", False)
    again = ctl.out("watch", "--prefix", "w:", "--cursor", second["cursor"], "--limit", "1", "--json")
    assert json.loads(again) == third


def test_watch_tells_people_in_lines(daemon: Daemon, ctl: Ctl) -> None:
    put(daemon, "w:1")
    daemon.stub.ForkSession(v1.ForkSessionRequest(key="w:2", source_key="w:1"))
    told = ctl.out("watch", "--prefix", "w:", "--existing", "--limit", "2")
    assert [line.split("  ", 1)[1] for line in told.splitlines()] == [
        "w:1  whole, 3 messages, revision 1", "w:2  whole, 3 messages, revision 2"
    ]  # fmt: skip


def test_watch_refuses_what_makes_no_sense(ctl: Ctl) -> None:
    assert "either KEY or --prefix" in ctl.error(2, "watch", "a", "--prefix", "b")
    assert "hexadecimal" in ctl.error(2, "watch", "a", "--cursor", "zz")
    assert "cursor" in ctl.error(1, "watch", "--cursor", "00")

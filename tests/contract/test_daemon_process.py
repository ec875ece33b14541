"""The daemon as a process: what it prints, where it listens, how it ends."""

import asyncio
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from daemons import Daemon, channel_to, clean_environment, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sessionstore import AsyncSessionStore, SessionStore
from sessionstore.manager import SessionManager
from sessionstore.v1 import session_store_pb2 as v1
from sessionstore.v1 import session_store_pb2_grpc
from wire import block, refusal, refusal_of

SERVICE = "sessionstore.v1.SessionStore"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A `sessionstored` that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "sessionstored", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean_environment() | environment,
    )


def refused_start(tmp_path: Path, *arguments: object) -> str:
    """What a daemon that cannot start says; it must not have said anything on stdout."""
    done = command("serve", "--store", "memory:", "--data", tmp_path / "data", *arguments)
    assert done.returncode in (1, 2), done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture
def short_path() -> Path:
    """A directory whose path leaves room for a socket's name."""
    directory = Path(tempfile.mkdtemp(prefix="ssd"))
    yield directory
    shutil.rmtree(directory)


# what it says -----------------------------------------------------------------------------------------------


def test_stdout_has_one_line_per_address_and_nothing_else(make_daemon, short_path):
    path = short_path / "run" / "sock"
    daemon = make_daemon(flags=("--listen", f"unix:{path}", "--listen", "[::1]:0")).start()
    wait_until(lambda: len(daemon.stdout) == 3, what="three lines")
    for line in daemon.stdout:
        address = line.removeprefix("listening on ").rstrip("\n")
        with channel_to(address) as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            assert stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=60).engine == "memory"
    assert daemon.stdout[1] == f"listening on unix:{path}\n"
    assert daemon.terminate() == 0
    assert len(daemon.stdout) == 3
    assert not path.exists()


def test_the_log_has_time_level_and_logger_on_each_line(make_daemon):
    daemon = make_daemon().start()
    assert daemon.terminate() == 0
    wait_until(lambda: "stopped cleanly" in daemon.stderr)
    for line in daemon.stderr.splitlines():
        moment, level, logger, text = line.split(" ", 3)
        assert time.strptime(moment.partition(".")[0], "%Y-%m-%dT%H:%M:%S")
        assert level in ("INFO", "WARNING")
        assert logger.startswith("sessionstored.")
        assert text
    assert f"pid {daemon.pid}" in daemon.stderr
    assert "anybody on this machine may read and write" in daemon.stderr


@pytest.mark.parametrize("arguments", [("serve", "--store", "jsonl", "--listen", "127.0.0.1:0"), ("config",)])
@pytest.mark.parametrize("stdout", ["/dev/full", "broken pipe", "closed"])
def test_a_stdout_that_takes_nothing_is_one_clear_line(tmp_path, arguments, stdout):
    if stdout == "broken pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    closed = ["sh", "-c", 'exec "$@" >&-', "sh"] if stdout == "closed" else []
    try:
        done = subprocess.run(
            [*closed, sys.executable, "-m", "sessionstored", *arguments, "--data", str(tmp_path)],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
            env=clean_environment(),
        )
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("sessionstored: stdout ")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_an_unknown_variable_is_warned_of_once(make_daemon):
    unknown = {"SESSIONSTORED_PAGE_SIZES_MAX": "7", "SESSIONSTORED_SERVICE_PORT": "7437"}
    daemon = make_daemon(environment=unknown).start()
    assert daemon.terminate() == 0
    assert daemon.stderr.count("SESSIONSTORED_PAGE_SIZES_MAX is no setting, and is ignored") == 1
    assert "did you mean SESSIONSTORED_PAGE_SIZE_MAX?" in daemon.stderr
    assert "SESSIONSTORED_SERVICE_PORT" not in daemon.stderr


def test_version():
    done = command("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sessionstored 0.")


def test_the_configuration_in_force_is_printed_with_its_sources(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("page_size_max = 7\n")
    done = command(
        "config", "--config", file, "--key-bytes-max", 9, SESSIONSTORED_LISTEN="localhost:1,unix:/s"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"page_size_max = 7  # {file}\n" in done.stdout
    assert "key_bytes_max = 9  # --key-bytes-max\n" in done.stdout
    assert 'listen = ["localhost:1", "unix:/s"]  # SESSIONSTORED_LISTEN\n' in done.stdout
    assert "message_bytes_max = 8388608  # default\n" in done.stdout


@pytest.mark.parametrize(
    ("text", "environment", "said"),
    [
        ("page_sizes_max = 7", {}, "my.toml: there is no setting 'page_sizes_max'; did you mean page_size"),
        ("listen = ['nowhere']", {}, "my.toml: 'nowhere' is no address"),
        ("", {"SESSIONSTORED_LISTEN": "nowhere"}, "SESSIONSTORED_LISTEN: 'nowhere' is no address"),
        ("listen = ['unix:/com,ma']", {}, "my.toml: 'unix:/com,ma' is no address: a socket's path"),
        ("listen = ['unix:/blank ']", {}, "my.toml: 'unix:/blank ' is no address: a socket's path"),
        ("", {"SESSIONSTORED_PAGE_SIZE_MAX": "x"}, "SESSIONSTORED_PAGE_SIZE_MAX must be a whole number"),
    ],
)
def test_a_wrong_configuration_is_a_usage_error(tmp_path, text, environment, said):
    file = tmp_path / "my.toml"
    file.write_text(text)
    done = command("serve", "--store", "memory:", SESSIONSTORED_CONFIG=str(file), **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_directory_whose_name_is_no_utf8_is_a_usage_error(tmp_path):
    done = command("serve", "--data", f"{tmp_path}/\udcff", "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--data must be UTF-8 without NUL" in done.stderr
    assert "Traceback" not in done.stderr


# where it serves --------------------------------------------------------------------------------------------


def test_the_default_address_and_directory_are_the_users_own(make_daemon, short_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "sessionstored", "serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean_environment()
        | {"XDG_RUNTIME_DIR": str(short_path), "XDG_DATA_HOME": str(short_path / "share")},
    )
    try:
        sock = short_path / "sessionstore" / "sock"
        assert process.stdout.readline() == f"listening on unix:{sock}\n"
        assert stat.S_IMODE(sock.stat().st_mode) == 0o600
        assert stat.S_IMODE(sock.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE((short_path / "share" / "sessionstore").stat().st_mode) == 0o700
        process.terminate()
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_dead_daemons_socket_is_taken_over_and_a_live_ones_is_not(make_daemon, short_path):
    sock = short_path / "sock"
    daemon = make_daemon(listen=f"unix:{sock}").start()
    said = refused_start(short_path, "--listen", f"unix:{sock}")
    assert f"--listen unix:{sock}: another daemon serves there" in said
    assert daemon.stub.GetServerInfo(v1.GetServerInfoRequest()).engine == "memory"
    daemon.kill()
    assert sock.exists()
    daemon.start()
    assert stat.S_IMODE(sock.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["ha#sh", "qu?est", "per%41cent", "100%", "bl nk ✓", "co:lon;[x]"])
def test_a_sockets_path_is_a_path_whatever_a_uri_would_make_of_it(make_daemon, short_path, name):
    address = f"unix:{short_path}/{name}"
    daemon = make_daemon(store="jsonl", listen=address).start()
    assert daemon.stdout == [f"listening on {address}\n"]
    assert [path.name for path in short_path.iterdir()] == [name]
    with SessionStore(address) as store:
        store.create("k")

    async def exists() -> bool:
        async with AsyncSessionStore(address) as store:
            return await store.get("k") is not None

    assert asyncio.run(exists())
    with SessionManager(daemon.data) as manager:
        assert [each["key"] for each in manager.list_sessions()] == ["k"]
    told = command("health", "--target", address)
    assert (told.returncode, told.stdout) == (0, f"{address}: {SERVICE} is SERVING\n")
    ctl = [Path(sys.executable).parent / "sessionctl", "--target", address, "ls"]
    assert "k" in subprocess.run(ctl, capture_output=True, check=True, timeout=120, text=True).stdout
    daemon.kill()
    daemon.start()  # what is left of the dead one is found in its place
    assert daemon.terminate() == 0
    assert list(short_path.iterdir()) == []


def test_a_file_in_the_sockets_place_is_left_alone(short_path):
    (short_path / "file").write_text("precious")
    said = refused_start(short_path, "--listen", f"unix:{short_path}/file")
    assert "is no socket" in said
    assert (short_path / "file").read_text() == "precious"


def test_a_port_in_use_is_named_with_the_flag(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused_start(tmp_path, "--listen", f"127.0.0.1:{port}")
    assert f"--listen 127.0.0.1:{port}: Address already in use" in said
    assert "choose another address with --listen" in said


def test_a_port_of_another_daemon_is_not_shared(make_daemon, tmp_path):
    daemon = make_daemon().start()
    assert "Address already in use" in refused_start(tmp_path, "--listen", daemon.address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_other_addresses_than_loopback_need_the_word(tmp_path, address):
    said = refused_start(tmp_path, "--listen", address)
    assert f"--listen {address} is no loopback address" in said
    assert "--insecure" in said


def test_with_the_word_they_are_served_with_a_warning(make_daemon):
    daemon = make_daemon(listen="0.0.0.0:0", flags=("--insecure",)).start()
    wait_until(lambda: "0.0.0.0:0: anybody who reaches it" in daemon.stderr, what="the warning")
    port = daemon.address.rpartition(":")[2]
    assert command("health", "--target", f"127.0.0.1:{port}").returncode == 0


@pytest.mark.parametrize(
    "address", ["7437", ":7437", "localhost", "localhost:http", "::1:7437", "[::g]:1", "h:65536", "unix:", "http://h:1"]
)
def test_a_bad_address_is_a_usage_error(tmp_path, address):
    done = command("serve", "--store", "memory:", "--listen", address)
    assert done.returncode == 2
    assert f"--listen: {address!r} is no address" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_that_is_too_long_for_a_socket_is_a_usage_error():
    done = command("serve", "--store", "memory:", "--listen", "unix:/" + "x" * 107)
    assert done.returncode == 2
    assert "at most 107 bytes, not 108" in done.stderr


@pytest.mark.parametrize("store", ["redis:", "jsonl:/somewhere", "memory://x"])
def test_an_unknown_store_is_refused(tmp_path, store):
    done = command("serve", "--store", store, "--data", tmp_path, "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert f"sessionstored: --store {store}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_daemon_on_a_directory_is_refused_with_pid_and_address(make_daemon):
    daemon = make_daemon(store="jsonl").start()
    done = command("serve", "--data", daemon.data, "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (1, "")
    assert str(daemon.pid) in done.stderr
    assert daemon.address in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_leaves_the_directory_free(make_daemon, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = command("serve", "--data", tmp_path / "data", "--listen", address)
        assert done.returncode == 1
    assert make_daemon(tmp_path / "data", store="jsonl").start().terminate() == 0


# health, reflection -----------------------------------------------------------------------------------------


def health(daemon: Daemon, service: str) -> int:
    with channel_to(daemon.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status


def test_health(shared_daemon):
    assert health(shared_daemon, "") == SERVING
    assert health(shared_daemon, SERVICE) == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health(shared_daemon, "other")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_health_command(shared_daemon):
    done = command("health", "--target", shared_daemon.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{shared_daemon.address}: {SERVICE} is SERVING\n"
    by_target = command("health", SESSIONSTORE_TARGET=shared_daemon.address)
    by_listen = command("health", SESSIONSTORED_LISTEN=shared_daemon.address)
    assert by_target.stdout == by_listen.stdout == done.stdout


def test_the_health_command_asks_no_web_proxy(shared_daemon):
    done = command("health", "--target", shared_daemon.address, http_proxy="http://127.0.0.1:1")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_health_command_takes_a_list_as_clients_do(shared_daemon, short_path):
    done = command("health", SESSIONSTORE_TARGET=f"unix:{short_path}/nobody, {shared_daemon.address}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{shared_daemon.address}: {SERVICE} is SERVING\n"
    assert f"unix:{short_path}/nobody: UNAVAILABLE" in done.stderr


def test_the_health_command_names_whom_it_asked_in_vain(short_path):
    done = command("health", "--target", f"unix:{short_path}/nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"unix:{short_path}/nobody: UNAVAILABLE" in done.stderr


def test_reflection_lists_the_service(shared_daemon):
    with channel_to(shared_daemon.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=60
        )
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


# how it ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["memory:", "jsonl"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_answers_what_was_accepted_and_ends_with_0(make_daemon, store, number):
    daemon = make_daemon(store=store, flags=("--drain-s-max", "300")).start()
    stop = threading.Event()
    acknowledged: list[list[int]] = [[] for _ in range(4)]
    wrong: list[str] = []

    def write(writer: int) -> None:
        mine = acknowledged[writer]
        with channel_to(daemon.address) as channel:
            stub = session_store_pb2_grpc.SessionStoreStub(channel)
            for n in range(100_000):
                request = v1.AppendMessagesRequest(key=f"w{writer}", messages=block({"n": n}))
                try:
                    stub.AppendMessages(request, timeout=100)
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        wrong.append(f"{error.code()} {error.details()}")
                    return
                mine.append(n)
                if stop.is_set():
                    return

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, writer) for writer in range(4)]
        wait_until(lambda: sum(map(len, acknowledged)) > 100, what="100 appends")
        daemon.send_signal(number)
        code = daemon.wait()  # long before the drain would end by itself
        stop.set()
        for writer in writers:
            writer.result(100)
    assert wrong == []
    assert code == 0, daemon.stderr
    assert "still under way" not in daemon.stderr
    if daemon.store == "jsonl":
        daemon.start()
        for writer in range(4):
            got = daemon.stub.GetSession(v1.GetSessionRequest(key=f"w{writer}", last=0))
            # One more at the most: accepted, and its answer cut off.
            assert got.session.message_count - len(acknowledged[writer]) in (0, 1)


def stuck_stream(daemon: Daemon) -> grpc.Call:
    """A stream whose reader has stopped reading, so that the daemon cannot go on sending."""
    message = {"x": "y" * 1_000_000}
    for _ in range(3):
        daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=block(*[message] * 15)))
    stream = daemon.stub.ReadMessages(v1.ReadMessagesRequest(key="k"))
    next(stream)
    wait_until(lambda: is_idle(daemon.pid), what="the moment at which what gRPC buffers on the way is full")
    return stream


def is_idle(pid: int, for_s: float = 0.5) -> bool:
    """Whether a process, and this one that it talks to, did nothing and wanted to do nothing for a while."""

    def done() -> list[tuple[str, str]]:
        """User and system time of each thread that does not run."""
        own = str(threading.get_native_id())
        found = []
        for each in (pid, os.getpid()):
            for path in sorted(Path(f"/proc/{each}/task").iterdir()):
                state, *rest = (path / "stat").read_text().rpartition(")")[2].split()
                if path.name != own and state != "R":
                    found.append((path.name, f"{rest[10]} {rest[11]}"))
        return found

    def threads() -> int:
        return sum(len(list(Path(f"/proc/{each}/task").iterdir())) for each in (pid, os.getpid()))

    try:
        before = done()
        time.sleep(for_s)
        return before == done() and len(before) == threads() - 1
    except (FileNotFoundError, ProcessLookupError):  # a thread that ended just now
        return False


def test_open_streams_do_not_hold_up_the_end_and_health_says_so_first(make_daemon):
    daemon = make_daemon(flags=("--drain-s-max", "300")).start()
    with channel_to(daemon.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watch).status == SERVING
        daemon.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        assert daemon.wait() == 0  # long before the drain would end by itself
        assert "still under way" not in daemon.stderr


def test_a_reader_that_does_not_read_holds_up_the_end_for_no_longer_than_the_drain(make_daemon):
    daemon = make_daemon(flags=("--drain-s-max", "0.5")).start()
    stream = stuck_stream(daemon)
    assert daemon.terminate() == 0
    assert "1 calls were still under way after 0.5 s" in daemon.stderr
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_new_work_is_refused_while_the_daemon_drains(make_daemon):
    daemon = make_daemon(flags=("--drain-s-max", "300")).start()
    stream = stuck_stream(daemon)
    daemon.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM: stopping" in daemon.stderr)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.GetSession(v1.GetSessionRequest(key="k"), timeout=60)
    got = refusal_of(caught.value)
    assert (got.code, got.reason, got.metadata) == ("UNAVAILABLE", "SHUTTING_DOWN", {})
    stream.cancel()
    assert daemon.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_store_is_being_opened_ends_it_soon(make_daemon, tmp_path, number):
    slow = (
        "import sys, time\n"
        "from sessionstored.engine.jsonl.recovery import Recovery\n"
        "Recovery.run = lambda self, **_: (print('opening', file=sys.stderr, flush=True), time.sleep(200))\n"
        "from sessionstored.cli import main\n"
        "main()\n"
    )
    arguments = ["serve", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0", "--log-level", "error"]
    with subprocess.Popen(
        [sys.executable, "-c", slow, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    ) as process:
        try:
            assert "opening" in process.stderr.readline()
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)  # long before the store is open
        finally:
            process.kill()
    assert (process.returncode, stdout) == (128 + number, "")
    assert "stopped while the store was being opened" in stderr
    assert make_daemon(tmp_path / "data", store="jsonl").start().terminate() == 0


def test_a_second_signal_ends_it_at_once(make_daemon):
    daemon = make_daemon(flags=("--drain-s-max", "300")).start()
    stream = stuck_stream(daemon)
    daemon.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM: stopping" in daemon.stderr)
    assert daemon.process.poll() is None
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait() == 128 + signal.SIGTERM  # long before the drain would end by itself
    stream.cancel()


def test_the_daemon_serves_again_on_the_same_address(daemon):
    address, pid = daemon.address, daemon.pid
    daemon.restart(kill=True)
    assert (daemon.address, daemon.pid != pid) == (address, True)
    with channel_to(address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        assert stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=60).session_count == 0


# its bounds -------------------------------------------------------------------------------------------------


def test_more_calls_than_the_bound_are_refused(make_daemon):
    daemon = make_daemon(flags=("--concurrent-calls-max", "1", "--watchers-max", "1")).start()
    with channel_to(daemon.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)) for _ in range(2)]
        assert [next(watch).status for watch in watches] == [SERVING, SERVING]
        with pytest.raises(grpc.RpcError) as caught:
            daemon.stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=60)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        watches[0].cancel()
        wait_until(lambda: _answers(daemon), what="room for a call")
        watches[1].cancel()


def _answers(daemon: Daemon) -> bool:
    try:
        daemon.stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=60)
    except grpc.RpcError:
        return False
    return True


@pytest.mark.parametrize(
    "preface", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"], ids=["silent", "http2"]
)
def test_more_connections_than_descriptors_leave_the_store_its_own(make_daemon, preface):
    daemon = make_daemon(store="jsonl", descriptors_max=128).start()
    assert _answers(daemon)
    host, port = daemon.address.rsplit(":", 1)
    connections = [socket.create_connection((host, int(port)), timeout=60) for _ in range(200)]
    for connection in connections:
        with suppress(OSError):  # refused
            connection.sendall(preface)
    time.sleep(0.5)
    for n in range(60):
        daemon.stub.AppendMessages(v1.AppendMessagesRequest(key=f"k{n}", messages=b"{}\n"), timeout=60)
    for connection in connections:
        connection.close()
    with channel_to(daemon.address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=60, wait_for_ready=True)
    assert daemon.terminate() == 0


def test_a_request_beyond_every_bound_is_refused_before_it_is_read(shared_daemon):
    request = v1.AppendMessagesRequest(key="k", messages=b"x" * (40 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        shared_daemon.stub.AppendMessages(request, timeout=100)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert _answers(shared_daemon)


def test_a_request_somewhat_too_large_is_refused_by_name(shared_daemon):
    request = v1.AppendMessagesRequest(key="k", messages=b'{"x": "%s"}\n' % (b"x" * (18 << 20)))
    got = refusal(lambda: shared_daemon.stub.AppendMessages(request, timeout=100))
    assert got.reason == "BATCH_TOO_LARGE"
    assert got.metadata["limit_bytes"] == str(16 << 20)


async def test_a_burst_of_calls_within_the_bound_is_answered(shared_daemon):
    async with grpc.aio.insecure_channel(shared_daemon.address) as channel:
        stub = session_store_pb2_grpc.SessionStoreStub(channel)
        calls = [stub.GetServerInfo(v1.GetServerInfoRequest(), timeout=300) for _ in range(2_500)]
        assert len(await asyncio.gather(*calls)) == 2_500


def test_what_slow_readers_hold_is_bounded(make_daemon):
    daemon = make_daemon(flags=("--concurrent-bytes-max", str(4 << 20))).start()
    message = {"content": "x" * (3 << 19)}
    for _ in range(16):
        daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=block(message)), timeout=100)
    # Nobody reads on: gRPC takes some blocks of each stream, not all, and one more waits in the daemon.
    streams, reasons = [], []
    for _ in range(8):
        streams.append(daemon.stub.ReadMessages(v1.ReadMessagesRequest(key="k"), timeout=60))
        try:
            next(streams[-1])
        except grpc.RpcError as error:
            reasons.append(refusal_of(error).reason)
    assert reasons
    assert set(reasons) == {"OVERLOADED"}
    assert len(reasons) < len(streams)
    for stream in streams:
        stream.cancel()
    wait_until(lambda: _answers(daemon), what="room for a call")
    assert "incident" not in daemon.stderr


def test_a_call_whose_deadline_passed_is_not_applied(shared_daemon, key):
    request = v1.AppendMessagesRequest(key=key, messages=block({"n": 1}))
    with pytest.raises(grpc.RpcError) as caught:
        shared_daemon.stub.AppendMessages(request, timeout=-1)  # 0 may still be answered in time
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as caught:
        shared_daemon.stub.GetSession(v1.GetSessionRequest(key=key))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_limits_are_configured_and_told(make_daemon):
    environment = {"SESSIONSTORED_KEY_BYTES_MAX": "10"}
    daemon = make_daemon(flags=("--message-bytes-max", "100"), environment=environment).start()
    limits = daemon.stub.GetServerInfo(v1.GetServerInfoRequest()).limits
    assert (limits.message_bytes_max, limits.key_bytes_max) == (100, 10)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="k", messages=block({"x": "y" * 100})))
    assert refusal_of(caught.value).metadata == {"index": "0", "size_bytes": "109", "limit_bytes": "100"}

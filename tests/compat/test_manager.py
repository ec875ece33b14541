"""The drop-in's surface: `Session`, the manager's methods, its objects, and how it finds a daemon."""

import dataclasses
import gc
import inspect
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from compat.manager_fixtures import here, make_manager, store, texts, there, user
from daemons import Daemon, clean_environment
from seed_reader import read_session
from sessionstore import SessionStore, manager
from sessionstore.errors import (
    ConflictError,
    DataLossError,
    InvalidArgumentError,
    TooLargeError,
    UnavailableError,
)
from sessionstore.manager import Session, SessionManager

__all__ = ["here", "make_manager", "store", "there"]


# ---------------------------------------------------------------------------------------------------- Session


def test_a_session_has_exactly_these_fields_and_defaults() -> None:
    before = datetime.now()
    session = Session("k")
    names = ["key", "messages", "created_at", "updated_at", "metadata", "last_consolidated"]
    assert [field.name for field in dataclasses.fields(Session)] == names
    assert (session.messages, session.metadata, session.last_consolidated) == ([], {}, 0)
    assert before <= session.created_at <= session.updated_at <= datetime.now()
    assert session.created_at.tzinfo is None
    assert Session("k", created_at=before, updated_at=before) == Session("k", [], before, before, {}, 0)


def test_add_message_adds_role_content_timestamp_and_the_rest_in_order() -> None:
    session = Session("k", updated_at=datetime(2020, 1, 1))
    session.add_message("assistant", "hi", tool_calls=[1], name="n")
    session.add_message("user", "yo", timestamp="mine")
    first, second = session.messages
    assert list(first) == ["role", "content", "timestamp", "tool_calls", "name"]
    assert (first["role"], first["content"], first["tool_calls"]) == ("assistant", "hi", [1])
    assert datetime.fromisoformat(first["timestamp"]) <= session.updated_at <= datetime.now()
    assert second["timestamp"] == "mine"


def test_clear_empties_messages_and_keeps_metadata() -> None:
    session = Session("k", [user(1)], metadata={"a": 1}, last_consolidated=1, updated_at=datetime(2020, 1, 1))
    session.clear()
    assert (session.messages, session.last_consolidated, session.metadata) == ([], 0, {"a": 1})
    assert session.updated_at.year > 2020


def turns(count: int) -> list[dict[str, Any]]:
    """Well-formed turns: a user, a tool call, its result, an answer."""
    found: list[dict[str, Any]] = []
    for n in range(count):
        call = {"id": f"call{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        found += [
            {"role": "user", "content": f"q{n}", "timestamp": "t"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "r"},
            {"role": "tool", "tool_call_id": f"call{n}", "name": "f", "content": "result"},
            {"role": "assistant", "content": f"a{n}", "usage": {"n": n}},
        ]
    return found


@pytest.mark.parametrize("max_messages", [0, 4, 8, 9, 11, 40, 500])
@pytest.mark.parametrize("consolidated", [0, 4, 36, 40])
def test_get_history_of_a_well_formed_session(max_messages: int, consolidated: int) -> None:
    """The last messages that are not consolidated, from a user turn on, with what a model takes of them."""
    session = Session("k", turns(10), last_consolidated=consolidated)
    window = session.messages[consolidated:][-max_messages:]
    while window and window[0]["role"] != "user":
        del window[0]
    fields = ("role", "content", "tool_calls", "tool_call_id", "name")
    expected = [{name: message[name] for name in fields if name in message} for message in window]
    assert session.get_history(max_messages) == expected
    assert session.get_history() == session.get_history(max_messages=500)


def test_get_history_gives_copies_and_refuses_a_negative_limit() -> None:
    session = Session("k", turns(1))
    session.get_history()[1]["tool_calls"][0]["id"] = "changed"
    assert session.messages == turns(1)
    with pytest.raises(ValueError, match="-1"):
        session.get_history(-1)


def test_get_history_gives_more_fields_and_stays_within_a_budget() -> None:
    session = Session("k", turns(3))
    window = session.get_history(max_tokens=7, count_tokens=lambda _: 1, keep=("usage", "reasoning_content"))
    assert [message["content"] for message in window] == ["q2", None, "result", "a2"]
    assert (window[1]["reasoning_content"], window[3]["usage"]) == ("r", {"n": 2})
    with pytest.raises(ValueError, match="max_tokens"):
        session.get_history(max_tokens=7)


# ------------------------------------------------------------------------------------------------ the methods


def test_the_methods_take_what_they_always_took() -> None:
    methods = {
        "get_or_create": ["key"],
        "save": ["session"],
        "invalidate": ["key"],
        "list_sessions": [],
    }
    for name, names in methods.items():
        assert list(inspect.signature(getattr(SessionManager, name)).parameters)[1:] == names
    assert next(iter(inspect.signature(SessionManager).parameters)) == "workspace"


def test_reading_creates_nothing(here: SessionManager, store: SessionStore, key: str) -> None:
    session = here.get_or_create(key)
    assert (session.key, session.messages, session.metadata) == (key, [], {})
    assert store.get(key) is None


def test_what_is_saved_comes_back_as_it_was(
    here: SessionManager, there: SessionManager, key: str
) -> None:
    session = here.get_or_create(key)
    session.add_message("user", "🚀 ключ", big=2**53 + 1, float=0.1, deep={"z": None, "a": [True, 1, 1.0]})
    session.metadata = {"title": "東京", "tags": ["a"]}
    session.last_consolidated = 1
    here.save(session)
    again = there.get_or_create(key)
    assert repr(again.messages) == repr(session.messages)
    assert again == session
    assert again.created_at <= again.updated_at <= datetime.now() + timedelta(seconds=1)


def test_one_object_per_key_brought_up_to_date_unless_it_has_unsaved_changes(
    here: SessionManager, there: SessionManager, key: str
) -> None:
    session, theirs = here.get_or_create(key), there.get_or_create(key)
    theirs.add_message("user", "1")
    there.save(theirs)
    assert here.get_or_create(key) is session
    assert texts(session.messages) == ["1"]
    first = session.messages[0]
    theirs.add_message("user", "2")
    there.save(theirs)
    assert texts(session.messages) == ["1"], "nothing changes by itself"
    here.get_or_create(key)
    assert texts(session.messages) == ["1", "2"]
    assert session.messages[0] is first
    theirs.clear()
    there.save(theirs)
    for change in (
        lambda: session.metadata.update(a=1),
        lambda: session.messages.append(user("mine")),
        lambda: session.messages.append({"content": object()}),
    ):
        change()
        before = list(session.messages)
        assert here.get_or_create(key) is session
        assert session.messages == before
    del session.messages[-1]
    here.save(session)
    assert texts(session.messages) == ["mine"]


def test_invalidate_gives_another_object_and_the_old_one_can_still_be_saved(
    here: SessionManager, store: SessionStore, key: str
) -> None:
    old = here.get_or_create(key)
    old.add_message("user", "1")
    here.save(old)
    here.invalidate(key)
    here.invalidate("no such key")
    new = here.get_or_create(key)
    assert new is not old
    new.clear()
    here.save(new)
    old.add_message("user", "2")
    here.save(old)
    assert texts(old.messages) == texts(store.session(key).messages) == ["2"]
    assert here.get_or_create(key) is old


def test_an_object_saved_under_another_key_is_a_copy(
    here: SessionManager, store: SessionStore, key: str
) -> None:
    session = here.get_or_create(key)
    session.add_message("user", "1")
    here.save(session)
    session.key = key + "/copy"
    here.save(session)
    assert texts(store.session(key).messages) == texts(store.session(key + "/copy").messages) == ["1"]
    again = here.get_or_create(key)
    assert (again.key, again is session) == (key, False)
    assert here.get_or_create(key + "/copy") is session
    again.add_message("user", "2")
    here.save(again)
    assert texts(store.session(key).messages) == ["1", "2"]
    assert texts(store.session(key + "/copy").messages) == ["1"]


def test_list_sessions_gives_the_last_updated_first(
    here: SessionManager, store: SessionStore, key: str
) -> None:
    for name in ("b", "a", "c"):
        here.save(Session(f"{key}/{name}", created_at=datetime(2026, 2, 23, 9, 0, 0, 123456)))
    here.save(Session(f"{key}:a"))
    session = here.get_or_create(f"{key}/b")
    session.add_message("user", "1")
    here.save(session)
    found = [entry for entry in here.list_sessions() if entry["key"].startswith(key)]
    assert [entry["key"] for entry in found] == [f"{key}/b", f"{key}:a", f"{key}/c", f"{key}/a"]
    target = store._targets[0]
    assert found[0] == {
        "key": f"{key}/b",
        "created_at": "2026-02-23T09:00:00.123456",
        "updated_at": session.updated_at.isoformat(),
        "path": f"sessionstore://{target}/{key}/b",
    }


def test_bad_keys_are_refused(here: SessionManager) -> None:
    for bad in ("", "x" * 513, "a\0b", "\ud800", 1, None):
        with pytest.raises(InvalidArgumentError):
            here.get_or_create(bad)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError):
            here.save(Session(bad, [user(1)]))  # type: ignore[arg-type]


def test_a_creation_time_that_is_none_is_refused(here: SessionManager, store: SessionStore, key: str) -> None:
    with pytest.raises(InvalidArgumentError, match="created_at"):
        here.save(Session(key, [user(1)], created_at="yesterday"))  # type: ignore[arg-type]
    assert store.get(key) is None


def test_more_messages_than_one_call_takes(here: SessionManager, store: SessionStore, key: str) -> None:
    session = here.get_or_create(key)
    session.messages = [{"n": n} for n in range(20_500)]
    session.last_consolidated = 15_000
    here.save(session)
    stored = store.session(key)
    assert list(stored.messages) == session.messages
    assert stored.last_consolidated == 15_000
    session.messages[0]["n"] = session.messages[-1]["n"] = "both ends"
    with pytest.raises(TooLargeError):
        here.save(session)
    assert store.session(key).revision == stored.revision
    here.invalidate(key)
    session = here.get_or_create(key)
    session.messages[0]["n"] = "one end"
    here.save(session)
    session.messages[-1]["n"] = "the other"
    here.save(session)
    assert list(store.session(key).messages) == session.messages
    del session.messages[:-50]
    here.save(session)
    assert list(store.session(key).messages) == session.messages
    assert session.last_consolidated == 50


@pytest.mark.parametrize(
    ("limit", "text"),
    [(("--batch-messages-max", "100"), "x"), (("--batch-bytes-max", "20000"), "x" * 1000),
     (("--batch-bytes-max", "20000"), "x" * 10_000)],
    ids=["messages", "bytes", "more than the transport reads"],
)  # fmt: skip
def test_more_messages_than_one_call_takes_where_that_is_configured(
    make_daemon: Any, make_manager: Callable[..., SessionManager], limit: tuple[str, ...], text: str
) -> None:
    daemon = make_daemon(flags=limit).start()
    here, there = make_manager(daemon.address), make_manager(daemon.address)
    session = here.get_or_create("k")
    session.messages = [user(f"{n} {text}") for n in range(150)]
    here.save(session)  # created
    session.messages += [user(f"{n} {text}") for n in range(150, 400)]
    here.save(session)
    assert there.get_or_create("k").messages == session.messages
    session.messages = [user(f"other {n} {text}") for n in range(150)]
    with pytest.raises(TooLargeError):
        here.save(session)
    assert len(make_manager(daemon.address).get_or_create("k").messages) == 400


def test_a_failed_read_after_an_acknowledged_write_denies_nothing(
    here: SessionManager, store: SessionStore, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = here.get_or_create(key)
    here.save(session)
    store.session(key).append(user("theirs"))
    session.add_message("user", "mine")
    run = here._saver._run

    def writes_only(operation: Any) -> Any:
        if operation.gi_code.co_name == "read":
            raise UnavailableError("no")
        return run(operation)

    monkeypatch.setattr(here._saver, "_run", writes_only)
    here.save(session)
    assert texts(session.messages) == ["mine"]
    assert texts(store.session(key).messages) == ["theirs", "mine"]
    session.metadata["a"] = 1
    with pytest.raises(UnavailableError):
        here.save(session)
    monkeypatch.undo()
    session.add_message("user", "more")
    here.save(session)
    assert texts(session.messages) == texts(store.session(key).messages) == ["theirs", "mine", "more"]
    assert store.session(key).metadata == {"a": 1}


def test_a_session_that_others_write_without_end_is_given_up(
    here: SessionManager, store: SessionStore, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create(key, [user(1)])
    session = here.get_or_create(key)
    session.last_consolidated = 1
    run = here._saver._run

    def others_first(operation: Any) -> Any:
        store.session(key).update(patch={"n": time.monotonic()})
        return run(operation)

    monkeypatch.setattr(here._saver, "_run", others_first)
    with pytest.raises(ConflictError):
        here.save(session)
    monkeypatch.undo()
    here.save(session)
    assert store.session(key).last_consolidated == 1


# ------------------------------------------------------------------------------------------------ the objects


def test_the_manager_lets_go_of_what_is_stored_and_of_nothing_else(
    here: SessionManager, store: SessionStore, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "HELD_MAX", 4)
    unsaved = weakref.ref(here.get_or_create(f"{key}/unsaved"))
    unsaved().add_message("user", "mine")
    mine = here.get_or_create(f"{key}/mine")
    clean = []
    for n in range(12):
        session = here.get_or_create(f"{key}/{n}")
        session.add_message("user", "1")
        here.save(session)
        clean.append(weakref.ref(session))
    del session
    gc.collect()
    assert [each() is None for each in clean] == [True] * 9 + [False] * 3
    assert len(here._held) <= 5
    assert len(here._records) == 5, "nothing is remembered of objects that are gone"
    assert here.get_or_create(f"{key}/mine") is mine
    here.save(here.get_or_create(f"{key}/unsaved"))
    assert texts(store.session(f"{key}/unsaved").messages) == ["mine"]
    assert texts(here.get_or_create(f"{key}/0").messages) == ["1"]


def test_an_object_let_go_of_by_the_manager_still_merges(
    here: SessionManager, store: SessionStore, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "HELD_MAX", 1)
    session = here.get_or_create(key)
    session.add_message("user", "1")
    here.save(session)
    for n in range(3):
        here.get_or_create(f"{key}/{n}")
    assert key not in here._held
    store.session(key).append(user("theirs"))
    session.add_message("user", "2")
    here.save(session)
    assert texts(session.messages) == ["1", "theirs", "2"]


def test_threads_share_a_manager(here: SessionManager, store: SessionStore, key: str) -> None:
    start = threading.Barrier(8)

    def work(number: int) -> Session:
        start.wait()
        shared = here.get_or_create(key)
        for n in range(25):
            own = here.get_or_create(f"{key}/{number}")
            own.add_message("user", str(n))
            here.save(own)
        return shared

    with ThreadPoolExecutor(8) as threads:
        shared = list(threads.map(work, range(8)))
    assert all(session is shared[0] for session in shared)
    for number in range(8):
        assert texts(store.session(f"{key}/{number}").messages) == [str(n) for n in range(25)]


def test_one_session_saved_by_many_threads_at_once_is_stored_once(
    here: SessionManager, store: SessionStore, key: str
) -> None:
    session = Session(key, [user(n) for n in range(5)])
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(here.save, [session] * 16))
    assert texts(store.session(key).messages) == texts(session.messages) == ["0", "1", "2", "3", "4"]


def test_a_signal_handler_is_told_when_it_interrupted_the_very_save(
    here: SessionManager, store: SessionStore, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = here.get_or_create(key), here.get_or_create(key + "/other")
    session.add_message("user", "1")
    connection = here._store._driver._connection
    send, told = connection.send, []

    def handler(*_: object) -> None:
        assert here.get_or_create(key) is session
        other.add_message("user", "from the handler")
        here.save(other)
        with pytest.raises(RuntimeError, match="signal handler") as caught:
            here.save(session)
        told.append(caught.value)

    def interrupted(rpc: Any, timeout_s: float) -> Any:
        monkeypatch.setattr(connection, "send", send)
        signal.raise_signal(signal.SIGUSR1)
        return send(rpc, timeout_s)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        monkeypatch.setattr(connection, "send", interrupted)
        here.save(session)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(told) == 1
    assert texts(store.session(key).messages) == ["1"]
    assert texts(store.session(key + "/other").messages) == ["from the handler"]
    here.save(session)
    assert texts(store.session(key).messages) == ["1"]


def test_a_forked_child_goes_on(shared_daemon: Daemon, store: SessionStore, key: str) -> None:
    code = """
        import os, sys
        from sessionstore.manager import SessionManager
        manager = SessionManager(sys.argv[1], timeout=100)
        session = manager.get_or_create(sys.argv[2])
        session.add_message("user", "before")
        manager.save(session)
        record = manager._records[id(session)]
        record.lock.acquire()  # as if another thread were saving while this one forks
        child = os.fork()
        if child:
            record.lock.release()
        session.add_message("user", "parent" if child else "child")
        manager.save(session)
        if child:
            assert os.waitpid(child, 0)[1] == 0
            manager.save(session)
            print(len(session.messages))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), shared_daemon.address, key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean_environment())
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
    assert sorted(texts(store.session(key).messages)) == ["before", "child", "parent"]


def test_a_closed_manager_says_so(here: SessionManager, key: str) -> None:
    with here as entered:
        session = entered.get_or_create(key)
    here.close()
    for call in (lambda: here.save(session), lambda: here.get_or_create("other"), here.list_sessions):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# ---------------------------------------------------------------------------------------------- the workspace


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_a_path_finds_the_daemon_of_that_directory(
    make_daemon: Callable[..., Daemon],
    make_manager: Callable[..., SessionManager],
    tmp_path: Path,
    listen: str,
) -> None:
    where = f"unix:{tmp_path}/sock" if listen == "unix" else listen
    daemon = make_daemon(store="jsonl", listen=where).start()
    found = make_manager(daemon.data)
    assert found.workspace == daemon.data
    session = found.get_or_create("k")
    session.add_message("user", "1")
    found.save(session)
    assert found.list_sessions()[0]["path"] == f"sessionstore://{daemon.address}/k"
    daemon.restart(kill=True)
    session.add_message("user", "2")
    found.save(session)
    assert texts(make_manager(Path(daemon.data)).get_or_create("k").messages) == ["1", "2"]


def test_a_path_without_a_daemon_says_what_to_do(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    def advice(path: Path, *words: str) -> None:
        with pytest.raises(UnavailableError) as caught:
            SessionManager(path)
        for word in (f"`sessionstored serve --data {path}`", *words):
            assert word in str(caught.value)

    advice(tmp_path / "nothing", "does not exist")
    daemon = make_daemon(store="jsonl").start()
    daemon.terminate()
    advice(daemon.data, "was stopped")
    daemon.start()
    pid = daemon.pid
    daemon.kill()
    advice(daemon.data, f"process {pid}", "does not answer", daemon.address)
    lock = daemon.data / "LOCK"
    lock.write_text('{"pid": 7, "addresses": []}')
    advice(daemon.data, "process 7", "does not listen yet")
    for broken in ("{", "[]", '{"pid": 7}', "7"):
        lock.write_text(broken)
        advice(daemon.data, "cannot be read")
    lock.unlink()
    lock.mkdir()
    advice(daemon.data, "cannot be read")


def test_a_daemon_on_all_addresses_is_reached_on_this_machine(
    shared_daemon: Daemon, make_manager: Callable[..., SessionManager], tmp_path: Path, key: str
) -> None:
    port = shared_daemon.address.rpartition(":")[2]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    (tmp_path / "LOCK").write_text(json.dumps({"pid": 7, "addresses": [nobody, f"0.0.0.0:{port}"]}))
    found = make_manager(tmp_path)
    found.save(Session(key))
    assert found.get_or_create(key).key == key


def test_a_string_is_a_target_and_a_directory_is_not(tmp_path: Path) -> None:
    for wrong in (str(tmp_path), "~/workspace", f"127.0.0.1:1,{tmp_path}", 7, None, b"127.0.0.1:1"):
        with pytest.raises(InvalidArgumentError, match="Path"):
            SessionManager(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError):
        SessionManager("nonsense")


def test_a_target_without_a_daemon_is_told_in_time(make_manager: Callable[..., SessionManager]) -> None:
    with socket.socket() as bound:  # nobody listens there, and nobody else is given the port
        bound.bind(("127.0.0.1", 0))
        manager = make_manager(f"127.0.0.1:{bound.getsockname()[1]}", timeout=0.5)
        began_s = time.monotonic()
        with pytest.raises(UnavailableError, match="sessionstored serve"):
            manager.get_or_create("k")
        with pytest.raises(UnavailableError):
            manager.save(Session("k"))
    assert time.monotonic() - began_s < 60  # twice the time that it was given, on whatever machine


def test_sessions_dir_is_not_there_and_says_why(here: SessionManager) -> None:
    assert not hasattr(here, "sessions_dir")
    with pytest.raises(AttributeError, match="sessionctl export"):
        _ = here.sessions_dir


def test_a_workspace_of_files_goes_on_and_back(
    make_daemon: Callable[..., Daemon], make_manager: Callable[..., SessionManager], tmp_path: Path
) -> None:
    """Files of plain JSONL are adopted; damage is an error; what is saved can be read without the daemon."""
    files = tmp_path / "workspace" / "sessions"
    files.mkdir(parents=True)
    header = {
        "_type": "metadata",
        "key": "a:b",
        "created_at": "2026-02-23T09:00:00.123456",
        "updated_at": "2026-02-23T10:00:00",
        "metadata": {"title": "t"},
        "last_consolidated": 1,
    }
    lines = [header, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "n": 1e0}]
    (files / "a_b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (files / "bad.jsonl").write_text('{"role": "user"}\nnothing\n{"role": "user"}\n')
    daemon = make_daemon(tmp_path / "workspace", store="jsonl").start()
    found = make_manager(daemon.data)
    session = found.get_or_create("a:b")
    assert session.created_at == datetime(2026, 2, 23, 9, 0, 0, 123456)
    assert (session.messages, session.metadata, session.last_consolidated) == (lines[1:], {"title": "t"}, 1)
    for _ in range(2):
        with pytest.raises(DataLossError):
            found.get_or_create("bad")
        with pytest.raises(DataLossError):
            found.save(Session("bad", [user("would wipe it")]))
    session.messages[0]["content"] = "edited"
    session.add_message("user", "3")
    found.save(session)
    found.save(Session("a/b", [user("other")]))
    assert daemon.terminate() == 0
    plain = read_session(files / "a_b.jsonl")
    assert plain is not None
    assert plain.messages == session.messages
    assert (plain.metadata, plain.last_consolidated) == ({"title": "t"}, 1)
    assert (files / "bad.jsonl").read_text().count("\n") == 3


# --------------------------------------------------------------------------------------------------- the cost


def test_the_cost_of_a_save_beside_rewriting_the_file(
    make_daemon: Callable[..., Daemon],
    make_manager: Callable[..., SessionManager],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Times are printed only; what is held is what goes over the wire, which no busy machine changes."""
    found = make_manager(make_daemon(store="jsonl").start().address)
    session = found.get_or_create("k")
    session.messages = [{**message, "n": n} for n, message in enumerate(turns(2500))]
    found.save(session)
    connection = found._store._driver._connection
    send, sent_bytes = connection.send, 0

    def counted(rpc: Any, timeout_s: float) -> Any:
        nonlocal sent_bytes
        reply = send(rpc, timeout_s)
        sent_bytes += rpc.request.ByteSize() + sum(
            each.ByteSize() for each in (reply if isinstance(reply, list) else [reply])
        )
        return reply

    monkeypatch.setattr(connection, "send", counted)
    saves_s, rewrites_s = [], []
    for _ in range(15):
        session.add_message("user", "one more")
        began_s = time.perf_counter()
        found.save(session)
        saves_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        with open(tmp_path / "file", "w", encoding="utf-8") as file:
            for message in session.messages:
                file.write(json.dumps(message, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        rewrites_s.append(time.perf_counter() - began_s)
    save_s, rewrite_s = statistics.median(saves_s), statistics.median(rewrites_s)
    print(f"at 10,000 messages: save {save_s * 1e3:.1f} ms, rewriting the file {rewrite_s * 1e3:.1f} ms, "
          f"{rewrite_s / save_s:.1f} times as long")  # fmt: skip
    print(f"{sent_bytes // 15} bytes a save")
    assert sent_bytes // 15 < (tmp_path / "file").stat().st_size // 100

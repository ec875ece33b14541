"""The public surface: both clients alike, names loaded on first use, targets, one default address."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sessionstore
from sessionstore import _targets
from sessionstore.aio import AsyncSessionHandle, AsyncSessionStore
from sessionstore.client import SessionHandle, SessionStore
from sessionstore.errors import InvalidArgumentError
from sessionstored import config


def public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(cls) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("sync", "aio"), [(SessionStore, AsyncSessionStore), (SessionHandle, AsyncSessionHandle)]
)
def test_both_clients_have_the_same_names_and_signatures(sync: type, aio: type) -> None:
    assert public(sync).keys() == public(aio).keys()
    for name, method in public(sync).items():
        if not inspect.isfunction(method):
            continue
        ours, theirs = (
            [(p.name, p.kind, p.default, str(p.annotation)) for p in inspect.signature(m).parameters.values()]
            for m in (method, public(aio)[name])
        )
        assert ours == theirs, name
    ours, theirs = (inspect.signature(cls).parameters for cls in (sync, aio))
    assert list(ours) == list(theirs)


def test_every_public_name_is_there() -> None:
    assert dir(sessionstore) == sorted(sessionstore.__all__)
    for name in sessionstore.__all__:
        assert getattr(sessionstore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sessionstore.nothing
    assert repr(sessionstore.REMOVE) == "sessionstore.REMOVE"


def test_pure_modules_load_no_client() -> None:
    told = (
        "import sys, sessionstore, sessionstore.codec, sessionstore.history;"
        "print([name for name in sys.modules if 'grpc' in name or 'client' in name or 'aio' in name])"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"[]\n"


@pytest.mark.parametrize(
    "target",
    ["localhost:80", "127.0.0.1:1", "[::1]:65535", "unix:/x", "a.b-c:1, unix:/x,[fe80::1%lo]:2"],
)
def test_targets_that_can_be_meant(target: str) -> None:
    with SessionStore(target) as store:
        assert target.split(",")[0] in repr(store)


@pytest.mark.parametrize(
    "target",
    ["", " , ", "host", "host:", ":80", "host:port", "host:65536", "::1:80", "unix:", "unix:/a\0b", "http://h:80",
     80],
)
@pytest.mark.parametrize("cls", [SessionStore, AsyncSessionStore])
def test_targets_that_cannot_be_meant(cls: Any, target: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="target") as told:
        cls(target)
    assert told.value.metadata["field"] == "target"


@pytest.mark.parametrize("timeout", [0, -1, "soon", float("nan"), float("inf"), [1]])
@pytest.mark.parametrize("cls", [SessionStore, AsyncSessionStore])
def test_timeouts_that_cannot_be_meant(cls: Any, timeout: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout"):
        cls("localhost:1", timeout=timeout)


def test_the_environment_gives_target_and_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIONSTORE_TARGET", "here:1,there:2")
    monkeypatch.setenv("SESSIONSTORE_TIMEOUT", "2.5")
    assert _targets.resolve_targets(None) == ("here:1", "there:2")
    assert _targets.resolve_timeout_s(None) == 2.5
    assert _targets.resolve_targets("given:3") == ("given:3",)
    assert _targets.resolve_timeout_s(7) == 7.0
    monkeypatch.setenv("SESSIONSTORE_TARGET", "")
    monkeypatch.setenv("SESSIONSTORE_TIMEOUT", "")
    assert _targets.resolve_targets(None) == (_targets.default_socket(),)
    assert _targets.resolve_timeout_s(None) == 30.0


@pytest.mark.parametrize("runtime", [None, "", "relative", "/run/user/7"])
@pytest.mark.parametrize("uid", [0, 1000])
def test_sdk_and_daemon_agree_on_the_default_socket(
    monkeypatch: pytest.MonkeyPatch, runtime: str | None, uid: int
) -> None:
    monkeypatch.setattr("os.getuid", lambda: uid)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    environment = {} if runtime is None else {"XDG_RUNTIME_DIR": runtime}
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _targets.default_socket() == config.default_socket(environment, uid)


def test_a_user_without_a_place_finds_the_machines_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/run/sessionstore/sock")
    assert _targets.default_socket() == "unix:/run/sessionstore/sock"

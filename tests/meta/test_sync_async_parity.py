"""The sync and the async API are one API: the same public names, the same parameters in the same order.

Only what asyncio forces may differ: `with` becomes `async with`, iteration `async for`, a value an awaitable.
"""

import inspect
import re

import pytest
from sessionstore.aio import AsyncSessionHandle, AsyncSessionStore, AsyncTurn
from sessionstore.client import SessionHandle, SessionStore, Turn

PAIRS = [pytest.param(SessionStore, AsyncSessionStore, id="store"),
         pytest.param(SessionHandle, AsyncSessionHandle, id="handle"),
         pytest.param(Turn, AsyncTurn, id="turn")]
PROTOCOLS = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__"}
ENTRANCES = {"__init__", *PROTOCOLS, *PROTOCOLS.values()}


def public(cls: type) -> dict[str, object]:
    """Public attributes by their sync name, with __init__ and the context manager's methods."""
    names = [name for name in dir(cls) if not name.startswith("_") or name in ENTRANCES]
    found = {PROTOCOLS.get(name, name): inspect.getattr_static(cls, name) for name in names}
    return {name: value for name, value in found.items() if value is not object.__init__}


def annotation(value: object) -> str:
    """An annotation as text, with what asyncio forces taken out."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text)  # module paths
    text = re.sub(r"\bAsync(?=[A-Z])", "", text)
    return text.replace("'", "").replace('"', "")


def parameters(function: object) -> list[tuple[str, str, str, str]]:
    assert callable(function)
    return [(p.name, p.kind.name, repr(p.default), annotation(p.annotation))
            for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("sync", "async_"), PAIRS)
def test_the_public_names_are_the_same(sync: type, async_: type):
    assert sorted(public(sync)) == sorted(public(async_))


@pytest.mark.parametrize(("sync", "async_"), PAIRS)
def test_the_signatures_are_the_same(sync: type, async_: type):
    others = public(async_)
    compared = 0
    for name, value in public(sync).items():
        if inspect.isfunction(value):
            assert parameters(value) == parameters(others[name]), name
            compared += 1
        else:
            assert type(value) is type(others[name]), f"{name} is a property in one of them only"
    assert compared >= 5


@pytest.mark.parametrize(("sync", "async_"), PAIRS)
def test_only_the_async_one_is_awaited(sync: type, async_: type):
    def coroutines(cls: type) -> set[str]:
        return {name for name, value in public(cls).items() if inspect.iscoroutinefunction(value)}

    assert coroutines(sync) == set()
    assert coroutines(async_) != set()

"""Who may import whom. Held twice: by reading every import, and by what is loaded in a fresh process.

The statements name the culprit and its line; the process sees what arrives through others.
"""

import ast
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from meta.tools import ROOT, output_of

CLIENT = ROOT / "client"
SERVER = ROOT / "server"
SHARED = ("sessionstore.v1", "sessionstore.codec", "sessionstore.history")
NETWORK = ("grpc", "grpc_status", "grpc_health", "grpc_reflection")


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_files(root: Path, package: str) -> list[Path]:
    return [path for path in sorted((root / package).rglob("*.py")) if "_pb2" not in path.name]


def is_within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def called_imports(node: ast.Call, base: str) -> Iterator[str]:
    """What import_module("literal") and __import__("literal") import."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        name = str(node.args[0].value)
        yield f"{base}{name}" if name.startswith(".") else name


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Every (line, absolute dotted name) that the source imports, at any depth, also for type checkers only.

    `from a import b` gives a.b, which is right whether b is a module or not.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, name) for name in called_imports(node, package))


def imported_by(path: Path, root: Path) -> list[tuple[str, str]]:
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return [(f"{path.relative_to(ROOT)}:{line}", what) for line, what in imports(path.read_text(), package)]


def loaded_by(*modules: str) -> set[str]:
    """The names of all modules in a fresh process that imports these."""
    code = f"import importlib, json, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    return set(json.loads(output_of(sys.executable, "-c", code + "print(json.dumps(sorted(sys.modules)))")))


def pure_files() -> list[tuple[Path, Path]]:
    """The files that must not know of the network, each with its root."""
    engines = sorted((SERVER / "sessionstored/engine").rglob("*.py"))
    return [(CLIENT / "sessionstore/codec.py", CLIENT), (CLIENT / "sessionstore/history.py", CLIENT),
            (SERVER / "sessionstored/rules.py", SERVER), *((path, SERVER) for path in engines)]


@pytest.mark.parametrize(("source", "package", "expected"), [
    ("import sessionstored.rules as r", "sessionstore", "sessionstored.rules"),
    ("def f():\n  from sessionstored import rules", "sessionstore", "sessionstored.rules"),
    ("from . import client", "sessionstore", "sessionstore.client"),
    ("from ..v1 import x", "sessionstore.cli", "sessionstore.v1.x"),
    ("from .jsonl import files", "sessionstored.engine", "sessionstored.engine.jsonl.files"),
    ("importlib.import_module('grpc.aio')", "sessionstore", "grpc.aio"),
    ("import_module('.client', __name__)", "sessionstore", "sessionstore.client"),
])
def test_every_form_of_import_is_seen(source, package, expected):
    assert [name for _, name in imports(source, package)] == [expected]


def test_the_sdk_never_imports_the_daemon():
    found = [(where, name) for path in package_files(CLIENT, "sessionstore")
             for where, name in imported_by(path, CLIENT) if is_within(name, ["sessionstored"])]
    assert found == []


def test_the_daemon_imports_of_the_sdk_only_what_is_shared():
    found = [(where, name) for path in package_files(SERVER, "sessionstored")
             for where, name in imported_by(path, SERVER)
             if is_within(name, ["sessionstore"]) and not is_within(name, SHARED)]
    assert found == []


def test_the_daemon_loads_no_client():
    modules = [name for path in package_files(SERVER, "sessionstored")
               if not (name := module_name(path, SERVER)).endswith("__main__")]
    assert {"sessionstored.service", "sessionstored.server", "sessionstored.cli"} <= set(modules)
    loaded = {name for name in loaded_by(*modules) if is_within(name, ["sessionstore"])}
    assert {name for name in loaded if name != "sessionstore" and not is_within(name, SHARED)} == set()


def test_importing_the_sdk_loads_neither_client_nor_network():
    loaded = loaded_by("sessionstore")
    assert {name for name in loaded if is_within(name, ["sessionstore"])} == {"sessionstore"}
    assert {name for name in loaded if is_within(name, NETWORK)} == set()


def test_the_pure_modules_never_import_the_network():
    found = [(where, name) for path, root in pure_files()
             for where, name in imported_by(path, root) if is_within(name, NETWORK)]
    assert found == []


def test_the_pure_modules_load_no_network_through_others():
    loaded = loaded_by(*(module_name(path, root) for path, root in pure_files()))
    assert {name for name in loaded if is_within(name, NETWORK)} == set()

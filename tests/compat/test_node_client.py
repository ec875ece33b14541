"""A client in another language, made of the proto files alone. Only this test needs Node."""

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "node"
PROTO = Path(__file__).resolve().parents[2] / "proto"
INSTALL_TIMEOUT_S = 300
RUN_TIMEOUT_S = 120
MISSING = [name for name in ("node", "npm") if not shutil.which(name)]
needs_node = pytest.mark.skipif(
    bool(MISSING), reason=f"Only the Node test needs Node: there is no {' and no '.join(MISSING)} on PATH"
)
# What npm says when it cannot reach a registry: a fault of the surroundings, not of the client.
UNREACHABLE = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ENOTCACHED")


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the client with the packages of its lock file, exactly."""
    home = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(SOURCES, home, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "ci", "--prefer-offline", "--ignore-scripts", "--fetch-retries=1"]
    done = subprocess.run(
        command, cwd=home, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S
    )
    if done.returncode != 0 and UNREACHABLE.search(done.stderr):
        pytest.skip("npm ci reached no package registry, and its cache lacks a package of the lock file")
    assert done.returncode == 0, done.stderr
    return home / "client.js"


def run(client: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # Loopback only: a proxy in the environment would be asked for 127.0.0.1 as well.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = ["node", str(client), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S, env=environment
    )


@needs_node
def test_a_client_made_of_the_proto_files_appends_once_and_reads_the_bytes_back(node_client, daemon):
    done = run(node_client, daemon.address, PROTO, "node:ключ")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)

    assert seen["got"] == seen["streamed"] == seen["sent"]
    assert b"9007199254740993" in base64.b64decode(seen["got"])
    assert (seen["message_count"], seen["first"]["first_index"]) == ("2", "0")
    assert seen["again"]["result"].pop("replayed") is True
    assert seen["first"]["result"].pop("replayed") is False
    assert seen["again"] == seen["first"]
    assert seen["listed"] == ["node:ключ", "node:ключ/other"]
    assert seen["missing"] == "NOT_FOUND"


@needs_node
def test_it_says_how_it_is_used(node_client):
    done = run(node_client)
    assert done.returncode == 2
    assert "usage: node client.js" in done.stderr


def test_its_lock_file_holds_exact_versions_and_no_addresses():
    package = json.loads((SOURCES / "package.json").read_text())
    lock = json.loads((SOURCES / "package-lock.json").read_text())["packages"]
    wanted = package["dependencies"]
    assert {name for name, at in wanted.items() if not re.fullmatch(r"\d+\.\d+\.\d+", at)} == set()
    assert lock[""]["dependencies"] == wanted
    installed = {name: entry for name, entry in lock.items() if name}
    assert {"node_modules/@grpc/grpc-js", "node_modules/@grpc/proto-loader"} <= set(installed)
    assert [name for name, entry in installed.items() if "resolved" in entry] == []
    assert [name for name, entry in installed.items() if "integrity" not in entry] == []

"""docs/promises.md names the proof of each promise, and each of them exists."""

import ast
import re

import pytest
from crash.ladder import RUNGS
from meta.tools import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "promises.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]


def test_every_promise_of_the_embedded_engine_is_there() -> None:
    assert [int(row[0]) for row in ROWS] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 17, 18]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"promise {row[0]}")
def test_the_proofs_of_a_promise_exist(row: list[str]) -> None:
    proof = row[2]
    tests = re.findall(r"`(tests/[^`:]+)::(\w+)`", proof)
    faults = re.findall(r"\*([^*]+)\*", proof)
    assert tests or faults
    for path, name in tests:
        tree = ast.parse((ROOT / path).read_text())
        defined = [getattr(node, "name", "") for node in tree.body]
        assert name in defined, f"{path} has no {name}"
    assert set(faults) <= {rung.fault for rung in RUNGS}

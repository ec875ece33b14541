"""The environment is the same everywhere: all that the extras bring is pinned, to what runs here."""

import re
from collections.abc import Iterator
from importlib import metadata

from meta.tools import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """The canonical names of everything that a distribution with these extras needs, itself included."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    yield name
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if not marker or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield from needed(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def test_every_distribution_is_pinned_to_the_version_that_runs_here():
    names = set(needed("sessionstore", frozenset({"dev"}), set())) - {"sessionstore"}
    assert {"grpcio", "apsw", "rich", "pytest"} <= names
    pinned = pins()
    assert {name: pinned.get(name) for name in names} == {name: metadata.version(name) for name in names}


def test_constraints_hold_versions_and_no_addresses():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []

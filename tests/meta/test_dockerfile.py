"""The image's recipe, read as instructions: there is no engine to build it with here."""

import json
import re

import pytest
from meta.tools import ROOT

SETTINGS = r"^(?:--\S+ )*"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continuation lines joined, comments dropped."""
    code = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", " ", code)
    return [(word.upper(), rest.strip()) for line in joined.splitlines() if line.strip()
            for word, _, rest in [line.partition(" ")]]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def of_runtime(instruction: str) -> str:
    """The arguments of the runtime stage's one such instruction."""
    (arguments,) = [rest for word, rest in stages()[-1] if word == instruction]
    return arguments


def test_every_instruction_is_one_that_docker_knows():
    known = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
             "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} - known == set()


def test_it_builds_in_one_stage_and_runs_slim_in_another():
    builder, runtime = stages()
    assert builder[0][1].endswith(" AS builder")
    assert runtime[0] == ("FROM", "python:3.11-slim")
    # A virtual environment is moved between stages: both must have the same interpreter at the same place.
    assert builder[0][1].split()[0] == runtime[0][1]
    assert "pip" not in " ".join(rest for word, rest in runtime if word == "RUN")


def test_it_does_not_run_as_root():
    uid, gid = of_runtime("USER").split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    created = " ".join(rest for word, rest in stages()[-1] if word == "RUN")
    assert f"--uid {uid}" in created
    assert f"--gid {gid}" in created


def test_data_and_socket_belong_to_the_user_before_they_become_volumes():
    made = next(rest for word, rest in stages()[-1] if word == "RUN" and "install -d" in rest)
    volumes = json.loads(of_runtime("VOLUME"))
    assert volumes == ["/var/lib/sessionstore"]
    for path in [*volumes, "/run/sessionstore"]:
        assert re.search(rf"install -d -o sessionstore -g sessionstore -m 0700 .*{path}\b", made)


@pytest.mark.parametrize("instruction", ["ENTRYPOINT", "CMD"])
def test_the_process_is_started_without_a_shell(instruction: str):
    words = json.loads(of_runtime(instruction))
    assert all(isinstance(word, str) for word in words)


def test_it_serves_its_volume_on_the_socket_that_health_asks():
    command = json.loads(of_runtime("ENTRYPOINT")) + json.loads(of_runtime("CMD"))
    assert command[:2] == ["sessionstored", "serve"]
    assert command[command.index("--data") + 1] in json.loads(of_runtime("VOLUME"))
    listen = command[command.index("--listen") + 1]
    assert f"SESSIONSTORE_TARGET={listen}" in of_runtime("ENV")


def test_health_is_checked_and_stop_is_sigterm():
    check = re.sub(SETTINGS, "", of_runtime("HEALTHCHECK"))
    assert check.startswith("CMD ")
    assert json.loads(check.removeprefix("CMD ")) == ["sessionstored", "health"]
    assert of_runtime("STOPSIGNAL") == "SIGTERM"
    assert of_runtime("EXPOSE").isdigit()


def test_every_copied_source_exists_and_reaches_the_build():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from=" not in rest]
    sources = [source for copy in copies for source in copy]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in sent, f"{source} is kept from the build by .dockerignore"

"""What the docs tell people to type exists: make targets, commands, subcommands and their flags."""

import re
import shlex
from collections.abc import Iterator
from functools import cache

import pytest
from meta.tools import BIN, ROOT, output_of

COMMANDS = ("sessionstored", "sessionctl")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What tells people the same things in other clothes: (file, where its command stands).
WRAPPED = [(ROOT / "deploy/sessionstored.service", re.compile(r"^ExecStart=(.*)$", re.MULTILINE)),
           (ROOT / "Makefile", re.compile(r"\$\(BIN\)/(sessionstored .*?)(?: \$\(ARGS\))?$", re.MULTILINE))]
BEFORE = ("|", "||", "&&", ";", "(", "exec", "sudo")


def shell_lines(text: str) -> Iterator[str]:
    """The lines of a fenced block as a shell would join them."""
    yield from re.sub(r"\\\n\s*", " ", text).splitlines()


def tokens(line: str) -> list[str]:
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # prose or output with an apostrophe
        return []


def invocations(line: str) -> Iterator[tuple[str, ...]]:
    """The (command, argument, ...) of each of our commands in a shell line, also behind pipes."""
    words = tokens(line)
    starts = [index for index, word in enumerate(words) if word.rpartition("/")[2] in COMMANDS
              and (index == 0 or words[index - 1] in BEFORE or re.match(r"[A-Z_]+=", words[index - 1]))]
    for start in starts:
        rest = words[start + 1:]
        end = next((i for i, word in enumerate(rest) if re.fullmatch(r"[();<>|&]+", word)), len(rest))
        yield (words[start].rpartition("/")[2], *rest[:end])


def documented() -> list[tuple[str, tuple[str, ...]]]:
    """(file, invocation) of every command line in the docs."""
    found = [(path.name, words) for path in DOCS for block in FENCE.findall(path.read_text())
             for line in shell_lines(block) for words in invocations(line)]
    found += [(path.name, words) for path, pattern in WRAPPED for line in pattern.findall(path.read_text())
              for words in invocations(line)]
    return sorted(set(found))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def help_of(*command: str) -> str:
    return output_of(BIN / command[0], *command[1:], "--help")


def subcommands(command: str) -> set[str]:
    _, _, listed = help_of(command).partition("Commands:")
    return set(re.findall(r"^  ([a-z][a-z-]*)", listed, re.MULTILINE))


def wrong_with(command: str, *words: str) -> str:
    """What --help contradicts in an invocation; empty if nothing."""
    text = help_of(command)
    plain = [word for word in words if not word.startswith("-")]
    subcommand = next((word for word in plain if word in subcommands(command)), None)
    if plain and not subcommand:
        return f"none of {plain} is a subcommand"
    if subcommand:
        text += help_of(command, subcommand)
    flags = [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    unknown = [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)]
    return f"no flag {', '.join(unknown)}" if unknown else ""


@pytest.mark.parametrize(("line", "expected"), [
    ("$ sessionctl ls --json | jq .", [("sessionctl", "ls", "--json")]),
    ("A=1 .venv/bin/sessionstored serve --data D &", [("sessionstored", "serve", "--data", "D")]),
    ("sessionctl export > all.jsonl; sessionctl info", [("sessionctl", "export"), ("sessionctl", "info")]),
    ("pip install 'sessionstore[server]'  # sessionstored", []),
    ("it's sessionctl", []),
])
def test_command_lines_are_recognised(line: str, expected: list[tuple[str, ...]]):
    assert list(invocations(line)) == expected


def documented_targets() -> set[tuple[str, str]]:
    """(file, target): in a fenced block a line begins with it, in prose it stands in backticks."""
    found = set()
    for path in DOCS:
        text = path.read_text()
        for block in FENCE.findall(text):
            named = re.findall(r"^(?:\$ )?make ([a-z-]+)", block, re.MULTILINE)
            found |= {(path.name, target) for target in named}
        found |= {(path.name, target) for target in re.findall(r"`make ([a-z-]+)[^`\n]*`", text)}
    return found


def test_every_documented_make_target_exists():
    targets = documented_targets()
    assert {("README.md", "run"), ("README.md", "demo"), ("README.md", "test")} <= targets
    assert {(name, target) for name, target in targets if target not in make_targets()} == set()


def test_every_documented_command_exists_with_its_flags():
    lines = documented()
    assert {("README.md", command) for command in COMMANDS} <= {(name, words[0]) for name, words in lines}
    wrong = {f"{name}: {' '.join(words)}": wrong_with(*words) for name, words in lines}
    assert {line: why for line, why in wrong.items() if why} == {}


def test_ci_calls_what_the_readme_says():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "exec make test"]
    assert "make test" in (ROOT / "README.md").read_text()


def test_every_target_sets_up_the_environment_itself():
    text = (ROOT / "Makefile").read_text()
    needed = dict(re.findall(r"^([a-z-]+):([^#\n]*)##", text, re.MULTILINE))
    needed = {target: set(needs.split()) for target, needs in needed.items()}
    without = {target for target, needs in needed.items() if "$(READY)" not in needs and "check" not in needs}
    assert without == {"help", "clean"}

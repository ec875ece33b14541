"""A data directory that nobody serves: what is in it, and what somebody or a disk does to its files."""

import os
from pathlib import Path

from sessionstored.engine.jsonl.checking import Check
from sessionstored.engine.jsonl.findings import Finding, Remedy, Summary, Verdict

Print = tuple[bytes, int, int, int]


def everything(data: Path) -> dict[str, Print]:
    """Bytes, mode, inode and modification time of everything below a directory, and of itself."""
    found = {}
    for path in [data, *data.rglob("*")]:
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(data))] = (content, stat.st_mode, stat.st_ino, stat.st_mtime_ns)
    return found


def check(data: Path) -> tuple[list[Finding], Summary]:
    """Check a directory, and see that nothing in it changed."""
    before = everything(data)
    running = Check(data)
    found = list(running.findings())
    assert everything(data) == before
    return found, running.summary


def verdicts(data: Path) -> dict[str, tuple[Verdict, Remedy]]:
    """Of each session, or of the file of what is none, unless it is well."""
    found, _ = check(data)
    return {each.key or each.file: (each.verdict, each.remedy) for each in found if each.verdict != "ok"}


def rot(path: Path, old: bytes, new: bytes) -> None:
    """Change bytes behind everybody's back, as a disk does: same length, same times."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(content.replace(old, new, 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

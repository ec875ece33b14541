"""How the offline commands report: tables for people, lines of JSON for programs.

A table is written in portions, so that no report has to fit into memory. Nothing here knows a store.
"""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sessionstored.engine.jsonl.checking import Check
from sessionstored.engine.jsonl.findings import Finding, Remedy, Summary, Verdict
from sessionstored.engine.jsonl.repairing import Done

_PORTION = 500
# Of what is no terminal: tables are not folded for a screen that is not there.
_PIPE_COLUMNS = 1000
_STYLES = {
    Verdict.OK: "green",
    Verdict.WAITING: "cyan",
    Verdict.NEW: "cyan",
    Verdict.EDITED: "yellow",
    Verdict.MARKED: "bold yellow",
    Verdict.DAMAGED: "bold red",
}


class Report(Protocol):
    """What a command writes to; a context in which it does so."""

    def finding(self, finding: Finding) -> None:
        """One finding."""

    def progress(self, check: Check) -> None:
        """How far a check is."""

    def summary(self, summary: Summary) -> None:
        """The end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def json_report() -> Report:
    """Lines of JSON on stdout."""
    return _JsonReport()


def table_report() -> Report:
    """Tables on stdout, and on a terminal a line of progress on stderr."""
    return _TableReport()


def console(*, stderr: bool = False) -> Console:
    """A console on what stdout (or stderr) is now; it never fails for a character that the terminal lacks."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    found = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = _PIPE_COLUMNS
    return found


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """A table of text that came from anywhere."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(_printable(cell)) for cell in row))
    return made


def write_plan(findings: Sequence[Finding], keep_suspect: bool) -> None:
    """What a repair would do."""
    out = console()
    if not findings:
        out.print(Text("nothing needs a repair"))
        return
    rows = (
        (verdict_text(each), place(each), each.key, each.detail, _planned(each, keep_suspect))
        for each in findings
    )
    out.print(table(("verdict", "file", "session", "what", "plan"), rows))


def _planned(finding: Finding, keep_suspect: bool) -> str:
    """What a repair would do about one finding."""
    match finding.remedy:
        case Remedy.MEND:
            kept = finding.kept + (finding.suspect if keep_suspect else 0)
            left = ", ".join(
                f"{count:,} {what}"
                for count, what in (
                    (0 if keep_suspect else finding.suspect, "suspect messages"),
                    (finding.lost, "unreadable lines"),
                )
                if count
            )
            return f"keep {kept:,} messages; leave out {left or 'nothing'}; the whole file goes to quarantine"
        case Remedy.TAKE:
            taken = f"take the file as it is: {finding.kept:,} messages that can be read"
            return f"{taken}; the whole file goes to quarantine, too" if finding.lost else taken
        case Remedy.REMOVE:
            return "remove the session: its file is gone"
        case Remedy.OPEN:
            return "open the store: it sets aside what is not known, and marks the session"
        case Remedy.ANEW:
            return "open the store: it makes the file anew from journal.db"
        case Remedy.CLEAR:
            return "remove the mark; what was set aside stays in quarantine"
        case _:
            return str(finding.remedy.value)


def write_done(done: Sequence[Done]) -> None:
    """What a repair did."""
    rows = (
        (
            Text("done" if each.mended else "left", "green" if each.mended else "bold red"),
            each.file,
            each.key,
            each.what,
        )
        for each in done
    )
    console().print(table(("", "file", "session", "what was done"), rows))


def place(finding: Finding) -> str:
    """File and line of a finding."""
    return f"{finding.file} line {finding.line}" if finding.line else finding.file


def remedy_name(remedy: Remedy) -> str:
    """The word for what helps."""
    return "" if remedy is Remedy.NONE else "by hand" if remedy is Remedy.HAND else remedy.name.lower()


def verdict_text(finding: Finding) -> Text:
    """A verdict in its colour."""
    return Text(finding.verdict.value, style=_STYLES[finding.verdict])


class _JsonReport:
    def finding(self, finding: Finding) -> None:
        fields = asdict(finding) | {"verdict": finding.verdict.value, "remedy": finding.remedy.name.lower()}
        print(json.dumps(fields))

    def progress(self, check: Check) -> None:
        """Programs do not watch."""

    def summary(self, summary: Summary) -> None:
        fields = asdict(summary) | {"verdicts": {each.value: summary.verdicts[each] for each in Verdict}}
        print(json.dumps({"summary": fields, "well": summary.well}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()


class _TableReport:
    def __init__(self) -> None:
        self._out, self._err = console(), console(stderr=True)
        self._status = self._err.status("reading the journal")
        self._waiting: list[Finding] = []
        self._remedies: set[Remedy] = set()
        self._seen = 0

    def finding(self, finding: Finding) -> None:
        self._waiting.append(finding)
        if finding.remedy is not Remedy.NONE:
            self._remedies.add(finding.remedy)
        if len(self._waiting) >= _PORTION:
            self._write()

    def progress(self, check: Check) -> None:
        self._seen += 1
        if self._seen % 1000 == 0:
            of = f" of about {check.sessions_total:,}" if check.sessions_total else ""
            self._status.update(f"{self._seen:,}{of} checked")

    def _write(self) -> None:
        if self._waiting:
            self._out.print(
                table(
                    ("verdict", "file", "session", "what", "remedy"),
                    (
                        (verdict_text(each), place(each), each.key, each.detail, remedy_name(each.remedy))
                        for each in self._waiting
                    ),
                )
            )
        self._waiting.clear()

    def summary(self, summary: Summary) -> None:
        for remedy in (each for each in Remedy if each in self._remedies):
            self._out.print(
                Text(f"{remedy_name(remedy):<12}", style="bold") + Text(remedy.value), soft_wrap=True
            )
        for name, value in _lines(summary):
            self._out.print(Text(f"{name:<12}", style="bold") + Text(value), soft_wrap=True)

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()
        self._write()


def _lines(summary: Summary) -> Iterable[tuple[str, str]]:
    """The summary in words."""
    yield "store", summary.store_id or "none: a workspace of session files"
    counts = ", ".join(f"{count:,} {verdict}" for verdict in Verdict if (count := summary.verdicts[verdict]))
    not_served = f"; {summary.not_served:,} sessions are not served" if summary.not_served else ""
    yield "found", (counts or "no session") + not_served
    yield "read", f"{summary.messages:,} messages, {summary.bytes_read:,} bytes of session files"
    yield (
        "journal",
        f"{summary.journal_rows:,} rows, {summary.changes_waiting:,} changes wait for the files, "
        f"{summary.deletions_waiting:,} deletions",
    )
    yield "quarantine", f"{summary.quarantine_files:,} files, {summary.quarantine_bytes:,} bytes"
    if summary.temporary_files:
        yield (
            "unfinished",
            f"{summary.temporary_files:,} files under temporary names: the next start ends them",
        )
    if summary.left_alone:
        yield "left alone", f"{summary.left_alone:,} names that are no session files"
    yield "so", "all is well" if summary.well else "something is damaged, or marked as damaged"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

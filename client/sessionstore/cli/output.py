"""How sessionctl writes: colours and wrapped text on a terminal, plain whole lines into a pipe.

Everything that came from a session or a daemon is made printable before it is written. This module must not
know of the daemon.
"""

import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from sessionstore._types import ClockDisbelief, Head, Lease, ScrubStatus, ServerInfo
from sessionstore.cli.conversation import Kind, Row, local_time, printable
from sessionstore.cli.files import written
from sessionstore.cli.importing import Outcome, Result

_STYLES: dict[Kind, str] = {
    "title": "bold",
    "note": "dim",
    "damage": "bold red",
    "user": "bold green",
    "assistant": "bold cyan",
    "system": "bold magenta",
    "tool": "bold yellow",
    "other": "bold blue",
    "text": "",
    "call": "yellow",
    "result": "dim",
}
# Of what is no terminal: tables are not folded for a screen that is not there.
_PIPE_COLUMNS = 1000
_DURABILITY = {
    "fsync": "fsync: an acknowledgement survives kill -9 and power loss",
    "os": "os: an acknowledgement survives kill -9, not power loss",
    "none": "none: nothing survives the daemon",
}


def console(*, stderr: bool = False) -> Console:
    """A console on what stdout (or stderr) is now; it never fails for a character that the terminal lacks."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    found = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = _PIPE_COLUMNS
    return found


def write_rows(rows: Iterable[Row]) -> None:
    """Write rows of a conversation."""
    out = console()
    for row in rows:
        text = Text(row.text, style=_STYLES[row.kind])
        if out.is_terminal:
            out.print(Padding(text, (0, 0, 0, row.indent)))
        else:
            out.print(Text(" " * row.indent if row.text else "") + text, soft_wrap=True)


def write_heads(heads: Iterable[Head]) -> None:
    """Write a listing, a line per session as it comes."""
    out = console()
    if out.is_terminal:
        out.print(Text(f"{'MESSAGES':>8}  {'UPDATED':19}  KEY", style="bold"))
    for head in heads:
        line = Text(f"{head.message_count:>8}  {local_time(head.update_time)}  {printable(head.key)}")
        if head.damage:
            line.append(f"  damaged: {_one_line(head.damage)}", style=_STYLES["damage"])
        out.print(line, soft_wrap=True)


def head_json(head: Head) -> bytes:
    """A head as one line of JSON, without its end. Times are ISO 8601 in UTC."""
    fields = {
        "key": head.key,
        "revision": head.revision,
        "message_count": head.message_count,
        "last_consolidated": head.last_consolidated,
        "metadata": head.metadata,
        "create_time": head.create_time.isoformat(),
        "update_time": head.update_time.isoformat(),
        "expire_time": head.expire_time and head.expire_time.isoformat(),
        "damage": head.damage,
    }
    return written(fields)


def write_info(info: ServerInfo) -> None:
    """Write what serves, as a table."""
    limits = info.limits
    entries = [
        ("version", info.version),
        ("store", info.store_id),
        ("engine", info.engine),
        ("durability", _DURABILITY.get(info.durability, info.durability)),
        ("serves since", local_time(info.start_time)),
        ("sessions", f"{info.session_count:,}"),
        ("key", f"at most {limits.key_bytes_max:,} bytes"),
        ("message", f"at most {limits.message_bytes_max:,} bytes, {limits.message_depth_max:,} levels deep"),
        ("batch", f"at most {limits.batch_messages_max:,} messages, {limits.batch_bytes_max:,} bytes"),
        ("metadata", f"at most {limits.metadata_bytes_max:,} bytes"),
        ("page", f"at most {limits.page_size_max:,} sessions"),
        ("answers kept", f"{limits.window_calls_max:,} per client, for {limits.window_age_max}"),
        ("request_ids kept", f"{limits.window_request_ids_max:,} per session"),
        ("lease", f"{limits.lease_ttl_min} to {limits.lease_ttl_max}"),
    ]
    if info.scrub is not None:
        entries.insert(6, ("scrubber", _scrub_line(info.scrub)))
    if info.clock_disbelief is not None:
        entries.insert(6, ("clock", _clock_line(info.clock_disbelief)))
    table = _table("", "")
    table.show_header = False
    for name, value in entries:
        table.add_row(Text(name, style="bold"), Text(printable(value)))
    console().print(table)


def write_lease(lease: Lease) -> None:
    """Write who has the lease of a session, as a table."""
    others = "may append" if lease.allows_appends else "may not write"
    table = _table("", "")
    table.show_header = False
    for name, value in (
        ("holder", lease.holder),
        ("since", local_time(lease.acquire_time)),
        ("for", f"{lease.remaining_s:.1f} s more, unless it is renewed, of {lease.ttl_s:g} s"),
        ("others", others),
        ("token", str(lease.fencing_token)),
    ):
        table.add_row(Text(name, style="bold"), Text(printable(value)))
    console().print(table)


def _clock_line(found: ClockDisbelief) -> str:
    return (
        f"{found.ahead} ahead of the time that went by: sessions expire as at "
        f"{local_time(found.trusted_time)}, until it stayed so for {found.confirmed_in} more"
    )


def _scrub_line(scrub: ScrubStatus) -> str:
    last = f", the last at {local_time(scrub.last_pass_time)}" if scrub.last_pass_time else ""
    return (
        f"{scrub.sessions_damaged:,} damaged, {scrub.sessions_verified:,} whole "
        f"({scrub.bytes_verified:,} bytes), {scrub.passes:,} passes{last}"
    )


def write_report(results: Sequence[Result], total: int) -> None:
    """Write what became of an import: counts, and then everything that a person should look at."""
    out = console()
    files = Counter(result.outcome for result in results)
    messages: Counter[Outcome] = Counter()
    for result in results:
        messages[result.outcome] += result.message_count
    counts = _table("outcome", "files", "messages")
    counts.columns[1].justify = counts.columns[2].justify = "right"
    for outcome in Outcome:
        if files[outcome]:
            stored = f"{messages[outcome]:,}" if messages[outcome] else ""
            counts.add_row(Text(outcome.value), Text(f"{files[outcome]:,}"), Text(stored))
    torn = sum(result.torn for result in results)
    if torn:
        counts.add_row(Text("  of these, cut at the end"), Text(f"{torn:,}"), Text(""))
    if len(results) < total:
        counts.add_row(Text("not reached"), Text(f"{total - len(results):,}"), Text(""))
    out.print(counts)
    remarks = list(_remarks(results))
    if remarks:
        table = _table("file", "outcome", "look at")
        for file, outcome_text, remark, style in remarks:
            table.add_row(Text(printable(file)), Text(outcome_text), Text(_one_line(remark), style=style))
        out.print(table)


def _remarks(results: Sequence[Result]) -> Iterator[tuple[str, str, str, str]]:
    """(file, outcome, remark, style), problems first."""
    for result in results:
        if result.problem:
            yield result.path.name, result.outcome.value, result.problem, "red"
    for result in results:
        for note in result.notes:
            yield result.path.name, result.outcome.value, note, "dim"


def progress(*, in_bytes: bool = False) -> Progress:
    """A progress bar on stderr, if that is a terminal; it leaves no trace."""
    err = console(stderr=True)
    counts: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *(counts if in_bytes else [MofNCompleteColumn()]),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _one_line(text: str) -> str:
    return printable(" ".join(text.splitlines()))


def error_line(text: str) -> str:
    """An error as one line."""
    return f"sessionctl: {_one_line(text)}"

"""The commands of sessionctl. Thin: each opens a client, calls what knows, and writes what came of it.

stdout carries what was asked for, stderr everything else. Exit codes: 0 done, 1 not done or not all of it,
2 wrong usage.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import IO, Any

import click

from sessionstore import codec
from sessionstore._operations import BACKUP, Held, Rpc, pb, read
from sessionstore._operations import lease as lease_of
from sessionstore._types import OrderBy
from sessionstore.cli import backing_up, expiring, exporting, importing, output, watching, wire
from sessionstore.cli.conversation import local_time, printable, rows
from sessionstore.client import SessionStore
from sessionstore.errors import NotFoundError, OutcomeUnknownError, SessionStoreError, error_for

TIMEOUT_S = 5.0
_ORDERS: dict[str, OrderBy] = {
    "key": "key",
    "key-desc": "key desc",
    "update-time": "update_time",
    "update-time-desc": "update_time desc",
}

Command = Callable[..., None]


class Failed(click.ClickException):
    """What could not be done, as one line on stderr. Exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the line."""
        output.console(stderr=True).print(output.error_line(self.message), soft_wrap=True)


class Sessionctl(click.Group):
    """The group; it turns every error that a command expects into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except OutcomeUnknownError as error:
            raise Failed(
                "the change was sent and no answer came in time: it may be stored, or not. "
                f"Look at the session before you do it again. ({error.reason})"
            ) from error
        except (SessionStoreError, codec.MessageError) as error:
            raise Failed(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failed(f"{error.filename or 'the file'}: {error.strerror or error}") from error


def _common(default_s: float | None, target_variable: str | None) -> Callable[[Command], Command]:
    """--target and --timeout, which may stand before the command or behind it."""

    def decorate(command: Command) -> Command:
        target = click.option(
            "--target",
            metavar="ADDR",
            envvar=target_variable,
            help="Where the daemon is: host:port, [v6]:port or unix:PATH.  "
            "[default: $SESSIONSTORE_TARGET, else the default socket]",
        )
        timeout = click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            default=default_s,
            help=f"How long a call to the daemon may take.  [default: {TIMEOUT_S:g} s]",
        )
        return target(timeout(command))

    return decorate


@click.group(cls=Sessionctl, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sessionstore", message="sessionctl %(version)s")
@_common(TIMEOUT_S, "SESSIONSTORE_TARGET")
def sessionctl(target: str | None, timeout: float) -> None:
    """Look at the sessions of a running daemon, write to them, and carry them in and out."""


def _connected(function: Command) -> Command:
    """Give a command a client as its first argument, and the common options."""

    @_common(None, None)
    @wraps(function)
    def command(target: str | None, timeout: float | None, **arguments: Any) -> None:
        given = click.get_current_context().find_root().params
        with SessionStore(target or given["target"], timeout=timeout or given["timeout"]) as store:
            function(store, **arguments)

    return command


@sessionctl.command()
@click.option("--prefix", default="", help="Only sessions whose key begins with this.")
@click.option("--order", type=click.Choice(list(_ORDERS)), default="key", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many sessions.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, for programs.")
@_connected
def ls(store: SessionStore, prefix: str, order: str, limit: int | None, as_json: bool) -> None:
    """List sessions: messages, last change, key."""
    page_size = min(limit or 1000, 1000)
    heads = islice(store.list(prefix, order_by=_ORDERS[order], page_size=page_size), limit)
    if not as_json:
        output.write_heads(heads)
        return
    for head in heads:
        click.echo(output.head_json(head))


@sessionctl.command()
@click.argument("key")
@click.option("--last", type=click.IntRange(min=0), help="Only the last so many messages.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="The messages as JSONL, exactly as they are stored.")
@_connected
def show(store: SessionStore, key: str, last: int | None, as_json: bool) -> None:
    """Show a session as a conversation to read."""
    tail = store._driver.run(read(Held(key)) if last is None else wire.tail(key, last))
    if tail is None:
        raise error_for("SESSION_NOT_FOUND", f"no session has the key {key!r}", {"key": key})
    if as_json:
        click.echo(codec.join(tail.lines), nl=False)
    else:
        output.write_rows(rows(tail.head, tail.start, [codec.decode(line) for line in tail.lines]))


@sessionctl.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--prefix", help="Watch the sessions whose key begins with this.")
@click.option("--existing", is_flag=True, help="First tell of what there is.")
@click.option("--cursor", metavar="HEX", help="Go on behind the event that had this cursor.")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many events.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, for programs.")
@_connected
def watch(
    store: SessionStore,
    keys: Sequence[str],
    prefix: str | None,
    existing: bool,
    cursor: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Tell what changes, as it happens, until Ctrl-C: in these sessions, or in all.

    It goes on by itself when the daemon restarts.
    """
    if keys and prefix is not None:
        raise click.UsageError("give either KEY or --prefix")
    try:
        place = None if cursor is None else bytes.fromhex(cursor)
    except ValueError:
        raise click.BadParameter("it is no hexadecimal number", param_hint="--cursor") from None
    events = store.watch(keys or None, prefix=prefix, cursor=place, known={} if existing else None)
    with events:
        for event in islice(events, limit):
            click.echo(watching.line_json(event) if as_json else watching.line(event))


@sessionctl.command()
@click.argument("key")
@click.argument("messages", nargs=-1, metavar="[MESSAGE]...")
@click.option("--role", help="With --content: the role of one message of plain text.")
@click.option("--content", help="With --role: the text.")
@_connected
def append(
    store: SessionStore, key: str, messages: Sequence[str], role: str | None, content: str | None
) -> None:
    """Add messages at the end of a session, which is created if it does not exist.

    Each MESSAGE is one JSON object. Without any, messages are read from stdin, one JSON object per line. They
    are stored as they are written. What is too much for one call is sent in several, each all or nothing.
    """
    lines = _lines(messages, role, content)
    limits = store.info().limits
    wire.check(lines, limits)
    stored = 0
    for part in wire.split(lines, limits):
        try:
            landed = store._driver.run(wire.append(key, part))
        except SessionStoreError:
            if stored:
                _complain(f"the first {stored} of {len(lines)} messages were stored, and then came an error")
            raise
        stored += len(part)
        told = f"{_count(len(part), 'message')} appended from index {landed.first_index}"
        click.echo(f"{printable(key)}: {told}, revision {landed.revision}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _lines(messages: Sequence[str], role: str | None, content: str | None) -> list[bytes]:
    """The messages that were given, in whichever way. Raises UsageError, MessageError."""
    if (role is None) != (content is None):
        raise click.UsageError("--role and --content belong together")
    if role is not None:
        if messages:
            raise click.UsageError("give either MESSAGE or --role and --content")
        return [codec.encode({"role": role, "content": content})]
    if messages:
        return [_line(text, index) for index, text in enumerate(messages)]
    # A process can be started without a stdin; Python then has None in its place.
    lines = [line.strip() for line in sys.stdin.buffer] if sys.stdin else []
    lines = [line for line in lines if line]
    if not lines:
        raise click.UsageError("there is no message: give some as arguments, or one per line on stdin")
    return lines


def _line(text: str, index: int) -> bytes:
    """A message of the command line; one that was written on several lines is put on one."""
    stripped = text.strip().encode(errors="surrogateescape")
    if b"\n" not in stripped and b"\r" not in stripped:
        return stripped
    return codec.encode(codec.decode(stripped), index)


@sessionctl.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--all", "every", is_flag=True, help="Export every session.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write one file per session here.",
)
@_connected
def export(store: SessionStore, keys: Sequence[str], every: bool, out: Path | None) -> None:
    """Write sessions as plain JSONL: a header line, then the messages.

    One session goes to stdout, or to a file in DIR; several go to files in DIR. No file is overwritten.
    """
    if every == bool(keys):
        raise click.UsageError("give the keys of sessions, or --all")
    if out is None:
        if len(keys) != 1:
            raise click.UsageError("more than one session needs --out DIR")
        data, _, damage = exporting.session_bytes(store, keys[0])
        click.echo(data, nl=False)
        if damage:
            _complain(f"{keys[0]}: damaged: {damage}")
        return
    listed = (head.key for head in store.list(page_size=1000))
    wanted: Iterable[str] = listed if every else dict.fromkeys(keys)
    sessions = messages = problems = 0
    for exported in exporting.export(store, wanted, out):
        if exported.path is not None:
            sessions, messages = sessions + 1, messages + exported.message_count
        if exported.note:
            _complain(f"{exported.key}: {exported.note}")
        if exported.problem:
            problems += 1
            _complain(f"{exported.key}: {exported.problem}")
    click.echo(f"{_count(sessions, 'session')} with {_count(messages, 'message')} exported to {out}")
    if problems:
        raise Failed(f"damaged or not exported: {_count(problems, 'session')}, see above")


def _complain(text: str) -> None:
    output.console(stderr=True).print(output.error_line(text), soft_wrap=True)


@sessionctl.command("import")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_connected
def import_(store: SessionStore, directory: Path) -> None:
    """Import a directory of session files, or a workspace with one in `sessions`, into the running daemon.

    The files are only read, and nothing that is in the store is overwritten. An import that was interrupted
    may be run again: what is there already is not stored twice. Ends with 1 if a file was damaged or left
    out.
    """
    plan = importing.Plan.of(directory)
    results: list[importing.Result] = []
    try:
        with output.progress() as bar:
            task = bar.add_task("importing", total=len(plan.paths))
            for result in importing.run(store, plan):
                results.append(result)
                bar.advance(task)
    finally:
        if results:
            output.write_report(results, len(plan.paths))
    if not plan.paths:
        raise Failed(f"{directory}: there is no session file (*.jsonl) here, nor in `sessions`")
    problems = sum(bool(result.problem) for result in results)
    if problems:
        raise Failed(f"damaged or left out: {_count(problems, 'file')} of {len(results):,}, see above")


@sessionctl.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@_connected
def backup(store: SessionStore, directory: Path) -> None:
    """Copy the whole store into DIR, which must be new or empty, as it is at one moment.

    The daemon goes on serving. Everything that was acknowledged before is in the copy; `sessionstored
    restore` makes a store of it. A directory without MANIFEST.json is no backup. Ends with 1 if something
    in the store is damaged: it is copied as it is, and named.
    """
    store.info()  # somebody answers
    backing_up.prepare(directory)
    try:
        with output.progress(in_bytes=True) as bar:
            task = bar.add_task("backing up", total=None)
            made = backing_up.receive(
                store._driver.stream(Rpc(BACKUP, pb.BackupRequest())),
                directory,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (SessionStoreError, backing_up.NotWholeError, OSError, KeyboardInterrupt) as error:
        why = str(error) or "interrupted"
        raise Failed(f"{why}; what is in {directory} is no backup: remove it") from error
    told = f"{_count(made.session_count, 'session')} in {_count(made.file_count, 'file')}"
    click.echo(f"{told}, {_count(made.byte_count, 'byte')}, as of {made.taken}, backed up to {directory}")
    for damage in made.damaged:
        _complain(f"{damage['key']}: damaged: {damage['path']}: {damage['detail']}")
    if made.damaged:
        raise Failed(f"damaged in the store, and copied as it is: {_count(len(made.damaged), 'file')}")


@sessionctl.command()
@click.argument("key")
@click.argument("when")
@_connected
def expire(store: SessionStore, key: str, when: str) -> None:
    """Let a session end by itself: WHEN is an age from now (90s, 15m, 36h, 7d, 2w), an ISO time, or never.

    It and its messages are then removed, for good. `never` counts also against what the daemon's
    configuration says for its key.
    """
    try:
        expires = expiring.parse(when)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    handle = store.session(key)
    handle.update(expire_time=expires)
    told = f"expires {local_time(handle.expire_time)}" if handle.expire_time else "never expires"
    click.echo(f"{printable(key)}: {told}")


@sessionctl.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_connected
def rm(store: SessionStore, keys: Sequence[str], yes: bool) -> None:
    """Remove sessions and their messages, for good."""
    if not yes:
        if not sys.stdin or not sys.stdin.isatty():
            raise click.UsageError("there is nobody to ask: give --yes")
        named = ", ".join(printable(key) for key in keys)
        click.confirm(f"Remove {named}, for good?", abort=True, err=True)
    missing = 0
    for key in dict.fromkeys(keys):
        try:
            store.delete(key)
        except NotFoundError as error:
            missing += 1
            _complain(str(error))
        else:
            click.echo(f"{printable(key)}: removed")
    if missing:
        raise Failed(f"not there: {_count(missing, 'session')}, see above")


@sessionctl.command()
@click.argument("key")
@_connected
def lease(store: SessionStore, key: str) -> None:
    """Tell who has the lease of a session, and for how long."""
    found = store._driver.run(lease_of(key))
    if found is None:
        click.echo(f"{printable(key)}: nobody has its lease")
    else:
        output.write_lease(found)


@sessionctl.command()
@_connected
def info(store: SessionStore) -> None:
    """Tell what serves: version, store, durability, limits."""
    output.write_info(store.info())

"""The commands that need no daemon, and refuse to work beside one: check and repair.

stdout carries the result: tables for people, or a line of JSON per finding and a last one with the summary.
Exit codes: 0 all is well, 1 cannot be done, 2 wrong usage, 3 storage failed, 4 damage found (or left).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from sessionstored import config
from sessionstored.config import SETTINGS, ConfigError

if TYPE_CHECKING:
    from sessionstored.engine.jsonl.findings import Finding
    from sessionstored.engine.jsonl.repairing import Done

EXIT_CANNOT = 1
EXIT_STORAGE_FAILED = 3
EXIT_DAMAGED = 4

Command = Callable[..., None]


def _data_options(command: Command) -> Command:
    """--data and --config: which directory."""
    command = click.option("--data", metavar="DIR", help=f"{SETTINGS['data'].help}  [default: as for serve]")(
        command
    )
    return click.option(
        "--config",
        "file",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="SESSIONSTORED_CONFIG",
        help="TOML file of settings, for its `data`.",
    )(command)


def _configured(data: str | None, file: Path | None) -> config.Config:
    """The configuration in force; ends with a usage error if it is wrong."""
    try:
        return config.load({} if data is None else {"data": data}, os.environ, file).config
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


def _cannot(error: Exception) -> NoReturn:
    click.echo(f"sessionstored: {error}", err=True)
    sys.exit(EXIT_CANNOT)


@click.command()
@_data_options
@click.option("--all", "everything", is_flag=True, help="List what is well, too.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per line instead of tables.")
def check(data: str | None, file: Path | None, everything: bool, as_json: bool) -> None:
    """Check a directory that nobody serves, and change nothing in it.

    Every session file is compared with the catalogue, its checksums and the journal, and read through. Exits
    with 0 if all is well, with 1 if it cannot be checked, and with 4 if something is damaged or marked so.
    """
    path = Path(_configured(data, file).data)
    from sessionstored import reporting
    from sessionstored.engine import StartError
    from sessionstored.engine.jsonl.checking import Check
    from sessionstored.engine.jsonl.findings import Verdict
    from sessionstored.engine.jsonl.store import kept_unowned

    running = Check(path)
    report = reporting.json_report() if as_json else reporting.table_report()
    try:
        with kept_unowned(path), report:
            for finding in running.findings():
                if everything or finding.verdict is not Verdict.OK:
                    report.finding(finding)
                report.progress(running)
    except StartError as error:
        _cannot(error)
    report.summary(running.summary)
    sys.exit(0 if running.summary.well else EXIT_DAMAGED)


@click.command()
@_data_options
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--keep-suspect", is_flag=True, help="Keep messages that can be read in blocks whose checksum is wrong."
)
def repair(data: str | None, file: Path | None, keys: tuple[str, ...], yes: bool, keep_suspect: bool) -> None:
    """Repair the damaged sessions of a directory that nobody serves, all or the named ones.

    It checks, shows what it would do, asks, and then says what it did. What was in a damaged file goes to
    quarantine, whole, before anything else; nothing is deleted. A session that lost something stays marked,
    and repairing it again removes the mark. Exits with 0 if nothing is left to do, else with 4.
    """
    configured = _configured(data, file)
    path = Path(configured.data)
    from sessionstored import reporting
    from sessionstored.engine import StartError
    from sessionstored.engine.jsonl.checking import Check
    from sessionstored.engine.jsonl.disk import Disk
    from sessionstored.engine.jsonl.findings import OF_THE_STORE, REPAIRABLE, Remedy
    from sessionstored.engine.jsonl.repairing import RepairFailed, opened
    from sessionstored.engine.jsonl.store import Directory, kept_unowned

    try:
        with kept_unowned(path):
            found, unknown = [], set(keys)
            for each in Check(path).findings():
                unknown.discard(each.key)
                if each.remedy is not Remedy.NONE:
                    found.append(each)
            if unknown:
                raise click.UsageError(f"there is no session {', '.join(map(repr, sorted(unknown)))}")
            lost = [each for each in found if each.remedy in OF_THE_STORE]
            wanted = [each for each in found if each not in lost and (not keys or each.key in keys)]
            reporting.write_plan(lost or wanted, keep_suspect)
            if lost or not wanted:
                sys.exit(EXIT_DAMAGED if lost else 0)
            plan = [each for each in wanted if each.remedy in REPAIRABLE]
            if not plan or not (yes or _agreed(len(plan))):
                sys.exit(EXIT_DAMAGED)
        directory = Directory(path, Disk())
        try:
            with opened(directory, configured.limits()) as repairing:
                done = [
                    repairing.mend(each, keep_suspect=keep_suspect) if each.key else _opened_anew(each)
                    for each in plan
                ]
        finally:
            directory.close()
    except StartError as error:
        _cannot(error)
    except RepairFailed as error:
        click.echo(f"sessionstored: storage failed: {error}; what was done so far is whole", err=True)
        sys.exit(EXIT_STORAGE_FAILED)
    reporting.write_done(done)
    left = len(plan) < len(wanted) or not all(each.mended for each in done)
    sys.exit(EXIT_DAMAGED if left else 0)


def _opened_anew(finding: "Finding") -> "Done":
    """What became of a part of the store that an opening makes anew, or of a lease that it ends."""
    from sessionstored.engine.jsonl.findings import Remedy
    from sessionstored.engine.jsonl.repairing import Done

    ended = finding.remedy is Remedy.END
    return Done("", finding.file, "the lease was ended" if ended else "it was made anew from journal.db")


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask at: nothing was changed; give --yes to go on")
    return click.confirm(f"Repair {count} session{'s' if count > 1 else ''} so?", default=False)

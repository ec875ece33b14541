"""The commands that need no daemon, and refuse to work beside one: check and repair.

stdout carries the result: tables for people, or a line of JSON per finding and a last one with the summary.
Exit codes: 0 all is well, 1 cannot be done, 2 wrong usage, 3 storage failed, 4 damage found (or left).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from sessionstored import config
from sessionstored.config import SETTINGS, ConfigError

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


def _directory(data: str | None, file: Path | None) -> Path:
    """The directory that is meant; ends with a usage error if the configuration is wrong."""
    try:
        return Path(config.load({} if data is None else {"data": data}, os.environ, file).config.data)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@_data_options
@click.option("--all", "everything", is_flag=True, help="List what is well, too.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per line instead of tables.")
def check(data: str | None, file: Path | None, everything: bool, as_json: bool) -> None:
    """Check a directory that nobody serves, and change nothing in it.

    Every session file is compared with the catalogue, its checksums and the journal, and read through. Exits
    with 0 if all is well, with 1 if it cannot be checked, and with 4 if something is damaged or marked so.
    """
    path = _directory(data, file)
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
        click.echo(f"sessionstored: {error}", err=True)
        sys.exit(EXIT_CANNOT)
    report.summary(running.summary)
    sys.exit(0 if running.summary.well else EXIT_DAMAGED)

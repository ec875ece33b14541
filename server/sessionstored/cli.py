"""The command `sessionstored`: serve, health, config; and what needs no daemon, which is in `offline`.

stdout carries only what was asked for; everything else goes to stderr. Exit codes: 0 done, 1 could not start
(or not healthy), 2 wrong usage or configuration, 3 storage failed, 4 damage found.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from sessionstored import address, config, offline
from sessionstored.config import SETTINGS, ConfigError, Loaded, Setting, Value
from sessionstored.restore import restore

# A thread that waits for the interpreter gets it after at most this long while another one computes.
# Measured: with Python's default of 5 ms a commit beside a busy thread takes 5.5 ms, with this 0.7 ms.
_SWITCH_INTERVAL_S = 0.0005
_HEALTH_TIMEOUT_S = 5.0

Command = Callable[..., None]

_log = logging.getLogger(__name__)


class _Sessionstored(click.Group):
    """The group; an error of a file that no command expects, as of stdout, is one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                if sys.stdout is not None:  # it is, if it was closed before Python began
                    sys.stdout.flush()
        except BrokenPipeError:  # whoever read has seen enough
            raise
        except OSError as error:
            if sys.stdout is not None:
                _forget_stdout()
            click.echo(f"sessionstored: {error.filename or 'stdout'}: {error.strerror}", err=True)
            sys.exit(1)


@click.group(cls=_Sessionstored, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sessionstore", message="sessionstored %(version)s")
def main() -> None:
    """Serve a directory of conversation sessions to many processes and machines."""


def _settings_options(command: Command) -> Command:
    """One flag per setting, and --config."""
    for setting in reversed(list(SETTINGS.values())):
        command = _option(setting)(command)
    return click.option(
        "--config",
        "file",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="SESSIONSTORED_CONFIG",
        help="TOML file of settings.  [default: the user's sessionstored.toml, if it exists]",
    )(command)


_LISTS = {"listen": "ADDR", "expire": "PREFIX=AGE"}


def _option(setting: Setting) -> Callable[[Command], Command]:
    shared: dict[str, Any] = {"help": f"{setting.help}  [default: {_default(setting)}]", "default": None}
    if setting.type is bool:
        return click.option(setting.flag, setting.name, is_flag=True, **shared)
    if setting.choices:
        return click.option(setting.flag, setting.name, type=click.Choice(setting.choices), **shared)
    if setting.type is tuple:
        return click.option(setting.flag, setting.name, multiple=True, metavar=_LISTS[setting.name], **shared)
    names: dict[str, str] = {"data": "DIR", "store": "STORE"}
    metavar = names.get(setting.name, (setting.unit or "TEXT").upper())
    return click.option(setting.flag, setting.name, type=setting.type, metavar=metavar, **shared)


def _default(setting: Setting) -> str:
    if isinstance(setting.default, int | float) and not isinstance(setting.default, bool):
        return f"{setting.default:,} {setting.unit}"
    if setting.default == () and not setting.default_text:
        return "none"
    return setting.default_text or str(setting.default).lower()


def _load(file: Path | None, flags: dict[str, Value | None]) -> Loaded:
    """The configuration in force; ends with a usage error if it is wrong."""
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    try:
        loaded = config.load(given, os.environ, file)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    try:
        for text in loaded.config.listen:
            address.parse(text)
    except ValueError as error:
        raise click.UsageError(f"{loaded.sources['listen']}: {error}") from error
    return loaded


@main.command()
@_settings_options
@click.option(
    "--accept-loss", is_flag=True, help="Start although the store says that acknowledged changes are lost."
)
def serve(file: Path | None, accept_loss: bool, **flags: Value | None) -> None:
    """Serve until SIGTERM or SIGINT, which stop cleanly; a second one ends at once.

    When ready, stdout gets one line "listening on ADDR" per address; logs go to stderr.
    """
    loaded = _load(file, flags)
    _log_to_stderr(loaded.config.log_level)
    for name, near in config.unknown_variables(os.environ).items():
        hint = f"did you mean {near}?" if near else "`sessionstored config` lists the names"
        _log.warning("%s is no setting, and is ignored; %s", name, hint)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # Only here: the other commands start without them.
    from sessionstored import server
    from sessionstored.engine import StartError

    try:
        code = asyncio.run(server.serve(loaded.config, _ready, accept_loss=accept_loss))
    except StartError as error:
        click.echo(f"sessionstored: {error}", err=True)
        sys.exit(server.EXIT_CANNOT_START)
    if code != server.EXIT_OK:
        _end_at_once(code)


def _end_at_once(code: int) -> NoReturn:
    """End without waiting for threads, which may hang in a device that does not answer."""
    logging.shutdown()
    os._exit(code)


def _ready(addresses: Sequence[str]) -> None:
    _say("".join(f"listening on {each}\n" for each in addresses))


def _say(text: str) -> None:
    """Write to stdout. Raises StartError if that takes nothing: nobody would be told what was asked for."""
    from sessionstored.engine import StartError

    if sys.stdout is None:  # it was closed before Python began
        raise StartError("stdout is closed: give it a pipe, a file with room, or /dev/null")
    try:
        print(text, end="", flush=True)
    except OSError as error:
        _forget_stdout()
        raise StartError(
            f"stdout cannot be written: {error.strerror}: give it a pipe, a file with room, or /dev/null"
        ) from error


def _forget_stdout() -> None:
    """What is left in the buffer must not fail once more when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _log_to_stderr(level: str) -> None:
    """One line per event: time (UTC), level, logger, message."""
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(_one_line_of_a_lost_caller)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _one_line_of_a_lost_caller(record: logging.LogRecord) -> bool:
    """Whether a record is logged. gRPC takes a caller who left in the middle of a stream for a defect."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("grpc.") and type(error).__name__ == "ExecuteBatchError":
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = "a caller went away in the middle of a reply", ()
        record.exc_info = record.exc_text = None
    return record.levelno >= logging.getLogger().level


@main.command()
@click.option(
    "--target",
    metavar="ADDR",
    envvar="SESSIONSTORE_TARGET",
    help="Address to ask, or a comma list, asked in turn.  "
    "[default: $SESSIONSTORE_TARGET, else the first that is configured to be served]",
)
def health(target: str | None) -> None:
    """Ask a daemon whether it serves (grpc.health.v1). Exits with 0 if it does, else with 1."""
    targets = [part.strip() for part in (target or _default_target()).split(",")]
    sys.exit(0 if any(_serves(asked) for asked in targets if asked) else 1)


def _serves(asked: str) -> bool:
    """Ask one daemon, and tell what it said."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from sessionstored.service import SERVICE

    try:
        # A daemon is not behind a web proxy, whatever http_proxy says.
        with grpc.insecure_channel(address.grpc_name(asked), [("grpc.enable_http_proxy", 0)]) as channel:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=_HEALTH_TIMEOUT_S
            )
    except grpc.RpcError as error:
        click.echo(f"{asked}: {error.code().name}: {error.details()}", err=True)
        return False
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    serving: bool = reply.status == health_pb2.HealthCheckResponse.SERVING
    click.echo(f"{asked}: {SERVICE} is {state}", err=not serving)
    return serving


def _default_target() -> str:
    """The first configured address, as a client reaches it."""
    first = address.parse(_load(None, {}).config.listen[0])
    if not first.path and first.port == 0:
        raise click.UsageError("the configured port is 0, any: give the daemon's address with --target")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(first.host, first.host)
    return str(address.Address(path=first.path, host=host, port=first.port))


@main.command("config")
@_settings_options
def show_config(file: Path | None, **flags: Value | None) -> None:
    """Print the configuration in force as TOML, each setting with where it comes from."""
    from sessionstored.engine import StartError

    try:
        _say(config.to_toml(_load(file, flags)))
    except StartError as error:
        click.echo(f"sessionstored: {error}", err=True)
        sys.exit(1)


main.add_command(offline.check)
main.add_command(offline.repair)
main.add_command(restore)

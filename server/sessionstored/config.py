"""The daemon's configuration: one declaration, from which flags, environment variables and TOML come.

Every field of `Config` is one setting. Its flag is its name with dashes, its environment variable
SESSIONSTORED_ and its name in capitals, its TOML name its name. A flag beats the environment, which beats
TOML, which beats the default. Nothing here knows click or grpc; nothing is read but the TOML file and the
environment that is passed in.
"""

import difflib
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import platformdirs
from sessionstore import codec

from sessionstored.engine.feed import FeedLimits
from sessionstored.requests import Bounds
from sessionstored.retention import parse_rules
from sessionstored.rules import Limits

ENVIRONMENT_PREFIX = "SESSIONSTORED_"
FILE_NAME = "sessionstored.toml"
# A message length is an int32 in gRPC.
_BYTES_MAX = 1 << 30
_COUNT_MAX = 1 << 31
# The jsonl engine finds rows by indexes of its journal; entries of at most 1,000 bytes have no overflow page.
KEY_BYTES_MAX = 640
REQUEST_ID_BYTES_MAX = 320
_INJECTED = re.compile("SESSIONSTORED_(?:PORT(?:_.*)?|SERVICE_.*)")
# How Python holds bytes that are no UTF-8.
_UNPAIRED = re.compile("[\ud800-\udfff]")

Value = str | int | float | bool | tuple[str, ...]


class ConfigError(Exception):
    """A setting that cannot be used. The message names where it comes from and what to do."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the declaration says about one field of `Config`."""

    name: str
    type: type
    """str, int, float, bool, or tuple for a list of strings."""
    help: str
    unit: str
    default: Value
    default_text: str
    minimum: float
    maximum: float
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        """The command line flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENVIRONMENT_PREFIX + self.name.upper()


def _setting(
    default: Value,
    help: str,
    *,
    unit: str = "",
    default_text: str = "",
    minimum: float = 1,
    maximum: float = _COUNT_MAX,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare one field. `default_text` describes a default that depends on the machine."""
    declared = {
        "help": help,
        "unit": unit,
        "default_text": default_text,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
    }
    return field(default=default, metadata=declared)


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of the daemon. `load` fills in the defaults of `data` and `listen`."""

    data: str = _setting(
        "",
        "Directory of the sessions; created with mode 0700 if it is missing.",
        default_text="$XDG_DATA_HOME/sessionstore, or ~/.local/share/sessionstore",
    )
    listen: tuple[str, ...] = _setting(
        (),
        "Address to serve on: host:port, [v6]:port or unix:PATH; port 0 takes a free one. "
        "May be given several times.",
        default_text="unix:$XDG_RUNTIME_DIR/sessionstore/sock; without that variable, "
        "unix:/run/sessionstore/sock for root, and unix:/tmp/sessionstore-UID/sock for others",
    )
    store: str = _setting(
        "jsonl", "Storage engine: jsonl, or memory: for one that forgets everything when the daemon ends."
    )
    durability: str = _setting(
        "fsync",
        "What an acknowledgement of the jsonl engine survives: fsync (kill -9 and power loss), os (kill -9).",
        choices=("fsync", "os"),
    )
    insecure: bool = _setting(
        False,
        "Serve other addresses than loopback: anybody who reaches them may read and write everything.",
    )
    cache_bytes_max: int = _setting(
        256 << 20,
        "Messages that the jsonl engine keeps in memory.",
        unit="bytes",
        minimum=0,
        maximum=1 << 40,
    )
    checkpoint_s_max: float = _setting(
        5.0,
        "How long a change may be in the jsonl engine's journal only, before its session file is flushed.",
        unit="s",
        minimum=0.1,
        maximum=3600,
    )
    backlog_bytes_max: int = _setting(
        256 << 20,
        "Journal bytes that wait for their session files; beyond it appends wait, and then are refused.",
        unit="bytes",
        minimum=1 << 20,
        maximum=1 << 40,
    )
    queue_mutations_max: int = _setting(
        65_536, "Mutations that wait for the jsonl engine's journal; more are refused.", unit="mutations"
    )
    queue_bytes_max: int = _setting(
        64 << 20,
        "Bytes that wait for the jsonl engine's journal; more are refused.",
        unit="bytes",
        maximum=1 << 40,
    )
    group_mutations_max: int = _setting(4096, "Mutations that share one journal commit.", unit="mutations")
    group_bytes_max: int = _setting(
        8 << 20, "Bytes that share one journal commit.", unit="bytes", maximum=_BYTES_MAX
    )
    reserve_bytes_min: int = _setting(
        16 << 20,
        "Disk space that is kept free, so that sessions can be deleted on a full disk.",
        unit="bytes",
        minimum=0,
        maximum=1 << 40,
    )
    scrub_bytes_per_s_max: int = _setting(
        8 << 20,
        "How fast the jsonl engine compares session files with their checksums in the background; 0: never. "
        "A small file counts as 64 KiB.",
        unit="bytes/s",
        minimum=0,
        maximum=1 << 40,
    )
    scrub_interval_s_min: float = _setting(
        24 * 3600.0, "How often, at most, such a pass over all files begins.", unit="s", minimum=1
    )
    concurrent_calls_max: int = _setting(
        4096,
        "Calls that are served at a time; what comes above is refused with RESOURCE_EXHAUSTED.",
        unit="calls",
    )
    concurrent_bytes_max: int = _setting(
        128 << 20,
        "Bytes of requests being served and of blocks being sent; more is refused with OVERLOADED.",
        unit="bytes",
        maximum=1 << 40,
    )
    drain_s_max: float = _setting(
        5.0, "How long a stopping daemon waits for calls under way.", unit="s", minimum=0, maximum=3600
    )
    key_bytes_max: int = _setting(512, "Length of a key.", unit="bytes", maximum=KEY_BYTES_MAX)
    message_bytes_max: int = _setting(8 << 20, "Length of one message.", unit="bytes", maximum=_BYTES_MAX)
    message_depth_max: int = _setting(
        200, "How deep the arrays and objects of a message nest.", unit="levels", maximum=200
    )
    batch_messages_max: int = _setting(10_000, "Messages of one call.", unit="messages")
    batch_bytes_max: int = _setting(
        16 << 20, "Bytes of the messages of one call.", unit="bytes", maximum=_BYTES_MAX
    )
    metadata_bytes_max: int = _setting(
        256 << 10, "Length of a session's metadata.", unit="bytes", minimum=2, maximum=_BYTES_MAX
    )
    page_size_max: int = _setting(1000, "Sessions of one page of a listing.", unit="sessions")
    request_id_bytes_max: int = _setting(
        256, "Length of a request_id.", unit="bytes", maximum=REQUEST_ID_BYTES_MAX
    )
    window_calls_max: int = _setting(
        1024,
        "Answers that are kept per client, for calls that are sent again.",
        unit="calls",
        minimum=1024,  # the contract lets calls run 1,023 ahead of the lowest one that is unanswered
    )
    window_bytes_max: int = _setting(
        1 << 20, "Bytes of removed messages that the kept answers of one client hold.", unit="bytes"
    )
    window_request_ids_max: int = _setting(
        1000, "request_ids that are kept per session.", unit="request_ids"
    )
    window_age_s_max: int = _setting(
        24 * 3600, "How long answers are kept after a client's last contact.", unit="s"
    )
    lease_ttl_s_min: float = _setting(1.0, "Shortest ttl of a lease.", unit="s", minimum=0.1, maximum=3600)
    lease_ttl_s_max: float = _setting(
        3600.0, "Longest ttl of a lease.", unit="s", minimum=1, maximum=24 * 3600
    )
    leases_max: int = _setting(100_000, "Leases in force; more are refused with OVERLOADED.", unit="leases")
    lease_waiters_max: int = _setting(
        1024,
        "Calls that wait for leases; more are refused with OVERLOADED. At most half of concurrent_calls_max "
        "wait, and the appends among them hold at most a quarter of concurrent_bytes_max.",
        unit="calls",
    )
    lease_waiters_per_session_max: int = _setting(
        256, "Calls among these that wait for the lease of one session.", unit="calls"
    )
    watchers_max: int = _setting(4096, "Watch streams that are open at a time.", unit="watchers")
    watch_keys_max: int = _setting(10_000, "Keys that one Watch stream names.", unit="keys")
    watched_keys_max: int = _setting(1_000_000, "Keys that all Watch streams name together.", unit="keys")
    watcher_bytes_max: int = _setting(
        8 << 20,
        "Events that wait for one slow watcher; beyond it is ended with WATCHER_TOO_SLOW, and resumes.",
        unit="bytes",
        maximum=1 << 40,
    )
    watching_bytes_max: int = _setting(
        256 << 20,
        "Events that wait for all watchers together; beyond it the slowest is ended.",
        unit="bytes",
        maximum=1 << 40,
    )
    feed_age_s_max: float = _setting(
        600.0, "How long a change can be watched from a cursor.", unit="s", minimum=0, maximum=30 * 86_400
    )
    feed_bytes_max: int = _setting(
        64 << 20,
        "Bytes of changes that can be watched from a cursor; the oldest go first.",
        unit="bytes",
        minimum=0,
        maximum=1 << 40,
    )
    expire: tuple[str, ...] = _setting(
        (),
        "When sessions end by themselves that have no expire_time of their own, by the prefix of their key: "
        "PREFIX=AGE, an age since the last change such as 7d, 36h or never. May be given several times; "
        "the longest prefix counts.",
        minimum=0,
    )
    expiry_jump_s_max: float = _setting(
        60.0,
        "How far the clock may jump ahead and sessions still expire by it at once.",
        unit="s",
        minimum=0,
    )
    expiry_confirm_s_min: float = _setting(
        3600.0,
        "After how much service a clock that jumped further ahead is believed.",
        unit="s",
        minimum=0,
    )
    log_level: str = _setting(
        "info", "How much is logged to stderr.", choices=("debug", "info", "warning", "error")
    )

    def bounds(self) -> Bounds:
        """The limits on requests."""
        messages = codec.Limits(
            message_bytes_max=self.message_bytes_max,
            message_depth_max=self.message_depth_max,
            batch_messages_max=self.batch_messages_max,
            batch_bytes_max=self.batch_bytes_max,
        )
        return Bounds(
            key_bytes_max=self.key_bytes_max,
            metadata_bytes_max=self.metadata_bytes_max,
            page_size_max=self.page_size_max,
            request_id_bytes_max=self.request_id_bytes_max,
            lease_ttl_s_min=self.lease_ttl_s_min,
            lease_ttl_s_max=self.lease_ttl_s_max,
            watch_keys_max=self.watch_keys_max,
            messages=messages,
        )

    def limits(self) -> Limits:
        """The limits on decisions."""
        return Limits(
            metadata_bytes_max=self.metadata_bytes_max,
            window_calls_max=self.window_calls_max,
            window_bytes_max=self.window_bytes_max,
            window_request_ids_max=self.window_request_ids_max,
            window_age_max_s=self.window_age_s_max,
            leases_max=self.leases_max,
            retention=parse_rules(self.expire),
            expiry_jump_max_s=self.expiry_jump_s_max,
            expiry_confirm_s=self.expiry_confirm_s_min,
        )

    def feed_limits(self) -> FeedLimits:
        """The limits of the feed and its watchers."""
        return FeedLimits(
            age_s_max=self.feed_age_s_max,
            bytes_max=self.feed_bytes_max,
            watcher_bytes_max=self.watcher_bytes_max,
            watching_bytes_max=self.watching_bytes_max,
            watchers_max=self.watchers_max,
            watched_keys_max=self.watched_keys_max,
        )


def _declared() -> dict[str, Setting]:
    hints = get_type_hints(Config)
    defaults: dict[str, Any] = {declared.name: declared.default for declared in fields(Config)}
    return {
        declared.name: Setting(
            name=declared.name,
            type=get_origin(hints[declared.name]) or hints[declared.name],
            default=defaults[declared.name],
            **declared.metadata,
        )
        for declared in fields(Config)
    }


SETTINGS: Mapping[str, Setting] = _declared()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration in force, and where each setting comes from."""

    config: Config
    sources: Mapping[str, str]
    """Setting name -> "default", a flag, an environment variable, or the path of a TOML file."""


# defaults ---------------------------------------------------------------------------------------------------


def default_socket(environment: Mapping[str, str] = os.environ, uid: int | None = None) -> str:
    """The address of a daemon that was told none, without I/O. The SDK looks for it at the same place."""
    uid = os.getuid() if uid is None else uid
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return f"unix:{runtime}/sessionstore/sock"
    if uid == 0:
        return "unix:/run/sessionstore/sock"
    return f"unix:{tempfile.gettempdir()}/sessionstore-{uid}/sock"


def default_data() -> str:
    """The directory of a daemon that was told none: the user's own."""
    return str(platformdirs.user_data_path("sessionstore"))


def default_file(uid: int | None = None) -> Path:
    """The TOML file that is read if it exists and none was named."""
    uid = os.getuid() if uid is None else uid
    if uid == 0:
        return Path("/etc/sessionstore") / FILE_NAME
    return platformdirs.user_config_path("sessionstore") / FILE_NAME


# loading ----------------------------------------------------------------------------------------------------


def load(flags: Mapping[str, Value], environment: Mapping[str, str], file: Path | None = None) -> Loaded:
    """Put the configuration together.

    Args:
        flags: setting name -> value, those that were given only.
        environment: the environment variables; those that do not begin with SESSIONSTORED_ are none of its
        business.
        file: the TOML file to read, which must exist; None reads the default one if it exists.

    Raises:
        ConfigError: an unknown name, a value of the wrong type or out of its range, a file that cannot be
        read.

    """
    values: dict[str, Value] = {"data": default_data(), "listen": (default_socket(environment),)}
    sources = dict.fromkeys(SETTINGS, "default")
    named = file or _named_file(environment)
    path = named or default_file()
    if named or path.exists():
        for name, value in _read(path).items():
            values[name], sources[name] = value, str(path)
    for setting in SETTINGS.values():
        if environment.get(setting.variable):
            values[setting.name] = _from_text(setting, environment[setting.variable])
            sources[setting.name] = setting.variable
    for name, value in flags.items():
        setting = SETTINGS[name]
        values[name], sources[name] = _checked(setting, value, setting.flag), setting.flag
    arguments: dict[str, Any] = dict(values)
    arguments["data"] = os.path.abspath(os.path.expanduser(arguments["data"]))
    for name in ("data", "listen"):  # the machine had its part in these
        _check_text(arguments[name], f"{name}, from {sources[name]},")
    try:
        parse_rules(arguments.get("expire", ()))
    except ValueError as error:
        raise ConfigError(f"expire, from {sources['expire']}: {error}") from error
    return Loaded(Config(**arguments), sources)


def unknown_variables(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Variables that look like settings and are none -> the nearest one that is; "" if none is near.

    Not among them is what an orchestrator sets by itself for a service that is called sessionstored.
    """
    known = {setting.variable for setting in SETTINGS.values()} | {ENVIRONMENT_PREFIX + "CONFIG"}
    found: dict[str, str] = {}
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known and not _INJECTED.fullmatch(name):
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
            found[name] = near[0] if near else ""
    return found


def _named_file(environment: Mapping[str, str]) -> Path | None:
    named = environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    return Path(named) if named else None


def _read(path: Path) -> dict[str, Value]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    return {name: _from_toml(_known(name, path), value, path) for name, value in table.items()}


def _known(name: str, path: Path) -> Setting:
    setting = SETTINGS.get(name)
    if setting is None:
        near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; `sessionstored config` lists the names"
        raise ConfigError(f"{path}: there is no setting {name!r}{hint}")
    return setting


def _from_toml(setting: Setting, value: object, path: Path) -> Value:
    where = f"{path}: {setting.name}"
    if setting.type is tuple:
        if setting.name == "expire" and isinstance(value, dict):  # prefix -> age
            value = [f"{prefix}={age}" for prefix, age in value.items()]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return _checked(setting, tuple(value), where)
        raise ConfigError(f"{where} must be a list of strings, not {value!r}")
    wanted = (int, float) if setting.type is float else (setting.type,)
    # bool is a kind of int in Python, but true is no number of bytes.
    if not isinstance(value, wanted) or (isinstance(value, bool) and setting.type is not bool):
        raise ConfigError(f"{where} must be {_type_name(setting)}, not {value!r}")
    return _checked(setting, setting.type(value), where)


def _from_text(setting: Setting, text: str) -> Value:
    if setting.type is tuple:
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        return _checked(setting, parts, setting.variable)
    if setting.type is bool:
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in known:
            raise ConfigError(f"{setting.variable} must be true or false, not {text!r}")
        return known[text.lower()]
    try:
        value: Value = setting.type(text)
    except ValueError:
        raise ConfigError(f"{setting.variable} must be {_type_name(setting)}, not {text!r}") from None
    return _checked(setting, value, setting.variable)


def _checked(setting: Setting, value: Value, where: str) -> Value:
    """The value, if it is in its range."""
    _check_text(value, where)
    if value == () and setting.minimum:
        raise ConfigError(f"{where} must name at least one address")
    if value == "":
        raise ConfigError(f"{where} is empty: give it a value, or leave it out")
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{where} must be one of {', '.join(setting.choices)}, not {value!r}")
    if setting.type in (int, float) and not (
        isinstance(value, int | float) and setting.minimum <= value <= setting.maximum
    ):
        raise ConfigError(f"{where} must be {setting.minimum:,} to {setting.maximum:,}, not {value!r}")
    return value


def _check_text(value: Value, where: str) -> None:
    """Refuse text that is no UTF-8, or holds a NUL: neither the journal nor the system takes such a name."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and (_UNPAIRED.search(text) or "\0" in text):
            raise ConfigError(f"{where} must be UTF-8 without NUL, not {text!r}: rename it, or give another")


def _type_name(setting: Setting) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[setting.type]


# showing ----------------------------------------------------------------------------------------------------


def to_toml(loaded: Loaded) -> str:
    """The configuration in force as a TOML file, each line with where its value comes from."""
    lines = [
        f"{name} = {_toml(getattr(loaded.config, name))}  # {loaded.sources[name]}" for name in SETTINGS
    ]
    return "\n".join(lines) + "\n"


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return _quoted(value)
    return str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04X}" if c < " " or c == "\x7f" else c for c in escaped) + '"'


def markdown_table() -> str:
    """The table of docs/configuration.md."""
    rows: list[Sequence[str]] = [("setting", "default", "unit", "what it is"), ("---", "---", "---", "---")]
    for setting in SETTINGS.values():
        default = setting.default_text or f"`{_toml(setting.default)}`"
        rows.append((f"`{setting.name}`", default, setting.unit, setting.help))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

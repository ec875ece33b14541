"""Settings: where they come from, which one wins, what is refused, and that the docs tell them all."""

import tomllib
from pathlib import Path

import pytest
from meta.tools import ROOT
from sessionstore import _targets
from sessionstored import config
from sessionstored.config import SETTINGS, ConfigError, load


@pytest.fixture(autouse=True)
def no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default file is one of this test's own; it does not exist yet."""
    path = tmp_path / "default.toml"
    monkeypatch.setattr(config, "default_file", lambda: path)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_contract():
    loaded = load({}, {"XDG_RUNTIME_DIR": "/run/user/7"})
    assert loaded.config.listen == ("unix:/run/user/7/sessionstore/sock",)
    assert Path(loaded.config.data).is_absolute()
    assert set(loaded.sources.values()) == {"default"}
    assert set(loaded.sources) == set(SETTINGS)
    bounds, limits = loaded.config.bounds(), loaded.config.limits()
    assert (bounds.key_bytes_max, bounds.metadata_bytes_max, bounds.page_size_max) == (512, 256 << 10, 1000)
    assert (bounds.messages.message_bytes_max, bounds.messages.batch_bytes_max) == (8 << 20, 16 << 20)
    assert (bounds.messages.batch_messages_max, bounds.messages.message_depth_max) == (10_000, 200)
    assert (limits.window_calls_max, limits.window_request_ids_max) == (1024, 1000)
    assert limits.window_age_max_s == 24 * 3600


def test_a_flag_beats_the_environment_which_beats_toml_which_beats_the_default(tmp_path: Path):
    file = write(tmp_path / "my.toml", "page_size_max = 1\nkey_bytes_max = 1\nmessage_bytes_max = 1\n")
    environment = {"SESSIONSTORED_KEY_BYTES_MAX": "2", "SESSIONSTORED_MESSAGE_BYTES_MAX": "2"}
    loaded = load({"message_bytes_max": 3}, environment, file)
    values = loaded.config
    assert (values.page_size_max, values.key_bytes_max, values.message_bytes_max) == (1, 2, 3)
    assert values.batch_messages_max == 10_000
    assert loaded.sources["page_size_max"] == str(file)
    assert loaded.sources["key_bytes_max"] == "SESSIONSTORED_KEY_BYTES_MAX"
    assert loaded.sources["message_bytes_max"] == "--message-bytes-max"
    assert loaded.sources["batch_messages_max"] == "default"


def test_every_setting_comes_from_each_place(tmp_path: Path):
    shown = config.to_toml(load({}, {}))
    by_type = {bool: True, int: 5000, float: 9.5, str: "x", tuple: ()}
    other = {
        name: setting.choices[-1] if setting.choices else by_type[setting.type]
        for name, setting in SETTINGS.items()
    }
    other |= {"data": "/d", "listen": ("h:1", "unix:/s"), "store": "memory", "key_bytes_max": 7}
    other |= {"expire": ("tmp:=7d", "tmp:a=b:=never")}
    other |= {"message_depth_max": 7, "request_id_bytes_max": 7, "backlog_bytes_max": 1 << 21}
    texts = {
        name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in other.items()
    }
    environment = {SETTINGS[name].variable: text for name, text in texts.items()}
    from_environment = load({}, environment)
    from_flags = load(other, {})
    file = write(tmp_path / "all.toml", config.to_toml(from_flags))
    from_file = load({}, {}, file)
    assert from_environment.config == from_flags.config == from_file.config
    assert set(from_file.sources.values()) == {str(file)}
    for name in SETTINGS:
        assert getattr(from_flags.config, name) != getattr(load({}, {}).config, name), name
    assert tomllib.loads(shown)["listen"] == list(load({}, {}).config.listen)


def test_the_default_file_is_read_if_it_exists(no_file: Path):
    assert load({}, {}).config.page_size_max == 1000
    write(no_file, "page_size_max = 7")
    assert load({}, {}).config.page_size_max == 7


def test_a_named_file_must_exist(tmp_path: Path):
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=str(missing)):
        load({}, {}, missing)
    with pytest.raises(ConfigError, match=str(missing)):
        load({}, {"SESSIONSTORED_CONFIG": str(missing)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mesage_bytes_max = 1", "there is no setting 'mesage_bytes_max'; did you mean message_bytes_max?"),
        ("[serve]\ndata = 'x'", "there is no setting 'serve'"),
        ("xyzzy = 1", "`sessionstored config` lists the names"),
        ("page_size_max = '7'", "page_size_max must be a whole number, not '7'"),
        ("page_size_max = 7.5", "page_size_max must be a whole number, not 7.5"),
        ("page_size_max = true", "page_size_max must be a whole number, not True"),
        ("page_size_max = 0", "page_size_max must be 1 to 2,147,483,648, not 0"),
        ("message_bytes_max = 2000000000", "message_bytes_max must be 1 to 1,073,741,824"),
        ("drain_s_max = 'x'", "drain_s_max must be a number, not 'x'"),
        ("drain_s_max = nan", "drain_s_max must be 0 to 3,600, not nan"),
        ("window_calls_max = 1023", "window_calls_max must be 1,024 to 2,147,483,648, not 1023"),
        ("insecure = 1", "insecure must be true or false, not 1"),
        ("listen = 'a:1'", "listen must be a list of strings, not 'a:1'"),
        ("listen = [1]", r"listen must be a list of strings, not \[1\]"),
        ("listen = []", "listen must name at least one address"),
        ("data = 5", "data must be a string, not 5"),
        (r'data = "a\u0000b"', r"data must be UTF-8 without NUL, not 'a\\x00b': rename it"),
        (r'listen = ["unix:\u0000"]', "listen must be UTF-8 without NUL"),
        ("durability = 'none'", "durability must be one of fsync, os, not 'none'"),
        ("page_size_max = ", "cannot be read"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, said: str):
    file = write(tmp_path / "bad.toml", text)
    with pytest.raises(ConfigError, match=said) as caught:
        load({}, {}, file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("PAGE_SIZE_MAX", "many", "SESSIONSTORED_PAGE_SIZE_MAX must be a whole number, not 'many'"),
        ("DRAIN_S_MAX", "-1", "SESSIONSTORED_DRAIN_S_MAX must be 0 to 3,600, not -1.0"),
        ("INSECURE", "maybe", "SESSIONSTORED_INSECURE must be true or false, not 'maybe'"),
        ("LOG_LEVEL", "loud", "SESSIONSTORED_LOG_LEVEL must be one of"),
        ("LISTEN", " , ", "SESSIONSTORED_LISTEN must name at least one address"),
        ("LISTEN", "h:1,unix:\udcff", r"SESSIONSTORED_LISTEN must be UTF-8 without NUL, not 'unix:\\udcff'"),
        ("DATA", "/a/\udcff", r"SESSIONSTORED_DATA must be UTF-8 without NUL, not '/a/\\udcff': rename it"),
    ],
)
def test_what_the_environment_may_not_say(variable: str, text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        load({}, {f"SESSIONSTORED_{variable}": text})


def test_what_a_flag_may_not_say():
    with pytest.raises(ConfigError, match="--page-size-max must be 1 to"):
        load({"page_size_max": 0}, {})


def test_a_directory_that_is_no_text_is_refused_whatever_it_comes_from(monkeypatch):
    with pytest.raises(ConfigError, match=r"--data must be UTF-8 without NUL, not '/a/\\udcff': rename it"):
        load({"data": "/a/\udcff"}, {})
    with pytest.raises(ConfigError, match="listen, from default, must be UTF-8"):
        load({}, {"XDG_RUNTIME_DIR": "/\udcff"})
    monkeypatch.setenv("HOME", "/home/\udcff")
    with pytest.raises(ConfigError, match="data, from --data, must be UTF-8 without NUL, not '/home/"):
        load({"data": "~/sessions"}, {})


def test_others_variables_are_not_settings():
    """An orchestrator sets such names by itself for a service that is called sessionstored."""
    assert load({}, {"SESSIONSTORED_SERVICE_HOST": "10.0.0.1"}).config == load({}, {}).config


def test_unknown_variables_are_found_with_the_nearest_setting():
    ours = dict.fromkeys(["SESSIONSTORED_CONFIG", *(each.variable for each in SETTINGS.values())], "")
    injected = ["SESSIONSTORED_PORT", "SESSIONSTORED_PORT_7437_TCP", "SESSIONSTORED_SERVICE_HOST"]
    wrong = {"SESSIONSTORED_LISTENS": "", "SESSIONSTORED_XYZZY": "", "SESSIONSTORED_PORTS": ""}
    found = config.unknown_variables(ours | dict.fromkeys([*injected, "SESSIONSTORE_X"], "") | wrong)
    assert set(found) == set(wrong)
    assert found["SESSIONSTORED_LISTENS"] == "SESSIONSTORED_LISTEN"


def test_an_empty_variable_is_none():
    assert load({}, {"SESSIONSTORED_PAGE_SIZE_MAX": ""}).sources["page_size_max"] == "default"


@pytest.mark.parametrize(
    ("environment", "uid", "expected"),
    [
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "unix:/run/user/7/sessionstore/sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 0, "unix:/run/user/7/sessionstore/sock"),
        ({"XDG_RUNTIME_DIR": "relative"}, 0, "unix:/run/sessionstore/sock"),
        ({}, 0, "unix:/run/sessionstore/sock"),
        ({}, 7, "unix:/tmp/sessionstore-7/sock"),
    ],
)
def test_the_default_socket(monkeypatch, environment: dict[str, str], uid: int, expected: str):
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert config.default_socket(environment, uid) == expected


@pytest.mark.parametrize("runtime", ["/run/user/7", ""])
@pytest.mark.parametrize("uid", [0, 7])
def test_the_sdk_looks_for_the_daemon_where_it_serves(monkeypatch, runtime: str, uid: int):
    monkeypatch.setattr("os.getuid", lambda: uid)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert config.default_socket() == _targets.default_socket()


def test_the_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load({"data": "~/sessions"}, {}).config.data == "/home/me/sessions"


def test_the_printed_configuration_can_be_read_again(tmp_path: Path):
    loaded = load({"data": '/a "quoted"\\path\n#', "insecure": True}, {})
    text = config.to_toml(loaded)
    assert load({}, {}, write(tmp_path / "again.toml", text)).config == loaded.config
    assert "insecure = true  # --insecure" in text


def test_the_docs_hold_the_table_of_the_declaration():
    assert config.markdown_table() in (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_limit_has_its_unit_and_a_sentence(name: str):
    setting = SETTINGS[name]
    assert setting.help.endswith(".")
    if name.endswith(("_max", "_min")):
        assert setting.unit
        assert setting.minimum <= setting.default <= setting.maximum

"""A daemon on a workspace of plain files: it agrees, it changes nothing unasked, and one can go back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.workspaces import BAD, EXPECTED, HEALTHY, TORN, copy_workspace, prints, quarantined, raw_messages
from daemons import Daemon, wait_until
from seed_reader import read_session
from sessionstore.v1 import session_store_pb2 as pb
from wire import block, refusal

SEVEN = ("a:b", "a/b", "a_b", "A:B", "k" * 512, "..", "ключ/✓")


@pytest.fixture
def served(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    """A daemon on a copy of the workspace."""
    return make_daemon(copy_workspace(tmp_path / "workspace"), store="jsonl").start()


def messages(daemon: Daemon, key: str) -> list[bytes]:
    blocks = daemon.stub.ReadMessages(pb.ReadMessagesRequest(key=key), timeout=60)
    return b"".join(each.messages for each in blocks).splitlines()


def append(daemon: Daemon, key: str, *new: object) -> pb.AppendMessagesResponse:
    return daemon.stub.AppendMessages(pb.AppendMessagesRequest(key=key, messages=block(*new)), timeout=60)


def read_all(daemon: Daemon) -> None:
    for name, expected in EXPECTED.items():
        if name != BAD:
            messages(daemon, str(expected["key"]))


def test_the_daemon_agrees_with_what_is_expected_of_every_file(served: Daemon) -> None:
    for name, expected in EXPECTED.items():
        key, path = str(expected["key"]), served.data / "sessions" / name
        if name == BAD:
            no = refusal(lambda key=key: messages(served, key))  # type: ignore[misc]
            assert (no.reason, no.metadata["file"], no.metadata["line"]) == (
                "DATA_LOSS",
                f"sessions/{BAD}",
                "5",
            )
            continue
        session = served.stub.GetSession(pb.GetSessionRequest(key=key), timeout=60).session
        assert session.message_count == expected["messages"], name
        if "metadata" in expected:
            assert json.loads(session.metadata) == expected["metadata"], name
        if "last_consolidated" in expected:
            assert session.last_consolidated == expected["last_consolidated"], name
        assert bool(session.damage) == (name in TORN), name
        assert messages(served, key) == raw_messages(path), name
        if name in HEALTHY:
            plain = read_session(path)
            assert plain is not None
            assert plain.created_at is not None
            assert session.create_time.ToNanoseconds() // 1000 == round(plain.created_at.timestamp() * 1e6)


def test_the_whole_workspace_is_listed(served: Daemon) -> None:
    listed = served.stub.ListSessions(pb.ListSessionsRequest(page_size=100), timeout=60).sessions
    assert {
        session.key: session.message_count for session in listed if session.key != EXPECTED[BAD]["key"]
    } == {expected["key"]: expected["messages"] for name, expected in EXPECTED.items() if name != BAD}
    assert EXPECTED[BAD]["key"] in {session.key for session in listed}


def test_no_file_changes_until_its_session_is_written_to(served: Daemon, tmp_path: Path) -> None:
    untouched = prints(copy_workspace(tmp_path / "other"))
    read_all(served)
    served.restart()
    read_all(served)
    append(served, "telegram:8812733", {"role": "user"})
    served.restart(kill=True)
    read_all(served)
    served.stub.UpdateSession(
        pb.UpdateSessionRequest(
            key="plain", last_consolidated=2, update_mask={"paths": ["last_consolidated"]}
        ),
        timeout=60,
    )
    assert served.terminate() == 0
    after = prints(served.data)
    changed = {name for name in after if after[name][0] != untouched[name][0]}
    assert changed == {"telegram_8812733.jsonl", "plain.jsonl"}
    for name in changed:
        assert after[name][0].startswith(untouched[name][0])
    assert {name for name in after if after[name][1] != untouched[name][1]} == changed


def test_one_can_go_back_to_plain_files(served: Daemon) -> None:
    """After writes of every kind and a clean stop, plain files say what the daemon said."""
    stub, keys = served.stub, {str(EXPECTED[name]["key"]): name for name in HEALTHY}
    append(served, "cli:direct", {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
    stub.PopMessage(pb.PopMessageRequest(key="telegram:8812733"), timeout=60)
    stub.ReplaceMessages(
        pb.ReplaceMessagesRequest(key="plain", start=1, delete_count=2, messages=block({"new": 1})),
        timeout=60,
    )
    stub.ReplaceMessages(pb.ReplaceMessagesRequest(key="whatsapp:a_b", start=0), timeout=60)
    stub.UpdateSession(
        pb.UpdateSessionRequest(
            key="cron:heartbeat", metadata=b'{"big": 9007199254740993}', update_mask={"paths": ["metadata"]}
        ),
        timeout=60,
    )
    for torn in TORN:
        append(served, str(EXPECTED[torn]["key"]), {"role": "user", "content": "after the tear"})
    keys |= {str(EXPECTED[torn]["key"]): torn for torn in TORN}
    said = {key: list(map(json.loads, messages(served, key))) for key in keys}
    heads = {key: stub.GetSession(pb.GetSessionRequest(key=key), timeout=60).session for key in keys}
    assert served.terminate() == 0
    for key, name in keys.items():
        plain = read_session(served.data / "sessions" / name)
        assert plain is not None, name
        assert plain.messages == said[key]
        assert plain.metadata == json.loads(heads[key].metadata)
        assert plain.last_consolidated == heads[key].last_consolidated


@pytest.mark.parametrize("name", ["bom_file.jsonl", "meta_null.jsonl"])
def test_a_file_that_plain_readers_cannot_read_is_one_that_they_can_after_a_write(
    served: Daemon, name: str
) -> None:
    file = served.data / "sessions" / name
    assert read_session(file) is None
    key = str(EXPECTED[name]["key"])
    append(served, key, {"role": "user", "content": "more"})
    assert served.terminate() == 0
    session = read_session(file)
    assert session is not None
    assert session.key == key
    assert len(session.messages) == EXPECTED[name]["messages"] + 1


def test_torn_bytes_are_set_aside(served: Daemon) -> None:
    sessions = served.data / "sessions"
    torn = []
    for name in TORN:
        lines = (sessions / name).read_bytes().splitlines(keepends=True)
        torn.append(lines[-1])
        assert raw_messages(sessions / name)[-1] == lines[-2].strip()
    assert sorted(torn) == quarantined(served.data)
    for name in TORN:
        append(served, str(EXPECTED[name]["key"]), {"role": "user"})
    assert sorted(torn) == quarantined(served.data)


def test_a_session_with_a_bad_line_inside_is_left_alone_but_can_be_deleted(served: Daemon) -> None:
    key, path = str(EXPECTED[BAD]["key"]), served.data / "sessions" / BAD
    before = path.read_bytes()
    for call in (
        lambda: append(served, key, {"role": "user"}),
        lambda: served.stub.PopMessage(pb.PopMessageRequest(key=key), timeout=60),
        lambda: served.stub.ForkSession(pb.ForkSessionRequest(source_key=key, key="fork"), timeout=60),
        lambda: served.stub.CreateSession(pb.CreateSessionRequest(key=key), timeout=60),
    ):
        assert refusal(call).reason == "DATA_LOSS"
    assert path.read_bytes() == before
    aside = quarantined(served.data)
    served.stub.DeleteSession(pb.DeleteSessionRequest(key=key), timeout=60)
    wait_until(lambda: not path.exists())
    assert sorted([*aside, before]) == quarantined(served.data)
    served.restart(kill=True)
    assert refusal(lambda: messages(served, key)).reason == "SESSION_NOT_FOUND"
    append(served, key, {"role": "user"})
    assert messages(served, key) == [b'{"role": "user"}']


@pytest.mark.parametrize("adopted", [False, True])
def test_seven_keys_are_seven_sessions(
    make_daemon: Callable[..., Daemon], tmp_path: Path, adopted: bool
) -> None:
    data = tmp_path / "data"
    if adopted:
        (data / "sessions").mkdir(parents=True)
        (data / "sessions" / "a_b.jsonl").write_bytes(
            b'{"_type": "metadata", "key": "a:b"}\n{"role": "user", "content": "adopted"}\n'
        )
    daemon = make_daemon(data, store="jsonl").start()
    for key in SEVEN:
        append(daemon, key, {"key": key})
    expected = {
        key: [b'{"role": "user", "content": "adopted"}'] if adopted and key == "a:b" else [] for key in SEVEN
    }
    for restart in (lambda: None, lambda: daemon.restart(kill=True), daemon.restart):
        restart()
        for key in SEVEN:
            assert messages(daemon, key) == [*expected[key], json.dumps({"key": key}).encode()]
    assert daemon.terminate() == 0
    files = {path.name: read_session(path) for path in (data / "sessions").iterdir()}
    assert len(files) == 7
    assert {session.key for session in files.values() if session} == set(SEVEN)

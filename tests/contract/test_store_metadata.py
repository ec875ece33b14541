"""Metadata at the wire: what an update does not name keeps its bytes, what it names is stored as sent."""

import pytest
from daemons import Daemon
from google.protobuf.field_mask_pb2 import FieldMask
from sessionstore.v1 import session_store_pb2 as v1

STORES = pytest.mark.parametrize("daemon", ["memory:", "jsonl"], indirect=True)

ODD = '{"n":1E5 , "long": 0.1234567890123456789012, "ключ": [ 1 ], "same": "\\u00e9"}'.encode()


def update(daemon: Daemon, metadata: bytes, *paths: str) -> v1.UpdateSessionResponse:
    mask = FieldMask(paths=paths)
    return daemon.stub.UpdateSession(v1.UpdateSessionRequest(key="k", metadata=metadata, update_mask=mask))


def stored(daemon: Daemon) -> bytes:
    return daemon.stub.GetSession(v1.GetSessionRequest(key="k")).session.metadata


@STORES
def test_members_are_stored_as_they_came(daemon: Daemon) -> None:
    daemon.stub.CreateSession(v1.CreateSessionRequest(key="k", metadata=ODD))
    assert stored(daemon) == ODD
    # New members come in the order of the mask; a member that the metadata lacks is removed.
    update(
        daemon,
        b'{"a.b": 2.50, "z": {"y":1E1}, "unnamed": 1}',
        "metadata.z",
        "metadata.a.b",
        "metadata.long",
        "metadata.none",
    )
    expected = '{"n": 1E5, "ключ": [ 1 ], "same": "\\u00e9", "z": {"y":1E1}, "a.b": 2.50}'
    assert stored(daemon) == expected.encode()


@STORES
def test_an_update_to_what_is_there_changes_nothing(daemon: Daemon) -> None:
    made = daemon.stub.CreateSession(v1.CreateSessionRequest(key="k", metadata=ODD)).result
    result = update(daemon, b'{"n":1E5}', "metadata.n", "metadata.none").result
    assert (result.revision, result.update_time) == (made.revision, made.update_time)
    result = update(daemon, ODD, "metadata").result
    assert result.revision == made.revision
    assert stored(daemon) == ODD


@STORES
def test_a_whole_and_a_member_of_it(daemon: Daemon) -> None:
    daemon.stub.CreateSession(v1.CreateSessionRequest(key="k", metadata=ODD))
    result = update(daemon, b'{"a":1}', "metadata", "metadata.b", "metadata.a").result
    assert result.revision > result.previous_revision
    assert stored(daemon) == b'{"a":1}'

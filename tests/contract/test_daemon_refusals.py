"""What bad input gets at the wire: its own reason, its metadata, and nothing stored."""

from collections.abc import Callable

import grpc
import pytest
from daemons import channel_to
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as v1
from wire import block, refusal

MIB = 1 << 20
GOOD = block({"role": "user", "content": "good"})


def call(client_id: str = "c", sequence: int = 1, answered_through: int = 0, age: Duration | None = None):
    return session_pb2.CallIdentity(
        client_id=client_id, sequence=sequence, answered_through=answered_through, age=age
    )


def mask(*paths: str) -> FieldMask:
    return FieldMask(paths=paths)


# What every message block is held to: (block, reason, metadata).
BLOCKS = {
    "not JSON": (GOOD + b"{nope}\n", "MESSAGE_NOT_JSON", {"index": "1", "detail": ...}),
    "not UTF-8": (GOOD + b'{"a": "\xff"}\n', "MESSAGE_NOT_JSON", {"index": "1", "detail": ...}),
    "blank line": (GOOD + b"\n" + GOOD, "MESSAGE_NOT_JSON", {"index": "1", "detail": ...}),
    "array": (GOOD + b"[1]\n", "MESSAGE_NOT_OBJECT", {"index": "1"}),
    "string": (b'"hi"\n', "MESSAGE_NOT_OBJECT", {"index": "0"}),
    "NaN": (GOOD + GOOD + b'{"a": NaN}\n', "MESSAGE_NOT_FINITE", {"index": "2"}),
    "Infinity": (b'{"a": [1, -Infinity]}\n', "MESSAGE_NOT_FINITE", {"index": "0"}),
    "too large a number": (b'{"a": 1e999}\n', "MESSAGE_NOT_FINITE", {"index": "0"}),
    "lone surrogate": (GOOD + b'{"a": "\\ud83d"}\n', "MESSAGE_LONE_SURROGATE", {"index": "1"}),
    "header": (GOOD + b'{"_type": "metadata"}\n', "MESSAGE_RESERVED_TYPE", {"index": "1"}),
    "too deep": (
        b'{"a":' + b"[" * 200 + b"]" * 200 + b"}\n",
        "MESSAGE_TOO_DEEP",
        {"index": "0", "limit": "200"},
    ),
    "too large": (
        GOOD + b'{"a": "' + b"x" * 8 * MIB + b'"}\n',
        "MESSAGE_TOO_LARGE",
        {"index": "1", "size_bytes": str(8 * MIB + 9), "limit_bytes": str(8 * MIB)},
    ),
    "too many": (GOOD * 10_001, "BATCH_TOO_MANY", {"count": "10001", "limit": "10000"}),
    "too many bytes": (
        (b'{"a": "' + b"x" * MIB + b'"}\n') * 16,
        "BATCH_TOO_LARGE",
        {"size_bytes": str(16 * (MIB + 10)), "limit_bytes": str(16 * MIB)},
    ),
}
# What every key is held to.
KEYS = {
    "empty": ("", "KEY_EMPTY", {}),
    "too long": ("x" * 513, "KEY_TOO_LONG", {"size_bytes": "513", "limit_bytes": "512"}),
    "too many bytes": ("ключ" * 65, "KEY_TOO_LONG", {"size_bytes": "520", "limit_bytes": "512"}),
    "NUL": ("a\0b", "KEY_INVALID", {"index": "1"}),
    "line feed": ("ключ\n", "KEY_INVALID", {"index": "4"}),
    "C1 control": ("\x85", "KEY_INVALID", {"index": "0"}),
}
# The requests that name a session, each right but for its key.
NAMED: dict[str, Callable[[str], object]] = {
    "CreateSession": lambda key: v1.CreateSessionRequest(key=key),
    "GetSession": lambda key: v1.GetSessionRequest(key=key),
    "AppendMessages": lambda key: v1.AppendMessagesRequest(key=key, messages=GOOD),
    "ReplaceMessages": lambda key: v1.ReplaceMessagesRequest(key=key, messages=GOOD),
    "PopMessage": lambda key: v1.PopMessageRequest(key=key),
    "UpdateSession": lambda key: v1.UpdateSessionRequest(key=key, update_mask=mask("metadata")),
    "ForkSession": lambda key: v1.ForkSessionRequest(key=key, source_key="source"),
    "DeleteSession": lambda key: v1.DeleteSessionRequest(key=key),
    "GetHistory": lambda key: v1.GetHistoryRequest(key=key),
    "ReadMessages": lambda key: v1.ReadMessagesRequest(key=key),
}
READS = ("GetSession", "GetHistory", "ReadMessages")
CREATING = ("CreateSession", "AppendMessages")
# What every mutation carries: (fields, reason, metadata).
CARRIED = {
    "no client_id": ({"call": call("")}, "CALL_INVALID", {"field": "call.client_id", "detail": ...}),
    "long client_id": ({"call": call("x" * 65)}, "CALL_INVALID", {"field": "call.client_id", "detail": ...}),
    "sequence 0": ({"call": call(sequence=0)}, "CALL_INVALID", {"field": "call.sequence", "detail": ...}),
    "answered ahead": (
        {"call": call(sequence=3, answered_through=3)},
        "CALL_INVALID",
        {"field": "call.answered_through", "detail": ...},
    ),
    "answered negative": (
        {"call": call(answered_through=-1)},
        "CALL_INVALID",
        {"field": "call.answered_through", "detail": ...},
    ),
    "negative age": (
        {"call": call(age=Duration(seconds=-1))},
        "CALL_INVALID",
        {"field": "call.age", "detail": ...},
    ),
    "age of a day": (
        {"call": call(age=Duration(seconds=24 * 3600))},
        "CALL_EXPIRED",
        {"client_id": "c", "sequence": "1"},
    ),
    "long request_id": (
        {"request_id": "я" * 129},
        "REQUEST_ID_INVALID",
        {"size_bytes": "258", "limit_bytes": "256"},
    ),
    "negative expected_revision": (
        {"expected_revision": -1},
        "ARGUMENT_INVALID",
        {"field": "expected_revision", "detail": ...},
    ),
}
# Everything else, on a session "KEY" of two messages: (method, request fields, reason, metadata).
REST = {
    "empty batch": ("AppendMessages", {"messages": b""}, "BATCH_EMPTY", {}),
    "stale revision": (
        "AppendMessages",
        {"messages": GOOD, "expected_revision": 10**9},
        "REVISION_CONFLICT",
        {"key": "KEY", "expected_revision": str(10**9), "revision": ..., "message_count": "2"},
    ),
    "must not exist": (
        "AppendMessages",
        {"messages": GOOD, "expected_revision": 0},
        "REVISION_CONFLICT",
        {"key": "KEY", "expected_revision": "0", "revision": ..., "message_count": "2"},
    ),
    "exists": ("CreateSession", {}, "SESSION_EXISTS", {"key": "KEY", "revision": ..., "message_count": "2"}),
    "create at a revision": (
        "CreateSession",
        {"expected_revision": 7},
        "ARGUMENT_INVALID",
        {"field": "expected_revision", "detail": ...},
    ),
    "metadata no object": ("CreateSession", {"metadata": b"[]"}, "METADATA_INVALID", {"detail": ...}),
    "metadata NaN": ("CreateSession", {"metadata": b'{"a": NaN}'}, "METADATA_INVALID", {"detail": ...}),
    "metadata in lines": ("CreateSession", {"metadata": b'{"a":\n1}'}, "METADATA_INVALID", {"detail": ...}),
    "metadata too large": (
        "CreateSession",
        {"metadata": b'{"a": "' + b"x" * 256 * 1024 + b'"}'},
        "METADATA_TOO_LARGE",
        {"size_bytes": str(256 * 1024 + 9), "limit_bytes": str(256 * 1024)},
    ),
    "no timestamp": (
        "CreateSession",
        {"create_time": Timestamp(nanos=-1)},
        "ARGUMENT_INVALID",
        {"field": "create_time", "detail": ...},
    ),
    "start behind the end": (
        "ReplaceMessages",
        {"start": 3, "messages": GOOD},
        "INDEX_OUT_OF_RANGE",
        {"field": "start", "index": "3", "message_count": "2"},
    ),
    "negative start": (
        "ReplaceMessages",
        {"start": -1},
        "INDEX_OUT_OF_RANGE",
        {"field": "start", "index": "-1", "message_count": "2"},
    ),
    "delete too many": (
        "ReplaceMessages",
        {"start": 1, "delete_count": 2},
        "INDEX_OUT_OF_RANGE",
        {"field": "delete_count", "index": "3", "message_count": "2"},
    ),
    "delete negative": (
        "ReplaceMessages",
        {"delete_count": -1},
        "LIMIT_NEGATIVE",
        {"field": "delete_count", "value": "-1"},
    ),
    "empty mask": ("UpdateSession", {"metadata": b"{}"}, "FIELD_MASK_INVALID", {"path": ""}),
    "unknown path": (
        "UpdateSession",
        {"update_mask": mask("metadata", "messages")},
        "FIELD_MASK_INVALID",
        {"path": "messages"},
    ),
    "last_consolidated ahead": (
        "UpdateSession",
        {"update_mask": mask("last_consolidated"), "last_consolidated": 3},
        "LAST_CONSOLIDATED_OUT_OF_RANGE",
        {"index": "3", "message_count": "2"},
    ),
    "last_consolidated negative": (
        "UpdateSession",
        {"update_mask": mask("last_consolidated"), "last_consolidated": -1},
        "LAST_CONSOLIDATED_OUT_OF_RANGE",
        {"index": "-1", "message_count": "2"},
    ),
    "negative known count": (
        "GetSession",
        {"known_message_count": -1},
        "LIMIT_NEGATIVE",
        {"field": "known_message_count", "value": "-1"},
    ),
    "negative last": ("GetSession", {"last": -5}, "LIMIT_NEGATIVE", {"field": "last", "value": "-5"}),
    "negative known revision": (
        "GetSession",
        {"known_revision": -1},
        "ARGUMENT_INVALID",
        {"field": "known_revision", "detail": ...},
    ),
    "negative window": (
        "GetHistory",
        {"max_messages": -1},
        "LIMIT_NEGATIVE",
        {"field": "max_messages", "value": "-1"},
    ),
    "too many names to keep": (
        "GetHistory",
        {"keep": ["n"] * 101},
        "ARGUMENT_INVALID",
        {"field": "keep", "detail": "holds 101 names; the limit is 100"},
    ),
    "a call to keep": (
        "GetHistory",
        {"keep": ["n", "function_call"]},
        "ARGUMENT_INVALID",
        {"field": "keep", "detail": ...},
    ),
    "negative limit": ("ReadMessages", {"limit": -1}, "LIMIT_NEGATIVE", {"field": "limit", "value": "-1"}),
    "read behind the end": (
        "ReadMessages",
        {"start": 3},
        "INDEX_OUT_OF_RANGE",
        {"field": "start", "index": "3", "message_count": "2"},
    ),
    "read before the start": (
        "ReadMessages",
        {"start": -1},
        "INDEX_OUT_OF_RANGE",
        {"field": "start", "index": "-1", "message_count": "2"},
    ),
    "read at an unknown revision": (
        "ReadMessages",
        {"known_revision": 2**62},
        "REVISION_CONFLICT",
        {"key": "KEY", "expected_revision": str(2**62), "revision": ..., "message_count": "2"},
    ),
}
LISTS = {
    "negative page": ({"page_size": -1}, "LIMIT_NEGATIVE", {"field": "page_size", "value": "-1"}),
    "large page": ({"page_size": 1001}, "PAGE_SIZE_TOO_LARGE", {"value": "1001", "limit": "1000"}),
    "foreign token": ({"page_token": "bm90aGluZw=="}, "PAGE_TOKEN_INVALID", {}),
    "no token at all": ({"page_token": "ключ"}, "PAGE_TOKEN_INVALID", {}),
    "unknown order": ({"order": 99}, "ARGUMENT_INVALID", {"field": "order", "detail": ...}),
    "no timestamp": (
        {"updated_since": Timestamp(seconds=2**60)},
        "ARGUMENT_INVALID",
        {"field": "updated_since", "detail": ...},
    ),
}


def ids(table: dict[str, object]) -> dict[str, object]:
    return {"argvalues": list(table.values()), "ids": list(table)}


def send(daemon, method: str, request: object) -> object:
    reply = getattr(daemon.stub, method)(request, timeout=100)
    return list(reply) if method == "ReadMessages" else reply


def expect(got, reason: str, metadata: dict[str, object], key: str = "KEY") -> None:
    """`...` stands for a value that is not foreseen, but not empty."""
    assert (got.domain, got.reason) == ("sessionstore.v1", reason)
    assert set(got.metadata) == set(metadata)
    for name, value in metadata.items():
        found = got.metadata[name]
        assert found if value is ... else found == (key if value == "KEY" else value)
    assert got.text
    assert got.size <= 6000


def stored(daemon, key: str) -> tuple[int, bytes, bytes] | None:
    try:
        got = daemon.stub.GetSession(v1.GetSessionRequest(key=key))
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return None
        raise
    return got.session.revision, got.messages, got.session.metadata


@pytest.fixture
def session(shared_daemon, key: str) -> str:
    shared_daemon.stub.AppendMessages(v1.AppendMessagesRequest(key=key, messages=GOOD + GOOD))
    return key


@pytest.mark.parametrize("method", ["CreateSession", "AppendMessages", "ReplaceMessages"])
@pytest.mark.parametrize(("messages", "reason", "metadata"), **ids(BLOCKS))
def test_a_bad_batch_is_refused_as_a_whole(shared_daemon, session, method, messages, reason, metadata):
    before = stored(shared_daemon, session)
    request = getattr(v1, f"{method}Request")(key=session, messages=messages)
    expect(refusal(lambda: send(shared_daemon, method, request)), reason, metadata)
    assert stored(shared_daemon, session) == before


def test_a_refused_append_creates_no_session(shared_daemon, key):
    request = v1.AppendMessagesRequest(key=key, messages=GOOD + b"[]\n")
    assert refusal(lambda: shared_daemon.stub.AppendMessages(request)).reason == "MESSAGE_NOT_OBJECT"
    assert stored(shared_daemon, key) is None


@pytest.mark.parametrize("method", NAMED)
@pytest.mark.parametrize(("bad", "reason", "metadata"), **ids(KEYS))
def test_a_bad_key_is_refused_by_every_call(shared_daemon, method, bad, reason, metadata):
    got = refusal(lambda: send(shared_daemon, method, NAMED[method](bad)))
    expect(got, reason, {"field": "key", **metadata})


@pytest.mark.parametrize(("bad", "reason", "metadata"), **ids(KEYS))
def test_a_bad_source_key_is_refused_and_named(shared_daemon, key, bad, reason, metadata):
    request = v1.ForkSessionRequest(key=key, source_key=bad)
    got = refusal(lambda: shared_daemon.stub.ForkSession(request))
    expect(got, reason, {"field": "source_key", **metadata})


@pytest.mark.parametrize("method", [method for method in NAMED if method not in READS])
@pytest.mark.parametrize(("fields", "reason", "metadata"), **ids(CARRIED))
def test_a_bad_identity_is_refused(shared_daemon, session, method, fields, reason, metadata):
    before = stored(shared_daemon, session)
    request = NAMED[method](session)
    request.MergeFrom(type(request)(**fields))
    expect(refusal(lambda: send(shared_daemon, method, request)), reason, metadata)
    assert stored(shared_daemon, session) == before


@pytest.mark.parametrize(("method", "fields", "reason", "metadata"), **ids(REST))
def test_other_bad_arguments_are_refused(shared_daemon, session, method, fields, reason, metadata):
    before = stored(shared_daemon, session)
    request = getattr(v1, f"{method}Request")(key=session, **fields)
    expect(refusal(lambda: send(shared_daemon, method, request)), reason, metadata, key=session)
    assert stored(shared_daemon, session) == before


@pytest.mark.parametrize(("fields", "reason", "metadata"), **ids(LISTS))
def test_bad_listings_are_refused(shared_daemon, fields, reason, metadata):
    request = v1.ListSessionsRequest(**fields)
    expect(refusal(lambda: shared_daemon.stub.ListSessions(request)), reason, metadata)


@pytest.mark.parametrize("method", [method for method in NAMED if method not in CREATING])
def test_an_unknown_session_is_not_found_and_not_created(shared_daemon, key, method):
    got = refusal(lambda: send(shared_daemon, method, NAMED[method](key)))
    expect(got, "SESSION_NOT_FOUND", {"key": "source" if method == "ForkSession" else "KEY"}, key=key)
    assert stored(shared_daemon, key) is None


def test_create_fields_are_checked_against_the_messages(shared_daemon, key):
    request = v1.CreateSessionRequest(key=key, messages=GOOD, last_consolidated=2)
    got = refusal(lambda: shared_daemon.stub.CreateSession(request))
    expect(got, "LAST_CONSOLIDATED_OUT_OF_RANGE", {"index": "2", "message_count": "1"})
    future = v1.CreateSessionRequest(key=key, create_time=Timestamp(seconds=4_000_000_000))
    got = refusal(lambda: shared_daemon.stub.CreateSession(future))
    expect(got, "ARGUMENT_INVALID", {"field": "create_time", "detail": ...})
    assert stored(shared_daemon, key) is None


def test_members_that_are_too_large_together_are_refused(shared_daemon, key):
    half = b"x" * 130 * 1024
    shared_daemon.stub.CreateSession(v1.CreateSessionRequest(key=key, metadata=b'{"a": "%s"}' % half))
    before = stored(shared_daemon, key)
    second = v1.UpdateSessionRequest(key=key, update_mask=mask("metadata.b"), metadata=b'{"b": "%s"}' % half)
    got = refusal(lambda: shared_daemon.stub.UpdateSession(second))
    expect(got, "METADATA_TOO_LARGE", {"size_bytes": ..., "limit_bytes": str(256 * 1024)})
    assert stored(shared_daemon, key) == before


def test_a_fork_behind_the_end_is_refused(shared_daemon, session, key):
    fork = v1.ForkSessionRequest(key=key + "fork", source_key=session, at=3)
    got = refusal(lambda: shared_daemon.stub.ForkSession(fork))
    expect(got, "INDEX_OUT_OF_RANGE", {"field": "at", "index": "3", "message_count": "2"})
    fork.at = -1
    got = refusal(lambda: shared_daemon.stub.ForkSession(fork))
    expect(got, "LIMIT_NEGATIVE", {"field": "at", "value": "-1"})
    assert stored(shared_daemon, key + "fork") is None


def test_popping_an_empty_session_is_refused(shared_daemon, key):
    shared_daemon.stub.CreateSession(v1.CreateSessionRequest(key=key))
    got = refusal(lambda: shared_daemon.stub.PopMessage(v1.PopMessageRequest(key=key)))
    expect(got, "INDEX_OUT_OF_RANGE", {"field": "message", "index": "-1", "message_count": "0"})


def test_a_repeated_call_gets_the_first_answer_and_another_content_is_refused(shared_daemon, key):
    def request(text: str) -> v1.AppendMessagesRequest:
        identity = call(client_id=key, age=Duration(seconds=1 if text == "again" else 0))
        return v1.AppendMessagesRequest(key=key, call=identity, messages=block({"role": "user"}))

    first = shared_daemon.stub.AppendMessages(request("first"))
    again = shared_daemon.stub.AppendMessages(request("again"))
    assert (first.result.replayed, again.result.replayed) == (False, True)
    assert (first.result.revision, first.first_index) == (again.result.revision, again.first_index)
    other = request("other")
    other.messages = GOOD
    expect(
        refusal(lambda: shared_daemon.stub.AppendMessages(other)),
        "CALL_REUSED",
        {"client_id": "KEY", "sequence": "1"},
        key=key,
    )
    pop = v1.PopMessageRequest(key=key, call=call(client_id=key))
    assert refusal(lambda: shared_daemon.stub.PopMessage(pop)).reason == "CALL_REUSED"
    forgotten = v1.PopMessageRequest(key=key, call=call(client_id=key, sequence=5, answered_through=4))
    shared_daemon.stub.PopMessage(forgotten)
    assert refusal(lambda: shared_daemon.stub.AppendMessages(request("late"))).reason == "CALL_EXPIRED"
    assert stored(shared_daemon, key)[1] == b""


def test_a_request_id_is_applied_once_per_session(shared_daemon, key):
    request = v1.AppendMessagesRequest(key=key, request_id="delivery", messages=GOOD)
    assert not shared_daemon.stub.AppendMessages(request).result.replayed
    assert shared_daemon.stub.AppendMessages(request).result.replayed
    request.messages = GOOD + GOOD
    expect(
        refusal(lambda: shared_daemon.stub.AppendMessages(request)),
        "REQUEST_ID_REUSED",
        {"key": "KEY", "request_id": "delivery"},
        key=key,
    )
    assert stored(shared_daemon, key)[1] == GOOD


def test_the_longest_key_in_the_widest_script_fits_the_trailers(shared_daemon):
    key = "ключ/✓" + "🦊" * 124
    assert len(key.encode()) == 508
    got = refusal(lambda: shared_daemon.stub.GetSession(v1.GetSessionRequest(key=key)))
    expect(got, "SESSION_NOT_FOUND", {"key": "KEY"}, key=key)


def test_an_unknown_method_is_unimplemented(shared_daemon):
    with channel_to(shared_daemon.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/sessionstore.v1.SessionStore/Nope")(b"", timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["AppendMessages", "GetSession", "ReadMessages"])
@pytest.mark.parametrize("request_", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff"], ids=["no UTF-8", "no protobuf"])
def test_a_request_that_cannot_be_read_is_refused_by_name(shared_daemon, method, request_):
    path = f"/sessionstore.v1.SessionStore/{method}"
    with channel_to(shared_daemon.address) as channel:
        if method == "ReadMessages":
            got = refusal(lambda: list(channel.unary_stream(path)(request_, timeout=10)))
        else:
            got = refusal(lambda: channel.unary_unary(path)(request_, timeout=10))
    assert (got.reason, got.metadata["field"]) == ("ARGUMENT_INVALID", "request")

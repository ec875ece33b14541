"""From protobuf to requests: what a digest tells apart, and what a request carries to the engine."""

import copy

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored import requests, rules
from sessionstored.engine import Refused
from sessionstored.requests import Bounds, to_request
from sessionstored.windows import Call

BOUNDS = Bounds()
CALL = session_pb2.CallIdentity(
    client_id="c", sequence=7, answered_through=3, age=Duration(seconds=2, nanos=500_000_000)
)
MUTATIONS = [
    v1.CreateSessionRequest(
        key="k",
        messages=b'{"a":1}\n{}',
        metadata=b'{"m":1}',
        last_consolidated=1,
        create_time=Timestamp(seconds=5),
    ),
    v1.AppendMessagesRequest(key="k", messages=b'{"a":1}\n', expected_revision=0),
    v1.ReplaceMessagesRequest(key="k", start=2, delete_count=0, messages=b"{}\n", expected_revision=9),
    v1.ReplaceMessagesRequest(key="k"),
    v1.ReplaceMessagesRequest(key="k", delete_count=1, expected_revision=9, allow_appends=True),
    v1.PopMessageRequest(key="k", expected_revision=9),
    v1.UpdateSessionRequest(
        key="k",
        update_mask=FieldMask(paths=["metadata.a.b", "metadata.gone", "last_consolidated"]),
        metadata=b'{"a.b": [1.10]}',
        last_consolidated=4,
    ),
    v1.UpdateSessionRequest(key="k", update_mask=FieldMask(paths=["metadata"]), metadata=b'{"x":1}'),
    v1.ForkSessionRequest(key="k", source_key="s", at=0),
    v1.ForkSessionRequest(key="k", source_key="s"),
    v1.DeleteSessionRequest(key="k"),
]
EXPECTED = [
    rules.Create("k", [b'{"a":1}', b"{}"], b'{"m":1}', 1, 5_000_000),
    rules.Append("k", [b'{"a":1}'], 0),
    rules.Replace("k", 2, 0, [b"{}"], 9),
    rules.Replace("k", 0, None, []),
    rules.Replace("k", 0, 1, [], 9, True),
    rules.Pop("k", 9),
    rules.Update("k", None, {"a.b": b"[1.10]", "gone": None}, 4),
    rules.Update("k", b'{"x":1}', {}, None),
    rules.Fork("k", "s", 0),
    rules.Fork("k", "s", None),
    rules.Delete("k"),
]


@pytest.mark.parametrize(("message", "mutation"), list(zip(MUTATIONS, EXPECTED, strict=True)))
def test_a_mutation_is_what_was_sent(message, mutation):
    request = to_request(copy.deepcopy(message), BOUNDS, deadline_s=12.5)
    assert request.mutation == mutation
    assert (request.call, request.request_id, request.digest) == (None, "", b"")
    assert request.deadline_s == 12.5


@pytest.mark.parametrize("message", MUTATIONS)
def test_a_call_identity_goes_along(message):
    message = copy.deepcopy(message)
    message.call.CopyFrom(CALL)
    message.request_id = "r"
    request = to_request(message, BOUNDS)
    assert request.call == Call("c", 7, 3, 2.5)
    assert request.request_id == "r"
    assert len(request.digest) == 8


def digest(message, call: session_pb2.CallIdentity = CALL) -> bytes:
    message = copy.deepcopy(message)
    message.call.CopyFrom(call)
    return to_request(message, BOUNDS).digest


def test_digests_tell_contents_apart_and_nothing_else():
    digests = [digest(message) for message in MUTATIONS]
    assert len(set(digests)) == len(MUTATIONS)
    later = session_pb2.CallIdentity(client_id="d", sequence=8, age=Duration(seconds=9))
    assert [digest(message, later) for message in MUTATIONS] == digests
    same_fields = [v1.PopMessageRequest(key="k"), v1.DeleteSessionRequest(key="k")]
    assert digest(same_fields[0]) != digest(same_fields[1])


def test_a_request_id_alone_needs_a_digest_too():
    message = v1.PopMessageRequest(key="k", request_id="r")
    assert len(to_request(message, BOUNDS).digest) == 8


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_a_key_passes_or_is_refused_for_what_is_wrong_with_it(key: str):
    control = next((n for n, c in enumerate(key) if ord(c) < 32 or 127 <= ord(c) < 160), None)
    size = len(key.encode())
    if 1 <= size <= 512 and control is None:
        assert requests.check_key(key, BOUNDS) == key
        return
    with pytest.raises(Refused) as caught:
        requests.check_key(key, BOUNDS)
    refusal = caught.value.refusal
    assert refusal.reason == ("KEY_EMPTY" if not key else "KEY_TOO_LONG" if size > 512 else "KEY_INVALID")
    assert refusal.metadata.get("index") == (str(control) if refusal.reason == "KEY_INVALID" else None)


def test_keys_at_the_limit_pass():
    assert requests.check_key("x" * 512, BOUNDS)
    assert requests.check_key("🦊" * 128, BOUNDS)
    for key in ("..", "a/b", "a:b", "~", "ключ/✓", " ", "a\u2028b"):
        assert requests.check_key(key, BOUNDS) == key


def test_metadata_may_be_larger_than_a_message():
    """Its own limit holds, and no other."""
    small = Bounds(messages=requests.codec.Limits(message_bytes_max=10))
    message = v1.CreateSessionRequest(key="k", metadata=b'{"a": "%s"}' % (b"x" * 100))
    assert isinstance(to_request(message, small).mutation, rules.Create)


@pytest.mark.parametrize("missing", ["expected_revision", "delete_count"])
def test_allow_appends_says_what_it_is_about(missing: str):
    message = v1.ReplaceMessagesRequest(key="k", delete_count=1, expected_revision=9, allow_appends=True)
    message.ClearField(missing)
    with pytest.raises(Refused) as told:
        to_request(message, BOUNDS)
    assert told.value.refusal.reason == "ARGUMENT_INVALID"
    assert told.value.refusal.metadata == {"field": "allow_appends", "detail": f"{missing} is missing"}


@pytest.mark.parametrize("seconds", [-62_135_596_800, 253_402_300_799])
def test_every_timestamp_passes(seconds: int):
    stamp = Timestamp(seconds=seconds, nanos=999_999_000)
    assert requests.timestamp_us(stamp, "t") == seconds * 1_000_000 + 999_999

"""Page tokens: opaque, bound to their listing, and never taken for one when they are none."""

import base64
from dataclasses import replace

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from sessionstore.v1 import session_store_pb2 as v1
from sessionstored.engine import Page, Refused
from sessionstored.paging import Listing, decode_token, encode_token
from sessionstored.requests import Bounds
from sessionstored.rules import DEFAULT_LIMITS, Head

DIGEST = b"8 bytes."
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128)
POSITIONS = st.tuples(st.integers(-(2**63), 2**63 - 1), KEYS)


def listing(store_id: str = "s", **fields: object) -> Listing:
    return Listing.of(v1.ListSessionsRequest(**fields), store_id, Bounds())


def head(key: str, metadata: bytes = b"{}") -> Head:
    return Head(key, 1, 1, 0, 0, metadata, 10, 20)


def refused(token: str, digest: bytes = DIGEST) -> str:
    with pytest.raises(Refused) as caught:
        decode_token(token, digest)
    assert caught.value.refusal.metadata == {}
    return caught.value.refusal.reason


@given(POSITIONS)
def test_a_token_gives_its_position_back(position: tuple[int, str]):
    token = encode_token(position, DIGEST)
    assert token.isascii()
    assert decode_token(token, DIGEST) == position


@given(POSITIONS, st.data())
def test_a_changed_token_is_none(position: tuple[int, str], data: st.DataObject):
    raw = bytearray(base64.urlsafe_b64decode(encode_token(position, DIGEST)))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert refused(base64.urlsafe_b64encode(raw).decode()) == "PAGE_TOKEN_INVALID"


BASE64 = st.binary(max_size=80).map(lambda raw: base64.urlsafe_b64encode(raw).decode())


@given(st.one_of(st.text(max_size=80), BASE64))
def test_anything_else_is_no_token(token: str):
    assert refused(token) == "PAGE_TOKEN_INVALID"


def test_a_token_belongs_to_its_store_prefix_order_and_time():
    base = listing(prefix="p", order=3, updated_since=Timestamp(seconds=5))
    others = [
        listing("t", prefix="p", order=3, updated_since=Timestamp(seconds=5)),
        listing(prefix="q", order=3, updated_since=Timestamp(seconds=5)),
        listing(prefix="p", order=4, updated_since=Timestamp(seconds=5)),
        listing(prefix="p", order=3, updated_since=Timestamp(seconds=6)),
        listing(prefix="p", order=3),
    ]
    token = encode_token((1, "k"), base.digest)
    assert all(refused(token, other.digest) == "PAGE_TOKEN_INVALID" for other in others)
    same = listing(prefix="p", order=3, updated_since=Timestamp(seconds=5), page_size=7, page_token=token)
    assert (same.query.after, same.query.page_size) == ((1, "k"), 7)


def test_an_unspecified_order_is_the_order_by_key():
    assert listing(order=0).digest == listing(order=1).digest


@pytest.mark.parametrize(("nanos", "expected"), [(0, 0), (1, 1), (999, 1), (1000, 1), (1001, 2)])
def test_updated_since_is_rounded_up_to_what_is_stored(nanos: int, expected: int):
    assert listing(updated_since=Timestamp(nanos=nanos)).query.updated_since_us == expected


def test_the_last_page_has_no_token():
    sessions, token = listing().page(Page([head("a"), head("b")], more=False), DEFAULT_LIMITS)
    assert ([session.key for session in sessions], token) == (["a", "b"], "")


def test_a_full_page_goes_on_after_its_last_head():
    asked = listing(prefix="p")
    sessions, token = asked.page(Page([head("pa"), head("pb")], more=True), DEFAULT_LIMITS)
    assert len(sessions) == 2
    assert decode_token(token, asked.digest) == (20, "pb")


def test_a_page_ends_where_its_bytes_do():
    large = [head(str(n), metadata=b"x" * 300_000) for n in range(5)]
    asked = listing()
    sessions, token = asked.page(Page(large, more=False), DEFAULT_LIMITS)
    assert [session.key for session in sessions] == ["0", "1", "2"]
    assert decode_token(token, asked.digest) == (20, "2")


def test_one_head_larger_than_a_page_comes_alone():
    large = head("a", metadata=b"x" * 2_000_000)
    asked = listing()
    sessions, token = asked.page(Page([large, replace(large, key="b")], more=False), DEFAULT_LIMITS)
    assert [session.key for session in sessions] == ["a"]
    assert decode_token(token, asked.digest) == (20, "a")


def test_an_empty_store_has_one_empty_page():
    assert listing().page(Page([], more=False), DEFAULT_LIMITS) == ([], "")

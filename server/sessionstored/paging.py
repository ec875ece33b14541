"""Pages of a listing, and the opaque tokens that continue one. Pure.

A token holds the position after which the listing goes on, bound to the store and to everything that defines
the listing, and a checksum. It is a place, not a snapshot: a session that does not change is listed exactly
once, whatever the others do. A token is no secret and gives no right; the checksum only tells mistakes from
tokens.
"""

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

from sessionstore.v1 import session_pb2, session_store_pb2

from sessionstored import replies
from sessionstored.engine import Order, Page, Query
from sessionstored.reads import REPLY_BYTES_MAX
from sessionstored.requests import Bounds, check_count, refuse, timestamp_us
from sessionstored.rules import Limits

PAGE_SIZE_DEFAULT = 100
_VERSION = 1
_CHECK_BYTES = 4
# version, digest of the listing, update_time in microseconds; then the key, then the checksum.
_HEADER = struct.Struct(">B8sq")
_ORDERS = {
    session_store_pb2.SESSION_ORDER_UNSPECIFIED: Order.KEY,
    session_store_pb2.SESSION_ORDER_KEY: Order.KEY,
    session_store_pb2.SESSION_ORDER_KEY_DESC: Order.KEY_DESC,
    session_store_pb2.SESSION_ORDER_UPDATE_TIME: Order.UPDATE_TIME,
    session_store_pb2.SESSION_ORDER_UPDATE_TIME_DESC: Order.UPDATE_TIME_DESC,
}


@dataclass(frozen=True, slots=True)
class Listing:
    """One ListSessions call."""

    query: Query
    digest: bytes
    """Of the store and of what defines the listing; the page size does not."""

    @classmethod
    def of(
        cls, request: session_store_pb2.ListSessionsRequest, store_id: str, bounds: Bounds
    ) -> "Listing":
        """Check the arguments. Raises Refused."""
        order = _ORDERS.get(request.order)
        if order is None:
            refuse(
                "ARGUMENT_INVALID",
                f"order {request.order} is not known",
                field="order",
                detail=f"{request.order} is no SessionOrder",
            )
        since = (
            timestamp_us(request.updated_since, "updated_since")
            if request.HasField("updated_since")
            else None
        )
        size = _page_size(request.page_size, bounds)
        digest = blake2b(
            repr((store_id, request.prefix, order.value, since)).encode(), digest_size=8
        ).digest()
        after = decode_token(request.page_token, digest) if request.page_token else None
        return cls(Query(request.prefix, order, size, after, since), digest)

    def page(self, page: Page, limits: Limits) -> tuple[Sequence[session_pb2.Session], str]:
        """The sessions of one reply, at most 1 MiB (or one larger), and the next token ("" if none)."""
        sessions: list[session_pb2.Session] = []
        size = 0
        for head in page.heads:
            session = replies.session(head, limits)
            size += session.ByteSize() + _FIELD_BYTES_MAX
            if sessions and size > REPLY_BYTES_MAX:
                break
            sessions.append(session)
        if not page.more and len(sessions) == len(page.heads):
            return sessions, ""
        last = page.heads[len(sessions) - 1]
        return sessions, encode_token((last.update_time_us, last.key), self.digest)


# What a repeated field adds to each of its messages: a tag and a length.
_FIELD_BYTES_MAX = 6


def _page_size(value: int, bounds: Bounds) -> int:
    check_count(value, "page_size")
    if value > bounds.page_size_max:
        refuse(
            "PAGE_SIZE_TOO_LARGE",
            f"page_size is {value}; the limit is {bounds.page_size_max}",
            value=value,
            limit=bounds.page_size_max,
        )
    return value or min(PAGE_SIZE_DEFAULT, bounds.page_size_max)


def encode_token(after: tuple[int, str], digest: bytes) -> str:
    """A token that goes on after (update_time_us, key) in the listing of that digest."""
    update_time_us, key = after
    body = _HEADER.pack(_VERSION, digest, update_time_us) + key.encode()
    return base64.urlsafe_b64encode(body + _check(body)).decode()


def decode_token(token: str, digest: bytes) -> tuple[int, str]:
    """The position in a token. Raises Refused, PAGE_TOKEN_INVALID, if it is not of that listing."""
    try:
        raw = base64.b64decode(token.encode(), b"-_", validate=True)
        body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        version, of, update_time_us = _HEADER.unpack_from(body)
        key = body[_HEADER.size :].decode()
    except (binascii.Error, struct.error, ValueError):
        _invalid()
    if check != _check(body) or version != _VERSION or of != digest:
        _invalid()
    return update_time_us, key


def _check(body: bytes) -> bytes:
    return blake2b(body, digest_size=_CHECK_BYTES).digest()


def _invalid() -> NoReturn:
    refuse(
        "PAGE_TOKEN_INVALID",
        "page_token was not given out by this store for the same prefix, order and updated_since; "
        "begin the listing anew",
    )

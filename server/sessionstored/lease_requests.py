"""From what is asked about leases on the wire to operations of `leases`, if it is well formed.

Pure, as `requests`: protobuf in, `engine.Request` out, or `Refused`. Nothing here knows any lease.
"""

from google.protobuf.duration_pb2 import Duration
from sessionstore.v1 import session_store_pb2 as v1

from sessionstored.engine import Request
from sessionstored.leases import Acquire, Release, Renew
from sessionstored.requests import Bounds, check_call, check_key, check_token, digest_of, refuse

HOLDER_BYTES_MAX = 256
_NANOS = range(1_000_000_000)


def acquire(message: v1.AcquireLeaseRequest, bounds: Bounds, deadline_s: float | None) -> Request:
    """Make an AcquireLease a request to the engine; its call identity is taken out of it.

    Raises Refused: KEY_EMPTY and the like, ARGUMENT_INVALID, LEASE_TTL_OUT_OF_RANGE, CALL_INVALID.
    """
    key = check_key(message.key, bounds)
    size = len(message.holder.encode())
    if not 1 <= size <= HOLDER_BYTES_MAX:
        _invalid("holder", f"it has {size} bytes; 1 to {HOLDER_BYTES_MAX} are allowed")
    if message.mode not in v1.LeaseMode.values():
        _invalid("mode", f"there is no mode {message.mode}")
    operation = Acquire(
        key,
        message.holder,
        _ttl_s(message.ttl, bounds),
        appends_allowed=message.mode == v1.LEASE_MODE_APPENDS_ALLOWED,
    )
    call = check_call(message.call) if message.HasField("call") else None
    return Request(operation, call, digest=digest_of(message) if call else b"", deadline_s=deadline_s)


def renew(message: v1.RenewLeaseRequest, bounds: Bounds, deadline_s: float | None) -> Request:
    """Make a RenewLease a request to the engine. Raises Refused."""
    operation = Renew(check_key(message.key, bounds), check_token(message.fencing_token))
    return Request(operation, deadline_s=deadline_s)


def release(message: v1.ReleaseLeaseRequest, bounds: Bounds, deadline_s: float | None) -> Request:
    """Make a ReleaseLease a request to the engine. Raises Refused."""
    operation = Release(check_key(message.key, bounds), check_token(message.fencing_token))
    return Request(operation, deadline_s=deadline_s)


def wait_s(wait: Duration, field: str) -> float:
    """How long a caller wants to wait. Raises Refused: ARGUMENT_INVALID."""
    if wait.seconds < 0 or wait.nanos not in _NANOS:
        _invalid(field, f"it is {wait.seconds} s and {wait.nanos} ns; it must be 0 or more")
    return wait.seconds + wait.nanos / 1e9


def _ttl_s(ttl: Duration, bounds: Bounds) -> float:
    seconds = ttl.seconds + ttl.nanos / 1e9
    if not bounds.lease_ttl_s_min <= seconds <= bounds.lease_ttl_s_max:
        refuse(
            "LEASE_TTL_OUT_OF_RANGE",
            f"the ttl of a lease is {bounds.lease_ttl_s_min:g} s to {bounds.lease_ttl_s_max:g} s here, "
            f"and not {seconds:g} s",
            ttl_ms=round(seconds * 1000),
            min_ms=round(bounds.lease_ttl_s_min * 1000),
            max_ms=round(bounds.lease_ttl_s_max * 1000),
        )
    return seconds


def _invalid(field: str, detail: str) -> None:
    refuse("ARGUMENT_INVALID", f"{field} is malformed: {detail}", field=field, detail=detail)

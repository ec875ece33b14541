"""From what goes over the wire to records of `operations`: one for each call of a process under the hammer.

Both kinds of SDK clients and raw stubs are noted alike, by request and answer, so the background renewals of
a turn and the reads that a handle makes by itself are there, too. A read of a part, and a read without an
answer, say nothing that the checker could use, and are left out.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from crash.operations import ACKNOWLEDGED, DAMAGED, READ, REFUSED, UNKNOWN, Operation, State
from sessionstore.errors import (
    AlreadyExistsError,
    ConflictError,
    DataLossError,
    InvalidArgumentError,
    LeaseHeldError,
    LeaseLostError,
    LimitError,
    NotFoundError,
    OutcomeUnknownError,
    SessionStoreError,
    UnavailableError,
)
from sessionstore.v1 import session_store_pb2 as pb

REFUSALS = (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    LeaseHeldError,
    LeaseLostError,
    LimitError,
    NotFoundError,
    UnavailableError,
)
"""What a caller may be told under the hammer; nothing was stored then."""
_KINDS = {
    "AppendMessages": "append",
    "CreateSession": "create",
    "ReplaceMessages": "replace",
    "PopMessage": "pop",
    "UpdateSession": "update",
    "DeleteSession": "delete",
    "ForkSession": "fork",
    "GetSession": READ,
    "AcquireLease": "acquire",
    "RenewLease": "renew",
    "ReleaseLease": "release",
    "GetLease": "lease",
}


class Records:
    """The log of one process. Any thread may note a call."""

    def __init__(self, process: str, path: Path) -> None:
        self._process = process
        self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, method: str, request: Any, begin_ns: int, answer: Any) -> None:
        """Note a call that has ended with this answer or SessionStoreError.

        Raises what says more than that the call was refused, or its outcome unknown.
        """
        if method not in _KINDS:
            return
        call = replace(_asked(self._process, method, request, begin_ns), end_ns=time.monotonic_ns())
        if isinstance(answer, SessionStoreError):
            record = _refused(call, answer)
        elif call.kind == READ:
            record = _read(call, request, answer)
        else:
            record = _answered(call, answer)
        if record is not None:
            os.write(self._log, record.line())


def ids(block: bytes) -> tuple[str, ...]:
    """The ids of the messages in a block."""
    return tuple(json.loads(line)["id"] for line in block.splitlines())


def _given(request: Any, field: str) -> int | None:
    return getattr(request, field) if request.HasField(field) else None


def _asked(process: str, method: str, request: Any, begin_ns: int) -> Operation:
    """What was asked for."""
    kind = _KINDS[method]
    call = Operation(process=process, kind=kind, key=request.key, begin_ns=begin_ns, end_ns=0)
    fields = request.DESCRIPTOR.fields_by_name
    if "call" in fields:
        call = replace(call, sequence=request.call.sequence)
    if "fencing_token" in fields:
        call = replace(call, fencing_token=request.fencing_token)
    if "expected_revision" in fields:
        call = replace(call, expected_revision=_given(request, "expected_revision"))
    match kind:
        case "append":
            return replace(call, messages=ids(request.messages), waits=request.HasField("lease_wait"))
        case "create":
            return replace(call, messages=ids(request.messages))
        case "replace":
            return replace(
                call,
                start=request.start,
                delete_count=_given(request, "delete_count"),
                messages=ids(request.messages),
                allow_appends=request.allow_appends,
            )
        case "update" if "metadata" in request.update_mask.paths:
            return replace(call, metadata=json.loads(request.metadata)["note"])
        case "update":
            return replace(call, last_consolidated=request.last_consolidated)
        case "fork":
            return replace(call, source_key=request.source_key, at=_given(request, "at"))
        case "acquire":
            ttl_ns = request.ttl.seconds * 10**9 + request.ttl.nanos
            allows = request.mode == pb.LEASE_MODE_APPENDS_ALLOWED
            waits = request.HasField("wait")
            return replace(call, holder=request.holder, ttl_ns=ttl_ns, allow_appends=allows, waits=waits)
    return call


def _refused(call: Operation, error: SessionStoreError) -> Operation | None:
    """What was refused, or got no answer."""
    if isinstance(error, DataLossError):
        return replace(call, outcome=DAMAGED)
    if isinstance(error, OutcomeUnknownError):
        return replace(call, outcome=UNKNOWN)
    if not isinstance(error, REFUSALS):
        raise error
    if call.kind == READ:
        return replace(call, seen=None) if isinstance(error, NotFoundError) else None
    if isinstance(error, UnavailableError) and call.kind in ("renew", "release"):
        # Sent again as often as one likes, these are never called unknown.
        return replace(call, outcome=UNKNOWN)
    return replace(
        call, outcome=REFUSED, reason=error.reason, held_by=dict(error.metadata).get("holder", "")
    )


def _read(call: Operation, request: Any, answer: Any) -> Operation | None:
    """A read of a whole session; None for a part."""
    if answer.start or answer.truncated or request.known_revision or request.HasField("last"):
        return None
    head = answer.session
    note = json.loads(head.metadata).get("note", "")
    return replace(
        call, revision=head.revision, seen=State(ids(answer.messages), head.last_consolidated, note)
    )


def _answered(call: Operation, answer: Any) -> Operation:
    """A change, or a call about a lease, with its answer."""
    match call.kind:
        case "acquire":
            return replace(call, token=answer.lease.fencing_token, replayed=answer.replayed)
        case "renew":
            return replace(call, token=answer.lease.fencing_token)
        case "release":
            return replace(call, token=call.fencing_token if answer.released else 0)
        case "lease":
            return replace(call, token=answer.lease.fencing_token, held_by=answer.lease.holder)
    result = answer.result
    assert call.outcome == ACKNOWLEDGED
    return replace(
        call,
        revision=result.revision,
        previous_revision=result.previous_revision,
        message_count=result.message_count,
        first_index=answer.first_index if call.kind == "append" else None,
        popped=ids(answer.message)[0] if call.kind == "pop" else None,
    )

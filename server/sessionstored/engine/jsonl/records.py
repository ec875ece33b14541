"""What a journal row holds: the records of one group of mutations, as bytes. Pure.

A record is one line of JSON, an array whose first element names its kind, followed by as many raw bytes as it
says:

    ["s", key, revision, previous_revision, rewrite_revision, start, delete_count, message_count,
          last_consolidated, create_time_us, update_time_us, lines, bytes, extra]
                                                                 a change of a session, then its lines
    ["d", key, revision, previous_revision, file, marks, aside, expired]
                                                                 a session is gone, and this file
    ["a", key, revision, previous_revision]                      a session's file was taken anew, as it is
    ["c", client_id, sequence, answered_through, digest, outcome]  a call's answer
    ["q", key, request_id, digest, outcome]                      a request_id's answer
    ["l", event, lease]                                          a lease was acquired or has ended

A lease is [key, holder, token, appends_allowed, ttl_s, acquire_time_us, acquired_s, expires_s], and its event
"acquired", "released" or "lapsed".

`marks` are pairs [length, digest]; `extra` is an object: "metadata" (JSON text) if it differs from before, or
is so short that watchers get it from here, too; "file" (its name) if the session is new; "source" (a key) if
it is a fork, whose file has messages that the record lacks; "damage" if there is some;
"expires" (its expire_time in microseconds) if it has one. The row carries a
CRC-32 over all of it.

Recovery needs "s" and "d"; an "a" is for watchers only, because the catalogue has what it tells of.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from zlib import crc32

from sessionstored.engine.jsonl.blocks import Mark
from sessionstored.leases import AnyOutcome, Granted, Lease, LeaseEvent, Released
from sessionstored.rules import Answer, Head, Refusal
from sessionstored.windows import Remembered


class DamagedRow(ValueError):
    """A journal row is not what was written."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A change of a session: messages[start : start + delete_count] = lines, and the head afterwards."""

    head: Head
    start: int
    delete_count: int
    lines: list[bytes]
    file: str = ""
    """The file name, if the session is new."""
    previous_revision: int = 0
    source_key: str = ""
    """Of a fork: whose messages its file begins with."""


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    """A session is gone, and with it its file: the tombstone of both."""

    key: str
    revision: int
    file: str = ""
    """Empty: there was none."""
    marks: tuple[Mark, ...] = ()
    """What the file began with: in the end, and when it was last made durable."""
    aside: bool = False
    """The file was damaged: it goes to quarantine."""
    previous_revision: int = 0
    expired: bool = False
    """Its time was over; else somebody deleted it."""


@dataclass(frozen=True, slots=True)
class AdoptRecord:
    """A session's file was taken anew, as it is: somebody else edited or repaired it."""

    key: str
    revision: int
    previous_revision: int = 0


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A call's answer."""

    client_id: str
    sequence: int
    answered_through: int
    remembered: Remembered


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request_id's answer."""

    key: str
    request_id: str
    remembered: Remembered


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What became of a lease. The table of leases has it, too: this is for those who watch."""

    event: LeaseEvent
    lease: Lease


Record = SessionRecord | DeleteRecord | AdoptRecord | CallRecord | RequestRecord | LeaseRecord


@dataclass(slots=True)
class Row:
    """One group in the making."""

    parts: list[bytes] = field(default_factory=list)
    last_revision: int = 0
    size: int = 0

    def add(self, head: object, payload: bytes = b"") -> None:
        """Add one record."""
        line = _dumps(head).encode()
        self.parts += (line, b"\n", payload)
        self.size += len(line) + 1 + len(payload)

    def change(
        self,
        head: Head,
        previous_revision: int,
        start: int,
        delete_count: int,
        lines: list[bytes],
        extra: dict[str, str | int],
    ) -> None:
        """Add a change of a session."""
        payload = b"".join([line + b"\n" for line in lines])
        if head.expire_time_us:
            extra = {**extra, "expires": head.expire_time_us}
        self.add(
            [
                "s",
                head.key,
                head.revision,
                previous_revision,
                head.rewrite_revision,
                start,
                delete_count,
                head.message_count,
                head.last_consolidated,
                head.create_time_us,
                head.update_time_us,
                len(lines),
                len(payload),
                extra,
            ],
            payload,
        )
        self.last_revision = head.revision

    def delete(self, record: DeleteRecord) -> None:
        """Add that a session is gone."""
        self.add(
            [
                "d",
                record.key,
                record.revision,
                record.previous_revision,
                record.file,
                record.marks,
                record.aside,
                record.expired,
            ]
        )
        self.last_revision = record.revision

    def adopted(self, record: AdoptRecord) -> None:
        """Add that a session's file was taken anew."""
        self.add(["a", record.key, record.revision, record.previous_revision])
        self.last_revision = max(self.last_revision, record.revision)

    def call(self, record: CallRecord) -> None:
        """Add a call's answer."""
        kept = record.remembered
        self.add(
            [
                "c",
                record.client_id,
                record.sequence,
                record.answered_through,
                kept.digest.hex(),
                outcome_to_json(kept.outcome),
            ]
        )

    def request(self, record: RequestRecord) -> None:
        """Add a request_id's answer."""
        kept = record.remembered
        self.add(["q", record.key, record.request_id, kept.digest.hex(), outcome_to_json(kept.outcome)])

    def lease(self, record: LeaseRecord) -> None:
        """Add what became of a lease; its token comes from the revisions' counter."""
        self.add(["l", record.event.value, _lease_to_json(record.lease)])
        if record.event is LeaseEvent.ACQUIRED:
            self.last_revision = record.lease.token

    def body(self) -> bytes:
        """The row's bytes."""
        return b"".join(self.parts)


_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def checksum(row_id: int, last_revision: int, clock_s: float, body: bytes) -> int:
    """A row's checksum, over everything that it says."""
    return crc32(body, crc32(struct.pack("<qqd", row_id, last_revision, clock_s)))


def read_row(body: bytes) -> Iterator[Record]:
    """The records of a row, in order.

    Args:
        body: the row's bytes, their checksum already verified.

    A head has empty metadata where the record does not change it.

    """
    position = 0
    while position < len(body):
        end = body.index(b"\n", position)
        fields = json.loads(body[position:end])
        position = end + 1
        match fields:
            case [
                "s",
                key,
                revision,
                previous,
                rewrite,
                start,
                deleted,
                count,
                consolidated,
                created,
                updated,
                n,
                size,
                extra,
            ]:
                payload = body[position : position + size]
                position += size
                lines = payload.split(b"\n")[:-1]
                if len(lines) != n:
                    raise DamagedRow(f"a record of {key!r} holds {len(lines)} messages, not {n}")
                metadata = extra.get("metadata", "").encode()
                head = Head(
                    key,
                    revision,
                    rewrite,
                    count,
                    consolidated,
                    metadata,
                    created,
                    updated,
                    extra.get("damage", ""),
                    extra.get("expires", 0),
                )
                yield SessionRecord(
                    head, start, deleted, lines, extra.get("file", ""), previous, extra.get("source", "")
                )
            case ["d", key, revision, previous, file, marks, aside, expired]:
                yield DeleteRecord(
                    key, revision, file, tuple(map(tuple, marks)), aside, previous, expired
                )
            case ["a", key, revision, previous]:
                yield AdoptRecord(key, revision, previous)
            case ["c", client_id, sequence, answered_through, digest, outcome]:
                kept = Remembered(bytes.fromhex(digest), outcome_from_json(outcome))
                yield CallRecord(client_id, sequence, answered_through, kept)
            case ["q", key, request_id, digest, outcome]:
                yield RequestRecord(
                    key, request_id, Remembered(bytes.fromhex(digest), outcome_from_json(outcome))
                )
            case ["l", event, lease]:
                yield LeaseRecord(LeaseEvent(event), _lease_from_json(lease))
            case _:
                raise DamagedRow(f"an unknown record begins with {body[position - 40 : position]!r}")


def _lease_to_json(lease: Lease) -> list[object]:
    return [
        lease.key,
        lease.holder,
        lease.token,
        lease.appends_allowed,
        lease.ttl_s,
        lease.acquire_time_us,
        lease.acquired_s,
        lease.expires_s,
    ]


def _lease_from_json(fields: object) -> Lease:
    match fields:
        case [
            str() as key,
            str() as holder,
            int() as token,
            bool() as appends_allowed,
            float() as ttl_s,
            int() as acquired_us,
            float() as acquired_s,
            float() as expires_s,
        ]:
            return Lease(key, holder, token, appends_allowed, ttl_s, acquired_us, acquired_s, expires_s)
    raise DamagedRow(f"not a lease: {fields!r}")


def outcome_to_json(outcome: AnyOutcome) -> list[object]:
    """An outcome as a JSON array."""
    if isinstance(outcome, Granted):
        return ["lease", _lease_to_json(outcome.lease)]
    if isinstance(outcome, Released):
        return ["released", outcome.released]
    if isinstance(outcome, Refusal):
        return [outcome.reason, outcome.message, outcome.metadata]
    message = None if outcome.message is None else outcome.message.decode()
    return [
        outcome.revision,
        outcome.previous_revision,
        outcome.message_count,
        outcome.last_consolidated,
        outcome.update_time_us,
        outcome.first_index,
        message,
        outcome.ends_us,
    ]


def outcome_from_json(fields: list[object]) -> AnyOutcome:
    """An outcome from its JSON array."""
    match fields:
        case ["lease", lease]:
            return Granted(_lease_from_json(lease))
        case ["released", bool() as released]:
            return Released(released)
        case [str() as reason, str() as message, dict() as metadata]:
            return Refusal(reason, message, metadata)
        case [
            int() as revision,
            int() as before,
            int() as count,
            int() as consolidated,
            int() as updated,
            int() as first,
            str() | None as message,
            int() as ends_us,
        ]:
            return Answer(
                revision,
                before,
                count,
                consolidated,
                updated,
                first,
                None if message is None else message.encode(),
                ends_us,
            )
    raise DamagedRow(f"not an outcome: {fields!r}")

"""From what the engine answers to what goes on the wire. Pure; knows protobuf, and no grpc."""

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as v1

from sessionstored.engine import BackupDamage, BackupHeader, BackupItem, BackupPart, Reply, Scrub
from sessionstored.leases import Lease
from sessionstored.rules import Answer, Head, Limits, ends
from sessionstored.trusted import Disbelief


def timestamp(us: int) -> Timestamp:
    """A time given in microseconds since the epoch."""
    return Timestamp(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1000)


def duration(seconds: float) -> Duration:
    """A time span given in seconds."""
    nanos = round(seconds * 1e9)
    return Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def lease(held: Lease, clock_s: float) -> v1.Lease:
    """A lease, as it is at this moment of the store's clock."""
    return v1.Lease(
        key=held.key,
        holder=held.holder,
        fencing_token=held.token,
        mode=v1.LEASE_MODE_APPENDS_ALLOWED if held.appends_allowed else v1.LEASE_MODE_EXCLUSIVE,
        ttl=duration(held.ttl_s),
        remaining=duration(held.remaining_s(clock_s)),
        acquire_time=timestamp(held.acquire_time_us),
    )


def end(ends_us: int) -> Timestamp | None:
    """When a session ends by itself; None, which leaves the field out, if it never does."""
    return timestamp(ends_us) if ends_us else None


def session(head: Head, limits: Limits) -> session_pb2.Session:
    """A head; the limits say when it ends, if it does not say that itself."""
    return session_pb2.Session(
        key=head.key,
        revision=head.revision,
        message_count=head.message_count,
        last_consolidated=head.last_consolidated,
        metadata=head.metadata,
        create_time=timestamp(head.create_time_us),
        update_time=timestamp(head.update_time_us),
        damage=head.damage,
        expire_time=end(ends(head, limits)),
    )


def result(answer: Answer, reply: Reply) -> session_pb2.WriteResult:
    """What every mutation answers."""
    return session_pb2.WriteResult(
        revision=answer.revision,
        previous_revision=answer.previous_revision,
        message_count=answer.message_count,
        last_consolidated=answer.last_consolidated,
        update_time=timestamp(answer.update_time_us),
        replayed=reply.replayed,
        expire_time=end(answer.ends_us),
    )


def disbelief(found: Disbelief | None) -> v1.ClockDisbelief | None:
    """A clock that is not believed; None, which leaves the field out, if it is."""
    if found is None:
        return None
    return v1.ClockDisbelief(
        trusted_time=timestamp(found.trusted_us),
        ahead=duration(found.ahead_us / 1e6),
        confirmed_in=duration(found.confirmed_in_us / 1e6),
    )


def scrub(status: Scrub | None) -> v1.ScrubStatus | None:
    """What the background scrubber did; None, which leaves the field out, if there is none."""
    if status is None:
        return None
    return v1.ScrubStatus(
        bytes_verified=status.bytes,
        sessions_verified=status.sessions,
        sessions_damaged=status.damaged,
        passes=status.passes,
        last_pass_time=timestamp(status.last_pass_us) if status.last_pass_us else None,
    )


class BackupReplies:
    """The blocks of a backup as replies, and their sum."""

    def __init__(self) -> None:
        self._files = self._bytes = 0

    def block(self, items: Sequence[BackupItem]) -> v1.BackupResponse:
        """A block."""
        reply = v1.BackupResponse()
        for item in items:
            match item:
                case BackupHeader():
                    reply.header.CopyFrom(_backup_header(item))
                case BackupDamage():
                    reply.damages.add(key=item.key, path=item.path, detail=item.detail)
                case BackupPart():
                    self._add(reply, item)
        return reply

    def _add(self, reply: v1.BackupResponse, part: BackupPart) -> None:
        message = reply.parts.add(path=part.path, offset=part.offset, data=part.data)
        if part.end is not None:
            message.end.size, message.end.digest = part.end.size, part.end.digest
            self._files += 1
            self._bytes += part.end.size

    def summary(self) -> v1.BackupResponse:
        """The end of a whole backup."""
        return v1.BackupResponse(
            summary=v1.BackupSummary(file_count=self._files, byte_count=self._bytes)
        )


def _backup_header(header: BackupHeader) -> v1.BackupHeader:
    return v1.BackupHeader(
        store_id=header.store_id,
        format=header.format,
        take_time=timestamp(header.take_time_us),
        revision=header.revision,
        session_count=header.session_count,
        bytes_total=header.bytes_total,
    )

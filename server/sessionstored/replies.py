"""From what the engine answers to what goes on the wire. Pure; knows protobuf, and no grpc."""

from google.protobuf.timestamp_pb2 import Timestamp
from sessionstore.v1 import session_pb2, session_store_pb2

from sessionstored.engine import Reply, Scrub
from sessionstored.rules import Answer, Head


def timestamp(us: int) -> Timestamp:
    """A time given in microseconds since the epoch."""
    return Timestamp(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1000)


def session(head: Head) -> session_pb2.Session:
    """A head."""
    return session_pb2.Session(
        key=head.key,
        revision=head.revision,
        message_count=head.message_count,
        last_consolidated=head.last_consolidated,
        metadata=head.metadata,
        create_time=timestamp(head.create_time_us),
        update_time=timestamp(head.update_time_us),
        damage=head.damage,
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
    )


def scrub(status: Scrub | None) -> session_store_pb2.ScrubStatus | None:
    """What the background scrubber did; None, which leaves the field out, if there is none."""
    if status is None:
        return None
    return session_store_pb2.ScrubStatus(
        bytes_verified=status.bytes,
        sessions_verified=status.sessions,
        sessions_damaged=status.damaged,
        passes=status.passes,
        last_pass_time=timestamp(status.last_pass_us) if status.last_pass_us else None,
    )

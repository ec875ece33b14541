"""How `sessionctl watch` tells of events: a line each, for people or for programs. No I/O."""

from sessionstore._events import LeaseChanged, SessionChanged, SessionDeleted, WatchEvent
from sessionstore.cli.conversation import local_time, printable
from sessionstore.cli.files import written


def line(event: WatchEvent) -> str:
    """An event as a line for people."""
    key = printable(event.key).replace("\n", "\\n")
    match event:
        case SessionChanged():
            when, told = local_time(event.head.update_time), _change(event)
        case SessionDeleted():
            when, told = " " * 19, "expired" if event.expired else "deleted"
        case LeaseChanged():
            holder = printable(event.holder).replace("\n", "\\n")
            when = local_time(event.acquire_time)
            told = f"lease {'released by' if event.ended else 'acquired by'} {holder}"
    return f"{when}  {key}  {told}"


def _change(event: SessionChanged) -> str:
    parts = [f"{event.head.message_count:,} messages", f"revision {event.revision}"]
    if event.whole:
        parts.insert(0, f"fork of {printable(event.source_key)}" if event.source_key else "whole")
    else:
        parts.insert(0, f"-{event.delete_count:,} +{len(event.messages):,} at {event.start:,}")
    return ", ".join(parts)


def line_json(event: WatchEvent) -> bytes:
    """An event as one line of JSON, without its end; times are ISO 8601 in UTC, the cursor is hexadecimal."""
    fields: dict[str, object] = {"key": event.key, "revision": event.revision}
    match event:
        case SessionChanged():
            fields |= {
                "event": "changed",
                "previous_revision": event.previous_revision,
                "whole": event.whole,
                "start": event.start,
                "delete_count": event.delete_count,
                "messages": event.messages,
                "message_count": event.head.message_count,
                "last_consolidated": event.head.last_consolidated,
                "metadata": event.head.metadata,
                "update_time": event.head.update_time.isoformat(),
                "source_key": event.source_key,
            }
        case SessionDeleted():
            fields |= {
                "event": "deleted",
                "previous_revision": event.previous_revision,
                "expired": event.expired,
            }
        case LeaseChanged():
            fields |= {
                "event": "lease",
                "holder": event.holder,
                "fencing_token": event.fencing_token,
                "allows_appends": event.allows_appends,
                "ttl_s": event.ttl.total_seconds(),
                "ended": event.ended,
            }
    return written({**fields, "cursor": event.cursor.hex()})

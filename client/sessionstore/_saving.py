"""How a session's changes reach the daemon, and how others' changes reach the session, call after call.

`_difference` decides what to send and what a merge gives; this module makes the calls in between, for one
`Session` object at a time. The rules:

* What is seen is remembered with the object, in a `Record`.
* A write that must not meet others' is bound to the revision that was seen. If it is refused, what is stored
  is read and merged, and the next step is found anew; if that cannot be merged, ConflictError is raised and
  the object is as it was.
* A write whose outcome is not known is sent again, the very same call, before anything else of that object.
* Once a write is acknowledged, no failure to read denies it.

It must not know of keys' owners, grpc or retries of one call.
"""

import json
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.field_mask_pb2 import FieldMask

from sessionstore import _operations as ops
from sessionstore import codec
from sessionstore._difference import (
    Append,
    Baseline,
    Create,
    Local,
    Replace,
    Step,
    Update,
    changed_range,
    merge,
    next_step,
)
from sessionstore._mirror import Mirror, all_of
from sessionstore._operations import Held, Operation, Rpc, Tail, pb
from sessionstore._snapshot import Lines, Snapshot
from sessionstore._types import Head
from sessionstore.errors import (
    AlreadyExistsError,
    CallExpiredError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    SessionStoreError,
    TooLargeError,
    error_for,
)

if TYPE_CHECKING:
    from sessionstore.manager import Session

# Any daemon reads a batch of this size, so that it can refuse it by name; of a larger one, the transport may
# say no more than that it is too much.
_READ_BYTES_MAX = 256 << 10
# Each refusal means that somebody else has just written.
_REFUSALS_MAX = 20


@dataclass(slots=True, eq=False)
class Record:
    """What is known of one `Session` object."""

    key: str
    object: "weakref.ref[Session]"
    baseline: Baseline = field(default_factory=Baseline)
    known: bool = False
    """Whether the baseline says what is stored; not so yet for an object that was made by hand."""
    created_at: datetime | None = None
    """The `created_at` that the object was given here."""
    unanswered: tuple[Rpc, Step] | None = None
    """A write whose outcome is not known."""
    lock: "threading.RLock" = field(default_factory=threading.RLock)
    """Held around every use of all the others."""
    busy: bool = False
    """In use by the thread that holds the lock. It may find that in a signal handler that interrupted it."""

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold the record against other threads; False in a signal handler that interrupted its user."""
        with self.lock:
            if self.busy:
                yield False
                return
            self.busy = True
            try:
                yield True
            finally:
                self.busy = False


class Saver:
    """What saves and refreshes objects.

    Args:
        run: runs an operation.
        again: saves an object again.
        mirror: gives the near cache.

    """

    def __init__(
        self,
        run: Callable[[Operation[Any]], Any],
        again: Callable[["Session"], None],
        mirror: Callable[[], Mirror],
    ) -> None:
        self._run = run
        self._mirror = mirror
        self._again = again
        self._limits = codec.DEFAULT_LIMITS
        self._asked = False

    def read(self, session: "Session", record: Record) -> None:
        """Bring an object up to date if it has no unsaved changes, else leave it; from nearby if possible."""
        near, baseline = self._mirror().near(record.key), record.baseline
        if near is not None and near.seen < baseline.revision:
            near = None
        in_step = near is not None and near.revision == baseline.revision and not baseline.behind
        if in_step and record.known and record.unanswered is None:
            return  # what is stored is what was seen, whether or not there is something unsaved
        local = _saved(session, record)
        if local is not None:
            self._merge(session, record, local, near=near)
            baseline.watch(session.messages)

    def read_first(self, session: "Session", record: Record) -> None:
        """Fill a new object with what is stored."""
        near = self._mirror().near(record.key)
        first_read(session, record, self._tail(Held(record.key), []) if near is None else all_of(near))

    def _tail(self, held: Held, lines: list[bytes]) -> Tail | None:
        """Read what is not held; `lines` begin with what is. Keeps what is read nearby."""
        mirror = self._mirror()
        marks, as_of_s = mirror.marks, mirror.clock()
        tail: Tail | None = self._run(ops.read(held))
        if tail is not None and mirror.on:
            whole = Lines(lines[: tail.start] + tail.lines, tail.head.message_count)
            mirror.offer(
                Snapshot(held.key, tail.head, whole, tail.head.revision, as_of_s), tail.cursor, marks
            )
        return tail

    def adopt(self, session: "Session", record: Record) -> None:
        """Compare an object that was made by hand with what is stored: it must begin with those messages.

        Members of the metadata that it lacks, and a `last_consolidated` that it does not give, are taken from
        what is stored. Raises ConflictError, with the object untouched.
        """
        tail = self._run(ops.read(Held(record.key)))
        if tail is not None:
            stored = _stored(tail, [])
            local = _local(session, Baseline(lines=stored.lines))
            if local.lines[: len(stored.lines)] != stored.lines:
                raise self._conflict(Held(record.key), tail.head.revision, len(stored.lines))
            record.baseline.read(tail.head.revision, stored)
            record.baseline.watch(session.messages)
            session.metadata = {**tail.head.metadata, **session.metadata}
            session.last_consolidated = session.last_consolidated or stored.last_consolidated
        record.known = True

    def save(self, session: "Session", record: Record) -> None:
        """Make stored what the object holds, then take in what others wrote."""
        if not record.known:
            self.adopt(session, record)
        baseline = record.baseline
        acknowledged = self._resume(session, record)
        local = _local(session, baseline)
        _check(session, local, baseline)
        refusals = 0
        try:
            while (step := self._next(baseline, local)) is not None:
                if baseline.behind and not isinstance(step, Append):
                    local = self._merge(session, record, local)
                    continue
                try:
                    self._exchange(session, record, _rpc(session, record, step), step)
                except (AlreadyExistsError, ConflictError, NotFoundError) as refusal:
                    refusals += 1
                    if refusals == _REFUSALS_MAX:
                        raise
                    local = self._merge(session, record, local, refusal)
                except InvalidArgumentError as error:
                    if isinstance(error, TooLargeError) and self._take_limit(error, step):
                        continue
                    if error.metadata.get("field") != "create_time" or not _has_own_time(session, record):
                        raise _in_session(error, session.key, step) from error
                    record.created_at = session.created_at  # beyond the daemon's clock, which then counts
                else:
                    acknowledged = True
                    local = replace(local, last_consolidated=session.last_consolidated)
            if baseline.behind or not acknowledged:
                local = self._catch_up(session, record, local, acknowledged)
        finally:
            if local.lines[: len(baseline.lines)] == baseline.lines:
                baseline.watch(session.messages)

    def _next(self, baseline: Baseline, local: Local) -> Step | None:
        """The next thing to send, in batches that the daemon takes, as far as is known."""
        step = next_step(baseline, local, self._limits)
        if self._asked or step is None or isinstance(step, Update):
            return self._fitting(step)
        if sum(map(len, step.lines)) <= _READ_BYTES_MAX:
            return step
        limits = self._run(ops.info()).limits
        self._asked = True
        self._lower("batch_messages_max", limits.batch_messages_max)
        self._lower("batch_bytes_max", limits.batch_bytes_max)
        return self._fitting(next_step(baseline, local, self._limits))

    def _fitting(self, step: Step | None) -> Step | None:
        """The step, unless it is a replacement that the daemon does not take, and that cannot be divided."""
        size_bytes = sum(len(line) + 1 for line in step.lines) if isinstance(step, Replace) else 0
        if size_bytes > self._limits.batch_bytes_max:
            limit = self._limits.batch_bytes_max
            text = f"the replacement has {size_bytes} bytes; the limit is {limit}. Save between such changes."
            metadata = {"size_bytes": str(size_bytes), "limit_bytes": str(limit)}
            raise error_for("BATCH_TOO_LARGE", text, metadata)
        return step

    def _take_limit(self, refusal: TooLargeError, step: Step) -> bool:
        """Whether what a refused batch held can be sent in smaller ones."""
        if not isinstance(step, Create | Append) or len(step.lines) < 2:
            return False
        match refusal.reason:
            case "BATCH_TOO_MANY":
                return self._lower("batch_messages_max", int(refusal.metadata.get("limit", 0)))
            case "BATCH_TOO_LARGE":
                return self._lower("batch_bytes_max", int(refusal.metadata.get("limit_bytes", 0)))
        return False

    def _lower(self, name: str, limit: int) -> bool:
        """Take a limit of the daemon's if it is lower than the one that is known."""
        if not 0 < limit < getattr(self._limits, name):
            return False
        self._limits = replace(self._limits, **{name: limit})
        return True

    def _resume(self, session: "Session", record: Record) -> bool:
        """Send the write again whose outcome is not known, if any; True if it is now acknowledged."""
        if record.unanswered is None:
            return False
        rpc, step = record.unanswered
        try:
            self._exchange(session, record, rpc, step)
        except (AlreadyExistsError, ConflictError, NotFoundError):
            return False  # it was never applied; what there is to send now is found out anew
        return True

    def _exchange(self, session: "Session", record: Record, rpc: Rpc, step: Step) -> None:
        """Make one write; keep it if it remains without an answer."""
        record.unanswered = rpc, step
        try:
            reply = self._run(_call(rpc))
        except OutcomeUnknownError as error:
            error._operation, error._run = lambda: session, self._again
            raise
        except CallExpiredError:  # its outcome will never be known: no save goes past it
            raise
        except SessionStoreError:
            record.unanswered = None
            raise
        except BaseException:  # interrupted: it may have been sent
            rpc.maybe_applied = True
            record.unanswered = None if rpc.ticket is None else (rpc, step)
            raise
        record.unanswered = None
        _acknowledged(session, record, step, reply)

    def _catch_up(
        self, session: "Session", record: Record, local: Local, acknowledged: bool
    ) -> Local:
        """Take in what others wrote, after everything of this session is stored."""
        try:
            return self._merge(session, record, local)
        except SessionStoreError:
            if not acknowledged:
                raise
            # The write is acknowledged, and raising would deny it. The baseline knows that it is behind, so
            # the next save or refresh reads again, and raises if that does not work.
            return local

    def _merge(
        self,
        session: "Session",
        record: Record,
        local: Local,
        refusal: SessionStoreError | None = None,
        near: Snapshot | None = None,
    ) -> Local:
        """Take what is stored into the object. Raises ConflictError, with the object untouched."""
        baseline = record.baseline
        held = Held(record.key, baseline.revision, baseline.merged)
        tail = self._tail(held, baseline.lines) if near is None else all_of(near)
        stored = _stored(tail, baseline.lines)
        merged = merge(baseline, local, stored)
        revision = tail.head.revision if tail else 0
        if merged is None:
            raise self._conflict(held, revision, len(stored.lines)) from refusal
        start, stop, new_stop = changed_range(local.lines, merged.lines)
        if start < stop or start < new_stop:
            session.messages[start:stop] = [ops.decode(line) for line in merged.lines[start:new_stop]]
        _take_members(session.metadata, local.members, merged.members)
        session.last_consolidated = merged.last_consolidated
        baseline.read(revision, stored)
        if tail is not None:
            _take_times(session, record, tail.head)
        return merged

    def _conflict(self, held: Held, revision: int, count: int) -> ConflictError:
        text = (
            f"session {held.key!r} was changed by somebody else (it is at revision {revision}, and was seen "
            f"at {held.revision}), and messages that were there were changed here: that is not stored. Read "
            "it anew with invalidate() and get_or_create(), make the change again, and save."
        )
        numbers = {"expected_revision": held.revision, "revision": revision, "message_count": count}
        metadata = {"key": held.key, **{name: str(number) for name, number in numbers.items()}}
        error = cast("ConflictError", error_for("REVISION_CONFLICT", text, metadata))
        error._operation, error._run = lambda: ops.unseen(held), self._run
        return error


def is_unsaved(session: "Session", record: Record) -> bool:
    """Whether there is anything in an object that is not stored, as far as is known."""
    return _saved(session, record) is None


def _saved(session: "Session", record: Record) -> Local | None:
    """What an object holds, if all of it is stored as far as is known; else None."""
    baseline = record.baseline
    if record.unanswered is not None:
        return None
    try:
        local = _local(session, baseline)
    except InvalidArgumentError:
        return None
    known = Local(baseline.lines, baseline.members, baseline.last_consolidated)
    return local if local == known else None


def first_read(session: "Session", record: Record, tail: Tail | None) -> None:
    """Fill a new object with what was read of its key."""
    record.known = True
    record.created_at = session.created_at
    if tail is None:
        return
    stored = _stored(tail, [])
    session.messages = [ops.decode(line) for line in stored.lines]
    session.metadata = deepcopy(tail.head.metadata)
    session.last_consolidated = stored.last_consolidated
    record.baseline.read(tail.head.revision, stored)
    record.baseline.watch(session.messages)
    _take_times(session, record, tail.head)


# -------------------------------------------------------------------------------------- values, in and out


def _call(rpc: Rpc) -> Operation[Any]:
    """One call; its reply."""
    reply = yield rpc
    return reply


def _rpc(session: "Session", record: Record, step: Step) -> Rpc:
    """The call that a step is."""
    key, revision = ops.text("key", record.key, "KEY_INVALID"), record.baseline.revision
    match step:
        case Create():
            own = _aware(session.created_at) if _has_own_time(session, record) else None
            create = pb.CreateSessionRequest(
                key=key,
                messages=codec.join(step.lines),
                metadata=_json(step.members),
                last_consolidated=step.last_consolidated,
                create_time=ops.timestamp("created_at", own),
            )
            return Rpc(ops.CREATE, create)
        case Append():
            return Rpc(ops.APPEND, pb.AppendMessagesRequest(key=key, messages=codec.join(step.lines)))
        case Replace():
            change = pb.ReplaceMessagesRequest(
                key=key,
                expected_revision=revision,
                start=step.start,
                delete_count=step.delete_count,
                messages=codec.join(step.lines),
            )
            return Rpc(ops.REPLACE, change)
        case Update():
            counts = step.last_consolidated is not None
            paths = [f"metadata.{ops.text('metadata', name)}" for name in step.members]
            update = pb.UpdateSessionRequest(
                key=key,
                # A number of messages means something only for the messages that were seen.
                expected_revision=revision if counts else None,
                update_mask=FieldMask(paths=[*paths, "last_consolidated"] if counts else paths),
                metadata=_json({name: text for name, text in step.members.items() if text is not None}),
                last_consolidated=step.last_consolidated or 0,
            )
            return Rpc(ops.UPDATE, update)


def _acknowledged(session: "Session", record: Record, step: Step, reply: Any) -> None:
    """Take an answer into account."""
    baseline, result = record.baseline, reply.result
    untouched = session.last_consolidated == baseline.last_consolidated
    baseline.applied(
        step,
        revision=result.revision,
        previous_revision=result.previous_revision,
        last_consolidated=result.last_consolidated,
    )
    if untouched:  # it was not changed here: what the daemon made of it counts
        session.last_consolidated = baseline.last_consolidated
    session.updated_at = naive(ops.moment(result.update_time))
    if isinstance(step, Create):
        if not _has_own_time(session, record):
            session.created_at = session.updated_at
        record.created_at = session.created_at


def _has_own_time(session: "Session", record: Record) -> bool:
    """Whether the object's `created_at` comes from its user."""
    return record.created_at is None or session.created_at != record.created_at


def _take_times(session: "Session", record: Record, head: Head) -> None:
    record.created_at = session.created_at = naive(head.create_time)
    session.updated_at = naive(head.update_time)


def _stored(tail: Tail | None, held: list[bytes]) -> Local:
    """All that is stored: what was read, after what was held before."""
    if tail is None:
        return Local([], {}, 0)
    head = tail.head
    return Local(held[: tail.start] + tail.lines, _members(head.metadata), head.last_consolidated)


def _local(session: "Session", baseline: Baseline) -> Local:
    """The object as its holder left it. Raises InvalidArgumentError for messages that cannot be stored."""
    if not isinstance(session.messages, list):
        raise ops.invalid("messages", f"must be a list, not {type(session.messages).__name__}")
    try:
        lines = baseline.lines_of(list(session.messages))
    except codec.MessageError as error:
        raise error_for(error.reason, f"session {session.key!r}: {error}", error.metadata) from None
    return Local(lines, _members(session.metadata), session.last_consolidated)


def _check(session: "Session", local: Local, baseline: Baseline) -> None:
    """Refuse a changed head that cannot be stored, before anything is sent."""
    names = [name for name, text in local.members.items() if text != baseline.members.get(name)]
    ops.metadata_bytes({name: session.metadata[name] for name in names})
    value, count = ops.integer("last_consolidated", local.last_consolidated), len(local.lines)
    if value != baseline.last_consolidated and not 0 <= value <= count:
        text = f"last_consolidated {value} is out of range: the session has {count} messages"
        metadata = {"index": str(value), "message_count": str(count)}
        raise error_for("LAST_CONSOLIDATED_OUT_OF_RANGE", text, metadata)


def _members(metadata: Mapping[str, object]) -> dict[str, str]:
    """The members of metadata as JSON texts. Raises InvalidArgumentError if it is no JSON object."""
    if not isinstance(metadata, dict) or not all(isinstance(name, str) for name in metadata):
        ops.metadata_bytes(metadata)
    try:
        members = {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()}
    except (TypeError, ValueError, RecursionError):
        ops.metadata_bytes(metadata)
        raise
    if not codec.names_are_strings(metadata):  # json writes 1 as it writes "1", and the change would be lost
        ops.metadata_bytes(metadata)
    return members


def _json(members: Mapping[str, str]) -> bytes:
    """Members as a JSON object."""
    pairs = (f"{json.dumps(name, ensure_ascii=False)}: {text}" for name, text in members.items())
    return f"{{{', '.join(pairs)}}}".encode()


def _take_members(metadata: dict[str, Any], before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Bring metadata to other members, in place; values that stay equal stay the same objects."""
    for name in before:
        if name not in after:
            del metadata[name]
    for name, text in after.items():
        if before.get(name) != text:
            metadata[name] = json.loads(text)


def _in_session(error: InvalidArgumentError, key: str, step: Step) -> SessionStoreError:
    """The daemon's refusal of a message, with its index in the session instead of that in the call."""
    if not error.reason.startswith("MESSAGE_") or error.index is None or isinstance(step, Update):
        return error
    index = error.index + (0 if isinstance(step, Create) else step.start)
    text = f"session {key!r}, index {index}: {error}"
    return error_for(error.reason, text, {**error.metadata, "index": str(index)})


def naive(moment: datetime) -> datetime:
    """An aware time as a naive one, local; at the ends of the calendar, which has no local time, as it is."""
    try:
        return moment.astimezone().replace(tzinfo=None)
    except (OverflowError, ValueError):
        return moment.replace(tzinfo=None)


def _aware(moment: datetime) -> datetime:
    """A time in UTC; a naive one is local."""
    if not isinstance(moment, datetime):
        raise ops.invalid("created_at", f"must be a datetime, not {type(moment).__name__}")
    try:
        return moment.astimezone(UTC)
    except (OverflowError, ValueError):
        told = f"must be within the years 1 to 9999 of UTC, not {moment!r}"
        raise ops.invalid("created_at", told) from None

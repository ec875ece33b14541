"""What a session handle knows, and how its own writes advance it. No I/O, no waiting; shared by both clients.

A handle holds a snapshot: head and messages of one revision. The rules:

* A snapshot is a revision of the session, always: it is never a mix of two.
* It only moves forward. An answer that is older than the snapshot changes nothing; if it cannot be told
  which is older, because one of them says that there is no session, it is read again.
* An own write that came right after the snapshot's revision is applied locally. If others wrote in
  between, the missing tail (or, after a rewrite, everything) is read, so that the snapshot contains the
  own write. If that read fails, the write still counts and is returned; the snapshot stays where it was
  until the next write or refresh.
* A signal handler can interrupt a thread while it moves a snapshot. Its own writes through that handle then
  count as well, and its snapshot stays as if their read had failed.
* The messages are kept as the lines that the daemon stores, and read into dicts when somebody looks. So a
  caller who changes a dict of the snapshot against the rules can damage what they see, and never what is
  stored.

Operations on a handle are generators, as in `_operations`. This module must not know of grpc, threads'
schedules or event loops; it takes a lock only around plain computation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol, Self, cast

from google.protobuf.field_mask_pb2 import FieldMask

from sessionstore import _operations as ops
from sessionstore import codec, history
from sessionstore._mirror import Mirror, read
from sessionstore._operations import Held, Operation, Tail, pb
from sessionstore._snapshot import (
    Effect,
    EffectOn,
    Lines,
    Snapshot,
    absent,
    advanced,
)
from sessionstore._types import KEEP, Appended, Head, Keep, Message, MessageInput, Remove, Written
from sessionstore.errors import SessionStoreError, error_for
from sessionstore.v1 import session_pb2

# Each read that is made again met another one, or a write, of the same handle.
_READS_MAX = 20


class Owner(Protocol):
    """What a handle needs of its client, besides running operations."""

    @property
    def _guard(self) -> AbstractContextManager[bool]: ...

    @property
    def _mirror(self) -> Mirror: ...


class BaseHandle:
    """The state of a handle: properties, and operations for the clients to run."""

    _fencing_token = 0
    """The token of the lease that its changes are made under; a turn has one."""

    def __init__(self, owner: Owner, snapshot: Snapshot) -> None:
        self._owner = owner
        self._snapshot = snapshot
        self._decoded: tuple[Lines, tuple[Message, ...]] = (Lines([], 0), ())
        self._mover: AbstractContextManager[bool] | None = None

    def __repr__(self) -> str:
        at = self._snapshot
        state = f"revision={at.revision}, message_count={at.lines.count}" if at.head else "does not exist"
        return f"<{type(self).__name__} {self.key!r} {state}>"

    # ------------------------------------------------------------------------------- the snapshot; never I/O

    @property
    def key(self) -> str:
        """The session's key."""
        return self._snapshot.key

    @property
    def exists(self) -> bool:
        """Whether the session existed at the snapshot."""
        return self._snapshot.head is not None

    @property
    def revision(self) -> int:
        """The snapshot's revision; 0 if the session does not exist. Use it as `expected_revision`."""
        return self._snapshot.revision

    @property
    def head(self) -> Head | None:
        """Everything but the messages, of one revision: a copy; None if the session does not exist."""
        head = self._snapshot.head
        return replace(head, metadata=deepcopy(head.metadata)) if head else None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages at the snapshot. Read only: what `edit` gives may be changed, these dicts may not."""
        lines = self._snapshot.lines
        known, messages = self._decoded
        if known is not lines:
            same = known.begins(lines)
            kept = messages if same else ()
            messages = (*kept, *map(ops.decode, lines.since(len(kept))))
            self._decoded = (lines, messages)
        return messages

    @property
    def message_count(self) -> int:
        """How many messages the session has."""
        return self._snapshot.lines.count

    @property
    def metadata(self) -> Message:
        """The session's metadata: a copy that is yours. `update` changes what is stored."""
        head = self._snapshot.head
        return deepcopy(head.metadata) if head else {}

    @property
    def last_consolidated(self) -> int:
        """How many messages from the front are summarised elsewhere."""
        head = self._snapshot.head
        return head.last_consolidated if head else 0

    @property
    def create_time(self) -> datetime | None:
        """When the session was created (aware, UTC); None if it does not exist."""
        head = self._snapshot.head
        return head.create_time if head else None

    @property
    def update_time(self) -> datetime | None:
        """When the session was last changed (aware, UTC); None if it does not exist."""
        head = self._snapshot.head
        return head.update_time if head else None

    @property
    def expire_time(self) -> datetime | None:
        """When the session ends by itself (aware, UTC); None: never, or it does not exist."""
        head = self._snapshot.head
        return head.expire_time if head else None

    @property
    def as_of(self) -> datetime:
        """The latest moment as of which the snapshot is known to be what is stored (aware, UTC). No I/O.

        Whatever was acknowledged to anybody before it, in any process, is in the snapshot. It is when the
        handle last began to read, or, while the near cache holds the session at this revision, when the last
        request of its stream was sent that was answered with "nothing else happened". The time is measured
        on a steady clock, so it is right at the moment at which you ask.
        """
        at = self._snapshot
        near_s = self._owner._mirror.as_of_s(at.key, at.revision)
        if near_s > at.as_of_s:
            with self._moving() as alone:
                if alone and self._snapshot is at:
                    self._snapshot = replace(at, as_of_s=near_s)
        ago_s = self._owner._mirror.clock() - max(near_s, at.as_of_s)
        return datetime.now(UTC) - timedelta(seconds=ago_s)

    @property
    def damage(self) -> str:
        """What could not be read when the session's file was adopted; empty if it was whole."""
        head = self._snapshot.head
        return head.damage if head else ""

    def history(
        self,
        max_messages: int = 500,
        *,
        keep: Sequence[str] = (),
        max_tokens: int | None = None,
        count_tokens: Callable[[Message], float] | None = None,
    ) -> list[Message]:
        """A window of the last messages that is legal to send to a model. No I/O.

        The last `max_messages` messages (0: no limit) after `last_consolidated`, aligned to a user turn,
        without orphaned tool calls and results; extended back to a user turn rather than empty of one.
        `keep` names fields to give beside those that models know. If the window counts for more than
        `max_tokens`, turns are left out from its front, down to the last one, which is always given: then
        `count_tokens` gets entries of the window, one at a time, and what it raises goes through.
        The entries are copies and yours. Raises InvalidArgumentError.
        """
        if ops.integer("max_messages", max_messages) < 0:
            metadata = {"field": "max_messages", "value": str(max_messages)}
            raise error_for("LIMIT_NEGATIVE", f"max_messages must be 0 or more, not {max_messages}", metadata)
        if max_tokens is not None:
            ops.integer("max_tokens", max_tokens)
        try:
            window = history.history(
                self.messages,
                last_consolidated=self.last_consolidated,
                max_messages=max_messages,
                keep=keep,
                max_tokens=max_tokens,
                count_tokens=cast("history.CountTokens | None", count_tokens),
            )
        except history.ArgumentError as error:
            raise ops.invalid(error.field, error.detail) from None
        return cast("list[Message]", window)

    # ----------------------------------------------------------------------------- moving the snapshot

    @contextmanager
    def _moving(self) -> Iterator[bool]:
        """Hold the snapshot against other threads; False if this very thread was interrupted doing so."""
        guard = self._owner._guard
        with guard:
            if self._mover is guard:  # else it is None, or that of a thread that was not forked along
                yield False
                return
            self._mover = guard
            try:
                yield True
            finally:
                self._mover = None

    def _applied(self, result: session_pb2.WriteResult, effect: EffectOn) -> bool:
        """Advance by an own change; False if others wrote in between and a read is needed."""
        with self._moving() as alone:
            before = self._snapshot
            if not alone or result.revision <= before.seen:
                return True
            if result.previous_revision != before.revision:
                return False
            self._snapshot = advanced(before, result, effect(before))
            return True

    def _take(
        self, before: Snapshot, tail: Tail | None, read: Snapshot, *, surely: bool = False
    ) -> bool:
        """Take what a read gave to one who held `before`, unless it is older than what is known by now.

        False if nobody can tell, and `surely` is not set: a removal that a read found has no revision to
        compare, and the snapshot was moved meanwhile.
        """
        with self._moving() as alone:
            now = self._snapshot
            if not alone:
                return True
            if tail is None:
                unsure = (now.seen, now.revision) != (before.seen, before.revision)
            else:
                unsure = now.head is None and now is not before
            if unsure and not surely:
                return False
            if tail is None or tail.head.revision > now.seen:
                self._snapshot = read
            elif tail.head.revision == now.revision:
                self._snapshot = replace(now, head=tail.head, as_of_s=read.as_of_s)
            return True

    def _refresh(self) -> Operation[None]:
        for attempt in range(1, _READS_MAX + 1):
            before = self._snapshot
            tail, snapshot = yield from read(self._owner._mirror, before)
            if self._take(before, tail, snapshot, surely=attempt == _READS_MAX):
                return

    def _catch_up(self) -> bool:
        """Take what the near cache has; False if a read is needed."""
        near = self._owner._mirror.near(self.key)
        if near is None:
            return False
        with self._moving() as alone:
            now = self._snapshot
            if alone and near.seen > now.seen:
                self._snapshot = near
            return alone and near.seen >= now.seen

    def _settle(self, result: session_pb2.WriteResult, effect: EffectOn) -> Operation[None]:
        """Bring the snapshot to a revision that contains an own, acknowledged write."""
        if self._applied(result, effect):
            return
        try:
            yield from self._refresh()
        except SessionStoreError:
            # The write is acknowledged, and raising would deny it. The snapshot is still a true one, only
            # older, as its revision tells; whatever is wrong with reading, the next refresh raises.
            return

    # --------------------------------------------------------------------------------------- operations

    def _append(
        self,
        lines: Sequence[bytes],
        expected_revision: int | None,
        request_id: str | None,
        wait_s: float = 0.0,
        *,
        held: Held | None = None,
    ) -> Operation[Appended]:
        """Append; `held` is what its author has seen, if that is not the snapshot."""
        request = pb.AppendMessagesRequest(
            key=self.key,
            fencing_token=self._fencing_token,
            request_id=ops.text("request_id", request_id or ""),
            expected_revision=ops.optional("expected_revision", expected_revision),
            messages=codec.join(lines),
            lease_wait=ops.seconds("wait", wait_s) if wait_s else None,
        )

        def finish(reply: pb.AppendMessagesResponse) -> Operation[Appended]:
            result = reply.result
            yield from self._settle(result, lambda _: Effect(reply.first_index, 0, lines))
            return Appended(result.revision, reply.first_index, result.message_count, result.replayed)

        return ops.change(ops.APPEND, request, held or self._snapshot.held, finish, wait_s)

    def _replace(
        self,
        start: int,
        delete_count: int | None,
        lines: Sequence[bytes],
        expected_revision: int | None,
        request_id: str | None,
        allow_appends: bool = False,
        *,
        held: Held | None = None,
    ) -> Operation[Written]:
        """Replace a range; `held` as for `_append`."""
        request = pb.ReplaceMessagesRequest(
            key=self.key,
            fencing_token=self._fencing_token,
            request_id=ops.text("request_id", request_id or ""),
            expected_revision=ops.optional("expected_revision", expected_revision),
            start=ops.integer("start", start),
            delete_count=ops.optional("delete_count", delete_count),
            messages=codec.join(lines),
            allow_appends=bool(allow_appends),
        )

        def effect(before: Snapshot) -> Effect:
            return Effect(start, before.lines.count - start if delete_count is None else delete_count, lines)

        def finish(reply: pb.ReplaceMessagesResponse) -> Operation[Written]:
            yield from self._settle(reply.result, effect)
            return ops.written(reply.result)

        return ops.change(ops.REPLACE, request, held or self._snapshot.held, finish)

    def _pop(self, expected_revision: int | None, request_id: str | None) -> Operation[Message]:
        request = pb.PopMessageRequest(
            key=self.key,
            fencing_token=self._fencing_token,
            request_id=ops.text("request_id", request_id or ""),
            expected_revision=ops.optional("expected_revision", expected_revision),
        )

        def finish(reply: pb.PopMessageResponse) -> Operation[Message]:
            yield from self._settle(reply.result, lambda before: Effect(before.lines.count - 1, 1))
            return ops.decode(reply.message)

        return ops.change(ops.POP, request, self._snapshot.held, finish)

    def _update(
        self,
        metadata: MessageInput | None,
        patch: Mapping[str, object] | None,
        last_consolidated: int | None,
        expire_time: datetime | Keep | None,
        expected_revision: int | None,
        request_id: str | None,
    ) -> Operation[Written]:
        paths, sent = _masked(metadata, patch)
        if last_consolidated is not None:
            paths.append("last_consolidated")
        if expire_time is not KEEP:
            paths.append("expire_time")
        request = pb.UpdateSessionRequest(
            key=self.key,
            fencing_token=self._fencing_token,
            request_id=ops.text("request_id", request_id or ""),
            expected_revision=ops.optional("expected_revision", expected_revision),
            update_mask=FieldMask(paths=paths),
            metadata=sent,
            last_consolidated=ops.integer("last_consolidated", last_consolidated or 0),
            expire_time=None if expire_time is KEEP else ops.timestamp("expire_time", expire_time),
        )

        def effect(before: Snapshot) -> Effect:
            new = None if metadata is None and patch is None else ops.decode(sent)
            if patch is not None:
                new = _patched(before.head.metadata if before.head else {}, patch, new or {})
            return Effect(before.lines.count, 0, (), new)

        def finish(reply: pb.UpdateSessionResponse) -> Operation[Written]:
            yield from self._settle(reply.result, effect)
            return ops.written(reply.result)

        return ops.change(ops.UPDATE, request, self._snapshot.held, finish)

    def _fork(self, to: str, at: int | None, request_id: str | None) -> Operation[Self]:
        request = pb.ForkSessionRequest(
            key=ops.text("to", to, "KEY_INVALID"),
            request_id=ops.text("request_id", request_id or ""),
            source_key=self.key,
            at=ops.optional("at", at),
        )

        def finish(_: pb.ForkSessionResponse) -> Operation[Self]:
            try:
                snapshot = yield from load(self._owner._mirror, to)
            except SessionStoreError:
                # The fork is acknowledged, and raising would deny it. The reply does not tell of what
                # revision it is a copy; what is known to be true is that there was no such session before.
                snapshot = absent(to)
            return type(self)(self._owner, snapshot)

        return ops.change(ops.FORK, request, self._snapshot.held, finish)

    def _delete(self, expected_revision: int | None, request_id: str | None) -> Operation[Written]:
        def finish(reply: pb.DeleteSessionResponse) -> Operation[Written]:
            with self._moving() as alone:
                if alone and reply.result.revision > self._snapshot.seen:
                    self._snapshot = absent(self.key, reply.result.revision)
            return ops.done(ops.written(reply.result))

        return ops.delete(
            self._snapshot.held, expected_revision, request_id, finish, self._fencing_token
        )


def load(mirror: Mirror, key: str) -> Operation[Snapshot]:
    """Read a session."""
    _, snapshot = yield from read(mirror, absent(key))
    return snapshot


def _masked(
    metadata: MessageInput | None, patch: Mapping[str, object] | None
) -> tuple[list[str], bytes]:
    """The mask paths and the JSON text of an update of metadata."""
    if metadata is not None and patch is not None:
        raise ops.invalid("patch", "and metadata exclude each other: one sets members, one replaces all")
    if metadata is not None:
        return ["metadata"], ops.metadata_bytes(metadata)
    if patch is None:
        return [], b""
    if not isinstance(patch, Mapping):
        raise ops.invalid("patch", f"must be a dict, not {type(patch).__name__}")
    sent = {name: value for name, value in patch.items() if not isinstance(value, Remove)}
    stored = ops.metadata_bytes(sent)
    return [f"metadata.{ops.text('patch', name)}" for name in patch], stored


def _patched(before: Message, patch: Mapping[str, object], new: Message) -> Message:
    """Metadata with members set and removed; the others keep their place."""
    whole = {**before, **new}
    return {name: value for name, value in whole.items() if not isinstance(patch.get(name), Remove)}

"""The sync client: `SessionStore` and `SessionHandle`.

Thin: `_operations` and `session` know what, `_driver` waits.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from types import TracebackType
from typing import Self

from sessionstore import _operations as ops
from sessionstore._driver import Driver
from sessionstore._editing import EditFunction, begin, edit, store
from sessionstore._expiry import moment
from sessionstore._mirror import DEFAULT_SESSIONS, DEFAULT_STALENESS_S, Bounds, Mirror
from sessionstore._operations import Operation, Value
from sessionstore._renewals import Renewals
from sessionstore._snapshot import Snapshot, absent, joined
from sessionstore._targets import resolve_targets, resolve_timeout_s
from sessionstore._turn import Holding, TurnState, acquire, default_holder
from sessionstore._types import (
    KEEP,
    Appended,
    Expires,
    Head,
    Keep,
    Lease,
    Message,
    MessageInput,
    OrderBy,
    ServerInfo,
    Written,
)
from sessionstore._watch import Watch
from sessionstore._watching import Watching
from sessionstore.session import BaseHandle, load

Heads = Iterator[Head]  # `list` means a method below


class SessionStore:
    """A session store, reached through its daemon. Thread-safe; a forked child may go on using it.

    Args:
        target: ``host:port``, ``[v6]:port`` or ``unix:PATH``, or a comma list of these, tried in turn
            (all must lead to the same store). None: $SESSIONSTORE_TARGET, else the default socket of this
            user.
        timeout: seconds per call to the daemon, connecting and repeating included. None:
            $SESSIONSTORE_TIMEOUT, else 30. Reading a session of more than 1 MiB is two calls.
        near_cache_bytes: how many bytes of sessions to keep near: `session`, and `SessionHandle.catch_up`, of
            a session that was read before then cost no round trip. 0 keeps nothing, and every read goes to
            the daemon.
        near_cache_sessions: how many sessions to keep near at the most.
        near_cache_staleness: seconds, 0.1 to 3600. What others wrote is seen at most so much later; `as_of`
            tells exactly. Own writes are always seen.

    Construction does no I/O. Every call raises UnavailableError if no daemon answers within the timeout,
    and a change OutcomeUnknownError if it was sent and no answer came.

    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = None,
        near_cache_bytes: int = 0,
        near_cache_sessions: int = DEFAULT_SESSIONS,
        near_cache_staleness: float = DEFAULT_STALENESS_S,
    ) -> None:
        self._targets = resolve_targets(target)
        bounds = Bounds(near_cache_bytes, near_cache_sessions, near_cache_staleness)
        self._driver = Driver(self._targets, resolve_timeout_s(timeout), bounds)
        self._turns = Renewals(self._driver.run)

    def __repr__(self) -> str:
        return f"<SessionStore {','.join(self._targets)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; what other threads have begun gets five seconds to end. Closing again does nothing.

        What is begun afterwards raises RuntimeError, and nothing is sent; a write that was begun before and
        is acknowledged returns. A client that is never closed delays no exit.
        """
        self._driver.close()

    @property
    def _guard(self) -> AbstractContextManager[bool]:
        return self._driver.guard

    @property
    def _mirror(self) -> Mirror:
        return self._driver.mirror

    def session(self, key: str) -> "SessionHandle":
        """A handle on a session, with all its messages; creates nothing.

        A session that does not exist gives a handle with revision 0 and no messages. Raises
        InvalidArgumentError for a malformed key, DataLossError if the session is damaged.
        """
        near = self._mirror.near(key)
        return SessionHandle(self, self._driver.run(load(self._mirror, key)) if near is None else near)

    def create(
        self,
        key: str,
        messages: Iterable[MessageInput] = (),
        *,
        metadata: MessageInput | None = None,
        last_consolidated: int = 0,
        create_time: datetime | None = None,
        expires: Expires = None,
        request_id: str | None = None,
    ) -> "SessionHandle":
        """Make a session that must not exist yet. Durable when it returns.

        Args:
            key: 1 to 512 bytes of UTF-8 without control characters.
            messages: its first messages.
            metadata: a JSON object, at most 256 KiB.
            last_consolidated: 0 to the number of messages.
            create_time: aware; instead of the daemon's clock, for imports.
            expires: when it ends by itself: an aware time, or a timedelta from now, by this machine's clock.
                None: as the daemon's rules for its key say, else never.
            request_id: the caller's own identity of this change; the same again gives the first answer.

        Raises AlreadyExistsError, InvalidArgumentError, TooLargeError, StorageFullError.

        """
        return self._driver.run(
            ops.create(
                key, messages, metadata, last_consolidated, create_time, moment("expires", expires),
                request_id,
                lambda tail: SessionHandle(self, joined(absent(key), tail)),
            )
        )  # fmt: skip

    def get(self, key: str) -> Head | None:
        """A session's head, without its messages; None if there is no such session."""
        return self._driver.run(ops.head(key))

    def list(
        self,
        prefix: str = "",
        *,
        order_by: OrderBy = "key",
        page_size: int = 100,
        updated_since: datetime | None = None,
    ) -> Heads:
        """The heads of all sessions, page after page as you go.

        Args:
            prefix: only keys that begin with it.
            order_by: ``key``, ``key desc``, ``update_time`` or ``update_time desc``. Keys order by their
                UTF-8 bytes.
            page_size: heads per call to the daemon, 1 to 1,000 (0: 100).
            updated_since: aware; only sessions not last changed before it.

        A session that does not change meanwhile comes exactly once. Raises InvalidArgumentError at once for
        what cannot be sent, else with the first head.

        """
        listing = ops.Listing.begin(prefix, order_by, page_size, updated_since)
        return self._heads(listing)

    def _heads(self, listing: ops.Listing) -> Heads:
        while listing.more:
            yield from self._driver.run(listing.page())

    def delete(
        self, key: str, *, expected_revision: int | None = None, request_id: str | None = None
    ) -> Written:
        """Remove a session and its messages. Durable when it returns. Raises NotFoundError, ConflictError."""
        return self._driver.run(ops.delete(ops.Held(key), expected_revision, request_id, ops.deleted))

    def edit(self, key: str, function: EditFunction, *, attempts: int = 100) -> "SessionHandle":
        """Change a session's messages with a function, again after each conflict. Durable when it returns.

        `function` gets the messages as a list of its own, and gives the new list, or None if it changed
        that one in place. It may be called more than once, with newer messages each time, so it should do
        nothing but compute. A list that did not change stores nothing, and neither does an exception.

        An edit that leaves the last message alone, such as trimming the front or putting a summary there,
        is stored although others append meanwhile; what they appended stands behind it. Any other is
        stored only if nobody wrote since the messages were read. Nobody's message is ever lost.

        Returns a handle on the session as it then is. Raises ConflictError after so many `attempts`, with
        what the function gave last as `edited`; beside steady writers, an edit at the end may come to that.
        The `retry` of an OutcomeUnknownError goes on with the edit.
        """
        return self._driver.run(edit(self.session(key), function, attempts))

    def watch(
        self,
        keys: Iterable[str] | None = None,
        *,
        prefix: str | None = None,
        cursor: bytes | None = None,
        known: Mapping[str, int] | None = None,
    ) -> Watch:
        """The changes of sessions, as they happen, without a gap: iterate over it.

        Args:
            keys: watch these sessions, whether they exist or not; at most 10,000.
            prefix: watch every session whose key begins with it. Neither: watch all.
            cursor: where to go on: the `cursor` of an event, or of a watch, of the same sessions and of any
                process. None: from what is there when the watch comes into force, which is at the first step,
                or at the begin of a ``with`` block.
            known: what you hold: key -> revision. Without a cursor, what differs from that comes first, as
                `whole` events and deletions; ``known={}`` gives all that there is, and then what changes.

        The events of one session come in their order, each once; applying them gives what is stored. The
        watch goes on by itself when the connection breaks, when the daemon restarts and when it was too slow.
        If the daemon no longer keeps what came after the cursor, what differs is read and given as `whole`
        events, and what is gone as deletions. That takes knowing what you hold: a watch of a prefix from a
        cursor without `known`, or one of more than 100,000 sessions, raises CursorExpiredError instead.

        Raises InvalidArgumentError for what cannot be sent, UnavailableError if no daemon answers before the
        watch is in force, and DataLossError if a session has to be read that is damaged.

        """
        return Watch(self._driver, Watching(prefix, keys, cursor, known))

    def info(self) -> ServerInfo:
        """What serves: version, store, durability, limits."""
        return self._driver.run(ops.info())


class SessionHandle(BaseHandle):
    """A session: an immutable snapshot of it, and calls that change it. Made by `SessionStore.session`.

    Properties never do I/O. A change is durable when its call returns, and the snapshot then contains it.
    Every call that changes takes `expected_revision` (only if the session is at this revision, else
    ConflictError; 0 means that it must not exist) and `request_id` (your own identity of the change, such
    as a webhook's delivery id, at most 256 bytes: the same change again gives the first answer, other
    content is refused; for 24 hours or the last 1,000 of the session).

    Thread-safe. All changes may raise InvalidArgumentError, ConflictError, StorageFullError, LimitError,
    DataLossError, UnavailableError (nothing was stored) and OutcomeUnknownError (use its `retry`).
    """

    def __init__(self, owner: SessionStore, snapshot: Snapshot) -> None:
        super().__init__(owner, snapshot)
        self._run = owner._driver.run
        self._turns = owner._turns

    def append(
        self,
        *messages: MessageInput,
        expected_revision: int | None = None,
        request_id: str | None = None,
        wait: float = 0.0,
    ) -> Appended:
        """Add messages at the end, all or nothing; the session is created if it does not exist.

        Every call adds new messages, also if they equal earlier ones. Without `expected_revision` they
        land in the order in which the daemon took the calls, behind whatever others wrote.

        While somebody else has a lease that keeps others from writing, it waits for up to `wait` seconds, in
        the order in which callers came. Then it raises LeaseHeldError.
        """
        return self._run(self._append(ops.encode(messages), expected_revision, request_id, wait))

    def pop(self, *, expected_revision: int | None = None, request_id: str | None = None) -> Message:
        """Remove the last message and return it.

        Raises InvalidArgumentError if there is none, NotFoundError if there is no session.
        """
        return self._run(self._pop(expected_revision, request_id))

    def replace(
        self,
        start: int,
        delete_count: int | None,
        messages: Iterable[MessageInput],
        *,
        expected_revision: int | None = None,
        allow_appends: bool = False,
        request_id: str | None = None,
    ) -> Written:
        """Remove `delete_count` messages (None: all) from index `start` on, and put `messages` there.

        Give `expected_revision` if the indexes come from a snapshot. With `allow_appends` the session may
        have gone on from that revision, as long as messages were only added at its end: they stay, and the
        indexes mean the same messages. It needs `expected_revision` and `delete_count`.

        `last_consolidated` is lowered to the number of messages that remain. Raises InvalidArgumentError if
        the range is not within the session, NotFoundError.
        """
        lines = ops.encode(messages)
        return self._run(
            self._replace(start, delete_count, lines, expected_revision, request_id, allow_appends)
        )

    def clear(self, *, expected_revision: int | None = None, request_id: str | None = None) -> Written:
        """Remove all messages; the session and its metadata stay. Raises NotFoundError."""
        return self._run(self._replace(0, None, (), expected_revision, request_id))

    def update(
        self,
        *,
        metadata: MessageInput | None = None,
        patch: Mapping[str, object] | None = None,
        last_consolidated: int | None = None,
        expire_time: Expires | Keep = KEEP,
        expected_revision: int | None = None,
        request_id: str | None = None,
    ) -> Written:
        """Change metadata, `last_consolidated` or `expire_time`, or all of them, in one step.

        Args:
            metadata: replaces the metadata as a whole.
            patch: sets these top-level members and leaves the others; `sessionstore.REMOVE` removes one.
            last_consolidated: 0 to the number of messages.
            expire_time: when it ends by itself: an aware time, or a timedelta from now, by this machine's
                clock. None: never, whatever the daemon's rules for its key say.
            expected_revision: as for every change.
            request_id: as for every change.

        Raises NotFoundError: appending or `SessionStore.create` makes a session.

        """
        return self._run(
            self._update(
                metadata, patch, last_consolidated, moment("expire_time", expire_time), expected_revision,
                request_id,
            )
        )  # fmt: skip

    def fork(self, to: str, at: int | None = None, *, request_id: str | None = None) -> "SessionHandle":
        """Make a session `to` of the first `at` messages (None: all), with the metadata.

        Returns a handle on it. Should the new session not be readable right after it was made, the handle
        is at the revision before (0: `exists` is False) until its next write or `refresh`, which raises what
        is wrong. Raises NotFoundError, AlreadyExistsError, InvalidArgumentError if there are not so many
        messages.
        """
        return self._run(self._fork(to, at, request_id))

    def delete(self, *, expected_revision: int | None = None, request_id: str | None = None) -> Written:
        """Remove the session. The handle stays usable: appending makes a new session.

        Raises NotFoundError.
        """
        return self._run(self._delete(expected_revision, request_id))

    def refresh(self) -> Self:
        """Bring the snapshot up to date; only what is new is read. Returns the handle itself."""
        self._run(self._refresh())
        return self

    def catch_up(self) -> Self:
        """Bring the snapshot up to date from the near cache; without a round trip, if that is in step.

        Else, and without a near cache, it is `refresh`. What others wrote may be missing if it was
        acknowledged within the last `near_cache_staleness` seconds; `as_of` tells exactly. Returns the handle
        itself.
        """
        return self if self._catch_up() else self.refresh()

    def lease(self) -> Lease | None:
        """The lease of the session that is in force now, whoever has it; None if there is none."""
        return self._run(ops.lease(self.key))

    @contextmanager
    def turn(
        self,
        ttl: float = 60.0,
        wait: float = 10.0,
        *,
        allow_appends: bool = False,
        holder: str | None = None,
    ) -> Iterator["Turn"]:
        """A block in which nobody else writes to the session, which need not exist.

        At its begin the lease is acquired, and the handle brought up to date. It is renewed in the
        background, and given back at the end. If it is lost, because this process was stopped or cut off for
        longer than `ttl`, every later change through the turn raises LeaseLostError, and so does the end of
        the block unless another exception ends it: somebody else may have written since.

        Args:
            ttl: seconds, 1 to 3,600, for which the lease lasts without a renewal: so long others wait for a
                process that died.
            wait: seconds to wait for the lease, in the order in which callers came; 0: not at all.
            allow_appends: others may append meanwhile, and do nothing else.
            holder: what others are told who has it, up to 256 bytes; None: host, process and thread.

        Raises LeaseHeldError if somebody else has it for longer than that, LimitError if too many wait.

        """
        thread = threading.current_thread()
        name = "" if thread is threading.main_thread() else thread.name
        holder = default_holder(name) if holder is None else holder
        holding = self._run(acquire(self.key, ttl, wait, allow_appends, holder))
        try:
            self._turns.add(holding)
            self._run(self._refresh())
            yield Turn(self, holding)
            holding.check()
        finally:
            self._turns.end(holding)

    @contextmanager
    def edit(self) -> Iterator[list[Message]]:
        """The messages as a plain list that is yours; what you made of it is stored at the end of the block.

        Stored only if the session is still at the snapshot's revision; else ConflictError, and nothing was
        stored: your list is its `edited`, and its `fetch` gives what you have not seen (`SessionStore.edit`
        tries again by itself). An exception in the block stores nothing.
        """
        draft = begin(self)
        yield draft.messages
        self._run(store(self, draft, draft.messages))


class Turn(TurnState, SessionHandle):
    """The session in a turn, made by `SessionHandle.turn`: a handle whose changes are made under its lease.

    It shares its snapshot with the handle. Its calls raise LeaseLostError once the lease is lost; nothing is
    stored then. `fork` makes a session of another key, and needs no lease. Thread-safe.
    """

    def __init__(self, handle: SessionHandle, holding: Holding) -> None:
        TurnState.__init__(self, handle, holding)
        self._handle = handle
        self._turns = handle._turns
        self._run = self._run_checked

    def _run_checked(self, operation: Operation[Value]) -> Value:
        return self._handle._run(self._checked(operation))

    def fork(self, to: str, at: int | None = None, *, request_id: str | None = None) -> SessionHandle:
        """As `SessionHandle.fork`."""
        return self._handle.fork(to, at, request_id=request_id)

"""The drop-in: `Session` and `SessionManager`, with the methods of an in-process manager over the daemon.

A `Session` is plain data, and its holder may change all of it in any way. `SessionManager.save` finds out
what changed since the session was last seen, and sends that alone. The rules:

* A session's list changes only inside `get_or_create`, if nothing in it is unsaved, and inside `save`; never
  from another thread, never because of another process.
* What was seen is remembered with the `Session` object, so two objects of one key, in one process or in two,
  behave alike: additions of both are kept, and of two rewrites the later one is refused.
* What is stored is never overwritten unseen, and what others removed never comes back.
* Objects that hold something unsaved are never let go of.

docs/drop-in.md has the outcome of every combination. This module keeps the objects; `_saving` makes the
calls.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, cast

from sessionstore import _operations as ops
from sessionstore import history
from sessionstore._fork import Forkable, watch
from sessionstore._mirror import DEFAULT_SESSIONS, DEFAULT_STALENESS_S
from sessionstore._saving import Record, Saver, is_unsaved, naive
from sessionstore._workspace import find_target
from sessionstore.client import SessionStore

HELD_MAX = 1024
"""How many sessions a manager holds by itself; more only while they have unsaved changes."""
# How many of the least recently used are looked at, each time, for one to let go of.
_LOOKED_AT_MAX = 8


@dataclass
class Session:
    """A conversation: plain data, without any I/O. Change it as you like; `SessionManager.save` stores it.

    Like any list, it belongs to one thread at a time. Times are naive, local.
    """

    key: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    created_at: datetime = field(default_factory=datetime.now)
    updated_at: datetime = field(default_factory=datetime.now)
    metadata: dict[str, Any] = field(default_factory=dict)
    last_consolidated: int = 0
    """How many messages from the front are summarised elsewhere."""

    def add_message(self, role: str, content: str, **kwargs: Any) -> None:
        """Add a message of these fields, with the local time as ``timestamp``; a field given by name wins."""
        now = datetime.now()
        self.messages.append({"role": role, "content": content, "timestamp": now.isoformat(), **kwargs})
        self.updated_at = now

    def get_history(
        self,
        max_messages: int = 500,
        *,
        keep: Sequence[str] = (),
        max_tokens: int | None = None,
        count_tokens: Callable[[dict[str, Any]], float] | None = None,
    ) -> list[dict[str, Any]]:
        """The messages to send to a model: the last `max_messages` (0: all) that are not consolidated.

        They begin with a user turn, and every tool call among them is answered. The entries are copies.
        `keep`, `max_tokens` and `count_tokens` are those of `SessionHandle.history`. Raises ValueError.
        """
        window = history.history(
            self.messages,
            last_consolidated=self.last_consolidated,
            max_messages=max_messages,
            keep=keep,
            max_tokens=max_tokens,
            count_tokens=count_tokens,
        )
        return cast("list[dict[str, Any]]", window)

    def clear(self) -> None:
        """Begin anew: no messages, nothing consolidated. The metadata stays."""
        self.messages = []
        self.last_consolidated = 0
        self.updated_at = datetime.now()


class SessionManager(Forkable):
    """Sessions kept by a daemon, with the methods of a manager that keeps them in files.

    Args:
        workspace: a `Path`: the directory of a daemon on this machine, which is found through the file LOCK
            there. A string: a target, as `SessionStore` takes it: ``host:port``, ``[v6]:port``,
            ``unix:PATH``, or a comma list.
        timeout: seconds per call to the daemon, connecting and repeating included; None for
            $SESSIONSTORE_TIMEOUT, else 30.
        near_cache_bytes: how many bytes of sessions to keep near, so that `get_or_create` of a session that
            was read before costs no round trip; as for `SessionStore`, like the following two.
        near_cache_sessions: how many sessions to keep near at the most.
        near_cache_staleness: seconds; what others wrote is seen at most so much later.

    Thread-safe; a forked child may go on using it. Raises UnavailableError if no daemon serves the `Path`,
    and so does every method that reads or writes if none answers in time.

    """

    def __init__(
        self,
        workspace: Path | str,
        *,
        timeout: float | None = None,
        near_cache_bytes: int = 0,
        near_cache_sessions: int = DEFAULT_SESSIONS,
        near_cache_staleness: float = DEFAULT_STALENESS_S,
    ) -> None:
        self.workspace = workspace
        self._store = SessionStore(
            _target(workspace),
            timeout=timeout,
            near_cache_bytes=near_cache_bytes,
            near_cache_sessions=near_cache_sessions,
            near_cache_staleness=near_cache_staleness,
        )
        self._saver = Saver(self._store._driver.run, self.save, lambda: self._store._mirror)
        self._lock = threading.RLock()
        # What is known of each object, by its id; an entry goes when its object goes.
        self._records: dict[int, Record] = {}
        # The object of each key, as long as anybody holds it, and those that the manager itself holds.
        self._live: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
        self._held: OrderedDict[str, Session] = OrderedDict()
        watch(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. What is unsaved stays unsaved. Closing again does nothing."""
        self._store.close()

    @property
    def sessions_dir(self) -> NoReturn:
        """Not available: the files belong to the daemon."""
        raise AttributeError(
            "sessions_dir is not available: a daemon owns the session files. list_sessions() finds sessions, "
            "get_or_create() reads one, and `sessionctl export` writes plain JSONL files."
        )

    # -------------------------------------------------------------------------------------- the four methods

    def get_or_create(self, key: str) -> Session:
        """The session of this key, as it is stored; a new one, not stored yet, if there is none.

        While an object of this key is held, by its user or by the manager, the same one is given: brought up
        to date if it has no unsaved changes, untouched if it has. Raises InvalidArgumentError for a malformed
        key, DataLossError if the session is damaged.
        """
        ops.text("key", key, "KEY_INVALID")
        with self._lock:
            session = self._known(key)
        if session is not None:
            record = self._record(session)
            with record.alone() as alone:
                if alone:
                    self._saver.read(session, record)
            return self._keep(session)
        made = Session(key)
        record = Record(key, self._reference(made))
        self._saver.read_first(made, record)
        with self._lock:
            session = self._known(key)
            if session is None:  # else another thread was quicker
                session = self._live[key] = made
                self._records[id(made)] = record
        return self._keep(session)

    def save(self, session: Session) -> None:
        """Store what changed, and take in what others have stored meanwhile. Durable when it returns.

        New messages at the end are appended behind whatever others wrote. Any other change of messages is
        stored only if nobody else changed them; else ConflictError, with the session untouched and the change
        not stored: `invalidate` and `get_or_create` give the stored one, to make the change again. Changed
        members of the metadata are set, others are left. Saving an unchanged session reads what others wrote.

        Raises InvalidArgumentError, which names the index, for a message that is no JSON (nothing is sent),
        and OutcomeUnknownError if no answer came: saving again, or the error's `retry()`, sends the very same
        call first, so nothing is stored twice. StorageFullError, LimitError and DataLossError as every write.
        """
        if not isinstance(session, Session):
            raise ops.invalid("session", f"must be a Session, not {type(session).__name__}")
        record = self._record(session)
        with record.alone() as alone, self._store._driver.begun():
            if not alone:
                raise RuntimeError(
                    f"session {session.key!r} is being saved or read by the very call that this signal "
                    "handler interrupted; save it when that call has returned"
                )
            self._saver.save(session, record)
        self._keep(session)

    def invalidate(self, key: str) -> None:
        """Let go of the session: the next `get_or_create` reads it anew, into another object.

        An object that somebody still has can be saved, as if another process had it.
        """
        ops.text("key", key, "KEY_INVALID")
        with self._lock:
            self._held.pop(key, None)
            self._live.pop(key, None)

    def list_sessions(self) -> list[dict[str, Any]]:
        """All stored sessions, the last updated first.

        Each is a dict of ``key``, ``created_at`` and ``updated_at`` (ISO 8601, naive, local time) and
        ``path`` (``sessionstore://TARGET/KEY``, which is a name and no file).
        """
        target = ",".join(self._store._targets)
        return [
            {
                "key": head.key,
                "created_at": naive(head.create_time).isoformat(),
                "updated_at": naive(head.update_time).isoformat(),
                "path": f"sessionstore://{target}/{head.key}",
            }
            for head in self._store.list(order_by="update_time desc", page_size=1000)
        ]

    # ---------------------------------------------------------------------------------- objects and records

    def _known(self, key: str) -> Session | None:
        """The object of a key; one that was given another key since is not it."""
        session = self._live.get(key)
        return session if session is not None and session.key == key else None

    def _record(self, session: Session) -> Record:
        """What is known of an object: nothing yet of a new one, or of one that got another key."""
        with self._lock:
            record = self._records.get(id(session))
            if record is None or record.key != session.key:
                record = self._records[id(session)] = Record(session.key, self._reference(session))
            return record

    def _reference(self, session: Session) -> weakref.ref[Session]:
        """A reference that takes the record with it when the object goes."""
        records, number = self._records, id(session)

        def gone(reference: weakref.ref[Session]) -> None:
            record = records.get(number)
            if record is not None and record.object is reference:
                del records[number]

        return weakref.ref(session, gone)

    def _keep(self, session: Session) -> Session:
        """Hold an object, as the one of its key, and let go of one that was not used for long."""
        with self._lock:
            self._live[session.key] = self._held[session.key] = session
            self._held.move_to_end(session.key)
            if len(self._held) > HELD_MAX:
                for key in list(islice(self._held, _LOOKED_AT_MAX)):
                    if self._may_go(self._held[key]):
                        del self._held[key]
                        break
                    self._held.move_to_end(key)
        return session

    def _may_go(self, session: Session) -> bool:
        """Whether an object equals what is stored; no, if another thread is at it."""
        record = self._records.get(id(session))
        if record is None or not record.lock.acquire(blocking=False):
            return False
        try:
            return not record.busy and record.known and not is_unsaved(session, record)
        finally:
            record.lock.release()

    def _after_fork_in_child(self) -> None:
        """Locks that other threads of the parent held are held by nobody here."""
        self._lock = threading.RLock()
        for record in list(self._records.values()):
            record.lock, record.busy = threading.RLock(), False


def _target(workspace: Path | str) -> str:
    """Where the daemon is."""
    if isinstance(workspace, Path):
        return find_target(workspace)
    if not isinstance(workspace, str):
        raise ops.invalid("workspace", f"must be a Path or a target, not {type(workspace).__name__}")
    if any("/" in part and not part.strip().startswith("unix:") for part in workspace.split(",")):
        raise ops.invalid("workspace", f"is a target if a string; give a directory as Path({workspace!r})")
    return workspace

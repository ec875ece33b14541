"""Edits: a list that its holder may change at will, and how what became of it is stored. No I/O, no waiting.

The rules:

* What is sent is the smallest single replacement; a list that only grew is an append.
* An edit is stored only if it means the same to the session as to its author. One given to a *function*
  whose last message stayed as it was, such as trimming the front or putting a summary there, does so
  although others append meanwhile: what they appended stands behind it, and nobody's message is lost.
  Without this rule it would hardly ever get its turn beside steady writers: each of its attempts would be
  overtaken. Any other edit, and every edit of a block, is stored only if nobody wrote meanwhile.
* A refused edit keeps its author's list in the error. That somebody removed the session meanwhile is a
  conflict like any other change.
* An exception of the function, or in the block, stores nothing and moves nothing.

Operations here are generators, as in `_operations`; this module must not know who runs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from sessionstore import _operations as ops
from sessionstore._operations import Operation
from sessionstore._snapshot import Snapshot, difference
from sessionstore._types import Message, MessageInput
from sessionstore.errors import ConflictError, NotFoundError, OutcomeUnknownError, error_for
from sessionstore.session import BaseHandle

Handle = TypeVar("Handle", bound=BaseHandle)

# Gets a list that is its own; gives the new list, or None if it changed that one in place.
EditFunction = Callable[[list[Message]], Sequence[MessageInput] | None]


@dataclass(frozen=True, slots=True)
class Draft:
    """The plain list that an edit gives out, and what it was made of."""

    base: Snapshot
    messages: list[Message]


def begin(handle: BaseHandle) -> Draft:
    """A list of the handle's snapshot, for its holder to change."""
    base = handle._snapshot
    return Draft(base, [ops.decode(line) for line in base.lines.since(0)])


def store(
    handle: BaseHandle, draft: Draft, edited: Sequence[MessageInput], *, beside_appends: bool = False
) -> Operation[None]:
    """Store an edited list, if it differs. Raises ConflictError if the session is not what it was made of.

    `beside_appends`: messages that others added at the end do not hinder what left the last message alone.
    """
    base = draft.base
    found = difference(base.lines.since(0), edited)
    if found is None:
        return
    start, delete_count, lines = found
    if start == base.lines.count:
        write: Operation[object] = handle._append(lines, base.revision, None, held=base.held)
    else:
        allow = beside_appends and start + delete_count < base.lines.count
        write = handle._replace(start, delete_count, lines, base.revision, None, allow, held=base.held)
    yield from _kept(base, edited, lambda: write)


def _kept(
    base: Snapshot, edited: Sequence[MessageInput], write: Callable[[], Operation[object]]
) -> Operation[None]:
    """Make an edit's write; a conflict keeps what was edited, also when an unknown write is sent again."""
    try:
        yield from write()
    except ConflictError as error:
        error.edited = edited if isinstance(edited, list) else list(edited)
        raise
    except NotFoundError as error:
        conflict = _removed(base, error)
        conflict.edited = edited if isinstance(edited, list) else list(edited)
        raise conflict from error
    except OutcomeUnknownError as error:
        again = error._operation
        assert again is not None  # every change can be sent again
        error._operation = partial(_kept, base, edited, again)
        raise


def _removed(base: Snapshot, error: NotFoundError) -> ConflictError:
    """The conflict of an edit whose session was removed by somebody else."""
    numbers = {"expected_revision": str(base.revision), "revision": "0", "message_count": "0"}
    text = f"the session was removed since revision {base.revision}: {error}"
    conflict = cast(
        "ConflictError", error_for("REVISION_CONFLICT", text, {"key": base.key, **numbers})
    )
    conflict._operation = lambda: ops.unseen(base.held)
    return conflict


def edit(handle: Handle, function: EditFunction, attempts: int) -> Operation[Handle]:
    """Edit with a function, again after each conflict; gives the handle."""
    if ops.integer("attempts", attempts) < 1:
        raise ops.invalid("attempts", "must be 1 or more")
    return (yield from _edit(handle, function, attempts, None))


def _edit(
    handle: Handle, function: EditFunction, left: int, first: Callable[[], Operation[object]] | None
) -> Operation[Handle]:
    """Make up to `left` attempts; the first one is given if an edit of unknown outcome is sent again."""
    while True:
        try:
            yield from _attempt(handle, function) if first is None else first()
            return handle
        except ConflictError:
            left -= 1
            if not left:
                raise
        except OutcomeUnknownError as error:
            error._operation = partial(_edit, handle, function, left, error._operation)
            raise
        first = None
        yield from handle._refresh()


def _attempt(handle: BaseHandle, function: EditFunction) -> Operation[None]:
    draft = begin(handle)
    made = function(draft.messages)
    edited = draft.messages if made is None else ops.sequence("function", made)
    yield from store(handle, draft, edited, beside_appends=True)

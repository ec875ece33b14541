"""What a save has to send: a plain list of messages against what was stored when it was last seen. Pure.

The rules:

* Messages are compared by their exact encoding: an edit in place is seen, and so are ``True`` for ``1`` and
  another order of names. A message whose stored bytes were written by another encoder is unchanged if its own
  encoding is that of those bytes, read; the bytes then stay.
* Encoding is what a comparison costs. So a run of messages is first looked at without it: the same names in
  the same order, equal texts, the same values of every other type, compared at the speed of C. Only in runs
  that differ messages are encoded, and of these only those that are not the very objects of an unchanged run.
* A list that only grew is an append. Anything else is one replacement, of what lies between the first and the
  last difference.
* A merge never removes what others stored, and never brings back what they removed.

Nothing here reads, writes or waits, or knows of daemons, keys or clocks. A message that cannot be encoded
raises `codec.MessageError` with its index.
"""

import json
import marshal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from sessionstore import codec

Message = dict[str, object]

RUN = 128
"""How many messages are looked at together."""

# Version 2 writes exact types, order and values, and no references: equal bytes are equal values, and the
# reverse. What it gives is only ever compared within a process.
_MARSHAL = 2


class Run:
    """What some messages were when they were stored, in a form that is quick to compare."""

    __slots__ = ("_copies", "_names", "_order", "_values", "_where", "count")

    def __init__(self, messages: Sequence[Message]) -> None:
        self.count = len(messages)
        # Texts and None are equal only to the like; all other values are written down.
        others = [
            (place, name)
            for place, message in enumerate(messages)
            for name, value in message.items()
            if type(value) is not str and value is not None
        ]
        self._where = [place for place, _ in others]
        self._names = [name for _, name in others]
        self._copies = [dict(message) for message in messages]
        self._order = list(chain.from_iterable(messages))
        self._values = self._written(messages)

    def holds(self, messages: Sequence[Message]) -> bool:
        """Whether these messages are what the run's messages were; False also if that cannot be told."""
        try:
            return (
                messages == self._copies
                and list(chain.from_iterable(messages)) == self._order
                and self._values is not None
                and self._written(messages) == self._values
            )
        except (ValueError, TypeError, KeyError, RecursionError):  # values that cannot be compared: not JSON
            return False

    def _written(self, messages: Sequence[Message]) -> bytes | None:
        """The values that are neither text nor None; None if one is of a type that JSON does not give."""
        holders = map(messages.__getitem__, self._where)
        try:
            return marshal.dumps(list(map(dict.__getitem__, holders, self._names)), _MARSHAL)
        except (ValueError, TypeError):
            return None


@dataclass(slots=True)
class Baseline:
    """What is known to be stored: a revision, and own appends after it that others' may lie between."""

    revision: int = 0
    """0 if there is no such session."""
    lines: list[bytes] = field(default_factory=list)
    """What the list is expected to hold, as stored; equal to what is stored if nothing is unmerged."""
    merged: int = 0
    """How many of the lines are those of `revision`; the others are own appends after it."""
    behind: bool = False
    """Whether others are known to have written since `revision`."""
    members: dict[str, str] = field(default_factory=dict)
    """The metadata: name -> JSON text."""
    last_consolidated: int = 0
    _runs: list[Run] = field(default_factory=list)
    _objects: list[Message] = field(default_factory=list)
    _changed_from: int = 0
    """The first index at which the lines differ from what the runs were made of."""

    def watch(self, messages: Sequence[Message]) -> None:
        """Remember the messages that these lines are of, so that unchanged ones need no encoding.

        There may be more messages than lines; the others are not stored yet.
        """
        self._objects = list(messages[: len(self.lines)])
        if self._changed_from == sum(run.count for run in self._runs) == len(self.lines):
            return
        first = self._changed_from // RUN
        del self._runs[first:]
        for start in range(first * RUN, len(self._objects), RUN):
            self._runs.append(Run(self._objects[start : start + RUN]))
        self._changed_from = len(self.lines)

    def applied(
        self, step: "Step", *, revision: int, previous_revision: int, last_consolidated: int
    ) -> None:
        """Take an acknowledged step into account; the numbers are those of its answer."""
        in_step = previous_revision == self.revision and not self.behind
        match step:
            case Create():
                self._change(0, len(self.lines), step.lines)
                self.members = dict(step.members)
            case Append():
                self._change(len(self.lines), 0, step.lines)
            case Replace():
                self._change(step.start, step.delete_count, step.lines)
            case Update():
                members = {**self.members, **step.members}
                self.members = {name: text for name, text in members.items() if text is not None}
                if step.last_consolidated is not None:
                    self.last_consolidated = step.last_consolidated
        if in_step:
            self.revision, self.merged = revision, len(self.lines)
            self.last_consolidated = last_consolidated
        self.behind = not in_step

    def read(self, revision: int, stored: "Local") -> None:
        """Take what was read: all that is stored, of one revision; 0 if there is nothing."""
        start, stop, new_stop = changed_range(self.lines, stored.lines)
        self._change(start, stop - start, stored.lines[start:new_stop])
        self.revision, self.merged, self.behind = revision, len(self.lines), False
        self.members, self.last_consolidated = dict(stored.members), stored.last_consolidated

    def _change(self, start: int, delete_count: int, lines: Sequence[bytes]) -> None:
        if delete_count or lines:
            self.lines[start : start + delete_count] = lines
            self._changed_from = min(self._changed_from, start)

    def lines_of(self, messages: Sequence[Message]) -> list[bytes]:
        """The lines of a list: those of the baseline, the same objects, wherever a message is unchanged."""
        if self._changed_from < len(self._objects):  # a save ended half-way: the runs are of other lines
            return [_line(message, index, self._at(index)) for index, message in enumerate(messages)]
        lines: list[bytes] = []
        moved: _Moved | None = None
        for number, start in enumerate(range(0, len(messages), RUN)):
            part = messages[start : start + RUN]
            run = self._runs[number] if number < len(self._runs) else None
            if run is not None and run.holds(part[: run.count]):
                new = enumerate(part[run.count :], start + run.count)
                lines += self.lines[start : start + run.count]
                lines += [_line(message, index) for index, message in new]
            else:
                moved = moved or _Moved(self)
                lines += [moved.line(message, index) for index, message in enumerate(part, start)]
        return lines

    def _at(self, index: int) -> bytes | None:
        return self.lines[index] if index < len(self.lines) else None


class _Moved:
    """Lines of messages that may not be where they were: of known objects in unchanged runs, else encoded."""

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline
        self._index = {id(message): index for index, message in enumerate(baseline._objects)}
        self._held: dict[int, bool] = {}

    def line(self, message: Message, index: int) -> bytes:
        baseline = self._baseline
        known = self._index.get(id(message))
        if known is None:
            return _line(message, index, baseline._at(index))
        if self._holds(known // RUN):
            return baseline.lines[known]
        return _line(message, index, baseline.lines[known])

    def _holds(self, number: int) -> bool:
        if number not in self._held:
            start = number * RUN
            run = self._baseline._runs[number]
            self._held[number] = run.holds(self._baseline._objects[start : start + RUN])
        return self._held[number]


def _line(message: Message, index: int, known: bytes | None = None) -> bytes:
    """A message's line; the known one if that is what it says."""
    try:
        line = codec.encode(message, index)
    except codec.MessageError:
        says = _says(message)
        if known is None or says is None or says != _says(codec.decode(known)):
            raise
        return known  # a file from elsewhere held what is not taken, such as NaN; it stays as it is
    if known is None or line == known or line != _encoded(known):
        return line
    return known


def _encoded(line: bytes) -> bytes | None:
    """The line as this encoder writes it; None if it cannot."""
    try:
        return codec.encode(codec.decode(line))
    except codec.MessageError:
        return None


def _says(message: object) -> str | None:
    """A text that tells messages apart, also those that cannot be stored; None for what is no JSON at all."""
    try:
        text = json.dumps(message)
        return text if isinstance(message, dict) and codec.names_are_strings(message) else None
    except (TypeError, ValueError, RecursionError):
        return None


# --------------------------------------------------------------------------------------------- what to send


@dataclass(frozen=True, slots=True)
class Local:
    """What a save begins with: the session as its holder left it."""

    lines: list[bytes]
    members: dict[str, str]
    last_consolidated: int


@dataclass(frozen=True, slots=True)
class Create:
    """Make the session, with these."""

    lines: Sequence[bytes]
    members: Mapping[str, str]
    last_consolidated: int


@dataclass(frozen=True, slots=True)
class Append:
    """Add these lines, whatever others wrote."""

    start: int
    """Where they stand in the holder's list."""
    lines: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Replace:
    """Put these lines in the place of `delete_count` from `start` on, if nobody else wrote."""

    start: int
    delete_count: int
    lines: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Update:
    """Set these members (None removes one) whatever others wrote; `last_consolidated` only if nobody did."""

    members: Mapping[str, str | None]
    last_consolidated: int | None


Step = Create | Append | Replace | Update


def next_step(baseline: Baseline, local: Local, limits: codec.Limits = codec.DEFAULT_LIMITS) -> Step | None:
    """The next thing to send; None if what is stored is what the holder has.

    ``limits`` bound one batch; more messages are appended in several.
    """
    if not baseline.revision:
        lines = _batch(local.lines, limits)
        return Create(lines, local.members, min(local.last_consolidated, len(lines)))
    start, stop, new_stop = changed_range(baseline.lines, local.lines)
    if start == len(baseline.lines) < len(local.lines):
        return Append(start, _batch(local.lines[start:], limits))
    if start < stop or start < new_stop:
        return Replace(start, stop - start, local.lines[start:new_stop])
    members = {
        name: local.members.get(name)
        for name in {**local.members, **baseline.members}
        if local.members.get(name) != baseline.members.get(name)
    }
    consolidated = local.last_consolidated
    if members or consolidated != baseline.last_consolidated:
        return Update(members, consolidated if consolidated != baseline.last_consolidated else None)
    return None


def changed_range(old: Sequence[bytes], new: Sequence[bytes]) -> tuple[int, int, int]:
    """Where two lists differ: old[start:stop] became new[start:new_stop]; nothing, at the end, if equal."""
    shorter = min(len(old), len(new))
    if new[:shorter] == old[:shorter]:
        return shorter, len(old), len(new)
    start = next(index for index in range(shorter) if old[index] != new[index])
    most = shorter - start
    same_end = next((count for count in range(most) if old[-1 - count] != new[-1 - count]), most)
    return start, len(old) - same_end, len(new) - same_end


def _batch(lines: Sequence[bytes], limits: codec.Limits) -> Sequence[bytes]:
    """As many of the first lines as one call takes; at least one."""
    size_bytes = 0
    for count, line in enumerate(lines[: limits.batch_messages_max]):
        size_bytes += len(line) + 1
        if size_bytes > limits.batch_bytes_max:
            return lines[: max(1, count)]
    return lines[: limits.batch_messages_max]


# ----------------------------------------------------------------------------------- what others have stored


def merge(baseline: Baseline, local: Local, stored: Local) -> Local | None:
    """The holder's session with what others stored; None if both changed messages that were there before.

    Messages: the stored ones, then those that the holder has added and not yet sent. Metadata, by member:
    the holder's if they changed it, else the stored one. `last_consolidated`: the holder's if they changed
    it, but never beyond a message that they have not seen, and the lower of both if others rewrote messages.
    """
    sent = len(baseline.lines)
    if stored.lines == baseline.lines or stored.lines == local.lines:
        lines = local.lines
    elif local.lines[:sent] == baseline.lines:
        lines = stored.lines + local.lines[sent:]
    else:
        return None
    members = dict(stored.members)
    for name in [*local.members, *baseline.members]:
        if local.members.get(name) != baseline.members.get(name):
            members.pop(name, None)
            if name in local.members:
                members[name] = local.members[name]
    return Local(lines, members, _consolidated(baseline, local, stored))


def _consolidated(baseline: Baseline, local: Local, stored: Local) -> int:
    if local.last_consolidated == baseline.last_consolidated:
        return stored.last_consolidated
    if stored.lines in (baseline.lines, local.lines):
        return local.last_consolidated
    if stored.lines[: baseline.merged] != baseline.lines[: baseline.merged]:
        return min(local.last_consolidated, stored.last_consolidated)
    seen, _, _ = changed_range(baseline.lines, stored.lines)
    return min(local.last_consolidated, seen)

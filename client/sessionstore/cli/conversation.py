"""A conversation as rows of text that a person can read. Pure: messages in, rows out; no terminal, no I/O.

The rules:

* Any list of JSON objects can be shown, whatever their shapes. What is in no known shape is shown as the
  beginning of its JSON.
* Both dialects of tool calls are known: ``tool_calls`` with messages of role ``tool``, and ``tool_use`` with
  ``tool_result`` blocks.
* A row never holds a control character: what a tool or a user wrote must not steer a terminal, nor turn text
  around. `printable` shows them as escapes.
* What was said is shown whole; the bytes of images, and members that say nothing to a reader, are not.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sessionstore._types import Head

Kind = Literal[
    "title", "note", "damage", "user", "assistant", "system", "tool", "other", "text", "call", "result"
]
"""What a row is, for whoever gives it a colour."""

_ROLES: dict[str, Kind] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
_INDENT = 4
_UNKNOWN_CHARS_MAX = 300

# Control characters, halves of surrogate pairs, and what turns the direction of text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of output, without its line end, to be indented by so many spaces."""

    kind: Kind
    text: str = ""
    indent: int = 0


def printable(text: str) -> str:
    """The text without control characters except line feeds and tabs; others are shown as escapes."""
    return _UNPRINTABLE.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def local_time(moment: datetime) -> str:
    """A time as a person at this machine reads it."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def rows(head: Head, start: int, messages: Sequence[Mapping[str, object]]) -> Iterator[Row]:
    """A session: its head, then its messages, of which the first has the index ``start``."""
    yield from _head_rows(head)
    if start:
        yield Row("note", f"(messages 0 to {start - 1} are not shown)")
    for index, message in enumerate(messages, start):
        if index == head.last_consolidated and index:
            yield Row("note", f"(above: consolidated, last_consolidated {index})")
        yield Row("text")
        yield from _message_rows(index, message)
    if head.last_consolidated == head.message_count > 0:
        yield Row("note", f"(above: consolidated, last_consolidated {head.message_count})")


def _head_rows(head: Head) -> Iterator[Row]:
    plural = "" if head.message_count == 1 else "s"
    yield Row("title", printable(head.key))
    yield Row(
        "note",
        f"{head.message_count} message{plural}, revision {head.revision}, "
        f"created {local_time(head.create_time)}, updated {local_time(head.update_time)}",
    )
    if head.expire_time:
        yield Row("note", f"expires {local_time(head.expire_time)}")
    if head.metadata:
        yield Row("note", f"metadata {_json(head.metadata)}")
    if head.damage:
        yield Row("damage", f"damaged: {printable(head.damage)}")


def _message_rows(index: int, message: Mapping[str, object]) -> Iterator[Row]:
    role = message.get("role")
    if not isinstance(role, str):
        yield Row("other", f"#{index} (no role)")
        yield from _text_rows(_clipped(message))
        return
    parts = [f"#{index} {role}"]
    parts += [value for name in ("name", "tool_call_id") if isinstance(value := message.get(name), str)]
    parts += [_timestamp(message)] if "timestamp" in message else []
    yield Row(_ROLES.get(role, "other"), _one_line("  ".join(parts)))
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        yield from _text_rows(reasoning, "note")
    yield from _content_rows(message.get("content"), "result" if role == "tool" else "text")
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        yield _call_row(call)


def _timestamp(message: Mapping[str, object]) -> str:
    """The time of a message to the second, if it is one; else as it is."""
    value = message["timestamp"]
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M:%S")
        except ValueError:
            return value
    return _json(value)


def _content_rows(content: object, kind: Kind) -> Iterator[Row]:
    if isinstance(content, str):
        yield from _text_rows(content, kind)
    elif isinstance(content, list):
        for block in content:
            yield from _block_rows(block, kind)
    elif content is not None:
        yield from _text_rows(_clipped(content), kind)


def _block_rows(block: object, kind: Kind) -> Iterator[Row]:
    known = block if isinstance(block, dict) else {}
    sort = known.get("type")
    if isinstance(block, str):
        yield from _text_rows(block, kind)
    elif isinstance(text := known.get("text"), str):
        yield from _text_rows(text, kind)
    elif isinstance(text := known.get("thinking"), str):
        yield from _text_rows(text, "note")
    elif sort == "tool_use":
        yield Row("call", _call(known.get("name"), known.get("input"), known.get("id")), _INDENT)
    elif sort == "tool_result":
        failed = " failed" if known.get("is_error") else ""
        yield Row("tool", _one_line(f"<-{failed} {known.get('tool_use_id', '')}"), _INDENT)
        yield from _content_rows(known.get("content"), "result")
    elif isinstance(sort, str) and "image" in sort:
        yield Row("note", _one_line(f"({sort}, {len(_json(block)):,} characters)"), _INDENT)
    else:
        yield from _text_rows(_clipped(block), kind)


def _call_row(call: object) -> Row:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        return Row("call", f"-> {_clipped(call)}", _INDENT)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # A model may write something else than JSON: that is shown as it is.
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return Row("call", _call(function.get("name"), arguments, call.get("id")), _INDENT)


def _call(name: object, arguments: object, identity: object) -> str:
    if isinstance(arguments, dict):
        given = ", ".join(f"{key}={_json(value)}" for key, value in arguments.items())
    else:
        given = "" if arguments is None else _json(arguments)
    marks = f"  {identity}" if isinstance(identity, str) else ""
    return _one_line(f"-> {name if isinstance(name, str) else '(no name)'}({given}){marks}")


def _text_rows(text: str, kind: Kind = "text") -> Iterator[Row]:
    return _rows_of(printable(text).split("\n") if text else (), kind)


def _rows_of(lines: Iterable[str], kind: Kind) -> Iterator[Row]:
    return (Row(kind, line, _INDENT) for line in lines)


def _one_line(text: str) -> str:
    return printable(text.replace("\r\n", "\n").replace("\n", "\\n"))


def _json(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def _clipped(value: object) -> str:
    text = _json(value)
    if len(text) <= _UNKNOWN_CHARS_MAX:
        return text
    return f"{text[:_UNKNOWN_CHARS_MAX]}... ({len(text):,} characters)"

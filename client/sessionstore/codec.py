"""Bytes <-> messages: the one place that knows how a message is written.

A message is one JSON object, carried as its UTF-8 bytes and never typed anew. A block is JSONL: each
message on a line of its own, each line ended by a line feed. What is on the wire is what is in the file.

The rules:

* What is taken comes back byte for byte, so nothing is repaired here. A line begins with ``{`` and ends
  with ``}``: white space around the object, a byte order mark, a blank line or a carriage return anywhere
  is refused, because a reader that strips lines or knows three kinds of line ends would see other bytes, or
  other lines.
* What is taken can be read back by Python's ``json`` and by any strict reader: UTF-8, no NaN, no number
  beyond a double's range, no half surrogate pair, no integer of more than 4,300 digits, no nesting beyond
  the limit.
* What is taken can never be mistaken for a header line (``"_type": "metadata"``), whichever of two equal
  names a reader believes, and however the name is escaped.
* Reading is more liberal than taking: ``decode`` accepts what files from elsewhere may hold, such as NaN.

This module is pure. It must not know of grpc, sessions, files or clocks. It turns a refusal into a
``MessageError`` whose reason and metadata are those of the contract's ``ErrorReason``.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite

# A detail travels in an ErrorInfo of at most 4 KiB.
_DETAIL_CHARS_MAX = 200


class MessageError(ValueError):
    """A message, or a batch of them, that the store does not take. Sending the same again does not help.

    ``reason`` is the name of an ``ErrorReason`` without its prefix, ``index`` the position in the batch (-1
    if it concerns the whole batch, or an object in no batch), ``metadata`` what ``errors.proto`` promises
    for the reason. ``str()`` says what is wrong, where, and what to do.
    """

    def __init__(self, reason: str, index: int, text: str, metadata: dict[str, str]) -> None:
        super().__init__(reason, index, text, metadata)
        self.reason = reason
        self.index = index
        self.metadata = metadata
        self._text = text

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one message and one batch. The defaults are those of the contract."""

    message_bytes_max: int = 8 << 20
    message_depth_max: int = 200
    batch_messages_max: int = 10_000
    batch_bytes_max: int = 16 << 20


DEFAULT_LIMITS = Limits()


# ----------------------------------------------------------------------------------------- messages -> bytes


def encode(message: Mapping[str, object], index: int = 0) -> bytes:
    """Write one message as JSON in UTF-8, without a line end.

    ``index`` is the position in the batch that an error shall name. Tuples become lists; every other value
    comes back equal and in order. Names must be strings at every depth: ``json`` would turn ``1`` into
    ``"1"`` without a word. Sizes and depth are checked by the daemon, which knows its limits. Raises
    ``MessageError``.
    """
    if not isinstance(message, Mapping):
        raise _not_object(index, type(message).__name__)
    plain = message if isinstance(message, dict) else dict(message)
    try:
        text = _ENCODER.encode(plain)
    except RecursionError:
        raise _too_deep(index, DEFAULT_LIMITS.message_depth_max) from None
    except TypeError as error:
        raise _not_json(index, str(error)) from None
    except ValueError as error:
        raise _unwritable(plain, index, error) from None
    _check_names(plain, index)
    if plain.get("_type") == "metadata":
        raise _reserved(index)
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _lone_surrogate(index) from None


def encode_block(messages: Iterable[Mapping[str, object]]) -> bytes:
    """Write messages as a block. Raises ``MessageError`` with the index of the first that is wrong."""
    return join([encode(message, index) for index, message in enumerate(messages)])


def join(lines: Iterable[bytes]) -> bytes:
    r"""Make a block of encoded messages: each ended by ``\n``; no messages make an empty block."""
    return b"\n".join([*lines, b""])


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_LENIENT_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=True)


def _unwritable(message: dict[str, object], index: int, error: ValueError) -> MessageError:
    """Tell NaN from a circle and from an integer that is too long, without trusting the error's words."""
    try:
        _LENIENT_ENCODER.encode(message)
    except ValueError:
        return _not_json(index, str(error))
    return _not_finite(index)


def names_are_strings(message: Mapping[str, object]) -> bool:
    """Whether all names are strings, at every depth; ``json`` writes ``1`` as it writes ``"1"``.

    The message must hold no circle: write it as JSON before.
    """
    try:
        _check_names(message, 0)
    except MessageError:
        return False
    return True


def _check_names(message: Mapping[str, object], index: int) -> None:
    """Refuse names that are not strings. The message was written already, so it holds no circle."""
    waiting: list[Mapping[str, object] | list[object] | tuple[object, ...]] = [message]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for name, value in node.items():
                if not isinstance(name, str):
                    raise _not_json(index, f"a name must be a string, not {type(name).__name__}: {name!r}")
                if isinstance(value, _CONTAINERS):
                    waiting.append(value)
        else:
            waiting.extend([value for value in node if isinstance(value, _CONTAINERS)])


_CONTAINERS = (dict, list, tuple)


# ----------------------------------------------------------------------------------------- bytes -> messages


def decode(line: bytes) -> dict[str, object]:
    """Read one message, with or without its line end. Raises ``MessageError`` if it is no JSON object."""
    return _decode(line, 0)


def decode_block(block: bytes) -> list[dict[str, object]]:
    r"""Read a block. The last line may lack its ``\n``. Raises as ``decode`` does, with the line's index."""
    return [_decode(line, index) for index, line in enumerate(_lines(block))]


def _decode(line: bytes, index: int) -> dict[str, object]:
    try:
        value = _READER.decode(line.decode())
    except RecursionError:
        raise _too_deep(index, DEFAULT_LIMITS.message_depth_max) from None
    except ValueError as error:
        raise _not_json(index, _what_is_wrong(line, error)) from None
    if not isinstance(value, dict):
        raise _not_object(index, _json_name(value))
    return value


def _lines(block: bytes) -> list[bytes]:
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


_READER = json.JSONDecoder()


# -------------------------------------------------------------------- bytes from anybody -> bytes to be kept


def split_block(block: bytes, limits: Limits = DEFAULT_LIMITS) -> list[bytes]:
    r"""Check a block that came from anybody and give each message's bytes, unchanged, without the line end.

    The last line may lack its ``\n``; an empty block gives no messages. All or nothing: raises
    ``MessageError`` for the batch (``BATCH_TOO_MANY``, ``BATCH_TOO_LARGE``), else for the first message that
    breaks a rule.
    """
    if len(block) > limits.batch_bytes_max:
        raise _batch_too_large(len(block), limits.batch_bytes_max)
    count = block.count(b"\n") + (block[-1:] not in (b"\n", b""))
    if count > limits.batch_messages_max:
        raise _batch_too_many(count, limits.batch_messages_max)
    lines = _lines(block)
    for index, line in enumerate(lines):
        text = _check(line, index, limits)
        if (b'"_type"' in line or _ESCAPED_LETTER.search(line)) and _is_header(text):
            raise _reserved(index)
    return lines


def check_object(text: bytes, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Check a JSON object that is no message, such as a session's metadata, and give its bytes unchanged.

    It must be fit for a line of a JSONL file: the rules are those of a message, except that ``_type`` may say
    anything. Raises ``MessageError`` with index -1.
    """
    if b"\n" in text:
        raise _not_json(-1, "a line feed between values; write the object on one line")
    _check(text, -1, limits)
    return text


def _check(line: bytes, index: int, limits: Limits) -> str:
    """Refuse a line that breaks a rule for every object; give its text."""
    if len(line) > limits.message_bytes_max:
        raise _too_large(index, len(line), limits.message_bytes_max)
    if b"\r" in line:
        raise _not_json(index, "a carriage return, which some readers take for the end of a line")
    depth_max = limits.message_depth_max
    # Counting is a hundred times cheaper than measuring, and enough for nearly every message.
    if line.count(b"{") + line.count(b"[") > depth_max and _depth(line) > depth_max:
        raise _too_deep(index, depth_max)
    try:
        text = line.decode()
        value, end = _STRICT.raw_decode(text)
    except _NotFiniteError:
        raise _not_finite(index) from None
    except RecursionError:
        raise _too_deep(index, depth_max) from None
    except ValueError as error:
        raise _not_json(index, _what_is_wrong(line, error)) from None
    if end != len(text):
        raise _not_json(index, f"something follows the value, at character {end}")
    if not isinstance(value, dict):
        raise _not_object(index, _json_name(value))
    if _ESCAPED_SURROGATE.search(line) and _LONE_SURROGATE.search(line.replace(b"\\\\", b"__")):
        raise _lone_surrogate(index)
    return text


def _depth(line: bytes) -> int:
    """Measure how deep a text nests, without recursion; in broken JSON, at least as deep as a parser gets."""
    # Without escaped backslashes and quotes, every second part between quotes lies outside of strings.
    outside = b"".join(line.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    steps = memoryview(outside.translate(_STEPS, _NOT_BRACKETS)).cast("b")
    return max(accumulate(steps), default=0)


# An opening bracket is a step of +1; a closing one is the byte 0xff, which is -1 as a signed byte.
_STEPS = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{[}]")


class _NotFiniteError(ValueError):
    """A number that no double holds."""


def _constant(name: str) -> float:
    raise _NotFiniteError(name)


def _number(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise _NotFiniteError(text[:40])
    return number


_STRICT = json.JSONDecoder(parse_float=_number, parse_constant=_constant)

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A high half that no low half follows, or a low half that no high half precedes. For texts that are known
# to be JSON, with escaped backslashes taken out, so that every backslash left begins an escape.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]",
    re.DOTALL,
)
# The letters of _type, each of which may be written as an escape: U+005F, U+0065, U+0070, U+0074, U+0079.
_ESCAPED_LETTER = re.compile(rb"\\u00[567]")


def _is_header(text: str) -> bool:
    """Tell whether a reader could take the object for a header, whichever of two equal names it believes."""
    pairs = _PAIRS.decode(text)
    return any(name == "_type" and value == "metadata" for name, value in pairs)


def _as_pairs(pairs: list[tuple[str, object]]) -> list[tuple[str, object]]:
    return pairs


_PAIRS = json.JSONDecoder(object_pairs_hook=_as_pairs)


def _what_is_wrong(line: bytes, error: ValueError) -> str:
    if not line:
        return "a blank line"
    if line[:1] in (b" ", b"\t"):
        return "white space before the value"
    if isinstance(error, json.JSONDecodeError):  # its own text counts lines, and this is one line
        return f"{error.msg}, at character {error.pos}"
    return str(error)


# -------------------------------------------------------------------------------------------------- refusals


def _json_name(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _where(index: int) -> str:
    return f"message {index}" if index >= 0 else "the object"


def _not_json(index: int, detail: str) -> MessageError:
    detail = detail[:_DETAIL_CHARS_MAX]
    text = f"{_where(index)} cannot be kept as JSON: {detail}. Send one JSON object per line, in UTF-8."
    return MessageError("MESSAGE_NOT_JSON", index, text, {"index": str(index), "detail": detail})


def _not_object(index: int, kind: str) -> MessageError:
    text = f'{_where(index)} must be a JSON object, not {kind}. Wrap it, such as in {{"content": ...}}.'
    return MessageError("MESSAGE_NOT_OBJECT", index, text, {"index": str(index)})


def _not_finite(index: int) -> MessageError:
    text = f"{_where(index)} holds NaN, Infinity or a number beyond a double's range. Send null or a string."
    return MessageError("MESSAGE_NOT_FINITE", index, text, {"index": str(index)})


def _lone_surrogate(index: int) -> MessageError:
    text = (
        f"{_where(index)} holds half of a surrogate pair, which UTF-8 cannot encode. Cut texts between "
        "characters, or replace it with U+FFFD."
    )
    return MessageError("MESSAGE_LONE_SURROGATE", index, text, {"index": str(index)})


def _reserved(index: int) -> MessageError:
    text = f'{_where(index)} has "_type": "metadata", which marks header lines. Use another name or value.'
    return MessageError("MESSAGE_RESERVED_TYPE", index, text, {"index": str(index)})


def _too_large(index: int, size_bytes: int, limit_bytes: int) -> MessageError:
    text = f"{_where(index)} has {size_bytes} bytes; the limit is {limit_bytes}. Keep large parts elsewhere."
    metadata = {"index": str(index), "size_bytes": str(size_bytes), "limit_bytes": str(limit_bytes)}
    return MessageError("MESSAGE_TOO_LARGE", index, text, metadata)


def _too_deep(index: int, limit: int) -> MessageError:
    text = f"{_where(index)} nests deeper than {limit} arrays and objects. Send inner parts as strings."
    return MessageError("MESSAGE_TOO_DEEP", index, text, {"index": str(index), "limit": str(limit)})


def _batch_too_many(count: int, limit: int) -> MessageError:
    text = f"the batch holds {count} messages; the limit is {limit}. Send it in parts."
    return MessageError("BATCH_TOO_MANY", -1, text, {"count": str(count), "limit": str(limit)})


def _batch_too_large(size_bytes: int, limit_bytes: int) -> MessageError:
    text = f"the batch has {size_bytes} bytes; the limit is {limit_bytes}. Send it in parts."
    metadata = {"size_bytes": str(size_bytes), "limit_bytes": str(limit_bytes)}
    return MessageError("BATCH_TOO_LARGE", -1, text, metadata)

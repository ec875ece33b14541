"""The codec: what is taken comes back equal, and everything that could not is refused with its own reason."""

import copy
import json
import pickle
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessionstore import codec
from sessionstore.codec import DEFAULT_LIMITS, Limits, MessageError
from sessionstore.v1 import errors_pb2

# Text without surrogates, with 4-byte characters; integers beyond a double; floats that are numbers.
text = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
messages = st.dictionaries(text | st.sampled_from(["role", "content", "_type"]), values, max_size=6).filter(
    lambda message: message.get("_type") != "metadata"
)


def exact(value: object) -> str:
    """Tell values apart that == does not: order of names, 1 and 1.0 and True, 0.0 and -0.0."""
    return repr(value)


def refused(block: bytes, limits: Limits = DEFAULT_LIMITS) -> MessageError:
    with pytest.raises(MessageError) as caught:
        codec.split_block(block, limits)
    return caught.value


# ---------------------------------------------------------------------------------------------- round trips


@given(st.lists(messages, max_size=5))
def test_messages_come_back_equal_in_value_type_and_order(batch: list[dict[str, object]]) -> None:
    block = codec.encode_block(batch)
    lines = codec.split_block(block)
    assert exact(codec.decode_block(block)) == exact(batch)
    assert exact([codec.decode(line) for line in lines]) == exact(batch)
    assert codec.join(lines) == block
    assert lines == [codec.encode(message) for message in batch]


@given(st.lists(messages, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_bytes_of_another_writer_come_back_equal(
    batch: list[dict[str, object]], ascii_only: bool, compact: bool
) -> None:
    separators = (",", ":") if compact else (" , ", " :\t")
    encoder = json.JSONEncoder(ensure_ascii=ascii_only, separators=separators)
    lines = [encoder.encode(message).encode() for message in batch]
    block = b"\n".join(lines)
    assert codec.split_block(block) == lines
    assert codec.split_block(block + b"\n") == lines
    assert exact(codec.decode_block(block)) == exact(batch)


nearly_json = st.text('{}[]":,\\ud8c0_type metan1eEf.-\r\n\t 😀', max_size=60).map(str.encode)


@given(st.binary(max_size=40) | nearly_json)
def test_arbitrary_bytes_are_refused_or_come_back_equal(block: bytes) -> None:
    try:
        lines = codec.split_block(block)
    except MessageError:  # any other exception fails the test
        return
    assert codec.join(lines).removesuffix(b"\n") == block.removesuffix(b"\n")
    for line in lines:
        assert line == line.strip()
        assert codec.encode(codec.decode(line))


def test_the_files_keep_the_form_that_people_grep_for() -> None:
    message = {"role": "user", "content": "ключ \U0001f680\n"}
    assert codec.encode(message) == '{"role": "user", "content": "ключ \U0001f680\\n"}'.encode()


def test_empty_blocks() -> None:
    assert codec.encode_block([]) == codec.join([]) == b""
    assert codec.split_block(b"") == []
    assert codec.decode_block(b"") == []


def test_unusual_forms_are_kept_as_they_are() -> None:
    lines = [
        b'{"n": 9007199254740993, "e": 1E5, "z": -0.0, "deep": 0.1000, "big": 1e308}',
        b'{"a" : 1 ,"a":2}',
        b'{"nul": "\\u0000", "pair": "\\ud83d\\uDE00", "text": "\\\\ud800", "slash": "\\/"}',
        '{"sep": "\u2028\u0085\ufeff"}'.encode(),
        b"{}",
    ]
    assert codec.split_block(b"\n".join(lines)) == lines
    assert codec.decode(lines[0])["n"] == 2**53 + 1


# --------------------------------------------------------------------------------------------------- encode


def test_mappings_and_tuples_are_taken() -> None:
    assert codec.encode(MappingProxyType({"a": (1, {"b": ()})})) == b'{"a": [1, {"b": []}]}'


class Unhelpful(Mapping[str, object]):
    """A mapping that json cannot write inside of a message."""

    def __getitem__(self, name: str) -> object:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def circle() -> dict[str, object]:
    message: dict[str, object] = {}
    message["self"] = message
    return message


def nested(depth: int) -> dict[str, object]:
    message: dict[str, object] = {}
    for _ in range(depth - 1):
        message = {"a": message}
    return message


@pytest.mark.parametrize(
    ("message", "reason", "part"),
    [
        ([], "MESSAGE_NOT_OBJECT", "list"),
        ("text", "MESSAGE_NOT_OBJECT", "str"),
        ({"a": float("nan")}, "MESSAGE_NOT_FINITE", "NaN"),
        ({"a": [float("-inf")]}, "MESSAGE_NOT_FINITE", "NaN"),
        ({"a": "\ud800"}, "MESSAGE_LONE_SURROGATE", "surrogate"),
        ({"\udc00": 1}, "MESSAGE_LONE_SURROGATE", "surrogate"),
        ({"a": {1, 2}}, "MESSAGE_NOT_JSON", "set"),
        ({"a": b"x"}, "MESSAGE_NOT_JSON", "bytes"),
        ({"a": Unhelpful()}, "MESSAGE_NOT_JSON", "Unhelpful"),
        ({"a": 10**5000}, "MESSAGE_NOT_JSON", "digits"),
        ({"a": [{"b": ({1: 2},)}]}, "MESSAGE_NOT_JSON", "not int: 1"),
        ({None: 1}, "MESSAGE_NOT_JSON", "NoneType"),
        ({(1, 2): 1}, "MESSAGE_NOT_JSON", "tuple"),
        ({"_type": "metadata"}, "MESSAGE_RESERVED_TYPE", "header"),
        (circle(), "MESSAGE_NOT_JSON", "Circular"),
        (nested(100_000), "MESSAGE_TOO_DEEP", "nests"),
    ],
)
def test_encode_refuses(message: object, reason: str, part: str) -> None:
    with pytest.raises(MessageError, match=part) as caught:
        codec.encode(message, 7)  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.index, caught.value.metadata["index"]) == (reason, 7, "7")


def test_encode_block_names_the_index() -> None:
    with pytest.raises(MessageError) as caught:
        codec.encode_block([{}, {}, {"a": float("inf")}])
    assert caught.value.index == 2


def test_reserved_type_is_reserved_at_the_top_with_that_value_only() -> None:
    others: list[dict[str, object]] = [
        {"_type": "other"},
        {"_type": ["metadata"]},
        {"a": {"_type": "metadata"}},
        {"type": "metadata"},
    ]
    for message in others:
        assert codec.split_block(codec.encode(message)) == [codec.encode(message)]


# --------------------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"{", b'{"a": 1}}', b"\xff", b'{"a": "\xc0\xaf"}', b"\xef\xbb\xbf{}", b"{\x00}"],
)
def test_decode_refuses_what_is_not_json(line: bytes) -> None:
    with pytest.raises(MessageError, match="JSON") as caught:
        codec.decode(line)
    assert caught.value.reason == "MESSAGE_NOT_JSON"


def test_decode_does_not_guess_another_encoding() -> None:
    with pytest.raises(MessageError):
        codec.decode('{"a": 1}'.encode("utf-16-le"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b"[]", "an array"),
        (b'""', "a string"),
        (b"true", "a boolean"),
        (b"null", "null"),
        (b"1", "a number"),
        (b"1.5", "a number"),
    ],
)
def test_only_objects_are_messages(line: bytes, name: str) -> None:
    with pytest.raises(MessageError, match=f"not {name}") as caught:
        codec.decode(line)
    assert caught.value.reason == "MESSAGE_NOT_OBJECT"
    assert (refused(b"{}\n" + line).reason, refused(b"{}\n" + line).index) == ("MESSAGE_NOT_OBJECT", 1)


def test_decode_never_lets_a_recursion_error_out() -> None:
    with pytest.raises(MessageError) as caught:
        codec.decode(b'{"a":' * 100_000)
    assert caught.value.reason == "MESSAGE_TOO_DEEP"


def test_decode_reads_what_files_from_elsewhere_hold() -> None:
    assert codec.decode(b' {"a": Infinity, "b": "\\ud800"}\r\n') == {"a": float("inf"), "b": "\ud800"}


def test_decode_block_names_the_line() -> None:
    with pytest.raises(MessageError) as caught:
        codec.decode_block(b'{"a": 1}\n{"a":\n')
    assert (caught.value.reason, caught.value.index) == ("MESSAGE_NOT_JSON", 1)
    with pytest.raises(MessageError, match="blank"):
        codec.decode_block(b"{}\n\n{}\n")


# ---------------------------------------------------------------------------------------------- split_block

NOT_JSON = "MESSAGE_NOT_JSON"
NOT_FINITE = "MESSAGE_NOT_FINITE"
LONE = "MESSAGE_LONE_SURROGATE"
RESERVED = "MESSAGE_RESERVED_TYPE"


@pytest.mark.parametrize(
    ("line", "reason", "part"),
    [
        (b"", NOT_JSON, "blank"),
        (b" {}", NOT_JSON, "white space"),
        (b"\t{}", NOT_JSON, "white space"),
        (b"{} ", NOT_JSON, "follows"),
        (b"{}{}", NOT_JSON, "follows"),
        (b"{}\r", NOT_JSON, "carriage"),
        (b'{"a":\r1}', NOT_JSON, "carriage"),
        (b"\xef\xbb\xbf{}", NOT_JSON, "character 0"),
        (b"{\x00}", NOT_JSON, "character 1"),
        (b'{"a": "\x00"}', NOT_JSON, "control character"),
        (b'{"a": "\t"}', NOT_JSON, "control character"),
        (b"{}\x00", NOT_JSON, "follows"),
        (b"{'a': 1}", NOT_JSON, "property name"),
        (b'{"a": 01}', NOT_JSON, "delimiter"),
        (b'{"a": "\xff"}', NOT_JSON, "0xff"),
        (b'{"a": "\xc0\xaf"}', NOT_JSON, "0xc0"),
        (b'{"a": "\xed\xa0\x80"}', NOT_JSON, "0xed"),
        (b'{"a": "\xf4\x90\x80\x80"}', NOT_JSON, "0xf4"),
        (b'{"a": "\\ud80"}', NOT_JSON, "escape"),
        (b'{"a": ' + b"1" * 4301 + b"}", NOT_JSON, "digits"),
        (b'{"a": NaN}', NOT_FINITE, "NaN"),
        (b'{"a": -Infinity}', NOT_FINITE, "NaN"),
        (b'{"a": 1e999}', NOT_FINITE, "NaN"),
        (b'{"a": [-1E+400]}', NOT_FINITE, "NaN"),
        (b'{"a": ' + b"9" * 400 + b".0}", NOT_FINITE, "NaN"),
        (b'{"a": "\\ud800"}', LONE, "U+FFFD"),
        (b'{"a": "\\uDFFF"}', LONE, "U+FFFD"),
        (b'{"a": "\\ud83d\\ud83d\\ude00"}', LONE, "U+FFFD"),
        (b'{"a": "\\ud83d\\ude00\\ude00"}', LONE, "U+FFFD"),
        (b'{"a": "\\ud83d\\\\\\ude00"}', LONE, "U+FFFD"),
        (b'{"a": "\\\\\\ud800"}', LONE, "U+FFFD"),
        (b'{"\\udc00": 1}', LONE, "U+FFFD"),
        (b'{"a": "\\ud800", "a": 1}', LONE, "U+FFFD"),
        (b'{"_type": "metadata"}', RESERVED, "header"),
        (b'{"a": 1, "_type" : "metadata"}', RESERVED, "header"),
        (b'{"_type": "metadata", "_type": "x"}', RESERVED, "header"),
        (b'{"_type": "x", "_type": "metadata"}', RESERVED, "header"),
        (b'{"\\u005ftype": "metadata"}', RESERVED, "header"),
        (b'{"_ty\\u0070e": "\\u006detadata"}', RESERVED, "header"),
        (b'{"_type": "met\\u0061data"}', RESERVED, "header"),
        (b"[" * 900, "MESSAGE_TOO_DEEP", "200"),
        (b'{"a":' * 201 + b"1" + b"}" * 201, "MESSAGE_TOO_DEEP", "200"),
    ],
)
def test_split_block_refuses(line: bytes, reason: str, part: str) -> None:
    error = refused(b"{}\n" + line + b"\n{}\n")
    assert (error.reason, error.index, error.metadata["index"]) == (reason, 1, "1")
    assert part in str(error)


def test_a_line_is_read_as_every_python_reader_of_lines_reads_it() -> None:
    """Also a reader of text with universal line ends, and one that strips, gets the very same messages."""
    block = codec.encode_block([{"a": "x\r\ny\u2028z\x1c"}, {"b": " "}])
    assert [json.loads(line.strip()) for line in block.decode().replace("\r", "\n").split("\n") if line] == [
        {"a": "x\r\ny\u2028z\x1c"},
        {"b": " "},
    ]


@pytest.mark.parametrize("depth_max", [1, 5, 200])
def test_depth_is_measured_exactly(depth_max: int) -> None:
    limits = Limits(message_depth_max=depth_max)
    wide = b'{"a": "' + b"[{" * 500 + b'\\"[\\\\"' + b', "b": "]"' * 200
    assert codec.split_block(wide + b', "c": 1}', limits)
    inner = b"[" * (depth_max - 1) + b"]" * (depth_max - 1) or b"0"
    assert codec.split_block(wide + b', "c": ' + inner + b', "d": ' + inner + b"}", limits)
    error = refused(wide + b', "c": [' + inner + b"]}", limits)
    assert error.reason == "MESSAGE_TOO_DEEP"
    assert error.metadata == {"index": "0", "limit": str(depth_max)}


def test_a_recursion_error_never_escapes_whatever_the_limit() -> None:
    line = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    assert refused(line, Limits(message_depth_max=1 << 30)).reason == "MESSAGE_TOO_DEEP"


def test_bytes_and_counts_are_bounded_exactly() -> None:
    line = b'{"a": 1}'
    exactly = Limits(message_bytes_max=8, batch_messages_max=2, batch_bytes_max=17)
    assert codec.split_block(line + b"\n" + line, exactly) == [line, line]
    assert codec.split_block(b"{}\n{}\n", exactly) == [b"{}", b"{}"]

    error = refused(line + b"\n" + line + b"\n", exactly)
    assert (error.reason, error.index) == ("BATCH_TOO_LARGE", -1)
    assert error.metadata == {"size_bytes": "18", "limit_bytes": "17"}

    for block in (b"{}\n{}\n{}", b"{}\n{}\n{}\n", b"\n\n\n"):
        error = refused(block, exactly)
        assert (error.reason, error.index) == ("BATCH_TOO_MANY", -1)
        assert error.metadata == {"count": "3", "limit": "2"}

    error = refused(b'{}\n{"a": 11}', exactly)
    assert (error.reason, error.index) == ("MESSAGE_TOO_LARGE", 1)
    assert error.metadata == {"index": "1", "size_bytes": "9", "limit_bytes": "8"}


# --------------------------------------------------------------------------------------------- check_object


def test_check_object_gives_the_bytes_unchanged_and_allows_any_name() -> None:
    for line in (b"{}", b'{"_type":"metadata", "a" : 1.0}', b'{"\\u005ftype": "metadata"}'):
        assert codec.check_object(line) == line


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", NOT_JSON),
        (b'{"a":\n1}', NOT_JSON),
        (b"{}\n", NOT_JSON),
        (b"{}\r", NOT_JSON),
        (b"[]", "MESSAGE_NOT_OBJECT"),
        (b'{"a": NaN}', NOT_FINITE),
        (b'{"a": "\\ud800"}', LONE),
        (b'{"a": "' + b"x" * 100 + b'"}', "MESSAGE_TOO_LARGE"),
        (b'{"a": [[]]}', "MESSAGE_TOO_DEEP"),
    ],
)
def test_check_object_refuses(line: bytes, reason: str) -> None:
    with pytest.raises(MessageError, match="the object") as caught:
        codec.check_object(line, Limits(message_bytes_max=100, message_depth_max=2))
    assert (caught.value.reason, caught.value.index) == (reason, -1)


# --------------------------------------------------------------------------------------------------- errors


def test_every_reason_is_one_of_the_contract() -> None:
    known = set(errors_pb2.ErrorReason.keys())
    content = (b"x", b"[]", b'{"a":NaN}', b'{"a":"\\ud800"}', b'{"_type":"metadata"}')
    for block in (*content, b"{}\n" * 10_001, b"[" * 900):
        assert f"ERROR_REASON_{refused(block).reason}" in known
    for limits in (Limits(message_bytes_max=1), Limits(batch_bytes_max=1)):
        assert f"ERROR_REASON_{refused(b'{}', limits).reason}" in known


def test_details_are_short_enough_to_travel() -> None:
    with pytest.raises(MessageError) as caught:
        codec.encode({("x" * 10_000,): 1})  # type: ignore[dict-item]
    assert len(caught.value.metadata["detail"]) <= 200


def test_an_error_survives_copying_and_pickling() -> None:
    error = refused(b"{}\n[]")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(again), again.reason, again.index) == (str(error), "MESSAGE_NOT_OBJECT", 1)
        assert again.metadata == error.metadata == {"index": "1"}

"""The pure parts of the embedded engine: file names, text, checksums and index, journal records."""

import json
import string
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessionstored.engine.jsonl.blocks import BLOCK_BYTES, Blocks, begins_with
from sessionstored.engine.jsonl.names import (
    SUFFIX,
    file_name,
    is_temporary_name,
    key_of_file_name,
    short_name,
    temporary_name,
)
from sessionstored.engine.jsonl.records import (
    AdoptRecord,
    CallRecord,
    DamagedRow,
    DeleteRecord,
    Record,
    RequestRecord,
    Row,
    SessionRecord,
    read_row,
)
from sessionstored.engine.jsonl.text import adopted_head, header_line, message_lines, scan
from sessionstored.rules import Answer, Head, Refusal
from sessionstored.windows import Remembered

keys = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60),
    st.text(string.ascii_letters + ":/._-%~\\", min_size=1, max_size=12),
    st.sampled_from(["a:b", "a/b", "a_b", "A:B", "..", ".", "~x", "%41", "k" * 512, "я" * 256, "a\u200bb"]),
)

# Names.


@given(keys, st.integers(0, 4))
def test_a_name_is_one_that_every_file_system_takes(key: str, attempt: int) -> None:
    name = file_name(key, attempt)
    assert name.endswith(SUFFIX)
    assert "/" not in name
    assert "\0" not in name
    assert name not in (SUFFIX, ".", "..")
    assert len(name.encode()) <= 200
    assert not is_temporary_name(name)
    for generation in (1, 10**9):
        assert is_temporary_name(temporary_name(name, generation))
        assert not temporary_name(name, generation).endswith(SUFFIX)


@given(st.sets(keys, min_size=2, max_size=6))
def test_attempts_find_a_name_of_its_own_for_every_key(some: set[str]) -> None:
    taken: set[str] = set()
    for key in sorted(some):
        name = next(name for name in (file_name(key, attempt) for attempt in range(20)) if name not in taken)
        taken.add(name)
    assert len(taken) == len(some)


@given(keys)
def test_encoded_names_of_two_keys_differ_beyond_case(key: str) -> None:
    other = key.swapcase()
    if other != key:
        assert file_name(key, 1).casefold() != file_name(other, 1).casefold()


@given(keys)
def test_a_percent_encoded_name_says_its_key(key: str) -> None:
    name = file_name(key, 1)
    if "~" not in name and "%" in name:
        assert key_of_file_name(name) == key


def test_the_first_choice_is_the_name_that_plain_files_use() -> None:
    assert file_name("telegram:42/x") == "telegram_42_x.jsonl"
    assert file_name("Ünïcode:ключ/✓") == "Ünïcode_ключ_✓.jsonl"


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=249)
)
def test_marks_around_any_name_fit(stem: str) -> None:
    name = stem.encode()[:249].decode(errors="ignore") + SUFFIX
    assert len(temporary_name(name, 10**9).encode()) <= 255
    assert len(f"{short_name(name)}.{'f' * 8}.foreign".encode()) <= 255


# Text.

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=8), plain_values, max_size=4).filter(
    lambda value: value.get("_type") != "metadata"
)
encoded = objects.flatmap(
    lambda value: st.booleans().map(
        lambda ascii_only: json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "backslashreplace")
    )
)
heads = st.builds(
    Head,
    keys,
    st.just(1),
    st.just(1),
    st.just(0),
    st.just(0),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers()).map(
        lambda value: json.dumps(value, ensure_ascii=False).encode()
    ),
    st.integers(0, 4_000_000_000_000_000),
    st.integers(0, 4_000_000_000_000_000),
)


@given(heads)
def test_a_header_comes_back(head: Head) -> None:
    line = header_line(head)
    assert line.count(b"\n") == 1
    found = scan(line)
    back, notes = adopted_head(found, head.key, 1, 5, "")
    assert not notes
    assert back.metadata == head.metadata
    assert back.update_time_us == head.update_time_us
    assert back.create_time_us == min(head.create_time_us, head.update_time_us)


@given(
    st.lists(st.one_of(encoded, heads.map(header_line).map(bytes.strip), st.sampled_from([b"", b"\t"]))),
    st.sampled_from([b"\n", b"\r\n", b" \n"]),
    st.booleans(),
    st.booleans(),
)
def test_a_scan_finds_the_messages_that_a_cold_read_gives(
    parts: list[bytes], end: bytes, mark: bool, ended: bool
) -> None:
    data = (b"\xef\xbb\xbf" if mark else b"") + end.join(parts) + (end if ended else b"")
    found = scan(data)
    assert (found.bad_line, found.torn) == (0, b"")
    assert found.blocks.length == len(data)
    messages = [part.strip() for part in parts if part.strip() and b'"_type": "metadata"' not in part]
    assert message_lines(data) == messages
    assert found.message_count == len(messages)


@given(st.lists(encoded, min_size=1, max_size=5), st.integers(0, 10), st.binary(min_size=1, max_size=10))
def test_a_bad_line_inside_is_named_and_a_bad_last_one_is_torn(
    parts: list[bytes], at: int, junk: bytes
) -> None:
    bad = b"{" + junk.replace(b"\n", b"").replace(b"}", b"")
    at = min(at, len(parts))
    lines = [*parts[:at], bad, *parts[at:]]
    found = scan(b"\n".join(lines))
    if at == len(parts):
        assert found.torn == bad
        assert found.message_count == len(parts)
        assert found.bad_line == 0
    else:
        assert found.bad_line == at + 1
        assert found.torn == b""


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [(b'{"x": 1E5, "y": 2}', b'{"x": 1E5, "y": 2}'), (b"null", b"{}"), (b"[1]", b"{}")],
)
def test_metadata_of_an_adopted_file_keeps_its_bytes(metadata: bytes, kept: bytes) -> None:
    found = scan(b'{"_type": "metadata", "metadata": ' + metadata + b"}\n")
    assert adopted_head(found, "k", 1, 5, "")[0].metadata == kept


def test_a_line_in_another_encoding_is_bad() -> None:
    assert scan('{"a": 1}'.encode("utf-16-le") + b"\n{}\n").bad_line == 1


# Blocks.

lines_of_sizes = st.lists(st.integers(2, BLOCK_BYTES * 2), min_size=1, max_size=12)


@given(lines_of_sizes, st.lists(st.integers(1, 200_000), max_size=5))
def test_blocks_do_not_depend_on_how_they_grew(sizes: list[int], cuts: list[int]) -> None:
    data = b"".join(b"x" * (size - 1) + b"\n" for size in sizes)
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    whole, grown = Blocks(), Blocks()
    whole.extend(data, starts)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for begin, end in pairwise(edges):
        grown.extend(data[begin:end], [start - begin for start in starts if begin <= start < end])
    assert grown.pack() == whole.pack()
    assert grown.mark == whole.mark
    assert begins_with(data + b"more", whole.mark)
    assert not begins_with(data[:-1], whole.mark)
    assert not begins_with(data[:-1] + b"y", whole.mark)
    back = Blocks(len(data), whole.pack())
    for index, start in enumerate(starts):
        block, first = back.locate(index)
        assert block == start // BLOCK_BYTES
        assert first == sum(other // BLOCK_BYTES < block for other in starts)
    with pytest.raises(IndexError):
        back.locate(len(sizes))


# Records.

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
numbers = st.integers(0, 1 << 60)
outcomes = st.one_of(
    st.builds(Answer, numbers, numbers, numbers, numbers, numbers, numbers, st.none() | encoded),
    st.builds(Refusal, texts, texts, st.dictionaries(texts, texts, max_size=2)),
)
remembered = st.builds(Remembered, st.binary(max_size=16), outcomes)
records = st.one_of(
    st.builds(
        SessionRecord,
        heads,
        numbers,
        numbers,
        st.lists(encoded),
        st.sampled_from(["", "f.jsonl"]),
        numbers,
        st.sampled_from(["", "source"]),
    ),
    st.builds(
        DeleteRecord,
        keys,
        numbers,
        texts,
        st.lists(st.tuples(numbers, numbers)).map(tuple),
        st.booleans(),
        numbers,
        st.booleans(),
    ),
    st.builds(AdoptRecord, keys, numbers, numbers),
    st.builds(CallRecord, texts, numbers, numbers, remembered),
    st.builds(RequestRecord, keys, texts, remembered),
)


@given(st.lists(records, max_size=5))
def test_records_come_back(some: list[Record]) -> None:
    row = Row()
    for record in some:
        match record:
            case SessionRecord():
                extra = {"metadata": record.head.metadata.decode()}
                if record.file:
                    extra["file"] = record.file
                if record.source_key:
                    extra["source"] = record.source_key
                previous = record.previous_revision
                row.change(record.head, previous, record.start, record.delete_count, record.lines, extra)
            case DeleteRecord():
                row.delete(record)
            case AdoptRecord():
                row.adopted(record)
            case CallRecord():
                row.call(record)
            case RequestRecord():
                row.request(record)
    assert list(read_row(row.body())) == some


@pytest.mark.parametrize("body", [b'["x"]\n', b'["s", 1]\n', b'["c","a",1,0,"00",[true]]\n'])
def test_a_record_of_no_known_form_is_damage(body: bytes) -> None:
    with pytest.raises(DamagedRow):
        list(read_row(body))

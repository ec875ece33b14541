"""Session files: what is read leniently, what is damage, and what comes back the same."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from sessionstore._types import Head
from sessionstore.cli.files import (
    DamagedFileError,
    claimed_key,
    compose,
    name_for,
    parse,
    plain_name,
    unique_name,
)

HEADER = {
    "_type": "metadata",
    "key": "a:b",
    "created_at": "2026-02-23T09:00:00.123456",
    "updated_at": "2026-02-23T09:12:10.123456",
    "metadata": {"title": "東京", "big": 2**53 + 1},
    "last_consolidated": 1,
}
MESSAGES = [b'{"role": "user", "n": 9007199254740993}', b'{"f": 1.10,"e": 1E5}']


def file_of(*lines: bytes | dict[str, object], end: bytes = b"\n") -> bytes:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return end.join([*texts, b""])


def test_a_whole_file_is_read_with_its_bytes():
    found = parse(file_of(HEADER, *MESSAGES), "stem")
    assert (found.key, found.lines, found.numbers) == ("a:b", MESSAGES, [2, 3])
    assert (found.metadata, found.last_consolidated) == (HEADER["metadata"], 1)
    assert (found.torn, found.notes) == ("", ())


def test_a_time_without_offset_is_local_and_one_with_it_is_not():
    local = datetime(2026, 2, 23, 9, 0, 0, 123456).astimezone()
    assert parse(file_of(HEADER), "s").create_time == local
    offset = HEADER | {"created_at": "2026-02-23T09:00:00+02:00"}
    assert parse(file_of(offset), "s").create_time == datetime(2026, 2, 23, 7, tzinfo=UTC)


@pytest.mark.parametrize("data", [
    b"\xef\xbb\xbf" + file_of(HEADER, *MESSAGES),
    file_of(HEADER, *MESSAGES, end=b"\r\n"),
    file_of(b"", HEADER, b"  ", *MESSAGES, b"", b""),
    file_of(HEADER, *MESSAGES).removesuffix(b"\n"),
    file_of(*MESSAGES, HEADER),
    file_of(HEADER | {"key": "old", "metadata": {}}, MESSAGES[0], HEADER, MESSAGES[1]),
], ids=["byte order mark", "CR LF", "blank lines", "no line end", "header last", "the last header wins"])
def test_what_loses_nothing_is_accepted(data):
    found = parse(data, "stem")
    assert (found.key, found.lines, found.metadata) == ("a:b", MESSAGES, HEADER["metadata"])
    assert (found.torn, found.notes) == ("", ())


@pytest.mark.parametrize("torn", [b'{"role": "us', b"\x00\x00\xff\xfe junk", b"[1]", b"7"])
def test_an_unreadable_last_line_is_left_out_and_named(torn):
    for end in (b"", b"\n", b"\n\n"):
        found = parse(file_of(HEADER, *MESSAGES) + torn + end, "stem")
        assert found.lines == MESSAGES
        assert "last line (4)" in found.torn


def test_an_unreadable_line_before_others_is_damage():
    data = file_of(HEADER, MESSAGES[0], b'{"cut', MESSAGES[1])
    with pytest.raises(DamagedFileError, match="line 3") as caught:
        parse(data, "stem")
    assert caught.value.line == 3
    assert claimed_key(data, "stem") == "a:b"


@pytest.mark.parametrize(("changed", "word"), [
    ({"metadata": None}, "metadata"),
    ({"metadata": [1]}, "metadata"),
    ({"created_at": "yesterday"}, "created_at"),
    ({"created_at": None}, "created_at"),
    ({"last_consolidated": 99}, "last_consolidated"),
    ({"last_consolidated": -1}, "last_consolidated"),
    ({"last_consolidated": True}, "last_consolidated"),
    ({"last_consolidated": None}, "last_consolidated"),
    ({"key": ""}, "key"),
    ({"key": 7}, "key"),
])
def test_a_header_field_that_cannot_be_used_is_named(changed, word):
    found = parse(file_of(HEADER | changed, *MESSAGES), "stem")
    assert found.lines == MESSAGES
    assert [word in note for note in found.notes] == [True]
    assert found.key == ("stem" if "key" in changed else "a:b")
    assert found.metadata == ({} if "metadata" in changed else HEADER["metadata"])
    assert found.last_consolidated == (0 if "last_consolidated" in changed else 1)
    assert (found.create_time is None) == ("created_at" in changed)


@pytest.mark.parametrize(("stem", "key"), [
    ("plain", "plain"), ("a%3Ab", "a:b"), ("100%", "100%"), ("%FF", "%FF"),
])
def test_without_a_header_the_name_gives_the_key(stem, key):
    for data in (file_of(*MESSAGES), b""):
        found = parse(data, stem)
        assert (found.key, found.create_time, len(found.notes)) == (key, None, 1)
        assert claimed_key(data, stem) == key


def test_what_is_composed_is_read_back():
    created = datetime(2026, 2, 23, 9, tzinfo=UTC)
    head = Head("ключ/✓", 7, 2, 1, {"big": 2**53 + 1}, created, created + timedelta(hours=1))
    found = parse(compose(head, MESSAGES), "other")
    assert (found.key, found.lines, found.metadata) == (head.key, MESSAGES, head.metadata)
    assert (found.last_consolidated, found.create_time) == (1, created)
    assert (found.torn, found.notes) == ("", ())


def test_keys_that_share_a_plain_name_get_names_of_their_own():
    keys = ["a:b", "a/b", "a_b", "A:B", "..", "ключ/✓", "k" * 512, "к" * 256]
    taken: set[str] = set()
    names = [name_for(key, taken) for key in keys]
    assert len({name.casefold() for name in names}) == len(keys)
    assert names[0] == plain_name("a:b") == "a_b.jsonl"
    assert names[5] == "ключ_✓.jsonl"
    assert all(len(name.encode()) <= 255 and "/" not in name for name in names)
    assert names[6] == unique_name("k" * 512)

"""Reads at the wire: tails, blocks, rewrites between blocks, windows, pages."""

import time

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from sessionstore import codec, history
from sessionstore.v1 import session_store_pb2 as v1
from wire import block, numbered, refusal

MIB = 1 << 20


def append(daemon, key: str, *messages: object) -> int:
    request = v1.AppendMessagesRequest(key=key, messages=block(*messages))
    return daemon.stub.AppendMessages(request).result.revision


def get(daemon, key: str, **fields: object) -> v1.GetSessionResponse:
    return daemon.stub.GetSession(v1.GetSessionRequest(key=key, **fields))


def read(daemon, key: str, **fields: object) -> list[v1.ReadMessagesResponse]:
    return list(daemon.stub.ReadMessages(v1.ReadMessagesRequest(key=key, **fields)))


def test_a_head_is_complete(shared_daemon, key):
    create = v1.CreateSessionRequest(
        key=key,
        messages=block(*numbered(3)),
        metadata=b'{"a":1}',
        last_consolidated=2,
        create_time=Timestamp(seconds=1_000_000_000, nanos=500_000_000),
    )
    result = shared_daemon.stub.CreateSession(create).result
    head = get(shared_daemon, key).session
    assert (head.key, head.revision) == (key, result.revision)
    assert (head.message_count, head.last_consolidated) == (3, 2)
    assert (head.metadata, head.damage) == (b'{"a":1}', "")
    assert head.create_time == create.create_time
    assert head.update_time == result.update_time
    assert abs(head.update_time.ToSeconds() - time.time()) < 60


def test_only_the_tail_comes_back_where_a_tail_is_right(shared_daemon, key):
    held = append(shared_daemon, key, *numbered(3))
    append(shared_daemon, key, {"n": 3}, {"n": 4})
    got = get(shared_daemon, key, known_revision=held, known_message_count=3)
    assert (got.start, got.messages, got.next) == (3, block({"n": 3}, {"n": 4}), 5)
    shared_daemon.stub.PopMessage(v1.PopMessageRequest(key=key))
    again = get(shared_daemon, key, known_revision=got.session.revision, known_message_count=5)
    assert (again.start, again.next) == (0, 4)
    current = get(shared_daemon, key, known_revision=again.session.revision, known_message_count=4)
    assert (current.start, current.messages, current.next, current.truncated) == (4, b"", 4, False)


@pytest.mark.parametrize(("last", "start"), [(0, 5), (2, 3), (5, 0), (9, 0)])
def test_the_last_few_messages(shared_daemon, key, last, start):
    append(shared_daemon, key, *numbered(5))
    got = get(shared_daemon, key, last=last)
    assert (got.start, got.next, got.messages) == (start, 5, block(*numbered(5)[start:]))
    assert not got.truncated


def test_a_long_session_comes_in_blocks_of_at_most_one_mebibyte(shared_daemon, key):
    messages = numbered(30, size=100_000)
    append(shared_daemon, key, *messages)
    first = get(shared_daemon, key)
    assert first.truncated
    assert MIB - 100_100 < len(first.messages) <= MIB
    rest = read(shared_daemon, key, start=first.next, known_revision=first.session.revision)
    assert all(len(part.messages) <= MIB for part in rest)
    assert [part.start for part in rest] == [first.next, *[part.next for part in rest[:-1]]]
    assert rest[-1].next == 30
    assert first.messages + b"".join(part.messages for part in rest) == block(*messages)


def test_one_larger_message_comes_alone(shared_daemon, key):
    messages = [{"n": 0}, {"x": "y" * 2 * MIB}, {"n": 2}]
    append(shared_daemon, key, *messages)
    parts = read(shared_daemon, key)
    assert [part.messages for part in parts] == [block(message) for message in messages]


@pytest.mark.parametrize(
    ("start", "limit", "expected"),
    [(0, 0, range(5)), (2, 0, range(2, 5)), (1, 2, range(1, 3)), (3, 9, range(3, 5)), (5, 0, range(0))],
)
def test_ranges(shared_daemon, key, start, limit, expected):
    append(shared_daemon, key, *numbered(5))
    parts = read(shared_daemon, key, start=start, limit=limit)
    assert len(parts) == 1
    assert parts[0].messages == block(*[numbered(5)[n] for n in expected])


def test_an_empty_session_gives_one_empty_block(shared_daemon, key):
    shared_daemon.stub.CreateSession(v1.CreateSessionRequest(key=key))
    (part,) = read(shared_daemon, key)
    assert (part.start, part.next, part.messages) == (0, 0, b"")


def test_a_stream_beside_a_writer_ends_where_the_session_ended_at_its_start(shared_daemon, key):
    # More than gRPC buffers on the way, which is up to about 9 MiB.
    for _ in range(2):
        append(shared_daemon, key, *numbered(15, size=MIB - 100))
    stream = shared_daemon.stub.ReadMessages(v1.ReadMessagesRequest(key=key))
    parts = [next(stream)]
    append(shared_daemon, key, {"late": True})
    parts += stream
    assert parts[-1].next == 30
    assert parts[-1].revision > parts[0].revision


@pytest.mark.parametrize("change", ["pop", "recreate"])
def test_a_rewrite_between_blocks_is_a_conflict(shared_daemon, key, change):
    # More than gRPC buffers on the way, so that the daemon has not read all of it when the change comes.
    append(shared_daemon, key, *numbered(15, size=MIB - 100))
    append(shared_daemon, key, *numbered(15, size=MIB - 100))
    stream = shared_daemon.stub.ReadMessages(v1.ReadMessagesRequest(key=key))
    next(stream)
    if change == "pop":
        shared_daemon.stub.PopMessage(v1.PopMessageRequest(key=key))
    else:
        shared_daemon.stub.DeleteSession(v1.DeleteSessionRequest(key=key))
        for _ in range(2):
            append(shared_daemon, key, *numbered(15, size=MIB - 100))
    got = refusal(lambda: list(stream))
    if change == "recreate" and got.reason == "SESSION_NOT_FOUND":  # read between removal and new beginning
        return
    assert got.reason == "REVISION_CONFLICT"
    assert set(got.metadata) == {"key", "expected_revision", "revision", "message_count"}


def test_messages_that_were_rewritten_since_the_known_revision_are_a_conflict(shared_daemon, key):
    held = append(shared_daemon, key, *numbered(5))
    append(shared_daemon, key, {"n": 5})
    assert read(shared_daemon, key, start=5, known_revision=held)[0].messages == block({"n": 5})
    shared_daemon.stub.PopMessage(v1.PopMessageRequest(key=key))
    got = refusal(lambda: read(shared_daemon, key, start=5, known_revision=held))
    assert got.reason == "REVISION_CONFLICT"
    assert got.metadata["expected_revision"] == str(held)


def test_an_update_by_mask(shared_daemon, key):
    shared_daemon.stub.CreateSession(
        v1.CreateSessionRequest(key=key, messages=block(*numbered(2)), metadata=b'{"a": 1, "b.c": 2, "d": 3}')
    )

    def update(*paths: str, **fields: object) -> bytes:
        mask = FieldMask(paths=paths)
        shared_daemon.stub.UpdateSession(v1.UpdateSessionRequest(key=key, update_mask=mask, **fields))
        return get(shared_daemon, key, last=0).session.metadata

    assert update("metadata.b.c", metadata=b'{"b.c": 12345678901234567890, "a": 9}') == (
        b'{"a": 1, "b.c": 12345678901234567890, "d": 3}'
    )
    assert update("metadata.a", "metadata.e", metadata='{"e": "ключ"}'.encode()) == (
        '{"b.c": 12345678901234567890, "d": 3, "e": "ключ"}'.encode()
    )
    before = get(shared_daemon, key).session.metadata
    assert update("last_consolidated", metadata=b'{"ignored": 1}', last_consolidated=2) == before
    assert get(shared_daemon, key).session.last_consolidated == 2
    assert update("metadata", metadata=b'{"z":[]}') == b'{"z":[]}'
    assert update("metadata") == b"{}"


def test_a_fork_and_its_source_go_their_own_ways(shared_daemon, key):
    append(shared_daemon, key, *numbered(3))
    shared_daemon.stub.ForkSession(v1.ForkSessionRequest(key=key + "/fork", source_key=key, at=2))
    replace = v1.ReplaceMessagesRequest(key=key, start=0, messages=block({"new": 1}))
    shared_daemon.stub.ReplaceMessages(replace)
    append(shared_daemon, key + "/fork", {"fork": 1})
    assert get(shared_daemon, key).messages == block({"new": 1})
    assert get(shared_daemon, key + "/fork").messages == block(*numbered(2), {"fork": 1})


def test_the_history_is_the_window_of_the_whole_session(shared_daemon, key):
    messages = [
        {"role": "user", "content": "q", "timestamp": "t"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        *[{"role": "tool", "tool_call_id": "1", "content": "r", "name": "f"}],
        *[{"role": "assistant", "content": f"step {n}"} for n in range(40)],
    ]
    append(shared_daemon, key, *messages)
    for wanted in (None, 0, 1, 5, 42, 43, 100):
        got = shared_daemon.stub.GetHistory(v1.GetHistoryRequest(key=key, max_messages=wanted))
        expected = history.history(messages, max_messages=500 if wanted is None else wanted)
        assert codec.decode_block(got.messages) == expected
        assert not got.truncated
        assert got.revision == get(shared_daemon, key).session.revision


def test_a_history_gives_the_fields_that_are_asked_for(shared_daemon, key):
    append(shared_daemon, key, {"role": "user", "content": "q", "time": "t", "n": [1.50]})
    for keep, line in (
        ([], b'{"role": "user", "content": "q"}\n'),
        (["n", "time", "none", "role"], b'{"role": "user", "content": "q", "n": [1.5], "time": "t"}\n'),
        (["n"] * 100, b'{"role": "user", "content": "q", "n": [1.5]}\n'),
    ):
        got = shared_daemon.stub.GetHistory(v1.GetHistoryRequest(key=key, keep=keep))
        assert got.messages == line


def test_a_history_that_is_too_long_is_made_shorter_and_says_so(shared_daemon, key):
    messages = numbered(100, size=30_000)
    append(shared_daemon, key, *messages)
    got = shared_daemon.stub.GetHistory(v1.GetHistoryRequest(key=key))
    assert got.truncated
    window = codec.decode_block(got.messages)
    assert window == messages[-len(window) :]
    assert MIB - 31_000 < len(got.messages) <= MIB
    short = shared_daemon.stub.GetHistory(v1.GetHistoryRequest(key=key, max_messages=10))
    assert (codec.decode_block(short.messages), short.truncated) == (messages[-10:], False)


@pytest.mark.parametrize("order", range(5))
def test_a_listing_comes_in_pages_in_its_order(make_daemon, order):
    daemon = make_daemon().start()
    keys = ["a", "a/b", "a:b", "A:B", "ключ/✓", "\uffee", "🦊", "zz"]
    for each in [*keys, "a"]:
        append(daemon, each, {"n": 1})
    by_key = sorted(keys, key=str.encode)
    by_time = [*keys[1:], "a"]
    expected = [by_key, by_key, by_key[::-1], by_time, by_time[::-1]][order]
    listed, token = [], ""
    for _ in range(5):
        page = daemon.stub.ListSessions(v1.ListSessionsRequest(order=order, page_size=3, page_token=token))
        listed += [head.key for head in page.sessions]
        assert len(page.sessions) == 3 or not page.next_page_token
        token = page.next_page_token
        if not token:
            break
    assert listed == expected
    other = v1.ListSessionsRequest(order=order, prefix="a", page_token=_token(daemon, order))
    assert refusal(lambda: daemon.stub.ListSessions(other)).reason == "PAGE_TOKEN_INVALID"


def _token(daemon, order: int) -> str:
    return daemon.stub.ListSessions(v1.ListSessionsRequest(order=order, page_size=1)).next_page_token


def test_a_page_ends_at_one_mebibyte(make_daemon):
    daemon = make_daemon().start()
    for n in range(10):
        metadata = b'{"a": "%s"}' % (b"x" * 250_000)
        daemon.stub.CreateSession(v1.CreateSessionRequest(key=f"{n}", metadata=metadata))
    listed, token, pages = [], "", 0
    while token or not pages:
        page = daemon.stub.ListSessions(v1.ListSessionsRequest(page_token=token))
        assert page.ByteSize() <= MIB + 200
        listed += [head.key for head in page.sessions]
        token, pages = page.next_page_token, pages + 1
        assert pages < 10
    assert (listed, pages) == ([str(n) for n in range(10)], 3)


def test_a_listing_by_prefix_and_time(shared_daemon, key):
    append(shared_daemon, key + "a", {"n": 1})
    cut = get(shared_daemon, key + "a").session.update_time
    time.sleep(0.002)
    append(shared_daemon, key + "b", {"n": 1})
    both = shared_daemon.stub.ListSessions(v1.ListSessionsRequest(prefix=key, updated_since=cut))
    assert [head.key for head in both.sessions] == [key + "a", key + "b"]
    cut.FromNanoseconds(cut.ToNanoseconds() + 1)
    later = shared_daemon.stub.ListSessions(v1.ListSessionsRequest(prefix=key, updated_since=cut))
    assert [head.key for head in later.sessions] == [key + "b"]
    assert later.sessions[0].message_count == 1


def test_server_info(shared_daemon):
    info = shared_daemon.stub.GetServerInfo(v1.GetServerInfoRequest())
    assert (info.engine, info.durability) == ("memory", "none")
    assert info.version
    assert info.store_id
    assert abs(info.start_time.ToSeconds() - time.time()) < 3600
    assert info.limits == v1.Limits(
        key_bytes_max=512,
        message_bytes_max=8 * MIB,
        batch_messages_max=10_000,
        batch_bytes_max=16 * MIB,
        metadata_bytes_max=256 * 1024,
        page_size_max=1000,
        message_depth_max=200,
        request_id_bytes_max=256,
        window_calls_max=1024,
        window_request_ids_max=1000,
        window_age_max={"seconds": 24 * 3600},
        window_bytes_max=MIB,
        lease_ttl_min={"seconds": 1},
        lease_ttl_max={"seconds": 3600},
        watchers_max=4096,
        watch_keys_max=10_000,
        feed_age_max={"seconds": 600},
        feed_bytes_max=64 * MIB,
    )

"""Messages come back at the wire as the bytes that were sent."""

import pytest
from sessionstore.v1 import session_store_pb2 as v1

LINES = [
    b'{"role":"user","content":"hi"}',
    b'{"n": 9007199254740993, "big": 123456789012345678901234567890, "e": 1E5, "f": 1.10, "z": -0.0}',
    '{"ключ": "✓", "emoji": "👩‍🚀", "escaped": "\\ud83d\\ude00 \\u0041 \\/"}'.encode(),
    b'{ "b" : 1 ,  "a" : [ ] , "nested" : { "x" : null } }',
    b'{"unknown_field": {"deep": [1, 2, {"three": true}]}, "dup": 1, "dup": 2}',
    b"{}",
]


STORES = ["memory:", "jsonl"]


@pytest.mark.parametrize("daemon", STORES, indirect=True)
def test_messages_come_back_byte_equal(daemon):
    block = b"".join(line + b"\n" for line in LINES)
    reply = daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="bytes", messages=block))
    assert (reply.first_index, reply.result.message_count) == (0, len(LINES))
    got = daemon.stub.GetSession(v1.GetSessionRequest(key="bytes"))
    assert got.messages == block
    parts = daemon.stub.ReadMessages(v1.ReadMessagesRequest(key="bytes"))
    assert b"".join(part.messages for part in parts) == block


@pytest.mark.parametrize("line", LINES)
def test_a_popped_message_is_byte_equal(daemon, line):
    daemon.stub.AppendMessages(v1.AppendMessagesRequest(key="pop", messages=line))
    assert daemon.stub.PopMessage(v1.PopMessageRequest(key="pop")).message == line

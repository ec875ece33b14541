"""The lines of `sessionctl watch`."""

import json
from datetime import UTC, datetime, timedelta

from sessionstore._events import LeaseChanged, SessionChanged, SessionDeleted
from sessionstore._types import Head
from sessionstore.cli.conversation import local_time
from sessionstore.cli.watching import line, line_json

NOW = datetime(2026, 2, 23, 9, 0, tzinfo=UTC)
HEAD = Head("k\x1b\n", 5, 1200, 0, {"m": 1}, NOW, NOW)
CHANGED = SessionChanged("k\x1b\n", 5, 4, HEAD, 7, 1, [{"n": 1}, {"n": 2}], b"\x01c")
FORK = SessionChanged("k", 5, 0, HEAD, 0, 0, [], b"", True, "from")
GONE = SessionDeleted("k", 6, 5, b"", True)
LEASE = LeaseChanged("k", 0, "me\x07", 9, True, timedelta(seconds=60), timedelta(seconds=60), NOW, False, b"")


def test_a_line_for_people_holds_nothing_that_steers_a_terminal() -> None:
    when = local_time(NOW)
    assert line(CHANGED) == f"{when}  k\\x1b\\n  -1 +2 at 7, 1,200 messages, revision 5"
    assert line(FORK) == f"{when}  k  fork of from, 1,200 messages, revision 5"
    assert line(GONE) == " " * 19 + "  k  expired"
    assert line(LEASE) == f"{when}  k  lease acquired by me\\x07"


def test_a_line_for_programs_holds_all_of_it() -> None:
    changed = json.loads(line_json(CHANGED))
    assert (changed["event"], changed["messages"], changed["start"]) == ("changed", [{"n": 1}, {"n": 2}], 7)
    assert (changed["metadata"], changed["cursor"]) == ({"m": 1}, "0163")
    assert json.loads(line_json(GONE))["expired"] is True
    lease = json.loads(line_json(LEASE))
    assert (lease["event"], lease["holder"], lease["ttl_s"]) == ("lease", "me\x07", 60)

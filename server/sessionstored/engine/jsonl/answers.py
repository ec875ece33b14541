"""The exactly-once windows as of the last checkpoint: two tables of journal.db, by client and by request_id.

Knows these tables' rows, through whichever connection it is given; nothing of transactions or decisions.
A row that is not what was written is never read as one that is not there: that would let a call happen twice.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import apsw

from sessionstored.engine.jsonl.records import outcome_from_json, outcome_to_json
from sessionstored.engine.jsonl.tables import WrongRow, is_whole, one_value, row_crc
from sessionstored.windows import CallWindow, Remembered

SCHEMA = """
CREATE TABLE client(client_id TEXT PRIMARY KEY, floor INTEGER NOT NULL, last_contact_s REAL NOT NULL,
    answers TEXT NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX client_by_contact ON client(last_contact_s);
CREATE TABLE request(key TEXT NOT NULL, request_id TEXT NOT NULL, n INTEGER NOT NULL, at_s REAL NOT NULL,
    digest BLOB NOT NULL, outcome TEXT NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY(key, request_id));
CREATE INDEX request_by_age ON request(at_s);
CREATE INDEX request_by_number ON request(key, n);
"""
_CLIENTS = "SELECT CAST(client_id AS BLOB), floor, last_contact_s, CAST(answers AS BLOB), crc FROM client"
_REQUESTS = (
    "SELECT CAST(key AS BLOB), CAST(request_id AS BLOB), n, at_s, digest, CAST(outcome AS BLOB), crc "
    "FROM request"
)


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A request_id's answer as the catalogue keeps it."""

    n: int
    at_s: float
    remembered: Remembered


class Answers:
    """The rows, through one connection."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def put_window(self, client_id: str, window: CallWindow) -> None:
        """Write a client's window. Within a transaction."""
        answers = [
            [sequence, kept.digest.hex(), outcome_to_json(kept.outcome)]
            for sequence, kept in window.answers.items()
        ]
        row = (client_id, window.floor, float(window.last_contact_s), json.dumps(answers))
        self._db.execute("INSERT OR REPLACE INTO client VALUES (?, ?, ?, ?, ?)", (*row, row_crc(row)))

    def put_request(self, key: str, request_id: str, stored: StoredRequest) -> None:
        """Write what is kept under a request_id. Within a transaction."""
        kept = stored.remembered
        outcome = json.dumps(outcome_to_json(kept.outcome))
        row = (key, request_id, stored.n, float(stored.at_s), kept.digest, outcome)
        self._db.execute("INSERT OR REPLACE INTO request VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, row_crc(row)))

    def forget(self, touched: Iterable[str], request_ids_max: int, before_s: float) -> bool:
        """Drop what is over its limits. Returns whether any was too old. Within a transaction.

        Args:
            touched: the sessions whose request_ids may be too many.
            request_ids_max: how many of them stay.
            before_s: what had no contact since then goes.

        """
        for key in touched:
            self._db.execute(
                "DELETE FROM request WHERE key = ?1 "
                "AND n <= (SELECT max(n) FROM request WHERE key = ?1) - ?2",
                (key, request_ids_max),
            )
        self._db.execute("DELETE FROM request WHERE at_s < ?", (before_s,))
        gone = self._db.changes()
        self._db.execute("DELETE FROM client WHERE last_contact_s < ?", (before_s,))
        return gone + self._db.changes() > 0

    def call_window(self, client_id: str) -> CallWindow | None:
        """A client's window. Raises WrongRow."""
        found = self._db.execute(f"{_CLIENTS} WHERE client_id = ?", (client_id,)).fetchone()
        if found is None:
            return None
        *row, crc = found
        if not is_whole(row, crc):
            raise _wrong_client(client_id)
        _, floor, last_contact_s, kept = row
        answers = {
            sequence: Remembered(bytes.fromhex(digest), outcome_from_json(outcome))
            for sequence, digest, outcome in json.loads(kept)
        }
        return CallWindow(floor, last_contact_s, answers)

    def request(self, key: str, request_id: str) -> StoredRequest | None:
        """What is kept under a request_id. Raises WrongRow."""
        found = self._db.execute(
            f"{_REQUESTS} WHERE key = ? AND request_id = ?", (key, request_id)
        ).fetchone()
        if found is None:
            return None
        *row, crc = found
        if not is_whole(row, crc):
            raise _wrong_request(key, request_id)
        _, _, n, at_s, digest, outcome = row
        return StoredRequest(n, at_s, Remembered(digest, outcome_from_json(json.loads(outcome))))

    def wrong_rows(self) -> Iterator[WrongRow]:
        """Every row that is not what was written. Reads them all."""
        for *row, crc in self._db.execute(_CLIENTS):
            if not is_whole(row, crc):
                yield _wrong_client(_text(row[0]))
        for *row, crc in self._db.execute(_REQUESTS):
            if not is_whole(row, crc):
                yield _wrong_request(_text(row[0]), _text(row[1]))

    def last_request_number(self, key: str) -> int:
        """The number of the newest request_id of a session; 0 if there is none. An index has it."""
        return one_value(self._db, "SELECT ifnull(max(n), 0) FROM request WHERE key = ?", key)


def _wrong_client(client_id: str) -> WrongRow:
    return WrongRow("client", f"what is remembered of the calls of client {client_id}")


def _wrong_request(key: str, request_id: str) -> WrongRow:
    return WrongRow("request", f"what is remembered of request_id {request_id!r} of session {key!r}", key)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else repr(value)

"""The exactly-once windows as of the last checkpoint: two tables of journal.db, by client and by request_id.

Knows these tables' rows, through whichever connection it is given; nothing of transactions or decisions.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import apsw

from sessionstored.engine.jsonl.records import outcome_from_json, outcome_to_json
from sessionstored.engine.jsonl.tables import one_value
from sessionstored.windows import CallWindow, Remembered

SCHEMA = """
CREATE TABLE client(client_id TEXT PRIMARY KEY, floor INTEGER NOT NULL, last_contact_s REAL NOT NULL,
    answers TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX client_by_contact ON client(last_contact_s);
CREATE TABLE request(key TEXT NOT NULL, request_id TEXT NOT NULL, n INTEGER NOT NULL, at_s REAL NOT NULL,
    digest BLOB NOT NULL, outcome TEXT NOT NULL, PRIMARY KEY(key, request_id)) WITHOUT ROWID;
CREATE INDEX request_by_age ON request(at_s);
CREATE INDEX request_by_number ON request(key, n);
"""


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
        self._db.execute(
            "INSERT OR REPLACE INTO client VALUES (?, ?, ?, ?)",
            (client_id, window.floor, window.last_contact_s, json.dumps(answers)),
        )

    def put_request(self, key: str, request_id: str, stored: StoredRequest) -> None:
        """Write what is kept under a request_id. Within a transaction."""
        self._db.execute(
            "INSERT OR REPLACE INTO request VALUES (?, ?, ?, ?, ?, ?)",
            (
                key,
                request_id,
                stored.n,
                stored.at_s,
                stored.remembered.digest,
                json.dumps(outcome_to_json(stored.remembered.outcome)),
            ),
        )

    def forget(self, touched: Iterable[str], request_ids_max: int, before_s: float) -> None:
        """Drop what is over its limits. Within a transaction.

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
        self._db.execute("DELETE FROM client WHERE last_contact_s < ?", (before_s,))

    def call_window(self, client_id: str) -> CallWindow | None:
        """A client's window."""
        found = self._db.execute(
            "SELECT floor, last_contact_s, answers FROM client WHERE client_id = ?", (client_id,)
        ).fetchone()
        if found is None:
            return None
        answers = {
            sequence: Remembered(bytes.fromhex(digest), outcome_from_json(outcome))
            for sequence, digest, outcome in json.loads(found[2])
        }
        return CallWindow(found[0], found[1], answers)

    def request(self, key: str, request_id: str) -> StoredRequest | None:
        """What is kept under a request_id."""
        found = self._db.execute(
            "SELECT n, at_s, digest, outcome FROM request WHERE key = ? AND request_id = ?", (key, request_id)
        ).fetchone()
        if found is None:
            return None
        return StoredRequest(
            found[0], found[1], Remembered(found[2], outcome_from_json(json.loads(found[3])))
        )

    def last_request_number(self, key: str) -> int:
        """The number of the newest request_id of a session; 0 if there is none."""
        return one_value(self._db, "SELECT ifnull(max(n), 0) FROM request WHERE key = ?", key)

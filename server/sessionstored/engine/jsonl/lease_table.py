"""The table of leases in journal.db: what is there when a group is committed is what a start begins with.

Written in the same transaction as the journal row that records it, so recovery need not look for leases in
rows. When a lease runs out is not kept: after a start each has its full ttl again, so a renewal writes
nothing. A row that is not what was written ends its lease: its holder is refused from then on, so no two
holders can be.
"""

from collections.abc import Mapping

import apsw

from sessionstored.engine.jsonl.tables import WrongRow, is_whole, row_crc
from sessionstored.leases import Lease

SCHEMA = """
CREATE TABLE lease(key TEXT PRIMARY KEY, holder TEXT NOT NULL, token INTEGER NOT NULL,
    appends_allowed INTEGER NOT NULL, ttl_s REAL NOT NULL, acquire_time_us INTEGER NOT NULL,
    acquired_s REAL NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
"""


def write(db: apsw.Connection, leases: Mapping[str, Lease | None]) -> None:
    """Write what became of leases, within a transaction; None for one that has ended."""
    for key, lease in leases.items():
        if lease is None:
            db.execute("DELETE FROM lease WHERE key = ?", (key,))
            continue
        row = (
            lease.key,
            lease.holder,
            lease.token,
            int(lease.appends_allowed),
            float(lease.ttl_s),
            lease.acquire_time_us,
            float(lease.acquired_s),
        )
        db.execute("INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, row_crc(row)))


def clear(db: apsw.Connection) -> None:
    """End every lease, within a transaction."""
    db.execute("DELETE FROM lease")


def read(db: apsw.Connection) -> tuple[list[Lease], list[WrongRow]]:
    """Every lease, none of which says when it runs out, and the rows that are not what was written."""
    leases: list[Lease] = []
    wrong: list[WrongRow] = []
    for *row, crc in db.execute(
        "SELECT CAST(key AS BLOB), CAST(holder AS BLOB), token, appends_allowed, ttl_s, acquire_time_us, "
        "acquired_s, crc FROM lease"
    ):
        match row if is_whole(row, crc) else None:
            case [
                bytes() as key,
                bytes() as holder,
                int() as token,
                int() as appends,
                float() as ttl_s,
                int() as time_us,
                float() as at_s,
            ]:
                leases.append(
                    Lease(key.decode(), holder.decode(), token, bool(appends), ttl_s, time_us, at_s, 0.0)
                )
            case _:
                key_text = row[0].decode(errors="replace") if isinstance(row[0], bytes) else repr(row[0])
                wrong.append(WrongRow("lease", f"the lease of session {key_text!r}"))
    return leases, wrong

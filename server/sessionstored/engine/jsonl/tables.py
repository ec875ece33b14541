"""What the modules of journal.db's tables share."""

import apsw


def one_value(db: apsw.Connection, sql: str, *bindings: str) -> int:
    """The one integer that a query gives."""
    row = db.execute(sql, bindings).fetchone()
    assert row is not None
    assert isinstance(row[0], int)
    return row[0]

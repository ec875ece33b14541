"""Page checksums of journal.db, by SQLite's own checksum VFS, which comes with apsw.

Every page, in the database and in its write-ahead log, ends with 8 bytes of checksum that are verified on
each read; a page that is not what was written is an I/O error, never a row less. So what no row's own
checksum covers (every index) is covered, too. But for one thing: a page that is all zeros has the checksum of
zeros, and where it is an overflow page SQLite reads it as it is: for that, rows have their own (`tables`).

Knows SQLite's files only; nothing of rows.
"""

import ctypes
from pathlib import Path

import apsw
import apsw.sqlite_extra

CHECKSUM_VFS = "cksmvfs"
DAMAGED = (apsw.IOError, apsw.CorruptError, apsw.NotADBError)
"""What SQLite raises for a page that is not what was written."""
_MAGIC = b"SQLite format 3\0"
_RESERVED_BYTES = 8
_RESERVED_AT = 20
"""Where a database's header says how many bytes of each page are reserved."""


class ChecksumsMissingError(Exception):
    """The installed apsw, or a database, has no page checksums."""


def register() -> None:
    """Make the VFS known to SQLite; once it is, it stays, and is the default of this process."""
    if CHECKSUM_VFS in apsw.vfs_names():
        return
    db = apsw.Connection(":memory:")
    try:
        apsw.sqlite_extra.load(db, "cksumvfs")
    except (LookupError, apsw.sqlite_extra.NotAvailable, apsw.Error) as error:
        raise ChecksumsMissingError(
            f"apsw {apsw.apsw_version()} comes without SQLite's checksum VFS ({error}): install its wheel"
        ) from error
    finally:
        db.close()


def reserve(db: apsw.Connection) -> None:
    """Have a new database, which nothing was written to yet, keep room for checksums on each page."""
    size = ctypes.c_int(_RESERVED_BYTES)
    db.file_control("main", apsw.SQLITE_FCNTL_RESERVE_BYTES, ctypes.addressof(size))


def check(database: Path) -> None:
    """Make sure that the pages of a database have checksums.

    Raises:
        ChecksumsMissingError: they have none.
        apsw.NotADBError: its first page is none; SQLite reads over that while its log has another.

    """
    with database.open("rb") as file:
        header = file.read(_RESERVED_AT + 1)
    if not header.startswith(_MAGIC):
        raise apsw.NotADBError("its first page is not what was written")
    if header[_RESERVED_AT:] != bytes([_RESERVED_BYTES]):
        raise ChecksumsMissingError("its pages have no checksums")


def no_room(error: apsw.Error) -> bool:
    """Whether something could not be written, or the log's index not grow: no page was found to be wrong."""
    unwritten = (apsw.SQLITE_IOERR_SHMSIZE, apsw.SQLITE_IOERR_WRITE)
    return isinstance(error, apsw.FullError) or getattr(error, "extendedresult", 0) in unwritten


def is_wrong_page(error: apsw.Error) -> bool:
    """Whether a page's checksum was wrong."""
    return getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_DATA


def describe(error: apsw.Error) -> str:
    """An error of SQLite in words; its own for a wrong checksum are no more than "disk I/O error"."""
    if is_wrong_page(error):
        return "a page of it is not what was written (its checksum is wrong)"
    return str(error)

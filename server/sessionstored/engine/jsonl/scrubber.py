"""The scrubber: reads every session file again and again, slowly, and compares it with its checksums.

What rots on a disk shows only when it is read, and most conversations are not read for months. So a thread
goes through the catalogue, drops each file from the page cache (or the read would only ask memory), and reads
it at a bounded rate. A block that does not match is looked at again by the committer, between two groups; if
it is no edit and no rewrite, its session answers DATA_LOSS from then on, and is listed as damaged.

It changes nothing by itself, and never holds a lock while the disk works.
"""

import logging
import os
import threading
import time
from functools import partial

from sessionstored.engine import Refused, Scrub
from sessionstored.engine.jsonl import pages
from sessionstored.engine.jsonl.blocks import BLOCK_BYTES
from sessionstored.engine.jsonl.catalogue import Entry, KnownFile
from sessionstored.engine.jsonl.committer import Committer
from sessionstored.engine.jsonl.journal import Reader
from sessionstored.engine.jsonl.lost_rows import DAMAGE
from sessionstored.engine.jsonl.vault import Vault

log = logging.getLogger(__name__)

_ROWS = 200
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Scrubber:
    """The thread, and what it counts."""

    def __init__(
        self, vault: Vault, committer: Committer, *, bytes_per_s_max: int, pass_interval_s: float
    ) -> None:
        """Make it; nothing runs before `start`.

        Args:
            vault: the open store.
            committer: where damage is confirmed.
            bytes_per_s_max: how fast it reads; a file counts as one block at the least. 0: it never runs.
            pass_interval_s: a pass begins at most this often.

        """
        self._vault, self._committer = vault, committer
        self._bytes_per_s_max, self._pass_interval_s = bytes_per_s_max, pass_interval_s
        self._bytes = self._sessions = self._damaged = self._passes = 0
        self._last_pass_us = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrubber", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self._bytes_per_s_max:
            self._thread.start()

    def stop(self) -> None:
        """End the thread after the block under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def status(self) -> Scrub:
        """What was verified since this daemon began to serve."""
        return Scrub(self._bytes, self._sessions, self._damaged, self._passes, self._last_pass_us)

    def _run(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self.scrub()
            except Exception as error:  # a read of the catalogue: the committer, too, will meet it
                if self._committer.failure:
                    return
                what = pages.describe(error) if isinstance(error, pages.DAMAGED) else f"{error!r}"
                log.exception("the scrubber cannot go on with this pass: %s", what)
            else:
                if not self._stop.is_set():
                    self._passes += 1
                    self._last_pass_us = time.time_ns() // 1000
            self._stop.wait(max(0.0, self._pass_interval_s - (time.monotonic() - begun)))

    def scrub(self) -> None:
        """One pass over the catalogue."""
        after = 0
        while not self._stop.is_set():
            rows = self._vault.reading(partial(Reader.files_after, rowid=after, count=_ROWS))
            if not rows:
                return
            for row in rows:
                self._look_at(row)
                if self._stop.is_set():
                    return
            after = rows[-1].rowid

    def _look_at(self, row: KnownFile) -> None:
        """One session: its catalogue row, then its file."""
        if not row.whole:
            key, _ = self._vault.reading(partial(Reader.indexed, rowid=row.rowid))
            self._damaged += 1
            log.error("session %r is damaged: %s", key, DAMAGE)
            return
        entry = self._vault.reading(partial(Reader.entry, key=row.key))
        if entry is not None and not entry.bad_line:
            self._verify(entry)

    def _verify(self, entry: Entry) -> None:
        """Compare one file with its checksums."""
        try:
            fd = os.open(self._vault.files.sessions / entry.file, _READ)
        except OSError:
            return  # gone or made unusable meanwhile: who opens its session is told
        try:
            if os.fstat(fd).st_ino != entry.inode:
                return  # written anew meanwhile
            wrong = self._first_wrong_block(fd, entry)
        finally:
            os.close(fd)
        if wrong is None:
            self._sessions += 1
            return
        try:
            task = self._committer.confirm(entry.head.key, entry.generation, wrong)
            self._damaged += task.result()
        except (Refused, OSError) as error:
            log.warning("sessions/%s could not be looked at again: %s", entry.file, error)

    def _first_wrong_block(self, fd: int, entry: Entry) -> int | None:
        """The first block that does not match; None if all do, or if told to stop."""
        blocks = entry.blocks
        begun, counted = time.monotonic(), 0
        for block in range(len(blocks.crcs)):
            start, size = block * BLOCK_BYTES, blocks.extent(block)
            try:
                os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)
                data = os.pread(fd, size, start)
            except OSError:
                return block
            if not blocks.check(block, data):
                return block
            self._bytes += size
            counted += BLOCK_BYTES
            ahead_s = counted / self._bytes_per_s_max - (time.monotonic() - begun)
            if ahead_s > 0 and self._stop.wait(ahead_s):
                return None
        return None

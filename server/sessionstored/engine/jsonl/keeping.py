"""Keeping files within a backup's reach although the store replaces or removes them meanwhile.

A session file is changed in place only by appending, so a name of its own is all that a file needs to stay
what it was. A file gets one in the backup's folder right before it is replaced or removed, unless the backup
has taken it already; so what is neither replaced nor removed costs nothing.

`keep` is called by whoever is about to change a name (the committer), `take` by the backup. A file that
cannot be kept is the end of the backup, and of nothing else.
"""

import os
import threading
from pathlib import Path

from sessionstored.engine.jsonl.disk import Disk

READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Keeper:
    """What one backup needs of the session files."""

    def __init__(self, sessions: Path, folder: Path, disk: Disk) -> None:
        """`folder` exists, is empty, and lies on the disk of `sessions`."""
        self._sessions, self._folder, self._disk = sessions, folder, disk
        self._taken: set[str] = set()
        self._lock = threading.Lock()
        self.closed = False
        self.failure: OSError | None = None
        """Why a file could not be kept: what the backup still takes may be of another moment."""

    def keep(self, name: str) -> None:
        """Keep a file that is about to be replaced or removed, unless it was taken, or kept, before."""
        with self._lock:
            if self.closed or self.failure is not None or name in self._taken:
                return
            try:
                self._disk.link(self._sessions / name, self._folder / name)
            except (FileNotFoundError, FileExistsError):
                return  # there is none; or it was replaced before, and the first one counts
            except OSError as error:
                self.failure = error

    def take(self, name: str) -> int:
        """A descriptor for reading a file as it was. Raises OSError; FileNotFoundError if there was none."""
        with self._lock:
            self._taken.add(name)
            kept = self._folder / name
            try:
                fd = os.open(kept, READING)
            except FileNotFoundError:
                return os.open(self._sessions / name, READING)
            os.unlink(kept)  # the descriptor is enough
            return fd

    def close(self) -> None:
        """Keep nothing any more; who replaces a file now does not touch the folder."""
        with self._lock:
            self.closed = True

"""A directory in memory for rungs that open an engine often, and whose flushes prove nothing."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_memory(root: Path) -> Iterator[Path]:
    """A directory in memory where there is such a thing, else below `root`; removed at the end."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="sessionstore-", dir=memory if memory.is_dir() else root))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)

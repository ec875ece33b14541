"""Fixtures of the crash tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# A container has 64 MiB there unless told otherwise, and others may use it: a full one refuses writes.
ROOM_BYTES = 1 << 29


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is room: for tests that open an engine often, and prove no flush."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < ROOM_BYTES:
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="sessionstore-", dir=memory))
    yield path
    shutil.rmtree(path)

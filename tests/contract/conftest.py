"""One suite over every engine: the fixture that gives each of them in turn."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from engines import KINDS, open_kind
from sessionstored.engine import Engine


@pytest.fixture(params=KINDS)
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    opened = await open_kind(request.param, tmp_path)
    yield opened
    await opened.close()

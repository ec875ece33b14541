"""A journal that cannot be read is named to whoever meets it; it is no defect of the daemon."""

from pathlib import Path

import apsw
import pytest
from crash.by_hand import A, opened, says
from engines import done
from sessionstored.engine import Request
from sessionstored.engine.jsonl.journal import Reader
from sessionstored.rules import Append, Fork, Refusal


async def test_a_fork_that_cannot_read_the_catalogue_is_refused_by_name(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(reader: Reader, file: str) -> bool:
        raise apsw.IOError("disk I/O error")

    async with opened(fast_path / "data") as engine:
        await done(engine, Append("source", [A]))
        with monkeypatch.context() as patched:
            patched.setattr(Reader, "file_taken", fail)
            (reply,) = await engine.submit([Request(Fork("fork", "source"))])
        assert isinstance(reply.outcome, Refusal)
        assert (reply.outcome.reason, reply.outcome.metadata["file"]) == ("DATA_LOSS", "journal.db")
        await done(engine, Fork("fork", "source"))
        await says(engine, "fork", A)

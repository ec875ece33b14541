"""What the daemon's log says of things that are no defects."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from grpc._cython import cygrpc
from sessionstored import cli


@contextmanager
def logged(level: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the daemon writes to stderr meanwhile; afterwards the root logger is as it was."""
    root, stderr = logging.getLogger(), io.StringIO()
    handlers, before = root.handlers[:], root.level
    root.handlers.clear()  # those of the test runner
    monkeypatch.setattr("sys.stderr", stderr)
    cli._log_to_stderr(level)
    try:
        yield stderr
    finally:
        root.handlers[:] = handlers
        root.setLevel(before)


def fail(error: Exception) -> None:
    """An error of a handler, as gRPC logs it."""
    try:
        raise error
    except type(error):
        logging.getLogger("grpc._cython.cygrpc").exception("raised by servicer method [%s]", "/x/Backup")


@pytest.mark.parametrize(("level", "lines"), [("info", 1), ("warning", 0)])
def test_a_caller_that_went_away_in_a_stream_is_no_defect(
    monkeypatch: pytest.MonkeyPatch, level: str, lines: int
) -> None:
    with logged(level, monkeypatch) as log:
        fail(cygrpc.ExecuteBatchError("Failed", "execute_batch"))
    found = log.getvalue().splitlines()
    assert len(found) == lines
    assert all("INFO" in line and "a caller went away" in line for line in found)


def test_any_other_error_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with logged("warning", monkeypatch) as log:
        fail(ValueError("a defect"))
    assert "ERROR" in log.getvalue()
    assert "Traceback" in log.getvalue()

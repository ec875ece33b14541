"""The error tree: total over the contract, catchable by ordinary classes, honest about where it came from."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyProto
from google.rpc import error_details_pb2, status_pb2
from sessionstore import errors
from sessionstore.errors import CLIENT_REASONS, ERRORS, error_for, from_rpc_error
from sessionstore.v1 import errors_pb2

REASONS = {
    value.name.removeprefix("ERROR_REASON_")
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values
    if value.number
}


class Failed(grpc.RpcError):
    """An RPC's end, as grpc shows it."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailers: Any = ()) -> None:
        self._parts = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str | None:
        return self._parts[1]

    def trailing_metadata(self) -> Any:
        return self._parts[2]


def refused(
    code: grpc.StatusCode,
    reason: str,
    metadata: dict[str, str] | None = None,
    *,
    domain: str = "sessionstore.v1",
    text: str = "no",
) -> Failed:
    status = status_pb2.Status(code=code.value[0], message=text)
    other = error_details_pb2.RetryInfo()
    info = error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {})
    for detail in (other, info):
        status.details.add().Pack(detail)
    return Failed(code, text, (("x", "y"), ("grpc-status-details-bin", status.SerializeToString())))


def test_the_registry_is_total_over_the_contract() -> None:
    assert set(ERRORS) == REASONS
    assert not set(CLIENT_REASONS) & REASONS
    assert all(issubclass(cls, errors.SessionStoreError) for cls in ERRORS.values())


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("_")
    }
    drawn = {line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line}
    assert drawn | {"SessionStoreError"} == classes


@pytest.mark.parametrize(
    ("reason", "builtin"),
    [
        ("KEY_EMPTY", ValueError),
        ("MESSAGE_TOO_LARGE", ValueError),
        ("SESSION_NOT_FOUND", LookupError),
        ("SHUTTING_DOWN", ConnectionError),
        ("NOT_CONNECTED", ConnectionError),
        ("EXPIRED_IN_QUEUE", TimeoutError),
        ("OUTCOME_UNKNOWN", TimeoutError),
    ],
)
def test_errors_are_caught_as_what_python_calls_them(reason: str, builtin: type[Exception]) -> None:
    error = error_for(reason, "what and why")
    assert isinstance(error, builtin)
    assert isinstance(error, errors.SessionStoreError)
    assert (str(error), error.reason, error.metadata) == ("what and why", reason, {})


def test_a_size_over_its_limit_is_both_a_limit_and_an_argument() -> None:
    error = error_for("MESSAGE_TOO_LARGE", "", {"index": "3", "size_bytes": "9", "limit_bytes": "8"})
    assert isinstance(error, errors.LimitError)
    assert isinstance(error, errors.InvalidArgumentError)
    assert error.index == 3
    assert error_for("KEY_EMPTY", "").index is None


def test_every_property_reads_its_metadata() -> None:
    metadata = {"key": "k", "revision": "7", "expected_revision": "5", "message_count": "3", "file": "f",
                "line": "12", "incident": "i"}  # fmt: skip
    conflict = error_for("REVISION_CONFLICT", "", metadata)
    assert isinstance(conflict, errors.ConflictError)
    assert (conflict.key, conflict.revision, conflict.expected_revision) == ("k", 7, 5)
    assert conflict.message_count == 3
    exists = error_for("SESSION_EXISTS", "", metadata)
    assert isinstance(exists, errors.AlreadyExistsError)
    assert (exists.key, exists.revision, exists.message_count) == ("k", 7, 3)
    loss = error_for("DATA_LOSS", "", metadata)
    assert isinstance(loss, errors.DataLossError)
    assert (loss.key, loss.file, loss.line) == ("k", "f", 12)
    missing = error_for("SESSION_NOT_FOUND", "", metadata)
    assert isinstance(missing, errors.NotFoundError)
    assert missing.key == "k"
    internal = error_for("INTERNAL", "", metadata)
    assert isinstance(internal, errors.InternalError)
    assert internal.incident == "i"


def test_metadata_that_is_no_number_is_zero() -> None:
    error = error_for("REVISION_CONFLICT", "", {"revision": "many"})
    assert isinstance(error, errors.ConflictError)
    assert (error.revision, error.message_count) == (0, 0)


@pytest.mark.parametrize("reason", sorted(ERRORS | CLIENT_REASONS))
def test_errors_travel_between_processes(reason: str) -> None:
    error = error_for(reason, "text", {"key": "k"})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.reason, copy.metadata) == ("text", reason, {"key": "k"})


@pytest.mark.parametrize("reason", ["REVISION_CONFLICT", "OUTCOME_UNKNOWN"])
def test_a_copy_has_nobody_to_go_on_with(reason: str) -> None:
    error = pickle.loads(pickle.dumps(error_for(reason, "text")))
    go_on = error.fetch if reason == "REVISION_CONFLICT" else error.retry
    with pytest.raises(RuntimeError, match="no client"):
        go_on()
    error._operation = lambda: "an operation"
    with pytest.raises(RuntimeError, match="no client"):
        go_on()
    error._run = lambda operation: f"ran {operation}"
    assert go_on() == "ran an operation"


@pytest.mark.parametrize("reason", sorted(ERRORS))
def test_an_error_info_names_the_class(reason: str) -> None:
    failed = refused(grpc.StatusCode.UNKNOWN, reason, {"key": "k"})
    error = from_rpc_error(failed)
    assert type(error) is ERRORS[reason]
    assert (error.reason, error.metadata, str(error)) == (reason, {"key": "k"}, "no")
    assert error.__cause__ is failed


def test_a_reason_of_a_newer_daemon_falls_back_to_its_code() -> None:
    error = from_rpc_error(refused(grpc.StatusCode.NOT_FOUND, "LEASE_NOT_FOUND"))
    assert type(error) is errors.NotFoundError
    assert error.reason == "LEASE_NOT_FOUND"
    error = from_rpc_error(refused(grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED"))
    assert type(error) is errors.InternalError


def without_our_info() -> Iterator[Failed]:
    code = grpc.StatusCode.UNAVAILABLE
    yield Failed(code, "gone")
    yield Failed(code, "gone", None)
    yield refused(code, "KEY_EMPTY", domain="somebody.else", text="gone")
    yield Failed(code, "gone", (("grpc-status-details-bin", b"\xff\xff"),))
    contradicting = refused(code, "KEY_EMPTY")
    yield Failed(code, "gone", contradicting.trailing_metadata())
    torn = status_pb2.Status(code=code.value[0], message="gone")
    info_type = "type.googleapis.com/google.rpc.ErrorInfo"
    torn.details.append(AnyProto(type_url=info_type, value=b"\xff\xff"))
    yield Failed(code, "gone", (("grpc-status-details-bin", torn.SerializeToString()),))


@pytest.mark.parametrize("failed", list(without_our_info()))
def test_what_carries_no_error_info_of_ours_goes_by_its_code(failed: Failed) -> None:
    error = from_rpc_error(failed)
    assert type(error) is errors.UnavailableError
    assert error.reason == "GRPC_UNAVAILABLE"
    assert str(error) == "gone (UNAVAILABLE)"


def test_every_code_has_a_class() -> None:
    for code in set(grpc.StatusCode) - {grpc.StatusCode.OK}:
        error = from_rpc_error(Failed(code, None))
        assert error.reason == f"GRPC_{code.name}"
        assert str(error) == f"the call failed ({code.name})"


def test_errors_can_be_imported_without_grpc() -> None:
    told = "import sys, sessionstore.errors; print(sorted({'grpc', 'google'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"[]\n"

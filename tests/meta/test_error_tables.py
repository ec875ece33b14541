"""Every error reason is mapped both ways: to a gRPC status by the daemon, to an exception class by the SDK.

The contract's comments are the third column: "ERROR_REASON_X: why. CODE. Metadata: ..." names the code.
"""

import re
from collections.abc import Mapping

import grpc
import pytest
import sessionstore.errors
import sessionstored.status
from meta.tools import ROOT
from sessionstore.v1 import errors_pb2

REASONS = {value.name.removeprefix("ERROR_REASON_") for value in errors_pb2.ErrorReason.DESCRIPTOR.values}
REASONS.remove("UNSPECIFIED")
STATUSES = sessionstored.status.CODES
ERRORS = sessionstore.errors.ERRORS


def documented_codes() -> dict[str, str]:
    """Reason -> the code that its comment in the contract names."""
    text = re.sub(r"\n\s*//", "", (ROOT / "proto/sessionstore/v1/errors.proto").read_text())
    codes = "|".join(code.name for code in grpc.StatusCode)
    found = re.findall(rf"ERROR_REASON_(\w+): [^\n]*?\. ({codes})\. (?:Metadata: |No metadata)", text)
    return dict(found)


def test_every_reason_is_documented_with_its_code():
    assert set(documented_codes()) == REASONS


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_the_daemon_answers_each_reason_with_the_documented_code(reason):
    assert STATUSES[reason].name == documented_codes()[reason]


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_the_sdk_raises_its_own_class_for_each_reason(reason):
    cls = ERRORS[reason]
    assert issubclass(cls, sessionstore.errors.SessionStoreError)


@pytest.mark.parametrize("table", [STATUSES, ERRORS], ids=["daemon", "sdk"])
def test_no_table_knows_a_reason_that_the_contract_does_not(table: Mapping[str, object]):
    assert set(table) - REASONS == set()

"""The contract and what is generated from it."""

import sys

import pytest
from meta.tools import BIN, ROOT, output_of


@pytest.mark.timeout(300)  # on first use it makes the generator's environment
def test_generated_code_is_fresh():
    output_of(sys.executable, "proto/generate.py", "--check", timeout_s=280)


def test_buf_lint_passes():
    output_of(BIN / "buf", "lint", cwd=ROOT / "proto")

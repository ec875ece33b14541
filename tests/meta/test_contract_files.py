"""The contract and what is generated from it."""

import sys

from meta.tools import BIN, ROOT, output_of


def test_generated_code_is_fresh():
    # On first use it makes the generator's environment.
    output_of(sys.executable, "proto/generate.py", "--check", timeout_s=500)


def test_buf_lint_passes():
    output_of(BIN / "buf", "lint", cwd=ROOT / "proto")

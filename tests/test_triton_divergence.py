"""The Triton kernel of the divergences in Triton's interpreter, on the very tests that the CPU kernel passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    tests = Path(__file__).with_name("test_divergence.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(tests), "-k", "Triton"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr

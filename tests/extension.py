"""The compiled CPU kernels in tests: where they are asked for, and their versions for lower instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import smart_kernels

requires_extension = pytest.mark.skipif(
    smart_kernels.COMPILED["_C"] is not None, reason="the compiled CPU kernels are not built here"
)


def for_each_lower_instruction_set(test: Callable[[str], None]) -> Callable[[str], None]:
    """Run a test once per instruction set below this machine's, as its argument `isa`."""
    test = pytest.mark.parametrize("isa", ["baseline", "avx2"])(test)
    once = "this run is for one instruction set already"
    return requires_extension(pytest.mark.skipif("SMART_KERNELS_ISA" in os.environ, reason=once)(test))


def run_again(file: str | Path, selection: str, **environment: str) -> None:
    """Run the tests of a file that a selection names, in a process with more in its environment."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(file), "-k", selection],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr

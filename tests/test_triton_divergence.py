"""The Triton kernel of the divergences in Triton's interpreter, on the very tests that the CPU kernel passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from extension import run_again

pytest.importorskip("triton")


@pytest.mark.parametrize("which", ["30522", "9000", "not (30522 or 9000)"], ids=["longest", "long", "others"])
def test_interpreted(which: str) -> None:
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    run_again(Path(__file__).with_name("test_divergence.py"), f"Triton and {which}", TRITON_INTERPRET="1")

"""Doubles as arguments of a launch, which Triton would round to float32: they travel as their bits."""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def bits(x: float) -> int:
    """The bits of a double."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


@triton.jit
def as_number(bits):
    """The double of these bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)

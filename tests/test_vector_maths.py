"""The vector maths of csrc/cpu/vec.h, over all floats that it is for, against double; every instruction set."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from extension import for_each_lower_instruction_set, run_again
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
FUNCTIONS = ("expm1_small", "exp_small", "exponential", "log_positive", "log1p", "square_root", "reciprocal")
LEAST, MOST = 2.0**-126, 3.4028234663852886e38
HALF_LN2 = math.log(2) / 2
FEW = 61
"""Where a result is rounded from a number that is much smaller than the argument, or follows from others by a shift of
the exponent, one float in so many will do: a prime, so that all patterns of the lowest bits occur."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    path = tmp_path_factory.mktemp("vector_maths") / "vector_maths.so"
    folders = [f"-I{folder}" for folder in (HERE, HERE.parent / "csrc", *include_paths())]
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-Wno-psabi"]
    subprocess.run([compiler, *flags, *folders, str(HERE / "vector_maths.cpp"), "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    found.isa.restype = ctypes.c_char_p
    return found


def worst(library: ctypes.CDLL, function: str, begin: float, end: float, step: int) -> tuple[float, float]:
    """The largest error from one float to another of the same sign, in units in the last place, and where it is."""
    bits = [ctypes.c_uint32(struct.unpack("I", struct.pack("f", x))[0]) for x in (begin, end)]
    result = (ctypes.c_double * 2)()
    library.worst(FUNCTIONS.index(function), *bits, step, result)
    return result[0], result[1]


@pytest.mark.parametrize(
    ("function", "begin", "end", "step", "bounds"),
    [
        ("expm1_small", 0.0, 2**-12, FEW, (0.501, 0.501, 0.501)),
        ("expm1_small", -0.0, -(2**-12), FEW, (0.501, 0.501, 0.501)),
        ("expm1_small", 2**-12, 0.5, 1, (0.94, 0.94, 1.09)),
        ("expm1_small", -(2**-12), -0.5, 1, (0.94, 0.94, 1.09)),
        ("exp_small", 0.0, 2**-12, FEW, (0.501, 0.501, 0.501)),
        ("exp_small", -0.0, -(2**-12), FEW, (0.501, 0.501, 0.501)),
        ("exp_small", 2**-12, HALF_LN2, 1, (0.74, 0.74, 1.02)),
        ("exp_small", -(2**-12), -HALF_LN2, 1, (0.74, 0.74, 1.02)),
        ("exponential", -0.0, -(2**-13), FEW, (0.501, 0.501, 0.501)),
        ("exponential", -(2**-13), -87.33654, 1, (1.07, 0.91, 1.18)),
        ("exponential", 0.0, 2**-13, FEW, (0.501, 0.501, 0.501)),
        ("exponential", 2**-13, 80.0, FEW, (1.07, 0.91, 1.18)),
        ("exponential", -math.inf, -math.inf, 1, (0, 0, 0)),
        ("log_positive", LEAST, 0.25, FEW, (0.75, 0.75, 0.85)),
        ("log_positive", 0.25, 4.0, 1, (0.75, 0.75, 0.85)),
        ("log_positive", 4.0, MOST, FEW, (0.75, 0.75, 0.85)),
        ("log1p", 0.0, 2**-12, FEW, (2.5, 2.5, 2.5)),
        ("log1p", -0.0, -(2**-12), FEW, (2.5, 2.5, 2.5)),
        ("log1p", 2**-12, 1.0, 1, (2.5, 2.5, 2.5)),
        ("log1p", -(2**-12), -1 + 2**-24, 1, (2.5, 2.5, 2.5)),
        ("log1p", 1.0, 2.0**126, FEW, (2.5, 2.5, 2.5)),
        ("square_root", 0.0, LEAST, FEW, (0.9, 0.5, 0.5)),
        ("square_root", LEAST, 1.0, FEW, (0.9, 0.5, 0.5)),
        ("square_root", 1.0, 4.0, 1, (0.9, 0.5, 0.5)),
        ("square_root", 4.0, MOST, FEW, (0.9, 0.5, 0.5)),
        ("reciprocal", LEAST, 1.0, FEW, (1.0, 0.5, 0.5)),
        ("reciprocal", 1.0, 2.0, 1, (1.0, 0.5, 0.5)),
        ("reciprocal", 2.0, 2.0**126, FEW, (1.0, 0.5, 0.5)),
    ],
)
def test_error_in_units_in_the_last_place(
    library: ctypes.CDLL, function: str, begin: float, end: float, step: int, bounds: tuple[float, float, float]
) -> None:
    units, at = worst(library, function, begin, end, step)
    assert units <= dict(zip((b"AVX-512", b"AVX2", b"baseline"), bounds, strict=True))[library.isa()], at


def test_what_would_be_subnormal_is_zero(library: ctypes.CDLL) -> None:
    units, at = worst(library, "exponential", -87.33655, -MOST, FEW)
    assert 2.0**23 - 64 < units <= 2.0**23, at  # almost 2^-126 is lost, in units of 2^-149; and never more


@for_each_lower_instruction_set
def test_every_instruction_set(isa: str) -> None:
    run_again(__file__, "error_in_units or subnormal", SMART_KERNELS_ISA=isa)

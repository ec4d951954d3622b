"""Every Triton kernel compiled ahead of time for cards that are not there: registers, spills, width of the accesses.

A kernel is added with a function of classes or features and dtype that returns a launcher and its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from gpu_code import TARGETS, ahead_of_time
from smart_kernels import reference
from smart_kernels.triton_kernels import divergence

Launch = tuple[Callable[..., Any], tuple[Any, ...]]
MEAN, BATCHMEAN = 2, 3


def loss_and_gradients(cols: int, dtype: torch.dtype) -> Launch:
    a, b = torch.empty(2, 256, cols, dtype=dtype)
    return divergence.divergence_forward_backward, (a, b, None, BATCHMEAN, False, True, True)


def loss_alone(cols: int, dtype: torch.dtype) -> Launch:
    a, b = torch.empty(2, 256, cols, dtype=dtype)
    return divergence.divergence, (a, b, None, BATCHMEAN, False)


def gradient_of_one_side(cols: int, dtype: torch.dtype) -> Launch:
    a, b = torch.empty(2, 256, cols, dtype=dtype)
    return divergence.divergence_grad, (a, b, None, BATCHMEAN, False)


NARROW = (torch.float32, torch.bfloat16)
CASES = [
    *((loss_and_gradients, cols, dtype) for cols in (3, 1024, 16384, 30522, 131072) for dtype in NARROW),
    *((launch, cols, torch.bfloat16) for launch in (loss_alone, gradient_of_one_side) for cols in (1024, 16384)),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("launch", "cols", "dtype"), CASES, ids=[f"{case[0].__name__}-{case[1]}-{case[2]}" for case in CASES]
)
def test_no_spills_and_accesses_as_wide_as_rows_are_aligned(
    target: str, launch: Callable[[int, torch.dtype], Launch], cols: int, dtype: torch.dtype
) -> None:
    launcher, arguments = launch(cols, dtype)
    (code,) = ahead_of_time(target, launcher, *arguments)
    width = math.gcd(16, cols * dtype.itemsize)
    if target == "gfx942" and cols == 16384 and launch is not loss_alone:
        width = min(width, 4 * dtype.itemsize)  # its warps have twice the threads, which leaves each 4 elements
    assert code.spills == code.scratch == 0
    assert set(code.loads) == {width}
    assert launch is loss_alone or code.stores[width] > 0
    # Beside the gradients, one store of the rows' losses is left.
    assert sum(count for bytes_, count in code.stores.items() if bytes_ != width) <= 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "cols"), [("js", 1024), ("js", 131072), ("kl", 131072)])  # js needs most registers
def test_other_kinds_do_not_spill(target: str, kind: str, cols: int) -> None:
    a, b = torch.empty(2, 256, cols)
    options = None, BATCHMEAN, False, True, True, list(reference.KINDS).index(kind), 0.5, 2.0
    (code,) = ahead_of_time(target, divergence.divergence_forward_backward, a, b, *options)
    assert code.spills == code.scratch == 0
    assert set(code.loads) == {16}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", NARROW)
def test_few_long_rows_are_split_without_spills(target: str, dtype: torch.dtype) -> None:
    a, b = torch.empty(2, 64, 131072, dtype=dtype)
    codes = ahead_of_time(target, divergence.divergence_forward_backward, a, b, None, BATCHMEAN, False, True, True)
    assert [code.programs for code in codes] == [256, 256]
    for code in codes:
        assert code.spills == code.scratch == 0
        assert code.loads[16] > 0
    assert codes[1].stores[16] > 0

"""The perturbation's Triton kernels on a machine with no GPU: interpreted, executed as PTX, their machine code read."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from extension import run_again
from oracle import PerturbationStep, wide

pytest.importorskip("triton")

from gpu_evidence import executed, ptxrun

from gpu_code import TARGETS, ahead_of_time
from smart_kernels import reference
from smart_kernels.triton_kernels import perturbation as kernels

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
STEP, EPSILON = 2e-5, 1e-5

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="compiles, which the interpreter stands in for"
)


def test_interpreted() -> None:
    """The cases of test_perturbation in a process whose Triton interprets the kernels."""
    run_again(Path(__file__).with_name("test_perturbation.py"), "", TRITON_INTERPRET="1")


def codes(way: tuple[str, str, str]) -> tuple[int, int, int]:
    return reference.NORMS.index(way[0]), reference.SCOPES.index(way[1]), reference.ASCENTS.index(way[2])


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, one element beyond an aligned address."""
    memory = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "misaligned": misaligned,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
# shape, dtype of grad, way, dtype of mask, layout of grad; the last four are longer than a program can hold
EXECUTED = [
    ((3, 5, 33), F32, ("linf", "sample", "normalized"), torch.int64, "contiguous"),
    ((3, 5, 33), BF16, ("l2", "sample", "normalized"), torch.bool, "transposed"),
    ((5, 7, 96), F16, ("linf", "token", "sign"), F32, "contiguous"),
    ((4, 9, 65), F32, ("l2", "token", "raw"), None, "misaligned"),
    ((4, 9, 64), F32, ("linf", "token", "normalized"), torch.int32, "features first"),
    ((2, 3, 40), F64, ("l2", "sample", "normalized"), torch.int64, "contiguous"),
    ((2, 40, 520), F32, ("linf", "sample", "normalized"), torch.int64, "contiguous"),
    ((2, 40, 520), BF16, ("l2", "sample", "sign"), torch.uint8, "transposed"),
    ((1, 30, 300), F64, ("l2", "sample", "normalized"), None, "expanded"),
    ((1, 2, 17001), F16, ("l2", "token", "normalized"), F16, "misaligned"),
]


def check_executed(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    way: tuple[str, str, str],
    mask_dtype: torch.dtype | None,
    layout: str,
    **options: Any,
) -> list[Any]:
    delta = EPSILON * torch.randn(shape, dtype=F64).to(reference.compute_dtype(torch.empty(0, dtype=dtype)))
    grad = LAYOUTS[layout](torch.randn(shape, dtype=F64).to(dtype))
    mask = None
    if mask_dtype is not None:
        mask = (torch.rand(shape[:-1]) < 0.7).to(mask_dtype)
        mask[0, 0] = 1
        if layout != "expanded":
            grad[mask == 0] = math.nan  # neither read into a norm nor into a result
    grad[0, 0, 0] = math.inf
    truth = PerturbationStep(delta, grad, mask, STEP, EPSILON, *way)
    out, skipped = torch.full(shape, math.nan, dtype=delta.dtype), torch.full((1,), 7)
    with executed(ptxrun(), approx_ulp=2, **options) as launches:
        kernels._step(delta, grad, out, mask, skipped, STEP, EPSILON, *codes(way))
        kernels._step(delta, grad, delta, mask, None, STEP, EPSILON, *codes(way))
    truth.check(out, skipped - 7)
    assert torch.equal(delta, out)
    return launches


@pytest.mark.parametrize(("shape", "dtype", "way", "mask", "layout"), EXECUTED)
def test_executed(
    shape: tuple[int, ...], dtype: torch.dtype, way: tuple[str, str, str], mask: torch.dtype | None, layout: str
) -> None:
    launches = check_executed(shape, dtype, way, mask, layout, order="shuffle")
    assert len(launches) == (4 if math.prod(shape[1:]) > 8192 else 2)


@pytest.mark.parametrize(("shape", "dtype", "way", "mask", "layout"), [EXECUTED[i] for i in (0, 7, 8)])
def test_executed_without_races(
    shape: tuple[int, ...], dtype: torch.dtype, way: tuple[str, str, str], mask: torch.dtype | None, layout: str
) -> None:
    for launch in check_executed(shape, dtype, way, mask, layout, racecheck=True):
        assert launch.races == []


@pytest.mark.parametrize("factor", [1e-44, 1e-40, 1e-30, 1.0, 1e30, 7e37])
def test_executed_with_any_factor_on_the_gradient(factor: float) -> None:
    """A GPU's arithmetic keeps subnormal numbers as well, where the compiled code asks for it."""
    delta, grad = EPSILON * torch.randn(2, 3, 33), factor * torch.randn(2, 3, 33).clamp(-4, 4)
    for way in (("linf", "sample", "normalized"), ("l2", "sample", "normalized"), ("l2", "sample", "raw")):
        truth = PerturbationStep(delta, grad, None, STEP, EPSILON, *way)
        with executed(ptxrun(), approx_ulp=2):
            truth.check(kernels.perturbation_step(delta, grad, None, None, STEP, EPSILON, *codes(way)))


def sparse_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any size, of which only what is touched takes memory."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, which Python names from 3.13 on
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | no_reserve)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.mark.parametrize(
    ("shape", "way", "rows", "programs"),
    [
        ((2**21, 2, 520), ("linf", "token", "normalized"), 2, 2),  # the last tokens of 2^22
        ((2**17, 33, 520), ("l2", "sample", "normalized"), 33, 9),  # the splits of the last sample
        ((1, 2**22, 520), ("l2", "sample", "normalized"), 40, 1),  # the last split of a sample
    ],
)
def test_executed_past_two_to_the_31_elements(
    shape: tuple[int, ...], way: tuple[str, str, str], rows: int, programs: int
) -> None:
    """All is 0 but the last rows, and the last programs alone are run."""
    delta, grad, mask = sparse_memory(shape, F32), sparse_memory(shape, BF16), sparse_memory(shape[:-1], torch.uint8)
    last = delta.view(1, -1, 520)[:, -rows:], grad.view(1, -1, 520)[:, -rows:], mask.view(1, -1)[:, -rows:]
    last[0][:], last[1][:], last[2][:] = EPSILON * torch.randn(rows, 520), torch.randn(rows, 520), 1
    last[2][0, 0] = 0
    truth = PerturbationStep(*last, STEP, EPSILON, *way)
    tool = ptxrun()
    run = tool.run_triton

    def run_last(kernel: Any, grid: tuple[int], *args: Any, **kwargs: Any) -> Any:
        return run(kernel, grid, *args, ctas=(grid[0] - programs, grid[0]), **kwargs)

    # zeros are what the other programs would have left
    zeros = mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with zeros, mock.patch.object(tool, "run_triton", run_last), executed(tool):
        kernels.perturbation_step_(delta, grad, mask, None, STEP, EPSILON, *codes(way))
    truth.check(last[0])
    assert not delta.view(-1, 520)[-rows - 3 : -rows].any()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("masked", [False, True])
def test_start_executed(dtype: torch.dtype, masked: bool) -> None:
    shape = (3, 5, 131)
    mask = torch.arange(15).view(3, 5) % 4 if masked else None
    expected = oracle.normal(-77, math.prod(shape)).reshape(shape)
    if mask is not None:
        expected[mask.numpy() == 0] = 0
    with executed(ptxrun(), approx_ulp=2):
        out = kernels.init_perturbation(torch.empty(shape, dtype=dtype), torch.tensor(-77), mask, 1e-5)
    # fp32's roundings of the radius, which is at most 6.66; the logarithm is an approximate instruction
    oracle.compare(wide(out), 1e-5 * expected, 0 * expected + 6.66e-5 * 2.0**-20, "normal")


# Which launches are compiled for every target: shape, dtypes of delta and grad, norm, scope
COMPILED = [
    ((32, 128, 768), F32, F32, "linf", "token"),
    ((32, 128, 768), F32, BF16, "l2", "token"),
    ((32, 128, 768), F32, F32, "l2", "token"),
    ((256, 16, 768), F32, F32, "l2", "sample"),
    ((32, 128, 768), F32, BF16, "linf", "sample"),
    ((32, 128, 768), F32, F32, "linf", "sample"),
    ((1, 4096, 1024), F32, F16, "l2", "sample"),
    ((8, 64, 768), F64, F64, "l2", "sample"),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("shape", "delta", "grad", "norm", "scope"), COMPILED)
def test_no_spills_and_wide_accesses(
    shape: tuple[int, ...], delta: torch.dtype, grad: torch.dtype, norm: str, scope: str, target: str
) -> None:
    delta, grad = torch.empty(shape, dtype=delta), torch.empty(shape, dtype=grad)
    mask, skipped = torch.ones(shape[:-1], dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    way = codes((norm, scope, "normalized"))
    found = ahead_of_time(target, kernels.perturbation_step, delta, grad, mask, skipped, STEP, EPSILON, *way)
    for code in found:
        assert code.spills == code.scratch == 0
        # What is not 16 bytes wide are numbers of a whole unit and the mask's, one for several elements; and of a
        # narrow gradient the 4 elements, 8 bytes, that each of 256 threads has: 512 in a row for the 64 of a wave.
        wave = target == "gfx942" and grad.dtype.itemsize == 2
        assert code.loads[16] + (code.loads[8] if wave else 0) >= 2
        assert code.loads[1] == code.loads[2] == 0
        if code.kernel != "_gather_kernel":
            assert set(code.stores) == {16}


@pytest.mark.parametrize("target", TARGETS)
def test_start_without_spills_and_with_wide_stores(target: str) -> None:
    embeds, mask = torch.empty(32, 128, 768), torch.ones(32, 128, dtype=torch.int64)
    (code,) = ahead_of_time(target, kernels.init_perturbation, embeds, torch.tensor(1), mask, 1e-5)
    assert code.spills == 0
    assert set(code.stores) == {16}

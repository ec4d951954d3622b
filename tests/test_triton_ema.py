"""The Triton kernel of ema_update_ in Triton's interpreter, on the tests that the CPU kernel passes; its machine code.

What a card would run, the compiled PTX, is executed in test_gpu_ema.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from extension import run_again

pytest.importorskip("triton")
from gpu_code import TARGETS, ahead_of_time
from smart_kernels.ops import _chunks
from smart_kernels.triton_kernels import ema

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="compiles, which the interpreter stands in for"
)
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def test_interpreted() -> None:
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    tests = Path(__file__).with_name("test_ema.py")
    # It rounds to bfloat16 towards zero: a copy of other dtypes is left out, and held to the bit in test_gpu_ema.py.
    selection = "triton and (many_tensors or decay_one or special_values or leaves_wide_shadows)"
    selection += " and not (decay_one and (dtypes3 or dtypes5))"
    run_again(tests, selection, TRITON_INTERPRET="1")


def test_the_kernel_knows_the_table() -> None:
    assert (ema._CHUNK.value, ema._NOISE_GROUP.value) == (_chunks.CHUNK, _chunks.NOISE_GROUP)
    dtypes = [str(ema._dtype.fn(i) if hasattr(ema._dtype, "fn") else ema._dtype(i)) for i in range(4)]
    assert dtypes == ["fp32", "bf16", "fp16", "fp64"]
    assert _chunks.DTYPES == (F32, BF16, F16, F64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("shadow", "parameter", "stochastic"),
    [
        (F32, F32, False),
        (F32, BF16, False),
        (BF16, BF16, False),
        (F16, F32, False),
        (F64, F64, False),
        (BF16, BF16, True),
        (F16, F32, True),
    ],
)
def test_machine_code(shadow: torch.dtype, parameter: torch.dtype, stochastic: bool, target: str) -> None:
    """No spills, 16 bytes to an access of the wider dtype, as few registers as hide the memory's latency."""
    dtypes = 1 << _chunks.DTYPES.index(shadow) + 4 * _chunks.DTYPES.index(parameter)
    table, seed = torch.zeros(7, 100, dtype=torch.int64), torch.tensor(1) if stochastic else None
    (code,) = ahead_of_time(target, ema.ema_update_chunks, table, dtypes, 0.9, None, seed)
    assert code.spills == code.scratch == 0
    assert code.loads[16] > 0
    assert code.stores[16 if shadow.itemsize >= parameter.itemsize else 16 * shadow.itemsize // parameter.itemsize] > 0
    # Of 65536 registers, four programs of 256 threads; two where random numbers are made, which takes arithmetic.
    if target != "gfx942":
        assert code.registers <= 65536 // (256 * (2 if stochastic else 4))


@pytest.mark.parametrize(
    ("decay", "seed", "message"),
    [
        (torch.tensor(0.9).bfloat16(), None, "decay_tensor of shape .* expected one number in torch.float32 or"),
        (torch.tensor([0.5, 0.5]), None, "decay_tensor"),
        (None, torch.tensor(1).int(), "seed of shape .* torch.int32 on cpu, expected one number in torch.int64"),
        (None, torch.tensor([1, 2]), "seed"),
    ],
)
def test_no_wrong_numbers_are_read(decay: torch.Tensor | None, seed: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ema.ema_update_chunks(torch.zeros(7, 1, dtype=torch.int64), 1, 0.9, decay, seed)

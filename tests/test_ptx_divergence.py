"""What a card would run: the compiled PTX of the divergences, executed on the CPU with every access checked.

An access outside a tensor, or one wider than its address is aligned, raises. Outputs are allocated full of NaN. The
approximate instructions (ex2, lg2, rcp, division) return up to 2 units in the last place beside what they should.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from oracle import Divergence

pytest.importorskip("triton")
import triton
from gpu_evidence import executed, ptxrun

from smart_kernels import reference
from smart_kernels.triton_kernels import divergence as launchers
from smart_kernels.triton_kernels import tiles

NONE, SUM, MEAN, BATCHMEAN = range(4)
CHECKED = {"racecheck": True, "approx_ulp": 2}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return ptxrun()


@pytest.fixture(autouse=True)
def _outputs_full_of_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def logits(cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of each kind: logits that differ by 1e-6 to 20, by a constant, in one class alone, altogether."""
    b = 2 * torch.randn(13, cols, dtype=torch.float64)
    noise = torch.randn(13, cols, dtype=torch.float64)
    a = b + torch.tensor([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1, 5, 20, 1e-3, 0, 0]).unsqueeze(-1) * noise
    a[10] += 100
    a[11, b[11].argmax()] += 3
    a[12] = noise[12]
    return a.to(dtype), b.to(dtype)


def check(
    tool: ModuleType,
    a: torch.Tensor,
    b: torch.Tensor,
    kind: str = "symmetric_kl",
    temperature: float = 1.0,
    **options: bool,
) -> int:
    """All within the bars; returns how many launches it took."""
    code = list(reference.KINDS).index(kind), 0.3, temperature
    with executed(tool, **CHECKED | options) as launches:
        loss, *grads = launchers.divergence_forward_backward(a, b, None, NONE, False, True, True, *code)
    assert not any(launch.races for launch in launches)
    truth = Divergence(a, b, kind, 0.3, temperature)
    truth.check_loss(loss)
    truth.check_grads(*grads)
    return len(launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [2, 3, 33, 1000, 30522])
def test_accuracy(tool: ModuleType, cols: int, dtype: torch.dtype) -> None:
    check(tool, *logits(cols, dtype))


@pytest.mark.parametrize("kind", list(reference.KINDS)[1:])
def test_accuracy_of_every_kind(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    a, b = logits(33, torch.float32)
    a[10, 0] = b[11, 1] = -math.inf  # masked on one side
    check(tool, a, b, kind)
    check(tool, *logits(1000, torch.bfloat16), kind, 1.7)
    check(tool, *(x[::3] for x in logits(9, torch.float64)), kind)
    a, b = (x[1::3] for x in logits(9000, torch.float32))
    assert check(tool, a, b, kind) == 3  # in splits
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    assert check(tool, a, b, kind, 0.6) == 1
    same = a.clone()
    with executed(tool):
        code = list(reference.KINDS).index(kind)
        results = launchers.divergence_forward_backward(a, same, None, SUM, False, True, True, code)
    assert all((result == 0).all() for result in results)


@pytest.mark.parametrize("cols", [33, 9000])
def test_accuracy_with_a_temperature(tool: ModuleType, cols: int) -> None:
    check(tool, *logits(cols, torch.float32), temperature=1.7)


@triton.constexpr_function
def _two_kept(blocks: int, hip: bool, blackwell: bool) -> int:
    return 2


@pytest.mark.parametrize(
    ("cols", "dtype", "kept"),
    [
        (9000, torch.float32, 3),
        (9001, torch.float32, 3),
        (16382, torch.bfloat16, 4),
        (16384, torch.float32, 4),
        (16383, torch.bfloat16, 2),  # as on AMD and Blackwell: the others are read again
    ],
)
def test_accuracy_of_rows_held_in_registers(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cols: int, dtype: torch.dtype, kept: int
) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 1)  # else so few rows are split
    if kept == 2:
        monkeypatch.setattr(tiles, "blocks_kept", _two_kept)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # which does not know of the change
    a, b = logits(cols, dtype)
    check(tool, a, b)
    with executed(tool, **CHECKED):
        grad = launchers.divergence_grad(a[3:7], b[3:7], None, SUM, False)
    Divergence(a[3:7], b[3:7]).check_grads(grad, torch.empty(0))


@pytest.mark.parametrize(("cols", "dtype"), [(33, torch.float16), (40, torch.float64), (262144, torch.float32)])
def test_accuracy_of_other_dtypes_and_of_a_quarter_of_a_million_classes(
    tool: ModuleType, cols: int, dtype: torch.dtype
) -> None:
    a, b = logits(cols, dtype)
    check(tool, *((a, b) if cols < 1000 else (a[::4], b[::4])))


@pytest.mark.parametrize(("cols", "dtype"), [(33, torch.float32), (1000, torch.bfloat16), (9000, torch.bfloat16)])
def test_rows_at_odd_offsets(tool: ModuleType, cols: int, dtype: torch.dtype) -> None:
    a, b = (torch.nn.functional.pad(x, (1, 2), value=math.nan)[:, 1:-2] for x in logits(cols, dtype))
    check(tool, a, b)


def test_two_groups_of_rows_and_strided_classes(tool: ModuleType) -> None:
    a, b = (x[:12].view(3, 4, 40) for x in logits(40, torch.float32))
    check(tool, a.transpose(0, 1).contiguous().transpose(0, 1), b.transpose(0, 2).contiguous().transpose(0, 2))


@pytest.mark.parametrize(("cols", "dtype"), [(1000, torch.float32), (9000, torch.bfloat16)])
def test_equal_logits_give_exact_zeros(tool: ModuleType, cols: int, dtype: torch.dtype) -> None:
    a = logits(cols, dtype)[0][:3].bfloat16().to(dtype)
    b = a.clone()
    if dtype == torch.float32:
        b[1:] += 8  # exact, for numbers of 8 bits
    with executed(tool):
        results = launchers.divergence_forward_backward(a, b, None, SUM, False, True, True)
    assert all((result == 0).all() for result in results)


@pytest.mark.parametrize(("cols", "programs"), [(33, 1), (9000, 256), (9000, 1)])
def test_weights_upstream_and_special_rows(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, cols: int, programs: int
) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", programs)
    a, b = logits(cols, torch.float32)
    a[12], b[12] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min  # as some mask
    weight = torch.rand(13)
    a[0], b[1], weight[:2] = math.nan, math.inf, 0  # whatever a row of weight 0 holds
    a[2, 1] = b[2, 1] = -math.inf  # absent
    a[3, 2] = -math.inf  # masked on one side
    a[4, 3] = math.nan
    a[5] = b[5] = -math.inf
    truth, upstream = Divergence(a, b), torch.tensor(0.5)
    with executed(tool, **CHECKED) as launches:
        rows = launchers.divergence(a, b, weight, NONE, False)
        grads = launchers.divergence_backward(upstream, a, b, weight, MEAN, False, True, True)
        detached = launchers.divergence_grad(a, b, weight, SUM, True)
    assert not any(launch.races for launch in launches)
    counted = [2, 6, 7, 8, 9, 10, 11, 12]
    scale = weight.numpy()[counted]
    error = np.abs(rows.numpy()[counted] - scale * truth.loss[counted])
    bar = 1e-5 * truth.loss + 2.0**-21 * truth.distance * np.sqrt(truth.loss)
    assert (error <= scale * bar[counted]).all()
    assert (rows[:2] == 0).all()
    assert rows[3] == math.inf
    assert rows[4:6].isnan().all()
    for grad, expected, factor in (
        (grads[0], truth.grads[0], 0.5 / weight.sum().item()),
        (grads[1], truth.grads[1], 0.5 / weight.sum().item()),
        (detached, truth.detached[0], 1.0),
    ):
        assert (grad[:2] == 0).all()
        assert grad[3:6].isnan().all()
        assert grad[2, 1] == 0
        expected = factor * scale[:, None] * expected[counted]
        error = np.linalg.norm((grad.numpy()[counted] - expected).astype(np.float64), axis=-1)
        bar = 1e-5 * np.linalg.norm(expected.astype(np.float64), axis=-1)
        assert (error <= bar + 2.0**-20 * factor * scale * truth.distance[counted]).all()


@pytest.mark.parametrize(
    ("cols", "strides", "block"), [(33, (2**31, 1), 64), (130, (1, 2**24), 256), (130, (1, 2**24), 64)]
)
def test_offsets_beyond_32_bits(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, cols: int, strides: tuple[int, int], block: int
) -> None:
    for kernel in ("symmetric_kl", "symmetric_kl, odd"):
        monkeypatch.setitem(tiles.TILES, kernel, {math.inf: tiles.Tile(1, block, 1)})
    a, b = (x[:2] for x in logits(cols, torch.float16))
    memory = torch.from_numpy(np.empty(2**31 + 2**26, np.float16))  # of which hardly a page is touched
    check(tool, memory.as_strided(a.shape, strides).copy_(a), b, racecheck=False)


@pytest.mark.parametrize("cols", [9000, 41000])
def test_rows_in_splits_or_whole(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, cols: int) -> None:
    """Five blocks in eight splits, of which three have none."""
    a, b = logits(cols, torch.float32)
    for programs, launched in ((1, 1), (256, 2)):
        monkeypatch.setattr(tiles, "PROGRAMS", programs)
        assert check(tool, a, b) == launched


def test_any_order_of_the_programs_gives_the_same_bits(tool: ModuleType) -> None:
    a, b = logits(33, torch.float32)
    results = []
    for order in ("seq", "rev", "shuffle"):
        with executed(tool, order=order, **CHECKED):
            results.append(launchers.divergence_forward_backward(a, b, None, NONE, False, True, True))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], result, strict=True))


def test_no_rows_launch_nothing(tool: ModuleType) -> None:
    a = torch.empty(0, 33)
    with executed(tool) as launches:
        for reduction in range(len(reference.REDUCTIONS)):
            torch.testing.assert_close(
                launchers.divergence(a, a, None, reduction, False),
                reference.divergence(a, a, None, reduction, False),
                equal_nan=True,
            )
            assert launchers.divergence_backward(None, a, a, None, reduction, False, True, False)[0].shape == a.shape
    assert not launches

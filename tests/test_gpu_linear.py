"""The row kernel behind a head in Triton: interpreted, compiled for cards that are not there, and its PTX executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from extension import run_again

pytest.importorskip("triton")
from gpu_evidence import executed, ptxrun

from gpu_code import TARGETS, ahead_of_time
from gpu_report import predict, rows_work
from smart_kernels import reference
from smart_kernels.triton_kernels import divergence as launchers
from smart_kernels.triton_kernels import tiles

KINDS = list(reference.KINDS)


def rows_of(cols: int, parts: int = 3) -> torch.Tensor:
    """Logits, the differences to others that are near and far, room for the gradients' sum."""
    b = 2 * torch.randn(4, cols)
    d = torch.tensor([1e-6, 1e-3, 1.0, 0.0]).unsqueeze(-1) * torch.randn(4, cols)
    return torch.stack([b, d, torch.full_like(b, torch.nan)][:parts])


def test_interpreted() -> None:
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    selection = "masked or (symmetric and (equal_hidden or detached or long_rows))"
    run_again(Path(__file__).with_name("test_linear_divergence.py"), selection, TRITON_INTERPRET="1")


@pytest.mark.parametrize(("cols", "kind", "programs"), [
    (33, "symmetric_kl", 1), (5000, "symmetric_kl", 1), (5000, "js", 256),
])  # fmt: skip
def test_executed(monkeypatch: pytest.MonkeyPatch, cols: int, kind: str, programs: int) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", programs)
    rows = rows_of(cols)
    truth, weight = rows.double(), torch.tensor([1.0, 0.5, 2.0, 0.0])
    options = True, True, False, KINDS.index(kind), 0.3, 1.0
    with executed(ptxrun(), racecheck=True, approx_ulp=2) as launches:
        loss = launchers.divergence_rows_(rows, weight, torch.tensor([0.25]), *options)
    assert not any(launch.races for launch in launches)
    expected = reference.divergence_rows_(truth, weight.double(), torch.tensor([0.25]).double(), *options)
    # As the gradients' own bars; their sum, formed from the classes' shares of the loss, loses no more.
    assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, part in zip(rows, truth, strict=True):
        error, norm = (ours - part).norm(dim=-1), part.norm(dim=-1)
        assert (error <= 3e-5 * norm).all(), (error / norm).tolist()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("cols", "kind"), [
    (50257, "symmetric_kl"), (50257, "js"), (1024, "symmetric_kl"), (2048, "total_variation"), (8192, "js"),
])  # fmt: skip
def test_no_spills(target: str, cols: int, kind: str) -> None:
    rows = torch.empty(3, 256, cols)
    options = True, True, False, KINDS.index(kind), 0.5, 1.0
    (code,) = ahead_of_time(target, launchers.divergence_rows_, rows, None, torch.empty(1), *options)
    assert code.spills == code.scratch == 0


@pytest.mark.parametrize(("cols", "kind"), [(1000, "symmetric_kl"), (16384, "symmetric_kl"), (16384, "js")])
def test_bytes_are_the_least(cols: int, kind: str) -> None:
    """Of memory: what a program reads again of its row is in the card's cache still, beside all rows at work."""
    (row,) = predict(rows_work(1024, cols, kind), "sm_90")
    assert row.spills == 0
    assert row.from_memory <= 1.05 * row.minimum
    assert row.load_bytes[0] == row.store_bytes[0] == 16

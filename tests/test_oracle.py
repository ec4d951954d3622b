"""The oracle itself, against its definition in 60 digits."""

from __future__ import annotations

import pytest
import torch
from oracle import SymmetricKL

mpmath = pytest.importorskip("mpmath")


def definition(a: list, b: list) -> tuple:
    """Loss and gradients as the textbook has them, for rows of mpmath numbers."""
    p, q = ([mpmath.exp(x) for x in row] for row in (a, b))
    p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, q))
    t = [mpmath.log(x / y) for x, y in zip(p, q, strict=True)]
    loss = mpmath.fsum((x - y) * z for x, y, z in zip(p, q, t, strict=True))
    kl_pq = mpmath.fsum(x * z for x, z in zip(p, t, strict=True))
    kl_qp = kl_pq - loss
    grad_a = [x * (z - kl_pq) + x - y for x, y, z in zip(p, q, t, strict=True)]
    grad_b = [-y * (z - kl_qp) - (x - y) for x, y, z in zip(p, q, t, strict=True)]
    return loss, grad_a, grad_b


@pytest.mark.parametrize("delta", [1e-6, 1e-4, 1e-2, 0.5, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("cols", [2, 3, 33])
def test_symmetric_kl_to_twelve_digits(cols: int, delta: float) -> None:
    b = 2 * torch.randn(cols, dtype=torch.float64)
    a = b + delta * torch.randn(cols, dtype=torch.float64)
    truth = SymmetricKL(a[None], b[None])
    with mpmath.workdps(60):
        loss, *grads = definition([mpmath.mpf(x) for x in a.tolist()], [mpmath.mpf(x) for x in b.tolist()])
        # fp64 kernels promise 1e-12 of the loss; the oracle has to be better than that.
        assert abs(float(truth.loss[0]) / loss - 1) < 1e-12
        for got, expected in zip(truth.grads, grads, strict=True):
            largest = max(abs(x) for x in expected)
            assert all(abs(float(x) - y) <= 1e-12 * largest for x, y in zip(got[0], expected, strict=True))

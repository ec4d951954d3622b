"""The oracle itself, against its definition in 60 digits."""

from __future__ import annotations

import pytest
import torch
from oracle import Divergence

from smart_kernels import reference

mpmath = pytest.importorskip("mpmath")


def textbook(kind: str, a: list, b: list, beta: float) -> tuple:
    """Loss and gradients as the textbook has them, for rows of mpmath numbers."""
    p, q = ([mpmath.exp(x) for x in row] for row in (a, b))
    p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, q))
    beta = mpmath.mpf(beta)

    def kl(p: list, q: list) -> object:
        return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True))

    pairs = list(zip(p, q, strict=True))
    m = [beta * y + (1 - beta) * x for x, y in pairs]
    # the loss, and its derivatives with respect to the probabilities
    logs = [mpmath.log(x / y) for x, y in pairs]
    loss, by_p, by_q = {
        "symmetric_kl": lambda: (kl(p, q) + kl(q, p), [t - y / x for (x, y), t in zip(pairs, logs, strict=True)],
                                 [-t - x / y for (x, y), t in zip(pairs, logs, strict=True)]),
        "kl": lambda: (kl(q, p), [-y / x for x, y in pairs], [-t for t in logs]),
        "reverse_kl": lambda: (kl(p, q), logs, [-x / y for x, y in pairs]),
        "js": lambda: (beta * kl(q, m) + (1 - beta) * kl(p, m),
                       [(1 - beta) * mpmath.log(x / z) for x, z in zip(p, m, strict=True)],
                       [beta * mpmath.log(y / z) for y, z in zip(q, m, strict=True)]),
        "hellinger": lambda: (mpmath.fsum((mpmath.sqrt(x) - mpmath.sqrt(y)) ** 2 for x, y in pairs) / 2,
                              [-mpmath.sqrt(y / x) / 2 for x, y in pairs], [-mpmath.sqrt(x / y) / 2 for x, y in pairs]),
        "total_variation": lambda: (mpmath.fsum(abs(x - y) for x, y in pairs) / 2,
                                    [mpmath.sign(x - y) / 2 for x, y in pairs],
                                    [mpmath.sign(y - x) / 2 for x, y in pairs]),
    }[kind]()  # fmt: skip

    def through_softmax(p: list, by_p: list) -> list:
        mean = mpmath.fsum(x * f for x, f in zip(p, by_p, strict=True))
        return [x * (f - mean) for x, f in zip(p, by_p, strict=True)]

    return loss, through_softmax(p, by_p), through_softmax(q, by_q)


@pytest.mark.parametrize("delta", [1e-6, 1e-2, 1.0, 20.0])
@pytest.mark.parametrize("cols", [2, 33])
@pytest.mark.parametrize("kind", reference.KINDS)
def test_divergences_to_twelve_digits(kind: str, cols: int, delta: float) -> None:
    b = 2 * torch.randn(cols, dtype=torch.float64)
    a = b + delta * torch.randn(cols, dtype=torch.float64)
    truth = Divergence(a[None], b[None], kind, 0.3)
    with mpmath.workdps(60):
        loss, *grads = textbook(kind, [mpmath.mpf(x) for x in a.tolist()], [mpmath.mpf(x) for x in b.tolist()], 0.3)
        # fp64 kernels promise 1e-12 of the loss; the oracle has to be better than that.
        assert abs(float(truth.loss[0]) / loss - 1) < 1e-12
        for got, expected in zip(truth.grads, grads, strict=True):
            # where nearly all mass is on one class, what is left of its gradient is a difference of what is not small
            bar = 1e-12 * max(abs(x) for x in expected) + 1e-17 * delta
            assert all(abs(float(x) - y) <= bar for x, y in zip(got[0], expected, strict=True))

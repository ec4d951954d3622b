"""The truth that every kernel is held against: extended precision, one literal formula per op, no library code."""

from __future__ import annotations

import numpy as np
import torch

WIDE = np.longdouble


def wide(x: torch.Tensor) -> np.ndarray:
    """The very numbers of a tensor, in extended precision."""
    return x.detach().cpu().double().numpy().astype(WIDE)


def symmetric_kl(a: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss of each row (...), and its gradients with respect to a and b (..., C), in extended precision.

    The centred formula is exact to the dtype's last digits at any distance of a and b: with 64 bits of mantissa
    and differences of 1e-6 there remain 13 digits.
    """
    a, b = wide(a), wide(b)
    with np.errstate(all="ignore"):
        absent = np.isneginf(a) & np.isneginf(b)
        top_a, top_b = a.max(-1, keepdims=True), b.max(-1, keepdims=True)
        p, q = np.exp(a - top_a), np.exp(b - top_b)
        sum_a, sum_b = p.sum(-1, keepdims=True), q.sum(-1, keepdims=True)
        p, q = p / sum_a, q / sum_b
        d = np.where(absent, 0, a - b)
        d = np.where(absent, 0, d - np.take_along_axis(d, b.argmax(-1)[..., None], -1))
        close = np.abs(d).max(-1, keepdims=True) < 1
        s = np.where(
            close,
            np.log1p((q * np.expm1(d)).sum(-1, keepdims=True)),
            np.log(sum_a / sum_b) + (top_a - top_b - (np.where(absent, 0, a - b) - d).max(-1, keepdims=True)),
        )
        t = np.where(absent, 0, d - s)
        x = np.where(np.abs(t) < 1, q * np.expm1(t), p - q)
        infinite = (np.isneginf(a) != np.isneginf(b)).any(-1)
        bad = np.isnan(a).any(-1) | np.isnan(b).any(-1) | ~np.isfinite(top_a[..., 0]) | ~np.isfinite(top_b[..., 0])
        loss = np.where(bad, np.nan, np.where(infinite, np.inf, (x * t).sum(-1)))
        grad_a = p * (t - (p * t).sum(-1, keepdims=True)) + x
        grad_b = -q * (t - (q * t).sum(-1, keepdims=True)) - x
    return loss, grad_a, grad_b


def resolution(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """max_j |a_j - b_j| of each row: what the differences of fp32 logits can resolve scales with it."""
    a, b = wide(a), wide(b)
    with np.errstate(all="ignore"):
        d = np.abs(a - b)
    return np.where(np.isfinite(d), d, 0).max(-1)


def loss_bar(a: torch.Tensor, b: torch.Tensor, loss: np.ndarray) -> np.ndarray:
    """The accuracy promised for each row's loss: 1e-5 of it, plus what fp32 differences of logits resolve."""
    if a.dtype == torch.float64:
        return 1e-12 * loss + 1e-12 * resolution(a, b) * np.sqrt(loss)
    return 1e-5 * loss + 2.0**-21 * resolution(a, b) * np.sqrt(loss)


def grad_bar(a: torch.Tensor, b: torch.Tensor, grad: np.ndarray) -> np.ndarray:
    """The accuracy promised for each row's gradient, in the Euclidean norm."""
    if a.dtype == torch.float64:
        return 1e-12 * np.linalg.norm(grad.astype(np.float64), axis=-1) + 1e-12 * resolution(a, b)
    return 1e-5 * np.linalg.norm(grad.astype(np.float64), axis=-1) + 2.0**-20 * resolution(a, b)


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance of two neighbouring numbers of a dtype at |x|."""
    info = torch.finfo(dtype)
    mantissa = -int(np.log2(info.eps))
    exponent = np.floor(np.log2(np.maximum(np.abs(x.astype(np.float64)), info.tiny)))
    return np.exp2(exponent - mantissa)

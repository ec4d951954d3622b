"""One eager function per op: the definition, and the kernel of every device that has no other.

The formulas keep their digits where the usual ones lose them (perturbations of 1e-5); what stands here
in plain PyTorch is what the C++, Triton and CUDA kernels compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "batchmean")
"""The code of a reduction in the ops' schemas is its place here."""

SMALL = 0.5
"""Up to here exp(x) - 1 is taken as expm1(x); beyond, the difference of two probabilities is exact enough."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def symmetric_kl(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, detach_targets: bool) -> Tensor:
    """KL(p||q) + KL(q||p) of p = softmax(input), q = softmax(target), reduced."""
    loss = _symmetric_kl_rows(input, target)[0]
    if weight is not None:
        loss = torch.where(weight == 0, 0, weight * loss)
    if REDUCTIONS[reduction] == "none":
        return loss
    return loss.sum() * symmetric_kl_normaliser(input, weight, reduction)


def symmetric_kl_backward(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    input_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `symmetric_kl`, each empty where it is not asked for; no `grad_output` means ones."""
    _, t, p, q, difference, kl_pq, kl_qp = _symmetric_kl_rows(input, target)
    scale = torch.ones(input.shape[:-1], dtype=compute_dtype(input), device=input.device)
    if grad_output is not None:
        scale = scale * grad_output
    scale = (scale * symmetric_kl_normaliser(input, weight, reduction)).unsqueeze(-1)
    if weight is not None:
        scale = scale * weight.unsqueeze(-1)

    def finish(grad: Tensor, like: Tensor) -> Tensor:
        grad = scale * grad
        return (grad if weight is None else torch.where(weight.unsqueeze(-1) == 0, 0, grad)).to(like.dtype)

    empty = input.new_empty(0)
    if detach_targets:
        return (
            finish(difference, input) if input_grad else empty,
            finish(-difference, target) if target_grad else empty,
        )
    return (
        finish(p * (t - kl_pq) + difference, input) if input_grad else empty,
        finish(-q * (t + kl_qp) - difference, target) if target_grad else empty,
    )


def symmetric_kl_grad(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, detach_targets: bool
) -> Tensor:
    """The gradient of `symmetric_kl` with respect to `input`."""
    return symmetric_kl_backward(None, input, target, weight, reduction, detach_targets, True, False)[0]


def symmetric_kl_forward_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    input_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients for an upstream gradient of one."""
    loss = symmetric_kl(input, target, weight, reduction, detach_targets)
    grads = symmetric_kl_backward(None, input, target, weight, reduction, detach_targets, input_grad, target_grad)
    return (loss, *grads)


def symmetric_kl_normaliser(input: Tensor, weight: Tensor | None, reduction: int) -> Tensor | float:
    """What the sum over rows is multiplied by; NaN where there are no rows to average."""
    match REDUCTIONS[reduction]:
        case "batchmean":
            return 1 / input.size(0) if input.size(0) else math.nan
        case "mean" if weight is not None:
            return weight.sum().reciprocal() if input.numel() else math.nan
        case "mean":
            return input.size(-1) / input.numel() if input.numel() else math.nan
    return 1.0


def _symmetric_kl_rows(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Per row: the loss; per element: t = log(p/q), p, q, p - q; per row, kept: KL(p||q), KL(q||p)."""
    dtype = compute_dtype(input)
    a, b = input.to(dtype), target.to(dtype)
    absent = (a == -math.inf) & (b == -math.inf)  # classes masked on both sides
    d = torch.where(absent, 0, a - b)
    max_a = a.amax(-1, keepdim=True)
    max_b, top = b.max(-1, keepdim=True)
    centre = d.gather(-1, top)  # a constant added to a row changes nothing
    d = torch.where(absent, 0, d - centre)

    exp_a, exp_b = (a - max_a).exp(), (b - max_b).exp()
    sum_a, sum_b = exp_a.sum(-1, keepdim=True), exp_b.sum(-1, keepdim=True)
    p, q = exp_a / sum_a, exp_b / sum_b
    # s = logsumexp(a) - logsumexp(b), centred: log1p keeps the digits where all d are small
    s = torch.where(
        d.abs().amax(-1, keepdim=True) <= SMALL,
        torch.log1p((q * torch.expm1(d)).sum(-1, keepdim=True)),
        (sum_a / sum_b).log() + (max_a - max_b - centre),
    )
    t = d - s
    near = t.abs() <= SMALL
    difference = torch.where(near, q * torch.expm1(t), p - q)
    p = torch.where(near, q + difference, p)
    t = torch.where(absent, 0, t)
    loss = (difference * t).sum(-1)
    kl_pq, kl_qp = (p * t).sum(-1, keepdim=True), -(q * t).sum(-1, keepdim=True)

    infinite = ((a == -math.inf) != (b == -math.inf)).any(-1)
    undefined = a.isnan().any(-1) | b.isnan().any(-1) | (max_a.abs() == math.inf).squeeze(-1)
    undefined |= (max_b.abs() == math.inf).squeeze(-1)
    loss = torch.where(undefined, math.nan, torch.where(infinite, math.inf, loss))
    kl_pq = torch.where((undefined | infinite).unsqueeze(-1), math.nan, kl_pq)
    kl_qp = torch.where((undefined | infinite).unsqueeze(-1), math.nan, kl_qp)
    difference = torch.where((undefined | infinite).unsqueeze(-1), math.nan, difference)
    return loss, t, p, q, difference, kl_pq, kl_qp

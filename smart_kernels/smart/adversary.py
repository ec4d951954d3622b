"""How the perturbation is found: each step takes one gradient, with respect to the embeddings and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smart_kernels.ops.perturbation import perturbation_step
from smart_kernels.smart.config import Logits, SmartConfig
from smart_kernels.smart.divergence import Divergence
from smart_kernels.smart.passes import CleanPass, Passes

AT_CLEAN = ("predicted", "fisher", "task")
"""The adversaries whose gradient is taken at the clean embeddings."""

_SCALE = 2.0**8
"""Of what is pulled back to the embeddings: in fp16, room for gradients that shrink on the way (a mean over 512
tokens), and as much for some that grow (a layer norm of embeddings of size 0.02)."""


def find_perturbation(
    config: SmartConfig,
    passes: Passes,
    batch: Any,
    clean: CleanPass,
    divergence: Divergence,
    noise: Tensor,
    mask: Tensor | None,
    generator: torch.Generator,
    skipped: Tensor,
) -> Tensor:
    """The perturbation of a batch's embeddings: Algorithm 1's inner loop, or one of the cheaper ways.

    Args:
        config: the adversary, its step and its ball.
        passes: runs the model.
        batch: the batch.
        clean: its clean pass, with embeddings.
        divergence: what is to be made large.
        noise: where the ascent begins, shape (B, ...) of the embeddings, fp32 or fp64.
        mask: 0 at the positions that are not perturbed, shape (B, ...), or None.
        generator: what "fisher" draws from.
        skipped: int64 scalar on the noise's device, which grows at each ascent step by the number of samples (or
            tokens) whose gradient is not finite; the step leaves their perturbation as it was, the noise at first.

    Returns:
        The perturbation, like `noise`, in the ball (but for "random", the noise itself); it requires no gradient.
    """
    if config.adversary == "random":
        return noise
    assert clean.embeds is not None
    at_clean = config.adversary in AT_CLEAN
    # The paper divides by the largest entry; a single step goes further along the signs, the steepest in that norm.
    ascent = "sign" if at_clean and config.norm == "linf" else "normalized"

    @passes.reduction.held()
    def gradient(loss: Tensor, logits: Logits, point: Tensor) -> Tensor:
        retain_graph = point is clean.point
        match config.adversary:
            case "power":
                cotangents = divergence.cotangent(detached(logits), detached(clean.logits))
            case "predicted":
                cotangents = divergence.predicted(detached(logits))
            case "fisher":
                cotangents = divergence.fisher(detached(logits), generator)
            case _:  # the factor undoes the mean over samples
                return _pull_back((loss,), (torch.full_like(loss, _SCALE * point.size(0)),), point, retain_graph)
        cotangents = tuple(c.to(x.dtype) for c, x in zip(_scaled(cotangents, point.size(0)), logits, strict=True))
        return _pull_back(logits, cotangents, point, retain_graph)

    delta = noise
    for _ in range(config.ascent_steps):
        if at_clean and clean.point is not None:
            g = gradient(clean.loss, clean.logits, clean.point)
        else:  # also for want of the clean pass's graph: it is then repeated, with a graph of the embeddings alone
            point = torch.zeros_like(noise) if at_clean else delta
            with passes.probe(batch, clean.embeds, point) as (loss, logits):
                g = gradient(loss, logits, point)
        options = config.step_size, config.epsilon, config.norm, config.scope, mask, ascent, skipped
        delta = perturbation_step(delta.detach(), g, *options)
    return delta


def _pull_back(outputs: Logits, cotangents: Logits, point: Tensor, retain_graph: bool) -> Tensor:
    """The vector-Jacobian product; 0 where the outputs do not depend on the point, as where a layer was dropped."""
    live = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if not live:
        return torch.zeros_like(point)
    outputs, cotangents = zip(*live, strict=True)
    (g,) = torch.autograd.grad(outputs, point, cotangents, retain_graph, allow_unused=True)
    return torch.zeros_like(point) if g is None else g


def _scaled(cotangents: Logits, samples: int) -> Logits:
    """Cotangents whose largest entry is the same in each sample: a loss scale, of which a step is free.

    The gradients of a divergence of 1e-10 would underflow in the backward pass of an fp16 model.
    """
    apart = all(c.size(0) == samples for c in cotangents)  # else rows and samples are not the same: one scale for all
    flat = [c.detach().nan_to_num(0.0, 0.0, 0.0).abs().reshape(samples if apart else 1, -1).amax(1) for c in cotangents]
    size = torch.stack(flat).amax(0)
    size = torch.where(size > 0, size, 1) / _SCALE
    return tuple(c / size.view(-1, *[1] * (c.dim() - 1)) for c in cotangents)


def detached(logits: Logits) -> Logits:
    """The logits as constants."""
    return tuple(x.detach() for x in logits)

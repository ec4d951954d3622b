"""How the perturbation is found: each step takes one gradient, with respect to the embeddings and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smart_kernels.smart.config import AT_CLEAN, Logits, SmartConfig
from smart_kernels.smart.divergence import Divergence
from smart_kernels.smart.passes import CleanPass, Passes, detached
from smart_kernels.smart.positions import Positions

Deltas = tuple[Tensor, ...]
"""A perturbation for each call of the perturbed module in a pass."""

_SCALE = 2.0**8
"""Of what is pulled back to the embeddings: in fp16, room for gradients that shrink on the way (a mean over 512
tokens), and as much for some that grow (a layer norm of embeddings of size 0.02)."""


_NO_DIRECTION = (
    "check: no gradient comes from what is compared to the perturbed embeddings, so the perturbation would be noise "
    "alone. Likely causes: a function that torch.compile made has both in one graph (let it be the model's, its "
    "forward's, or an attribute of a module, where it is seen); the perturbed module has no part in the logits (name "
    "another by `embedding`), or had none in this batch, as where a layer is dropped at random "
    "(SmartConfig(check=False))"
)


def find_perturbation(
    config: SmartConfig,
    passes: Passes,
    clean: CleanPass,
    divergence: Divergence,
    noise: Deltas,
    positions: Sequence[Positions],
    generator: torch.Generator,
    skipped: Tensor,
    checking: bool,
    direction: Sequence[Tensor | None] | None = None,
) -> Deltas:
    """The perturbation of a batch's embeddings: Algorithm 1's inner loop, or one of the cheaper ways.

    Args:
        config: the adversary, its step and its ball.
        passes: runs the model.
        clean: the clean pass.
        divergence: what is to be made large.
        noise: where the ascent begins, for each call of the perturbed module of the shape of its output, fp32 or fp64.
        positions: of each call, which ones are perturbed and what a sample is.
        generator: what "fisher" draws from.
        skipped: int64 scalar on the noise's device, which grows at each ascent step by the number of samples (or
            tokens) whose gradient is not finite; the step leaves their perturbation as it was, the noise at first.
        checking: raise where no gradient comes to the embeddings at all; else the noise is left as it is.
        direction: the gradient with respect to the embeddings, where it has been found before.

    Returns:
        The perturbations, like `noise`, in the ball (but for "random", the noise itself); they require no gradient.
    """
    if config.adversary == "random":
        return noise
    if config.adversary == "task" and clean.regraphed:
        raise ValueError(
            "adversary: got 'task', but the logits that are compared have no share in the loss, so that its gradient "
            "does not lead through them; expected another adversary, 'predicted' for instance"
        )
    at_clean = config.adversary in AT_CLEAN
    # The paper divides by the largest entry; a single step goes further along the signs, the steepest in that norm.
    ascent = "sign" if at_clean and config.norm == "linf" else "normalized"
    samples = clean.logits[0].size(0) if clean.logits[0].dim() else 1
    apart = passes.hook is not None and _rows_apart(clean.logits, noise, positions, passes.hook.compute_dtype)

    @passes.reduction.held()
    def gradient(loss: Tensor | None, logits: Logits, points: Deltas) -> Sequence[Tensor | None]:
        retain_graph = points is clean_points
        match config.adversary:
            case "power":
                cotangents = divergence.cotangent(detached(logits), detached(clean.logits))
            case "predicted":
                cotangents = divergence.predicted(detached(logits))
            case "fisher":
                cotangents = divergence.fisher(detached(logits), generator)
            case _:  # the factor undoes the mean over samples
                assert loss is not None
                return _pull_back((loss,), (torch.full_like(loss, _SCALE * samples),), points, retain_graph)
        cotangents = tuple(c.to(x.dtype) for c, x in zip(_scaled(cotangents, apart), logits, strict=True))
        return _pull_back(logits, cotangents, points, retain_graph)

    deltas, clean_points = noise, clean.points
    for _ in range(config.ascent_steps):
        if direction is not None:
            found = direction
        elif at_clean and clean_points is not None:
            found = gradient(clean.loss, clean.logits, clean_points)
        else:  # also for want of the clean pass's graph: it is then repeated, with a graph of the embeddings alone
            points = tuple(torch.zeros_like(d) for d in noise) if at_clean else deltas
            with passes.probe(clean, points, loss=config.adversary == "task") as (loss, logits):
                found = gradient(loss, logits, points)
        if checking and all(g is None for g in found):
            raise RuntimeError(_NO_DIRECTION)
        grads = tuple(torch.zeros_like(d) if g is None else g for g, d in zip(found, deltas, strict=True))
        deltas = tuple(
            p.step(d.detach(), g, config, ascent, skipped) for p, d, g in zip(positions, deltas, grads, strict=True)
        )
    return deltas


def _pull_back(outputs: Logits, cotangents: Logits, points: Deltas, retain_graph: bool) -> Sequence[Tensor | None]:
    """The vector-Jacobian product; None where the outputs do not depend on a point, as where a layer was dropped."""
    live = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if not live:
        return [None] * len(points)
    outputs, cotangents = zip(*live, strict=True)
    return torch.autograd.grad(outputs, points, cotangents, retain_graph, allow_unused=True)


def _rows_apart(logits: Logits, noise: Deltas, positions: Sequence[Positions], compute_dtype: torch.dtype) -> bool:
    """Whether each row of logits may have a scale of its own: in fp16, which needs it, where rows are samples.

    Of other rows, or of logits that other samples have part in, as in a contrastive loss of each with all, scales would
    be weights.
    """
    if torch.float16 not in (compute_dtype, *(x.dtype for x in logits)):
        return False
    rows = {x.size(0) if x.dim() else 0 for x in logits} | {p.rows(d) for p, d in zip(positions, noise, strict=True)}
    return len(rows) == 1 and not any(x.dim() == 2 and x.size(0) == x.size(1) for x in logits)


def _scaled(cotangents: Logits, apart: bool) -> Logits:
    """Cotangents whose largest entry is about the same: a loss scale, of which a step is free; a power of two.

    The gradients of a divergence of 1e-10 would underflow in the backward pass of an fp16 model.

    Args:
        cotangents: of all logits.
        apart: each row, the sample of the same place in the embeddings, has a scale of its own.
    """
    flat = [c.detach().nan_to_num(0.0, 0.0, 0.0).abs().reshape(len(c) if apart else 1, -1).amax(1) for c in cotangents]
    size = torch.stack(flat).amax(0)
    size = torch.ldexp(torch.ones_like(size), torch.frexp(torch.where(size > 0, size, 1)).exponent) / _SCALE
    return tuple(c / size.view(-1, *[1] * (c.dim() - 1)) for c in cotangents)

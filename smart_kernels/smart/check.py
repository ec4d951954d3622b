"""The check of the first step: are the terms connected to what is trained, and nothing but what they say?

It costs a few forward passes and waits for the device, once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from smart_kernels.smart.config import Logits, SmartConfig
from smart_kernels.smart.divergence import Divergence
from smart_kernels.smart.embedding import mean_size, resolved_at
from smart_kernels.smart.gradients import without_autocast
from smart_kernels.smart.head import SAME
from smart_kernels.smart.passes import CleanPass, Passes, detached
from smart_kernels.smart.teacher import Teacher

_CAUSES = (
    "Likely causes: randomness that neither torch's nor Python's nor NumPy's global generator gives; a state that the "
    "model changes in a pass and that is no buffer or attribute of its modules; a batch that is used up. "
    "dropout='independent' compares passes of other masks on purpose; SmartConfig(check=False) switches this check off."
)


def check_connected(trains: bool, logits: Logits) -> None:
    """Raise RuntimeError where logits, of the clean pass or a perturbed one, carry no graph, while the loss does."""
    if trains and torch.is_grad_enabled():
        for i, x in enumerate(logits):
            if not x.requires_grad:
                raise RuntimeError(
                    f"logits: what is compared (tensor {i + 1} of {len(logits)}, shape {tuple(x.shape)}) carries "
                    "no graph, while the loss does, so the terms would train nothing. It came out of detach(), of "
                    "torch.no_grad(), or from elsewhere than the model; return the model's own logits"
                )


def reached_rows(clean: CleanPass) -> Tensor | None:
    """The rows of the clean pass's logits that the task loss depends on, True for those; None where it cannot be told.

    It takes the gradient with respect to the logits alone, in front of the model's graph, which stays. Not so through
    an autograd function of the user's or of a compiler: some, such as fused losses, may go back once.
    """
    (logits,) = clean.logits
    if clean.regraphed or not (clean.loss.requires_grad and logits.requires_grad) or is_capturing(logits):
        return None
    edge: Any = torch.autograd.graph.get_gradient_edge(logits)
    kept = logits.grad if logits.is_leaf or logits.retains_grad else None
    # as of a sum over rows, so that in fp16 what a mean leaves of one is not rounded to 0
    many = torch.full_like(clean.loss, min(logits.shape[:-1].numel(), 2**15))
    found: Tensor | None = None
    try:
        while found is None and edge is not None:
            if any(isinstance(node, BackwardCFunction) for node in _between(clean.loss.grad_fn, edge.node)):
                return None
            with without_autocast():
                (found,) = torch.autograd.grad(clean.loss, edge, many, retain_graph=True, allow_unused=True)
            edge = _made_of(edge) if found is None else None
    except RuntimeError:  # a graph that cannot be gone back through twice, or not so
        return None
    finally:
        if logits.is_leaf or logits.retains_grad:
            logits.grad = kept
    if found is None or found.numel() != logits.numel():
        return None
    tops = torch.linalg.vector_norm(found.reshape(logits.shape), torch.inf, -1)
    return tops > 0 if bool(tops.isfinite().all()) else None


def _between(loss: Any, logits: Any) -> set[Any]:
    """The nodes of a graph that a gradient of the loss passes on its way to the logits, whose node is none of them."""
    parents: dict[Any, list[Any]] = {loss: []}
    waiting = [loss]
    while waiting:
        node = waiting.pop()
        for child, _ in node.next_functions if node is not logits else ():
            if child is not None:
                if child not in parents:
                    waiting.append(child)
                parents.setdefault(child, []).append(node)
    found: set[Any] = set()
    waiting = [logits]
    while waiting:
        above = [node for node in parents.get(waiting.pop(), ()) if node not in found]
        found |= set(above)
        waiting += above
    return {node for node in found if node.name() not in SAME}


def _made_of(edge: Any) -> Any:
    """What a tensor is a copy of, as the loss may be made of that; None where it is none."""
    node, place = edge.node, edge.output_nr
    name = node.name()
    if name not in SAME:
        return None
    inputs = [x for x in node.next_functions if x[0] is not None]
    if name == "_DDPSinkBackward" and len(node.next_functions) > place:
        inputs = [node.next_functions[place]]
    return torch.autograd.graph.GradientEdge(*inputs[0]) if len(inputs) == 1 and inputs[0][0] is not None else None


def is_capturing(x: Tensor) -> bool:
    """Whether what is done with a tensor is captured as a CUDA graph, where nothing may be waited for."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def check_zero(
    passes: Passes, clean: CleanPass, divergence: Divergence, config: SmartConfig, teacher: Teacher | None
) -> dict[str, float]:
    """The terms with no perturbation and with the student's own weights as teacher; RuntimeError where one is not 0."""
    if config.dropout == "independent":
        return {}
    logits = detached(clean.logits)
    found: dict[str, float] = {}
    passed: dict[str, Logits] = {}
    with torch.no_grad():
        if clean.embeddings:
            with torch.enable_grad():
                still = tuple(torch.zeros_like(c.output.detach()) for c in clean.embeddings)
                passed["smoothness_without_perturbation"] = detached(passes.perturbed(clean, still))
        if teacher is not None:
            passed["proximal_to_itself"] = passes.taught(None)
        tolerated = 0.0
        for name, other in passed.items():
            value = float(divergence(other, logits))
            found[name] = value
            if value == 0 or not _finite(logits):
                continue
            if logits[0].device.type != "cpu" and not tolerated:
                again = [passes.taught(None) for _ in range(2)]
                tolerated = 16 * max(float(divergence(again[0], x)) for x in (again[1], logits))
            if value > tolerated:
                off = max(float((a - b).abs().max()) for a, b in zip(other, logits, strict=True))
                if changed := passes.newly_changed_parameters:
                    warnings.warn(
                        f"check: the model's forward pass changes parameters ({', '.join(changed[:3])}), so that in "
                        f"this first step the other passes differ from it by up to {off:.3g} in the logits; from the "
                        "next step on all begin where it begins",
                        stacklevel=7,  # the caller of a step
                    )
                    break
                what = (
                    "without a perturbation"
                    if name.startswith("smooth")
                    else "with the student's own weights as teacher"
                )
                raise RuntimeError(
                    f"check: {what} the passes of a step differ: the term is {value:.3g} where it must be 0, as logits "
                    f"are off by up to {off:.3g}. So it would measure something else than what it says. {_CAUSES}"
                )
    return found


def check_moves(
    clean: CleanPass,
    divergence: Divergence,
    smoothness: Tensor,
    deltas: tuple[Tensor, ...] | None,
    compute_dtype: torch.dtype,
    told: bool,
) -> bool:
    """Whether it is settled that the perturbation moves the logits.

    Not settled where nothing in the batch is counted, or all logits are the same, as of a head that begins at zero.
    Where it moves nothing, as the model computes in too narrow a dtype, a warning says so; else it is a RuntimeError.

    Args:
        clean: the clean pass.
        divergence: what counts in what is compared.
        smoothness: R_s at the perturbation.
        deltas: the perturbation, None where there is none.
        compute_dtype: what the layers behind the embeddings compute in.
        told: whether a warning has said already that a dtype does not resolve the radius.
    """
    if deltas is None or not any(bool(d.any()) for d in deltas):
        return True  # what has no noise or no radius was warned of
    if float(smoothness.detach()) != 0:
        return True
    if not float(divergence.count(clean.logits)) or all(bool((x == x.flatten()[:1]).all()) for x in clean.given):
        return False
    moved = max(float(d.abs().max()) for d in deltas)
    does = f"R_s is 0 with a perturbation of the embeddings of up to {moved:.3g}, so the smoothness term does nothing"
    for call in clean.embeddings:
        size = mean_size(call.output)
        for dtype in (call.output.dtype, compute_dtype):
            if size and moved < (resolution := resolved_at(size, dtype)):
                if told:
                    return True
                warnings.warn(
                    f"check: {does} in this step: {dtype} resolves {resolution:.1g} at the embeddings' mean size of "
                    f"{size:.2g}. Raise epsilon (and noise_std, where the adversary starts from noise) above that, or "
                    "compute in float32.",
                    stacklevel=7,  # the caller of a step
                )
                return True
    raise RuntimeError(
        f"check: {does}. Likely causes: the logits that are compared do not come from the perturbed module; the graph "
        "was cut; logits so sure that every probability is 0 or 1"
    )


def _finite(logits: Logits) -> bool:
    return all(bool(x.isfinite().all()) for x in logits)

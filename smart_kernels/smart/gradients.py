"""Gradients of a pass whose graph is freed before the step's last backward pass, through which they reach the weights.

Who listens to a backward pass (a reducer, hooks of parameters, an optimiser in the backward pass, a gradient scaler)
is to see an ordinary step: one backward pass that gives each parameter the whole of its gradient. So the early ones
give their gradients to nobody: they are held, and the last one passes them on. Nothing is changed until then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from smart_kernels.smart.parallel import Reduction


class Held:
    """The gradients of a step so far.

    Args:
        scale: what the loss is going to be multiplied by, as far as it is known: small gradients of an fp16 model keep
            their digits in the early passes, too. 0-dim, or 1.0 for nothing.
        reduction: of a sharded model.
        known: whether the loss is multiplied by just that.
    """

    def __init__(self, scale: Tensor | float, reduction: Reduction, known: bool = False) -> None:
        self._scale = scale
        self._known = known
        self._reduction = reduction
        self.begun = False
        """Whether a part of the loss has been left to what is held."""
        self._grads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._origins: dict[int, Tensor] = {}
        self._inner: dict[int, Tensor | None] = {}

    def collect(self, loss: Tensor, cuts: Sequence[tuple[Tensor, Tensor]], points: Sequence[Tensor] = ()) -> None:
        """Take the gradients of all that the loss was made of, and free its graph.

        Args:
            loss: a scalar.
            cuts: tensors, and leaves that stand for them in this graph; the gradient of such a leaf is theirs.
            points: further tensors of the graph, whose gradients are asked for by :meth:`of`.
        """
        self.begun = True
        if not loss.requires_grad:
            return
        self._origins |= {id(leaf): origin for origin, leaf in cuts}
        leaves, shared = leaves_of(loss, {origin.grad_fn for origin, _ in cuts})
        inner = [p for p in points if not p.is_leaf]
        scale = like(loss, self._scale)
        with self._reduction.held(), without_autocast(), _unhooked(leaves):
            # what lies before a cut is needed again: the rest goes when nobody holds the loss any longer
            wanted = [*leaves, *inner]
            grads = torch.autograd.grad(loss, wanted, scale, retain_graph=shared, allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=False):
            self._add(leaf, grad)
        self._inner = {id(p): grad for p, grad in zip(inner, grads[len(leaves) :], strict=True)}

    def leave(self, loss: Tensor) -> None:
        """Note what the loss was made of: it gets a gradient of its own, or none, in the last backward pass."""
        self.begun = True
        for leaf in leaves_of(loss)[0] if loss.requires_grad else ():
            self._add(leaf, None)

    def _add(self, leaf: Tensor, grad: Tensor | None) -> None:
        _, before = self._grads.get(id(leaf), (leaf, None))
        self._grads[id(leaf)] = leaf, before if grad is None else grad if before is None else before + grad

    def of(self, x: Tensor) -> Tensor | None:
        """The gradient of a leaf, or of a point that was asked for: of one within the graph once."""
        return self._grads.get(id(x), (x, None))[1] if x.is_leaf else self._inner.pop(id(x))

    def loss(self, value: Tensor, last: Tensor) -> Tensor:
        """A loss of this value; its gradient is what is held, and that of `last`, which alone has a graph."""
        grads = [(self._origins.get(id(leaf), leaf), grad) for leaf, grad in self._grads.values()]
        self._grads = {}
        parcel = _Parcel(value, None if self._known else self._scale, [g for _, g in grads])
        return _Deliver.apply(parcel, last, *(x for x, _ in grads))  # type: ignore[no-any-return,no-untyped-call]


class _Parcel:
    def __init__(self, value: Tensor, scale: Tensor | float | None, grads: list[Tensor | None]) -> None:
        self.value = value
        self.scale = scale
        self.grads: list[Tensor | None] | None = grads

    def take(self, upstream: Tensor) -> list[Tensor | None]:
        """The gradients, once, for this gradient of the loss."""
        grads, self.grads = self.grads, None
        if grads is None:
            raise RuntimeError(
                "backward: called twice on the loss of a step whose first graphs are freed; expected one call, or "
                "`smart(batch).loss`, which keeps all graphs"
            )
        if self.scale is None or (upstream.device.type == "cpu" and bool(upstream == self.scale)):
            return grads
        factor = upstream / self.scale
        memory = Counter(g.untyped_storage().data_ptr() for g in grads if g is not None and _dense(g))
        for i, g in enumerate(grads):
            if g is not None:
                alone = _dense(g) and memory[g.untyped_storage().data_ptr()] == 1
                grads[i] = g.mul_(factor) if alone else g * factor
        return grads


def _dense(x: Tensor) -> bool:
    """Whether it is a plain tensor that has an element once."""
    return x.layout == torch.strided and x.is_contiguous() and not hasattr(x, "to_local")


class _Deliver(torch.autograd.Function):
    """The root of the last backward pass."""

    @staticmethod
    def forward(ctx: Any, parcel: _Parcel, last: Tensor, *_targets: Tensor) -> Tensor:
        ctx.parcel = parcel
        return parcel.value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, upstream, *ctx.parcel.take(upstream)


def leaves_of(x: Tensor, fronts: AbstractSet[Any] = frozenset()) -> tuple[list[Tensor], bool]:
    """The leaves of a tensor's graph that require grad, and whether the graph comes to one of some nodes.

    Raises:
        RuntimeError: a part of it is checkpointed in the way that has no gradients but those of ``backward()``.
    """
    if x.grad_fn is None:
        return [x] if x.requires_grad else [], False
    leaves, seen, waiting = [], {x.grad_fn}, [x.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            kind = type(node).__name__
            if kind == "AccumulateGrad":
                leaves.append(node.variable)  # type: ignore[attr-defined]
            elif kind == "CheckpointFunctionBackward":
                raise RuntimeError(
                    "model: has a checkpointed region with use_reentrant=True, which has no gradients but those of "
                    "backward(); expected use_reentrant=False, or `smart(batch).loss.backward()`"
                )
            else:
                waiting.append(node)
    return leaves, not fronts.isdisjoint(seen)


def like(loss: Tensor, scale: Tensor | float) -> Tensor:
    """A scale as a gradient of the loss; nothing waits for the device."""
    return scale.to(loss) if isinstance(scale, Tensor) else loss.new_full((), scale)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Outside of autocast, where a backward pass belongs."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla"):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _unhooked(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of leaves are called in the last backward pass, with the whole gradient, and not here."""
    kept = [(x._backward_hooks, dict(x._backward_hooks)) for x in leaves if x._backward_hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)

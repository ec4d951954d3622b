"""l_s, the measure of how far apart two outputs of a model are: by task, with what the adversaries need of it.

A cotangent is what an adversary pulls back from the logits to the embeddings; only its direction counts.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels import reference
from smart_kernels.ops.divergence import divergence as divergence_of
from smart_kernels.ops.divergence import divergence_grad
from smart_kernels.smart.config import Logits
from smart_kernels.smart.rows import LABELS, MASK, Rows, first_known, known


class Divergence(ABC):
    """l_s of two outputs for one batch, a mean over what is counted: samples, or tokens.

    Args:
        num_items: what the sum over what is counted is divided by; None for its number.
    """

    def __init__(self, num_items: float | Tensor | None = None) -> None:
        self._num_items = num_items

    @abstractmethod
    def __call__(self, input: Logits, target: Logits) -> Tensor:
        """The divergence, a scalar, differentiable in both."""

    @abstractmethod
    def count(self, logits: Logits) -> float | Tensor:
        """How much is counted in a batch with these logits."""

    def _mean(self, total: Tensor, logits: Logits) -> Tensor:
        """The sum over what is counted in a batch, divided."""
        items = self.count(logits) if self._num_items is None else self._num_items
        if isinstance(items, Tensor):  # where nothing is counted, the sum is 0, and 0 with its gradient is the mean
            items = items.to(total.dtype).clamp(min=1e-30)
        return total / items

    @abstractmethod
    def cotangent(self, input: Logits, target: Logits) -> Logits:
        """The gradient with respect to `input`, up to a positive factor."""

    @abstractmethod
    def predicted(self, logits: Logits) -> Logits:
        """P - onehot(argmax p): minus the gradient of the log-probability of the most probable class."""

    @abstractmethod
    def fisher(self, logits: Logits, generator: torch.Generator) -> Logits:
        """sqrt(p) z - p (sqrt(p) . z), z ~ N(0, I): a draw with the covariance diag(p) - pp^T."""


class Classes(Divergence):
    """A divergence of class probabilities: of examples, tokens or the ends of a span.

    Args:
        kind: as in :func:`smart_kernels.divergence`.
        weight: what is counted, 0 or 1 for each row of the logits, or None for all.
        absent: positions that are no candidates of a span, True for those, or None.
        num_items: as in :class:`Divergence`.
    """

    def __init__(
        self,
        kind: str = "symmetric_kl",
        weight: Tensor | None = None,
        absent: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> None:
        super().__init__(num_items)
        self._kind = kind
        self._weight = weight
        self._absent = absent

    def __call__(self, input: Logits, target: Logits) -> Tensor:
        """The mean over what is counted, and over start and end; 0 where nothing is."""
        parts = [divergence_of(a, b, self._kind, self._weight, "sum") for a, b in self._pairs(input, target)]
        return self._mean(torch.stack(parts).mean(), input)

    def count(self, logits: Logits) -> float | Tensor:
        """Rows, as far as they are counted; of several tensors their mean number."""
        if self._weight is not None:
            return self._weight.sum()
        return sum(x.shape[:-1].numel() for x in logits) / len(logits)

    def cotangent(self, input: Logits, target: Logits) -> Logits:
        """The gradient with respect to `input`, by the kernel that writes that one alone."""
        pairs = ((_wide(a), _wide(b)) for a, b in self._pairs(input, target))
        return tuple(divergence_grad(a, b, self._kind, self._weight, "sum") for a, b in pairs)

    def predicted(self, logits: Logits) -> Logits:
        """P - onehot(argmax p)."""

        def cotangent(p: Tensor) -> Tensor:
            top = p.argmax(-1, keepdim=True)
            p = p.scatter(-1, top, 0)
            return p.scatter(-1, top, -p.sum(-1, keepdim=True))  # p - 1 would lose the digits of a sure prediction

        return self._pull(logits, cotangent)

    def fisher(self, logits: Logits, generator: torch.Generator) -> Logits:
        """sqrt(p) z - p (sqrt(p) . z)."""

        def cotangent(p: Tensor) -> Tensor:
            z = torch.randn(p.shape, dtype=p.dtype, device=generator.device, generator=generator).to(p.device)
            z = p.sqrt() * z
            return z - p * z.sum(-1, keepdim=True)

        return self._pull(logits, cotangent)

    def _pull(self, logits: Logits, cotangent: Callable[[Tensor], Tensor]) -> Logits:
        parts = (cotangent(_wide(x).softmax(-1)) for x in self._candidates(logits))
        return tuple(x if self._weight is None else x * self._weight.unsqueeze(-1) for x in parts)

    def _candidates(self, logits: Logits) -> Logits:
        return logits if self._absent is None else tuple(x.masked_fill(self._absent, -math.inf) for x in logits)

    def _pairs(self, input: Logits, target: Logits) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self._candidates(input), self._candidates(target), strict=True)


class SquaredError(Divergence):
    """(p - q)^2 of outputs that are numbers, a mean over all of them.

    Args:
        num_items: as in :class:`Divergence`.
        weight: what is counted, True for each number of (B, L, 1) that is, or None for all.
        tokens: whether each token has a number, shape (B, L, 1).
    """

    def __init__(
        self, num_items: float | Tensor | None = None, weight: Tensor | None = None, tokens: bool = False
    ) -> None:
        super().__init__(num_items)
        self._weight = weight
        self._tokens = tokens

    def __call__(self, input: Logits, target: Logits) -> Tensor:
        """The mean of (p - q)^2; 0 where nothing is counted."""
        if self._weight is not None:
            return self._mean(torch.stack([x.square().sum() for x in self.cotangent(input, target)]).mean(), input)
        loss = torch.stack([x.square().mean() for x in self.cotangent(input, target)]).mean()
        return loss if self._num_items is None else self._mean(loss * self.count(input), input)

    def count(self, logits: Logits) -> float | Tensor:
        """Samples, or tokens, as far as they are counted."""
        if self._weight is not None:
            return self._weight.sum()
        return logits[0].numel() if self._tokens else logits[0].size(0)

    def cotangent(self, input: Logits, target: Logits) -> Logits:
        """P - q, half the gradient."""
        return self._counted(tuple(_wide(a) - _wide(b) for a, b in zip(input, target, strict=True)))

    def predicted(self, logits: Logits) -> Logits:
        """1: a number has one direction."""
        return self._counted(tuple(torch.ones_like(x) for x in logits))

    def fisher(self, logits: Logits, generator: torch.Generator) -> Logits:
        """1, whatever is drawn: a number has one direction."""
        return self.predicted(logits)

    def _counted(self, numbers: Logits) -> Logits:
        weight = self._weight
        return numbers if weight is None else tuple(x.where(weight.unsqueeze(-1), 0) for x in numbers)


class Heads(Divergence):
    """The mean over several heads of what each alone has.

    Args:
        parts: the divergence of each.
    """

    def __init__(self, parts: Sequence[Divergence]) -> None:
        super().__init__()
        self._parts = parts

    def __call__(self, input: Logits, target: Logits) -> Tensor:
        """The mean."""
        each = zip(self._parts, input, target, strict=True)
        return torch.stack([part((a,), (b,)) for part, a, b in each]).mean()

    def count(self, logits: Logits) -> float | Tensor:
        """The mean number."""
        counts = [part.count((x,)) for part, x in zip(self._parts, logits, strict=True)]
        return sum(counts) / len(counts)

    def cotangent(self, input: Logits, target: Logits) -> Logits:
        """Of each, by autograd: their lengths have to fit each other."""
        input = tuple(x.detach().requires_grad_() for x in input)
        with torch.enable_grad():
            return torch.autograd.grad(self(input, target), input)

    def predicted(self, logits: Logits) -> Logits:
        """Of each."""
        return tuple(x for part, one in zip(self._parts, logits, strict=True) for x in part.predicted((one,)))

    def fisher(self, logits: Logits, generator: torch.Generator) -> Logits:
        """Of each."""
        return tuple(x for part, one in zip(self._parts, logits, strict=True) for x in part.fisher((one,), generator))


class Custom(Divergence):
    """A callable of the user's.

    Args:
        function: (input, target, batch) -> a scalar, a mean over what `like` counts.
        batch: the batch, as the model gets it.
        like: gives the divergence whose count and whose "predicted" and "fisher" cotangents fit the logits.
        num_items: as in :class:`Divergence`.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        batch: Any,
        like: Callable[[], Divergence],
        num_items: float | Tensor | None = None,
    ) -> None:
        super().__init__(num_items)
        self._function = function
        self._batch = batch
        self._like = like

    def __call__(self, input: Logits, target: Logits) -> Tensor:
        """What the function gives."""
        loss = self._function(_plain(input), _plain(target), self._batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"divergence: the callable returned {got}, expected a scalar tensor")
        return loss if self._num_items is None else self._mean(_wide(loss) * self.count(input), input)

    def count(self, logits: Logits) -> float | Tensor:
        """As of the divergence that the logits' shape stands for."""
        return self._like().count(logits)

    def cotangent(self, input: Logits, target: Logits) -> Logits:
        """Its gradient, by autograd."""
        input = tuple(x.detach().requires_grad_() for x in input)
        with torch.enable_grad():
            return torch.autograd.grad(self(input, target), input)

    def predicted(self, logits: Logits) -> Logits:
        """As of the divergence that the logits' shape stands for."""
        return self._like().predicted(logits)

    def fisher(self, logits: Logits, generator: torch.Generator) -> Logits:
        """As of the divergence that the logits' shape stands for."""
        return self._like().fisher(logits, generator)


def choose_divergence(
    divergence: str | Callable[..., Tensor],
    logits: Logits,
    batch: Any,
    model: nn.Module,
    num_items: float | Tensor | None = None,
    calls: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    rows: Rows | None = None,
    reached: Callable[[], Tensor | None] = lambda: None,
) -> Divergence:
    """The divergence of a batch.

    Args:
        divergence: as in :class:`~smart_kernels.SmartConfig`.
        logits: (B, C) of classes; (B, 1) or (B,) of numbers; (B, L, C) or (B * L, C) of tokens, or (B, L, 1) of a
            number for each, where those that count are as :class:`~smart_kernels.smart.rows.Rows` finds them; a pair
            of (B, L), start and end of a span, where padding is no candidate; or two heads of classes, (B, C) each.
        batch: the batch.
        model: the model, asked whether it predicts the next token.
        num_items: as in :class:`Divergence`.
        calls: where the logits are what several calls of the model gave, one tensor each, what they are called there;
            None where they are what the user's function gave.
        arguments: the named arguments of the model's calls, in which labels and mask are looked for as in the batch.
        rows: finds the rows that count; by default by names alone.
        reached: gives the rows that the task loss reaches, or None where that is not known.

    Raises:
        ValueError: the logits and labels do not tell.
    """
    rows = Rows(model) if rows is None else rows
    if callable(divergence):
        shaped = tuple(x.detach() for x in logits)  # whose graph is the step's to free

        def alone(logits: Logits) -> Divergence:
            # A callable knows what real-valued labels of (B, C) mean: what is asked here does not depend on it.
            classes = all(x.dim() == 2 and x.size(1) > 1 for x in logits)
            like = "symmetric_kl" if classes else "auto"
            return choose_divergence(like, logits, batch, model, None, calls, arguments, rows)

        if len(logits) > 1 and calls is None and not _are_classes(logits):
            return Custom(divergence, batch, lambda: Heads([alone((x,)) for x in shaped]), num_items)
        return Custom(divergence, batch, lambda: alone(shaped), num_items)
    shape = logits[0].shape
    named = known(batch, arguments or {})
    if divergence in ("auto", "squared_error") and len(logits) == 1 and len(shape) == 3 and shape[2] == 1:
        return SquaredError(num_items, rows.find(logits[0], named, reached), tokens=True)
    if divergence == "squared_error":
        return SquaredError(num_items)
    if calls == "sentence_embedding" and divergence == "auto":
        raise ValueError(
            "divergence: got 'auto' with embeddings of sentences, which are no logits; expected 'squared_error' or a "
            "callable"
        )
    kind = divergence if divergence in reference.KINDS else "symmetric_kl"
    several = len(logits) > 1 and calls is None
    if several and _are_classes(logits) and (len(logits) == 2 or divergence != "auto"):
        mask = first_known(named, MASK) if len({x.shape for x in logits}) == 1 else None
        absent = None if mask is None or named[mask].shape != shape else (named[mask] == 0).to(logits[0].device)
        return Classes(kind, absent=absent, num_items=num_items)
    if divergence == "auto" and not several:
        if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
            return SquaredError(num_items)
        labels = first_known(named, LABELS)
        if labels is not None and named[labels].shape == shape:
            real = named[labels].is_floating_point()
            if real or len(shape) == 2:
                raise ValueError(
                    f"divergence: got 'auto' with {'real-valued ' if real else ''}labels of the logits' shape, which "
                    "may be numbers, independent classes or probabilities; expected 'squared_error', a divergence of "
                    "classes such as 'symmetric_kl', or a callable"
                )
    if several or (divergence == "auto" and len(shape) not in (2, 3)):
        shapes = ", ".join(str(tuple(x.shape)) for x in logits)
        raise ValueError(
            f"divergence: got {divergence!r} with logits of shape {shapes}, expected (B,), (B, C), (B, L, C), two of "
            "(B, L) for a span, or two of classes (B, C); for others, a callable"
        )
    if len(logits) > 1:
        return Classes(kind, num_items=num_items)
    name = first_known(named, LABELS)
    labelled = () if name is None else tuple(named[name].shape)
    if len(shape) == 3 and labelled == (shape[0], shape[2]) != tuple(shape[:2]):
        warnings.warn(
            f"divergence: the logits have shape {tuple(shape)} and the labels {labelled}, as if classes came before "
            "tokens; expected (B, L, C), and the last dimension is taken for the classes. Give them so, for instance "
            "by `forward=`, with logits.transpose(1, 2)",
            stacklevel=2,
        )
    return Classes(kind, rows.find(logits[0], named, reached) if len(shape) > 1 else None, num_items=num_items)


def _are_classes(logits: Logits) -> bool:
    """Whether each is (B, C): of a span, or of heads of their own."""
    return all(x.dim() == 2 and x.size(1) > 1 and len(x) == len(logits[0]) for x in logits)


def _plain(logits: Logits) -> Any:
    return logits[0] if len(logits) == 1 else logits


def _wide(x: Tensor) -> Tensor:
    """At least fp32: in fp16 a cotangent of 1e-8 would be 0."""
    return x if x.dtype == torch.float64 else x.float()

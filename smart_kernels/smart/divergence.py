"""l_s, the measure of how far apart two outputs of a model are: by task, with what the adversaries need of it.

A cotangent is what an adversary pulls back from the logits to the embeddings; only its direction counts.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels import reference
from smart_kernels.ops.divergence import divergence as divergence_of
from smart_kernels.ops.divergence import divergence_grad
from smart_kernels.smart.config import Logits
from smart_kernels.smart.embedding import first_having

IGNORED = -100
"""The label of a token that is not counted, as in :func:`torch.nn.functional.cross_entropy`."""


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
    """(p - q)^2 of outputs that are numbers, a mean over all of them."""

    def __call__(self, input: Logits, target: Logits) -> Tensor:
        """The mean of (p - q)^2."""
        loss = torch.stack([x.square().mean() for x in self.cotangent(input, target)]).mean()
        return loss if self._num_items is None else self._mean(loss * self.count(input), input)

    def count(self, logits: Logits) -> float | Tensor:
        """Samples."""
        return logits[0].size(0)

    def cotangent(self, input: Logits, target: Logits) -> Logits:
        """P - q, half the gradient."""
        return tuple(_wide(a) - _wide(b) for a, b in zip(input, target, strict=True))

    def predicted(self, logits: Logits) -> Logits:
        """1: a number has one direction."""
        return tuple(torch.ones_like(x) for x in logits)

    def fisher(self, logits: Logits, generator: torch.Generator) -> Logits:
        """1, whatever is drawn: a number has one direction."""
        return self.predicted(logits)


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
) -> Divergence:
    """The divergence of a batch.

    Args:
        divergence: as in :class:`~smart_kernels.SmartConfig`.
        logits: (B, C) of classes; (B, 1) or (B,) of numbers; (B, L, C) or (B * L, C) of tokens, where those that have
            no label are not counted (in a decoder that predicts the next token, its label is the next one), nor
            virtual tokens that a learnt prompt puts before; or a pair of (B, L), start and end of a span, where
            padding is no candidate.
        batch: the batch: its "labels" and "attention_mask" are looked at where it is a mapping.
        model: the model, asked whether it predicts the next token.
        num_items: as in :class:`Divergence`.
        calls: where the logits are what several calls of the model gave, one tensor each, what they are called there;
            None where they are what the user's function gave.

    Raises:
        ValueError: the logits and labels do not tell.
    """
    if callable(divergence):
        # A callable knows what real-valued labels of (B, C) mean: what is asked here does not depend on it.
        several = len(logits) == 1 and logits[0].dim() == 2 and logits[0].size(1) > 1
        like = "symmetric_kl" if several else "auto"
        shaped = tuple(x.detach() for x in logits)  # whose graph is the step's to free
        return Custom(divergence, batch, lambda: choose_divergence(like, shaped, batch, model, None, calls), num_items)
    shape = logits[0].shape
    labels, mask = (batch.get(key) if isinstance(batch, Mapping) else None for key in ("labels", "attention_mask"))
    if divergence == "squared_error":
        return SquaredError(num_items)
    if calls == "sentence_embedding" and divergence == "auto":
        raise ValueError(
            "divergence: got 'auto' with embeddings of sentences, which are no logits; expected 'squared_error' or a "
            "callable"
        )
    kind = divergence if divergence in reference.KINDS else "symmetric_kl"
    if len(logits) == 2 and calls is None:
        return Classes(kind, absent=None if mask is None or mask.shape != shape else mask == 0, num_items=num_items)
    if divergence == "auto":
        if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
            return SquaredError(num_items)
        if isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == shape:
            raise ValueError(
                "divergence: got 'auto' with real-valued labels of the logits' shape, which may be numbers, "
                "independent classes or probabilities; expected 'squared_error', a divergence of classes such "
                "as 'symmetric_kl', or a callable"
            )
        if len(shape) not in (2, 3) or (len(logits) > 2 and calls is None):
            shapes = ", ".join(str(tuple(x.shape)) for x in logits)
            raise ValueError(
                f"divergence: got 'auto' with logits of shape {shapes}, expected (B,), (B, C), (B, L, C) or two of "
                "(B, L); for others, a callable"
            )
    if len(logits) > 1:
        return Classes(kind, num_items=num_items)
    if len(shape) == 3 and isinstance(labels, Tensor) and labels.shape == (shape[0], shape[2]) != tuple(shape[:2]):
        warnings.warn(
            f"divergence: the logits have shape {tuple(shape)} and the labels {tuple(labels.shape)}, as if classes "
            "came before tokens; expected (B, L, C), and the last dimension is taken for the classes. Give them so, "
            "for instance by `forward=`, with logits.transpose(1, 2)",
            stacklevel=2,
        )
    counted = _counted(labels, lambda x: x != IGNORED, _predicts_next(model), shape, batch)
    if counted is None:
        counted = _counted(mask, lambda x: x > 0, False, shape, batch)
    return Classes(kind, counted, num_items=num_items)


def _counted(
    values: Any, counts: Callable[[Tensor], Tensor], ahead: bool, shape: torch.Size, batch: Any
) -> Tensor | None:
    """Which rows of logits (B, L, C) or (B * L, C) count, by the labels or the mask; None where these do not fit.

    Args:
        values: the labels or the mask.
        counts: which of them count.
        ahead: the label of a row is the next one's.
        shape: of the logits.
        batch: the batch.
    """
    if len(shape) == 3:
        found = _rows(values, shape, batch)
        return None if found is None else _ahead(counts(found)) if ahead else counts(found)
    if not isinstance(values, Tensor) or values.dim() != 2 or values.shape[1] < 2:
        return None
    counted = counts(values)
    if counted.numel() == shape[0]:
        return (_ahead(counted) if ahead else counted).flatten()
    rest = counted[:, 1:]  # of logits[:, :-1] that were flattened
    return rest.flatten() if values.shape[1] > 2 and rest.numel() == shape[0] else None


def _ahead(counted: Tensor) -> Tensor:
    return nn.functional.pad(counted[:, 1:], (0, 1))


def _rows(values: Any, shape: torch.Size, batch: Mapping[str, Any]) -> Tensor | None:
    """One of the labels, or of the mask, for each row of logits (B, L, C); None where they do not fit.

    Logits of more rows than there are words begin with those of virtual tokens, as of a learnt prompt, which have no
    label. Where the batch has no words, nor anything else as long as the labels, these are a sequence of their own, as
    for the alignment of speech.
    """
    if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != shape[0]:
        return None
    virtual = shape[1] - values.shape[1]
    others = [x for n, x in batch.items() if isinstance(x, Tensor) and n not in ("labels", "attention_mask")]
    words = any(not x.is_floating_point() and x.dim() > 1 for x in others)
    as_long = any(x.shape[:2] == values.shape for x in others)
    if virtual < 0 or (virtual and not as_long) or (others and not words and not as_long):
        return None
    return nn.functional.pad(values, (virtual, 0), value=IGNORED if virtual else 0)


def _predicts_next(model: nn.Module) -> bool:
    """Whether the model's loss compares the logits at a token with the next token's label."""
    part: Any = first_having(model, "can_generate")
    config = getattr(part, "config", None)
    return part is not None and part.can_generate() and not getattr(config, "is_encoder_decoder", False)


def _plain(logits: Logits) -> Any:
    return logits[0] if len(logits) == 1 else logits


def _wide(x: Tensor) -> Tensor:
    """At least fp32: in fp16 a cotangent of 1e-8 would be 0."""
    return x if x.dtype == torch.float64 else x.float()

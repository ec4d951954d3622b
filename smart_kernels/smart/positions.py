"""Which dimension of the embeddings is the sample, which positions are perturbed, which samples are packed in a row.

Models take their words in many shapes: (B, L) or (L, B), with more padding inside or none, several samples packed in a
row. Masks have as many forms. What can be told for certain is used; otherwise the error asks for `mask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels.ops.perturbation import check_mask, perturbation_step
from smart_kernels.reference import floor_to
from smart_kernels.smart.config import SmartConfig
from smart_kernels.smart.embedding import EmbeddingCall, first_having
from smart_kernels.smart.rows import MASK, frames
from smart_kernels.smart.structure import leaves

_FORBIDDEN = -1e3
"""What an additive mask has at most where nothing is to be seen: linear biases of positions stay above."""


@dataclass(frozen=True)
class Positions:
    """Those of one call of the module to perturb.

    Attributes:
        order: the dimensions of the embeddings in the order (samples, positions, features); None for their own.
        mask: 0 at the positions that are not perturbed, shape (B, ...) in that order, or None.
        samples: the number of the sample that a position belongs to, int64, shape (B, ...), where rows are not samples.
    """

    order: tuple[int, ...] | None = None
    mask: Tensor | None = None
    samples: Tensor | None = None

    def ordered(self, x: Tensor) -> Tensor:
        """A tensor like the embeddings as (samples, positions, features)."""
        return x if self.order is None else x.permute(self.order)

    def rows(self, x: Tensor) -> int:
        """How many samples a tensor like the embeddings has, where rows are samples."""
        return x.size(0 if self.order is None else self.order[0])

    def own(self, x: Tensor) -> Tensor:
        """The reverse of :meth:`ordered`."""
        return x if self.order is None else x.permute([self.order.index(i) for i in range(len(self.order))])

    def step(self, delta: Tensor, grad: Tensor, config: SmartConfig, ascent: str, skipped: Tensor) -> Tensor:
        """An ascent step, by :func:`~smart_kernels.perturbation_step`; shapes as the embeddings have them."""
        delta, grad = self.ordered(delta), self.ordered(grad)
        if self.samples is None or config.scope == "token" or (ascent == "sign" and config.norm == "linf"):
            # the signs know no norm: each token for itself, so that one that is not finite stands alone
            scope = config.scope if self.samples is None else "token"
            options = config.step_length, config.epsilon, config.norm, scope, self.mask, ascent, skipped
            return self.own(perturbation_step(delta, grad, *options))
        return self.own(self._step_by_samples(delta, grad, config, skipped))

    def _step_by_samples(self, delta: Tensor, grad: Tensor, config: SmartConfig, skipped: Tensor) -> Tensor:
        """The step of samples that lie in rows with others: norms are gathered by the number of the sample."""
        assert self.samples is not None
        shape, samples = delta.shape, self.samples.flatten()
        delta, grad = delta.reshape(-1, shape[-1]), grad.reshape(-1, shape[-1]).to(delta.dtype)
        kept = torch.ones_like(samples, dtype=torch.bool) if self.mask is None else (self.mask != 0).flatten()
        delta, grad = (torch.where(kept.unsqueeze(-1), x, 0) for x in (delta, grad))

        def largest(x: Tensor) -> Tensor:
            each = x.abs().amax(-1).nan_to_num(nan=torch.inf)
            return each.new_zeros(len(each)).scatter_reduce(0, samples, each, "amax")[samples]

        def norm(x: Tensor) -> Tensor:
            if config.norm == "linf":
                return largest(x).unsqueeze(-1)
            top = largest(x)
            top = torch.where((top > 0) & top.isfinite(), top, 1).unsqueeze(-1).double()
            squares = (x.double() / top).square().sum(-1)
            return top * squares.new_zeros(len(squares)).index_add(0, samples, squares)[samples].sqrt().unsqueeze(-1)

        top = largest(grad).unsqueeze(-1)
        finite = top.isfinite()
        first = torch.ones_like(samples, dtype=torch.bool)
        first[1:] = samples[1:] != samples[:-1]
        skipped += (first & ~finite.squeeze(-1)).sum()
        moves = finite & (top > 0)
        direction = torch.where(moves, grad / torch.where(moves, top, 1), 0)
        size = norm(direction)
        direction = direction / torch.where(moves, size, 1).to(delta.dtype)
        moved = delta + config.step_length * direction
        if config.norm == "l2":
            size, inner = norm(moved), config.epsilon * (1 - 4 * torch.finfo(moved.dtype).eps)
            outside = size > torch.where(moves, inner, config.epsilon)
            moved = torch.where(outside, moved * (inner / torch.where(outside, size, 1)).to(moved.dtype), moved)
            return moved.view(shape)
        bound = floor_to(config.epsilon, moved.dtype)
        return moved.clamp(-bound, bound).view(shape)


class Layout:
    """Finds the positions of a model's embeddings.

    How words of a batch come to the module is the model's own way, found when a kind of batch is seen first, by
    comparing values; so nothing waits for the device later.

    Args:
        model: the model.
        mask: the user's function of the batch, or None for the batch's "attention_mask".
    """

    def __init__(self, model: nn.Module, mask: Callable[[Any], Any] | None) -> None:
        self._model = model
        self._mask = mask
        self._relations: dict[Any, tuple[str, str] | None] = {}
        self._orders: dict[int, str] = {}
        self._turned: dict[int, bool] = {}  # by place, as it was seen last for certain

    def find(
        self, place: int, call: EmbeddingCall, batch: Any, arguments: Mapping[str, Any], logits: torch.Size, scope: str
    ) -> Positions:
        """The positions of a call.

        Args:
            place: its number in the pass.
            call: the call.
            batch: the batch, as the pass found it.
            arguments: the named arguments of the model's call.
            logits: their shape.
            scope: as in the configuration.

        Raises:
            TypeError: the mask is no tensor of real numbers.
            ValueError: it does not fit the embeddings, in any way that is certain.
        """
        shape, samples = call.output.shape, logits[0] if logits else 1
        named = {**_named(batch), **arguments}
        relation = self._relation(place, call.ids, named)
        how, name = relation or ("", "")
        if self._mask is not None:
            mask = self._mask(batch)
            mask = mask[place] if isinstance(mask, tuple) else mask
        elif call.ids is not None and (relation is None or name.startswith("decoder_")):
            # other words than those that the mask is of
            mask = named.get(f"decoder_{MASK}")
            mask = mask if isinstance(mask, Tensor) and mask.shape == shape[:-1] else None
        else:
            mask = named.get(MASK)
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask: got {type(mask).__name__}, expected a tensor or None")
        if how == "kept":  # the model has left the padding out
            counts = (named[MASK] != 0).sum(1)
            rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=shape[0])
            return Positions(mask=mask if mask is not None and mask.dim() == 1 else None, samples=rows)
        if len(shape) == 2:
            if scope == "sample" and shape[0] != samples:
                raise ValueError(
                    f"mask: the embeddings have shape {tuple(shape)} and the logits are of {samples} samples, so it is "
                    "not known which positions are one sample's; expected scope='token', or embeddings (B, L, H)"
                )
            return Positions(mask=None if mask is None else check_mask(mask, call.output, "the embeddings"))
        order: tuple[int, ...] | None = None
        turned = not how and mask is None and shape[0] != samples and shape[1] == samples
        if turned or self._words_first(place, how, shape, logits, named):
            order = 1, 0, *range(2, len(shape))
        if mask is None:
            ordered = [shape[i] for i in (order or range(len(shape)))[:-1]]
            return Positions(order, samples=self._packed(named, ordered, scope))
        return self._masked(how, order, mask, call.output, named, scope, place)

    def _words_first(
        self, place: int, how: str, shape: torch.Size, logits: torch.Size, named: Mapping[str, Any]
    ) -> bool:
        """Whether the sample is the second dimension of the embeddings.

        That the ids are the batch's tells nothing of it. Logits of samples do, where one dimension alone is as large as
        their first and the other is no multiple of it, as rows of choices are; so do the words' lengths. Where neither
        does, it is as it was the last time, or samples come first in the batch.
        """
        if how in ("right", "left") or len(shape) != 3:
            return False
        told = self._turned.get(place, how == "transposed")
        rows, length = shape[:2]
        if rows == length:
            return told
        count = logits[0] if len(logits) in (1, 2) and sorted(logits) != sorted(shape[:2]) else 0
        for turned, own, other in ((False, rows, length), (True, length, rows)):
            of_samples = count == own and other > 1 and other % count != 0
            if of_samples or any(_are_lengths(x, own, other) for x in named.values()):
                self._turned[place] = told = turned
        return told

    # ------------------------------------------------------------------------------- where the words come from

    def _relation(self, place: int, ids: Tensor | None, named: Mapping[str, Any]) -> tuple[str, str] | None:
        """How the ids that are looked up are those of the batch, and of which name."""
        if ids is None:
            return None
        whole = {n: x for n, x in named.items() if isinstance(x, Tensor) and _integers(x) and n != MASK}
        key = place, ids.dim(), tuple((n, x.dim(), x.shape == ids.shape, x.mT.shape == ids.shape if x.dim() > 1 else 0,
                                       x.numel() == ids.numel()) for n, x in sorted(whole.items()))  # fmt: skip
        if key not in self._relations:
            known = self._orders.get(place)
            found = [(how, n) for n, x in whole.items() for how, y in _ways(x, named.get(MASK), ids) if _alike(y, ids)]
            found.sort(key=lambda r: (r[0] != known, r[1] in ("labels", "position_ids")))
            if not found:
                return None  # may be so by chance
            self._relations[key] = found[0]
            self._orders[place] = found[0][0]
        return self._relations[key]

    # ------------------------------------------------------------------------------------------ how a mask fits

    def _masked(
        self,
        how: str,
        order: tuple[int, ...] | None,
        mask: Tensor,
        embeds: Tensor,
        named: Mapping[str, Any],
        scope: str,
        place: int,
    ) -> Positions:
        shape = embeds.shape
        rows, length = (shape[i] for i in (order or (0, 1))[:2])
        seen = _rows_of(mask, rows)
        if seen is None and order is not None and mask.shape == shape[:2]:
            seen = mask.mT
        if seen is None and how in ("", "same") and mask.dim() == 2 and tuple(mask.shape) == (shape[1], shape[0]):
            order, seen, length = (1, 0, *range(2, len(shape))), mask, shape[0]
        if seen is None:
            raise self._unfit(mask, shape)
        if seen.shape[1] != length:
            seen, channels = self._aligned(how, seen, shape, length)
            order = (0, 2, 1) if channels else order
        elif order is not None and how == "same" and rows == length:  # as well the one as the other
            raise self._unfit(mask, shape)
        elif not how and self._mask is None:
            if rows == length:  # as well the one as the other
                if place not in self._orders:
                    raise self._unfit(mask, shape)
                order = (1, 0, *range(2, len(shape))) if self._orders[place] == "transposed" else None
            else:
                self._orders[place] = "same" if order is None else "transposed"
        return Positions(order, seen, self._packed(named, seen.shape, scope))

    def _aligned(self, how: str, seen: Tensor, shape: torch.Size, length: int) -> tuple[Tensor, bool]:
        """A mask of another length than the embeddings, and whether these have features before positions."""
        if how in ("right", "left"):  # padded further, inside of the model
            more = length - seen.shape[1]
            return nn.functional.pad(seen, (0, more) if how == "right" else (more, 0)), False
        if how and seen.shape[1] > length:  # of what lies in a cache, too
            return seen[:, -length:], False
        model: Any = first_having(self._model, "_get_feature_vector_attention_mask")
        if model is not None:  # of speech: a mask of the samples of sound, embeddings by frame
            for positions, channels in ((length, False), (shape[-1], True)):
                found = frames(model, positions, seen)
                if found is not None:
                    return found, channels
        raise self._unfit(seen, shape)

    def _packed(self, named: Mapping[str, Any], shape: Sequence[int], scope: str) -> Tensor | None:
        """Which sample each position is of, where positions or lengths tell that rows hold several."""
        if scope == "token" or len(shape) != 2:
            return None
        positions = named.get("position_ids")
        if isinstance(positions, Tensor):
            positions = positions[0] if positions.dim() == 3 else positions
            if list(positions.shape) == list(shape):
                first = torch.ones_like(positions, dtype=torch.bool)
                first[:, 1:] = positions[:, 1:] <= positions[:, :-1]
                return first.flatten().cumsum(0).sub(1).view(*shape)
        for name in ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q"):
            bounds = named.get(name)
            if isinstance(bounds, Tensor) and shape[0] == 1:
                places = torch.arange(shape[1], device=bounds.device, dtype=bounds.dtype)
                return (torch.searchsorted(bounds, places, right=True) - 1).clamp(min=0).view(*shape)
        return None

    def _unfit(self, mask: Tensor, shape: torch.Size) -> ValueError:
        return ValueError(
            f"mask: got shape {tuple(mask.shape)} for embeddings of shape {tuple(shape)}, and it is not known which "
            "positions it means; expected the first dimensions of the embeddings. Give `mask=`, a function of the "
            "batch that returns 0 where a position is not to be perturbed, or None for all (in SmartTrainer's "
            "arguments, `smart_mask`: the name of an input, or 'none')"
        )


def _named(batch: Any) -> dict[str, Any]:
    """The tensors of a batch by name, or by place."""
    if isinstance(batch, Mapping):
        return {str(k): v for k, v in batch.items() if isinstance(v, Tensor)}
    return {str(i): v for i, v in enumerate(leaves(batch)) if isinstance(v, Tensor)}


def _are_lengths(x: Any, samples: int, longest: int) -> bool:
    """Whether these are the numbers of words of so many samples: on the host, as torch's packed sequences take them."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.shape != (samples,) or not samples or not _integers(x):
        return False
    return int(x.min()) > 0 and int(x.max()) == longest


def _integers(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _ways(x: Tensor, mask: Any, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a model may look up in place of the words `x`, if it has the shape of `ids`."""
    if x.shape == ids.shape:
        yield "same", x
    if x.dim() == 2 and x.mT.shape == ids.shape:
        yield "transposed", x.mT
    if x.dim() > 2 and x.flatten(0, -2).shape == ids.shape:
        yield "same", x.flatten(0, -2)
    if x.dim() == 2 == ids.dim() and len(x) == len(ids) and x.shape[1] < ids.shape[1]:
        more = ids.shape[1] - x.shape[1]
        yield "right", torch.cat([x, ids[:, -more:]], 1)
        yield "left", torch.cat([ids[:, :more], x], 1)
    if x.dim() == 2 and ids.dim() == 1 and isinstance(mask, Tensor) and mask.shape == x.shape:
        yield "kept", x[mask != 0]


def _alike(x: Tensor, ids: Tensor) -> bool:
    """Whether these are the words that are looked up; a model may have replaced some, to predict them."""
    if x.shape != ids.shape:
        return False
    return not x.numel() or bool((x.to(ids.device) == ids).double().mean() >= 0.5)


def _rows_of(mask: Tensor, rows: int) -> Tensor | None:
    """A mask as (rows, positions): one of pairs of positions counts those that any may look at."""
    if mask.dim() == 3 and mask.shape[:2].numel() == rows:
        return mask.flatten(0, 1)  # choices of a batch, which the model takes for samples
    if mask.dim() in (3, 4):
        if mask.is_floating_point():
            mask = torch.where(mask.amax() > 0, mask != 0, mask > _FORBIDDEN)
        mask = (mask != 0).flatten(1, -2).any(1)
        mask = mask.expand(rows, -1) if len(mask) == 1 else mask
    return mask if mask.dim() == 2 and len(mask) == rows else None

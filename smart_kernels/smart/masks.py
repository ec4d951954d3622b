"""Dropout masks that the passes of a step share are drawn once: on a CPU, drawing takes up to a third of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

_DRAW = torch.ops.aten.bernoulli_.float
_SCALE = torch.ops.aten.div_.Scalar
_SHARE = torch.ops.aten.set_.source_Tensor
_FEWEST = 16384
"""Elements of a mask from which on it pays to look for it: to draw them takes 80 µs."""


class _Draw(NamedTuple):
    """How a mask of 0 and 1 is drawn: the generator's state before, and all else that the result depends on."""

    state: Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    keep: float

    def same(self, other: _Draw) -> bool:
        """Whether both give the same mask."""
        return self[1:] == other[1:] and torch.equal(self.state, other.state)


class _Mask(NamedTuple):
    """A mask that was drawn and then divided by the probability of a 1, as long as a graph keeps it or we do.

    Attributes:
        draw: how it was drawn.
        after: the generator's state after that.
        scaled: the mask.
        version: its version counter then; another value says that it was changed since.
        kept: where it is 1, a byte an element, to be there when the graph is not; else None.
    """

    draw: _Draw
    after: Tensor
    scaled: TensorWeakRef
    version: int
    kept: Tensor | None


class _Saved(NamedTuple):
    """A mask in a graph, in place of its numbers."""

    kept: Tensor
    dtype: torch.dtype
    keep: float


class SharedMasks(TorchFunctionMode):
    """Within this mode a dropout mask that was drawn before, from the same state of the generator, is not drawn again.

    The mask is taken from the graph for which it was drawn, without a copy. The CPU's default generator moves on as if
    the mask had been drawn, so all random numbers are those without the mode. A mask is drawn as usual where the model
    draws in another order, shape or way, where no graph has kept it, and on any device but the CPU.

    Example:
        >>> import torch
        >>> from smart_kernels.smart.masks import SharedMasks
        >>> x, state = torch.ones(128, 128, requires_grad=True), torch.get_rng_state()
        >>> with SharedMasks():
        ...     first = torch.nn.functional.dropout(x)
        ...     _ = torch.set_rng_state(state)
        ...     again = torch.nn.functional.dropout(x)
        >>> torch.equal(first, again)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._watch = _Watch()

    def set(self, keep: bool, pack: bool) -> None:
        """For what is drawn from now on.

        Args:
            keep: masks outlive the graphs that they were drawn for, a byte an element.
            pack: a graph has the byte, too, in place of the number.
        """
        self._watch.keep, self._watch.pack = keep, pack

    def clear(self) -> None:
        """Forget all masks."""
        self._watch.masks.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Watch the ops of functions that drop much out, and no others: to watch an op takes 5 µs."""
        masked = _MASKED.get(func)
        if masked is None or torch.compiler.is_compiling() or masked(*args, **kwargs or {}) < _FEWEST:
            return func(*args, **kwargs or {})
        with self._watch, self._watch.saving():
            return func(*args, **kwargs or {})


def _of_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> int:
    return input.numel() if training else 0


def _of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> int:
    # of four times as many ops
    return query.numel() // query.size(-1) * key.size(-2) // 4 if dropout_p else 0


_MASKED: dict[Callable[..., Any], Callable[..., int]] = {
    F.dropout: _of_dropout,
    F.scaled_dot_product_attention: _of_attention,
}
"""The functions that draw masks, and of how many elements, counted by what it pays to look for them."""


class _Watch(TorchDispatchMode):
    """Waits for a mask to be drawn and divided by the probability of a 1, which dropout does one after the other."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.masks: dict[int, _Mask] = {}
        self.keep = self.pack = self._packing = False
        self._drawn: tuple[Tensor, _Draw, Tensor, Tensor | None] | None = None
        self._found: Tensor | None = None
        self._saving: dict[int, tuple[TensorWeakRef, _Saved]] = {}  # by address, of the function that is watched

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A graph that is made here saves its masks as they are kept; one that saves by other rules, by those."""
        if not self.pack or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # type: ignore[attr-defined]
            yield
            return
        self._packing = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._packing = False
            self._saving.clear()

    def _pack(self, x: Tensor) -> Tensor | _Saved:
        mask, saved = self._saving.get(x.data_ptr(), (None, None))
        if saved is not None and mask is not None and mask() is x:
            return saved
        return x.detach()  # a node that holds its own output itself is never freed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is ever traced, and the guard against it takes as long as the rest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        drawn, found, self._drawn, self._found = self._drawn, self._found, None, None
        if func is _SCALE and args[0] is found:
            return found
        if func is _DRAW and not kwargs and _worth_it(args[0]):
            return self._draw(*args)
        result = func(*args, **kwargs or {})
        if func is _SCALE and drawn is not None and args[0] is drawn[0] and args[1] == drawn[1].keep:
            mask, draw, after, kept = drawn
            if kept is not None and self._packing:
                self._saving[mask.data_ptr()] = TensorWeakRef(mask), _Saved(kept, mask.dtype, draw.keep)
            # autograd has yet to count this division
            self.masks[_key(draw)] = _Mask(draw, after, TensorWeakRef(mask), mask._version + 1, kept)
        return result

    def _draw(self, mask: Tensor, keep: float = 0.5) -> Tensor:
        draw = _Draw(torch.get_rng_state(), mask.shape, mask.stride(), mask.dtype, keep)
        known = self.masks.get(_key(draw))
        if known is not None and known.draw.same(draw):
            scaled = known.scaled()
            if scaled is not None and scaled._version == known.version:
                torch.set_rng_state(known.after)
                self._found = _SHARE(mask, scaled)
                return mask
            if known.kept is not None:
                torch.set_rng_state(known.after)
                self._drawn = mask.copy_(known.kept), draw, known.after, known.kept
                return mask
        _DRAW(mask, keep)
        self._drawn = mask, draw, torch.get_rng_state(), mask.bool() if self.keep else None
        return mask


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.kept.to(saved.dtype).div_(saved.keep)


def _worth_it(mask: Tensor) -> bool:
    return type(mask) is Tensor and mask.is_cpu and mask.numel() >= _FEWEST and not mask.is_inference()


def _key(draw: _Draw) -> int:
    return int(draw.state.view(torch.int64).sum())

"""Where the perturbation enters a model: at the output of its word embedding, by a forward hook.

What follows the word embedding (positions, token types, layer norm, dropout) is applied once and by the model
itself, so any architecture works. The hook is there for the length of a pass and no longer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels.smart.parallel import bare


def find_embedding(model: nn.Module, embedding: nn.Module | str | None = None) -> nn.Module:
    """The module whose output is perturbed.

    Args:
        model: the model, compiled or not, wrapped or not.
        embedding: the module itself, its name in `model`, or None for the word embedding: what
            ``get_input_embeddings()`` of the model, or of the first part that has it, gives (of the encoder, where
            there is an encoder and a decoder), or the only :class:`torch.nn.Embedding` of the model.

    Raises:
        TypeError: `embedding` is of another type.
        ValueError: the model has no such module, or it is not clear which one is meant.
    """
    model = bare(model)
    if isinstance(embedding, str):
        try:
            return model.get_submodule(embedding)
        except AttributeError as error:
            raise ValueError(f"embedding: got {embedding!r}, expected the name of a module: {error}") from None
    if isinstance(embedding, nn.Module):
        if not any(module is embedding for module in model.modules()):
            raise ValueError(f"embedding: got a {type(embedding).__name__} that is no part of the model")
        return embedding
    if embedding is not None:
        raise TypeError(f"embedding: got {type(embedding).__name__}, expected a module, its name or None")
    part: Any = first_having(model, "get_input_embeddings")
    if part is not None:
        own = part.get_input_embeddings()
        encoder: Any = part.get_encoder() if hasattr(part, "get_encoder") else None
        if encoder is not None and hasattr(encoder, "get_input_embeddings"):
            of_encoder = encoder.get_input_embeddings()
            # Tied: two modules with one weight, of which the encoder calls its own.
            tied = getattr(of_encoder, "weight", None) is getattr(own, "weight", own)
            if tied or getattr(getattr(part, "config", None), "is_encoder_decoder", False):
                return of_encoder  # type: ignore[no-any-return]
        return own  # type: ignore[no-any-return]
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if len(candidates) != 1:
        found = ", ".join(map(repr, candidates)) or "none"
        raise ValueError(
            f"embedding: expected the name of the module to perturb; the model's nn.Embedding are: {found}"
        )
    return next(iter(candidates.values()))


def first_having(model: nn.Module, name: str) -> nn.Module | None:
    """The model, or its first part, that has an attribute of this name: a Hugging Face model may stand in another."""
    return next((module for module in model.modules() if hasattr(module, name)), None)


class EmbeddingHook:
    """Reads the output of a module, or puts another in its place, for the length of one forward pass.

    A module that is called several times in a pass is read and replaced at its first call. It must not lie in a
    checkpointed region: what is computed anew in the backward pass would miss the replacement.

    Args:
        module: the module, as from :func:`find_embedding`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.compute_dtype = torch.float32
        """What the layers behind the module compute in, as it was read last: the autocast's dtype, or the output's."""
        self._output: Tensor | None = None
        self._point: Tensor | None = None
        self._replacement: Tensor | None = None
        self._differentiable = False
        self._calls = 0

    @contextmanager
    def read(self, differentiable: bool = False) -> Iterator[None]:
        """Keep the module's output of this pass, for :meth:`take`."""
        self._differentiable = differentiable
        with self._hooked():
            yield

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """What was read last, which is not kept any longer: the output, in its graph.

        Second, if asked to be differentiable, the tensor to differentiate the pass with respect to: the output, or,
        where nothing that leads to it requires grad, a leaf.
        """
        taken = self._output, self._point
        self._output = self._point = None
        return taken

    @contextmanager
    def replace(self, output: Tensor) -> Iterator[None]:
        """Let the module give this output in this pass."""
        self._replacement = output
        try:
            with self._hooked():
                yield
        finally:
            self._replacement = None

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        self._calls = 0
        handle = self._module.register_forward_hook(self._hook)
        try:
            yield
        finally:
            handle.remove()
        if self._calls == 0:
            raise RuntimeError(
                f"embedding: the module to perturb, a {type(self._module).__name__}, was not called in the forward "
                "pass; name another. (A compiled model that ran before without SMART keeps that graph: call "
                "torch.compiler.reset().)"
            )

    def _hook(self, _module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        self._calls += 1
        if self._calls > 1:
            return None
        if self._replacement is not None:
            return self._replacement
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = f"the {type(self._module).__name__} returns {type(output).__name__}"
            raise TypeError(f"embedding: {got}, expected a floating-point tensor")
        self._output, kind = output, output.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self.compute_dtype = torch.get_autocast_dtype(kind) if autocast else output.dtype
        if self._differentiable:
            self._point = output if output.requires_grad else output.detach().requires_grad_()
        # The model gets a copy, as it may change what it gets in place.
        return (output if self._point is None else self._point).clone()


def perturb(embeds: Tensor, delta: Tensor) -> Tensor:
    """Embeddings plus perturbation, formed in the wider of the two dtypes and rounded once to the embeddings'."""
    return (embeds + delta).to(embeds.dtype)


def warn_if_unresolved(embeds: Tensor, epsilon: float, adversary: str, compute_dtype: torch.dtype) -> None:
    """Warn if a perturbation of `epsilon` is below what is resolved at the size of these embeddings.

    In their own dtype it is lost when it is added. In the narrower one of autocast, the difference of two passes, whose
    gradient the "power" adversary follows, is rounding noise; the others take the gradient of one pass.

    Reads one number from the device, so it is no part of an ordinary step.
    """
    size = embeds.detach().abs().float().mean().item()
    if not (epsilon and size and math.isfinite(size)):
        return
    lost = "most of the perturbation is lost. Keep the embeddings in float32, or raise epsilon."
    noise = (
        "the difference that adversary='power' follows is rounding noise. Use adversary='predicted', or raise epsilon."
    )
    for dtype, consequence in ((embeds.dtype, lost), (compute_dtype, noise)):
        resolution = 2.0 ** math.floor(math.log2(size)) * torch.finfo(dtype).eps
        if epsilon < resolution and (consequence is lost or adversary == "power"):
            warnings.warn(
                f"epsilon = {epsilon:g} is below what {dtype} resolves at the embeddings' mean size of {size:.2g}, "
                f"{resolution:.1g}: {consequence}",
                stacklevel=2,
            )
            return

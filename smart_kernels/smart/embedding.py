"""Where the perturbation enters a model: at the output of its word embedding, by a forward hook.

What follows the word embedding (positions, token types, layer norm, dropout) is applied once and by the model
itself, so any architecture works. The hook is there for the length of a pass and no longer.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels.smart.gradients import leaves_of
from smart_kernels.smart.parallel import bare
from smart_kernels.smart.state import Attributes
from smart_kernels.smart.structure import replaced, tensors


def find_embedding(model: nn.Module, embedding: nn.Module | str | None = None) -> nn.Module:
    """The module whose output is perturbed.

    Args:
        model: the model, compiled or not, wrapped or not.
        embedding: the module itself, its name in `model`, or None for the word embedding: what
            ``get_input_embeddings()`` of the model, or of the only part that has it, gives (of the encoder, where
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
    found = {id(m): m for part in outermost_having(model, "get_input_embeddings") for m in _input_embeddings(part)}
    if not found:
        found = {id(m): m for m in model.modules() if isinstance(m, nn.Embedding)}
    if None in found.values() or len(found) != 1:
        raise ValueError(
            "embedding: it is not clear which module to perturb; expected its name, `embedding=...` "
            f"(smart_embedding in SmartTrainer's arguments), for instance one of {_candidates(model, found)}"
        )
    return next(iter(found.values()))  # type: ignore[return-value]


def first_having(model: nn.Module, name: str) -> nn.Module | None:
    """The model, or its first part, that has an attribute of this name: a Hugging Face model may stand in another."""
    return next((module for module in model.modules() if hasattr(module, name)), None)


def outermost_having(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module, or its outermost parts, that have an attribute of this name."""
    if hasattr(module, name):
        yield module
    else:
        for child in module.children():
            yield from outermost_having(child, name)


def _input_embeddings(part: Any) -> list[nn.Module | None]:
    """What a part says its word embedding is; of the encoder, where there is one; None where it does not say."""
    own = _asked(part)
    encoder: Any = part.get_encoder() if hasattr(part, "get_encoder") else None
    if encoder is not None and hasattr(encoder, "get_input_embeddings"):
        of_encoder = _asked(encoder)
        # Tied: two modules with one weight, of which the encoder calls its own.
        tied = getattr(of_encoder, "weight", None) is getattr(own, "weight", own)
        if tied or getattr(getattr(part, "config", None), "is_encoder_decoder", False):
            return [of_encoder]
    return [own]


def _asked(part: Any) -> nn.Module | None:
    try:
        module = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a library's way of saying that there is none
        return None
    return module if isinstance(module, nn.Module) else None


def _candidates(model: nn.Module, found: dict[int, nn.Module | None]) -> str:
    """Names for an error: what was found, every embedding, and maps of features that stand outside of any list."""
    found.pop(id(None), None)
    names = []
    for name, module in list(model.named_modules())[1:]:
        matrix = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not re.search(r"\.\d+(\.|$)", name)
        words = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if id(module) in found or words or (matrix and not list(module.children())):
            names.append(repr(name))
    return ", ".join(names) or "none"


_WITH_AUTOCAST = {kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(kind)}
"""Asked here, as a compiled model cannot ask in a hook."""


@dataclass
class EmbeddingCall:
    """A call of the module to perturb.

    Attributes:
        output: the first floating-point tensor of its output, in its graph.
        point: the tensor to differentiate the pass by: the output on its way into the model, or, where nothing that
            leads to it requires grad, or the graph is cut, a leaf; None where that was not asked for.
        ids: the integer tensor that was looked up, as far as there is one.
        grad: whether a graph was made.
        cut: whether the point is a leaf in place of an output that has a graph of its own.
    """

    output: Tensor
    point: Tensor | None
    ids: Tensor | None
    grad: bool
    cut: bool = False


class EmbeddingHook:
    """Reads the output of a module, or puts another in its place, for the length of one forward pass.

    In a pass of several calls each is read, and each is given an output of its own. Of an output with several parts
    the first floating-point tensor is meant.

    Args:
        module: the module, as from :func:`find_embedding`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.compute_dtype = torch.float32
        """What the layers behind the module compute in, as it was read last: the autocast's dtype, or the output's."""
        self.calls: list[EmbeddingCall] = []
        """Those of the pass that is read."""
        self.cuts: list[tuple[Tensor, Tensor]] = []
        """What the module gave, and the leaf that the model got in its place: their graphs are apart."""
        self._replacements: Mapping[int, Tensor] | None = None
        self._added: Mapping[int, Tensor] = {}
        self._differentiable = False
        self._cut = False
        self._count = 0
        self._saving: Any = None

    @contextmanager
    def read(self, differentiable: bool = False, cut: bool = False) -> Iterator[None]:
        """Keep the module's calls in this pass in :attr:`calls`.

        Args:
            differentiable: give each a point to differentiate by.
            cut: let the graph of the model begin behind the module, so that it can be freed without the module's.
        """
        self.calls = []
        self._differentiable = differentiable
        self._cut = cut
        with self._hooked():
            yield

    @contextmanager
    def unread(self) -> Iterator[None]:
        """The hook of :meth:`read` in a pass of which nothing is kept."""
        calls = self.calls
        try:
            with self.read():
                yield
        finally:
            self.calls = calls

    def forget(self) -> None:
        """Do not keep the calls, and their graph, any longer."""
        self.calls = []
        self.cuts = []

    @contextmanager
    def replace(
        self, outputs: Mapping[int, Tensor], calls: int, added: Mapping[int, Tensor] | None = None
    ) -> Iterator[None]:
        """Let the module's calls give other outputs in this pass.

        Args:
            outputs: by the number of the call.
            calls: how many there are to be.
            added: by the number of the call, what is added to the output that the call gives in this pass.
        """
        self._replacements, self._added = outputs, added or {}
        try:
            with self._hooked():
                yield
        finally:
            self._replacements, self._added = None, {}
        if self._count != calls:
            raise RuntimeError(
                f"embedding: the {type(self.module).__name__} was called {self._count} times in a pass with a "
                f"perturbation, {calls} times in the one without; expected the same calls in each"
            )

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        self._count = 0
        self._saving = _saving_hooks()
        handle = self.module.register_forward_hook(self._hook)
        try:
            yield
        finally:
            handle.remove()

    def check_called(self, calls: tuple[EmbeddingCall, ...]) -> None:
        """Raise RuntimeError where the module was not called in what the logits come from."""
        if not calls:
            raise RuntimeError(
                f"embedding: the module to perturb, a {type(self.module).__name__}, was not called in the forward "
                "pass; name another, or make Smart anew if the model was changed after it. (A compiled model that ran "
                "before without SMART keeps that graph: call torch.compiler.reset().)"
            )

    def _hook(self, _module: nn.Module, args: Any, output: Any) -> Any:
        place = self._count
        self._count += 1
        if not torch.compiler.is_compiling():
            self._refuse_checkpoint()
        if self._replacements is not None:
            if place in self._replacements:
                return with_first_floating(output, self._replacements[place])
            if place in self._added:
                x = first_floating(output)
                assert x is not None
                return with_first_floating(output, perturb(x, self._added[place]))
            return output
        x = first_floating(output)
        if x is None or x.dim() < 2:
            got = f"the {type(self.module).__name__} returns {type(output).__name__}"
            raise TypeError(
                f"embedding: {got}, expected a floating-point tensor of a shape such as (B, L, H), alone or the first "
                "of several parts"
            )
        kind = x.device.type
        autocast = kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind)
        self.compute_dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        point, cuts = None, {}
        if self._cut and torch.is_grad_enabled() and self._stands_alone(output):
            cuts = {id(v): v.detach().requires_grad_() for v in tensors([output]) if _cuttable(v)}
            self.cuts += [(v, cuts[id(v)]) for v in tensors([output]) if id(v) in cuts]
            point = cuts.get(id(x))
        if point is None and self._differentiable and torch.is_grad_enabled():
            # a view, as the output itself may have been taken by another hook
            point = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        ids = [a for a in args if isinstance(a, Tensor) and not a.is_floating_point()]
        cut = bool(cuts) and id(x) in cuts  # of no tensor may torch 2.10 ask for the id while it compiles
        self.calls.append(EmbeddingCall(x, point, ids[0] if ids else None, torch.is_grad_enabled(), cut))
        # The model gets a copy, as it may change what it gets in place.
        given = (x if point is None else point).clone()
        if not cuts:
            return with_first_floating(output, given)
        return replaced(output, lambda v: given if v is x else cuts[id(v)].clone() if id(v) in cuts else v)

    def _stands_alone(self, output: Any) -> bool:
        """Whether what the module gave was made of its own parameters and of nothing else that has a gradient."""
        own = {id(p) for p in self.module.parameters()}
        return all(id(leaf) in own for x in tensors([output]) if _cuttable(x) for leaf in leaves_of(x)[0])

    def _refuse_checkpoint(self) -> None:
        """What a checkpointed region computes anew in the backward pass would miss the replacement."""
        saving = _saving_hooks()
        if saving is not self._saving and saving is not None and "checkpoint" in saving.__qualname__:
            raise RuntimeError(
                f"embedding: the module to perturb, a {type(self.module).__name__}, lies in a checkpointed region, "
                "which is computed anew in the backward pass, without the perturbation; expected one in front of it, "
                "or no checkpointing there"
            )


def _cuttable(x: Tensor) -> bool:
    return x.is_floating_point() and x.requires_grad


def _saving_hooks() -> Any:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return hooks[0] if hooks else None


def first_floating(x: Any) -> Tensor | None:
    """The first floating-point tensor of a module's output: a tensor, tuple, list, mapping or object with fields."""
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else None
    return next((v for v in tensors(x) if v.is_floating_point()), None)


def with_first_floating(x: Any, new: Tensor) -> Any:
    """A module's output with another tensor in the place of its first floating-point one."""
    if isinstance(x, Tensor):
        return new
    first = first_floating(x)
    return replaced(x, lambda v: new if v is first else v)


def perturb(embeds: Tensor, delta: Tensor) -> Tensor:
    """Embeddings plus perturbation, formed in the wider of the two dtypes and rounded once to the embeddings'."""
    return (embeds + delta).to(embeds.dtype)


def mean_size(embeds: Tensor) -> float:
    """The mean absolute value; 0 where it is not finite. Reads one number from the device."""
    size: float = embeds.detach().abs().float().mean().item()
    return size if math.isfinite(size) else 0.0


_AT_ONCE = 8192
"""Words that are looked up in one call."""


def mean_norm(module: nn.Module) -> float:
    """The mean l_2 norm of what a module gives for a word, over all of its words.

    Of a plain :class:`torch.nn.Embedding` these are the rows of its weight, with `max_norm` as it would shorten them.
    Another, which may scale what it looks up, is called in evaluation mode, and is afterwards as it was.

    Raises:
        ValueError: it has no weight of a row per word, or cannot be called with words.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        has = f"a weight of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        raise ValueError(_NO_ROWS.format(f"{type(module).__name__} with {has}"))
    sharded = hasattr(weight, "full_tensor")
    own = type(module).forward is not nn.Embedding.forward or "forward" in vars(module)
    own |= getattr(module, "max_norm", None) is not None
    # the hooks of a sharded module gather shards, and so do those of the parts of one that wraps another
    if (own and "weight" in module._parameters) if sharded else (own or module._forward_hooks):
        return _mean_norm_by_calls(module, weight)
    mean: Any = weight.detach().float().norm(dim=1).mean()
    return float(mean.full_tensor() if sharded else mean)


@torch.no_grad()
def _mean_norm_by_calls(module: nn.Module, weight: Any) -> float:
    parameters, sharded = dict(module._parameters), hasattr(weight, "full_tensor")
    run: Any = module.forward if sharded else module  # past the hooks, which would gather shards
    words = getattr(module, "num_embeddings", None)
    words = words if isinstance(words, int) else len(weight)
    # a look-up shortens these in place
    shortened = {
        f"{name}.weight".lstrip("."): m.weight.clone()
        for name, m in module.named_modules()
        if isinstance(m, nn.Embedding) and m.max_norm is not None and not sharded
    }
    attributes, training = Attributes(module.modules()), [m for m in module.modules() if m.training]
    total = 0.0
    try:
        if sharded:
            module._parameters["weight"] = nn.Parameter(weight.full_tensor())
        module.eval()
        for ids in torch.arange(words, device=weight.device).split(_AT_ONCE):
            given = (ids[None],)
            output = torch.func.functional_call(module, shortened, given) if shortened else run(*given)
            x = first_floating(output)
            if x is None or x.dim() != 3 or x.shape[:2] != given[0].shape:
                got = type(output).__name__ if x is None else f"shape {tuple(x.shape)}"
                raise ValueError(f"for {len(ids)} words it gave {got}")
            total += float(x.double().norm(dim=-1).sum())
    except Exception as error:  # whatever a module raises that takes no words
        got = f"{type(module).__name__} that cannot be called with words ({error})"
        raise ValueError(_NO_ROWS.format(got)) from None
    finally:
        for m in training:
            m.training = True
        module._parameters.update(parameters)
        attributes.find_changes()
        attributes.undo()
    return total / words


_NO_ROWS = (
    "embedding: got a {}, expected a row for each word, whose norm sets the radius; set it yourself by "
    "SmartConfig(epsilon=...)"
)


def resolved_at(size: float, dtype: torch.dtype) -> float:
    """The distance of the numbers of a dtype at this size > 0."""
    return 2.0 ** math.floor(math.log2(size)) * torch.finfo(dtype).eps


def warn_if_unresolved(embeds: Tensor, epsilon: float, adversary: str, compute_dtype: torch.dtype) -> bool:
    """Warn, and return True, if a perturbation of `epsilon` is below what is resolved at the size of these embeddings.

    In their own dtype it is lost when it is added. In the narrower one of autocast, the difference of two passes, whose
    gradient the "power" adversary follows, is rounding noise; the others take the gradient of one pass.

    Reads one number from the device, so it is no part of an ordinary step.
    """
    size = mean_size(embeds)
    if not (epsilon and size):
        return False
    lost = "most of the perturbation is lost. Keep the embeddings in float32, or raise epsilon."
    noise = (
        "the difference that adversary='power' follows is rounding noise. Use adversary='predicted', or raise epsilon."
    )
    for dtype, consequence in ((embeds.dtype, lost), (compute_dtype, noise)):
        resolution = resolved_at(size, dtype)
        if epsilon < resolution and (consequence is lost or adversary == "power"):
            warnings.warn(
                f"epsilon = {epsilon:g} is below what {dtype} resolves at the embeddings' mean size of {size:.2g}, "
                f"{resolution:.1g}: {consequence}",
                stacklevel=2,
            )
            return True
    return False

"""The adversarial perturbation of embeddings, initialised and moved: public functions, schemas, fakes."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from smart_kernels import reference
from smart_kernels.ops._chunks import span
from smart_kernels.ops._library import LIBRARY, changes_arguments, define, draw_seed

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def init_perturbation(
    embeds: Tensor, std: float, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    r"""The random start of the adversary: :math:`\nu \sim N(0, \sigma^2 I)`, zero where the mask is.

    The first line of the inner loop of SMART (Jiang et al. 2020, arXiv 1911.03437, algorithm 1). Each number
    depends on a seed and its own place alone (Philox4x32-10 and Box and Muller's transform, in float32): neither
    on the mask, nor on threads or tiles, and no more than rounding on the device.

    Args:
        embeds: what is to be perturbed, shape (B, ..., H), any strides; float16, bfloat16, float32 or float64.
            Only its shape, dtype and device count.
        std: the standard deviation sigma >= 0, in units of the embeddings. The paper's is 1e-5.
        mask: positions to perturb, shape (B, ...) without H or fewer of these dimensions, any real dtype,
            for instance an attention mask: 0 where the perturbation is 0.
        generator: where the seed comes from; by default that of the device. One 64-bit seed is drawn for a
            call, on the generator's device: from the device's own, it stays there, and each replay of a CUDA
            graph draws another; from a CPU generator, the noise is the same on any device.

    Returns:
        The perturbation, of the shape and device of ``embeds``, contiguous, in float32 (float64 for float64
        embeddings, with float32's resolution): bfloat16 could not hold x + 1e-5. It requires no gradient.

    Raises:
        TypeError: an argument is of the wrong type or of a dtype that is not supported.
        ValueError: shapes or devices do not fit, or ``std`` is negative or not finite.

    Example:
        >>> import torch
        >>> from smart_kernels import init_perturbation
        >>> embeds, mask = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> delta = init_perturbation(embeds, std=1e-5, mask=mask, generator=torch.Generator().manual_seed(0))
        >>> delta.count_nonzero((1, 2))
        tensor([12,  4])
    """
    _check_floating("embeds", embeds)
    if embeds.dim() < 2:
        raise ValueError(f"embeds: got shape {tuple(embeds.shape)}, expected (B, ..., H)")
    std = _check_number("std", std)
    mask = None if mask is None else check_mask(mask, embeds, "embeds")
    seed = draw_seed(generator, embeds.device)
    return _init(embeds, seed, mask, std)  # type: ignore[no-any-return]


def perturbation_step(
    delta: Tensor,
    grad: Tensor,
    step_size: float,
    epsilon: float,
    norm: str = "linf",
    scope: str = "sample",
    mask: Tensor | None = None,
    ascent: str = "normalized",
    skipped: Tensor | None = None,
) -> Tensor:
    r"""One step of the adversary: along the gradient, then back onto the ball.

    .. math:: \delta \leftarrow \Pi_\epsilon(\delta + \eta\, g / \|g\|)

    with the same norm for both: :math:`\Pi` clamps to :math:`\pm\epsilon` for :math:`\ell_\infty`, and multiplies by
    :math:`\min(1, \epsilon / \|\cdot\|_2)` for :math:`\ell_2` (Jiang et al. 2020, arXiv 1911.03437, algorithm 1). A
    factor on the gradient, such as a loss scale, changes nothing. Everything stays on the device.

    A zero gradient makes no step. One that is not finite makes none either, and is counted. Both are so for
    each sample or each token, whichever the scope is; the projection is done in any case, so the bound always holds.

    Args:
        delta: the perturbation, shape (B, ..., H), any strides; float32 or float64.
        grad: the gradient of what is to be maximised with respect to it, same shape and device, any strides;
            float16, bfloat16 or float32, and float64 with a float64 ``delta``.
        step_size: eta >= 0, in units of the embeddings (of embeddings per unit of gradient, for "raw"). The
            paper's is 1e-3.
        epsilon: radius of the ball >= 0, in units of the embeddings. The paper's is 1e-5.
        norm: "linf" or "l2", of the ball and of the gradient's normalisation.
        scope: over what a norm is taken: "sample" for all positions and features of an example, "token" for the
            last dimension.
        mask: positions that count, shape (B, ...) without H or fewer of these dimensions, any real dtype, for
            instance an attention mask. Where it is 0 the result is 0, and what stands in ``delta`` and ``grad``
            has no share in any norm.
        ascent: the direction: "normalized" for the paper's g / ||g||, "sign" for the signs of g, "raw" for g.
        skipped: int64, one element, same device: the number of samples or tokens whose gradient was not finite
            is added to it, with no synchronisation.

    Returns:
        The new perturbation, shape and dtype of ``delta``, contiguous; a constant of the outer problem, so it
        requires no gradient. For "linf" no element exceeds ``epsilon``; for "l2" no norm does, taken in float64
        or exactly.

    Raises:
        TypeError: an argument is of the wrong type or of a dtype that is not supported.
        ValueError: shapes or devices do not fit, a number is negative or not finite, or an option is unknown.

    Example:
        >>> import torch
        >>> from smart_kernels import perturbation_step
        >>> delta, grad = torch.zeros(1, 1, 3), torch.tensor([[[1e-30, -2e-30, 0]]])
        >>> perturbation_step(delta, grad, step_size=1e-5, epsilon=8e-6)
        tensor([[[ 5.0000e-06, -8.0000e-06,  0.0000e+00]]])
    """
    mask = _check_step(delta, grad, mask, skipped)
    options = _check_options(step_size, epsilon, norm, scope, ascent)
    with torch.no_grad():
        return _step(delta, grad, mask, skipped, *options)  # type: ignore[no-any-return]


def perturbation_step_(
    delta: Tensor,
    grad: Tensor,
    step_size: float,
    epsilon: float,
    norm: str = "linf",
    scope: str = "sample",
    mask: Tensor | None = None,
    ascent: str = "normalized",
    skipped: Tensor | None = None,
) -> Tensor:
    """:func:`perturbation_step` in place.

    Args:
        delta: as in :func:`perturbation_step`, and changed; no element of it may share memory with another.
        grad: as in :func:`perturbation_step`, in memory of its own; so is the mask.
        step_size: as in :func:`perturbation_step`.
        epsilon: as in :func:`perturbation_step`.
        norm: as in :func:`perturbation_step`.
        scope: as in :func:`perturbation_step`.
        mask: as in :func:`perturbation_step`.
        ascent: as in :func:`perturbation_step`.
        skipped: as in :func:`perturbation_step`.

    Returns:
        ``delta``.

    Raises:
        TypeError: an argument is of the wrong type or of a dtype that is not supported.
        ValueError: shapes or devices do not fit, a number is negative or not finite, or an option is unknown.
        RuntimeError: ``delta`` or ``grad`` requires a gradient, outside of :class:`torch.no_grad`.

    Example:
        >>> import torch
        >>> from smart_kernels import perturbation_step_
        >>> delta = torch.zeros(1, 1, 2)
        >>> perturbation_step_(delta, torch.tensor([[[3.0, 4.0]]]), step_size=1.0, epsilon=0.5, norm="l2")
        tensor([[[0.3000, 0.4000]]])
    """
    mask = _check_step(delta, grad, mask, skipped)
    if not torch.compiler.is_compiling():  # within a graph neither can be asked
        if delta.is_neg():
            raise ValueError("delta: got a view that negates its elements, expected x.resolve_neg()")
        length, shared = span(delta)
        if shared:
            raise ValueError(
                f"delta: elements share memory (shape {tuple(delta.shape)}, strides {delta.stride()}), "
                "expected a place of its own for each"
            )
        if not torch._C._are_functorch_transforms_active() and torch._C._len_torch_dispatch_stack() == 0:
            end = delta.data_ptr() + length * delta.itemsize
            for name, x in (("grad", grad), ("mask", mask)):
                if x is None or not x.numel() or not delta.numel():
                    continue
                if x.data_ptr() < end and delta.data_ptr() < x.data_ptr() + span(x)[0] * x.itemsize:
                    raise ValueError(f"{name}: shares memory with delta, which is changed, expected memory of its own")
    _step_(delta, grad, mask, skipped, *_check_options(step_size, epsilon, norm, scope, ascent))
    return delta


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected float16, bfloat16, float32 or float64")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected torch.strided")


def _check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name}: got {value}, expected a finite number >= 0")
    return float(value)


def check_mask(mask: Tensor, x: Tensor, name: str) -> Tensor:
    """The mask, with all dimensions of x but the last, contiguous."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, expected a tensor or None")
    if mask.dtype.is_complex:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected a real one")
    if not 1 <= mask.dim() < x.dim() or mask.shape != x.shape[: mask.dim()]:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected the first dimensions of {name}, {tuple(x.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask: got device {mask.device}, expected that of {name}, {x.device}")
    mask = mask.detach().reshape(*mask.shape, *[1] * (x.dim() - 1 - mask.dim()))
    return mask.expand(x.shape[:-1]).contiguous()


def _check_step(delta: Tensor, grad: Tensor, mask: Tensor | None, skipped: Tensor | None) -> Tensor | None:
    _check_floating("delta", delta)
    _check_floating("grad", grad)
    if delta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"delta: got dtype {delta.dtype}, expected float32 or float64: it cannot hold x + 1e-5")
    if (delta.dtype == torch.float64) != (grad.dtype == torch.float64):
        raise TypeError(f"grad: got dtype {grad.dtype} with delta {delta.dtype}, expected float64 for both or neither")
    if delta.dim() < 2:
        raise ValueError(f"delta: got shape {tuple(delta.shape)}, expected (B, ..., H)")
    if grad.shape != delta.shape:
        raise ValueError(f"grad: got shape {tuple(grad.shape)}, expected that of delta, {tuple(delta.shape)}")
    if grad.device != delta.device:
        raise ValueError(f"grad: got device {grad.device}, expected that of delta, {delta.device}")
    if skipped is not None:
        if not isinstance(skipped, Tensor):
            raise TypeError(f"skipped: got {type(skipped).__name__}, expected a tensor or None")
        if skipped.dtype != torch.int64:
            raise TypeError(f"skipped: got dtype {skipped.dtype}, expected int64")
        if skipped.numel() != 1:
            raise ValueError(f"skipped: got shape {tuple(skipped.shape)}, expected one element")
        if skipped.device != delta.device:
            raise ValueError(f"skipped: got device {skipped.device}, expected that of delta, {delta.device}")
    return None if mask is None else check_mask(mask, delta, "delta")


def _check_options(
    step_size: float, epsilon: float, norm: str, scope: str, ascent: str
) -> tuple[float, float, int, int, int]:
    codes = []
    for name, value, known in (
        ("norm", norm, reference.NORMS),
        ("scope", scope, reference.SCOPES),
        ("ascent", ascent, reference.ASCENTS),
    ):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, known))}")
        codes.append(known.index(value))
    return _check_number("step_size", step_size), _check_number("epsilon", epsilon), *codes  # type: ignore[return-value]


def _init_fake(embeds: Tensor, seed: Tensor, mask: Tensor | None, std: float) -> Tensor:
    return embeds.new_empty(embeds.shape, dtype=reference.compute_dtype(embeds))


def _step_fake(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor | None,
    step_size: float,
    epsilon: float,
    norm: int,
    scope: int,
    ascent: int,
) -> Tensor:
    return delta.new_empty(delta.shape)


def _step_fake_(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor | None,
    step_size: float,
    epsilon: float,
    norm: int,
    scope: int,
    ascent: int,
) -> None:
    return None


_STEP = (
    "Tensor grad, Tensor? mask, Tensor(b!)? skipped, float step_size, float epsilon, int norm, int scope, int ascent"
)
_TRITON = "smart_kernels.triton_kernels.perturbation"

_init = define(
    "init_perturbation(Tensor embeds, Tensor seed, Tensor? mask, float std) -> Tensor",
    reference=reference.init_perturbation,
    fake=_init_fake,
    triton=f"{_TRITON}:init_perturbation",
)
_step = define(
    f"perturbation_step(Tensor delta, {_STEP}) -> Tensor",
    reference=reference.perturbation_step,
    fake=_step_fake,
    triton=f"{_TRITON}:perturbation_step",
)
_step_ = define(
    f"perturbation_step_(Tensor(a!) delta, {_STEP}) -> ()",
    reference=reference.perturbation_step_,
    fake=_step_fake_,
    triton=f"{_TRITON}:perturbation_step_",
)
LIBRARY.impl("init_perturbation", torch.library.fallthrough_kernel, "Autograd")  # a constant, whatever embeds asks
changes_arguments(_step, "perturbation_step")
changes_arguments(_step_, "perturbation_step_")

"""Divergences of two rows of logits, the symmetric KL first: public functions, schemas, fakes, autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from smart_kernels import reference
from smart_kernels.ops._library import LIBRARY, NAMESPACE, define, no_derivative

REDUCTION = {name: code for code, name in enumerate(reference.REDUCTIONS)}
KIND = {name: code for code, name in enumerate(reference.KINDS)}
FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def divergence(
    input: Tensor,
    target: Tensor,
    kind: str = "symmetric_kl",
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.5,
    temperature: float = 1.0,
    detach_targets: bool = False,
) -> Tensor:
    r"""A divergence of the class distributions of two tensors of logits.

    With p = softmax(input / T) and q = softmax(target / T) over the last dimension, a row's loss is, by ``kind``:

    - "symmetric_kl": :math:`\mathrm{KL}(p\|q) + \mathrm{KL}(q\|p) = \sum_j (p_j - q_j) \log(p_j / q_j)`, the
      smoothness measure of SMART (Jiang et al. 2020, arXiv 1911.03437, section 3.1);
    - "kl": :math:`\mathrm{KL}(q\|p) = \sum_j q_j \log(q_j / p_j)`, what :func:`torch.nn.functional.kl_div` calls the
      divergence of (input, target), and distillation the forward one;
    - "reverse_kl": :math:`\mathrm{KL}(p\|q)`;
    - "js": :math:`\beta\,\mathrm{KL}(q\|m) + (1 - \beta)\,\mathrm{KL}(p\|m)` with m = beta q + (1 - beta) p, the
      generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv 2306.13649); at most log 2;
    - "hellinger": :math:`\tfrac12 \sum_j (\sqrt{p_j} - \sqrt{q_j})^2`, the square of the Hellinger distance; at most 1;
    - "total_variation": :math:`\tfrac12 \sum_j |p_j - q_j|`, at most 1; a class of which both sides are equal counts as
      if it were a constant in the gradient.

    All keep their digits also where the logits differ by 1e-5, where the difference of two log-softmaxes or of two
    softmaxes is rounding noise.

    Args:
        input: logits, shape (..., C) with C >= 1, any strides; float16, bfloat16, float32 or float64.
        target: logits of the same shape and device. Narrow dtypes mix freely; float64 only with float64.
        kind: the divergence, one of those above.
        weight: a factor per row, shape (...), any real dtype, for instance an attention mask. A row of weight
            0 counts nothing, whatever it holds. Not differentiated.
        reduction: "none" for the weighted losses of the rows, shape (...); "sum"; "mean", their weighted mean
            over the rows; "batchmean", their sum divided by ``input.size(0)`` as in :class:`torch.nn.KLDivLoss`.
        beta: the share of ``target`` in the mixture of "js", in (0, 1); without effect on the others. At 0 and 1 "js"
            itself is 0; what other libraries take it for there are the kinds "kl" and "reverse_kl".
        temperature: T > 0, which the logits are divided by. The loss is not multiplied by its square.
        detach_targets: treat ``target`` as a constant, which gets no gradient; with "symmetric_kl" the target
            distribution of each of the two divergences. The gradients are then p - q and q - p. The loss stays the
            same.

    Returns:
        The loss, >= 0, in float32 (float64 for float64 logits), differentiable once, backwards, in ``input`` and
        ``target``. NaN where a row holds NaN or nothing but -inf; where a class is masked by -inf on one side only,
        +inf if a KL divergence of that sort is, else what the equation says; classes masked on both sides count as
        absent. With no rows, "sum" is 0 and both means NaN.

    Raises:
        TypeError: an argument is no tensor, or of a dtype or type that is not supported.
        ValueError: shapes or devices do not fit, the kind or the reduction is unknown, or a number out of its range.

    Example:
        >>> import torch
        >>> from smart_kernels import divergence
        >>> teacher = torch.tensor([[1.0, 2.0, 3.0]])
        >>> student = torch.tensor([[1.0, 2.0, 2.0]], requires_grad=True)
        >>> for kind in ("kl", "js", "total_variation"):
        ...     print(f"{kind} {divergence(student, teacher, kind, temperature=2.0).item():.4f}")
        kl 0.0310
        js 0.0077
        total_variation 0.1228
    """
    check_kind(kind, beta, temperature)
    weight = _check(input, target, weight, reduction, detach_targets)
    if detach_targets and kind != "symmetric_kl":
        detach_targets, target = False, target.detach()
    return _loss(input, target, weight, reduction, detach_targets, (KIND[kind], float(beta), float(temperature)))


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    detach_targets: bool,
    options: tuple[int, float, float] | tuple[()] = (),
) -> Tensor:
    """The loss of arguments that are checked, by the op that serves best.

    The options are kind, beta and temperature; none are the op's defaults, as each that is passed takes time.
    """
    how = REDUCTION[reduction], detach_targets
    loss: Tensor
    if torch.compiler.is_compiling():
        loss = _forward(input, target, weight, *how, *options)
    elif (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)) or forward_ad._current_level >= 0:
        apply: Any = _Differentiable.apply if torch._C._are_functorch_transforms_active() else _apply
        loss = apply(input, target, weight, how, options)
    else:
        loss, _, _ = _forward_backward(input, target, weight, *how, False, False, *options)
    return loss


def divergence_grad(
    input: Tensor,
    target: Tensor,
    kind: str = "symmetric_kl",
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.5,
    temperature: float = 1.0,
    detach_targets: bool = False,
) -> Tensor:
    """Gradient of :func:`divergence` with respect to ``input`` alone, with no loss and no graph.

    The cotangent of the adversary's inner step: it reads both logits and writes one gradient.

    Args:
        input: logits, as in :func:`divergence`; the gradient is taken with respect to these.
        target: logits of the same shape.
        kind: as in :func:`divergence`.
        weight: as in :func:`divergence`.
        reduction: as in :func:`divergence`; "none" and "sum" give the same gradient.
        beta: as in :func:`divergence`.
        temperature: as in :func:`divergence`.
        detach_targets: as in :func:`divergence`; without effect but for "symmetric_kl".

    Returns:
        The gradient, shape, dtype and device of ``input``, contiguous; it requires no gradient itself.

    Raises:
        TypeError: an argument is no tensor, or of a dtype or type that is not supported.
        ValueError: shapes or devices do not fit, the kind or the reduction is unknown, or a number out of its range.

    Example:
        >>> import torch
        >>> from smart_kernels import divergence_grad
        >>> divergence_grad(torch.tensor([[1e-5, 0.0]]), torch.zeros(1, 2), "kl")
        tensor([[ 2.5000e-06, -2.5000e-06]])
    """
    check_kind(kind, beta, temperature)
    weight = _check(input, target, weight, reduction, detach_targets)
    detach_targets = detach_targets and kind == "symmetric_kl"
    options = REDUCTION[reduction], detach_targets, KIND[kind], float(beta), float(temperature)
    return _grad(input, target, weight, *options)  # type: ignore[no-any-return]


def symmetric_kl(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    detach_targets: bool = False,
) -> Tensor:
    """The symmetric KL divergence: :func:`divergence` of the first kind, where all arguments are described.

    Args:
        input: logits, shape (..., C).
        target: logits of the same shape.
        weight: a factor per row, shape (...), or None.
        reduction: "none", "sum", "mean" or "batchmean".
        detach_targets: treat the target distribution of each of the two divergences as a constant.

    Returns:
        The loss, as in :func:`divergence`.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes or devices do not fit, or the reduction is unknown.

    Example:
        >>> import torch
        >>> from smart_kernels import symmetric_kl
        >>> clean = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
        >>> loss = symmetric_kl(clean + 1e-5 * torch.tensor([1.0, 0.0, 0.0]), clean)
        >>> print(f"{loss.item():.2e}")
        8.21e-12
    """
    weight = _check(input, target, weight, reduction, detach_targets)
    return _loss(input, target, weight, reduction, detach_targets)


def symmetric_kl_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    detach_targets: bool = False,
) -> Tensor:
    """Gradient of :func:`symmetric_kl` with respect to ``input`` alone: :func:`divergence_grad` of the first kind.

    Args:
        input: logits, shape (..., C); the gradient is taken with respect to these.
        target: logits of the same shape.
        weight: a factor per row, shape (...), or None.
        reduction: "none", "sum", "mean" or "batchmean".
        detach_targets: treat the target distribution of each of the two divergences as a constant.

    Returns:
        The gradient, as in :func:`divergence_grad`.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes or devices do not fit, or the reduction is unknown.

    Example:
        >>> import torch
        >>> from smart_kernels import symmetric_kl_grad
        >>> symmetric_kl_grad(torch.tensor([[1e-5, 0.0]]), torch.zeros(1, 2))
        tensor([[ 5.0000e-06, -5.0000e-06]])
    """
    weight = _check(input, target, weight, reduction, detach_targets)
    return _grad(input, target, weight, REDUCTION[reduction], detach_targets)  # type: ignore[no-any-return]


class DivergenceLoss(torch.nn.Module):
    """The module of :func:`divergence`.

    Args:
        kind: as in :func:`divergence`.
        reduction: as in :func:`divergence`.
        beta: as in :func:`divergence`.
        temperature: as in :func:`divergence`.
        detach_targets: as in :func:`divergence`.

    Example:
        >>> import torch
        >>> from smart_kernels import DivergenceLoss
        >>> DivergenceLoss("js", reduction="sum")(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """

    def __init__(
        self,
        kind: str = "symmetric_kl",
        reduction: str = "batchmean",
        beta: float = 0.5,
        temperature: float = 1.0,
        detach_targets: bool = False,
    ) -> None:
        super().__init__()
        check_kind(kind, beta, temperature)
        check_options(reduction, detach_targets)
        self.kind = kind
        self.reduction = reduction
        self.beta = beta
        self.temperature = temperature
        self.detach_targets = detach_targets

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits ``input`` and ``target``, shape (..., C), with ``weight`` (...) per row."""
        options = self.reduction, self.beta, self.temperature, self.detach_targets
        return divergence(input, target, self.kind, weight, *options)

    def extra_repr(self) -> str:
        """The options, as they stand in the module's printed form."""
        names = "kind", "reduction", "beta", "temperature", "detach_targets"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class SymmetricKLLoss(torch.nn.Module):
    """The module of :func:`symmetric_kl`.

    Args:
        reduction: as in :func:`symmetric_kl`.
        detach_targets: as in :func:`symmetric_kl`.

    Example:
        >>> import torch
        >>> from smart_kernels import SymmetricKLLoss
        >>> SymmetricKLLoss(reduction="sum")(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """

    def __init__(self, reduction: str = "batchmean", detach_targets: bool = False) -> None:
        super().__init__()
        check_options(reduction, detach_targets)
        self.reduction = reduction
        self.detach_targets = detach_targets

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits ``input`` and ``target``, shape (..., C), with ``weight`` (...) per row."""
        return symmetric_kl(input, target, weight, self.reduction, self.detach_targets)

    def extra_repr(self) -> str:
        """The options, as they stand in the module's printed form."""
        return f"reduction={self.reduction!r}, detach_targets={self.detach_targets}"


def check_options(reduction: str, detach_targets: bool) -> None:
    """Raise where one of the options of every divergence is none."""
    if not isinstance(reduction, str) or reduction not in REDUCTION:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(map(repr, REDUCTION))}")
    if not isinstance(detach_targets, bool):
        raise TypeError(f"detach_targets: got {type(detach_targets).__name__}, expected bool")


def check_kind(kind: str, beta: float, temperature: float) -> None:
    """Raise where there is no such kind, or a number is out of its range."""
    if not isinstance(kind, str) or kind not in KIND:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, KIND))}")
    for name, number in (("beta", beta), ("temperature", temperature)):
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise TypeError(f"{name}: got {type(number).__name__}, expected a number")
    if not 0 < beta < 1:
        raise ValueError(
            f"beta: got {beta}, expected a number strictly between 0 and 1: at 0 and 1 the divergence is 0; what is "
            "meant there are kind='kl', the divergence of target from input, and kind='reverse_kl'"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, expected a finite number > 0")


def _not_logits(name: str, value: Any) -> TypeError:
    if not isinstance(value, Tensor):
        return TypeError(f"{name}: got {type(value).__name__}, expected a tensor of logits")
    if value.layout is not torch.strided:
        return TypeError(f"{name}: got layout {value.layout}, expected torch.strided")
    return TypeError(f"{name}: got dtype {value.dtype}, expected float16, bfloat16, float32 or float64")


def _check(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, detach_targets: bool) -> Tensor | None:
    """Check all arguments but the kind's; the weight comes back contiguous in the dtype of the arithmetic."""
    check_options(reduction, detach_targets)
    if not isinstance(input, Tensor) or input.dtype not in FLOATING or input.layout is not torch.strided:
        raise _not_logits("input", input)
    if not isinstance(target, Tensor) or target.dtype not in FLOATING or target.layout is not torch.strided:
        raise _not_logits("target", target)
    if input.dtype != target.dtype and torch.float64 in (input.dtype, target.dtype):
        raise TypeError(
            f"target: got dtype {target.dtype} with input {input.dtype}, expected float64 for both or neither"
        )
    shape = input.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"input: got shape {tuple(shape)}, expected (..., C) with C >= 1")
    if target.shape != shape:
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected that of input, {tuple(shape)}")
    if input.device != target.device:
        raise ValueError(f"target: got device {target.device}, expected that of input, {input.device}")
    return check_weight(weight, input)


def check_weight(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """The factor per row of the input, contiguous in the dtype of the arithmetic."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a tensor or None")
    if weight.dtype.is_complex:
        raise TypeError(f"weight: got dtype {weight.dtype}, expected a real one")
    if weight.shape != input.shape[:-1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected a factor per row, {tuple(input.shape[:-1])}"
        )
    if weight.device != input.device:
        raise ValueError(f"weight: got device {weight.device}, expected that of input, {input.device}")
    if weight.requires_grad:
        raise ValueError("weight: requires grad, expected a constant: the loss is not differentiated in it")
    return weight.to(reference.compute_dtype(input)).contiguous()


def _forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    kind: int = 0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    return input.new_empty((() if reduction else input.shape[:-1]), dtype=reference.compute_dtype(input))


def _backward_fake(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    input_grad: bool,
    target_grad: bool,
    kind: int = 0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if input_grad else 0),
        target.new_empty(target.shape if target_grad else 0),
    )


def _forward_backward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    input_grad: bool,
    target_grad: bool,
    kind: int = 0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _forward_fake(input, target, weight, reduction, detach_targets)
    return loss, *_backward_fake(None, input, target, weight, reduction, detach_targets, input_grad, target_grad)


def _grad_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    kind: int = 0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    return input.new_empty(input.shape)


_LOGITS = "Tensor input, Tensor target, Tensor? weight, int reduction, bool detach_targets"
_WANTED = "bool input_grad, bool target_grad"
_OPTIONS = "int kind=0, float beta=0.5, float temperature=1.0"
"""`detach_targets` is of the symmetric KL: for any other kind, a caller does not ask for the gradient of the target."""
_TRITON = "smart_kernels.triton_kernels.divergence"

_forward = define(
    f"divergence({_LOGITS}, {_OPTIONS}) -> Tensor",
    reference=reference.divergence,
    fake=_forward_fake,
    triton=f"{_TRITON}:divergence",
)
_backward = define(
    f"divergence_backward(Tensor? grad_output, {_LOGITS}, {_WANTED}, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=reference.divergence_backward,
    fake=_backward_fake,
    triton=f"{_TRITON}:divergence_backward",
)
_forward_backward = define(
    f"divergence_forward_backward({_LOGITS}, {_WANTED}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.divergence_forward_backward,
    fake=_forward_backward_fake,
    triton=f"{_TRITON}:divergence_forward_backward",
)
_grad = define(
    f"divergence_grad({_LOGITS}, {_OPTIONS}) -> Tensor",
    reference=torch.no_grad()(reference.divergence_grad),
    fake=_grad_fake,
    triton=f"{_TRITON}:divergence_grad",
)
no_derivative("divergence_backward", "the gradient of a divergence")
for _op in ("divergence_forward_backward", "divergence_grad"):
    # What these give are constants. They are called for every small batch, where a Python kernel that says so to
    # autograd would cost more than the op.
    LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, target, weight, ctx.reduction, ctx.detach_targets, *ctx.options = inputs
    ctx.save_for_backward(input, target, weight)


def _autograd_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    grads = _backward(grad_output, *ctx.saved_tensors, ctx.reduction, ctx.detach_targets, *wanted, *ctx.options)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), *_NO_GRADIENT


_NO_GRADIENT = (None,) * 6
"""Of the weight and the options."""

torch.library.register_autograd(
    f"{NAMESPACE}::divergence", _autograd_backward, setup_context=_setup_context, lib=LIBRARY
)


class _Differentiable(torch.autograd.Function):
    """The eager call: on the CPU a reduced loss brings its gradients along, from one pass over the logits.

    They are those for an upstream gradient of one. Whether it is one can be read for nothing on the CPU; where it is
    another, they are computed anew with it, so that they are rounded once and a loss scale still protects what a
    narrow dtype would flush to zero. On a GPU that look would be a synchronisation, so there they wait for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        how: tuple[int, bool],
        options: tuple[int, float, float] | tuple[()],
    ) -> Tensor:
        ctx.save_for_backward(input, target, weight)
        early = how[0] != 0 and input.is_cpu
        wanted = ctx.needs_input_grad[:2] if early else (False, False)
        loss, *grads = _forward_backward(input, target, weight, *how, *wanted, *options)
        ctx.known = how, options, grads if early else None
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Given away once, so that .grad takes them over without a copy; a second backward computes its own.
        how, options, grads = ctx.known
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad  # raises where the logits were changed, the graph freed
        if grads is None or torch.is_grad_enabled() or grad_output.item() != 1:
            grads = _backward(grad_output, *saved, *how, *wanted[:2], *options)
        ctx.known = how, options, None
        return grads[0] if wanted[0] else None, grads[1] if wanted[1] else None, None, None, None


# The C function below Function.apply. What that adds in Python is for torch.func's transforms, and takes 3 of the 44 us
# that 32 rows of 3 classes need there and back.
_apply = super(torch.autograd.Function, _Differentiable).apply

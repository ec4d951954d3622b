"""Divergences of hidden states behind a head, in chunks of rows: no logits but a chunk's are ever formed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from smart_kernels import reference
from smart_kernels.ops._library import LIBRARY, NAMESPACE, OPS, changes_arguments, define
from smart_kernels.ops.divergence import FLOATING, KIND, REDUCTION, check_kind, check_options, check_weight

CPU_BUDGET, GPU_BUDGET = 96 << 20, 1 << 30
"""Bytes that the logits of a chunk of rows take by default, with all that stands beside them."""

SIDE = 2
"""In the op, that the side of the target is constant, its head too; 1: that its distribution is, 0: that nothing is."""


def linear_divergence(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor,
    kind: str = "symmetric_kl",
    *,
    bias: Tensor | None = None,
    target_linear_weight: Tensor | None = None,
    target_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    detach_targets: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""The :func:`divergence` of the logits that a head makes of two tensors of hidden states, without storing logits.

    .. math:: D\bigl(\mathrm{softmax}(h_a W^\top + c) \,\|\, \mathrm{softmax}(h_b W^\top + c)\bigr)

    What the divergence depends on above all, the difference of the logits, is projected itself, as
    :math:`(h_a - h_b) W^\top`: the difference of two projections would be their rounding where hidden states differ by
    1e-5 of their size. Likewise the head's gradient, whose two parts nearly cancel there, is formed as
    :math:`G_a^\top (h_a - h_b) + (G_a + G_b)^\top h_b`, with the sum of the gradients at the logits had without adding
    them. With a head of its own for ``target``, the logits of both are subtracted.

    Gradients are computed in the forward pass, chunk by chunk; for ``reduction="none"`` in the backward pass, from
    logits that are made once more. All products accumulate in float32 (float64 for float64). On a CPU, and for
    float16, the factors are widened first, a narrow head as a whole; bfloat16 on a GPU is multiplied as it is, with
    the difference of the hidden states in two terms.

    Beyond arguments and results, memory does not grow with the number of rows: it is that of a chunk's logits (two
    numbers for each row and class, three where the head takes a gradient, and eight more with a ``softcap``).

    Args:
        input: hidden states h_a in front of the head, shape (..., H), any strides; float16, bfloat16, float32 or
            float64. Narrow dtypes mix freely; float64 only with float64.
        target: hidden states h_b, shape (..., H), of the same device; (..., H') with a ``target_linear_weight``
            (V, H').
        linear_weight: the head W, shape (V, H), one row per class.
        kind: the divergence, as in :func:`divergence`.
        bias: c, shape (V,), of the head; -inf masks a class.
        target_linear_weight: a head for ``target`` alone, shape (V, H'), a teacher's for instance; by default
            ``linear_weight``, with its bias.
        target_bias: the bias (V,) of ``target_linear_weight``.
        weight: a factor per row, shape (...), any real dtype, for instance a mask of labels. A row of weight 0 counts
            nothing, whatever it holds. Not differentiated.
        reduction: "none", "sum", "mean" or "batchmean", as in :func:`divergence`.
        beta: the share of ``target`` in the mixture of "js", in (0, 1).
        temperature: T > 0, which the logits are divided by.
        softcap: s > 0: logits z become s tanh(z / s), before the temperature, as in Gemma 2; None for none.
        detach_targets: treat ``target`` and its logits as constants; with "symmetric_kl" the target distribution of
            each of the two divergences, as in :func:`divergence`.
        chunk_size: rows of a chunk, >= 1. By default as many as have logits and gradients of 96 MiB on a CPU, 1 GiB on
            any other device.

    Returns:
        The loss, >= 0, in float32 (float64 for float64 hidden states), differentiable once, backwards, in ``input``,
        ``target``, the heads and their biases. Where both hidden states are equal to the bit, it and all gradients are
        exactly 0. NaN and infinite as in :func:`divergence`.

    Raises:
        TypeError: an argument is no tensor, or of a dtype or type that is not supported.
        ValueError: shapes or devices do not fit, the kind or the reduction is unknown, or a number out of its range.

    Example:
        >>> import torch
        >>> from smart_kernels import linear_divergence
        >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
        >>> hidden = torch.tensor([[1.0, 2.0]])
        >>> loss = linear_divergence(hidden + 1e-5 * torch.tensor([1.0, 0.0]), hidden, head)
        >>> print(f"{loss.item():.2e}")
        1.85e-11
    """
    check_kind(kind, beta, temperature)
    check_options(reduction, detach_targets)
    heads: tuple[Tensor | None, ...] = _check(input, target, linear_weight, bias, target_linear_weight, target_bias)
    weight = check_weight(weight, input)
    softcap = _check_numbers(softcap, chunk_size)
    detached = SIDE if detach_targets and kind != "symmetric_kl" else int(detach_targets)
    options = REDUCTION[reduction], detached, KIND[kind], float(beta), float(temperature), softcap, chunk_size
    return of_checked(input, target, heads, weight, options)


def of_checked(
    input: Tensor, target: Tensor, heads: tuple[Tensor | None, ...], weight: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """What :func:`linear_divergence` is of, as the op takes it; the side of the target may be constant for any kind."""
    if options[1] == SIDE:
        target = target.detach()
        heads = *heads[:2], *(None if x is None else x.detach() for x in heads[2:])
    device = input.device.type
    narrow = device not in ("cpu", "meta") and torch.is_autocast_enabled(device)
    if narrow and torch.get_autocast_dtype(device) == torch.bfloat16:
        # As in any linear layer; the hidden states' difference keeps its digits. A CPU's products are float32's anyhow.
        heads = tuple(x.bfloat16() if x is not None and x.dtype == torch.float32 else x for x in heads)
    tensors = input, target, *heads, weight
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not torch.compiler.is_compiling() and (differentiable or forward_ad._current_level >= 0):
        return _Differentiable.apply(*tensors, *options)  # type: ignore[no-any-return, no-untyped-call]
    reduced = REDUCTION["none"] != options[0]
    wanted = [differentiable and reduced and x is not None and x.requires_grad for x in tensors[:6]]
    return _op(*tensors, None, wanted, *options)[0]  # type: ignore[no-any-return]


class LinearDivergenceLoss(torch.nn.Module):
    """The module of :func:`linear_divergence`.

    Args:
        kind: as in :func:`linear_divergence`.
        reduction: as in :func:`linear_divergence`.
        beta: as in :func:`linear_divergence`.
        temperature: as in :func:`linear_divergence`.
        softcap: as in :func:`linear_divergence`.
        detach_targets: as in :func:`linear_divergence`.
        chunk_size: as in :func:`linear_divergence`.

    Example:
        >>> import torch
        >>> from smart_kernels import LinearDivergenceLoss
        >>> LinearDivergenceLoss("js", reduction="sum")(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(5, 3))
        tensor(0.)
    """

    def __init__(
        self,
        kind: str = "symmetric_kl",
        reduction: str = "batchmean",
        beta: float = 0.5,
        temperature: float = 1.0,
        softcap: float | None = None,
        detach_targets: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_kind(kind, beta, temperature)
        check_options(reduction, detach_targets)
        _check_numbers(softcap, chunk_size)
        self.kind = kind
        self.reduction = reduction
        self.beta = beta
        self.temperature = temperature
        self.softcap = softcap
        self.detach_targets = detach_targets
        self.chunk_size = chunk_size

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        linear_weight: Tensor,
        bias: Tensor | None = None,
        target_linear_weight: Tensor | None = None,
        target_bias: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states ``input`` and ``target``, shape (..., H), behind the head (V, H)."""
        return linear_divergence(
            input,
            target,
            linear_weight,
            bias=bias,
            target_linear_weight=target_linear_weight,
            target_bias=target_bias,
            weight=weight,
            **{name: getattr(self, name) for name in self._OPTIONS},
        )

    _OPTIONS = "kind", "reduction", "beta", "temperature", "softcap", "detach_targets", "chunk_size"

    def extra_repr(self) -> str:
        """The options, as they stand in the module's printed form."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._OPTIONS)


def _check_numbers(softcap: float | None, chunk_size: int | None) -> float | None:
    if softcap is not None:
        if not isinstance(softcap, int | float) or isinstance(softcap, bool):
            raise TypeError(f"softcap: got {type(softcap).__name__}, expected a number or None")
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap: got {softcap}, expected a finite number > 0, or None")
    if chunk_size is not None:
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
            raise TypeError(f"chunk_size: got {type(chunk_size).__name__}, expected int or None")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: got {chunk_size}, expected >= 1, or None")
    return None if softcap is None else float(softcap)


def _check_floating(name: str, x: Tensor | None, what: str, input: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected {what}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {x.layout}, expected torch.strided")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected float16, bfloat16, float32 or float64")
    if x.dtype != input.dtype and torch.float64 in (x.dtype, input.dtype):
        raise TypeError(f"{name}: got dtype {x.dtype} with input {input.dtype}, expected float64 for all or none")
    if x.device != input.device:
        raise ValueError(f"{name}: got device {x.device}, expected that of input, {input.device}")


def _check(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    target_linear_weight: Tensor | None,
    target_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check all tensors but the weight; the heads come back, the target's None where it is that of the input."""
    for name, x in (("input", input), ("target", target)):
        _check_floating(name, x, "a tensor of hidden states", input)
    if not input.dim() or not input.size(-1):
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected (..., H) with H >= 1")
    if target_linear_weight is linear_weight and target_bias is bias:
        target_linear_weight = target_bias = None
    if target_linear_weight is None and target_bias is not None:
        raise ValueError(
            f"target_bias: got shape {tuple(target_bias.shape)} with no target_linear_weight, expected both or neither"
            if isinstance(target_bias, Tensor)
            else f"target_bias: got {type(target_bias).__name__} with no target_linear_weight, expected None"
        )
    for name, head, side, hidden in (
        ("linear_weight", linear_weight, "input", input),
        ("target_linear_weight", target_linear_weight, "target", target),
    ):
        if head is None and side == "target":
            continue
        _check_floating(name, head, "a tensor of shape (V, H)", input)
        assert head is not None
        if head.dim() != 2 or not head.size(0) or head.size(1) != (hidden.size(-1) if hidden.dim() else -1):
            raise ValueError(
                f"{name}: got shape {tuple(head.shape)}, expected (V, H) with V >= 1 and H the last size of {side}, "
                f"{tuple(hidden.shape)}"
            )
        if head.size(0) != linear_weight.size(0):
            raise ValueError(
                f"{name}: got shape {tuple(head.shape)}, expected as many classes as linear_weight, "
                f"{linear_weight.size(0)}"
            )
    if target.dim() != input.dim() or target.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected the leading sizes of input, {tuple(input.shape)}"
        )
    if target_linear_weight is None and target.size(-1) != input.size(-1):
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected that of input, {tuple(input.shape)}; of another width "
            "it needs a target_linear_weight"
        )
    for name, c in (("bias", bias), ("target_bias", target_bias)):
        if c is None:
            continue
        _check_floating(name, c, "a tensor of shape (V,)", input)
        if c.shape != linear_weight.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(c.shape)}, expected ({linear_weight.size(0)},), one per class")
    return linear_weight, bias, target_linear_weight, target_bias


def multiplies_narrow(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 with a float32 result."""
    return device.type == "cuda"


def _multiply(out: Tensor, x: Tensor, y: Tensor, add: bool = False) -> None:
    """The product x y in `out`, or added to it; accumulated in the dtype of `out`, which narrow factors are not of."""
    if x.dtype == out.dtype:
        torch.addmm(out, x, y, out=out) if add else torch.mm(x, y, out=out)
    elif add:
        torch.addmm(out, x, y, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x, y, out_dtype=out.dtype, out=out)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    """The rows in chunks of at most this size, all of about the same."""
    count = -(-rows // size)
    return (slice(i * rows // count, (i + 1) * rows // count) for i in range(count))


class _Softcap:
    """Logits z as s tanh(z / s), and their gradients as those at z."""

    def __init__(self, logits: Tensor, cap: float, difference: bool) -> None:
        b, a = logits[0], logits[1]
        d = a / cap
        b_over = b / cap
        a_over = d + b_over if difference else d
        tanh_a, tanh_b = a_over.tanh(), b_over.tanh()
        sech_a, sech_b = a_over.cosh_().reciprocal_(), b_over.cosh_().reciprocal_()
        self.apart = tanh_a - tanh_b
        if difference:
            # sinh(x - y) / (cosh x cosh y), which keeps the difference's digits
            close = d.clamp(-1, 1).sinh_().mul_(sech_a).mul_(sech_b)
            self.apart = torch.where(d.abs() <= 1, close, self.apart)
        torch.mul(tanh_b, cap, out=b)
        torch.mul(self.apart if difference else tanh_a, cap, out=a)
        self.slope_a, self.slope_b = sech_a.square_(), sech_b.square_()
        self.apart *= tanh_a.add_(tanh_b).neg_()  # slope_a - slope_b

    def backward(self, grads: Tensor) -> None:
        """Of both sides, and of their sum where there is one, in place."""
        if grads.size(0) == 3:
            grads[2].mul_(self.slope_b).addcmul_(grads[1], self.apart)
        grads[0].mul_(self.slope_b)
        grads[1].mul_(self.slope_a)


@torch.no_grad()
def _in_chunks(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    target_linear_weight: Tensor | None,
    target_bias: Tensor | None,
    weight: Tensor | None,
    upstream: Tensor | None,
    wanted: list[bool],
    reduction: int,
    detached: int,
    kind: int,
    beta: float,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
) -> tuple[Tensor, ...]:
    """The loss and the gradients that are wanted, of the first six arguments, in the dtype of the arithmetic."""
    with torch.autocast(input.device.type, enabled=False):
        dtype = reference.compute_dtype(input)
        heads = linear_weight, linear_weight if target_linear_weight is None else target_linear_weight
        narrow = all(head.dtype == torch.bfloat16 for head in heads) and multiplies_narrow(input.device)
        factor_dtype = torch.bfloat16 if narrow else dtype
        h_a, h_b = input.reshape(-1, input.size(-1)), target.reshape(-1, target.size(-1))
        n_rows, classes = h_a.size(0), linear_weight.size(0)
        shared = target_linear_weight is None
        w_a = linear_weight.to(factor_dtype)
        w_b = w_a if shared else heads[1].to(factor_dtype)
        if shared:
            target_bias = bias
        constant = detached == SIDE
        of_heads = wanted[2] or wanted[3]
        # Their sum is 0 where only the sides' own distributions move: but for the slopes of a cap.
        opposed = detached == 1
        parts = 3 if shared and of_heads and not constant and not (opposed and softcap is None) else 2
        size = chunk_size
        if size is None:
            each = classes * (dtype.itemsize * (parts + 8 * (softcap is not None)) + 2 * parts * narrow)
            size = max(1, (CPU_BUDGET if input.is_cpu else GPU_BUDGET) // each)
        size = min(size, max(1, n_rows))
        row_weight = None if weight is None else weight.reshape(-1)
        normaliser = reference.divergence_normaliser(input, weight, reduction)
        scale = torch.ones(1, dtype=dtype, device=input.device) if upstream is None else upstream.reshape(-1)
        scale = (scale * normaliser).contiguous()

        def empty(i: int, *shape: int) -> Tensor:
            make = torch.empty if n_rows else torch.zeros
            return make(shape if wanted[i] else 0, dtype=dtype, device=input.device)

        grads = [
            empty(0, *h_a.shape), empty(1, *h_b.shape), empty(2, *linear_weight.shape), empty(3, classes),
            empty(4, *w_b.shape), empty(5, classes),
        ]  # fmt: skip
        losses = torch.empty(n_rows, dtype=dtype, device=input.device)
        room = torch.empty(parts * size * classes, dtype=dtype, device=input.device)

        def narrowed(x: Tensor) -> Tensor:
            return x.to(factor_dtype)

        for chunk in _chunks(n_rows, size):
            first = chunk.start == 0
            n = chunk.stop - chunk.start
            logits = room[: parts * n * classes].view(parts, n, classes)
            x_a, x_b = h_a[chunk].to(dtype), h_b[chunk].to(dtype)
            if row_weight is not None:
                skip = (row_weight[chunk] == 0).unsqueeze(-1)
                x_a, x_b = x_a.masked_fill(skip, 0), x_b.masked_fill(skip, 0)
            if shared:
                # [h_b; h_a - h_b; h_b]: the first two are projected, the last two meet the gradients.
                x = torch.cat([x_b, x_a - x_b, x_b])
                factors = narrowed(x)
                _multiply(logits[:2].view(2 * n, classes), factors[: 2 * n], w_a.t())
                if narrow:  # what its rounding has cut off: of the difference in any case
                    rest = slice(n if input.dtype == target.dtype == factor_dtype else 0, 2 * n)
                    low = narrowed(x[rest] - factors[rest])
                    _multiply(logits[:2].view(2 * n, classes)[rest], low, w_a.t(), add=True)
            else:
                _multiply(logits[0], narrowed(x_b), w_b.t())
                _multiply(logits[1], narrowed(x_a), w_a.t())
                if bias is not None:
                    logits[1] += bias
            if target_bias is not None:
                logits[0] += target_bias
            cap = None if softcap is None else _Softcap(logits, softcap, shared)
            losses[chunk] = _rows(
                logits[:2] if opposed else logits,
                None if row_weight is None else row_weight[chunk],
                scale if scale.numel() == 1 else scale[chunk],
                shared,
                any(wanted),
                opposed,
                kind,
                beta,
                temperature,
            )
            if not any(wanted):
                continue
            if opposed and parts == 3:
                logits[2].zero_()
            if cap is not None:
                cap.backward(logits)
            g = narrowed(logits)
            if wanted[0] and wanted[1] and shared:
                hidden = torch.empty(2 * n, h_a.size(1), dtype=dtype, device=input.device)
                _multiply(hidden, g[:2].view(2 * n, classes), w_a)
                grads[1][chunk], grads[0][chunk] = hidden[:n], hidden[n:]
            else:
                for i, w in ((0, w_a), (1, w_b)):
                    if wanted[i]:
                        _multiply(grads[i][chunk], g[1 - i], w)
            if shared and wanted[2]:
                if constant:
                    _multiply(grads[2], g[1].t(), narrowed(x_a), add=not first)
                else:
                    last = slice(n, parts * n)
                    _multiply(grads[2], g[1:].reshape(-1, classes).t(), factors[last], add=not first)
            if not shared:
                for i, x_i in ((2, x_a), (4, x_b)):
                    if wanted[i]:
                        _multiply(grads[i], g[1 - (i - 2) // 2].t(), narrowed(x_i), add=not first)
            for i, part in ((3, 1 if constant or not shared else 2), (5, 0)):
                if wanted[i]:
                    total = logits[part].sum(0) if part < parts else torch.zeros_like(grads[i])
                    grads[i] = total if first else grads[i].add_(total)
        grads[0], grads[1] = (
            x.view(like.shape) if is_wanted else x
            for x, like, is_wanted in zip(grads, (input, target), wanted, strict=False)
        )
        loss = losses.view(input.shape[:-1])
        if reduction:
            loss = loss.sum() * normaliser
        return loss, *grads


def _fake(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    target_linear_weight: Tensor | None,
    target_bias: Tensor | None,
    weight: Tensor | None,
    upstream: Tensor | None,
    wanted: list[bool],
    reduction: int,
    detached: int,
    kind: int,
    beta: float,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(input)
    like = input, target, linear_weight, bias, target_linear_weight, target_bias
    grads = (
        input.new_empty(0 if x is None or not is_wanted else x.shape, dtype=dtype)
        for x, is_wanted in zip(like, wanted, strict=True)
    )
    return input.new_empty(() if reduction else input.shape[:-1], dtype=dtype), *grads


def _rows_fake(
    rows: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    difference: bool,
    gradients: bool,
    detach_targets: bool,
    kind: int,
    beta: float,
    temperature: float,
) -> Tensor:
    return rows.new_empty(rows.shape[1:2])


_rows = define(
    "divergence_rows_(Tensor(a!) rows, Tensor? weight, Tensor? scale, bool difference, bool gradients, "
    "bool detach_targets, int kind, float beta, float temperature) -> Tensor",
    reference=reference.divergence_rows_,
    fake=_rows_fake,
    triton="smart_kernels.triton_kernels.divergence:divergence_rows_",
)
changes_arguments(_rows, "divergence_rows_")
_op = define(
    "linear_divergence(Tensor input, Tensor target, Tensor linear_weight, Tensor? bias, Tensor? target_linear_weight, "
    "Tensor? target_bias, Tensor? weight, Tensor? upstream, bool[] wanted, int reduction, int detached, "
    "int kind, float beta, float temperature, float? softcap, int? chunk_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_in_chunks,
    fake=_fake,
)
del OPS["linear_divergence"]  # it has no kernel of its own: products of torch, and the op before
_TENSORS = 7  # arguments before upstream, the last of which, the weight, has no gradient


def _cast(grads: Any, ctx: Any, like: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients, rounded once to the dtypes of what they are of; None for what asks for none."""
    each = zip(grads, like, ctx.needs_input_grad, strict=False)
    return [grad.to(x.dtype) if needed and x is not None else None for grad, x, needed in each]


def _anew(ctx: Any, grad_output: Tensor, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
    """All gradients that are asked for, from logits that are made once more."""
    return _op(*tensors, grad_output, list(ctx.needs_input_grad[:6]), *options)[1:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    tensors, wanted, ctx.options = inputs[:_TENSORS], inputs[_TENSORS + 1], inputs[_TENSORS + 2 :]
    ctx.complete = all(w or not needed for w, needed in zip(wanted, ctx.needs_input_grad, strict=False))
    ctx.constant = inputs[_TENSORS] is None
    if ctx.constant:
        ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *(output[1:] if ctx.complete else ()))


def _autograd_backward(ctx: Any, grad_output: Tensor | None, *_of_gradients: Tensor | None) -> tuple[Any, ...]:
    if not ctx.constant:
        raise RuntimeError(
            "smart_kernels: the gradient of a divergence has no derivative: a second derivative was asked for"
        )
    tensors, grads = ctx.saved_tensors[:_TENSORS], ctx.saved_tensors[_TENSORS:]
    if grad_output is None:
        return (None,) * (_TENSORS + 2 + len(ctx.options))
    if ctx.complete and not torch.is_grad_enabled():
        grads = [grad_output * grad for grad in grads]
    else:
        grads = _anew(ctx, grad_output, tensors, ctx.options)
    return *_cast(grads, ctx, tensors), *(None,) * (3 + len(ctx.options))


torch.library.register_autograd(
    f"{NAMESPACE}::linear_divergence", _autograd_backward, setup_context=_setup_context, lib=LIBRARY
)


class _Differentiable(torch.autograd.Function):
    """The eager call: a reduced loss brings its gradients along, for an upstream gradient of one.

    They are kept in the dtype of the arithmetic until that is known, and rounded once; so a loss scale still protects
    what a narrow dtype would flush to zero.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        tensors, ctx.options = args[:_TENSORS], args[_TENSORS:]
        ctx.save_for_backward(*tensors)
        early = ctx.options[0] != 0
        loss, *grads = _op(*tensors, None, [early and needed for needed in ctx.needs_input_grad[:6]], *ctx.options)
        ctx.early = grads if early else None
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Given away once, so that they can be scaled where they are; a second backward computes its own.
        grads, ctx.early = ctx.early, None
        tensors = ctx.saved_tensors  # raises where an argument was changed in place, or the graph was freed
        if grads is None or torch.is_grad_enabled():
            grads = _anew(ctx, grad_output, tensors, ctx.options)
        elif not (grad_output.is_cpu and grad_output.item() == 1):  # on a GPU that look would be a synchronisation
            grads = [grad.mul_(grad_output) for grad in grads]
        return *_cast(grads, ctx, tensors), *(None,) * (1 + len(ctx.options))

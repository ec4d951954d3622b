"""One eager function per op: the definition, and the kernel of every device that has no other.

The formulas keep their digits where the usual ones lose them (perturbations of 1e-5); what stands here
in plain PyTorch is what the C++, Triton and CUDA kernels compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "batchmean")
"""The code of a reduction in the ops' schemas is its place here."""

NORMS = ("linf", "l2")
SCOPES = ("sample", "token")
ASCENTS = ("normalized", "sign", "raw")
"""The codes of these options, likewise."""

SMALL = 0.5
"""Up to here exp(x) - 1 is taken as expm1(x); beyond, the difference of two probabilities is exact enough."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def divergence(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    kind: int = 0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence of p = softmax(input / temperature) and q = softmax(target / temperature), reduced."""
    loss = _divergence_rows(input, target, None, detach_targets, kind, beta, temperature)[0]
    if weight is not None:
        loss = torch.where(weight == 0, 0, weight * loss)
    if REDUCTIONS[reduction] == "none":
        return loss
    return loss.sum() * divergence_normaliser(input, weight, reduction)


def divergence_backward(
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
    """The gradients of `divergence`, each empty where it is not asked for; no `grad_output` means ones."""
    _, *gradients, _ = _divergence_rows(input, target, None, detach_targets, kind, beta, temperature)
    scale = torch.ones(input.shape[:-1], dtype=compute_dtype(input), device=input.device)
    if grad_output is not None:
        scale = scale * grad_output
    scale = (scale * (divergence_normaliser(input, weight, reduction) / temperature)).unsqueeze(-1)
    if weight is not None:
        scale = scale * weight.unsqueeze(-1)

    def finish(grad: Tensor, like: Tensor) -> Tensor:
        grad = scale * grad
        return (grad if weight is None else torch.where(weight.unsqueeze(-1) == 0, 0, grad)).to(like.dtype)

    wanted = zip(gradients, (input, target), (input_grad, target_grad), strict=True)
    of_input, of_target = (finish(grad, like) if is_wanted else like.new_empty(0) for grad, like, is_wanted in wanted)
    return of_input, of_target


def divergence_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    kind: int = 0,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The gradient of `divergence` with respect to `input`."""
    options = kind, beta, temperature
    return divergence_backward(None, input, target, weight, reduction, detach_targets, True, False, *options)[0]


def divergence_forward_backward(
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
    """The loss, and its gradients for an upstream gradient of one."""
    logits, options = (input, target, weight, reduction, detach_targets), (kind, beta, temperature)
    return divergence(*logits, *options), *divergence_backward(None, *logits, input_grad, target_grad, *options)


def divergence_normaliser(input: Tensor, weight: Tensor | None, reduction: int) -> Tensor | float:
    """What the sum over rows is multiplied by; NaN where there are no rows to average."""
    match REDUCTIONS[reduction]:
        case "batchmean":
            return 1 / input.size(0) if input.size(0) else math.nan
        case "mean" if weight is not None:
            return weight.sum().reciprocal() if input.numel() else math.nan
        case "mean":
            return input.size(-1) / input.numel() if input.numel() else math.nan
    return 1.0


def divergence_rows_(
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
    """The weighted losses of rows of logits; their gradients, where wanted, take the logits' place.

    Of `rows` (2 or 3, N, C), which must be contiguous and of the dtype of the arithmetic, the first is b and the second
    a, or a - b if that is the `difference`. Afterwards they are the gradients at b and at a, times weight and scale (N
    or one); the third, where there is one, is the sum of the two, which is far smaller where a and b are close.
    """
    b, a = rows[0], rows[1]
    d = a if difference else None
    loss, grad_a, grad_b, both = _divergence_rows(
        a if d is None else b + d, b, d, detach_targets, kind, beta, temperature
    )
    factor = torch.full_like(loss, 1 / temperature)
    if scale is not None:
        factor = factor * scale
    if weight is not None:
        loss, factor = torch.where(weight == 0, 0, weight * loss), weight * factor
    if gradients:
        for row, grad in zip(rows, (grad_b, grad_a, both), strict=False):
            grad = factor.unsqueeze(-1) * grad
            row.copy_(grad if weight is None else torch.where(weight.unsqueeze(-1) == 0, 0, grad))
    return loss


Parts = tuple[Tensor, Tensor, Tensor]
"""Of each class: its share of the loss, q f(r) with r = p / q; p f'(r); q g(r), where g = f - r f'.

The gradients are p (f' - sum p f') and q (g - sum q g). As products they are finite wherever the loss is.
"""


def symmetric_kl(p: Tensor, q: Tensor, x: Tensor, t: Tensor, beta: float) -> Parts:
    """KL(p||q) + KL(q||p). For every kind, x = p - q and t = log(p / q) have digits that p and q alone have not."""
    return x * t, p * t + x, -q * t - x


def symmetric_kl_detached(p: Tensor, q: Tensor, x: Tensor, t: Tensor, beta: float) -> Parts:
    """The same with the target distribution of each of the two as a constant."""
    return x * t, x, -x


def kl(p: Tensor, q: Tensor, x: Tensor, t: Tensor, beta: float) -> Parts:
    """KL(q||p)."""
    return _excess(q, x, t), x, -_mass_times(q, t)


def reverse_kl(p: Tensor, q: Tensor, x: Tensor, t: Tensor, beta: float) -> Parts:
    """KL(p||q)."""
    return _excess(p, -x, -t), -_mass_times(p, -t), -x


def js(p: Tensor, q: Tensor, x: Tensor, t: Tensor, beta: float) -> Parts:
    """The sum beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p."""
    m = beta * q + (1 - beta) * p
    log_mq, log_mp = _log_ratio(q, m, (1 - beta) * x), _log_ratio(p, m, -beta * x)
    of_q, of_p = _excess(q, (1 - beta) * x, log_mq), _excess(p, -beta * x, log_mp)
    return beta * of_q + (1 - beta) * of_p, -(1 - beta) * p * log_mp, -beta * q * log_mq


def hellinger(p: Tensor, q: Tensor, x: Tensor, t: Tensor, beta: float) -> Parts:
    """1/2 sum (sqrt p - sqrt q)^2."""
    root_p, root_q = p.sqrt(), q.sqrt()
    y = torch.where(x == 0, 0, x / (root_p + root_q))
    return 0.5 * y * y, 0.5 * root_p * y, -0.5 * root_q * y


def total_variation(p: Tensor, q: Tensor, x: Tensor, t: Tensor, beta: float) -> Parts:
    """1/2 sum |p - q|; f' and g but for a constant, so that each sum is of a side's smaller part (`centred`)."""
    sign = 0.5 * x.sign()
    return 0.5 * x.abs(), p * (sign - 0.5), -q * (sign + 0.5)


KINDS = {f.__name__: f for f in (symmetric_kl, kl, reverse_kl, js, hellinger, total_variation)}
"""The code of a kind in the ops' schemas is its place here."""


def centred(kind: int, p: Tensor, slope: Tensor, mean: Tensor, other_mean: Tensor, loss: Tensor) -> Tensor:
    """A side's p (f' - sum p f'), given the sums of both sides."""
    if list(KINDS)[kind] == "total_variation":
        # f' is 0, -1 or, where p = q, -1/2. If nearly all p have one sign, f' - sum p f' would cancel; 1 + sum p f' is:
        other = loss - other_mean
        return -p * torch.where(slope == -0.5 * p, 0.5 * (mean + other), torch.where(slope == 0, mean, other))
    return slope - p * mean


def of_both(kind: int, q: Tensor, x: Tensor, term: Tensor, mean_p: Tensor, loss: Tensor) -> Tensor:
    """The sum of both sides' gradients, given the classes' shares of the loss: of second order where they are of first.

    As p f' + q g = q f, it is q f - p sum p f' - q sum q g, and both sums together are the loss.
    """
    mean_p = mean_p + 0.5 if list(KINDS)[kind] == "total_variation" else mean_p
    return term - q * loss - x * mean_p


def greatest(kind: int, beta: float) -> float:
    """What a divergence cannot exceed: its value for distributions that have no class in common."""
    match list(KINDS)[kind]:
        case "js":
            return -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        case "hellinger" | "total_variation":
            return 1.0
    return math.inf


def _mass_times(q: Tensor, log: Tensor) -> Tensor:
    """Of q log(p / q), 0 where q is masked. Where p is, alone, 0 inf or -inf: no number that a loss could have."""
    return torch.where(log == math.inf, 0, q * log)


def _log_ratio(q: Tensor, m: Tensor, x: Tensor) -> Tensor:
    """log(m / q) of a mixture m = q + x > 0; 0 where q is."""
    near = torch.log1p((x / q).clamp(-SMALL, SMALL))
    far = (m / q).clamp(max=torch.finfo(q.dtype).max).log()
    return torch.where(q == 0, 0, torch.where(x.abs() <= SMALL * q, near, far))


def _excess(q: Tensor, x: Tensor, log: Tensor) -> Tensor:
    """The difference x - q log((q + x) / q) >= 0, given the logarithm: a series for q (expm1(log) - log) if small."""
    small = log.clamp(-SMALL, SMALL)
    series = torch.ones_like(small)
    for k in range(16 if q.dtype == torch.float64 else 9, 2, -1):
        series = 1 + series * small / k
    return torch.where((log.abs() <= SMALL) & (q != 0), 0.5 * q * small * small * series, x - _mass_times(q, log))


def _divergence_rows(
    input: Tensor,
    target: Tensor,
    difference: Tensor | None,
    detach_targets: bool,
    kind: int,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row; but for the factor 1 / temperature, its gradients and their sum.

    The `difference` of the logits, where it is given, has digits that they have not.
    """
    dtype = compute_dtype(input)
    # Strides decide the order in which torch adds up: with their own, equal logits would have sums that differ.
    a, b = input.to(dtype).contiguous(), target.to(dtype).contiguous()
    absent = (a == -math.inf) & (b == -math.inf)  # classes masked on both sides
    d = torch.where(absent, 0, a - b if difference is None else difference)
    max_a = a.amax(-1, keepdim=True)
    max_b, top = b.max(-1, keepdim=True)
    centre = d.gather(-1, top)  # a constant added to a row changes nothing
    # Where a class is masked in one tensor alone, the centre is that of all, lest it be infinite.
    centre = torch.where(centre.isfinite(), centre, max_a - max_b)
    d = torch.where(absent, 0, (d - centre) / temperature)

    exp_a, exp_b = ((a - max_a) / temperature).exp(), ((b - max_b) / temperature).exp()
    sum_a, sum_b = exp_a.sum(-1, keepdim=True), exp_b.sum(-1, keepdim=True)
    p, q = exp_a / sum_a, exp_b / sum_b
    # s = logsumexp(a) - logsumexp(b), centred: log1p keeps the digits where all d are small
    s = torch.where(
        d.abs().amax(-1, keepdim=True) <= SMALL,
        torch.log1p((q * torch.expm1(d)).sum(-1, keepdim=True)),
        (sum_a / sum_b).log() + (max_a - max_b - centre) / temperature,
    )
    t = torch.where(absent, 0, d - s)
    near = t.abs() <= SMALL
    x = torch.where(near, q * torch.expm1(t), p - q)
    p = torch.where(near, q + x, p)
    function = symmetric_kl_detached if detach_targets else list(KINDS.values())[kind]
    term, slope_p, slope_q = function(p, q, x, t, beta)
    # A difference of two probabilities may be negative by its rounding; the sum of all may exceed what there is.
    loss, mean_p, mean_q = (part.sum(-1, keepdim=True) for part in (term, slope_p, slope_q))
    grad_a = centred(kind, p, slope_p, mean_p, mean_q, loss)
    grad_b = centred(kind, q, slope_q, mean_q, mean_p, loss)
    both = torch.zeros_like(q) if detach_targets else of_both(kind, q, x, term, mean_p, loss)
    loss = loss.squeeze(-1).clamp(0, greatest(kind, beta))

    undefined = a.isnan().any(-1) | b.isnan().any(-1) | (max_a.abs() == math.inf).squeeze(-1)
    undefined |= (max_b.abs() == math.inf).squeeze(-1)
    # Where a class is masked in one tensor alone, a divergence that is infinite then has come out as 0 inf or inf.
    loss = torch.where(undefined, math.nan, torch.where(loss < math.inf, loss, math.inf))
    finite = (loss < math.inf).unsqueeze(-1)
    grad_a, grad_b, both = (torch.where(finite, grad, math.nan) for grad in (grad_a, grad_b, both))
    return loss, grad_a, grad_b, both


def init_perturbation(embeds: Tensor, seed: Tensor, mask: Tensor | None, std: float) -> Tensor:
    """N(0, std^2) at every position that the mask keeps; element i depends on the seed and i alone.

    Each 128 bits of Philox make four numbers. Of 64 elements in a row, those numbers go 16 places apart, so
    that a vector of neighbouring elements comes from a vector of neighbouring counters.
    """
    blocks = -(-embeds.numel() // 64) * 16
    words = _philox(seed.reshape(()), torch.arange(blocks, device=embeds.device))
    pairs = [z for i in (0, 2) for z in _box_muller(words[i], words[i + 1])]
    normal = torch.stack([z.view(-1, 16) for z in pairs], 1).flatten()[: embeds.numel()]
    delta = normal.view(embeds.shape).to(compute_dtype(embeds)) * std
    return delta if mask is None else torch.where(mask.unsqueeze(-1) != 0, delta, 0)


def _philox(seed: Tensor, counter: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 bits for each counter, in int64."""
    low = 0xFFFFFFFF
    key = [seed & low, seed >> 32 & low]
    x = [counter & low, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57  # int64 wraps, which leaves all 64 bits as they should be
        x = [b >> 32 & low ^ x[1] ^ key[0], b & low, a >> 32 & low ^ x[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return x


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of N(0, 1) in fp32 from two words of 32 bits."""
    radius = torch.sqrt(-2 * torch.log((a >> 1).float() * 2.0**-31 + 2.0**-32))  # up to 6.66
    quarter = (b + 2**29) >> 30  # the angle b 2^-32 of a turn: the nearest quarter, and what remains, exactly
    angle = (b - (quarter << 30)).float() * (math.pi * 2.0**-31)
    sin, cos = torch.sin(angle), torch.cos(angle)
    odd = quarter & 1 == 1
    x, y = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    x = torch.where((quarter + 1) & 2 == 2, -x, x)
    return radius * x, radius * torch.where(quarter & 2 == 2, -y, y)


def perturbation_step(
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
    """A step along the gradient, projected onto the ball of radius epsilon; see `ops.perturbation`."""
    if not delta.numel():
        return torch.empty_like(delta)
    delta = delta.contiguous()
    dims = tuple(range(1, delta.dim())) if SCOPES[scope] == "sample" else (-1,)
    kept = torch.ones_like(delta[..., :1], dtype=torch.bool) if mask is None else mask.unsqueeze(-1) != 0
    delta = torch.where(kept, delta, 0)
    g = torch.where(kept, grad.to(delta.dtype), 0)
    largest = g.abs().amax(dims, keepdim=True)
    finite = largest < math.inf  # false for NaN
    if skipped is not None:
        skipped += (~finite).sum()
    moves = finite & (largest > 0)
    g = torch.where(moves, g / torch.where(moves, largest, 1), 0)  # no square of it over- or underflows
    length = torch.full_like(largest, step_size)
    match ASCENTS[ascent]:
        case "normalized" if NORMS[norm] == "l2":
            length = length / torch.where(moves, _norm(g, dims), 1)
        case "sign":
            g = g.sign()
        case "raw":
            length = length * torch.where(moves, largest, 0)
    v = delta + g * length.clamp(max=1e28).to(delta.dtype)  # so long a step hides delta, and v is still finite
    if NORMS[norm] == "linf":
        bound = floor_to(epsilon, delta.dtype)
        return v.clamp(-bound, bound)
    # The margin is for the rounding of the result and of the sum, so that the norm is no more than epsilon in any
    # precision; where there was no step, a delta within the ball stays as it is.
    size, inner = _norm(v, dims), epsilon * (1 - 4 * torch.finfo(v.dtype).eps - 1e-12)
    outside = size > torch.where(moves, inner, epsilon)
    return torch.where(outside, v * (inner / torch.where(outside, size, 1)).to(v.dtype), v)


def perturbation_step_(
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
    """`perturbation_step` in place."""
    delta.copy_(perturbation_step(delta, grad, mask, skipped, step_size, epsilon, norm, scope, ascent))


def floor_to(x: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that is not above x >= 0: a bound that holds in both."""
    if dtype == torch.float64:
        return x
    unit = max(math.frexp(x)[1] - 24, -149)
    return min(math.ldexp(math.floor(math.ldexp(x, -unit)), unit), torch.finfo(dtype).max)


def _norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The Euclidean norm, in fp64 where the device has it, with no overflow or underflow on the way."""
    x = x if x.device.type == "mps" else x.double()
    largest = x.abs().amax(dims, keepdim=True)
    return largest * (x / torch.where(largest > 0, largest, 1)).square().sum(dims, keepdim=True).sqrt()


def ema_update_(
    ema_tensors: list[Tensor], parameters: list[Tensor], decay: float, decay_tensor: Tensor | None, seed: Tensor | None
) -> None:
    """Each e <- e + (1 - decay)(p - e), in place; a seed asks for stochastic rounding."""
    beta = torch.tensor(decay, dtype=torch.float64) if decay_tensor is None else decay_tensor
    groups = 0  # of 64 elements, so far
    for e, p in zip(ema_tensors, parameters, strict=True):
        dtype = compute_dtype(e)
        decays, weights = ([part.to(dtype).to(e.device) for part in parts] for parts in _decay_and_weight(beta, dtype))
        moved = _weighted_sum(e.to(dtype), decays, p.to(dtype), weights)
        moved = torch.where(decays[0] == 0, p.to(dtype), moved)
        if seed is not None and e.dtype in DROPPED_BITS:
            moved = round_stochastically(moved, e.dtype, _random_words(seed, groups, e.numel()).view(e.shape))
        groups += -(-e.numel() // 64)
        moved = moved.to(e.dtype)
        if e.dtype == p.dtype:  # to the bit, NaNs too
            moved = torch.where(decays[0] == 0, p, moved)
        e.copy_(torch.where(weights[0] == 0, e, moved))


def _decay_and_weight(decay: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The decay and one minus the decay, each as the number of a dtype that is nearest and what it is off by."""
    decay = decay.to(torch.promote_types(decay.dtype, dtype))
    weight = 1 - decay
    rest = (1 - weight) - decay
    near, weight_near = (x.to(dtype).to(x.dtype) for x in (decay, weight))
    return (near, decay - near), (weight_near, (weight - weight_near) + rest)


def _weighted_sum(a: Tensor, a_factor: list[Tensor], b: Tensor, b_factor: list[Tensor]) -> Tensor:
    """The sum a_factor a + b_factor b, rounded as if but once: with what each step's rounding drops, at the end."""
    (kept, kept_low), (gained, gained_low) = _product(a, a_factor[0]), _product(b, b_factor[0])
    total = kept + gained
    share = total - kept
    low = (kept - (total - share)) + (gained - share) + (kept_low + gained_low + a_factor[1] * a + b_factor[1] * b)
    # Something is infinite or NaN: there the sum is left as it is rounded.
    return torch.where(low.isnan(), torch.where(total.isfinite(), total, a + b_factor[0] * (b - a)), total + low)


def _product(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and what its rounding dropped (Dekker 1971), without a fused multiply-add.

    The halves of a mantissa are cut from its bits: multiplied by 2^12 + 1, as is usual, large numbers would overflow.
    """
    integer, low_bits = (torch.int64, 27) if x.dtype == torch.float64 else (torch.int32, 12)

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        high = (x.view(integer) & -(1 << low_bits)).view(x.dtype)
        return high, x - high

    (x_high, x_low), (high, low), product = halves(x), halves(factor), x * factor
    return product, ((x_high * high - product) + x_high * low + x_low * high) + x_low * low


DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32's mantissa that rounding to a dtype drops."""


def _random_words(seed: Tensor, group: int, count: int) -> Tensor:
    """32 random bits for each of `count` elements in a row, from the 64-element group of that number on."""
    groups = -(-count // 64)
    words = _philox(seed, torch.arange(16 * group, 16 * (group + groups), device=seed.device))
    return torch.stack([word.view(-1, 16) for word in words], 1).flatten()[:count]


def round_stochastically(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Float32 to float16 or bfloat16, up or down with the probabilities that make the mean x.

    Magnitudes are whole numbers of the dtype's last place and a remainder: a random number added to the
    remainder carries with just that probability. Beyond the dtype's largest number it is to nearest.
    """
    info = torch.finfo(dtype)
    bits = x.view(torch.int32).long() & 0x7FFFFFFF
    exponent = (bits >> 23).clamp(min=1)
    mantissa = torch.where(bits >> 23 > 0, bits & 0x7FFFFF | 0x800000, bits)
    # Subnormal results drop more bits than normal ones, as their last place is fixed.
    smallest = 127 + round(math.log2(info.tiny))
    dropped = DROPPED_BITS[dtype] + (smallest - exponent).clamp(min=0)
    mantissa = mantissa >> (dropped - 31).clamp(min=0)
    dropped = dropped.clamp(max=31)
    units = mantissa + (words & (1 << dropped) - 1) >> dropped
    place = torch.exp2((exponent.clamp(min=smallest) - 127 - 23 + DROPPED_BITS[dtype]).double())
    rounded = (units * place).to(dtype).copysign(x.to(dtype))
    return torch.where(x.abs() <= info.max, rounded, x.to(dtype))

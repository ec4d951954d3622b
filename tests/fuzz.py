"""Every public op on composed inputs, against extended precision: the CPU kernels and the eager definition.

A case is one call, composed of shape, strides, dtypes, special values, reduction, weights, options, number of threads
and tensors that share memory. Hypothesis composes some in every run of the tests and makes a failing one small
(test_fuzz.py); a long run takes its cases from numbers:

    python tests/fuzz.py --cases 1000000 --seed 0              # prints what fails, ends with 1 if anything did
    python tests/fuzz.py --seed 0 --first 4711 --cases 1       # one of them again
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import math
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import oracle
import torch
from oracle import Divergence, Ema, PerturbationStep, compare, ulp, wide

from smart_kernels import (
    divergence,
    divergence_grad,
    ema_update_,
    empty_cache,
    init_perturbation,
    linear_divergence,
    perturbation_step,
    perturbation_step_,
    reference,
    symmetric_kl,
    symmetric_kl_grad,
)

NARROW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = [*itertools.product(NARROW, NARROW), (torch.float64, torch.float64)]
MASKS = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sizes(r: random.Random, most_rows: int) -> tuple[list[int], int]:
    """Leading dimensions and the last one: mostly small, around what kernels treat apart, seldom empty."""
    cols = r.choice([r.randint(1, 6), r.randint(1, 70), r.randint(1, 70), r.randint(1, 140), r.randint(100, 350)])
    if r.random() < 0.01:
        cols = r.choice([1000, 1037, 4097, 8191])
    rows = max(1, min(most_rows, (8000 if r.random() < 0.02 else 300) // cols))
    lead = [r.randint(1, max(1, rows))]
    for _ in range(r.choice([0, 0, 1, 2])):
        split = r.randint(1, 4)
        lead = [max(1, lead[0] // split), split, *lead[1:]]
    if r.random() < 0.02:
        lead[r.randrange(len(lead))] = 0
    return lead, cols


def laid_out(r: random.Random, x: torch.Tensor, written: bool = False) -> torch.Tensor:
    """The tensor in memory of one layout or another, with NaN around; expanded ones are of fewer values."""
    kinds = ["dense", "dense", "off", "sliced", "permuted", "strided"] + ([] if written else ["expanded"])
    kind = r.choice(kinds) if x.numel() else "dense"
    if kind == "off":
        base = torch.full((x.numel() + 5,), math.nan, dtype=x.dtype)
        out = base[r.randint(1, 4) :][: x.numel()].view(x.shape)
    elif kind == "sliced":
        before = [r.randint(0, 2) for _ in x.shape]
        base = torch.full(
            [b + n + r.randint(0, 2) for b, n in zip(before, x.shape, strict=True)], math.nan, dtype=x.dtype
        )
        out = base[tuple(slice(b, b + n) for b, n in zip(before, x.shape, strict=True))]
    elif kind == "permuted":
        order = list(range(x.dim()))
        r.shuffle(order)
        back = [order.index(d) for d in range(x.dim())]
        out = torch.empty([x.size(d) for d in order], dtype=x.dtype).permute(back)
    elif kind == "strided":
        dim, step = r.randrange(x.dim()), r.randint(2, 3)
        base = torch.full([n * step if d == dim else n for d, n in enumerate(x.shape)], math.nan, dtype=x.dtype)
        out = base[tuple(slice(None, None, step) if d == dim else slice(None) for d in range(x.dim()))]
    elif kind == "expanded":
        return x.narrow(r.randrange(x.dim()), 0, 1).clone().expand(x.shape)
    else:
        return x
    return out.copy_(x)


def sprinkle(r: random.Random, values: list[float], *tensors: torch.Tensor) -> None:
    """A few special values at places of their own in dense tensors."""
    for x in tensors:
        for _ in range(r.randint(0, 3)):
            x.view(-1)[r.randrange(x.numel())] = r.choice(values)


@contextmanager
def threads(r: random.Random) -> Iterator[None]:
    """Sometimes several threads; sometimes nothing is kept of the memory of former results."""
    if r.random() < 0.02:
        empty_cache()
    if r.random() < 0.9:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(r.choice([2, 3]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def also_eager(r: random.Random) -> bool:
    """The definition is held to the same; it is slow, and does not depend on strides or threads."""
    return r.random() < 0.2


def weights(r: random.Random, lead: list[int]) -> torch.Tensor | None:
    """None, or a factor per row of any dtype, some of them 0."""
    if r.random() < 0.4:
        return None
    w = torch.rand(lead, dtype=torch.float64) * r.choice([1, 3, 100])
    w = torch.where(torch.rand(lead) < r.choice([0, 0.3, 1]), 0, w).to(r.choice(MASKS))
    return laid_out(r, w) if w.is_floating_point() and w.dim() else w


def logits(r: random.Random, lead: list[int], cols: int, dtypes: tuple[torch.dtype, torch.dtype]) -> list[torch.Tensor]:
    """Two tensors of logits, near and far, small and large, with classes masked and rows spoiled."""
    shape, delta = [*lead, cols], 10 ** r.uniform(-6, 1.3)
    b = r.choice([0.0, 1.0, 2.0, 2.0, 10.0, 1e4]) * torch.randn(shape, dtype=torch.float64)
    a = b + delta * torch.randn(shape, dtype=torch.float64) + r.choice([0.0, 0.0, 0.0, 50.0])
    if r.random() < 0.05:
        a = torch.randn(shape, dtype=torch.float64)
    if r.random() < 0.1:
        b[torch.rand(shape) < 0.02] *= 50
    if r.random() < 0.2:
        masked = torch.rand(shape if r.random() < 0.5 else [cols]) < r.choice([0.1, 0.5, 0.95])
        a, b = a.masked_fill(masked, -math.inf), b.masked_fill(masked, -math.inf)
    a, b = a.to(dtypes[0]), b.to(dtypes[1])
    if a.numel() and r.random() < 0.15:
        sprinkle(r, [-math.inf, math.inf, math.nan, 0.0, -0.0], a, b)
    if r.random() < 0.05 and dtypes[0] == dtypes[1]:
        b = a if r.random() < 0.5 else a.clone()
    if a.numel() and r.random() < 0.03 and dtypes[0] == dtypes[1]:  # windows of one memory that overlap
        memory = torch.cat([a.reshape(-1), a.reshape(-1)[:1].expand(3)])
        return [memory[: a.numel()].view(shape), memory[r.randint(0, 3) :][: a.numel()].view(shape)]
    return [laid_out(r, a), laid_out(r, b)]


def divergence_case(r: random.Random) -> None:
    lead, cols = sizes(r, 24)
    a, b = logits(r, lead, cols, r.choice(DTYPES))
    weight = weights(r, lead)
    reduction, detach = r.choice(reference.REDUCTIONS), r.random() < 0.25
    kind = r.choice([*reference.KINDS, "symmetric_kl"])
    beta, temperature = r.choice([0.5, r.uniform(0.01, 0.99)]), r.choice([1.0, 1.0, 10 ** r.uniform(-1, 1)])
    truth = Divergence(a, b, kind, beta, temperature)
    dtype = reference.compute_dtype(a)
    factor = np.ones(lead, oracle.WIDE) if weight is None else wide(weight.to(dtype))
    with np.errstate(all="ignore"):
        divisor = {"mean": factor.sum(), "batchmean": oracle.WIDE(a.size(0))}.get(reduction, oracle.WIDE(1))
    used = factor != 0
    upstream = torch.ones(lead if reduction == "none" else [], dtype=dtype)
    if r.random() < 0.5:
        upstream = torch.rand_like(upstream) + r.choice([0.5, 2.0])
    wanted = (True, True) if a is b else r.choice([(True, True), (True, False), (False, True)])
    published = detach and kind == "symmetric_kl"
    if detach and not published:  # then the target gets no gradient
        wanted = (True, a is b)
    for x, is_wanted in zip((a, b), wanted, strict=True):
        x.requires_grad_(is_wanted)

    def check(loss: torch.Tensor, grads: list[torch.Tensor | None], alone: torch.Tensor | None) -> None:
        with np.errstate(all="ignore"):
            rows = np.where(used, truth.loss * factor, 0)
            bars = np.where(used, truth.loss_bar(), 0) * factor
            if reduction == "none":
                compare(wide(loss), rows, bars, "loss")
            else:
                compare(wide(loss), np.asarray(rows.sum() / divisor), np.asarray(bars.sum() / divisor), "loss")
            scale = np.broadcast_to(factor / divisor * wide(upstream), lead)
            alone_scale = np.broadcast_to(factor / divisor, lead)
            steepest = max((np.abs(g[np.isfinite(g)]).max(initial=0) for g in truth.grads), default=0)
            steepest *= np.abs([*scale.flat, *alone_scale.flat]).max(initial=0)
        given = [grad for grad in (*grads, alone) if grad is not None]
        for grad in given:
            assert (wide(grad)[~used] == 0).all(), "gradient of a row of weight 0"
        if not truth.loss.size or not np.isfinite(divisor) or divisor == 0:  # no rows to average
            return
        if not steepest < 3e4:  # float16 overflows
            return
        empty = torch.empty(0)
        truth.check_grads(*(empty if grad is None else grad for grad in grads), scale=scale, detach_targets=published)
        if alone is not None:
            truth.check_grads(alone, empty, scale=alone_scale, detach_targets=published)
        for grad in given:
            assert np.isnan(wide(grad)[used & np.isnan(truth.loss)]).all(), "gradient of a NaN row"

    with threads(r):
        if kind == "symmetric_kl" and temperature == 1 and r.random() < 0.5:
            loss = symmetric_kl(a, b, weight, reduction, detach)
            alone = symmetric_kl_grad(a, b, weight, reduction, detach) if r.random() < 0.4 else None
        else:
            options = kind, weight, reduction, beta, temperature, detach
            loss = divergence(a, b, *options)
            alone = divergence_grad(a, b, *options) if r.random() < 0.4 else None
        found = torch.autograd.grad(loss, [x for x in (a, b) if x.requires_grad], upstream)
    grads: list[torch.Tensor | None] = [None, None]
    if a is b:
        assert (wide(found[0])[np.isfinite(truth.loss)] == 0).all(), "gradient of equal logits"
    else:
        left = iter(found)
        grads = [next(left) if x.requires_grad else None for x in (a, b)]
    check(loss, grads, alone)
    if not also_eager(r):
        return
    a, b, code = a.detach(), b.detach(), reference.REDUCTIONS.index(reduction)
    weight = None if weight is None else weight.to(dtype)
    coded = list(reference.KINDS).index(kind), beta, temperature
    eager = reference.divergence_backward(upstream, a, b, weight, code, published, True, True, *coded)
    alone = reference.divergence_grad(a, b, weight, code, published, *coded)
    check(reference.divergence(a, b, weight, code, published, *coded), list(eager), alone)


def mask_of(r: random.Random, lead: list[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask of the first of these dimensions, and of all of them."""
    if r.random() < 0.4:
        return None, None
    dims = r.randint(1, len(lead))
    mask = (torch.rand(lead[:dims]) < r.choice([0.0, 0.7, 0.7, 1.0])).to(r.choice(MASKS))
    if mask.is_floating_point():
        mask = laid_out(r, mask)
    return mask, mask.reshape([*mask.shape, *[1] * (len(lead) - dims)]).expand(lead)


def perturbation_case(r: random.Random) -> None:
    lead, cols = sizes(r, 40)
    way = r.choice(reference.NORMS), r.choice(reference.SCOPES), r.choice(reference.ASCENTS)
    delta_dtype, grad_dtype = r.choice([(torch.float32, x) for x in NARROW] + [(torch.float64, torch.float64)])
    epsilon, step = 10 ** r.uniform(-12, 3), 10 ** r.uniform(-3, 3)
    epsilon, step = r.choice([epsilon, epsilon, epsilon, 0.0]), r.choice([step, step, step, 0.0]) * epsilon
    shape = [*lead, cols]
    delta = (epsilon * r.choice([0, 0.1, 1, 30]) * torch.randn(shape, dtype=torch.float64)).to(delta_dtype)
    top = 1e4 if grad_dtype == torch.float16 else 1e37
    scale = min(10 ** r.uniform(-40, 37), top / 10) if r.random() < 0.3 else 1.0
    if way[2] == "raw" and scale * step > 1e25:  # beyond what a step is cut to
        scale = 1.0
    grad = (scale * torch.randn(shape, dtype=torch.float64)).to(grad_dtype)
    mask, whole = mask_of(r, lead)
    if grad.numel() and r.random() < 0.2:
        sprinkle(r, [math.nan, math.inf, -math.inf, 0.0, -0.0], grad)
    if grad.numel() and r.random() < 0.1:
        grad[r.randrange(len(grad))] = 0
    delta, grad = laid_out(r, delta), laid_out(r, grad)
    truth = PerturbationStep(delta, grad, whole, step, epsilon, *way)
    if whole is not None and r.random() < 0.3:  # what stands where the mask is 0 has no share in anything
        hidden = (whole == 0)[..., None].expand(shape)
        delta, grad = torch.where(hidden, math.nan, delta), torch.where(hidden, math.inf, grad)
    before, counted = delta.clone(), torch.full((1,) * r.randint(0, 3), 7)
    options = (step, epsilon, *way[:2], mask, way[2])
    with threads(r):
        out = perturbation_step(delta, grad, *options, skipped=counted)
        assert out.is_contiguous()
        assert torch.equal(delta.nan_to_num(), before.nan_to_num()), "delta was changed"
        truth.check(out, counted - 7)
        place = laid_out(r, delta.clone(memory_format=torch.contiguous_format), written=True)
        memory = place if place._base is None else place._base
        inside = torch.zeros_like(memory, dtype=torch.bool)
        inside.as_strided(place.shape, place.stride(), place.storage_offset()).fill_(True)
        around = memory[~inside]
        assert perturbation_step_(place, grad, *options) is place
        assert torch.equal(place, out), "in place it is another result"
        assert torch.equal(memory[~inside].nan_to_num(), around.nan_to_num()), "something beside delta was changed"
    if not also_eager(r):
        return
    choices = reference.NORMS, reference.SCOPES, reference.ASCENTS
    codes = [known.index(name) for known, name in zip(choices, way, strict=True)]
    eager = reference.perturbation_step(delta, grad, whole, None, step, epsilon, *codes)
    truth.check(eager)


def start_case(r: random.Random) -> None:
    lead, cols = sizes(r, 24)
    embeds = laid_out(r, torch.empty([*lead, cols], dtype=r.choice([*NARROW, torch.float64])))
    mask, whole = mask_of(r, lead)
    std, number = r.choice([0.0, 1.0, 1e-5, 10 ** r.uniform(-10, 10)]), r.randint(0, 2**63)
    with threads(r):
        out = init_perturbation(embeds, std, mask, torch.Generator().manual_seed(number))
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.Generator().manual_seed(number))
    expected = std * oracle.normal(int(seed), embeds.numel()).reshape(embeds.shape)
    if whole is not None:
        expected = np.where(wide(whole)[..., None] != 0, expected, 0)
    for z in [out] + ([reference.init_perturbation(embeds, seed, whole, std)] if also_eager(r) else []):
        # a few roundings of a radius that is at most 6.66, in fp32 whatever the dtype
        bar = np.full(embeds.shape, std * 6.66 * 2.0**-21 + 2.0**-149)
        compare(wide(z), expected, np.where(expected == 0, 0, bar), "normal")


def ema_case(r: random.Random) -> None:
    decay = r.choice([0.0, 1.0, 0.5, 0.99, 0.999, r.uniform(1e-3, 1), 10 ** r.uniform(-20, 0)])
    stochastic = r.random() < 0.3
    shadows, parameters = [], []
    for _ in range(8 if r.random() < 0.05 else r.choice([1, 1, 2, 3])):
        lead, cols = sizes(r, 12)
        shape = r.choice([[*lead, cols], [cols], [], [*lead, cols]])
        e = 10.0 ** r.uniform(-6, 3) * torch.randn(shape, dtype=torch.float64)
        p = e + r.choice([1.0, 1e3, 10.0 ** r.uniform(-6, 3)]) * torch.randn(shape, dtype=torch.float64)
        if r.random() < 0.1:
            p = e.clone()
        dtypes = r.choice(DTYPES)
        e, p = e.to(dtypes[0]), p.to(dtypes[1])
        if e.numel() and r.random() < 0.3:
            specials = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 6e-8, 3e38, -3e38, 65504.0]
            sprinkle(r, specials, e, p)
        shadows.append(laid_out(r, e, written=True) if e.dim() else e)
        parameters.append(laid_out(r, p) if p.dim() else p)
    for i in range(len(shadows)):
        if r.random() < 0.1:  # tied weights, and parameters that two shadows share
            if r.random() < 0.5:
                shadows.append(shadows[i].detach())
            else:
                shadows.append(shadows[i].clone())
            parameters.append(parameters[i])
    truths = [Ema(e, p, decay) for e, p in zip(shadows, parameters, strict=True)]
    befores = [e.clone() for e in shadows]
    kept = [p.clone() for p in parameters]
    given = torch.tensor(decay, dtype=torch.float64) if r.random() < 0.3 else decay
    seed = r.randint(0, 2**63)
    with threads(r):
        generator = torch.Generator().manual_seed(seed)
        ema_update_(shadows, parameters, given, stochastic_rounding=stochastic, generator=generator)
    for p, was in zip(parameters, kept, strict=True):
        assert torch.equal(p.nan_to_num(), was.nan_to_num()), "a parameter was changed"
    check_shadows(shadows, parameters, befores, truths, decay, stochastic)
    if not also_eager(r):
        return
    eager = [e.clone() for e in befores]
    drawn = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.Generator().manual_seed(seed))
    reference.ema_update_(eager, parameters, decay, None, drawn if stochastic else None)
    check_shadows(eager, parameters, befores, truths, decay, stochastic)


def check_shadows(
    shadows: list[torch.Tensor],
    parameters: list[torch.Tensor],
    befores: list[torch.Tensor],
    truths: list[Ema],
    decay: float,
    stochastic: bool,
) -> None:
    for e, p, before, truth in zip(shadows, parameters, befores, truths, strict=True):
        rounded = stochastic and e.dtype in (torch.bfloat16, torch.float16)
        if decay == 0 and rounded and e.dtype != p.dtype:
            truth.result = wide(p)
        if decay == 1 or (decay == 0 and (not rounded or e.dtype == p.dtype)):
            expected = before if decay == 1 else p.to(e.dtype)
            assert torch.equal(e.isnan(), expected.isnan()), "shadow"
            assert torch.equal(e.nan_to_num(), expected.nan_to_num()), "shadow"
        elif rounded:
            within = np.abs(truth.result) <= torch.finfo(e.dtype).max  # one of the two neighbours, and one unit more
            cancelled = (
                np.where(np.isfinite(truth.size), truth.size, 0) * 2.0**-44
            )  # what is left where both terms cancel
            with np.errstate(invalid="ignore"):
                off = (np.abs(wide(e) - truth.result) - cancelled) / ulp(np.where(within, truth.result, 1), e.dtype)
            assert (off[within] <= 1 + 2.0**-8).all(), "shadow, rounded at random"
        else:
            info = torch.finfo(e.dtype)
            fits = np.abs(truth.result) < info.max * (1 - info.eps)  # beyond, a rounding may go to infinity
            odd = ~np.isfinite(truth.result)
            truth.result = np.where(fits | odd, truth.result, wide(e))
            truth.check(e)


def linear_case(r: random.Random) -> None:
    """Losses, and the gradients of their weighted sum, of hidden states near and far behind one head or two."""
    lead, classes = sizes(r, 12)
    if classes > 400:
        lead = lead[:1]
    width, dtype = r.randint(1, 20), r.choice((*NARROW, torch.float64))
    distance = 10 ** r.uniform(-4 if dtype.itemsize == 2 else -5, 0)
    h_b = r.choice([0.1, 1.0, 1.0]) * torch.randn(*lead, width, dtype=torch.float64)
    h_a = h_b + distance * h_b.abs().mean().nan_to_num(1) * torch.randn(*lead, width, dtype=torch.float64)
    head = r.choice([0.3, 2.0]) * torch.randn(classes, width, dtype=torch.float64)
    bias = r.choice([0.0, 1.0]) * torch.randn(classes, dtype=torch.float64)
    tensors = [laid_out(r, x.to(dtype)) for x in (h_a, h_b, head, bias)]
    if r.random() < 0.2:
        other = head + r.choice([0.3, 1.0]) * torch.randn_like(head)
        tensors += [laid_out(r, other.to(dtype)), laid_out(r, -bias.to(dtype))]
    options = {
        "kind": r.choice(list(reference.KINDS)[:-1]),  # a total variation's gradient jumps where p and q cross
        "temperature": r.choice([1.0, 1.0, 0.5, 3.0]),
        "softcap": r.choice([None, None, 5.0]),
        "beta": r.uniform(0.05, 0.95),
    }
    if dtype == torch.float16:
        options["temperature"] = 1.0
    tensors = [x.detach().requires_grad_() for x in tensors]
    names = "bias", "target_linear_weight", "target_bias"
    heads = dict(zip(names, tensors[3:], strict=False))
    with threads(r):
        chunk_size = r.choice([None, 1, 2, 5])
        loss = linear_divergence(*tensors[:3], **heads, reduction="none", chunk_size=chunk_size, **options)
        total = linear_divergence(*tensors[:3], **heads, reduction="sum", chunk_size=chunk_size, **options)
        if not loss.numel():
            return
        truth = oracle.LinearDivergence(*(x.detach().reshape(-1, x.size(-1)) for x in tensors), **options)
        largest = max(float(np.abs(grad).max()) for grad in truth.grads)
        factor = 2.0**10 if dtype == torch.float16 and largest < 32 else 1.0  # the scale of a loss that fp16 can hold
        (factor * loss).sum().backward()
    of_loss, of_hidden, of_head = {torch.float64: (1e-9,) * 3, torch.float32: (1e-5, 1e-4, 1e-3)}.get(
        dtype, (1e-3, 2.0**-6, 2.0**-6)
    )
    # What a difference of logits is resolved to, r. With two heads logits are subtracted, off by 2^-24 of the sums of
    # their products. A loss is of second order in it: r leaves 2 r sqrt(loss) + r^2. Where a row is as good as decided,
    # or has one class, r is left of a gradient at the logits; of the sum of both sides', r times the difference.
    two, exact = len(tensors) > 4, dtype == torch.float64
    length = [float(np.linalg.norm(wide(x).astype(float), axis=-1).max()) for x in (h_a, h_b, h_a - h_b, head)]
    size = 64 * width * (tensors[0].abs().max() * tensors[2].abs().max() + 1).item()
    resolved = (1e-14 if exact else 2.0**-23) * size if two else float((1e-12 if exact else 2.0**-20) * truth.reach)
    bars = of_loss * np.abs(truth.loss) + resolved * np.sqrt(np.abs(truth.loss)) + resolved**2
    assert (np.abs(wide(loss).reshape(-1) - truth.loss) <= bars).all(), "loss"
    assert abs(wide(total) - truth.loss.sum()) <= (bars + of_loss * np.abs(truth.loss)).sum(), "sum of losses"
    if two:
        return
    both = resolved * float(truth.reach)
    left = (resolved * length[3],) * 2 + (resolved * length[2] + both * max(length[:2]), both)
    for x, grad, bar, least in zip(tensors, truth.grads, (of_hidden,) * 2 + (of_head,) * 2, left, strict=True):
        error = np.linalg.norm((wide(x.grad).reshape(grad.shape) / factor - grad).astype(float))
        subnormal = 2.0**-24 / factor * math.sqrt(x.numel()) if dtype == torch.float16 else 1e-30
        assert error <= bar * np.linalg.norm(grad.astype(float)) + least * math.sqrt(len(truth.loss)) + subnormal


CASES: dict[str, Callable[[random.Random], None]] = {
    "divergence": divergence_case,
    "perturbation_step": perturbation_case,
    "init_perturbation": start_case,
    "ema_update_": ema_case,
    "linear_divergence": linear_case,
}


def run_case(case: Callable[[random.Random], None], r: random.Random) -> None:
    torch.default_generator.manual_seed(r.getrandbits(63))  # torch.manual_seed takes as long as a case
    case(r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    begin, failed = time.monotonic(), 0
    for number in range(options.first, options.first + options.cases):
        if (number - options.first) % 1000 == 0:  # a crash lies behind the last of these
            print(f"from {number}: {failed} failed, {time.monotonic() - begin:.0f} s", flush=True)
        name = list(CASES)[number % len(CASES)]
        try:
            run_case(CASES[name], random.Random(f"{options.seed}, {number}"))
        except Exception:
            failed += 1
            print(
                f"{name}, --seed {options.seed} --first {number} --cases 1",
                traceback.format_exc(),
                sep="\n",
                flush=True,
            )
    print(f"{options.cases} cases from {options.first} on with seed {options.seed}: {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

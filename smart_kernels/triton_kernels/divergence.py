"""Divergences of two tensors of logits in Triton: one kernel for all kinds, and the launchers of its ops.

With p = softmax(a / T), q = softmax(b / T), t = log(p / q), w = p + q and x = p - q, a row's loss is a sum over classes
of what `kinds.py` makes of p, q, x and t: Σ x t for the symmetric KL. No term of it is negative, and neither t nor x is
formed from two logarithms or probabilities that agree in all but the last digits:

    t = (a - b) / T - s,  s = logsumexp(a / T) - logsumexp(b / T);   x = w tanh(t / 2), or p - q where |t| is not small.

A row that a program can compare at once is read once. A longer one is surveyed block by block: what a thread knows of
the blocks before is one class more among those that it reads of the next, by the chain rule of the symmetric KL, and in
the end all threads' parts are compared as if they were classes. For gradients the blocks are gone through again: those
that registers have room for are still there, the others are read again. Where such rows are few, several programs share
one: a first launch leaves the parts of each, a second merges them and writes the gradients.

For the symmetric KL the survey's other sum, skew = Σ w t = KL(p||q) - KL(q||p), gives both divergences, and with them
the gradients: ∂loss/∂a = p (t - KL(p||q)) + x, ∂loss/∂b = -q (t + KL(q||p)) - x. Of the other kinds the survey gives s
alone; their loss and the sums that their gradients are centred by follow from a reading of the blocks in between.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq, is_hip

from smart_kernels import reference
from smart_kernels.triton_kernels import kinds, scalars, tiles

_SMALL = tl.constexpr(reference.SMALL)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _exp(x, top, inverse):
    """exp((x - top) / T); below 2^-126 it is 0 in fp32, where a GPU's own instruction saves the four that scale."""
    return tl.exp((x - top) * inverse) if x.dtype == tl.float64 else tl.exp2((x - top) * (_LOG2_E * inverse))


@triton.jit
def _twice_normalised(x, top, total, inverse):
    """2 exp((x - top) / T) / total, in fp32 with the factor in the exponent."""
    if x.dtype == tl.float64:
        return tl.exp((x - top[:, None]) * inverse) * (2 / total)[:, None]
    return tl.exp2((x - top[:, None]) * (_LOG2_E * inverse) + (1 - tl.log2(total))[:, None])


@triton.jit
def _sums(x, y):
    """The sums of both over the classes of each row, in one reduction."""
    return tl.split(tl.sum(tl.join(x, y), 1))


@triton.jit
def _sums_of_three(x, y, z):
    xy, z = tl.split(tl.sum(tl.join(tl.join(x, y), tl.join(z, tl.zeros_like(z))), 1))
    x, y = tl.split(xy)
    return x, y, tl.split(z)[0]


@triton.jit
def _difference(p, q, d, s):
    """Of classes w = p + q, x = p - q and t = log(p / q) = d - s, with d = a - b."""
    w, t = p + q, d - s
    t = tl.where(t == t, t, 0)  # -inf - -inf: a class that is absent. A row that holds a NaN gets it from its sums
    # Beyond |s| = 1024 the rounding of t is more than what p - q loses.
    near = tl.abs(t) <= tl.where(tl.abs(s) <= 1024, _SMALL, -1)
    return w, tl.where(near, w * kinds.tanh_half(t), p - q), t


@triton.jit
def _compare(a, mass_a, b, mass_b, d, known, inverse):
    """Compare distributions over classes of logits a / T + log(mass_a), b / T + log(mass_b); d = (a - b) / T.

    Returns w, x and t of each class, w and x times the sum of the softmax of a; of each row the reciprocal of that sum;
    the error of t, which `_settle` takes out of x; and what is known of the row: s, free of that error, the loss, the
    skew, and the maximum and sum of each softmax. What is `known` of further classes already counts as one more class.
    """
    top_a, top_b = tl.split(tl.max(tl.join(a, b), 1))
    if known is not None:
        top_a, top_b = tl.maximum(top_a, known[3]), tl.maximum(top_b, known[5])
    # A block of nothing but absent classes has no mass; -inf - -inf and 0 / 0 must not spoil the row that it is in.
    from_a = tl.where(top_a == -float("inf"), 0, top_a)
    from_b = tl.where(top_b == -float("inf"), 0, top_b)
    p, q = mass_a * _exp(a, from_a[:, None], inverse), mass_b * _exp(b, from_b[:, None], inverse)
    sum_a, sum_b = _sums(p, q)
    if known is not None:
        p0, q0 = known[4] * _exp(known[3], from_a, inverse), known[6] * _exp(known[5], from_b, inverse)
        sum_a += p0
        sum_b += q0
    over, ratio = tl.where(sum_a == 0, 0, 1 / sum_a), tl.where(sum_b == 0, 0, sum_a / sum_b)
    s = tl.where(top_a == top_b, 0, (top_a - top_b) * inverse) + tl.where(sum_a == sum_b, 0, tl.log(sum_a / sum_b))
    w, x, t = _difference(p, q * ratio[:, None], d, s[:, None])
    # s is good to 1e-7 only, which is much where all t are 1e-6; but its error is what Σ x shows, as Σ p = Σ q. With
    # t - error and x - error w / 2 in their places the sums are these. |x t|, as x and t have one sign, is no fused
    # multiply-add, which gives all lanes that add up a row the same bits; a thread's own group has but one.
    xt = tl.abs(x * t) if known is None else x * t
    error, loss, skew = _sums_of_three(x, xt, w * t)
    if known is not None:
        w0, x0, t0 = _difference(p0, q0 * ratio, known[0], s)
        error, loss, skew = error + x0, loss + x0 * t0, skew + w0 * t0
    error, loss, skew = error * over, loss * over, skew * over
    loss, skew = loss - 0.5 * error * skew, skew - 2 * error
    if known is not None:
        w0, x0 = w0 * over, _settle(w0, x0, error) * over
        loss += 0.5 * (w0 * known[1] + x0 * known[2])
        skew += 0.5 * (w0 * known[2] + x0 * known[1])
    return w, x, t, over, error, (s + error, loss, skew, top_a, sum_a, top_b, sum_b)


@triton.jit
def _settle(w, x, error):
    return x - 0.5 * error * w


@triton.jit
def _merge(parts, inverse):
    """What is known of parts of each row, as if the parts were classes: what is known of the row."""
    w, x, _, over, error, known = _compare(parts[3], parts[4], parts[5], parts[6], parts[0], None, inverse)
    x = _settle(w, x, error[:, None])
    # KL(p||q) is that of the parts plus the mean, weighted by p, of that within each; so is KL(q||p).
    loss, skew = _sums(w * parts[1] + x * parts[2], w * parts[2] + x * parts[1])
    loss, skew = loss * over, skew * over
    return known[0], known[1] + 0.5 * loss, known[2] + 0.5 * skew, known[3], known[4], known[5], known[6]


@triton.jit
def _grouped(x, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """A block of a row as GROUPS rows: of each VECTOR classes that lie together, the next are the next group's."""
    x = tl.reshape(x, (x.numel // (GROUPS * VECTOR), GROUPS, VECTOR))
    return tl.reshape(tl.permute(x, (1, 0, 2)), (GROUPS, x.numel // GROUPS))


@triton.jit
def _load(rows, start, cols, col_stride, mask, other):
    """The classes start + cols of rows at these pointers."""
    block = rows + tl.cast(start, tl.int64) * col_stride
    return tl.load(block + cols.to(tl.int64) * col_stride, mask=mask, other=other)


@triton.jit
def _load_pair(
    a_rows, b_rows, start, cols, a_stride, b_stride, mask, padding, COMPUTE: tl.constexpr, GIVEN: tl.constexpr
):
    """The classes start + cols of a, for which a - b stands with GIVEN, and of b."""
    first = _load(a_rows, start, cols, a_stride, mask, 0 if GIVEN else padding).to(COMPUTE)
    return first, _load(b_rows, start, cols, b_stride, mask, padding).to(COMPUTE)


@triton.jit
def _minus(a, b, d):
    """The difference a - b, which may be given."""
    return a - b if d is None else d


@triton.jit
def _compare_block(a, b, d, known, inverse, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """What is `known` of each thread's group of classes, with those that it has read of one more block."""
    if d is not None:
        d = _grouped(d, GROUPS, VECTOR)
    a, b = _grouped(a, GROUPS, VECTOR), _grouped(b, GROUPS, VECTOR)
    return _compare(a, 1.0, b, 1.0, _minus(a, b, d) * inverse, known, inverse)[5]


@triton.jit
def _store_gradients(
    grad_a_ptr, grad_b_ptr, start, cols, mask, p2, q2, x, t, kl_pq, kl_qp, scale, half, DETACH: tl.constexpr
):
    """Stores the gradients: of 2 p, 2 q and t times `half`, and of x times `scale`."""
    half, grad_a = half[:, None], scale[:, None] * x
    grad_b = -grad_a
    if not DETACH:
        grad_a += p2 * (half * t - half * kl_pq[:, None])
        grad_b -= q2 * (half * t + half * kl_qp[:, None])
    if grad_a_ptr is not None:
        tl.store(grad_a_ptr + start + cols, grad_a.to(grad_a_ptr.dtype.element_ty), mask=mask)
    if grad_b_ptr is not None:
        tl.store(grad_b_ptr + start + cols, grad_b.to(grad_b_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_block(
    grad_a_ptr, grad_b_ptr, start, cols, mask, a, b, known, kl_pq, kl_qp, half, inverse, DETACH: tl.constexpr
):
    """Stores the symmetric KL's gradients of a block of a row of which everything is known."""
    p2 = _twice_normalised(a, known[3], known[4], inverse)
    q2 = _twice_normalised(b, known[5], known[6], inverse)
    # a and b have exchanged their roles: else the compiler would keep a - b in registers from when they were compared.
    _, x2, t = _difference(q2, p2, (b - a) * inverse, -known[0][:, None])
    _store_gradients(grad_b_ptr, grad_a_ptr, start, cols, mask, q2, p2, x2, t, kl_qp, kl_pq, half, half, DETACH)


@triton.jit
def _parts(a, b, d, known, inverse, beta, KIND: tl.constexpr, DETACH: tl.constexpr):
    """Of a block of a row of which all is known: p, q, x, and each class's part of the loss and of the gradients."""
    p = 0.5 * _twice_normalised(a, known[3], known[4], inverse)
    q = 0.5 * _twice_normalised(b, known[5], known[6], inverse)
    _, x, t = _difference(q, p, (b - a if d is None else -d) * inverse, -known[0][:, None])
    term, slope_a, slope_b = kinds.parts(p, q, -x, -t, beta, KIND, DETACH)
    return p, q, -x, term, slope_a, slope_b


@triton.jit
def _add_block(
    a, b, d, known, totals, inverse, beta, KIND: tl.constexpr, DETACH: tl.constexpr, GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The sums of what `_parts` gives, of each thread's group of classes, with those of one more block."""
    _, _, _, term, slope_a, slope_b = _parts(a, b, d, known, inverse, beta, KIND, DETACH)
    term = tl.sum(_grouped(term, GROUPS, VECTOR), 1)
    slope_a = tl.sum(_grouped(slope_a, GROUPS, VECTOR), 1)
    return totals[0] + term, totals[1] + slope_a, totals[2] + tl.sum(_grouped(slope_b, GROUPS, VECTOR), 1)


@triton.jit
def _store_parts(
    grad_a_ptr, grad_b_ptr, both_ptr, start, cols, mask, a, b, d, known, totals, scale, inverse, beta,
    KIND: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of any other kind, of a block of a row of which everything is known, and their sum."""
    p, q, x, term, slope_a, slope_b = _parts(a, b, d, known, inverse, beta, KIND, DETACH)
    loss, mean_a, mean_b, scale = totals[0][:, None], totals[1][:, None], totals[2][:, None], scale[:, None]
    if grad_a_ptr is not None:
        grad_a = scale * kinds.centred(p, slope_a, mean_a, mean_b, loss, KIND)
        tl.store(grad_a_ptr + start + cols, grad_a.to(grad_a_ptr.dtype.element_ty), mask=mask)
    if grad_b_ptr is not None:
        grad_b = scale * kinds.centred(q, slope_b, mean_b, mean_a, loss, KIND)
        tl.store(grad_b_ptr + start + cols, grad_b.to(grad_b_ptr.dtype.element_ty), mask=mask)
    if both_ptr is not None:
        both = scale * kinds.of_both(q, x, term, mean_a, loss, KIND)
        tl.store(both_ptr + start + cols, both.to(both_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "count", "a_outer_stride", "b_outer_stride", "beta", "inverse"])
def _divergence_kernel(
    a_ptr,
    b_ptr,
    weight_ptr,  # (n_rows) or None
    upstream_ptr,  # the gradient that comes in, (n_rows), or (1) with stride 0, or None for ones
    total_ptr,  # what the sum of the rows is divided by, (1), or None for `count`
    loss_ptr,  # (n_rows), or None; so the gradients
    grad_a_ptr,
    grad_b_ptr,
    both_ptr,  # their sum, which may be wanted where the logits' difference is given
    parts_ptr,  # (10, n_rows, SPLITS), or None: what each split of a row tells of it
    n_rows,
    n_inner,
    count,
    beta,  # the bits of a double, as those of 1 / temperature
    inverse,
    greatest,  # which the loss does not exceed
    a_outer_stride,
    a_inner_stride,
    a_col_stride,
    b_outer_stride,
    b_inner_stride,
    b_col_stride,
    weight_stride,
    upstream_stride,
    N_COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    DETACH: tl.constexpr,
    KIND: tl.constexpr,
    GIVEN: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
    SPAN: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGE: tl.constexpr,
    HELD: tl.constexpr,
):
    """BLOCK_M rows per program: their losses and gradients, as far as there are tensors for them.

    Or one of the SPLITS of a row, SPAN classes each: a first launch, of STAGE "survey", leaves its parts; one of STAGE
    "finish" has them. In between, one of STAGE "sums" leaves sums, of kinds that need any.
    """
    PARTS: tl.constexpr = KIND != "symmetric_kl" or GIVEN
    KEPT: tl.constexpr = tiles.blocks_kept(HELD, is_hip(), cuda_capability_geq(10))
    split = tl.program_id(0) % SPLITS
    rows = (tl.program_id(0) // SPLITS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = split * SPAN
    live = (rows < n_rows) if BLOCK_M > 1 else (rows >= 0)
    cols = tl.arange(0, BLOCK_N)[None, :]
    # Strides of rows come in units of ALIGN elements: from this product the compiler sees how wide it may access.
    outer, inner = rows // n_inner, rows % n_inner
    a_rows = a_ptr + (ALIGN * (outer * a_outer_stride + inner * a_inner_stride))[:, None]
    b_rows = b_ptr + (ALIGN * (outer * b_outer_stride + inner * b_inner_stride))[:, None]

    beta = scalars.as_number(beta).to(COMPUTE)
    # A constant where it is one, so that all that it is a factor of is as if there were none.
    inverse = scalars.as_number(inverse).to(COMPUTE) if SCALED else 1.0
    zero = tl.zeros((BLOCK_M,), COMPUTE)
    read, padding, weight, skip = live, -float("inf"), zero + 1, live & False
    if weight_ptr is not None:
        # A row of weight 0 is not read: it is one of zeros, whose loss and gradients are 0.
        weight = tl.load(weight_ptr + rows * weight_stride, mask=live, other=0).to(COMPUTE)
        skip = weight == 0
        read, padding = live & ~skip, tl.where(skip, zero, -float("inf"))[:, None]
    mask = live[:, None] & (cols < N_COLS)
    if N_COLS <= BLOCK_N:
        first, b = _load_pair(
            a_rows, b_rows, 0, cols, a_col_stride, b_col_stride, read[:, None] & mask, padding, COMPUTE, GIVEN
        )
        a = first + b if GIVEN else first
        d = first if GIVEN else None
        w, x, t, over, error, known = _compare(a, 1.0, b, 1.0, _minus(a, b, d) * inverse, None, inverse)
    elif STAGE == "sums" or STAGE == "finish":
        parts = parts_ptr + (rows * SPLITS)[:, None] + tl.arange(0, SPLITS)[None, :]
        n_parts = n_rows.to(tl.int64) * SPLITS
        known = ()
        for i in tl.static_range(7):
            known += (tl.load(parts + i * n_parts),)
        known = _merge(known, inverse)
    else:
        # Of each block, every thread adds up what it has read itself: a group of classes. The threads' groups are
        # compared as if they were classes, once and at the end. The first KEPT blocks stay in registers.
        none = tl.zeros((GROUPS,), COMPUTE)
        known = (none, none, none, none - float("inf"), none, none - float("inf"), none)
        held_a, held_b = (), ()
        for i in tl.static_range(KEPT):
            mask = read[:, None] & (cols < N_COLS - i * BLOCK_N)
            a = _load(a_rows, i * BLOCK_N, cols, a_col_stride, mask, padding).to(COMPUTE)
            held_a += (a,)  # type: ignore[assignment]
            b = _load(b_rows, i * BLOCK_N, cols, b_col_stride, mask, padding).to(COMPUTE)
            held_b += (b,)  # type: ignore[assignment]
        for i in tl.static_range(KEPT):
            known = _compare_block(held_a[i], held_b[i], None, known, inverse, GROUPS, VECTOR)
        for i in range(KEPT, SPAN // BLOCK_N):
            start = begin + i * BLOCK_N
            mask = read[:, None] & (cols < N_COLS - start)
            first, b = _load_pair(
                a_rows, b_rows, start, cols, a_col_stride, b_col_stride, mask, padding, COMPUTE, GIVEN
            )
            a = first + b if GIVEN else first
            d = first if GIVEN else None
            known = _compare_block(a, b, d, known, inverse, GROUPS, VECTOR)
        parts = ()
        for i in tl.static_range(7):
            parts += (known[i][None, :],)
        known = _merge(parts, inverse)
        if SPLITS > 1:
            for i in tl.static_range(7):
                tl.store(parts_ptr + (i * n_rows.to(tl.int64) + rows) * SPLITS + split, known[i])
            return

    _, loss, skew, _, sum_a, _, sum_b = known
    totals = loss, skew, skew
    if PARTS:
        if N_COLS <= BLOCK_N:
            _, _, _, term, slope_a, slope_b = _parts(a, b, d, known, inverse, beta, KIND, DETACH)
            totals = _sums_of_three(term, slope_a, slope_b)
        elif STAGE == "finish":
            parts += 7 * n_parts
            term, slope_a, slope_b = tl.load(parts), tl.load(parts + n_parts), tl.load(parts + 2 * n_parts)
            totals = _sums_of_three(term, slope_a, slope_b)
        else:
            none = tl.zeros((GROUPS,), COMPUTE)
            totals = none, none, none
            for i in range(SPAN // BLOCK_N):
                start = begin + i * BLOCK_N
                mask = read[:, None] & (cols < N_COLS - start)
                first, b = _load_pair(
                    a_rows, b_rows, start, cols, a_col_stride, b_col_stride, mask, padding, COMPUTE, GIVEN
                )
                a = first + b if GIVEN else first
                d = first if GIVEN else None
                totals = _add_block(a, b, d, known, totals, inverse, beta, KIND, DETACH, GROUPS, VECTOR)
            totals = _sums_of_three(totals[0][None, :], totals[1][None, :], totals[2][None, :])
        if STAGE == "sums":
            for i in tl.static_range(3):
                tl.store(parts_ptr + ((7 + i) * n_rows.to(tl.int64) + rows) * SPLITS + split, totals[i])
            return
        loss = totals[0]
    # Sums are no positive numbers in a row with a NaN or +inf, or of nothing but -inf. Where they are, but the loss is
    # no number, a class is masked in one tensor alone: 0 * inf, or inf - inf.
    defined = sum_a * sum_b > 0
    finite = defined & (loss < float("inf"))
    loss = tl.where(defined, tl.where(finite, tl.maximum(loss, 0), float("inf")), float("nan"))
    if PARTS:
        loss = tl.where(loss > greatest, greatest, loss)
    scale = (zero + 1) / count
    if total_ptr is not None:
        scale /= tl.load(total_ptr)
    if loss_ptr is not None:  # noqa: SIM102 - known when compiled, the other is not
        if split == 0:
            # NaN where the weights of all rows are 0: there is no mean.
            tl.store(loss_ptr + rows, weight * scale * loss, mask=live)

    if grad_a_ptr is not None or grad_b_ptr is not None:
        scale = tl.where(finite, weight * scale * inverse, float("nan"))
        if upstream_ptr is not None:
            scale *= tl.load(upstream_ptr + rows * upstream_stride, mask=live, other=0)
        scale = tl.where(skip, 0, scale)
        half, kl_pq, kl_qp = 0.5 * scale, 0.5 * (loss + skew), 0.5 * (loss - skew)
        out = (rows * N_COLS)[:, None]
        if N_COLS <= BLOCK_N and PARTS:
            _store_parts(
                grad_a_ptr, grad_b_ptr, both_ptr, out, cols, mask, a, b, d, known, totals, scale, inverse, beta, KIND,
                DETACH,
            )  # fmt: skip
        elif N_COLS <= BLOCK_N:
            # t - error, too, but for the sums; p and q as they are, lest one that is small err by a share of the other
            p2, q2, x = w + x, w - x, _settle(w, x, error[:, None])
            kl_pq, kl_qp = kl_pq + error, kl_qp - error
            scale, half = scale * over, half * over
            _store_gradients(grad_a_ptr, grad_b_ptr, out, cols, mask, p2, q2, x, t, kl_pq, kl_qp, scale, half, DETACH)
        else:
            for i in tl.static_range(KEPT):
                tl.debug_barrier()  # no block is begun before the last is stored: there are no registers for both
                mask = live[:, None] & (cols < N_COLS - i * BLOCK_N)
                _store_block(
                    grad_a_ptr, grad_b_ptr, out + i * BLOCK_N, cols, mask, held_a[i], held_b[i], known, kl_pq, kl_qp,
                    half, inverse, DETACH,
                )  # fmt: skip
            for i in range(KEPT, SPAN // BLOCK_N):
                start = begin + i * BLOCK_N
                mask = live[:, None] & (cols < N_COLS - start)
                first, b = _load_pair(
                    a_rows, b_rows, start, cols, a_col_stride, b_col_stride, read[:, None] & mask, 0, COMPUTE, GIVEN
                )
                a = first + b if GIVEN else first
                d = first if GIVEN else None
                if not PARTS:
                    _store_block(
                        grad_a_ptr, grad_b_ptr, out + start, cols, mask, a, b, known, kl_pq, kl_qp, half, inverse,
                        DETACH,
                    )  # fmt: skip
                else:
                    _store_parts(
                        grad_a_ptr, grad_b_ptr, both_ptr, out + start, cols, mask, a, b, d, known, totals, scale,
                        inverse, beta, KIND, DETACH,
                    )  # fmt: skip


def _layout(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The tensors, and their leading dimensions as exactly two of [size, stride of input, stride of target].

    Neighbours are merged as far as both tensors allow, so that slices such as logits[:, :-1] and transposed batches
    need no copy; what cannot be brought down to two dimensions is reshaped.
    """
    groups: list[list[int]] = []
    for size, *strides in zip(input.shape[:-1], input.stride(), target.stride(), strict=False):
        if groups and groups[-1][1:] == [size * stride for stride in strides]:
            groups[-1] = [groups[-1][0] * size, *strides]
        elif size > 1:
            groups.append([size, *strides])
    if len(groups) > 2:
        return _layout(input.reshape(-1, input.size(-1)), target.reshape(-1, target.size(-1)))
    return input, target, groups + [[1, 0, 0]] * (2 - len(groups))


def _launch(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    loss: Tensor | None,
    input_grad: bool,
    target_grad: bool,
    kind: int,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Fill `loss`, one number per row, where it is given; return the gradients, each empty if not asked for."""
    grads = input.new_empty(input.shape if input_grad else 0), target.new_empty(target.shape if target_grad else 0)
    into = [grad if is_wanted else None for grad, is_wanted in zip(grads, (input_grad, target_grad), strict=True)]
    options = kind, beta, temperature
    _launch_into([*into, None], grad_output, input, target, weight, reduction, detach_targets, loss, False, *options)
    return grads


def _launch_into(
    grads: list[Tensor | None],
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    detach_targets: bool,
    loss: Tensor | None,
    given: bool,
    kind: int,
    beta: float,
    temperature: float,
) -> None:
    """Fill the gradients, and their sum, where there are tensors for them; `input` may be the difference `given`."""
    n_cols = input.size(-1)
    n_rows = input.numel() // n_cols
    if n_rows == 0:
        return
    total, count = None, 1
    match reference.REDUCTIONS[reduction]:
        case "batchmean":
            count = input.size(0)
        case "mean" if weight is not None:
            total = weight.sum()
        case "mean":
            count = n_rows
    weight = None if weight is None else weight.reshape(-1)
    upstream = None if grad_output is None else grad_output.reshape(-1)
    input, target, (outer, inner) = _layout(input, target)
    align = math.gcd(16, *outer[1:], *inner[1:])
    name = list(reference.KINDS)[kind]
    symmetric = name == "symmetric_kl" and not given
    odd = align == 1 and (symmetric or given)
    variant = ", fp64" if input.dtype == torch.float64 else ", odd" if odd else ""
    table = "differences" if given else name if symmetric else "other kinds"
    tile = tiles.choose(f"{table}{variant}", n_cols)
    blocks = triton.cdiv(n_cols, tile.columns)
    splits = min(triton.next_power_of_2(triton.cdiv(tiles.PROGRAMS, n_rows)), triton.next_power_of_2(blocks))
    if 2 * n_rows > tiles.PROGRAMS or blocks == 1:
        splits = 1
    held = blocks > 1 and splits == 1 and input.dtype != torch.float64 and n_cols <= tiles.HELD
    held = held and symmetric and any(grad is not None for grad in grads)
    if held:
        tile = tiles.choose("symmetric_kl, held", n_cols)
        blocks = triton.cdiv(n_cols, tile.columns)
    groups = 32 * tile.warps
    parts = None if splits == 1 else input.new_empty((10, n_rows, splits), dtype=reference.compute_dtype(input))
    stages = ("survey", "finish") if symmetric else ("survey", "sums", "finish")
    for stage in ("whole",) if parts is None else stages:
        with torch.cuda.device_of(input):
            _divergence_kernel[(triton.cdiv(n_rows, tile.rows) * splits,)](
                input,
                target,
                weight,
                upstream,
                total,
                loss,
                *grads,
                parts,
                n_rows,
                inner[0],
                count,
                scalars.bits(beta),
                scalars.bits(1 / temperature),
                reference.greatest(kind, beta),
                outer[1] // align,
                inner[1] // align,
                input.stride(-1),
                outer[2] // align,
                inner[2] // align,
                target.stride(-1),
                0 if weight is None else weight.stride(0),
                0 if upstream is None or upstream.numel() == 1 else upstream.stride(0),
                N_COLS=n_cols,
                ALIGN=align,
                DETACH=detach_targets,
                KIND=name,
                GIVEN=given,
                SCALED=temperature != 1,
                COMPUTE=tl.float64 if input.dtype == torch.float64 else tl.float32,
                BLOCK_M=tile.rows,
                BLOCK_N=tile.columns,
                GROUPS=groups,
                VECTOR=min(align, 16 // input.itemsize, max(1, tile.columns // groups)),
                SPAN=triton.cdiv(blocks, splits) * tile.columns,
                SPLITS=splits,
                STAGE=stage,
                HELD=blocks if held else 0,
                num_warps=tile.warps,
                enable_fp_fusion=True,
            )


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
    """The op `smart_kernels::divergence` on a GPU."""
    options = kind, beta, temperature
    return divergence_forward_backward(input, target, weight, reduction, detach_targets, False, False, *options)[0]


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
    """The op `smart_kernels::divergence_backward` on a GPU."""
    options = input_grad, target_grad, kind, beta, temperature
    return _launch(grad_output, input, target, weight, reduction, detach_targets, None, *options)


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
    """The op `smart_kernels::divergence_grad` on a GPU."""
    options = True, False, kind, beta, temperature
    return _launch(None, input, target, weight, reduction, detach_targets, None, *options)[0]


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
    """The op `smart_kernels::divergence_forward_backward` on a GPU."""
    options = input_grad, target_grad, kind, beta, temperature
    if input.numel() == 0:
        return reference.divergence_forward_backward(input, target, weight, reduction, detach_targets, *options)
    loss = input.new_empty(input.shape[:-1], dtype=reference.compute_dtype(input))
    grads = _launch(None, input, target, weight, reduction, detach_targets, loss, *options)
    return (loss.sum() if reduction else loss, *grads)


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
    """The op `smart_kernels::divergence_rows_` on a GPU."""
    loss = rows.new_empty(rows.size(1))
    b, a, both = rows[0], rows[1], rows[2] if rows.size(0) == 3 else None
    grads: list[Tensor | None] = [a, b, both] if gradients else [None] * 3
    _launch_into(grads, scale, a, b, weight, 0, detach_targets, loss, difference, kind, beta, temperature)
    return loss

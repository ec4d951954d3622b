"""The perturbation's start and its step in Triton: the kernels, and the launchers of the ops.

A norm is taken over a unit: a token, or all positions and features of a sample. Units of up to some thousand elements
lie in the registers of a program, which reads delta and the gradient once. Longer ones are cut into splits, the same
on any device: one launch leaves the largest |g| and the sums of each split, the next adds them up and takes the step.

Sums run in fp64, where no square of fp32 over- or underflows, and where the norm of delta + step is accurate enough
from the three sums of products of delta and the step's direction. In fp64, the gradient is scaled first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from smart_kernels import reference
from smart_kernels.triton_kernels import tiles
from smart_kernels.triton_kernels.scalars import as_number, bits

_NORMALIZED, _SIGN, _RAW = (tl.constexpr(i) for i in range(3))
_LONGEST_STEP = tl.constexpr(1e28)


@triton.jit
def _magnitude(x):
    """The bits of |x|, ordered as the numbers are; a NaN's are the largest."""
    wide: tl.constexpr = x.dtype == tl.float64
    bits = x.to(tl.int64 if wide else tl.int32, bitcast=True)
    return bits & (0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF)


@triton.jit
def _number(top):
    """The number of such bits."""
    return top.to(tl.float64 if top.dtype == tl.int64 else tl.float32, bitcast=True)


@triton.jit
def _is_finite(top):
    return top < (0x7FF0000000000000 if top.dtype == tl.int64 else 0x7F800000)


@triton.jit
def _scale(top, ASCENT: tl.constexpr):
    """The power of two that takes the largest |g| to 1 .. 4 (a subnormal one as near as may be); 1 for signs."""
    mantissa: tl.constexpr = 52 if top.dtype == tl.int64 else 23
    bias: tl.constexpr = 1023 if top.dtype == tl.int64 else 127
    exponent = top * 0 + bias if ASCENT == _SIGN else tl.maximum(2 * bias - (top >> mantissa), 1)
    return _number(exponent << mantissa)


@triton.jit
def _direction(g, scale, ASCENT: tl.constexpr):
    return tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)).to(g.dtype) if ASCENT == _SIGN else g * scale


@triton.jit
def _sums(d, delta):
    """Of each row, the sums of d d, d delta and delta delta."""
    d, delta = d.to(tl.float64), delta.to(tl.float64)
    return tl.sum(d * d, 1), tl.sum(d * delta, 1), tl.sum(delta * delta, 1)


@triton.jit
def _plan(top, dd, d_delta, delta_delta, step_size, epsilon, L2: tl.constexpr, ASCENT: tl.constexpr):
    """What becomes of units: whether they move, and the factors of delta and of the direction."""
    moves = (top > 0) & _is_finite(top)
    scale = _scale(top, ASCENT)
    largest = tl.where(moves, _number(top), 1)
    if not L2:
        length = step_size.to(scale.dtype) + scale * 0
        if ASCENT == _NORMALIZED:
            length = length / (largest * scale)
        if ASCENT == _RAW:
            length = length / scale
        length = tl.minimum(length, _LONGEST_STEP)  # so long a step hides delta, and is still finite
        return moves, scale * 0 + 1, length
    length = step_size + tl.zeros_like(dd)
    if ASCENT == _NORMALIZED:
        length = length / tl.sqrt(tl.where(moves, dd, 1))
    if ASCENT == _RAW:
        length = length / scale
    length = tl.where(moves, tl.minimum(length, _LONGEST_STEP), 0)
    dd, d_delta = tl.where(moves, dd, 0), tl.where(moves, d_delta, 0)
    # The norm of delta + step, and an upper bound of it with the rounding of the sums and of the result. Without a
    # step, a delta within the ball stays as it is.
    rounding: tl.constexpr = 2.0**-51 if scale.dtype == tl.float64 else 2.0**-22
    summation: tl.constexpr = 1e-12
    total = tl.sqrt(delta_delta) + length * tl.sqrt(dd)
    square = tl.maximum(delta_delta + length * (2 * d_delta + length * dd), 0)
    still = tl.sqrt(delta_delta)
    size = tl.where(moves, tl.sqrt(square + summation * total * total) + rounding * total, still)
    inflated = tl.where(moves, size, still * (1 + rounding + summation))
    keep = tl.where(size <= epsilon, 1, epsilon / tl.where(inflated == 0, 1, inflated))
    return moves, keep.to(scale.dtype), (length * keep).to(scale.dtype)


@triton.jit
def _moved(delta, d, moves, keep, step, bound, L2: tl.constexpr):
    x = delta * keep + tl.where(moves, d * step, 0)
    if not L2:
        x = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))  # leaves a NaN
    return x


@triton.jit
def _count(skipped_ptr, top):
    """Adds the number of units that are skipped."""
    count = tl.sum((~_is_finite(top)).to(tl.int64), 0)
    tl.atomic_add(skipped_ptr, count, mask=count > 0, sem="relaxed")


@triton.jit
def _tile(
    unit,
    start,
    live,
    mask_ptr,
    unit_rows,
    sample_rows,
    sample_stride,
    row_stride,
    col_stride,
    N_COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_ROW: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of units from `start` on: their offsets in delta and in grad, which there are, and which count."""
    within = tl.arange(0, BLOCK)[None, :]
    size = tl.cast(unit_rows, tl.int64) * N_COLS
    place = unit * size + start + within
    there = live & (start + within < size)
    row, col = unit * unit_rows + start // N_COLS, (start % N_COLS).to(tl.int32)
    counts = there
    if ONE_ROW:
        if mask_ptr is not None:
            counts &= tl.load(mask_ptr + row, mask=live, other=0) != 0
        col += within
    else:
        col = tl.multiple_of(col, ALIGN)  # as ALIGN divides N_COLS and every start
        if mask_ptr is not None:
            # ALIGN elements in a row share their number of the mask, which is read once for all of them.
            UNITS: tl.constexpr = unit.shape[0]
            GROUPS: tl.constexpr = BLOCK // ALIGN
            group = ALIGN * tl.arange(0, GROUPS)[None, :]
            kept = tl.load(mask_ptr + row + (col + group) // N_COLS, mask=live & (start + group < size), other=0) != 0
            kept = tl.reshape(tl.broadcast_to(kept[:, :, None], (UNITS, GROUPS, ALIGN)), (UNITS, BLOCK))
            counts &= tl.max_constancy(kept, (1, ALIGN))
        col += within
        row, col = row + col // N_COLS, col % N_COLS
    grad_place = place
    if STRIDED:
        sample, row = row // sample_rows, row % sample_rows
        grad_place = sample * sample_stride + row * row_stride + col.to(tl.int64) * col_stride
    return place, grad_place, there, counts


@triton.jit(do_not_specialize=["step_bits", "epsilon_bits", "n_units"])
def _step_kernel(
    delta_ptr,
    grad_ptr,
    out_ptr,  # may be delta_ptr
    mask_ptr,  # one per row, or None
    skipped_ptr,  # int64, or None
    step_bits,
    epsilon_bits,
    n_units,
    unit_rows,
    sample_rows,
    sample_stride,  # of grad, if STRIDED; so the next
    row_stride,
    col_stride,
    N_COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_ROW: tl.constexpr,
    STRIDED: tl.constexpr,
    L2: tl.constexpr,
    ASCENT: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """UNITS units per program, each as a whole."""
    COMPUTE: tl.constexpr = out_ptr.dtype.element_ty
    unit = (tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS))[:, None]
    place, grad_place, there, counts = _tile(
        unit, tl.zeros((), tl.int64), unit < n_units, mask_ptr, unit_rows, sample_rows,
        sample_stride, row_stride, col_stride, N_COLS, ALIGN, ONE_ROW, STRIDED, BLOCK,
    )  # fmt: skip
    g = tl.load(grad_ptr + grad_place, mask=counts, other=0).to(COMPUTE)
    delta = tl.load(delta_ptr + place, mask=counts, other=0)
    top = tl.max(_magnitude(g), 1)
    d = _direction(g, _scale(top, ASCENT)[:, None], ASCENT)
    dd = tl.zeros((UNITS,), tl.float64)
    d_delta, delta_delta = dd, dd
    if L2:
        dd, d_delta, delta_delta = _sums(d, delta)
    epsilon = as_number(epsilon_bits)
    moves, keep, step = _plan(top, dd, d_delta, delta_delta, as_number(step_bits), epsilon, L2, ASCENT)
    out = _moved(delta, d, moves[:, None], keep[:, None], step[:, None], epsilon.to(COMPUTE), L2)
    tl.store(out_ptr + place, out, mask=there)
    if skipped_ptr is not None:
        _count(skipped_ptr, top)


@triton.jit(do_not_specialize=["n_splits"])
def _gather_kernel(
    delta_ptr,
    grad_ptr,
    mask_ptr,
    top_ptr,  # (n_units, n_splits), the bits of the largest |g|
    sums_ptr,  # (3, n_units, n_splits), for L2
    n_splits,
    unit_rows,
    sample_rows,
    sample_stride,
    row_stride,
    col_stride,
    N_COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_ROW: tl.constexpr,
    STRIDED: tl.constexpr,
    L2: tl.constexpr,
    ASCENT: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a split of N_TILES tiles tells of its unit: one program per unit and split."""
    COMPUTE: tl.constexpr = delta_ptr.dtype.element_ty
    unit = (tl.program_id(0) // n_splits).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    first = (tl.program_id(0) % n_splits).to(tl.int64) * N_TILES
    dd = tl.zeros((1,), tl.float64)
    d_delta, delta_delta = dd, dd
    top = _magnitude(tl.zeros((1,), COMPUTE))
    for i in range(N_TILES):
        place, grad_place, _, counts = _tile(
            unit, (first + i) * BLOCK, unit >= 0, mask_ptr, unit_rows, sample_rows,
            sample_stride, row_stride, col_stride, N_COLS, ALIGN, ONE_ROW, STRIDED, BLOCK,
        )  # fmt: skip
        g = tl.load(grad_ptr + grad_place, mask=counts, other=0).to(COMPUTE)
        larger = tl.maximum(top, tl.max(_magnitude(g), 1))
        if L2:
            scale = _scale(larger, ASCENT)
            delta = tl.load(delta_ptr + place, mask=counts, other=0)
            more, d_more, delta_more = _sums(_direction(g, scale[:, None], ASCENT), delta)
            ratio = scale.to(tl.float64) / _scale(top, ASCENT)
            dd = dd * ratio * ratio + more
            d_delta = d_delta * ratio + d_more
            delta_delta += delta_more
        top = larger
    here = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tl.store(top_ptr + here, top)
    if L2:
        count = tl.num_programs(0).to(tl.int64)
        tl.store(sums_ptr + here, dd)
        tl.store(sums_ptr + here + count, d_delta)
        tl.store(sums_ptr + here + 2 * count, delta_delta)


@triton.jit(do_not_specialize=["step_bits", "epsilon_bits", "n_splits"])
def _apply_kernel(
    delta_ptr,
    grad_ptr,
    out_ptr,
    mask_ptr,
    skipped_ptr,
    top_ptr,
    sums_ptr,
    step_bits,
    epsilon_bits,
    n_splits,
    unit_rows,
    sample_rows,
    sample_stride,
    row_stride,
    col_stride,
    N_COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_ROW: tl.constexpr,
    STRIDED: tl.constexpr,
    L2: tl.constexpr,
    ASCENT: tl.constexpr,
    SPLITS: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the splits of a unit and moves one of them: one program per unit and split."""
    COMPUTE: tl.constexpr = out_ptr.dtype.element_ty
    unit = (tl.program_id(0) // n_splits).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    split = (tl.program_id(0) % n_splits).to(tl.int64)
    others = tl.arange(0, SPLITS)[None, :]
    here = unit * n_splits + others
    tops = tl.load(top_ptr + here, mask=others < n_splits, other=0)
    top = tl.max(tops, 1)
    scale = _scale(top, ASCENT)
    dd = tl.zeros((1,), tl.float64)
    d_delta, delta_delta = dd, dd
    if L2:
        count = tl.num_programs(0).to(tl.int64)
        ratio = scale[:, None].to(tl.float64) / _scale(tops, ASCENT)
        dd = tl.sum(tl.load(sums_ptr + here, mask=others < n_splits, other=0) * ratio * ratio, 1)
        d_delta = tl.sum(tl.load(sums_ptr + here + count, mask=others < n_splits, other=0) * ratio, 1)
        delta_delta = tl.sum(tl.load(sums_ptr + here + 2 * count, mask=others < n_splits, other=0), 1)
    epsilon = as_number(epsilon_bits)
    moves, keep, step = _plan(top, dd, d_delta, delta_delta, as_number(step_bits), epsilon, L2, ASCENT)
    for i in range(N_TILES):
        place, grad_place, there, counts = _tile(
            unit, (split * N_TILES + i) * BLOCK, unit >= 0, mask_ptr, unit_rows, sample_rows,
            sample_stride, row_stride, col_stride, N_COLS, ALIGN, ONE_ROW, STRIDED, BLOCK,
        )  # fmt: skip
        g = tl.load(grad_ptr + grad_place, mask=counts, other=0).to(COMPUTE)
        delta = tl.load(delta_ptr + place, mask=counts, other=0)
        d = _direction(g, scale[:, None], ASCENT)
        out = _moved(delta, d, moves[:, None], keep[:, None], step[:, None], epsilon.to(COMPUTE), L2)
        tl.store(out_ptr + place, out, mask=there)
    if skipped_ptr is not None and split == 0:
        _count(skipped_ptr, top)


def _step(
    delta: Tensor,
    grad: Tensor,
    out: Tensor,
    mask: Tensor | None,
    skipped: Tensor | None,
    step_size: float,
    epsilon: float,
    norm: int,
    scope: int,
    ascent: int,
) -> None:
    """Fill out, which may be delta; both are contiguous."""
    if delta.numel() == 0:
        return
    n_cols = delta.size(-1)
    sample_rows = delta.numel() // delta.size(0) // n_cols
    unit_rows = 1 if reference.SCOPES[scope] == "token" else sample_rows
    n_units, size = delta.size(0) * sample_rows // unit_rows, unit_rows * n_cols
    l2 = reference.NORMS[norm] == "l2"
    strided = not grad.is_contiguous()
    if strided and grad.dim() != 3:
        grad = grad.reshape(delta.size(0), sample_rows, n_cols)  # a view unless the middle dimensions are odd
    strides = grad.stride() if strided else (0, 0, 0)
    how = {"N_COLS": n_cols, "ALIGN": math.gcd(16, n_cols), "ONE_ROW": unit_rows == 1, "STRIDED": strided}
    how |= {"L2": l2, "ASCENT": ascent, "enable_fp_fusion": True}
    numbers = bits(step_size), bits(epsilon if l2 else reference.floor_to(epsilon, delta.dtype))
    tile = tiles.choose("perturbation_step, fp64" if delta.dtype == torch.float64 else "perturbation_step", size)
    with torch.cuda.device_of(delta):
        if size <= tile.columns:
            _step_kernel[(triton.cdiv(n_units, tile.rows),)](
                delta, grad, out, mask, skipped, *numbers, n_units, unit_rows, sample_rows, *strides,
                **how, UNITS=tile.rows, BLOCK=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
            return
        block = tile.columns
        # Up to 256 splits, so that adding them up costs little; powers of two, lest each length compile a kernel
        n_tiles = triton.next_power_of_2(triton.cdiv(size, 256 * block))
        n_splits = triton.cdiv(size, n_tiles * block)
        grid = (n_units * n_splits,)
        tops = delta.new_empty(grid, dtype=torch.int64 if delta.dtype == torch.float64 else torch.int32)
        sums = delta.new_empty((3, *grid), dtype=torch.float64) if l2 else None
        _gather_kernel[grid](
            delta, grad, mask, tops, sums, n_splits, unit_rows, sample_rows, *strides,
            **how, N_TILES=n_tiles, BLOCK=block, num_warps=tile.warps,
        )  # fmt: skip
        _apply_kernel[grid](
            delta, grad, out, mask, skipped, tops, sums, *numbers, n_splits, unit_rows, sample_rows, *strides,
            **how, SPLITS=triton.next_power_of_2(n_splits), N_TILES=n_tiles, BLOCK=block, num_warps=tile.warps,
        )  # fmt: skip


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
    """The op `smart_kernels::perturbation_step` on a GPU."""
    delta = delta.contiguous()
    out = torch.empty_like(delta)
    _step(delta, grad, out, mask, skipped, step_size, epsilon, norm, scope, ascent)
    return out


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
    """The op `smart_kernels::perturbation_step_` on a GPU."""
    dense = delta.contiguous()
    _step(dense, grad, dense, mask, skipped, step_size, epsilon, norm, scope, ascent)
    if dense is not delta:
        delta.copy_(dense)


@triton.jit
def _box_muller(a, b):
    """Two numbers of N(0, 1) in fp32 from two words of 32 bits; the polynomials are minimax, to 3e-9 and 6e-11."""
    radius = tl.sqrt_rn(-2.0 * tl.log((a >> 1).to(tl.float32) * 2.0**-31 + 2.0**-32))
    # b 2^-32 of a turn: the nearest quarter, and what remains, exactly
    quarter = (b + 0x20000000) >> 30
    r = (b - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-30
    z = r * r
    sin = ((-4.6016578911808582e-3 * z + 7.9680032770421878e-2) * z - 6.4596346023342801e-1) * z + 1.5707963217083447
    sin = sin * r
    cos = ((9.0376654324233703e-4 * z - 2.0860165111470217e-2) * z + 2.5366922596549086e-1) * z - 1.2337005425976675
    cos = cos * z + 1.0
    odd = (quarter & 1) != 0
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)
    y = tl.where((quarter & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def _noise(out_ptr, z, place, mask_ptr, numel, std, N_COLS: tl.constexpr):
    live = place < numel
    z = z.to(tl.float64) * std if out_ptr.dtype.element_ty == tl.float64 else z * std.to(tl.float32)
    if mask_ptr is not None:
        z = tl.where(tl.load(mask_ptr + place // N_COLS, mask=live, other=0) != 0, z, 0)
    tl.store(out_ptr + place, z, mask=live)


@triton.jit(do_not_specialize=["std_bits"])
def _init_kernel(out_ptr, seed_ptr, mask_ptr, std_bits, numel, N_COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Four numbers from each counter. Of 64 in a row, counter 16 i + j makes those at j + (0, 16, 32, 48)."""
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, low * 0, low * 0)
    place, std = counter // 16 * 64 + counter % 16, as_number(std_bits)
    x, y = _box_muller(a, b)
    _noise(out_ptr, x, place, mask_ptr, numel, std, N_COLS)
    _noise(out_ptr, y, place + 16, mask_ptr, numel, std, N_COLS)
    x, y = _box_muller(c, d)
    _noise(out_ptr, x, place + 32, mask_ptr, numel, std, N_COLS)
    _noise(out_ptr, y, place + 48, mask_ptr, numel, std, N_COLS)


def init_perturbation(embeds: Tensor, seed: Tensor, mask: Tensor | None, std: float) -> Tensor:
    """The op `smart_kernels::init_perturbation` on a GPU."""
    out = torch.empty(embeds.shape, dtype=reference.compute_dtype(embeds), device=embeds.device)
    if out.numel():
        tile = tiles.choose("init_perturbation", out.numel())
        with torch.cuda.device_of(out):
            _init_kernel[(triton.cdiv(out.numel(), 4 * tile.columns),)](
                out,
                seed,
                mask,
                bits(std),
                out.numel(),
                N_COLS=out.size(-1),
                BLOCK=tile.columns,
                num_warps=tile.warps,
                enable_fp_fusion=True,
            )
    return out

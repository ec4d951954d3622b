"""The exponential moving average in Triton: one program for each chunk of the table, and the launcher of the op.

A GPU with no compiled CUDA kernel (ROCm above all) is served by this one, which has that kernel's arithmetic
(csrc/ema_formula.h) and its random numbers, and so its results to the bit. Chunks hold addresses: a program turns its
own into pointers, and takes the branch of their dtypes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from smart_kernels.triton_kernels import tiles
from smart_kernels.triton_kernels.scalars import as_number, bits

_CHUNK, _NOISE_GROUP = tl.constexpr(8192), tl.constexpr(64)  # as ops/_chunks.py makes the table; so the dtypes


@triton.jit
def _moved(e, p, decay, NARROW: tl.constexpr):
    """Each e + (1 - decay)(p - e) in the dtype of e and p, by the operations of csrc/ema_formula.h in their order."""
    weight = 1 - decay
    if e.dtype == tl.float64:
        high, low, weight_high, weight_low = decay, decay * 0, weight, (1 - weight) - decay
    else:
        high, weight_high = decay.to(tl.float32), weight.to(tl.float32)
        low, weight_low = (decay - high).to(tl.float32), (weight - weight_high).to(tl.float32)
    distance = p - e
    plain = tl.fma(distance, weight_high, e)
    kept, gained = e * high, p * weight_high
    total = kept + gained
    share = total - kept
    total_low = (kept - (total - share)) + (gained - share)
    products_low = tl.fma(e, high, -kept) + tl.fma(p, weight_high, -gained)
    rest = tl.fma(p, weight_low, tl.fma(e, low, products_low)) + total_low
    exact = tl.where(rest == rest, total + rest, plain)  # e or p is infinite or NaN
    if NARROW:
        near = tl.abs(distance) * (weight_high * 0.001953125) < tl.abs(plain)
    else:
        near = tl.abs(distance) * (weight_high * 8) <= tl.abs(e)
    return tl.where(high == 0, p, tl.where(near, plain, exact))


@triton.jit
def _rounded_stochastically(x, random, E: tl.constexpr):
    """A float32 in bfloat16 or float16, up or down with the probabilities that make the mean x."""
    dropped: tl.constexpr = 16 if E.is_bf16() else 13
    smallest: tl.constexpr = 1 if E.is_bf16() else 113  # exponent of a normal number, as a float32's is stored
    largest: tl.constexpr = 0x7F7F0000 if E.is_bf16() else 0x477FE000
    magnitude = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.maximum(magnitude >> 23, 1)
    mantissa = tl.where(magnitude >> 23 > 0, (magnitude & 0x7FFFFF) | 0x800000, magnitude)
    # A number below the smallest normal one drops more bits, as its last place is fixed.
    missing = tl.maximum(exponent, smallest) - exponent
    shift = tl.minimum(missing + dropped, 31)
    excess = tl.minimum(missing + dropped - shift, 31)
    units = ((mantissa >> excess) + (random & ((shift * 0 + 1 << shift) - 1))) >> shift
    result = ((exponent + missing - smallest) << (23 - dropped)) + units
    sign = (x.to(tl.uint32, bitcast=True) >> 31) << 15
    result = (result | sign).to(tl.uint16).to(E, bitcast=True)
    return tl.where(magnitude <= largest, result, x.to(E))


@triton.jit
def _update(
    e_ptr, p_ptr, e_stride, p_stride, begin, end, start, decay, seed_ptr, DENSE: tl.constexpr, LANES: tl.constexpr
):
    """The elements from `begin` to `end` of a chunk of shadows; DENSE ones have strides of 1."""
    E: tl.constexpr = e_ptr.dtype.element_ty
    NARROW: tl.constexpr = E.primitive_bitwidth == 16
    COMPUTE: tl.constexpr = tl.float64 if E.is_fp64() else tl.float32
    STOCHASTIC: tl.constexpr = seed_ptr is not None and NARROW
    # Of 64 elements in a row, the four words of counter 16 i + j are those of j + (0, 16, 32, 48).
    WORDS: tl.constexpr = 4 if STOCHASTIC else 1
    BLOCK: tl.constexpr = LANES * WORDS
    lane = tl.arange(0, LANES)
    for first in range(0, _CHUNK, BLOCK):
        if (first < end) & (first + BLOCK > begin):
            place = first + (lane // 16 * _NOISE_GROUP + lane % 16 if STOCHASTIC else lane)
            random = (lane, lane, lane, lane)
            if STOCHASTIC:
                counter = (start + first) // WORDS + lane
                low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
                random = tl.philox(tl.load(seed_ptr), low, high, low * 0, low * 0)
            for word in tl.static_range(WORDS):
                i = place + 16 * word
                mask = (i >= begin) & (i < end)
                e_place, p_place = e_ptr + (i if DENSE else i * e_stride), p_ptr + (i if DENSE else i * p_stride)
                e, p = tl.load(e_place, mask=mask), tl.load(p_place, mask=mask)
                moved = _moved(e.to(COMPUTE), p.to(COMPUTE), decay, NARROW)
                result = _rounded_stochastically(moved, random[word], E) if STOCHASTIC else moved.to(E)
                if e.dtype == p.dtype:
                    result = tl.where(decay == 0, p, result)  # to the bit, NaNs too
                tl.store(e_place, result, mask=mask)


@triton.jit
def _update_chunk(
    e_address, p_address, e_stride, p_stride, count, start, decay, seed_ptr,
    E: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A chunk of E that moves towards one of P."""
    e_ptr, p_ptr = e_address.to(tl.pointer_type(E)), p_address.to(tl.pointer_type(P))
    # What is dense and aligned, as far as 16 elements go together: from these hints the compiler sees how wide it may
    # access. The others go one by one.
    wide = tl.where(((e_address | p_address) % 16 == 0) & (e_stride == 1) & (p_stride == 1), count // 16 * 16, 0)
    if wide > 0:
        WIDER: tl.constexpr = max(E.primitive_bitwidth, P.primitive_bitwidth)
        e_wide, p_wide, end = tl.multiple_of(e_ptr, 16), tl.multiple_of(p_ptr, 16), tl.multiple_of(wide, 16)
        EACH: tl.constexpr = LANES * 32 // WIDER * (2 if is_hip() else 1)  # whose warps have twice the threads
        _update(e_wide, p_wide, 1, 1, 0, end, start, decay, seed_ptr, True, EACH)
    if wide < count:
        _update(e_ptr, p_ptr, e_stride, p_stride, wide, count, start, decay, seed_ptr, False, LANES // 2)


@triton.constexpr_function
def _dtype(i: int) -> tl.dtype:
    return (tl.float32, tl.bfloat16, tl.float16, tl.float64)[i]


@triton.jit(do_not_specialize=["n_chunks", "decay_bits"])
def _ema_kernel(
    addresses_ptr,  # the table's first two rows: of the shadows' and of the parameters' chunks
    table_ptr,  # int64 (7, n_chunks), as ops/_chunks.py makes it
    n_chunks,
    decay_bits,
    decay_ptr,  # float32 or float64, or None for decay_bits
    seed_ptr,  # int64, or None for rounding to nearest
    DTYPES: tl.constexpr,  # bit i is set if chunks have number i for their dtypes
    LANES: tl.constexpr,
):
    """A program for each chunk. It takes LANES elements of 4 bytes at a time, 16 bytes for each thread."""
    decay = as_number(decay_bits) if decay_ptr is None else tl.load(decay_ptr).to(tl.float64)
    if decay != 1:  # then e stays, whatever p holds
        chunk, n = tl.program_id(0).to(tl.int64), tl.cast(n_chunks, tl.int64)
        e, p = tl.load(addresses_ptr + chunk), tl.load(addresses_ptr + n + chunk)
        start, count = tl.load(table_ptr + 2 * n + chunk), tl.load(table_ptr + 3 * n + chunk).to(tl.int32)
        dtypes = tl.load(table_ptr + 4 * n + chunk)
        e_stride, p_stride = tl.load(table_ptr + 5 * n + chunk), tl.load(table_ptr + 6 * n + chunk)
        for i in tl.static_range(16):
            if DTYPES >> i & 1:  # noqa: SIM102 - known when compiled, the other is not
                if dtypes == i:
                    _update_chunk(
                        e, p, e_stride, p_stride, count, start, decay, seed_ptr, _dtype(i % 4), _dtype(i // 4), LANES
                    )


def ema_update_chunks(
    table: Tensor, dtypes: int, decay: float, decay_tensor: Tensor | None, seed: Tensor | None
) -> None:
    """The op `smart_kernels::ema_update_chunks` on a GPU that no CUDA kernel was compiled for."""
    for name, x, expected in (
        ("decay_tensor", decay_tensor, (torch.float32, torch.float64)),
        ("seed", seed, (torch.int64,)),
    ):
        if x is not None and (x.numel() != 1 or x.dtype not in expected or x.device != table.device):
            raise ValueError(
                f"ema_update_: got {name} of shape {tuple(x.shape)} and {x.dtype} on {x.device}, expected one number "
                f"in {' or '.join(map(str, expected))} on {table.device}, as the shadows"
            )
    n_chunks = table.size(1)
    if n_chunks == 0:
        return
    tile = tiles.choose("ema_update_", _CHUNK.value)
    with torch.cuda.device_of(table):
        _ema_kernel[(n_chunks,)](
            table,
            table,
            n_chunks,
            bits(decay),
            decay_tensor,
            seed,
            DTYPES=dtypes,
            LANES=tile.columns,
            num_warps=tile.warps,
            enable_fp_fusion=False,  # the formula says where a product and a sum are rounded once
        )

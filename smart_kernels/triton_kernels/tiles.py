"""The tiles and warps of the Triton kernels: every launch is tuned here, and nowhere else.

The figures come from compiled code (`benchmarks/gpu_report.py`): no spills, and a multiprocessor as full as the
registers allow. A launcher looks up its tile at each call, so a search on a real card can replace an entry of `TILES`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """What one program does at a time, with how many warps; no more than 16, as a GPU's may have 64 lanes."""

    rows: int
    columns: int
    warps: int


_POWERS = [2**k for k in range(4, 11)]

# A thread holds three numbers for each of its elements from the first reduction to the last store. Rows of up to 1024
# classes take one warp, which has no barriers; longer ones leave each thread 16 elements. Beyond 8192 a row goes by in
# blocks; from 24577 on these are so large that one program fills a multiprocessor: then the rows at work stay in L2,
# where they are read for a second time. Rows that are not even aligned to two elements need registers for addresses.
_SYMMETRIC_KL = {
    **{columns: Tile(min(32, max(1, 512 // columns)), columns, 1) for columns in (4, 8, *_POWERS)},
    2048: Tile(1, 2048, 4),
    4096: Tile(1, 4096, 8),
    8192: Tile(1, 8192, 16),
    24576: Tile(1, 4096, 8),
    math.inf: Tile(1, 8192, 16),
}
_SYMMETRIC_KL_FP64 = {
    **{columns: Tile(min(32, max(1, 256 // columns)), columns, 1) for columns in (4, 8, *_POWERS[:-1])},
    1024: Tile(1, 1024, 2),
    2048: Tile(1, 2048, 4),
    4096: Tile(1, 4096, 8),
    math.inf: Tile(1, 2048, 8),
}
# The other kinds hold up to twice as much of each element, and js takes two logarithms of it: with 16 elements a thread
# it spilled 250 bytes, and whatever the kind, rows held in registers 200 and more. So 8 elements, 4 in fp64, none held.
_OTHER_KINDS = {
    **{columns: Tile(min(32, max(1, 256 // columns)), columns, max(1, columns // 256)) for columns in (4, 8, *_POWERS)},
    2048: Tile(1, 2048, 8),
    math.inf: Tile(1, 4096, 16),
}
# Of given differences, which are written thrice: with 8 elements a thread, compilers spilled 8 bytes of some to have
# them fit into 64 registers; where the longest are read again, fewer warps would have more rows at work than fit in L2.
_DIFFERENCES = {
    **{columns: tile for columns, tile in _OTHER_KINDS.items() if columns < 2048},
    8192: Tile(1, 1024, 8),
    16384: Tile(1, 2048, 16),
    math.inf: Tile(1, 4096, 16),
}
_OTHER_KINDS_FP64 = {
    **{columns: Tile(min(32, max(1, 128 // columns)), columns, max(1, columns // 128)) for columns in (4, 8, *_POWERS)},
    math.inf: Tile(1, 2048, 16),
}
# 8 elements of each tensor for a thread, more in units that are longer than 1024; of short ones as many as make 512.
# The longest are cut into splits of the blocks that stand last.
_PERTURBATION_STEP = {
    **{columns: Tile(512 // columns, columns, 2) for columns in _POWERS[:-1]},
    1024: Tile(1, 1024, 4),
    2048: Tile(1, 2048, 4),
    4096: Tile(1, 4096, 8),
    8192: Tile(1, 8192, 16),
    16384: Tile(1, 16384, 16),
    math.inf: Tile(1, 2048, 4),
}
_PERTURBATION_STEP_FP64 = {length: tile for length, tile in _PERTURBATION_STEP.items() if length != 16384}

HELD = 16384
"""Up to so many classes a row's logits stay in registers for its gradients, beside 8 elements of each for a thread to
work on; not in fp64."""


@triton.constexpr_function
def blocks_kept(blocks: int, hip: bool, blackwell: bool) -> int:
    """How many blocks of a row that is held stay in registers, on a target; the others are read twice.

    On AMD, where a program of as many warps has twice the threads and half the registers for each, three spilled 29 to
    59 bytes; on Blackwell all four spilled 8.
    """
    return min(blocks, 2) if hip or (blackwell and blocks > 3) else blocks


PROGRAMS = 256
"""Where long rows are fewer than half of that, each is cut into splits, as many as make so many programs."""

TILES: dict[str, dict[float, Tile]] = {
    "symmetric_kl": _SYMMETRIC_KL,
    "symmetric_kl, held": {HELD: Tile(1, 4096, 16)},
    "symmetric_kl, odd": _SYMMETRIC_KL | {math.inf: Tile(1, 4096, 8)},
    "symmetric_kl, fp64": _SYMMETRIC_KL_FP64,
    "other kinds": _OTHER_KINDS,
    "other kinds, fp64": _OTHER_KINDS_FP64,
    "differences": _DIFFERENCES,
    "differences, odd": _DIFFERENCES | {math.inf: Tile(1, 2048, 8)},
    "differences, fp64": _OTHER_KINDS_FP64,
    "perturbation_step": _PERTURBATION_STEP,
    "perturbation_step, fp64": _PERTURBATION_STEP_FP64,
    "init_perturbation": {math.inf: Tile(1, 1024, 4)},
    "ema_update_": {math.inf: Tile(1, 1024, 8)},
}
"""By kernel and the length of a row or unit, ascending: the first entry that is long enough counts."""


def choose(kernel: str, length: int) -> Tile:
    """The tile for rows or units of so many elements."""
    return next(tile for longest, tile in TILES[kernel].items() if length <= longest)

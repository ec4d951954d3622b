"""What the GPU kernels' machine code predicts, kernel by kernel and card by card, with no card at hand.

    python benchmarks/gpu_report.py [--targets sm_90 gfx942] [--ops symmetric_kl ema_update_] [--out results]

Every figure is read from compiled code or follows from it and from published figures of a card. No time in it was
measured: times are PREDICTIONS, the least that a card could take at its peak rates, launch not included.

How each is found:

- registers, spills, shared memory, width of the accesses: from the disassembly.
- occupancy: warps that fit on a multiprocessor at once, of those it can hold, by its published limits.
- bytes asked: what the loads and stores of the launch ask for. How often a tensor is read follows from the bytes of
  the load instructions that a program executes, over those of its tiles, rounded down, as masks are read beside. ×
  minimum: over every input read once and every output written once; masks and numbers of a whole row are left out.
- bytes from memory: asked, but for what is read again while it lies in L2 for certain: by the same program, where the
  rows of all programs that run at once fit in L2; by the next kernel, where the tensors do.
- instructions an element: counted in the disassembly. A loop's body counts as often as the launch makes it go round,
  all else once, as if every branch were taken. "special": exponentials, logarithms, reciprocals, conversions to and
  from fp64; "FMA": fp32 multiply and add in any form, a packed one twice; "all": whatever is issued.
- memory: bytes from memory at peak bandwidth. arithmetic: the longer of the times that the pipes for special functions
  and for FMA (or for fp64) are busy, at published rates, on the multiprocessor that gets most programs. issue: the same
  for all others: integers, exchange between threads, and the issue of any instruction at all, one a clock and quarter
  of a multiprocessor. The longest is the bound; where all are shorter than a launch, about 2 µs, the launch is.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import gpu_code
from gpu_code import TARGETS, Code
from harness import RESULTS, Report, format_table, progress_bar, seconds_text, three_digits
from smart_kernels import reference
from smart_kernels.ops import _chunks
from smart_kernels.triton_kernels import divergence, ema, perturbation, tiles

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAUNCH_S = 2e-6


# ------------------------------------------------------------------------------------------------- the cards


@dataclass(frozen=True)
class Card:
    """A card's published figures.

    NVIDIA: data sheets of A100 SXM 80 GB, H100 SXM and HGX B200, and the tables "Technical Specifications per Compute
    Capability" and "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide. AMD: data sheet of
    MI300X and the CDNA 3 instruction set. Clocks are boost clocks.
    """

    name: str
    bandwidth: float
    """Bytes a second from memory."""
    cache: int
    """Bytes of the last cache before memory."""
    multiprocessors: int
    clock: float
    registers: int
    """32-bit registers of a multiprocessor's quarter, which a warp's must fit in."""
    granularity: int
    """Registers of a thread are handed out in steps of so many."""
    shared: int
    """Bytes of shared memory of a multiprocessor; a program takes `shared_reserved` more than it asks for."""
    shared_reserved: int
    warp: int
    warps: int
    """That a multiprocessor holds at most; of programs, `programs`."""
    programs: int
    rates: dict[str, int]
    """Lanes per clock of a multiprocessor's pipes."""


def _nvidia(name: str, bandwidth: float, cache: int, count: int, clock: float, shared: int, **rates: int) -> Card:
    rates = {"special": 16, "integer": 64, "exchange": 32, "issue": 128, **rates}
    return Card(name, bandwidth, cache, count, clock, 16384, 8, shared << 10, 1024, 32, 64, 32, rates)


CARDS = {
    "sm_80": _nvidia("A100", 2.039e12, 40 << 20, 108, 1.41e9, 164, fma=64, fp64=32),
    "sm_90": _nvidia("H100", 3.35e12, 50 << 20, 132, 1.98e9, 228, fma=128, fp64=64),
    "sm_100": _nvidia("B200", 8.0e12, 126 << 20, 148, 1.965e9, 228, fma=128, fp64=64),
    "gfx942": Card(
        "MI300X", 5.3e12, 256 << 20, 304, 2.1e9, 512 * 64, 8, 64 << 10, 0, 64, 32, 32,
        {"special": 16, "fma": 128, "vector": 64, "exchange": 32},
    ),
}  # fmt: skip

_NVIDIA_PIPES = {
    "special": r"MUFU|FRND|[FI]2[FI](?!P)",
    "fma": r"FFMA|FMUL|FADD",
    "fp64": r"D(ADD|MUL|FMA|SETP)",
    "exchange": r"SHFL|REDUX|CREDUX|LDS|STS",
    "other": r"LDG|STG|LDC|LDL|STL|ULD|BAR|BRA|EXIT|NOP|BSSY|BSYNC|S2|CS2|U[A-Z]|ATOM|RED\b|MEMBAR|CALL|RET|WARPSYNC",
}
_AMD_PIPES = {
    "special": r"v_(exp|log|rcp|rsq|sqrt)_",
    "exchange": r"ds_",
    "vector": r"v_",
}
_AMD_FMA = r"v_(pk_)?(fma|fmac|mul|add|sub|mad)_(legacy_)?f32"


def pipes(executed: Counter[str], target: str) -> dict[str, int]:
    """Instructions by the pipe of a multiprocessor that executes them; `issue` is all, `fma` what multiplies or adds.

    What takes two turns of its pipe counts twice.
    """
    found: Counter[str] = Counter()
    amd = target.startswith("gfx")
    for opcode, count in executed.items():
        table = _AMD_PIPES if amd else _NVIDIA_PIPES
        pipe = next(
            (name for name, pattern in table.items() if re.match(pattern, opcode)), "other" if amd else "integer"
        )
        found[pipe] += count * (2 if opcode.startswith(("FFMA2", "FMUL2", "FADD2")) else 1)
        found["issue"] += count
        if amd and re.match(_AMD_FMA, opcode):
            found["fma"] += count * (2 if opcode.startswith("v_pk_") else 1)
    return dict(found)


def resident(card: Card, code: Code) -> int:
    """Programs of a kernel that a multiprocessor runs at once."""
    warps = code.threads // card.warp
    registers = -(-max(code.registers, 1) // card.granularity) * card.granularity
    by_registers = 4 * (card.registers // (registers * card.warp)) // warps
    by_shared = card.shared // (code.shared + card.shared_reserved) if code.shared + card.shared_reserved else 10**9
    return min(by_registers, by_shared, card.warps // warps, card.programs)


# -------------------------------------------------------------------------------------------- what is launched


@dataclass(frozen=True)
class Work:
    """A call of an op: what it launches, and what any version must move."""

    op: str
    shape: str
    dtype: str
    elements: int
    read: int
    """Bytes of an element that are read; written, `written`."""
    written: int
    compile: Callable[[str], list[Code]]
    """Its kernels for a target."""
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """What a kernel reads and writes that shares the work with another, by its name."""


def kl_work(rows: int, classes: int, dtype_name: str, way: str) -> Work:
    dtype = DTYPES[dtype_name]
    a, b = torch.empty(2, rows, classes, dtype=dtype)
    ways: dict[str, tuple[int, Callable[..., Any], tuple[Any, ...]]] = {
        "both gradients": (2, divergence.divergence_forward_backward, (False, True, True)),
        "one gradient": (1, divergence.divergence_grad, (False,)),
        "loss alone": (0, divergence.divergence, (False,)),
    }
    outputs, launcher, options = ways[way]
    batchmean = reference.REDUCTIONS.index("batchmean")
    return Work(
        f"symmetric_kl, {way}", f"{rows}×{classes}", dtype_name, rows * classes, 2 * dtype.itemsize,
        outputs * dtype.itemsize,
        lambda target: gpu_code.ahead_of_time(target, launcher, a, b, None, batchmean, *options),
        {
            "_divergence_kernel, survey": (2 * dtype.itemsize, 0),
            "_divergence_kernel, finish": (2 * dtype.itemsize if outputs else 0, outputs * dtype.itemsize),
        },
    )  # fmt: skip


def rows_work(rows: int, classes: int, kind: str = "symmetric_kl") -> Work:
    """The rows of a chunk behind a head: b and a - b in, both gradients and their sum in their place."""
    logits = torch.empty(3, rows, classes)
    options = True, True, False, list(reference.KINDS).index(kind), 0.5, 1.0
    return Work(
        f"linear_divergence, rows of {kind}", f"{rows}×{classes}", "fp32", rows * classes, 2 * 4, 3 * 4,
        lambda target: gpu_code.ahead_of_time(
            target, divergence.divergence_rows_, logits, None, torch.empty(1), *options
        ),
    )  # fmt: skip


def step_work(shape: tuple[int, int, int], dtype_name: str, norm: str, scope: str) -> Work:
    dtype = DTYPES[dtype_name]
    delta, grad, mask = torch.empty(shape), torch.empty(shape, dtype=dtype), torch.ones(shape[:2], dtype=torch.int64)
    codes = reference.NORMS.index(norm), reference.SCOPES.index(scope), reference.ASCENTS.index("normalized")
    arguments = (delta, grad, mask, torch.zeros(1, dtype=torch.int64), 1e-3, 1e-5, *codes)
    return Work(
        f"perturbation_step, {norm}, {scope}", "×".join(map(str, shape)), dtype_name, delta.numel(),
        4 + dtype.itemsize, 4,
        lambda target: gpu_code.ahead_of_time(target, perturbation.perturbation_step, *arguments),
        {"_gather_kernel": (dtype.itemsize + (4 if norm == "l2" else 0), 0)},
    )  # fmt: skip


def start_work(shape: tuple[int, int, int]) -> Work:
    arguments = torch.empty(shape), torch.tensor(1), torch.ones(shape[:2], dtype=torch.int64), 1e-5
    return Work(
        "init_perturbation", "×".join(map(str, shape)), "fp32", arguments[0].numel(), 0, 4,
        lambda target: gpu_code.ahead_of_time(target, perturbation.init_perturbation, *arguments),
    )  # fmt: skip


EMA_TYPES = {"fp32": "float", "bf16": "bf16"}
EMA_THREADS = 256
BERT_BASE = 109_482_240


def ema_work(shadow: str, parameter: str, stochastic: bool) -> Work:
    """Of the one kernel that has a branch for every pair of dtypes: its registers, and the branch's instructions."""
    flag = str(stochastic).lower()
    template = f"smart_kernels::update_chunk<{flag}, {EMA_TYPES[shadow]}, {EMA_TYPES[parameter]}>"
    head = '#include "cuda/ema_kernel.cuh"\nusing namespace smart_kernels;\n'
    whole = f"template __global__ void smart_kernels::ema_update_kernel<{flag}>("
    whole += "EmaChunks, double, const void*, bool, const uint64_t*);\n"
    branch = (
        f"__global__ void __launch_bounds__({EMA_THREADS}) branch(EmaChunks chunks, double decay, uint64_t seed) {{"
    )
    branch += f" {template}(chunks, decay, seed); }}\n"

    def compile(target: str) -> list[Code]:
        code, part = (gpu_code.ahead_of_time_cuda(target, head + s, EMA_THREADS, CSRC) for s in (whole, branch))
        return [_for_aligned_tensors(dataclasses.replace(code, kernel=f"ema_update_kernel<{flag}>"), part)]

    return _ema_work(f"ema_update_, CUDA{', stochastic' * stochastic}", shadow, parameter, compile)


def triton_ema_work(shadow: str, parameter: str) -> Work:
    """Of the Triton kernel, which serves where no CUDA kernel was compiled."""
    dtypes = 1 << _chunks.DTYPES.index(DTYPES[shadow]) + 4 * _chunks.DTYPES.index(DTYPES[parameter])
    arguments = torch.zeros(7, 1, dtype=torch.int64), dtypes, 0.999, None, None

    def compile(target: str) -> list[Code]:
        (code,) = gpu_code.ahead_of_time(target, ema.ema_update_chunks, *arguments)
        return [_for_aligned_tensors(code, code)]

    return _ema_work("ema_update_, Triton", shadow, parameter, compile)


def _for_aligned_tensors(code: Code, part: Code) -> Code:
    """A kernel with the instructions of this part of it, of whose loops that alone counts which reads widest."""
    wide = max(part.loops, key=lambda loop: (bytes_of(part, loop, "loads"), loop.total()))
    once = part.opcodes.copy()
    for loop in part.loops:
        if loop is not wide:
            once -= loop
    return dataclasses.replace(code, opcodes=once, loops=(wide,), programs=-(-BERT_BASE // _chunks.CHUNK))


def _ema_work(op: str, shadow: str, parameter: str, compile: Callable[[str], list[Code]]) -> Work:
    sizes = DTYPES[shadow].itemsize, DTYPES[parameter].itemsize
    return Work(op, "BERT-base", f"{shadow}←{parameter}", BERT_BASE, sum(sizes), sizes[0], compile)


KL_SHAPES = (
    (32, 3), (4096, 3), (512, 128), (4096, 1000), (1024, 8192), (1024, 16384), (256, 30522), (256, 50257), (64, 131072),
)  # fmt: skip
ROWS_SHAPES = ((1024, 1000), (1024, 4096), (1024, 16384), (1024, 30522), (1024, 128256))
EMBEDDINGS = (32, 128, 768)


def works(ops: Sequence[str]) -> Iterator[Work]:
    """Every op over its shapes."""
    if "symmetric_kl" in ops:
        for way in ("both gradients", "one gradient", "loss alone"):
            for dtype in DTYPES:
                yield from (kl_work(*shape, dtype, way) for shape in KL_SHAPES)
    if "linear_divergence" in ops:
        yield from (rows_work(*shape) for shape in ROWS_SHAPES)
    if "perturbation_step" in ops:
        for norm in reference.NORMS:
            for scope in reference.SCOPES:
                yield from (step_work(EMBEDDINGS, dtype, norm, scope) for dtype in DTYPES)
    if "init_perturbation" in ops:
        yield start_work(EMBEDDINGS)
    if "ema_update_" in ops:
        pairs = (("fp32", "fp32", False), ("fp32", "bf16", False), ("bf16", "bf16", True))
        yield from (ema_work(*pair) for pair in pairs)
        yield from (triton_ema_work(shadow, parameter) for shadow, parameter, stochastic in pairs if not stochastic)


OPS = ("symmetric_kl", "linear_divergence", "perturbation_step", "init_perturbation", "ema_update_")


# ---------------------------------------------------------------------------------------------- the prediction


@dataclass(frozen=True)
class Row:
    """One kernel of a call on one card. Bytes and instructions are those of an element; seconds are predictions."""

    op: str
    shape: str
    dtype: str
    kernel: str
    target: str
    card: str
    registers: int
    spills: int
    shared: int
    threads: int
    programs: int
    resident: int
    occupancy: float
    load_bytes: list[int]
    """Widths of the accesses, the most frequent first."""
    store_bytes: list[int]
    minimum: int
    """Of the whole call."""
    asked: float
    from_memory: float
    special: float
    fma: float
    instructions: float
    memory_s: float
    arithmetic_s: float
    issue_s: float

    @property
    def bound(self) -> str:
        """What takes longest: "memory", "arithmetic", "issue" or "launch"."""
        times = {"memory": self.memory_s, "arithmetic": self.arithmetic_s, "issue": self.issue_s, "launch": LAUNCH_S}
        return max(times, key=times.__getitem__)


def geometry(code: Code, read: int) -> tuple[int, int, int]:
    """Elements of a program's tile, each with so many bytes to read, how many tiles it does, and of these in loops."""
    known = code.constants
    if "BLOCK_N" in known:
        rounds = known["SPAN"] // known["BLOCK_N"] if code.loops or known["HELD"] else 1
        hip, blackwell = code.target.startswith("gfx"), code.target.startswith("sm_1")
        return known["BLOCK_M"] * known["BLOCK_N"], rounds, rounds - tiles.blocks_kept(known["HELD"], hip, blackwell)
    if code.kernel == "_init_kernel":
        return 4 * known["BLOCK"], 1, 1
    if "BLOCK" in known:
        return known.get("UNITS", 1) * known["BLOCK"], known.get("N_TILES", 1), known.get("N_TILES", 1)
    (loop,) = code.loops
    tile = bytes_of(code, loop, "loads") * code.threads // read
    return tile, -(-_chunks.CHUNK // tile), -(-_chunks.CHUNK // tile)


def stage(code: Code) -> str:
    """The name of a kernel, and which of the launches it is where a row is split."""
    if code.constants.get("SPLITS", 1) == 1 or "STAGE" not in code.constants:
        return code.kernel
    return f"{code.kernel}, {code.constants['STAGE']}"


def predict(work: Work, target: str) -> list[Row]:
    """A row per kernel of a call on one target's card."""
    card = CARDS[target]
    rows: list[Row] = []
    before = 0  # bytes of an element that an earlier kernel has read
    for code in work.compile(target):
        kernel = stage(code)
        read, written = work.parts.get(kernel, (work.read, work.written))
        tile, rounds, looped = geometry(code, read)
        executed = code.executed(max(1, looped), tile * read)
        tiles_read, tiles_written = (
            (bytes_of(code, executed, accesses) - known) * code.threads // (tile * each) if each else 0
            for accesses, each, known in (("loads", read, splits_read(code)), ("stores", written, 0))
        )
        reads = tiles_read // rounds if looped == rounds else tiles_read / rounds  # those in registers are read once
        writes = tiles_written // rounds
        asked = reads * read + writes * written
        at_once = resident(card, code)
        share = min(1, at_once * card.multiprocessors / code.programs)  # of the elements, that are worked at
        from_memory = asked
        if share * work.elements * read <= card.cache:
            from_memory -= max(0, reads - 1) * read
        if work.elements * read <= card.cache:
            from_memory -= min(before, read)
        before += read
        found = pipes(executed, target)
        each = code.threads * code.programs / work.elements
        times = {
            pipe: found.get(pipe, 0) * code.threads * -(-code.programs // card.multiprocessors) / rate / card.clock
            for pipe, rate in card.rates.items()
        }
        arithmetic = max(times.pop(pipe) for pipe in ("special", "fma", "fp64") if pipe in times)
        widths = [[width for width, _ in found.most_common()] for found in (code.loads, code.stores)]
        rows.append(
            Row(
                work.op, work.shape, work.dtype, kernel, target, card.name, code.registers, code.spills,
                code.shared, code.threads, code.programs, at_once, at_once * code.threads / card.warp / card.warps,
                *widths, work.read + work.written, asked, from_memory,
                found.get("special", 0) * each, found.get("fma", 0) * each, found["issue"] * each,
                work.elements * from_memory / card.bandwidth, arithmetic, max(times.values()),
            )
        )  # fmt: skip
    return rows


def splits_read(code: Code) -> int:
    """Bytes that a thread of `_apply_kernel` reads beside the tensors: what one of the splits tells of its unit."""
    return (4 + 3 * 8 * code.constants["L2"]) if code.kernel == "_apply_kernel" else 0


def bytes_of(code: Code, executed: Counter[str], accesses: str) -> int:
    """What a thread's executed loads or stores ask for."""
    widths: Counter[int] = getattr(dataclasses.replace(code, opcodes=executed), accesses)
    return sum(width * count for width, count in widths.items())


# ----------------------------------------------------------------------------------------------------- output


COLUMNS = [
    "call", "kernel", "registers", "spills", "shared", "threads", "occupancy", "load B", "store B", "min B", "asked ×",
    "memory ×", "special", "FMA", "all", "memory", "arithmetic", "issue", "bound",
]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows of one card."""
    lines: list[list[str] | None] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.op != row.op:
            lines.append(None)
        lines.append(
            [
                f"{row.op} {row.shape} {row.dtype}", row.kernel.strip("_"), str(row.registers), str(row.spills),
                str(row.shared), str(row.threads), f"{row.occupancy:.0%}", *(
                    ",".join(map(str, widths)) or "–" for widths in (row.load_bytes, row.store_bytes)
                ),
                str(row.minimum), f"{row.asked / row.minimum:.2f}", f"{row.from_memory / row.minimum:.2f}",
                *(three_digits(x) for x in (row.special, row.fma, row.instructions)),
                *(seconds_text(s) for s in (row.memory_s, row.arithmetic_s, row.issue_s)), row.bound,
            ]
        )  # fmt: skip
    return f"{rows[0].card} ({rows[0].target}): times are predicted, none is measured\n{format_table(COLUMNS, lines)}"


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (%(default)s)")
    args = parser.parse_args(argv)
    report = Report("gpu_report", vars(args))
    report.note("All times are predictions from compiled code and published peak rates; none was measured")
    todo = [(target, work) for target in args.targets for work in works(args.ops)]
    found: dict[str, list[Row]] = {target: [] for target in args.targets}
    with progress_bar(len(todo), "gpu_report") as progress:
        for target, work in todo:
            progress(f"{target}: {work.op} {work.shape} {work.dtype}")
            # AMD's compiler lays blocks out of order, so that of several loops none can be told from another.
            if work.op.startswith("ema_update_") and target.startswith("gfx"):
                continue
            try:
                found[target] += predict(work, target)
            except FileNotFoundError as error:
                report.note(f"The CUDA kernels are left out: {error}")
    for rows in found.values():
        if rows:
            report.texts.append(table(rows))
    report.figures["predictions"] = [asdict(row) | {"bound": row.bound} for rows in found.values() for row in rows]
    report.figures["cards"] = {target: asdict(CARDS[target]) for target in args.targets}
    print(report.table())
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *report.save(args.out))


if __name__ == "__main__":
    main()

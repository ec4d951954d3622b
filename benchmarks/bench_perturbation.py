"""The perturbation's step and its start: how fast, beside eager PyTorch and torch.compile.

    python benchmarks/bench_perturbation.py [--device cuda] [--shapes 32x128x768] [--dtypes fp32 bf16] [--full]

A step reads delta (fp32) and the gradient and writes the new delta: the limit is a plain copy of as many bytes.
Writes a table, JSON and a figure.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harness import RESULTS, Peer, Report, headline, measure, measure_steps, progress_bar, speed_figure
from smart_kernels import init_perturbation, perturbation_step

OURS = "smart_kernels"
SHAPES = ("32x128x768", "256x16x768", "1x4096x768")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEP, EPSILON, STD = 1e-3, 1e-5, 1e-5  # the paper's
BASELINES = ["eager", "torch.compile"]


def eager_step(delta: Tensor, grad: Tensor, mask: Tensor, *, norm: str, scope: str) -> Tensor:
    """The same step as one would write it, without a word on overflow or on gradients that are not finite."""
    dims = (1, 2) if scope == "sample" else (2,)
    order = float("inf") if norm == "linf" else 2
    kept = mask.unsqueeze(-1)
    grad = grad.float() * kept
    delta = delta + STEP * grad / torch.linalg.vector_norm(grad, order, dims, keepdim=True).clamp(min=1e-30)
    if norm == "linf":
        return delta.clamp(-EPSILON, EPSILON) * kept
    delta = delta * kept
    return delta * (EPSILON / torch.linalg.vector_norm(delta, 2, dims, keepdim=True).clamp(min=1e-30)).clamp(max=1)


def our_step(delta: Tensor, grad: Tensor, mask: Tensor, *, norm: str, scope: str) -> Tensor:
    return perturbation_step(delta, grad, STEP, EPSILON, norm, scope, mask)


def eager_start(embeds: Tensor, mask: Tensor) -> Tensor:
    return STD * torch.randn_like(embeds, dtype=torch.float32) * mask.unsqueeze(-1)


def our_start(embeds: Tensor, mask: Tensor) -> Tensor:
    return init_perturbation(embeds, STD, mask)


def measure_all(report: Report, args: argparse.Namespace) -> None:
    """A case per norm, scope, shape and dtype of the gradient, and one per shape for the start."""
    timing = {"baselines": BASELINES, "outputs": 1, "device": args.device}
    timing |= {"budget_s": 6.0, "min_rounds": 15} if args.full else {"budget_s": 1.0, "min_rounds": 5}
    ways = [*itertools.product(("linf", "l2"), ("sample", "token"), args.dtypes), None]
    with progress_bar(len(args.shapes) * len(ways) * measure_steps([*BASELINES, OURS]), report.name) as progress:
        for way, shape in itertools.product(ways, args.shapes):
            torch.compiler.reset()  # one shape, one graph: no recompilation with sizes left open
            mask = torch.ones(shape[:2], dtype=torch.int64, device=args.device)
            noise = partial(torch.randn, shape, device=args.device)
            if way is None:
                group, eager, ours, moved = "start", eager_start, our_start, None

                def inputs(noise=noise, mask=mask) -> tuple[Tensor, ...]:
                    return noise(), mask
            else:
                norm, scope, dtype_name = way
                group, dtype = f"{norm}, {scope}, {dtype_name}", DTYPES[dtype_name]
                eager, ours = (partial(step, norm=norm, scope=scope) for step in (eager_step, our_step))
                moved = mask.numel() * shape[2] * (8 + dtype.itemsize)

                def inputs(noise=noise, mask=mask, dtype=dtype) -> tuple[Tensor, ...]:
                    return EPSILON * noise(), noise(dtype=dtype), mask

            peers = [Peer("eager", eager), Peer("torch.compile", torch.compile(eager, dynamic=False)), Peer(OURS, ours)]
            label = "×".join(map(str, shape))
            report.add(measure(label, peers, inputs, group=group, bytes_moved=moved, progress=progress, **timing))


def shape(text: str) -> tuple[int, ...]:
    """BATCHxLENGTHxFEATURES."""
    sizes = tuple(int(size) if size.isdecimal() else 0 for size in text.replace("×", "x").split("x"))
    if len(sizes) != 3 or 0 in sizes:
        raise argparse.ArgumentTypeError(f"{text!r}: expected BATCHxLENGTHxFEATURES, for instance 32x128x768")
    return sizes


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[shape(s) for s in SHAPES], metavar="BxLxH")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], help="of the gradient")
    parser.add_argument("--full", action="store_true", help="more rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and the figure (%(default)s)")
    args = parser.parse_args(argv)
    report = Report("bench_perturbation", vars(args), args.device)
    measure_all(report, args)
    print(report.table())
    figure = speed_figure(report.cases, OURS, "Perturbation: times faster than eager", headline(report.machine))
    plots = {} if figure is None else {"speed": figure}
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *report.save(args.out, plots))


if __name__ == "__main__":
    main()

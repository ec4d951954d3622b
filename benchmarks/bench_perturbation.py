"""The perturbation's step and its start: how fast, beside eager PyTorch and torch.compile.

    python benchmarks/bench_perturbation.py [--device cuda] [--shapes 32x128x768] [--dtypes fp32 bf16] [--full]

A step reads delta (fp32) and the gradient and writes the new delta: the limit is a plain copy of as many bytes.
Writes a table, JSON and a figure.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harness import OURS, RESULTS, Peer, Report, measure, measure_steps, progress_bar
from smart_kernels import init_perturbation, perturbation_step

SHAPES = ("32x128x768", "256x16x768", "1x4096x768")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEP, EPSILON, STD = 1e-3, 1e-5, 1e-5  # the paper's
GUARD = 1e-30  # no division by zero
ORDERS = {"linf": float("inf"), "l2": 2}
BASELINES = ["eager", "torch.compile"]


def vector_norm(delta: Tensor, grad: Tensor, mask: Tensor, *, norm: str, scope: str) -> Tensor:
    """The same step as one would write it, without a word on overflow or on gradients that are not finite."""
    dims, order, kept = (1, 2) if scope == "sample" else (2,), ORDERS[norm], mask.unsqueeze(-1)
    grad = grad.float() * kept
    delta = delta + STEP * grad / torch.linalg.vector_norm(grad, order, dims, keepdim=True).clamp(min=GUARD)
    if norm == "linf":
        return delta.clamp(-EPSILON, EPSILON) * kept
    delta = delta * kept
    return delta * (EPSILON / torch.linalg.vector_norm(delta, 2, dims, keepdim=True).clamp(min=GUARD)).clamp(max=1)


def in_place(delta: Tensor, grad: Tensor, mask: Tensor, *, norm: str, scope: str) -> Tensor:
    """With one temporary, and all factors of a row or a sample in one."""
    dims, order, kept = (1, 2) if scope == "sample" else (2,), ORDERS[norm], mask.unsqueeze(-1)
    grad = grad.float() * kept
    step = STEP / torch.linalg.vector_norm(grad, order, dims, keepdim=True).clamp_(min=GUARD)
    if norm == "linf":
        return grad.mul_(step).add_(delta).clamp_(-EPSILON, EPSILON).mul_(kept)
    delta = grad.mul_(step).add_(delta).mul_(kept)
    size = torch.linalg.vector_norm(delta, 2, dims, keepdim=True)
    return delta.mul_((EPSILON / size.clamp_(min=GUARD)).clamp_(max=1))


def reduction(delta: Tensor, grad: Tensor, mask: Tensor, *, norm: str, scope: str) -> Tensor:
    """The norms as reductions: the largest of both ends, the root of a sum of squares."""
    dims, kept = (1, 2) if scope == "sample" else (2,), mask.unsqueeze(-1)

    def size(x: Tensor) -> Tensor:
        if norm == "linf":
            return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True)).clamp_(min=GUARD)
        return (x * x).sum(dims, keepdim=True).sqrt_().clamp_(min=GUARD)

    grad = grad.float() * kept
    delta = torch.addcmul(delta, grad, STEP / size(grad))
    if norm == "linf":
        return delta.clamp_(-EPSILON, EPSILON).mul_(kept)
    delta.mul_(kept)
    return delta.mul_((EPSILON / size(delta)).clamp_(max=1))


STEPS = {"vector_norm": vector_norm, "in place": in_place, "reduction": reduction}


def our_step(delta: Tensor, grad: Tensor, mask: Tensor, *, norm: str, scope: str) -> Tensor:
    return perturbation_step(delta, grad, STEP, EPSILON, norm, scope, mask)


def randn_like(embeds: Tensor, mask: Tensor) -> Tensor:
    return STD * torch.randn_like(embeds, dtype=torch.float32) * mask.unsqueeze(-1)


def normal(embeds: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(embeds, dtype=torch.float32).normal_(0, STD).mul_(mask.unsqueeze(-1))


STARTS = {"randn_like": randn_like, "normal_": normal}


def our_start(embeds: Tensor, mask: Tensor) -> Tensor:
    return init_perturbation(embeds, STD, mask)


def peers_of(spellings: Mapping[str, Callable[..., Tensor]], ours: Callable[..., Tensor], **options: str) -> list[Peer]:
    """Every spelling eager and compiled, with the options that all take, and ours."""
    ways = {name: partial(way, **options) for name, way in spellings.items()}
    found = [Peer(f"eager, {name}", way, "eager") for name, way in ways.items()]
    found += [
        Peer(f"torch.compile, {name}", torch.compile(way, dynamic=False), "torch.compile") for name, way in ways.items()
    ]
    if spellings is STARTS:  # eager's generator in place of inductor's own, which is slow on a CPU
        eager_draws = {"fallback_random": True}
        found += [
            Peer(f"torch.compile, {name}, eager draws", torch.compile(way, options=eager_draws), "torch.compile")
            for name, way in ways.items()
        ]
    return [*found, Peer(OURS, partial(ours, **options))]


def measure_all(report: Report, args: argparse.Namespace) -> None:
    """A case per norm, scope, shape and dtype of the gradient, and one per shape for the start."""
    timing = {"baselines": BASELINES, "outputs": 1, "device": args.device}
    timing |= {"budget_s": 6.0, "min_rounds": 15} if args.full else {"budget_s": 1.0, "min_rounds": 5}
    ways = [*itertools.product(("linf", "l2"), ("sample", "token"), args.dtypes), None]
    steps = measure_steps(peers_of(STARTS, our_start)) + (len(ways) - 1) * (2 * len(STEPS) + 2)
    with progress_bar(len(args.shapes) * steps, report.name) as progress:
        for way, shape in itertools.product(ways, args.shapes):
            torch.compiler.reset()  # one shape, one graph: no recompilation with sizes left open
            mask = torch.ones(shape[:2], dtype=torch.int64, device=args.device)
            noise = partial(torch.randn, shape, device=args.device)
            if way is None:
                group, peers, moved = "start", peers_of(STARTS, our_start), None

                def inputs(noise=noise, mask=mask) -> tuple[Tensor, ...]:
                    return noise(), mask
            else:
                norm, scope, dtype_name = way
                group, dtype = f"{norm}, {scope}, {dtype_name}", DTYPES[dtype_name]
                peers = peers_of(STEPS, our_step, norm=norm, scope=scope)
                moved = mask.numel() * shape[2] * (8 + dtype.itemsize)

                def inputs(noise=noise, mask=mask, dtype=dtype) -> tuple[Tensor, ...]:
                    return EPSILON * noise(), noise(dtype=dtype), mask

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
    report = Report("bench_perturbation", vars(args), args.device, "Perturbation: times faster than eager")
    measure_all(report, args)
    print(report.table())
    paths = report.save(args.out, {"speed": report.speed_figure()})
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *paths)


if __name__ == "__main__":
    main()

"""Every kind of divergence: how exact and how fast, beside the ways people compute it today.

    python benchmarks/bench_divergences.py [--device cuda] [--shapes 4096x3 256x30522] [--dtypes fp32 bf16] [--kinds js]

Accuracy: logits that differ by about delta; relative errors against float64 arithmetic on the very same logits, by the
eager definition (which the tests hold against extended precision). Speed: forward and backward with both gradients.
Writes a table, JSON and two figures.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bench_kl
from bench_kl import DTYPES, Loss, gradients, log_softmaxes, power_text, softmaxes
from harness import (
    OURS,
    RESULTS,
    Peer,
    Report,
    colours,
    finish,
    first_line,
    format_table,
    headline,
    measure,
    measure_steps,
    plotting,
    progress_bar,
)
from smart_kernels import divergence, reference

SHAPES = ("4096x3", "256x30522")
DELTAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BASELINES = ("eager", "torch.compile")
BETA = 0.5


def kl_div(a: Tensor, b: Tensor) -> Tensor:
    """KL(q||p) as torch spells it."""
    return F.kl_div(*log_softmaxes(a, b), reduction="batchmean", log_target=True)


def kl_product(a: Tensor, b: Tensor) -> Tensor:
    """KL(q||p) in one sum, by probabilities for q."""
    log_p, log_q = log_softmaxes(a, b)
    return (log_q.exp() * (log_q - log_p)).sum() / a.size(0)


def js_of_logarithms(a: Tensor, b: Tensor) -> Tensor:
    """The mixture by logarithms, as TRL and others have it."""
    log_p, log_q = log_softmaxes(a, b)
    log_m = torch.logaddexp(log_q + math.log(BETA), log_p + math.log1p(-BETA))
    divergence = partial(F.kl_div, reduction="batchmean", log_target=True)
    return BETA * divergence(log_m, log_q) + (1 - BETA) * divergence(log_m, log_p)


def js_of_probabilities(a: Tensor, b: Tensor) -> Tensor:
    """The mixture by probabilities: one logarithm, which is of 0 where both are."""
    log_p, log_q = log_softmaxes(a, b)
    p, q = log_p.exp(), log_q.exp()
    log_m = (BETA * q + (1 - BETA) * p).log()
    return (BETA * q * (log_q - log_m) + (1 - BETA) * p * (log_p - log_m)).sum() / a.size(0)


def hellinger_of_roots(a: Tensor, b: Tensor) -> Tensor:
    """Roots as exponentials of half the logarithms, whose gradient is finite."""
    log_p, log_q = log_softmaxes(a, b)
    return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum() / a.size(0)


def hellinger_of_affinity(a: Tensor, b: Tensor) -> Tensor:
    """1 - sum sqrt(p q)."""
    log_p, log_q = log_softmaxes(a, b)
    return (1 - (0.5 * (log_p + log_q)).exp().sum(-1)).sum() / a.size(0)


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """Half the distance of two softmaxes."""
    p, q = softmaxes(a, b)
    return 0.5 * (p - q).abs().sum() / a.size(0)


def exchanged(loss: Loss) -> Loss:
    """With a and b in each other's place."""
    return lambda a, b: loss(b, a)


SPELLINGS: dict[str, dict[str, Loss]] = {
    "symmetric_kl": bench_kl.SPELLINGS,
    "kl": {"kl_div": kl_div, "product": kl_product},
    "reverse_kl": {"kl_div": exchanged(kl_div), "product": exchanged(kl_product)},
    "js": {"logarithms": js_of_logarithms, "probabilities": js_of_probabilities},
    "hellinger": {"roots": hellinger_of_roots, "affinity": hellinger_of_affinity},
    "total_variation": {"softmaxes": total_variation},
}
"""Of each kind all that give the loss and both of its gradients."""


def trl(kind: str) -> Loss | None:
    """TRL's `generalized_jsd_loss` for the kinds that it has, a sum divided by the rows; it rounds as the logits do."""
    beta = {"kl": 0.0, "reverse_kl": 1.0, "js": BETA}.get(kind)
    if beta is None:
        return None
    module = importlib.import_module("trl.experimental.gkd.gkd_trainer")
    loss = module.GKDTrainer.generalized_jsd_loss
    return lambda a, b: loss(a[None], b[None], beta=beta, reduction="sum") / a.size(0)


def liger(kind: str) -> Loss | None:
    """Liger's kernels, which have no gradient for their target."""
    module = importlib.import_module("liger_kernel.transformers")
    if kind == "kl":
        kl = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)
        return lambda a, b: kl(*log_softmaxes(a, b.detach()))
    beta = {"reverse_kl": 1.0, "js": BETA}.get(kind)
    if beta is None:
        return None
    jsd = module.LigerJSD(beta=beta)
    return lambda a, b: jsd(*log_softmaxes(a, b.detach()))


def implementations(report: Report, device: str, kind: str) -> list[Peer]:
    """All that can run here, ours last; a note for what cannot. What is called is a loss."""
    found = [Peer(f"eager, {name}", loss, "eager") for name, loss in SPELLINGS[kind].items()]
    found += [
        Peer(f"torch.compile, {name}", torch.compile(loss, dynamic=False), "torch.compile")
        for name, loss in SPELLINGS[kind].items()
    ]
    guests: list[tuple[str, Callable[[str], Loss | None]]] = [("TRL", trl)]
    if torch.device(device).type == "cuda":
        guests.append(("Liger", liger))
    for name, guest in guests:
        try:
            loss = guest(kind)
        except Exception as error:  # an optional guest, whatever keeps it from coming
            report.note(f"{name} is left out: {first_line(error)}")
            continue
        if loss is not None:
            found.append(Peer(name, loss))
    return [*found, Peer(OURS, partial(divergence, kind=kind, beta=BETA))]


def errors(loss: Loss, a: Tensor, b: Tensor, truth: tuple[Tensor, ...]) -> tuple[float, float]:
    """Relative errors of the loss, and of its gradient with respect to a in the Euclidean norm."""
    value = loss(a := a.detach().requires_grad_(), b.detach().requires_grad_())
    (grad,) = torch.autograd.grad(value, a)
    return abs(value.item() / truth[0].item() - 1), ((grad.double() - truth[1]).norm() / truth[1].norm()).item()


def measure_accuracy(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """Fill `report.figures["accuracy"]`: for each kind and number of classes the errors of everyone over delta."""
    generator = torch.Generator().manual_seed(0)
    accuracy: dict[str, Any] = {}
    for kind in args.kinds:
        code = list(reference.KINDS).index(kind)
        peers = [p for p in implementations(report, args.device, kind) if p.kind != "torch.compile"]  # rounds as eager
        for classes in args.classes:
            progress(f"accuracy: {kind}, {classes} classes")
            found: dict[str, dict[str, list[float]]] = {peer.name: {"loss": [], "gradient": []} for peer in peers}
            for delta in DELTAS:
                b = 2 * torch.randn(64, classes, generator=generator)
                a = b + delta * torch.randn(64, classes, generator=generator)
                options = None, reference.REDUCTIONS.index("batchmean"), False, True, False, code, BETA
                truth = reference.divergence_forward_backward(a.double(), b.double(), *options)[:2]
                a, b, truth = a.to(args.device), b.to(args.device), tuple(x.to(args.device) for x in truth)
                for peer in peers:
                    for quantity, error in zip(("loss", "gradient"), errors(peer.call, a, b, truth), strict=True):
                        found[peer.name][quantity].append(error)
            accuracy[f"{kind}, {classes} classes"] = {"delta": DELTAS, "relative_error": found}
    report.figures["accuracy"] = accuracy
    for quantity in ("loss", "gradient"):
        columns = [f"relative error of the {quantity}", "", *(f"δ = {power_text(delta)}" for delta in DELTAS)]
        rows: list[list[str] | None] = []
        for head, figures in accuracy.items():
            rows += [None] if rows else []
            for name, both in figures["relative_error"].items():
                rows.append([head, name, *map(power_text, both[quantity])])
        report.texts.append(format_table(columns, rows))


def accuracy_figure(accuracy: dict[str, Any], title: str, caption: str) -> Any:
    """Error of the loss over delta on log axes: a panel a kind, of the fewest classes. None without matplotlib."""
    with plotting() as plt:
        if plt is None:
            return None
        panels = {head.partition(",")[0]: figures for head, figures in reversed(accuracy.items())}
        names = list(dict.fromkeys(name for f in accuracy.values() for name in f["relative_error"]))
        palette = colours(names, OURS)
        figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(11, 7), squeeze=False, sharex=True, sharey=True)
        for axis, (kind, figures) in zip(axes.flat, reversed(panels.items()), strict=False):
            for name, both in figures["relative_error"].items():
                heights = [max(error, 1e-9) for error in both["loss"]]
                axis.plot(figures["delta"], heights, color=palette[name], marker="o", lw=3 if name == OURS else 1.6)
            axis.set(xscale="log", yscale="log", ylim=(1e-9, 1e7), title=kind)
            axis.axhspan(1, 1e7, color="#D55E00", alpha=0.06, linewidth=0)
        axes[0, 0].invert_xaxis()
        for axis in axes[:, 0]:
            axis.set_ylabel("relative error of the loss")
        for axis in axes[-1]:
            axis.set_xlabel("δ, the difference of the logits")
        handles = [plt.Line2D([], [], color=palette[name], marker="o", linewidth=2) for name in names]
        finish(figure, title, caption, handles, names)
        return figure


def measure_speed(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """A case per kind, shape and dtype: forward and backward with both gradients."""
    for dtype_name in args.dtypes:
        dtype = DTYPES[dtype_name]
        for kind in args.kinds:
            for rows, classes in args.shapes:
                torch.compiler.reset()  # one shape, one graph
                peers = [
                    Peer(p.name, partial(gradients, p.call), p.kind)
                    for p in implementations(report, args.device, kind)
                    if p.name != "Liger"  # which has one gradient
                ]

                def inputs(size: tuple[int, int] = (rows, classes), dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
                    a, b = (torch.randn(size, device=args.device, dtype=dtype) for _ in range(2))
                    return a.requires_grad_(), b.requires_grad_()

                report.add(
                    measure(
                        f"{kind} {rows}×{classes}", peers, inputs, baselines=BASELINES, group=dtype_name,
                        bytes_moved=4 * rows * classes * dtype.itemsize, outputs=2, device=args.device,
                        budget_s=args.budget, progress=progress,
                    )
                )  # fmt: skip


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    shapes = [bench_kl.shape(text) for text in SHAPES]
    parser.add_argument("--shapes", nargs="+", type=bench_kl.shape, default=shapes, metavar="ROWSxCLASSES")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--kinds", nargs="+", choices=reference.KINDS, default=list(reference.KINDS))
    parser.add_argument("--classes", nargs="+", type=int, default=[3, 30522], help="of the accuracy (%(default)s)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for a case's rounds (%(default)s)")
    parser.add_argument("--skip-accuracy", action="store_true", help="speed alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and figures (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    begin, args = time.perf_counter(), arguments(argv)
    title = "Divergences with both gradients: times faster than eager"
    report = Report("bench_divergences", vars(args), args.device, title)
    cases = [implementations(report, args.device, kind) for kind in args.kinds]
    steps = sum(map(measure_steps, cases)) * len(args.shapes) * len(args.dtypes)
    with progress_bar(steps + len(args.kinds) * len(args.classes), "bench_divergences") as progress:
        if not args.skip_accuracy:
            measure_accuracy(report, args, progress)
        measure_speed(report, args, progress)
    print(report.table())
    plots = {"speed": report.speed_figure()}
    if not args.skip_accuracy:
        plots["error"] = accuracy_figure(
            report.figures["accuracy"], "Divergences: what is left of them at small differences",
            headline(report.machine),
        )  # fmt: skip
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *report.save(args.out, plots))


if __name__ == "__main__":
    main()

"""A head and the symmetric KL in one: how exact, how fast and how large, beside the ways people compute it today.

    python benchmarks/bench_linear.py [--device cuda] [--shapes 1024x384x30522] [--dtypes fp32 bf16]

Accuracy: hidden states that are a share of their size apart; relative errors of the loss and of the head's gradient
against float64 arithmetic on the very same hidden states and head. Speed: forward and backward, gradients of both
hidden states and of the head, beside the time of the six products that these need. Writes a table, JSON, two figures.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench_kl import DTYPES, log_softmaxes, power_text
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
from smart_kernels import divergence, linear_divergence

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BASELINES = ("eager", "torch.compile", "products")
DISTANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
CHUNK = 256
"""Rows of a chunk of the plain version and of the products alone."""


def product(h_a: Tensor, h_b: Tensor, head: Tensor) -> Tensor:
    """The symmetric KL as one sum, over the logits as they are."""
    log_p, log_q = log_softmaxes((h_a @ head.t()).float(), (h_b @ head.t()).float())
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / len(h_a)


def kl_div(h_a: Tensor, h_b: Tensor, head: Tensor) -> Tensor:
    """The symmetric KL as two `kl_div`."""
    log_p, log_q = log_softmaxes((h_a @ head.t()).float(), (h_b @ head.t()).float())
    one_sided = partial(F.kl_div, reduction="batchmean", log_target=True)
    return one_sided(log_p, log_q) + one_sided(log_q, log_p)


def chunked(h_a: Tensor, h_b: Tensor, head: Tensor) -> Tensor:
    """In plain PyTorch: chunks of rows, of which the logits are made once more in the backward pass."""
    parts = [
        len(a) * checkpoint(product, a, b, head, use_reentrant=False)
        for a, b in zip(h_a.split(CHUNK), h_b.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum() / len(h_a)


def logits_kernel(h_a: Tensor, h_b: Tensor, head: Tensor) -> Tensor:
    """Our divergence of logits that are stored."""
    return divergence(h_a @ head.t(), h_b @ head.t())


def products(h_a: Tensor, h_b: Tensor, head: Tensor) -> None:
    """The six products alone, two at a time: two projections, two hidden gradients, two parts of the head's."""
    with torch.no_grad():
        grad, x = torch.zeros_like(head), torch.cat([h_a, h_b])
        for part in x.split(2 * CHUNK):
            logits = part @ head.t()
            logits @ head
            grad.addmm_(logits.t(), part)


def implementations(report: Report, device: str) -> list[Peer]:
    """All that can run here, ours last; a note for what cannot. What is called is a loss."""
    eager = {"product": product, "two kl_div": kl_div}
    found = [Peer(f"eager, {name}", loss, "eager") for name, loss in eager.items()]
    found.append(Peer("torch.compile, product", torch.compile(product, dynamic=False), "torch.compile"))
    found += [Peer("chunks, checkpointed", chunked), Peer("logits stored, our kernel", logits_kernel)]
    if torch.device(device).type == "cuda":
        try:
            liger = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(weight_hard_loss=0.0)
            found.append(Peer("Liger, JSD", lambda a, b, w: liger(a, w, b.detach(), w.detach(), torch.zeros(len(a)))))
        except Exception as error:  # an optional guest, whatever keeps it from coming
            report.note(f"Liger is left out: {first_line(error)}")
    return [*found, Peer(OURS, linear_divergence)]


def gradients(loss: Loss, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of both hidden states and the head."""
    value = loss(*tensors)
    return value, *torch.autograd.grad(value, tensors, allow_unused=True)


def hidden(rows: int, width: int, classes: int, distance: float) -> tuple[Tensor, ...]:
    """Hidden states so far apart in proportion, and a head of which logits are of size 3."""
    h_b, head = torch.randn(rows, width), 3 / width**0.5 * torch.randn(classes, width)
    return h_b + distance * torch.randn(rows, width), h_b, head


def measure_accuracy(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """Fill `report.figures["accuracy"]`: for each dtype the errors of everyone over the distance."""
    torch.manual_seed(0)
    accuracy: dict[str, Any] = {}
    for dtype_name in args.dtypes:
        progress(f"accuracy: {dtype_name}")
        peers = [p for p in implementations(report, args.device) if p.kind in ("eager", OURS)]
        found: dict[str, dict[str, list[float]]] = {p.name: {"loss": [], "head's gradient": []} for p in peers}
        for distance in DISTANCES:
            tensors = [x.to(DTYPES[dtype_name]) for x in hidden(16, 128, args.classes, distance)]
            wide = [x.double().requires_grad_() for x in tensors]
            # In float64 logits lose 1e-16 of their size, which is 1e-9 of what is left of them here.
            truth = gradients(logits_kernel, *wide)
            for peer in peers:
                each = [x.to(args.device).requires_grad_() for x in tensors]
                value, *grads = gradients(peer.call, *each)
                found[peer.name]["loss"].append(abs(value.item() / truth[0].item() - 1))
                error = (grads[2].cpu().double() - truth[3]).norm() / truth[3].norm()
                found[peer.name]["head's gradient"].append(error.item())
        accuracy[dtype_name] = {"distance": DISTANCES, "relative_error": found}
    report.figures["accuracy"] = accuracy
    for quantity in ("loss", "head's gradient"):
        columns = [f"relative error of the {quantity}", "", *(power_text(distance) for distance in DISTANCES)]
        rows: list[list[str] | None] = []
        for dtype_name, figures in accuracy.items():
            for name, both in figures["relative_error"].items():
                rows.append([dtype_name, name, *map(power_text, both[quantity])])
        report.texts.append(format_table(columns, rows))


def accuracy_figure(accuracy: dict[str, Any], caption: str) -> Any:
    """Errors over the distance of the hidden states on log axes, a panel a dtype. None without matplotlib."""
    with plotting() as plt:
        if plt is None:
            return None
        names = list(dict.fromkeys(name for f in accuracy.values() for name in f["relative_error"]))
        palette = colours(names, OURS)
        figure, axes = plt.subplots(1, len(accuracy), figsize=(5.5 * len(accuracy), 4.5), squeeze=False, sharey=True)
        for axis, (dtype_name, figures) in zip(axes[0], accuracy.items(), strict=True):
            for name, both in figures["relative_error"].items():
                heights = [max(error, 1e-9) for error in both["loss"]]
                axis.plot(figures["distance"], heights, color=palette[name], marker="o", lw=3 if name == OURS else 1.6)
            axis.set(xscale="log", yscale="log", title=dtype_name, xlabel="‖h_a - h_b‖ / ‖h_b‖")
            axis.invert_xaxis()
        axes[0, 0].set_ylabel("relative error of the loss")
        handles = [plt.Line2D([], [], color=palette[name], marker="o", linewidth=2) for name in names]
        finish(figure, "A head and a divergence: what is left of it at small differences", caption, handles, names)
        return figure


def measure_speed(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """A case per shape and dtype: forward and backward with all gradients, and the products alone."""
    for dtype_name in args.dtypes:
        for rows, width, classes in args.shapes:
            torch.compiler.reset()  # one shape, one graph
            peers = [Peer(p.name, partial(gradients, p.call), p.kind) for p in implementations(report, args.device)]
            peers.insert(-1, Peer("products", products))

            def inputs(size: tuple[int, int, int] = (rows, width, classes), name: str = dtype_name) -> tuple[Any, ...]:
                tensors = hidden(*size, 0.1)
                return tuple(x.to(args.device, DTYPES[name]).requires_grad_() for x in tensors)

            report.add(
                measure(
                    f"{rows}×{width}×{classes}", peers, inputs, baselines=BASELINES, group=dtype_name,
                    device=args.device, budget_s=args.budget, min_rounds=args.rounds, progress=progress,
                )
            )  # fmt: skip


def shape(text: str) -> tuple[int, ...]:
    """Rows, width and classes from "1024x384x30522"."""
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWSxWIDTHxCLASSES, each at least 1")
    return sizes


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    shapes = [shape("1024x384x30522")]
    parser.add_argument("--shapes", nargs="+", type=shape, default=shapes, metavar="ROWSxWIDTHxCLASSES")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--classes", type=int, default=5000, help="of the accuracy (%(default)s)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for a case's rounds (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a case at least (%(default)s)")
    parser.add_argument("--skip-accuracy", action="store_true", help="speed alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and figures (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    begin, args = time.perf_counter(), arguments(argv)
    report = Report("bench_linear", vars(args), args.device, "A head and the symmetric KL: times faster than eager")
    steps = (measure_steps(implementations(report, args.device)) + 1) * len(args.shapes) * len(args.dtypes)
    with progress_bar(steps + len(args.dtypes), "bench_linear") as progress:
        if not args.skip_accuracy:
            measure_accuracy(report, args, progress)
        measure_speed(report, args, progress)
    print(report.table())
    plots = {"speed": report.speed_figure()}
    if not args.skip_accuracy:
        plots["error"] = accuracy_figure(report.figures["accuracy"], headline(report.machine))
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *report.save(args.out, plots))


if __name__ == "__main__":
    main()

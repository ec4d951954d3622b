"""Symmetric KL: how exact and how fast, beside the ways people compute it today.

    python benchmarks/bench_kl.py [--device cuda] [--shapes 32x3 256x30522] [--dtypes fp32 bf16] [--full]

Accuracy: logits of a pretrained encoder on real questions, clean against word embeddings that are off by
epsilon; relative errors against float64 arithmetic on the very same logits. Speed: forward and backward
with both gradients, and the gradient of one side alone. Writes a table, JSON and two figures.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package index

import torch
from torch import Tensor
from torch.nn import functional as F

import limit
import real_data
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
from smart_kernels import symmetric_kl, symmetric_kl_grad

SHAPES = ("32x3", "4096x3", "512x128", "4096x1000", "256x30522", "64x131072")
LONG = 1000
"""Classes from where on bytes decide: there alone a quick run takes the other dtypes, and one gradient alone."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPSILONS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PAPER_EPSILON = 1e-5
CLASSES = 6
QUESTIONS = 128
VOCABULARY_ROWS = 256

Loss = Callable[[Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------------------- the ways to compute it


def two_kl_div(a: Tensor, b: Tensor) -> Tensor:
    """Two `kl_div`s in fp32, as autocast runs them, with the gradients of both arguments."""
    (log_p, log_q), (p, q) = log_softmaxes(a, b), softmaxes(a, b)
    return F.kl_div(log_q, p, reduction="batchmean") + F.kl_div(log_p, q, reduction="batchmean")


def log_target(a: Tensor, b: Tensor) -> Tensor:
    """The same with logarithms for targets: two softmaxes fewer."""
    log_p, log_q = log_softmaxes(a, b)
    divergence = partial(F.kl_div, reduction="batchmean", log_target=True)
    return divergence(log_q, log_p) + divergence(log_p, log_q)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Both divergences in one sum: (p - q) (log p - log q)."""
    log_p, log_q = log_softmaxes(a, b)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / a.size(0)


def product_of_logits(a: Tensor, b: Tensor) -> Tensor:
    """As p - q sums to 0, log p - log q may be off by a constant: (p - q) (a - b), with no logarithm."""
    p, q = softmaxes(a, b)
    return ((p - q) * (a.float() - b.float())).sum() / a.size(0)


def log_softmaxes(*logits: Tensor) -> list[Tensor]:
    return [F.log_softmax(x, -1, dtype=torch.float32) for x in logits]


def softmaxes(*logits: Tensor) -> list[Tensor]:
    return [F.softmax(x, -1, dtype=torch.float32) for x in logits]


SPELLINGS: dict[str, Loss] = {
    "two kl_div": two_kl_div,
    "log_target": log_target,
    "product": product,
    "product of logits": product_of_logits,
}
"""All that give the loss and its whole gradient."""


def smart_pytorch(a: Tensor, b: Tensor) -> Tensor:
    """smart-pytorch's `sym_kl_loss`: the target of each divergence is a constant, in the dtype of the logits."""
    forward = F.kl_div(F.log_softmax(a, -1), F.softmax(b.detach(), -1), reduction="batchmean")
    return forward + F.kl_div(F.log_softmax(b, -1), F.softmax(a.detach(), -1), reduction="batchmean")


def stable_kl(a: Tensor, b: Tensor, guard: float = 1e-6) -> Tensor:
    """mt-dnn's `stable_kl`, the loss of its adversary: log-odds for logarithms, constants but for the first factor."""
    p, q = F.log_softmax(a.float(), -1).exp(), F.log_softmax(b.detach().float(), -1).exp()
    log_odds_p, log_odds_q = (-(1 / (r.detach() + guard) - 1 + guard).log() for r in (p, q))
    return 2 * (p * (log_odds_p - log_odds_q)).sum() / a.size(0)


def stable_kl_both_ways(a: Tensor, b: Tensor) -> Tensor:
    """mt-dnn's `NsSymKlCriterion`."""
    return stable_kl(a, b) + stable_kl(b, a)


def liger() -> Loss:
    """Liger's fused KL, taken both ways; it has no gradient for its target."""
    divergence = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean")

    def both_ways(a: Tensor, b: Tensor) -> Tensor:
        forward = divergence(F.log_softmax(a, -1), F.softmax(b.detach(), -1))
        return forward + divergence(F.log_softmax(b, -1), F.softmax(a.detach(), -1))  # type: ignore[no-any-return]

    return both_ways


BASELINES = ("eager", "torch.compile")
"""Of these kinds are all spellings, which have the gradient of the symmetric KL, as ours has; all others treat the
target of each divergence as a constant."""


def implementations(report: Report, device: str) -> list[Peer]:
    """All that can run here, ours last; a note for what cannot. What is called is a loss."""
    found = [Peer(f"eager, {name}", loss, "eager") for name, loss in SPELLINGS.items()]
    found += [
        Peer(f"torch.compile, {name}", torch.compile(loss, dynamic=False), "torch.compile")
        for name, loss in SPELLINGS.items()
    ]
    found += [Peer("smart-pytorch", smart_pytorch), Peer("mt-dnn", stable_kl_both_ways)]
    if torch.device(device).type == "cuda":
        try:
            found.append(Peer("Liger", liger()))
        except Exception as error:  # an optional guest, whatever keeps it from coming
            report.note(f"Liger is left out: {first_line(error)}")
    return [*found, Peer(OURS, symmetric_kl)]


def whole(peer: Peer) -> bool:
    """Whether a peer has the whole gradient."""
    return peer.kind in (*BASELINES, OURS)


def gradients(loss: Loss, a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward, as a training step runs them."""
    value = loss(a, b)
    return value, torch.autograd.grad(value, (a, b))


# -------------------------------------------------------------------------------------------------- accuracy


def truth(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient with respect to a, and p - q, in float64: nine digits of the smallest differences here."""
    log_p, log_q = (F.log_softmax(x.double(), -1) for x in (a, b))
    p, t = log_p.exp(), log_p - log_q
    difference = p - log_q.exp()
    grad = p * (t - (p * t).sum(-1, keepdim=True)) + difference
    return (difference * t).sum() / len(a), grad / len(a), difference / len(a)


def errors(loss: Loss, a: Tensor, b: Tensor, true_loss: Tensor, true_grad: Tensor) -> tuple[float, float]:
    """Relative errors of the loss, and of its gradient with respect to the perturbed logits in the Euclidean norm."""
    value = loss(a := a.detach().requires_grad_(), b.detach().requires_grad_())
    (grad,) = torch.autograd.grad(value, a)
    return abs(value.item() / true_loss.item() - 1), ((grad.double() - true_grad).norm() / true_grad.norm()).item()


def real_logits(device: str, generator: torch.Generator) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Clean and perturbed logits for every epsilon, by head: a random classifier, and the tied vocabulary.

    The perturbation, of size epsilon in every feature of every token that is no padding, is added to the output
    of the word embedding, where SMART adds its own.

    Raises:
        ImportError: transformers is missing.
        real_data.UnavailableError: the encoder or the questions can be had from nowhere.
    """
    folder, questions = real_data.minilm_path(), real_data.load_trec().test.texts[:QUESTIONS]
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(folder).to(device).eval()
    batch = AutoTokenizer.from_pretrained(folder)(questions, padding=True, return_tensors="pt").to(device)
    embedding = encoder.get_input_embeddings()
    tokens = batch["attention_mask"].bool()
    shape = (*tokens.shape, embedding.embedding_dim)
    signs = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).to(device) * tokens.unsqueeze(-1)
    head = torch.randn(CLASSES, embedding.embedding_dim, generator=generator).to(device) / embedding.embedding_dim**0.5

    @torch.no_grad()
    def logits(epsilon: float) -> tuple[Tensor, Tensor]:
        hook = embedding.register_forward_hook(lambda _module, _inputs, output: output + epsilon * signs)
        try:
            hidden = encoder(**batch).last_hidden_state
        finally:
            hook.remove()
        words = hidden[tokens]
        words = words[:: max(1, len(words) // VOCABULARY_ROWS)][:VOCABULARY_ROWS]
        return hidden[:, 0] @ head.T, words @ embedding.weight.T

    clean = logits(0.0)
    perturbed = [logits(epsilon) for epsilon in EPSILONS]
    return {
        f"{clean[i].size(-1)} classes, {name}": [(p[i], clean[i]) for p in perturbed]
        for i, name in enumerate(("random head", "tied word embeddings"))
    }


def synthetic_logits(device: str, generator: torch.Generator) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The stand-in where no encoder can be had: normal logits, off by epsilon in every entry."""
    pairs = {}
    for rows, classes in ((QUESTIONS, CLASSES), (VOCABULARY_ROWS, 30522)):
        clean = torch.randn(rows, classes, generator=generator)
        signs = torch.randint(0, 2, clean.shape, generator=generator).mul_(2).sub_(1)
        pairs[f"{classes} classes, synthetic"] = [
            ((clean + epsilon * signs).to(device), clean.to(device)) for epsilon in EPSILONS
        ]
    return pairs


def measure_accuracy(report: Report, device: str, progress: Callable[[str], object]) -> None:
    """Fill `report.figures["accuracy"]`: for each head the distance of the logits, and the errors of everyone."""
    generator = torch.Generator().manual_seed(0)
    progress("logits")
    try:
        heads = real_logits(device, generator)
    except (ImportError, OSError, real_data.UnavailableError) as error:
        report.note(f"Synthetic logits in place of an encoder's: {first_line(error)}")
        heads = synthetic_logits(device, generator)
    accuracy: dict[str, Any] = {}
    for head, pairs in heads.items():
        torch.compiler.reset()
        *others, ours = implementations(report, device)
        ways = {peer.name: peer for peer in (*others, Peer("mt-dnn, one way", stable_kl), ours)}
        found: dict[str, dict[str, list[float]]] = {name: {"loss": [], "gradient": []} for name in ways}
        for (a, b), epsilon in zip(pairs, EPSILONS, strict=True):
            progress(f"accuracy: {head}, ε = {power_text(epsilon)}")
            true_loss, true_grad, difference = truth(a, b)
            for name in list(found):
                try:
                    grad = true_grad if whole(ways[name]) else difference
                    both = errors(ways[name].call, a, b, true_loss, grad)
                except Exception as error:  # as in `measure`: a guest that fails is left out
                    report.note(f"{name} is left out: {first_line(error)}")
                    del found[name]
                    continue
                for quantity, value in zip(("loss", "gradient"), both, strict=True):
                    found[name][quantity].append(value)
        distance = [(a - b).abs().max().item() for a, b in pairs]
        accuracy[head] = {"epsilon": EPSILONS, "largest_difference_of_logits": distance, "relative_error": found}
    report.figures["accuracy"] = accuracy
    report.texts += [accuracy_table(accuracy, quantity) for quantity in ("loss", "gradient")]
    means = f"of the whole gradient for {', '.join(BASELINES)} and {OURS}; for the others, of the p - q that they mean"
    report.texts[-1] += f"\n{means}"


def accuracy_table(accuracy: dict[str, Any], quantity: str) -> str:
    """Relative errors of one quantity, a column per epsilon."""
    columns = [f"relative error of the {quantity}", "", *(f"ε = {power_text(epsilon)}" for epsilon in EPSILONS)]
    rows: list[list[str] | None] = []
    for head, figures in accuracy.items():
        if rows:
            rows.append(None)
        distances = [power_text(d) for d in figures["largest_difference_of_logits"]]
        rows.append([head, "(logits differ by)", *distances])
        rows += [["", name, *map(power_text, found[quantity])] for name, found in figures["relative_error"].items()]
    return format_table(columns, rows)


def power_text(value: float) -> str:
    """Two digits near one, else one digit and a power of ten: 4e-5."""
    if 0.1 <= value < 100:
        return f"{value:.1f}" if value < 10 else f"{value:.0f}"
    digit, _, power = f"{value:.0e}".partition("e")
    return f"{digit}e{int(power)}" if value and power else digit


def accuracy_figure(accuracy: dict[str, Any], title: str, caption: str) -> Any:
    """Error over epsilon on log axes: a column per head, loss above gradient. None without matplotlib."""
    with plotting() as plt:
        if plt is None:
            return None
        names = [
            name
            for name in dict.fromkeys(name for figures in accuracy.values() for name in figures["relative_error"])
            if not name.startswith("torch.compile")  # which rounds as eager does
        ]
        palette = colours(names, OURS)
        figure, axes = plt.subplots(2, len(accuracy), figsize=(11, 8.2), squeeze=False, sharex=True, sharey=True)
        for column, (head, figures) in enumerate(accuracy.items()):
            for axis, quantity in zip(axes[:, column], ("loss", "gradient"), strict=True):
                draw_errors(axis, figures, quantity, palette)
                axis.set_title(f"{quantity.capitalize()}, {head}")
            axes[1, column].set_xlabel("ε, the perturbation of the word embeddings")
        axes[0, 0].invert_xaxis()
        for axis in axes[:, 0]:
            axis.set_ylabel("relative error against float64")
        handles = [plt.Line2D([], [], color=palette[name], marker="o", linewidth=2) for name in names]
        finish(figure, title, caption, handles, names)
        return figure


def draw_errors(axis: Any, figures: dict[str, Any], quantity: str, palette: dict[str, str]) -> None:
    """One panel: a line per implementation, ours on top; above an error of 1 nothing of the value is left."""
    found = figures["relative_error"]
    for name in palette:
        if name in found:
            heights = [max(error, 1e-9) for error in found[name][quantity]]
            width, size = (3, 7) if name == OURS else (1.6, 4)
            axis.plot(figures["epsilon"], heights, color=palette[name], marker="o", lw=width, ms=size, clip_on=False)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(1e-9, 1e7)
    axis.set_yticks([10.0**power for power in range(-8, 7, 2)])
    axis.minorticks_off()
    axis.axhspan(1, 1e7, color="#D55E00", alpha=0.06, linewidth=0)
    axis.axvline(PAPER_EPSILON, color="#999999", linewidth=1, linestyle=":")
    axis.annotate("the paper's ε ", (PAPER_EPSILON, 2e-9), fontsize=8, color="#666666", ha="right")
    axis.annotate("error larger than the value", (0.015, 0.93), xycoords="axes fraction", fontsize=8, color="#A04000")


# ----------------------------------------------------------------------------------------------------- speed


def one_gradient(loss: Loss, a: Tensor, b: Tensor) -> Tensor:
    """The gradient of one side alone, as an adversary's inner step needs it."""
    return torch.autograd.grad(loss(a, b), a)[0]


def speed_cases(args: argparse.Namespace) -> list[tuple[str, bool, int, int]]:
    """A dtype, whether both gradients are taken (that of one side alone in the first dtype only), rows and classes."""
    groups = [*((dtype, True) for dtype in args.dtypes), (args.dtypes[0], False)]
    everywhere = args.full or args.shapes
    shapes = args.shapes or [shape(text) for text in SHAPES]
    return [
        (*group, rows, classes)
        for group in groups
        for rows, classes in shapes
        if everywhere or group == groups[0] or classes >= LONG
    ]


def measure_speed(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """A case per shape and dtype: forward and backward with both gradients, and the gradient of one side alone."""
    for dtype_name, both, rows, classes in speed_cases(args):
        dtype = DTYPES[dtype_name]
        torch.compiler.reset()  # one shape, one graph: no recompilation with sizes left open
        peers = [
            Peer(peer.name, partial(gradients if both else one_gradient, peer.call), peer.kind)
            for peer in implementations(report, args.device)
        ]
        if not both:
            peers[-1] = Peer(OURS, symmetric_kl_grad)
        elif args.limit and classes < LONG:
            peers[-1:-1] = [Peer(n, partial(gradients, call), limit.KIND) for n, call in limit.of_short_rows()]
        elif args.limit and dtype_name != "fp16":
            peers[-1:-1] = limit.of_long_rows()

        def inputs(
            size: tuple[int, int] = (rows, classes), dtype: torch.dtype = dtype, both: bool = both
        ) -> tuple[Tensor, ...]:
            a, b = (torch.randn(size, device=args.device, dtype=dtype) for _ in range(2))
            return a.requires_grad_(), b.requires_grad_(both)

        report.add(
            measure(
                f"{rows}×{classes}",
                peers,
                inputs,
                baselines=BASELINES,
                group=dtype_name if both else f"{dtype_name}, one gradient",
                bytes_moved=(4 if both else 3) * rows * classes * dtype.itemsize,  # logits read, gradients written
                outputs=2 if both else 1,
                device=args.device,
                budget_s=6.0 if args.full else 1.0,
                min_rounds=15 if args.full else 5,
                progress=progress,
            )
        )


def shape(text: str) -> tuple[int, int]:
    """ROWSxCLASSES."""
    rows, _, classes = text.replace("×", "x").partition("x")
    if not (rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWSxCLASSES, for instance 32x3")
    return int(rows), int(classes)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="ROWSxCLASSES", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", dest="full", action="store_false", help="under 3 minutes; the default on a CPU")
    extent.add_argument("--full", action="store_true", help="more rounds; the default on a GPU")
    parser.set_defaults(full=None)
    parser.add_argument("--skip-accuracy", action="store_true", help="speed alone")
    parser.add_argument("--limit", action="store_true", help="beside all, on a CPU: their loads and stores alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and figures (%(default)s)")
    args = parser.parse_args(argv)
    try:
        if torch.device(args.device).type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        torch.empty(1, device=args.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.limit and torch.device(args.device).type != "cpu":
        parser.error("--limit: the loop is for --device cpu")
    if args.full is None:
        args.full = torch.device(args.device).type != "cpu"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    begin, args = time.perf_counter(), arguments(argv)
    title = "Symmetric KL with both gradients, and one gradient alone: times faster than eager"
    report = Report("bench_kl", vars(args), args.device, title)
    peers = implementations(report, args.device)
    steps = len(speed_cases(args)) * measure_steps(peers)
    with progress_bar(steps + (0 if args.skip_accuracy else 1 + 2 * len(EPSILONS)), "bench_kl") as progress:
        if not args.skip_accuracy:
            measure_accuracy(report, args.device, progress)
        measure_speed(report, args, progress)
    print(report.table())
    plots = {"speed": report.speed_figure()}
    if not args.skip_accuracy:
        plots["error"] = accuracy_figure(
            report.figures["accuracy"],
            "Symmetric KL: what is left of it at small perturbations",
            headline(report.machine),
        )
    if None in plots.values():
        print("No figures: matplotlib is not installed")
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *report.save(args.out, plots))


if __name__ == "__main__":
    main()

"""Fine-tune a pretrained encoder on few labelled texts, with SMART and without.

    python examples/finetune.py                                  # vanilla against SMART: MiniLM, TREC questions
    python examples/finetune.py --method vanilla recommended --train-size 50 --epochs 80
    python examples/finetune.py --task stsb --method vanilla smart predicted r3f --train-size 300 --epochs 16
    python examples/finetune.py --model roberta-base             # any name or folder, where a hub can be reached
    torchrun --nproc-per-node 2 examples/finetune.py             # several processes, one to a GPU where there are any

Every method sees the same examples in the same order, with the same head, for each seed. Learning rate and epochs are
by default those that are best for plain fine-tuning on 100 questions; where it is not trained to its end, whatever
trains longer or steadier looks better than it is. A few seeds tell no small difference from chance: benchmarks/study.py
compares tuned methods with more. What it found (docs/study.md): the paper's settings ("smart") are behind plain
fine-tuning here; "recommended" is better calibrated, in accuracy ahead with 50 questions, half of which longer training
gives as well, and level with 100. Prints the score on the test set for each seed, with mean and spread, and writes a
figure. Needs `pip install -e '.[bench]'` and no hub: model and data come from the package index.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

from smart_kernels import Smart, SmartConfig

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import real_data
from harness import OUR_COLOUR, finish, format_table, headline, machine, plotting, progress_bar

METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"lambda_s": 0.0, "mu": 0.0},
    "smart": {},
    "predicted": {"adversary": "predicted"},
    "smoothness": {"mu": 0.0},
    "proximal": {"lambda_s": 0.0},
    "r3f": {"adversary": "random", "mu": 0.0},
}
"""What each method sets; all else is the paper's. "smoothness" and "proximal" are SMART with one of its two terms."""

RECOMMENDED = "recommended"
"""The method that takes its settings, weights and radius among them, from `SmartConfig.recommended`."""

TASKS: dict[str, tuple[Callable[[], real_data.Dataset], str]] = {
    "trec": (real_data.load_trec, "accuracy"),
    "stsb": (real_data.load_stsb, "Pearson correlation"),
}
WARM_UP, CLIP = 0.1, 1.0


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Together with the others that torchrun started, if it did; gives the device of this one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        yield device
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    yield device
    dist.destroy_process_group()


class Task:
    """A data set, a tokenizer, and how to score."""

    def __init__(self, name: str, source: str, max_length: int, device: torch.device) -> None:
        load, self.metric = TASKS[name]
        self.data = load()
        self.classes = len(self.data.label_names) or 1
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.max_length = max_length
        self.device = device

    def batch(self, split: real_data.Split, chosen: Sequence[int]) -> dict[str, Tensor]:
        """These examples, padded, with labels."""
        texts = [split.texts[i] for i in chosen]
        pairs = [split.pairs[i] for i in chosen] if split.pairs else None
        tokens = self.tokenizer(
            texts, pairs, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        batch = {**tokens, "labels": torch.tensor([split.labels[i] for i in chosen])}
        return {key: value.to(self.device) for key, value in batch.items()}

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Accuracy in per cent, or 100 times the correlation, on the test set."""
        model.eval()
        rank, processes = rank_and_size()
        order = sorted(range(len(self.data.test.texts)), key=lambda i: len(self.data.test.texts[i]))[rank::processes]
        found, labels = [], []
        for begin in range(0, len(order), 128):
            batch = self.batch(self.data.test, order[begin : begin + 128])
            labels.append(batch.pop("labels").cpu())
            found.append(model(**batch).logits.cpu())
        parts = [(torch.cat(found), torch.cat(labels))]
        if processes > 1:
            parts *= processes
            dist.all_gather_object(parts, parts[0])
        logits, truth = (torch.cat(x) for x in zip(*parts, strict=True))
        if self.classes > 1:
            return 100 * (logits.argmax(-1) == truth).double().mean().item()
        return 100 * torch.corrcoef(torch.stack([logits.squeeze(-1), truth]))[0, 1].item()


def shared_out(order: Sequence[int], batch_size: int) -> Sequence[int]:
    """The order without a last batch that has no example for some process."""
    tail = len(order) % batch_size
    return order[: len(order) - tail] if tail < rank_and_size()[1] else order


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what each process has."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values / rank_and_size()[1]


def train(
    task: Task, source: str, method: str, seed: int, args: argparse.Namespace, report: Callable[[str], None]
) -> dict[str, Any]:
    """One run: its score, its time and the terms of the loss at each step."""
    rank, processes = rank_and_size()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=task.classes).train().to(task.device)
    pool = shared_out(torch.randperm(len(task.data.train.texts))[: args.train_size].tolist(), args.batch_size)
    if rank:
        torch.manual_seed(1000 * rank + seed)  # other dropout masks than the first process has
    steps = args.epochs * -(-len(pool) // args.batch_size)
    trained = DistributedDataParallel(model) if processes > 1 else model
    if method == RECOMMENDED:
        config = SmartConfig.recommended(model)
    else:
        config = SmartConfig(**{"lambda_s": args.lambda_s, "mu": args.mu, "epsilon": args.epsilon} | METHODS[method])
    smart = Smart(trained, config, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)

    names = ("task_loss", "smoothness", "proximal")
    curves: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for epoch in range(args.epochs):
        order = [
            pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        ]
        for first in range(0, len(order), args.batch_size):
            joined = order[first : first + args.batch_size]
            own = joined[rank::processes]
            out = smart(task.batch(task.data.train, own))
            share = len(own) * processes / len(joined)  # of uneven parts, that the mean be one over examples
            (share * out.loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            smart.update()
            terms = mean_over_processes(share * torch.stack([getattr(out, name) for name in names])).tolist()
            for name, term in zip(names, terms, strict=True):
                curves[name].append(term)
            report(f"{method}, seed {seed}, epoch {epoch + 1}, loss {terms[0]:.3f}")
    seconds = time.perf_counter() - begin
    return {"method": method, "seed": seed, "score": task.score(model), "seconds": seconds, **curves}


def table(runs: Sequence[dict[str, Any]], methods: Sequence[str], metric: str) -> str:
    """A row per method: mean, spread, every seed, and the difference from the first method, seed by seed."""
    scores = {m: [run["score"] for run in runs if run["method"] == m] for m in methods}
    seconds = {m: statistics.mean(run["seconds"] for run in runs if run["method"] == m) for m in methods}
    rows: list[list[str] | None] = []
    for method in methods:
        values = scores[method]
        spread = f"± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        difference = [a - b for a, b in zip(values, scores[methods[0]], strict=True)]
        rows.append(
            [
                method,
                "  ".join(f"{value:.1f}" for value in values),
                f"{statistics.mean(values):.1f}",
                spread,
                f"{min(values):.1f} … {max(values):.1f}",
                "" if method == methods[0] else f"{statistics.mean(difference):+.1f}",
                f"{seconds[method]:.0f} s",
            ]
        )
    columns = [f"test {metric}, %", "each seed", "mean", "spread", "range", f"against {methods[0]}", "training"]
    return format_table(columns, rows) + "\nspread: standard deviation over seeds, of training examples, head and order"


def figure(runs: Sequence[dict[str, Any]], methods: Sequence[str], metric: str, title: str, caption: str) -> Any:
    """Scores, joined by seed; and the terms of the last method's loss over the steps. None without matplotlib."""
    with plotting() as plt:
        if plt is None:
            return None
        drawn, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6), gridspec_kw={"width_ratios": [1, 1.35]})
        seeds = sorted({run["seed"] for run in runs})
        for seed in seeds:
            values = [next(r["score"] for r in runs if r["method"] == m and r["seed"] == seed) for m in methods]
            left.plot(range(len(methods)), values, color="#BBBBBB", linewidth=1.2, marker="o", markersize=5, zorder=2)
        for place, method in enumerate(methods):
            mean = statistics.mean(r["score"] for r in runs if r["method"] == method)
            colour = "#8C8C8C" if method == "vanilla" else OUR_COLOUR
            left.plot(
                [place - 0.22, place + 0.22], [mean, mean], color=colour, linewidth=4, solid_capstyle="round", zorder=3
            )
            left.annotate(f"{mean:.1f}", (place + 0.25, mean), va="center", color=colour, fontweight="bold")
        left.set_xticks(range(len(methods)), methods)
        left.set_xlim(-0.5, len(methods) - 0.2)
        left.grid(axis="x", visible=False)
        left.set_ylabel(f"test {metric}, %")
        left.set_title(f"{len(seeds)} seeds and their mean")

        colours = {"task_loss": "#444444", "smoothness": "#E69F00", "proximal": "#009E73"}
        labels = {"task_loss": "task loss", "smoothness": "smoothness R_s", "proximal": "proximal D"}
        last = [run for run in runs if run["method"] == methods[-1]]
        for name, colour in colours.items():
            curves = torch.tensor([run[name] for run in last], dtype=torch.float64)
            if not curves.any():
                continue
            curves = curves.masked_fill(curves <= 0, torch.nan)
            steps = range(1, curves.shape[1] + 1)
            for curve in curves:
                right.plot(steps, curve, color=colour, alpha=0.25, linewidth=1)
            right.plot(steps, curves.log().nanmean(0).exp(), color=colour, linewidth=2.2)
        right.set_yscale("log")
        right.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        right.set_xlabel("step")
        right.set_title(f"{methods[-1]}: the terms of its loss, each seed and the mean")
        handles = [plt.Line2D([], [], color=c, linewidth=2.2) for c in colours.values()]
        finish(drawn, title, caption, handles, list(labels.values()))
        return drawn


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="trec", help="question types, or sentence similarity")
    parser.add_argument(
        "--method", nargs="+", choices=[*METHODS, RECOMMENDED], default=["vanilla", "smart"], help="one or several"
    )
    parser.add_argument("--model", help="name or folder; by default MiniLM from the package index")
    parser.add_argument("--train-size", type=int, default=100, help="training examples (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (%(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the examples (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples in a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=7.5e-5, help="learning rate at its highest (%(default)s)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of an example at most (%(default)s)")
    parser.add_argument("--lambda-s", type=float, default=1.0, help="weight of the smoothness term (%(default)s)")
    parser.add_argument("--mu", type=float, default=1.0, help="weight of the proximal term (%(default)s)")
    parser.add_argument("--epsilon", type=float, default=1e-5, help="radius of the perturbation (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("finetune"), help="folder for figure and JSON (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("train_size", "seeds", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    args.method = list(dict.fromkeys(args.method))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    with joined_processes() as device:
        compare(args, device)


def compare(args: argparse.Namespace, device: torch.device) -> None:
    """Train with every method and seed; the first process reports."""
    begin = time.perf_counter()
    rank, processes = rank_and_size()
    if args.batch_size < processes:
        sys.exit(f"--batch-size: got {args.batch_size}, expected an example at least for each of {processes} processes")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if rank:
        dist.barrier()  # the first one fetches
    try:
        source = args.model or str(real_data.minilm_path())
        task = Task(args.task, source, args.max_length, device)
    except real_data.UnavailableError as error:
        sys.exit(f"Neither in the cache nor to be fetched: {error}")
    if processes > 1 and not rank:
        dist.barrier()
    total = len(shared_out(range(min(args.train_size, len(task.data.train.texts))), args.batch_size))
    steps = args.epochs * -(-total // args.batch_size)
    runs = []
    shown = progress_bar(len(args.method) * args.seeds * steps, "finetune")
    with shown if rank == 0 else contextlib.nullcontext(lambda text: None) as report:
        for seed in range(args.seeds):
            runs += [train(task, source, method, seed, args, report) for method in args.method]
    if rank:
        return

    described = machine()
    name = args.model or "MiniLM-L6"
    title = f"{name} on {args.task.upper()}, {total} training examples"
    print(
        f"{title}: {steps} steps at lr {args.lr:g}, {len(task.data.test.texts)} test examples"
        f"{f', {processes} processes' if processes > 1 else ''}\n{headline(described)}\n"
    )
    print(table(runs, args.method, task.metric))
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"arguments": {k: str(v) for k, v in vars(args).items()}, "machine": described, "runs": runs}
    (args.out / "finetune.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    drawn = figure(runs, args.method, task.metric, title, headline(described))
    if drawn is not None:
        drawn.savefig(args.out / "finetune.png", bbox_inches="tight", pad_inches=0.2, facecolor="white")
    print(f"\nwritten to {args.out} in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()

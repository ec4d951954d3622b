"""SMART: what a training step costs, and how strong its adversaries are.

    python benchmarks/bench_smart.py [--device cuda] [--models bert minilm] [--full] [--skip-strength]

Cost: a full step (forward, backward, AdamW, teacher) by each plan of passes, in units of a vanilla step, and its peak
memory, beside other ways to do it in PyTorch. Strength: the smoothness term that an adversary reaches at the paper's
radius, over what 20 steps of sign ascent reach in float64. Writes tables, JSON and two figures.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package index

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import real_data
from harness import (
    OUR_COLOUR,
    RESULTS,
    Case,
    Peer,
    Report,
    bytes_text,
    colours,
    finish,
    first_line,
    format_table,
    headline,
    measure,
    measure_steps,
    plotting,
    progress_bar,
    quartiles_text,
    seconds_text,
)
from smart_kernels import Smart, SmartConfig, symmetric_kl
from smart_kernels.smart.embedding import EmbeddingHook, perturb
from smart_kernels.smart.plan import make_plan, vanilla_steps

EPSILON = 1e-5
CLASSES = 6
BATCH = 16
VANILLA = "vanilla"

ALONE, LEAN, DETACHED = {"mu": 0.0}, {"memory": "lean"}, {"detach_clean": True}
OURS_STEPS: dict[str, dict[str, Any]] = {
    "power": ALONE,
    "power, lean": ALONE | LEAN,
    "power, detached": ALONE | DETACHED,
    "predicted": ALONE | {"adversary": "predicted"},
    "predicted, lean": ALONE | LEAN | {"adversary": "predicted"},
    "predicted, detached": ALONE | DETACHED | {"adversary": "predicted"},
    "task, detached": ALONE | DETACHED | {"adversary": "task"},
    "random (R3F)": ALONE | {"adversary": "random"},
    "random, detached": ALONE | DETACHED | {"adversary": "random"},
    "teacher": {"lambda_s": 0.0},
    "power, teacher": {},
    "predicted, teacher": {"adversary": "predicted"},
    "predicted, lean, teacher": LEAN | {"adversary": "predicted"},
    "predicted, detached, teacher": DETACHED | {"adversary": "predicted"},
}
"""Our ways, a plan each: what is set."""
HEAD_STEPS: dict[str, dict[str, Any]] = {
    name + text: options | {"fuse_head": fuse}
    for name, options in (("power, teacher", {}), ("power, lean, teacher", LEAN))
    for text, fuse in ((", no logits", True), (", logits", False))
}
"""Ours for a language model: with its head in the divergence, and with logits."""
OTHERS = ("smart-pytorch", "PyTorch loop", "PyTorch loop, teacher", "PyTorch R3F")

STRENGTH_CLASSES = (2, 3, 6, 10)
ADVERSARIES = ("power", "predicted", "fisher", "task", "random")
ASCENT_STEPS = 20


# --------------------------------------------------------------------------------------------------- models


def bert(device: str) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """A BERT-like encoder of 6 layers and 384 features, random, and batches of 16 × 64 random words."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=CLASSES
        )
    )

    def batch() -> dict[str, Tensor]:
        words = torch.randint(1000, 30000, (BATCH, 64), device=device)
        return {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "labels": torch.randint(0, CLASSES, (BATCH,), device=device),
        }

    return model.to(device).train(), batch


def minilm(device: str) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """MiniLM, pretrained, and batches of 16 real questions.

    Raises:
        real_data.UnavailableError: they can be had from nowhere.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    folder, train = real_data.minilm_path(), real_data.load_trec().train
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    place = iter(range(0, len(train.texts) - BATCH, BATCH))

    def batch() -> dict[str, Tensor]:
        chosen = slice(begin := next(place), begin + BATCH)
        tokens = tokenizer(train.texts[chosen], padding=True, return_tensors="pt")
        return {**tokens.to(device), "labels": torch.tensor(train.labels[chosen], device=device)}

    return model.to(device).train(), batch


def gpt2(device: str) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """A GPT-2-like model of 2 layers and 128 features with GPT-2's vocabulary, random; batches of 4 × 128 words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=2, n_head=4))

    def batch() -> dict[str, Tensor]:
        words = torch.randint(0, model.config.vocab_size, (4, 128), device=device)
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words.clone()}

    return model.to(device).train(), batch


MODELS = {"bert": ("BERT 6×384, 16×64 words", bert), "minilm": ("MiniLM, 16 questions", minilm)}


# ------------------------------------------------------------------------------------------- the other ways


def from_embeddings(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Logits as a function of the word embeddings."""
    return lambda x: model(inputs_embeds=x, attention_mask=batch["attention_mask"]).logits  # type: ignore[no-any-return]


def two_kl(a: Tensor, b: Tensor) -> Tensor:
    """The symmetric KL as two `kl_div`, with the gradients of both arguments."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) + F.kl_div(
        log_p, log_q, reduction="batchmean", log_target=True
    )


def smart_pytorch(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The package smart-pytorch with its defaults, used as its README does but on the word embeddings alone."""
    published = importlib.import_module("smart_pytorch")
    evaluate = from_embeddings(model, batch)
    loss = published.SMARTLoss(evaluate, published.kl_loss, loss_last_fn=published.sym_kl_loss)
    embeds = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    state = evaluate(embeds)
    return F.cross_entropy(state, batch["labels"]) + loss(embeds, state)


def pytorch_loop(model: nn.Module, batch: Mapping[str, Tensor], teacher: nn.Module | None) -> Tensor:
    """Algorithm 1 in plain PyTorch, as one writes it down; the teacher is a second module."""
    evaluate = from_embeddings(model, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    clean = evaluate(embeds)
    noise = (EPSILON * torch.randn_like(embeds)).requires_grad_()
    (g,) = torch.autograd.grad(two_kl(evaluate(embeds.detach() + noise), clean.detach()), noise)
    g = g / g.flatten(1).norm(torch.inf, dim=1).view(-1, 1, 1)
    delta = (noise.detach() + 1e-3 * g).clamp(-EPSILON, EPSILON) * batch["attention_mask"].unsqueeze(-1)
    loss = F.cross_entropy(clean, batch["labels"]) + two_kl(evaluate(embeds + delta), clean)
    if teacher is not None:
        with torch.no_grad():
            old = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = loss + two_kl(clean, old)
    return loss


def r3f(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """R3F in plain PyTorch: noise for a perturbation."""
    evaluate = from_embeddings(model, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    clean = evaluate(embeds)
    noisy = evaluate(embeds + EPSILON * torch.randn_like(embeds))
    return F.cross_entropy(clean, batch["labels"]) + two_kl(noisy, clean)


def peers_of(model: nn.Module, steps: Mapping[str, dict[str, Any]] = OURS_STEPS) -> list[Peer]:
    """Ways of training a model, each a full step with AdamW; the model and its optimiser are shared.

    Args:
        model: the model.
        steps: ours. Beside all of a classifier's stand others' ways.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(loss: Callable[[dict[str, Tensor]], Tensor], update: Callable[[], object] = lambda: None) -> Any:
        def call(batch: dict[str, Tensor]) -> None:
            loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            update()

        return call

    def ours(options: dict[str, Any]) -> Any:
        smart = Smart(model, SmartConfig(**options), num_training_steps=1000)

        def call(batch: dict[str, Tensor]) -> None:
            smart.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
            smart.update()

        return call

    second = copy.deepcopy(model)

    @torch.no_grad()
    def average() -> None:
        torch._foreach_lerp_(list(second.parameters()), list(model.parameters()), 1e-3)

    others = (
        step(lambda batch: smart_pytorch(model, batch)),
        step(lambda batch: pytorch_loop(model, batch, None)),
        step(lambda batch: pytorch_loop(model, batch, second), average),
        step(lambda batch: r3f(model, batch)),
    )
    return [
        Peer(VANILLA, step(lambda batch: model(**batch).loss)),
        *(Peer(name, ours(options)) for name, options in steps.items()),
        *(map(Peer, OTHERS, others) if steps is OURS_STEPS else ()),
    ]


# ----------------------------------------------------------------------------------------------------- cost


def measure_cost(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """A case per model."""
    for key in args.models:
        label, build = MODELS[key]
        try:
            model, batch = build(args.device)
        except (ImportError, OSError, real_data.UnavailableError) as error:
            report.note(f"{label} is left out: {first_line(error)}")
            continue
        report.add(
            measure(
                label,
                peers_of(model),
                lambda batch=batch: (batch(),),  # type: ignore[misc]
                baselines=[VANILLA],
                device=args.device,
                budget_s=240.0 if args.full else 30.0,
                min_rounds=15 if args.full else 5,
                progress=progress,
            )
        )
    report.figures["cost"] = {case.label: costs(case) for case in report.cases}
    report.figures["memory"] = {case.label: peaks(case) for case in report.cases}


def measure_head(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """Fill `report.figures["head"]`: a language model's step, with its head in the divergence and with logits."""
    try:
        model, batch = gpt2(args.device)
    except ImportError as error:
        report.note(f"The language model is left out: {first_line(error)}")
        return
    case = measure(
        "GPT-2 2×128, 50 257 classes, 4×128 words", peers_of(model, HEAD_STEPS), lambda: (batch(),),
        baselines=[VANILLA], device=args.device, budget_s=120.0 if args.full else 30.0, min_rounds=5, progress=progress,
    )  # fmt: skip
    report.figures["head"] = {"cost": costs(case), "memory": peaks(case)}
    rows = [
        [t.name, seconds_text(t.median), quartiles_text(t), f"{costs(case)[t.name]:.2f}", bytes_text(t.peak_bytes),
         f"{peaks(case)[t.name]:.2f}"]
        for t in case.timings
    ]  # fmt: skip
    columns = [case.label, "median", "quartiles", "vanilla steps", "peak memory", "of vanilla"]
    report.texts.append(format_table(columns, rows))


def costs(case: Case) -> dict[str, float]:
    """Median time of each peer in vanilla steps."""
    return {timing.name: 1 / case.speed_up(timing.name, VANILLA) for timing in case.timings}


def peaks(case: Case) -> dict[str, float]:
    """Peak memory of each peer over that of a vanilla step."""
    found = {timing.name: timing.peak_bytes for timing in case.timings}
    vanilla = found[VANILLA]
    return {name: peak / vanilla if peak and vanilla else float("nan") for name, peak in found.items()}


def by_count(name: str) -> float:
    """What one of our steps costs in vanilla steps, if a pass costs what it has to compute."""
    config = SmartConfig(**OURS_STEPS[name])
    return vanilla_steps(make_plan(config, smooth=bool(config.lambda_s), taught=bool(config.mu), ahead=True))


def reached(name: str, strength: Mapping[str, Any] | None) -> str:
    """R_s that the adversary of one of our steps reaches, a mean over the numbers of classes."""
    config = SmartConfig(**OURS_STEPS[name])
    if not strength or not config.lambda_s:
        return ""
    return f"{statistics.mean(strength['sure']['share'][f'{config.adversary}, fp32']):.2f}"


def cost_table(cases: Sequence[Case], strength: Mapping[str, Any] | None = None) -> str:
    """Time and memory of a step, what counting the passes gives, and how strong its adversary is."""
    rows: list[list[str] | None] = []
    for case in cases:
        if rows:
            rows.append(None)
        head = case.label
        for timing in case.timings:
            ours = timing.name in OURS_STEPS
            rows.append(
                [
                    head,
                    f"smart_kernels {timing.name}" if ours else timing.name,
                    seconds_text(timing.median),
                    quartiles_text(timing),
                    f"{costs(case)[timing.name]:.2f}",
                    f"{by_count(timing.name):.2f}" if ours else "",
                    bytes_text(timing.peak_bytes),
                    f"{peaks(case)[timing.name]:.2f}",
                    reached(timing.name, strength) if ours else "",
                ]
            )
            head = ""
    columns = ["model", "step", "median", "quartiles", "vanilla steps", "by count", "peak memory", "of vanilla", "R_s"]
    return (
        format_table(columns, rows)
        + "\nquartiles: half of all rounds lie between · by count: of passes, forward = backward for inputs = backward "
        "for weights = 1,\na vanilla step 3 · peak memory: allocated at the peak of a step, gradients and activations, "
        "beyond the weights and AdamW's state\n"
        f"R_s: that the adversary reaches, over that of {ASCENT_STEPS} ascent steps; sure head, fp32, mean over C"
    )


def cost_figure(cases: Sequence[Case], title: str, caption: str) -> Any:
    """Bars of vanilla steps, a panel per model; a tick where the count of passes lies. None without matplotlib."""
    with plotting() as plt:
        if plt is None or not cases:
            return None
        figure, axes = plt.subplots(1, len(cases), figsize=(1.5 + 4.8 * len(cases), 6.4), squeeze=False, sharey=True)
        first = costs(cases[0])
        names = sorted(first, key=lambda name: first[name])
        for axis, case in zip(axes[0], cases, strict=True):
            found = costs(case)
            for place, name in enumerate(names):
                ours = name in OURS_STEPS
                axis.barh(place, found[name], height=0.7, color=OUR_COLOUR if ours else "#8C8C8C")
                axis.annotate(
                    f"{found[name]:.2f}",
                    (max(found[name], by_count(name) if ours else 0), place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    fontweight="bold" if ours else "normal",
                )
                if ours:
                    axis.plot([by_count(name)] * 2, [place - 0.42, place + 0.42], color="#E69F00", linewidth=2)
            axis.set_yticks(range(len(names)), names)
            axis.grid(axis="y", visible=False)
            axis.set_title(case.label)
            axis.set_xlabel("vanilla steps")
            axis.set_xlim(0, 1.15 * max(found.values()))
        handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OUR_COLOUR, "#8C8C8C")]
        handles.append(plt.Line2D([], [], color="#E69F00", linewidth=2))
        finish(figure, title, caption, handles, ["smart_kernels", "others", "by count of passes"])
        return figure


# ------------------------------------------------------------------------------------------------- strength


class Strength:
    """MiniLM with a random head on real questions: what adversaries reach, over 20 steps of sign ascent in float64.

    Args:
        classes: of the head.
        size: standard deviation of the head's weights: 1 makes it as sure as a trained one; 0.02, as transformers
            initialises it, makes all classes nearly as probable as each other.
        questions: how many.
        seed: of the head, the labels and the noise.
        device: where everything runs.

    Raises:
        real_data.UnavailableError: the encoder or the questions can be had from nowhere.
    """

    def __init__(self, classes: int, size: float, questions: int, seed: int, device: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        folder, texts = real_data.minilm_path(), real_data.load_trec().test.texts
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes).eval()
        model.classifier.weight.data = size * torch.randn(model.classifier.weight.shape, generator=generator)
        self.model = model.to(device)
        self.exact = copy.deepcopy(model).double().requires_grad_(False)
        self.hook = EmbeddingHook(self.exact.get_input_embeddings())
        chosen = texts[seed * questions : (seed + 1) * questions]
        self.batch = {**AutoTokenizer.from_pretrained(folder)(chosen, padding=True, return_tensors="pt").to(device)}
        self.batch["labels"] = torch.randint(0, classes, (questions,), generator=generator).to(device)
        with torch.no_grad():
            self.clean = self.exact(**self.batch).logits
        self.probability = self.clean.softmax(-1).amax(-1).mean().item()
        noise = EPSILON * torch.randn(*self.batch["input_ids"].shape, model.config.hidden_size, generator=generator)
        self.noise = noise.to(device) * self.batch["attention_mask"].unsqueeze(-1)
        self.most = self._smoothness(self._ascend()).item()

    def _smoothness(self, delta: Tensor) -> Tensor:
        embeds = self.exact.get_input_embeddings()(self.batch["input_ids"])
        with self.hook.replace({0: perturb(embeds, delta)}, 1):
            return symmetric_kl(self.exact(**self.batch).logits, self.clean)

    def _ascend(self) -> Tensor:
        delta, real = self.noise.double(), self.batch["attention_mask"].unsqueeze(-1)
        for _ in range(ASCENT_STEPS):
            (g,) = torch.autograd.grad(self._smoothness(delta.requires_grad_()), delta)
            delta = (delta.detach() + EPSILON / 4 * g.sign()).clamp(-EPSILON, EPSILON) * real
        return delta

    @torch.no_grad()
    def share(self, delta: Tensor) -> float:
        """R_s at a perturbation, over that of the ascent."""
        return self._smoothness(delta).item() / self.most

    def of(self, adversary: str, autocast: torch.dtype | None = None) -> float:
        """What an adversary of ours reaches, in fp32 or under autocast."""
        smart = Smart(self.model, SmartConfig(adversary=adversary, epsilon=EPSILON, mu=0.0))
        smart.generator.manual_seed(self.seed)
        device = self.noise.device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            delta = smart(self.batch, initial_perturbation=self.noise).perturbation
        assert delta is not None
        return self.share(delta)

    def of_the_usual_formula(self) -> float:
        """mt-dnn's and smart-pytorch's step, noise + eta g over its norm, brought to the radius."""
        evaluate = from_embeddings(self.model, self.batch)
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(self.batch["input_ids"])
            clean = evaluate(embeds)
        noise = self.noise.clone().requires_grad_()
        (g,) = torch.autograd.grad(two_kl(evaluate(embeds + noise), clean), noise)
        step = self.noise + 1e-3 * g
        real = self.batch["attention_mask"].unsqueeze(-1)
        return self.share(EPSILON * real * step / step.abs().amax(-1, keepdim=True).clamp_min(1e-30))


HEADS = {"sure": 1.0, "unsure": 0.02}
PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16}


def measure_strength(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """Fill `report.figures["strength"]`: by head, then by way and precision, the mean over seeds for each C."""
    strength: dict[str, Any] = {}
    try:
        for head, size in HEADS.items():
            shares: dict[str, list[float]] = {}
            probabilities = []
            for classes in STRENGTH_CLASSES:
                found: dict[str, list[float]] = {}
                for seed in range(args.seeds):
                    progress(f"strength: {head} head of {classes} classes, seed {seed}")
                    case = Strength(classes, size, args.questions, seed, args.device)
                    found.setdefault("probability", []).append(case.probability)
                    for adversary in ADVERSARIES:
                        for precision, dtype in PRECISIONS.items():
                            found.setdefault(f"{adversary}, {precision}", []).append(case.of(adversary, dtype))
                    found.setdefault("mt-dnn's formula, fp32", []).append(case.of_the_usual_formula())
                probabilities.append(statistics.mean(found.pop("probability")))
                for name, values in found.items():
                    shares.setdefault(name, []).append(statistics.mean(values))
            strength[head] = {"classes": STRENGTH_CLASSES, "probability_of_the_first": probabilities, "share": shares}
    except (ImportError, OSError, real_data.UnavailableError) as error:
        report.note(f"The strength is left out: {first_line(error)}")
        return
    report.figures["strength"] = strength
    report.texts.append(strength_table(strength))


def strength_table(strength: Mapping[str, Any]) -> str:
    """R_s of each way over the ascent's, a column per number of classes."""
    rows: list[list[str] | None] = []
    for head, figures in strength.items():
        if rows:
            rows.append(None)
        mean = ", ".join(f"{p:.2f}" for p in figures["probability_of_the_first"])
        rows.append([f"{head} head", f"(its first class has {mean})", *[""] * len(STRENGTH_CLASSES)])
        for name, shares in figures["share"].items():
            rows.append(["", name, *(f"{share:.3f}" if share >= 0.0005 else f"{share:.0e}" for share in shares)])
    columns = [f"R_s over that of {ASCENT_STEPS} steps", "adversary", *(f"C = {c}" for c in STRENGTH_CLASSES)]
    return format_table(columns, rows)


def strength_figure(strength: Mapping[str, Any], title: str, caption: str) -> Any:
    """Share of the ascent's R_s by number of classes, a panel per head. None without matplotlib."""
    with plotting() as plt:
        if plt is None:
            return None
        names = [*ADVERSARIES, "mt-dnn's formula"]
        palette = colours(names, "predicted")
        figure, axes = plt.subplots(1, len(strength), figsize=(11, 4.6), squeeze=False, sharey=True)
        for axis, (head, figures) in zip(axes[0], strength.items(), strict=True):
            places = range(len(STRENGTH_CLASSES))
            for name in names:
                for precision, line in (("fp32", "-"), ("bf16 autocast", ":")):
                    if shares := figures["share"].get(f"{name}, {precision}"):
                        axis.plot(places, shares, line, color=palette[name], marker="o", markersize=5, linewidth=2)
            axis.set_xticks(places, [str(c) for c in STRENGTH_CLASSES])
            axis.set_xlabel("classes")
            axis.set_ylim(-0.03, 1.06)
            probabilities = figures["probability_of_the_first"]
            axis.set_title(f"{head} head: p of the first class {max(probabilities):.2f} … {min(probabilities):.2f}")
        axes[0][0].set_ylabel(f"R_s over that of {ASCENT_STEPS} ascent steps")
        handles = [plt.Line2D([], [], color=palette[name], marker="o", linewidth=2) for name in names]
        handles.append(plt.Line2D([], [], color="#444444", linestyle=":", linewidth=2))
        finish(figure, title, caption, handles, [*names, "dotted: bf16 autocast"])
        return figure


# ------------------------------------------------------------------------------------------------------ main


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="whose step is timed")
    parser.add_argument("--full", action="store_true", help="more rounds")
    parser.add_argument("--skip-strength", action="store_true", help="cost alone")
    parser.add_argument("--questions", type=int, default=12, help="for the strength (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="for the strength (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and figures (%(default)s)")
    args = parser.parse_args(argv)
    try:
        torch.empty(1, device=args.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    begin, args = time.perf_counter(), arguments(argv)
    torch.manual_seed(0)
    report = Report("bench_smart", vars(args), args.device)
    runs = 0 if args.skip_strength else len(HEADS) * len(STRENGTH_CLASSES) * args.seeds
    steps = len(args.models) * measure_steps([VANILLA, *OURS_STEPS, *OTHERS])
    of_head = measure_steps([VANILLA, *HEAD_STEPS])
    with progress_bar(steps + of_head + runs, "bench_smart") as progress:
        measure_cost(report, args, progress)
        measure_head(report, args, progress)
        if not args.skip_strength:
            measure_strength(report, args, progress)
    report.texts.insert(0, cost_table(report.cases, report.figures.get("strength")))
    report_cases, report.cases = report.cases, []  # their table is ours, in vanilla steps
    print(report.table())
    report.cases = report_cases
    caption = headline(report.machine)
    plots = {"cost": cost_figure(report.cases, "A training step with SMART, in vanilla steps", caption)}
    if "strength" in report.figures:
        title = f"How strong the adversaries are at ε = {EPSILON:g}"
        plots["strength"] = strength_figure(report.figures["strength"], title, caption)
    if None in plots.values():
        print("No figures: matplotlib is not installed, or there is nothing to draw")
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *report.save(args.out, plots))


if __name__ == "__main__":
    main()

"""One run of the study: train with a method, then measure on development or test data.

A run is a pure function of its `Run`: the seed gives examples, head, order and dropout masks, and all else is fixed
here. One thread, no padding beyond the batch, tokens made once for a process.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package index

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

import real_data
from smart_kernels import Smart, SmartConfig, symmetric_kl
from smart_kernels.smart.teacher import Teacher

DEVELOPMENT = 500
"""Examples that are taken out of the training pool to tune by."""

BATCH, WARM_UP, CLIP = 16, 0.1, 1.0
GROUPED = 4
"""Batches among which texts are sorted by their length."""

AVERAGES = (0.1, 0.4)
"""Horizons of the moving averages that plain fine-tuning is tuned with: steps that they remember, over all steps."""

CORRUPTIONS = ("typos_5", "typos_10", "words_10")
RADII = (1e-3, 1e-2)
"""Of the smoothness that is measured: l_inf, in units of the word embeddings."""

CORRUPTED = 500
"""Of a part's texts so many, the first, are measured with faults, too; the test set's have been shuffled."""

ASCENT_STEPS, ASCENT_EXAMPLES, BINS = 20, 16, 15


@dataclass(frozen=True)
class Run:
    """A run's whole configuration, which is also its key.

    Attributes:
        task: "trec" or "stsb".
        size: training examples.
        noise: share of them that has a wrong label.
        settings: of the method: fields of SmartConfig; "relative", an l_2 radius of each word in units of the mean norm
            of the word embeddings; "smart_pytorch", the weight of that package's loss, instead of all others.
        lr: learning rate at its highest.
        epochs: passes over the examples.
        seed: of examples, head, order and dropout.
        part: "dev" or "test", what is measured on.
        average: horizon of the moving average that is measured in the place of the model itself (see `AVERAGES`), -1
            for the teacher of a proximal term, 0 for the model.
    """

    task: str
    size: int
    settings: Mapping[str, Any]
    lr: float
    epochs: int
    seed: int
    part: str
    noise: float = 0.0
    average: float = 0.0
    batch: int = field(default=BATCH)

    @property
    def key(self) -> str:
        return json.dumps(vars(self), sort_keys=True)

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.size / self.batch)


def passes(settings: Mapping[str, Any]) -> float:
    """What a step costs in vanilla steps, by counting passes: forward 1, backward for inputs 1, for weights 1."""
    if "smart_pytorch" in settings:
        return 8 / 3
    smart = SmartConfig(**settings_of(settings, 1.0))
    smoothness = {"power": 2 + 3, "random": 3}.get(smart.adversary, 1 + 3) if smart.lambda_s else 0
    return (3 + smoothness + (1 if smart.mu else 0)) / 3


def settings_of(settings: Mapping[str, Any], norm: float) -> dict[str, Any]:
    """The fields of SmartConfig; `norm` is the mean norm of a word's embedding."""
    fields = dict(settings)
    if "relative" in fields:
        fields |= {"epsilon": fields.pop("relative") * norm, "norm": "l2", "scope": "token"}
    return fields


# ------------------------------------------------------------------------------------------------------ data


@dataclass
class Texts:
    """Token ids and labels; `corrupted` are the ids of the same texts with faults, by the name of the kind."""

    tokens: list[dict[str, list[int]]]
    labels: Tensor
    corrupted: dict[str, list[dict[str, list[int]]]] = field(default_factory=dict)


def typos(text: str, share: float, seed: int) -> str:
    """Each letter, with probability `share`, is dropped or swapped with the next character, one as likely as other."""
    generator, result, i = random.Random(f"typos {seed} {text}"), [], 0
    while i < len(text):
        if text[i].isalpha() and generator.random() < share:
            if generator.random() < 0.5 and i + 1 < len(text):
                result += [text[i + 1], text[i]]
                i += 1
        else:
            result.append(text[i])
        i += 1
    return "".join(result)


def without_words(text: str, share: float, seed: int) -> str:
    """Each word is dropped with probability `share`; one is kept at least."""
    generator, words = random.Random(f"words {seed} {text}"), text.split()
    kept = [word for word in words if generator.random() >= share]
    return " ".join(kept or words[:1])


def corrupt(text: str, kind: str) -> str:
    name, share = kind.split("_")
    return {"typos": typos, "words": without_words}[name](text, int(share) / 100, 0)


class Corpus:
    """A task's tokens: the pool to train on, the development set split from it, the test set; and the model."""

    def __init__(self, task: str) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        data = {"trec": real_data.load_trec, "stsb": real_data.load_stsb}[task]()
        source = real_data.minilm_path()
        self.classes = len(data.label_names) or 1
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=self.classes)
        self.norm = self.model.get_input_embeddings().weight.detach().norm(dim=1).mean().item()
        pairs = data.train.pairs or [""] * len(data.train.texts)
        rows = list(dict.fromkeys(zip(data.train.texts, pairs, data.train.labels, strict=True)))  # each once
        random.Random(0).shuffle(rows)
        self.pool = self._texts(rows[DEVELOPMENT:])
        self.parts = {"dev": self._texts(rows[:DEVELOPMENT], ("typos_10",))}
        pairs = data.test.pairs or [""] * len(data.test.texts)
        self._test = list(zip(data.test.texts, pairs, data.test.labels, strict=True))
        random.Random(0).shuffle(self._test)

    def part(self, name: str) -> Texts:
        """The development set, or the test set, whose tokens are made when it is first read."""
        if name not in self.parts:
            self.parts[name] = self._texts(self._test, CORRUPTIONS)
        return self.parts[name]

    def _texts(self, rows: Sequence[tuple[str, str, Any]], corruptions: Sequence[str] = ()) -> Texts:
        def tokens(pairs: Sequence[tuple[str, str]]) -> list[dict[str, list[int]]]:
            firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
            encoded = self.tokenizer(firsts, seconds if seconds[0] else None, truncation=True, max_length=128)
            return [{name: values[i] for name, values in encoded.items()} for i in range(len(pairs))]

        pairs = [row[:2] for row in rows]
        faulty = {k: [(corrupt(a, k), corrupt(b, k)) for a, b in pairs[:CORRUPTED]] for k in corruptions}
        labels = torch.tensor([row[2] for row in rows])
        return Texts(tokens(pairs), labels, {kind: tokens(pairs) for kind, pairs in faulty.items()})

    def batch(self, tokens: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Padded to the longest."""
        return dict(self.tokenizer.pad(list(tokens), return_tensors="pt"))

    def examples(self, run: Run) -> tuple[list[int], Tensor]:
        """Which of the pool a run trains on (of one seed, the smaller sets are within the larger), and all labels."""
        generator = torch.Generator().manual_seed(run.seed)
        chosen = torch.randperm(len(self.pool.tokens), generator=generator)[: run.size]
        labels = self.pool.labels.clone()
        if run.noise:
            wrong = chosen[torch.randperm(run.size, generator=generator)[: round(run.noise * run.size)]]
            labels[wrong] += torch.randint(1, self.classes, wrong.shape, generator=generator)
            labels %= self.classes
        return chosen.tolist(), labels


@functools.cache
def corpus_of(task: str) -> Corpus:
    return Corpus(task)


# -------------------------------------------------------------------------------------------------- training


def train(run: Run, corpus: Corpus) -> tuple[dict[float, dict[str, Tensor]], Tensor, dict[str, float]]:
    """The weights of the model by name, under 0, and of its averages, each under what `Run.average` calls it.

    No weight decay, so that rows of the vocabulary that no training example has do not move: the run trains the others
    alone, which is the same and half of the optimiser's work.

    Returns:
        The weights; the rows of the vocabulary that were trained; processor seconds and the terms of the last epoch.
    """
    chosen, labels = corpus.examples(run)
    torch.manual_seed(run.seed)
    model = copy.deepcopy(corpus.model).train()
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    rows = torch.unique(torch.tensor([i for e in chosen for i in corpus.pool.tokens[e]["input_ids"]] + [0]))
    model.set_input_embeddings(nn.Embedding.from_pretrained(corpus_rows(corpus)[rows].clone(), freeze=False))
    place = torch.zeros(len(corpus_rows(corpus)), dtype=torch.long)
    place[rows] = torch.arange(len(rows))

    published = "smart_pytorch" in run.settings
    config = {"lambda_s": 0.0, "mu": 0.0} if published else settings_of(run.settings, corpus.norm)
    smart = Smart(model, SmartConfig(**config, check=False), run.steps)
    own = {} if smart.teacher is None else {-1.0: smart.teacher}
    plain = not (config.get("lambda_s", 1.0) or config.get("mu", 1.0) or published)
    horizons = [run.average] if run.average > 0 else AVERAGES if plain and run.part == "dev" else []
    averages = {horizon: Teacher(model) for horizon in horizons}
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * run.steps), run.steps)
    terms = torch.zeros(3, dtype=torch.float64)
    step, begin = 0, time.process_time()
    for epoch in range(run.epochs):
        for members in batches(chosen, corpus.pool.tokens, run.batch, random.Random(1000 * run.seed + epoch)):
            batch = corpus.batch([corpus.pool.tokens[i] for i in members])
            batch = {**batch, "input_ids": place[batch["input_ids"]], "labels": labels[members]}
            if published:
                loss = smart_pytorch(model, batch, run.settings["smart_pytorch"])
                parts = [loss.detach(), loss.new_zeros(()), loss.new_zeros(())]
            else:
                out = smart(batch)
                loss, parts = out.loss, [out.task_loss, out.smoothness, out.proximal]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            smart.update()
            for horizon, average in averages.items():  # the mean of all steps, until there are more than it remembers
                average.update(1 - 1 / min(step + 1, max(1.0, horizon * run.steps)))
            step += 1
            if epoch == run.epochs - 1:
                terms += torch.stack(parts).double() * len(members) / run.size
    facts = {"seconds": round(time.process_time() - begin, 2)}
    facts |= dict(zip(("task_loss", "smoothness", "proximal"), map(rounded, terms.tolist()), strict=True))
    weights = {0.0: {name: p.detach() for name, p in model.named_parameters()}}
    weights |= {kind: average.parameters() for kind, average in (averages | own).items()}
    return weights, rows, facts


def batches(
    chosen: Sequence[int], tokens: Sequence[Mapping[str, list[int]]], size: int, generator: random.Random
) -> list[list[int]]:
    """The batches of an epoch, in random order. Within random groups texts of like length meet: less is padded."""
    order = generator.sample(chosen, len(chosen))
    groups = [order[first : first + GROUPED * size] for first in range(0, len(order), GROUPED * size)]
    alike = [i for group in groups for i in sorted(group, key=lambda i: len(tokens[i]["input_ids"]))]
    found = [alike[first : first + size] for first in range(0, len(alike), size)]
    return generator.sample(found, len(found))


def corpus_rows(corpus: Corpus) -> Tensor:
    """The word embeddings as they were before training."""
    rows: Tensor = corpus.model.get_input_embeddings().weight.detach()
    return rows


def smart_pytorch(model: nn.Module, batch: Mapping[str, Tensor], weight: float) -> Tensor:
    """The package's loss as its README has it, but on the word embeddings: a sum over the batch, perturbations of 1."""
    from smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss

    def evaluate(embeds: Tensor) -> Tensor:
        others = {name: batch[name] for name in ("attention_mask", "token_type_ids") if name in batch}
        logits: Tensor = model(inputs_embeds=embeds, **others).logits
        return logits

    embeds = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    state = evaluate(embeds)
    if state.shape[-1] == 1:
        task, kinds = F.mse_loss(state.squeeze(-1), batch["labels"]), (F.mse_loss, F.mse_loss)
    else:
        task, kinds = F.cross_entropy(state, batch["labels"]), (kl_loss, sym_kl_loss)
    return task + weight * SMARTLoss(evaluate, kinds[0], loss_last_fn=kinds[1])(embeds, state)


# ------------------------------------------------------------------------------------------------- measuring


def restore(corpus: Corpus, weights: Mapping[str, Tensor], rows: Tensor) -> nn.Module:
    """A model with these weights and the whole vocabulary."""
    model = copy.deepcopy(corpus.model).eval()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter is table:
                table[rows] = weights[name]
            else:
                parameter.copy_(weights[name])
    return model


@torch.inference_mode()
def predict(model: nn.Module, corpus: Corpus, tokens: Sequence[Mapping[str, list[int]]]) -> Tensor:
    """Logits, of texts in order of their length."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]["input_ids"]))
    found = [model(**corpus.batch([tokens[i] for i in order[b : b + 64]])).logits for b in range(0, len(order), 64)]
    logits = torch.cat(found)
    result = torch.empty_like(logits)
    result[order] = logits
    return result


def quality(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Of classes accuracy (per cent), NLL and ECE; of numbers 100 times Pearson's and Spearman's correlation, MSE."""
    logits = logits.double()
    if logits.shape[1] > 1:
        sure, found = logits.softmax(-1).max(-1)
        right = (found == labels).double()
        return {
            "score": 100 * right.mean().item(),
            "nll": F.cross_entropy(logits, labels).item(),
            "ece": 100 * calibration_error(sure, right),
        }
    values, labels = logits.squeeze(-1), labels.double()
    ranks = [torch.tensor(average_ranks(x.tolist()), dtype=torch.float64) for x in (values, labels)]
    return {
        "score": 100 * correlation(values, labels),
        "spearman": 100 * correlation(*ranks),
        "mse": (values - labels).square().mean().item(),
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; 0 where one of the two is constant, as the predictions of a model that learnt nothing may be."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].nan_to_num(0.0).item()


def calibration_error(sure: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599), with bins of equal width."""
    bins = (sure * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right.double() - sure.double())
    return gaps.abs().sum().item() / len(sure)


def average_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, i = [0.0] * len(values), 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
            j += 1
        for k in range(i, j + 1):
            ranks[order[k]] = (i + j) / 2 + 1
        i = j + 1
    return ranks


def roughness(model: nn.Module, corpus: Corpus, tokens: Sequence[Mapping[str, list[int]]], radius: float) -> float:
    """R_s, the mean over examples of the largest divergence on the way of 20 steps of sign ascent in the l_inf ball."""
    batch = corpus.batch(tokens)
    words = model.get_input_embeddings()(batch.pop("input_ids")).detach()  # type: ignore[operator]
    mask = batch["attention_mask"].unsqueeze(-1)

    def divergence(delta: Tensor) -> Tensor:
        logits = model(inputs_embeds=words + delta * mask, **batch).logits.double()
        if logits.shape[1] == 1:
            return (logits - clean).square().squeeze(-1)  # type: ignore[no-any-return]
        return symmetric_kl(logits, clean, reduction="none")

    with torch.no_grad():
        clean = model(inputs_embeds=words, **batch).logits.double()
    delta = torch.randn(words.shape, generator=torch.Generator().manual_seed(0)) * radius / 10
    most = torch.zeros(len(words), dtype=torch.float64)
    for _ in range(ASCENT_STEPS):
        delta.requires_grad_()
        values = divergence(delta)
        (gradient,) = torch.autograd.grad(values.sum(), delta)
        most = torch.maximum(most, values.detach())
        delta = (delta.detach() + radius / 4 * gradient.sign()).clamp(-radius, radius)
    with torch.no_grad():
        return torch.maximum(most, divergence(delta)).mean().item()


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def measure(run: Run, corpus: Corpus, model: nn.Module, faults: bool) -> dict[str, float]:
    """What is known of a model on a run's part of the data; with faults in the texts on request."""
    part = corpus.part(run.part)
    found = quality(predict(model, corpus, part.tokens), part.labels)
    for kind, tokens in part.corrupted.items() if faults else ():
        for name, value in quality(predict(model, corpus, tokens), part.labels[: len(tokens)]).items():
            found[f"{kind}_{name}"] = value
    if run.part == "test":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for radius in RADII:
            found[f"smoothness_{radius:g}"] = roughness(model, corpus, part.tokens[:ASCENT_EXAMPLES], radius)
    return {name: rounded(value) for name, value in found.items()}


def execute(run: Run) -> dict[str, Any]:
    """Train and measure: facts of the training and, by kind of weights, what was measured.

    Kinds are named as in `Run.average`. On test data the one that it asks for is measured, on development data all.
    """
    torch.set_num_threads(1)
    corpus = corpus_of(run.task)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"lambda_s \* R_s is")  # it is among what is studied
        weights, rows, facts = train(run, corpus)
    asked = weights if run.part == "dev" else {run.average: weights[run.average]}
    begin = time.process_time()
    measured = {
        f"{kind:g}": measure(run, corpus, restore(corpus, values, rows), faults=kind == run.average)
        for kind, values in asked.items()
    }
    return {**facts, "measuring": round(time.process_time() - begin, 2), "measured": measured}

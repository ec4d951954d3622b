"""How strong the adversaries are on a pretrained encoder and real questions: the bench's own measure of it."""

from __future__ import annotations

import importlib.util
import re
import statistics
from pathlib import Path

import pytest
import torch
import transformers

import bench_smart
import real_data
from harness import Case, Timing
from smart_kernels import Smart, SmartConfig

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "finetune.py"
QUESTIONS, SEEDS = 8, 2


@pytest.mark.parametrize("classes", bench_smart.STRENGTH_CLASSES)
def test_strength(classes: int) -> None:
    """R_s at the paper's radius over that of 20 steps of sign ascent in float64; a head as sure as a trained one."""
    try:
        cases = [bench_smart.Strength(classes, 1.0, QUESTIONS, seed, "cpu") for seed in range(SEEDS)]
    except real_data.UnavailableError as error:
        pytest.skip(str(error))

    def mean(adversary: str, autocast: torch.dtype | None = None) -> float:
        return statistics.mean(case.of(adversary, autocast) for case in cases)

    assert mean("power") >= 0.65
    assert (predicted := mean("predicted")) >= 0.80
    assert mean("predicted", torch.bfloat16) >= 0.95 * predicted
    assert mean("random") < 0.05


@pytest.mark.usefixtures("one_thread")
def test_the_bench_compares_like_with_like() -> None:
    """Its loop in plain PyTorch and ours give the same loss, at a radius where two kl_div still have digits."""
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=20,
            num_labels=3,
        )
    ).eval()
    words = torch.randint(0, 20, (4, 5))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": torch.tensor([0, 1, 2, 0])}
    expected = Smart(model, SmartConfig(), 10)(batch).loss
    for loss in (bench_smart.pytorch_loop(model, batch, model), bench_smart.r3f(model, batch)):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # at 1e-5 the terms are rounding noise
    before = model.classifier.weight.clone()
    for peer in bench_smart.peers_of(model):
        if peer.name != "smart-pytorch" or importlib.util.find_spec("smart_pytorch"):
            peer.call(batch)
            assert not torch.equal(model.classifier.weight, before), peer.name
            before = model.classifier.weight.clone()


def test_tables_and_figures(tmp_path: Path) -> None:
    timings = [Timing(name, name, time, time, time, 5, 1, 10**6) for name, time in (("vanilla", 0.1), ("power", 0.26))]
    case = Case("a model", "", ("vanilla",), None, timings, [])
    assert bench_smart.costs(case) == pytest.approx({"vanilla": 1, "power": 2.6})
    assert re.search(r"smart_kernels power .*260 ms .* 2\.60 +2\.67 +1.00 MB", bench_smart.cost_table([case]))
    shares = {f"{adversary}, fp32": [1.0, 0.9, 0.8, 4e-5] for adversary in bench_smart.ADVERSARIES}
    strength = {"sure": {"classes": (2, 3, 6, 10), "probability_of_the_first": [0.9, 0.8, 0.7, 0.6], "share": shares}}
    assert re.search(r"predicted, fp32 +1\.000 +0\.900 +0\.800 +4e-05", bench_smart.strength_table(strength))
    pytest.importorskip("matplotlib")
    for figure in (bench_smart.cost_figure([case], "title", ""), bench_smart.strength_figure(strength, "title", "")):
        figure.savefig(tmp_path / "figure.png")


def test_example_counts_and_compares() -> None:
    specification = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    assert specification is not None
    finetune = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(finetune)
    runs = [
        {"method": method, "seed": seed, "score": score + seed, "seconds": 1.0, "task_loss": [1.0, 0.5],
         "smoothness": [0.0, 1e-9], "proximal": [0.0, 0.1]}
        for method, score in (("vanilla", 50.0), ("smart", 52.0)) for seed in range(3)
    ]  # fmt: skip
    text = finetune.table(runs, ["vanilla", "smart"], "accuracy")
    assert re.search(r"smart +52\.0  53\.0  54\.0  53\.0 +± 1\.0 +52\.0 … 54\.0 +\+2\.0", text)
    assert finetune.arguments([]).seeds >= 3
    assert {"vanilla", "smart", "r3f"} <= finetune.METHODS.keys()
    for options in finetune.METHODS.values():
        SmartConfig(**options)

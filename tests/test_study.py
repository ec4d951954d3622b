"""The study's own logic: keys, resuming, choice by development data alone, statistics, and what a run is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")
import transformers

import study
import study_plan
import study_report
import study_run
from study_plan import Cell, Trial, outcome
from study_run import Corpus, Run, Texts

CELLS = (Cell("trec", 100), Cell("trec", 50))
PLAIN = study_plan.METHODS[0]


def invented(run: Run, better: Mapping[str, float] = {}) -> dict[str, Any]:
    """A result that is a function of the run, as a true one is."""
    chance = random.Random(run.key)
    kinds = [f"{kind:g}" for kind in (0.0, -1.0, *study_run.AVERAGES)] if run.part == "dev" else [f"{run.average:g}"]
    names = {m.key: m.form for task in study_report.MEASURES.values() for m in task}
    measured = {kind: {name: 50 + chance.random() for name in names} for kind in kinds}
    for one in measured.values():
        one["score"] += better.get(run.settings.get("adversary", "none"), 0.0)
    terms = {"task_loss": 0.1, "smoothness": 1e-9, "proximal": 0.0}
    return {"seconds": 1.0, "measuring": 1.0, **terms, "measured": measured}


def complete(results: dict[str, Any], cells: tuple[Cell, ...] = CELLS, **better: float) -> dict[str, Any]:
    while lacking := list(study_plan.plan(results, cells)):
        results |= {run.key: invented(run, better) for run in lacking}
    return results


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    return complete({})


# ---------------------------------------------------------------------------------------------- keys and the file


def test_a_key_is_the_whole_configuration() -> None:
    run = Run("trec", 100, {"lambda_s": 1.0, "mu": 0.0}, 1e-4, 10, 3, "dev")
    assert Run(**json.loads(run.key)) == run
    assert dataclasses.replace(run, settings={"mu": 0.0, "lambda_s": 1.0}).key == run.key
    others = {"task": "stsb", "size": 50, "settings": {}, "lr": 2e-4, "epochs": 9, "seed": 4, "part": "test"}
    others |= {"noise": 0.1, "average": 0.4, "batch": 8}
    assert others.keys() == {f.name for f in dataclasses.fields(Run)}
    assert len({dataclasses.replace(run, **{k: v}).key for k, v in others.items()} | {run.key}) == len(others) + 1


def test_the_file_goes_on_after_a_kill(tmp_path: Path, finished: dict[str, Any]) -> None:
    growing, packed = tmp_path / "runs.jsonl", tmp_path / "runs.jsonl.gz"
    first, second, third = (Run(**json.loads(key)) for key in list(finished)[:3])
    study_plan.append(growing, first, finished[first.key])
    with growing.open("a") as file:
        file.write('{"run": {"task": "tr')  # killed here
    assert study_plan.read(packed, growing) == {first.key: finished[first.key]}
    study_plan.append(growing, second, finished[second.key])
    both = {run.key: finished[run.key] for run in (first, second)}
    assert study_plan.read(packed, growing) == both
    study_plan.pack(both, packed)
    content = packed.read_bytes()
    study_plan.pack(dict(reversed(both.items())), packed)
    assert packed.read_bytes() == content
    growing.unlink()
    study_plan.append(growing, third, finished[third.key])
    assert study_plan.read(packed, growing) == {**both, third.key: finished[third.key]}


def test_the_runs_of_the_repository_are_runs_of_the_plan() -> None:
    for key, result in study_plan.read(study_plan.PACKED).items():
        run = Run(**json.loads(key))
        assert run.key == key
        cell = Cell(run.task, run.size, run.noise)
        repeated = study_plan.further_seeds(cell) if cell in dict(study_plan.REPEATED) else ()
        seeds = study_plan.TUNING_SEEDS if run.part == "dev" else (*range(study_plan.SEEDS[run.size]), *repeated)
        assert run.seed in seeds
        assert all(-100 <= one["score"] <= 100 for one in result["measured"].values())


# ------------------------------------------------------------------------------------------- the plan and the choice


def test_killed_anywhere_it_ends_with_the_same_runs(finished: dict[str, Any]) -> None:
    order = list(finished)
    for cut in (1, 40, 100, len(order) - 5):
        results = {key: finished[key] for key in order[:cut]}
        assert complete(results).keys() == finished.keys()
    some = {key: finished[key] for key in random.Random(0).sample(order, len(order) // 2)}
    assert finished.keys() <= complete(some).keys()  # a run that was chosen by data that is lost may be among them


def test_no_run_is_asked_for_twice(finished: dict[str, Any]) -> None:
    keys = [run.key for run in study_plan.plan({}, CELLS)]
    assert len(keys) == len(set(keys))
    assert not list(study_plan.plan(finished, CELLS))


class Guarded(dict[str, Any]):
    """Results of which those on test data may not be read."""

    def __getitem__(self, key: str) -> Any:
        assert json.loads(key)["part"] == "dev"
        return super().__getitem__(key)


def test_development_data_alone_choose(finished: dict[str, Any]) -> None:
    guarded = Guarded(finished)
    assert not list(study_plan.plan(guarded, CELLS))
    for cell in CELLS:
        for method in study_plan.METHODS:
            outcome(study_plan.final(guarded, method, cell))
    # whatever the test set says, the same is chosen
    without = {key: value for key, value in finished.items() if json.loads(key)["part"] == "dev"}
    asked = {run.key for run in study_plan.plan(without, CELLS)}
    assert asked == finished.keys() - without.keys()
    runs = [Run(**json.loads(key)) for key in finished]
    tuning, final = ({r.seed for r in runs if r.part == part} for part in ("dev", "test"))
    assert not tuning & final
    assert not (tuning | final) & set(study.QUICK_SEEDS)


def test_what_is_found_again_has_other_seeds(finished: dict[str, Any]) -> None:
    for cell, name in study_plan.REPEATED:
        seeds = study_plan.further_seeds(cell)
        used = {*range(study_plan.SEEDS[cell.size]), *study_plan.TUNING_SEEDS, *study.QUICK_SEEDS}
        assert len(seeds) == study_plan.SEEDS[cell.size]
        assert not used & set(seeds)
        runs = outcome(study_plan.repeated(finished, (*study_plan.BESIDE, name), cell, seeds))
        for method, again in runs.items():
            first = outcome(study_plan.final(finished, study_plan.named(method), cell))
            assert [dataclasses.replace(r, seed=0) for r in first] == [dataclasses.replace(r, seed=0) for r in again]
        table = study_report.again(finished, finished, runs, cell)
        ours, theirs = (study_report.values_of(finished, runs[m])["score"] for m in (name, "plain"))
        expected = study_report.paired(ours, theirs)
        measure = study_report.MEASURES[cell.task][0]
        assert table[2][1:5] == [
            name,
            f"{sum(ours) / len(ours):.1f}",
            study_report.difference_text(expected, measure),
            study_report.p_text(expected.p),
        ]
        assert f"## Found again? {name}" in study_report.document(finished, False)


def test_the_best_on_development_data_is_chosen_the_first_among_equals() -> None:
    cell, trials = CELLS[0], [Trial({"mu": float(i)}, 1e-4, 5) for i in range(3)]

    def results(*scores: float) -> dict[str, Any]:
        pairs = zip(trials, scores, strict=True)
        return {
            run.key: {"measured": {"0": {"score": score + place}}}
            for trial, score in pairs
            for place, run in enumerate(study_plan.development_runs(cell, trial))
        }

    assert outcome(study_plan.pick(results(1, 3, 2), cell, trials)) == trials[1]
    assert outcome(study_plan.pick(results(2, 1, 2), cell, trials)) == trials[0]
    lacking = results(1, 2, 3)
    del lacking[study_plan.development_runs(cell, trials[0])[1].key]
    assert outcome(study_plan.pick(lacking, cell, trials)) is None
    assert [run.key for run in list(_until_waiting(study_plan.pick(lacking, cell, trials)))] == [
        study_plan.development_runs(cell, trials[0])[1].key
    ]


def _until_waiting(steps: Iterator[Run]) -> Iterator[Run]:
    try:
        yield from steps
    except study_plan.LackingRunsError:
        return


def test_every_method_has_the_same_budget_and_plain_more(finished: dict[str, Any]) -> None:
    pairs: dict[str, set[tuple[float, int]]] = {}
    for key in finished:
        run = Run(**json.loads(key))
        if run.part == "dev" and run.size == study_plan.HOME.size:
            pairs.setdefault(json.dumps(run.settings, sort_keys=True), set()).add((run.lr, run.epochs))
    for method in study_plan.METHODS:
        settings = outcome(study_plan.tuned(finished, method, CELLS[0])).settings
        tried, plain = (pairs[json.dumps(one, sort_keys=True)] for one in (settings, PLAIN.settings))
        assert tried <= plain
        assert len(tried) >= 9 if settings == PLAIN.settings else len(tried) == len(study_plan.NEIGHBOURS)


def test_what_is_far_behind_does_not_come_to_the_test_set() -> None:
    margin = study_plan.MARGIN
    results = complete({}, CELLS, predicted=-margin - 2, random=-margin + 0.9)
    names = {row.method.name for row in study_report.finished(results, CELLS[0])}
    assert not {"R_s, predicted", "SMART, tuned"} & names
    assert {"plain", "R3F"} <= names
    assert any(line.startswith("R_s, predicted (") for line in study_report.screened_out(results))


def test_elsewhere_go_fixed_methods_as_they_are_tuned_at_home() -> None:
    results = complete({}, CELLS, predicted=-5.0)  # behind on all development data
    home, cell = CELLS
    names = [row.method.name for row in study_report.finished(results, cell)]
    assert names == list(study_plan.EVERYWHERE)
    plain, plain_there = (outcome(study_plan.tuned(results, PLAIN, c)) for c in (cell, home))
    assert (plain.lr, plain.epochs) in study_plan.grid(cell)
    for method in map(study_plan.named, study_plan.EVERYWHERE[2:]):
        own, there = (outcome(study_plan.tuned(results, method, c)) for c in (cell, home))
        assert own.settings == there.settings
        assert own.lr / plain.lr == pytest.approx(there.lr / plain_there.lr)
        assert own.epochs == round(plain.epochs * there.epochs / plain_there.epochs)
    tried = [Run(**json.loads(key)) for key in results]
    assert {json.dumps(r.settings) for r in tried if r.size == cell.size and r.part == "dev"} == {
        json.dumps(PLAIN.settings)
    }


def test_plain_is_also_given_the_passes_of_the_smoothness_term(finished: dict[str, Any]) -> None:
    smooth, longer = (study_plan.named(name) for name in ("R_s, predicted", study_plan.LONGER))
    for cell in CELLS:
        ours, plain, dear = (outcome(study_plan.tuned(finished, m, cell)) for m in (longer, PLAIN, smooth))
        assert ours.settings == PLAIN.settings
        assert ours.epochs == pytest.approx(dear.epochs * study_run.passes(dear.settings), abs=0.5)
        assert ours.lr / plain.lr in study_plan.LONGER_RATES
        rows = {row.method.name: row.values for row in study_report.finished(finished, cell)}
        pairs = zip(rows[smooth.name]["score"], rows[longer.name]["score"], strict=True)
        mean = sum(a - b for a, b in pairs) / study_plan.SEEDS[cell.size]
        assert f"accuracy, % {mean:+.1f} [" in study_report.as_dear(rows[smooth.name], rows[longer.name], cell)


def test_methods_that_begin_with_others_have_the_terms_of_both(finished: dict[str, Any]) -> None:
    both = outcome(study_plan.screened(finished, study_plan.named("SMART, tuned")))
    proximal, smooth = (
        outcome(study_plan.screened(finished, study_plan.named(name))) for name in ("D_Breg", "R_s, predicted")
    )
    assert both == {**proximal, **smooth, "mu": proximal["mu"], "lambda_s": smooth["lambda_s"]}
    detached = outcome(study_plan.screened(finished, study_plan.METHODS[-3]))
    assert detached == {**smooth, "detach_clean": True}


def test_all_settings_are_those_of_a_config(finished: dict[str, Any]) -> None:
    for key in finished:
        assert 1 <= study_run.passes(json.loads(key)["settings"]) <= 3
    assert study_run.passes(PLAIN.settings) == 1
    assert study_run.passes({}) == pytest.approx(3)
    assert study_run.passes({"mu": 0.0, "adversary": "predicted"}) == pytest.approx(7 / 3)


def test_runs_are_executed_until_none_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda count, **options: ThreadPoolExecutor(count))
    monkeypatch.setattr(study, "execute", invented)
    monkeypatch.setattr(study.os, "environ", {})
    results: dict[str, Any] = {}
    file = tmp_path / "runs.jsonl"
    wanted = list(study_plan.plan({}, CELLS[:1]))
    study.work(lambda known: [run for run in wanted if run.key not in known], results, file, 3, len(wanted))
    assert results.keys() == {run.key for run in wanted}
    assert study_plan.read(file) == results
    assert len(file.read_text().splitlines()) == len(results)  # none of them twice


# ------------------------------------------------------------------------------------------- statistics and report


def test_statistics() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [3.0, 5.0, 4.0, 8.0, 6.5], [1.0, 5.5, 2.0, 5.0, 6.0]
    found, known = study_report.paired(ours, theirs), stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(known.pvalue)
    low, high = known.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.up, found.seeds) == (pytest.approx(1.4), 4, 5)
    assert study_report.paired([1.0, 2.0], [1.0, 2.0]).p == 1
    with pytest.raises(ValueError, match="got 1 and 2 values"):
        study_report.paired([1.0], [1.0, 2.0])
    low, high = stats.t.interval(0.95, 4, sum(ours) / 5, stats.sem(ours))
    assert study_report.interval(ours) == pytest.approx((low, high))


def test_holm() -> None:
    """By hand: 4 × 0.01, then 3 × 0.02, 2 × 0.04 and 0.5 itself, none below what stands before it."""
    assert study_report.holm([0.04, 0.01, 0.5, 0.02]) == pytest.approx([0.08, 0.04, 0.5, 0.06])
    assert study_report.holm([0.02, 0.021]) == pytest.approx([0.04, 0.04])
    assert study_report.holm([0.9, 0.8]) == [1.0, 1.0]
    assert study_report.holm([]) == []


def test_a_row_stands_when_all_of_its_seeds_are_there(finished: dict[str, Any]) -> None:
    rows = study_report.finished(finished, CELLS[0])
    assert [len(row.runs) for row in rows] == [10] * len(rows)
    last = rows[-1]
    fewer = {key: value for key, value in finished.items() if key != last.runs[3].key}
    names = [row.method.name for row in study_report.finished(fewer, CELLS[0])]
    assert names == [row.method.name for row in rows[:-1]]
    assert [run.key for run in study_plan.remaining(fewer, CELLS)] == [last.runs[3].key]
    plain = {key: value for key, value in finished.items() if key != rows[0].runs[0].key}
    assert not study_report.finished(plain, CELLS[0])  # with nothing to compare with


def test_what_is_written(finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr(study_report, "CELLS", CELLS[:1])
    monkeypatch.setattr(study_report, "remaining", lambda results: study_plan.remaining(results, CELLS[:1]))
    study_report.write({}, tmp_path)
    assert "No row is complete yet" in (tmp_path / "study.md").read_text(encoding="utf-8")
    runs = study_report.quick_runs({}, study.QUICK_SEEDS)
    again = {run.key: invented(run) for of_method in runs.values() for run in of_method}
    assert "not yet" in study_report.quick_table({}, again, runs)
    results = complete({}, CELLS[:1], power=20.0)
    monkeypatch.setattr(study_plan, "PACKED", tmp_path / "docs" / "runs.jsonl.gz")
    monkeypatch.setattr(study_plan, "GROWING", tmp_path / "runs.jsonl")
    study_plan.PACKED.parent.mkdir()
    study_plan.GROWING.write_text("".join(study_plan.line_of(key, result) for key, result in results.items()))
    study.main(["--report"])
    assert study_plan.read(study_plan.PACKED) == results
    assert (tmp_path / "docs" / "study.md").read_text(encoding="utf-8") == study_report.document(
        results, (tmp_path / "docs" / "study.png").exists()
    )
    text = study_report.document(results, True)
    assert "Still to run: 0 at most" in text
    (line,) = [x for x in text.splitlines() if x.startswith("- **R_s, power**") and "TREC" not in x][:1]
    assert "better: accuracy, % +2" in line
    rows = study_report.finished(results, CELLS[0])
    (row,) = [x for x in text.splitlines() if x.startswith("| R_s, power | ")][:1]
    assert "| 10 |" in row
    score = sum(rows[0].values["score"]) / 10
    assert f"| {score:.1f} ± " in text
    runs = study_report.quick_runs(results, study.QUICK_SEEDS)
    assert list(runs) == list(study_report.QUICK)
    again = {run.key: invented(run) for of_method in runs.values() for run in of_method}
    assert "not yet" not in study_report.quick_table(results, again, runs)
    for name, of_method in runs.items():
        tuned = outcome(study_plan.tuned(results, study_plan.named(name), CELLS[0]))
        assert {(run.lr, run.epochs, run.part) for run in of_method} == {(tuned.lr, tuned.epochs, "test")}


# -------------------------------------------------------------------------------------------------------- a run


def test_typos_and_dropped_words() -> None:
    text = "What is the capital of Burkina Faso ? " * 50
    assert study_run.typos(text, 0.0, 0) == text
    assert study_run.typos(text, 0.1, 0) == study_run.typos(text, 0.1, 0) != study_run.typos(text, 0.1, 1)
    letters = sum(map(str.isalpha, text))
    dropped = len(text) - len(study_run.typos(text, 0.1, 0))
    # half of the faults drop a letter; three standard deviations of a binomial
    assert abs(dropped - 0.05 * letters) < 3 * math.sqrt(0.05 * letters)
    swapped = study_run.typos("ab", 1.0, 3)
    assert swapped in {"", "ba", "b", "a"}
    kept = study_run.without_words(text, 0.1, 0).split()
    assert abs(len(kept) - 0.9 * len(text.split())) < 3 * math.sqrt(0.09 * len(text.split()))
    assert study_run.without_words("one two", 1.0, 0) == "one"
    assert study_run.corrupt(text, "typos_10") == study_run.typos(text, 0.1, 0)


def test_measures_by_hand() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.6, 0.4]]).log()
    found = study_run.quality(logits, torch.tensor([0, 1, 1, 1]))
    assert found["score"] == 50
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.7) + math.log(0.4)) / 4)
    # bins: two of 0.9, one right; one of 0.7, right; one of 0.6, wrong
    assert found["ece"] == pytest.approx(100 * (2 * 0.4 + 0.3 + 0.6) / 4, rel=1e-5)
    stats = pytest.importorskip("scipy.stats")
    values, labels = torch.tensor([[1.0], [2.0], [2.0], [0.5]]), torch.tensor([1.0, 3.0, 2.0, 2.0])
    found = study_run.quality(values, labels)
    assert found["score"] == pytest.approx(100 * stats.pearsonr(values[:, 0], labels).statistic)
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(values[:, 0], labels).statistic)
    assert found["mse"] == pytest.approx(2.25 / 4 + 1 / 4)
    assert study_run.quality(torch.ones(4, 1), labels)["score"] == 0


@pytest.fixture
def corpus() -> Corpus:
    """60 texts of four words out of 50, their class told by the first, and a small BERT."""
    corpus = object.__new__(Corpus)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, **sizes, num_labels=3)
    corpus.model, corpus.classes = transformers.BertForSequenceClassification(config), 3
    corpus.norm = corpus.model.get_input_embeddings().weight.detach().norm(dim=1).mean().item()
    words = torch.randint(1, 50, (60, 4)).tolist()
    tokens = [{"input_ids": w, "attention_mask": [1] * 4} for w in words]
    texts = Texts(tokens, torch.tensor([w[0] % 3 for w in words]), {"typos_10": tokens[:5]})
    corpus.pool, corpus.parts = texts, {"dev": texts, "test": texts}

    class Padding:
        def pad(self, chosen: Any, return_tensors: str) -> dict[str, torch.Tensor]:
            return {name: torch.tensor([one[name] for one in chosen]) for name in chosen[0]}

    corpus.tokenizer = Padding()
    return corpus


def test_examples_are_nested_and_as_many_labels_wrong_as_said(corpus: Corpus) -> None:
    few, labels = corpus.examples(Run("trec", 10, {}, 1e-3, 1, 3, "dev"))
    more, _ = corpus.examples(Run("trec", 40, {}, 1e-3, 1, 3, "dev"))
    assert few == more[:10]
    assert torch.equal(labels, corpus.pool.labels)
    _, wrong = corpus.examples(Run("trec", 40, {}, 1e-3, 1, 3, "dev", noise=0.3))
    changed = (wrong != labels).nonzero().flatten().tolist()
    assert len(changed) == 12
    assert set(changed) <= set(more)
    assert set(wrong.tolist()) <= {0, 1, 2}


def test_batches_have_each_example_once_and_little_padding() -> None:
    tokens = [{"input_ids": [1] * random.Random(i).randint(5, 40)} for i in range(300)]
    chosen = list(range(50, 250))
    one = study_run.batches(chosen, tokens, 16, random.Random(0))
    assert sorted(itertools.chain(*one)) == chosen
    assert sorted(map(len, one)) == [8] + 12 * [16]
    assert one == study_run.batches(chosen, tokens, 16, random.Random(0))
    assert one != study_run.batches(chosen, tokens, 16, random.Random(1))

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(len(tokens[i]["input_ids"]) for i in batch) for batch in batches)

    mixed = [chosen[first : first + 16] for first in range(0, 200, 16)]
    assert padded(one) < 0.8 * padded(mixed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("average", [0.0, 0.4])
def test_a_run_with_the_words_of_its_examples_is_one_with_all(corpus: Corpus, average: float) -> None:
    """The same training, written down without the short cut."""
    run = Run("trec", 20, PLAIN.settings, 1e-3, 3, 5, "test", average=average)
    weights, rows, facts = study_run.train(run, corpus)
    got = study_run.restore(corpus, weights[average], rows)

    chosen, labels = corpus.examples(run)
    torch.manual_seed(run.seed)
    twin = transformers.BertForSequenceClassification(corpus.model.config)
    twin.load_state_dict(corpus.model.state_dict())
    torch.manual_seed(run.seed)
    nn.init.normal_(twin.classifier.weight, std=0.02)
    nn.init.zeros_(twin.classifier.bias)
    optimizer, losses = torch.optim.Adam(twin.train().parameters(), lr=run.lr), []
    mean = {name: p.detach().clone() for name, p in twin.named_parameters()}
    epochs = [study_run.batches(chosen, corpus.pool.tokens, 16, random.Random(5000 + epoch)) for epoch in range(3)]
    for step, members in enumerate(itertools.chain(*epochs)):  # of 16 and of 4, in some order; none of them warms up
        words = torch.tensor([corpus.pool.tokens[i]["input_ids"] for i in members])
        loss = F.cross_entropy(twin(input_ids=words, attention_mask=torch.ones_like(words)).logits, labels[members])
        losses.append(len(members) / 20 * loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = run.lr * (6 - step) / 6
        optimizer.step()
        optimizer.zero_grad()
        for name, p in twin.named_parameters():  # the mean of all so far, then an average that remembers 2.4 steps
            mean[name] += (p.detach() - mean[name]) / min(step + 1, 0.4 * 6)
    expected = mean if average else dict(twin.named_parameters())
    for name, p in got.named_parameters():
        # Adam divides by gradients that may be as small as rounding: a few steps of 1e-3 differ by 1e-5 at most
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-5, msg=name)
    assert facts["task_loss"] == pytest.approx(sum(losses[-2:]), rel=1e-4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("settings", [{"adversary": "predicted", "epsilon": 0.05}, {"relative": 0.3, "mu": 0.0}])
def test_a_run_is_a_function_of_its_configuration(
    settings: dict[str, Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_run, "corpus_of", lambda task: corpus)
    run = Run("trec", 20, settings, 1e-3, 2, 5, "test")
    first, second = study_run.execute(run), study_run.execute(run)
    assert first["measured"] == second["measured"]
    (measured,) = first["measured"].values()
    assert {"score", "nll", "ece", "typos_10_score", "smoothness_0.01"} <= measured.keys()
    assert 0 < measured["smoothness_0.001"] < measured["smoothness_0.01"]
    assert first["smoothness"] > 0
    on_development = study_run.execute(dataclasses.replace(run, part="dev"))
    assert on_development["measured"].keys() == ({"0"} if settings.get("mu") == 0 else {"0", "-1"})
    assert on_development["measured"]["0"]["score"] == measured["score"]

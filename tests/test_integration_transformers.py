"""SmartTrainer: tasks, architectures, accumulation, logs, the teacher, arguments, resuming, what else Trainer does."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("accelerate")
import transformers
from hf_tasks import NO_DROPOUT, SIZES, TASKS, trainer_for

import smart_kernels
from smart_kernels import Smart, SmartConfig
from smart_kernels.integrations import transformers as integration
from smart_kernels.integrations.transformers import (
    SmartTrainer,
    SmartTrainingArguments,
    last_complete_checkpoint,
    what_lacks,
)
from smart_kernels.smart import gradients, objective
from smart_kernels.smart.embedding import find_embedding
from smart_kernels.smart.state import Attributes

pytestmark = pytest.mark.usefixtures("one_thread")

BALL: dict[str, Any] = {"smart_epsilon": 0.1, "smart_noise_std": 0.05, "smart_step_size": 0.15, "smart_decay": 0.5}
QUIET: dict[str, Any] = {"smart_epsilon": 0.1, "smart_noise_std": 0.0, "smart_adversary": "predicted"}  # without chance


def parameters(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, p in expected.items():
        assert torch.equal(actual[name], p), name


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", TASKS)
def test_every_architecture_learns(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    task = TASKS[name]
    trainer = trainer_for(task, tmp_path, max_steps=30, smart_adversary="predicted", **BALL)
    trainer.train()
    package = str(Path(smart_kernels.__file__).parent)
    assert not [w for w in recwarn if str(w.filename).startswith(package)]
    assert not [record for record in caplog.records if record.name.startswith("smart_kernels")]
    history = logged(trainer)
    assert sum(h["task_loss"] for h in history[-4:]) < sum(h["task_loss"] for h in history[:4])
    assert all(h["smoothness"] > 0 for h in history)
    assert history[-1]["proximal"] > 0
    assert history[-1]["skipped_samples"] == 0

    plain = trainer_for(task, tmp_path, trainer.model, transformers.Trainer)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_without_terms_it_is_trainer_to_the_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain = trainer_for(TASKS[name], tmp_path, trainer=transformers.Trainer, **options)
    plain.train()
    smart = trainer_for(TASKS[name], tmp_path, smart_lambda_s=0.0, smart_mu=0.0, **options)
    smart.train()
    assert_equal(parameters(smart), parameters(plain))
    assert [h["loss"] for h in logged(smart)] == [h["loss"] for h in logged(plain)]


@pytest.mark.parametrize("adversary", ["power", "predicted"])
@pytest.mark.parametrize("name", NO_DROPOUT)
def test_four_micro_batches_equal_a_large_one(
    name: str, adversary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a micro-batch has fewer tokens, and where the model's loss ignores how many items there are.

    Noise by the embeddings, the same however the examples are split. Two steps: the teacher is away in the second.
    """
    monkeypatch.setattr(objective, "init_perturbation", lambda embeds, std, *_: std * torch.sin(1e3 * embeds.detach()))
    results = []
    for size, micro in ((8, 1), (2, 4)):
        trainer = trainer_for(
            TASKS[name],
            tmp_path,
            TASKS[name].build(**NO_DROPOUT[name]),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=micro,
            max_steps=2,
            optim="sgd",
            smart_adversary=adversary,
            smart_lambda_s=3.0,
            **BALL,
        )
        trainer.train()
        assert trainer.smart.state_dict()["updates"] == 2
        results.append((parameters(trainer), trainer.smart.teacher.shadows, logged(trainer)))
    (student, teacher, history), (others, shadows, others_history) = results
    for expected, actual in ((student, others), (teacher, shadows)):
        for key, p in expected.items():
            torch.testing.assert_close(actual[key], p, rtol=1e-6, atol=1e-6)
    for h, other in zip(history, others_history, strict=True):
        for key in ("loss", "task_loss", "smoothness", "proximal"):
            assert math.isclose(other[key], h[key], rel_tol=1e-4, abs_tol=1e-9), (
                key
            )  # logged in fp32, summed in another order
    assert history[1]["proximal"] > 0


@pytest.mark.parametrize("options", [{"smart_detach_clean": True}, {"smart_memory": "lean"}])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_one_graph_at_a_time_trains_the_same(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In micro-batches, with dropout, against steps of both graphs; gradients are sums in another order."""
    ends, early = [], []
    collect = gradients.Held.collect

    def counted(*args: Any) -> None:
        early.append(None)
        collect(*args)

    monkeypatch.setattr(gradients.Held, "collect", counted)
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1, **BALL, **options}
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(Smart, "ahead", lambda self, batch, scale, **options: self(batch, **options))
        trainer = trainer_for(TASKS[name], tmp_path, max_steps=2, **options)
        trainer.train()
        assert len(early) == 4  # a backward pass ahead in each micro-batch, of the first training alone
        ends.append(parameters(trainer))
    for key, p in ends[1].items():
        torch.testing.assert_close(ends[0][key], p, rtol=1e-5, atol=1e-7)


def test_there_is_one_graph_at_a_time(tmp_path: Path) -> None:
    """With "power", the clean graph is freed before the ascent: nothing of the trainer's holds it."""
    made: list[Any] = []
    found: list[int] = []

    def saved(_module: Any, _args: Any, output: Tensor) -> Tensor:
        x = 2 * output
        made.append(weakref.ref(x))
        return x * x

    trainer = trainer_for(TASKS["bert"], tmp_path, max_steps=1, smart_memory="lean", smart_check=False, **BALL)
    trainer.model.bert.embeddings.register_forward_hook(saved)
    trainer.model.get_input_embeddings().register_forward_pre_hook(
        lambda *_: found.append(sum(x() is not None for x in made))
    )
    trainer.train()
    assert max(found) == 1
    assert found.count(1) == 1  # where the teacher's pass begins


def test_a_list_of_examples_is_not_looked_through() -> None:
    """Nor copied at each step, wherever it lies."""

    class Holder:
        def __init__(self) -> None:
            self.train_dataset = [{"input_ids": [0] * 9}] * 7
            self.examples = [{"input_ids": [0] * 9} for _ in range(20_000)]
            self.losses = [[1.0], [2.0]]

    holder = Holder()
    kept = Attributes((), [holder])
    holder.examples.append({})
    holder.losses[0].append(3.0)
    kept.find_changes()
    kept.undo()
    assert len(holder.examples) == 20_000
    assert holder.losses == [[1.0], [2.0]]
    looked_at = [container for container, *_ in kept._contents.values()]
    assert len(looked_at) == 4  # two lists, and the two in one of them


class WithoutKeywords(transformers.BertForTokenClassification):
    """Trainer cannot tell it how many items there are, and counts none."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_where_items_are_not_counted_it_is_the_mean_of_means(name: str, tmp_path: Path) -> None:
    """Of micro-batches of 3 and 1 examples, with different numbers of tokens: as Trainer has it, for each term."""
    task = TASKS[name]
    if task.targets == "span":
        model = task.build(**NO_DROPOUT[name])
    else:
        model = WithoutKeywords(transformers.BertConfig(vocab_size=20, num_labels=3, **SIZES, **NO_DROPOUT[name]))
    examples, entries = task.examples()[:4], []
    for trainer, some, extra in (
        (transformers.Trainer, examples, {}),
        (SmartTrainer, examples, QUIET),
        (SmartTrainer, examples[:3], QUIET),
        (SmartTrainer, examples[3:], QUIET),
    ):
        run = trainer_for(
            task,
            tmp_path,
            model,
            trainer,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_steps=1,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
            **extra,
        )
        run.train_dataset = some
        run.train()
        entries.append(logged(run)[0])
    plain, both, first, second = entries
    assert both["task_loss"] == plain["loss"]
    for key in ("task_loss", "smoothness"):
        assert math.isclose(both[key], (first[key] + second[key]) / 2, rel_tol=1e-4), key  # logged in fp32


@pytest.mark.parametrize("micro", [1, 2])
def test_labels_of_several_numbers_a_sample(micro: int, tmp_path: Path) -> None:
    """Trainer counts the labels' elements, the divergence samples: its terms are means over samples all the same."""

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(outputs["logits"], labels, reduction="sum")
        return loss / num_items_in_batch

    entries = []
    for size, count, keywords in ((4, 1, {}), (4 // micro, micro, {"compute_loss_func": loss_of})):
        run = trainer_for(
            TASKS["bert"],
            tmp_path,
            TASKS["bert"].build(problem_type="multi_label_classification", **NO_DROPOUT["bert"]),
            keywords=keywords,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            max_steps=2,
            smart_divergence="symmetric_kl",
            smart_decay=0.5,
            **QUIET,
        )
        run.train_dataset = [e | {"labels": torch.eye(3)[e["labels"]]} for e in TASKS["bert"].examples()]
        run.train()
        entries.append(logged(run)[1])
    for key in ("task_loss", "smoothness", "proximal"):
        assert entries[0][key] > 0
        assert math.isclose(entries[1][key], entries[0][key], rel_tol=1e-4), key  # logged in fp32


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func", "return_dict"])
def test_losses_that_are_trainers(how: str, tmp_path: Path) -> None:
    """A loss made beside the model is the task loss, as Trainer has it, in each pass of a step."""

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return 2 * nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    keywords = {"compute_loss_func": loss_of} if how == "compute_loss_func" else {}
    options = {"label_smoothing_factor": 0.5} if how == "label_smoothing_factor" else {}
    build = {"return_dict": False} if how == "return_dict" else {}
    losses = []
    for trainer, extra in ((transformers.Trainer, {}), (SmartTrainer, {**BALL, "smart_adversary": "task"})):
        run = trainer_for(
            TASKS["bert"],
            tmp_path,
            TASKS["bert"].build(**build),
            trainer,
            keywords=keywords,
            max_steps=1,
            **options,
            **extra,
        )
        run.train()
        losses.append(logged(run)[0])
    assert losses[1]["task_loss"] == losses[0]["loss"]
    assert losses[1]["smoothness"] > 0


def test_a_subclass_gets_the_models_outputs(tmp_path: Path) -> None:
    class Watching(SmartTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
            self.seen = loss.item(), outputs["loss"].item(), outputs["logits"].shape
            return (loss, outputs) if return_outputs else loss

    trainer = trainer_for(TASKS["bert"], tmp_path, trainer=Watching, max_steps=1, **BALL)
    trainer.train()
    (entry,) = logged(trainer)
    assert trainer.seen == (entry["loss"], entry["task_loss"], (4, 3))


@pytest.mark.parametrize("options", [{}, {"smart_norm": "l2"}, {"smart_norm": "l2", "smart_scope": "token"}])
def test_what_is_logged(options: dict[str, Any], tmp_path: Path) -> None:
    """Means over the steps and micro-batches since the last log; the terms make the loss."""
    trainer = trainer_for(
        TASKS["gpt2"],
        tmp_path,
        gradient_accumulation_steps=2,
        logging_steps=2,
        smart_lambda_s=3.0,
        smart_mu=2.0,
        **BALL | options,
    )
    trainer.train()
    assert len(logged(trainer)) == 2
    for entry in logged(trainer):
        total = entry["task_loss"] + 3 * entry["smoothness"] + 2 * entry["proximal"]
        assert math.isclose(entry["loss"], total, rel_tol=1e-5)
        assert math.isclose(entry[f"perturbation_{options.get('smart_norm', 'linf')}"], 0.1, rel_tol=1e-5)


def test_a_divergence_of_the_callers(tmp_path: Path) -> None:
    def divergence(p: Tensor, q: Tensor, batch: dict[str, Tensor]) -> Tensor:
        assert batch["labels"].shape == (4,)
        return (p - q).square().sum(-1).mean()

    trainer = trainer_for(TASKS["bert"], tmp_path, keywords={"divergence": divergence}, **BALL)
    trainer.train()
    assert trainer.smart.config.divergence is divergence
    assert logged(trainer)[-1]["proximal"] > 0


def test_a_step_that_a_gradient_scaler_skips_moves_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(TASKS["bert"], tmp_path)
    skipped = iter([True, True, False, False] * 2)  # asked for by us, then by Trainer
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda _: next(skipped)))
    trainer.train()
    assert trainer.smart.state_dict()["updates"] == 2


def test_lora_has_shadows_of_its_adapters_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    options = {"save_strategy": "steps", "save_steps": 2, **BALL}
    runs = [
        trainer_for(TASKS["bert"], tmp_path, peft.get_peft_model(TASKS["bert"].build(), config), **options)
        for _ in "ab"
    ]
    runs[0].train()
    trained = {name for name, p in runs[0].model.named_parameters() if p.requires_grad}
    assert runs[0].smart.teacher.shadows.keys() == trained
    assert all("lora" in name or "classifier" in name for name in trained)
    assert all(h["smoothness"] > 0 for h in logged(runs[0]))
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(parameters(runs[1]), parameters(runs[0]))


# -------------------------------------------------------------------------------- the teacher, what Trainer does


def test_evaluating_the_teacher(tmp_path: Path) -> None:
    trainer = trainer_for(TASKS["bert"], tmp_path, **BALL)
    with pytest.raises(ValueError, match="use_teacher: got True, but there is no teacher"):
        trainer.evaluate(use_teacher=True)
    trainer.train()
    before = parameters(trainer)
    student, teacher = trainer.evaluate(), trainer.evaluate(use_teacher=True)
    assert_equal(parameters(trainer), before)
    with trainer.smart.teacher.weights():
        trainer.save_model(str(tmp_path / "teacher"))
    trainer.model.load_state_dict(load_file(tmp_path / "teacher" / "model.safetensors"))
    assert trainer.evaluate()["eval_loss"] == teacher["eval_loss"] != student["eval_loss"]
    alone = trainer_for(TASKS["bert"], tmp_path, smart_mu=0.0)
    alone.train()
    with pytest.raises(ValueError, match="there is no teacher"):
        alone.evaluate(use_teacher=True)


def test_early_stopping_and_the_best_model(tmp_path: Path) -> None:
    trainer = trainer_for(
        TASKS["bert"],
        tmp_path,
        keywords={"callbacks": [transformers.EarlyStoppingCallback(1, 10.0)]},  # nothing is that much better
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        max_steps=20,
        **BALL,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    left = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert left == [Path(trainer.state.best_model_checkpoint).name]
    assert (tmp_path / left[0] / "smart.safetensors").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True, "smart_adversary": "predicted"},
        {"activation_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_train(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(TASKS["bert"], tmp_path, **BALL | options)
    trainer.train()
    for entry in logged(trainer):
        assert math.isclose(entry["loss"], entry["task_loss"] + entry["smoothness"] + entry["proximal"], rel_tol=1e-5)
        assert entry["smoothness"] > 0
    assert logged(trainer)[-1]["proximal"] > 0


def test_reentrant_checkpointing(tmp_path: Path) -> None:
    """Torch has no gradient but that of backward() there: an error of ours where another is needed."""
    options: dict[str, Any] = {"activation_checkpointing": True, **BALL}
    options["activation_checkpointing_kwargs"] = {"use_reentrant": True}
    with pytest.raises(ValueError, match="args: got activation checkpointing with use_reentrant=True"):
        trainer_for(TASKS["bert"], tmp_path, **options).train()
    runs = []
    for reentrant in (True, False):
        options["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        runs.append(trainer_for(TASKS["bert"], tmp_path, smart_adversary="random", **options))
        runs[-1].train()
    assert_equal(parameters(runs[0]), parameters(runs[1]))


def test_no_epochs(tmp_path: Path) -> None:
    trainer = trainer_for(TASKS["bert"], tmp_path, max_steps=-1, num_train_epochs=0)
    before = parameters(trainer)
    trainer.train()
    assert_equal(parameters(trainer), before)


def test_images_are_perturbed_at_their_patches(tmp_path: Path) -> None:
    model = TASKS["vit"].build()
    assert find_embedding(model) is model.vit.embeddings.patch_embeddings
    trainer = trainer_for(TASKS["vit"], tmp_path, model, smart_embedding=None, **BALL)
    trainer.train()
    assert all(h["smoothness"] > 0 for h in logged(trainer))


def test_searching_hyper_parameters_builds_a_new_teacher(tmp_path: Path) -> None:
    """Every trial's model and arguments are new; this is what a search does to a trainer."""
    task = TASKS["bert"]
    trainer = SmartTrainer(
        model_init=lambda: task.build(), args=trainer_for(task, tmp_path).args, train_dataset=task.examples()
    )
    trainer.train()
    first = trainer.smart
    trainer.args.smart_lambda_s = 5.0
    trainer.train()
    assert trainer.smart is not first
    assert trainer.smart.config.lambda_s == 5.0


def test_evaluation_by_generation(tmp_path: Path) -> None:
    @dataclass
    class Arguments(SmartTrainingArguments, transformers.Seq2SeqTrainingArguments):
        pass

    class Both(SmartTrainer, transformers.Seq2SeqTrainer):
        arguments = Arguments

    def tokens(prediction: transformers.EvalPrediction) -> dict[str, float]:
        return {"tokens": prediction.predictions.ndim == 2 and prediction.predictions.dtype.kind == "i"}

    options = {"predict_with_generate": True, **BALL}
    trainer = trainer_for(TASKS["t5"], tmp_path, trainer=Both, keywords={"compute_metrics": tokens}, **options)
    trainer.train()
    assert logged(trainer)[-1]["smoothness"] > 0
    student, teacher = trainer.evaluate(), trainer.evaluate(use_teacher=True)
    assert student["eval_tokens"]
    assert teacher["eval_tokens"]
    assert student["eval_loss"] != teacher["eval_loss"]


# ------------------------------------------------------------------------------------------------- arguments


def test_arguments_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = transformers.HfArgumentParser(SmartTrainingArguments)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "weight of the smoothness term R_s, >= 0, no unit; the paper takes 1, 3 or 5" in shown
    assert "--smart_adversary {power,predicted,fisher,task,random}" in shown
    for action in parser._actions:
        if action.dest.startswith("smart_"):
            assert len(action.help) > 20, action.dest
    given = [
        "--output_dir",
        "out",
        "--smart_mu",
        "2",
        "--smart_detach_clean",
        "--smart_norm",
        "l2",
        "--smart-inner-steps",
        "2",
    ]
    (args,) = parser.parse_args_into_dataclasses(given)
    assert args.smart_config() == SmartConfig(mu=2.0, detach_clean=True, norm="l2", inner_steps=2)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", "out", "--smart_norm", "l3"])


def test_arguments_go_round() -> None:
    args = SmartTrainingArguments("out", smart_lambda_s=3.0, smart_adversary="fisher", smart_embedding="words")
    assert args.output_dir == "out"
    content = json.loads(args.to_json_string())
    chosen = {key: value for key, value in content.items() if key.startswith("smart_") or key == "output_dir"}
    again = SmartTrainingArguments(**chosen)
    assert again.smart_config() == args.smart_config() == SmartConfig(lambda_s=3.0, adversary="fisher")
    assert again.smart_embedding == "words"
    assert SmartTrainingArguments("out").smart_config() == SmartConfig()


def test_refuses_wrong_arguments(tmp_path: Path) -> None:
    model = TASKS["bert"].build()
    with pytest.raises(TypeError, match="args: got TrainingArguments, expected SmartTrainingArguments"):
        SmartTrainer(model, transformers.TrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match=r"mu: got -1\.0"):
        SmartTrainer(model, SmartTrainingArguments(str(tmp_path), smart_mu=-1.0))
    with pytest.raises(ValueError, match="embedding: got 'nowhere'"):
        trainer_for(TASKS["bert"], tmp_path, smart_embedding="nowhere").train()
    trainer = trainer_for(TASKS["bert"], tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"args: got DataParallel.*torchrun"):
        trainer.begin()


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_resumed_training_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    """With dropout, noise that matters, accumulation, and a switch of the decay ahead."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 5, **BALL}
    runs = []
    for resume in (False, True):
        runs.append(trainer_for(TASKS[name], tmp_path, smart_decay_switch=0.7, **options))
        runs[-1].train(resume_from_checkpoint=resume)
        shutil.rmtree(tmp_path / "checkpoint-4")
        shutil.rmtree(tmp_path / "checkpoint-5")
    assert_equal(parameters(runs[1]), parameters(runs[0]))
    assert_equal(runs[1].smart.teacher.shadows, runs[0].smart.teacher.shadows)
    assert logged(runs[0])[-1] == logged(runs[1])[-1]


def test_a_checkpoint_that_was_not_written_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = TASKS["bert"]
    trainer_for(task, tmp_path, save_strategy="steps", save_steps=1, max_steps=4).train()
    paths = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    (paths[3] / "trainer_state.json").unlink()
    (paths[2] / "smart.safetensors").unlink()
    cut = paths[1] / "trainer_state.json"
    cut.write_text(cut.read_text()[:-2])
    for path, lacking in zip(
        paths[1:],
        ["a trainer_state.json that was not written to its end", "no smart.safetensors", "no trainer_state.json"],
        strict=True,
    ):
        with pytest.raises(ValueError, match=rf"{path.name} is not complete: has {lacking}"):
            trainer_for(task, tmp_path).train(resume_from_checkpoint=str(path))
    trainer = trainer_for(task, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 1
    assert "checkpoint-4 has no trainer_state.json; checkpoint-3" in caplog.text

    whole = (paths[0] / "smart.safetensors").read_bytes()
    (paths[0] / "smart.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"has no complete checkpoint; checkpoint-4 .*; checkpoint-1 has a smart"):
        last_complete_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        trainer_for(task, tmp_path / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("model.safetensors", "has no weights of the model"),
        ("optimizer.pt", "has no optimizer"),
        ("scheduler.pt", "has no scheduler"),
        ("rng_state.pth", "has no rng_state.pth"),
    ],
)
def test_a_checkpoint_with_a_file_missing(name: str, lacking: str, tmp_path: Path) -> None:
    trainer_for(TASKS["bert"], tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    (tmp_path / "checkpoint-2" / name).unlink()
    assert what_lacks(tmp_path / "checkpoint-2") == lacking
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_checkpoint_of_several_processes_has_the_generators_of_each(tmp_path: Path) -> None:
    trainer_for(TASKS["bert"], tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    state = load_file(folder / "smart.safetensors")
    state |= {"generator": state["generator"].repeat(2, 1), "skipped": state["skipped"].repeat(2)}
    save_file(state, folder / "smart.safetensors")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert what_lacks(folder) == "has no rng_state_1.pth"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert what_lacks(folder) is None


def test_what_tells_that_all_is_there_is_written_after_every_process_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(TASKS["bert"], tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    folder = tmp_path / "checkpoint-1"
    seen: list[bool] = []

    def wait(_: Any) -> None:
        if (folder / "rng_state.pth").exists():
            seen.append((folder / "trainer_state.json").exists())

    monkeypatch.setattr(type(trainer.accelerator), "wait_for_everyone", wait)
    trainer.train()
    assert seen[0] is False
    assert what_lacks(folder) is None


def test_a_checkpoint_of_the_model_only_is_complete(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer_for(TASKS["bert"], tmp_path, **options).train()
    assert not list(tmp_path.glob("*/optimizer*"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_that_is_being_overwritten_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of two trainings must not pass for a checkpoint, if the second is killed amid them."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_for(TASKS["bert"], tmp_path, **options).train()
    assert what_lacks(tmp_path / "checkpoint-2") is None
    monkeypatch.setattr(integration, "save_smart", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(TASKS["bert"], tmp_path, **options).train()
    assert what_lacks(tmp_path / "checkpoint-2") == "has no trainer_state.json"


def test_a_checkpoint_that_does_not_fit_says_which(tmp_path: Path) -> None:
    trainer_for(TASKS["bert"], tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(
        ValueError, match=r"smart\.safetensors does not fit: state: has a teacher, expected none: mu is 0"
    ):
        trainer_for(TASKS["bert"], tmp_path, smart_mu=0.0).train(resume_from_checkpoint=True)


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    task = TASKS["bert"]
    names = {"model": task.build(), "train_set": task.examples(), "test_set": task.examples()}
    trainer = pages.run("trainer", pages.guide("trainer"), names)["trainer"]
    assert isinstance(trainer, SmartTrainer)
    assert trainer.state.global_step == 6

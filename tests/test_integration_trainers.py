"""SmartTrainer beside the trainers of other libraries: both inherited from, arguments likewise."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pages
import pytest
import torch
import transformers
from torch import Tensor, nn

from smart_kernels.integrations.transformers import SmartTrainer, SmartTrainingArguments

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
trl = pytest.importorskip("trl")
cross_encoder = pytest.importorskip("sentence_transformers.cross_encoder")
sentence = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.losses")
parts = pytest.importorskip("sentence_transformers.models")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:embedding. the .* to perturb is called:UserWarning"),
]

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37, "vocab_size": 99}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LEFT = [" ".join(f"w{(7 * i + j) % 90 + 6}" for j in range(3 + i % 3)) for i in range(12)]
RIGHT = [" ".join(f"w{(11 * i + j) % 90 + 6}" for j in range(2 + i % 4)) for i in range(12)]
BALL = {"smart_epsilon": 0.1, "smart_noise_std": 0.1}


def tokenizer() -> Any:
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w3")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "w3", "pad_token": "w0", "eos_token": "w2", "bos_token": "w1", "cls_token": "w4"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, sep_token="w5", model_max_length=32, **special)


def saved(kind: str, folder: Path) -> str:
    torch.manual_seed(0)
    getattr(transformers, kind)(transformers.BertConfig(**TINY, **STILL, num_labels=1)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def supervised(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, pad_token_id=0, attention_dropout=0.1)
    data = datasets.Dataset.from_dict({"input_ids": [list(range(5, 5 + n)) for n in (8, 12, 9, 14, 7, 10, 11, 8)]})
    return transformers.LlamaForCausalLM(config), {"train_dataset": data, "processing_class": tokenizer()}


def reward(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    path = saved("BertForSequenceClassification", folder)
    data = datasets.Dataset.from_dict({"chosen": LEFT, "rejected": RIGHT})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    return model, {"train_dataset": data, "processing_class": tokenizer()}


def crossed(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    path = saved("BertForSequenceClassification", folder)
    model = cross_encoder.CrossEncoder(path, device="cpu", num_labels=1)
    labels = [float(i % 2) for i in range(12)]
    data = datasets.Dataset.from_dict({"a": LEFT, "b": RIGHT, "label": labels})
    return model, {"train_dataset": data, "loss": cross_encoder.losses.BinaryCrossEntropyLoss(model)}


def embedded(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    word = parts.Transformer(saved("BertModel", folder))
    pooling = parts.Pooling(word.get_word_embedding_dimension())
    model = sentence.SentenceTransformer(modules=[word, pooling], device="cpu")
    data = datasets.Dataset.from_dict({"a": LEFT, "b": RIGHT, "score": [i % 5 / 4 for i in range(12)]})
    return model, {"train_dataset": data, "loss": losses.CoSENTLoss(model)}


def of_trl(**options: Any) -> dict[str, Any]:
    return {"bf16": False, "gradient_checkpointing": False, **options}


KINDS: dict[str, tuple[Any, Any, Callable[[Path], Any], dict[str, Any], dict[str, Any]]] = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, supervised, of_trl(), {}),
    "reward": (trl.RewardTrainer, trl.RewardConfig, reward, of_trl(), {}),
    "cross encoder": (
        cross_encoder.CrossEncoderTrainer, cross_encoder.CrossEncoderTrainingArguments, crossed, {}, {},
    ),
    "sentence": (
        sentence.SentenceTransformerTrainer, sentence.SentenceTransformerTrainingArguments, embedded, {},
        {"smart_divergence": "squared_error"},
    ),
}  # fmt: skip


def train(kind: str, folder: Path, smart: dict[str, Any] | None, steps: int = 1) -> tuple[Tensor, list[dict[str, Any]]]:
    """The weights after steps of SGD without SMART or with, and what was logged."""
    trainer_class, arguments_class, make, own, needed = KINDS[kind]
    options = {
        "per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-1, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    if smart is not None:
        arguments_class = dataclasses.make_dataclass("Arguments", [], bases=(SmartTrainingArguments, arguments_class))
        trainer_class = type("Trainer", (SmartTrainer, trainer_class), {})
        options |= needed | smart
    model, rest = make(folder)
    torch.manual_seed(1)
    trainer = trainer_class(model=model, args=arguments_class(str(folder), **options, **own), **rest)
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double(), logs


@pytest.mark.parametrize("kind", KINDS)
def test_without_terms_it_is_the_other_trainer_to_the_bit(kind: str, tmp_path: Path) -> None:
    plain, logs = train(kind, tmp_path / "a", None, 3)
    ours, ours_logged = train(kind, tmp_path / "b", {"smart_lambda_s": 0.0, "smart_mu": 0.0}, 3)
    assert torch.equal(ours, plain)
    assert [x["loss"] for x in ours_logged] == [x["loss"] for x in logs]


@pytest.mark.parametrize("adversary", ["power", "predicted"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smoothness_term_has_its_gradient_and_logs_count_once(kind: str, adversary: str, tmp_path: Path) -> None:
    """A step of SGD moves the weights by lambda_s times one and the same gradient."""
    plain, logs = train(kind, tmp_path / "plain", None)
    moves = []
    for weight in (1.0, 2.0):
        options = {"smart_lambda_s": weight, "smart_mu": 0.0, "smart_adversary": adversary, **BALL}
        weights, logged = train(kind, tmp_path / str(weight), options)
        assert logged[0]["smoothness"] > 0
        assert logged[0]["perturbation_linf"] == pytest.approx(0.1)
        for name in logs[0].keys() & {"num_tokens", "mean_reward", "accuracy", "entropy", "mean_token_accuracy"}:
            assert logged[0][name] == pytest.approx(logs[0][name], rel=1e-6), name
        assert logged[0]["task_loss"] == pytest.approx(logs[0]["loss"], rel=1e-5)
        moves.append(weights - plain)
    assert moves[0].norm() > 1e-6 * plain.norm()
    # weights of size 1 are rounded to 2^-24 after the step, and so is their difference
    torch.testing.assert_close(moves[1], 2 * moves[0], rtol=1e-2, atol=4 * 2.0**-24 * float(plain.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_proximal_term_has_its_gradient(kind: str, tmp_path: Path) -> None:
    """The first step's term is 0; from the second on it holds the weights back."""
    ends = []
    for weight in (0.0, 1e-2):
        options = {"smart_lambda_s": 0.0, "smart_mu": weight, "smart_decay": 0.9}
        weights, logged = train(kind, tmp_path / str(weight), options, 2)
        ends.append(weights)
    assert logged[0]["proximal"] == 0
    assert logged[1]["proximal"] > 0
    assert not torch.equal(*ends)


LOSSES: dict[str, Callable[[Any], nn.Module]] = {
    "shortened": lambda m: losses.MatryoshkaLoss(m, losses.MultipleNegativesRankingLoss(m), [32, 16]),
    "of layers": lambda m: losses.AdaptiveLayerLoss(m, losses.MultipleNegativesRankingLoss(m)),
    "cached": lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=2),
    "cached, guided": lambda m: losses.CachedGISTEmbedLoss(m, guide=copy.deepcopy(m), mini_batch_size=2),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_sentence_transformers(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With terms of almost no weight the steps are the other trainer's, masks of dropout and all."""

    def make(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        model, _ = embedded(folder)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        data = datasets.Dataset.from_dict({"a": LEFT, "b": RIGHT})
        return model, {"train_dataset": data, "loss": LOSSES[loss](model)}

    kind = KINDS["sentence"]
    monkeypatch.setitem(KINDS, "of pairs", (*kind[:2], make, *kind[3:]))
    plain, logs = train("of pairs", tmp_path / "a", None, 3)
    weak = {"smart_lambda_s": 1e-20, "smart_mu": 1e-20, **BALL}
    ours, ours_logged = train("of pairs", tmp_path / "b", weak, 3)
    assert torch.equal(ours, plain)
    assert [x["task_loss"] for x in ours_logged] == [x["loss"] for x in logs]
    assert all(x["smoothness"] > 0 for x in ours_logged)
    assert ours_logged[-1]["proximal"] > 0


@pytest.mark.parametrize("smart_first", [True, False])
def test_arguments_keep_the_other_trainers_defaults(smart_first: bool, tmp_path: Path) -> None:
    for kind, other in (("sft", trl.SFTConfig), ("reward", trl.RewardConfig)):
        bases = (SmartTrainingArguments, other) if smart_first else (other, SmartTrainingArguments)
        combined = dataclasses.make_dataclass("Arguments", [("mine", int, 3)], bases=bases)
        ours = {f.name: f.default for f in dataclasses.fields(combined)}
        for f in dataclasses.fields(other):
            assert ours[f.name] == f.default or f.default is dataclasses.MISSING, (kind, f.name)
        assert ours["smart_mu"] == 1.0
        assert ours["mine"] == 3


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    model, rest = supervised(tmp_path)
    guide = ModuleType("trl_guide")  # its arguments are pickled by their module's name
    monkeypatch.setitem(sys.modules, guide.__name__, guide)
    vars(guide).update(model=model, train_set=rest["train_dataset"], tokenizer=rest["processing_class"])
    trainer = pages.run("trl", pages.guide("trl"), vars(guide))["trainer"]
    assert trainer.smart.state_dict()["updates"] == 2


def test_embeddings_of_sentences_need_a_divergence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divergence: got 'auto' with embeddings of sentences"):
        train("sentence", tmp_path, {"smart_divergence": "auto"})


class Both(nn.Module):
    """Classifies texts or their tokens, whichever the labels are of; its loss ignores how many items a step has."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.of_texts, self.of_tokens = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        x = torch.tanh(self.mix(self.words(input_ids)))
        logits = self.of_texts(x.mean(1)) if labels.dim() == 1 else self.of_tokens(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return {"loss": loss, "logits": logits}


class InTurn(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Batches of one kind, then of the other."""

    def __iter__(self) -> Any:
        g = torch.Generator().manual_seed(0)
        while True:
            for shape in ((), (6,)):
                for _ in range(4):
                    labels = torch.randint(3, shape, generator=g)
                    if shape:
                        labels[: int(torch.randint(4, (), generator=g))] = -100
                    yield {"input_ids": torch.randint(20, (6,), generator=g), "labels": labels}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_batches_of_several_kinds_are_counted_each_in_its_way(order: tuple[int, int], tmp_path: Path) -> None:
    """The logged terms of a step are the definition's, whichever kind was seen first."""
    torch.manual_seed(0)
    model = Both()

    class Turned(InTurn):
        def __iter__(self) -> Any:
            items = super().__iter__()
            both = [[next(items) for _ in range(4)] for _ in range(2)]
            while True:
                for i in order:
                    yield from both[i]

    arguments = SmartTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=4, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=0.0, smart_mu=0.0, smart_adversary="random",
        smart_noise_std=0.1, smart_epsilon=1.0,
    )  # fmt: skip
    trainer = SmartTrainer(model, arguments, train_dataset=Turned())
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    items = Turned().__iter__()
    smart = trainer.smart
    assert smart is not None
    for step, logged in enumerate(logs):
        rows = [next(items) for _ in range(4)]
        batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        out = smart({**batch, "num_items_in_batch": None})
        assert logged["task_loss"] == pytest.approx(float(out.task_loss), rel=1e-5), step
        # other noise of the same size: a sum over tokens that was divided by samples would be off by a factor of 4
        assert logged["smoothness"] == pytest.approx(float(out.smoothness), rel=0.7), step

"""Where the perturbation enters: every kind of model, with no trace left in it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from smart_models import Encoder, batch_for
from torch import Tensor, nn
from torch.nn import functional as F

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart.embedding import EmbeddingHook, find_embedding, perturb

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LM = {"labels": IDS.masked_fill(MASK == 0, -100)}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}


def hugging_face(name: str, config: str, options: dict[str, Any], labels: dict[str, Tensor]) -> Any:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        model = getattr(transformers, name)(getattr(transformers, config)(**options)).train()
        return model, {"input_ids": IDS, "attention_mask": MASK, **labels}

    return pytest.param(build, id=name)


class ImageClassifier(nn.Module):
    """Convolution, batch norm, a head; called as a Hugging Face model is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(F.relu(self.norm(self.stem(images))).mean((2, 3)))
        return F.cross_entropy(logits, labels), logits


MODELS = [
    hugging_face("BertForSequenceClassification", "BertConfig", TINY, {"labels": torch.tensor([0, 1])}),
    hugging_face("BertForMaskedLM", "BertConfig", TINY, LM),
    hugging_face("RobertaForTokenClassification", "RobertaConfig", TINY, {"labels": MASK}),
    hugging_face(
        "ElectraForSequenceClassification",
        "ElectraConfig",
        TINY | {"embedding_size": 8},
        {"labels": torch.tensor([0, 1])},
    ),
    hugging_face(
        "BertForQuestionAnswering",
        "BertConfig",
        TINY,
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 1])},
    ),
    hugging_face("GPT2LMHeadModel", "GPT2Config", GPT2, LM),
    hugging_face("T5ForTokenClassification", "T5Config", T5, {"labels": MASK}),  # two modules with the words' weight
    hugging_face("T5ForConditionalGeneration", "T5Config", T5 | {"decoder_start_token_id": 0}, LM),
]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("adversary", ["power", "predicted", "fisher", "task"])
def test_any_architecture(build: Any, adversary: str) -> None:
    """The perturbation is found, enters, stays off the padding, and leaves the module as it was."""
    model, batch = build()
    config = SmartConfig(adversary=adversary, epsilon=1e-2, noise_std=1e-2, step_size=1.0, mu=0)
    smart = Smart(model, config)
    out = smart(batch)
    out.loss.backward()
    assert out.smoothness > 0
    assert (out.perturbation[MASK == 1].abs().amax(-1) > 0).all()
    assert (out.perturbation[MASK == 0] == 0).all()
    assert not any(m._forward_hooks for m in model.modules())
    embedding = find_embedding(model)
    assert embedding.weight.grad.isfinite().all()
    assert all(p.requires_grad for p in model.parameters())


def test_image_model_with_a_named_module() -> None:
    model = ImageClassifier()
    smart = Smart(model, SmartConfig(epsilon=0.1, noise_std=0.1, step_size=1.0), 10, embedding="stem",
                  forward=lambda model, batch: model(*batch))  # fmt: skip
    statistics = []
    for _ in range(2):
        out = smart((torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])))
        statistics.append(int(model.norm.num_batches_tracked))
    assert out.smoothness > 0
    assert out.perturbation.shape == (3, 4, 6, 6)
    assert statistics == [1, 2]  # batch norm counts each batch once, though three passes see it


def test_choices_are_samples() -> None:
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**TINY))
    batch = {key: x.unsqueeze(1).repeat(1, 3, 1) for key, x in (("input_ids", IDS), ("attention_mask", MASK))}
    out = Smart(model, SmartConfig(), 10)({**batch, "labels": torch.tensor([0, 2])})
    assert out.perturbation.shape == (6, 4, 16)
    assert torch.equal((out.perturbation != 0).any(-1), MASK.repeat_interleave(3, 0) == 1)


def test_a_module_that_knows_its_embedding_and_has_no_configuration() -> None:
    class Plain(Encoder):
        def get_input_embeddings(self) -> nn.Module:
            return self.words

    model = Plain()
    model.other = nn.Embedding(2, 2)
    assert find_embedding(model) is model.words
    assert Smart(model, SmartConfig(), 10)(batch_for(model)).smoothness > 0


def test_what_follows_the_embedding_is_applied_once() -> None:
    """The perturbed pass equals a model whose word embedding is x + delta."""
    model = Encoder().double()
    batch = batch_for(model)
    x = model.words(batch["input_ids"])
    delta = torch.randn_like(x)
    hook = EmbeddingHook(model.words)
    with hook.replace({0: perturb(x, delta)}, 1):
        actual = model(**batch).logits
    torch.testing.assert_close(actual, model.from_embeddings(x + delta, batch["attention_mask"]).logits)
    torch.testing.assert_close(model(**batch).logits, model.from_embeddings(x, batch["attention_mask"]).logits)


def test_an_embedding_in_low_precision_gets_the_sum_rounded_once() -> None:
    x = torch.randn(2, 5, 8).bfloat16()
    delta = 1e-2 * torch.randn(2, 5, 8)
    actual = perturb(x, delta)
    exact = x.double() + delta.double()
    assert actual.dtype == torch.bfloat16
    # fp32's rounding before bf16's can move a result by one bf16 step, at most where it lies halfway.
    torch.testing.assert_close(actual.double(), exact, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_the_model_is_as_it_was_after_an_exception(adversary: str) -> None:
    class FailingError(Exception):
        pass

    class Failing(Encoder):
        fails_at = 0

        def from_embeddings(self, *args: Any) -> Any:
            if next(self.calls) == self.fails_at:
                raise FailingError
            return super().from_embeddings(*args)

    for fails_at in (1, 2, 3):
        model = Failing(dropout=0.1)
        model.fails_at, model.calls = fails_at, itertools.count(1)
        model.positions.requires_grad_(False)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        values = {name: p.clone() for name, p in model.named_parameters()}
        smart = Smart(model, SmartConfig(adversary=adversary, mu=1.0), 10)
        with pytest.raises(FailingError):
            smart(batch_for(model))
        assert not model.words._forward_hooks
        assert model.training
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())


def test_a_model_may_change_its_embeddings_in_place() -> None:
    class InPlace(Encoder):
        def from_embeddings(self, x: Tensor, *args: Any) -> Any:
            return super().from_embeddings(x.mul_(2), *args)

    for frozen in (False, True):
        model = InPlace(frozen_words=frozen)
        for adversary in ("power", "predicted"):
            Smart(model, SmartConfig(adversary=adversary, mu=0))(batch_for(model)).loss.backward()


def test_find_embedding() -> None:
    model = Encoder()
    assert find_embedding(model) is model.words
    assert find_embedding(model, "norm") is model.norm
    assert find_embedding(model, model.norm) is model.norm
    assert find_embedding(torch.compile(model), "words") is model.words
    model.other = nn.Embedding(2, 2)
    with pytest.raises(ValueError, match=r"embedding: .*'words', .*'other'"):
        find_embedding(model)
    with pytest.raises(ValueError, match=r"embedding: .*none"):
        find_embedding(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="embedding: got 'lost'"):
        find_embedding(model, "lost")
    with pytest.raises(ValueError, match="embedding: got a Linear that is no part"):
        find_embedding(model, nn.Linear(1, 1))
    with pytest.raises(TypeError, match="embedding: got int"):
        find_embedding(model, 3)  # type: ignore[arg-type]


def test_a_module_that_is_not_called_is_an_error() -> None:
    model = Encoder()
    model.unused = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="embedding: the module to perturb, a Linear, was not called"):
        Smart(model, SmartConfig(mu=0), embedding="unused")(batch_for(model))


def test_a_module_that_gives_no_tensor_is_an_error() -> None:
    model = Encoder()
    with pytest.raises(TypeError, match="embedding: the Encoder returns Output"):
        Smart(model, SmartConfig(mu=0), embedding=model)(batch_for(model))


def test_warns_once_where_the_embeddings_cannot_hold_the_perturbation() -> None:
    config = transformers.BertConfig(**TINY, dtype="bfloat16")
    model = transformers.BertForSequenceClassification(config).bfloat16()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1])}
    smart = Smart(model, SmartConfig(mu=0))
    # weights of size 0.016: the step of bfloat16's 8 bits there is 2^-6-8+1 = 6e-5 to 1.2e-4
    with pytest.warns(UserWarning, match=r"epsilon = 1e-05 is below what torch.bfloat16 resolves .* 0.01\d, .*e-0[45]"):
        smart(batch)
    smart(batch)
    Smart(model, SmartConfig(mu=0, epsilon=0.01, noise_std=0.01))(batch)
    Smart(model.float(), SmartConfig(mu=0))(batch)


def test_a_bag_of_words_is_named_where_it_is_not_clear() -> None:
    with pytest.raises(ValueError, match=r"one of '0'"):
        find_embedding(nn.Sequential(nn.EmbeddingBag(10, 4), nn.ReLU()))

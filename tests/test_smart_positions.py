"""Which dimension is the sample, which positions count: what is perturbed equals what it is in the plainest form."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import transformers
from smart_models import VOCABULARY, WIDTH, Encoder, Output, batch_for
from torch import Tensor, nn
from torch.nn import functional as F

from smart_kernels import Smart, SmartConfig

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:step_size=:UserWarning"),  # short steps are meant
]

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
NORMS = [("l2", "sample"), ("linf", "sample"), ("l2", "token")]


def config(norm: str, scope: str, adversary: str = "power", epsilon: float = 0.1) -> SmartConfig:
    """A step that stays inside of the ball, so that the gradient's norm shows."""
    return SmartConfig(
        epsilon=epsilon, step_size=0.7 * epsilon, noise_std=1e-3, norm=norm, scope=scope, mu=0.0, adversary=adversary,
        check=False,
    )  # fmt: skip


def run(model: nn.Module, batch: Any, how: SmartConfig, noise: Tensor, **options: Any) -> Any:
    return Smart(model, how, 10, **options)(batch, initial_perturbation=noise)


# ------------------------------------------------------------------------------------------ sequences come first


class SequenceFirst(Encoder):
    """Looks words up as (L, B)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        x = self.words(input_ids.T.contiguous())
        return self.from_embeddings(x.transpose(0, 1), attention_mask, labels)


@pytest.mark.parametrize(("norm", "scope"), NORMS)
@pytest.mark.parametrize("samples", [3, 6])
@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_sequence_first_equals_sample_first(norm: str, scope: str, samples: int, adversary: str) -> None:
    """Also where there are as many samples as positions."""
    model, plain = SequenceFirst().double(), Encoder().double()
    plain.load_state_dict(model.state_dict())
    batch = batch_for(model, samples, 6)
    noise = 1e-3 * torch.randn(samples, 6, WIDTH, dtype=torch.float64)
    how = config(norm, scope, adversary)
    expected = run(plain, batch, how, noise)
    actual = run(model, batch, how, noise.transpose(0, 1))
    torch.testing.assert_close(actual.perturbation.transpose(0, 1), expected.perturbation, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-9, atol=0)
    padding = batch["attention_mask"] == 0
    assert (actual.perturbation.transpose(0, 1)[padding] == 0).all()


class Recurrent(nn.Module):
    """Words (L, B), as torch's recurrent layers take them by default, or (B, L)."""

    def __init__(self, batch_first: bool, tags: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3)
        self.layer = nn.GRU(WIDTH, WIDTH, batch_first=batch_first)
        self.batch_first, self.tags = batch_first, tags

    def forward(self, ids: Tensor) -> Tensor:
        states = self.layer(self.words(ids))[0]
        return self.head(states if self.tags else states.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("masked", ["", "as the words", "samples first"])
@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_words_that_come_first_in_the_batch_too(masked: str, tags: bool, flat: bool) -> None:
    """The logits tell which dimension is the sample, or the words' lengths do; also of a later, square batch."""
    torch.manual_seed(0)
    model, plain = Recurrent(False, tags).double(), Recurrent(True, tags).double()
    plain.load_state_dict(model.state_dict())

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch["ids"])
        logits = logits.flatten(0, -2) if flat else logits
        return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten()), logits

    smarts = [Smart(m, config("l2", "sample", "predicted"), 10, forward=forward) for m in (model, plain)]
    for length, samples in ((5, 6), (6, 5)) if masked else ((5, 6), (6, 5), (5, 5)):
        lengths = torch.randint(1, length + 1, (samples,))
        lengths[0] = length
        batch = {"ids": torch.randint(0, VOCABULARY, (length, samples)), "labels": torch.randint(0, 3, (samples,))}
        if tags:
            batch |= {"labels": torch.randint(0, 3, (length, samples)), "lengths": lengths}
        turned = {k: v.mT.contiguous() if v.dim() == 2 else v for k, v in batch.items()}
        if masked:
            turned["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
            mask = turned["attention_mask"]
            batch["attention_mask"] = mask.mT.contiguous() if masked == "as the words" else mask
        noise = 1e-3 * torch.randn(length, samples, WIDTH, dtype=torch.float64)
        actual = smarts[0](batch, initial_perturbation=noise)
        expected = smarts[1](turned, initial_perturbation=noise.transpose(0, 1).contiguous())
        assert torch.allclose(actual.perturbation.transpose(0, 1), expected.perturbation, rtol=1e-9, atol=1e-15)


def test_rows_of_samples_are_not_taken_for_words() -> None:
    """Choices, as many as are words in one; a batch of one sample whose words are classified."""

    class Choices(Recurrent):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids.flatten(0, -2))[:, 0].view(-1, 2)

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch["ids"]).flatten(0, -2)
        return logits.logsumexp(-1).mean(), logits

    how = config("l2", "sample", "predicted", 1e-3)
    choices = run(
        Choices(True, False), {"ids": torch.randint(0, VOCABULARY, (8, 2, 8))}, how, torch.zeros(16, 8, WIDTH),
        forward=forward,
    )  # fmt: skip
    one = run(
        Recurrent(True, True), {"ids": torch.randint(0, VOCABULARY, (1, 8))}, how, torch.zeros(1, 8, WIDTH),
        forward=forward,
    )  # fmt: skip
    for out in (choices, one):
        norms = out.perturbation.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 7e-4))


def test_xlnet_whose_embeddings_are_sequence_first() -> None:
    model = transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(vocab_size=20, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=2)
    )
    how = SmartConfig(norm="l2", epsilon=0.1, noise_std=0.01, step_size=1e-9, mu=0.0, check=False)
    batch = {"input_ids": torch.randint(20, (4, 4)), "labels": torch.tensor([0, 1, 0, 1])}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    out = Smart(model, how)(batch | {"attention_mask": mask})
    assert torch.equal(out.perturbation.abs().amax(-1).T > 0, mask > 0)


# ------------------------------------------------------------------------------------------------- forms of masks


def forms(mask: Tensor) -> dict[str, Tensor]:
    """The same mask as it may come."""
    pairs = (mask[:, None, None, :] > 0).expand(-1, 1, mask.shape[1], -1)
    return {
        "bool": mask > 0,
        "float": mask.float(),
        "pairs": pairs,
        "causal pairs": pairs & torch.ones(6, 6, dtype=torch.bool).tril(),
        "without heads": pairs[:, 0].long(),
        "additive": torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min),
        "additive, infinite": torch.zeros(pairs.shape).masked_fill(~pairs, -math.inf),
        "with biases": torch.where(pairs, -torch.arange(6.0), -1e9),
        "with a cache": torch.cat([torch.ones(4, 3), mask], 1),
    }


@pytest.mark.parametrize("form", forms(torch.ones(4, 6)))
def test_a_mask_in_any_form_is_that_of_its_positions(form: str) -> None:
    class Net(Encoder):
        """Takes the plain mask for itself: the other one is what this test is about."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, plain: Tensor) -> Output:
            return super().forward(input_ids, plain, labels)

    model = Net().double()
    batch = batch_for(model)
    plain = batch["attention_mask"]
    noise = 1e-3 * torch.randn(4, 6, WIDTH, dtype=torch.float64)
    how = config("l2", "sample")
    expected = run(model, batch | {"plain": plain}, how, noise)
    actual = run(model, batch | {"plain": plain, "attention_mask": forms(plain)[form]}, how, noise)
    assert torch.equal(actual.perturbation, expected.perturbation)


def test_a_mask_that_the_model_gets_by_position() -> None:
    model = Encoder()
    batch = batch_for(model)

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch[0], batch[1]).logits
        return F.cross_entropy(logits, batch[2]), logits

    noise = 1e-3 * torch.randn(4, 6, WIDTH)
    how = config("l2", "sample")
    expected = run(model, batch, how, noise)
    actual = run(model, tuple(batch.values()), how, noise, forward=forward)
    assert (expected.perturbation[batch["attention_mask"] == 0] == 0).all()
    assert torch.equal(actual.perturbation, expected.perturbation)


def test_a_mask_that_could_mean_other_words_is_not_theirs() -> None:
    """The decoder's words are not the encoder's, whose padding is at other positions."""
    t5 = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    t5.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(t5)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    batch = {"input_ids": torch.randint(3, 20, (2, 6)) * mask, "attention_mask": mask}
    batch["labels"] = torch.randint(3, 20, (2, 6))
    noise = 1e-2 * torch.randn(2, 6, 16)
    how = config("l2", "sample")
    assert (run(model, batch, how, noise, embedding="decoder.embed_tokens").perturbation.abs().amax(-1) > 0).all()
    encoder = run(model, batch, how, noise, embedding="encoder.embed_tokens").perturbation
    assert torch.equal(encoder.abs().amax(-1) > 0, mask > 0)
    own = batch | {"decoder_attention_mask": mask.flip(0)}
    decoder = run(model, own, how, noise, embedding="decoder.embed_tokens").perturbation
    assert torch.equal(decoder.abs().amax(-1) > 0, mask.flip(0) > 0)


def test_a_mask_that_does_not_fit_is_refused_and_another_can_be_given() -> None:
    class Features(nn.Module):
        """No words: as many features as a projection gives, of which the mask does not tell."""

        def __init__(self) -> None:
            super().__init__()
            self.project, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Output:
            logits = self.head(torch.tanh(self.project(x)).mean(1))
            return Output(F.cross_entropy(logits, labels), logits)

    model = Features()
    batch = {"x": torch.randn(3, 5, 4), "attention_mask": torch.ones(3, 40), "labels": torch.tensor([0, 1, 2])}
    noise = 1e-3 * torch.randn(3, 5, WIDTH)
    how = config("l2", "sample")
    with pytest.raises(ValueError, match=r"mask: got shape \(3, 40\).*`mask=`.*`smart_mask`"):
        run(model, batch, how, noise, embedding="project")
    for mask in (lambda _: None, lambda _: torch.ones(3, 5)):
        run(model, batch, how, noise, embedding="project", mask=mask)
    square = {"x": torch.randn(3, 3, 4), "attention_mask": torch.ones(3, 3), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=r"mask: got shape \(3, 3\)"):
        run(model, square, how, noise[:, :3], embedding="project")
    smart = Smart(model, how, embedding="project")
    smart(batch | {"attention_mask": torch.ones(3, 5)})
    smart(square)  # by now it is known


# ------------------------------------------------------------------------------------ padded and unpadded inside


class Padding(Encoder):
    """Pads to a multiple of 8 inside."""

    side = "right"

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        more = -input_ids.shape[1] % 8
        pad = (0, more) if self.side == "right" else (more, 0)
        return super().forward(F.pad(input_ids, pad, value=1), F.pad(attention_mask, pad), labels)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("norm", "scope"), NORMS)
def test_padding_inside_is_not_perturbed(norm: str, scope: str, side: str) -> None:
    model = Padding().double()
    model.side = side
    batch = batch_for(model)
    noise = 1e-3 * torch.randn(4, 8, WIDTH, dtype=torch.float64)
    actual = run(model, batch, config(norm, scope), noise)
    pad = (0, 2) if side == "right" else (2, 0)
    outer = {k: F.pad(batch[k], pad, value=v) for k, v in (("input_ids", 1), ("attention_mask", 0))}
    expected = run(model, outer | {"labels": batch["labels"]}, config(norm, scope), noise)
    assert torch.equal(actual.perturbation, expected.perturbation)
    assert (actual.perturbation[outer["attention_mask"] == 0] == 0).all()


class Unpadded(Encoder):
    """Looks up the real words alone, as one row."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        kept = attention_mask > 0
        x = self.words(input_ids[kept])
        x = x.new_zeros(*input_ids.shape, WIDTH).masked_scatter(kept[..., None], x)
        return self.from_embeddings(x, attention_mask, labels)


@pytest.mark.parametrize(("norm", "scope"), NORMS)
@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_without_padding_inside_a_sample_is_still_the_sample(norm: str, scope: str, adversary: str) -> None:
    model, plain = Unpadded().double(), Encoder().double()
    plain.load_state_dict(model.state_dict())
    batch = batch_for(model)
    noise = 1e-3 * torch.randn(4, 6, WIDTH, dtype=torch.float64)
    kept = batch["attention_mask"] > 0
    how = config(norm, scope, adversary)
    expected = run(plain, batch, how, noise)
    actual = run(model, batch, how, noise[kept])
    torch.testing.assert_close(actual.perturbation, expected.perturbation[kept], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-9, atol=0)


# --------------------------------------------------------------------------------------------------- packed rows


def packed(sequences: list[list[int]], how: str) -> dict[str, Any]:
    lengths = [len(s) for s in sequences]
    ids = torch.tensor([list(itertools.chain(*sequences))])
    labels = torch.tensor([list(itertools.chain(*([-100, *s[1:]] for s in sequences)))])
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "use_cache": False}
    batch["position_ids"] = torch.tensor([list(itertools.chain(*map(range, lengths)))])
    if how == "lengths":
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


@pytest.mark.parametrize("how", ["positions", "lengths"])
@pytest.mark.parametrize("epsilon", [1.0, 1e-4])
@pytest.mark.parametrize(("norm", "scope"), NORMS)
def test_a_packed_sample_is_perturbed_as_alone(norm: str, scope: str, epsilon: float, how: str) -> None:
    """With a radius that is not reached, and with one that is left at once."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).double().train()
    sequences = [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15, 16, 17]]
    whole = packed(sequences, how)
    noise = 1e-4 * torch.randn(1, 15, 16, dtype=torch.float64)
    config = SmartConfig(epsilon=epsilon, step_size=1e-2, noise_std=1e-4, norm=norm, scope=scope, mu=0.0)
    together = run(model, whole, config, noise).perturbation
    size = together.abs() if norm == "linf" else torch.stack([d.norm() for d in together.split([5, 7, 3], 1)])
    assert size.max() <= epsilon or scope == "token"
    begin = 0
    for s in sequences:
        part = slice(begin, begin + len(s))
        alone = {k: v[:, part] for k, v in whole.items() if k in ("input_ids", "labels")} | {"use_cache": False}
        expected = run(model, alone, config, noise[:, part]).perturbation
        torch.testing.assert_close(together[:, part], expected, rtol=1e-6, atol=1e-12)
        begin = part.stop


def test_a_packed_sample_whose_gradient_is_not_finite_is_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Output:
            x = self.words(input_ids)
            x.register_hook(lambda g: g.index_fill(1, torch.tensor([3]), math.nan)) if x.requires_grad else None
            logits = self.head(torch.tanh(x))
            return Output(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)

    for norm in ("l2", "linf"):
        smart = Smart(Net(), config(norm, "sample"))
        noise = 1e-3 * torch.randn(1, 7, WIDTH)
        ids, positions = torch.randint(20, (1, 7)), torch.tensor([[0, 1, 0, 1, 2, 0, 1]])
        batch = {"input_ids": ids, "position_ids": positions, "labels": ids % 3}
        out = smart(batch, initial_perturbation=noise)
        assert torch.equal(out.perturbation[:, 2:5], noise[:, 2:5])
        assert not (out.perturbation[:, :2] == noise[:, :2]).any()
        assert int(smart.skipped) == 1


# ----------------------------------------------------------------------------------------------- virtual tokens


def test_rows_of_virtual_tokens_do_not_count() -> None:
    """A learnt prompt in front: the terms are means over the labelled rows."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base.eval(), prompt)
    ids = torch.randint(20, (2, 5))
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]]) > 0, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    smart = Smart(model, SmartConfig(epsilon=0.5, noise_std=0.1, step_size=0.4, mu=0.0, adversary="random"))
    out = smart(batch)
    with torch.no_grad():
        clean = model(**batch).logits.double()
        hook = model.get_input_embeddings().register_forward_hook(lambda _m, _a, x: x + out.perturbation)
        moved = model(**batch).logits.double()
        hook.remove()
    rows = ((moved.softmax(-1) - clean.softmax(-1)) * (moved.log_softmax(-1) - clean.log_softmax(-1))).sum(-1)
    counted = F.pad(labels, (4, 0), value=-100)[:, 1:] != -100
    expected = rows[:, :-1][counted].mean()
    torch.testing.assert_close(out.smoothness.double(), expected, rtol=1e-4, atol=0)
    assert out.logits.shape[1] == 9

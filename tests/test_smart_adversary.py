"""How the perturbation is found: its bounds and directions, and what finding it costs."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from smart_models import VOCABULARY, WIDTH, Encoder, batch_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from smart_kernels import Smart, SmartConfig, symmetric_kl
from smart_kernels.smart.objective import SmartOutput

pytestmark = pytest.mark.usefixtures("one_thread")

ASCENDING = ("power", "predicted", "fisher", "task")
WIDE_BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05, "step_size": 0.15}


def noise_for(batch: dict[str, Tensor], scale: float = 0.05, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*batch["input_ids"].shape, WIDTH, dtype=dtype)


def run(model: nn.Module, batch: dict[str, Tensor], noise: Tensor | None = None, **options: Any) -> SmartOutput:
    """A step, with the warnings and the check of what does nothing switched off: radii and steps here may be tiny."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = SmartConfig(**{"mu": 0.0, "check": False, **options})
    return Smart(model, config)(batch, initial_perturbation=noise)


# ------------------------------------------------------------------------------------------------- the ball


@given(
    epsilon=st.floats(1e-6, 10), step=st.floats(1e-8, 10), std=st.floats(0, 1), norm=st.sampled_from(["linf", "l2"]),
    scope=st.sampled_from(["sample", "token"]), adversary=st.sampled_from(ASCENDING), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_in_the_ball_to_the_bit_and_not_on_padding(
    epsilon: float, step: float, std: float, norm: str, scope: str, adversary: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Encoder()
    batch = batch_for(model, seed=seed)
    delta = run(
        model, batch, epsilon=epsilon, step_size=step, noise_std=std, norm=norm, scope=scope, adversary=adversary
    ).perturbation
    assert delta is not None
    assert delta.dtype == torch.float32
    assert not delta.requires_grad
    assert (delta[batch["attention_mask"] == 0] == 0).all()
    size = delta.double()
    if norm == "l2":
        size = size.flatten(1).norm(dim=1) if scope == "sample" else size.norm(dim=2)
    assert size.abs().max() <= epsilon


def test_random_is_the_noise() -> None:
    model = Encoder()
    batch = batch_for(model)
    noise = noise_for(batch, dtype=torch.float32)
    out = run(model, batch, noise, adversary="random", epsilon=1e-9)
    assert torch.equal(out.perturbation, noise * batch["attention_mask"][..., None])
    sampled = run(model, batch_for(model, 64, 32), adversary="random", noise_std=0.1).perturbation
    assert 0.095 < sampled[sampled != 0].std() < 0.105  # some 8000 draws: 0.1 within 1 %


@pytest.mark.parametrize("adversary", [*ASCENDING, "random"])
def test_more_padding_and_another_order_change_nothing(adversary: str) -> None:
    """In float64, to rounding: sums over longer rows and in another order."""
    model = Encoder().double()
    batch = batch_for(model)
    noise = noise_for(batch)
    options = {**WIDE_BALL, "adversary": adversary}
    if adversary == "fisher":
        options["norm"] = "l2"
    reference = run(model, batch, noise, **options)

    longer = {key: nn.functional.pad(batch[key], (0, 3)) for key in ("input_ids", "attention_mask")}
    padded = run(model, {**batch, **longer}, nn.functional.pad(noise, (0, 0, 0, 3), value=1.0), **options)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = run(model, {key: value[order] for key, value in batch.items()}, noise[order], **options)
    if adversary == "fisher":  # draws one z for a row of logits, so the order counts: only the padding is compared
        shuffled = padded
    else:
        torch.testing.assert_close(shuffled.perturbation, reference.perturbation[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(padded.perturbation[:, :-3], reference.perturbation, rtol=1e-9, atol=1e-12)
    for other in (padded, shuffled):
        torch.testing.assert_close(other.loss, reference.loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(other.smoothness, reference.smoothness, rtol=1e-9, atol=0)


@pytest.mark.parametrize("adversary", ASCENDING)
@pytest.mark.parametrize("classes", [3, 1])
def test_no_radius_no_smoothness_term(adversary: str, classes: int) -> None:
    """With shared masks, dropout of 0.1 is no part of the term: exactly 0."""
    model = Encoder(classes, dropout=0.1).train()
    batch = batch_for(model, 16)
    for _ in range(3):
        out = run(model, batch, epsilon=0.0, adversary=adversary)
        assert out.smoothness == 0
        assert out.loss == out.task_loss
    assert run(model, batch, epsilon=0.0, adversary=adversary, dropout="independent").smoothness > 0


# ------------------------------------------------------------------------------------------------ directions


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("frozen_words", [False, True])
@pytest.mark.parametrize("classes", [2, 5, 1])
@pytest.mark.parametrize("adversary", ["predicted", "task"])
def test_directions(adversary: str, classes: int, frozen_words: bool, norm: str) -> None:
    """Against the definitions, in float64 and plain autograd."""
    model = Encoder(classes, frozen_words=frozen_words).double()
    batch = batch_for(model)
    labels = batch["labels"]
    objectives = {
        ("predicted", True): lambda z: -z.log_softmax(-1).amax(-1).sum(),
        ("predicted", False): lambda z: z.sum(),
        ("task", True): lambda z: nn.functional.cross_entropy(z, labels),
        ("task", False): lambda z: (z[:, 0] - labels).square().mean(),
    }
    noise = noise_for(batch) * batch["attention_mask"][..., None]
    x = model.words(batch["input_ids"]).detach().requires_grad_()
    logits = model.from_embeddings(x, batch["attention_mask"]).logits
    (g,) = torch.autograd.grad(objectives[adversary, classes > 1](logits), x)
    if norm == "linf":
        expected = (noise + 0.07 * g.sign()).clamp(-0.1, 0.1)
    else:
        expected = noise + 0.07 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1)
        expected *= (0.1 / expected.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1)
    options = {**WIDE_BALL, "step_size": 0.07, "adversary": adversary, "norm": norm}
    actual = run(model, batch, noise, **options)
    torch.testing.assert_close(actual.perturbation, expected, rtol=0, atol=1e-12)
    clean = model(**batch).logits
    moved = model.from_embeddings(model.words(batch["input_ids"]) + expected, batch["attention_mask"]).logits
    kl = symmetric_kl(moved, clean) if classes > 1 else (moved - clean).square().mean()
    torch.testing.assert_close(actual.smoothness, kl.detach(), rtol=1e-9, atol=0)


def test_fisher_draws_with_the_fisher_information_as_covariance() -> None:
    """20 000 draws: each entry of the covariance, of size 0.1, is known to 0.1 * sqrt(2 / 20 000) = 0.001."""
    from smart_kernels.smart.divergence import Classes

    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    (z,) = Classes().fisher((p.log().expand(20_000, -1),), torch.Generator().manual_seed(0))
    expected = p.diag() - p[:, None] * p
    assert (z.T @ z / len(z) - expected).abs().max() < 0.006
    torch.testing.assert_close(z.sum(1), torch.zeros(len(z)), rtol=0, atol=1e-6)


def test_predicted_keeps_its_digits_where_the_model_is_sure() -> None:
    """p - 1 would be 0 in float32 here, and the perturbation the noise."""
    from smart_kernels.smart.divergence import Classes

    logits = torch.tensor([[20.0, 0.0, 1.0]])
    (cotangent,) = Classes().predicted((logits,))
    p = logits.double().softmax(-1)[0]
    expected = torch.tensor([-(p[1] + p[2]), p[1], p[2]])
    torch.testing.assert_close(cotangent[0].double(), expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("adversary", ASCENDING)
def test_stronger_than_noise(adversary: str) -> None:
    torch.manual_seed(1)
    model = Encoder(4).double()
    batch = batch_for(model, 32)
    radius: dict[str, Any] = {"epsilon": 1e-4, "noise_std": 1e-4, "step_size": 1e-2}
    noise = run(model, batch, **radius, adversary="random").smoothness
    assert run(model, batch, **radius, adversary=adversary).smoothness > 2 * noise


# ----------------------------------------------------------------------------------------------- not finite


class Poison(torch.autograd.Function):
    """Makes the gradient of one sample infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sample: int) -> Tensor:
        ctx.sample = sample
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.sample] = math.inf
        return grad, None


class Poisoned(Encoder):
    """Sample 1 gives, in the pass of that number, a gradient that is infinite or logits that are NaN."""

    poisoned_call, how = 2, "gradient"

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)  # of all passes: an attribute of its own would count one of a step

    def from_embeddings(self, x: Tensor, *args: Any) -> Any:
        if next(self.calls) != self.poisoned_call or self.how == "nothing":
            return super().from_embeddings(x, *args)
        if self.how == "gradient":
            return super().from_embeddings(Poison.apply(x, 1), *args)
        output = super().from_embeddings(x, *args)
        output.logits = output.logits * torch.tensor([1, math.nan, 1, 1])[:, None]
        return output


@pytest.mark.parametrize("how", ["gradient", "logits"])
def test_what_is_not_finite_leaves_a_samples_noise(how: str) -> None:
    models = [Poisoned().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batch = batch_for(models[0])
    noise = noise_for(batch) * batch["attention_mask"][..., None]
    models[0].how, models[1].how = how, "nothing"
    smarts = [Smart(model, SmartConfig(**WIDE_BALL, mu=0.0, check=False)) for model in models]
    poisoned, sound = (smart(batch, initial_perturbation=noise) for smart in smarts)
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(poisoned.perturbation[others], sound.perturbation[others], rtol=1e-12, atol=0)
    assert torch.equal(poisoned.perturbation[1], noise[1].clamp(-0.1, 0.1))
    assert [int(smart.skipped) for smart in smarts] == [1, 0]
    poisoned.loss.backward()
    assert all(p.grad.isfinite().all() for p in models[0].parameters())


class Mixing(nn.Module):
    """Rows of logits that are no samples, or that several samples have part in."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.what = what

    def forward(self, words: Tensor) -> Tensor:
        return self.behind(self.words(words))

    def behind(self, x: Tensor) -> Tensor:
        states = self.mix(x.transpose(0, 1))[0].transpose(0, 1)
        if self.what == "contrastive":  # the similarity of each sample to all
            pooled = 4 * states.mean(1)
            return pooled @ pooled.T
        logits: Tensor = 8 * self.head(states)
        return logits.flatten(0, 1) if self.what == "flat" else logits


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("adversary", ["power", "predicted"])
@pytest.mark.parametrize("what", ["by token", "flat", "contrastive"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float16, 1e-3)])
@pytest.mark.filterwarnings("ignore:step_size.1:UserWarning")
def test_the_direction_is_that_of_the_divergence_whatever_the_rows_of_logits_are(
    what: str, adversary: str, norm: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Along the gradient of the sum, at the noise or at none, by autograd in float64."""
    torch.manual_seed(0)
    model = Mixing(what).double()
    words, noise = torch.randint(VOCABULARY, (4, 6)), 0.1 * torch.randn(4, 6, WIDTH, dtype=torch.float64)
    options = {"adversary": adversary, "norm": norm, "epsilon": 10.0, "step_size": 1.0, "mu": 0.0}

    def forward(model: nn.Module, words: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(words)
        return logits.square().mean(), logits

    smart = Smart(copy.deepcopy(model).to(dtype), SmartConfig(**options), forward=forward)
    found = smart(words, initial_perturbation=noise).perturbation
    at = (noise if adversary == "power" else torch.zeros_like(noise)).requires_grad_()
    clean, logits = (model.behind(model.words(words).detach() + x) for x in (0, at))
    if adversary == "power":
        loss = symmetric_kl(logits, clean.detach(), reduction="sum")
    else:  # the likeliest class of each row
        loss = logits.log_softmax(-1).amax(-1).sum()
    (grad,) = torch.autograd.grad(loss, at)
    if norm == "linf" and adversary == "predicted":
        grad = grad.sign()
    cosine = F.cosine_similarity((found - noise.detach()).flatten(1), grad.flatten(1))
    assert (cosine.abs() >= 1 - tolerance).all(), cosine


def test_a_gradient_that_fp16_cannot_hold_is_found() -> None:
    """Of a prediction this sure the cotangent is 1e-9, which fp16 rounds to 0: so it is scaled first."""
    torch.manual_seed(0)
    model = Encoder().half()
    with torch.no_grad():
        model.head.bias += torch.tensor([20.0, 0.0, 0.0])
    batch = batch_for(model)
    noise = torch.zeros(*batch["input_ids"].shape, WIDTH)
    options = {"adversary": "predicted", "epsilon": 1.0, "step_size": 1.0, "norm": "l2"}
    actual = run(model, batch, noise, **options).perturbation
    exact = run(copy.deepcopy(model).double(), batch, noise.double(), **options).perturbation
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-3)  # of 1: some ten roundings to 11 bits


# ------------------------------------------------------------------------------------------------- the cost

COUNTED = transformers.BertConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, vocab_size=VOCABULARY,
    num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
)  # fmt: skip


def flops(model: nn.Module, batch: dict[str, Tensor], config: SmartConfig | None = None) -> int:
    """Floating-point operations of all matrix products of a step, forward and backward."""
    run = model if config is None else Smart(model, config, 10)
    with FlopCounterMode(display=False) as counter:
        (run(**batch) if config is None else run(batch)).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({"mu": 0}, 8 / 3),
        ({"mu": 0, "ascent_steps": 3}, 12 / 3),
        ({"mu": 0, "adversary": "predicted"}, 7 / 3),
        ({"mu": 0, "adversary": "fisher"}, 7 / 3),
        ({"mu": 0, "adversary": "task"}, 7 / 3),
        ({"mu": 0, "adversary": "random"}, 6 / 3),
        ({"lambda_s": 0}, 4 / 3),
        ({"lambda_s": 0, "proximal": "none"}, 1),
        ({}, 9 / 3),
    ],
)
def test_no_matrix_product_too_many(options: dict[str, Any], units: float) -> None:
    """A forward is 1, a backward 1 for the inputs and 1 for the weights; a vanilla step is 3.

    Scores and mixing of the attention have no weights, but inputs on both sides, so their backward counts 2 in
    any case: 8 tokens of 64 features make them 1/49 of all products, by which an inner backward is dearer.
    """
    model = transformers.BertForSequenceClassification(COUNTED)
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "labels": torch.tensor([0, 1])}
    vanilla = flops(model, batch)
    assert (
        flops(model, batch, SmartConfig(**options, check=False))
        <= (units + (options.get("ascent_steps", 1) / 3 + 0.1) / 49) * vanilla
    )


def test_nothing_is_kept_for_the_weights_in_the_inner_pass() -> None:
    """Of what a linear layer multiplies, the pass in between keeps the weight alone."""
    model = transformers.BertForSequenceClassification(COUNTED)
    weights = {p.data_ptr() for p in model.parameters()}
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "labels": torch.tensor([0, 1])}
    smart = Smart(model, SmartConfig(mu=0.0, check=False))
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept[-1] += x.numel() * (x.data_ptr() not in weights)
        return x

    model.register_forward_pre_hook(lambda *_: kept.append(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        smart(batch)
    clean, inner, perturbed = kept
    assert inner < 0.75 * clean
    assert perturbed == pytest.approx(clean, rel=0.05)


@pytest.mark.parametrize("adversary", ASCENDING)
def test_gradients_that_stand_are_not_touched(adversary: str) -> None:
    model = Encoder()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    grads = [p.grad for p in model.parameters()]
    run(model, batch_for(model), adversary=adversary)
    assert all(p.grad is grad and (grad == 7).all() for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("adversary", [*ASCENDING, "random"])
def test_without_gradients_the_terms_can_be_evaluated(adversary: str) -> None:
    model = Encoder().double()
    batch = batch_for(model)
    noise = noise_for(batch)
    options = {**WIDE_BALL, "adversary": adversary}
    expected = run(model, batch, noise, **options)
    with torch.no_grad():
        actual = run(model, batch, noise, **options)
    assert not actual.loss.requires_grad
    if adversary != "fisher":  # whose draws differ
        torch.testing.assert_close(actual.loss, expected.loss.detach(), rtol=1e-12, atol=0)

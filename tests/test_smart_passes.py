"""Every pass of a step is the clean pass again, and leaves no trace: in the programs that people write."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from smart_models import VOCABULARY, WIDTH, Encoder, Output, batch_for
from torch import Tensor, nn
from torch.nn import functional as F

from smart_kernels import Smart, SmartConfig

pytestmark = pytest.mark.usefixtures("one_thread")

BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05}
STILL: dict[str, Any] = {"epsilon": 0.0, "noise_std": 0.0}
ADVERSARIES = ("power", "predicted", "fisher", "task", "random")


def still() -> SmartConfig:
    """A ball that is a point: each term measures what the passes differ by otherwise."""
    with pytest.warns(UserWarning, match="epsilon=0"):
        return SmartConfig(**STILL, check=False)


def assert_the_same_passes(model: nn.Module, batch: Any, **options: Any) -> None:
    """Without a perturbation, and with a teacher that has not moved, the terms are 0 to the bit."""
    out = Smart(model, still(), 10, **options)(batch)
    assert out.smoothness == 0
    assert out.proximal == 0


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """The definition, of logits in float64."""
    return ((a.softmax(-1) - b.softmax(-1)) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


# --------------------------------------------------------------------------------------------------- random numbers


class Drawing(Encoder):
    """Multiplies its embeddings by what a function draws."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.draw = draw

    def from_embeddings(self, x: Tensor, *args: Any) -> Any:
        return super().from_embeddings(x * float(self.draw()), *args)


class Holding(Drawing):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__(self._draw)
        self.of_torch, self.of_python, self.of_numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)

    def _draw(self) -> float:
        return float(torch.rand((), generator=self.of_torch)) + self.of_python.random() + self.of_numpy.random()


@pytest.mark.parametrize("dropout", ["shared", "off"])
@pytest.mark.parametrize("draw", [np.random.rand, random.random, lambda: torch.rand(())])
def test_generators_repeat_what_they_gave_and_end_as_after_one_pass(draw: Callable[[], Any], dropout: str) -> None:
    model = Drawing(draw)
    batch = batch_for(model)

    def seeded(function: Callable[[], Any]) -> tuple[Any, list[Any]]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        result = function()
        return result, [torch.rand(()).item(), random.random(), np.random.rand()]

    _, expected = seeded(lambda: model(**batch))
    with pytest.warns(UserWarning, match="epsilon=0"):
        smart = Smart(model, SmartConfig(**STILL, dropout=dropout), 10)
    out, after = seeded(lambda: smart(batch))
    assert out.smoothness == out.proximal == 0
    assert after == expected


def test_generators_that_a_module_holds_are_repeated() -> None:
    model = Holding()
    assert_the_same_passes(model, batch_for(model))


def test_autocast_and_modes_of_the_function_hold_in_every_pass() -> None:
    """The second pass would find other logits by 1e-3 in float32, and with dropout."""
    model = Encoder(dropout=0.5)

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**batch)
        model.train()
        return out.loss, out.logits

    assert_the_same_passes(model.train(), batch_for(model), forward=forward)


@pytest.mark.parametrize("dropout", ["shared", "off"])
def test_fast_paths_of_evaluation_are_not_taken_by_some_passes_alone(dropout: str) -> None:
    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, WIDTH)
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Output:
            x = self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
            logits = self.head(x[:, 0])
            return Output(F.cross_entropy(logits, labels), logits)

    model = Fast()
    batch = batch_for(Encoder())
    with pytest.warns(UserWarning, match="epsilon=0"):
        config = SmartConfig(**STILL, dropout=dropout, check=False)
    out = Smart(model, config, 10)(batch)
    assert out.smoothness == out.proximal == 0
    assert torch.backends.mha.get_fastpath_enabled()


# -------------------------------------------------------------------------------------------------------- the batch


def test_a_batch_that_is_used_up_is_the_same_for_each_pass_and_ends_as_after_one() -> None:
    model = Encoder().double()
    batch = batch_for(model)
    noise = 0.05 * torch.randn(4, 6, WIDTH, dtype=torch.float64)

    def pops(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch.pop("labels")
        batch["input_ids"].clamp_(max=5)
        logits = model(**batch).logits
        return F.cross_entropy(logits, labels), logits

    plain, used = copy.deepcopy(batch), copy.deepcopy(batch)
    pops(model, plain)
    expected = Smart(model, SmartConfig(**BALL), 10)(
        batch | {"input_ids": batch["input_ids"].clamp(max=5)}, initial_perturbation=noise
    )
    actual = Smart(model, SmartConfig(**BALL), 10, forward=pops)(used, initial_perturbation=noise)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=0)
    assert used.keys() == plain.keys()
    assert all(torch.equal(used[k], plain[k]) for k in plain)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_cache_grows_as_in_one_pass(pieces: int) -> None:
    """Of keys and values, filled before or, in pieces, by the function's own calls."""
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **options)).train()
    ids = torch.randint(20, (2, 6))
    with torch.no_grad():
        cache = model(torch.randint(20, (2, 3)), use_cache=True).past_key_values

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        parts = [
            model(input_ids=part, past_key_values=batch["cache"], use_cache=True).logits
            for part in batch["input_ids"].chunk(pieces, 1)
        ]
        logits = torch.cat(parts, 1)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()), logits

    batch = {"input_ids": ids, "cache": cache}
    assert_the_same_passes(model, batch, forward=forward)
    assert cache.get_seq_length() == 9


# ------------------------------------------------------------------------------------- gradients within the model


class Forces(nn.Module):
    """Gives an energy and, as its gradient by positions, forces."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH + 3, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            x = F.dropout(torch.tanh(self.mix(torch.cat([self.words(ids), positions], -1))), 0.3)
            energy = self.head(x.sum(1))
            return energy, -torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]


class Slopes(Forces):
    """The same by torch.func."""

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        def energy(positions: Tensor) -> tuple[Tensor, Tensor]:
            e = self.head(torch.tanh(self.mix(torch.cat([x, positions], -1))).sum(1))
            return e.sum(), e

        x = self.words(ids)
        forces, e = torch.func.grad(energy, has_aux=True)(positions)
        return e, -forces


@pytest.mark.parametrize("options", [{}, {"lambda_s": 0.0}, {"dropout": "independent", "check": False}])
@pytest.mark.parametrize("kind", [Forces, Slopes])
def test_a_model_that_takes_gradients_in_its_forward_pass(kind: type[Forces], options: dict[str, Any]) -> None:
    """The terms are those of the function, run by hand with the teacher's weights and from the same random numbers."""
    torch.manual_seed(0)
    model = kind().double()
    batch = {"ids": torch.randint(0, 20, (6, 5)), "positions": torch.randn(6, 5, 3, dtype=torch.float64)}

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        energy, forces = model(**batch)
        return energy.square().mean() + forces.square().mean(), energy

    smart = Smart(model, SmartConfig(**BALL, **options), 10, forward=forward)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    for _ in range(2):
        before = torch.get_rng_state()
        out = smart.backward(batch)
        after = torch.get_rng_state()
        assert smart.teacher is not None
        torch.set_rng_state(before)
        clean = model(**batch)[0].detach()
        assert torch.equal(torch.get_rng_state(), after)
        torch.set_rng_state(before)
        with smart.teacher.weights():
            taught = model(**batch)[0].detach()
        torch.set_rng_state(after)
        if options.get("dropout") != "independent":
            torch.testing.assert_close(out.proximal, (clean - taught).square().mean())


# ------------------------------------------------------------------------------------------ metrics and other traces


class Meter:
    """Neither a module nor anything else that could be looked into."""

    def __init__(self) -> None:
        self.calls = 0


class TwoTowers(nn.Module):
    """Encodes two texts by one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, 3)

    def encode(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.words(ids))).mean(1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encode(ids)


PAIR = {"a": torch.tensor([[1, 2, 3], [4, 5, 6]]), "b": torch.tensor([[7, 8], [9, 1]]), "labels": torch.tensor([0, 2])}


def once(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    out = model(**batch)
    return out.loss, out.logits


def derived(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits that are made of the model's, in place and not."""
    logits = model(**batch).logits
    logits = torch.cat([logits[:, :1], 2 * logits[:, 1:]], 1).float()
    logits /= 1.5
    logits[:, 0] += 1
    return F.cross_entropy(logits, batch["labels"]), logits


def looked_at_twice(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    out = model(**batch)
    with torch.no_grad():
        model.eval()
        model(**batch)
        model.train()
    return out.loss, out.logits


def parts(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The model itself is never called; a weight is used by a function."""
    x = model.norm(model.words(batch["input_ids"]))
    logits = F.linear(torch.tanh(x).mean(1), model.head.weight, model.head.bias)
    return F.cross_entropy(logits, batch["labels"]), logits


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("function", [once, derived, looked_at_twice, parts])
def test_the_function_runs_once_and_its_terms_are_right(function: Any, adversary: str) -> None:
    """Against the function itself, run by hand on embeddings + delta and with the teacher's weights."""
    model = Encoder().train()
    batch = batch_for(model)
    calls = Meter()

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        calls.calls += 1
        return function(model, batch)  # type: ignore[no-any-return]

    smart = Smart(model, SmartConfig(**BALL, adversary=adversary, check=False), 10, forward=forward)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    out = smart(batch)
    assert calls.calls == 1
    with torch.no_grad():
        clean = function(model, batch)[1].double()
        handle = model.words.register_forward_hook(lambda _m, _a, x: x + out.perturbation)
        perturbed = function(model, batch)[1].double()
        handle.remove()
        assert smart.teacher is not None
        with smart.teacher.weights():
            taught = function(model, batch)[1].double()
    torch.testing.assert_close(out.smoothness.double(), symmetric_kl(perturbed, clean).mean(), rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(out.proximal.double(), symmetric_kl(clean, taught).mean(), rtol=2e-4, atol=1e-9)
    out.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_each_call_of_the_module_has_a_perturbation_of_its_own(adversary: str) -> None:
    """Two towers, logits made outside of the model: R_s and its gradient are those of the definition, in float64."""
    model = TwoTowers().double()
    twin = copy.deepcopy(model)

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model.head(torch.cat([model(batch["a"]), model(batch["b"])], 1))
        return F.cross_entropy(logits, batch["labels"]), logits

    smart = Smart(model, SmartConfig(**BALL, adversary=adversary, mu=0.0), forward=forward)
    with pytest.warns(UserWarning, match="2 times"):
        out = smart(PAIR)
    out.loss.backward()
    assert isinstance(out.perturbation, tuple)
    assert [d.shape for d in out.perturbation] == [(2, 3, WIDTH), (2, 2, WIDTH)]
    if adversary != "random":
        assert all(d.abs().amax((1, 2)).sub(0.1).abs().max() < 1e-7 for d in out.perturbation)

    def logits(deltas: tuple[Any, Any]) -> Tensor:
        sides = [torch.tanh(twin.mix(twin.words(PAIR[k]) + d)).mean(1) for k, d in zip("ab", deltas, strict=True)]
        return twin.head(torch.cat(sides, 1))

    clean = logits((0, 0))
    expected = symmetric_kl(logits(out.perturbation), clean).mean()
    torch.testing.assert_close(out.smoothness, expected.detach(), rtol=1e-9, atol=0)
    (F.cross_entropy(clean, PAIR["labels"]) + expected).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)


SEEN: list[int] = []


class Counting(Encoder):
    """Counts its passes in many ways, and makes them matter."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.history = 0, []
        self.by_name: dict[str, Any] = collections.defaultdict(list)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.average = torch.zeros(2)

    def from_embeddings(self, x: Tensor, *args: Any) -> Any:
        self.steps += 1
        self.history.append(self.steps)
        self.by_name["steps"].append(self.steps)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1  # assigned anew
        self.average.mul_(0.5).add_(1.0)
        return super().from_embeddings(x * (1 + self.steps + len(self.history) + self.count + self.mean.sum()), *args)

    def traces(self) -> list[Any]:
        return [self.steps, self.history, dict(self.by_name), self.count, self.mean, self.average]


def test_counters_buffers_and_lists_of_the_model_see_one_pass() -> None:
    plain, model = Counting(), Counting()
    batch = batch_for(model)
    smart = Smart(model, still(), 10)
    for _ in range(3):
        plain(**batch)
        mean = model.mean
        out = smart(batch)
        assert out.smoothness == out.proximal == 0
        assert model.mean is not mean
    torch.testing.assert_close(model.traces(), plain.traces(), rtol=0, atol=0)


def test_a_function_that_cannot_be_followed_runs_again_and_its_traces_are_put_back() -> None:
    """Logits that go through NumPy and back by a function of autograd's that no recording sees."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.from_numpy(2 * x.detach().numpy())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    model = Encoder()
    batch = batch_for(model)
    count, kept = 0, []
    metric = nn.Module()
    metric.total = 0
    numbers = iter(range(10))

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        kept.append(count)
        SEEN.append(count)
        metric.total += len(batch["labels"])
        next(numbers)
        logits = Through.apply(model(batch.pop("input_ids"), batch["attention_mask"]).logits)
        return F.cross_entropy(logits, batch["labels"]), logits

    SEEN.clear()
    out = Smart(model, SmartConfig(**BALL, check=False), 10, forward=forward)(dict(batch))
    assert next(numbers) == 4  # the function did run for each of the four passes
    assert (count, kept, SEEN, metric.total) == (1, [1], [1], 4)
    expected = Smart(model, SmartConfig(**BALL, check=False), 10, forward=lambda m, b: doubled(m, b))(
        batch, initial_perturbation=None, generator=torch.Generator().manual_seed(0)
    )
    again = Smart(model, SmartConfig(**BALL, check=False), 10, forward=forward)(
        dict(batch), generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(again.smoothness, expected.smoothness, rtol=1e-5, atol=0)
    assert out.smoothness > 0


def doubled(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    logits = 2 * model(batch["input_ids"], batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"]), logits


class Doubled(torch.autograd.Function):
    """Twice a tensor, with a gradient of three times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def by_function_of_ones_own(model: Any, x: Tensor) -> Tensor:
    return Doubled.apply(model(x))


def by_a_value(model: Any, x: Tensor) -> Tensor:
    logits = model(x)
    return logits * float(logits.detach().abs().max())


def by_numpy(model: Any, x: Tensor) -> Tensor:
    logits = model(x)
    return logits * torch.from_numpy(logits.detach().abs().numpy()).amax()


def by_a_changed_view(model: Any, x: Tensor) -> Tensor:
    logits = model(x)
    F.relu(logits[:, 1:], inplace=True)
    return logits


def by_packed_rows(model: Any, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(model.words(x), torch.tensor([3, 2]), batch_first=True)
    rows, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    return model.head(torch.tanh(model.mix(rows)).sum(1))


@pytest.mark.parametrize("adversary", ["power", "predicted", "random"])
@pytest.mark.parametrize("way", [by_function_of_ones_own, by_a_value, by_numpy, by_a_changed_view, by_packed_rows])
def test_logits_that_are_made_in_other_ways_than_by_torchs_functions(way: Any, adversary: str) -> None:
    """Terms and gradients are the definition's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mix(self.words(ids))).mean(1))

    model = Net().double()
    twin = copy.deepcopy(model)

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = way(model, batch["a"])
        return F.cross_entropy(logits, batch["labels"]), logits

    smart = Smart(model, SmartConfig(**BALL, adversary=adversary), 10, forward=forward)
    with torch.no_grad():
        for m in (model, twin):
            m.mix.weight.mul_(1.1)
    out = smart(PAIR)
    out.loss.backward()
    assert smart.teacher is not None
    loss, clean = forward(twin, PAIR)
    handle = twin.words.register_forward_hook(lambda _m, _a, x: x + out.perturbation)
    moved = way(twin, PAIR["a"])
    handle.remove()
    with torch.no_grad():
        taught = torch.func.functional_call(
            Way(twin, way), {f"model.{n}": s for n, s in smart.teacher.shadows.items()}, PAIR["a"]
        )
    terms = symmetric_kl(moved, clean).mean(), symmetric_kl(clean, taught).mean()
    torch.testing.assert_close(out.smoothness, terms[0].detach(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(out.proximal, terms[1].detach(), rtol=1e-9, atol=1e-15)
    (loss + terms[0] + terms[1]).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)


class Way(nn.Module):
    def __init__(self, model: nn.Module, way: Any) -> None:
        super().__init__()
        self.model, self.way = model, way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.model, x)  # type: ignore[no-any-return]


def test_a_loss_alone_is_compared_by_what_no_other_call_takes_up() -> None:
    """Parts are called by the function, and a criterion is one of them."""

    class Net(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

    def alone(model: Any, batch: Any) -> Tensor:
        hidden = model.norm(model.words(batch["input_ids"]))
        return model.criterion(model.head(torch.tanh(hidden).mean(1)), batch["labels"])  # type: ignore[no-any-return]

    model = Net()
    out = Smart(model, SmartConfig(**BALL), 10, forward=alone)(batch_for(model))
    assert out.logits.shape == (4, 3)
    assert out.smoothness > 0


class Judged(nn.Module):
    """A classifier whose loss, activation, metric and pooling are parts of it and are called by the function."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.pool, self.soft, self.hard = Pool(), nn.Softmax(-1), nn.Sigmoid()
        self.each = nn.CrossEntropyLoss(reduction="none")
        self.apart = nn.BCEWithLogitsLoss(reduction="none")
        self.near = nn.CosineEmbeddingLoss(reduction="none")

    def encode(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.words(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encode(ids).mean(1))


class Pool(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _each(m: Any, b: Any) -> Tensor:
    return (m.each(m(b["input_ids"]), b["labels"]) * b["weights"]).mean()


def _with_a_metric(m: Any, b: Any) -> Tensor:
    logits = m(b["input_ids"])
    m.soft(logits)
    return m.each(logits, b["labels"]).mean()


def _activated(m: Any, b: Any) -> Tensor:
    return F.nll_loss(m.soft(m(b["input_ids"])).log(), b["labels"])


def _of_labels_apart(m: Any, b: Any) -> Tensor:
    return m.apart(m(b["input_ids"]), F.one_hot(b["labels"], 3).float()).mean()


def _scaled(m: Any, b: Any) -> Tensor:
    return m.each(m(b["input_ids"]) / 2, b["labels"]).mean()


def _by_pieces(m: Any, b: Any) -> Tensor:
    hidden = m.pool(torch.tanh(m.mix(m.words(b["input_ids"]))), torch.ones_like(b["input_ids"]))
    return m.each(m.head(m.hard(torch.logit((hidden + 1) / 2)) * 2 - 1), b["labels"]).mean()


def _near(m: Any, b: Any) -> Tensor:
    logits = m(b["input_ids"])
    return m.near(logits, F.one_hot(b["labels"], 3).float(), 2.0 * (b["labels"] > 0) - 1).mean()


@pytest.mark.parametrize("alone", [_each, _with_a_metric, _activated, _of_labels_apart, _scaled, _by_pieces, _near])
def test_a_loss_alone_is_not_compared_by_what_judges_the_logits(alone: Any) -> None:
    """Against the divergence of the model's logits, by their definition."""
    torch.manual_seed(0)
    model = Judged()
    g = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, VOCABULARY, (6, 5), generator=g),
        "labels": torch.randint(0, 3, (6,), generator=g),
        "weights": torch.rand(6, generator=g),
    }
    out = Smart(model, SmartConfig(**BALL), 10, forward=alone)(batch)
    with torch.no_grad():
        clean = model(batch["input_ids"])
        handle = model.words.register_forward_hook(lambda _m, _a, x: x + out.perturbation)
        perturbed = model(batch["input_ids"])
        handle.remove()
    torch.testing.assert_close(out.logits, clean)
    expected = symmetric_kl(perturbed.double(), clean.double()).mean()
    torch.testing.assert_close(out.smoothness.double(), expected, rtol=2e-4, atol=1e-9)


def test_a_loss_alone_is_compared_by_the_scores_of_two_texts() -> None:
    """By squared error, as they are numbers; the embeddings that they come from are no classes."""
    torch.manual_seed(0)
    model = Judged()
    model.similarity = nn.CosineSimilarity()
    pairs = {"a": torch.randint(0, VOCABULARY, (6, 5)), "b": torch.randint(0, VOCABULARY, (6, 5)), "y": torch.rand(6)}

    def alone(m: Any, batch: Any) -> Tensor:
        return F.mse_loss(m.similarity(m(batch["a"]), m(batch["b"])), batch["y"])

    out = Smart(model, SmartConfig(**BALL), 10, forward=alone)(pairs)
    with torch.no_grad():
        clean = model.similarity(model(pairs["a"]), model(pairs["b"]))
        moves = iter(out.perturbation)
        handle = model.words.register_forward_hook(lambda _m, _a, x: x + next(moves))
        perturbed = model.similarity(model(pairs["a"]), model(pairs["b"]))
        handle.remove()
    expected = (perturbed.double() - clean.double()).square().mean()
    torch.testing.assert_close(out.smoothness.double(), expected, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_alone_is_compared_by_what_a_last_pooling_gives(masked: bool) -> None:
    """It has no parameters, as a loss has none."""
    model = Judged()
    model.average = nn.AdaptiveAvgPool2d((1, None))
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])

    def embed(m: Any, ids: Tensor) -> Tensor:
        hidden = m.mix(m.words(ids))
        return m.pool(hidden, torch.ones_like(ids)) if masked else m.average(hidden)

    def alone(m: Any, batch: Any) -> Tensor:
        return embed(m, batch["input_ids"]).square().mean()

    out = Smart(model, SmartConfig(**BALL), 10, forward=alone)({"input_ids": ids})
    torch.testing.assert_close(out.logits, embed(model, ids).detach())


class Lazy(Encoder):
    """Installs a hook in its first pass, and remembers that it has."""

    installed = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen: list[Tensor] = []
        if not self.installed:
            self.installed = True
            self.head.register_forward_hook(lambda _m, _a, x: self.seen.append(x))
        return super().forward(*args, **kwargs)


def test_hooks_that_a_first_pass_installs_are_installed_once() -> None:
    model = Lazy()
    smart = Smart(model, SmartConfig(**BALL), 10)
    for _ in range(2):
        smart(batch_for(model))
        assert len(model.head._forward_hooks) == len(model.seen) == 1


def test_hidden_states_of_transformers_are_as_many_in_each_step() -> None:
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )
    numbers = []

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        out = model(**batch, output_hidden_states=True)
        numbers.append(len(out.hidden_states))
        return out.loss, out.logits

    smart = Smart(model, SmartConfig(**BALL), 10, forward=forward)
    for _ in range(2):
        smart({"input_ids": torch.randint(0, 20, (2, 5)), "labels": torch.tensor([0, 1])})
    assert numbers == [3, 3]


class Features(nn.Module):
    """Gives what it got, with more in it, as sentence-transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        features["states"] = torch.tanh(self.mix(self.words(features["ids"])))
        features["sentence_embedding"] = features["states"].mean(1)
        return features


def _shortened(model: Any, features: dict[str, Tensor]) -> Tensor:
    """The model gets its features again, and gives what it has kept, shortened."""
    own, kept = model.forward, []

    def shorter(features: dict[str, Tensor]) -> dict[str, Tensor]:
        out = own(features) if not kept else kept[0]
        kept.append(out)
        out["sentence_embedding"] = out["sentence_embedding"][:, : WIDTH // len(kept)]
        return out

    model.forward = shorter
    try:
        return sum(model(features)["sentence_embedding"].square().sum(1).mean() for _ in range(2))
    finally:
        model.forward = own


def _guided(model: Any, features: dict[str, Tensor]) -> Tensor:
    """Another model writes into the same features."""
    given = model(features)["sentence_embedding"]
    features["sentence_embedding"] = torch.ones(len(given), WIDTH)
    return (given - features["sentence_embedding"]).square().mean()


@pytest.mark.parametrize(("alone", "widths"), [(_shortened, [WIDTH, WIDTH // 2]), (_guided, [WIDTH])])
@pytest.mark.parametrize("adversary", ["power", "predicted", "random"])
def test_a_model_that_writes_into_its_features(alone: Any, widths: list[int], adversary: str) -> None:
    """Compared is what each of its calls gave then: against the squared error of these, by their definition."""
    torch.manual_seed(0)
    model = Features().double()
    ids = torch.randint(0, VOCABULARY, (3, 4))
    config = SmartConfig(**BALL, divergence="squared_error", adversary=adversary, mu=0.0)
    smart = Smart(model, config, forward=alone)
    for _ in range(2):
        out = smart({"ids": ids})
        clean = model({"ids": ids})["sentence_embedding"].detach()
        moved = torch.tanh(model.mix(model.words(ids) + out.perturbation)).mean(1).detach()
        logits = out.logits if isinstance(out.logits, tuple) else (out.logits,)
        for x, width in zip(logits, widths, strict=True):
            torch.testing.assert_close(x, clean[:, :width])
        parts = [(moved - clean)[:, :width].square().mean() for width in widths]
        torch.testing.assert_close(out.smoothness, torch.stack(parts).mean())


class Tallies(Encoder):
    """Counts in places that are neither attributes nor lists of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.array, self.counter, self.meter = np.zeros(2), collections.Counter(), Meter()
        self.tensors, self.named = [torch.zeros(2)], {"total": torch.zeros(2)}

    def from_embeddings(self, x: Tensor, *args: Any) -> Any:
        self.array += 1
        self.counter["passes"] += 1
        self.meter.calls += 1
        self.tensors[0] += 1
        self.named["total"].add_(1)
        total = (
            self.array.sum()
            + self.counter["passes"]
            + self.meter.calls
            + self.tensors[0].sum()
            + self.named["total"][0]
        )
        return super().from_embeddings(x * float(total), *args)


def test_arrays_tensors_in_lists_and_own_objects_see_one_pass() -> None:
    model = Tallies()
    smart = Smart(model, still(), 10)
    for _ in range(3):
        out = smart(batch_for(model))
        assert out.smoothness == out.proximal == 0
    tallies = *model.array, model.counter["passes"], model.meter.calls, *model.tensors[0], *model.named["total"]
    assert all(float(x) == 3 for x in tallies)


def test_a_layer_may_have_an_attribute_of_any_name() -> None:
    class Reshape(nn.Module):
        shape = (-1, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(self.shape)

    class Net(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.reshape = Reshape()

    model = Net()
    Smart(model, SmartConfig(**BALL), 10)(batch_for(model))


# ---------------------------------------------------------------------------------------------------------- buffers


class Scaled(Encoder):
    """Multiplies by a buffer that training moves in place: it is in the graph of each pass."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(size, dtype=torch.float64))

    def from_embeddings(self, x: Tensor, *args: Any) -> Any:
        self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        return super().from_embeddings(x * self.scale[:1], *args)


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_buffer_in_the_graph_is_not_changed_under_it(adversary: str, size: int) -> None:
    """The gradient is that of each pass with the buffer as that pass had it, on the perturbation that was found."""
    model = Scaled(size).double()
    twin = copy.deepcopy(model)
    batch = batch_for(model)
    smart = Smart(model, SmartConfig(**BALL, adversary=adversary, mu=0.0, check=False))
    smart(batch)  # a large one is known to change from here on
    model.zero_grad()
    twin.load_state_dict(model.state_dict())
    before = model.scale.clone()
    out = smart(batch)
    out.loss.backward()

    x = twin.words(batch["input_ids"])
    clean = twin.from_embeddings(x, batch["attention_mask"], batch["labels"])
    after = twin.scale
    twin.scale = before
    # the mean of the perturbed embeddings moves the buffer in the perturbed pass
    perturbed = twin.from_embeddings(x + out.perturbation, batch["attention_mask"]).logits
    (clean.loss + symmetric_kl(perturbed, clean.logits).mean()).backward()
    assert torch.equal(model.scale, after)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_with_max_norm(tied: bool) -> None:
    """The look-up scales the weights in place: the student's as plain training does, the teacher's not at all."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(20, WIDTH, max_norm=1.0), nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, 20)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
            x = torch.tanh(self.mix(self.words(input_ids)))
            logits = x @ self.words.weight.T if tied else self.head(x)
            return Output(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)

    model = Net()
    plain = copy.deepcopy(model)
    ids = torch.randint(20, (3, 5))
    smart = Smart(model, SmartConfig(**BALL), 10)
    assert smart.teacher is not None
    shadow = smart.teacher.shadows["words.weight"].clone()
    out = smart({"input_ids": ids, "labels": ids})
    out.loss.backward()
    plain(ids, ids)
    assert torch.equal(model.words.weight, plain.words.weight)
    assert torch.equal(smart.teacher.shadows["words.weight"], shadow)
    assert out.proximal == 0  # the teacher is the student, and is looked up alike
    assert out.smoothness > 0


# ---------------------------------------------------------------------------------------------- the perturbed module


@dataclasses.dataclass
class Parts:
    lengths: Tensor
    x: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (torch.ones(3, dtype=torch.int64), x, x.detach() + 1),
        lambda x: {"lengths": torch.ones(3, dtype=torch.int64), "x": x},
        lambda x: Parts(torch.ones(3, dtype=torch.int64), x),
    ],
    ids=["tuple", "dict", "dataclass"],
)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_the_first_floating_tensor_of_several_parts_is_perturbed(wrap: Any, adversary: str) -> None:
    class Wrapping(nn.Module):
        def __init__(self, words: nn.Module) -> None:
            super().__init__()
            self.words = words

        def forward(self, ids: Tensor) -> Any:
            return wrap(self.words(ids))

    class Net(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.first = Wrapping(self.words)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
            given = self.first(input_ids)
            x = given[1] if isinstance(given, tuple) else given["x"] if isinstance(given, dict) else given.x
            return self.from_embeddings(x, attention_mask, labels)

    model = Net().double()
    batch = batch_for(model)
    noise = 0.05 * torch.randn(4, 6, WIDTH, dtype=torch.float64)
    config = SmartConfig(**BALL, adversary=adversary)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    outs = [
        Smart(model, config, 10, embedding=name)(batch, initial_perturbation=noise, generator=g)
        for name, g in zip(("first", "words"), generators, strict=True)
    ]
    torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(outs[0].perturbation, outs[1].perturbation, rtol=1e-12, atol=0)


def test_a_module_in_a_checkpointed_region_is_refused() -> None:
    class Net(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
            logits = torch.utils.checkpoint.checkpoint(
                lambda ids: super(Net, self).forward(ids, attention_mask).logits, input_ids, use_reentrant=False
            )
            return Output(F.cross_entropy(logits, labels), logits)

    model = Net()
    for adversary in ADVERSARIES:
        with pytest.raises(RuntimeError, match=r"embedding: .* checkpointed region"):
            Smart(model, SmartConfig(**BALL, adversary=adversary), 10)(batch_for(model))


def test_two_encoders_are_refused_by_name() -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = transformers.BertModel(transformers.BertConfig(vocab_size=20, **tiny))
            self.right = transformers.BertModel(transformers.BertConfig(vocab_size=20, **tiny))

    with pytest.raises(ValueError, match=r"embedding: .*'left\.embeddings\.word.*'right\.embeddings\.word"):
        Smart(Two(), SmartConfig(), 10)


@pytest.mark.parametrize("lambda_s", [0.0, 1.0])
def test_a_model_that_changed_afterwards_is_refused(lambda_s: float) -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    batch = {"input_ids": torch.randint(20, (2, 4)), "labels": torch.tensor([0, 1])}

    def resized(model: Any) -> None:
        model.resize_token_embeddings(30)

    def unfrozen(model: Any) -> None:
        model.bert.embeddings.word_embeddings.weight.requires_grad_(True)

    def exchanged(model: Any) -> None:
        model.classifier = nn.Linear(8, 2)

    for change in (resized, unfrozen, exchanged):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **tiny))
        model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
        smart = Smart(model, SmartConfig(lambda_s=lambda_s), 10)
        smart(batch)
        change(model)
        assert smart.teacher is not None
        shadows = {n: s.clone() for n, s in smart.teacher.shadows.items()}
        with pytest.raises(ValueError, match="make Smart afterwards"):
            smart(batch)
        assert all(torch.equal(s, shadows[n]) for n, s in smart.teacher.shadows.items())


# -------------------------------------------------------------------------------------------------------- the check


def test_the_check_names_what_differs() -> None:
    model = Drawing(iter([1.0 + 0.01 * i for i in range(99)]).__next__)
    with pytest.raises(RuntimeError, match=r"check: without a perturbation .* off by up to .*Likely causes: random"):
        Smart(model, SmartConfig(**BALL), 10)(batch_for(model))
    with pytest.raises(RuntimeError, match="with the student's own weights"):
        Smart(model, SmartConfig(lambda_s=0.0), 10)(batch_for(model))
    for quiet in ({"check": False}, {"dropout": "independent"}):
        Smart(model, SmartConfig(**BALL, **quiet), 10)(batch_for(model))


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_logits_without_a_graph_are_refused(adversary: str) -> None:
    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        out = model(**batch)
        return out.loss, out.logits.detach()

    model = Encoder()
    with pytest.raises((RuntimeError, ValueError), match=r"no graph|adversary: got 'task'"):
        Smart(model, SmartConfig(**BALL, adversary=adversary), 10, forward=forward)(batch_for(model))


@pytest.mark.parametrize("adversary", [a for a in ADVERSARIES if a != "task"])
def test_logits_computed_for_a_metric_are_computed_again_with_a_graph(adversary: str) -> None:
    """The gradients are those of a function that gives its logits with a graph."""
    model = Encoder().double()
    twin = copy.deepcopy(model)
    batch = batch_for(model)
    noise = 0.05 * torch.randn(4, 6, WIDTH, dtype=torch.float64)

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        loss = model(**batch).loss
        with torch.no_grad():
            return loss, model(**batch).logits

    grads = []
    for m, options in ((model, {"forward": forward}), (twin, {})):
        smart = Smart(m, SmartConfig(**BALL, adversary=adversary), 10, **options)
        with torch.no_grad():
            m.head.weight.mul_(1.1)
        out = smart(batch, initial_perturbation=noise, generator=torch.Generator().manual_seed(0))
        out.loss.backward()
        grads.append([out.loss, *(p.grad for p in m.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _cached(model: Any, batch: Any) -> Tensor:
    """As losses that keep gradients: the graph is made when the loss goes backward."""
    with torch.no_grad():
        cached = model(**batch).logits
    loss = F.cross_entropy(cached, batch["labels"]).detach().requires_grad_()
    loss.register_hook(lambda _gradient: None)
    return loss


def _halved(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """No call is added, and the logits have no graph."""
    out = model(**batch)
    with torch.no_grad():
        return out.loss, out.logits / 2


def _added(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    loss = model(**batch).loss
    with torch.no_grad():
        return loss, model(**batch).logits


@pytest.mark.parametrize("function", [_cached, _halved, _added])
def test_generators_go_back_for_calls_alone_that_were_added_for_the_logits(function: Any) -> None:
    """They end where the user's program leaves them, which has the loss alone."""
    model = Encoder(dropout=0.3)
    batch = batch_for(model)
    smart = Smart(model, SmartConfig(**BALL), 10, forward=function)
    smart.asks_for_logits(True)
    for _ in range(2):
        before = torch.get_rng_state()
        if function is _added:
            model(**batch)
        else:
            function(model, batch)
        expected = torch.get_rng_state()
        torch.set_rng_state(before)
        smart(batch)
        assert not torch.equal(expected, before)
        assert torch.equal(torch.get_rng_state(), expected)


def test_a_perturbation_that_moves_nothing_is_refused() -> None:
    class Deaf(Encoder):
        def from_embeddings(self, x: Tensor, *args: Any) -> Any:
            return super().from_embeddings(torch.ones_like(x) + 0 * x, *args)

    model = Deaf()
    with pytest.raises(RuntimeError, match="check: R_s is 0 with a perturbation"):
        Smart(model, SmartConfig(**BALL), 10)(batch_for(model))
    head_of_zeros = Encoder()
    nn.init.zeros_(head_of_zeros.head.weight)
    nn.init.zeros_(head_of_zeros.head.bias)
    smart = Smart(head_of_zeros, SmartConfig(**BALL), 10)
    assert smart(batch_for(head_of_zeros)).smoothness == 0


def test_check_measures_and_leaves_no_trace() -> None:
    model = Counting()
    model.dropout.p = 0.5
    batch = batch_for(model)
    kept = copy.deepcopy(batch)
    smart = Smart(model, SmartConfig(**BALL), 10)
    before = copy.deepcopy(model.traces()), torch.get_rng_state(), smart.generator.get_state()
    buffers = [id(b) for b in model.buffers()]
    report = smart.check(batch)
    assert report.pop("smoothness") > 0
    assert report == {"smoothness_without_perturbation": 0.0, "proximal_to_itself": 0.0}
    torch.testing.assert_close(model.traces(), before[0], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(smart.generator.get_state(), before[2])
    assert [id(b) for b in model.buffers()] == buffers
    assert all(torch.equal(batch[k], kept[k]) for k in kept)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"noise_std": 0.0}, "noise_std=0 with adversary='power'"),
        ({"noise_std": 0.0, "adversary": "random"}, "noise_std=0 with adversary='random'"),
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"epsilon": 1e-2, "step_size": 1e-3}, r"step_size=0\.001: .* cannot reach .* epsilon=0\.01"),
    ],
)
def test_settings_without_effect_warn(options: dict[str, Any], match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        SmartConfig(**options)


def test_the_step_follows_the_radius() -> None:
    assert SmartConfig().step_length == pytest.approx(1e-3)
    assert dataclasses.replace(SmartConfig(), epsilon=1e-2).step_length == pytest.approx(1.0)
    model = Encoder()
    out = Smart(model, SmartConfig(epsilon=1e-2, mu=0.0))(batch_for(model))
    assert out.perturbation is not None
    assert out.perturbation.abs().amax((1, 2)).eq(torch.tensor(1e-2)).all()

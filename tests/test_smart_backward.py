"""Smart.backward: plans are sound, gradients are those of a call, graphs are freed, nothing is left half-done."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from smart_models import VOCABULARY, WIDTH, Encoder, Output, batch_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart.plan import GRAPHS, Pass, graphs, make_plan, vanilla_steps

pytestmark = pytest.mark.usefixtures("one_thread")

ADVERSARIES = ("power", "predicted", "fisher", "task", "random")
BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05, "step_size": 0.15, "decay": 0.9, "decay_late": 0.9}
WAYS: dict[str, dict[str, Any]] = {
    "fast": {},
    "lean": {"memory": "lean"},
    "detached": {"detach_clean": True},
}


def flat(model: nn.Module) -> Tensor:
    """All gradients; zeros where a parameter has none."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.to_dense().flatten() for g in grads]).double()


def assert_same_gradients(actual: nn.Module, expected: nn.Module, bar: float) -> None:
    wanted = flat(expected)
    assert wanted.norm() > 0
    assert (flat(actual) - wanted).norm() <= bar * wanted.norm()
    for (name, p), q in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name


def both(
    model: nn.Module, config: SmartConfig, batches: list[Any], scale: float = 1.0, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A model with the gradients of `backward`, and one with those of calls, accumulated; all else is the same."""
    models, ends = [], []
    for how in ("backward", "call"):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        smart = Smart(twin, config, 10, **options)
        if smart.teacher is not None:
            with torch.no_grad():  # away from the teacher
                for p in twin.parameters():
                    p.mul_(1.05)
        outputs = []
        for batch in copy.deepcopy(batches):
            if how == "backward":
                outputs.append(smart.backward(batch, scale))
                assert not outputs[-1].loss.requires_grad
            else:
                outputs.append(smart(batch))
                (outputs[-1].loss * scale).backward()
        models.append(twin)
        ends.append((outputs, torch.get_rng_state(), smart.generator.get_state(), smart.skipped, smart.steps))
    (actual, *others), (expected, *wanted) = ends
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(others, wanted, strict=True))
    for out, other in zip(actual, expected, strict=True):
        for name in ("loss", "task_loss", "smoothness", "proximal", "logits"):
            torch.testing.assert_close(getattr(out, name), getattr(other, name).detach(), rtol=1e-5, atol=1e-9)
    return models[0], models[1]


# ------------------------------------------------------------------------------------------------------------ plans


def every_plan() -> list[tuple[SmartConfig, tuple[Pass, ...]]]:
    plans = []
    for adversary, way, taught, differentiable in itertools.product(ADVERSARIES, WAYS, (0, 1), (0, 1)):
        config = SmartConfig(adversary=adversary, **WAYS[way])
        for ahead, repeatable in ((True, True), (True, False), (False, True)):
            known = {"differentiable": bool(differentiable), "repeatable": repeatable}
            plans.append((config, make_plan(config, smooth=True, taught=bool(taught), ahead=ahead, **known)))
    return plans


def test_each_pass_finds_what_it_needs_and_graphs_are_not_freed_too_early() -> None:
    for config, plan in every_plan():
        there: set[str] = set()
        for each in plan:
            assert set(each.needs) <= there, (config, each)
            there |= set(each.gives)
            assert set(each.frees) <= there, (config, each)
            there -= set(each.frees)
        assert plan[0].name == "clean"
        assert plan[-1].name == "loss"


@pytest.mark.parametrize(
    ("adversary", "way", "steps", "held"),
    [
        ("power", "fast", 8, 2),
        ("predicted", "fast", 7, 2),
        ("random", "fast", 6, 2),
        ("power", "detached", 8, 1),
        ("predicted", "detached", 7, 1),
        ("fisher", "detached", 7, 1),
        ("task", "detached", 6, 1),
        ("random", "detached", 6, 1),
        ("power", "lean", 9, 1),
        ("predicted", "lean", 8, 1),
        ("random", "lean", 7, 1),
    ],
)
def test_what_a_step_costs_by_count(adversary: str, way: str, steps: int, held: int) -> None:
    """In thirds of a vanilla step, and in graphs at a time; the teacher's pass is one third more."""
    config = SmartConfig(adversary=adversary, **WAYS[way])
    plan = make_plan(config, smooth=True, taught=False, ahead=True)
    assert vanilla_steps(plan) == pytest.approx(steps / 3)
    assert graphs(plan) == held
    taught = vanilla_steps(make_plan(config, smooth=True, taught=True, ahead=True))
    # "task" has then a gradient of its own to find, as what flows back is no longer that of the task loss alone
    assert taught == pytest.approx(steps / 3 + (2 / 3 if (adversary, way) == ("task", "detached") else 1 / 3))


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_gradients_are_those_of_a_call(adversary: str, way: str) -> None:
    """Over norms, dropout modes, with and without teacher, in two batches that make one gradient.

    The same sums in another order at the most: rounding of a few operations.
    """
    for norm, dropout, mu, dtype in itertools.product(
        ("linf", "l2"), ("shared", "independent", "off"), (0.0, 2.0), (torch.float64, torch.float32)
    ):
        torch.manual_seed(0)
        model = Encoder(dropout=0.3).to(dtype).train()
        config = SmartConfig(**BALL, **WAYS[way], adversary=adversary, norm=norm, dropout=dropout, mu=mu, lambda_s=3.0)
        batches = [batch_for(model, seed=seed) for seed in range(2)]
        models = both(model, config, batches, scale=0.5)
        assert_same_gradients(*models, bar=1e-12 if dtype == torch.float64 else 1e-5)


class Tied(nn.Module):
    """The word embedding is the head, too; masks are large enough to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(VOCABULARY, 64), nn.Linear(64, 64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(input_ids)
        x = x + F.scaled_dot_product_attention(*[self.mix(x).unsqueeze(1)] * 3, dropout_p=0.2).squeeze(1)
        logits = F.dropout(torch.tanh(x), 0.2) @ self.words.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class TwoHeads(nn.Module):
    """One head has the task loss, the other what is compared; a third is used by neither."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.task, self.compared, self.unused = (nn.Linear(WIDTH, 3) for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Output:
        x = torch.tanh(self.mix(self.words(input_ids))).mean(1)
        return Output(F.cross_entropy(self.task(x), labels), self.compared(x) * 0.5 + 0.1 * self.task(x).detach())


class Towers(nn.Module):
    """Calls the word embedding twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(2 * WIDTH, 3)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        sides = [torch.tanh(self.words(part)).mean(1) for part in input_ids.chunk(2, 1)]
        logits = self.head(torch.cat(sides, 1))
        return F.cross_entropy(logits, labels), logits


class InParts(nn.Module):
    """Its first part gives a tuple, of which both tensors are used, and is no mere look-up."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            x = self.norm(self.words(ids))
            return x, {"twice": 2 * x, "ids": ids}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = InParts.First(), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        x, more = self.first(input_ids)
        logits = self.head(torch.tanh(x * more["twice"]).mean(1))
        return F.cross_entropy(logits, labels), logits


class Checkpointed(Encoder):
    def from_embeddings(self, x: Tensor, *args: Any) -> Output:
        return checkpoint(super().from_embeddings, x, *args, use_reentrant=False)  # type: ignore[no-any-return]


class Captured(Encoder):
    """A hook that was there before ours takes the embeddings, and the loss uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.words.register_forward_hook(lambda module, _, x: setattr(module, "kept", (x,)))

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        out = super().forward(*args, **kwargs)
        out.loss, self.words.kept = out.loss + self.words.kept[0].square().mean(), ()
        return out


def frozen(part: str) -> Encoder:
    model = Encoder(dropout=0.3)
    for p in (model.words if part == "words" else model).parameters():
        p.requires_grad_(False)
    if part == "all but the head":
        model.head.requires_grad_(True)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tied, large masks": (Tied, {}),
    "two heads": (TwoHeads, {}),
    "towers": (Towers, {}),
    "in parts": (InParts, {"embedding": "first"}),
    "checkpointed": (lambda: Checkpointed(dropout=0.3), {}),
    "captured embeddings": (Captured, {}),
    "frozen words": (lambda: frozen("words"), {}),
    "frozen": (lambda: frozen("all but the head"), {}),
    "perturbed behind the embedding": (lambda: Encoder(dropout=0.3), {"embedding": "norm"}),
    "bert": (lambda: transformers.BertForSequenceClassification(TINY), {}),
    "sparse": (lambda: Sparse(), {}),
}
TINY = transformers.BertConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=VOCABULARY
)


class Sparse(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, sparse=True)


@pytest.mark.parametrize("way", ["lean", "detached"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:embedding. the Embedding to perturb is called:UserWarning")
def test_gradients_of_all_kinds_of_models(name: str, way: str) -> None:
    build, options = MODELS[name]
    for adversary, mu in (("power", 1.0), ("predicted", 1.0), ("task", 1.0), ("task", 0.0)):
        torch.manual_seed(0)
        model = build().double().train()
        batch = batch_for(Encoder())
        if name.startswith("tied"):
            batch = {key: torch.randint(0, VOCABULARY, (32, 64)) for key in ("input_ids", "labels")}
        config = SmartConfig(**BALL, **WAYS[way], adversary=adversary, mu=mu)
        assert_same_gradients(*both(model, config, [batch] * 2, **options), bar=1e-12)


def made_of_the_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    logits = 2 * model(batch["input_ids"], batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], label_smoothing=0.1), logits


def loss_alone(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])


def not_followed(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The logits depend on a value that Python has read out, so the function runs for each pass."""
    logits = model(**batch).logits
    logits = logits * (1.0 + 0.1 * float(logits.detach().mean().tanh()))
    return F.cross_entropy(logits, batch["labels"]), logits


def for_a_metric(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The logits come without a graph, and are computed again."""
    with torch.no_grad():
        logits = model(**batch).logits
    return model(**batch).loss, logits


OWN_LOSS = nn.Bilinear(3, 3, 1).double()


def with_a_loss_of_its_own(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Parameters that are not the model's get their gradients, too."""
    logits = model(**batch).logits
    return OWN_LOSS(logits, logits).square().mean(), logits


@pytest.mark.parametrize("way", ["lean", "detached"])
@pytest.mark.parametrize("function", [made_of_the_logits, loss_alone, not_followed, for_a_metric])
def test_gradients_of_all_kinds_of_functions(function: Any, way: str) -> None:
    for adversary in ("power", "predicted"):
        model = Encoder(dropout=0.3).double()
        config = SmartConfig(**BALL, **WAYS[way], adversary=adversary)
        models = both(model, config, [batch_for(model)] * 2, forward=function)
        # in "lean" a function that runs again reads another value: that at the perturbation
        assert_same_gradients(*models, bar=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_of_the_loss(way: str) -> None:
    found = []
    for how in ("backward", "call"):
        torch.manual_seed(0)
        model = Encoder().double()
        smart = Smart(model, SmartConfig(**BALL, **WAYS[way]), 10, forward=with_a_loss_of_its_own)
        OWN_LOSS.zero_grad()
        if how == "backward":
            smart.backward(batch_for(model))
        else:
            smart(batch_for(model)).loss.backward()
        found.append(flat(OWN_LOSS))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    assert found[0].norm() > 0


@pytest.mark.parametrize("way", ["lean", "detached"])
@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_compiled_models(adversary: str, way: str) -> None:
    """With the aot_eager backend; at most twice as many graphs as a plain model, one of them for all perturbations."""
    torch.manual_seed(0)
    model = Encoder()
    batch = batch_for(model)
    config = SmartConfig(**BALL, **WAYS[way], adversary=adversary, check=False)
    expected = copy.deepcopy(model)
    torch.manual_seed(1)
    Smart(expected, config, 10)(batch).loss.backward()
    torch.compiler.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    Smart(model, config, 10).backward(batch)
    assert_same_gradients(model, expected, bar=1e-5)
    torch.compiler.reset()


def test_micro_batches_that_are_counted_together() -> None:
    """The scale is one over their number for what is a mean; `num_items` makes one mean of all."""
    model = Encoder().double()
    twin = copy.deepcopy(model)
    batch = batch_for(model, 8)
    noise = 0.05 * torch.randn(8, 6, WIDTH, dtype=torch.float64)
    config = SmartConfig(**BALL, adversary="predicted", detach_clean=True)
    Smart(model, config, 10)(batch, initial_perturbation=noise).loss.backward()
    parts = Smart(twin, config, 10)
    for i in range(0, 8, 2):
        micro = {key: value[i : i + 2] for key, value in batch.items()}
        out = parts.backward(micro, 0.25, initial_perturbation=noise[i : i + 2], num_items=torch.tensor(2))
        assert out.loss > 0
    assert_same_gradients(twin, model, bar=1e-12)


@pytest.mark.parametrize("scale", [3, 0.5, torch.tensor(4.0)])
@pytest.mark.parametrize("way", WAYS)
def test_scale(way: str, scale: Any) -> None:
    model = Encoder().double()
    config = SmartConfig(**BALL, **WAYS[way], adversary="task", mu=0.0)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    out = Smart(model, config).backward(batch_for(model), scale)
    torch.manual_seed(1)
    expected = Smart(twin, config)(batch_for(model))
    (float(scale) * expected.loss).backward()
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(model, twin, bar=1e-12)


def test_scales_that_are_none_are_errors() -> None:
    smart = Smart(Encoder(), SmartConfig(mu=0.0))
    batch = batch_for(Encoder())
    for wrong in (0.0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale: got"):
            smart.backward(batch, wrong)
    for other in ("1", True, None, torch.ones(2), torch.tensor(1)):
        with pytest.raises(TypeError, match="scale: got"):
            smart.backward(batch, other)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        smart.backward(batch)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_ahead_may_be_scaled_and_added_to_and_is_called_backward_on_once(way: str) -> None:
    models = []
    for ahead in (True, False):
        torch.manual_seed(0)
        model = Encoder().double()
        smart = Smart(model, SmartConfig(**BALL, **WAYS[way], adversary="predicted"), 10)
        out = smart.ahead(batch_for(model), 8.0) if ahead else smart(batch_for(model))
        loss = 3 * out.loss / 7 + model.head.weight.square().sum()
        loss.backward()
        models.append(model)
        if ahead and way != "fast":
            with pytest.raises(RuntimeError, match="backward"):
                out.loss.backward()
    assert_same_gradients(*models, bar=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_in_autocast_are_those_of_a_backward_pass_outside(way: str) -> None:
    """Called within the context, to the bit."""
    models = []
    for how in ("backward", "call"):
        torch.manual_seed(0)
        model = Encoder()
        smart = Smart(model, SmartConfig(**BALL, **WAYS[way], adversary="predicted"), 10)
        with torch.autocast("cpu", torch.bfloat16):
            out = smart.backward(batch_for(model)) if how == "backward" else smart(batch_for(model))
        if how == "call":
            out.loss.backward()
        models.append(model)
    # each gradient is a sum of two that were rounded to 8 bits
    assert_same_gradients(*models, bar=2**-8)


@pytest.mark.parametrize("way", WAYS)
def test_with_a_grad_scaler_and_a_step_that_it_skips(way: str) -> None:
    """The scaler itself begins; its scale as a number does after that."""
    torch.manual_seed(0)
    model = Encoder()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    smarts = [Smart(m, SmartConfig(**BALL, **WAYS[way], adversary="task", mu=0.0)) for m in (model, twin)]
    for scale in (lambda: scaler, scaler.get_scale):
        for smart, how, optimizer in zip(smarts, (scale(), 1.0), optimizers, strict=True):
            torch.manual_seed(1)
            smart.generator.manual_seed(1)
            smart.backward(batch_for(model), how)
            if how == 1.0:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # a power of two cancels, but for what it brings above 0
    before = copy.deepcopy(model.state_dict())
    smarts[0].backward(batch_for(model), scaler)
    model.head.weight.grad[0, 0] = torch.inf
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -------------------------------------------------------------------------------------------------- who listens


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_parameters_see_one_backward_pass_with_the_whole_gradient(way: str) -> None:
    models, seen = [], []
    for how in ("backward", "call"):
        torch.manual_seed(0)
        model = Encoder().double()
        calls: list[Any] = []
        model.head.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(p.grad.clone()))
        smart = Smart(model, SmartConfig(**BALL, **WAYS[way], adversary="predicted", lambda_s=3.0), 10)
        if how == "backward":
            smart.backward(batch_for(model))
        else:
            smart(batch_for(model)).loss.backward()
        models.append(model)
        seen.append(sorted(float(g.norm()) for g in calls))
    assert_same_gradients(*models, bar=1e-12)
    assert seen[0] == pytest.approx(seen[1], rel=1e-12)


# ------------------------------------------------------------------------------------------------------- memory


FORWARD = {"clean", "taught", "probed", "seen", "perturbed", "perturbed_apart", "clean_again"}


MADE: list[Any] = []
"""Weak references to what the passes of a model save for their backward pass."""


class Weighed(Encoder):
    def from_embeddings(self, x: Tensor, *args: Any) -> Output:
        saved = 2 * x
        MADE.append(weakref.ref(saved))
        return super().from_embeddings(saved * saved, *args)


def alive() -> int:
    return sum(x() is not None for x in MADE)


@pytest.mark.parametrize("way", ["lean", "detached"])
@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("divergence", ["auto", lambda p, q, _batch: (p - q).square().mean()], ids=["own", "callable"])
def test_there_is_one_graph_at_a_time(adversary: str, way: str, divergence: Any) -> None:
    model = Weighed(dropout=0.3)
    MADE.clear()
    found: list[int] = []
    model.words.register_forward_pre_hook(lambda *_: found.append(alive()))
    options = {**BALL, **WAYS[way], "divergence": divergence, "check": False}
    smart = Smart(model, SmartConfig(**options, adversary=adversary), 10)
    smart.backward(batch_for(model))
    expected, held = [], 0
    for each in make_plan(smart.config, smooth=True, taught=True, ahead=True):
        if each.name in FORWARD:
            expected.append(held)
        held += sum(name in GRAPHS for name in each.gives) - sum(name in GRAPHS for name in each.frees)
    assert found == expected  # as each pass begins
    assert max(expected) == 1  # where the teacher's pass begins, and the one that only looks
    assert alive() == 0


def test_a_graph_that_is_left_is_freed_with_its_masks() -> None:
    """A node that held its own output by a hook would keep itself."""
    model = Tied()
    made: list[Any] = []
    model.mix.register_forward_hook(lambda _m, _a, x: made.append(weakref.ref(x)))
    batch = {key: torch.randint(0, VOCABULARY, (32, 64)) for key in ("input_ids", "labels")}
    smart = Smart(model, SmartConfig(memory="lean", mu=0.0), 10)
    smart.ahead(batch)
    assert [x() is None for x in made] == [True] * len(made)


# --------------------------------------------------------------------------------------------- what fails half-way


COUNTDOWN = iter(range(0))
"""Of passes until one fails; outside of all that a step puts back."""


class StoppedError(Exception):
    pass


class Failing(Encoder):
    """Fails in the pass of a number."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.register_buffer("seen", torch.zeros(()))

    def from_embeddings(self, x: Tensor, *args: Any) -> Output:
        self.seen += 1
        out = super().from_embeddings(x, *args)
        if next(COUNTDOWN, None) == 1:
            raise StoppedError
        return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adversary", ["power", "predicted", "task"])
def test_what_fails_half_way_changes_nothing(adversary: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever pass it is: gradients of batches before stay, and the next step is as if nothing had been."""
    for dropout in ("shared", "off"):
        torch.manual_seed(0)
        model = Failing().double()
        batch = batch_for(model)
        config = SmartConfig(**BALL, **WAYS[way], adversary=adversary, dropout=dropout, check=False)
        smart = Smart(model, config, 10)
        noise = 0.05 * torch.randn(4, 6, WIDTH, dtype=torch.float64)
        smart.backward(batch, initial_perturbation=noise)
        before = [p.grad.clone() for p in model.parameters()]
        state = copy.deepcopy(model.state_dict())
        passes = int(model.seen)
        for number in itertools.count(1):
            monkeypatch.setitem(globals(), "COUNTDOWN", iter(range(number, 0, -1)))
            torch.manual_seed(3)
            try:
                smart.backward(batch, initial_perturbation=noise)
            except StoppedError:
                pass
            else:
                break
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
            assert all(m.training for m in model.modules())
            assert not any(m._forward_hooks for m in model.modules())
            assert all(p.requires_grad for p in model.parameters())
            for key, value in model.state_dict().items():
                assert key == "seen" or torch.equal(value, state[key])
        monkeypatch.setitem(globals(), "COUNTDOWN", iter(range(0)))
        assert number >= 3
        assert passes == 1
        twin = copy.deepcopy(model)
        for m in (model, twin):
            m.zero_grad()
        for s, m in ((smart, model), (Smart(twin, config, 10), twin)):
            torch.manual_seed(4)
            if m is twin and s.teacher is not None:
                s.teacher.load_state_dict(smart.teacher.state_dict())
            s.backward(batch, initial_perturbation=noise)
        assert torch.equal(flat(model), flat(twin))


# ------------------------------------------------------------------------------------------- what a call promises


@pytest.mark.parametrize("options", [{"lambda_s": 0.0, "mu": 0.0}, {"lambda_s": 0.0, "proximal": "none"}])
@pytest.mark.parametrize("way", WAYS)
def test_without_terms_a_step_is_an_ordinary_one_to_the_bit(options: dict[str, Any], way: str) -> None:
    torch.manual_seed(0)
    models = [transformers.BertForSequenceClassification(TINY).train()]
    models.append(copy.deepcopy(models[0]))
    batch = batch_for(Encoder(2))
    smart = Smart(models[0], SmartConfig(**options, **WAYS[way]))
    torch.manual_seed(1)
    out = smart.backward(batch)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    ordinary = models[1](**batch).loss
    ordinary.backward()
    assert torch.equal(out.loss, ordinary.detach())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("way", ["lean", "detached"])
def test_resumed_training_goes_on_to_the_bit(way: str) -> None:
    config = SmartConfig(**BALL, **WAYS[way], adversary="predicted")

    def train(model: nn.Module, smart: Smart, steps: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            smart.backward(batch_for(model))  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
            smart.update()

    model = Encoder(dropout=0.3).train()
    smart = Smart(model, config, 10)
    train(model, smart, 2)
    other, state, generator = copy.deepcopy(model), copy.deepcopy(smart.state_dict()), torch.get_rng_state()
    train(model, smart, 3)
    resumed = Smart(other, config, 10)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    train(other, resumed, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_region_that_is_checkpointed_by_reentering_is_an_error_that_changes_nothing() -> None:
    class Reentrant(Encoder):
        def from_embeddings(self, x: Tensor, *args: Any) -> Any:
            inner = super().from_embeddings
            logits = checkpoint(lambda x: inner(x, args[0]).logits, x, use_reentrant=True)
            return Output(F.cross_entropy(logits, args[1]), logits)

    model = Reentrant()
    smart = Smart(model, SmartConfig(adversary="random", detach_clean=True), 10)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        smart.backward(batch_for(model))
    assert all(p.grad is None for p in model.parameters())
    smart(batch_for(model)).loss.backward()

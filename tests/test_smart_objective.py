"""Smart in a training loop: dropout and generators, accumulation, checkpointing, compilation, resuming."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from smart_models import WIDTH, Encoder, batch_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart.objective import SmartOutput

pytestmark = pytest.mark.usefixtures("one_thread")

ADVERSARIES = ("power", "predicted", "fisher", "task", "random")
BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05, "step_size": 0.15}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
BATCH = {
    "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "labels": torch.tensor([0, 1]),
}
SPAN = {key: BATCH[key] for key in ("input_ids", "attention_mask")} | {
    "start_positions": torch.tensor([0, 1]),
    "end_positions": torch.tensor([2, 1]),
}


def train(
    model: nn.Module, config: SmartConfig, batches: list[dict[str, Tensor]], smart: Smart | None = None
) -> tuple[Smart, list[SmartOutput]]:
    """Steps of SGD with SMART, each on a batch."""
    smart = smart or Smart(model, config, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for batch in batches:
        outputs.append(smart(batch))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        smart.update()
    return smart, outputs


def bert(name: str = "BertForSequenceClassification", **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BertConfig(**BERT, **options)).train()


def assert_same_training(outputs: list[SmartOutput], expected: list[SmartOutput], rtol: float) -> None:
    for actual, other in zip(outputs, expected, strict=True):
        for name in ("loss", "task_loss", "smoothness", "proximal", "perturbation"):
            torch.testing.assert_close(getattr(actual, name), getattr(other, name), rtol=rtol, atol=rtol * 1e-2)


# ------------------------------------------------------------------------------------------ what a step gives


def test_the_terms_make_the_loss() -> None:
    model = Encoder().double()
    smart, outputs = train(
        model, SmartConfig(**BALL, lambda_s=3.0, mu=2.0), [batch_for(model, seed=s) for s in range(3)]
    )
    for out in outputs:
        torch.testing.assert_close(out.loss.detach(), out.task_loss + 3 * out.smoothness + 2 * out.proximal)
        assert out.smoothness > 0
        for name in ("task_loss", "smoothness", "proximal", "logits", "perturbation"):
            assert not getattr(out, name).requires_grad
    assert outputs[-1].proximal > 0
    assert smart.skipped == 0


@pytest.mark.parametrize("options", [{"lambda_s": 0, "mu": 0}, {"lambda_s": 0, "proximal": "none"}])
def test_without_terms_a_step_is_an_ordinary_one_to_the_bit(options: dict[str, Any]) -> None:
    models = [bert(), bert()]
    smart = Smart(models[0], SmartConfig(**options))
    assert smart.teacher is None
    torch.manual_seed(1)
    out = smart(BATCH)
    out.loss.backward()
    state = torch.get_rng_state()
    torch.manual_seed(1)
    ordinary = models[1](**BATCH)
    ordinary.loss.backward()
    assert torch.equal(out.loss, ordinary.loss)
    assert torch.equal(out.logits, ordinary.logits)
    assert torch.equal(state, torch.get_rng_state())
    assert out.smoothness == 0
    assert out.proximal == 0
    assert out.perturbation is None
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_detach_clean_takes_the_clean_pass_as_constant() -> None:
    """The gradient of R_s then comes from the perturbed pass alone."""
    model = Encoder().double()
    batch = batch_for(model)
    noise = 0.05 * torch.randn(*batch["input_ids"].shape, WIDTH, dtype=torch.float64)
    config = SmartConfig(**BALL, mu=0, detach_clean=True)
    out = Smart(model, config)(batch, initial_perturbation=noise)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    q = model(**batch).logits.detach()
    x = model.words(batch["input_ids"]) + out.perturbation
    p = model.from_embeddings(x, batch["attention_mask"]).logits
    rows = ((p.softmax(-1) - q.softmax(-1)) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    (model(**batch).loss + rows.mean()).backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForQuestionAnswering"])
def test_models_that_return_tuples(name: str) -> None:
    batch = SPAN if "Question" in name else BATCH
    outputs = []
    for extra in ({}, {"return_dict": False}):
        model = bert(name)
        outputs.append(train(model, SmartConfig(**BALL), [{**batch, **extra}] * 2)[1])
    assert_same_training(*outputs, rtol=1e-7)
    assert isinstance(outputs[0][0].logits, tuple) == ("Question" in name)


def test_outputs_that_lack_something_are_errors() -> None:
    unlabelled = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    for extra in ({}, {"return_dict": False}):
        with pytest.raises(ValueError, match="model: its output"):
            Smart(bert(), SmartConfig(mu=0))({**unlabelled, **extra})


# --------------------------------------------------------------------------------------- noise and generators


def test_noise_of_the_callers() -> None:
    model = bert()
    noise = 1e-2 * torch.randn(2, 4, 16)
    kept = noise.clone()

    def losses(**options: Any) -> Tensor:
        torch.manual_seed(0)
        return Smart(model, SmartConfig(**BALL, mu=0))(BATCH, **options).loss

    assert torch.equal(losses(initial_perturbation=noise), losses(initial_perturbation=noise))
    assert torch.equal(noise, kept)
    assert not noise.requires_grad
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, second, third = (losses(generator=generator) for generator in generators)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    smart = Smart(model, SmartConfig(mu=0))
    with pytest.raises(ValueError, match=r"initial_perturbation: got shape \(2, 4, 15\).*\(2, 4, 16\)"):
        smart(BATCH, initial_perturbation=noise[..., 1:])
    with pytest.raises(TypeError, match="initial_perturbation: got list"):
        smart(BATCH, initial_perturbation=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"initial_perturbation: got torch\.int64"):
        smart(BATCH, initial_perturbation=noise.long())


def test_each_step_draws_other_noise_and_a_seed_repeats_it() -> None:
    def deltas(seed: int) -> list[Tensor]:
        model = Encoder()
        torch.manual_seed(seed)
        return [out.perturbation for out in train(model, SmartConfig(adversary="random"), [batch_for(model)] * 2)[1]]

    (a, b), (c, _), (d, _) = deltas(0), deltas(0), deltas(1)
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    assert not torch.equal(a, d)


@pytest.mark.parametrize("dropout", ["shared", "independent", "off"])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_the_default_generator_ends_where_an_ordinary_step_leaves_it(adversary: str, dropout: str) -> None:
    model = bert()
    smart = Smart(model, SmartConfig(adversary=adversary, dropout=dropout), 10)
    torch.manual_seed(1)
    ordinary = model(**BATCH).loss
    state = torch.get_rng_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    out = smart(BATCH)
    assert torch.equal(torch.get_rng_state(), before if dropout == "off" else state)
    assert torch.equal(out.task_loss, ordinary) == (dropout != "off")


def test_dropout_off_is_evaluation_mode_but_for_batch_norm() -> None:
    model = Encoder(dropout=0.5).train()
    model.batch_norm = nn.BatchNorm1d(1)
    batch = batch_for(model)
    modes: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(lambda m, _: modes.append((m.training, m.batch_norm.training)))
    out = Smart(model, SmartConfig(**BALL, dropout="off", check=False), 10)(batch)
    assert modes == [(False, True)] * 4
    assert all(m.training for m in model.modules())
    torch.testing.assert_close(out.task_loss, model.eval()(**batch).loss.detach())


# -------------------------------------------------------------------------------------------- kinds of training


@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_four_micro_batches_equal_a_large_one(adversary: str) -> None:
    model = Encoder().double()
    twin = copy.deepcopy(model)
    batch = batch_for(model, 8)
    noise = 0.05 * torch.randn(8, 6, WIDTH, dtype=torch.float64)
    config = SmartConfig(**BALL, adversary=adversary)
    whole, parts = Smart(model, config, 10), Smart(twin, config, 10)
    for m in (model, twin):
        with torch.no_grad():
            m.head.weight.mul_(1.1)  # away from the teacher
    whole(batch, initial_perturbation=noise).loss.backward()
    for i in range(0, 8, 2):
        micro = {key: value[i : i + 2] for key, value in batch.items()}
        (parts(micro, initial_perturbation=noise[i : i + 2]).loss / 4).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_uneven_micro_batches_equal_a_large_one_by_their_count(adversary: str) -> None:
    """Tokens of one, two and no label a sample; the model's own loss is told their number in the batch."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    model = model.double().eval()
    twin = copy.deepcopy(model)
    labels = torch.tensor([[-100, 4, -100, -100], [-100, 8, 2, -100], [-100] * 4, [3, -100, 1, 7]])
    batch = {"input_ids": torch.randint(0, 20, (4, 4)), "labels": labels}
    counted = int((labels[:, 1:] != -100).sum())
    noise = 0.05 * torch.randn(4, 4, 16, dtype=torch.float64)
    whole, parts = (Smart(m, SmartConfig(**BALL, adversary=adversary), 10) for m in (model, twin))
    for m in (model, twin):
        with torch.no_grad():
            m.transformer.wte.weight.mul_(1.1)  # away from the teacher
    expected = whole(batch, initial_perturbation=noise)
    expected.loss.backward()
    proximal = torch.zeros((), dtype=torch.float64)
    for i, num_items in enumerate([counted, torch.tensor(counted), torch.tensor(float(counted)), counted]):
        micro = {key: value[i : i + 1] for key, value in batch.items()} | {"num_items_in_batch": counted}
        out = parts(micro, initial_perturbation=noise[i : i + 1], num_items=num_items)
        out.loss.backward()
        proximal += out.proximal
    torch.testing.assert_close(proximal, expected.proximal, rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)


def test_a_count_that_is_none_is_an_error() -> None:
    smart = Smart(bert(), SmartConfig(mu=0))
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="num_items: got"):
            smart(BATCH, num_items=wrong)
    for wrong in ("4", True, torch.tensor([4]), torch.tensor(True)):
        with pytest.raises(TypeError, match="num_items: got"):
            smart(BATCH, num_items=wrong)  # type: ignore[arg-type]
    assert smart(BATCH, num_items=torch.tensor(2.0, dtype=torch.float64)).loss.dtype == torch.float32


class CheckpointedEncoder(Encoder):
    """Runs everything behind the words again in the backward pass."""

    def from_embeddings(self, *args: Any) -> Any:
        return checkpoint(super().from_embeddings, *args, use_reentrant=False)


class CheckpointedNet(nn.Module):
    """Behind the words something random in training mode and a normaliser, run again in the backward pass."""

    def __init__(self, checkpointed: bool, norm: nn.Module) -> None:
        super().__init__()
        self.words, self.head, self.norm = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 3), norm
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.3, self.training)
        return torch.tanh(self.norm(x.transpose(1, 2))).mean(2)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(input_ids)
        logits = self.head(checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))
        return nn.functional.cross_entropy(logits, labels), logits


@pytest.mark.parametrize("dropout", ["shared", "independent", "off"])
@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_a_checkpointed_region_that_depends_on_the_mode(adversary: str, dropout: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = CheckpointedNet(checkpointed, nn.BatchNorm1d(WIDTH)).train()
        config = SmartConfig(**BALL, adversary=adversary, dropout=dropout)
        smart = Smart(model, config, 10)
        for _ in range(2):
            smart(BATCH).loss.backward()
        assert all(m.training for m in model.modules())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_a_backward_pass_that_fails_leaves_the_next_step_whole() -> None:
    model = CheckpointedNet(True, nn.Identity()).train()
    smart = Smart(model, SmartConfig(**BALL, dropout="off"), 10)
    out = smart(BATCH)
    model.norm.forward = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        out.loss.backward()
    del model.norm.forward
    smart(BATCH)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(WIDTH), nn.InstanceNorm1d(WIDTH, track_running_stats=True)], ids=["batch", "instance"]
)
def test_extra_passes_leave_no_trace_in_buffers(norm: nn.Module) -> None:
    """They are, after a step, what the clean pass alone leaves."""
    once, all_passes = (CheckpointedNet(False, copy.deepcopy(norm)) for _ in range(2))
    all_passes.load_state_dict(once.state_dict())
    generator = torch.get_rng_state()
    once(**BATCH)
    torch.set_rng_state(generator)
    Smart(all_passes, SmartConfig(**BALL), 10)(BATCH).loss.backward()
    for (name, a), b in zip(once.named_buffers(), all_passes.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("adversary", [a for a in ADVERSARIES if a != "random"])
def test_logits_that_the_words_do_not_reach(adversary: str) -> None:
    """As where a layer is dropped: no gradient, no step, the noise brought into the ball."""

    class Deaf(Encoder):
        def from_embeddings(self, x: Tensor, *args: Any) -> Any:
            return super().from_embeddings(0 * x.detach(), *args)

    noise = torch.randn(*BATCH["input_ids"].shape, WIDTH)
    config = SmartConfig(**BALL | {"epsilon": 1.0, "step_size": 1.0}, adversary=adversary, check=False)
    out = Smart(Deaf(), config, 10)(BATCH, initial_perturbation=noise)
    out.loss.backward()
    assert out.smoothness == 0
    assert torch.equal(out.perturbation, noise.clamp(-1, 1) * BATCH["attention_mask"][..., None])


def test_a_decay_that_is_none_leaves_the_count_alone() -> None:
    smart = Smart(Encoder(), SmartConfig(), 10)
    with pytest.raises(ValueError, match=r"decay: got 2\.0"):
        smart.update(2.0)
    assert smart.state_dict()["updates"] == 0


@pytest.mark.parametrize("num_items", [None, torch.tensor(0), 3])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_batch_in_which_nothing_counts(adversary: str, num_items: Any) -> None:
    """Its terms are 0 and so are their gradients; the task's are 0 over 0 in the value alone."""
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **tiny))
    ids = torch.randint(3, 20, (4, 6))
    out = Smart(model, SmartConfig(**BALL, adversary=adversary), 10)(
        {"input_ids": ids, "labels": torch.full_like(ids, -100)}, num_items=num_items
    )
    out.loss.backward()
    assert out.smoothness == out.proximal == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("of", ["transformers", "torch"])
def test_gradient_checkpointing_changes_nothing(adversary: str, of: str) -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        if of == "torch":
            model = (CheckpointedEncoder if checkpointed else Encoder)(dropout=0.1).train()
        else:
            model = bert()
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        _, outputs = train(model, SmartConfig(**BALL, adversary=adversary), [BATCH] * 3)
        results.append((outputs, list(model.parameters())))
    (expected, parameters), (actual, others) = results
    assert_same_training(actual, expected, rtol=1e-6)
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("adversary", "how"), [*[(a, "wrapped") for a in ADVERSARIES], ("predicted", "in place")])
def test_compiled_models(adversary: str, how: str) -> None:
    """With the aot_eager backend: the graphs of dynamo and of autograd, without minutes of C++ compilation."""
    config = SmartConfig(**BALL, adversary=adversary)
    model = Encoder()
    batch = batch_for(model)
    twin = copy.deepcopy(model)
    _, expected = train(twin, config, [batch] * 3)
    torch.compiler.reset()
    if how == "wrapped":
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
    smart, outputs = train(model, config, [batch] * 3)
    assert_same_training(outputs, expected, rtol=1e-4)
    assert smart.teacher is not None
    assert smart.teacher.shadows.keys() == dict(twin.named_parameters()).keys()


class HalfCompiled(Encoder):
    """Words and what follows lie in a function that is compiled: an attribute, or one that nobody can find."""

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        function = torch.compile(self.start, backend="aot_eager")
        self.compiled = function if attribute else {"start": function}

    def start(self, input_ids: Tensor) -> Tensor:
        return torch.tanh(self.words(input_ids))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        function = self.compiled["start"] if isinstance(self.compiled, dict) else self.compiled
        return self.from_embeddings(function(input_ids), attention_mask, labels)


@pytest.mark.parametrize("adversary", ["predicted", "task"])
@pytest.mark.parametrize("how", ["forward", "method", "attribute", "the user's function"])
def test_compiled_functions(how: str, adversary: str) -> None:
    """A graph that holds the embeddings and what follows gives no gradient to what is read out of its middle."""

    def function(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        output = model(**batch)
        return output.loss, output.logits

    def step(model: nn.Module, **options: Any) -> SmartOutput:
        return Smart(model, SmartConfig(**BALL, adversary=adversary), 10, **options)(batch_for(model))

    class ByDecorator(Encoder):
        forward = torch.compile(Encoder.forward, backend="aot_eager")

    torch.compiler.reset()
    torch.manual_seed(0)
    model = {"method": ByDecorator, "attribute": lambda: HalfCompiled(attribute=True)}.get(how, Encoder)()
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager")
    compiled = torch.compile(function, backend="aot_eager") if how == "the user's function" else function
    torch.manual_seed(1)
    found = step(model, forward=compiled)
    torch.compiler.reset()
    torch.manual_seed(1)
    with torch.compiler.set_stance("force_eager"):
        expected = step(model, forward=function)
    assert expected.smoothness > 1e-6
    assert_same_training([found], [expected], rtol=1e-4)


def test_what_a_module_keeps_is_not_asked() -> None:
    """Some objects answer any question with yes, others raise at every one."""

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    config = SmartConfig(**BALL, adversary="predicted")
    torch.manual_seed(0)
    model = Encoder()
    batch = batch_for(model)
    torch.manual_seed(1)
    expected = Smart(copy.deepcopy(model), config, 10)(batch)
    model.kept, model.mock = Refusing(), MagicMock()
    torch.manual_seed(1)
    smart = Smart(model, config, 10)
    assert torch.equal(smart(batch).smoothness, expected.smoothness)
    assert not smart._passes._compiled


def test_a_compiled_function_that_hides_the_gradient_is_an_error() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = HalfCompiled(attribute=False)
    config = SmartConfig(**BALL, adversary="predicted", mu=0)
    for run in (Smart(model, config), Smart(model, config).check, Smart(model, config).backward):
        with pytest.raises(RuntimeError, match=r"no gradient comes .* torch.compile"):
            run(batch_for(model))


def test_a_compiled_model_that_cannot_see_the_hook_is_an_error() -> None:
    torch.compiler.reset()
    model = torch.compile(Encoder(), backend="eager")
    batch = batch_for(model._orig_mod)
    model(**batch)
    with pytest.raises(RuntimeError, match=r"not called .*torch.compiler.reset\(\)"):
        Smart(model, SmartConfig(mu=0))(batch)
    torch.compiler.reset()
    assert Smart(model, SmartConfig(**BALL, mu=0))(batch).smoothness > 0


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_frozen_layers(adversary: str) -> None:
    """As in a model of which the embeddings and the first layer are frozen."""
    model = bert()
    for part in (model.bert.embeddings, model.bert.encoder.layer[0]):
        part.requires_grad_(False)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    smart, outputs = train(model, SmartConfig(**BALL, adversary=adversary), [BATCH] * 2)
    assert all(out.smoothness > 0 for out in outputs)
    assert smart.teacher is not None
    assert not smart.teacher.shadows.keys() & frozen.keys()
    parameters = dict(model.named_parameters())
    assert all(
        torch.equal(parameters[name], value) and not parameters[name].requires_grad for name, value in frozen.items()
    )


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_embedding_tied_to_the_output(adversary: str) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    batch = {**BATCH, "labels": BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)}
    _, outputs = train(model, SmartConfig(**BALL, adversary=adversary), [batch] * 10)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert outputs[-1].task_loss < outputs[0].task_loss
    assert outputs[-1].proximal > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Embeddings and perturbation stay in fp32, the terms too."""
    model = bert()
    smart = Smart(model, SmartConfig(**BALL, adversary="predicted"), 10)
    with torch.autocast("cpu", dtype):
        out = smart(BATCH)
    out.loss.backward()
    assert out.perturbation.dtype == out.smoothness.dtype == torch.float32
    assert out.smoothness > 0
    assert smart.skipped == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


# -------------------------------------------------------------------------------------------------- resuming


def test_resumed_training_goes_on_to_the_bit() -> None:
    model = bert()
    smart, _ = train(model, config := SmartConfig(**BALL, decay_switch=0.3), [BATCH] * 2)
    state, generator = copy.deepcopy(smart.state_dict()), torch.get_rng_state()
    other = bert()
    other.load_state_dict(model.state_dict())
    torch.set_rng_state(generator)
    _, expected = train(model, config, [BATCH] * 3, smart)

    resumed = Smart(other, config, 10)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    _, actual = train(other, config, [BATCH] * 3, resumed)
    assert_same_training(actual, expected, rtol=0)
    assert smart.teacher is not None
    assert resumed.teacher is not None
    assert all(torch.equal(resumed.teacher.shadows[name], s) for name, s in smart.teacher.shadows.items())
    with pytest.raises(ValueError, match="state: has no generator, updates"):
        resumed.load_state_dict({"teacher": {}, "skipped": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": "x"}, "updates: got 'x', expected an int >= 0"),
        ({"updates": True}, "updates: got True"),
        ({"updates": -1}, "updates: got -1"),
        ({"skipped": torch.zeros(2).long()}, r"skipped: got torch\.int64 of shape \(2,\), expected .* of shape \(\)"),
        ({"skipped": 3}, "skipped: got int"),
        ({"skipped": torch.tensor(-4)}, "skipped: got -4, expected >= 0"),
        ({"generator": None}, "generator: got NoneType"),
        ({"teacher": None}, "teacher: got NoneType, expected a mapping"),
        ({"teacher": {"head.bias": 1}}, "head.bias: got dtype None"),
        ({"more": 1}, "state: has more, expected generator, skipped, teacher, updates alone"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(changes: dict[str, Any], message: str) -> None:
    def flat(smart: Smart) -> dict[str, Tensor]:
        state = copy.deepcopy(smart.state_dict())
        return {**state.pop("teacher"), **{name: torch.as_tensor(value) for name, value in state.items()}}

    torch.manual_seed(1)
    other = Smart(Encoder(), SmartConfig(), 10)
    other.update()
    other.skipped += 1
    torch.manual_seed(2)
    smart = Smart(Encoder(), SmartConfig(), 10)
    before = flat(smart)
    with pytest.raises(ValueError, match=message):
        smart.load_state_dict(other.state_dict() | changes)
    after = flat(smart)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("model",), TypeError, "model: got str"),
        ((Encoder(), {"mu": 1}), TypeError, "config: got dict"),
        ((Encoder(), SmartConfig(), 1.5), ValueError, "num_training_steps: got 1.5"),
        ((Encoder(), SmartConfig(), True), ValueError, "num_training_steps: got True"),
        ((Encoder(), SmartConfig(), 10, {"forward": 3}), TypeError, "forward: got int"),
        ((Encoder(), SmartConfig(), 10, {"mask": 3}), TypeError, "mask: got int"),
    ],
)
def test_refuses(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    *positional, options = arguments if len(arguments) == 4 else (*arguments, {})
    with pytest.raises(error, match=match):
        Smart(*positional, **options)


def test_a_mask_that_does_not_fit_is_an_error_and_another_can_be_given() -> None:
    model = Encoder()
    batch = batch_for(model)
    with pytest.raises(ValueError, match="mask: got shape"):
        Smart(model, SmartConfig(mu=0), mask=lambda batch: batch["attention_mask"][:, 1:])(batch)
    with pytest.raises(TypeError, match="mask: got list"):
        Smart(model, SmartConfig(mu=0), mask=lambda batch: [1])(batch, initial_perturbation=torch.zeros(4, 6, WIDTH))

    def without_the_first(batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"] * (torch.arange(6) > 0)

    chosen: Callable[[Any], Tensor] = without_the_first
    delta = Smart(model, SmartConfig(mu=0), mask=chosen)(batch).perturbation
    assert (delta[:, 0] == 0).all()
    assert (delta[0, 1:] != 0).any(-1).all()
    everywhere = Smart(model, SmartConfig(mu=0, adversary="random"), mask=lambda batch: None)(batch).perturbation
    assert (everywhere != 0).any(-1).all()


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Encoder()
    with pytest.raises(ValueError, match="model: positions is on the meta device"):
        Smart(model, SmartConfig(), 10)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_it_is_not_copied(way: Any) -> None:
    with pytest.raises(TypeError, match="save_smart"):
        way(Smart(Encoder(), SmartConfig(), 10))

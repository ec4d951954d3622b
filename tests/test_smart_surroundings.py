"""What a call of the model depends on besides its arguments, and what a pass changes besides its output."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smart_kernels import Smart, SmartConfig

BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.1}
WORDS, WIDTH, CLASSES = 20, 8, 3


@pytest.fixture(autouse=True)
def _in_float64(one_thread: None) -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(seed: int, task: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (6, 5), generator=generator)
    return {"ids": ids, "y": torch.randint(0, CLASSES, (6,), generator=generator), "task": task}


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    return ((a.softmax(-1) - b.softmax(-1)) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()


class Body(nn.Module):
    """Words to one vector for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.emb(ids))).mean(1)


class Tasks(nn.Module):
    """A head for each task; which one, is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(2))
        self.task, self.options = 0, {"task": 0}

    def forward(self, ids: Tensor) -> Tensor:
        task = max(self.task, self.options["task"], getattr(self, "chosen", 0))
        return self.heads[task](self.body(ids))


Function = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def loss_of(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, batch["y"]), logits


def by_attribute(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    model.task = batch["task"]
    return loss_of(model(batch["ids"]), batch)


def by_dictionary(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    model.options["task"] = batch["task"]
    return loss_of(model(batch["ids"]), batch)


def around_the_call(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    before, model.task = model.task, batch["task"]
    logits = model(batch["ids"])
    model.task = before
    return loss_of(logits, batch)


def for_a_while(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """An attribute that is there during the call alone."""
    model.chosen = batch["task"]
    logits = model(batch["ids"])
    del model.chosen
    return loss_of(logits, batch)


def in_pieces(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    hidden = model.body(batch["ids"])
    model.heads[batch["task"]].weight.requires_grad_(False)
    logits = model.heads[batch["task"]](hidden)
    model.heads[batch["task"]].weight.requires_grad_(True)
    return loss_of(logits, batch)


def other_weights(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    weights = {name: (0.5 + batch["task"]) * p for name, p in model.named_parameters()}
    return loss_of(torch.func.functional_call(model, weights, (batch["ids"],)), batch)


FUNCTIONS = [by_attribute, by_dictionary, around_the_call, for_a_while, in_pieces, other_weights]


@pytest.mark.parametrize("adversary", ["power", "predicted"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_set_around_a_call_holds_in_every_pass(function: Function, adversary: str) -> None:
    """Tasks take turns, so that what a pass would find without it is the other's. By hand on a copy of the model."""
    torch.manual_seed(0)
    model = Tasks()
    smart = Smart(model, SmartConfig(adversary=adversary, decay=0.5, decay_late=0.5, **BALL), 9, forward=function)
    assert smart.teacher is not None
    for step in range(4):
        batch, before = batch_of(step, step % 2), copy.deepcopy(model)
        model.zero_grad()
        out = smart(batch)
        out.loss.backward()

        plain, taught = copy.deepcopy(before), copy.deepcopy(before)
        taught.load_state_dict(smart.teacher.shadows)
        loss, clean = function(plain, batch)
        moved = plain.body.emb.register_forward_hook(lambda _m, _a, x, d=out.perturbation: x + d)
        _, perturbed = function(plain, batch)
        moved.remove()
        smoothness = symmetric_kl(perturbed, clean)
        proximal = symmetric_kl(clean, function(taught, batch)[1].detach())
        (loss + smoothness + proximal).backward()
        assert out.smoothness.item() == pytest.approx(smoothness.item(), rel=1e-9)
        assert out.proximal.item() == pytest.approx(proximal.item(), rel=1e-9, abs=1e-15)
        for name, p in plain.named_parameters():
            own = model.get_parameter(name).grad
            assert (own is None) == (p.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(own, p.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert (model.task, model.options) == (plain.task, plain.options)
        assert not hasattr(model, "chosen")
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.0 if p.grad is None else 0.5 * p.grad
        smart.update()


def test_attributes_alone_do_not_make_the_function_run_again() -> None:
    runs = itertools.count()  # which nobody puts back

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        next(runs)
        return around_the_call(model, batch)

    smart = Smart(Tasks(), SmartConfig(**BALL), 9, forward=function)
    for step in range(3):
        smart(batch_of(step, step % 2))
    assert next(runs) == 3


class Recurrent(nn.Module):
    """Goes on from where it ended, unless it is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.state = nn.Embedding(WORDS, WIDTH), None
        self.cell, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        out, self.state = self.cell(self.emb(ids), self.state)
        return self.head(out.mean(1))


def test_a_state_that_is_reset_before_the_call() -> None:
    """It keeps its graph, through which plain PyTorch never goes twice."""
    torch.manual_seed(0)
    model = Recurrent()

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        model.state = None
        return loss_of(model(batch["ids"]), batch)

    smart = Smart(model, SmartConfig(mu=0.0, **BALL), 9, forward=function)
    for step in range(3):
        batch = batch_of(step)
        out = smart(batch)
        out.loss.backward()
        _, clean = function(model, batch)
        with torch.no_grad():
            moved = model.emb.register_forward_hook(lambda _m, _a, x, d=out.perturbation: x + d)
            _, perturbed = function(model, batch)
            moved.remove()
        assert out.smoothness.item() == pytest.approx(symmetric_kl(perturbed, clean).item(), rel=1e-9)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_hooks_on_hidden_states_are_part_of_every_pass(memory: str) -> None:
    """A tenth of the gradient reaches the body: of the task loss, whichever pass it is taken from."""
    torch.manual_seed(0)
    model = Tasks()

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        hidden = model.body(batch["ids"])
        hidden.register_hook(lambda gradient: 0.1 * gradient)
        return loss_of(model.heads[0](hidden), batch)

    plain = copy.deepcopy(model)
    function(plain, batch_of(0))[0].backward()
    smart = Smart(model, SmartConfig(lambda_s=1e-20, mu=1e-20, memory=memory, **BALL), 9, forward=function)
    smart.backward(batch_of(0))
    torch.testing.assert_close(model.body.layer.weight.grad, plain.body.layer.weight.grad, rtol=1e-9, atol=0)


def test_hooks_on_what_an_extra_pass_does_not_follow() -> None:
    """The adversary's pass has no graph for the weights, so none for hidden states of another body."""
    torch.manual_seed(0)
    model = Tasks()
    model.add_module("other", Body())

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        hidden, other = model.body(batch["ids"]), model.other(batch["ids"])
        other.register_hook(lambda gradient: 0.1 * gradient)
        return loss_of(model.heads[0](hidden + other), batch)

    smart = Smart(model, SmartConfig(adversary="power", **BALL), 9, forward=function, embedding=model.body.emb)
    assert smart(batch_of(0)).smoothness > 0


def test_batch_norm_in_a_part_that_is_called_first_in_a_later_step() -> None:
    torch.manual_seed(0)
    model = Tasks()
    model.heads = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)) for _ in range(2))

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return loss_of(model.heads[batch["task"]](model.body(batch["ids"])), batch)

    smart = Smart(model, SmartConfig(**BALL), 9, forward=function)
    for step, task in enumerate((0, 1, 1, 0)):
        plain = copy.deepcopy(model)
        function(plain, batch_of(step, task))
        smart(batch_of(step, task))
        for (name, own), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(own, expected), (step, name)


class Held(nn.Module):
    """Reads parameters from where `functional_call` does not put others."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.emb, self.w = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.in_a_list = [self.w]
        self.project = functools.partial(F.linear, weight=self.head.weight)
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        w = self.in_a_list[0] if self.how == "list" else self.w
        hidden = torch.tanh(self.emb(ids) @ w).mean(1)
        return self.project(hidden) if self.how == "partial" else self.head(hidden)


@pytest.mark.parametrize("how", ["modules", "list", "partial"])
def test_the_teacher_has_its_weights_wherever_they_are_read(how: str) -> None:
    torch.manual_seed(0)
    model = Held(how)

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return loss_of(model(batch["ids"]), batch)

    smart = Smart(model, SmartConfig(lambda_s=0.0, decay=0.5, decay_late=0.5), 9, forward=function)
    assert smart.teacher is not None
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(3):
        batch = batch_of(step)
        out = smart(batch)
        with torch.no_grad():
            clean = model(batch["ids"])
            with smart.teacher.weights():
                taught = model(batch["ids"])
        assert out.proximal.item() == pytest.approx(symmetric_kl(clean, taught).item(), rel=1e-9, abs=1e-15)
        optimizer.zero_grad()
        out.loss.backward()
        gradients = [p.grad for p in model.parameters()]
        expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss, logits = function(model, batch)
        (loss + symmetric_kl(logits, taught)).backward()
        for own, p, kept in zip(gradients, model.parameters(), expected, strict=True):
            assert (own is None) == (p.grad is None)
            if kept is not None:
                torch.testing.assert_close(kept, p.grad, rtol=1e-9, atol=1e-12)
        optimizer.step()
        smart.update()


class Contrast(nn.Module):
    """A key encoder that follows the query encoder in each forward pass, as momentum contrast's does."""

    def __init__(self, write: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.query = Body()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.write = write

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                self.write(own, other)
        return self.query(ids) @ self.key(ids.flip(1)).T


def by_assignment(own: Tensor, other: Tensor) -> None:
    own.data = 0.9 * own.data + 0.1 * other.data


def in_its_data(own: Tensor, other: Tensor) -> None:
    own.data.mul_(0.9).add_(other.data + 1e-3, alpha=0.1)


def in_place(own: Tensor, other: Tensor) -> None:
    own.mul_(0.9).add_(other, alpha=0.1)


@pytest.mark.parametrize("write", [by_assignment, in_its_data, in_place])
def test_parameters_that_a_pass_writes_to_are_written_once(write: Callable[[Tensor, Tensor], None]) -> None:
    """And every pass begins with what they were: from the second step on, as they are copied then."""
    torch.manual_seed(0)
    model = Contrast(write)
    with torch.no_grad():
        model.key.layer.weight.mul_(1.1)

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch["ids"])
        return F.cross_entropy(logits, torch.arange(6)), logits

    config = SmartConfig(decay=0.5, decay_late=0.5, **BALL)
    smart = Smart(model, config, 9, forward=function, embedding="query.emb")
    assert smart.teacher is not None
    for step in range(3):
        plain, moved, taught = (copy.deepcopy(model) for _ in range(3))
        taught.load_state_dict(smart.teacher.shadows, strict=False)
        if step:
            out = smart(batch_of(step))
        else:
            with pytest.warns(UserWarning, match=r"changes parameters \(key\.emb\.weight, key"):
                out = smart(batch_of(step))
        with torch.no_grad():
            _, clean = function(plain, batch_of(step))
            moved.query.emb.register_forward_hook(lambda _m, _a, x, d=out.perturbation: x + d)
            _, perturbed = function(moved, batch_of(step))
            _, of_teacher = function(taught, batch_of(step))
        for own, expected in zip(model.key.parameters(), plain.key.parameters(), strict=True):
            assert torch.equal(own, expected)
        if step:
            assert out.smoothness.item() == pytest.approx(symmetric_kl(perturbed, clean).item(), rel=1e-9)
            assert out.proximal.item() == pytest.approx(symmetric_kl(clean, of_teacher).item(), rel=1e-9)
        out.loss.backward()
        with torch.no_grad():
            for p in model.query.parameters():
                p -= 0.5 * p.grad
        smart.update()


def test_a_weight_that_is_normalised_by_its_data_leaves_the_teachers_alone() -> None:
    torch.manual_seed(0)
    model = Tasks()
    model.heads[0].weight.data.mul_(10)

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        weight = model.heads[0].weight.data
        weight.div_(weight.norm(dim=1, keepdim=True).clamp(min=1))
        return loss_of(model(batch["ids"]), batch)

    smart = Smart(model, SmartConfig(decay=0.5, decay_late=0.5, **BALL), 9, forward=function)
    assert smart.teacher is not None
    shadow = smart.teacher.shadows["heads.0.weight"].clone()
    smart(batch_of(0))
    assert torch.equal(smart.teacher.shadows["heads.0.weight"], shadow)


@pytest.mark.parametrize("buffer", [False, True])
def test_a_large_tensor_that_is_written_to_by_its_data(buffer: bool) -> None:
    torch.manual_seed(0)
    model = Tasks()
    if buffer:
        model.register_buffer("count", torch.zeros(100_000))
    else:
        model.count = torch.zeros(100_000)

    def function(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        model.count.data.add_(1)
        return loss_of(model(batch["ids"]), batch)

    smart = Smart(model, SmartConfig(**BALL), 9, forward=function)
    for step in range(3):
        smart(batch_of(step))
        assert (model.count == step + 1).all()


class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0


COUNTER = Counter()


def counting(model: Any, batch: Any, counter: Counter) -> tuple[Tensor, Tensor]:
    """A function that cannot be followed, as it takes a number out of its logits, so that it runs again."""
    counter.count += 1
    logits = model(batch["ids"])
    logits = logits * (1 + 0 * float(logits.detach().sum()))
    return loss_of(logits, batch)


class CountingFunction(Counter):
    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return counting(model, batch, self)


def helper(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return counting(model, batch, COUNTER)


def naming_a_helper(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return helper(model, batch)


def wrapped(function: Function) -> Function:
    @functools.wraps(function)
    def around(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return function(model, batch)

    return around


def with_a_default(counter: Counter) -> Function:
    def function(model: Any, batch: Any, counter: Counter = counter) -> tuple[Tensor, Tensor]:
        return counting(model, batch, counter)

    return function


def with_a_partial(counter: Counter) -> Function:
    return functools.partial(counting, counter=counter)


@pytest.mark.parametrize("make", [with_a_default, with_a_partial, naming_a_helper, wrapped(helper), CountingFunction])
def test_what_a_function_reaches_sees_one_pass(make: Any) -> None:
    counter = COUNTER
    if make in (with_a_default, with_a_partial):
        counter = Counter()
        function = make(counter)
    elif make is CountingFunction:
        function = counter = CountingFunction()
    else:
        function = make
    counter.count = 0
    smart = Smart(Tasks(), SmartConfig(**BALL), 9, forward=function)
    for step in range(3):
        smart(batch_of(step))
        assert counter.count == step + 1


def test_what_hooks_keep_in_torchs_own_modules_is_the_clean_passs() -> None:
    torch.manual_seed(0)
    model = Tasks()
    layer = model.body.layer

    def keep(module: Any, _args: Any, output: Tensor) -> None:
        module.activation = output

    layer.register_forward_hook(keep)
    smart = Smart(model, SmartConfig(**BALL), 9, forward=by_attribute)
    for step in range(2):
        smart(batch_of(step))
        with torch.no_grad():
            expected = layer.weight @ model.body.emb(batch_of(step)["ids"]).unsqueeze(-1)
        torch.testing.assert_close(layer.activation.detach(), expected.squeeze(-1) + layer.bias.detach())

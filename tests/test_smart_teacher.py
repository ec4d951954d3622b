"""The momentum teacher: what it keeps, how it moves, how it is run, saved and evaluated."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from smart_models import Encoder, batch_for
from torch import Tensor, nn

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart.teacher import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")

GPT2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2)


def move(model: nn.Module, by: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))


def proximal_alone(**options: object) -> SmartConfig:
    return SmartConfig(lambda_s=0.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_shadows_of_what_is_trained_and_no_more(dtype: str, kept: str) -> None:
    model = Encoder().to(getattr(torch, dtype))
    model.words.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    shadows = Teacher(model).shadows
    assert shadows.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(shadows[name], p.to(getattr(torch, kept)))
            assert shadows[name].dtype == getattr(torch, kept)
            assert shadows[name].data_ptr() != p.data_ptr()
            assert not shadows[name].requires_grad


def test_tied_parameters_have_one_shadow() -> None:
    model = transformers.GPT2LMHeadModel(GPT2)
    assert model.lm_head.weight is model.transformer.wte.weight
    shadows = Teacher(model).shadows
    assert sum(s.numel() for s in shadows.values()) == sum(p.numel() for p in model.parameters())
    assert "lm_head.weight" not in shadows


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(ValueError, match="model: has no parameter that requires grad"):
        Teacher(Encoder().requires_grad_(False))


@pytest.mark.parametrize("tied", [False, True])
def test_the_proximal_term_is_that_of_a_second_model(tied: bool) -> None:
    """The swapped-in shadows compute what a copy of the model with these weights does."""
    if tied:
        model = transformers.GPT2LMHeadModel(GPT2).double().eval()
        ids = torch.randint(0, 20, (2, 5))
        batch = {"input_ids": ids, "labels": ids}
    else:
        model = Encoder().double()
        model.words.requires_grad_(False)
        batch = batch_for(model)
    second = copy.deepcopy(model)
    smart = Smart(model, proximal_alone(mu=2.0), 10)
    move(model)
    out = smart(batch)
    p, q = model(**batch).logits.softmax(-1), second(**batch).logits.softmax(-1)
    rows = ((p - q) * (p.log() - q.log())).sum(-1)
    expected = rows[:, :-1].mean() if tied else rows.mean()  # the last token predicts none
    torch.testing.assert_close(out.proximal, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.loss.detach(), out.task_loss + 2 * out.proximal, rtol=1e-12, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_low_precision_model_runs_its_teacher_in_its_own_dtype() -> None:
    model = Encoder().bfloat16()
    model.norm.requires_grad_(False)
    smart = Smart(model, proximal_alone(), 10)
    assert smart(batch_for(model)).proximal == 0
    move(model)
    assert smart(batch_for(model)).proximal > 0


def test_the_decay_has_two_stages() -> None:
    """For 30 updates, a tenth at 0.99 are the first three; with two inner steps each, the count is of outer ones."""
    for inner_steps in (1, 2):
        model = Encoder().double()
        config = proximal_alone(decay=0.9, decay_late=0.5, inner_steps=inner_steps)
        smart = Smart(model, config, num_training_steps=30 * inner_steps)
        assert smart.teacher is not None
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
        for t in range(5):
            for _ in range(inner_steps):
                move(model)
                smart.update()
            beta = 0.9 if t < 3 else 0.5
            for name, p in model.named_parameters():
                expected[name] = (1 - beta) * p.detach() + beta * expected[name]
                torch.testing.assert_close(smart.teacher.shadows[name], expected[name], rtol=1e-12, atol=1e-15)


def test_one_decay_needs_no_number_of_steps() -> None:
    model = Encoder()
    with pytest.raises(ValueError, match=r"num_training_steps: got None, .* from 0.99 to 0.999 after 0.1"):
        Smart(model)
    with pytest.raises(ValueError, match="num_training_steps: got 0"):
        Smart(model, num_training_steps=0)
    for config, beta in [
        (proximal_alone(decay=0.5, decay_late=0.5), 0.5),
        (proximal_alone(decay=0.5, decay_switch=0), 0.999),
        (proximal_alone(decay=0.5, decay_switch=1), 0.5),
    ]:
        smart = Smart(model, config)
        assert smart.teacher is not None
        start = smart.teacher.shadows["head.bias"].clone()
        move(model)
        smart.update()
        expected = start + (1 - beta) * (model.head.bias.detach() - start)
        torch.testing.assert_close(smart.teacher.shadows["head.bias"], expected)


@pytest.mark.parametrize("decay", [0.25, torch.tensor(0.25)])
def test_a_decay_of_the_callers(decay: float | Tensor) -> None:
    model = Encoder()
    smart = Smart(model, proximal_alone(), 10)
    assert smart.teacher is not None
    start = smart.teacher.shadows["head.bias"].clone()
    move(model)
    smart.update(decay)
    torch.testing.assert_close(smart.teacher.shadows["head.bias"], start.lerp(model.head.bias.detach(), 0.75))


def test_vanilla_copies_at_the_end_of_each_outer_step() -> None:
    model = Encoder()
    smart = Smart(model, proximal_alone(proximal="vanilla", inner_steps=3))
    assert smart.teacher is not None
    batch = batch_for(model)
    for step in range(1, 7):
        move(model)
        assert smart(batch).proximal > 0
        smart.update()
        held = torch.equal(smart.teacher.shadows["head.weight"], model.head.weight)
        assert held == (step % 3 == 0)
    assert smart(batch).proximal == 0


# ---------------------------------------------------------------------------------------- weights and state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluating_with_the_teachers_weights(dtype: torch.dtype) -> None:
    model = Encoder().to(dtype)
    model.norm.requires_grad_(False)
    batch = batch_for(model)
    before = model(**batch).logits
    smart = Smart(model, proximal_alone(), 10)
    assert smart.teacher is not None
    move(model)
    weights = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    student = model(**batch).logits
    with smart.teacher.weights():
        assert torch.equal(model(**batch).logits, before)
        assert all(p is weights[name][0] for name, p in model.named_parameters())
        assert torch.equal(model.state_dict()["head.bias"], smart.teacher.shadows["head.bias"].to(dtype))
    with pytest.raises(KeyboardInterrupt), smart.teacher.weights():
        raise KeyboardInterrupt
    assert torch.equal(model(**batch).logits, student)
    for name, p in model.named_parameters():
        assert p.data_ptr() == weights[name][1]
        assert torch.equal(p, weights[name][2])
        assert p.dtype == dtype


def test_state_goes_round() -> None:
    model = Encoder()
    teacher = Teacher(model)
    move(model)
    teacher.update(0.5)
    state = copy.deepcopy(teacher.state_dict())
    other = Teacher(model)
    other.load_state_dict(state)
    assert all(torch.equal(other.shadows[name], s) for name, s in teacher.shadows.items())
    assert all(other.shadows[name].data_ptr() != s.data_ptr() for name, s in state.items())


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    teacher = Teacher(Encoder())
    before = copy.deepcopy(teacher.shadows)
    state = {name: torch.zeros_like(s) for name, s in teacher.shadows.items()}
    state["head.bias"] = torch.zeros(4)
    state["norm.bias"] = torch.zeros(8, dtype=torch.float64)
    state["extra"] = state.pop("words.weight")
    with pytest.raises(ValueError, match="state: does not fit") as error:
        teacher.load_state_dict(state)
    for part in (
        "extra: not in the model",
        "head.bias: got shape torch.Size([4]), expected torch.Size([3])",
        "norm.bias: got dtype torch.float64, expected torch.float32",
        "words.weight: missing",
    ):
        assert part in str(error.value)
    assert all(torch.equal(teacher.shadows[name], s) for name, s in before.items())

"""Narrow dtypes: autocast, GradScaler, and models whose weights are narrow."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from smart_models import WIDTH, Encoder, batch_for
from torch import Tensor, nn

from smart_kernels import Smart, SmartConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = (torch.bfloat16, torch.float16)
BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05, "step_size": 0.15}


def noise_for(batch: dict[str, Tensor]) -> Tensor:
    return 0.05 * torch.randn(*batch["input_ids"].shape, WIDTH)


def scaled(factor: float) -> Any:
    """How the model is run with a task loss that is scaled."""

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(**batch)
        return factor * output.loss, output.logits

    return forward


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("adversary", ["power", "predicted", "fisher", "task"])
def test_in_autocast_embeddings_and_perturbation_stay_wide(adversary: str, dtype: torch.dtype) -> None:
    model = Encoder()
    seen: list[torch.dtype] = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    hidden: list[torch.dtype] = []
    model.query_key_value.register_forward_hook(lambda *args: hidden.append(args[-1].dtype))
    batch = batch_for(model)
    smart = Smart(model, SmartConfig(**BALL, adversary=adversary, check=False), 10)
    with torch.autocast("cpu", dtype):
        out = smart(batch)
    out.loss.backward()
    assert out.perturbation is not None
    assert out.perturbation.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert set(hidden) == {dtype}
    assert out.loss.dtype == torch.float32
    assert len(seen) == (4 if adversary == "power" else 3)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("adversary", ["power", "predicted", "task"])
def test_in_autocast_the_step_is_that_of_fp32_to_the_dtypes_resolution(adversary: str, dtype: torch.dtype) -> None:
    model = Encoder()
    batch = batch_for(model, 16)
    noise = noise_for(batch)
    config = SmartConfig(**BALL, adversary=adversary, norm="l2", mu=0.0)
    exact = Smart(model, config)(batch, initial_perturbation=noise)
    with torch.autocast("cpu", dtype):
        out = Smart(model, config)(batch, initial_perturbation=noise)
    for a, b in zip(out.perturbation, exact.perturbation, strict=True):
        cosine = torch.cosine_similarity(a.flatten(), b.flatten(), 0)
        # Some twenty roundings of relative size eps / 2; for "power" of a difference, a tenth as large.
        assert cosine > 1 - (2000 if adversary == "power" else 20) * torch.finfo(dtype).eps ** 2
    torch.testing.assert_close(out.smoothness, exact.smoothness, rtol=40 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("adversary", ["power", "predicted", "fisher", "task"])
def test_a_loss_scale_cancels(adversary: str, dtype: torch.dtype) -> None:
    """Exactly for a power of two such as a GradScaler's."""
    model = Encoder()
    batch = batch_for(model, 8)
    noise = noise_for(batch)
    # "task" alone sees the scale, which takes small gradients into or out of the range that fp16 holds to 11 bits
    factor, tolerance = (2.0**3, 2e-3) if adversary == "task" and dtype == torch.float16 else (2.0**16, 0.0)
    deltas = []
    for scale in (1.0, factor, 1 / factor):
        torch.manual_seed(3)
        smart = Smart(model, SmartConfig(**BALL, adversary=adversary, mu=0.0), forward=scaled(scale))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            deltas.append(smart(batch, initial_perturbation=noise).perturbation)
    for delta in deltas[1:]:
        torch.testing.assert_close(delta, deltas[0], rtol=0, atol=tolerance)


class Long(nn.Module):
    """A mean over many tokens, layer norm of small embeddings before it: what makes gradients small and large."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        nn.init.normal_(self.words.weight, std=0.02)
        self.norm = nn.LayerNorm(32)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)
        with torch.no_grad():
            self.head.weight *= gain

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.inner(self.norm(self.words(input_ids)))).mean(1))
        return nn.functional.cross_entropy(logits, labels), logits


@pytest.mark.parametrize(
    ("adversary", "gain"),
    [("power", 1.0), ("power", 1e2), *((a, g) for a in ("predicted", "task") for g in (1e-2, 1.0, 1e2))],
)
def test_fp16_neither_underflows_nor_overflows(adversary: str, gain: float) -> None:
    """Of a mean over 512 tokens: without a scale, the gradients at the smallest gain would have 4 bits left.

    "power" at that gain follows a difference of logits that fp16 does not resolve.
    """
    model = Long(gain)
    batch = {"input_ids": torch.randint(0, 50, (4, 512)), "labels": torch.tensor([0, 1, 2, 0])}
    start = 0.01 * torch.randn(4, 512, 32) if adversary == "power" else torch.zeros(4, 512, 32)
    config = SmartConfig(epsilon=1.0, step_size=1.0, norm="l2", adversary=adversary, mu=0.0)
    smart = Smart(model, config)
    with torch.autocast("cpu", torch.float16):
        actual = smart(batch, initial_perturbation=start).perturbation
    exact = Smart(copy.deepcopy(model).double(), config)(batch, initial_perturbation=start.double()).perturbation
    assert smart.skipped == 0
    assert actual is not None
    moved, expected = ((x.double() - start).flatten(1) for x in (actual, exact))
    assert (torch.cosine_similarity(moved, expected) > 0.9999).all()


# ------------------------------------------------------------------------------------------------- narrow weights


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_models_with_narrow_weights(adversary: str, dtype: torch.dtype) -> None:
    """Noise, perturbation, shadows and terms stay in fp32; x + delta is rounded once, to the model's own dtype."""
    torch.manual_seed(1)
    model = Encoder().to(dtype)
    wide = copy.deepcopy(model).double()
    batch = batch_for(wide, 8)
    noise = noise_for(batch)
    config = SmartConfig(**BALL, adversary=adversary)
    smart, exact = Smart(model, config, 10), Smart(wide, config, 10)
    for m in (model, wide):
        with torch.no_grad():
            m.head.weight.mul_(1.25)  # away from the teacher
    out, expected = smart(batch, initial_perturbation=noise), exact(batch, initial_perturbation=noise.double())
    out.loss.backward()
    assert out.perturbation is not None
    assert out.perturbation.dtype == out.smoothness.dtype == out.proximal.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert smart.teacher is not None
    assert all(s.dtype == torch.float32 for s in smart.teacher.shadows.values())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.proximal.double(), expected.proximal, rtol=40 * eps, atol=0)
    torch.testing.assert_close(out.smoothness.double(), expected.smoothness, rtol=60 * eps, atol=0)


# ----------------------------------------------------------------------------------------------------- one warning


class InsideAutocast(Encoder):
    """Turns autocast on by itself, as a model that Accelerate has prepared does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*args, **kwargs)


def warnings_of(model: nn.Module, autocast: bool = False, **options: Any) -> list[str]:
    """Ours, of two steps; once each."""
    smart = Smart(model, SmartConfig(mu=0.0, **options))
    with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        warnings.simplefilter("always")
        for _ in range(2):
            smart(batch_for(model))
    return [str(w.message) for w in caught]


def test_warns_once_where_the_difference_of_two_passes_drowns() -> None:
    """Embeddings of a mean size of 0.8 = 1.6 * 2^-1: bf16's 8 bits are steps of 2^-1 * 2^-7 there."""
    resolution = f"{2**-8:.1g}"
    for model, autocast in ((Encoder(), True), (InsideAutocast(), False)):
        (message,) = warnings_of(model, autocast)
        for part in (
            "epsilon = 1e-05",
            "torch.bfloat16",
            "mean size of 0.",
            resolution,
            "'predicted'",
            "raise epsilon",
        ):
            assert part in message
        for quiet in ({"adversary": "predicted"}, {"adversary": "task"}, {"adversary": "fisher"}, {"epsilon": 0.1}):
            # at the paper's radius the logits of so small a model are the same in bf16: the check would tell
            assert not warnings_of(model, autocast, check=False, **quiet)
    assert not warnings_of(Encoder())


def test_warns_once_where_the_sum_does_not_hold_the_perturbation() -> None:
    """Whatever the adversary: x + delta is x there."""
    for adversary in ("power", "predicted"):
        (message,) = warnings_of(Encoder().bfloat16(), adversary=adversary)
        assert "Keep the embeddings in float32" in message
    (message,) = warnings_of(Encoder().bfloat16(), adversary="random")
    assert "R_s is 0 with a perturbation" in message
    assert "noise_std" in message
    (message,) = warnings_of(Encoder().bfloat16(), epsilon=0.1)  # of whose ascent the start is lost
    assert "noise_std" in message
    assert not warnings_of(Encoder().bfloat16(), epsilon=0.1, noise_std=0.1)


# ------------------------------------------------------------------------------------------------------ GradScaler


def test_with_a_grad_scaler_and_a_step_that_it_skips() -> None:
    model = Encoder()
    twin = copy.deepcopy(model)
    batch = batch_for(model)
    noise = noise_for(batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    smarts = [Smart(m, SmartConfig(**BALL, adversary="predicted", decay_switch=0.0), 10) for m in (model, twin)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]

    def step(scaled_loss: Any) -> list[Tensor]:
        losses = []
        for smart, scale in zip(smarts, scaled_loss, strict=True):
            with torch.autocast("cpu", torch.float16):
                out = smart(batch, initial_perturbation=noise)
            losses.append(out.loss.detach())
            scale(out.loss).backward()
        return losses

    for _ in range(2):
        losses = step((scaler.scale, lambda loss: loss))
        # the scale moves gradients into the range of fp16, so that they differ by its roundings
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        for smart, optimizer in zip(smarts, optimizers, strict=True):
            smart.update()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert smarts[0].teacher is not None
    shadows = {name: s.clone() for name, s in smarts[0].teacher.shadows.items()}
    scale = scaler.get_scale()
    scaler.scale(smarts[0](batch).loss * math.inf).backward()
    scaler.step(optimizers[0])
    scaler.update()
    smarts[0].update()
    assert scaler.get_scale() < scale  # the step was skipped
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        expected = 0.999 * shadows[name] + 0.001 * before[name]
        torch.testing.assert_close(smarts[0].teacher.shadows[name], expected, rtol=1e-6, atol=1e-7)

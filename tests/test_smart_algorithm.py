"""Smart against a literal transcription of Algorithm 1 of the paper, in float64 and plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from smart_models import WIDTH, Encoder, batch_for
from torch import Tensor

from smart_kernels import Smart, SmartConfig

# A radius at which both terms weigh as much as the task loss, and a step that leaves some elements inside the ball.
LAMBDA, EPSILON, SIGMA, ETA, MU = 2.0, 0.1, 0.05, 0.15, 3.0
STEPS, SWITCH = 5, 2
DECAYS = 0.6, 0.9

pytestmark = pytest.mark.usefixtures("one_thread")

Divergence = Callable[[Tensor, Tensor], Tensor]


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.softmax(-1), b.softmax(-1)
    return ((p - q) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().squeeze(-1)


def norm_of(x: Tensor, norm: str, scope: str) -> Tensor:
    flat = x.flatten(1) if scope == "sample" else x
    size = flat.abs().amax(-1) if norm == "linf" else flat.square().sum(-1).sqrt()
    return size.view(*size.shape, *[1] * (x.dim() - size.dim()))


def algorithm_1(
    model: Encoder,
    teacher: Encoder,
    batch: dict[str, Tensor],
    noise: Tensor,
    steps: int,
    norm: str,
    scope: str,
    l_s: Divergence,
) -> Tensor:
    """The objective of one inner step, as the paper writes it."""
    mask, labels = batch["attention_mask"], batch["labels"]
    real = mask[..., None].to(noise.dtype)
    x = model.words(batch["input_ids"])
    clean = model.from_embeddings(x, mask, labels)
    x_tilde = (x + noise * real).detach()
    for _ in range(steps):
        x_tilde.requires_grad_()
        divergence = l_s(model.from_embeddings(x_tilde, mask).logits, clean.logits.detach()).mean()
        (g,) = torch.autograd.grad(divergence, x_tilde)
        g = g * real
        g = g / norm_of(g, norm, scope).clamp_min(1e-300)
        delta = x_tilde.detach() + ETA * g - x.detach()
        if norm == "linf":
            delta = delta.clamp(-EPSILON, EPSILON)
        else:
            delta = delta * (EPSILON / norm_of(delta, norm, scope).clamp_min(1e-300)).clamp_max(1)
        x_tilde = x.detach() + delta * real
    perturbed = model.from_embeddings(x + (x_tilde - x).detach(), mask)
    with torch.no_grad():
        old = teacher(batch["input_ids"], mask)
    smoothness = l_s(perturbed.logits, clean.logits).mean()
    return clean.loss + LAMBDA * smoothness + MU * l_s(clean.logits, old.logits).mean()


@pytest.mark.parametrize("classes", [3, 1], ids=["classification", "regression"])
@pytest.mark.parametrize(("proximal", "inner_steps"), [("momentum", 1), ("momentum", 2), ("vanilla", 2)])
@pytest.mark.parametrize(("norm", "scope"), [("linf", "sample"), ("l2", "sample"), ("linf", "token"), ("l2", "token")])
@pytest.mark.parametrize("ascent_steps", [1, 3])
@pytest.mark.parametrize("way", ["call", "backward, fast", "backward, lean"])
def test_equals_algorithm_1(
    classes: int, proximal: str, inner_steps: int, norm: str, scope: str, ascent_steps: int, way: str
) -> None:
    """Loss, every gradient and the teacher over five outer steps, to 1e-9, with two graphs and with one at a time.

    The two differ by float64's rounding alone, 1e-16 in an operation; five updates and the ascent of K = 3 steps
    amplify it to no more than 1e-12 here.
    """
    expected = Encoder(classes).double()
    actual = copy.deepcopy(expected)
    teacher = copy.deepcopy(expected)
    config = SmartConfig(
        lambda_s=LAMBDA, epsilon=EPSILON, noise_std=SIGMA, step_size=ETA, ascent_steps=ascent_steps, norm=norm,
        scope=scope, mu=MU, proximal=proximal, inner_steps=inner_steps, decay=DECAYS[0], decay_late=DECAYS[1],
        decay_switch=SWITCH / STEPS, memory="lean" if "lean" in way else "fast",
    )  # fmt: skip
    smart = Smart(actual, config, num_training_steps=STEPS * inner_steps)
    assert smart.teacher is not None
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (expected, actual)]
    l_s = symmetric_kl if classes > 1 else squared_error

    for t in range(STEPS):
        for s in range(inner_steps):
            batch = batch_for(expected, seed=10 * t + s)
            noise = SIGMA * torch.randn(*batch["input_ids"].shape, WIDTH, dtype=torch.float64)
            loss = algorithm_1(expected, teacher, batch, noise, ascent_steps, norm, scope, l_s)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            if way == "call":
                out = smart(batch, initial_perturbation=noise)
                out.loss.backward()
            else:
                out = smart.backward(batch, initial_perturbation=noise)
            torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-9)
            for (name, p), q in zip(expected.named_parameters(), actual.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
            for optimizer in optimizers:
                optimizer.step()
            smart.update()
            assert out.smoothness > 1e-6  # 1e-9 is then a bar that a wrong term would break
            assert out.proximal > 1e-6 or ((t == 0 or proximal == "vanilla") and s == 0)
        beta = 0.0 if proximal == "vanilla" else DECAYS[t >= SWITCH]
        with torch.no_grad():
            for p, p_tilde in zip(expected.parameters(), teacher.parameters(), strict=True):
                p_tilde.copy_((1 - beta) * p + beta * p_tilde)
        for name, p_tilde in teacher.named_parameters():
            torch.testing.assert_close(smart.teacher.shadows[name], p_tilde, rtol=0, atol=1e-9)

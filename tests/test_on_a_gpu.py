"""The operators on a real card, and a step of SMART as a CUDA graph; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from oracle import Divergence, Ema, PerturbationStep
from smart_models import Encoder, batch_for

from smart_kernels import Smart, SmartConfig, divergence, ema_update_, perturbation_step, reference, symmetric_kl
from smart_kernels.smart import objective

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [1, 3, 33, 1000, 9001, 30522, 131072])
def test_symmetric_kl(classes: int, dtype: torch.dtype) -> None:
    b = 2 * torch.randn(6, classes, dtype=torch.float64)
    a = b + torch.tensor([1e-6, 1e-4, 1e-2, 0.5, 5, 0]).unsqueeze(-1) * torch.randn_like(b)
    a, b = a.to(dtype), b.to(dtype)
    truth = Divergence(a, b)
    x, y = (logits.to(DEVICE).requires_grad_() for logits in (a, b))
    loss = symmetric_kl(x, y, reduction="none")
    loss.sum().backward()
    truth.check_loss(loss.detach().cpu())
    truth.check_grads(x.grad.cpu(), y.grad.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [3, 33, 1000, 9001, 131072])
@pytest.mark.parametrize("kind", list(reference.KINDS)[1:])
def test_every_kind(kind: str, classes: int, dtype: torch.dtype) -> None:
    b = 2 * torch.randn(6, classes, dtype=torch.float64)
    a = b + torch.tensor([1e-6, 1e-4, 1e-2, 0.5, 5, 0]).unsqueeze(-1) * torch.randn_like(b)
    a, b = a.to(dtype), b.to(dtype)
    truth = Divergence(a, b, kind, 0.3, 1.7)
    x, y = (logits.to(DEVICE).requires_grad_() for logits in (a, b))
    loss = divergence(x, y, kind, reduction="none", beta=0.3, temperature=1.7)
    loss.sum().backward()
    truth.check_loss(loss.detach().cpu())
    truth.check_grads(x.grad.cpu(), y.grad.cpu())


@pytest.mark.parametrize("scope", ["sample", "token"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perturbation_step(norm: str, scope: str) -> None:
    delta, grad = 1e-5 * torch.randn(3, 50, 768), torch.randn(3, 50, 768)
    mask = (torch.rand(3, 50) < 0.7).long()
    truth = PerturbationStep(delta, grad, mask, 2e-5, 1e-5, norm, scope, "normalized")
    moved = (x.to(DEVICE) for x in (delta, grad))
    truth.check(perturbation_step(*moved, 2e-5, 1e-5, norm, scope, mask.to(DEVICE)).cpu())


def test_ema_update() -> None:
    shadow, parameter = torch.randn(100_001), torch.randn(100_001).bfloat16()
    truth, on_device = Ema(shadow, parameter, 0.99), shadow.to(DEVICE)
    ema_update_([on_device], [parameter.to(DEVICE)], torch.tensor(0.99, dtype=torch.float64, device=DEVICE))
    truth.check(on_device.cpu())


@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_a_replayed_step_gives_what_an_ordinary_one_gives(adversary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "warn_if_unresolved", lambda *args: None)
    model = Encoder().to(DEVICE)
    config = SmartConfig(lambda_s=1.0, mu=1.0, adversary=adversary, dropout="off", epsilon=1e-2, step_size=1.0)
    smart = Smart(model, config, num_training_steps=100)
    batch = {name: x.to(DEVICE) for name, x in batch_for(model).items()}
    noise = 1e-3 * torch.randn(*batch["input_ids"].shape, model.words.embedding_dim, device=DEVICE)
    decay = torch.tensor(1.0, device=DEVICE)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        out = smart(batch, initial_perturbation=noise)
        out.loss.backward()
        smart.update(decay)
        return out.loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
        batch["labels"].copy_((batch["labels"] + 1) % 3)
    graph.replay()
    replayed = [loss.clone(), *(p.grad.clone() for p in model.parameters())]
    ordinary = [step(), *(p.grad for p in model.parameters())]
    for got, expected in zip(replayed, ordinary, strict=True):
        torch.testing.assert_close(got, expected)
    decay.fill_(0.5)
    before = {name: shadow.clone() for name, shadow in smart.teacher.shadows.items()}
    graph.replay()
    for name, p in model.named_parameters():
        torch.testing.assert_close(smart.teacher.shadows[name], 0.5 * (before[name] + p.detach()))

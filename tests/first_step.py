"""What an installation must be able to do, on its own: every compiled op, and a step of training.

Tests and tools run this file where the package is installed, away from its sources. The arguments are the extension
modules that must be there.
"""

from __future__ import annotations

import sys

import torch

import smart_kernels
from smart_kernels import Smart, SmartConfig, environment


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(batch["words"])
    return torch.nn.functional.cross_entropy(logits, batch["labels"]), logits


for module in sys.argv[1:]:
    assert smart_kernels.COMPILED[module] is None, f"{module}: {smart_kernels.COMPILED[module]}"
served = environment.kernels()
assert {kernels["cpu"] for kernels in served.values()} == {"C++"}, environment.report()
if "_C_cuda" in sys.argv:
    assert {kernels["cuda"] for kernels in served.values()} == {"CUDA", "Triton"}, environment.report()

model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))
batch = {"words": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([0, 2])}
for adversary in ("power", "predicted"):
    smart = Smart(model, SmartConfig(adversary=adversary), num_training_steps=1, forward=forward)
    out = smart(batch)
    out.loss.backward()
    smart.update()
    assert 0 < out.smoothness.item() < 1e-6

large = torch.randn(64, 4096)
grad = smart_kernels.symmetric_kl_grad(large, large + 1e-5 * torch.randn(64, 4096))
assert grad.isfinite().all()
assert grad.any()
print(f"{smart_kernels.__file__} with torch {torch.__version__}")

"""A whole step of SMART on a device that is not there, and that raises where a CUDA graph could not be captured.

Tensors are fake and lie on the "meta" device: whatever needs a value of theirs on the host (`item`, `bool`, `tolist`,
`nonzero`, a boolean index) raises. The mode below raises where tensors go from one device to another as well, and calls
for each op what serves it on a GPU, down to the launch of the Triton kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from smart_models import Encoder
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from smart_kernels import Smart, SmartConfig, symmetric_kl
from smart_kernels.ops import _library, perturbation
from smart_kernels.smart import objective, positions

LAUNCHERS = {
    getattr(torch.ops.smart_kernels, name).default: getattr(
        importlib.import_module(f"smart_kernels.triton_kernels.{module}"), name
    )
    for module, names in (
        ("divergence", [n for n in _library.OPS if n.startswith("divergence")]),
        ("perturbation", [n for n in _library.OPS if n.startswith(("perturbation", "init"))]),
    )
    for name in names
}


class Device(TorchDispatchMode):
    """Raises where tensors of two devices meet; ops of the library are served by their launchers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAUNCHERS:
            with self:
                return LAUNCHERS[func](*args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if {x.device.type for x in tensors} - {"meta"}:
            raise RuntimeError(f"{func}: a tensor on the host")
        if any(x.is_pinned() for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            raise RuntimeError(f"{func}: memory that is not the caching allocator's")
        return result


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside is the device; yields the names of the Triton kernels that are launched."""
    names: list[str] = []

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names.append(self.__name__)

    def synchronize(*args: Any) -> None:
        raise RuntimeError("synchronisation")

    monkeypatch.setattr(JITFunction, "run", launch)
    for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", synchronize)
    with FakeTensorMode(), torch.device("meta"), Device():
        yield names


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool(x.sum() > 0), DataDependentOutputException),
        (lambda x: x.tolist(), DataDependentOutputException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.cpu(), RuntimeError),
        (lambda x: x.new_zeros(3, device="cpu"), RuntimeError),
        (lambda x: torch.cuda.synchronize(), RuntimeError),
    ],
)
def test_the_device_raises(launched: list[str], what: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        what(torch.ones(3))


def smart_on(model: nn.Module, config: SmartConfig, monkeypatch: pytest.MonkeyPatch) -> Smart:
    """As it is after the steps that warm up: with a generator on the device, and what it reads once read."""

    def draw_seed(generator: torch.Generator, device: torch.device) -> torch.Tensor:
        assert device.type == "meta"
        return _library.draw_seed(None, device)  # there are no generators on this device

    monkeypatch.setattr(perturbation, "draw_seed", draw_seed)
    monkeypatch.setattr(objective, "warn_if_unresolved", lambda *args: False)
    monkeypatch.setattr(positions, "_alike", lambda *args: True)
    with monkeypatch.context() as patch:
        generator = torch.Generator()
        patch.setattr(torch, "Generator", lambda device: generator)
        return Smart(model, config, num_training_steps=100)


@pytest.mark.parametrize("scope", ["sample", "token"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("adversary", ["power", "predicted", "task", "random"])
def test_a_step_needs_nothing_on_the_host(
    launched: list[str], monkeypatch: pytest.MonkeyPatch, adversary: str, norm: str, scope: str
) -> None:
    """Adversary, loss, backward, and the teacher's average with its decay on the device."""
    model = Encoder()
    config = SmartConfig(lambda_s=1.0, mu=1.0, adversary=adversary, norm=norm, scope=scope, dropout="off", check=False)
    smart = smart_on(model, config, monkeypatch)
    decay = torch.full((), 0.99)
    batch = {
        "input_ids": torch.zeros(4, 6, dtype=torch.int64),
        "attention_mask": torch.ones(4, 6, dtype=torch.int64),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    for _ in range(2):
        launched.clear()
        out = smart(batch)
        out.loss.backward()
        smart.update(decay)
        assert "_init_kernel" in launched
        assert ("_step_kernel" in launched) == (adversary != "random")
        # of each divergence the loss with its gradients; for "power" the gradient alone before
        assert launched.count("_divergence_kernel") >= (3 if adversary == "power" else 2)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 40000)])
def test_the_loss_with_weights_needs_nothing_on_the_host(
    launched: list[str], shape: tuple[int, ...], reduction: str
) -> None:
    a, b = torch.randn(2, *shape).unbind()
    a.requires_grad_()
    symmetric_kl(a, b.requires_grad_(), torch.ones(shape[:-1]), reduction).sum().backward()
    assert launched
    assert a.grad is not None


def test_units_longer_than_a_program_need_nothing_on_the_host(launched: list[str]) -> None:
    delta, grad, mask = torch.zeros(2, 64, 768), torch.zeros(2, 64, 768), torch.ones(2, 64)
    skipped = torch.zeros((), dtype=torch.int64)
    perturbation.perturbation_step_(delta, grad, 1e-3, 1e-5, "l2", "sample", mask, "normalized", skipped)
    assert launched == ["_gather_kernel", "_apply_kernel"]

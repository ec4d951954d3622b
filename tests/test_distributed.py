"""Several processes (gloo, on the CPU) against one on the joined batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed_world import World
from smart_models import WIDTH, Encoder, batch_for
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from smart_kernels import Smart, SmartConfig


class Classifier(Encoder):
    """Gives a tuple, whose tensors a reducer finds, as it does in the outputs of Hugging Face models."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        return output.loss, output.logits


ADVERSARIES = ("power", "predicted")
BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05, "step_size": 0.15}
STEPS, LR, LOCAL = 3, 0.1, 2
CLOSE = {"rtol": 0, "atol": 1e-6}  # fp32 gradients of size 0.01 to 1, summed in another order


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    started = World(request.param, tmp_path_factory.mktemp("world"))
    yield started
    started.close()


def wrap(model: Encoder, how: str) -> nn.Module:
    """The model for several processes: two rows of the head's are too few for three of them, and 20 words uneven."""
    if how.startswith("ddp"):
        options = {"ddp static": {"static_graph": True}, "ddp unused": {"find_unused_parameters": True}}
        return DistributedDataParallel(model, **options.get(how, {}))
    if how == "fsdp nested":
        for part in (model.words, model.norm, model.query_key_value):
            fully_shard(part)
    return fully_shard(model, reshard_after_forward=None if how == "fsdp nested" else True)


def whole(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if x is not None and hasattr(x, "full_tensor") else x


def bare_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def draw(step: int, samples: int) -> tuple[dict[str, Tensor], Tensor]:
    batch = batch_for(Encoder(2), samples, seed=step)
    return batch, 0.05 * torch.randn(samples, batch["input_ids"].shape[1], WIDTH)


def part(batch: dict[str, Tensor], noise: Tensor, chosen: slice) -> tuple[dict[str, Tensor], Tensor]:
    return {key: value[chosen] for key, value in batch.items()}, noise[chosen]


def start(how: str, **options: Any) -> tuple[nn.Module, Smart, Encoder, Smart]:
    """The same model for several processes and for one."""
    torch.manual_seed(0)
    model = Classifier(2)
    alone = copy.deepcopy(model)
    config = SmartConfig(**BALL, **options)
    wrapped = wrap(model, how)
    return wrapped, Smart(wrapped, config, 10), alone, Smart(alone, config, 10)


def check_step(model: nn.Module, smart: Smart, alone: Encoder, smart_alone: Smart) -> None:
    """Gradients, then parameters and teachers after the optimiser's step, are the same."""
    parameters = bare_names(model)
    assert parameters.keys() == dict(alone.named_parameters()).keys()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(whole(parameters[name].grad), p.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    for m, s in ((model, smart), (alone, smart_alone)):
        torch.optim.SGD(m.parameters(), lr=LR).step()
        s.update()
        m.zero_grad()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(whole(parameters[name].detach()), p.detach(), **CLOSE)
        torch.testing.assert_close(whole(smart.teacher.shadows[name]), smart_alone.teacher.shadows[name], **CLOSE)


# ------------------------------------------------------------------------------------------ equal to one process


def steps_equal(rank: int, size: int, how: str, adversary: str) -> None:
    model, smart, alone, smart_alone = start(how, adversary=adversary)
    for step in range(STEPS):
        joined = draw(step, LOCAL * size)
        batch, noise = part(*joined, slice(rank * LOCAL, (rank + 1) * LOCAL))
        out = smart(batch, initial_perturbation=noise)
        out.loss.backward()
        expected = smart_alone(joined[0], initial_perturbation=joined[1])
        expected.loss.backward()
        torch.testing.assert_close(out.perturbation, expected.perturbation[rank * LOCAL : (rank + 1) * LOCAL], **CLOSE)
        assert out.smoothness > 0
        assert (out.proximal > 0) == (step > 0)
        check_step(model, smart, alone, smart_alone)


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("how", ["ddp", "ddp static", "ddp unused", "fsdp", "fsdp nested"])
def test_three_steps_are_those_of_one_process(world: World, how: str, adversary: str) -> None:
    world.run(steps_equal, how, adversary)


# ---------------------------------------------------------------------------------- what is sent, and how often


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Bytes of each reduction of gradients: a bucket's by a reducer's hook, a group of shards' where it is sent."""
    sent: list[int] = []

    def hook(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    hook.__annotations__.clear()  # which torch would have as types, not as strings
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, hook)
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    send = getattr(dist, name)

    def scatter(output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        sent.append(input.nbytes)
        return send(output=output, input=input, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, name, scatter)
        yield sent


def accumulating(model: nn.Module, last: bool) -> Any:
    """Around a micro-batch: gradients are sent with the last one."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def bytes_sent(rank: int, size: int, how: str, options: dict[str, Any] | None, micro_batches: int) -> list[list[int]]:
    """Of two steps."""
    model, smart, *_ = start(how, **(options or {"lambda_s": 0.0, "mu": 0.0}))
    steps = []
    with counted(model) as sent:
        for step in range(2):
            for i in range(micro_batches):
                with accumulating(model, i == micro_batches - 1):
                    smart(draw(step, LOCAL)[0]).loss.backward()
            steps.append(list(sent))
            sent.clear()
            torch.optim.SGD(model.parameters(), lr=LR).step()
            smart.update()
            model.zero_grad()
    return steps


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp nested"])
def test_gradients_are_sent_once_a_step(world: World, how: str, micro_batches: int) -> None:
    (vanilla, *others) = world.run(bytes_sent, how, None, 1)
    assert all(other == vanilla for other in others)
    assert all(sum(step) > 0 for step in vanilla)
    for adversary in ADVERSARIES:
        for sent in world.run(bytes_sent, how, {"adversary": adversary}, micro_batches):
            assert sent == vanilla, (sent, vanilla)


def micro_batches_equal(rank: int, size: int, how: str, adversary: str) -> None:
    model, smart, alone, smart_alone = start(how, adversary=adversary)
    for step in range(2):
        joined = draw(step, 4 * size)
        for i in range(4):
            chosen = slice(rank * 4 + i, rank * 4 + i + 1)
            with accumulating(model, i == 3):
                batch, noise = part(*joined, chosen)
                (smart(batch, initial_perturbation=noise).loss / 4).backward()
        smart_alone(joined[0], initial_perturbation=joined[1]).loss.backward()
        check_step(model, smart, alone, smart_alone)  # which moves either teacher once


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp nested"])
def test_four_micro_batches_are_a_large_one(world: World, how: str, adversary: str) -> None:
    world.run(micro_batches_equal, how, adversary)

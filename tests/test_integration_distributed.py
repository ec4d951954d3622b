"""SmartTrainer on two processes: equal to one, resumed to the bit; the state of a sharded teacher in a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_world import World
from hf_tasks import NO_DROPOUT, TASKS, requires_trainer, trainer_for
from safetensors.torch import load_file
from smart_models import Encoder
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart import objective
from smart_kernels.smart.checkpoint import load_smart, save_smart

pytestmark = pytest.mark.usefixtures("one_thread")

BALL: dict[str, Any] = {"smart_epsilon": 0.1, "smart_noise_std": 0.05, "smart_step_size": 0.15, "smart_decay": 0.5}
LAUNCHED = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # as torchrun sets them


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    started = World(2, tmp_path_factory.mktemp("world"))
    yield started
    started.close()


def train(name: str, folder: Path, size: int, **options: Any) -> tuple[dict[str, Tensor], ...]:
    """Parameters, shadows and what was logged."""
    resume, build = options.pop("resume", False), options.pop("build", {})
    options = {"per_device_train_batch_size": size, **BALL, **options}
    trainer = trainer_for(TASKS[name], folder, TASKS[name].build(**build), **options)
    trainer.train(resume_from_checkpoint=resume)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (trainer.args.world_size > 1)
    names = "loss", "task_loss", "smoothness", "proximal"
    logs = {key: torch.tensor([h[key] for h in trainer.state.log_history if key in h]) for key in names}
    return trainer.model.state_dict(), trainer.smart.teacher.shadows, logs


def train_part(rank: int, size: int, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[dict[str, Tensor], ...]:
    os.environ |= LAUNCHED | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return train(*args, **options)


def fixed_noise(embeds: Tensor, std: float, *_: Any) -> Tensor:
    """By the embeddings, the same however the examples are split."""
    return std * torch.sin(1e3 * embeds.detach())


def train_part_with_fixed_noise(*args: Any) -> tuple[dict[str, Tensor], ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "init_perturbation", fixed_noise)
        return train_part(*args)


@requires_trainer
@pytest.mark.parametrize(
    ("name", "more"),
    [("bert", {}), ("gpt2", {}), ("bert", {"smart_detach_clean": True}), ("gpt2", {"smart_memory": "lean"})],
)
def test_two_processes_are_one(
    name: str, more: dict[str, Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In micro-batches with different numbers of tokens; also where the model's loss ignores how many there are."""
    options = {"build": NO_DROPOUT[name], "optim": "sgd", "gradient_accumulation_steps": 2, "max_steps": 2, **more}
    results = world.run(train_part_with_fixed_noise, (name, tmp_path, 2), options)
    monkeypatch.setattr(objective, "init_perturbation", fixed_noise)
    expected = train(name, tmp_path, 4, **options)
    for result in results:
        for got, wanted in zip(result[:2], expected[:2], strict=True):
            assert got.keys() == wanted.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6)
        for key, value in expected[2].items():  # in fp32, summed in another order
            torch.testing.assert_close(result[2][key], value, rtol=1e-4, atol=1e-8)


@requires_trainer
def test_resumed_training_gives_the_same_bits(world: World, tmp_path: Path) -> None:
    """With dropout, and noise that differs from process to process."""
    options = {"save_strategy": "steps", "save_steps": 2}
    runs = []
    for resume in (False, True):
        runs.append(world.run(train_part, ("bert", tmp_path, 2), options | {"resume": resume}))
        generators = load_file(tmp_path / "checkpoint-2" / "smart.safetensors")["generator"]
        assert not torch.equal(*generators)
        shutil.rmtree(tmp_path / "checkpoint-4")
    for first, second in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            for key, value in a.items():
                assert torch.equal(b[key], value), key


def sharded_goes_round(rank: int, size: int, path: Path) -> dict[str, Tensor]:
    """Saved by all, loaded into another object by all. The 3 rows of the head's are uneven."""
    smarts = []
    for _ in range(2):
        model = Encoder()
        fully_shard(model.words)
        smarts.append(Smart(fully_shard(model), SmartConfig(), 10))
    smart, other = smarts
    smart.update()
    smart.skipped += 1 + rank
    save_smart(smart, path)
    torch.distributed.barrier()
    load_smart(other, path)
    assert other.skipped == 1 + rank
    assert torch.equal(other.generator.get_state(), smart.generator.get_state())
    assert smart.teacher is not None
    assert other.teacher is not None
    for name, shadow in smart.teacher.shadows.items():
        assert torch.equal(other.teacher.shadows[name].to_local(), shadow.to_local())
    return {name: shadow.full_tensor() for name, shadow in smart.teacher.shadows.items()}


def test_a_sharded_teacher_in_a_file(world: World, tmp_path: Path) -> None:
    """It is the file of one process: any number of them goes on from it."""
    shadows, _ = world.run(sharded_goes_round, tmp_path / "smart.safetensors")
    smart = Smart(Encoder(), SmartConfig(), 10)
    load_smart(smart, tmp_path / "smart.safetensors")
    assert smart.skipped == 3
    assert smart.state_dict()["updates"] == 1
    assert smart.teacher is not None
    for name, shadow in smart.teacher.shadows.items():
        assert torch.equal(shadow, shadows[name])

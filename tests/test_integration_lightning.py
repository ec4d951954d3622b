"""SmartCallback for Lightning, and the documented loop for Accelerate."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
import lightning.pytorch as pl
from hf_tasks import NO_DROPOUT, TASKS

from smart_kernels import Smart, SmartConfig
from smart_kernels.integrations.lightning import SmartCallback

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec:FutureWarning"),
]

BALL = SmartConfig(epsilon=0.1, noise_std=0.05, step_size=0.15, decay=0.5)


class Module(pl.LightningModule):
    """A Hugging Face model with an optimiser; without dropout, whose masks Lightning does not resume."""

    def __init__(self, task: str = "bert") -> None:
        super().__init__()
        self.model = TASKS[task].build(**NO_DROPOUT[task])
        self.passes = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.passes += 1
        out = self.model(**batch)
        self.log("own", out.loss, on_step=False, on_epoch=True)
        return out

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("validation", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(task: str = "bert") -> DataLoader[Any]:
    return DataLoader(TASKS[task].examples(), batch_size=4)


def trainer_for(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"logger": False, "enable_checkpointing": False}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **defaults | options)


@pytest.mark.parametrize("task", ["bert", "gpt2"])
def test_it_is_the_objective_of_smart(task: str, tmp_path: Path) -> None:
    """The parameters after an epoch are those of a loop with Smart; the module is left as it was."""
    module, callback = Module(task), SmartCallback(BALL)
    twin = copy.deepcopy(module.model)
    torch.manual_seed(1)
    trainer_for(tmp_path, callback).fit(module, loader(task))
    assert not {"training_step", "log"} & vars(module).keys()
    torch.manual_seed(1)
    smart = Smart(twin.train(), BALL, num_training_steps=4)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for batch in loader(task):
        optimizer.zero_grad()
        smart(batch).loss.backward()
        optimizer.step()
        smart.update()
    assert callback.smart is not None
    assert callback.smart.teacher is not None
    assert smart.teacher is not None
    for name, p in twin.named_parameters():
        assert torch.equal(module.model.get_parameter(name), p), name
        assert torch.equal(callback.smart.teacher.shadows[f"model.{name}"], smart.teacher.shadows[name]), name


@pytest.mark.parametrize("options", [{"detach_clean": True}, {"memory": "lean"}])
def test_one_graph_at_a_time_trains_the_same(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In micro-batches, by a gradient scaler, against steps of both graphs; gradients are sums in another order."""
    ends = []
    config = dataclasses.replace(BALL, **options)
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(Smart, "ahead", lambda self, batch, scale: self(batch))
        torch.manual_seed(0)
        module, watching = Module(), Watching()
        torch.manual_seed(1)
        trainer = trainer_for(
            tmp_path, SmartCallback(config), watching, plugins=[_Fp16()], accumulate_grad_batches=2, max_epochs=2
        )
        trainer.fit(module, loader())
        assert trainer.global_step == 4
        ends.append([*(p.detach() for p in module.parameters()), torch.tensor([s["loss"] for s in watching.seen])])
    for actual, expected in zip(*ends, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # after AdamW, which divides by their size


class Watching(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:  # not so of a batch that was skipped
            self.seen.append(
                {name: float(x) for name, x in trainer.callback_metrics.items()} | {"loss": float(outputs["loss"])}
            )
            assert outputs.get("logits", torch.empty(4, 3)).shape == (4, 3)


def test_what_is_logged(tmp_path: Path) -> None:
    """What the module logs in the extra passes does not count; the terms make the loss; it falls."""
    module, watching = Module(), Watching()
    trainer = trainer_for(tmp_path, SmartCallback(BALL), watching, max_epochs=5)
    trainer.fit(module, loader())
    assert module.passes == 20  # the clean ones; teacher, ascent and perturbed repeat what these did
    for seen in watching.seen:
        total = seen["task_loss"] + seen["smoothness"] + seen["proximal"]
        assert seen["loss"] == pytest.approx(total, rel=1e-5)
        assert seen["skipped_samples"] == 0
    last = [seen["task_loss"] for seen in watching.seen[-4:]]
    assert float(trainer.callback_metrics["own"]) == pytest.approx(sum(last) / 4, rel=1e-5)
    assert sum(last) < sum(seen["task_loss"] for seen in watching.seen[:4])


def test_the_teacher_moves_once_per_optimiser_step(tmp_path: Path) -> None:
    callback = SmartCallback(BALL)
    trainer_for(tmp_path, callback, accumulate_grad_batches=3).fit(Module(), loader())  # of four batches
    assert callback.smart is not None
    assert callback.smart.state_dict()["updates"] == 2


def test_a_step_that_a_gradient_scaler_skips_moves_no_teacher(tmp_path: Path) -> None:
    class Overflowing(Module):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 1:
                self.model.classifier.bias.grad[0] = torch.inf

    callback = SmartCallback(BALL)
    trainer_for(tmp_path, callback, plugins=[_Fp16()]).fit(Overflowing(), loader())
    assert callback.smart is not None
    assert callback.smart.state_dict()["updates"] == 3


class _Fp16(pl.plugins.MixedPrecision):
    """Loss scaling as of "16-mixed", on the CPU and without autocast."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))

    def autocast_context_manager(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def test_resumed_training_gives_the_same_bits(tmp_path: Path) -> None:
    runs = []
    for first in (2, 4):
        module, callback = Module(), SmartCallback(BALL)
        torch.manual_seed(1)
        trainer = trainer_for(tmp_path, callback, max_epochs=4, limit_train_batches=3)
        trainer.fit_loop.max_epochs = first
        trainer.fit(module, loader())
        if first == 2:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            module, callback = Module(), SmartCallback(BALL)
            trainer = trainer_for(tmp_path, callback, max_epochs=4, limit_train_batches=3)
            trainer.fit(module, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        assert callback.smart is not None
        assert callback.smart.teacher is not None
        assert callback.smart.state_dict()["updates"] == 12
        runs.append(
            dict(module.named_parameters()) | {f"teacher {n}": s for n, s in callback.smart.teacher.shadows.items()}
        )
    for name, value in runs[1].items():
        assert torch.equal(runs[0][name], value), name


def test_a_checkpoint_that_was_validated_is_not_resumed_by_a_fit(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, SmartCallback(BALL))
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    callback = SmartCallback(BALL)
    trainer = trainer_for(tmp_path, callback)
    trainer.validate(Module(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True)
    trainer.fit(Module(), loader())
    assert callback.smart is not None
    assert callback.smart.state_dict()["updates"] == 4


def test_evaluating_the_teacher(tmp_path: Path) -> None:
    module, callback = Module(), SmartCallback(BALL)
    trainer = trainer_for(tmp_path, callback)
    trainer.fit(module, loader())
    assert callback.smart is not None
    assert callback.smart.teacher is not None
    (student,) = trainer.validate(module, loader(), verbose=False)
    with callback.smart.teacher.weights():
        (teacher,) = trainer.validate(module, loader(), verbose=False)
    (again,) = trainer.validate(module, loader(), verbose=False)
    assert student == again != teacher


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    class Bare(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return [super().training_step(batch, batch_idx).loss]

    class ByHand(Module):
        automatic_optimization = False

    bare = Bare()
    with pytest.raises(ValueError, match="training_step: returned list, expected a mapping with 'loss'"):
        trainer_for(tmp_path, SmartCallback(BALL)).fit(bare, loader())
    assert "training_step" not in vars(bare)
    with pytest.raises(ValueError, match="pl_module: got automatic_optimization=False"):
        trainer_for(tmp_path, SmartCallback(BALL)).fit(ByHand(), loader())
    with pytest.raises(ValueError, match="embedding: got 'nowhere'"):
        trainer_for(tmp_path, SmartCallback(BALL, embedding="nowhere")).fit(Module(), loader())


def test_a_step_may_return_the_loss_alone_or_skip_its_batch(tmp_path: Path) -> None:
    """What is compared is then what the model's call gave; what is skipped moves nothing."""

    class Bare(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            out = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else out.loss

    class Whole(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            out = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else out

    ends = []
    for kind in (Bare, Whole):
        torch.manual_seed(0)
        module, watching = kind(), Watching()
        torch.manual_seed(1)
        trainer_for(tmp_path, SmartCallback(BALL), watching).fit(module, loader())
        ends.append([p.detach() for p in module.parameters()])
        assert module.passes == 4
        assert watching.seen[-1]["smoothness"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_guide_to_lightning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Module()
    pages.run("lightning", pages.guide("lightning"), {"module": module, "loader": loader()})
    assert module.trainer.global_step == 12


@pytest.mark.parametrize("steps", [1, 2])
def test_the_guide_to_accelerate_runs(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    monkeypatch.chdir(tmp_path)
    model = TASKS["bert"].build().train()
    before = [p.detach().clone() for p in model.parameters()]
    names: dict[str, Any] = {
        "accelerator": accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": DataLoader(TASKS["bert"].examples(), batch_size=1),
    }
    smart = pages.run("accelerate", pages.guide("accelerate"), names)["smart"]
    assert isinstance(smart, Smart)
    assert smart.state_dict()["updates"] == 16 // steps
    assert smart._switch == {1: 2, 2: 1}[steps]  # a tenth of the optimiser's steps
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert isinstance(model, nn.Module)

"""SMART in Lightning: a callback."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from smart_kernels.smart.checkpoint import gather_state, restore_state
from smart_kernels.smart.config import SmartConfig
from smart_kernels.smart.objective import Smart, attention_mask
from smart_kernels.smart.passes import output_logits
from smart_kernels.smart.structure import replaced


class SmartCallback(Callback):  # type: ignore[misc]
    """The SMART objective (Jiang et al. 2020, arXiv 1911.03437) instead of the loss of a LightningModule.

    The module's ``training_step`` returns a mapping with "loss" and "logits", as a Hugging Face model does, or the loss
    alone: then the outputs of the model's calls in it are compared. It runs once a step, and so do its logs, metrics
    and counters. Where the logits come about in a way that cannot be followed, it runs for each pass; what it logs
    counts once, and what it changes in the module is put back. Where it returns None, the batch is skipped. The module
    logs task_loss, smoothness, proximal, smoothness_share (lambda_s * smoothness over task_loss) and skipped_samples
    too; where the share is below 1e-4, one warning after the first epoch names a radius that does something. The
    teacher moves after each step that the optimiser has made. A step has the passes of
    :meth:`~smart_kernels.Smart.backward`: with ``detach_clean=True`` or ``memory="lean"`` there is one graph at a time,
    and the loss that Lightning calls backward on has that of the last pass. The state of SMART is part of Lightning's
    checkpoints.

    Args:
        config: the hyper-parameters; the paper's by default.
        embedding: name of the module whose output is perturbed; by default the word embedding (see
            :func:`~smart_kernels.smart.embedding.find_embedding`).
        mask: gives, for a batch, which positions are perturbed, as in :class:`~smart_kernels.Smart`.

    Attributes:
        smart: the :class:`~smart_kernels.Smart` of the last training, None before;
            ``with callback.smart.teacher.weights(): trainer.validate(module)`` evaluates its teacher.

    Raises:
        ValueError: when training begins: the module optimises by hand, a hyper-parameter or a state to resume from
            does not fit; in a step: ``training_step`` returns something else.
    """

    def __init__(
        self,
        config: SmartConfig | None = None,
        *,
        embedding: str | None = None,
        mask: Callable[[Any], Tensor | None] = attention_mask,
    ) -> None:
        self.smart: Smart | None = None
        self._config = config
        self._embedding = embedding
        self._mask = mask
        self._state: dict[str, Tensor] | None = None  # to resume from
        self._training_step: Callable[..., Any]
        self._place: tuple[Any, ...] = ()  # of a batch in its epoch
        self._output: Any = None  # of the ordinary pass
        self._handles: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a state that came with a checkpoint for something else than training."""
        self._state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the objective in the place of the module's loss."""
        if not pl_module.automatic_optimization:
            raise ValueError("pl_module: got automatic_optimization=False, expected True")
        steps = trainer.estimated_stepping_batches
        self.smart = Smart(
            pl_module,
            self._config,
            None if math.isinf(steps) else int(steps),
            embedding=self._embedding,
            forward=self._forward,
            mask=self._mask,
        )
        if self._state is not None:
            restore_state(self.smart, self._state)
            self._state = None
        self._training_step = pl_module.training_step
        pl_module.training_step = functools.wraps(self._training_step)(functools.partial(self._step, pl_module))
        # after steps that were made, not those that a gradient scaler has skipped
        update = self.smart.update
        self._handles = [o.register_step_post_hook(lambda *_: update()) for o in trainer.optimizers]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the first epoch, warn if the smoothness term does nothing."""
        assert self.smart is not None
        self.smart.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        if self._handles:
            del pl_module.training_step  # the one that was put before the class's own
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The state of SMART, for the checkpoint."""
        return {} if self.smart is None else gather_state(self.smart)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training begins."""
        self._state = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The student's weights, also where the module has the teacher's at the moment, to be validated."""
        teacher = None if self.smart is None else self.smart.teacher
        if teacher is not None and teacher.swapped:
            state = checkpoint["state_dict"]
            state |= {name: value for name, value in teacher.students().items() if name in state}

    def _step(self, pl_module: LightningModule, batch: Any, *place: Any) -> Any:
        """In place of the module's training_step."""
        assert self.smart is not None
        self._place = place
        scaler = getattr(pl_module.trainer.precision_plugin, "scaler", None)
        try:
            out = self.smart.ahead(batch, scaler or 1.0)
        except _NoLoss:  # the module skips the batch
            return None
        output, self._output = self._output, None
        for name in ("task_loss", "smoothness", "proximal"):
            pl_module.log(name, getattr(out, name))
        pl_module.log("smoothness_share", self.smart.config.lambda_s * out.smoothness / out.task_loss)
        pl_module.log("skipped_samples", self.smart.skipped.float())
        return {**output, "loss": out.loss} if isinstance(output, Mapping) else out.loss

    def _forward(self, pl_module: LightningModule, batch: Any) -> tuple[Tensor, Any]:
        assert self.smart is not None
        again = self.smart.repeats
        with _silent(pl_module) if again else nullcontext():
            output = self._training_step(batch, *self._place)
        if output is None:
            raise _NoLoss
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"training_step: returned {type(output).__name__}, expected a mapping with 'loss', and 'logits' where "
                "they are not the model's own, or a loss, or None to skip the batch"
            )
        if not again:  # as Lightning keeps it: its graph is the step's to free
            self._output = replaced(output, _detached) if isinstance(output, Mapping) else None
        return loss, output_logits(output)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


class _NoLoss(Exception):  # noqa: N818
    """A training_step returned None: the batch is skipped."""


@contextmanager
def _silent(pl_module: LightningModule) -> Iterator[None]:
    """The module's log does nothing."""
    pl_module.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del pl_module.log

"""Whether the terms do anything: R_s at this radius, and which radius would; the teacher, if it is ever renewed."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from smart_kernels.smart.config import SmartConfig
from smart_kernels.smart.parallel import rank
from smart_kernels.smart.state import version

NOTHING = 1e-4
"""lambda_s R_s over the task loss: below, the term does nothing."""

SOMETHING = 1e-2
"""The same where it does something: what the radius is named for."""


FORGOTTEN = 10
"""Changes of the parameters with no call of `update`: nobody takes so many steps before the first."""


class Renewal:
    """Says once if the parameters change and change, and the teacher is not renewed meanwhile.

    Args:
        model: the model that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._last, self._changes, self._told = self._count(), 0, False

    def _count(self) -> int:
        return sum(map(version, self._parameters))

    def renewed(self) -> None:
        """Begin to count anew."""
        self._changes = 0

    def look(self) -> None:
        """Warn, in the first process, in the step that comes after so many changes with no update."""
        if self._told:
            return
        count = self._count()
        self._changes, self._last = self._changes + (count != self._last), count
        self._told = self._changes == FORGOTTEN
        if self._told and not rank():
            warnings.warn(
                f"the parameters have changed {FORGOTTEN} times and update() has not been called meanwhile: the "
                "proximal term holds the model to what it was before. Call smart.update() after each step of the "
                "optimiser",
                stacklevel=4,
            )


class Effect:
    r"""Adds up :math:`\lambda_s R_s` and the task loss as training begins, and says once if the former is nothing.

    The sums stay on the device; they are read once, at the end of the first epoch, or after a third of the training
    where that comes first: in its first steps a new head tells hardly anything apart, and R_s is small at any radius.

    Args:
        config: the weight and the radius.
        num_training_steps: optimiser steps of the whole training; None where only ends of epochs are known.
        device: where the sums lie.
    """

    def __init__(self, config: SmartConfig, num_training_steps: int | None, device: torch.device) -> None:
        self._config = config
        self._left = math.inf if num_training_steps is None else math.ceil(num_training_steps / 3)
        self._sums = torch.zeros(2, device=device)
        self._done = not config.lambda_s

    def add(self, smoothness: Tensor, task_loss: Tensor) -> None:
        """Count a step's terms, detached scalars."""
        if not self._done:
            self._sums += torch.stack([self._config.lambda_s * smoothness, task_loss.abs()]).to(self._sums)

    def count_update(self) -> None:
        """Count a step of the optimiser; after a third of the training, say what is to be said."""
        self._left -= 1
        if self._left <= 0:
            self.tell()

    def tell(self) -> None:
        """Warn, in the first process, where the term does nothing; at the first call that any step came before."""
        if self._done or (self._sums.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        smoothness, task_loss = self._sums.tolist()
        if not task_loss:
            return
        self._done = True
        if smoothness / task_loss < NOTHING and not rank():  # not so for NaN
            warnings.warn(no_effect(self._config, smoothness / task_loss), stacklevel=4)


def no_effect(config: SmartConfig, share: float) -> str:
    """What there is to say of a term that is this share of the task loss: R_s grows as the square of a small radius."""
    name = "noise_std" if config.adversary == "random" else "epsilon"
    radius = getattr(config, name)
    text = f"lambda_s * R_s is {share:.1g} of the task loss: the smoothness term does nothing at {name}={radius:g}"
    if not share:
        return f"{text}; set a larger {name}, or lambda_s=0 to save its passes"
    wanted = radius * math.sqrt(SOMETHING / share)
    return (
        f"{text}. It grows about as the square of the radius: {name}={wanted:.1g} would make it {SOMETHING:g} of the "
        "task loss; or set lambda_s=0 to save its passes"
    )

"""SmartConfig: every hyper-parameter of SMART, its unit, its range and where it comes from."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from smart_kernels.reference import KINDS
from smart_kernels.smart.embedding import find_embedding, mean_norm

Logits = tuple[Tensor, ...]
"""What a model says of a batch: one tensor of logits, or those of the start and of the end of a span."""

CHOICES = {
    "norm": ("linf", "l2"),
    "scope": ("sample", "token"),
    "adversary": ("power", "predicted", "fisher", "task", "random"),
    "proximal": ("momentum", "vanilla", "none"),
    "dropout": ("shared", "independent", "off"),
    "divergence": ("auto", "squared_error", *KINDS),
    "memory": ("fast", "lean"),
}
"""What the fields that are words may be."""

FEW_EXAMPLES = {"lambda_s": 0.1, "mu": 0.0, "adversary": "predicted", "norm": "l2", "scope": "token"}
RELATIVE_RADIUS = 0.1
"""What was better than plain fine-tuning with few examples (docs/study.md), and its radius, in norms of a word."""

AT_CLEAN = ("predicted", "fisher", "task")
"""The adversaries whose gradient is taken at the clean embeddings."""


@dataclass(frozen=True)
class SmartConfig:
    r"""Hyper-parameters of SMART (Jiang et al. 2020, arXiv 1911.03437): the paper's values are the defaults.

    The objective is :math:`L(\theta) + \lambda_s R_s(\theta) + \mu D_{Breg}(\theta, \tilde\theta)` (sections 3.1, 3.2).

    Args:
        lambda_s: weight of the smoothness term R_s, >= 0, no unit; the paper takes 1, 3 or 5. With 0 none of its
            passes runs.
        epsilon: radius of the ball around the word embeddings, >= 0, in units of the embeddings, in `norm`
            (section 4.1: 1e-5).
        noise_std: standard deviation of the noise that the ascent starts from, >= 0, in units of the embeddings
            (section 4.1: 1e-5).
        step_size: length of an ascent step, > 0, in units of the embeddings: the gradient is normalised to 1 first.
            None, the default, is 100 epsilon, so that almost every step ends on the ball's surface (section 4.1:
            1e-3 at an epsilon of 1e-5). The step that is taken is :attr:`step_length`.
        ascent_steps: ascent steps of the "power" adversary, >= 1 (the paper's T_x; section 4.1: 1). The other
            adversaries take one step or none, so theirs stays 1.
        norm: the ball's norm and the gradient's, "linf" (the paper's) or "l2".
        scope: what one norm is taken over: "sample" (all positions of an example; open in the paper) or "token".
        adversary: how the perturbation is found. "power" is the paper's: a forward pass at the noise and the
            gradient of the divergence there. "predicted", "fisher" and "task" take a gradient through the clean
            pass instead, one forward cheaper: of the log-probability of the most probable class (the strongest of
            all), of a random direction drawn from the Fisher information, or of the task loss; for "linf" they step
            along its signs, so that scope has no effect. "random" is the
            noise alone, not projected: R3F (Aghajanyan et al. 2020, arXiv 2008.03156); epsilon, step_size, norm
            and scope have no effect then.
        mu: weight of the proximal term D_Breg, >= 0, no unit (section 4.1: 1; flat in [1, 10], useless at 0.1,
            harmful at 100). With 0 none of its passes runs.
        proximal: what the term holds the model close to: "momentum", an exponential moving average of the
            parameters (MBPP, section 3.2); "vanilla", the parameters when the outer step began (VBPP, section 3.2);
            "none".
        inner_steps: S of Algorithm 1, optimiser steps in an outer step, >= 1 (section 4.1: 1). The average or the
            copy of the parameters is renewed after each outer step. "vanilla" needs 2: with 1 the parameters are
            held close to themselves and the term is 0.
        decay: beta, the share that the average keeps of itself in an update, in [0, 1] (section 4.1: 0.99).
        decay_late: beta after the switch (section 4.1: 0.999).
        decay_switch: share of all updates after which beta changes, in [0, 1] (section 4.1: 0.1).
        divergence: l_s. "auto" chooses by the model's output: symmetric KL for classes, tokens and spans, squared
            error for a single number, of a sample (section 3.1) or of each token; "squared_error" or a kind of
            :func:`smart_kernels.divergence` forces one ("js" with beta 0.5), whose input is the perturbed pass and
            whose target the clean one, in D_Breg the clean pass and the teacher's; a callable
            ``(input, target, batch) -> Tensor`` gets two tensors of logits (a pair each for spans) and the batch, and
            returns a scalar, a mean over samples or tokens, that is differentiable in both.
        dropout: "shared", all passes of a step draw the same masks (two draws differ by 2e4 times what the
            adversary does at the paper's radius); "independent", each draws its own; "off", the step runs in
            evaluation mode, batch normalisation apart. "shared" and "independent" read and set the state of
            the default generators, which a CUDA graph's capture forbids: capture with "off".
        detach_clean: take the clean pass in R_s as a constant; by default gradients flow into it too (section 3.1).
        memory: how :meth:`smart_kernels.Smart.backward` orders its passes where gradients flow into the clean pass:
            "fast", both graphs at a time and one backward pass; "lean", one graph at a time, for one more forward
            pass. Without effect with ``detach_clean=True``, where it is one graph at a time in any case.
        fuse_head: whether, for a model with an output embedding (causal, masked, seq2seq), the extra passes end in
            front of it and :func:`smart_kernels.linear_divergence` takes its part, so that no logits but the model's
            own for the task loss are formed. "auto": where the head, a plain linear layer, is found to give the logits,
            up to a bias, a scale and a cap that the model applies to what it gives; where not, one line in the log
            says why. True: an error says why, and :meth:`smart_kernels.Smart.backward` keeps no logits to return.
            False: logits are compared.
        check: at the first step, see that the terms are connected (:meth:`smart_kernels.Smart.check`), for a few
            forward passes, once; training stops where one is not.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, or two do not fit together.

    Example:
        >>> from smart_kernels import SmartConfig
        >>> SmartConfig(lambda_s=3.0, adversary="predicted").epsilon
        1e-05
    """

    lambda_s: float = 1.0
    epsilon: float = 1e-5
    noise_std: float = 1e-5
    step_size: float | None = None
    ascent_steps: int = 1
    norm: str = "linf"
    scope: str = "sample"
    adversary: str = "power"
    mu: float = 1.0
    proximal: str = "momentum"
    inner_steps: int = 1
    decay: float = 0.99
    decay_late: float = 0.999
    decay_switch: float = 0.1
    divergence: str | Callable[[Any, Any, Mapping[str, Any]], Tensor] = "auto"
    dropout: str = "shared"
    detach_clean: bool = False
    memory: str = "fast"
    fuse_head: Literal["auto", True, False] = "auto"
    check: bool = True

    @classmethod
    def recommended(cls, model: nn.Module, embedding: nn.Module | str | None = None, **changes: Any) -> SmartConfig:
        """The settings that were better than plain fine-tuning for as many epochs, where examples are few.

        R_s alone, by the "predicted" adversary, with lambda_s 0.1 in l_2 balls around each word's embedding, whose
        radius is a tenth of the mean norm of these. MiniLM on TREC-6 with 50 examples, plain fine-tuning tuned and both
        at its learning rate and epochs: accuracy on the test set +1.8 points (95 % interval 0.3 to 3.3, 10 seeds), and
        +2.7 (1.4 to 4.0) with 10 further seeds; better calibrated both times, for 2.33 times the passes. Plain
        fine-tuning for as many passes gained +0.9 and +1.3 itself and was worse calibrated: ahead of that it was by
        +0.9 (-0.6 to 2.4) and +1.4 (-0.2 to 3.0), in NLL by 0.30 and 0.32 beyond chance. With 100 examples accuracy was
        level (+0.5, -0.7 to 1.7; -0.1, -1.1 to 0.8), and ECE 1.9 points below longer training's. docs/study.md has it
        all; other data and models were not tried yet. Tune learning rate and epochs for plain fine-tuning first: of few
        examples many epochs at a low rate were best.

        Args:
            model: the model as it is before training, wrapped or not.
            embedding: the module to perturb, or its name, as in :class:`~smart_kernels.Smart`; it must have a weight of
                a row per word, as :class:`torch.nn.Embedding` has. One that scales what it looks up, or is of another
                class, is called once with each word, as its output is what is perturbed.
            **changes: fields that are to be otherwise.

        Raises:
            TypeError: an argument is of the wrong type, or no field has such a name.
            ValueError: the module has no such weight, cannot be called with words, or gives zeros alone; a field is out
                of its range.

        Example:
            >>> import torch
            >>> from smart_kernels import SmartConfig
            >>> words = torch.nn.Embedding.from_pretrained(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
            >>> SmartConfig.recommended(torch.nn.Sequential(words, torch.nn.Linear(2, 3))).epsilon
            0.5
        """
        size = mean_norm(find_embedding(model, embedding))
        if not 0 < size < math.inf:
            raise ValueError(
                f"embedding: the mean norm of a word's embedding is {size:g}, expected a finite number > 0: load the "
                "model's weights first"
            )
        epsilon = RELATIVE_RADIUS * size
        return cls(**{"epsilon": epsilon, **FEW_EXAMPLES, **changes})

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("lambda_s", "epsilon", "noise_std", "mu", *(["step_size"] if self.step_size is not None else [])):
            self._check_number(name, math.inf)
        for name in ("decay", "decay_late", "decay_switch"):
            self._check_number(name, 1.0)
        if self.step_size == 0:
            raise ValueError("step_size: got 0, expected a number > 0")
        for name in ("ascent_steps", "inner_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: got {type(value).__name__}, expected int")
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "divergence" and callable(value)):
                expected = ", ".join(map(repr, choices)) + (" or a callable" if name == "divergence" else "")
                raise ValueError(f"{name}: got {value!r}, expected one of {expected}")
        if self.fuse_head != "auto" and not isinstance(self.fuse_head, bool):
            raise ValueError(f"fuse_head: got {self.fuse_head!r}, expected 'auto', True or False")
        for name in ("detach_clean", "check"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {type(getattr(self, name)).__name__}, expected bool")
        if self.ascent_steps > 1 and self.adversary != "power":
            raise ValueError(
                f"ascent_steps: got {self.ascent_steps} with adversary={self.adversary!r}, expected 1: "
                "only 'power' takes a new gradient at each step"
            )
        for nothing in self._without_effect():
            warnings.warn(nothing, stacklevel=3)

    @property
    def step_length(self) -> float:
        """The length of an ascent step, in units of the embeddings: `step_size`, or 100 `epsilon`."""
        return 100 * self.epsilon if self.step_size is None else self.step_size

    def _without_effect(self) -> Iterator[str]:
        """What is set so that a term does nothing, or less than it says."""
        if self.mu and self.proximal == "vanilla" and self.inner_steps == 1:
            yield (
                "proximal='vanilla' with inner_steps=1 holds the parameters close to themselves: the term is 0; "
                "set inner_steps to 2 or more"
            )
        if not self.lambda_s:
            return
        if not self.noise_std and (self.adversary == "random" or (self.adversary == "power" and self.epsilon)):
            yield (
                f"noise_std=0 with adversary={self.adversary!r}: without noise the passes are the same, so that the "
                "smoothness term and its gradient are 0; set noise_std, or take adversary='predicted'"
            )
        elif self.adversary != "random" and not self.epsilon:
            yield "epsilon=0: the ball is a point, and the smoothness term 0; set it, or lambda_s=0 to save its passes"
        reach = self.ascent_steps * self.step_length
        if self.adversary != "random" and reach < self.epsilon:
            yield (
                f"step_size={self.step_length:g}: {self.ascent_steps} step(s) of it cannot reach the surface of the "
                f"ball, epsilon={self.epsilon:g}; leave step_size=None, which is 100 epsilon"
            )

    def _check_number(self, name: str, top: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
        if not 0 <= value <= min(top, sys.float_info.max):
            raise ValueError(f"{name}: got {value}, expected a finite number in [0, {top:g}]")

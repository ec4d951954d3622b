"""Smart: the task loss, lambda_s times the smoothness term and mu times the proximal one, for a training loop."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels.ops.perturbation import check_mask, init_perturbation
from smart_kernels.smart.adversary import Deltas, find_perturbation
from smart_kernels.smart.check import check_connected, check_moves, check_zero, reached_rows
from smart_kernels.smart.config import AT_CLEAN, SmartConfig
from smart_kernels.smart.divergence import Classes, Divergence, choose_divergence
from smart_kernels.smart.effect import Effect, Renewal
from smart_kernels.smart.embedding import EmbeddingCall, find_embedding, warn_if_unresolved
from smart_kernels.smart.gradients import like, without_autocast
from smart_kernels.smart.head import BehindHead, find_head
from smart_kernels.smart.parallel import bare, check_supported, rank
from smart_kernels.smart.passes import CleanPass, Forward, Passes, detached, run_model
from smart_kernels.smart.positions import Layout, Positions
from smart_kernels.smart.rows import Rows
from smart_kernels.smart.state import Generators, set_states
from smart_kernels.smart.step import Options, Step
from smart_kernels.smart.structure import copied
from smart_kernels.smart.teacher import Teacher

logger = logging.getLogger(__name__)

Scale = float | Tensor | torch.amp.GradScaler
"""What a loss is multiplied by."""


@dataclass(frozen=True)
class SmartOutput:
    """What a step gives: the objective to call backward on, and its parts, detached.

    Attributes:
        loss: task_loss + lambda_s * smoothness + mu * proximal, a scalar.
        task_loss: the model's own loss, a scalar.
        smoothness: R_s at the perturbation, a scalar >= 0; 0 where lambda_s is 0.
        proximal: D_Breg, a scalar >= 0; 0 where mu is 0 or there is no teacher.
        logits: of the clean pass, detached; for spans a pair. None from :meth:`Smart.backward` with fuse_head=True.
        perturbation: what was added to the embeddings, fp32 or fp64; a tuple, where the module is called several times
            in a pass, of one for each call that the logits come from; None where lambda_s is 0.
    """

    loss: Tensor
    task_loss: Tensor
    smoothness: Tensor
    proximal: Tensor
    logits: Any
    perturbation: Tensor | tuple[Tensor, ...] | None


def attention_mask(batch: Any) -> Tensor | None:
    """The batch's "attention_mask", where it has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


class Smart:
    r"""SMART for a training loop: smoothness-inducing regularisation and Bregman proximal point optimisation.

    .. math:: L(\theta) + \lambda_s R_s(\theta) + \mu D_{Breg}(\theta, \tilde\theta),\quad
        R_s = \frac1n \sum_i \max_{\|\tilde x_i - x_i\| \le \epsilon} \ell_s(f(\tilde x_i), f(x_i)),\quad
        D_{Breg} = \frac1n \sum_i \ell_s(f(x_i; \theta), f(x_i; \tilde\theta))

    with x the output of the word embedding, as in Algorithm 1 of Jiang et al. 2020 (arXiv 1911.03437). A step costs,
    in units of a vanilla one, 1 + 5/3 for R_s ("predicted", "fisher", "task": 1 + 4/3; "random": 1 + 1), and 1/3 more
    for D_Breg.

    Args:
        model: the model to train, on its device; frozen parameters stay as they are. It may be compiled; if it has
            been trained without SMART before, call :func:`torch.compiler.reset`, as it does not see hooks that come
            later. For several processes it comes wrapped by DistributedDataParallel, or with fully_shard applied.
        config: the hyper-parameters; the paper's by default.
        num_training_steps: optimiser steps of the whole training, for the switch of the teacher's decay.
        embedding: the module whose output is perturbed, or its name; by default the word embedding (see
            :func:`~smart_kernels.smart.embedding.find_embedding`).
        forward: how the model is run: ``(model, batch) -> (task loss, logits)``, or a pair (start, end) of logits for
            spans, or None: then what the calls of the model in it gave is compared ("logits", or sentence-transformers'
            "scores" and "sentence_embedding"), but for losses, activations and metrics among its modules. By default as
            Hugging Face models are: ``model(**batch)``, with labels in the batch. It runs once a step: the extra passes
            repeat, of what it did, what the logits come from. Where this cannot be followed (a function that torch does
            not see), it runs again on a copy of the batch, and what it changed in the model, its own object and the
            variables it names is put back.
        mask: gives, for a batch, which positions are perturbed: 0 where not, shape (B, L) for embeddings (B, L, H), or
            None for all; a tuple for several calls of the module. By default the "attention_mask" that the model's call
            got, whatever its form (pairs of positions, additive, of a cache, of a speech model's samples of sound) as
            far as it is certain which positions it means. In rows packed of several samples, told by "position_ids" or
            "cu_seq_lens_q", a sample's norm is over its own positions.

    Attributes:
        config: the hyper-parameters.
        teacher: the momentum teacher, or the copy of the parameters with ``proximal="vanilla"``; None where mu is 0.
        generator: what noise is drawn from, seeded from torch's seed and the process's rank (processes that work on
            the same samples, as with tensor parallelism, are to be given the same seed); the default generators end
            each step where an ordinary one would leave them.
        skipped: how many ascent steps of this process's samples were left out, as the gradient was not finite: with
            one step, how many samples kept their noise as perturbation. int64 scalar on the model's device.

    Raises:
        TypeError: an argument is of the wrong type, or the model wrapped by DataParallel or FullyShardedDataParallel.
        ValueError: the embedding is not found, a parameter has no values yet (on the meta device), or the decay's
            switch needs the number of training steps. In a step: parameters were exchanged, resized or unfrozen after
            this object was made, or a mask does not fit.
        RuntimeError: in the first step: a term is not connected to what is trained (see :meth:`check`).

    Example:
        >>> import torch
        >>> from smart_kernels import Smart, SmartConfig
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> def forward(model, batch):
        ...     logits = model(batch["words"])
        ...     return torch.nn.functional.cross_entropy(logits, batch["labels"]), logits
        >>> smart = Smart(model, SmartConfig(lambda_s=1.0, mu=1.0), num_training_steps=100, forward=forward)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> out = smart({"words": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([0, 2])})
        >>> out.loss.backward()
        >>> optimizer.step()
        >>> smart.update()
        >>> bool(out.perturbation.abs().max() <= 1e-5)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        config: SmartConfig | None = None,
        num_training_steps: int | None = None,
        *,
        embedding: nn.Module | str | None = None,
        forward: Forward = run_model,
        mask: Callable[[Any], Tensor | None] = attention_mask,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected torch.nn.Module")
        check_supported(model)
        own = ((n, p) for n, p in model.named_parameters() if type(p) is nn.Parameter)  # not what stands for others
        if empty := next((n for n, p in own if p.device.type == "meta"), None):
            raise ValueError(
                f"model: {empty} is on the meta device, expected values: load the weights before Smart is made"
            )
        config = SmartConfig() if config is None else config
        if not isinstance(config, SmartConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected SmartConfig")
        for name, function in (("forward", forward), ("mask", mask)):
            if not callable(function):
                raise TypeError(f"{name}: got {type(function).__name__}, expected a callable")
        self.config = config
        self._switch = _decay_switch(config, num_training_steps)
        module = find_embedding(model, embedding) if config.lambda_s else None
        self.teacher = Teacher(model) if config.mu and config.proximal != "none" else None
        self._alone = module is None and self.teacher is None
        head = find_head(model) if config.fuse_head and not self._alone else None
        if config.fuse_head is True and head is None and not self._alone:
            raise ValueError(_UNFUSED.format("the model has no, or more than one, get_output_embeddings()"))
        options = config.dropout, self._alone, self.teacher is not None, head, config.check
        self._passes = Passes(model, forward, module, *options)
        self._rows = Rows(bare(model))
        self._layout = Layout(model, None if mask is attention_mask else mask)
        # what a sample is matters to norms alone
        signs = config.adversary in AT_CLEAN and config.norm == "linf"
        self._scope = "token" if signs or config.adversary == "random" else config.scope
        self._updates = 0
        self._checked = False
        self._warned = False
        self._told = False  # of a radius that a dtype does not resolve
        self._told_unfused = False
        self.steps = 0
        device = next((p.device for m in (module, model) if m is not None for p in m.parameters()), torch.device("cpu"))
        # Something added to the seed, lest the noise repeat what initialised the weights, or another process's.
        self.generator = torch.Generator(device).manual_seed((torch.initial_seed() + 0x9E3779B9 * (1 + rank())) % 2**63)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._effect = Effect(config, num_training_steps, device)
        self._renewal = None if self.teacher is None else Renewal(model)

    def __call__(
        self,
        batch: Any,
        *,
        initial_perturbation: Tensor | Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        num_items: float | Tensor | None = None,
    ) -> SmartOutput:
        """The objective for a batch, with a loss to call backward on: the graphs of clean and perturbed pass.

        Args:
            batch: what `forward` takes; by default the mapping of the model's own arguments, with labels.
            initial_perturbation: the noise that the ascent starts from, of the embeddings' shape, floating point,
                instead of one drawn; of several calls of the module, one for each.
            generator: what to draw from, on the embeddings' device, instead of `generator` of this object.
            num_items: what the smoothness and the proximal term's sums are divided by, > 0, a number or a 0-dim
                tensor: samples, or, where each token is classified, tokens that have a label. By default this
                batch's own count, which makes means of them. With the count of all batches that are accumulated
                into one gradient, their sum is the mean over all (with several processes, whose gradients are
                averaged: the count of all processes over the number of processes). The task loss is the
                model's: what it divides by is told to it in the batch, as "num_items_in_batch" is to Hugging Face's.

        Raises:
            TypeError: `initial_perturbation` is no floating-point tensor, `num_items` no number or scalar tensor.
            ValueError: `num_items` is not positive; `initial_perturbation` or the mask does not fit the embeddings; or
                the model's output is not what the divergence can be chosen by.
            RuntimeError: the module to perturb was not called in the forward pass.
        """
        return self._step(batch, Options(initial_perturbation, generator, num_items), ahead=False)

    def backward(
        self,
        batch: Any,
        scale: Scale = 1.0,
        *,
        initial_perturbation: Tensor | Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        num_items: float | Tensor | None = None,
    ) -> SmartOutput:
        """All passes of a step, forward and backward, each graph freed as soon as it can be.

        The gradients are those of ``(scale * smart(batch).loss).backward()``, to rounding, and so is all else. The
        passes and their order are those of :func:`~smart_kernels.smart.plan.make_plan`. With ``detach_clean=True`` or
        ``memory="lean"`` there is never more than one graph at a time, beside the gradients of the one before; no
        parameter's gradient changes before the last backward pass, which is the only one that a reducer, a hook of a
        parameter or an optimiser in the backward pass sees.

        Args:
            batch: as in a call.
            scale: what the gradients are multiplied by, > 0: ``scaler.get_scale()`` of a
                :class:`torch.amp.GradScaler`, one over the number of batches that make one gradient, or both. A
                number, or a 0-dim tensor on the device, which is not waited for. Or the scaler itself: its scale, which
                is not waited for either, and which begins here where it has not begun.
            initial_perturbation: as in a call.
            generator: as in a call.
            num_items: as in a call.

        Returns:
            As of a call, with a loss that is detached and not scaled. With ``fuse_head=True`` without logits, which are
            freed before the graphs are gone back through.

        Raises:
            TypeError: `scale` is no number, scalar tensor or gradient scaler; and as in a call.
            ValueError: `scale` is not positive; and as in a call.
            RuntimeError: nothing has a graph, as in ``torch.no_grad()``; a part of the model is checkpointed with
                ``use_reentrant=True`` while there are two backward passes; and as in a call.

        Example:
            >>> import torch
            >>> from smart_kernels import Smart, SmartConfig
            >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))
            >>> def forward(model, batch):
            ...     logits = model(batch["words"])
            ...     return torch.nn.functional.cross_entropy(logits, batch["labels"]), logits
            >>> config = SmartConfig(adversary="predicted", detach_clean=True, mu=0.0)
            >>> smart = Smart(model, config, forward=forward)
            >>> out = smart.backward({"words": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([0, 2])})
            >>> out.loss.requires_grad, model[2].weight.grad.shape
            (False, torch.Size([3, 12]))
        """
        scale = self._check_scale(scale)
        if not torch.is_grad_enabled():
            raise RuntimeError("backward: got called within torch.no_grad(), expected gradients to be enabled")
        options = Options(initial_perturbation, generator, num_items)
        frees_logits = self.config.fuse_head is True
        out = self._step(batch, options, ahead=True, scale=scale, known=True, frees_logits=frees_logits)
        with without_autocast():
            out.loss.backward(like(out.loss, scale))
        return dataclasses.replace(out, loss=out.loss.detach())

    def ahead(self, batch: Any, scale: Scale = 1.0, **options: Any) -> SmartOutput:
        """As a call, with all backward passes made but the last: for those who call backward on the loss themselves.

        What :meth:`backward` does but for its end. The loss has one graph and the gradients of the passes before; it
        may be multiplied, divided and added to, and be called backward on once.

        Args:
            batch: as in a call.
            scale: what the loss is going to be multiplied by, about, as in :meth:`backward`: so small gradients of an
                fp16 model do not vanish in the backward passes that are made here.
            options: further arguments of a call.
        """
        return self._step(batch, Options(**options), ahead=True, scale=self._check_scale(scale))

    def _step(self, batch: Any, options: Options, ahead: bool, **how: Any) -> SmartOutput:
        self._check_model()
        if self._renewal is not None:
            self._renewal.look()
        with self._passes.step():
            step = Step(self, batch, options, ahead, **how).run()
        self.steps += 1
        perturbation = _public(detached(step.deltas)) if step.deltas else None
        terms = step.task_loss, step.smoothness, step.proximal
        self._effect.add(step.smoothness, step.task_loss)
        return SmartOutput(step.whole, *terms, _public(step.logits), perturbation)

    def check(self, batch: Any) -> dict[str, float]:
        """See that the terms are connected: what the first step of a training does, unless ``config.check`` is off.

        The logits that are compared must carry a graph for the weights. With no perturbation and with the student's
        own weights in the teacher's place every term must be 0: on a CPU to the bit, on other devices as near as two
        repetitions of the clean pass are; not so with ``dropout="independent"``. With the perturbation, R_s must not
        be 0. The batch, generators, buffers and gradients are as they were afterwards.

        Args:
            batch: as in a step.

        Returns:
            The terms: "smoothness_without_perturbation", "proximal_to_itself", "smoothness"; those that are on.

        Raises:
            RuntimeError: a term is not what it must be; it is said which, by how much, and what may be the cause.
        """
        batch, _ = copied(batch)
        passes, config = self._passes, self.config
        self._check_model()
        generators = Generators(passes.model)
        states = [*generators.states(), (self.generator.set_state, self.generator.get_state())]
        skipped = self.skipped.clone()
        try:
            with passes.step(untouched=True), torch.enable_grad():
                clean = passes.clean(batch, differentiable=config.adversary in AT_CLEAN)
                check_connected(clean.loss.requires_grad, clean.logits)
                clean, divergence = self._compare(clean, None)
                report = check_zero(passes, clean, divergence, config, self.teacher)
                if clean.embeddings:
                    deltas = self._find(clean, divergence, checking=True)
                    perturbed = detached(self._passes.perturbed(clean, deltas))
                    smoothness = divergence(perturbed, detached(clean.logits))
                    check_moves(clean, divergence, smoothness, deltas, self._compute_dtype, self._told)
                    report["smoothness"] = float(smoothness)
        finally:
            set_states(states)
            self.skipped.copy_(skipped)
        return report

    def __getstate__(self) -> Any:
        """Refuse to be copied or pickled: what is recorded of a model is of this one."""
        raise TypeError(
            "Smart: got copied or pickled, which it cannot be; make another for the model's copy, and hand its "
            "state over by state_dict() and load_state_dict(), or save_smart() and load_smart()"
        )

    def trial(self) -> AbstractContextManager[None]:
        """Around runs of the user's function in evaluation mode whose traces are put back when it ends."""
        return self._passes.trial()

    def _check_scale(self, scale: Scale) -> float | Tensor:
        if isinstance(scale, torch.amp.GradScaler):
            return scale.scale(torch.ones((), device=self.skipped.device))
        if isinstance(scale, Tensor):
            if scale.dim() or not scale.is_floating_point():
                got = f"{scale.dtype} of shape {tuple(scale.shape)}"
                raise TypeError(f"scale: got {got}, expected a floating-point tensor of no dimensions, or a number")
            return scale.detach()
        if not isinstance(scale, int | float) or isinstance(scale, bool):
            raise TypeError(f"scale: got {type(scale).__name__}, expected a number, a tensor or a GradScaler")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: got {scale}, expected a finite number > 0")
        return scale

    @property
    def _checking(self) -> bool:
        return not self._checked and self.config.check and not self._alone

    @property
    def alone(self) -> bool:
        """Whether a step is an ordinary one, as no term is on."""
        return self._alone

    def asks_for_logits(self, asks: bool) -> None:
        """Say whether the user's function computes logits on our behalf, in a further pass that is not the user's."""
        self._passes.asks_for_logits = asks

    @property
    def repeats(self) -> bool:
        """Whether the user's function runs for an extra pass: what it logs then is to be dropped."""
        return self._passes.repeats

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.float32 if self._passes.hook is None else self._passes.hook.compute_dtype

    def _compare(self, clean: CleanPass, num_items: float | Tensor | None) -> tuple[CleanPass, Divergence]:
        """The clean pass with what is compared, logits or hidden states in front of the head, and the divergence."""
        num_items = _check_num_items(num_items, clean.logits[0])
        model = bare(self._passes.model)
        chosen = self.config.divergence, clean.logits, clean.batch, model, num_items, clean.called, clean.named
        asks = self.config.check and not self._passes.sharded  # whose hooks would take it for the backward pass
        divergence = choose_divergence(*chosen, self._rows, lambda: reached_rows(clean) if asks else None)
        head = self._passes.head
        if head is None:
            return clean, divergence
        fused: CleanPass | str = "the divergence is none of classes"
        seen, head.calls = head.calls, []
        if type(divergence) is Classes:
            fused = self._passes.fuse(clean, seen)
            if isinstance(fused, CleanPass):
                return fused, BehindHead(head, divergence, self.config.detach_clean)
        if self.config.fuse_head is True:
            raise ValueError(_UNFUSED.format(fused))
        if not self._told_unfused and not rank():
            self._told_unfused = True
            logger.warning("fuse_head='auto': the passes of SMART store logits, as %s", fused)
        return clean, divergence

    def _find(
        self,
        clean: CleanPass,
        divergence: Divergence,
        checking: bool,
        initial: Tensor | Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        direction: Sequence[Tensor | None] | None = None,
    ) -> Deltas:
        """The perturbations."""
        generator = self.generator if generator is None else generator
        positions = [
            self._layout.find(i, call, clean.batch, arguments, clean.logits[0].shape, self._scope)
            for i, (call, arguments) in enumerate(zip(clean.embeddings, clean.arguments, strict=True))
        ]
        noise = self._noise(clean.embeddings, positions, generator, initial)
        find = self.config, self._passes, clean, divergence, noise, positions, generator, self.skipped
        return find_perturbation(*find, checking, direction)

    def _check_model(self) -> None:
        """The model must be the one that SMART was made for."""
        changed = self._passes.changed_parameters()
        if changed:
            raise ValueError(
                f"model: changed after Smart was made, at {', '.join(changed[:3])}: a vocabulary resized, a parameter "
                "unfrozen or a part exchanged; make Smart afterwards"
            )
        if self.teacher is not None and self.teacher.swapped:
            raise RuntimeError(
                "model: has the teacher's weights, in `teacher.weights()`; expected the student's in a step"
            )

    def update(self, decay: float | Tensor | None = None) -> None:
        """Count an optimiser step and, at the end of an outer step, renew the teacher: call once after each.

        Also after one that a :class:`torch.amp.GradScaler` has skipped: the parameters are as they were, so that what
        was not finite does not come into the teacher.

        Args:
            decay: beta of this update instead of the schedule's, a float in [0, 1] or a scalar tensor on the
                device, which a replayed CUDA graph reads anew. Without effect for ``proximal="vanilla"``.
        """
        outer, inner = divmod(self._updates + 1, self.config.inner_steps)
        if self.teacher is not None and not inner:
            if self.config.proximal == "vanilla":
                decay = 0.0
            elif decay is None:
                decay = self.config.decay if outer <= self._switch else self.config.decay_late
            self.teacher.update(decay)
        self._updates += 1
        self._effect.count_update()
        if self._renewal is not None:
            self._renewal.renewed()

    def end_epoch(self) -> None:
        """Say, by one warning after the first epoch, if the smoothness term does nothing, and which radius would do.

        That is where lambda_s * R_s is below 1e-4 of the task loss on average. After a third of `num_training_steps`
        it is said without this call.
        """
        self._effect.tell()

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted training needs to go on: the teacher, the count of updates, the generator's state."""
        return {
            "updates": self._updates,
            "generator": self.generator.get_state(),
            "skipped": self.skipped.clone(),
            "teacher": {} if self.teacher is None else self.teacher.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: it does not fit; nothing was changed then.
        """
        check_names(state.keys(), {"updates", "generator", "skipped", "teacher"})
        updates, skipped, teacher = (state[name] for name in ("updates", "skipped", "teacher"))
        if not isinstance(updates, int) or isinstance(updates, bool) or updates < 0:
            raise ValueError(f"state: updates: got {updates!r}, expected an int >= 0")
        check_tensor("skipped", skipped, torch.int64, ())
        if skipped < 0:
            raise ValueError(f"state: skipped: got {int(skipped)}, expected >= 0")
        check_tensor("generator", state["generator"], torch.uint8, tuple(self.generator.get_state().shape))
        generator = state["generator"].clone()  # a view would be read from where its memory begins
        try:
            torch.Generator(self.generator.device).set_state(generator)
        except (RuntimeError, TypeError) as error:
            message = f"state: generator: got a state that is not one on {self.generator.device.type}: {error}"
            raise ValueError(message) from None
        if not isinstance(teacher, Mapping):
            raise ValueError(f"state: teacher: got {type(teacher).__name__}, expected a mapping of names to tensors")
        if self.teacher is None and teacher:
            raise ValueError(
                f"state: has a teacher, expected none: mu is {self.config.mu:g}, proximal {self.config.proximal!r}"
            )
        if self.teacher is not None:
            self.teacher.load_state_dict(teacher)
        self._updates = updates
        self.generator.set_state(generator)
        self.skipped.copy_(skipped)

    def _noise(
        self,
        calls: Sequence[EmbeddingCall],
        positions: Sequence[Positions],
        generator: torch.Generator,
        initial: Tensor | Sequence[Tensor] | None,
    ) -> Deltas:
        config, hook = self.config, self._passes.hook
        if not self._warned:
            self._warned = True
            assert hook is not None
            if len(calls) > 1:
                warnings.warn(
                    f"embedding: the {type(hook.module).__name__} to perturb is called {len(calls)} times in a pass; "
                    "each call has a perturbation of its own, so that `perturbation` is a tuple",
                    stacklevel=9,  # the caller of a step
                )
            for call in calls if config.adversary != "random" else ():  # which knows no radius
                self._told |= warn_if_unresolved(call.output, config.epsilon, config.adversary, hook.compute_dtype)
        if initial is None:
            return tuple(
                p.own(init_perturbation(p.ordered(c.output.detach()), config.noise_std, p.mask, generator))
                for c, p in zip(calls, positions, strict=True)
            )
        given = initial if len(calls) > 1 and isinstance(initial, tuple | list) else (initial,)
        if len(given) != len(calls):
            raise ValueError(
                f"initial_perturbation: got {len(given)}, expected {len(calls)} tensors, one for each call"
            )
        return tuple(_initial(x, c.output, p) for x, c, p in zip(given, calls, positions, strict=True))


_UNFUSED = "fuse_head: got True, but {}; expected 'auto' or False, or a model whose logits come from a linear head"


def _initial(initial: Any, embeds: Tensor, positions: Positions) -> Tensor:
    if not isinstance(initial, Tensor) or not initial.is_floating_point():
        got = initial.dtype if isinstance(initial, Tensor) else type(initial).__name__
        raise TypeError(f"initial_perturbation: got {got}, expected a floating-point tensor")
    if initial.shape != embeds.shape or initial.device != embeds.device:
        raise ValueError(
            f"initial_perturbation: got shape {tuple(initial.shape)} on {initial.device}, expected that of the "
            f"embeddings, {tuple(embeds.shape)} on {embeds.device}"
        )
    noise: Tensor = initial.detach().to(torch.promote_types(embeds.dtype, torch.float32))
    if positions.mask is None:
        return noise.clone()
    ordered = positions.ordered(noise)
    kept: Tensor = check_mask(positions.mask, ordered, "the embeddings").unsqueeze(-1) != 0
    return positions.own(torch.where(kept, ordered, 0))


def check_names(got: Set[str], expected: Set[str]) -> None:
    """Raise ValueError where a state has not these names."""
    if missing := expected - got:
        raise ValueError(f"state: has no {', '.join(sorted(missing))}")
    if unknown := got - expected:
        raise ValueError(f"state: has {', '.join(sorted(unknown))}, expected {', '.join(sorted(expected))} alone")


def check_tensor(name: str, got: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a state's entry is no tensor of this dtype and shape."""
    if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != shape:
        found = f"{got.dtype} of shape {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"state: {name}: got {found}, expected {dtype} of shape {shape}")


def _decay_switch(config: SmartConfig, num_training_steps: int | None) -> float:
    """How many updates of the teacher take the early decay."""
    if num_training_steps is not None:
        if not isinstance(num_training_steps, int) or isinstance(num_training_steps, bool) or num_training_steps < 1:
            raise ValueError(f"num_training_steps: got {num_training_steps!r}, expected an int >= 1 or None")
        return round(config.decay_switch * (num_training_steps // config.inner_steps))
    if (
        config.mu
        and config.proximal == "momentum"
        and config.decay != config.decay_late
        and 0 < config.decay_switch < 1
    ):
        raise ValueError(
            f"num_training_steps: got None, expected an int: the teacher's decay goes from {config.decay} to "
            f"{config.decay_late} after {config.decay_switch:g} of the steps (for one decay, set decay_late to decay)"
        )
    return math.inf if config.decay_switch else 0


def _check_num_items(num_items: float | Tensor | None, logits: Tensor) -> float | Tensor | None:
    """A tensor comes back in the dtype of the terms, lest a count in int64 or fp64 widen them."""
    if isinstance(num_items, Tensor):
        if num_items.dim() or num_items.is_complex() or num_items.dtype == torch.bool:
            got = f"{num_items.dtype} of shape {tuple(num_items.shape)}"
            raise TypeError(f"num_items: got {got}, expected a real tensor of no dimensions")
        return num_items.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    if num_items is not None:
        if not isinstance(num_items, int | float) or isinstance(num_items, bool):
            raise TypeError(f"num_items: got {type(num_items).__name__}, expected a number, a tensor or None")
        if not 0 < num_items < math.inf:
            raise ValueError(f"num_items: got {num_items}, expected a finite number > 0")
    return num_items


def _public(x: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...] | None:
    return (x[0] if len(x) == 1 else x) if x else None

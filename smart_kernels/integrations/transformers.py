"""SMART in Hugging Face's Trainer: one import and one class name changed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import os
import re
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from smart_kernels.smart.checkpoint import load_smart, save_smart
from smart_kernels.smart.config import CHOICES, SmartConfig
from smart_kernels.smart.objective import Smart, SmartOutput, attention_mask
from smart_kernels.smart.passes import Forward, model_logits, output_logits
from smart_kernels.smart.rows import IGNORED
from smart_kernels.smart.structure import copied

SMART_NAME = "smart.safetensors"
"""The file in a checkpoint that holds the state of SMART."""

_PREFIX = "smart_"
_NUM_ITEMS = "num_items_in_batch"
_WEIGHTS = ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*")
"""One of these files or folders is there, whatever the model: whole, in shards, of FSDP, of adapters."""

logger = logging.getLogger(__name__)


def _arguments() -> list[tuple[str, Any, Any]]:
    """SmartConfig's fields as fields of command-line arguments: types, defaults, choices, and its docstring as help."""
    described = dict(re.findall(r"^ {8}(\w+): ((?:.+\n)(?: {12}.+\n)*)", SmartConfig.__doc__ or "", re.MULTILINE))
    hints = typing.get_type_hints(SmartConfig)
    arguments = []
    for source in dataclasses.fields(SmartConfig):
        metadata: dict[str, Any] = {"help": " ".join(described.get(source.name, "").split()).replace("%", "%%")}
        if source.name in CHOICES:
            metadata["choices"] = CHOICES[source.name]
        kind = str if source.name in CHOICES else hints[source.name]  # a callable has no place on a command line
        arguments.append((_PREFIX + source.name, kind, field(default=source.default, metadata=metadata)))
    return arguments


def _like(f: Any) -> Any:
    """A field with the default and the description of another."""
    default = {"default": f.default} if f.default is not dataclasses.MISSING else {"default_factory": f.default_factory}
    return field(**default, init=f.init, repr=f.repr, metadata=f.metadata)


_SmartArguments: Any = dataclasses.make_dataclass("_SmartArguments", _arguments())


@dataclass
class SmartTrainingArguments(_SmartArguments, TrainingArguments):  # type: ignore[misc]
    """Trainer's arguments and, with `smart_` in front of its name, each field of :class:`~smart_kernels.SmartConfig`.

    Args:
        smart_embedding: name of the module whose output is perturbed; by default what the model's
            ``get_input_embeddings()`` gives: the word embedding, or in a model for images the projection of the
            patches, to which positions are added later ("vit.embeddings" is the module whose output has them).
        smart_mask: name of the input that is 0 at the positions that are not perturbed, of shape (B, L) for embeddings
            (B, L, H); "none" to perturb all. By default the "attention_mask", as far as it fits.

    Example:
        >>> from smart_kernels.integrations.transformers import SmartTrainingArguments
        >>> args = SmartTrainingArguments("out", smart_lambda_s=3.0, smart_adversary="predicted")
        >>> args.smart_config().lambda_s
        3.0
    """

    smart_embedding: str | None = field(
        default=None,
        metadata={"help": "name of the module whose output is perturbed; by default the word embedding"},
    )
    smart_mask: str | None = field(
        default=None,
        metadata={"help": "name of the input that is 0 at positions not to be perturbed; 'none' to perturb all"},
    )

    def __init_subclass__(cls, **options: Any) -> None:
        """Beside arguments of another trainer, its defaults are kept: they come behind Trainer's own otherwise."""
        super().__init_subclass__(**options)
        annotations = inspect.get_annotations(cls)
        common = {f.name: f for f in dataclasses.fields(TrainingArguments)}
        for other in reversed(cls.__mro__[1:]):
            if not dataclasses.is_dataclass(other) or issubclass(SmartTrainingArguments, other):
                continue
            if issubclass(other, SmartTrainingArguments):
                continue
            for f in dataclasses.fields(other):
                if f.name in cls.__dict__ or common.get(f.name) is f:
                    continue
                annotations.setdefault(f.name, f.type)
                if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING:
                    setattr(cls, f.name, _like(f))
        cls.__annotations__ = annotations

    def smart_config(self) -> SmartConfig:
        """The hyper-parameters of SMART.

        Raises:
            TypeError: one is of the wrong type.
            ValueError: one is out of its range, or two do not fit together.
        """
        return SmartConfig(**{f.name: getattr(self, _PREFIX + f.name) for f in dataclasses.fields(SmartConfig)})


class SmartTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the SMART objective (Jiang et al. 2020, arXiv 1911.03437); evaluation is Trainer's own.

    It serves every task whose model gives a loss and logits. The task loss is what Trainer computes, with label
    smoothing or `compute_loss_func`. The smoothness and the proximal term are means over the same samples or tokens:
    those of all micro-batches and processes of an optimiser step. Some models ignore `num_items_in_batch`, so that
    their loss is the mean over one micro-batch. Trainer adds these means up; here they make the mean over all items,
    unless both `lambda_s` and `mu` are 0. Where Trainer does not count items (the ends of a span, a model whose forward
    takes no `**kwargs`), it takes the mean of the micro-batches' means, however many items each has, and so do all
    three terms.

    A step has the passes of :meth:`~smart_kernels.Smart.backward`: with `smart_detach_clean` or ``smart_memory="lean"``
    there is one graph at a time, and the loss that Trainer calls backward on has that of the last pass.

    The log gets task_loss, smoothness, proximal, smoothness_share (lambda_s * smoothness over task_loss) and
    perturbation_linf (or _l2: the largest norm of a sample's perturbation, in units of the embeddings), each a mean
    since the last entry, and skipped_samples, how many samples so far had no finite gradient. Where the share is below
    1e-4, one warning after the first epoch names a radius that does something. Checkpoints get "smart.safetensors". A
    checkpoint that is not complete, because the process was killed, is passed over by
    ``train(resume_from_checkpoint=True)``, and is an error if it is named.

    Beside another trainer, inherit from both, this class first: ``class T(SmartTrainer, SFTTrainer)``, with arguments
    of a dataclass that inherits from SmartTrainingArguments and SFTConfig; likewise for Seq2SeqTrainer, TRL's
    RewardTrainer and sentence-transformers' trainers. Where that trainer returns no logits, the outputs of its calls of
    the model are compared. Where it computes logits for its metrics alone, without a graph, they are computed again
    with one. For embeddings of sentences, `smart_divergence` has to be "squared_error", or `divergence` a callable.

    Args:
        model: as in Trainer.
        args: the arguments, a SmartTrainingArguments.
        others: Trainer's other arguments, by position.
        divergence: a callable instead of `args.smart_divergence`, as in :class:`~smart_kernels.SmartConfig`.
        mask: which positions are perturbed, as in :class:`~smart_kernels.Smart`; by default `args.smart_mask`.
        forward: how the model is run in training, as in :class:`~smart_kernels.Smart`: (model, inputs) -> (task loss,
            logits), instead of Trainer's own `compute_loss`. The loss is a mean over the batch.
        kwargs: Trainer's other arguments, by name.

    Attributes:
        smart: the :class:`~smart_kernels.Smart` of the last training; None before. To save the teacher as a model:
            ``with trainer.smart.teacher.weights(): trainer.save_model(folder)``.

    Raises:
        TypeError: `args` is of another class.
        ValueError: a hyper-parameter is out of its range.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: SmartTrainingArguments | None = None,
        *others: Any,
        divergence: Callable[..., Tensor] | None = None,
        mask: Callable[[Any], Any] | None = None,
        forward: Forward | None = None,
        **kwargs: Any,
    ) -> None:
        args = SmartTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, SmartTrainingArguments):
            raise TypeError(f"args: got {type(args).__name__}, expected SmartTrainingArguments")
        args.smart_config()
        self.smart: Smart | None = None
        self._divergence = divergence
        self._mask = mask or _named_mask(args.smart_mask)
        self._own_forward = forward
        self._checkpoint: str | None = None  # that the training goes on from
        self._kinds: dict[Any, tuple[bool, bool]] = {}  # of batches, see _ignored
        self._returns_outputs = False
        self._outputs: Any = None
        super().__init__(model, args, *others, **kwargs)
        self.add_callback(_Steps(self))

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer does.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last complete one in `output_dir`.
            args: as in Trainer.
            kwargs: as in Trainer.

        Raises:
            ValueError: the checkpoint is not complete, or there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and (lacking := what_lacks(resume_from_checkpoint)):
            raise ValueError(f"resume_from_checkpoint: {resume_from_checkpoint} is not complete: {lacking}")
        self._checkpoint = resume_from_checkpoint or None
        try:
            return super().train(self._checkpoint, *args, **kwargs)
        finally:
            self._checkpoint = None

    def begin(self) -> None:
        """Set SMART up for the model as it stands when training begins, or as the checkpoint has it."""
        args = self.args
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if args.n_gpu > 1 or self.is_deepspeed_enabled or (parallel and parallel.non_data_parallel_size > 1):
            raise ValueError(
                "args: got DataParallel, DeepSpeed or tensor, context or sequence parallelism, expected one device, "
                "DDP or FSDP2; for several GPUs start with torchrun"
            )
        config = args.smart_config()
        if config.lambda_s and config.adversary != "random" and _reentrant(args):
            raise ValueError(
                "args: got activation checkpointing with use_reentrant=True, through which an adversary has no "
                "gradient, expected use_reentrant=False, smart_adversary='random' or smart_lambda_s=0"
            )
        if self._divergence is not None:
            config = dataclasses.replace(config, divergence=self._divergence)
        steps = max(1, self.state.max_steps)  # a training of no epochs begins, too
        options: Any = {"embedding": args.smart_embedding, "forward": self._forward, "mask": self._mask}
        self.smart = Smart(self.model_wrapped, config, steps, **options)
        if self._checkpoint is not None:
            load_smart(self.smart, Path(self._checkpoint, SMART_NAME))
        self._kinds = {}
        self._steps_seen = 0
        self._sums = torch.zeros(4, device=self.smart.skipped.device)
        self._steps = 0

    def before_step(self) -> None:
        """See that the gradients of this optimiser step are those of SMART's objective."""
        assert self.smart is not None
        if self.smart.steps == self._steps_seen:
            raise RuntimeError(
                "compute_loss: no loss of this step came from SMART, as an overridden compute_loss or training_step "
                "does not call SmartTrainer's. Override neither: give `compute_loss_func` or `forward`, or put the "
                "class with the override behind: `class T(SmartTrainer, YourTrainer)`"
            )
        self._steps_seen = self.smart.steps

    def end_step(self) -> None:
        """Move the teacher, if the optimiser has made its step."""
        assert self.smart is not None
        self._steps += 1
        if not self.accelerator.optimizer_step_was_skipped:
            self.smart.update()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The SMART objective in training, Trainer's loss in evaluation; arguments and result are those of Trainer."""
        if self.smart is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        config, batches = self.smart.config, self.current_gradient_accumulation_steps
        divides = self._trainer_divides(num_items_in_batch)
        weight: float | Tensor = 1.0  # of this batch in its step
        share = None
        if (config.lambda_s or config.mu) and not divides:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            if num_items_in_batch is None:
                weight = 1 / batches
            else:
                ignored, by_samples = self._ignored(model, inputs, num_items_in_batch)
                if ignored:
                    weight = self._counted(inputs) * processes / num_items_in_batch
                    num_items_in_batch = None
                else:
                    share = num_items_in_batch / processes
                    if by_samples:  # while Trainer counts the elements of the labels
                        share = share * len(inputs["labels"]) / self._counted(inputs)
        self._outputs = None
        self._returns_outputs = return_outputs
        self.smart.asks_for_logits(not return_outputs and self._own_forward is None)
        batch = {**inputs, _NUM_ITEMS: num_items_in_batch}
        if _reentrant(self.args):  # which has no gradients but those of the only backward pass
            out = self.smart(batch, num_items=share)
        else:
            out = self.smart.ahead(batch, self.accelerator.scaler or 1.0, num_items=share)
        outputs, self._outputs = self._outputs, None
        self._record(out, weight / batches if divides else weight)
        loss = weight * out.loss
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """A pass of the model, with the loss of the trainer behind this one."""
        inputs = dict(batch)
        num_items = inputs.pop(_NUM_ITEMS)
        if self._own_forward is not None:
            loss, logits = self._own_forward(model, inputs)
            outputs: Any = {"loss": loss, "logits": logits}
        else:
            with warnings.catch_warnings():
                # what is deprecated is to ask for outputs, which is how logits are found
                warnings.filterwarnings("ignore", ".*return_outputs=True", FutureWarning)
                asks = self._returns_outputs or self.smart is None or not self.smart.alone
                loss = super().compute_loss(model, inputs, asks, num_items)
                loss, outputs = loss if asks else (loss, None)
            if isinstance(outputs, tuple):
                with_loss = "labels" in inputs or "labels" not in batch  # else Trainer has kept the labels to itself
                logits = model_logits(outputs if with_loss else (loss, *outputs), "start_positions" in batch)
            else:
                logits = output_logits(outputs)
        if self._returns_outputs and (self.smart is None or not self.smart.repeats):
            self._outputs = outputs  # else they would keep a graph that the step is to free
        return loss, logits

    def _trainer_divides(self, num_items: Tensor | int | None) -> bool:
        """Whether Trainer divides the loss by the number of batches in a step."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            return self.compute_loss_func is None and not (self.model_accepts_loss_kwargs and num_items is not None)
        return not scaled

    def _counted(self, inputs: dict[str, Any]) -> Tensor:
        """How many items of the step this batch has, as Trainer counts them."""
        labels = inputs["labels"]
        shifted = getattr(self, "_loss_shifts_labels", False)
        return (labels[..., 1:] if shifted else labels).ne(IGNORED).sum()  # type: ignore[no-any-return]

    def _ignored(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int) -> tuple[bool, bool]:
        """Whether the task loss is the same for any number of items, and whether the terms are means over samples.

        Found once for each kind of batch, by trying two numbers: what is a mean over samples and what over tokens is
        seen there, too, in the shape of the logits.
        """
        kind = tuple((name, x.dim(), x.dtype) for name, x in sorted(inputs.items()) if isinstance(x, Tensor))
        if kind not in self._kinds:
            assert self.smart is not None
            with self.smart.trial(), torch.no_grad():
                once, logits = self._forward(model, {**copied(inputs)[0], _NUM_ITEMS: num_items})
                twice, _ = self._forward(model, {**copied(inputs)[0], _NUM_ITEMS: 2 * num_items})
            tokens = isinstance(logits, Tensor) and logits.dim() > 2
            numbers = self.smart.config.divergence == "squared_error"
            by_samples = not tokens or (numbers and logits.size(-1) > 1)
            telling = once.isfinite() & (once != 0)  # not so where nothing in this batch has a label
            votes = self.accelerator.reduce(torch.stack([telling & (once != twice), telling & (once == twice)]).long())
            if not votes.any():
                return False, by_samples
            self._kinds[kind] = not votes[0], by_samples
        return self._kinds[kind]

    # ------------------------------------------------------------------------------------------------ logging

    def _record(self, out: SmartOutput, weight: float | Tensor) -> None:
        """Add a batch's terms to those of the steps since the last log, on the device: nothing waits for it."""
        assert self.smart is not None
        terms = weight * torch.stack([out.task_loss, out.smoothness, out.proximal])
        size = terms.new_zeros(1)
        if out.perturbation is not None:
            config = self.smart.config
            deltas = out.perturbation if isinstance(out.perturbation, tuple) else (out.perturbation,)
            order = math.inf if config.norm == "linf" else 2
            sizes = [
                torch.linalg.vector_norm(d if config.scope == "token" else d.flatten(1), order, dim=-1).amax()
                for d in deltas
            ]
            size = torch.stack(sizes).amax().to(terms) / self.current_gradient_accumulation_steps
        self._sums += torch.cat([terms, size.view(1)])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, as Trainer does, with the terms of the objective beside the training loss."""
        if self.smart is not None and "loss" in logs and self._steps:
            sums = torch.cat([self._sums / (self._steps * self.accelerator.num_processes), self.smart.skipped.view(1)])
            values = self.accelerator.reduce(sums).tolist()
            names = "task_loss", "smoothness", "proximal", f"perturbation_{self.smart.config.norm}", "skipped_samples"
            logs |= dict(zip(names, values, strict=True))
            if logs["task_loss"]:
                logs["smoothness_share"] = self.smart.config.lambda_s * logs["smoothness"] / logs["task_loss"]
            self._sums.zero_()
            self._steps = 0
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------------------- evaluation and checkpoints

    def evaluate(self, *args: Any, use_teacher: bool = False, **kwargs: Any) -> dict[str, float]:
        """Evaluate, as Trainer does.

        Args:
            args: as in Trainer.
            use_teacher: with the teacher's weights instead of the student's: those that training ended with, also
                where `load_best_model_at_end` has put an earlier student back.
            kwargs: as in Trainer.

        Raises:
            ValueError: there is no teacher.
        """
        if not use_teacher:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        if self.smart is None or self.smart.teacher is None:
            raise ValueError("use_teacher: got True, but there is no teacher: train first, with smart_mu > 0")
        with self.smart.teacher.weights():
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, with the state of SMART before all else: what Trainer writes last tells that all is there."""
        assert self.smart is not None
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an older run
        save_smart(self.smart, folder / SMART_NAME, write=self.args.should_save)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's; the first process goes on, to what tells that all is there, when every process has written."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def _named_mask(name: str | None) -> Callable[[Any], Any]:
    if name is None:
        return attention_mask
    if not isinstance(name, str):
        raise TypeError(f"smart_mask: got {type(name).__name__}, expected the name of an input, 'none' or None")

    def mask(inputs: dict[str, Any]) -> Any:
        if name != "none" and name not in inputs:
            raise ValueError(f"smart_mask: got {name!r}, expected 'none' or one of the inputs: {', '.join(inputs)}")
        return inputs.get(name)

    return mask


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Tells a SmartTrainer when training begins, the optimiser has made a step, and an epoch ends."""

    def __init__(self, trainer: SmartTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.before_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.end_step()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._trainer.smart is not None:
            self._trainer.smart.end_epoch()


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The newest checkpoint of a SmartTrainer that was written to its end.

    Raises:
        ValueError: there is none.
    """
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*")}
    found = [(int(step[1]), path) for path, step in steps.items() if step and path.is_dir()]
    skipped: list[str] = []
    for _, path in sorted(found, reverse=True):
        if not (lacking := what_lacks(path)):
            if skipped:
                logger.warning("Going on from %s. Not complete: %s", path, "; ".join(skipped))
            return str(path)
        skipped.append(f"{path.name} {lacking}")
    raise ValueError(f"output_dir: {output_dir} has no complete checkpoint" + "".join(f"; {s}" for s in skipped))


def what_lacks(checkpoint: str | os.PathLike[str]) -> str | None:
    """What keeps a checkpoint's folder from being resumed by a SmartTrainer; None if nothing does.

    One without any state of an optimiser, schedule and generators is complete: `save_only_model` asks for that.
    """
    folder, name = Path(checkpoint), TRAINER_STATE_NAME
    try:
        json.loads((folder / name).read_text(encoding="utf-8"))
        name = SMART_NAME
        with safe_open(folder / name, "pt") as state:
            processes = len(state.get_tensor("generator"))
    except FileNotFoundError:
        return f"has no {name}"
    except (ValueError, SafetensorError):
        return f"has a {name} that was not written to its end"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "has no weights of the model"
    generators = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    if any(any(folder.glob(pattern)) for pattern in ("optimizer*", "scheduler*", "rng_state*")):
        for pattern in ("optimizer*", "scheduler*", *generators):
            if not any(folder.glob(pattern)):
                return f"has no {pattern.rstrip('*')}"
    return None


def _reentrant(args: TrainingArguments) -> bool:
    """Whether activations are checkpointed by torch's reentrant way, through which only backward() differentiates."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name and the old one
        if getattr(args, name, False) and (getattr(args, f"{name}_kwargs", None) or {}).get("use_reentrant"):
            return True
    return False

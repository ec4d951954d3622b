"""The forward passes of a step: with or without a perturbation, a graph for the weights, the teacher's weights.

Whatever a pass changes in the model (hooks, modes, flags) is as it was when the pass ends, also by an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smart_kernels.smart.config import Logits
from smart_kernels.smart.embedding import EmbeddingHook, perturb
from smart_kernels.smart.masks import SharedMasks
from smart_kernels.smart.parallel import Reduction, learns_static_graph, sharded_modules, without_reducer
from smart_kernels.smart.teacher import Teacher

Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]
"""How a model is run: (model, batch) -> (task loss, logits or a pair of them)."""
GeneratorStates = list[tuple[torch.device, Tensor]]


def run_model(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Run a model as Hugging Face models are: ``model(**batch)`` gives the loss and the logits.

    Raises:
        ValueError: the output has no loss, or no logits.
    """
    output = model(**batch)
    spans = "start_positions" in batch
    if isinstance(output, tuple):  # return_dict=False: loss, logits or loss, start logits, end logits
        if len(output) < 2 + spans or not isinstance(output[0], Tensor) or output[0].dim() != 0:
            raise ValueError("model: its output tuple does not begin with a loss and logits; are labels in the batch?")
        return output[0], model_logits(output, spans)
    loss = _part(output, "loss")
    if loss is None:
        raise ValueError("model: its output has no loss; put labels into the batch, or give `forward`")
    return loss, model_logits(output, spans)


def model_logits(output: Any, spans: bool) -> Any:
    """The logits in a model's output, or the pair of them: an object or mapping, or a tuple that begins with a loss.

    Args:
        output: what a Hugging Face model returns.
        spans: whether a tuple has two of them, for the start and the end of a span.

    Raises:
        ValueError: it has no logits.
    """
    if isinstance(output, tuple):
        return output[1:3] if spans else output[1]
    if (start := _part(output, "start_logits")) is not None:
        return start, _part(output, "end_logits")
    logits = _part(output, "logits")
    if logits is None:
        raise ValueError("model: its output has no logits; give `forward`")
    return logits


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


@dataclass(frozen=True)
class CleanPass:
    """What the ordinary forward pass of a batch gave.

    Attributes:
        loss: the task loss.
        logits: the logits.
        embeds: the embeddings, in their graph; None where there is no module to perturb.
        point: the tensor that the embeddings are to be differentiated by, through this pass's graph; None where that
            cannot be done or was not asked for.
    """

    loss: Tensor
    logits: Logits
    embeds: Tensor | None
    point: Tensor | None


class _Call(nn.Module):
    """A model and how it is run, as one module."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Any) -> tuple[Tensor, Logits]:
        """The task loss and the logits of a batch."""
        loss, logits = self._forward(self.model, batch)
        return loss, tuple(logits) if isinstance(logits, tuple | list) else (logits,)


class Passes:
    """Runs a model for one step after another.

    Of a step's passes the clean one alone goes through DistributedDataParallel, so that the reducer sees an ordinary
    step: one forward pass, one backward pass.

    Args:
        model: the model to train.
        forward: how it is run.
        embedding: the module whose output is perturbed; None where no pass perturbs.
        dropout: "shared", "independent" or "off", as in :class:`~smart_kernels.SmartConfig`.
    """

    def __init__(self, model: nn.Module, forward: Forward, embedding: nn.Module | None, dropout: str) -> None:
        self.model = model
        self.hook = None if embedding is None else EmbeddingHook(embedding)
        self._call = _Call(model, forward)
        self._call_again = _Call(without_reducer(model), forward)
        self._sharded = sharded_modules(model)
        self.reduction = Reduction(self._sharded)
        self._dropout = dropout
        self._before: GeneratorStates = []
        self._after: GeneratorStates = []
        self._masks = SharedMasks()
        self._in_backward = ExitStack()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the passes of a step: the clean one, then extra ones, which leave no trace in the generators."""
        if self._dropout == "off":
            self._in_backward.close()  # should a backward pass have failed half-way
            with _dropout_off(self.model):
                yield
            return
        self._before = generator_states(self.model)
        try:
            yield
        finally:
            set_generator_states(self._after)
            self._before = self._after = []
            self._masks.clear()

    def before_backward(self, loss: Tensor) -> None:
        """Let the backward pass from here find the model as its forward passes did: what is checkpointed runs again."""
        if self._dropout != "off" or not loss.requires_grad:
            return

        def begin(_gradient: Tensor) -> None:
            self._in_backward.enter_context(_dropout_off(self.model))
            torch.autograd.Variable._execution_engine.queue_callback(self._in_backward.close)

        loss.register_hook(begin)

    def clean(self, batch: Any, differentiable: bool) -> CleanPass:
        """The ordinary pass.

        Args:
            batch: the batch.
            differentiable: keep its graph as far as the embeddings. Not so where there is no graph at all, or where
                torch.compile made it: what is inside of such a one has no gradient. Nor where a reducer learns
                from it what a backward pass is like.
        """
        embeds = point = None
        if self.hook is None:
            with self._sharing():
                loss, logits = self._call(batch)
        else:
            apart = not torch.is_grad_enabled() or self._compiled() or learns_static_graph(self.model)
            with self.hook.read(differentiable and not apart), self._sharing():
                loss, logits = self._call(batch)
            embeds, point = self.hook.take()
        if self._dropout != "off":
            self._after = generator_states(self.model)
        return CleanPass(loss, logits, embeds, point)

    def perturbed(self, batch: Any, clean: CleanPass, delta: Tensor) -> Logits:
        """The logits at embeddings + delta, in a graph for the weights.

        The embeddings are the clean pass's: a second look-up would have a gradient of the vocabulary's size.
        """
        assert self.hook is not None
        assert clean.embeds is not None
        with self._extra(), self.hook.replace(perturb(clean.embeds, delta)):
            logits: Logits = self._call_again(batch)[1]
        # Autograd goes back through the latest pass first.
        self.reduction.after(logits, late=(clean.loss, *clean.logits))
        return logits

    @contextmanager
    def probe(self, batch: Any, embeds: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Logits]]:
        """The task loss and the logits at embeddings + delta, in a graph for delta and for no weight.

        Its gradients are to be taken inside the context: a checkpointed layer runs again then, as it ran before.
        """
        assert self.hook is not None
        with self._extra(), _weights_frozen(self.model):
            with self.hook.replace(perturb(embeds.detach(), delta.requires_grad_())):
                result = self._call_again(batch)
            yield result

    def taught(self, batch: Any, teacher: Teacher) -> Logits:
        """The logits with the teacher's weights in place of the model's own, without any graph."""
        with self._extra(), torch.no_grad():
            if self._sharded:
                with teacher.weights():
                    return self._call_again(batch)[1]  # type: ignore[no-any-return]
            prefix = "model._orig_mod." if "_orig_mod" in self._call_again.model._modules else "model."
            renamed = {prefix + name: value for name, value in teacher.parameters().items()}
            return torch.func.functional_call(self._call_again, renamed, (batch,))[1]  # type: ignore[no-any-return]

    @contextmanager
    def _extra(self) -> Iterator[None]:
        """A pass beside the clean one: its dropout masks, and no trace in buffers such as running means."""
        if self._dropout == "shared":
            set_generator_states(self._before)
        modules = [m for m in self.model.modules() if m.training]
        buffers = [b for m in modules for b in m.buffers(recurse=False) if b.is_floating_point() or b.dim() == 0]
        values = [b.detach().clone() for b in buffers]
        try:
            with self._sharing():
                yield
        finally:
            for buffer, value in zip(buffers, values, strict=True):
                buffer.data.copy_(value)  # which no backward pass takes for a change

    def _sharing(self) -> AbstractContextManager[Any]:
        """Masks that a step's passes share are drawn once, where to draw them takes long: on the CPU, uncompiled."""
        on_cpu = len(self._before) == 1  # this device's generator, and no other
        return self._masks if self._dropout == "shared" and on_cpu and not self._compiled() else nullcontext()

    def _compiled(self) -> bool:
        return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in self.model.modules())


def generator_states(model: nn.Module) -> GeneratorStates:
    """The state of the default generators that a model may draw from: the CPU's and its own devices'.

    They lie on the host, those of a GPU too, so nothing waits for the device.
    """
    devices = {p.device for p in model.parameters()} - {torch.device("cpu")}
    states = [(torch.device("cpu"), torch.get_rng_state())]
    return states + [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]


def set_generator_states(states: GeneratorStates) -> None:
    """Set the default generators to what :func:`generator_states` gave."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _weights_frozen(model: nn.Module) -> Iterator[None]:
    """No graph for the weights: nothing is kept for their gradients, and they are not computed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for batch norm, whose statistics are no matter of dropout."""
    training = [m for m in model.modules() if m.training and not isinstance(m, _BatchNorm)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

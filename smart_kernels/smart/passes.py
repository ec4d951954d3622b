"""The forward passes of a step: with or without a perturbation, a graph for the weights, the teacher's weights.

Whatever a pass changes in the model (hooks, modes, flags) is as it was when the pass ends, also by an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smart_kernels.smart.config import Logits
from smart_kernels.smart.embedding import EmbeddingCall, EmbeddingHook, perturb
from smart_kernels.smart.head import Head, HeadCall
from smart_kernels.smart.masks import SharedMasks
from smart_kernels.smart.parallel import (
    Reduction,
    finds_unused,
    gather_before_backward,
    learns_static_graph,
    sharded_modules,
    without_reducer,
)
from smart_kernels.smart.recording import (
    OUTPUT_NAMES,
    Recording,
    Replay,
    Uses,
    by_compiler,
    has_compiled_functions,
    is_compiled,
    part,
)
from smart_kernels.smart.state import (
    Assignment,
    Attributes,
    Generators,
    States,
    fingerprints,
    plain,
    reachable,
    set_states,
)
from smart_kernels.smart.structure import copied
from smart_kernels.smart.teacher import Teacher

Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]
"""How a model is run: (model, batch) -> (task loss, logits or a pair of them)."""


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
    loss = part(output, "loss")
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
    logits = output_logits(output)
    if logits is None:
        raise ValueError(
            "model: its output has no logits; give `forward`. (A fused loss, as Liger's, gives none in training: "
            "switch it off.)"
        )
    return logits


def output_logits(output: Any) -> Any:
    """The logits in what a user's step gives, or the pair of them; None where there are none."""
    if (start := part(output, "start_logits")) is not None:
        return start, part(output, "end_logits")
    return part(output, "logits")


def called_logits(outputs: Sequence[Any]) -> tuple[str, Logits]:
    """What is compared where the user's function gives a loss alone: the logits in what each call of a model gave.

    Args:
        outputs: of the calls: tensors, or objects or mappings with "logits", or, as in sentence-transformers, with
            "scores" or "sentence_embedding".

    Returns:
        How they are called, and one tensor for each call.

    Raises:
        ValueError: none has any.
    """
    for name in OUTPUT_NAMES:
        found = [x if isinstance(x, Tensor) else part(x, name) for x in outputs]
        logits = tuple(x for x in found if isinstance(x, Tensor) and x.is_floating_point())
        if logits:
            return name, logits
    raise ValueError(
        f"model: no call of it gave a tensor or one named {' or '.join(OUTPUT_NAMES)}, so nothing can be compared; "
        "return the logits beside the loss, or give `forward`. (A fused loss, as Liger's, gives none in training: "
        "switch it off.)"
    )


@dataclass(frozen=True)
class CleanPass:
    """What the ordinary forward pass of a batch gave.

    Attributes:
        loss: the task loss.
        logits: what is compared, in its graph: logits, or the hidden states in front of a head that the divergence
            takes part in.
        given: the model's logits, constants.
        embeddings: the calls of the module to perturb that the logits come from; none where no pass perturbs.
        batch: the batch as the pass found it.
        arguments: by call of the module, the named arguments of the model's call that it happened in.
        places: which of all calls of the module in the user's function these are.
        named: the named arguments of the calls of the model that the logits come from, of the last one first.
        called: where the logits are what calls of the model gave, how they are called there; else None.
        regraphed: whether the logits were computed once more, with a graph; the loss knows nothing of them then.
        cuts: tensors in front of the model's graph, and the leaves that stand for them in it.
        constant: whether loss and logits are constants.
    """

    loss: Tensor
    logits: Logits
    given: Logits
    embeddings: tuple[EmbeddingCall, ...]
    batch: Any
    arguments: tuple[Mapping[str, Any], ...]
    places: Sequence[int] = ()
    regraphed: bool = False
    called: str | None = None
    cuts: Sequence[tuple[Tensor, Tensor]] = ()
    constant: bool = False
    named: Mapping[str, Any] = field(default_factory=dict)

    @property
    def points(self) -> tuple[Tensor, ...] | None:
        """The tensors to differentiate this pass by; None where that cannot be done or was not asked for."""
        points = tuple(c.point for c in self.embeddings if c.point is not None)
        return points if points and len(points) == len(self.embeddings) and not self.constant else None

    def detached(self) -> CleanPass:
        """The same with loss and logits as constants."""
        return replace(self, loss=self.loss.detach(), logits=detached(self.logits), constant=True)


class _With(nn.Module):
    """A model, to run a function of ours with other tensors in the place of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class Passes:
    """Runs a model for one step after another.

    **An extra pass is the clean pass again, but for the perturbation or the weights, and leaves no trace.** The clean
    pass runs the user's function and records what it did with the model (:class:`Recording`). An extra pass repeats,
    of that, what the logits come from: with the same arguments, the same states of generators, from the same buffers
    and attributes, which end as the clean pass left them. Where it is not known what the logits come from, the whole
    function runs again, on a copy of the batch, and what it changes is put back (:class:`Attributes`).

    Of a step's passes the clean one alone goes through DistributedDataParallel, so that the reducer sees an ordinary
    step: one forward pass, one backward pass.

    Args:
        model: the model to train.
        forward: how it is run.
        embedding: the module whose output is perturbed; None where no pass perturbs.
        dropout: "shared", "independent" or "off", as in :class:`~smart_kernels.SmartConfig`.
        alone: whether there is no pass but the clean one.
        taught: whether there are passes with a teacher's weights.
        head: the model's head, to end extra passes in front of; None where it is not asked for.
        inspects: whether the first pass looks for what it changes without autograd's count, by `.data`; it waits for
            the device then.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        embedding: nn.Module | None,
        dropout: str,
        alone: bool = False,
        taught: bool = True,
        head: Head | None = None,
        inspects: bool = False,
    ) -> None:
        self.model = model
        self.head = head
        self._functions_compiled: bool | None = None  # found in the first step, as it takes a while
        self._compiled = False
        """Whether the model, or a part of it, is compiled, in this step."""
        self.fused = False
        """Whether this step's extra passes end in front of the head."""
        self.hook = None if embedding is None else EmbeddingHook(embedding)
        self.repeats = False
        """Whether an extra pass runs in place of the clean one, for the user's function to know."""
        self.asks_for_logits = False
        """Whether the function computes logits beside the loss on our behalf, which the user's program does not."""
        self._forward = forward
        self._alone = alone
        self._bare = without_reducer(model)
        self._with = _With(self._bare)
        self._sharded = sharded_modules(model)
        self.reduction = Reduction(self._sharded)
        self._dropout = dropout
        self._generators = Generators(model)
        self._modules = list(self._bare.modules())
        self._parameters = [(name, p) for name, p in self._bare.named_parameters()]
        # recurrent layers put their weights elsewhere on a GPU, as they are, where `flatten_parameters` is called
        layers = [m for m in self._modules if isinstance(m, nn.RNNBase)]
        wandering = {id(p) for m in layers for p in m.parameters(recurse=False)}
        self._addressed = [(p, plain(p) and id(p) not in wandering) for _, p in self._parameters]
        self._ids = {id(p): p.device for _, p in self._parameters}
        self._taught = taught
        self._trainable = {id(p) for _, p in self._parameters if p.requires_grad}
        self._places = [
            (f"{name}.{key}".lstrip("."), places, key, part, part.shape if isinstance(part, Tensor) else None)
            for name, module in self._bare.named_modules()
            for places in (module._parameters, module._modules)
            if isinstance(places, dict)  # not so of torch.jit's
            for key, part in places.items()
            if part is not None
        ]
        self._entries: set[nn.Module] | None = None
        self._changing: set[int] = set()  # ids of buffers
        self._batch: Any = None
        self._replay: Replay | None = None
        self._loss_replay: Replay | None = None
        self._seen_from: States | None = None
        self._differentiates = False  # a pass of which nothing is saved fails
        self._split = False  # the clean pass's graph is freed before the perturbed pass
        self._calls = 0  # of the module to perturb, in the user's function
        self._regraphed = False  # what is compared was computed without a graph, and is computed again with one
        self._by_calls = False  # what is compared is not what the user's function gives
        self._attributes = Attributes(())
        self._changed_parameters: list[tuple[str, nn.Parameter]] = []
        self._begun: dict[
            str, Tensor
        ] = {}  # copies of parameters that passes are known to change, from before this one
        self._inspects = inspects and not alone and not self._sharded
        self._silently: set[str] = set()  # parameters that a pass changes by `.data`
        self._elsewhere = False  # whether the model reads parameters from elsewhere than its modules
        self._before: States = []
        self._after: States = []
        self._masks = SharedMasks()
        self._in_backward = ExitStack()

    @property
    def sharded(self) -> bool:
        """Whether parameters are gathered from shards for a while."""
        return bool(self._sharded)

    def changed_parameters(self) -> list[str]:
        """What is no longer as it was when this object was made: parameters that are others, or are trained now."""
        if self._sharded:  # in whose place are gathered ones for a while
            return [n for n, p in self._parameters if self._taught and p.requires_grad and id(p) not in self._trainable]
        changed = []
        for name, places, key, old, shape in self._places:
            own: Any = places.get(key)
            same = own is old and (shape is None or own.shape == shape)
            if not same or (
                shape is not None and self._taught and own.requires_grad and id(own) not in self._trainable
            ):
                changed.append(name)
        return changed

    @contextmanager
    def step(self, untouched: bool = False) -> Iterator[None]:
        """Around the passes of a step: the clean one, then extra ones.

        Args:
            untouched: at the end, be as before the clean pass, in place of as after it.
        """
        if self._functions_compiled is None:
            self._functions_compiled = by_compiler(self._forward) or any(map(has_compiled_functions, self._modules))
        self._compiled = self._functions_compiled or any(map(is_compiled, self._modules))
        fast = torch.backends.mha.get_fastpath_enabled()
        # a layer's fast path, which is taken where nothing requires grad, rounds otherwise than the one in training
        torch.backends.mha.set_fastpath_enabled(self._alone and fast)
        try:
            if self._dropout == "off":
                self._in_backward.close()  # should a backward pass have failed half-way
                with _dropout_off(self.model):
                    yield
            else:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            if untouched:
                self._attributes.undo()
            if not self._alone:
                set_states(self._before if untouched else self._after)
            self._before = self._after = []
            self._batch = self._replay = self._loss_replay = self._seen_from = None
            self.fused = False
            self._attributes = Attributes(())
            self._masks.clear()
            if self.hook is not None:
                self.hook.forget()
            if self.head is not None:
                self.head.calls = []

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Around runs of the user's function, in evaluation mode, whose traces are put back when it ends."""
        objects, dicts = reachable(self._forward)
        attributes, states = Attributes(self._modules, objects, dicts), self._generators.states()
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        self.repeats = True
        try:
            yield
        finally:
            self.repeats = False
            for module in training:
                module.training = True
            attributes.find_changes()
            attributes.undo()
            set_states(states)

    def before_backward(self, loss: Tensor) -> None:
        """Let the backward pass from here find the model as its forward passes did: what is checkpointed runs again."""
        if self._dropout != "off" or not loss.requires_grad:
            return

        def begin(_gradient: Tensor) -> None:
            self._in_backward.enter_context(_dropout_off(self.model))
            torch.autograd.Variable._execution_engine.queue_callback(self._in_backward.close)

        loss.register_hook(begin)

    def may_split(self) -> bool:
        """Whether a step may have several backward passes: not while a reducer learns what its only one is like."""
        return torch.is_grad_enabled() and not learns_static_graph(self.model)

    def clean(self, batch: Any, differentiable: bool, split: bool = False, again: bool = False) -> CleanPass:
        """The ordinary pass.

        Args:
            batch: the batch.
            differentiable: keep its graph as far as the embeddings. Not so where there is no graph at all, or where
                torch.compile made it: what is inside of such a one has no gradient. Nor where a reducer learns
                from it what a backward pass is like.
            split: its graph is to be freed before the perturbed pass.
            again: it is to be repeated with its task loss, where that can be followed.
        """
        if self._alone:
            loss, logits = self._user(self.model, batch)
            logits = () if logits is None else _as_logits(logits)
            return CleanPass(loss, logits, detached(logits), (), batch, ())
        self._batch, _ = copied(batch)
        objects, dicts = reachable(self._forward)
        self._attributes = Attributes(self._modules, objects, dicts, self._changing)
        versions = self._parameter_versions()
        # with "independent" masks, what a generator of torch's gives is no matter of ours
        self._before = self._generators.states()
        hook, apart = self.hook, self._compiled or not self.may_split()
        how = {
            "differentiable": differentiable and not apart,
            "cut": split and not apart and not finds_unused(self.model),
        }
        self._split = split
        self._masks.set(keep=split, pack=False)
        count = (lambda: 0) if hook is None else (lambda: len(hook.calls))
        known = set() if self._sharded else {name for name, _ in self._changed_parameters}
        self._begun = {name: p.detach().clone() for name, p in self._parameters if name in known}
        inspected = self._written_silently() if self._inspects else nullcontext()
        moved = self._moves()
        recording = Recording(self.model, self._modules, self._ids, self._entries, self._generators, count, moved)
        try:
            reading = nullcontext() if hook is None else hook.read(**how)
            with inspected, reading, self._reading_head(), self._sharing(), recording:
                loss, logits = self._user(self.model, batch)
        finally:
            self._after = self._generators.states()
        self._attributes.find_changes()
        if not self._sharded:  # of shards, what is changed is the memory that they are gathered from
            pairs = zip(self._parameters, versions, self._parameter_versions(), strict=True)
            self._changed_parameters = [
                n for n, old, new in pairs if old != new or n[0] in self._silently or n[0] in known
            ]
        self._by_calls = logits is None
        called, logits = called_logits(recording.outputs()) if logits is None else (None, _as_logits(logits))
        self._replay = recording.replay(logits, self._dropout != "independent")
        # it begins each call where the clean pass did, also with "independent" masks
        self._loss_replay = recording.replay((loss, *logits), True) if again else None
        # where it is not known what the logits come from, any module of the model may have been called
        self._entries = None if self._replay is None else (self._entries or set()) | recording.called
        calls: tuple[EmbeddingCall, ...] = ()
        places: Sequence[int] = ()
        if hook is not None:
            places = range(len(hook.calls)) if self._replay is None else self._replay.embeddings
            self._calls = len(hook.calls)
            calls = tuple(hook.calls[i] for i in places)
            hook.check_called(calls)
        self._regraphed = self._replay is not None and self._without_graph(logits)
        if self._regraphed:
            assert self._replay is not None
            if self.asks_for_logits and not self._by_calls and recording.apart(loss, logits):
                # they are those of the loss's own pass, and what was drawn for them was not in the user's program
                self._after = self._replay.begin_at(self._before)
            reading = nullcontext() if hook is None else hook.read(**how)
            self._loss_replay = None
            with self._extra(), reading:
                logits = self._run()
            calls = () if hook is None else tuple(hook.calls)
            self.reduction.after(logits, late=(loss,))
        arguments = tuple({} if self._replay is None else self._replay.arguments(i) for i in places)
        cuts = () if hook is None else tuple(hook.cuts)
        given = detached(logits)
        named = {} if self._replay is None else self._replay.named()
        how_made = self._regraphed, called, cuts, False, named
        return CleanPass(loss, logits, given, calls, self._batch, arguments, places, *how_made)

    def _parameter_versions(self) -> list[tuple[int, int]]:
        """How often each parameter was changed in place, and where it lies: `p.data = ...` does not count."""
        return [(p._version, p.data_ptr() if has_memory else 0) for p, has_memory in self._addressed]

    @property
    def newly_changed_parameters(self) -> list[str]:
        """The parameters that this pass has changed first: extra passes go on from there, and not from before it."""
        return [name for name, _ in self._changed_parameters if name not in self._begun]

    @contextmanager
    def _written_silently(self) -> Iterator[None]:
        """Around the first pass: find parameters, and large tensors of modules, that it writes to by `.data`."""
        large = [x for x in self._attributes.not_copied() if plain(x)]
        named = [(name, p) for name, p in self._parameters if plain(p)]
        looked_at = [*(p for _, p in named), *large]
        before = fingerprints(looked_at)
        yield
        self._inspects = False
        changed = (fingerprints(looked_at) != before).tolist()
        self._silently = {name for (name, _), found in zip(named, changed, strict=False) if found}
        self._changing |= {id(x) for x, found in zip(large, changed[len(named) :], strict=True) if found}

    def _moves(self) -> Callable[[], tuple[list[Assignment], bool]]:
        """A function for :class:`Recording`: what has become of the model since it was asked last.

        What the user's function does before a call of the model, or around it, is seen so. Attributes that it assigns
        are assigned again; after anything else it runs again as a whole: buffers that it changes, other tensors in the
        place of parameters, as `functional_call` has them, parameters that are frozen for a while, the kernels that
        attention may choose from.
        """
        first = self._around()

        def moved() -> tuple[list[Assignment], bool]:
            assigned, others = self._attributes.moved()
            return assigned, others or self._around() != first

        return moved

    def _around(self) -> tuple[Any, ...]:
        """What a pass depends on besides attributes, buffers and generators, to be compared."""
        choices: Any = torch.backends.cuda
        kernels = choices.flash_sdp_enabled, choices.mem_efficient_sdp_enabled, choices.math_sdp_enabled
        parts = () if self._sharded else tuple([id(places.get(key)) for _, places, key, _, _ in self._places])
        return tuple([p.requires_grad for p in self._weights()]), parts, tuple([enabled() for enabled in kernels])

    def fuse(self, clean: CleanPass, calls: Sequence[HeadCall]) -> CleanPass | str:
        """The clean pass with hidden states in place of logits, for extra passes of the like; or why not.

        Args:
            clean: the clean pass.
            calls: those of the head in it.
        """
        assert self.head is not None
        if self._compiled:
            return "the model is compiled"
        if (around := self.head.entered_in_pairs()) is not None:
            return f"the {type(around).__name__} around the head has hooks in front and behind, which come in pairs"
        if self._replay is None or self._regraphed:
            return "it is not known what the logits are made of"
        if len(clean.logits) != 1 or len(calls) != 1:
            return f"the head is called {len(calls)} times in a pass, for {len(clean.logits)} tensors of logits"
        if clean.loss.requires_grad and not calls[0].hidden.requires_grad:
            return "nothing in front of the head is trained"
        reason = self.head.settle(calls[0], clean.logits[0])
        if reason is not None:
            return reason
        self.fused = True
        gather_before_backward(self.head.gates, calls[0].hidden)
        return replace(clean, logits=(calls[0].hidden,))

    def _reading_head(self) -> AbstractContextManager[None]:
        return nullcontext() if self.head is None or self._compiled else self.head.read()

    def _user(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """The user's function: a loss and logits, or a loss alone."""
        result: Any = self._forward(model, batch)
        loss, logits = (result, None) if isinstance(result, Tensor) else result
        return loss, logits

    def _without_graph(self, logits: Logits) -> bool:
        """Whether the logits were computed without a graph, as for a metric, where the loss has one."""
        wanted = torch.is_grad_enabled() and any(p.requires_grad for _, p in self._parameters)
        return wanted and not any(x.requires_grad for x in logits)

    def perturbed(self, clean: CleanPass, deltas: tuple[Tensor, ...], last: bool = True) -> Logits:
        """The logits at embeddings + deltas, in a graph for the weights.

        The embeddings are the clean pass's: a second look-up would have a gradient of the vocabulary's size. Where the
        clean graph is freed before, and cannot be cut behind them, they are looked up again.

        Args:
            clean: the clean pass.
            deltas: what is added.
            last: the graph goes on into the module to perturb; else it ends at the cut.
        """
        outputs: list[Tensor | None] = []
        added: list[Tensor | None] = []
        for c, d in zip(clean.embeddings, deltas, strict=True):
            again = self._looks_up_again(c)
            start = c.output if last or c.point is None or not c.cut else c.point
            outputs.append(None if again else perturb(start, d))
            added.append(d if again else None)
        with (
            self._extra(self._seen_from, pack=self._split),
            self._replaced(clean, outputs, self._replay is None, added),
        ):
            logits = self._run()
        if not clean.constant:
            # Autograd goes back through the latest pass first.
            self.reduction.after(logits, late=(clean.loss,) if self._regraphed else (clean.loss, *clean.logits))
        return logits

    def seen(self, clean: CleanPass, deltas: tuple[Tensor, ...]) -> Logits:
        """The logits at embeddings + deltas, as constants; the next perturbed pass is this one again."""
        self._seen_from = self._generators.states() if self._dropout == "independent" else None
        outputs = [perturb(c.output.detach(), d) for c, d in zip(clean.embeddings, deltas, strict=True)]

        def run() -> Logits:
            with self._replaced(clean, outputs, self._replay is None):
                return self._run()

        return self._constants(run, self._seen_from)

    @property
    def repeatable(self) -> bool:
        """Whether :meth:`again` can follow what the clean pass did."""
        return self._loss_replay is not None

    def again(self, clean: CleanPass) -> CleanPass:
        """The clean pass once more, the task loss too, in a graph for the weights."""
        assert self._loss_replay is not None
        outputs = [c.output.clone() for c in clean.embeddings]
        reading = self._reading_head() if self.fused else nullcontext()
        with self._extra(self._before, pack=True), self._replaced(clean, outputs, False), reading:
            loss, *logits = self._run(replay=self._loss_replay)
        if self.fused:
            assert self.head is not None
            logits, self.head.calls = [call.hidden for call in self.head.calls], []
        return replace(clean, loss=loss, logits=tuple(logits), constant=False)

    def _constants(self, run: Callable[[], Logits], states: States | None = None) -> Logits:
        """The logits by the way of a pass in training, of which nothing is kept for a backward pass.

        Args:
            run: gives them.
            states: of the generators to begin with, where masks are "independent".
        """
        if self._sharded:  # whose hooks would wait for the backward pass
            with self._extra(), torch.no_grad():
                return run()
        if not self._differentiates:
            try:
                # a compiled model asks whether casts are kept; `weights()` forgets them
                with self._extra(states), _for_no_backward(casts_kept=self._compiled, saved=False):
                    return detached(run())
            except torch.OutOfMemoryError:
                raise
            except (TypeError, RuntimeError):
                pass  # as where the model takes a gradient in its forward pass, which needs what is saved
        with self._extra(states), _for_no_backward(casts_kept=self._compiled, saved=True):
            logits = detached(run())
        self._differentiates = True
        return logits

    @contextmanager
    def probe(self, clean: CleanPass, deltas: tuple[Tensor, ...], loss: bool) -> Iterator[tuple[Tensor | None, Logits]]:
        """The task loss, on request, and the logits at embeddings + deltas, in a graph for these and for no weight.

        Its gradients are to be taken inside the context: a checkpointed layer runs again then, as it ran before. The
        loss takes the whole of the user's function.
        """
        # a compiled model would be compiled once more for weights that are frozen
        frozen = torch.enable_grad() if self._compiled else _weights_frozen(self._weights())
        with self._extra(), frozen:
            outputs: list[Tensor | None] = []
            added: list[Tensor | None] = []
            for c, d in zip(clean.embeddings, deltas, strict=True):
                d.requires_grad_()
                # a compiled model is compiled for this and for the perturbed pass, and once
                again = self._compiled and self._looks_up_again(c)
                outputs.append(None if again else perturb(c.output.detach(), d))
                added.append(d if again else None)
            with self._replaced(clean, outputs, loss or self._replay is None, added):
                result = self._whole() if loss else (None, self._run(grad=True))
            yield result

    def _looks_up_again(self, call: EmbeddingCall) -> bool:
        """Whether the clean graph, which is freed, is the only way into the module to perturb."""
        return self._split and call.output.requires_grad and not call.cut

    def _weights(self) -> Iterable[Tensor]:
        """The parameters as the modules have them now: of a sharded model, shards or what was gathered of them."""
        return self.model.parameters() if self._sharded else (p for _, p in self._parameters)

    def _replaced(
        self,
        clean: CleanPass,
        outputs: Sequence[Tensor | None],
        whole: bool,
        added: Sequence[Tensor | None] = (),
    ) -> AbstractContextManager[None]:
        """These outputs of the module to perturb, in the user's function or in what is repeated of it."""
        assert self.hook is not None
        places = clean.places if whole else range(len(outputs))
        own = {place: x for place, x in zip(places, outputs, strict=True) if x is not None}
        more = {place: x for place, x in zip(places, added, strict=False) if x is not None}
        return self.hook.replace(own, self._calls if whole else len(outputs), more)

    def taught(self, teacher: Teacher | None) -> Logits:
        """The logits with the teacher's weights in place of the model's own, as constants; for None, with its own.

        The pass takes the way of one in training, and keeps nothing for a backward pass. The teacher's weights stand in
        the modules in place of the parameters, or in these, where the model is found to read them from elsewhere.
        """
        own = {name: p for name, p in self._parameters if p.requires_grad}
        swapped: Callable[[], AbstractContextManager[None]] = nullcontext if teacher is None else teacher.weights
        head = teacher is not None
        if self._sharded or self._compiled or self._elsewhere:
            # of a compiled model the same parameters, and the same hook, so the same graph
            unread = self._compiled and not self._sharded and self.hook is not None

            def swap() -> Logits:
                with swapped(), self.hook.unread() if unread and self.hook is not None else nullcontext():
                    return self._run(head=head and not self._compiled)

            return self._constants(swap)
        values = own if teacher is None else teacher.parameters()
        changed = {name for name, _ in self._changed_parameters}

        def run() -> Logits:
            given = {
                n: (v.detach().clone() if n in changed else v.detach()).requires_grad_() for n, v in values.items()
            }
            if teacher is not None:
                return self._run(given, head=True)
            uses = Uses({id(p) for p in own.values()})
            with uses:
                logits = self._run(given)
            self._elsewhere = uses.any  # what is held in a list, say, is not replaced
            return logits

        return self._constants(run)

    def _run(
        self,
        values: Mapping[str, Tensor] | None = None,
        grad: bool = False,
        replay: Replay | None = None,
        head: bool = False,
    ) -> Logits:
        """What is compared, by what was recorded or by the user's function.

        Args:
            values: by name, tensors in the place of parameters.
            grad: with a graph also where the clean pass made none.
            replay: of what, in place of what is compared.
            head: with the head, where the divergence takes part in it.
        """
        fused = self.head if self.fused and replay is None else None
        replay = self._replay if replay is None else replay
        values = dict(values or {})
        for name, p in self._changed_parameters:
            if name not in values:  # a pass changes them in place: a copy of its own
                values[name] = p.clone()
                if name in self._begun:
                    values[name].data.copy_(self._begun[name])
        by_id = {id(p): values[name] for name, p in self._parameters if name in values}

        def function() -> Logits:
            if replay is None:
                return self._whole()[1]
            if fused is not None:
                with fused.stopped(head):
                    replay(grad, by_id)
                return fused.seen
            logits: Logits = replay(grad or self._regraphed, by_id)
            return logits

        if not values:
            return function()
        prefix = "model._orig_mod." if "_orig_mod" in self._bare._modules else "model."
        renamed = {prefix + name.removeprefix("_orig_mod."): value for name, value in values.items()}
        return torch.func.functional_call(self._with, renamed, (function,))  # type: ignore[no-any-return]

    def _whole(self) -> tuple[Tensor, Logits]:
        """The user's function, as it ran first."""
        batch, _ = copied(self._batch)
        self.repeats = True
        try:
            if not self._by_calls:
                loss, logits = self._user(self._bare, batch)
                return loss, _as_logits(logits)
            with Recording(self._bare, self._modules, self._ids, None, None) as recording:
                loss, _ = self._user(self._bare, batch)
            return loss, called_logits(recording.outputs())[1]
        finally:
            self.repeats = False

    @contextmanager
    def _extra(self, states: States | None = None, pack: bool = False) -> Iterator[None]:
        """A pass beside the clean one: its random numbers, and no trace in buffers, attributes and the like.

        Args:
            states: of the generators to begin with, where masks are "independent".
            pack: keep masks small in the graph: beside it lie the gradients of the one before.
        """
        self._masks.set(keep=self._split, pack=pack)
        if self._dropout != "independent":
            set_states(self._before)
        elif states is not None:
            set_states(states)
        with self._attributes.repeated(), self._sharing():
            yield

    def _sharing(self) -> AbstractContextManager[Any]:
        """Masks that a step's passes share are drawn once, where to draw them takes long: on the CPU, uncompiled."""
        on_cpu = not self._generators.devices
        return self._masks if self._dropout == "shared" and on_cpu and not self._compiled else nullcontext()


def _as_logits(logits: Any) -> Logits:
    return tuple(logits) if isinstance(logits, tuple | list) else (logits,)


def detached(logits: Logits) -> Logits:
    """The logits as constants."""
    return tuple(x.detach() for x in logits)


def _drop(_tensor: Any) -> Any:
    return None


@contextmanager
def _for_no_backward(casts_kept: bool, saved: bool) -> Iterator[None]:
    """A pass with a graph that is not for a backward pass.

    What is computed may depend on whether there is a graph, so a pass that is compared with one in training has one.

    Args:
        casts_kept: let autocast keep what it casts; not of weights that are not the model's.
        saved: let the graph keep tensors, as long as it lives.
    """
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(caching and casts_kept)
    hooks = nullcontext() if saved else torch.autograd.graph.saved_tensors_hooks(_drop, _drop)
    try:
        with torch.enable_grad(), hooks:
            yield
    finally:
        torch.set_autocast_cache_enabled(caching)


@contextmanager
def _weights_frozen(weights: Iterable[Tensor]) -> Iterator[None]:
    """No graph for the weights: nothing is kept for their gradients, and they are not computed."""
    trainable = [p for p in weights if p.requires_grad]
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

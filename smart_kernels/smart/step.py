"""One step under way: it carries out a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smart_kernels.smart.adversary import Deltas
from smart_kernels.smart.check import check_connected, check_moves, check_zero
from smart_kernels.smart.config import AT_CLEAN, Logits
from smart_kernels.smart.divergence import Divergence
from smart_kernels.smart.gradients import Held
from smart_kernels.smart.passes import CleanPass, Passes, detached
from smart_kernels.smart.plan import Pass, make_plan, splits

if TYPE_CHECKING:
    from smart_kernels.smart.objective import Smart


@dataclasses.dataclass
class Options:
    """What a step is asked for, as in :class:`~smart_kernels.Smart`."""

    initial_perturbation: Tensor | Sequence[Tensor] | None = None
    generator: torch.Generator | None = None
    num_items: float | Tensor | None = None


class Step:
    """A step of a plan's passes, each a method that is given what the plan says it needs, and nothing else.

    Args:
        smart: the objective.
        batch: what the user's function takes.
        options: for this step.
        ahead: make each backward pass but the last one as soon as it can be made.
        scale: what the loss is going to be multiplied by, as far as it is known.
        known: whether it is just that.
        frees_logits: keep none for the user where no pass but the clean one has any.

    Attributes:
        whole: the loss, of which the last backward pass begins.
        task_loss: detached.
        smoothness: detached, 0 where there is none.
        proximal: detached, 0 where there is none.
        logits: of the clean pass, detached; none where they are not kept.
        deltas: the perturbations, or None.
    """

    whole: Tensor
    task_loss: Tensor
    smoothness: Tensor
    proximal: Tensor
    logits: Logits
    deltas: Deltas | None = None

    def __init__(
        self,
        smart: Smart,
        batch: Any,
        options: Options,
        ahead: bool,
        scale: Tensor | float = 1.0,
        known: bool = False,
        frees_logits: bool = False,
    ) -> None:
        self._smart = smart
        self._config = smart.config
        self._passes: Passes = smart._passes
        self._batch = batch
        self._options = options
        self._ahead = ahead and self._passes.may_split()
        self._held = Held(scale, self._passes.reduction, known)
        self._checking = smart._checking
        self._frees_logits = frees_logits
        self._checked_zero = False
        self._divergence: Divergence

    def run(self) -> Step:
        """Carry the plan out. Nothing holds what the plan has freed."""
        values: dict[str, Any] = {}
        (first, *_) = self._plan(True, True)
        self._do(first, values)
        plan = self._plan(values["graph"].points is not None, self._passes.repeatable)
        for each in plan[1:]:
            self._do(each, values)
        return self

    def _plan(self, differentiable: bool, repeatable: bool) -> tuple[Pass, ...]:
        return make_plan(
            self._config,
            smooth=self._passes.hook is not None,
            taught=self._smart.teacher is not None,
            ahead=self._ahead,
            differentiable=differentiable,
            repeatable=repeatable,
        )

    def _do(self, each: Pass, values: dict[str, Any]) -> None:
        given = getattr(self, each.name)(**{name: values[name] for name in each.needs})
        values |= zip(each.gives, given if len(each.gives) > 1 else (given,), strict=False)
        for name in each.frees:
            del values[name]

    # ------------------------------------------------------------------------------------------ forward passes

    def clean(self) -> tuple[CleanPass, CleanPass]:
        """The ordinary pass: the user's function, once."""
        split = splits(self._config, self._ahead)
        again = split and not self._config.detach_clean
        graph = self._passes.clean(self._batch, self._config.adversary in AT_CLEAN, split, again)
        self._trains = graph.loss.requires_grad
        if self._checking:
            check_connected(self._trains, graph.logits)
        self.task_loss, self.logits = graph.loss.detach(), graph.given
        self.smoothness = self.proximal = self.task_loss.new_zeros(())
        if not self._smart.alone:
            graph, self._divergence = self._smart._compare(graph, self._options.num_items)
        if self._frees_logits and self._passes.fused:
            self.logits = ()
            if not self._checking:
                graph = dataclasses.replace(graph, given=())
        return graph, graph.detached()

    def taught(self, clean: CleanPass) -> Logits:
        """With the teacher's weights."""
        return self._passes.taught(self._smart.teacher)

    def perturbed(
        self, perturbation: Deltas, graph: CleanPass | None = None, clean: CleanPass | None = None, last: bool = True
    ) -> Logits:
        """At the perturbation, in a graph that goes on into the word embedding."""
        clean = clean if graph is None else graph
        assert clean is not None
        self._check_zero(clean)
        logits = self._passes.perturbed(clean, perturbation, last)
        if self._checking:
            check_connected(self._trains, logits)
        return logits

    def perturbed_apart(self, clean: CleanPass, perturbation: Deltas) -> Logits:
        """At the perturbation, in a graph that ends at the cut behind the word embedding."""
        return self.perturbed(perturbation, clean=clean, last=False)

    def seen(self, clean: CleanPass, perturbation: Deltas) -> Logits:
        """At the perturbation, without a graph: the perturbed pass comes again."""
        return self._passes.seen(clean, perturbation)

    def clean_again(self, clean: CleanPass) -> CleanPass:
        """The clean pass again, in a graph."""
        return self._passes.again(clean)

    # -------------------------------------------------------------------------------------- the perturbation

    def noise(self, clean: CleanPass) -> Deltas:
        """The noise alone."""
        return self._find(clean)

    def pulled_back(self, graph: CleanPass) -> Deltas:
        """By a product with the clean graph."""
        return self._find(graph)

    def probed(self, clean: CleanPass) -> Deltas:
        """By passes at perturbed embeddings, whose graphs know the embeddings alone."""
        return self._find(clean)

    def fallen_out(self, clean: CleanPass) -> Deltas:
        """By the gradient of the task loss that the clean backward pass has left."""
        return self._find(clean, [self._held.of(p) for p in _points(clean)])

    def _find(self, clean: CleanPass, direction: Sequence[Tensor | None] | None = None) -> Deltas:
        options = self._options
        self.deltas = self._smart._find(
            clean, self._divergence, self._checking, options.initial_perturbation, options.generator, direction
        )
        return self.deltas

    # ------------------------------------------------------------------------------------------ backward passes

    def clean_backward(self, graph: CleanPass, taught: Logits | None = None, seen: Logits | None = None) -> None:
        """Back through the clean graph, which is gone then."""
        falls_out = self._config.adversary == "task" and self.deltas is None
        points = _points(graph) if falls_out else []
        self._held.collect(self._clean_terms(graph, taught, seen), graph.cuts, points)

    def perturbed_backward(self, clean: CleanPass, perturbed: Logits) -> Logits:
        """Back through the perturbed graph, which is gone then."""
        self._held.collect(self._smooth(perturbed, clean.logits), clean.cuts)
        return detached(perturbed)

    def leave(self, graph: CleanPass) -> None:
        """The clean graph is gone; it comes again."""
        self._held.leave(graph.loss)

    def loss(
        self,
        graph: CleanPass | None = None,
        clean: CleanPass | None = None,
        perturbed: Logits | None = None,
        taught: Logits | None = None,
        seen: Logits | None = None,
    ) -> None:
        """The loss, in what is left of graphs: the backward pass from here is the last one."""
        there = clean if graph is None else graph
        assert there is not None
        self._check_zero(there)
        total = None if graph is None else self._clean_terms(graph, taught, seen)
        if perturbed is not None:
            constant = graph is None or self._config.detach_clean
            smooth = self._smooth(perturbed, detached(there.logits) if constant else there.logits)
            total = smooth if total is None else total + smooth
        assert total is not None
        if self._passes.fused:  # what a divergence does with the head comes before the passes that it is of
            self._passes.reduction.after(
                (total,), late=(perturbed or ()) if graph is None else (graph.loss, *graph.logits)
            )
        if self._checking:
            smart, known = self._smart, (self._smart._compute_dtype, self._smart._told)
            smart._checked = check_moves(there, self._divergence, self.smoothness, self.deltas, *known)
        self.whole = self._held.loss(self._value(), total) if self._held.begun else total
        self._passes.before_backward(self.whole)

    def _clean_terms(self, graph: CleanPass, taught: Logits | None, seen: Logits | None) -> Tensor:
        """What the clean graph has part in, and no other one."""
        total = graph.loss
        if taught is not None:
            proximal = self._divergence(graph.logits, taught)
            self.proximal = proximal.detach()
            total = total + self._config.mu * proximal
        if seen is not None:
            total = total + self._config.lambda_s * self._divergence(seen, graph.logits)
        return total

    def _smooth(self, perturbed: Logits, clean: Logits) -> Tensor:
        """The smoothness term with its weight."""
        smoothness = self._divergence(perturbed, clean)
        self.smoothness = smoothness.detach()
        return self._config.lambda_s * smoothness

    def _value(self) -> Tensor:
        """The loss as a number."""
        value = self.task_loss
        if self._smart.teacher is not None:
            value = value + self._config.mu * self.proximal
        return value + self._config.lambda_s * self.smoothness

    def _check_zero(self, clean: CleanPass) -> None:
        """Once in the first step, where no more graphs are there than must be."""
        if self._checking and not self._checked_zero:
            self._checked_zero = True
            check_zero(self._passes, clean, self._divergence, self._config, self._smart.teacher)


def _points(clean: CleanPass) -> list[Tensor]:
    """What the clean pass can be differentiated by."""
    return [c.point for c in clean.embeddings if c.point is not None]

"""A step as data: which passes it has, in what order, what each needs and gives, and what is freed behind it.

:class:`~smart_kernels.smart.step.Step` carries a plan out: each pass is its method of that name, called with what the
pass needs. Beside the perturbation, what passes hand on is

========= =======================================================================
graph     the clean pass in its graph: task loss and logits
clean     the same as constants, with the graph of the word embedding alone
taught    the teacher's logits, constants
perturbed the logits at the perturbation, in their graph
seen      the logits at the perturbation, constants
========= =======================================================================

Units of cost are those of method and paper: a forward pass 1, a backward pass 1 for what flows through and 1 for the
weights. A vanilla step is 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from smart_kernels.smart.config import AT_CLEAN, SmartConfig

VANILLA = 3
"""Units of a vanilla step."""
GRAPHS = ("graph", "perturbed")
"""What holds a graph through the model, with all that a backward pass needs."""


class Pass(NamedTuple):
    """A pass of a step.

    Attributes:
        name: the method of :class:`~smart_kernels.smart.step.Step` that does it.
        units: what it costs.
        needs: what it is given.
        gives: what it returns.
        frees: what nothing needs any more when it is done.
    """

    name: str
    units: int
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()


def make_plan(
    config: SmartConfig,
    *,
    smooth: bool,
    taught: bool,
    ahead: bool,
    differentiable: bool = True,
    repeatable: bool = True,
) -> tuple[Pass, ...]:
    """The passes of a step, the last of which makes the loss; the backward pass from there is counted with it.

    Args:
        config: the adversary, `detach_clean` and `memory`.
        smooth: whether there is a smoothness term.
        taught: whether there is a proximal term.
        ahead: make each backward pass but the last one as soon as it can be made, so that its graph is freed.
        differentiable: whether the clean graph can be differentiated by the embeddings.
        repeatable: whether the clean pass can be repeated with its task loss.
    """
    clean = Pass("clean", 1, (), ("graph", "clean"))
    teacher = (Pass("taught", 1, ("clean",), ("taught",)),) if taught else ()
    terms = ("taught",) if taught else ()  # what the clean graph's terms need beside it
    if not smooth:
        return clean, *teacher, Pass("loss", 2, ("graph", *terms))

    task = config.adversary == "task"
    if config.adversary == "random":
        find = Pass("noise", 0, ("clean",), ("perturbation",))
    elif config.adversary in AT_CLEAN and differentiable:
        find = Pass("pulled_back", 1, ("graph",), ("perturbation",))
    else:
        find = Pass("probed", 2 * config.ascent_steps, ("clean",), ("perturbation",))
    perturbed = Pass("perturbed", 1, ("clean", "perturbation"), ("perturbed",))
    see = Pass("seen", 1, ("clean", "perturbation"), ("seen",))
    clean_backward = Pass("clean_backward", 2, ("graph", *terms), (), ("graph",))
    last = Pass("loss", 2, ("clean", "perturbed"))

    if not splits(config, ahead):
        perturbed = perturbed._replace(needs=("graph", "perturbation"))  # which is there, too
        return clean, *teacher, find, perturbed, Pass("loss", 4, ("graph", "perturbed", *terms))
    if config.detach_clean:
        if task and differentiable and not taught:
            falls_out = Pass("fallen_out", 0, ("clean",), ("perturbation",))
            return clean, clean_backward, falls_out, perturbed, last
        if "graph" in find.needs:
            return clean, *teacher, find, clean_backward, perturbed, last
        return clean, *teacher, clean_backward, find, perturbed, last
    if "graph" in find.needs or not find.units or not repeatable:
        whole = clean_backward._replace(needs=("graph", "seen", *terms), frees=("graph", "seen"))
        return clean, *teacher, find, see, whole, perturbed, last
    leave = Pass("leave", 0, ("graph",), (), ("graph",))
    apart = perturbed._replace(name="perturbed_apart")
    perturbed_backward = Pass("perturbed_backward", 2, ("clean", "perturbed"), ("seen",), ("perturbed",))
    again = Pass("clean_again", 1, ("clean",), ("graph",))
    whole = Pass("loss", 2, ("graph", "seen", *terms))
    return clean, *teacher, leave, find, apart, perturbed_backward, again, whole


def splits(config: SmartConfig, ahead: bool) -> bool:
    """Whether a step with a smoothness term has more than one backward pass through weights."""
    return ahead and (config.detach_clean or config.memory == "lean")


def vanilla_steps(plan: tuple[Pass, ...]) -> float:
    """What a plan costs, in vanilla steps."""
    return sum(each.units for each in plan) / VANILLA


def graphs(plan: tuple[Pass, ...]) -> int:
    """How many graphs through the model are there at a time, at most; that of a probe counts."""
    return max(_standing(plan))


def _standing(plan: tuple[Pass, ...]) -> Iterator[int]:
    held: set[str] = set()
    for each in plan:
        held |= set(each.gives)
        yield sum(name in held for name in GRAPHS) + (each.name == "probed")
        held -= set(each.frees)

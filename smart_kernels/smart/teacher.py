"""The momentum teacher: an average of the trainable parameters, run in the student's own module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smart_kernels.ops.ema import ema_update_
from smart_kernels.smart.parallel import bare, local, reshard, sharded_like, sharded_modules, write_shards


class Teacher:
    r"""Shadows of a model's trainable parameters: :math:`\tilde\theta \leftarrow (1-\beta)\theta + \beta\tilde\theta`.

    The mean teacher of SMART (Jiang et al. 2020, arXiv 1911.03437, section 3.2). What the model has frozen, and its
    buffers, have no shadow: the teacher shares them. A parameter that is tied to several places has one. The shadow of
    a sharded parameter (a DTensor, as fully_shard makes them) is sharded alike; each process updates its own part.

    Args:
        model: the student, on its device, wrapped or sharded already, with what is not to be trained frozen.

    Attributes:
        shadows: by parameter name, without what wrappers put before it; fp32, or fp64 for fp64 parameters.
        swapped: whether the model has the teacher's weights at the moment.

    Raises:
        ValueError: the model has no trainable parameter.

    Example:
        >>> import torch
        >>> from smart_kernels.smart.teacher import Teacher
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> teacher = Teacher(model)
        >>> with torch.no_grad():
        ...     start = model.weight.clone()
        ...     _ = model.weight.add_(1.0)  # an optimiser's step
        >>> teacher.update(0.75)
        >>> with teacher.weights():
        ...     print(model.weight.detach() - start)
        tensor([[0.2500, 0.2500]])
    """

    def __init__(self, model: nn.Module) -> None:
        self.swapped = False
        self._students: dict[str, Tensor] = {}
        self._sharded = sharded_modules(model)
        reshard(self._sharded)
        model = bare(model)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("model: has no parameter that requires grad, so there is nothing to average")
        self.shadows = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }

    def update(self, decay: float | Tensor) -> None:
        """Move the shadows towards the parameters, in place; `decay` as in :func:`~smart_kernels.ema_update_`."""
        with torch.no_grad():
            shadows, parameters = ([local(x) for x in d.values()] for d in (self.shadows, self._parameters))
        ema_update_(shadows, parameters, decay)

    def parameters(self) -> dict[str, Tensor]:
        """The shadows by parameter name, each in the dtype of its parameter: copies only where that is another."""
        return {name: shadow.to(self._parameters[name].dtype) for name, shadow in self.shadows.items()}

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The model has the teacher's weights in this context, to be evaluated, saved or copied, not to be trained.

        No parameter is copied unless its dtype is not its shadow's, or it is sharded by fully_shard; what was there
        comes back, whatever happens. All processes of a sharded model enter and leave together.
        """
        if self.swapped:
            raise RuntimeError("teacher: the model has its weights already, in another `teacher.weights()`")
        torch.clear_autocast_cache()  # which holds narrow copies of the student's weights
        self.swapped = True
        try:
            with self._written() if self._sharded else self._swapped():
                yield
        finally:
            self.swapped = False
            self._students = {}
            torch.clear_autocast_cache()

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        students = self._students = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, value in self.parameters().items():
                self._parameters[name].data = value
            yield
        finally:
            for name, value in students.items():
                self._parameters[name].data = value

    @contextmanager
    def _written(self) -> Iterator[None]:
        """The same where every pass gathers the parameters from the memory that their shards lie in."""
        with torch.no_grad():
            shards, shadows = ([local(x) for x in d.values()] for d in (self._parameters, self.shadows))
            students = [shard.clone() for shard in shards]
        self._students = {n: _like(p, x) for (n, p), x in zip(self._parameters.items(), students, strict=True)}
        try:
            write_shards(self._sharded, shards, shadows)
            yield
        finally:
            write_shards(self._sharded, shards, students)

    def students(self) -> dict[str, Tensor]:
        """The student's own weights by parameter name, also while the model has the teacher's; they are not copied."""
        return dict(self._students) if self.swapped else {n: p.detach() for n, p in self._parameters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The shadows by parameter name; they are not copied."""
        return dict(self.shadows)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the shadows to those of a :meth:`state_dict`; a sharded one takes its part of a whole tensor, too.

        Raises:
            ValueError: a name, shape or dtype differs; nothing was changed then.
        """
        differing = [f"{name}: missing" for name in self.shadows.keys() - state.keys()]
        differing += [f"{name}: not in the model, or frozen there" for name in state.keys() - self.shadows.keys()]
        for name in self.shadows.keys() & state.keys():
            for what in ("shape", "dtype"):
                got, expected = getattr(state[name], what, None), getattr(self.shadows[name], what)
                if got != expected:
                    differing.append(f"{name}: got {what} {got}, expected {expected}")
        if differing:
            raise ValueError("state: does not fit the teacher's shadows: " + "; ".join(sorted(differing)))
        for name, shadow in self.shadows.items():
            shadow.copy_(sharded_like(shadow, state[name]))


def _like(parameter: Tensor, shard: Tensor) -> Tensor:
    """A shard as a tensor of the layout of `parameter`."""
    if not hasattr(parameter, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    placed = parameter.device_mesh, parameter.placements
    return DTensor.from_local(shard, *placed, run_check=False, shape=parameter.shape, stride=parameter.stride())

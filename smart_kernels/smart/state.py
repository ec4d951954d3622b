"""What a forward pass changes besides its output, in generators, buffers and attributes, and how to begin it again.

A pass is repeated from where it began, and afterwards all is as the first one left it. What is changed in place is
not put back in place, as a graph may need it as it stands: the repetition works on copies of its own.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

States = list[tuple[Callable[[Any], Any], Any]]
"""States of generators, each with what sets it."""

_TorchGenerator = torch.Generator
_MISSING = object()
_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that torch itself keeps in a module: parameters, hooks, training; `_buffers` is looked at apart."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Of these a first pass may register some, and have an attribute that says so."""
_CONTAINERS = (list, dict, set, deque)
_LARGEST_CONTAINER = 65536
_NESTED = 16384
"""Elements of containers within others that are looked at in all: a list of examples is left alone."""
_LIBRARIES = {
    "accelerate", "builtins", "collections", "datasets", "enum", "functools", "lightning", "lightning_fabric",
    "logging", "numpy", "peft", "pytorch_lightning", "sentence_transformers", "smart_kernels", "tokenizers", "torch",
    "torchmetrics", "transformers", "trl",
}  # fmt: skip
"""Packages whose objects are not looked into."""
_NO_STATE = (nn.Module, Dataset, type, types.FunctionType, types.MethodType)
"""Of a user's classes, what has no state of a pass, or one that is looked at elsewhere."""
_OF_TRAINERS = frozenset({"train_dataset", "eval_dataset"})
"""Attributes of objects that are no modules, which no pass changes."""
_DEPTH = 4
_SMALL = 65536
"""Elements of a tensor up to which it is copied at each step, whether or not it has ever been changed."""


class Generators:
    """The generators of random numbers that a model's passes may draw from.

    They are torch's of the CPU and of the model's devices, Python's `random`, NumPy's global one, and those that a
    module holds as an attribute. States lie on the host, those of a GPU too, so nothing waits for the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.devices = sorted({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}, key=str)
        self._held = {id(v): v for m in model.modules() for v in vars(m).values() if _is_generator(v)}.values()

    def torch_states(self) -> States:
        """Those of torch's default generators."""
        states: States = [(torch.set_rng_state, torch.get_rng_state())]
        for device in self.devices:
            module = torch.get_device_module(device)
            if getattr(module, "is_current_stream_capturing", bool)():
                continue  # a graph that is captured has generators of its own
            states.append((functools.partial(_set_on, module, device), module.get_rng_state(device)))
        return states

    def states(self) -> States:
        """The states of all."""
        states = self.torch_states()
        states.append((random.setstate, random.getstate()))
        if (numpy := sys.modules.get("numpy")) is not None:
            states.append((numpy.random.set_state, numpy.random.get_state()))
        return states + [_state(generator) for generator in self._held]


def _set_on(module: Any, device: torch.device, state: Tensor) -> None:
    module.set_rng_state(state, device)


def set_states(states: States) -> None:
    """Set generators to what :class:`Generators` gave."""
    for setter, state in states:
        setter(state)


def _is_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (_TorchGenerator, random.Random)
    return isinstance(value, kinds if numpy is None else (*kinds, numpy.random.Generator, numpy.random.RandomState))


def _state(generator: Any) -> tuple[Callable[[Any], Any], Any]:
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        return lambda state: setattr(bits, "state", state), bits.state
    return generator.set_state, generator.get_state()


def has_attributes(module: nn.Module) -> bool:
    """Whether a pass may change attributes of a module: torch's own ones have no state but buffers."""
    return type(module) is nn.Module or not type(module).__module__.startswith("torch.nn.")


class Attributes:
    """The attributes of some objects before a pass, and what of them the pass has changed.

    Looked at are buffers, tensors, numbers and whatever else is assigned anew, what lies in lists, dicts and sets, and
    the hooks of modules; of other objects, which attribute they are and not what is in them.

    Args:
        objects: modules, or other objects with attributes.
        dicts: further mappings of names to values, with the names that are looked at.
        changing: ids of the large tensors that are known to change: they are copied before.
    """

    def __init__(
        self,
        objects: Iterable[Any],
        dicts: Iterable[tuple[dict[str, Any], Sequence[str]]] = (),
        changing: set[int] | None = None,
    ) -> None:
        self._changing = set() if changing is None else changing
        self._values: list[tuple[dict[str, Any], dict[str, Any], int]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int, Tensor | None]] = []
        self._contents: dict[int, tuple[Any, Any, dict[int, Any]]] = {}
        self._arrays: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
        self._seen: set[int] = set()
        self._nested = _NESTED
        self._changes: list[tuple[Callable[[], Any], Callable[[], Any]]] = []
        self._originals: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        for one in objects:
            own = vars(one)
            if isinstance(one, nn.Module):
                if one._buffers:
                    self._keep(one._buffers, dict(one._buffers))
                self._hooks += [(own[name], dict(own[name])) for name in _HOOKS if name in own]
                if not has_attributes(one):
                    continue
                self._keep(own, {k: v for k, v in own.items() if k not in _OF_MODULES})
            else:
                self._keep(own, {k: v for k, v in own.items() if k not in _OF_TRAINERS})
        for mapping, names in dicts:
            self._keep(mapping, {name: mapping[name] for name in names if name in mapping}, whole=False)

    def _keep(self, place: dict[str, Any], values: dict[str, Any], whole: bool = True) -> None:
        self._values.append((place, values, len(place) if whole else -1))
        for name, value in values.items():
            if isinstance(value, Tensor):
                if type(value) is not nn.Parameter:
                    copied = not value.requires_grad and (value.numel() <= _SMALL or id(value) in self._changing)
                    self._tensors.append((place, name, value, version(value), value.clone() if copied else None))
            elif _is_array(value):
                self._arrays.append((place, name, value, value.copy()))
            elif isinstance(value, _CONTAINERS):
                self._contained(value, _DEPTH)
            elif _is_of_user(value) and id(value) not in self._seen:
                self._seen.add(id(value))
                self._keep(vars(value), dict(vars(value)))

    def _contained(self, container: Any, depth: int) -> None:
        if id(container) in self._contents or len(container) > _LARGEST_CONTAINER:
            return
        values = container.values() if isinstance(container, dict) else container
        copies = {
            id(v): v.clone() if isinstance(v, Tensor) else v.copy()
            for v in values
            if _is_array(v) or (isinstance(v, Tensor) and not v.requires_grad and v.numel() <= _SMALL)
        }
        self._contents[id(container)] = container, copy.copy(container), copies
        nested = [v for v in values if isinstance(v, _CONTAINERS)] if depth else []
        elements = sum(map(len, nested))
        if elements <= self._nested:
            self._nested -= elements
            for value in nested:
                self._contained(value, depth - 1)

    def find_changes(self) -> None:
        """What the pass has changed, for :meth:`repeated`: to be called when it ends."""
        self._changes, self._originals = [], []
        in_place = set()
        for place, name, tensor, old, kept in self._tensors:
            # what was copied may have been changed by a kernel that does not count, such as batch norm's
            if version(tensor) != old or kept is not None:
                if version(tensor) != old:
                    self._changing.add(id(tensor))
                in_place.add((id(place), name))
                # what was not copied is repeated from where the pass left it; from the next step on it is copied
                start = tensor.detach().clone() if kept is None else kept
                self._changes.append((_copier(place, name, start), _setter(place, name, place.get(name, _MISSING))))
                self._originals.append((place, name, tensor, start))
        for place, before, size in self._values:
            for name, old in before.items():
                new = place.get(name, _MISSING)
                if new is not old and (id(place), name) not in in_place:
                    self._changes.append((_setter(place, name, old), _setter(place, name, new)))
            if size != -1 and (size != len(place) or any(name not in place for name in before)):
                for name in place.keys() - before.keys() - _OF_MODULES - _OF_TRAINERS:
                    self._changes.append((_setter(place, name, _MISSING), _setter(place, name, place[name])))
        for place, name, array, start in self._arrays:
            if not (array == start).all():
                in_place.add((id(place), name))
                self._changes.append((_copier(place, name, start), _setter(place, name, place.get(name, _MISSING))))
        for hooks, old_hooks in self._hooks:
            if hooks.keys() != old_hooks.keys():
                self._changes.append((_filler(hooks, old_hooks, {}), _filler(hooks, dict(hooks), {})))
        for container, before, copies in self._contents.values():
            if copies or not _same(container, before):
                after = copy.copy(container)
                self._changes.append((_filler(container, before, copies), _filler(container, after, {})))

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Around a repetition of the pass: it begins where the pass began, and all ends as the pass left it."""
        for before, _ in self._changes:
            before()
        try:
            yield
        finally:
            for _, after in self._changes:
                after()

    def undo(self) -> None:
        """Be as before the pass, the tensors the same ones."""
        for before, _ in self._changes:
            before()
        for place, name, tensor, start in self._originals:
            tensor.data.copy_(start)
            place[name] = tensor


def reachable(function: Callable[..., Any]) -> tuple[list[Any], list[tuple[dict[str, Any], list[str]]]]:
    """What a function of the user's may change besides the model: its object, and the variables that it names.

    Returns:
        Objects, and dicts with the names in them, for :class:`Attributes`.
    """
    objects, dicts = [], []
    if isinstance(function, types.MethodType):
        objects.append(function.__self__)
        function = function.__func__
    code = getattr(function, "__code__", None)
    if code is not None:
        space = function.__globals__
        names = [
            n
            for n in code.co_names
            if n in space and not isinstance(space[n], types.ModuleType | type | types.FunctionType)
        ]
        dicts.append((space, names))
        found = [space[n] for n in names]
        for cell in function.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # empty
                continue
            dicts.append((_Cell(cell), ["contents"]))
        objects += [part for value in found if isinstance(value, nn.Module) for part in value.modules()]
    return [x for x in objects if hasattr(x, "__dict__")], dicts


class _Cell(dict[str, Any]):
    """A variable of an enclosing function, as a mapping."""

    def __init__(self, cell: types.CellType) -> None:
        super().__init__(contents=cell.cell_contents)
        self._cell = cell

    def __setitem__(self, name: str, value: Any) -> None:
        self._cell.cell_contents = value

    def get(self, name: str, default: Any = None) -> Any:
        return self._cell.cell_contents if name == "contents" else default


def _setter(place: dict[str, Any], name: str, value: Any) -> Callable[[], Any]:
    if value is _MISSING:
        return lambda: place.pop(name, None)
    return lambda: place.__setitem__(name, value)


def _same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, set):
        return bool(container == before)
    if isinstance(container, dict):
        return all(k == j and v is w for (k, v), (j, w) in zip(container.items(), before.items(), strict=True))
    return all(v is w for v, w in zip(container, before, strict=True))


def _again(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value.copy()


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.size <= _SMALL and value.dtype != object


def _is_of_user(value: Any) -> bool:
    """Whether an object is of a class of the user's, which may count something; libraries keep their own state."""
    if isinstance(value, _NO_STATE) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.split(".")[0] not in _LIBRARIES


def _copier(place: dict[str, Any], name: str, tensor: Any) -> Callable[[], Any]:
    return lambda: place.__setitem__(name, _again(tensor))


def _filler(container: Any, contents: Any, copies: dict[int, Any]) -> Callable[[], Any]:
    def value_of(value: Any) -> Any:
        return _again(copies[id(value)]) if id(value) in copies else value

    def fill() -> None:
        container.clear()
        if isinstance(container, dict):
            container.update({k: value_of(v) for k, v in contents.items()})
        elif isinstance(container, set):
            container.update(contents)
        else:
            container.extend(value_of(v) for v in contents)

    return fill


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place, as autograd counts it."""
    return -1 if tensor.is_inference() else tensor._version

"""What a forward pass changes besides its output, in generators, buffers and attributes, and how to begin it again.

A pass is repeated from where it began, and afterwards all is as the first one left it. What is changed in place is
not put back in place, as a graph may need it as it stands: the repetition works on copies of its own.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
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

Assignment = tuple[dict[str, Any], str, Any]
"""Of an attribute: the mapping that it lies in, its name, its value."""

_TorchGenerator = torch.Generator
_MISSING = object()
_OF_MODULES = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
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
_HELPERS = 2
"""How far functions are followed that a user's function names."""
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
    """Whether a pass may change attributes of a module: torch's own ones have no state but buffers, and what hooks set.

    Pruning and the older weight norm are such hooks.
    """
    hooked = module._forward_pre_hooks or module._forward_hooks
    return bool(hooked) or type(module) is nn.Module or not type(module).__module__.startswith("torch.nn.")


class Attributes:
    """The attributes of some objects before a pass, and what of them the pass has changed.

    Looked at are buffers, tensors, numbers and whatever else is assigned anew, what lies in lists, dicts and sets, and
    the hooks of modules; of other objects, which attribute they are and not what is in them.

    Args:
        modules: of the model; whether these are changed between two looks can be asked, see :meth:`moved`.
        objects: modules, or other objects with attributes.
        dicts: further mappings of names to values, with the names that are looked at.
        changing: ids of the large tensors that are known to change: they are copied before.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        objects: Iterable[Any] = (),
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
        self._between: set[tuple[int, str]] = set()  # what was assigned between calls of the model
        self._nested = _NESTED
        self._changes: list[tuple[Callable[[], Any], Callable[[], Any]]] = []
        self._originals: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        for module in modules:
            self._look_into(module)
        self._watched = len(self._values), len(self._tensors), len(self._contents)
        self._last = self._now()
        for one in objects:
            if isinstance(one, nn.Module):
                self._look_into(one)
            else:
                self._keep(vars(one), {k: v for k, v in vars(one).items() if k not in _OF_TRAINERS})
        for mapping, names in dicts:
            self._keep(mapping, {name: mapping[name] for name in names if name in mapping}, whole=False)

    def _look_into(self, module: nn.Module) -> None:
        own = vars(module)
        self._hooks += [(own[name], dict(own[name]) if own[name] else {}) for name in _HOOKS if name in own]
        if module._buffers:
            self._keep(module._buffers, dict(module._buffers))
        if has_attributes(module):
            self._keep(own, {k: v for k, v in own.items() if k not in _OF_MODULES})

    def _now(self) -> tuple[list[dict[str, Any]], list[int], list[Any]]:
        """The modules' attributes as they are: values, how often tensors were changed, what is in containers."""
        values, tensors, contents = self._watched
        return (
            [dict(place) for place, _, _ in self._values[:values]],
            [version(tensor) for _, _, tensor, _, _ in self._tensors[:tensors]],
            [copy.copy(container) for container, _, _ in itertools.islice(self._contents.values(), contents)],
        )

    def moved(self) -> tuple[list[Assignment], bool]:
        """What has become of the modules since this was asked last, or since the beginning.

        Returns:
            What was assigned, and whether anything else was changed: a tensor or a container, or an attribute is gone.
        """
        (values, versions, contents), now = self._last, self._now()
        self._last = now
        pairs = zip(self._values, zip(values, now[0], strict=True), strict=False)
        assigned = [(place, name, new) for (place, *_), (a, b) in pairs for name, new in _assigned(a, b)]
        self._between |= {(id(place), name) for place, name, _ in assigned}
        others = versions != now[1] or not all(_same(a, b) for a, b in zip(contents, now[2], strict=True))
        return assigned, others or any(value is _MISSING for _, _, value in assigned)

    def not_copied(self) -> list[Tensor]:
        """The tensors that are too large to be copied at each step, and not known to change."""
        return [tensor for _, _, tensor, _, kept in self._tensors if kept is None and not tensor.requires_grad]

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
            if version(tensor) != old or kept is not None or id(tensor) in self._changing:
                if version(tensor) != old:
                    self._changing.add(id(tensor))
                in_place.add((id(place), name))
                # what was not copied is repeated from where the pass left it; from the next step on it is copied
                start = tensor.detach().clone() if kept is None else kept
                self._changes.append((_copier(place, name, start), _setter(place, name, place.get(name, _MISSING))))
                self._originals.append((place, name, tensor, start))
        for place, before, size in self._values:
            for name, old in before.items():
                new, key = place.get(name, _MISSING), (id(place), name)
                if (new is not old or key in self._between) and key not in in_place:
                    self._changes.append((_setter(place, name, old), _setter(place, name, new)))
            if size != -1 and (size != len(place) or any(name not in place for name in before)):
                for name in place.keys() - before.keys() - _OF_MODULES - _OF_TRAINERS:
                    self._changes.append((_setter(place, name, _MISSING), _setter(place, name, place[name])))
            for owner, name in self._between:
                if owner == id(place) and name not in before and name not in place:  # it was there for a while
                    self._changes.append((_setter(place, name, _MISSING), _setter(place, name, _MISSING)))
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
    """What a function of the user's may change besides the model: its object, its defaults, the variables it names.

    So of the functions of the user's that it wraps or names, and that those name.

    Returns:
        Objects, and dicts with the names in them, for :class:`Attributes`.
    """
    objects: list[Any] = []
    dicts: list[tuple[dict[str, Any], list[str]]] = []
    waiting: deque[tuple[Any, int]] = deque([(function, 0)])
    seen: set[int] = set()
    while waiting:
        one, depth = waiting.popleft()
        if id(one) in seen or depth > _HELPERS:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            given = [*one.args, *one.keywords.values()]
            waiting.append((one.func, depth))
        elif isinstance(one, types.MethodType):
            given = []
            objects.append(one.__self__)
            waiting.append((one.__func__, depth))
        elif isinstance(one, types.FunctionType):
            given = [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
            named = [*_variables(one)]
            dicts += named
            found = [space.get(name) for space, names in named for name in names] + _functions(one)
            waiting += [(x, depth + 1) for x in found if isinstance(x, types.FunctionType) and not _of_library(x)]
            objects += [part for x in found if isinstance(x, nn.Module) for part in x.modules()]
        else:  # an object that can be called
            given = []
            objects.append(one)
            waiting.append((type(one).__call__, depth))
        dicts.append(({str(i): x for i, x in enumerate(given)}, [str(i) for i in range(len(given))]))
        objects += [part for x in given if isinstance(x, nn.Module) for part in x.modules()]
    return [x for x in objects if hasattr(x, "__dict__")], dicts


def _variables(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The variables that a function names, of its module and of the functions around it."""
    space = function.__globals__
    no_state = types.ModuleType | type | types.FunctionType
    yield space, [n for n in function.__code__.co_names if n in space and not isinstance(space[n], no_state)]
    for cell in function.__closure__ or ():
        try:
            yield _Cell(cell), ["contents"]
        except ValueError:  # empty
            continue


def _functions(function: types.FunctionType) -> list[Any]:
    """The functions of its module that a function names."""
    space = function.__globals__
    return [space[n] for n in function.__code__.co_names if isinstance(space.get(n), types.FunctionType)]


def _of_library(value: Any) -> bool:
    return str(getattr(value, "__module__", None) or type(value).__module__).split(".")[0] in _LIBRARIES


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


def _assigned(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any]]:
    """The attributes that are others, but for those that torch keeps in a module."""
    if len(before) == len(after) and all(map(operator.is_, before.values(), after.values())):
        return []
    names = sorted((before.keys() | after.keys()) - _OF_MODULES)
    pairs = ((name, after.get(name, _MISSING)) for name in names)
    return [(name, new) for name, new in pairs if before.get(name, _MISSING) is not new]


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
    return not _of_library(type(value))


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


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """A number for each, which is another where a bit was changed, in all likelihood: to be compared.

    Writes by ``.data`` do not count as changes in place (:func:`version`), but are seen so.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = []
    for x in tensors:
        flat = x.detach().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        found.append(flat.view(kinds[flat.itemsize]).sum(dtype=torch.int64))
    return (
        torch.stack([x.cpu() for x in found]) if found else torch.empty(0)
    )  # all are under way before one is waited for


def plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that can be read: no part of a sharded one, nothing quantised."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type != "meta"


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place, as autograd counts it."""
    return -1 if tensor.is_inference() else tensor._version

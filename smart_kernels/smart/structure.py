"""Structures of tensors, as models take and give them: walked, rebuilt, copied."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, range, slice, type)
"""Classes of what has no state that a pass could change."""


class Filled:
    """In recorded arguments: a mapping of another class than dict, or an object with fields, and what is in it."""

    __slots__ = ("contents", "like")

    def __init__(self, like: Any, contents: dict[Any, Any]) -> None:
        self.like = like
        self.contents = contents


def _fields(x: Any) -> dict[Any, Any] | None:
    """What is in a mapping or an object with fields; None where it is neither."""
    if isinstance(x, Mapping):
        return dict(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if hasattr(x, f.name)}
    return None


def _shallow(x: Any) -> Any:
    new = copy.copy(x)
    if isinstance(new, UserDict):
        new.data = dict(new.data)
    return new


def _refilled(filled: Filled, contents: dict[Any, Any]) -> Any:
    new = _shallow(filled.like)
    for key, value in contents.items():
        if isinstance(new, Mapping):
            new[key] = value  # type: ignore[index]
        else:
            object.__setattr__(new, key, value)
    return new


def mapped(x: Any, function: Callable[[Any], Any], keep: bool = False) -> Any:
    """A structure of new containers, the function applied to what is in them.

    Args:
        x: tuples, lists, dicts, other mappings, objects with fields.
        function: of what is no container.
        keep: make what :func:`mapped` makes the containers anew of.
    """
    if isinstance(x, Filled):
        return _refilled(x, {k: mapped(v, function, keep) for k, v in x.contents.items()})
    if type(x) in (tuple, list):
        return type(x)([mapped(v, function, keep) for v in x])
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return tuple.__new__(type(x), [mapped(v, function, keep) for v in x])  # its own __new__ may compute
    if type(x) is dict:
        return {k: mapped(v, function, keep) for k, v in x.items()}
    if keep and (contents := _fields(x)) is not None:
        return Filled(_shallow(x), {k: mapped(v, function, keep) for k, v in contents.items()})
    return function(x)


def leaves(x: Any) -> Iterator[Any]:
    """What is in a structure, mappings and objects with fields among it."""
    if isinstance(x, tuple | list):
        for v in x:
            yield from leaves(v)
    elif (contents := x.contents if isinstance(x, Filled) else _fields(x)) is not None:
        for v in contents.values():
            yield from leaves(v)
    else:
        yield x


def tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in a structure."""
    return (v for v in leaves(x) if isinstance(v, Tensor))


class _Copies(TorchFunctionMode):
    """Within, a deep copy has new tensors, but for those with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **kwargs or {})
        x, memo = args
        if x.requires_grad:
            self.graph |= x.grad_fn is not None
            return x
        if id(x) not in memo:
            memo[id(x)] = x.detach().clone()
        return memo[id(x)]


def copied(x: Any) -> tuple[Any, bool]:
    """A copy that shares nothing which a pass may change, and whether a tensor with a graph is in it, not copied.

    What cannot be copied is in it as it is.
    """
    with _Copies() as mode:
        memo: dict[int, Any] = {}

        def one(value: Any) -> Any:
            if isinstance(value, (*PLAIN, nn.Module)):
                return value
            try:
                return copy.deepcopy(value, memo)
            except Exception:  # whatever a user's class raises, such as a lock or a generator in it
                return value

        return mapped(x, one), mode.graph


def replaced(x: Any, function: Callable[[Any], Any]) -> Any:
    """A structure like `x`, the function applied to what is in its containers; those of a class are copied."""
    return mapped(mapped(x, lambda v: v, keep=True), function)

"""The operator library `smart_kernels`: a schema per op, and the kernels that serve it.

The dispatcher chooses the kernel by device. Compiled kernels (`csrc/`) register themselves when their
extension module is loaded; Triton kernels serve CUDA and ROCm and are imported when first called; the
eager function of `reference.py` serves every device that has no kernel of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "smart_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPS: dict[str, str] = {}
"""Every op's name, and what serves it on a GPU: "Triton" or "CUDA"."""


def define(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], triton: str | None = None) -> Any:
    """Define an op and return its overload, `torch.ops.smart_kernels.<name>.default`.

    Args:
        schema: the op's schema, `name(Tensor x, ...) -> ...`.
        reference: eager function of the same signature, for devices without a kernel.
        fake: function of the same signature that returns outputs of the right shape, dtype and device.
        triton: "module:function" of the Triton launcher; None where a GPU is served in another way.
    """
    LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    OPS[name] = "CUDA" if triton is None else "Triton"
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if triton is not None:
        serve_by_triton(name, triton)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def serve_by_triton(op: str, launcher: str) -> bool:
    """Let a Triton launcher, "module:function", serve an op on GPUs; False where there is no Triton."""
    found = importlib.util.find_spec("triton") is not None
    if found:
        LIBRARY.impl(op, _Lazy(launcher), "CUDA")
    return found


class _Lazy:
    """A launcher that is imported when first called: importing Triton costs half a second."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.function: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.function is None:
            module, name = self.path.split(":")
            self.function = getattr(importlib.import_module(module), name)
        return self.function(*args)


def no_derivative(op: str, what: str) -> None:
    """Make a derivative of a functional op's outputs an error, never a silent zero."""

    def backward(_ctx: Any, *_grads: Any) -> Any:
        raise RuntimeError(f"smart_kernels: {what} has no derivative: a second derivative was asked for")

    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, lib=LIBRARY)


def changes_arguments(op: Any, what: str) -> None:
    """Give an op that changes arguments what autograd does for a native one in place.

    The version counters of what it changes are bumped, so that a backward which saved the old values raises;
    and where autograd would have to record the change, for a leaf above all, it is refused.
    """
    changed = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def refuse(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise RuntimeError(
                f"smart_kernels: {what} has no derivative: detach its arguments, or call it in no_grad mode"
            )
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def bump(keyset: Any, *args: Any) -> Any:
        for i in changed:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    name = op._schema.name
    LIBRARY.impl(name, refuse, "Autograd", with_keyset=True)
    LIBRARY.impl(name, bump, "ADInplaceOrView", with_keyset=True)


def draw_seed(generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """64 random bits on a device, drawn there by its own generator: nothing waits, and a graph can replay it."""
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, expected torch.Generator or None")
        if generator.device.type not in ("cpu", device.type):
            raise ValueError(f"generator: got device {generator.device}, expected {device}, as the tensors, or cpu")
    place = device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (), device=place, generator=generator)
    return seed.to(device, non_blocking=True)  # from the CPU's pageable memory: no wait, and no hazard


def load_compiled() -> dict[str, str | None]:
    """Load the compiled kernels; for each extension module, None, or why it is not there."""
    status: dict[str, str | None] = {}
    for module in ("_C", "_C_cuda"):
        try:
            importlib.import_module(f"{NAMESPACE}.{module}")
            status[module] = None
        except ImportError as error:
            status[module] = str(error)
    return status


def empty_cache() -> int:
    """Give the memory back that the CPU kernels keep for their next large results.

    Fresh memory costs about as much time as what is computed into it. Tensors of 128 KiB and more that these kernels
    return leave theirs, when they are gone, to the next of about their size; of 32 such tensors at most, and no more
    than 256 MiB. Their storages cannot be resized. On GPUs that is the business of torch's own allocator
    (:func:`torch.cuda.empty_cache`).

    Returns:
        How many bytes were kept.

    Example:
        >>> import torch
        >>> from smart_kernels import empty_cache, symmetric_kl_grad
        >>> before = empty_cache()
        >>> grad = symmetric_kl_grad(torch.randn(64, 32768), torch.randn(64, 32768))
        >>> del grad
        >>> empty_cache() in (8 << 20, 0)  # 0 before torch 2.11, and with no compiled kernels
        True
    """
    compiled = sys.modules.get(f"{NAMESPACE}._C")
    return 0 if compiled is None else compiled.empty_cache()

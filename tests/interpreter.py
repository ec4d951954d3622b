"""Triton's interpreter for tests, in half the time: what it does again and again for the same shapes it does once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_the_language_once() -> None:
    """Keep what the interpreter has put into `triton.language`.

    It does so for each launch, and again at each call of a jitted function within a kernel, which takes a third of the
    time. The process is one in which nothing is compiled, so that nobody needs the language as it was.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    class Kept:
        def restore(self) -> None:
            """Nothing: it stays."""

    def once(fn: Any) -> Kept:
        languages = frozenset(m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core)
        if languages not in patched:
            patch(fn)
            patched.add(languages)
        return Kept()

    interpreter._patch_lang = once


def remember_shapes() -> None:
    """The interpreter's time goes into shapes and types, of which a kernel has a few: each is worked out once."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    numpy_type, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    of_block, make = tl.block_type.__init__, tl.tensor.__init__
    numpy_types: dict[str, Any] = {}
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, dict[str, Any]] = {}

    def numpy_type_once(type: Any) -> Any:
        name = type.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(type)
        return numpy_types[name]

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        if sizes_of(lhs.type) == sizes_of(rhs.type):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def sizes_of(type: Any) -> Any:
        return vars(type).get("sizes", ())

    def type_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([int(getattr(size, "value", size)) for size in shape])
        key = element_ty.name, sizes
        if key not in types:
            of_block(self, element_ty, shape)
            types[key] = {**vars(self), "sizes": sizes}
        vars(self).update(types[key], element_ty=element_ty)

    def shape_once(self: Any, handle: Any, type: Any) -> None:
        key = sizes_of(type)
        if key not in shapes:
            make(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype = numpy_type_once
    TritonSemantic.broadcast_impl_value = broadcast_unless_alike
    tl.block_type.__init__ = type_once
    tl.tensor.__init__ = shape_once

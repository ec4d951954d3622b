"""Triton's interpreter for tests, a third faster: it puts its own functions into the language once."""

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

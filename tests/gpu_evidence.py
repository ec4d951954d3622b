"""Triton and CUDA kernels executed on a machine with no GPU. (What their compiled code says: benchmarks/gpu_code.py.)

The launches are taken from the launchers themselves, called with CPU tensors, so that what is executed is what a card
would run: the same tiles, warps and specialisation of the arguments.

    with executed(ptxrun(), approx_ulp=2):
        out = launcher(*tensors)
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from triton.runtime.jit import JITFunction

import gpu_code


def nvcc() -> None:
    """Without CUDA's compiler the calling test is skipped."""
    try:
        gpu_code.nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def ptxrun() -> ModuleType:
    """The executor of compiled PTX, an external tool; without it the calling test is skipped."""
    folder = Path(os.environ.get("PTXRUN", Path(__file__).parents[2] / "shared" / "ptxrun"))
    if not (folder / "ptxrun.py").is_file():
        pytest.skip(f"no ptxrun in {folder}: name its folder in PTXRUN to execute the compiled kernels")
    if shutil.which("gcc") is None:
        pytest.skip("ptxrun needs gcc")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("ptxrun")
    finally:
        sys.path.remove(str(folder))


@contextmanager
def executed(
    tool: ModuleType, arch: int = 90, replaced: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[list[Any]]:
    """Inside, a launch with CPU tensors executes the kernel's PTX on the CPU, with every access checked.

    Args:
        tool: what `ptxrun` returned.
        arch: compute capability that the PTX is compiled for, times ten.
        replaced: arguments by name, in place of what the launcher passes.
        **options: ptxrun's own: `racecheck`, `approx_ulp`, `order`, `seed`.

    Yields:
        A list that receives the statistics of each launch (`races`, `instructions`, `ptx`).
    """
    launches: list[Any] = []

    def execute(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = set(self.arg_names)
        bound = self.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in names})
        bound.apply_defaults()
        bound.arguments.update(replaced or {})
        settings = {name: value for name, value in kwargs.items() if name not in names}
        constants = {p.name: bound.arguments[p.name] for p in self.params if p.is_constexpr}
        passed = {name: value for name, value in bound.arguments.items() if name not in constants}
        num_warps, num_stages = settings.pop("num_warps", 4), settings.pop("num_stages", 3)
        launches.append(
            tool.run_triton(
                self, grid, passed, constants, num_warps=num_warps, num_stages=num_stages, arch=arch,
                compile_options=settings, **options,
            )
        )  # fmt: skip

    with mock.patch.object(JITFunction, "run", execute):
        yield launches

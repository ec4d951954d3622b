"""What Triton and CUDA kernels show on a machine with no GPU: their compiled code read, and executed.

For Triton, both ways take the launches from the launchers themselves, called with CPU tensors, so that what is
looked at is what a card would get: the same tiles, warps and specialisation of the arguments.

    for evidence in ahead_of_time("sm_90", launcher, *tensors):
        assert evidence.spills == 0 and evidence.loads[16] > 0

    with executed(ptxrun(), approx_ulp=2):
        out = launcher(*tensors)
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Evidence:
    """What the machine code of one compiled kernel says."""

    kernel: str
    target: str
    registers: int
    """Vector registers of a thread (on AMD, architectural and accumulation ones together)."""
    spills: int
    """Bytes of local (NVIDIA) or scratch (AMD) memory of a thread, plus registers spilled into others."""
    shared: int
    """Bytes of shared memory of a program."""
    warps: int
    opcodes: Counter[str]
    """How often each machine instruction, with its modifiers, stands in the code."""

    @property
    def loads(self) -> Counter[int]:
        """Instructions that read global memory, by the bytes that a thread reads with one."""
        return self._accesses(r"LDG(STS)?\b", r"(global|buffer|flat)_load_")

    @property
    def stores(self) -> Counter[int]:
        """Instructions that write global memory, by the bytes that a thread writes with one."""
        return self._accesses(r"STG\b", r"(global|buffer|flat)_store_")

    def _accesses(self, nvidia: str, amd: str) -> Counter[int]:
        widths: Counter[int] = Counter()
        for opcode, count in self.opcodes.items():
            if re.match(nvidia, opcode):
                bits = re.search(r"\.(?:[US]?(8|16)|(64|128|256))(?:\.|$)", opcode)
                widths[int(bits[1] or bits[2]) // 8 if bits else 4] += count
            elif re.match(amd, opcode):
                name = re.sub(amd, "", opcode)
                if words := re.match(r"dword(?:x(\d))?", name):
                    widths[4 * int(words[1] or 1)] += count
                else:
                    widths[1 if "byte" in name else 2] += count
        return widths


def ahead_of_time(target: str, launcher: Callable[..., Any], *args: Any) -> list[Evidence]:
    """Compile every kernel that `launcher(*args)` launches, for a GPU that is not there, and read the code."""
    return [_read(kernel, target) for kernel in compiled(target, launcher, *args)]


def ahead_of_time_cuda(target: str, source: str, *include: Path) -> Evidence:
    """Compile CUDA source with one kernel by nvcc, for a GPU that is not there, and read the code."""
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        text.write_text(source)
        flags = ["-O3", "-std=c++20", f"-arch={target}", *(f"-I{path}" for path in include)]
        _run(nvcc(), "-cubin", *flags, str(text), "-o", str(cubin))
        registers, spills, opcodes = _read_nvidia({"cubin": cubin.read_bytes()})
    return Evidence("cuda", target, registers, spills, 0, 0, opcodes)


def nvcc() -> str:
    """CUDA's compiler; without it the calling test is skipped."""
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc on the PATH or in NVCC")
    return found


def compiled(target: str, launcher: Callable[..., Any], *args: Any) -> list[Any]:
    """The kernels that `launcher(*args)` launches, as Triton compiles them for a target."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    absent = mock.Mock()
    absent.get_current_target.return_value = TARGETS[target]
    absent.get_current_device.return_value = target  # Triton's key for the kernels it keeps in memory
    before = driver._active
    driver.set_active(absent)
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            launcher(*args)
    finally:
        driver._active = before
    return kernels


def _read(kernel: Any, target: str) -> Evidence:
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spills, opcodes = read(kernel.asm)
    return Evidence(
        kernel.metadata.name, target, registers, spills, kernel.metadata.shared, kernel.metadata.num_warps, opcodes
    )


def _read_nvidia(asm: Any) -> tuple[int, int, Counter[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    opcodes = Counter(re.findall(r"^\s*/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"]), opcodes


def _read_amd(asm: Any) -> tuple[int, int, Counter[str]]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        assert found, f"no .{name} in the assembly"
        return int(found[1])

    spills = sum(map(field, ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")))
    opcodes = Counter(re.findall(r"^\t([a-z]+_[\w]+)", text, re.MULTILINE))
    return field("vgpr_count"), spills, opcodes


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
def executed(tool: ModuleType, arch: int = 90, **options: Any) -> Iterator[list[Any]]:
    """Inside, a launch with CPU tensors executes the kernel's PTX on the CPU, with every access checked.

    Args:
        tool: what `ptxrun` returned.
        arch: compute capability that the PTX is compiled for, times ten.
        **options: ptxrun's own: `racecheck`, `approx_ulp`, `order`, `seed`.

    Yields:
        A list that receives the statistics of each launch (`races`, `instructions`, `ptx`).
    """
    launches: list[Any] = []

    def execute(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = set(self.arg_names)
        bound = self.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in names})
        bound.apply_defaults()
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

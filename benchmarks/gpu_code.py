"""GPU kernels compiled for cards that are not there, and what their machine code says.

For Triton, the launches are taken from the launchers themselves, called with CPU tensors, so that what is looked at
is what a card would get: the same tiles, warps and specialisation of the arguments.

    for kernel in ahead_of_time("sm_90", launcher, *tensors):
        assert kernel.spills == 0 and kernel.loads[16] > 0

Instructions per thread are counted in the disassembly: what stands in a loop as often as the loop goes round, which
the launch knows, and everything else once, whether a branch leads around it or not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

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
_NVIDIA_LOAD, _NVIDIA_STORE = r"LDG(STS)?\b", r"STG\b"
_AMD_LOAD, _AMD_STORE = r"(global|buffer|flat)_load_", r"(global|buffer|flat)_store_"


@dataclass(frozen=True)
class Code:
    """What the machine code of one compiled kernel says, and how it is launched."""

    kernel: str
    target: str
    registers: int
    """Vector registers of a thread (on AMD, architectural and accumulation ones together)."""
    spills: int
    """Bytes of local (NVIDIA) or scratch (AMD) memory of a thread, plus registers spilled into others."""
    shared: int
    """Bytes of shared memory of a program."""
    scratch: int
    """Bytes of global memory that a launch would have to allocate for a program."""
    threads: int
    """Threads of a program."""
    opcodes: Counter[str]
    """How often each machine instruction, with its modifiers, stands in the code."""
    loops: tuple[Counter[str], ...]
    """The same for the body of each loop."""
    programs: int
    """How many the launch has."""
    constants: Mapping[str, Any]
    """The launch's arguments by name."""

    @property
    def loads(self) -> Counter[int]:
        """Instructions that read global memory, by the bytes that a thread reads with one."""
        return accesses(self.opcodes, _NVIDIA_LOAD, _AMD_LOAD)

    @property
    def stores(self) -> Counter[int]:
        """Instructions that write global memory, by the bytes that a thread writes with one."""
        return accesses(self.opcodes, _NVIDIA_STORE, _AMD_STORE)

    def executed(self, rounds: int = 1, bytes_a_round: int = 0) -> Counter[str]:
        """How often a thread executes each instruction, at most.

        Args:
            rounds: how often a program goes round each loop of the source.
            bytes_a_round: what a program reads in a round; by that is found how many rounds the compiler has
                unrolled into one. A loop that reads nothing is none of the source's: it waits, or adds to memory.

        Raises:
            ValueError: none of the loops is one of the source's.
        """
        if rounds == 1:
            return self.opcodes
        counts = Counter(self.opcodes)
        reading = 0
        for body in self.loops:
            read = sum(width * n for width, n in accesses(body, _NVIDIA_LOAD, _AMD_LOAD).items()) * self.threads
            if read:
                reading += 1
                times = -(-rounds // max(1, read // bytes_a_round))
                for opcode, n in body.items():
                    counts[opcode] += (times - 1) * n
        if not reading:
            raise ValueError(f"{self.kernel} for {self.target}: no loop reads global memory, but {rounds} rounds do")
        return counts


def accesses(opcodes: Counter[str], nvidia: str, amd: str) -> Counter[int]:
    """The instructions that match, by the bytes of a thread."""
    widths: Counter[int] = Counter()
    for opcode, count in opcodes.items():
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


# ------------------------------------------------------------------------------------------------ compilation


def ahead_of_time(target: str, launcher: Callable[..., Any], *args: Any) -> list[Code]:
    """Compile every kernel that `launcher(*args)` launches, for a GPU that is not there, and read the code."""
    found: list[Code] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = dict(zip(self.arg_names, args, strict=False)) | kwargs
        read = _read_amd if target.startswith("gfx") else _read_nvidia
        registers, spills, opcodes, loops = read(kernel.asm)
        known = kernel.metadata
        # what a target has none of, some releases of Triton leave out
        scratch = sum(getattr(known, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
        size = (known.shared, scratch, known.num_warps * TARGETS[target].warp_size)
        found.append(Code(known.name, target, registers, spills, *size, opcodes, loops, grid[0], constants))

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
    return found


def ahead_of_time_cuda(target: str, source: str, threads: int, *include: Path) -> Code:
    """Compile CUDA source with one kernel by nvcc, for a GPU that is not there, and read the code.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        text.write_text(source)
        flags = ["-O3", "-std=c++20", f"-arch={target}", *(f"-I{path}" for path in include)]
        _run(nvcc(), "-cubin", *flags, str(text), "-o", str(cubin))
        registers, spills, opcodes, loops = _read_nvidia({"cubin": cubin.read_bytes()})
    return Code("cuda", target, registers, spills, 0, 0, threads, opcodes, loops, 0, {})


def nvcc() -> str:
    """CUDA's compiler.

    Raises:
        FileNotFoundError: there is none.
    """
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if found is None:
        raise FileNotFoundError("no nvcc on the PATH or in NVCC")
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---------------------------------------------------------------------------------------------------- reading

Read = tuple[int, int, Counter[str], tuple[Counter[str], ...]]


def _read_nvidia(asm: Any) -> Read:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    line = r"^(?:(\.L\w+):|\s*/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*))"
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"]), *_loops(line, r"\((\.L\w+)\)", "BRA", sass)


def _read_amd(asm: Any) -> Read:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        assert found, f"no .{name} in the assembly"
        return int(found[1])

    spills = sum(map(field, ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")))
    line = r"^(?:(\.LBB\w+):|\t([a-z]+_\w+)([^;\n]*))"
    return field("vgpr_count"), spills, *_loops(line, r"(\.LBB\w+)", r"s_c?branch", text)


def _loops(line: str, target: str, branch: str, text: str) -> tuple[Counter[str], tuple[Counter[str], ...]]:
    """All instructions, and those from each label up to the branch that leads back to it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    bodies: list[tuple[int, int]] = []
    for label, opcode, operands in re.findall(line, text, re.MULTILINE):
        if label:
            labels[label] = len(opcodes)
            continue
        opcodes.append(opcode)
        back = re.search(target, operands) if re.match(branch, opcode) else None
        # a branch to itself fills up the end of the code
        if back and (begin := labels.get(back[1], len(opcodes))) < len(opcodes) - 1:
            bodies.append((begin, len(opcodes)))
    return Counter(opcodes), tuple(Counter(opcodes[begin:end]) for begin, end in sorted(set(bodies)))

"""How fast the symmetric KL could be at most on this CPU: its loads and stores, with next to no arithmetic.

Long rows are read twice, as a softmax needs its sum before anything that follows from it, and the gradients written
once; in between exponentials may wait in the gradients' place. A loop that does that and nothing else, compiled for
this very machine, on as many threads, into memory that stands, is what no kernel of that kind can pass. How many times
faster than torch.compile it is bounds how many times faster anything can be. A second loop has the least arithmetic as
well, the two exponentials of each class and the gradients, and takes no care: no maximum is subtracted, no digit saved.

Where rows are few or short, what autograd takes by itself decides. A sum of products, which has two gradients and no
arithmetic to speak of, shows it for what PyTorch itself has in C++; a function in Python, as any op is that does not
depend on one version of PyTorch, shows it for one that makes its results' memory and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import Peer

KIND = "loads and stores alone"
CARELESS = "no care for digits"

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def library() -> ctypes.CDLL:
    """The loops, compiled for this machine.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("limit: no C++ compiler was found; set CXX")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "limit.so")
        command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"limit: {' '.join(command)} failed:\n{done.stderr}")
        return ctypes.CDLL(str(made))


def loop(way: str, threads: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The loop for two contiguous tensors of fp32 or bf16 logits (N, C), its results in tensors that stand.

    Args:
        way: "waiting", with something in the place of exponentials that waits between the readings; "anew"; or
            "careless", with exponentials that wait and the symmetric KL's gradients, of logits below 80.
        threads: among whom the rows are divided.
    """
    pool = ThreadPoolExecutor(threads)

    @functools.cache
    def results(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
        gradients = torch.zeros(2, *shape, dtype=dtype)
        return gradients[0], gradients[1], [torch.zeros(2 * shape[1]) for _ in range(threads)]

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        to_a, to_b, scratch = results(a.shape, a.dtype)
        function = getattr(library(), f"{str(a.dtype).removeprefix('torch.')}_{way}")
        rows, cols = a.shape
        edges = [rows * k // threads for k in range(threads + 1)]

        def part(k: int) -> None:
            begin, end = edges[k], edges[k + 1]
            places = [x[begin:].data_ptr() for x in (a, b, to_a, to_b)]
            numbers = ctypes.c_int64(end - begin), ctypes.c_int64(cols)
            function(*map(ctypes.c_void_p, [*places, scratch[k].data_ptr()]), *numbers)  # without Python's lock

        others = [pool.submit(part, k) for k in range(1, threads)]
        part(0)
        for other in others:
            other.result()
        return to_a, to_b

    return run


def product(a: Tensor, b: Tensor) -> Tensor:
    """The least that a loss of two tensors can do."""
    return (a * b).sum()


class Nothing(torch.autograd.Function):
    """The least that an op can do whose derivative is known to Python: memory for a loss and two gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.gradients = torch.empty_like(a), torch.empty_like(b)
        return a.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        _ = ctx.saved_tensors  # looks whether they were changed
        gradients: tuple[Tensor, Tensor] = ctx.gradients
        return gradients


def of_short_rows() -> list[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Names and functions of two tensors whose forward and backward pass no loss can pass."""
    return [(f"{KIND}, by autograd", product), ("nothing at all, by Python", Nothing.apply)]


def of_long_rows() -> list[Peer]:
    """The loops without arithmetic, of which the faster is the limit, and the one with the least of it."""
    ways = {"waiting": f"{KIND}, waiting", "anew": f"{KIND}, anew", "careless": CARELESS}
    threads = torch.get_num_threads()
    return [Peer(name, loop(way, threads), CARELESS if name == CARELESS else KIND) for way, name in ways.items()]

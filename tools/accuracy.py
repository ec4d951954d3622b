"""Measures every op, dtype and backend against extended precision, and writes the table of docs/accuracy.md.

    python tools/accuracy.py                      # all backends; the Triton column needs ptxrun, as some tests do
    python tools/accuracy.py --backend avx2       # one of them, as JSON

Each backend runs in a process of its own, through the public functions. For "triton" the launchers are registered for
CPU tensors, and what they launch is executed from the PTX for sm_90, its approximate instructions off by up to 2 units
in the last place. "usual" is what one would write in PyTorch. Nothing is asserted: that is what the tests are for.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "accuracy.md"
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]

BACKENDS = {
    "usual": "PyTorch, as usual",
    "eager": "eager",
    "avx512": "C++, AVX-512",
    "avx2": "C++, AVX2",
    "baseline": "C++, baseline",
    "triton": "Triton",
}
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
F64, F32, BF16, F16 = NAMES
DISTANCES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0)
CLASSES = (2, 3, 33, 200, 1000, 30522)
Figure = tuple[str, str, float]
"""What, in which dtype, the worst of its cases."""


@contextlib.contextmanager
def serving(name: str) -> Iterator[None]:
    """The public functions are served by this backend inside; to be entered before they are imported."""
    if name in ("usual", "eager", "triton"):
        sys.modules["smart_kernels._C"] = None  # type: ignore[assignment]
        sys.modules["smart_kernels._C_cuda"] = None  # type: ignore[assignment]
    if name != "triton":
        yield
        return
    define = torch.library.Library.impl

    def also_on_the_cpu(library: Any, op: Any, function: Any, key: str = "", **options: Any) -> None:
        define(library, op, function, key, **options)
        if key == "CUDA":
            define(library, op, function, "CPU", **options)

    torch.library.Library.impl = also_on_the_cpu  # type: ignore[method-assign]
    import gpu_evidence  # only now, as it imports what is defined

    with gpu_evidence.executed(gpu_evidence.ptxrun(), approx_ulp=2):
        yield


def worst(error: np.ndarray, size: np.ndarray | float = 1.0) -> float:
    """The largest error over the size, where that is not 0."""
    size = np.broadcast_to(np.asarray(size), error.shape)
    return float((np.abs(error)[size > 0] / size[size > 0]).max(initial=0))


def norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x.astype(np.float64) ** 2).sum(-1))


# ------------------------------------------------------------------------------------------------------ the ops


def two_kl(a: torch.Tensor, b: torch.Tensor, reduction: str) -> torch.Tensor:
    p, q = (F.log_softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    return (F.kl_div(q, p.exp(), reduction=reduction) + F.kl_div(p, q.exp(), reduction=reduction)).sum(-1)


def of_symmetric_kl(backend: str) -> Iterator[Figure]:
    """Loss of a row and, in their norm, its gradients, relative; those in 16 bits in units in their last place."""
    from oracle import Divergence, ulp, wide

    from smart_kernels import symmetric_kl, symmetric_kl_grad

    def off(grad: torch.Tensor, exact: np.ndarray) -> float:
        error = wide(grad) - exact
        return worst(error / ulp(exact, grad.dtype)) if grad.dtype.itemsize == 2 else worst(norm(error), norm(exact))

    for dtype, name in NAMES.items():
        loss_off, both_off, one_off = [], [], []
        for cols, distance in itertools.product(CLASSES, DISTANCES):
            b = 2 * torch.randn(1 if cols > 1000 else 5, cols, dtype=torch.float64)
            a = (b + distance * torch.randn_like(b)).to(dtype).requires_grad_()
            b = b.to(dtype).requires_grad_()
            truth = Divergence(a, b)
            loss = (two_kl if backend == "usual" else symmetric_kl)(a, b, reduction="none")
            grads = torch.autograd.grad(loss.sum(), (a, b))
            loss_off.append(worst(wide(loss) - truth.loss, truth.loss))
            both_off += map(off, grads, truth.grads)
            if backend != "usual":
                one_off.append(off(symmetric_kl_grad(a.detach(), b.detach(), reduction="sum"), truth.grads[0]))
        of_gradient = "units in the last place" if dtype.itemsize == 2 else "relative"
        yield "`symmetric_kl`, relative", name, max(loss_off)
        yield f"gradients of `symmetric_kl`, {of_gradient}", name, max(both_off)
        if one_off:
            yield f"`symmetric_kl_grad`, {of_gradient}", name, max(one_off)


def of_linear_divergence(backend: str) -> Iterator[Figure]:
    """Loss, and in their norm its gradients at hidden states and head, relative; hidden states a share of their size
    apart."""
    from oracle import LinearDivergence, wide

    from smart_kernels import linear_divergence

    for dtype, name in NAMES.items():
        loss_off, hidden_off, head_off = [], [], []
        for cols, distance in itertools.product((3, 200, 1000), (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)):
            if distance < torch.finfo(dtype).eps:
                continue  # no number of the dtype lies there
            b = torch.randn(5, 48, dtype=torch.float64)
            a, b = (x.to(dtype).requires_grad_() for x in (b + distance * torch.randn_like(b), b))
            head = (torch.randn(cols, 48, dtype=torch.float64) / 5).to(dtype).requires_grad_()
            truth = LinearDivergence(a, b, head, torch.zeros(cols, dtype=dtype))
            if backend == "usual":
                loss = two_kl(a @ head.t(), b @ head.t(), "none")
            else:
                loss = linear_divergence(a, b, head, reduction="none")
            grads = torch.autograd.grad(loss.sum(), (a, b, head))
            loss_off.append(worst(wide(loss) - truth.loss, truth.loss))
            of_a, of_b, of_head = (wide(g) - exact for g, exact in zip(grads, truth.grads, strict=False))
            hidden_off += [worst(norm(e), norm(exact)) for e, exact in zip((of_a, of_b), truth.grads, strict=False)]
            head_off.append(worst(norm(of_head.ravel()), norm(truth.grads[2].ravel())))
        yield "`linear_divergence`, relative", name, max(loss_off)
        yield "its gradients at the hidden states, relative", name, max(hidden_off)
        yield "its gradient at the head, relative", name, max(head_off)


def plain_step(delta: Any, grad: Any, step_size: float, epsilon: float, norm: str, scope: str) -> torch.Tensor:
    dims = -1 if scope == "token" else tuple(range(1, delta.dim()))
    order = float("inf") if norm == "linf" else 2
    moved = delta + step_size * (grad / torch.linalg.vector_norm(grad, order, dims, keepdim=True)).to(delta.dtype)
    if norm == "linf":
        return moved.clamp(-epsilon, epsilon)
    return moved * (epsilon / torch.linalg.vector_norm(moved, 2, dims, keepdim=True)).clamp(max=1)


def of_perturbation_step(backend: str) -> Iterator[Figure]:
    """An element, over epsilon: a gradient of any size, steps that end in the ball and on its surface."""
    from oracle import PerturbationStep, wide

    from smart_kernels import perturbation_step

    epsilon = 1e-5
    for ball, dtype in itertools.product(("linf", "l2"), NAMES):
        found = []
        for scope, shape, factor, step_size in itertools.product(
            ("sample", "token"), ((3, 5, 33), (2, 17, 768)), (1e-3, 1.0, 1e3), (1e-7, 1e-5, 1e-3)
        ):
            delta = epsilon / 4 * torch.randn(shape, dtype=torch.float64)
            delta = (delta / (1 if ball == "linf" else shape[-1])).to(F64 if dtype == F64 else F32)
            grad = (factor * torch.randn(shape, dtype=torch.float64)).to(dtype)
            truth = PerturbationStep(delta, grad, None, step_size, epsilon, ball, scope, "normalized")
            out = (plain_step if backend == "usual" else perturbation_step)(
                delta, grad, step_size, epsilon, ball, scope
            )
            found.append(worst(wide(out) - truth.result, epsilon))
        yield f"`perturbation_step`, {ball}, over ε", NAMES[dtype], max(found)


def of_init_perturbation(backend: str) -> Iterator[Figure]:
    """A number, over the standard deviation: against exact arithmetic on the same random bits."""
    from oracle import normal, wide

    from smart_kernels import init_perturbation

    for dtype in () if backend == "usual" else (F32, F64):
        out = init_perturbation(torch.empty(4, 100, 256, dtype=dtype), 1.0, None, torch.Generator().manual_seed(1))
        seed = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.Generator().manual_seed(1))
        exact = normal(int(seed), out.numel()).reshape(out.shape)
        yield "`init_perturbation`, over σ", NAMES[dtype], worst(wide(out) - exact)


def of_ema_update(backend: str) -> Iterator[Figure]:
    """An element, in units in its last place: shadows near their parameters and far, where terms cancel too.

    Triton's kernel sees a table of addresses, which are not those of the executor; it gives the bits of the C++ kernel.
    """
    import oracle
    from oracle import Ema, ulp, wide

    from smart_kernels import ema_update_

    pairs = ((F64, F64), (F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16))
    for e_dtype, p_dtype in () if backend == "triton" else pairs:
        found = []
        for decay, distance, size in itertools.product((0.5, 0.99, 0.999), (1e-3, 1.0, 1e3), (33, 8193)):
            e = torch.randn(size, dtype=torch.float64)
            p = (e + distance * torch.randn_like(e)).to(p_dtype)
            e = e.to(e_dtype)
            truth = Ema(e, p, decay)
            if backend == "usual":
                torch._foreach_lerp_([e], [p.to(e_dtype)], 1 - decay)
            else:
                ema_update_([e], [p], decay)
            error = np.abs(wide(e) - truth.result) - truth.size * np.finfo(oracle.WIDE).eps  # the oracle's own, of fp64
            found.append(worst(np.maximum(error, 0) / ulp(truth.result, e_dtype)))
        yield "`ema_update_`, units in the last place", f"{NAMES[e_dtype]}\u00a0←\u00a0{NAMES[p_dtype]}", max(found)


MEASUREMENTS: tuple[Callable[[str], Iterator[Figure]], ...] = (
    of_symmetric_kl, of_linear_divergence, of_perturbation_step, of_init_perturbation, of_ema_update,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- the table


def measure(name: str) -> list[Figure]:
    """Every figure of a backend: what, in which dtype, the worst of its cases."""
    torch.manual_seed(0)
    with serving(name):
        return [figure for measurement in MEASUREMENTS for figure in measurement(name)]


def measure_apart(name: str) -> list[Figure]:
    """The same in a process of its own."""
    environment = {**os.environ, **({"SMART_KERNELS_ISA": name} if name.startswith(("avx", "base")) else {})}
    command = [sys.executable, __file__, "--backend", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [(what, dtype, value) for what, dtype, value in json.loads(done.stdout)]


def shown(value: float | None) -> str:
    """A figure in few characters."""
    if value is None:
        return ""
    if value > 1e9:
        return "> 1e9"
    text = f"{value:.2g}" if 0.01 <= value < 1000 else f"{value:.1e}"
    return re.sub(r"e([+-])0?", lambda match: "e" + {"+": "", "-": "−"}[match[1]], text)


def table() -> str:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in sorted(BACKENDS, key=lambda name: name != "eager"):  # first, as it has every row
        print(f"{name} ...", file=sys.stderr, flush=True)
        for what, dtype, value in measure_apart(name):
            figures.setdefault(what, {}).setdefault(dtype, {})[name] = value
    lines = ["| worst error of | dtype | " + " | ".join(BACKENDS.values()) + " |", "|---|---|" + "---|" * len(BACKENDS)]
    for what, by_dtype in figures.items():
        for i, (dtype, found) in enumerate(by_dtype.items()):
            cells = [shown(found.get(name)) for name in BACKENDS]
            if "ema" in what:
                cells[-1] = "as C++"
            lines.append(f"| {what if i == 0 else ''} | {dtype} | {' | '.join(cells)} |")
    lines += ["", f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, help="this one alone, as JSON")
    options = parser.parse_args()
    if options.backend:
        print(json.dumps(measure(options.backend)))
        return
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- measured -->\n", "\n<!-- end -->"
    page = re.sub(f"(?<={begin}).*?(?={end})", lambda _: table(), page, count=1, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

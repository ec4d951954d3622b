"""Which kernel serves which op on which device, and why: `python -m smart_kernels.environment`."""

from __future__ import annotations

import importlib.util
import platform
from importlib import import_module, metadata

import torch

import smart_kernels
from smart_kernels.ops._library import NAMESPACE, OPS


def kernels() -> dict[str, dict[str, str]]:
    """What serves each op on each kind of device.

    Returns:
        For each op's name, the kernel on "cpu", on "cuda" (also ROCm) and on any "other" device: "C++", "Triton",
        "CUDA" or "eager", the last being the definition in `reference.py`.

    Example:
        >>> from smart_kernels.environment import kernels
        >>> kernels()["divergence"]["other"]
        'eager'
    """

    def served(op: str, key: str, kernel: str) -> str:
        return kernel if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key) else "eager"

    return {
        op: {
            "cpu": served(op, "CPU", "C++"),
            "cuda": served(op, "CUDA", gpu),
            "other": "eager",
        }
        for op, gpu in OPS.items()
    }


def report() -> str:
    """The environment as a text for people: versions, compiled kernels, devices, and the table of `kernels`."""
    compiled = smart_kernels.COMPILED
    isa = f"loaded, {import_module('smart_kernels._C').isa}" if compiled["_C"] is None else f"none ({compiled['_C']})"
    cuda = "loaded" if compiled["_C_cuda"] is None else f"none ({compiled['_C_cuda']})"
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "none (not installed)"
    if torch.cuda.is_available():
        gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        gpus = "none"
    backend = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    facts = {
        "smart_kernels": smart_kernels.__version__,
        "torch": f"{torch.__version__} ({backend if torch.version.cuda or torch.version.hip else 'CPU build'})",
        "triton": triton,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "GPUs": gpus,
        "C++ kernels": isa,
        "CUDA kernels": cuda,
    }
    rows = [("op", "cpu", "cuda, rocm", "other devices")]
    rows += [(op, served["cpu"], served["cuda"], served["other"]) for op, served in kernels().items()]
    width = max(len(op) for op, *_ in rows)
    lines = [f"{name:<{max(map(len, facts))}}  {value}" for name, value in facts.items()]
    lines += ["", *(f"{op:<{width}}  {cpu:<6}  {gpu:<10}  {other}" for op, cpu, gpu, other in rows)]
    if "eager" in {served["cpu"] for served in kernels().values()}:
        lines += ["", "eager on cpu: reinstall with a C++ compiler at hand and without SMART_KERNELS_BUILD=none."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())

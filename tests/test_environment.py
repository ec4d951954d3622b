"""The report on kernels tells what the dispatcher does; the build's switch is honoured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smart_kernels
from smart_kernels import environment
from smart_kernels.ops._library import OPS

ROOT = Path(__file__).resolve().parent.parent


def test_report_names_every_op_and_what_the_dispatcher_would_call(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "smart_kernels.environment"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)  # not beside the sources
    for op, served in environment.kernels().items():
        table = torch._C._dispatch_dump_table(f"smart_kernels::{op}")
        cpu = next(line for line in table.splitlines() if line.startswith("CPU:"))
        assert ("[kernel]" in cpu) == (served["cpu"] == "C++")
        assert any(line.split()[:2] == [op, served["cpu"]] for line in run.stdout.splitlines())
    assert set(environment.kernels()) == set(OPS)


def test_compiled_kernels_serve_every_op_once_they_are_built() -> None:
    if smart_kernels.COMPILED["_C"] is not None:
        pytest.skip("the compiled CPU kernels are not built here")
    assert {served["cpu"] for served in environment.kernels().values()} == {"C++"}


@pytest.mark.parametrize(("build", "message"), [("fast", "expected none, cpu or cuda"), ("cuda", "needs a CUDA")])
def test_an_impossible_build_fails_loudly(build: str, message: str) -> None:
    if build == "cuda" and torch.version.cuda:
        pytest.skip("a CUDA build is possible here")
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "SMART_KERNELS_BUILD": build},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert message in run.stderr


def test_without_compiled_kernels_the_package_works() -> None:
    """A process that cannot import the extension is served by the eager definition."""
    code = (
        "import sys; sys.modules['smart_kernels._C'] = None\n"
        "import torch, smart_kernels\n"
        "from smart_kernels.environment import kernels\n"
        "assert {k['cpu'] for k in kernels().values()} == {'eager'}\n"
        "a = torch.randn(4, 5, requires_grad=True)\n"
        "smart_kernels.symmetric_kl(a, torch.randn(4, 5)).backward()\n"
        "assert a.grad.isfinite().all()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

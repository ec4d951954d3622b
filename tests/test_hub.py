"""The project for kernel-builder keeps the Hub's rules, and works beside the package itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = """
import torch
def add_op_namespace_prefix(name):
    return f"_smart_kernels_cuda_0123abc::{name}"
"""
"""What kernel-builder generates beside the sources, with an identifier of the build in it."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "tools" / "hub.py", "somebody/smart-kernels", folder], check=True)
    return folder


def modules(project: Path) -> dict[Path, ast.Module]:
    folder = project / "torch-ext" / "smart_kernels"
    return {path.relative_to(folder): ast.parse(path.read_text()) for path in folder.rglob("*.py")}


def test_layout(project: Path) -> None:
    names = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    package = {name for name in names if name.startswith("torch-ext/smart_kernels/")}
    others = {"build.toml", "flake.nix", "CARD.md", "tests/test_smart_kernels.py"}
    assert names - package == others
    assert "torch-ext/smart_kernels/__init__.py" in package
    assert not (project / "torch-ext/smart_kernels/smart_kernels").exists()
    assert not (project / "torch-ext/smart_kernels/_ops.py").exists()  # it is generated


def test_description(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    build = tomllib.loads((project / "build.toml").read_text())
    general = build.pop("general")
    assert build == {"torch-noarch": {}}
    assert general.pop("hub") == {"repo-id": "somebody/smart-kernels"}
    assert general == {
        "name": "smart-kernels", "version": 0, "edition": 5, "license": "MIT", "backends": ["cuda", "rocm"],
    }  # fmt: skip
    test = (project / "tests/test_smart_kernels.py").read_text()
    assert 'kernels.get_kernel("somebody/smart-kernels", version=0)' in test


def test_imports_are_relative_or_of_what_is_allowed(project: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path, tree in modules(project).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom):
                assert node.level or node.module.split(".")[0] in allowed, f"{path}: {node.module}"
                assert node.level <= len(path.parts), path


def test_no_name_of_the_package_is_left_in_code(project: Path) -> None:
    """In messages and docstrings it says whose they are; anywhere else it would reach an installed package."""
    for path, tree in modules(project).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr != "smart_kernels", path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("smart_kernels.", "smart_kernels::")), f"{path}: {node.value}"
                assert node.value != "smart_kernels", path


def test_all_public_functions_and_nothing_else(project: Path) -> None:
    import smart_kernels
    from smart_kernels.ops import _library

    tree = ast.parse((project / "torch-ext/smart_kernels/__init__.py").read_text())
    (names,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    imported = [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    public = [name for name in smart_kernels.__all__ if callable(getattr(smart_kernels, name)) and name.islower()]
    assert names == sorted(imported)
    assert set(names) == set(public) - {"empty_cache"}  # which is about the C++ kernels
    assert _library.NAMESPACE == "smart_kernels"


LOADED = """
import importlib.util, sys, torch
import smart_kernels
def load(unique):  # as `kernels` does, under a name of its own
    spec = importlib.util.spec_from_file_location(
        unique, sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    spec.loader.exec_module(module)
    return module
hub = load("smart_kernels_0123abc")
ops = torch.ops._smart_kernels_cuda_0123abc
assert all(f.__module__.startswith("smart_kernels_0123abc") for f in map(hub.__dict__.get, hub.__all__))
b = torch.randn(8, 50); a = b + 1e-5 * torch.randn(8, 50)
grads = []
for kernels in (hub, smart_kernels):
    x = a.clone().requires_grad_()
    loss = kernels.symmetric_kl(x, b)
    loss.backward()
    grads += [x.grad, kernels.symmetric_kl_grad(a, b)]
torch.testing.assert_close(grads[:2], grads[2:])
delta = hub.init_perturbation(torch.zeros(2, 3, 4), 1.0, generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(
    delta, smart_kernels.init_perturbation(torch.zeros(2, 3, 4), 1.0, generator=torch.Generator().manual_seed(0)))
assert hub.perturbation_step_(delta, torch.ones(2, 3, 4), 1.0, 0.5) is delta and delta.abs().max() <= 0.5
e, p = torch.zeros(5), torch.ones(5)
hub.ema_update_([e], [p], 0.75)
assert (e == 0.25).all()
compiled = torch.compile(lambda x: hub.symmetric_kl(x, b), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(a), hub.symmetric_kl(a, b))
import triton
from importlib import import_module
launchers = import_module("smart_kernels_0123abc.triton_kernels.divergence")  # in Triton's interpreter
loss, grad, _ = launchers.divergence_forward_backward(a, b, None, 3, False, True, False)
torch.testing.assert_close(grad, grads[0])
"""


def test_it_works_beside_the_package(project: Path, tmp_path: Path) -> None:
    folder = project / "torch-ext" / "smart_kernels"
    for path in [*folder.rglob("*.py")]:
        (tmp_path / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    (tmp_path / "_ops.py").write_text(OPS)
    run = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr

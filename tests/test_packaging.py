"""What is published: the source archive is complete and installs without the repository; metadata agree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import smart_kernels

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
"""What serves the repository alone."""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The repository's files; an unpacked archive has no list of them."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of the repository")
    return run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def archive(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that nothing else that lies here can get into it or help it."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in ("csrc/cpu/built.so", "benchmarks/results/table.json", "tests/__pycache__/oracle.cpython-311.pyc"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()  # what lies about after work
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", build, cwd=copy, env={**os.environ, "SMART_KERNELS_BUILD": "none"})
    return next(out.iterdir())


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with tarfile.open(archive) as files:
        files.extractall(folder := tmp_path_factory.mktemp("unpacked"))
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs from the archive alone, compiled, against this environment's torch."""
    target, compiler = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("compiler") / "c++"
    # Behind the -O3 of setup.py: whether all is there to compile is the same, in a quarter of the time
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    compiled = {"SMART_KERNELS_BUILD": "cpu", "CXX": str(compiler), "CC": str(compiler)}
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "--target", target, archive, env=os.environ | compiled)
    return target


def test_archive_holds_what_is_tracked_and_nothing_else(tracked: list[str], unpacked: Path) -> None:
    shipped = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in shipped if name in ("PKG-INFO", "setup.cfg") or name.startswith("smart_kernels.egg-info/")}
    assert shipped - made == {name for name in tracked if not name.startswith(NOT_SHIPPED)}


def test_archive_installs_and_runs_a_step(installed: Path, tmp_path: Path) -> None:
    step = ROOT / "tests" / "first_step.py"
    out = run(sys.executable, step, "_C", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})
    assert out.startswith(str(installed))


def test_nothing_but_the_package_is_installed(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert names == {"smart_kernels", f"smart_kernels-{smart_kernels.__version__}.dist-info"}
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "smart_kernels").rglob("*.py")}
    files = {str(p.relative_to(installed)) for p in (installed / "smart_kernels").rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert files == python | {"smart_kernels/py.typed", "smart_kernels/_C.abi3.so"}


def test_archive_has_tests_and_all_that_they_import(unpacked: Path, installed: Path, tmp_path: Path) -> None:
    collect = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", unpacked / "tests")
    out = run(sys.executable, *collect, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})
    for path in (ROOT / "tests").glob("test_*.py"):
        assert path.name in out


def test_one_version() -> None:
    assert metadata.version("smart-kernels") == smart_kernels.__version__

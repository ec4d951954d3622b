"""Checks a wheel: its tag, what its libraries need, and that it works with any torch on a machine with no compiler.

    python tools/check_wheel.py WHEEL PYTHON...

Each PYTHON has another torch, from 2.10 on, and pip; nothing is installed into it. The wheel works where no environment
is left, a PATH least of all. Needs readelf.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FIRST_STEP = Path(__file__).resolve().parent.parent / "tests" / "first_step.py"
BROUGHT_BY_TORCH = ("libc10.so", "libc10_cuda.so", "libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so")
BROUGHT_BY_LINUX = r"(libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux-[a-z0-9-]+)\.so\.\d+"
GLIBC = 28
"""Of 2.28, which torch's own wheels need; the CUDA runtime that is linked in asks for that of the build machine."""


def check_libraries(folder: Path) -> list[str]:
    """Returns the names of the modules."""
    libraries = sorted(folder.glob("*.so"))
    for library in libraries:
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d", library))
        newest = max(map(int, re.findall(r"\bGLIBC_2\.(\d+)", readelf("-V", library))))
        print(f"{library.name} needs glibc 2.{newest}, {', '.join(needed)}")
        others = [name for name in needed if name not in BROUGHT_BY_TORCH and not re.fullmatch(BROUGHT_BY_LINUX, name)]
        assert not others, f"{library.name}: needs {', '.join(others)}"
        assert newest <= GLIBC or library.name.startswith("_C_cuda."), f"{library.name}: needs glibc 2.{newest}"
    return [library.name.split(".")[0] for library in libraries]


def readelf(option: str, library: Path) -> str:
    return subprocess.run(["readelf", "-W", option, library], capture_output=True, text=True, check=True).stdout


def main(wheel: Path, pythons: list[str]) -> None:
    assert "-cp310-abi3-manylinux_2_" in wheel.name, f"{wheel.name}: expected Python's stable ABI and a manylinux tag"
    for python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder, wheel]
            subprocess.run(pip, check=True)
            modules = check_libraries(Path(folder, "smart_kernels"))
            about_torch = [python, "-c", "import torch; print(torch.version.cuda)"]
            cuda = subprocess.run(about_torch, capture_output=True, text=True, check=True).stdout.strip()
            expected = [module for module in modules if module != "_C_cuda" or cuda != "None"]
            environment = {"PATH": "/nonexistent", "PYTHONPATH": folder}
            subprocess.run([python, FIRST_STEP, *expected], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])

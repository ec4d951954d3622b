"""The compiled extensions; everything else stands in pyproject.toml.

SMART_KERNELS_BUILD=none|cpu|cuda forces what is built; unset, CPU kernels always, CUDA kernels where
the installed torch is a CUDA build and a CUDA toolkit is found.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

REQUESTED = os.environ.get("SMART_KERNELS_BUILD", "auto")
if REQUESTED not in ("auto", "none", "cpu", "cuda"):
    sys.exit(f"SMART_KERNELS_BUILD={REQUESTED!r}: expected none, cpu or cuda")
site.addsitedir(sysconfig.get_path("purelib"))  # an isolated build compiles against the torch that will run it


def cuda_home() -> str | None:
    """The toolkit's own folder: the one that nvcc names, as nvcc on the PATH may be a wrapper elsewhere."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        report = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        candidates += [*re.findall(r"_HERE_=(.*)/bin\b", report.stderr), str(Path(nvcc).resolve().parent.parent)]
    candidates.append("/usr/local/cuda")
    return next((c for c in candidates if c and Path(c, "include/cuda_runtime.h").is_file()), None)


def extensions() -> tuple[list, dict]:
    home = cuda_home()
    if home:
        os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension guesses it
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    needs = {"a CUDA toolkit": home, "a CUDA build of torch": torch.version.cuda}
    missing = " and ".join(need for need, met in needs.items() if not met)
    if missing and REQUESTED == "cuda":
        sys.exit(f"SMART_KERNELS_BUILD=cuda needs {missing}")
    if missing:
        print(f"smart_kernels: no CUDA kernels, for want of {missing}", file=sys.stderr)

    common = {"include_dirs": [str(Path("csrc").resolve())], "py_limited_api": True}
    oldest = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-include", str(Path("csrc/old_glibc.h").resolve())]
    both = ["-O3", "-std=c++20", *oldest]
    # GCC's own intrinsics trip -Wmaybe-uninitialized; vector types never cross a binary interface here (-Wno-psabi)
    # Python's own flags ask for debugging information: a quarter more to compile, and ten times the size
    cxx = [*both, "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    sources = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    sources = ["csrc/ops.cpp", *sources]
    modules = [CppExtension("smart_kernels._C", sources, extra_compile_args=cxx, libraries=["dl"], **common)]
    if REQUESTED != "cpu" and not missing:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        sources = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
        flags = {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": [*both, "-DUSE_CUDA"]}
        sources = ["csrc/cuda/ops.cpp", *sources]
        module = CUDAExtension("smart_kernels._C_cuda", sources, extra_compile_args=flags, **common)
        # The CUDA runtime is linked in, so that a torch for any CUDA version can load the module.
        module.libraries = [{"cudart": "cudart_static"}.get(name, name) for name in module.libraries] + ["dl", "rt"]
        modules.append(module)

    class Build(BuildExtension):
        def run(self) -> None:
            if self.editable_mode:  # objects stay, and ninja compiles again what has changed since
                self.build_temp = "build/editable"
            super().run()

    return modules, {"build_ext": Build}


if REQUESTED == "none":
    setup()
else:
    try:
        ext_modules, cmdclass = extensions()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        setup(setup_requires=["torch>=2.10"])  # pip installs it for the build and comes back
    else:
        setup(ext_modules=ext_modules, cmdclass=cmdclass, options={"bdist_wheel": {"py_limited_api": "cp310"}})

"""Writes the Triton kernels as a project for Hugging Face's kernel-builder, which builds and uploads them to the Hub.

    python tools/hub.py OWNER/smart-kernels FOLDER

The files are those of the package, made relocatable: imports are relative, as several versions may be loaded at once,
and the ops are registered in the namespace that kernel-builder gives to each build. Next, in FOLDER, with Nix:
`nix flake lock`, commit, `nix run .#build-and-upload`.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smart_kernels"
HUB = ROOT / "tools" / "hub"
NAME = "smart_kernels"


def relocatable(source: str, depth: int) -> str:
    """A module's source with no absolute reference to its package; `depth` folders lie between them."""
    up = "." * (depth + 1)
    source = re.sub(rf"^(\s*)from {NAME}\.(\S+) import", rf"\1from {up}\2 import", source, flags=re.MULTILINE)
    source = re.sub(rf"^(\s*)from {NAME} import", rf"\1from {up} import", source, flags=re.MULTILINE)
    package = f'__name__.rsplit(".", {depth + 1})[0]'
    source = re.sub(rf'"{NAME}\.(triton_kernels\.[^"]*)"', rf'{package} + ".\1"', source)
    source = source.replace(f"torch.ops.{NAME}.", "getattr(torch.ops, LIBRARY.ns).")
    namespace = f'NAMESPACE = "{NAME}"\n'
    if namespace in source:
        source = source.replace(namespace, 'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n')
        source = source.replace("import torch\n", f"import torch\n\nfrom {up}_ops import add_op_namespace_prefix\n", 1)
    return source


def write(repo_id: str, folder: Path) -> None:
    """Write the project into a folder."""
    version = re.search(r'^__version__ = "(\d+)\.', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert version
    target = folder / "torch-ext" / NAME
    for path in [PACKAGE / "reference.py", *(PACKAGE / "ops").glob("*.py"), *(PACKAGE / "triton_kernels").glob("*.py")]:
        place = path.relative_to(PACKAGE)
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_text(relocatable(path.read_text(), len(place.parts) - 1))
    shutil.copy(HUB / "__init__.py.in", target / "__init__.py")
    (folder / "tests").mkdir(exist_ok=True)
    test = (HUB / "test_smart_kernels.py.in").read_text().replace("REPO_ID", repo_id).replace("VERSION", version[1])
    (folder / "tests" / "test_smart_kernels.py").write_text(test)
    shutil.copy(HUB / "flake.nix", folder)
    shutil.copy(HUB / "CARD.md", folder)
    (folder / "build.toml").write_text(
        "[general]\n"
        f'name = "{NAME.replace("_", "-")}"\n'
        f"version = {version[1]}\n"
        "edition = 5\n"
        'license = "MIT"\n'
        'backends = ["cuda", "rocm"]\n\n'
        "[general.hub]\n"
        f'repo-id = "{repo_id}"\n\n'
        "[torch-noarch]\n"
    )


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))

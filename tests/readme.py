"""The README's Python blocks, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
INTEGRATIONS = ("Hugging Face Trainer", "Lightning", "Accelerate")


def python_blocks() -> list[tuple[str, str]]:
    """Section and code of each block, in order."""
    found = []
    for section in README.read_text(encoding="utf-8").split("\n## "):
        title = section.splitlines()[0]
        found += [(title, code) for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)]
    return found


def run(section: str, namespace: dict[str, object]) -> dict[str, object]:
    """Run the block of a section with these names given."""
    exec(compile(dict(python_blocks())[section], "README.md", "exec"), namespace)
    return namespace

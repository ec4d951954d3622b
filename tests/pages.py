"""The Python blocks of the README and of the documentation's pages, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = "README.md"
ELSEWHERE = ("trainer", "trl", "lightning", "accelerate", "processes")
"""Guides that take a model and data for granted: they run in the tests of their integrations, which have them."""


def pages() -> dict[str, list[str]]:
    """By path from the root, the blocks of each page that has any, in order."""
    paths = [ROOT / README, *sorted((ROOT / "docs").rglob("*.md"))]
    found = {str(path.relative_to(ROOT)): _blocks(path) for path in paths}
    return {page: blocks for page, blocks in found.items() if blocks}


def guide(name: str) -> list[str]:
    """The blocks of one of `ELSEWHERE`."""
    return pages()[f"docs/guides/{name}.md"]


def run(page: str, blocks: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks one after another with these names given."""
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


def _blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)

"""What the documentation site needs beside mkdocs.yml: formulas as MathML, docstrings as Markdown.

Formulas are written as in LaTeX, in a fenced block "math" or, in a line, as `#!math x`. Browsers draw MathML by
themselves, so nothing is fetched to read a page.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """MkDocs calls this: formulas are drawn wherever a page or a docstring has them."""
    options = config["mdx_configs"]
    options.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {"name": "math", "class": "math", "format": block}
    ]
    options.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [
        {"name": "math", "class": "math", "format": inline}
    ]
    return config


def block(source: str, *_: Any, **__: Any) -> str:
    """Formulas on lines of their own."""
    formulas = (convert(line.removesuffix("\\quad").rstrip(" ,"), display="block") for line in source.splitlines())
    return f'<div class="math">{"".join(formulas)}</div>'


def inline(source: str, *_: Any, **__: Any) -> str:
    """A formula in a line of text."""
    return convert(source)


class Roles(griffe.Extension):
    """Turns docstrings as IDEs and Sphinx know them into Markdown: references, formulas, examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this for every module, class and function that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: griffe.Object) -> str:
    """The docstring of an object, as Markdown."""

    def reference(match: re.Match[str]) -> str:
        path = match[1].removeprefix("~")
        name = path.rsplit(".", 1)[-1]
        if path.startswith("torch."):
            return f"`{path}`"
        home = obj if obj.is_class else obj.parent
        if "." not in path:
            path = f"{home.path}.{path}" if home is not None and path in home.members else f"smart_kernels.{path}"
        return f"[`{name}`][{path}]"

    text = re.sub(r":(?:func|class|meth|attr):`([^`]+)`", reference, text)
    text = re.sub(r":math:`([^`]+)`", r"`#!math \1`", text)
    text = re.sub(r"^( *)\.\. math:: (.+(?:\n\1 +.+)*)", r"\1```math\n\1\2\n\1```", text, flags=re.MULTILINE)
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)

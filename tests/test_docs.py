"""The examples that stand in docstrings and in the README run, and give what they say."""

from __future__ import annotations

import doctest
import re

import pytest
import readme
from hf_tasks import requires_trainer

import smart_kernels
from smart_kernels import environment
from smart_kernels.integrations.transformers import SmartTrainingArguments
from smart_kernels.smart.checkpoint import save_smart

PUBLIC = [getattr(smart_kernels, name) for name in smart_kernels.__all__]


@pytest.mark.parametrize(
    "item",
    [*PUBLIC, environment.kernels, save_smart, pytest.param(SmartTrainingArguments, marks=requires_trainer)],
    ids=lambda item: item.__name__,
)
def test_docstring_example(item: object) -> None:
    (found,) = [test for test in doctest.DocTestFinder(recurse=False).find(item) if test.examples]
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found, out=report.append)
    assert result.attempted
    assert not result.failed, "".join(report)


def test_every_public_argument_is_documented() -> None:
    for item in PUBLIC:
        code = item.__init__.__code__ if isinstance(item, type) else item.__code__
        names = code.co_varnames[int(isinstance(item, type)) : code.co_argcount + code.co_kwonlyargcount]
        for name in names:
            assert re.search(rf"^\s+{name}: ", item.__doc__, re.MULTILINE), f"{item.__name__}: {name}"


def test_readme_python_blocks_run() -> None:
    """Those of the integrations run in their own tests, which have what the blocks take for granted."""
    namespace: dict[str, object] = {}
    for section, block in readme.python_blocks():
        if section not in readme.INTEGRATIONS:
            exec(compile(block, "README.md", "exec"), namespace)


def test_an_integration_takes_ten_lines() -> None:
    blocks = dict(readme.python_blocks())
    for section in readme.INTEGRATIONS:
        assert len([line for line in blocks[section].splitlines() if line.strip()]) <= 10

"""The examples in docstrings, in the README and in the documentation's pages run, and give what they say."""

from __future__ import annotations

import doctest
import re

import pages
import pytest
from hf_tasks import requires_trainer

import smart_kernels
from smart_kernels import environment
from smart_kernels.integrations.transformers import SmartTrainingArguments
from smart_kernels.smart.checkpoint import save_smart

PUBLIC = [getattr(smart_kernels, name) for name in smart_kernels.__all__]


@pytest.mark.parametrize(
    "item",
    [
        *PUBLIC,
        smart_kernels.Smart.backward,
        environment.kernels,
        save_smart,
        pytest.param(SmartTrainingArguments, marks=requires_trainer),
    ],
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


PAGES = pages.pages()
GUIDES = [f"docs/guides/{name}.md" for name in pages.ELSEWHERE]


@pytest.mark.parametrize("page", sorted(PAGES.keys() - set(GUIDES)))
def test_the_python_blocks_of_a_page_run(page: str) -> None:
    """Those of `pages.ELSEWHERE` run in their own tests, which have what the blocks take for granted."""
    pages.run(page, PAGES[page], {"__name__": page})


@pytest.mark.parametrize("page", GUIDES)
def test_an_integration_takes_ten_lines(page: str) -> None:
    first = PAGES[page][0].splitlines()
    assert len([line for line in first if line.strip()]) <= (16 if "trl" in page else 10)

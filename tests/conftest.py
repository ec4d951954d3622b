"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each has its share of the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))
if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import patch_the_language_once, remember_shapes

    patch_the_language_once()
    remember_shapes()
os.environ.pop("PYTEST_ADDOPTS", None)  # of this run, not of one that a test starts


BEGIN = frozenset(("test_interpreted", "test_every_instruction_set", "test_killed_while_saving"))
"""Tests that run others again, or take as long. They begin, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; those that need the installed package together, as each process that has one compiles it."""
    items.sort(
        key=lambda i: getattr(i, "originalname", "") not in BEGIN and "installed" not in getattr(i, "fixturenames", ())
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models: several threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

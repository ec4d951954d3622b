"""A short run of fuzz.py, another one each time. What it finds gets a test of its own beside those of the op."""

from __future__ import annotations

import random

import fuzz
import pytest
from extension import requires_extension
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = requires_extension


@pytest.mark.parametrize("name", fuzz.CASES)
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(r=st.randoms(use_true_random=False))
def test_short_run(name: str, r: random.Random) -> None:
    fuzz.run_case(fuzz.CASES[name], r)

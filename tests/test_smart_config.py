"""SmartConfig: the paper's values, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from smart_kernels import SmartConfig


def test_defaults_are_the_papers() -> None:
    config = SmartConfig()
    assert (config.epsilon, config.noise_std, config.step_length, config.ascent_steps) == (1e-5, 1e-5, 1e-3, 1)
    assert (config.mu, config.decay, config.decay_late, config.decay_switch, config.inner_steps) == (
        1,
        0.99,
        0.999,
        0.1,
        1,
    )
    assert (config.lambda_s, config.norm, config.adversary, config.proximal) == (1, "linf", "power", "momentum")
    assert config.detach_clean is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mu = 2  # type: ignore[misc]


def test_every_hyper_parameter_is_documented() -> None:
    for field in dataclasses.fields(SmartConfig):
        assert f"        {field.name}: " in str(SmartConfig.__doc__)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[
            (name, value, ValueError)
            for name in ("lambda_s", "epsilon", "mu")
            for value in (-1.0, float("nan"), float("inf"))
        ],
        *[(name, value, ValueError) for name in ("decay", "decay_late", "decay_switch") for value in (-0.1, 1.1)],
        *[
            (name, "1", TypeError)
            for name in ("lambda_s", "noise_std", "step_size", "decay", "ascent_steps", "inner_steps")
        ],
        *[(name, "other", ValueError) for name in ("norm", "scope", "adversary", "proximal", "dropout", "divergence")],
        ("step_size", 0, ValueError),
        ("ascent_steps", 0, ValueError),
        ("inner_steps", True, TypeError),
        ("detach_clean", 1, TypeError),
        ("norm", ["linf"], ValueError),
    ],
)
def test_refuses(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}: got .*expected"):
        SmartConfig(**{name: value})


def test_only_the_power_adversary_takes_several_steps() -> None:
    SmartConfig(ascent_steps=3)
    with pytest.raises(ValueError, match="ascent_steps: got 3 with adversary='predicted', expected 1"):
        SmartConfig(ascent_steps=3, adversary="predicted")


def test_warns_of_a_proximal_term_that_is_always_zero() -> None:
    with pytest.warns(UserWarning, match="inner_steps=1 holds the parameters close to themselves"):
        SmartConfig(proximal="vanilla")
    SmartConfig(proximal="vanilla", inner_steps=2)
    SmartConfig(proximal="vanilla", mu=0)

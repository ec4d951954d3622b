"""SmartConfig: the paper's values, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from smart_models import Encoder, batch_for
from torch import nn

from smart_kernels import Smart, SmartConfig


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


def test_recommended_settings_are_those_of_the_study() -> None:
    model = Encoder()
    norm = model.words.weight.detach().double().norm(dim=1).mean().item()
    config = SmartConfig.recommended(model)
    assert config.epsilon == pytest.approx(0.1 * norm, rel=1e-6)
    assert config == SmartConfig(
        lambda_s=0.1, mu=0.0, adversary="predicted", norm="l2", scope="token", epsilon=config.epsilon
    )
    assert SmartConfig.recommended(model, "words") == SmartConfig.recommended(model, model.words) == config
    other = SmartConfig.recommended(model, lambda_s=3.0, epsilon=0.5)
    assert (other.lambda_s, other.epsilon, other.adversary) == (3.0, 0.5, "predicted")
    out = Smart(model, config, 10)(batch_for(model))
    assert out.smoothness > 0
    assert out.perturbation.norm(dim=-1).max() <= config.epsilon * (1 + 1e-6)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Sequential(nn.ReLU()), {}, ValueError, "not clear which module"),
        (
            nn.Sequential(nn.Conv1d(3, 4, 5)),
            {"embedding": "0"},
            ValueError,
            r"Conv1d with a weight of shape \(4, 3, 5\)",
        ),
        (nn.Sequential(nn.ReLU()), {"embedding": "0"}, ValueError, "ReLU with no weight"),
        (nn.Embedding.from_pretrained(torch.zeros(2, 3)), {}, ValueError, "mean norm .* is 0"),
        (nn.Embedding.from_pretrained(torch.full((2, 3), float("nan"))), {}, ValueError, "mean norm .* is nan"),
        (Encoder(), {"embedding": 3}, TypeError, "got int"),
        (Encoder(), {"lambda_s": -1.0}, ValueError, "lambda_s"),
        (Encoder(), {"lamda": 1.0}, TypeError, "lamda"),
    ],
)
def test_recommended_settings_refuse(
    model: nn.Module, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SmartConfig.recommended(model, **options)

"""SmartConfig: the paper's values, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from smart_models import Encoder, batch_for
from torch import Tensor, nn

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


class Scaling(nn.Embedding):
    """Scales what it looks up, and counts its calls."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls = 0
        self.drop = nn.Dropout(0.5)

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(8 * super().forward(input))


class Wrapped(nn.Module):
    """As an adapter around an embedding: its weight is that of what it wraps."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Parameter(torch.randn(base.weight.shape))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + self.more[ids]


def shortened(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _m, _a, x: 3 * x)
    return module


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Scaling(20000, 4), lambda m: 8 * m.weight),
        (
            lambda: Scaling(50, 4, max_norm=1.0),
            lambda m: 8 * m.weight / m.weight.norm(dim=1, keepdim=True).clamp(min=1),
        ),
        (
            lambda: nn.Embedding(50, 4, max_norm=1.0),
            lambda m: m.weight / m.weight.norm(dim=1, keepdim=True).clamp(min=1),
        ),
        (lambda: Wrapped(nn.Embedding(50, 4)), lambda m: m.base.weight + m.more),
        (lambda: hooked(nn.Embedding(50, 4)), lambda m: 3 * m.weight),
    ],
)
def test_the_recommended_radius_is_of_what_is_perturbed(build: Any, expected: Any) -> None:
    """Which is the module's output; the module is left as it was."""
    torch.manual_seed(0)
    module = build()
    model = nn.Sequential(module, nn.Linear(4, 3)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    size = expected(module).detach().double().norm(dim=1).mean().item()
    draws = torch.get_rng_state()
    assert SmartConfig.recommended(model, module).epsilon == pytest.approx(0.1 * size, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(m.training for m in model.modules())
    assert getattr(module, "calls", 0) == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("padding", [None, 0])
def test_the_recommended_radius_of_a_plain_embedding_is_of_its_rows(padding: int | None) -> None:
    words = nn.Embedding(50, 4, padding_idx=padding)
    assert SmartConfig.recommended(words).epsilon == 0.1 * words.weight.detach().norm(dim=1).mean().item()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4)), {"embedding": "0"}, ValueError, "Linear that cannot be called with words"),
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

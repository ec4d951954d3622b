"""Every argument of every public function, every field of every configuration: bad input raises an error that names it.

What each op refuses in detail stands in its own tests. Here the signatures themselves say what there is to try, so that
none is left out.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smart_kernels
from smart_kernels import DivergenceLoss, LinearDivergenceLoss, Smart, SmartConfig, SymmetricKLLoss
from smart_kernels.integrations.transformers import SmartTrainer, SmartTrainingArguments

X = torch.zeros(2, 3, 4)
STEP = {
    "delta": X.clone(),
    "grad": X,
    "step_size": 1.0,
    "epsilon": 1.0,
    "mask": torch.ones(2, 3),
    "skipped": torch.tensor(0),
}
HEAD, BIAS = torch.zeros(5, 4), torch.zeros(5)
HEADS = {"linear_weight": HEAD, "bias": BIAS, "target_linear_weight": HEAD, "target_bias": BIAS}
LOGITS = {"input": X, "target": X, "weight": torch.ones(2, 3)}


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(batch["words"])
    return torch.nn.functional.cross_entropy(logits, batch["labels"]), logits


def step(**arguments: Any) -> Any:
    batch = {"words": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([0, 2])}
    return Smart(model(), num_training_steps=1, forward=forward)(batch, **arguments)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    # what is called, whose signature tells the arguments, and good ones for those that need any
    "divergence": (smart_kernels.divergence,) * 2 + (LOGITS,),
    "divergence_grad": (smart_kernels.divergence_grad,) * 2 + (LOGITS,),
    "DivergenceLoss": (DivergenceLoss,) * 2 + ({},),
    "DivergenceLoss.forward": (DivergenceLoss(), DivergenceLoss().forward, LOGITS),
    "symmetric_kl": (smart_kernels.symmetric_kl,) * 2 + (LOGITS,),
    "symmetric_kl_grad": (smart_kernels.symmetric_kl_grad,) * 2 + (LOGITS,),
    "SymmetricKLLoss": (SymmetricKLLoss,) * 2 + ({},),
    "SymmetricKLLoss.forward": (SymmetricKLLoss(), SymmetricKLLoss().forward, LOGITS),
    "init_perturbation": (smart_kernels.init_perturbation,) * 2 + ({"embeds": X, "std": 1.0},),
    "perturbation_step": (smart_kernels.perturbation_step,) * 2 + (STEP,),
    "perturbation_step_": (smart_kernels.perturbation_step_,) * 2 + (STEP,),
    "ema_update_": (
        *(smart_kernels.ema_update_,) * 2,
        {"ema_tensors": [torch.zeros(3)], "parameters": [torch.ones(3)], "decay": 0.5, "stochastic_rounding": True},
    ),
    "linear_divergence": (smart_kernels.linear_divergence,) * 2 + (LOGITS | HEADS,),
    "LinearDivergenceLoss": (LinearDivergenceLoss,) * 2 + ({},),
    "LinearDivergenceLoss.forward": (LinearDivergenceLoss(), LinearDivergenceLoss().forward, LOGITS | HEADS),
    "Smart": (Smart, Smart, {"model": model(), "num_training_steps": 1}),
    "Smart.__call__": (step, lambda *, initial_perturbation, generator, num_items: None, {}),
    "SmartConfig": (SmartConfig, SmartConfig, {}),
}
NUMBERS = {"lambda_s", "epsilon", "noise_std", "step_size", "mu", "decay", "decay_late", "decay_switch", "std"}
NUMBERS |= {"beta", "temperature"}
CASES = [
    pytest.param(function, name, value, id=f"{function}-{name}-{value if isinstance(value, float) else 'object'}")
    for function, (_, signature, _) in FUNCTIONS.items()
    for name in inspect.signature(signature).parameters
    for value in (object(), *((math.nan, -1.0) if name in NUMBERS else ()))
]


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_error_names_the_argument(function: str, name: str, value: Any) -> None:
    call, _, good = FUNCTIONS[function]
    call(**good)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[0\])?: got .*expected"):
        call(**{**good, name: value})


def test_all_public_names_are_tried() -> None:
    assert {name.split(".")[0] for name in FUNCTIONS} == set(smart_kernels.__all__) - {"empty_cache"}  # no arguments
    assert set(inspect.signature(Smart.__call__).parameters) == {
        "self", "batch", *inspect.signature(FUNCTIONS["Smart.__call__"][1]).parameters,
    }  # fmt: skip


FIELDS = {field.name for field in dataclasses.fields(SmartTrainingArguments) if field.name.startswith("smart_")}


@pytest.mark.parametrize("name", sorted(FIELDS - {"smart_embedding"}))  # which Smart looks up when training begins
def test_arguments_of_the_trainer(name: str, tmp_path: Path) -> None:
    def build() -> SmartTrainer:
        arguments = SmartTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **{name: object()})
        return SmartTrainer(model=model(), args=arguments)

    with pytest.raises((TypeError, ValueError), match=rf"\b(smart_)?{name.removeprefix('smart_')}: got .*expected"):
        build()

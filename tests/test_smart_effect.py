"""A smoothness term that does nothing is told of, once, with the radius at which it would do something."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from smart_models import Encoder, batch_for

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart.effect import FORGOTTEN, NOTHING, SOMETHING

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERN = re.compile(r"lambda_s \* R_s is (\S+) of .*(epsilon|noise_std)=(\S+)\..* (epsilon|noise_std)=(\S+) would")


def told(smart: Smart, model: Encoder, steps: int, end: bool = False) -> tuple[list[str], float]:
    """What a loop with this object warns of, and lambda_s R_s over the task loss, over all of its steps, in float64."""
    smoothness, task = 0.0, 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(steps):
            out = smart(batch_for(model, seed=i))
            out.loss.backward()
            smoothness += smart.config.lambda_s * float(out.smoothness)
            task += float(out.task_loss)
            smart.update()
        if end:
            smart.end_epoch()
    return [str(w.message) for w in caught if "lambda_s * R_s" in str(w.message)], smoothness / (task or 1)


@pytest.mark.parametrize("settings", [{}, {"adversary": "predicted", "lambda_s": 3.0}, {"adversary": "random"}])
@pytest.mark.parametrize("by_steps", [True, False])
def test_the_radius_that_is_named_makes_the_term_what_it_says(settings: dict[str, Any], by_steps: bool) -> None:
    torch.manual_seed(0)
    model, options = Encoder(), {"lambda_s": 1.0, "mu": 0.0, **settings}
    smart = Smart(model, SmartConfig(**options), 9 if by_steps else None)
    (message,), share = told(smart, model, 3, end=not by_steps)
    found = PATTERN.match(message)
    assert found is not None, message
    assert float(found[1]) == pytest.approx(share, rel=0.5)  # one digit is printed, of sums in single precision
    assert share < NOTHING
    name = "noise_std" if settings.get("adversary") == "random" else "epsilon"
    assert found[2] == found[4] == name
    wider = Smart(model, SmartConfig(**{**options, name: float(found[5])}), 9)
    messages, share = told(wider, model, 3)
    assert not messages
    assert SOMETHING / 5 < share < SOMETHING * 5  # one digit, squared, and no more than about as the square


def test_it_is_said_once_and_where_it_is_so() -> None:
    torch.manual_seed(0)
    model = Encoder()
    assert len(told(Smart(model, SmartConfig(), 3), model, 6, end=True)[0]) == 1
    assert not told(Smart(model, SmartConfig(), 30), model, 6)[0]  # not yet a third
    assert not told(Smart(model, SmartConfig(lambda_s=0.0), 3), model, 6, end=True)[0]
    assert not told(Smart(model, SmartConfig(adversary="predicted", epsilon=0.3, mu=0.0), 3), model, 6, end=True)[0]


def test_an_epoch_without_a_step_says_nothing() -> None:
    smart = Smart(Encoder(), SmartConfig(), 9)
    assert not told(smart, Encoder(), 0, end=True)[0]


def test_a_term_that_is_zero_names_no_radius() -> None:
    """With no noise, the "power" adversary's term is 0 at any radius."""
    model = Encoder()
    with pytest.warns(UserWarning, match="noise_std=0"):
        config = SmartConfig(noise_std=0.0, mu=0.0, check=False)
    (message,), _ = told(Smart(model, config, 3), model, 1)
    assert "set a larger epsilon, or lambda_s=0" in message


def test_trainer_says_so_at_the_end_of_the_first_epoch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from hf_tasks import TASKS, trainer_for
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(len([w for w in caught if "lambda_s * R_s" in str(w.message)]))

    seen: list[int] = []
    trainer = trainer_for(TASKS["bert"], tmp_path, num_train_epochs=4, max_steps=-1, logging_steps=1)
    trainer.add_callback(Epochs())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert seen == [0, 1, 1, 1]
    logs = [entry for entry in trainer.state.log_history if "smoothness" in entry]
    for entry in logs:
        assert entry["smoothness_share"] == pytest.approx(entry["smoothness"] / entry["task_loss"], rel=1e-6)


def test_lightning_says_so_at_the_end_of_the_first_epoch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pl = pytest.importorskip("lightning.pytorch")
    from test_integration_lightning import Module, loader, trainer_for

    from smart_kernels.integrations.lightning import SmartCallback

    class Epochs(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, *args: Any) -> None:
            seen.append(len([w for w in caught if "lambda_s * R_s" in str(w.message)]))

    seen: list[int] = []
    trainer = trainer_for(tmp_path, SmartCallback(SmartConfig()), Epochs(), max_epochs=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Module(), loader())
    assert seen == [0, 1, 1, 1]
    metrics = trainer.callback_metrics
    assert float(metrics["smoothness_share"]) == pytest.approx(
        float(metrics["smoothness"] / metrics["task_loss"]), rel=1e-6
    )


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize(
    ("settings", "calls_update", "expected"),
    [({}, False, 1), ({"proximal": "vanilla"}, False, 1), ({}, True, 0), ({"mu": 0.0}, False, 0)],
)
def test_a_teacher_that_is_never_renewed_is_told_of(
    settings: dict[str, Any], calls_update: bool, expected: int, accumulated: int
) -> None:
    """A loop without `update` trains, and holds the model to where it began."""
    torch.manual_seed(0)
    model = Encoder()
    smart = Smart(model, SmartConfig(adversary="random", **settings), 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range((2 * FORGOTTEN + 2) * accumulated):
            smart(batch_for(model, seed=i)).loss.backward()
            if i % accumulated == accumulated - 1:
                optimizer.step()
                if calls_update:
                    smart.update()
            told = [str(w.message) for w in caught if "update() has not been called meanwhile" in str(w.message)]
            assert not told or i >= FORGOTTEN * accumulated
    assert len(told) == expected


@pytest.mark.parametrize("resumed", [True, False])
def test_a_loop_that_loses_its_update_is_told(resumed: bool) -> None:
    """By a training that goes on elsewhere, or that updates once an epoch."""
    torch.manual_seed(0)
    model = Encoder()
    smart = Smart(model, SmartConfig(adversary="random"), 100)
    smart.update()
    state = smart.state_dict()
    if resumed:
        smart = Smart(model, SmartConfig(adversary="random"), 100)
        smart.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(3):
            for i in range(FORGOTTEN + 2):
                smart(batch_for(model, seed=i)).loss.backward()
                optimizer.step()
                told = [w for w in caught if "update() has not been called meanwhile" in str(w.message)]
                assert len(told) == (epoch > 0 or i >= FORGOTTEN)
            smart.update()

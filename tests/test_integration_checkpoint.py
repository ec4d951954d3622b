"""The state of SMART in a file: what it has, what is refused, that it is there whole or not at all."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tasks import TASKS, requires_trainer
from safetensors.torch import load_file, save_file
from smart_models import Encoder, batch_for
from torch import Tensor

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart import checkpoint
from smart_kernels.smart.checkpoint import load_smart, save_smart

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(model: Any = None, **options: Any) -> Smart:
    """Two steps away from where it began."""
    model = model or Encoder()
    smart = Smart(model, SmartConfig(epsilon=0.1, noise_std=0.1, **options), 10)
    for _ in range(2):
        smart(batch_for(model))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        smart.update()
    smart.skipped += 3
    return smart


def flat(smart: Smart) -> dict[str, Tensor]:
    state = copy.deepcopy(smart.state_dict())
    return {**state.pop("teacher"), **{name: torch.as_tensor(value) for name, value in state.items()}}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("options", [{}, {"mu": 0.0}, {"lambda_s": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_goes_round(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    smart = trained(Encoder().to(dtype), **options)
    path = tmp_path / "new" / "smart.safetensors"
    save_smart(smart, path)
    other = Smart(Encoder().to(dtype), SmartConfig(**options), 10)
    load_smart(other, path)
    assert_equal(flat(other), flat(smart))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tied_tensors_are_there_once(tmp_path: Path) -> None:
    model = TASKS["gpt2"].build()
    save_smart(Smart(model, SmartConfig(), 10), tmp_path / "smart.safetensors")
    tensors = load_file(tmp_path / "smart.safetensors")
    numbers = sum(t.numel() for name, t in tensors.items() if name.startswith("teacher."))
    assert numbers == sum(p.numel() for p in model.parameters())
    assert "teacher.lm_head.weight" not in tensors


def test_any_strides(tmp_path: Path) -> None:
    model = Encoder()
    model.head.weight.data = model.head.weight.data.t().contiguous().t()
    smart = trained(model)
    assert smart.teacher is not None
    assert not smart.teacher.shadows["head.weight"].is_contiguous()
    save_smart(smart, tmp_path / "smart.safetensors")
    other = Smart(Encoder(), SmartConfig(), 10)
    load_smart(other, tmp_path / "smart.safetensors")
    assert_equal(flat(other), flat(smart))


def resave(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher.head.bias": torch.zeros(4)},
            r"head\.bias: got shape torch\.Size\(\[4\]\), expected torch\.Size\(\[3\]\)",
        ),
        (
            {"teacher.head.bias": torch.zeros(3).half()},
            r"head\.bias: got dtype torch\.float16, expected torch\.float32",
        ),
        ({"teacher.head.bias": None}, r"head\.bias: missing"),
        ({"teacher.tail.bias": torch.zeros(1)}, r"tail\.bias: not in the model, or frozen there"),
        ({"updates": None, "generator": None}, "state: has no generator, updates"),
        ({"foo.bar": torch.ones(3)}, "state: has foo.bar, expected generator, skipped, updates alone"),
        (
            {"updates": torch.tensor(1.7)},
            r"updates: got torch\.float32 of shape \(\), expected torch\.int64 of shape \(\)",
        ),
        ({"updates": torch.tensor([1, 2])}, r"updates: got torch\.int64 of shape \(2,\)"),
        ({"updates": torch.tensor(True)}, r"updates: got torch\.bool"),
        ({"updates": torch.tensor(-3)}, "updates: got -3, expected an int >= 0"),
        ({"skipped": torch.tensor([1.5])}, r"skipped: got torch\.float32 of shape \(1,\), expected torch\.int64"),
        ({"skipped": torch.tensor(1)}, r"skipped: got torch\.int64 of shape \(\), expected .* \(1,\)"),
        ({"skipped": torch.tensor([-4])}, r"skipped: got \[-4\], expected >= 0"),
        ({"skipped": torch.zeros(1, 3).long()}, r"skipped: got torch\.int64 of shape \(1, 3\)"),
        ({"skipped": torch.zeros(0).long()}, r"skipped: got torch\.int64 of shape \(0,\), expected .* \(1,\)"),
        (
            {"skipped": torch.zeros(2).long()},
            r"generator: got torch\.uint8 of shape \(1, \d+\), expected .* \(2, \d+\)",
        ),
        (
            {"generator": torch.zeros(1, 16).byte()},
            r"generator: got torch\.uint8 of shape \(1, 16\), expected .* \(1, ",
        ),
        ({"generator": torch.zeros(0, 5056).byte()}, r"generator: got torch\.uint8 of shape \(0, 5056\)"),
        ({"generator": torch.Generator().get_state()}, r"generator: got torch\.uint8 of shape \(\d+,\)"),
        ({"generator": torch.zeros(1, 5056).byte()}, "generator: got a state that is not one on cpu: "),
    ],
)
def test_what_differs_is_said_and_nothing_changes(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "smart.safetensors"
    save_smart(trained(), path)
    resave(path, **changes)
    smart = trained()
    before = flat(smart)
    with pytest.raises(ValueError, match=rf"path: .*smart\.safetensors does not fit: .*{message}"):
        load_smart(smart, path)
    assert_equal(flat(smart), before)


def test_a_teacher_where_none_is_expected_is_an_error(tmp_path: Path) -> None:
    save_smart(trained(), tmp_path / "smart.safetensors")
    with pytest.raises(ValueError, match="has a teacher, expected none: mu is 0, proximal 'momentum'"):
        load_smart(trained(mu=0.0), tmp_path / "smart.safetensors")


def test_files_that_are_no_such_files(tmp_path: Path) -> None:
    path = tmp_path / "smart.safetensors"
    with pytest.raises(FileNotFoundError):
        load_smart(trained(), path)
    with pytest.raises(ValueError, match=r"path: got the folder .*, expected a file"):
        load_smart(trained(), tmp_path)
    save_smart(trained(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"path: .*smart\.safetensors is no complete safetensors file"):
        load_smart(trained(), path)


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "smart.safetensors"
    smart = trained()
    save_smart(smart, path)
    expected = flat(smart)

    def full(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "_to_disk", full)
    with pytest.raises(OSError, match="no space"):
        save_smart(trained(), path)
    monkeypatch.undo()
    load_smart(smart, path)
    assert_equal(flat(smart), expected)


def test_a_process_that_does_not_write(tmp_path: Path) -> None:
    save_smart(trained(), tmp_path / "smart.safetensors", write=False)
    assert not list(tmp_path.iterdir())


def test_other_numbers_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three, two go on, each with its generator; what was skipped by all is counted on. A fourth begins anew."""
    path = tmp_path / "smart.safetensors"
    save_smart(trained(), path)
    generators = torch.stack([torch.Generator().manual_seed(seed).get_state() for seed in range(3)])
    resave(path, generator=generators, skipped=torch.tensor([1, 10, 100]))
    for processes, rank, skipped in ((2, 0, 101), (2, 1, 10), (4, 2, 100), (4, 3, 0)):
        monkeypatch.setattr(checkpoint, "processes", lambda n=processes: n)
        monkeypatch.setattr(checkpoint, "rank", lambda n=rank: n)
        smart = trained()
        own = smart.generator.get_state()
        load_smart(smart, path)
        assert smart.skipped == skipped
        assert torch.equal(smart.generator.get_state(), generators[rank] if rank < 3 else own)


@requires_trainer
def test_killed_while_saving(tmp_path: Path) -> None:
    """20 processes that save SMART's state alone and 20 that train, each killed at a random moment by SIGKILL."""
    script = Path(__file__).with_name("killed_while_saving.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "files: 20 killed" in done.stdout
    assert "checkpoints: 20 killed" in done.stdout
    print(done.stdout)

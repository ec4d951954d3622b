"""What an interrupted training with SMART needs, in one safetensors file: no pickle, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from smart_kernels.smart.objective import Smart

TEACHER = "teacher."


def save_smart(smart: Smart, path: str | os.PathLike[str], *, write: bool | None = None) -> None:
    """Save what `smart` needs to go on: its teacher, the count of its updates, the generator of each process.

    The file is replaced at once and only when the new one lies on the disk, so a process killed at any moment leaves
    the old one or the new one. Every process has to call this: shards are put together, generators collected.

    Args:
        smart: the running training.
        path: of the file; its folder is made if there is none.
        write: whether this process writes; by default the first one does.

    Example:
        >>> import tempfile, torch
        >>> from smart_kernels import Smart, SmartConfig
        >>> from smart_kernels.smart.checkpoint import load_smart, save_smart
        >>> smart = Smart(torch.nn.Embedding(10, 4), SmartConfig(), num_training_steps=100)
        >>> smart.update()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_smart(smart, f"{folder}/smart.safetensors")
        ...     load_smart(smart, f"{folder}/smart.safetensors")
    """
    tensors = gather_state(smart)
    if _rank() == 0 if write is None else write:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        # not pickled, and each dense: a shadow has its parameter's strides
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"format": "smart_kernels"})
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)


def load_smart(smart: Smart, path: str | os.PathLike[str]) -> None:
    """Go on from what :func:`save_smart` wrote, on each process.

    A process that was not there when it was written keeps its own generator.

    Args:
        smart: a new object for the same model and a configuration with the same terms.
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not complete, or a name, shape or dtype differs; it is said which. Nothing was changed then.
    """
    try:
        restore_state(smart, load_file(path))
    except SafetensorError as error:
        raise ValueError(f"path: {os.fspath(path)} is no complete safetensors file: {error}") from None
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)} does not fit: {error}") from None


def gather_state(smart: Smart) -> dict[str, Tensor]:
    """The state of all processes as tensors by name; every process has to call this.

    Returns:
        "teacher.NAME" for each shadow, whole; "updates", a scalar; "skipped", shape (processes,), and "generator",
        shape (processes, bytes).
    """
    state = smart.state_dict()
    tensors = {TEACHER + name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state["teacher"].items()}
    tensors["updates"] = torch.tensor(state["updates"])
    for name in ("skipped", "generator"):
        # a sum, since that is the collective which every backend has on every device
        rows = state[name].new_zeros(_processes(), *state[name].shape, device=smart.skipped.device)
        rows[_rank()] = state[name]
        if len(rows) > 1:
            dist.all_reduce(rows)
        tensors[name] = rows.cpu()
    return tensors


def restore_state(smart: Smart, tensors: Mapping[str, Tensor]) -> None:
    """Set `smart` to what :func:`gather_state` gave.

    Raises:
        ValueError: something is missing or differs; nothing was changed then.
    """
    if missing := {"updates", "skipped", "generator"} - tensors.keys():
        raise ValueError(f"state: has no {', '.join(sorted(missing))}")
    shadows = {} if smart.teacher is None else smart.teacher.shadows
    state: dict[str, Any] = {
        "updates": int(tensors["updates"]),
        # samples that were skipped by processes that are no more are counted on
        "skipped": tensors["skipped"][_rank() :: _processes()].sum(),
        "generator": smart.generator.get_state(),
        "teacher": {},
    }
    if _rank() < len(tensors["generator"]):
        state["generator"] = tensors["generator"][_rank()]
    for name, t in tensors.items():
        if name.startswith(TEACHER):
            shadow = shadows.get(name := name.removeprefix(TEACHER))
            if isinstance(shadow, DTensor):  # each process takes its part of what it has read
                t = distribute_tensor(t, shadow.device_mesh, shadow.placements, src_data_rank=None)
            state["teacher"][name] = t
    smart.load_state_dict(state)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

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

from smart_kernels.smart.objective import Smart, check_names, check_tensor
from smart_kernels.smart.parallel import processes, rank

_TEACHER = "teacher."


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
    write = rank() == 0 if write is None else write
    tensors = gather_state(smart, keep=write)
    if write:
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

    The file may come from another number of processes. One that has no generator in it keeps its own.

    Args:
        smart: a new object for the same model and a configuration with the same terms.
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not complete, or a name, shape, dtype or value does not fit; the message says which. Nothing
            was changed then.
    """
    if Path(path).is_dir():
        raise ValueError(f"path: got the folder {os.fspath(path)}, expected a file")
    try:
        restore_state(smart, load_file(path))
    except SafetensorError as error:
        raise ValueError(f"path: {os.fspath(path)} is no complete safetensors file: {error}") from None
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)} does not fit: {error}") from None


def gather_state(smart: Smart, *, keep: bool = True) -> dict[str, Tensor]:
    """The state of all processes as tensors by name; every process has to call this.

    Args:
        smart: the running training.
        keep: whether this process is to have the shadows.

    Returns:
        "teacher.NAME" for each shadow, whole; "updates", a scalar; "skipped", shape (processes,), and "generator",
        shape (processes, bytes).
    """
    state = smart.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, shadow in state["teacher"].items():
        # put together one by one: a sharded model need not fit into one device
        whole = shadow.full_tensor().cpu() if hasattr(shadow, "full_tensor") else shadow
        if keep:
            tensors[_TEACHER + name] = whole
    tensors["updates"] = torch.tensor(state["updates"])
    for name in ("skipped", "generator"):
        # a sum, since that is the collective which every backend has on every device
        rows = state[name].new_zeros(processes(), *state[name].shape, device=smart.skipped.device)
        rows[rank()] = state[name]
        if len(rows) > 1:
            dist.all_reduce(rows)
        tensors[name] = rows.cpu()
    return tensors


def restore_state(smart: Smart, tensors: Mapping[str, Tensor]) -> None:
    """Set `smart` to what :func:`gather_state` gave.

    Raises:
        ValueError: something is missing, unknown or does not fit; nothing was changed then.
    """
    check_names({n for n in tensors if not n.startswith(_TEACHER)}, {"updates", "skipped", "generator"})
    skipped, generator = tensors["skipped"], tensors["generator"]
    own = smart.generator.get_state()
    check_tensor("updates", tensors["updates"], torch.int64, ())
    count = max(1, len(skipped)) if isinstance(skipped, Tensor) and skipped.dim() else 1  # of processes
    check_tensor("skipped", skipped, torch.int64, (count,))
    if (skipped < 0).any():
        raise ValueError(f"state: skipped: got {skipped.tolist()}, expected >= 0")
    check_tensor("generator", generator, torch.uint8, (count, *own.shape))
    state: dict[str, Any] = {
        "updates": int(tensors["updates"]),
        # samples that were skipped by processes that are no more are counted on
        "skipped": skipped[rank() :: processes()].sum(),
        "generator": generator[rank()] if rank() < count else own,
        "teacher": {n.removeprefix(_TEACHER): t for n, t in tensors.items() if n.startswith(_TEACHER)},
    }
    smart.load_state_dict(state)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

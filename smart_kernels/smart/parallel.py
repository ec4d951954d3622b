"""What torch puts around a model to train it on several processes, as far as extra passes must know of it.

A forward pass through DistributedDataParallel makes its reducer wait for one backward pass. So one pass of a step goes
through it, and the others call the module that it wraps. Where parameters are sharded (fully_shard), the model's own
hooks gather them in every pass, and the shards are what is swapped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def check_supported(model: nn.Module) -> None:
    """Refuse the wrappers that copy or flatten parameters.

    Raises:
        TypeError: the model is wrapped by DataParallel or by the first FullyShardedDataParallel, or of torch.jit.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported for those who have no use for it
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model: got a {type(module).__name__} of torch.jit, expected a plain module; or torch.compile"
            )
        if isinstance(module, DataParallel) or (fsdp and isinstance(module, fsdp.FullyShardedDataParallel)):
            raise TypeError(
                f"model: got a {type(module).__name__}, expected a plain module, DistributedDataParallel "
                "or one that fully_shard was applied to"
            )


def bare(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch.compile and of DistributedDataParallel, which go before its names."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def without_reducer(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel wraps; the model itself where it is not there."""
    reducer = _reducer(model)
    return model if reducer is None else reducer.module  # type: ignore[no-any-return]


def learns_static_graph(model: nn.Module) -> bool:
    """Whether a reducer with ``static_graph=True`` takes the next backward pass, of whatever, for the step's own."""
    reducer = _reducer(model)
    learnt = getattr(reducer, "_static_graph_delay_allreduce_enqueued", False)
    return reducer is not None and bool(reducer.static_graph) and not learnt


def finds_unused(model: nn.Module) -> bool:
    """Whether a reducer looks through the graph of what its model gives for the parameters that are used."""
    reducer = _reducer(model)
    return reducer is not None and bool(reducer.find_unused_parameters)


def _inner(model: nn.Module) -> nn.Module | None:
    return model.module if isinstance(model, DistributedDataParallel) else model._modules.get("_orig_mod")


def _reducer(model: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(model, DistributedDataParallel):
        if (inner := _inner(model)) is None:
            return None
        model = inner
    return model


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that fully_shard was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def gathering(model: nn.Module) -> list[nn.Module]:
    """The same as modules, the outermost first."""
    return [m for m in sharded_modules(model) if isinstance(m, nn.Module)]


def gather_before_backward(modules: Sequence[Any], x: Tensor) -> None:
    """Let a backward pass gather the shards of modules when it comes to a tensor, as it does at what a module gives."""
    if x.requires_grad:
        for module in modules:
            x.register_hook(module._get_fsdp_state()._pre_backward)


def reshard(modules: Sequence[FSDPModule]) -> None:
    """Free what was gathered: the parameters are the shards, and the next pass gathers anew."""
    for module in modules:
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process: the shard of a DTensor, maybe empty, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def sharded_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, which every process has, as a DTensor of the same layout as `tensor` where that is one."""
    if not hasattr(tensor, "to_local") or hasattr(whole, "to_local"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def write_shards(modules: Sequence[FSDPModule], shards: list[Tensor], values: list[Tensor]) -> None:
    """Put values into the memory of shards, for the passes to come, forward and backward."""
    reshard(modules)
    states = [module._get_fsdp_state() for module in modules]
    handle = states[0]._device_handle
    if handle is not torch.cpu and shards[0].device.type == "cpu":
        handle.synchronize()  # offloaded shards: a pass before may still be reading them
    torch._foreach_copy_(shards, values)
    for state in states:
        # A backward pass gathers on a stream that waits for such work at the next forward pass alone.
        if (stream := getattr(state._comm_ctx, "all_gather_copy_in_stream", None)) is not None:
            stream.wait_stream(handle.current_stream())


class Reduction:
    """Decides when groups of shards send their gradients: in the backward pass that gives the last of them.

    A group sends whenever a backward pass has gone through its module, and sends all gradients that wait by then, those
    of earlier micro-batches among them. The gradient of several passes is complete when the last one is done.

    Args:
        modules: those that fully_shard was applied to; where there are none, nothing is ever held.
    """

    def __init__(self, modules: Sequence[FSDPModule]) -> None:
        self._modules = modules
        self._held: list[tuple[Any, bool]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Backward passes in this context send nothing: they give the weights no gradient."""
        self._hold()
        try:
            yield
        finally:
            self._release()

    def after(self, early: Sequence[Tensor], late: Sequence[Tensor]) -> None:
        """Let the backward pass send nothing from when it comes to `early` tensors until it comes to `late` ones."""
        if not self._modules:
            return
        self._release()  # should a backward pass have failed half-way

        def hold(_gradient: Tensor) -> None:
            if not self._held:
                self._hold()
                torch.autograd.Variable._execution_engine.queue_callback(self._release)

        for tensors, hook in ((early, hold), (late, lambda _gradient: self._release())):
            for x in tensors:
                if x.requires_grad:
                    x.register_hook(hook)

    def _hold(self) -> None:
        self._release()
        self._held = [(group, group.reduce_grads) for group in _parameter_groups(self._modules)]
        for group, _ in self._held:
            group.reduce_grads = False

    def _release(self) -> None:
        for group, flag in self._held:
            group.reduce_grads = flag
        self._held = []


def _parameter_groups(modules: Sequence[FSDPModule]) -> list[Any]:
    groups: list[Any] = []
    for state in {id(state): state for state in (module._get_fsdp_state() for module in modules)}.values():
        of_state = getattr(state, "_fsdp_param_groups", None)
        groups += [state._fsdp_param_group] if of_state is None else of_state  # older torch: one, or None
    return [group for group in groups if group is not None]


def rank() -> int:
    """The number of this process among those that train together; 0 for a single one."""
    return torch.distributed.get_rank() if _started() else 0


def processes() -> int:
    """How many processes train together; 1 for a single one."""
    return torch.distributed.get_world_size() if _started() else 1


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

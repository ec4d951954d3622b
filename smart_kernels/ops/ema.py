"""Exponential moving average of a list of tensors, in place: public function, schema, fake."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from smart_kernels import reference
from smart_kernels.ops._chunks import DTYPES, check_memory, chunk_table
from smart_kernels.ops._library import (
    LIBRARY,
    OPS,
    changes_arguments,
    define,
    draw_seed,
    load_compiled,
    serve_by_triton,
)


def ema_update_(
    ema_tensors: Iterable[Tensor],
    parameters: Iterable[Tensor],
    decay: float | Tensor,
    *,
    stochastic_rounding: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    r"""Move every shadow e towards its parameter p, in place: :math:`e \leftarrow e + (1 - \beta)(p - e)`.

    The momentum teacher of SMART (Jiang et al. 2020, arXiv 1911.03437, section 3.2). All tensors are updated by
    one launch, whatever their number, sizes and dtypes. The arithmetic is that of float32 (of float64 for
    float64), and a result is off by less than one unit in its last place.

    Args:
        ema_tensors: the shadows e, changed in place; float32, bfloat16, float16 or float64, of any shapes and
            strides, all on one device. The same shadow given twice with the same parameter (tied weights) is
            updated once. Beside float16 or bfloat16 parameters a shadow should be float32: rounded to nearest,
            a bfloat16 shadow stands still at ``decay=0.999`` until p is three times e.
        parameters: the parameters p, as many, of the same shapes; float32, bfloat16 and float16 mix freely,
            float64 goes with float64. No gradient flows into them.
        decay: the factor :math:`\beta` in [0, 1], as a number, or as a floating tensor of no dimensions on the
            same device, whose value is read by the kernel: a schedule then needs no synchronisation, and a CUDA
            graph can be replayed with another value. 1 leaves e as it is and 0 copies p, to the bit.
        stochastic_rounding: round bfloat16 and float16 shadows up or down at random, with the probabilities that
            make the result right on average, instead of to nearest. Wider shadows are not affected.
        generator: where the seed of the random numbers comes from; by default that of the device. One 64-bit
            seed is drawn for a call, on the generator's device: from the device's own, it stays there, and each
            replay of a CUDA graph draws another. A seed gives the same bits for any number of threads, and on
            any device for tensors that lie dense in memory.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: numbers of tensors, shapes or devices do not fit, a shadow overlaps another tensor or itself,
            or it requires grad where grad mode is on; decay is outside [0, 1]. Nothing has been changed then.

    Example:
        >>> import torch
        >>> from smart_kernels import ema_update_
        >>> shadow, parameter = torch.zeros(2), torch.ones(2)
        >>> ema_update_([shadow], [parameter], decay=0.75)
        >>> shadow
        tensor([0.2500, 0.2500])
    """
    if not isinstance(stochastic_rounding, bool):
        raise TypeError(f"stochastic_rounding: got {type(stochastic_rounding).__name__}, expected bool")
    shadows, sources = _as_list("ema_tensors", ema_tensors), _as_list("parameters", parameters)
    if not shadows and not sources:
        return
    if not shadows or not isinstance(shadows[0], Tensor):
        _check(shadows, sources)
    device = shadows[0].device
    value, tensor = _check_decay(decay, device)
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if torch.is_grad_enabled() and (tracing or torch._C._any_requires_grad(*shadows)):
        _check(shadows, sources)
        for i, e in enumerate(shadows):
            if e.requires_grad:
                raise ValueError(f"ema_tensors[{i}]: requires grad, expected a constant, or a call in no_grad mode")
    if device.type in _SERVED and not tracing:
        # Lists of tensors do not pass the dispatcher, which would cost more than the update of small ones.
        table, dtypes = chunk_table(shadows, sources, _check)
        seed = draw_seed(generator, device) if stochastic_rounding else None
        torch.autograd.graph.increment_version(reversed(shadows))  # the last ones read are in cache
        _update_chunks(table, dtypes, value, tensor, seed)
    else:
        _check(shadows, sources)
        if not tracing:
            check_memory(shadows, sources)
        seed = draw_seed(generator, device) if stochastic_rounding else None
        with torch.no_grad():
            _update(shadows, sources, value, tensor, seed)


def _as_list(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, list):
        return tensors
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name}: got {type(tensors).__name__}, expected a sequence of tensors")
    return list(tensors)


def _check_decay(decay: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    if not isinstance(decay, Tensor):
        if isinstance(decay, bool) or not isinstance(decay, (float, int)):
            raise TypeError(f"decay: got {type(decay).__name__}, expected a number or a tensor")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: got {decay}, expected a number from 0 to 1")
        return float(decay), None
    if not decay.is_floating_point():
        raise TypeError(f"decay: got dtype {decay.dtype}, expected a floating one")
    if decay.dim():
        raise ValueError(f"decay: got shape {tuple(decay.shape)}, expected no dimensions")
    if decay.device != device:
        raise ValueError(f"decay: got device {decay.device}, expected that of the shadows, {device}")
    decay = decay.detach()
    return 0.0, decay if decay.dtype in (torch.float32, torch.float64) else decay.double()


def _check(ema_tensors: list[Tensor], parameters: list[Tensor]) -> None:
    """Check both lists tensor by tensor, all but where they lie in memory."""
    named = [
        (f"{name}[{i}]", x)
        for name, tensors in (("ema_tensors", ema_tensors), ("parameters", parameters))
        for i, x in enumerate(tensors)
    ]
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
        if hasattr(x, "to_local"):
            raise TypeError(f"{name}: got a {type(x).__name__}, expected its part in this process, x.to_local()")
    if len(ema_tensors) != len(parameters):
        raise ValueError(f"parameters: got {len(parameters)} tensors, expected {len(ema_tensors)}, one for each shadow")
    for name, x in named:
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected float16, bfloat16, float32 or float64")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: got layout {x.layout}, expected torch.strided")
        if x.device != ema_tensors[0].device:
            raise ValueError(
                f"{name}: got device {x.device}, expected that of ema_tensors[0], {ema_tensors[0].device}: "
                "call ema_update_ once per device"
            )
    for i, (e, p) in enumerate(zip(ema_tensors, parameters, strict=True)):
        if e.shape != p.shape:
            raise ValueError(
                f"parameters[{i}]: got shape {tuple(p.shape)}, expected that of its shadow, {tuple(e.shape)}"
            )
        if e.dtype != p.dtype and torch.float64 in (e.dtype, p.dtype):
            raise TypeError(
                f"parameters[{i}]: got dtype {p.dtype} beside {e.dtype}, expected float64 for both or neither"
            )


def _in_chunks(
    ema_tensors: list[Tensor], parameters: list[Tensor], decay: float, decay_tensor: Tensor | None, seed: Tensor | None
) -> None:
    """The kernels that see addresses alone."""
    _update_chunks(*chunk_table(ema_tensors, parameters, _check), decay, decay_tensor, seed)


def _reference(
    ema_tensors: list[Tensor], parameters: list[Tensor], decay: float, decay_tensor: Tensor | None, seed: Tensor | None
) -> None:
    """The eager function, after all checks."""
    _check(ema_tensors, parameters)
    places = check_memory(ema_tensors, parameters)
    with torch.no_grad():
        reference.ema_update_(
            [ema_tensors[i] for i in places], [parameters[i] for i in places], decay, decay_tensor, seed
        )


def _fake(
    ema_tensors: list[Tensor], parameters: list[Tensor], decay: float, decay_tensor: Tensor | None, seed: Tensor | None
) -> None:
    _check(ema_tensors, parameters)


_update = define(
    "ema_update_(Tensor(a!)[] ema_tensors, Tensor[] parameters, float decay, Tensor? decay_tensor, Tensor? seed) -> ()",
    reference=_reference,
    fake=_fake,
)
changes_arguments(_update, "ema_update_")

# Behind it, for the kernels that are compiled: addresses are all that they see of the tensors.
LIBRARY.define("ema_update_chunks(Tensor table, int dtypes, float decay, Tensor? decay_tensor, Tensor? seed) -> ()")
_update_chunks = torch.ops.smart_kernels.ema_update_chunks.default
_SERVED = {device for device, module in (("cpu", "_C"), ("cuda", "_C_cuda")) if load_compiled()[module] is None}
if "cuda" not in _SERVED and serve_by_triton("ema_update_chunks", "smart_kernels.triton_kernels.ema:ema_update_chunks"):
    _SERVED.add("cuda")
    OPS["ema_update_"] = "Triton"
for _device in _SERVED:
    LIBRARY.impl("ema_update_", _in_chunks, _device.upper())

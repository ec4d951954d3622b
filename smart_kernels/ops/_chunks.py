"""Lists of tensors as tables of chunks that a kernel walks through in one launch, made once for each list."""

from __future__ import annotations

import importlib
import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smart_kernels.ops._library import NAMESPACE, load_compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Numbered here as the kernels do."""

CHUNK = 8192
"""Elements of a chunk at most: 32 for each of the 256 threads that do it on a GPU."""

NOISE_GROUP = 64
"""Elements that share counters of the random generator; a chunk starts with a new group."""

_KEPT = 32
_tables: list[_Table] = []  # of the last lists, the latest first
_captured: list[Tensor] = []  # a CUDA graph reads its table at every replay


def chunk_table(
    written: list[Tensor], read: list[Tensor], check: Callable[[list[Tensor], list[Tensor]], None]
) -> tuple[Tensor, int]:
    """The table for pairs of tensors where they lie now, on their device, and the dtypes that occur in it.

    Args:
        written: tensors that the kernel changes, all on one device.
        read: as many tensors of the same shapes.
        check: called with both lists before a table is made for them; raises where they do not fit.

    Returns:
        int64, a column for each chunk. The rows: address in the tensor written and in the one read; number of
        elements before the chunk, as if all before were multiples of `NOISE_GROUP` long, and in it; the dtypes,
        the one read times four; the two strides, in elements. And a number whose bit i is set if i occurs among
        the dtypes, for kernels that are compiled for no others.

    Raises:
        ValueError: a tensor written shares memory with another tensor or within itself.
        RuntimeError: a table would have to be made while a CUDA graph is captured.
    """
    found = next((table for table in _tables if table.fits(written, read)), None)
    device = written[0].device if found is None else found.chunks.device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if found is None:
        check(written, read)
        if capturing:
            raise RuntimeError(
                "smart_kernels: these tensors are not known yet where they lie now, and a table of them cannot be "
                "copied to the device while a CUDA graph is captured: make the same call once before"
            )
        chunks = make_table(written, read).to(device)
        if device.type == "cuda" and len(_tables) == _KEPT:
            torch.cuda.synchronize(device)  # a kernel on another stream may still read the table that goes
        found = _Table(_Description.of(written), _Description.of(read), chunks, _dtypes(written, read))
    if found is not (_tables[0] if _tables else None):
        _tables[:] = [found, *(table for table in _tables if table is not found)][:_KEPT]
    if capturing and not any(found.chunks is chunks for chunks in _captured):
        _captured.append(found.chunks)
    return found.chunks, found.dtypes


def _dtypes(written: list[Tensor], read: list[Tensor]) -> int:
    numbers = {DTYPES.index(w.dtype) + 4 * DTYPES.index(r.dtype) for w, r in zip(written, read, strict=True)}
    return sum(1 << number for number in numbers)


def make_table(written: list[Tensor], read: list[Tensor]) -> Tensor:
    """The table of `chunk_table`, anew and in the CPU's memory."""
    pairs = [(written[i], read[i]) for i in check_memory(written, read)]
    runs = [run for pair in pairs if pair[0].numel() for run in _runs(*pair)]
    w, r, count, dtypes, w_stride, r_stride = torch.tensor(runs, dtype=torch.int64).view(-1, 6).unbind(1)
    chunks = -(-count // CHUNK)
    run = torch.repeat_interleave(chunks)
    offset = CHUNK * (torch.arange(run.numel()) - (chunks.cumsum(0) - chunks)[run])
    count, dtypes, w_stride, r_stride = (
        (count[run] - offset).clamp(max=CHUNK),
        dtypes[run],
        w_stride[run],
        r_stride[run],
    )
    padded = -(-count // NOISE_GROUP) * NOISE_GROUP
    size = torch.tensor([dtype.itemsize for dtype in DTYPES])
    w = w[run] + offset * w_stride * size[dtypes % 4]
    r = r[run] + offset * r_stride * size[dtypes // 4]
    return torch.stack([w, r, padded.cumsum(0) - padded, count, dtypes, w_stride, r_stride])


def _runs(w: Tensor, r: Tensor) -> list[tuple[int, ...]]:
    """A pair of tensors as runs of elements with one stride each: a single one where both are dense and alike."""
    dims: list[tuple[int, int, int]] = []
    for w_stride, r_stride, size in sorted(zip(w.stride(), r.stride(), w.shape, strict=True), reverse=True):
        if size == 1:
            continue
        inner = size
        if dims and dims[-1][:2] == (w_stride * size, r_stride * size):
            inner *= dims.pop()[2]
        dims.append((w_stride, r_stride, inner))
    dims = dims or [(1, 1, 1)]
    dense = dims[-1][:2] == (1, 1) and dims[-1][2] >= NOISE_GROUP
    along = dims.pop() if dense else dims.pop(max(range(len(dims)), key=lambda d: dims[d][2]))
    dtypes = DTYPES.index(w.dtype) + 4 * DTYPES.index(r.dtype)
    return [
        (
            w.data_ptr() + w.itemsize * sum(i * dim[0] for i, dim in zip(index, dims, strict=True)),
            r.data_ptr() + r.itemsize * sum(i * dim[1] for i, dim in zip(index, dims, strict=True)),
            along[2],
            dtypes,
            along[0],
            along[1],
        )
        for index in itertools.product(*(range(dim[2]) for dim in dims))
    ]


def check_memory(written: list[Tensor], read: list[Tensor]) -> list[int]:
    """Check that no tensor written shares memory with another; returns their places, of tied ones the first alone."""
    first: dict[object, int] = {}
    places = []
    for i, (w, r) in enumerate(zip(written, read, strict=True)):
        same = first.setdefault(_describe_slowly([w])[0], i) if w.numel() else i
        if same == i:
            places.append(i)
        elif _describe_slowly([read[same]]) != _describe_slowly([r]):
            raise ValueError(
                f"ema_tensors[{i}]: is ema_tensors[{same}] too, expected the same parameter for both, got two"
            )
    extents = []
    for name, tensors, indices in (("ema_tensors", written, places), ("parameters", read, range(len(read)))):
        for i in indices:
            x = tensors[i]
            if not x.numel():
                continue
            if x.is_neg():
                raise ValueError(f"{name}[{i}]: got a view that negates its elements, expected x.resolve_neg()")
            length, shared = span(x)
            if shared and tensors is written:
                raise ValueError(
                    f"{name}[{i}]: elements share memory (shape {tuple(x.shape)}, strides {x.stride()}), "
                    "expected a place of its own for each"
                )
            extents.append((x.data_ptr(), x.data_ptr() + length * x.itemsize, f"{name}[{i}]", tensors is written))
    # In the order of where they begin, each need only be held against what reaches furthest so far, of both kinds.
    furthest: dict[bool, tuple[int, str]] = {}
    for begin, end, name, is_written in sorted(extents):
        for other, (reach, other_name) in furthest.items():
            if (is_written or other) and reach > begin:
                raise ValueError(f"{name}: shares memory with {other_name}, expected shadows in memory of their own")
        if is_written not in furthest or end > furthest[is_written][0]:
            furthest[is_written] = (end, name)
    return places


def span(x: Tensor) -> tuple[int, bool]:
    """Elements from a tensor's first in memory to its last, and whether two of its own may share a place."""
    length, shared = 1, False
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        shared |= size > 1 and stride < length
        length += (size - 1) * stride
    return length, shared


def _describe_slowly(tensors: list[Tensor]) -> list[object]:
    return [(x.data_ptr(), x.device, x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x for x in tensors]


_compiled = importlib.import_module(f"{NAMESPACE}._C") if load_compiled()["_C"] is None else None


@dataclass(frozen=True)
class _Description:
    """All of a list of tensors that its chunks depend on."""

    content: object
    """In bytes where compiled code can read the tensors, which takes some 60 ns for each."""

    places: bytes
    """Addresses of the tensors and of their storages, which help to have them in cache when they are read again."""

    @staticmethod
    def of(tensors: list[Tensor]) -> _Description:
        content = _compiled.describe(tensors) if _compiled else None
        if content is None:
            return _Description(_describe_slowly(tensors), b"")
        places = itertools.chain.from_iterable((x._cdata, x.untyped_storage()._cdata) for x in tensors)
        return _Description(content, array("Q", places).tobytes())

    def fits(self, tensors: list[Tensor]) -> bool:
        if _compiled and isinstance(self.content, bytes):
            return bool(_compiled.matches(tensors, self.content, self.places))
        return _describe_slowly(tensors) == self.content


@dataclass(frozen=True)
class _Table:
    """Chunks, and what the tensors that they are pieces of were like."""

    written: _Description
    read: _Description
    chunks: Tensor
    dtypes: int

    def fits(self, written: list[Tensor], read: list[Tensor]) -> bool:
        return self.read.fits(read) and self.written.fits(written)

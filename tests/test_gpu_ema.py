"""What a card would run: the compiled CUDA and Triton kernels of ema_update_, held against the C++ kernel.

They are executed on the CPU. All three have one arithmetic (csrc/ema_formula.h) and the same random numbers, so all
results are the same to the bit. An access outside a tensor, one wider than its address is aligned, or a write to a
parameter raises.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from oracle import Ema

pytest.importorskip("triton")
from gpu_evidence import executed, nvcc, ptxrun

import smart_kernels
from gpu_code import ahead_of_time_cuda
from smart_kernels.ops import _chunks
from smart_kernels.triton_kernels import ema as triton_kernel

update_chunks = torch.ops.smart_kernels.ema_update_chunks.default
CSRC = Path(__file__).resolve().parents[1] / "csrc"
THREADS = 256
NARROW = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = (*itertools.product(NARROW, NARROW), (torch.float64, torch.float64))
SIZES = (1, 2, 3, 7, 8, 31, 33, 64, 65, 127, 1000, 1025, 8191, 8193)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def source(stochastic: bool) -> str:
    arguments = "EmaChunks, double, const void*, bool, const uint64_t*"
    kernel = f"smart_kernels::ema_update_kernel<{str(stochastic).lower()}>"
    include = '#include "cuda/ema_kernel.cuh"'
    return f"{include}\nusing namespace smart_kernels;\ntemplate __global__ void {kernel}({arguments});\n"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    if smart_kernels.COMPILED["_C"] is not None:
        pytest.skip("the compiled CPU kernels, to compare with, are not built here")
    return ptxrun()


@pytest.fixture(scope="module", params=["CUDA", "Triton"])
def launch(request: pytest.FixtureRequest, tool: ModuleType) -> Callable[..., Any]:
    """Executes a table of chunks of these pairs, as the launcher of either kernel would launch it."""
    if request.param == "CUDA":
        nvcc()

    def array(x: torch.Tensor, writable: bool) -> Any:
        numbers = x.view(BITS[x.itemsize]).numpy()
        if not writable:
            numbers.flags.writeable = False
        return tool.Guard(numbers, x.data_ptr() % 256)

    def addresses(column: torch.Tensor, tensors: list[torch.Tensor], writable: bool) -> Any:
        tensors = sorted((x for x in tensors if x.numel()), key=torch.Tensor.data_ptr)
        begins, arrays = [x.data_ptr() for x in tensors], [array(x, writable) for x in tensors]
        places = [(bisect.bisect_right(begins, address) - 1, address) for address in column.tolist()]
        return tool.PtrTable([tool.Ptr(arrays[i], address - begins[i]) for i, address in places])

    def run_triton(
        table: torch.Tensor,
        pairs: Pairs,
        decay: float | torch.Tensor,
        seed: int | None = None,
        arch: int = 90,
        **options: Any,
    ) -> Any:
        shadows, parameters = (addresses(table[i], [pair[i] for pair in pairs], i == 0) for i in range(2))
        both = tool.PtrTable(shadows.arrs + parameters.arrs)
        both.dtype = torch.int64
        replaced = {"addresses_ptr": tool.Guard(both)}
        value, where = (decay, None) if isinstance(decay, float) else (0.5, decay)
        random = None if seed is None else torch.tensor(seed)
        # One launch does it, but compiled for all dtypes at once it would take a minute: so one for each of them.
        with executed(tool, arch, replaced, **options) as launches:
            for dtypes in table[4].unique().tolist():
                triton_kernel.ema_update_chunks(table, 1 << dtypes, value, where, random)
        return launches[-1]

    def run(
        table: torch.Tensor,
        pairs: Pairs,
        decay: float | torch.Tensor,
        seed: int | None = None,
        arch: int = 90,
        **options: Any,
    ) -> Any:
        ptx = tool.nvcc_ptx(source(seed is not None), arch, ("-I", str(CSRC), "-std=c++20"))
        columns = [column.numpy() for column in table]
        chunks = tool.Struct(
            "<7Q",
            addresses(table[0], [e for e, _ in pairs], True),
            addresses(table[1], [p for _, p in pairs], False),
            *columns[2:],
        )
        value, where = (decay, None) if isinstance(decay, float) else (0.5, decay)
        is_double = where is not None and where.dtype == torch.float64
        random = None if seed is None else np.array([seed], np.int64)
        arguments = [chunks, value, None if where is None else where.view(1), is_double, random]
        return tool.run_ptx(ptx, None, table.shape[1], THREADS, arguments, **options)

    return run if request.param == "CUDA" else run_triton


def pair(shape: int | tuple[int, ...], e: torch.dtype, p: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A shadow and a parameter: close, far apart, of different sizes and signs, some infinite or NaN."""
    shadow = torch.randn(shape, dtype=torch.float64)
    parameter = shadow + torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-5, 4, shadow.shape)
    if shadow.numel() > 100:
        odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 6e-8, 3e38, -3e38])
        shadow.view(-1)[40:49], parameter.view(-1)[45:54] = odd, odd
    return shadow.to(e), parameter.to(p)


def check(
    launch: Callable[..., Any], pairs: Pairs, decay: float | torch.Tensor, seed: int | None = None, **options: Any
) -> Any:
    """The same bits as the C++ kernel; NaNs are NaNs."""
    shadows, parameters = [e for e, _ in pairs], [p for _, p in pairs]
    before = [e.clone() for e in shadows]
    table = _chunks.make_table(shadows, parameters)
    stats = launch(table, pairs, decay, seed, **options)
    after = [e.clone() for e in shadows]
    for e, old in zip(shadows, before, strict=True):
        e.copy_(old)
    value, tensor = (decay, None) if isinstance(decay, float) else (0.5, decay)
    update_chunks(table, 0, value, tensor, None if seed is None else torch.tensor(seed))
    for e, result in zip(shadows, after, strict=True):
        bits = BITS[e.itemsize]
        same = (e.view(bits) == result.view(bits)) | (e.isnan() & result.isnan())
        assert same.all(), f"{(~same).sum()} of {e.numel()} differ: {e[~same][:4]}, {result[~same][:4]}"
    return stats


@pytest.mark.parametrize("seed", [None, -3])
@pytest.mark.parametrize("decay", [0.999, 0.3, 0.0, 1.0])
def test_every_pair_of_dtypes_in_one_launch(launch: Callable[..., Any], decay: float, seed: int | None) -> None:
    pairs = [pair(size, *dtypes) for size in SIZES for dtypes in PAIRS]
    check(launch, pairs, decay, seed)


@pytest.mark.parametrize("seed", [None, 5])
def test_misaligned_slices(launch: Callable[..., Any], seed: int | None) -> None:
    pairs = []
    for dtypes, first_e, first_p in itertools.product(PAIRS, (0, 1, 2, 3, 7, 8), (0, 1, 3, 4, 9)):
        e, p = pair(600, *dtypes)
        pairs.append((e[first_e : first_e + 587], p[first_p : first_p + 587]))
    check(launch, pairs, 0.9, seed)
    check(launch, [(e[:3], p[:3]) for e, p in pairs], 0.9, seed)  # shorter than what precedes an aligned address


@pytest.mark.parametrize("seed", [None, 7])
def test_any_strides(launch: Callable[..., Any], seed: int | None) -> None:
    pairs = []
    for dtypes in (PAIRS[0], PAIRS[3], PAIRS[4], PAIRS[-1]):
        e, p = pair((40, 90), *dtypes)
        pairs += [(e[:20, :64], p[:20, 5:69]), (e[20:, 5:80:3], p.t()[:25, :20].t())]
        e, p = pair((7, 9, 11), *dtypes)
        pairs.append((e.permute(2, 0, 1), p.permute(1, 0, 2).contiguous().permute(2, 1, 0)))
        pairs.append((torch.randn(70).to(dtypes[0]), p[0, 0, :1].expand(70)))
    check(launch, pairs, 0.9, seed)


@pytest.mark.parametrize("count", [1, 500])
def test_any_number_of_tensors_in_any_order_of_blocks(launch: Callable[..., Any], count: int) -> None:
    pairs = [pair(1 + i * 37 % 211, *PAIRS[i % len(PAIRS)]) for i in range(count)]
    for seed in (None, 11):
        stats = check(launch, pairs, 0.99, seed, order="shuffle", racecheck=True)
        assert stats.races == []
        assert stats.ctas == count


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(launch: Callable[..., Any], arch: int) -> None:
    # ptxrun misreads `sub.f32.bf16` of sm_100, a float32 taken from a narrow number, which newer Tritons write where
    # elements go one by one. So there are multiples of 16 elements, which go in groups.
    def size(p: torch.dtype) -> int:
        return 992 if arch == 100 and p.itemsize == 2 and launch.__name__ == "run_triton" else 1000

    check(launch, [pair(size(p), e, p) for e, p in PAIRS], 0.99, arch=arch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_on_the_device(launch: Callable[..., Any], dtype: torch.dtype) -> None:
    for decay in (0.9, 0.0, 1.0):
        check(launch, [pair(100, *dtypes) for dtypes in PAIRS], torch.tensor(decay, dtype=dtype))


@pytest.mark.parametrize("seed", [None, 13])
def test_elements_beyond_two_to_the_31(launch: Callable[..., Any], tmp_path: Path, seed: int | None) -> None:
    """Offsets do not overflow: the last chunks of tensors in files that hold no data but there."""
    size = 2**31 + 20_000
    e, p = (torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=torch.bfloat16) for name in "ep")
    tail = slice(size - 10_001, size)
    e[tail], p[tail] = (x.nan_to_num(0, 0, 0) for x in pair(10_001, torch.bfloat16, torch.bfloat16))
    before, truth = e[tail].clone(), Ema(e[tail], p[tail], 0.9)
    table = _chunks.make_table([e], [p])[:, -3:].contiguous()
    launch(table, [(e, p)], 0.9, seed)
    result = e[tail].clone()
    if seed is None:
        truth.check(result)
    e[tail] = before
    update_chunks(table, 0, 0.9, None, None if seed is None else torch.tensor(seed))
    assert torch.equal(e[tail], result)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(target: str, stochastic: bool) -> None:
    """No spills, 16 bytes to an access, and as few registers as the blocks need that hide the memory's latency."""
    nvcc()
    code = ahead_of_time_cuda(target, source(stochastic), THREADS, CSRC)
    assert code.spills == 0
    assert code.loads[16] > 0
    assert code.stores[16] > 0
    # Of 65536 registers, four blocks of 256 threads; two where random numbers are made, which takes arithmetic.
    assert code.registers <= 65536 // (THREADS * (2 if stochastic else 4))


def test_a_graph_is_captured_with_a_table_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a device: no table is copied while a graph is captured, and one captured is never dropped."""
    device, capturing = torch.device("cuda"), mock.Mock(return_value=False)

    def made() -> Any:
        """A table that was copied to the device."""
        return mock.Mock(**{"to.return_value": mock.Mock(device=device)})

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock())
    monkeypatch.setattr(_chunks, "make_table", mock.Mock(side_effect=lambda *lists: made()))
    monkeypatch.setattr(_chunks, "_compiled", None)
    monkeypatch.setattr(_chunks, "_describe_slowly", list)
    monkeypatch.setattr(_chunks, "_tables", [])
    monkeypatch.setattr(_chunks, "_captured", [])
    lists = [[mock.Mock(device=device, dtype=torch.float32)] for _ in range(40)]

    def table(tensors: list[Any]) -> Any:
        return _chunks.chunk_table(tensors, tensors, lambda *lists: None)[0]

    first = table(lists[0])
    capturing.return_value = True
    with pytest.raises(RuntimeError, match="make the same call once before"):
        table(lists[1])
    assert table(lists[0]) is first
    assert table(lists[0]) is first
    capturing.return_value = False
    for tensors in lists:
        table(tensors)
    assert _chunks._captured == [first]
    assert torch.cuda.synchronize.called

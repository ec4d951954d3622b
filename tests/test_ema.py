"""ema_update_ against extended precision: the CPU kernel and the eager reference; the public contract."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extension import for_each_lower_instruction_set, requires_extension, run_again
from hypothesis import given
from hypothesis import strategies as st
from oracle import Ema, ulp, wide

import smart_kernels
from smart_kernels import ema_update_, reference
from smart_kernels.ops import _chunks

update = torch.ops.smart_kernels.ema_update_.default
NARROW = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = (*itertools.product(NARROW, NARROW), (torch.float64, torch.float64))
SIZES = (1, 2, 3, 31, 33, 63, 64, 65, 127, 1000, 8191, 8192, 8193, 30522)
DECAYS = (0.0, 1e-9, 0.1, 0.3, 0.5, 0.75, 0.99, 0.999, 0.9999999, 1.0)


Update = Callable[..., None]


def kernel(e: list[torch.Tensor], p: list[torch.Tensor], decay: float, seed: int | None = None) -> None:
    """What serves the CPU: the dispatcher's choice, which is the C++ kernel."""
    update(e, p, decay, None, None if seed is None else torch.tensor(seed))


def eager(e: list[torch.Tensor], p: list[torch.Tensor], decay: float, seed: int | None = None) -> None:
    """The eager definition."""
    reference.ema_update_(e, p, decay, None, None if seed is None else torch.tensor(seed))


def triton_kernel() -> Update:
    """The launcher of the Triton kernel, which takes CPU tensors in Triton's interpreter."""
    import triton.runtime.interpreter as interpreter

    from smart_kernels.triton_kernels import ema as kernels

    def fused(self: object, x: Any, y: Any, z: Any) -> Any:
        """A product and a sum rounded once, or nearly; Triton 3.6's interpreter rounds twice, which no GPU does."""
        wider = [np.float64 if x.data.dtype == np.float32 else np.longdouble] * 3
        a, b, c = (v.data.astype(w) for v, w in zip((x, y, z), wider, strict=True))
        return interpreter.TensorHandle((a * b + c).astype(x.data.dtype), x.dtype.scalar)

    one = interpreter.TensorHandle(np.full(1, 1 + 2.0**-20, np.float32), interpreter.tl.float32)
    less = interpreter.TensorHandle(-one.data * one.data, one.dtype)
    if not interpreter.InterpreterBuilder().create_fma(one, one, less).data.any():
        interpreter.InterpreterBuilder.create_fma = fused

    def triton(e: list[torch.Tensor], p: list[torch.Tensor], decay: float, seed: int | None = None) -> None:
        table, dtypes = _chunks.chunk_table(e, p, lambda *lists: None)
        kernels.ema_update_chunks(table, dtypes, decay, None, None if seed is None else torch.tensor(seed))

    return triton


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # test_triton_ema.py runs this file so
if INTERPRETED:
    SERVERS = [triton_kernel()]
else:
    SERVERS = [pytest.param(kernel, marks=requires_extension), eager]


@pytest.fixture(params=SERVERS)
def ema(request: pytest.FixtureRequest) -> Update:
    return request.param


def pair(shape: int | tuple[int, ...], e: torch.dtype, p: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A shadow and a parameter: close, far apart, of different sizes and signs."""
    shadow = torch.randn(shape, dtype=torch.float64)
    parameter = shadow + torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-5, 4, shadow.shape)
    return shadow.to(e), parameter.to(p)


def check(ema: Update, pairs: list[tuple[torch.Tensor, torch.Tensor]], decay: float) -> None:
    truths = [Ema(e, p, decay) for e, p in pairs]
    before = [p.clone() for _, p in pairs]
    ema([e for e, _ in pairs], [p for _, p in pairs], decay)
    for (e, p), truth, was in zip(pairs, truths, before, strict=True):
        truth.check(e)
        assert torch.equal(p, was)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_accuracy(ema: Update, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for decay in DECAYS:
        check(ema, [pair(size, *dtypes) for size in SIZES], decay)


def test_accuracy_of_many_tensors_of_all_dtypes_at_once(ema: Update) -> None:
    shapes = [(), (3, 5), (0,), (1, 1, 7), (70,), (2, 0, 3), (129, 3)]
    pairs = [pair(shapes[i % len(shapes)], *PAIRS[i % len(PAIRS)]) for i in range(500)]
    check(ema, pairs, 0.9)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


# A decay that fp32 does not have to full precision is none that anybody means.
decays = st.just(0.0) | st.floats(1e-20, 1)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=40), decays, st.sampled_from(PAIRS))
def test_properties(numbers: list[tuple[float, float]], decay: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Any numbers, the largest and the smallest too: within the bar, between shadow and parameter."""
    e, p = (torch.tensor(x, dtype=torch.float64).to(d) for x, d in zip(zip(*numbers, strict=True), dtypes, strict=True))
    kept = e.isfinite() & p.isfinite() & p.to(e.dtype).isfinite()  # float16 overflows
    e, p = e[kept], p[kept]
    before, truth = e.clone(), Ema(e, p, decay)
    ema_update_([e], [p], decay)
    truth.check(e)
    assert (e >= torch.minimum(before, p.to(e.dtype))).all()
    assert (e <= torch.maximum(before, p.to(e.dtype))).all()
    still = before.clone()
    ema_update_([still], [before.to(p.dtype)], decay)
    unmoved = before.to(p.dtype) == before
    assert torch.equal(still[unmoved], before[unmoved])


@pytest.mark.parametrize("dtypes", PAIRS)
def test_decay_one_leaves_the_shadow_and_decay_zero_copies_to_the_bit(
    ema: Update, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    e, p = pair(1000, *dtypes)
    tiny = 0 if INTERPRETED and torch.bfloat16 in dtypes else 1e-40  # it makes bfloat16's subnormal numbers 0
    odd = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0, tiny, 6e-8], dtype=torch.float64)
    p[:8], p[100:800:100], e[8:16] = odd.to(p.dtype), math.inf, odd.to(e.dtype)
    e[16:20], p[16:20] = -0.0, odd[:4].to(p.dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    before = e.clone()
    ema([e], [p], 1.0)
    assert torch.equal(e.view(bits[e.itemsize]), before.view(bits[e.itemsize]))
    ema([e], [p], 0.0)
    copied = before.copy_(p)
    if e.dtype == p.dtype:
        assert torch.equal(e.view(bits[e.itemsize]), copied.view(bits[e.itemsize]))
    else:  # a NaN of another dtype is a NaN
        torch.testing.assert_close(e, copied, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_special_values_leave_the_others_alone(ema: Update, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inf, nan = math.inf, math.nan
    e, p = pair(100, *dtypes)
    for i, (old, new) in enumerate(itertools.product((inf, -inf, nan, 1.0), repeat=2)):
        e[6 * i], p[6 * i] = old, new
    truth = Ema(e, p, 0.9)
    ema([e], [p], 0.9)
    truth.check(e)
    assert e.isfinite().sum() == 100 - 15


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[1], PAIRS[4], PAIRS[-1]])
def test_any_strides(ema: Update, dtypes: tuple[torch.dtype, torch.dtype], decay: float) -> None:
    """Every shadow lies in a larger tensor whose other elements stay as they are."""
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x[3:-5],
        lambda x: x[:, 5:70],
        lambda x: x[::2, ::3],
        lambda x: x.t()[1:],
        lambda x: x.view(70, 2, 5, 9)[:, :, 1:].permute(3, 0, 2, 1),
        lambda x: x[:, 7],
        lambda x: x[4:5].view(9, 10).t(),
    ]
    for of_shadow, of_parameter in itertools.product(range(len(views)), (None, 0, 1, 2, 3)):
        base = torch.randn(70, 90, dtype=torch.float64).to(dtypes[0])
        e = views[of_shadow](base)
        source = pair(tuple(e.shape), *dtypes)[1]
        match of_parameter:
            case 0:
                p = source
            case 1:
                p = source.transpose(0, -1).contiguous().transpose(0, -1)
            case 2:
                p = torch.stack([source, source], -1)[..., 0]
            case 3:
                p = source[:1].expand(e.shape)
            case _:
                p = views[of_shadow](torch.randn(70, 90, dtype=torch.float64).to(dtypes[1]))
        inside = torch.zeros_like(base, dtype=torch.bool)
        views[of_shadow](inside).fill_(True)
        outside = base[~inside]
        check(ema, [(e, p)], decay)
        assert torch.equal(base[~inside], outside)


def test_elements_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Offsets do not overflow: the last chunks of tensors in files that hold no data but there."""
    if smart_kernels.COMPILED["_C"] is not None:
        pytest.skip("the compiled CPU kernels are not built here")
    size = 2**31 + 20_000
    e, p = (torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=torch.bfloat16) for name in "ep")
    tail = slice(size - 10_001, size)
    e[tail], p[tail] = pair(10_001, torch.bfloat16, torch.bfloat16)
    truth = Ema(e[tail], p[tail], 0.9)
    table = _chunks.make_table([e], [p])
    assert table[2, -1] + table[3, -1] == size
    last = table[:, -3:].contiguous()
    assert last[3].sum() > 10_001
    torch.ops.smart_kernels.ema_update_chunks(last, 0, 0.9, None, None)
    truth.check(e[tail])


# ------------------------------------------------------------------------------------------ stochastic rounding


@pytest.mark.parametrize("p", NARROW)
@pytest.mark.parametrize("e", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(ema: Update, e: torch.dtype, p: torch.dtype) -> None:
    """For each of many numbers, 1024 times: one of its two neighbours, and the mean the number itself."""
    numbers, repeats = 400, 1024
    shadow, parameter = pair(numbers, e, p)
    tiny = torch.finfo(e).tiny
    shadow[:40] *= 3 * tiny  # subnormal results
    parameter[:40] = (parameter[:40].float() * tiny).to(p)
    exact = Ema(shadow, parameter, 0.9).result
    rows = shadow.repeat(repeats, 1)
    ema([rows], [parameter.repeat(repeats, 1)], 0.9, seed=1)
    results, place = wide(rows), ulp(exact, e)
    # Down and up, where fp32 arithmetic that is off by 2^-22 may have crossed over from one place to the next
    assert (np.abs(results - exact) < place * (1 + 2.0**-8)).all()
    # The share that goes up is binomial: its standard deviation, in places, is below 1 / (2 sqrt(repeats))
    error = (results.mean(0) - exact) / place
    assert np.abs(error).max() < 5 * 0.5 / math.sqrt(repeats)
    assert abs(error.mean()) < 5 * 0.5 / math.sqrt(repeats * numbers)


@requires_extension
@pytest.mark.parametrize("e", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_of_any_number(e: torch.dtype) -> None:
    """A copy (decay 0) of numbers from subnormal to the largest: the probabilities are just the remainders."""
    info = torch.finfo(e)
    numbers = torch.tensor([info.tiny / 3, info.smallest_normal * 1.7, 1.2345, -777.77, info.max, -info.max, 0.0])
    near = torch.tensor([info.max * (1 + info.eps / 8), info.max * (1 + info.eps / 2), math.inf, -math.inf, math.nan])
    rows = torch.zeros(1 << 14, 12, dtype=e)
    parameter = torch.cat([numbers, near]).repeat(1 << 14, 1)
    kernel([rows], [parameter], 0.0, seed=2)
    exact = wide(numbers)
    error = (wide(rows[:, :7]).mean(0) - exact) / ulp(exact, e)
    assert np.abs(error).max() < 5 * 0.5 / 128  # binomial, as above
    assert (rows[:, 4:7] == numbers[4:].to(e)).all()  # what the dtype has stays as it is
    nearest = near.to(e).expand(1 << 14, 5)  # beyond the largest number, to nearest
    torch.testing.assert_close(rows[:, 7:], nearest, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("e", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_follows_where_nearest_stands_still(e: torch.dtype) -> None:
    """5000 updates with decay 0.999 of a low-precision shadow against the same in float64."""
    shadow, parameter = torch.full((4096,), 1.0, dtype=e), torch.full((4096,), 1.5)
    still, generator = shadow.clone(), torch.Generator().manual_seed(3)
    for _ in range(1000):
        ema_update_([shadow], [parameter], 0.999, stochastic_rounding=True, generator=generator)
        ema_update_([still], [parameter], 0.999)
    truth = 1.5 - 0.5 * 0.999**1000
    # A random walk pulled back by 0.001 a step, of steps up to half a place: it spreads over 0.5 / sqrt(0.002) places
    spread = torch.finfo(e).eps * 0.5 / math.sqrt(0.002)
    assert abs(shadow.double().mean().item() - truth) < 5 * spread / math.sqrt(4096)
    if e == torch.bfloat16:
        assert (still == 1).all()


@requires_extension
def test_stochastic_rounding_is_the_reference_s() -> None:
    """The same random numbers: results differ only where fp32 arithmetic of the two straddles a remainder."""
    dtypes = [d for d in PAIRS if d[0].itemsize == 2]
    pairs = [pair(size, *dtypes[i % 6]) for i, size in enumerate((1000, 64, 1, 65, 9000, 130, 63, 20000))]
    again = [e.clone() for e, _ in pairs]
    kernel([e for e, _ in pairs], [p for _, p in pairs], 0.9, seed=-5)
    eager(again, [p for _, p in pairs], 0.9, seed=-5)
    ours, theirs = torch.cat([e.float() for e, _ in pairs]), torch.cat([e.float() for e in again])
    # fp32's rounding moves a remainder by 2^-13 (float16) or 2^-16 of a place
    assert (ours != theirs).float().mean() < 2e-3


def test_stochastic_rounding_leaves_wide_shadows_alone(ema: Update) -> None:
    for dtypes in (PAIRS[0], PAIRS[1], PAIRS[-1]):
        e, p = pair(1000, *dtypes)
        plain = e.clone()
        ema([e], [p], 0.9, seed=4)
        ema([plain], [p], 0.9)
        assert torch.equal(e, plain)


def test_random_numbers_come_from_the_generator() -> None:
    results = []
    for seed in (1, 1, 2):
        e, p = torch.ones(1000, dtype=torch.bfloat16), torch.full((1000,), 1.3)
        generator = torch.Generator().manual_seed(seed)
        ema_update_([e], [p], 0.9, stochastic_rounding=True, generator=generator)
        results.append(e.clone())
        ema_update_([e], [p], 0.9, stochastic_rounding=True, generator=generator)
        results.append(e)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[4])
    torch.manual_seed(7)
    defaults = [torch.ones(1000, dtype=torch.bfloat16) for _ in range(2)]
    ema_update_(defaults[:1], [p], 0.9, stochastic_rounding=True)
    ema_update_(defaults[1:], [p], 0.9, stochastic_rounding=True, generator=torch.Generator().manual_seed(7))
    assert torch.equal(*defaults)


# ------------------------------------------------------------------------------------------ lists of tensors


def test_nothing_to_do() -> None:
    ema_update_([], [], 0.9)
    ema_update_([torch.zeros(0), torch.zeros(2, 0)], [torch.ones(0), torch.ones(2, 0)], 0.9, stochastic_rounding=True)


def test_tied_tensors_are_updated_once() -> None:
    e, p = pair(100, torch.float32, torch.float32)
    once = e.clone()
    ema_update_([once], [p], 0.9)
    ema_update_([e, torch.zeros(0), e.view(100), torch.zeros(0)], [p, torch.zeros(0), p, torch.ones(0)], 0.9)
    assert torch.equal(e, once)
    tied = [torch.zeros(4), torch.zeros(4)]
    ema_update_(tied, [p[:4], p[:4]], 0.0)
    assert torch.equal(tied[0], tied[1])


def test_any_iterables_and_parameters_of_modules() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).bfloat16()
    teacher = copy.deepcopy(student).float()
    truths = [Ema(e, p + 1, 0.9) for e, p in zip(teacher.parameters(), student.parameters(), strict=True)]
    with torch.no_grad():
        for p in student.parameters():
            p += 1
        ema_update_(teacher.parameters(), (p for p in student.parameters()), 0.9)
    for e, truth in zip(teacher.parameters(), truths, strict=True):
        truth.check(e)
        assert e.requires_grad
        assert e.grad_fn is None


def test_subclasses_of_tensors() -> None:
    class Sub(torch.Tensor):
        pass

    e, p = pair(100, torch.float32, torch.float32)
    truth = Ema(e, p, 0.9)
    for _ in range(2):
        shadow = e.clone().as_subclass(Sub)
        ema_update_([shadow], [p], 0.9)
        truth.check(shadow)


def test_a_table_is_made_once_and_again_when_a_tensor_moves() -> None:
    shadows, parameters = map(list, zip(*(pair(n, torch.float32, torch.float32) for n in (100, 7)), strict=True))

    def table() -> torch.Tensor:
        return _chunks.chunk_table(shadows, parameters, lambda *lists: None)[0]

    first = table()
    for _ in range(2 * 8):
        check(lambda *a: ema_update_(*a), list(zip(shadows, parameters, strict=True)), 0.9)
    assert table() is first
    parameters[0].data = parameters[0].clone()
    second = table()
    assert second is not first
    shadows[1].data = torch.randn(7)
    assert table() is not second
    check(lambda *a: ema_update_(*a), list(zip(shadows, parameters, strict=True)), 0.9)
    square, transposed = pair((5, 5), torch.float32, torch.float32)
    for _ in range(2):  # the same memory, seen another way
        check(lambda *a: ema_update_(*a), [(square, transposed)], 0.9)
        transposed.t_()
    for n in range(1, 40):  # more lists than tables are kept
        lists = [pair(n, torch.float32, torch.bfloat16)]
        check(lambda *a: ema_update_(*a), lists, 0.9)
    check(lambda *a: ema_update_(*a), list(zip(shadows, parameters, strict=True)), 0.9)


def test_without_a_fast_way_to_look_at_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunks, "_compiled", None)
    test_a_table_is_made_once_and_again_when_a_tensor_moves()
    test_tied_tensors_are_updated_once()


# ------------------------------------------------------------------------------------------ as an operator


def test_a_decay_on_the_device() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        decay = torch.tensor(0.875, dtype=dtype)
        for value in (0.875, 0.0, 1.0):
            decay.fill_(value)
            (e, p), wide_pair = pair(100, torch.float32, torch.float32), pair(100, torch.float64, torch.float64)
            truths = [Ema(e, p, value), Ema(*wide_pair, value)]
            ema_update_([e, wide_pair[0]], [p, wide_pair[1]], decay)
            for truth, result in zip(truths, (e, wide_pair[0]), strict=True):
                truth.check(result)


def test_version_counters_are_bumped() -> None:
    e, p = pair(10, torch.float32, torch.float32)
    for call in (lambda: ema_update_([e], [p], 0.9), lambda: update([e], [p], 0.9, None, None)):
        x = torch.ones(10, requires_grad=True)
        y = (x * e).sum()
        version = e._version, p._version
        call()
        assert e._version > version[0]
        assert p._version == version[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_a_shadow_that_requires_grad_is_refused_unless_nothing_is_recorded() -> None:
    e, p = pair(10, torch.float32, torch.float32)
    leaf, before = torch.nn.Parameter(e.clone()), e.clone()
    with pytest.raises(ValueError, match=r"ema_tensors\[1\]: requires grad"):
        ema_update_([e, leaf], [p, p + 1], 0.9)
    with pytest.raises(ValueError, match=r"ema_tensors\[0\]: requires grad"):
        ema_update_([leaf * 1], [p], 0.9)
    with pytest.raises(RuntimeError, match="no derivative"):
        update([leaf], [p], 0.9, None, None)
    assert torch.equal(e, before)
    assert torch.equal(leaf, before)
    ema_update_([e], [torch.nn.Parameter(p)], 0.9)  # a constant to the shadow
    assert not e.requires_grad
    with torch.no_grad():
        ema_update_([leaf], [p], 0.9)
    assert torch.equal(leaf, e)
    with torch.inference_mode():
        ema_update_([torch.zeros(3)], [torch.ones(3)], 0.9)


@requires_extension
def test_the_operator_reads_no_wrong_numbers() -> None:
    e, p = pair(10, torch.float32, torch.float32)
    before = e.clone()
    for decay in (torch.tensor(0.9).bfloat16(), torch.tensor([0.5, 0.5])):
        with pytest.raises(RuntimeError, match="expected decay_tensor to be one number"):
            update([e], [p], 0.9, decay, None)
    for seed in (torch.tensor(1).int(), torch.tensor([1, 2])):
        with pytest.raises(RuntimeError, match="expected seed to be one number"):
            update([e], [p], 0.9, None, seed)
    with pytest.raises(RuntimeError, match="expected a table"):
        torch.ops.smart_kernels.ema_update_chunks(torch.zeros(3, 5, dtype=torch.int64), 0, 0.9, None, None)
    assert torch.equal(e, before)


@pytest.mark.parametrize("decay", [None, torch.tensor(0.9)])
@pytest.mark.parametrize("seed", [None, torch.tensor(3)])
def test_opcheck(decay: torch.Tensor | None, seed: torch.Tensor | None) -> None:
    pairs = [pair((5, 7), torch.float32, torch.float16), pair(9, torch.bfloat16, torch.bfloat16)]
    torch.library.opcheck(update, ([e for e, _ in pairs], [p for _, p in pairs], 0.9, decay, seed))


@pytest.mark.parametrize("stochastic", [False, True])
def test_compiles_to_one_graph(stochastic: bool) -> None:
    pairs = [pair((5, 7), torch.float32, torch.float16), pair(9, torch.bfloat16, torch.bfloat16)]
    truths = [Ema(e, p * 2, 0.9) for e, p in pairs]

    @torch.compile(fullgraph=True)
    def step(shadows: list[torch.Tensor], parameters: list[torch.Tensor], decay: torch.Tensor) -> torch.Tensor:
        ema_update_(shadows, [p * 2 for p in parameters], decay, stochastic_rounding=stochastic)
        return shadows[0] * 1

    version = pairs[0][0]._version
    result = step([e for e, _ in pairs], [p for _, p in pairs], torch.tensor(0.9, dtype=torch.float64))
    assert torch.equal(result, pairs[0][0])
    assert pairs[0][0]._version > version
    for (e, _), truth in zip(pairs, truths, strict=True):
        if stochastic and e.dtype == torch.bfloat16:
            assert (np.abs(wide(e) - truth.result) <= ulp(truth.result, e.dtype)).all()
        else:
            truth.check(e)
    with pytest.raises(Exception, match="requires grad"):
        step([torch.nn.Parameter(torch.zeros(2))], [torch.ones(2)], torch.tensor(0.9))


@requires_extension
@pytest.mark.parametrize("seed", [None, 6])
def test_same_bits_for_any_number_of_threads(seed: int | None) -> None:
    sizes = (100_001, 3, 64, 50_000, *[1000] * 100, 8193)
    pairs = [pair(n, *PAIRS[i % len(PAIRS)]) for i, n in enumerate(sizes)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            shadows = [e.clone() for e, _ in pairs]
            kernel(shadows, [p for _, p in pairs], 0.9, seed)
            results.append(shadows)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], result, strict=True))


@for_each_lower_instruction_set
def test_every_instruction_set(isa: str) -> None:
    """The accuracy tests again in a process that keeps to a lower instruction set."""
    selection = "kernel and (accuracy or bit or special or strides or average) or properties or stochastic_rounding_is"
    run_again(__file__, selection, SMART_KERNELS_ISA=isa)


x, y = torch.zeros(4), torch.ones(4)
buffer = torch.zeros(20)


@pytest.mark.parametrize(
    ("shadows", "parameters", "decay", "options", "error", "message"),
    [
        (x, [y], 0.9, {}, TypeError, "ema_tensors: got Tensor, expected a sequence of tensors"),
        ([x], y, 0.9, {}, TypeError, "parameters: got Tensor"),
        ([x], 3, 0.9, {}, TypeError, "parameters: got int, expected a sequence of tensors"),
        ([3.0], [y], 0.9, {}, TypeError, r"ema_tensors\[0\]: got float, expected a tensor"),
        ([x, None], [y, y], 0.9, {}, TypeError, r"ema_tensors\[1\]: got NoneType, expected a tensor"),
        ([x], [None], 0.9, {}, TypeError, r"parameters\[0\]: got NoneType, expected a tensor"),
        ([], [y], 0.9, {}, ValueError, "parameters: got 1 tensors, expected 0"),
        ([x], [], 0.9, {}, ValueError, "parameters: got 0 tensors, expected 1, one for each shadow"),
        ([x, x + 0], [y], 0.9, {}, ValueError, "parameters: got 1 tensors, expected 2"),
        ([x, x + 0], [y, y[:3]], 0.9, {}, ValueError, r"parameters\[1\]: got shape \(3,\), expected .* \(4,\)"),
        ([x, x.view(2, 2) + 0], [y, y], 0.9, {}, ValueError, r"parameters\[1\]: got shape \(4,\), expected"),
        ([x.long()], [y], 0.9, {}, TypeError, r"ema_tensors\[0\]: got dtype torch.int64"),
        ([x], [y.cfloat()], 0.9, {}, TypeError, r"parameters\[0\]: got dtype torch.complex64"),
        ([x], [y.double()], 0.9, {}, TypeError, r"parameters\[0\]: got dtype torch.float64 beside torch.float32"),
        ([x.double()], [y.half()], 0.9, {}, TypeError, r"parameters\[0\]: got dtype torch.float16 beside"),
        ([x], [y.to("meta")], 0.9, {}, ValueError, r"parameters\[0\]: got device meta, expected that of ema_"),
        ([x, x.to("meta")], [y, y], 0.9, {}, ValueError, r"ema_tensors\[1\]: got device meta"),
        ([x], [y.to_sparse()], 0.9, {}, TypeError, r"parameters\[0\]: got layout torch.sparse_coo"),
        ([x], [torch.ones(4, dtype=torch.cfloat).conj().imag], 0.9, {}, ValueError, "a view that negates"),
        ([x], [x], 0.9, {}, ValueError, r"parameters\[0\]: shares memory with ema_tensors\[0\]"),
        ([buffer[:10]], [buffer[9:19]], 0.9, {}, ValueError, r"parameters\[0\]: shares memory with ema_tensors\[0\]"),
        ([buffer[9:19]], [buffer[:10]], 0.9, {}, ValueError, r"ema_tensors\[0\]: shares memory with parameters\[0\]"),
        ([x, buffer[:4]], [y, x], 0.9, {}, ValueError, r"shares memory with"),
        ([buffer[:4], buffer[3:7]], [y, y], 0.9, {}, ValueError, r"ema_tensors\[1\]: shares memory with ema_t"),
        ([buffer[:8], buffer[2:4]], [buffer[8:16], y[:2]], 0.9, {}, ValueError, r"ema_tensors\[1\]: shares memory"),
        ([x, x], [y, y + 0], 0.9, {}, ValueError, r"ema_tensors\[1\]: is ema_tensors\[0\] too, expected the same"),
        ([x[:1].expand(4)], [y], 0.9, {}, ValueError, r"ema_tensors\[0\]: elements share memory"),
        ([buffer.as_strided((4, 4), (2, 1))], [torch.ones(4, 4)], 0.9, {}, ValueError, "elements share memory"),
        ([x], [y], 1.5, {}, ValueError, "decay: got 1.5, expected a number from 0 to 1"),
        ([x], [y], -0.1, {}, ValueError, "decay: got -0.1"),
        ([x], [y], math.nan, {}, ValueError, "decay: got nan"),
        ([x], [y], "0.9", {}, TypeError, "decay: got str, expected a number or a tensor"),
        ([x], [y], True, {}, TypeError, "decay: got bool"),
        ([x], [y], torch.tensor([0.9]), {}, ValueError, r"decay: got shape \(1,\), expected no dimensions"),
        ([x], [y], torch.tensor(1), {}, TypeError, "decay: got dtype torch.int64, expected a floating one"),
        ([x], [y], torch.tensor(0.9, device="meta"), {}, ValueError, "decay: got device meta, expected that of"),
        ([x], [y], 0.9, {"stochastic_rounding": 1}, TypeError, "stochastic_rounding: got int, expected bool"),
        ([x], [y], 0.9, {"stochastic_rounding": True, "generator": 3}, TypeError, "generator: got int"),
    ],
)  # fmt: skip
def test_bad_input(
    shadows: object, parameters: object, decay: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    """Refused before anything was changed: neither shadows nor the generator's state."""
    before, state = (x.clone(), buffer.clone()), torch.get_rng_state()
    for extra in ({}, {"stochastic_rounding": True}):
        with pytest.raises(error, match=message):
            ema_update_(shadows, parameters, decay, **{**extra, **options})
    assert torch.equal(x, before[0])
    assert torch.equal(buffer, before[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_large_numbers(ema: Update) -> None:
    """Where the usual way to halve a number for an exact product would overflow, a result is as good as elsewhere."""
    for dtype, top in ((torch.float32, 3e38), (torch.float64, 1.6e308)):
        numbers = torch.randn(2, 1000, dtype=torch.float64).clamp(-4, 4) * (top / 4)
        for decay in (0.99, 0.3, 1e-3, 7.7e-18):
            e, p = numbers.to(dtype).clone()
            check(ema, [(e, p)], decay)
            check(ema, [(numbers[0].to(dtype), torch.zeros(1000, dtype=dtype))], decay)

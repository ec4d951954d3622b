"""The perturbation's start and step against extended precision, and their public contract.

The CPU kernels and the eager reference; with TRITON_INTERPRET=1 in the environment, the Triton kernels instead.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from extension import for_each_lower_instruction_set, requires_extension, run_again
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import PerturbationStep, wide

from smart_kernels import init_perturbation, perturbation_step, perturbation_step_, reference

ops = torch.ops.smart_kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NORMS, SCOPES, ASCENTS = reference.NORMS, reference.SCOPES, reference.ASCENTS
WAYS = list(itertools.product(NORMS, SCOPES, ASCENTS))
DTYPES = [  # of delta and of the gradient
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]
EPSILON, STEP = 1e-5, 2e-5

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="about the package as a whole, whatever the kernel")

if INTERPRETED:
    from smart_kernels.triton_kernels import perturbation as triton_kernels

    KERNELS = [pytest.param(triton_kernels, id="triton")]
else:
    # the dispatcher's choice on a CPU is the C++ kernel
    KERNELS = [pytest.param(ops, id="cpp", marks=requires_extension), pytest.param(reference, id="eager")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Any:
    return request.param


def case(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0]) -> SimpleNamespace:
    """A perturbation, partly outside the ball, and a gradient."""
    delta = EPSILON * torch.randn(shape, dtype=torch.float64)
    return SimpleNamespace(delta=delta.to(dtypes[0]), grad=torch.randn(shape, dtype=torch.float64).to(dtypes[1]))


def check(
    kernel: Any,
    delta: torch.Tensor,
    grad: torch.Tensor,
    mask: torch.Tensor | None = None,
    step_size: float = STEP,
    epsilon: float = EPSILON,
    way: tuple[str, str, str] = ("linf", "sample", "normalized"),
) -> torch.Tensor:
    """The step, out of place and in place, against the truth."""
    truth = PerturbationStep(delta, grad, mask, step_size, epsilon, *way)
    codes = NORMS.index(way[0]), SCOPES.index(way[1]), ASCENTS.index(way[2])
    skipped = torch.full((1,), 7)
    before = delta.clone()
    out = kernel.perturbation_step(delta, grad, mask, skipped, step_size, epsilon, *codes)
    assert torch.equal(delta.nan_to_num(), before.nan_to_num())
    truth.check(out, skipped - 7)
    assert out.is_contiguous()
    kernel.perturbation_step_(before, grad, mask, None, step_size, epsilon, *codes)
    assert torch.equal(before, out)
    return out


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d[1])[6:])
def test_accuracy(kernel: Any, dtypes: tuple[torch.dtype, torch.dtype], way: tuple[str, str, str]) -> None:
    for shape in ((1, 1), (2, 31), (2, 3, 64), (2, 2, 3, 33), (1, 3, 127), (3, 0, 5), (0, 4, 4), (2, 3, 0)):
        x = case(shape, dtypes)
        mask = torch.rand(shape[:-1]) < 0.7 if len(shape) > 2 else None
        check(kernel, x.delta, x.grad, mask, way=way)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_accuracy_of_long_samples(kernel: Any, way: tuple[str, str, str]) -> None:
    """Samples of several parts or splits, one at a time and many; tokens that are longer than one part."""
    for shape in ((1, 40, 257), (5, 11, 768), (2, 2, 9001)):
        x = case(shape)
        mask = torch.rand(shape[:-1]) < 0.8
        x.grad[~mask] = math.nan
        x.delta[~mask] = math.inf
        if shape[0] == 2:
            mask[0] = True  # the first sample is skipped for its last element
        check(kernel, x.delta.nan_to_num(posinf=1.0), x.grad, mask, way=way)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("step", [1e-3, 1e-5, 1e-9])
def test_step_sizes_from_long_to_short(kernel: Any, step: float, way: tuple[str, str, str]) -> None:
    x = case((3, 4, 50))
    check(kernel, x.delta, x.grad, step_size=step, way=way)
    check(kernel, 0 * x.delta, x.grad, step_size=step, way=way)


FACTORS = [1e-44, 1e-40, 1e-38, 1e-30, 2e-23, 1e-15, 0.3, 3.0, 1e15, 5e19, 1e30, 7e37]


@pytest.mark.parametrize(("norm", "scope"), list(itertools.product(NORMS, SCOPES)))
def test_any_factor_on_the_gradient_changes_nothing(kernel: Any, norm: str, scope: str) -> None:
    """Up to the gradient's own rounding: near 1e-40 few digits of it are left, which the oracle sees as well."""
    x = case((2, 3, 65))
    x.grad.clamp_(-4, 4)
    plain = check(kernel, x.delta, x.grad, way=(norm, scope, "normalized"))
    for factor in FACTORS:
        out = check(kernel, x.delta, x.grad * factor, way=(norm, scope, "normalized"))
        if factor >= 1e-30:
            torch.testing.assert_close(out, plain, rtol=0, atol=1e-6 * EPSILON)
    for power in (-100, -60, -3, 7, 64, 120):  # nothing is rounded otherwise
        out = check(kernel, x.delta, x.grad * 2.0**power, way=(norm, scope, "normalized"))
        assert torch.equal(out, plain)


@pytest.mark.parametrize(("norm", "scope"), list(itertools.product(NORMS, SCOPES)))
def test_any_factor_in_double_precision(kernel: Any, norm: str, scope: str) -> None:
    x = case((2, 3, 65), DTYPES[-1])
    for factor in (1e-310, 1e-200, 1e-30, 1.0, 1e30, 1e200, 1e307):
        check(kernel, x.delta, x.grad.clamp(-4, 4) * factor, way=(norm, scope, "normalized"))


@pytest.mark.parametrize(("norm", "scope"), list(itertools.product(NORMS, SCOPES)))
def test_raw_and_overlong_steps_stay_in_the_ball(kernel: Any, norm: str, scope: str) -> None:
    x = case((2, 3, 65))
    x.grad.clamp_(-3, 3)
    for factor, step in ((1e38, 1e3), (1e38, 1.0), (1e30, 1e-3), (1e-42, 1.0), (1.0, 1e30), (1e-38, 1e38)):
        check(kernel, x.delta, factor * x.grad, step_size=step, way=(norm, scope, "raw"))
    check(kernel, x.delta, x.grad, step_size=1e30, way=(norm, scope, "normalized"))
    check(kernel, x.delta, x.grad, step_size=1e30, way=(norm, scope, "sign"))


@pytest.mark.parametrize(("norm", "scope"), list(itertools.product(NORMS, SCOPES)))
def test_raw_steps_of_subnormal_length(kernel: Any, norm: str, scope: str) -> None:
    x = case((3, 2, 1, 21))
    for step in (1e-13, 2e-13, 3e-13):
        check(kernel, 0 * x.delta, 1e-32 * x.grad, step_size=step, way=(norm, scope, "raw"))


@pytest.mark.parametrize(("norm", "scope"), list(itertools.product(NORMS, SCOPES)))
def test_no_gradient_leaves_a_delta_in_the_ball_as_it_is(kernel: Any, norm: str, scope: str) -> None:
    x = case((3, 4, 50))
    way = (norm, scope, "normalized")
    inside = check(kernel, x.delta, x.grad, step_size=1e-3, way=way)  # on the surface of the ball
    for grad in (0 * x.grad, torch.full_like(x.grad, math.nan), torch.full_like(x.grad, -math.inf)):
        out = check(kernel, inside, grad, way=way)
        assert torch.equal(out, inside)
        check(kernel, 10 * x.delta, grad, way=way)  # one outside is projected all the same


@pytest.mark.parametrize("scope", SCOPES)
def test_the_bound_holds_in_double_where_there_is_no_step(kernel: Any, scope: str) -> None:
    """A sum of many squares is off by more than the last place of its root."""
    shape = (200, 1, 803) if scope == "token" else (200, 11, 73)
    x = case(shape, DTYPES[-1])
    check(kernel, 30 * x.delta, 0 * x.grad, way=("l2", scope, "raw"))


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(kernel: Any, way: tuple[str, str, str]) -> None:
    for shape, long in (((4, 5, 33), False), ((4, 5, 1037), True)):  # in the CPU's kernel, a part and more than one
        if long and way[2] != "normalized":
            continue
        x = case(shape)
        clean = check(kernel, x.delta, x.grad, way=way)
        x.grad[1, 2, -1] = math.nan
        x.grad[3, 0, 0], x.grad[3, 4, 1] = math.inf, -math.inf
        out = check(kernel, x.delta, x.grad, way=way)
        for place in [(1,), (3,)] if way[1] == "sample" else [(1, 2), (3, 0), (3, 4)]:
            if way[0] == "linf":
                torch.testing.assert_close(out[place], x.delta[place].clamp(-EPSILON, EPSILON), rtol=0, atol=1e-12)
            clean[place] = out[place]
        assert torch.equal(out, clean)  # no other has changed


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_masked_positions_have_no_share(kernel: Any, way: tuple[str, str, str]) -> None:
    x = case((3, 6, 20))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    expected = check(kernel, x.delta, x.grad, mask, way=way)
    for junk in (math.nan, math.inf, 1e30, 0.0):
        x.grad[mask == 0] = junk
        x.delta[mask == 0] = junk
        assert torch.equal(check(kernel, x.delta, x.grad, mask, way=way), expected)
    if way[1] == "sample":  # as if the padding were not there
        cut = check(kernel, x.delta[:1, :4], x.grad[:1, :4], way=way)
        torch.testing.assert_close(expected[:1, :4], cut, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
     torch.float16, torch.bfloat16, torch.float32, torch.float64],
)  # fmt: skip
def test_masks_of_any_dtype(kernel: Any, dtype: torch.dtype) -> None:
    x = case((3, 6, 20))
    mask = torch.rand(3, 6) < 0.5
    codes = (0, 0, 0)
    expected = kernel.perturbation_step(x.delta, x.grad, mask, None, STEP, EPSILON, *codes)
    given = mask.to(dtype)
    if dtype.is_floating_point and not (INTERPRETED and dtype == torch.bfloat16):  # its bits are compared there
        given = torch.where(mask, given, -0.0)
    got = kernel.perturbation_step(x.delta, x.grad, given, None, STEP, EPSILON, *codes)
    assert torch.equal(got, expected)
    noise = [kernel.init_perturbation(x.delta, torch.tensor(5), m, 1e-5) for m in (mask, given)]
    assert torch.equal(*noise)
    assert ((noise[0] != 0).any(-1) == mask).all()


@settings(max_examples=30 if INTERPRETED else 200)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    cols=st.integers(1, 70),
    way=st.sampled_from(WAYS),
    dtypes=st.sampled_from(DTYPES),
    epsilon=st.floats(1e-12, 1e3),
    ratio=st.floats(0, 1e3),
    start=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    scale=st.integers(-20, 20),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example([1], 1, ("l2", "sample", "normalized"), DTYPES[0], 1e-5, 1.0, 1.0, 0, False, 3)
def test_properties(
    shape: list[int],
    cols: int,
    way: tuple[str, str, str],
    dtypes: tuple[torch.dtype, torch.dtype],
    epsilon: float,
    ratio: float,
    start: float,
    scale: int,
    masked: bool,
    seed: int,
) -> None:
    """Right, within the ball, indifferent to a factor, and a fixed point of a step without a gradient."""
    torch.manual_seed(seed)
    x = case((*shape, cols), dtypes)
    delta = x.delta * (start * epsilon / EPSILON)
    mask = (torch.rand(shape) < 0.7) if masked else None
    kernel = KERNELS[0].values[0]
    out = check(kernel, delta, x.grad, mask, ratio * epsilon, epsilon, way)
    if way[2] != "raw" and dtypes[1] != torch.float16:
        scaled = check(kernel, delta, x.grad * 2.0**scale, mask, ratio * epsilon, epsilon, way)
        assert torch.equal(scaled, out)
    assert torch.equal(check(kernel, out, 0 * x.grad, mask, ratio * epsilon, epsilon, way), out)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same (4, 6, H) values in memory laid out otherwise, with NaN around."""
    poisoned = torch.full((4, 7, x.size(-1) + 3), math.nan, dtype=x.dtype)
    poisoned[:, :-1, 1:-2] = x
    every_other = torch.full((4, 6, 2 * x.size(-1)), math.nan, dtype=x.dtype)
    every_other[..., ::2] = x
    return {
        "contiguous": x.clone(),
        "sliced": poisoned[:, :-1, 1:-2],
        "transposed rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed features": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other feature": every_other[..., ::2],
    }


@pytest.mark.parametrize("way", [w for w in WAYS if w[2] == "normalized"], ids="-".join)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: str(d[1])[6:])
def test_any_strides(kernel: Any, dtypes: tuple[torch.dtype, torch.dtype], way: tuple[str, str, str]) -> None:
    x = case((4, 6, 21), dtypes)
    codes = NORMS.index(way[0]), SCOPES.index(way[1]), 0
    mask = torch.rand(4, 6) < 0.7
    truth = PerturbationStep(x.delta, x.grad, mask, STEP, EPSILON, *way)
    for grad in layouts(x.grad).values():
        truth.check(kernel.perturbation_step(x.delta, grad, mask, None, STEP, EPSILON, *codes))
    for delta in layouts(x.delta).values():
        got = kernel.perturbation_step(delta, x.grad, mask, None, STEP, EPSILON, *codes)
        assert got.is_contiguous()
        truth.check(got)
        memory = delta if delta._base is None else delta._base
        around = memory.isnan().sum()
        kernel.perturbation_step_(delta, x.grad, mask, None, STEP, EPSILON, *codes)
        truth.check(delta)
        assert memory.isnan().sum() == around  # nothing was written beside it
    expanded = x.grad[:, :1].expand(4, 6, 21)
    check(kernel, x.delta, expanded, mask, way=way)


@pytest.mark.parametrize("scope", [0, 1])
@pytest.mark.parametrize("norm", [0, 1])
def test_everything_is_written_and_nothing_beyond(kernel: Any, norm: int, scope: int) -> None:
    for shape in ((1, 1, 1), (3, 5, 7), (2, 3, 65), (1, 9, 1031)):
        x = case(shape)
        expected = kernel.perturbation_step(x.delta, x.grad, None, None, STEP, EPSILON, norm, scope, 0)
        # The allocator hands freed blocks out again: poisoned ones show what a kernel does not write.
        blocks = [torch.full(shape, math.nan) for _ in range(8)]
        del blocks
        got = kernel.perturbation_step(x.delta, x.grad, None, None, STEP, EPSILON, norm, scope, 0)
        assert torch.equal(got, expected)
        noise = kernel.init_perturbation(x.delta, torch.tensor(3), None, 1.0)
        blocks = [torch.full(shape, math.nan) for _ in range(8)]
        del blocks
        assert torch.equal(kernel.init_perturbation(x.delta, torch.tensor(3), None, 1.0), noise)


# ------------------------------------------------------------------------------------------------ the start


def test_philox_is_the_published_one() -> None:
    """The known answers of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds)."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    answers = [
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x299F31D0_A4093822, pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for seed, counter, expected in answers:
        np.testing.assert_array_equal(oracle.philox(seed, np.array(counter)), np.array(expected, np.uint32))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_start_is_the_oracles(kernel: Any, seed: int) -> None:
    for shape in ((1, 1), (3, 21), (1, 64), (5, 13), (2, 7, 33), (4, 16, 96)):
        expected = oracle.normal(seed, math.prod(shape)).reshape(shape)
        # sine, cosine, logarithm and root in fp32: a few roundings of the radius, which is at most 6.66
        bar = np.full(shape, 6.66 * 2.0**-21)
        for dtype in (torch.float32, torch.bfloat16):
            z = kernel.init_perturbation(torch.empty(shape, dtype=dtype), torch.tensor(seed), None, 1.0)
            assert z.dtype == torch.float32
            oracle.compare(wide(z), expected, bar, "normal")
        double = kernel.init_perturbation(torch.empty(shape, dtype=torch.float64), torch.tensor(seed), None, 1e-5)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double, z.double() * 1e-5, rtol=1e-15, atol=0)


def test_start_does_not_depend_on_mask_strides_or_what_embeds_hold(kernel: Any) -> None:
    embeds, seed = torch.randn(3, 50, 33), torch.tensor(9)
    full = kernel.init_perturbation(embeds, seed, None, 1e-5)
    mask = torch.rand(3, 50) < 0.6
    masked = kernel.init_perturbation(embeds, seed, mask, 1e-5)
    assert torch.equal(masked, torch.where(mask[..., None], full, 0))
    odd = torch.full((33, 50, 3), math.nan).permute(2, 1, 0)
    assert torch.equal(kernel.init_perturbation(odd, seed, None, 1e-5), full)
    assert not kernel.init_perturbation(embeds, seed, None, 0.0).any()
    assert kernel.init_perturbation(embeds[:0], seed, None, 1.0).shape == (0, 50, 33)


@not_interpreted
@requires_extension
def test_start_is_normal_and_independent() -> None:
    """Kolmogorov and Smirnov's distance, moments, tails, correlations; each bar is 4.5 or more standard errors."""
    n = 1 << 20
    z = ops.init_perturbation(torch.empty(1, n), torch.tensor(1), None, 1.0).double().flatten()
    ordered = z.sort().values
    cdf = 0.5 * torch.special.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert torch.maximum((cdf - steps[:-1]).abs(), (steps[1:] - cdf).abs()).max() < 2.4 / math.sqrt(n)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(z.pow(power).mean() - expected) < 4.5 * math.sqrt(variance / n)
    for bound in (3.0, 4.0, 4.5):
        expected = n * math.erfc(bound / math.sqrt(2))
        assert abs((z.abs() > bound).sum() - expected) < 4.5 * math.sqrt(expected)
    for lag in (1, 2, 3, 4, 8, 15, 16, 17, 32, 48, 64, 128, 768, 4096):
        for x in (z, z.square() - 1):  # squares would show pairs that share their radius
            spread = x.var() / math.sqrt(n - lag)
            assert abs((x[lag:] * x[:-lag]).mean()) < 4.5 * spread, lag
    other = ops.init_perturbation(torch.empty(1, n), torch.tensor(2), None, 1.0).double().flatten()
    assert abs((z * other).mean()) < 4.5 / math.sqrt(n)


@not_interpreted
@requires_extension
def test_start_beyond_two_to_the_32_counters() -> None:
    """The counter's upper half: what would be element 2^36 differs from element 0."""
    low = reference._philox(torch.tensor(7), torch.tensor([0, 1]))
    high = reference._philox(torch.tensor(7), torch.tensor([2**32, 2**32 + 1]))
    expected = oracle.philox(7, np.array([[0, 1, 0, 0], [1, 1, 0, 0]]))
    np.testing.assert_array_equal(torch.stack(high, -1).numpy(), expected)
    assert not any(torch.equal(a, b) for a, b in zip(low, high, strict=True))


@not_interpreted
def test_start_is_reproducible_from_a_generator() -> None:
    embeds = torch.randn(2, 3, 40)
    g = torch.Generator().manual_seed(5)
    first, second = (init_perturbation(embeds, 1e-5, generator=g) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(init_perturbation(embeds, 1e-5, generator=g.manual_seed(5)), first)
    torch.manual_seed(5)
    assert torch.equal(init_perturbation(embeds, 1e-5), first)  # the default generator, in the same state
    assert torch.equal(init_perturbation(embeds, 1e-5), second)
    assert not init_perturbation(embeds.requires_grad_(), 1e-5).requires_grad


# ------------------------------------------------------------------------------------------------- contract


@not_interpreted
@requires_extension
def test_the_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    shapes = ((1, 300, 257), (3, 100, 300), (64, 9, 77), (7, 1, 5000), (1, 1, 90_000), (40, 128, 500))
    try:
        for shape in shapes:
            x = case(shape)
            x.grad[0, 0, 3] = math.nan
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                torch.manual_seed(1)
                outs = [init_perturbation(x.delta, 1e-5)]
                for norm, scope in itertools.product(NORMS, SCOPES):
                    skipped = torch.zeros(1, dtype=torch.int64)
                    outs += [perturbation_step(x.delta, x.grad, STEP, EPSILON, norm, scope, skipped=skipped), skipped]
                results.append(outs)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), shape
    finally:
        torch.set_num_threads(threads)


@not_interpreted
@for_each_lower_instruction_set
def test_every_instruction_set(isa: str) -> None:
    """The accuracy tests again in a process that keeps to a lower instruction set."""
    run_again(__file__, "cpp and (accuracy or start)", SMART_KERNELS_ISA=isa)


@not_interpreted
def test_masks_with_fewer_dimensions_are_broadcast() -> None:
    x = case((3, 4, 5, 6))
    mask = torch.tensor([1, 0, 1])
    out = perturbation_step(x.delta, x.grad, STEP, EPSILON, mask=mask)
    full = perturbation_step(x.delta, x.grad, STEP, EPSILON, mask=mask[:, None, None].expand(3, 4, 5))
    assert torch.equal(out, full)
    assert not out[1].any()
    assert not init_perturbation(x.delta, 1.0, mask)[1].any()


@not_interpreted
def test_nothing_requires_grad_afterwards() -> None:
    x = case((2, 3, 4))
    delta, grad = x.delta.requires_grad_(), x.grad.requires_grad_()
    assert not perturbation_step(delta, grad, STEP, EPSILON).requires_grad
    for op in (ops.perturbation_step, ops.perturbation_step_):
        with pytest.raises(RuntimeError, match="has no derivative"):
            op(delta, grad.detach(), None, None, STEP, EPSILON, 0, 0, 0)


@not_interpreted
def test_in_place_refuses_what_autograd_would_have_to_record() -> None:
    x = case((2, 3, 4))
    before = x.delta.clone()
    leaf = x.delta.requires_grad_()
    for delta, grad in ((leaf, x.grad), (leaf * 1, x.grad), (before.clone(), x.grad.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="perturbation_step_ has no derivative"):
            perturbation_step_(delta, grad, STEP, EPSILON)
    assert torch.equal(leaf, before)
    with torch.no_grad():  # as for every op in place, an optimiser's way
        assert perturbation_step_(leaf, x.grad, STEP, EPSILON) is leaf
    assert torch.equal(leaf, perturbation_step(before, x.grad, STEP, EPSILON))


@not_interpreted
def test_version_counters_are_bumped() -> None:
    x = case((2, 3, 4))
    skipped = torch.zeros((), dtype=torch.int64)
    for way in ("public", "op"):
        versions = x.delta._version, skipped._version, x.grad._version
        if way == "public":
            perturbation_step_(x.delta, x.grad, STEP, EPSILON, skipped=skipped)
        else:
            ops.perturbation_step_(x.delta, x.grad, None, skipped, STEP, EPSILON, 0, 0, 0)
        assert x.delta._version > versions[0]
        assert skipped._version > versions[1]
        assert x.grad._version == versions[2]
    version = skipped._version
    perturbation_step(x.delta, x.grad, STEP, EPSILON, skipped=skipped)
    assert skipped._version > version
    w = torch.ones(2, 3, 4, requires_grad=True)
    product = w * x.delta
    perturbation_step_(x.delta, x.grad, STEP, EPSILON)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@not_interpreted
def test_the_counter_adds_up() -> None:
    x = case((4, 3, 5))
    x.grad[1] = math.inf
    skipped = torch.zeros(1, 1, dtype=torch.int64)
    for expected in (1, 2):
        perturbation_step(x.delta, x.grad, STEP, EPSILON, skipped=skipped)
        assert skipped.item() == expected
    perturbation_step_(x.delta, x.grad, STEP, EPSILON, scope="token", skipped=skipped)
    assert skipped.item() == 5


@not_interpreted
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    x = case((2, 3, 4))
    mask = torch.ones(2, 3, dtype=torch.int64) if masked else None
    skipped = torch.zeros(1, dtype=torch.int64) if masked else None
    for scope in (0, 1):
        step = (x.delta, x.grad, mask, skipped, STEP, EPSILON, 1, scope, 0)
        torch.library.opcheck(ops.perturbation_step.default, step)
        torch.library.opcheck(ops.perturbation_step_.default, step)
    torch.library.opcheck(ops.init_perturbation.default, (x.delta.bfloat16(), torch.tensor(1), mask, 1e-5))


@not_interpreted
def test_compiles_to_one_graph() -> None:
    def adversary(embeds: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        delta = init_perturbation(embeds, 1e-5, mask)
        delta = perturbation_step(delta * 0 + 1e-6, grad, STEP, EPSILON, mask=mask, skipped=skipped)
        perturbation_step_(delta, grad, STEP, EPSILON, "l2", "token", mask, "sign", skipped)
        return delta

    compiled = torch.compile(adversary, fullgraph=True)
    for length in (3, 5, 7):  # becomes dynamic
        x = case((2, length, 8))
        mask = torch.ones(2, length)
        x.grad[1, 0, 0] = math.nan
        counters = torch.zeros(2, dtype=torch.int64)
        expected = adversary(x.delta, x.grad, mask, counters[0])
        assert torch.equal(compiled(x.delta, x.grad, mask, counters[1]), expected)
        assert counters[0] == counters[1] == 2
    # a new start at each call
    start = torch.compile(lambda x: init_perturbation(x, 1e-5), fullgraph=True)
    assert not torch.equal(start(x.delta), start(x.delta))


X = torch.zeros(2, 3, 4)
BAD_STEPS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"delta": [1.0]}, TypeError, "delta: got list, expected a tensor"),
    ({"delta": X.half()}, TypeError, r"delta: got dtype torch.float16, expected float32 or float64"),
    ({"delta": torch.zeros(3), "grad": torch.zeros(3)}, ValueError, r"delta: got shape \(3,\), expected \(B, ..., H\)"),
    ({"grad": X.long()}, TypeError, "grad: got dtype torch.int64, expected float16, bfloat16"),
    ({"grad": X.to_sparse()}, TypeError, "grad: got layout torch.sparse_coo, expected torch.strided"),
    ({"grad": X.double()}, TypeError, "grad: got dtype torch.float64 with delta torch.float32"),
    ({"grad": X[:1]}, ValueError, r"grad: got shape \(1, 3, 4\), expected that of delta, \(2, 3, 4\)"),
    ({"grad": X.to("meta")}, ValueError, "grad: got device meta, expected that of delta, cpu"),
    ({"step_size": math.nan}, ValueError, "step_size: got nan, expected a finite number >= 0"),
    ({"step_size": -1.0}, ValueError, "step_size: got -1.0"),
    ({"step_size": torch.ones(())}, TypeError, "step_size: got Tensor, expected a number"),
    ({"epsilon": math.inf}, ValueError, "epsilon: got inf"),
    ({"epsilon": True}, TypeError, "epsilon: got bool"),
    ({"norm": "l1"}, ValueError, "norm: got 'l1', expected one of 'linf', 'l2'"),
    ({"scope": None}, ValueError, "scope: got None, expected one of 'sample', 'token'"),
    ({"ascent": "pgd"}, ValueError, "ascent: got 'pgd', expected one of 'normalized', 'sign', 'raw'"),
    ({"mask": [[1]]}, TypeError, "mask: got list"),
    ({"mask": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "mask: got dtype torch.complex64"),
    ({"mask": torch.ones(3, 2)}, ValueError, r"mask: got shape \(3, 2\), expected the first dimensions of delta"),
    ({"mask": X}, ValueError, r"mask: got shape \(2, 3, 4\)"),
    ({"mask": torch.ones(2, 3, device="meta")}, ValueError, "mask: got device meta"),
    ({"skipped": 0}, TypeError, "skipped: got int"),
    ({"skipped": torch.zeros(1)}, TypeError, "skipped: got dtype torch.float32, expected int64"),
    ({"skipped": torch.zeros(2, dtype=torch.int64)}, ValueError, r"skipped: got shape \(2,\), expected one element"),
    ({"skipped": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "skipped: got device meta"),
]


@not_interpreted
@pytest.mark.parametrize(("change", "error", "message"), BAD_STEPS)
def test_bad_steps(change: dict[str, Any], error: type[Exception], message: str) -> None:
    delta = torch.full((2, 3, 4), 7.0)
    call = {"delta": delta, "grad": X + 1, "step_size": 1.0, "epsilon": 1.0} | change
    function: Callable[..., Any]
    for function in (perturbation_step, perturbation_step_):
        with pytest.raises(error, match=f"^{message}"):
            function(**call)
    assert (delta == 7).all()


@not_interpreted
def test_bad_delta_in_place() -> None:
    overlapping = torch.arange(30.0).as_strided((2, 3, 4), (3, 2, 1))
    with pytest.raises(ValueError, match=r"^delta: elements share memory"):
        perturbation_step_(overlapping, torch.randn(2, 3, 4), 1e-3, 1e-5)
    negated = torch.zeros(2, 3, 4, dtype=torch.cfloat).conj().imag
    with pytest.raises(ValueError, match=r"^delta: got a view that negates"):
        perturbation_step_(negated, torch.randn(2, 3, 4), 1e-3, 1e-5)
    with pytest.raises(ValueError, match=r"^delta: elements share memory .*strides \(0, 4, 1\)"):
        perturbation_step_(torch.zeros(3, 4).expand(2, 3, 4), X, 1.0, 1.0)
    memory = torch.arange(40.0)
    delta, before = memory[8:32].view(2, 3, 4), memory.clone()
    for grad in (delta, memory[:24].view(2, 3, 4), memory[16:].view(2, 3, 4), memory[31].expand(2, 3, 4)):
        with pytest.raises(ValueError, match=r"^grad: shares memory with delta"):
            perturbation_step_(delta, grad, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"^mask: shares memory with delta"):
        perturbation_step_(delta, X, 1.0, 1.0, mask=memory[26:32].view(2, 3))
    assert torch.equal(memory, before)
    perturbation_step_(delta, memory[32:36].expand(2, 3, 4), 1.0, 1.0, mask=memory[2:8].view(2, 3))
    assert not torch.equal(memory[8:32], before[8:32])


@not_interpreted
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeds": 3}, TypeError, "embeds: got int, expected a tensor"),
        ({"embeds": X.int()}, TypeError, "embeds: got dtype torch.int32"),
        ({"embeds": X[0, 0]}, ValueError, r"embeds: got shape \(4,\)"),
        ({"std": -1e-5}, ValueError, "std: got -1e-05, expected a finite number >= 0"),
        ({"std": "1"}, TypeError, "std: got str"),
        ({"mask": torch.ones(2, 4)}, ValueError, "mask: got shape"),
        ({"generator": 7}, TypeError, "generator: got int"),
    ],
)
def test_bad_starts(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        init_perturbation(**({"embeds": X, "std": 1.0} | change))

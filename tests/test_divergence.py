"""The divergences against extended precision: the CPU kernel and the eager reference; the public contract."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from extension import for_each_lower_instruction_set, requires_extension, run_again
from hypothesis import given
from hypothesis import strategies as st
from oracle import Divergence, wide
from torch.autograd import forward_ad, gradcheck

from smart_kernels import (
    DivergenceLoss,
    SymmetricKLLoss,
    divergence,
    divergence_grad,
    reference,
    symmetric_kl,
    symmetric_kl_grad,
)

ops = torch.ops.smart_kernels
NONE, SUM, MEAN, BATCHMEAN = range(4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = tuple(reference.KINDS)
OTHERS = KINDS[1:]
DELTAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 5.0, 20.0)


class Kernel:
    """What serves the CPU: the dispatcher's choice, which is the C++ kernel."""

    forward = staticmethod(ops.divergence)
    backward = staticmethod(ops.divergence_backward)
    forward_backward = staticmethod(ops.divergence_forward_backward)


class Reference:
    """The eager definition."""

    forward = staticmethod(reference.divergence)
    backward = staticmethod(reference.divergence_backward)
    forward_backward = staticmethod(reference.divergence_forward_backward)


def triton_launchers() -> type[Kernel]:
    """The launchers of the Triton kernel, which take CPU tensors in Triton's interpreter."""
    from triton.runtime import interpreter

    from smart_kernels.triton_kernels import divergence as kernels

    def sum_as_a_tree(reduction: Any, x: Any) -> Any:
        """As a card does; the interpreter adds up a block one by one, which costs a hundred roundings more."""
        parts = np.moveaxis(x.handle.data, reduction.axis, 0)
        while len(parts) > 1:
            parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
        return reduction.to_tensor(parts[0], x.dtype)

    class Triton:
        forward = staticmethod(kernels.divergence)
        backward = staticmethod(kernels.divergence_backward)
        forward_backward = staticmethod(kernels.divergence_forward_backward)

    # Every program takes the interpreter as long, and every block: one program for many rows is fast.
    choose = kernels.tiles.choose
    kernels.tiles.choose = lambda kernel, cols: (
        choose(kernel, cols)
        if kernel == "symmetric_kl, held"
        else kernels.tiles.Tile(32 if cols <= 8192 else 1, min(8192, 1 << (cols - 1).bit_length()), 1)
    )
    interpreter.ReduceOps.sum = sum_as_a_tree
    return Triton


if os.environ.get("TRITON_INTERPRET") == "1":  # test_triton_divergence.py runs this file so
    SERVERS = [triton_launchers()]
    LESS = 1e4
else:
    SERVERS = [pytest.param(Kernel, marks=requires_extension), Reference]
    LESS = 1.0


@pytest.fixture(params=SERVERS)
def kl(request: pytest.FixtureRequest) -> type[Kernel]:
    return request.param


def logits(rows: int, cols: int, delta: float, *dtypes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of logits a and b that differ by about delta before they are rounded."""
    b = 2 * torch.randn(rows, cols, dtype=torch.float64)
    a = b + delta * torch.randn(rows, cols, dtype=torch.float64)
    return a.to(dtypes[0]), b.to(dtypes[-1])


def check(
    kl: type[Kernel],
    a: torch.Tensor,
    b: torch.Tensor,
    kind: str = "symmetric_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Divergence:
    """All three ops on a, b against the truth, in both roles and to one side alone."""
    truth = Divergence(a, b, kind, beta, temperature)
    options = KINDS.index(kind), beta, temperature
    loss = kl.forward(a, b, None, NONE, False, *options)
    assert loss.dtype == reference.compute_dtype(a)
    truth.check_loss(loss)
    grads = kl.backward(torch.ones_like(loss), a, b, None, NONE, False, True, True, *options)
    truth.check_grads(*grads)
    if kind == "symmetric_kl":
        detached = kl.backward(None, a, b, None, NONE, True, True, True, *options)
        truth.check_grads(*detached, detach_targets=True)
    one_sided = kl.backward(None, a, b, None, NONE, False, True, False, *options)
    assert torch.equal(one_sided[0], grads[0]) or one_sided[0].isnan().any()
    assert one_sided[1].numel() == 0
    fused_loss, *fused = kl.forward_backward(a, b, None, SUM, False, True, True, *options)
    truth.check_grads(*fused)
    total = truth.loss.sum()
    if np.isfinite(total):
        bar = 1e-5 * total + truth.loss_bar().sum() + 1e-30
        assert abs(fused_loss.item() - total) <= bar
    return truth


@pytest.mark.parametrize("cols", [1, 2, 3, 31, 33, 64, 65, 127, 1000, 30522])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(kl: type[Kernel], dtype: torch.dtype, cols: int) -> None:
    pairs = [logits(1 if cols > 1000 else 7, cols, delta, dtype) for delta in DELTAS]
    check(kl, *map(torch.cat, zip(*pairs, strict=True)))


@pytest.mark.parametrize(
    ("cols", "dtype"),
    [
        *((cols, torch.float32) for cols in (1, 3, 33, 127, 1000, 5000)),
        *((cols, torch.bfloat16) for cols in (33, 30522)),
        (33, torch.float16),
        *((cols, torch.float64) for cols in (3, 1000)),
    ],
)
@pytest.mark.parametrize("kind", OTHERS)
def test_accuracy_of_every_kind(kl: type[Kernel], kind: str, cols: int, dtype: torch.dtype) -> None:
    pairs = [logits(1 if cols > 1000 else 5, cols, delta, dtype) for delta in DELTAS]
    check(kl, *map(torch.cat, zip(*pairs, strict=True)), kind)


@pytest.mark.parametrize(("dtype", "cols"), [(torch.float32, 3), (torch.float32, 3000), (torch.float64, 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_with_a_temperature(kl: type[Kernel], kind: str, dtype: torch.dtype, cols: int) -> None:
    pairs = [logits(3, cols, delta, dtype) for delta in DELTAS]
    a, b = map(torch.cat, zip(*pairs, strict=True))
    for temperature in (0.3, 3.0):
        check(kl, a, b, kind, temperature=temperature)


@pytest.mark.parametrize("cols", [3, 300])
@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.7, 0.999])
def test_accuracy_of_js_for_any_beta(kl: type[Kernel], beta: float, cols: int) -> None:
    for dtype in (torch.float32, torch.float64):
        pairs = [logits(5, cols, delta, dtype) for delta in DELTAS]
        check(kl, *map(torch.cat, zip(*pairs, strict=True)), "js", beta)


@pytest.mark.parametrize("delta", [1e-6, 1e-2, 5.0])
def test_accuracy_of_a_quarter_of_a_million_classes(kl: type[Kernel], delta: float) -> None:
    check(kl, *logits(2, 262144, delta, torch.float32))


@pytest.mark.parametrize(("a", "b"), [*itertools.permutations(DTYPES[:3], 2)])
def test_accuracy_of_mixed_dtypes(kl: type[Kernel], a: torch.dtype, b: torch.dtype) -> None:
    for cols in (3, 100):
        check(kl, *logits(9, cols, 1e-2, a, b))


@pytest.mark.parametrize("cols", [3, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_of_awkward_rows(kl: type[Kernel], dtype: torch.dtype, cols: int) -> None:
    a, b = awkward(cols, dtype)
    check(kl, a, b)
    check(kl, b, a)


@pytest.mark.parametrize("cols", [3, 5000])
@pytest.mark.parametrize("kind", OTHERS)
def test_accuracy_of_awkward_rows_for_every_kind(kl: type[Kernel], kind: str, cols: int) -> None:
    a, b = awkward(cols, torch.float32)
    check(kl, a, b, kind)
    check(kl, b, a, kind)


def awkward(cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of what is hardest to keep the digits of."""
    base = torch.randn(cols, dtype=dtype)
    noise = torch.randn(cols, dtype=dtype)
    top = torch.nn.functional.one_hot(base.argmax(), cols).to(dtype)
    rare = base - 20 * torch.nn.functional.one_hot(base.argmin(), cols).to(dtype)
    pairs = [
        (base + 1e-5 * noise + 100, base),  # a constant on top
        (base + 3 * top, base),  # only the likeliest class differs
        (base - 3 * top, base),
        (0 * base + 3 * top + 1e-3 * noise, 0 * base),  # all classes alike but one
        (rare + 1e-5 * noise + 5 * (rare == rare.min()), rare),  # one that hardly counts is far off
        (1e4 + base, 1e4 + base + 1e-2 * noise),  # large logits
        (30 * base, -30 * base),  # nothing in common
        (noise, base),
        (base + 0.49, base - 0.01 * noise),  # about where the formulas change over
        (base + 0.5 * noise.clamp(-1, 1), base),
        # About as large as fp32 logits can be told apart. In Triton sums over classes come before the softmax's
        # sum divides them: there terms may be as large as the largest number over their count.
        (torch.full_like(base, -1e37 / LESS) + 3e36 / LESS * top, base),
    ]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cols", [97, 300, 5000])
@pytest.mark.parametrize(
    ("kind", "beta"), [("js", 0.5), ("js", 0.02), ("js", 0.98), ("hellinger", 0.5), ("total_variation", 0.5)]
)
def test_accuracy_of_rows_of_which_a_few_light_classes_are_apart(
    kl: type[Kernel], kind: str, beta: float, cols: int, dtype: torch.dtype
) -> None:
    """Both KLs are infinite or large, and the divergence is small: it has its digits from the other classes."""
    distances = [1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0]
    rows = 3 * len(distances)
    b = torch.randn(rows, cols, dtype=torch.float64)
    a = b + torch.tensor(3 * distances, dtype=torch.float64)[:, None] * torch.randn_like(b)
    lightest, next_to_it = b.topk(2, largest=False).indices.T
    every = torch.arange(rows)
    a[every, lightest] -= 1e4
    b[every, next_to_it] -= 1e4
    a[every[::2], lightest[::2]] = b[every[::2], next_to_it[::2]] = -math.inf
    check(kl, a.to(dtype), b.to(dtype), kind, beta)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("symmetric_kl", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        *((kind, torch.float32) for kind in OTHERS),
    ],
)
def test_accuracy_of_rows_that_change_on_the_way(kl: type[Kernel], kind: str, dtype: torch.dtype) -> None:
    """Long rows are gone through piece by piece: what is learned late must mend what was done before."""
    cols = 3000
    base, noise = torch.randn(2, cols, dtype=torch.float64)
    place = torch.linspace(0, 1, cols, dtype=torch.float64)
    late = (place > 0.8).double()
    absent = -math.inf * torch.ones(cols, dtype=torch.float64)
    early_absent, late_absent = (torch.where(where, absent, base) for where in (place < 0.7, place > 0.3))
    spike = torch.nn.functional.one_hot(torch.tensor(cols - 2), cols)
    soon = (place > 0.1).double()
    jumps = itertools.product((1.5, 30, 1000), (soon, late), (1e-5, 1.0))  # of the largest logit, near and far
    pairs = [
        (base + 40 * place + 1e-5 * noise, base + 40 * place),  # the largest logit moves on and on, near
        (base + 40 * place + noise, base + 40 * place),  # far
        (base - 40 * place + 1e-5 * noise, base - 40 * place),  # it stands at the begin
        (base + 1e-5 * noise + 2 * late * noise, base),  # near, then far
        (base + 1e-5 * noise + 2 * (1 - late) * noise, base),  # far, then near
        (base + 1e-5 * noise + 3 * spike, base),  # near but for one class
        (base + 0.6 * place, base),  # near in each piece, and not as a whole
        (base + 0.4 * place + 20 * spike, base + 20 * spike),  # the centre moves
        (base + 30 * spike, base),  # one side's largest moves
        (base - 9 * late, base),
        *((base + rise * step + size * noise, base + rise * step) for rise, step, size in jumps),
        (base + 300 * late, base),  # one side's largest, and the centre, jump
        (base + 38 * late, base - 38 * late),
        (early_absent + 1e-5 * noise, early_absent),  # whole pieces masked
        (late_absent + 1e-5 * noise, late_absent),
        (early_absent + noise, early_absent),
        (base.where(base < 2, noise), absent.where(late > 0, base)),  # masked on one side, late
        (base, base.where(spike == 0, math.nan)),  # NaN, late
        (base, base.where(spike == 0, math.inf)),
    ]
    a, b = (torch.stack(side).to(dtype) for side in zip(*pairs, strict=True))
    check(kl, a, b, kind)
    if kl is Kernel:  # whose exponents rise above 0, in units of the temperature
        check(kl, a, b, kind, temperature=0.2)
    weight = torch.ones(len(pairs), dtype=reference.compute_dtype(a))
    weight[::2] = 0
    loss, *grads = kl.forward_backward(a, b, weight, NONE, False, True, True, KINDS.index(kind))
    assert (loss[::2] == 0).all()
    assert all((grad[::2] == 0).all() for grad in grads)


@pytest.mark.parametrize(
    ("kind", "dtype", "cols"),
    [
        *itertools.product(
            ["symmetric_kl"], [torch.float32, torch.float64, torch.bfloat16], [2, 3, 40, 128, 200, 3000]
        ),
        *itertools.product(OTHERS, [torch.float32], [3, 40, 3000]),
    ],
)
def test_the_bits_of_a_row_do_not_depend_on_the_others(
    kl: type[Kernel], kind: str, dtype: torch.dtype, cols: int
) -> None:
    """Whichever rows stand beside it, near or far ones or NaN."""
    rows = 67
    a = torch.randn(rows, cols, dtype=torch.float64)
    b = (a + torch.where(torch.rand(rows, 1) < 0.5, 1e-5, 2.0) * torch.randn_like(a)).to(dtype)
    a = a.to(dtype)

    def run(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        options = KINDS.index(kind), 0.3, 1.0
        loss = kl.forward(a, b, None, NONE, False, *options)
        return [loss, *kl.backward(None, a, b, None, NONE, False, True, True, *options)]

    expected, order = run(a, b), torch.randperm(rows)
    for x, y in zip(expected, run(a[order], b[order]), strict=True):
        assert torch.equal(x[order], y)
    a[5] = math.nan
    others = torch.arange(rows) != 5
    for x, y in zip(expected, run(a, b), strict=True):
        assert torch.equal(x[others], y[others])
        assert y[5].isnan().all()


@pytest.mark.parametrize("cols", [2, 7, 40, 97])
def test_special_rows_leave_the_others_alone(kl: type[Kernel], cols: int) -> None:
    inf, nan = math.inf, math.nan
    a, b = logits(40, cols, 1e-2, torch.float32)
    plain = Divergence(a, b)
    a[3, 0] = -inf  # masked on one side only
    b[5, 1] = -inf
    a[7, -1] = nan
    b[9, 0] = nan
    a[11] = -inf  # no class left
    b[13] = -inf
    a[15] = b[15] = -inf
    a[17, 1] = inf
    a[19, :-1] = b[19, :-1] = -inf  # one class left
    a[21, 0] = b[21, 0] = -inf
    truth = check(kl, a, b)
    touched = [3, 5, 7, 9, 11, 13, 15, 17, 19, 21]
    infinite, undefined = [3, 5], [7, 9, 11, 13, 15, 17]
    loss = wide(kl.forward(a, b, None, NONE, False))
    assert np.isposinf(loss[infinite]).all()
    assert np.isnan(loss[undefined]).all()
    assert loss[19] == 0
    others = np.setdiff1d(np.arange(40), touched)
    np.testing.assert_array_equal(truth.loss[others], plain.loss[others])
    grads = kl.backward(None, a, b, None, NONE, False, True, True)
    for grad in grads:
        assert grad[others].isfinite().all()
        assert grad[infinite + undefined].isnan().all()
        assert (grad[19] == 0).all()
        assert grad[21, 0] == 0


@pytest.mark.parametrize("temperature", [0.25, 1.0])
@pytest.mark.parametrize("cols", [6, 134, 1100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_last_class_masked_on_one_side(kl: type[Kernel], kind: str, cols: int, temperature: float) -> None:
    """Behind the last full vector; every difference is larger by 1 / T than that of the logits."""
    a, b = logits(4, cols, 1e-2, torch.float32)
    a[0, -1] = b[1, -1] = -math.inf
    check(kl, a, b, kind, temperature=temperature)


@pytest.mark.parametrize("cols", [4, 97, 9000])
@pytest.mark.parametrize("kind", OTHERS)
def test_special_rows_of_every_kind(kl: type[Kernel], kind: str, cols: int) -> None:
    inf = math.inf
    a, b = logits(14, cols, 1e-2, torch.float32)
    a[1, b[1].argmax()] = -inf  # masked on one side only
    b[2, a[2].argmax()] = -inf
    a[3, 1] = b[3, 2] = -inf
    a[4, ::2] = b[4, 1::2] = -inf  # nothing in common
    a[5, 0] = math.nan
    b[6, 0] = inf
    a[7] = -inf
    a[8, 0] = b[8, 0] = -inf
    a[9, 0] -= 300  # a probability that underflows on one side; on both
    b[10, 0] -= 300
    a[11, 0], b[11, 0] = a[11, 0] - 300, b[11, 0] - 290
    b[12, 0] -= 3e38
    truth = check(kl, a, b, kind)
    loss, *grads = kl.forward_backward(a, b, None, NONE, False, True, True, KINDS.index(kind))
    infinite = {"kl": [1, 3, 4], "reverse_kl": [2, 3, 4]}.get(kind, [])
    assert np.isposinf(truth.loss).nonzero()[0].tolist() == infinite
    assert loss[[5, 6, 7]].isnan().all()
    for grad in grads:
        assert grad[[5, 6, 7, *infinite]].isnan().all()
        assert grad[[row for row in range(14) if row not in (5, 6, 7, *infinite)]].isfinite().all()
        assert grad[8, 0] == 0
    most = {"js": math.log(2), "hellinger": 1, "total_variation": 1}.get(kind, inf)
    assert (loss.nan_to_num() <= most).all()
    assert kind not in ("js", "hellinger", "total_variation") or abs(loss[4].item() - most) <= 1e-6


@pytest.mark.parametrize("cols", [5, 80, 9000])
def test_masked_classes_are_absent(kl: type[Kernel], cols: int) -> None:
    a, b = logits(4, cols, 1e-3, torch.float32)
    keep = torch.rand(cols) < 0.5
    keep[:2] = torch.tensor([True, False])
    masked_a, masked_b = a.masked_fill(~keep, -math.inf), b.masked_fill(~keep, -math.inf)
    truth = Divergence(a[:, keep], b[:, keep])
    truth.check_loss(kl.forward(masked_a, masked_b, None, NONE, False))
    for grad, side in zip(kl.backward(None, masked_a, masked_b, None, NONE, False, True, True), (0, 1), strict=True):
        assert (grad[:, ~keep] == 0).all()
        error = np.linalg.norm((wide(grad[:, keep]) - truth.grads[side]).astype(np.float64), axis=-1)
        norm = np.linalg.norm(truth.grads[side].astype(np.float64), axis=-1)
        assert (error <= 1e-5 * norm + 2.0**-20 * truth.distance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 3, 100, 5000])
def test_equal_logits_give_exact_zeros(kl: type[Kernel], dtype: torch.dtype, cols: int) -> None:
    a = (10 * torch.randn(20, cols)).to(dtype)
    a[3] = 1000
    for kind, temperature in [*((kind, 1.0) for kind in range(len(KINDS))), (0, 0.7), (5, 0.7)]:
        for same in (a.clone(), a.T.contiguous().T):  # columns first: torch adds up in another order
            loss, *grads = kl.forward_backward(a, same, None, SUM, False, True, True, kind, 0.3, temperature)
            assert loss == 0
            assert all((grad == 0).all() for grad in grads)


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 200),
    delta=st.floats(1e-6, 20),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 2**31),
)
def test_properties(rows: int, cols: int, delta: float, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = logits(rows, cols, delta, torch.float32)
    kind, temperature = KINDS[seed % len(KINDS)], 1 + seed % 3
    truth = Divergence(a, b, kind, temperature=temperature)
    truth.check_loss(divergence(a, b, kind, reduction="none", temperature=temperature))
    truth.check_grads(divergence_grad(a, b, kind, reduction="sum", temperature=temperature), torch.empty(0))
    truth = Divergence(a, b)
    _, grad_a, grad_b = ops.divergence_forward_backward(a, b, None, SUM, False, True, True)
    rows_loss = symmetric_kl(a, b, reduction="none")
    truth.check_loss(rows_loss)
    truth.check_grads(grad_a, grad_b)
    # exchanged: the same loss, the gradients exchanged
    truth.check_loss(symmetric_kl(b, a, reduction="none"))
    truth.check_grads(*reversed(ops.divergence_backward(None, b, a, None, NONE, False, True, True)))
    # a constant on a whole row of one side changes nothing beyond what the sum's rounding does
    shifted = a + shift
    Divergence(shifted, b).check_loss(symmetric_kl(shifted, b, reduction="none"))
    # the gradients of one row sum to 0, as the loss does not change when a constant is added, up to 2^-20 of their
    # terms: each holds t, its mean and the logits' difference, of which rounding leaves as much
    for grad, terms in zip((grad_a, grad_b), truth.terms, strict=True):
        assert (np.abs(wide(grad).sum(-1)) <= 2.0**-20 * (1 + terms.sum(-1))).all()


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same (4, 6, C) values in memory laid out otherwise."""
    poisoned = torch.full((4, 7, x.size(-1) + 3), math.nan, dtype=x.dtype)
    poisoned[:, :-1, 1:-2] = x
    every_other = torch.full((4, 6, 2 * x.size(-1)), math.nan, dtype=x.dtype)
    every_other[..., ::2] = x
    return {
        "contiguous": x,
        "sliced": poisoned[:, :-1, 1:-2],
        "transposed rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed classes": x.transpose(1, 2).contiguous().transpose(1, 2),
        "reversed": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "every other class": every_other[..., ::2],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [3, 70])
def test_any_strides(kl: type[Kernel], dtype: torch.dtype, cols: int) -> None:
    a, b = (x.view(4, 6, cols) for x in logits(24, cols, 1e-2, dtype))
    expected = kl.forward_backward(a, b, None, BATCHMEAN, False, True, True)
    for (name_a, x), (name_b, y) in itertools.product(layouts(a).items(), layouts(b).items()):
        got = kl.forward_backward(x, y, None, BATCHMEAN, False, True, True)
        for want, have in zip(expected, got, strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=1e-7, msg=f"{name_a}, {name_b}")


def test_expanded_logits() -> None:
    a, b = logits(1, 10, 1e-2, torch.float32)
    a.requires_grad_()
    loss = symmetric_kl(a.expand(5, 10), b.expand(5, 10), reduction="sum")
    loss.backward()
    truth = Divergence(a, b)
    assert abs(loss.item() - 5 * truth.loss[0]) <= 1e-5 * 5 * truth.loss[0]
    truth.check_grads(a.grad, torch.empty(0), scale=5.0)


@requires_extension
def test_nothing_is_written_beyond_the_rows_or_left_unwritten() -> None:
    for rows, cols in ((1, 1), (5, 3), (17, 33), (3, 65), (2, 4097)):
        a, b = logits(rows, cols, 1e-2, torch.float32)
        expected = ops.divergence_backward(None, a, b, None, NONE, False, True, True)
        # The allocator hands freed blocks out again: poisoned ones show what the kernel does not write.
        blocks = [torch.full((rows, cols), math.nan) for _ in range(8)]
        del blocks
        got = ops.divergence_backward(None, a, b, None, NONE, False, True, True)
        for want, have in zip(expected, got, strict=True):
            assert torch.equal(want, have)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(4, 6, 5), (24, 70), (9,)])
def test_reductions(kl: type[Kernel], shape: tuple[int, ...], weighted: bool, reduction: str) -> None:
    a, b = (x.view(shape) for x in logits(math.prod(shape[:-1]), shape[-1], 0.3, torch.float64))
    weight = torch.rand(shape[:-1], dtype=torch.float64) if weighted else None
    truth = Divergence(a, b)
    factor = np.ones(shape[:-1]) if weight is None else weight.numpy()
    divisor = {"none": 1, "sum": 1, "mean": factor.sum(), "batchmean": shape[0]}[reduction]
    code = reference.REDUCTIONS.index(reduction)
    rows = truth.loss * factor / divisor
    loss = kl.forward(a, b, weight, code, False)
    np.testing.assert_allclose(wide(loss), rows if reduction == "none" else rows.sum(), rtol=1e-11)
    upstream = torch.rand_like(loss)
    expected = [g * (factor / divisor * wide(upstream))[..., None] for g in truth.grads]
    got = kl.backward(upstream, a, b, weight, code, False, True, True)
    for want, have in zip(expected, got, strict=True):
        np.testing.assert_allclose(wide(have), want, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("cols", [5, 100])
def test_rows_of_weight_zero_do_not_count(mask_dtype: torch.dtype, cols: int) -> None:
    a, b = (x.view(4, 6, cols) for x in logits(24, cols, 1e-2, torch.float32))
    mask = torch.rand(4, 6) < 0.5
    mask[0, 0] = True
    a[~mask] = math.nan
    b[~mask] = math.inf
    a.requires_grad_()
    loss = symmetric_kl(a, b, mask.to(mask_dtype), reduction="mean")
    truth = Divergence(a[mask], b[mask])
    assert abs(loss.item() - truth.loss.mean()) <= 1e-5 * truth.loss.mean() + 2.0**-21 * truth.distance.max()
    for upstream in (1.0, 0.5):
        (grad,) = torch.autograd.grad(loss * upstream, a, retain_graph=True)
        assert (grad[~mask] == 0).all()
        truth.check_grads(grad[mask], torch.empty(0), scale=upstream / mask.sum().item())
    rows = symmetric_kl(a, b, mask, reduction="none")
    assert (rows[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 100), (2, 0, 3)])
def test_no_rows(kl: type[Kernel], shape: tuple[int, ...]) -> None:
    a = torch.empty(shape)
    assert kl.forward(a, a, None, NONE, False).shape == shape[:-1]
    assert kl.forward(a, a, None, SUM, False) == 0
    assert kl.forward(a, a, None, MEAN, False).isnan()
    eager = torch.nn.functional.kl_div(a, a, reduction="batchmean")
    torch.testing.assert_close(kl.forward(a, a, None, BATCHMEAN, False), eager, equal_nan=True)
    assert kl.backward(None, a, a, None, NONE, False, True, True)[0].shape == shape


def test_rows_that_all_weigh_nothing(kl: type[Kernel]) -> None:
    """Their mean is NaN, as that of no rows is; none of them has a gradient, whatever is asked for."""
    for cols in (64, 1000):
        a, b = logits(2, cols, 1e-2, torch.float32)
        weight = torch.zeros(2)
        for reduction in (NONE, SUM, MEAN, BATCHMEAN):
            loss, *grads = kl.forward_backward(a, b, weight, reduction, False, True, True)
            assert loss.isnan() if reduction == MEAN else (loss == 0).all()
            assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("cols", [4, 70])
def test_gradcheck(reduction: str, cols: int) -> None:
    a, b = logits(3, cols, 0.5, torch.float64)
    a, b, weight = a.requires_grad_(), b.requires_grad_(), torch.rand(3)
    assert gradcheck(lambda a, b: symmetric_kl(a, b, reduction=reduction), (a, b))
    assert gradcheck(lambda a, b: symmetric_kl(a, b, weight, reduction), (a, b))
    assert gradcheck(lambda a: symmetric_kl(a, b.detach(), weight, reduction), (a,))
    assert gradcheck(lambda b: symmetric_kl(a.detach(), b, weight, reduction), (b,))


@pytest.mark.parametrize("cols", [4, 70])
@pytest.mark.parametrize("kind", OTHERS)
def test_gradcheck_of_every_kind(kind: str, cols: int) -> None:
    a, b = logits(3, cols, 0.5, torch.float64)
    a, b, weight = a.requires_grad_(), b.requires_grad_(), torch.rand(3)
    for reduction in ("none", "mean"):
        assert gradcheck(lambda a, b, r=reduction: divergence(a, b, kind, weight, r, 0.3, 1.5), (a, b))


def test_kinds_are_what_torch_and_the_literature_call_so() -> None:
    a, b = logits(6, 5, 0.5, torch.float64)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    m = (0.3 * q.exp() + 0.7 * p.exp()).log()

    def kl_div(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(input, target, reduction="batchmean", log_target=True)

    expected = {
        "symmetric_kl": kl_div(p, q) + kl_div(q, p),
        "kl": kl_div(p, q),
        "reverse_kl": kl_div(q, p),
        "js": 0.3 * kl_div(m, q) + 0.7 * kl_div(m, p),  # as in TRL and Liger
        "hellinger": 0.5 * ((p / 2).exp() - (q / 2).exp()).square().sum() / 6,
        "total_variation": 0.5 * (p.exp() - q.exp()).abs().sum() / 6,
    }
    assert tuple(expected) == KINDS
    for kind, value in expected.items():
        torch.testing.assert_close(divergence(a, b, kind, beta=0.3), value, rtol=1e-9, atol=0)
        torch.testing.assert_close(divergence(3 * a, 3 * b, kind, beta=0.3, temperature=3.0), value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", OTHERS)
def test_detached_targets_get_no_gradient(kind: str) -> None:
    a, b = (x.requires_grad_() for x in logits(6, 5, 0.5, torch.float32))
    whole = torch.autograd.grad(divergence(a, b, kind), (a, b))
    loss = divergence(a, b, kind, detach_targets=True)
    found = torch.autograd.grad(loss, (a, b), allow_unused=True)
    assert torch.equal(found[0], whole[0])
    assert found[1] is None
    assert torch.equal(divergence_grad(a, b, kind, detach_targets=True), whole[0])


def test_symmetric_kl_is_the_first_kind() -> None:
    a, b = (x.requires_grad_() for x in logits(6, 5, 0.5, torch.float32))
    weight = torch.rand(6)
    for detach in (False, True):
        mine = symmetric_kl(a, b, weight, "mean", detach)
        other = divergence(a, b, "symmetric_kl", weight, "mean", detach_targets=detach)
        assert torch.equal(mine, other)
        for x, y in zip(torch.autograd.grad(mine, (a, b)), torch.autograd.grad(other, (a, b)), strict=True):
            assert torch.equal(x, y)
        grads = (
            symmetric_kl_grad(a, b, weight, "mean", detach),
            divergence_grad(a, b, weight=weight, reduction="mean", detach_targets=detach),
        )
        assert torch.equal(*grads)


def test_detached_targets_give_the_gradient_of_the_published_loss() -> None:
    a, b = logits(6, 5, 0.5, torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    published = torch.nn.functional.kl_div(log_p, log_q.detach().exp(), reduction="batchmean")
    published = published + torch.nn.functional.kl_div(log_q, log_p.detach().exp(), reduction="batchmean")
    expected = torch.autograd.grad(published, (a, b))
    got = torch.autograd.grad(symmetric_kl(a, b, detach_targets=True), (a, b))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("upstream", [1.0, 0.25])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_backward_gives_the_same(reduction: str, upstream: float) -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    a, b = a.requires_grad_(), b.requires_grad_()
    loss = symmetric_kl(a, b, reduction=reduction).sum() * upstream
    first = torch.autograd.grad(loss, (a, b), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()  # the caller's to change
    second = torch.autograd.grad(loss, (a, b))
    assert all(torch.equal(x, y) for x, y in zip(kept, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (a, b))


def test_an_input_without_gradient_costs_none() -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    grads = ops.divergence_forward_backward(a, b, None, SUM, False, False, True)[1:]
    assert grads[0].numel() == 0
    b.requires_grad_()
    symmetric_kl(a, b).backward()
    assert a.grad is None
    Divergence(a, b).check_grads(torch.empty(0), b.grad, scale=1 / 6)
    assert not symmetric_kl(a, b.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cols", "delta"), [(5, 0.1), (5, 2.0), (97, 0.1), (97, 2.0), (1000, 2.0)])
def test_bits_do_not_depend_on_which_gradients_are_wanted(dtype: torch.dtype, cols: int, delta: float) -> None:
    a, b = logits(200, cols, delta, dtype)
    loss, *grads = ops.divergence_forward_backward(a, b, None, NONE, False, True, True)
    for wanted in itertools.product((False, True), repeat=2):
        other, *others = ops.divergence_forward_backward(a, b, None, NONE, False, *wanted)
        assert torch.equal(other, loss)
        assert all(torch.equal(x, y) for x, y, is_wanted in zip(grads, others, wanted, strict=True) if is_wanted)


def test_a_change_in_place_after_forward_is_noticed() -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    a.requires_grad_()
    loss = symmetric_kl(a, b)
    b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_derivative_raises(reduction: str) -> None:
    a, b = logits(6, 5, 0.5, torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    loss = symmetric_kl(a, b, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (loss + grad.square().sum()).backward()


def test_forward_mode_raises_and_is_never_a_silent_zero() -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    with forward_ad.dual_level():
        assert torch.equal(symmetric_kl(a, b), symmetric_kl(a.clone().requires_grad_(), b))
        for dual in (forward_ad.make_dual(a, b), forward_ad.make_dual(a.clone().requires_grad_(), b)):
            with pytest.raises(NotImplementedError, match="jvp"):
                symmetric_kl(dual, b)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda x: symmetric_kl(x, b), (a,), (b,))


def test_vmap_is_a_loop_over_its_batch() -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    losses = torch.func.vmap(lambda x, y: symmetric_kl(x, y, reduction="sum"))(a, b)
    assert torch.equal(losses, symmetric_kl(a, b, reduction="none"))


def test_a_loss_scale_saves_small_half_gradients() -> None:
    a, b = logits(4096, 3, 1e-3, torch.float16)
    a.requires_grad_()
    (symmetric_kl(a, b) * 65536).backward()
    Divergence(a, b).check_grads(a.grad, torch.empty(0), scale=16.0)
    assert (a.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_gradient_of_one_side(reduction: str) -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    weight = torch.rand(6)
    a.requires_grad_()
    (expected,) = torch.autograd.grad(symmetric_kl(a, b, weight, reduction).sum(), a)
    got = symmetric_kl_grad(a, b, weight, reduction)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    assert not got.requires_grad


def test_module_is_the_function() -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    module = SymmetricKLLoss(reduction="mean", detach_targets=True)
    assert torch.equal(module(a, b, torch.arange(6)), symmetric_kl(a, b, torch.arange(6), "mean", True))
    assert repr(module) == "SymmetricKLLoss(reduction='mean', detach_targets=True)"
    module = DivergenceLoss("js", "mean", 0.3, 2.0, True)
    assert torch.equal(module(a, b, torch.arange(6)), divergence(a, b, "js", torch.arange(6), "mean", 0.3, 2.0, True))
    assert repr(module) == (
        "DivergenceLoss(kind='js', reduction='mean', beta=0.3, temperature=2.0, detach_targets=True)"
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", [NONE, BATCHMEAN])
def test_opcheck(reduction: int, weighted: bool) -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    weight = torch.rand(6) if weighted else None
    torch.library.opcheck(ops.divergence.default, (a.requires_grad_(), b, weight, reduction, False))
    # Gradients have no derivative of their own, so they are checked on inputs that ask for none.
    a = a.detach()
    upstream = torch.rand(() if reduction else 6)
    torch.library.opcheck(ops.divergence_backward.default, (upstream, a, b, weight, reduction, False, True, False))
    torch.library.opcheck(ops.divergence_forward_backward.default, (a, b, weight, reduction, True, False, True))


@pytest.mark.parametrize("kind", range(1, len(KINDS)))
def test_opcheck_of_every_kind(kind: int) -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    options = kind, 0.3, 2.0
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(ops.divergence.default, (a.requires_grad_(), b, None, SUM, False, *options))
    a = a.detach()
    arguments = (a, b, None, SUM, False, True, True, *options)
    torch.library.opcheck(ops.divergence_backward.default, (torch.rand(()), *arguments), test_utils=checks)
    torch.library.opcheck(ops.divergence_forward_backward.default, arguments, test_utils=checks)
    torch.library.opcheck(ops.divergence_grad.default, (a, b, None, SUM, False, *options), test_utils=checks)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction: str) -> None:
    a, b = logits(6, 5, 0.5, torch.float32)
    a, b, mask = a.requires_grad_(), b.requires_grad_(), torch.arange(6) % 3

    def step(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 2 * symmetric_kl(a * 1.5, b, mask, reduction).sum()

    compiled = torch.compile(step, fullgraph=True)
    expected = torch.autograd.grad(step(a, b, mask), (a, b))
    got = torch.autograd.grad(compiled(a, b, mask), (a, b))
    torch.testing.assert_close(compiled(a, b, mask), step(a, b, mask))
    torch.testing.assert_close(got, expected)


def test_every_kind_compiles_to_one_graph() -> None:
    a, b = (x.requires_grad_() for x in logits(6, 5, 0.5, torch.float32))

    def step(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        return [divergence(1.5 * a, b, kind, temperature=2.0) for kind in KINDS]

    losses, compiled = step(a, b), torch.compile(step, fullgraph=True)(a, b)
    torch.testing.assert_close(compiled, losses)
    expected, found = (torch.autograd.grad(sum(values), (a, b)) for values in (losses, compiled))
    torch.testing.assert_close(found, expected)


@requires_extension
@pytest.mark.parametrize(
    ("kind", "shape"),
    [*itertools.product(["symmetric_kl"], [(4096, 3), (700, 65), (9, 30522)]), *((k, (9, 8000)) for k in OTHERS)],
)
def test_same_bits_for_any_number_of_threads(kind: str, shape: tuple[int, int]) -> None:
    a, b = logits(*shape, 1e-2, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            options = BATCHMEAN, False, True, True, KINDS.index(kind)
            results.append(ops.divergence_forward_backward(a, b, None, *options))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], result, strict=True))


@for_each_lower_instruction_set
def test_every_instruction_set(isa: str) -> None:
    """The accuracy tests again in a process that keeps to a lower instruction set."""
    run_again(__file__, "Kernel and (accuracy or special or masked or equal or strides or bits)", SMART_KERNELS_ISA=isa)


x = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((x, torch.zeros(2, 4)), ValueError, r"target: got shape \(2, 4\), expected that of input, \(2, 3\)"),
        ((x, torch.zeros(3)), ValueError, "target: got shape"),
        ((torch.zeros(()), torch.zeros(())), ValueError, r"input: got shape \(\), expected \(\.\.\., C\)"),
        ((torch.zeros(2, 0), torch.zeros(2, 0)), ValueError, "input: got shape"),
        ((x.long(), x), TypeError, "input: got dtype torch.int64"),
        ((x, x.bool()), TypeError, "target: got dtype torch.bool"),
        ((x.cfloat(), x), TypeError, "input: got dtype torch.complex64"),
        ((x, x.double()), TypeError, "target: got dtype torch.float64 with input torch.float32"),
        ((x.double(), x.half()), TypeError, "target: got dtype torch.float16 with input torch.float64"),
        ((x, None), TypeError, "target: got NoneType"),
        ((x.to_sparse(), x), TypeError, "input: got layout torch.sparse_coo, expected torch.strided"),
        ((x, x.to_sparse_csr()), TypeError, "target: got layout torch.sparse_csr"),
        ((x, x.to("meta")), ValueError, "target: got device meta, expected that of input, cpu"),
        ((x, x, None, "avg"), ValueError, "reduction: got 'avg', expected one of 'none', 'sum', 'mean', 'batchmean'"),
        ((x, x, None, None), ValueError, "reduction: got None"),
        ((x, x, None, []), ValueError, "reduction: got"),
        ((x, x, None, "sum", 1), TypeError, "detach_targets: got int, expected bool"),
        ((x, x, torch.ones(3)), ValueError, r"weight: got shape \(3,\), expected a factor per row, \(2,\)"),
        ((x, x, torch.ones(2, 1)), ValueError, "weight: got shape"),
        ((x, x, 1.0), TypeError, "weight: got float"),
        ((x, x, torch.ones(2, device="meta")), ValueError, "weight: got device meta"),
        ((x, x, torch.ones(2, dtype=torch.cfloat)), TypeError, "weight: got dtype torch.complex64"),
        ((x, x, torch.ones(2, requires_grad=True)), ValueError, "weight: requires grad"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        symmetric_kl(*arguments)
    with pytest.raises(error, match=message):
        symmetric_kl_grad(*arguments)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"kind": "jeffreys"}, ValueError, "kind: got 'jeffreys', expected one of 'symmetric_kl', 'kl', 'reverse_kl'"),
        ({"kind": None}, ValueError, "kind: got None"),
        ({"kind": "js", "beta": 0}, ValueError, "beta: got 0, expected .* between 0 and 1: .*'kl'.*'reverse_kl'"),
        ({"kind": "js", "beta": 1.0}, ValueError, "beta: got 1.0, expected"),
        ({"beta": math.nan}, ValueError, "beta: got nan"),
        ({"beta": "0.5"}, TypeError, "beta: got str, expected a number"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a finite number > 0"),
        ({"temperature": math.inf}, ValueError, "temperature: got inf"),
        ({"temperature": True}, TypeError, "temperature: got bool"),
    ],
)
def test_bad_options(option: dict[str, object], error: type[Exception], message: str) -> None:
    for call in (divergence, divergence_grad):
        with pytest.raises(error, match=message):
            call(x, x, **option)
    with pytest.raises(error, match=message):
        DivergenceLoss(**option)


def test_bad_options_of_the_module() -> None:
    with pytest.raises(ValueError, match="reduction"):
        SymmetricKLLoss(reduction="avg")

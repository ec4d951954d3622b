"""A head and a divergence in one, against extended precision; the public contract; the memory that it takes."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from extension import requires_extension
from oracle import LinearDivergence, compare, wide
from torch.autograd import forward_ad, gradcheck

from harness import peak_bytes
from smart_kernels import LinearDivergenceLoss, divergence, linear_divergence, reference
from smart_kernels.ops import linear_divergence as room

ops = torch.ops.smart_kernels
KINDS = tuple(reference.KINDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISTANCES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0)
NAMES = "input", "target", "linear_weight", "bias", "target_linear_weight", "target_bias"


if os.environ.get("TRITON_INTERPRET") == "1":  # test_gpu_linear.py runs this file so
    SERVERS = ["triton"]
else:
    SERVERS = ["reference", pytest.param("kernel", marks=requires_extension)]


@pytest.fixture(params=SERVERS)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What does a chunk's rows: the eager definition, what serves the device, or Triton's interpreter."""
    if request.param == "reference":
        monkeypatch.setattr(room, "_rows", reference.divergence_rows_)
    elif request.param == "triton":
        from smart_kernels.triton_kernels import divergence as launchers

        monkeypatch.setattr(room, "_rows", launchers.divergence_rows_)
    return request.param


def hidden(n: int, width: int, classes: int, distance: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states that are so far apart in proportion, a head of which logits are of size 3, a bias."""
    b = torch.randn(n, width, dtype=torch.float64)
    a = b + distance * torch.randn(n, width, dtype=torch.float64)
    head = 3 / math.sqrt(width) * torch.randn(classes, width, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (a, b, head, 0.3 * torch.randn(classes, dtype=torch.float64))]


def call(tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
    a, b, head, *rest = tensors
    return linear_divergence(a, b, head, **dict(zip(NAMES[3:], rest, strict=False)), **options)


def check(
    tensors: list[torch.Tensor], loss: torch.Tensor, dtype: torch.dtype, factor: float = 1.0, **options: Any
) -> None:
    """Losses and gradients of reduction "sum" within the bars of the house, on these hidden states and this head."""
    truth = LinearDivergence(*tensors, **options)
    # Relative to its norm what the loss, a gradient at hidden states and one at a head may be off by. Below 1e-5, fp32
    # resolves (h_a - h_b) W less well against what is left of it; narrow gradients are rounded once more.
    of_loss, of_hidden, of_head = {torch.float64: (1e-11, 1e-10, 1e-9), torch.float32: (1e-5, 1e-4, 1e-3)}.get(
        dtype, (1e-3, 2.0**-7, 2.0**-7)
    )
    total = truth.loss.sum()
    resolved = 2.0**-20 if dtype != torch.float64 else 1e-13
    order = 1 if options.get("kind") == "total_variation" else math.sqrt(total)
    assert abs(wide(loss) - total) <= of_loss * total + resolved * order * truth.reach
    for x, grad, bar in zip(tensors, truth.grads, (of_hidden, of_hidden, of_head, of_head), strict=False):
        error, norm = wide(x.grad) / factor - grad, np.linalg.norm(grad.astype(float))
        error = np.linalg.norm(error.astype(float))
        assert x.grad.dtype == x.dtype
        assert error <= bar * norm, (error / norm, tuple(x.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(rows: str, kind: str, dtype: torch.dtype) -> None:
    least = {torch.float32: 1e-7, torch.float64: 1e-7}.get(dtype, 1e-4)
    for distance in DISTANCES:
        if distance >= least:
            tensors = hidden(6, 24, 301, distance, dtype)
            loss = call(tensors, kind=kind, reduction="sum", chunk_size=4)
            factor = 2.0**14 if dtype == torch.float16 and distance < 0.1 else 1.0  # lest they be subnormal
            (factor * loss).backward()
            check(tensors, loss, dtype, factor, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows(rows: str, kind: str) -> None:
    """Of several blocks, near and far; the logits' difference keeps its digits where that of the logits has none."""
    for distance in (1e-5, 0.3):
        tensors = hidden(2, 16, 9001, distance, torch.float32)
        loss = call(tensors, kind=kind, reduction="sum")
        loss.backward()
        check(tensors, loss, torch.float32, kind=kind)


@pytest.mark.parametrize(("softcap", "temperature"), [(2.0, 1.0), (30.0, 0.7), (None, 2.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["symmetric_kl", "js"])
def test_softcap_and_temperature(
    rows: str, kind: str, dtype: torch.dtype, softcap: float | None, temperature: float
) -> None:
    for distance in (1e-5, 1.0):
        tensors = hidden(3, 24, 65, distance, dtype)
        options: dict[str, Any] = {"kind": kind, "softcap": softcap, "temperature": temperature, "beta": 0.3}
        loss = call(tensors, reduction="sum", **options)
        loss.backward()
        check(tensors, loss, dtype, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_teachers_own_head(rows: str, kind: str, softcap: float | None) -> None:
    a, _, head, bias = hidden(5, 24, 65, 1.0, torch.float64)
    _, b, other, other_bias = hidden(5, 7, 65, 1.0, torch.float64)
    tensors = [a, b, head, bias, other, other_bias]
    loss = call(tensors, kind=kind, reduction="sum", softcap=softcap, chunk_size=2)
    loss.backward()
    truth = LinearDivergence(*tensors, kind=kind, softcap=softcap)
    assert abs(wide(loss) - truth.loss.sum()) <= 1e-12 * truth.loss.sum()
    for x, grad in zip(tensors, truth.grads, strict=True):
        compare(wide(x.grad), grad, 1e-11 * (np.abs(grad) + np.abs(grad).max()), "gradient")


@pytest.mark.parametrize("kind", ["symmetric_kl", "kl", "total_variation"])
def test_equal_hidden_states_give_exact_zeros(rows: str, kind: str) -> None:
    for dtype, softcap in itertools.product(DTYPES, (None, 5.0)):
        a, _, head, bias = hidden(5, 24, 301, 0.0, dtype)
        tensors = [a, a.detach().clone().requires_grad_(), head, bias]
        loss = call(tensors, kind=kind, softcap=softcap)
        loss.backward()
        assert loss == 0
        assert all(not x.grad.any() for x in tensors if kind != "total_variation" or x.dim() != 2)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_detached_targets(rows: str, kind: str, softcap: float | None) -> None:
    """The gradients of the composition on logits, where the target and all that it is made of are constants."""
    tensors = [x.detach() for x in hidden(5, 24, 65, 0.3, torch.float64)]
    ours, composed = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    call(ours, kind=kind, detach_targets=True, softcap=softcap, chunk_size=2).backward()
    x, y, head, bias = composed
    a, b = x @ head.T + bias, y @ head.T + bias
    if softcap is not None:
        a, b = softcap * (a / softcap).tanh(), softcap * (b / softcap).tanh()
    divergence(a, b, kind, detach_targets=True).backward()
    for one, other in zip(ours, composed, strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_weights_reductions_and_upstream_factors(rows: str, reduction: str) -> None:
    tensors = [x.detach().double() for x in hidden(6, 24, 65, 0.3, torch.float32)]
    a, b, head, bias = [x.view(2, 3, -1) for x in tensors[:2]] + tensors[2:]
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]])
    factor = 3.7 if reduction != "none" else torch.rand(2, 3, dtype=torch.float64)
    results = []
    for poisoned in (False, True):
        x, y, w, c = (z.clone() for z in (a, b, head, bias))
        if poisoned:
            x[0, 1], y[1, 2] = math.nan, math.inf
        for z in (x, y, w, c):
            z.requires_grad_()
        if poisoned:
            loss = linear_divergence(x, y, w, bias=c, weight=weight, reduction=reduction, chunk_size=4)
        else:
            loss = divergence(x @ w.T + c, y @ w.T + c, weight=weight, reduction=reduction)
        (loss * factor).sum().backward()
        results.append([loss.detach(), *(z.grad for z in (x, y, w, c))])
    for truth, ours in zip(*results, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-10, atol=1e-13)


def test_a_loss_scale_protects_narrow_gradients() -> None:
    """What fp16 would flush to zero is kept until the factor is known."""
    tensors = hidden(4, 24, 65, 1e-3, torch.float16)
    scaled = [x.detach().clone().requires_grad_() for x in tensors]
    wide_ones = [x.detach().float().requires_grad_() for x in tensors]
    (call(scaled) * 2.0**24).backward()
    (call(wide_ones) * 2.0**24).backward()
    for x, y in zip(scaled, wide_ones, strict=True):
        assert torch.equal(x.grad, y.grad.half())
        assert x.grad.any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(reduction: str, softcap: float | None) -> None:
    tensors = hidden(2, 3, 4, 0.5, torch.float64)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return call(list(tensors), reduction=reduction, softcap=softcap, chunk_size=1)

    assert gradcheck(loss, tensors)
    others = [x.detach().requires_grad_() for x in (*hidden(2, 3, 4, 0.5, torch.float64), *tensors[2:])]
    assert gradcheck(loss, others)


def test_a_second_backward_and_a_second_derivative() -> None:
    tensors = hidden(3, 5, 7, 0.5, torch.float32)
    loss = 3 * call(tensors)
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in tensors]
    loss.backward()
    for x, grad in zip(tensors, first, strict=True):
        assert torch.allclose(x.grad, 2 * grad, rtol=1e-6)
    for reduction in ("mean", "none"):
        (grad,) = torch.autograd.grad(call(tensors, reduction=reduction).sum(), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.sum().backward()


def test_forward_mode_raises() -> None:
    a, b, head, _ = (x.detach() for x in hidden(3, 5, 7, 0.5, torch.float32))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        linear_divergence(forward_ad.make_dual(a, torch.ones_like(a)), b, head)


def test_a_frozen_head_and_what_is_not_asked_for() -> None:
    """No gradient of a head is made that asks for none."""
    a, b, head, bias = (x.detach() for x in hidden(4, 24, 5000, 0.1, torch.float32))
    a.requires_grad_()
    taken = peak_bytes(lambda: linear_divergence(a, b, head, bias=bias, chunk_size=1).backward())
    assert taken < head.nbytes / 2
    assert b.grad is head.grad is bias.grad is None
    with torch.no_grad():
        assert not linear_divergence(a, b, head).requires_grad


@requires_extension  # the eager row function has further tensors of a chunk's size
def test_memory_does_not_grow_with_the_rows() -> None:
    """Beyond arguments and results: the logits of a chunk, three numbers for each, and half as much beside."""
    taken = []
    for n in (64, 256):
        tensors = hidden(n, 8, 4000, 0.1, torch.float32)
        results = sum(x.nbytes for x in tensors)
        taken.append(peak_bytes(lambda tensors=tensors: call(tensors, chunk_size=16).backward()) - results)
    chunk = 3 * 16 * 4000 * 4
    assert max(taken) < 1.5 * chunk
    assert abs(taken[1] - taken[0]) < 0.05 * chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing_but_rounding(dtype: torch.dtype, chunk_size: int) -> None:
    tensors = hidden(7, 24, 65, 1e-3, dtype)
    results = []
    for size in (None, chunk_size):
        each = [x.detach().clone().requires_grad_() for x in tensors]
        call(each, chunk_size=size).backward()
        results.append([x.grad for x in each])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=8 * torch.finfo(dtype).eps * one.abs().max().item())


def test_narrow_products_with_a_wide_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, on which bfloat16 is multiplied as it is: with products of the same factors."""

    def multiply(out: torch.Tensor, x: torch.Tensor, y: torch.Tensor, add: bool = False) -> None:
        assert x.dtype == y.dtype == torch.bfloat16
        product = x.float() @ y.float()
        out.add_(product) if add else out.copy_(product)

    monkeypatch.setattr(room, "multiplies_narrow", lambda device: True)
    monkeypatch.setattr(room, "_multiply", multiply)
    for distance in (1e-4, 1e-2, 1.0):
        tensors = hidden(6, 24, 301, distance, torch.bfloat16)
        loss = call(tensors, reduction="sum", chunk_size=4)
        loss.backward()
        check(tensors, loss, torch.bfloat16)
        mixed = [x.detach().float().requires_grad_() for x in hidden(6, 24, 301, distance, torch.float32)]
        mixed[2] = mixed[2].detach().bfloat16().requires_grad_()
        loss = call(mixed, reduction="sum", chunk_size=4)
        loss.backward()
        check(mixed, loss, torch.bfloat16)


def test_masked_classes_and_rows_that_are_no_numbers(rows: str) -> None:
    a, b, head, bias = (x.detach() for x in hidden(4, 8, 40, 1e-3, torch.float64))
    bias[5] = bias[17] = -math.inf
    kept = [j for j in range(40) if j not in (5, 17)]
    b[2, 3] = math.nan
    ours = linear_divergence(a, b, head, bias=bias, reduction="none")
    without = linear_divergence(a, b, head[kept], bias=bias[kept], reduction="none")
    assert torch.allclose(ours, without, rtol=1e-11, atol=0, equal_nan=True)
    assert ours.isnan().tolist() == [False, False, True, False]
    a, b = a[:2].requires_grad_(), b[:2].requires_grad_()
    head.requires_grad_()
    linear_divergence(a, b, head, bias=bias).backward()
    assert not head.grad[[5, 17]].any()
    assert all(x.grad.isfinite().all() for x in (a, b, head))


def test_no_rows() -> None:
    a, head = torch.zeros(0, 3, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
    assert linear_divergence(a, a, head, reduction="none").shape == (0, 3)
    assert linear_divergence(a, a, head).isnan()
    linear_divergence(a, a, head, reduction="sum").backward()
    assert not head.grad.any()
    assert a.grad.shape == a.shape


def test_tied_heads_and_strided_tensors() -> None:
    memory = torch.randn(2, 8, 5, 3)
    a, b = memory.transpose(1, 2)[..., 0].requires_grad_(), memory.transpose(1, 2)[..., 1].requires_grad_()
    head = torch.randn(8, 31).t().requires_grad_()
    loss = linear_divergence(a, b, head, target_linear_weight=head)
    (grad,) = torch.autograd.grad(loss, head)
    logits = [x.detach().double() @ head.detach().double().t() for x in (a, b)]
    truth = head.detach().double().requires_grad_()
    expected = divergence(a.detach().double() @ truth.t(), b.detach().double() @ truth.t())
    assert torch.allclose(loss.double(), divergence(*logits), rtol=1e-5)
    assert torch.allclose(grad.double(), torch.autograd.grad(expected, truth)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Hidden states keep their digits, whatever autocast would round them to."""
    tensors = hidden(4, 24, 65, 1e-4, torch.float32)
    with torch.autocast("cpu", dtype):
        loss = call(tensors, reduction="sum")
    loss.backward()
    check(tensors, loss, torch.float32)


def test_in_a_graph() -> None:
    tensors = hidden(4, 24, 65, 0.1, torch.float32)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        rows = call(list(tensors), kind="kl", reduction="none")
        return 2.5 * call(list(tensors), softcap=30.0) + (rows * rows.detach()).sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for grad, one in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        assert torch.allclose(grad, one, rtol=1e-6, atol=1e-9)


def test_the_ops_schemas_fakes_and_autograd() -> None:
    a, b, head, bias = hidden(4, 6, 9, 0.1, torch.float32)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0])
    options = None, [True] * 4 + [False] * 2, 1, False, 0, 0.5, 1.0, None, 2
    torch.library.opcheck(ops.linear_divergence, (a, b, head, bias, None, None, weight, *options))
    rows = torch.randn(3, 4, 9)
    torch.library.opcheck(ops.divergence_rows_, (rows, weight, None, True, True, False, 0, 0.5, 1.0))
    with torch.device("meta"):
        x = torch.empty(2, 3, 8, requires_grad=True)
        assert linear_divergence(x, x, torch.empty(5, 8), reduction="none").shape == (2, 3)


def test_the_module() -> None:
    a, b, head, bias = (x.detach() for x in hidden(4, 6, 9, 0.1, torch.float32))
    module = LinearDivergenceLoss("js", "sum", 0.3, 2.0, 30.0, True, 2)
    assert "kind='js', reduction='sum', beta=0.3, temperature=2.0, softcap=30.0" in repr(module)
    options = {"bias": bias, "reduction": "sum", "beta": 0.3, "temperature": 2.0, "softcap": 30.0, "chunk_size": 2}
    assert torch.equal(module(a, b, head, bias), linear_divergence(a, b, head, "js", **options))


@pytest.mark.parametrize(("name", "value"), [
    ("target", torch.zeros(2, 6)), ("target", torch.zeros(3, 4)), ("linear_weight", torch.zeros(5, 7)),
    ("linear_weight", torch.zeros(0, 4)), ("bias", torch.zeros(4)), ("target_bias", torch.zeros(5)),
    ("target_linear_weight", torch.zeros(6, 4)), ("linear_weight", torch.zeros(5, 4, dtype=torch.float64)),
    ("softcap", 0.0), ("softcap", math.inf), ("chunk_size", 0), ("beta", 1.0), ("temperature", 0.0),
    ("weight", torch.zeros(3)), ("input", torch.zeros(())), ("linear_weight", torch.zeros(5, 4, dtype=torch.int64)),
])  # fmt: skip
def test_bad_arguments(name: str, value: Any) -> None:
    good = {"input": torch.zeros(2, 4), "target": torch.zeros(2, 4), "linear_weight": torch.zeros(5, 4)}
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: got .*expected"):
        linear_divergence(**{**good, name: value})

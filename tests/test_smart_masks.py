"""Dropout masks that a step's passes share: drawn once, and no number is another than if they were drawn again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smart_kernels import Smart, SmartConfig
from smart_kernels.smart.masks import SharedMasks
from smart_kernels.smart.passes import Passes

ROWS, WIDTH, HEADS = 64, 256, 8  # masks of 16384 elements and, in attention, of four times as many


class Draws(TorchDispatchMode):
    """Counts the masks that are drawn."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten.bernoulli_.float
        return func(*args, **kwargs or {})


@contextmanager
def draws(expected: int) -> Iterator[None]:
    with Draws() as counted:
        yield
    assert counted.count == expected


def again(masks: SharedMasks, state: Tensor, run: Callable[[], Any]) -> Any:
    torch.set_rng_state(state)
    with masks:
        return run()


def attend(x: Tensor, dropout: float = 0.2) -> Tensor:
    q = x.view(1, ROWS, HEADS, -1).transpose(1, 2).repeat(2, 1, 1, 1)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=dropout).sum(0).transpose(0, 1).reshape(x.shape)


def several(x: Tensor) -> Tensor:
    x = F.dropout(x, 0.1) + torch.rand(3).sum()
    x = attend(F.dropout(x, p=0.4, training=True))
    return F.dropout(x.T * 1, 0.3, inplace=True) + F.dropout(torch.ones(3), 0.5).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_found_is_what_would_be_drawn(dtype: torch.dtype, grad: bool) -> None:
    x, state, masks = torch.randn(ROWS, WIDTH, dtype=dtype), torch.get_rng_state(), SharedMasks()
    x.requires_grad_()
    expected = several(x)
    end = torch.get_rng_state()
    with draws(5):
        first = again(masks, state, lambda: several(x))
    assert torch.equal(first, expected)
    for _ in range(2):
        with draws(1), torch.set_grad_enabled(grad):  # three numbers are not worth a look
            found = again(masks, state, lambda: several(x))
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), end)
        if grad:
            assert torch.equal(
                *(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (first, found))
            )
    torch.autograd.backward(first, torch.ones_like(first))  # no one has changed the first graph's masks


def test_a_mask_takes_no_memory_of_its_own() -> None:
    x, state, masks = torch.ones(ROWS, WIDTH, requires_grad=True), torch.get_rng_state(), SharedMasks()
    first, second = (again(masks, state, lambda: F.dropout(x)).grad_fn for _ in range(2))
    assert first._saved_other.data_ptr() == second._saved_other.data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        lambda x: F.dropout(x, 0.25),
        lambda x: F.dropout(x.repeat(1, 2), 0.5),
        lambda x: F.dropout(x.view(2, -1, WIDTH), 0.5),
        lambda x: F.dropout(x.T, 0.5),
        lambda x: F.dropout(x.double(), 0.5),
        lambda x: F.dropout(torch.rand(1) + x, 0.5),
    ],
    ids=["probability", "size", "shape", "strides", "dtype", "state"],
)
def test_what_is_drawn_in_another_way_is_drawn(other: Callable[[Tensor], Tensor]) -> None:
    x, state, masks = (
        torch.ones(ROWS, WIDTH + 1)[:, :WIDTH].clone().requires_grad_(),
        torch.get_rng_state(),
        SharedMasks(),
    )
    kept = again(masks, state, lambda: F.dropout(x, 0.5))
    with draws(1):
        found = again(masks, state, lambda: other(x))
    torch.set_rng_state(state)
    assert torch.equal(found, other(x))
    assert kept.grad_fn is not None


def test_a_mask_that_is_gone_or_changed_or_of_an_earlier_step_is_drawn() -> None:
    x, state, masks = torch.ones(ROWS, WIDTH, requires_grad=True), torch.get_rng_state(), SharedMasks()
    expected = again(masks, state, lambda: F.dropout(x))
    with draws(0):
        again(masks, state, lambda: F.dropout(x))
    masks.clear()
    with draws(1):
        kept = again(masks, state, lambda: F.dropout(x))
    kept.grad_fn._saved_other.mul_(3)
    with draws(1):
        assert torch.equal(again(masks, state, lambda: F.dropout(x)), expected)
    with draws(1), torch.no_grad():
        assert torch.equal(again(masks, state, lambda: F.dropout(x)), expected)


def test_bernoulli_of_other_functions_is_left_alone() -> None:
    x, masks = torch.ones(ROWS, WIDTH), SharedMasks()
    state = torch.get_rng_state()
    with draws(2), masks:
        drawn = x.clone().bernoulli_(0.3)
        torch.set_rng_state(state)
        assert torch.equal(x.clone().bernoulli_(0.3), drawn)


def test_inference_mode_vmap_and_evaluation() -> None:
    x, state, masks = torch.ones(2, ROWS, WIDTH), torch.get_rng_state(), SharedMasks()
    each = torch.vmap(F.dropout, randomness="different")
    for run in (lambda: each(x), torch.inference_mode()(lambda: F.dropout(x)), lambda: F.dropout(x, training=False)):
        torch.set_rng_state(state)
        expected = run()
        for _ in range(2):
            assert torch.equal(again(masks, state, run), expected)


class Net(nn.Module):
    """Words, attention, two dropouts of activations, a head; its middle is computed again if so asked."""

    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.words, self.dropout, self.head = nn.Embedding(20, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 3)
        self.recomputed = recomputed

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def middle(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(attend(x, 0.2 * self.training)))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Sequence[Tensor]:
        x = self.dropout(self.words(input_ids))
        x = checkpoint(self.middle, x, use_reentrant=False) if self.recomputed else self.middle(x)
        logits = self.head(x)
        return F.cross_entropy(logits, labels), logits


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("adversary", ["power", "predicted", "random"])
def test_a_step_draws_what_an_ordinary_one_draws(
    adversary: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Net(recomputed)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    batch = {"input_ids": torch.randint(20, (ROWS,)), "labels": torch.randint(3, (ROWS,))}
    with draws(3):
        model.train()(**batch)
    results = []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(Passes, "_sharing", lambda self: nullcontext())
        model.load_state_dict(start)
        torch.manual_seed(0)
        smart = Smart(model, SmartConfig(adversary=adversary, check=False), 10)
        steps = []
        for step in range(2):
            torch.manual_seed(step)
            counted = Draws()
            with counted:
                out = smart(batch)
            model.zero_grad()
            out.loss.backward()
            passes = 4 if adversary == "power" else 3
            if not recomputed:
                assert counted.count == (3 if shared else 3 * passes)
            elif adversary == "random":  # the first mask is kept, and what is computed again is drawn each time
                assert counted.count == (1 + 2 * passes if shared else 3 * passes)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            smart.update()
            steps.append(
                [out.loss, out.smoothness, out.proximal, torch.get_rng_state(), *map(torch.clone, model.parameters())]
            )
        results.append(steps)
    for ours, theirs in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dropout", ["independent", "off"])
def test_masks_that_are_not_shared_are_drawn(dropout: str) -> None:
    model = Net(recomputed=False)
    batch = {"input_ids": torch.randint(20, (ROWS,)), "labels": torch.randint(3, (ROWS,))}
    smart = Smart(model, SmartConfig(mu=0.0, adversary="random", dropout=dropout), 10)
    with draws(6 if dropout == "independent" else 0):
        smart(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dropout", "attention"])
def test_masks_that_are_kept_outlive_their_graph_and_lie_small_in_the_next(kind: str, dtype: torch.dtype) -> None:
    """Results and gradients to the bit; a graph that saved its own output by a hook would never go."""

    def run(x: Tensor) -> Tensor:
        if kind == "dropout":
            return F.dropout(x.sin(), 0.3)
        q, k, v = (i * x.sin() for i in (1, 2, 3))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)

    x = torch.randn(4, 4, 64, 64, dtype=dtype)
    state = torch.get_rng_state()
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    expected = run(inputs[0])
    after = torch.get_rng_state()
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()

    masks = SharedMasks()
    for pack, leaf in zip((False, True), inputs[1:], strict=True):
        masks.set(keep=True, pack=pack)
        torch.set_rng_state(state)
        with masks:
            result = run(leaf)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(result, expected)
        (result * weights).sum().backward()
        del result
        assert torch.equal(leaf.grad, inputs[0].grad)
    assert all(mask.scaled() is None for mask in masks._watch.masks.values())
    masks.clear()
    torch.set_rng_state(state)
    masks.set(keep=True, pack=True)
    with masks:
        made = inputs[2] * 2
        gone = weakref.ref(made)
        result = run(made)
    del made
    assert gone() is not None
    del result
    assert gone() is None

"""Which divergence a batch gets, what it counts, and what it refuses to guess."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smart_kernels import divergence as divergence_of
from smart_kernels import reference
from smart_kernels.smart.divergence import Classes, Custom, SquaredError, choose_divergence

GPT2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=7, bos_token_id=1, eos_token_id=2)
BERT = transformers.BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=7
)
T5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=7)
PLAIN = nn.Linear(1, 1)


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rows(a: Tensor, b: Tensor) -> Tensor:
    """The symmetric KL of each row, by its definition."""
    return ((a.softmax(-1) - b.softmax(-1)) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def check(
    a: Any, b: Any, batch: dict[str, Tensor], expected: Tensor, model: nn.Module = PLAIN, kind: str = "auto"
) -> None:
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    divergence = choose_divergence(kind, a, batch, model)
    torch.testing.assert_close(divergence(a, b), expected, rtol=1e-9, atol=1e-15)
    for num_items in (7, torch.tensor(7.0)):  # its sum, over seven
        other = choose_divergence(kind, a, batch, model, num_items)
        torch.testing.assert_close(other(a, b), expected * divergence.count(a) / 7, rtol=1e-9, atol=1e-15)
    # the cotangent is the gradient up to one positive factor
    leaves = [x.clone().requires_grad_() for x in a]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(divergence(tuple(leaves), b), leaves)])
    actual = torch.cat([g.flatten() for g in divergence.cotangent(a, b)]).to(exact.dtype)
    torch.testing.assert_close(actual / actual.norm(), exact / exact.norm(), rtol=0, atol=1e-9)


def test_classes() -> None:
    a, b = logits(4, 3), logits(4, 3)
    check(a, b, {"labels": torch.tensor([0, 1, 2, -100])}, rows(a, b).mean())  # R_s needs no label
    check(a, b, {}, rows(a, b).mean())


@pytest.mark.parametrize("kind", reference.KINDS)
def test_every_kind(kind: str) -> None:
    a, b = logits(4, 3), logits(4, 3)
    check(a, b, {}, divergence_of(a, b, kind, reduction="mean"), kind=kind)
    start = logits(4, 3), logits(4, 3)
    end = logits(4, 3), logits(4, 3)
    of_both = (divergence_of(*start, kind, reduction="mean") + divergence_of(*end, kind, reduction="mean")) / 2
    check((start[0], end[0]), (start[1], end[1]), {}, of_both, kind=kind)
    a, b = logits(2, 4, 3), logits(2, 4, 3)
    labels = torch.tensor([[0, 1, -100, 2], [-100, 1, -100, -100]])
    counted = divergence_of(a, b, kind, reduction="none")[labels != -100]
    check(a, b, {"labels": labels, "attention_mask": torch.ones(2, 4)}, counted.mean(), kind=kind)
    for other in ("predicted", "fisher"):  # the clean pass alone tells, so whichever divergence is meant
        found = [
            getattr(choose_divergence(k, (a,), {}, PLAIN), other)(
                (a,), *([torch.Generator().manual_seed(0)] if other == "fisher" else [])
            )
            for k in (kind, "symmetric_kl")
        ]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_numbers() -> None:
    for shape in ((4, 1), (4,)):
        a, b = logits(*shape), logits(*shape)
        check(a, b, {"labels": logits(4)}, (a - b).square().mean())
    a, b = logits(4, 3), logits(4, 3)
    check(a, b, {"labels": logits(4, 3)}, (a - b).square().mean(), kind="squared_error")


def test_tokens_that_have_a_label() -> None:
    a, b = logits(2, 4, 3), logits(2, 4, 3)
    labels = torch.tensor([[0, 1, -100, 2], [-100, 1, -100, -100]])
    batch = {"labels": labels, "attention_mask": torch.ones(2, 4)}
    for model in (PLAIN, transformers.BertForMaskedLM(BERT), transformers.T5ForConditionalGeneration(T5)):
        check(a, b, batch, rows(a, b)[labels != -100].mean(), model)


def test_tokens_whose_next_one_has_a_label() -> None:
    a, b = logits(2, 4, 7), logits(2, 4, 7)
    labels = torch.tensor([[0, 1, -100, 2], [-100, 1, -100, -100]])
    counted = rows(a, b)[:, :-1][labels[:, 1:] != -100]
    assert len(counted) == 3
    model = transformers.GPT2LMHeadModel(GPT2)
    assert choose_divergence("auto", (a,), {"labels": labels}, model).count((a,)) == 3
    check(a, b, {"labels": labels}, counted.mean(), model)


def test_tokens_whose_logits_are_flattened() -> None:
    """As a loss takes them: all, or those that have a next one."""
    a, b = logits(3, 5, 7), logits(3, 5, 7)
    labels = torch.randint(7, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, -100)
    labels[:, 1] = 1
    each, flat = rows(a, b), [x.flatten(0, 1) for x in (a, b)]
    check(*flat, {"labels": labels}, each[labels != -100].mean(), nn.Identity())
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    check(*flat, {"attention_mask": mask}, each[mask > 0].mean(), nn.Identity())
    gpt2, following = transformers.GPT2LMHeadModel(GPT2), each[:, :-1][labels[:, 1:] != -100].mean()
    check(*flat, {"labels": labels}, following, gpt2)
    check(*(x[:, :-1].flatten(0, 1) for x in (a, b)), {"labels": labels}, following, gpt2)
    # what only looks like it: examples with two words each, or a label for each class
    check(a[:, 0], b[:, 0], {"attention_mask": torch.tensor([[1, 0]] * 3)}, each[:, 0].mean())
    labels = {"labels": torch.zeros(3, 7, dtype=torch.long)}
    check(a[:, 0], b[:, 0], labels, each[:, 0].mean(), kind="symmetric_kl")


def test_tokens_without_labels_are_those_that_are_no_padding() -> None:
    a, b = logits(2, 4, 3), logits(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    check(a, b, {"attention_mask": mask}, rows(a, b)[mask == 1].mean())
    check(a, b, {}, rows(a, b).mean())


def test_spans() -> None:
    a, b = (logits(2, 4), logits(2, 4)), (logits(2, 4), logits(2, 4))
    check(a, b, {}, (rows(a[0], b[0]).mean() + rows(a[1], b[1]).mean()) / 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    parts = [(rows(x[:1], y[:1]) + rows(x[1:, :2], y[1:, :2])).sum() / 2 for x, y in zip(a, b, strict=True)]
    check(a, b, {"attention_mask": mask}, (parts[0] + parts[1]) / 2)
    assert Classes(absent=mask == 0).count(a) == 2
    for cotangent in Classes(absent=mask == 0).predicted(a):
        assert (cotangent[mask == 0] == 0).all()


def test_a_callable_gets_logits_and_batch() -> None:
    batch = {"weights": torch.tensor([1.0, 2.0], dtype=torch.float64)}

    def weighted(input: Tensor, target: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return ((input - target).square().sum(1) * batch["weights"]).sum()

    a, b = (logits(2, 3),), (logits(2, 3),)
    divergence = choose_divergence(weighted, a, batch, PLAIN)
    assert isinstance(divergence, Custom)
    torch.testing.assert_close(divergence(a, b), weighted(a[0], b[0], batch))
    of_five = choose_divergence(weighted, a, batch, PLAIN, 5)
    torch.testing.assert_close(of_five(a, b), weighted(a[0], b[0], batch) * 2 / 5)
    (cotangent,) = divergence.cotangent(a, b)
    torch.testing.assert_close(cotangent, 2 * (a[0] - b[0]) * batch["weights"][:, None])
    torch.testing.assert_close(divergence.predicted(a), Classes().predicted(a))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    torch.testing.assert_close(divergence.fisher(a, generators[0]), Classes().fisher(a, generators[1]))
    with pytest.raises(ValueError, match=r"divergence: the callable returned shape \(2,\), expected a scalar"):
        choose_divergence(lambda input, target, batch: input[:, 0], a, batch, PLAIN)(a, b)
    with pytest.raises(ValueError, match="divergence: the callable returned float"):
        choose_divergence(lambda input, target, batch: 1.0, a, batch, PLAIN)(a, b)


def test_a_count_is_not_rounded_to_the_dtype_of_a_callable() -> None:
    """As in autocast: 70 000 is infinite in float16, and 1001 is 1000 in bfloat16."""
    a = (logits(1001, 3).bfloat16(),)
    for dtype, items in ((torch.float16, 70000.0), (torch.bfloat16, 1001.0)):
        half = torch.tensor(0.5, dtype=dtype)
        chosen = choose_divergence(lambda p, q, batch, half=half: half, a, {}, PLAIN, torch.tensor(items))
        assert chosen(a, a).item() == pytest.approx(0.5 * 1001 / items, rel=1e-6)


def test_a_batch_in_which_nothing_counts_adds_nothing_to_the_others() -> None:
    """Its own mean is 0, and so is its share of a sum over several batches."""
    a, b = (logits(2, 4, 3),), (logits(2, 4, 3),)
    batch = {"labels": torch.full((2, 4), -100)}
    assert choose_divergence("auto", a, batch, PLAIN)(a, b) == 0
    assert choose_divergence("auto", a, batch, PLAIN, 5)(a, b) == 0


def test_classes_before_tokens_are_told() -> None:
    """As torch's losses take them; the divergence would be one over positions."""
    for classes in (3, 9):
        with pytest.warns(UserWarning, match=r"divergence: .* as if classes came before tokens"):
            choose_divergence("auto", (logits(2, classes, 5),), {"labels": torch.ones(2, 5, dtype=torch.long)}, PLAIN)


def test_does_not_guess() -> None:
    with pytest.raises(ValueError, match="divergence: got 'auto' with real-valued labels"):
        choose_divergence("auto", (logits(4, 3),), {"labels": logits(4, 3)}, PLAIN)
    for shapes in ([(2, 3, 4, 5)], [(2, 3)] * 3):
        with pytest.raises(ValueError, match="divergence: got 'auto' with logits of shape"):
            choose_divergence("auto", tuple(logits(*shape) for shape in shapes), {}, PLAIN)
    assert isinstance(choose_divergence("symmetric_kl", (logits(4, 3),), {"labels": logits(4, 3)}, PLAIN), Classes)
    assert isinstance(choose_divergence("squared_error", (logits(4, 3),), {}, PLAIN), SquaredError)

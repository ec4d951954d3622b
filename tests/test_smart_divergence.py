"""Which divergence a batch gets, what it counts, and what it refuses to guess."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from smart_kernels import Smart, SmartConfig, reference
from smart_kernels import divergence as divergence_of
from smart_kernels.smart import objective
from smart_kernels.smart.divergence import Classes, Custom, SquaredError, choose_divergence
from smart_kernels.smart.embedding import find_embedding
from smart_kernels.smart.passes import run_model

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
    for dtype in (torch.int64, torch.bool):  # several classes at once, or two for each token
        with pytest.raises(ValueError, match="divergence: got 'auto' with labels of the logits' shape"):
            choose_divergence("auto", (logits(4, 3),), {"labels": torch.ones(4, 3, dtype=dtype)}, PLAIN)
    for shapes in ([(2, 3, 4, 5)], [(2, 3)] * 3):
        with pytest.raises(ValueError, match="divergence: got 'auto' with logits of shape"):
            choose_divergence("auto", tuple(logits(*shape) for shape in shapes), {}, PLAIN)
    assert isinstance(choose_divergence("symmetric_kl", (logits(4, 3),), {"labels": logits(4, 3)}, PLAIN), Classes)
    assert isinstance(choose_divergence("squared_error", (logits(4, 3),), {}, PLAIN), SquaredError)


# ------------------------------------------------------------------------------------------------------- several heads


def test_several_heads_that_are_no_span_are_refused() -> None:
    """Their rows are not one set: tokens and samples, or tokens of which padding would count; a number is no class."""
    for shapes in (
        [(4, 6, 3), (4, 6, 5)],
        [(4, 5), (4, 6, 3)],
        [(4, 3), (4, 1)],
        [(4, 1), (4, 1)],
        [(4,), (4,)],
        [(4, 3), (5, 3)],
    ):
        for kind in ("auto", "kl"):
            with pytest.raises(ValueError, match=r"got '(auto|kl)' with logits of shape .*; for others, a callable"):
                choose_divergence(kind, tuple(logits(*shape) for shape in shapes), {}, PLAIN)


def test_padding_is_no_candidate_where_the_models_arguments_tell_it() -> None:
    a, b = (logits(2, 4), logits(2, 4)), (logits(2, 4), logits(2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    by_batch = choose_divergence("auto", a, {"attention_mask": mask}, PLAIN)
    by_call = choose_divergence("auto", a, (mask,), PLAIN, arguments={"attention_mask": mask})
    assert by_call(a, b) == by_batch(a, b) != choose_divergence("auto", a, (mask,), PLAIN)(a, b)


def test_two_heads_of_classes() -> None:
    a, b = (logits(4, 3), logits(4, 5)), (logits(4, 3), logits(4, 5))
    check(a, b, {"attention_mask": torch.ones(4, 3)}, (rows(a[0], b[0]).mean() + rows(a[1], b[1]).mean()) / 2)


def test_a_callable_for_several_heads_has_directions_for_each() -> None:
    """Where the adversary asks for the clean pass's own cotangents: of samples, tokens that count, and numbers."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    heads = logits(2, 4), logits(2, 3, 5), logits(2, 1)
    divergence = choose_divergence(lambda p, q, batch: p[0].sum() * 0, heads, {"attention_mask": mask}, PLAIN)
    first, second, third = divergence.predicted(heads)
    onehot = [F.one_hot(x.argmax(-1), x.shape[-1]) for x in heads]
    torch.testing.assert_close(first, heads[0].softmax(-1) - onehot[0])
    torch.testing.assert_close(second, (heads[1].softmax(-1) - onehot[1]) * mask.unsqueeze(-1))
    assert torch.equal(third, torch.ones_like(third))
    assert float(divergence.count(heads)) == pytest.approx((2 + 4 + 2) / 3)
    assert [x.shape for x in divergence.fisher(heads, torch.Generator().manual_seed(0))] == [x.shape for x in heads]


def test_a_number_for_each_token() -> None:
    a, b = logits(2, 4, 1), logits(2, 4, 1)
    squares = (a - b).square().squeeze(-1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = logits(2, 4).masked_fill(torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]]) > 0, -100)
    for kind in ("auto", "squared_error"):
        check(a, b, {}, squares.mean(), kind=kind)
        check(a, b, {"attention_mask": mask}, squares[mask > 0].mean(), kind=kind)
        check(a, b, {"labels": labels, "attention_mask": mask}, squares[labels != -100].mean(), kind=kind)
        nothing = choose_divergence(kind, (a,), {"attention_mask": mask * 0}, PLAIN)
        assert nothing((a,), (b,)) == 0
    chosen = choose_divergence("auto", (a,), {"attention_mask": mask}, PLAIN)
    assert torch.equal(chosen.predicted((a,))[0].squeeze(-1), mask.double())
    assert choose_divergence("auto", (a,), {}, PLAIN).count((a,)) == 8


# --------------------------------------------------------------------------------------- which rows the task loss takes

V = 30
IDS = torch.randint(3, V, (3, 7), generator=torch.Generator().manual_seed(0))
SEEN = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
TAGS = (IDS % 4).masked_fill(SEEN == 0, -100).index_fill(1, torch.tensor([2]), -100)
SOME = IDS.masked_fill(torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) > 0.4, -100)
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
STACKS = {"d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1} | {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
}
Program = tuple[nn.Module, Callable[..., Any], Any, Tensor]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=V, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def tagger() -> nn.Module:
    return transformers.BertForTokenClassification(transformers.BertConfig(vocab_size=V, num_labels=4, **TINY))


def loss_of(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def before(labels: Tensor) -> Tensor:
    """The rows whose next word has a label."""
    return F.pad(labels[:, 1:] != -100, (0, 1))


def tags_in_a_tuple() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        out = model(batch[0], attention_mask=batch[1], labels=batch[2])
        return out.loss, out.logits

    return tagger(), forward, (IDS, SEEN, TAGS), TAGS != -100


def labels_of_another_name() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        out = model(batch["ids"], attention_mask=batch["mask"], labels=batch["tags"])
        return out.loss, out.logits

    return tagger(), forward, {"ids": IDS, "mask": SEEN, "tags": TAGS}, TAGS != -100


def labels_by_a_loss_of_ones_own() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        logits = model(batch["ids"], batch["mask"]).logits
        return loss_of(logits, batch["inner"]["tags"]), logits

    return tagger(), forward, {"ids": IDS, "mask": SEEN, "inner": {"tags": TAGS}}, TAGS != -100


def another_label_for_padding() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        logits = model(batch["ids"], batch["mask"]).logits
        return loss_of(logits, batch["tags"], ignore_index=9), logits

    return tagger(), forward, {"ids": IDS, "mask": SEEN, "tags": TAGS.clamp(min=-1) % 10}, TAGS != -100


def weights_for_tokens() -> Program:
    weights = (TAGS != -100).double()

    def forward(model: Any, batch: Any) -> Any:
        logits = model(batch["ids"], batch["mask"]).logits
        each = loss_of(logits, batch["tags"], reduction="none").view(3, 7)
        return (each * batch["weights"]).sum() / batch["weights"].sum(), logits

    return tagger(), forward, {"ids": IDS, "mask": SEEN, "tags": IDS % 4, "weights": weights}, TAGS != -100


def logits_cast_behind_the_loss() -> Program:
    """As a trainer's wrapper does it: the loss does not depend on what is returned, but on what that is made of."""

    def forward(model: Any, batch: Any) -> Any:
        out = model(batch[0], attention_mask=batch[1], labels=batch[2])
        return out.loss, out.logits.float().double()

    return tagger(), forward, (IDS, SEEN, TAGS), TAGS != -100


def whisper() -> Program:
    config = transformers.WhisperConfig(
        vocab_size=V, num_mel_bins=8, max_source_positions=20, max_target_positions=20, **STACKS
    )
    batch = {"input_features": torch.randn(3, 8, 40).double(), "labels": TAGS}
    return transformers.WhisperForConditionalGeneration(config), run_model, batch, TAGS != -100


def vision_encoder_decoder() -> Program:
    encoder = transformers.ViTConfig(image_size=8, patch_size=4, **TINY)
    decoder = transformers.BertConfig(vocab_size=V, is_decoder=True, add_cross_attention=True, **TINY)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    batch = {"pixel_values": torch.randn(3, 3, 8, 8).double(), "labels": TAGS}
    return transformers.VisionEncoderDecoderModel(both), run_model, batch, TAGS != -100


def xlm() -> Program:
    config = transformers.XLMConfig(vocab_size=V, emb_dim=16, n_layers=1, n_heads=2, n_langs=1, pad_index=0)
    batch = {"input_ids": IDS, "attention_mask": SEEN, "labels": SOME}
    return transformers.XLMWithLMHeadModel(config), run_model, batch, SOME != -100


def xlnet() -> Program:
    config = transformers.XLNetConfig(vocab_size=V, d_model=16, n_layer=1, n_head=2, d_inner=16)
    batch = {"input_ids": IDS, "attention_mask": SEEN, "labels": SOME}
    return transformers.XLNetLMHeadModel(config), run_model, batch, SOME != -100


def decoder_of_bart() -> Program:
    config = transformers.BartConfig(vocab_size=V, max_position_embeddings=32, **STACKS)
    batch = {"input_ids": IDS, "attention_mask": SEEN, "labels": SOME}
    return transformers.BartForCausalLM(config), run_model, batch, SOME != -100


def next_words() -> Program:
    return gpt2(), run_model, {"input_ids": IDS, "attention_mask": SEEN, "labels": SOME}, before(SOME)


def labels_shifted_by_the_data() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"]).logits
        return loss_of(logits, batch["labels"]), logits

    return gpt2(), forward, {"input_ids": IDS, "labels": SOME}, SOME != -100


def fewer_labels_than_rows() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"]).logits
        return loss_of(logits[:, :-1], batch["labels"]), logits

    return gpt2(), forward, {"input_ids": IDS, "labels": SOME[:, 1:]}, before(SOME)


def logits_without_the_last() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return loss_of(logits, batch["labels"][:, 1:]), logits

    return gpt2(), forward, {"input_ids": IDS, "attention_mask": SEEN, "labels": SOME}, SOME[:, 1:] != -100


def flattened_tags_on_a_causal_model() -> Program:
    def forward(model: Any, batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten()), logits

    return gpt2(), forward, {"input_ids": IDS, "attention_mask": SEEN, "labels": TAGS}, (TAGS != -100).flatten()


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.said, self.out = nn.Embedding(V, 8), nn.Embedding(V, 8), nn.Linear(8, V)
        self.reads, self.says = nn.GRU(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(self.says(self.said(target), self.reads(self.words(source))[1])[0])


def translation(length: int, padded: bool) -> Program:
    target = torch.randint(3, V, (3, length))
    if padded:
        target[0, 2:] = target[1, 4:] = 0

    def forward(model: Any, batch: Any) -> Any:
        logits = model(batch["input_ids"], batch["target"])
        return loss_of(logits, batch["target"], ignore_index=0), logits

    return Translator(), forward, {"input_ids": IDS, "attention_mask": SEEN, "target": target}, target != 0


def speech() -> Program:
    config = transformers.Wav2Vec2Config(
        vocab_size=V, conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(4, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0,
        ctc_zero_infinity=True, **TINY,
    )  # fmt: skip
    heard = torch.ones(2, 160, dtype=torch.long)
    heard[0, 80:] = 0
    said = torch.tensor([[3, 4, -100], [5, 6, 7]])
    batch = {"input_values": torch.randn(2, 160).double(), "attention_mask": heard, "labels": said}
    frames = torch.arange(10) < torch.tensor([[5], [10]])
    return transformers.Wav2Vec2ForCTC(config), run_model, batch, frames


PROGRAMS: dict[str, Callable[[], Program]] = {
    made.__name__: made
    for made in (
        tags_in_a_tuple, labels_of_another_name, labels_by_a_loss_of_ones_own, another_label_for_padding,
        weights_for_tokens, logits_cast_behind_the_loss, whisper, vision_encoder_decoder, xlm, xlnet, decoder_of_bart,
        next_words, labels_shifted_by_the_data, fewer_labels_than_rows, logits_without_the_last,
        flattened_tags_on_a_causal_model, speech,
    )
}  # fmt: skip
PROGRAMS |= {
    f"translation to {n} words{', padded' if padded else ''}": lambda n=n, padded=padded: translation(n, padded)
    for n in (5, 7, 9)
    for padded in (False, True)
}
WORDS = {"Translator": "words", "WhisperForConditionalGeneration": "model.decoder.embed_tokens"}
WORDS["Wav2Vec2ForCTC"] = "wav2vec2.feature_projection.projection"
WORDS["VisionEncoderDecoderModel"] = "decoder.bert.embeddings.word_embeddings"


def expected_smoothness(model: nn.Module, forward: Any, batch: Any, delta: Tensor, counted: Tensor) -> Tensor:
    """The mean over the rows that count, by two passes of the model."""
    with torch.no_grad():
        _, clean = forward(model, batch)
        hook = find_embedding(model, WORDS.get(type(model).__name__)).register_forward_hook(lambda _m, _a, x: x + delta)
        _, moved = forward(model, batch)
        hook.remove()
    return rows(moved, clean)[counted].mean()


@pytest.mark.parametrize("way", ["call", "backward"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_rows_that_the_task_loss_takes_count(program: str, way: str) -> None:
    torch.manual_seed(0)
    model, forward, batch, counted = PROGRAMS[program]()
    model.double().eval()
    config = SmartConfig(epsilon=0.1, noise_std=0.1, mu=0.0, adversary="random")
    smart = Smart(model, config, forward=forward, embedding=WORDS.get(type(model).__name__))
    for _ in range(2):  # the second step asks nothing
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = smart(batch) if way == "call" else smart.backward(batch)
        assert way == "backward" or all(p.grad is None for p in model.parameters())
        expected = expected_smoothness(model, forward, batch, out.perturbation, counted)
        torch.testing.assert_close(out.smoothness, expected, rtol=1e-5 if "cast" in program else 1e-7, atol=0)


def counts_of(monkeypatch: pytest.MonkeyPatch, smart: Smart, batches: list[Any]) -> tuple[list[int], int]:
    """How many rows count in each batch, and how often the loss was asked."""
    counts, asked = [], 0
    ask, choose = objective.reached_rows, objective.choose_divergence

    def asking(clean: Any) -> Any:
        nonlocal asked
        asked += 1
        return ask(clean)

    def choosing(*args: Any) -> Any:
        chosen = choose(*args)
        counts.append(int(chosen.count(args[1])))
        return chosen

    with monkeypatch.context() as patch:
        patch.setattr(objective, "reached_rows", asking)
        patch.setattr(objective, "choose_divergence", choosing)
        for batch in batches:
            smart(batch)
    return counts, asked


CONFIG = SmartConfig(epsilon=0.1, noise_std=0.1, mu=0.0, adversary="random")


def test_the_rule_is_kept_for_later_batches_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the rule, and not the rows; a longer batch is of the same kind."""
    model, forward, batch, _ = xlm()
    longer = {n: torch.cat([x, x], 1) for n, x in batch.items()}
    other = {**batch, "labels": IDS.index_fill(1, torch.tensor([0, 3]), -100)}
    smart = Smart(model, CONFIG, forward=forward)
    counts, asked = counts_of(monkeypatch, smart, [batch, other, longer])
    assert counts == [int((x != -100).sum()) for x in (SOME, other["labels"], longer["labels"])]
    assert asked == 1


def test_the_loss_is_asked_again_while_a_batch_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is padded, a mask of the source says the same as the targets; and not for ever."""
    model, forward, padded, counted = translation(7, True)
    whole = {**padded, "attention_mask": SEEN | 1, "target": IDS}
    counts, _ = counts_of(monkeypatch, Smart(model, CONFIG, forward=forward, embedding="words"), [whole, padded])
    assert counts == [21, int(counted.sum())]
    smart = Smart(model, CONFIG, forward=forward, embedding="words")
    _, asked = counts_of(monkeypatch, smart, [whole] * 12)
    assert 1 < asked < 12


def test_what_is_no_plain_tensor_tells_nothing() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    batch = {"ragged": ragged, "sparse": torch.eye(2).to_sparse()}
    a, b = logits(2, 4, 3), logits(2, 4, 3)
    check(a, b, batch, rows(a, b).mean())


def test_a_loss_that_takes_rows_by_nothing_that_is_known_warns_once() -> None:
    def forward(model: Any, batch: Any) -> Any:
        logits = model(batch["ids"], batch["mask"]).logits
        return loss_of(logits, TAGS), logits  # labels from elsewhere

    smart = Smart(tagger(), CONFIG, forward=forward)
    batch = {"ids": IDS, "mask": SEEN}
    with pytest.warns(UserWarning, match="reaches 13 of 21 rows of the logits, and the terms count 16") as told:
        smart(batch)
    assert any("rows of the logits" in str(x.message) and x.filename == __file__ for x in told)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        smart(batch)


def test_a_prediction_that_is_sure_counts_though_its_gradient_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = torch.zeros(3, 7, dtype=torch.bool).index_put((torch.tensor(2), torch.tensor([3, 4])), torch.tensor(True))

    def forward(model: Any, batch: Any) -> Any:
        logits = model(batch["ids"], batch["attention_mask"]).logits
        logits = torch.where(sure.unsqueeze(-1), 1e3 * F.one_hot(TAGS.clamp(min=0), 4) + 0 * logits, logits)
        return loss_of(logits, batch["labels"]), logits

    smart = Smart(tagger(), CONFIG, forward=forward)
    batch = {"ids": IDS, "attention_mask": SEEN, "labels": TAGS}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        counts, asked = counts_of(monkeypatch, smart, [batch] * 2)
    assert counts == [13, 13]
    assert asked == 1


@pytest.mark.parametrize("program", ["tags_in_a_tuple", "labels_of_another_name", "whisper", "vision_encoder_decoder"])
def test_names_tell_where_the_loss_is_not_asked(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With check=False: the labels among the arguments of the model's call, and those of a decoder."""
    model, forward, batch, counted = PROGRAMS[program]()
    config = SmartConfig(epsilon=0.1, noise_std=0.1, mu=0.0, adversary="random", check=False)
    smart = Smart(model.double(), config, forward=forward, embedding=WORDS.get(type(model).__name__))
    assert counts_of(monkeypatch, smart, [batch]) == ([int(counted.sum())], 0)


def test_a_mask_of_the_encoder_says_nothing_of_a_longer_target() -> None:
    """It is not padded, as if the first rows were those of virtual tokens: there are words for all rows."""
    a, b = logits(3, 9, V), logits(3, 9, V)
    batch = {"input_ids": IDS, "attention_mask": SEEN, "said": torch.ones(3, 9, dtype=torch.long)}
    check(a, b, batch, rows(a, b).mean())
    a, b = a[:, :7], b[:, :7]
    batch |= {"said": batch["said"][:, :7], "decoder_input_ids": batch["said"][:, :7]}
    check(a, b, batch, rows(a, b).mean())
    check(a, b, {**batch, "decoder_attention_mask": 1 - SEEN}, rows(a, b)[SEEN == 0].mean())


def test_to_ask_leaves_no_trace() -> None:
    """Neither gradients, nor other numbers; a gradient that the logits have kept stays."""
    kept: list[Tensor] = []

    def forward(model: Any, batch: Any) -> Any:
        out = model(**batch)
        out.logits.retain_grad()
        kept.append(out.logits)
        return out.loss, out.logits

    results = []
    for checks in (True, False):
        torch.manual_seed(0)
        model, _, batch, _ = next_words()
        smart = Smart(model, SmartConfig(epsilon=1e-2, noise_std=1e-2, decay_late=0.99, check=checks), forward=forward)
        out = smart(batch)
        assert kept[-1].grad is None
        assert all(p.grad is None for p in model.parameters())
        out.loss.backward()
        results.append([out.loss.detach(), out.smoothness, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class Once(torch.autograd.Function):
    """A mean of cross entropies that writes the gradient over what it has saved, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(labels)), labels] -= 1
        ctx.gradient = gradient / len(labels)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.mul_(grad_output), None


def test_a_loss_that_goes_back_once_is_not_asked() -> None:
    """Its gradients would be those of the question from then on."""

    def forward(model: Any, batch: Any) -> Any:
        logits = model(batch["ids"], batch["attention_mask"]).logits
        return Once.apply(logits.flatten(0, 1), TAGS.clamp(min=0).flatten()), logits

    torch.manual_seed(0)
    model = tagger()
    batch = {"ids": IDS, "attention_mask": SEEN, "labels": TAGS}
    torch.manual_seed(1)  # of dropout
    forward(model, batch)[0].backward()
    expected = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    smart = Smart(model, SmartConfig(lambda_s=1e-20, mu=0.0, epsilon=1e-2, noise_std=1e-2), forward=forward)
    torch.manual_seed(1)
    smart(batch).loss.backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-12)

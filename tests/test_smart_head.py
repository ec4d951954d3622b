"""The head of a language model and the divergence in one: the unfused loop's gradients, without the logits."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from harness import peak_bytes
from smart_kernels import Smart, SmartConfig
from smart_kernels.smart import head as head_module
from smart_kernels.smart.objective import SmartOutput

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

V, B, L = 41, 3, 7
BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05, "step_size": 0.15, "lambda_s": 3.0}
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DECODER = {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"vocab_size": V, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
T5 = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BART = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"head_dim": 8, "final_logit_softcapping": 0.5}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", DECODER | {"logits_scaling": 3.0}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "t5": ("T5ForConditionalGeneration", "T5Config", SEQ2SEQ | T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ | BART | {"bos_token_id": 1}),
}
NORMS = ("LlamaRMSNorm", "T5LayerNorm")
WAYS: dict[str, dict[str, Any]] = {
    "power": {},
    "no teacher": {"mu": 0.0},
    "teacher alone": {"lambda_s": 0.0},
    "power, lean": {"memory": "lean"},
    "power, detached": {"detach_clean": True},
    "predicted": {"adversary": "predicted"},
    "predicted, lean": {"adversary": "predicted", "memory": "lean"},
    "predicted, l2": {"adversary": "predicted", "norm": "l2", "scope": "token"},
    "task, detached": {"adversary": "task", "detach_clean": True},
    "random": {"adversary": "random"},
    "kl": {"divergence": "kl"},
    "js, detached, lean": {"divergence": "js", "detach_clean": True, "memory": "lean"},
}


def build(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model in training whose arithmetic is of one dtype throughout: some norms compute in float32 by themselves."""
    torch.manual_seed(0)
    model, config, own = KINDS[kind]
    built = getattr(transformers, model)(getattr(transformers, config)(**own | options)).to(dtype).train()
    if dtype == torch.float64:
        for module in list(built.modules()):
            for name, part in module.named_children():
                if type(part).__name__ in NORMS:
                    setattr(module, name, nn.RMSNorm(16, 1e-6, dtype=dtype))
    for name, buffer in built.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_()
    return built


def draw(seed: int = 0, ignored: float = 0.4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, L), generator=g)
    labels = ids.masked_fill(torch.rand(B, L, generator=g) < ignored, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: nn.Module) -> Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads])


def trained(
    model: nn.Module, fuse: Any, backward: bool = True, batch: dict[str, Tensor] | None = None, **options: Any
) -> tuple[Tensor, SmartOutput]:
    """The gradients of the second step of a copy of a model, when the teacher is another than the student."""
    model = copy.deepcopy(model)
    call = {name: options.pop(name) for name in ("num_items",) if name in options}
    smart = Smart(model, SmartConfig(**BALL | options, fuse_head=fuse, decay=0.5, decay_late=0.5))
    smart.generator.manual_seed(1)
    for step in range(2):
        torch.manual_seed(step)  # of dropout
        model.zero_grad()
        if backward:
            out = smart.backward(draw(step) if batch is None else batch, **call)
        else:
            out = smart(draw(step) if batch is None else batch, **call)
            out.loss.backward()
        if step == 0:
            torch.optim.SGD(model.parameters(), lr=1.0).step()
            smart.update()
    return gradients(model), out


def check_equal(model: nn.Module, tolerance: float, **options: Any) -> None:
    got, out = trained(model, True, **options)
    expected, other = trained(model, False, **options)
    assert (got - expected).norm() <= tolerance * expected.norm()
    for name in ("task_loss", "smoothness", "proximal"):
        torch.testing.assert_close(getattr(out, name), getattr(other, name), rtol=1e-3, atol=1e-9, check_dtype=False)
    if options.get("backward", True):
        assert out.logits is None
    else:
        torch.testing.assert_close(out.logits, other.logits, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ the same gradients


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_gradients_are_those_of_logits(kind: str, way: str) -> None:
    """To what float64 leaves of sums in another order."""
    check_equal(build(kind), 1e-10, **WAYS[way])


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
@pytest.mark.parametrize("way", ["power", "power, lean", "predicted"])
def test_gradients_of_other_models(kind: str, way: str) -> None:
    check_equal(build(kind), 1e-10, **WAYS[way])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float32(kind: str) -> None:
    """The bar; with a cap (Gemma 2), a scale (Granite), a bias in a buffer (BART), a factor before the head (T5)."""
    check_equal(build(kind, torch.float32), 1e-5, backward=False)
    if kind in ("gemma2", "granite"):  # whose norms are in float32 in any case
        check_equal(build(kind), 1e-6, adversary="predicted", detach_clean=True)


def test_gradients_of_a_call() -> None:
    """Of all graphs at once."""
    for way in ("power", "predicted", "power, detached"):
        check_equal(build("gpt2"), 1e-10, backward=False, **WAYS[way])


def test_fisher_draws_for_the_rows_that_count() -> None:
    """So that it is the unfused one's draw where all of them do, in one chunk."""
    batch = draw(ignored=0.0)
    check_equal(build("bert"), 1e-10, batch=batch, adversary="fisher", norm="l2")
    got, out = trained(build("bert"), True, adversary="fisher")
    assert got.isfinite().all()
    assert out.smoothness > 0


def test_where_rows_are_weighted_instead_of_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, whose labels the host does not know."""
    expected, _ = trained(build("gpt2"), True)
    predicted, _ = trained(build("gpt2"), True, adversary="predicted")
    monkeypatch.setattr(head_module, "is_on_host", lambda x: False)
    for wanted, adversary in ((expected, "power"), (predicted, "predicted")):
        got, _ = trained(build("gpt2"), True, adversary=adversary)
        assert (got - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.parametrize("adversary", ["power", "predicted"])
def test_chunks_change_nothing(adversary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained(build("gpt2"), True, adversary=adversary)
    for place in (head_module, "smart_kernels.ops.linear_divergence"):
        target = place if isinstance(place, str) else place.__name__
        monkeypatch.setattr(f"{target}.CPU_BUDGET", 8 * V * 3 * 4)  # a few rows
    got, _ = trained(build("gpt2"), True, adversary=adversary)
    assert (got - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
def test_heads_with_and_without_a_bias(bias: bool, frozen: tuple[str, ...]) -> None:
    """What is trained of the head has a teacher's of its own."""
    torch.manual_seed(0)
    model = Small()
    model.head = nn.Linear(4, V, bias=bias)
    for name in frozen:
        if getattr(model.head, name) is not None:
            getattr(model.head, name).requires_grad_(False)
    for way in ("power", "power, lean", "power, detached"):
        check_equal(model.double(), 1e-10, **WAYS[way])


def test_accumulated_batches() -> None:
    check_equal(build("gpt2"), 1e-10, num_items=torch.tensor(29))


def test_a_batch_without_labels_that_count() -> None:
    batch = draw()
    batch["labels"][:] = -100
    batch["labels"][0, 0] = 5  # of a first token, which nothing predicts
    model = build("gpt2")
    smart = Smart(model, SmartConfig(**BALL, fuse_head=True, check=False), 10)
    out = smart.backward(batch, num_items=3)
    assert out.smoothness == 0
    assert out.proximal == 0


def test_tied_and_untied_heads() -> None:
    """A tied head's gradient comes from both ends, once each."""
    for tie in (True, False):
        model = build("gpt2", tie_word_embeddings=tie)
        assert (model.lm_head.weight is model.transformer.wte.weight) == tie
        check_equal(model, 1e-10)


def test_a_frozen_head_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is made: the teacher shares it, too."""
    model = build("gpt2", tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    asked: list[tuple[bool, ...]] = []
    of_checked = head_module.of_checked

    def watched(a: Tensor, b: Tensor, heads: Any, *rest: Any) -> Tensor:
        asked.append(tuple(x is not None and x.requires_grad for x in heads))
        assert heads[2] is None  # one head for both sides
        return of_checked(a, b, heads, *rest)

    monkeypatch.setattr(head_module, "of_checked", watched)
    check_equal(model, 1e-10)
    assert asked
    assert not any(any(x) for x in asked)


def test_checkpointed_layers() -> None:
    model = build("gpt2")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_equal(model, 1e-10)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft, which is not installed here")
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "lm_head"]])
def test_adapters(targets: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """In the model: the head is frozen, and part of the divergence. On the head: logits are compared, also where an
    adapter that begins at zero leaves them as they are."""
    import peft

    config = peft.LoraConfig(target_modules=targets, fan_in_fan_out=False, r=2)
    model = peft.get_peft_model(build("gpt2", tie_word_embeddings=False), config)
    on_head = "lm_head" in targets
    if not on_head:
        check_equal(model, 1e-10)
        return
    got, _ = trained(model, "auto")
    assert torch.equal(got, trained(model, False)[0])
    assert len(of_ours(caplog)) == 1
    assert "not a plain torch.nn.Linear" in caplog.text
    with pytest.raises(ValueError, match=r"fuse_head: got True, but the head is a Linear, not a plain"):
        trained(model, True)


# ------------------------------------------------------------------------------------------------ without logits


@pytest.mark.parametrize("way", ["power", "power, detached", "predicted", "predicted, lean", "random"])
def test_the_head_makes_the_models_own_logits_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the divergence takes no rows but those that count."""
    model, linear, calls, rows = build("bert"), nn.Linear.forward, [], []
    smart = Smart(model, SmartConfig(**BALL | WAYS[way], fuse_head=True), 10)
    batch = draw()
    smart.backward(batch)
    head = model.get_output_embeddings()

    def counted(module: nn.Linear, x: Tensor) -> Tensor:
        calls.extend([1] * (module is head))
        return linear(module, x)

    of_checked = head_module.of_checked

    def watched(a: Tensor, *rest: Any) -> Tensor:
        rows.append(len(a))
        return of_checked(a, *rest)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    monkeypatch.setattr(head_module, "of_checked", watched)
    smart.backward(batch)
    assert len(calls) == 1
    assert set(rows) == {int((batch["labels"] != -100).sum())}


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_memory_of_a_step(memory: str) -> None:
    """Beside logits for the task loss and their gradient there is little: one more set of logits would be a third."""
    model = build("gpt2", torch.float32, vocab_size=50257, n_embd=128, n_layer=2)
    ids = torch.randint(50257, (4, 128))
    batch = {"input_ids": ids, "labels": ids}
    smart = Smart(model, SmartConfig(fuse_head=True, memory=memory), 10)
    peaks = []
    for step in (lambda: model(**batch).loss.backward(), lambda: smart.backward(batch)):
        step()  # the first one checks
        model.zero_grad()
        peaks.append(peak_bytes(step))
        model.zero_grad()
    assert peaks[1] <= 1.15 * peaks[0]


def test_logits_are_kept_unless_their_absence_was_asked_for() -> None:
    model, batch = build("gpt2").eval(), draw()
    for how in ("auto", False):
        assert torch.equal(Smart(model, SmartConfig(fuse_head=how), 10).backward(batch).logits, model(**batch).logits)
    assert Smart(model, SmartConfig(fuse_head=True, check=False), 10).backward(batch).logits is None


def test_the_model_is_as_it_was() -> None:
    model = build("gpt2")
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    Smart(model, SmartConfig(**BALL, fuse_head=True), 10).backward(draw())
    for name, m in model.named_modules():
        assert vars(m).keys() == before[name].keys()
        assert not m._forward_hooks


def test_a_small_radius_keeps_its_digits() -> None:
    """R_s in float32 at a radius of 1e-4 is that in float64, where the logits' difference is their rounding."""
    found = {}
    for dtype, fuse in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        ball = {"epsilon": 1e-4, "noise_std": 1e-4, "step_size": 1e-2, "adversary": "predicted"}
        smart = Smart(build("gpt2", torch.float64).to(dtype).eval(), SmartConfig(**ball, mu=0.0, fuse_head=fuse))
        found[dtype, fuse] = smart(draw()).smoothness.item()
    truth, logits, fused = found.values()
    assert abs(fused - truth) <= 1e-2 * truth  # what the layers in front of the head have rounded is left
    assert abs(fused - truth) <= abs(logits - truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The head's surroundings are those of its own call; gradients are float32's to the dtype's rounding."""
    model = build("gpt2", torch.float32)

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype):
            out = model(**batch)
        return out.loss, out.logits

    results = []
    for run in ({"forward": forward}, {}):
        one = copy.deepcopy(model).eval()
        smart = Smart(one, SmartConfig(**BALL, adversary="predicted", norm="l2", fuse_head=True), 10, **run)
        out = smart.backward(draw())
        results.append((gradients(one), out.smoothness))
    (got, smoothness), (expected, truth) = results
    assert (got - expected).norm() <= 0.05 * expected.norm()  # 8 and 11 bits, through all layers of three passes
    assert abs(smoothness - truth) <= 0.1 * truth


# ------------------------------------------------------------------------------------------ where it cannot be


class Behind(nn.Module):
    """A model whose logits a function changes."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = build("gpt2"), change

    def get_output_embeddings(self) -> Any:
        return self.model.lm_head

    def get_input_embeddings(self) -> Any:
        return self.model.transformer.wte

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.change(self.model(input_ids, attention_mask=attention_mask).logits)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


class Small(nn.Module):
    """A head behind words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(V, 4), nn.Linear(4, V)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.words(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def of_ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the package has logged: libraries have something to say, too, once in a process."""
    return [record for record in caplog.records if record.name.startswith("smart_kernels")]


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "normalised": (lambda x: x.log_softmax(-1), "LogSoftmax comes behind the head"),
    "sliced": (lambda x: x[..., : V - 1].relu()[..., :20], "the logits have shape"),
    "a cap of a cap": (lambda x: torch.tanh(torch.tanh(x)), "Tanh comes behind the head"),
    "negative": (lambda x: -2.0 * x, "the logits are scaled by -2"),
    "a bias of no buffer": (lambda x: x + torch.linspace(0, 1, V, dtype=x.dtype), "does not give the logits"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_logits_are_compared_where_they_are_something_else(what: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = REFUSED[what]
    model = Behind(change)
    batch = draw()
    batch["labels"] = batch["labels"].clamp(max=19)
    got, _ = trained(model, "auto", batch=batch)
    assert torch.equal(got, trained(model, False, batch=batch)[0])
    (record,) = of_ours(caplog)
    assert record.levelno == logging.WARNING
    assert reason in caplog.text
    with pytest.raises(ValueError, match=f"fuse_head: got True, but .*{reason}.*expected 'auto'"):
        trained(model, True, batch=batch)


def test_scales_and_caps_of_any_model() -> None:
    """Read from what is called behind the head."""
    for change in (
        lambda x: x / 3.0,
        lambda x: 5 * torch.tanh(x * 0.5) / 2,
        lambda x: 0.25 * x.clone().view(B, -1, V),
    ):
        check_equal(Behind(change), 1e-10)
    check_equal(Behind(Tensor.float), 1e-5)  # float32's rounding of what is compared otherwise


def test_hooks_that_come_in_pairs_are_called_in_pairs(caplog: pytest.LogCaptureFixture) -> None:
    """As those of a timer: a pass that ends in front of the head would be entered and not left."""
    model, entered = build("gpt2"), []
    model.register_forward_pre_hook(lambda *_: entered.append(1))
    model.register_forward_hook(lambda *_: entered.pop() and None)
    with caplog.at_level(logging.WARNING):
        Smart(model, SmartConfig(**BALL), 10).backward(draw())
    assert not entered
    assert "around the head has hooks in front and behind" in caplog.text


def test_a_hook_that_changes_what_the_head_gives() -> None:
    model = build("gpt2")
    model.lm_head.register_forward_hook(lambda _m, _a, output: output.mul_(2))
    with pytest.raises(ValueError, match="does not give the logits"):
        trained(model, True)


@pytest.mark.parametrize("way", ["power", "power, lean", "predicted, lean"])
def test_a_hook_that_reads_what_the_head_gives_sees_logits_alone(way: str) -> None:
    """Those of the user's own pass, whose numbers it may keep or count."""
    model, seen = build("gpt2"), []
    model.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(output.size(-1)))
    check_equal(model, 1e-9, **WAYS[way])
    seen.clear()
    trained(model, True, check=False, **WAYS[way])
    assert set(seen) == {V}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"divergence": "squared_error"}, "the divergence is none of classes"),
        ({"divergence": lambda a, b, _batch: (a - b).square().mean()}, "the divergence is none of classes"),
    ],
)
def test_other_divergences(options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    trained(build("gpt2"), "auto", **options)
    assert reason in caplog.text
    with pytest.raises(ValueError, match=reason):
        trained(build("gpt2"), True, **options)


def test_a_head_alone_is_trained() -> None:
    """With constants in front of it: logits are compared."""
    model = build("gpt2", tie_word_embeddings=False)
    model.requires_grad_(False).lm_head.requires_grad_(True)
    got, _ = trained(model, "auto")
    assert torch.equal(got, trained(model, False)[0])
    with pytest.raises(ValueError, match="nothing in front of the head is trained"):
        trained(model, True)


def test_two_calls_of_a_model() -> None:
    model = build("gpt2")

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        first, second = model(**batch), model(**batch)
        return first.loss + second.loss, first.logits

    with pytest.raises(ValueError, match="the head is called 2 times in a pass, for 1 tensors of logits"):
        Smart(model, SmartConfig(**BALL, fuse_head=True), 10, forward=forward)(draw())


def test_a_compiled_model(caplog: pytest.LogCaptureFixture) -> None:
    model = Small().double()
    model.compile(backend="eager")
    Smart(model, SmartConfig(**BALL, decay_late=0.99)).backward(draw())
    assert "the model is compiled" in caplog.text
    torch.compiler.reset()


def test_no_head() -> None:
    """A classifier has none, which is nothing to speak of, unless it is asked for."""
    config = transformers.BertConfig(**SIZES)
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"fuse_head: got True, but the model has no.*get_output_embeddings"):
        Smart(model, SmartConfig(fuse_head=True), 10)


@pytest.mark.parametrize("wrong", ["always", None, 1])
def test_fuse_head_is_one_of_three(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"fuse_head: got .*expected 'auto', True or False"):
        SmartConfig(fuse_head=wrong)


def test_as_an_argument_of_a_command_line() -> None:
    pytest.importorskip("accelerate")
    from smart_kernels.integrations.transformers import SmartTrainingArguments

    parser = transformers.HfArgumentParser(SmartTrainingArguments)
    for text, expected in (("auto", "auto"), ("False", False), ("True", True)):
        (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--smart_fuse_head", text, "--use_cpu"])
        assert args.smart_config().fuse_head is expected or args.smart_config().fuse_head == expected

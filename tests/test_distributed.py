"""Several processes (gloo, on the CPU) against one on the joined batch."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from distributed_world import World
from smart_models import VOCABULARY, WIDTH, Encoder, Tagger, batch_for
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion as Version
from torch.utils.checkpoint import checkpoint

from smart_kernels import Smart, SmartConfig, ema_update_
from smart_kernels.smart.objective import SmartOutput
from smart_kernels.smart.parallel import Reduction, _parameter_groups, local, sharded_modules
from smart_kernels.smart.plan import splits
from smart_kernels.smart.teacher import Teacher


class Classifier(Encoder):
    """Gives a tuple, whose tensors a reducer finds, as it does in the outputs of Hugging Face models."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        return output.loss, output.logits


class Checkpointed(Classifier):
    """Runs everything behind the words again in the backward pass."""

    def from_embeddings(self, *args: Any) -> Any:
        return checkpoint(super().from_embeddings, *args, use_reentrant=False)


KINDS: dict[str, dict[str, Any]] = {
    "power": {"adversary": "power"},
    "predicted": {"adversary": "predicted"},
    "power, lean": {"adversary": "power", "memory": "lean"},
    "predicted, lean": {"adversary": "predicted", "memory": "lean"},
    "task, detached": {"adversary": "task", "detach_clean": True},
}
"""The last three have several backward passes on several processes, and one on the single process beside them."""
BALL: dict[str, Any] = {"epsilon": 0.1, "noise_std": 0.05, "step_size": 0.15}
STEPS, LR, LOCAL = 3, 0.1, 2
CLOSE = {"rtol": 0, "atol": 1e-6}  # fp32 gradients of size 0.01 to 1, summed in another order


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    started = World(request.param, tmp_path_factory.mktemp("world"))
    yield started
    started.close()


def wrap(model: Encoder, how: str) -> nn.Module:
    """The model for several processes: two rows of the head's are too few for three of them, and 20 words uneven."""
    if how.startswith("ddp"):
        options = {"ddp static": {"static_graph": True}, "ddp unused": {"find_unused_parameters": True}}
        return DistributedDataParallel(model, **options.get(how, {}))
    if how.startswith("fsdp nested"):
        for part in (model.words, model.norm, model.query_key_value):
            fully_shard(part)
    return fully_shard(model, reshard_after_forward=True if how == "fsdp" else None)


def whole(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if x is not None and hasattr(x, "full_tensor") else x


def bare_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def draw(step: int, samples: int) -> tuple[dict[str, Tensor], Tensor]:
    batch = batch_for(Encoder(2), samples, seed=step)
    return batch, 0.05 * torch.randn(samples, batch["input_ids"].shape[1], WIDTH)


def part(batch: dict[str, Tensor], noise: Tensor, chosen: slice) -> tuple[dict[str, Tensor], Tensor]:
    return {key: value[chosen] for key, value in batch.items()}, noise[chosen]


def start(how: str, **options: Any) -> tuple[nn.Module, Smart, Encoder, Smart]:
    """The same model for several processes and for one."""
    torch.manual_seed(0)
    model = (Checkpointed if how.endswith("checkpointed") else Classifier)(2)
    alone = copy.deepcopy(model)
    config = SmartConfig(**BALL, **options)
    wrapped = wrap(model, how)
    return wrapped, Smart(wrapped, config, 10), alone, Smart(alone, config, 10)


def backward(smart: Smart, batch: dict[str, Tensor], scale: float = 1.0, **options: Any) -> SmartOutput:
    if splits(smart.config, ahead=True):
        return smart.backward(batch, scale, **options)
    out = smart(batch, **options)
    (out.loss * scale).backward()
    return out


def check_step(model: nn.Module, smart: Smart, alone: Encoder, smart_alone: Smart) -> None:
    """Gradients, then parameters and teachers after the optimiser's step, are the same."""
    parameters = bare_names(model)
    assert parameters.keys() == dict(alone.named_parameters()).keys()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(whole(parameters[name].grad), p.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    for m, s in ((model, smart), (alone, smart_alone)):
        torch.optim.SGD(m.parameters(), lr=LR).step()
        s.update()
        m.zero_grad()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(whole(parameters[name].detach()), p.detach(), **CLOSE)
        torch.testing.assert_close(whole(smart.teacher.shadows[name]), smart_alone.teacher.shadows[name], **CLOSE)


# ------------------------------------------------------------------------------------------ equal to one process


def steps_equal(rank: int, size: int, how: str, kind: str) -> None:
    model, smart, alone, smart_alone = start(how, **KINDS[kind])
    calls: list[None] = []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    for step in range(STEPS):
        joined = draw(step, LOCAL * size)
        batch, noise = part(*joined, slice(rank * LOCAL, (rank + 1) * LOCAL))
        out = backward(smart, batch, initial_perturbation=noise)
        expected = smart_alone(joined[0], initial_perturbation=joined[1])
        expected.loss.backward()
        torch.testing.assert_close(out.perturbation, expected.perturbation[rank * LOCAL : (rank + 1) * LOCAL], **CLOSE)
        assert out.smoothness > 0
        assert (out.proximal > 0) == (step > 0)
        check_step(model, smart, alone, smart_alone)
    if how.startswith("ddp"):
        assert len(calls) == STEPS  # so that buffers are broadcast once


RECOMPUTED = pytest.param(
    "fsdp nested checkpointed",
    marks=pytest.mark.skipif(
        Version(torch.__version__) < Version("2.13"),
        reason="fully_shard of torch 2.10 does not gather again for a checkpointed module that two passes went through",
    ),
)


@pytest.mark.parametrize(
    "how", ["ddp", "ddp static", "ddp unused", "ddp checkpointed", "fsdp", "fsdp nested", RECOMPUTED]
)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_are_those_of_one_process(world: World, how: str, kind: str) -> None:
    world.run(steps_equal, how, kind)


# ------------------------------------------------------------------------------------------ a head without logits


class Language(nn.Module):
    """Predicts words by a head, which may be tied to their embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.words.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = 2 * torch.tanh(self.head(torch.tanh(self.mix(self.words(input_ids)))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Unshifted(Language):
    """Says that it predicts the next word, while its loss takes each word's own label."""

    def can_generate(self) -> bool:
        return True


def wrap_language(model: Language, how: str) -> nn.Module:
    if how.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=how == "ddp unused")
    for one in (model.mix, model.head) if how == "fsdp head" else (model.mix,) if how == "fsdp nested" else ():
        fully_shard(one)
    return fully_shard(model, reshard_after_forward=True if how == "fsdp" else None)


def language_steps_equal(
    rank: int, size: int, how: str, options: dict[str, Any], kind: type[Language] = Language
) -> None:
    """Three steps with the head in the divergence, on several processes, against one with logits."""
    model = kind(tied=how != "fsdp head").double()
    alone = Language(tied=how != "fsdp head").double()
    alone.load_state_dict(model.state_dict())
    wrapped = wrap_language(model, how)
    config = {**BALL, **options}
    smart = Smart(wrapped, SmartConfig(**config, fuse_head=True), 10)
    smart_alone = Smart(alone, SmartConfig(**config, fuse_head=False), 10)
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (LOCAL * size, 5), generator=g)
        labels = ids.clone()
        labels[:, 1 + step] = -100  # as many for each process
        noise = 0.05 * torch.randn(LOCAL * size, 5, WIDTH, generator=g)
        chosen = slice(rank * LOCAL, (rank + 1) * LOCAL)
        batch = {"input_ids": ids[chosen], "labels": labels[chosen]}
        out = backward(smart, batch, initial_perturbation=noise[chosen])
        expected = smart_alone({"input_ids": ids, "labels": labels}, initial_perturbation=noise)
        expected.loss.backward()
        assert out.smoothness > 0
        assert (out.proximal > 0) == (step > 0)
        check_step(wrapped, smart, alone, smart_alone)


@pytest.mark.parametrize("how", ["ddp", "ddp unused", "fsdp", "fsdp nested", "fsdp head"])
@pytest.mark.parametrize("kind", ["power", "predicted, lean", "task, detached"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_head_in_the_divergence_is_that_of_one_process(world: World, how: str, kind: str) -> None:
    world.run(language_steps_equal, how, KINDS[kind])


@pytest.mark.parametrize("how", ["ddp", "ddp unused"])
@pytest.mark.parametrize("kind", ["power", "predicted, lean"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_the_rows_that_the_loss_takes_are_those_of_one_process(world: World, how: str, kind: str) -> None:
    """To ask for them is not to begin the reducer's backward pass."""
    world.run(language_steps_equal, how, KINDS[kind], Unshifted)


# ---------------------------------------------------------------------------------- what is sent, and how often


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Bytes of each reduction of gradients: a bucket's by a reducer's hook, a group of shards' where it is sent."""
    sent: list[int] = []

    def hook(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    hook.__annotations__.clear()  # which torch would have as types, not as strings
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, hook)
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    send = getattr(dist, name)

    def scatter(output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        sent.append(input.nbytes)
        return send(output=output, input=input, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, name, scatter)
        yield sent


def accumulating(model: nn.Module, last: bool) -> Any:
    """Around a micro-batch: gradients are sent with the last one."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def bytes_sent(rank: int, size: int, how: str, options: dict[str, Any] | None, micro_batches: int) -> list[list[int]]:
    """Of two steps."""
    model, smart, *_ = start(how, **(options or {"lambda_s": 0.0, "mu": 0.0}))
    steps = []
    with counted(model) as sent:
        for step in range(2):
            for i in range(micro_batches):
                with accumulating(model, i == micro_batches - 1):
                    backward(smart, draw(step, LOCAL)[0])
            steps.append(list(sent))
            sent.clear()
            torch.optim.SGD(model.parameters(), lr=LR).step()
            smart.update()
            model.zero_grad()
    return steps


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp nested"])
def test_gradients_are_sent_once_a_step(world: World, how: str, micro_batches: int) -> None:
    (vanilla, *others) = world.run(bytes_sent, how, None, 1)
    assert all(other == vanilla for other in others)
    assert all(sum(step) > 0 for step in vanilla)
    for options in KINDS.values():
        for sent in world.run(bytes_sent, how, options, micro_batches):
            assert sent == vanilla, (sent, vanilla)


def bytes_of_language_sent(rank: int, size: int, how: str, options: dict[str, Any], batches: int) -> list[list[int]]:
    """Of two steps."""
    model = wrap_language(Language(tied=how != "fsdp head"), how)
    smart = Smart(model, SmartConfig(**BALL, **options), 10)
    words = {name: torch.randint(0, VOCABULARY, (LOCAL, 5)) for name in ("input_ids", "labels")}
    steps = []
    with counted(model) as sent:
        for _ in range(2):
            for i in range(batches):
                with accumulating(model, i == batches - 1):
                    backward(smart, words)
            steps.append(list(sent))
            sent.clear()
            smart.update()
            model.zero_grad()
    return steps


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp head"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_head_in_the_divergence_sends_its_gradient_once_a_step(world: World, how: str) -> None:
    (vanilla, _) = world.run(bytes_of_language_sent, how, {"lambda_s": 0.0, "mu": 0.0}, 1)
    ways = {"lambda_s": 0.0}, KINDS["power"], KINDS["predicted, lean"], KINDS["power, lean"], KINDS["task, detached"]
    for options in ways:
        for sent in world.run(bytes_of_language_sent, how, options | {"fuse_head": True}, 2):
            assert sent == vanilla, (options, sent, vanilla)


def holds_gradients_back_as_long_as_it_must(rank: int, size: int) -> None:
    modules = sharded_modules(wrap(Classifier(), "fsdp nested"))
    groups = _parameter_groups(modules)
    assert len(groups) == 4
    reduction = Reduction(modules)
    start = torch.ones(2, requires_grad=True)
    seen: list[set[bool]] = []

    def look(gradient: Tensor) -> None:
        seen.append({group.reduce_grads for group in groups})
        if gradient.isnan().any():
            raise KeyboardInterrupt

    def backward(factor: float) -> list[set[bool]]:
        first, last = 2 * start, 3 * start  # autograd comes to the last of them first
        reduction.after([last], [first])
        for x in (first, last):
            x.register_hook(look)
        seen.clear()
        (factor * (first + last).sum()).backward()
        look(start.detach())
        return seen

    assert backward(1.0) == [{False}, {True}, {True}]
    with pytest.raises(KeyboardInterrupt):
        backward(math.nan)
    assert backward(1.0) == [{False}, {True}, {True}]  # also after a backward pass that failed
    modules[0].set_requires_gradient_sync(False)
    assert backward(1.0) == [{False}, {False}, {False}]


def test_gradients_are_held_back_as_long_as_they_must(world: World) -> None:
    world.run(holds_gradients_back_as_long_as_it_must)


def micro_batches_equal(rank: int, size: int, how: str, kind: str) -> None:
    model, smart, alone, smart_alone = start(how, **KINDS[kind])
    for step in range(2):
        joined = draw(step, 4 * size)
        for i in range(4):
            chosen = slice(rank * 4 + i, rank * 4 + i + 1)
            with accumulating(model, i == 3):
                batch, noise = part(*joined, chosen)
                backward(smart, batch, 0.25, initial_perturbation=noise)
        smart_alone(joined[0], initial_perturbation=joined[1]).loss.backward()
        check_step(model, smart, alone, smart_alone)  # which moves either teacher once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp nested"])
def test_four_micro_batches_are_a_large_one(world: World, how: str, kind: str) -> None:
    world.run(micro_batches_equal, how, kind)


def uneven_counts_equal(rank: int, size: int, how: str, kind: str) -> None:
    """Ranks have 1, 4, 7 of the tokens that count, and the last micro-batch of the first rank none."""
    torch.manual_seed(0)
    model = Tagger()
    alone = copy.deepcopy(model)
    model = wrap(model, how)
    smart, smart_alone = (Smart(m, SmartConfig(**BALL, **KINDS[kind]), 10) for m in (model, alone))
    samples = 2 * size
    for _ in range(2):
        labels = torch.full((samples, 6), -100)
        for of_rank in range(size):
            labels[2 * of_rank, :] = torch.where(torch.arange(6) <= 3 * of_rank, 1, -100)
            labels[2 * of_rank + 1, : 3 * of_rank // 6] = 2
        joined = {"input_ids": torch.randint(0, VOCABULARY, (samples, 6)), "labels": labels}
        noise = 0.05 * torch.randn(samples, 6, WIDTH)
        smart_alone(joined, initial_perturbation=noise).loss.backward()

        own, own_noise = part(joined, noise, slice(2 * rank, 2 * rank + 2))
        num_items = (own["labels"] != -100).sum()
        dist.all_reduce(num_items)
        num_items = num_items / size  # gradients are averaged over processes, losses are to be summed
        for i in range(2):
            with accumulating(model, i == 1):
                batch, batch_noise = part(own, own_noise, slice(i, i + 1))
                batch["num_items_in_batch"] = num_items
                backward(smart, batch, initial_perturbation=batch_noise, num_items=num_items)
        check_step(model, smart, alone, smart_alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_with_different_counts_give_the_global_mean(world: World, how: str, kind: str) -> None:
    world.run(uneven_counts_equal, how, kind)


# ----------------------------------------------------------------------------------------------- noise and teacher


def draws(rank: int, size: int) -> list[list[float]]:
    """The noise of a first step, twice."""
    first = []
    for _ in range(2):
        torch.manual_seed(0)
        model = wrap(Classifier(), "ddp")
        out = Smart(model, SmartConfig(adversary="random", mu=0.0))(batch_for(Encoder(), LOCAL))
        assert out.perturbation is not None
        first.append(out.perturbation.flatten().tolist())
    return first


def test_each_rank_draws_noise_of_its_own_and_the_same_again(world: World) -> None:
    drawn = world.run(draws)
    assert all(first == again for first, again in drawn)
    assert len({tuple(first) for first, _ in drawn}) == world.size


def evaluates_the_teacher(rank: int, size: int, how: str) -> None:
    model, smart, *_ = start(how)
    batch, noise = draw(0, LOCAL)
    before = model(**batch)[1].detach()  # leaves the outermost parameters gathered
    assert smart.teacher is not None
    smart(batch, initial_perturbation=noise).loss.backward()
    torch.optim.SGD(model.parameters(), lr=LR).step()
    student = model(**batch)[1].detach()
    assert not torch.equal(student, before)
    with smart.teacher.weights():
        torch.testing.assert_close(model(**batch)[1], before, rtol=1e-6, atol=1e-7)
    assert torch.equal(model(**batch)[1], student)
    with pytest.raises(KeyboardInterrupt), smart.teacher.weights():
        raise KeyboardInterrupt
    assert torch.equal(model(**batch)[1], student)
    # made after a pass, a teacher still has the shards
    teacher = Teacher(model)
    assert all(
        torch.equal(whole(s), whole(p)) for s, p in zip(teacher.shadows.values(), model.parameters(), strict=True)
    )
    sharded = copy.deepcopy(smart.teacher.state_dict())
    for state in (sharded, {name: whole(s) + 1 for name, s in sharded.items()}):
        teacher.load_state_dict(state)
        assert all(torch.equal(whole(teacher.shadows[name]), whole(s)) for name, s in state.items())


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp nested"])
def test_evaluating_with_the_teachers_weights(world: World, how: str) -> None:
    world.run(evaluates_the_teacher, how)


def ema_refuses_dtensors(rank: int, size: int) -> None:
    (p, *_) = wrap(Classifier(), "fsdp").parameters()
    for pair in (([p.detach().clone()], [p]), ([local(p).clone()], [p]), ([p.detach().clone()], [local(p)])):
        with pytest.raises(TypeError, match=r"got a (DTensor|Parameter), expected its part in this process"):
            ema_update_(*pair, 0.5)


def test_the_moving_average_takes_parts_that_lie_here(world: World) -> None:
    world.run(ema_refuses_dtensors)


def wrapped_by_the_first_fsdp(rank: int, size: int) -> None:
    with pytest.raises(TypeError, match=r"model: got a FullyShardedDataParallel, expected .* fully_shard"):
        Smart(FullyShardedDataParallel(Classifier(), device_id=torch.device("cpu")), SmartConfig(), 10)


def test_wrappers_that_copy_or_flatten_are_refused(world: World) -> None:
    with pytest.raises(TypeError, match=r"model: got a DataParallel, expected .* DistributedDataParallel"):
        Smart(nn.DataParallel(Encoder()), SmartConfig(), 10)
    world.run(wrapped_by_the_first_fsdp)


def runs_in_autocast(rank: int, size: int, how: str) -> None:
    """In one autocast context for all passes: its copies of the student's weights must not serve the teacher."""
    model, smart, alone, smart_alone = start(how)
    for step in range(2):
        batch, noise = draw(step, LOCAL)
        for m, s in ((model, smart), (alone, smart_alone)):
            with torch.autocast("cpu", torch.bfloat16):
                out = s(batch, initial_perturbation=noise)
            assert (out.proximal > 0) == (step > 0)
            out.loss.backward()
            torch.optim.SGD(m.parameters(), lr=LR).step()
            m.zero_grad()
            s.update()
    for p, expected in zip(model.parameters(), alone.parameters(), strict=True):
        # gradients up to 0.5, whose shares by pass are rounded to 8 bits before or after their sum, times LR
        torch.testing.assert_close(whole(p.detach()), expected.detach(), rtol=0, atol=0.5 * 2**-8 * LR)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp nested"])
def test_in_autocast(world: World, how: str) -> None:
    world.run(runs_in_autocast, how)


# ------------------------------------------------------------------------------------------------- what users run


def runs_the_guide(rank: int, size: int, blocks: list[str]) -> list[float]:
    names = {"build_model": Classifier, "device": "cpu", "Smart": Smart, "SmartConfig": SmartConfig, "torch": torch}
    names["loader"] = [batch_for(Encoder(), 2 + rank, seed=10 * rank + i) for i in range(2)]
    torch.manual_seed(rank)
    pages.run("processes", blocks, names)
    return torch.cat([p.detach().flatten() for p in names["model"].parameters()]).tolist()


def test_the_guides_lines_train_the_same_model_everywhere(world: World) -> None:
    trained = world.run(runs_the_guide, pages.guide("processes"))
    assert all(other == trained[0] for other in trained[1:])
    assert all(math.isfinite(x) for x in trained[0])


def runs_the_example(rank: int, size: int, folder: Path) -> None:
    """A tiny model, 11 made-up texts whose first word tells the class, five to a batch, so that parts are uneven."""
    import tokenizers
    import transformers

    sys.path.append(str(pages.ROOT / "examples"))
    finetune = importlib.import_module("finetune")
    words = ["[UNK]", "[PAD]", *"abcdefg"]
    if rank == 0:
        config = transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=len(words)
        )
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ).save_pretrained(folder)
    dist.barrier()
    texts = [f"{'ab'[i % 2]} {'cdefg'[i % 5]}" + " c" * (i % 3) for i in range(11)]
    split = finetune.real_data.Split(texts, None, [i % 2 for i in range(11)])
    data = finetune.real_data.Dataset(split, None, split, ("a", "b"))
    finetune.TASKS["toy"] = (lambda: data, "accuracy")
    arguments = ["--task", "toy", "--model", str(folder), "--seeds", "1", "--epochs", "2", "--batch-size", "5"]
    arguments += ["--lr", "3e-4", "--method", "vanilla", "smart", "recommended"]
    finetune.main([*arguments, "--out", str(folder / "out")])


@pytest.mark.parametrize("world", [2], indirect=True)
def test_the_example_on_two_processes(world: World, tmp_path: Path) -> None:
    world.run(runs_the_example, tmp_path)
    runs = json.loads((tmp_path / "out" / "finetune.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["vanilla", "smart", "recommended"]
    for run in runs:
        assert len(run["task_loss"]) == 4  # of the third batch in each epoch, one example is too few for two processes
        assert all(0.3 < loss < 1.5 for loss in run["task_loss"])
        assert run["score"] * 11 / 100 == pytest.approx(
            round(run["score"] * 11 / 100)
        )  # all eleven test examples have been counted

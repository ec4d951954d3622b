"""The exponential moving average of a model's parameters: how fast and how exact, beside the ways people update it.

    python benchmarks/bench_ema.py [--device cuda] [--lists bert-base minilm small] [--dtypes fp32-fp32] [--full]

An update reads shadows and parameters and writes the shadows: the limit is a plain copy of as many bytes. A pair
of dtypes is that of the shadow and of the parameter. Writes a table, JSON and a figure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # configurations alone, no weights

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness import (
    OURS,
    RESULTS,
    Peer,
    Report,
    first_line,
    format_table,
    measure,
    measure_steps,
    progress_bar,
)
from smart_kernels import ema_update_

BASELINES = ("eager", "torch.compile")
COMPILED_TENSORS = 500
"""Longer lists are not compiled: inductor writes code for every tensor; 2000 keep it busy for over five minutes."""
DECAY = 0.999
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAIRS = ("fp32-fp32", "fp32-bf16", "bf16-bf16")
MODELS = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
}
SMALL = [(1000,)] * 2000

Tensors = list[Tensor]


class Model(nn.Module):
    """Shadows or parameters as a module, for the ways that work on modules."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)


# -------------------------------------------------------------------------------------------- the ways to update


def lerp(shadows: Tensors, parameters: Tensors, *_: Any) -> None:
    if parameters[0].dtype == shadows[0].dtype:
        for e, p in zip(shadows, parameters, strict=True):
            e.lerp_(p, 1 - DECAY)
    else:  # one at a time: less memory than all at once
        for e, p in zip(shadows, parameters, strict=True):
            e.lerp_(p.to(e.dtype), 1 - DECAY)


def mul_add(shadows: Tensors, parameters: Tensors, *_: Any) -> None:
    for e, p in zip(shadows, parameters, strict=True):
        e.mul_(DECAY).add_(p, alpha=1 - DECAY)


def foreach_lerp(shadows: Tensors, parameters: Tensors, *_: Any) -> None:
    if parameters[0].dtype != shadows[0].dtype:
        parameters = [p.to(shadows[0].dtype) for p in parameters]
    torch._foreach_lerp_(shadows, parameters, 1 - DECAY)


def foreach_mul_add(shadows: Tensors, parameters: Tensors, *_: Any) -> None:
    torch._foreach_mul_(shadows, DECAY)
    torch._foreach_add_(shadows, parameters, alpha=1 - DECAY)


def averaged_model(_shadows: Tensors, _parameters: Tensors, student: Model, averaged: AveragedModel, *_: Any) -> None:
    averaged.update_parameters(student)


def ema_pytorch(_shadows: Tensors, _parameters: Tensors, student: Model, _averaged: Any, ema: Any) -> None:
    if ema is None:
        raise ImportError("not installed")
    ema.update_moving_average(ema.ema_model, student, DECAY)


def ours(shadows: Tensors, parameters: Tensors, *_: Any, stochastic_rounding: bool = False) -> None:
    ema_update_(shadows, parameters, DECAY, stochastic_rounding=stochastic_rounding)


STOCHASTIC = f"{OURS}, stochastic"


Update = Callable[..., None]
SPELLINGS: dict[str, Update] = {
    "lerp_": lerp,
    "mul_ and add_": mul_add,
    "_foreach_lerp_": foreach_lerp,
    "_foreach_mul_, add_": foreach_mul_add,
}


def compiled(update: Update) -> Update:
    """With the lists alone for its arguments: modules would be guarded one by one."""
    lists_alone = torch.compile(lambda shadows, parameters: update(shadows, parameters), dynamic=False)
    return lambda shadows, parameters, *_: lists_alone(shadows, parameters)


def ways(shadow_dtype: torch.dtype, tensors: int) -> list[Peer]:
    """Everyone, for lists of so many tensors. The last is another result: it is right on average."""
    found = [Peer(f"eager, {name}", update, "eager") for name, update in SPELLINGS.items()]
    if tensors <= COMPILED_TENSORS:
        found += [
            Peer(f"torch.compile, {name}", compiled(SPELLINGS[name]), "torch.compile")
            for name in ("lerp_", "_foreach_lerp_")
        ]
    found += [Peer("AveragedModel", averaged_model), Peer("ema-pytorch", ema_pytorch), Peer(OURS, ours)]
    if shadow_dtype.itemsize == 2:
        found.append(Peer(STOCHASTIC, partial(ours, stochastic_rounding=True)))
    return found


def dtypes_of(pair: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the shadow and of the parameter."""
    shadow, parameter = pair.split("-")
    return DTYPES[shadow], DTYPES[parameter]


def make_inputs(
    shapes: Sequence[tuple[int, ...]], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> tuple[Tensors, Tensors, Model, AveragedModel, Any]:
    """Parameters, shadows that have followed them for a while, and both as the modules that peers want."""
    parameters = [torch.randn(shape, device=device) for shape in shapes]
    shadows = [(p + 0.1 * torch.randn_like(p)).to(dtypes[0]) for p in parameters]
    parameters = [p.to(dtypes[1]) for p in parameters]
    student = Model(parameters)
    averaged = AveragedModel(Model(shadows), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.n_averaged.fill_(1)
    for mine, shadow in zip(averaged.parameters(), shadows, strict=True):
        mine.data = shadow
    ema = None
    if importlib.util.find_spec("ema_pytorch"):
        make = importlib.import_module("ema_pytorch").EMA
        options = {"include_online_model": False, "use_foreach": True, "coerce_dtype": True}
        ema = make(student, ema_model=Model(shadows), beta=DECAY, **options)
    return shadows, parameters, student, averaged, ema


# ---------------------------------------------------------------------------------------------------- exactness


def measure_exactness(report: Report, device: str) -> None:
    """Where a shadow is after 1000 updates towards a constant, and how far off one update is at most."""
    steps, begin, end = 1000, 1.0, 1.5
    truth = end - (end - begin) * DECAY**steps
    figures: dict[str, dict[str, tuple[float, float]]] = {}
    for pair in PAIRS:
        dtypes = dtypes_of(pair)
        figures[pair] = {}
        for peer in ways(dtypes[0], tensors=1):
            shadow, parameter = (
                torch.full((4096,), x, device=device).to(d) for x, d in zip((begin, end), dtypes, strict=True)
            )
            p = torch.randn(1 << 16, device=device).to(dtypes[1])
            e = (p + torch.randn(1 << 16, device=device)).to(dtypes[0])
            exact = e.double() + (1 - DECAY) * (p.double() - e.double())
            try:
                peer.call([e], [p])
                for _ in range(steps):
                    peer.call([shadow], [parameter])
            except TypeError:  # works on modules: what it calls is among the others
                continue
            except Exception as error:  # as in `measure`: a guest that fails is left out
                report.note(f"{peer.name} is left out: {first_line(error)}")
                continue
            place = torch.exp2(exact.abs().log2().floor()) * torch.finfo(e.dtype).eps
            figures[pair][peer.name] = ((e.double() - exact).abs() / place).max().item(), shadow.double().mean().item()
    report.figures["exactness"] = {"after_1000_updates": truth, "largest_error_in_places_and_mean": figures}
    columns = [
        "shadow-parameter",
        "way",
        "largest error of an update, in last places",
        f"1000 updates, {truth:.4f} is true",
    ]
    rows: list[list[str] | None] = []
    for pair, found in figures.items():
        rows += [None] if rows else []
        rows += [
            [pair if i == 0 else "", name, f"{error:.2f}", f"{mean:.4f}"]
            for i, (name, (error, mean)) in enumerate(found.items())
        ]
    report.texts.append(format_table(columns, rows))


# -------------------------------------------------------------------------------------------------------- speed


def parameter_list(name: str) -> list[tuple[int, ...]]:
    """Shapes of a model's parameters, from its configuration; nothing is allocated."""
    if name == "small":
        return SMALL
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        return [tuple(p.shape) for p in BertForSequenceClassification(BertConfig(**MODELS[name])).parameters()]


def measure_speed(report: Report, args: argparse.Namespace, progress: Callable[[str], object]) -> None:
    """A case per list of tensors and pair of dtypes."""
    for name in args.lists:
        try:
            shapes = parameter_list(name)
        except ImportError as error:
            report.note(f"{name} is left out: {first_line(error)}")
            continue
        elements = sum(map(math.prod, shapes))
        if len(shapes) > COMPILED_TENSORS:
            report.note(f"torch.compile is left out of lists of more than {COMPILED_TENSORS} tensors")
        for pair in args.dtypes:
            torch.compiler.reset()  # one list, one graph
            e, p = dtypes_of(pair)
            report.add(
                measure(
                    f"{name}, {len(shapes)} tensors, {elements / 1e6:.0f} M",
                    ways(e, len(shapes)),
                    partial(make_inputs, shapes, (e, p), args.device),
                    baselines=BASELINES,
                    group=pair.replace("-", " ← "),
                    bytes_moved=elements * (2 * e.itemsize + p.itemsize),
                    device=args.device,
                    budget_s=12.0 if args.full else 3.0,
                    min_rounds=15 if args.full else 5,
                    progress=progress,
                )
            )


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--lists", nargs="+", choices=[*MODELS, "small"], default=[*MODELS, "small"])
    parser.add_argument("--dtypes", nargs="+", choices=PAIRS, default=PAIRS, help="of the shadow and of the parameter")
    parser.add_argument("--full", action="store_true", help="more rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and the figure (%(default)s)")
    args = parser.parse_args(argv)
    report = Report("bench_ema", vars(args), args.device, "Moving average: times faster than eager")
    steps = len(args.lists) * sum(measure_steps(ways(dtypes_of(pair)[0], 1)) for pair in args.dtypes)
    with torch.no_grad(), progress_bar(steps, "bench_ema") as progress:
        measure_exactness(report, args.device)
        measure_speed(report, args, progress)
    print(report.table())
    paths = report.save(args.out, {"speed": report.speed_figure()})
    print("\nwritten in", f"{time.perf_counter() - begin:.0f} s:", *paths)


if __name__ == "__main__":
    main()

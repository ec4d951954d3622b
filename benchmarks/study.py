"""Does SMART help? A study of few-shot fine-tuning that tunes every method, plain fine-tuning first and most.

    python benchmarks/study.py                  # goes on where the file of runs ends, one process a core
    python benchmarks/study.py --processes 4
    python benchmarks/study.py --report         # tables, docs/study.md and docs/study.png from the file; packs it
    python benchmarks/study.py --quick          # from scratch in minutes: the main finding's direction

MiniLM on TREC-6 and STS-B, 50 to 1 000 training examples. Every run is one line of JSON, keyed by its whole
configuration. What is chosen is chosen by development data that is split from the training pool (`pick` is the only
place where anything is chosen); the test set is read by runs of final configurations alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from study_run import AVERAGES, Run, execute, passes

ROOT = Path(__file__).resolve().parent.parent
PACKED = ROOT / "docs" / "study_runs.jsonl.gz"
"""The runs that the repository has."""

GROWING = ROOT / "benchmarks" / "results" / "study.jsonl"
"""The runs of this machine; those of both files count."""

Results = Mapping[str, Mapping[str, Any]]
"""What `execute` gave, by the key of the run."""


# -------------------------------------------------------------------------------------------- what is compared


class Cell(NamedTuple):
    """A task, how many examples of it, and the share of them that has a wrong label."""

    task: str
    size: int
    noise: float = 0.0


class Method(NamedTuple):
    """A method: its settings, and what of them is screened, one coordinate after the other.

    Attributes:
        name: as tables have it.
        settings: as in `Run`.
        screens: each is a list of alternatives, of which the best is kept; the first is what others begin with.
        begin: methods whose chosen settings are taken over before.
        averaged: a moving average of the weights is measured: plain's own, or the proximal term's teacher.
        always: it goes to the test set, whatever the development data say.
    """

    name: str
    settings: Mapping[str, Any]
    screens: Sequence[Sequence[Mapping[str, Any]]] = ()
    begin: Sequence[str] = ()
    averaged: bool = False
    always: bool = False


PLAIN = "plain"
RADII: Sequence[Mapping[str, Any]] = (
    {"epsilon": 1e-2},
    {"epsilon": 1e-3},
    {"epsilon": 3e-2},
    {"epsilon": 1e-1},
    {"relative": 0.1},
    {"relative": 0.3},
)
WEIGHTS: Sequence[Mapping[str, Any]] = ({"lambda_s": 1.0}, {"lambda_s": 0.1}, {"lambda_s": 10.0})
METHODS = (
    Method(PLAIN, {"lambda_s": 0.0, "mu": 0.0}, always=True),
    Method("plain, averaged", {"lambda_s": 0.0, "mu": 0.0}, averaged=True, always=True),
    Method("SMART, paper", {"lambda_s": 1.0, "mu": 1.0}, always=True),
    Method(
        "D_Breg",
        {"lambda_s": 0.0, "mu": 1.0},
        (
            (
                {"decay": 0.99, "decay_late": 0.999},
                {"decay": 0.9, "decay_late": 0.9},
                {"decay": 0.99, "decay_late": 0.99},
            ),
            ({"mu": 1.0}, {"mu": 0.1}, {"mu": 10.0}),
        ),
    ),
    Method("R_s, predicted", {"adversary": "predicted", "mu": 0.0, "lambda_s": 1.0}, (RADII, WEIGHTS)),
    Method(
        "R3F",
        {"adversary": "random", "mu": 0.0, "lambda_s": 1.0},
        (({"noise_std": 5e-2}, {"noise_std": 1e-5}, {"noise_std": 1e-2}, {"noise_std": 1e-1}), WEIGHTS),
    ),
    Method("R_s, power", {"adversary": "power", "mu": 0.0, "lambda_s": 1.0}, (RADII, WEIGHTS)),
    Method("R_s, predicted, clean side detached", {"detach_clean": True}, begin=("R_s, predicted",)),
    Method("SMART, tuned", {}, begin=("D_Breg", "R_s, predicted")),
    Method("smart-pytorch", {"smart_pytorch": 0.02}, (({"smart_pytorch": 0.02}, {"smart_pytorch": 0.2}),)),
)
MARGIN = 1.0
"""Points of development score below plain fine-tuning at which a tuned method is screened out."""

CELLS = (
    *(Cell("trec", size) for size in (100, 300, 50, 1000)),
    *(Cell("stsb", size) for size in (100, 300, 50, 1000)),
    *(Cell("trec", 100, noise) for noise in (0.3, 0.1)),
)
SCREENED = 100
"""Settings are screened at this size and carried to the others, and so are the factors below; plain is tuned at each."""

SEEDS = {50: 10, 100: 10, 300: 10, 1000: 5}
TUNING_SEEDS = (100, 101, 102)
"""Other seeds than those of final runs: other examples, heads and orders."""

GRID = {
    50: ((3e-4, 1.5e-4, 6e-4), (20, 10, 40)),
    100: ((3e-4, 1.5e-4, 6e-4), (10, 20, 5)),
    300: ((3e-4, 1.5e-4, 6e-4), (8, 16, 4)),
    1000: ((2e-4, 1e-4, 4e-4), (5, 10, 3)),
}
"""Learning rates and epochs that plain fine-tuning is tuned over."""

NEIGHBOURS = ((1.0, 1), (2.0, 1), (0.5, 2), (1.0, 2))
"""Factors on plain's learning rate and epochs that every other method is tuned over."""


# -------------------------------------------------------------------------- how it is chosen: this screen is all


class Trial(NamedTuple):
    """A candidate: settings, learning rate, epochs, and which weights are measured (see `Run.average`)."""

    settings: Mapping[str, Any]
    lr: float
    epochs: int
    average: float = 0.0


class Waiting(Exception):  # noqa: N818
    """The runs that something is chosen by are not all there."""


def development_runs(cell: Cell, trial: Trial) -> list[Run]:
    """The runs that a trial is judged by. They measure all kinds of weights, so that `average` is none of their key."""
    task, size, noise = cell
    rest = trial.lr, trial.epochs
    return [Run(task, size, trial.settings, *rest, seed, "dev", noise) for seed in TUNING_SEEDS]


def development_score(results: Results, cell: Cell, trial: Trial) -> float:
    """Mean score on development data."""
    measured = [results[run.key]["measured"][f"{trial.average:g}"] for run in development_runs(cell, trial)]
    return statistics.fmean(m["score"] for m in measured)


def pick(results: Results, cell: Cell, trials: Sequence[Trial]) -> Iterator[Run]:
    """Yields the runs that are lacking; returns the trial of the best development score, the first among equals."""
    lacking = [r for trial in trials for r in development_runs(cell, trial) if r.key not in results]
    yield from lacking
    if lacking:
        raise Waiting
    return max(trials, key=lambda trial: development_score(results, cell, trial))


def tuned_plain(results: Results, cell: Cell, averages: Sequence[float] = (0.0,)) -> Iterator[Run]:
    rates, epochs = GRID[cell.size]
    settings = METHODS[0].settings
    return (yield from pick(results, cell, [Trial(settings, r, e, a) for e in epochs for r in rates for a in averages]))


def screened(results: Results, method: Method, task: str) -> Iterator[Run]:
    """A method's settings: those of the methods it begins with, then coordinate by coordinate, at plain's lr, epochs."""
    cell = Cell(task, SCREENED)
    settings: dict[str, Any] = {}
    for name in method.begin:
        other = yield from screened(results, named(name), task)
        off = {k for k in ("lambda_s", "mu") if not other.get(k, 1.0)}  # a term that is off there is no choice
        settings |= {k: v for k, v in other.items() if k not in off}
    settings |= method.settings
    for alternatives in method.screens:
        plain = yield from tuned_plain(results, cell)
        trials = [Trial(settings | alternative, plain.lr, plain.epochs) for alternative in alternatives]
        settings = dict((yield from pick(results, cell, trials)).settings)
    return settings


def tuned(results: Results, method: Method, cell: Cell) -> Iterator[Run]:
    """A method's settings with learning rate and epochs for a cell: each method has the same budget, plain more."""
    if method.settings == METHODS[0].settings:
        return (yield from tuned_plain(results, cell, AVERAGES if method.averaged else (0.0,)))
    settings = yield from screened(results, method, cell.task)
    home = Cell(cell.task, SCREENED)
    there, here = (yield from tuned_plain(results, home)), (yield from tuned_plain(results, cell))
    trials = [Trial(settings, there.lr * rate, there.epochs * more) for rate, more in NEIGHBOURS]
    rate, more = NEIGHBOURS[trials.index((yield from pick(results, home, trials)))]
    return Trial(settings, here.lr * rate, here.epochs * more)


def is_finalist(results: Results, method: Method, task: str) -> Iterator[Run]:
    """Whether a method goes to the test set: always, or not too far behind plain on development data."""
    if method.always:
        return True
    cell = Cell(task, SCREENED)
    own, plain = (yield from tuned(results, method, cell)), (yield from tuned_plain(results, cell))
    return development_score(results, cell, own) >= development_score(results, cell, plain) - MARGIN


def final(results: Results, method: Method, cell: Cell) -> Iterator[Run]:
    """All runs of a method in a cell; returns those on the test set, none where it was screened out."""
    if not (yield from is_finalist(results, method, cell.task)):
        return []
    trial = yield from tuned(results, method, cell)
    task, size, noise = cell
    own = trial.settings, trial.lr, trial.epochs
    runs = [Run(task, size, *own, seed, "test", noise, trial.average) for seed in range(SEEDS[size])]
    yield from (run for run in runs if run.key not in results)
    return runs


def named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def outcome(steps: Iterator[Run]) -> Any:
    """What a generator of runs returns, None where runs are lacking before."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        return stop.value
    except Waiting:
        return None


def plan(results: Results, cells: Sequence[Cell] = CELLS) -> Iterator[Run]:
    """The runs that are lacking and known by now, each once, in the order in which they are wanted."""
    seen = set()
    for cell in cells:
        for method in METHODS:
            try:
                for run in final(results, method, cell):
                    if run.key not in seen:
                        seen.add(run.key)
                        yield run
            except Waiting:
                pass


# --------------------------------------------------------------------------------------------------- the file


def read(*files: Path) -> dict[str, dict[str, Any]]:
    """The results by key; a last line that was not written to its end does not count."""
    results = {}
    for file in files:
        if not file.exists():
            continue
        opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
        with opened as lines:
            for line in lines:
                if line.endswith("\n"):
                    content = json.loads(line)
                    results[Run(**content["run"]).key] = content["result"]
    return results


def line_of(key: str, result: Mapping[str, Any]) -> str:
    return json.dumps({"run": json.loads(key), "result": result}) + "\n"


def append(file: Path, run: Run, result: Mapping[str, Any]) -> None:
    """Add a line; what a killed process has left of one is cut off before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        size = out.tell()
        out.seek(0)
        whole = out.read().rfind(b"\n") + 1
        if whole != size:
            out.truncate(whole)
        out.write(line_of(run.key, result).encode())


def pack(results: Results, file: Path) -> None:
    """Write all results, in order of their keys, so that the same results make the same file."""
    lines = "".join(line_of(key, results[key]) for key in sorted(results))
    scratch = file.with_suffix(".part")
    scratch.write_bytes(gzip.compress(lines.encode(), mtime=0))
    scratch.replace(file)

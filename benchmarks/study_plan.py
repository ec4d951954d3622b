"""What the study compares, how it chooses, which runs are lacking; and the file of runs.

Everything that is compared is data, at the top. What is chosen is chosen by development data that is split from the
training pool, and `pick` is the only place where anything is chosen; runs of final configurations alone read the test
set. Every run is one line of JSON, keyed by its whole configuration.
"""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from study_run import AVERAGES, Run, passes

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
        always: it goes to the test set where settings are screened, whatever the development data say.
        spends: it trains for as many epochs as cost what a run of this method costs (see `passes`).
    """

    name: str
    settings: Mapping[str, Any]
    screens: Sequence[Sequence[Mapping[str, Any]]] = ()
    begin: Sequence[str] = ()
    averaged: bool = False
    always: bool = False
    spends: str = ""


PLAIN = "plain"
LONGER = "plain, as many passes"
RADII: Sequence[Mapping[str, Any]] = (
    {"epsilon": 1e-2},
    {"epsilon": 1e-3},
    {"epsilon": 3e-2},
    {"epsilon": 1e-1},
    {"relative": 0.1},
    {"relative": 0.3},
)
WEIGHTS_OF_TERMS = ("lambda_s", "mu")
WEIGHTS: Sequence[Mapping[str, Any]] = ({"lambda_s": 1.0}, {"lambda_s": 0.1}, {"lambda_s": 10.0})
METHODS = (
    Method(PLAIN, {"lambda_s": 0.0, "mu": 0.0}, always=True),
    Method(LONGER, {"lambda_s": 0.0, "mu": 0.0}, always=True, spends="R_s, predicted"),
    Method("plain, averaged", {"lambda_s": 0.0, "mu": 0.0}, averaged=True, always=True),
    Method("SMART, paper", {"lambda_s": 1.0, "mu": 1.0}, always=True),
    Method(
        "D_Breg",
        {"lambda_s": 0.0, "mu": 1.0},
        (
            [{"decay": early, "decay_late": late} for early, late in ((0.99, 0.999), (0.9, 0.9), (0.99, 0.99))],
            ({"mu": 1.0}, {"mu": 0.1}, {"mu": 10.0}),
        ),
    ),
    Method("D_Breg, its teacher", {}, begin=("D_Breg",), averaged=True),
    Method("R_s, predicted", {"adversary": "predicted", "mu": 0.0, "lambda_s": 1.0}, (RADII, WEIGHTS)),
    Method(
        "R3F",
        {"adversary": "random", "mu": 0.0, "lambda_s": 1.0},
        (({"noise_std": 5e-2}, {"noise_std": 1e-5}, {"noise_std": 1e-2}, {"noise_std": 1e-1}), WEIGHTS),
    ),
    Method("R_s, power", {"adversary": "power"}, begin=("R_s, predicted",)),
    Method("R_s, predicted, clean side detached", {"detach_clean": True}, begin=("R_s, predicted",)),
    Method("SMART, tuned", {}, begin=("D_Breg", "R_s, predicted")),
    Method("smart-pytorch", {"smart_pytorch": 0.02}, (({"smart_pytorch": 0.02}, {"smart_pytorch": 0.2}),)),
)
MARGIN = 0.0
"""Points of development score by which a method may be behind plain fine-tuning; it is screened out below. What is
tuned over more settings is favoured by the choice, so that one that is behind even so is unlikely to be ahead."""

EVERYWHERE = (PLAIN, LONGER, "SMART, paper", "D_Breg", "R_s, predicted")
"""What goes to all cells, whatever any data say: plain fine-tuning, also for as long as the smoothness term takes, the
published method, and each of its terms alone with the settings chosen for it. All methods are compared at HOME only."""

HOME = Cell("trec", 100)
"""Where settings are screened and every method is tuned. They are carried to the other cells, where plain alone is
tuned."""

CELLS = (
    HOME,
    Cell("trec", 300),
    Cell("trec", 50),
    Cell("trec", 100, 0.3),
    Cell("stsb", 100),
    Cell("trec", 1000),
    *(Cell("stsb", size) for size in (300, 50, 1000)),
    Cell("trec", 100, 0.1),
)
"""In the order in which they are wanted."""

SEEDS = {50: 10, 100: 10, 300: 10, 1000: 5}
REPEATED = ((Cell("trec", 50), "R_s, predicted"),)
"""Where a method's score was better than plain's beyond chance: both once more, with as many further seeds."""

BESIDE = (PLAIN, LONGER)
"""What is run again beside it."""

TUNING_SEEDS = (100, 101, 102)
"""Other seeds than those of final runs: other examples, heads and orders."""

GRID: tuple[Sequence[float], Sequence[int]] = ((3e-4, 1.5e-4, 6e-4), (10, 20, 5))
"""Learning rates and epochs that plain fine-tuning is tuned over at HOME."""

ELSEWHERE: Mapping[int, tuple[Sequence[float], Sequence[int]]] = {
    50: ((7.5e-5, 1.5e-4), (80, 40)),
    100: ((7.5e-5, 1.5e-4), (40, 20, 10)),
    300: ((7.5e-5, 1.5e-4), (16, 8)),
    1000: ((7.5e-5, 1.5e-4), (6, 3)),
}
"""In the other cells, by size: about the best of HOME, and about as many steps."""

NEIGHBOURS = ((1.0, 1), (2.0, 1), (0.5, 2), (1.0, 2))
"""Factors on the best of the grid that every method is tuned over at HOME, plain beside its grid."""

LONGER_RATES = (1.0, 0.5)
"""Factors on plain's learning rate, over which it is tuned where it trains for longer."""


# -------------------------------------------------------------------------- how it is chosen: this screen is all


class Trial(NamedTuple):
    """A candidate: settings, learning rate, epochs, and which weights are measured (see `Run.average`)."""

    settings: Mapping[str, Any]
    lr: float
    epochs: int
    average: float = 0.0


class LackingRunsError(Exception):
    """The runs that something is chosen by are not all there."""


def grid(cell: Cell) -> list[tuple[float, int]]:
    """Learning rates and epochs that plain fine-tuning is tuned over in a cell."""
    rates, epochs = GRID if cell == HOME else ELSEWHERE[cell.size]
    return [(rate, number) for number in epochs for rate in rates]


def development_runs(cell: Cell, trial: Trial) -> list[Run]:
    """The runs that a trial is judged by. They measure all kinds of weights, so that `average` is none of their key."""
    task, size, noise = cell
    rest = trial.lr, trial.epochs
    return [Run(task, size, trial.settings, *rest, seed, "dev", noise) for seed in TUNING_SEEDS]


def development_score(results: Results, cell: Cell, trial: Trial) -> float:
    """Mean score on development data."""
    measured = [results[run.key]["measured"][f"{trial.average:g}"] for run in development_runs(cell, trial)]
    return statistics.fmean(m["score"] for m in measured)


def pick(results: Results, cell: Cell, trials: Sequence[Trial]) -> Generator[Run, None, Trial]:
    """Yields the runs that are lacking; returns the trial of the best development score, the first among equals."""
    lacking = [r for trial in trials for r in development_runs(cell, trial) if r.key not in results]
    yield from lacking
    if lacking:
        raise LackingRunsError
    return max(trials, key=lambda trial: development_score(results, cell, trial))


def best_of_grid(results: Results, cell: Cell) -> Generator[Run, None, Trial]:
    """Plain fine-tuning at the best pair of the grid, around which every method is tuned."""
    return (yield from pick(results, cell, [Trial(METHODS[0].settings, *pair) for pair in grid(cell)]))


def neighbours(best: Trial) -> list[tuple[float, int]]:
    """Rates and epochs that every method is tuned over where settings are screened."""
    return [(best.lr * rate, best.epochs * more) for rate, more in NEIGHBOURS]


def plain_pairs(best: Trial, cell: Cell) -> list[tuple[float, int]]:
    """Rates and epochs that plain fine-tuning is tuned over: the grid, and what the others have."""
    others = neighbours(best) if cell == HOME else []
    return list(dict.fromkeys(grid(cell) + others))


def screened(results: Results, method: Method) -> Generator[Run, None, dict[str, Any]]:
    """A method's settings: those it begins with, then coordinate by coordinate, with plain's rate and epochs."""
    settings: dict[str, Any] = {}
    for name in method.begin:
        other = yield from screened(results, named(name))
        if settings:  # a term that is off in one of several is on in another
            both = [settings, other]
            settings, other = ({k: v for k, v in x.items() if k not in WEIGHTS_OF_TERMS or v} for x in both)
        settings |= other
    settings |= method.settings
    for alternatives in method.screens:
        plain = yield from best_of_grid(results, HOME)
        trials = [Trial(settings | alternative, plain.lr, plain.epochs) for alternative in alternatives]
        settings = dict((yield from pick(results, HOME, trials)).settings)
    return settings


def tuned(results: Results, method: Method, cell: Cell) -> Generator[Run, None, Trial]:
    """A method's settings with learning rate and epochs for a cell: each method has the same budget, plain more.

    Where settings are screened a method is tuned, too. Elsewhere plain alone is: the others take the settings, and the
    rate and epochs in units of plain's, that were chosen for them there.
    """
    plain = METHODS[0]
    if method.spends:
        as_dear = yield from tuned(results, named(method.spends), cell)
        epochs = round(passes(as_dear.settings) * as_dear.epochs)
        rate = (yield from tuned(results, plain, cell)).lr
        return (yield from pick(results, cell, [Trial(method.settings, rate * r, epochs) for r in LONGER_RATES]))
    if method.settings == plain.settings or cell == HOME:
        best = yield from best_of_grid(results, cell)
        if method.settings == plain.settings:
            pairs, averages = plain_pairs(best, cell), AVERAGES if method.averaged else (0.0,)
        else:
            pairs, averages = neighbours(best), (-1.0 if method.averaged else 0.0,)
        settings = yield from screened(results, method)
        return (yield from pick(results, cell, [Trial(settings, *pair, a) for pair in pairs for a in averages]))
    there, plain_there = (yield from tuned(results, method, HOME)), (yield from tuned(results, plain, HOME))
    here = yield from tuned(results, plain, cell)
    rate, more = there.lr / plain_there.lr, there.epochs / plain_there.epochs
    return there._replace(lr=here.lr * rate, epochs=max(1, round(here.epochs * more)))


def is_finalist(results: Results, method: Method, cell: Cell) -> Generator[Run, None, bool]:
    """Whether a method goes to the test set: at HOME always, or not too far behind plain on development data; elsewhere
    those of EVERYWHERE."""
    if cell != HOME:
        return method.name in EVERYWHERE
    if method.always:
        return True
    own, plain = (yield from tuned(results, method, cell)), (yield from tuned(results, METHODS[0], cell))
    return development_score(results, cell, own) >= development_score(results, cell, plain) - MARGIN


def final(results: Results, method: Method, cell: Cell) -> Generator[Run, None, list[Run]]:
    """All runs of a method in a cell; returns those on the test set, none where it was screened out."""
    if not (yield from is_finalist(results, method, cell)):
        return []
    runs = final_runs((yield from tuned(results, method, cell)), cell, range(SEEDS[cell.size]))
    yield from (run for run in runs if run.key not in results)
    return runs


def final_runs(trial: Trial, cell: Cell, seeds: Iterable[int]) -> list[Run]:
    """The runs of a trial on the test set."""
    task, size, noise = cell
    own = trial.settings, trial.lr, trial.epochs
    return [Run(task, size, *own, seed, "test", noise, trial.average) for seed in seeds]


def repeated(
    results: Results, names: Iterable[str], cell: Cell, seeds: Iterable[int]
) -> Generator[Run, None, dict[str, list[Run]]]:
    """Runs of methods as they are tuned, with other seeds than the final ones; returns all, by method."""
    runs, seeds = {}, list(seeds)
    for method in map(named, names):
        runs[method.name] = final_runs((yield from tuned(results, method, cell)), cell, seeds)
        yield from (run for run in runs[method.name] if run.key not in results)
    return runs


def further_seeds(cell: Cell) -> range:
    """As many as the final runs have, and none of theirs."""
    return range(SEEDS[cell.size], 2 * SEEDS[cell.size])


def named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def outcome(steps: Generator[Run, None, Any]) -> Any:
    """What a generator of runs returns, None where runs are lacking before."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        return stop.value
    except LackingRunsError:
        return None


def plan(results: Results, cells: Sequence[Cell] = CELLS) -> Iterator[Run]:
    """The runs that are lacking and known by now, each once, in the order in which they are wanted."""
    seen = set()
    wanted = [final(results, method, cell) for cell in cells for method in METHODS]
    wanted[:0] = [
        repeated(results, (*BESIDE, name), cell, further_seeds(cell)) for cell, name in REPEATED if cell in cells
    ]
    for runs in wanted:
        try:
            for run in runs:
                if run.key not in seen:
                    seen.add(run.key)
                    yield run
        except LackingRunsError:
            pass


# --------------------------------------------------------------------------------------------------- the file


def read(*files: Path) -> dict[str, dict[str, Any]]:
    """The results by key; a last line that was not written to its end does not count."""
    results = {}
    for file in files:
        content = file.read_bytes() if file.exists() else b""
        lines = gzip.decompress(content) if file.suffix == ".gz" and content else content
        for line in lines[: lines.rfind(b"\n") + 1].splitlines():
            one = json.loads(line)
            results[Run(**one["run"]).key] = one["result"]
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


# ---------------------------------------------------------------------------------------------- what is to come


def remaining(results: Results, cells: Sequence[Cell] = CELLS) -> list[Run]:
    """All runs that are still to do, were nothing more screened out."""
    known: dict[str, Any] = dict(results)
    best = {"measured": {f"{kind:g}": {"score": 100.0} for kind in (0.0, -1.0, *AVERAGES)}}
    found: list[Run] = []
    while lacking := list(plan(known, cells)):
        found += lacking
        known |= {run.key: best for run in lacking}
    return found


def core_hours(results: Results, runs: Sequence[Run]) -> float:
    """Hours of a core that runs take, going by those that are done; a pair of sentences is taken for two questions."""

    def training(run: Run) -> float:
        return run.steps * passes(run.settings) * weight[run.task]

    weight = {"trec": 1.0, "stsb": 2.0}
    done = [(Run(**json.loads(key)), result) for key, result in results.items() if "measuring" in result]
    if not done:
        return float("nan")
    step = statistics.median(result["seconds"] / training(run) for run, result in done)
    measuring = {
        part: statistics.median([r["measuring"] / weight[run.task] for run, r in done if run.part == part] or [0.0])
        for part in ("dev", "test")
    }
    return sum(step * training(run) + measuring[run.part] * weight[run.task] for run in runs) / 3600

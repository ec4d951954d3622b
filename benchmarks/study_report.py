"""The study's statistics, tables and figure, from the file of runs alone.

Methods are compared with plain fine-tuning by seed: the same examples, head and order. A row stands in a table when all
of its seeds are there, and not before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import COLOURS, OUR_COLOUR, finish, format_table, plotting
from study_plan import (
    BESIDE,
    CELLS,
    HOME,
    LONGER,
    LONGER_RATES,
    MARGIN,
    METHODS,
    NEIGHBOURS,
    PLAIN,
    REPEATED,
    TUNING_SEEDS,
    Cell,
    Method,
    Results,
    Trial,
    best_of_grid,
    core_hours,
    development_score,
    final,
    final_runs,
    further_seeds,
    grid,
    is_finalist,
    named,
    outcome,
    plain_pairs,
    remaining,
    repeated,
    tuned,
)
from study_run import CORRUPTED, DEVELOPMENT, GROUPED, Run, passes

SIGNIFICANT = 0.05
QUICK = (PLAIN, "SMART, paper")
DRAWN = (PLAIN, LONGER, "SMART, paper", "SMART, tuned", "R_s, predicted", "D_Breg", "R3F")
"""What the figure has of the methods: no more than can be told apart."""


class Measure(NamedTuple):
    """Something that is measured on the test set.

    Attributes:
        key: its name in the file.
        title: its name in a table.
        form: how a number is written.
        more: whether more of it is better.
        ratio: whether it spans decades, so that methods are compared by ratios, in tables as factors.
    """

    key: str
    title: str
    form: str = ".1f"
    more: bool = True
    ratio: bool = False


ROBUST = (
    Measure("typos_5_score", "typos 5 %"),
    Measure("typos_10_score", "typos 10 %"),
    Measure("words_10_score", "words dropped 10 %"),
    Measure("smoothness_0.001", "R_s at 1e-3", ".1e", more=False, ratio=True),
    Measure("smoothness_0.01", "R_s at 1e-2", ".1e", more=False, ratio=True),
)
MEASURES = {
    "trec": (
        Measure("score", "accuracy, %"),
        Measure("nll", "NLL", ".3f", more=False),
        Measure("ece", "ECE, %", more=False),
        *ROBUST,
    ),
    "stsb": (
        Measure("score", "Pearson × 100"),
        Measure("spearman", "Spearman × 100"),
        Measure("mse", "MSE", ".3f", more=False),
        *ROBUST,
    ),
}


# ------------------------------------------------------------------------------------------------- statistics


class Paired(NamedTuple):
    """Differences by seed: their mean, its 95 % confidence interval, p of the t-test, seeds that are up, seeds."""

    mean: float
    low: float
    high: float
    p: float
    up: int
    seeds: int


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The paired t-test of ours against theirs, two-sided.

    Raises:
        ValueError: there are fewer than two pairs, or not as many of the one as of the other.
    """
    from scipy import stats

    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"ours, theirs: got {len(ours)} and {len(theirs)} values, expected as many, two at least")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    if error:
        p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    else:
        p = 0.0 if mean else 1.0
    return Paired(mean, mean - half, mean + half, p, sum(d > 0 for d in differences), n)


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests, so that the chance of any false finding among them is kept (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, least = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = least
    return corrected


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean."""
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


# ------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """A method with all of its seeds on the test set: what was measured, a list by seed."""

    method: Method
    trial: Trial
    runs: list[Run]
    values: dict[str, list[float]]


def measured(run: Run, result: Mapping[str, Any]) -> Mapping[str, float]:
    """Of the weights that the run asks for."""
    found: Mapping[str, float] = result["measured"][f"{run.average:g}"]
    return found


def score_of(run: Run, result: Mapping[str, Any]) -> float:
    return measured(run, result)["score"]


def values_of(results: Results, runs: Sequence[Run]) -> dict[str, list[float]]:
    """By seed what was measured and, as "share", lambda_s R_s over the task loss in the last epoch of training."""
    each = []
    for run in runs:
        result = results[run.key]
        share = run.settings.get("lambda_s", 1.0) * result["smoothness"] / result["task_loss"]
        each.append({**measured(run, result), "share": share})
    return {name: [one[name] for one in each] for name in each[0]}


def finished(results: Results, cell: Cell) -> list[Row]:
    """The methods whose every seed is there; none where plain's are not."""
    rows = []
    for method in METHODS:
        runs, trial = outcome(final(results, method, cell)), outcome(tuned(results, method, cell))
        if runs and all(run.key in results for run in runs):
            rows.append(Row(method, trial, runs, values_of(results, runs)))
        elif method.name == PLAIN:
            return []
    return rows


def difference(ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]], measure: Measure) -> Paired:
    """Of two methods by seed in one measure, of logarithms where it spans decades."""
    change = math.log if measure.ratio else float
    return paired(*([change(v) for v in values[measure.key]] for values in (ours, theirs)))


def comparisons(rows: Sequence[Row], measure: Measure) -> dict[str, tuple[Paired, float]]:
    """Each method against plain, with the p-value that Holm's way gives for the methods of these rows together."""
    values = {row.method.name: row.values for row in rows}
    names = [name for name in values if name != PLAIN]
    found = [difference(values[name], values[PLAIN], measure) for name in names]
    return dict(zip(names, zip(found, holm([f.p for f in found]), strict=True), strict=True))


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as a table has them; what is off is left out."""
    shown = {k: v for k, v in settings.items() if not (k in ("lambda_s", "mu") and not v)}
    if shown.get("decay") is not None and shown.get("decay") == shown.get("decay_late"):
        shown.pop("decay_late")
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()) or "no term"


def weights_text(average: float) -> str:
    """Which weights are measured."""
    if average < 0:
        return "teacher"
    return f"average over {100 * average:g} % of the steps" if average else "model"


def p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}" if p >= 1e-3 else f"{p:.0e}"


def difference_text(found: Paired, measure: Measure) -> str:
    """Mean and interval; factors where it is ratios."""
    numbers = found.mean, found.low, found.high
    if measure.ratio:
        mean, low, high = (f"{math.exp(x):.2g}" for x in numbers)
        return f"× {mean} [{low}, {high}]"
    mean, low, high = (f"{x:+{measure.form}}" for x in numbers)
    return f"{mean} [{low}, {high}]"


# ----------------------------------------------------------------------------------------------------- tables


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell_title(cell: Cell) -> str:
    task = {"trec": "TREC-6", "stsb": "STS-B"}[cell.task]
    noise = f", {100 * cell.noise:g} % wrong labels" if cell.noise else ""
    return f"{task}, {cell.size} examples{noise}"


def score_table(rows: Sequence[Row], cell: Cell) -> str:
    """Score on the test set, and its difference from plain."""
    measure = MEASURES[cell.task][0]
    against = comparisons(rows, measure)
    lines = []
    for row in rows:
        values = row.values[measure.key]
        difference, p, up = "", "", ""
        if row.method.name in against:
            found, corrected = against[row.method.name]
            difference, p, up = difference_text(found, measure), p_text(corrected), f"{found.up} of {found.seeds}"
        cost = f"{passes(row.trial.settings) * row.trial.epochs / rows[0].trial.epochs:.2f}"
        tuning = f"{row.trial.lr:g}, {row.trial.epochs}"
        name, text = row.method.name, settings_text(row.trial.settings)
        mean = f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
        share = statistics.fmean(row.values["share"])
        term = f"{share:.0e}" if share else ""
        lines.append([name, text, tuning, str(len(values)), mean, difference, p, up, term, cost])
    columns = ["method", "settings", "lr, epochs", "seeds", measure.title, "against plain [95 %]", "p", "up"]
    return markdown([*columns, "λ_s R_s / task loss", "cost"], lines)


def other_table(rows: Sequence[Row], cell: Cell) -> str:
    """All else that is measured; a star where the difference from plain is beyond chance."""
    measures = MEASURES[cell.task][1:]
    against = {measure: comparisons(rows, measure) for measure in measures}
    lines = []
    for row in rows:
        line = [row.method.name]
        for measure in measures:
            mean = statistics.fmean(row.values[measure.key])
            text = f"{mean:{measure.form}}"
            if row.method.name in against[measure]:
                found, p = against[measure][row.method.name]
                text = f"{text} ({difference_text(found, measure)}){'*' if p < SIGNIFICANT else ''}"
            line.append(text)
        lines.append(line)
    return markdown(["method", *(measure.title for measure in measures)], lines)


def development_table(results: Results, cell: Cell) -> str:
    """Every trial of a cell whose seeds are there, the best first; empty where there is none."""
    seeds: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for key, result in results.items():
        run = Run(**json.loads(key))
        if run.part == "dev" and (run.task, run.size, run.noise) == cell:
            seeds[dataclasses.replace(run, seed=0).key][run.seed] = result["measured"]
    chosen = defaultdict(list)
    for method in METHODS:
        if (trial := outcome(tuned(results, method, cell))) is not None:
            chosen[trial_key(trial)].append(method.name)
    lines = []
    for key, by_seed in seeds.items():
        if set(by_seed) != set(TUNING_SEEDS):
            continue
        run = Run(**json.loads(key))
        for kind in by_seed[TUNING_SEEDS[0]]:
            trial = Trial(run.settings, run.lr, run.epochs, float(kind))
            scores = [one[kind]["score"] for one in by_seed.values()]
            nll = statistics.fmean(one[kind].get("nll", one[kind].get("mse", math.nan)) for one in by_seed.values())
            texts = [settings_text(run.settings), weights_text(float(kind)), f"{run.lr:g}", str(run.epochs)]
            texts += [f"{statistics.fmean(scores):.1f} ± {statistics.stdev(scores):.1f}", f"{nll:.3f}"]
            lines.append((-statistics.fmean(scores), [*texts, ", ".join(chosen[trial_key(trial)])]))
    if not lines:
        return ""
    score, loss = MEASURES[cell.task][0].title, "MSE" if cell.task == "stsb" else "NLL"
    columns = ["settings", "weights", "lr", "epochs", score, loss, "chosen for"]
    return markdown(columns, [line for _, line in sorted(lines, key=lambda line: line[0])])


def edge_text(results: Results, cell: Cell) -> str:
    """Which pair is plain's, and whether better ones may lie beyond the grid."""
    best, plain = outcome(best_of_grid(results, cell)), outcome(tuned(results, METHODS[0], cell))
    if plain is None:
        return "Plain fine-tuning is not tuned yet."
    tried = zip(*plain_pairs(best, cell), strict=True)
    pairs = zip(("learning rate", "number of epochs"), (plain.lr, plain.epochs), tried, strict=True)
    ends = [name for name, value, tried in pairs if not min(tried) < value < max(tried)]
    verb = "lie" if len(ends) > 1 else "lies"
    beyond = f"; its {' and '.join(ends)} {verb} at an end of what was tried" if ends else ""
    return f"Plain fine-tuning is best at {plain.lr:g}, {plain.epochs} epochs{beyond}."


def trial_key(trial: Trial) -> str:
    return json.dumps(trial, sort_keys=True)


def screened_out(results: Results) -> list[str]:
    """Which methods did not come to the test set, and by what figure."""
    lines = []
    for method in METHODS:
        if outcome(is_finalist(results, method, HOME)) is False:
            own, plain = (
                development_score(results, HOME, outcome(tuned(results, m, HOME))) for m in (method, METHODS[0])
            )
            lines.append(f"{method.name} ({cell_title(HOME)}): {own:.1f} on development data, plain {plain:.1f}")
    return lines


def verdicts(rows: Sequence[Row], cell: Cell) -> list[str]:
    """A line for each method: what of it is beyond chance, gains and losses; and what is not."""
    lines = []
    for row in rows[1:]:
        texts: dict[str, list[str]] = {"better": [], "worse": []}
        for measure in MEASURES[cell.task]:
            found, p = comparisons(rows, measure)[row.method.name]
            if p < SIGNIFICANT:
                kind = "better" if (found.mean > 0) == measure.more else "worse"
                texts[kind].append(f"{measure.title} {difference_text(found, measure)}")
        parts = [f"{kind}: {'; '.join(found)}" for kind, found in texts.items() if found]
        lines.append(f"**{row.method.name}** — {'. '.join(parts) or 'nothing beyond chance'}.")
    values = {row.method.name: row.values for row in rows}
    dear = named(LONGER).spends
    if {LONGER, dear} <= values.keys():
        lines.append(f"**{dear}**, against {as_dear(values[dear], values[LONGER], cell)}")
    return lines


def as_dear(ours: Mapping[str, list[float]], longer: Mapping[str, list[float]], cell: Cell) -> str:
    """How a method does against plain fine-tuning that takes as many passes, in every measure but R_s."""
    parts = []
    for measure in MEASURES[cell.task]:
        if not measure.ratio:
            found = difference(ours, longer, measure)
            parts.append(f"{measure.title} {difference_text(found, measure)} (p {p_text(found.p)})")
    return f"{LONGER} (uncorrected): {'; '.join(parts)}."


PROTOCOL = f"""\
- **Model and data.** MiniLM-L6-H384 (22.7 M parameters), batches of 16 texts, those of like
  length among {GROUPED} batches together, Adam, linear decay after 10 % warm-up,
  gradients clipped at 1. TREC-6 (six kinds of questions, 1 423 to test on) and STS-B (similarity of two sentences,
  1 379 pairs to test on).
  A seed gives training examples, head, order and dropout masks; all methods share them.
- **Tuning.** {DEVELOPMENT} examples are split from the training pool, and {len(TUNING_SEEDS)} seeds that no final run
  has are measured on them. Everything is chosen on TREC-6 with {HOME.size} examples: plain fine-tuning is tuned over
  {len(grid(HOME))} pairs of learning rate and epochs; a method's settings are screened with the best of these, one
  coordinate after the other, then its pair is tuned over {len(NEIGHBOURS)}: that one, and factors on it of
  {", ".join(f"({rate:g}, {epochs})" for rate, epochs in NEIGHBOURS[1:])}; plain's, too, beside those.
  In every other cell plain alone is tuned, over four to six pairs; the others take the settings that were chosen for
  them, and plain's pair times the factors that were best for them. Plain fine-tuning is also run for as many passes
  as the smoothness term costs, at the better of {len(LONGER_RATES)} rates: plain's times
  {" and ".join(f"{rate:g}" for rate in LONGER_RATES)}.
  `study_plan.py` has it in one screen; `pick` is the only place where anything is chosen.
- **Test.** On TREC-6 with {HOME.size} examples plain, its average, longer plain and the paper's SMART go to the test
  set, and of all others what is no more than {MARGIN:g} points behind plain on development data. Everywhere else go
  plain, longer plain, the paper's SMART, and each of its terms alone, whatever any data say. 10 seeds, at 1 000
  examples 5. What is better than plain beyond chance in its score is run again, with as many further seeds. R_s at 50
  examples was (p 0.044) before longer plain came into the tables, with which the correction is for one method more.
- **Statistics.** Differences from plain by seed, with 95 % confidence intervals and p-values of the paired t-test.
  The p-values are corrected by Holm's way for the methods of a table, each measure for itself; the intervals are not. A
  star means p < {SIGNIFICANT}. With wrong labels among the training examples, those of the development set are right.
- **Measures.** Score; calibration (NLL, ECE in 15 bins); the score where letters are dropped or swapped (5 %, 10 %) or
  words dropped (10 %), on the first {CORRUPTED} test examples; R_s reached by 20 steps of sign ascent in the l_inf ball
  around the word embeddings. Cost: passes of a whole training over those of plain's.
"""


def document(results: Results, drawn: bool) -> str:
    """docs/study.md, with its figure where there is one."""
    runs = remaining(results)
    parts = [
        "# Does SMART help? Few-shot fine-tuning, every method tuned",
        f"{len(results)} runs are done. Still to run: {len(runs)} at most, about {core_hours(results, runs):.0f} hours "
        "of a core. Rows that are not complete are left out.",
        "```bash\n"
        "pip install -e '.[bench]'\n"
        "python benchmarks/study.py            # goes on with the runs\n"
        "python benchmarks/study.py --report   # this page and its figure from the runs in study_runs.jsonl.gz\n"
        "python benchmarks/study.py --quick    # some rows again with other seeds, in minutes\n"
        "```",
        *(["![accuracy over training size, and with typos](study.png)"] if drawn else []),
        "## Protocol",
        PROTOCOL.rstrip(),
        "## On the test set",
    ]
    any_row = False
    for cell in CELLS:
        if rows := finished(results, cell):
            any_row = True
            parts += [f"### {cell_title(cell)}", score_table(rows, cell)]
            parts += [other_table(rows, cell)]
            if lines := verdicts(rows, cell):
                parts += ["\n".join(f"- {line}" for line in lines)]
    if not any_row:
        parts += ["No row is complete yet."]
    for cell, name in REPEATED:
        runs_again = outcome(repeated(results, (*BESIDE, name), cell, further_seeds(cell)))
        if runs_again and all(run.key in results for chosen in runs_again.values() for run in chosen):
            table = markdown(again_columns(cell, runs_again), again(results, results, runs_again, cell))
            values = {method: values_of(results, chosen) for method, chosen in runs_again.items()}
            against = f"{name}, against {as_dear(values[name], values[LONGER], cell)}"
            parts += [f"## Found again? {name}", table, against]
    if lines := screened_out(results):
        parts += ["## Screened out", "\n".join(f"- {line}" for line in lines)]
    parts += ["## On development data", f"Mean and standard deviation over {len(TUNING_SEEDS)} seeds of every trial."]
    for cell in CELLS:
        if table := development_table(results, cell):
            parts += [f"### {cell_title(cell)}", edge_text(results, cell), table]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------- figure


def figure(results: Results) -> Any:
    """Score over training size, and over the share of typos at one size, on TREC; None without matplotlib or rows."""
    sizes = sorted(size for task, size, noise in CELLS if task == "trec" and not noise)
    rows = {size: finished(results, Cell("trec", size)) for size in sizes}
    sizes = [size for size in sizes if rows[size]]
    known = {row.method.name for size in sizes for row in rows[size]}
    names = [name for name in DRAWN if name in known]
    with plotting() as plt:
        if plt is None or not names:
            return None
        palette = dict(zip(DRAWN, ("#222222", COLOURS[0], COLOURS[1], OUR_COLOUR, *COLOURS[2:]), strict=False))
        drawn, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6))
        place = HOME.size if HOME.size in sizes else sizes[0]
        for number, name in enumerate(names):
            found = {s: r.values for s in sizes for r in rows[s] if r.method.name == name}
            # side by side, that intervals do not hide each other
            shift = number - len(names) / 2
            draw(left, [s * 1.03**shift for s in found], [v["score"] for v in found.values()], palette[name])
            if place in found:
                keys = "score", "typos_5_score", "typos_10_score"
                draw(right, [x + 0.25 * shift for x in (0, 5, 10)], [found[place][key] for key in keys], palette[name])
        left.set_xscale("log")
        left.set_xticks(sizes, [str(size) for size in sizes])
        left.minorticks_off()
        left.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
        left.set_xlabel("training examples")
        left.set_ylabel("test accuracy, %")
        left.set_title("accuracy")
        right.set_xticks([0, 5, 10], ["0 %", "5 %", "10 %"])
        right.set_xlabel("letters dropped or swapped")
        right.set_title(f"with typos, {place} training examples")
        seeds = " and ".join(sorted({str(len(r.runs)) for s in sizes for r in rows[s]}, key=int, reverse=True))
        caption = f"MiniLM-L6, every method tuned on development data · means of {seeds} seeds, 95 % intervals"
        handles = [plt.Line2D([], [], color=palette[name], linewidth=2.2, marker="o", markersize=4) for name in names]
        finish(drawn, "Few-shot fine-tuning on TREC-6", caption, handles, names)
        return drawn


def draw(axis: Any, xs: Sequence[float], samples: Sequence[Sequence[float]], colour: str) -> None:
    """Means, joined, and a band of their intervals."""
    lows, highs = zip(*map(interval, samples), strict=True)
    axis.plot(xs, [statistics.fmean(s) for s in samples], color=colour, linewidth=2, marker="o", markersize=4)
    axis.fill_between(xs, lows, highs, color=colour, alpha=0.12, linewidth=0)
    axis.vlines(xs, lows, highs, color=colour, linewidth=1.2)


def write(results: Results, folder: Path) -> str:
    """study.md and study.png in a folder; says what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figure(results)
    (folder / "study.md").write_text(document(results, drawn is not None), encoding="utf-8")
    if drawn is None:
        return f"{folder / 'study.md'} written; no figure, for want of matplotlib or of complete rows"
    drawn.savefig(folder / "study.png", bbox_inches="tight", pad_inches=0.2, facecolor="white")
    return f"{folder / 'study.md'} and study.png written"


# ------------------------------------------------------------------------------------------------ the quick look


def quick_runs(results: Results, seeds: Sequence[int]) -> dict[str, list[Run]]:
    """Runs of some methods with other seeds, by method: as they are tuned or, before that, with the first pair."""
    first = grid(HOME)[0]
    trials = {m.name: outcome(tuned(results, m, HOME)) or Trial(m.settings, *first) for m in map(named, QUICK)}
    return {name: final_runs(trial, HOME, seeds) for name, trial in trials.items()}


def again(study: Results, results: Results, runs: Mapping[str, Sequence[Run]], cell: Cell) -> list[list[str]]:
    """What was found with other seeds, by measure and method, beside the study's interval."""
    rows = finished(study, cell)
    complete = {row.method.name for row in rows}
    new = {name: values_of(results, chosen) for name, chosen in runs.items()}
    lines = []
    for measure in MEASURES[cell.task]:
        for name, values in new.items():
            text = f"{statistics.fmean(values[measure.key]):{measure.form}}"
            if name == PLAIN:
                lines.append([measure.title, name, text, "", "", ""])
                continue
            found = difference(values, new[PLAIN], measure)
            known = difference_text(comparisons(rows, measure)[name][0], measure) if name in complete else "not yet"
            lines.append(["", name, text, difference_text(found, measure), p_text(found.p), known])
    return lines


def again_columns(cell: Cell, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    seeds = len(next(iter(runs.values())))
    return [cell_title(cell), "method", "mean", f"against plain, {seeds} new seeds", "p", "in the study"]


def quick_table(study: Results, results: Results, runs: Mapping[str, Sequence[Run]]) -> str:
    """What was found with other seeds, for a terminal."""
    lines: list[list[str] | None] = []
    for line in again(study, results, runs, HOME):
        lines += [*([None] if line[0] and lines else []), line]
    shares = {name: values_of(results, chosen)["share"] for name, chosen in runs.items()}
    text = ", ".join(f"{name} {statistics.fmean(each):.0e}" for name, each in shares.items() if any(each))
    return f"{format_table(again_columns(HOME, runs), lines)}\n\nλ_s R_s over the task loss in the last epoch: {text}"

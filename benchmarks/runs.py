"""Several runs of one benchmark together: the range of every ratio, and the figure of all of them.

    python benchmarks/runs.py RUN/bench_kl.json RUN/bench_kl.json ... [--figure speed.png]

A run is the JSON that bench_kl, bench_perturbation or bench_ema wrote, with any cases; all of one benchmark, on
machines of one kind. What memory a run finds, and what else the machine does, decides as much as the code: state
ranges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import format_table, headline, outcome_rows, outcomes, read_cases, speed_figure


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What the files hold.

    Raises:
        ValueError: a file holds no run, or runs are of two benchmarks or of two kinds of machines.
    """
    runs = []
    for path in paths:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            _ = run["benchmark"], run["title"], run["machine"]["versions"]["torch"], run["cases"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: expected the JSON of a benchmark, got {got}") from error
        runs.append(run)
    for path, run in zip(paths, runs, strict=True):
        for what, mine, first in (
            ("benchmark", run["benchmark"], runs[0]["benchmark"]),
            ("machine", machine_of(run), machine_of(runs[0])),
        ):
            if mine != first:
                raise ValueError(f"{path}: got {what} {mine!r}, expected that of {paths[0]}, {first!r}")
    return runs


def machine_of(run: dict[str, Any]) -> str:
    """Processor or card, threads and torch; not the day."""
    return headline(run["machine"]).rpartition(" · ")[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="JSON", help="as the benchmark wrote it")
    parser.add_argument("--figure", type=Path, help="where to write the figure")
    args = parser.parse_args(argv)
    try:
        runs = read(args.runs)
    except ValueError as error:
        parser.error(str(error))
    cases = [read_cases(run) for run in runs]
    days = sorted({run["machine"]["date"][:10] for run in runs})
    caption = f"{machine_of(runs[0])} · {len(runs)} runs · {' to '.join(dict.fromkeys((days[0], days[-1])))}"
    print(f"{caption}\n\n{format_table(*outcome_rows(outcomes(cases)))}")
    if args.figure:
        figure = speed_figure(cases, runs[0]["title"], caption)
        if figure is None:
            parser.error("--figure: matplotlib is not installed, or there is nothing to draw")
        figure.savefig(args.figure, bbox_inches="tight", pad_inches=0.2, facecolor="white")


if __name__ == "__main__":
    main()

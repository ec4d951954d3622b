"""Does SMART help? A study of few-shot fine-tuning that tunes every method, plain fine-tuning first and most.

    python benchmarks/study.py                  # goes on where the file of runs ends, a process on each core
    python benchmarks/study.py --processes 4
    python benchmarks/study.py --report         # packs the file; tables, docs/study.md and docs/study.png from it
    python benchmarks/study.py --quick          # in minutes, with other seeds: does the main finding come out again?

MiniLM on TREC-6 and STS-B, 50 to 1 000 training examples, with and without wrong labels. It can be killed at any time.
study_plan.py has what is compared and how it is chosen, study_run.py what a run is, study_report.py the statistics.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import real_data
import study_plan
import study_report
from harness import progress_bar
from study_run import Run, execute

QUICK_SEEDS = range(1000, 1003)
"""That no run of the study has."""


def work(
    lacking: Callable[[dict[str, Any]], Iterable[Run]],
    results: dict[str, Any],
    file: Path,
    processes: int,
    total: int,
) -> None:
    """Execute runs until none is lacking, each in a process of one thread; a line is written when it is done."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=ignore_interrupts)
    pending: dict[Future[dict[str, Any]], Run] = {}
    with pool, progress_bar(total, "study") as report:
        try:
            while True:
                busy = {run.key for run in pending.values()}
                waiting = (run for run in lacking(results) if run.key not in busy)
                for run in _first(waiting, processes - len(pending)):
                    pending[pool.submit(execute, run)] = run
                if not pending:
                    return
                for done in wait(pending, return_when=FIRST_COMPLETED).done:
                    run = pending.pop(done)
                    results[run.key] = done.result()
                    study_plan.append(file, run, results[run.key])
                    score = study_report.score_of(run, results[run.key])
                    report(f"{run.task} {run.size}, {run.part}, seed {run.seed}: {score:.1f}")
        except KeyboardInterrupt:
            for process in active_children():
                process.terminate()
            raise


def ignore_interrupts() -> None:
    """The keys Ctrl and C are for the process that waits for the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _first(runs: Iterator[Run], count: int) -> list[Run]:
    return [run for run, _ in zip(runs, range(count), strict=False)] if count else []


def quick(processes: int) -> str:
    """Some methods as they are tuned, at one size, with seeds that have chosen nothing."""
    study = study_plan.read(study_plan.PACKED, study_plan.GROWING)
    file = study_plan.GROWING.with_name("study_quick.jsonl")
    runs = study_report.quick_runs(study, QUICK_SEEDS)
    wanted = [run for of_method in runs.values() for run in of_method]
    file.unlink(missing_ok=True)
    results: dict[str, Any] = {}
    work(lambda known: [run for run in wanted if run.key not in known], results, file, processes, len(wanted))
    return study_report.quick_table(study, results, runs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--processes", type=int, default=cores, help="side by side, of one thread (%(default)s)")
    parser.add_argument("--report", action="store_true", help="pack the file of runs, write docs/study.md and .png")
    parser.add_argument("--quick", action="store_true", help="repeat the main finding with other seeds")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes: got {args.processes}, expected at least 1")
    if not args.report:
        try:
            for fetched in (real_data.minilm_path, real_data.load_trec, real_data.load_stsb):
                fetched()
        except real_data.UnavailableError as error:
            sys.exit(f"Neither in the cache nor to be fetched: {error}")
    if args.quick:
        print(quick(args.processes))
        return
    results = study_plan.read(study_plan.PACKED, study_plan.GROWING)
    if args.report:
        study_plan.pack(results, study_plan.PACKED)
        print(study_report.write(results, study_plan.PACKED.parent))
        return
    runs = study_plan.remaining(results)
    hours = study_plan.core_hours(results, runs)
    print(f"{len(results)} runs are there, {len(runs)} to come: about {hours:.1f} hours of a core", file=sys.stderr)
    work(study_plan.plan, results, study_plan.GROWING, args.processes, len(runs))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")

"""What every benchmark here is made of: peers that take turns, the limit beside them, table, JSON, plots.

A benchmark builds a list of `Peer`s, calls `measure` once per case, collects the `Case`s in a `Report` and
saves it. Nothing here asserts a time, and nothing here knows what is being measured:

    report = Report("bench_thing", arguments=vars(args))
    peers = [Peer("eager, product", product, "eager"), Peer("eager, kl_div", kl_div, "eager"), Peer(OURS, ours)]
    with progress_bar(len(shapes) * measure_steps(peers), "thing") as progress:
        for shape in shapes:
            make = lambda: (torch.randn(shape), torch.randn(shape))
            report.add(measure(label, peers, make, bytes_moved=..., outputs=1, baselines=["eager"], progress=progress))
    print(report.table())
    report.save(args.out, {"speed": report.speed_figure()})

There are several spellings of most things, and none is the fastest for all shapes. Peers of one kind are spellings of
the same; in each case the fastest of a kind stands for it, by name, in every ratio. `runs.py` puts several runs
together.

Tables of other figures are made with `format_table` and go to `report.texts`, the figures themselves to
`report.figures`; other plots are drawn within `plotting()` and get their titles and legend from `finish`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import smart_kernels

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "smart_kernels"
CACHED_BYTES = 1 << 20
"""Inputs up to this size lie in cache for a user too: whatever made them has just written them."""

SLOT_S = 1e-3
"""A peer's turn lasts about so long: several calls where they are short."""

COPY_FRESH, COPY_REUSED = "copy, fresh memory", "copy, reused memory"


# ---------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Peer:
    """One way of doing the work: a name for the table, what is called with a tuple of inputs, and what it is a way of.

    Peers of one kind do the same by the same means, spelled otherwise: "eager, two kl_div" and "eager, product" are of
    the kind "eager". Without one, the name is the kind.
    """

    name: str
    call: Callable[..., object]
    kind: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.name)


def spelling(name: str, kind: str) -> str:
    """A peer's name without its kind: "product" for "eager, product", nothing where the kind is the name."""
    return name.removeprefix(kind).removeprefix(", ")


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one peer, over all rounds; bytes allocated at its peak beyond what stood before."""

    name: str
    kind: str
    median: float
    lower: float
    upper: float
    rounds: int
    calls_per_round: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Case:
    """All that was measured on one set of inputs; `baselines` are the kinds of peers that speed-ups refer to."""

    label: str
    group: str
    baselines: tuple[str, ...]
    bytes_moved: int | None
    timings: list[Timing]
    copies: list[Timing]
    skipped: dict[str, str] = field(default_factory=dict)

    def timing(self, name: str) -> Timing | None:
        """The timing of a peer; None where it was skipped."""
        return next((t for t in self.timings if t.name == name), None)

    def fastest(self, kind: str) -> Timing | None:
        """Of the spellings of one kind the one with the least median; None where all were skipped."""
        return min((t for t in self.timings if t.kind == kind), key=lambda t: t.median, default=None)

    def speed_up(self, name: str, over: str) -> float:
        """How many times faster a peer's median is than that of the fastest of a kind; NaN where one is missing."""
        ours, theirs = self.timing(name), self.fastest(over)
        return theirs.median / ours.median if ours and theirs else math.nan

    def speed_ups(self, over: str) -> dict[str, float]:
        """`speed_up` of every peer."""
        return {timing.name: self.speed_up(timing.name, over) for timing in self.timings}

    def share_of_limit(self, name: str) -> float:
        """Time of the plain copy of the bytes that any version must move, over the peer's time."""
        ours = self.timing(name)
        return self.copies[0].median / ours.median if ours and self.copies else math.nan


def measure(
    label: str,
    peers: Sequence[Peer],
    inputs: Callable[[], tuple[Any, ...]],
    *,
    baselines: Sequence[str],
    group: str = "",
    bytes_moved: int | None = None,
    outputs: int = 0,
    device: str = "cpu",
    budget_s: float = 2.0,
    min_rounds: int = 5,
    progress: Callable[[str], object] = lambda text: None,
) -> Case:
    """Time peers that take turns in one process.

    A round calls every peer once (small inputs: as often as fills `SLOT_S`), and each round begins with
    another peer, so that a change of the machine's pace hits all of them alike. Rounds go on until the budget
    is spent. Beside the peers runs the limit: a plain copy of as many bytes as any version must move, half of
    them read and half written, into as many newly allocated tensors as an out-of-place op returns (fresh
    memory costs page faults that no op can avoid) or, for an op in place, into a tensor that stands.

    On CUDA a call is timed by events, with the L2 cache flushed before it; where the inputs are small,
    several calls in a row are timed, so that the overhead of the launch counts.

    Args:
        label: names the case in table and plot, for instance its shape.
        peers: who takes part. One that raises is left out, with its reason in `skipped`.
        inputs: makes one set of inputs. Sets are made until together they exceed the cache twice, and calls
            rotate through them; sets of less than `CACHED_BYTES` are used as they are.
        baselines: the kinds of peers that speed-ups refer to, each by its fastest, a column each; plots take the first.
        group: cases of one group share a panel of the plot, for instance a dtype.
        bytes_moved: bytes read plus bytes written by any version; None where no copy is the limit.
        outputs: how many tensors any version allocates and returns; 0 for an op in place.
        device: where the inputs lie.
        budget_s: seconds to spend on the rounds, exceeded where `min_rounds` take longer.
        min_rounds: rounds to do at least.
        progress: called with what is being done, `measure_steps(peers)` times.

    Returns:
        The timings of all peers that ran, and those of the copies (`Case.copies[0]` is the limit).
    """
    sets = [inputs()]
    size = sum(x.nbytes for x in tree_leaves(sets[0]) if isinstance(x, torch.Tensor))
    small = size <= CACHED_BYTES
    if not small:
        sets += [inputs() for _ in range(min(16, 2 * cache_bytes(device) // size))]

    alive, skipped, peaks = [], {}, {}
    for peer in peers:
        progress(f"{label} {group}: {peer.name}")
        try:
            peer.call(*sets[0])  # compiles, and warms up
            peaks[peer.name] = peak_bytes(lambda peer=peer: peer.call(*sets[0]), device)  # type: ignore[misc]
            alive.append(peer)
        except Exception as error:  # a peer is a guest: whatever it throws, the others go on
            skipped[peer.name] = first_line(error)
    copies = copy_peers(bytes_moved, outputs, len(sets), device) if bytes_moved else []
    progress(f"{label} {group}: rounds")
    clock = _CudaClock(device, flush=not small) if torch.device(device).type == "cuda" else _cpu_clock
    samples, calls = rounds([*alive, *copies], sets, clock, budget_s=budget_s, min_rounds=min_rounds, single=not small)
    kinds = {peer.name: peer.kind for peer in (*alive, *copies)}
    timings = [summarise(name, times, calls[name], peaks.get(name), kinds[name]) for name, times in samples.items()]
    return Case(label, group, tuple(baselines), bytes_moved, timings[: len(alive)], timings[len(alive) :], skipped)


def measure_steps(peers: Sized) -> int:
    """How often `measure` reports progress: once a peer, and once for the rounds."""
    return len(peers) + 1


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {text[:150]}"


def rounds(
    peers: Sequence[Peer],
    sets: Sequence[tuple[Any, ...]],
    clock: Callable[[Callable[[], object], int], float],
    *,
    budget_s: float,
    min_rounds: int,
    single: bool,
    max_rounds: int = 2000,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Let the peers take turns; returns seconds per call, and calls per round, of each.

    Args:
        peers: who takes part, each with a name of its own.
        sets: sets of inputs; each call takes the next.
        clock: calls a function so many times and returns the seconds that all of them took.
        budget_s: stop when the clock has counted this much.
        min_rounds: but not before so many rounds.
        single: one call a round, however short.
        max_rounds: stop here in any case.
    """
    turn = itertools.cycle(sets)

    def caller(peer: Peer) -> Callable[[], object]:
        return lambda: peer.call(*next(turn))

    calls = {}
    for peer in peers:
        once = math.inf if single else min(clock(caller(peer), 1) for _ in range(5))
        calls[peer.name] = max(1, min(1000, math.ceil(SLOT_S / max(once, 1e-9))))
    samples: dict[str, list[float]] = {peer.name: [] for peer in peers}
    spent = 0.0
    for number in range(max_rounds if peers else 0):
        if number >= min_rounds and spent >= budget_s:
            break
        first = number % len(peers)
        for peer in [*peers[first:], *peers[:first]]:
            seconds = clock(caller(peer), calls[peer.name])
            samples[peer.name].append(seconds / calls[peer.name])
            spent += seconds
    return samples, calls


def summarise(
    name: str, seconds: Sequence[float], calls_per_round: int, peak: int | None = None, kind: str = ""
) -> Timing:
    """Median and quartiles of one peer's seconds per call."""
    several = seconds if len(seconds) > 1 else [*seconds, *seconds]
    lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
    return Timing(name, kind or name, median, lower, upper, len(seconds), calls_per_round, peak)


def _cpu_clock(call: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - begin


class _CudaClock:
    """Seconds on the device between two events around the calls; the L2 cache is overwritten before if asked."""

    def __init__(self, device: str, flush: bool) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.trash = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device) if flush else None

    def __call__(self, call: Callable[[], object], times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.trash is not None:
            self.trash.zero_()
        begin.record(self.stream)
        for _ in range(times):
            call()
        end.record(self.stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def copy_peers(bytes_moved: int, outputs: int, sets: int, device: str) -> list[Peer]:
    """The limit first: plain copies that move as many bytes, half read and half written.

    Args:
        bytes_moved: bytes read plus bytes written.
        outputs: in how many tensors; 0 where nothing is allocated.
        sets: how many sets of memory the copies rotate through, as the peers do through their inputs.
        device: where the memory lies.
    """
    each = max(1, bytes_moved // (2 * max(1, outputs)))

    def memory() -> Iterator[list[torch.Tensor]]:
        buffers = [
            [torch.zeros(each, dtype=torch.uint8, device=device) for _ in range(outputs or 1)] for _ in range(sets)
        ]
        return itertools.cycle(buffers)

    sources, targets = memory(), memory()
    reused = Peer(COPY_REUSED, lambda *_: [t.copy_(s) for t, s in zip(next(targets), next(sources), strict=True)])
    fresh = Peer(COPY_FRESH, lambda *_: [source.clone() for source in next(sources)])
    return [fresh, reused] if outputs else [reused]


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that PyTorch's allocator handed out at the peak of one call, beyond what stood before it.

    What a call returns is counted. On the CPU the profiler's allocation events are summed, which every tensor
    of PyTorch, of a compiled graph and of an extension goes through; plain malloc in C++ does not show. What our
    kernels keep for their next results is given back before, so that it is allocated in sight; what they keep during
    the call counts as standing.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return int(torch.cuda.max_memory_allocated(device) - before)
    smart_kernels.empty_cache()
    with _quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    del kept
    events = profile.kineto_results.events()
    changes = sorted((e.start_ns(), place, e.nbytes()) for place, e in enumerate(events) if e.name() == "[memory]")
    standing: Iterator[int] = itertools.accumulate((change for *_, change in changes), initial=0)
    return max(standing)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler of some versions announces itself on the process's own stderr."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; 32 MiB where the machine does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


# -------------------------------------------------------------------------------------- the machine, tables


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to know of the machine, the versions and the date."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "numpy", "liger-kernel", "smart-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions.setdefault("smart-kernels", smart_kernels.__version__)
    described: dict[str, Any] = {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": cache_bytes("cpu"),
        "compiled_kernels": {module: why or "loaded" for module, why in smart_kernels.COMPILED.items()},
        "versions": versions,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return described


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def headline(described: Mapping[str, Any]) -> str:
    """One line of `machine()` for the head of a table."""
    where = f"{described['cpu']}, {described['cores']} cores, {described['threads']} threads, {described['isa']}"
    if "gpu" in described:
        where = described["gpu"]["name"]
    return f"{where} · torch {described['versions']['torch']} · {described['date'][:10]}"


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str] | None]) -> str:
    """Text columns, the first two to the left and all others to the right; None draws a line."""
    widths = [max(len(line[i]) for line in (columns, *filter(None, rows))) for i in range(len(columns))]

    def render(cells: Sequence[str]) -> str:
        aligned = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned).rstrip()

    line = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([render(columns), line, *(line if row is None else render(row) for row in rows)])


def quartiles_text(timing: Timing) -> str:
    """The two quartiles: half of all rounds lie between."""
    return f"{seconds_text(timing.lower)} … {seconds_text(timing.upper)}"


def seconds_text(seconds: float) -> str:
    """A time in the unit that keeps it short: 12.3 µs."""
    for unit in ("s", "ms"):
        if seconds >= 0.9995:
            return f"{three_digits(seconds)} {unit}"
        seconds *= 1000
    return f"{three_digits(seconds)} µs"


def bytes_text(size: float | None) -> str:
    """A size in the unit that keeps it short: 125 MB."""
    if size is None:
        return "–"
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 999.5:
            return f"{three_digits(size)} {unit}"
    return f"{three_digits(size / 1000)} GB"


def ratio_text(ratio: float) -> str:
    """A speed-up: 3.42×."""
    return "–" if math.isnan(ratio) else f"{three_digits(ratio)}×"


def three_digits(value: float) -> str:
    """At most two decimals, and three digits where that allows: 0.02, 1.23, 12.3, 123."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


LEGEND = """\
× eager and the like: times faster than the fastest of that kind, which is the one at 1.00×
quartiles: half of all rounds lie between · must move: bytes read and written by any version · of copy: time of a
plain copy of that many bytes over the median · peak extra: allocated at the peak, beyond the inputs"""


def case_rows(cases: Sequence[Case]) -> tuple[list[str], list[list[str] | None]]:
    """Columns and rows of the table of timings: a block per case, the copies at its end."""
    baselines = list(dict.fromkeys(name for case in cases for name in case.baselines))
    columns = ["case", "peer", "median", "quartiles", *(f"× {name}" for name in baselines)]
    columns += ["must move", "of copy", "peak extra"]
    rows: list[list[str] | None] = []
    for case in cases:
        if rows:
            rows.append(None)
        head, moved = f"{case.label} {case.group}".strip(), bytes_text(case.bytes_moved)
        for timing in case.timings:
            row = [head, timing.name, seconds_text(timing.median), quartiles_text(timing)]
            row += [ratio_text(case.speed_up(timing.name, over)) for over in baselines]
            share = case.share_of_limit(timing.name)
            rows.append([*row, moved, "–" if math.isnan(share) else f"{share:.2f}", bytes_text(timing.peak_bytes)])
            head = moved = ""
        rows += [
            [head, copy.name, seconds_text(copy.median), quartiles_text(copy), *[""] * (len(columns) - 4)]
            for copy in case.copies
        ]
        rows += [[head, name, "left out", *[""] * (len(columns) - 3)] for name in case.skipped]
    return columns, rows


# ------------------------------------------------------------------------------ what runs say of us together


@dataclass(frozen=True)
class Outcome:
    """One case in one or several runs: for each kind of peers how many times faster than its best a peer of ours is.

    Attributes:
        label: of the case.
        group: of the case.
        fastest: the spelling of ours that was the fastest in most runs.
        speed_ups: by kind, a ratio for each run.
        spellings: by kind, the one that was the fastest in each run.
        shares: of the copy's time, for each run; NaN where no copy is the limit.
    """

    label: str
    group: str
    fastest: str
    speed_ups: dict[str, list[float]]
    spellings: dict[str, list[str]]
    shares: list[float]


def outcomes(runs: Sequence[Sequence[Case]], over: Sequence[str] = (), of: str = OURS) -> list[Outcome]:
    """What runs say of each case that one of them holds, in the order in which it is first met.

    Args:
        runs: the cases of each run.
        over: kinds of peers; those of the case's `baselines` if there are none.
        of: the peer that is compared; a kind stands for its fastest.
    """
    together: dict[tuple[str, str], list[Case]] = {}
    for run in runs:
        for case in run:
            together.setdefault((case.label, case.group), []).append(case)
    found = []
    for (label, group), cases in together.items():
        kinds = over or list(dict.fromkeys(kind for case in cases for kind in case.baselines))
        ours = [(case, mine) for case in cases if (mine := case.fastest(of))]
        if not ours:
            continue
        ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
        names: dict[str, list[str]] = {kind: [] for kind in kinds}
        for case, mine in ours:
            for kind in kinds:
                if theirs := case.fastest(kind):
                    ratios[kind].append(theirs.median / mine.median)
                    names[kind].append(spelling(theirs.name, kind))
        shares = [case.share_of_limit(mine.name) for case, mine in ours]
        fastest = statistics.mode(spelling(mine.name, of) for _, mine in ours)
        found.append(Outcome(label, group, fastest, ratios, names, shares))
    return found


def range_text(values: Sequence[float]) -> str:
    """The least and the most of some figures, one figure where both print alike: 2.9 to 3.4."""
    ends = [f"{end:.{1 if end < 9.95 else 0}f}" for end in (min(values), max(values))] if values else ["–"]
    return " to ".join(dict.fromkeys(ends))


def outcome_rows(found: Sequence[Outcome]) -> tuple[list[str], list[list[str] | None]]:
    """Columns and rows of a table with a line per case: ranges over the runs, and who was the fastest of each kind."""
    kinds = list(dict.fromkeys(kind for outcome in found for kind in outcome.speed_ups))
    limited = any(not math.isnan(share) for outcome in found for share in outcome.shares)
    columns = ["case", "", *(text for kind in kinds for text in (f"× best {kind}", "by")), *(["of copy"] * limited)]
    rows: list[list[str] | None] = []
    for outcome in found:
        row = [outcome.label, outcome.group]
        for kind in kinds:
            names = [name for name in dict.fromkeys(outcome.spellings.get(kind, [])) if name]
            row += [range_text(outcome.speed_ups.get(kind, [])), ", ".join(names)]
        if limited:
            shares = [share for share in outcome.shares if not math.isnan(share)]
            ends = dict.fromkeys(f"{end:.2f}" for end in (min(shares), max(shares))) if shares else {"–": None}
            row.append(" to ".join(ends))
        rows.append(row)
    return columns, rows


# ------------------------------------------------------------------------------------------------- reports


class Report:
    """What one run of a benchmark measured: prints it, and writes JSON and a figure.

    Attributes:
        name: stem of the files written.
        title: of the figure of speeds.
        arguments: how the benchmark was called.
        cases: the timings, in order.
        figures: anything else that was measured and can be written as JSON, by name.
        texts: tables and lines that are printed above the timings.
        notes: what a reader must know: what was skipped, and why.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], device: str = "cpu", title: str = "") -> None:
        self.name = name
        self.title = title
        self.arguments = dict(arguments)
        self.machine = machine(device)
        self.notes: list[str] = []
        if self.machine["load_average"] > self.machine["cores"] / 2:
            self.note(
                f"The machine was busy when this began: load {self.machine['load_average']:.1f} on "
                f"{self.machine['cores']} cores. Take the times with caution"
            )
        self.cases: list[Case] = []
        self.figures: dict[str, Any] = {}
        self.texts: list[str] = []

    def add(self, case: Case) -> None:
        """Take in a case, and a note for every peer that it had to leave out (where, says the table)."""
        self.cases.append(case)
        for peer, why in case.skipped.items():
            self.note(f"{peer} is left out: {why}")

    def note(self, text: str) -> None:
        """Keep a line for the end of the table, once."""
        if text not in self.notes:
            self.notes.append(text)

    def table(self) -> str:
        """The machine, all tables, and the notes."""
        parts = [headline(self.machine), *self.texts]
        if self.cases:
            parts += [f"{format_table(*case_rows(self.cases))}\n{LEGEND}"]
            found = outcomes([self.cases])
            parts += [format_table(*outcome_rows(found))] if found else []
        if self.notes:
            parts += ["\n".join(self.notes)]
        return "\n\n".join(parts)

    def speed_figure(self) -> Any:
        """`speed_figure` of this run."""
        return speed_figure([self.cases], self.title, headline(self.machine))

    def save(self, out: Path, plots: Mapping[str, Any] | None = None) -> list[Path]:
        """Write `<name>.json`, and `<name>_<plot>.png` for every plot that is not None; returns the paths."""
        out.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.name,
            "title": self.title,
            "arguments": self.arguments,
            "machine": self.machine,
            "cases": [
                asdict(case)
                | {"speed_up": {over: case.speed_ups(over) for over in case.baselines}}
                | {"share_of_limit": {t.name: case.share_of_limit(t.name) for t in case.timings}}
                for case in self.cases
            ],
            **self.figures,
            "notes": self.notes,
        }
        paths = [out / f"{self.name}.json"]
        paths[0].write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, figure in (plots or {}).items():
            if figure is not None:
                paths.append(out / f"{self.name}_{name}.png")
                figure.savefig(paths[-1], bbox_inches="tight", pad_inches=0.2, facecolor="white")
        return paths


def read_cases(content: Mapping[str, Any]) -> list[Case]:
    """The cases of a run from the JSON that `Report.save` wrote."""
    return [
        Case(
            case["label"],
            case["group"],
            tuple(case["baselines"]),
            case["bytes_moved"],
            [Timing(**timing) for timing in case["timings"]],
            [Timing(**timing) for timing in case["copies"]],
            case["skipped"],
        )
        for case in content["cases"]
    ]


def _plain(value: Any) -> Any:
    """JSON knows neither NaN, infinity nor paths: null and text stand for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


@contextlib.contextmanager
def progress_bar(total: int, description: str) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, moved on a step by calling what comes with the text of the next; silent without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda text: None
        return
    layout = description + " {percentage:3.0f}% |{bar:30}| {elapsed}  {desc}"
    with tqdm(total=total, leave=False, bar_format=layout) as bar:

        def step(text: str) -> None:
            bar.update()
            bar.set_description_str(text)

        yield step


# --------------------------------------------------------------------------------------------------- plots

OUR_COLOUR = "#0072B2"
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#8C8C8C")
"""Okabe and Ito's palette and a grey, told apart by colour-blind readers; ours is always the same blue."""

STYLE = {
    "figure.dpi": 160,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@contextlib.contextmanager
def plotting() -> Iterator[Any]:
    """matplotlib.pyplot in the style of all figures here, writing to files; None where it is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        yield None
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.style.context(["default", STYLE]):
        yield plt
    plt.close("all")


def colours(names: Sequence[str], ours: str) -> dict[str, str]:
    """A colour per peer, the same in every panel."""
    others = itertools.cycle(COLOURS)
    return {name: OUR_COLOUR if name == ours else next(others) for name in names}


def speed_figure(runs: Sequence[Sequence[Case]], title: str, caption: str = "") -> Any:
    """Horizontal bars: how many times faster than the first baseline each kind of peer is, a panel per group of cases.

    A kind is as fast as its fastest spelling, which stands beside its bar, the baseline's below the case. Of several
    runs the bar is the median, and a line from the least to the most lies on it.

    Args:
        runs: the cases of each run.
        title: stands above the panels.
        caption: a line under the title, for instance `headline(...)`.

    Returns:
        The figure, or None without matplotlib or with nothing to compare.
    """
    cases = [case for run in runs for case in run]
    with plotting() as plt:
        if plt is None or not any(len(case.timings) > 1 for case in cases):
            return None
        baseline = cases[0].baselines[0]
        kinds = list(dict.fromkeys(t.kind for case in cases for t in case.timings))
        kinds.sort(key=lambda kind: kind == OURS)  # ours below the others in each block
        palette = colours(kinds, OURS)  # with the baseline's, so that a kind keeps its colour from figure to figure
        kinds.remove(baseline)
        bars = {kind: outcomes(runs, [baseline], kind) for kind in kinds}
        groups = list(dict.fromkeys(case.group for case in cases))
        beaten = {(o.label, o.group): o.fastest for o in outcomes(runs, [baseline], baseline)}
        labels = {group: list(dict.fromkeys(c.label for c in cases if c.group == group)) for group in groups}
        ratios = [r for found in bars.values() for bar in found for r in bar.speed_ups[baseline]]
        low, high = min([0.8, *ratios]) / 1.1, max([2.0, *ratios]) * 2.6
        deepest = max(map(len, labels.values()))
        block = len(kinds) + 1.2  # in bars
        figure, axes = plt.subplots(
            1, len(groups), figsize=(1.2 + 4.6 * len(groups), 2 + 0.2 * block * deepest), squeeze=False
        )
        for axis, group in zip(axes[0], groups, strict=True):
            for rank, kind in enumerate(kinds):
                for bar in bars[kind]:
                    if bar.group == group:
                        place = labels[group].index(bar.label) * block + rank
                        draw_bar(axis, place, bar.speed_ups[baseline], bar.fastest, palette[kind], kind == OURS)
            axis.axvline(1, color="#444444", linewidth=1.2)
            axis.set_yticks([place * block + (len(kinds) - 1) / 2 for place in range(len(labels[group]))])
            axis.set_yticklabels([f"{label}\nvs {beaten.get((label, group), '–')}" for label in labels[group]])
            axis.set_ylim(deepest * block - 1.1, -1.1)
            axis.set_xscale("log")
            axis.set_xlim(low, high)
            steps = (1, 2, 5) if high / low < 400 else (1,)
            axis.set_xticks([t for power in range(-3, 5) for s in steps if low <= (t := s * 10.0**power) <= high])
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
            axis.minorticks_off()
            axis.grid(axis="y", visible=False)
            axis.set_title(group)
            axis.set_xlabel(f"times faster than the fastest {baseline}")
        handles = [plt.Rectangle((0, 0), 1, 1, color=palette[kind]) for kind in kinds]
        finish(figure, title, caption, handles, kinds)
        return figure


def draw_bar(axis: Any, y: float, ratios: Sequence[float], name: str, colour: str, bold: bool) -> None:
    """A bar from 1× to the median of some ratios, a line over their range, and figure and name beside it."""
    if not ratios:
        return
    ratio, ends = statistics.median(ratios), (min(ratios), max(ratios))
    axis.barh(y, ratio - 1, left=1, height=0.86, color=colour)
    if len(ratios) > 1:
        axis.plot(ends, (y, y), color="#222222", linewidth=1)
    style = {"fontsize": 8, "color": "#222222", "fontweight": "bold" if bold else "normal", "va": "center"}
    text = f"{ratio_text(ratio)} {name}".strip()
    axis.annotate(text, (max(1, *ends), y), (4, 0), textcoords="offset points", **style)


def finish(figure: Any, title: str, caption: str, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Title and caption above, legend below, nothing overlapping."""
    width, height = figure.get_size_inches()
    columns = min(len(names), max(1, int(width / 1.7)))  # as many as fit side by side
    below = 0.35 + 0.2 * (math.ceil(len(names) / columns) - 1)
    figure.tight_layout(rect=(0, below / height, 1, 1 - 0.75 / height), w_pad=2.5)
    figure.text(0.01, 1 - 0.1 / height, title, fontsize=14, fontweight="bold", va="top", color="#111111")
    figure.text(0.01, 1 - 0.42 / height, caption, fontsize=8.5, va="top", color="#666666")
    figure.legend(handles, names, loc="lower center", ncols=columns, bbox_to_anchor=(0.5, 0), fontsize=9)

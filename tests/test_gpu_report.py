"""The report on compiled GPU code: its counting on code that is known, and the bars that the kernels are held to."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
import gpu_code
import gpu_report
from gpu_code import Code
from gpu_report import CARDS, Row

SHAPES = ((4096, 1000), (1024, 8192), (1024, 16384), (256, 30522), (256, 50257), (64, 131072))


def code(target: str = "sm_90", registers: int = 64, shared: int = 0, threads: int = 256, text: str = "") -> Code:
    """A kernel of this assembly."""
    line = r"^(?:(\.L\w+):|\s*([A-Z][\w.]*)([^;\n]*))"
    opcodes, loops = gpu_code._loops(line, r"\((\.L\w+)\)", "BRA", text)
    return Code("kernel", target, registers, 0, shared, 0, threads, opcodes, loops, 1, {})


LOOP = """
LDC R1;
.L_x_0:
LDG.E.128 R4;
FFMA R4;
.L_x_1:
FADD R4;
@P0 BRA `(.L_x_2);
.L_x_2:
BRA `(.L_x_0);
MUFU.EX2 R4;
.L_x_3:
BRA `(.L_x_3);
"""


def test_a_loop_counts_as_often_as_it_goes_round() -> None:
    found = code(text=LOOP.replace("@P0 ", ""))
    assert [body.total() for body in found.loops] == [5]  # neither the branch forwards nor the one to itself is a loop
    executed = found.executed(rounds=12, bytes_a_round=16 * 256)
    assert executed == {"LDC": 1, "LDG.E.128": 12, "FFMA": 12, "FADD": 12, "BRA": 25, "MUFU.EX2": 1}
    # as the compiler has unrolled it, four rounds of the source are one of its own
    assert found.executed(rounds=12, bytes_a_round=4 * 256)["FFMA"] == 3
    assert found.executed(rounds=13, bytes_a_round=4 * 256)["FFMA"] == 4


def test_loops_that_are_missing_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="12 rounds"):
        code(text=LOOP.replace("LDG.E.128", "LDS.128")).executed(rounds=12, bytes_a_round=4096)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "programs"),
    [
        ("sm_90", 32, 0, 256, 8),  # 2048 threads
        ("sm_90", 33, 0, 256, 6),  # 40 registers a thread: 12 warps a quarter
        ("sm_90", 128, 0, 256, 2),
        ("sm_90", 255, 0, 32, 8),
        ("sm_90", 32, 0, 32, 32),  # programs
        ("sm_90", 32, 64 << 10, 256, 3),  # 228 KiB of shared memory, 65 taken by each
        ("sm_80", 32, 64 << 10, 256, 2),
        ("gfx942", 64, 0, 256, 8),
        ("gfx942", 128, 0, 256, 4),
        ("gfx942", 32, 32 << 10, 256, 2),
    ],
)
def test_programs_of_a_multiprocessor(target: str, registers: int, shared: int, threads: int, programs: int) -> None:
    assert gpu_report.resident(CARDS[target], code(target, registers, shared, threads)) == programs


def test_instructions_find_their_pipes() -> None:
    nvidia = ("MUFU.EX2", "F2F.F64.F32", "FFMA", "FFMA2", "DFMA", "SHFL.BFLY", "LOP3.LUT", "F2FP.BF16.F32.PACK_AB")
    found = gpu_report.pipes(Counter({**dict.fromkeys(nvidia, 1), "LDG.E.128": 1, "BRA": 1}), "sm_100")
    assert found == {"special": 2, "fma": 3, "fp64": 1, "exchange": 1, "integer": 2, "other": 2, "issue": 10}
    amd = ("v_exp_f32_e32", "v_fma_f32", "v_pk_mul_f32", "v_and_b32_e32", "ds_read_b32", "global_load_dwordx4")
    found = gpu_report.pipes(Counter(dict.fromkeys(amd, 1)), "gfx942")
    assert found == {"special": 1, "vector": 3, "fma": 3, "exchange": 1, "other": 1, "issue": 6}


@pytest.fixture(scope="module")
def h100() -> dict[tuple[str, int, int], list[Row]]:
    """Loss and both gradients on one card, by dtype, rows and classes: the kernels of the call."""
    return {
        (dtype, *shape): gpu_report.predict(gpu_report.kl_work(*shape, dtype, "both gradients"), "sm_90")
        for dtype in gpu_report.DTYPES
        for shape in SHAPES
    }


def test_bars_of_the_symmetric_kl(h100: dict[tuple[str, int, int], list[Row]]) -> None:
    for (_, rows, classes), kernels in h100.items():
        assert len(kernels) == (2 if rows == 64 else 1)  # few long rows are split
        minimum = kernels[0].minimum
        asked, from_memory = (sum(getattr(k, name) for k in kernels) for name in ("asked", "from_memory"))
        arithmetic, memory = (sum(getattr(k, name) for k in kernels) for name in ("arithmetic_s", "memory_s"))
        assert not any(k.spills for k in kernels)
        # kept in registers up to 16 384 classes, and beyond read again
        assert asked / minimum == (1 if classes <= 16384 else 1.5)
        assert from_memory / minimum <= (1 if classes <= 16384 else 1.5)
        assert arithmetic < memory
        assert memory == pytest.approx(from_memory * rows * classes / 3.35e12)


# Aligned to 16 bytes, to two elements and not at all; bf16 stands for fp16, which is as wide
@pytest.mark.parametrize(
    ("target", "classes"),
    [("sm_80", 12288), ("sm_80", 16383), ("sm_90", 16382), ("sm_90", 16384), ("sm_100", 12288)],
)
@pytest.mark.parametrize("way", ["both gradients", "one gradient"])
def test_rows_in_registers(target: str, classes: int, way: str) -> None:
    for dtype in gpu_report.DTYPES:
        (row,) = gpu_report.predict(gpu_report.kl_work(1024, classes, dtype, way), target)
        assert (row.asked, row.spills) == (row.minimum, 0)


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
@pytest.mark.parametrize(("way", "reads", "writes"), [("both gradients", 2, 2), ("one gradient", 2, 1)])
def test_rows_half_of_which_stay_in_registers(target: str, way: str, reads: int, writes: int) -> None:
    for dtype in gpu_report.DTYPES:
        (row,) = gpu_report.predict(gpu_report.kl_work(1024, 16384, dtype, way), target)
        assert (row.asked / row.minimum, row.spills) == ((1.5 * reads + writes) / (reads + writes), 0)
        assert row.from_memory == row.minimum


def test_counts_are_plausible(h100: dict[tuple[str, int, int], list[Row]]) -> None:
    """Two exponentials, and some thirty multiplications or additions, for each class and each time it is seen."""
    for (_, _, classes), kernels in h100.items():
        special, fma, instructions = (
            sum(getattr(k, name) for k in kernels) for name in ("special", "fma", "instructions")
        )
        times = 1 if classes <= 8192 else 2
        assert 2 * times <= special <= 3.5 * times
        assert 20 * times <= fma <= instructions <= 70 * times


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_every_other_kernel(target: str) -> None:
    shape = gpu_report.EMBEDDINGS
    works = [
        gpu_report.step_work(shape, "bf16", norm, scope) for norm in ("linf", "l2") for scope in ("token", "sample")
    ]
    rows = [row for work in works for row in gpu_report.predict(work, target)]
    found = {(row.op.split(", ", 1)[1], row.kernel): (row.minimum, row.asked, row.from_memory) for row in rows}
    assert found == {
        ("linf, token", "_step_kernel"): (10, 10, 10),
        ("linf, sample", "_gather_kernel"): (10, 2, 2),
        ("linf, sample", "_apply_kernel"): (10, 10, 8),  # the gradient, of which L2 is full, is there already
        ("l2, token", "_step_kernel"): (10, 10, 10),
        ("l2, sample", "_gather_kernel"): (10, 6, 6),
        ("l2, sample", "_apply_kernel"): (10, 10, 4),
    }
    (start,) = gpu_report.predict(gpu_report.start_work(shape), target)
    assert (start.minimum, start.asked, start.from_memory) == (4, 4, 4)
    assert not any(row.spills for row in [*rows, start])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("parameter", "bytes_an_element"), [("fp32", 12), ("bf16", 10)])
@pytest.mark.parametrize("kernel", ["CUDA", "Triton"])
def test_the_average_of_a_model(target: str, parameter: str, bytes_an_element: int, kernel: str) -> None:
    if kernel == "CUDA":
        try:
            gpu_code.nvcc()
        except FileNotFoundError as error:
            pytest.skip(str(error))
        work = gpu_report.ema_work("fp32", parameter, False)
    else:
        work = gpu_report.triton_ema_work("fp32", parameter)
    (row,) = gpu_report.predict(work, target)
    assert (row.minimum, row.asked, row.from_memory) == (bytes_an_element,) * 3
    assert row.spills == 0
    assert row.bound == "memory"


def test_a_launch_that_is_longer_than_its_work() -> None:
    (row,) = gpu_report.predict(gpu_report.kl_work(32, 3, "fp32", "loss alone"), "sm_90")
    assert row.bound == "launch"
    assert dataclasses.replace(row, memory_s=1e-3).bound == "memory"


def test_end_to_end_and_without_a_cuda_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NVCC", raising=False)
    arguments = ["--targets", "sm_90", "gfx942", "--ops", "init_perturbation", "ema_update_", "--out", str(tmp_path)]
    gpu_report.main(arguments)
    printed = capsys.readouterr().out
    assert "H100 (sm_90): times are predicted" in printed
    assert "The CUDA kernels are left out: no nvcc on the PATH or in NVCC" in printed
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert [(row["card"], row["op"]) for row in report["predictions"]] == [
        ("H100", "init_perturbation"),
        *[("H100", "ema_update_, Triton")] * 2,
        ("MI300X", "init_perturbation"),
    ]
    assert report["cards"]["sm_90"]["bandwidth"] == 3.35e12

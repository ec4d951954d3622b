"""bench_ema: all ways do the same update on the same lists, and the command runs; nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import Ema

import bench_ema


@pytest.mark.parametrize("pair", bench_ema.PAIRS)
def test_all_ways_update_the_shadows_that_they_are_given(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    dtypes = bench_ema.dtypes_of(pair)
    for peer in bench_ema.ways(dtypes[0], tensors=2):
        torch.manual_seed(0)
        with torch.no_grad():
            inputs = bench_ema.make_inputs([(100,), (3, 5)], dtypes, "cpu")
            truths = [Ema(e, p, bench_ema.DECAY) for e, p in zip(*inputs[:2], strict=True)]
            try:
                peer.call(*inputs)
            except (ImportError, RuntimeError):
                if peer.name in ("ema-pytorch", "AveragedModel"):  # not installed; no mixed dtypes: the harness tells
                    continue
                raise
        for e, truth in zip(inputs[0], truths, strict=True):
            error = abs(e.double().numpy() - truth.result.astype(float))
            assert error.max() < 10 * torch.finfo(e.dtype).eps, peer.name


def test_a_list_too_long_to_compile_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    kinds = [{peer.kind for peer in bench_ema.ways(torch.float32, tensors)} for tensors in (500, 501)]
    assert kinds[0] - kinds[1] == {"torch.compile"}


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    pytest.importorskip("transformers")
    assert len(bench_ema.parameter_list("bert-base")) == 201
    bench_ema.SMALL[:], before = [(10,)] * 20, list(bench_ema.SMALL)
    try:
        bench_ema.main(["--lists", "small", "--dtypes", "fp32-bf16", "--out", str(tmp_path)])
    finally:
        bench_ema.SMALL[:] = before
    content = json.loads((tmp_path / "bench_ema.json").read_text())
    assert content["cases"][0]["label"].startswith("small, 20 tensors")
    table = capsys.readouterr().out
    assert "fp32 ← bf16" in table
    assert "last places" in table

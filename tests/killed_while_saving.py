"""Run by a test: kills processes that save, 20 of each kind, and loads what they left after each.

    python killed_while_saving.py FOLDER

A process is forked for each, so that torch and transformers are imported once. The parent does no backward pass, which
would make autograd unusable in its children.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hf_tasks import TASKS, trainer_for
from safetensors.torch import load_file

from smart_kernels import Smart, SmartConfig
from smart_kernels.integrations.transformers import last_complete_checkpoint
from smart_kernels.smart.checkpoint import load_smart, save_smart

ROUNDS = 20
TASK = TASKS["bert"]


def kill_amid(work: Callable[[], object], begun: Callable[[], bool], within: float) -> None:
    """Fork a process that works, and kill it some moment after it has begun."""
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        try:
            work()
        finally:
            os._exit(1)  # it should have been killed
    deadline = time.monotonic() + 60
    while not begun():
        assert time.monotonic() < deadline, "the process did not begin"
        time.sleep(0.005)
    time.sleep(random.uniform(0, within))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the process has failed"


def smart_of_one_number(value: float) -> Smart:
    """With 8 MB of shadows, each of which is this number."""
    model = torch.nn.Embedding(1000, 2000)
    torch.nn.init.constant_(model.weight, value)
    return Smart(model, SmartConfig(), 10)


def files(folder: Path) -> None:
    """Each file that is found is that of one save, from its first byte to its last."""
    path = folder / "smart.safetensors"
    stamp = 0

    def save() -> None:
        smarts = [smart_of_one_number(float(i)) for i in range(2)]
        for smart in itertools.cycle(smarts):
            save_smart(smart, path)

    def begun() -> bool:
        return path.exists() and path.stat().st_mtime_ns != stamp

    seen, unfinished = set(), 0
    for _ in range(ROUNDS):
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        kill_amid(save, begun, 0.05)
        unfinished += path.with_name(f"{path.name}.tmp").exists()
        smart = smart_of_one_number(-1.0)
        load_smart(smart, path)
        assert smart.teacher is not None
        (value,) = smart.teacher.shadows["weight"].unique().tolist()
        seen.add(value)
    assert seen <= {0.0, 1.0}
    print(f"files: {ROUNDS} killed, {unfinished} of them while writing")


def checkpoints(folder: Path) -> None:
    """The last complete checkpoint of a trainer loads, and the next process goes on from it."""
    step = 0

    def found() -> int:
        try:
            return int(last_complete_checkpoint(folder).rsplit("-", 1)[1])
        except ValueError:
            return 0

    def train() -> None:
        options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 10_000}
        trainer_for(TASK, folder, logging_strategy="no", **options).train(resume_from_checkpoint=step > 0)

    incomplete = 0
    for _ in range(ROUNDS):
        before = step
        kill_amid(train, lambda before=before: found() > before, 0.1)
        assert found() > before
        step = found()
        last = Path(last_complete_checkpoint(folder))
        incomplete += any(int(path.name.rsplit("-", 1)[1]) > step for path in folder.glob("checkpoint-*"))
        model = TASK.build()
        model.load_state_dict(load_file(last / "model.safetensors"))
        smart = Smart(model, SmartConfig(), 10_000)
        load_smart(smart, last / "smart.safetensors")
        assert smart.state_dict()["updates"] == step
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(last / name, weights_only=True)
    print(f"checkpoints: {ROUNDS} killed, {incomplete} of them amid a checkpoint, {step} steps in all")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    files(root / "files")
    checkpoints(root / "checkpoints")

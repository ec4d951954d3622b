"""A few processes that train together, kept for all tests of a module as starting them takes longest."""

from __future__ import annotations

import datetime as dt
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

PATIENCE = 120  # seconds: a collective that a process does not come to must not hold the tests up


class World:
    """Processes of one gloo group, each of which runs what it is told to, and says what came of it."""

    def __init__(self, size: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.size = size
        self._ends: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "rendezvous"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, size, *args)`` gives in each process."""
        for end in self._ends:
            end.send((function, args))
        for rank, end in enumerate(self._ends):
            if not end.poll(PATIENCE):
                raise TimeoutError(f"process {rank} has not answered in {PATIENCE} s")
        errors, results = zip(*(end.recv() for end in self._ends), strict=True)
        if any(errors):
            raise AssertionError("\n".join(f"process {rank}:\n{error}" for rank, error in enumerate(errors) if error))
        return list(results)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, rendezvous: str, end: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=dt.timedelta(seconds=PATIENCE / 2),
    )
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            end.send((None, function(rank, size, *args)))
        except BaseException:
            end.send((traceback.format_exc(), None))

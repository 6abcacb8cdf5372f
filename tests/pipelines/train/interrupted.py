"""A run that is interrupted twice and goes on by other numbers of workers, beside one that is not: called by a pair of processes."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipelines.train.config import TrainConfig
from pipelines.train.data import check_data
from pipelines.train.loop import train_rank
from pipelines.train.meter import StepMeter

STEPS = 4  # of which three make an epoch


class Interrupted(Exception):
    """Stands for a kill: nothing is written after it."""


def run(places: dict[str, str], folder: Path, rank: int, until: int = STEPS, **settings: Any) -> None:
    """Trains in this rank; appends the step and the samples of each to `folder`/rank, and is interrupted after step `until`."""
    config = {
        "stage": "sft", "output": str(folder / "out"), **places, "learning_rate": 1e-3, "batch_size": 2, "epochs": 1.34,
        "micro_batch": 1, "checkpoint_every": "1", "warmup": 0.0, **settings,
    }  # fmt: skip
    data = check_data(TrainConfig(**config))
    begin, folder_of_run = StepMeter.begin, folder / "run"
    folder_of_run.mkdir(parents=True, exist_ok=True)
    seen: list[list[int]] = []

    def log(meter: StepMeter, micro_batches: Sequence[Any]) -> None:
        if len(seen) and first + len(seen) > until:
            raise Interrupted
        seen.append([int(position) for batch in micro_batches for position in batch.positions])
        begin(meter, micro_batches)

    states = sorted(folder_of_run.glob("step-*/state.json"))
    first = 1 + (json.loads(states[-1].read_text())["metrics"]["steps"] if states else 0)
    arguments = {
        "config": config, "rows": data.rows, "sources": [asdict(source) for source in data.sources], "held_out": None,
        "progress": SimpleNamespace(report=lambda *_: None), "run_folder": str(folder_of_run),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepMeter, "begin", log)
        try:
            train_rank(arguments, torch.device("cpu"))
        except Interrupted:
            written = folder_of_run / f"step-{until:08d}" / ".metadata"
            while not written.exists():  # a thread that still writes must not outlive its process group
                time.sleep(0.05)
            time.sleep(0.5)
    with open(folder / f"samples-{rank}.jsonl", "a") as file:
        file.writelines(json.dumps([first + number, samples]) + "\n" for number, samples in enumerate(seen))


def run_twice(places: dict[str, str], folder: Path, rank: int, join: Callable[[str], None]) -> None:
    """`folder`/whole by two workers; `folder`/parts by two sharded ones, by one, and by two again.

    Args:
        join: opens the process group of both processes, by a name of its own; one is open at the start and at the end.
    """
    run(places, folder / "whole", rank)
    dist.barrier()
    run(places, folder / "parts", rank, until=2, strategy="fsdp")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        run(places, folder / "parts", rank, until=3)
    join("again")
    run(places, folder / "parts", rank)


def samples_of_steps(folder: Path) -> dict[int, set[int]]:
    """Step -> its samples, over all ranks and all times that it was made."""
    seen: dict[int, set[int]] = {}
    for file in folder.glob("samples-*.jsonl"):
        for step, samples in map(json.loads, file.read_text().splitlines()):
            seen.setdefault(step, set()).update(samples)
    return seen

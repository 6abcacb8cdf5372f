"""What two gloo processes measure for the part `ranks` of benchmarks/training.py."""

import json
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mova_core.config import MoVAConfig
from pipelines.train.config import TrainConfig
from pipelines.train.memory import plan_memory
from pipelines.train.parallel import Parallel
from pipelines.train.parallelize import parallelize
from tests.pipelines.train.test_parallel import PLACES, STATES, WORLD, Case, batch_of, state_bytes, tensors, tiny_model


def run_rank(rank: int, folder: str, seconds: float) -> None:
    """Measures as one of two ranks; rank 0 writes ranks.json into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    times = time_steps(rank, seconds)
    held = {"-".join(case): sum(state_bytes(*case, rank).values()) for case in STATES}
    if rank == 0:
        config = MoVAConfig.from_dict(tiny_model(frozen=True).config.to_dict())
        config.text_config.dtype = torch.bfloat16  # as `state_bytes` rounds its frozen LLM
        plans = {
            "-".join((strategy, precision)): plan_memory(
                TrainConfig(stage="pretrain", strategy=strategy, precision=precision, workers=WORLD, **PLACES), config
            ).state
            for strategy, precision in STATES
        }
        medians = {name: statistics.median(found) for name, found in times.items()}
        result: dict[str, Any] = {
            "seconds": medians,
            "steps": len(times["zero rows"]),
            "ratio": medians["zero rows"] / medians["search"],
            "held over plan": {name: held[name] / plan for name, plan in plans.items()},
        }
        Path(folder, "ranks.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def time_steps(rank: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each step of both sides in turns, the ranks routed to different experts."""
    case = Case(routing="apart")
    sides: dict[str, Parallel] = {}
    for name in ("zero rows", "search"):
        model = tiny_model(frozen=False)
        sides[name] = parallelize(model, learning_rate=1e-4)
    searching = sides["search"]
    searching.wrapped = DistributedDataParallel(searching.learner, find_unused_parameters=True)
    searching.checked = True  # parameters without a gradient are what this side is about
    cast(Any, searching.learner).adapter.training = False  # of this module alone: no expert runs on zero rows
    times: dict[str, list[float]] = {name: [] for name in sides}
    ended = torch.zeros(1)
    while not ended:
        for name, parallel in sides.items():
            batch = tensors(batch_of(len(times[name]), case)[rank::WORLD], parallel.learner)  # type: ignore[arg-type]
            dist.barrier()
            started = time.perf_counter()
            parallel.step(1.0, parallel.backward([batch], torch.tensor(100)))
            times[name].append(time.perf_counter() - started)
        ended += sum(times["zero rows"]) > seconds
        dist.broadcast(ended, 0)
    return {name: found[1:] or found for name, found in times.items()}

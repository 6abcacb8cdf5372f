"""What a training run needs to resume, written while it trains: each rank writes its own share (torch.distributed.checkpoint).

RUN/step-00000200/
    *.distcp, .metadata   the trained weights and AdamW's moments; `.metadata` is a pickle of torch, which only a run's own
                          folder is ever read for
    state.json            `RunState`; written last, so a checkpoint without it is incomplete and nobody resumes from it

Random numbers need no state: every micro-batch has a seed of its own (`micro_batch_seed`).
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from mova_core.io.atomic import write_atomic
from mova_core.io.filesystem import open_filesystem
from mova_core.io.uris import local_path
from pipelines.train.parallel import Parallel

STATE = "state.json"
KEPT = 2  # checkpoints of a run: one more than needed, should the newest be damaged


@dataclass(kw_only=True)
class RunState:
    """How far a run is.

    Attributes:
        metrics: `steps` done, and what the run reports at its end.
        batches: `FeatureBatches.state_dict`; empty before the first step.
        meter: `StepMeter.state_dict`; empty before the first step.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    meter: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return int(self.metrics.get("steps", 0))

    @property
    def best(self) -> int | None:
        """The step with the lowest loss of all evaluations."""
        return self.metrics.get("best_step")


class Checkpoints:
    """The checkpoints of a run, as one rank writes and reads them. Every rank must call every method alike.

    Args:
        folder: of the run, local or a URL that all ranks see.
        every: steps between two checkpoints, or seconds; the other is None.
    """

    def __init__(self, folder: str, parallel: Parallel, *, every: tuple[int | None, float | None]):
        self.folder, self.parallel = folder, parallel
        self.steps, self.seconds = every
        # A group of its own: the thread that writes must not speak in between the reductions of a step.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._writing: tuple[RunState, Future[Any]] | None = None
        self._saved_at = time.monotonic()

    def restore(self, step: int | None = None) -> RunState:
        """Loads a complete checkpoint into model and optimizer, by default the newest; without any, nothing, and returns the state
        before the first step."""
        state = read_state(self.folder, step)
        if state.steps:
            reader, tensors = dcp.FileSystemReader(step_folder(self.folder, state.steps)), self.parallel.state()
            dcp.load(cast(dict[str, Any], tensors), storage_reader=reader, process_group=self.group)
            self.parallel.load_state(tensors)
        return state

    def due(self, step: int) -> bool:
        """Whether the interval since the last checkpoint has passed, as this rank sees it."""
        if self.steps is not None:
            return step % self.steps == 0
        return time.monotonic() - self._saved_at >= cast(float, self.seconds)

    @property
    def written(self) -> bool:
        """Whether a checkpoint waits for `complete` only, as this rank sees it; rank 0 knows when all ranks have written."""
        return self._writing is not None and self._writing[1].done()

    def save(self, state: RunState) -> None:
        """Copies this rank's share to memory and writes it in a thread; `complete` ends that."""
        self.complete()
        writer = dcp.FileSystemWriter(step_folder(self.folder, state.steps))
        share = own_share(self.parallel)
        if dist.is_initialized():
            future = cast("Future[Any]", dcp.async_save(share, storage_writer=writer, process_group=self.group))
        else:
            future = cast("Future[Any]", dcp.async_save(share, storage_writer=writer, no_dist=True))
        self._writing, self._saved_at = (state, future), time.monotonic()

    def complete(self) -> None:
        """Waits until every rank has written its share, makes the checkpoint count, and deletes older ones.

        Raises:
            CheckpointException: a rank could not write.
        """
        if self._writing is None:
            return
        (state, future), self._writing = self._writing, None
        future.result()
        if self.parallel.rank == 0:
            write_state(self.folder, state)
            delete_old(self.folder, best=state.best)


def own_share(parallel: Parallel) -> dict[str, Any]:
    """What this rank writes: its part of every sharded tensor, and of the whole ones those that fall to it.

    Where every rank holds the whole model, each copies and writes 1/N, and not N ranks of a machine the same.
    """
    share: dict[str, Any] = {}
    sizes = [0] * parallel.world
    for name, value in parallel.state().items():
        # Buffers are those of rank 0, as DDP broadcasts them before each forward pass.
        owner = 0 if name in parallel.buffers else sizes.index(min(sizes))
        if not isinstance(value, DTensor):
            sizes[owner] += value.numel()
        if isinstance(value, DTensor) or owner == parallel.rank:
            share[name] = value
    return share


def step_folder(folder: str, step: int) -> str:
    return f"{folder}/step-{step:08d}"


def complete_steps(folder: str) -> list[int]:
    """Steps of a run's complete checkpoints, in ascending order."""
    return sorted(step for step, complete in _checkpoints(folder) if complete)


def read_state(folder: str, step: int | None = None) -> RunState:
    """State of a complete checkpoint of a run, by default of the newest; that before the first step where there is none."""
    steps = complete_steps(folder) if step is None else [step]
    if not steps:
        return RunState()
    filesystem, path = open_filesystem(f"{step_folder(folder, steps[-1])}/{STATE}")
    return RunState(**json.loads(filesystem.cat_file(path)))


def write_state(folder: str, state: RunState) -> None:
    """Makes a checkpoint, all of whose shares are written, a complete one."""
    location, text = f"{step_folder(folder, state.steps)}/{STATE}", json.dumps(asdict(state))
    if (path := local_path(location)) is not None:
        write_atomic(path, text)
    else:
        filesystem, path = open_filesystem(location)
        filesystem.pipe_file(path, text.encode())  # an object store shows an object whole or not at all


def delete_old(folder: str, best: int | None = None) -> None:
    """Deletes all but the newest `KEPT` complete checkpoints and that of the step `best`, and what a kill left of others."""
    kept = complete_steps(folder)[-KEPT:]
    for step, complete in list(_checkpoints(folder)):
        if step in kept or step == best or step > kept[-1]:
            continue
        filesystem, path = open_filesystem(step_folder(folder, step))
        if complete:
            filesystem.rm_file(f"{path}/{STATE}")  # first: what is left counts no more
        filesystem.rm(path, recursive=True)


def _checkpoints(folder: str) -> Iterator[tuple[int, bool]]:
    """Step of each checkpoint, and whether it is complete."""
    filesystem, path = open_filesystem(folder)
    filesystem.invalidate_cache()
    for found in filesystem.glob(f"{path}/step-*"):
        yield int(found.rpartition("-")[2]), filesystem.exists(f"{found}/{STATE}")


def micro_batch_seed(seed: int, step: int, number: int) -> int:
    """Seed of the random choices (dropout) in a micro-batch: the same for any rank that computes it.

    Args:
        seed: of the run.
        number: of the micro-batch among those of all ranks in the step.
    """
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])

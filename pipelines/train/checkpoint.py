"""What a training run needs to resume: the model as users load it, AdamW's moments, and its position in the data."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
from safetensors.torch import load_file, save_file
from torch import Tensor

from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.train.parallel import Parallel

OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"  # beside the model in a checkpoint


@dataclass(kw_only=True)
class RunState:
    """How far a run is.

    Attributes:
        metrics: reported last; `steps` done, and `loss`.
        batches: `FeatureBatches.state_dict`; empty before the first step.
        meter: `StepMeter.state_dict`; empty before the first step.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    meter: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return int(self.metrics.get("steps", 0))


@contextmanager
def start_folder(model: str) -> Iterator[str]:
    """The folder to start from, in a Ray Train worker: that of the run's last checkpoint, else the model's."""
    if (checkpoint := ray.train.get_checkpoint()) is None:
        yield model
    else:
        with checkpoint.as_directory() as folder:
            yield folder


def read_state(folder: str) -> tuple[RunState, dict[str, Tensor]]:
    """State and AdamW's moments (parameter/key -> tensor) of a checkpoint; empty for a model that is no checkpoint."""
    if not Path(folder, STATE).exists():
        return RunState(), {}
    return RunState(**json.loads(Path(folder, STATE).read_text())), load_file(Path(folder, OPTIMIZER))


def steps_of_last_checkpoint(run_folder: Path) -> int:
    """Steps that the last complete checkpoint of a Ray Train run holds; 0 where there is none."""
    try:
        metrics = ray.train.Result.from_path(str(run_folder)).metrics or {}
    except (OSError, RuntimeError):  # the run has not started, or has no checkpoint yet
        return 0
    return int(metrics.get("steps", 0))


def report(state: RunState, model: MoVAForConditionalGeneration, processor: MoVAProcessor, parallel: Parallel) -> None:
    """Reports to Ray Train; rank 0 adds a checkpoint, from which a run of any strategy and number of workers resumes.

    Every rank must call it, because the ranks may hold a part of the model each.
    """
    weights, moments = parallel.full_weights(model), parallel.full_moments()
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(state.metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in moments.items()}, f"{folder}/{OPTIMIZER}")
        Path(folder, STATE).write_text(json.dumps(asdict(state)))
        ray.train.report(state.metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

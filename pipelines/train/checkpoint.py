"""What a training run needs to resume: the model as users load it, AdamW's moments, and its position in the data."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor

OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"  # beside the model in a checkpoint


@dataclass(kw_only=True)
class RunState:
    """How far a run is.

    Attributes:
        metrics: reported last; `steps` done, and `loss`.
        batches: `FeatureBatches.state_dict`; empty before the first step.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)

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


def report(
    state: RunState,
    model: MoVAForConditionalGeneration,
    processor: MoVAProcessor,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
) -> None:
    """Reports to Ray Train; rank 0 adds a checkpoint, from which `read_state` and `restore_optimizer` resume.

    Args:
        trained: name -> parameter that the optimizer updates.
    """
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(state.metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        moments = {
            f"{name}/{key}": value.contiguous()
            for name, parameter in trained.items()
            for key, value in optimizer.state[parameter].items()
        }
        save_file(moments, f"{folder}/{OPTIMIZER}")
        Path(folder, STATE).write_text(json.dumps(asdict(state)))
        ray.train.report(state.metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    trained: dict[str, nn.Parameter],
    moments: dict[str, Tensor],
    steps: int,
) -> None:
    """Sets AdamW's moments (parameter/key -> tensor) and the schedule to what they were after `steps` steps."""
    for name, parameter in trained.items():
        stored = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        if stored:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in stored.items()
            }
    if steps:
        schedule.last_epoch = steps - 1
        schedule.step()

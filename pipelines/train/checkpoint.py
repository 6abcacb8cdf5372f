"""What a training run keeps to go on from: the model as users load it, the optimizer's moments, and the steps made."""

import json
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.train.config import TrainConfig

OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"  # beside the model in a checkpoint


def report(
    metrics: dict[str, Any],
    model: MoVAForConditionalGeneration,
    processor: MoVAProcessor,
    optimizer: torch.optim.Optimizer,
    learning: dict[str, nn.Parameter],
) -> None:
    """Reports to Ray Train; rank 0 adds a checkpoint: the model as users load it, and what is needed to go on."""
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        moments = {
            f"{name}/{key}": value.contiguous()
            for name, parameter in learning.items()
            for key, value in optimizer.state[parameter].items()
        }
        save_file(moments, f"{folder}/{OPTIMIZER}")
        Path(folder, STATE).write_text(json.dumps(metrics))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    learning: dict[str, nn.Parameter],
    moments: dict[str, Tensor],
    done: int,
) -> None:
    """Puts AdamW's moments (name/key -> tensor) and the schedule where they were after `done` steps."""
    for name, parameter in learning.items():
        kept = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        if kept:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in kept.items()
            }
    if done:
        schedule.last_epoch = done - 1
        schedule.step()


class _start_folder:
    """The folder to start from: the last checkpoint's if there is one, else the model's."""

    def __init__(self, config: TrainConfig):
        self.checkpoint, self.model = ray.train.get_checkpoint(), config.model

    def __enter__(self) -> str:
        self.opened = self.checkpoint.as_directory() if self.checkpoint else None
        return self.opened.__enter__() if self.opened else self.model

    def __exit__(self, *error: Any) -> None:
        if self.opened:
            self.opened.__exit__(*error)


def _progress_of(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says of its run, and its optimizer's moments; nothing for a model that is no checkpoint."""
    state = Path(folder, STATE)
    return (json.loads(state.read_text()), load_file(Path(folder, OPTIMIZER))) if state.exists() else ({}, {})

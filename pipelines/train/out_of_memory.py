"""What a worker says when its GPU has no memory left."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pipelines.train.config import TrainConfig
from pipelines.train.memory import advice, plan_memory
from pipelines.train.metrics import TrainingError


@contextmanager
def memory_advice(config: TrainConfig, model_config: Any, world: int) -> Iterator[None]:
    """Turns an error of CUDA's allocator into planned and allocated GB and the two changes that cost least.

    Args:
        model_config: `MoVAConfig` of the model.
        world: workers of this run.

    Raises:
        TrainingError: the body ran out of GPU memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(_message(replace(config, workers=world, min_workers=0), model_config)) from error


def _message(config: TrainConfig, model_config: Any) -> str:
    samples = config.at_once
    text = f"{config.stage} ran out of GPU memory with {samples} sample{'s' if samples > 1 else ''} at once"
    if config.stage == "light-router" or config.strategy.startswith("zero"):  # neither has a plan
        return f"{text}: give a smaller --micro-batch or more --workers"
    planned = plan_memory(config, model_config).needed(samples) / 1e9
    allocated = torch.cuda.max_memory_allocated() / 1e9
    return f"{text}: {planned:.1f} GB were planned and {allocated:.1f} GB allocated; {advice(config, model_config, samples)}"

"""The training loop of one Ray Train worker."""

from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import prepare_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.progress_bar import write_progress
from pipelines.train.checkpoint import _progress_of, _start_folder, report, restore_optimizer
from pipelines.train.config import TrainConfig
from pipelines.train.data import Batches, training_samples
from pipelines.train.stages import LightRouting, choose_parameters

PROGRESS = "progress.json"  # in the run's folder


def train_worker(settings: dict[str, Any]) -> None:
    """What one Ray Train worker does."""
    config = TrainConfig(**settings)
    torch.manual_seed(config.seed)
    with _start_folder(config) as folder:
        model = MoVAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        processor = MoVAProcessor.from_pretrained(config.model)
        before, moments = _progress_of(folder)
    done = before.get("steps", 0)
    choose_parameters(model, config)
    samples, _ = training_samples(config)
    batches = Batches(config, samples, processor, model.config.pool)
    for expert in model.config.pool:
        partition = batches.store.partition(expert["name"])
        expert.update(fingerprint=partition.fingerprint, dtype=partition.description["dtype"])
    device = ray.train.torch.get_device()
    learner = LightRouting(model) if config.stage == "light-router" else model
    wrapped = prepare_model(learner, parallel_strategy_kwargs={"find_unused_parameters": True})
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * len(batches)), len(batches))
    restore_optimizer(optimizer, schedule, learning, moments, done)

    wrapped.train()
    loader = DataLoader(
        batches, batch_size=None, sampler=range(done, len(batches)), num_workers=config.loader_processes
    )
    losses: list[float] = []
    for step, batch in enumerate(loader, start=done):
        loss = wrapped(**_to(batch, device)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning.values(), config.clip_norm)
        optimizer.step()
        schedule.step()
        losses = [*losses[-49:], loss.item()]
        if batches.rank == 0:
            write_progress(
                run_folder(config) / PROGRESS, step + 1, len(batches), f"loss {sum(losses) / len(losses):.3f}"
            )
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == len(batches):
            metrics = {"steps": step + 1, "loss": sum(losses) / len(losses), "resumed_from": done}
            report(metrics, model, processor, optimizer, learning)
    if done == len(batches):  # cut off between its last step and the copy to its output
        report(before | {"resumed_from": done}, model, processor, optimizer, learning)


def run_folder(config: TrainConfig) -> Path:
    """Where a run keeps its checkpoints until it is finished: beside its output, on a disk that every worker sees."""
    return Path(f"{config.output}.ray").resolve()


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on the device; features move with their grid kept."""
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if "experts" in batch:
        moved["experts"] = {name: f._replace(tokens=f.tokens.to(device)) for name, f in batch["experts"].items()}
    return moved

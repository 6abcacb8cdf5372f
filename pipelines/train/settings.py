"""Settings of a run that contradict each other or need a package. Imports neither torch nor Ray."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from mova_core.data import DataError
from pipelines.train.config import FREEZABLE, LABEL_STAGES, PARTS, TrainConfig
from pipelines.train.trackers import check_trackers

# In a model's folder, as `MoVAForConditionalGeneration.save_pretrained` writes it.
ROUTING_LORA_FOLDER = "expert_routing_lora"


def check_settings(config: TrainConfig) -> None:
    """Refuses what no worker could train with.

    Raises:
        DataError: in one line, with the option and the fix.
    """
    _check_batch(config)
    _check_strategy(config)
    _check_parts(config)
    check_trackers(config.log)
    if config.eval_every and config.eval_data is None:
        raise DataError(f"--eval-every {config.eval_every} needs --eval-data, a file of held-out samples")
    if config.best and config.eval_data is None:
        raise DataError("--best needs --eval-data, a file of held-out samples")
    if bool(config.store) == (config.features == "online"):
        reason = "computes all features and uses none" if config.store else "reads a store"
        raise DataError(
            f"--features {config.features} {reason}: {'leave --store out' if config.store else 'give --store'}"
        )
    if config.features != "store" and config.loader_processes:
        raise DataError(f"--features {config.features} computes in the worker's process: leave --loader-processes at 0")
    if config.features != "store" and config.stage in LABEL_STAGES:
        raise DataError(f"--features: the stage {config.stage} reads no features")
    if config.stage == "sft" and config.lora_rank and "llm" in config.freeze:
        raise DataError("--lora-rank trains in place of the LLM, --freeze llm trains nothing of it: give one of them")
    if config.routing_samples and config.stage != "sft":
        raise DataError(f"--routing-samples are mixed into sft; the stage {config.stage} has none")
    if config.routing_samples and Path(config.model, ROUTING_LORA_FOLDER).exists():
        raise DataError(
            f"--routing-samples train the LLM itself to route, but {config.model} routes by its LoRA: start from a model "
            "without one"
        )
    if invalid := {path: weight for path, weight in config.mix.items() if weight <= 0}:
        path, weight = next(iter(invalid.items()))
        raise DataError(f"--mix {path}={weight:g}: the weight must be over 0")


def _check_batch(config: TrainConfig) -> None:
    # Batch statistics of the light router need two samples per worker.
    smallest = config.workers * (2 if config.stage == "light-router" else 1)
    if config.batch_size < smallest:
        raise DataError(
            f"--batch-size {config.batch_size} is too small for --workers {config.workers}: give {smallest}"
        )
    if config.micro_batch and config.batch_size % (config.workers * config.micro_batch):
        raise DataError(
            f"--batch-size {config.batch_size} is no multiple of --workers {config.workers} x --micro-batch {config.micro_batch}"
        )
    for workers in range(config.min_workers or config.workers, config.workers):
        if replace(config, workers=workers).micro_batches > config.batch_size // workers:
            raise DataError(
                f"--batch-size {config.batch_size} is no multiple of {workers}, which --workers {config.min_workers}..{config.workers} "
                "allows: give a larger --micro-batch than 1"
            )
    if config.stage == "light-router" and (config.strategy != "ddp" or config.micro_batch):
        raise DataError("light-router trains with --strategy ddp and without --micro-batch: the light router is small")


def _check_strategy(config: TrainConfig) -> None:
    if config.shard_size and config.strategy != "fsdp":
        raise DataError(f"--shard-size {config.shard_size} needs --strategy fsdp")
    if config.shard_size and config.min_workers:
        raise DataError(f"--shard-size {config.shard_size} needs a fixed number of --workers")
    if config.shard_size and config.workers % config.shard_size:
        raise DataError(f"--workers {config.workers} is no multiple of --shard-size {config.shard_size}")
    if config.strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise DataError(
            f"--strategy {config.strategy} needs DeepSpeed: pip install 'mova-ray[deepspeed]', or take --strategy fsdp"
        )


def _check_parts(config: TrainConfig) -> None:
    if unknown := [part for part in config.freeze if part not in FREEZABLE]:
        raise DataError(f"--freeze {unknown[0]}: the parts are {', '.join(FREEZABLE)}")
    if unknown := [part for part in config.part_rates if part not in PARTS]:
        raise DataError(f"--lr-part {unknown[0]}: the parts are {', '.join(PARTS)}")
    if (config.freeze or config.part_rates) and config.stage in LABEL_STAGES:
        raise DataError(f"{config.stage} trains a router alone: --freeze and --lr-part are of pretrain and sft")
    frozen = {*config.freeze, *(["llm"] if config.stage == "pretrain" else [])}
    if both := [part for part in config.part_rates if part in frozen]:
        raise DataError(f"--lr-part {both[0]}={config.part_rates[both[0]]:g}: {both[0]} does not learn in this run")

"""Train: the paper's stages as Ray Train workers that read features from the store.

pretrain: MoV-Adapter and base encoder learn, the LLM is frozen.   sft: everything learns but the experts (paper section 3.3).
router:   only the expert-routing LoRA learns, on routing labels.   light-router: only the light router, on the same labels.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from mova_core.config import MoVAConfig
from mova_core.features import FeatureStore
from pipelines.invalid_records import report_skipped
from pipelines.progress_bar import follow_progress
from pipelines.train.checkpoint import OPTIMIZER, STATE
from pipelines.train.config import TrainConfig
from pipelines.train.data import check_features, training_samples
from pipelines.train.loop import PROGRESS, run_folder, train_worker


def train(config: TrainConfig, progress: bool = True) -> dict[str, Any]:
    """Runs one stage to its end, from the last checkpoint if an earlier run of the same config was cut off.

    Needs an open Ray session. Returns {"stage", "steps", "samples", "skipped", "loss", "seconds", "output", "resumed_from"},
    `skipped` telling of each bad row what was wrong with it.

    Raises:
        DataError: the data cannot be read or lacks what the stage needs.
        StoreError: the store lacks features of this model's experts.
    """
    started = time.perf_counter()
    config = pinned(config)
    samples, skipped = training_samples(config)  # refuse bad input before any worker starts
    report_skipped(skipped)
    check_features(config, samples)
    storage = run_folder(config)
    storage.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(config),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpu, resources_per_worker=None if config.gpu else {"CPU": 1}
        ),
        run_config=ray.train.RunConfig(
            name=f"{config.stage}-{identity(config)}",
            storage_path=str(storage),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=1),
        ),
    )
    with follow_progress(storage / PROGRESS, config.stage, "steps", progress):
        result = trainer.fit()
    assert result.checkpoint is not None  # every run reports its last step
    if Path(config.output, "config.json").exists():
        shutil.rmtree(config.output)  # nothing of an older model may stay, its LoRA least of all
    with result.checkpoint.as_directory() as folder:
        shutil.copytree(folder, config.output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(OPTIMIZER, STATE))
    shutil.rmtree(storage, ignore_errors=True)
    metrics = result.metrics or {}
    return {
        "stage": config.stage,
        "samples": len(samples),
        "skipped": skipped,
        "seconds": time.perf_counter() - started,
        "output": config.output,
        **{key: metrics[key] for key in ("steps", "loss", "resumed_from") if key in metrics},
    }


def pinned(config: TrainConfig) -> TrainConfig:
    """The same run with absolute paths and every fingerprint settled, so that it means the same in every process.

    A model that was trained before keeps its features; a fresh one takes those that are there, or those that were chosen.

    Raises:
        StoreError: no store, it holds features of other weights, or of several and none was chosen.
    """
    wanted = {**config.fingerprints, **MoVAConfig.from_pretrained(config.model).fingerprints}
    names = ("model", "data", "store", "output", "images")
    paths: dict[str, Any] = {
        name: str(Path(path).resolve()) for name in names if (path := getattr(config, name)) is not None
    }
    return replace(config, **paths, fingerprints=dict(FeatureStore(config.store, fingerprints=wanted).fingerprints))


def identity(config: TrainConfig) -> str:
    """Names a run by all that decides it: only a run of the same settings from the same model goes on from its checkpoints."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(config.model).glob("*.*"))
    return hashlib.sha256(json.dumps([asdict(config), files], sort_keys=True).encode()).hexdigest()[:12]

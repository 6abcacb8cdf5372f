"""Training: the paper's stages as Ray Train workers that read features from the store.

pretrain: MoV-Adapter and base encoder learn, the LLM is frozen.   sft: everything learns but the experts (paper section 3.3).
router:   only the expert-routing LoRA learns, on routing labels.   light-router: only the light router, on the same labels.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from mova_core.data import DataError
from mova_core.io.atomic import atomic_path
from mova_core.io.uris import local_path
from pipelines.invalid_records import report_failed
from pipelines.progress_actor import ProgressReporter, follow_progress
from pipelines.train.answers import check_answers
from pipelines.train.checkpoint import read_state
from pipelines.train.config import TrainConfig
from pipelines.train.curves import draw_curves
from pipelines.train.data import TrainingData, check_data, total_steps
from pipelines.train.export import MODEL
from pipelines.train.loop import train_worker
from pipelines.train.metrics import METRICS, check_finite, read_metrics, summary

MAX_FAILURES = 5  # times that a run starts anew from its last checkpoint because a worker failed
POLL_SECONDS = 0.5
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # Ray Train's; see cluster/environment.py
# Of the machines, not of the training: a batch is the same for any number of workers, so that a run may resume with others.
MACHINE_SETTINGS = frozenset(
    {
        "workers",
        "min_workers",
        "shared_output",
        "gpu",
        "loader_processes",
        "checkpoint_every",
        "export_every",
        "strategy",
        "shard_size",
        "micro_batch",
        "checkpoint_activations",
        "eval_data",
        "eval_every",
        "best",
        "log",
        "profile_steps",
    }
)


def train(
    config: TrainConfig, progress: bool = True, data: TrainingData | None = None, picture: str | Path | None = None
) -> dict[str, Any]:
    """Runs one stage to its end, from the last checkpoint if an earlier run of the same config was cut off.

    Needs an open Ray session. A folder at `config.output` is replaced once the training has finished.

    Args:
        progress: show a progress bar.
        data: what `check_data(config)` returned, if the caller has checked it and its answers (`check_answers`) already.
        picture: PNG file for the run's curves, drawn also where the run fails or is stopped.

    Returns:
        {"stage", "steps", "samples", "skipped", "left_out", "loss", "seconds", "output", "resumed_from", "cut_off", "failed"}
        and those of `summary`; with `best` also "best_step", whose model was written.
        `skipped`: the error of each invalid record left out; `left_out`: reason -> number of valid records that the stage
        cannot use; `loss`: mean of the last 50 steps, per answer token of all workers, None where it is no finite number;
        `resumed_from`: step, None for a fresh run; `cut_off`: how often a sample's whole answer lay beyond `max_length`, over
        all epochs; `failed`: the error of each sample whose picture could not be decoded or was cut by `max_length`.

    Raises:
        DataError: the data cannot be read or lacks what the stage needs; an output that not all nodes share.
        StoreError: the store lacks features of this model's experts.
        TrainingError: several steps in a row had no finite loss or gradient.
        KeyboardInterrupt: Ctrl-C; the message says from which step the same command resumes.
        ValueError: `config.output` holds what the run reads.
    """
    started = time.perf_counter()
    _keep_inputs(config)
    if data is None:
        data = check_data(config)
        check_answers(data)
    data.report()
    config = data.config
    check_shared(config)
    storage = checkpoint_folder(config)
    run_folder = storage / f"{config.stage}-{identity(config)}"
    run_folder.mkdir(parents=True, exist_ok=True)
    steps = total_steps(config, len(data.rows))
    if resumed_from := read_state(str(run_folder)).steps or None:
        tqdm.write(f"{config.stage}: resumes at step {resumed_from} of {steps}", file=sys.stderr)
    with follow_progress(config.stage, "steps", progress) as reporter:
        trainer = _trainer(config, data, run_folder, reporter)
        try:
            fit(trainer, reporter, run_folder)
        finally:
            rows = read_metrics(run_folder)
            if picture is not None and rows:
                draw_curves({Path(config.output).name: rows}, picture)
    check_finite(rows, config)
    if not (run_folder / MODEL).exists():
        raise KeyboardInterrupt(_where(run_folder))
    metrics = read_state(str(run_folder)).metrics
    _publish(config, run_folder)
    _tell(config, metrics)
    return {
        "stage": config.stage,
        "samples": len(data.rows),
        "skipped": data.skipped,
        "left_out": data.counts(),
        "seconds": time.perf_counter() - started,
        "output": config.output,
        **summary(rows),
        "resumed_from": resumed_from,
        **{key: metrics[key] for key in ("steps", "loss", "cut_off", "failed", "best_step") if key in metrics},
    }


def _trainer(config: TrainConfig, data: TrainingData, run_folder: Path, reporter: ProgressReporter) -> TorchTrainer:
    workers: Any = (config.min_workers, config.workers) if config.min_workers else config.workers
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": asdict(config),
            "rows": ray.put(data.rows),  # one copy per node, which all its processes read
            "sources": [asdict(source) for source in data.sources],
            "held_out": data.held_out and (ray.put(data.held_out.rows), list(map(asdict, data.held_out.sources))),
            "run_folder": str(run_folder),
            "progress": reporter,
            # Of a cluster that `ray_session` started no node is preempted, and nobody watches them.
            "preemptible": os.environ.get(WATCHER) != "0",
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=config.gpu, resources_per_worker=None if config.gpu else {"CPU": 1}
        ),
        # The checkpoints are our own (`Checkpoints`): Ray Train only starts the workers anew.
        run_config=ray.train.RunConfig(
            name=run_folder.name,
            storage_path=str(run_folder.parent),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )


def _publish(config: TrainConfig, run_folder: Path) -> None:
    """Moves the finished model and its lines to the output, and deletes the run's checkpoints."""
    # The folder is replaced as a whole: nothing of an older model may stay, its LoRA least of all.
    with atomic_path(config.output) as draft:
        shutil.copytree(run_folder / MODEL, draft)
        shutil.copyfile(run_folder / METRICS, draft / METRICS)
    shutil.rmtree(checkpoint_folder(config), ignore_errors=True)


def _tell(config: TrainConfig, metrics: dict[str, Any]) -> None:
    """Writes to stderr what a user should know of a finished run."""
    if cut_off := metrics.get("cut_off"):
        tqdm.write(
            f"{cut_off} samples taught nothing: --max-length {config.max_length} cut off their answer", file=sys.stderr
        )
    report_failed("sample", "cannot be used", metrics.get("failed", ()))
    if metrics.get("loss") is None:
        tqdm.write(
            f"{config.stage}: the last losses were no finite numbers; the model may be of no use", file=sys.stderr
        )


def _keep_inputs(config: TrainConfig) -> None:
    """Refuses an output folder that holds what the run reads: at the end the folder is replaced as a whole."""
    output = Path(config.output).resolve()
    for path in filter(None, map(local_path, config.inputs)):
        if Path(path).resolve().is_relative_to(output):
            raise ValueError(
                f"output {config.output}: this run reads {path}, which would be deleted: name another folder"
            )


def check_shared(config: TrainConfig) -> None:
    """Refuses an output that the workers on other nodes would write on disks of their own.

    Raises:
        DataError: the cluster has several nodes, and `shared_output` is not set.
    """
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and not config.shared_output:
        raise DataError(
            f"--output {config.output}: the cluster has {nodes} nodes, and each would write into a folder of its own: name a "
            "folder that all of them see, and add --shared-output"
        )


def checkpoint_folder(config: TrainConfig) -> Path:
    """Holds a run's checkpoints until the run has finished: beside its output, on a disk that every worker sees."""
    return Path(f"{config.output}.ray")


def identity(config: TrainConfig) -> str:
    """Names a run by the files of its model and the settings that decide its numbers: only such a run resumes from it."""
    settings = {name: value for name, value in asdict(config).items() if name not in MACHINE_SETTINGS}
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(config.model).glob("*.*"))
    return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()[:12]


def fit(trainer: TorchTrainer, reporter: ProgressReporter, run_folder: Path) -> None:
    """Runs the trainer to its end. Ctrl-C lets the workers write a checkpoint and end; a second one does not wait for them.

    Raises:
        KeyboardInterrupt: says at which step the run stopped and from which one it resumes.
    """
    ended: Future[Any] = Future()

    def run() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:
            ended.set_exception(error)

    # In the main thread Ray Train takes over SIGINT, aborts the workers at once and exits with code 0.
    threading.Thread(target=run, name="ray-train", daemon=True).start()
    try:
        _wait(ended)
    except KeyboardInterrupt:
        tqdm.write("stopping: the workers write a checkpoint first (Ctrl-C again: do not wait)", file=sys.stderr)
        try:
            reporter.stop()
            _wait(ended)
        except (KeyboardInterrupt, ray.exceptions.RayError):
            raise KeyboardInterrupt(_where(run_folder)) from None
    ended.result()


def _wait(future: "Future[Any]") -> None:
    while not future.done():
        wait([future], timeout=POLL_SECONDS)  # without a limit no signal would be seen


def _where(run_folder: Path) -> str:
    """Where a run stopped and where it resumes."""
    done = max((row["step"] for row in read_metrics(run_folder)), default=0)
    kept = read_state(str(run_folder)).steps
    where = f"the last checkpoint is of step {kept}: the same command continues from there"
    return f"stopped at step {done}; {where if kept else 'no checkpoint was written yet'}"

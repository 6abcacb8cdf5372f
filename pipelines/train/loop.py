"""The training loop of one Ray Train worker."""

import dataclasses
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from transformers import get_cosine_schedule_with_warmup

from mova_core.features import FeatureSource, FeatureStore
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.train.batches import StageSamples, open_batches
from pipelines.train.checkpoint import RunState, read_state, report, start_folder
from pipelines.train.config import TrainConfig
from pipelines.train.data import held_out_config, read_chosen, total_steps
from pipelines.train.evaluation import HeldOut
from pipelines.train.features import open_features, stored_base
from pipelines.train.flops import ModelFlops, peak_flops
from pipelines.train.index import DataSource, IndexedSamples
from pipelines.train.meter import StepMeter
from pipelines.train.parallel import Parallel, parallelize
from pipelines.train.profiler import step_profiler
from pipelines.train.stages import LightRouting, choose_parameters
from pipelines.train.trackers import logs_folder, open_log


def train_worker(arguments: dict[str, Any]) -> None:
    """Trains on this rank's share of every batch.

    Args:
        arguments: "config", the fields of a `TrainConfig`; "rows", the samples (`ROW`), or a reference to them; "sources", the
            fields of every `DataSource`; "held_out", the two of `config.eval_data` or None; "run_folder", which receives
            `metrics.jsonl`; and "progress", a `ProgressReporter`.
    """
    with ExitStack() as opened:
        _train(arguments, opened)


def _train(arguments: dict[str, Any], opened: ExitStack) -> None:
    """`train_worker`. Adds to `opened` what must be closed at the end."""
    config = TrainConfig(**arguments["config"])
    torch.manual_seed(config.seed)
    with start_folder(config.model) as folder:
        model = MoVAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        resumed, moments = read_state(folder)
    choose_parameters(model, config)
    samples, store = _chosen(config, arguments["rows"], arguments["sources"])
    steps, context = total_steps(config, len(samples)), ray.train.get_context()
    rank = context.get_world_rank()
    # Two processors: a thread reads ahead with one while the other is saved, and a fast tokenizer allows no two threads.
    reading, saved = (MoVAProcessor.from_pretrained(config.model) for _ in range(2))
    device = ray.train.torch.get_device()
    features = opened.enter_context(open_features(config, store, model.config, device))
    base = stored_base(store, model)
    batches = open_batches(config, samples, features, reading, model.config.pool, rank, context.get_world_size(), base)
    if resumed.batches:
        batches.load_state_dict(resumed.batches)
    learner = LightRouting(model) if config.stage == "light-router" else model
    parallel = parallelize(
        learner,
        strategy=config.strategy,
        precision=config.precision,
        checkpoint_activations=config.checkpoint_activations,
        shard_size=config.shard_size,
        device=device,
        learning_rate=config.learning_rate,
        part_rates=config.part_rates,
        weight_decay=config.weight_decay,
    )
    if moments:
        parallel.load_moments(moments)
    schedule = get_cosine_schedule_with_warmup(parallel.optimizer, round(config.warmup * steps), steps)
    if resumed.steps:
        schedule.last_epoch = resumed.steps - 1
        schedule.step()

    meter = StepMeter(
        parallel,
        model,
        sources=[*(source.name for source in samples.sources), "routing"],
        where=samples.where,
        rank=rank,
        flops=ModelFlops(model, light=config.stage == "light-router"),
        peak=peak_flops(device, config.precision),
    )
    if resumed.meter:
        meter.load_state_dict(resumed.meter)
    log = opened.enter_context(open_log(config, arguments["run_folder"], resumed.steps)) if rank == 0 else None
    profiles = logs_folder(config) / "profile" / Path(arguments["run_folder"]).name
    profiler = opened.enter_context(step_profiler(config.profile_steps, resumed.steps, profiles, rank))
    held_out = _held_out(config, arguments["held_out"], features, model, parallel, rank)
    eval_loss = resumed.metrics.get("eval_loss")

    parallel.wrapped.train()
    resumed_from = resumed.steps or None
    cut_off = 0  # samples of this rank whose whole answer lay beyond `max_length`
    errors: list[str] = []  # of this rank's samples that could not be used
    rest_of_epochs = chain.from_iterable(repeat(batches))  # each iteration of `batches` gives the rest of its epoch
    # The range comes first: zip then ends without reading a batch that no step uses.
    for step, micro_batches in zip(range(resumed.steps + 1, steps + 1), meter.timed(rest_of_epochs), strict=False):
        meter.begin(micro_batches)
        items = parallel.sum(torch.cat([batch.divisor for batch in micro_batches]).sum().to(device))
        loss = parallel.backward([batch.to(device).inputs for batch in micro_batches], items.clamp_min(1))
        norm = parallel.step(config.clip_norm, loss)
        line = meter.end(step, loss, norm, schedule.get_last_lr()[0])
        schedule.step()
        if profiler is not None:
            profiler.step()
        failed = [error for batch in micro_batches for error in batch.errors]
        errors += failed
        cut_off += sum(int((batch.answers == 0).sum()) for batch in micro_batches) - len(failed)
        if held_out is not None and (step == steps or (config.eval_every and step % config.eval_every == 0)):
            eval_loss = line["eval_loss"] = held_out.loss()
        if log is not None:
            log(line)
            arguments["progress"].report(step, steps, meter.note(line))
        if meter.stopped:
            return
        if step % config.checkpoint_every == 0 or step == steps:
            metrics = {
                "steps": step,
                "loss": meter.loss,
                "resumed_from": resumed_from,
                "cut_off": int(parallel.sum(torch.tensor(cut_off, device=device))),
                "failed": parallel.gather(errors),
                **({} if held_out is None else {"eval_loss": eval_loss}),
            }
            state = RunState(metrics=metrics, batches=batches.state_dict(), meter=meter.state_dict())
            report(state, model, saved, parallel)
    if resumed.steps == steps:  # the run was killed between its last step and the copy to its output
        state = dataclasses.replace(resumed, metrics={**resumed.metrics, "resumed_from": resumed_from})
        report(state, model, saved, parallel)


def _chosen(
    config: TrainConfig, rows: Any, sources: list[dict[str, Any]]
) -> tuple[IndexedSamples, FeatureStore | None]:
    """`read_chosen` of what the driver sent."""
    rows = ray.get(rows) if isinstance(rows, ray.ObjectRef) else rows
    return read_chosen(config, rows, [DataSource(**source) for source in sources])


def _held_out(
    config: TrainConfig, chosen: Any, features: FeatureSource, model: Any, parallel: Parallel, rank: int
) -> HeldOut | None:
    """The held-out samples of a run that has some."""
    if chosen is None:
        return None
    size = config.micro_batch or config.batch_size // config.workers
    config = held_out_config(config)
    samples, _ = _chosen(config, *chosen)
    processor = MoVAProcessor.from_pretrained(config.model)  # of its own thread, as a fast tokenizer allows no two
    reader = StageSamples(config, samples, features, processor, model.config.pool)
    return HeldOut(reader, parallel, size=size, rank=rank)

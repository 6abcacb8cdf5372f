"""The training loop of one rank."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from transformers import get_cosine_schedule_with_warmup

from mova_core.features import FeatureSource, FeatureStore
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.train.batches import MicroBatch, StageSamples, open_batches
from pipelines.train.checkpoint import Checkpoints, RunState, micro_batch_seed
from pipelines.train.config import TrainConfig
from pipelines.train.data import held_out_config, read_chosen, total_steps
from pipelines.train.evaluation import HeldOut
from pipelines.train.export import MODEL, write_model
from pipelines.train.features import open_features, stored_base
from pipelines.train.flops import ModelFlops, peak_flops
from pipelines.train.index import DataSource, IndexedSamples
from pipelines.train.meter import StepMeter
from pipelines.train.out_of_memory import memory_advice
from pipelines.train.parallel import Parallel
from pipelines.train.parallelize import parallelize
from pipelines.train.profiler import step_profiler
from pipelines.train.stages import LightRouting, choose_parameters
from pipelines.train.trackers import logs_folder, open_log

PREEMPTION_STEPS = 10  # steps between two questions whether a node is preempted: each lets all ranks wait for rank 0


def train_worker(arguments: dict[str, Any]) -> None:
    """`train_rank` on a Ray Train worker; `arguments` also say whether nodes are "preemptible"."""
    preemption = ray.train.get_preemption_info if arguments["preemptible"] else None
    train_rank(arguments, ray.train.torch.get_device(), preemption)


def train_rank(arguments: dict[str, Any], device: torch.device, preemption: Callable[[], object] | None = None) -> None:
    """Trains on this rank's share of every batch, from the run's last checkpoint on, and writes the model into the run's folder.

    The ranks are those of torch's default process group; without one there is one rank.

    Args:
        arguments: "config", the fields of a `TrainConfig`; "rows", the samples (`ROW`), or a reference to them; "sources", the
            fields of every `DataSource`; "held_out", the two of `config.eval_data` or None; "run_folder", which receives
            checkpoints, `metrics.jsonl` and `MODEL`; and "progress", a `ProgressReporter`.
        preemption: tells what is known of nodes that are about to be taken away, None while nothing is; the same on every
            rank, which all call it. A checkpoint is written at once, and the training goes on until the node is gone.
    """
    with ExitStack() as opened:
        _Rank(arguments, device, opened, preemption).train()


class _Rank:
    """One rank of a run, ready to train: everything is open and at the state of the last checkpoint."""

    def __init__(
        self,
        arguments: dict[str, Any],
        device: torch.device,
        opened: ExitStack,
        preemption: Callable[[], object] | None,
    ):
        """Adds to `opened` what must be closed at the end."""
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # What is divided among the workers is divided among those that there are.
        self.config = config = replace(TrainConfig(**arguments["config"]), workers=self.world, min_workers=0)
        self.device, self.folder, self.progress = device, arguments["run_folder"], arguments["progress"]
        self.preemption = preemption
        self.heeded: object = None  # what was known of preempted nodes when last asked
        torch.manual_seed(config.seed)
        self.model = MoVAForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
        choose_parameters(self.model, config)
        samples, store = _chosen(config, arguments["rows"], arguments["sources"])
        self.steps = total_steps(config, len(samples))
        features = opened.enter_context(open_features(config, store, self.model.config, device))
        # A thread reads ahead with a processor of its own: a fast tokenizer allows no two threads.
        processor = MoVAProcessor.from_pretrained(config.model)
        pool = self.model.config.pool
        base = stored_base(store, self.model)
        self.batches = open_batches(config, samples, features, processor, pool, self.rank, self.world, base)
        self.parallel = _parallelized(self.model, config, device)
        self.checkpoints = Checkpoints(self.folder, self.parallel, every=config.checkpoint_interval)
        self.resumed = self.checkpoints.restore()
        self.schedule = get_cosine_schedule_with_warmup(
            self.parallel.optimizer, round(config.warmup * self.steps), self.steps
        )
        if self.resumed.steps:
            self.batches.load_state_dict(self.resumed.batches)
            self.schedule.last_epoch = self.resumed.steps - 1
            self.schedule.step()
        self.meter = self._meter(samples)
        self.log = opened.enter_context(open_log(config, self.folder, self.resumed.steps)) if self.rank == 0 else None
        profiles = logs_folder(config) / "profile" / Path(self.folder).name
        self.profiler = opened.enter_context(
            step_profiler(config.profile_steps, self.resumed.steps, profiles, self.rank)
        )
        self.held_out = _held_out(config, arguments["held_out"], features, self.model, self.parallel)
        # What the run reports at its end, of this rank; rank 0 goes on with what the checkpoint holds of all.
        before = self.resumed.metrics if self.rank == 0 else {}
        self.cut_off = int(before.get("cut_off", 0))  # samples whose whole answer lay beyond `max_length`
        self.errors: list[str] = list(before.get("failed", ()))  # of samples that could not be used
        self.eval_loss = self.resumed.metrics.get("eval_loss")
        self.best_loss, self.best_step = self.resumed.metrics.get("best_loss"), self.resumed.best

    def train(self) -> None:
        """Makes the rest of the steps, unless the driver asks to stop: then the last one done is in a checkpoint."""
        self.parallel.wrapped.train()
        rest_of_epochs = chain.from_iterable(
            repeat(self.batches)
        )  # each iteration of `batches` gives the rest of its epoch
        # The range comes first: zip then ends without reading a batch that no step uses.
        steps = range(self.resumed.steps + 1, self.steps + 1)
        for step, micro_batches in zip(steps, self.meter.timed(rest_of_epochs), strict=False):
            line, best = self._step(step, micro_batches), False
            if self.held_out is not None and self._evaluates(step):
                self.eval_loss = line["eval_loss"] = self.held_out.loss()
                best = self._is_best(step)
            stop = False
            if self.log is not None:
                self.log(line)
                stop = bool(self.progress.report(step, self.steps, self.meter.note(line)))
            if self.meter.stopped:
                return self.checkpoints.complete()
            stop, due, written = self._agreed(stop, self.checkpoints.due(step), self.checkpoints.written)
            if written:
                self.checkpoints.complete()
            stop &= step < self.steps
            at_once = stop or self._preempted(step)
            if due or best or at_once or step == self.steps:
                self.checkpoints.save(self._state(step))
            if at_once:
                self.checkpoints.complete()
            if stop:
                return
            if self.config.export_every and step % self.config.export_every == 0:
                self._write_model(f"{self.config.output}-step-{step}")
        self.checkpoints.complete()
        if self.config.best and self.best_step is not None:
            self.checkpoints.restore(self.best_step)
        self._write_model(f"{self.folder}/{MODEL}")

    def _write_model(self, folder: str) -> None:
        write_model(folder, self.model, self.config.model, self.parallel)

    def _step(self, step: int, micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """One optimizer step; returns its line of `metrics.jsonl`."""
        self.meter.begin(micro_batches)
        items = self.parallel.sum(torch.cat([batch.divisor for batch in micro_batches]).sum().to(self.device))
        inputs = [batch.to(self.device).inputs for batch in micro_batches]
        # Micro-batch p of rank r of W is number r + p * W of the step: where all have one size, it holds the same samples
        # for any number of ranks.
        seeds = [
            micro_batch_seed(self.config.seed, step, self.rank + place * self.world) for place in range(len(inputs))
        ]
        with memory_advice(self.config, self.model.config, self.world):
            loss = self.parallel.backward(inputs, items.clamp_min(1), seeds)
            norm = self.parallel.step(self.config.clip_norm, loss)
        line = self.meter.end(step, loss, norm, self.schedule.get_last_lr()[0])
        self.schedule.step()
        if self.profiler is not None:
            self.profiler.step()
        failed = [error for batch in micro_batches for error in batch.errors]
        self.errors += failed
        self.cut_off += sum(int((batch.answers == 0).sum()) for batch in micro_batches) - len(failed)
        return line

    def _evaluates(self, step: int) -> bool:
        return step == self.steps or (self.config.eval_every > 0 and step % self.config.eval_every == 0)

    def _is_best(self, step: int) -> bool:
        """Whether the evaluation after a step gave the lowest loss so far, and the run's output is to be that model."""
        if not self.config.best or self.eval_loss is None:
            return False
        if self.best_loss is not None and not self.eval_loss < self.best_loss:
            return False
        self.best_loss, self.best_step = self.eval_loss, step
        return True

    def _preempted(self, step: int) -> bool:
        """Whether a node is about to be taken away and no checkpoint was written since that is known."""
        if self.preemption is None or step % PREEMPTION_STEPS:
            return False
        before, self.heeded = self.heeded, self.preemption()
        return self.heeded is not None and self.heeded != before

    def _agreed(self, *flags: bool) -> list[bool]:
        """The flags of rank 0, on every rank."""
        seen = torch.tensor(flags, dtype=torch.int32, device=self.device) * (self.rank == 0)
        return [bool(flag) for flag in self.parallel.sum(seen).tolist()]

    def _state(self, step: int) -> RunState:
        metrics = {
            "steps": step,
            "loss": self.meter.loss,
            "cut_off": int(self.parallel.sum(torch.tensor(self.cut_off, device=self.device))),
            "failed": self.parallel.gather(self.errors),
            **({} if self.held_out is None else {"eval_loss": self.eval_loss}),
            **({"best_loss": self.best_loss, "best_step": self.best_step} if self.config.best else {}),
        }
        return RunState(metrics=metrics, batches=self.batches.state_dict(), meter=self.meter.state_dict())

    def _meter(self, samples: IndexedSamples) -> StepMeter:
        meter = StepMeter(
            self.parallel,
            self.model,
            sources=[*(source.name for source in samples.sources), "routing"],
            where=samples.where,
            flops=ModelFlops(self.model, light=self.config.stage == "light-router"),
            peak=peak_flops(self.device, self.config.precision),
        )
        if self.resumed.meter:
            meter.load_state_dict(self.resumed.meter)
        return meter


def _parallelized(model: MoVAForConditionalGeneration, config: TrainConfig, device: torch.device) -> Parallel:
    return parallelize(
        LightRouting(model) if config.stage == "light-router" else model,
        strategy=config.strategy,
        precision=config.precision,
        checkpoint_activations=config.checkpoint_activations,
        shard_size=config.shard_size,
        device=device,
        learning_rate=config.learning_rate,
        part_rates=config.part_rates,
        weight_decay=config.weight_decay,
    )


def _chosen(
    config: TrainConfig, rows: Any, sources: list[dict[str, Any]]
) -> tuple[IndexedSamples, FeatureStore | None]:
    """`read_chosen` of what the driver sent."""
    rows = ray.get(rows) if isinstance(rows, ray.ObjectRef) else rows
    return read_chosen(config, rows, [DataSource(**source) for source in sources])


def _held_out(
    config: TrainConfig, chosen: Any, features: FeatureSource, model: Any, parallel: Parallel
) -> HeldOut | None:
    """The held-out samples of a run that has some."""
    if chosen is None:
        return None
    size, config = config.at_once, held_out_config(config)
    samples, _ = _chosen(config, *chosen)
    processor = MoVAProcessor.from_pretrained(config.model)  # of its own thread, as a fast tokenizer allows no two
    reader = StageSamples(config, samples, features, processor, model.config.pool)
    return HeldOut(reader, parallel, size=size)

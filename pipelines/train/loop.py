"""Train: the paper's stages as Ray Train workers that read features from the store.

pretrain: MoV-Adapter and base encoder learn, the LLM is frozen.   sft: everything learns but the experts (paper section 3.3).
router:   only the expert-routing LoRA learns, on routing labels.   light-router: only the light router, on the same labels.
"""

import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_outputs import SequenceClassifierOutput

from mova_core.assemble import stack_features
from mova_core.config import MoVAConfig
from mova_core.data import DataError, Sample, usable_samples
from mova_core.features import FeatureStore
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from mova_core.routing import REWRITTEN, routing_turns
from pipelines.invalid_records import BadRows, read_rows, report_skipped
from pipelines.progress_bar import follow_progress, write_progress

Stage = Literal["pretrain", "sft", "router", "light-router"]
OF_LABELS: tuple[Stage, ...] = ("router", "light-router")  # learn from routing labels and read no features
OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"  # beside the model in a checkpoint
PROGRESS = "progress.json"  # in the run's folder


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Learning rates and batch sizes default to the paper's (PAPER table 1.4) in the command."""

    stage: Stage
    model: str  # folder of the model to start from
    data: str  # LLaVA JSON or JSONL
    store: str  # feature store
    output: str  # folder the trained model goes to
    images: str | None = None  # folder the records' images are relative to; default the data file's
    bad_rows: BadRows = "raise"
    learning_rate: float = 2e-4
    batch_size: int = 32  # samples per step, over all workers
    epochs: float = 1.0
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_length: int = 2048  # tokens
    seed: int = 0
    checkpoint_every: int = 200  # steps
    workers: int = 2
    gpu: bool = False
    loader_processes: int = 0  # per worker
    lora_rank: int = 64  # router stage
    shuffle_pool: bool = True  # router stage: model-pool augmentation
    fingerprints: dict[str, str] = field(default_factory=dict)  # expert -> features to take where the store has several


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


def run_folder(config: TrainConfig) -> Path:
    """Where a run keeps its checkpoints until it is finished: beside its output, on a disk that every worker sees."""
    return Path(f"{config.output}.ray").resolve()


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


def training_samples(config: TrainConfig) -> tuple[list[Sample], list[str]]:
    """The records a stage can learn from: with an answer and a picture that is not in quarantine, for a router with a label.

    Returns:
        them, and what was wrong with each bad row left out.

    Raises:
        DataError: too few of them, or a bad row: broken, with several pictures, or naming an expert the pool does not have.
    """
    pool = MoVAConfig.from_pretrained(config.model).experts

    def check(sample: Sample) -> None:
        if unknown := sorted(set(sample.routing or ()) - set(pool)):
            raise DataError(f"{sample.where}: `routing` names {', '.join(unknown)}; the model has {', '.join(pool)}")
        _ = sample.image  # one at most

    read, skipped = read_rows(config.data, config.images, config.bad_rows, check)
    samples = [sample for sample in usable_samples(read, FeatureStore(config.store).quarantined()) if sample.answer]
    if config.stage in OF_LABELS:
        samples = [sample for sample in samples if sample.routing is not None]
        if not samples:
            raise DataError(f"{config.data} holds no routing label: run `mova label` and give the file it writes")
    least = config.workers * (2 if config.stage == "light-router" else 1)  # one sample has no statistics
    if config.batch_size < least:
        raise DataError(f"--batch-size {config.batch_size} is too small for --workers {config.workers}: give {least}")
    if len(samples) < config.batch_size:
        raise DataError(
            f"{config.data} holds {len(samples)} usable samples, fewer than --batch-size {config.batch_size}"
        )
    return samples, skipped


def check_features(config: TrainConfig, samples: list[Sample], probes: int = 64) -> None:
    """Looks for the features of a few samples before any worker starts; the routers' stages read none.

    Raises:
        MissingFeatures: some are not in the store.
    """
    if config.stage in OF_LABELS:
        return
    pool = MoVAConfig.from_pretrained(config.model).experts
    probed = random.Random(config.seed).sample(samples, min(probes, len(samples)))
    store = FeatureStore(config.store, fingerprints=config.fingerprints)
    store.fetch(
        [sample.image for sample in probed if sample.image is not None],
        [pool if sample.routing is None else sample.routing for sample in probed],
    )


class Batches(Dataset):
    """Step number -> this worker's share of that step's batch. The same for any worker count, so a run can resume anywhere."""

    def __init__(
        self, config: TrainConfig, samples: list[Sample], processor: MoVAProcessor, pool: list[dict[str, Any]]
    ):
        self.config, self.samples, self.processor, self.pool = config, samples, processor, pool
        self.names = [expert["name"] for expert in pool]
        self.store = FeatureStore(config.store, fingerprints=config.fingerprints)
        self.rank, self.world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
        self.per_epoch = len(samples) // config.batch_size
        self.steps = max(1, round(self.per_epoch * config.epochs))
        self.order: tuple[int, list[int]] = (-1, [])  # epoch, its order of the samples

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, at = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            everyone = range(len(self.samples))
            self.order = epoch, random.Random(f"{self.config.seed}/{epoch}").sample(everyone, len(everyone))
        mine = self.order[1][at * self.config.batch_size : (at + 1) * self.config.batch_size][self.rank :: self.world]
        chosen = [(self.samples[index], random.Random(f"{self.config.seed}/{epoch}/{index}")) for index in mine]
        if self.config.stage == "router":
            return self.routing_batch(chosen)
        return self.label_batch(chosen) if self.config.stage == "light-router" else self.answer_batch(chosen)

    def answer_batch(self, chosen: list[tuple[Sample, random.Random]]) -> dict[str, Any]:
        """Questions with the features of their labelled experts; a sample nobody labelled gets 0 to 3 experts by chance."""
        routed = [
            list(sample.routing) if sample.routing is not None else rng.sample(self.names, rng.randint(0, 3))
            for sample, rng in chosen
        ]
        images = [sample.image for sample, _ in chosen if sample.image is not None]
        batch = dict(self._process([sample.turns for sample, _ in chosen], images, False, None))
        features = self.store.fetch(images, routed)
        batch["experts"] = stack_features(features, self.names, torch.device("cpu"), torch.float32)
        batch["routing"] = self._mask(routed)
        return batch

    def routing_batch(self, chosen: list[tuple[Sample, random.Random]]) -> dict[str, Any]:
        """Routing instructions: the pool (shuffled and cut by chance) and the question in, the labelled letters out."""
        turns, questions = [], []
        for sample, rng in chosen:
            augment = rng if self.config.shuffle_pool else None
            turns.append(routing_turns(sample.question, sample.routing or (), self.pool, augment, REWRITTEN))
            questions.append(sample.question)
        images = [sample.image for sample, _ in chosen if sample.image is not None]
        return {**self._process(turns, images, True, questions), "coarse": True}

    def label_batch(self, chosen: list[tuple[Sample, random.Random]]) -> dict[str, Any]:
        """What `LightRouting` takes: pictures and questions in, the labelled experts out."""
        images = [sample.image for sample, _ in chosen if sample.image is not None]
        return {
            "pixel_values": self.processor.base.preprocess(images)["pixel_values"],
            **self.processor.gate_text([sample.question for sample, _ in chosen]),
            "routing": self._mask([sample.routing or () for sample, _ in chosen]),
        }

    def _mask(self, routed: Sequence[Collection[str]]) -> Tensor:
        return torch.tensor([[name in experts for name in self.names] for experts in routed])

    def _process(self, turns: Any, images: Any, routing: bool, questions: list[str] | None) -> Any:
        return self.processor(
            turns,
            images,
            routing=routing,
            labels=True,
            padding_side="right",
            max_length=self.config.max_length,
            questions=questions,
        )


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


def choose_parameters(model: MoVAForConditionalGeneration, config: TrainConfig) -> None:
    """Says which parameters learn in this stage."""
    if config.stage == "router":
        if not model.has_routing_lora:
            model.add_routing_lora(rank=config.lora_rank, alpha=2 * config.lora_rank)
        model.language_model.enable_adapters()
    if config.stage == "light-router" and model.light_router is None:
        model.add_light_router()
    for name, parameter in model.named_parameters():
        lora, light = "lora_" in name, name.startswith("light_router.")
        of_llm = name.startswith("language_model.")
        parameter.requires_grad_(
            {
                "pretrain": not (of_llm or light),
                "sft": not (lora or light),
                "router": lora,
                "light-router": light,
            }[config.stage]
        )


class LightRouting(nn.Module):
    """The light router's loss on what the frozen base and text encoders make of a batch; the LLM has no part in it."""

    def __init__(self, model: MoVAForConditionalGeneration):
        super().__init__()
        assert model.light_router is not None
        self.base_encoder, self.adapter, self.light_router = model.base_encoder, model.adapter, model.light_router

    def train(self, mode: bool = True) -> "LightRouting":
        """The encoders stay as inference has them: no dropout."""
        super().train(False)
        self.light_router.train(mode)
        return self

    def forward(
        self, pixel_values: Tensor, text_input_ids: Tensor, text_attention_mask: Tensor, routing: Tensor
    ) -> SequenceClassifierOutput:
        """Loss of pictures (B, 3, S, S) with questions (B, T) int64 against labels, bool (B, E) in pool order."""
        with torch.no_grad():
            seen = self.base_encoder({"pixel_values": pixel_values}).tokens.mean(1)
            text = self.adapter.encode_text(text_input_ids, text_attention_mask)
        return SequenceClassifierOutput(loss=self.light_router.loss(text, seen, routing))


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


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on the device; features move with their grid kept."""
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if "experts" in batch:
        moved["experts"] = {name: f._replace(tokens=f.tokens.to(device)) for name, f in batch["experts"].items()}
    return moved

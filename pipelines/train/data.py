"""The samples a stage learns from, and the batches a worker reads of them."""

import random
from collections.abc import Collection, Sequence
from typing import Any

import ray.train
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mova_core.assemble import stack_features
from mova_core.config import MoVAConfig
from mova_core.data import DataError, Sample, usable_samples
from mova_core.features import FeatureStore
from mova_core.processing import MoVAProcessor
from mova_core.routing.augmentation import REWRITTEN, routing_turns
from pipelines.invalid_records import read_rows
from pipelines.train.config import LABEL_STAGES, TrainConfig


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
    if config.stage in LABEL_STAGES:
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
    if config.stage in LABEL_STAGES:
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

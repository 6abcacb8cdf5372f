"""From samples to the tensors of a batch, read through `FeatureBatches`."""

import random
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mova_core.assemble import stack_features
from mova_core.data import Sample
from mova_core.features import FeatureBatches, FeatureStore
from mova_core.images import ImageRef
from mova_core.processing import MoVAProcessor
from mova_core.routing.augmentation import REWRITTEN, routing_turns
from pipelines.train.config import TrainConfig


def open_batches(
    config: TrainConfig,
    samples: list[Sample],
    store: FeatureStore,
    processor: MoVAProcessor,
    pool: list[dict[str, Any]],
    rank: int,
    world: int,
) -> FeatureBatches:
    """This rank's share of every batch, as tensors. The batches are the same for any number of ranks."""
    return FeatureBatches(
        StageSamples(config, samples, store, processor, pool),
        config.batch_size,
        seed=config.seed,
        lengths=[sample.length for sample in samples] if config.group_by_length else None,
        rank=rank,
        world=world,
        workers=config.loader_processes,
    )


class StageSamples(Dataset[list[dict[str, Any]]]):
    """Positions of samples -> the tensors of each micro-batch (`TrainConfig.micro_batches`), as the stage's model takes them.

    `FeatureReader` is not used, because it needs the key of every image before the first step: all images of the data
    set would be read and hashed once more.

    Args:
        pool: `MoVAConfig.pool` of the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: list[Sample],
        store: FeatureStore,
        processor: MoVAProcessor,
        pool: list[dict[str, Any]],
    ):
        self.config, self.samples, self.store, self.processor, self.pool = config, samples, store, processor, pool
        self.names = [expert["name"] for expert in pool]
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has random choices of its own for a sample."""
        self.epoch = epoch

    def __getitem__(self, position: int) -> list[dict[str, Any]]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        parts = min(self.config.micro_batches, len(positions))
        return [self._batch(positions[part::parts]) for part in range(parts)]

    def _batch(self, positions: Sequence[int]) -> dict[str, Any]:
        samples = [self.samples[position] for position in positions]
        rngs = [random.Random(f"{self.config.seed}/{self.epoch}/{position}") for position in positions]
        if self.config.stage == "router":
            return self._routing_batch(samples, rngs)
        return self._label_batch(samples) if self.config.stage == "light-router" else self._answer_batch(samples, rngs)

    def _answer_batch(self, samples: list[Sample], rngs: list[random.Random]) -> dict[str, Any]:
        """Questions with the features of their labelled experts; a sample without a label gets 0 to 3 random experts."""
        routed = [
            list(sample.routing) if sample.routing is not None else rng.sample(self.names, rng.randint(0, 3))
            for sample, rng in zip(samples, rngs, strict=True)
        ]
        images = [image.loaded() for image in _images(samples)]  # the key and the pixels need the same bytes
        batch = self._process([sample.turns for sample in samples], images, False, None)
        features = self.store.fetch(images, routed)
        batch["experts"] = stack_features(features, self.names, torch.device("cpu"), torch.float32)
        batch["routing"] = self._mask(routed)
        return batch

    def _routing_batch(self, samples: list[Sample], rngs: list[random.Random]) -> dict[str, Any]:
        """Routing instructions: the pool (by default shuffled and cut at random) and the question in, letters out."""
        turns = []
        for sample, rng in zip(samples, rngs, strict=True):
            augmentation = rng if self.config.shuffle_pool else None
            turns.append(routing_turns(sample.question, sample.routing or (), self.pool, augmentation, REWRITTEN))
        questions = [sample.question for sample in samples]
        return {**self._process(turns, _images(samples), True, questions), "coarse": True}

    def _label_batch(self, samples: list[Sample]) -> dict[str, Any]:
        """What `LightRouting` takes: pictures and questions in, the labelled experts out."""
        return {
            "pixel_values": self.processor.base.preprocess(_images(samples))["pixel_values"],
            **self.processor.gate_text([sample.question for sample in samples]),
            "routing": self._mask([sample.routing or () for sample in samples]),
        }

    def _mask(self, routed: Sequence[Collection[str]]) -> Tensor:
        """Experts per sample as a mask (B, E), bool, in pool order."""
        return torch.tensor([[name in experts for name in self.names] for experts in routed])

    def _process(
        self, turns: Any, images: list[ImageRef], routing: bool, questions: list[str] | None
    ) -> dict[str, Any]:
        return dict(
            self.processor(
                turns,
                images,
                routing=routing,
                labels=True,
                padding_side="right",
                max_length=self.config.max_length,
                questions=questions,
            )
        )


def _images(samples: list[Sample]) -> list[ImageRef]:
    return [sample.image for sample in samples if sample.image is not None]

"""From samples to the tensors of a batch, read through `FeatureBatches`."""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mova_core.assemble import stack_features
from mova_core.data import Sample
from mova_core.experts import Features
from mova_core.features import FeatureBatches, FeaturePartition, FeatureSource
from mova_core.images import ImageError, ImageRef
from mova_core.processing import IGNORE, MoVAProcessor, Turns
from mova_core.routing.augmentation import REWRITTEN, routing_turns
from pipelines.train.config import TrainConfig
from pipelines.train.index import IndexedSamples


@dataclass(kw_only=True)
class MicroBatch:
    """B samples that a worker computes at once.

    Attributes:
        inputs: of the stage's learner, tensors on the CPU.
        answers: tokens that each sample learns to predict (B,) int64; 1 in the stage light-router, which predicts a label.
        divisor: what each sample adds to the number that a step's summed loss is divided by (B,) float32.
        positions: of the samples in the run's rows (B,) int64.
        sources: number of the data file of each sample (B,) int64; routing samples of the stage sft have the number behind
            the last file.
        errors: of the samples that cannot be used after all; they stand in the batch and teach nothing.
    """

    inputs: dict[str, Any]
    answers: Tensor
    divisor: Tensor
    positions: Tensor
    sources: Tensor
    errors: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> "MicroBatch":
        """The batch with its inputs on a device; the copy of a pinned batch goes on while the caller does."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """The batch with its inputs in page-locked memory, which a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        inputs: dict[str, Any] = {
            key: change(value) if isinstance(value, Tensor) else value for key, value in self.inputs.items()
        }
        if "experts" in inputs:
            inputs["experts"] = {name: f._replace(tokens=change(f.tokens)) for name, f in inputs["experts"].items()}
        return replace(self, inputs=inputs)


def open_batches(
    config: TrainConfig,
    samples: IndexedSamples,
    features: FeatureSource,
    processor: MoVAProcessor,
    pool: list[dict[str, Any]],
    rank: int,
    world: int,
    base: FeaturePartition | None = None,
) -> FeatureBatches:
    """This rank's share of every batch, in micro-batches. The batches are the same for any number of ranks."""
    return FeatureBatches(
        StageSamples(config, samples, features, processor, pool, base),
        config.batch_size,
        seed=config.seed,
        lengths=samples.rows["length"] if config.group_by_length else None,
        rank=rank,
        world=world,
        workers=config.loader_processes,
        pin=config.gpu,
    )


class StageSamples(Dataset[list[MicroBatch]]):
    """Positions of samples -> their micro-batches (`TrainConfig.micro_batches`), as the stage's learner takes them.

    `FeatureReader` is not used, because it needs the key of every image before the first step: all images of the data
    set would be read and hashed once more.

    Args:
        pool: `MoVAConfig.pool` of the model.
        base: features of the base encoder, where it is frozen and the store has them: a picture found there is not decoded.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: IndexedSamples,
        features: FeatureSource,
        processor: MoVAProcessor,
        pool: list[dict[str, Any]],
        base: FeaturePartition | None = None,
    ):
        self.base = base
        self.config, self.samples, self.features, self.processor, self.pool = config, samples, features, processor, pool
        self.names = [expert["name"] for expert in pool]
        # The computation would narrow them first: half the bytes to pin and to copy.
        self.dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has random choices of its own for a sample."""
        self.epoch = epoch

    def __getitem__(self, position: int) -> list[MicroBatch]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> list[MicroBatch]:
        parts = min(self.config.micro_batches, len(positions))
        return [self._micro_batch(positions[part::parts]) for part in range(parts)]

    def _micro_batch(self, positions: Sequence[int]) -> MicroBatch:
        samples = [self._sample(position) for position in positions]
        errors: list[str] = []
        try:
            inputs = self._inputs(samples)
        except (ImageError, ValueError):
            for number, position in enumerate(positions):
                try:
                    self._inputs(samples[number : number + 1])
                except (ImageError, ValueError) as error:
                    errors.append(f"{self.samples.where(position)}: {error}")
                    samples[number] = _Prepared()
            if not errors:
                raise
            inputs = self._inputs(samples)
        if "labels" in inputs:
            answers = (inputs["labels"][:, 1:] != IGNORE).sum(1)
        else:
            answers = torch.tensor([int(sample.usable) for sample in samples])
        divisor = answers.float()
        if "labels" in inputs and self.config.loss == "sample":
            inputs["loss_weights"] = 1 / divisor.clamp_min(1)
            divisor = (answers > 0).float()
        rows = self.samples.rows[list(positions)]
        sources = np.where(rows["routing"], len(self.samples.sources), rows["source"])
        return MicroBatch(
            inputs=inputs, answers=answers, divisor=divisor, positions=torch.tensor(positions),
            sources=torch.from_numpy(sources.astype(np.int64)), errors=errors,
        )  # fmt: skip

    def _sample(self, position: int) -> "_Prepared":
        """A sample as its stage learns from it.

        Answers: the conversation with the labelled experts. Routing: the pool (by default shuffled and cut at random) and the
        question in, letters out; the picture is coarse and no expert is fused.
        """
        sample: Sample = self.samples[position]
        rng = random.Random(f"{self.config.seed}/{self.epoch}/{position}")
        if self.config.stage == "router" or self.samples.rows["routing"][position]:
            augmentation = rng if self.config.shuffle_pool else None
            turns: Turns = routing_turns(sample.question, sample.routing or (), self.pool, augmentation, REWRITTEN)
            return _Prepared(turns=turns, question=sample.question, images=sample.images, routing=True)
        experts: Sequence[str] = sample.routing or ()
        if sample.routing is None and self.config.unlabelled == "random":
            experts = rng.sample(self.names, rng.randint(0, 3))
        # The key and the pixels of a picture need the same bytes.
        images = tuple(_loaded(image) for image in sample.images)
        return _Prepared(turns=sample.turns, question=sample.question, images=images, experts=tuple(experts))

    def _inputs(self, samples: Sequence["_Prepared"]) -> dict[str, Any]:
        """What the stage's learner takes.

        Raises:
            ImageError: a picture cannot be read.
            ValueError: `max_length` cuts a picture, or too few samples are left for the light router.
            MissingFeatures: the store lacks features of a routed expert.
        """
        if self.config.stage == "light-router":
            return self._of_labels([sample for sample in samples if sample.usable])
        inputs: dict[str, Any] = dict(
            self.processor(
                [sample.turns for sample in samples],
                [sample.images for sample in samples],
                routing=[sample.routing for sample in samples],
                labels=True,
                padding_side="right",
                max_length=self.config.max_length,
                pixels=False,
            )
        )
        inputs["labels"][[not sample.usable for sample in samples]] = IGNORE
        pictures = [(image, sample) for sample in samples for image in sample.images]
        routed = [sample.experts for _, sample in pictures] or [()]
        inputs |= self._pictures([image for image, _ in pictures], [sample.question for _, sample in pictures])
        inputs["experts"] = self._features([image for image, _ in pictures], routed)
        inputs["routing"] = self._mask(routed)
        inputs["coarse"] = [sample.routing for _, sample in pictures] or [False]
        return inputs

    def _pictures(self, images: Sequence[ImageRef], questions: Sequence[str]) -> dict[str, Any]:
        """What the base encoder and the gate read: pictures, or their stored features, and the question on each.

        Without a picture a blank one that no row shows: every part needs a gradient on every rank.
        """
        if not images:
            side = self.processor.base.arch["image_size"]
            blank = torch.zeros(1, 3, side, side, dtype=self.dtype)
            return {"pixel_values": blank, **self.processor.gate_text(["."]), "unseen": True}
        text = self.processor.gate_text(questions)
        keys = list(dict.fromkeys(image.key for image in images)) if self.base is not None else []
        if self.base is None or self.base.missing(keys):
            pixels = self.processor.base.preprocess(list(images))["pixel_values"]
            return {"pixel_values": pixels.to(self.dtype), **text}
        found = dict(zip(keys, self.base.read(keys), strict=True))
        return {"base": torch.stack([found[image.key].tokens for image in images]).to(self.dtype), **text}

    def _features(self, images: Sequence[ImageRef], routed: Sequence[Collection[str]]) -> dict[str, Features]:
        """Features per expert of the pictures that are routed to it."""
        wanted = [number for number, experts in enumerate(routed) if experts]
        fetched = self.features.fetch([images[n] for n in wanted], [list(routed[n]) for n in wanted]) if wanted else []
        return stack_features(fetched, self.names, torch.device("cpu"), self.dtype)

    def _of_labels(self, samples: Sequence["_Prepared"]) -> dict[str, Any]:
        """What `LightRouting` takes: pictures and questions in, the labelled experts out."""
        shown = self._pictures([sample.images[0] for sample in samples], [sample.question for sample in samples])
        return {**shown, "routing": self._mask([sample.experts for sample in samples])}

    def _mask(self, routed: Sequence[Collection[str]]) -> Tensor:
        """Experts per picture as a mask (M, E), bool, in pool order."""
        return torch.tensor([[name in experts for name in self.names] for experts in routed])


@dataclass(kw_only=True)
class _Prepared:
    """A sample as the processor takes it; without arguments the place of one that cannot be used."""

    turns: Turns = (("user", "."), ("assistant", "."))
    question: str = ""
    images: Sequence[ImageRef] = ()
    experts: tuple[str, ...] = ()
    routing: bool = False

    @property
    def usable(self) -> bool:
        return bool(self.question)


def _loaded(image: ImageRef) -> ImageRef:
    """The picture with its bytes; one that cannot be read fails where its batch is made."""
    try:
        return image.loaded()
    except ImageError:
        return image

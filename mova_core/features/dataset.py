"""Features for training: random access by position, and shuffled batches that can be interrupted and resumed.

`FeatureReader` is a torch map-style Dataset, so any DataLoader accepts it. `FeatureBatches` adds an order by seed and epoch,
each rank's share of every batch, reading ahead, and a state to resume from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mova_core.features.index import binary_keys
from mova_core.features.store import FeatureStore, MissingFeatures
from mova_core.images import ImageRef
from mova_core.samplers import Lengths, epoch_order

if TYPE_CHECKING:
    from mova_core.experts import Features

KEY_BYTES = 32


class FeatureReader(Dataset["dict[str, Features]"]):
    """A dataset: position -> {expert: Features} with tokens (H*W, C) in the stored dtype.

    A reader holds 32 bytes per image and a number for its list of experts, so it pickles fast to worker processes.

    Args:
        store: the feature store.
        experts: names, for every image; or one list of names per image.
        images: keys (hex sha256) or references, in the order of the positions; default all images of which the store
            has the features of all `experts`, ordered by key.

    Raises:
        ValueError: there is no image or no expert, or not one list of experts per image.
        MissingFeatures: lists every (image, expert) pair that is not stored.
        StoreError: the store has no features of an expert, or of several weights and none was chosen.
    """

    def __init__(
        self,
        store: FeatureStore,
        experts: Sequence[str] | Sequence[Sequence[str]],
        images: Sequence[str | ImageRef] | None = None,
    ):
        self.store = store
        everywhere = [name for name in experts if isinstance(name, str)]
        if images is None:
            if not everywhere:
                raise ValueError("without images, give the names of the experts whose images are wanted")
            held = [store.partition(name).keys() for name in everywhere]
            image_keys = held[0]
            for keys in held[1:]:
                image_keys = np.intersect1d(image_keys, keys, assume_unique=True)
        else:
            hexes = [image.key if isinstance(image, ImageRef) else image for image in images]
            image_keys = binary_keys(hexes).astype(f"S{KEY_BYTES}")
        if not len(image_keys):
            raise ValueError(f"{store!r} has no image with features of {', '.join(everywhere)}: run `mova precompute`")
        self._keys = np.ascontiguousarray(image_keys).view(np.uint8).reshape(-1, KEY_BYTES)
        self._choices: list[tuple[str, ...]] = [tuple(everywhere)]  # the different lists of experts
        self._choice: np.ndarray | None = None  # index in `_choices` of each image; None: all 0
        if not everywhere:
            if len(experts) != len(self._keys):
                raise ValueError(f"{len(experts)} lists of experts for {len(self._keys)} images: give one for each")
            numbers: dict[tuple[str, ...], int] = {}
            chosen = [numbers.setdefault(tuple(names), len(numbers)) for names in experts]
            self._choices, self._choice = list(numbers), np.array(chosen, np.uint32)
        if images is not None:
            self._check()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, position: int) -> str:
        """The hex sha256 of the image at a position."""
        return self._keys[position].tobytes().hex()

    def experts(self, position: int) -> tuple[str, ...]:
        """The experts whose features a position has."""
        return self._choices[0 if self._choice is None else int(self._choice[position])]

    def __getitem__(self, position: int) -> dict[str, Features]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Features]]:
        """The features of several positions; each feature is read once.

        Raises:
            StoreError: a feature is damaged, or was withdrawn since the reader was created.
        """
        wanted: dict[str, dict[str, None]] = {}
        for position in positions:
            for name in self.experts(position):
                wanted.setdefault(name, {})[self.key(position)] = None
        read = {
            name: dict(zip(keys, self.store.partition(name).read(list(keys)), strict=True))
            for name, keys in wanted.items()
        }
        return [{name: read[name][self.key(at)] for name in self.experts(at)} for at in positions]

    def _check(self) -> None:
        """Raises MissingFeatures now rather than in the middle of an epoch."""
        missing: list[tuple[str, str]] = []
        for name in dict.fromkeys(name for choice in self._choices for name in choice):
            with_expert = [number for number, choice in enumerate(self._choices) if name in choice]
            rows = slice(None) if self._choice is None else np.isin(self._choice, with_expert)
            hexes = [row.tobytes().hex() for row in self._keys[rows]]
            missing += [(key, name) for key in dict.fromkeys(self.store.missing(hexes, name))]
        if missing:
            raise MissingFeatures.of(self.store.location, missing)


class FeatureBatches:
    """Shuffled batches of a reader; iterating yields the rest of the epoch.

    A batch is `batch_size` positions over all ranks, dealt round-robin; an incomplete batch at the end of an epoch is left
    out. So batches are the same for any number of ranks and workers, and a run on two ranks can resume on three.

    Args:
        reader: a `FeatureReader`, or any object with `__len__` and `__getitems__(positions)`, which returns the batch. If
            the reader has a method `set_epoch(epoch)`, it is called before each epoch.
        batch_size: positions per batch, over all ranks.
        seed: of the order, with the epoch (`mova_core.samplers.epoch_order`).
        shuffle: False keeps the order of the positions in every epoch.
        lengths: of the samples, as `epoch_order` takes them: a batch then has one modality and similar lengths.
        rank, world: number of this rank, and how many ranks there are.
        workers: DataLoader processes; 0: one thread reads ahead, which is as fast unless images are decoded as well.
        ahead: batches read ahead, by each worker.
        pin: put batches, lists of items that have `pin_memory()`, into page-locked memory before the caller gets them.

    Attributes:
        epoch, batch: of the next batch.

    Raises:
        ValueError: there are fewer samples than a batch holds, more ranks than that, or not one length per sample.
    """

    def __init__(
        self,
        reader: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        lengths: Lengths | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        ahead: int = 2,
        pin: bool = False,
    ):
        if not 0 < world <= batch_size <= len(reader):
            raise ValueError(
                f"batch_size {batch_size} must be at least the {world} ranks and at most the {len(reader)} samples"
            )
        self.reader = reader
        self.batch_size, self.seed, self.shuffle, self.lengths = batch_size, seed, shuffle, lengths
        self.rank, self.world = rank, world
        self.workers, self.ahead, self.pin = workers, ahead, pin
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.reader) // self.batch_size

    def positions(self, epoch: int) -> np.ndarray:
        """The order of an epoch: (samples,) int64."""
        return epoch_order(
            len(self.reader),
            self.seed,
            epoch,
            shuffle=self.shuffle,
            lengths=self.lengths,
            batch_size=self.batch_size,
        )

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self.reader, "set_epoch"):
            self.reader.set_epoch(self.epoch)
        order = self.positions(self.epoch)
        starts = range(self.batch * self.batch_size, len(self) * self.batch_size, self.batch_size)
        shares = (order[at : at + self.batch_size][self.rank :: self.world].tolist() for at in starts)
        for batch in self._in_processes(list(shares)) if self.workers else self._in_a_thread(shares):
            self.batch += 1  # counts batches that the caller has, not those read ahead
            if self.batch == len(self):
                self.epoch, self.batch = self.epoch + 1, 0
            yield batch

    def _in_processes(self, shares: list[list[int]]) -> Iterator[Any]:
        return iter(
            DataLoader(
                self.reader,
                batch_sampler=shares,
                num_workers=self.workers,
                prefetch_factor=self.ahead,
                collate_fn=_unchanged,
                pin_memory=self.pin,
            )
        )

    def _in_a_thread(self, shares: Iterator[list[int]]) -> Iterator[Any]:
        with ThreadPoolExecutor(1, thread_name_prefix="mova-read-ahead") as thread:
            reading: deque[Future[Any]] = deque(
                thread.submit(self._read, share) for share in islice(shares, self.ahead)
            )
            try:
                while reading:
                    batch = reading.popleft().result()
                    reading.extend(thread.submit(self._read, share) for share in islice(shares, 1))
                    yield batch
            finally:
                for future in reading:
                    future.cancel()

    def _read(self, share: list[int]) -> Any:
        batch = self.reader.__getitems__(share)
        return [item.pin_memory() for item in batch] if self.pin else batch

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch that the caller got, as plain numbers for a checkpoint."""
        return {"epoch": self.epoch, "batch": self.batch, **self._order_settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resumes from `state` at the next iteration.

        Raises:
            ValueError: the state is of batches with other settings: resuming would repeat and omit samples.
        """
        for name, value in self._order_settings().items():
            stored = state.get(name, 0)  # states written before `lengths` existed lack the key
            if stored != value:
                raise ValueError(f"the state is of batches with {name} {stored}, these have {value}")
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _order_settings(self) -> dict[str, int]:
        return {
            "samples": len(self.reader),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "lengths": 0 if self.lengths is None else crc32(np.asarray(self.lengths, np.int64).tobytes()),
        }


def _unchanged(batch: Any) -> Any:
    return batch

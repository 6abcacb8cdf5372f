"""What one expert has to compute in a run: which pictures, cut into which shards, by which pools."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster.pools import PoolSpec
from mova_core.features import FeaturePartition
from pipelines.precompute.shard_queue import CHUNK_ROWS

BLOCKS = 1024  # per expert: enough that no actor waits for another at the end, few enough for the driver
BLOCKS_PER_ACTOR = 32


class ImageTable:
    """The pictures of a run, shared by its experts: the driver keeps the keys, Ray's object store the rest.

    Args:
        images: `key` (sha256) and `image` (locator) of each picture.
    """

    def __init__(self, images: pa.Table):
        self.keys = binary(images["key"])
        self._images = images.select(["key", "image"])
        self._chunks: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def chunks(self, positions: np.ndarray) -> dict[int, Any]:
        """Ray references to the parts of the table that hold these positions; workers of all experts read the same."""
        numbers = np.unique(positions // CHUNK_ROWS).tolist()
        for number in numbers:
            if number not in self._chunks:
                part = self._images.slice(number * CHUNK_ROWS, CHUNK_ROWS)
                self._chunks[number] = ray.put(part.combine_chunks())
        return {number: self._chunks[number] for number in numbers}


@dataclass(kw_only=True, eq=False)
class ExpertWorkload:
    """What one expert computes in a run."""

    expert: str
    partition: FeaturePartition | None  # None: not in the store yet
    images: ImageTable
    wanted: np.ndarray | None  # positions in `images`; None for all
    shard_rows: int  # pictures per shard
    feature_bytes: int  # of one picture
    arguments: dict[str, Any]  # of its ExpertServer
    pools: tuple[PoolSpec, ...] = ()
    missing: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))  # positions in `images`

    def __len__(self) -> int:
        """Pictures wanted, those already stored too."""
        return len(self.images) if self.wanted is None else len(self.wanted)

    def refresh_missing(self, failed: Iterable[str] = ()) -> int:
        """Asks the store which features are missing; returns how many.

        Args:
            failed: keys (hex) of pictures to leave out.
        """
        keys = self.images.keys if self.wanted is None else self.images.keys[self.wanted]
        missing = np.arange(len(keys)) if self.partition is None else self.partition.missing_positions(keys)
        if failed_keys := [bytes.fromhex(key) for key in failed]:
            missing = missing[~np.isin(keys[missing], np.array(failed_keys, "S32"))]
        missing = missing if self.wanted is None else self.wanted[missing]
        self.missing = missing.astype(np.uint32 if len(self.images) < 2**32 else np.int64)
        return len(self.missing)

    def block_shards(self) -> int:
        """Shards per block, so that blocks are few enough for the driver and enough for every actor."""
        shards = -(-len(self.missing) // self.shard_rows)
        actors = sum(pool.max_size for pool in self.pools)
        return max(1, -(-shards // max(BLOCKS, BLOCKS_PER_ACTOR * actors)))


def binary(keys: pa.ChunkedArray) -> np.ndarray:
    """A column of sha256 keys as an array of dtype S32; not copied where the column has one chunk."""
    column = keys.chunk(0) if keys.num_chunks == 1 else keys.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no chunk
        return np.zeros(0, "S32")
    start = column.offset * 32
    return np.frombuffer(column.buffers()[1] or b"", np.uint8)[start : start + 32 * len(column)].view("S32")


def without(
    positions: np.ndarray | None, images: ImageTable, failed: Mapping[bytes, Any]
) -> tuple[np.ndarray | None, np.ndarray]:
    """Wanted positions without the pictures whose keys failed, and the positions left out."""
    if not failed:
        return positions, np.zeros(0, np.int64)
    everything = np.arange(len(images)) if positions is None else positions
    out = np.isin(images.keys[everything], np.array(list(failed), "S32"))
    return everything[~out], everything[out]

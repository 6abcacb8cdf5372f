"""Features of a store as a Ray Dataset, for work that needs a cluster: statistics, labels, another format.

A row is a feature: `key` (hex sha256 of the image), `tokens` (the bytes of (H*W, C) in `dtype`, row by row), `grid`
([H, W]), `channels` and `dtype`. Tokens are bytes because neither numpy nor Arrow has bfloat16 and Arrow's list columns are
slow; `features_of` converts rows to tensors. Training reads `mova_core.features.FeatureBatches` instead.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
import torch
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from mova_core.experts import Features
from mova_core.features import FeatureReader, FeatureStore

ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("tokens", pa.large_binary()),
        ("grid", pa.list_(pa.int32(), 2)),
        ("channels", pa.int32()),
        ("dtype", pa.string()),
    ]
)
BLOCK_BYTES = 64 << 20  # approximate size of a block of Ray Data


def read_features(store: FeatureStore, expert: str, keys: Sequence[str] | None = None) -> ray.data.Dataset:
    """A Dataset with one row per feature of an expert, in the columns of `ROWS`; tasks on all nodes read it.

    Args:
        store: a store that every node can open.
        expert: name.
        keys: hex sha256 of the images; default all stored images, ordered by key.

    Raises:
        MissingFeatures: a key is not stored.
        StoreError: the store has no features of the expert, or of several weights and none was chosen.
        ValueError: there is no image.
    """
    return ray.data.read_datasource(_StoredFeatures(store, expert, keys))


def features_of(rows: pa.Table) -> list[Features]:
    """The features of the rows of a block, tokens (H*W, C). They share the block's memory: do not change them."""
    columns = (rows[name] for name in ("tokens", "grid", "channels", "dtype"))
    return [
        Features(
            torch.frombuffer(tokens.as_buffer(), dtype=getattr(torch, dtype.as_py())).view(-1, channels.as_py()),
            tuple(grid.as_py()),
        )
        for tokens, grid, channels, dtype in zip(*columns, strict=True)
    ]


class _StoredFeatures(Datasource):
    """Splits the images into read tasks; each task opens the store on the node where it runs."""

    def __init__(self, store: FeatureStore, expert: str, keys: Sequence[str] | None):
        super().__init__()
        self.reader = FeatureReader(store, [expert], keys)
        self.expert = expert
        self.row_bytes = max(1, store.partition(expert).stat()["bytes_per_feature"])

    def estimate_inmemory_data_size(self) -> int:
        return len(self.reader) * self.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        count = len(self.reader)
        most = max(1, BLOCK_BYTES // self.row_bytes)
        size = min(-(-count // max(1, parallelism)), most, per_task_row_limit or most)
        tasks = []
        for at in range(0, count, size):
            keys = [self.reader.key(position) for position in range(at, min(at + size, count))]
            metadata = BlockMetadata(len(keys), len(keys) * self.row_bytes, None, None)
            tasks.append(ReadTask(partial(_read, self.reader.store, self.expert, keys), metadata, ROWS))
        return tasks


def _read(store: FeatureStore, expert: str, keys: Sequence[str]) -> Iterator[pa.Table]:
    features = store.partition(expert).read(keys)
    tokens = [feature.tokens.contiguous().view(torch.uint8).numpy().data for feature in features]
    yield pa.table(
        {
            "key": keys,
            "tokens": pa.array([bytes(row) for row in tokens], pa.large_binary()),
            "grid": [list(feature.grid) for feature in features],
            "channels": [feature.tokens.shape[1] for feature in features],
            "dtype": [str(feature.tokens.dtype).removeprefix("torch.") for feature in features],
        },
        schema=ROWS,
    )

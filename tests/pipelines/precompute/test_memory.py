"""The driver's memory per picture: what it holds of 15 million pictures must fit beside the work."""

import hashlib
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from mova_core.features import FeaturePartition, FeatureStore, index, partition
from mova_core.features.index import RECEIPT, parquet
from pipelines.precompute.inspect_images import _each_once, _keep_listing, _seen_before
from pipelines.precompute.listing import image_table
from pipelines.precompute.shard_queue import ShardQueue
from pipelines.precompute.workload import ExpertWorkload, ImageTable

FEW, MANY = 4_000, 16_000
ROWS = 320  # pictures per shard
LIMIT = (
    300  # bytes per picture, with 48 of them for its locator; measured: 247, and 512 with three copies of the receipts
)


class MemoryMeter:
    """The largest memory of Python and Arrow, bytes, phase by phase. Both peaks of a phase count as if at one moment.

    Arrow's part is the largest of all phases so far, in a pool that nothing else of this process uses.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, pool = pa.default_memory_pool(), pa.system_memory_pool()
        pa.set_memory_pool(pool)
        tracemalloc.reset_peak()
        try:
            yield
            self.peaks[name] = tracemalloc.get_traced_memory()[1] + pool.max_memory()
        finally:
            pa.set_memory_pool(before)


def digests(count: int) -> np.ndarray:
    keys = b"".join(hashlib.sha256(number.to_bytes(4)).digest() for number in range(count))
    return np.frombuffer(keys, np.uint8).reshape(count, 32)


def write_receipts(stored: FeaturePartition, keys: np.ndarray) -> None:
    """Receipts of features that nobody computed: what the driver finds when an expert is done."""
    for start in range(0, len(keys), ROWS):
        shard = [key.tobytes().hex() for key in keys[start : start + ROWS]]
        shard_id, count = stored.shard_id(shard), len(shard)
        numbers = np.arange(count)
        columns = {
            "key": shard,
            "file": [f"{shard_id}-0123456789ab.safetensors"] * count,
            "offset": 8192 * numbers,
            "length": np.full(count, 8192),
            "grid": [[8, 8]] * count,
            "dtype": ["float32"] * count,
            "channels": np.full(count, 32, np.int32),
            "xxh3": numbers.astype(np.uint64),
            "loss": np.zeros(count, np.float32),
        }
        receipt = parquet(pa.table(columns, schema=RECEIPT))
        assert stored.storage.put_if_absent(f"receipts/{shard_id}.parquet", receipt)


def partition_of(store: FeatureStore) -> FeaturePartition:
    description = {"dtype": "float32", "channels": 32, "grid": [8, 8]}
    return FeaturePartition.open_or_create(f"{store.location}/sam/{'0' * 64}", description)


def driver_peaks(folder: Path, count: int) -> dict[str, int]:
    """Bytes that the driver holds at most of so many pictures, in each phase of a run but the computing itself."""
    names = [f"/data/pictures/{number:012}.jpg" for number in range(count)]
    versions = pa.chunked_array([pa.array([f"{number:09}-1700000000000000000" for number in range(count)])])
    hashes = digests(count)
    empty, full = (FeatureStore(folder / name, create=True) for name in ("empty", "full"))
    write_receipts(partition_of(full), hashes)
    meter = MemoryMeter()
    tracemalloc.start()
    try:
        with meter.phase("list"):
            images = image_table(names)
        with meter.phase("inspect"):
            keys = hashes.copy()
            _keep_listing(images["image"], versions, keys, {}, [], full)
            readable = _each_once(images, keys)
        with meter.phase("inspect again"):
            seen, _ = _seen_before(images["image"], full, set())
            assert seen["key"].null_count == 0
        del images, keys, seen
        with meter.phase("plan"):
            work = ExpertWorkload(
                expert="sam",
                partition=partition_of(empty),
                images=ImageTable(readable),
                wanted=None,
                shard_rows=ROWS,
                feature_bytes=8192,
                arguments={},
            )
            assert work.refresh_missing() == count
            ShardQueue(work.missing, work.shard_rows, work.block_shards(), {})
        with meter.phase("end of an expert"):
            work.partition = partition_of(full)
            assert work.refresh_missing() == 0
        with meter.phase("snapshot"):
            work.partition.snapshot()
    finally:
        tracemalloc.stop()
    return meter.peaks


def test_bytes_per_picture(tmp_path, monkeypatch):
    for module in (index, partition):
        monkeypatch.setattr(module, "SORTED_BLOCK", 512)  # so that it is to these pictures what it is to millions
    few, many = (driver_peaks(tmp_path / str(count), count) for count in (FEW, MANY))
    slopes = {phase: (many[phase] - few[phase]) / (MANY - FEW) for phase in many}
    assert max(slopes.values()) < LIMIT, slopes

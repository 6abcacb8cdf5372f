"""The first look at every picture: hashed and decoded once, by worker processes that start without torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mova_core.images import ImageError, ImageRef
from pipelines.progress import progress_bar

if TYPE_CHECKING:  # workers load this file
    from mova_core.features import FeatureStore

ROWS = 256  # images per task, at most
KEY = pa.binary(32)
INSPECTED = pa.schema([("row", pa.int64()), ("key", KEY), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What came of looking at images."""

    readable: pa.Table  # `key` (sha256), `image` (locator), `experts` (null: all); each key once, in the source's order
    refused: list[dict[str, str]]  # {"path", "reason"}, one per image, in the source's order


def inspect(images: pa.Table, store: "FeatureStore", progress: bool = True) -> Inspected:
    """Hashes and decodes every image once. Needs an open Ray session.

    Pictures that are no pictures go to the store's quarantine with their reason, each once; files that cannot be read do
    not: they may come back.

    Args:
        images: as `find_images` gives them.
    """
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = pa.table({"row": np.arange(len(images)), "image": images["image"]})
    size = max(1, min(ROWS, len(rows) // int(4 * ray.cluster_resources().get("CPU", 1))))
    blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
    keys = np.zeros((len(images), 32), dtype=np.uint8)
    refused: dict[int, tuple[bool, str]] = {}
    with progress_bar(len(images), "inspect", "images", progress) as bar:
        looked_at = ray.data.from_arrow(blocks).map_batches(inspect_images, batch_format="pyarrow", batch_size=None)
        for batch in looked_at.iter_batches(batch_format="pyarrow", batch_size=None):
            assert isinstance(batch, pa.Table)
            bar.update(len(batch))
            at, key = batch["row"].to_numpy(), batch["key"].combine_chunks()
            there = key.is_valid().to_numpy(zero_copy_only=False)
            keys[at[there]] = np.frombuffer(b"".join(key.drop_null().to_pylist()), np.uint8).reshape(-1, 32)
            for row, readable, error in zip(at.tolist(), there.tolist(), batch["error"].to_pylist(), strict=True):
                if error is not None:
                    refused[row] = readable, error
    bad = sorted(refused)
    paths = dict(zip(bad, images["image"].take(pa.array(bad, pa.int64())).to_pylist(), strict=True))
    known = {(row["image"], row["reason"]) for row in store.quarantined()}
    store.quarantine(
        [
            {"image": paths[row], "sha256": keys[row].tobytes().hex(), "reason": refused[row][1], "expert": None}
            for row in bad
            if refused[row][0] and (paths[row], refused[row][1]) not in known
        ]
    )
    good = np.setdiff1d(np.arange(len(images)), bad, assume_unique=True)
    return Inspected(
        readable=_each_once(images.take(good), keys[good]),
        refused=[{"path": paths[row], "reason": refused[row][1]} for row in bad],
    )


def inspect_images(rows: pa.Table) -> pa.Table:
    """Rows with `image` locators to rows with `key` (of the encoded bytes) and, for one that cannot be used, its `error`."""
    keys: list[bytes | None] = []
    errors: list[str | None] = []
    for path in rows["image"].to_pylist():
        image, key, reason = ImageRef(path=path), None, None
        try:
            key = bytes.fromhex(image.key)
            image.decode()
        except ImageError as error:
            reason = str(error).removeprefix(f"{path}: ")  # the path stands beside it
        keys.append(key)
        errors.append(reason)
    return pa.table([rows["row"], pa.array(keys, KEY), pa.array(errors, pa.string())], schema=INSPECTED)


def _each_once(images: pa.Table, keys: np.ndarray) -> pa.Table:
    """One row per key, where it first stands; it needs the experts that any of its rows needs."""
    from pipelines.sources import united  # only here: it costs workers the seconds that torch takes to start

    _, first, group = np.unique(keys.view("V32").reshape(-1), return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    kept = np.ascontiguousarray(keys[first[order]])
    return pa.table(
        {
            "key": pa.FixedSizeBinaryArray.from_buffers(KEY, len(kept), [None, pa.py_buffer(kept)]),
            "image": images["image"].take(pa.array(first[order])),
            "experts": united(images["experts"], place[group.reshape(-1)], len(order)),
        }
    )

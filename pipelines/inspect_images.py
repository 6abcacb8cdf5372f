"""The first look at every picture: hashed and decoded once, by worker processes that start without torch.

What was seen is kept in <store>/listings/*.parquet: of each image a version (size and time, or ETag) and the key found, so
that a later run reads only what is new or has changed. Nothing depends on these files; delete them at will.
"""

import contextlib
import hashlib
import io
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mova_core import locators
from mova_core.images import ImageError, load_image, read_image
from pipelines.progress import progress_bar

if TYPE_CHECKING:  # workers load this file
    from mova_core.features import FeatureStore

ROWS = 256  # images per task, at most
FETCHES = 16  # remote images that a task fetches at once
KEY = pa.binary(32)
SEEN = pa.schema([("image", pa.string()), ("version", pa.string()), ("key", KEY), ("error", pa.string())])
INSPECTED = pa.schema([("row", pa.int64()), ("version", pa.string()), ("key", KEY), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What came of looking at images."""

    readable: pa.Table  # `key` (sha256), `image` (locator), `experts` (null: all); each key once, in the source's order
    refused: list[dict[str, str]]  # {"path", "reason"}, one per image, in the source's order


def inspect(images: pa.Table, store: "FeatureStore", progress: bool = True) -> Inspected:
    """Hashes and decodes every image that is new or has changed since an earlier run. Needs an open Ray session.

    What is no picture goes to the store's quarantine with its reason, once; files that cannot be had do not: they may come
    back. To have what is there looked at again, `release` it.

    Args:
        images: as `find_images` gives them.
    """
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    quarantined = {(row["image"], row["reason"]) for row in store.quarantined()}
    seen, covered = _seen_before(images["image"], store, quarantined)
    rows = pa.table({"row": np.arange(len(images)), "image": images["image"], **seen})
    size = max(1, min(ROWS, len(rows) // int(4 * ray.cluster_resources().get("CPU", 1))))
    blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
    since = {"newer_than": time.time()}
    found = []
    with progress_bar(len(images), "inspect", "images", progress) as bar:
        looked_at = ray.data.from_arrow(blocks).map_batches(
            inspect_images, batch_format="pyarrow", batch_size=None, fn_kwargs=since
        )
        for batch in looked_at.iter_batches(batch_format="pyarrow", batch_size=None):
            assert isinstance(batch, pa.Table)
            bar.update(len(batch))
            found.append(batch)
    del rows, blocks
    told = pa.concat_tables(found).combine_chunks()
    told = told.take(np.argsort(told["row"].to_numpy())).combine_chunks()

    bad = np.flatnonzero(told["error"].is_valid().to_numpy())
    refused = pa.table(
        {
            "path": images["image"].take(pa.array(bad)),
            "reason": told["error"].take(pa.array(bad)),
            "key": told["key"].take(pa.array(bad)),
        }
    ).to_pylist()
    store.quarantine(
        [
            {"image": row["path"], "sha256": row["key"].hex(), "reason": row["reason"], "expert": None}
            for row in refused
            if row["key"] is not None and (row["path"], row["reason"]) not in quarantined
        ]
    )
    _keep_listing(images["image"], told, seen, covered, store)
    good = told["error"].is_null()
    return Inspected(
        readable=_each_once(images.filter(good), told["key"].filter(good)),
        refused=[{"path": row["path"], "reason": row["reason"]} for row in refused],
    )


def release(store: "FeatureStore") -> int:
    """Empties the quarantine, so that its images are looked at again. Returns how many rows that were."""
    rows = len(store.quarantined())
    system, folder = locators.filesystem(f"{store.location}/quarantine")
    for file in system.glob(f"{folder}/*.parquet"):
        with contextlib.suppress(FileNotFoundError):  # released by another one
            system.rm_file(file)
    return rows


def inspect_images(rows: pa.Table, newer_than: float = 0.0) -> pa.Table:
    """Looks at images that are not as they were seen before.

    Args:
        rows: `row`, `image` (locator), and as last seen its `version`, `key` and `error`; null where it never was.
        newer_than: seconds since 1970; remote images that this machine fetched before are fetched again.

    Returns:
        `row`, `version` (null: unknown), `key` of the encoded bytes and, for an image that cannot be used, its `error`.
    """
    versions: dict[str, str | None] = {}  # of files, which many images may share
    one_decodes = Lock()  # the task holds one CPU, and pictures are large

    def look(row: dict[str, object]) -> tuple[str | None, bytes | None, str | None]:
        image, version, key = str(row["image"]), None, None
        try:
            place = locators.parse(image)
            file = place if isinstance(place, str) else place.file
            if file not in versions:
                versions[file] = locators.version(file)
            if (version := versions[file]) is not None and version == row["version"]:
                return version, row["key"], row["error"]  # type: ignore[return-value]
            data = read_image(image, newer_than)
            key = hashlib.sha256(data).digest()
            with one_decodes:
                load_image(data)
        except locators.Unavailable as error:
            return None, None, str(error)
        except ImageError as error:
            reason = str(error).removeprefix(f"{image}: ")  # it stands beside it
            return version, key, reason if key is None else reason.partition(": ")[2]
        return version, key, None

    away = any(locators.is_url(image) for image in rows["image"].to_pylist())
    with ThreadPoolExecutor(FETCHES if away else 1) as threads:
        found = list(threads.map(look, rows.to_pylist()))
    columns = [
        pa.array(column, field.type)
        for column, field in zip(zip(*found, strict=True), list(INSPECTED)[1:], strict=True)
    ]
    return pa.table([rows["row"], *columns], schema=INSPECTED)


def _seen_before(
    images: pa.ChunkedArray, store: "FeatureStore", quarantined: set[tuple[str, str]]
) -> tuple[dict[str, pa.ChunkedArray], list[str]]:
    """What earlier runs found of these images, and the listings that tell of no others.

    A refusal counts as long as it stands in the quarantine.
    """
    seen = {field.name: pa.chunked_array([pa.nulls(len(images), field.type)]) for field in list(SEEN)[1:]}
    covered = []
    system, folder = locators.filesystem(f"{store.location}/listings")
    for file in sorted(system.glob(f"{folder}/*.parquet")):  # the newest last
        try:
            listing = pq.read_table(io.BytesIO(system.cat_file(file)), schema=SEEN)
        except (OSError, pa.ArrowException):  # deleted since, or damaged: its images are read again
            continue
        bad = listing["error"].is_valid()
        refusals = zip(listing["image"].filter(bad).to_pylist(), listing["error"].filter(bad).to_pylist(), strict=True)
        counts = np.ones(len(listing), dtype=bool)
        counts[bad.to_numpy()] = [refusal in quarantined for refusal in refusals]
        known = pc.if_else(pa.array(counts), listing["version"], None)
        place = pc.index_in(images, value_set=listing["image"].combine_chunks())
        if len(images) - place.null_count == len(listing):
            covered.append(file)
        for name, column in (("version", known), ("key", listing["key"]), ("error", listing["error"])):
            seen[name] = pc.if_else(place.is_valid(), column.take(place), seen[name])
    return seen, covered


def _keep_listing(
    images: pa.ChunkedArray, told: pa.Table, seen: dict[str, pa.ChunkedArray], covered: list[str], store: "FeatureStore"
) -> None:
    """Writes what is known now, in the place of the listings it covers; two runs at once leave one each."""
    kept = pc.and_(told["version"].is_valid(), told["key"].is_valid())
    if pc.all(pc.fill_null(pc.equal(told["version"], seen["version"]), False).filter(kept)).as_py() is not False:
        return
    table = pa.table([images, told["version"], told["key"], told["error"]], schema=SEEN).filter(kept)
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd", use_dictionary=False)
    system, folder = locators.filesystem(f"{store.location}/listings")
    draft = f"{folder}/.{uuid.uuid4().hex}.tmp"  # `gc` removes it where its writer died
    with contextlib.suppress(OSError):  # it saves time and nothing else
        system.makedirs(folder, exist_ok=True)
        system.pipe_file(draft, content.getvalue().to_pybytes())
        system.mv(draft, f"{folder}/{time.time_ns():020d}-{uuid.uuid4().hex}.parquet")
        for file in covered:
            with contextlib.suppress(FileNotFoundError):  # another run, too
                system.rm_file(file)


def _each_once(images: pa.Table, key: pa.ChunkedArray) -> pa.Table:
    """One row per key, where it first stands; it needs the experts that any of its rows needs."""
    from pipelines.sources import united  # only here: it costs workers the seconds that torch takes to start

    flat = key.combine_chunks()
    keys = np.frombuffer(flat.buffers()[1], np.uint8).reshape(-1, 32)[flat.offset : flat.offset + len(flat)]
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

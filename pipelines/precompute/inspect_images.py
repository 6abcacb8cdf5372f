"""The first look at every picture: hashed and decoded once, by worker processes that start without torch.

What was seen is kept in <store>/listings/*.parquet: of each image a version (size and time, or ETag) and the key found, so
that a later run reads only what is new or has changed. Nothing depends on these files; delete them at will.
"""

import contextlib
import hashlib
import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mova_core.features.codec import named_by
from mova_core.features.index import new_keys, sorting
from mova_core.images import ImageError, load_image, read_image
from mova_core.io import uris
from mova_core.io.filesystem import ReadError
from mova_core.io.isolated import ProcessDied, isolated
from mova_core.io.read import file_version
from pipelines.progress_bar import progress_bar

if TYPE_CHECKING:  # workers load this file
    from mova_core.features import FeatureStore

ROWS = 1024  # images per task, at most
LOOK_SECONDS = 120.0  # longest time that reading and decoding one picture may take
FETCHES = 16  # remote images that a task fetches at once
KEY = pa.binary(32)
SEEN = pa.schema([("image", pa.string()), ("version", pa.string()), ("key", KEY), ("error", pa.string())])
INSPECTED = pa.schema(
    [("row", pa.int64()), ("version", pa.string()), ("key", KEY), ("error", pa.string()), ("read", pa.bool_())]
)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What came of looking at images."""

    readable: pa.Table  # `key` (sha256), `image` (locator), `experts` (null: all); each key once, in the source's order
    refused: list[dict[str, str]]  # {"path", "reason"}, one per image, in the source's order


def inspect(images: pa.Table, store: "FeatureStore", progress: bool = True) -> Inspection:
    """Hashes and decodes every image that is new or has changed since an earlier run. Needs an open Ray session.

    What is no picture goes to the store's quarantine with its reason, once. A picture that cannot be read goes there without
    a key, so that the other stages know about it; it is tried again by each run, and leaves the quarantine when it can be
    read. To have the others looked at again, call `store.release`.

    Args:
        images: as `find_images` gives them.
    """
    import ray

    quarantine = store.quarantined()
    seen, covered = _seen_before(images["image"], store, {(row["image"], row["reason"]) for row in quarantine})
    rows = pa.table({"row": np.arange(len(images)), "image": images["image"], **seen})
    size = max(1, min(ROWS, len(rows) // int(4 * ray.cluster_resources().get("CPU", 1))))
    blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
    looked_at = ray.data.from_arrow(blocks).map_batches(
        inspect_images, batch_format="pyarrow", batch_size=None, fn_kwargs={"newer_than": time.time()}
    )
    looked_at.context.enable_progress_bars = False  # of this Dataset alone
    del seen, rows, blocks  # they are in the object store now
    keys = np.zeros((len(images), 32), dtype=np.uint8)
    errors: dict[int, tuple[bool, str]] = {}  # row -> whether there were bytes, and what is wrong
    told, read = [], False
    with progress_bar(len(images), "inspect", "images", progress) as bar:
        for batch in looked_at.iter_batches(batch_format="pyarrow", batch_size=None):
            assert isinstance(batch, pa.Table)
            bar.update(len(batch))
            at, there = batch["row"].to_numpy(), batch["key"].is_valid().to_numpy()
            keys[at[there]] = _bytes(batch["key"].drop_null())
            for row in np.flatnonzero(batch["error"].is_valid().to_numpy()).tolist():
                errors[int(at[row])] = bool(there[row]), batch["error"][row].as_py()
            told.append(batch.select(["row", "version"]))
            read |= pc.any(batch["read"]).as_py()
    bad = np.array(sorted(errors), np.int64)
    refused = [
        {"path": path, "reason": errors[row][1], "row": row}
        for row, path in zip(bad.tolist(), images["image"].take(pa.array(bad)).to_pylist(), strict=True)
    ]
    unreadable = {one["path"]: one["reason"] for one in refused if not errors[one["row"]][0]}
    broken = [
        (one["path"], keys[one["row"]].tobytes().hex(), one["reason"]) for one in refused if errors[one["row"]][0]
    ]
    update_quarantine(store, quarantine, images["image"], unreadable, broken)
    if read:
        versions = pa.concat_tables(told)
        versions = versions["version"].take(pa.array(np.argsort(versions["row"].to_numpy())))
        _keep_listing(images["image"], versions, keys, errors, covered, store)
    if refused:
        good = np.setdiff1d(np.arange(len(images)), bad, assume_unique=True)
        images, keys = images.take(pa.array(good)), keys[good]
    return Inspection(
        readable=_each_once(images, keys), refused=[{"path": one["path"], "reason": one["reason"]} for one in refused]
    )


def update_quarantine(
    store: "FeatureStore",
    before: Sequence[Mapping[str, Any]],
    images: pa.ChunkedArray,
    unreadable: Mapping[str, str],
    broken: Sequence[tuple[str, str, str]],
) -> None:
    """Adds the pictures refused now, and takes out those that could not be read before and can be now.

    Args:
        before: rows of the quarantine.
        images: locators of all pictures of this run.
        unreadable: locator -> reason.
        broken: (locator, key in hex, reason).
    """
    present = {(row["image"], row["reason"]) for row in before}
    unread_before = {row["image"] for row in before if row["sha256"] is None}
    new = [path for path in unreadable if path not in unread_before]
    rows: list[tuple[str, str | None, str]] = [(path, None, unreadable[path]) for path in new]
    rows += [(path, key, reason) for path, key, reason in broken if (path, reason) not in present]
    store.quarantine([{"image": path, "sha256": key, "reason": reason, "expert": None} for path, key, reason in rows])
    if unread_before and (readable := unread_before.intersection(images.to_pylist()) - unreadable.keys()):
        store.release(lambda row: row["sha256"] is None and row["image"] in readable)


def inspect_images(rows: pa.Table, newer_than: float = 0.0) -> pa.Table:
    """Looks at images that are not as they were seen before.

    Args:
        rows: `row`, `image` (locator), and as last seen its `version`, `key` and `error`; null where it never was.
        newer_than: seconds since 1970; remote images that this machine fetched before are fetched again.

    Returns:
        `row`, `version` (null: unknown), `key` of the encoded bytes, for an image that cannot be used its `error`, and whether
        it was `read` now.
    """
    versions: dict[str, str | None] = {}  # of files, which many images may share

    def look(row: dict[str, object]) -> tuple[object, ...]:
        image, version = str(row["image"]), None
        try:
            place = uris.parse(image)
            file = place if isinstance(place, str) else place.file
            if file not in versions:
                versions[file] = file_version(file)
            if (version := versions[file]) is not None and version == row["version"]:
                return version, row["key"], row["error"], False
            data = read_image(image, newer_than) if uris.is_url(image) else b""
        except ReadError as error:
            return None, None, str(error), False
        except ImageError as error:
            return version, None, str(error).removeprefix(f"{image}: "), False
        key, problem = _look_isolated(image, data)
        return version, None if key is None else bytes.fromhex(key), problem, key is not None

    away = any(uris.is_url(image) for image in rows["image"].to_pylist())
    with ThreadPoolExecutor(FETCHES if away else 1) as threads:
        found = list(threads.map(look, rows.to_pylist()))
    columns = [
        pa.array(column, field.type)
        for column, field in zip(zip(*found, strict=True), list(INSPECTED)[1:], strict=True)
    ]
    return pa.table([rows["row"], *columns], schema=INSPECTED)


def _look_isolated(image: str, data: bytes) -> tuple[str | None, str | None]:
    """`look_at` in a child process, because a damaged picture or Parquet page may end the process that reads it.

    The child decodes one picture at a time: the task holds one CPU, and pictures are large.
    """
    call = isolated(f"{__name__}:look_at", LOOK_SECONDS)
    for attempt in (1, 2):  # the first death may be chance: the system kills processes where memory runs short
        try:
            key, problem = call(image, data=data)
            return key, problem
        except ValueError as error:  # of no kind that `look_at` knows
            return None, f"cannot be read ({' '.join(str(error).split())})"
        except ProcessDied as death:
            if attempt == 2:
                if not data and not isinstance(
                    uris.parse(image), uris.Cell
                ):  # to read a cell may be what ends processes
                    with contextlib.suppress(ImageError):
                        data = read_image(image)
                key = hashlib.sha256(data).hexdigest() if data else None
                return key, f"broken image (reading it {death})"
    raise AssertionError("unreachable")


def look_at(image: str, data: bytes = b"") -> tuple[str | None, str | None]:
    """Hashes and decodes a picture.

    Args:
        image: locator.
        data: its encoded bytes where they are known, else they are read.

    Returns:
        The key of the encoded bytes in hex, None where they cannot be read; and why the picture cannot be used.
    """
    key = None
    try:
        data = data or read_image(image)
        key = hashlib.sha256(data).hexdigest()
        load_image(data)
    except ImageError as error:
        return key, str(error).removeprefix(f"{image}: ") if key is None else str(error).partition(": ")[2]
    return key, None


def _seen_before(
    images: pa.ChunkedArray, store: "FeatureStore", quarantined: set[tuple[str, str]]
) -> tuple[dict[str, Any], list[str]]:
    """What earlier runs found of these images, and the listings that tell of no others.

    A refusal counts as long as it stands in the quarantine.
    """
    seen: dict[str, Any] = {field.name: pa.nulls(len(images)) for field in list(SEEN)[1:]}
    covered = []
    for file in store.storage.list_files("listings", ".parquet"):  # the newest last
        try:
            content = store.storage.read(f"listings/{file}")
        except FileNotFoundError:  # another run has written a newer one
            continue
        if not file.endswith(f"{named_by(content)}.parquet"):  # damaged: its images are read again
            continue
        listing = pq.read_table(io.BytesIO(content), schema=SEEN)
        bad = listing["error"].is_valid()
        refusals = zip(listing["image"].filter(bad).to_pylist(), listing["error"].filter(bad).to_pylist(), strict=True)
        counts = np.ones(len(listing), dtype=bool)
        counts[bad.to_numpy()] = [refusal in quarantined for refusal in refusals]
        known = pc.if_else(pa.array(counts), listing["version"], None)
        found = {"version": known, "key": listing["key"], "error": listing["error"]}
        if listing["image"].equals(images):  # the same source again: no table of ten million strings is hashed for it
            seen = found
            covered.append(file)
            continue
        place = pc.index_in(images, value_set=listing["image"].combine_chunks())
        if len(images) - place.null_count == len(listing):
            covered.append(file)
        for name, column in found.items():
            before = seen[name].cast(column.type) if pa.types.is_null(seen[name].type) else seen[name]
            seen[name] = pc.if_else(place.is_valid(), column.take(place), before)
    return seen, covered


def _keep_listing(
    images: pa.ChunkedArray,
    versions: pa.ChunkedArray,
    keys: np.ndarray,
    errors: dict[int, tuple[bool, str]],
    covered: list[str],
    store: "FeatureStore",
) -> None:
    """Writes what is known now, in the place of the listings it covers; two runs at once leave one each."""
    had = np.ones(len(images), dtype=bool)
    had[[row for row, (there, _) in errors.items() if not there]] = False
    kept = pc.and_(versions.is_valid(), pa.array(had))
    reasons = pa.nulls(len(images), pa.string())
    if errors:
        bad = sorted(errors)
        mask = np.zeros(len(images), dtype=bool)
        mask[bad] = True
        reasons = pc.replace_with_mask(reasons, pa.array(mask), pa.array([errors[row][1] for row in bad], pa.string()))
    table = pa.table([images, versions, _array(keys), reasons], schema=SEEN)
    if not pc.all(kept).as_py():
        table = table.filter(kept)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    content = sink.getvalue()
    with contextlib.suppress(OSError):  # it saves time and nothing else
        store.storage.mkdir("listings")
        store.storage.put_if_absent(f"listings/{time.time_ns():020d}-{named_by(content)}.parquet", content)
        for file in covered:
            store.storage.delete(f"listings/{file}")


def _each_once(images: pa.Table, keys: np.ndarray) -> pa.Table:
    """One row per key, where it first stands; it needs the experts that any of its rows needs."""
    from pipelines.precompute.listing import (
        union_of_experts,  # only here: it costs workers the seconds that torch takes to start
    )

    flat = keys.reshape(-1).view("S32")
    order = sorting(flat)
    new = new_keys(flat, order)
    if new.all():
        return images.add_column(0, "key", _array(keys))
    appearances = order[new]  # the sort is stable: where each key first stands
    first = np.sort(appearances)
    group = np.empty(len(order), np.int64)
    group[order] = np.searchsorted(first, appearances)[np.cumsum(new) - 1]
    return pa.table(
        {
            "key": _array(keys[first]),
            "image": images["image"].take(pa.array(first)),
            "experts": union_of_experts(images["experts"], group, len(first)),
        }
    )


def _array(keys: np.ndarray) -> pa.FixedSizeBinaryArray:
    """(N, 32) bytes as N keys, not copied."""
    return pa.FixedSizeBinaryArray.from_buffers(KEY, len(keys), [None, pa.py_buffer(keys)])


def _bytes(keys: pa.ChunkedArray) -> np.ndarray:
    """N keys as (N, 32) bytes."""
    flat = keys.combine_chunks()
    return np.frombuffer(flat.buffers()[1] or b"", np.uint8).reshape(-1, 32)[flat.offset : flat.offset + len(flat)]

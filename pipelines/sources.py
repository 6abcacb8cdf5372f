"""Where pictures come from: the images of a folder, or of LLaVA records, as one table of locators."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mova_core.data import DataError
from pipelines.bad_rows import BadRows, read_rows, tell_skipped

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
IMAGES = pa.schema([("image", pa.string()), ("experts", pa.list_(pa.string()))])


def find_images(
    source: str | Path,
    images: str | Path | None = None,
    bad_rows: BadRows = "raise",
    skipped: list[str] | None = None,
    *,
    routed_only: bool = False,
    limit: int | None = None,
    column: str | None = None,
) -> pa.Table:
    """Pictures of a folder (at any depth, by suffix) or those that a LLaVA JSON/JSONL names, each once.

    Args:
        images: folder the records' images are relative to; default the data file's.
        bad_rows: whether a broken record ends it or is left out.
        skipped: takes what was wrong with each record left out.
        routed_only: for an image only the experts that the routing labels of its records name, not all.
        limit: the first so many images.
        column: of Parquet files, the one that holds the images.

    Returns:
        `image` (a locator: what `ImageRef` takes as path) and `experts` (null: all) in the order of the source.

    Raises:
        DataError: nothing there, no picture in it, a broken record, or with `routed_only` one without labels.
    """
    source = Path(source).resolve()  # the same in every process: Ray's workers have their own current directory
    if source.is_dir():
        if routed_only:
            raise DataError(f"{source} is a folder, and routing labels stand in records: give the LLaVA file")
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise DataError(
                f"folder {source} holds no picture ({', '.join(sorted(SUFFIXES))}): give the folder that does"
            )
        return image_table(found[:limit])
    samples, left_out = read_rows(source, images, bad_rows)
    named: dict[str, set[str]] = {}
    for sample in samples:
        if routed_only and sample.routing is None:
            problem = f"{sample.where}: it has no routing label: run `mova label` first"
            if bad_rows == "raise":
                raise DataError(problem)
            left_out.append(problem)
            continue
        for image in sample.images:
            if image.path:
                named.setdefault(str(Path(image.path).resolve()), set()).update(sample.routing or ())
    tell_skipped(left_out)
    if skipped is not None:
        skipped += left_out
    if not named:
        raise DataError(f"no record of {source} names an image")
    experts = [sorted(names) for names in named.values()] if routed_only else None
    return image_table(named, experts).slice(0, limit)


def image_table(
    images: Iterable[str | Path], experts: Sequence[Sequence[str] | None] | pa.Array | None = None
) -> pa.Table:
    """Images as `find_images` gives them.

    Args:
        images: locators.
        experts: per image the experts it needs; None for all.
    """
    column = pa.array(map(str, images), pa.string())
    if not isinstance(experts, pa.Array):
        experts = (
            pa.nulls(len(column), IMAGES.field("experts").type)
            if experts is None
            else pa.array(experts, IMAGES.field("experts").type)
        )
    return pa.table([column, experts], schema=IMAGES)


def united(experts: pa.ChunkedArray, groups: np.ndarray, count: int) -> pa.Array:
    """The experts that the rows of each group need together.

    Args:
        experts: per row a list of names; null for all.
        groups: per row its group, int64 in 0..count-1.

    Returns:
        Per group a list of names, or null where a row of it needs all.
    """
    kind = IMAGES.field("experts").type
    if experts.null_count == len(experts):
        return pa.nulls(count, kind)
    rows = experts.combine_chunks()
    names = sorted(rows.flatten().unique().to_pylist())
    needs = np.zeros((count, len(names)), dtype=bool)
    per_row = np.repeat(groups, rows.value_lengths().fill_null(0).to_numpy())
    needs[per_row, pc.index_in(rows.flatten(), pa.array(names, pa.string())).to_numpy()] = True
    everything = np.zeros(count, dtype=bool)
    everything[groups[rows.is_null().to_numpy(zero_copy_only=False)]] = True
    sets, which = np.unique(needs, axis=0, return_inverse=True)
    lists = pa.array([[name for name, needed in zip(names, one, strict=True) if needed] for one in sets], kind)
    return lists.take(pa.array(which.reshape(-1), mask=everything))

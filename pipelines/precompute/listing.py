"""Where pictures come from: folders, LLaVA records, Parquet files and tars, here or elsewhere, as one table of locators."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from tarfile import TarError

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from mova_core.data import DataError, iterate_samples
from mova_core.images import SUFFIXES
from mova_core.io.filesystem import ReadError, as_read_error, open_file, open_filesystem, with_retries
from mova_core.io.isolated import ProcessDied, isolated
from mova_core.io.parquet import check_footer
from mova_core.io.tar_files import HEADERS, TrailingData, tar_members
from mova_core.io.uris import absolute, is_url
from pipelines.invalid_records import BadRows, report_skipped
from pipelines.precompute import parquet_files
from pipelines.progress_bar import progress_bar

IMAGES = pa.schema([("image", pa.string()), ("experts", pa.list_(pa.string()))])
CHUNK = 65_536  # strings that are Python objects at once
FILES = 16  # remote files read at once

_PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python shows bytes of a file name that are none

Refuse = Callable[[str], None]


def find_images(
    source: str | Path,
    images: str | Path | None = None,
    bad_rows: BadRows = "raise",
    skipped: list[str] | None = None,
    *,
    routed_only: bool = False,
    limit: int | None = None,
    column: str | None = None,
    progress: bool = False,
) -> pa.Table:
    """The images of a source, each once. All may be local, or remote by a URL; the names of files tell their kind.

    Args:
        source: a folder that holds at any depth either pictures, or Parquet files, or webdataset tars (uncompressed, pictures
            by the suffixes of their members), links to folders followed; such files by name, glob (data/*.parquet) or ranges and choices
            (train-{000..099}.tar); or any other file: LLaVA JSON/JSONL.
        images: folder or URL that the names in records, and in Parquet columns of names, are relative to; default the file's.
        bad_rows: whether a broken record, tar or Parquet file ends it or is left out.
        skipped: takes what was wrong with each of those left out.
        routed_only: for an image only the experts that the routing labels of its records name, not all.
        limit: the first so many images.
        column: of Parquet files, the one that holds the images; default the only one that can.
        progress: whether to draw a bar over tars and Parquet files.

    Returns:
        `image` (a locator: what `ImageRef` takes as path) and `experts` (null: all) in the order of the source.

    Raises:
        DataError: nothing there, no picture in it, files of several kinds, a broken one, or with `routed_only` a record
            without labels.
    """
    left_out: list[str] = []

    def refuse(problem: str) -> None:
        if bad_rows == "raise":
            raise DataError(problem)
        left_out.append(problem)

    try:
        source = absolute(source)
        found = _files(source, limit, refuse)
        if found is None:
            table = _of_records(source, images, refuse, routed_only)
        elif routed_only:
            raise DataError(f"{source} holds no records, where routing labels stand: give the LLaVA JSON/JSONL")
        else:
            table = image_table(_of_files(found, images, column, limit, refuse, progress))
    except ReadError as error:
        raise DataError(f"{source}: {error}") from error
    report_skipped(left_out)
    if skipped is not None:
        skipped += left_out
    if not len(table):
        raise DataError(f"{source} holds no picture" + (f", the first error: {left_out[0]}" if left_out else ""))
    return table.slice(0, limit)


def image_table(
    images: Iterable[str | Path] | pa.ChunkedArray, experts: Sequence[Sequence[str] | None] | pa.Array | None = None
) -> pa.Table:
    """Images as `find_images` gives them.

    Args:
        images: locators.
        experts: per image the experts it needs; None for all.
    """
    column = images if isinstance(images, pa.ChunkedArray) else pa.array(map(str, images), pa.string())
    kind = IMAGES.field("experts").type
    needs = pa.nulls(len(column), kind) if experts is None else pa.array(experts, kind)
    return pa.table([column, needs], schema=IMAGES)


def union_of_experts(experts: pa.ChunkedArray, groups: np.ndarray, count: int) -> pa.Array:
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


def _of_records(source: str, images: str | Path | None, refuse: Refuse, routed_only: bool) -> pa.Table:
    """The images that LLaVA records name, each where it first stands."""
    names: dict[str, int] = {}
    mentions: list[int] = []
    labels: list[tuple[str, ...]] = []
    for sample in iterate_samples(source, images, lambda error: refuse(str(error))):
        if routed_only and sample.routing is None:
            refuse(f"{sample.where}: it has no routing label: run `mova label` first")
            continue
        for image in sample.images:
            place = names.setdefault(absolute(image.path or ""), len(names))
            if routed_only:
                mentions.append(place)
                labels.append(sample.routing or ())
    if not routed_only:
        return image_table(names)
    needs = pa.chunked_array([pa.array(labels, IMAGES.field("experts").type)])
    return image_table(names, union_of_experts(needs, np.array(mentions, np.int64), len(names)))


def _files(source: str, limit: int | None, refuse: Refuse) -> tuple[str, pa.ChunkedArray] | None:
    """The kind of a source's files and their locators; None for a file that is not one of our kinds: records, then."""
    system, path = open_filesystem(source)
    by_name = _kind(path) is not None or path.lower().endswith((".json", ".jsonl"))
    if not (by_name and is_url(source)) and system.isdir(path):  # HTTP would read a file to find that it lists nothing
        kinds = _files_in(system, source, path, limit, refuse)
    elif system.exists(path) or not re.search(r"[*?\[{]", path):
        if path.lower().endswith(_PACKED):
            raise DataError(f"{source} is compressed, so that no member can be read alone: unpack it")
        if _kind(path) is None:
            return None
        if not system.exists(path):
            raise DataError(f"no data file {source}: check the path")
        kinds = {_kind(path) or "": [_strings([source], refuse)]}
    else:
        kinds = {}
        for one in dict.fromkeys(name for pattern in _braced(path) for name in _globbed(system, pattern, refuse)):
            if (kind := _kind(one)) is not None:
                kinds.setdefault(kind, []).append(_strings([_full(system, one)], refuse))
        if not kinds:
            raise DataError(
                f"no picture, .parquet or .tar matches {source}: check the pattern, and quote it in a shell"
            )
    if len(kinds) > 1:
        several = " and ".join(f"{sum(map(len, found)):,} {kind} files" for kind, found in kinds.items())
        raise DataError(f"{source} holds {several}: name those that you mean, e.g. by a glob")
    [(kind, found)] = kinds.items()
    return kind, pa.chunked_array(found, pa.string())


def _files_in(
    system: fsspec.AbstractFileSystem, source: str, path: str, limit: int | None, refuse: Refuse
) -> dict[str, list[pa.Array]]:
    """Locators of a folder's files by kind; how many are of no kind is told."""
    kinds: dict[str, list[pa.Array]] = {}
    others: Counter[str] = Counter()
    names = _walk(system, path, refuse, set())
    while chunk := list(islice(names, CHUNK)):
        of_kind: dict[str, list[str]] = {}
        for name in chunk:
            if (kind := _kind(name)) is not None:
                of_kind.setdefault(kind, []).append(_full(system, name))
            else:
                packed = next((suffix for suffix in _PACKED if name.lower().endswith(suffix)), None)
                others[packed or os.path.splitext(name)[1].lower() or "without a suffix"] += 1
        for kind, named in of_kind.items():
            kinds.setdefault(kind, []).append(_strings(named, refuse))
        if limit is not None and sum(map(len, kinds.get("picture", ()))) >= limit:
            break
    if others:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
        tqdm.write(f"{source}: files of no kind that is read, by their names: {counts}", file=sys.stderr)
    if not kinds:
        raise DataError(
            f"folder {source} holds no picture ({', '.join(sorted(SUFFIXES))}), no .parquet and no .tar: give the folder "
            + ("that does, or unpack the tars" if any(suffix in _PACKED for suffix in others) else "that does")
        )
    return kinds


def _kind(name: str) -> str | None:
    suffix = os.path.splitext(name)[1].lower()
    return "picture" if suffix in SUFFIXES else suffix if suffix in (".parquet", ".tar") else None


def _walk(
    system: fsspec.AbstractFileSystem, folder: str, refuse: Refuse, visited: set[tuple[int, int]]
) -> Iterator[str]:
    """Files at any depth in the order of their paths. Links to folders are followed, each folder is visited once."""
    try:
        if isinstance(system, LocalFileSystem):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:  # a link to a folder above, or a second link
                return
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                # A folder may hold millions: of each only its name, and the folders apart.
                folders, names = set(), []
                for entry in entries:
                    names.append(entry.name)
                    if entry.is_dir():
                        folders.add(entry.name)
            names.sort()
            found: Iterable[tuple[str, bool]] = ((os.path.join(folder, name), name in folders) for name in names)
        else:
            listed = with_retries(lambda: system.ls(folder, detail=True))
            found = sorted((entry["name"], entry["type"] == "directory") for entry in listed)
            system.invalidate_cache(folder)  # it keeps every listing, and shows it again after changes
    except OSError as error:
        refuse(f"folder {_full(system, folder)}: {as_read_error(error)}")
        return
    for name, is_folder in found:
        if not is_folder:
            yield name
        elif len(name.rstrip("/")) > len(folder.rstrip("/")):  # not itself, nor the one above
            yield from _walk(system, name, refuse, visited)


def _globbed(system: fsspec.AbstractFileSystem, pattern: str, refuse: Refuse) -> list[str]:
    if re.search(r"[*?\[]", pattern):
        return sorted(with_retries(lambda: system.glob(pattern)))
    if not system.exists(pattern):
        refuse(f"{_full(system, pattern)}: there is no such file")
        return []
    return [pattern]


def _braced(pattern: str) -> Iterator[str]:
    """The patterns that one with ranges {000..099} and choices {a,b} stands for, as a shell expands them."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    if found[3] is not None:
        middles: Iterable[str] = found[3].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        digits = max(len(found[1]), len(found[2])) if found[1][0] == "0" or found[2][0] == "0" else 1
        middles = (f"{number:0{digits}}" for number in range(first, last + 1))
    for middle in middles:
        yield from _braced(pattern[: found.start()] + middle + pattern[found.end() :])


def _of_files(
    found: tuple[str, pa.ChunkedArray],
    images: str | Path | None,
    column: str | None,
    limit: int | None,
    refuse: Refuse,
    progress: bool,
) -> pa.ChunkedArray:
    """Locators of the images in files of one kind."""
    kind, files = found
    if kind == "picture":
        return files
    away = is_url(files[0].as_py())
    look = _members if kind == ".tar" else partial(_cells, images=images, column=column)
    chunks: list[pa.Array] = []
    at_once = FILES if away else 1
    with progress_bar(len(files), "list", "files", progress) as bar, ThreadPoolExecutor(at_once) as threads:
        for start in range(0, len(files), at_once):
            for names, problem in threads.map(look, files[start : start + at_once].to_pylist()):
                bar.update()
                if problem is not None:
                    refuse(problem)
                chunks.append(_strings(names, refuse))
            if limit is not None and sum(map(len, chunks)) >= limit:
                break
    found_in = pa.chunked_array(chunks, pa.string())
    # Members and cells differ; names in Parquet files may stand there twice.
    return pa.chunked_array([found_in.unique()]) if kind == ".parquet" else found_in


def _members(file: str) -> tuple[list[str], str | None]:
    """Locators of the pictures in a tar, and what is wrong with it."""
    try:
        with open_file(file, HEADERS) as opened:
            return tar_members(file, opened, lambda name: _kind(name) == "picture"), None
    except ReadError as error:
        return [], f"{file}: {error}"
    except TrailingData as error:
        return error.members, f"{file}: broken .tar file ({error}): download it again"
    except (OSError, ValueError, TarError) as error:
        return [], f"{file}: broken .tar file ({' '.join(str(error).split())}): download it again"


def _cells(file: str, images: str | Path | None, column: str | None) -> tuple[list[str], str | None]:
    """Locators of the images in a Parquet file, or why there are none."""
    images = None if images is None else os.fspath(images)
    try:
        if is_url(file):
            check_footer(file)
            answer = parquet_files.find_cells(file, images, column)
        else:
            answer = isolated(f"{parquet_files.__name__}:find_cells")(file, images, column)
    except OSError as error:
        return [], f"{file}: {as_read_error(error)}"
    except ProcessDied as death:
        return [], f"{file}: broken .parquet file (reading it {death}): download it again"
    return answer.get("found", []), answer.get("problem")


def _full(system: fsspec.AbstractFileSystem, name: str) -> str:
    """A name that a filesystem gave as a locator."""
    return name if isinstance(system, LocalFileSystem) else system.unstrip_protocol(name)


def _strings(names: Sequence[str], refuse: Refuse) -> pa.Array:
    try:
        return pa.array(names, pa.string())
    except UnicodeEncodeError:
        for name in filter(_NOT_UTF8.search, names):
            refuse(f"{name!r}: its name is not UTF-8: rename it")
        return pa.array([name for name in names if not _NOT_UTF8.search(name)], pa.string())

"""The index of a data file: what training must know of every record before it reads one. Imports neither torch nor Ray.

A data file of millions of records is read from end to end once. The index is a Parquet file in the user's cache folder, named
by the file's version and by all that decides its content, so that the next run finds it. A worker holds `ROW` of each sample,
27 bytes that all processes of a node share, and reads a record when its turn comes.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mova_core.data import DataError, Sample, sample_of
from mova_core.io.atomic import atomic_path
from mova_core.io.cache import cache_folder, private_folder
from mova_core.io.uris import parent
from mova_core.records import Position, RecordFile, read_records
from pipelines.read_data import check_routing, problem_of

VERSION = 1  # of the columns below and of what decides them
ROW_GROUP = 1 << 16
SCHEMA = pa.schema(
    {
        "number": pa.uint32(), "line": pa.uint32(), "offset": pa.uint64(), "size": pa.uint32(), "length": pa.int32(),
        "images": pa.list_(pa.string()), "labelled": pa.bool_(), "problem": pa.string(),
    }
)  # fmt: skip
# A sample to train on: where its record lies, its length as `Sample.length`, and whether it teaches routing, not its answer.
ROW = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("number", "<u4"), ("line", "<u4"), ("length", "<i4"), ("source", "<u2"), ("routing", "?")]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data file.

    Attributes:
        name: in metrics.
        path: the file, or its URL.
        images: what its pictures are relative to; None: the file's folder.
        version: of the file when it was indexed, as `file_version` gives it; None where there is no telling.
    """

    name: str
    path: str
    images: str | None = None
    version: str | None = None


class SampleIndex:
    """The index of one data file, opened if it was made before, else made.

    Args:
        source: the data file; its `version` is that of the file now.
        pool: the model's experts in routing order, of which labels are.
        on_invalid: receives the errors of records left out; without it the first one is raised.

    Raises:
        DataError: no such file, or an invalid record.
    """

    def __init__(
        self, source: DataSource, pool: Sequence[str], on_invalid: Callable[[DataError], object] | None = None
    ):
        key = json.dumps([VERSION, source.path, source.images, source.version, list(pool)])
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # of an index that is not kept
        try:
            folder = private_folder(cache_folder("samples"))
        except OSError:  # told by private_folder; training goes on without keeping the index
            folder = self._temporary()
        if source.version is None:
            folder = self._temporary()
        self.path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.parquet"
        if self.path.exists():
            return
        invalid: list[DataError] = []

        def refuse(error: DataError) -> None:
            if on_invalid is None:
                raise error
            invalid.append(error)
            on_invalid(error)

        draft = self._temporary() / "draft.parquet"
        with pq.ParquetWriter(draft, SCHEMA, compression="zstd") as writer:
            for rows in _grouped(_index_rows(source, pool, refuse)):
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA), ROW_GROUP)
        if invalid:  # they must be told again by the next run
            self.path = draft
            return
        with atomic_path(self.path) as place:
            shutil.copyfile(draft, place)

    def __len__(self) -> int:
        return int(pq.read_metadata(self.path).num_rows)

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """The records with columns of `SCHEMA`, in the order of the file, `rows` at a time."""
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(rows)

    def _temporary(self) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="mova-samples-")
        return Path(self._folder.name)


class IndexedSamples(Sequence[Sample]):
    """Samples that are read when they are asked for.

    Args:
        rows: (samples,) `ROW`.
        sources: what `ROW`'s "source" counts.
        pool: the model's experts in routing order.
    """

    def __init__(self, rows: np.ndarray, sources: Sequence[DataSource], pool: Sequence[str]):
        self.rows, self.sources, self.pool = rows, sources, pool
        self._files: dict[int, RecordFile] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        """The sample at a position.

        Raises:
            DataError: its record is not there any more.
        """
        row = self.rows[position]
        number = int(row["source"])
        source = self.sources[number]
        if number not in self._files:
            self._files[number] = RecordFile(source.path)
        where = Position(source.path, int(row["number"]), int(row["line"]), int(row["offset"]), int(row["size"]))
        return sample_of(self._files[number].at(where), source.images or parent(source.path), where, self.pool)

    def where(self, position: int) -> str:
        """File, number and line of a sample's record."""
        row = self.rows[position]
        return f"{self.sources[row['source']].path}, record {row['number']}, line {row['line']}"

    def __getstate__(self) -> dict[str, Any]:  # each process opens the files itself
        return {"rows": self.rows, "sources": self.sources, "pool": self.pool}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _index_rows(
    source: DataSource, pool: Sequence[str], refuse: Callable[[DataError], None]
) -> Iterator[dict[str, Any]]:
    for position, record in read_records(source.path, refuse):
        try:
            sample = sample_of(record, source.images or parent(source.path), position, pool)
            check_routing(sample, pool)
        except DataError as error:
            refuse(error)
            continue
        yield {
            "number": position.number, "line": position.line, "offset": position.offset, "size": position.size,
            "length": sample.length, "images": [image.path for image in sample.images],
            "labelled": sample.routing is not None, "problem": problem_of(sample),
        }  # fmt: skip


def _grouped(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == ROW_GROUP:
            yield group
            group = []
    if group:
        yield group

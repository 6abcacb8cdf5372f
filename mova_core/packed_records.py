"""Records beside their pictures in Parquet files and webdataset tars, in the form of LLaVA's (docs/data_format.md).

A record's `image` becomes the locators of its pictures in the file; no picture is read. `mova_core.records` reads these files
through this module, which imports no torch.
"""

import io
import json
import os
import posixpath
from collections.abc import Iterator
from tarfile import TarError, TarInfo
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mova_core.images import SUFFIXES
from mova_core.io.filesystem import open_file
from mova_core.io.isolated import ProcessDied
from mova_core.io.parquet import check_footer, is_list, null_count, shortest_leaf
from mova_core.io.tar_files import HEADERS, end_of, iterate_members
from mova_core.io.uris import Cell, Member, absolute

CONVERSATIONS, IMAGE = "conversations", "image"  # columns
ROWS = 64  # decoded at once
Place = tuple[int, int]  # of a record in its file


class BrokenFile(ValueError):
    """No reader can use the file; the message says why."""


class ParquetRecords:
    """The rows of a Parquet file as records; their place is row group and row. Binary columns but `image` are left out.

    Args:
        path: of the file, or its URL.

    Raises:
        BrokenFile: it cannot be read, or has no column `conversations`.
        OSError: it is not there.
    """

    def __init__(self, path: str):
        self.path = absolute(path)
        try:
            check_footer(path)
            self.parquet = pq.ParquetFile(open_file(path), pre_buffer=False)
            schema = self.parquet.schema_arrow
        except OSError:
            raise
        except (ProcessDied, ValueError, pa.ArrowException) as error:
            raise BrokenFile(f"broken .parquet file ({' '.join(str(error).split())}): download it again") from None
        if CONVERSATIONS not in schema.names:
            raise BrokenFile(f"no column `{CONVERSATIONS}`, it has {', '.join(schema.names)}")
        self.columns = [field.name for field in schema if field.name != IMAGE and not _holds_bytes(field.type)]
        self.kind = schema.field(IMAGE).type if IMAGE in schema.names else None
        self._group: tuple[int, pa.Table, list[Any]] | None = None  # the one that `at` read last: number, rows, images

    def __iter__(self) -> Iterator[tuple[Place, Any]]:
        """Place and record of every row; in place of a record the ValueError that says why it is none."""
        for group in range(self.parquet.num_row_groups):
            images, row = self._images(group), 0
            for batch in self.parquet.iter_batches(ROWS, row_groups=[group], columns=self.columns):
                for index in range(len(batch)):
                    yield (group, row), _json_of(batch.slice(index, 1), next(images))
                    row += 1

    def at(self, place: Place) -> Any:
        """The record at a place. Its row group is kept until another one is asked for."""
        group, row = place
        if self._group is None or self._group[0] != group:
            rows = self.parquet.read_row_group(group, columns=self.columns)
            self._group = group, rows, list(self._images(group))
        return _json_of(self._group[1].slice(row, 1), self._group[2][row])

    def _images(self, group: int) -> Iterator[Any]:
        """What stands for the pictures of each row: a locator, a path, a list of them, or None."""
        if self.kind is None:
            yield from [None] * self.parquet.metadata.row_group(group).num_rows
            return
        items = is_list(self.kind) and _holds_bytes(self.kind)
        if not items and _holds_bytes(self.kind):
            leaf = f"{IMAGE}.bytes" if pa.types.is_struct(self.kind) else IMAGE
            if null_count(self.parquet, group, leaf) == 0:  # else the bytes must be read, to know which are there
                for row in range(self.parquet.metadata.row_group(group).num_rows):
                    yield str(Cell(self.path, IMAGE, group, row))
                return
        row = 0
        leaf = shortest_leaf(self.parquet, IMAGE) if items else IMAGE
        for batch in self.parquet.iter_batches(ROWS, row_groups=[group], columns=[leaf]):
            for value in batch.column(0).to_pylist():
                cell = Cell(self.path, IMAGE, group, row)
                row += 1
                if items:
                    yield [str(cell._replace(item=item)) for item in range(len(value or ()))]
                elif isinstance(value, dict):
                    yield value.get("path") if value.get("bytes") is None else str(cell)
                else:
                    yield str(cell) if isinstance(value, bytes) else value


class TarRecords:
    """The samples of a webdataset tar as records; their place is first byte and bytes.

    A sample is what stands together under one name: `NAME.json`, the record without `image`, and its pictures in their order.

    Args:
        path: of the file, or its URL.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, path: str):
        self.path = absolute(path)
        self._opened = open_file(path, HEADERS)

    def __iter__(self) -> Iterator[tuple[Place, Any]]:
        """Place and record of every sample; in place of a record the ValueError that says why it is none.

        Raises:
            BrokenFile: compressed, cut off, or no tar; the samples before are given first.
        """
        sample: list[TarInfo] = []
        try:
            for member in iterate_members(self._opened):
                if sample and _name(sample[0]) != _name(member):
                    yield self._sample(sample, self._opened)
                    sample = []
                sample.append(member)
        except TarError as error:
            raise BrokenFile(f"broken .tar file ({' '.join(str(error).split())}): download it again") from None
        if sample:
            yield self._sample(sample, self._opened)

    def at(self, place: Place) -> Any:
        """The record at a place."""
        self._opened.seek(place[0])
        part = io.BytesIO(self._opened.read(place[1]) + bytes(1024))  # a tar ends with two blocks of zeros
        return self._sample(list(iterate_members(part)), part, place[0])[1]

    def _sample(self, members: list[TarInfo], opened: Any, begin: int = 0) -> tuple[Place, Any]:
        """Place and record, or why it is none, of members whose bytes stand in `opened`, the file from `begin` on."""
        place = begin + members[0].offset, end_of(members[-1]) - members[0].offset
        texts = [member for member in members if member.name.lower().endswith(".json")]
        if len(texts) != 1:
            return place, ValueError(f"{_name(members[0])} has {len(texts)} .json members: give the record in one")
        opened.seek(texts[0].offset_data)
        try:
            record = json.loads(opened.read(texts[0].size), parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            return place, ValueError(f"{texts[0].name} is broken JSON ({error})")
        if not isinstance(record, dict):
            return place, ValueError(f"{texts[0].name} is {type(record).__name__}: a record must be a JSON object")
        pictures = [
            str(Member(self.path, member.name, begin + member.offset_data, member.size))
            for member in members
            if os.path.splitext(member.name)[1].lower() in SUFFIXES
        ]
        return place, {**record, IMAGE: pictures} if pictures else record


def _json_of(row: pa.Table | pa.RecordBatch, images: Any) -> Any:
    try:
        # Arrow has NaN, JSON has not.
        record = json.loads(json.dumps(row.to_pylist()[0]), parse_constant=lambda _: None)
    except (ValueError, TypeError) as error:
        return ValueError(f"its values are no JSON ({error})")
    return record if images is None else {**record, IMAGE: images}


def _name(member: TarInfo) -> str:
    """The name of a member's sample: up to the first dot of its last part, as webdataset has it."""
    folder, _, last = posixpath.normpath(member.name).rpartition("/")
    return posixpath.join(folder, last.partition(".")[0])


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    if is_list(kind):
        return _holds_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)

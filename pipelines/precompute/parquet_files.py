"""Pictures in Parquet files, of which only the footer and columns of names are read.

`find_cells` runs in a child process where the file is local: a damaged footer can make Arrow end the process that reads it.
Of a remote file the child reads the footer alone, because filesystems and their connections belong to the parent.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mova_core.data import DataError
from mova_core.images import SUFFIXES
from mova_core.io.filesystem import ReadError, open_file
from mova_core.io.parquet import is_list, null_count, shortest_leaf
from mova_core.io.read import decoded_text
from mova_core.io.uris import Cell, absolute, is_url, joined, parent

LOOKED_AT = 100  # texts that tell whether a column holds names of pictures
ROWS = 64  # read at once of a column whose rows must be counted or named


def find_cells(file: str, images: str | None, column: str | None) -> dict[str, Any]:
    """Locators of the images in a Parquet file: {"found": [...]}; or {"problem": why not}."""
    try:
        with open_file(file) as opened:
            return {"found": list(_cells(file, pq.ParquetFile(opened, pre_buffer=False), images, column))}
    except DataError as error:
        return {"problem": str(error)}
    except ReadError as error:
        return {"problem": f"{file}: {error}"}
    except (OSError, ValueError, pa.ArrowException) as error:
        return {"problem": f"{file}: broken .parquet file ({' '.join(str(error).split())}): download it again"}


def _cells(file: str, parquet: pq.ParquetFile, images: str | None, column: str | None) -> Iterator[str]:
    name = _image_column(file, parquet, column)
    kind = parquet.schema_arrow.field(name).type
    base = images if images is not None else parent(file)
    if _is_text(kind) and not _holds_base64(parquet, name):
        for value in _values(parquet, name):
            if value:
                yield absolute(joined(base, value))
    elif is_list(kind):
        for group, row, value in _numbered(parquet, shortest_leaf(parquet, name), name):
            for item in range(len(value or ())):
                yield str(Cell(file, name, group, row, item))
    elif _has_path(kind):
        yield from _of_struct(file, parquet, name, base, images is not None)
    else:
        for group in range(parquet.num_row_groups):
            for row in range(parquet.metadata.row_group(group).num_rows):
                yield str(Cell(file, name, group, row))


def _of_struct(file: str, parquet: pq.ParquetFile, name: str, base: str, based: bool) -> Iterator[str]:
    """Of a column {bytes, path}: a cell where the bytes are there, else the file that the path names.

    The bytes are not read where the footer says that all or none of a row group's are there.
    """
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        nulls = null_count(parquet, group, f"{name}.bytes")
        if nulls == 0 or (nulls is None and not based):  # a reader looks for the path beside the Parquet file
            yield from (str(Cell(file, name, group, row)) for row in range(rows))
            continue
        batches = parquet.iter_batches(ROWS, row_groups=[group], columns=[f"{name}.path" if nulls == rows else name])
        row = 0
        for batch in batches:
            values = batch.column(0)
            missing = [True] * len(values) if nulls == rows else values.field("bytes").is_null().to_pylist()
            for is_missing, path in zip(missing, values.field("path").to_pylist(), strict=True):
                if not is_missing:
                    yield str(Cell(file, name, group, row))
                elif path:
                    yield absolute(joined(base, path))
                elif nulls != rows:
                    yield str(Cell(file, name, group, row))  # an empty cell is told when it is read
                row += 1


def _values(parquet: pq.ParquetFile, column: str) -> Iterator[Any]:
    return (value for _, _, value in _numbered(parquet, column, column))


def _numbered(parquet: pq.ParquetFile, leaf: str, column: str) -> Iterator[tuple[int, int, Any]]:
    """(row group, row, value) of each row of a column, of which only the leaf is read."""
    for group in range(parquet.num_row_groups):
        row = 0
        for batch in parquet.iter_batches(ROWS, row_groups=[group], columns=[leaf]):
            for value in batch.column(column if column in batch.schema.names else 0).to_pylist():
                yield group, row, value
                row += 1


def _image_column(file: str, parquet: pq.ParquetFile, column: str | None) -> str:
    """The column asked for, or the only one that can hold images: by Hugging Face's note in the file, else by its type."""
    schema = parquet.schema_arrow
    if column is not None:
        if column not in schema.names:
            raise DataError(f"{file} has no column {column!r}: choose one of {', '.join(schema.names)}")
        kind = schema.field(column).type
        if not _can_be_image(kind):
            raise DataError(f"{file}: column {column!r} holds {kind}, not encoded images, nor their paths or URLs")
        return column
    noted = _noted(schema)
    for candidates in (
        [name for name in schema.names if name in noted and _can_be_image(schema.field(name).type)],
        [field.name for field in schema if _is_picture(field.type)],
        [field.name for field in schema if _is_text(field.type) and _names_pictures(parquet, field.name)],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise DataError(
                f"{file}: the images may be in any of the columns {', '.join(candidates)}: say which (--column)"
            )
    raise DataError(
        f"{file} has no column of images, nor of paths: it has {', '.join(schema.names)} "
        "(--column takes one whose names have no suffix)"
    )


def _noted(schema: pa.Schema) -> set[str]:
    """Columns that Hugging Face's note in the file calls images, or lists of them. Any part of the note may be odd."""
    try:
        features: Any = json.loads((schema.metadata or {}).get(b"huggingface") or b"{}")
        for key in ("info", "features"):
            features = features.get(key) if isinstance(features, dict) else None
    except ValueError:
        features = None
    return {name for name, kind in features.items() if _is_noted(kind)} if isinstance(features, dict) else set()


def _is_noted(kind: Any) -> bool:
    if isinstance(kind, list):
        return len(kind) == 1 and _is_noted(kind[0])
    return isinstance(kind, dict) and (kind.get("_type") == "Image" or _is_noted(kind.get("feature")))


def _can_be_image(kind: pa.DataType) -> bool:
    return _is_picture(kind) or _is_text(kind)


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in kind.names and _is_picture(kind.field("bytes").type)
    if is_list(kind):
        return not is_list(kind.value_type) and _is_picture(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_path(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and "path" in kind.names


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _first_texts(parquet: pq.ParquetFile, column: str) -> list[str]:
    texts: list[str] = []
    for value in _values(parquet, column):
        if value:
            texts.append(value)
        if len(texts) == LOOKED_AT:
            break
    return texts


def _names_pictures(parquet: pq.ParquetFile, column: str) -> bool:
    """Whether a column of text holds names, or pictures as base64, and not questions or captions."""
    texts = _first_texts(parquet, column)
    return bool(texts) and all(
        is_url(text) or os.path.splitext(text)[1].lower() in SUFFIXES or decoded_text(text) is not None
        for text in texts
    )


def _holds_base64(parquet: pq.ParquetFile, column: str) -> bool:
    return any(decoded_text(text) is not None for text in _first_texts(parquet, column))

"""What the footer of a Parquet file tells of its columns; read in a child process first, as a damaged one can end its reader."""

import contextlib
import os

import pyarrow as pa
import pyarrow.parquet as pq

from mova_core.io.filesystem import open_file
from mova_core.io.isolated import isolated


def check_footer(file: str) -> None:
    """Reads all of a footer that a reader of the file does, in a child process.

    Errors that Python can catch are told when the file itself is read.

    Raises:
        ProcessDied: it ended the child.
        OSError: the file cannot be read.
    """
    isolated(f"{__name__}:read_footer")(data=footer_of(file))


def footer_of(file: str) -> bytes:
    """The footer of a file with what makes a Parquet file of it."""
    with open_file(file) as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 8))
        tail = opened.read(8)
        length = int.from_bytes(tail[:4], "little")
        opened.seek(max(0, size - 8 - length))
        return b"PAR1" + bytes(opened.read(length)) + tail


def read_footer(data: bytes) -> None:
    """Reads what `footer_of` returned."""
    with contextlib.suppress(OSError, ValueError, pa.ArrowException):
        parquet = pq.ParquetFile(pa.BufferReader(data))
        _ = parquet.schema_arrow
        for group in range(parquet.num_row_groups):
            for column in range(parquet.metadata.num_columns):
                _ = parquet.metadata.row_group(group).column(column).statistics


def null_count(parquet: pq.ParquetFile, group: int, path: str) -> int | None:
    """As the footer says; None where it says nothing."""
    rows = parquet.metadata.row_group(group)
    for number in range(rows.num_columns):
        part = rows.column(number)
        if part.path_in_schema == path:
            statistics = part.statistics
            return None if statistics is None or not statistics.has_null_count else int(statistics.null_count)
    return None


def shortest_leaf(parquet: pq.ParquetFile, column: str) -> str:
    """Of a list of {bytes, path} the paths, which also tell how long each list is; else the whole column."""
    leaves = [parquet.schema.column(number).path for number in range(len(parquet.schema))]
    paths = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
    return paths[0] if len(paths) == 1 else column


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)

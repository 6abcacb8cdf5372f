"""The bytes that a locator addresses (see `mova_core.io.uris`), and a cheap sign of whether they changed.

Remote bytes are fetched once per machine (see `node_cache`): whole files, the byte range of a tar's member, and the column
and row group that hold a Parquet cell.
"""

import errno
import io
import os
import threading
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mova_core.io.filesystem import ReadError, as_read_error, message, open_filesystem, with_retries
from mova_core.io.node_cache import NodeCache
from mova_core.io.uris import Cell, Member, is_url, joined, local_path, parent, parse

MAX_BYTES = 512 * 2**20  # of one encoded image

# What filesystems call the time of change or the hash of a file's content; the first that is present is used.
_CHANGE_ENTRIES = (
    "ETag",
    "etag",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "created",
)


def read_bytes(locator: str, newer_than: float = 0.0) -> bytes:
    """The bytes that a locator addresses.

    Args:
        newer_than: seconds since 1970; bytes that this machine fetched earlier are fetched again.

    Raises:
        ReadError: not there, not reachable after several attempts, or larger than `MAX_BYTES`.
    """
    source = parse(locator)
    if isinstance(source, Cell):
        return _read_cell(source, newer_than)
    if isinstance(source, Member):
        _check_size(source.length)
    file = source.file if isinstance(source, Member) else source
    path = local_path(file)
    if path is None:
        cache = NodeCache.of_this_node()
        return cache.get(locator, lambda: with_retries(lambda: _fetch(source)), newer_than).to_pybytes()
    try:
        with open(path, "rb") as opened:
            if isinstance(source, Member):
                opened.seek(source.offset)
                return _complete(opened.read(source.length), source)
            _check_size(os.fstat(opened.fileno()).st_size)
            return opened.read()
    except ReadError:
        raise
    except OSError as error:
        raise as_read_error(error) from error


def file_version(locator: str) -> str | None:
    """A string that changes when the bytes change: size and time of change or ETag of the file, read without its content.

    Returns:
        None where the filesystem names neither a time nor an ETag.

    Raises:
        ReadError: as `read_bytes`.
    """
    source = parse(locator)
    file = source if isinstance(source, str) else source.file
    path = local_path(file)
    if path is not None:
        try:
            status = os.stat(path)
        except OSError as error:
            raise as_read_error(error) from error
        return f"{status.st_size} {status.st_mtime_ns}"

    def info() -> dict[str, Any]:
        filesystem, inner_path = open_filesystem(file)
        return filesystem.info(inner_path)

    entries = with_retries(info)
    change = next((entries[name] for name in _CHANGE_ENTRIES if entries.get(name)), None)
    return None if change is None else f"{entries.get('size')} {change}"


def _fetch(source: Member | str) -> bytes:
    if isinstance(source, Member):
        filesystem, path = open_filesystem(source.file)
        return _complete(filesystem.cat_file(path, start=source.offset, end=source.offset + source.length), source)
    filesystem, path = open_filesystem(source)
    size = filesystem.info(path).get("size")
    if size is not None:
        _check_size(size)
        return filesystem.cat_file(path)
    content = io.BytesIO()
    with filesystem.open(path, "rb") as file:  # a server that does not say how many bytes it will send
        while chunk := file.read(2**20):
            content.write(chunk)
            _check_size(content.tell())
    return content.getvalue()


def _complete(content: bytes, member: Member) -> bytes:
    if len(content) != member.length:
        raise ReadError(errno.EIO, f"{len(content):,} of {member.length:,} bytes: the tar has changed")
    return content


def _read_cell(cell: Cell, newer_than: float) -> bytes:
    path = local_path(cell.file)
    with _decoding:
        changed_ns = 0
        if path is not None:
            try:
                changed_ns = os.stat(path).st_mtime_ns
            except OSError as error:
                raise as_read_error(error) from error
        values = _read_column(path or cell.file, cell.column, cell.group, changed_ns, newer_than)
    if cell.row >= len(values):
        raise ReadError(errno.EIO, f"its row group has {len(values)} rows: the Parquet file has changed")
    value = values[cell.row].as_py()
    if isinstance(value, dict):  # the image type of Hugging Face datasets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return read_bytes(joined(parent(cell.file), value), newer_than)
    if value is None:
        raise ReadError(errno.ENODATA, "the cell is empty")
    _check_size(len(value))
    return value


# Threads that want cells of one row group wait for the first of them to decode the row group.
_decoding = threading.Lock()


@lru_cache(maxsize=2)
def _read_column(file: str, column: str, group: int, changed_ns: int, newer_than: float) -> pa.ChunkedArray:
    """One column of one row group.

    Args:
        changed_ns, newer_than: part of the cache's key, so that a replaced file is read again.
    """
    if not is_url(file):
        try:
            return _decode_column(file, column, group)[0]
        except ReadError:
            raise
        except OSError as error:
            raise as_read_error(error) from error

    def fetch() -> bytes:
        filesystem, path = open_filesystem(file)
        with filesystem.open(path, "rb") as opened:
            table = _decode_column(opened, column, group)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    content = NodeCache.of_this_node().get(f"{file}#{column}[{group}]", lambda: with_retries(fetch), newer_than)
    return pa.ipc.open_file(content).read_all()[0]


def _decode_column(source: Any, column: str, group: int) -> pa.Table:
    """One column of one row group of a path or an open file."""
    try:
        parquet = pq.ParquetFile(source)
        if column not in parquet.schema_arrow.names:
            raise ReadError(errno.ENODATA, f"the Parquet file has no column {column!r} any more")
        if group >= parquet.num_row_groups:
            raise ReadError(errno.ENODATA, f"the Parquet file has {parquet.num_row_groups} row groups: it has changed")
        return parquet.read_row_group(group, columns=[column])
    except pa.ArrowException as error:
        raise ReadError(errno.EIO, message(error)) from error


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ReadError(errno.EFBIG, f"{size:,} bytes are over the limit of {MAX_BYTES:,}")

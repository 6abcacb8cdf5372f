"""The bytes that a locator addresses (see `mova_core.io.uris`), and a cheap sign of whether they changed.

Remote bytes are fetched once per machine (see `node_cache`): whole files, the byte range of a tar's member, and the column
and row group that hold a Parquet cell.
"""

import base64
import errno
import io
import os
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any
from weakref import WeakValueDictionary

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from mova_core.io.cache import private_folder
from mova_core.io.filesystem import (
    DOWNLOAD_S,
    LEAST_RATE,
    ReadError,
    check_regular,
    message,
    open_filesystem,
    read_errors,
    with_retries,
    within,
)
from mova_core.io.isolated import IsolatedFunction, ProcessDied
from mova_core.io.node_cache import NodeCache
from mova_core.io.uris import Cell, Member, is_url, joined, local_path, parent, parse

MAX_BYTES = 512 * 2**20  # of one encoded image
WHOLE_BYTES = 32 * 2**20  # of a row group's column, kept in memory whole; a larger one is read in slices
SLICE_ROWS = 8
LEAST_BASE64 = 256  # characters; shorter texts are names

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
    with read_errors():
        status = check_regular(path)
        with open(path, "rb") as opened:
            if isinstance(source, Member):
                opened.seek(source.offset)
                return _complete(opened.read(source.length), source)
            _check_size(status.st_size)
            content = opened.read(MAX_BYTES + 1)  # it may grow, and files of /proc have no size
            _check_size(len(content))
            return content


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
        with read_errors():
            status = check_regular(path)
        return f"{status.st_size} {status.st_mtime_ns}"

    def info() -> dict[str, Any]:
        filesystem, inner_path = open_filesystem(file)
        return filesystem.info(inner_path)

    entries = with_retries(lambda: within(DOWNLOAD_S, info))
    change = next((entries[name] for name in _CHANGE_ENTRIES if entries.get(name)), None)
    return None if change is None else f"{entries.get('size')} {change}"


def _fetch(source: Member | str) -> bytes:
    filesystem, path = open_filesystem(source.file if isinstance(source, Member) else source)
    if isinstance(source, Member):
        start, end = source.offset, source.offset + source.length
        content = within(_seconds_for(source.length), lambda: filesystem.cat_file(path, start=start, end=end))
        return _complete(content, source)
    size = within(DOWNLOAD_S, lambda: filesystem.info(path)).get("size")
    if size is not None:
        _check_size(size)
        return within(_seconds_for(size), lambda: filesystem.cat_file(path))

    def read_unknown_size() -> bytes:
        content = io.BytesIO()
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(2**20):
                content.write(chunk)
                _check_size(content.tell())
        return content.getvalue()

    return within(_seconds_for(MAX_BYTES // 10), read_unknown_size)


def _seconds_for(size: int) -> float:
    """The longest time that a download of so many bytes may take."""
    return DOWNLOAD_S + size / LEAST_RATE


def _complete(content: bytes, member: Member) -> bytes:
    if len(content) != member.length:
        raise ReadError(errno.EIO, f"{len(content):,} of {member.length:,} bytes: the tar has changed")
    return content


def _read_cell(cell: Cell, newer_than: float) -> bytes:
    path = local_path(cell.file)
    with _lock_of(cell):
        changed_ns = 0
        if path is not None:
            with read_errors():
                changed_ns = check_regular(path).st_mtime_ns
        values = _open_column(path or cell.file, cell.column, cell.group, changed_ns, newer_than)
        try:
            value = values.row(cell.row).as_py()
        except ValueError as error:  # text that is no UTF-8, an impossible list or number
            raise ReadError(errno.EIO, f"damaged: {message(error)}") from error
    if cell.item is not None:
        if not isinstance(value, list) or cell.item >= len(value):
            raise ReadError(errno.ENODATA, "its list is shorter: the Parquet file has changed")
        value = value[cell.item]
    if isinstance(value, dict):  # the image type of Hugging Face datasets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = decoded_text(value) or value
    if isinstance(value, str):
        return read_bytes(joined(parent(cell.file), value), newer_than)
    if value is None:
        raise ReadError(errno.ENODATA, "the cell is empty")
    _check_size(len(value))
    return bytes(value)


def decoded_text(text: str) -> bytes | None:
    """The bytes of a data URI or of base64 of at least `LEAST_BASE64` characters; None for any other text."""
    head, comma, body = text.partition(",")
    is_uri = head[:5].lower() == "data:" and head.lower().endswith(";base64") and bool(comma)
    if not is_uri and len(text) < LEAST_BASE64:
        return None
    try:
        return base64.b64decode(body if is_uri else text, validate=True)
    except ValueError:
        return None


class _WholeColumn:
    """One column of one row group in memory."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.values = values

    def row(self, number: int) -> pa.Scalar:
        if number >= len(self.values):
            raise ReadError(errno.EIO, f"its row group has {len(self.values)} rows: the Parquet file has changed")
        return self.values[number]


class _MappedColumn:
    """One column of one row group in a file of the node's cache, `SLICE_ROWS` rows to a batch; only rows asked for are mapped."""

    def __init__(self, content: pa.Buffer) -> None:
        self.batches = pa.ipc.open_file(content)

    def row(self, number: int) -> pa.Scalar:
        batch, offset = divmod(number, SLICE_ROWS)
        if batch < self.batches.num_record_batches and offset < len(values := self.batches.get_batch(batch).column(0)):
            return values[offset]
        raise ReadError(errno.EIO, f"its row group has no row {number:,}: the Parquet file has changed")


class _ColumnSlices:
    """One column of a large row group, of which `SLICE_ROWS` rows are in memory; fast for rows in ascending order."""

    def __init__(self, source: Any, column: str, group: int) -> None:
        self.source, self.column, self.group = source, column, group
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._start, self._rows = 0, pa.array([])

    def row(self, number: int) -> pa.Scalar:
        try:
            if number < self._start or not len(self._rows):
                # Not buffered ahead, else Arrow reads the whole column at once.
                parquet = pq.ParquetFile(self.source, pre_buffer=False, buffer_size=2**20)
                self._batches = parquet.iter_batches(SLICE_ROWS, row_groups=[self.group], columns=[self.column])
                self._start, self._rows = 0, next(self._batches, pa.RecordBatch.from_pylist([])).column(0)
            while number >= self._start + len(self._rows):
                batch = next(self._batches, None)
                if batch is None:
                    reason = f"its row group has {self._start + len(self._rows)} rows: the Parquet file has changed"
                    self._rows = pa.array([])
                    raise ReadError(errno.EIO, reason)
                self._start, self._rows = self._start + len(self._rows), batch.column(0)
        except pa.ArrowException as error:
            self._rows = pa.array([])
            raise ReadError(errno.EIO, message(error)) from error
        return self._rows[number - self._start]


# One lock for each row group that is being read: threads that want cells of the same wait for the first to decode it.
_locks: WeakValueDictionary[tuple[str, str, int], threading.Lock] = WeakValueDictionary()
_locking = threading.Lock()


def _lock_of(cell: Cell) -> threading.Lock:
    with _locking:
        return _locks.setdefault((cell.file, cell.column, cell.group), threading.Lock())


@lru_cache(maxsize=8)  # as many threads as read at once on a node with an accelerator; `WHOLE_BYTES` each
def _open_column(
    file: str, column: str, group: int, changed_ns: int, newer_than: float
) -> _WholeColumn | _MappedColumn | _ColumnSlices:
    """One column of one row group.

    Args:
        changed_ns, newer_than: part of the cache's key, so that a replaced file is read again.
    """
    if not is_url(file):
        with read_errors():
            values = _of_open_file(file, column, group)
        if isinstance(values, _WholeColumn):
            return values
        return _unpacked(file, column, group, changed_ns) or values

    def fetch() -> bytes:
        filesystem, path = open_filesystem(file)
        with filesystem.open(path, "rb") as opened:
            values = _of_open_file(opened, column, group)
            if isinstance(values, _ColumnSlices):
                return b""
            table = pa.table({column: values.values})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    limited = partial(within, _seconds_for(MAX_BYTES // 10), fetch)
    content = NodeCache.of_this_node().get(f"{file}#{column}[{group}]", lambda: with_retries(limited), newer_than)
    if not content.size:  # too large for the memory of one process
        filesystem, path = open_filesystem(file)
        return _ColumnSlices(with_retries(lambda: filesystem.open(path, "rb")), column, group)
    return _WholeColumn(pa.ipc.open_file(content).read_all()[0])


def _unpacked(file: str, column: str, group: int, changed_ns: int) -> _MappedColumn | None:
    """One column of a large row group, mapped from the node's cache; None where the cache cannot hold it.

    Arrow unpacks whole pages, and a page may be as large as its row group. So a child process unpacks the column into the
    cache, one at a time on this machine, and all processes map the same file.
    """
    name = f"{file}#{column}[{group}] {changed_ns}"
    cache = NodeCache.of_this_node()
    content = cache.get(name, lambda: b"")
    if not content.size:
        child = IsolatedFunction(f"{__name__}:unpack_column")
        try:
            child(name, file, column, group)
        except (ProcessDied, ValueError):
            return None
        finally:
            child.close()
        content = cache.get(name, lambda: b"")
    return _MappedColumn(content) if content.size else None


def unpack_column(name: str, file: str, column: str, group: int) -> None:
    """Puts one column of one row group into the node's cache under a name."""
    cache = NodeCache.of_this_node()
    if os.stat(file).st_size > cache.limit // 4:  # about what the cache takes as one object
        return
    private_folder(cache.folder)

    def unpack() -> bytes:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        batches = parquet.iter_batches(SLICE_ROWS, row_groups=[group], columns=[column])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, pa.schema([parquet.schema_arrow.field(column)])) as writer:
            rows = SLICE_ROWS
            for batch in batches:
                if rows != SLICE_ROWS:
                    raise ValueError(
                        "a batch that is not full before the last one"
                    )  # `_MappedColumn` counts on full ones
                rows = len(batch)
                writer.write_batch(batch)
        return sink.getvalue().to_pybytes()

    with FileLock(cache.folder / "unpack.lock"):
        cache.get(name, unpack)


def _of_open_file(source: Any, column: str, group: int) -> _WholeColumn | _ColumnSlices:
    """One column of one row group of a path or an open file."""
    try:
        parquet = pq.ParquetFile(source)
        if column not in parquet.schema_arrow.names:
            raise ReadError(errno.ENODATA, f"the Parquet file has no column {column!r} any more")
        if group >= parquet.num_row_groups:
            raise ReadError(errno.ENODATA, f"the Parquet file has {parquet.num_row_groups} row groups: it has changed")
        parts = (parquet.metadata.row_group(group).column(part) for part in range(parquet.metadata.num_columns))
        sizes = [part.total_uncompressed_size for part in parts if f"{part.path_in_schema}.".startswith(f"{column}.")]
        if sum(sizes) > WHOLE_BYTES:
            return _ColumnSlices(source, column, group)
        return _WholeColumn(parquet.read_row_group(group, columns=[column])[0])
    except (pa.ArrowException, ValueError) as error:  # also names of columns that are no UTF-8
        raise ReadError(errno.EIO, message(error)) from error


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ReadError(errno.EFBIG, f"{size:,} bytes are over the limit of {MAX_BYTES:,}")

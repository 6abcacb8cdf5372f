"""Receipts as tables, and the index over them: rows sorted by key, in memory while few, memory-mapped when many.

A batch of lookups is a binary search over 32-byte keys: 4 to 9 us a key in an index of 10 million (440 MB).
"""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Sequence, Set
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mova_core.features.errors import DamagedReceipt

RECEIPT = pa.schema(
    {
        "key": pa.string(),  # sha256 of the encoded image, hex
        "file": pa.string(),  # <shard>-<attempt>.safetensors
        "offset": pa.int64(),
        "length": pa.int64(),
        "grid": pa.list_(pa.int32(), 2),
        "dtype": pa.string(),
        "channels": pa.int32(),
        "xxh3": pa.uint64(),  # of the row's bytes
        "loss": pa.float32(),  # relative L2 that storing in this dtype cost
    }
)
_FEW = 64  # up to so many keys are searched in the order given; sorting them first would cost more
SORTED_BLOCK = 1 << 16  # keys that are compared or looked up at once where millions are
_KEY = "S32"  # a sha256 as numpy sorts and searches it


class FeatureLocation(NamedTuple):
    """Where a feature lies, and its shape, dtype and checksum: a receipt row without its key."""

    file: str  # in shards/
    offset: int  # bytes
    length: int  # bytes
    grid: tuple[int, int]  # H, W
    dtype: str
    channels: int
    xxh3: int
    loss: float


class ReceiptIndex:
    """Receipt rows sorted by key; immutable, so that any number of threads may search.

    Attributes:
        table: the rows; keys are binary, shard files and dtypes dictionary-encoded.
        filtered: rows of withdrawn shards were left out, so the table is no longer that of an index file.
        keys: the key column (dtype S32), sorted; a key may occur twice, in two shards.
    """

    def __init__(self, table: pa.Table, filtered: bool = False):
        self.table = table
        self.filtered = filtered
        self.keys = _keys(table["key"].chunk(0)) if len(table) else np.empty(0, _KEY)
        self._columns = {name: _column(table, name) for name in table.column_names[1:]}
        self._names = {name: _dictionary(table, name) for name in ("file", "dtype")}
        self._name = lru_cache(4096)(partial(_name, self._names))

    @classmethod
    def empty(cls) -> ReceiptIndex:
        """An index of no rows."""
        return cls(index_rows(pa.Table.from_batches([], RECEIPT)))

    @classmethod
    def merged(cls, tables: list[pa.Table]) -> ReceiptIndex:
        """An index of all rows of these tables; a row that comes twice counts once.

        Args:
            tables: of other indexes, or as `index_rows` returns them. The list is emptied, and columns of the tables are freed
                as soon as those of the index are there: a table of ten million rows has 800 MB.
        """
        table = pa.concat_tables(tables).unify_dictionaries()
        tables.clear()
        columns = dict(zip(table.column_names, table.columns, strict=True))
        del table
        key_column, codes = _one_chunk(columns.pop("key")), _one_chunk(columns.pop("file"))
        order = _sorted_once(_keys(key_column), _numbers(codes.indices))
        # Through a buffer: see `_numbers`.
        positions = pa.Array.from_buffers(pa.int64(), len(order), [None, pa.py_buffer(order)])
        merged = [key_column.take(positions), codes.take(positions)]
        del key_column, codes
        for name in list(columns):
            merged.append(_one_chunk(columns.pop(name)).take(positions))
        return cls(pa.Table.from_arrays(merged, RECEIPT.names))

    @classmethod
    def mapped(cls, path: Path) -> ReceiptIndex:
        """The index in a file, memory-mapped: its pages are read when touched, and shared by this machine's processes."""
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def files(self) -> frozenset[str]:
        """The shard files that the rows name."""
        return frozenset(self._names["file"].to_pylist())

    @cached_property
    def shards(self) -> frozenset[str]:
        """The ids of these shards."""
        return frozenset(file.partition("-")[0] for file in self.files)

    def filter_shards(self, shards: Set[str]) -> ReceiptIndex:
        """An index without the rows of any other shard."""
        if self.shards <= shards:
            return self
        files = pa.array([file for file in self.files if file.partition("-")[0] in shards], pa.string())
        names = self.table["file"].cast(pa.string())
        table = self.table.set_column(1, "file", names).filter(pc.is_in(names, files))
        return ReceiptIndex(
            table.set_column(1, "file", table["file"].dictionary_encode()).combine_chunks(), filtered=True
        )

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The position of each key, -1 where there is none."""
        if not len(self) or not len(keys):
            return np.full(len(keys), -1)
        if len(keys) <= _FEW:
            candidates = self.keys.searchsorted(keys)
            candidates[candidates == len(self)] = 0
            candidates[self.keys[candidates] != keys] = -1
            return candidates
        order = np.argsort(_first_bytes(keys))  # a search for sorted keys walks memory in order: 6x faster
        candidates = np.minimum(self.keys.searchsorted(keys[order]), len(self) - 1)
        positions = np.empty(len(keys), np.int64)
        positions[order] = np.where(self.keys[candidates] == keys[order], candidates, -1)
        return positions

    def locations(self, positions: np.ndarray) -> list[FeatureLocation]:
        """The rows at these positions, through numpy: Arrow's own `take` costs ten times as much."""
        columns = {name: column[positions].tolist() for name, column in self._columns.items()}
        for name in self._names:
            columns[name] = [self._name(name, code) for code in columns[name]]
        columns["grid"] = map(tuple, columns["grid"])
        return list(map(FeatureLocation._make, zip(*columns.values(), strict=True)))

    def unique_keys(self) -> np.ndarray:
        """The keys, each once, sorted."""
        first = np.ones(len(self), bool)
        first[1:] = self.keys[1:] != self.keys[:-1]
        return self.keys[first]


def binary_keys(keys: Sequence[str]) -> np.ndarray:
    """Hex keys as the index sorts and searches them: dtype S32.

    Raises:
        ValueError: a key that is no sha256.
    """
    try:
        binary = np.frombuffer(bytes.fromhex("".join(keys)), _KEY)
    except ValueError:
        binary = np.empty(0, _KEY)
    if len(binary) != len(keys) or any(len(key) != 64 for key in keys):
        wrong = next(key for key in keys if len(key) != 64 or set(key.lower()) - set("0123456789abcdef"))
        raise ValueError(f"{wrong!r} is no image key: a key is the sha256 of the encoded image, 64 hex digits")
    return binary


def hex_keys(keys: np.ndarray) -> list[str]:
    """Binary keys as people and receipts write them."""
    text = keys.tobytes().hex()
    return [text[at : at + 64] for at in range(0, len(text), 64)]


def sorting(keys: np.ndarray) -> np.ndarray:
    """The positions that sort binary keys; equal keys stay in order.

    Sorts by the keys' first 8 bytes, 3x faster than by all 32. Where two different keys share them, which has never been
    seen with sha256, all bytes are compared.
    """
    first = _first_bytes(keys)
    order = np.argsort(first, kind="stable")
    ties = np.flatnonzero(first[order[1:]] == first[order[:-1]])
    if (keys[order[ties]] != keys[order[ties + 1]]).any():
        return np.argsort(keys, kind="stable")
    return order


def new_keys(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """In the order of `sorting`, whether each key differs from the one before: bool. Compared in parts, to copy few keys."""
    new = np.ones(len(order), bool)
    for start in range(1, len(order), SORTED_BLOCK):
        ordered = keys[order[start - 1 : start + SORTED_BLOCK]]
        new[start : start + SORTED_BLOCK] = ordered[1:] != ordered[:-1]
    return new


def _first_bytes(keys: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each key, as a number that sorts as they do."""
    return np.ascontiguousarray(keys).view(">u8").reshape(-1, 4)[:, 0].astype(np.uint64)


def _sorted_once(keys: np.ndarray, files: np.ndarray) -> np.ndarray:
    """The positions that sort rows by key, without those that repeat the key and the file of the row before: int64."""
    order = sorting(keys)
    new = new_keys(keys, order)
    files = files[order]
    new[1:] |= files[1:] != files[:-1]
    return order[new].astype(np.int64, copy=False)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; not copied where it is in one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _keys(column: pa.Array) -> np.ndarray:
    """A column of binary keys, without a copy."""
    return np.frombuffer(column.buffers()[1] or b"", _KEY, len(column), 32 * column.offset)


def _column(table: pa.Table, name: str) -> np.ndarray:
    """Any other column than the key, without a copy; the codes of a dictionary column."""
    if not len(table):
        return np.empty(0, np.int64)
    column = table[name].chunk(0)
    if pa.types.is_dictionary(column.type):
        return _numbers(column.indices)
    if pa.types.is_fixed_size_list(column.type):
        return _numbers(column.flatten()).reshape(len(column), -1)
    return _numbers(column)


def _numbers(array: pa.Array) -> np.ndarray:
    """An array's numbers, through its buffer: pyarrow's `to_numpy` imports pandas, which takes longer than a lookup."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def _text(array: pa.Array) -> memoryview:
    """The hex keys of an array one after another, without a copy."""
    offsets = np.frombuffer(array.buffers()[1], np.int32, len(array) + 1, 4 * array.offset)
    if not (np.diff(offsets) == 64).all():
        raise ValueError("a key that is no sha256")
    return memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]]


def index_file(index: ReceiptIndex) -> pa.Buffer:
    """The file of an index, as `ReceiptIndex.mapped` reads it, in memory of exactly its size."""
    size = pa.MockOutputStream()  # a stream that grows would take up to three times as much
    _write_ipc(size, index.table)
    content = pa.allocate_buffer(size.size())
    _write_ipc(pa.FixedSizeBufferWriter(content), index.table)
    return content


def _write_ipc(sink: Any, table: pa.Table) -> None:
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def parquet(table: pa.Table) -> pa.Buffer:
    """A Parquet file of the table with page checksums, in memory: the storage backend then reports a full disk plainly."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def parse_receipt(path: str, content: Any) -> pa.Table:
    """The rows of a receipt's file, as `RECEIPT`.

    Args:
        path: named in the error.
        content: the file's bytes.

    Raises:
        DamagedReceipt: the bytes are no receipt, or a page's checksum is wrong.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(use_threads=False).select(RECEIPT.names).cast(RECEIPT)
        reason = "" if len(table) else "no rows"
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise DamagedReceipt(f"receipt {path} is damaged ({reason})")
    return table


def _dictionary(table: pa.Table, name: str) -> pa.Array:
    return table[name].chunk(0).dictionary if len(table) else pa.nulls(0, pa.string())


def _name(names: dict[str, pa.Array], column: str, code: int) -> str:
    return str(names[column][code].as_py())


def index_rows(receipts: pa.Table) -> pa.Table:
    """Receipts as an index keeps them: binary keys, and dictionaries for names that recur."""
    keys = pa.py_buffer(b"".join(unhexlify(_text(chunk)) for chunk in receipts["key"].chunks))
    columns = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(receipts), [None, keys])]
    for name in RECEIPT.names[1:]:
        columns.append(receipts[name].dictionary_encode() if name in ("file", "dtype") else receipts[name])
    return pa.Table.from_arrays(columns, RECEIPT.names)

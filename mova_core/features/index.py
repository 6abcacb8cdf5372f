"""Receipt rows, sorted by key: in memory while they are few, memory-mapped from an index file when they are many."""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
_FEW = 64  # keys that are found one by one
_KEY = "S32"  # a sha256 as numpy sorts and searches it


class FeatureLocation(NamedTuple):
    """Where a feature lies, and what it is."""

    file: str  # in shards/
    offset: int
    length: int
    grid: tuple[int, int]
    dtype: str
    channels: int
    xxh3: int
    loss: float


class ReceiptIndex:
    """Sorted receipt rows; immutable."""

    def __init__(self, table: pa.Table, filtered: bool = False):
        self.table = table
        self.filtered = filtered  # lacks rows that its index file still has
        self.keys = _keys(table)
        self._columns = {name: _column(table, name) for name in table.column_names[1:]}
        self._names = {name: _dictionary(table, name) for name in ("file", "dtype")}
        self._name = lru_cache(4096)(partial(_name, self._names))

    @classmethod
    def of(cls, receipts: Sequence[pa.Table], rows: Sequence[ReceiptIndex] = ()) -> ReceiptIndex:
        """Merges receipts and rows."""
        tables = [part.table for part in rows] + [
            _indexed(table) for table in receipts or [pa.Table.from_batches([], RECEIPT)]
        ]
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        if len(table):
            order = sorting(_keys(table))
            keys, files = _keys(table)[order], _column(table, "file")[order]
            first = np.ones(len(table), bool)
            first[1:] = (keys[1:] != keys[:-1]) | (files[1:] != files[:-1])  # else a receipt that came twice
            order = order[first].astype(np.int64)
            # Through a buffer for the same reason as in `_numbers`.
            positions = pa.Array.from_buffers(pa.int64(), len(order), [None, pa.py_buffer(order)])
            table = table.take(positions).combine_chunks()
        return cls(table)

    @classmethod
    def mapped(cls, path: Path) -> ReceiptIndex:
        """Those of an index file; pages are read when they are touched, and shared by all processes here."""
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def __len__(self) -> int:
        return len(self.table)

    def files(self) -> set[str]:
        """The shard files named."""
        return set(self._names["file"].to_pylist())

    def shards(self) -> set[str]:
        """The ids of the shards covered."""
        return {name.partition("-")[0] for name in self._names["file"].to_pylist()}

    def only(self, shards: set[str]) -> ReceiptIndex:
        """Without the rows of other shards."""
        if self.shards() <= shards:
            return self
        kept = pa.array([name for name in self.files() if name.partition("-")[0] in shards], pa.string())
        names = self.table["file"].cast(pa.string())
        table = self.table.set_column(1, "file", names).filter(pc.is_in(names, kept))
        return ReceiptIndex(
            table.set_column(1, "file", table["file"].dictionary_encode()).combine_chunks(), filtered=True
        )

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The position of each key, -1 where there is none."""
        if not len(self) or not len(keys):
            return np.full(len(keys), -1)
        if len(keys) <= _FEW:
            found = self.keys.searchsorted(keys)
            found[found == len(self)] = 0
            found[self.keys[found] != keys] = -1
            return found
        order = np.argsort(_first_bytes(keys))  # a search for sorted keys walks memory in order: 6x faster
        found = np.minimum(self.keys.searchsorted(keys[order]), len(self) - 1)
        positions = np.empty(len(keys), np.int64)
        positions[order] = np.where(self.keys[found] == keys[order], found, -1)
        return positions

    def stored(self, positions: np.ndarray) -> list[FeatureLocation]:
        """What stands at these positions; Arrow's own take costs ten times as much."""
        columns = {name: column[positions].tolist() for name, column in self._columns.items()}
        for name in self._names:
            columns[name] = [self._name(name, code) for code in columns[name]]
        columns["grid"] = map(tuple, columns["grid"])
        return list(map(FeatureLocation._make, zip(*columns.values(), strict=True)))

    def distinct(self) -> np.ndarray:
        """The keys, each once."""
        first = np.ones(len(self), bool)
        first[1:] = self.keys[1:] != self.keys[:-1]
        return self.keys[first]


def binary_keys(keys: Sequence[str]) -> np.ndarray:
    """Hex keys as they sort and search.

    Raises:
        ValueError: names one that is no sha256.
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
    """Binary keys as people and files write them."""
    text = keys.tobytes().hex()
    return [text[at : at + 64] for at in range(0, len(text), 64)]


def sorting(keys: np.ndarray) -> np.ndarray:
    """The positions that sort binary keys, equal ones in the order they came: by their first bytes, 3x faster."""
    first = _first_bytes(keys)
    order = np.argsort(first, kind="stable")
    alike = np.flatnonzero(first[order[1:]] == first[order[:-1]])
    if (keys[order[alike]] != keys[order[alike + 1]]).any():  # never seen with sha256
        return np.argsort(keys, kind="stable")
    return order


def _first_bytes(keys: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each key, as a number that sorts as they do."""
    return np.ascontiguousarray(keys).view(">u8").reshape(-1, 4)[:, 0].astype(np.uint64)


def _keys(table: pa.Table) -> np.ndarray:
    """The key column, without a copy."""
    if not len(table):
        return np.empty(0, _KEY)
    column = table["key"].chunk(0)
    return np.frombuffer(column.buffers()[1], _KEY, len(column), 32 * column.offset)


def _column(table: pa.Table, name: str) -> np.ndarray:
    """A column but the key, without a copy; for a dictionary its codes."""
    if not len(table):
        return np.empty(0, np.int64)
    column = table[name].chunk(0)
    if pa.types.is_dictionary(column.type):
        return _numbers(column.indices)
    if pa.types.is_fixed_size_list(column.type):
        return _numbers(column.flatten()).reshape(len(column), -1)
    return _numbers(column)


def _numbers(array: pa.Array) -> np.ndarray:
    """Through its buffer: pyarrow's own `to_numpy` first imports pandas, which takes longer than all else here."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def _text(array: pa.Array) -> memoryview:
    """The strings of an array one after the other, without a copy; all of the same length, as hex keys are."""
    offsets = np.frombuffer(array.buffers()[1], np.int32, len(array) + 1, 4 * array.offset)
    if not (np.diff(offsets) == 64).all():
        raise ValueError("a key that is no sha256")
    return memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]]


def parquet(table: pa.Table) -> pa.Buffer:
    """A Parquet file of the table, its pages checksummed; in memory, so that a full disk shows as the error it is."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def _dictionary(table: pa.Table, name: str) -> pa.Array:
    return table[name].chunk(0).dictionary if len(table) else pa.nulls(0, pa.string())


def _name(names: dict[str, pa.Array], column: str, code: int) -> str:
    return str(names[column][code].as_py())


def _indexed(receipts: pa.Table) -> pa.Table:
    """Receipts as an index keeps them: binary keys, and names that recur written once."""
    keys = pa.py_buffer(b"".join(unhexlify(_text(chunk)) for chunk in receipts["key"].chunks))
    columns = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(receipts), [None, keys])]
    for name in RECEIPT.names[1:]:
        columns.append(receipts[name].dictionary_encode() if name in ("file", "dtype") else receipts[name])
    return pa.Table.from_arrays(columns, RECEIPT.names)

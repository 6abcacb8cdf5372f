"""A partition: the features of one expert with one fingerprint, as files. `store` tells the layout and the commit protocol.

Shapes: H x W the expert's native grid, N = H*W tokens, C channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache, partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mova_core.features.codec import CODECS, checksum
from mova_core.features.index import RECEIPT, FeatureLocation, ReceiptIndex, binary_keys, hex_keys, parquet, sorting
from mova_core.features.storage import StorageBackend, StoreError, open_storage, writing

if TYPE_CHECKING:
    from torch import Tensor

    from mova_core.experts import Features

logger = logging.getLogger(__name__)

PAGE = 4096  # rows start at multiples of it, so that they can be mapped alone and read past the page cache
_SMALL = 1 << 20  # bytes under which a batch is read faster on the caller's own thread
_BLOCK = 4096  # features whose whereabouts are told at once
_VERIFIED = 4  # shards that are in memory at once while they are verified
_CHANGED = "its bytes have changed"
_SETTLED = 2_000_000_000  # ns after which no clock tick of a file system is still running


class MissingFeatures(StoreError, LookupError):
    """Features that were asked for and are not stored.

    Attributes:
        missing: (image key, expert) pairs.
    """

    def __init__(self, message: str, missing: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.missing = list(missing)

    @classmethod
    def of(cls, store: str, missing: Sequence[tuple[str, str]]) -> MissingFeatures:
        """The error for these (image key, expert) pairs."""
        counts = Counter(expert for _, expert in missing)
        return cls(
            f"store {store} lacks {len(missing)} of the features asked for "
            f"({', '.join(f'{expert}: {count}' for expert, count in counts.items())}): "
            f"run `mova precompute` on these images with --experts {','.join(counts)}",
            missing,
        )


class Shard(NamedTuple):
    """A piece of work; the same keys for the same fingerprint always have the same id."""

    id: str
    keys: list[str]


class FeaturePartition:
    """The features of one expert with one fingerprint. Picklable; reads from any number of threads.

    Args:
        location: of the partition, <store>/<expert>/<fingerprint>.
        damaged: open it also without a sound expert.json, to look and to repair.

    Attributes:
        location, store: of the partition, and of the store it is in.
        expert, fingerprint: its address.
        description: all that the fingerprint covers, as `VisionExpert.describe` told it.

    Raises:
        StoreError: its expert.json cannot be read.
    """

    def __init__(self, location: str | os.PathLike[str], damaged: bool = False):
        self.storage: StorageBackend = open_storage(location)
        self.location = self.storage.location
        self.store, self.expert, self.fingerprint = self.location.rsplit("/", 2)
        self.description: dict[str, Any] = {}
        try:
            described = json.loads(self.storage.read("expert.json"))
            self._codec = CODECS[described["dtype"]]
            self.description = described
        except (OSError, ValueError, KeyError, TypeError):
            if not damaged:
                raise StoreError(
                    f"{self.location}/expert.json is damaged: run `mova store verify`, then `mova precompute` "
                    f"with --experts {self.expert}, which writes it anew"
                ) from None
        self._lock = threading.RLock()
        self._number = 0  # of the snapshot that _index is; 0 is none
        self._index = ReceiptIndex.of([])
        self._newer = ReceiptIndex.of([])  # from receipts newer than the snapshot
        self._unsorted: dict[str, pa.Table] = {}  # receipts to go there; a writer that never reads never sorts them
        self._listed: int | None = 0  # when receipts/ had last changed at the last look
        self.refresh()

    @classmethod
    def open_or_create(cls, location: str, description: Mapping[str, Any]) -> FeaturePartition:
        """The partition there, made if there is none; StoreError where its expert.json tells something else."""
        place, text = open_storage(location), expert_json(description)
        with writing(location.rsplit("/", 2)[0]):
            place.mkdir()
            place.put_if_absent("expert.json", text)
            partition = cls(location)
            partition.make_folders()
        if partition.description != json.loads(text):
            raise StoreError(
                f"{location}/expert.json does not tell this expert: run `mova store verify`, then try again"
            )
        return partition

    def __reduce__(self) -> tuple[Any, ...]:
        return FeaturePartition, (self.location,)

    def __repr__(self) -> str:
        return f"FeaturePartition({self.location!r})"

    # What there is

    def __len__(self) -> int:
        index, newer = self._catalog()
        return len(index.distinct()) + int((index.find(newer.distinct()) < 0).sum())

    def keys(self) -> np.ndarray:
        """The keys of what is stored, each once, sorted: bytes, dtype S32."""
        index, newer = self._catalog()
        more = newer.distinct()
        return np.sort(np.concatenate([index.distinct(), more[index.find(more) < 0]]))

    def chunks(self, keys: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Stored keys (dtype S32) in parts whose features take about `size` bytes."""
        begin = total = 0
        for block in range(0, len(keys), _BLOCK):
            for at, row in enumerate(self._find(hex_keys(keys[block : block + _BLOCK])), block):
                if at > begin and total + row.length > size:
                    yield keys[begin:at]
                    begin, total = at, 0
                total += row.length
        if begin < len(keys):
            yield keys[begin:]

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Which of the keys are stored, as of the last `refresh` or `write` here: bool, one per key."""
        binary = binary_keys(keys)
        index, newer = self._catalog()
        return (index.find(binary) >= 0) | (newer.find(binary) >= 0)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those keys that are not stored, in order. Refreshes before it says that any is not."""
        there = self.has(keys)
        if not there.all():
            self.refresh()
            there = self.has(keys)
        return [keys[at] for at in np.flatnonzero(~there).tolist()]

    def refresh(self) -> None:
        """Sees what was committed, withdrawn or merged into a snapshot since the last look."""
        with self._lock:
            changed = self.storage.mtime_ns("receipts")
            if changed is not None and changed == self._listed:
                return
            # A folder that changed just now may change again within the same tick of its clock: look again next time.
            self._listed = changed if changed is not None and time.time_ns() - changed > _SETTLED else 0
            receipts = {name.removesuffix(".parquet") for name in self.storage.list_files("receipts", ".parquet")}
            self._load_snapshot()
            self._index = self._index.only(receipts)
            indexed = self._index.shards()
            self._newer = self._newer.only(receipts - indexed)
            known = indexed | self._newer.shards()
            self._unsorted = {
                shard: table for shard, table in self._unsorted.items() if shard in receipts and shard not in known
            }
            new = sorted(receipts - known - self._unsorted.keys())
            for shard, table in zip(new, self._at_once(self._readable, new), strict=True):
                if table is not None:
                    self._unsorted[shard] = table

    def _readable(self, shard_id: str) -> pa.Table | None:
        """A receipt, if it is sound and was not withdrawn since the listing."""
        try:
            return self._receipt(shard_id)
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("%s, its features are not seen: run `mova store verify`", error)
            return None

    def _catalog(self) -> tuple[ReceiptIndex, ReceiptIndex]:
        """The rows of the snapshot, and those newer than it."""
        with self._lock:
            if self._unsorted:
                self._newer = ReceiptIndex.of(list(self._unsorted.values()), [self._newer])
                self._unsorted = {}
            return self._index, self._newer

    def _load_snapshot(self) -> None:
        """Maps the latest index that is whole; where there is none, every receipt will be read."""
        for number in reversed(self._numbers("snapshots", ".json")):
            if number == self._number:
                return
            with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
                told = json.loads(self.storage.read(f"snapshots/{number}.json"))
                path = self.storage.local_copy(f"index/{told['index']}", told["index_bytes"], told["index_xxh3"])
                self._index, self._number = ReceiptIndex.mapped(path), number
                return
        self._index, self._number = ReceiptIndex.of([]), 0

    def stat(self) -> dict[str, Any]:
        """What is stored.

        Returns:
            features, bytes, shards, bytes_per_feature, loss and max_loss (mean and largest relative L2 error that
            storing in this dtype made), dtype, grid, channels.
        """
        catalog = self._catalog()
        rows = sum(len(part) for part in catalog)
        size, loss = (sum(pc.sum(part.table[name]).as_py() or 0 for part in catalog) for name in ("length", "loss"))
        told = sum(pc.count(part.table["loss"]).as_py() for part in catalog)  # a salvaged row may not tell
        return {
            "features": len(self),
            "bytes": size,
            "shards": sum(len(part.shards()) for part in catalog),
            "bytes_per_feature": size // rows if rows else 0,
            "loss": loss / told if told else 0.0,
            "max_loss": max(pc.max(part.table["loss"]).as_py() or 0.0 for part in catalog),
            **{name: self.description.get(name) for name in ("dtype", "grid", "channels")},
        }

    # Writing

    def missing_positions(self, keys: np.ndarray) -> np.ndarray:
        """Where a key stands that is not stored, the first of each: positions, ascending. Refreshes first.

        Args:
            keys: image keys as bytes, dtype S32. 10 million take seconds and 100 bytes each.
        """
        self.refresh()
        order = sorting(keys)
        ordered = keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        index, newer = self._catalog()
        ordered, order = ordered[first], order[first]
        return np.sort(order[(index.find(ordered) < 0) & (newer.find(ordered) < 0)])

    def shard_id(self, keys: Iterable[str] | np.ndarray) -> str:
        """The name of the work of computing these keys, hex or bytes (dtype S32), in any order."""
        text = np.sort(keys).tobytes().hex("\n", 32) if isinstance(keys, np.ndarray) else "\n".join(sorted(keys))
        return hashlib.sha256(f"{self.fingerprint}\n{text}".encode()).hexdigest()[:32]

    def plan(self, keys: Sequence[str], rows_per_shard: int) -> list[Shard]:
        """The work still to do: the keys not yet stored, each once, in the order given."""
        todo = [keys[at] for at in self.missing_positions(binary_keys(keys)).tolist()]
        chunks = (todo[at : at + rows_per_shard] for at in range(0, len(todo), rows_per_shard))
        return [Shard(self.shard_id(chunk), chunk) for chunk in chunks]

    def committed(self, shard_id: str) -> bool:
        """Whether that work is done."""
        return self.storage.exists(f"receipts/{shard_id}.parquet")

    def write(self, shard_id: str, features: Mapping[str, Features]) -> list[dict[str, Any]]:
        """Stores features under a shard's id, exactly once however many writers try.

        Args:
            shard_id: of a planned shard.
            features: image key -> Features with tokens (H*W, C) on any device; cast to the dtype the fingerprint tells.
                May lack keys of the plan (images that cannot be read). An empty one commits nothing: a receipt of
                nothing would keep these images from being planned again once they can be read.

        Returns:
            The receipt rows committed under this id: key, file, offset, length, grid, dtype, channels, xxh3, loss. They
            are another writer's if it was faster.

        Raises:
            StoreError: the disk is full or refuses; nothing that was committed is lost.
            ValueError: tokens that do not fit their grid, or that the dtype cannot hold.
        """
        if not features:
            return []
        return self._write(shard_id, lambda: self._encode(features))

    def write_encoded(self, shard_id: str, rows: Sequence[tuple[Mapping[str, Any], Any]]) -> list[dict[str, Any]]:
        """`write` of rows as another partition of this fingerprint, or a damaged shard, has them: receipt row and bytes."""
        return self._write(shard_id, lambda: rows) if rows else []

    def _write(
        self, shard_id: str, made: Callable[[], Sequence[tuple[Mapping[str, Any], Any]]]
    ) -> list[dict[str, Any]]:
        try:
            table = None if self.committed(shard_id) else self._commit(shard_id, made())
            table = table or self._receipt(shard_id)
        except _DamagedReceipt as error:
            raise StoreError(f"{error}: run `mova store verify`, then the same command again") from None
        with self._lock:
            self._unsorted[shard_id] = table
        return table.to_pylist()

    def make_folders(self) -> None:
        """Makes the partition's folders, which tools that copy a store may have left out where they were empty."""
        self.storage.mkdir("shards", "receipts", "index", "snapshots")

    def _commit(self, shard_id: str, made: Sequence[tuple[Mapping[str, Any], Any]]) -> pa.Table | None:
        """Puts shard and receipt down; the receipt if this writer won."""
        name = f"{shard_id}-{uuid.uuid4().hex[:12]}.safetensors"
        receipt, pieces = self._lay_out(name, made)
        lost = asked = won = False
        with writing(self.store):
            try:
                self.make_folders()
                self.storage.put(f"shards/{name}", pieces)
                asked = True
                won = self.storage.put_if_absent(f"receipts/{shard_id}.parquet", receipt)
                lost = not won
            finally:
                # Ask the disk who won: an interrupt, or a reply that NFS lost, can hide that the link was made.
                with suppress(OSError, ValueError):
                    winner = name if won else self._winner(shard_id)
                    unheard = lost or (asked and not self.storage.failed_write_is_final)  # `gc` knows later
                    if winner != name and (winner or not unheard):
                        self.storage.delete(f"shards/{name}")
        return self._parsed(shard_id, receipt) if won else None

    def _winner(self, shard_id: str) -> str | None:
        """The shard file that a receipt names."""
        try:
            return str(self._receipt(shard_id)["file"][0])
        except FileNotFoundError:
            return None

    def _encode(self, features: Mapping[str, Features]) -> Sequence[tuple[Mapping[str, Any], Any]]:
        """Receipt row, but for where it will lie, and bytes of each feature."""
        binary_keys(list(features))
        made: list[tuple[Mapping[str, Any], Any]] = []
        for key, (tokens, grid) in features.items():
            if tokens.ndim != 2 or tokens.shape[0] != grid[0] * grid[1] or not tokens.numel():
                raise ValueError(
                    f"{self.expert} feature of image {key}: {tuple(tokens.shape)} is no (H*W, C), grid {grid}"
                )
            try:
                row, loss = self._codec.encode(tokens)
            except ValueError as error:
                raise ValueError(f"{self.expert} feature of image {key}: {error}") from None
            told = {
                "key": key.lower(),
                "grid": [int(side) for side in grid],
                "dtype": self._codec.dtype,
                "channels": tokens.shape[1],
                "xxh3": checksum(row),
                "loss": loss,
            }
            made.append((told, row))
        return made

    def _lay_out(self, name: str, made: Sequence[tuple[Mapping[str, Any], Any]]) -> tuple[pa.Buffer, list[Any]]:
        """A shard's receipt, and its bytes piece by piece."""
        rows = [{**told, "file": name, "length": len(row)} for told, row in made]
        offset = len(self._header(rows, 0))
        for row in rows:
            row["offset"] = offset
            offset += row["length"] + _gap(row["length"])
        receipt = parquet(pa.Table.from_pylist(rows, schema=RECEIPT))
        padded = (piece for _, row in made for piece in (row, bytes(_gap(len(row)))))
        return receipt, [self._header(rows, checksum(receipt)), *padded]

    def _header(self, rows: Sequence[Mapping[str, Any]], receipt: int) -> bytes:
        """A shard's first bytes: safetensors' header, padded to a page. It allows no holes, so gaps are tensors too.

        All of it follows from the receipt: its rows and the xxh3 of its file. So each vouches for the other.
        """
        told = {"expert": self.expert, "fingerprint": self.fingerprint, "receipt": f"{receipt:016x}"}
        entries: dict[str, Any] = {"__metadata__": told}
        at = 0
        for number, row in enumerate(rows):
            told[row["key"]] = f"{row['xxh3']:016x}"
            tensors = CODECS[row["dtype"]].tensors(row["key"], row["grid"], row["channels"])
            if gap := _gap(row["length"]):
                tensors[f"pad.{number}"] = ("U8", [gap], gap)
            for name, (dtype, shape, size) in tensors.items():
                entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
                at += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * _gap(8 + len(text))
        return len(text).to_bytes(8, "little") + text

    def snapshot(self) -> int:
        """Merges receipts into the next index and publishes it; returns the latest snapshot's number, 0 for none."""
        with self._lock, writing(self.store):
            self.make_folders()
            self._listed = 0
            self.refresh()
            index, newer = self._catalog()
            if not len(newer) and not index.filtered:
                return self._number
            merged = ReceiptIndex.of([], [index, newer])
            folders = (("snapshots", ".json"), ("index", ".arrow"))
            number = 1 + max([0, *(held for name, suffix in folders for held in self._numbers(name, suffix))])
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, merged.table.schema) as writer:
                writer.write_table(merged.table)
            content = sink.getvalue()
            # Else another process is publishing its own: newer receipts are read anyway.
            if self.storage.put_if_absent(f"index/{number}.arrow", content):
                self.storage.put_if_absent(f"snapshots/{number}.json", snapshot_json(f"{number}.arrow", content))
            self._listed = 0
            self.refresh()
            return self._number

    # Reading

    def read(self, keys: Sequence[str], out: Tensor | None = None, verify: bool = True) -> list[Features]:
        """The features of these keys, read in parallel.

        Args:
            keys: image keys.
            out: uint8 tensor to read into: 1-D, contiguous, on the CPU, pinned if you copy to a GPU. The features are
                views of it, each from the next multiple of 64 bytes on, valid until it is read into again. By default they
                have memory of their own: from a local store large ones are the page cache itself, not copied.
            verify: check the xxh3 of each row.

        Returns:
            Features with tokens (H*W, C) in the dtype stored; float32 where that has scales.

        Raises:
            MissingFeatures: a key that is not stored.
            StoreError: a damaged row.
            ValueError: an `out` that cannot take them; says how much they are.
        """
        from mova_core.experts import Features

        rows, parts = self._read(keys, out, verify)
        return [
            Features(CODECS[row.dtype].decode(part, row.channels), row.grid)
            for row, part in zip(rows, parts, strict=True)
        ]

    def read_rows(self, keys: Sequence[str]) -> list[tuple[dict[str, Any], np.ndarray]]:
        """The same as they are stored, verified: what their receipt tells, and their bytes; for `write_encoded`."""
        rows, parts = self._read(keys, None, True)
        return [({"key": key, **row._asdict()}, part) for key, row, part in zip(keys, rows, parts, strict=True)]

    def _read(
        self, keys: Sequence[str], out: Tensor | None, verify: bool
    ) -> tuple[list[FeatureLocation], list[np.ndarray]]:
        """Where the features lie, and their bytes."""
        for again in (True, False):
            rows = self._find(keys)
            into = [None] * len(rows) if out is None and self.storage.mapped else _cut(rows, out)
            try:
                return rows, self._load(rows, into, verify)
            except _Damaged as error:
                if again and isinstance(error.__cause__, FileNotFoundError):  # withdrawn, its sound rows moved
                    self.refresh()
                    continue
                raise StoreError(
                    f"store {self.store}: the {self.expert} feature of image {keys[error.at]} in "
                    f"shards/{rows[error.at].file} is damaged ({error}): run `mova store verify`, then `mova precompute`"
                ) from None
        raise AssertionError

    def _find(self, keys: Sequence[str]) -> list[FeatureLocation]:
        """Where the feature of each key lies."""
        binary = binary_keys(keys)
        for again in (True, False):
            index, newer = self._catalog()
            at = index.find(binary)
            if len(at) and min(at.tolist()) >= 0:
                return index.stored(at)
            there = at >= 0
            found = dict(zip(np.flatnonzero(there).tolist(), index.stored(at[there]), strict=True))
            at = newer.find(binary)
            there = at >= 0
            found.update(zip(np.flatnonzero(there).tolist(), newer.stored(at[there]), strict=True))
            if len(found) == len(keys):
                return [found[number] for number in range(len(keys))]
            if again:
                self.refresh()
        missing = dict.fromkeys(key for number, key in enumerate(keys) if number not in found)
        raise MissingFeatures.of(self.store, [(key, self.expert) for key in missing])

    def _load(
        self, rows: Sequence[FeatureLocation], into: Sequence[np.ndarray | None], verify: bool
    ) -> list[np.ndarray]:
        """The bytes of each row, in the memory it is to go `into` if any; raises `_Damaged` for the first it cannot get."""
        place = self.storage
        if len(rows) > 1:
            place.prefetch([(f"shards/{row.file}", row.offset, row.length) for row in rows])
        runs = self._runs(rows)
        touched = sum(row.length for row, part in zip(rows, into, strict=True) if verify or part is not None)
        alone = place.mapped and touched < _SMALL  # another thread would not be awake before it is done
        share = len(runs) if alone else -(-len(runs) // place.readers)
        loaded: list[Any] = list(into)
        tasks = [
            partial(self._load_runs, rows, loaded, runs[at : at + share], verify)
            for at in range(0, len(runs), share or 1)
        ]
        waiting = [(task, _readers(os.getpid(), place.readers).submit(task)) for task in tasks[1:]]
        try:
            for task in tasks[:1]:
                task()
            for task, reading in reversed(waiting):
                if reading.cancel():  # no thread was free for it so far
                    task()
                else:
                    reading.result()
        finally:
            if waiting:  # else they would go on writing to `into`
                wait([reading for _, reading in waiting if not reading.cancel()])
        return loaded

    def _runs(self, rows: Sequence[FeatureLocation]) -> list[list[int]]:
        """The rows that are read together."""
        gap, most = self.storage.coalesce_gap or (-1, 0)
        runs: list[list[int]] = []
        file, begin, end = "", 0, 0
        for at in sorted(range(len(rows)), key=lambda at: rows[at][:2]):
            row = rows[at]
            if row.file == file and 0 <= row.offset - end <= gap and row.offset + row.length - begin <= most:
                runs[-1].append(at)
            else:
                runs.append([at])
                file, begin = row.file, row.offset
            end = row.offset + row.length
        return runs

    def _load_runs(
        self, rows: Sequence[FeatureLocation], loaded: list[Any], runs: Sequence[Sequence[int]], verify: bool
    ) -> None:
        for run in runs:
            file, begin = rows[run[0]][:2]
            end = rows[run[-1]].offset + rows[run[-1]].length
            try:
                content = self.storage.read_range(f"shards/{file}", begin, end - begin, own=loaded[run[0]] is None)
            except (OSError, EOFError) as error:
                raise _Damaged(error, run[0]) from error
            for at in run:
                row = rows[at]
                part = content[row.offset - begin : row.offset - begin + row.length]
                if verify and checksum(part) != row.xxh3:
                    raise _Damaged(ValueError(_CHANGED), at)
                if loaded[at] is None:
                    loaded[at] = part
                else:
                    loaded[at][:] = part

    # Keeping

    def verify(self, progress: Callable[[int], object] | None = None) -> Iterator[dict[str, str]]:
        """See `FeatureStore.verify`."""
        from mova_core.experts import fingerprint

        def damage(file: str, reason: str, key: str = "") -> dict[str, str]:
            return {"expert": self.expert, "fingerprint": self.fingerprint, "shard": file, "key": key, "reason": reason}

        whole = False
        with suppress(OSError, ValueError):
            whole = self.storage.read("expert.json", anew=True) == expert_json(self.description)
        if not whole or fingerprint(self.description) != self.fingerprint:
            yield damage("expert.json", "it does not tell what the fingerprint covers")
        self._listed = 0
        self.refresh()
        named: set[str] = set()
        receipts = self.storage.list_files("receipts", ".parquet")
        for file, count, found in self._at_once(self._inspect, receipts, width=_VERIFIED):
            named.add(file)
            for name, key, reason in found:
                yield damage(name, reason, key)
            if progress:
                progress(count)
        for number in self._numbers("snapshots", ".json"):
            whole = False
            with suppress(OSError):
                content = self.storage.read(f"index/{number}.arrow", anew=True)
                told = self.storage.read(f"snapshots/{number}.json", anew=True)
                whole = told == snapshot_json(f"{number}.arrow", content)
            if not whole:
                yield damage(f"index/{number}.arrow", "it is not what its snapshot tells")
        if self._index.files() - named:
            yield damage(f"index/{self._number}.arrow", "it names shards that no receipt names")

    def _inspect(self, name: str) -> tuple[str, int, list[tuple[str, str, str]]]:
        """The shard file of a receipt, its features, and (file, key, reason) of what is damaged in either."""
        try:
            receipt = self.storage.read(f"receipts/{name}", anew=True)
            rows = self._parsed(name.removesuffix(".parquet"), receipt).sort_by("offset").to_pylist()
        except FileNotFoundError:  # withdrawn since the listing
            return "", 0, []
        except (OSError, ValueError) as error:
            return "", 0, [(f"receipts/{name}", "", str(error))]
        file = rows[0]["file"]
        found: list[tuple[str, str]] = []
        content, gone = memoryview(b""), ""
        try:
            content = memoryview(self.storage.read(f"shards/{file}", anew=True))
        except OSError as error:
            gone = _what_is_wrong(error)

        def differs(offset: int, size: int, xxh3: int) -> str:
            part = content[offset : offset + size]
            return gone or (
                "the file ends before it" if len(part) < size else "" if checksum(part) == xxh3 else _CHANGED
            )

        header = self._header(rows, checksum(receipt))
        if reason := differs(0, len(header), checksum(header)):
            found.append(("", f"its header, or receipts/{name}: {reason}"))
        end = len(header)
        for row in rows:
            end, gap = row["offset"] + row["length"], _gap(row["length"])
            if reason := differs(row["offset"], row["length"], row["xxh3"]):
                found.append((row["key"], reason))
            elif reason := differs(end, gap, checksum(bytes(gap))):
                found.append((row["key"], f"padding after it: {reason}"))
            end += gap
        if len(content) > end:
            found.append(("", "it has more bytes than its receipt tells"))
        return file, len(rows), [(f"shards/{file}", key, reason) for key, reason in found]

    def withdraw(self, damaged: Iterable[Mapping[str, str]]) -> int:
        """See `FeatureStore.withdraw`."""
        with self._lock, writing(self.store):
            known, indexed = self.keys(), self._number
            bad: dict[str, set[str]] = {}  # shard id -> its damaged keys
            for damage in damaged:
                folder, _, name = damage["shard"].rpartition("/")
                if folder in ("shards", "receipts"):
                    bad.setdefault(name.partition(".")[0].partition("-")[0], set()).add(damage["key"])
                elif not folder:
                    self.storage.delete(name)
            for number in self._numbers("snapshots", ".json"):  # first: they merge the receipts
                self.storage.delete(f"snapshots/{number}.json")
            for shard_id, keys in bad.items():
                known = np.union1d(known, binary_keys(self._salvage(shard_id, keys)))
                self.storage.delete(f"receipts/{shard_id}.parquet")
            self._listed = 0
            self.refresh()
            if indexed:
                self.snapshot()
            return len(np.setdiff1d(known, self.keys()))

    def _salvage(self, shard_id: str, bad: set[str]) -> list[str]:
        """Commits the sound rows of a damaged shard anew, where the receipt is damaged too as the shard's header tells.

        Returns:
            The keys of all its rows, as far as that can be told.
        """
        try:
            told = self._receipt(shard_id).to_pylist()
        except (OSError, ValueError):
            files = [
                name for name in self.storage.list_files("shards", ".safetensors") if name.startswith(f"{shard_id}-")
            ]
            told = [row for name in files for row in self.rows_from_header(name)]
        sound: dict[str, tuple[dict[str, Any], Any]] = {}
        for row in told:
            with suppress(OSError, EOFError):
                part = self.storage.read_range(f"shards/{row['file']}", row["offset"], row["length"])
                if row["key"] not in bad and checksum(part) == row["xxh3"]:
                    sound[row["key"]] = (row, part)
        # A name of its own: that of the same keys may be the damaged shard's.
        name = hashlib.sha256(f"{self.fingerprint}\nsalvaged from {shard_id}\n{sorted(sound)}".encode()).hexdigest()
        self.write_encoded(name[:32], list(sound.values()))
        return [row["key"] for row in told]

    def rows_from_header(self, file: str) -> list[dict[str, Any]]:
        """What the header of a shard tells of its rows; nothing where it is damaged."""
        try:
            size = int.from_bytes(self.storage.read_range(f"shards/{file}", 0, 8), "little")
            entries = json.loads(bytes(self.storage.read_range(f"shards/{file}", 8, size)))
            rows = []
            for key, mark in entries.pop("__metadata__").items():
                if len(key) == 64:
                    tokens, first = entries[key], entries.get(f"{key}.scale", entries[key])
                    begin, end = first["data_offsets"][0], tokens["data_offsets"][1]
                    dtype = next(codec.dtype for codec in CODECS.values() if codec.container == tokens["dtype"])
                    rows.append(
                        {
                            "key": key,
                            "file": file,
                            "offset": 8 + size + begin,
                            "length": end - begin,
                            "grid": tokens["shape"][:2],
                            "dtype": dtype,
                            "channels": tokens["shape"][2],
                            "xxh3": int(mark, 16),
                            "loss": None,  # only the receipt told it
                        }
                    )
            binary_keys([row["key"] for row in rows])
            return rows
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            StopIteration,
            MemoryError,
        ):
            return []

    def unreferenced_files(self) -> list[str]:
        """Shards that no receipt names, unless they are a running writer's, and indexes that a newer one supersedes."""
        shards = self.storage.list_files("shards", ".safetensors")
        self._listed = 0
        self.refresh()  # after that listing: what was committed before it is known
        index, newer = self._catalog()
        named, covered = index.files() | newer.files(), index.shards() | newer.shards()
        dead = []
        for name in shards:
            shard_id = name.partition("-")[0]
            # A receipt that is there and not covered is damaged, and may name this file.
            if name not in named and (shard_id in covered or not self.committed(shard_id)):
                dead.append(f"shards/{name}")
        for folder, suffix in (("snapshots", ".json"), ("index", ".arrow")):
            dead += [f"{folder}/{number}{suffix}" for number in self._numbers(folder, suffix) if number < self._number]
        return dead

    def _numbers(self, folder: str, suffix: str) -> list[int]:
        """The numbers of the published files <n><suffix>, ascending."""
        stems = (name.removesuffix(suffix) for name in self.storage.list_files(folder, suffix))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _receipt(self, shard_id: str) -> pa.Table:
        """A receipt; FileNotFoundError where there is none, _DamagedReceipt where it cannot be read."""
        return self._parsed(shard_id, self.storage.read(f"receipts/{shard_id}.parquet"))

    def _parsed(self, shard_id: str, content: Any) -> pa.Table:
        try:
            file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            table = file.read(use_threads=False).select(RECEIPT.names).cast(RECEIPT)
            reason = "" if len(table) else "no rows"
        except (OSError, KeyError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
        if reason:
            raise _DamagedReceipt(f"receipt {self.location}/receipts/{shard_id}.parquet is damaged ({reason})")
        return table

    def _at_once(self, act: Callable[[Any], Any], items: Sequence[Any], width: int | None = None) -> Iterator[Any]:
        """What `act` makes of the items, in order, by several threads."""
        if len(items) < 2:
            yield from map(act, items)
            return
        readers = _readers(os.getpid(), self.storage.readers)
        left = iter(items)
        waiting = deque(readers.submit(act, item) for item in islice(left, width or 2 * self.storage.readers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(readers.submit(act, item) for item in islice(left, 1))
            yield result


def compare(here: FeaturePartition | None, there: FeaturePartition | None) -> dict[str, Any]:
    """See `FeatureStore.diff`; of two partitions, of which one may not be there."""
    mine, others = (np.empty(0, "S32") if partition is None else partition.keys() for partition in (here, there))
    both = np.intersect1d(mine, others, assume_unique=True)
    differ: list[str] = []
    for block in range(0, len(both), _BLOCK):
        assert here is not None and there is not None
        keys = hex_keys(both[block : block + _BLOCK])
        rows = zip(keys, here._find(keys), there._find(keys), strict=True)
        differ += [key for key, one, other in rows if one[2:7] != other[2:7]]  # length to xxh3: wherever it lies
    return {
        "same": len(both) - len(differ),
        "only_here": hex_keys(np.setdiff1d(mine, others, assume_unique=True)),
        "only_there": hex_keys(np.setdiff1d(others, mine, assume_unique=True)),
        "differ": differ,
    }


class _DamagedReceipt(ValueError):
    """A receipt that cannot be read."""


class _Damaged(Exception):
    """What is wrong with a row, and which of those asked for it is."""

    def __init__(self, error: Exception, at: int):
        super().__init__(_what_is_wrong(error))
        self.at = at


def _what_is_wrong(error: Exception) -> str:
    """What the place says about a file or a part of it, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    if isinstance(error, EOFError):
        return "the file ends before it"
    return f"reading gives: {error.strerror or error}" if isinstance(error, OSError) else str(error)


@cache
def _readers(process: int, threads: int) -> ThreadPoolExecutor:
    """The reading threads of a process: they do not survive a fork, so a DataLoader worker starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mova-store")


def _cut(rows: Sequence[FeatureLocation], out: Tensor | None) -> list[np.ndarray]:
    """Memory for each row: of `out`, or new, which numpy puts on huge pages where it is large: half the time of a copy."""
    starts = [0, *accumulate(row.length + -row.length % 64 for row in rows)]
    if out is None:
        memory = np.empty(starts[-1] + 63, np.uint8)
        memory = memory[-memory.ctypes.data % 64 :]
    elif str(out.dtype) == "torch.uint8" and out.ndim == 1 and out.is_contiguous() and len(out) >= starts[-1]:
        memory = out.numpy()
    else:
        raise ValueError(f"out must be a contiguous 1-D uint8 tensor of at least {starts[-1]} bytes")
    return [memory[at : at + row.length] for row, at in zip(rows, starts, strict=False)]


def expert_json(description: Mapping[str, Any]) -> bytes:
    """The content of expert.json."""
    return json.dumps(description, sort_keys=True, indent=1).encode()


def snapshot_json(index: str, content: Any) -> bytes:
    """The content of a snapshot: which index, and how to know that it is whole."""
    told = {"index": index, "index_bytes": len(content), "index_xxh3": f"{checksum(content):016x}"}
    return json.dumps(told).encode()


def _gap(size: int) -> int:
    """Bytes to the next page."""
    return -size % PAGE

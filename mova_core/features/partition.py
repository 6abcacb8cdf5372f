"""A partition: the features of one expert with one fingerprint, as files.

docs/store_format.md describes the files and the commit protocol. The bytes of a shard are in `shard_format`, the parallel
read path in `reader`, checking and repair in `repair`.

Shapes: H x W the expert's native grid, N = H*W tokens, C channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mova_core.features.codec import CODECS, checksum
from mova_core.features.errors import DamagedFeature, DamagedReceipt, MissingFeatures, reading
from mova_core.features.index import (
    SORTED_BLOCK,
    FeatureLocation,
    ReceiptIndex,
    binary_keys,
    hex_keys,
    index_file,
    index_rows,
    new_keys,
    parse_receipt,
    sorting,
)
from mova_core.features.reader import in_parallel, read_locations
from mova_core.features.shard_format import EncodedFeature, encode_features, lay_out
from mova_core.features.storage import StorageBackend, StoreError, open_storage, writing

if TYPE_CHECKING:
    from torch import Tensor

    from mova_core.experts import Features

logger = logging.getLogger(__name__)

LOOKUP_BLOCK = 4096  # features whose locations are held in memory at once when all of a partition are visited


class Shard(NamedTuple):
    """A piece of work; the same keys for the same fingerprint always have the same id."""

    id: str
    keys: list[str]


class FeaturePartition:
    """The features of one expert with one fingerprint. Picklable; any number of threads may read and write.

    Args:
        location: of the partition, <store>/<expert>/<fingerprint>.
        damaged: open it also where expert.json is damaged, to check and repair the partition.

    Attributes:
        location, store: of the partition, and of the store it is in.
        expert, fingerprint: its address.
        description: all that the fingerprint covers, as `VisionExpert.describe` returned it.

    Raises:
        StoreError: expert.json is damaged, or the storage cannot be read.
    """

    def __init__(self, location: str | os.PathLike[str], damaged: bool = False):
        self.storage: StorageBackend = open_storage(location)
        self.location = self.storage.location
        self.store, self.expert, self.fingerprint = self.location.rsplit("/", 2)
        self.description: dict[str, Any] = {}
        try:
            with reading(self.store), suppress(FileNotFoundError):
                description = json.loads(self.storage.read("expert.json"))
                self._codec = CODECS[description["dtype"]]
                self.description = description
        except (ValueError, KeyError, TypeError):
            pass
        if not self.description and not damaged:
            raise StoreError(
                f"{self.location}/expert.json is damaged: run `mova store verify`, then `mova precompute` "
                f"with --experts {self.expert}, which writes it anew"
            )
        self._lock = threading.RLock()  # guards the four fields below
        self._snapshot_number = 0  # 0: no snapshot is loaded
        self._snapshot = ReceiptIndex.empty()
        self._recent = ReceiptIndex.empty()  # receipts that the snapshot does not cover
        # Receipts not yet merged into `_recent`: merging sorts, and a writer that never looks anything up need not.
        self._pending_receipts: dict[str, pa.Table] = {}
        self._reported: set[str] = set()  # damaged receipts and snapshots that a warning has named
        self.refresh()

    @classmethod
    def open_or_create(cls, location: str, description: Mapping[str, Any]) -> FeaturePartition:
        """The partition at a location; created if there is none.

        Raises:
            StoreError: its expert.json has another description, or the storage refuses.
        """
        storage, content = open_storage(location), expert_json(description)
        with writing(location.rsplit("/", 2)[0]):
            storage.mkdir()
            storage.put_if_absent("expert.json", content)
            partition = cls(location)
            partition.make_folders()
        if partition.description != json.loads(content):
            raise StoreError(
                f"{location}/expert.json does not describe this expert: run `mova store verify`, then try again"
            )
        return partition

    def __reduce__(self) -> tuple[Any, ...]:
        return FeaturePartition, (self.location,)

    def __repr__(self) -> str:
        return f"FeaturePartition({self.location!r})"

    # Catalog: which features are stored

    def __len__(self) -> int:
        snapshot, recent = self.catalog()
        return len(snapshot.unique_keys()) + int((snapshot.find(recent.unique_keys()) < 0).sum())

    def keys(self) -> np.ndarray:
        """The keys of all stored features, each once, sorted: bytes, dtype S32."""
        snapshot, recent = self.catalog()
        recent_keys = recent.unique_keys()
        return np.sort(np.concatenate([snapshot.unique_keys(), recent_keys[snapshot.find(recent_keys) < 0]]))

    def chunks(self, keys: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Stored keys (dtype S32) in parts whose features take about `size` bytes."""
        begin = total = 0
        for block in range(0, len(keys), LOOKUP_BLOCK):
            for at, location in enumerate(self.locate(hex_keys(keys[block : block + LOOKUP_BLOCK])), block):
                if at > begin and total + location.length > size:
                    yield keys[begin:at]
                    begin, total = at, 0
                total += location.length
        if begin < len(keys):
            yield keys[begin:]

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Which of the keys are stored, as of the last `refresh` or `write` of this object: bool, one per key."""
        binary = binary_keys(keys)
        snapshot, recent = self.catalog()
        return (snapshot.find(binary) >= 0) | (recent.find(binary) >= 0)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys that are not stored, in order. Refreshes before it reports any key as missing."""
        stored = self.has(keys)
        if not stored.all():
            self.refresh()
            stored = self.has(keys)
        return [keys[at] for at in np.flatnonzero(~stored).tolist()]

    def missing_positions(self, keys: np.ndarray) -> np.ndarray:
        """The positions of keys that are not stored, the first of each key, ascending. Refreshes first.

        Args:
            keys: image keys as bytes, dtype S32. 10 million take seconds and 30 bytes each.
        """
        self.refresh()
        snapshot, recent = self.catalog()
        order = sorting(keys)
        order = order[new_keys(keys, order)]
        missing = [order[:0]]
        for start in range(0, len(order), SORTED_BLOCK):
            positions = order[start : start + SORTED_BLOCK]
            block = keys[positions]
            missing.append(positions[(snapshot.find(block) < 0) & (recent.find(block) < 0)])
        return np.sort(np.concatenate(missing))

    def locate(self, keys: Sequence[str]) -> list[FeatureLocation]:
        """Where the feature of each key lies.

        Raises:
            MissingFeatures: a key that is not stored, also after a refresh.
        """
        binary = binary_keys(keys)
        for attempt in range(2):
            snapshot, recent = self.catalog()
            positions = snapshot.find(binary)
            if len(positions) and min(positions.tolist()) >= 0:
                return snapshot.locations(positions)
            located: dict[int, FeatureLocation] = {}  # position in `keys` -> location
            for index in (snapshot, recent):
                positions = index.find(binary)
                stored = positions >= 0
                located.update(zip(np.flatnonzero(stored).tolist(), index.locations(positions[stored]), strict=True))
            if len(located) == len(keys):
                return [located[at] for at in range(len(keys))]
            if attempt == 0:
                self.refresh()
        missing = dict.fromkeys(key for at, key in enumerate(keys) if at not in located)
        raise MissingFeatures.of(self.store, [(key, self.expert) for key in missing])

    def refresh(self) -> None:
        """Brings the catalog up to the storage: receipts committed or withdrawn, and snapshots published, since.

        Costs one listing of receipts/ (1.2 ms for 1,000 receipts and 10 ms for 10,000 on a local disk) and one of
        snapshots/. A receipt whose read fails is read again by the next refresh.

        Raises:
            StoreError: the storage cannot be read.
        """
        with self._lock, reading(self.store):
            names = self.storage.list_files("receipts", ".parquet")
            receipts = {name.removesuffix(".parquet") for name in names}
            self._load_snapshot()
            self._snapshot = self._snapshot.filter_shards(receipts)
            self._recent = self._recent.filter_shards(receipts - self._snapshot.shards)
            unmerged = receipts - self._snapshot.shards - self._recent.shards
            self._pending_receipts = {
                shard_id: table for shard_id, table in self._pending_receipts.items() if shard_id in unmerged
            }
            unread = sorted(unmerged - self._pending_receipts.keys())
            for shard_id, table in zip(unread, in_parallel(self.storage, self._read_if_sound, unread), strict=True):
                if table is not None:
                    self._pending_receipts[shard_id] = table

    def _read_if_sound(self, shard_id: str) -> pa.Table | None:
        """A receipt as the index has it; None where it is damaged, or was withdrawn since the listing."""
        try:
            return index_rows(self.receipt(shard_id))
        except FileNotFoundError:
            return None
        except DamagedReceipt as error:
            if shard_id not in self._reported:
                self._reported.add(shard_id)
                logger.warning("%s, its features are not seen: run `mova store verify`", error)
            return None

    def catalog(self) -> tuple[ReceiptIndex, ReceiptIndex]:
        """The index of the latest snapshot, and that of all receipts which it does not cover."""
        with self._lock:
            if self._pending_receipts:
                tables = [self._recent.table, *self._pending_receipts.values()]
                self._pending_receipts = {}  # `merged` frees them column by column
                self._recent = ReceiptIndex.merged(tables)
            return self._snapshot, self._recent

    def _load_snapshot(self) -> None:
        """Maps the index of the latest snapshot that is whole; where there is none, every receipt is read."""
        for number in reversed(self.numbers("snapshots", ".json")):
            if number == self._snapshot_number:
                return
            name = f"snapshots/{number}.json"
            if name in self._reported:
                continue
            try:
                snapshot = json.loads(self.storage.read(name))
                path = self.storage.local_copy(
                    f"index/{snapshot['index']}", snapshot["index_bytes"], snapshot["index_xxh3"]
                )
                self._snapshot, self._snapshot_number = ReceiptIndex.mapped(path), number
                return
            except OSError:  # superseded and deleted since the listing, or a read that the next refresh tries again
                continue
            except (ValueError, KeyError, TypeError, pa.ArrowException):
                self._reported.add(name)
                logger.warning(
                    "%s/%s or its index is damaged, older ones and receipts are read: run `mova store verify`",
                    self.location,
                    name,
                )
        self._snapshot, self._snapshot_number = ReceiptIndex.empty(), 0

    def numbers(self, folder: str, suffix: str) -> list[int]:
        """The numbers n of the published files <n><suffix> in a folder, ascending."""
        stems = (name.removesuffix(suffix) for name in self.storage.list_files(folder, suffix))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def receipt(self, shard_id: str) -> pa.Table:
        """The rows of a receipt, as `RECEIPT`.

        Raises:
            FileNotFoundError: there is no such receipt.
            DamagedReceipt: its bytes are no receipt.
        """
        name = f"receipts/{shard_id}.parquet"
        return parse_receipt(f"{self.location}/{name}", self.storage.read(name))

    def stat(self) -> dict[str, Any]:
        """Counts and sizes.

        Returns:
            features, bytes, shards, bytes_per_feature, loss and max_loss (mean and largest relative L2 error of storing in
            this dtype), dtype, grid, channels.
        """
        catalog = self.catalog()
        rows = sum(len(index) for index in catalog)
        size, loss = (sum(pc.sum(index.table[name]).as_py() or 0 for index in catalog) for name in ("length", "loss"))
        # Rows rebuilt from a shard's header have no loss: only the receipt recorded it.
        rows_with_loss = sum(pc.count(index.table["loss"]).as_py() for index in catalog)
        return {
            "features": len(self),
            "bytes": size,
            "shards": sum(len(index.shards) for index in catalog),
            "bytes_per_feature": size // rows if rows else 0,
            "loss": loss / rows_with_loss if rows_with_loss else 0.0,
            "max_loss": max(pc.max(index.table["loss"]).as_py() or 0.0 for index in catalog),
            **{name: self.description.get(name) for name in ("dtype", "grid", "channels")},
        }

    # Writing

    def shard_id(self, keys: Iterable[str] | np.ndarray) -> str:
        """The name of the work of computing these keys, hex or bytes (dtype S32), in any order."""
        text = np.sort(keys).tobytes().hex("\n", 32) if isinstance(keys, np.ndarray) else "\n".join(sorted(keys))
        return hashlib.sha256(f"{self.fingerprint}\n{text}".encode()).hexdigest()[:32]

    def plan(self, keys: Sequence[str], rows_per_shard: int) -> list[Shard]:
        """The work still to do: the keys not yet stored, each once, in the order given."""
        missing = [keys[at] for at in self.missing_positions(binary_keys(keys)).tolist()]
        chunks = (missing[at : at + rows_per_shard] for at in range(0, len(missing), rows_per_shard))
        return [Shard(self.shard_id(chunk), chunk) for chunk in chunks]

    def committed(self, shard_id: str) -> bool:
        """Whether that work is done.

        Raises:
            StoreError: the storage cannot be read.
        """
        with reading(self.store):
            return self.storage.exists(f"receipts/{shard_id}.parquet")

    def write(self, shard_id: str, features: Mapping[str, Features]) -> list[dict[str, Any]]:
        """Stores features under a shard's id, exactly once however many writers try.

        Args:
            shard_id: of a planned shard.
            features: image key -> Features with tokens (H*W, C) on any device; cast to the dtype of the partition. May lack
                keys of the plan (images that cannot be read). An empty mapping commits nothing, because an empty receipt
                would keep these images from being planned again once they can be read.

        Returns:
            The receipt rows committed under this id: key, file, offset, length, grid, dtype, channels, xxh3, loss. They
            are another writer's if that writer was faster.

        Raises:
            StoreError: the disk is full or refuses; every feature that was committed before is intact.
            ValueError: tokens that do not fit their grid, or that the dtype cannot hold.
        """
        if not features:
            return []
        return self._write(shard_id, lambda: encode_features(self.expert, self._codec, features))

    def write_encoded(self, shard_id: str, encoded: Sequence[EncodedFeature]) -> list[dict[str, Any]]:
        """`write` of features that are encoded already: another partition's with this fingerprint, or a damaged shard's."""
        return self._write(shard_id, lambda: encoded) if encoded else []

    def _write(self, shard_id: str, encode: Callable[[], Sequence[EncodedFeature]]) -> list[dict[str, Any]]:
        try:
            table = None if self.committed(shard_id) else self._commit(shard_id, encode())
            with reading(self.store):
                table = table or self.receipt(shard_id)
        except DamagedReceipt as error:
            raise StoreError(f"{error}: run `mova store verify`, then the same command again") from None
        with self._lock:
            self._pending_receipts[shard_id] = index_rows(table)
        return table.to_pylist()

    def make_folders(self) -> None:
        """Makes the partition's folders, which tools that copy a store may have left out where they were empty."""
        self.storage.mkdir("shards", "receipts", "index", "snapshots")

    def _commit(self, shard_id: str, encoded: Sequence[EncodedFeature]) -> pa.Table | None:
        """Writes the shard, then publishes the receipt. Returns the receipt's rows if this writer won, else None."""
        file = f"{shard_id}-{uuid.uuid4().hex[:12]}.safetensors"
        receipt, pieces = lay_out(self.expert, self.fingerprint, file, list(encoded))
        lost = attempted = won = False
        with writing(self.store):
            try:
                self.make_folders()
                self.storage.put(f"shards/{file}", pieces)
                attempted = True
                won = self.storage.put_if_absent(f"receipts/{shard_id}.parquet", receipt)
                lost = not won
            finally:
                # Read who won: an interrupt, or a reply that NFS lost, can hide that the receipt was published.
                with suppress(OSError, ValueError):
                    winner = file if won else self._winner(shard_id)
                    # On an object store a failed PUT may still take effect: then the shard stays, for `gc` to decide.
                    may_still_win = not lost and attempted and not self.storage.failed_write_is_final
                    if winner != file and (winner or not may_still_win):
                        self.storage.delete(f"shards/{file}")
        return parse_receipt(shard_id, receipt) if won else None

    def _winner(self, shard_id: str) -> str | None:
        """The shard file that the receipt names; None where there is no receipt."""
        try:
            return str(self.receipt(shard_id)["file"][0])
        except FileNotFoundError:
            return None

    def snapshot(self) -> int:
        """Merges receipts into the next index and publishes it; returns the latest snapshot's number, 0 for none.

        Raises:
            StoreError: the storage refuses to be read or written.
        """
        with self._lock, writing(self.store):
            self.make_folders()
            self.refresh()
            index, recent = self.catalog()
            if not len(recent) and not index.filtered:
                return self._snapshot_number
            merged = recent if len(recent) else index
            if len(recent) and len(index):
                merged = ReceiptIndex.merged([index.table, recent.table])
            taken = self.numbers("snapshots", ".json") + self.numbers("index", ".arrow")
            number = 1 + max(taken, default=0)
            content = index_file(merged)
            # If the number is taken, another process published this snapshot first. This one is not needed then, because
            # receipts that no snapshot covers are read one by one.
            if self.storage.put_if_absent(f"index/{number}.arrow", content):
                self.storage.put_if_absent(f"snapshots/{number}.json", snapshot_json(f"{number}.arrow", content))
            self.refresh()
            return self._snapshot_number

    @property
    def snapshot_number(self) -> int:
        """The number of the snapshot in use as of the last `refresh`; 0 for none."""
        return self._snapshot_number

    # Reading

    def read(self, keys: Sequence[str], out: Tensor | None = None, verify: bool = True) -> list[Features]:
        """The features of these keys, read in parallel.

        Args:
            keys: image keys.
            out: uint8 tensor to read into: 1-D, contiguous, on the CPU, pinned if you copy to a GPU. The features are
                views of `out`, each from the next multiple of 64 bytes on, valid until `out` is read into again. By default
                features have memory of their own: large ones of a local store are mapped from the page cache, not copied.
            verify: check the xxh3 of each feature.

        Returns:
            Features with tokens (H*W, C) in the stored dtype; float32 where that dtype has scales.

        Raises:
            MissingFeatures: a key that is not stored.
            StoreError: a damaged feature, or a storage that cannot be read.
            ValueError: an `out` that cannot take the features; the message says how many bytes they are.
        """
        from mova_core.experts import Features

        locations, contents = self._read(keys, out, verify)
        return [
            Features(CODECS[location.dtype].decode(content, location.channels), location.grid)
            for location, content in zip(locations, contents, strict=True)
        ]

    def read_encoded(self, keys: Sequence[str]) -> list[EncodedFeature]:
        """The features of these keys as they are stored, verified; for `write_encoded` of another partition."""
        locations, contents = self._read(keys, None, True)
        return [
            EncodedFeature({"key": key, **location._asdict()}, content)
            for key, location, content in zip(keys, locations, contents, strict=True)
        ]

    def _read(
        self, keys: Sequence[str], out: Tensor | None, verify: bool
    ) -> tuple[list[FeatureLocation], list[np.ndarray]]:
        """Where the features lie, and their bytes."""
        for attempt in range(2):
            locations = self.locate(keys)
            try:
                with reading(self.store):
                    return locations, read_locations(self.storage, locations, out, verify)
            except DamagedFeature as error:
                # A repair that ran meanwhile moves the sound features of a shard to a new one, and `gc` deletes the old.
                if attempt == 0 and isinstance(error.__cause__, FileNotFoundError):
                    self.refresh()
                    continue
                raise StoreError(
                    f"store {self.store}: the {self.expert} feature of image {keys[error.position]} in "
                    f"shards/{locations[error.position].file} is damaged ({error}): run `mova store verify`, then "
                    f"`mova precompute`"
                ) from None
        raise AssertionError("unreachable")


def expert_json(description: Mapping[str, Any]) -> bytes:
    """The content of expert.json."""
    return json.dumps(description, sort_keys=True, indent=1).encode()


def snapshot_json(index: str, content: Any) -> bytes:
    """The content of a snapshot: the name of its index file, and its size and checksum, by which readers know it is whole."""
    snapshot = {"index": index, "index_bytes": len(content), "index_xxh3": f"{checksum(content):016x}"}
    return json.dumps(snapshot).encode()

"""Checking and repair of a partition: which bytes are damaged, what to withdraw, which files nothing refers to.

Damage is found by `verify`, which reads every byte from the disk and changes nothing. `withdraw` takes its findings: it
commits the sound features of a damaged shard anew, then deletes the receipt, so that the next precompute computes the
others again. `unreferenced_files` is what `FeatureStore.gc` may delete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

from mova_core.features.codec import checksum, named_by
from mova_core.features.errors import DamagedReceipt, damage_in_words, is_lost, reading
from mova_core.features.index import binary_keys, hex_keys, parse_receipt
from mova_core.features.partition import LOOKUP_BLOCK, FeaturePartition, expert_json, snapshot_json
from mova_core.features.reader import BYTES_CHANGED, in_parallel
from mova_core.features.shard_format import EncodedFeature, padding, rows_from_header, shard_header
from mova_core.features.storage import StorageBackend, writing
from mova_core.io.safetensors_header import read_header

_SHARDS_AT_ONCE = 4  # shards that `verify` holds in memory at once, of 64 to 256 MiB each

Finding = tuple[str, str, str]  # file relative to the partition, key of the damaged feature or "", reason


# Verify


def verify(partition: FeaturePartition, progress: Callable[[int], object] | None = None) -> Iterator[dict[str, str]]:
    """What is damaged in a partition; see `FeatureStore.verify`.

    Raises:
        StoreError: the storage cannot be read, for a reason that is not the files'.
    """
    for file, key, reason in _findings(partition, progress):
        yield {
            "expert": partition.expert,
            "fingerprint": partition.fingerprint,
            "shard": file,
            "key": key,
            "reason": reason,
        }


def findings_outside_partitions(
    storage: StorageBackend, store_json: bytes, folders: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """(file, reason) of what is damaged outside the partitions: store.json, and files that are named by their checksum.

    Args:
        storage: of the store.
        store_json: what store.json must be.
        folders: their files are named by their checksum.
    """
    store = storage.location
    if _read_anew(storage, store, "store.json") != store_json:
        yield "store.json", "it tells no format"
    for folder in folders:
        with reading(store):
            names = storage.list_files(folder, ".parquet")
        for name in names:
            content = _read_anew(storage, store, f"{folder}/{name}")
            if content is None and not storage.exists(f"{folder}/{name}"):  # deleted since the listing
                continue
            if content is None or not name.endswith(f"{named_by(content)}.parquet"):
                yield f"{folder}/{name}", BYTES_CHANGED


def _findings(partition: FeaturePartition, progress: Callable[[int], object] | None) -> Iterator[Finding]:
    from mova_core.experts import fingerprint

    storage = partition.storage
    content = _read_anew(storage, partition.store, "expert.json")
    whole = content is not None and content == expert_json(partition.description)
    if not whole or fingerprint(partition.description) != partition.fingerprint:
        yield "expert.json", "", "it does not tell what the fingerprint covers"
    partition.refresh()
    named_files: set[str] = set()
    with reading(partition.store):
        receipts = storage.list_files("receipts", ".parquet")
    for file, count, findings in in_parallel(storage, partial(_inspect, partition), receipts, width=_SHARDS_AT_ONCE):
        named_files.add(file)
        yield from findings
        if progress:
            progress(count)
    with reading(partition.store):
        numbers = partition.numbers("snapshots", ".json")
    for number in numbers:
        index = _read_anew(storage, partition.store, f"index/{number}.arrow")
        snapshot = _read_anew(storage, partition.store, f"snapshots/{number}.json")
        if index is None or snapshot != snapshot_json(f"{number}.arrow", index):
            yield f"index/{number}.arrow", "", "it is not what its snapshot tells"
    if partition.catalog()[0].files - named_files:
        yield f"index/{partition.snapshot_number}.arrow", "", "it names shards that no receipt names"


def _read_anew(storage: StorageBackend, store: str, name: str) -> bytes | None:
    """A file read from the disk, past the page cache; None where it is gone or the disk cannot read it any more."""
    with reading(store):
        try:
            return storage.read(name, anew=True)
        except OSError as error:
            if is_lost(error, store):
                return None
            raise


def _inspect(partition: FeaturePartition, name: str) -> tuple[str, int, list[Finding]]:
    """The shard file that a receipt names, how many features it has, and what is damaged in receipt or shard."""
    storage, store = partition.storage, partition.store
    try:
        with reading(store):
            try:
                receipt = storage.read(f"receipts/{name}", anew=True)
            except FileNotFoundError:  # withdrawn since the listing
                return "", 0, []
            except OSError as error:
                if not is_lost(error, store):
                    raise
                return "", 0, [(f"receipts/{name}", "", damage_in_words(error))]
        rows = parse_receipt(f"{partition.location}/receipts/{name}", receipt).sort_by("offset").to_pylist()
    except DamagedReceipt as error:
        return "", 0, [(f"receipts/{name}", "", str(error))]
    file = rows[0]["file"]
    content, lost = memoryview(b""), ""
    with reading(store):
        try:
            content = memoryview(storage.read(f"shards/{file}", anew=True))
        except OSError as error:
            if not is_lost(error, store):
                raise
            lost = damage_in_words(error)
    header = shard_header(partition.expert, partition.fingerprint, rows, checksum(receipt))
    findings = _compare_bytes(content, lost, header, rows, receipt_name=name)
    return file, len(rows), [(f"shards/{file}", key, reason) for key, reason in findings]


def _compare_bytes(
    content: memoryview, lost: str, header: bytes, rows: list[dict[str, Any]], receipt_name: str
) -> Iterator[tuple[str, str]]:
    """(key, reason) of every part of a shard that is not as its receipt has it: header, features, padding, the end.

    Args:
        content: the shard's bytes.
        lost: why there are none, if so.
        header: what the shard must begin with.
        rows: the receipt's rows, in file order.
        receipt_name: named in a reason.
    """

    def difference(offset: int, size: int, xxh3: int) -> str:
        part = content[offset : offset + size]
        if lost or len(part) < size:
            return lost or "the file ends before it"
        return "" if checksum(part) == xxh3 else BYTES_CHANGED

    if reason := difference(0, len(header), checksum(header)):
        yield "", f"its header, or receipts/{receipt_name}: {reason}"
    end = len(header)
    for row in rows:
        end, gap = row["offset"] + row["length"], padding(row["length"])
        if reason := difference(row["offset"], row["length"], row["xxh3"]):
            yield row["key"], reason
        elif reason := difference(end, gap, checksum(bytes(gap))):
            yield row["key"], f"padding after it: {reason}"
        end += gap
    if len(content) > end:
        yield "", "it has more bytes than its receipt tells"


# Withdraw


def withdraw(partition: FeaturePartition, damaged: Iterable[Mapping[str, str]]) -> int:
    """Withdraws what `verify` found; see `FeatureStore.withdraw`. Returns how many features are no longer stored."""
    storage = partition.storage
    with writing(partition.store):
        known = partition.keys()
        damaged_keys: dict[str, set[str]] = {}  # shard id -> its damaged keys
        for damage in damaged:
            folder, _, name = damage["shard"].rpartition("/")
            if folder in ("shards", "receipts"):
                shard_id = name.partition(".")[0].partition("-")[0]
                damaged_keys.setdefault(shard_id, set()).add(damage["key"])
            elif not folder:
                storage.delete(name)
        numbers = partition.numbers("snapshots", ".json")
        for number in numbers:  # before the receipts: a snapshot has their rows too
            storage.delete(f"snapshots/{number}.json")
        for shard_id, keys in damaged_keys.items():
            known = np.union1d(known, binary_keys(_salvage(partition, shard_id, keys)))
            storage.delete(f"receipts/{shard_id}.parquet")
        partition.refresh()
        if numbers:
            partition.snapshot()
        return len(np.setdiff1d(known, partition.keys()))


def _salvage(partition: FeaturePartition, shard_id: str, damaged_keys: set[str]) -> list[str]:
    """Commits the sound features of a damaged shard under a new id.

    Where the receipt is damaged too, its rows are taken from the shard's header.

    Returns:
        The keys of all the shard's features, as far as receipt or header still has them.
    """
    rows = _rows(partition, shard_id)
    sound: dict[str, EncodedFeature] = {}
    for row in rows:
        if row["key"] in damaged_keys:
            continue
        with _skip_lost(partition.store):
            content = partition.storage.read_range(f"shards/{row['file']}", row["offset"], row["length"])
            if checksum(content) == row["xxh3"]:
                sound[row["key"]] = EncodedFeature(row, content)
    # Not `partition.shard_id(sound)`: where no feature is lost, that is the damaged shard's own id.
    text = f"{partition.fingerprint}\nsalvaged from {shard_id}\n{sorted(sound)}"
    partition.write_encoded(hashlib.sha256(text.encode()).hexdigest()[:32], list(sound.values()))
    return [row["key"] for row in rows]


def _rows(partition: FeaturePartition, shard_id: str) -> list[dict[str, Any]]:
    """The receipt rows of a shard: from its receipt, or else from the headers of its files."""
    with _skip_lost(partition.store), suppress(DamagedReceipt):
        return partition.receipt(shard_id).to_pylist()
    rows = []
    for file in partition.storage.list_files("shards", ".safetensors"):
        if file.startswith(f"{shard_id}-"):
            with _skip_lost(partition.store), suppress(ValueError):
                header = read_header(partial(partition.storage.read_range, f"shards/{file}"))
                rows += rows_from_header(file, header)
    return rows


@contextmanager
def _skip_lost(store: str) -> Iterator[None]:
    """Skips a file that ends too early or is lost; an OSError for another reason is raised."""
    try:
        yield
    except EOFError:
        pass
    except OSError as error:
        if not is_lost(error, store):
            raise


# Files and differences


def unreferenced_files(partition: FeaturePartition) -> list[str]:
    """Shards that no receipt names, and indexes that a newer snapshot supersedes. A running writer's shard is among them."""
    shards = partition.storage.list_files("shards", ".safetensors")
    partition.refresh()  # after that listing: receipts of all shards in it that were committed are then known
    snapshot, recent = partition.catalog()
    named, covered = snapshot.files | recent.files, snapshot.shards | recent.shards
    unreferenced = []
    for file in shards:
        shard_id = file.partition("-")[0]
        # A receipt that exists and is not covered is damaged, and may name this file.
        if file not in named and (shard_id in covered or not partition.committed(shard_id)):
            unreferenced.append(f"shards/{file}")
    for folder, suffix in (("snapshots", ".json"), ("index", ".arrow")):
        unreferenced += [
            f"{folder}/{number}{suffix}"
            for number in partition.numbers(folder, suffix)
            if number < partition.snapshot_number
        ]
    return unreferenced


def compare(here: FeaturePartition | None, there: FeaturePartition | None) -> dict[str, Any]:
    """What two partitions have in common and where they differ; see `FeatureStore.diff`. None stands for an empty one."""
    keys_here, keys_there = (
        np.empty(0, "S32") if partition is None else partition.keys() for partition in (here, there)
    )
    shared = np.intersect1d(keys_here, keys_there, assume_unique=True)
    differ: list[str] = []
    for block in range(0, len(shared), LOOKUP_BLOCK):
        assert here is not None and there is not None
        keys = hex_keys(shared[block : block + LOOKUP_BLOCK])
        pairs = zip(keys, here.locate(keys), there.locate(keys), strict=True)
        # Length, grid, dtype, channels and xxh3 must agree; file and offset may differ.
        differ += [key for key, one, other in pairs if one[2:7] != other[2:7]]
    return {
        "same": len(shared) - len(differ),
        "only_here": hex_keys(np.setdiff1d(keys_here, keys_there, assume_unique=True)),
        "only_there": hex_keys(np.setdiff1d(keys_there, keys_here, assume_unique=True)),
        "differ": differ,
    }

"""The feature store: frozen experts' features on disk, addressed by image sha256 x expert x fingerprint.

    <store>/store.json                                  format version
    <store>/<expert>/<fingerprint>/                     a partition; new weights get a new partition, others stay unchanged
        expert.json                                     everything that the fingerprint covers
        shards/<shard>-<attempt>.safetensors            plain safetensors, sha256 -> [H, W, C], each at a 4 KiB boundary
        receipts/<shard>.parquet                        the commit record: one row per feature
        index/<n>.arrow  snapshots/<n>.json             merged receipts, sorted by key, memory-mapped by readers
    <store>/quarantine/<id>.parquet                     images that cannot be processed, each with the reason
    <store>/listings/<time>-<id>.parquet                images inspected by earlier runs; may be deleted, which costs time

A feature exists when a receipt names it. docs/store_format.md has every field, the commit protocol step by step, and what
a crash after each step leaves.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mova_core.features import repair
from mova_core.features.codec import CODECS, named_by
from mova_core.features.errors import MissingFeatures, reading
from mova_core.features.index import binary_keys, hex_keys, parquet
from mova_core.features.partition import FeaturePartition, Shard
from mova_core.features.source import wanted_by_expert
from mova_core.features.storage import StoreError, open_storage, writing

if TYPE_CHECKING:
    from mova_core.experts import Features
    from mova_core.images import ImageRef

__all__ = ["FeaturePartition", "FeatureStore", "MissingFeatures", "Shard", "StoreError"]

FORMAT = 1
_STORE = json.dumps({"format": FORMAT}).encode()
_QUARANTINE = pa.schema({name: pa.string() for name in ("image", "sha256", "reason", "expert", "time")})
_RESERVED = ("quarantine", "listings")  # folders of the store that no expert may have


class FeatureStore:
    """A folder of features: a `FeatureSource` that computes nothing. Picklable; any number of threads may read.

    Args:
        location: the store's folder, or its URL on a filesystem of fsspec (s3://bucket/store, gs://bucket/store, ...).
        fingerprints: expert -> fingerprint to read. An expert that is not named here must have only one.
        create: create the store if the location is empty.
        damaged: also open a store whose store.json or expert.json is damaged, for `verify` and `withdraw`.

    Attributes:
        location: absolute path or URL, by which another process opens the same store.

    Raises:
        StoreError: the location is no store, or has an expert only with other fingerprints than the requested one.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        fingerprints: Mapping[str, str] | None = None,
        create: bool = False,
        damaged: bool = False,
    ):
        self.storage = open_storage(location)
        self.location = self.storage.location
        self._pinned = dict(fingerprints or {})
        self._served = dict(self._pinned)
        self._partitions: dict[tuple[str, str], FeaturePartition] = {}
        self._damaged = damaged
        self._lock = threading.RLock()
        if create:
            self._create()
        self._check_format()
        held = self.experts() if self._pinned else {}
        for expert, wanted in self._pinned.items():
            if held.get(expert) and wanted not in held[expert]:
                raise self._other_weights(expert, held[expert], wanted)

    def _check_format(self) -> None:
        try:
            with reading(self.location), suppress(FileNotFoundError, NotADirectoryError):
                version = json.loads(self.storage.read("store.json"))["format"]
                if version == FORMAT:
                    return
                raise StoreError(
                    f"store {self.location} has format {version}, this mova reads {FORMAT}: use the mova that made it"
                )
            reason = ""
        except (ValueError, KeyError, TypeError) as error:
            reason = f": {error}"
        if not (self._damaged and self.experts()):
            raise StoreError(
                f"{self.location} is no feature store (it has no readable store.json{reason}): check the path, "
                f"make one with `mova precompute`, or mend it with `mova store verify`"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.location, self._served)

    def __repr__(self) -> str:
        return f"FeatureStore({self.location!r})"

    def _create(self) -> None:
        with writing(self.location):
            self.storage.mkdir()
            foreign = self.storage.list_files("") + self.storage.list_folders()
            if self.storage.exists("store.json"):  # checked after the listing: another process may create the store now
                return
            if foreign:
                raise StoreError(f"{self.location} is no feature store and not empty: give a new or empty folder")
            probe = f".probe-{uuid.uuid4().hex}.tmp"  # `list_files` omits temporaries: another process that creates the store must not see it
            try:
                atomic = self.storage.put_if_absent(probe, b"1") and not self.storage.put_if_absent(probe, b"2")
            except (NotImplementedError, TypeError, ValueError) as error:
                raise StoreError(f"{self.location} cannot hold a store ({error}): give an S3 or GCS bucket") from None
            finally:
                self.storage.delete(probe)
            if not atomic:
                raise StoreError(
                    f"{self.location} cannot hold a store: its server overwrites an object that should be kept "
                    f"(If-None-Match is ignored), so two writers would lose features: use one that honours it"
                )
            self.storage.put_if_absent("store.json", _STORE)

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where no limit is known."""
        return self.storage.free_bytes()

    def experts(self) -> dict[str, list[str]]:
        """Expert -> its fingerprints."""
        fingerprints: dict[str, list[str]] = {}
        with reading(self.location):
            for expert in self.storage.list_folders():
                for digest in self.storage.list_folders(expert):
                    if self.storage.exists(f"{expert}/{digest}/expert.json"):
                        fingerprints.setdefault(expert, []).append(digest)
        return fingerprints

    @property
    def fingerprints(self) -> dict[str, str]:
        """Expert -> the fingerprint that this object reads.

        Raises:
            StoreError: an expert has several fingerprints and none was chosen.
        """
        return {expert: fingerprint for expert in self.experts() if (fingerprint := self._serves(expert))}

    def partition(self, expert: str, fingerprint: str | None = None) -> FeaturePartition:
        """The partition of one expert, by default of the fingerprint that this object reads.

        Raises:
            StoreError: the store has no features of the expert, or several fingerprints and none was chosen.
        """
        with self._lock:
            chosen = fingerprint or self._serves(expert)
            if chosen and (expert, chosen) in self._partitions:
                return self._partitions[expert, chosen]
            held = self.experts().get(expert, [])
            if not held or chosen is None:
                others = ", ".join(self.experts()) or "no expert yet"
                raise StoreError(
                    f"store {self.location} has no features of {expert} (it has {others}): "
                    f"run `mova precompute` with --experts {expert}"
                )
            if chosen not in held:
                raise self._other_weights(expert, held, chosen)
            self._partitions[expert, chosen] = FeaturePartition(f"{self.location}/{expert}/{chosen}", self._damaged)
            return self._partitions[expert, chosen]

    def find_partition(self, expert: str, fingerprint: str) -> FeaturePartition | None:
        """The partition of one expert and fingerprint; None where the store has none."""
        return self.partition(expert, fingerprint) if fingerprint in self.experts().get(expert, []) else None

    def _serves(self, expert: str) -> str | None:
        """The fingerprint to read; None where the expert has no partition.

        It is fixed at the first use, so that weights that another process adds change no run.
        """
        with self._lock:
            served = self._served.get(expert)
            if served and (expert, served) in self._partitions:
                return served
            held = self.experts().get(expert, [])
            if not held:
                return None
            if served is None and len(held) > 1:
                raise StoreError(
                    f"store {self.location} holds {expert} features of {len(held)} weights ({', '.join(held)}): "
                    f"choose one with FeatureStore(path, fingerprints={{'{expert}': '{held[0]}'}})"
                )
            if served is not None and served not in held:
                raise self._other_weights(expert, held, served)
            return self._served.setdefault(expert, held[0])

    def _other_weights(self, expert: str, held: Sequence[str], wanted: str) -> StoreError:
        return StoreError(
            f"store {self.location} holds {expert} features of weights {', '.join(held)}, wanted {wanted}: "
            f"run `mova precompute` with --experts {expert} and those weights"
        )

    def add_expert(self, description: Mapping[str, Any]) -> FeaturePartition:
        """Creates the partition of an expert if there is none; from now on this object reads it.

        Args:
            description: as `VisionExpert.describe` returns it.

        Raises:
            StoreError: this object was opened for other weights of the expert, or the partition's expert.json differs.
            ValueError: the expert's name is no folder name, or the dtype has no codec.
        """
        from mova_core.experts import fingerprint

        expert, digest = str(description["expert"]), fingerprint(description)
        if not expert.replace("-", "_").isidentifier() or expert in _RESERVED:
            raise ValueError(
                f"{expert!r} cannot name an expert in a store: use letters, digits, - and _, and not {' or '.join(_RESERVED)}"
            )
        if description["dtype"] not in CODECS:
            raise ValueError(f"{expert} cannot be stored as {description['dtype']}: choose one of {', '.join(CODECS)}")
        if self._pinned.get(expert, digest) != digest:
            raise StoreError(
                f"store {self.location} was opened for {expert} features of weights {self._pinned[expert]}, "
                f"got an expert of weights {digest}: open it for these, or load those"
            )
        with self._lock:
            partition = FeaturePartition.open_or_create(f"{self.location}/{expert}/{digest}", description)
            partition = self._partitions.setdefault((expert, digest), partition)
        self._served[expert] = digest
        return partition

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`; tokens have the stored dtype.

        Raises:
            MissingFeatures: lists every (image, expert) pair that is not stored; nothing was read.
            StoreError: a feature is damaged.
        """
        wanted = wanted_by_expert(images, experts)
        missing = [(key, name) for name, refs in wanted.items() for key in self.missing(list(refs), name)]
        if missing:
            raise MissingFeatures.of(self.location, missing)
        features = {
            name: dict(zip(refs, self.partition(name).read(list(refs)), strict=True)) for name, refs in wanted.items()
        }
        return [
            {name: features[name][image.key] for name in names} for image, names in zip(images, experts, strict=True)
        ]

    def missing(self, keys: Sequence[str], expert: str) -> list[str]:
        """The keys without a feature of the expert, in their order."""
        return self.partition(expert).missing(keys) if self._serves(expert) else list(keys)

    def stat(self) -> dict[str, Any]:
        """Features, bytes and shards per expert, and per fingerprint the result of `FeaturePartition.stat`."""
        experts = {}
        for expert, digests in self.experts().items():
            partitions = {digest: self.partition(expert, digest).stat() for digest in digests}
            total = {
                name: sum(partition[name] for partition in partitions.values())
                for name in ("features", "bytes", "shards")
            }
            experts[expert] = {**total, "fingerprints": partitions}
        return {"path": self.location, "experts": experts, "quarantined": len(self.quarantined())}

    def verify(self, progress: Callable[[int], object] | None = None) -> Iterator[dict[str, str]]:
        """Reads every byte of the store and yields each damage; changes nothing.

        Args:
            progress: called with the number of features just checked.

        Yields:
            "expert", "fingerprint", "shard" (the damaged file, relative to the partition's folder), "key" (of the damaged
            row; empty where the file itself is damaged) and "reason". "expert" and "fingerprint" are empty for files outside
            partitions.
        """
        for file, reason in repair.findings_outside_partitions(self.storage, _STORE, _RESERVED):
            yield {"expert": "", "fingerprint": "", "shard": file, "key": "", "reason": reason}
        for partition in self._all_partitions():
            yield from repair.verify(partition, progress)

    def withdraw(self, damaged: Iterable[Mapping[str, str]]) -> int:
        """Withdraws damaged features, so that the next precompute computes them again; returns their number.

        Undamaged rows of a damaged shard are first committed in a new shard. `gc` removes the old files. Images of a damaged
        quarantine file are tried again; the next precompute of an expert rewrites its damaged expert.json.

        Args:
            damaged: as `verify` yields them.
        """
        by_partition: dict[tuple[str, str], list[Mapping[str, str]]] = {}
        for damage in damaged:
            by_partition.setdefault((damage["expert"], damage["fingerprint"]), []).append(damage)
        with writing(self.location):
            for damage in by_partition.pop(("", ""), []):
                self.storage.delete(damage["shard"])
                if damage["shard"] == "store.json":
                    self.storage.put_if_absent("store.json", _STORE)
        return sum(repair.withdraw(self.partition(*address), damages) for address, damages in by_partition.items())

    def diff(self, other: FeatureStore) -> list[dict[str, Any]]:
        """Compares two stores by their receipts, without reading features.

        Returns:
            For each partition of either store: "expert", "fingerprint", "same" (number of features that both have with equal
            bytes), and the keys that are "only_here", "only_there", or in both and "differ".
        """
        addresses = {
            (partition.expert, partition.fingerprint): None
            for partition in self._all_partitions() + other._all_partitions()
        }
        return [
            {
                "expert": expert,
                "fingerprint": digest,
                **repair.compare(self.find_partition(expert, digest), other.find_partition(expert, digest)),
            }
            for expert, digest in sorted(addresses)
        ]

    def require_experts(self, names: Iterable[str]) -> None:
        """Raises StoreError where the store has no features of one of the experts."""
        held = self.experts()
        if unknown := [name for name in names if name not in held]:
            raise StoreError(
                f"store {self.location} has no features of {', '.join(unknown)} (it has {', '.join(held)})"
            )

    def export(
        self,
        to: FeatureStore,
        experts: Sequence[str] = (),
        keys: Iterable[str] | None = None,
        shard_bytes: int = 128 << 20,
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, int]:
        """Copies encoded features to another store; features that it has already stay.

        Args:
            experts: copied with all their fingerprints; default every expert.
            keys: image keys; default every image. Keys that are not stored are ignored.
            shard_bytes: target size of the new shards.
            progress: called with the number of features just copied or already there.

        Returns:
            Expert -> features copied.

        Raises:
            StoreError: a feature is damaged, or a store cannot be read or written.
        """
        self.require_experts(experts)
        chosen = None if keys is None else binary_keys(list(keys))
        copied: dict[str, int] = {}
        for partition in self._all_partitions():
            if experts and partition.expert not in experts:
                continue
            wanted = partition.keys()
            if chosen is not None:
                wanted = wanted[np.isin(wanted, chosen)]
            there = to.find_partition(partition.expert, partition.fingerprint)
            if there is None and len(wanted):
                there = FeaturePartition.open_or_create(
                    f"{to.location}/{partition.expert}/{partition.fingerprint}", partition.description
                )
            absent = wanted if there is None else wanted[there.missing_positions(wanted)]
            copied[partition.expert] = copied.get(partition.expert, 0) + len(absent)
            if progress:
                progress(len(wanted) - len(absent))
            for chunk in partition.chunks(absent, shard_bytes):
                assert there is not None
                there.write_encoded(there.shard_id(chunk), partition.read_encoded(hex_keys(chunk)))
                if progress:
                    progress(len(chunk))
            if there is not None and len(absent):
                there.snapshot()
        return copied

    def quarantine(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records images that cannot be processed: "image" (path or URL), "sha256" (or None), "reason", "expert"."""
        if not rows:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        table = pa.Table.from_pylist([{**row, "time": now} for row in rows], schema=_QUARANTINE)
        with writing(self.location):
            self.storage.mkdir("quarantine")
            content = parquet(table)
            self.storage.put_if_absent(f"quarantine/{named_by(content)}.parquet", content)

    def quarantined(self) -> list[dict[str, Any]]:
        """Every quarantined image: image, sha256, reason, expert, time (UTC); the oldest first.

        `release` removes rows, so that their images are tried again.
        """
        contents = self._quarantine_files()
        return sorted((row for rows in contents.values() for row in rows), key=lambda row: row["time"])

    def _quarantine_files(self) -> dict[str, list[dict[str, Any]]]:
        """File -> its rows."""
        contents: dict[str, bytes] = {}
        with reading(self.location):
            for name in self.storage.list_files("quarantine", ".parquet"):
                with suppress(FileNotFoundError):  # released since the listing
                    contents[name] = self.storage.read(f"quarantine/{name}")
        rows: dict[str, list[dict[str, Any]]] = {}
        for name, content in contents.items():
            try:
                file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
                rows[name] = file.read().to_pylist()
            except (OSError, pa.ArrowException):  # pyarrow raises these for damaged bytes
                raise StoreError(
                    f"{self.location}/quarantine/{name} is damaged: `mova store verify` deletes it, "
                    f"and its images will be tried again"
                ) from None
        return rows

    def release(self, chosen: Callable[[Mapping[str, Any]], bool] = lambda row: True) -> int:
        """Removes rows from the quarantine, so that their images are tried again; returns their number.

        Args:
            chosen: whether to remove a row, as `quarantined` returns it; default all rows.
        """
        released = 0
        for name, rows in self._quarantine_files().items():
            staying = [row for row in rows if not chosen(row)]
            if len(staying) == len(rows):
                continue
            with writing(self.location):
                if staying:  # written before the deletion: a crash between the two duplicates rows and loses none
                    content = parquet(pa.Table.from_pylist(staying, schema=_QUARANTINE))
                    self.storage.put_if_absent(f"quarantine/{named_by(content)}.parquet", content)
                self.storage.delete(f"quarantine/{name}")
            released += len(rows) - len(staying)
        return released

    def gc(self, grace_seconds: float = 3600.0, dry_run: bool = False) -> dict[str, int]:
        """Removes shards that no receipt names, temporary files and superseded indexes, all older than `grace_seconds`.

        Args:
            grace_seconds: keeps files that a running writer has not committed yet: more than its longest pause.
            dry_run: only report what would be removed.

        Returns:
            {"files": removed, "bytes": freed}.
        """
        before = time.time() - grace_seconds
        removed = {"files": 0, "bytes": 0}
        with writing(self.location):
            unreferenced_files = self.storage.list_temporaries()
            for partition in self._all_partitions():
                unreferenced_files += [
                    f"{partition.expert}/{partition.fingerprint}/{name}"
                    for name in repair.unreferenced_files(partition)
                ]
            for name in unreferenced_files:
                with suppress(FileNotFoundError):  # another gc or the writer has removed the file
                    size, changed = self.storage.stat(name)
                    if changed <= before:
                        if not dry_run:
                            self.storage.delete(name)
                        removed["files"] += 1
                        removed["bytes"] += size
        return removed

    def _all_partitions(self) -> list[FeaturePartition]:
        return [self.partition(expert, digest) for expert, digests in self.experts().items() for digest in digests]

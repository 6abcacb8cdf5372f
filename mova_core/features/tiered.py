"""A read-through store: features are read if they are stored, else computed by another source and written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mova_core.features.codec import as_stored
from mova_core.features.partition import FeaturePartition
from mova_core.features.shard_writer import ShardWriter
from mova_core.features.single_flight import SingleFlight
from mova_core.features.source import FeatureSource, wanted_by_expert
from mova_core.features.storage import StoreError
from mova_core.features.store import FeatureStore

if TYPE_CHECKING:
    from mova_core.experts import Features
    from mova_core.images import ImageRef
    from mova_core.telemetry import Telemetry

Pair = tuple[str, str]  # expert name, image key


class ReadThroughStore:
    """A `FeatureSource` that reads from a store, has `source` compute missing features, and writes these to the store.

    Any number of threads may fetch; a feature that several threads request at the same time is computed once. Every fetch
    returns the stored bits, also the one that computed the feature and where the store has a smaller dtype than the source
    computes. Partitions are created if the source has `descriptions` (expert name -> result of `VisionExpert.describe`);
    for another source, call `store.add_expert` before.

    Features are written by a background thread (`ShardWriter`). `flush` waits until all are stored; so do `close`, the end
    of a `with` block and the end of the process.

    Args:
        store: to read and write.
        source: computes features that are not stored.
        dtypes: expert -> stored dtype, one of `CODECS`, where it differs from the dtype that the source computes in.
        shard_bytes: approximate bytes of features in a shard. `fetch` blocks while more than twice as many bytes wait for
            the disk.
        shard_seconds: longest time that a feature waits for others to fill its shard.
        telemetry: receives hits, misses and the number of features that could not be stored.
    """

    def __init__(
        self,
        store: FeatureStore,
        source: FeatureSource,
        *,
        dtypes: Mapping[str, str] | None = None,
        shard_bytes: int = 128 << 20,
        shard_seconds: float = 5.0,
        telemetry: Telemetry | None = None,
    ):
        self.store = store
        self.source = source
        self.dtypes = dict(dtypes or {})
        self._telemetry = telemetry
        self._partitions: dict[str, FeaturePartition] = {}  # expert name -> partition, from its first use
        self._single_flight: SingleFlight[Pair, Features] = SingleFlight()
        self._writer = ShardWriter(shard_bytes, shard_seconds, telemetry)
        self._settings: dict[str, Any] = {
            "dtypes": self.dtypes,
            "shard_bytes": shard_bytes,
            "shard_seconds": shard_seconds,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ReadThroughStore, **self._settings), (self.store, self.source)

    def __enter__(self) -> ReadThroughStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def flush(self) -> None:
        """Waits until every feature computed so far is stored, or its write has failed."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and ends the writing thread. Later fetches are answered, and nothing more is stored."""
        self._writer.close()

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the stored features, which `fetch` returns."""
        from mova_core.experts import fingerprint

        fingerprints = dict(self.source.fingerprints)
        for name in self.dtypes:
            fingerprints.pop(name, None)  # the source's fingerprint is of another dtype
            if (description := self._description(name)) is not None:
                fingerprints[name] = fingerprint(description)
        return fingerprints

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`.

        Raises:
            StoreError: a feature is damaged, the store was opened for other weights than the source's, or it has no
                partition for them and the source no description to create one.
            ValueError: the stored dtype cannot hold a feature.
        """
        wanted = wanted_by_expert(images, experts)
        features = self._read({name: list(refs) for name, refs in wanted.items()})
        missing = {
            (name, key): ref
            for name, refs in wanted.items()
            for key, ref in refs.items()
            if (name, key) not in features
        }
        for name, refs in wanted.items():
            misses = sum((name, key) in missing for key in refs)
            self._observe("hits_total", len(refs) - misses, name)
            self._observe("misses_total", misses, name)
        features.update(self._single_flight.run(missing, lambda pairs: self._compute(pairs, missing)))
        return [
            {name: features[name, image.key] for name in names} for image, names in zip(images, experts, strict=True)
        ]

    def _read(self, wanted: Mapping[str, Sequence[str]], refresh: bool = True) -> dict[Pair, Features]:
        """Reads the wanted features that are stored or wait to be written.

        Args:
            wanted: expert name -> image keys.
            refresh: also find features that other processes have stored since the last call.
        """
        features: dict[Pair, Features] = {}
        for name, keys in wanted.items():
            if (partition := self._partition(name)) is None:
                continue
            # Ask the writer before the store: a feature leaves the writer only after it is in the store.
            waiting = self._writer.waiting(partition, keys)
            dtype = partition.description["dtype"]
            features.update({(name, key): as_stored(feature, dtype) for key, feature in waiting.items()})
            others = [key for key in keys if key not in waiting]
            if refresh:
                missing = set(partition.missing(others))
                stored = [key for key in others if key not in missing]
            else:
                stored = [key for key, found in zip(others, partition.has(others), strict=True) if found]
            features.update(zip([(name, key) for key in stored], partition.read(stored), strict=True))
        return features

    def _compute(self, pairs: Sequence[Pair], refs: Mapping[Pair, ImageRef]) -> dict[Pair, Features]:
        """Computes and writes features that `_read` did not find; reads those that were stored since."""
        by_expert: dict[str, list[str]] = {}
        for name, key in pairs:
            by_expert.setdefault(name, []).append(key)
        # Another thread of this process may have stored the feature since this thread's first `_read`.
        features = self._read(by_expert, refresh=False)
        missing: dict[str, list[str]] = {}  # image key -> experts to run
        for name, key in pairs:
            if (name, key) not in features:
                missing.setdefault(key, []).append(name)
        images = [refs[names[0], key] for key, names in missing.items()]
        rows = self.source.fetch(images, list(missing.values())) if images else []
        computed: dict[str, dict[str, Features]] = {}
        for key, row in zip(missing, rows, strict=True):
            for name in missing[key]:
                computed.setdefault(name, {})[key] = row[name]
        for name, new_features in computed.items():
            if name not in self._partitions:  # some sources know their fingerprint only after they have computed
                partition = self._partition_or_create(name)
                stored = self._read({name: list(new_features)})
                features.update(stored)
                new_features = {key: feature for key, feature in new_features.items() if (name, key) not in stored}
            partition = self._partitions[name]
            dtype = partition.description["dtype"]
            features.update({(name, key): as_stored(feature, dtype) for key, feature in new_features.items()})
            self._writer.put(partition, new_features)
        return features

    def _description(self, name: str) -> Mapping[str, Any] | None:
        """Everything that the fingerprint of the stored features covers; None where the source has no description."""
        description = getattr(self.source, "descriptions", {}).get(name)
        if description is None or name not in self.dtypes:
            return description
        return {**description, "dtype": self.dtypes[name]}

    def _partition(self, name: str) -> FeaturePartition | None:
        """The partition of an expert; None where the store has none, or the fingerprint is not known yet."""
        if name not in self._partitions:
            fingerprint = self.fingerprints.get(name)
            partition = None if fingerprint is None else self.store.find_partition(name, fingerprint)
            if partition is None:
                return None
            self._partitions[name] = partition
        return self._partitions[name]

    def _partition_or_create(self, name: str) -> FeaturePartition:
        """The partition of an expert, created if the store has none.

        Raises:
            StoreError: the source has no description of the expert, or the store was opened for other weights.
        """
        if (partition := self._partition(name)) is not None:
            return partition
        if (description := self._description(name)) is None:
            raise StoreError(
                f"store {self.store.location} has no partition for the {name} features of this source: "
                f"call store.add_expert with what the expert's describe() returns"
            )
        return self._partitions.setdefault(name, self.store.add_expert(description))

    def _observe(self, metric: str, value: float, expert: str) -> None:
        if self._telemetry is not None:
            self._telemetry.observe(f"mova_tiered_{metric}", value, expert=expert)


Tiered = ReadThroughStore

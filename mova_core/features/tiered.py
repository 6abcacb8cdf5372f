"""A store in front of another source: features are read if stored, else computed and written back."""

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
    """A `FeatureSource` that reads from a store, computes what is missing by `source`, and writes it back.

    Any number of threads may fetch; a feature that several request at the same time is computed once. Every answer has the
    bits as stored, so the first request and all later ones get the same, also where the store keeps a smaller dtype than
    the source computes. The store's partitions are created if the source has `descriptions` (expert name -> what
    `VisionExpert.describe` returns); for another source, call `store.add_expert` before.

    Features are written by a background thread (`ShardWriter`). `flush` waits until all are stored; so do `close`, the end
    of a `with` block and the end of the process.

    Args:
        store: read and written.
        source: computes what is not stored.
        dtypes: expert -> name of the dtype to store where that is not the one the source computes in: any of `CODECS`.
        shard_bytes: features gathered for a shard, about, bytes; while more than twice as many wait for the disk, `fetch`
            waits too.
        shard_seconds: longest time a feature waits for others to fill its shard.
        telemetry: takes hits, misses and the number of features that could not be stored.
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
        self._partitions: dict[str, FeaturePartition] = {}  # expert name -> partition, once it is known
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
        """Returns when every feature computed so far is stored, or could not be."""
        self._writer.flush()

    def close(self) -> None:
        """As `flush`, and ends the writing thread; later requests are answered and not stored."""
        self._writer.close()

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served, which are as the store keeps them."""
        from mova_core.experts import fingerprint

        fingerprints = dict(self.source.fingerprints)
        for name in self.dtypes:
            fingerprints.pop(name, None)  # the source's own is that of the dtype it computes in
            if (description := self._description(name)) is not None:
                fingerprints[name] = fingerprint(description)
        return fingerprints

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`.

        Raises:
            StoreError: a damaged feature; a store opened for other weights than the source's, or without a partition for
                them and no description to create one.
            ValueError: a feature that the stored dtype cannot hold.
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
        """The wanted features that are stored or wait to be written.

        Args:
            wanted: expert name -> image keys.
            refresh: look for features that other processes have stored since the last look.
        """
        features: dict[Pair, Features] = {}
        for name, keys in wanted.items():
            if (partition := self._partition(name)) is None:
                continue
            # The writer before the store: a feature leaves the writer only after it is in the store.
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
        """Features that were not stored a moment ago: those stored since are read, the others computed and written."""
        by_expert: dict[str, list[str]] = {}
        for name, key in pairs:
            by_expert.setdefault(name, []).append(key)
        # Another thread of this process may have finished between this thread's look and its turn to compute.
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
            if name not in self._partitions:  # a source that knows its fingerprint only after it has computed
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
        """All that the fingerprint of the stored features covers; None where the source has no description."""
        description = getattr(self.source, "descriptions", {}).get(name)
        if description is None or name not in self.dtypes:
            return description
        return {**description, "dtype": self.dtypes[name]}

    def _partition(self, name: str) -> FeaturePartition | None:
        """The partition of the features served; None where the store has none, or the fingerprint is not known yet."""
        if name not in self._partitions:
            fingerprint = self.fingerprints.get(name)
            partition = None if fingerprint is None else self.store.find_partition(name, fingerprint)
            if partition is None:
                return None
            self._partitions[name] = partition
        return self._partitions[name]

    def _partition_or_create(self, name: str) -> FeaturePartition:
        """The same, created if need be.

        Raises:
            StoreError: the source has no description to create it by, or the store was opened for other weights.
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

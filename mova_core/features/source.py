"""Where features come from: one protocol for experts run here, a store, live servers, or a store in front of either."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mova_core.features.codec import CODECS
from mova_core.features.store import FeaturePartition, FeatureStore, StoreError, wanted_by_expert
from mova_core.images import DecodedImage

if TYPE_CHECKING:
    from mova_core.experts import Features, VisionExpert
    from mova_core.images import ImageRef
    from mova_core.telemetry import Telemetry

logger = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")


class FeatureSource(Protocol):
    """(images, expert names) -> features; nothing above can tell which source it holds."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served."""
        ...

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """The features of images[i] by each of experts[i]: name -> Features with tokens (H*W, C), on the CPU."""
        ...


class LocalExperts:
    """Runs experts in this process, each on the device it is on.

    Args:
        experts: name -> expert.
        batch_size: images per forward pass.
    """

    def __init__(self, experts: Mapping[str, VisionExpert], batch_size: int = 8):
        self.experts = dict(experts)
        self.batch_size = batch_size
        self._descriptions: dict[str, dict[str, Any]] = {}

    @property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Expert name -> all that its fingerprint covers."""
        for name in self.experts.keys() - self._descriptions.keys():
            self._descriptions[name] = self.experts[name].describe()
        return self._descriptions

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served."""
        from mova_core.experts import fingerprint

        return {name: fingerprint(description) for name, description in self.descriptions.items()}

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`. An image asked for twice is computed once, and decoded once for all its experts.

        Raises:
            ValueError: an expert that is not among these.
            ImageError: an image that cannot be read.
        """
        import torch

        from mova_core.experts import Features

        computed: dict[str, dict[str, Features]] = {}
        by_expert = wanted_by_expert(images, experts)
        readers = Counter(key for wanted in by_expert.values() for key in wanted)
        pictures = {image.key: DecodedImage.of(image) for image in images if readers[image.key] > 1}
        for name, wanted in by_expert.items():
            if name not in self.experts:
                raise ValueError(f"no expert {name!r} here: there are {', '.join(self.experts)}")
            expert = self.experts[name]
            parameter = next(expert.parameters())
            keys = list(wanted)
            rows = computed[name] = {}
            for at in range(0, len(keys), self.batch_size):
                chunk = keys[at : at + self.batch_size]
                batch = expert.preprocess([pictures.get(key, wanted[key]) for key in chunk])
                with torch.no_grad():  # not inference_mode: training saves these tensors for its backward pass
                    tokens_BNC, grid = expert({key: value.to(parameter) for key, value in batch.items()})
                rows.update(zip(chunk, (Features(tokens_NC, grid) for tokens_NC in tokens_BNC.cpu()), strict=True))
        return [
            {name: computed[name][image.key] for name in names} for image, names in zip(images, experts, strict=True)
        ]


class LazyExperts(LocalExperts):
    """`LocalExperts` that are loaded when they are first asked for: a router picks at most three of seven.

    Args:
        names: the experts that may be asked for.
        size, device: as `load_expert` takes them.
        weights: name -> weights as `load_expert` takes them; an expert not named here gets its default.
        fingerprints: name -> the one of the features wanted, where it is known. That of a partition which keeps another
            dtype than was computed in, say int8, gives what reading that partition would.
        dtypes: name -> name of the dtype to compute in; float32 for an expert not named here, or where this is one that
            only a store keeps. Where the fingerprint wants another it is found.
        batch_size: images per forward pass.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        size: str = "full",
        weights: Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        device: str = "cpu",
        dtypes: Mapping[str, str] | None = None,
        batch_size: int = 8,
    ):
        super().__init__({}, batch_size)
        self.names = tuple(names)
        self.size, self.device, self.dtypes = size, device, dict(dtypes or {})
        self.weights = dict(weights or {})
        self._expected = dict(fingerprints or {})
        self._lock = threading.Lock()

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served, where it was given or the expert is loaded."""
        return {**self._expected, **super().fingerprints}

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `LocalExperts.fetch`.

        Raises:
            ValueError: also an expert whose weights are not the ones expected.
        """
        with self._lock:
            for name in dict.fromkeys(name for names in experts for name in names):
                if name not in self.experts and name in self.names:
                    self._load(name)
        rows = super().fetch(images, experts)
        return [{name: _as_stored(one, self._descriptions[name]["dtype"]) for name, one in row.items()} for row in rows]

    def _load(self, name: str) -> None:
        import torch

        from mova_core.experts import fingerprint, load_expert

        expected = self._expected.get(name)
        asked = self.dtypes.get(name, "float32")
        computing = [dtype for dtype, codec in CODECS.items() if codec.peak is None]
        found = ""
        for dtype in sorted(computing, key=lambda dtype: (dtype != asked, computing.index(dtype))):
            expert = load_expert(
                name, self.weights.get(name), size=self.size, device=self.device, dtype=getattr(torch, dtype)
            )
            description = expert.describe()
            found = found or fingerprint(description)
            stored = (description, *({**description, "dtype": stored} for stored in CODECS))
            wanted = (one for one in stored if expected in (None, fingerprint(one)))
            if description := next(wanted, {}):
                self.experts[name], self._descriptions[name] = expert, description
                return
        raise ValueError(
            f"expert {name} has fingerprint {found}, wanted {expected}: "
            f"give the weights and size that its features were made with"
        )


class SingleFlight(Generic[K, V]):
    """What is being computed right now, so that who asks for the same meanwhile waits for it and computes nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[K, Future[V | None]] = {}

    def run(
        self,
        wanted: Collection[K],
        compute: Callable[[list[K]], Mapping[K, V]],
        joined: Callable[[list[K]], object] | None = None,
    ) -> dict[K, V]:
        """The values of all that is wanted.

        What another thread is at is awaited, after computing the rest; where that thread failed it is computed here.

        Args:
            wanted: distinct keys.
            compute: gets those that nobody is at; what it raises is raised here, and not to those who waited.
            joined: gets those that somebody is at.
        """
        got: dict[K, V] = {}
        while len(got) < len(wanted):
            with self._lock:
                open_ = [key for key in wanted if key not in got]
                others = {key: self._under_way[key] for key in open_ if key in self._under_way}
                mine: dict[K, Future[V | None]] = {key: Future() for key in open_ if key not in others}
                self._under_way.update(mine)
            if others and joined:
                joined(list(others))
            values: Mapping[K, V] = {}
            try:
                if mine:
                    values = compute(list(mine))
            finally:
                with self._lock:
                    for key in mine:
                        del self._under_way[key]
                for key, future in mine.items():
                    future.set_result(values.get(key))
            got.update({key: values[key] for key in mine})
            got.update({key: value for key, other in others.items() if (value := other.result()) is not None})
        return got


class Tiered:
    """Reads through: from the store what is there, the rest from `source`, written back. Any number of threads may ask.

    What comes back has the stored bits, so a first and a second request give the same, also where the store keeps a
    smaller dtype than the source computes. Two that ask for the same at the same time have it computed once. A source
    that tells `descriptions` (expert name -> what `VisionExpert.describe` tells) gets its partitions made; for another, call
    `store.add_expert` before.

    Features are written by a thread that gathers them, for a shard and a receipt per request would be many small files.
    `flush` waits until all is stored; so do `close`, the end of a `with` block and the end of the process.

    Args:
        store: read and written.
        source: computes what is not stored.
        dtypes: expert -> name of the dtype to store where that is not the one the source computes in: any of `CODECS`.
        shard_bytes: features gathered for a shard, about, bytes; with twice as many waiting, requests wait for the disk.
        shard_seconds: longest time a feature waits for others to fill its shard.
        telemetry: takes hits, misses and what could not be stored.
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
        self._partitions: dict[str, FeaturePartition] = {}
        self._flights: SingleFlight[tuple[str, str], Features] = SingleFlight()
        self._writer = _Writer(shard_bytes, shard_seconds, telemetry)
        self._settings: dict[str, Any] = {
            "dtypes": self.dtypes,
            "shard_bytes": shard_bytes,
            "shard_seconds": shard_seconds,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Tiered, **self._settings), (self.store, self.source)

    def __enter__(self) -> Tiered:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def flush(self) -> None:
        """Returns when all that was computed so far is stored, or could not be."""
        self._writer.flush()

    def close(self) -> None:
        """As `flush`, and ends the writing thread; what is asked for later is answered and not stored."""
        self._writer.close()

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served, which are as the store keeps them."""
        from mova_core.experts import fingerprint

        known = dict(self.source.fingerprints)
        for name in self.dtypes:
            known.pop(name, None)
            if (description := self._description(name)) is not None:
                known[name] = fingerprint(description)
        return known

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`.

        Raises:
            StoreError: a damaged row; a store opened for other weights than the source has, or with no partition for them.
            ValueError: a feature that the stored dtype cannot hold.
        """
        wanted = wanted_by_expert(images, experts)
        features = self._kept({name: list(refs) for name, refs in wanted.items()})
        absent = {(name, key): ref for name, refs in wanted.items() for key, ref in refs.items()}
        absent = {pair: ref for pair, ref in absent.items() if pair not in features}
        for name, refs in wanted.items():
            lacking = sum((name, key) in absent for key in refs)
            self._tell("hits_total", len(refs) - lacking, name)
            self._tell("misses_total", lacking, name)
        features.update(self._flights.run(absent, lambda mine: self._computed(mine, absent)))
        return [
            {name: features[name, image.key] for name in names} for image, names in zip(images, experts, strict=True)
        ]

    def _kept(self, wanted: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Features]:
        """Of the keys wanted of each expert those that are stored, or wait to be."""
        got: dict[tuple[str, str], Features] = {}
        for name, keys in wanted.items():
            if (partition := self._held(name)) is None:
                continue
            # In this order: a feature leaves the writer when it is in the store.
            waiting = self._writer.waiting(partition, keys)
            got.update({(name, key): _as_stored(one, partition.description["dtype"]) for key, one in waiting.items()})
            rest = [key for key in keys if key not in waiting]
            absent = set(partition.missing(rest))
            stored = [key for key in rest if key not in absent]
            got.update(zip([(name, key) for key in stored], partition.read(stored), strict=True))
        return got

    def _computed(
        self, pairs: Sequence[tuple[str, str]], refs: Mapping[tuple[str, str], ImageRef]
    ) -> dict[tuple[str, str], Features]:
        """Features that were not there a moment ago: another thread may have stored some since."""
        by_expert: dict[str, list[str]] = {}
        for name, key in pairs:
            by_expert.setdefault(name, []).append(key)
        got = self._kept(by_expert)
        absent: dict[str, list[str]] = {}  # image key -> experts to compute
        for name, key in pairs:
            if (name, key) not in got:
                absent.setdefault(key, []).append(name)
        images = {key: refs[names[0], key] for key, names in absent.items()}
        rows = self.source.fetch(list(images.values()), list(absent.values())) if images else []
        computed: dict[str, dict[str, Features]] = {}
        for key, row in zip(images, rows, strict=True):
            for name in absent[key]:
                computed.setdefault(name, {})[key] = row[name]
        for name, features in computed.items():
            if name not in self._partitions:  # a source that tells only now what it computes
                partition = self._held(name) or self._made(name)
                kept = self._kept({name: list(features)})
                got.update(kept)
                features = {key: one for key, one in features.items() if (name, key) not in kept}
            partition = self._partitions[name]
            got.update({(name, key): _as_stored(one, partition.description["dtype"]) for key, one in features.items()})
            self._writer.put(partition, features)
        return got

    def _description(self, name: str) -> Mapping[str, Any] | None:
        """All that the fingerprint of what is stored covers, where the source tells it."""
        description = getattr(self.source, "descriptions", {}).get(name)
        if description is None or name not in self.dtypes:
            return description
        return {**description, "dtype": self.dtypes[name]}

    def _held(self, name: str) -> FeaturePartition | None:
        """The partition of what is served, if the store has it."""
        if name not in self._partitions:
            fingerprint = self.fingerprints.get(name)
            if fingerprint is None or fingerprint not in self.store.experts().get(name, []):
                return None
            self._partitions[name] = self.store.partition(name, fingerprint)
        return self._partitions[name]

    def _made(self, name: str) -> FeaturePartition:
        description = self._description(name)
        if description is None:
            raise StoreError(
                f"store {self.store.location} has no partition for the {name} features of this source: "
                f"call store.add_expert with what the expert's describe() tells"
            )
        return self._partitions.setdefault(name, self.store.add_expert(description))

    def _tell(self, name: str, value: float, expert: str) -> None:
        if self._telemetry is not None:
            self._telemetry.observe(f"mova_tiered_{name}", value, expert=expert)


class _Writer:
    """Writes features gathered into shards, in a thread that lives while there are any."""

    def __init__(self, shard_bytes: int, shard_seconds: float, telemetry: Telemetry | None):
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._telemetry = telemetry
        self._changed = threading.Condition()  # of all below
        self._batches: dict[str, _Batch] = {}  # fingerprint -> being gathered
        self._full: deque[_Batch] = deque()  # to be written, the first right now
        self._bytes = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        _WRITERS.add(self)

    def waiting(self, partition: FeaturePartition, keys: Sequence[str]) -> dict[str, Features]:
        """Those of the keys that are not written yet."""
        with self._changed:
            batches = [*self._full, *self._batches.values()]
            mine = [batch.features for batch in batches if batch.partition.fingerprint == partition.fingerprint]
        return {key: features[key] for features in mine for key in keys if key in features}

    def put(self, partition: FeaturePartition, features: Mapping[str, Features]) -> None:
        """Takes features to be written; waits where too many are."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes <= 2 * self._shard_bytes or self._closed)
            if self._closed:
                return
            batch = self._batches.setdefault(partition.fingerprint, _Batch(partition))
            for key, one in features.items():
                # Copied: a row of a batch would keep the whole batch in memory.
                size = one.tokens.numel() * one.tokens.element_size()
                whole = one.tokens.untyped_storage().nbytes() == size
                batch.features[key] = one if whole else one._replace(tokens=one.tokens.clone())
                batch.bytes += size
                self._bytes += size
            if batch.bytes >= self._shard_bytes:
                self._full.append(self._batches.pop(partition.fingerprint))
            if self._thread is None and self._bytes:
                self._thread = threading.Thread(target=self._run, name="mova-store-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        with self._changed:
            self._full.extend(self._batches.values())
            self._batches.clear()
            self._changed.notify_all()
            last = self._full[-1] if self._full else None
            self._changed.wait_for(lambda: last not in self._full)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.flush()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._full:
                    if not self._batches:
                        self._thread = None
                        return
                    now = time.monotonic()
                    name, oldest = min(self._batches.items(), key=lambda item: item[1].since)
                    if now - oldest.since >= self._shard_seconds:
                        self._full.append(self._batches.pop(name))
                    else:
                        self._changed.wait(oldest.since + self._shard_seconds - now)
                batch = self._full[0]
            try:
                batch.partition.write(batch.partition.shard_id(batch.features), batch.features)
            except Exception as error:  # a full disk must not stop a server
                logger.warning("%s (%d features are not stored)", error, len(batch.features))
                if self._telemetry is not None:
                    name, count = batch.partition.expert, len(batch.features)
                    self._telemetry.observe("mova_tiered_dropped_total", count, expert=name)
            with self._changed:
                self._full.popleft()
                self._bytes -= batch.bytes
                self._changed.notify_all()


_WRITERS: weakref.WeakSet[_Writer] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    """What waits to be written at the end of the process would be lost with its thread."""
    for writer in list(_WRITERS):
        writer.flush()


@dataclass(eq=False)
class _Batch:
    """Features of one partition that will be a shard."""

    partition: FeaturePartition
    features: dict[str, Features] = field(default_factory=dict)
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)


def _as_stored(features: Features, dtype: str) -> Features:
    """What reading gives of these features when they were stored."""
    import torch

    codec = CODECS[dtype]
    if codec.peak is None and features.tokens.dtype is getattr(torch, dtype):
        return features
    row, _ = codec.encode(features.tokens)
    return features._replace(tokens=codec.decode(row, features.tokens.shape[1]))

"""Where features come from: one protocol for experts run here, a store, live servers, or a store in front of either."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mova_core.features.store import ExpertShelf, FeatureStore, StoreError, wanted_by_expert
from mova_core.images import Picture

if TYPE_CHECKING:
    from mova_core.experts import Features, VisionExpert
    from mova_core.images import ImageRef

logger = logging.getLogger(__name__)


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
        pictures = {image.key: Picture(image) for image in images if readers[image.key] > 1}
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
        fingerprints: name -> the one that the expert must have, where it is known.
        dtypes: name -> name of the dtype to compute in; float32 for an expert not named here.
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
        return super().fetch(images, experts)

    def _load(self, name: str) -> None:
        import torch

        from mova_core.experts import fingerprint, load_expert

        expert = load_expert(
            name,
            self.weights.get(name),
            size=self.size,
            device=self.device,
            dtype=getattr(torch, self.dtypes.get(name, "float32")),
        )
        description = expert.describe()
        expected = self._expected.get(name)
        if expected is not None and fingerprint(description) != expected:
            raise ValueError(
                f"expert {name} has fingerprint {fingerprint(description)}, wanted {expected}: "
                f"give the weights, size and dtype that its features were made with"
            )
        self.experts[name] = expert
        self._descriptions[name] = description


class Tiered:
    """Reads through: from the store what is there, the rest from `source`, written back.

    What comes back was read from the store, so a first and a second request give the same bits, also where the store
    keeps a smaller dtype than the source computes. A source that tells `descriptions` (expert name -> what
    `VisionExpert.describe` tells) gets its shelves made; for another, call `store.add_expert` before.
    """

    def __init__(self, store: FeatureStore, source: FeatureSource):
        self.store = store
        self.source = source
        self._shelves: dict[str, ExpertShelf] = {}

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Expert name -> fingerprint of the features served."""
        return self.source.fingerprints

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`.

        Raises:
            StoreError: a damaged row; a store opened for other weights than the source has, or with no shelf for them.
        """
        wanted = wanted_by_expert(images, experts)
        missing: dict[str, set[str]] = {}
        absent: dict[str, list[str]] = {}  # image key -> experts to compute
        for name, asked in wanted.items():
            shelf = self._held(name)
            missing[name] = set(shelf.missing(list(asked)) if shelf else asked)
            for key in missing[name]:
                absent.setdefault(key, []).append(name)
        refs = {image.key: image for image in images if image.key in absent}
        rows = self.source.fetch(list(refs.values()), [absent[key] for key in refs]) if refs else []
        computed = dict(zip(refs, rows, strict=True))

        features: dict[str, dict[str, Features]] = {}
        for name, asked in wanted.items():
            shelf = self._held(name) or self._made(name)
            keys = list(asked)
            features[name] = {key: computed[key][name] for key in keys if key in missing[name]}
            try:
                shelf.write(shelf.shard_id(features[name]), features[name])
            except StoreError as error:  # a full disk must not stop a server
                logger.warning("%s (answering with what was just computed)", error)
            stored = [key for key, there in zip(keys, shelf.has(keys), strict=True) if there]
            features[name].update(zip(stored, shelf.read(stored), strict=True))
        return [
            {name: features[name][image.key] for name in names} for image, names in zip(images, experts, strict=True)
        ]

    def _held(self, name: str) -> ExpertShelf | None:
        """The shelf of what the source serves, if the store has it."""
        if name not in self._shelves:
            fingerprint = self.source.fingerprints.get(name)
            if fingerprint is None or fingerprint not in self.store.experts().get(name, []):
                return None
            self._shelves[name] = self.store.shelf(name, fingerprint)
        return self._shelves[name]

    def _made(self, name: str) -> ExpertShelf:
        description = getattr(self.source, "descriptions", {}).get(name)
        if description is None:
            raise StoreError(
                f"store {self.store.location} has no shelf for the {name} features of this source: "
                f"call store.add_expert with what the expert's describe() tells"
            )
        return self._shelves.setdefault(name, self.store.add_expert(description))

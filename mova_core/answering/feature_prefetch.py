"""FeaturePrefetcher: fetches experts' features in a thread while the LLM routes other questions; and a cache of features."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from cachetools import LRUCache

from mova_core.experts import Features
from mova_core.features import FeatureSource
from mova_core.images import ImageRef

FeatureKey = tuple[str, str]  # (image key, expert)


class LruFeatureCache:
    """Features in memory, least recently used out first. Any number of threads may use it.

    Args:
        max_bytes: of the tokens together; 0 stores nothing.
    """

    def __init__(self, max_bytes: int):
        self._features: LRUCache[FeatureKey, Features] = LRUCache(
            max_bytes, getsizeof=lambda features: features.tokens.nbytes
        )
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return int(self._features.currsize)

    def get(self, key: FeatureKey) -> Features | None:
        with self._lock:
            return self._features.get(key)

    def put(self, key: FeatureKey, features: Features) -> None:
        with self._lock, suppress(ValueError):  # cachetools refuses a value larger than the whole cache
            self._features[key] = features


class FeaturePrefetcher:
    """Fetches the features of one batch of questions in a thread of its own.

    Features that are requested while a fetch runs go into the next fetch together, so that the source sees few large
    requests. Use it as a context manager; leaving it waits for the fetch that runs.

    Args:
        source: where features come from.
        cache: features of earlier batches; new ones are added.
    """

    def __init__(self, source: FeatureSource, cache: LruFeatureCache):
        self.source, self.cache = source, cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feature-prefetch")
        self._requested: set[FeatureKey] = set()
        self._pending: dict[FeatureKey, ImageRef] = {}  # requested, but not yet part of a fetch
        self._lock = threading.Lock()  # guards `_pending`
        self._features: dict[FeatureKey, Features] = {}
        self._fetches: list[Future[None]] = []

    def __enter__(self) -> "FeaturePrefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def request(self, images: Sequence[ImageRef], experts: Sequence[str]) -> None:
        """Starts to fetch each image's features of each expert, unless they are cached or requested already."""
        new = {(image.key, expert): image for image in images for expert in experts}
        new = {key: image for key, image in new.items() if key not in self._requested}
        self._requested |= new.keys()
        for key in list(new):
            if (features := self.cache.get(key)) is not None:
                self._features[key] = features
                del new[key]
        if new:
            with self._lock:
                self._pending |= new
            self._fetches.append(self._thread.submit(self._fetch))

    def result(self) -> dict[FeatureKey, Features]:
        """All requested features; waits for them. Raises what the source raised."""
        for fetch in self._fetches:
            fetch.result()
        return self._features

    def _fetch(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        images = {key: image for (key, _), image in pending.items()}
        experts = {key: [expert for other, expert in pending if other == key] for key in images}
        if not images:  # an earlier fetch took them along
            return
        rows = self.source.fetch(list(images.values()), list(experts.values()))
        for key, row in zip(images, rows, strict=True):
            for expert in experts[key]:
                self._features[key, expert] = row[expert]
                self.cache.put((key, expert), row[expert])

"""Features fetched ahead."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from mova_core.experts import Features
from mova_core.features import FeatureSource
from mova_core.images import ImageRef


class LruFeatureCache:
    """Features by (picture key, expert) in memory, the longest unused let go first."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.entries: OrderedDict[tuple[str, str], Features] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: str, expert: str) -> Features | None:
        with self.lock:
            if (key, expert) in self.entries:
                self.entries.move_to_end((key, expert))
            return self.entries.get((key, expert))

    def put(self, key: str, expert: str, features: Features) -> None:
        with self.lock:
            if (key, expert) not in self.entries:
                self.entries[key, expert] = features
                self.bytes += features.tokens.nbytes
            while self.bytes > self.limit:
                self.bytes -= self.entries.popitem(last=False)[1].tokens.nbytes


class FeaturePrefetcher:
    """Fetches features in a thread of its own. What is wanted while a fetch runs goes into the next one, all together."""

    def __init__(self, source: FeatureSource, kept: LruFeatureCache):
        self.source, self.kept = source, kept
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="features")
        self.wanted: dict[tuple[str, str], ImageRef] = {}
        self.found: dict[tuple[str, str], Features] = {}
        self.asked: set[tuple[str, str]] = set()
        self.lock = threading.Lock()
        self.fetches: list[Future[None]] = []

    def __enter__(self) -> "FeaturePrefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    def want(self, images: Sequence[ImageRef], experts: Sequence[str]) -> None:
        """Starts to fetch what is not kept, wanted or found already."""
        new = {(image.key, name): image for image in images for name in experts if (image.key, name) not in self.asked}
        self.asked |= new.keys()
        for place in list(new):
            if (features := self.kept.get(*place)) is not None:
                self.found[place] = features
                del new[place]
        if new:
            with self.lock:
                self.wanted |= new
            self.fetches.append(self.thread.submit(self._fetch))

    def done(self) -> dict[tuple[str, str], Features]:
        """All that was wanted, by (picture key, expert); an error of the source comes out here."""
        for fetch in self.fetches:
            fetch.result()
        return self.found

    def _fetch(self) -> None:
        with self.lock:
            wanted, self.wanted = self.wanted, {}
        images = {key: image for (key, _), image in wanted.items()}
        names = {key: [name for other, name in wanted if other == key] for key in images}
        if images:
            rows = self.source.fetch(list(images.values()), list(names.values()))
            for key, row in zip(images, rows, strict=True):
                for name in names[key]:
                    self.found[key, name] = row[name]
                    self.kept.put(key, name, row[name])

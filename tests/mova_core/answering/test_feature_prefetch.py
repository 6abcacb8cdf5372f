import threading

import pytest
import torch

from mova_core.answering.feature_prefetch import FeaturePrefetcher, LruFeatureCache
from mova_core.experts import Features
from mova_core.images import ImageRef

IMAGES = [ImageRef(data=name.encode()) for name in ("cat", "dog")]
CAT, DOG = IMAGES


def features(value: float = 0.0) -> Features:
    return Features(torch.full((4, 1), value), (2, 2))


class Source:
    """Counts its fetches; each waits until `open` is set."""

    def __init__(self):
        self.fetches: list[list[tuple[str, tuple[str, ...]]]] = []
        self.started, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.fingerprints: dict[str, str] = {}

    def fetch(self, images, experts):
        self.fetches.append([(image.key, tuple(names)) for image, names in zip(images, experts, strict=True)])
        self.started.set()
        assert self.open.wait(30)
        return [{name: features() for name in names} for names in experts]


class TestCache:
    def test_least_recently_used_features_go_first(self):
        cache = LruFeatureCache(2 * features().tokens.nbytes)
        cache.put(("a", "sam"), features(1.0))
        cache.put(("b", "sam"), features(2.0))
        assert cache.get(("a", "sam")) is not None
        cache.put(("c", "sam"), features(3.0))
        kept = cache.get(("a", "sam"))
        assert cache.get(("b", "sam")) is None and kept is not None and kept.tokens[0] == 1
        assert cache.nbytes == 2 * features().tokens.nbytes

    @pytest.mark.parametrize("max_bytes", [0, 15])
    def test_features_larger_than_the_cache_are_not_stored(self, max_bytes):
        cache = LruFeatureCache(max_bytes)
        cache.put(("a", "sam"), features())
        assert cache.get(("a", "sam")) is None and cache.nbytes == 0


class TestPrefetcher:
    def test_requests_during_a_fetch_go_into_the_next_one_together(self):
        source = Source()
        source.open.clear()
        with FeaturePrefetcher(source, LruFeatureCache(1000)) as prefetcher:
            prefetcher.request([CAT], ["sam"])
            assert source.started.wait(30)
            prefetcher.request([CAT], ["vary", "sam"])
            prefetcher.request(IMAGES, ["vary"])
            source.open.set()
            assert prefetcher.result().keys() == {(CAT.key, "sam"), (CAT.key, "vary"), (DOG.key, "vary")}
        assert source.fetches == [[(CAT.key, ("sam",))], [(CAT.key, ("vary",)), (DOG.key, ("vary",))]]

    def test_cached_features_are_not_fetched(self):
        source, cache = Source(), LruFeatureCache(1000)
        for _ in range(2):
            with FeaturePrefetcher(source, cache) as prefetcher:
                prefetcher.request(IMAGES, ["sam"])
                assert len(prefetcher.result()) == 2
        assert len(source.fetches) == 1

    def test_errors_of_the_source_are_raised_by_the_result(self):
        class Failing(Source):
            def fetch(self, images, experts):
                raise OSError("the store is away")

        with FeaturePrefetcher(Failing(), LruFeatureCache(1000)) as prefetcher:
            prefetcher.request([CAT], ["sam"])
            with pytest.raises(OSError, match="away"):
                prefetcher.result()

    def test_features_of_the_source_are_fetched_once_though_the_cache_keeps_nothing(self):
        class Numbered(Source):
            def fetch(self, images, experts):
                super().fetch(images, experts)
                number = {CAT.key: 1.0, DOG.key: 2.0}
                return [
                    {name: features(number[image.key] + len(name) / 10) for name in names}
                    for image, names in zip(images, experts, strict=True)
                ]

        source, cache = Numbered(), LruFeatureCache(0)
        with FeaturePrefetcher(source, cache) as prefetcher:
            for images, experts in (([CAT], ["sam"]), ([DOG], ["sam", "vary"]), ([CAT], ["sam"]), (IMAGES, ["sam"])):
                prefetcher.request(images, experts)
                prefetcher.result()
            found = {key: row.tokens[0].item() for key, row in prefetcher.result().items()}
        wanted = {(CAT.key, "sam"): 1.3, (DOG.key, "sam"): 2.3, (DOG.key, "vary"): 2.4}
        assert found == pytest.approx(wanted)
        assert source.fetches == [[(CAT.key, ("sam",))], [(DOG.key, ("sam", "vary"))]]

    def test_leaving_waits_for_the_fetch_that_runs_and_drops_the_others(self):
        source, cache = Source(), LruFeatureCache(1000)
        source.open.clear()
        with FeaturePrefetcher(source, cache) as prefetcher:
            prefetcher.request([CAT], ["sam"])
            assert source.started.wait(30)
            prefetcher.request([DOG], ["sam"])
            threading.Timer(0.2, source.open.set).start()
        assert len(source.fetches) == 1 and cache.get((CAT.key, "sam")) is not None

"""Sources of features: experts run here, loaded when asked for, and a store in front of them."""

import logging
import resource
from contextlib import contextmanager

import pytest
import torch

from mova_core.experts import fingerprint, load_expert
from mova_core.features import FeatureStore, LazyExperts, LocalExperts, MissingFeatures, StoreError, Tiered
from mova_core.images import ImageError, ImageRef

NAMES = ("dinov2", "sam", "biomedclip")


@pytest.fixture(scope="module")
def experts():
    return {name: load_expert(name, size="mini") for name in NAMES}


@pytest.fixture
def images(pictures):
    return [ImageRef(path=path) for path in pictures]


class Counting(LocalExperts):
    """Counts what is computed."""

    def __init__(self, experts, batch_size=8):
        super().__init__(experts, batch_size)
        self.computed = []

    def fetch(self, images, experts):
        self.computed += [(image.key, name) for image, names in zip(images, experts, strict=True) for name in names]
        return super().fetch(images, experts)


def equal(one, other):
    return all(
        list(a) == list(b) and all(torch.equal(a[n].tokens, b[n].tokens) and a[n].grid == b[n].grid for n in a)
        for a, b in zip(one, other, strict=True)
    )


def test_local_experts(experts, images):
    asked = [["sam", "dinov2"], [], ["sam"], ["biomedclip"]]
    source = LocalExperts(experts, batch_size=2)
    got = source.fetch([*images, images[0]], asked)
    assert [list(row) for row in got] == asked
    for image, row in zip([*images, images[0]], got, strict=True):
        for name, (tokens, grid) in row.items():
            with torch.no_grad():
                whole = experts[name](experts[name].preprocess([image]))
            assert grid == whole.grid == experts[name].grid and tokens.shape == (
                grid[0] * grid[1],
                experts[name].channels,
            )
            torch.testing.assert_close(tokens, whole.tokens[0], atol=1e-5, rtol=1e-5)
    assert not got[0]["sam"].tokens.is_inference(), "a training step must be able to save it for its backward pass"
    assert source.fingerprints == {name: fingerprint(expert.describe()) for name, expert in experts.items()}
    assert source.fetch([], []) == []


class CountingRef(ImageRef):
    """Counts how often its bytes are read."""

    reads = 0

    def read(self):
        self.reads += 1
        return super().read()


def test_a_picture_is_decoded_once_for_all_its_experts(experts, images):
    image = CountingRef(path=images[0].path, key=images[0].key)
    got = LocalExperts(experts).fetch([image], [NAMES])
    assert image.reads == 1
    assert equal(got, LocalExperts(experts).fetch(images[:1], [NAMES]))


def test_what_local_experts_refuse(experts, images, tmp_path):
    with pytest.raises(ValueError, match=r"'vary'.*dinov2, sam, biomedclip"):
        LocalExperts(experts).fetch(images[:1], [["vary"]])
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png"):
        LocalExperts(experts).fetch([ImageRef(path=tmp_path / "empty.png")], [["sam"]])


def test_lazy_experts_load_what_is_asked_for(experts, images):
    known = {"sam": fingerprint(experts["sam"].describe()), "dinov2": "0" * 16}
    source = LazyExperts(NAMES, size="mini", fingerprints=known)
    assert source.fingerprints == known and not source.experts
    got = source.fetch(images[:2], [["sam"], ["sam"]])
    assert list(source.experts) == ["sam"]
    assert equal(got, LocalExperts(experts).fetch(images[:2], [["sam"], ["sam"]]))
    with pytest.raises(ValueError, match=f"dinov2.*wanted {'0' * 16}"):
        source.fetch(images[:1], [["dinov2"]])
    with pytest.raises(ValueError, match="vary"):
        source.fetch(images[:1], [["vary"]])


@pytest.mark.parametrize("lazy", [False, True])
def test_tiered_computes_once(experts, images, tmp_path, lazy):
    source = LazyExperts(NAMES, size="mini") if lazy else Counting(experts)
    store = FeatureStore(tmp_path / "store", create=True)
    tiered = Tiered(store, source)
    asked = [["sam"], ["sam", "dinov2"], []]
    first = tiered.fetch(images, asked)
    assert equal(first, LocalExperts(experts).fetch(images, asked))
    assert equal(first, tiered.fetch(images, asked)) and equal(first, FeatureStore(store.location).fetch(images, asked))
    more = tiered.fetch([*images, images[0]], [["dinov2"], ["dinov2", "sam"], ["sam"], ["sam"]])
    assert torch.equal(more[3]["sam"].tokens, first[0]["sam"].tokens)
    if isinstance(source, Counting):
        assert sorted(source.computed) == sorted({(images[at].key, name) for at, name in [
            (0, "sam"), (1, "sam"), (1, "dinov2"), (0, "dinov2"), (2, "sam"),
        ]})  # fmt: skip
    stat = FeatureStore(store.location).stat()["experts"]
    assert {name: row["features"] for name, row in stat.items() if row["features"]} == {"sam": 3, "dinov2": 2}
    assert tiered.fingerprints["sam"] == store.fingerprints["sam"] == fingerprint(experts["sam"].describe())
    assert list(store.verify()) == []


def test_a_tiered_store_alone_tells_what_is_missing(experts, images, tmp_path):
    store = FeatureStore(tmp_path / "store", create=True)
    Tiered(store, LocalExperts(experts)).fetch(images[:1], [["sam"]])
    with pytest.raises(MissingFeatures) as caught:
        FeatureStore(store.location).fetch(images[:2], [["sam"], ["sam", "dinov2"]])
    assert caught.value.missing == [(images[1].key, "sam"), (images[1].key, "dinov2")]


def test_a_smaller_stored_dtype_gives_the_same_bits_both_times(experts, images, tmp_path):
    """The first answer is as rounded as the second."""

    class Rounding(LocalExperts):
        @property
        def descriptions(self):
            return {name: expert.describe(torch.bfloat16) for name, expert in self.experts.items()}

    store = FeatureStore(tmp_path / "store", create=True)
    tiered = Tiered(store, Rounding(experts))
    first, second = (tiered.fetch(images, [["sam"]] * 3) for _ in range(2))
    assert first[0]["sam"].tokens.dtype == torch.bfloat16 and equal(first, second)


def test_a_store_of_other_weights_is_refused(experts, images, tmp_path):
    FeatureStore(tmp_path / "store", create=True).add_expert({**experts["sam"].describe(), "weights": "others"})
    [other] = FeatureStore(tmp_path / "store").experts()["sam"]
    pinned = FeatureStore(tmp_path / "store", fingerprints={"sam": other})
    with pytest.raises(StoreError, match=other):
        Tiered(pinned, LocalExperts(experts)).fetch(images[:1], [["sam"]])
    beside = Tiered(
        FeatureStore(tmp_path / "store"), LocalExperts(experts)
    )  # not pinned: the new weights get their shelf
    beside.fetch(images[:1], [["sam"]])
    assert len(beside.store.experts()["sam"]) == 2

    class Bare:
        fingerprints = LocalExperts(experts).fingerprints
        fetch = LocalExperts(experts).fetch

    with pytest.raises(StoreError, match=r"dinov2.*add_expert"):
        Tiered(FeatureStore(tmp_path / "store"), Bare()).fetch(images[:1], [["dinov2"]])


@contextmanager
def no_room():
    """No file of this process may pass 100 bytes, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_full_disk_does_not_stop_answers(experts, images, tmp_path, caplog):
    store = FeatureStore(tmp_path / "store", create=True)
    source = Counting(experts)
    tiered = Tiered(store, source)
    first = tiered.fetch(images[:2], [["sam"], []])
    with caplog.at_level(logging.WARNING), no_room():
        got = tiered.fetch(images, [["sam"]] * 3)
    assert equal(got[:1], first[:1]) and equal(got[1:], LocalExperts(experts).fetch(images[1:], [["sam"]] * 2))
    assert store.location in caplog.text and len(store.shelf("sam")) == 1
    assert equal(got, tiered.fetch(images, [["sam"]] * 3)) and len(store.shelf("sam")) == 3
    assert len(source.computed) == 5 and list(store.verify()) == []

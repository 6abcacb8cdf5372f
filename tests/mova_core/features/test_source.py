"""Sources of features: experts run here, loaded when asked for, and a store in front of them."""

import hashlib
import itertools
import logging
import random
import resource
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from mova_core.experts import Features, fingerprint, load_expert
from mova_core.features import (
    FeaturePartition,
    FeatureStore,
    LazyExperts,
    LocalExperts,
    MissingFeatures,
    StoreError,
    Tiered,
)
from mova_core.features.shard_writer import ShardWriter
from mova_core.features.single_flight import SingleFlight
from mova_core.images import DecodedImage, ImageError, ImageRef, read_image

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


def test_a_picture_is_decoded_once_for_all_its_experts(experts, images, monkeypatch):
    expected = [LocalExperts(experts).fetch(images[:1], [[name]])[0][name] for name in NAMES]
    reads = []

    def counting(path, newer_than=0.0):
        reads.append(path)
        return read_image(path, newer_than)

    monkeypatch.setattr("mova_core.images.read_image", counting)
    path, key = images[0].path, images[0].key
    shared = DecodedImage(ImageRef(path=path, key=key))
    for image in (ImageRef(path=path, key=key), shared, shared):
        assert equal(LocalExperts(experts).fetch([image], [NAMES]), [dict(zip(NAMES, expected, strict=True))])
    assert reads == [path, path], "once for the reference, once for the shared image"


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


def test_fingerprints_are_read_while_an_expert_is_loaded(experts, images, monkeypatch):
    """A thread that iterates over the experts loaded so far is not disturbed by one that loads another."""
    source = LazyExperts(NAMES, size="mini")
    source.fetch(images[:1], [["sam"]])

    def load_meanwhile(description):
        monkeypatch.undo()
        source.fetch(images[:1], [["dinov2"]])
        return fingerprint(description)

    monkeypatch.setattr("mova_core.experts.fingerprint", load_meanwhile)
    assert list(source.fingerprints) == ["sam"]
    assert set(source.fingerprints) == {"sam", "dinov2"}


def test_threads_of_lazy_experts_get_the_features_of_a_single_thread(experts, images):
    """Each of eight threads is the first to ask for some expert; each expert is loaded once."""
    requests = [[[NAMES[(start + at) % len(NAMES)]] for at in range(len(images))] for start in range(8)]
    expected = [LocalExperts(experts).fetch(images, request) for request in requests]
    source = LazyExperts(NAMES, size="mini")
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(source.fetch, images, request) for request in requests]
        while not all(answer.done() for answer in answers):
            assert source.fingerprints.keys() <= set(NAMES)
    for answer, wanted in zip(answers, expected, strict=True):
        assert equal(answer.result(), wanted)
    assert source.fingerprints == LocalExperts(experts).fingerprints


@pytest.mark.parametrize("lazy", [False, True])
def test_tiered_computes_once(experts, images, tmp_path, lazy):
    source = LazyExperts(NAMES, size="mini") if lazy else Counting(experts)
    store = FeatureStore(tmp_path / "store", create=True)
    tiered = Tiered(store, source)
    asked = [["sam"], ["sam", "dinov2"], []]
    first = tiered.fetch(images, asked)
    assert equal(first, LocalExperts(experts).fetch(images, asked))
    assert equal(first, tiered.fetch(images, asked)), "also while they wait to be written"
    tiered.flush()
    assert equal(first, tiered.fetch(images, asked)) and equal(first, FeatureStore(store.location).fetch(images, asked))
    more = tiered.fetch([*images, images[0]], [["dinov2"], ["dinov2", "sam"], ["sam"], ["sam"]])
    assert torch.equal(more[3]["sam"].tokens, first[0]["sam"].tokens)
    if isinstance(source, Counting):
        assert sorted(source.computed) == sorted({(images[at].key, name) for at, name in [
            (0, "sam"), (1, "sam"), (1, "dinov2"), (0, "dinov2"), (2, "sam"),
        ]})  # fmt: skip
    tiered.close()
    stat = FeatureStore(store.location).stat()["experts"]
    assert {name: row["features"] for name, row in stat.items() if row["features"]} == {"sam": 3, "dinov2": 2}
    assert tiered.fingerprints["sam"] == store.fingerprints["sam"] == fingerprint(experts["sam"].describe())
    assert list(store.verify()) == []


def test_the_store_alone_names_missing_features(experts, images, tmp_path):
    store = FeatureStore(tmp_path / "store", create=True)
    with Tiered(store, LocalExperts(experts)) as tiered:
        tiered.fetch(images[:1], [["sam"]])
    with pytest.raises(MissingFeatures) as caught:
        FeatureStore(store.location).fetch(images[:2], [["sam"], ["sam", "dinov2"]])
    assert caught.value.missing == [(images[1].key, "sam"), (images[1].key, "dinov2")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_a_smaller_stored_dtype_gives_the_same_bits_each_time(experts, images, tmp_path, dtype):
    """The first answer is as rounded as the one while it waits to be written, and as the one out of the store."""
    source = Counting(experts)
    tiered = Tiered(FeatureStore(tmp_path / "store", create=True), source, dtypes={"sam": dtype})
    first, second = (tiered.fetch(images, [["sam"]] * 3) for _ in range(2))
    tiered.flush()
    third = tiered.fetch(images, [["sam"]] * 3)
    assert equal(first, second) and equal(first, third) and len(source.computed) == 3
    store = FeatureStore(tmp_path / "store")
    assert equal(first, store.fetch(images, [["sam"]] * 3)) and store.partition("sam").description["dtype"] == dtype
    assert tiered.fingerprints["sam"] == store.fingerprints["sam"] != source.fingerprints["sam"]
    exact = LocalExperts(experts).fetch(images, [["sam"]] * 3)
    for got, wanted in zip(first, exact, strict=True):
        assert 0 < (got["sam"].tokens.float() - wanted["sam"].tokens).norm() / wanted["sam"].tokens.norm() < 0.05


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_lazy_experts_answer_as_the_partition_they_are_wanted_for(experts, images, tmp_path, dtype, computed):
    expert = load_expert("sam", size="mini", dtype=computed)
    with Tiered(
        FeatureStore(tmp_path / "store", create=True), LocalExperts({"sam": expert}), dtypes={"sam": dtype}
    ) as tiered:
        stored = tiered.fetch(images, [["sam"]] * 3)
    wanted = FeatureStore(tmp_path / "store").fingerprints
    lazy = LazyExperts(NAMES, size="mini", fingerprints=wanted, dtypes={"sam": dtype})
    assert equal(lazy.fetch(images, [["sam"]] * 3), stored) and lazy.fingerprints == wanted
    idle = LazyExperts(NAMES, size="mini", fingerprints=wanted)
    again = Tiered(FeatureStore(tmp_path / "store"), idle)
    assert equal(again.fetch(images, [["sam"]] * 3), stored) and not idle.experts, "nothing was computed"


class Slow(Counting):
    """Computes when it is let; the first time it may fail."""

    def __init__(self, experts, fails=False):
        super().__init__(experts)
        self.open, self.fails = threading.Event(), fails

    def fetch(self, images, experts):
        fails, self.fails = self.fails, False
        assert self.open.wait(20)
        if fails:
            raise ImageError("not today")
        return super().fetch(images, experts)


@pytest.mark.parametrize("fails", [False, True])
def test_concurrent_requests_for_a_key_compute_it_once(experts, images, tmp_path, fails):
    source = Slow(experts, fails)
    expected = LocalExperts(experts).fetch(images, [["sam", "biomedclip"]] * 3)
    with Tiered(FeatureStore(tmp_path / "store", create=True), source) as tiered, ThreadPoolExecutor(12) as threads:
        asked = [
            threads.submit(tiered.fetch, images[at:] + images[:at], [["sam", "biomedclip"]] * 3)
            for at in (0, 1, 2, 0) * 3
        ]
        time.sleep(0.2)
        source.open.set()
        errors = 0
        for at, answer in zip((0, 1, 2, 0) * 3, asked, strict=True):
            if isinstance(answer.exception(20), ImageError):
                errors += 1
            else:
                assert equal(answer.result(), expected[at:] + expected[:at])
    assert errors == fails, "the error is of who computed, the others try themselves"
    assert len(source.computed) == len(set(source.computed)) == 6
    assert len(FeatureStore(tmp_path / "store").partition("sam")) == 3


def test_waiting_threads_retry_a_failed_computation():
    """Many threads, overlapping wishes, every third computation fails: each gets all it wants or its own error."""
    flights: SingleFlight[int, int] = SingleFlight()
    lock, times = threading.Lock(), itertools.count()
    under_way: set[int] = set()

    def compute(keys):
        with lock:
            assert under_way.isdisjoint(keys), "twice at a time"
            under_way.update(keys)
        time.sleep(0.001)
        with lock:
            under_way.difference_update(keys)
        if next(times) % 3 == 2:
            raise KeyError("mine")
        return {key: key * key for key in keys}

    def ask(seed):
        wanted = random.Random(seed).sample(range(12), 5)
        try:
            return flights.run(wanted, compute) == {key: key * key for key in wanted}
        except KeyError:
            return True

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(ask, range(400)))
    assert not flights._under_way


def test_features_written_back_are_gathered_into_shards(experts, images, tmp_path):
    """One request a picture makes one shard, not one each; a full one is written at once, a lone one after its time."""
    store, told = FeatureStore(tmp_path / "store", create=True), []

    class Telemetry:
        def observe(self, name, value, **tags):
            told.append((name, value, tags["expert"]))

    tiered = Tiered(store, LocalExperts(experts), shard_seconds=60, telemetry=Telemetry())
    for image in (*images, *images):
        tiered.fetch([image], [["sam"]])
    assert len(FeatureStore(store.location).partition("sam")) == 0, "they wait"
    tiered.flush()
    assert FeatureStore(store.location).stat()["experts"]["sam"]["shards"] == 1
    assert Counter(told) == {("mova_tiered_hits_total", 1, "sam"): 3, ("mova_tiered_misses_total", 0, "sam"): 3} | {
        ("mova_tiered_hits_total", 0, "sam"): 3, ("mova_tiered_misses_total", 1, "sam"): 3
    }  # fmt: skip

    size = store.partition("sam").stat()["bytes_per_feature"]
    full = Tiered(FeatureStore(tmp_path / "full", create=True), LocalExperts(experts), shard_bytes=2 * size)
    for image in images:
        full.fetch([image], [["sam"]])
    quick = Tiered(FeatureStore(tmp_path / "quick", create=True), LocalExperts(experts), shard_seconds=0.05)
    quick.fetch(images[:1], [["sam"]])
    until = time.monotonic() + 20
    while len(full.store.partition("sam")) < 2 or len(quick.store.partition("sam")) < 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    full.close()
    assert full.store.stat()["experts"]["sam"]["shards"] == 2
    full.fetch(images[:1], [["dinov2"]])  # closed, it still answers
    assert "dinov2" not in full.store.stat()["experts"] or not len(full.store.partition("dinov2"))


def test_features_written_back_are_merged_into_snapshots(tmp_path, monkeypatch, caplog):
    """A serving store does not grow by a receipt every few seconds that every new process opens."""
    due = 8
    monkeypatch.setattr("mova_core.features.shard_writer.SNAPSHOT_RECEIPTS", due)
    store = FeatureStore(tmp_path / "store", create=True)
    partition = store.add_expert({"expert": "sam", "dtype": "float32"})
    writer = ShardWriter(shard_bytes=1, shard_seconds=60)

    def write(numbers):
        for number in numbers:
            tokens = torch.full((1, 1), float(number))
            writer.put(partition, {hashlib.sha256(bytes([number])).hexdigest(): Features(tokens, (1, 1))})
        writer.flush()

    write(range(due - 1))
    assert partition.snapshot_number == 0
    write(range(due - 1, 2 * due))
    assert partition.snapshot_number == 2
    with monkeypatch.context() as unread:
        unread.setattr(FeaturePartition, "receipt", lambda self, shard_id: pytest.fail("a receipt was read"))
        assert len(FeaturePartition(partition.location)) == 2 * due

    def refuse(self):
        raise StoreError("no room for a snapshot")

    with monkeypatch.context() as refused:
        refused.setattr(FeaturePartition, "snapshot", refuse)
        write(range(2 * due, 3 * due))
    assert "no room for a snapshot (8 receipts stay outside" in caplog.text and len(caplog.records) == 1
    assert len(FeaturePartition(partition.location)) == 3 * due
    write([3 * due])
    assert partition.snapshot_number == 3
    writer.close()


def test_a_slow_disk_holds_requests_back(experts, images, tmp_path, monkeypatch):
    """What waits to be written is bounded."""
    store = FeatureStore(tmp_path / "store", create=True)
    tiered, open_ = Tiered(store, LocalExperts(experts), shard_bytes=1), threading.Event()
    write = FeaturePartition.write
    monkeypatch.setattr(FeaturePartition, "write", lambda *given: (open_.wait(20), write(*given))[1])
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(lambda: [tiered.fetch([image], [["sam"]]) for image in images])
        time.sleep(0.3)
        assert not asked.done()
        open_.set()
        asked.result(20)
    tiered.close()
    assert len(FeatureStore(store.location).partition("sam")) == 3


def test_a_store_of_other_weights_is_refused(experts, images, tmp_path):
    FeatureStore(tmp_path / "store", create=True).add_expert({**experts["sam"].describe(), "weights": "others"})
    [other] = FeatureStore(tmp_path / "store").experts()["sam"]
    pinned = FeatureStore(tmp_path / "store", fingerprints={"sam": other})
    with pytest.raises(StoreError, match=other):
        Tiered(pinned, LocalExperts(experts)).fetch(images[:1], [["sam"]])
    beside = Tiered(
        FeatureStore(tmp_path / "store"), LocalExperts(experts)
    )  # not pinned: the new weights get their partition
    beside.fetch(images[:1], [["sam"]])
    beside.close()
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
    tiered.flush()
    with caplog.at_level(logging.WARNING), no_room():
        got = tiered.fetch(images, [["sam"]] * 3)
        tiered.flush()
    assert equal(got[:1], first[:1]) and equal(got[1:], LocalExperts(experts).fetch(images[1:], [["sam"]] * 2))
    assert store.location in caplog.text and len(store.partition("sam")) == 1
    assert equal(got, tiered.fetch(images, [["sam"]] * 3))
    tiered.close()
    assert len(store.partition("sam")) == 3
    assert len(source.computed) == 5 and list(store.verify()) == []

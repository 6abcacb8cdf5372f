"""Reading a store in training: positions, order, broken-off epochs."""

import itertools
import pickle
from pathlib import Path
from zlib import crc32

import pytest
import torch

from mova_core.experts import Features
from mova_core.features import FeatureBatches, FeatureReader, FeatureStore, MissingFeatures
from mova_core.images import ImageRef
from mova_core.samplers import epoch_order

COUNT = 26


def key(number: int) -> str:
    """A sha256 would be as arbitrary; some end in zero bytes, which text would lose."""
    return f"{number * 7919 % 256:02x}{number:060x}00"


def feature(number: int, name: str) -> Features:
    grid = (2, 3 + number % 2)
    return Features(torch.full((grid[0] * grid[1], 4), number + (0.5 if name == "sam" else 0.0)), grid)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """`sam` has all, `dinov2` those of even numbers."""
    store = FeatureStore(tmp_path_factory.mktemp("reader") / "store", create=True)
    for name, step in (("sam", 1), ("dinov2", 2)):
        partition = store.add_expert(
            {"expert": name, "dtype": "float32", "weights": "w", "grid": [2, 3], "channels": 4}
        )
        for half in (range(0, COUNT // 2), range(COUNT // 2, COUNT)):
            features = {key(number): feature(number, name) for number in half if number % step == 0}
            partition.write(partition.shard_id(features), features)
    return store


def numbers(batch) -> list[int]:
    """What was read, by the values of its tokens."""
    return [int(row["sam"].tokens[0, 0]) for row in batch]


def test_positions(store):
    every = FeatureReader(store, ["sam"])
    assert len(every) == COUNT and [every.key(at) for at in range(COUNT)] == sorted(map(key, range(COUNT)))
    both = FeatureReader(store, ["sam", "dinov2"])
    assert sorted(both.key(at) for at in range(len(both))) == sorted(key(number) for number in range(0, COUNT, 2))
    given = FeatureReader(store, ["sam"], [key(5), ImageRef(path="somewhere", key=key(0)), key(5)])
    assert numbers(given.__getitems__([0, 1, 2, 1])) == [5, 0, 5, 0] and numbers([given[2]]) == [5]
    own = FeatureReader(store, [["sam"], [], ["dinov2", "sam"], ["sam"]], [key(1), key(2), key(4), key(2)])
    for at, (row, number) in enumerate(zip(own.__getitems__(range(4)), (1, 2, 4, 2), strict=True)):
        assert list(row) == list(own.experts(at)) == [["sam"], [], ["dinov2", "sam"], ["sam"]][at]
        for name, got in row.items():
            wanted = feature(number, name)
            assert torch.equal(got.tokens, wanted.tokens) and got.grid == wanted.grid


def test_what_a_reader_refuses(store, tmp_path):
    with pytest.raises(MissingFeatures) as caught:
        FeatureReader(store, [["sam"], ["sam", "dinov2"], ["dinov2"]], [key(1), key(3), key(4)])
    assert caught.value.missing == [(key(3), "dinov2")]
    with pytest.raises(ValueError, match="2 lists of experts for 1 images"):
        FeatureReader(store, [["sam"], ["sam"]], [key(1)])
    with pytest.raises(ValueError, match="give the names of the experts"):
        FeatureReader(store, [])
    with pytest.raises(ValueError, match="no image key"):
        FeatureReader(store, ["sam"], ["cat.png"])
    for size, world in ((0, 1), (27, 1), (2, 3)):
        with pytest.raises(ValueError, match=f"batch_size {size} must be"):
            FeatureBatches(FeatureReader(store, ["sam"]), size, world=world)


def test_a_reader_pickles_to_32_bytes_an_image(store):
    reader = FeatureReader(store, ["sam"], [key(at % COUNT) for at in range(2000)])
    packed = pickle.dumps(reader)
    assert len(packed) < 2000 * 32 + 2000
    assert numbers(pickle.loads(packed).__getitems__([3, 1999])) == [3, 1999 % COUNT]


def test_the_order_of_an_epoch(store):
    reader = FeatureReader(store, ["sam"])
    batches = FeatureBatches(reader, 5, seed=3)
    first, second = ([numbers(batch) for batch in batches] for _ in range(2))
    assert len(first) == len(second) == len(batches) == 5 and first != second and batches.epoch == 2
    assert all(len(set(itertools.chain(*epoch))) == 25 for epoch in (first, second)), "each once"
    assert [numbers(batch) for batch in FeatureBatches(reader, 5, seed=3)] == first
    assert [numbers(batch) for batch in FeatureBatches(reader, 5, seed=4)] != first
    plain = FeatureBatches(reader, 5, shuffle=False)
    for _ in range(2):
        keys = [key(number) for batch in plain for number in numbers(batch)]
        assert keys == [reader.key(at) for at in range(25)]
    thirds = [FeatureBatches(reader, 5, seed=3, rank=rank, world=3) for rank in range(3)]
    for whole, *parts in zip(first, *thirds, strict=True):
        assert [len(part) for part in parts] == [2, 2, 1]
        assert sorted(whole) == sorted(itertools.chain(*map(numbers, parts)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_epoch_resumes_with_the_same_batches(store, workers):
    reader = FeatureReader(store, ["sam"])

    def batches(state=None, **more):
        made = FeatureBatches(reader, 5, seed=1, workers=workers, **more)
        if state is not None:
            made.load_state_dict(state)
        return made

    unbroken = FeatureBatches(reader, 5, seed=1)
    wanted = [numbers(batch) for _ in range(2) for batch in unbroken]
    for end in range(1, 6) if workers == 0 else (2, 5):
        broken = batches()
        got = [numbers(batch) for batch in itertools.islice(broken, end)]
        resumed = batches(pickle.loads(pickle.dumps(broken.state_dict())))
        while resumed.epoch < 2:
            got += [numbers(batch) for batch in resumed]
        assert got == wanted, f"broken off after {end}"
    state = {**batches().state_dict(), "batch": 3}
    ranks = [batches(state, rank=rank, world=2) for rank in range(2)]  # of one rank, gone on with two
    for whole, *parts in zip(wanted[3:5], *ranks, strict=True):
        assert sorted(whole) == sorted(itertools.chain(*map(numbers, parts)))
    for name, value in (("seed", 2), ("samples", 27), ("batch_size", 4)):
        with pytest.raises(ValueError, match=f"batches with {name} {value}, these have"):
            batches({**state, name: value})


def test_a_damaged_row_ends_the_epoch_with_its_reason(tmp_path):
    store = FeatureStore(tmp_path / "store", create=True)
    partition = store.add_expert({"expert": "sam", "dtype": "float32", "weights": "w"})
    partition.write("0" * 32, {key(number): feature(number, "sam") for number in range(4)})
    [shard] = (Path(partition.location) / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[-4096] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Exception, match=r"damaged.*mova store verify"):
        list(FeatureBatches(FeatureReader(store, ["sam"]), 2))


def test_all_that_is_missing_is_named_expert_by_expert(store):
    store = FeatureStore(store.location)
    with pytest.raises(MissingFeatures) as caught:
        FeatureReader(store, [["dinov2"], ["sam", "dinov2"], ["sam"], ["dinov2"]], [key(1), key(3), key(99), key(4)])
    assert sorted(caught.value.missing) == sorted([(key(1), "dinov2"), (key(3), "dinov2"), (key(99), "sam")])


class Positions:
    """A reader whose batches are its positions; remembers the epochs it was told."""

    def __init__(self, count: int):
        self.count, self.epochs = count, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, positions):
        return [int(position) for position in positions]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_a_reader_is_told_each_epoch_and_smallest_batches_are_allowed():
    reader = Positions(6)
    batches = FeatureBatches(reader, 6, seed=3)  # one batch of all
    assert [sorted(batch) for _ in range(3) for batch in batches] == [list(range(6))] * 3 and reader.epochs == [0, 1, 2]
    ranks = [
        list(FeatureBatches(Positions(6), 2, seed=3, rank=rank, world=2)) for rank in range(2)
    ]  # a sample for each
    assert sorted(position for batches in ranks for [position] in batches) == list(range(6))
    with pytest.raises(ValueError, match="at least the 0 ranks"):
        FeatureBatches(Positions(6), 2, world=0)


def test_batches_follow_the_order_of_the_sampler():
    """By default of seed 0; lengths and the batch's size reach the sampler, and change what it does."""
    lengths = [(-1) ** number * (10 + number) for number in range(40)]  # half with pictures, half without
    seen = []
    for options in ({"seed": 1, "lengths": lengths}, {"seed": 1}, {"shuffle": False}, {}):
        order = epoch_order(40, **{"seed": 0, **options}, epoch=0, batch_size=4)  # type: ignore[arg-type]
        batches = list(FeatureBatches(Positions(40), 4, **options))  # type: ignore[arg-type]
        assert batches == order.reshape(10, 4).tolist() and batches not in seen
        seen.append(batches)
    assert epoch_order(40, 1, 0, lengths=lengths).reshape(10, 4).tolist() not in seen, "the size of a group counts"


def test_a_run_resumes_only_in_the_same_order():
    """The state's own keys stay: they lie in checkpoints."""
    lengths = list(range(1, 41))
    batches = FeatureBatches(Positions(40), 4, seed=1, lengths=lengths)
    next(iter(batches))
    state = batches.state_dict()
    checksum = crc32(b"".join(length.to_bytes(8, "little") for length in lengths))
    assert state == {
        "epoch": 0,
        "batch": 1,
        "samples": 40,
        "batch_size": 4,
        "seed": 1,
        "shuffle": 1,
        "lengths": checksum,
    }
    others = {
        "samples": FeatureBatches(Positions(41), 4, seed=1),
        "batch_size": FeatureBatches(Positions(40), 5, seed=1, lengths=lengths),
        "seed": FeatureBatches(Positions(40), 4, seed=2, lengths=lengths),
        "shuffle": FeatureBatches(Positions(40), 4, seed=1, shuffle=False, lengths=lengths),
        "lengths": FeatureBatches(Positions(40), 4, seed=1, lengths=lengths[::-1]),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"the state is of batches with {name} "):
            other.load_state_dict(state)
    plain = FeatureBatches(Positions(40), 4, seed=1)
    old = {name: value for name, value in plain.state_dict().items() if name != "lengths"}  # as written before lengths
    plain.load_state_dict({**old, "batch": 3})
    assert plain.batch == 3 and plain.state_dict()["lengths"] == 0

"""The feature store on a real disk: exact bytes, one winner, crashes at every step and byte, damage, a full disk.

The file is also a program: `test_store.py <act> <folder>` runs one act in a process of its own, to be killed or raced.
"""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from mova_core.experts import Features, fingerprint
from mova_core.features import FeaturePartition, FeatureStore, MissingFeatures, StoreError
from mova_core.features.index import RECEIPT, binary_keys
from mova_core.features.storage import LocalStorage
from mova_core.images import ImageRef

GRID, CHANNELS = (3, 5), 7  # no row is a multiple of a page, nor of 64 bytes
DTYPES = ("float32", "bfloat16", "float16")


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


KEYS = [key(number) for number in range(20)]


def describe(expert="clip", weights="one", dtype="float32"):
    return {"expert": expert, "weights": weights, "dtype": dtype, "grid": list(GRID), "channels": CHANNELS}


def features(keys, dtype=torch.float32, grid=GRID, channels=CHANNELS):
    """The same key always has the same feature."""
    made = {}
    for name in keys:
        generator = torch.Generator().manual_seed(int(name[:8], 16))
        made[name] = Features(torch.randn(grid[0] * grid[1], channels, generator=generator).to(dtype), grid)
    return made


def same(partition, keys, dtype=torch.float32):
    """Whether the partition gives exactly these features, and those of no other grid or dtype."""
    wanted = features(keys, dtype)
    return all(
        got.grid == wanted[name].grid and got.tokens.dtype == dtype and torch.equal(got.tokens, wanted[name].tokens)
        for name, got in zip(keys, partition.read(keys), strict=True)
    )


def fill(partition, keys, rows_per_shard=6, dtype=torch.float32):
    for shard in partition.plan(keys, rows_per_shard):
        partition.write(shard.id, features(shard.keys, dtype))


def files(folder):
    """Every file under a folder but temporary ones, relative."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file() and path.name[0] != "."}


def flip(path, at, mask=1):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store", create=True)


@pytest.fixture
def partition(store):
    return store.add_expert(describe())


# What is written is what is read


@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_is_restored(store, name):
    dtype = getattr(torch, name)
    bits = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}[name]
    partition = store.add_expert(describe(dtype=name))
    special = [float("nan"), float("inf"), -float("inf"), -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4]
    tokens = torch.randn(15, 7).to(dtype)
    tokens[0, :6] = torch.tensor(special, dtype=dtype)
    tokens[1].view(bits)[:3] = torch.tensor(
        [-1, 1, torch.iinfo(bits).max], dtype=bits
    )  # NaNs with a payload, a denormal
    rows = partition.write(partition.shard_id(KEYS[:1]), {KEYS[0]: Features(tokens, GRID)})
    for reader in (partition, FeatureStore(store.location).partition("clip")):
        [read] = reader.read(KEYS[:1])
        assert read.grid == GRID and read.tokens.dtype == dtype
        assert torch.equal(read.tokens.view(bits), tokens.view(bits))
    with safe_open(Path(partition.location) / "shards" / rows[0]["file"], "pt") as plain:  # as any tool opens it
        stored = plain.get_tensor(KEYS[0])
    assert stored.shape == (3, 5, 7) and torch.equal(stored.view(bits).view(15, 7), tokens.view(bits))
    assert rows[0]["loss"] == 0.0


def test_casting_records_its_loss(store):
    partition = store.add_expert(describe(dtype="bfloat16"))
    tokens = torch.randn(15, 7)
    [row] = partition.write("a" * 32, {KEYS[0]: Features(tokens, GRID)})
    [read] = partition.read(KEYS[:1])
    assert torch.equal(read.tokens, tokens.bfloat16())
    assert row["loss"] == pytest.approx(((tokens.bfloat16() - tokens).norm() / tokens.norm()).item(), rel=1e-4)
    assert 1e-4 < store.stat()["experts"]["clip"]["fingerprints"][partition.fingerprint]["loss"] < 4e-3


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn"])
def test_scaled_codecs(store, name):
    """One scale per channel: an outlier channel does not cost the others their precision."""
    partition = store.add_expert(describe(dtype=name))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(100, 8, generator=generator) * torch.tensor([1e-3, 1, 1, 1, 1, 1, 0, 1e4])
    [row] = partition.write("a" * 32, {KEYS[0]: Features(tokens, (10, 10))})
    [read] = partition.read(KEYS[:1])
    error, peak = (read.tokens - tokens).abs(), tokens.abs().amax(0)
    if name == "int8":  # half a step of 127
        assert (error <= peak / 254 * 1.0001).all()
    else:  # half of the last of 3 bits, or half the smallest step
        assert (error <= (tokens.abs() / 16).maximum(peak / 448 * 2**-10) * 1.0001).all()
    assert read.tokens.dtype == torch.float32 and row["length"] == 8 * 4 + 800
    assert row["loss"] == pytest.approx((error.norm() / tokens.norm()).item(), rel=1e-4)
    with safe_open(Path(partition.location) / "shards" / row["file"], "pt") as plain:
        restored = plain.get_tensor(KEYS[0]).float().view(100, 8) * plain.get_tensor(f"{KEYS[0]}.scale")
    assert torch.equal(restored, read.tokens)
    with pytest.raises(ValueError, match=KEYS[1]):
        partition.write("b" * 32, {KEYS[1]: Features(torch.full((15, 7), torch.nan), GRID)})


def test_what_a_dtype_cannot_hold_is_refused(store):
    partition = store.add_expert(describe(dtype="float16"))
    with pytest.raises(ValueError, match="float16 cannot hold 1e\\+05"):
        partition.write("a" * 32, {KEYS[0]: Features(torch.full((15, 7), 1e5), GRID)})
    with pytest.raises(ValueError, match="H\\*W"):
        partition.write("a" * 32, {KEYS[0]: Features(torch.zeros(14, 7), GRID)})
    with pytest.raises(ValueError, match="sha256"):
        partition.write("a" * 32, {"photo.jpg": Features(torch.zeros(15, 7), GRID)})
    with pytest.raises(ValueError, match="int64"):
        store.add_expert(describe(dtype="int64"))
    assert files(Path(partition.location)) == {"expert.json"}


def test_layout(store, partition):
    fill(partition, KEYS)
    partition.snapshot()
    store.quarantine([{"image": "a.png", "sha256": None, "reason": "0 bytes", "expert": "clip"}])
    folder = Path("clip", fingerprint(describe()))
    shards = partition.plan(KEYS, 6) == [] and FeatureStore(store.location).partition("clip")
    receipts = sorted((Path(store.location) / folder / "receipts").iterdir())
    assert len(shards) == 20 and len(receipts) == 4
    for receipt in receipts:
        rows = pq.read_table(receipt).to_pylist()
        assert list(rows[0]) == ["key", "file", "offset", "length", "grid", "dtype", "channels", "xxh3", "loss"]
        assert {row["file"].split("-")[0] for row in rows} == {receipt.stem}
        assert all(row["offset"] % 4096 == 0 for row in rows)
        with safe_open(Path(store.location) / folder / "shards" / rows[0]["file"], "pt") as plain:
            assert {row["key"] for row in rows} == {name for name in plain.keys() if len(name) == 64}  # noqa: SIM118
            assert plain.metadata()["fingerprint"] == folder.name
    assert {str(Path(name).parent) for name in files(store.location)} == {
        ".", "quarantine", str(folder), *(str(folder / name) for name in ("shards", "receipts", "index", "snapshots")),
    }  # fmt: skip
    assert json.loads((Path(store.location) / "store.json").read_text()) == {"format": 1}


def test_grids_may_differ(partition):
    partition.write("a" * 32, features(KEYS[:2]) | features(KEYS[2:3], grid=(2, 2), channels=3))
    assert [read.tokens.shape for read in partition.read(KEYS[:3])] == [(15, 7), (15, 7), (4, 3)]
    assert torch.equal(
        partition.read(KEYS[2:3])[0].tokens, features(KEYS[2:3], grid=(2, 2), channels=3)[KEYS[2]].tokens
    )


def test_reading_into_a_buffer(store):
    partition = store.add_expert(describe())
    big = features(KEYS, grid=(64, 64), channels=16)  # 256 KiB a row: the reading threads take part
    partition.write("a" * 32, big)
    buffer = torch.zeros(20 * 64 * 64 * 16 * 4, dtype=torch.uint8)
    keys = [*reversed(KEYS)]
    read = partition.read(keys, out=buffer)
    whole = buffer.view(torch.float32).view(20, 64 * 64, 16)
    assert all(torch.equal(whole[at], big[name].tokens) for at, name in enumerate(keys))
    assert read[3].tokens.data_ptr() == whole[3].data_ptr()
    twice = partition.read([KEYS[1], KEYS[1]])
    assert torch.equal(twice[0].tokens, twice[1].tokens) and partition.read([]) == []
    with pytest.raises(ValueError, match=str(buffer.numel())):
        partition.read(keys, out=buffer[1:])


@pytest.mark.parametrize("side", [2, 64])  # copied, and mapped
def test_a_feature_is_the_callers_own(partition, side):
    """What is done to it changes neither the file nor what the next one gets."""
    made = features(KEYS, grid=(side, side), channels=16)
    partition.write("a" * 32, made)
    for feature in partition.read(KEYS):
        feature.tokens.mul_(2)
    for verify in (True, False):
        read = partition.read(KEYS, verify=verify)
        assert all(torch.equal(one.tokens, made[key].tokens) for key, one in zip(KEYS, read, strict=True))
    assert torch.equal(FeaturePartition(partition.location).read(KEYS[:1])[0].tokens, made[KEYS[0]].tokens)


def test_any_number_of_features_can_be_held(partition):
    """Linux allows a process 65,530 mappings, for its stacks and libraries, too."""
    made = features(KEYS[:1], grid=(64, 64), channels=16)
    partition.write("a" * 32, made)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    held = partition.read(KEYS[:1] * 17_000, verify=False)
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 17_000
    assert all(torch.equal(held[at].tokens, made[KEYS[0]].tokens) for at in (0, -1))


def test_reading_what_is_not_in_memory(partition):
    made = features(KEYS, grid=(64, 64), channels=16)
    partition.write("a" * 32, made)
    (path,) = Path(partition.location, "shards").iterdir()
    for keys in (KEYS, KEYS[3:4]):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read = FeaturePartition(partition.location).read(keys)
        assert all(torch.equal(one.tokens, made[key].tokens) for key, one in zip(keys, read, strict=True))
    opened = FeaturePartition(partition.location)
    opened.read(KEYS[:1])
    os.truncate(path, path.stat().st_size // 2)  # under a reader that has it mapped: an error, and no signal
    with pytest.raises(StoreError, match="ends before it"):
        opened.read(KEYS)


# Planning


def test_the_same_work_has_the_same_name(store, partition):
    assert partition.shard_id(KEYS) == partition.shard_id(reversed(KEYS))
    assert partition.shard_id(KEYS) != store.add_expert(describe(weights="two")).shard_id(KEYS)
    plan = partition.plan([*KEYS, *KEYS], 6)
    assert [name for shard in plan for name in shard.keys] == KEYS and [len(shard.keys) for shard in plan] == [
        6,
        6,
        6,
        2,
    ]
    assert plan == partition.plan(KEYS, 6)
    assert not partition.committed(plan[0].id)
    first = partition.write(plan[0].id, features(plan[0].keys))
    assert partition.committed(plan[0].id) and partition.plan(KEYS, 6) == plan[1:]
    assert partition.write(plan[0].id, {}) == [] and partition.write(plan[0].id, features(plan[0].keys)) == first
    assert len(os.listdir(Path(partition.location) / "shards")) == 1


def test_keys_as_bytes(store, partition):
    """A plan of millions is an array: which positions are absent, the first of each, and the same names for them."""
    wanted = [*KEYS[6:], *KEYS[:2], *KEYS]
    fill(partition, KEYS[3:8])
    for number in range(2):
        at = partition.missing_positions(binary_keys(wanted))
        assert [wanted[i] for i in at] == [*KEYS[8:], *KEYS[:2], KEYS[2]]
        assert at.tolist() == sorted(at) == [wanted.index(wanted[i]) for i in at]
        partition.snapshot() if number == 0 else None
    assert partition.shard_id(binary_keys(wanted)) == partition.shard_id(wanted)
    assert partition.missing_positions(binary_keys([])).tolist() == [] and partition.shard_id(
        binary_keys([])
    ) == partition.shard_id([])
    alike = binary_keys([f"{'a' * 16}{number % 3:048}" for number in range(9)])  # their first bytes are the same
    assert partition.missing_positions(alike).tolist() == [0, 1, 2]
    FeatureStore(store.location).partition("clip").write("a" * 32, features([KEYS[2]]))
    assert KEYS[2] not in [wanted[i] for i in partition.missing_positions(binary_keys(wanted))], "refreshes first"


def test_a_shard_may_lack_rows(partition):
    """Images that cannot be read are left out, and planned again if asked for again; so are shards of nothing else."""
    [shard] = partition.plan(KEYS[:4], 4)
    partition.write(shard.id, features(KEYS[:3]))
    assert partition.missing(KEYS[:4]) == [KEYS[3]]
    [again] = partition.plan(KEYS[:4], 4)
    assert again.keys == [KEYS[3]] and partition.write(again.id, {}) == [] and not partition.committed(again.id)
    partition.write(again.id, features(again.keys))
    assert partition.plan(KEYS[:4], 4) == [] and same(partition, KEYS[:4])


@pytest.mark.slow
def test_a_million_keys_are_planned_fast(store, partition):
    million, rows = 1_000_000, 5000
    held = np.random.default_rng(0).bytes(32 * million)
    keys = [held[at : at + 32].hex() for at in range(0, len(held), 32)]
    for at in range(0, million, rows):
        chunk = keys[at : at + rows]
        shard = partition.shard_id(chunk)
        columns = [
            chunk,
            [f"{shard}-0.safetensors"] * rows,
            range(rows),
            [420] * rows,
            [[3, 5]] * rows,
            ["float32"] * rows,
        ]
        table = pa.table([*columns, [7] * rows, range(rows), [0.0] * rows], schema=RECEIPT)
        pq.write_table(table, Path(partition.location) / "receipts" / f"{shard}.parquet")
    wanted = [*keys, *(key(number) for number in range(100_000))]
    random.Random(0).shuffle(wanted)

    def seconds(act):
        begin = time.perf_counter()
        return act(), time.perf_counter() - begin

    from_receipts, reading = seconds(lambda: FeaturePartition(partition.location))
    plan, planning = seconds(lambda: from_receipts.plan(wanted, 50))
    assert sum(len(shard.keys) for shard in plan) == 100_000 and len(from_receipts) == million
    _, merging = seconds(from_receipts.snapshot)
    from_index, mapping = seconds(lambda: FeaturePartition(partition.location))
    again, searching = seconds(lambda: from_index.plan(wanted, 50))
    _, finding = seconds(lambda: [from_index.has(wanted[at : at + 8]) for at in range(0, 8000, 8)])
    print(
        f"1e6 keys: receipts {reading:.2f} s, plan {planning:.2f} s, snapshot {merging:.2f} s, index {mapping:.3f} s, "
        f"plan {searching:.2f} s, batch of 8 {finding * 1e3:.0f} us"
    )
    assert plan == again
    assert reading + planning < 20 and mapping < 1 and searching < 10


# Which weights


def test_pinned_fingerprints(store, tmp_path):
    one, two = (store.add_expert(describe(weights=weights)).fingerprint for weights in ("one", "two"))
    fill(store.partition("clip", one), KEYS[:3])
    assert store.fingerprints == {"clip": two}, "the one added last is what this object is about"
    unpinned = FeatureStore(store.location)
    assert unpinned.experts() == {"clip": sorted([one, two])}
    for ask in (
        lambda: unpinned.fingerprints,
        lambda: unpinned.partition("clip"),
        lambda: unpinned.missing(KEYS, "clip"),
    ):
        with pytest.raises(StoreError, match=f"{min(one, two)}.*{max(one, two)}.*fingerprints=") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert unpinned.stat()["experts"]["clip"]["features"] == 3, "looking is possible without choosing"
    for mark, there in ((one, 3), (two, 0)):
        pinned = FeatureStore(store.location, fingerprints={"clip": mark})
        assert pinned.fingerprints == {"clip": mark} and len(pinned.partition("clip")) == there
        assert len(pickle.loads(pickle.dumps(pinned)).partition("clip")) == there
    with pytest.raises(
        StoreError, match=f"holds clip features of weights .*{one}.*wanted {'0' * 16}: run `mova precompute`"
    ):
        FeatureStore(store.location, fingerprints={"clip": "0" * 16})
    with pytest.raises(StoreError, match="opened for clip features of weights"):
        FeatureStore(store.location, fingerprints={"clip": one}).add_expert(describe(weights="two"))
    other = FeatureStore(
        store.location, fingerprints={"clip": one, "sam": "0" * 16}
    )  # nothing of sam: said when it is asked for
    with pytest.raises(StoreError, match=r"no features of sam \(it has clip\): run `mova precompute`"):
        other.partition("sam")


def test_new_weights_in_mid_run_change_nothing(store, partition):
    fill(partition, KEYS[:2])
    reader = FeatureStore(store.location)
    assert reader.missing(KEYS[:2], "clip") == []
    FeatureStore(store.location).add_expert(describe(weights="two"))
    assert reader.fingerprints == {"clip": partition.fingerprint}


def test_what_is_no_store(tmp_path, store):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    for path, create, said in [
        (tmp_path / "nowhere", False, "no feature store"),
        (tmp_path / "photos", False, "no feature store"),
        (tmp_path / "photos", True, "not empty"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "file" / "below", True, "give a folder"),
        ("nowhere://bucket/store", True, "cannot be opened"),
    ]:
        with pytest.raises(StoreError, match=said) as caught:
            FeatureStore(path, create=create)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert files(tmp_path / "photos") == {"a.jpg"}
    (Path(store.location) / "store.json").write_text('{"format": 2}')
    with pytest.raises(StoreError, match="format 2"):
        FeatureStore(store.location)


def test_a_wrong_description_is_an_error(store, partition):
    (Path(partition.location) / "expert.json").write_text(json.dumps(describe(weights="two")))
    with pytest.raises(StoreError, match=r"expert\.json"):
        FeatureStore(store.location).add_expert(describe())
    assert [found["shard"] for found in store.verify()] == ["expert.json"]
    for name in ("../clip", "", "quarantine", "listings", "..", "a/b"):
        with pytest.raises(ValueError, match="name"):
            store.add_expert(describe(expert=name))


# As a source of features


def test_fetch(store):
    for expert in ("clip", "sam"):
        fill(store.add_expert(describe(expert)), KEYS[:4])
    images = [ImageRef(data=b"", key=name) for name in (KEYS[2], KEYS[0], KEYS[2])]
    got = FeatureStore(store.location).fetch(images, [["clip", "sam"], [], ["sam"]])
    assert [list(row) for row in got] == [["clip", "sam"], [], ["sam"]]
    assert torch.equal(got[2]["sam"].tokens, features(KEYS[2:3])[KEYS[2]].tokens)
    images.append(ImageRef(data=b"", key=KEYS[9]))
    with pytest.raises(MissingFeatures) as caught:
        store.fetch(images, [["clip", "dinov2"], [], [], ["clip", "sam"]])
    assert caught.value.missing == [(KEYS[9], "clip"), (KEYS[2], "dinov2"), (KEYS[9], "sam")]
    for said in (store.location, "3 of", "clip: 1", "mova precompute", "clip,dinov2,sam"):
        assert said in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.missing == caught.value.missing
    with pytest.raises(MissingFeatures):
        store.partition("clip").read([KEYS[9]])


def test_newer_receipts_are_seen(store, partition):
    reader = FeatureStore(store.location).partition("clip")
    fill(partition, KEYS[:4])
    assert len(reader) == 0 and not reader.has(KEYS[:4]).any()
    assert same(reader, KEYS[:4]), "what is not known is looked for once more"
    fill(partition, KEYS[4:8])
    assert reader.has(KEYS[:8]).tolist() == [True] * 4 + [False] * 4
    reader.refresh()
    assert reader.has(KEYS[:8]).all() and len(reader) == 8


def failing_once(monkeypatch, method, name, number):
    """The first call of a storage method for such a file fails with this errno."""
    call = getattr(LocalStorage, method)
    failures: list[str] = []

    def fail(storage, file, *args, **kwargs):
        if file.startswith(name) and not failures:
            failures.append(file)
            raise OSError(number, os.strerror(number))
        return call(storage, file, *args, **kwargs)

    monkeypatch.setattr(LocalStorage, method, fail)
    return failures


def test_a_receipt_whose_read_failed_once_is_read_again(store, partition, monkeypatch):
    """Its features must not stay invisible, or they would be computed again."""
    reader = FeatureStore(store.location).partition("clip")
    fill(partition, KEYS)
    old = time.time() - 60
    os.utime(Path(partition.location, "receipts"), (old, old))  # nothing changes in the folder after the failure
    failures = failing_once(monkeypatch, "read", "receipts/", errno.EIO)
    with pytest.raises(StoreError, match=r"cannot read store .* \(Input/output error\): check that disk"):
        reader.missing(KEYS)
    assert failures and reader.missing(KEYS) == [] and same(reader, KEYS)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_failed_read_is_not_called_damage(store, partition, monkeypatch, number):
    """It keeps the operating system's reason, and nobody is sent to repair a sound store."""
    fill(partition, KEYS)
    failing_once(monkeypatch, "read_range", "shards/", number)
    with pytest.raises(StoreError, match=re.escape(os.strerror(number))) as caught:
        partition.read(KEYS[:1])
    assert "damaged" not in str(caught.value) and "precompute" not in str(caught.value)
    assert same(partition, KEYS)
    for name, act in (
        ("expert.json", lambda: FeaturePartition(partition.location)),
        ("store.json", lambda: FeatureStore(store.location)),
        ("store.json", lambda: FeatureStore(store.location, damaged=True)),
    ):
        monkeypatch.undo()
        failing_once(monkeypatch, "read", name, number)
        with pytest.raises(StoreError, match=re.escape(os.strerror(number))) as caught:
            act()
        assert "damaged" not in str(caught.value) and "no feature store" not in str(caught.value)
    monkeypatch.undo()
    failing_once(monkeypatch, "read", "shards/", number)
    if number == errno.EIO:  # for a check that reads the disk, a sector that cannot be read is damage
        assert "Input/output error" in next(store.verify())["reason"]
    else:
        with pytest.raises(StoreError, match=re.escape(os.strerror(number))):
            list(store.verify())


class Fetched(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(KEYS)

    def __getitem__(self, at):
        image = ImageRef(data=b"", key=KEYS[at])
        return self.store.fetch([image, image], [["clip"], []])[0]["clip"].tokens.clone()


def test_data_loader_workers(store, partition):
    """Forked workers get reading threads of their own, spawned ones a store that opens itself again."""
    big = features(KEYS, grid=(64, 64), channels=128)  # 2 MiB a row: the reading threads take part
    partition.write("a" * 32, big)
    for opened in (
        partition,
        pickle.loads(pickle.dumps(partition)),
        pickle.loads(pickle.dumps(store)).partition("clip"),
    ):
        assert all(torch.equal(got.tokens, big[name].tokens) for name, got in zip(KEYS, opened.read(KEYS), strict=True))
    loader = torch.utils.data.DataLoader(Fetched(store), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert all(torch.equal(row, big[name].tokens) for row, name in zip(torch.cat(list(loader)), KEYS, strict=True))


def test_threads_read_while_others_write(store, partition):
    fill(partition, KEYS)
    faults, stop = [], threading.Event()

    def read(seed):
        draw = random.Random(seed)
        try:
            while not stop.is_set():
                assert same(partition, draw.sample(KEYS, 5))
                partition.refresh()
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in readers:
        thread.start()
    try:
        other = FeatureStore(store.location).partition("clip")
        for number in range(12):
            fill(other if number % 2 else partition, [key(f"{number} {at}") for at in range(3)])
            if number % 3 == 0:
                other.snapshot()
                store.gc(0)
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    assert not faults and len(FeatureStore(store.location).partition("clip")) == 20 + 36


# Snapshots


def test_snapshots(store, partition):
    assert partition.snapshot() == 0
    fill(partition, KEYS[:8])
    assert partition.snapshot() == 1 and partition.snapshot() == 1
    fill(partition, KEYS[8:16])
    other = FeatureStore(store.location).partition("clip")
    assert len(other) == 16 and same(other, KEYS[:16])
    assert other.snapshot() == 2 and partition.snapshot() == 2
    fill(partition, KEYS[16:])
    assert partition.snapshot() == 3 and len(partition) == 20 and same(partition, KEYS)
    newest = Path(partition.location) / "index" / "3.arrow"
    newest.write_bytes(newest.read_bytes()[:-100])  # cut: the older one serves, and the receipts since
    assert same(FeatureStore(store.location).partition("clip"), KEYS)
    for path in (Path(partition.location) / "index").iterdir():
        path.unlink()
    assert same(FeatureStore(store.location).partition("clip"), KEYS), "an index is no more than a saving"
    assert FeatureStore(store.location).partition("clip").snapshot() == 4


def test_overlapping_shards(store, partition):
    """Two drivers that cut the work differently store a feature twice; it still counts once and reads the same."""
    partition.write(partition.shard_id(KEYS[:4]), features(KEYS[:4]))
    partition.write(partition.shard_id(KEYS[2:6]), features(KEYS[2:6]))
    assert len(partition) == 6 and same(partition, KEYS[:6])
    partition.snapshot()
    again = FeatureStore(store.location).partition("clip")
    assert len(again) == 6 and same(again, KEYS[:6]) and again.stat()["features"] == 6
    assert store.gc(0)["files"] == 0 and list(store.verify()) == []


# Damage


def test_a_flipped_byte_is_found(store, partition):
    fill(partition, KEYS)
    receipt = pq.read_table(next((Path(partition.location) / "receipts").iterdir())).to_pylist()
    row = receipt[2]
    shard = Path(partition.location) / "shards" / row["file"]
    flip(shard, row["offset"] + 100)
    with pytest.raises(StoreError, match=f"{row['key']}.*{row['file']}.*run `mova store verify`") as caught:
        partition.read([row["key"]])
    assert "\n" not in str(caught.value)
    assert not torch.equal(
        partition.read([row["key"]], verify=False)[0].tokens, features([row["key"]])[row["key"]].tokens
    )
    checked: list[int] = []
    [found] = store.verify(checked.append)
    assert found == {
        "expert": "clip", "fingerprint": partition.fingerprint, "shard": f"shards/{row['file']}", "key": row["key"],
        "reason": "its bytes have changed",
    }  # fmt: skip
    assert sum(checked) == 20
    assert same(partition, [name for name in KEYS if name != row["key"]])
    with open(shard, "r+b") as file:
        file.truncate(row["offset"] + 100)
    assert {found["reason"] for found in store.verify()} == {"the file ends before it"}
    shard.unlink()
    assert {found["reason"].split(": ")[-1] for found in FeatureStore(store.location).verify()} == {"the file is gone"}


def test_a_damaged_index_hides_no_feature(store, partition, caplog):
    """An index is checked before it is mapped: a flipped bit in a key would make its feature look missing."""
    fill(partition, KEYS[:12])
    partition.snapshot()
    fill(partition, KEYS)
    assert partition.snapshot() == 2
    flip(Path(partition.location, "index", "2.arrow"), Path(partition.location, "index", "2.arrow").stat().st_size // 2)
    opened = FeaturePartition(partition.location)
    assert same(opened, KEYS) and opened.snapshot_number == 1
    opened.refresh()
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 and "snapshots/2.json or its index is damaged" in warnings[0]
    assert [found["shard"] for found in store.verify()] == ["index/2.arrow"]


def test_a_hundred_flipped_bytes_are_found_and_made_anew(store):
    """Of any files of three partitions, store.json and expert.json among them."""
    keys = [key(number) for number in range(150)]
    more = [key(f"more {number}") for number in range(20)]
    descriptions = [describe(), describe("sam", dtype="int8"), describe("clip", weights="two", dtype="bfloat16")]
    for description in descriptions:
        partition = store.add_expert(description)
        fill(partition, keys, rows_per_shard=5)
        partition.snapshot()
        fill(partition, [*keys, *more], rows_per_shard=5)
    store.quarantine([{"image": "a.png", "sha256": None, "reason": "0 bytes", "expert": "clip"}])
    root = Path(store.location)
    draw = random.Random(0)
    targets = sorted(path for path in root.rglob("*") if path.is_file())
    always = [root / "store.json", Path(partition.location, "expert.json"), *(root / "quarantine").iterdir()]
    flipped = set()
    for path in [*always, *draw.sample([path for path in targets if path not in always], 97)]:
        flip(path, draw.randrange(path.stat().st_size), 1 << draw.randrange(8))
        flipped.add((str(path.parent), path.name.split(".")[0].split("-")[0]))
    with pytest.raises(StoreError, match="store verify"):
        FeatureStore(root)
    opened = FeatureStore(root, damaged=True)
    damaged = list(opened.verify())
    told = {root / found["expert"] / found["fingerprint"] / found["shard"] for found in damaged}
    # A receipt and the header of its shard vouch for each other: one of them is named. So do an index and its snapshot.
    pairs = {"receipts": "shards", "shards": "receipts", "snapshots": "index"}
    named = {(str(path.parent), path.name.split(".")[0].split("-")[0]) for path in told}
    for folder, name in flipped:
        other = Path(folder).parent / pairs.get(Path(folder).name, "")
        assert {(folder, name), (str(other), name)} & named, (folder, name)
    withdrawn = opened.withdraw(damaged)
    lost = {found["key"] for found in damaged if found["key"]}
    assert 0 < withdrawn <= 3 * len(lost), "sound rows of damaged shards are kept"
    repaired = FeatureStore(root)
    for description in descriptions:
        fill(repaired.add_expert(description), [*keys, *more], rows_per_shard=5)
    assert list(FeatureStore(root).verify()) == [] and repaired.gc(0)["files"] > 0
    assert list(FeatureStore(root).verify()) == []
    one = repaired.partition("clip", fingerprint(describe()))
    assert same(one, [*keys, *more])
    for description in descriptions:
        partition = repaired.partition(description["expert"], fingerprint(description))
        assert len(partition) == 170 and len(partition.read(keys)) == 150


def test_a_damaged_receipt_hides_only_its_rows(store, partition, caplog):
    fill(partition, KEYS)
    receipt = sorted((Path(partition.location) / "receipts").iterdir())[0]
    rows = pq.read_table(receipt).to_pylist()
    receipt.write_bytes(receipt.read_bytes()[:50])
    again = FeatureStore(store.location)
    assert sorted(again.missing(KEYS, "clip")) == sorted(row["key"] for row in rows)
    assert receipt.name in caplog.text
    with pytest.raises(StoreError, match="verify"):
        again.partition("clip").write(receipt.stem, features([row["key"] for row in rows]))
    again.gc(0)
    assert (Path(partition.location) / "shards" / rows[0]["file"]).exists(), "the damaged receipt may name it"
    assert again.withdraw(again.verify()) == 0
    assert same(again.partition("clip"), KEYS) and list(again.verify()) == [], (
        "the header of the shard told of its rows"
    )
    assert again.partition("clip").stat()["features"] == 20


def test_sound_rows_of_a_damaged_shard_are_kept(store, partition):
    """A header, a row and a gap are damaged: two features have to be made anew."""
    fill(partition, KEYS)
    partition.snapshot()
    reader = FeatureStore(store.location).partition("clip")
    receipts = [pq.read_table(path).to_pylist() for path in Path(partition.location, "receipts").iterdir()]
    rows = [rows[2] for rows in receipts if len(rows) == 6]
    for row, at in zip(rows, (50, rows[1]["offset"] + 10, rows[2]["offset"] + row_end(rows[2])), strict=True):
        flip(Path(partition.location, "shards", row["file"]), at)
    damaged = list(store.verify())
    assert len(damaged) == 3 and store.withdraw(damaged) == 2, "of the gap the row before it is not trusted"
    assert partition.missing(KEYS) == sorted((rows[1]["key"], rows[2]["key"]), key=KEYS.index)
    assert store.gc(0)["files"] == 3 + 1, "the damaged shards; of the snapshots the older index"
    kept = [name for name in KEYS if name in set(KEYS) - {rows[1]["key"], rows[2]["key"]}]
    assert same(partition, kept) and same(reader, kept), "also for who has not looked since"
    fill(partition, KEYS)
    assert same(partition, KEYS) and list(store.verify()) == [] and store.gc(0)["files"] <= 2


def row_end(row):
    return row["length"] + 5


# Crashes, races, full disks


def run(act, folder, *, wrap=(), check=True):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*wrap, sys.executable, __file__, act, str(folder)], env=env, capture_output=True, text=True, timeout=240
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def act_crash_at_every_step(folder):
    """Dies before each call that touches the disk's names or syncs, one store for each."""
    calls = ("fsync", "rename", "link", "unlink")
    for step in range(1000):
        store = FeatureStore(folder / f"{step:03}", create=True)
        fill(store.add_expert(describe()), KEYS[:6])
        if (child := os.fork()) == 0:
            left = [step]

            def dying(call, left=left):
                def act(*args, **kwargs):
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return call(*args, **kwargs)

                return act

            for name in calls:
                setattr(os, name, dying(getattr(os, name)))
            partition = FeatureStore(store.location).partition("clip")
            fill(partition, KEYS[:12])
            partition.snapshot()
            store.quarantine([{"image": "a", "sha256": None, "reason": "b", "expert": "clip"}])
            store.add_expert(describe("sam"))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
    raise AssertionError("the work never came to its end")


def act_crash_at_bytes(folder):
    """Dies while writing byte n of a file: the kernel kills who writes past its limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for size in (0, 1, 2000, 4096, 5000, 9000, 20000, 28000, 40000):
        store = FeatureStore(folder / str(size), create=True)
        fill(store.add_expert(describe()), KEYS[:6])
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            fill(FeatureStore(store.location).partition("clip"), KEYS[:12])
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) == (size < 28672), (size, status)


def act_crash_at_any_moment(folder):
    """Killed from outside while it writes shards of 2 MiB."""
    draw = random.Random(0)
    for number in range(8):
        store = FeatureStore(folder / str(number), create=True)
        fill(store.add_expert(describe()), KEYS[:6])
        if (child := os.fork()) == 0:
            partition = FeatureStore(store.location).partition("clip")
            big = features([KEYS[6]], grid=(256, 256), channels=8)[KEYS[6]]
            for at in range(1000):
                partition.write(partition.shard_id([key(f"big {at}")]), {key(f"big {at}"): big})
            os._exit(0)
        time.sleep(draw.uniform(0.005, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["crash_at_every_step", "crash_at_bytes", "crash_at_any_moment"])
def test_a_crash_loses_nothing_and_harms_nothing(tmp_path, act):
    run(act, tmp_path)
    stores = sorted(tmp_path.iterdir())
    assert len(stores) >= 8
    if act == "crash_at_every_step":
        assert len(stores) > 20
    left = set()
    for path in stores:
        store = FeatureStore(path)
        partition = store.partition("clip")
        assert same(partition, KEYS[:6])
        left |= {sum(path.is_file() for path in Path(partition.location).rglob("*"))}
        if act != "crash_at_any_moment":
            assert len(partition) % 6 == 0, "all of a shard or nothing of it"
        fill(partition, KEYS)
        partition.snapshot()
        assert same(FeatureStore(path).partition("clip"), KEYS) and list(store.verify()) == []
        removed = store.gc(0)
        assert not list(path.rglob(".*")) and store.gc(0) == {"files": 0, "bytes": 0}, removed
        assert len(os.listdir(Path(partition.location) / "shards")) == len(
            os.listdir(Path(partition.location) / "receipts")
        )
        assert same(FeatureStore(path).partition("clip"), KEYS)
    assert len(left) > 1, "the crashes came at different moments"


def act_race(folder):
    """Two processes write the same shards at once."""
    store = FeatureStore(folder / "store", create=True)
    partition = store.add_expert(describe())
    plan = partition.plan([key(number) for number in range(120)], 2)
    for number in range(2):
        if os.fork() == 0:
            mine = FeatureStore(store.location).partition("clip")
            (folder / f"ready {number}").touch()
            while not all((folder / f"ready {other}").exists() for other in range(2)):
                time.sleep(0.001)
            rows = [mine.write(shard.id, features(shard.keys)) for shard in plan]
            (folder / f"rows {number}.json").write_text(json.dumps(rows))
            os._exit(0)
    for _ in range(2):
        assert os.wait()[1] == 0


def test_two_processes_write_the_same_shards(tmp_path):
    run("race", tmp_path)
    first, second = (json.loads((tmp_path / f"rows {number}.json").read_text()) for number in range(2))
    assert first == second, "both are told of the winner's rows"
    store = FeatureStore(tmp_path / "store")
    partition = store.partition("clip")
    named = {row["file"] for rows in first for row in rows}
    assert set(os.listdir(Path(partition.location) / "shards")) == named and len(named) == 60
    assert len(os.listdir(Path(partition.location) / "receipts")) == 60
    assert same(partition, [key(number) for number in range(120)]) and list(store.verify()) == []
    assert not list(Path(store.location).rglob(".*.tmp"))


def test_many_processes_create_the_same_store_at_once(tmp_path):
    made, begin = [], threading.Barrier(6)

    def make():
        begin.wait()
        made.append(FeatureStore(tmp_path / "store", create=True).add_expert(describe()).fingerprint)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [fingerprint(describe())] * 6


@pytest.mark.parametrize("answer", [KeyboardInterrupt, FileExistsError, OSError])
def test_a_commit_that_was_made_but_not_heard_of_is_kept(partition, monkeypatch, answer):
    """An interrupt right after the link, or a network file system that lost the reply and asked again."""
    link = os.link

    def unheard(*args):
        link(*args)
        raise answer

    [shard] = partition.plan(KEYS[:4], 4)
    monkeypatch.setattr(os, "link", unheard)
    try:
        partition.write(shard.id, features(shard.keys))
    except (KeyboardInterrupt, StoreError):
        assert answer is not FileExistsError
    monkeypatch.undo()
    assert (
        same(partition, KEYS[:4])
        and partition.plan(KEYS[:4], 4) == []
        and not list(Path(partition.location).rglob(".*"))
    )


def act_fill_the_disk(folder):
    """Writes until the disk is full, then says what happened; the error must leave everything as it was."""
    store = FeatureStore(folder / "store", create=True)
    partition = store.add_expert(describe())
    written, error = 0, None
    while error is None:
        keys = [key(written * 4 + at) for at in range(4)]
        before = files(store.location)
        try:
            partition.write(partition.shard_id(keys), features(keys, grid=(40, 40)))
            written += 1
        except StoreError as caught:
            error = caught
    assert files(store.location) == before and not list(Path(store.location).rglob(".*.tmp"))
    assert isinstance(error.__cause__, OSError)
    try:  # a smaller thing may still fit, or not; either is said
        partition.snapshot()
        store.quarantine([{"image": "a" * 100_000, "sha256": None, "reason": "b", "expert": "clip"}])
    except StoreError:
        pass
    assert not list(Path(store.location).rglob(".*.tmp"))
    stored = [key(number) for number in range(written * 4)]
    again = FeatureStore(store.location)
    wanted = features(stored, grid=(40, 40))
    read = again.partition("clip").read(stored)
    assert all(torch.equal(got.tokens, wanted[name].tokens) for name, got in zip(stored, read, strict=True))
    assert list(again.verify()) == [] and written > 0
    print(json.dumps({"errno": error.__cause__.errno, "said": str(error), "written": written}))


def test_a_full_disk(tmp_path):
    """On a file system of 1 MiB that is mounted for this process alone; without the right to mount, at a size limit."""
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$4" && exec "$@"']
    wrap = mounted[:1] + mounted[2:] if os.geteuid() == 0 else mounted
    probe = [*wrap[:-1], 'mount -t tmpfs -o size=1m tmpfs "$0"', str(tmp_path)]
    if subprocess.run(probe, capture_output=True).returncode == 0:
        done = run("fill_the_disk", tmp_path, wrap=[*wrap, "sh"])
        expected, fix = errno.ENOSPC, "free space there"
    else:
        done = run("fill_the_disk", tmp_path, wrap=["sh", "-c", 'ulimit -f 100; exec "$@"', "sh"])
        expected, fix = errno.EFBIG, "raise the file size limit"
    told = json.loads(done.stdout)
    assert told["errno"] == expected
    assert fix in told["said"] and str(tmp_path / "store") in told["said"] and "\n" not in told["said"]


# Keeping


def test_quarantine(store, partition):
    store.quarantine([])
    store.quarantine(
        [
            {"image": "a.jpg", "sha256": KEYS[0], "reason": "truncated", "expert": "clip"},
            {"image": "b.png", "sha256": None, "reason": "0 bytes", "expert": None},
        ]
    )
    store.quarantine([{"image": "c.png", "sha256": KEYS[1], "reason": "not an image", "expert": "sam"}])
    rows = FeatureStore(store.location).quarantined()
    assert {(row["image"], row["sha256"], row["reason"], row["expert"]) for row in rows} == {
        ("a.jpg", KEYS[0], "truncated", "clip"),
        ("b.png", None, "0 bytes", None),
        ("c.png", KEYS[1], "not an image", "sam"),
    }
    assert all(row["time"].endswith("+00:00") for row in rows)
    assert store.stat()["quarantined"] == 3 and list(store.experts()) == ["clip"]
    for path in (Path(store.location) / "quarantine").iterdir():
        assert set(pq.read_table(path).column_names) == {"image", "sha256", "reason", "expert", "time"}
        path.unlink()
    assert store.quarantined() == []


def test_gc_respects_the_grace(store, partition):
    fill(partition, KEYS)
    partition.snapshot()
    fill(partition, [*KEYS, key("more")])
    partition.snapshot()
    orphan = Path(partition.location) / "shards" / f"{'0' * 32}-0123456789ab.safetensors"
    temporary = [
        folder / f".{name}-0123456789ab.tmp"
        for folder, name in [
            (Path(store.location), "store.json"), (Path(store.location) / "quarantine", "x.parquet"), (Path(partition.location), "expert.json"),
            (Path(partition.location) / "shards", "x"), (Path(partition.location) / "receipts", "x"), (Path(partition.location) / "index", "x"),
            (Path(partition.location) / "snapshots", "x"),
        ]
    ]  # fmt: skip
    superseded = [Path(partition.location) / "index" / "1.arrow", Path(partition.location) / "snapshots" / "1.json"]
    (Path(store.location) / "quarantine").mkdir(exist_ok=True)
    for path in (orphan, *temporary):
        path.write_bytes(b"12345")
    kept = files(store.location) - {str(path.relative_to(Path(store.location))) for path in (orphan, *superseded)}
    assert store.gc(3600) == {"files": 0, "bytes": 0} and orphan.exists()
    for path in (orphan, *temporary[:3]):
        os.utime(path, (time.time() - 7200,) * 2)
    assert store.gc(3600) == {"files": 4, "bytes": 20}
    freed = sum(path.stat().st_size for path in (*temporary[3:], *superseded))
    assert store.gc(0) == {"files": 6, "bytes": freed}
    assert files(store.location) == kept and not list(Path(store.location).rglob(".*"))
    assert same(FeatureStore(store.location).partition("clip"), [*KEYS, key("more")])


def test_a_copied_store_without_its_empty_folders(store, partition):
    fill(partition, KEYS[:4])
    for name in ("index", "snapshots"):
        (Path(partition.location) / name).rmdir()
    Path(store.add_expert(describe("sam")).location, "receipts").rmdir()
    again = FeatureStore(store.location)
    fill(again.partition("sam"), KEYS)
    assert same(again.partition("sam"), KEYS)
    assert same(again.partition("clip"), KEYS[:4]) and list(again.verify()) == [] and again.gc(0)["files"] == 0
    fill(again.add_expert(describe()), KEYS)
    assert again.partition("clip").snapshot() == 1


def test_lookups_are_fast(store, partition):
    fill(partition, KEYS)
    partition.snapshot()
    fill(partition, [key("more")])
    code = (
        "import sys; from mova_core.features import FeatureStore; store = FeatureStore(sys.argv[1]);"
        "assert store.stat()['experts']['clip']['features'] == 21; store.gc(0); store.fingerprints;"
        "assert not {'torch', 'pandas'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, store.location], env=env, check=True, timeout=60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[f"act_{sys.argv[1]}"](Path(sys.argv[2]))

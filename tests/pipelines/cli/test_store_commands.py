"""`mova store ...`: what it prints, what it changes, and with which code it ends."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mova_core.features import FeatureStore
from pipelines.cli.main import app
from tests.mova_core.features.test_store import KEYS, describe, features, files, fill, flip, key, same


@pytest.fixture
def store(tmp_path):
    """Two experts, one of them in int8."""
    store = FeatureStore(tmp_path / "store", create=True)
    fill(store.add_expert(describe()), KEYS)
    fill(store.add_expert(describe("sam", dtype="int8")), KEYS[:8])
    return store


def mova(*arguments, code=0):
    """What `mova store` tells in JSON."""
    done = CliRunner().invoke(app, ["store", *map(str, arguments), "--json"])
    assert done.exit_code == code, (done.output, done.exception)
    return json.loads(done.stdout)


def test_stat(store):
    told = mova("stat", store.location)["experts"]
    [clip], [sam] = (list(told[name]["fingerprints"].values()) for name in ("clip", "sam"))
    assert (clip["features"], clip["bytes"], clip["loss"], clip["max_loss"]) == (20, 20 * 420, 0.0, 0.0)
    assert (sam["features"], sam["bytes_per_feature"], sam["dtype"]) == (8, 7 * 4 + 15 * 7, "int8")
    assert 0.001 < sam["loss"] < sam["max_loss"] < 0.02, "a 127th of each channel's peak"
    shown = CliRunner().invoke(app, ["store", "stat", store.location]).output
    assert "exact" in shown and "int8" in shown and f"{sam['max_loss']:.1e}" in shown


def test_verify(store):
    assert mova("verify", store.location)["damaged"] == []
    partition = store.partition("clip")
    [name, *_] = sorted(path.name for path in Path(partition.location, "shards").iterdir())
    flip(Path(partition.location, "shards", name), 4100)
    before = files(store.location)
    for _ in range(2):
        looked = mova("verify", store.location, "--keep", code=1)
        assert looked["withdrawn"] == 0 and looked["features"] == 28 and files(store.location) == before
    shown = CliRunner().invoke(app, ["store", "verify", store.location, "--keep"])
    [damage] = looked["damaged"]
    assert damage["shard"] == f"shards/{name}" and f"{name} {damage['key']}: its bytes have changed" in shown.output
    assert mova("verify", store.location, code=1)["withdrawn"] == 1
    assert mova("verify", store.location)["damaged"] == []
    assert FeatureStore(store.location).missing(KEYS, "clip") == [damage["key"]]


def test_gc(store):
    left = Path(store.partition("clip").location, "shards", f"{'0' * 32}-0123456789ab.safetensors")
    left.write_bytes(b"12345")
    assert mova("gc", store.location) == {"files": 0, "bytes": 0}
    os.utime(left, (time.time() - 600,) * 2)
    assert mova("gc", store.location, "--grace", 5, "--dry-run") == {"files": 1, "bytes": 5} and left.exists()
    assert mova("gc", store.location, "--grace", 5) == {"files": 1, "bytes": 5} and not left.exists()


def test_diff_and_export(store, tmp_path):
    wanted = tmp_path / "keys.txt"
    wanted.write_text("\n".join([*KEYS[:4], key("not stored")]))
    other = tmp_path / "other"
    assert mova("export", store.location, other, "--keys", wanted) == {"clip": 4, "sam": 4}
    before = {path: path.stat().st_mtime_ns for path in other.rglob("shards/*")}
    assert mova("export", store.location, other, "--keys", wanted) == {"clip": 0, "sam": 0}, "it goes on where it was"
    assert {path: path.stat().st_mtime_ns for path in other.rglob("shards/*")} == before
    clip, sam = mova("diff", store.location, other)
    assert [clip[name] for name in ("same", "only_here", "only_there", "differ")] == [4, 16, 0, 0] and sam["same"] == 4
    copied = FeatureStore(other)
    assert same(copied.partition("clip"), KEYS[:4]) and copied.stat()["experts"]["sam"]["features"] == 4
    assert copied.partition("sam").stat()["max_loss"] == pytest.approx(
        store.partition("sam").stat()["max_loss"], rel=0.5
    )

    changed = {name: row for name, row in features([KEYS[5]], grid=(2, 2)).items()}  # as other code would make it
    copied.partition("clip").write("a" * 32, changed)
    copied.partition("clip").write("b" * 32, features([key("there")]))
    clip, _ = mova("diff", store.location, other, "--keys")
    assert (clip["differ"], clip["only_there"], clip["same"]) == ([KEYS[5]], [key("there")], 4)
    assert mova("export", store.location, "memory://exported/store", "--experts", "sam") == {"sam": 8}
    assert FeatureStore("memory://exported/store").experts() == {"sam": [store.partition("sam").fingerprint]}
    assert list(FeatureStore("memory://exported/store").verify()) == []
    refused = CliRunner().invoke(
        app, ["store", "export", store.location, str(tmp_path / "none"), "--experts", "dinov2"]
    )
    assert "no features of dinov2 (it has clip, sam)" in str(refused.exception) and not (tmp_path / "none").exists()

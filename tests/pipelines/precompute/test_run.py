import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from cluster.nodes import PlanError
from mova_core.experts import load_expert
from mova_core.features import FeatureStore, StoreError
from mova_core.images import ImageRef
from pipelines.cli.main import main
from pipelines.precompute.listing import find_images, image_table
from pipelines.precompute.run import PrecomputeError, Summary, precompute

RUN: dict[str, Any] = {
    "experts": ("biomedclip", "sam"),
    "pools": ["sam=1..2,cpu=0.5,batch=4"],
    "size": "mini",
    "shard_mb": 0.02,
    "progress": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine pictures, one of them twice, and three files that are none."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    for index in range(8):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "again").mkdir()
    (folder / "again" / "0.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "notes.txt").write_text("left alone")
    return folder


@pytest.fixture(scope="module")
def finished(ray_cluster, folder, tmp_path_factory) -> tuple[Path, Summary]:
    """The store of a run over these pictures, and what the run returned."""
    store = tmp_path_factory.mktemp("finished") / "store"
    return store, precompute(find_images(folder), store, **RUN)


@pytest.mark.ray
def test_every_good_picture_is_stored_once(finished, folder):
    store, first = finished
    assert first.computed == {"biomedclip": 8, "sam": 8}
    assert first.reused == {"biomedclip": 0, "sam": 0}
    reasons = {Path(row["path"]).name: row["reason"] for row in first.quarantined}
    assert set(reasons) == {"cut.png", "empty.jpg", "text.png"} and all(reasons.values())
    opened = FeatureStore(store)
    assert {name: row["features"] for name, row in opened.stat()["experts"].items()} == {"biomedclip": 8, "sam": 8}
    assert len(opened.quarantined()) == 3

    image = ImageRef(path=str(folder / "5.png"))
    [stored] = opened.fetch([image], [list(RUN["experts"])])
    for name in RUN["experts"]:
        expert = load_expert(name, size="mini")
        tokens, grid = expert(expert.preprocess([image]))
        assert stored[name].grid == grid
        assert (stored[name].tokens - tokens[0]).abs().max() < 1e-5

    second = precompute(find_images(folder), store, **RUN)
    assert second.computed == {"biomedclip": 0, "sam": 0} and second.reused == {"biomedclip": 8, "sam": 8}
    assert len(second.quarantined) == 3 and len(FeatureStore(store).quarantined()) == 3, "told again, not stored again"


@pytest.mark.ray
def test_new_weights_never_read_old_features_and_a_retry_that_succeeds_leaves_no_quarantine(
    ray_cluster, folder, tmp_path
):
    """Other weights make another folder; a reader that wants one of them is never given the other.

    A picture in quarantine is dropped from training, so its record must go once its feature is stored.
    """
    images = [str(folder / f"{index}.png") for index in range(3)]
    store = FeatureStore(tmp_path / "store", create=True)
    record = {"image": images[2], "sha256": ImageRef(path=images[2]).key, "reason": "no memory", "expert": "biomedclip"}
    store.quarantine([record])
    other = load_expert("biomedclip", size="mini")
    save_file({name: value + 0.01 for name, value in other.state_dict().items()}, tmp_path / "other.safetensors")
    run: dict[str, Any] = {"experts": ("biomedclip",), "size": "mini", "progress": False}
    first = precompute(image_table(images), tmp_path / "store", **run)
    assert first.computed == {"biomedclip": 2} and "no memory" in first.quarantined[0]["reason"]
    weights = {"biomedclip": str(tmp_path / "other.safetensors")}
    changed = precompute(image_table(images), tmp_path / "store", weights=weights, retry_quarantined=True, **run)
    assert changed.computed == {"biomedclip": 3} and changed.reused == {"biomedclip": 0} and not changed.quarantined
    assert FeatureStore(tmp_path / "store").quarantined() == []
    prints = FeatureStore(tmp_path / "store").experts()["biomedclip"]
    assert len(prints) == 2
    rows = [
        FeatureStore(tmp_path / "store", fingerprints={"biomedclip": one}).fetch(
            [ImageRef(path=images[0])], [["biomedclip"]]
        )
        for one in prints
    ]
    assert (rows[0][0]["biomedclip"].tokens - rows[1][0]["biomedclip"].tokens).abs().max() > 1e-3


@pytest.mark.ray
def test_an_error_in_an_actor_is_reported_in_its_own_words(ray_cluster, folder, tmp_path):
    """The store's folder for one expert is replaced by a file while the run is on its way: the message survives Ray."""
    store = FeatureStore(tmp_path / "store", create=True)
    partition = store.add_expert(load_expert("sam", size="mini").describe())
    receipts = next(path for path in (tmp_path / "store" / "sam").rglob("receipts"))
    shutil.rmtree(receipts)
    receipts.write_text("in the way")
    del partition
    with pytest.raises((PrecomputeError, StoreError)) as error:
        precompute(find_images(folder), tmp_path / "store", experts=("sam",), size="mini", progress=False)
    assert "UDF" not in str(error.value) and str(tmp_path / "store") in str(error.value)


@pytest.mark.ray
def test_a_pool_the_cluster_cannot_hold_is_refused_before_it_hangs(ray_cluster, folder, tmp_path):
    with pytest.raises(PlanError, match=r"pool sam: 9 actors hold 9 CPUs"):
        precompute(
            find_images(folder), tmp_path / "store", experts=("sam",), pools=["sam=9"], size="mini", progress=False
        )
    assert not (tmp_path / "store").exists()


@pytest.mark.ray
def test_a_full_disk_is_reported_before_the_run_and_loses_nothing(finished, folder, small_disk):
    """The features of one expert fit, those of the next do not."""
    path = small_disk("300k") / "store"
    shutil.copytree(finished[0], path, ignore=shutil.ignore_patterns("sam"))
    with pytest.raises(PrecomputeError, match=r"need .* MiB but the disk of .*store has .* MiB free"):
        precompute(find_images(folder), path, experts=("dinov2",), size="mini", progress=False)
    store = FeatureStore(path)
    assert store.stat()["experts"]["biomedclip"]["features"] == 8
    assert not list(store.verify())


def test_command_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    """One clear line and exit code 1; 2 for a usage error. No Ray is started for any of them."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handler of SIGTERM

    def mova(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mova", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(str(ended.value.code)), capsys.readouterr().err.strip()

    store = ["--store", str(tmp_path / "store")]
    code, said = mova("precompute", str(tmp_path / "nothing.json"), *store)
    assert code == 1 and "no data file" in said and "nothing.json" in said and said.count("\n") == 0
    (tmp_path / "a").mkdir()
    code, said = mova("precompute", str(tmp_path / "a"), *store)
    assert code == 1 and "holds no picture" in said
    for arguments, names in (
        (["--experts", "sam,dino"], ("unknown expert", "dino", "dinov2")),
        (["--pool", "sam=lots"], ("NAME=SIZE",)),
        (["--weights", "dino=weights.safetensors"], ("dino=weights", "dinov2")),
    ):
        code, said = mova("precompute", str(tmp_path / "a"), *store, *arguments)
        assert code == 2 and all(name in said for name in names), said
    assert mova("precompute")[0] == 2
    code, said = mova("store", "stat", str(tmp_path / "a"))
    assert code == 1 and "store" in said and said.count("\n") == 0

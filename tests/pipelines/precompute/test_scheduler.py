"""A precompute under way: pools that grow, are resized from outside and divided; what is left out, and what is told."""

import importlib
import json
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.nodes import PlanError
from cluster.pools import PoolSpec
from mova_core.experts import load_expert
from mova_core.features import FeatureStore
from pipelines.precompute import status_actor
from pipelines.precompute.listing import image_table
from pipelines.precompute.progress import SAMPLES, ExpertLog, RunLog, Sample
from pipelines.precompute.run import precompute, preview
from pipelines.precompute.scheduler import ExpertWorkload, divide

KEYS = np.random.default_rng(0).bytes(32 * 100)


def pictures(folder, count: int, width: int = 16) -> list[str]:
    rng = np.random.default_rng(width)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{width}-{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (16, width, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def work(tmp_path, rows: int) -> ExpertWorkload:
    images = pa.table(
        {
            "key": pa.array([KEYS[at : at + 32] for at in range(0, len(KEYS), 32)], pa.binary(32)),
            "image": pa.array([f"{number}.png" for number in range(100)], pa.large_string()),
        }
    )
    partition = FeatureStore(tmp_path / "store", create=True).add_expert(load_expert("sam", size="mini").describe())
    return ExpertWorkload(expert="sam", partition=partition, images=images, rows=rows, feature_bytes=1, arguments={})


def test_work_is_what_is_absent_cut_into_shards(tmp_path):
    todo = work(tmp_path, rows=16)
    assert todo.look() == 100
    shards = todo.shards()
    assert [len(keys) for keys in shards["keys"].to_pylist()] == [16] * 6 + [4]
    assert [image for images in shards["images"].to_pylist() for image in images] == [
        f"{number}.png" for number in range(100)
    ]
    assert todo.partition is not None
    hexed = [key.hex() for key in shards["keys"][1].as_py()]
    assert shards["shard"][1].as_py() == todo.partition.shard_id(hexed)
    assert todo.look(dict.fromkeys(hexed)) == 84
    assert todo.shards()["shard"].to_pylist()[0] == shards["shard"][0].as_py(), "whole shards keep their names"
    assert not set(hexed) & {key.hex() for keys in todo.shards()["keys"].to_pylist() for key in keys}


def test_shards_are_divided_by_rate_among_the_pools_of_an_expert(tmp_path):
    todo = work(tmp_path, rows=1)
    todo.look()
    shards = todo.shards()

    def sizes(*pools: str) -> list[int]:
        return [sum(len(block) for block in pool.blocks) for pool in divide(shards, [PoolSpec.parse(p) for p in pools])]

    assert sizes("sam=2,gpu=1,accelerator=A100,rate=80", "sam=1,gpu=1,accelerator=T4,rate=20") == [80, 20]
    assert sizes("sam=2,gpu=1,accelerator=A100", "sam=1..3,gpu=1,accelerator=T4") == [40, 60], "by size where unknown"
    assert sizes("sam=1,rate=1000", "sam=1,gpu=1,rate=1") == [100]
    [pool] = divide(shards, [PoolSpec.parse("sam=1..200")])
    assert len(pool.blocks) == 100 and pool.most == 100, "an actor has at least a block"


def test_a_resize_names_one_pool():
    cluster = {"CPU": 9, "GPU": 4, "accelerator_type:A100": 1, "accelerator_type:T4": 1}
    pools = [PoolSpec.parse(text) for text in ("sam=1,gpu=1,accelerator=A100,batch=8", "sam=1,gpu=1,accelerator=T4")]
    told = status_actor.resized(pools, PoolSpec.parse("sam=2..3,gpu=1,accelerator=A100"), cluster)
    assert [str(pool) for pool in told] == [
        "sam=2..3,gpu=1,accelerator=A100,batch=8",
        "sam=1,gpu=1,accelerator=T4",
    ]
    with pytest.raises(PlanError, match=r"sam has the pools sam=1,gpu=1,acc.* say which"):
        status_actor.resized(pools, PoolSpec.parse("sam=2"), cluster)
    with pytest.raises(PlanError, match="4 GPUs"):
        status_actor.resized(pools[:1], PoolSpec.parse("sam=5"), cluster)
    for pool in told:
        assert PoolSpec.parse(str(pool)) == pool


def test_a_long_run_is_remembered_in_few_samples():
    one = ExpertLog(total=10**6)
    log = RunLog("long", "store", {"sam": one}, show=False)
    for second in range(2 * SAMPLES):
        one.servers["a"] = {
            "computed": 10 * second,
            "stored": 10 * second,
            "busy": second / 2,
            "prepare": 0.0,
            "splits": 0,
        }
        one.actors = 1
        log.began = time.monotonic() - second
        log.sample()
    assert len(one.samples) <= SAMPLES + 1
    assert one.samples[-1].computed == 10 * (2 * SAMPLES - 1) and one.samples[0].computed == 0
    assert one.rate == pytest.approx(10, rel=0.01) and one.busy == pytest.approx(0.5, rel=0.01)
    assert one.eta == pytest.approx((10**6 - one.done) / 10, rel=0.01)
    assert all(a.seconds < b.seconds for a, b in zip(one.samples, one.samples[1:], strict=False))
    assert isinstance(one.samples[0], Sample)


@pytest.fixture(scope="module")
def slow(ray_cluster):
    return importlib.import_module("tests.pipelines.precompute.slow_expert")  # workers look here, too


@pytest.mark.ray
def test_pools_grow_into_free_room_and_are_resized_from_outside(slow, tmp_path):
    """Of three CPUs for actors `slow` takes two parts of 1.5 when biomedclip has ended, and gives one back when it is told to."""
    both = [["slow", "biomedclip"]] * 32
    images = image_table(pictures(tmp_path / "pictures", 300), [*both, *[["slow"]] * (300 - len(both))])
    done: list[Any] = []
    files: dict[str, Any] = {"summary": tmp_path / "summary.json", "picture": tmp_path / "run.png"}
    run = threading.Thread(
        target=lambda: done.append(
            precompute(
                images,
                tmp_path / "store",
                experts=["slow", "biomedclip"],
                pools=["slow=1..2,cpu=1.5,batch=4", "biomedclip=1,batch=8"],
                size="mini",
                shard_mb=0.02,
                name="grown",
                progress=False,
                **files,
            )
        )
    )
    run.start()

    def wait_for_actors(count: int) -> dict[str, Any]:
        while run.is_alive():
            for told in status_actor.status():
                if (slow := told["experts"].get("slow")) and slow["actors"] == count and slow["done"]:
                    return slow
            time.sleep(0.1)
        pytest.fail(f"never had {count} actors")

    try:
        wait_for_actors(2)
        with pytest.raises(status_actor.RunError, match=r"named other .*running: grown"):
            status_actor.resize("other", ["slow=1"])
        with pytest.raises(status_actor.RunError, match="computes no sam"):
            status_actor.resize("grown", ["sam=1"])
        assert status_actor.resize("grown", ["slow=1"]) == {"slow": ["slow=1,cpu=1.5,batch=4"]}
        assert wait_for_actors(1)["pools"] == ["slow=1,cpu=1.5,batch=4"]
    finally:
        run.join()
    [summary] = done
    assert summary.computed == {"slow": 300, "biomedclip": 32}
    told = summary.experts["slow"]
    sizes = [count for _, count in told["actors"]]
    assert max(sizes) == 2 and 1 in sizes[: sizes.index(2)] and 1 in sizes[sizes.index(2) :]
    assert told["lost"] == 0 and told["restarts"] == 0, "it ended at a shard boundary"
    assert json.loads(files["summary"].read_text())["experts"]["slow"] == told
    assert Image.open(files["picture"]).width > 800
    assert status_actor.running() == [] and not list(FeatureStore(tmp_path / "store").verify())


@pytest.mark.ray
def test_each_expert_gets_the_pictures_named_for_it_and_stores_them_its_way(slow, tmp_path):
    good, bad = pictures(tmp_path / "pictures", 6), pictures(tmp_path / "pictures", 2, width=13)
    images = image_table(
        [*good, *bad], [["slow", "biomedclip"], ["slow"], [], ["biomedclip"], None, ["slow"], None, ["slow"]]
    )
    run: dict[str, Any] = {
        "experts": ["slow", "biomedclip"],
        "codecs": {"biomedclip": "int8"},
        "dtype": "bfloat16",
        "size": "mini",
        "progress": False,
    }
    seen = preview(images, tmp_path / "store", **run)
    assert not (tmp_path / "store").exists()
    assert {name: (row["wanted"], row["to_compute"]) for name, row in seen.items()} == {
        "slow": (6, 6),
        "biomedclip": (4, 4),
    }
    first = precompute(images, tmp_path / "store", **run)
    assert first.computed == {"slow": 4, "biomedclip": 4}
    assert sorted(row["path"] for row in first.quarantined) == bad
    assert all("slow" in row["reason"] and "13 is no width" in row["reason"] for row in first.quarantined)
    store = FeatureStore(tmp_path / "store")
    dtypes = {name: store.partition(name).description["dtype"] for name in run["experts"]}
    assert dtypes == {"slow": "bfloat16", "biomedclip": "int8"}
    assert [row["expert"] for row in store.quarantined()] == ["slow"] * 2
    assert preview(images, tmp_path / "store", **run)["slow"]["to_compute"] == 0

    again = precompute(images, tmp_path / "store", **run)
    assert again.reused == {"slow": 4, "biomedclip": 4} and not again.experts["slow"]["actors"][-1][1]
    assert sorted(row["path"] for row in again.quarantined) == bad and "earlier run" in again.quarantined[0]["reason"]
    retried = precompute(images, tmp_path / "store", retry_quarantined=True, **run)
    assert retried.computed["slow"] == 0 and retried.experts["slow"]["quarantined"] == 2
    assert "earlier run" not in retried.quarantined[0]["reason"]

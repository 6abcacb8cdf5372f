"""A precompute under way: pools that grow, are resized from outside and divided; what is left out, and what is told."""

import importlib
import json
import threading
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from cluster.nodes import PlanError
from cluster.pools import PoolSpec
from mova_core.experts import load_expert
from mova_core.features import FeatureStore
from pipelines.precompute import status_actor
from pipelines.precompute.listing import image_table
from pipelines.precompute.progress import SAMPLES, ExpertLog, RunLog
from pipelines.precompute.run import precompute, preview
from pipelines.precompute.scheduler import Execution, State, enter
from pipelines.precompute.shard_queue import CHUNK_ROWS, Block, ShardQueue, rows_at
from pipelines.precompute.status_actor import WorkerView
from pipelines.precompute.workload import ExpertWorkload, ImageTable
from tests.pipelines.cli.json_page import check

KEYS = np.random.default_rng(0).bytes(32 * 100)


def pictures(folder, count: int, width: int = 16) -> list[str]:
    rng = np.random.default_rng(width)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{width}-{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (16, width, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def work(tmp_path, shard_rows: int) -> ExpertWorkload:
    images = pa.table(
        {
            "key": pa.array([KEYS[at : at + 32] for at in range(0, len(KEYS), 32)], pa.binary(32)),
            "image": pa.array([f"{number}.png" for number in range(100)], pa.string()),
        }
    )
    return ExpertWorkload(
        expert="sam",
        partition=FeatureStore(tmp_path / "store", create=True).add_expert(load_expert("sam", size="mini").describe()),
        images=ImageTable(images),
        wanted=None,
        shard_rows=shard_rows,
        feature_bytes=1,
        arguments={},
    )


def test_work_is_what_the_store_misses_without_what_failed(tmp_path):
    todo = work(tmp_path, shard_rows=16)
    assert todo.refresh_missing() == 100 and todo.block_shards() == 1
    failed = [KEYS[at * 32 : at * 32 + 32].hex() for at in (3, 50)]
    assert todo.refresh_missing(failed) == 98
    assert sorted(set(range(100)) - set(todo.missing.tolist())) == [3, 50]
    todo.wanted = np.arange(0, 100, 2)
    assert len(todo) == 50 and todo.refresh_missing(failed) == 49 and set(todo.missing % 2) == {0}


def test_a_queue_hands_out_every_shard_once_and_again_when_a_worker_died():
    queue = ShardQueue(np.arange(100), shard_rows=8, block_shards=2, chunks={0: "rows"})
    queue.proven = True  # some picture was computed
    assert len(queue.pending) == 7

    def take(ticket: str, worker: str) -> Block:
        block = queue.take(ticket, worker)
        assert isinstance(block, Block)
        return block

    blocks = [take(f"t{number}", "a") for number in range(3)]
    assert take("t1", "restarted a").number == blocks[1].number, "Ray calls the restarted actor with the same ticket"
    queue.finish(blocks[0].number)
    queue.release(["a"])
    assert queue.held_by(["a"]) == [] and queue.held_by(["restarted a"]) == [blocks[1].number]
    rest = [take(f"u{number}", "b") for number in range(5)]
    assert rest[-1].number == blocks[2].number and queue.take("u5", "b") is None
    drawn = np.concatenate([block.positions for block in [blocks[0], blocks[1], *rest]])
    assert sorted(drawn.tolist()) == list(range(100))
    for block in [blocks[1], *rest]:
        queue.finish(block.number)
    assert queue.unfinished == 0


def test_rows_of_a_block_come_from_the_chunks_of_the_image_table():
    table = pa.table({"image": [str(number) for number in range(3 * CHUNK_ROWS)]})
    chunks = {number: table.slice(number * CHUNK_ROWS, CHUNK_ROWS) for number in (0, 2)}
    positions = np.array([1, CHUNK_ROWS - 1, 2 * CHUNK_ROWS, 3 * CHUNK_ROWS - 1], np.uint32)
    assert rows_at(chunks, positions)["image"].to_pylist() == [str(position) for position in positions]


def test_states_change_only_along_the_table():
    assert enter(State.WAITING, State.RUNNING) is State.RUNNING
    for state, new in ((State.DONE, State.RUNNING), (State.DRAINING, State.RUNNING), (State.FAILED, State.DONE)):
        with pytest.raises(RuntimeError, match=f"from {state.value} to {new.value}"):
            enter(state, new)


def test_an_execution_knows_which_of_its_actors_are_alive():
    def worker(age: float, idle: bool = False, left: bool = False) -> WorkerView:
        return WorkerView(execution="e", node="n", load={"ready": True}, age=age, idle=idle, left=left)

    execution = Execution(spec=PoolSpec.parse("sam=4"), size=4)
    assert execution.starting == 4
    execution.workers = {"computes": worker(0), "died": worker(60), "ended": worker(60, idle=True, left=True)}
    assert execution.alive == ["computes"] and execution.dead == ["died"]
    assert execution.starting == 2, "one that has never started, and the one that died and is restarted"


def test_a_resize_names_one_pool():
    cluster = {"CPU": 9, "GPU": 4, "accelerator_type:A100": 1, "accelerator_type:T4": 1}
    pools = [PoolSpec.parse(text) for text in ("sam=1,gpu=1,accelerator=A100,batch=8", "sam=1,gpu=1,accelerator=T4")]
    resized = status_actor.resized(pools, PoolSpec.parse("sam=2..3,gpu=1,accelerator=A100"), cluster)
    assert [str(pool) for pool in resized] == [
        "sam=2..3,gpu=1,accelerator=A100,batch=8",
        "sam=1,gpu=1,accelerator=T4",
    ]
    with pytest.raises(PlanError, match=r"sam has the pools sam=1,gpu=1,acc.* say which"):
        status_actor.resized(pools, PoolSpec.parse("sam=2"), cluster)
    with pytest.raises(PlanError, match="4 GPUs"):
        status_actor.resized(pools[:1], PoolSpec.parse("sam=5"), cluster)
    for pool in resized:
        assert PoolSpec.parse(str(pool)) == pool


def test_a_long_run_is_kept_in_few_samples_and_its_numbers_come_from_the_actors():
    expert = ExpertLog(total=10**6)
    assert expert.images_per_second is None and expert.busy is None
    log = RunLog("long", "store", {"sam": expert}, show=False)
    for second in range(1, 2 * SAMPLES):
        counts = {"computed": 10 * second, "stored": 10 * second, "busy": second / 2, "prepare": 0.0, "splits": 0}
        expert.workers["a"] = counts | {"first_at": 1000.0, "last_at": 1000.0 + second, "up": float(second)}
        expert.actors = 1
        log.began = time.monotonic() - second
        log.sample()
    assert len(expert.samples) <= SAMPLES + 1
    assert expert.samples[-1].computed == 10 * (2 * SAMPLES - 1) and expert.samples[0].computed == 10
    assert expert.recent_rate == pytest.approx(10, rel=0.01)
    assert expert.images_per_second == pytest.approx(10) and expert.busy == pytest.approx(0.5)
    assert expert.status()["images_per_second"] == expert.summary()["images_per_second"] == 10
    assert expert.eta == pytest.approx((10**6 - expert.done) / 10, rel=0.01)
    assert all(a.seconds < b.seconds for a, b in pairwise(expert.samples))


@pytest.fixture(scope="module")
def slow(ray_cluster):
    return importlib.import_module("tests.pipelines.precompute.slow_expert")  # workers look here, too


@pytest.mark.ray
def test_pools_grow_are_resized_from_outside_and_outlive_another_run_of_the_process(slow, tmp_path):
    """Of three CPUs for actors `slow` takes two parts of 1.5 when biomedclip has ended, and gives one back when it is told to.

    Into the room that it gave back fits a short run of the same process. Its end stops nothing, and leaves Ray Data as it was.
    """
    before = ray.data.DataContext.get_current().copy()
    paths, both = pictures(tmp_path / "pictures", 300), [["slow", "biomedclip"]] * 32
    images = image_table(paths, [*both, *[["slow"]] * (len(paths) - len(both))])
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
        with pytest.raises(status_actor.RunError, match=r"named other .*running here: grown"):
            status_actor.resize("other", ["slow=1"])
        with pytest.raises(status_actor.RunError, match="computes no sam"):
            status_actor.resize("grown", ["sam=1"])
        assert status_actor.resize("grown", ["slow=1"]) == {"slow": ["slow=1,cpu=1.5,batch=4"]}
        assert wait_for_actors(1)["pools"] == ["slow=1,cpu=1.5,batch=4"]
        short = precompute(
            image_table(paths[:4]),
            tmp_path / "short",
            experts=["slow"],
            pools=["slow=1,cpu=1,batch=4"],
            size="mini",
            progress=False,
        )
        assert short.computed == {"slow": 4} and run.is_alive()
    finally:
        run.join()
    [summary] = done
    assert summary.computed == {"slow": len(paths), "biomedclip": len(both)}
    told = summary.experts["slow"]
    sizes = [count for _, count in told["actors"]]
    assert max(sizes) == 2 and 1 in sizes[: sizes.index(2)] and 1 in sizes[sizes.index(2) :]
    assert told["lost"] == 0 and told["restarts"] == 0, "it ended at a shard boundary"
    assert json.loads(files["summary"].read_text())["experts"]["slow"] == told
    assert Image.open(files["picture"]).width > 800
    assert status_actor.running() == [] and not list(FeatureStore(tmp_path / "store").verify())
    after = ray.data.DataContext.get_current()
    assert after.enable_progress_bars == before.enable_progress_bars
    assert after.raise_original_map_exception == before.raise_original_map_exception


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
    elsewhere = preview(images, tmp_path / "store", **run, weights={"biomedclip": "nobody/not-on-this-machine"})
    assert {name: (row["there"], row["to_compute"]) for name, row in elsewhere.items()} == {
        "slow": (4, 0),
        "biomedclip": (None, 4),
    }
    check("precompute --dry-run", {"experts": elsewhere, "skipped": []})

    again = precompute(images, tmp_path / "store", **run)
    assert again.reused == {"slow": 4, "biomedclip": 4} and not again.experts["slow"]["actors"][-1][1]
    assert sorted(row["path"] for row in again.quarantined) == bad and "earlier run" in again.quarantined[0]["reason"]
    retried = precompute(images, tmp_path / "store", retry_quarantined=True, **run)
    assert retried.computed["slow"] == 0 and retried.experts["slow"]["quarantined"] == 2
    assert "earlier run" not in retried.quarantined[0]["reason"]

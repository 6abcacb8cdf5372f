"""How `precompute` scales with nodes and pictures: the parts nodes, speeds and growth of benchmarks/precompute.py."""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.precompute_work import BATCH, CORES, draw_pictures, spawn
from cluster.session import ray_session  # before ray: it sets the environment

NODES = (1, 2, 4, 8)
SPEEDS = (1, 1, 2, 8)
WAIT_MS = 50.0  # per picture: 0.4 s a batch
GROWTH = (1_000, 10_000, 100_000)
SIZE = 16  # pixels a side of the tiny pictures


# nodes, speeds


@contextmanager
def nodes(log: Path, speeds: Sequence[float]) -> Iterator[None]:
    """This process as the driver on a cluster of a head and so many simulated nodes, each with room for one actor."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(WAITING_MS=str(WAIT_MS), WAITING_LOG=str(log), RAY_raylet_start_wait_time_s="120")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for speed in speeds:
            cluster.add_node(num_cpus=3, labels={"speed": str(speed)})
        ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def batches(log: Path) -> list[tuple[float, str, int]]:
    """When each batch was computed (seconds), in what process, and of how many pictures; without the warm-ups."""
    warm: set[str] = set()
    computed = []
    for at, process, count in map(str.split, log.read_text().splitlines()):
        if process in warm:
            computed.append((float(at), process, int(count)))
        warm.add(process)
    return computed


def efficiency(log: Path, speeds: Sequence[float]) -> tuple[float, float]:
    """(images/s, its ratio to that of waiting alone) from when every actor has had its first batch to the last batch."""
    computed = batches(log)
    begun: dict[str, float] = {}
    for at, process, _ in computed:
        begun.setdefault(process, at)
    if len(begun) != len(speeds):
        raise RuntimeError(f"{len(begun)} of {len(speeds)} actors computed anything")
    start = max(begun.values())
    end = max(at for at, _, _ in computed)
    rate = sum(count for at, _, count in computed if at > start) / (end - start)
    return rate, rate / (sum(speeds) / (WAIT_MS / 1000))


def scaling(folder: Path, speeds: Sequence[float], seconds: float) -> dict[str, float]:
    import waiting_expert  # noqa: F401

    from pipelines.precompute.listing import find_images
    from pipelines.precompute.run import precompute

    # Actors start one after the other where all nodes share two cores, and those that have work meanwhile.
    count = int(sum(speeds) / (WAIT_MS / 1000) * (seconds + 4 * len(speeds)))
    with tempfile.TemporaryDirectory(dir=folder) as at:
        images = draw_pictures(Path(at, "pictures"), count, (SIZE, SIZE), ".png")
        with nodes(Path(at, "log"), speeds):
            precompute(
                find_images(images),
                Path(at, "store"),
                experts=("waiting",),
                pools=[f"waiting={len(speeds)},cpu=2,batch={BATCH}"],
                size="mini",
                progress=False,
            )
        rate, ratio = efficiency(Path(at, "log"), speeds)
    return {"images": count, "images_per_second": rate, "ratio": ratio}


# growth


def anonymous_mb() -> float:
    """Memory of this process now, MB, without mapped files and Ray's object store, which every process of a node shares."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


@contextmanager
def peak_mb() -> Iterator[list[float]]:
    """Appends the largest `anonymous_mb` within it, read 20 times a second."""
    largest, stop = [anonymous_mb()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            largest[0] = max(largest[0], anonymous_mb())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield largest
    finally:
        stop.set()
        watching.join()


def one_run(images: str, store: str, log: str, results: Any) -> None:
    """A driver in a process of its own."""
    import waiting_expert  # noqa: F401

    from pipelines.precompute.listing import find_images
    from pipelines.precompute.run import precompute

    os.environ.update(WAITING_MS="0", WAITING_LOG=log)
    started = time.perf_counter()
    with ray_session(), peak_mb() as peak:
        precompute(
            find_images(images),
            store,
            experts=("waiting",),
            pools=[f"waiting={CORES},cpu=1,batch={BATCH}"],
            size="mini",
            progress=False,
        )
    computed = batches(Path(log))
    results.put(
        {
            "seconds": time.perf_counter() - started,
            "images_per_second": sum(count for _, _, count in computed[1:]) / (computed[-1][0] - computed[0][0]),
            "driver_mb": peak[0],
        }
    )


def growth(folder: Path, counts: Sequence[int]) -> dict[int, dict[str, float]]:
    """Per number of tiny pictures: seconds in all, images/s from the first batch on, and the driver's largest memory."""
    measured = {}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=folder) as at:
            images = draw_pictures(Path(at, "pictures"), count, (SIZE, SIZE), ".png")
            results = spawn.SimpleQueue()
            driver = spawn.Process(
                target=one_run, args=(str(images), str(Path(at, "store")), str(Path(at, "log")), results)
            )
            driver.start()
            driver.join()
            if driver.exitcode:
                raise RuntimeError(f"the run over {count} pictures ended with {driver.exitcode}")
            measured[count] = results.get()
    return measured


def scaling_table(part: str, result: Mapping[Any, Any]) -> Iterator[str]:
    """Lines for people."""
    if part == "growth":
        yield f"growth: pictures of {SIZE} pixels; seconds in all, images/s, the driver's largest memory: MB, B per picture more"
        before: tuple[int, float] | None = None
        for count, run in result.items():
            more = "" if before is None else f"{2**20 * (run['driver_mb'] - before[1]) / (count - before[0]):8.0f}"
            yield f"  {count:7} {run['seconds']:7.1f} {run['images_per_second']:8.1f} {run['driver_mb']:8.0f} {more}"
            before = count, run["driver_mb"]
        return
    waits = f"that only wait, {WAIT_MS:g} ms a picture: images/s, and its ratio to that of the waits alone"
    yield f"nodes {waits}" if part == "nodes" else f"nodes of speeds {':'.join(map(str, SPEEDS))} {waits}"
    for count, run in (result if part == "nodes" else {len(SPEEDS): result}).items():
        yield f"  {count:3} {run['images_per_second']:8.1f} {run['ratio']:5.2f}"

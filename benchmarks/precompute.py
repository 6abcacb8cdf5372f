"""Precompute against a bare loop and against a script after Ray's batch-inference guide; how it scales with nodes and images.

    python benchmarks/precompute.py [work] [nodes] [speeds] [growth] [--images 2000] [--repeat 1] [--folder .] [--json]

work: images/s of `precompute` on this machine's cores, expert by expert, over that of two other ways to compute the same
features. The bare loop is what the cores can do at most: a process per core and in it each expert already loaded, which
decodes, prepares and computes its share of the pictures in the same batches, and drops the features. The script is Ray's
guide with this expert in a class: read_images, map_batches with as many actors, write_parquet with a tensor column.
The sides take turns. Start-up is left out of all three: they are timed from when the first actor (or process) is ready
to when the last feature is written (or dropped).

nodes: `precompute` with an expert that only waits, on clusters of 1, 2, 4, 8 nodes with one actor each. All nodes are
processes on this machine, so the waits are long beside what everything else costs. speeds: the same on four nodes that
wait 1, 1, 1/2 and 1/8 as long. Timed from when every actor has had its first batch to the last batch: the ends, where
some nodes have nothing left to do, count. 1.0 is the time that waiting alone would take.

growth: that expert without waiting on more and more tiny pictures: images/s from the first batch to the last, and the
driver's largest memory.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.session import ray_session  # before ray: it sets the environment

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # waiting_expert
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of drivers and actors

CORES = 2
BATCH = 8
EXPERTS = ("biomedclip", "sam", "deplot")  # square crops, large squares, patches: each has pixels of its own
NODES = (1, 2, 4, 8)
SPEEDS = (1, 1, 2, 8)
WAIT_MS = 50.0  # per picture: 0.4 s a batch
SECONDS = 40.0  # of work for every node, once all have begun
GROWTH = (1_000, 10_000, 100_000)
SIZE = 16  # pixels a side of the tiny pictures

spawn = multiprocessing.get_context("spawn")


def draw_pictures(folder: Path, count: int, size: tuple[int, int], suffix: str) -> Path:
    """Pictures whose every one is different: smooth ones, as photographs are, or, of 16 pixels, noise."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = draw.integers(0, 256, (max(2, size[1] // 16), max(2, size[0] // 16), 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:06}{suffix}")
    return folder


# work


def bare_loop(images: Sequence[str], ready: Any, go: Any, done: Any) -> None:
    """One of the bare loop's processes: computes its share of the pictures with each expert it is told."""
    import torch

    from mova_core.experts import load_expert

    torch.set_num_threads(1)
    experts = {name: load_expert(name, size="mini") for name in EXPERTS}
    for expert in experts.values():
        expert(expert.preprocess(images[:BATCH]))
    ready.release()
    while (name := go.get()) is not None:
        expert = experts[name]
        with torch.no_grad():
            for at in range(0, len(images), BATCH):
                tokens, _ = expert(expert.preprocess(images[at : at + BATCH]))
                assert tokens.isfinite().all()
        done.release()


@contextmanager
def bare_loops(images: Sequence[str]) -> Iterator[Callable[[str], float]]:
    """A function that runs one expert over all pictures and tells the seconds; its processes are loaded and warm."""
    ready, done = spawn.Semaphore(0), spawn.Semaphore(0)
    inboxes = [spawn.SimpleQueue() for _ in range(CORES)]
    processes = [
        spawn.Process(target=bare_loop, args=(images[core::CORES], ready, inbox, done))
        for core, inbox in enumerate(inboxes)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()

    def run(expert: str) -> float:
        started = time.perf_counter()
        for inbox in inboxes:
            inbox.put(expert)
        for _ in inboxes:
            done.acquire()
        return time.perf_counter() - started

    try:
        yield run
    finally:
        for inbox in inboxes:
            inbox.put(None)
        for process in processes:
            process.join()


class Guide:
    """An expert as Ray's guide has models: loaded in the constructor, called with a batch of decoded pictures."""

    def __init__(self, name: str, ready: str):
        import torch

        from mova_core.experts import load_expert

        torch.set_num_threads(1)
        self.expert = load_expert(name, size="mini")
        self.expert(self.expert.preprocess([Image.new("RGB", (64, 64))]))
        with open(ready, "a") as file:
            file.write(f"{time.time()}\n")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            tokens, _ = self.expert(self.expert.preprocess([Image.fromarray(image) for image in batch["image"]]))
        return {"path": batch["path"], "features": tokens.numpy()}


def guide_seconds(expert: str, images: Path, folder: Path) -> float:
    import ray

    ready = folder / "ready"
    ray.data.DataContext.get_current().enable_progress_bars = False
    (
        ray.data.read_images(str(images), include_paths=True, mode="RGB")
        .map_batches(
            Guide,
            fn_constructor_args=(expert, str(ready)),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=CORES),
            num_cpus=1,
        )
        .write_parquet(str(folder / "features"))
    )
    ended = time.time()
    return ended - min(float(line) for line in ready.read_text().splitlines())


def precompute_seconds(expert: str, images: Path, store: Path) -> float:
    from pipelines.precompute.listing import find_images
    from pipelines.precompute.run import precompute

    pool = f"{expert}={CORES},cpu=1,batch={BATCH}"
    summary = precompute(find_images(images), store, experts=(expert,), pools=[pool], size="mini", progress=False)
    return summary.experts[expert]["seconds"]


def useful_work(folder: Path, count: int, repeat: int) -> dict[str, Any]:
    """Images/s per expert and side, and the ratios over all experts."""
    images = draw_pictures(folder / "photographs", count, (640, 480), ".jpg")
    paths = [str(path) for path in sorted(images.iterdir())]
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in EXPERTS}
    with bare_loops(paths) as bare, ray_session():
        for turn in range(repeat):
            for name in EXPERTS:
                with tempfile.TemporaryDirectory(dir=folder) as at:
                    sides: dict[str, Callable[[], float]] = {
                        "bare loop": partial(bare, name),
                        "precompute": partial(precompute_seconds, name, images, Path(at, "store")),
                        "Ray's guide": partial(guide_seconds, name, images, Path(at)),
                    }
                    for side in sorted(sides, reverse=bool(turn % 2)):
                        taken[name].setdefault(side, []).append(sides[side]())
    median = {name: {side: statistics.median(all_) for side, all_ in sides.items()} for name, sides in taken.items()}
    total = {side: sum(sides[side] for sides in median.values()) for side in next(iter(median.values()))}
    return {
        "images": count,
        "images_per_second": {name: {s: count / t for s, t in sides.items()} for name, sides in median.items()},
        "ratio": {f"precompute / {side}": total[side] / total["precompute"] for side in ("bare loop", "Ray's guide")},
    }


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


def peak_mb() -> float:
    """This process's largest memory so far, MB; `getrusage` would count its parent's in."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def one_run(images: str, store: str, log: str, told: Any) -> None:
    """A driver in a process of its own."""
    import waiting_expert  # noqa: F401

    from pipelines.precompute.listing import find_images
    from pipelines.precompute.run import precompute

    os.environ.update(WAITING_MS="0", WAITING_LOG=log)
    started = time.perf_counter()
    with ray_session():
        before = peak_mb()
        precompute(
            find_images(images),
            store,
            experts=("waiting",),
            pools=[f"waiting={CORES},cpu=1,batch={BATCH}"],
            size="mini",
            progress=False,
        )
        peak = peak_mb()
    computed = batches(Path(log))
    told.put(
        {
            "seconds": time.perf_counter() - started,
            "images_per_second": sum(count for _, _, count in computed[1:]) / (computed[-1][0] - computed[0][0]),
            "driver_mb": peak,
            "driver_mb_before": before,
        }
    )


def growth(folder: Path, counts: Sequence[int]) -> dict[int, dict[str, float]]:
    """Per number of tiny pictures: seconds in all, images/s from the first batch on, and the driver's largest memory."""
    measured = {}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=folder) as at:
            images = draw_pictures(Path(at, "pictures"), count, (SIZE, SIZE), ".png")
            told = spawn.SimpleQueue()
            driver = spawn.Process(
                target=one_run, args=(str(images), str(Path(at, "store")), str(Path(at, "log")), told)
            )
            driver.start()
            driver.join()
            if driver.exitcode:
                raise RuntimeError(f"the run over {count} pictures ended with {driver.exitcode}")
            measured[count] = told.get()
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("work", "nodes", "speeds", "growth")
    parser.add_argument("part", nargs="*", choices=[*parts, []], help="what to measure [all]")
    parser.add_argument("--images", type=int, default=2000, help="pictures per expert in `work` [2000]")
    parser.add_argument("--repeat", type=int, default=1, help="turns of each side in `work` [1]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of work per node in `nodes` and `speeds` [40]")
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=NODES, help="sizes of the clusters of `nodes` [1 2 4 8]"
    )
    parser.add_argument("--most", type=int, default=GROWTH[-1], help="most pictures in `growth` [100000]")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; emptied after [the temporary folder]")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(argv)
    if options.images < 100 or options.repeat < 1:
        parser.error("--images must be at least 100 and --repeat at least 1")
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mova-precompute-") as at:
        folder = Path(at)
        measure: dict[str, Callable[[], Any]] = {
            "work": lambda: useful_work(folder, options.images, options.repeat),
            "nodes": lambda: {count: scaling(folder, [1] * count, options.seconds) for count in options.nodes},
            "speeds": lambda: scaling(folder, SPEEDS, options.seconds),
            "growth": lambda: growth(folder, [count for count in GROWTH if count <= options.most]),
        }
        for part in options.part or parts:
            measured[part] = measure[part]()
            if not options.json:
                print(tell({part: measured[part]}), flush=True)
    if options.json:
        print(json.dumps(measured))


def tell(measured: Mapping[str, Any]) -> str:
    """Tables for people."""
    lines = []
    if work := measured.get("work"):
        lines.append(f"work: {work['images']} pictures of 640x480, images/s on {CORES} cores, start-up left out")
        for name, sides in work["images_per_second"].items():
            lines.append(f"  {name:12}" + "".join(f"{side:>13} {speed:7.1f}" for side, speed in sorted(sides.items())))
        lines += [f"  {name:28} {ratio:5.2f}" for name, ratio in work["ratio"].items()]
    if clusters := measured.get("nodes"):
        lines.append(
            f"nodes that only wait, {WAIT_MS:g} ms a picture: images/s, and its ratio to that of the waits alone"
        )
        lines += [f"  {count:3} {one['images_per_second']:8.1f} {one['ratio']:5.2f}" for count, one in clusters.items()]
    if one := measured.get("speeds"):
        lines.append(f"nodes of speeds {':'.join(map(str, SPEEDS))}: the same")
        lines.append(f"      {one['images_per_second']:8.1f} {one['ratio']:5.2f}")
    if runs := measured.get("growth"):
        lines.append(
            "growth: pictures of 16 pixels; seconds in all, images/s, the driver's largest memory (MB), before the run"
        )
        lines += [
            f"  {count:7} {one['seconds']:7.1f} {one['images_per_second']:8.1f} {one['driver_mb']:8.0f} {one['driver_mb_before']:8.0f}"
            for count, one in runs.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

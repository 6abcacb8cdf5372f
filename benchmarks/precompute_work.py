"""`precompute` beside a bare loop and beside a script after Ray's guide: the `work` part of benchmarks/precompute.py."""

import contextlib
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from cluster.session import ray_session  # before ray: it sets the environment

CORES = 2
BATCH = 8
EXPERTS = ("biomedclip", "sam", "deplot")  # square crops, large squares, patches: each has pixels of its own
DRAWN = 500  # different pictures; the others are these with a comment of their own, which decodes to the same pixels
CALIBRATION = 400  # pictures that tell how many the work needs
SAMPLE_SECONDS = 1.0  # between two readings of the processes' CPU time

spawn = multiprocessing.get_context("spawn")


def draw_pictures(folder: Path, count: int, size: tuple[int, int], suffix: str) -> Path:
    """Pictures that all differ: smooth ones, as photographs are, or, of 16 pixels, noise."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = draw.integers(0, 256, (max(2, size[1] // 16), max(2, size[0] // 16), 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:06}{suffix}")
    return folder


def photographs(folder: Path, count: int) -> list[str]:
    """Paths of JPEGs of 640x480, each with a SHA-256 of its own."""
    folder.mkdir()
    drawn = [path.read_bytes() for path in sorted(draw_pictures(folder / "drawn", DRAWN, (640, 480), ".jpg").iterdir())]
    (folder / "photographs").mkdir()
    paths = [str(folder / "photographs" / f"{number:06}.jpg") for number in range(count)]
    for number, path in enumerate(paths):
        content = drawn[number % DRAWN]
        comment = b"\xff\xfe\x00\x0a%08d" % number  # a JPEG comment: marker, length, text
        Path(path).write_bytes(content[:2] + comment + content[2:])
    return paths


# One turn of one side


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side did with one expert. Times are seconds since 1970, by the actors' own clock."""

    pictures: int
    called: float  # the side was started
    first_at: float  # an actor (or process) began its first batch: it has the model and decodes no picture yet
    last_at: float  # an actor ended its last batch: `precompute` and the bare loop have written it
    returned: float
    cpu: float = 0.0  # CPU seconds of all processes of this side between `first_at` and `last_at`

    @property
    def work(self) -> float:
        """Seconds that the ratios compare."""
        return self.last_at - self.first_at

    @property
    def rate(self) -> float:
        """Pictures per second of work."""
        return self.pictures / self.work

    @property
    def start_up(self) -> float:
        """Seconds before the work and after it."""
        return self.returned - self.called - self.work


class CpuClock:
    """Reads the CPU time of this process's descendants, which Ray's daemons and workers are, once a second."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # process -> CPU seconds when last read: a process that ended keeps them
        self._readings: list[tuple[float, float]] = []  # (time, CPU seconds of all)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "CpuClock":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, start: float, end: float) -> float:
        """CPU seconds used between two times, interpolated."""
        times, totals = zip(*self._readings, strict=True)
        return float(np.diff(np.interp([start, end], times, totals))[0])

    def _run(self) -> None:
        this = psutil.Process()
        while not self._stop.is_set():
            for process in [*this.children(recursive=True), this]:
                with contextlib.suppress(psutil.Error):  # it ended meanwhile
                    times = process.cpu_times()
                    self._seconds[process.pid] = times.user + times.system
            self._readings.append((time.time(), sum(self._seconds.values())))
            self._stop.wait(SAMPLE_SECONDS)


# The bare loop


def shard_rows(count: int) -> int:
    """Pictures per file, as `precompute` divides so many."""
    from pipelines.precompute.run import LEAST_ROWS, SHARDS

    return max(LEAST_ROWS, -(-count // SHARDS))


def bare_loop(expert: str, images: Sequence[str], rows: int, folder: str, events: Any) -> None:
    """One of the bare loop's processes: decodes, prepares and computes its share of the pictures, and writes the features."""
    import torch
    from safetensors.torch import save_file

    from mova_core.experts import load_expert

    torch.set_num_threads(1)
    model = load_expert(expert, size="mini")
    with torch.no_grad():
        model(model.preprocess([Image.new("RGB", (64, 64))]))
        first_at = time.time()
        for start in range(0, len(images), rows):
            features: dict[str, torch.Tensor] = {}
            shard = images[start : start + rows]
            for at in range(0, len(shard), BATCH):
                batch = shard[at : at + BATCH]
                tokens, _ = model(model.preprocess(batch))
                features.update(zip(batch, tokens, strict=True))
            save_file({path: row.clone() for path, row in features.items()}, f"{folder}/{start:07}.safetensors")
    events.put((first_at, time.time()))


def bare_turn(expert: str, images: Sequence[str], folder: Path) -> Turn:
    """One process per core, each with its share of the pictures."""
    called, events = time.time(), spawn.SimpleQueue()
    processes = []
    for core in range(CORES):
        (folder / str(core)).mkdir()
        share = (expert, images[core::CORES], shard_rows(len(images)), str(folder / str(core)), events)
        processes.append(spawn.Process(target=bare_loop, args=share))
        processes[-1].start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of the bare loop ended with {process.exitcode}")
    begun, ended = zip(*[events.get() for _ in processes], strict=True)
    return Turn(pictures=len(images), called=called, first_at=min(begun), last_at=max(ended), returned=time.time())


# Ray's guide


class Guide:
    """An expert as Ray's guide has models: loaded in the constructor, called with a batch of decoded pictures."""

    def __init__(self, name: str, events: str):
        import torch

        from mova_core.experts import load_expert

        torch.set_num_threads(1)
        self.expert = load_expert(name, size="mini")
        self.expert(self.expert.preprocess([Image.new("RGB", (64, 64))]))
        self.events = open(events, "a", buffering=1)  # noqa: SIM115

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        started = time.time()
        with torch.no_grad():
            tokens, _ = self.expert(self.expert.preprocess([Image.fromarray(image) for image in batch["image"]]))
        self.events.write(f"{started} {time.time()}\n")
        return {"path": batch["path"], "features": tokens.numpy()}


def guide_turn(expert: str, images: Sequence[str], folder: Path) -> Turn:
    """read_images, map_batches with as many actors, write_parquet with a tensor column.

    The guide's pictures are decoded by other tasks before its actors' first batch, and written by others after the last: the
    seconds of these ends are in its start-up, which is in its favour.
    """
    called, events = time.time(), folder / "events"
    with ray_session():
        import ray

        dataset = ray.data.read_images(list(images), include_paths=True, mode="RGB").map_batches(
            Guide,
            fn_constructor_args=(expert, str(events)),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=CORES),
            num_cpus=1,
        )
        dataset.context.enable_progress_bars = False
        dataset.write_parquet(str(folder / "features"))
    times = [[float(word) for word in line.split()] for line in events.read_text().splitlines()]
    begun, ended = zip(*times, strict=True)
    return Turn(pictures=len(images), called=called, first_at=min(begun), last_at=max(ended), returned=time.time())


# mova


def precompute_turn(expert: str, images: Sequence[str], folder: Path) -> Turn:
    """`precompute`, whose summary has the seconds between its actors' first batch and last shard written."""
    called, store = time.time(), folder / "store"
    with ray_session():
        from pipelines.precompute.listing import image_table
        from pipelines.precompute.run import precompute

        summary = precompute(
            image_table(images),
            store,
            experts=(expert,),
            pools=[f"{expert}={CORES},cpu=1,batch={BATCH}"],
            size="mini",
            progress=False,
        )
    if summary.computed != {expert: len(images)}:
        raise RuntimeError(f"precompute stored {summary.computed}, not all {len(images)} pictures")
    last_at = max(path.stat().st_mtime for path in store.glob("*/*/receipts/*.parquet"))
    return Turn(
        pictures=len(images),
        called=called,
        first_at=last_at - summary.experts[expert]["seconds"],
        last_at=last_at,
        returned=time.time(),
    )


# All sides

SIDES: Mapping[str, Callable[[str, Sequence[str], Path], Turn]] = {
    "bare loop": bare_turn,
    "precompute": precompute_turn,
    "Ray's guide": guide_turn,
}


def measured(side: str, expert: str, images: Sequence[str], folder: Path) -> Turn:
    """One turn, in an empty folder, with its CPU time."""
    with tempfile.TemporaryDirectory(dir=folder) as empty, CpuClock() as clock:
        turn = SIDES[side](expert, images, Path(empty))
    return replace(turn, cpu=clock.between(turn.first_at, turn.last_at))


def useful_work(folder: Path, seconds: float, repeat: int, experts: Sequence[str] = EXPERTS) -> dict[str, Any]:
    """Images/s, CPU seconds and start-up per expert and side, and the ratios over all experts.

    Args:
        folder: on the disk to measure.
        seconds: of work, about, that the fastest side has with the fastest expert.
        repeat: turns of each side; the medians count.
        experts: measured one after the other.
    """
    some = photographs(folder / "calibration", CALIBRATION)
    rate = max(measured("bare loop", name, some, folder).rate for name in experts)
    images = photographs(folder / "work", max(CALIBRATION, int(rate * seconds)))
    turns: dict[str, dict[str, list[Turn]]] = {name: {side: [] for side in SIDES} for name in experts}
    for number in range(repeat):
        for name in experts:
            for side in sorted(SIDES, reverse=bool(number % 2)):
                turns[name][side].append(measured(side, name, images, folder))
    medians = {
        name: {
            side: {
                "work": statistics.median(turn.work for turn in done),
                "cpu": statistics.median(turn.cpu for turn in done),
                "start_up": statistics.median(turn.start_up for turn in done),
            }
            for side, done in sides.items()
        }
        for name, sides in turns.items()
    }
    total = {
        (side, what): sum(sides[side][what] for sides in medians.values()) for side in SIDES for what in ("work", "cpu")
    }
    return {
        "images": len(images),
        "shortest_work": min(sides[side]["work"] for sides in medians.values() for side in SIDES),
        "experts": medians,
        "ratio": {
            f"precompute / {side}": {what: total[side, what] / total["precompute", what] for what in ("work", "cpu")}
            for side in SIDES
            if side != "precompute"
        },
    }


def work_table(work: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people."""
    count = work["images"]
    yield f"work: {count:,} pictures of 640x480 on {CORES} cores, the shortest side {work['shortest_work']:.0f} s of work"
    yield f"  {'expert':12}{'side':14}{'images/s':>10}{'CPU s per 1000':>16}{'start-up s':>12}"
    for name, sides in work["experts"].items():
        for side, row in sides.items():
            rate, cpu = count / row["work"], 1000 * row["cpu"] / count
            yield f"  {name:12}{side:14}{rate:10.1f}{cpu:16.2f}{row['start_up']:12.1f}"
    for name, ratio in work["ratio"].items():
        yield f"  {name}: {ratio['work']:.2f} of its images/s; {ratio['cpu']:.2f} by CPU time"
    if work["ratio"]["precompute / bare loop"]["work"] > 1:
        yield "  over 1.00 of the bare loop: nothing is faster than that, so the machine was disturbed: measure anew"

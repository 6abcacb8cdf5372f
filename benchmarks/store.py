"""The feature store against a memory-map copy of the same rows, and against a plain synced write of the same bytes.

    python benchmarks/store.py [--rows 200] [--repeat 5] [--folder .] [--json]

The two sides of a ratio take turns row by row, batch by batch, shard by shard, so that a disk or a neighbour that slows
down slows both. The map stays mapped and copies into a buffer that is used again, as the store's reader does. Rows are
CLIP's: 2304 x 1024 bfloat16, 4.5 MiB. Needs twice their bytes on the disk, and in memory for "warm" to mean warm.

A warm speed is the median of its turns; where the disk is measured, which works in bursts, all bytes over all time.
A kernel that reads far ahead (/sys/block/*/queue/read_ahead_kb) flatters a cold map as long as all rows fit in memory.
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mova_core.features import ExpertShelf, Features, FeatureStore

GRID, CHANNELS = (48, 48), 1024
ROW = GRID[0] * GRID[1] * CHANNELS * 2  # bytes
SHARD = 28  # rows: 126 MiB
BATCH = 8


def seconds(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


class Bench:
    """One store and one plain file with the same rows."""

    def __init__(self, folder: Path, rows: int, repeat: int):
        self.plain = folder / "plain.bin"
        description = {"expert": "clip", "dtype": "bfloat16", "grid": GRID, "channels": CHANNELS}
        self.shelf: ExpertShelf = FeatureStore(folder / "store", create=True).add_expert(description)
        self.keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(rows)]
        self.repeat = repeat
        self.buffer = torch.zeros(BATCH * ROW, dtype=torch.uint8)
        self.view = self.buffer.numpy()
        self.turns: dict[str, list[tuple[int, float]]] = {}  # rows and seconds of each

    def write(self) -> None:
        """Every shard once through the store and once as plain bytes, in turns."""
        noise = torch.randn(SHARD, GRID[0] * GRID[1], CHANNELS, generator=torch.Generator().manual_seed(0)).bfloat16()
        with open(self.plain, "wb", buffering=0) as file:

            def plain(features: dict[str, Features]) -> None:
                for row in features.values():
                    file.write(row.tokens.view(torch.uint8).numpy().data)
                os.fsync(file.fileno())

            for number, shard in enumerate(self.shelf.plan(self.keys, SHARD)):
                features = {key: Features(noise[at].roll(number), GRID) for at, key in enumerate(shard.keys)}
                sides: dict[str, Callable[[], object]] = {
                    "write, synced": partial(self.shelf.write, shard.id, features),
                    "plain write, synced": partial(plain, features),
                }
                for name in sorted(sides, reverse=bool(number % 2)):
                    self.turns.setdefault(name, []).append((len(features), seconds(sides[name])))
        self.shelf.snapshot()

    def read(self) -> None:
        """Passes over all rows in random order: one row at a time and in batches, warm, then batches from the disk."""
        with open(self.plain, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for size, name in ((1, "1 row, warm"), (BATCH, f"{BATCH} rows, warm")):
                sides = {
                    f"map, {name}": partial(self.copy, mapped),
                    name: partial(self.load, False),
                    f"{name}, verified": partial(self.load, True),
                }
                self.take_turns(sides, size)
        cold: dict[str, Callable[[list[int]], None]] = {
            f"map, {BATCH} rows, cold": self.copy_cold,
            f"{BATCH} rows, cold, verified": partial(self.load, True),
        }
        self.take_turns(cold, BATCH, cold=True)

    def take_turns(self, sides: Mapping[str, Callable[[list[int]], None]], size: int, cold: bool = False) -> None:
        for number in range(self.repeat + (not cold)):
            if cold:
                self.forget_pages()
            draw = random.Random(number)
            orders = {name: draw.sample(range(len(self.keys)), len(self.keys)) for name in sides}
            for at in range(0, len(self.keys), size):
                for name in draw.sample(list(sides), len(sides)):
                    chosen = orders[name][at : at + size]
                    taken = seconds(partial(sides[name], chosen))
                    if cold or number:  # the first warm pass makes it warm
                        self.turns.setdefault(name, []).append((len(chosen), taken))

    def load(self, verify: bool, chosen: list[int]) -> None:
        self.shelf.read([self.keys[at] for at in chosen], out=self.buffer, verify=verify)

    def copy(self, mapped: mmap.mmap, chosen: list[int]) -> None:
        rows = np.frombuffer(mapped, np.uint8).reshape(-1, ROW)
        for at, row in enumerate(chosen):
            self.view[at * ROW : (at + 1) * ROW] = rows[row]

    def copy_cold(self, chosen: list[int]) -> None:
        """Through a map of its own: one that stays keeps its pages from being dropped."""
        with open(self.plain, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            self.copy(mapped, chosen)

    def forget_pages(self) -> None:
        for path in (self.plain, *(self.shelf.folder / "shards").iterdir()):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def speeds(self) -> dict[str, float]:
        """GB/s of each side."""
        speeds = {}
        for name, turns in self.turns.items():
            rows, taken = (sum(part) for part in zip(*turns, strict=True))
            typical = statistics.median(rows / taken for rows, taken in turns) if "warm" in name else rows / taken
            speeds[name] = typical * ROW / 1e9
        return speeds

    def ratios(self) -> dict[str, float]:
        """Of each side's speed to that of its plain one."""
        pairs = [
            ("write, synced", "plain write, synced"),
            ("1 row, warm", "map, 1 row, warm"),
            ("1 row, warm, verified", "map, 1 row, warm"),
            (f"{BATCH} rows, warm", f"map, {BATCH} rows, warm"),
            (f"{BATCH} rows, warm, verified", f"map, {BATCH} rows, warm"),
            (f"{BATCH} rows, cold, verified", f"map, {BATCH} rows, cold"),
        ]
        speeds = self.speeds()
        return {name: speeds[name] / speeds[base] for name, base in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="features of 4.5 MiB [200]")
    parser.add_argument("--repeat", type=int, default=5, help="passes over them for each reader [5]")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; emptied after [the temporary folder]")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(argv)
    if options.rows < BATCH or options.repeat < 1:
        parser.error(f"--rows must be at least {BATCH} and --repeat at least 1")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mova-store-") as folder:
        bench = Bench(Path(folder), options.rows, options.repeat)
        bench.write()
        bench.read()
    ratios, speeds = bench.ratios(), bench.speeds()
    if options.json:
        print(json.dumps({"rows": options.rows, "row_bytes": ROW, "ratio": ratios, "gb_per_second": speeds}))
        return
    print(f"{options.rows} rows of {ROW / 2**20:.1f} MiB, {options.repeat} passes: ratio to the plain side, speed")
    for name, ratio in ratios.items():
        print(f"  {name:28} {ratio:5.2f}   {speeds[name]:6.2f} GB/s")
    for name in speeds.keys() - ratios.keys():
        print(f"  {name:28}         {speeds[name]:6.2f} GB/s")


if __name__ == "__main__":
    main()

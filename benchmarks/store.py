"""The feature store against a memory-map copy of the same rows, and against a plain synced write of the same bytes.

    python benchmarks/store.py [--rows 100] [--repeat 20] [--folder .] [--json]
    python benchmarks/store.py --keys 10000000 [--folder .] [--json]

The two sides of a ratio take turns row by row, batch by batch, shard by shard, so that a disk or a neighbour that slows
down slows both. The map stays mapped and copies into a buffer that is used again; so does the store's reader, but for
"mapped, verified": there it gives the page cache itself, every byte hashed and none copied, as it does where no buffer
is given. Rows are CLIP's: 2304 x 1024 bfloat16, 4.5 MiB. Needs twice their bytes on the disk, and in memory for "warm"
to mean warm.

A warm speed is the median of its turns; where the disk is measured, which works in bursts, all bytes over all time. In
the epoch of two processes each reads half of the rows, and its time is that of the slower one.
A kernel that reads far ahead (/sys/block/*/queue/read_ahead_kb) flatters a cold map as long as all rows fit in memory.

With --keys it measures planning instead: half of so many keys are stored (nine in ten of these in a mapped index, the
rest in newer receipts); which are absent, and what shards are they? Time and the process's peak memory.
"""

import argparse
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mova_core.features import FeaturePartition, Features, FeatureStore
from mova_core.features.index import RECEIPT

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
        self.folder, self.plain = folder, folder / "plain.bin"
        self.partition: FeaturePartition
        self.keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(rows)]
        self.repeat = repeat
        self.buffer = torch.zeros(BATCH * ROW, dtype=torch.uint8)
        self.view = self.buffer.numpy()
        self.turns: dict[str, list[tuple[int, float]]] = {}  # rows and seconds of each

    def write(self) -> None:
        """Passes over all shards, each once through a new store and once as plain bytes, in turns; the last pass stays."""
        for number in range(self.repeat):
            if number:
                shutil.rmtree(self.folder / "store")
            self.write_pass()
        self.partition.snapshot()

    def write_pass(self) -> None:
        description = {"expert": "clip", "dtype": "bfloat16", "grid": GRID, "channels": CHANNELS}
        self.partition = FeatureStore(self.folder / "store", create=True).add_expert(description)
        noise = torch.randn(SHARD, GRID[0] * GRID[1], CHANNELS, generator=torch.Generator().manual_seed(0)).bfloat16()
        with open(self.plain, "wb", buffering=0) as file:

            def plain(features: dict[str, Features]) -> None:
                for row in features.values():
                    file.write(row.tokens.view(torch.uint8).numpy().data)
                os.fsync(file.fileno())

            for number, shard in enumerate(self.partition.plan(self.keys, SHARD)):
                features = {key: Features(noise[at].roll(number), GRID) for at, key in enumerate(shard.keys)}
                sides: dict[str, Callable[[], object]] = {
                    "write, synced": partial(self.partition.write, shard.id, features),
                    "plain write, synced": partial(plain, features),
                }
                for name in sorted(sides, reverse=bool(number % 2)):
                    self.turns.setdefault(name, []).append((len(features), seconds(sides[name])))

    def read(self) -> None:
        """Passes over all rows in random order: one row at a time and in batches, warm, then batches from the disk."""
        with open(self.plain, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for size, name in ((1, "1 row, warm"), (BATCH, f"{BATCH} rows, warm")):
                sides: dict[str, Callable[[list[int]], None]] = {
                    f"map, {name}": partial(self.copy, mapped),
                    name: partial(self.load, False),
                    f"{name}, verified": partial(self.load, True),
                    f"{name}, mapped, verified": self.map,
                }
                self.take_turns(sides, size)
        cold: dict[str, Callable[[list[int]], None]] = {
            f"map, {BATCH} rows, cold": self.copy_cold,
            f"{BATCH} rows, cold, verified": partial(self.load, True),
        }
        self.take_turns(cold, BATCH, cold=True)
        self.epochs_of_two()

    def epochs_of_two(self) -> None:
        """Shuffled epochs by two processes at once, from the disk: batches of the store, and of a map."""
        sides = {"map, 2 processes, cold": self.copy_cold, "2 processes, cold, verified": partial(self.load, True)}
        context = multiprocessing.get_context("fork")
        for number in range(self.repeat):
            order = random.Random(number).sample(range(len(self.keys)), len(self.keys))
            for name in sorted(sides, reverse=bool(number % 2)):
                self.forget_pages()
                begun, taken = context.Barrier(2), context.SimpleQueue()
                processes = [
                    context.Process(target=self.epoch, args=(sides[name], order[half::2], begun, taken))
                    for half in range(2)
                ]
                for process in processes:
                    process.start()
                self.turns.setdefault(name, []).append((len(order), max(taken.get() for _ in processes)))
                for process in processes:
                    process.join()

    def epoch(self, read: Callable[[list[int]], None], order: Sequence[int], begun: Any, taken: Any) -> None:
        """Reads these rows in batches; pages that were read along are gone before the next, as in a store beyond memory."""
        begun.wait()
        spent = 0.0
        for at in range(0, len(order), BATCH):
            spent += seconds(partial(read, list(order[at : at + BATCH])))
            self.forget_pages()
        taken.put(spent)

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
        self.partition.read([self.keys[at] for at in chosen], out=self.buffer, verify=verify)

    def map(self, chosen: list[int]) -> None:
        self.partition.read([self.keys[at] for at in chosen])

    def copy(self, mapped: mmap.mmap, chosen: list[int]) -> None:
        rows = np.frombuffer(mapped, np.uint8).reshape(-1, ROW)
        for at, row in enumerate(chosen):
            self.view[at * ROW : (at + 1) * ROW] = rows[row]

    def copy_cold(self, chosen: list[int]) -> None:
        """Through a map of its own: one that stays keeps its pages from being dropped."""
        with open(self.plain, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            self.copy(mapped, chosen)

    def forget_pages(self) -> None:
        """Nobody may have them mapped: those would stay."""
        self.partition = FeaturePartition(self.partition.location)
        for path in (self.plain, *Path(self.partition.location, "shards").iterdir()):
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
            ("1 row, warm, mapped, verified", "map, 1 row, warm"),
            (f"{BATCH} rows, warm", f"map, {BATCH} rows, warm"),
            (f"{BATCH} rows, warm, verified", f"map, {BATCH} rows, warm"),
            (f"{BATCH} rows, warm, mapped, verified", f"map, {BATCH} rows, warm"),
            (f"{BATCH} rows, cold, verified", f"map, {BATCH} rows, cold"),
            ("2 processes, cold, verified", "map, 2 processes, cold"),
        ]
        speeds = self.speeds()
        return {name: speeds[name] / speeds[base] for name, base in pairs}


def plan(folder: Path, count: int, rows_per_shard: int = 64) -> dict[str, float]:
    """Plans `count` keys of which half are stored; seconds of each step, and the peak memory of the process in GB."""
    description = {"expert": "clip", "dtype": "bfloat16", "grid": GRID, "channels": CHANNELS}
    partition = FeatureStore(folder / "store", create=True).add_expert(description)
    keys = np.frombuffer(np.random.default_rng(0).bytes(32 * count), "S32")
    stored, receipt_rows = keys[: count // 2], 10_000
    newest = len(stored) * 9 // 10
    for begin in range(0, len(stored), receipt_rows):
        if begin >= newest > begin - receipt_rows:
            partition.snapshot()
        chunk = stored[begin : begin + receipt_rows]
        shard, rows = partition.shard_id(chunk), len(chunk)
        text = chunk.tobytes().hex()
        columns = {
            "key": [text[at : at + 64] for at in range(0, len(text), 64)],
            "file": [f"{shard}-0.safetensors"] * rows,
            "offset": np.arange(rows) * ROW,
            "length": np.full(rows, ROW),
            "grid": [list(GRID)] * rows,
            "dtype": ["bfloat16"] * rows,
            "channels": np.full(rows, CHANNELS),
            "xxh3": np.arange(rows),
            "loss": np.zeros(rows),
        }
        pq.write_table(pa.table(columns).cast(RECEIPT), f"{partition.location}/receipts/{shard}.parquet")
    wanted = np.random.default_rng(1).permutation(keys)
    told: dict[str, float] = {}
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe()

    def planned() -> None:  # in a process of its own, whose peak memory is that of planning alone
        begin, worked = time.perf_counter(), time.process_time()
        opened = FeaturePartition(partition.location)
        told["open"] = time.perf_counter() - begin
        absent = opened.missing_positions(wanted)
        told["absent"] = time.perf_counter() - begin - told["open"]
        parts = range(0, len(absent), rows_per_shard)
        shards = [opened.shard_id(wanted[absent[at : at + rows_per_shard]]) for at in parts]
        told["whole plan"] = time.perf_counter() - begin
        told["of it CPU"] = time.process_time() - worked
        assert len(absent) == count - len(stored) and len(set(shards)) == len(parts)
        child.send({**told, "shards": len(shards), "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6})

    process = context.Process(target=planned)
    process.start()
    result: dict[str, float] = parent.recv()
    process.join()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100, help="features of 4.5 MiB [100]")
    parser.add_argument("--repeat", type=int, default=20, help="passes over them for each side [20]")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; emptied after [the temporary folder]")
    parser.add_argument("--keys", type=int, help="plan so many keys instead")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(argv)
    if options.rows < BATCH or options.repeat < 1:
        parser.error(f"--rows must be at least {BATCH} and --repeat at least 1")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mova-store-") as folder:
        if options.keys:
            planned = plan(Path(folder), options.keys)
            lines = [f"  {name:12} {value:10,.2f}" for name, value in planned.items()]
            print(json.dumps(planned) if options.json else "\n".join([f"{options.keys:,} keys, seconds", *lines]))
            return
        bench = Bench(Path(folder), options.rows, options.repeat)
        bench.write()
        bench.read()
    ratios, speeds = bench.ratios(), bench.speeds()
    if options.json:
        print(json.dumps({"rows": options.rows, "row_bytes": ROW, "ratio": ratios, "gb_per_second": speeds}))
        return
    print(f"{options.rows} rows of {ROW / 2**20:.1f} MiB, {options.repeat} passes: ratio to the plain side, speed")
    for name, ratio in ratios.items():
        print(f"  {name:30} {ratio:5.2f}   {speeds[name]:6.2f} GB/s")
    for name in speeds.keys() - ratios.keys():
        print(f"  {name:30}         {speeds[name]:6.2f} GB/s")


if __name__ == "__main__":
    main()

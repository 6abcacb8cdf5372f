"""Precompute against a bare loop and against a script after Ray's batch-inference guide; how it scales with nodes and pictures.

    python benchmarks/precompute.py [work] [nodes] [speeds] [growth] [--seconds 60] [--repeat 1] [--folder .] [--json]

work: images/s of `precompute` on this machine's cores, expert by expert, over that of two other ways to compute the same
features. The bare loop is what the cores can do at most: a process per core that decodes, prepares and computes its share of
the pictures in the same batches and writes a safetensors file per shard; it checks and syncs nothing. The script is Ray's guide
with this expert in a class: read_images, map_batches with as many actors, write_parquet with a tensor column. The sides take
turns, one at a time on the machine. All are timed by the actors (or processes) themselves, from the first batch that one of them
begins to the last that one of them ends, over at least --seconds of work. What comes before and after is the start-up: Ray,
the first look at every picture, loading. CPU seconds are those of all processes of a side, Ray's too, during the work: they
can be compared on a machine that is not quiet.

nodes: `precompute` with an expert that only waits, on clusters of 1, 2, 4, 8 nodes with one actor each. All nodes are
processes on this machine, so the waits are long beside what everything else costs. speeds: the same on four nodes that
wait 1, 1, 1/2 and 1/8 as long. Timed from when every actor has had its first batch to the last batch: the ends, where
some nodes have nothing left to do, count. 1.0 is the time that waiting alone would take.

growth: that expert without waiting on more and more tiny pictures: images/s from the first batch to the last, and the
driver's largest memory, without the object store that all processes of a node share.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # tests: waiting_expert
# Of drivers and actors.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))

from benchmarks.precompute_scaling import GROWTH, NODES, SPEEDS, growth, scaling, scaling_table  # noqa: E402
from benchmarks.precompute_work import EXPERTS, useful_work, work_table  # noqa: E402

PARTS: Mapping[str, Callable[[Path, argparse.Namespace], Any]] = {
    "work": lambda folder, options: useful_work(folder, options.seconds, options.repeat, options.experts),
    "nodes": lambda folder, options: {count: scaling(folder, [1] * count, options.seconds) for count in options.nodes},
    "speeds": lambda folder, options: scaling(folder, SPEEDS, options.seconds),
    "growth": lambda folder, options: growth(folder, [count for count in GROWTH if count <= options.most]),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="what to measure [all]")
    parser.add_argument("--seconds", type=float, default=60.0, help="of work: each side's, or each node's [60]")
    parser.add_argument("--repeat", type=int, default=1, help="turns of each side in `work` [1]")
    parser.add_argument("--experts", nargs="+", default=EXPERTS, help=f"of `work` [{' '.join(EXPERTS)}]")
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=NODES, help="sizes of the clusters of `nodes` [1 2 4 8]"
    )
    parser.add_argument("--most", type=int, default=GROWTH[-1], help="most pictures in `growth` [100000]")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; emptied after [the temporary folder]")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(argv)
    if options.seconds <= 0 or options.repeat < 1:
        parser.error("--seconds must be over 0 and --repeat at least 1")
    results: dict[str, Any] = {}
    for part in options.part or PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="mova-precompute-") as folder:
            results[part] = PARTS[part](Path(folder), options)
        if not options.json:
            print("\n".join(table(part, results[part])), flush=True)
    if options.json:
        print(json.dumps(results))


def table(part: str, result: Any) -> Iterator[str]:
    """Lines for people."""
    return work_table(result) if part == "work" else scaling_table(part, result)


if __name__ == "__main__":
    main()

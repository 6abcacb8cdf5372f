"""The planner's placement against its own prediction, and against two that a user might write, on simulated clusters.

    python benchmarks/placement.py [--profile FILE --size full --dtype bfloat16] [--images 1000000] [--json]

Every placement runs the same simulated precompute: shards of 64 pictures, 5 % noise on a batch's time, 30 s until an
actor is ready, no limit on reading and writing. The naive ones: *round-robin* gives every GPU to one expert, in turns; *everywhere* puts
every expert onto every GPU in equal shares, as many as fit its memory. Without --profile speeds are drawn from a seed
around what FLOPs and data sheets suggest: they are of no real GPU, and only ratios between placements mean something.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice

from cluster.nodes import GIB, NodeType, PlanError, profiles_on
from cluster.placement import CONTEXT, SHARES, plan_placement
from cluster.pools import PoolSpec
from cluster.simulator import Conditions, simulate
from mova_core.experts import EXPERTS, expert_card
from mova_core.experts.cost import Measured, Profile, read_profiles

SHARD = 64  # rows
CONDITIONS = Conditions(shard_rows=SHARD, noise=0.05)
GPUS = {"H100": (400.0, 80), "A100": (180.0, 40), "L4": (50.0, 22), "T4": (25.0, 15)}  # TFLOP/s and GiB, about
TFLOPS = dict(zip(EXPERTS, (3.48, 0.93, 4.70, 2.53, 0.52, 0.04, 5.64), strict=True))  # a picture


def machines(kind: str, count: int, gpus: int) -> NodeType:
    memory = GPUS[kind][1] * GIB
    return NodeType(count=count, cpus=12 * gpus, memory=64 * gpus * GIB, accelerator=kind, gpus=gpus, gpu_memory=memory)


CLUSTERS = {
    "1 A100": [machines("A100", 1, 1)],
    "8 A100": [machines("A100", 1, 8)],
    "4 A100, 8 L4": [machines("A100", 1, 4), machines("L4", 2, 4)],
    "16 A100, 32 L4, 32 T4": [machines("A100", 2, 8), machines("L4", 8, 4), machines("T4", 8, 4)],
    "64 H100, 64 A100": [machines("H100", 8, 8), machines("A100", 8, 8)],
    "240 H100, 320 A100, 240 L4, 200 T4": [
        machines("H100", 30, 8),
        machines("A100", 40, 8),
        machines("L4", 30, 8),
        machines("T4", 25, 8),
    ],
}


def drawn(seed: int) -> list[Profile]:
    """Profiles of every expert on every kind of GPU."""
    chance = random.Random(seed)
    profiles = []
    for name, tflops in TFLOPS.items():
        weights, each = chance.uniform(0.5, 2.5), tflops * chance.uniform(0.05, 0.15)  # GiB
        for kind, (speed, memory) in GPUS.items():
            fastest = speed / tflops * chance.uniform(0.3, 0.9)
            batches = [
                Measured(
                    batch=batch,
                    images_per_second=fastest * batch / (batch + 2),
                    peak_bytes=int((weights + each * batch) * GIB),
                )
                for batch in (2**power for power in range(8))
                if weights + each * batch < memory - 1
            ]
            profiles.append(
                Profile(expert=name, arch={}, dtype="bfloat16", device=kind, threads=1, batches=tuple(batches))
            )
    return profiles


def sized(name: str, node: NodeType, share: float, profiles: Sequence[Profile]) -> PoolSpec | None:
    """A pool of one actor on a share of a GPU, with its rate; None where it does not fit."""
    room = share * (node.gpu_memory or 0) - CONTEXT
    measured = profiles_on(node.accelerator, name, profiles)
    if not measured or (measured[0].batches[0].peak_bytes or 0) > room:
        return None
    best = measured[0].best(room)
    rate = share * best.images_per_second
    return PoolSpec(expert=name, gpu=share, accelerator=node.accelerator, batch=best.batch, rate=rate)


def merged(pools: Sequence[PoolSpec]) -> list[PoolSpec]:
    """One pool for actors that are alike."""
    group_identical: dict[PoolSpec, int] = {}
    for pool in pools:
        group_identical[pool] = group_identical.get(pool, 0) + 1
    return [replace(pool, max_size=count, rate=(pool.rate or 0) * count) for pool, count in group_identical.items()]


def round_robin(wanted: Mapping[str, int], nodes: Sequence[NodeType], profiles: Sequence[Profile]) -> list[PoolSpec]:
    """A GPU to each expert in turn; experts without a GPU wait for the first that finishes."""
    gpus = [node for node in nodes for _ in range(node.count * node.gpus)]
    dealt = zip(islice(cycle(gpus), max(len(gpus), len(wanted))), cycle(wanted))
    pools = [pool for node, name in dealt if (pool := sized(name, node, 1.0, profiles)) is not None]
    return merged(pools)


def everywhere(wanted: Mapping[str, int], nodes: Sequence[NodeType], profiles: Sequence[Profile]) -> list[PoolSpec]:
    """Every expert on every GPU, in equal shares; an expert that fits no GPU waits."""
    share = next(share for share in reversed(SHARES) if share * len(wanted) >= 1) if len(wanted) > 1 else 1.0
    pools: list[PoolSpec] = []
    for node in nodes:
        for name in wanted:
            for wider in [each for each in reversed(SHARES) if each >= share]:
                if (pool := sized(name, node, wider, profiles)) is not None:
                    pools += [pool] * (node.count * node.gpus)
                    break
    return merged(pools)


def row(name: str, nodes: Sequence[NodeType], profiles: Sequence[Profile], images: int) -> dict[str, object]:
    wanted = dict.fromkeys(EXPERTS, images)
    begin = time.perf_counter()
    placed = plan_placement(wanted, profiles, nodes, shard_rows=SHARD)
    planner = time.perf_counter() - begin

    def run(pools: Sequence[PoolSpec]) -> float | None:
        """Images/s of the mix, starts included; None where it cannot run."""
        try:
            return images / simulate(pools, wanted, profiles, nodes, CONDITIONS).seconds
        except PlanError:
            return None

    begin = time.perf_counter()
    done = simulate(placed.pools, wanted, profiles, nodes, CONDITIONS)
    simulator = time.perf_counter() - begin
    rates = [run(naive(wanted, nodes, profiles)) for naive in (round_robin, everywhere)]
    whole = images / done.seconds
    return {
        "cluster": name,
        "order": "sequential" if placed.sequential else "concurrent",
        "predicted": placed.images_per_second,
        "simulated": done.images_per_second,
        "of_bound": placed.images_per_second / placed.bound,
        "planner_seconds": planner,
        "simulator_seconds": simulator,
        "over_round_robin": rates[0] and whole / rates[0],
        "over_everywhere": rates[1] and whole / rates[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="what `mova profile` wrote; default: drawn from a seed")
    parser.add_argument("--size", default="full", help="of the experts in that file")
    parser.add_argument("--dtype", default="bfloat16", help="of the experts in that file")
    parser.add_argument("--images", type=int, default=1_000_000, help="pictures, through all seven experts")
    parser.add_argument("--seed", type=int, default=0, help="of the speeds")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    profiles = drawn(given.seed)
    if given.profile:
        profiles = [
            profile
            for profile in read_profiles(given.profile)
            if profile.expert in EXPERTS and profile.is_of(expert_card(profile.expert), given.size, given.dtype)
        ]
    rows = [row(name, nodes, profiles, given.images) for name, nodes in CLUSTERS.items()]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        "| cluster | order | predicted images/s | simulated / predicted | of the bound | planner s | simulator s | over round-robin | over everywhere |"
    )
    print("| --- " * 9 + "|")
    for result in rows:
        naive = [
            f"{value:.2f}" if isinstance(value := result[key], float) else "-"
            for key in ("over_round_robin", "over_everywhere")
        ]
        print(
            f"| {result['cluster']} | {result['order']} | {result['predicted']:.4g} | {result['simulated'] / result['predicted']:.3f} "  # type: ignore[operator]
            f"| {result['of_bound']:.2f} | {result['planner_seconds']:.1f} | {result['simulator_seconds']:.1f} | {' | '.join(naive)} |"
        )


if __name__ == "__main__":
    main()

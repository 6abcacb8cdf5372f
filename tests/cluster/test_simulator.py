import time
from dataclasses import replace

import pytest

from cluster.nodes import GIB, NodeType, PlanError
from cluster.placement import plan_placement
from cluster.pools import PoolSpec
from cluster.simulator import Conditions, simulate
from mova_core.experts.cost import Measured, Profile

SHARD = 64  # rows


def profile(expert: str, device: str, rate: float, batch: int = 8) -> Profile:
    measured = [Measured(batch=b, images_per_second=rate * b / batch, peak_bytes=GIB) for b in (1, batch)]
    return Profile(expert=expert, arch={}, dtype="bfloat16", device=device, threads=1, batches=measured)


CPUS = [NodeType(cpus=5, memory=8 * GIB)]
TWO = [profile("sam", "cpu X", 2.0), profile("vary", "cpu X", 8.0)]


def test_predicted_and_simulated_rates_agree(chance):
    nodes, profiles = chance.cluster(), chance.profiles()
    wanted = {name: 10 * count for name, count in chance.mix().items()}  # so many that the last shards matter little
    placed = plan_placement(wanted, profiles, nodes, shard_rows=SHARD, seconds=1)
    done = simulate(placed.pools, wanted, profiles, nodes, Conditions(shard_rows=SHARD, noise=0.05, seed=1))
    assert done.images_per_second == pytest.approx(placed.images_per_second, rel=0.1)
    assert done.seconds >= 0.99 * max(wanted.values()) / placed.bound


@pytest.mark.parametrize("chance", [7], indirect=True)
def test_a_thousand_gpus_of_four_kinds_in_a_minute(chance):
    profiles = chance.profiles()
    wanted = {name: chance.randint(2000, 4000) * 1000 for name in chance.mix(least=7)}
    kinds = {"H100": (30, 80), "A100": (40, 40), "L4": (30, 22), "T4": (25, 15)}
    nodes = [
        NodeType(count=count, cpus=96, memory=512 * GIB, accelerator=kind, gpus=8, gpu_memory=memory * GIB)
        for kind, (count, memory) in kinds.items()
    ]
    assert sum(node.count * node.gpus for node in nodes) == 1000
    started = time.perf_counter()
    placed = plan_placement(wanted, profiles, nodes, shard_rows=2 * SHARD, seconds=2)
    done = simulate(placed.pools, wanted, profiles, nodes, Conditions(shard_rows=2 * SHARD, noise=0.05))
    assert time.perf_counter() - started < 60
    assert placed.images_per_second > 0.9 * placed.bound
    assert done.images_per_second == pytest.approx(placed.images_per_second, rel=0.1)


def test_a_run_counted_by_hand():
    pools = [PoolSpec(expert="sam", max_size=2, batch=8, rate=4.0)]
    done = simulate(pools, {"sam": 6 * 8}, TWO, CPUS, Conditions(shard_rows=8, start_seconds=10))
    assert done.seconds == pytest.approx(10 + 3 * 4), "two actors, three shards each, four seconds a batch"
    assert done.images_per_second == pytest.approx(4)
    odd = simulate(pools, {"sam": 9}, TWO, CPUS, Conditions(shard_rows=9, start_seconds=0))
    assert odd.seconds == pytest.approx(9 / 2), "batches go on from shard to shard"


def test_pools_of_one_expert_draw_from_one_queue():
    profiles = [profile("sam", "cpu X", 2.0), profile("sam", "L4", 8.0)]
    nodes = [NodeType(cpus=5, memory=8 * GIB, accelerator="L4", gpus=1)]
    pools = [PoolSpec(expert="sam", batch=8), PoolSpec(expert="sam", gpu=1, accelerator="L4", batch=8)]
    done = simulate(pools, {"sam": 8 * 50}, profiles, nodes, Conditions(shard_rows=8, start_seconds=0))
    assert done.seconds == pytest.approx(8 * 50 / (2 + 8)), "though no rate was predicted to divide the shards by"
    assert done.busy == {"L4": pytest.approx(1.0)}


def test_pools_wait_for_room_and_take_what_others_leave():
    pools = [PoolSpec(expert=name, min_size=4, max_size=4, batch=8) for name in ("sam", "vary")]
    done = simulate(pools, {"sam": 320, "vary": 320}, TWO, CPUS, Conditions(shard_rows=8, start_seconds=1))
    assert done.finished == pytest.approx({"sam": 1 + 40, "vary": 1 + 40 + 1 + 10})
    with pytest.raises(PlanError, match=r"sam=5,batch=8 fits nowhere"):
        simulate([replace(pools[0], min_size=5, max_size=5)], {"sam": 320}, TWO, CPUS, Conditions(shard_rows=8))
    with pytest.raises(PlanError, match="expert vary has no pool"):
        simulate(pools[:1], {"sam": 1, "vary": 1}, TWO, CPUS)
    with pytest.raises(PlanError, match=r"no profile of sam on A100"):
        simulate([PoolSpec(expert="sam", gpu=1, accelerator="A100")], {"sam": 1}, TWO, CPUS)


def test_writing_bounds_the_rate():
    pools = [PoolSpec(expert="vary", max_size=4, batch=8)]
    unlimited = Conditions(shard_rows=8, feature_bytes={"vary": 1000})
    free = simulate(pools, {"vary": 4000}, TWO, CPUS, unlimited)
    store = simulate(pools, {"vary": 4000}, TWO, CPUS, replace(unlimited, store_bytes_per_second=10_000))
    node = simulate(pools, {"vary": 4000}, TWO, CPUS, replace(unlimited, node_bytes_per_second=5_000))
    assert free.images_per_second == pytest.approx(32)
    assert store.images_per_second == pytest.approx(10, rel=0.01)
    assert node.images_per_second == pytest.approx(5, rel=0.01)


def test_machines_that_fail_cost_only_time():
    nodes = [replace(CPUS[0], count=4)]
    pools = [PoolSpec(expert="sam", max_size=16, batch=8)]
    conditions = Conditions(shard_rows=8, repair_seconds=120.0, seed=2)
    failing = replace(conditions, mtbf_hours=0.2)
    sound = simulate(pools, {"sam": 20_000}, TWO, nodes, conditions)
    faulty = simulate(pools, {"sam": 20_000}, TWO, nodes, failing)
    assert faulty.failures and faulty.redone and sound.redone == sound.failures == 0
    down = faulty.failures * (120 + 30) / 4  # a machine in four, and the start of its actors
    assert sound.seconds < faulty.seconds < sound.seconds + 1.5 * down
    again = simulate(pools, {"sam": 20_000}, TWO, nodes, failing)
    assert again == faulty, "the same seed, the same run"

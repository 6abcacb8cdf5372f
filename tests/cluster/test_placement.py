from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.nodes import GIB, NodeType, PlanError
from cluster.packing import first_fit
from cluster.placement import (
    SIMPLICITY_TOLERANCE,
    Placement,
    PlacementOption,
    duration,
    placement_options,
    plan_placement,
)
from cluster.pools import PoolSpec, plan_pools
from mova_core.experts.cost import Measured, Profile

PIXELS = 60.0  # pictures/s that one core decodes
NEAR = 1 - 2 * SIMPLICITY_TOLERANCE  # what the planner gives up for fewer pools, and the solver's own gap


def profile(expert: str, device: str, *batches: tuple[int, float, float], threads: int = 1) -> Profile:
    """Of batches (size, images/s, GiB)."""
    measured = [Measured(batch=b, images_per_second=rate, peak_bytes=int(gib * GIB)) for b, rate, gib in batches]
    return Profile(expert=expert, arch={}, dtype="bfloat16", device=device, threads=threads, batches=measured)


def gpus(count: int, kind: str = "A100", memory: float = 40, cpus: float = 16) -> NodeType:
    return NodeType(cpus=cpus, memory=64 * GIB, accelerator=kind, gpus=count, gpu_memory=int(memory * GIB))


def test_each_expert_goes_where_it_is_relatively_fast():
    profiles = [
        profile("sam", "NVIDIA A100-SXM4-40GB", (1, 30, 5)),
        profile("sam", "Tesla T4", (1, 2, 5)),
        profile("vary", "NVIDIA A100-SXM4-40GB", (1, 60, 5)),
        profile("vary", "Tesla T4", (1, 30, 5)),
    ]
    nodes = [gpus(4), gpus(4, "T4", 15)]
    placed = plan_placement({"sam": 120_000, "vary": 120_000}, profiles, nodes)
    assert {(pool.expert, pool.accelerator, pool.max_size, pool.rate) for pool in placed.pools} == {
        ("sam", "A100", 4, 120.0),
        ("vary", "T4", 4, 120.0),
    }
    assert placed.images_per_second == pytest.approx(120) and placed.seconds == pytest.approx(1000)
    assert placed.bound == pytest.approx(120) and not placed.sequential
    assert placed.gains["A100"] > 0 and set(placed.gains) == {"A100", "T4"}
    assert sum(placed.shares.values()) == pytest.approx(1)
    assert all(word in "\n".join(placed.describe()) for word in ("120 images/s", "concurrently", "one more A100"))


def test_a_share_of_a_gpu_holds_its_batch_and_the_context():
    slow, quick = (1, 10.0, 4.0), (8, 40.0, 9.4)
    profiles = [profile(name, "A100", slow, quick) for name in ("sam", "vary", "clip", "deplot")]
    placed = plan_placement(dict.fromkeys(["sam", "vary", "clip", "deplot"], 100_000), profiles, [gpus(1, memory=40)])
    assert [(pool.gpu, pool.batch, pool.max_size) for pool in placed.pools] == [(0.25, 8, 1)] * 4
    tight = plan_placement({"sam": 100_000}, profiles, [gpus(1, memory=9.8)])
    assert [(pool.gpu, pool.batch) for pool in tight.pools] == [(1.0, 1)], "9.4 GiB and CUDA's half do not fit"
    unknown = [replace(gpus(2), gpu_memory=None)]
    assert {pool.gpu for pool in plan_placement({"sam": 100_000, "vary": 100_000}, profiles, unknown).pools} == {1.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "5 s"),
        (179, "179 s"),
        (180, "3 min"),
        (7380, "123 min"),
        (10799, "180 min"),
        (10800, "3.0 h"),
        (86400, "24.0 h"),
    ],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


def test_an_expert_that_cannot_be_placed_is_reported():
    a100 = profile("sam", "NVIDIA A100-SXM4-40GB", (1, 30, 12))
    with pytest.raises(
        PlanError, match=r"sam has no profile on any kind of device here \(CPU, T4\): run `mova profile --exp"
    ):
        plan_placement({"sam": 1}, [a100], [gpus(1, "T4", 15)])
    with pytest.raises(
        PlanError, match=r"sam fits nowhere: it takes 12\.5 GiB of GPU memory, but a A100 has 10\.0 GiB"
    ):
        plan_placement({"sam": 1}, [a100], [gpus(1, memory=10)])
    on_cpu = profile("sam", "cpu X", (1, 0.5, 3), threads=4)
    with pytest.raises(
        PlanError, match=r"it takes 4 CPUs and 3\.0 GiB of memory on one machine, but the largest has 2"
    ):
        plan_placement({"sam": 1}, [on_cpu], [NodeType(cpus=2, memory=64 * GIB)])
    with pytest.raises(PlanError, match=r"sam: one actor holds 4 CPUs .* has 4: profile it with a lower --cpu"):
        plan_placement({"sam": 1}, [on_cpu], [NodeType(cpus=4, memory=64 * GIB)])
    with pytest.raises(PlanError, match="no features are wanted"):
        plan_placement({"sam": 0}, [on_cpu], [NodeType(cpus=4, memory=64 * GIB)])
    [note] = plan_placement({"sam": 1}, [a100], [gpus(1), gpus(1, "T4", 15)]).notes
    assert note == "sam is not placed on T4: no profile of it there"


def test_an_actor_on_cpus_has_the_batch_and_memory_of_the_slowest_profile():
    fast = profile("sam", "cpu X", (1, 3.0, 1), (4, 8.0, 3), threads=2)
    slow = profile("sam", "cpu Y", (1, 1.0, 1), (2, 2.0, 2.5), threads=3)
    nodes = [NodeType(cpus=1, memory=GIB), NodeType(cpus=8, memory=8 * GIB)]
    pool = PoolSpec(expert="sam", cpu=3.0, batch=2, memory=int(2.5 * GIB))
    assert placement_options("sam", [fast, slow], nodes, None, []) == [PlacementOption(pool, 2.0)]
    [option] = placement_options("sam", [slow, fast], nodes, 1.0, [])
    # Three cores decode 3 images/s, and compute after that.
    assert option.pool == pool and option.rate == pytest.approx(1 / (1 / 2 + 1 / 3))
    unmeasured = replace(slow, batches=[Measured(batch=1, images_per_second=1.0, peak_bytes=None)])
    assert [option.pool.memory for option in placement_options("sam", [unmeasured], nodes, None, [])] == [0]
    with pytest.raises(PlanError) as error:
        placement_options("sam", [slow], [NodeType(cpus=2, memory=GIB), NodeType(cpus=1, memory=2 * GIB)], None, [])
    assert str(error.value) == (
        "expert sam fits nowhere: it takes 3 CPUs and 2.5 GiB of memory on one machine, but the largest has 2 and 2.0 GiB"
    )


def test_a_cluster_without_a_cpu_for_reading_is_refused_with_the_smallest_actor():
    """All machines count, and of the actors that could be placed the one with the fewest CPUs."""
    profiles = [profile("sam", "A100", (1, 225.0, 3)), profile("sam", "cpu X", (1, 0.5, 3), threads=4)]
    nodes = [replace(gpus(1, cpus=4), gpu_memory=None), NodeType(count=2, cpus=0.25, memory=GIB)]
    with pytest.raises(PlanError) as error:
        plan_placement({"sam": 1000}, profiles, nodes, PIXELS)
    assert str(error.value) == (
        "expert sam: one actor holds 3.75 CPUs as profiled and one must stay free for reading tasks, but the "
        "cluster has 4.5: profile it with a lower --cpu, or add a node"
    )


def test_a_placement_in_words():
    pools = [PoolSpec(expert="sam", rate=30.0), PoolSpec(expert="vary", rate=20.0), PoolSpec(expert="sam", rate=10.0)]
    placed = Placement(
        wanted={"sam": 7200, "vary": 3000},
        pools=pools,
        sequential=False,
        images_per_second=40.0,
        bound=50.0,
        shares={"CPU": 0.25, "A100": 0.75},
        gains={"A100": 12.345, "T4": 0.5},
        notes=["vary is not placed on T4: no profile of it there"],
    )
    first = "40 images/s that have passed all experts, 80% of the best possible rate of this cluster"
    assert placed.describe() == [
        f"all experts run concurrently: {first}",
        "7,200 images in 3 min, without the start of the actors",
        "bottleneck: A100; last to finish: sam",
        "one more A100: +12.3 images/s",
        "one more T4: +0.5 images/s",
        "note: vary is not placed on T4: no profile of it there",
    ]
    one_by_one = replace(placed, sequential=True, wanted={"sam": 7200, "vary": 3700}, gains={}, notes=[])
    assert one_by_one.describe() == [
        f"experts run sequentially: {first}",
        "7,200 images in 3 min, without the start of the actors",
        "bottleneck: A100; longest: vary",
    ]


def test_experts_run_sequentially_where_they_do_not_fit_together():
    profiles = [profile(name, "cpu X", (1, 2.0, 1)) for name in ("sam", "vary", "clip", "deplot")]
    placed = plan_placement(
        dict.fromkeys(["sam", "vary", "clip", "deplot"], 600), profiles, [NodeType(cpus=4, memory=9 * GIB)]
    )
    assert placed.sequential and {pool.max_size for pool in placed.pools} == {3}
    assert placed.images_per_second == pytest.approx(1.5) and placed.seconds == pytest.approx(400)
    assert "sequentially" in placed.describe()[0]


def test_a_device_too_slow_for_one_shard_is_left_out():
    profiles = [profile("sam", "A100", (1, 100.0, 5)), profile("sam", "cpu X", (1, 0.5, 1))]
    nodes = [gpus(1), NodeType(cpus=500, memory=500 * GIB)]
    for images, kinds in ((2_000, {"A100"}), (1_000_000, {"A100", None})):  # 128 s of a shard, of 20 s or of an hour
        assert {pool.accelerator for pool in plan_placement({"sam": images}, profiles, nodes).pools} == kinds


def test_decoding_takes_cpus_beside_a_gpu():
    fast = [profile("sam", "A100", (1, 1000.0, 1))]
    [pool] = plan_placement({"sam": 100_000}, fast, [gpus(1, cpus=5)], PIXELS).pools
    assert (pool.rate, pool.cpus) == (240.0, 4.0), "four cores decode, more an actor cannot use"
    shared = plan_placement({"sam": 100_000}, fast, [gpus(1, cpus=16)], PIXELS)
    assert 240 < shared.images_per_second <= 15 * PIXELS, "several actors on the GPU can"
    cpu = plan_placement({"sam": 1}, [profile("sam", "cpu X", (1, 60.0, 1))], [NodeType(cpus=2, memory=GIB)], PIXELS)
    assert cpu.images_per_second == pytest.approx(30)


def test_no_machine_is_given_more_than_it_has(chance):
    nodes, wanted = chance.cluster(), chance.mix()
    placed = plan_placement(wanted, chance.profiles(), nodes, chance.choice([None, PIXELS]), seconds=1)
    machines = [node for node in nodes for _ in range(node.count)]
    assert set(plan_pools(list(wanted), placed.pools)) == {pool.expert for pool in placed.pools}
    for beside in [[name] for name in wanted] if placed.sequential else [list(wanted)]:
        pools = [pool for pool in placed.pools if pool.expert in beside]
        gpu: Counter[tuple[int, int]] = Counter()
        held: dict[str, Counter[int]] = {"cpu": Counter(), "memory": Counter()}
        for pool, seats in zip(pools, first_fit(pools, nodes), strict=True):
            assert len(seats) == pool.max_size, "every actor has a seat"
            for machine, indices in seats:
                assert pool.accelerator in (None, machines[machine].accelerator)
                for index in indices:
                    assert index < machines[machine].gpus
                    gpu[machine, index] += pool.gpu  # type: ignore[assignment]
                held["cpu"][machine] += pool.cpus  # type: ignore[assignment]
                held["memory"][machine] += pool.memory
        assert all(share <= 1 for share in gpu.values())
        assert all(taken <= machines[machine].cpus for machine, taken in held["cpu"].items())
        assert all(taken <= machines[machine].memory for machine, taken in held["memory"].items())
        assert sum(held["cpu"].values()) <= sum(node.cpus for node in machines) - 1


def test_no_placement_by_chance_is_better(chance):
    """Actors drawn one by one until no more fits, a hundred times."""
    nodes, wanted, profiles = chance.cluster(), chance.mix(), chance.profiles()
    placed = plan_placement(wanted, profiles, nodes, seconds=1)
    options = [option for name in wanted for option in placement_options(name, profiles, nodes, None, [])]
    best = 0.0
    for _ in range(100):
        drawn: dict[PoolSpec, int] = {}
        chosen = chance.sample(options, min(len(options), chance.randint(len(wanted), 3 * len(wanted))))
        pools = [replace(option.pool, max_size=chance.randint(1, 12)) for option in chosen]
        for option, pool, seats in zip(chosen, pools, first_fit(pools, nodes), strict=True):
            drawn[option.pool] = drawn.get(option.pool, 0) + len(seats)
            assert len(seats) <= pool.max_size
        rates = Counter[str]()
        for option in chosen:
            rates[option.pool.expert] += option.rate * drawn[option.pool]  # type: ignore[assignment]
        best = max(best, max(wanted.values()) * min(rates[name] / wanted[name] for name in wanted))
    assert NEAR * best <= placed.images_per_second <= placed.bound * 1.0001


def test_more_gpus_are_never_slower(chance):
    profiles, wanted = chance.profiles(), chance.mix()
    rates, bounds = [], []
    for count in (1, 4):
        nodes = [replace(gpus(count, cpus=32), count=2), gpus(2, "T4", 15)]
        placed = plan_placement(wanted, profiles, nodes, seconds=1)
        rates.append(placed.images_per_second)
        bounds.append(placed.bound)
    assert bounds == sorted(bounds)
    assert all(more >= NEAR * less for less, more in pairwise(rates))

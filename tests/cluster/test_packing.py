from typing import Any

from cluster.nodes import GIB, NodeType
from cluster.packing import FreeResources, Seat, first_fit
from cluster.pools import PoolSpec


def pool(text: str) -> PoolSpec:
    return PoolSpec.parse(text)


def row(node_id: str, labels: Any = None, alive: bool = True, **resources: Any) -> dict[str, Any]:
    """As `ray.nodes()` gives one node."""
    return {"NodeID": node_id, "Alive": alive, "Labels": labels or {}, "Resources": {"memory": 8 * GIB} | resources}


def test_one_cpu_of_the_cluster_stays_free_for_reading_tasks():
    free = FreeResources([NodeType(count=2, cpus=2, memory=GIB)])
    assert len(free.take_several(pool("sam=9"), 9)) == 3


def test_small_shares_spread_over_machines_and_whole_gpus_stay_free():
    free = FreeResources([NodeType(count=2, cpus=4, memory=GIB, accelerator="L4", gpus=2)])
    halves = free.take_several(pool("sam=1,gpu=0.5,accelerator=L4"), 4)
    assert [seat.machine for seat in halves] == [0, 1, 0, 1]
    assert [seat.gpus for seat in halves] == [(0,)] * 4, "the second half fills the first GPU of each machine"
    assert free.take(pool("sam=1,gpu=1,accelerator=A100")) is None, "no machine has that accelerator"
    assert {free.take(pool("sam=1,gpu=1")), free.take(pool("sam=1,gpu=1"))} == {Seat(0, (1,)), Seat(1, (1,))}


def test_an_actor_may_hold_several_whole_gpus():
    free = FreeResources([NodeType(cpus=8, memory=GIB, accelerator="L4", gpus=4)])
    assert free.take(pool("sam=1,gpu=3")) == Seat(0, (0, 1, 2))
    assert free.take(pool("sam=1,gpu=2")) is None


def test_a_seat_that_is_given_back_can_be_taken_again():
    free = FreeResources([NodeType(cpus=3, memory=GIB, accelerator="L4", gpus=1)])
    half = pool("sam=1,gpu=0.5,cpu=0.5")
    seat = free.take(half)
    assert seat is not None and free.take(pool("sam=1,gpu=1")) is None
    free.give_back(half, seat)
    assert (free.cpu.tolist(), free.gpu.tolist()) == ([3.0], [[1.0]])
    assert free.take(pool("sam=1,gpu=1")) is not None


def test_a_pool_takes_no_seat_below_its_smallest_size():
    free = FreeResources([NodeType(cpus=4, memory=GIB)])
    assert free.take_several(pool("sam=4"), most=4, least=4) == []
    assert len(free.take_several(pool("sam=3"), most=3, least=3)) == 3


def test_memory_of_a_profile_bounds_the_actors_of_each_machine():
    spec = PoolSpec(expert="sam", max_size=8, memory=3 * GIB)
    [seats] = first_fit([spec], [NodeType(count=2, cpus=8, memory=7 * GIB)])
    assert [seat.machine for seat in seats].count(0) == [seat.machine for seat in seats].count(1) == 2


def test_live_nodes_minus_what_our_actors_hold():
    rows = [
        row("a", CPU=4.0, GPU=2.0, labels={"ray.io/accelerator-type": "A100"}),
        row("b", None, True, **{"CPU": 4.0, "GPU": 1.0, "accelerator_type:L4": 1.0}),
        row("dead", alive=False, CPU=64.0),
    ]
    whole, half = pool("sam=1,gpu=1"), pool("vary=1,gpu=0.5,accelerator=L4")
    assert len(FreeResources.from_live(rows)) == 2

    free = FreeResources.from_live(rows, running=[("a", whole), ("b", half)])
    assert free.take(whole) == Seat(0, (1,)) and free.take(whole) is None
    assert free.take(half) == Seat(1, (0,))

    free = FreeResources.from_live(rows, running=[("a", whole), (None, whole)], starting=[whole])
    assert free.take(half) is None, "actors whose node is not known count as well"

    others = {"CPU": 7.0, "GPU": 0.5, "memory": 16.0 * GIB}
    free = FreeResources.from_live(rows, available=others)
    assert free.take(whole) is None and free.take(pool("sam=1,gpu=0.5")) is not None, "actors of others hold the rest"
    free = FreeResources.from_live(rows, starting=[pool("sam=1,cpu=3")], available={"CPU": 5.0, "memory": 16.0 * GIB})
    assert len(free.take_several(pool("sam=9"), 9)) == 1, "of 5 CPUs 3 are promised and one stays free"
    large = PoolSpec(expert="sam", memory=3 * GIB)
    free = FreeResources.from_live(rows, available={"CPU": 8.0, "memory": 4.0 * GIB})
    assert free.take(large) is not None and free.take(large) is None, "others hold the rest of the memory"
    assert free.take(pool("sam=1,gpu=0.5")) is None, "Ray leaves out a resource of which nothing is free"


def test_an_actor_that_ray_placed_where_no_room_is_known_counts_against_the_cluster():
    rows = [row("a", CPU=2.0), row("b", CPU=2.0)]
    fractions, whole = pool("sam=1,cpu=1.5"), pool("vary=1")
    free = FreeResources.from_live(rows, running=[("a", fractions), ("b", fractions)])
    assert free.take(pool("sam=1,cpu=0.5")) is None, "one CPU of the cluster stays free"
    rows = [row("a", CPU=2.0), row("b", CPU=2.0), row("c", CPU=1.0)]
    free = FreeResources.from_live(rows, running=[("a", fractions), ("b", fractions)], starting=[pool("sam=1,cpu=2")])
    assert free.take(whole) is None, "of 5 CPUs 3 are held, 2 promised"
    rows = [row(name, CPU=2.0) for name in "abcd"]
    running = [(name, pool("sam=1,cpu=0.8")) for name in "abcd"]
    free = FreeResources.from_live(rows, running=running, starting=[pool("sam=1,cpu=2")])
    assert free.take(whole) is not None, "of 8 CPUs 3.2 are held, 2 promised and one stays free"
    assert free.take(whole) is None


def test_larger_shares_of_a_gpu_are_placed_first():
    node = NodeType(cpus=8, memory=GIB, accelerator="L4", gpus=1)
    small, large = first_fit([pool("sam=2,gpu=0.5"), pool("vary=1,gpu=1")], [node])
    assert (len(small), len(large)) == (0, 1)


def test_without_gpus_more_memory_and_then_more_cpus_are_placed_first():
    small, large = PoolSpec(expert="sam", memory=GIB), PoolSpec(expert="vary", memory=2 * GIB)
    assert [len(seats) for seats in first_fit([small, large], [NodeType(cpus=8, memory=2 * GIB)])] == [0, 1]
    few, many = pool("sam=1"), pool("vary=1,cpu=3")
    assert [len(seats) for seats in first_fit([few, many], [NodeType(cpus=4, memory=GIB)])] == [0, 1]

"""How free room is shared among pools, by the scheduler of a run and by the simulation."""

from cluster.allocation import ExpertDemand, PoolDemand, allocate
from cluster.nodes import GIB, NodeType
from cluster.packing import FreeResources
from cluster.pools import PoolSpec

MACHINES = [NodeType(count=3, cpus=8, memory=GIB, accelerator="L4", gpus=1)]


def counts(free: FreeResources, *pools: PoolDemand) -> list[int]:
    return [len(seats) for seats in allocate(free, pools)]


def demand(pool: str, pending: int = 100, size: int = 0, seconds: float | None = None, **spec: float) -> PoolDemand:
    expert = ExpertDemand(pending=pending, seconds=seconds)
    text = PoolSpec.parse(pool)
    return PoolDemand(spec=PoolSpec(**{**vars(text), **spec}), expert=expert, size=size)


def test_planned_pools_start_with_whole_gpus_first_so_that_the_planned_sizes_fit():
    halves = demand("vary=1..2,gpu=0.5", rate=2.0)
    wholes = demand("sam=1..2,gpu=1", rate=2.0)
    assert counts(FreeResources(MACHINES), halves, wholes) == [2, 2]


def test_pools_without_a_plan_all_start_and_then_share_the_room():
    first, second = demand("sam=1..8,gpu=1", seconds=10), demand("vary=1..8,gpu=1", seconds=20)
    assert counts(FreeResources(MACHINES), first, second) == [1, 2], "the last GPU goes to the pool with most to do"


def test_no_pool_grows_while_another_waits_for_its_smallest_size():
    running, waiting = demand("sam=1..8,gpu=1", size=1), demand("vary=4,gpu=1")
    assert counts(FreeResources(MACHINES), running, waiting) == [0, 0]


def test_pools_of_one_expert_get_no_more_actors_than_it_has_blocks():
    expert = ExpertDemand(pending=3, starting=1)
    pools = [PoolDemand(spec=PoolSpec.parse(text), expert=expert, size=1) for text in ("sam=1..8", "sam=1..8,gpu=1")]
    assert counts(FreeResources(MACHINES), *pools) == [1, 1] and expert.starting == 3

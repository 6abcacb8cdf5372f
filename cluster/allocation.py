"""How many actors each pool gets of the room that is free: one rule for the running scheduler and for the simulation.

Pools that have yet to start come first, larger shares of a GPU before smaller ones, so that no small share lies on a GPU
that a whole one needs. A planned pool (one with a predicted rate) takes as many actors as find room, up to the size
planned for it, because planned sizes fit together. Any other pool takes its smallest size, so that all pools start. Room
is kept for a pool that finds none; once all have started, the pools with most to do get what is left, one actor at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.packing import FreeResources, Seat
from cluster.pools import PoolSpec


@dataclass(kw_only=True, eq=False)
class ExpertDemand:
    """The work of one expert that no actor has drawn."""

    pending: int  # blocks of shards
    starting: int = 0  # actors that have yet to draw their first block
    seconds: float | None = None  # predicted time to go; None: not known


@dataclass(kw_only=True, eq=False)
class PoolDemand:
    """A pool that may get actors."""

    spec: PoolSpec
    expert: ExpertDemand  # shared by the pools of an expert
    size: int = 0  # actors it has; 0: it has yet to start

    @property
    def wanted(self) -> int:
        """Further actors that the pool may have and that would find work."""
        return max(0, min(self.spec.max_size - self.size, self.expert.pending - self.expert.starting))


def allocate(free: FreeResources, pools: Sequence[PoolDemand]) -> list[list[Seat]]:
    """The seats of each pool's further actors, in the order of `pools`; counts them in `free` and in `pools`."""
    seats: list[list[Seat]] = [[] for _ in pools]

    def add(index: int, most: int, least: int = 0) -> int:
        pool = pools[index]
        taken = free.take_several(pool.spec, most, least)
        seats[index] += taken
        pool.size += len(taken)
        pool.expert.starting += len(taken)
        return len(taken)

    waiting = [index for index, pool in enumerate(pools) if not pool.size and pool.expert.pending]
    for index in sorted(waiting, key=lambda index: -pools[index].spec.gpu):
        pool = pools[index]
        least = min(pool.spec.min_size, pool.expert.pending)
        add(index, max(least, pool.wanted) if pool.spec.rate else least, least)
    growing = [index for index in range(len(pools)) if pools[index].size]
    if not all(seats[index] for index in waiting):
        growing = []
    while growing:
        for index in sorted(growing, key=lambda index: _to_do(pools[index]), reverse=True):
            if not pools[index].wanted or not add(index, 1):
                growing.remove(index)
    return seats


def _to_do(pool: PoolDemand) -> float:
    """Seconds to go, or blocks per actor where no rate is known yet."""
    if pool.expert.seconds is not None:
        return pool.expert.seconds
    return pool.expert.pending / max(1, pool.size)

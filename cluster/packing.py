"""Which machine and GPU each actor gets: the one model of the plan, the simulation and the running scheduler.

Rules that all three share:

- One CPU of the cluster stays free for reading tasks. Where actors hold every CPU, Ray Data waits for ever and reports
  nothing (ray#44687).
- Among machines that can hold an actor, the one with most left of what the actor needs is chosen (worst fit), so that
  actors with a small share of a GPU spread and do not exhaust the CPUs of one machine while its GPUs stay empty.
- Within a machine the fullest GPU that still has room is chosen (best fit), so that whole GPUs stay free.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from cluster.nodes import NodeType, live_node
from cluster.pools import ROUNDING, PoolSpec

READING_CPUS = 1  # of the whole cluster, kept free for Ray Data's reading tasks (ray#44687)


class Seat(NamedTuple):
    """Where one actor runs."""

    machine: int  # index among the machines of a `FreeResources`
    gpus: tuple[int, ...] = ()  # indices among the GPUs of that machine; empty for an actor without a GPU


class FreeResources:
    """CPUs, GPUs and memory that the machines of a cluster have left for actors.

    Args:
        nodes: kinds of machines; machine `i` is the i-th when each kind is repeated `count` times.

    Attributes:
        cpu: free CPUs of each machine.
        memory: free bytes of each machine.
        gpu: (machines, most GPUs of one machine) free part of each GPU; -1 where a machine has fewer GPUs.
        up: whether each machine takes actors; the simulation clears the entry of a machine that failed.
    """

    def __init__(self, nodes: Sequence[NodeType]):
        machines = [node for node in nodes for _ in range(node.count)]
        self.accelerator = np.array([node.accelerator or "" for node in machines])
        self.cpu = np.array([float(node.cpus) for node in machines])
        self.memory = np.array([float(node.memory) for node in machines])
        self._gpus = [node.gpus for node in machines]
        self.gpu = np.full((len(machines), max(self._gpus, default=0)), -1.0)
        for index, node in enumerate(machines):
            self.gpu[index, : node.gpus] = 1.0
        self.up = np.ones(len(machines), dtype=bool)
        self._total_cpu = self.cpu.sum() or 1.0
        self._total_memory = self.memory.sum() or 1.0
        # What all machines together may still give away, whatever each of them has left.
        self._spare = {
            "cpu": self.cpu.sum() - READING_CPUS,
            "gpu": self.gpu.clip(min=0).sum(),
            "memory": self.memory.sum(),
        }

    @classmethod
    def from_live(
        cls,
        rows: Iterable[Mapping[str, Any]],
        running: Iterable[tuple[str | None, PoolSpec]] = (),
        starting: Iterable[PoolSpec] = (),
        available: Mapping[str, float] | None = None,
    ) -> "FreeResources":
        """What the nodes of a running cluster have left, from public figures and from what our own actors hold.

        Ray publishes the free resources of the whole cluster, but of each node only the total. So the actors of this
        run are subtracted node by node, and the sum of the cluster bounds what actors of others hold.

        Args:
            rows: as `ray.nodes()` gives them; dead nodes count nothing.
            running: node id and pool of each actor of ours that runs; None where its node is not known.
            starting: pool of each actor of ours that Ray has yet to place.
            available: as `ray.available_resources()` gives it; None: nobody else uses the cluster.
        """
        nodes = {str(row["NodeID"]): node for row in rows if (node := live_node(row)) is not None}
        free = cls(list(nodes.values()))
        machine_of = {node_id: machine for machine, node_id in enumerate(nodes)}
        placed, unplaced = list(running), list(starting)
        for node_id, pool in placed:
            if (machine := machine_of.get(node_id or "")) is not None:
                free._move(pool, free._seat_on(pool, machine), -1)
        for pool in [pool for node_id, pool in placed if node_id not in machine_of] + unplaced:
            if free.take(pool) is None:  # Ray placed it where this model finds no room: count it against the cluster
                free._reserve(pool, -1)
        if available is not None:
            names = {"cpu": "CPU", "gpu": "GPU", "memory": "memory"}
            for kind, name in names.items():
                held = sum(pool.holds[kind] for pool in unplaced)
                left = available.get(name, 0.0) - held - (READING_CPUS if kind == "cpu" else 0)
                free._spare[kind] = min(free._spare[kind], left)
        return free

    def __len__(self) -> int:
        """Number of machines."""
        return len(self.cpu)

    def take(self, pool: PoolSpec) -> Seat | None:
        """Takes a seat for one actor of a pool; None where no machine can hold it."""
        if any(held and self._spare[kind] < held - ROUNDING for kind, held in pool.holds.items()):
            return None
        can_hold = self.up & (self.cpu >= pool.cpus - ROUNDING) & (self.memory >= pool.memory)
        if pool.gpu:
            can_hold &= (self.gpu >= min(pool.gpu, 1.0) - ROUNDING).sum(axis=1) >= ceil(pool.gpu - ROUNDING)
        if pool.accelerator:
            can_hold &= self.accelerator == pool.accelerator
        if not can_hold.any():
            return None
        # Dot product of what the actor needs and what a machine has left, each as a part of the cluster.
        left = self.cpu * (pool.cpus / self._total_cpu) + self.memory * (pool.memory / self._total_memory)
        seat = self._seat_on(pool, int(np.where(can_hold, left, -1.0).argmax()))
        self._move(pool, seat, -1)
        return seat

    def take_several(self, pool: PoolSpec, most: int, least: int = 0) -> list[Seat]:
        """Takes seats for up to `most` actors of a pool; none at all where fewer than `least` find room."""
        seats: list[Seat] = []
        while len(seats) < most and (seat := self.take(pool)) is not None:
            seats.append(seat)
        if len(seats) >= least:
            return seats
        for seat in seats:
            self.give_back(pool, seat)
        return []

    def give_back(self, pool: PoolSpec, seat: Seat) -> None:
        """Frees the seat of an actor of a pool."""
        self._move(pool, seat, 1)

    def _seat_on(self, pool: PoolSpec, machine: int) -> Seat:
        """The fullest GPUs of a machine among those with room, then the emptiest of the others."""
        if not pool.gpu:
            return Seat(machine)
        free, share = self.gpu[machine, : self._gpus[machine]], min(pool.gpu, 1.0)
        fullest_first = sorted(
            range(len(free)), key=lambda gpu: free[gpu] if free[gpu] >= share - ROUNDING else 2 - free[gpu]
        )
        return Seat(machine, tuple(fullest_first[: ceil(pool.gpu - ROUNDING)]))

    def _move(self, pool: PoolSpec, seat: Seat, sign: int) -> None:
        self.cpu[seat.machine] += sign * pool.cpus
        self.memory[seat.machine] += sign * pool.memory
        for gpu in seat.gpus:
            self.gpu[seat.machine, gpu] += sign * min(pool.gpu, 1.0)
        self._reserve(pool, sign)

    def _reserve(self, pool: PoolSpec, sign: int) -> None:
        for kind, held in pool.holds.items():
            self._spare[kind] += sign * held


def first_fit(pools: Sequence[PoolSpec], nodes: Sequence[NodeType]) -> list[list[Seat]]:
    """For each pool the seats of as many of its `max_size` actors as find room, larger shares of a GPU first."""
    free = FreeResources(nodes)
    seats: list[list[Seat]] = [[] for _ in pools]
    for index in sorted(range(len(pools)), key=lambda i: (-pools[i].gpu, -pools[i].memory, -pools[i].cpus)):
        seats[index] = free.take_several(pools[index], pools[index].max_size)
    return seats

"""Seats for actors on the machines of a cluster."""

from collections.abc import Sequence

import numpy as np

from cluster.nodes import NodeType
from cluster.pools import ROUNDING, PoolSpec


class FreeResources:
    """What the machines have left while actors take seats on them, with one CPU of all kept free for reading tasks.

    Machines count through `nodes` in their order.
    """

    def __init__(self, nodes: Sequence[NodeType]):
        machines = [one for one in nodes for _ in range(one.count)]
        self.kind = np.array([one.accelerator or "" for one in machines])
        self.cpu = np.array([float(one.cpus) for one in machines])
        self.memory = np.array([float(one.memory) for one in machines])
        self.gpu = np.full((len(machines), max((one.gpus for one in machines), default=0)), -1.0)
        for machine, one in enumerate(machines):
            self.gpu[machine, : one.gpus] = 1.0
        self.up = np.ones(len(machines), dtype=bool)
        self.spare = self.cpu.sum() - 1  # CPUs
        self.all = {"cpu": self.cpu.sum() or 1.0, "memory": self.memory.sum() or 1.0}

    def take(self, pool: PoolSpec) -> tuple[int, int] | None:
        """A seat for one actor: machine and GPU (-1 without one); None where there is no room."""
        if self.spare < pool.cpus - ROUNDING:
            return None
        room = self.up & (self.cpu >= pool.cpus - ROUNDING) & (self.memory >= pool.memory)
        if pool.gpu:
            room &= (self.gpu >= pool.gpu - ROUNDING).any(axis=1)
        if pool.accelerator:
            room &= self.kind == pool.accelerator
        if not room.any():
            return None
        # The machine with most left of what the actor takes most of: else small shares take all the CPUs of one.
        left = self.cpu * (pool.cpus / self.all["cpu"]) + self.memory * (pool.memory / self.all["memory"])
        machine, gpu = int(np.where(room, left, -1).argmax()), -1
        if pool.gpu:  # the fullest that has room
            free = self.gpu[machine]
            gpu = int(np.where(free >= pool.gpu - ROUNDING, -free, -2).argmax())
        self._move(pool, machine, gpu, -1)
        return machine, gpu

    def give(self, pool: PoolSpec, machine: int, gpu: int) -> None:
        """Takes back the seat of an actor."""
        self._move(pool, machine, gpu, 1)

    def _move(self, pool: PoolSpec, machine: int, gpu: int, sign: int) -> None:
        self.cpu[machine] += sign * pool.cpus
        self.memory[machine] += sign * pool.memory
        self.spare += sign * pool.cpus
        if gpu >= 0:
            self.gpu[machine, gpu] += sign * pool.gpu


def seat(pools: Sequence[PoolSpec], nodes: Sequence[NodeType]) -> list[list[tuple[int, int]]]:
    """For each pool the machine and GPU of as many of its `max_size` actors as there is room for, larger shares first."""
    room = FreeResources(nodes)
    seats: list[list[tuple[int, int]]] = [[] for _ in pools]
    for index in sorted(range(len(pools)), key=lambda i: (-pools[i].gpu, -pools[i].memory, -pools[i].cpus)):
        while len(seats[index]) < pools[index].max_size and (taken := room.take(pools[index])):
            seats[index].append(taken)
    return seats

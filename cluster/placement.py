"""Where the expert pools run: what a user asks for per expert and whether this cluster can give it, or the best there is.

`plan_placement` chooses by an integer program (HiGHS, by scipy). Its assumptions:

- A share f of a GPU gives f of the speed that was measured with the whole GPU. Shares are 1, 1/2, 1/4, 1/8 and 1/16:
  each is a multiple of the next, so actors started in the order of their share fill GPUs without a gap whatever GPU
  Ray picks for them, and none straddles two. No search for a packing is needed, and the program is exact.
- An actor fits a share if the peak it was profiled with, and what CUDA takes for a process, fit that share of the
  memory; all that sit on one GPU then fit it together.
- An actor on CPUs holds as many as its profile had threads. Any CPU counts as the slowest one that was profiled.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import ceil, gcd
from typing import TYPE_CHECKING

import numpy as np

from cluster.nodes import GIB, NodeType, PlanError, accelerator_of
from cluster.packing import first_fit
from cluster.pools import ROUNDING, PoolSpec

if TYPE_CHECKING:
    from mova_core.experts.cost import Profile

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of a GPU, per actor
DECODERS = 4  # cores that an actor beside a GPU can keep busy with decoding
CONTEXT = GIB // 2  # of a GPU's memory, that CUDA takes for each process beside PyTorch's
FEW = 3  # machines of a kind that are each planned by themselves
GAP = 5e-3  # of the rate, that the solver may leave
SPARE = 0.01  # of the rate, given up for fewer pools and actors; of these the solver may leave five times as much
POOL_COST = 4.0  # actors that one pool less is worth
TAIL = 0.05  # of the run: where one shard takes longer than that, the last shards would be waited for
IN_TURN_GAIN = 1.05  # experts one after the other must be faster by this: each start costs what the program cannot see


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Pools for every expert, and what they bring."""

    wanted: Mapping[str, int]  # expert -> features to compute
    pools: list[PoolSpec]  # in the order to start them, larger shares of a GPU first; planned with `max_size` actors
    in_turn: bool  # experts one after the other, each with all of the cluster; else side by side
    images_per_second: float  # of the most wanted expert, while all keep step with it
    bound: float  # images/s that no placement exceeds: with every device in use and actors cut at will
    shares: Mapping[str, float]  # resource -> its part in the bound, in all 1: the largest is the bottleneck
    gains: Mapping[str, float]  # accelerator -> images/s that one more such GPU adds to the bound
    notes: list[str] = field(default_factory=list)  # what profiles lack, for people

    @property
    def rates(self) -> dict[str, float]:
        """Expert -> images/s of its pools, while they run."""
        return {name: sum(pool.rate or 0 for pool in self.pools if pool.expert == name) for name in self.wanted}

    @property
    def seconds(self) -> float:
        """Time for all that is wanted, without the start of the actors."""
        return max(self.wanted.values(), default=0) / self.images_per_second

    @property
    def bottleneck(self) -> str:
        """What limits the rate, and the expert that is done last."""
        resource = max(self.shares, key=self.shares.__getitem__)
        last = max(self.wanted, key=lambda name: self.wanted[name] / self.rates[name])
        return f"{resource}; {'longest' if self.in_turn else 'last to finish'}: {last}"

    def describe(self) -> list[str]:
        """The placement in lines for people."""
        order = "one expert after the other" if self.in_turn else "all experts side by side"
        lines = [
            f"{order}: {self.images_per_second:.4g} images/s of the mix, {self.images_per_second / self.bound:.0%} of "
            f"what this cluster could give at most",
            f"{max(self.wanted.values()):,} images in {duration(self.seconds)}, without the start of the actors",
            f"bottleneck: {self.bottleneck}",
            *(f"one more {kind}: {gain:+.3g} images/s" for kind, gain in self.gains.items()),
        ]
        return lines + [f"note: {note}" for note in self.notes]


@dataclass(frozen=True)
class _Way:
    """One way to run an actor of an expert."""

    pool: PoolSpec  # of one actor
    rate: float  # images/s of it

    def fits(self, nodes: NodeType) -> int:
        """How many of it one such machine holds when it holds nothing else."""
        pool = self.pool
        if pool.accelerator not in (None, nodes.accelerator):
            return 0
        has = {"cpu": nodes.cpus, "gpu": nodes.gpus, "memory": nodes.memory}
        return min(int(has[kind] / share + ROUNDING) for kind, share in pool.holds.items() if share)


def plan_placement(
    wanted: Mapping[str, int],
    profiles: "Iterable[Profile]",
    nodes: Sequence[NodeType],
    decode: float | None = None,
    shard_rows: Mapping[str, int] | int = 64,
    seconds: float = 5.0,
) -> Placement:
    """The placement that computes what is wanted soonest.

    It maximises t, where actors of every expert together reach t times its wanted features per second, under the
    machines' CPUs (one of them stays free for reading tasks), GPUs and memory. Where experts do not fit side by side, or
    are clearly slower so than one after the other on all of the cluster, they get the cluster in turn.

    Args:
        wanted: features still to compute, per expert; experts of which none is wanted are left out.
        profiles: of the size and dtype to run; of several of one kind of device, the slowest counts.
        nodes: machines, as `cluster.nodes` reads them.
        decode: pictures/s that one core decodes and prepares, which profiles leave out; an actor beside a GPU then holds
            the CPUs it takes to keep up, four at most. None: costs nothing.
        shard_rows: pictures per shard; devices so slow that a shard takes a good part of the run are left to others.
        seconds: longest time for each of two integer programs, after which the best found so far counts.

    Raises:
        PlanError: no profile fits any device of the cluster, or an expert fits nowhere.
    """
    wanted = {name: count for name, count in wanted.items() if count > 0}
    if not wanted:
        raise PlanError("nothing is wanted of any expert: there is nothing to place")
    profiles, notes = list(profiles), list[str]()
    ways = {name: _ways(name, profiles, nodes, decode, notes) for name in wanted}
    bound, shares = _Program(wanted, ways, nodes).bound()
    for name, each in ways.items():
        rows = shard_rows if isinstance(shard_rows, int) else shard_rows[name]
        slowest = min(max(way.rate for way in each), rows / (TAIL / bound) if bound else 0.0)
        ways[name] = [way for way in each if way.rate >= slowest]
    program = _Program(wanted, ways, nodes)
    together = program.solve(program.bound()[0], seconds)
    alone = {name: _Program({name: wanted[name]}, {name: ways[name]}, nodes) for name in wanted}
    in_turn = {name: one.solve(one.bound()[0], seconds) for name, one in alone.items()} if len(wanted) > 1 else {}
    most = max(wanted.values())

    def rate(pools: Iterable[PoolSpec], name: str) -> float:
        return sum(pool.rate or 0.0 for pool in pools if pool.expert == name)

    turns = 0.0
    if in_turn and all(in_turn.values()):
        turns = 1 / sum(wanted[name] / rate(pools, name) for name, pools in in_turn.items())
    beside = min(rate(together, name) / wanted[name] for name in wanted)
    if max(turns, beside) == 0:
        name = next(name for name in wanted if not in_turn.get(name, together))
        least = min(way.pool.cpus for way in ways[name])
        raise PlanError(
            f"expert {name}: an actor of it holds {least:g} CPUs as profiled and one must stay free for reading tasks, but "
            f"the cluster has {sum(one.cpus * one.count for one in nodes):g}: profile it with a lower --cpu, or add a node"
        )
    use_turns = turns > beside * IN_TURN_GAIN
    pools = together
    if use_turns:  # a pool that started with what another left over would keep to it
        pools = [replace(pool, min_size=pool.max_size) for name in in_turn for pool in in_turn[name]]
    pools.sort(key=lambda pool: -pool.gpu)
    if not use_turns:
        for pool, seats in zip(pools, first_fit(pools, nodes), strict=True):
            if len(seats) < pool.max_size:
                notes.append(
                    f"{pool.max_size - len(seats)} of {pool} may wait where Ray puts the others in its own order"
                )
    kinds = dict.fromkeys(one.accelerator for one in nodes if one.accelerator)
    gains = {kind: (program.bound(one_more=kind)[0] - program.bound()[0]) * most for kind in kinds}
    return Placement(
        wanted=wanted,
        pools=pools,
        in_turn=use_turns,
        images_per_second=most * (turns if use_turns else beside),
        bound=most * bound,
        shares=shares,
        gains=gains,
        notes=notes,
    )


def _ways(
    name: str, profiles: "Sequence[Profile]", nodes: Sequence[NodeType], decode: float | None, notes: list[str]
) -> list[_Way]:
    """Every way this cluster can run an actor of an expert."""
    kinds: dict[str | None, list[int]] = {None: []}  # accelerator -> known memories of one
    for one in nodes:
        if one.accelerator:
            kinds.setdefault(one.accelerator, []).extend([one.gpu_memory] if one.gpu_memory else [])
    ways: list[_Way] = []
    unknown, small = [], []
    for kind, memories in kinds.items():
        measured = [one for one in profiles if one.expert == name and accelerator_of(one.device) == kind]
        if not measured:
            unknown.append(kind or "CPU")
        elif kind is None:
            slowest = min(measured, key=lambda one: one.best().images_per_second)
            best = slowest.best()
            pool = PoolSpec(expert=name, cpu=float(slowest.threads), batch=best.batch, memory=best.peak_bytes or 0)
            if any(_Way(pool, 1.0).fits(one) for one in nodes):
                aside = 1 / (decode * pool.cpus) if decode else 0.0
                ways.append(_Way(pool, 1 / (1 / best.images_per_second + aside)))
            else:
                small.append(
                    f"{pool.cpus:g} CPUs and {pool.memory / GIB:.1f} GiB of memory on one machine, but the largest has "
                    f"{max(one.cpus for one in nodes):g} and {max(one.memory for one in nodes) / GIB:.1f} GiB"
                )
        else:
            on_kind = [
                way
                for share in SHARES
                if (way := _on_gpu(name, kind, share, min(memories, default=None), measured, decode))
            ]
            ways += on_kind
            if not on_kind:
                need = min(one.batches[0].peak_bytes or 0 for one in measured) + CONTEXT
                small.append(f"{need / GIB:.1f} GiB of GPU memory, but a {kind} has {min(memories) / GIB:.1f} GiB")
    if not ways and small:
        raise PlanError(f"expert {name} fits nowhere: it takes {'; or '.join(small)}")
    if not ways:
        gpu = next((kind for kind in unknown if kind != "CPU"), None)
        place = f" --gpu 1 --accelerator {gpu}" if gpu else ""
        raise PlanError(
            f"expert {name} has no profile on any kind of device here ({', '.join(unknown)}): "
            f"run `mova profile --experts {name}{place}`"
        )
    if missing := [kind for kind in unknown if kind != "CPU"]:
        notes.append(f"{name} is not placed on {', '.join(missing)}: no profile of it there")
    return ways


def _on_gpu(
    name: str, kind: str, share: float, memory: int | None, profiles: "Sequence[Profile]", decode: float | None
) -> _Way | None:
    """An actor on a share of a GPU, if it fits; where the GPU's memory is not known, only a whole one does."""
    if memory is None and share < 1:
        return None
    room = None if memory is None else share * memory - CONTEXT
    fitting = [one for one in profiles if room is None or (one.batches[0].peak_bytes or 0) <= room]
    if len(fitting) < len(profiles):
        return None
    best = min((one.best(room) for one in fitting), key=lambda one: one.images_per_second)
    pool = PoolSpec(expert=name, gpu=share, accelerator=kind, batch=best.batch)
    rate = share * best.images_per_second
    if decode:
        rate = min(rate, DECODERS * decode)
        pool = replace(pool, cpu=max(pool.cpus, ceil(4 * rate / decode - ROUNDING) / 4))  # in quarters, which add up
    return _Way(pool, rate)


class _Program:
    """The integer program: how many actors of each way every machine runs, and t in features wanted per second.

    Machines of a kind are divided into groups of 1, 2, 4, ... that are each run alike. So what every single machine
    holds is known, and fits it, while a thousand machines take a dozen groups.
    """

    def __init__(self, wanted: Mapping[str, int], ways: Mapping[str, Sequence[_Way]], nodes: Sequence[NodeType]):
        self.groups = [(one, size) for one in nodes for size in _group_sizes(one.count)]
        self.columns = [
            (way, where, fits)
            for each in ways.values()
            for way in each
            for where, (one, _) in enumerate(self.groups)
            if (fits := way.fits(one))
        ]
        self.rows: list[np.ndarray] = []
        self.most: list[float] = []
        self.names: list[str] = []
        size = [size for _, size in self.groups]
        for name, count in wanted.items():
            self._row(
                name, 0.0, lambda way, where, n=name: -way.rate * size[where] * (way.pool.expert == n), t=float(count)
            )
        for index, (one, _) in enumerate(self.groups):
            label = one.accelerator or "CPU-only"
            # What is left of a machine's CPUs when all its actors hold multiples of a unit cannot be used.
            holds = {round(way.pool.cpus * 10_000) for way, where, _ in self.columns if where == index}
            unit = (reduce(gcd, holds) if holds else 0) / 10_000 or 1.0
            cpus = int(one.cpus / unit + ROUNDING) * unit
            self._row(f"CPUs of {label} machines", cpus, lambda way, where, i=index: way.pool.cpus * (where == i))
            if one.gpus:
                self._row(f"{label} GPUs", one.gpus, lambda way, where, i=index: way.pool.gpu * (where == i))
            self._row(
                f"memory of {label} machines",
                one.memory / GIB,
                lambda way, where, i=index: way.pool.memory / GIB * (where == i),
            )
        free = sum(one.cpus * one.count for one in nodes) - 1
        self._row("CPUs", free, lambda way, where: way.pool.cpus * size[where])

    def _row(self, name: str, most: float, each: Callable[..., float], t: float = 0.0) -> None:
        self.rows.append(np.array([each(way, where) for way, where, _ in self.columns] + [t]))
        self.most.append(most)
        self.names.append(name)

    def bound(self, one_more: str | None = None) -> tuple[float, dict[str, float]]:
        """Largest t with actors cut at will, and each resource's part in it; with one more GPU of a kind if named."""
        from scipy.optimize import linprog

        most = np.array(self.most)
        if one_more:
            where, size = next((i, size) for i, (one, size) in enumerate(self.groups) if one.accelerator == one_more)
            gpu_rows = [row for row, name in enumerate(self.names) if name.endswith(" GPUs")]
            with_gpus = [index for index, (one, _) in enumerate(self.groups) if one.gpus]
            most[gpu_rows[with_gpus.index(where)]] += 1 / size
        gain = np.zeros(len(self.columns) + 1)
        gain[-1] = -1.0
        found = linprog(gain, A_ub=np.array(self.rows), b_ub=most, bounds=(0, None), method="highs")
        parts: dict[str, float] = {}
        for name, limit, dual in zip(self.names, most, found.ineqlin.marginals, strict=True):
            if limit * dual and found.x[-1]:
                parts[name] = parts.get(name, 0.0) - float(limit * dual / found.x[-1])
        return float(found.x[-1]), parts

    def solve(self, bound: float, seconds: float) -> list[PoolSpec]:
        """The pools of the largest t with whole actors, as few as reach it; none where some expert gets no actor."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        if not bound:
            return []
        actors, rows = len(self.columns), np.array(self.rows)
        rows[:, -1] *= bound  # t counts as a part of the bound from here on
        kinds: dict[tuple[str, str | None], list[int]] = {}  # expert and accelerator: one share for all its actors
        shares = sorted({way.pool for way, _, _ in self.columns}, key=repr)
        for index, pool in enumerate(shares):
            kinds.setdefault((pool.expert, pool.accelerator), []).append(index)
        used = np.zeros((actors, actors + 1 + len(shares)))  # actors only of the share that is chosen
        for index, (way, _, most) in enumerate(self.columns):
            used[index, index], used[index, actors + 1 + shares.index(way.pool)] = 1, -most
        one = np.zeros((len(kinds), actors + 1 + len(shares)))
        for index, ways in enumerate(kinds.values()):
            one[index, [actors + 1 + way for way in ways]] = 1
        limits = np.hstack([rows, np.zeros((len(rows), len(shares)))])
        constraints = [
            LinearConstraint(limits, ub=np.array(self.most)),
            LinearConstraint(used, ub=0),
            LinearConstraint(one, ub=1),
        ]
        whole = np.ones(actors + 1 + len(shares))
        whole[actors] = 0
        size = np.array([self.groups[where][1] for _, where, _ in self.columns])
        lower, upper = np.zeros(len(whole)), np.array([*(most for _, _, most in self.columns), 1, *([1] * len(shares))])
        options = {"mip_rel_gap": GAP, "time_limit": seconds}
        roughly = options | {"mip_rel_gap": 5 * SPARE}
        gain = np.zeros(len(whole))
        gain[actors] = -1
        best = milp(gain, constraints=constraints, integrality=whole, bounds=Bounds(lower, upper), options=options)
        if best.x is None or best.x[actors] < ROUNDING:
            return []
        lower[actors] = best.x[actors] * (1 - SPARE)
        fewest = np.array([*size, 0.0, *([POOL_COST] * len(shares))])
        few = milp(fewest, constraints=constraints, integrality=whole, bounds=Bounds(lower, upper), options=roughly)
        counts = np.round((best if few.x is None else few).x[:actors]).astype(int) * size
        total: dict[_Way, int] = {}
        for (way, _, _), count in zip(self.columns, counts, strict=True):
            total[way] = total.get(way, 0) + int(count)
        return [replace(way.pool, max_size=count, rate=way.rate * count) for way, count in total.items() if count]


def _group_sizes(count: int) -> list[int]:
    """Sizes that add up to `count`: ones of a few, else halves of what is left, so that any number of machines is a sum."""
    sizes = []
    while count > FEW:
        sizes.append((count + 1) // 2)
        count -= sizes[-1]
    return sizes + [1] * count


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 3 else f"{minutes:.0f} min" if hours < 3 else f"{hours:.1f} h"

"""Which pool of actors each expert gets on a cluster so that all features are computed soonest.

`plan_placement` chooses by an integer program, solved by HiGHS through scipy. Its assumptions:

- A share f of a GPU gives f of the speed measured with the whole GPU. Shares are 1, 1/2, 1/4, 1/8 and 1/16. Each is a
  multiple of the next, so actors started in the order of their share fill GPUs without a gap, whichever GPU Ray picks,
  and no actor straddles two GPUs. The program therefore needs no packing constraints and is still exact.
- An actor fits a share of a GPU if the memory peak of its profile, and what CUDA takes for a process, fit that share of
  the GPU's memory. Then all actors of one GPU fit it together.
- An actor without a GPU holds as many CPUs as its profile used threads. Every CPU counts as the slowest one profiled.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from math import ceil, gcd
from typing import TYPE_CHECKING

import numpy as np

from cluster.nodes import GIB, NodeType, PlanError, profiles_on
from cluster.packing import READING_CPUS, first_fit
from cluster.pools import ROUNDING, PoolSpec
from mova_core.figures import number

if TYPE_CHECKING:
    from mova_core.experts.cost import Profile

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of a GPU, per actor
DECODERS = 4  # most cores that decode for one actor on a GPU
CONTEXT = GIB // 2  # bytes of GPU memory that CUDA takes for each process, beside PyTorch's own
UNGROUPED_MACHINES = 3  # up to this many machines of a kind are each planned by themselves
GAP = 5e-3  # relative gap at which the first solve, for the rate, may stop
SIMPLICITY_TOLERANCE = 0.01  # second solve: accept up to 1 % less rate for the fewest pools and actors
SIMPLICITY_GAP = 5 * SIMPLICITY_TOLERANCE  # relative gap at which the second solve may stop
POOL_COST = 4.0  # second solve: one pool less is worth this many actors
MAX_SHARD_SHARE_OF_RUN = 0.05  # devices on which one shard takes longer than this part of the run are left out
SEQUENTIAL_GAIN = 1.05  # least gain of running experts sequentially: the program does not see the time of the restarts


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Pools for every expert, and the rate they are predicted to reach."""

    wanted: Mapping[str, int]  # expert -> features to compute
    pools: list[PoolSpec]  # in the order to start them, larger shares of a GPU first; planned with `max_size` actors
    sequential: bool  # experts run one after the other, each on the whole cluster; else all run concurrently
    images_per_second: float  # of the most wanted expert; concurrent experts finish together
    bound: float  # images/s that no placement exceeds: the linear program, in which actors may be cut into parts
    shares: Mapping[str, float]  # resource -> its part in the bound, 1 in all: the largest is the bottleneck
    gains: Mapping[str, float]  # accelerator -> images/s that one more such GPU adds to the bound
    notes: list[str] = field(default_factory=list)  # for people: missing profiles, actors that may have to wait

    @property
    def rates(self) -> dict[str, float]:
        """Expert -> images/s of its pools while they run."""
        return {name: _rate(self.pools, name) for name in self.wanted}

    @property
    def seconds(self) -> float:
        """Time until everything is computed, without the start of the actors."""
        return max(self.wanted.values(), default=0) / self.images_per_second

    @property
    def bottleneck(self) -> str:
        """The resource that limits the rate, and the expert that finishes last."""
        resource = max(self.shares, key=self.shares.__getitem__)
        last = max(self.wanted, key=lambda name: self.wanted[name] / self.rates[name])
        return f"{resource}; {'longest' if self.sequential else 'last to finish'}: {last}"

    def describe(self) -> list[str]:
        """The placement in lines for people."""
        order = "experts run sequentially" if self.sequential else "all experts run concurrently"
        lines = [
            f"{order}: {number(self.images_per_second)} images/s that have passed all experts, "
            f"{self.images_per_second / self.bound:.0%} of the best possible rate of this cluster",
            f"{number(max(self.wanted.values()))} images in {duration(self.seconds)}, without the start of the actors",
            f"bottleneck: {self.bottleneck}",
            *(f"one more {kind}: +{number(gain)} images/s" for kind, gain in self.gains.items()),
        ]
        return lines + [f"note: {note}" for note in self.notes]


@dataclass(frozen=True)
class PlacementOption:
    """One kind of device, share and batch on which an actor of an expert can run."""

    pool: PoolSpec  # of one actor
    rate: float  # images/s of one actor

    def fits(self, node: NodeType) -> int:
        """How many such actors one empty machine of that kind holds."""
        if self.pool.accelerator not in (None, node.accelerator):
            return 0
        total = {"cpu": node.cpus, "gpu": node.gpus, "memory": node.memory}
        return min(int(total[resource] / held + ROUNDING) for resource, held in self.pool.holds.items() if held)


def plan_placement(
    wanted: Mapping[str, int],
    profiles: "Iterable[Profile]",
    nodes: Sequence[NodeType],
    decode: float | None = None,
    shard_rows: Mapping[str, int] | int = 64,
    seconds: float = 5.0,
) -> Placement:
    """The placement that computes all wanted features soonest.

    It maximises t, where the actors of every expert together compute t times its wanted features per second, under the
    machines' CPUs (one stays free for reading tasks), GPUs and memory. Experts run sequentially, each on the whole
    cluster, where they do not fit it together or are at least 5 % faster that way.

    Args:
        wanted: features to compute, per expert; experts with none are left out.
        profiles: of the size and dtype to run; where several are of one kind of device, the slowest counts.
        nodes: machines, as `cluster.nodes` reads them.
        decode: images/s that one core decodes and prepares, which profiles leave out. An actor on a GPU then holds the
            CPUs it needs to keep up, at most `DECODERS`. None: decoding costs nothing.
        shard_rows: images per shard.
        seconds: longest time for each solve; after it the best placement found so far counts.

    Raises:
        PlanError: no profile is of a device of this cluster, or an expert fits nowhere.
    """
    wanted = {name: count for name, count in wanted.items() if count > 0}
    if not wanted:
        raise PlanError("no features are wanted of any expert: there is nothing to place")
    profiles, notes = list(profiles), list[str]()
    options = {name: placement_options(name, profiles, nodes, decode, notes) for name in wanted}
    bound, shares = _Program(wanted, options, nodes).bound()
    for name, each in options.items():
        options[name] = _fast_enough(each, shard_rows if isinstance(shard_rows, int) else shard_rows[name], bound)

    program = _Program(wanted, options, nodes)
    pools, t, sequential = _solve(program, wanted, options, nodes, seconds)
    if not sequential:
        notes += _notes_on_waiting(pools, nodes)
    most_wanted = max(wanted.values())
    return Placement(
        wanted=wanted,
        pools=pools,
        sequential=sequential,
        images_per_second=most_wanted * t,
        bound=most_wanted * bound,
        shares=shares,
        gains={kind: gain * most_wanted for kind, gain in program.gains().items()},
        notes=notes,
    )


def _solve(
    program: "_Program",
    wanted: Mapping[str, int],
    options: Mapping[str, Sequence[PlacementOption]],
    nodes: Sequence[NodeType],
    seconds: float,
) -> tuple[list[PoolSpec], float, bool]:
    """The pools, the part of every expert's wanted features that they compute per second, and whether sequentially.

    Raises:
        PlanError: neither order leaves a CPU for reading tasks.
    """
    pools = program.solve(seconds)
    concurrent_t = min(_rate(pools, name) / count for name, count in wanted.items())
    alone = dict.fromkeys(wanted, pools)
    if len(wanted) > 1:
        alone = {name: _Program({name: count}, options, nodes).solve(seconds) for name, count in wanted.items()}
    sequential_t = 0.0
    if all(alone.values()):
        sequential_t = 1 / sum(count / _rate(alone[name], name) for name, count in wanted.items())
    if max(concurrent_t, sequential_t) == 0:
        raise _no_cpu_left(next(name for name in wanted if not alone[name]), options, nodes)
    if sequential := sequential_t > concurrent_t * SEQUENTIAL_GAIN:
        # Each pool waits for all its seats, so that experts do run one after the other.
        pools = [replace(pool, min_size=pool.max_size) for each in alone.values() for pool in each]
    return sorted(pools, key=lambda pool: -pool.gpu), sequential_t if sequential else concurrent_t, sequential


def duration(seconds: float) -> str:
    """A duration in words: seconds, minutes or hours."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 3 else f"{minutes:.0f} min" if hours < 3 else f"{hours:.1f} h"


def _rate(pools: Iterable[PoolSpec], expert: str) -> float:
    """Images/s of all pools of an expert."""
    return sum(pool.rate or 0.0 for pool in pools if pool.expert == expert)


def _fast_enough(options: Sequence[PlacementOption], rows: int, bound: float) -> list[PlacementOption]:
    """Options on which a shard takes a small part of the run. Without this, the run waits for a slow device's last shard.

    Args:
        rows: images per shard.
        bound: largest part of the wanted features per second, so that the run takes at least 1 / bound seconds.
    """
    slowest = rows * bound / MAX_SHARD_SHARE_OF_RUN  # images/s
    slowest = min(slowest, max(option.rate for option in options))
    return [option for option in options if option.rate >= slowest]


def _no_cpu_left(name: str, options: Mapping[str, Sequence[PlacementOption]], nodes: Sequence[NodeType]) -> PlanError:
    fewest = min(option.pool.cpus for option in options[name])
    return PlanError(
        f"expert {name}: one actor holds {fewest:g} CPUs as profiled and one must stay free for reading tasks, but the "
        f"cluster has {sum(node.cpus * node.count for node in nodes):g}: profile it with a lower --cpu, or add a node"
    )


def _notes_on_waiting(pools: Sequence[PoolSpec], nodes: Sequence[NodeType]) -> list[str]:
    """Pools whose actors do not all find a seat where actors are seated in a simple order, as Ray does."""
    missing = [(pool.max_size - len(seats), pool) for pool, seats in zip(pools, first_fit(pools, nodes), strict=True)]
    return [
        f"{count} actors of {pool} may wait: Ray seats the other actors in its own order"
        for count, pool in missing
        if count
    ]


def placement_options(
    name: str, profiles: "Sequence[Profile]", nodes: Sequence[NodeType], decode: float | None, notes: list[str]
) -> list[PlacementOption]:
    """Every option that this cluster has for an actor of an expert; adds to `notes` the devices left out.

    Raises:
        PlanError: there is none; the message says which memory, CPUs or profile are missing.
    """
    gpu_memory: dict[str, list[int]] = {}  # accelerator -> known bytes of one GPU
    for node in nodes:
        if node.accelerator:
            gpu_memory.setdefault(node.accelerator, []).extend([node.gpu_memory] if node.gpu_memory else [])
    options: list[PlacementOption] = []
    unprofiled, too_large = [], []
    for kind in (None, *gpu_memory):
        measured = profiles_on(kind, name, profiles)
        if not measured:
            unprofiled.append(kind)
            continue
        try:
            if kind is None:
                options.append(_on_cpus(measured, nodes, decode))
            else:
                options += _on_gpus(kind, measured, min(gpu_memory[kind], default=None), decode)
        except _TooLarge as error:
            too_large.append(str(error))
    gpus = [kind for kind in unprofiled if kind is not None]
    if not options and too_large:
        raise PlanError(f"expert {name} fits nowhere: it takes {'; or '.join(too_large)}")
    if not options:
        device = f" --gpu 1 --accelerator {gpus[0]}" if gpus else ""
        raise PlanError(
            f"expert {name} has no profile on any kind of device here ({', '.join(kind or 'CPU' for kind in unprofiled)}): "
            f"run `mova profile --experts {name}{device}`"
        )
    if gpus:
        notes.append(f"{name} is not placed on {', '.join(gpus)}: no profile of it there")
    return options


class _TooLarge(ValueError):
    """No machine of a kind holds an actor; the message says what the actor takes and what the largest machine has."""


def _on_cpus(profiles: "Sequence[Profile]", nodes: Sequence[NodeType], decode: float | None) -> PlacementOption:
    """An actor without a GPU, which decodes on its own CPUs before it computes."""
    slowest = min(profiles, key=lambda profile: profile.best().images_per_second)
    best = slowest.best()
    pool = PoolSpec(expert=slowest.expert, cpu=float(slowest.threads), batch=best.batch, memory=best.peak_bytes or 0)
    seconds = 1 / best.images_per_second + (1 / (decode * pool.cpus) if decode else 0.0)  # per image
    option = PlacementOption(pool, 1 / seconds)
    if not any(option.fits(node) for node in nodes):
        raise _TooLarge(
            f"{pool.cpus:g} CPUs and {pool.memory / GIB:.1f} GiB of memory on one machine, but the largest has "
            f"{max(node.cpus for node in nodes):g} and {max(node.memory for node in nodes) / GIB:.1f} GiB"
        )
    return option


def _on_gpus(
    kind: str, profiles: "Sequence[Profile]", memory: int | None, decode: float | None
) -> list[PlacementOption]:
    """An actor on each share of a GPU that it fits; where the GPU's memory is not known, only on a whole GPU."""
    options = []
    for share in SHARES if memory is not None else SHARES[:1]:
        room = None if memory is None else share * memory - CONTEXT
        if any(room is not None and (profile.batches[0].peak_bytes or 0) > room for profile in profiles):
            continue
        best = min((profile.best(room) for profile in profiles), key=lambda measured: measured.images_per_second)
        pool = PoolSpec(expert=profiles[0].expert, gpu=share, accelerator=kind, batch=best.batch)
        rate = share * best.images_per_second
        if decode:
            rate = min(rate, DECODERS * decode)
            cores = ceil(4 * rate / decode - ROUNDING) / 4  # in quarters, so that several actors add up to whole CPUs
            pool = replace(pool, cpu=max(pool.cpus, cores))
        options.append(PlacementOption(pool, rate))
    if not options and memory is not None:
        needed = min(profile.batches[0].peak_bytes or 0 for profile in profiles) + CONTEXT
        raise _TooLarge(f"{needed / GIB:.1f} GiB of GPU memory, but a {kind} has {memory / GIB:.1f} GiB")
    return options


@dataclass(frozen=True)
class _Column:
    """A variable of the program: how many actors of an option each machine of a group runs."""

    option: PlacementOption
    group: int
    most: int  # actors that an empty machine holds


@dataclass(frozen=True)
class _Row:
    """A limit of the program: the sum of `coefficients` times the variables, and of `t_coefficient` times t."""

    name: str  # for people
    coefficients: np.ndarray  # (columns,)
    limit: float
    t_coefficient: float = 0.0


class _Program:
    """The integer program: the number of actors of each option on every machine, and t.

    t is the part of every expert's wanted features that is computed per second. Machines of a kind are divided into
    groups of 1, 2, 4, ... machines that all run the same actors. So the program knows what each machine holds, while a
    thousand machines take a dozen groups.

    Args:
        wanted: features to compute, per expert; of other experts in `options` none is placed.
    """

    def __init__(
        self,
        wanted: Mapping[str, int],
        options: Mapping[str, Sequence[PlacementOption]],
        nodes: Sequence[NodeType],
    ):
        self.wanted = wanted
        self.groups = [(node, size) for node in nodes for size in _group_sizes(node.count)]
        self.columns = [
            _Column(option, group, most)
            for name in wanted
            for option in options[name]
            for group, (node, _) in enumerate(self.groups)
            if (most := option.fits(node))
        ]
        self.machines = np.array(
            [self.groups[column.group][1] for column in self.columns]
        )  # that each column counts for
        self.rows = self._rows()

    def _rows(self) -> dict[tuple[str, object], _Row]:
        """Limits by (resource, group), or by ("rate", expert); ("cpu", None) is of the whole cluster."""
        pools = [column.option.pool for column in self.columns]
        group_of = np.array([column.group for column in self.columns])
        expert_of = np.array([pool.expert for pool in pools])
        rate = np.array([column.option.rate for column in self.columns])
        held = {resource: np.array([pool.holds[resource] for pool in pools]) for resource in ("cpu", "gpu", "memory")}
        held["memory"] = held["memory"] / GIB  # of the size of the other coefficients
        rows: dict[tuple[str, object], _Row] = {}
        for name, count in self.wanted.items():
            computed = rate * self.machines * (expert_of == name)
            rows["rate", name] = _Row(name, -computed, 0.0, float(count))  # t * wanted <= features/s
        for group, (node, _) in enumerate(self.groups):
            here, label = group_of == group, node.accelerator or "CPU-only"
            cpus = _usable_cpus(node, held["cpu"][here])
            rows["cpu", group] = _Row(f"CPUs of {label} machines", held["cpu"] * here, cpus)
            if node.gpus:
                rows["gpu", group] = _Row(f"{label} GPUs", held["gpu"] * here, node.gpus)
            rows["memory", group] = _Row(f"memory of {label} machines", held["memory"] * here, node.memory / GIB)
        total = sum(node.cpus * size for node, size in self.groups)
        rows["cpu", None] = _Row("CPUs", held["cpu"] * self.machines, total - READING_CPUS)
        return rows

    @cached_property
    def _matrix(self) -> np.ndarray:
        """(rows, columns + 1) coefficients; the last column is t."""
        return np.array([[*row.coefficients, row.t_coefficient] for row in self.rows.values()])

    @cached_property
    def _limits(self) -> np.ndarray:
        return np.array([row.limit for row in self.rows.values()])

    def bound(self, limits: np.ndarray | None = None) -> tuple[float, dict[str, float]]:
        """Largest t if actors could be cut into parts, and the part of each resource in it (from the dual values)."""
        from scipy.optimize import linprog

        limits = self._limits if limits is None else limits
        maximise_t = np.zeros(len(self.columns) + 1)
        maximise_t[-1] = -1.0
        solution = linprog(maximise_t, A_ub=self._matrix, b_ub=limits, bounds=(0, None), method="highs")
        t = float(solution.x[-1])
        parts: dict[str, float] = {}
        for row, limit, dual in zip(self.rows.values(), limits, solution.ineqlin.marginals, strict=True):
            if limit * dual and t:
                parts[row.name] = parts.get(row.name, 0.0) - float(limit * dual / t)
        return t, parts

    def gains(self) -> dict[str, float]:
        """Accelerator -> how much one more such GPU adds to the bound on t."""
        bound, numbers = self.bound()[0], list(self.rows)
        gains: dict[str, float] = {}
        for group, (node, size) in enumerate(self.groups):
            if node.accelerator and node.accelerator not in gains:
                limits = self._limits.copy()
                limits[numbers.index(("gpu", group))] += 1 / size  # a limit holds for each machine of the group
                gains[node.accelerator] = self.bound(limits)[0] - bound
        return gains

    def solve(self, seconds: float) -> list[PoolSpec]:
        """The pools of the largest t with whole actors, and as few of them as reach it.

        Empty where some expert gets no actor. The variables are the columns, t as a part of its bound, and for each
        pool whether it is chosen.

        Args:
            seconds: longest time for each of the two solves.
        """
        from scipy.optimize import Bounds, milp

        if not (bound := self.bound()[0]):
            return []
        pools = sorted({column.option.pool for column in self.columns}, key=repr)
        t = len(self.columns)
        upper = np.array([*(column.most for column in self.columns), 1, *([1] * len(pools))], dtype=float)
        lower, integers = np.zeros_like(upper), np.ones_like(upper)
        integers[t] = 0
        constraints = self._constraints(bound, pools)

        def minimise(costs: np.ndarray, gap: float) -> np.ndarray | None:
            options = {"mip_rel_gap": gap, "time_limit": seconds}
            limits = Bounds(lower, upper)
            return milp(costs, constraints=constraints, integrality=integers, bounds=limits, options=options).x

        maximise_t = np.zeros_like(upper)
        maximise_t[t] = -1
        best = minimise(maximise_t, GAP)
        if best is None or best[t] < ROUNDING:
            return []
        lower[t] = best[t] * (1 - SIMPLICITY_TOLERANCE)
        simplest = minimise(np.array([*self.machines, 0.0, *([POOL_COST] * len(pools))]), SIMPLICITY_GAP)
        chosen = best if simplest is None else simplest
        counts: dict[PlacementOption, int] = {}
        for column, count in zip(self.columns, np.round(chosen[:t]).astype(int) * self.machines, strict=True):
            counts[column.option] = counts.get(column.option, 0) + int(count)
        return [
            replace(option.pool, max_size=count, rate=option.rate * count) for option, count in counts.items() if count
        ]

    def _constraints(self, bound: float, pools: Sequence[PoolSpec]) -> list:
        """The limits of `rows`, and that an expert has one share of a GPU on each accelerator."""
        from scipy.optimize import LinearConstraint

        columns = len(self.columns)
        limits = np.hstack([self._matrix, np.zeros((len(self.rows), len(pools)))])
        limits[:, columns] *= bound  # from t to its part of the bound
        only_chosen = np.zeros((columns, limits.shape[1]))  # actors of a column <= most * whether its pool is chosen
        for index, column in enumerate(self.columns):
            only_chosen[index, index] = 1
            only_chosen[index, columns + 1 + pools.index(column.option.pool)] = -column.most
        alternatives: dict[tuple[str, str | None], list[int]] = {}
        for index, pool in enumerate(pools):
            alternatives.setdefault((pool.expert, pool.accelerator), []).append(columns + 1 + index)
        one_share = np.zeros((len(alternatives), limits.shape[1]))
        for index, variables in enumerate(alternatives.values()):
            one_share[index, variables] = 1
        return [
            LinearConstraint(limits, ub=self._limits),
            LinearConstraint(only_chosen, ub=0),
            LinearConstraint(one_share, ub=1),
        ]


def _usable_cpus(node: NodeType, held: np.ndarray) -> float:
    """CPUs of a machine that its actors can use: the largest multiple of what all of them hold multiples of."""
    unit = reduce(gcd, {round(cpus * 10_000) for cpus in held}, 0) / 10_000 or 1.0
    return int(node.cpus / unit + ROUNDING) * unit


def _group_sizes(count: int) -> list[int]:
    """Sizes that add up to `count`: halves of what is left, then single machines, so that any number is a sum of some."""
    sizes = []
    while count > UNGROUPED_MACHINES:
        sizes.append((count + 1) // 2)
        count -= sizes[-1]
    return sizes + [1] * count

"""A precompute run on a cluster that need not be there: discrete events, with profiles for speeds and no GPU.

The simulation follows the rules of the run (`pipelines/precompute/scheduler.py`):

- All actors of an expert draw shards from one queue, so a fast actor computes more of them than a slow one.
- Pools start and grow where there is room, as `cluster/allocation.py` says.
- An actor writes one shard while it computes the next, and leaves when the queue is empty and its last shard written.
- A machine that fails loses its actors, and their shards return to the queue. The actors are restarted where there is
  room, or when the machine is back.

One rule differs: the run hands out blocks of several shards where an expert has more than a thousand.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.allocation import ExpertDemand, PoolDemand, allocate
from cluster.nodes import NodeType, PlanError, profiles_on
from cluster.packing import FreeResources, Seat
from cluster.placement import DECODERS, duration
from cluster.pools import PoolSpec
from mova_core.figures import number

if TYPE_CHECKING:
    from mova_core.experts.cost import Profile

MIDDLE = (0.1, 0.9)  # parts of an expert's features between which its rate is steady


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a simulated cluster does beside computing."""

    shard_rows: Mapping[str, int] | int = 64  # images per shard, also per expert
    feature_bytes: Mapping[str, int] | None = None  # stored, per image and expert; None: writing takes no time
    start_seconds: float = 30.0  # from taking a seat to drawing the first shard
    noise: float = 0.0  # standard deviation of a batch's time, as a part of it
    decode: float | None = None  # images/s that one core decodes and prepares, as in `plan_placement`
    node_bytes_per_second: float | None = None  # that one machine can write
    store_bytes_per_second: float | None = None  # that the store can take from all machines
    mtbf_hours: float | None = None  # mean time between failures of one machine
    repair_seconds: float = 600.0  # until a failed machine is back
    seed: int = 0  # of noise and failures


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulated run did."""

    seconds: float  # from the first actor's start to the last shard written
    images_per_second: float  # of the most wanted expert, over the time in which any shard was under way
    rates: Mapping[str, float]  # expert -> images/s between a tenth and nine tenths of its features
    finished: Mapping[str, float]  # expert -> seconds from the beginning
    busy: Mapping[str, float]  # accelerator -> part of its GPUs that computed, over the whole run
    failures: int  # of machines
    redone: int  # shards computed again
    events: int

    def describe(self) -> list[str]:
        """The run in lines for people."""
        busy = ", ".join(f"{kind} {part:.0%}" for kind, part in self.busy.items())
        lines = [
            f"simulated: {number(self.images_per_second)} images/s that have passed all experts, all done in {duration(self.seconds)} with starts",
            *([f"GPUs busy over the run: {busy}"] if busy else []),
        ]
        if self.failures:
            lines.append(f"{self.failures} machines failed, {self.redone} shards were computed again")
        return lines


@dataclass(eq=False)
class _Expert:
    """An expert's queue, and what has become of its shards."""

    name: str
    shard_rows: int
    queue: "deque[int]"  # rows of each shard that no actor has drawn
    pools: "list[_Pool]" = field(default_factory=list)
    under_way: int = 0  # shards drawn and not written
    starting: int = 0  # actors that have yet to draw their first shard
    ready_at: float | None = None  # when its first actor was ready
    written: list[tuple[float, int]] = field(default_factory=list)  # time and rows of each shard

    @property
    def done(self) -> bool:
        return not self.queue and not self.under_way

    def demand(self) -> ExpertDemand:
        """What `allocate` needs to know; the time to go is that of the present actors."""
        rate = sum(pool.rate * len(pool.actors) for pool in self.pools)
        seconds = len(self.queue) * self.shard_rows / rate if rate else None
        return ExpertDemand(pending=len(self.queue), starting=self.starting, seconds=seconds)


@dataclass(eq=False)
class _Pool:
    spec: PoolSpec
    expert: _Expert
    rate: float  # images/s of one actor
    actors: "set[_Actor]" = field(default_factory=set)
    lost: int = 0  # actors that died with a machine and wait to be restarted


@dataclass(eq=False)
class _Actor:
    pool: _Pool
    seat: Seat
    alive: bool = True
    ready: bool = False
    computing: int = 0  # rows of the shard it computes
    held: list[int] = field(default_factory=list)  # rows of the shards it computes and writes


def simulate(
    pools: Sequence[PoolSpec],
    wanted: Mapping[str, int],
    profiles: "Sequence[Profile]",
    nodes: Sequence[NodeType],
    conditions: Conditions | None = None,
    on_shard: Callable[[int], object] = lambda rows: None,
) -> Simulated:
    """Runs pools over what is wanted.

    Args:
        pools: in the order in which they look for room; every wanted expert needs one.
        wanted: features to compute, per expert.
        profiles: of the size and dtype to run.
        nodes: machines, as `cluster.nodes` reads them.
        conditions: default: no noise, no failures, and writing takes no time.
        on_shard: called with the rows of each shard as it is written.

    Raises:
        PlanError: a pool has no profile, fits nowhere, or an expert has no pool.
    """
    return _Run(pools, wanted, profiles, nodes, conditions or Conditions(), on_shard).run()


class _Run:
    """One simulation; the arguments are those of `simulate`."""

    def __init__(
        self,
        pools: Sequence[PoolSpec],
        wanted: Mapping[str, int],
        profiles: "Sequence[Profile]",
        nodes: Sequence[NodeType],
        conditions: Conditions,
        on_shard: Callable[[int], object],
    ):
        self.nodes, self.conditions, self.on_shard = nodes, conditions, on_shard
        self.random = random.Random(conditions.seed)
        self.free = FreeResources(nodes)
        self.experts = {name: self._expert(name, rows) for name, rows in wanted.items() if rows > 0}
        self.pools = [
            _Pool(spec, self.experts[spec.expert], self._rate(spec, profiles))
            for spec in pools
            if spec.expert in self.experts
        ]
        for pool in self.pools:
            pool.expert.pools.append(pool)
        if without := [name for name, expert in self.experts.items() if not expert.pools]:
            raise PlanError(f"expert {without[0]} has no pool")
        self.most_wanted = max(wanted.values(), default=0)
        self.heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.event_number = count()  # orders events of the same time
        self.now = 0.0
        self.writes_until = [0.0] * (len(self.free) + 1)  # of each machine, and last of the store
        self.actors_on: list[set[_Actor]] = [set() for _ in range(len(self.free))]
        self.gpu_seconds = {node.accelerator: 0.0 for node in nodes if node.accelerator}
        self.failures = self.redone = 0
        self.unfinished = len(self.experts)
        self.under_way, self.worked, self.began = 0, 0.0, 0.0  # shards; seconds with any; since when there are some

    def _expert(self, name: str, rows: int) -> _Expert:
        each = self.conditions.shard_rows
        each = each if isinstance(each, int) else each[name]
        whole, rest = divmod(rows, each)
        return _Expert(name, each, deque([each] * whole + [rest] * bool(rest)))

    def _rate(self, spec: PoolSpec, profiles: "Sequence[Profile]") -> float:
        """Images/s of one actor of a pool."""
        kind = spec.accelerator if spec.gpu else None
        measured = profiles_on(kind, spec.expert, profiles)
        if not measured:
            raise PlanError(f"pool {spec}: no profile of {spec.expert} on {kind or ('a GPU' if spec.gpu else 'a CPU')}")
        rate = min((run.at(spec.batch) if spec.batch else run.best()).images_per_second for run in measured)
        rate *= min(spec.gpu or 1.0, 1.0)
        if decode := self.conditions.decode:
            cores = min(DECODERS, spec.cpus) if spec.gpu else spec.cpus
            # Beside a GPU cores decode while it computes; on a CPU the same cores do both.
            rate = min(rate, cores * decode) if spec.gpu else 1 / (1 / rate + 1 / (cores * decode))
        return rate

    def run(self) -> Simulated:
        if self.conditions.mtbf_hours:
            for machine in range(len(self.free)):
                self._plan_failure(machine)
        self._start_actors()
        events = 0
        while self.unfinished:
            self.now, _, handle, subject = heapq.heappop(self.heap)
            handle(subject)
            events += 1
        return self._simulated(events)

    def _at(self, time: float, handle: Callable[[Any], None], subject: Any) -> None:
        heapq.heappush(self.heap, (time, next(self.event_number), handle, subject))

    def _start_actors(self) -> None:
        """Restarts actors that died, then starts and grows pools, where there is room.

        Raises:
            PlanError: nothing runs, and on machines that are all up no pool finds room.
        """
        for pool in self.pools:
            if pool.lost and pool.expert.queue:
                seats = self.free.take_several(pool.spec, pool.lost)
                pool.lost -= len(seats)
                self._start(pool, seats)
        experts = {name: expert.demand() for name, expert in self.experts.items()}
        demands = [
            PoolDemand(spec=pool.spec, expert=experts[pool.spec.expert], size=len(pool.actors) + pool.lost)
            for pool in self.pools
        ]
        for pool, seats in zip(self.pools, allocate(self.free, demands), strict=True):
            self._start(pool, seats)
        if self.unfinished and not any(self.actors_on) and self.free.up.all():
            stuck = next(pool.spec for pool in self.pools if not pool.expert.done)
            raise PlanError(f"pool {stuck} fits nowhere: {stuck.min_size} actors find no seat on this cluster")

    def _start(self, pool: _Pool, seats: Sequence[Seat]) -> None:
        pool.expert.starting += len(seats)
        for seat in seats:
            actor = _Actor(pool, seat)
            pool.actors.add(actor)
            self.actors_on[seat.machine].add(actor)
            self._at(self.now + self.conditions.start_seconds, self._ready, actor)

    def _ready(self, actor: _Actor) -> None:
        if actor.alive:
            expert = actor.pool.expert
            actor.ready = True
            expert.starting -= 1
            expert.ready_at = self.now if expert.ready_at is None else expert.ready_at
            self._draw(actor)

    def _draw(self, actor: _Actor) -> None:
        """The actor begins its next shard. It leaves where the queue is empty and all its shards are written."""
        pool = actor.pool
        if actor.computing:
            return
        if not pool.expert.queue:
            if not actor.held:
                self._leave(actor)
                self._start_actors()
            return
        actor.computing = rows = pool.expert.queue.popleft()
        actor.held.append(rows)
        self._count_under_way(pool.expert, 1)
        seconds = rows / pool.rate
        if noise := self.conditions.noise:
            batches = max(1.0, rows / (pool.spec.batch or 1))
            seconds *= max(0.1, self.random.gauss(1.0, noise / batches**0.5))
        if pool.spec.accelerator in self.gpu_seconds:
            self.gpu_seconds[pool.spec.accelerator] += seconds * pool.spec.gpu
        self._at(self.now + seconds, self._computed, actor)

    def _count_under_way(self, expert: _Expert, shards: int) -> None:
        """Counts shards under way, and the time in which there are any."""
        expert.under_way += shards
        if not self.under_way:
            self.began = self.now
        self.under_way += shards
        if not self.under_way:
            self.worked += self.now - self.began

    def _computed(self, actor: _Actor) -> None:
        """The actor writes its shard, and draws the next one unless it still writes the one before."""
        if not actor.alive:
            return
        rows, actor.computing = actor.computing, 0
        self._at(self._write(actor, rows), self._written, (actor, rows))
        if len(actor.held) == 1:
            self._draw(actor)

    def _write(self, actor: _Actor, rows: int) -> float:
        """When a shard is written: each machine, and the store, write one shard after the other."""
        end = self.now
        if sizes := self.conditions.feature_bytes:
            limits = (self.conditions.node_bytes_per_second, self.conditions.store_bytes_per_second)
            for writer, limit in zip((actor.seat.machine, -1), limits, strict=True):
                if limit:
                    begin = max(self.now, self.writes_until[writer])
                    self.writes_until[writer] = begin + rows * sizes[actor.pool.spec.expert] / limit
                    end = max(end, self.writes_until[writer])
        return end

    def _written(self, subject: tuple[_Actor, int]) -> None:
        """A shard is in the store."""
        actor, rows = subject
        if not actor.alive:
            return
        expert = actor.pool.expert
        actor.held.remove(rows)
        self._count_under_way(expert, -1)
        expert.written.append((self.now, rows))
        self.on_shard(rows)
        self.unfinished -= expert.done
        self._draw(actor)

    def _leave(self, actor: _Actor) -> None:
        actor.alive = False
        actor.pool.expert.starting -= not actor.ready
        actor.pool.actors.discard(actor)
        self.actors_on[actor.seat.machine].discard(actor)
        self.free.give_back(actor.pool.spec, actor.seat)

    def _plan_failure(self, machine: int) -> None:
        assert self.conditions.mtbf_hours
        seconds = self.random.expovariate(1 / (self.conditions.mtbf_hours * 3600))
        self._at(self.now + seconds, self._fail, machine)

    def _fail(self, machine: int) -> None:
        self.failures += 1
        self.free.up[machine] = False
        for actor in sorted(self.actors_on[machine], key=lambda actor: self.pools.index(actor.pool)):
            actor.pool.expert.queue.extendleft(actor.held)
            self._count_under_way(actor.pool.expert, -len(actor.held))
            self.redone += len(actor.held)
            actor.pool.lost += 1
            self._leave(actor)
        self._start_actors()
        self._at(self.now + self.conditions.repair_seconds, self._back, machine)

    def _back(self, machine: int) -> None:
        self.free.up[machine] = True
        self._plan_failure(machine)
        self._start_actors()

    def _simulated(self, events: int) -> Simulated:
        finished = {name: expert.written[-1][0] for name, expert in self.experts.items()}
        seconds = max(finished.values())
        gpus = {
            kind: sum(node.count * node.gpus for node in self.nodes if node.accelerator == kind)
            for kind in self.gpu_seconds
        }
        return Simulated(
            seconds=seconds,
            images_per_second=self.most_wanted / self.worked,
            rates={name: _steady_rate(expert.ready_at or 0.0, expert.written) for name, expert in self.experts.items()},
            finished=finished,
            busy={kind: spent / (gpus[kind] * seconds) for kind, spent in self.gpu_seconds.items()},
            failures=self.failures,
            redone=self.redone,
            events=events,
        )


def _steady_rate(began: float, written: Sequence[tuple[float, int]]) -> float:
    """Rows per second between the `MIDDLE` parts of what was written, in the order of time."""
    total, so_far = sum(rows for _, rows in written), 0
    times: list[float] = []
    for time, rows in written:
        so_far += rows
        if so_far >= MIDDLE[len(times)] * total:
            times.append(time)
            if len(times) == len(MIDDLE):
                break
    begin, end = times if len(times) == len(MIDDLE) and times[0] < times[-1] else (began, written[-1][0])
    return sum(rows for time, rows in written if begin < time <= end) / (end - begin)

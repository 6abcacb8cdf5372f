"""A precompute run on a cluster that need not be there: discrete events, with profiles for speeds and no GPU.

It follows the run's own rules. An expert's shards are divided among its pools by their rate; a pool waits until its
least size fits, then takes as many actors as do and keeps their seats to its end; each actor starts, then pulls shards
of its pool one after the other, and writes one while it computes the next. A machine that fails loses its actors and the shards they had, which are computed again; the actors start anew
where there is room, or when the machine is back.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.nodes import NodeType, PlanError, accelerator_of
from cluster.packing import FreeResources, Seat
from cluster.placement import DECODERS, duration
from cluster.pools import PoolSpec, divide
from mova_core.figures import number

if TYPE_CHECKING:
    from mova_core.experts.cost import Profile

MIDDLE = (0.1, 0.9)  # of an expert's features: between them its rate is steady


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
class _Pool:
    """A pool as it runs."""

    spec: PoolSpec
    rate: float  # images/s of one actor
    waiting: "deque[int]"  # rows of each shard not begun
    size: int = 0  # actors it has taken; 0 before
    under_way: int = 0  # shards
    actors: "set[_Actor]" = field(default_factory=set)

    @property
    def done(self) -> bool:
        return not self.waiting and not self.under_way


@dataclass(eq=False)
class _Actor:
    pool: _Pool
    seat: Seat
    alive: bool = True
    started: bool = False
    computing: int = 0  # rows of the shard it computes
    held: list[int] = field(default_factory=list)  # rows of the shards that are not written yet
    written: float = 0.0  # when its last write ends


def simulate(
    pools: Sequence[PoolSpec],
    wanted: Mapping[str, int],
    profiles: "Sequence[Profile]",
    nodes: Sequence[NodeType],
    *,
    shard_rows: Mapping[str, int] | int = 64,
    feature_bytes: Mapping[str, int] | None = None,
    start_seconds: float = 30.0,
    noise: float = 0.0,
    decode: float | None = None,
    node_bytes_per_second: float | None = None,
    store_bytes_per_second: float | None = None,
    mtbf_hours: float | None = None,
    repair_seconds: float = 600.0,
    seed: int = 0,
    on_shard: Callable[[int], object] = lambda rows: None,
) -> Simulated:
    """Runs pools over what is wanted.

    Args:
        pools: in the order in which they look for room; every expert wanted needs one.
        wanted: features to compute, per expert.
        profiles: of the size and dtype to run.
        nodes: machines, as `cluster.nodes` reads them.
        shard_rows: pictures per shard.
        feature_bytes: stored bytes of one picture's features, per expert; without them writing takes no time.
        start_seconds: from taking a seat to the first shard.
        noise: standard deviation of a batch's time, as a part of it.
        decode: pictures/s that one core decodes and prepares, as `plan_placement` takes it.
        node_bytes_per_second, store_bytes_per_second: what one machine, and the store in all, can write.
        mtbf_hours: mean time between failures of one machine.
        repair_seconds: until a failed machine is back.
        seed: of noise and failures.
        on_shard: called with the rows of each shard as it is written.

    Raises:
        PlanError: a pool has no profile, fits nowhere, or an expert has no pool.
    """
    return _Run(pools, wanted, profiles, nodes, random.Random(seed), locals()).run()


class _Run:
    def __init__(
        self,
        pools: Sequence[PoolSpec],
        wanted: Mapping[str, int],
        profiles: "Sequence[Profile]",
        nodes: Sequence[NodeType],
        chance: random.Random,
        settings: Mapping[str, Any],
    ):
        self.wanted = {name: rows for name, rows in wanted.items() if rows > 0}
        self.nodes, self.chance, self.settings = nodes, chance, settings
        self.room = FreeResources(nodes)
        self.machines = len(self.room)
        self.pools = [
            self._pool(spec, shards, profiles)
            for name, rows in self.wanted.items()
            for spec, shards in self._divided(name, rows, [pool for pool in pools if pool.expert == name])
            if shards
        ]
        self.pools.sort(key=lambda pool: pools.index(pool.spec))
        self.heap: list[tuple[float, int, str, Any]] = []
        self.number = count()
        self.now = 0.0
        self.began: dict[str, float] = {}  # expert -> when its first actor was ready
        self.written: dict[str, list[tuple[float, int]]] = {name: [] for name in self.wanted}  # time and rows
        self.writes_until = [0.0] * (self.machines + 1)  # of each machine, and of the store
        self.on: list[set[_Actor]] = [set() for _ in range(self.machines)]
        self.computed: dict[str, float] = {one.accelerator: 0.0 for one in nodes if one.accelerator}  # GPU-seconds
        self.failures = self.redone = 0
        self.left = len(self.pools)  # pools that are not done
        self.under_way, self.working, self.since = 0, 0.0, 0.0  # shards; seconds with any; since when

    def _divided(self, name: str, rows: int, pools: Sequence[PoolSpec]) -> list[tuple[PoolSpec, list[int]]]:
        """An expert's pools, each with the rows of its shards."""
        if not pools:
            raise PlanError(f"expert {name} has no pool")
        each = self.settings["shard_rows"]
        each = each if isinstance(each, int) else each[name]
        shards = [each] * (rows // each) + [rows % each] * bool(rows % each)
        return [
            (pool, shards[part.start : part.stop]) for pool, part in zip(pools, divide(len(shards), pools), strict=True)
        ]

    def _pool(self, spec: PoolSpec, shards: list[int], profiles: "Sequence[Profile]") -> _Pool:
        kind = spec.accelerator if spec.gpu else None
        measured = [one for one in profiles if one.expert == spec.expert and accelerator_of(one.device) == kind]
        if not measured:
            raise PlanError(f"pool {spec}: no profile of {spec.expert} on {kind or ('a GPU' if spec.gpu else 'a CPU')}")
        rate = min((one.at(spec.batch) if spec.batch else one.best()).images_per_second for one in measured)
        rate *= min(spec.gpu or 1.0, 1.0)
        if decode := self.settings["decode"]:
            cores = min(DECODERS, spec.cpus) if spec.gpu else spec.cpus
            rate = min(rate, cores * decode) if spec.gpu else 1 / (1 / rate + 1 / (cores * decode))
        return _Pool(spec, rate, deque(shards))

    def run(self) -> Simulated:
        mtbf = self.settings["mtbf_hours"]
        for machine in range(self.machines) if mtbf else ():
            self._at(self.chance.expovariate(1 / (mtbf * 3600)), "fail", machine)
        self._seat()
        events = 0
        work: dict[str, Callable[[Any], None]] = {
            "ready": self._ready,
            "next": self._next,
            "computed": self._computed,
            "done": self._done,
            "fail": self._fail,
            "back": self._back,
        }
        while self.left:
            if not self.heap:
                stuck = next(pool.spec for pool in self.pools if not pool.done)
                raise PlanError(f"pool {stuck} fits nowhere: {stuck.min_size} actors find no seat on this cluster")
            self.now, _, what, about = heapq.heappop(self.heap)
            work[what](about)
            events += 1
        return self._simulated(events)

    def _at(self, time: float, what: str, about: Any) -> None:
        heapq.heappush(self.heap, (time, next(self.number), what, about))

    def _seat(self) -> None:
        """Seats for pools that wait for room, and for actors that lost theirs."""
        for pool in self.pools:
            if pool.done:
                continue
            shards = len(pool.waiting) + pool.under_way
            most = pool.size or min(pool.spec.max_size, shards)
            least = 0 if pool.size else min(pool.spec.min_size, shards)
            seats = self.room.take_several(pool.spec, most - len(pool.actors), least)
            pool.size = pool.size or len(seats)
            for seat in seats:
                actor = _Actor(pool, seat)
                pool.actors.add(actor)
                self.on[actor.seat.machine].add(actor)
                self._at(self.now + self.settings["start_seconds"], "ready", actor)

    def _ready(self, actor: _Actor) -> None:
        actor.started = True
        self.began.setdefault(actor.pool.spec.expert, self.now)
        self._next(actor)

    def _next(self, actor: _Actor) -> None:
        """The actor begins its next shard, if there is one."""
        pool = actor.pool
        if not actor.alive or actor.computing or not pool.waiting:
            return
        actor.computing = rows = pool.waiting.popleft()
        actor.held.append(rows)
        self._begun(pool, 1)
        seconds = rows / pool.rate
        if noise := self.settings["noise"]:
            batches = max(1.0, rows / (pool.spec.batch or 1))
            seconds *= max(0.1, self.chance.gauss(1.0, noise / batches**0.5))
        if pool.spec.accelerator in self.computed:
            self.computed[pool.spec.accelerator] += seconds * pool.spec.gpu
        self._at(self.now + seconds, "computed", actor)

    def _begun(self, pool: _Pool, shards: int) -> None:
        """Counts shards under way, and the time in which there are any."""
        pool.under_way += shards
        if not self.under_way:
            self.since = self.now
        self.under_way += shards
        if not self.under_way:
            self.working += self.now - self.since

    def _computed(self, actor: _Actor) -> None:
        """The shard is written, and the next one begun as soon as the write before is over."""
        if not actor.alive:
            return
        rows, actor.computing = actor.computing, 0
        begin, actor.written = max(self.now, actor.written), self._write(actor, rows)
        self._at(actor.written, "done", (actor, rows))
        if begin > self.now:
            self._at(begin, "next", actor)
        else:
            self._next(actor)

    def _write(self, actor: _Actor, rows: int) -> float:
        """When a shard is written: each machine, and the store, write one after the other."""
        end = self.now
        if sizes := self.settings["feature_bytes"]:
            limits = (self.settings["node_bytes_per_second"], self.settings["store_bytes_per_second"])
            for queue, limit in zip((actor.seat.machine, self.machines), limits, strict=True):
                if limit:
                    begin = max(self.now, self.writes_until[queue])
                    self.writes_until[queue] = begin + rows * sizes[actor.pool.spec.expert] / limit
                    end = max(end, self.writes_until[queue])
        return end

    def _done(self, what: tuple[_Actor, int]) -> None:
        """A shard is in the store."""
        actor, rows = what
        if not actor.alive:
            return
        pool = actor.pool
        actor.held.remove(rows)
        self._begun(pool, -1)
        self.written[pool.spec.expert].append((self.now, rows))
        self.settings["on_shard"](rows)
        if pool.done:
            self.left -= 1
            for other in list(pool.actors):
                self._leave(other)
            self._seat()

    def _leave(self, actor: _Actor) -> None:
        actor.alive = False
        actor.pool.actors.discard(actor)
        self.on[actor.seat.machine].discard(actor)
        self.room.give_back(actor.pool.spec, actor.seat)

    def _fail(self, machine: int) -> None:
        self.failures += 1
        self.room.up[machine] = False
        for actor in list(self.on[machine]):
            actor.pool.waiting.extendleft(actor.held)
            self._begun(actor.pool, -len(actor.held))
            self.redone += len(actor.held)
            self._leave(actor)
        self._wake()
        self._seat()
        self._at(self.now + self.settings["repair_seconds"], "back", machine)

    def _back(self, machine: int) -> None:
        self.room.up[machine] = True
        self._at(self.now + self.chance.expovariate(1 / (self.settings["mtbf_hours"] * 3600)), "fail", machine)
        self._seat()

    def _wake(self) -> None:
        """Actors that had found no shard left take those that were lost."""
        for pool in self.pools:
            idle = [actor for actor in pool.actors if actor.started and not actor.computing]
            for actor in idle[: len(pool.waiting)]:
                self._at(self.now, "ready", actor)

    def _simulated(self, events: int) -> Simulated:
        rates = {name: _steady(self.began[name], done) for name, done in self.written.items()}
        finished = {name: done[-1][0] for name, done in self.written.items()}
        seconds = max(finished.values())
        gpus = {
            kind: sum(one.count * one.gpus for one in self.nodes if one.accelerator == kind) for kind in self.computed
        }
        return Simulated(
            seconds=seconds,
            images_per_second=max(self.wanted.values()) / self.working,
            rates=rates,
            finished=finished,
            busy={kind: spent / (gpus[kind] * seconds) for kind, spent in self.computed.items()},
            failures=self.failures,
            redone=self.redone,
            events=events,
        )


def _steady(began: float, done: Sequence[tuple[float, int]]) -> float:
    """Rows per second between the `MIDDLE` parts of what was done, in the order of time."""
    total, so_far = sum(rows for _, rows in done), 0
    times: list[float] = []
    for time, rows in done:
        so_far += rows
        if so_far >= MIDDLE[len(times)] * total:
            times.append(time)
            if len(times) == len(MIDDLE):
                break
    begin, end = times if len(times) == len(MIDDLE) and times[0] < times[-1] else (began, done[-1][0])
    return sum(rows for time, rows in done if begin < time <= end) / (end - begin)
